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
    only the first writes. An entry whose writing was cut off is removed, unless another process
    has tried to read it since; one that cannot be read is compiled anew, with a warning.
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
    """Removes programs without a time of use, and says how many.

    JAX writes it last, within its lock, so their writer was killed, or was a JAX that was given no
    bound on the folder's size and keeps no times. Left there, one keeps JAX from storing any other
    program until it is asked for itself; from then on it has a time, and where it was cut off it is
    refused at every start.
    """
    removed = 0
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
                    removed += 1
    except OSError as error:  # also where another process keeps the lock
        print(
            f"compiled programs in {folder} were not looked through for damage, so some may be "
            f"compiled at every start ({error}); if this comes again, remove them: rm -r {folder}"
        )
    if removed:
        print(f"removed {removed} compiled programs in {folder} that were not written to the end")
