"""Procedural images on the device: a class is a fixed law, an image of it has its own numbers.

Nobody's photographs are in them. After "Pre-training without Natural Images" (Kataoka et al.,
IJCV 2022) and "Learning to See by Looking at Noise" (Baradad et al., NeurIPS 2021), with kinds of
our own: `networks` are random coordinate networks, `gratings` bent waves, `noise` filtered noise,
`leaves` overlapping shapes (dead leaves), `tiles` repeated motifs; `objects` and `reliefs` stand in
`products`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ccl_jax.pretraining.lots import Lot, Near, Source, own_key
from ccl_jax.pretraining.planes import Plane, bent_plane, filtered_noise, form_distance
from ccl_jax.pretraining.products import PRODUCTS

Picture = Float[Array, "s s 3"]

SHAPES = 40  # of a picture of leaves
UNITS = 16  # in each hidden layer of a coordinate network
WAVES = 4  # of a grating


class Batch(NamedTuple):
    """Pictures that hold one class, or two with a border between them."""

    images: Float[Array, "b s s 3"]  # in [0, 1]
    first: Int[Array, " b"]  # class
    second: Int[Array, " b"]
    share: Float[Array, "b s s"]  # of the first class at every pixel, in [0, 1]


def draw_batch(
    key: Key[Array, ""],
    laws: Key[Array, ""],
    count: int,
    *,
    kinds: Sequence[str],
    per_kind: int,
    size: int,
    composite: bool,
    place: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> Batch:
    """`count` pictures, equally many of each kind, in classes drawn at random.

    Class `k * per_kind + i` is law `i` of kind `k`. A `composite` picture shows another picture of
    the batch within a random region. `place` gets arrays over the rows of one kind and may shard
    them.
    """
    check_batch(count, kinds)
    rows = count // len(kinds)
    images, labels = [], []
    for number, kind in enumerate(kinds):
        drawing, choosing = jax.random.split(jax.random.fold_in(key, number))
        chosen = place(jax.random.randint(choosing, (rows,), 0, per_kind))
        images.append(place(render(drawing, laws, chosen, kind=kind, size=size)))
        labels.append(number * per_kind + chosen)
    # Row i * kinds + k is of kind k, so that splitting the rows over devices splits every kind.
    image = jnp.stack(images, 1).reshape(count, size, size, 3)
    label = jnp.stack(labels, 1).reshape(count)
    ordering, bordering, lighting = jax.random.split(jax.random.fold_in(key, len(kinds)), 3)
    if composite:
        order = jax.random.permutation(ordering, count)
        share = jax.vmap(_region, (0, None))(jax.random.split(bordering, count), size)
        mixed = share[..., None] * image + (1 - share[..., None]) * image[order]
        batch = Batch(mixed, label, label[order], share)
    else:
        batch = Batch(image, label, label, jnp.ones((count, size, size)))
    lit = jax.vmap(photographed)(jax.random.split(lighting, count), batch.images)
    return batch._replace(images=lit)


def check_batch(count: int, kinds: Sequence[str]) -> None:
    """Raises ValueError for an unknown kind, or where the kinds cannot share the batch equally."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(
            f"config.pretrain.kinds={tuple(kinds)} must name one or more of {', '.join(KINDS)}, "
            f"e.g. --config.pretrain.kinds=\"('networks',)\"."
        )
    if count % len(kinds):
        up = count + len(kinds) - count % len(kinds)
        raise ValueError(
            f"config.pretrain.batch_size={count} is not a multiple of the {len(kinds)} kinds of "
            f"images; use e.g. --config.pretrain.batch_size={up}."
        )


def render(
    key: Key[Array, ""], laws: Key[Array, ""], numbers: Int[Array, " b"], *, kind: str, size: int
) -> Float[Array, "b {size} {size} 3"]:
    """A picture in [0, 1] of each class `numbers` of one kind; row i depends on (key, i) alone."""
    law_key = jax.random.fold_in(laws, tuple(KINDS).index(kind))

    def picture(number: jax.Array, row: jax.Array) -> jax.Array:
        law = jax.random.fold_in(law_key, number)
        return render_one(law, jax.random.fold_in(key, row), kind=kind, size=size)

    return jax.vmap(picture)(numbers, jnp.arange(numbers.shape[0]))


def render_one(
    law: Source, source: Source, *, kind: str, size: int
) -> Float[Array, "{size} {size} 3"]:
    """The picture in [0, 1] that a law and an image's own numbers make."""
    return jnp.clip(KINDS[kind](Lot(law, 640), source, size), 0, 1)


def _networks(law: Lot, source: Source, size: int) -> Picture:
    """A small network of the position and of a few numbers of the image."""
    own = Lot(source, 32)
    x, y = bent_plane(own, size, turn=0.5, zoom=0.3)
    latent = jnp.broadcast_to(0.5 * own.normal(3), (size, size, 3))
    radius = jnp.sqrt(x * x + y * y + 1e-3)
    hidden = jnp.concatenate([jnp.stack([x, y, radius], -1), latent], -1)
    speed = jnp.exp(law.between(0.4, 2.2))
    scale = jnp.concatenate([jnp.full(3, speed), jnp.full(3, 0.4)])[:, None]
    for entries, first in ((6, True), (UNITS, False)):
        weights = law.normal(entries, UNITS) * (scale if first else 1.6 / math.sqrt(UNITS))
        hidden = hidden @ weights + law.between(-math.pi, math.pi, UNITS)
        half = UNITS // 2
        hidden = jnp.concatenate([jnp.sin(hidden[..., :half]), jnp.tanh(hidden[..., half:])], -1)
    return _painted(law, own, 2.5 * hidden)


def _gratings(law: Lot, source: Source, size: int) -> Picture:
    """Waves of a few directions, bent by slower waves, with soft or sharp flanks."""
    own = Lot(source, 32)
    x, y = bent_plane(own, size, turn=0.6, zoom=0.3)
    bend, slow = law.between(0, 0.25), law.between(2, 7, 4)
    phases = own.between(0, 2 * math.pi, 2 + WAVES)
    u = x + bend * jnp.sin(slow[0] * y + slow[1] * x + phases[0])
    v = y + bend * jnp.sin(slow[2] * x + slow[3] * y + phases[1])
    speed = jnp.exp(law.between(math.log(4), math.log(50), WAVES))  # radians per half image
    angle, sharp = law.between(0, math.pi, WAVES), law.between(0.5, 6, WAVES)
    across = u[..., None] * jnp.cos(angle) + v[..., None] * jnp.sin(angle)
    waves = jnp.tanh(sharp * jnp.sin(speed * across + phases[2:])) / jnp.tanh(sharp)
    return _painted(law, own, waves * (1 + 0.2 * own.normal(WAVES)))


def _noise(law: Lot, source: Source, size: int) -> Picture:
    """Noise with a spectrum and a tone curve of the class: clouds, grains, fibres, veins."""
    own = Lot(source, 32)
    turn, zoom = own.between(-0.5, 0.5), jnp.exp(own.between(-0.25, 0.25))
    planes = filtered_noise(law, own_key(source), size, 3, turn=turn, zoom=zoom)
    fold, steep = law.between(-0.5, 1.5, 3, 1, 1).clip(0, 1), law.between(0.5, 4, 3, 1, 1)
    toned = fold * (jnp.abs(planes) - 0.8) * 1.6 + (1 - fold) * jnp.tanh(steep * planes)
    return _painted(law, own, jnp.moveaxis(toned, 0, -1))


def _leaves(law: Lot, source: Source, size: int) -> Picture:
    """Discs, boxes and triangles on top of each other, with sizes and textures of the class."""
    own = Lot(source, 40 + 12 * SHAPES)
    x, y = bent_plane(own, size, turn=0.0, zoom=0.15)
    least, power = jnp.exp(law.between(-3, -1.2)), law.between(0.5, 3)
    radii = least * (1 - own.between(0, 0.97, SHAPES)) ** (-1 / power)
    radii = jnp.sort(jnp.minimum(radii, law.between(0.3, 0.9)))[::-1]  # small ones stay visible
    stretch = jnp.exp(law.between(0, 1.2) * own.between(-0.3, 1, SHAPES))
    aligned = law.between(0, 1) ** 2
    angle = law.between(0, math.pi) + aligned * own.between(-math.pi, math.pi, SHAPES)
    mix = jnp.cumsum(jax.nn.softmax(2 * law.normal(3)))
    form = jnp.searchsorted(mix, own.between(0, 1, SHAPES))
    place = own.between(-1.4, 1.4, SHAPES, 2)
    palette, accent = law.normal(4, 3), law.between(0.1, 1.2)
    strength = law.between(0, 1)
    chosen = jnp.floor(own.between(0, 4, SHAPES)).astype(jnp.int32)
    colours = palette[chosen] * accent + 0.25 * own.between(-1, 1, SHAPES, 3)
    speed, heading = jnp.exp(law.between(2, 4)), law.between(0, math.pi)
    wave = jnp.sin(speed * (x * jnp.cos(heading) + y * jnp.sin(heading)))
    wobble = jnp.sin(17 * x + 3 * jnp.sin(9 * y)) * jnp.sin(15 * y + 3 * jnp.sin(11 * x))
    textures = jnp.stack([wave, wobble])

    def lay(below: jax.Array, shape: tuple) -> tuple[jax.Array, None]:
        centre, radius, long, turned, which, colour, texture = shape
        cos, sin = jnp.cos(turned) / radius, jnp.sin(turned) / radius
        u = ((x - centre[0]) * cos + (y - centre[1]) * sin) / long
        v = ((y - centre[1]) * cos - (x - centre[0]) * sin) * long
        inside = (
            radius * (size / 2) * (1 - form_distance(u, v, which)) / jnp.maximum(long, 1 / long)
        )
        cover = jnp.clip(inside + 0.5, 0, 1)[..., None]
        fill = colour + strength * textures[texture][..., None]
        return cover * fill + (1 - cover) * below, None

    ground = jnp.broadcast_to(palette[0] * accent, (size, size, 3))
    pieces = (place, radii, stretch, angle, form, colours, chosen % 2)
    painted, _ = jax.lax.scan(lay, ground, pieces)
    return jax.nn.sigmoid(law.between(0.7, 2) * painted + law.between(-1, 1))


def _tiles(law: Lot, source: Source, size: int) -> Picture:
    """A motif on a grid, perhaps a staggered one: meshes, holes, bricks, knobs."""
    own = Lot(source, 32)
    x, y = bent_plane(own, size, turn=0.4, zoom=0.3)
    angle = law.between(0, math.pi)
    u = x * jnp.cos(angle) + y * jnp.sin(angle)
    v = y * jnp.cos(angle) - x * jnp.sin(angle)
    cells = jnp.exp(law.between(0.3, 2.0))
    u, v = u * cells, v * cells * jnp.exp(law.between(-0.7, 0.7))
    row = jnp.floor(v)
    u = u + row * (0.5 * (law.between(0, 1) > 0.5))
    u, v = (u - jnp.floor(u)) * 2 - 1, (v - row) * 2 - 1
    tilt = law.between(-1, 1)
    a, b = u + tilt * v * 0.5, v * jnp.exp(law.between(-0.6, 0.6))
    form = jnp.floor(law.between(0, 3)).astype(jnp.int32)
    far, soft = form_distance(a, b, form), law.between(2, 20)
    outer, inner = law.between(0.4, 1), law.between(-0.4, 0.5)
    motif = jnp.tanh(soft * (far - outer * (1 + 0.1 * own.normal())))
    core = jnp.tanh(soft * (far - inner))
    shade = jnp.sin(law.between(0, 5) * far + law.between(0, 6))
    return _painted(law, own, jnp.stack([motif, core, shade], -1))


# Only add at the end: the position is a part of the law of every class.
KINDS: dict[str, Callable[[Lot, Source, int], Picture]] = {
    "networks": _networks,
    "gratings": _gratings,
    "noise": _noise,
    "leaves": _leaves,
    "tiles": _tiles,
    **PRODUCTS,
}


def _painted(law: Lot, own: Lot, values: Float[Array, "s s k"]) -> Picture:
    """Each of the values moves the colour in a direction of the class, grey or colourful."""
    count = values.shape[-1]
    grey, colour = law.normal(count, 1), law.normal(count, 3)
    saturation = law.between(-0.3, 1).clip(0)
    contrast = law.between(0.6, 2.2) * jnp.exp(own.between(-0.15, 0.15))
    mixed = values @ ((1 - saturation) * grey + saturation * colour) / math.sqrt(count)
    base = law.between(-1.5, 1.5) + saturation * law.normal(3) + 0.15 * own.normal(3)
    return jax.nn.sigmoid(contrast * mixed + base)


def _region(key: jax.Array, size: int) -> Plane:
    """Share of the first picture at every pixel: blobs of random size, with a sharp border."""
    own = Lot(key, 40)
    x, y = bent_plane(own, size, turn=math.pi, zoom=0.7)
    speed, angle = own.between(1, 7, 4), own.between(0, math.pi, 4)
    across = x[..., None] * jnp.cos(angle) + y[..., None] * jnp.sin(angle)
    field = jnp.sin(speed * across + own.between(0, 2 * math.pi, 4)).sum(-1)
    return jax.nn.sigmoid((field - own.between(-1.8, 1.8)) * (size / 6))


def photographed(source: Source, image: Picture) -> Picture:
    """The picture under light from one side, in another tone or grey, blurred, with grain.

    Half of them are grey: else colour alone would tell most classes, and shapes not be learned.
    """
    own = Lot(source, 16)
    luma = own.between(0.2, 1, 3)
    grey = image @ (luma / luma.sum())
    chance = own.between(0, 1)
    if isinstance(source, Near):  # all pictures of a family are grey, or none is
        chance = jax.random.uniform(jax.random.fold_in(source.family, 1))
    image = jnp.where(chance < 0.5, grey[..., None], image)
    size = image.shape[0]
    axis = jnp.linspace(-1, 1, size)
    slope = own.between(-0.2, 0.2, 2)
    light = own.between(0.7, 1.3) + slope[0] * axis[:, None] + slope[1] * axis
    image = image * light[..., None] * (1 + own.between(-0.1, 0.1, 3))
    middle = own.between(0.3, 0.6)
    image = middle + (image - middle) * own.between(0.6, 1.2)
    near = own.between(-0.15, 0.3).clip(0)  # weight of either neighbour; a third stay sharp
    for axis_number in (0, 1):
        ends = [(1, 1) if n == axis_number else (0, 0) for n in range(3)]
        padded = jnp.pad(image, ends, mode="edge")
        before, after = (
            jax.lax.slice_in_dim(padded, start, start + size, axis=axis_number) for start in (0, 2)
        )
        image = (1 - 2 * near) * image + near * (before + after)
    grain = jax.random.uniform(own_key(source), image.shape, minval=-1, maxval=1)
    return jnp.clip(image + own.between(-0.03, 0.06).clip(0) * grain, 0, 1)
