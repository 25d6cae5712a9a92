"""A checkpoint saved on some devices is read on others: one, two or four, whole or sharded."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ccl_jax.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
LAYOUTS = {
    "replicated": {"kernel": PartitionSpec(), "rows": PartitionSpec()},
    "sharded": {"kernel": PartitionSpec(("data", "shard")), "rows": PartitionSpec("shard")},
    "other axis": {"kernel": PartitionSpec(None, "shard"), "rows": PartitionSpec()},
}
# One of the functions below, in a process with two devices.
PROCESS = """
import sys
from pathlib import Path
import jax

jax.config.update("jax_num_cpu_devices", 2)
from ccl_jax import checkpoint, mesh
from tests import test_checkpoint_topology as topology

job, folder = sys.argv[1], Path(sys.argv[2])
assert mesh.initialize_distributed()
getattr(topology, job)(folder)
"""


def grid(data: int, shard: int) -> Mesh:
    devices = np.array(jax.devices()[: data * shard]).reshape(data, shard)
    return Mesh(devices, ("data", "shard"), axis_types=(AxisType.Auto,) * 2)


def shardings(where: Mesh, layout: str) -> dict:
    named = {name: NamedSharding(where, spec) for name, spec in LAYOUTS[layout].items()}
    return {"params": named, "step": NamedSharding(where, PartitionSpec())}


def make(step: int, where: Mesh, layout: str) -> dict:
    def values():
        kernel, rows = jax.random.normal(jax.random.key(step), (8, 6)), jnp.arange(4.0) * step
        return {"params": {"kernel": kernel, "rows": rows}, "step": jnp.int32(step)}

    return jax.jit(values, out_shardings=shardings(where, layout))()


def abstract(where: Mesh, layout: str) -> dict:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        make(0, where, layout),
    )


def assert_equal_shards(state: dict, wanted: dict) -> None:
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, wanted
    )
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        for mine, theirs in zip(one.addressable_shards, other.addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, theirs.data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step 7, saved from four devices with parameters sharded over both axes."""
    folder = tmp_path_factory.mktemp("sharded") / "checkpoints"
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(7, make(7, grid(2, 2), "sharded"))
    return folder


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_state_of_four_devices_is_read_on_any_mesh(saved, shape, layout):
    where = grid(*shape)
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore(-1, abstract(where, layout))
    assert_equal_shards(state, make(7, where, layout))


# --- two processes, with two devices each ------------------------------------------------------


def save_together(folder: Path) -> None:
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, make(step, grid(2, 2), "sharded"))
        assert not checkpoints.save(3, make(3, grid(2, 2), "sharded"))
        assert checkpoints.steps() == [2, 3]


def read_together(folder: Path) -> None:
    for layout in ("sharded", "other axis"):
        with Checkpoints(folder) as checkpoints:
            state = checkpoints.restore(-1, abstract(grid(2, 2), layout))
        assert_equal_shards(state, make(7, grid(2, 2), layout))


def skip_together(folder: Path) -> None:
    """Reads step 2, because step 3 is damaged, and saves step 3 again."""
    with Checkpoints(folder, keep=2) as checkpoints:
        state = checkpoints.restore(-1, abstract(grid(2, 2), "sharded"))
        assert_equal_shards(state, make(2, grid(2, 2), "sharded"))
        assert checkpoints.steps() == [2]
        assert checkpoints.save(3, make(3, grid(2, 2), "sharded"))


def start(job: str, folder: Path, number: int, port: int) -> subprocess.Popen:
    several = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, job, str(folder)],
        env=os.environ | several | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_together(job: str, folder: Path) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of the two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(job, folder, number, port) for number in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:  # a full pipe of one would hold up both
            texts = list(pool.map(lambda process: process.communicate(timeout=150), processes))
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


@pytest.mark.slow
def test_two_processes_save_together_and_one_reads(tmp_path):
    folder = tmp_path / "checkpoints"
    for status, _, error in run_together("save_together", folder):
        assert status == 0, error
    assert (folder / "3/state/array_metadatas/process_1").exists()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        for step in (2, 3):
            state = checkpoints.restore(step, abstract(grid(1, 2), "sharded"))
            assert_equal_shards(state, make(step, grid(1, 2), "sharded"))

    # The newest is damaged: both processes take the one before, and one of them puts it aside.
    (folder / "3/state/_METADATA").unlink()
    results = run_together("skip_together", folder)
    for status, _, error in results:
        assert status == 0, error
    assert "step 2 is used instead" in results[0][1] and "damaged" not in results[1][1]
    assert (tmp_path / "damaged-3").is_dir()
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(-1, abstract(grid(1, 1), "replicated"))
    assert_equal_shards(state, make(3, grid(1, 1), "replicated"))


@pytest.mark.slow
def test_one_process_saves_and_two_read_together(saved):
    for status, _, error in run_together("read_together", saved):
        assert status == 0, error


def fail_together(folder: Path) -> None:
    """The disk refuses the second process at step 2; what the first one raises is printed."""
    from ccl_jax import checkpoint

    checkpoint.TIMEOUT = 8
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, make(1, grid(2, 2), "sharded"))
        checkpoints.wait()
        if jax.process_index() == 1:
            refuse_writes()
        checkpoints.save(2, make(2, grid(2, 2), "sharded"))
        try:
            checkpoints.wait()
        except OSError as error:
            print(error, flush=True)
            raise
    raise AssertionError("nothing was raised")


def refuse_writes() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.slow
def test_disk_that_refuses_one_process_of_two_ends_both_and_leaves_the_last_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    first, second = run_together("fail_together", folder)
    assert first[0] != 0 and second[0] != 0
    assert "could not be written" in first[1] and "Another process may have said more" in first[1]
    assert "File too large" in second[2]
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1]
        state = checkpoints.restore(-1, abstract(grid(1, 1), "replicated"))
    assert_equal_shards(state, make(1, grid(1, 1), "replicated"))
