"""What a training says and leaves when it begins, is complete, or was asked to stop."""

import json
import shlex
import sys
import time
from pathlib import Path

import jax

from ccl_jax import follow, mesh, settings
from ccl_jax.atomic import write_atomically
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts
from ccl_jax.run_log import RunLog
from ccl_jax.signals import Stopped


def begin(
    config: ConfigDict,
    workdir: Path,
    split: layouts.Split,
    where: jax.sharding.Mesh,
    *,
    done: int,
    total: int,
) -> None:
    """Says what is trained on what, and where it goes on.

    The first process takes the mark of a complete training away where steps are left.
    """
    if mesh.is_first() and done < total:
        (workdir / follow.COMPLETE).unlink(missing_ok=True)
    _, per_epoch = settings.total_steps(config, len(split.train))
    mesh.say(
        f"{config.name}: {len(split.train)} training images of {len(split.class_names)} "
        f"classes, {total} steps of {config.train.batch_size} images "
        f"({total / per_epoch:.1f} epochs) on {where.size} x {jax.devices()[0].device_kind}"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + (f", continuing at step {done}" if done else "")
    )


def mark_complete(workdir: Path, step: int, log: RunLog) -> None:
    """Says in `complete.json` that the checkpoint of the last step is on disk.

    {"step", "time" (Unix seconds), "seconds" since the very first start, "step_seconds" and
    "goodput" of the log}; the first process writes it. The last evaluation may still be missing.
    """
    path = workdir / follow.COMPLETE
    if mesh.is_first() and not path.exists():
        mark = {"step": step, "time": round(time.time(), 3), **log.summary()}
        write_atomically(path, json.dumps(mark, indent=2) + "\n")


def unfinished(config: ConfigDict, stopped: Stopped) -> int:
    """Says how to go on, and returns the exit status of a run that was asked to stop."""
    command = shlex.join(sys.orig_argv)
    mesh.say(f"{stopped}; run the same command to go on: {command}")
    return status_after(stopped.signal, config.run.unfinished_exit_code)


def status_after(signal: int, unfinished_exit_code: int) -> int:
    """The exit status of a run that the signal ended: the setting, or for 0 what a shell says."""
    return unfinished_exit_code or 128 + signal
