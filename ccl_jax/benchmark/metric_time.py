"""How long score maps take to become metrics."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ccl_jax import mesh
from ccl_jax.metrics import counts as counting
from ccl_jax.metrics import scores as metrics
from ccl_jax.metrics.counter import Counter

POOL = 4  # batches of score maps and masks that take turns


class MetricTime(NamedTuple):
    """How long the metrics of a test set take, in seconds, once its score maps are there."""

    counting: float  # regions of the masks, histograms of the scores
    from_counts: float  # what is computed of the histograms

    @property
    def total(self) -> float:
        """All of it, in seconds."""
        return self.counting + self.from_counts


def time_metrics(
    images: int,
    size: int,
    *,
    batch_size: int,
    classes: int,
    fpr_limit: float,
    where: jax.sharding.Mesh,
    key: Key[Array, ""],
) -> MetricTime:
    """The time of all seven metrics of each class for so many score maps [size, size].

    Half of the images have a defect, a rectangle in which scores are higher. As an evaluation does
    it, on `batch_size` maps at once that lie on the devices; a first pass over one batch compiles.
    """
    pool = _pool(size, batch_size=batch_size, where=where, key=key)
    _count(pool, min(images, batch_size), classes=classes, where=where)
    begin = time.perf_counter()
    totals, scores, labels, regions = _count(pool, images, classes=classes, where=where)
    counted = time.perf_counter()
    names = [str(label) for label in range(classes)]
    histograms = counting.class_counts(totals, names)
    anomalous = np.arange(images) % 2 == 1
    for label, name in enumerate(names):
        mine = labels == label
        metrics.image_metrics(scores[mine], anomalous[mine])
        metrics.pixel_metrics(*histograms[name], int(regions[mine].sum()), fpr_limit)
    return MetricTime(counted - begin, time.perf_counter() - counted)


def _pool(
    size: int, *, batch_size: int, where: jax.sharding.Mesh, key: Key[Array, ""]
) -> list[tuple[np.ndarray, jax.Array]]:
    """POOL pairs of masks uint8 [b, size, size], on the host, and their maps, on the devices."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    pool = []
    for number in range(POOL):
        masks = np.zeros((batch_size, size, size), np.uint8)
        for mask in masks[1::2]:
            top, left = rng.integers(0, size // 2, 2)
            height, width = rng.integers(size // 16, size // 2, 2)
            mask[top : top + height, left : left + width] = 1
        noise = jax.random.uniform(
            jax.random.fold_in(key, number), (batch_size, size, size), jnp.float32
        )
        maps = 0.2 * np.asarray(noise) + 0.1 * masks
        pool.append((masks, mesh.put_batch({"maps": maps.astype(np.float32)}, where)["maps"]))
    return jax.block_until_ready(pool)


def _count(
    pool: Sequence[tuple[np.ndarray, jax.Array]],
    images: int,
    *,
    classes: int,
    where: jax.sharding.Mesh,
) -> tuple[counting.Totals, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (totals, scores [n], labels [n], regions [n]) of so many images."""
    counter = Counter(classes, where)
    scores, regions = np.zeros(images), np.zeros(images, int)
    labels = np.arange(images) // 2 % classes
    for (masks, maps), rows in zip(_turns(pool), _rows(images, len(pool[0][0])), strict=False):
        weights, own_regions = zip(*map(metrics.region_weights, masks), strict=True)
        filled = np.zeros(len(masks), np.int32)
        filled[: len(rows)] = labels[rows]
        small = {
            "mask": masks,
            "weight": np.stack(weights),
            "label": filled,
            "counted": np.arange(len(masks)) < len(rows),
        }
        arrays = mesh.put_batch(small, where)
        counter.add(maps, *arrays.values(), regions=sum(own_regions))
        scores[rows] = np.asarray(_highest(maps))[: len(rows)]
        regions[rows] = own_regions[: len(rows)]
    return counter.totals(), scores, labels, regions


@jax.jit
def _highest(maps: Array) -> Array:
    return maps.max((1, 2))


def _turns(pool: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from pool


def _rows(images: int, batch: int) -> Iterator[np.ndarray]:
    for first in range(0, images, batch):
        yield np.arange(first, min(first + batch, images))
