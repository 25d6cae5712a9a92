"""The reporting conventions of published tables, by name: for comparison with those tables only.

The second release takes its pixel metrics from an evaluator that counts scores in 50 strips
("adeval_50"); where that is switched off, both releases take AUPRO from a hundred thresholds and
F1 and IoU from a few ("threshold_step"). Their image metrics, and the latter's pixel AUROC and AP,
are scikit-learn's and so those of `scores`. Everything is in 0..1 and float64, and `None` where
it is undefined: without normal or without anomalous pixels, and where all scores are the same.
Rules from RECIPES 5.4 to 5.6 of the reference, and as ADEval 1.1.0 and torch.histc apply them.

Thresholds depend on the lowest and highest score, and streaming counts know a score only by its
bin: from counts these values are off by up to 2e-4 on smoothed maps with thousands of anomalous
pixels, and by up to 2e-3 with four hundred.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num

from ccl_jax.metrics.scores import PixelHistogram, mean_up_to

DESCRIPTIONS = {
    "adeval_50": (
        "pixel metrics as the second release reports them: 51 thresholds that cut the scores of a "
        "class, from the lowest to the highest, into 50 equal strips; AP and AUROC by trapezoids; "
        "AUPRO up to a false-positive rate of 0.3, linear between thresholds"
    ),
    "threshold_step": (
        "pixel metrics of the releases' other evaluator: AUPRO from 100 equally spaced thresholds, "
        "the false-positive rates below 0.3 stretched to 0..1; F1 and IoU at the best of 21 "
        "thresholds of the scores stretched to 0..1, and their means (and the recall's) over 7 "
        "thresholds from 0.2 to 0.8"
    ),
}
CONVENTIONS = tuple(DESCRIPTIONS)
FROM_COUNTS = "computed from the streaming counts, each score taken for the middle of its bin"

_FPR_LIMIT = 0.3
_EPSILON = 1e-8  # added to every denominator of the threshold metrics
_IMAGE_MARGIN = 1e-7  # by which the release widens the range of the image scores, not the pixels'

Values = dict[str, float | None]


def pixel_metrics(convention: str, pixels: PixelHistogram) -> Values:
    """The pixel metrics of one class by a convention of `CONVENTIONS`."""
    if convention == "adeval_50":
        return adeval_pixels(pixels, strips=50)
    if convention == "threshold_step":
        return threshold_step_pixels(pixels, steps=100)
    raise ValueError(
        f'config.eval.published_metrics names "{convention}"; use some of '
        f"{', '.join(CONVENTIONS)}, e.g. --config.eval.published_metrics=\"('adeval_50',)\"."
    )


def summarize(convention: str, classes: Mapping[str, PixelHistogram]) -> dict[str, Any]:
    """Description, means and class values by a convention, from histograms of streaming counts.

    The mean is plain, over the classes that have the metric.
    """
    values = {name: pixel_metrics(convention, pixels) for name, pixels in classes.items()}
    mean: Values = {}
    for metric in next(iter(values.values()), {}):
        known = [v for row in values.values() if (v := row[metric]) is not None]
        mean[metric] = math.fsum(known) / len(known) if known else None
    description = f"{DESCRIPTIONS[convention]}; {FROM_COUNTS}"
    return {"description": description, "mean": mean, "classes": values}


def adeval_pixels(pixels: PixelHistogram, *, strips: int) -> Values:
    """Pixel AUROC, AP and AUPRO from `strips` equal strips between lowest and highest score.

    AUPRO is also None where so many normal pixels share the highest score that the curve begins
    beyond its limit.
    """
    names = ("pixel_auroc", "pixel_ap", "pixel_aupro")
    pixels = _occupied(pixels)
    if not _two_sided(pixels):
        return dict.fromkeys(names)
    low, high = pixels.values[[0, -1]]
    normal, anomalous, region = (
        _from_strips_up(pixels.values, amounts, low, high, strips)
        for amounts in (pixels.normal, pixels.anomalous, pixels.region)
    )
    false_positives = normal / normal[-1]
    aupro = None
    if false_positives[0] <= _FPR_LIMIT:
        aupro = mean_up_to(_FPR_LIMIT, false_positives, region / region[-1])
    return dict(zip(names, (*_auroc_and_ap(normal, anomalous), aupro), strict=True))


def adeval_images(
    scores: Num[np.ndarray, "n"], anomalous: Bool[np.ndarray, "n"], *, strips: int
) -> Values:
    """Image AUROC and AP from strips; the second release computes them so, but reports others."""
    names = ("image_auroc", "image_ap")
    scores = scores.astype(np.float64)
    if anomalous.all() or not anomalous.any() or scores.min() == scores.max():
        return dict.fromkeys(names)
    low, high = scores.min() - _IMAGE_MARGIN, scores.max() + _IMAGE_MARGIN
    counted = (
        _from_strips_up(scores, side.astype(np.float64), low, high, strips)
        for side in (~anomalous, anomalous)
    )
    return dict(zip(names, _auroc_and_ap(*counted), strict=True))


def threshold_step_pixels(pixels: PixelHistogram, *, steps: int) -> Values:
    """AUPRO from `steps` thresholds, and F1, IoU and recall of scores stretched to 0..1.

    AUPRO is also None where fewer than two of its thresholds differ in false-positive rate.
    """
    names = ("pixel_aupro", "pixel_f1_max", "pixel_iou_max")
    means = ("pixel_f1_mean", "pixel_iou_mean", "pixel_recall_mean")
    pixels = _occupied(pixels)
    if not _two_sided(pixels):
        return dict.fromkeys(names + means)
    low, high = pixels.values[[0, -1]]
    stretched = pixels._replace(values=(pixels.values - low) / (high - low))
    # Sums as np.arange makes them, as in the original: a score may lie exactly on a threshold.
    f1, iou, _ = _overlaps(stretched, np.arange(0.0, 1.025, 0.05))
    several = _overlaps(stretched, np.arange(0.2, 0.85, 0.1))
    best = (_stretched_aupro(pixels, steps), float(f1.max()), float(iou.max()))
    return dict(zip(names + means, (*best, *(float(x.mean()) for x in several)), strict=True))


def _occupied(pixels: PixelHistogram) -> PixelHistogram:
    """The same without the bins that no pixel is in."""
    where = (pixels.normal > 0) | (pixels.anomalous > 0)
    values, normal, anomalous, region = (x[where].astype(np.float64) for x in pixels[:4])
    return PixelHistogram(values, normal, anomalous, region, pixels.regions)


def _two_sided(pixels: PixelHistogram) -> bool:
    """Whether there are two scores and both kinds of pixels."""
    return len(pixels.values) > 1 and bool(pixels.normal.any() and pixels.anomalous.any())


def _from_strips_up(
    values: Float[np.ndarray, "n"],
    amounts: Float[np.ndarray, "n"],
    low: float,
    high: float,
    strips: int,
) -> Float[np.ndarray, "thresholds"]:
    """How much is predicted anomalous at each of the strips + 1 thresholds, the highest first.

    What scores exactly `high` counts twice, as in the original: in the last strip and beyond it.
    """
    strip = np.minimum((values - low) * strips / (high - low), strips - 1).astype(int)
    beyond = amounts[values >= high].sum()
    return np.cumsum(np.append(np.bincount(strip, amounts, strips), beyond)[::-1])


def _auroc_and_ap(
    normal: Float[np.ndarray, "thresholds"], anomalous: Float[np.ndarray, "thresholds"]
) -> tuple[float, float]:
    """Areas by trapezoids under the points of the thresholds alone, without an added (0, 0)."""
    predicted = normal + anomalous
    precision = np.divide(anomalous, predicted, out=np.ones_like(predicted), where=predicted > 0)
    recall = anomalous / anomalous[-1]
    return _area(normal / normal[-1], recall), _area(recall, precision)


def _area(x: Float[np.ndarray, "points"], y: Float[np.ndarray, "points"]) -> float:
    """The area by trapezoids under a curve whose x only rise or only fall."""
    from sklearn import metrics

    return float(metrics.auc(x, y))


def _above(
    pixels: PixelHistogram, thresholds: Float[np.ndarray, "thresholds"]
) -> list[Float[np.ndarray, "thresholds"]]:
    """Normal pixels, anomalous pixels and region weight with a score above each threshold."""
    first = np.searchsorted(pixels.values, thresholds, side="right")
    arrays = (pixels.normal, pixels.anomalous, pixels.region)
    return [np.append(np.cumsum(x[::-1])[::-1], 0.0)[first] for x in arrays]


def _stretched_aupro(pixels: PixelHistogram, steps: int) -> float | None:
    low, high = pixels.values[[0, -1]]
    normal, _, region = _above(pixels, np.arange(low, high, (high - low) / steps))
    rates = normal / pixels.normal.sum()
    kept = rates < _FPR_LIMIT
    rates, overlap = rates[kept], region[kept] / pixels.regions
    if not kept.any() or rates.min() == rates.max():
        return None
    return _area((rates - rates.min()) / (rates.max() - rates.min()), overlap)


def _overlaps(
    pixels: PixelHistogram, thresholds: Float[np.ndarray, "thresholds"]
) -> tuple[Float[np.ndarray, "thresholds"], ...]:
    """Returns (F1, IoU, recall) of the anomalous pixels at each threshold."""
    normal, anomalous, _ = _above(pixels, thresholds)
    truth = pixels.anomalous.sum()
    precision = anomalous / (normal + anomalous + _EPSILON)
    recall = anomalous / (truth + _EPSILON)
    f1 = 2 * precision * recall / (precision + recall + _EPSILON)
    return f1, anomalous / (truth + normal + _EPSILON), recall
