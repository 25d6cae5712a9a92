"""The augmented second view, made on the device from the resized image, one key per image.

The operations and their order are those of the published RD recipe, with torchvision's meaning of
every parameter: random resized crop, flips, colour jitter, random grey, Gaussian blur, rotation.
Two differences: the view starts from the resized picture instead of the raw one, and values are
not rounded to 8 bits between the operations. Cropping, flipping and blurring are linear in rows and
columns, so each image goes through one small matrix from either side.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's channels; every published encoder here uses them
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's conversion to grey
CROP_TRIES = 10  # torchvision draws this often before it crops the centre
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the kinds of colour change in `order`
EXACT = jax.lax.Precision.HIGHEST  # accelerators multiply float32 in fewer bits by default

Image = Float[Array, "h w 3"]
Planes = Float[Array, "3 h w"]  # the form in between: whole channels are quicker to work through
Number = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is drawn for a view: the settings of `config.augment`, with their units there."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    horizontal_flip: float
    vertical_flip: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur_kernel: int
    blur_sigma: tuple[float, float]
    rotation: float


class ViewParameters(NamedTuple):
    """Everything that is random about the view of one image."""

    top: Int[Array, ""]  # pixels, of the crop
    left: Int[Array, ""]
    height: Int[Array, ""]
    width: Int[Array, ""]
    flip_horizontal: Bool[Array, ""]
    flip_vertical: Bool[Array, ""]
    order: Int[Array, "4"]  # of the colour changes
    brightness: Number  # factors; 1 changes nothing
    contrast: Number
    saturation: Number
    hue: Number  # turns; 0 changes nothing
    grayscale: Bool[Array, ""]
    sigma: Number  # pixels, of the blur
    angle: Number  # degrees, counter-clockwise


def to_unit(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """8-bit images as floats in [0, 1]."""
    return images.astype(jnp.result_type(float)) / 255


def normalize(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Images in [0, 1] -> what the encoder expects: ImageNet's mean 0 and standard deviation 1."""
    return (images - jnp.asarray(MEAN, images.dtype)) / jnp.asarray(STD, images.dtype)


def second_view(
    key: PRNGKeyArray, images: Float[Array, "b h w 3"], recipe: Recipe
) -> Float[Array, "b h w 3"]:
    """Another view of each image, in [0, 1].

    Image i is changed by its key alone, `fold_in(key, i)`, with i its place in the global batch.

    Raises:
        ValueError: the blur's kernel does not fit the image.
    """
    b, h, w, _ = images.shape

    def view(place: Int[Array, ""], image: Image) -> Image:
        parameters = sample_parameters(jax.random.fold_in(key, place), recipe, h, w)
        return apply_view(image, parameters, recipe)

    return jax.vmap(view)(jnp.arange(b, dtype=jnp.int32), images)


def sample_parameters(key: PRNGKeyArray, recipe: Recipe, height: int, width: int) -> ViewParameters:
    """Draws the view of one image of `height` x `width` pixels."""
    crop_key, chance_key, order_key, value_key = jax.random.split(key, 4)
    # Everything is drawn in float32 also under x64, so that a float64 run sees the same views.
    chances = jnp.array((recipe.horizontal_flip, recipe.vertical_flip, recipe.grayscale))
    happens = jax.random.uniform(chance_key, (3,), jnp.float32) < chances
    jitter = (recipe.brightness, recipe.contrast, recipe.saturation)
    ranges = [(max(0.0, 1 - spread), 1 + spread) for spread in jitter]
    ranges += [(-recipe.hue, recipe.hue), recipe.blur_sigma, (-recipe.rotation, recipe.rotation)]
    low, high = jnp.array(ranges, jnp.float32).T
    values = jax.random.uniform(value_key, low.shape, jnp.float32, low, high)
    top, left, crop_height, crop_width = _sample_crop(crop_key, recipe, height, width)
    return ViewParameters(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        flip_horizontal=happens[0],
        flip_vertical=happens[1],
        order=jax.random.permutation(order_key, 4),
        brightness=values[0],
        contrast=values[1],
        saturation=values[2],
        hue=values[3],
        grayscale=happens[2],
        sigma=values[4],
        angle=values[5],
    )


def _sample_crop(
    key: PRNGKeyArray, recipe: Recipe, height: int, width: int
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Top, left, height and width of a crop with a random area and aspect ratio.

    The first of CROP_TRIES draws that lies inside the image; the largest centred crop with an
    allowed ratio if none does.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    tries, (low, high) = (CROP_TRIES,), recipe.crop_ratio
    area = jax.random.uniform(area_key, tries, jnp.float32, *recipe.crop_scale) * height * width
    log_ratio = jax.random.uniform(ratio_key, tries, jnp.float32, math.log(low), math.log(high))
    widths = jnp.round(jnp.sqrt(area * jnp.exp(log_ratio))).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / jnp.exp(log_ratio))).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, any_fits = jnp.argmax(fits), jnp.any(fits)

    centred_height = min(height, round(width / low))
    centred_width = min(width, round(height * high))
    crop_height = jnp.where(any_fits, heights[first], centred_height)
    crop_width = jnp.where(any_fits, widths[first], centred_width)

    def start(key: PRNGKeyArray, spare: Int[Array, ""]) -> Int[Array, ""]:
        drawn = jax.random.randint(key, (), 0, spare + 1, jnp.int32)
        return jnp.where(any_fits, drawn, spare // 2)

    top, left = start(top_key, height - crop_height), start(left_key, width - crop_width)
    return top, left, crop_height, crop_width


def apply_view(image: Image, parameters: ViewParameters, recipe: Recipe) -> Image:
    """The view of an image in [0, 1] that `parameters` describe; same size, in [0, 1].

    Raises:
        ValueError: the blur's kernel does not fit the image.
    """
    h, w, _ = image.shape
    p = parameters
    rows = _crop_matrix(h, p.top, p.height, p.flip_vertical, image.dtype)
    columns = _crop_matrix(w, p.left, p.width, p.flip_horizontal, image.dtype)
    planes = _change_colours(_both_sides(rows, jnp.moveaxis(image, -1, 0), columns), p)
    planes = jnp.where(p.grayscale, _gray(planes), planes)
    rows, columns = (_blur_matrix(n, recipe.blur_kernel, p.sigma, image.dtype) for n in (h, w))
    return jnp.moveaxis(_rotate(_both_sides(rows, planes, columns), p.angle), 0, -1)


def _both_sides(rows: Float[Array, "h h"], planes: Planes, columns: Float[Array, "w w"]) -> Planes:
    """Each channel as rows @ channel @ columns.T, kept in [0, 1] against rounding."""
    product = jnp.einsum("yh,chw,xw->cyx", rows, planes, columns, precision=EXACT)
    return jnp.clip(product, 0, 1)


def _crop_matrix(
    size: int,
    start: Int[Array, ""],
    length: Int[Array, ""],
    flip: Bool[Array, ""],
    dtype: jnp.dtype,
) -> Float[Array, "{size} {size}"]:
    """Resizes samples start ... start + length - 1 to `size` linearly, and perhaps flips them.

    Enlarging only, where Pillow's bilinear filter is a triangle of one sample to either side.
    """
    out = jnp.arange(size, dtype=dtype)
    source = jnp.arange(size, dtype=dtype)
    centre = start + (jnp.where(flip, size - 1 - out, out) + 0.5) * length / size
    weights = jnp.maximum(0, 1 - jnp.abs(source + 0.5 - centre[:, None]))
    weights = jnp.where((source >= start) & (source < start + length), weights, 0)
    return (weights / jnp.sum(weights, axis=1, keepdims=True)).astype(dtype)


def _blur_matrix(
    size: int, kernel: int, sigma: Number, dtype: jnp.dtype
) -> Float[Array, "{size} {size}"]:
    """A Gaussian of `kernel` samples, mirrored about the first and the last sample."""
    radius = kernel // 2
    if kernel % 2 == 0 or radius >= size:
        raise ValueError(
            f"config.augment.blur_kernel={kernel} does not fit an image of {size} pixels; use an "
            f"odd number below {2 * size}, e.g. --config.augment.blur_kernel=1 for no blur."
        )
    offsets = jnp.arange(-radius, radius + 1)
    weights = jax.nn.softmax(-0.5 * (offsets.astype(dtype) / sigma.astype(dtype)) ** 2)
    rows = jnp.arange(size)[:, None]
    source = jnp.abs(rows + offsets)
    source = jnp.minimum(source, 2 * (size - 1) - source)
    matrix = jnp.zeros((size, size), dtype)
    return matrix.at[rows, source].add(jnp.broadcast_to(weights, source.shape))


def _gray(planes: Planes) -> Float[Array, "h w"]:
    """Luma in [0, 1]."""
    red, green, blue = planes
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _change_colours(planes: Planes, p: ViewParameters) -> Planes:
    """Brightness, contrast, saturation and hue, in the drawn order, each kept in [0, 1].

    The first three move a pixel away from, or towards, a base: black, the mean grey, its own grey.
    """
    factors = jnp.stack([p.brightness, p.contrast, p.saturation, jnp.ones_like(p.hue)])
    for place in range(4):
        kind = p.order[place]
        gray = _gray(planes)
        base = jnp.where(kind == CONTRAST, jnp.mean(gray), gray)
        base = jnp.where(kind == BRIGHTNESS, 0, base)
        blended = jnp.clip(base + factors[kind].astype(planes.dtype) * (planes - base), 0, 1)
        planes = jnp.where(kind == HUE, _turn_hue(planes, p.hue), blended)
    return planes


def _turn_hue(planes: Planes, turns: Number) -> Planes:
    """The image with the hue of its HSV form moved by a share of the colour circle."""
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    low = jnp.minimum(jnp.minimum(red, green), blue)
    chroma = value - low
    beyond = jnp.where(
        value == red,
        green - blue,
        jnp.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    sixths = beyond / jnp.where(chroma > 0, chroma, 1) + 6 * turns.astype(planes.dtype)

    def channel(peak: int) -> Float[Array, "h w"]:
        """Full within one sixth of the circle from its peak, gone from two sixths on."""
        distance = sixths - peak
        distance = jnp.abs(distance - 6 * jnp.round(distance / 6))
        return low + chroma * jnp.clip(2 - distance, 0, 1)

    return jnp.stack([channel(0), channel(2), channel(4)])


def _rotate(planes: Planes, angle: Number) -> Planes:
    """Turned counter-clockwise about the centre: nearest pixel, same frame, black corners."""
    _, h, w = planes.shape
    radians = jnp.deg2rad(angle.astype(planes.dtype))
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    y = jnp.arange(h, dtype=planes.dtype)[:, None] + 0.5 - h / 2
    x = jnp.arange(w, dtype=planes.dtype) + 0.5 - w / 2
    from_y = jnp.floor(sin * x + cos * y + h / 2).astype(jnp.int32)
    from_x = jnp.floor(cos * x - sin * y + w / 2).astype(jnp.int32)
    inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)
    picked = planes[:, jnp.clip(from_y, 0, h - 1), jnp.clip(from_x, 0, w - 1)]
    return jnp.where(inside, picked, 0)
