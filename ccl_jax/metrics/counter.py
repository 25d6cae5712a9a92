"""The counts of an evaluation over all its devices: 32 bits there, 64 bits on the host."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from ccl_jax.metrics import counts


class Counter:
    """Counts the batches of an evaluation; each device counts its own images, without a message.

    The partial counts take a little over 2 MiB per class on every device, the totals half as much
    again on the host of every process. Before a partial count could overflow it is added to the
    totals: `most_pixels` and `most_regions` are the most that a device may count until then.
    """

    def __init__(
        self,
        classes: int,
        where: Mesh,
        *,
        most_pixels: int = counts.MOST_PIXELS,
        most_regions: int = counts.MOST_REGIONS,
    ) -> None:
        self._where = where
        self._limits = (most_pixels, most_regions)
        self._totals = counts.empty_totals(classes)
        self._start()

    def _start(self) -> None:
        """Zeros on every device of this process; nothing that other processes would have to do."""
        sharding = NamedSharding(self._where, PartitionSpec(self._where.axis_names))
        here = jax.process_index()
        mine = [device for device in self._where.devices.flat if device.process_index == here]

        def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            parts = [jax.device_put(np.zeros((1, *leaf.shape), leaf.dtype), d) for d in mine]
            whole = (self._where.size, *leaf.shape)
            return jax.make_array_from_single_device_arrays(whole, sharding, parts)

        classes = len(self._totals.invalid)
        self._partial = jax.tree.map(zeros, jax.eval_shape(lambda: counts.empty_counts(classes)))
        self._pixels = self._regions = 0

    def add(
        self,
        maps: Float[Array, "b h w"],
        masks: UInt8[Array, "b h w"],
        region_weight: Float32[Array, "b h w"],
        labels: Int[Array, "b"],
        counted: Bool[Array, "b"],
        *,
        regions: int,
    ) -> None:
        """Counts a batch that is split over all devices, as `counts.add_scores` does.

        `regions` is how many this process's images of the batch have.
        """
        pixels = maps.size // self._where.size
        if self._pixels + pixels > self._limits[0] or self._regions + regions > self._limits[1]:
            self._flush()
        self._pixels += pixels
        self._regions += regions  # all of them might lie on one device
        self._partial = _add_on_devices(
            self._partial, maps, masks, region_weight, labels, counted, where=self._where
        )

    def totals(self) -> counts.Totals:
        """What the devices of this process have counted so far."""
        self._flush()
        return self._totals

    def _flush(self) -> None:
        for number in range(len(self._partial.invalid.addressable_shards)):

            def part(leaf: jax.Array, number: int = number) -> np.ndarray:
                return np.asarray(leaf.addressable_shards[number].data)[0]

            counts.add_to_totals(self._totals, jax.tree.map(part, self._partial))
        del self._partial  # before as much is allocated again
        self._start()


@functools.partial(jax.jit, static_argnames="where", donate_argnums=0)
def _add_on_devices(partial: counts.ScoreCounts, *batch: Array, where: Mesh) -> counts.ScoreCounts:
    """`partial`, one leading row per device, with each device's images counted in its own row."""

    def add(own: counts.ScoreCounts, *images: Array) -> counts.ScoreCounts:
        own = jax.tree.map(lambda leaf: leaf[0], own)
        return jax.tree.map(lambda leaf: leaf[None], counts.add_scores(own, *images))

    split = PartitionSpec(where.axis_names)
    return jax.shard_map(add, mesh=where, in_specs=split, out_specs=split)(partial, *batch)
