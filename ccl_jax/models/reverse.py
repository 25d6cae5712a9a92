"""The trained halves of reverse distillation: the fusing neck and the mirrored decoder.

Deng and Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding",
arXiv 2201.10703.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ccl_jax.models.initial import Draws
from ccl_jax.models.layers import BatchNorm, Conv, Dtype
from ccl_jax.models.resnet import Stage, architecture_of


class Neck(nnx.Module):
    """Three maps -> one compact code at stride 32, with 512 channels (2048 for bottlenecks)."""

    def __init__(self, architecture: str, *, dtype: Dtype, draws: Draws):
        plan = architecture_of(architecture)
        fine, middle, coarse = plan.channels
        self.channels = 512 * plan.expansion
        self.conv1 = Conv(fine, middle, 3, stride=2, dtype=dtype, draws=draws)
        self.norm1 = BatchNorm(middle)
        self.conv2 = Conv(middle, coarse, 3, stride=2, dtype=dtype, draws=draws)
        self.norm2 = BatchNorm(coarse)
        self.conv3 = Conv(middle, coarse, 3, stride=2, dtype=dtype, draws=draws)
        self.norm3 = BatchNorm(coarse)
        # The embedding has ResNet-50's width for wide encoders too.
        self.layer = Stage(
            plan,
            3 * coarse,
            512,
            depth=plan.neck_depth,
            width_factor=1,
            resample="down",
            dtype=dtype,
            draws=draws,
        )

    def __call__(
        self, maps: Sequence[Float[Array, "b _h _w _c"]], *, train: bool
    ) -> Float[Array, "b h w c"]:
        """The code of three maps that are ordered fine to coarse."""
        fine, middle, coarse = maps
        fine = jax.nn.relu(self.norm1(self.conv1(fine), train=train))
        fine = jax.nn.relu(self.norm2(self.conv2(fine), train=train))
        middle = jax.nn.relu(self.norm3(self.conv3(middle), train=train))
        return self.layer(jnp.concatenate([fine, middle, coarse], axis=-1), train=train)


class Decoder(nnx.Module):
    """The neck's code -> the encoder's three maps, by the encoder's stages in reverse."""

    def __init__(self, architecture: str, *, dtype: Dtype, draws: Draws):
        plan = architecture_of(architecture)
        channels_in = 512 * plan.expansion
        # As published, depths keep the encoder's order: the coarsest stage is the shallowest.
        for index, (planes, depth) in enumerate(zip((256, 128, 64), plan.depths, strict=True)):
            stage = Stage(
                plan,
                channels_in,
                planes,
                depth=depth,
                width_factor=plan.width_factor,
                resample="up",
                dtype=dtype,
                draws=draws,
            )
            setattr(self, f"layer{index + 1}", stage)
            channels_in = planes * plan.expansion

    def __call__(self, code: Float[Array, "b h w c"], *, train: bool) -> tuple:
        """Three maps, fine to coarse, of the encoder's shapes."""
        outputs = []
        for index in range(3):
            code = getattr(self, f"layer{index + 1}")(code, train=train)
            outputs.append(code)
        return tuple(reversed(outputs))
