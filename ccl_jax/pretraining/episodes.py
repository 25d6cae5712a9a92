"""An encoder learns to notice defects on products that it has never seen.

A step draws new products, each a law of `images` that its images follow closely or loosely, and
damages half of the images. With nothing behind the encoder, damaged positions shall lie further
from the nearest position of the normal images than sound ones do: a detector relies on that later.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, PyTree

from ccl_jax import mesh
from ccl_jax.augment import normalize
from ccl_jax.models.initial import Draws
from ccl_jax.models.layers import compute_dtype
from ccl_jax.models.network import split, statistics
from ccl_jax.models.resnet import ResNetEncoder
from ccl_jax.pretraining.defects import damage
from ccl_jax.pretraining.features import joined_features, unit
from ccl_jax.pretraining.images import photographed, render_one
from ccl_jax.pretraining.learn import Common, LearnState, Scalars
from ccl_jax.pretraining.lots import Near
from ccl_jax.state import purpose_key

SCALES = 4  # distances: of all three stages together, and of each alone
VISIBLE = 0.025  # mean change of a picture's values from which on its defect has to be found
COVERED, FREE = 0.25, 0.05  # of a position, from where it counts as damaged, up to where as sound
SHARPNESS = 4.0  # of the maximum over positions that scores an image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes(Common):
    """Products on which damaged images are to be found among normal ones."""

    group: int  # images of a product, half of them damaged
    stage_weight: float  # of the losses on each stage alone; those on all together have 1
    image_weight: float  # of the loss on image scores; the one on positions has 1

    @property
    def products(self) -> int:
        """Number of products in a step."""
        return len(self.kinds) * self.per_kind

    @property
    def batch_size(self) -> int:
        """Images in a step."""
        return self.products * self.group


class Episode(NamedTuple):
    """Images of `e` products, `n` of each, the second half of them with a defect."""

    images: Float[Array, "e n s s 3"]  # in [0, 1]
    masks: Float[Array, "e n/2 s s"]  # in [0, 1], of the damaged images
    visible: Bool[Array, "e n/2"]


def draw_episode(
    key: Key[Array, ""],
    recipe: Episodes,
    place: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> Episode:
    """New products and their images; `place` gets arrays over products and may shard them."""
    families = jax.random.split(jax.random.fold_in(key, 0), recipe.products)
    half = recipe.group // 2

    def product(family: jax.Array, *, kind: str) -> jax.Array:
        law, near = jax.random.split(jax.random.fold_in(family, 0))
        spread = jax.random.uniform(jax.random.fold_in(family, 1)) ** 2  # most hold still
        keys = jax.random.split(jax.random.fold_in(family, 2), recipe.group)
        return jax.vmap(
            lambda own: render_one(law, Near(near, own, spread), kind=kind, size=recipe.image_size)
        )(keys)

    def photograph(family: jax.Array, images: jax.Array) -> jax.Array:
        spread = 0.4 * jax.random.uniform(jax.random.fold_in(family, 3)) ** 2
        camera = jax.random.fold_in(family, 4)
        keys = jax.random.split(jax.random.fold_in(family, 5), recipe.group)
        return jax.vmap(lambda own, image: photographed(Near(camera, own, spread), image))(
            keys, images
        )

    # Product i * kinds + k is of kind k, so that splitting the products splits every kind.
    rows = [families[number :: len(recipe.kinds)] for number in range(len(recipe.kinds))]
    drawn = [
        place(jax.vmap(functools.partial(product, kind=kind))(place(own)))
        for kind, own in zip(recipe.kinds, rows, strict=True)
    ]
    images = jnp.stack(drawn, 1).reshape(recipe.products, *drawn[0].shape[1:])
    sound, broken = images[:, :half], images[:, half:]
    others = jnp.roll(broken, 1, 0)
    keys = jax.vmap(lambda family: jax.random.split(jax.random.fold_in(family, 6), half))(families)
    damaged = jax.vmap(jax.vmap(damage))(keys, broken, others)
    images = place(jnp.concatenate([sound, damaged.image], 1))
    return Episode(
        place(jax.vmap(photograph)(families, images)), damaged.mask, damaged.change > VISIBLE
    )


def nearest_distances(features: Float[Array, "e n h w c"]) -> Float[Array, "e n h w"]:
    """Squared distance of every position to the nearest one in another, undamaged image."""
    products, group, height, width, channels = features.shape
    half, positions = group // 2, height * width
    query = features.reshape(products, group, positions, channels)
    memory = query[:, :half].reshape(products, half * positions, channels)
    # The search is not differentiated: the gradient of a minimum over so many costs five times it.
    fixed_query, fixed_memory = jax.lax.stop_gradient((query, memory))
    scores = jnp.sum(fixed_memory**2, -1)[:, None, None]
    scores = scores - 2 * jnp.einsum("enpc,emc->enpm", fixed_query, fixed_memory)
    owner = jnp.repeat(jnp.arange(half), positions)
    own = jnp.arange(group)[:, None] == owner
    index = jnp.where(own[None, :, None], jnp.inf, scores).argmin(-1)
    found = jnp.take_along_axis(memory, index.reshape(products, -1, 1), 1).reshape(query.shape)
    return jnp.sum((query - found) ** 2, -1).reshape(products, group, height, width)


def separation_loss(
    distances: Float[Array, "e n h w"],
    episode: Episode,
    scale: Float[Array, ""],
    offset: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """(loss of positions, loss of images, share of image pairs in the right order).

    A position's logit is the logarithm of its distance, less the mean of the product's undamaged
    images, times exp(scale) minus offset. Positions with a part of a defect do not count.
    """
    products, group, side, _ = distances.shape
    half, cell = group // 2, episode.masks.shape[-1] // side
    logs = jnp.log(distances + 1e-4)
    usual = logs[:, :half].mean((1, 2, 3), keepdims=True)
    logits = jnp.exp(scale) * (logs - usual) - offset
    sound, broken = logits[:, :half], logits[:, half:]
    cells = episode.masks.reshape(products, half, side, cell, side, cell)
    share, top = cells.mean((3, 5)), cells.max((3, 5))
    most = share >= jnp.maximum(share.max((2, 3), keepdims=True), FREE)
    damaged = ((share > COVERED) | most) & episode.visible[..., None, None]
    free = top < FREE
    missed = jnp.sum(jax.nn.softplus(-broken) * damaged) / (damaged.sum() + 1)
    false = jnp.sum(jax.nn.softplus(broken) * free) / (free.sum() + 1)
    positions = 0.5 * missed + 0.25 * false + 0.25 * jax.nn.softplus(sound).mean()
    flat = logits.reshape(products, group, -1)
    scores = jax.nn.logsumexp(SHARPNESS * flat, -1) / SHARPNESS
    margins = scores[:, half:, None] - scores[:, None, :half]
    counted = episode.visible[..., None]
    images = jnp.mean(jax.nn.softplus(-margins) * counted)
    ordered = jnp.sum((margins > 0) & counted) / jnp.maximum(counted.sum() * half, 1)
    return positions, images, ordered


def init_state(
    recipe: Episodes,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    begin: tuple[PyTree, PyTree] | None = None,
) -> LearnState:
    """The state before the first step, from the parameters and statistics `begin`, or random."""
    params, batch_stats = begin or split(_encoder(recipe, key))[1:]
    heads = {"scale": jnp.full(SCALES, 0.5), "offset": jnp.ones(SCALES)}
    params = {"encoder": params, "heads": heads}
    statistics_of = {"encoder": batch_stats}
    return LearnState(jnp.zeros((), jnp.int32), params, statistics_of, optimizer.init(params))


def make_step(
    recipe: Episodes, optimizer: optax.GradientTransformation, where: jax.sharding.Mesh
) -> Callable[[LearnState], tuple[LearnState, Scalars]]:
    """Returns step(state) -> (state, scalars), pure and ready to jit: it draws its own images."""
    root = jax.random.key(recipe.seed)
    sharded = mesh.batch_sharding(where)
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=sharded)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _encoder(recipe, root)))

    def loss_fn(
        params: PyTree, batch_stats: PyTree, episode: Episode
    ) -> tuple[Array, tuple[Scalars, PyTree]]:
        encoder = nnx.merge(graphdef, params["encoder"], batch_stats["encoder"])
        flat = place(episode.images.reshape(-1, *episode.images.shape[2:]))
        maps = encoder(normalize(flat), train=True)
        maps = [scale.astype(jnp.float32) for scale in maps]
        total = jnp.zeros(())
        scalars: Scalars = {}
        for number, features in enumerate([joined_features(maps), *map(unit, maps)]):
            grouped = features.reshape(recipe.products, recipe.group, *features.shape[1:])
            positions, images, ordered = separation_loss(
                nearest_distances(place(grouped)),
                episode,
                params["heads"]["scale"][number],
                params["heads"]["offset"][number],
            )
            weight = recipe.stage_weight if number else 1.0
            total += weight * (positions + recipe.image_weight * images)
            name = f"stage{number}" if number else "joined"
            scalars |= {f"{name}_positions": positions, f"{name}_images": images}
            scalars |= {f"{name}_ordered": ordered}
        return total, (scalars, {"encoder": statistics(encoder)})

    def step(state: LearnState) -> tuple[LearnState, Scalars]:
        episode = draw_episode(purpose_key(root, "episodes", state.step), recipe, place)
        (total, (scalars, stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, episode
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return LearnState(state.step + 1, params, stats, opt_state), {"loss": total, **scalars}

    return step


def _encoder(recipe: Episodes, key: Any) -> ResNetEncoder:
    dtype = compute_dtype(recipe.compute_dtype)
    return ResNetEncoder(recipe.architecture, dtype=dtype, draws=Draws(key, reserve=4_000_000))
