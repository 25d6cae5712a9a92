"""How well scores separate normal from anomalous: AUROC, AP, F1-max and AUPRO.

Each measure exists on arrays (exact: every distinct score is a threshold) and on histograms, where
the scores of a bin are tied. All are in 0..1, computed in float64, and `None` where undefined. They
agree with the exact values of the reference's pixel and image metrics, except that
AUPRO and pixel F1 use every threshold instead of a hundred or twenty. scikit-learn and SciPy are
imported where they are used: the first step of a training need not wait for them.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Num

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro")
METRICS = IMAGE_METRICS + PIXEL_METRICS
SAMPLE_METRIC = "sample_auroc"  # only of classes whose parts are shown in several views

_EIGHT_NEIGHBOURS = np.ones((3, 3), int)


class PixelHistogram(NamedTuple):
    """How many pixels of one class have each score; arrays are [bins], over ascending values."""

    values: np.ndarray  # distinct scores
    normal: np.ndarray  # pixels
    anomalous: np.ndarray  # pixels
    region: np.ndarray  # of the anomalous pixels: the sum of one over the size of their region
    regions: int  # 8-connected regions of the masks


def auroc(
    scores: Num[np.ndarray, "n"],
    anomalous: Bool[np.ndarray, "n"],
    weights: Num[np.ndarray, "n"] | None = None,
) -> float | None:
    """Chance that an anomalous score exceeds a normal one, ties counting half."""
    if not _two_sided(scores, anomalous):
        return None
    from sklearn import metrics

    return float(metrics.roc_auc_score(anomalous, scores, sample_weight=weights))


def average_precision(
    scores: Num[np.ndarray, "n"],
    anomalous: Bool[np.ndarray, "n"],
    weights: Num[np.ndarray, "n"] | None = None,
) -> float | None:
    """Precision averaged over the anomalous scores, as steps without interpolation."""
    if not _two_sided(scores, anomalous):
        return None
    from sklearn import metrics

    return float(metrics.average_precision_score(anomalous, scores, sample_weight=weights))


def f1_max(
    scores: Num[np.ndarray, "n"],
    anomalous: Bool[np.ndarray, "n"],
    weights: Num[np.ndarray, "n"] | None = None,
) -> float | None:
    """Greatest F1 over all thresholds: the threshold is chosen on the data it is judged by."""
    if not _two_sided(scores, anomalous):
        return None
    from sklearn import metrics

    precision, recall, _ = metrics.precision_recall_curve(anomalous, scores, sample_weight=weights)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return float(f1.max())


def aupro(
    maps: Float[np.ndarray, "b h w"], masks: Num[np.ndarray, "b h w"], *, fpr_limit: float
) -> float | None:
    """Mean share of a region that is found, averaged over false-positive rates up to the limit.

    Regions are the 8-connected components of the masks and weigh the same whatever their size; the
    curve is linear between thresholds and cut exactly at the limit.
    """
    pixels = pixel_histogram(maps, masks)
    return aupro_from_counts(pixels.normal, pixels.region, pixels.regions, fpr_limit=fpr_limit)


def pixel_histogram(
    maps: Float[np.ndarray, "b h w"], masks: Num[np.ndarray, "b h w"]
) -> PixelHistogram:
    """Score maps and masks of one class as a histogram with a bin per distinct score."""
    _raise_if_nan(maps)
    weights, regions = zip(*(_region_weights(mask) for mask in masks), strict=True)
    values, which = np.unique(maps, return_inverse=True)
    normal, anomalous, region = (
        np.bincount(which.ravel(), amounts.ravel(), len(values))
        for amounts in (masks == 0, masks != 0, np.stack(weights))
    )
    return PixelHistogram(values.astype(np.float64), normal, anomalous, region, sum(regions))


def region_weights(mask: Num[np.ndarray, "h w"]) -> tuple[Float32[np.ndarray, "h w"], int]:
    """One over the size of each pixel's 8-connected region, 0 outside; and how many regions."""
    weights, regions = _region_weights(mask)
    return weights.astype(np.float32), regions


def auroc_from_counts(
    normal: Num[np.ndarray, "bins"], anomalous: Num[np.ndarray, "bins"]
) -> float | None:
    """AUROC of histograms over ascending scores."""
    return auroc(*_spread(normal, anomalous))


def average_precision_from_counts(
    normal: Num[np.ndarray, "bins"], anomalous: Num[np.ndarray, "bins"]
) -> float | None:
    """Average precision of histograms over ascending scores."""
    return average_precision(*_spread(normal, anomalous))


def f1_max_from_counts(
    normal: Num[np.ndarray, "bins"], anomalous: Num[np.ndarray, "bins"]
) -> float | None:
    """Greatest F1 of histograms over ascending scores."""
    return f1_max(*_spread(normal, anomalous))


def aupro_from_counts(
    normal: Num[np.ndarray, "bins"],
    region: Num[np.ndarray, "bins"],
    regions: int,
    *,
    fpr_limit: float,
) -> float | None:
    """AUPRO of histograms over ascending scores; `region` holds weights of `region_weights`."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(
            f"AUPRO up to a false-positive rate of {fpr_limit} is not defined; use a limit in "
            "(0, 1], e.g. --config.eval.aupro_fpr_limit=0.3."
        )
    total = float(region.sum())
    if abs(total - regions) > 1e-3 * max(regions, 1):
        raise ValueError(
            f"the region weights add up to {total:.6g}, but there are {regions} regions; count "
            "the regions of exactly those images whose weights were added."
        )
    if not regions or not normal.sum():
        return None
    occupied = np.flatnonzero((normal > 0) | (region > 0))[::-1]
    normal, region = normal[occupied].astype(np.float64), region[occupied].astype(np.float64)
    false_positives = np.concatenate([[0.0], np.cumsum(normal) / normal.sum()])
    overlap = np.concatenate([[0.0], np.cumsum(region) / region.sum()])
    return mean_up_to(fpr_limit, false_positives, overlap)


def mean_up_to(
    limit: float, x: Float[np.ndarray, "points"], y: Float[np.ndarray, "points"]
) -> float:
    """Area under the lines through points of ascending x from x[0] to the limit, over the limit.

    x[0] must not lie beyond the limit, nor the limit beyond the last x.
    """
    # Points with the same x stand above each other; cutting by hand keeps them in order, which
    # np.interp at the limit would not.
    inside = int(np.searchsorted(x, limit, side="right"))
    low, high = x[:inside], y[:inside]
    if low[-1] < limit:
        share = (limit - low[-1]) / (x[inside] - low[-1])
        low, high = (
            np.append(low, limit),
            np.append(high, high[-1] + share * (y[inside] - high[-1])),
        )
    return float((np.diff(low) * (high[1:] + high[:-1])).sum() / 2 / limit)


def image_metrics(
    scores: Num[np.ndarray, "n"], anomalous: Bool[np.ndarray, "n"], *, name: str = ""
) -> dict[str, float | None]:
    """The image metrics of one class; ValueError naming the class if a score is NaN."""
    _raise_if_nan(scores, name)
    values = (f(scores, anomalous) for f in (auroc, average_precision, f1_max))
    return dict(zip(IMAGE_METRICS, values, strict=True))


def sample_auroc(
    scores: Num[np.ndarray, "n"], anomalous: Bool[np.ndarray, "n"], samples: Sequence[str]
) -> float | None:
    """AUROC of physical parts: one is as anomalous as its highest view, and defective if any is.

    `samples` name the part that each image shows.
    """
    names, which = np.unique(np.array(samples, str), return_inverse=True)
    highest = np.full(len(names), -np.inf)
    np.maximum.at(highest, which, scores)
    defective = np.bincount(which, anomalous, len(names)) > 0
    return auroc(highest, defective)


def pixel_metrics(
    normal: Num[np.ndarray, "bins"],
    anomalous: Num[np.ndarray, "bins"],
    region: Num[np.ndarray, "bins"],
    regions: int,
    fpr_limit: float,
) -> dict[str, float | None]:
    """The pixel metrics of one class from the histograms of `counts.class_counts`."""
    return {
        "pixel_auroc": auroc_from_counts(normal, anomalous),
        "pixel_ap": average_precision_from_counts(normal, anomalous),
        "pixel_f1_max": f1_max_from_counts(normal, anomalous),
        "pixel_aupro": aupro_from_counts(normal, region, regions, fpr_limit=fpr_limit),
    }


def why_null(
    values: dict[str, float | None], *, n_normal: int, n_anomalous: int, has_masks: bool
) -> dict[str, str]:
    """A reason for each metric that is None, from what the class has to test on."""
    if not n_normal and not n_anomalous:
        image = pixel = "no test images"
    elif not n_anomalous:
        image = pixel = "no anomalous test images"
    else:
        image = "no normal test images"
        pixel = "no ground-truth masks"
        if has_masks:
            pixel = "the masks mark no pixel, or all of them, at this image size"
    reasons = dict.fromkeys(IMAGE_METRICS, image) | dict.fromkeys(PIXEL_METRICS, pixel)
    reasons[SAMPLE_METRIC] = image if not n_anomalous else "no part without an anomalous view"
    return {name: reasons[name] for name, value in values.items() if value is None}


def neck_v_measure(
    codes: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], seed: int
) -> float | None:
    """How well k-means on the pooled neck codes finds the classes: 1 perfectly, 0 by chance.

    As many clusters as there are classes, best of ten starts, V-measure of clusters against
    classes; None for fewer than two classes.
    """
    classes = len(np.unique(labels))
    if classes < 2:
        return None
    if not np.isfinite(codes).all():
        raise ValueError(
            "the pooled neck codes contain NaN or infinite values; the checkpoint has most likely "
            "diverged: evaluate an earlier step (--config.eval.step)."
        )
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import v_measure_score

    with warnings.catch_warnings():
        # Fewer distinct codes than classes is a result (a collapsed neck), not a mistake.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = KMeans(classes, n_init=10, random_state=seed).fit_predict(codes)
    return float(v_measure_score(labels, clusters))


def _two_sided(scores: np.ndarray, anomalous: np.ndarray) -> bool:
    """Whether there is anything to separate."""
    _raise_if_nan(scores)
    return bool(anomalous.any() and not anomalous.all())


def _raise_if_nan(scores: np.ndarray, name: str = "") -> None:
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        of_class = f" of class {name}" if name else ""
        raise ValueError(
            f"{bad} of {scores.size} scores{of_class} are NaN or infinite; the checkpoint has most "
            "likely diverged: evaluate an earlier step (--config.eval.step) or train with a lower "
            "--config.optimizer.lr."
        )


def _region_weights(mask: np.ndarray) -> tuple[np.ndarray, int]:
    from scipy import ndimage

    which, regions = ndimage.label(mask > 0, structure=_EIGHT_NEIGHBOURS)
    sizes = np.bincount(which.ravel(), minlength=regions + 1)
    per_region = np.concatenate([[0.0], 1.0 / sizes[1:]])
    return per_region[which], int(regions)


def _spread(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Histograms as the scores, labels and weights that the exact measures take."""
    normal_bins, anomalous_bins = np.flatnonzero(normal), np.flatnonzero(anomalous)
    return (
        np.concatenate([normal_bins, anomalous_bins]),
        np.repeat([False, True], [len(normal_bins), len(anomalous_bins)]),
        np.concatenate([normal[normal_bins], anomalous[anomalous_bins]]).astype(np.float64),
    )
