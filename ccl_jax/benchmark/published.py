"""The published training step, put together without a config and without what reads one.

GPU images often have jax, flax, optax and orbax, but neither ml-collections nor what reads data. A
test compares these numbers with configs/mvtec.py.
"""

import dataclasses

import optax

from ccl_jax.augment import Recipe
from ccl_jax.objective import LossSettings
from ccl_jax.scoring import MapSettings
from ccl_jax.state import make_optimizer

LOSSES = LossSettings(
    cosine_weight=1.0,
    cosine_flat=True,
    local_weight=1.0,
    local_temperature=0.05,
    local_window=None,
    local_same_class=False,
    local_reach=None,
    global_weight=1.0,
    global_temperature=0.05,
    global_form="two_view",
)
RECIPE = Recipe(
    crop_scale=(0.8, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    horizontal_flip=0.5,
    vertical_flip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.2,
    blur_kernel=23,
    blur_sigma=(0.1, 2.0),
    rotation=15.0,
)
OPTIMIZER = {
    "projector_lr": 1e-3,
    "lr": 5e-3,
    "betas": (0.5, 0.999),
    "clip_norm": 5.0,
    "decay_step": None,
}
PROJECTOR = "plain"
NOISE_PROBABILITY = 0.3085
CLASSES = 15  # of MVTec AD
SEED = 42


def optimizer() -> optax.GradientTransformation:
    """The published optimizer."""
    return make_optimizer(**OPTIMIZER)  # type: ignore[arg-type]


def losses(compute_dtype: str) -> LossSettings:
    """The published losses; maps are multiplied in, and travel in, the dtype of the network."""
    return dataclasses.replace(LOSSES, maps_dtype=compute_dtype)


def maps(image_size: int) -> MapSettings:
    """How features become score maps of images of that many pixels."""
    return MapSettings(size=image_size, sigma=4.0, combine="add", distance="cosine", pool=1)
