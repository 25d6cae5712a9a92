"""A disk that fills up during a save: an error, the last good checkpoint, and on it goes."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import jobs
from ccl_jax.checkpoint import Checkpoints

MIB = 2**20


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of `size` bytes at `folder`, in memory; what comes back gives it another size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error}); run as root, e.g. with sudo")

    def resize(size: int) -> None:
        remount = ["mount", "-o", f"remount,size={size}", str(folder)]
        subprocess.run(remount, check=True, capture_output=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def noise(step: int) -> dict:
    """Four MiB that no compression makes smaller."""
    return {"kernel": jax.random.normal(jax.random.key(step), (MIB,)), "step": jnp.int32(step)}


def abstract(state: dict) -> dict:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def test_disk_that_fills_up_raises_and_leaves_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 10 * MIB) as resize:
        folder = disk / "checkpoints"
        with (
            pytest.raises(OSError, match=r"could not be written .*No space left.*--workdir"),
            Checkpoints(folder, keep=9) as checkpoints,
        ):
            for step in range(1, 5):
                checkpoints.save(step, noise(step))
        with Checkpoints(folder) as checkpoints:
            good = checkpoints.steps()
            assert good == [1, 2]  # of almost four MiB each
            found = checkpoints.restore(-1, abstract(noise(0)))
        jax.tree.map(np.testing.assert_array_equal, found, noise(2))

        resize(40 * MIB)
        with Checkpoints(folder, keep=9) as checkpoints:
            for step in (3, 4):
                assert checkpoints.save(step, noise(step))
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "4"]
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(-1, abstract(noise(0)))
        jax.tree.map(np.testing.assert_array_equal, found, noise(4))


@pytest.mark.slow
def test_training_on_a_full_disk_stops_with_an_error_and_goes_on_when_there_is_space(
    trained, tiny_config, tmp_path
):
    disk = tmp_path / "disk"
    needed = sum(path.stat().st_size for path in trained.rglob("*") if path.is_file())
    with small_disk(disk, 2 * needed) as resize:
        workdir = disk / "run"
        shutil.copytree(trained, workdir)
        for folder in ("checkpoints/4", "evaluation/4"):
            shutil.rmtree(workdir / folder)
        (workdir / "complete.json").unlink()
        used = shutil.disk_usage(disk).used
        resize(used + (trained_checkpoint := size_of(workdir / "checkpoints/2")) // 2)
        with pytest.raises(OSError, match=r"could not be written .*No space left.*--workdir"):
            jobs.train_job(tiny_config, workdir)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            assert checkpoints.steps() == [2]

        resize(used + 4 * trained_checkpoint)
        assert jobs.train_job(tiny_config, workdir) == 0
        for part in ("d", "ocdbt.process_0/d"):
            assert any((workdir / "checkpoints/4/state" / part).iterdir())
        assert stored(workdir) == stored(trained)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stored(workdir: Path) -> dict[str, bytes]:
    """Every leaf of step 4, by name."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            {name: checkpoints._described(4)[name] for name in ("params", "batch_stats")},
        )
        state = checkpoints.restore_parts(4, target)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
