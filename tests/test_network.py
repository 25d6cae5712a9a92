import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ccl_jax.models import network as networks
from ccl_jax.models.resnet import ARCHITECTURES, Architecture
from ccl_jax.models.trees import check_same_tree, flatten, unflatten

SMALL = {"family": "rd", "encoder": "tiny", "compute_dtype": "float32"}


@pytest.fixture(scope="module", autouse=True)
def tiny_architecture():
    """A ResNet with one block per stage: half the time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", Architecture(False, (1, 1, 1), 1, 1))
        yield


def views(seed=0, images=4):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal((images, 64, 64, 3)), jnp.float32) for _ in range(2)
    )


def value_of(path, leaf, rng):
    """Values as at initialisation, but drawn by NumPy: that compiles nothing."""
    if leaf.ndim == 4:
        size, _, _, channels_out = leaf.shape
        spread = (2 / (size * size * channels_out)) ** 0.5
        return jnp.asarray(spread * rng.standard_normal(leaf.shape, np.float32))
    return jnp.full(leaf.shape, float(path.endswith(("scale", "var"))))


@pytest.fixture(scope="module")
def built():
    """Structure, parameters and statistics of a small network."""
    rng = np.random.default_rng(1)
    graphdef, *trees = networks.abstract_network(**SMALL, projector="plain")
    filled = (
        unflatten({path: value_of(path, leaf, rng) for path, leaf in flatten(tree).items()})
        for tree in trees
    )
    return graphdef, *filled


@pytest.fixture(scope="module")
def forward(built):
    """The jitted network: (params, stats, clean, augmented, noise) -> (output, statistics)."""
    graphdef, *_ = built

    def run(params, stats, clean, augmented, noise, *, train):
        network = networks.merge(graphdef, params, stats)
        output = network(clean, augmented, train=train, noise=noise)
        return output, networks.statistics(network)

    return jax.jit(run, static_argnames="train")


def noise_of(probability):
    shapes = ((4, 16, 16, 64), (4, 8, 8, 128), (4, 4, 4, 256))
    scales = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return networks.draw_noise(jax.random.key(1), scales, probability)


@pytest.fixture(scope="module")
def trained(built, forward):
    """Output and statistics of one training pass over two views, with noise of zero."""
    _, params, stats = built
    return forward(params, stats, *views(), noise_of(0.0), train=True)


@pytest.mark.parametrize(("projector", "size"), [("plain", 15_486_912), ("depthwise", 1_764_672)])
def test_wide_resnet_has_the_published_parameter_counts(projector, size):
    _, params, _ = networks.abstract_network(
        family="rd", encoder="wide_resnet50_2", projector=projector, compute_dtype="bfloat16"
    )
    assert networks.parameter_counts(params) == {
        "encoder": 24_862_528,
        "projector": size,
        "neck": 30_829_568,
        "decoder": 24_917_504,
    }


def test_abstract_and_freshly_built_network_have_the_same_trees():
    def make(key):
        rngs = nnx.Rngs(key)
        return networks.split(networks.build_network(**SMALL, projector="plain", rngs=rngs))[1:]

    _, params, stats = networks.abstract_network(**SMALL, projector="plain")
    check_same_tree((params, stats), jax.eval_shape(make, jax.random.key(0)), "The network")
    assert params.keys() == {"encoder", "projector", "neck", "decoder"}
    assert stats.keys() == {"encoder", "neck", "decoder"}
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}


def test_freshly_built_network_depends_on_its_key_and_the_encoder_on_nothing_else():
    def encoder_of(key, projector):
        rngs = nnx.Rngs(key)
        return networks.build_network(**SMALL, projector=projector, rngs=rngs).encoder.conv1.kernel

    kernels = [
        np.asarray(jax.jit(lambda key, kind=kind: encoder_of(key, kind)[...])(jax.random.key(seed)))
        for seed, kind in ((0, "plain"), (0, "none"), (1, "plain"))
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.any(kernels[0] == kernels[2])


def test_no_key_of_the_trees_is_a_number(built):
    names = {name for path in flatten(built[1:]) for name in path.split("/")[1:]}
    assert not any(name.isdigit() for name in names)


def test_training_output_has_the_encoders_shapes_fine_to_coarse(trained):
    output, _ = trained
    shapes = [(4, 16, 16, 64), (4, 8, 8, 128), (4, 4, 4, 256)]
    for maps in (
        output.targets,
        output.rebuilt,
        output.projected,
        output.augmented.targets,
        output.augmented.projected,
    ):
        assert [scale.shape for scale in maps] == shapes
    assert output.pooled.shape == output.augmented.pooled.shape == (4, 512)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(output))


def test_neck_statistics_move_twice_decoders_once_and_encoders_never(built, trained, forward):
    _, params, stats = built
    clean, augmented = views()
    _, both = trained
    _, first = forward(params, stats, clean, None, None, train=True)
    _, second = forward(params, first, augmented, None, None, train=True)
    jax.tree.map(np.testing.assert_array_equal, both["encoder"], stats["encoder"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, both["neck"], second["neck"])
    jax.tree.map(close, both["decoder"], first["decoder"])
    moved = np.abs(np.asarray(second["neck"]["norm1"]["mean"] - first["neck"]["norm1"]["mean"]))
    assert moved.max() > 1e-3


def test_outside_training_nothing_moves_and_images_do_not_influence_each_other(built, forward):
    _, params, stats = built
    clean, _ = views()
    output, after = forward(params, stats, clean, None, None, train=False)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    assert output.augmented is None
    others = clean.at[2:].set(7 * clean[2:] + 1)
    beside, _ = forward(params, stats, others, None, None, train=False)
    for one, other in zip(output.rebuilt, beside.rebuilt, strict=True):
        np.testing.assert_allclose(other[:2], one[:2], rtol=1e-3, atol=1e-4)
        assert float(jnp.abs(other[2:] - one[2:]).max()) > 0.01


def test_gradients_reach_projector_neck_and_decoder_but_not_the_encoder(built):
    graphdef, params, stats = built
    clean, _ = views()

    @jax.jit
    @jax.grad
    def gradient(params):
        output = networks.merge(graphdef, params, stats)(clean, train=True)
        pairs = zip(output.targets, output.rebuilt, strict=True)
        return sum(jnp.mean(jnp.square(a - b)) for a, b in pairs)

    largest = {
        part: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        for part, tree in gradient(params).items()
    }
    assert largest.pop("encoder") == 0
    assert all(value > 0 for value in largest.values())


def test_noise_disturbs_the_projected_clean_maps_and_what_follows_only(built, forward, trained):
    _, params, stats = built
    plain, _ = trained
    noise = noise_of(1.0)
    noisy, _ = forward(params, stats, *views(), noise, train=True)
    for before, after, (values, mask) in zip(plain.projected, noisy.projected, noise, strict=True):
        np.testing.assert_allclose(after, before + values * mask, atol=2e-3)
    jax.tree.map(np.testing.assert_array_equal, plain.targets, noisy.targets)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
        plain.augmented.projected,
        noisy.augmented.projected,
    )
    assert float(jnp.abs(plain.rebuilt[0] - noisy.rebuilt[0]).max()) > 0.01
    assert float(jnp.abs(plain.pooled - noisy.pooled).max()) > 0.01


def test_noise_mask_is_shared_over_channels_and_covers_half_of_the_positions():
    shapes = (jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32),)
    ((values, mask),) = jax.jit(lambda key: networks.draw_noise(key, shapes, 1.0))(
        jax.random.key(0)
    )
    assert mask.shape == (8, 16, 16, 1)
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)


def test_noise_comes_in_the_asked_share_of_steps_and_is_zero_otherwise():
    shapes = (jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32),) * 2
    draws = jax.jit(jax.vmap(lambda key: networks.draw_noise(key, shapes, 0.3085)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    first, second = (np.asarray(mask).any((1, 2, 3, 4)) for _, mask in draws)
    np.testing.assert_array_equal(first, second)
    assert first.mean() == pytest.approx(0.3085, abs=0.04)


def test_noise_with_probability_zero_is_zero():
    shapes = (jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32),)
    draws = jax.jit(jax.vmap(lambda key: networks.draw_noise(key, shapes, 0.0)))(
        jax.random.split(jax.random.key(0), 50)
    )
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(draws))


def test_map_shapes_are_those_of_the_targets(built, trained):
    network = networks.merge(*built)
    shapes = network.map_shapes(views()[0])
    assert [leaf.shape for leaf in shapes] == [maps.shape for maps in trained[0].targets]


def test_four_devices_give_the_numbers_of_one(built, forward, trained):
    _, params, stats = built
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split, copied = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    params, stats = jax.device_put((params, stats), copied)
    got = forward(params, stats, *jax.device_put(views(), split), noise_of(0.0), train=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), got, trained)


def test_without_projector_the_projected_maps_are_the_targets():
    graphdef, params, stats = networks.abstract_network(**SMALL, projector="none")
    assert params.keys() == {"encoder", "neck", "decoder"}
    network = networks.merge(graphdef, *jax.tree.map(lambda a: jnp.ones(a.shape), (params, stats)))
    assert network.projector is None
    targets, projected = network._encode(views(images=1)[0])
    assert all(a is b for a, b in zip(targets, projected, strict=True))


@pytest.mark.parametrize("projector", ["plain", "depthwise", "none"])
def test_bfloat16_network_gives_float32_outputs_and_statistics(projector):
    settings = SMALL | {"compute_dtype": "bfloat16"}
    graphdef, params, stats = networks.abstract_network(**settings, projector=projector)

    def run(params, stats, clean, augmented):
        network = networks.merge(graphdef, params, stats)
        return network(clean, augmented, train=True), networks.statistics(network)

    shapes = jax.eval_shape(run, params, stats, *views())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("projector", ["plain", "depthwise", "none"])
def test_bfloat16_holds_the_maps_of_a_bfloat16_network(projector):
    """So the local loss loses nothing when it multiplies and sends them in bfloat16."""
    settings = SMALL | {"compute_dtype": "bfloat16"}
    network = networks.build_network(**settings, projector=projector, rngs=nnx.Rngs(0))
    graphdef, params, stats = networks.split(network)

    @jax.jit
    def run(params, stats, clean, augmented):
        return networks.merge(graphdef, params, stats)(clean, augmented, train=True)

    out = run(params, stats, *views())
    for view in (out, out.augmented):
        for maps in (*view.targets, *view.projected):
            assert maps.dtype == jnp.float32 and jnp.any(maps != 0)
            assert jnp.array_equal(maps, maps.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"family": "vitad"}, "config.model.family"),
        ({"encoder": "resnet19"}, "config.model.encoder=resnet18"),
        ({"projector": "dense"}, "config.model.projector"),
        ({"compute_dtype": "float8"}, "config.model.compute_dtype"),
    ],
)
def test_unknown_settings_are_named_with_a_fix(change, flag):
    with pytest.raises(ValueError, match=flag):
        networks.abstract_network(**(SMALL | {"projector": "plain"} | change))
