"""Features of several scales as vectors that can be compared."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def joined_features(maps: Sequence[Float[Array, "b _ _ _"]]) -> Float[Array, "b h w c"]:
    """The maps on the grid of the middle one, each scale of length 1, side by side."""
    middle = maps[len(maps) // 2].shape[1:3]
    return jnp.concatenate(
        [
            unit(jax.image.resize(scale, (scale.shape[0], *middle, scale.shape[-1]), "linear"))
            for scale in maps
        ],
        -1,
    )


def unit(features: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """The vectors with length 1."""
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(length, 1e-6)
