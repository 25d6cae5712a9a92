import re
from pathlib import Path

import pytest

from ccl_jax import config as configs
from ccl_jax.validation import validate

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))


def demo():
    return configs.read_config_file(ROOT / "configs/demo.py")


@pytest.mark.parametrize("method", ["rd_ccl", "rd"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_validates_once_it_has_a_data_folder(path, method):
    config = configs.read_config_file(path, method)
    if config.data.layout != "joint":  # whose parts have folders
        config.data.root = config.data.root or "photos"
    assert validate(config) is None


def test_every_setting_is_read_somewhere_in_the_package():
    text = "\n".join(
        path.read_text()
        for path in (ROOT / "ccl_jax").rglob("*.py")
        if not path.name.startswith("validation")  # which name them all
    )
    handed_on = ("synthetic.", "augment.", "pretrain.")  # whole sections, as keyword arguments
    # The names that a section or its last key goes by where it is read.
    aliases = {"loss.global_": "global_", "loss.local": "local", "loss.cosine": "cosine"}
    unread = []
    for key, _ in configs.flatten(demo()):
        section, _, last = key.rpartition(".")
        names = [section, aliases.get(section, ""), {"optimizer": "settings"}.get(section, "")]
        names += [{"model": "model", "eval": "settings"}.get(section, "")]
        reads = [f"{name}.{last}" for name in names if name] + [f"config.{key}"]
        reads += [f'["{section}"]["{last}"]', f'model["{last}"]', f'settings["{last}"]']
        found = any(re.search(rf"(?<![\w]){re.escape(read)}(?!\w)", text) for read in reads)
        if not found and not key.startswith(handed_on):
            unread.append(key)
    assert unread == []


def test_a_misspelt_key_in_a_config_file_is_refused(tmp_path):
    file = tmp_path / "configs" / "mine.py"
    file.parent.mkdir()
    file.write_text(
        "from configs import default\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.train.batchsize = 8\n"
        "    return config\n"
    )
    with pytest.raises(AttributeError, match="batch_size"):
        configs.read_config_file(file)


def test_the_mvtec_config_is_the_published_recipe():
    config = configs.read_config_file(ROOT / "configs/mvtec.py")
    assert config.encoder.weights == "hub:wide_resnet50_2.racm_in1k"
    assert config.model.encoder == "wide_resnet50_2"
    assert (config.data.image_size, config.train.batch_size, config.train.epochs) == (256, 16, 200)
    assert config.loss.global_.form == "two_view"
    assert config.loss.local.temperature == config.loss.global_.temperature == 0.05
    assert (config.optimizer.projector_lr, config.optimizer.lr) == (1e-3, 5e-3)
    assert config.optimizer.betas == (0.5, 0.999)


BAD = {
    "seed": -1,
    "data.layout": "voc",
    "data.root": "",
    "data.name": "a/b",
    "data.classes": (1,),
    "data.views": (1,),
    "data.splits": None,
    "data.validation": "test",
    "data.follow_links": 1,
    "data.image_size": 100,
    "data.shuffle": "none",
    "data.check": "all",
    "data.source": "tar",
    "data.prepared": None,
    "data.prepared_images": "small",
    "data.cache_dir": None,
    "data.cache_gib": -1.0,
    "data.bad_files": "ignore",
    "synthetic.image_size": 8,
    "synthetic.train_per_class": 0,
    "encoder.weights": "missing.npz",
    "model.family": "gan",
    "model.encoder": "vgg",
    "model.projector": "linear",
    "model.noise_probability": 1.5,
    "model.compute_dtype": "float16",
    "loss.cosine.weight": -1.0,
    "loss.local.temperature": 0.0,
    "loss.local.match": "nearest",
    "loss.local.window": 4,
    "loss.local.negatives": "far",
    "loss.local.reach": 0,
    "loss.global_.temperature": -0.1,
    "loss.global_.form": "third",
    "augment.crop_scale": (0.8,),
    "augment.crop_ratio": (2.0, 1.0),
    "augment.horizontal_flip": 2.0,
    "augment.brightness": -0.1,
    "augment.hue": 0.6,
    "augment.blur_kernel": 4,
    "augment.blur_sigma": (0.0, 1.0),
    "augment.rotation": -5.0,
    "optimizer.lr": -1.0,
    "optimizer.betas": (0.5, 1.0),
    "optimizer.clip_norm": -1.0,
    "optimizer.decay_at": 0.0,
    "train.batch_size": 0,
    "train.epochs": -1,
    "train.log_every": 0,
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 0,
    "train.keep_best": "accuracy",
    "train.keep_every": -1,
    "eval.every_steps": -1,
    "eval.batch_size": 0,
    "eval.smoothing_sigma": -1.0,
    "eval.combine": "max",
    "eval.distance": "l1",
    "eval.published_metrics": ("adeval",),
    "eval.pool": 0,
    "eval.image_label": "name",
    "eval.aupro_fpr_limit": 0.0,
    "eval.figures_per_class": -1,
    "eval.step": -2,
    "eval.follow": "yes",
    "eval.poll_seconds": 0.0,
    "eval.follow_patience": -1.0,
    "predict.batch_size": 0,
    "pretrain.kinds": ("photos",),
    "pretrain.per_kind": 0,
    "pretrain.image_size": 40,
    "pretrain.head_weights": (0.0, 0.0, 0.0),
    "pretrain.label_smoothing": 1.0,
    "pretrain.batch_size": 0,
    "pretrain.lr": 0.0,
    "pretrain.weight_decay": -1.0,
    "pretrain.warmup_steps": -1,
    "pretrain.steps": 0,
    "pretrain.decay_share": 1.0,
    "pretrain.checkpoint_every": 0,
    "pretrain.log_every": 0,
    "pretrain.episodes.kinds": (),
    "pretrain.episodes.group": 2,
    "pretrain.episodes.sound": 0,
    "pretrain.episodes.softness": 0.0,
    "pretrain.episodes.memory": 0,
    "pretrain.episodes.steps": -1,
    "pretrain.episodes.stage_weight": -0.5,
    "pretrain.episodes.image_size": 72,
    "pretrain.episodes.lr": 0.0,
    "benchmark.steps": 0,
    "benchmark.warm_up": 0,
    "benchmark.images": 0,
    "benchmark.metric_images": -1,
    "benchmark.page": "speed.html",
    "run.devices": -1,
    "run.parameter_shards": 0,
    "run.heartbeat_seconds": 1,
    "run.cluster": "pbs",
    "run.threads": 0,
    "run.workers": -1,
    "run.stop_signals": ("SIGKILL",),
    "run.unfinished_exit_code": 1,
    "run.stall_seconds": 0.5,
    "run.peak_tflops": -1.0,
    "model.norm_images": -1,
    "run.deterministic": "yes",
    "run.remat": 1,
    "run.compilation_cache": None,
}


@pytest.mark.parametrize("key", BAD)
def test_an_illegal_value_is_refused_by_name_with_a_fix_to_paste(key):
    config = demo()
    with config.ignore_type():  # ml_collections refuses some of these on the command line
        config.update_from_flattened_dict({key: BAD[key]})
    with pytest.raises(ValueError, match=re.escape(f"config.{key}")) as error:
        validate(config)
    assert f"--config.{key}=" in str(error.value)


def test_all_illegal_values_are_told_at_once():
    config = demo()
    config.train.batch_size = 0
    config.model.encoder = "vgg"
    with pytest.raises(ValueError, match="2 illegal settings") as error:
        validate(config)
    assert "batch_size" in str(error.value) and "vgg" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train.steps": 0, "train.epochs": 0}, "both 0"),
        ({"data.validation": "train"}, "means nothing for config.data.layout=synthetic"),
        ({"model.projector": "none"}, "local loss nothing to train"),
        ({"model.norm_images": 6}, "--config.model.norm_images=4, or 0"),
        ({"eval.pool": 200}, "larger than the score map"),
        ({"eval.follow": True, "eval.step": 5}, r"eval\.step=5 names one checkpoint"),
        ({"model.encoder": "resnet34"}, "add --config.model.encoder=resnet18"),  # builtin
        ({"augment.blur_kernel": 301}, "reaches beyond"),
        ({"pretrain.episodes.sound": 8}, r"episodes\.sound=8 leaves none of 8 images"),
        (
            {"loss.cosine.weight": 0.0, "loss.local.weight": 0.0, "loss.global_.weight": 0.0},
            "nothing would be trained",
        ),
    ],
)
def test_settings_that_are_legal_alone_but_not_together_are_refused(changes, reason):
    config = demo()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=reason):
        validate(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"root": "/photos"}, r"config\.data\.root='/photos' means nothing for .*joint"),
        (
            {"classes": ("zipper",)},
            r"config\.data\.parts\.mvtec\.classes.*--config\.data\.classes=",
        ),
        ({"splits": "a.csv"}, r"config\.data\.splits='a\.csv' means nothing"),
        ({"source": "prepared"}, r"--config\.data\.prepared=/data/joint-prepared"),
    ],
)
def test_settings_that_mean_nothing_for_a_joint_set_are_refused(changes, reason):
    config = configs.read_config_file(ROOT / "configs/joint.py")
    for part in config.data.parts.values():
        part.root = "/data/photos"
    validate(config)
    config.data.update(changes)
    with pytest.raises(ValueError, match=reason):
        validate(config)


def test_a_joint_set_may_be_read_from_prepared_data_that_are_named():
    config = configs.read_config_file(ROOT / "configs/joint.py")
    for part in config.data.parts.values():
        part.root = ""
    with pytest.raises(ValueError, match=r"config\.data\.parts\.visa\.root"):
        validate(config)
    config.data.update({"source": "prepared", "prepared": "/data/joint-prepared"})
    validate(config)  # nothing is missing any more


def test_a_setting_that_is_missing_is_named():
    config = demo().copy_and_resolve_references().unlock()
    del config.train.batch_size
    with pytest.raises(ValueError, match=r"config.train.batch_size is missing"):
        validate(config)


def test_a_config_survives_json_with_its_tuples():
    config = demo()
    again = configs.from_json(configs.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert again.augment.crop_scale == (0.8, 1.0)


def test_differences_tell_what_is_computed_from_how_to_run():
    old, new = demo(), demo()
    new.loss.local.temperature = 0.1
    new.run.threads = 1
    new.data.root = "/elsewhere"
    new.eval.batch_size = 3
    what, how = configs.differences(old, new)
    assert what == ["loss.local.temperature: 0.05 -> 0.1"]
    assert [line.split(":")[0] for line in how] == ["data.root", "eval.batch_size", "run.threads"]


def test_an_unknown_method_after_the_config_file_is_refused():
    with pytest.raises(ValueError, match="rd_ccl"):
        configs.read_config_file(ROOT / "configs/demo.py", "vitad")


def test_a_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        configs.read_config_file("nowhere.py")
