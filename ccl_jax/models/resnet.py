"""ResNet encoders, stages 1 to 3, and the residual blocks that the neck and the decoder reuse.

He et al., arXiv 1512.03385; WideResNet-50-2: Zagoruyko and Komodakis, arXiv 1605.07146.
The stride sits on the 3x3 convolution of a bottleneck, as in torchvision and timm.
"""

import dataclasses
import difflib
import functools
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from ccl_jax.models.initial import Draws
from ccl_jax.models.layers import BatchNorm, Conv, Dtype, UpConv, max_pool
from ccl_jax.models.remat import computed_again

Resample = Literal["same", "down", "up"]  # what a block does to height and width


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that tell one ResNet from another."""

    bottleneck: bool
    depths: tuple[int, int, int]  # blocks of stages 1 to 3
    width_factor: int  # inner width of a bottleneck, relative to ResNet-50
    neck_depth: int  # blocks of the neck; as in the original reverse distillation

    @property
    def expansion(self) -> int:
        """Output channels of a block relative to its planes."""
        return 4 if self.bottleneck else 1

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the three encoder maps, fine to coarse."""
        return (64 * self.expansion, 128 * self.expansion, 256 * self.expansion)


ARCHITECTURES = {
    "resnet10": Architecture(False, (1, 1, 1), 1, 1),  # for trials: nobody publishes its weights
    "resnet18": Architecture(False, (2, 2, 2), 1, 2),
    "resnet34": Architecture(False, (3, 4, 6), 1, 3),
    "resnet50": Architecture(True, (3, 4, 6), 1, 3),
    "wide_resnet50_2": Architecture(True, (3, 4, 6), 2, 3),
}


def architecture_of(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        best = close[0] if close else "wide_resnet50_2"
        raise ValueError(
            f"encoder={name!r} is not known; use one of {', '.join(ARCHITECTURES)}, "
            f"e.g. --config.model.encoder={best}."
        )
    return ARCHITECTURES[name]


class BasicBlock(nnx.Module):
    """Two convolutions beside a shortcut; the first one resamples."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        resample: Resample,
        dtype: Dtype,
        draws: Draws,
    ):
        self.conv1 = _resampling(channels_in, channels_out, 3, resample, dtype=dtype, draws=draws)
        self.norm1 = BatchNorm(channels_out)
        self.conv2 = Conv(channels_out, channels_out, 3, dtype=dtype, draws=draws)
        self.norm2 = BatchNorm(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, resample, dtype=dtype, draws=draws)

    def __call__(self, maps: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Maps that are resampled as the block was told to."""
        inner = jax.nn.relu(self.norm1(self.conv1(maps), train=train))
        inner = self.norm2(self.conv2(inner), train=train)
        passed = maps if self.shortcut is None else self.shortcut(maps, train=train)
        return jax.nn.relu(inner + passed)


class Bottleneck(nnx.Module):
    """1x1, 3x3 (resamples) and 1x1 convolutions beside a shortcut."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        width: int,
        resample: Resample,
        dtype: Dtype,
        draws: Draws,
    ):
        self.conv1 = Conv(channels_in, width, 1, dtype=dtype, draws=draws)
        self.norm1 = BatchNorm(width)
        self.conv2 = _resampling(width, width, 3, resample, dtype=dtype, draws=draws)
        self.norm2 = BatchNorm(width)
        self.conv3 = Conv(width, channels_out, 1, dtype=dtype, draws=draws)
        self.norm3 = BatchNorm(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, resample, dtype=dtype, draws=draws)

    def __call__(self, maps: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Maps that are resampled as the block was told to."""
        inner = jax.nn.relu(self.norm1(self.conv1(maps), train=train))
        inner = jax.nn.relu(self.norm2(self.conv2(inner), train=train))
        inner = self.norm3(self.conv3(inner), train=train)
        passed = maps if self.shortcut is None else self.shortcut(maps, train=train)
        return jax.nn.relu(inner + passed)


class Shortcut(nnx.Module):
    """A resampling convolution and its normalisation, where a block changes the maps' shape."""

    def __init__(self, conv: Conv | UpConv, channels_out: int):
        self.conv = conv
        self.norm = BatchNorm(channels_out)

    def __call__(self, maps: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Maps of the shape that the block's other branch has."""
        return self.norm(self.conv(maps), train=train)


class Stage(nnx.Module):
    """Residual blocks in a row, the first of which resamples: attributes block0, block1, ..."""

    remat = False  # whether a training computes the blocks' inner maps again, not keeps them

    def __init__(
        self,
        architecture: Architecture,
        channels_in: int,
        planes: int,
        *,
        depth: int,
        width_factor: int,
        resample: Resample,
        dtype: Dtype,
        draws: Draws,
    ):
        self.depth = depth
        channels_out = planes * architecture.expansion
        for index in range(depth):
            step: Resample = resample if index == 0 else "same"
            entry = channels_in if index == 0 else channels_out
            block: BasicBlock | Bottleneck
            if architecture.bottleneck:
                width = planes * width_factor
                block = Bottleneck(
                    entry, channels_out, width=width, resample=step, dtype=dtype, draws=draws
                )
            else:
                block = BasicBlock(entry, channels_out, resample=step, dtype=dtype, draws=draws)
            setattr(self, f"block{index}", block)

    def __call__(self, maps: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        """The output of the last block."""
        for index in range(self.depth):
            block = getattr(self, f"block{index}")
            if self.remat and train:
                maps = computed_again(
                    block, functools.partial(type(block).__call__, train=True), maps
                )
            else:
                maps = block(maps, train=train)
        return maps


class ResNetEncoder(nnx.Module):
    """Images -> maps of strides 4, 8 and 16, after stages 1 to 3, with running statistics."""

    def __init__(self, architecture: str, *, dtype: Dtype, draws: Draws):
        plan = architecture_of(architecture)
        self.channels = plan.channels
        self.conv1 = Conv(3, 64, 7, stride=2, dtype=dtype, draws=draws)
        self.norm1 = BatchNorm(64)
        channels_in = 64
        for index, depth in enumerate(plan.depths):
            stage = Stage(
                plan,
                channels_in,
                64 * 2**index,
                depth=depth,
                width_factor=plan.width_factor,
                resample="down" if index else "same",
                dtype=dtype,
                draws=draws,
            )
            setattr(self, f"layer{index + 1}", stage)
            channels_in = plan.channels[index]

    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool = False) -> tuple:
        """Three maps, fine to coarse; `train` normalises by the batch instead (for pretraining)."""
        maps = jax.nn.relu(self.norm1(self.conv1(images), train=train))
        maps = max_pool(maps)
        outputs = []
        for index in range(3):
            maps = getattr(self, f"layer{index + 1}")(maps, train=train)
            outputs.append(maps)
        return tuple(outputs)


def _resampling(
    channels_in: int,
    channels_out: int,
    size: int,
    resample: Resample,
    *,
    dtype: Dtype,
    draws: Draws,
) -> Conv | UpConv:
    """The convolution that does what `resample` says; a transposed one is always 2x2."""
    if resample == "up":
        return UpConv(channels_in, channels_out, dtype=dtype, draws=draws)
    stride = 2 if resample == "down" else 1
    return Conv(channels_in, channels_out, size, stride=stride, dtype=dtype, draws=draws)


def _shortcut(
    channels_in: int, channels_out: int, resample: Resample, *, dtype: Dtype, draws: Draws
) -> Shortcut | None:
    if resample == "same" and channels_in == channels_out:
        return None
    conv = _resampling(channels_in, channels_out, 1, resample, dtype=dtype, draws=draws)
    return Shortcut(conv, channels_out)
