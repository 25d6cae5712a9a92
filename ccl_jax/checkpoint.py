"""Checkpoints on disk: written in the background, checked and compared before they are read.

The only file that knows orbax (its v1 interface, which still moves between minor versions).
A checkpoint carries the checksums of its files, written before it gets its name, so that whatever
has its name can be checked. In a run of several processes all of them call every method, in the
same order: the arrays are global, and each process writes and reads its part.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import tensorstore
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ccl_jax import mesh, retention
from ccl_jax.checksums import check_checksums, write_checksums
from ccl_jax.models.trees import check_same_tree

STATE = "state"  # folder within a step
# Seconds for one checkpoint to be written. Where the disk refuses one process of several, that one
# says so at once, and all of them end after this time: until then they wait for each other.
TIMEOUT = 300


class Checkpoints:
    """The numbered checkpoints of one run, `folder/<step>/`; use it as a context manager.

    With `keep` above 0 it writes, and keeps the newest `keep`, the multiples of `keep_every` steps
    (0: none), and the one whose evaluation beside `folder` has the highest mean of the metric
    `keep_best` ("": none). Only one writer may be open. With `keep` 0 it reads, changes nothing on
    disk, and may watch a folder that another process writes.
    Leaving the block waits for the last write. Raises ValueError where a reader finds no folder.
    """

    def __init__(
        self, folder: Path, *, keep: int = 0, keep_best: str = "", keep_every: int = 0
    ) -> None:
        self.folder = folder.absolute()
        self.keep = keep
        if mesh.from_first(keep == 0 and not self.folder.is_dir()):  # opening waits for all
            raise ValueError(
                f"{folder} does not exist, so there is nothing to read; name the workdir of a run "
                f"that has saved a checkpoint (--workdir), or train first (--job train)."
            )
        self._writing = -1  # the step, for the thread that ends its write
        kept = retention.Keep(
            self.folder.parent / "evaluation",
            newest=keep,
            every=keep_every,
            metric=keep_best,
            agreed=lambda choose: mesh.from_first(choose() if mesh.is_first() else -1),
        )
        context = ocp.Context()
        context.async_options.timeout_secs = TIMEOUT
        # A function, because orbax copies its options, and a method's object with them.
        context.async_options.post_finalization_callback = lambda: self._add_checksums()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=kept if keep else None,
            cleanup_tmp_directories=keep > 0,
            context=context,
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
        """The newest step that has a checkpoint, damaged or not; None where there is none."""
        newest = mesh.from_first(max(self.steps(), default=-1))
        return None if newest == -1 else newest

    def choose(self, step: int = -1) -> int:
        """Returns `step`, or for -1 the newest whose files are as they were written.

        Newer ones that are damaged are named on the way, and a writer puts them aside, so that
        their steps can be saved again. Raises ValueError where `step` has no checkpoint, where
        there is none at all, or where all are damaged.
        """
        steps = self.steps()
        if self.latest is None:
            raise ValueError(
                f"{self.folder} holds no finished checkpoint; train first, or wait for the first "
                f"one (every config.train.checkpoint_every steps)."
            )
        if step == -1:
            return self._newest_sound()
        if not mesh.from_first(step in steps):
            raise ValueError(
                f"{self.folder} has no checkpoint of step {step}; there are {_listed(steps)}. "
                f"Name one of these, or -1 for the newest."
            )
        return step

    def _newest_sound(self) -> int:
        """The newest undamaged step, found by the first process; the others take its word."""
        sound, damaged = -1, {}
        if mesh.is_first():
            for step in reversed(self.steps()):
                error = self._damage(step)
                if error is None:
                    sound = step
                    break
                damaged[step] = error
            for step, error in damaged.items() if sound != -1 else ():
                print(self._skip(step, _first_line(error), sound), flush=True)
        agreed = mesh.from_first(sound)
        if agreed == -1:
            reasons = [f"{step}: {_first_line(error)}" for step, error in damaged.items()]
            raise ValueError(
                "\n  ".join([f"every checkpoint in {self.folder} is damaged:", *reasons])
                + f"\nCopy one again from elsewhere, or put the folder aside to start from the "
                f"beginning: mv {self.folder} {self.folder}-damaged."
            ) from next(iter(damaged.values()), None)
        if self.keep:
            self._checkpointer.reload()  # without those that the first process put aside
        return agreed

    def _skip(self, step: int, reason: str, sound: int) -> str:
        """Puts a damaged checkpoint aside where this is a writer; says what happened."""
        path = self.folder / str(step)
        line = f"the checkpoint {path} is damaged ({reason})"
        if self.keep == 0:
            return f"{line}; step {sound} is used instead"
        return (
            f"{line}; it was moved to {retention.put_aside(path)}, and step {sound} is used instead"
        )

    def _damage(self, step: int) -> Exception | None:
        """What is wrong with the files of this checkpoint; None where nothing is."""
        try:
            check_checksums(self.folder / str(step) / STATE)
            _check_files(self.folder / str(step) / STATE)
        except Exception as error:  # a different type for every missing file
            return error
        return None

    def _add_checksums(self) -> None:
        """Adds the checksums to the written files; orbax names the step's folder after that."""
        (written,) = self.folder.glob(f"{self._writing}.*")
        write_checksums(written / STATE)

    def save(self, step: int, state: PyTree) -> bool:
        """Starts writing `state`; False, and nothing written, where the step has a checkpoint.

        Returns once the arrays are copied from the devices, so they may be donated right after;
        first waits for the write before, if that still runs. Raises OSError, for this write
        or the one before, where the disk refuses.
        """
        if self.keep == 0:
            raise ValueError(f"{self.folder} was opened for reading; pass keep > 0 to write.")
        self.wait()
        if mesh.from_first(step in self.steps()):
            return False
        with self._write_errors_explained():
            self._writing = step
            self._checkpointer.save_async(step, state, checkpointable_name=STATE, force=True)
        return True

    def wait(self) -> None:
        """Returns when everything is on disk; OSError where that failed."""
        with self._write_errors_explained():
            self._checkpointer.wait()

    def restore(self, step: int, abstract_state: PyTree) -> Any:
        """Returns the state of `step`, each leaf placed by its `sharding`, on any devices.

        -1 takes the newest undamaged one, as `choose` does. Every leaf of `abstract_state` is a
        `jax.ShapeDtypeStruct` with a sharding. Names, shapes and dtypes are compared first. Raises
        ValueError where the step is not there, its files are damaged, or it does not fit; the
        message names the folder, and every leaf that differs.
        """
        step = self._choose_sound(step)
        self._compare(step, abstract_state, self._described(step))
        return self._read(
            step, lambda: self._checkpointer.load(step, abstract_state, checkpointable_name=STATE)
        )

    def restore_parts(self, step: int, parts: dict[str, PyTree]) -> dict[str, PyTree]:
        """Like `restore`, for some top-level parts of the state; the others are not read."""
        step = self._choose_sound(step)
        stored = self._described(step)
        self._compare(step, parts, {name: stored[name] for name in parts if name in stored})
        only_these = ocp.Context()
        only_these.pytree_options.loading.partial_load = True

        def load() -> dict[str, PyTree]:
            with only_these:
                return ocp.load(self.folder / str(step), parts, checkpointable_name=STATE)

        return self._read(step, load)

    def _choose_sound(self, step: int) -> int:
        """`choose`, and a ValueError where the files of a step asked for by number are damaged."""
        self.wait()
        number = self.choose(step)
        if step == -1:
            return number
        error = self._damage(step) if mesh.is_first() else None
        if mesh.from_first(error is not None):
            cause = error or ValueError("found by the first process")
            raise ValueError(self._damaged_message(step, cause)) from error
        return number

    def _described(self, step: int) -> dict[str, PyTree]:
        """The tree of shapes and dtypes that the checkpoint itself states.

        Where one process cannot read it, because it was just deleted, all raise ValueError: what
        reads the arrays waits for all.
        """
        stored, failure = {}, None
        try:
            stored = self._read(step, lambda: self._checkpointer.metadata(step).metadata)
        except ValueError as error:
            failure = error
        failed = int(mesh.sum_over_processes(np.array([failure is not None], np.int64))[0])
        if failed:
            other = ValueError(f"in {failed} of the other processes")
            raise failure or ValueError(self._damaged_message(step, other))
        return stored

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
            raise ValueError(self._damaged_message(step, error)) from error

    def _damaged_message(self, step: int, cause: Exception) -> str:
        path = self.folder / str(step)
        others = [other for other in self.steps() if other != step]
        then = (
            f"the run then continues from step {others[-1]}, and {_listed(others)} can be evaluated"
            if others
            else "no other checkpoint is left, so the run then starts from the beginning"
        )
        return (
            f"the checkpoint {path} is damaged or incomplete ({_first_line(cause)}). "
            f"Copy it again if it came from elsewhere, or put it aside: "
            f"mv {path} {self.folder.parent / f'damaged-{step}'} ({then})."
        )

    @contextlib.contextmanager
    def _write_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # raised in a thread of orbax; the type depends on the storage
            others = "Another process may have said more. " if jax.process_count() > 1 else ""
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({_first_line(error)}). "
                f"{others}Check its disk (df -h {self.folder}), then start again with the same "
                f"--workdir: the run continues from the newest complete checkpoint."
            ) from error


def _check_files(folder: Path) -> None:
    """Raises ValueError or OSError where a file of the stored tree is missing or cut off.

    Reads the index, and the last byte of every array. Done before orbax reads, because its failed
    reads leave tasks behind that later fill the terminal. For checkpoints without checksums.
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
    """The first line of the error beneath orbax's wrapping, its middle left out where it is long.

    Of a full disk, the reason comes last, after the path of the file.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    line, *_ = str(error).strip().splitlines() or [""]
    if len(line) > 300:
        line = f"{line[:140]} ... {line[-140:]}"
    return f"{type(error).__name__}: {line}"


def _listed(steps: list[int]) -> str:
    return ("steps " if len(steps) > 1 else "step ") + ", ".join(map(str, steps))
