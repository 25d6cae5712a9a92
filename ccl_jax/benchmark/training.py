"""The training step, timed as a training runs it."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from ccl_jax import mesh
from ccl_jax.benchmark.memory import Memory, peak_memory
from ccl_jax.benchmark.timing import Times, time_calls
from ccl_jax.loop import put_number
from ccl_jax.state import Architecture, Frozen, TrainState, init_state, purpose_key
from ccl_jax.throughput import count_flops

Batch = dict[str, jax.Array]
DIFFERENT = 4  # batches that take turns


class Training(NamedTuple):
    """What was measured of a training step, and what it left."""

    compile_seconds: float
    times: Times
    flops: float  # of a step, over all devices
    memory: Memory | None  # of one device, at its peak
    step: jax.stages.Compiled
    state: TrainState


def first_state(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    where: jax.sharding.Mesh,
) -> TrainState:
    """The state before the first step, on the devices of the mesh."""
    init = functools.partial(init_state, architecture, optimizer)
    return jax.jit(init, out_shardings=mesh.state_shardings(jax.eval_shape(init, key), where))(key)


def random_batches(
    images: int, size: int, *, classes: int, where: jax.sharding.Mesh, seed: int
) -> list[Batch]:
    """DIFFERENT batches of random pixels and labels, on the devices of the mesh.

    `image` uint8 [images, size, size, 3], `label` int32 [images]. Every pixel is drawn by itself;
    no step takes longer or shorter by what an image shows.
    """

    @functools.partial(jax.jit, out_shardings=mesh.batch_sharding(where))
    def draw(number: Int[Array, ""]) -> Batch:
        pixels, labels = jax.random.split(purpose_key(jax.random.key(seed), "benchmark", number))
        return {
            "image": jax.random.bits(pixels, (images, size, size, 3), jnp.uint8),
            "label": jax.random.randint(labels, (images,), 0, classes, jnp.int32),
        }

    return [draw(put_number(number, where)) for number in range(DIFFERENT)]


def compile_step(
    step: Callable[..., tuple[TrainState, dict[str, Array]]],
    arguments: tuple[TrainState, Frozen, Batch, Array],
    where: jax.sharding.Mesh,
) -> tuple[jax.stages.Compiled, float, float]:
    """Returns (the program, seconds that this took, its FLOPs over all devices).

    It takes the state over, as that of a training does.
    """
    begin = time.perf_counter()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, mesh.replicated(where)))
    traced = jitted.trace(*arguments)
    compiled = traced.lower().compile()
    return compiled, time.perf_counter() - begin, count_flops(traced.jaxpr)


def time_training(
    step: Callable[..., tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    frozen: Frozen,
    batches: Sequence[Batch],
    *,
    where: jax.sharding.Mesh,
    warm_up: int,
    repeats: int,
) -> Training:
    """Times steps on batches that are on the devices already; `state` is used up.

    The next step is always started before the last has ended, as a training does. Raises
    FloatingPointError where a loss or gradient was not finite: such steps change nothing.
    """
    position = put_number(int(state.step), where)
    program, seconds, flops = compile_step(step, (state, frozen, batches[0], position), where)
    run = Steps(program, state, frozen, batches, where)
    times = time_calls(run, warm_up=warm_up, repeats=repeats, ahead=True)
    if run.done != int(run.state.step):
        raise FloatingPointError(
            f"after {int(run.state.step)} of {run.done} steps a loss was not finite, so the timed "
            f"steps did not train; use another seed, e.g. --config.seed=1, or "
            f"--config.model.compute_dtype=float32."
        )
    memory = peak_memory(where.devices.flat[0], program)
    return Training(seconds, times, flops, memory, program, run.state)


class Steps:
    """The compiled step, called with a number; it keeps the state."""

    def __init__(
        self,
        program: Callable[..., Any],
        state: TrainState,
        frozen: Frozen,
        batches: Sequence[Batch],
        where: jax.sharding.Mesh,
    ) -> None:
        self.state, self.done = state, int(state.step)
        self._program, self._frozen = program, frozen
        self._batches, self._where = batches, where

    def __call__(self, number: int) -> dict[str, Array]:
        """Starts the next step, on the batch of that number; returns its scalars."""
        return self.on(self._batches[number % len(self._batches)])

    def on(self, batch: Batch) -> dict[str, Array]:
        """Starts the next step on this batch; returns its scalars."""
        position = put_number(self.done, self._where)
        self.state, scalars = self._program(self.state, self._frozen, batch, position)
        self.done += 1
        return scalars
