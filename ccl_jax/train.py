"""Training: one pure step, and the loop around it.

Read `make_train_step` for the method and `train` for the run. What a step computes depends on the
state, the frozen encoder, the batch and the root key alone; everything else happens in the loop.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from ccl_jax.augment import Recipe, normalize, second_view, to_unit
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.loop import Batches, Loop, Vote, put_number
from ccl_jax.models import network as networks
from ccl_jax.objective import LossSettings, Scalars, sharded_loss_terms
from ccl_jax.run_log import RunLog
from ccl_jax.signals import StopRequest
from ccl_jax.state import Frozen, TrainState, join, purpose_key, split_parts
from ccl_jax.watch import Watch
from ccl_jax.whereabouts import COMPUTING


def make_update(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    settings: LossSettings,
    where: jax.sharding.Mesh | None = None,
) -> Callable[..., tuple[TrainState, Scalars]]:
    """Returns update(state, frozen, clean, augmented, labels, *, key, noise, negatives).

    One optimisation step on normalised views [b, h, w, 3] (`augmented` None without contrastive
    losses), pure, returning (state, scalars). `key` draws the negatives of the local loss, unless
    `negatives` (int [scales, b], batch indices) fixes them; `noise` is what `Network` takes. The
    images lie over the devices of `where`. What a recorded step of another implementation is
    compared with.
    """
    terms_of = sharded_loss_terms(where)
    weights = {
        "cosine": settings.cosine_weight,
        "local": settings.local_weight,
        "global": settings.global_weight,
    }

    def update(
        state: TrainState,
        frozen: Frozen,
        clean: Array,
        augmented: Array | None,
        labels: Array,
        *,
        key: Key[Array, ""],
        noise: networks.Noise | None = None,
        negatives: Array | None = None,
    ) -> tuple[TrainState, Scalars]:
        def loss_fn(params: PyTree) -> tuple[Array, tuple[Scalars, PyTree]]:
            network = networks.merge(graphdef, *join(frozen, params, state.batch_stats))
            out = network(clean, augmented, train=True, noise=noise)
            terms = terms_of(out, labels, key, settings, negatives=negatives)
            total = sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))
            statistics = split_parts(networks.statistics(network), tuple(state.batch_stats))
            return total, (terms, statistics)

        (total, (terms, statistics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        after = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=statistics,
            opt_state=opt_state,
        )
        return after, {"loss": total, **terms, "gradient_norm": optax.tree.norm(gradients)}

    return update


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    settings: LossSettings,
    recipe: Recipe,
    *,
    noise_probability: float,
    root: Key[Array, ""],
    where: jax.sharding.Mesh | None = None,
) -> Callable[[TrainState, Frozen, dict, Array], tuple[TrainState, Scalars]]:
    """Returns step(state, frozen, batch, position) -> (state, scalars), pure and ready to jit.

    `batch` holds uint8 images [b, h, w, 3] and int32 labels [b], over all devices of `where`: the
    contrastive terms and the batch statistics see the global batch. `position` is its number.
    A step whose loss or gradient is not finite changes nothing, nor does any step after it,
    because the state then lags behind the position; the scalars tell the host which step it was.
    """
    update = make_update(graphdef, optimizer, settings, where)

    def train_step(
        state: TrainState, frozen: Frozen, batch: dict[str, Array], position: Array
    ) -> tuple[TrainState, Scalars]:
        clean, augmented = views(batch["image"], purpose_key(root, "second view", position))
        network = networks.merge(graphdef, *join(frozen, state.params, state.batch_stats))
        noise = networks.draw_noise(
            purpose_key(root, "noise", position), network.map_shapes(clean), noise_probability
        )
        key = purpose_key(root, "negatives", position)
        after, scalars = update(
            state, frozen, clean, augmented, batch["label"], key=key, noise=noise
        )
        good = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["gradient_norm"])
        good &= state.step == position
        return jax.tree.map(lambda old, new: jnp.where(good, new, old), state, after), scalars

    def views(images: Array, key: Key[Array, ""]) -> tuple[Array, Array | None]:
        clean = to_unit(images)
        if not settings.contrastive:
            return normalize(clean), None
        return normalize(clean), normalize(second_view(key, clean, recipe))

    return train_step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When what happens, in steps; 0 for `evaluate_every` means never."""

    total: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int

    def saves_at(self, step: int) -> bool:
        """Whether the state after this step is saved."""
        return step % self.checkpoint_every == 0

    def evaluates_at(self, step: int) -> bool:
        """Whether the training pauses after this step for an evaluation; the last has its own."""
        return self.evaluate_every > 0 and step % self.evaluate_every == 0 and step < self.total


def train(
    state: TrainState,
    frozen: Frozen,
    batches: Batches,
    step: Callable[..., tuple[TrainState, Scalars]],
    *,
    where: jax.sharding.Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    log: RunLog,
    evaluate: Callable[[int, TrainState], Mapping[str, float]],
    stop: StopRequest,
    watch: Watch,
    missing_evaluation: bool = False,
) -> TrainState:
    """Runs the steps that are left, and returns the last state; it is also saved.

    `batches`, on the devices, begins at the batch whose number is `state.step`. Ends early where a
    process of the run has received a signal, all after the same step. Raises FloatingPointError,
    naming step and term, where a loss or a gradient was not finite; the state before that step is
    saved. Whatever else stops a run of one process, such as a file that cannot be read, the steps
    so far are saved too. An evaluation comes after a save; what it returns is logged. With
    `missing_evaluation` the one that was due at `state.step` comes first: it was interrupted.
    """

    def evaluate_and_log(step: int, state: TrainState) -> None:
        with log.paused():
            found = evaluate(step, state)
        log.write(step, found)

    if missing_evaluation:
        evaluate_and_log(int(state.step), state)
    run = Loop(where, checkpoints, log, watch)
    vote = Vote(stop, where)
    program: Callable[..., tuple[TrainState, Scalars, Array | None]] | None = None
    for position in range(int(state.step), schedule.total):
        if vote.decided():
            break
        try:
            done = position + 1
            batch = run.next_batch(batches, done)
            arguments = (state, frozen, batch, put_number(position, where), vote.ballot())
            program = program or run.compile(step, arguments)
            run.at(COMPUTING, done)
            state, scalars, votes = program(*arguments)
            vote.add(votes)
            run.follow(done, scalars)
            evaluates = schedule.evaluates_at(done)
            if evaluates or schedule.saves_at(done) or done % schedule.log_every == 0:
                run.flush(state)
            if evaluates or schedule.saves_at(done):
                run.save(done, state)
            if evaluates:
                evaluate_and_log(done, state)
        except (ValueError, OSError, KeyboardInterrupt):  # e.g. a file that cannot be read
            # Of several processes this may be the only one here, and a save needs all.
            if not vote.needed and not state.step.is_deleted() and int(state.step) > 0:
                run.save(int(state.step), state)
            raise
    run.flush(state)
    run.save(int(state.step), state)
    return state
