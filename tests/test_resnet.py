import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ccl_jax.models import network as networks
from ccl_jax.models.initial import Draws
from ccl_jax.models.layers import UpConv
from ccl_jax.models.resnet import (
    ARCHITECTURES,
    BasicBlock,
    Bottleneck,
    ResNetEncoder,
    architecture_of,
)
from ccl_jax.models.reverse import Decoder, Neck


def abstract(make):
    """The module's structure and trees, without allocating anything."""
    return networks.split(nnx.eval_shape(make))


def output_shapes(make, *inputs, **keywords):
    graphdef, params, stats = abstract(make)

    def run(params, stats, inputs):
        return nnx.merge(graphdef, params, stats)(*inputs, **keywords)

    return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(run, params, stats, inputs))


def maps_of(channels, side=16):
    return tuple(
        jax.ShapeDtypeStruct((2, side >> scale, side >> scale, width), jnp.float32)
        for scale, width in enumerate(channels)
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_neck_and_decoder_have_matching_shapes(name):
    plan = architecture_of(name)
    want = tuple(leaf.shape for leaf in maps_of(plan.channels))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    code = jax.ShapeDtypeStruct((2, 2, 2, 2048 if plan.bottleneck else 512), jnp.float32)
    assert (
        output_shapes(
            lambda: ResNetEncoder(name, dtype=None, draws=Draws(jax.random.key(0))), images
        )
        == want
    )
    neck = output_shapes(
        lambda: Neck(name, dtype=None, draws=Draws(jax.random.key(0))),
        maps_of(plan.channels),
        train=False,
    )
    assert neck == code.shape
    decoder = output_shapes(
        lambda: Decoder(name, dtype=None, draws=Draws(jax.random.key(0))), code, train=False
    )
    assert decoder == want


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("resnet10", 9),
        ("resnet18", 15),
        ("resnet34", 29),
        ("resnet50", 43),
        ("wide_resnet50_2", 43),
    ],
)
def test_encoder_has_as_many_convolutions_as_published(name, convolutions):
    _, params, _ = abstract(lambda: ResNetEncoder(name, dtype=None, draws=Draws(jax.random.key(0))))
    assert sum(leaf.ndim == 4 for leaf in jax.tree.leaves(params)) == convolutions


def test_blocks_add_a_shortcut_only_where_the_shape_changes():
    _, params, _ = abstract(
        lambda: ResNetEncoder("resnet18", dtype=None, draws=Draws(jax.random.key(0)))
    )
    with_shortcut = {
        (stage, block)
        for stage in ("layer1", "layer2", "layer3")
        for block, tree in params[stage].items()
        if "shortcut" in tree
    }
    assert with_shortcut == {("layer2", "block0"), ("layer3", "block0")}
    _, params, _ = abstract(
        lambda: ResNetEncoder("resnet50", dtype=None, draws=Draws(jax.random.key(0)))
    )
    assert params["layer1"]["block0"]["shortcut"]["conv"]["kernel"].shape == (1, 1, 64, 256)


def test_first_block_of_each_decoder_stage_upsamples_by_transposed_convolutions():
    for name, conv in (("resnet18", "conv1"), ("wide_resnet50_2", "conv2")):
        _, params, _ = abstract(
            lambda name=name: Decoder(name, dtype=None, draws=Draws(jax.random.key(0)))
        )
        for stage in params.values():
            assert stage["block0"][conv]["kernel"].shape[:2] == (2, 2)
            assert stage["block0"]["shortcut"]["conv"]["kernel"].shape[:2] == (2, 2)
            assert stage["block1"][conv]["kernel"].shape[:2] == (3, 3)


def test_bottleneck_strides_in_its_3x3_convolution():
    def make(resample):
        return nnx.eval_shape(
            lambda: Bottleneck(
                8, 16, width=4, resample=resample, dtype=None, draws=Draws(jax.random.key(0))
            )
        )

    assert make("down").conv1.stride == 1
    assert make("down").conv2.stride == 2
    assert isinstance(make("up").conv2, UpConv)
    assert make("same").conv2.stride == 1


def test_a_block_whose_branch_is_silent_passes_the_rectified_input():
    block = BasicBlock(4, 4, resample="same", dtype=None, draws=Draws(jax.random.key(0)))
    block.norm2.scale[...] = jnp.zeros(4)
    maps = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 4)), jnp.float32)
    np.testing.assert_array_equal(block(maps, train=False), jnp.maximum(maps, 0))


def test_random_encoder_keeps_its_activations_in_a_sane_range():
    @jax.jit
    def run(key, images):
        return ResNetEncoder("resnet34", dtype=None, draws=Draws(key))(images)

    for maps in run(jax.random.key(0), jax.random.normal(jax.random.key(1), (2, 64, 64, 3))):
        assert 0.05 < float(jnp.sqrt(jnp.mean(maps**2))) < 100
        assert float(jnp.std(maps, axis=(0, 1, 2)).max()) > 0


def test_neck_reads_every_scale():
    maps = [jnp.ones(leaf.shape) for leaf in maps_of((64, 128, 256), side=8)]

    @jax.jit
    def sensitivity(maps):
        neck = Neck("resnet18", dtype=None, draws=Draws(jax.random.key(0)))
        return jax.grad(lambda maps: jnp.sum(neck(maps, train=False) ** 2))(maps)

    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in sensitivity(maps))


def test_unknown_architecture_suggests_the_closest():
    with pytest.raises(ValueError, match=r"--config\.model\.encoder=resnet34"):
        architecture_of("resnet_34")
