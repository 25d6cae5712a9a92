"""Compiled programs that are kept in a folder, so that the next start need not compile them."""

import os
from pathlib import Path

import filelock
import jax

KEPT_BYTES = 2**30  # of all programs in the folder; those that were not used for longest go first
LOCK_SECONDS = 10  # for which a start waits for others to read or write a program
WORTH_SECONDS = 0.1  # programs that compile faster are not kept: reading takes about as long


def keep_compiled(folder: str) -> None:
    """Lets JAX take compiled programs from `folder`, and keep there what it compiles anew.

    Does nothing for "", or where JAX has a folder already: from JAX_COMPILATION_CACHE_DIR, or from
    a program that uses this package. Call it before the first computation.

    A key holds the program, its options, the version of JAX and the devices, for CPUs with what
    their processor can do. Processes take turns at the folder (a lock), and of a run of several
    only the first writes. An entry whose writing was cut off is removed; another that cannot be
    read is compiled anew, with a warning.
    """
    if not folder or jax.config.values["jax_compilation_cache_dir"]:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        print(
            f"compiled programs are not kept: {path} cannot be written; name another folder "
            f'(--config.run.compilation_cache=FOLDER), or "" for none.'
        )
        return
    _remove_unfinished(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", KEPT_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_SECONDS)


def _remove_unfinished(folder: Path) -> None:
    """Removes programs of which JAX wrote no time of use.

    It writes that last, within its lock, so their writer was killed. Left there, each would be
    refused at every start, and keep JAX from ever storing another program.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except OSError as error:  # also where another process keeps the lock
        print(f"compiled programs in {folder} were not looked through for damage: {error}")
