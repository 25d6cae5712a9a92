"""The folder of a run: can it be written, and does no other run write it."""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from ccl_jax import mesh
from ccl_jax.atomic import write_atomically

LOCK = ".run.lock"
HOLDER = ".run.json"  # beside the lock, because a lock file may be truncated by who tries it
_TELL = 3.0  # seconds in which the others read that the first process was refused
_LOOK = 0.3  # seconds to wait for a lock that `is_locked` may hold for a moment


def check_writable(workdir: Path, setting: str = "--workdir") -> None:
    """Creates the folder if need be; ValueError naming the setting where it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ValueError(
            f"{setting}={workdir} cannot be written ({error.strerror or error}); "
            f"choose another folder, e.g. {setting}=runs/{workdir.name}, or change its owner or "
            f"permissions."
        ) from error


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes this the only run in `workdir` until the block is left.

    The operating system drops the lock when the process ends, however it ends. Raises ValueError,
    naming the other run's process, where there is one; the folder is then left as it is. Of a run
    of several processes only the first may take it.
    """
    check_writable(workdir)
    lock = filelock.FileLock(workdir / LOCK, timeout=_LOOK)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ValueError(
            f"--workdir={workdir} is in use by another run ({_read_holder(workdir / HOLDER)}). "
            f"Wait for it or stop it, or choose another folder, e.g. --workdir={workdir}-2."
        ) from error
    try:
        _write_holder(workdir / HOLDER)
        yield
    finally:
        (workdir / HOLDER).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[int]:
    """`lock_workdir` for all processes of a run; yields a number that this start has to itself.

    The first process takes the lock. Where it cannot, all raise ValueError (it, whatever has kept
    it from it), before any has written into the folder.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        if mesh.is_first():
            try:
                held.enter_context(lock_workdir(workdir))
            except (ValueError, OSError) as error:
                refusal = error
        run = mesh.from_first(0 if refusal else time.time_ns())
        if refusal is not None:
            if not mesh.is_alone():
                time.sleep(_TELL)  # its end would be theirs
            raise refusal
        if not run:
            raise ValueError(
                f"--workdir={workdir} was refused to the first process of this run, which says "
                f"why; wait, or choose another folder, e.g. --workdir={workdir}-2."
            )
        yield run


def is_locked(workdir: Path) -> bool:
    """Whether a run is in `workdir` now; finds out by taking its lock for a moment."""
    return is_held(workdir / LOCK)


def is_held(path: Path) -> bool:
    """Whether a process holds this lock file now; finds out by taking it for a moment."""
    if not path.exists():
        return False
    lock = filelock.FileLock(path, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        return True
    lock.release()
    return False


def _write_holder(path: Path) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_atomically(path, json.dumps(holder))


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:  # it has the lock, and is about to write this
        return "just starting"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
