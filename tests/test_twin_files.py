"""Files that PyTorch itself writes are read without it, and PyTorch loads what we export."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ccl_jax import exchange
from ccl_jax.models import network as networks
from ccl_jax.models import published
from ccl_jax.models.torch_files import read_torch_file

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[reference]'")
compare_twin = importlib.import_module("tests.reference.compare_twin")  # imports torch at its top
twin_model = importlib.import_module("tests.reference.twin_model")
twin_step = importlib.import_module("tests.reference.twin_step")

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "older format"])


@pytest.fixture(autouse=True)
def one_thread():
    with twin_step.one_thread():
        yield


def write(path, content, zipped):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same_tensors(found, tensors):
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        # NumPy has no bfloat16 of its own; as float32 its values stay exact.
        exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        got = found[name].astype(exact.numpy().dtype)
        np.testing.assert_array_equal(got, exact.numpy(), strict=True, err_msg=name)


def odd_tensors():
    """Tensors of all kinds: types, strides, and storages that several share."""
    source = torch.Generator().manual_seed(1)
    shared = torch.randn(40, generator=source)
    matrix = torch.randn(5, 7, generator=source)
    types = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
    return {
        **{kind: (100 * matrix).abs().to(getattr(torch, kind)) for kind in types},
        "bool": matrix > 0,
        "float32": matrix,
        "transposed": matrix.T,
        "every other": matrix[::2, 1::3],
        "channels last": torch.randn(2, 3, 4, 5, generator=source).to(
            memory_format=torch.channels_last
        ),
        "head of a storage": shared[:10],
        "middle of a storage": shared[12:32].view(4, 5),
        "whole storage": shared,
        "bfloat16 view": (100 * matrix).bfloat16()[1:, 2:],
        "expanded": torch.tensor([3.0]).expand(4, 2),
        "scalar": torch.tensor(2.5),
        "step counter": torch.tensor(17),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(matrix * 2),
    }


@FORMATS
def test_tensors_of_every_kind_are_read_exactly(tmp_path, zipped):
    tensors = odd_tensors()
    assert_same_tensors(read_torch_file(write(tmp_path / "odd.pth", tensors, zipped)), tensors)


@FORMATS
def test_state_dict_of_a_module_is_read_exactly(tmp_path, zipped):
    module = twin_model.randomise(twin_model.ProjectionHead(8, depthwise=True), seed=1)
    tensors = module.state_dict()
    assert_same_tensors(read_torch_file(write(tmp_path / "net.pth", tensors, zipped)), tensors)


@FORMATS
def test_network_is_found_in_the_checkpoint_of_a_trainer(tmp_path, zipped):
    module = twin_model.randomise(twin_model.ProjectionHead(8, depthwise=False), seed=2)
    adam = torch.optim.Adam(module.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.StepLR(adam, step_size=80)
    module(torch.ones(2, 8, 4, 4)).square().sum().backward()
    adam.step()
    metrics = {
        "AUROC_sp": [0.5, 0.75],
        "AUPRO_px": [np.float64(0.25), np.float32(0.5)],
        "best": {"epoch": np.int64(1)},
    }
    checkpoint = {
        "net": module.state_dict(),
        "optimizer": adam.state_dict(),
        "scheduler": decay.state_dict(),
        "scaler": None,
        "iter": 3,
        "epoch": 1,
        "metric_recorder": metrics,
        "total_time": 1.0,
    }
    path = write(tmp_path / "ckpt.pth", checkpoint, zipped)
    assert_same_tensors(read_torch_file(path), module.state_dict())


@FORMATS
def test_file_that_would_run_code_is_refused(tmp_path, zipped):
    path = write(tmp_path / "module.pth", torch.nn.Conv2d(1, 1, 1), zipped)
    with pytest.raises(ValueError, match=r"refers to torch\.nn\.modules\.conv\.Conv2d"):
        read_torch_file(path)


def moved(tree, rng):
    """A tree whose every value differs from the given one's; variances stay positive."""
    return jax.tree.map(
        lambda leaf: (leaf * rng.uniform(1.01, 1.1, leaf.shape)).astype(leaf.dtype), tree
    )


@pytest.mark.parametrize("projector", [None, "plain", "depthwise"])
def test_pytorch_loads_our_export_and_computes_the_same(projector):
    twin = twin_model.randomise(twin_model.Twin("resnet18", projector), seed=31)
    graphdef, *trees = compare_twin.our_trees(twin, "resnet18", projector)
    trees = [moved(tree, np.random.default_rng(0)) for tree in trees]
    other = twin_model.Twin("resnet18", projector).eval()
    twin_model.from_numpy(other, published.to_published(*trees))  # strict
    images = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)

    def forward(params, batch_stats, images):
        return networks.merge(graphdef, params, batch_stats)(images, train=False).rebuilt

    rebuilt = jax.jit(forward)(*trees, compare_twin.channels_last(images))
    with torch.no_grad():
        theirs = other(torch.from_numpy(images)).rebuilt
    for scale, twins in zip(rebuilt, theirs, strict=True):
        # float32: the reference README's tolerance of a forward pass in evaluation
        assert compare_twin.relative(jnp.moveaxis(scale, -1, 1), twins.numpy()) < 2e-5


@pytest.mark.parametrize(("encoder", "projector"), compare_twin.ENCODERS)
def test_published_weights_come_out_of_our_trees_unchanged(encoder, projector):
    twin = twin_model.randomise(twin_model.Twin(encoder, projector), seed=32)
    _, params, batch_stats = compare_twin.our_trees(twin, encoder, projector)
    back, tensors = published.to_published(params, batch_stats), twin_model.to_numpy(twin)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value, strict=True, err_msg=name)


def test_a_whole_training_checkpoint_is_imported_as_a_workdir(tmp_path, tiny_config):
    """ckpt.pth of a parallel run: a wrapper, an optimizer's state, metrics, and prefixed names."""
    twin = twin_model.randomise(twin_model.Twin("resnet18", "depthwise"), seed=5)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3)
    torch.save(
        {
            "net": {f"module.{name}": value for name, value in twin.state_dict().items()},
            "optimizer": adam.state_dict(),
            "scheduler": {"last_epoch": 3},
            "scaler": None,
            "iter": 30,
            "epoch": 3,
            "metric_recorder": {"mAUROC_sp_max_Avg": [np.float64(91.5), 92.0]},
            "total_time": 1.5,
        },
        tmp_path / "ckpt.pth",
    )
    tiny_config.model.encoder = "resnet18"
    tiny_config.published.checkpoint = tiny_config.encoder.weights = str(tmp_path / "ckpt.pth")
    assert exchange.import_job(tiny_config, tmp_path / "run") == 0
    tiny_config.published.output = str(tmp_path / "again.safetensors")
    assert exchange.export_job(tiny_config, tmp_path / "run") == 0
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    assert again.keys() == twin.state_dict().keys()
    for name, value in twin_model.to_numpy(twin).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(again[name], value, err_msg=name)
