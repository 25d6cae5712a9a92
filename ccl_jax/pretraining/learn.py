"""Supervised learning of an encoder on procedural images: recipe, model, loss, and one pure step.

What a step computes depends on the state and the recipe alone: it draws its own images.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Key, PyTree

from ccl_jax import mesh
from ccl_jax.augment import normalize
from ccl_jax.models.initial import Draws, torch_kernel
from ccl_jax.models.layers import Conv, Dtype, compute_dtype
from ccl_jax.models.network import split, statistics
from ccl_jax.models.resnet import ResNetEncoder, architecture_of
from ccl_jax.pretraining.images import Batch, draw_batch
from ccl_jax.state import purpose_key

Scalars = dict[str, Array]
ADAM_B2 = 0.99  # of AdamW: a run of few thousand steps needs a shorter memory than 0.999
CLIP_NORM = 1.0  # of all gradients together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every phase has: of all that fixes a step but its number and its rate (see Plan)."""

    architecture: str
    compute_dtype: str
    seed: int
    kinds: tuple[str, ...]  # of images, equally many of each in a batch
    per_kind: int  # classes of each kind; in episodes: products of each kind in a step
    image_size: int  # pixels
    lr: float  # of AdamW, at its highest
    weight_decay: float  # of kernels
    warmup_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Common):
    """Classes to be told apart."""

    composite: bool  # two pictures in one image, with a border between them
    dense: bool  # a class at every position; False: of the pooled map
    head_weights: tuple[float, float, float]  # of the losses on the maps of stages 1 to 3
    label_smoothing: float
    batch_size: int  # images over all devices

    @property
    def classes(self) -> int:
        """Number of classes of all kinds."""
        return len(self.kinds) * self.per_kind


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, and what is kept on the way; in steps."""

    steps: int
    decay_share: float  # of the steps, the last ones, over which the rate falls to zero
    checkpoint_every: int
    log_every: int

    @property
    def decay_start(self) -> int:
        """The step from which the rate falls."""
        return self.steps - round(self.decay_share * self.steps)


@struct.dataclass
class LearnState:
    """Everything that a step changes."""

    step: Any  # int32 scalar: steps done, which is also the position in the data
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState


class Classifier(nnx.Module):
    """An encoder and a linear layer on each of its maps that has a weight."""

    def __init__(self, recipe: Recipe, *, draws: Draws):
        dtype: Dtype = compute_dtype(recipe.compute_dtype)
        self.encoder = ResNetEncoder(recipe.architecture, dtype=dtype, draws=draws)
        self.weights = recipe.head_weights
        channels = architecture_of(recipe.architecture).channels
        for stage, (width, weight) in enumerate(zip(channels, recipe.head_weights, strict=True)):
            if weight > 0:
                head = Conv(
                    width, recipe.classes, 1, bias=True, init=torch_kernel, dtype=None, draws=draws
                )
                setattr(self, f"head{stage + 1}", head)

    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool, dense: bool
    ) -> dict[int, Array]:
        """Logits [b, h, w, k] by stage; those of the pooled maps have 1 x 1 positions."""
        logits = {}
        for stage, maps in enumerate(self.encoder(images, train=train), start=1):
            if self.weights[stage - 1] > 0:
                maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
                maps = maps if dense else maps.mean((1, 2), keepdims=True)
                logits[stage] = getattr(self, f"head{stage}")(maps)
        return logits


def abstract_encoder(architecture: str) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """(graphdef, params, batch_stats) of an encoder in float32, with shapes instead of arrays."""

    def build() -> ResNetEncoder:
        return ResNetEncoder(architecture, dtype=None, draws=Draws(jax.random.key(0)))

    return split(nnx.eval_shape(build))


def init_state(
    recipe: Recipe, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> LearnState:
    """The state before the first step; call it under jit, which places it."""
    classifier = Classifier(recipe, draws=Draws(key, reserve=4_000_000))
    _, params, batch_stats = split(classifier)
    return LearnState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def learning_rate(recipe: Common, plan: Plan) -> Callable[[Array], Array]:
    """The rate by step: up in a straight line, constant, and down to zero in a straight line."""

    def rate(step: Array) -> Array:
        up = (step + 1) / max(recipe.warmup_steps, 1)
        down = (plan.steps - step) / max(plan.steps - plan.decay_start, 1)
        return recipe.lr * jnp.minimum(jnp.minimum(up, down), 1.0)

    return rate


def make_optimizer(recipe: Common, plan: Plan) -> optax.GradientTransformation:
    """AdamW behind a clip; vectors (biases, normalisation) do not decay."""
    kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    rate = learning_rate(recipe, plan)
    adam = optax.adamw(rate, b2=ADAM_B2, weight_decay=recipe.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(CLIP_NORM), adam)


def shared_cross_entropy(
    logits: Float[Array, "b h w k"], batch: Batch, *, smoothing: float
) -> tuple[Array, Array]:
    """(mean loss, accuracy) of positions where the classes have the shares that pixels give them.

    A position's target is the mean over its pixels, softened by `smoothing`; its accuracy asks for
    the class with the larger share.
    """
    count, height, width, _ = logits.shape
    size = batch.share.shape[1]
    cells = batch.share.reshape(count, height, size // height, width, size // width)
    share = cells.mean((2, 4))
    logs = jax.nn.log_softmax(logits)

    def of(labels: Array) -> Array:
        index = jnp.broadcast_to(labels[:, None, None, None], (count, height, width, 1))
        return jnp.take_along_axis(logs, index, -1)[..., 0]

    hit = share * of(batch.first) + (1 - share) * of(batch.second)
    loss = -(1 - smoothing) * hit - smoothing * logs.mean(-1)
    larger = jnp.where(share >= 0.5, batch.first[:, None, None], batch.second[:, None, None])
    return loss.mean(), (logits.argmax(-1) == larger).mean()


def make_step(
    recipe: Recipe, optimizer: optax.GradientTransformation, where: jax.sharding.Mesh
) -> Callable[[LearnState], tuple[LearnState, Scalars]]:
    """Returns step(state) -> (state, scalars), pure and ready to jit: it draws its own images."""
    root = jax.random.key(recipe.seed)
    laws = purpose_key(root, "laws", 0)
    sharded = mesh.batch_sharding(where)
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=sharded)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Classifier(recipe, draws=Draws(root))))

    def step(state: LearnState) -> tuple[LearnState, Scalars]:
        batch = draw_batch(
            purpose_key(root, "images", state.step),
            laws,
            recipe.batch_size,
            kinds=recipe.kinds,
            per_kind=recipe.per_kind,
            size=recipe.image_size,
            composite=recipe.composite,
            place=place,
        )
        batch = jax.tree.map(place, batch)

        def loss_fn(params: PyTree) -> tuple[Array, tuple[Scalars, PyTree]]:
            classifier = nnx.merge(graphdef, params, state.batch_stats)
            found = classifier(normalize(batch.images), train=True, dense=recipe.dense)
            scalars: Scalars = {}
            total = jnp.zeros(())
            for stage, logits in found.items():
                loss, accuracy = shared_cross_entropy(
                    logits, batch, smoothing=recipe.label_smoothing
                )
                total += recipe.head_weights[stage - 1] * loss
                scalars |= {f"loss{stage}": loss, f"accuracy{stage}": accuracy}
            return total, (scalars, statistics(classifier))

        (total, (scalars, stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = LearnState(state.step + 1, params, stats, opt_state)
        return after, {"loss": total, **scalars}

    return step
