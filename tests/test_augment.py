"""The second view: every operation against Pillow, the draws against torchvision's rules."""

import colorsys
import dataclasses
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance

from ccl_jax import augment

KEY = jax.random.key(0)
DEFAULTS = runpy.run_path(str(Path(__file__).parents[1] / "configs/default.py"))
RECIPE = augment.Recipe(**DEFAULTS["augment"]())
HEIGHT, WIDTH = 40, 56

apply_view = jax.jit(augment.apply_view, static_argnames="recipe")
second_view = jax.jit(augment.second_view, static_argnames="recipe")


@partial(jax.jit, static_argnames=("recipe", "height", "width"))
def draw_many(keys, recipe, height=HEIGHT, width=WIDTH):
    return jax.vmap(lambda key: augment.sample_parameters(key, recipe, height, width))(keys)


def picture(height=HEIGHT, width=WIDTH, seed=0):
    """A colourful 8-bit picture, smooth with some noise."""
    rng = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (4, 4, 0))
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 235 + rng.normal(0, 6, smooth.shape) + 10
    return np.clip(smooth, 0, 255).astype(np.uint8)


def parameters(**changes):
    """A view that changes nothing, but for `changes`."""
    nothing = {
        "top": 0,
        "left": 0,
        "height": HEIGHT,
        "width": WIDTH,
        "flip_horizontal": False,
        "flip_vertical": False,
        "order": [0, 1, 2, 3],
        "brightness": 1.0,
        "contrast": 1.0,
        "saturation": 1.0,
        "hue": 0.0,
        "grayscale": False,
        "sigma": 0.01,
        "angle": 0.0,
    }
    return augment.ViewParameters(**{k: jnp.array(v) for k, v in (nothing | changes).items()})


def view(image, recipe=RECIPE, **changes):
    """Our view of an 8-bit image, in levels."""
    result = apply_view(jnp.asarray(image / 255, jnp.float32), parameters(**changes), recipe=recipe)
    return np.asarray(result) * 255


def test_identity_parameters_leave_the_image_alone():
    image = picture()
    np.testing.assert_allclose(view(image), image, atol=1e-3)


@pytest.mark.parametrize("box", [(0, 0, 40, 56), (3, 10, 31, 41), (39, 0, 1, 56), (5, 5, 35, 2)])
def test_crop_and_resize_equal_pillow(box):
    image = picture()
    top, left, height, width = box
    cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
    want = cropped.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    got = view(image, top=top, left=left, height=height, width=width)
    assert np.abs(got - np.asarray(want)).max() <= 1.01  # Pillow rounds after each direction


def test_flips_turn_the_crop_round():
    image = picture()
    crop = {"top": 4, "left": 7, "height": 30, "width": 44}
    plain = view(image, **crop)
    np.testing.assert_allclose(view(image, flip_horizontal=True, **crop), plain[:, ::-1], atol=1e-2)
    np.testing.assert_allclose(view(image, flip_vertical=True, **crop), plain[::-1], atol=1e-2)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colour_factors_equal_pillow(name, enhance, factor):
    image = picture()
    want = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(float)
    # Pillow truncates the result and rounds the grey that it starts from.
    assert np.abs(view(image, **{name: factor}) - want).max() <= 1.6


@pytest.mark.parametrize("turns", [-0.1, -0.5, 0.03, 0.1, 0.4])
def test_hue_equals_the_conversion_through_hsv(turns):
    image = picture(12, 12)
    image[0, :3] = ((0, 0, 0), (255, 255, 255), (90, 90, 90))
    got = view(
        np.pad(image, [(0, HEIGHT - 12), (0, WIDTH - 12), (0, 0)]),
        RECIPE,
        hue=turns,
        order=[3, 0, 1, 2],
    )
    for y, x in np.ndindex(12, 12):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        want = np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)) * 255
        np.testing.assert_allclose(got[y, x], want, atol=0.02)


def test_hue_is_near_to_pillow_which_keeps_it_in_8_bits():
    image = picture()
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image).convert("HSV")), -1, 0)
    turned = [Image.fromarray(band) for band in (hue + np.uint8(25), saturation, value)]
    want = np.asarray(Image.merge("HSV", turned).convert("RGB"))
    got = view(image, hue=25 / 255)
    assert np.abs(got - want).mean() < 1.5
    assert np.abs(got - want).max() < 8


def test_gray_has_three_equal_channels_and_pillows_weights():
    image = picture()
    want = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    got = view(image, grayscale=True)
    assert np.ptp(got, axis=-1).max() < 1e-3
    assert np.abs(got[..., 0] - want).max() <= 0.51


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_a_truncated_gaussian_with_mirrored_edges(sigma):
    image = picture()
    offsets = np.arange(-11, 12)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    want = image / 255.0
    for axis in (0, 1):  # scipy calls a mirror through the last sample "mirror"
        want = scipy.ndimage.correlate1d(want, weights, axis, mode="mirror")
    np.testing.assert_allclose(view(image, sigma=sigma), want * 255, atol=2e-3)


STILL = augment.Recipe(
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    horizontal_flip=0.0,
    vertical_flip=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grayscale=0.0,
    blur_kernel=1,
    blur_sigma=(1.0, 1.0),
    rotation=0.0,
)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (41, 41)])
def test_rotation_equals_pillow_nearest(shape):
    image = picture(*shape)
    for angle in (15.0, -7.3, 90.0, 0.4):
        want = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.NEAREST))
        got = view(image, STILL, height=shape[0], width=shape[1], angle=angle)
        other = np.abs(got - want).max(-1) > 0.01
        # Pillow steps in 16-bit fixed point, so that a position on a pixel's edge may fall apart.
        assert other.mean() < 0.005


def test_rotation_leaves_black_corners_and_turns_counter_clockwise():
    square = {"height": 41, "width": 41}
    white = np.full((41, 41, 3), 255, np.uint8)
    corners = view(white, STILL, angle=15.0, **square)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(corners, 0)
    right = np.zeros_like(white)
    right[20, 37] = 255
    up = view(right, STILL, angle=90.0, **square)
    assert np.argwhere(up[..., 0] > 1).tolist() == [[3, 20]]


def test_colour_changes_happen_in_the_drawn_order():
    image = picture()
    changes = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.3, "hue": 0.1}
    ours = {}
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        step = image.astype(np.float64)
        for kind in order:
            name = list(changes)[kind]
            step = view(step, **{name: changes[name]})
        ours[order] = view(image, order=order, **changes)
        np.testing.assert_allclose(ours[order], step, atol=0.01)
    assert np.abs(ours[0, 1, 2, 3] - ours[3, 2, 1, 0]).max() > 5


def test_gray_comes_after_colour_and_rotation_last():
    image = picture()
    gray = view(image, saturation=1.4, hue=0.1, grayscale=True)
    assert np.ptp(gray, axis=-1).max() < 1e-3
    turned = view(image, sigma=2.0, angle=15.0)
    np.testing.assert_array_equal(turned[0, 0], 0)  # a blur after it would bleed into the corner


# --- draws -------------------------------------------------------------------------------------


def test_every_crop_lies_inside_with_an_allowed_area_and_ratio():
    p = draw_many(jax.random.split(KEY, 4000), RECIPE)
    assert int(p.top.min()) >= 0 and int((p.top + p.height).max()) <= HEIGHT
    assert int(p.left.min()) >= 0 and int((p.left + p.width).max()) <= WIDTH
    area = np.asarray(p.height * p.width) / (HEIGHT * WIDTH)
    slack = 1.5 / HEIGHT  # sides are rounded to pixels
    assert area.min() > 0.8 - slack and area.max() < 1 + slack
    ratio = np.asarray(p.width / p.height)
    assert ratio.min() > 3 / 4 - slack and ratio.max() < 4 / 3 + slack
    assert len(set(zip(p.top.tolist(), p.left.tolist(), strict=True))) > 40


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30, 100), (0, 30, 30, 40)),  # too wide: the centre, at the widest ratio
        ((100, 30), (30, 0, 40, 30)),  # too tall
    ],
)
def test_a_crop_that_never_fits_falls_back_to_the_centre(shape, expected):
    p = draw_many(jax.random.split(KEY, 20), RECIPE, *shape)
    for values, want in zip((p.top, p.left, p.height, p.width), expected, strict=True):
        assert values.tolist() == [want] * 20


def test_draws_have_the_recipes_ranges_and_probabilities():
    p = draw_many(jax.random.split(KEY, 4000), RECIPE)
    for values, (low, high) in (
        (p.brightness, (0.6, 1.4)),
        (p.contrast, (0.6, 1.4)),
        (p.saturation, (0.6, 1.4)),
        (p.hue, (-0.1, 0.1)),
        (p.sigma, (0.1, 2.0)),
        (p.angle, (-15.0, 15.0)),
    ):
        width = high - low
        assert low <= float(values.min()) < low + 0.01 * width
        assert high - 0.01 * width < float(values.max()) <= high
        assert abs(float(values.mean()) - (low + high) / 2) < 0.03 * width
    for happens, probability in (
        (p.flip_horizontal, 0.5),
        (p.flip_vertical, 0.5),
        (p.grayscale, 0.2),
    ):
        assert abs(float(happens.mean()) - probability) < 0.04
    orders = {tuple(order) for order in p.order.tolist()}
    assert len(orders) == 24
    together = np.corrcoef([p.brightness, p.contrast, p.saturation, p.hue, p.sigma, p.angle])
    assert np.abs(together - np.eye(6)).max() < 0.1


def test_factors_never_fall_below_zero():
    recipe = dataclasses.replace(RECIPE, brightness=3.0)
    p = draw_many(jax.random.split(KEY, 500), recipe)
    assert float(p.brightness.min()) >= 0 and float(p.brightness.max()) > 3.5


# --- the whole view ----------------------------------------------------------------------------


def batch():
    return jnp.stack([jnp.asarray(picture(32, 32, i) / 255, jnp.float32) for i in range(4)])


def test_a_view_depends_on_the_key_and_the_place_in_the_batch_alone():
    images = batch()
    views = second_view(KEY, images, recipe=RECIPE)
    assert views.shape == images.shape and views.dtype == images.dtype
    assert float(views.min()) >= 0 and float(views.max()) <= 1
    np.testing.assert_array_equal(views, second_view(KEY, images, recipe=RECIPE))
    other = second_view(jax.random.key(1), images, recipe=RECIPE)
    assert float(jnp.abs(other - views).mean()) > 0.02
    same = second_view(KEY, jnp.stack([images[0]] * 4), recipe=RECIPE)
    assert float(jnp.abs(same[0] - same[1]).mean()) > 0.02
    np.testing.assert_array_equal(same[0], views[0])


def test_a_recipe_that_changes_nothing_returns_the_images():
    images = batch()
    np.testing.assert_allclose(second_view(KEY, images, recipe=STILL), images, atol=1e-5)


def test_four_devices_give_the_views_of_one():
    images = batch()
    expected = second_view(KEY, images, recipe=RECIPE)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    views = second_view(KEY, jax.device_put(images, split), recipe=RECIPE)
    np.testing.assert_allclose(views, expected, atol=1e-5)
    assert views.sharding.is_equivalent_to(split, 4)


def test_float64_images_see_the_same_views():
    images = batch()
    single = second_view(KEY, images, recipe=RECIPE)
    with jax.enable_x64(True):
        double = second_view(KEY, jnp.asarray(images, jnp.float64), recipe=RECIPE)
        assert double.dtype == jnp.float64
        difference = np.abs(np.asarray(double) - np.asarray(single))
    # A position on the edge between two pixels may be rotated to the other one.
    assert np.mean(difference > 1e-4) < 0.005


@pytest.mark.parametrize(("kernel", "size"), [(23, 11), (4, 32)])
def test_a_blur_that_does_not_fit_is_refused_with_a_fix(kernel, size):
    recipe = dataclasses.replace(RECIPE, blur_kernel=kernel)
    images = jnp.zeros((1, size, size, 3))
    with pytest.raises(
        ValueError, match=f"config.augment.blur_kernel={kernel} .*{size} pixels.*=1"
    ):
        jax.eval_shape(lambda key: augment.second_view(key, images, recipe), KEY)


# --- scaling -----------------------------------------------------------------------------------


def test_to_unit_and_normalize_by_hand():
    image = jnp.array([0, 255, 51], jnp.uint8).reshape(1, 1, 1, 3)
    unit = augment.to_unit(image)
    assert unit.dtype == jnp.float32
    np.testing.assert_allclose(unit.ravel(), [0, 1, 0.2], rtol=1e-6)
    normal = augment.normalize(unit).ravel()
    want = [-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(normal, want, rtol=1e-5)
