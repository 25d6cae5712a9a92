"""Score maps and metrics on the inputs of a golden, and how far each is from what was recorded.

Each function returns {recorded quantity: largest absolute difference}. The rules are looked up by
the name of the quantity, numbers in it (pool16, max_step200) included; an unknown one raises.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ccl_jax import anomaly_map
from ccl_jax.metrics import conventions, counts
from ccl_jax.metrics import scores as measures
from tests.reference.goldens import Golden, channels_last

DISTANCES_OF_MAPS = {"l2": "l2", "": "cosine"}
COMBINATIONS = {"add": "add", "mul": "mul", "uni": "concatenate"}

# Recorded name of a pixel metric -> the same in the threshold-step convention.
OF_THRESHOLDS = {
    "mF1_max_px": "pixel_f1_max",
    "mIoU_max_px": "pixel_iou_max",
    "mF1_px_0.2_0.8_0.1": "pixel_f1_mean",
    "mIoU_px_0.2_0.8_0.1": "pixel_iou_mean",
    "mAcc_px_0.2_0.8_0.1": "pixel_recall_mean",
}
OF_STRIPS = {"mAUROC_px": "pixel_auroc", "mAP_px": "pixel_ap", "mAUPRO_px": "pixel_aupro"}
OF_IMAGES = {"mAUROC_sp": "image_auroc", "mAP_sp": "image_ap", "mF1_max_sp": "image_f1_max"}


def map_differences(name: str, *, f64: bool) -> dict[str, float]:
    """Every score map of an `anomaly_map*` golden, in float32 or in float64."""
    golden = Golden(name)
    dtype = np.float64 if f64 else np.float32
    number = sum(key.startswith("ft") for key in golden.arrays)
    pair = [
        [channels_last(golden[f"f{side}{i}"]).astype(dtype) for i in range(number)] for side in "ts"
    ]
    size = tuple(golden.meta["out_size"])
    keys = [key for key in golden.meta["arrays"] if re.match("amap|scale_map", key)]
    found = {}
    with jax.enable_x64(f64):
        for key in keys:
            maps = np.asarray(recorded_map(key, *pair, size=size))
            want, got = golden.recorded(key, maps, f64=f64)
            found[key] = float(np.abs(want - got).max())
    return found


def recorded_map(key: str, targets: list, rebuilt: list, *, size: tuple[int, int]) -> jax.Array:
    """The score map that a key such as `amap_add_l2_s0` or `scale_map1` stands for."""
    if found := re.fullmatch(r"scale_map(\d)", key):
        scale = slice(int(found[1]), int(found[1]) + 1)
        targets, rebuilt, mode, distance, sigma = targets[scale], rebuilt[scale], "add", "", 0.0
    else:
        found = re.fullmatch(r"amap_(add|mul|uni)_?(l2|)_s([\d.]+)", key)
        if not found:
            raise ValueError(f"no rule for the score map {key}")
        mode, distance, sigma = found[1], found[2], float(found[3])
    return anomaly_map.score_map(
        [jnp.asarray(m) for m in targets],
        [jnp.asarray(m) for m in rebuilt],
        size=size,
        sigma=sigma,
        combine=COMBINATIONS[mode],
        distance=DISTANCES_OF_MAPS[distance],
    )


def metric_differences(name: str, *, from_counts: bool) -> dict[str, float]:
    """Every value of a `metrics_*` golden; pixel metrics also from streaming counts."""
    golden = Golden(name)
    maps, masks = golden["maps"].astype(np.float64), golden["masks"]
    values = {key[6:]: float(v) for key, v in golden.arrays.items() if key.startswith("value/")}
    pixels = (pixels_by_counts if from_counts else measures.pixel_histogram)(maps, masks)
    if from_counts:
        values = {key: value for key, value in values.items() if is_of_pixels(key)}
    found = {}
    for key, value in values.items():
        ours = pixel_value(key, pixels) if is_of_pixels(key) else image_value(key, maps, masks)
        if ours is None:
            raise ValueError(f"{name}/{key} is undefined here, recorded is {value}")
        found[key] = abs(ours - value)
    return found


def pixels_by_counts(maps: np.ndarray, masks: np.ndarray) -> measures.PixelHistogram:
    """The histogram as an evaluation knows it: streamed in float32, a score only by its bin."""
    weights, regions = zip(*map(measures.region_weights, masks), strict=True)
    number = len(maps)
    counted = jax.jit(counts.add_scores)(
        counts.empty_counts(1),
        maps.astype(np.float32),
        masks,
        np.stack(weights),
        np.zeros(number, np.int32),
        np.ones(number, bool),
    )
    one = counts.class_counts(counts.host_totals(counted), ["one"])["one"]
    return measures.PixelHistogram(counts.bin_values(), *one, regions=sum(regions))


def is_of_pixels(key: str) -> bool:
    """Whether a recorded value is one of pixels."""
    return "_px" in key or key.startswith("AUPRO_exact")


def pixel_value(key: str, pixels: measures.PixelHistogram) -> float | None:
    """Our value of a recorded pixel metric such as `mAUPRO_px/max_step100`."""
    name, _, variant = key.partition("/")
    if found := re.fullmatch(r"AUPRO_exact_fpr([\d.]+)", key):
        return measures.aupro_from_counts(
            pixels.normal, pixels.region, pixels.regions, fpr_limit=float(found[1])
        )
    if variant.startswith("adeval_nstrips"):
        strips = int(variant.removeprefix("adeval_nstrips"))
        return conventions.adeval_pixels(pixels, strips=strips)[OF_STRIPS[name]]
    if variant.startswith("max_step") and name == "mAUPRO_px":
        steps = int(variant.removeprefix("max_step"))
        return conventions.threshold_step_pixels(pixels, steps=steps)["pixel_aupro"]
    if not variant and name in OF_THRESHOLDS:
        return conventions.threshold_step_pixels(pixels, steps=100)[OF_THRESHOLDS[name]]
    exact: dict[str, Callable] = {
        "mAUROC_px": measures.auroc_from_counts,
        "mAP_px": measures.average_precision_from_counts,
    }
    return exact[key](pixels.normal, pixels.anomalous)


def image_value(key: str, maps: np.ndarray, masks: np.ndarray) -> float | None:
    """Our value of a recorded image metric such as `mAUROC_sp_max/pool16`."""
    anomalous = masks.any(axis=(1, 2))
    if found := re.fullmatch(r"(image_auroc|image_ap)/adeval_nstrips(\d+)", key):
        scores = maps.max(axis=(1, 2))
        return conventions.adeval_images(scores, anomalous, strips=int(found[2]))[found[1]]
    found = re.fullmatch(r"(\w+_sp)_(max|mean)/pool(none|\d+)", key)
    if not found:
        raise ValueError(f"no rule for the metric {key}")
    metric, kind, pool = found[1], found[2], 1 if found[3] == "none" else int(found[3])
    if kind == "max":
        with jax.enable_x64(True):
            scores = np.asarray(anomaly_map.image_score(jnp.asarray(maps), pool=pool))
    else:  # nobody reports it, so that it exists only here
        windows = np.lib.stride_tricks.sliding_window_view(maps, (pool, pool), axis=(1, 2))
        scores = windows.mean(axis=(3, 4)).mean(axis=(1, 2))
    return measures.image_metrics(scores, anomalous)[OF_IMAGES[metric]]


if __name__ == "__main__":
    from tests.reference.goldens import names

    for golden in names("anomaly_map*"):
        for f64 in (False, True):
            for key, value in map_differences(golden, f64=f64).items():
                print(f"{golden:16} {'float64' if f64 else 'float32'} {key:28} {value:.1e}")
    for golden in names("metrics_*"):
        for from_counts in (False, True):
            for key, value in metric_differences(golden, from_counts=from_counts).items():
                print(f"{golden:16} {'counts ' if from_counts else 'arrays '} {key:28} {value:.1e}")
