"""Procedural pictures of products: bodies with parts on a ground, and surfaces in relief.

They follow `images`: a law fixes the product, a source the numbers of one picture of it. What lies
where it falls (pose, grain, direction of the light) differs between pictures of the closest family.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ccl_jax.pretraining.lots import Lot, Source, own_key
from ccl_jax.pretraining.planes import Plane, filtered_noise

Picture = Float[Array, "s s 3"]
Scalar = Float[Array, ""]

PARTS = 5  # that a body may have
PRESENT = 0.65  # probability of each
OPEN = 0.4  # probability of an opening in the middle
LOOSE, STILL = 0.4, 0.3  # share of products that lie in any direction, and in exactly one


def reliefs(law: Lot, source: Source, size: int) -> Picture:
    """A rough, ribbed or woven surface under light from one side."""
    own, loose = Lot(source, 32), Lot(own_key(source), 4)
    turn = own.between(-0.4, 0.4)
    keys = jax.random.split(own_key(source))
    rough, fine = (filtered_noise(law, key, size, 1, turn=turn)[0] for key in keys)
    fold, steep = law.between(-0.5, 1.5).clip(0, 1), law.between(0.5, 3)
    rough = fold * (jnp.abs(rough) - 0.8) * 1.6 + (1 - fold) * jnp.tanh(steep * rough)
    pattern = law.between(-0.7, 1.7).clip(0, 1)
    height = (1 - pattern) * rough + pattern * _ribs(law, own, size, turn=turn)
    height = height + law.between(0, 0.4) * fine
    shade = jnp.tanh(law.between(0.3, 1.6) * _lit(height, _light(law, loose)))
    tint = law.normal() + law.normal(3) * law.between(-0.3, 1).clip(0)
    base = law.between(-1.2, 1.2) + law.normal(3) * law.between(-0.3, 0.8).clip(0)
    tone = height[..., None] * tint * law.between(0, 0.6)
    lit = law.between(0.4, 1.5) * shade[..., None]
    return jax.nn.sigmoid(base + 0.1 * own.normal(3) + tone + lit)


def _ribs(law: Lot, own: Lot, size: int, *, turn: Scalar) -> Plane:
    """Parallel ribs, about -1 to 1, or two sets of them, crossed or interlaced."""
    axis = jnp.arange(size) + 0.5
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    first = law.between(0, math.pi) + turn
    upright = law.between(0, 1) < 0.5
    second = first + jnp.where(upright, math.pi / 2, law.between(0, math.pi))
    periods = jnp.exp(law.between(math.log(4), math.log(28), 2) + own.between(-0.15, 0.15))
    bend, phases = law.between(0, 5), own.between(0, 2 * math.pi, 4)
    waves = []
    for number, heading in enumerate((first, second)):
        cos, sin, sharp = jnp.cos(heading), jnp.sin(heading), law.between(0.5, 4)
        across = x * cos + y * sin + bend * jnp.sin((y * cos - x * sin) / 14 + phases[number])
        phase = 2 * math.pi * across / periods[number] + phases[2 + number]
        waves.append(jnp.tanh(sharp * jnp.sin(phase)))
    form = law.between(0, 1)
    crossed = jnp.where(form < 0.7, waves[0] * waves[1], jnp.maximum(waves[0], waves[1]))
    return jnp.where(form < 0.4, waves[0], crossed)


def objects(law: Lot, source: Source, size: int) -> Picture:
    """A body with an outline, holes, rings, bars and marks, on a ground."""
    own, loose = Lot(source, 32), Lot(own_key(source), 8)
    u, v, turned, pixel = _posed(law, own, loose, size)

    def cover_of(depth: Plane) -> Plane:
        return jnp.clip(depth / (1.5 * pixel) + 0.5, 0, 1)

    depth = _body(law, u, v)
    cover = cover_of(depth)
    keys = jax.random.split(jax.random.fold_in(own_key(source), 2))
    ground = filtered_noise(law, keys[0], size, 1)[0]
    grain = filtered_noise(law, keys[1], size, 1, turn=-turned)[0]
    colourful = law.between(-0.4, 1).clip(0)
    palette = law.between(-1.8, 1.8, PARTS + 2, 1) + colourful * law.normal(PARTS + 2, 3)
    edge = jnp.exp(-((depth / (law.between(1, 4) * pixel)) ** 2)) * law.between(-1, 1)
    body = palette[1] + (law.between(0, 0.6) * grain + edge)[..., None]
    height = cover * law.between(0.2, 1.5)
    for number in range(PARTS):
        mark = cover_of(_part(law, u, v)) * (law.between(0, 1) < PRESENT)
        opaque = law.between(0.3, 1.2).clip(0, 1) * mark
        body = body + opaque[..., None] * (palette[number + 2] - body)
        height = height + cover * mark * law.between(-1, 1)
    shade = jnp.tanh(law.between(0, 2.5) * _lit(height, _light(law, loose)))
    dark, wide = law.between(-0.6, 1).clip(0), law.between(2, 8) * pixel
    shadow = dark * jnp.exp(jnp.minimum(depth, 0) / wide)
    below = palette[0] + (law.between(0, 0.5) * ground - shadow)[..., None]
    image = below + cover[..., None] * (body - below) + shade[..., None]
    return jax.nn.sigmoid(1.2 * image + 0.1 * own.normal(3))


def _posed(law: Lot, own: Lot, loose: Lot, size: int) -> tuple[Plane, Plane, Scalar, Scalar]:
    """Coordinates of the body, about -1 to 1 on it; its turn; the size of a pixel in them."""
    axis = (jnp.arange(size) + 0.5) * (2 / size) - 1
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    freedom = law.between(0, 1)
    reach = jnp.where(freedom < LOOSE, math.pi, jnp.where(freedom < 1 - STILL, 0.12, 0.0))
    turned = reach * loose.between(-1, 1) + own.between(-0.1, 0.1)
    angle = law.between(0, 2 * math.pi) + turned
    place = law.between(-0.15, 0.15, 2) + (freedom < 1 - STILL) * loose.between(-0.12, 0.12, 2)
    scale = jnp.exp(law.between(-0.9, 0.1) + own.between(-0.1, 0.1))
    x, y = (x - place[0]) / scale, (y - place[1]) / scale
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return x * cos + y * sin, y * cos - x * sin, turned, 2 / size / scale


def _body(law: Lot, u: Plane, v: Plane) -> Plane:
    """Depth below the outline, positive inside: a rounded box, a wheel, a rod or a disc."""
    theta, rho = jnp.arctan2(v, u), jnp.sqrt(u * u + v * v + 1e-6)
    power, aspect = jnp.exp(law.between(0.3, 2.3)), jnp.exp(law.between(0, 0.9))
    box = 0.9 - _norm(jnp.abs(u) + 1e-4, jnp.abs(v) * aspect + 1e-4, power)
    teeth = jnp.floor(jnp.exp(law.between(math.log(3), math.log(22))))
    sharp, tall = law.between(0.5, 6), law.between(0, 0.45) / jnp.sqrt(teeth)
    wave = jnp.tanh(sharp * jnp.cos(teeth * theta)) / jnp.tanh(sharp)
    wheel = 0.85 * (1 + tall * wave) - rho
    rod = law.between(0.2, 0.6) - jnp.sqrt((u - jnp.clip(u, -0.6, 0.6)) ** 2 + v * v + 1e-6)
    depth = _chosen(law, [box, wheel, rod, 0.9 - rho])
    opening = rho - law.between(0.12, 0.5)
    return jnp.where(law.between(0, 1) < OPEN, jnp.minimum(depth, opening), depth)


def _norm(a: Plane, b: Plane, power: Scalar) -> Plane:
    return (a**power + b**power) ** (1 / power)


def _part(law: Lot, u: Plane, v: Plane) -> Plane:
    """Depth in a ring, in holes around the middle, in a bar, in a disc, or in a row of strokes."""
    theta, rho = jnp.arctan2(v, u), jnp.sqrt(u * u + v * v + 1e-6)
    radius, thick = law.between(0.05, 0.85), jnp.exp(law.between(math.log(0.03), math.log(0.25)))
    ring = thick / 2 - jnp.abs(rho - radius)
    count = jnp.floor(law.between(1, 9))
    sector = (theta * count / (2 * math.pi) + law.between(0, 1)) % 1 - 0.5
    beside = 2 * rho * jnp.sin(sector * math.pi / count)
    holes = thick - jnp.sqrt((rho - jnp.maximum(radius, 0.3)) ** 2 + beside**2 + 1e-6)
    heading = jnp.floor(law.between(0, 4)) * math.pi / 4
    place, long = law.between(-0.5, 0.5, 2), law.between(0.1, 0.9)
    a = u * jnp.cos(heading) + v * jnp.sin(heading) - place[0]
    b = v * jnp.cos(heading) - u * jnp.sin(heading) - place[1]
    bar = jnp.minimum(thick / 2 - jnp.abs(b), long - jnp.abs(a))
    disc = 1.5 * thick - jnp.sqrt(a**2 + b**2 + 1e-6)
    period = law.between(0.1, 0.4)
    stroke = 0.3 * period - jnp.abs((a / period) % 1 - 0.5) * period
    row = jnp.minimum(thick + 0.05 - jnp.abs(b), long - jnp.abs(a))
    return _chosen(law, [ring, holes, bar, disc, jnp.minimum(stroke, row)])


def _chosen(law: Lot, planes: list[Plane]) -> Plane:
    """One of the planes, which the law draws."""
    number = jnp.floor(law.between(0, len(planes)))
    return jnp.select([number == index for index in range(len(planes))], planes)


def _light(law: Lot, loose: Lot) -> Scalar:
    """Direction of the light in radians: of the product, or more or less of every picture."""
    return law.between(0, 2 * math.pi) + math.pi * law.between(0, 1) ** 2 * loose.between(-1, 1)


def _lit(height: Plane, light: Scalar) -> Plane:
    """Slope of the surface against the light."""
    down, right = jnp.gradient(height)
    return right * jnp.cos(light) + down * jnp.sin(light)


PRODUCTS: dict[str, Callable[[Lot, Source, int], Picture]] = {
    "objects": objects,
    "reliefs": reliefs,
}
