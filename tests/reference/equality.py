"""How far several devices and processes are from one device: python -m tests.reference.equality

Starts itself in 1, 2 and 4 processes with 1 to 8 fake CPU devices together, in float32 and float64,
and prints two Markdown tables: losses and their gradients, and whole training steps. Everything is
compared with one device in one process; the first column shows what a change of the images by one
unit in the last place does there. Status 1 where anything differs by more than its bound. Half an
hour on two cores.
"""

import argparse
import functools
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ccl_jax import losses, mesh
from ccl_jax.benchmark import published
from ccl_jax.state import Architecture, Frozen, TrainState, init_state
from ccl_jax.train import make_update

ROOT = Path(__file__).parents[2]
GRID = [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8)]
BOUNDS = {"float32": 1e-5, "float64": 1e-10}
CURVE = 1e-6  # of the loss over the steps, in float64
IMAGES, SIZE, STEPS = 8, 64, 5
SHAPES = ((8, 8, 16), (4, 4, 32), (2, 2, 64))
LABELS = {"mixed": [0, 1, 2, 0, 1, 0, 2, 2], "devices of one class": [0, 0, 0, 0, 1, 1, 2, 2]}


def local(maps: Any, codes: Any, labels: Any, **settings: Any) -> jax.Array:
    """The local loss at the published temperature."""
    key = jax.random.key(3)
    return losses.local_contrastive_loss(*maps, labels, key, temperature=0.05, **settings)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cosine": lambda maps, codes, labels, axis: losses.cosine_distillation_loss(
        maps[0], maps[2], axis=axis
    ),
    "local, batch": local,
    "local, near": functools.partial(local, reach=3),
    "local, window and partners": functools.partial(local, window=3, same_class_candidates=True),
    "global, two views": lambda maps, codes, labels, axis: (
        losses.two_view_supervised_contrastive_loss(*codes, labels, temperature=0.05, axis=axis)
    ),
    "global, second release": lambda maps, codes, labels, axis: (
        losses.second_release_contrastive_loss(codes[0], labels, temperature=0.05, axis=axis)
    ),
}


# --- in one of the processes -------------------------------------------------------------------


def losses_and_gradients(where: jax.sharding.Mesh, dtype: type) -> dict[str, Any]:
    """By loss and labels: (value, gradients) on random maps and codes."""
    rng = np.random.default_rng(0)
    maps = [[rng.normal(size=(IMAGES, *s)).astype(dtype) for s in SHAPES] for _ in range(4)]
    codes = [rng.normal(size=(IMAGES, 32)).astype(dtype) for _ in range(2)]
    axis = where.axis_names if where.size > 1 else None
    found = {}
    for name, loss in LOSSES.items():
        both = functools.partial(loss, axis=axis)
        if axis is not None:
            rows = mesh.batch_spec(where)
            both = jax.shard_map(both, mesh=where, in_specs=(rows, rows, rows), out_specs=jax.P())
        step = jax.jit(jax.value_and_grad(both, argnums=(0, 1)))
        for kind, labels in LABELS.items():
            given = put_rows((maps, codes, np.array(labels, np.int32)), where)
            found[f"{name}; {kind}"] = mesh.on_every_host(step(*given), where)
    return found


def put_rows(tree: Any, where: jax.sharding.Mesh) -> Any:
    """Whole host arrays, the same everywhere, as arrays whose rows lie over the devices."""
    own = IMAGES // jax.process_count()
    first = jax.process_index() * own
    sharding = mesh.batch_sharding(where)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf[first : first + own]),
        tree,
    )


def trainings(
    where: jax.sharding.Mesh, dtype: type, encoder: str, nudges: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """The first step of a small training, and the losses of STEPS steps, for each of the nudges.

    Every pixel is larger by about so many units in the last place.
    """
    architecture = Architecture("rd", encoder, "depthwise", "float32")
    optimizer = published.optimizer()
    key = jax.random.key(1)
    frozen = jax.device_get(jax.jit(architecture.random_encoder)(key))
    state = jax.device_get(jax.jit(lambda: init_state(architecture, optimizer, key))())

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, tree)

    initial = mesh.put_replicated(cast(state), where)
    frozen = Frozen(*mesh.put_replicated(cast(frozen), where))
    graphdef, *_ = architecture.abstract()
    update = make_update(graphdef, optimizer, published.LOSSES, where)
    labels = np.array(LABELS["mixed"], np.int32)

    @functools.partial(jax.jit, out_shardings=mesh.replicated(where))
    def step(state: TrainState, clean: Any, augmented: Any, labels: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(5), state.step)
        return update(state, frozen, clean, augmented, labels, key=key)

    rng = np.random.default_rng(1)
    views = [rng.normal(size=(STEPS, IMAGES, SIZE, SIZE, 3)).astype(dtype) for _ in range(2)]
    for nudge in nudges:
        nudged = [(view * (1 + nudge * np.finfo(dtype).eps)).astype(dtype) for view in views]
        state, found = initial, {"curve": []}
        for number in range(STEPS):
            given = put_rows((nudged[0][number], nudged[1][number], labels), where)
            state, scalars = step(state, *given)
            scalars = jax.device_get(scalars)
            found["curve"].append(scalars["loss"])
            if number == 0:
                found |= first_step(state, scalars)
        yield found


def first_step(state: TrainState, scalars: Any) -> dict[str, Any]:
    """What is compared of a first step; gradients as Adam's first moments, clipped and halved."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    return {
        "terms": scalars,
        "statistics": jax.device_get(state.batch_stats),
        "gradients": {name: jax.device_get(leaf) for name, leaf in named if ".mu[" in name},
    }


def work(dtype: str, output: Path, encoder: str, nudge: bool) -> None:
    """Computes everything in this process's part of the mesh; the first process writes it."""
    mesh.initialize_distributed()
    where, kind = mesh.make_mesh(), np.dtype(dtype).type
    found = losses_and_gradients(where, kind)
    found["training"], *found["nudged"] = trainings(where, kind, encoder, [0, 1] if nudge else [0])
    if mesh.is_first():
        output.write_bytes(pickle.dumps(jax.tree.map(np.asarray, found)))
    mesh.barrier("written")


# --- in the process that was started ------------------------------------------------------------


def start(processes: int, devices: int, dtype: str, folder: Path, *words: str) -> dict[str, Any]:
    """Runs the work in so many processes, with so many devices together; `words` go to `work`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    output = folder / f"{processes}-{devices}-{dtype}.pickle"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "JAX_ENABLE_X64": str(dtype == "float64"),
        "JAX_NUM_PROCESSES": str(processes),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
    }
    if processes > 1:
        environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
    command = [
        sys.executable,
        "-m",
        "tests.reference.equality",
        "--work",
        dtype,
        str(output),
        *words,
    ]
    running = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(number)}, cwd=ROOT)
        for number in range(processes)
    ]
    status = [process.wait() for process in running]
    if any(status):
        raise RuntimeError(f"{processes} processes, {devices} devices, {dtype}: status {status}")
    return pickle.loads(output.read_bytes())


def largest(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest number wanted."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    scale = max(float(np.max(np.abs(b))) for _, b in pairs)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs) / max(scale, 1e-30)


def rows_of(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """The largest difference of everything that was computed, by name."""
    rows = {}
    for name in got:
        if name == "training":
            for part in ("terms", "gradients", "statistics"):
                rows[f"{name}: {part}"] = largest(got[name][part], want[name][part])
            curve = np.abs(np.array(got[name]["curve"]) - np.array(want[name]["curve"]))
            rows[f"{name}: loss over {STEPS} steps"] = float(curve.max())
        else:
            rows[f"{name}: value"] = largest(got[name][0], want[name][0])
            rows[f"{name}: gradient"] = largest(got[name][1], want[name][1])
    return rows


def too_large(differences: dict[tuple[int, int, str], dict[str, float]], dtype: str) -> list[str]:
    """What differs by more than the dtype explains: names with devices and difference.

    Losses, and a step in float64: BOUNDS. A step in float32, and the steps after it: ten times what
    one unit in the last place of the images does on one device, because training amplifies both.
    """
    ulp = differences[1, 1, dtype]
    found = []
    for (processes, devices, kind), rows in differences.items():
        for name, value in rows.items():
            exact = dtype == "float64" or not name.startswith("training")
            bound = BOUNDS[dtype] if exact else max(10 * ulp[name], BOUNDS[dtype])
            if name.endswith("steps") and dtype == "float64":
                bound = CURVE
            if kind == dtype and devices > 1 and value > bound:
                found.append(f"{name}, {processes} processes, {devices} devices: {value:.1e}")
    return found


def table(differences: dict[tuple[int, int, str], dict[str, float]], dtype: str) -> str:
    """A Markdown table: what by processes x devices."""
    columns = [(p, d) for p, d, kind in differences if kind == dtype]
    names = [f"{p} x {d // p}" if d > 1 else "1 x 1, one ulp" for p, d in columns]
    lines = [f"| {dtype} | {' | '.join(names)} |", f"| :-- | {' | '.join(['--:'] * len(names))} |"]
    for name in differences[(*columns[0], dtype)]:
        cells = [f"{differences[p, d, dtype][name]:.1e}" for p, d in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", nargs=2, metavar=("DTYPE", "FILE"))
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--grid", default="", help="processes x devices of each, as 1x2,2x4")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--nudge", action="store_true")
    given = parser.parse_args(words)
    if given.work:
        work(given.work[0], Path(given.work[1]), given.encoder, given.nudge)
        return 0
    grid = [tuple(map(int, cell.split("x"))) for cell in given.grid.split(",") if cell]
    grid = [(processes, processes * each) for processes, each in grid] or GRID
    wrong: list[str] = []
    encoder = ("--encoder", given.encoder)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in given.dtypes.split(","):
            want = start(1, 1, dtype, Path(folder), *encoder, "--nudge")
            (nudged,) = want.pop("nudged")
            differences = {(1, 1, dtype): rows_of(want | {"training": nudged}, want)}
            for p, d in grid:
                got = start(p, d, dtype, Path(folder), *encoder)
                got.pop("nudged")
                differences[p, d, dtype] = rows_of(got, want)
            print(table(differences, dtype), "\n", flush=True)
            wrong += too_large(differences, dtype)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
