"""Seven metrics of a full-size test set: streaming counts, and the exact routines of public code.

    python -m tests.reference.speed_metrics --page docs/benchmarks.md

Score maps and masks are drawn, class by class. Ours counts them in bins on the device, batch by
batch, and takes the metrics from the counts. The exact side holds a class's maps and takes
scikit-learn's roc_auc_score, average_precision_score and precision_recall_curve of all pixels, and
an AUPRO as public code computes it: a loop over thresholds, and over the regions in each. Both see
the same first `--exact` images of the set; ours is also timed on all of them. Making the maps is
timed on neither side; finding the masks' regions is on both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from scipy import ndimage
from sklearn import metrics

from ccl_jax import mesh
from ccl_jax.benchmark.page import machine, replace_part
from ccl_jax.metrics import counts as counting
from ccl_jax.metrics import scores as measures
from ccl_jax.metrics.counter import Counter

FPR_LIMIT = 0.3
EIGHT_NEIGHBOURS = np.ones((3, 3), int)
LIBRARIES = ("jax", "jaxlib", "numpy", "scipy", "scikit-learn")
ALL, SAME, EXACT = "streaming counts, all", "streaming counts, the same", "exact"
Values = dict[str, float | None]


class ClassSet(NamedTuple):
    """The test images of one class."""

    maps: np.ndarray  # float32 [n, size, size]
    masks: np.ndarray  # uint8 [n, size, size]
    anomalous: np.ndarray  # bool [n]


class Found(NamedTuple):
    """What a way of computing the metrics took, and found."""

    images: int
    seconds: float
    cpu_seconds: float
    rises: list[int]  # bytes of peak memory, in each stretch of its work
    values: list[Values]  # by class


# --- the set ---


def class_sizes(images: int, classes: int) -> list[int]:
    """Uneven numbers of images, four at least, that add up; the last class is thrice the first."""
    shares = np.linspace(1, 3, classes)
    sizes = np.maximum(4, np.floor(images * shares / shares.sum()).astype(int))
    sizes[-1] += images - sizes.sum()
    if sizes[-1] < 4:
        raise ValueError(f"{images} images are too few for {classes} classes; use {4 * classes}.")
    return sizes.tolist()


def make_class(label: int, images: int, size: int) -> ClassSet:
    """Smooth positive score maps, higher within the defects, which most images have."""
    rng = np.random.default_rng([label, images, size])
    maps = np.empty((images, size, size), np.float32)
    masks = np.zeros((images, size, size), np.uint8)
    anomalous = np.arange(images) % 4 != 0
    for i in range(images):
        if anomalous[i]:
            for _ in range(rng.integers(1, 5)):
                draw_ellipse(rng, masks[i])
        lift = ndimage.gaussian_filter(masks[i].astype(np.float32), size / 32)
        maps[i] = np.exp(0.3 * smooth(rng, size) + 0.8 * lift - 2)
    return ClassSet(maps, masks, anomalous)


def draw_ellipse(rng: np.random.Generator, mask: np.ndarray) -> None:
    """Marks one defect, of 0.1 to 4 % of the image; it may touch others."""
    size = len(mask)
    y, x = np.ogrid[:size, :size]
    centre, radii = rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0.02, 0.11, 2) * size
    mask[((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1] = 1


def smooth(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise without fine detail, of mean 0 and spread 1."""
    coarse = rng.normal(size=(size // 8, size // 8))
    fine = ndimage.zoom(coarse, size / len(coarse), order=1)
    fine += 0.05 * rng.normal(size=fine.shape)
    return (fine - fine.mean()) / fine.std()


# --- ours ---


class Streaming:
    """The package's way, as `evaluate.collect` goes it: batches of maps on the device to counts."""

    def __init__(self, classes: int, batch_size: int):
        self.where = mesh.make_mesh()
        self.counter = Counter(classes, self.where)
        self.batch_size = batch_size
        self.regions = np.zeros(classes, int)
        self.image_scores: list[np.ndarray] = []
        self.anomalous: list[np.ndarray] = []

    def add(self, label: int, images: ClassSet) -> None:
        """Counts a class, the last batch filled up with images that do not count."""
        for start in range(0, len(images.maps), self.batch_size):
            part = slice(start, start + self.batch_size)
            self._add_batch(label, images.maps[part], images.masks[part])
        self.image_scores.append(images.maps.max(axis=(1, 2)))
        self.anomalous.append(images.anomalous)

    def _add_batch(self, label: int, maps: np.ndarray, masks: np.ndarray) -> None:
        weights, regions = zip(*map(measures.region_weights, masks), strict=True)
        missing = self.batch_size - len(maps)

        def filled(array: np.ndarray) -> np.ndarray:
            return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)])

        arrays = {
            "maps": filled(maps),
            "masks": filled(masks),
            "weights": filled(np.stack(weights)),
            "labels": np.full(self.batch_size, label, np.int32),
            "counted": filled(np.ones(len(maps), bool)),
        }
        placed = mesh.put_batch(arrays, self.where)
        self.counter.add(*placed.values(), regions=sum(regions))
        self.regions[label] += sum(regions)

    def metrics(self) -> list[Values]:
        """The seven of each class."""
        names = [str(label) for label in range(len(self.regions))]
        histograms = counting.class_counts(self.counter.totals(), names)
        return [
            measures.image_metrics(scores, anomalous, name=name)
            | measures.pixel_metrics(*histograms[name], int(regions), FPR_LIMIT)
            for name, scores, anomalous, regions in zip(
                names, self.image_scores, self.anomalous, self.regions, strict=True
            )
        ]


# --- exact ---


def exact_metrics(images: ClassSet, thresholds: int) -> Values:
    """The seven of one class, from all pixels at once."""
    found: Values = {}
    pixels = (images.masks.ravel() > 0, images.maps.ravel())
    for kind, (truth, scores) in {
        "image": (images.anomalous, images.maps.max(axis=(1, 2))),
        "pixel": pixels,
    }.items():
        precision, recall, _ = metrics.precision_recall_curve(truth, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        found[f"{kind}_auroc"] = float(metrics.roc_auc_score(truth, scores))
        found[f"{kind}_ap"] = float(metrics.average_precision_score(truth, scores))
        found[f"{kind}_f1_max"] = float(f1.max())
    found["pixel_aupro"] = loop_aupro(images.maps, images.masks, thresholds)
    return found


def loop_aupro(maps: np.ndarray, masks: np.ndarray, thresholds: int) -> float:
    """AUPRO from so many thresholds, each with a pass over the pixels and over the regions.

    They lie at quantiles of the normal scores, closest where few are above: equal steps of the
    score, as in public code, would need many more of them to come as near to the exact value.
    """
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        which, number = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
        regions += [scores[which == region] for region in range(1, number + 1)]
    normal = maps[masks == 0]
    rates = min(1.0, 1.02 * FPR_LIMIT) * np.linspace(0, 1, thresholds) ** 2
    false_positives, overlaps = [0.0], [0.0]
    for threshold in np.quantile(normal, 1 - rates):
        false_positives.append(float((normal >= threshold).mean()))
        overlaps.append(float(np.mean([(region >= threshold).mean() for region in regions])))
    return measures.mean_up_to(FPR_LIMIT, np.array(false_positives), np.array(overlaps))


# --- the run ---


class Clock:
    """Adds up wall and CPU time, and the rise of the peak memory, of what runs within it."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.rises: list[int] = []

    def __enter__(self) -> None:
        self._from = (time.perf_counter(), time.process_time(), peak_memory())

    def __exit__(self, *_: object) -> None:
        wall, cpu, peak = self._from
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.rises.append(peak_memory() - peak)

    def found(self, images: int, values: list[Values]) -> Found:
        """What ran, with its results."""
        return Found(images, self.wall, self.cpu, self.rises, values)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_ours(sizes: Sequence[int], size: int, batch_size: int) -> Found:
    """By the streaming counts, whose program is compiled before."""
    warm = Streaming(len(sizes), batch_size)
    warm.add(0, make_class(0, 4, size))
    warm.counter.totals()
    clock = Clock()
    with clock:
        streaming = Streaming(len(sizes), batch_size)
    for label, images in classes_of(sizes, size):
        with clock:
            streaming.add(label, images)
            jax.block_until_ready(streaming.counter._partial)  # else it would run on, untimed
    with clock:
        values = streaming.metrics()
    return clock.found(sum(sizes), values)


def time_exact(sizes: Sequence[int], size: int, thresholds: int) -> Found:
    """By the exact routines."""
    clock, values = Clock(), []
    for _, images in classes_of(sizes, size):
        with clock:
            values.append(exact_metrics(images, thresholds))
    return clock.found(sum(sizes), values)


def classes_of(sizes: Sequence[int], size: int) -> Iterator[tuple[int, ClassSet]]:
    """(label, images) of each class, one at a time."""
    for label, images in enumerate(sizes):
        yield label, make_class(label, images, size)


def largest_differences(ours: Sequence[Values], exact: Sequence[Values]) -> dict[str, float]:
    """By metric, over the classes; NaN where only one side has a value."""
    return {
        name: float(
            np.max([difference(a[name], b[name]) for a, b in zip(ours, exact, strict=True)])
        )
        for name in measures.METRICS
    }


def difference(ours: float | None, exact: float | None) -> float:
    """Absolute; 0 where both are undefined."""
    if ours is None and exact is None:
        return 0.0
    return np.nan if ours is None or exact is None else abs(ours - exact)


def report(options: argparse.Namespace, found: dict[str, Found]) -> str:
    """The body of the page's part, from what `main` ran."""
    ours, exact = found[SAME], found[EXACT]
    lines = ["| by | images | s | CPU s | times exact |", "| --- | --: | --: | --: | --: |"]
    for name, each in found.items():
        ratio = f"{exact.seconds / each.seconds:.1f}" if each.images == exact.images else "-"
        lines.append(
            f"| {name} | {each.images:,} | {each.seconds:.1f} | {each.cpu_seconds:.1f} | {ratio} |"
        )
    differences = largest_differences(ours.values, exact.values)
    rows = [f"| {name} | {value:.1e} |" for name, value in differences.items()]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return "\n\n".join(
        [
            f"`{' '.join(['python -m tests.reference.speed_metrics', *options.words])}`",
            f"{options.classes} classes, maps of {options.size} x {options.size}, batches of "
            f"{options.batch}, AUPRO from {options.thresholds} thresholds on the exact side; "
            f"Python {platform.python_version()}, {versions}; "
            f"{datetime.date.today():%d %B %Y}.",
            "\n".join(lines),
            memory(found.get(ALL, ours), options.classes),
            f"Largest difference over the classes, on the same {ours.images:,} images:",
            "\n".join(["| metric | difference |", "| --- | --: |", *rows]),
        ]
    )


def memory(ours: Found, classes: int) -> str:
    """What the counts took; the stretches are the start, each class, and the metrics at the end."""
    start, first, *others, end = (rise / 2**20 for rise in ours.rises)
    totals = sum(leaf.nbytes for leaf in counting.empty_totals(classes)) / 2**20
    return (
        f"The totals take {totals:.0f} MiB on the host, whatever the number of images. Counting "
        f"{ours.images:,} raised the process's peak memory by {start + first:.0f} MiB up to the "
        f"end of the first class, by {sum(others):.0f} MiB in all other classes, and by "
        f"{end:.0f} MiB when the metrics were taken."
    )


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options, and the words that they were given in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=1725, help="in all, as MVTec AD's test set")
    parser.add_argument("--exact", type=int, default=600, help="images for the exact routines")
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--size", type=int, default=256, help="side of the maps, pixels")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch")
    parser.add_argument("--thresholds", type=int, default=200, help="of the AUPRO loop")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--page", type=Path, help="Markdown page whose part is replaced")
    options = parser.parse_args(words)
    options.words = list(words)
    return options


def main(words: Sequence[str]) -> str:
    """The printed text, which `--page` also gets."""
    options = parsed(words)
    few = class_sizes(min(options.exact, options.images), options.classes)
    found = {}
    if options.exact < options.images:  # first, so that the peak memory is its own
        many = class_sizes(options.images, options.classes)
        found[ALL] = time_ours(many, options.size, options.batch)
    found[SAME] = time_ours(few, options.size, options.batch)
    found[EXACT] = time_exact(few, options.size, options.thresholds)
    text = report(options, found)
    print(text)
    if options.json:
        named = {name: each._asdict() for name, each in found.items()}
        options.json.write_text(json.dumps({"command": options.words, **named}, indent=2))
    if options.page:
        replace_part(options.page, machine(), "Metrics of a full-size test set", text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
