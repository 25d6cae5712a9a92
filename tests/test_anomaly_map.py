"""Score maps: by hand, against scipy and numpy, and over four devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ccl_jax import anomaly_map

score_map = functools.partial(anomaly_map.score_map, distance="cosine")


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def random_pairs(b=2):
    shapes = ((8, 8, 4), (4, 6, 8), (1, 2, 16))
    return [[random(10 * i + j, b, *s) for j, s in enumerate(shapes)] for i in range(2)]


def distances(target, rebuilt):
    target, rebuilt = np.asarray(target, np.float64), np.asarray(rebuilt, np.float64)
    norms = np.linalg.norm(target, axis=-1) * np.linalg.norm(rebuilt, axis=-1)
    return 1 - (target * rebuilt).sum(-1) / norms


def upsampled(maps, size):
    """Align-corners bilinear interpolation, an axis at a time."""
    for axis in (1, 2):
        n = maps.shape[axis]
        at = np.linspace(0, n - 1, size)
        maps = np.apply_along_axis(
            lambda row, at=at, n=n: np.interp(at, np.arange(n), row), axis, maps
        )
    return maps


def smoothed(maps, sigma):
    return np.stack([scipy.ndimage.gaussian_filter(m, sigma) for m in maps]) if sigma else maps


def test_distance_by_hand():
    target = jnp.array([[1.0, 0], [1, 0], [1, 0], [0, 0]]).reshape(1, 2, 2, 2)
    rebuilt = jnp.array([[5.0, 0], [0, 3], [-2, 0], [1, 1]]).reshape(1, 2, 2, 2)
    got = anomaly_map.cosine_distance_map(target, rebuilt)
    np.testing.assert_allclose(got.ravel(), [0, 1, 2, 1], atol=1e-6)


def test_distances_are_never_negative():
    maps = random(0, 4, 16, 16, 33)
    assert float(anomaly_map.cosine_distance_map(maps, 3 * maps).min()) >= 0


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_upsampling_matrix_interpolates_between_aligned_corners(length):
    row = np.random.default_rng(0).normal(size=length)
    want = np.interp(np.linspace(0, length - 1, 32), np.arange(length), row)
    np.testing.assert_allclose(anomaly_map.upsampling_matrix(32, length) @ row, want, atol=1e-12)


@pytest.mark.parametrize(("size", "sigma"), [(64, 4.0), (64, 0.7), (5, 4.0), (1, 2.0), (8, 0.0)])
def test_smoothing_matrix_equals_scipy_also_where_the_filter_exceeds_the_row(size, sigma):
    row = np.random.default_rng(0).normal(size=size)
    want = scipy.ndimage.gaussian_filter1d(row, sigma, mode="reflect") if sigma else row
    np.testing.assert_allclose(anomaly_map.smoothing_matrix(size, sigma) @ row, want, atol=1e-12)


@pytest.mark.parametrize("combine", ["add", "mul"])
@pytest.mark.parametrize("sigma", [0.0, 1.5, 4.0])
def test_score_map_equals_the_steps_one_by_one(combine, sigma):
    targets, rebuilt = random_pairs()
    each = [upsampled(distances(t, r), 48) for t, r in zip(targets, rebuilt, strict=True)]
    want = sum(each) / 9 if combine == "add" else np.prod(each, axis=0)
    got = score_map(targets, rebuilt, size=48, sigma=sigma, combine=combine)
    assert got.shape == (2, 48, 48)
    np.testing.assert_allclose(got, smoothed(want, sigma), atol=1e-6)


def test_three_scales_that_are_wholly_wrong_score_two_thirds():
    targets, _ = random_pairs()
    opposite = [-t for t in targets]
    added = score_map(targets, opposite, size=16, sigma=4.0, combine="add")
    np.testing.assert_allclose(added, 2 / 3, rtol=1e-5)  # 3 * 2 / 9, not / 3
    product = score_map(targets, opposite, size=16, sigma=4.0, combine="mul")
    np.testing.assert_allclose(product, 8, rtol=1e-5)


def test_scales_of_other_sizes_are_compared_as_one_vector_of_unit_parts():
    # Two scales with one position each: target (3, 0 | 0, 5), rebuilt (2, 0 | 4, 0).
    targets = [jnp.array([3.0, 0]).reshape(1, 1, 1, 2), jnp.array([0, 5.0]).reshape(1, 1, 1, 2)]
    rebuilt = [jnp.array([2.0, 0]).reshape(1, 1, 1, 2), jnp.array([4.0, 0]).reshape(1, 1, 1, 2)]
    # As unit vectors they share the first scale and not the second: cosine 1 / 2, difference √2.
    for distance, want in (("cosine", 0.5), ("l2", 2**0.5)):
        scores = anomaly_map.score_map(
            targets, rebuilt, size=4, sigma=1.0, combine="concatenate", distance=distance
        )
        np.testing.assert_allclose(scores, want, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_concatenated_scales_equal_the_steps_one_by_one(sigma):
    targets, rebuilt = random_pairs()

    def as_one(scales):
        units = [
            np.asarray(m, np.float64) / np.linalg.norm(m, axis=-1, keepdims=True) for m in scales
        ]
        each = [np.stack([upsampled(m[..., c], 8) for c in range(m.shape[-1])], -1) for m in units]
        return np.concatenate(each, -1)

    want = smoothed(upsampled(distances(as_one(targets), as_one(rebuilt)), 32), sigma)
    got = score_map(targets, rebuilt, size=32, sigma=sigma, combine="concatenate")
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_euclidean_distances_count_length_and_are_combined_alike():
    target = jnp.zeros((1, 2, 2, 2))
    rebuilt = target.at[..., 0].set(3.0).at[..., 1].set(4.0)
    pair = ([target, target], [rebuilt, 2 * rebuilt])
    for combine, want in (("add", (5 + 10) / 4), ("mul", 50)):
        scores = anomaly_map.score_map(*pair, size=4, sigma=1.0, combine=combine, distance="l2")
        np.testing.assert_allclose(scores, want, rtol=1e-5)


def test_a_perfect_copy_scores_nothing_and_one_bad_position_peaks_there():
    target = random(0, 1, 8, 8, 16)
    bad = target.at[0, 2, 5].multiply(-1)
    for copy, peak in ((target, 0.0), (bad, 2.0)):
        scores = score_map([target], [copy], size=8, sigma=0.0, combine="add")
        np.testing.assert_allclose(scores.max(), peak, atol=1e-5)
    assert divmod(int(scores.argmax()), 8) == (2, 5)


@pytest.mark.parametrize("combine", ["add", "mul", "concatenate"])
def test_score_maps_need_not_be_square(combine):
    """Of a map that varies along one direction only, the other side does not matter."""
    settings = {"sigma": 2.0, "combine": combine, "distance": "cosine"}
    rng = np.random.default_rng(0)
    lines = [rng.normal(size=(2, 1, 8, 5)), rng.normal(size=(2, 1, 4, 6))]
    pair = [[jnp.asarray(np.repeat(x + i, 6, 1)) for x in lines] for i in (0, 1)]
    square = anomaly_map.score_map(*pair, size=32, **settings)
    wide = anomaly_map.score_map(*pair, size=(20, 32), **settings)
    assert wide.shape == (2, 20, 32)
    np.testing.assert_allclose(wide, square[:, :20], atol=1e-5)


def test_score_map_refuses_what_it_does_not_know():
    targets, rebuilt = random_pairs()
    with pytest.raises(ValueError, match=r'config.eval.combine="max" .*--config.eval.combine=add'):
        score_map(targets, rebuilt, size=8, sigma=0.0, combine="max")
    with pytest.raises(ValueError, match=r'eval.distance="l1" .*--config.eval.distance=cosine'):
        score_map(targets, rebuilt, size=8, sigma=0.0, combine="add", distance="l1")
    with pytest.raises(ValueError, match=r"smoothing_sigma=-1.0 .*--config.eval.smoothing_sigma="):
        score_map(targets, rebuilt, size=8, sigma=-1.0, combine="add")
    with pytest.raises(ValueError, match="zip"):
        score_map(targets, rebuilt[:2], size=8, sigma=0.0, combine="add")


def test_image_score_by_hand():
    maps = jnp.array([[[0.0, 1, 2], [3, 4, 5], [6, 7, 9]], [[8, 0, 0], [0, 0, 0], [0, 1, 1]]])
    np.testing.assert_array_equal(anomaly_map.image_score(maps), [9, 8])
    np.testing.assert_allclose(anomaly_map.image_score(maps, pool=2), [25 / 4, 2])
    np.testing.assert_allclose(anomaly_map.image_score(maps, pool=3), [37 / 9, 10 / 9], rtol=1e-6)


@pytest.mark.parametrize("pool", [0, 4])
def test_a_pool_that_does_not_fit_is_refused_with_a_fix(pool):
    with pytest.raises(ValueError, match=rf"config.eval.pool={pool} .*--config.eval.pool=1"):
        anomaly_map.image_score(jnp.zeros((1, 3, 5)), pool=pool)


def test_bfloat16_maps_are_scored_in_float32_and_float64_in_float64():
    targets, rebuilt = random_pairs()
    low = [[m.astype(jnp.bfloat16) for m in maps] for maps in (targets, rebuilt)]
    assert score_map(*low, size=8, sigma=1.0, combine="mul").dtype == jnp.float32
    with jax.enable_x64(True):
        high = [[jnp.asarray(m, jnp.float64) for m in maps] for maps in (targets, rebuilt)]
        scores = score_map(*high, size=24, sigma=1.0, combine="add")
        assert scores.dtype == jnp.float64
        each = [upsampled(distances(t, r), 24) for t, r in zip(*high, strict=True)]
        np.testing.assert_allclose(scores, smoothed(sum(each) / 9, 1), rtol=1e-12)


def test_four_devices_give_the_scores_of_one():
    def scores(targets, rebuilt):
        maps = score_map(targets, rebuilt, size=16, sigma=2.0, combine="add")
        return maps, anomaly_map.image_score(maps, pool=4)

    pairs = random_pairs(8)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    got = jax.jit(scores)(*jax.device_put(pairs, split))
    for value, want in zip(got, jax.jit(scores)(*pairs), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5)
        assert value.sharding.is_equivalent_to(split, value.ndim)
