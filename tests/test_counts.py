import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ccl_jax.metrics import counts as counting
from ccl_jax.metrics import scores as measures

ADD = jax.jit(counting.add_scores)


def images(seed=0, number=8, size=48):
    """Smooth score maps, masks with several defects in the first half, and region weights."""
    rng = np.random.default_rng(seed)
    maps = np.stack([gaussian_filter(rng.normal(size=(size, size)), 2) for _ in range(number)])
    masks = np.zeros((number, size, size), np.uint8)
    for mask in masks[: number // 2]:
        for top, left in rng.integers(0, size - 8, (2, 2)):
            mask[top : top + 7, left : left + 5] = 1
    lift = np.stack([gaussian_filter(mask.astype(float), 2) for mask in masks])
    maps = (0.1 * np.exp(0.3 * (maps / maps.std() + 2 * lift))).astype(np.float32)
    weights, regions = zip(*map(measures.region_weights, masks), strict=True)
    return maps, masks, np.stack(weights), sum(regions)


def counted(maps, masks, weights, labels=None, classes=1, use=None):
    labels = np.zeros(len(maps), np.int32) if labels is None else np.asarray(labels, np.int32)
    use = np.ones(len(maps), bool) if use is None else np.asarray(use)
    counts = ADD(counting.empty_counts(classes), maps, masks, weights, labels, use)
    return counting.host_totals(counts)


def names(classes):
    return [f"set/class{i}" for i in range(classes)]


def same(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def test_bins_never_decrease_and_stay_in_range():
    scores = np.sort(
        np.concatenate([10.0 ** np.linspace(-30, 10, 20001), [0.0], np.eye(1).ravel()])
    )
    bins = np.asarray(counting.score_bins(jnp.asarray(scores, jnp.float32)))
    assert (np.diff(bins) >= 0).all()
    assert bins[0] == 0 and bins[-1] == counting.BINS - 1


def test_the_value_of_a_bin_lies_in_it_and_close_to_every_score_of_it():
    values = counting.bin_values()
    assert values.shape == (counting.BINS,) and (np.diff(values) > 0).all()
    bins = np.asarray(counting.score_bins(jnp.asarray(values, jnp.float32)))
    assert (bins == np.arange(counting.BINS)).all()
    scores = (10.0 ** np.linspace(-12, 3, 20001)).astype(np.float32)
    off = values[np.asarray(counting.score_bins(jnp.asarray(scores)))] / scores - 1
    fine = (scores > 2**-10) & (scores < 4)
    assert np.abs(off[fine]).max() <= 0.5 / 8192
    assert 0.25 / 1024 < np.abs(off[~fine]).max() <= 0.5 / 1024


@pytest.mark.parametrize(
    ("score", "share"), [(0.9, 8192), (0.001, 8192), (1e-5, 1024), (1e-12, 1024), (500, 1024)]
)
def test_scores_further_apart_than_the_resolution_get_different_bins(score, share):
    pair = jnp.asarray([score, score * (1 + 1.01 / share)], jnp.float32)
    first, second = np.asarray(counting.score_bins(pair))
    assert second > first


def test_slightly_negative_scores_count_as_zero():
    assert np.asarray(counting.score_bins(jnp.asarray([-6e-8, -0.0, 0.0]))).tolist() == [0, 0, 0]


def test_counts_of_two_pixels_by_hand():
    maps = np.array([[[0.5, 0.25]]], np.float32)
    masks = np.array([[[1, 0]]], np.uint8)
    normal, anomalous, region = counting.class_counts(
        counted(maps, masks, masks.astype(np.float32)), ["a"]
    )["a"]
    high, low = np.asarray(counting.score_bins(jnp.asarray([0.5, 0.25])))
    assert np.flatnonzero(normal).tolist() == [low] and normal[low] == 1
    assert np.flatnonzero(anomalous).tolist() == [high] and anomalous[high] == 1
    assert np.flatnonzero(region).tolist() == [high] and region[high] == 1.0


def test_metrics_from_counts_agree_with_exact_ones():
    maps, masks, weights, regions = images(number=16)
    y = masks.ravel() > 0
    histograms = counting.class_counts(counted(maps, masks, weights), ["a"])["a"]
    found = measures.pixel_metrics(*histograms, regions, 0.3)
    assert found["pixel_auroc"] == pytest.approx(measures.auroc(maps.ravel(), y), abs=1e-5)
    assert found["pixel_ap"] == pytest.approx(measures.average_precision(maps.ravel(), y), abs=2e-4)
    assert found["pixel_f1_max"] == pytest.approx(measures.f1_max(maps.ravel(), y), abs=2e-4)
    assert found["pixel_aupro"] == pytest.approx(
        measures.aupro(maps, masks, fpr_limit=0.3), abs=1e-4
    )


def test_classes_are_counted_apart():
    maps, masks, weights, _ = images()
    labels = np.arange(8) % 3
    found = counting.class_counts(counted(maps, masks, weights, labels, classes=4), names(4))
    for label in range(3):
        mine = labels == label
        alone = counting.class_counts(counted(maps[mine], masks[mine], weights[mine]), ["a"])["a"]
        assert same(found[f"set/class{label}"], alone)
    assert not any(x.any() for x in found["set/class3"])


def test_batching_and_order_do_not_change_a_single_count():
    maps, masks, weights, _ = images()
    labels, use = np.arange(8, dtype=np.int32) % 2, np.ones(8, bool)
    whole = ADD(counting.empty_counts(2), maps, masks, weights, labels, use)
    parts = counting.empty_counts(2)
    for batch in ([7, 0, 3], [1, 2, 6], [5, 4, 4]):
        real = np.array([True, True, batch != [5, 4, 4]])
        parts = ADD(parts, maps[batch], masks[batch], weights[batch], labels[batch], real)
    assert same(counting.host_totals(whole), counting.host_totals(parts))


def test_images_that_are_not_counted_leave_no_trace_even_with_nan():
    maps, masks, weights, _ = images()
    use = np.arange(8) < 6
    maps[6] = np.nan
    found = counted(maps, masks, weights, use=use)
    assert same(found, counted(maps[:6], masks[:6], weights[:6]))
    assert not np.asarray(found.invalid).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5])
def test_unusable_scores_raise_and_name_only_their_class(bad):
    maps, masks, weights, _ = images()
    maps[5, 3, 3] = bad
    found = counted(maps, masks, weights, np.arange(8) % 4, classes=4)
    with pytest.raises(ValueError, match=r"set/class1 \(1 maps\)") as error:
        counting.class_counts(found, names(4))
    assert "set/class0" not in str(error.value)


def test_wrong_number_of_class_names_raises():
    with pytest.raises(ValueError, match="2 class names for counts of 3 classes"):
        counting.class_counts(counting.empty_totals(3), names(2))


@pytest.mark.parametrize("size", [256, 1024])  # split into other digits by the number of pixels
def test_region_weights_stay_exact_where_a_float32_sum_drifts(size):
    mask = np.zeros(size * size, np.uint8)
    mask[:50000] = 1
    mask = mask.reshape(1, size, size)
    weights = measures.region_weights(mask[0])[0][None]
    maps = np.full((1, size, size), 0.5, np.float32)
    counts = counting.empty_counts(1)
    for _ in range(20):
        counts = ADD(counts, maps, mask, weights, np.zeros(1, np.int32), np.ones(1, bool))
    region = counting.class_counts(counting.host_totals(counts), ["a"])["a"].region
    assert region.sum() == pytest.approx(20, rel=2e-6)
    drifting = np.cumsum(np.tile(weights[weights > 0], 20), dtype=np.float32)[-1]
    assert abs(drifting - 20) > 20 * 1e-5  # what this test guards against


def test_isolated_pixels_weigh_one_each():
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[0, ::2, ::2] = 1
    weights, regions = measures.region_weights(mask[0])
    histograms = counting.class_counts(
        counted(np.full((1, 64, 64), 0.2, np.float32), mask, weights[None]), ["a"]
    )["a"]
    assert regions == 1024
    assert histograms.region.sum() == 1024.0


def test_pixel_counts_keep_growing_beyond_float32():
    maps, masks = np.full((1, 8, 8), 0.5, np.float32), np.zeros((1, 8, 8), np.uint8)
    counts = counting.empty_counts(1)
    bin_of_half = int(counting.score_bins(jnp.asarray(0.5)))
    counts = counts._replace(normal=counts.normal.at[0, bin_of_half].set(100_000_001))
    counts = ADD(
        counts, maps, masks, masks.astype(np.float32), np.zeros(1, np.int32), np.ones(1, bool)
    )
    assert counting.host_totals(counts).normal[0, bin_of_half] == 100_000_065


def test_float64_maps_are_counted_like_their_float32_values():
    maps, masks, weights, _ = images()
    with jax.enable_x64(True):
        batch = (masks, weights, np.zeros(8, np.int32), np.ones(8, bool))
        wide = ADD(counting.empty_counts(1), maps.astype(np.float64), *batch)
        assert wide.normal.dtype == jnp.int32 and wide.region[0].dtype == jnp.uint32
    assert same(counting.host_totals(wide), counted(maps, masks, weights))
