"""Defects for procedural images: a region of random shape in which the picture is another one.

In the manner of CutPaste (Li et al., CVPR 2021) and DRAEM (Zavrtanik et al., ICCV 2021), which
train on such defects directly; here they only teach an encoder what to notice. They know nothing of
the defects that `ccl_jax.data.synthetic` puts into its benchmark.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ccl_jax.pretraining.lots import Lot

Plane = Float[Array, "s s"]
Picture = Float[Array, "s s 3"]

SECOND = 0.3  # probability of a second region
LEAST, LARGEST = 0.08, 0.5  # radius in half images
FAINTEST = 0.4  # weight of the other content, up to 1
PALEST = 0.25  # least strength of a tone, up to 1


class Damaged(NamedTuple):
    """A picture with a defect."""

    image: Picture  # in [0, 1]
    mask: Plane  # in [0, 1], 1 where the defect is
    change: Float[Array, ""]  # how conspicuous it is, in values of the picture


def damage(key: Key[Array, ""], image: Picture, other: Picture, variant: Picture) -> Damaged:
    """The picture with a defect of one of eleven sorts, two of which are alike.

    `other` may be pasted into it, and `variant`: what a slightly different product would show.
    """
    lot = Lot(key, 96)
    second = lot.between(0, 1) < SECOND
    mask = region(lot, image.shape[0])
    mask = jnp.maximum(mask, second * region(lot, image.shape[0]))
    sorts = contents(lot, jax.random.fold_in(key, 1), image, other, variant)
    which = jnp.floor(lot.between(0, len(sorts) + 1)).astype(jnp.int32)
    content = jnp.select([which == number for number in range(len(sorts))], sorts)
    strength = lot.between(FAINTEST, 1)
    laid = jnp.clip(image + (mask * strength)[..., None] * (content - image), 0, 1)
    made = jnp.where(which == len(sorts), pushed(lot, image, mask), laid)
    return Damaged(made, mask, conspicuous(image, made, mask))


def conspicuous(before: Picture, after: Picture, mask: Plane) -> Float[Array, ""]:
    """Mean change of the local tone, or of the local contrast where that is more, in the mask.

    Grains that gave way to grains of the same sort do not count: nobody could find them.
    """
    side = (before.shape[0] // 16) | 1

    def local(image: Picture) -> tuple[Picture, Plane]:
        tone = box_blur(image, side)
        return tone, jnp.sqrt(box_blur((image - tone) ** 2, side).mean(-1) + 1e-5)

    (tone0, contrast0), (tone1, contrast1) = local(before), local(after)
    weight = mask / (mask.sum() + 1e-3)
    tone = jnp.sum(jnp.abs(tone1 - tone0).mean(-1) * weight)
    return jnp.maximum(tone, jnp.sum(jnp.abs(contrast1 - contrast0) * weight))


def region(lot: Lot, size: int) -> Plane:
    """1 inside a blot, a box, a streak or a bent scratch, with a soft or a sharp border."""
    axis = (jnp.arange(size) + 0.5) * (2 / size) - 1
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    x, y = x - lot.between(-0.8, 0.8), y - lot.between(-0.8, 0.8)
    angle = lot.between(0, math.pi)
    radius = jnp.exp(lot.between(math.log(LEAST), math.log(LARGEST)))
    long = jnp.exp(1.2 * lot.between(0, 1) ** 1.5)  # up to eleven times as long as wide
    u = x * jnp.cos(angle) + y * jnp.sin(angle)
    v = y * jnp.cos(angle) - x * jnp.sin(angle)
    v = v + lot.between(-0.3, 0.3) * jnp.sin(lot.between(2, 8) * u + lot.between(0, 6))
    u, v = u / (radius * long), v / (radius / long)
    around, wave = jnp.arctan2(v, u), jnp.ones_like(u)
    for least, most, height in ((2, 6, 0.4), (5, 11, 0.25)):
        turns, phase = jnp.floor(lot.between(least, most)), lot.between(0, 6)
        wave += lot.between(0, height) * jnp.sin(turns * around + phase)
    box = jnp.maximum(jnp.abs(u), jnp.abs(v))
    blot = jnp.sqrt(u * u + v * v + 1e-6) / wave
    distance = jnp.where(lot.between(0, 1) < 0.2, box, blot)
    steep = lot.between(0.6, 4) * (size / 2) * radius / long
    return jax.nn.sigmoid((1 - distance) * steep)


def contents(
    lot: Lot, key: Key[Array, ""], image: Picture, other: Picture, variant: Picture
) -> list[Picture]:
    """What a region can show instead: ten sorts."""
    size = image.shape[0]
    smooth = box_blur(image, size // 8 + 1)
    grey = tones(lot, 1)
    tone = jnp.where(lot.between(0, 1) < 0.5, grey, tones(lot, 3))
    shift = jnp.floor(lot.between(size // 8, size - size // 8, 2)).astype(jnp.int32)
    moved = jnp.roll(image, shift, (0, 1))
    turned = jnp.swapaxes(moved, 0, 1)[::-1]
    grain = jax.random.normal(key, (size, size, 1))
    grain = jnp.where(lot.between(0, 1) < 0.5, grain, 3 * box_blur(grain, 3))
    return [
        other,
        variant,
        variant,  # the likeliest: parts that are missing, misplaced or of another size
        jnp.where(lot.between(0, 1) < 0.5, moved, turned),  # of the same picture, elsewhere
        image + 0.6 * tone,  # stained
        jnp.broadcast_to(jnp.clip(image.mean((0, 1)) + 0.5 * tone, 0, 1), image.shape),  # covered
        smooth,  # worn off
        smooth + (image - smooth) * lot.between(1.8, 3),  # rough
        smooth + 0.25 * grain * (1 + tone),  # corroded
        image * (1 + 0.7 * grey),  # burnt or bleached
    ]


def tones(lot: Lot, count: int) -> Float[Array, " {count}"]:
    """Numbers in [-1, 1] that are not near 0."""
    raw = lot.between(-1, 1, count)
    return jnp.sign(raw) * (PALEST + (1 - PALEST) * jnp.abs(raw))


def pushed(lot: Lot, image: Picture, mask: Plane) -> Picture:
    """The picture bent within the region, by 4 to 15 % of its side."""
    size = image.shape[0]
    angle, far = lot.between(0, 2 * math.pi), lot.between(0.04, 0.15) * size
    axis = jnp.arange(size, dtype=jnp.float32)
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    y = jnp.clip(y + far * jnp.sin(angle) * mask, 0, size - 1)
    x = jnp.clip(x + far * jnp.cos(angle) * mask, 0, size - 1)
    planes = [
        jax.scipy.ndimage.map_coordinates(image[..., channel], [y, x], order=1)
        for channel in range(3)
    ]
    return jnp.stack(planes, -1)


def box_blur(image: Float[Array, "s s c"], side: int) -> Float[Array, "s s c"]:
    """The mean over squares of `side` pixels, an odd number; the border is repeated outwards."""
    ends = (side // 2, side // 2)
    padded = jnp.pad(image, (ends, ends, (0, 0)), mode="edge")
    window = (side, side, 1)
    return jax.lax.reduce_window(padded, 0.0, jax.lax.add, window, (1, 1, 1), "VALID") / side**2
