"""Checkpoints of the released PyTorch code, in and out."""

import json
import os
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from ccl_jax import exchange, jobs, main
from ccl_jax.models import network as networks
from ccl_jax.models import pretrained, published
from ccl_jax.models.torch_names import from_torch_layout, to_torch_layout
from ccl_jax.models.trees import flatten, read_made
from ccl_jax.predict import load_detector
from tests.reference.goldens import OWN

KINDS = ("none", "plain", "depthwise")
TABLES = {"none": "rd", "plain": "rd_lgc:dp=False", "depthwise": "rd_lgc:dp=True"}
TINY = {"family": "rd", "encoder": "resnet18", "compute_dtype": "float32"}


def table(name):
    tables = json.loads((OWN / "model_keys.json").read_text())
    tables |= json.loads((OWN / "teacher_keys.json").read_text())
    return {key: tuple(shape) for key, shape, *_ in tables[name]}


def tiny_network(kind, encoder="resnet18"):
    """Shapes of a small network, and trees of numbers in them that are all different."""
    _, *wanted = networks.abstract_network(projector=kind, **(TINY | {"encoder": encoder}))
    count = iter(range(10_000))
    filled = jax.tree.map(
        lambda leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape) + next(count),
        wanted,
    )
    return wanted, filled


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_the_released_checkpoint(kind):
    _, *wanted = networks.abstract_network(
        family="rd", encoder="wide_resnet50_2", projector=kind, compute_dtype="float32"
    )
    blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), wanted)
    tensors = published.to_published(*blank)
    assert {name: value.shape for name, value in tensors.items()} == table(TABLES[kind])
    assert published.projector_kind(table(TABLES[kind])) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again_is_exact(kind):
    wanted, trees = tiny_network(kind)
    tensors = published.to_published(*trees)
    again = published.from_published(tensors, *wanted, source="the file")
    jax.tree.map(np.testing.assert_array_equal, again, tuple(trees))
    assert published.projector_kind(tensors) == kind


def test_kernels_are_turned_into_pytorchs_layout():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(3, 2, 4, 5)
    assert to_torch_layout(kernel)[1, 2, 0, 1] == kernel[0, 1, 2, 1]  # out, in, h, w
    upsampling = np.arange(2 * 2 * 4 * 5).reshape(2, 2, 4, 5)
    assert to_torch_layout(upsampling)[2, 1, 0, 1] == upsampling[0, 1, 2, 1]  # in, out, h, w
    for value, transposed in ((kernel, False), (upsampling, True)):
        again = from_torch_layout(to_torch_layout(value), transposed=transposed)
        np.testing.assert_array_equal(again, value)


ONE_OF_EACH_PART = (
    "net_t.layer2.0.downsample.1.running_var",
    "proj_layer.proj_b.proj.3.weight",
    "mff_oce.bn_layer.0.conv1.weight",
    "net_s.layer3.0.upsample.0.weight",
)


@pytest.mark.parametrize("name", ONE_OF_EACH_PART)
@pytest.mark.parametrize("damage", ["missing", "renamed", "misshapen", "integer"])
def test_a_single_wrong_tensor_is_named(name, damage):
    wanted, trees = tiny_network("plain")
    tensors = published.to_published(*trees)
    value = tensors.pop(name)
    lines = [f"missing    {name}"]
    if damage == "renamed":
        tensors[name + "s"] = value
        lines.append(f"unexpected {name}s")
    elif damage == "misshapen":
        tensors[name] = value[:-1]
        lines = [f"misshapen  {name}: want {value.shape}, got {value[:-1].shape}"]
    elif damage == "integer":
        tensors[name] = value.astype(np.int32)
        lines = [f"misshapen  {name}: want {value.shape}, got {value.shape} of int32"]
    with pytest.raises(ValueError, match=r"^net\.pth does not fit") as error:
        published.from_published(tensors, *wanted, source="net.pth")
    message = str(error.value)
    assert f"({len(lines)} difference{'s' * (len(lines) > 1)})" in message
    for line in lines:
        assert line in message
    # The network is the right one; nothing suggests another.
    assert "the file is incomplete" in message and "--config" not in message


@pytest.mark.parametrize(
    ("value", "found"),
    [(1e300, "not finite"), (np.nan, "not finite"), (1 + 2j, "misshapen ")],
)
def test_numbers_that_do_not_survive_as_float32_are_refused(value, found):
    wanted, trees = tiny_network("plain")
    tensors = published.to_published(*trees)
    name = "net_s.layer3.0.bn1.bias"
    tensors[name] = np.full_like(tensors[name], value, dtype=type(value))
    with pytest.raises(ValueError, match=rf"(?s)1 difference\).*{found} {name}") as error:
        published.from_published(tensors, *wanted, source="net.pth")
    assert ("The file is damaged" in str(error.value)) == (found == "not finite")


def test_an_encoder_is_no_released_checkpoint(tmp_path):
    wanted, _ = tiny_network("none")
    with pytest.raises(ValueError, match=r"--config\.encoder\.weights=resnet18\.pth"):
        published.from_published({"conv1.weight": np.ones(3)}, *wanted, source="resnet18.pth")


@pytest.mark.parametrize(("kind", "other"), [("plain", "depthwise"), ("depthwise", "none")])
def test_another_projector_is_recognised_and_the_setting_named(kind, other):
    _, trees = tiny_network(kind)
    wanted, _ = tiny_network(other)
    with pytest.raises(ValueError, match=f"--config.model.projector={kind}"):
        published.from_published(published.to_published(*trees), *wanted, source="net.pth")


@pytest.mark.parametrize(
    "architecture", ["resnet10", "resnet18", "resnet34", "resnet50", "wide_resnet50_2"]
)
def test_another_encoder_is_recognised_and_the_setting_named(architecture):
    _, *trees = networks.abstract_network(projector="plain", **(TINY | {"encoder": architecture}))
    tensors = published.to_published(
        *jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), trees)
    )
    other = "resnet34" if architecture != "resnet34" else "resnet18"
    _, *wanted = networks.abstract_network(projector="plain", **(TINY | {"encoder": other}))
    with pytest.raises(ValueError, match=f"the file's has the encoder '{architecture}'") as error:
        published.from_published(tensors, *wanted, source="net.pth")
    hints = [line for line in str(error.value).splitlines() if "--config" in line]
    assert len(hints) == 1 and hints[0].endswith(f" --config.model.encoder={architecture}.")


def test_an_encoder_that_nobody_knows_is_not_guessed():
    assert published.encoder_name({"net_t.layer3.0.conv1.weight": (1, 1, 3, 3)}) is None
    assert published.encoder_name({}) is None


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "wide_resnet50_2"])
def test_every_tensor_of_a_published_encoder_has_its_place(tmp_path, architecture):
    """Whole models as timm publishes them; torchvision's names are the same."""
    tensors = {
        name: np.broadcast_to(np.float32(0), shape)
        if not name.endswith("num_batches_tracked")
        else np.zeros(shape, np.int64)
        for name, shape in table(f"full:{architecture}").items()
    }
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        tmp_path / "model.safetensors",
    )
    _, *wanted = networks.abstract_network(
        family="rd", encoder=architecture, projector="none", compute_dtype="float32"
    )
    *trees, provenance = pretrained.load_encoder(
        str(tmp_path / "model.safetensors"), architecture, *(tree["encoder"] for tree in wanted)
    )
    ignored = [name for name in tensors if pretrained.IGNORED.search(name)]
    assert provenance["tensors"] == len(flatten(tuple(trees))) == len(tensors) - len(ignored)
    assert all(re.match(r"layer4\.|fc\.|.*num_batches_tracked", name) for name in ignored)


# --- the jobs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained workdir as a released checkpoint."""
    output = tmp_path_factory.mktemp("exported") / "new" / "net.safetensors"
    command = [
        "main",
        "--job=export",
        f"--workdir={trained}",
        f"--config.published.output={output}",
    ]
    assert main.main(command) == 0
    return output


@pytest.fixture
def import_config(tiny_config, exported):
    tiny_config.published.checkpoint = str(exported)
    tiny_config.encoder.weights = str(exported)
    return tiny_config


@pytest.fixture
def imported(import_config, tmp_path):
    assert exchange.import_job(import_config, tmp_path / "imported") == 0
    return tmp_path / "imported"


def test_an_exported_and_imported_detector_predicts_the_same(trained, imported, photos):
    pictures = sorted(photos.glob("*/test/*/*.png"))
    before, after = (load_detector(folder).predict(pictures) for folder in (trained, imported))
    np.testing.assert_array_equal(before.maps, after.maps)
    assert load_detector(imported).step == 0


def test_an_imported_workdir_evaluates_to_the_same_table(trained, imported):
    assert main.main(["main", "--job", "evaluate", "--workdir", str(imported)]) == 0
    before, after = (
        json.loads((folder / "evaluation" / step / "results.json").read_text())
        for folder, step in ((trained, "4"), (imported, "0"))
    )
    assert before["classes"] == after["classes"] and before["mean"] == after["mean"]


def test_training_goes_on_from_an_imported_checkpoint(imported, import_config, exported):
    before = safetensors.numpy.load_file(exported)
    assert jobs.train_job(import_config, imported) == 0
    assert main.main(["main", "--job", "export", "--workdir", str(imported)]) == 0
    after = safetensors.numpy.load_file(imported / "published" / "4.safetensors")
    moved = {name: np.abs(before[name] - after[name]).max() for name in before}
    assert moved["net_s.layer3.0.conv1.weight"] > 0
    assert all(moved[name] == 0 for name in moved if name.startswith("net_t."))
    # Adam moves a weight by about a rate per step: fresh weights would be 0.2 and more away.
    rate = import_config.optimizer.lr
    kernels = [name for name in moved if before[name].ndim == 4]
    assert max(moved[name] for name in kernels) < 2 * 4 * rate


def test_the_workdir_says_where_it_came_from(imported, exported):
    provenance = json.loads((imported / "published.json").read_text())
    assert provenance["sha256"] == pretrained.sha256_of(exported)
    assert provenance["tensors"] == len(safetensors.numpy.load_file(exported))


def test_an_export_under_another_ending_is_refused(trained, capsys):
    command = ["main", "--job=export", f"--workdir={trained}", "--config.published.output=net.pth"]
    assert main.main(command) == 1
    assert "config.published.output='net.pth' must be a .safetensors" in capsys.readouterr().err


def test_the_command_line_imports(exported, tmp_path):
    command = [
        "main",
        "--job=import",
        f"--workdir={tmp_path / 'run'}",
        f"--config.encoder.weights={exported}",
        f"--config.published.checkpoint={exported}",
        "--config.model.encoder=resnet10",
        "--config.model.projector=depthwise",
        "--config.data.image_size=64",
    ]
    assert main.main(command) == 0  # without --config: the published recipe
    assert load_detector(tmp_path / "run").size == 64


def complaint(config, workdir):
    with pytest.raises(ValueError, match=r"--") as error:
        exchange.import_job(config, workdir)
    return str(error.value)


def test_a_second_import_into_the_same_folder_is_refused(imported, import_config):
    assert f"--workdir={imported}-imported" in complaint(import_config, imported)


def test_a_checkpoint_that_is_no_file_is_named(import_config, tmp_path):
    for name in ("", "nowhere.pth"):
        import_config.published.checkpoint = name
        message = complaint(import_config, tmp_path / "run")
        assert f"config.published.checkpoint={name!r} is not a file" in message
    assert not (tmp_path / "run").exists()


def test_a_hub_out_of_reach_is_not_needed_for_a_checkpoint_with_encoder(
    import_config, exported, tmp_path, monkeypatch
):
    def fetch(name):
        raise pretrained.HubError("no network")

    monkeypatch.setattr(pretrained, "_fetch", fetch)
    import_config.encoder.weights = "hub:resnet18.a1_in1k"
    message = complaint(import_config, tmp_path / "run")
    assert message.startswith("no network")
    assert f"use --config.encoder.weights={exported}." in message


def test_the_folder_is_looked_at_before_anything_is_read(import_config, imported, monkeypatch):
    monkeypatch.setattr(exchange, "read_released", lambda *_: pytest.fail("it was read"))
    assert "already holds a checkpoint" in complaint(import_config, imported)


def test_another_encoder_than_the_checkpoints_is_refused(import_config, exported, tmp_path):
    tensors = safetensors.numpy.load_file(exported)
    tensors["net_t.conv1.weight"] = tensors["net_t.conv1.weight"] + np.float32(0.25)
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    import_config.encoder.weights = str(tmp_path / "other.safetensors")
    message = complaint(import_config, tmp_path / "run")
    assert re.search(r"1 of \d+ tensors differ, params/conv1/kernel by up to 0\.25", message)
    assert f"--config.encoder.weights={exported}" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_encoder_needs_one_that_is_not_random(
    import_config, exported, tmp_path
):
    tensors = safetensors.numpy.load_file(exported)
    trained = {name: value for name, value in tensors.items() if not name.startswith("net_t.")}
    safetensors.numpy.save_file(trained, tmp_path / "trained.safetensors")
    import_config.published.checkpoint = str(tmp_path / "trained.safetensors")
    import_config.encoder.weights = "random"
    assert "holds no encoder" in complaint(import_config, tmp_path / "run")
    import_config.encoder.weights = str(exported)
    assert exchange.import_job(import_config, tmp_path / "run") == 0


def test_an_export_holds_the_whole_network(exported):
    names = published.to_published(*tiny_network("depthwise", "resnet10")[1])
    assert safetensors.numpy.load_file(exported).keys() == names.keys()


def test_an_export_says_where_it_comes_from_and_others_may_read_it(exported, trained):
    made = read_made(exported)
    assert made["step"] == 4 and made["workdir"] == str(trained)
    assert {"commit", "command", "config", "versions"} <= made.keys()
    mask = os.umask(0)
    os.umask(mask)
    assert exported.stat().st_mode & 0o777 == 0o666 & ~mask
