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

LOCK = ".run.lock"
HOLDER = ".run.json"  # beside the lock, because a lock file may be truncated by who tries it
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
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(holder))
    os.replace(partial, path)


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:  # it has the lock, and is about to write this
        return "just starting"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
