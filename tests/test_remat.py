import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import setup
from ccl_jax.models import network as networks
from ccl_jax.models.resnet import ARCHITECTURES, Architecture
from ccl_jax.models.trees import flatten, unflatten

SMALL = {"family": "rd", "encoder": "tiny", "projector": "plain", "compute_dtype": "float32"}

DEPTHWISE = SMALL | {"encoder": "resnet10", "projector": "depthwise"}  # conftest's


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    """A ResNet of bottlenecks with one block per stage."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", Architecture(True, (1, 1, 1), 1, 1))


def loss_and_statistics(graphdef, batch_stats, views):
    """loss(params) -> (a scalar of all outputs of both views, running statistics)."""

    def loss(params):
        network = networks.merge(graphdef, params, batch_stats)
        out = network(*views, train=True)
        leaves = [*out.rebuilt, *out.projected, out.pooled, *out.augmented.projected]
        # Sums would tell nothing: a normalised map has mean 0.
        total = sum(jnp.square(leaf - 0.3).mean() for leaf in (*leaves, out.augmented.pooled))
        return total, networks.statistics(network)

    return loss


def as_double(tree, rng):
    """Random float64 values of a tree's shapes; positive where a variance or a scale is meant."""
    return unflatten(
        {
            path: jnp.asarray(
                0.05 * rng.standard_normal(leaf.shape)
                if leaf.ndim == 4
                else 1 + 0.1 * rng.random(leaf.shape)
            )
            for path, leaf in flatten(tree).items()
        }
    )


def saved_bytes(loss, params):
    """Bytes of what the forward pass leaves for the backward pass, parameters apart."""
    _, pull, _ = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True), params)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    return kept - sum(leaf.size * 8 for leaf in jax.tree.leaves(params))


def test_shapes_of_maps_are_known_without_computing_any():
    graphdef, *trees = networks.abstract_network(**SMALL, remat=True)

    def scales(params, batch_stats, images):
        network = networks.merge(graphdef, params, batch_stats)
        return [jnp.zeros(scale.shape) for scale in network.map_shapes(images)]

    found = jax.eval_shape(scales, *trees, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32))
    assert [scale.shape for scale in found] == [(2, 16, 16, 256), (2, 8, 8, 512), (2, 4, 4, 1024)]


def test_the_setting_reaches_the_network_that_is_trained(tiny_config):
    plain, *_ = setup.abstract_network(tiny_config)
    tiny_config.run.remat = True
    again, *_ = setup.abstract_network(tiny_config)
    assert plain != again
    wanted, *_ = networks.abstract_network(**DEPTHWISE, remat=True)
    assert again == wanted


@pytest.mark.slow
def test_computing_maps_again_keeps_less_and_changes_no_gradient_and_no_running_statistic():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        views = [jnp.asarray(rng.standard_normal((2, 64, 64, 3))) for _ in range(2)]
        found, kept = {}, {}
        plain, *trees = networks.abstract_network(**SMALL)
        params, batch_stats = (as_double(tree, rng) for tree in trees)
        again, *_ = networks.abstract_network(**SMALL, remat=True)
        for name, graphdef in {"plain": plain, "again": again}.items():
            loss = loss_and_statistics(graphdef, batch_stats, views)
            kept[name] = saved_bytes(loss, params)
            (total, statistics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
            found[name] = {"loss": total, "statistics": statistics, "gradients": gradients}
        moved = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max(), batch_stats["neck"], statistics["neck"]
        )
        assert min(jax.tree.leaves(moved)) > 0
        assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradients["decoder"])) > 1e-6
    for one, other in zip(*map(jax.tree.leaves, (found["plain"], found["again"])), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(other, one, rtol=1e-10, atol=1e-12)
    assert kept["again"] < 0.6 * kept["plain"], kept
