"""The illegal values of `config.pretrain`."""

from ccl_jax.pretraining.images import KINDS
from ccl_jax.problems import Problems, is_integer, is_number


def check_pretraining(p: Problems) -> None:
    """Adds a line for every setting of a pretraining that makes no sense."""
    p.check(
        "pretrain.head_weights",
        lambda v: len(v) == 3 and all(is_number(w) and w >= 0 for w in v) and sum(v) > 0,
        "three numbers >= 0, not all 0",
        "'(0.3, 0.3, 1.0)'",
    )
    p.integer("pretrain.batch_size", 1, 80)
    p.integer("pretrain.steps", 1, 1250)
    p.number("pretrain.label_smoothing", 0.0, 0.9, 0.1)
    for key in ("composite", "dense"):
        p.check(f"pretrain.{key}", lambda v: isinstance(v, bool), "True or False", False)
    p.integer("pretrain.episodes.steps", 0, 2000)
    p.integer("pretrain.episodes.group", 3, 8)
    p.integer("pretrain.episodes.sound", 1, 2)
    p.integer("pretrain.episodes.memory", 1, 1024)
    p.number("pretrain.episodes.softness", 0.0, 100.0, 0.15, above=True)
    for key in ("stage_weight", "image_weight"):
        p.number(f"pretrain.episodes.{key}", 0.0, 100.0, 0.5)
    for section in ("pretrain", "pretrain.episodes"):
        p.check(
            f"{section}.kinds",
            lambda v: len(v) > 0 and all(kind in KINDS for kind in v) and len(set(v)) == len(v),
            f"some of {', '.join(KINDS)}",
            "\"('networks','noise')\"",
        )
        for key, example in (("per_kind", 2), ("checkpoint_every", 200), ("log_every", 50)):
            p.integer(f"{section}.{key}", 1, example)
        p.integer(f"{section}.warmup_steps", 0, 200)
        p.check(
            f"{section}.image_size",
            lambda v: is_integer(v) and v >= 32 and v % 16 == 0,
            "a multiple of 16, the stride of the coarsest map, from 32 on",
            64,
        )
        p.number(f"{section}.lr", 0.0, 10.0, 1e-3, above=True)
        p.number(f"{section}.weight_decay", 0.0, 10.0, 0.05)
        p.number(f"{section}.decay_share", 0.0, 0.9, 0.25)
