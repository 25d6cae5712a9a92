"""Pictures and views for the tests of the second view, and our view of them."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from PIL import Image

from ccl_jax import augment
from ccl_jax.benchmark.published import RECIPE as PUBLISHED
from tests.reference.torch_augment import View

NO_BLUR = dataclasses.replace(PUBLISHED, blur_kernel=1)

apply_view = jax.jit(augment.apply_view, static_argnames="recipe")


def picture(height, width, seed):
    """A colourful 8-bit picture, smooth with some noise."""
    rng = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (4, 4, 0))
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 235 + rng.normal(0, 6, smooth.shape) + 10
    return np.clip(smooth, 0, 255).astype(np.uint8)


def any_view(seed, height, width, order):
    """A view far beyond the published ranges; numbers that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    crop_height, crop_width = (int(rng.integers(1, size + 1)) for size in (height, width))
    ranges = ((0, 2), (0, 2), (0, 2), (-0.5, 0.5), (0.1, 3), (-180, 180))
    brightness, contrast, saturation, hue, sigma, angle = (
        float(np.float32(rng.uniform(low, high))) for low, high in ranges
    )
    return View(
        top=int(rng.integers(height - crop_height + 1)),
        left=int(rng.integers(width - crop_width + 1)),
        height=crop_height,
        width=crop_width,
        flip_horizontal=bool(seed & 1),
        flip_vertical=bool(seed & 2),
        order=list(order),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grayscale=seed % 5 == 0,
        sigma=sigma,
        angle=angle,
    )


def ours(image, view, recipe=PUBLISHED, dtype=jnp.float32):
    """Our view of an image in [0, 1]."""
    parameters = augment.ViewParameters(*map(jnp.array, view))
    return np.asarray(apply_view(jnp.asarray(image, dtype), parameters, recipe=recipe))


def png(pixels):
    """The bytes of a lossless picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
