"""Materials that fill the picture: weave and mesh, two leathers, wood and terrazzo.

Each pair shares its local texture with another product, and what is normal on one of a pair is a
defect on the other.
"""

import numpy as np

from ccl_jax.data.synthetic.canvas import (
    Flaw,
    Grid,
    Surface,
    cells,
    fractal,
    hsv,
    jittered_hsv,
    luminance,
    mix,
    no_flaw,
    noise,
    rotate,
    step,
    with_luminance,
)
from ccl_jax.data.synthetic.defects import punch

HOLE_PITCH = 0.36  # scene units between the holes of perforated leather
HOLE_RADIUS = 0.075


def _spot(flaw: Flaw) -> tuple[float, float]:
    """A place for a flaw that is built into the texture."""
    return flaw.rng.uniform(-0.65, 0.65), flaw.rng.uniform(-0.65, 0.65)


def _strand(offset: np.ndarray, fill: float) -> np.ndarray:
    """Height in [0, 1] of a round strand over its place, 0 outside of it."""
    return np.sqrt((1 - (offset * np.float32(2 / fill)) ** 2).clip(0))


def _missing_strand(flaw: Flaw, strand: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The strands without a stretch of the one nearest to the flaw's place; ends are frayed."""
    du, dv = u - round(flaw.rng.uniform(-4, 4)), v - flaw.rng.uniform(-5, 5)
    half = flaw.grade(1.0, 4.5)
    gone = (np.abs(du) < 0.5) & (np.abs(dv) < half + 0.4 * np.sin(9 * du))
    return np.where(gone, np.float32(0), strand)


def _push(flaw: Flaw, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Strands pushed sideways around the flaw's place."""
    du, dv = u - flaw.rng.uniform(-4, 4), v - flaw.rng.uniform(-4, 4)
    bump = np.exp(-((du / 1.3) ** 2) - (dv / 2.2) ** 2)
    return u + bump * np.float32(flaw.rng.choice((-1, 1)) * flaw.grade(0.4, 0.95))


def interlace(
    grid: Grid,
    rng: np.random.Generator,
    flaw: Flaw,
    *,
    pitch: float,
    fill: float,
    colours: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Surface:
    """Plain-woven strands, `fill` pitches wide; colours: one way, the other way, the gaps."""
    u, v = rotate(grid.x, grid.y, rng.uniform(-0.15, 0.15))
    sway = np.float32(0.25 * pitch)
    u, v = u + sway * noise(rng, u * 1.5, v * 1.5), v + sway * noise(rng, u * 1.5, v * 1.5)
    u = u / np.float32(pitch) + np.float32(rng.uniform(0, 2))
    v = v / np.float32(pitch) + np.float32(rng.uniform(0, 2))
    along, across = (rng.uniform(0.85, 1.15, 256).astype(np.float32) for _ in range(2))
    if flaw.kind in ("pulled_thread", "bent_wire"):
        u = _push(flaw, u, v)
    column, row = np.rint(u), np.rint(v)
    warp, weft = _strand(u - column, fill), _strand(v - row, fill)
    if flaw.kind in ("broken_thread", "cut_wire"):
        warp = _missing_strand(flaw, warp, u, v)
    phase = column
    if flaw.kind == "misweave":
        cx, cy = _spot(flaw)
        near = np.hypot(u - cx / pitch, (v - cy / pitch) * 1.6) < flaw.grade(1.6, 4.2)
        phase = np.where(near, np.floor(column / 2), column)
    lift = np.float32(0.5)
    top_warp = warp + lift * np.cos(np.pi * (v + phase)) - 9 * (warp <= 0)
    top_weft = weft + lift * np.cos(np.pi * (u + row + 1 + phase - column)) - 9 * (weft <= 0)
    over = top_warp > top_weft
    body = np.where(over, warp, weft)
    which = np.where(over, along[column.astype(int) & 255], across[row.astype(int) & 255])
    yarn = 1 + np.float32(0.14) * noise(
        rng, np.where(over, u * 9, u * 3), np.where(over, v * 3, v * 9)
    )
    strands = np.where(over[..., None], colours[0], colours[1])
    strands = strands * (which * yarn * (0.5 + 0.5 * body))[..., None]
    solid = step(body - 0.1, 0.2)
    height = np.maximum(top_warp, top_weft).clip(-0.6, 2) * np.float32(0.22 * pitch)
    return Surface(mix(np.broadcast_to(colours[2], strands.shape), strands, solid), height, solid)


def weave(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Woven cloth of two thread colours, close enough to hide what is behind."""
    ink = jittered_hsv(rng, 0.58, 0.25, 0.72)
    other = jittered_hsv(rng, 0.11, 0.12, 0.82)
    if flaw.kind == "wrong_colour":
        ink_off = hsv(flaw.rng.uniform(0.9, 1.15), flaw.grade(0.3, 0.6), 0.8)
        ink_off = with_luminance(ink_off, float(luminance(ink)))
    behind = hsv(rng.uniform(0.05, 0.65), 0.1, rng.uniform(0.12, 0.2))
    cloth = interlace(
        grid, rng, flaw, pitch=rng.uniform(0.112, 0.128), fill=0.96, colours=(ink, other, behind)
    )
    if flaw.kind == "tear":
        _torn(grid, cloth, flaw, behind)
    elif flaw.kind == "wrong_colour":
        cx, _ = _spot(flaw)
        band = step(flaw.grade(0.06, 0.16) - np.abs(grid.x - cx), 0.01)
        weight = band * (np.abs(cloth.colour - ink).sum(-1) < np.abs(cloth.colour - other).sum(-1))
        level = luminance(cloth.colour) / luminance(ink_off)
        cloth.tint(weight * np.float32(flaw.grade(0.5, 0.9)), ink_off * level[..., None])
    cloth.solid = np.ones_like(cloth.solid)
    return cloth


def _torn(grid: Grid, cloth: Surface, flaw: Flaw, behind: np.ndarray) -> None:
    """A ragged opening through which the background shows."""
    cx, cy = _spot(flaw)
    distance = np.hypot(grid.x - cx, grid.y - cy) + 0.04 * noise(flaw.rng, grid.x * 14, grid.y * 14)
    opening = step(flaw.grade(0.07, 0.19) - distance, 0.02)
    cloth.tint(opening, behind)
    cloth.height = cloth.height * (1 - opening) - opening * np.float32(0.02)


def mesh(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Wire cloth: the same interlacing, in metal and with gaps."""
    metal = jittered_hsv(rng, 0.58, 0.08, 0.75)
    behind = hsv(rng.uniform(0.05, 0.65), 0.1, rng.uniform(0.12, 0.24))
    pitch = rng.uniform(0.155, 0.17)
    wires = interlace(grid, rng, flaw, pitch=pitch, fill=0.5, colours=(metal, metal * 0.92, behind))
    if flaw.kind == "clogged":
        cx, cy = _spot(flaw)
        edge = 0.05 * noise(flaw.rng, grid.x * 9, grid.y * 9)
        paste = step(flaw.grade(0.1, 0.26) - np.hypot(grid.x - cx, grid.y - cy) + edge, 0.03)
        level = 0.9 * float(luminance(wires.colour).mean())
        colour = with_luminance(hsv(flaw.rng.uniform(0.05, 0.6), 0.15, 0.6), level)
        wires.tint(paste * (1 - wires.solid) * np.float32(flaw.grade(0.6, 1.0)), colour)
    return wires


def leather(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Pebbled hide."""
    dye = jittered_hsv(rng, 0.07, 0.5, 0.5)
    scale = np.float32(rng.uniform(15, 18))
    u, v = rotate(grid.x, grid.y, rng.uniform(0, np.pi))
    u, v = u + 0.03 * noise(rng, u * 5, v * 5), v + 0.03 * noise(rng, u * 5, v * 5)
    near, far, _ = cells(rng, u * scale * 1.15 + 30, v * scale + 30)
    pebble = step(far - near - 0.16, 0.45)
    patina = 1 + 0.16 * fractal(rng, grid.x * 1.6 + 9, grid.y * 1.6 + 9, 3)
    shade = (0.6 + 0.4 * pebble) * patina
    height = (pebble - 0.5 * near) * np.float32(0.45 / scale)
    return Surface(dye * shade[..., None], height, np.ones_like(near))


def perforated_leather(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """The same hide with a square pattern of punched holes."""
    hide = leather(grid, rng, flaw)
    u, v = rotate(grid.x, grid.y, rng.uniform(-0.12, 0.12))
    u = u / np.float32(HOLE_PITCH) + np.float32(rng.uniform(0, 1))
    v = v / np.float32(HOLE_PITCH) + np.float32(rng.uniform(0, 1))
    column, row = np.rint(u), np.rint(v)
    fu, fv = (u - column) * np.float32(HOLE_PITCH), (v - row) * np.float32(HOLE_PITCH)
    depth = np.float32(HOLE_RADIUS) - np.hypot(fu, fv)
    if flaw.kind in ("missing_hole", "misplaced_hole", "torn_hole"):
        chosen = (column == flaw.rng.integers(-1, 2)) & (row == flaw.rng.integers(-1, 2))
        depth = np.where(chosen, _spoilt_hole(flaw, fu, fv), depth)
    punch(hide, depth, grid.pixel)
    hide.solid = step(-depth, grid.pixel)
    return hide


def _spoilt_hole(flaw: Flaw, fu: np.ndarray, fv: np.ndarray) -> np.ndarray:
    """Depth of a hole that is too small or absent, beside its place, or torn open."""
    angle = flaw.rng.uniform(0, 2 * np.pi)
    if flaw.kind == "missing_hole":
        return np.float32(HOLE_RADIUS * flaw.grade(0.65, -0.5)) - np.hypot(fu, fv)
    if flaw.kind == "misplaced_hole":
        away = flaw.grade(0.035, 0.1)
        off_u, off_v = fu - away * np.cos(angle), fv - away * np.sin(angle)
        return HOLE_RADIUS - np.hypot(off_u, off_v)
    along, across = rotate(fu, fv, angle)
    reach = flaw.grade(0.09, 0.22)
    slit = (HOLE_RADIUS * 0.85) * (1 - along / (HOLE_RADIUS + reach)) - np.abs(across)
    slit = np.minimum(slit + 0.008 * np.sin(60 * along), along)
    return np.maximum(HOLE_RADIUS - np.hypot(fu, fv), slit)


def grain(
    rng: np.random.Generator,
    u: np.ndarray,
    v: np.ndarray,
    *,
    knots: list[tuple[float, float, float, float]],
) -> tuple[np.ndarray, np.ndarray]:
    """Colour and height of sawn wood, its grain along u; a knot is (u, v, radius, darkness)."""
    light = jittered_hsv(rng, 0.085, 0.42, 0.72)
    dark = light * np.array([0.66, 0.56, 0.48], np.float32)
    bend = 0.16 * noise(rng, u * 0.7 + 20, v * 0.9 + 20) + 0.03 * noise(rng, u * 2.5, v * 4)
    ring = v + bend
    burl = np.zeros_like(u)
    for knot_u, knot_v, radius, darkness in knots:
        du, dv = (u - np.float32(knot_u)) * np.float32(0.7), v - np.float32(knot_v)
        distance = np.hypot(du, dv) / np.float32(radius) + np.float32(1e-3)
        weight = step(1.9 - distance, 1.4)
        ring = ring - weight * dv * np.minimum(1, 1 / distance**2)
        inside = step(1.08 - distance, 0.3)
        ring = ring + inside * distance * np.float32(radius)
        burl = np.maximum(burl, inside * np.float32(darkness))
    phase = ring * np.float32(rng.uniform(6.0, 7.5)) + np.float32(rng.uniform(0, 1))
    phase = phase - np.floor(phase)
    late = phase**3 * step(0.97 - phase, 0.06)
    streak = noise(rng, u * 3 + 20, ring * 60 + 20)
    pores = step(noise(rng, u * 7 + 20, ring * 85 + 20) - 0.62, 0.3)
    colour = mix(light, dark, (0.75 * late + 0.12 * streak + 0.3 * pores).clip(0, 1))
    colour = colour * (1 + 0.05 * noise(rng, u * 1.2 + 9, v * 5 + 9))[..., None]
    colour = mix(colour, dark * np.array([0.6, 0.5, 0.45], np.float32), burl)
    return colour, (-0.004 * pores - 0.003 * late).astype(np.float32)


def wood(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """A planed plank of clear wood: straight grain, no knots."""
    u, v = rotate(grid.x, grid.y, np.pi / 2 + rng.uniform(-0.12, 0.12))
    knots = []
    if flaw.kind == "knot":
        knots.append((*_spot(flaw), flaw.grade(0.05, 0.13), flaw.grade(0.45, 0.85)))
    colour, height = grain(rng, u, v, knots=knots)
    return Surface(colour, height, np.ones_like(u))


def speckle(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, base: np.ndarray, bare: np.ndarray
) -> np.ndarray:
    """A base with chips of four colours scattered in it, none where `bare` is 1."""
    chips = np.stack(
        [base * 0.55, jittered_hsv(rng, 0.08, 0.4, 0.55), hsv(0.6, 0.15, 0.42), base * 1.12]
    ).clip(0, 1)
    near, far, number = cells(rng, u, v, jitter=1.0)
    size = rng.uniform(-0.05, 0.42, 4096).astype(np.float32)[number]
    colour = chips[rng.choice(4, 4096, p=(0.3, 0.25, 0.25, 0.2))][number]
    weight = step(np.minimum(size - near, far - near - 0.08), 0.1) * (1 - bare)
    return mix(np.broadcast_to(base, colour.shape), colour, weight * np.float32(0.9))


def terrazzo(grid: Grid, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """A polished tile with coloured chips."""
    base = jittered_hsv(rng, 0.12, 0.1, 0.74, spread=0.8)
    u, v = rotate(grid.x, grid.y, rng.uniform(0, np.pi))
    bare = np.zeros_like(u)
    if flaw.kind == "bare_patch":
        cx, cy = _spot(flaw)
        edge = 0.05 * noise(flaw.rng, grid.x * 6, grid.y * 6)
        bare = step(flaw.grade(0.16, 0.36) - np.hypot(grid.x - cx, grid.y - cy) + edge, 0.03)
    colour = speckle(rng, u * 9 + 30, v * 9 + 30, base, bare)
    cloud = 1 + 0.05 * fractal(rng, grid.x * 2 + 9, grid.y * 2 + 9, 3)
    tile = Surface(colour * cloud[..., None], np.zeros_like(u), np.ones_like(u))
    if flaw.kind == "chip":
        cx, cy = _spot(flaw)
        rough = fractal(flaw.rng, grid.x * 11, grid.y * 11, 3)
        depth = flaw.grade(0.06, 0.17) - np.hypot(grid.x - cx, grid.y - cy) + 0.05 * rough
        pit = step(depth, 0.02)
        tile.height = -pit * (0.02 + 0.012 * rough)
        tile.tint(pit * np.float32(0.8), base * (0.82 + 0.2 * rough)[..., None])
    return tile


def bench(grid: Grid, rng: np.random.Generator, material: str) -> Surface:
    """What an object lies on: "felt", or one of the products that fill the picture."""
    if material == "wood":
        return wood(grid, rng, no_flaw())
    if material == "weave":
        return weave(grid, rng, no_flaw())
    felt = jittered_hsv(rng, 0.6, 0.15, rng.uniform(0.25, 0.45))
    nap = 1 + 0.1 * fractal(rng, grid.x * 20 + 9, grid.y * 20 + 9, 3)
    return Surface(felt * nap[..., None], np.zeros_like(nap), np.ones_like(nap))
