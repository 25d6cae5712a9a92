"""Statistics for an encoder with random weights, measured on made-up pictures.

Fresh batch normalisation (mean 0, variance 1) leaves a random encoder's features nearly parallel:
every position looks like every other. One pass over pictures of random blotches centres them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from ccl_jax.models.layers import BatchNorm
from ccl_jax.models.resnet import ResNetEncoder

PICTURES, SIZE = 16, 128  # how many, and their side in pixels
GRIDS = (2, 4, 8, 16, 32, 64)  # blotches per side, from coarse to fine


def settle_statistics(encoder: ResNetEncoder, key: PRNGKeyArray) -> None:
    """Sets the running statistics of a fresh encoder to those of made-up pictures."""
    before = nnx.to_pure_dict(nnx.state(encoder, nnx.BatchStat))
    encoder(made_up_pictures(key), train=True)
    after = nnx.to_pure_dict(nnx.state(encoder, nnx.BatchStat))
    share = 1 - BatchNorm.momentum  # of the batch, after one pass
    measured = jax.tree.map(lambda old, new: (new - (1 - share) * old) / share, before, after)
    nnx.update(encoder, measured)


def made_up_pictures(key: PRNGKeyArray) -> Float[Array, "b h w 3"]:
    """Random blotches of all sizes, the coarse ones stronger; mean 0, standard deviation 1."""
    total = jnp.zeros((PICTURES, SIZE, SIZE, 3))
    for number, grid in enumerate(GRIDS):
        values = jax.random.normal(jax.random.fold_in(key, number), (PICTURES, grid, grid, 3))
        smooth = jax.image.resize(values, total.shape, "linear")
        total += smooth / (number + 1)
    total -= total.mean((1, 2, 3), keepdims=True)
    return total / total.std((1, 2, 3), keepdims=True)
