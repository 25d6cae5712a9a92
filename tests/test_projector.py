import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ccl_jax.models.initial import Draws
from ccl_jax.models.projector import Projector

CHANNELS = (8, 16)


def projector(kind, dtype=None):
    return Projector(CHANNELS, kind, dtype=dtype, draws=Draws(jax.random.key(0)))


def abstract(kind, dtype=None):
    return nnx.eval_shape(lambda: projector(kind, dtype))


def weights_of(kind):
    """Values drawn by NumPy: compiling the real initialisation takes longer than any test here."""
    rng = np.random.default_rng(1)
    state = nnx.to_pure_dict(nnx.state(abstract(kind), nnx.Param))
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), state)


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def project(weights, maps, kind, dtype=None):
    return nnx.merge(nnx.graphdef(abstract(kind, dtype)), weights)(maps)


def two_scales(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal((2, side, side, width)), jnp.float32)
        for side, width in zip((8, 4), CHANNELS, strict=True)
    )


@pytest.mark.parametrize("kind", ["plain", "depthwise"])
def test_projected_maps_keep_their_shapes_and_are_finite(kind):
    got = project(weights_of(kind), two_scales(), kind)
    assert [maps.shape for maps in got] == [maps.shape for maps in two_scales()]
    assert all(bool(jnp.isfinite(maps).all()) for maps in got)


@pytest.mark.parametrize("kind", ["plain", "depthwise"])
def test_channels_narrow_to_a_quarter_and_widen_again(kind):
    head = abstract(kind).scale1
    shapes = [getattr(head, f"conv{index}").kernel.shape for index in (1, 2, 3, 4)]
    side = 3 if kind == "plain" else 1
    assert shapes == [(side, side, a, b) for a, b in ((16, 8), (8, 4), (4, 8), (8, 16))]


@pytest.mark.parametrize("kind", ["plain", "depthwise"])
def test_parameter_count_follows_from_the_widths(kind):
    def count(width):
        steps = ((width, width // 2), (width // 2, width // 4))
        steps += tuple((b, a) for a, b in reversed(steps))
        if kind == "plain":
            return sum(9 * a * b + b for a, b in steps)
        return sum(9 * a + a + a * b + b for a, b in steps)

    leaves = jax.tree.leaves(nnx.state(abstract(kind), nnx.Param))
    assert sum(leaf.size for leaf in leaves) == sum(map(count, CHANNELS))


def test_output_is_a_leaky_rectified_normalised_map():
    (maps, _) = project(weights_of("plain"), two_scales(), "plain")
    maps = np.asarray(maps, np.float64)
    before = np.where(maps < 0, maps / 0.01, maps)  # undo the leaky rectifier
    np.testing.assert_allclose(before.mean((1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(before.var((1, 2)), 1, atol=2e-3)


def test_biases_do_not_influence_the_output():
    weights = weights_of("plain")
    moved = jax.tree.map(lambda leaf: leaf + 3 if leaf.ndim == 1 else leaf, weights)
    for before, after in zip(
        project(weights, two_scales(), "plain"), project(moved, two_scales(), "plain"), strict=True
    ):
        np.testing.assert_allclose(after, before, atol=1e-3)


def test_an_image_is_projected_alike_whatever_else_is_in_the_batch():
    maps = two_scales()
    weights = weights_of("depthwise")
    alone = project(weights, tuple(scale[:1] for scale in maps), "depthwise")
    together = project(weights, maps, "depthwise")
    for one, both in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, both[:1], rtol=1e-4, atol=1e-5)


def test_constant_maps_give_finite_values_and_gradients():
    maps = tuple(jnp.ones((1, 1, 1, width)) for width in CHANNELS)

    def total(weights, maps):
        return sum(scale.sum() for scale in project(weights, maps, "plain"))

    value, gradients = jax.value_and_grad(total, (0, 1))(weights_of("plain"), maps)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_bfloat16_compute_stays_close_to_float32():
    maps = two_scales()
    weights = weights_of("plain")
    pair = project(weights, maps, "plain"), project(weights, maps, "plain", jnp.bfloat16)
    for exact, rough in zip(*pair, strict=True):
        assert rough.dtype == jnp.bfloat16
        assert float(jnp.abs(exact - rough.astype(jnp.float32)).mean()) < 0.05


def test_unknown_kind_names_the_setting():
    with pytest.raises(ValueError, match=r"--config\.model\.projector=plain"):
        projector("dense")
