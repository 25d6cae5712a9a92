"""Products that lie on a background, in any pose: coaster, capsule, nut and gear."""

import numpy as np

from ccl_jax.data.synthetic.canvas import (
    Flaw,
    Grid,
    Surface,
    fractal,
    hsv,
    jittered_hsv,
    luminance,
    mix,
    noise,
    rotate,
    step,
    with_luminance,
)
from ccl_jax.data.synthetic.textures import bench, grain, speckle

TEETH = 14


def lay(
    grid: Grid, under: Surface, colour: np.ndarray, depth: np.ndarray, height: np.ndarray
) -> Surface:
    """The object over its background, with a soft shadow; `depth` is positive inside."""
    from scipy import ndimage  # here: a start that generates nothing need not wait for it

    cover = step(depth, 1.5 * grid.pixel)
    shift = round(0.03 * len(cover))
    shadow = ndimage.uniform_filter(
        np.roll(cover, (shift, shift), (0, 1)), round(0.06 * len(cover))
    )
    ground = under.colour * (1 - np.float32(0.45) * shadow)[..., None]
    return Surface(mix(ground, colour, cover), mix_plane(under.height, height, cover), cover)


def mix_plane(under: np.ndarray, over: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Heights between two, by weights."""
    return under + (over - under) * weight


def pose(
    grid: Grid, rng: np.random.Generator, *, reach: float, scale: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Coordinates of an object of unit size that lies turned and off the centre, and its size."""
    size = rng.uniform(*scale)
    x = (grid.x - np.float32(rng.uniform(-reach, reach))) / np.float32(size)
    y = (grid.y - np.float32(rng.uniform(-reach, reach))) / np.float32(size)
    u, v = rotate(x, y, rng.uniform(0, 2 * np.pi))
    return u, v, size


def brushed(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Colour of brushed steel; the brush went along u."""
    steel = jittered_hsv(rng, 0.58, 0.06, 0.66)
    lines = noise(rng, u * 2 + 20, v * 38 + 20) + 0.6 * noise(rng, u * 5 + 20, v * 60 + 20)
    cloud = fractal(rng, u * 1.5 + 9, v * 1.5 + 9, 2)
    return steel * (1 + 0.1 * lines + 0.1 * cloud)[..., None]


def coaster(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """A turned disc of knotty wood with an engraved ring: here knots are normal."""
    under = bench(grid, rng, "weave")
    u, v, size = pose(grid, rng, reach=0.1, scale=(0.72, 0.82))
    radius, around = np.hypot(u, v), np.arctan2(v, u)
    knots = [
        (
            rng.uniform(-0.6, 0.6),
            rng.uniform(-0.6, 0.6),
            rng.uniform(0.07, 0.15),
            rng.uniform(0.5, 0.8),
        )
        for _ in range(rng.integers(1, 4))
    ]
    colour, height = grain(rng, u, v, knots=knots)
    depth = 1 - radius
    if flaw.kind == "chip":
        where = flaw.rng.uniform(-np.pi, np.pi)
        bite = np.hypot(u - 1.02 * np.cos(where), v - 1.02 * np.sin(where))
        rough = 0.03 * noise(flaw.rng, u * 14, v * 14)
        depth = np.minimum(depth, bite - flaw.grade(0.1, 0.3) + rough)
    ring_u, ring_v, kept = u, v, np.ones_like(u)
    if flaw.kind == "misplaced_ring":
        away, off = flaw.rng.uniform(0, 2 * np.pi), flaw.grade(0.05, 0.13)
        ring_u, ring_v = u - off * np.cos(away), v - off * np.sin(away)
    elif flaw.kind == "broken_ring":
        where = flaw.rng.uniform(-np.pi, np.pi)
        gap = np.abs((around - where + np.pi) % (2 * np.pi) - np.pi)
        kept = step(gap - flaw.grade(0.2, 1.1), 0.04)
    groove = step(0.028 - np.abs(np.hypot(ring_u, ring_v) - 0.74), 0.02) * kept
    edge = np.minimum(depth, 0.06) * size
    height = height + edge - groove * np.float32(0.03)
    colour = colour * (1 - 0.45 * groove)[..., None]
    disc = lay(grid, under, colour, depth * np.float32(size), height)
    if flaw.kind == "burn":
        _burn(disc, flaw, u, v)
    return disc


def _burn(disc: Surface, flaw: Flaw, u: np.ndarray, v: np.ndarray) -> None:
    """The ring that a hot cup leaves, darker in the middle of its edge."""
    cx, cy = flaw.rng.uniform(-0.35, 0.35, 2)
    wobble = 0.05 * noise(flaw.rng, u * 3, v * 3)
    ring = np.abs(np.hypot(u - cx, v - cy) - flaw.grade(0.2, 0.4) + wobble)
    mark = np.exp(-((ring / np.float32(flaw.grade(0.04, 0.09))) ** 2)) * disc.solid
    disc.tint(mark * np.float32(flaw.grade(0.35, 0.75)), disc.colour * hsv(0.05, 0.45, 0.42))


def capsule(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """A two-part capsule: a coloured cap with a printed band, and a body that shows granules."""
    under = bench(grid, rng, "felt")
    u, v, size = pose(grid, rng, reach=0.1, scale=(0.74, 0.84))
    radius = np.float32(0.4) + np.float32(0.015) * (u < 0)
    if flaw.kind == "dent":
        side, where = flaw.rng.choice((-1, 1)), flaw.rng.uniform(-0.5, 0.5)
        bump = np.exp(-(((u - where) / flaw.grade(0.12, 0.24)) ** 2))
        squeeze = 1 + bump * (v * side > 0) * np.float32(flaw.grade(0.25, 0.75))
        v = v * squeeze
    off_axis = np.hypot((np.abs(u) - (1 - radius)).clip(0), v)
    depth = radius - off_axis
    cap = jittered_hsv(rng, 0.58, 0.6, 0.6)
    base = jittered_hsv(rng, 0.12, 0.1, 0.76, spread=0.8)
    bare = np.zeros_like(u)
    if flaw.kind == "underfilled":
        bare = step(u - 1 + flaw.grade(0.45, 0.8) + 0.08 * noise(flaw.rng, u * 5, v * 5), 0.05)
    body = speckle(rng, u * 7.5 + 30, v * 7.5 + 30, base, bare)
    shown_cap = cap
    if flaw.kind == "wrong_colour":
        off = hsv(0.58 + flaw.rng.choice((-1, 1)) * flaw.grade(0.09, 0.4), 0.6, 0.6)
        shown_cap = with_luminance(off, float(luminance(cap)))
    colour = mix(body, np.broadcast_to(shown_cap, body.shape), step(-u, 0.02))
    colour = _print(colour, flaw, u, v)
    seam = np.exp(-((u / np.float32(0.02)) ** 2))
    roundness = np.sqrt((1 - (off_axis / radius) ** 2).clip(0))
    colour = colour * (0.45 + 0.6 * roundness - 0.2 * seam)[..., None]
    height = roundness * np.float32(0.3 * size)
    pill = lay(grid, under, colour, depth * np.float32(size), height)
    across = np.abs(v + 0.16) / 0.05
    gleam = step(1.2 - across, 1.2) * step(0.95 - np.abs(u), 0.3) * pill.solid
    pill.tint(gleam * np.float32(0.35), np.ones(3, np.float32))
    return pill


def _print(colour: np.ndarray, flaw: Flaw, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The band on the cap and the thin line beside it, or what went wrong with them."""
    centre, slant, kept = -0.42, 0.0, np.ones_like(u)
    if flaw.kind == "misplaced_print":
        centre += flaw.rng.choice((-1, 1)) * flaw.grade(0.06, 0.2)
        slant = flaw.rng.choice((-1, 1)) * flaw.grade(0.05, 0.5)
    elif flaw.kind == "missing_print":
        kept = step(v - 0.42 + flaw.grade(0.35, 0.85) + 0.05 * noise(flaw.rng, u * 9, v * 9), 0.03)
        kept = 1 - kept
    place = u + np.float32(slant) * v - np.float32(centre)
    band = step(0.06 - np.abs(place), 0.02) + step(0.018 - np.abs(place - 0.13), 0.02)
    return mix(colour, hsv(0.13, 0.15, 0.9), band * kept * np.float32(0.85))


def nut(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """A hexagon nut of brushed steel with a threaded bore, on a wooden bench."""
    under = bench(grid, rng, "wood")
    u, v, size = pose(grid, rng, reach=0.12, scale=(0.68, 0.78))
    flat = np.float32(np.sqrt(0.75))
    sides = np.stack(
        [np.abs(rotate(u, v, turn)[0]) for turn in np.pi / 6 + np.arange(3) * np.pi / 3]
    )
    depth = flat - sides.max(0)
    radius, around = np.hypot(u, v), np.arctan2(v, u)
    chamfer = (radius - np.float32(0.88)).clip(0)
    if flaw.kind == "chipped_corner":
        corner = flaw.rng.integers(6) * np.pi / 3
        reach = u * np.cos(corner) + v * np.sin(corner)
        rough = 0.03 * noise(flaw.rng, u * 12, v * 12)
        depth = np.minimum(depth, 1 - flaw.grade(0.07, 0.24) - reach + rough)
    colour = brushed(rng, *rotate(u, v, rng.uniform(0, np.pi)))
    height = np.minimum(depth, 0.05) * np.float32(size) - chamfer * np.float32(0.6 * size)
    bore = _bore(flaw, u, v)
    thread = 0.5 + 0.5 * np.cos((radius - 0.3) * np.float32(2 * np.pi / 0.055) + around)
    if flaw.kind == "stripped_thread":
        where, wide = flaw.rng.uniform(-np.pi, np.pi), flaw.grade(0.45, 1.8)
        worn = step(wide - np.abs((around - where + np.pi) % (2 * np.pi) - np.pi), 0.1)
        thread = thread * (1 - worn) + np.float32(0.35) * worn
    steel = luminance(colour).mean() * (0.25 + 0.6 * thread) * step(radius - 0.3, 0.04)
    inside = step(bore, 1.5 * grid.pixel)
    walls = steel[..., None] * hsv(0.58, 0.06, 1.0)
    ground = under.colour * np.float32(0.35)
    walls = mix(ground, walls, step(radius - 0.3, 0.03))
    colour = mix(colour, walls, inside)
    height = height * (1 - inside)
    piece = lay(grid, under, colour, depth * np.float32(size), height)
    piece.solid = piece.solid * (1 - inside)
    return piece


def _bore(flaw: Flaw, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Depth in the nut's bore: round; a keyway as in the gear is a defect here."""
    radius = np.hypot(u, v)
    if flaw.kind != "keyway":
        return np.float32(0.46) - radius
    turned_u, turned_v = rotate(u, v, flaw.rng.uniform(0, 2 * np.pi))
    slot = np.minimum(0.085 - np.abs(turned_v), 0.46 + flaw.grade(0.06, 0.2) - turned_u)
    return np.maximum(np.float32(0.46) - radius, np.minimum(slot, turned_u))


def gear(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """A toothed wheel of the nut's steel, with five holes and a bore with a keyway."""
    under = bench(grid, rng, "felt")
    u, v, size = pose(grid, rng, reach=0.08, scale=(0.78, 0.86))
    radius, around = np.hypot(u, v), np.arctan2(v, u)
    tooth = (np.cos(around * TEETH) * 2.2 + 0.2).clip(-1, 1) * 0.5 + 0.5
    if flaw.kind in ("missing_tooth", "bent_tooth"):
        tooth = _spoilt_teeth(flaw, around, tooth)
    depth = (0.82 + 0.18 * tooth - radius) * np.float32(0.8)
    turn = np.round(around / (2 * np.pi / 5)) * (2 * np.pi / 5)
    near, side = rotate_by(u, v, turn)
    opening = np.float32(0.11) - np.hypot(near - 0.54, side)
    if flaw.kind == "plugged_hole":
        chosen = (turn / (2 * np.pi / 5)).round().astype(int) % 5 == flaw.rng.integers(5)
        opening = np.where(chosen, opening - np.float32(flaw.grade(0.045, 0.3)), opening)
    slot_depth = 0.13
    if flaw.kind == "missing_keyway":
        slot_depth *= flaw.grade(0.55, 0.0)
    slot = np.minimum(0.07 - np.abs(v), 0.25 + slot_depth - u)
    bore = np.maximum(0.25 - radius, np.minimum(slot, u))
    opening = np.maximum(opening, bore)
    colour = brushed(rng, *rotate(u, v, rng.uniform(0, np.pi)))
    rim = np.exp(-(((radius - 0.74) / 0.02) ** 2))
    height = np.minimum(np.minimum(depth, -opening), 0.05).clip(-0.02) - np.float32(0.012) * rim
    solid_depth = np.minimum(depth, -opening)
    return lay(grid, under, colour, solid_depth * np.float32(size), height * np.float32(size))


def rotate_by(u: np.ndarray, v: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction that differs from sample to sample."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * u + sin * v, cos * v - sin * u


def _spoilt_teeth(flaw: Flaw, around: np.ndarray, tooth: np.ndarray) -> np.ndarray:
    """Tooth profiles of which one is worn or missing, or leans to a side."""
    which = flaw.rng.integers(TEETH) * 2 * np.pi / TEETH
    off = (around - which + np.pi) % (2 * np.pi) - np.pi
    mine = np.abs(off) < np.pi / TEETH * (2.999 if flaw.kind == "bent_tooth" else 1)
    if flaw.kind == "missing_tooth":
        return np.where(mine, tooth * np.float32(flaw.grade(0.6, -0.1)), tooth)
    lean = flaw.rng.choice((-1, 1)) * flaw.grade(0.2, 0.5) * 2 * np.pi / TEETH
    alone = np.abs(off) < np.pi / TEETH
    bent = (np.cos((off - lean) * TEETH) * 2.2 + 0.2).clip(-1, 1) * 0.5 + 0.5
    bent = np.where(np.abs(off - lean) < np.pi / TEETH, bent, np.where(alone, 0, tooth))
    return np.where(mine, bent, tooth)
