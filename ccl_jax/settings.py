"""A config taken apart into the plain values and objects that the layers below work with."""

import dataclasses
from pathlib import Path
from typing import Any

from ccl_jax.config import ConfigDict
from ccl_jax.data import pipeline
from ccl_jax.data.layouts import Part
from ccl_jax.objective import LossSettings
from ccl_jax.pretraining.episodes import Episodes
from ccl_jax.pretraining.learn import Plan, Recipe
from ccl_jax.state import make_optimizer
from ccl_jax.train import Schedule


def parts_of(config: ConfigDict) -> dict[str, Part]:
    """The data sets of a config by name: those of a joint one, or the only one."""
    data = config.data
    if data.layout == "joint":
        return {
            name: Part(part.layout, Path(part.root), part.classes, part.splits)
            for name, part in data.parts.items()
        }
    name = data.name or Path(data.root).absolute().name
    return {name: Part(data.layout, Path(data.root), data.classes, data.splits)}


def total_steps(config: ConfigDict, images: int) -> tuple[int, int]:
    """Returns (steps of the whole training, steps per epoch).

    Raises ValueError where a batch is larger than the training set.
    """
    per_epoch = pipeline.steps_per_epoch(images, config.train.batch_size)
    return config.train.steps or config.train.epochs * per_epoch, per_epoch


def optimizer_of(config: ConfigDict, total: int) -> Any:
    """The optimizer that the config describes, for a training of `total` steps."""
    settings = config.optimizer
    return make_optimizer(
        projector_lr=settings.projector_lr,
        lr=settings.lr,
        betas=settings.betas,
        clip_norm=settings.clip_norm,
        decay_step=None if settings.decay_at == 1 else round(settings.decay_at * total),
    )


GATHERED_UP_TO = 8  # devices, one host of fast links, over which "auto" draws from the whole batch


def negatives_of(config: ConfigDict, devices: int) -> str:
    """Where negatives come from, "batch" or "near"; "auto" depends on the number of devices."""
    chosen = config.loss.local.negatives
    if chosen != "auto":
        return chosen
    return "batch" if devices <= GATHERED_UP_TO else "near"


def loss_settings(config: ConfigDict, devices: int = 1) -> LossSettings:
    """The loss terms that the config describes, on so many devices."""
    cosine, local, global_ = config.loss.cosine, config.loss.local, config.loss.global_
    return LossSettings(
        cosine_weight=cosine.weight,
        cosine_flat=cosine.flat,
        local_weight=local.weight,
        local_temperature=local.temperature,
        local_window=local.window if local.match == "window" else None,
        local_same_class=local.same_class_candidates,
        local_reach=local.reach if negatives_of(config, devices) == "near" else None,
        global_weight=global_.weight,
        global_temperature=global_.temperature,
        global_form=global_.form,
        maps_dtype=config.model.compute_dtype,
    )


def pretraining_of(config: ConfigDict) -> tuple[Recipe, Plan]:
    """What a pretraining learns first, and for how long."""
    values = config.pretrain.to_dict()
    del values["episodes"]
    plan = _plan_in(values)
    return Recipe(**_common(config), **values), plan


def episodes_of(config: ConfigDict) -> tuple[Episodes, Plan]:
    """What a pretraining learns after that, and for how long."""
    values = config.pretrain.episodes.to_dict()
    plan = _plan_in(values)
    return Episodes(**_common(config), **values), plan


def _plan_in(values: dict[str, Any]) -> Plan:
    """The plan among these values, which keep the rest."""
    return Plan(**{field.name: values.pop(field.name) for field in dataclasses.fields(Plan)})


def _common(config: ConfigDict) -> dict[str, Any]:
    return {
        "architecture": config.model.encoder,
        "compute_dtype": config.model.compute_dtype,
        "seed": config.seed,
    }


def schedule_of(config: ConfigDict, total: int) -> Schedule:
    """When the config wants what."""
    return Schedule(
        total=total,
        log_every=config.train.log_every,
        checkpoint_every=config.train.checkpoint_every,
        evaluate_every=config.eval.every_steps,
    )
