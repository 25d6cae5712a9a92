"""The loop around the pretraining steps: checkpoints, log, and the file that it is all for.

The rate is constant after its warm-up and falls to zero over the last steps. Checkpoints from
before that fall are kept apart (`checkpoints/`, the fall in `decay-<steps>/`), so that a run with
more steps goes on from there in the same folder, and computes what it would have from the start.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ccl_jax import mesh
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.models.pretrained import load_encoder, sha256_of
from ccl_jax.models.trees import read_made
from ccl_jax.pretraining import episodes, learn
from ccl_jax.pretraining.episodes import Episodes
from ccl_jax.pretraining.images import check_batch
from ccl_jax.pretraining.learn import (
    LearnState,
    Plan,
    Recipe,
    Scalars,
    abstract_encoder,
    make_optimizer,
)
from ccl_jax.pretraining.weights import write_weights
from ccl_jax.provenance import provenance
from ccl_jax.run_log import RunLog
from ccl_jax.signals import StopRequest
from ccl_jax.state import purpose_key

WEIGHTS = "encoder.safetensors"
# Settings of a recipe that stand elsewhere than in config.pretrain.
SETTINGS = {
    "architecture": "config.model.encoder",
    "compute_dtype": "config.model.compute_dtype",
    "seed": "config.seed",
}


class Look(NamedTuple):
    """What a run shows of itself."""

    tensorboard: bool
    progress: bool


def pretrain(
    workdir: Path,
    recipe: Recipe | Episodes,
    plan: Plan,
    *,
    begin: Path | None = None,
    where: jax.sharding.Mesh,
    look: Look,
    stop: StopRequest,
) -> str | None:
    """Learns the steps that are left; the sha256 of `workdir/encoder.safetensors`, when done.

    The folder's name is that of the phase, and of its section of the config. Episodes begin with
    the encoder in the file `begin`. None where a signal stopped it first: the state is then saved,
    and the same call goes on. A call with more steps goes on from before the rate fell.

    Raises:
        ValueError: for an impossible recipe, for a folder that was begun with another one, or for
            fewer steps than the folder has already done at the constant rate.
        FloatingPointError: naming the step from which the loss was not finite.
    """
    check_recipe(recipe, where.size, workdir.name)
    story = Story.open(workdir, recipe, begin)
    with (
        Checkpoints(workdir / "checkpoints", keep=1) as constant,
        Checkpoints(workdir / f"decay-{plan.decay_start}-{plan.steps}", keep=1) as falling,
    ):
        state = restored(recipe, plan, constant, falling, where, begin)
        done = int(state.step)
        if done < plan.steps:
            story.start(done, where)
        with RunLog(
            workdir / "log",
            total_steps=plan.steps,
            start_step=done,
            images_per_step=recipe.batch_size,
            tensorboard=look.tensorboard,
            progress=look.progress,
        ) as log:
            step = jax.jit(
                make_step_of(recipe, plan, where),
                donate_argnums=0,
                out_shardings=mesh.replicated(where),
            )
            pending: list[Scalars] = []
            for number in range(done + 1, plan.steps + 1):
                state, scalars = step(state)
                pending.append(scalars)
                jax.block_until_ready(pending[-2:-1])  # one step is computed, the next one sent
                done = number
                log.advance(done)
                ends = stop.signal is not None or done == plan.steps
                saves = ends or done == plan.decay_start or done % plan.checkpoint_every == 0
                if saves or done % plan.log_every == 0:
                    log.write(done, mean_of(pending, done))
                if saves:
                    (constant if done <= plan.decay_start else falling).save(done, state)
                    story.save()
                if ends:
                    break
    if done < plan.steps:
        return None
    return write_result(workdir / WEIGHTS, state, recipe, plan, story)


class Story:
    """What a folder was begun with, where and for how long it has computed; in its `story.json`."""

    def __init__(
        self,
        path: Path,
        recipe: Recipe | Episodes,
        begun_from: dict[str, Any],
        seconds: float,
        starts: list[Any],
    ) -> None:
        self.path, self.recipe, self.begun_from, self.starts = path, recipe, begun_from, starts
        self._before, self._start = seconds, time.perf_counter()

    @classmethod
    def open(cls, workdir: Path, recipe: Recipe | Episodes, begin: Path | None) -> "Story":
        """Reads `workdir/story.json`, or begins one; ValueError where it tells another recipe."""
        path = workdir / "story.json"
        begun_from = {} if begin is None else read_made(begin)
        if not path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            return cls(path, recipe, begun_from, 0.0, [])
        old = json.loads(path.read_text())
        digest = begun_from.get("tensors_sha256")
        if old.get("begun_from") != digest:
            raise ValueError(
                f"{workdir} was begun with another encoder than {begin}; remove the folder, or use "
                f"another one, e.g. --workdir={workdir.parent}-2."
            )
        new = as_json(recipe)
        section = f"pretrain.{workdir.name}" if isinstance(recipe, Episodes) else "pretrain"
        differ = [
            f"{SETTINGS.get(name, f'config.{section}.{name}')}: {before!r} -> {new.get(name)!r}"
            for name, before in old["recipe"].items()
            if before != new.get(name)
        ]
        if differ or old["recipe"].keys() != new.keys():
            lines = "\n  ".join(differ or ["by another version of ccl_jax"])
            raise ValueError(
                f"{workdir} was begun with other settings:\n  {lines}\nUse the settings "
                f"of {path}, or another folder, e.g. --workdir={workdir}-2."
            )
        return cls(path, recipe, begun_from, old["seconds"], old["starts"])

    def start(self, step: int, where: jax.sharding.Mesh) -> None:
        """Notes who goes on from `step`, as what is installed may have changed by the end."""
        device = f"{where.size} x {where.devices.flat[0].device_kind}"
        if jax.default_backend() == "cpu":
            device += f" on {os.cpu_count()} cores"
        made = provenance({"seed": self.recipe.seed})
        start = {name: made[name] for name in ("command", "commit", "versions")}
        self.starts.append({"step": step, "device": device, **start})

    @property
    def seconds(self) -> float:
        """Of computing so far, over all starts of the run."""
        return self._before + time.perf_counter() - self._start

    def save(self) -> None:
        """Writes the story, complete or not at all."""
        recipe = dataclasses.asdict(self.recipe)
        text = {
            "recipe": recipe,
            "begun_from": self.begun_from.get("tensors_sha256"),
            "seconds": round(self.seconds, 1),
            "starts": self.starts,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(text, indent=2) + "\n")
        os.replace(partial, self.path)


def check_recipe(recipe: Recipe | Episodes, devices: int, phase: str) -> None:
    """Raises ValueError where batch, kinds and devices do not go together."""
    if isinstance(recipe, Episodes):
        mesh.check_divisible(recipe.per_kind, devices, f"pretrain.{phase}.per_kind")
        return
    check_batch(recipe.batch_size, recipe.kinds)
    parts = len(recipe.kinds) * devices
    if recipe.batch_size % parts:
        up = math.ceil(recipe.batch_size / parts) * parts
        raise ValueError(
            f"config.pretrain.batch_size={recipe.batch_size} cannot be split over {devices} "
            f"devices and {len(recipe.kinds)} kinds of images; use a multiple of {parts}, e.g. "
            f"--config.pretrain.batch_size={up}."
        )


def restored(
    recipe: Recipe | Episodes,
    plan: Plan,
    constant: Checkpoints,
    falling: Checkpoints,
    where: jax.sharding.Mesh,
    begin: Path | None,
) -> LearnState:
    """The newest state that leads to this plan, or the one before the first step.

    Raises:
        ValueError: where the constant rate has been used for longer than the plan says.
    """
    replicated = mesh.replicated(where)
    optimizer = make_optimizer(recipe, plan)
    key = purpose_key(jax.random.key(recipe.seed), "weights", 0)

    trees = None if begin is None else _encoder_in(begin, recipe.architecture)

    def init(key: jax.Array) -> LearnState:
        if isinstance(recipe, Episodes):
            return episodes.init_state(recipe, optimizer, key, trees)
        return learn.init_state(recipe, optimizer, key)

    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(init, key),
    )
    if falling.latest is not None:
        return falling.restore(-1, abstract)
    if constant.latest is None:
        return jax.jit(init, out_shardings=replicated)(key)
    if constant.latest > plan.decay_start:
        least = math.ceil(constant.latest / (1 - plan.decay_share)) + 1
        raise ValueError(
            f"{constant.folder.parent} has done {constant.latest} steps at the constant rate, and "
            f"config.pretrain.steps={plan.steps} would let it fall from step {plan.decay_start} on;"
            f" use more steps, e.g. --config.pretrain.steps={least}."
        )
    return constant.restore(-1, abstract)


def make_step_of(
    recipe: Recipe | Episodes, plan: Plan, where: jax.sharding.Mesh
) -> Callable[[LearnState], tuple[LearnState, Scalars]]:
    """The step of either phase, pure and ready to jit."""
    optimizer = make_optimizer(recipe, plan)
    if isinstance(recipe, Episodes):
        return episodes.make_step(recipe, optimizer, where)
    return learn.make_step(recipe, optimizer, where)


def mean_of(pending: list[Scalars], done: int) -> dict[str, float]:
    """The mean of each scalar over the pending steps, the last of them number `done`; empties them.

    Raises:
        FloatingPointError: naming the first step with a value that is not finite.
    """
    rows = jax.device_get(pending)
    pending.clear()
    for step, row in enumerate(rows, start=done - len(rows) + 1):
        bad = {name: float(value) for name, value in row.items() if not math.isfinite(value)}
        if bad:
            raise FloatingPointError(
                f"step {step}: not finite: {bad}. Begin again in a new workdir, with a "
                f"config.pretrain.lr of half as much."
            )
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}


def write_result(
    path: Path, state: LearnState, recipe: Recipe | Episodes, plan: Plan, story: Story
) -> str:
    """Writes the encoder with all that it takes to make it again; the file's sha256.

    A file of the same recipe, steps and fall is left alone. The noted `seconds` hold the time of
    falls that a longer run has thrown away, too.
    """
    made = {
        "recipe": as_json(recipe),
        "steps": plan.steps,
        "decay_share": plan.decay_share,
        "images": plan.steps * recipe.batch_size,
        "seconds": round(story.seconds),
        "starts": story.starts,
        **({"begun_from": story.begun_from} if story.begun_from else {}),
    }
    before = read_made(path) if path.exists() else {}
    if all(before.get(name) == made[name] for name in ("recipe", "steps", "decay_share")):
        return sha256_of(path)
    params, batch_stats = jax.device_get((state.params["encoder"], state.batch_stats["encoder"]))
    return write_weights(path, params, batch_stats, made)


def _encoder_in(path: Path, architecture: str) -> tuple[Any, Any]:
    """Parameters and statistics in a file of an earlier phase."""
    _, *wanted = abstract_encoder(architecture)
    params, batch_stats, _ = load_encoder(str(path), architecture, *wanted)
    return params, batch_stats


def as_json(recipe: Recipe | Episodes) -> dict[str, Any]:
    """The recipe as it reads back from a JSON file, tuples being lists."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
