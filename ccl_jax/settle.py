"""What a workdir was started with: written by the first start, compared by every later one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ccl_jax import config as configs
from ccl_jax import follow, mesh
from ccl_jax.atomic import write_atomically
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts, remote
from ccl_jax.workdir import is_held


def settle_workdir(config: ConfigDict, workdir: Path, split: layouts.Split, *, fresh: bool) -> None:
    """Writes config.json and data.json, or compares with what is there; the first process does.

    A `fresh` workdir, one without a checkpoint, takes any settings: nothing would be lost. The
    evaluations of a training before are put aside. Raises ValueError where settings or training
    images differ in what is computed, or where a follower of a training before is still at work;
    says what else differs.
    """
    config = with_absolute_roots(config)
    data = {
        "classes": split.class_names,
        "training_images": len(split.train),
        "sha256": hashlib.sha256("\n".join(r.key for r in split.train).encode()).hexdigest(),
    }
    if fresh:
        for old in [workdir / "published.json", *workdir.glob("skipped*.json")]:
            old.unlink(missing_ok=True)  # of a start that did not come far
        put_evaluations_aside(workdir)
    else:
        compare_settings(configs.read_json(workdir / "config.json"), config, workdir)
        # A workdir that was imported has seen no data yet.
        if (workdir / "data.json").exists() or not (workdir / "published.json").exists():
            compare_data(json.loads((workdir / "data.json").read_text()), data, workdir)
    write_atomically(workdir / "config.json", configs.to_json(config))
    write_atomically(workdir / "data.json", json.dumps(data, indent=2) + "\n")


def put_evaluations_aside(workdir: Path) -> None:
    """Moves the evaluations of other weights away, so that no step of this training has them.

    evaluation/ to evaluation-old/, or -old-2 and so on, and log-evaluation/ likewise. Those that
    hold no results stay: a follower may wait there for this training. Raises ValueError where one
    has already evaluated a training that is no more.
    """
    if not any(workdir.glob("evaluation/*/results.json")) and not (
        (log := workdir / follow.LOG / "metrics.jsonl").exists() and log.stat().st_size
    ):
        return
    if is_held(workdir / follow.LOG / follow.LOCK):
        raise ValueError(
            f"{workdir} has no checkpoints, but evaluations of a training before, which an "
            f"evaluator still follows. Stop it first (--config.eval.follow=true), then start this "
            f"and it again; or train in another folder, e.g. --workdir={workdir}-2."
        )
    for folder in (workdir / "evaluation", workdir / follow.LOG):
        if folder.exists():
            there = folder.with_name(f"{folder.name}-old")
            number = 1
            while there.exists():
                number += 1
                there = folder.with_name(f"{folder.name}-old-{number}")
            mesh.say(f"{folder} is of a training before, and was moved to {folder.rename(there)}")


def with_absolute_roots(config: ConfigDict) -> ConfigDict:
    """A copy of the config that finds the data from any folder: a later job may start elsewhere."""
    config = config.copy_and_resolve_references()
    for section in (config.data, *config.data.parts.values()):
        section.root = _absolute(section.root)
    for key in ("prepared", "cache_dir"):
        config.data[key] = _absolute(config.data[key])
    return config


def _absolute(location: str) -> str:
    return os.path.abspath(location) if location and not remote.is_url(location) else location


def compare_settings(old: ConfigDict, new: ConfigDict, workdir: Path) -> None:
    """Raises ValueError for other settings of what is computed; lists those of how to run."""
    what, how = configs.differences(old, new)
    # An imported workdir leaves open what its first training settles.
    what = [line for line in what if not line.startswith("loss.local.negatives: 'auto' -> ")]
    if what:
        lines = "\n  ".join(what)
        raise ValueError(
            f"{workdir} was started with other settings:\n  {lines}\n"
            f"Use those of {workdir / 'config.json'}, or another folder, e.g. "
            f"--workdir={workdir}-2."
        )
    if how:
        mesh.say("continuing with other settings of how to run: " + "; ".join(how))


def check_same_model(config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError where a workdir is to be used at another size or as another model."""
    what, _ = configs.differences(configs.read_json(workdir / "config.json"), config)
    other = [line for line in what if line.startswith(("model.", "data.image_size"))]
    if other:
        raise ValueError(
            f"{workdir} was trained with other settings: {'; '.join(other)}. Leave these as they "
            f"are, or train with them in another folder, e.g. --workdir={workdir}-2."
        )


def compare_data(old: dict[str, Any], new: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError where the training images are no longer those of the first start."""
    if old == new:
        return
    raise ValueError(
        f"{workdir} was started with {old['training_images']} training images of "
        f"{len(old['classes'])} classes, and config.data.root now holds {new['training_images']} "
        f"of {len(new['classes'])}, or others, so that labels and order would change. Put the "
        f"images back, or train in another folder, e.g. --workdir={workdir}-2."
    )


def skipped_in(workdir: Path) -> list[str]:
    """Why which training images could not be read, at any start, so that others stood in."""
    files = sorted(workdir.glob("skipped*.json"))
    return list(dict.fromkeys(reason for file in files for reason in json.loads(file.read_text())))
