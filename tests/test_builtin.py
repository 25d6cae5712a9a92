"""The encoder that comes with the package: its bytes, tree, features, and how it was made."""

import fnmatch
import json
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ccl_jax import config as configs
from ccl_jax.models import pretrained
from ccl_jax.models.pretrained import BUILTIN_FILE, BUILTIN_SHA256, load_encoder
from ccl_jax.models.torch_names import torch_name
from ccl_jax.models.trees import flatten, load_tree, read_made
from ccl_jax.pretraining.learn import abstract_encoder
from ccl_jax.pretraining.run import as_json
from ccl_jax.pretraining.weights import digest_of
from ccl_jax.settings import episodes_of, pretraining_of
from ccl_jax.state import Architecture, create_encoder

ROOT = Path(__file__).parent.parent
# Mean and spread of all of stages 1 to 3, and one channel of each, for `picture`.
FEATURES = (
    (1.31233, 1.396225, 0.698732),
    (0.92327, 1.364373, 0.333038),
    (1.333572, 1.925098, 0.22607),
)


def picture():
    """Waves of three directions in three colours, 64 x 64, as a normalised image would be."""
    y, x = np.mgrid[:64, :64] / 10
    return np.stack([np.sin(x), np.sin(2 * y), np.sin(x + 3 * y)], -1)[None].astype(np.float32)


@pytest.fixture(scope="module")
def loaded():
    graphdef, *wanted = abstract_encoder("resnet18")
    return graphdef, wanted, load_encoder("builtin", "resnet18", *wanted)


def test_the_file_is_the_one_that_was_measured_and_small(tmp_path, monkeypatch):
    assert pretrained.sha256_of(BUILTIN_FILE) == BUILTIN_SHA256
    assert BUILTIN_FILE.stat().st_size < 6e6
    damaged = tmp_path / BUILTIN_FILE.name
    damaged.write_bytes(BUILTIN_FILE.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(pretrained, "BUILTIN_FILE", damaged)
    with pytest.raises(ValueError, match=r"missing or damaged; install it again"):
        load_encoder("builtin", "resnet18", {}, {})


def test_the_file_holds_stages_1_to_3_and_nothing_else(loaded):
    _, _, (params, batch_stats, provenance) = loaded
    stored = flatten(load_tree(BUILTIN_FILE))
    leaves = flatten({"params": params, "batch_stats": batch_stats})
    assert stored.keys() == {torch_name(path.partition("/")[2]) for path in leaves}
    assert all(
        leaf.dtype == (np.float16 if leaf.ndim > 1 else np.float32) for leaf in stored.values()
    )
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    assert provenance["source"] == "builtin" and provenance["sha256"] == BUILTIN_SHA256


def test_its_features_are_the_recorded_ones(loaded):
    graphdef, _, (*trees, _) = loaded
    forward = jax.jit(lambda trees, images: nnx.merge(graphdef, *trees)(images, train=False))
    maps = forward(trees, picture())
    found = [(scale.mean(), scale.std(), scale[..., 7].mean()) for scale in map(np.asarray, maps)]
    np.testing.assert_allclose(found, FEATURES, rtol=1e-4)


def test_it_says_how_it_was_made(loaded):
    made = read_made(BUILTIN_FILE)
    assert made["tensors_sha256"] == digest_of(flatten(load_tree(BUILTIN_FILE)))
    config = configs.read_config_file(ROOT / "configs/pretrain.py")
    phases = [(made, *episodes_of(config)), (made["begun_from"], *pretraining_of(config))]
    for phase, recipe, plan in phases:
        assert phase["recipe"] == as_json(recipe)  # the command in the README makes it again
        assert (phase["steps"], phase["decay_share"]) == (plan.steps, plan.decay_share)
        assert phase["images"] == phase["steps"] * recipe.batch_size
        assert phase["seconds"] > 0
        assert all("--job pretrain" in start["command"] for start in phase["starts"])
        assert {"jax", "flax", "ccl_jax"} <= phase["starts"][0]["versions"].keys()


def test_a_workdir_with_it_keeps_where_it_came_from(tmp_path):
    create_encoder(
        tmp_path, "builtin", Architecture("rd", "resnet18", "plain", "float32"), jax.random.key(0)
    )
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["source"] == "builtin" and provenance["sha256"] == BUILTIN_SHA256
    assert provenance["made"] == read_made(BUILTIN_FILE)


def test_another_architecture_is_refused_with_the_setting_to_change():
    _, *wanted = abstract_encoder("resnet34")
    with pytest.raises(ValueError, match=r"--config\.model\.encoder=resnet18"):
        load_encoder("builtin", "resnet34", *wanted)


def test_it_is_installed_with_the_package():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inside = str(BUILTIN_FILE.relative_to(ROOT / "ccl_jax"))
    assert any(fnmatch.fnmatch(inside, p) for p in package["package-data"]["ccl_jax"])
