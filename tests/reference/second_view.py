"""How far the second view from the resized picture lies from the reference's, from the raw one.

    python -m tests.reference.second_view PHOTOS --size 256 --images 64 --draws 4

PHOTOS has the MVTec layout. The reference crops the raw picture and works on it in 8 bits; ours
crops the picture that was resized before, at whole pixels of it, in floats. Printed are the
differences for the same draws, their parts, and two draws of one picture as a yardstick; then what
the two crop rules make of pictures that are not square.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from ccl_jax import augment
from ccl_jax.data.layouts import read_mvtec
from ccl_jax.data.records import read_image
from ccl_jax.models import network, pretrained
from ccl_jax.state import Architecture
from tests.reference.torch_augment import View, draw_crop, view_of_8_bits
from tests.reference.views import PUBLISHED

ENCODER = "resnet18"
ASPECTS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5)  # width / height
CROPS = 4000

apply_view = jax.jit(augment.apply_view, static_argnames="recipe")
Encode = Callable[[np.ndarray], tuple]


class Made(NamedTuple):
    """One draw of one picture, made in several ways; levels in 0 ... 255."""

    reference: np.ndarray  # the raw picture, 8 bits
    resized: np.ndarray  # the resized picture, 8 bits, the same box
    rounded_box: np.ndarray  # the resized picture, 8 bits, the box in whole pixels
    ours: np.ndarray  # the resized picture, floats, the box in whole pixels
    other: np.ndarray  # ours, for another draw


PAIRS = {
    "reference and ours": ("reference", "ours"),
    "  from the raw, or from the resized picture": ("reference", "resized"),
    "  box as drawn, or in whole pixels": ("resized", "rounded_box"),
    "  8 bits, or floats": ("rounded_box", "ours"),
    "two draws of one picture": ("ours", "other"),
}


class Difference(NamedTuple):
    """Means over all views."""

    levels: float  # absolute difference of pixels, of 255
    psnr: float  # decibels, of the mean squared difference
    cosine: tuple[float, ...]  # distance of the encoder's maps, from fine to coarse


def draw_view(rng: np.random.Generator, size: tuple[int, int]) -> View:
    """The published recipe drawn on a picture of this (height, width), as the reference draws."""
    recipe = PUBLISHED
    jitter = [rng.uniform(1 - s, 1 + s) for s in (recipe.brightness, recipe.contrast)]
    return View(
        *draw_crop(rng, size, recipe.crop_scale, recipe.crop_ratio),
        flip_horizontal=rng.random() < recipe.horizontal_flip,
        flip_vertical=rng.random() < recipe.vertical_flip,
        order=rng.permutation(4).tolist(),
        brightness=jitter[0],
        contrast=jitter[1],
        saturation=rng.uniform(1 - recipe.saturation, 1 + recipe.saturation),
        hue=rng.uniform(-recipe.hue, recipe.hue),
        grayscale=rng.random() < recipe.grayscale,
        sigma=rng.uniform(*recipe.blur_sigma),
        angle=rng.uniform(-recipe.rotation, recipe.rotation),
    )


def in_square(view: View, raw: tuple[int, int], size: int) -> tuple[View, tuple[float, ...]]:
    """The view with its box in whole pixels of the resized picture, and left, top, right, bottom.

    The second is the box as drawn, in fractions of these pixels.
    """
    down, across = size / raw[0], size / raw[1]
    top, bottom = view.top * down, (view.top + view.height) * down
    left, right = view.left * across, (view.left + view.width) * across
    rounded = view._replace(
        top=round(top),
        left=round(left),
        height=round(bottom) - round(top),
        width=round(right) - round(left),
    )
    return rounded, (left, top, right, bottom)


def make(raw: np.ndarray, square: np.ndarray, rng: np.random.Generator) -> Made:
    """One draw of a picture, and another, in every way."""
    size, (height, width) = len(square), raw.shape[:2]
    drawn, other = (draw_view(rng, (height, width)) for _ in range(2))
    view, box = in_square(drawn, (height, width), size)
    whole = view._replace(top=0, left=0, height=size, width=size)
    photo = Image.fromarray(square)
    in_8_bits = partial(view_of_8_bits, size=(size, size), kernel=PUBLISHED.blur_kernel)
    return Made(
        reference=in_8_bits(Image.fromarray(raw), drawn),
        resized=in_8_bits(_cropped(photo, box), whole),
        rounded_box=in_8_bits(photo, view),
        ours=_ours(square, view),
        other=_ours(square, in_square(other, (height, width), size)[0]),
    )


def _cropped(photo: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """Left, top, right, bottom of a photo in its size; what lies outside does not shine in."""
    left, top = math.floor(box[0]), math.floor(box[1])
    around = photo.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return around.resize(photo.size, Image.Resampling.BILINEAR, box=inner)


def _ours(square: np.ndarray, view: View) -> np.ndarray:
    parameters = augment.ViewParameters(*map(jnp.array, view))
    unit = jnp.asarray(square, jnp.float32) / 255
    return 255 * np.asarray(apply_view(unit, parameters, recipe=PUBLISHED))


def build_encoder(weights: str | None) -> Encode:
    """The maps of a batch of images in levels; random weights where no file is given."""
    architecture = Architecture("rd", ENCODER, "none", "float32")
    key = jax.random.key(0)
    shapes = nnx.eval_shape(lambda: architecture.build(key).encoder)
    graph, params, statistics = network.split(shapes)
    if weights is None:
        params, statistics = jax.jit(architecture.random_encoder)(key)
    else:
        params, statistics, _ = pretrained.load_encoder(weights, ENCODER, params, statistics)

    @jax.jit
    def encode(levels: jax.Array) -> tuple:
        encoder = nnx.merge(graph, params, statistics)
        return encoder(augment.normalize(levels.astype(jnp.float32) / 255), train=False)

    return encode


def compare(made: Sequence[Made], encode: Encode) -> dict[str, Difference]:
    """The differences of each of PAIRS."""
    sums: dict[str, list[np.ndarray]] = {pair: [] for pair in PAIRS}
    for one in made:
        maps = encode(jnp.stack([jnp.asarray(view, jnp.float32) for view in one]))
        for pair, names in PAIRS.items():
            first, second = (Made._fields.index(name) for name in names)
            gap = np.asarray(one[first], float) - one[second]
            distances = [_cosine_distance(scale[first], scale[second]) for scale in maps]
            sums[pair].append(np.array([np.abs(gap).mean(), np.square(gap).mean(), *distances]))
    means = {pair: np.mean(values, axis=0) for pair, values in sums.items()}
    return {
        pair: Difference(
            levels=float(mean[0]),
            psnr=float(10 * np.log10(255**2 / mean[1])) if mean[1] > 0 else float("inf"),
            cosine=tuple(map(float, mean[2:])),
        )
        for pair, mean in means.items()
    }


def _cosine_distance(first: jax.Array, second: jax.Array) -> float:
    a, b = (np.asarray(maps, float) for maps in (first, second))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.mean(1 - np.sum(a * b, -1) / np.maximum(norms, 1e-16)))


class Crops(NamedTuple):
    """What a rule makes of pictures of one aspect."""

    fallback: float  # share of the draws that never fitted and took the centre
    area: float  # mean share of the picture
    stretch: np.ndarray  # 5, 50, 95 %: the view's width to height, over that of the clean image


def crops_of(rng: np.random.Generator, size: tuple[int, int]) -> Crops:
    """The published crop on pictures of this (height, width), which are squared afterwards."""
    recipe = PUBLISHED
    drawn = [draw_crop(rng, size, recipe.crop_scale, recipe.crop_ratio) for _ in range(CROPS)]
    height, width = np.array(drawn, float).T[2:] / np.array(size)[:, None]
    # Counted by the size; a draw that fits has just this size less than once in a thousand times.
    low, high = recipe.crop_ratio
    central = (min(size[0], round(size[1] / low)), min(size[1], round(size[0] * high)))
    fallback = np.array([box[2:] == central for box in drawn])
    # A narrow crop is widened on its way to the square: a share of the width below that of the
    # height stretches the view across.
    return Crops(
        fallback.mean(), (height * width).mean(), np.quantile(height / width, (5e-2, 0.5, 0.95))
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Difference]:
    """The printed differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", type=Path, help="folder in the MVTec layout")
    parser.add_argument("--size", type=int, default=256, help="side of the resized picture, pixels")
    parser.add_argument("--images", type=int, default=64, help="training pictures, evenly chosen")
    parser.add_argument("--draws", type=int, default=4, help="views of each")
    parser.add_argument("--weights", help=f"a {ENCODER} file of timm; random where left out")
    options = parser.parse_args(arguments)

    records = read_mvtec(options.photos).train
    chosen = np.linspace(0, len(records) - 1, min(options.images, len(records))).round().astype(int)
    rng = np.random.default_rng(0)
    made, aspects = [], []
    for record in (records[i] for i in chosen):
        raw, square = read_image(record, None), read_image(record, options.size)
        aspects.append(raw.shape[1] / raw.shape[0])
        made += [make(raw, square, rng) for _ in range(options.draws)]
    differences = compare(made, build_encoder(options.weights))

    print(f"{len(chosen)} pictures, {options.draws} views each, {options.size} pixels;", end=" ")
    print(f"width / height {min(aspects):.2f} to {max(aspects):.2f}")
    print(
        f"{'':45}levels  PSNR dB  cosine distance of {options.weights or 'random'} {ENCODER} maps"
    )
    for pair, found in differences.items():
        cosines = "  ".join(f"{value:.5f}" for value in found.cosine)
        print(f"{pair:45}{found.levels:6.2f}  {found.psnr:7.1f}  {cosines}")
    print("\nwidth / height   share of fallbacks   mean area   stretch: 5 %, 50 %, 95 %")
    for aspect in ASPECTS:
        crops = crops_of(rng, (1000, round(1000 * aspect)))
        stretch = "  ".join(f"{value:.2f}" for value in crops.stretch)
        print(f"{aspect:14.2f}{crops.fallback:21.0%}{crops.area:12.0%}   {stretch}")
    print("Ours draws on the square, as in the first line, whatever the picture was.")
    return differences


if __name__ == "__main__":
    main()
