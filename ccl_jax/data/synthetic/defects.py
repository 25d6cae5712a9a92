"""Defects that may lie on any surface; those that belong to one product are painted with it."""

import itertools
from collections.abc import Callable

import numpy as np

from ccl_jax.data.synthetic.canvas import (
    Flaw,
    Grid,
    Surface,
    fractal,
    hsv,
    luminance,
    noise,
    rotate,
    step,
    with_luminance,
)


def place(grid: Grid, surface: Surface, flaw: Flaw, *, margin: float = 0.25) -> tuple[float, float]:
    """A point of the product, away from the border of the picture."""
    inside = (np.abs(grid.x) < 1 - margin) & (np.abs(grid.y) < 1 - margin)
    spots = np.flatnonzero((surface.solid > 0.99) & inside)
    spot = spots[flaw.rng.integers(len(spots))]
    return float(grid.x.flat[spot]), float(grid.y.flat[spot])


def line_distance(grid: Grid, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a line through points [n, 2], and the position along it in [0, 1]."""
    best = np.full(grid.x.shape, 1e3, np.float32)
    along = np.zeros(grid.x.shape, np.float32)
    for number, (start, end) in enumerate(itertools.pairwise(points)):
        dx, dy = np.float32(end[0] - start[0]), np.float32(end[1] - start[1])
        px, py = grid.x - np.float32(start[0]), grid.y - np.float32(start[1])
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + np.float32(1e-9)), 0, 1)
        distance = (px - t * dx) ** 2 + (py - t * dy) ** 2
        closer = distance < best
        best = np.where(closer, distance, best)
        along = np.where(closer, (t + number) / (len(points) - 1), along)
    return np.sqrt(best), along


def bent_line(
    flaw: Flaw, centre: tuple[float, float], length: float, *, bend: float, jag: float, parts: int
) -> np.ndarray:
    """Points [parts + 1, 2] of a line through the centre: an arc, with jags across it."""
    t = np.linspace(-0.5, 0.5, parts + 1)
    across = bend * length * (0.25 - t * t) * flaw.rng.choice((-4, 4)) / 2
    across += jag * length * flaw.rng.uniform(-1, 1, parts + 1)
    angle = flaw.rng.uniform(0, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    along = t * length
    line = np.stack([cos * along - sin * across, sin * along + cos * across], 1)
    return line - line[parts // 2] + np.array(centre)


def scratch(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A shallow line: one flank lighter, the other darker, the brightness about the same."""
    points = bent_line(
        flaw, place(grid, surface, flaw), flaw.grade(0.35, 1.0), bend=0.25, jag=0.0, parts=6
    )
    distance, along = line_distance(grid, points)
    width = flaw.grade(1.2, 2.4) * grid.pixel * (0.35 + 2.6 * along * (1 - along))
    groove = step(width - distance, grid.pixel) * surface.solid
    surface.height = surface.height - groove * np.float32(flaw.grade(1.0, 1.8) * grid.pixel)
    lighter = flaw.rng.choice((-0.8, 1.0)) * flaw.grade(0.16, 0.4)
    surface.colour = surface.colour * (1 + groove * np.float32(lighter))[..., None]


def crack(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A jagged dark line with an open middle and a lit edge."""
    points = bent_line(
        flaw, place(grid, surface, flaw), flaw.grade(0.4, 1.1), bend=0.1, jag=0.05, parts=9
    )
    distance, along = line_distance(grid, points)
    width = grid.pixel * flaw.grade(0.9, 2.6) * (0.3 + 2.8 * along * (1 - along))
    opening = step(width - distance, grid.pixel) * surface.solid
    edge = step(2 * width - distance, 2 * grid.pixel) * surface.solid
    surface.height = surface.height - edge * np.float32(1.2 * grid.pixel)
    surface.tint(opening * np.float32(flaw.grade(0.45, 0.85)), surface.colour * np.float32(0.18))


def blob(
    grid: Grid, surface: Surface, flaw: Flaw, radius: float, *, ragged: float = 0.35
) -> np.ndarray:
    """Signed depth of an irregular spot on the product: positive inside, in scene units."""
    cx, cy = place(grid, surface, flaw)
    u, v = rotate(grid.x - np.float32(cx), grid.y - np.float32(cy), flaw.rng.uniform(0, np.pi))
    v = v * np.float32(flaw.rng.uniform(1, 1.8))
    edge = fractal(flaw.rng, u * (1.2 / radius) + 20, v * (1.2 / radius) + 20, 2)
    return np.float32(radius) * (1 + np.float32(ragged) * edge) - np.hypot(u, v)


def stain(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A soaked-in spot of another tint; as often lighter as darker than what it covers."""
    depth = blob(grid, surface, flaw, flaw.grade(0.14, 0.32))
    spot = step(depth, 0.06) * surface.solid
    rim = np.exp(-((depth / 0.03) ** 2)) * surface.solid
    tint = with_luminance(hsv(flaw.rng.uniform(0, 1), flaw.rng.uniform(0.3, 0.55), 0.8), 1.0)
    tint = tint * np.float32(flaw.rng.uniform(0.82, 1.15))
    soaked = surface.colour * tint
    surface.tint(spot * np.float32(flaw.grade(0.45, 0.85)), soaked)
    surface.colour = surface.colour * (1 - np.float32(0.15) * rim)[..., None]


def rust(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A rough orange-brown patch, eaten into the metal."""
    depth = blob(grid, surface, flaw, flaw.grade(0.14, 0.34), ragged=0.5)
    rough = fractal(flaw.rng, grid.x * 14, grid.y * 14, 3)
    patch = step(depth + np.float32(0.05) * rough, 0.05) * surface.solid
    colour = hsv(flaw.rng.uniform(0.04, 0.09), flaw.rng.uniform(0.45, 0.7), 0.7)
    level = float(luminance(surface.colour)[patch > 0.5].mean()) if (patch > 0.5).any() else 0.4
    colour = with_luminance(colour, level * flaw.rng.uniform(0.7, 1.05))
    surface.tint(patch * np.float32(flaw.grade(0.35, 0.85)), colour * (1 + 0.3 * rough)[..., None])
    surface.height = surface.height + patch * rough * np.float32(0.6 * grid.pixel)


def punch(surface: Surface, depth: np.ndarray, pixel: float, *, dark: float = 0.16) -> None:
    """Cuts a hole where depth > 0: dark inside, with a rim that catches the light."""
    inside = step(depth, 1.5 * pixel) * surface.solid
    rim = np.exp(-((depth / np.float32(2 * pixel)) ** 2)) * surface.solid
    surface.height = surface.height * (1 - inside) - inside * np.float32(1.5 * pixel)
    surface.height += rim * np.float32(0.5 * pixel)
    surface.tint(inside, surface.colour.mean((0, 1)) * np.float32(dark))


def hole(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A clean round hole, such as a punch or a worm leaves."""
    cx, cy = place(grid, surface, flaw)
    radius = np.float32(flaw.grade(0.04, 0.1))
    depth = radius - np.hypot(grid.x - np.float32(cx), grid.y - np.float32(cy))
    punch(surface, depth, grid.pixel)


def cut(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A straight gash with raised lips."""
    points = bent_line(
        flaw, place(grid, surface, flaw), flaw.grade(0.25, 0.7), bend=0.06, jag=0.0, parts=4
    )
    distance, along = line_distance(grid, points)
    width = grid.pixel * flaw.grade(1.0, 2.6) * (0.2 + 3.2 * along * (1 - along))
    lips = np.exp(-(((distance - width) / np.float32(2.2 * grid.pixel)) ** 2)) * surface.solid
    lips *= step(along * (1 - along) - 0.02, 0.04)
    surface.height = surface.height + lips * np.float32(flaw.grade(0.8, 1.8) * grid.pixel)
    surface.tint(step(width - distance, grid.pixel) * surface.solid, surface.colour * 0.25)


def fold(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A crease: a ridge that is lit on one flank and in shadow on the other."""
    points = bent_line(
        flaw, place(grid, surface, flaw), flaw.grade(0.7, 1.6), bend=0.3, jag=0.01, parts=7
    )
    distance, along = line_distance(grid, points)
    wide = np.float32(flaw.grade(0.03, 0.06))
    ridge = np.exp(-((distance / wide) ** 2)) * (4 * along * (1 - along)) ** 0.5
    surface.height = surface.height + ridge * wide * np.float32(flaw.grade(0.8, 1.5))


def stripe(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A printed band where none belongs."""
    cx, cy = place(grid, surface, flaw)
    angle, half = flaw.rng.uniform(0, np.pi), flaw.grade(0.025, 0.06)
    u, v = rotate(grid.x - np.float32(cx), grid.y - np.float32(cy), angle)
    length = flaw.grade(0.3, 0.9)
    band = step(half - np.abs(v), grid.pixel) * step(length / 2 - np.abs(u), grid.pixel)
    ink = hsv(flaw.rng.uniform(0.55, 0.68), 0.6, 0.45)
    worn = 0.75 + 0.25 * noise(flaw.rng, grid.x * 12, grid.y * 12)
    surface.tint(band * surface.solid * np.float32(flaw.grade(0.35, 0.85)) * worn, ink)


def fibre(grid: Grid, surface: Surface, flaw: Flaw) -> None:
    """A loose thread lying on the product, with the shadow it casts."""
    points = bent_line(
        flaw, place(grid, surface, flaw), flaw.grade(0.5, 1.2), bend=0.9, jag=0.02, parts=9
    )
    distance, _ = line_distance(grid, points)
    half = np.float32(flaw.grade(0.9, 1.6) * grid.pixel)
    shadow = np.exp(-((distance / (3 * half)) ** 2))
    surface.colour = surface.colour * (1 - np.float32(0.2) * shadow)[..., None]
    colour = hsv(flaw.rng.uniform(0, 1), flaw.grade(0.1, 0.5), flaw.rng.uniform(0.45, 0.75))
    body = step(half - distance, grid.pixel)
    surface.tint(body * np.float32(flaw.grade(0.7, 1.0)), colour)
    surface.height = surface.height + body * half


ON_ANY_SURFACE: dict[str, Callable[[Grid, Surface, Flaw], None]] = {
    "crack": crack,
    "cut": cut,
    "fibre": fibre,
    "fold": fold,
    "hole": hole,
    "rust": rust,
    "scratch": scratch,
    "stain": stain,
    "stripe": stripe,
}
