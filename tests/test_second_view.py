"""The script that measures what making the second view from the resized picture changes."""

import numpy as np
import pytest
from PIL import Image

from tests.reference import second_view
from tests.reference.torch_augment import plain_view

RAMP = np.repeat(np.linspace(0, 255, 40)[None, :, None], 40, 0).repeat(3, -1).astype(np.uint8)


def test_the_script_prints_the_difference_its_parts_and_a_yardstick(photos, capsys):
    """The fixture's pictures are 70 x 50 pixels."""
    arguments = [str(photos), "--size", "32", "--images", "3", "--draws", "2"]
    found = second_view.main(arguments)
    printed = capsys.readouterr().out
    assert "3 pictures, 2 views each, 32 pixels; width / height 1.40 to 1.40" in printed
    for pair, difference in found.items():
        assert f"{pair:45}{difference.levels:6.2f}" in printed
        assert len(difference.cosine) == 3 and min(difference.cosine) > 0
    whole, _, _, rounding, draws = found.values()
    assert rounding.levels < whole.levels < draws.levels / 3
    assert rounding.psnr > whole.psnr > draws.psnr


def test_squares_of_the_networks_size_differ_by_8_bits_alone():
    made = second_view.make(RAMP, RAMP, np.random.default_rng(0))
    np.testing.assert_array_equal(made.reference, made.resized)
    np.testing.assert_array_equal(made.reference, made.rounded_box)
    assert 0 < np.abs(made.reference - made.ours).mean() < 2.5


def test_differences_by_hand():
    """2 levels everywhere are 10 log10(255^2 / 4) = 42.1 decibels; the maps lie at right angles."""
    black, gray = np.zeros((4, 4, 3)), np.full((4, 4, 3), 2.0)
    made = second_view.Made(black, black, black, gray, gray)

    def encode(levels):
        bright = np.asarray(levels[..., :1] > 1, float)
        return (np.concatenate([bright, 1 - bright], -1),)

    found = second_view.compare([made, made], encode)
    whole = found["reference and ours"]
    assert whole.levels == 2 and whole.psnr == pytest.approx(42.11, abs=0.01)
    assert whole.cosine == (1.0,)
    assert found["two draws of one picture"] == second_view.Difference(0, float("inf"), (0.0,))


def test_a_box_is_scaled_to_the_square_and_rounded_to_its_pixels():
    """A picture of 100 x 200 on 50 pixels: rows count a half, columns a quarter."""
    drawn = plain_view(100, 200)._replace(top=5, left=30, height=91, width=161)
    view, box = second_view.in_square(drawn, (100, 200), 50)
    assert box == (7.5, 2.5, 47.75, 48.0)
    assert (view.top, view.left, view.height, view.width) == (2, 8, 46, 40)


def test_the_resized_picture_is_cropped_where_the_raw_one_is():
    """A ramp over 200 columns, of which the drawn box shows 40 ... 160."""
    raw = np.repeat(np.linspace(0, 255, 200)[None, :, None], 100, 0).repeat(3, -1).astype(np.uint8)
    square = np.asarray(Image.fromarray(raw).resize((50, 50), Image.Resampling.BILINEAR))
    made = second_view.make(raw, square, np.random.default_rng(2))
    for way in (made.resized, made.rounded_box, made.ours):
        inside = (made.reference > 0) & (np.asarray(way) > 0)  # outside the rotated frame it is 0
        assert np.abs(made.reference - np.asarray(way, float))[inside].mean() < 4
    assert np.abs(made.reference - made.other).mean() > 10


@pytest.mark.parametrize(
    ("aspect", "fallback", "stretch"),
    [(1.0, 0.01, 1.0), (2.0, 1.0, 1.5), (0.5, 1.0, 1 / 1.5)],
)
def test_a_long_picture_always_takes_the_stretched_centre(aspect, fallback, stretch):
    """At 2:1 the widest ratio allowed, 4:3, shows two thirds of the width at the full height."""
    crops = second_view.crops_of(np.random.default_rng(0), (1000, round(1000 * aspect)))
    assert crops.fallback == pytest.approx(fallback, abs=0.02)
    assert crops.stretch[1] == pytest.approx(stretch, rel=0.03)
    assert aspect == 1 or crops.area == pytest.approx(2 / 3, abs=0.01)
