"""What happens around the steps of a training: agreeing, waiting, compiling, logging, saving."""

import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

from ccl_jax import mesh
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.run_log import RunLog
from ccl_jax.signals import Stopped, StopRequest
from ccl_jax.state import TrainState
from ccl_jax.throughput import Throughput, count_flops
from ccl_jax.watch import Watch
from ccl_jax.whereabouts import FIRST

Scalars = dict[str, Array]


@runtime_checkable
class Batches(Protocol):
    """Batches on the devices, in their order."""

    def ready(self) -> bool:
        """Whether the next one is there."""

    def __next__(self) -> dict[str, Array]:
        """The next one, when it is there."""


class Vote:
    """The signal on which all processes of a run agree, step by step.

    A signal reaches processes at different moments, and those that stop after different steps wait
    for each other for ever. So every step takes along what each process has received so far
    (`ballot`), returns the highest number (`count`, in the compiled step), and every process stops
    after the step at which it reads one: the same, since all read the same number of the same step.
    One process asks only itself, and its steps carry nothing.
    """

    def __init__(self, stop: StopRequest, where: jax.sharding.Mesh) -> None:
        self._stop = stop
        self._where = where
        self._counts: deque[jax.Array | None] = deque([None, None], maxlen=2)
        self.needed = jax.process_count() > 1

    def ballot(self) -> jax.Array | None:
        """int32 [devices], the number of the signal that each device's process has received."""
        if not self.needed:
            return None
        mine = np.full(self._where.local_mesh.size, self._stop.signal or 0, np.int32)
        return mesh.put_batch({"ballot": mine}, self._where)["ballot"]

    @staticmethod
    def count(ballot: jax.Array | None) -> jax.Array | None:
        """The highest number on the ballot, 0 where no process was asked to stop."""
        return None if ballot is None else ballot.max()

    def add(self, count: jax.Array | None) -> None:
        """Takes note of the count of the step that was just started."""
        self._counts.append(count)

    def decided(self) -> bool:
        """Whether to stop, by the count of the step before the last one: that has ended."""
        if not self.needed:
            return self._stop.signal is not None
        count = self._counts[0]
        number = 0 if count is None else int(count)
        if number:
            self._stop.signal = signal.Signals(number)
        return number > 0


def check_together(stop: StopRequest, saved: str) -> None:
    """Raises `Stopped` in every process where a signal has come to any; all must call it.

    `saved` says what is on disk. A signal that comes while the processes ask each other counts the
    next time.
    """
    if jax.process_count() == 1:
        stop.check(saved)
        return
    received = np.zeros(65, np.int64)  # by number; signals go up to 64
    received[stop.signal or 0] = 1
    anywhere = np.flatnonzero(mesh.sum_over_processes(received)[1:])
    if anywhere.size:
        raise Stopped(signal.Signals(int(anywhere[-1]) + 1), saved)


class Loop:
    """What happens around the steps of a training: waiting, compiling, logging, saving."""

    def __init__(
        self, where: jax.sharding.Mesh, checkpoints: Checkpoints, log: RunLog, watch: Watch
    ) -> None:
        self._where, self._checkpoints, self._log, self._watch = where, checkpoints, log, watch
        self._pending: list[tuple[int, Scalars]] = []  # steps that are not logged yet
        self._running: Scalars = {}  # of the last step
        self._one_has_ended = False

    def at(self, phase: str, step: int) -> None:
        """Says where this process is; before a step has ended, others may still compile it."""
        self._watch.at(phase if self._one_has_ended else FIRST, step)

    def next_batch(self, batches: Batches, step: int) -> dict[str, Array]:
        """The batch of the step; the log learns how long the devices waited for it."""
        self.at("waiting for input", step)
        return next_batch(batches, self._log, self._running)

    def compile(self, step: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """The compiled step, which also counts the votes: (state, scalars, votes or None).

        It takes no other shapes and shardings than those of `arguments`, and returns the state in
        the shardings that it takes it in. The log learns how long that took, and its FLOPs.
        """
        self._watch.at("compiling")
        self._log.compiling()
        start = time.perf_counter()

        def voting_step(state: TrainState, *rest: Any) -> tuple[TrainState, Scalars, Array | None]:
            *inputs, ballot = rest
            return *step(state, *inputs), Vote.count(ballot)

        everywhere = mesh.replicated(self._where)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
        jitted = jax.jit(
            voting_step, donate_argnums=0, out_shardings=(shardings, everywhere, everywhere)
        )
        traced = jitted.trace(*arguments)
        compiled = traced.lower().compile()
        self._log.compiled(time.perf_counter() - start, count_flops(traced.jaxpr))
        return compiled

    def follow(self, step: int, scalars: Scalars) -> None:
        """Lets one step compute while the next is prepared, and no more."""
        self._running = scalars
        self._pending.append((step, scalars))
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2][1])
            self._one_has_ended = True
        self._log.advance(step)

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save the state; the log learns for how long that held the steps up."""
        with self._watch.during("saving", step), self._log.saving():
            self._checkpoints.save(step, state)

    def flush(self, state: TrainState) -> None:
        """Logs the mean of the steps since the last call, or ends the run at the first bad one."""
        if not self._pending:
            return
        steps = [number for number, _ in self._pending]
        rows: list[dict[str, Any]] = jax.device_get([scalars for _, scalars in self._pending])
        self._pending.clear()
        self._one_has_ended = True
        for number, row in zip(steps, rows, strict=True):
            bad = [name for name, value in row.items() if not np.isfinite(value)]
            if bad:
                saved = int(state.step)
                self.save(saved, state)
                raise FloatingPointError(not_finite(number, bad, row, saved))
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        self._log.write(steps[-1], means)


def next_batch(batches: Batches, log: RunLog | Throughput, running: Scalars) -> dict[str, Array]:
    """The next batch; the log learns how long the devices waited for it.

    `running` comes from the step before. Where the batch is not there, that step is waited for
    first: while it computes, no device waits.
    """
    if not batches.ready():
        jax.block_until_ready(running)
    start = time.perf_counter()
    batch = next(batches)
    log.waited(time.perf_counter() - start)
    return batch


def put_number(number: int, where: jax.sharding.Mesh) -> Array:
    """The number as an int32 scalar on all devices."""
    return mesh.put_replicated(np.int32(number), where)


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
