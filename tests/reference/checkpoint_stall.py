"""How long a checkpoint holds up the training, against one that is written while it waits.

    python -m tests.reference.checkpoint_stall [--folder /tmp/stall] [--encoders resnet18 ...]

Saves the state of a training (parameters, statistics, Adam's two moments; random numbers, because
zeros take no space) three times, and prints for the median of the last two: how long `save` held
up the caller, how long it was until all was on disk, and how long reading it back takes, of which
checking the checksums. A Markdown row each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ccl_jax import mesh
from ccl_jax.checkpoint import STATE, Checkpoints
from ccl_jax.checksums import check_checksums
from ccl_jax.state import Architecture, TrainState, init_state, make_optimizer


def random_state(encoder: str) -> TrainState:
    """A state of that encoder's recipe, with a random number in every place."""
    optimizer = make_optimizer(
        projector_lr=1e-3, lr=5e-3, betas=(0.5, 0.999), clip_norm=5.0, decay_step=None
    )
    architecture = Architecture("rd", encoder, "plain", "float32")
    shapes = jax.eval_shape(lambda key: init_state(architecture, optimizer, key), jax.random.key(0))
    everywhere = mesh.replicated(mesh.make_mesh(1))

    def draw(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), everywhere)
        values = jax.random.normal(jax.random.key(number), leaf.shape, leaf.dtype)
        return jax.device_put(values, everywhere)

    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [draw(i, leaf) for i, leaf in enumerate(leaves)])


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def measure(encoder: str, folder: Path) -> list[str]:
    """The cells of a row: encoder, GB, then seconds held up, until on disk, check, read."""
    state = jax.block_until_ready(random_state(encoder))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    held, whole = [], []
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in (1, 2, 3):
            start = time.perf_counter()
            held.append(seconds(lambda step=step: checkpoints.save(step, state)))
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
        check = seconds(lambda: check_checksums(folder / "3" / STATE))
        read = seconds(lambda: checkpoints.restore(3, target))
    times = [statistics.median(held[1:]), statistics.median(whole[1:]), check, read]
    return [encoder, f"{size / 1e9:.2f}", *(f"{value:.2f}" for value in times)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--encoders", nargs="+", default=["resnet18", "wide_resnet50_2"])
    options = parser.parse_args()
    print("| encoder | state, GB | save holds up, s | until on disk, s | check, s | read, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for encoder in options.encoders:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(f"| {' | '.join(measure(encoder, Path(folder) / 'checkpoints'))} |", flush=True)


if __name__ == "__main__":
    main()
