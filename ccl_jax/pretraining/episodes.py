"""An encoder learns to notice defects on products that it has never seen.

A step draws new products, each a law of `images` that its images follow closely or loosely, and
damages most of the images. With nothing behind the encoder, damaged positions shall lie further
from what sound ones of the same product say than those do: a detector relies on that later.
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
from ccl_jax.pretraining.separation import damaged_cells, rebuilt_distances, separation_loss
from ccl_jax.state import purpose_key

SCALES = 4  # distances: of all three stages together, and of each alone
VISIBLE = 0.04  # change of a picture from which on its defect has to be found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes(Common):
    """Products on which damaged images are to be found among normal ones."""

    group: int  # images of a product
    sound: int  # of them without a defect
    softness: float  # squared distance over which a sound position loses weight by e
    memory: int  # positions of a product that may count
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
    """Images of `e` products, `n` of each, the last `d` of them with a defect."""

    images: Float[Array, "e n s s 3"]  # in [0, 1]
    masks: Float[Array, "e d s s"]  # in [0, 1], of the damaged images
    visible: Bool[Array, "e d"]


def draw_episode(
    key: Key[Array, ""],
    recipe: Episodes,
    place: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> Episode:
    """New products and their images; `place` gets arrays over products and may shard them."""
    families = jax.random.split(jax.random.fold_in(key, 0), recipe.products)

    # Product i * kinds + k is of kind k, so that splitting the products splits every kind.
    rows = [families[number :: len(recipe.kinds)] for number in range(len(recipe.kinds))]
    drawn = [
        place(jax.vmap(functools.partial(_product, recipe, kind))(place(own)))
        for kind, own in zip(recipe.kinds, rows, strict=True)
    ]
    images = jnp.stack(drawn, 1).reshape(recipe.products, *drawn[0].shape[1:])
    whole, broken, variants = jnp.split(images, [recipe.sound, recipe.group], 1)
    others = jnp.roll(broken, 1, 0)
    keys = jax.vmap(
        lambda family: jax.random.split(purpose_key(family, "damage", 0), broken.shape[1])
    )(families)
    damaged = jax.vmap(jax.vmap(damage))(keys, broken, others, variants)
    images = place(jnp.concatenate([whole, damaged.image], 1))
    return Episode(
        place(jax.vmap(_photograph)(families, images)), damaged.mask, damaged.change > VISIBLE
    )


def _product(recipe: Episodes, kind: str, family: Key[Array, ""]) -> Float[Array, "n s s 3"]:
    """Pictures of a product, then of variants of it that are like those to be damaged."""
    law, near, looseness, members = jax.random.split(purpose_key(family, "product", 0), 4)
    spread = jax.random.uniform(looseness) ** 2  # most hold still
    keys = jax.random.split(members, recipe.group)

    def normal(own: jax.Array) -> jax.Array:
        return render_one(law, Near(near, own, spread), kind=kind, size=recipe.image_size)

    def variant(own: jax.Array) -> jax.Array:
        chance, numbers = jax.random.split(own)
        changed = Near(law, numbers, 0.05 + 0.5 * jax.random.uniform(chance) ** 2)
        return render_one(changed, Near(near, own, spread), kind=kind, size=recipe.image_size)

    return jnp.concatenate([jax.vmap(normal)(keys), jax.vmap(variant)(keys[recipe.sound :])])


def _photograph(family: Key[Array, ""], images: Float[Array, "n s s 3"]) -> Array:
    """The pictures of a product under its light, which varies much or little."""
    camera, variety, members = jax.random.split(purpose_key(family, "photograph", 0), 3)
    spread = 0.8 * jax.random.uniform(variety)
    keys = jax.random.split(members, images.shape[0])
    return jax.vmap(lambda own, image: photographed(Near(camera, own, spread), image))(keys, images)


def init_state(
    recipe: Episodes,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    begin: tuple[PyTree, PyTree] | None = None,
) -> LearnState:
    """The state before the first step, from the parameters and statistics `begin`, or random."""
    params, batch_stats = begin or split(_encoder(recipe, key))[1:]
    # With dtypes: weakly typed numbers would have the step compiled once more for its own output.
    heads = {
        "scale": jnp.full(SCALES, 0.5, jnp.float32),
        "offset": jnp.ones(SCALES, jnp.float32),
    }
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
            damaged, free = damaged_cells(episode.masks, episode.visible, features.shape[1])
            whole = jnp.ones_like(free[:, :1]).repeat(recipe.sound, 1)
            sound = jnp.concatenate([whole, free], 1)
            distances = rebuilt_distances(
                place(grouped), sound, softness=recipe.softness, memory=recipe.memory
            )
            positions, images, ordered = separation_loss(
                distances,
                damaged,
                sound,
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
