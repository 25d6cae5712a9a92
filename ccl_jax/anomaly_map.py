"""Feature pairs -> pixel score map -> image score.

Up-sampling and Gaussian smoothing are linear and separable, so a scale's map goes to the size of
the image by one matrix from either side. These are built in numpy while a function is traced.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

Maps = Sequence[Float[Array, "b _ _ _"]]  # one map per scale, fine -> coarse

NORM_FLOOR = 1e-8  # the reference clamps both norms of its cosine here
UNIT_FLOOR = 1e-12  # and here the norm of what it scales to unit length
TRUNCATE = 4.0  # the Gaussian ends this many sigmas from its centre, as scipy's does
EXACT = jax.lax.Precision.HIGHEST  # accelerators multiply float32 in fewer bits by default


def cosine_distance_map(
    target: Float[Array, "b h w c"], rebuilt: Float[Array, "b h w c"]
) -> Float[Array, "b h w"]:
    """Per-position cosine distance in [0, 2]; 0 where the decoder rebuilt the encoder's direction.

    At least float32, and never negative, not even by rounding. A vector of zero length has distance
    1 from everything.
    """
    target, rebuilt = _at_least_float32(target, rebuilt)
    norms = [jnp.maximum(jnp.linalg.norm(maps, axis=-1), NORM_FLOOR) for maps in (target, rebuilt)]
    return jnp.maximum(1 - jnp.sum(target * rebuilt, axis=-1) / norms[0] / norms[1], 0.0)


def euclidean_distance_map(
    target: Float[Array, "b h w c"], rebuilt: Float[Array, "b h w c"]
) -> Float[Array, "b h w"]:
    """Per-position Euclidean distance of the features as they are, unbounded, at least float32."""
    target, rebuilt = _at_least_float32(target, rebuilt)
    return jnp.linalg.norm(target - rebuilt, axis=-1)


DISTANCES = {"cosine": cosine_distance_map, "l2": euclidean_distance_map}
COMBINATIONS = ("add", "mul", "concatenate")


def _at_least_float32(*maps: Array) -> list[Array]:
    dtype = jnp.promote_types(jnp.result_type(*maps), jnp.float32)
    return [each.astype(dtype) for each in maps]


def upsampling_matrix(size: int, length: int) -> NDArray[np.float64]:
    """[size, length]: linear interpolation that maps the first and the last sample onto the ends.

    (PyTorch's bilinear with align_corners=True; `jax.image.resize` aligns the outer edges instead.)
    """
    at = np.linspace(0, length - 1, size)[:, None]
    return np.maximum(0.0, 1 - np.abs(at - np.arange(length)))


def smoothing_matrix(size: int, sigma: float) -> NDArray[np.float64]:
    """[size, size]: Gaussian of `sigma` samples, mirrored about the outer edges of the ends.

    (scipy's `gaussian_filter1d` with mode "reflect".) The identity for sigma 0.
    """
    if sigma == 0:
        return np.eye(size)
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    source = np.pad(np.arange(size), radius, mode="symmetric")
    rows = np.arange(size)[:, None]
    matrix = np.zeros((size, size))
    np.add.at(matrix, (rows, source[rows + radius + offsets]), weights / weights.sum())
    return matrix


def _both_sides(
    rows: NDArray[np.float64], maps: Float[Array, "b h w *c"], columns: NDArray[np.float64]
) -> Float[Array, "b s t *c"]:
    """Each map, of every channel, as rows @ map @ columns.T."""
    left, right = jnp.asarray(rows, maps.dtype), jnp.asarray(columns, maps.dtype)
    return jnp.einsum("sh,bhw...,tw->bst...", left, maps, right, precision=EXACT)


def _concatenated(scales: Maps) -> Float[Array, "b _ _ _"]:
    """All scales at unit length, resized to the first and laid behind each other."""
    height, width = scales[0].shape[1:3]
    resized = []
    for maps in _at_least_float32(*scales):
        norms = jnp.linalg.norm(maps, axis=-1, keepdims=True)
        rows = upsampling_matrix(height, maps.shape[1])
        columns = upsampling_matrix(width, maps.shape[2])
        resized.append(_both_sides(rows, maps / jnp.maximum(norms, UNIT_FLOOR), columns))
    return jnp.concatenate(resized, axis=-1)


def score_map(
    targets: Maps,
    rebuilt: Maps,
    *,
    size: int | tuple[int, int],
    sigma: float,
    combine: str,
    distance: str,
) -> Float[Array, "b _ _"]:
    """Anomaly score of every pixel: distance maps up-sampled to `size`, combined, smoothed.

    `size` is the side of a square, or (height, width).

    With the "cosine" distance:

    - "add": the sum over scales divided by the square of their number, in [0, 2 / scales]. (The
      reference divides by the number of scales and again by the sum of their weights, which are 1.)
    - "mul": the product over scales, in [0, 2 ** scales].
    - "concatenate": one distance of all scales' unit vectors behind each other, in [0, 2]. (The
      reference's uni_am.)

    With the "l2" distance the scores have no upper bound, and the features' size counts.

    Raises:
        ValueError: another way to combine, another distance, or a negative sigma.
    """
    _check_choice("combine", combine, COMBINATIONS)
    _check_choice("distance", distance, tuple(DISTANCES))
    if sigma < 0:
        raise ValueError(
            f"config.eval.smoothing_sigma={sigma} is negative; use pixels, or 0 for no smoothing, "
            "e.g. --config.eval.smoothing_sigma=4.0."
        )
    if combine == "concatenate":  # from here on the sum over a single scale
        targets, rebuilt = [_concatenated(targets)], [_concatenated(rebuilt)]
    sides = (size, size) if isinstance(size, int) else size
    smoothing = [smoothing_matrix(side, sigma) for side in sides]
    # A sum may be smoothed term by term, at no cost; a product only as a whole.
    each = [np.eye(side) for side in sides] if combine == "mul" else smoothing
    scales = []
    for target, copy in zip(targets, rebuilt, strict=True):
        maps = DISTANCES[distance](target, copy)
        rows, columns = (
            matrix @ upsampling_matrix(len(matrix), length)
            for matrix, length in zip(each, maps.shape[1:], strict=True)
        )
        scales.append(_both_sides(rows, maps, columns))
    if combine != "mul":
        return sum(scales[1:], scales[0]) / len(scales) ** 2
    product = jnp.prod(jnp.stack(scales), axis=0)
    return product if sigma == 0 else _both_sides(smoothing[0], product, smoothing[1])


def _check_choice(setting: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = " or ".join(f'"{name}"' for name in allowed)
        raise ValueError(
            f'config.eval.{setting}="{value}" is unknown; use {names}, '
            f"e.g. --config.eval.{setting}={allowed[0]}."
        )


def image_score(maps: Float[Array, "b h w"], *, pool: int = 1) -> Float[Array, "b"]:
    """The largest pixel score of each image, after averaging over pool x pool pixels.

    The average has stride 1 and no padding.

    Raises:
        ValueError: the pool is larger than the map.
    """
    _, h, w = maps.shape
    if not 1 <= pool <= min(h, w):
        raise ValueError(
            f"config.eval.pool={pool} does not fit a score map of {h} x {w} pixels; use 1 to "
            f"{min(h, w)}, e.g. --config.eval.pool=1."
        )
    if pool > 1:
        window, zero = (1, pool, pool), jnp.zeros((), maps.dtype)
        summed = jax.lax.reduce_window(maps, zero, jax.lax.add, window, (1, 1, 1), "VALID")
        maps = summed / pool**2
    return jnp.max(maps, axis=(1, 2))
