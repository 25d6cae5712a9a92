"""The second view against an independent statement of torchvision's formulas, and by hand."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ccl_jax import augment
from tests.reference.torch_augment import (
    View,
    float_view,
    plain_view,
    resize,
    resize_8_bits,
    rounding_bound,
    view_of_8_bits,
)
from tests.reference.views import NO_BLUR, PUBLISHED, any_view, ours, picture

ORDERS = list(itertools.permutations(range(4)))
THREE_TAPS = dataclasses.replace(PUBLISHED, blur_kernel=3)


@pytest.mark.parametrize("shape", [(24, 36), (33, 24), (28, 28)])
def test_every_order_of_any_view_equals_the_formulas(shape):
    for seed, order in enumerate(ORDERS):
        image, view = picture(*shape, seed) / 255, any_view(seed, *shape, order)
        want = float_view(image, view, PUBLISHED.blur_kernel)
        with jax.enable_x64(True):
            exact = ours(image, view, dtype=jnp.float64)
        # Both are float64 and sum in another order: 3e-15 measured.
        np.testing.assert_allclose(exact, want, rtol=0, atol=1e-13, err_msg=str(view))
        single = ours(image, view)
        # 6e-7 measured, some float32 roundings of numbers up to 1. A position that lies on the
        # edge between two pixels may be rotated to the other one: none did.
        near = np.abs(single - want).max(-1) < 5e-6
        assert near.mean() > 0.99, view


def test_published_views_differ_from_pillows_by_its_rounding_alone():
    """The reference rounds to 8 bits after each step; what that explains, for each single view."""
    height, width, draws = 40, 56, 60
    keys = jax.random.split(jax.random.key(3), draws)
    draw = jax.jit(lambda key: augment.sample_parameters(key, PUBLISHED, height, width))
    shifts, sizes = [], []
    for seed, key in enumerate(keys):
        drawn = View(*(np.asarray(value).tolist() for value in draw(key)))
        image = picture(height, width, seed)
        straight = drawn._replace(angle=0.0)  # bounds each pixel; the next lines turn it as well
        rounded = view_of_8_bits(Image.fromarray(image), straight, (height, width), 23)
        difference = 255 * ours(image / 255, straight) - rounded
        assert np.abs(difference).max() <= rounding_bound(drawn), drawn
        rounded = view_of_8_bits(Image.fromarray(image), drawn, (height, width), 23)
        turned = np.abs(255 * ours(image / 255, drawn) - rounded).max(-1)
        # Pillow rotates in 16-bit fixed point: at most 1 pixel of 2240 was seen to fall apart.
        assert (turned > rounding_bound(drawn)).mean() < 0.005, drawn
        shifts.append(difference.mean())
        sizes.append(np.abs(difference).mean())
    # Each of three blends truncates, which darkens by half a level on average, and so does hue
    # a little: 1.37 levels on average and 1.9 in the worst of 400 views.
    assert 1.0 < np.mean(shifts) < 1.7
    assert np.mean(sizes) < 1.6 and max(sizes) < 2.5


@pytest.mark.parametrize(
    ("source", "out"),
    [((40, 56), (30, 70)), ((70, 50), (32, 32)), ((13, 300), (7, 9)), ((20, 20), (20, 31))],
)
def test_the_references_resize_is_pillows(source, out):
    image = np.random.default_rng(0).integers(0, 256, (*source, 3)).astype(np.uint8)
    pillow = np.asarray(Image.fromarray(image).resize(out[::-1], Image.Resampling.BILINEAR))
    orders = [resize_8_bits(image, *out, rows_first=first) for first in (False, True)]
    assert any(np.array_equal(pillow, result) for result in orders)
    # Half a level from each rounding, and what 22 bits leave.
    assert np.abs(resize(image.astype(float), *out) - pillow).max() <= 1.0001


# --- by hand -----------------------------------------------------------------------------------


def row(*grays):
    """One row of grey pixels."""
    return np.repeat(np.array(grays, float)[None, :, None], 3, -1)


def view_of(image, recipe=NO_BLUR, **changes):
    return ours(image, plain_view(*image.shape[:2])._replace(**changes), recipe)


def test_crop_by_hand():
    """Columns 1 and 2 on four pixels: centres at 1.25, 1.75, 2.25 and 2.75 columns."""
    view = view_of(row(0.9, 0.0, 0.4, 0.7), left=1, width=2)
    np.testing.assert_allclose(view, row(0.0, 0.1, 0.3, 0.4), atol=1e-6)


def test_flips_by_hand():
    image = np.repeat(np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])[..., None], 3, -1)
    mirrored = view_of(image, flip_horizontal=True)[..., 0]
    np.testing.assert_allclose(mirrored, [[0.3, 0.2, 0.1], [0.6, 0.5, 0.4]], atol=1e-6)
    over = view_of(image, flip_vertical=True)[..., 0]
    np.testing.assert_allclose(over, [[0.4, 0.5, 0.6], [0.1, 0.2, 0.3]], atol=1e-6)


def test_brightness_multiplies_and_is_cut_at_white():
    view = view_of(row(0.2, 0.6, 0.8), brightness=1.5)
    np.testing.assert_allclose(view, row(0.3, 0.9, 1.0), atol=1e-6)


def test_contrast_moves_away_from_the_mean_gray():
    """The mean is 0.4; a factor of a half halves the distance to it."""
    view = view_of(row(0.2, 0.6), contrast=0.5)
    np.testing.assert_allclose(view, row(0.3, 0.5), atol=1e-6)


def test_contrast_and_saturation_weigh_the_colours():
    """Red has the luma 0.299, so a factor of a half leaves 0.5 + 0.1495, 0.1495, 0.1495."""
    red = np.array([[[1.0, 0.0, 0.0]]])
    for kind in ("contrast", "saturation"):
        view = view_of(red, **{kind: 0.5})
        np.testing.assert_allclose(view, [[[0.6495, 0.1495, 0.1495]]], atol=1e-6)


def test_hue_turns_red_to_orange_green_and_blue():
    red = np.array([[[1.0, 0.0, 0.0]]])
    for turns, colour in ((1 / 12, (1, 0.5, 0)), (1 / 3, (0, 1, 0)), (-1 / 3, (0, 0, 1))):
        np.testing.assert_allclose(view_of(red, hue=turns), [[colour]], atol=1e-6)


def test_hue_keeps_the_largest_and_the_smallest_channel():
    """(0.8, 0.5, 0.2) is orange, a half sixth from red; a sixth more is a half sixth from green."""
    view = view_of(np.array([[[0.8, 0.5, 0.2]]]), hue=1 / 6)
    np.testing.assert_allclose(view, [[[0.5, 0.8, 0.2]]], atol=1e-6)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([0, 1, 2, 3], (0.9, 0.7)),  # 1.5 times: 1.2 cut to 1, and 0.6; half way to their mean 0.8
        ([1, 0, 2, 3], (1.0, 0.75)),  # half way to the mean 0.6: 0.7, 0.5; 1.5 times, 1.05 cut
    ],
)
def test_the_order_of_brightness_and_contrast_by_hand(order, expected):
    view = view_of(row(0.8, 0.4), order=order, brightness=1.5, contrast=0.5)
    np.testing.assert_allclose(view, row(*expected), atol=1e-6)


def test_gray_by_hand():
    view = view_of(np.array([[[1.0, 0.5, 0.0]]]), grayscale=True)
    np.testing.assert_allclose(view, [[[0.5925] * 3]], atol=1e-6)  # 0.299 + 0.587 / 2


def test_blur_by_hand():
    """At this sigma a neighbour weighs half of the centre: 1/4, 1/2, 1/4, in both directions.

    Mirrored about the border pixel, the corner sees its one neighbour twice.
    """
    image = np.zeros((3, 4, 3))
    image[0, 1] = 1.0
    view = view_of(image, THREE_TAPS, sigma=1 / math.sqrt(2 * math.log(2)))[..., 0]
    across, down = np.array([1 / 2, 1 / 2, 1 / 4, 0]), np.array([1 / 2, 1 / 4, 0])
    np.testing.assert_allclose(view, np.outer(down, across), atol=1e-6)


def test_rotation_by_hand():
    image = np.arange(1, 10).reshape(3, 3, 1).repeat(3, -1) / 10
    turned = 10 * view_of(image, angle=90.0)[..., 0]
    np.testing.assert_allclose(turned, [[3, 6, 9], [2, 5, 8], [1, 4, 7]], atol=1e-5)


def test_rotation_by_hand_keeps_the_frame_and_fills_with_black():
    """Rows 1 2 3 4 and 5 6 7 8 turned about their middle; what stands out is cut off."""
    image = np.arange(1, 9).reshape(2, 4, 1).repeat(3, -1) / 10
    turned = 10 * view_of(image, angle=90.0)[..., 0]
    np.testing.assert_allclose(turned, [[0, 3, 7, 0], [0, 2, 6, 0]], atol=1e-5)
