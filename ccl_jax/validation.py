"""Every illegal value of a config, named with a fix, before anything starts."""

from typing import Any

from ccl_jax.config import ConfigDict, flatten
from ccl_jax.data.layouts import LAYOUTS, VALIDATION
from ccl_jax.mesh import CLUSTERS
from ccl_jax.metrics.conventions import CONVENTIONS
from ccl_jax.metrics.scores import METRICS
from ccl_jax.models.pretrained import check_builtin
from ccl_jax.problems import Problems, is_integer, is_number
from ccl_jax.validation_pretraining import check_pretraining
from ccl_jax.validation_run import check_benchmark, check_faults

ENCODERS = ("resnet10", "resnet18", "resnet34", "resnet50", "wide_resnet50_2")


def validate(config: ConfigDict, *, needs_data: bool = True) -> None:
    """Raises ValueError naming every illegal value; touches no device and reads no data file.

    `needs_data` is False for a job that reads no data set.
    """
    problems = Problems(config)
    if needs_data and not has_prepared_data(config):
        joint = problems.values.get("data.layout") == "joint"
        for root in _part_keys(problems, "root") if joint else ["data.root"]:
            problems.check(root, lambda v: v and isinstance(v, str), "a folder", "/data/photos")
    problems.check("name", lambda v: isinstance(v, str) and bool(v), "a name", "mine")
    problems.check("seed", lambda v: is_integer(v) and 0 <= v < 2**32, "in 0 .. 2**32-1", 42)
    for check in (
        _data,
        _model,
        _loss,
        _augment,
        _train,
        _evaluate_and_predict,
        check_pretraining,
        check_benchmark,
        _run,
        check_faults,
    ):
        check(problems)
    if not problems.lines:
        _together(problems, config)
    if problems.lines:
        head = f"{len(problems.lines)} illegal setting{'s' * (len(problems.lines) > 1)}:"
        raise ValueError("\n  ".join([head, *problems.lines]))


def has_prepared_data(config: ConfigDict) -> bool:
    """Whether the config names prepared data, which need no folder that they were made from."""
    values = dict(flatten(config))
    return values.get("data.source") == "prepared" and bool(values.get("data.prepared"))


def _data(p: Problems) -> None:
    p.choice("data.layout", *LAYOUTS, "joint", "synthetic")
    _parts(p)
    p.check(
        "data.name", lambda v: isinstance(v, str) and "/" not in v, 'a name without "/"', "mvtec"
    )
    _names(p, "data.classes", "class names", "\"('carpet','wood')\"")
    _names(p, "data.views", "names of views", "\"('C1','C2')\"")
    p.check("data.splits", lambda v: isinstance(v, str), "a file or a folder", "my_split.csv")
    p.choice("data.validation", *VALIDATION)
    p.check("data.follow_links", lambda v: isinstance(v, bool), "True or False", False)
    p.check(
        "data.image_size",
        lambda v: is_integer(v) and v >= 64 and v % 32 == 0,
        "a multiple of 32, at least 64 (the neck halves the image five times)",
        256,
    )
    p.choice("data.shuffle", "plain", "class_balanced")
    p.choice("data.check", "headers", "full")
    p.choice("data.source", "folder", "prepared")
    p.choice("data.prepared_images", "original", "resized")
    for key, example in (("prepared", "/data/prepared"), ("cache_dir", "/data/cache")):
        p.check(f"data.{key}", lambda v: isinstance(v, str), "a folder", example)
    source, layout, where = (
        p.values.get(f"data.{key}") for key in ("source", "layout", "prepared")
    )
    if source == "prepared" and layout == "joint" and where == "":
        p.lines.append(
            "config.data.prepared='' means a folder beside the images, and those of "
            "config.data.layout='joint' lie in several; name one, e.g. "
            "--config.data.prepared=/data/joint-prepared."
        )
    p.number("data.cache_gib", 0.0, 1e6, 2.0)
    p.choice("data.bad_files", "stop", "skip")
    p.check(
        "synthetic.image_size", lambda v: is_integer(v) and 32 <= v <= 1024, "in 32 .. 1024", 128
    )
    for key, least in (
        ("train_per_class", 1),
        ("test_normal_per_class", 1),
        ("test_per_defect", 1),
        ("seed", 0),
    ):
        p.integer(f"synthetic.{key}", least, max(least, 5))


def _parts(p: Problems) -> None:
    """The data sets of a joint one."""
    if p.values.get("data.layout") == "joint" and not _part_keys(p, "layout"):
        p.lines.append(
            'config.data.layout="joint" needs the data sets in config.data.parts, each with layout '
            "and root; see configs/joint.py."
        )
    for key, nothing in {"root": "''", "classes": '"()"', "splits": "''"}.items():
        value = p.values.get(f"data.{key}")
        if p.values.get("data.layout") == "joint" and value:
            p.lines.append(
                f"config.data.{key}={value!r} means nothing for config.data.layout=joint; say it "
                f"of a part, as in config.data.parts.mvtec.{key}, and leave it out here: "
                f"--config.data.{key}={nothing}"
            )
    for key in _part_keys(p, "layout"):
        p.choice(key, *LAYOUTS)
    layouts = [p.values.get(key) for key in ("data.layout", *_part_keys(p, "layout"))]
    if p.values.get("data.validation") == "train" and "mvtec2" not in layouts:
        p.lines.append(
            f"config.data.validation='train' means nothing for config.data.layout={layouts[0]}, "
            "which has no validation images; leave it out: --config.data.validation=leave."
        )
    for key in _part_keys(p, "splits"):
        p.check(key, lambda v: isinstance(v, str), "a file or a folder", "my_split.csv")
    for key in _part_keys(p, "classes"):
        _names(p, key, "class names", "\"('carpet','wood')\"")


def _part_keys(p: Problems, setting: str) -> list[str]:
    """The keys of one setting in all parts, whether it is there or not."""
    parts = sorted({tuple(key.split(".")[:3]) for key in p.values if key.startswith("data.parts.")})
    return [".".join([*part, setting]) for part in parts]


def _names(p: Problems, key: str, what: str, example: str) -> None:
    p.check(
        key,
        lambda v: isinstance(v, tuple) and all(isinstance(name, str) for name in v),
        f"a tuple of {what}; () takes all",
        example,
    )


def _model(p: Problems) -> None:
    p.choice("model.family", "rd")
    p.choice("model.encoder", *ENCODERS)
    p.choice("model.projector", "plain", "depthwise", "none")
    p.number("model.noise_probability", 0.0, 1.0, 0.3085)
    p.choice("model.compute_dtype", "float32", "bfloat16")
    p.integer("model.norm_images", 0, 0)
    p.check(
        "encoder.weights",
        is_weights_source,
        '"builtin", "random", "hub:NAME", or a .safetensors, .pth, .pt or .bin file',
        "hub:wide_resnet50_2.racm_in1k",
    )


def is_weights_source(value: Any) -> bool:
    """Whether encoder weights can come from there, by its form: a workdir outlives the file."""
    if not isinstance(value, str):
        return False
    endings = (".safetensors", ".pth", ".pt", ".bin")
    return (
        value in ("builtin", "random")
        or (value.startswith("hub:") and len(value) > 4)
        or value.lower().endswith(endings)
    )


def _loss(p: Problems) -> None:
    for term in ("cosine", "local", "global_"):
        p.number(f"loss.{term}.weight", 0.0, 1e6, 1.0)
    p.check("loss.cosine.flat", lambda v: isinstance(v, bool), "True or False", True)
    for term in ("local", "global_"):
        p.number(f"loss.{term}.temperature", 0.01, 10.0, 0.05)
    p.choice("loss.local.match", "global", "window")
    p.choice("loss.local.negatives", "auto", "batch", "near")
    p.integer("loss.local.reach", 1, 15)
    p.check("loss.local.window", lambda v: is_integer(v) and v > 0 and v % 2 == 1, "odd", 5)
    p.check(
        "loss.local.same_class_candidates", lambda v: isinstance(v, bool), "True or False", False
    )
    p.choice("loss.global_.form", "two_view", "second_release")


def _augment(p: Problems) -> None:
    p.interval("augment.crop_scale", 0.0, 1.0, (0.8, 1.0))
    p.interval("augment.crop_ratio", 0.0, 100.0, (0.75, 1.333))
    for key in ("horizontal_flip", "vertical_flip", "grayscale"):
        p.number(f"augment.{key}", 0.0, 1.0, 0.5)
    for key in ("brightness", "contrast", "saturation"):
        p.number(f"augment.{key}", 0.0, 1.0, 0.4)
    p.number("augment.hue", 0.0, 0.5, 0.1)
    p.check("augment.blur_kernel", lambda v: is_integer(v) and v > 0 and v % 2 == 1, "odd", 23)
    p.interval("augment.blur_sigma", 0.0, 100.0, (0.1, 2.0))
    p.number("augment.rotation", 0.0, 180.0, 15.0)


def _train(p: Problems) -> None:
    p.number("optimizer.projector_lr", 0.0, 10.0, 1e-3)
    p.number("optimizer.lr", 0.0, 10.0, 5e-3)
    p.check(
        "optimizer.betas",
        lambda v: len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
        "two numbers in [0, 1)",
        "'(0.5, 0.999)'",
    )
    p.number("optimizer.clip_norm", 0.0, 1e6, 5.0)
    p.number("optimizer.decay_at", 0.0, 1.0, 0.8, above=True)
    p.integer("train.batch_size", 1, 16)
    p.integer("train.epochs", 0, 200)
    p.integer("train.steps", 0, 1000)
    p.integer("train.log_every", 1, 10)
    p.integer("train.checkpoint_every", 1, 1000)
    p.integer("train.keep_checkpoints", 1, 2)
    p.choice("train.keep_best", "", *METRICS)
    p.integer("train.keep_every", 0, 10_000)


def _evaluate_and_predict(p: Problems) -> None:
    p.integer("eval.every_steps", 0, 1000)
    p.integer("eval.batch_size", 1, 16)
    p.number("eval.smoothing_sigma", 0.0, 100.0, 4.0)
    p.choice("eval.combine", "add", "mul", "concatenate")
    p.choice("eval.distance", "cosine", "l2")
    p.integer("eval.pool", 1, 16)
    p.choice("eval.image_label", "folder", "mask")
    p.number("eval.aupro_fpr_limit", 0.0, 1.0, 0.3, above=True)
    p.check(
        "eval.published_metrics",
        lambda v: isinstance(v, tuple) and all(name in CONVENTIONS for name in v),
        f"a tuple of names out of {', '.join(CONVENTIONS)}; () takes none",
        "\"('adeval_50',)\"",
    )
    p.integer("eval.figures_per_class", 0, 4)
    p.integer("eval.step", -1, -1)
    p.check("eval.follow", lambda v: isinstance(v, bool), "True or False", True)
    p.number("eval.poll_seconds", 0.0, 1e6, 10.0, above=True)
    p.number("eval.follow_patience", 0.0, 1e9, 3600.0)
    p.check("predict.input", lambda v: isinstance(v, str), "a file or a folder", "photos/")
    p.check("predict.output", lambda v: isinstance(v, str), "a folder", "predictions/")
    p.integer("predict.batch_size", 1, 8)
    p.integer("predict.step", -1, -1)
    p.check("published.checkpoint", lambda v: isinstance(v, str), "a file", "net.pth")
    p.check(
        "published.output",
        lambda v: v == "" or (isinstance(v, str) and v.endswith(".safetensors")),
        "a .safetensors file",
        "net.safetensors",
    )
    p.integer("published.step", -1, -1)


def _run(p: Problems) -> None:
    p.integer("run.devices", 0, 0)
    p.integer("run.parameter_shards", 1, 1)
    p.integer("run.heartbeat_seconds", 10, 100)
    p.choice("run.cluster", "auto", "none", *CLUSTERS)
    p.integer("run.threads", 1, 4)
    p.integer("run.workers", 0, 0)
    for key in ("deterministic", "remat", "progress", "tensorboard"):
        p.check(f"run.{key}", lambda v: isinstance(v, bool), "True or False", True)


def _together(p: Problems, config: ConfigDict) -> None:
    """Settings that are legal alone and not together."""
    if config.train.steps == 0 and config.train.epochs == 0:
        p.lines.append("config.train.steps and config.train.epochs are both 0; set one of them.")
    if config.encoder.weights == "builtin":
        try:
            check_builtin(config.model.encoder)
        except ValueError as error:
            p.lines.append(str(error))
    total = config.loss.cosine.weight + config.loss.local.weight + config.loss.global_.weight
    if total == 0:
        p.lines.append("all of config.loss.*.weight are 0; nothing would be trained.")
    if config.model.projector == "none" and config.loss.local.weight > 0:
        p.lines.append(
            'config.model.projector="none" leaves the local loss nothing to train; add '
            "--config.loss.local.weight=0 (RD without CCL also --config.loss.global_.weight=0)."
        )
    phase = config.pretrain.episodes
    if phase.sound >= phase.group:
        p.lines.append(
            f"config.pretrain.episodes.sound={phase.sound} leaves none of {phase.group} images to "
            f"be damaged, e.g. --config.pretrain.episodes.sound={max(phase.group // 4, 1)}"
        )
    group = config.model.norm_images
    if group and config.train.batch_size % group:
        fit = max(n for n in range(1, group + 1) if config.train.batch_size % n == 0)
        p.lines.append(
            f"config.model.norm_images={group} does not divide "
            f"config.train.batch_size={config.train.batch_size}; use a divisor, e.g. "
            f"--config.model.norm_images={fit}, or 0 for the whole batch."
        )
    _evaluation_together(p, config)
    if 2 * (config.augment.blur_kernel // 2) >= 2 * config.data.image_size:
        p.lines.append(
            f"config.augment.blur_kernel={config.augment.blur_kernel} reaches beyond the reflected "
            f"border of an image of {config.data.image_size} pixels; use a smaller one."
        )


def _evaluation_together(p: Problems, config: ConfigDict) -> None:
    if config.eval.follow and config.eval.step != -1:
        p.lines.append(
            f"config.eval.step={config.eval.step} names one checkpoint, config.eval.follow=True "
            f"takes all as they come; leave out one of them, e.g. --config.eval.follow=False"
        )
    if config.eval.pool > config.data.image_size:
        p.lines.append(
            f"config.eval.pool={config.eval.pool} is larger than the score map of "
            f"{config.data.image_size} pixels, e.g. --config.eval.pool=16"
        )
