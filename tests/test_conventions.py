"""The conventions of published tables, worked by hand, and where they are undefined."""

import numpy as np
import pytest

from ccl_jax.metrics import conventions
from ccl_jax.metrics import scores as measures


def histogram(normal, anomalous, *, regions=1):
    """Pixels from lists of scores; the anomalous ones are shared out evenly over the regions."""
    values = np.unique([*normal, *anomalous])
    counts = [
        np.array([list(side).count(value) for value in values], float)
        for side in (normal, anomalous)
    ]
    region = counts[1] * regions / max(len(anomalous), 1)
    return measures.PixelHistogram(values, *counts, region, regions)


def two_regions():
    """A one-pixel region found at once, a border region in two parts that touch at a corner."""
    masks = np.zeros((1, 4, 5), np.uint8)
    masks[0, 1, 1] = 1
    masks[0, 0, 3:5] = masks[0, 1, 3] = 1
    masks[0, 2, 4] = 1  # touches the part above only at a corner
    maps = np.zeros((1, 4, 5))
    maps[0, 1, 1] = 4.0
    maps[0, 0, 3:5] = 2.0
    maps[0, 3, 0] = 3.0  # one of 15 normal pixels, above the second region
    return maps, masks


def test_strips_by_hand_and_why_a_perfect_map_has_no_perfect_ap():
    pixels = histogram([0.0, 0.25], [0.5, 1.0])
    found = conventions.adeval_pixels(pixels, strips=2)
    # Thresholds 1, 0.5, 0 find 1, 3 and 3 anomalous pixels: the one at 1.0 counts twice. There is
    # no point of recall 0, so that AP begins at recall 1/3.
    assert found == pytest.approx({"pixel_auroc": 1.0, "pixel_ap": 2 / 3, "pixel_aupro": 1.0})


def test_ties_share_a_strip_whatever_their_order_within():
    pixels = histogram([0.0, 0.6], [0.7, 0.9, 1.0])
    found = conventions.adeval_pixels(pixels, strips=2)
    # Thresholds 1, 0.5, 0: anomalous 1, 4, 4 and normal 0, 1, 2, the top one twice.
    assert found["pixel_auroc"] == pytest.approx(0.5 * (1 / 4 + 1) / 2 + 0.5 * 1)
    assert found["pixel_ap"] == pytest.approx(3 / 4 * (1 + 4 / 5) / 2)
    # Up to 0.3 the overlap rises from 1/4 to 1/4 + 3/4 * 0.6.
    assert found["pixel_aupro"] == pytest.approx(1 / 4 + 3 / 4 * 0.6 / 2)


def test_a_finer_division_tells_more_scores_apart():
    pixels = histogram([0.0, 0.6], [0.7, 0.9, 1.0])
    assert conventions.adeval_pixels(pixels, strips=50)["pixel_auroc"] == pytest.approx(1.0)


def test_strips_weigh_regions_alike_one_pixel_ones_and_those_at_the_border():
    pixels = measures.pixel_histogram(*two_regions())
    assert pixels.regions == 2 and pixels.region.tolist() == [0.25 * 2, 0.5, 0.0, 1.0]
    found = conventions.adeval_pixels(pixels, strips=4)
    # Thresholds 4 3 2 1 0: overlap 1 2 2 2.5 2.5 3 of 3, the one at 4 twice; normal 0 0+1 1 1 15.
    rates, overlap = np.array([0, 1, 1, 1, 15]) / 15, np.array([1, 2, 2.5, 2.5, 3]) / 3
    at_limit = overlap[3] + (overlap[4] - overlap[3]) * (0.3 - rates[3]) / (1 - rates[3])
    area = (overlap[0] + overlap[1]) / 2 * rates[1] + (overlap[3] + at_limit) / 2 * (0.3 - rates[3])
    assert found["pixel_aupro"] == pytest.approx(area / 0.3)


def test_threshold_steps_by_hand():
    pixels = histogram(np.arange(10.0), [5.0, 9.0])
    found = conventions.threshold_step_pixels(pixels, steps=9)
    # Above 7 and 8 lie 2 and 1 of ten normal pixels and half of the region: stretched to 0..1, a
    # line at one half. All other thresholds have rates of 0.3 and more.
    assert found["pixel_aupro"] == pytest.approx(0.5)
    # Best of the 21: above 0.95 * 9 one of each. Above 0: nine and two, IoU 2/11.
    assert found["pixel_f1_max"] == pytest.approx(0.5, abs=1e-6)
    assert found["pixel_iou_max"] == pytest.approx(1 / 3, abs=1e-6)
    # Above 0.2, 0.3, ..., 0.8 times 9 lie 8 7 6 5 4 3 2 normal and 2 2 2 2 1 1 1 anomalous pixels.
    normal, hits = np.arange(8, 1, -1), np.array([2, 2, 2, 2, 1, 1, 1])
    assert found["pixel_recall_mean"] == pytest.approx((hits / 2).mean(), abs=1e-6)
    assert found["pixel_iou_mean"] == pytest.approx((hits / (2 + normal)).mean(), abs=1e-6)
    f1 = 2 * hits / (2 + normal + hits)
    assert found["pixel_f1_mean"] == pytest.approx(f1.mean(), abs=1e-6)


def test_threshold_steps_miss_what_lies_exactly_on_the_threshold():
    # Stretched scores 0, 0.5, 1 and prediction above: at 0.5 only the last is found.
    found = conventions.threshold_step_pixels(histogram([0.0], [0.5, 1.0]), steps=2)
    assert found["pixel_recall_mean"] == pytest.approx((3 * 1 + 4 * 0.5) / 7, abs=1e-6)


UNDEFINED = {
    "constant scores": histogram([0.3] * 5, [0.3] * 2),
    "all normal": histogram([0.1, 0.2, 0.3], [], regions=0),
    "all anomalous": histogram([], [0.1, 0.2, 0.3]),
    "no pixels": histogram([], [], regions=0),
}


@pytest.mark.parametrize("case", UNDEFINED)
@pytest.mark.parametrize("name", conventions.CONVENTIONS)
def test_undefined_values_are_none_without_a_warning(name, case):
    found = conventions.pixel_metrics(name, UNDEFINED[case])
    assert len(found) >= 3 and set(found.values()) == {None}


def test_aupro_is_none_where_its_curve_begins_beyond_the_limit():
    pixels = histogram([0.0, 1.0], [0.5, 1.0])  # the highest score finds half the normal pixels
    strips = conventions.adeval_pixels(pixels, strips=50)
    assert strips["pixel_aupro"] is None and strips["pixel_auroc"] is not None
    steps = conventions.threshold_step_pixels(pixels, steps=100)
    assert steps["pixel_aupro"] is None and steps["pixel_f1_max"] > 0


def test_image_scores_in_strips_have_a_point_of_recall_zero():
    scores, anomalous = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    found = conventions.adeval_images(scores, anomalous, strips=50)
    # From (recall 0, precision 1) over (1/2, 1) to (1, 2/3) and (1, 1/2).
    assert found == pytest.approx({"image_auroc": 3.5 / 4, "image_ap": 0.5 + 0.5 * (1 + 2 / 3) / 2})


@pytest.mark.parametrize(
    ("scores", "anomalous"),
    [([0.5, 0.5], [False, True]), ([0.1, 0.2], [False, False]), ([0.1, 0.2], [True, True])],
)
def test_image_scores_that_say_nothing_are_none(scores, anomalous):
    found = conventions.adeval_images(np.array(scores), np.array(anomalous), strips=50)
    assert found == {"image_auroc": None, "image_ap": None}


@pytest.mark.parametrize("name", conventions.CONVENTIONS)
def test_empty_bins_and_another_unit_of_the_scores_change_nothing(name):
    rng = np.random.default_rng(0)
    pixels = histogram(rng.normal(size=200).round(1), (rng.normal(size=60) + 1).round(1), regions=3)
    expected = conventions.pixel_metrics(name, pixels)
    assert None not in expected.values()
    arrays = pixels[1:4]
    spread = [np.stack([x, np.zeros_like(x)], -1).ravel() for x in arrays]
    values = np.stack([pixels.values, pixels.values + 0.01], -1).ravel()
    with_gaps = measures.PixelHistogram(values, *spread, pixels.regions)
    assert conventions.pixel_metrics(name, with_gaps) == expected
    doubled = pixels._replace(values=2 * pixels.values)
    assert conventions.pixel_metrics(name, doubled) == expected


def test_the_summary_averages_over_the_classes_that_have_a_value():
    classes = {
        "set/a": histogram([0.0, 0.25], [0.5, 1.0]),
        "set/b": histogram([0.0, 0.6], [0.7, 0.9, 1.0]),
        "set/c": histogram([0.1, 0.2], [], regions=0),
    }
    found = conventions.summarize("adeval_50", classes)
    values = [found["classes"][name]["pixel_ap"] for name in classes]
    assert values[2] is None and found["mean"]["pixel_ap"] == pytest.approx(sum(values[:2]) / 2)
    assert "50 equal strips" in found["description"] and "counts" in found["description"]
    nothing = conventions.summarize("threshold_step", {"set/c": classes["set/c"]})
    assert set(nothing["mean"].values()) == {None}


def test_an_unknown_convention_is_refused_with_a_fix():
    pixels = histogram([0.0], [1.0])
    with pytest.raises(ValueError, match=r'"adeval".*--config\.eval\.published_metrics='):
        conventions.pixel_metrics("adeval", pixels)
