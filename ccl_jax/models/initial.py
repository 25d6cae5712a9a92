"""Initial values, as the released code draws them, from one random draw for a whole network."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

Shape = tuple[int, ...]


class Draws:
    """Hands out random float32 arrays, each time other ones.

    The first `reserve` numbers come from a single draw: compiling a draw takes half a second, and
    a network has dozens of kernels. Others are drawn one by one.
    """

    def __init__(self, key: PRNGKeyArray, *, reserve: int = 0):
        self.used = 0
        self._key = key
        self._pool = self._draw(key, (reserve,))

    def uniform(self, shape: Shape, limit: float) -> jax.Array:
        """Uniform in +-limit."""
        start, self.used = self.used, self.used + math.prod(shape)
        if self.used <= self._pool.size:
            return limit * self._pool[start : self.used].reshape(shape)
        return limit * self._draw(jax.random.fold_in(self._key, start), shape)

    def normal(self, shape: Shape, spread: float) -> jax.Array:
        """Normal with mean 0 and standard deviation `spread`."""
        return spread * math.sqrt(2) * lax.erf_inv(self.uniform(shape, 1.0))

    @staticmethod
    def _draw(key: jax.Array, shape: Shape) -> jax.Array:
        # Never -1 itself, where erf_inv is infinite.
        lowest = float(jnp.finfo(jnp.float32).epsneg) - 1
        return jax.random.uniform(key, shape, jnp.float32, minval=lowest, maxval=1.0)


Initializer = Callable[[Draws, Shape], jax.Array]


def kaiming_normal(draws: Draws, shape: Shape) -> Float[Array, "h w c d"]:
    """A kernel for convolutions before a ReLU: He et al., arXiv 1502.01852, with the fan out."""
    height, width, _, channels_out = shape
    return draws.normal(shape, math.sqrt(2 / (height * width * channels_out)))


def torch_kernel(draws: Draws, shape: Shape) -> Float[Array, "h w c d"]:
    """PyTorch's default kernel: uniform in +-1/sqrt(fan in)."""
    return draws.uniform(shape, math.prod(shape[:3]) ** -0.5)


def torch_bias(draws: Draws, kernel_shape: Shape) -> Float[Array, " d"]:
    """PyTorch's default bias for a kernel of that shape: uniform in +-1/sqrt(fan in)."""
    return draws.uniform(kernel_shape[-1:], math.prod(kernel_shape[:3]) ** -0.5)
