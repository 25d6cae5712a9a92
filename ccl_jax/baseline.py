"""What trivial detectors reach: a floor for every real one, and a test of the data itself.

Both know the class of every test image, which a real detector here does not.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from ccl_jax.data.records import Record, read_image, read_mask

METRICS = ("image_auroc", "pixel_auroc", "brightness_image_auroc")
_LEAST_STD = 1.0  # grey levels: a pixel that never changes must not turn noise into infinity
_Score = Callable[[np.ndarray], tuple[float, np.ndarray]]


def pixel_statistics_baseline(
    train: Sequence[Record], test: Sequence[Record], *, image_size: int, sigma: float
) -> dict[str, Any]:
    """Per class and as plain means, what two detectors without any features reach, in 0..1.

    - `image_auroc`, `pixel_auroc`: per class the mean and standard deviation of every pixel and
      channel over the training images; the score map is the norm over the channels of how many
      deviations a pixel is off, smoothed with a Gaussian of `sigma` pixels; its maximum is the
      image score.
    - `brightness_image_auroc`: the same on one pixel, the image's mean colour.

    A metric is None where a class cannot have it: no anomalous or no normal test image, or for
    pixels an anomalous image without mask. Returns {"classes": {name: {metric: value}}, "mean":
    {metric: value}}; the mean is over the classes that have the metric.

    Raises:
        ValueError: A tested class has no training images.
    """
    classes: dict[str, dict[str, float | None]] = {}
    tested = _by_class(test)
    trained = _by_class(train)
    for name, records in tested.items():
        if name not in trained:
            raise ValueError(
                f"{name} has test images but no training images; "
                f"put normal photos in {name}/train/good."
            )
        images = (read_image(record, image_size) for record in trained[name])
        classes[name] = _class_metrics(_fit(images, sigma), records, image_size)
    return {"classes": classes, "mean": _means(classes)}


def markdown_table(results: Mapping[str, Any]) -> str:
    """A row per class, then the mean, with three decimals; "-" where there is no value."""
    header = ("class", "image AUROC", "pixel AUROC", "image AUROC, mean colour only")
    rows = [*results["classes"].items(), ("**mean**", results["mean"])]
    lines = [header, (":--", *["--:"] * len(METRICS))]
    for name, values in rows:
        cells = ("-" if values[m] is None else f"{values[m]:.3f}" for m in METRICS)
        lines.append((name, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_class(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[f"{record.dataset}/{record.class_name}"].append(record)
    return dict(groups)


def _fit(images: Iterable[np.ndarray], sigma: float) -> _Score:
    """Returns a function: image [h, w, 3] -> (brightness score, score map [h, w])."""
    stack = np.stack(list(images)).astype(np.float32)
    colours = stack.mean((1, 2))
    pixel, colour = (
        (values.mean(0), np.maximum(values.std(0), _LEAST_STD)) for values in (stack, colours)
    )

    def score(image: np.ndarray) -> tuple[float, np.ndarray]:
        brightness = np.linalg.norm((image.mean((0, 1)) - colour[0]) / colour[1])
        deviation = np.linalg.norm((image - pixel[0]) / pixel[1], axis=-1)
        smooth = ndimage.gaussian_filter(deviation, sigma) if sigma else deviation
        return float(brightness), smooth

    return score


def _class_metrics(
    score: _Score, records: Sequence[Record], image_size: int
) -> dict[str, float | None]:
    scored = [score(read_image(record, image_size)) for record in records]
    anomalous = np.array([record.anomalous for record in records])
    maps = np.stack([map_ for _, map_ in scored])
    pixels = None
    if all(record.mask is not None for record in records if record.anomalous):
        masks = np.stack([read_mask(record, image_size) for record in records])
        pixels = _auroc(masks.ravel(), maps.ravel())
    return {
        "image_auroc": _auroc(anomalous, maps.max((1, 2))),
        "pixel_auroc": pixels,
        "brightness_image_auroc": _auroc(anomalous, np.array([value for value, _ in scored])),
    }


def _auroc(truth: np.ndarray, scores: np.ndarray) -> float | None:
    return float(roc_auc_score(truth, scores)) if 0 < truth.mean() < 1 else None


def _means(classes: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for metric in METRICS:
        values = [value for v in classes.values() if (value := v[metric]) is not None]
        means[metric] = float(np.mean(values)) if values else None
    return means
