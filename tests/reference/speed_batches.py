"""The batches that both frameworks are timed on: the same numbers from the same seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
CLASSES, SCALES = 15, 3


class Batch(NamedTuple):
    """Two pictures of everything, as they come from a loader; channels last."""

    clean: np.ndarray  # uint8 [b, size, size, 3]
    augmented: np.ndarray
    labels: np.ndarray  # int32 [b], of at least two classes
    negatives: np.ndarray  # int32 [scales, b], an image of another class for each


def make_batches(number: int, images: int, size: int) -> list[Batch]:
    """So many different batches. Raises ValueError for fewer than two images: no negatives."""
    if images < 2:
        raise ValueError(
            f"--batches {images}: the local loss compares with an image of another class; "
            "use at least 2, e.g. --batches 8."
        )
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(number):
        labels = rng.permutation(np.arange(images, dtype=np.int32) % CLASSES)
        others = [np.flatnonzero(labels != label) for label in labels]
        drawn = [[rng.choice(images_) for images_ in others] for _ in range(SCALES)]
        clean, augmented = (smooth_pictures(rng, images, size) for _ in range(2))
        batches.append(Batch(clean, augmented, labels, np.array(drawn, np.int32)))
    return batches


def smooth_pictures(rng: np.random.Generator, images: int, size: int) -> np.ndarray:
    """Coarse random colours with some noise, uint8: neither flat nor white noise."""
    coarse = rng.uniform(30, 225, (images, size // 8, size // 8, 3))
    fine = coarse.repeat(8, axis=1).repeat(8, axis=2) + rng.normal(0, 12, (images, size, size, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def normalised(pictures: np.ndarray) -> np.ndarray:
    """What the encoder expects: float32 of ImageNet's mean 0 and standard deviation 1."""
    return (pictures.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
