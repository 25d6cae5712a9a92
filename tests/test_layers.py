import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ccl_jax.models.initial import Draws
from ccl_jax.models.layers import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    UpConv,
    compute_dtype,
    instance_norm,
    max_pool,
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def slow_convolution(maps, kernel, stride):
    """The definition, in loops, with k // 2 zeros on both sides."""
    size = kernel.shape[0]
    pad = size // 2
    padded = np.pad(np.asarray(maps, np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, maps.shape[1], stride)
    columns = range(0, maps.shape[2], stride)
    return np.stack(
        [
            np.stack(
                [
                    np.einsum("bijc,ijcd->bd", padded[:, r : r + size, c : c + size], kernel)
                    for c in columns
                ],
                axis=1,
            )
            for r in rows
        ],
        axis=1,
    )


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_equals_its_definition_with_padding_on_both_sides(size, stride):
    conv = Conv(3, 4, size, stride=stride, bias=True, dtype=None, draws=Draws(jax.random.key(0)))
    maps = normal(1, 2, 8, 6, 3)
    want = slow_convolution(maps, np.asarray(conv.kernel[...]), stride) + np.asarray(conv.bias[...])
    np.testing.assert_allclose(conv(maps), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 3), (5, 4), (7, 8), (9, 9)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_of_small_maps_equals_its_definition_too(shape, stride):
    conv = Conv(3, 4, 3, stride=stride, dtype=None, draws=Draws(jax.random.key(0)))
    maps = normal(1, 2, *shape, 3)
    want = slow_convolution(maps, np.asarray(conv.kernel[...]), stride)
    np.testing.assert_allclose(conv(maps), want, rtol=1e-4, atol=1e-5)


def test_strided_convolution_of_odd_sized_maps_rounds_up():
    for size in (1, 3):
        conv = Conv(2, 2, size, stride=2, dtype=None, draws=Draws(jax.random.key(0)))
        assert conv(jnp.ones((1, 7, 5, 2))).shape == (1, 4, 3, 2)


def test_depthwise_convolution_equals_one_convolution_per_channel():
    layer = DepthwiseConv(5, dtype=None, draws=Draws(jax.random.key(0)))
    maps = normal(2, 2, 6, 7, 5)
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    got = layer(maps)
    for channel in range(5):
        want = slow_convolution(maps[..., [channel]], kernel[..., [channel]], 1)[..., 0]
        np.testing.assert_allclose(got[..., channel], want + bias[channel], rtol=1e-4, atol=1e-5)


def test_transposed_convolution_places_four_unflipped_taps():
    layer = UpConv(3, 4, dtype=None, draws=Draws(jax.random.key(0)))
    maps, kernel = normal(3, 2, 3, 5, 3), np.asarray(layer.kernel[...])
    got = np.asarray(layer(maps))
    assert got.shape == (2, 6, 10, 4)
    for row in range(2):
        for column in range(2):
            want = maps @ kernel[row, column]
            np.testing.assert_allclose(got[:, row::2, column::2], want, rtol=1e-4, atol=1e-5)


def test_transposed_convolution_is_the_gradient_of_a_strided_convolution():
    layer = UpConv(3, 4, dtype=None, draws=Draws(jax.random.key(0)))
    maps, kernel = normal(4, 1, 3, 3, 3), layer.kernel[...]

    def down(wide):
        return jax.lax.conv_general_dilated(
            wide,
            kernel.swapaxes(2, 3),
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    (want,) = jax.vjp(down, jnp.zeros((1, 6, 6, 4)))[1](jnp.asarray(maps))
    np.testing.assert_allclose(layer(maps), want, rtol=1e-4, atol=1e-5)


def test_batch_norm_uses_biased_variance_and_records_the_unbiased_one():
    norm = BatchNorm(1)
    maps = jnp.array([0.0, 2.0, 4.0, 6.0]).reshape(2, 2, 1, 1)  # mean 3, variance 5 or 20/3
    got = norm(maps, train=True)
    np.testing.assert_allclose(got.ravel(), (np.array([0, 2, 4, 6]) - 3) / np.sqrt(5), rtol=1e-5)
    np.testing.assert_allclose(norm.mean[...], [0.3], rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], [0.9 + 0.1 * 20 / 3], rtol=1e-6)


def test_batch_norm_outside_training_uses_and_keeps_running_statistics():
    norm = BatchNorm(2)
    norm.mean[...] = jnp.array([1.0, -2.0])
    norm.var[...] = jnp.array([4.0, 0.25])
    norm.scale[...] = jnp.array([3.0, 1.0])
    norm.bias[...] = jnp.array([0.5, 0.0])
    got = norm(jnp.full((1, 1, 1, 2), 5.0), train=False)
    np.testing.assert_allclose(got.ravel(), [3 * 4 / 2 + 0.5, 7 / 0.5], rtol=1e-4)
    np.testing.assert_array_equal(norm.mean[...], [1.0, -2.0])
    np.testing.assert_array_equal(norm.var[...], [4.0, 0.25])


def test_batch_norm_of_an_almost_constant_channel_keeps_its_digits():
    spread = normal(5, 4, 8, 8, 1)
    maps = jnp.asarray(100.0 + 0.01 * spread, jnp.float32)
    exact = np.asarray(maps, np.float64)
    want = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    # 100 has seven digits, and a hundredth of it three: that much must remain.
    np.testing.assert_allclose(BatchNorm(1)(maps, train=True), want, atol=5e-3)


def test_batch_norm_of_a_single_position_is_finite():
    norm = BatchNorm(3)
    got = norm(jnp.full((1, 1, 1, 3), 7.0), train=True)
    np.testing.assert_array_equal(got, np.zeros((1, 1, 1, 3)))
    assert np.isfinite(norm.var[...]).all()


def test_batch_norm_of_a_sharded_batch_sees_the_whole_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    maps = normal(6, 8, 2, 2, 3) + jnp.arange(8.0)[:, None, None, None]
    split = jax.device_put(maps, jax.NamedSharding(mesh, jax.P("data")))

    @jax.jit
    def run(values):
        norm = BatchNorm(3)
        return norm(values, train=True), norm.mean[...], norm.var[...]

    for sharded, whole in zip(run(split), run(maps), strict=True):
        np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-6)


def grouped_norm(channels, images):
    norm = BatchNorm(channels)
    norm.images = images
    return norm


def test_batch_norm_by_groups_normalises_each_by_itself_and_records_their_mean():
    maps = normal(6, 6, 2, 2, 3) * jnp.arange(1.0, 7.0)[:, None, None, None]
    norm = grouped_norm(3, 2)
    got = norm(maps, train=True)
    alone = [BatchNorm(3) for _ in range(3)]
    parts = [part(maps[2 * i : 2 * i + 2], train=True) for i, part in enumerate(alone)]
    np.testing.assert_allclose(got, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        want = np.mean([getattr(part, name)[...] for part in alone], axis=0)
        np.testing.assert_allclose(getattr(norm, name)[...], want, rtol=1e-5)


def test_batch_norm_by_groups_refuses_a_batch_that_is_no_whole_number_of_them():
    with pytest.raises(ValueError, match=r"norm_images=4 does not divide a batch of 6"):
        grouped_norm(3, 4)(jnp.zeros((6, 1, 1, 3)), train=True)


def test_batch_norm_by_groups_needs_no_word_from_other_devices_to_normalise():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))

    def run(values, images):
        norm = grouped_norm(3, images)
        return norm(values, train=True)

    maps = jnp.asarray(normal(7, 8, 2, 2, 3))
    for images, alone in ((2, True), (0, False)):
        step = jax.jit(run, static_argnums=1, in_shardings=split, out_shardings=split)
        compiled = step.lower(maps, images).compile().as_text()
        assert ("all-reduce" not in compiled) == alone
        np.testing.assert_allclose(step(maps, images), run(maps, images), rtol=1e-5, atol=1e-6)


def test_instance_norm_gives_each_image_and_channel_mean_zero_and_variance_one():
    got = np.asarray(instance_norm(jnp.asarray(5 + 3 * normal(7, 2, 6, 6, 4))))
    np.testing.assert_allclose(got.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.var((1, 2)), 1, atol=1e-4)


def test_max_pool_ignores_the_border():
    maps = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)  # all negative: zeros would win
    np.testing.assert_array_equal(max_pool(maps)[0, ..., 0], [[-1, -2], [-5, -6]])


def test_layers_compute_in_bfloat16_but_keep_float32_parameters_and_statistics():
    conv = Conv(3, 4, 3, dtype=compute_dtype("bfloat16"), draws=Draws(jax.random.key(0)))
    norm = BatchNorm(4)
    maps = norm(conv(normal(8, 2, 4, 4, 3)), train=True)
    assert maps.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state((conv, norm)))} == {
        jnp.dtype("float32")
    }


def test_float32_compute_leaves_float64_inputs_alone():
    with jax.enable_x64(True):
        maps = jnp.asarray(normal(9, 2, 4, 4, 3), jnp.float64)
        layers = (
            Conv(3, 4, 3, dtype=compute_dtype("float32"), draws=Draws(jax.random.key(0))),
            Conv(3, 4, 1, dtype=None, draws=Draws(jax.random.key(0))),
            DepthwiseConv(3, dtype=None, draws=Draws(jax.random.key(0))),
            UpConv(3, 4, dtype=None, draws=Draws(jax.random.key(0))),
            lambda maps: BatchNorm(3)(maps, train=True),
            instance_norm,
        )
        assert [layer(maps).dtype for layer in layers] == [jnp.float64] * len(layers)


def test_unknown_compute_dtype_names_the_setting():
    with pytest.raises(ValueError, match=r"config\.model\.compute_dtype=float32"):
        compute_dtype("float16")


def test_initial_values_have_the_spread_of_the_recipe():
    draws = Draws(jax.random.key(0))
    kaiming = np.asarray(Conv(64, 32, 3, dtype=None, draws=draws).kernel[...])
    assert kaiming.std() == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.03)
    up = np.abs(UpConv(64, 32, dtype=None, draws=draws).kernel[...])
    assert 0.98 / np.sqrt(4 * 32) < up.max() <= 1 / np.sqrt(4 * 32)
    depthwise = DepthwiseConv(64, dtype=None, draws=draws)
    assert 0.98 / 3 < np.abs(depthwise.kernel[...]).max() <= 1 / 3
    assert 0.9 / 3 < np.abs(depthwise.bias[...]).max() <= 1 / 3
