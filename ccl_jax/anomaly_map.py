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
TRUNCATE = 4.0  # the Gaussian ends this many sigmas from its centre, as scipy's does
EXACT = jax.lax.Precision.HIGHEST  # accelerators multiply float32 in fewer bits by default


def cosine_distance_map(
    target: Float[Array, "b h w c"], rebuilt: Float[Array, "b h w c"]
) -> Float[Array, "b h w"]:
    """Per-position cosine distance in [0, 2]; 0 where the decoder rebuilt the encoder's direction.

    At least float32, and never negative, not even by rounding. A vector of zero length has distance
    1 from everything.
    """
    dtype = jnp.promote_types(jnp.result_type(target, rebuilt), jnp.float32)
    target, rebuilt = target.astype(dtype), rebuilt.astype(dtype)
    norms = [jnp.maximum(jnp.linalg.norm(maps, axis=-1), NORM_FLOOR) for maps in (target, rebuilt)]
    return jnp.maximum(1 - jnp.sum(target * rebuilt, axis=-1) / norms[0] / norms[1], 0.0)


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
    rows: NDArray[np.float64], maps: Float[Array, "b h w"], columns: NDArray[np.float64]
) -> Float[Array, "b size size"]:
    """Each map as rows @ map @ columns.T."""
    left, right = jnp.asarray(rows, maps.dtype), jnp.asarray(columns, maps.dtype)
    return jnp.einsum("sh,bhw,tw->bst", left, maps, right, precision=EXACT)


def score_map(
    targets: Maps, rebuilt: Maps, *, size: int, sigma: float, combine: str
) -> Float[Array, "b {size} {size}"]:
    """Anomaly score of every pixel: distance maps up-sampled to `size`, combined, smoothed.

    - "add": the sum over scales divided by the square of their number, in [0, 2 / scales]. (The
      reference divides by the number of scales and again by the sum of their weights, which are 1.)
    - "mul": the product over scales, in [0, 2 ** scales].

    Raises:
        ValueError: another way to combine, or a negative sigma.
    """
    if combine not in ("add", "mul"):
        raise ValueError(
            f'config.eval.combine="{combine}" is unknown; use "add" or "mul", '
            "e.g. --config.eval.combine=add."
        )
    if sigma < 0:
        raise ValueError(
            f"config.eval.smoothing_sigma={sigma} is negative; use pixels, or 0 for no smoothing, "
            "e.g. --config.eval.smoothing_sigma=4.0."
        )
    smoothing = smoothing_matrix(size, sigma)
    # A sum may be smoothed term by term, at no cost; a product only as a whole.
    each = smoothing if combine == "add" else np.eye(size)
    scales = []
    for target, copy in zip(targets, rebuilt, strict=True):
        maps = cosine_distance_map(target, copy)
        rows, columns = (each @ upsampling_matrix(size, length) for length in maps.shape[1:])
        scales.append(_both_sides(rows, maps, columns))
    if combine == "add":
        return sum(scales[1:], scales[0]) / len(scales) ** 2
    product = jnp.prod(jnp.stack(scales), axis=0)
    return product if sigma == 0 else _both_sides(smoothing, product, smoothing)


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
