"""Random numbers of procedural images: many from one draw, free or near those of a relative."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

Number = float | int


class Near(NamedTuple):
    """A source of numbers that lie near those of the family, which all its members share."""

    family: Key[Array, ""]
    own: Key[Array, ""]
    spread: Float[Array, ""]  # share of the range that the members' numbers differ by, in [0, 1]


Source = PRNGKeyArray | Near


class Lot:
    """Hands out uniform numbers from one draw, each once: many small draws compile slowly."""

    def __init__(self, source: Source, count: int):
        self._pool = _pool(source, count)
        self._used = 0

    def between(self, low: Number, high: Number, *shape: int) -> jax.Array:
        """Numbers in [low, high), of the given shape."""
        start, self._used = self._used, self._used + math.prod(shape)
        if self._used > self._pool.size:
            raise ValueError(f"a lot of {self._pool.size} numbers is used up")
        return low + (high - low) * self._pool[start : self._used].reshape(shape)

    def normal(self, *shape: int) -> jax.Array:
        """Normal numbers with mean 0 and standard deviation 1."""
        return math.sqrt(2) * jax.lax.erf_inv(self.between(-1 + 1e-6, 1, *shape))


def own_key(source: Source) -> Key[Array, ""]:
    """A key for numbers, such as grain, that are never near those of another image."""
    return jax.random.fold_in(source.own if isinstance(source, Near) else source, 1)


def _pool(source: Source, count: int) -> Float[Array, " {count}"]:
    if not isinstance(source, Near):
        return jax.random.uniform(source, (count,))
    common, own = (jax.random.uniform(key, (count,)) for key in (source.family, source.own))
    return jnp.clip(common + source.spread * (own - 0.5), 0, 1 - 1e-6)
