"""The heads through which the contrastive losses look at the encoder's maps (Fan et al., 2025)."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from ccl_jax.models.initial import Draws, torch_kernel
from ccl_jax.models.layers import Conv, DepthwiseConv, Dtype, instance_norm
from ccl_jax.models.remat import computed_again

KINDS = ("plain", "depthwise")


class Projector(nnx.Module):
    """One head per scale: attributes scale0 (finest), scale1, ..."""

    remat = False  # whether a training computes the heads' inner maps again, not keeps them

    def __init__(self, channels: tuple[int, ...], kind: str, *, dtype: Dtype, draws: Draws):
        if kind not in KINDS:
            raise ValueError(
                f'projector={kind!r} is not known; use "plain" or "depthwise" (or "none" for a '
                "network without one), e.g. --config.model.projector=plain."
            )
        self.scales = len(channels)
        for index, width in enumerate(channels):
            head = Head(width, depthwise=kind == "depthwise", dtype=dtype, draws=draws)
            setattr(self, f"scale{index}", head)

    def __call__(self, maps: Sequence[Float[Array, "b _h _w _c"]]) -> tuple:
        """Projected maps of the same shapes; same in training and at test."""
        heads = [getattr(self, f"scale{index}") for index in range(self.scales)]
        pairs = zip(heads, maps, strict=True)
        if self.remat:
            return tuple(computed_again(head, Head.__call__, scale) for head, scale in pairs)
        return tuple(head(scale) for head, scale in pairs)


class Head(nnx.Module):
    """Four 3x3 convolutions, c -> c/2 -> c/4 -> c/2 -> c, each instance-normalised and leaky.

    Their biases cannot change the output, as a normalisation without affine part follows; they
    are kept because published weights have them.
    """

    def __init__(self, channels: int, *, depthwise: bool, dtype: Dtype, draws: Draws):
        widths = (channels, channels // 2, channels // 4, channels // 2, channels)
        for index in range(4):
            entry, out = widths[index : index + 2]
            if depthwise:
                setattr(
                    self, f"depthwise{index + 1}", DepthwiseConv(entry, dtype=dtype, draws=draws)
                )
            size = 1 if depthwise else 3
            conv = Conv(entry, out, size, bias=True, init=torch_kernel, dtype=dtype, draws=draws)
            setattr(self, f"conv{index + 1}", conv)
        self.depthwise = depthwise

    def __call__(self, maps: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps of the input's shape."""
        for index in range(1, 5):
            if self.depthwise:
                maps = getattr(self, f"depthwise{index}")(maps)
            maps = instance_norm(getattr(self, f"conv{index}")(maps))
            maps = jax.nn.leaky_relu(maps, 0.01)
        return maps
