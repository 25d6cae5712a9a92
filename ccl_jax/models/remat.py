"""Maps that the backward pass computes again instead of keeping them."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree


def computed_again(
    module: nnx.Module, call: Callable[..., jax.Array], maps: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    """`call(module, maps)`, of which only maps and result are kept for the backward pass.

    The module's running statistics are updated once, as by the call itself.
    """
    # Not `nnx.remat`: it writes to parameters too, which a module must not where only shapes of it
    # are traced.
    graphdef = nnx.graphdef(module)
    params, statistics = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)

    @jax.checkpoint
    def run(params: PyTree, statistics: PyTree, maps: jax.Array) -> tuple[jax.Array, PyTree]:
        inner = nnx.merge(graphdef, params, statistics)
        return call(inner, maps), nnx.state(inner, nnx.BatchStat)

    result, after = run(params, statistics, maps)
    if jax.tree.leaves(after):
        nnx.update(module, after)
    return result
