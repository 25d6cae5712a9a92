"""The second view for given parameters, stated anew: in float64, and as the reference runs it.

`float_view` is the documented formula of every torchvision transform of the RD recipe, in NumPy.
`view_of_8_bits` is what the reference computes: the same transforms on a Pillow picture, one after
the other, each rounding to 8 bits. `rounding_bound` says how far the two may lie apart.
"""

import colorsys
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R 601, in Pillow's conversion to grey
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
FIXED_POINT = 22  # bits behind the point in Pillow's 8-bit resampling


class View(NamedTuple):
    """Everything that is drawn for a view, in the order of `ccl_jax.augment.ViewParameters`."""

    top: int
    left: int
    height: int
    width: int
    flip_horizontal: bool
    flip_vertical: bool
    order: list[int]  # 0 brightness, 1 contrast, 2 saturation, 3 hue
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: bool
    sigma: float
    angle: float


def draw_crop(
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width as RandomResizedCrop draws them on a picture (height, width)."""
    height, width = size
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.integers(height - crop_height + 1)
            left = rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_height = min(height, round(width / min(ratio)))
    crop_width = min(width, round(height * max(ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def plain_view(height: int, width: int) -> View:
    """A view of a picture of this size that changes nothing."""
    return View(
        top=0,
        left=0,
        height=height,
        width=width,
        flip_horizontal=False,
        flip_vertical=False,
        order=[0, 1, 2, 3],
        brightness=1.0,
        contrast=1.0,
        saturation=1.0,
        hue=0.0,
        grayscale=False,
        sigma=0.01,
        angle=0.0,
    )


def triangle_weights(source: int, out: int) -> np.ndarray:
    """[out, source]: Pillow's bilinear filter, widened where it shrinks so that nothing is skipped.

    Output i looks at its centre (i + 1/2) * source/out, and gives the samples around it weights
    that fall linearly to 0 at max(1, source/out) samples from there, cut off at the borders.
    """
    reach = max(1.0, source / out)
    centres = (np.arange(out) + 0.5) * source / out
    weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centres[:, None]) / reach)
    return weights / weights.sum(1, keepdims=True)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image [h, w, ...] resized without rounding."""
    rows = triangle_weights(image.shape[0], height)
    columns = triangle_weights(image.shape[1], width)
    return np.einsum("yh,xw,hw...->yx...", rows, columns, image)


def resize_8_bits(
    image: np.ndarray, height: int, width: int, *, rows_first: bool = False
) -> np.ndarray:
    """Pillow's arithmetic: one direction, then the other, each rounded half up from fixed point.

    Rows become shorter first; since Pillow 13 columns do (`rows_first`, the number of rows is
    changed first) where the height shrinks much more than the width. The results differ by a level.
    """
    passes = [(1, width), (0, height)]
    for axis, out in reversed(passes) if rows_first else passes:
        weights = triangle_weights(image.shape[axis], out)
        whole = np.floor(weights * 2**FIXED_POINT + 0.5).astype(np.int64)
        total = np.moveaxis(np.tensordot(whole, image.astype(np.int64), (1, axis)), 0, axis)
        image = np.clip((total + 2 ** (FIXED_POINT - 1)) >> FIXED_POINT, 0, 255).astype(np.uint8)
    return image


def blend(image: np.ndarray, base: np.ndarray | float, factor: float) -> np.ndarray:
    """The image moved away from its base, or towards it where the factor is below 1."""
    return np.clip(factor * image + (1 - factor) * base, 0, 1)


def gray(image: np.ndarray) -> np.ndarray:
    """Luma in three equal channels."""
    return np.repeat((image @ LUMA)[..., None], 3, -1)


def turn_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """To HSV, the hue moved round the circle, and back, with the standard library's formulas."""
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[place])
        out[place] = colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)
    return out


def change_colour(image: np.ndarray, kind: int, view: View) -> np.ndarray:
    """One of the four steps of the colour jitter."""
    if kind == 0:
        return blend(image, 0.0, view.brightness)
    if kind == 1:
        return blend(image, gray(image).mean(), view.contrast)
    if kind == 2:
        return blend(image, gray(image), view.saturation)
    return turn_hue(image, view.hue)


def blur(image: np.ndarray, kernel: int, sigma: float) -> np.ndarray:
    """exp(-(d/sigma)^2 / 2) over a square window, normalised; reflected at the borders."""
    offsets = np.linspace(-(kernel - 1) / 2, (kernel - 1) / 2, kernel)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    padding = [(kernel // 2, kernel // 2)] * 2 + [(0, 0)]
    image = np.pad(image, padding, mode="reflect")  # the border sample itself is not repeated
    for axis in (0, 1):  # the window is the product of a column and a row
        image = np.lib.stride_tricks.sliding_window_view(image, kernel, axis=axis) @ weights
    return image


def rotate(image: np.ndarray, angle: float) -> np.ndarray:
    """Counter-clockwise by degrees about the centre, the same frame, nearest pixel, else black.

    A point is a complex number with its imaginary part upwards; the colour of a pixel is found
    where its centre was before the turn.
    """
    height, width = image.shape[:2]
    y, x = np.indices((height, width))
    point = (x + 0.5 - width / 2) + 1j * (height / 2 - y - 0.5)
    before = point * np.exp(-1j * np.deg2rad(angle))
    from_x = np.floor(before.real + width / 2).astype(int)
    from_y = np.floor(height / 2 - before.imag).astype(int)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    out = np.zeros_like(image)
    out[inside] = image[from_y[inside], from_x[inside]]
    return out


def float_view(image: np.ndarray, view: View, kernel: int) -> np.ndarray:
    """The view of an image in [0, 1], in its size, without any rounding."""
    height, width = image.shape[:2]
    rows, columns = (slice(s, s + n) for s, n in ((view.top, view.height), (view.left, view.width)))
    image = resize(image[rows, columns], height, width)
    if view.flip_horizontal:
        image = image[:, ::-1]
    if view.flip_vertical:
        image = image[::-1]
    for kind in view.order:
        image = change_colour(image, kind, view)
    if view.grayscale:
        image = gray(image)
    return rotate(blur(image, kernel, view.sigma), view.angle)


def view_of_8_bits(
    picture: Image.Image, view: View, size: tuple[int, int], kernel: int
) -> np.ndarray:
    """The view of a picture of any size as the reference makes it: Pillow, rounding at each step.

    `size` is (height, width). torchvision's blur of a picture is the one step outside Pillow: it
    goes through floats and rounds to the nearest level.
    """
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    image = picture.crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
    if view.flip_horizontal:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.flip_vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for kind in view.order:
        if kind == 3:
            image = _turn_hue_of_8_bits(image, view.hue)
        else:
            image = ENHANCERS[kind](image).enhance(view[view._fields.index("brightness") + kind])
    if view.grayscale:
        image = image.convert("L").convert("RGB")
    blurred = np.rint(blur(np.asarray(image, float), kernel, view.sigma)).astype(np.uint8)
    return np.asarray(Image.fromarray(blurred).rotate(view.angle, Image.Resampling.NEAREST))


def _turn_hue_of_8_bits(image: Image.Image, turns: float) -> Image.Image:
    """The hue as a byte, moved by a whole number of 255ths; a byte wraps round after 256."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue, np.int64) + int(turns * 255)) % 256
    bands = (Image.fromarray(moved.astype(np.uint8)), saturation, value)
    return Image.merge("HSV", bands).convert("RGB")


def rounding_bound(view: View) -> float:
    """Levels that 8-bit steps may at most lie from the same steps in floats, before the rotation.

    Every step passes on the error it is given, at most multiplied by its slope, and adds its own:

    - resizing rounds twice by half a level;
    - a blend truncates by a level; contrast starts from a mean of rounded greys that is rounded
      itself, saturation from a rounded grey;
    - hue truncates the hue of a pixel and the change to 1/255 turn, and loses as much again where
      a byte wraps round: 3 * 6/255 of the chroma, at most 18 levels; 1 for the saturation, 1 for
      the way back. A turned channel moves by at most 3 levels for one level of the input;
    - grey and blur round by half a level.
    """
    error = 1.0
    for kind in view.order:
        if kind == 0:
            error = view.brightness * error + 1
        elif kind == 1:
            error = (view.contrast + abs(1 - view.contrast)) * error + abs(1 - view.contrast) + 1
        elif kind == 2:
            change = abs(1 - view.saturation)
            error = (view.saturation + change) * error + change / 2 + 1
        else:
            error = 3 * error + 20
    return error + 0.5 * view.grayscale + 0.5
