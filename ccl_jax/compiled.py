"""Compiled programs that are kept in a folder, so that the next start need not compile them."""

import os
from pathlib import Path

import jax

KEPT_BYTES = 2**30  # of all programs in the folder; those that were not used for longest go first
WORTH_SECONDS = 0.1  # programs that compile faster are not kept: reading takes about as long


def keep_compiled(folder: str) -> None:
    """Lets JAX take compiled programs from `folder`, and keep there what it compiles anew.

    Does nothing for "", or where JAX has a folder already: from JAX_COMPILATION_CACHE_DIR, or from
    a program that uses this package. Call it before the first computation.

    A key holds the program, its options, the version of JAX and the devices, for CPUs with what
    their processor can do. Processes take turns at the folder (a lock), and of a run of several
    only the first writes. An entry that cannot be read is compiled anew, with a warning.
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
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", KEPT_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_SECONDS)
