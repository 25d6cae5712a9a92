"""Images that lie on other devices: the collectives of the losses, written out.

To be called within `jax.shard_map`, with the names of the mesh axes over which the images lie, as
many on each device; or with `axis` None, where all images are there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Axis = str | tuple[str, ...] | None


def of_all(rows: Array, axis: Axis) -> Array:
    """The rows of all devices, in their order."""
    return rows if axis is None else jax.lax.all_gather(rows, axis, tiled=True)


def summed(total: Array, axis: Axis) -> Array:
    """The sum over the devices, on all of them."""
    return total if axis is None else jax.lax.psum(total, axis)


def positions_of_mine(images: int, axis: Axis) -> Int[Array, "n"]:
    """The positions in the whole batch of this device's images."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * images
    return first + jnp.arange(images, dtype=jnp.int32)


def with_next(
    maps: Float[Array, "n ..."], reach: int, axis: str | tuple[str, ...]
) -> Float[Array, "m ..."]:
    """This device's images and the `reach` after them, the first after the last.

    They come from the next devices, one after another; of the last only what is needed. So a device
    sends and receives `reach` images, however many devices there are.
    """
    devices, images, parts = jax.lax.axis_size(axis), len(maps), [maps]
    for hop, start in enumerate(range(0, reach, images), start=1):
        moves = [(source, (source - hop) % devices) for source in range(devices)]
        parts.append(jax.lax.ppermute(maps[: reach - start], axis, moves))
    return jnp.concatenate(parts)
