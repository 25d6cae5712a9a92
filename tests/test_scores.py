import itertools

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ccl_jax.metrics import scores as measures


def slow_aupro(maps, masks, limit):
    """AUPRO threshold by threshold and region by region, flood-filling regions by hand."""
    regions = []
    for i, mask in enumerate(masks):
        left = set(zip(*np.nonzero(mask), strict=True))
        while left:
            region, edge = set(), [left.pop()]
            while edge:
                y, x = edge.pop()
                region.add((y, x))
                near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
                left -= near
                edge += near
            regions.append((i, np.array(list(region))))
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        hit = maps >= threshold
        shares = [hit[i, at[:, 0], at[:, 1]].mean() for i, at in regions]
        points.append((hit[masks == 0].mean(), float(np.mean(shares))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def smooth(seed, shape=(4, 24, 24)):
    rng = np.random.default_rng(seed)
    masks = np.zeros(shape, np.uint8)
    masks[0, 2:7, 3:12] = 1
    masks[0, 7, 12] = 1  # touches the first only at a corner
    masks[1, 0:4, 20:24] = 1  # in the corner of the picture
    masks[1, 15, 15] = 1  # one pixel
    noise = np.stack([gaussian_filter(rng.normal(size=shape[1:]), 1.5) for _ in masks])
    return noise / noise.std() + 1.5 * masks + 10, masks


def test_auroc_ap_and_f1_by_hand_with_a_tie():
    scores = np.array([0.1, 0.4, 0.4, 0.8])
    anomalous = np.array([False, False, True, True])
    assert measures.auroc(scores, anomalous) == pytest.approx(3.5 / 4)
    # At 0.8: precision 1, recall 1/2. At 0.4: precision 2/3, recall 1.
    assert measures.average_precision(scores, anomalous) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert measures.f1_max(scores, anomalous) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))


def test_constant_scores_say_nothing():
    scores, anomalous = np.full(8, 0.3), np.arange(8) < 2
    assert measures.auroc(scores, anomalous) == 0.5
    assert measures.average_precision(scores, anomalous) == 0.25
    assert measures.f1_max(scores, anomalous) == pytest.approx(0.4)


def test_constant_maps_have_half_the_limit_as_aupro():
    maps, masks = np.full((2, 4, 4), 0.7), np.zeros((2, 4, 4), np.uint8)
    masks[0, 0, 0] = 1
    assert measures.aupro(maps, masks, fpr_limit=0.3) == pytest.approx(0.15)


def test_perfect_and_reversed_scores():
    scores, anomalous = np.arange(6.0), np.arange(6) >= 3
    assert measures.auroc(scores, anomalous) == measures.average_precision(scores, anomalous) == 1.0
    assert measures.f1_max(scores, anomalous) == 1.0
    assert measures.auroc(-scores, anomalous) == 0.0


@pytest.mark.parametrize("anomalous", [np.zeros(5, bool), np.ones(5, bool), np.zeros(0, bool)])
def test_one_sided_classes_have_no_metrics(anomalous):
    values = measures.image_metrics(np.arange(len(anomalous)) / 5, anomalous)
    assert values == dict.fromkeys(measures.IMAGE_METRICS)
    pixels = np.bincount(anomalous.astype(int), minlength=2).astype(float)
    normal, found = np.array([0, pixels[0]]), np.array([pixels[1], 0])
    values = measures.pixel_metrics(
        normal, found, found / max(pixels[1], 1), int(anomalous.any()), 0.3
    )
    assert values == dict.fromkeys(measures.PIXEL_METRICS)


def test_large_regions_weigh_as_much_as_small_ones():
    maps, masks = np.zeros((1, 10, 10)), np.zeros((1, 10, 10), np.uint8)
    masks[0, :, :5] = 1
    masks[0, 5, 8] = 1
    maps[0, 5, 8] = 1.0  # finds the one-pixel region without a false positive, misses the other
    # From (0, 1/2) straight to (1, 1): at 0.3 the overlap is 0.65.
    assert measures.aupro(maps, masks, fpr_limit=0.3) == pytest.approx((0.5 + 0.65) / 2)


def test_a_region_at_the_border_and_one_that_holds_on_by_a_corner_count_once_each():
    masks = np.zeros((1, 4, 5), np.uint8)
    masks[0, 0, 3:5] = masks[0, 1, 3] = 1
    masks[0, 2, 4] = 1  # touches the three above only at a corner
    masks[0, 3, 0] = 1  # one pixel, in the corner of the picture
    maps = np.where(masks > 0, 0.5, 0.0)
    maps[0, 3, 0] = 0.9
    maps[0, 2, 4] = 0.0  # the last quarter of the first region is missed
    # Found without a false positive: 1 and 3/4. From there a line to (1, 1): 0.875 + 0.125 * x.
    assert measures.aupro(maps, masks, fpr_limit=0.3) == pytest.approx(0.875 + 0.125 * 0.15)


@pytest.mark.parametrize("filled", [0, 1])
def test_maps_without_anomalous_or_without_normal_pixels_have_no_metrics(filled):
    maps, masks = smooth(seed=1)
    pixels = measures.pixel_histogram(maps, np.full_like(masks, filled))
    assert pixels.regions == filled * len(maps)
    found = measures.pixel_metrics(*pixels[1:], 0.3)
    assert found == dict.fromkeys(measures.PIXEL_METRICS)


def test_thresholds_above_each_other_at_the_limit_add_no_area():
    # One of four normal pixels lies on top: false positives 0.25 while the region is found.
    maps = np.array([[[9.0, 8.0, 7.0, 1.0, 1.0, 1.0]]])
    masks = np.array([[[0, 1, 1, 0, 0, 0]]], np.uint8)
    assert measures.aupro(maps, masks, fpr_limit=0.25) == 0.0
    assert measures.aupro(maps, masks, fpr_limit=1.0) == pytest.approx(0.75)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("digits", [1, 12])
def test_aupro_equals_its_slow_twin(limit, digits):
    maps, masks = smooth(seed=3)
    maps = np.round(maps, digits)
    expected = slow_aupro(maps, masks, limit)
    assert measures.aupro(maps, masks, fpr_limit=limit) == pytest.approx(expected, abs=1e-12)


def test_histograms_with_a_bin_per_score_give_the_exact_metrics():
    maps, masks = smooth(seed=5)
    maps = np.round(maps, 1)
    y, (distinct, which) = masks.ravel() > 0, np.unique(maps, return_inverse=True)
    normal, anomalous = (np.bincount(which.ravel(), side, len(distinct)) for side in (~y, y))
    assert measures.auroc_from_counts(normal, anomalous) == pytest.approx(
        measures.auroc(maps.ravel(), y)
    )
    assert measures.average_precision_from_counts(normal, anomalous) == pytest.approx(
        measures.average_precision(maps.ravel(), y)
    )
    assert measures.f1_max_from_counts(normal, anomalous) == pytest.approx(
        measures.f1_max(maps.ravel(), y)
    )


def test_any_increasing_function_of_the_scores_gives_the_same_metrics():
    maps, masks = smooth(seed=7)
    y, bent = masks.ravel() > 0, np.exp(maps / 3)
    for measure in (measures.auroc, measures.average_precision, measures.f1_max):
        assert measure(bent.ravel(), y) == pytest.approx(measure(maps.ravel(), y), abs=1e-12)
    assert measures.aupro(bent, masks, fpr_limit=0.3) == pytest.approx(
        measures.aupro(maps, masks, fpr_limit=0.3), abs=1e-12
    )


def test_region_weights_join_diagonals_and_give_each_region_one():
    mask = np.zeros((6, 6), np.uint8)
    mask[0, 0] = mask[1, 1] = 255  # one region, at the border, by a diagonal
    mask[5, 2:6] = 1
    mask[3, 4] = 1  # one pixel, one row away from the last
    weights, regions = measures.region_weights(mask)
    assert regions == 3 and weights.dtype == np.float32
    assert weights[0, 0] == weights[1, 1] == 0.5
    assert weights[5, 2] == 0.25 and weights[3, 4] == 1.0
    assert weights.sum() == 3.0 and not weights[mask == 0].any()


def test_empty_and_full_masks_have_no_and_one_region():
    assert measures.region_weights(np.zeros((4, 5), np.uint8))[1] == 0
    weights, regions = measures.region_weights(np.ones((4, 5), np.uint8))
    assert regions == 1 and weights.sum() == pytest.approx(1)


def test_a_part_is_as_anomalous_as_its_highest_view():
    scores = np.array([0.1, 0.9, 0.8, 0.2, 0.3, 0.5])
    anomalous = np.array([False, True, False, False, False, True])
    samples = ["a", "a", "b", "b", "c", "d"]  # highest 0.9, 0.8, 0.3, 0.5; a and d are defective
    assert measures.sample_auroc(scores, anomalous, samples) == 0.75
    assert measures.auroc(scores, anomalous) == 0.875
    assert measures.sample_auroc(scores[:2], anomalous[:2], samples[:2]) is None
    assert measures.sample_auroc(scores, anomalous, list("abcdef")) == 0.875


def test_nan_scores_raise_and_name_the_class():
    scores = np.array([0.1, np.nan, 0.3])
    anomalous = np.array([True, False, False])
    with pytest.raises(ValueError, match="1 of 3 scores of class wood are NaN"):
        measures.image_metrics(scores, anomalous, name="wood")
    with pytest.raises(ValueError, match="NaN"):
        measures.auroc(scores, anomalous)
    with pytest.raises(ValueError, match="NaN"):
        measures.aupro(np.full((1, 2, 2), np.nan), np.eye(2, dtype=np.uint8)[None], fpr_limit=0.3)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.5])
def test_an_impossible_limit_raises(limit):
    with pytest.raises(ValueError, match=r"config\.eval\.aupro_fpr_limit"):
        measures.aupro_from_counts(np.ones(3), np.ones(3) / 3, 1, fpr_limit=limit)


def test_regions_of_other_images_are_noticed():
    with pytest.raises(ValueError, match="add up to 1, but there are 2 regions"):
        measures.aupro_from_counts(np.ones(3), np.ones(3) / 3, 2, fpr_limit=0.3)


@pytest.mark.parametrize(
    ("n_normal", "n_anomalous", "has_masks", "image", "pixel"),
    [
        (0, 0, False, "no test images", "no test images"),
        (5, 0, True, "no anomalous test images", "no anomalous test images"),
        (0, 5, False, "no normal test images", "no ground-truth masks"),
        (5, 5, True, None, "the masks mark no pixel, or all of them, at this image size"),
    ],
)
def test_every_null_gets_the_reason_that_applies(n_normal, n_anomalous, has_masks, image, pixel):
    values = dict.fromkeys(measures.PIXEL_METRICS)
    values |= dict.fromkeys(measures.IMAGE_METRICS, None if image else 0.9)
    reasons = measures.why_null(
        values, n_normal=n_normal, n_anomalous=n_anomalous, has_masks=has_masks
    )
    expected = dict.fromkeys(measures.PIXEL_METRICS, pixel)
    assert reasons == expected | (dict.fromkeys(measures.IMAGE_METRICS, image) if image else {})


def test_v_measure_is_one_for_separate_classes_and_small_for_mixed_ones():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 20)
    noise = rng.normal(size=(80, 6))
    apart = noise * 0.1 + 10 * np.eye(6)[labels]
    assert measures.neck_v_measure(apart, labels, seed=0) == pytest.approx(1.0)
    assert measures.neck_v_measure(noise, labels, seed=0) < 0.3


def test_v_measure_of_collapsed_codes_is_zero_and_of_one_class_undefined():
    labels = np.repeat([0, 1], 5)
    assert measures.neck_v_measure(np.ones((10, 3)), labels, seed=0) == 0.0
    assert measures.neck_v_measure(np.ones((10, 3)), np.zeros(10, int), seed=0) is None
    with pytest.raises(ValueError, match="neck codes contain NaN"):
        measures.neck_v_measure(np.full((10, 3), np.nan), labels, seed=0)
