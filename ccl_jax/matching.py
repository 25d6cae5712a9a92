"""Which position of one feature map resembles which of another most."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

NORM_FLOOR = 1e-8  # shorter vectors have no direction; the clamp of the reference's cosine
EXACT = jax.lax.Precision.HIGHEST  # accelerators multiply float32 in fewer bits by default


def unit(vectors: Float[Array, "..."], axis: int | tuple[int, ...] = -1) -> Float[Array, "..."]:
    """The vectors along `axis`, scaled to length 1; below NORM_FLOOR zero, with zero gradient."""
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    squares = jnp.sum(vectors * vectors, axis, keepdims=True)
    long_enough = squares > NORM_FLOOR**2
    # The inner `where` keeps the square root, whose slope at 0 is infinite, away from 0.
    return jnp.where(long_enough, vectors / jnp.sqrt(jnp.where(long_enough, squares, 1.0)), 0.0)


def best_matches(
    queries: Float[Array, "b h w c"],
    keys: Float[Array, "b h w c"],
    *,
    window: int | None = None,
    block: int = 128,
    maps_dtype: DTypeLike | None = None,
) -> tuple[Int[Array, "b h*w"], Float[Array, "b h*w"]]:
    """For each position of `queries` the most similar position of `keys`, and their cosine.

    A position is counted row by row (y * w + x); the first wins a tie. With `window` only the
    square of that side around the same position is searched. Neither way builds the whole
    (h*w, h*w) matrix: besides copies of the maps it needs 2 * b * block * h*w values, or b * h*w
    with a window. No gradient. Where a vector has a value that is not a number, the whole search
    finds the last position and the cosine NaN, that in a window the cosine 0.

    Without a window, `maps_dtype` rounds both maps to that dtype first: bfloat16 changes nothing
    where a network computed them in it, and products are faster. Those of two bfloat16 numbers are
    exact in float32, in which they are summed and scaled.

    Raises:
        ValueError: the window has no centre.
    """
    queries, keys = jax.lax.stop_gradient((queries, keys))
    if window is not None:
        return _best_matches_in_window(unit(queries), unit(keys), window)
    b, h, w, c = queries.shape
    queries, keys = queries.reshape(b, h * w, c), keys.reshape(b, h * w, c)
    if maps_dtype is not None:
        queries, keys = (_rounded(maps, maps_dtype) for maps in (queries, keys))
    of_query, of_key = _one_by_length(queries), _one_by_length(keys)

    def match(query: Float[Array, "b c"]) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
        products = jnp.einsum(
            "bc,bnc->bn", query, keys, precision=EXACT, preferred_element_type=of_key.dtype
        )
        return _first_largest(products * of_key)

    index, largest = jax.lax.map(match, queries.swapaxes(0, 1), batch_size=block)
    # A vector without a direction has the cosine 0 with all.
    return jnp.where(of_query == 0, 0, index.T), largest.T * of_query


def _rounded(maps: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """The maps in that dtype, rounded even where XLA would keep more digits than it was told to."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(maps, kept.nexp, kept.nmant).astype(dtype)


def _one_by_length(vectors: Float[Array, "b n c"]) -> Float[Array, "b n"]:
    """1 / length in at least float32; 0 for vectors that `unit` makes zero."""
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    squares = jnp.sum(vectors * vectors, -1)
    return jnp.where(squares > NORM_FLOOR**2, jax.lax.rsqrt(squares), 0.0)


def _first_largest(values: Float[Array, "b n"]) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """The first index of each row's maximum, and the maximum.

    In two passes, because CPUs compute both in vectors but `jnp.argmax` value by value: the search
    takes 0.4 of the time with a ResNet-18's maps, 0.8 with a WideResNet's (docs/benchmarks.md,
    "Single computations"). Where a value is not a number, the last index.
    """
    largest, last = jnp.max(values, axis=1), values.shape[1] - 1
    numbers = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(values == largest[:, None], numbers, last), axis=1), largest


def _best_matches_in_window(
    queries: Float[Array, "b h w c"], keys: Float[Array, "b h w c"], window: int
) -> tuple[Int[Array, "b h*w"], Float[Array, "b h*w"]]:
    """`best_matches` of unit vectors, one shift of the keys at a time, keeping the best so far."""
    if window < 1 or window % 2 == 0:
        raise ValueError(
            f"config.loss.local.window={window} has no central position; use an odd number, "
            f"e.g. --config.loss.local.window={max(window, 0) + 1}."
        )
    b, h, w, _ = queries.shape
    reach = window // 2
    margin = [(0, 0), (reach, reach), (reach, reach), (0, 0)]
    padded = jnp.pad(keys, margin)
    inside = jnp.pad(jnp.ones((1, h, w, 1), bool), margin)
    position = jnp.arange(h * w, dtype=jnp.int32).reshape(1, h, w)

    def try_shift(best: tuple, shift: Int[Array, "2"]) -> tuple:
        def shifted(maps: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(maps, shift[0], h, axis=1)
            return jax.lax.dynamic_slice_in_dim(rows, shift[1], w, axis=2)

        cosine = jnp.sum(queries * shifted(padded), -1)
        cosine = jnp.where(shifted(inside)[..., 0], cosine, -jnp.inf)
        index = position + (shift[0] - reach) * w + (shift[1] - reach)
        better = cosine > best[1]
        return (jnp.where(better, index, best[0]), jnp.where(better, cosine, best[1])), None

    any_map = queries[..., 0]  # like this, so that within shard_map it varies over the devices too
    nothing = (jnp.zeros_like(any_map, jnp.int32), jnp.full_like(any_map, -jnp.inf))
    shifts = jnp.stack(jnp.divmod(jnp.arange(window**2, dtype=jnp.int32), window), axis=1)
    (index, cosine), _ = jax.lax.scan(try_shift, nothing, shifts)
    return index.reshape(b, h * w), cosine.reshape(b, h * w)
