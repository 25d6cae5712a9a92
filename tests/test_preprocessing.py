"""The clean image and its mask on their way to the network, by hand and by Pillow's arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax.augment import normalize, to_unit
from ccl_jax.data.records import Record, read_image, read_mask
from tests.reference.torch_augment import resize_8_bits
from tests.reference.views import png


def resized_mask(pixels, size):
    """What becomes of a mask with these grey values."""
    image = png(np.zeros((*np.shape(pixels), 3)))
    return read_mask(Record(image, "mine", "nut", 0, "nut/1", mask=png(pixels)), size)


# --- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grays", "size", "expected"),
    [
        # Each output pixel is two wide, so the triangle reaches two pixels from its centre, at 1
        # and 3: weights 3/4 3/4 1/4 and their sum 7/4. (300 + 200) / 7 = 71.4; 820 / 7 = 117.1.
        ([0, 100, 200, 40], 2, [71, 117]),
        # Half as wide: centres at 1/4, 3/4, 5/4, 7/4 of the two pixels, whose own are 1/2 and 3/2.
        ([0, 100], 4, [0, 25, 75, 100]),
        # Three of two: centres at 1/3, 1 and 5/3; the middle one is the mean.
        ([0, 100], 3, [0, 50, 100]),
        # Two of three: reach 3/2, centres 3/4 and 9/4; weights 5/6 1/2 0 and 0 1/2 5/6 of 4/3.
        ([0, 80, 240], 2, [30, 180]),
    ],
    ids=["half", "double", "up by half", "down by a third"],
)
def test_resizing_one_direction_by_hand(grays, size, expected):
    across = np.repeat(np.array(grays)[None, :, None], 3, -1)
    picture = np.repeat(across, 3, 0)  # equal rows, so that only the columns matter
    image = read_image(png(picture), size)
    assert image.tolist() == [[[gray] * 3 for gray in expected]] * size
    turned = read_image(png(picture.swapaxes(0, 1)), size)
    assert turned.swapaxes(0, 1).tolist() == image.tolist()


def test_resizing_rounds_half_up_after_each_direction():
    """Three of 1, one of 0: across 1 and 0.5, up to 1, down 1. Rounded once, 0.75 is 1 as well.

    One of 1, three of 0: across 0.5, up to 1, and 0; down 0.5, up to 1. Rounded once, 0.25 is 0.
    """
    for pixels in ([[1, 1], [1, 0]], [[1, 0], [0, 0]]):
        image = read_image(png(np.repeat(np.array(pixels)[..., None], 3, -1)), 1)
        assert image.tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (20, 45), (19, 11), (64, 64), (32, 90)])
@pytest.mark.parametrize("size", [32, 64])
def test_resizing_equals_pillows_fixed_point_arithmetic(shape, size):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    image = read_image(png(picture), size)
    # Pillow decides by its version and the shape which direction comes first.
    orders = [resize_8_bits(picture, size, size, rows_first=first) for first in (False, True)]
    assert any(np.array_equal(image, result) for result in orders)
    assert np.abs(orders[0].astype(int) - orders[1]).max() <= 1


def test_the_clean_image_ends_with_imagenets_mean_and_deviation():
    """Level 124 of red is 0.4863 and 0.0055 deviations above the mean; 0 is 2.118 below."""
    image = read_image(png([[[124, 116, 104]] * 2] * 2), 2)
    clean = np.asarray(normalize(to_unit(jnp.asarray(image[None]))))
    assert clean.shape == (1, 2, 2, 3) and clean.dtype == np.float32
    want = [(124 / 255 - 0.485) / 0.229, (116 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(clean[0, 0, 0], want, atol=1e-6)
    np.testing.assert_allclose(clean[0, 0, 0], [0.0055, -0.0049, 0.0082], atol=5e-4)
    black = np.asarray(normalize(jnp.zeros((1, 1, 1, 3)))).ravel()
    np.testing.assert_allclose(black, [-2.118, -2.036, -1.804], atol=1e-3)


# --- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grays", "size", "expected"),
    [
        # Half of each pixel: 127.5 in numbers, but Pillow has rounded it to 128 before it is
        # compared with one half, so the borderline is a defect. Of the 8-bit values 0 ... 127
        # count as normal and 128 ... 255 as defect; no value is one half itself.
        ([1, 0], 1, [1]),
        ([0, 255], 1, [1]),
        # Weights 3/7 3/7 1/7 0 and 0 1/7 3/7 3/7, of 255.
        ([0, 9, 0, 0], 2, [0, 0]),  # 109 and 36
        ([0, 9, 9, 0], 2, [1, 1]),  # 146 and 146
        ([9, 0, 0, 9], 2, [0, 0]),  # 109 and 109
        ([9, 9, 0, 0], 2, [1, 0]),  # 219 and 36
        # Enlarged: 255, 191, 64, 0.
        ([3, 0], 4, [1, 1, 0, 0]),
    ],
)
def test_masks_by_hand(grays, size, expected):
    mask = resized_mask(np.array([grays] * 3), size)
    assert mask.dtype == np.uint8 and mask.tolist() == [expected] * size
    turned = resized_mask(np.array([grays] * 3).T, size)
    assert turned.tolist() == mask.T.tolist()


def test_the_borderline_of_a_mask_lies_between_127_and_128():
    """Enlarging 0 and 255 to many columns runs through nearly all values in between."""
    size = 512
    ramp = resize_8_bits(np.array([[0, 255]] * 2, np.uint8), size, size)
    mask = resized_mask([[0, 1]] * 2, size)
    assert {126, 127, 128, 129} <= set(ramp.ravel().tolist())
    np.testing.assert_array_equal(mask, ramp >= 128)
    np.testing.assert_array_equal(mask, ramp / 255 > 0.5)


@pytest.mark.parametrize("shape", [(70, 50), (45, 20), (30, 90)])
def test_a_mask_equals_pillows_arithmetic_and_one_half(shape):
    grays = np.random.default_rng(1).choice([0, 0, 0, 1, 100, 255], shape)
    white = np.where(grays > 0, 255, 0).astype(np.uint8)
    mask = resized_mask(grays, 32)
    orders = [resize_8_bits(white, 32, 32, rows_first=first) / 255 > 0.5 for first in (False, True)]
    assert any(np.array_equal(mask, result) for result in orders)
    assert 0.1 < mask.mean() < 0.9


def test_a_defect_smaller_than_half_a_pixel_of_the_resized_mask_is_lost():
    """One pixel of 8 x 8 is 1/16 of a pixel of 2 x 2, far below one half."""
    grays = np.zeros((8, 8))
    grays[2, 2] = 255
    assert resized_mask(grays, 2).sum() == 0
    assert resized_mask(grays, None).sum() == 1
