"""The layers every ResNet-like part is made of, with PyTorch's meaning and fast on CPUs too.

Timings in this file: float32, batch 16, two CPU cores, jax 0.10.2.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ccl_jax.models.initial import Draws, Initializer, kaiming_normal, torch_bias, torch_kernel

SMALL = 4  # positions in a row of an output up to which a convolution is a product of patches
Dtype = DTypeLike | None  # of the computation; None: whatever parameters and input promote to


class Conv(nnx.Module):
    """A 1x1 or 3x3 or 7x7 convolution that pads k // 2 zeros on both sides, as PyTorch does."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        stride: int = 1,
        bias: bool = False,
        init: Initializer = kaiming_normal,
        dtype: Dtype,
        draws: Draws,
    ):
        self.size, self.stride, self.dtype = size, stride, dtype
        shape = (size, size, channels_in, channels_out)
        self.kernel = nnx.Param(init(draws, shape))
        self.bias = nnx.Param(torch_bias(draws, shape)) if bias else None

    def __call__(self, maps: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Maps of ceil(h / stride) x ceil(w / stride) positions."""
        maps, kernel = _cast(maps, self.kernel[...], self.dtype)
        if self.size == 1:
            # A plain product: the weight gradient of a 1x1 convolution is 4 times slower.
            maps = maps[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        elif max(maps.shape[1:3]) <= SMALL * self.stride:
            maps = of_patches(maps, kernel, self.stride)
        else:
            pad = (self.size // 2, self.size // 2)
            maps = lax.conv_general_dilated(
                maps,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=(pad, pad),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return maps if self.bias is None else maps + self.bias[...].astype(maps.dtype)


class DepthwiseConv(nnx.Module):
    """A 3x3 convolution of each channel on its own, with bias."""

    def __init__(self, channels: int, *, dtype: Dtype, draws: Draws):
        self.dtype = dtype
        shape = (3, 3, 1, channels)
        self.kernel = nnx.Param(torch_kernel(draws, shape))
        self.bias = nnx.Param(torch_bias(draws, shape))

    def __call__(self, maps: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps of the same size.

        Nine shifted products, which XLA fuses: a grouped convolution of 64 channels at 32x32
        takes 24 ms, this takes 0.6 ms.
        """
        maps, kernel = _cast(maps, self.kernel[...], self.dtype)
        height, width = maps.shape[1:3]
        padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        total = self.bias[...].astype(maps.dtype)
        for row in range(3):
            for column in range(3):
                shifted = padded[:, row : row + height, column : column + width]
                total = total + shifted * kernel[row, column, 0]
        return total


class UpConv(nnx.Module):
    """A 2x2 transposed convolution of stride 2, unflipped, without bias; kernel [2, 2, in, out]."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: Dtype, draws: Draws):
        self.dtype = dtype
        # PyTorch takes the fan of a transposed kernel from the output's side.
        limit = (4 * channels_out) ** -0.5
        self.kernel = nnx.Param(draws.uniform((2, 2, channels_in, channels_out), limit))

    def __call__(self, maps: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c2"]:
        """Maps of twice the size.

        The four taps never overlap, so this is one product per position and depth-to-space.
        The weight gradient of the general form takes 86 ms (128 to 64 channels at 16x16), this 2.
        """
        maps, kernel = _cast(maps, self.kernel[...], self.dtype)
        images, height, width, _ = maps.shape
        channels_out = kernel.shape[-1]
        flat = jnp.moveaxis(kernel, 2, 0).reshape(kernel.shape[2], 4 * channels_out)
        taps = (maps @ flat).reshape(images, height, width, 2, 2, channels_out)
        taps = taps.transpose(0, 1, 3, 2, 4, 5)
        return taps.reshape(images, 2 * height, 2 * width, channels_out)


class BatchNorm(nnx.Module):
    """PyTorch's batch normalisation: eps 1e-5, and a tenth of the batch enters the statistics.

    The batch is normalised by its biased variance; the running variance takes the unbiased one,
    which `flax.nnx.BatchNorm` does not. Statistics have at least float32.

    With `images` above 0 each group of so many consecutive images is a batch of its own, and the
    running statistics take the mean over the groups. Devices that hold whole groups then normalise
    without a word from others, and any number of them gives the same.
    """

    epsilon = 1e-5
    momentum = 0.9  # share of the old statistics that stays
    images = 0  # of a group that is normalised by itself; 0: all

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))

    def __call__(self, maps: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        """Normalised maps in the input's dtype; `train` uses, and records, the batch's statistics.

        Under jit with a sharded batch the statistics are those of the whole batch. Raises
        ValueError where the batch is no whole number of groups.
        """
        exact = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
        if train and self.images:
            return self._by_group(exact).astype(maps.dtype)
        if train:
            mean = exact.mean((0, 1, 2))
            # Two passes: E[x^2] - E[x]^2 cancels where a channel is almost constant.
            variance = jnp.square(exact - mean).mean((0, 1, 2))
            self._record(mean, variance, count=maps.size // maps.shape[-1])
        else:
            mean, variance = self.mean[...], self.var[...]
        factor = self.scale[...] * lax.rsqrt(variance + self.epsilon)
        return ((exact - mean) * factor + self.bias[...]).astype(maps.dtype)

    def _by_group(self, maps: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        images, height, width, channels = maps.shape
        if images % self.images:
            raise ValueError(
                f"config.model.norm_images={self.images} does not divide a batch of {images}; use "
                f"a divisor, or 0 for the whole batch: --config.model.norm_images=0."
            )
        groups = maps.reshape(-1, self.images, height, width, channels)
        mean = groups.mean((1, 2, 3), keepdims=True)
        variance = jnp.square(groups - mean).mean((1, 2, 3), keepdims=True)
        count = self.images * height * width
        self._record(mean.mean((0, 1, 2, 3)), variance.mean((0, 1, 2, 3)), count=count)
        factor = self.scale[...] * lax.rsqrt(variance + self.epsilon)
        return ((groups - mean) * factor + self.bias[...]).reshape(maps.shape)

    def _record(self, mean: jax.Array, variance: jax.Array, *, count: int) -> None:
        mean, variance = lax.stop_gradient((mean, variance))
        unbiased = variance * (count / max(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            old = running[...]
            mixed = self.momentum * old + (1 - self.momentum) * new
            # Not `running[...] = `, which asks a traced value for its sharding: the error message
            # behind that walks through all of the program so far, a third of a step's tracing.
            running.set_value(mixed.astype(old.dtype))


def instance_norm(maps: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each image's channels with mean 0 and variance 1 over its positions (eps 1e-5, no affine)."""
    exact = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
    centred = exact - exact.mean((1, 2), keepdims=True)
    variance = jnp.square(centred).mean((1, 2), keepdims=True)
    return (centred * lax.rsqrt(variance + 1e-5)).astype(maps.dtype)


def max_pool(maps: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The maximum over 3x3 positions with stride 2; borders count as minus infinity."""
    return lax.reduce_window(
        maps, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )


def compute_dtype(name: str) -> Dtype:
    """What layers take as `dtype`: None for float32, so that float64 inputs stay float64.

    Raises:
        ValueError: for any other name.
    """
    if name not in ("float32", "bfloat16"):
        raise ValueError(
            f"compute_dtype={name!r} is not known; "
            'use "float32" or "bfloat16", e.g. --config.model.compute_dtype=float32.'
        )
    return jnp.bfloat16 if name == "bfloat16" else None


def of_patches(
    maps: Float[Array, "b h w c"], kernel: Float[Array, "k k c c2"], stride: int
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution as one product of each position's patch with the kernel.

    XLA's convolutions are slow on CPUs where a map is about as small as the kernel, those of 2x2
    positions most (docs/benchmarks.md, "Single computations"). Patches take k * k times the memory
    of the map, which larger maps are not worth: they gain little or lose.
    """
    size = kernel.shape[0]
    height, width = maps.shape[1:3]
    pad = (size // 2, size // 2)
    padded = jnp.pad(maps, ((0, 0), pad, pad, (0, 0)))
    patches = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(size)
        for column in range(size)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _cast(maps: jax.Array, kernel: jax.Array, dtype: Dtype) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(maps.dtype, kernel.dtype) if dtype is None else dtype
    return maps.astype(dtype), kernel.astype(dtype)
