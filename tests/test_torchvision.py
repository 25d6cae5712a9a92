"""The second view and the clean image against torchvision itself, where it is installed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from ccl_jax import augment
from ccl_jax.data.records import Record, as_rgb, read_mask
from ccl_jax.models import network as networks
from ccl_jax.models import pretrained
from tests.reference.torch_augment import (
    View,
    draw_crop,
    plain_view,
    rounding_bound,
    view_of_8_bits,
)
from tests.reference.views import NO_BLUR, PUBLISHED, any_view, ours, picture, png

live = pytest.importorskip(
    "tests.reference.live_torchvision",
    reason="needs torch and torchvision that can be imported: pip install -e '.[reference]'",
    exc_type=ImportError,
)
torch, transforms, functional = live.torch, live.transforms, live.functional

HEIGHT, WIDTH = 40, 56
SIZE = (HEIGHT, WIDTH)
BOX = {"top": 3, "left": 10, "height": 31, "width": 41}
# torchvision's tensor path weighs red with 0.2989, Pillow and we with 0.299: the greys differ by at
# most 1e-4, and a blended image by that times |1 - factor|.
RED = 1.1e-4
FLOAT32 = 2e-6  # roundings of numbers up to 1; the tensor path turns hue in float32 in any case

# What changes, torchvision's call, and how far it may lie from ours: on float tensors, and in
# levels on an 8-bit picture, where each blend truncates, and greys and means are rounded.
CASES = {
    "crop": (BOX, lambda x: functional.resized_crop(x, *BOX.values(), SIZE), FLOAT32, 1.01),
    "crop of a row": (
        {"top": 39, "height": 1},
        lambda x: functional.resized_crop(x, 39, 0, 1, WIDTH, SIZE),
        FLOAT32,
        1.01,
    ),
    "mirrored": ({"flip_horizontal": True}, functional.hflip, FLOAT32, 0.001),
    "upside down": ({"flip_vertical": True}, functional.vflip, FLOAT32, 0.001),
    "darker": ({"brightness": 0.6}, lambda x: functional.adjust_brightness(x, 0.6), FLOAT32, 1.01),
    "brighter": ({"brightness": 1.4}, lambda x: functional.adjust_brightness(x, 1.4), FLOAT32, 1.0),
    "flatter": ({"contrast": 0.6}, lambda x: functional.adjust_contrast(x, 0.6), RED, 1.41),
    "harder": ({"contrast": 1.4}, lambda x: functional.adjust_contrast(x, 1.4), RED, 1.41),
    "paler": ({"saturation": 0.6}, lambda x: functional.adjust_saturation(x, 0.6), RED, 1.21),
    "richer": ({"saturation": 1.4}, lambda x: functional.adjust_saturation(x, 1.4), RED, 1.21),
    "hue back": ({"hue": -0.1}, lambda x: functional.adjust_hue(x, -0.1), FLOAT32, 20.0),
    "hue on": ({"hue": 0.4}, lambda x: functional.adjust_hue(x, 0.4), FLOAT32, 20.0),
    "gray": ({"grayscale": True}, lambda x: functional.rgb_to_grayscale(x, 3), RED, 0.51),
}


def as_tensor(image):
    """An 8-bit picture as torchvision's ToTensor gives it: [3, h, w] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image / np.float32(255), -1, 0)))


def as_image(tensor):
    return np.moveaxis(tensor.numpy(), 0, -1)


def changed(**changes):
    return plain_view(HEIGHT, WIDTH)._replace(**changes)


@pytest.mark.parametrize("name", CASES)
def test_each_operation_equals_torchvisions_on_tensors_and_on_pictures(name):
    changes, operation, of_floats, of_levels = CASES[name]
    image = picture(HEIGHT, WIDTH, 0)
    view = ours(image / 255, changed(**changes), NO_BLUR)
    np.testing.assert_allclose(view, as_image(operation(as_tensor(image))), rtol=0, atol=of_floats)
    levels = np.asarray(operation(Image.fromarray(image)), float)
    assert np.abs(255 * view - levels).max() <= of_levels
    assert np.abs(255 * view - levels).mean() <= min(of_levels, 0.6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvisions(sigma):
    image = picture(HEIGHT, WIDTH, 1)
    view = ours(image / 255, changed(sigma=sigma))
    blurred = functional.gaussian_blur(as_tensor(image), [23, 23], [sigma, sigma])
    np.testing.assert_allclose(view, as_image(blurred), rtol=0, atol=FLOAT32)
    levels = np.asarray(functional.gaussian_blur(Image.fromarray(image), [23, 23], [sigma, sigma]))
    assert np.abs(255 * view - levels).max() <= 0.501


@pytest.mark.parametrize("shape", [(40, 56), (41, 30), (33, 33)])
def test_rotation_equals_torchvisions(shape):
    image = picture(*shape, 2)
    for angle in (15.0, -7.3, 3.21, -14.9):
        view = ours(image / 255, plain_view(*shape)._replace(angle=angle), NO_BLUR)
        for rotated in (
            255 * as_image(functional.rotate(as_tensor(image), angle)),
            np.asarray(functional.rotate(Image.fromarray(image), angle), float),
        ):
            other = np.abs(255 * view - rotated).max(-1) > 0.01
            # A position on the edge between two pixels falls to either, by float32 or fixed point.
            assert other.mean() < 0.005


def in_sequence(image, view, size):
    """The published recipe with torchvision, on a tensor or a picture alike."""
    image = functional.resized_crop(image, view.top, view.left, view.height, view.width, size)
    image = functional.hflip(image) if view.flip_horizontal else image
    image = functional.vflip(image) if view.flip_vertical else image
    jitter = (
        (functional.adjust_brightness, view.brightness),
        (functional.adjust_contrast, view.contrast),
        (functional.adjust_saturation, view.saturation),
        (functional.adjust_hue, view.hue),
    )
    for kind in view.order:
        change, value = jitter[kind]
        image = change(image, value)
    image = functional.rgb_to_grayscale(image, 3) if view.grayscale else image
    image = functional.gaussian_blur(image, [23, 23], [view.sigma, view.sigma])
    return functional.rotate(image, view.angle)


def test_the_whole_recipe_equals_torchvisions_on_tensors():
    for seed, order in enumerate(itertools.permutations(range(4))):
        view = any_view(seed, HEIGHT, WIDTH, order)
        image = picture(HEIGHT, WIDTH, seed)
        want = as_image(in_sequence(as_tensor(image), view, SIZE))
        difference = np.abs(ours(image / 255, view) - want).max(-1)
        # 1e-4 for the weight of red in each of two blends, stretched by the factors, up to 2, and
        # the hue that follow; 2e-4 measured. The share is for rotations, see above.
        assert (difference > 6e-4).mean() < 0.005, view


@pytest.mark.parametrize("raw", [SIZE, (90, 70), (30, 45)])
def test_pillow_in_sequence_equals_torchvision_on_pictures(raw):
    """`view_of_8_bits` stands for the reference where torchvision is not at hand."""
    for seed, order in enumerate(itertools.permutations(range(4))):
        view = any_view(seed, *raw, order)
        image = Image.fromarray(picture(*raw, seed))
        want = np.asarray(in_sequence(image, view, SIZE)).astype(int)
        got = view_of_8_bits(image, view, SIZE, 23)
        # The blur in float32 may round the other way where it meets the middle of two levels.
        assert np.abs(got - want).max() <= 1 and (got != want).mean() < 1e-3, view


def test_the_whole_recipe_equals_torchvisions_on_pictures_up_to_8_bits():
    keys = jax.random.split(jax.random.key(5), 24)
    draw = jax.jit(lambda key: augment.sample_parameters(key, PUBLISHED, HEIGHT, WIDTH))
    for seed, key in enumerate(keys):
        view = View(*(np.asarray(value).tolist() for value in draw(key)))
        image = picture(HEIGHT, WIDTH, seed)
        levels = np.asarray(in_sequence(Image.fromarray(image), view, SIZE), float)
        difference = np.abs(255 * ours(image / 255, view) - levels)
        assert (difference.max(-1) > rounding_bound(view)).mean() < 0.005, view
        assert difference.mean() < 2.5, view


@pytest.mark.parametrize("shape", [(70, 50), (30, 90), (20, 20)])
def test_the_clean_image_and_its_mask_equal_torchvisions(shape):
    image = picture(*shape, 3)
    load = transforms.Compose(
        [
            transforms.Resize((32, 32)),
            transforms.CenterCrop((32, 32)),
            transforms.ToTensor(),
            transforms.Normalize(augment.MEAN, augment.STD),
        ]
    )
    square = as_rgb(Image.fromarray(image), 32)[None]
    clean = augment.normalize(augment.to_unit(jnp.asarray(square)))[0]
    np.testing.assert_allclose(clean, as_image(load(Image.fromarray(image))), atol=1e-6)

    grays = (image[..., 0] > 120) * np.uint8(3)
    of_mask = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    want = of_mask(Image.fromarray(np.where(grays > 0, 255, 0).astype(np.uint8)))[0] > 0.5
    record = Record(png(image), "mine", "nut", 0, "nut/1", mask=png(grays))
    np.testing.assert_array_equal(read_mask(record, 32), want)


# --- draws: 4000 of ours and of theirs ---------------------------------------------------------

DRAWS = 4000
# The Kolmogorov-Smirnov distance of two samples of n exceeds d with a probability of at most
# 2 exp(-n d^2) if they come from one distribution: one false alarm in a million comparisons.
ALARM = float(np.sqrt(np.log(2 / 1e-6) / DRAWS))


def our_draws(recipe, height, width):
    keys = jax.random.split(jax.random.key(11), DRAWS)
    draw = jax.jit(jax.vmap(lambda key: augment.sample_parameters(key, recipe, height, width)))
    return jax.tree.map(np.asarray, draw(keys))


def crops(scale, ratio, height, width):
    torch.manual_seed(12)
    image = torch.empty(3, height, width)
    get = transforms.RandomResizedCrop.get_params
    drawn = np.array([get(image, list(scale), list(ratio)) for _ in range(DRAWS)])
    return dict(zip(("top", "left", "height", "width"), drawn.T, strict=True))


def assert_same_distribution(our, their, what):
    distance = scipy.stats.ks_2samp(our, their, method="asymp").statistic
    assert distance < ALARM, f"{what}: {distance:.3f}"


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("shape", [(64, 64), (40, 56), (60, 30), (100, 30)])
def test_crops_are_drawn_as_torchvision_draws_them(shape, scale):
    """Squares, pictures that often take the fallback, and one (100, 30) that nearly always does."""
    recipe = dataclasses.replace(PUBLISHED, crop_scale=scale)
    their = crops(scale, recipe.crop_ratio, *shape)
    rng, names = np.random.default_rng(15), ("top", "left", "height", "width")
    stated = [draw_crop(rng, shape, scale, recipe.crop_ratio) for _ in range(DRAWS)]
    for mine in (
        our_draws(recipe, *shape)._asdict(),
        dict(zip(names, np.array(stated).T, strict=True)),
    ):
        for what in names:
            assert_same_distribution(mine[what], their[what], what)
        for what, value in (
            ("area", lambda p: p["height"] * p["width"]),
            ("ratio", lambda p: p["width"] / p["height"]),
            ("right", lambda p: p["left"] + p["width"]),
            ("bottom", lambda p: p["top"] + p["height"]),
        ):
            assert_same_distribution(value(mine), value(their), what)


def test_colours_blur_and_rotation_are_drawn_as_torchvision_draws_them():
    our = our_draws(PUBLISHED, HEIGHT, WIDTH)
    torch.manual_seed(13)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    spreads = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    drawn = [jitter.get_params(*spreads) for _ in range(DRAWS)]
    for place, what in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        assert_same_distribution(getattr(our, what), [row[place] for row in drawn], what)
    number = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    orders = [number[tuple(row[0].tolist())] for row in drawn]
    assert_same_distribution([number[tuple(row)] for row in our.order.tolist()], orders, "order")
    sigmas = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(DRAWS)]
    assert_same_distribution(our.sigma, sigmas, "sigma")
    turn = transforms.RandomRotation(15)
    angles = [turn.get_params(turn.degrees) for _ in range(DRAWS)]
    assert_same_distribution(our.angle, angles, "angle")


def test_flips_and_gray_happen_as_often_as_torchvisions():
    our = our_draws(PUBLISHED, HEIGHT, WIDTH)
    torch.manual_seed(14)
    colours = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1).expand(3, 2, 2).clone()
    colours[:, 0, 0] = 0.25  # no symmetry, so that each operation shows
    for happens, operation in (
        (our.flip_horizontal, transforms.RandomHorizontalFlip(0.5)),
        (our.flip_vertical, transforms.RandomVerticalFlip(0.5)),
        (our.grayscale, transforms.RandomGrayscale(0.2)),
    ):
        theirs = [not torch.equal(operation(colours), colours) for _ in range(DRAWS)]
        assert_same_distribution(happens.astype(float), np.array(theirs, float), operation)


def test_the_raw_pictures_crop_is_ours_with_the_ratio_divided_by_its_aspect():
    """What the reference draws on a picture of 3:2, ours draws on the square made of it."""
    low, high = PUBLISHED.crop_ratio
    recipe = dataclasses.replace(PUBLISHED, crop_ratio=(low / 1.5, high / 1.5))
    our, their = our_draws(recipe, 1000, 1000), crops((0.8, 1.0), (low, high), 1000, 1500)
    plain = our_draws(PUBLISHED, 1000, 1000)
    for what, long in (("top", 1), ("height", 1), ("left", 1.5), ("width", 1.5)):
        assert_same_distribution(getattr(our, what), np.round(their[what] / long), what)
    usual = scipy.stats.ks_2samp(plain.width, their["width"] / 1.5).statistic
    assert usual > 5 * ALARM  # with the usual ratio the widths are others


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2"])
def test_every_tensor_of_torchvisions_encoders_has_its_place(name, tmp_path):
    """By torchvision's own names and values, through a file that PyTorch wrote."""
    model = live.models.get_model(name, weights=None)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    _, *wanted = networks.abstract_network(
        family="rd", encoder=name, projector="none", compute_dtype="float32"
    )
    params, batch_stats, provenance = pretrained.load_encoder(
        str(tmp_path / "model.pth"), name, *(tree["encoder"] for tree in wanted)
    )
    number = sum(
        not name.startswith(("fc.", "layer4.")) and not name.endswith("num_batches_tracked")
        for name in model.state_dict()
    )
    assert provenance["tensors"] == number == len(jax.tree.leaves((params, batch_stats)))
    kernel = model.layer3[0].downsample[0].weight.detach().numpy()
    ours = params["layer3"]["block0"]["shortcut"]["conv"]["kernel"]
    np.testing.assert_array_equal(ours[0, 0], kernel[:, :, 0, 0].T)
