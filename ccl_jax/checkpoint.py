"""Checkpoints on disk: written in the background, compared with the model before they are read.

The only file that knows orbax (its v1 interface, which still moves between minor versions).
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorstore
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ccl_jax.models.trees import check_same_tree

STATE = "state"  # folder within a step


class Checkpoints:
    """The numbered checkpoints of one run, `folder/<step>/`; use it as a context manager.

    With `keep` above 0 it writes, and keeps the newest `keep`; only one writer may be open. With
    `keep` 0 it reads, changes nothing on disk, and may watch a folder that another process writes.
    Leaving the block waits for the last write. Raises ValueError where a reader finds no folder.
    """

    def __init__(self, folder: Path, *, keep: int = 0) -> None:
        self.folder = folder.absolute()
        self.keep = keep
        if keep == 0 and not self.folder.is_dir():
            raise ValueError(
                f"{folder} does not exist, so there is nothing to read; name the workdir of a run "
                f"that has saved a checkpoint (--workdir), or train first (--job train)."
            )
        newest = ocp.training.preservation_policies.LatestN(keep) if keep else None
        self._checkpointer = ocp.training.Checkpointer(
            self.folder, preservation_policy=newest, cleanup_tmp_directories=keep > 0
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._write_errors_explained():
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; a writer's includes the one in writing."""
        if self.keep == 0:  # another process may have added and removed some
            self._checkpointer.reload()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest step that has a checkpoint; None where there is none."""
        return max(self.steps(), default=None)

    def choose(self, step: int = -1) -> int:
        """Returns `step`, or the newest one for -1; ValueError where it has no checkpoint."""
        steps = self.steps()
        if not steps:
            raise ValueError(
                f"{self.folder} holds no finished checkpoint; train first, or wait for the first "
                f"one (every config.train.checkpoint_every steps)."
            )
        if step == -1:
            return steps[-1]
        if step not in steps:
            raise ValueError(
                f"{self.folder} has no checkpoint of step {step}; there are {_listed(steps)}. "
                f"Name one of these, or -1 for the newest."
            )
        return step

    def save(self, step: int, state: PyTree) -> bool:
        """Starts writing `state`; False, and nothing written, where the step has a checkpoint.

        Returns once the arrays are copied from the devices, so they may be donated right after;
        first waits for the write before, if that still runs. Raises OSError, for this write
        or the one before, where the disk refuses.
        """
        if self.keep == 0:
            raise ValueError(f"{self.folder} was opened for reading; pass keep > 0 to write.")
        if step in self.steps():
            return False
        with self._write_errors_explained():
            self._checkpointer.save_async(step, state, checkpointable_name=STATE, force=True)
        return True

    def wait(self) -> None:
        """Returns when everything is on disk; OSError where that failed."""
        with self._write_errors_explained():
            self._checkpointer.wait()

    def restore(self, step: int, abstract_state: PyTree) -> Any:
        """Returns the state of `step` (-1: the newest), each leaf placed by its `sharding`.

        Every leaf of `abstract_state` is a `jax.ShapeDtypeStruct` with a sharding. Names, shapes
        and dtypes are compared first. Raises ValueError where the step is not there, its files are
        damaged, or it does not fit; the message names the folder, and every leaf that differs.
        """
        self.wait()
        step = self.choose(step)
        self._compare(step, abstract_state, self._described(step))
        return self._read(
            step, lambda: self._checkpointer.load(step, abstract_state, checkpointable_name=STATE)
        )

    def restore_parts(self, step: int, parts: dict[str, PyTree]) -> dict[str, PyTree]:
        """Like `restore`, for some top-level parts of the state; the others are not read."""
        self.wait()
        step = self.choose(step)
        stored = self._described(step)
        self._compare(step, parts, {name: stored[name] for name in parts if name in stored})
        only_these = ocp.Context()
        only_these.pytree_options.loading.partial_load = True

        def load() -> dict[str, PyTree]:
            with only_these:
                return ocp.load(self.folder / str(step), parts, checkpointable_name=STATE)

        return self._read(step, load)

    def _described(self, step: int) -> dict[str, PyTree]:
        """The tree of shapes and dtypes that the checkpoint itself states, its files checked."""

        def load() -> dict[str, PyTree]:
            _check_files(self.folder / str(step) / STATE)
            return self._checkpointer.metadata(step).metadata

        return self._read(step, load)

    def _compare(self, step: int, want: PyTree, stored: PyTree) -> None:
        try:
            check_same_tree(want, stored, f"the checkpoint {self.folder / str(step)}")
        except ValueError as error:
            raise ValueError(
                f"{error}\nIt was written with other config.model or config.optimizer settings: "
                f"use those of {self.folder.parent / 'config.json'}, or another --workdir."
            ) from error

    def _read(self, step: int, load: Callable[[], Any]) -> Any:
        """Calls `load`, and explains a failure: by then the step is known to exist and to fit."""
        try:
            return load()
        except Exception as error:  # a different type for every missing file
            cause = error
        path = self.folder / str(step)
        others = [other for other in self.steps() if other != step]
        then = (
            f"the run then continues from step {others[-1]}, and {_listed(others)} can be evaluated"
            if others
            else "no other checkpoint is left, so the run then starts from the beginning"
        )
        raise ValueError(
            f"the checkpoint {path} is damaged or incomplete ({_first_line(cause)}). "
            f"Copy it again if it came from elsewhere, or put it aside: "
            f"mv {path} {self.folder.parent / f'damaged-{step}'} ({then})."
        ) from cause

    @contextlib.contextmanager
    def _write_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # raised in a thread of orbax; the type depends on the storage
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({_first_line(error)}). Check "
                f"its disk (df -h {self.folder}), then start again with the same --workdir: the "
                f"run continues from the newest complete checkpoint."
            ) from error


def _check_files(folder: Path) -> None:
    """Raises ValueError or OSError where a file of the stored tree is missing or cut off.

    Reads the index, and the last byte of every array. Done before orbax reads, because its failed
    reads leave tasks behind that later fill the terminal. Changed bytes within an array pass:
    orbax writes no checksum of them.
    """
    json.loads((folder / "_METADATA").read_text())
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    store = tensorstore.KvStore.open(spec).result()
    keys = store.list().result()
    if not keys:
        raise ValueError("its index is missing")
    for read in [store.read(key, byte_range=slice(-1, None)) for key in keys]:
        read.result()


def _first_line(error: BaseException) -> str:
    """The first 160 characters of the error beneath orbax's wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _listed(steps: list[int]) -> str:
    return ("steps " if len(steps) > 1 else "step ") + ", ".join(map(str, steps))
