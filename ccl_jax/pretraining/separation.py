"""How far damaged positions lie from what a detector would expect, and the loss that asks for it.

A trained detector rebuilds every position of an image from what it knows of normal ones. Here the
sound positions of a product's other images stand in for that knowledge: those that resemble a
position are averaged, and the average is what the position is compared with.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ccl_jax.pretraining.features import unit

COVERED, FREE = 0.25, 0.05  # of a position, from where it counts as damaged, up to where as sound
NEVER = -1e9  # a logit; finite, as it may happen that no position is allowed
SHARPNESS = 4.0  # of the maximum over positions that scores an image


def damaged_cells(
    masks: Float[Array, "e d s s"], visible: Bool[Array, "e d"], side: int
) -> tuple[Bool[Array, "e d {side} {side}"], Bool[Array, "e d {side} {side}"]]:
    """(damaged, sound) positions of a map with `side` rows; some, beside a defect, are neither.

    The position with most of a visible defect is damaged, however small the defect is.
    """
    products, images, size, _ = masks.shape
    cells = masks.reshape(products, images, side, size // side, side, size // side)
    share, top = cells.mean((3, 5)), cells.max((3, 5))
    most = share >= jnp.maximum(share.max((2, 3), keepdims=True), FREE)
    return ((share > COVERED) | most) & visible[..., None, None], top < FREE


def rebuilt_distances(
    features: Float[Array, "e n h w c"],
    sound: Bool[Array, "e n h w"],
    *,
    softness: float,
    memory: int,
) -> Float[Array, "e n h w"]:
    """Squared distance in [0, 4] of every position to the mean of those that it resembles.

    `features` have length 1, and so has the mean, whose weights fall by e with every `softness` of
    squared distance. It is over the sound positions of the product's other images, among `memory`
    positions of all images, always the same ones. No gradient passes through the weights.
    """
    products, group, height, width, channels = features.shape
    query = features.reshape(products, group, height * width, channels)
    total = group * height * width
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:memory])
    known = features.reshape(products, total, channels)[:, chosen]
    owner = chosen // (height * width)
    allowed = sound.reshape(products, total)[:, None, chosen]
    allowed = allowed & (jnp.arange(group)[:, None] != owner)
    fixed_query, fixed_known = jax.lax.stop_gradient((query, known))
    squared = 2 - 2 * jnp.einsum("enpc,emc->enpm", fixed_query, fixed_known)
    weights = jax.nn.softmax(jnp.where(allowed[:, :, None], -squared / softness, NEVER), -1)
    mean = unit(jnp.einsum("enpm,emc->enpc", weights, known))
    return jnp.sum((query - mean) ** 2, -1).reshape(products, group, height, width)


def separation_loss(
    distances: Float[Array, "e n h w"],
    damaged: Bool[Array, "e d h w"],
    sound: Bool[Array, "e n h w"],
    scale: Float[Array, ""],
    offset: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """(loss of positions, loss of images, share of image pairs in the right order).

    The last `d` images of a product have the `damaged` positions; an image without any counts for
    nothing but its sound positions. A position's logit is the logarithm of its distance, less the
    mean of the product's sound positions, times exp(scale), minus offset.
    """
    whole = distances.shape[1] - damaged.shape[1]
    logs = jnp.log(distances + 1e-4)
    usual = jnp.sum(logs * sound, (1, 2, 3)) / jnp.maximum(jnp.sum(sound, (1, 2, 3)), 1)
    logits = jnp.exp(scale) * (logs - usual[:, None, None, None]) - offset
    missed = jnp.sum(jax.nn.softplus(-logits[:, whole:]) * damaged) / (damaged.sum() + 1)
    false = jnp.sum(jax.nn.softplus(logits) * sound) / (sound.sum() + 1)
    scores = jax.nn.logsumexp(SHARPNESS * logits, (2, 3)) / SHARPNESS
    margins = scores[:, whole:, None] - scores[:, None, :whole]
    counted = jnp.any(damaged, (2, 3))[..., None]
    images = jnp.mean(jax.nn.softplus(-margins) * counted)
    ordered = jnp.sum((margins > 0) & counted) / jnp.maximum(counted.sum() * whole, 1)
    return 0.5 * (missed + false), images, ordered
