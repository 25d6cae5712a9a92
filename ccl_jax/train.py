"""Training: one pure step, and the loop around it.

Read `make_train_step` for the method and `train` for the run. What a step computes depends on the
state, the frozen encoder, the batch and the root key alone; everything else happens in the loop.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from ccl_jax import mesh
from ccl_jax.augment import Recipe, normalize, second_view, to_unit
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.models import network as networks
from ccl_jax.objective import LossSettings, Scalars, sharded_loss_terms
from ccl_jax.run_log import RunLog
from ccl_jax.signals import StopRequest
from ccl_jax.state import Frozen, TrainState, join, purpose_key, split_parts


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
    batches: Iterator[dict[str, Array]],
    step: Callable[..., tuple[TrainState, Scalars]],
    *,
    where: jax.sharding.Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    log: RunLog,
    evaluate: Callable[[int, TrainState], Mapping[str, float]],
    stop: StopRequest,
) -> TrainState:
    """Runs the steps that are left, and returns the last state; it is also saved.

    `batches`, on the devices, begins at the batch whose number is `state.step`. Ends early where
    `stop` has received a signal. Raises FloatingPointError, naming step and term, where a loss or
    a gradient was not finite; the state before that step is saved. Whatever else stops it, such as
    a file that cannot be read, the steps so far are saved too. An evaluation comes after a save;
    what it returns is logged.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, mesh.replicated(where)))
    pending: list[tuple[int, Scalars]] = []
    for position in range(int(state.step), schedule.total):
        if stop.signal is not None:
            break
        try:
            batch = next_batch(batches, log)
            state, scalars = step(state, frozen, batch, put_number(position, where))
            done = position + 1
            pending.append((done, scalars))
            if len(pending) > 1:  # one step computes while the next is prepared, and no more
                jax.block_until_ready(pending[-2][1])
            log.advance(done)
            evaluates = schedule.evaluates_at(done)
            if evaluates or schedule.saves_at(done) or done % schedule.log_every == 0:
                flush(pending, state, checkpoints, log)
            if evaluates or schedule.saves_at(done):
                checkpoints.save(done, state)
            if evaluates:
                with log.paused():
                    found = evaluate(done, state)
                log.write(done, found)
        except (ValueError, OSError, KeyboardInterrupt):  # e.g. a file that cannot be read
            if not state.step.is_deleted() and int(state.step) > 0:
                checkpoints.save(int(state.step), state)
            raise
    flush(pending, state, checkpoints, log)
    checkpoints.save(int(state.step), state)
    return state


def next_batch(batches: Iterator[dict[str, Array]], log: RunLog) -> dict[str, Array]:
    """The next batch; the log learns how long the step waited for it."""
    start = time.perf_counter()
    batch = next(batches)
    log.waited(time.perf_counter() - start)
    return batch


def put_number(number: int, where: jax.sharding.Mesh) -> Array:
    """The number as an int32 scalar on all devices."""
    return mesh.put_replicated(np.int32(number), where)


def flush(
    pending: list[tuple[int, Scalars]], state: TrainState, checkpoints: Checkpoints, log: RunLog
) -> None:
    """Logs the mean of the steps since the last call, or ends the run at the first bad one."""
    if not pending:
        return
    steps = [number for number, _ in pending]
    rows: list[dict[str, Any]] = jax.device_get([scalars for _, scalars in pending])
    pending.clear()
    for number, row in zip(steps, rows, strict=True):
        bad = [name for name, value in row.items() if not np.isfinite(value)]
        if bad:
            saved = int(state.step)
            checkpoints.save(saved, state)
            raise FloatingPointError(not_finite(number, bad, row, saved))
    log.write(steps[-1], {name: float(np.mean([row[name] for row in rows])) for name in rows[0]})


def not_finite(number: int, bad: list[str], row: dict[str, Any], saved: int) -> str:
    """The message for a step whose loss or gradient was not finite."""
    parts = [name for name in bad if name not in ("loss", "gradient_norm")] or bad
    named = ", ".join(f"'{name}' = {row[name]}" for name in parts)
    values = ", ".join(f"{name} {float(value):.6g}" for name, value in row.items())
    return (
        f"step {number}: not finite: {named} ({values}). The state after step {saved} was kept and "
        f"saved; a run continued from it meets the same batch. Train again in a new workdir with a "
        f"lower rate, e.g. --config.optimizer.lr=1e-3, or with "
        f"--config.model.compute_dtype=float32."
    )
