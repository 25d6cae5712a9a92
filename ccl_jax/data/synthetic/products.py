"""The ten products, their defects, and one photograph of any of them."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ccl_jax.data.synthetic import objects, textures
from ccl_jax.data.synthetic.canvas import (
    Camera,
    Flaw,
    Grid,
    Surface,
    develop,
    draw_camera,
    make_grid,
    no_flaw,
    photograph,
)
from ccl_jax.data.synthetic.defects import ON_ANY_SURFACE

VISIBLE = 10 / 255  # change of a colour channel, before noise, from which a pixel is defect
LEAST_AREA = 0.0012  # share of the picture that the subtlest defect must change visibly
# Patches whose changed pixels lie apart (chips that are missing, strands that moved): their masks
# close gaps of up to a strand or the space between chips, all others gaps of about two pixels.
LOOSE = frozenset(
    (
        *("bare_patch", "bent_wire", "broken_thread", "clogged", "cut_wire", "misweave"),
        *("pulled_thread", "rust", "underfilled", "wrong_colour"),
    )
)


@dataclasses.dataclass(frozen=True)
class Product:
    """How one class is painted, and the kinds of defect that occur on it."""

    paint: Callable[[Grid, np.random.Generator, Flaw], Surface]
    defects: tuple[str, ...]


# Neighbours share their local texture; a comment names a defect that is normal elsewhere.
PRODUCTS = {
    "weave": Product(
        textures.weave,  # tear: mesh has gaps
        ("broken_thread", "misweave", "pulled_thread", "stain", "tear", "wrong_colour"),
    ),
    "mesh": Product(
        textures.mesh,  # clogged: weave has no gaps
        ("bent_wire", "clogged", "cut_wire", "fibre", "rust"),
    ),
    "leather": Product(
        textures.leather,  # hole: perforated leather has them
        ("cut", "fold", "hole", "scratch", "stain"),
    ),
    "perforated_leather": Product(
        textures.perforated_leather,  # missing_hole: leather has none
        ("cut", "misplaced_hole", "missing_hole", "scratch", "stain", "torn_hole"),
    ),
    "wood": Product(
        textures.wood,  # knot: coasters have them
        ("crack", "hole", "knot", "scratch", "stain"),
    ),
    "coaster": Product(
        objects.coaster,
        ("broken_ring", "burn", "chip", "crack", "misplaced_ring"),
    ),
    "terrazzo": Product(
        textures.terrazzo,  # stripe: capsules carry one; bare_patch: a capsule's cap is bare
        ("bare_patch", "chip", "crack", "stain", "stripe"),
    ),
    "capsule": Product(
        objects.capsule,  # missing_print: terrazzo has none
        ("crack", "dent", "misplaced_print", "missing_print", "underfilled", "wrong_colour"),
    ),
    "nut": Product(
        objects.nut,  # keyway: gears have one
        ("chipped_corner", "keyway", "rust", "scratch", "stripped_thread"),
    ),
    "gear": Product(
        objects.gear,  # missing_keyway: nuts have none
        ("bent_tooth", "missing_keyway", "missing_tooth", "plugged_hole", "rust", "scratch"),
    ),
}


def normal_picture(name: str, image_size: int, seed: tuple[int, ...]) -> np.ndarray:
    """A defect-free product as uint8 [size, size, 3]."""
    grid = make_grid(image_size)
    picture, camera = _picture(name, grid, seed, no_flaw())
    return develop(np.random.default_rng((*seed, 2)), picture, camera)


def anomalous_picture(
    name: str, defect: str, strength: float, image_size: int, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A product with a defect as uint8 [size, size, 3], and its mask with 255 where it differs.

    A defect too faint to be seen is drawn again, somewhat stronger.
    """
    grid = make_grid(image_size)
    without, camera = _picture(name, grid, seed, no_flaw())
    for attempt in range(12):
        flaw = Flaw(
            defect,
            min(1.0, strength + 0.06 * attempt),
            np.random.default_rng((*seed, 3, attempt)),
        )
        picture, _ = _picture(name, grid, seed, flaw)
        mask = difference_mask(without, picture, gap=0.1 if defect in LOOSE else 0.03)
        if mask.mean() >= LEAST_AREA:
            noisy = develop(np.random.default_rng((*seed, 2)), picture, camera)
            return noisy, mask.astype(np.uint8) * 255
    raise RuntimeError(f"{defect} on {name} stays invisible for seed {seed}.")


def difference_mask(without: np.ndarray, picture: np.ndarray, *, gap: float) -> np.ndarray:
    """Where two noise-free pictures differ visibly.

    Gaps up to `gap` (a share of the picture's side) are closed, so that a defect is one region or
    a few; specks below a twentieth of the largest region are left out.
    """
    from scipy import ndimage  # here: a start that generates nothing need not wait for it

    changed = np.abs(picture - without).max(-1) > VISIBLE
    radius = max(1.0, gap * len(changed) / 2)
    padded = np.pad(changed, int(radius) + 2)
    grown = ndimage.distance_transform_edt(~padded) <= radius if changed.any() else padded
    closed = ndimage.distance_transform_edt(grown) > radius
    closed = (closed | padded)[
        int(radius) + 2 : -int(radius) - 2, int(radius) + 2 : -int(radius) - 2
    ]
    region, count = ndimage.label(closed, np.ones((3, 3)))
    area = np.bincount(region.ravel(), minlength=count + 1)
    kept = area >= max(2, 0.05 * area[1:].max(initial=0))
    kept[0] = False
    return kept[region]


def _picture(name: str, grid: Grid, seed: tuple[int, ...], flaw: Flaw) -> tuple[np.ndarray, Camera]:
    """The noise-free photograph; equal seeds differ by the flaw alone."""
    surface = PRODUCTS[name].paint(grid, np.random.default_rng((*seed, 0)), flaw)
    if flaw.kind in ON_ANY_SURFACE:
        ON_ANY_SURFACE[flaw.kind](grid, surface, flaw)
    camera = draw_camera(np.random.default_rng((*seed, 1)))
    return photograph(grid, surface, camera), camera
