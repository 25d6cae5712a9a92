import io

import numpy as np
import pytest
from PIL import Image

from ccl_jax import baseline
from ccl_jax.data.records import Record


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def record(pixels, *, key, mask=None, anomalous=False, class_name="card"):
    encoded = None if mask is None else png(mask)
    return Record(
        image=png(pixels), dataset="d", class_name=class_name, label=0, key=key, mask=encoded,
        anomalous=anomalous,
    )  # fmt: skip


def noisy(seed, level=128):
    rng = np.random.default_rng(seed)
    return np.clip(level + rng.normal(0, 8, (32, 32, 3)), 0, 255).astype(np.uint8)


def spotted(seed, *, level=128):
    """A picture with a bright and a dark square of equal size: its mean colour is unchanged."""
    pixels, mask = noisy(seed, level), np.zeros((32, 32), np.uint8)
    pixels[4:10, 4:10], pixels[20:26, 20:26] = 188, 68
    mask[4:10, 4:10] = mask[20:26, 20:26] = 255
    return pixels, mask


def split(*, with_masks=True):
    train = [record(noisy(i), key=f"train{i}") for i in range(20)]
    test = [record(noisy(100 + i), key=f"good{i}") for i in range(12)]
    for i in range(12):
        pixels, mask = spotted(200 + i)
        test.append(
            record(pixels, key=f"bad{i}", mask=mask if with_masks else None, anomalous=True)
        )
    return train, test


def run(train, test, sigma=0.0):
    return baseline.pixel_statistics_baseline(train, test, image_size=32, sigma=sigma)


def test_spots_in_a_fixed_scene_are_found_by_pixels_and_not_by_mean_colour():
    values = run(*split(), sigma=1.0)["classes"]["d/card"]
    assert values["image_auroc"] == 1
    assert values["pixel_auroc"] > 0.95
    assert 0.2 < values["brightness_image_auroc"] < 0.8


def test_darker_images_are_found_by_mean_colour():
    train, test = split()
    dark = [record(noisy(i, level=90), key=f"dark{i}", anomalous=True) for i in range(5)]
    good = [r for r in test if not r.anomalous]
    assert run(train, good + dark)["classes"]["d/card"]["brightness_image_auroc"] == 1


def test_score_map_is_the_norm_of_deviations_over_channels():
    images = [np.full((2, 2, 3), value, np.uint8) for value in (98, 102)]
    bright, map_ = baseline._fit(images, 0.0)(np.full((2, 2, 3), 106, np.uint8))
    np.testing.assert_allclose(map_, 3 * np.sqrt(3), rtol=1e-6)  # mean 100, deviation 2
    assert bright == pytest.approx(3 * np.sqrt(3))


def test_pixel_that_never_changes_gives_a_finite_score():
    images = [np.full((2, 2, 3), 50, np.uint8)] * 2
    _, map_ = baseline._fit(images, 0.0)(np.full((2, 2, 3), 52, np.uint8))
    np.testing.assert_allclose(map_, 2 * np.sqrt(3), rtol=1e-6)


def test_class_without_masks_has_no_pixel_value():
    values = run(*split(with_masks=False))["classes"]["d/card"]
    assert values["pixel_auroc"] is None
    assert values["image_auroc"] is not None


def test_class_without_anomalies_has_no_values_and_does_not_enter_the_mean():
    train, test = split()
    only_good = [record(noisy(i), key=f"x{i}", class_name="other") for i in range(3)]
    results = run(train + only_good, test + only_good)
    assert set(results["classes"]["d/other"].values()) == {None}
    assert results["mean"] == results["classes"]["d/card"]


def test_mean_is_none_where_no_class_has_the_metric():
    train, test = split()
    results = run(train, [r for r in test if not r.anomalous])
    assert set(results["mean"].values()) == {None}


def test_tested_class_without_training_images_is_named():
    _, test = split()
    with pytest.raises(ValueError, match="d/card has test images but no training images"):
        run([], test)


def test_table_has_a_row_per_class_then_the_mean():
    values = {"image_auroc": 0.75, "pixel_auroc": None, "brightness_image_auroc": 0.5}
    lines = baseline.markdown_table({"classes": {"a": values}, "mean": values}).splitlines()
    assert lines[1:] == [
        "| :-- | --: | --: | --: |",
        "| a | 0.750 | - | 0.500 |",
        "| **mean** | 0.750 | - | 0.500 |",
    ]
