import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ccl_jax.models import network as networks
from ccl_jax.models import pretrained
from ccl_jax.models.initial import Draws
from ccl_jax.models.resnet import ResNetEncoder
from ccl_jax.models.trees import flatten


def wanted(architecture="resnet18"):
    _, params, stats = networks.split(
        nnx.eval_shape(
            lambda: ResNetEncoder(architecture, dtype=None, draws=Draws(jax.random.key(0)))
        )
    )
    return params, stats


def published(dtype=np.float32):
    """A ResNet-18 as torchvision would save it, from first principles."""
    rng = np.random.default_rng(0)
    tensors = {}

    def norm(name, channels):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.{leaf}"] = rng.standard_normal(channels).astype(dtype)
        tensors[f"{name}.num_batches_tracked"] = np.array(7, np.int64)

    def conv(name, channels_out, channels_in, size):
        shape = (channels_out, channels_in, size, size)
        tensors[f"{name}.weight"] = rng.standard_normal(shape, np.float32).astype(dtype)

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    entry = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        width = min(width, 256)  # stage 4 is ignored, and may well be small
        for block in range(2):
            name = f"layer{stage}.{block}"
            conv(f"{name}.conv1", width, entry, 3)
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            if entry != width:
                conv(f"{name}.downsample.0", width, entry, 1)
                norm(f"{name}.downsample.1", width)
            entry = width
    tensors["fc.weight"], tensors["fc.bias"] = np.ones((3, 256), dtype), np.ones(3, dtype)
    return tensors


def save(folder, tensors, name="model.safetensors"):
    path = folder / name
    safetensors.numpy.save_file(tensors, path)
    return path


def test_every_leaf_of_the_encoder_comes_from_the_tensor_of_its_name(tmp_path):
    tensors = published()
    path = save(tmp_path, tensors)
    params, stats, provenance = pretrained.load_encoder(str(path), "resnet18", *wanted())
    pretrained.check_same_tree(wanted(), (params, stats), "The encoder")
    kernel = params["layer2"]["block0"]["conv1"]["kernel"]
    torch_kernel = tensors["layer2.0.conv1.weight"]
    assert kernel[2, 0, 5, 9] == torch_kernel[9, 5, 2, 0]
    for ours, theirs in (
        (params["norm1"]["scale"], "bn1.weight"),
        (params["layer1"]["block1"]["norm2"]["bias"], "layer1.1.bn2.bias"),
        (stats["layer3"]["block0"]["norm1"]["mean"], "layer3.0.bn1.running_mean"),
        (stats["layer3"]["block0"]["shortcut"]["norm"]["var"], "layer3.0.downsample.1.running_var"),
    ):
        np.testing.assert_array_equal(ours, tensors[theirs])
    assert provenance == {
        "source": str(path),
        "file": "model.safetensors",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tensors": len(flatten(wanted())),
    }


def test_prefix_of_parallel_training_is_dropped(tmp_path):
    plain = pretrained.load_encoder(str(save(tmp_path, published())), "resnet18", *wanted())
    wrapped = {f"module.{name}": value for name, value in published().items()}
    path = save(tmp_path, wrapped, "wrapped.safetensors")
    again = pretrained.load_encoder(str(path), "resnet18", *wanted())
    jax.tree.map(np.testing.assert_array_equal, plain[:2], again[:2])


def test_a_tensor_with_and_without_the_prefix_is_refused(tmp_path):
    tensors = published() | {"module.conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}
    with pytest.raises(ValueError, match=r"1 tensors twice, e\.g\. conv1\.weight and module\."):
        pretrained.load_encoder(str(save(tmp_path, tensors)), "resnet18", *wanted())


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_widths_become_float32(tmp_path, dtype):
    tensors = published(dtype)
    params, *_ = pretrained.load_encoder(str(save(tmp_path, tensors)), "resnet18", *wanted())
    bias = params["norm1"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, tensors["bn1.bias"].astype(np.float32))


def test_one_error_lists_missing_unexpected_and_misshapen_tensors(tmp_path):
    tensors = published()
    del tensors["layer2.1.bn2.running_var"]
    tensors["layer1.0.attention.weight"] = np.ones(3, np.float32)
    tensors["layer3.0.conv1.weight"] = np.ones((256, 128, 5, 5), np.float32)
    tensors["bn1.bias"] = np.ones(64, np.int32)
    with pytest.raises(ValueError, match="4 differences") as caught:
        pretrained.load_encoder(str(save(tmp_path, tensors)), "resnet18", *wanted())
    message = str(caught.value)
    assert "missing    layer2.1.bn2.running_var" in message
    assert "unexpected layer1.0.attention.weight" in message
    assert "layer3.0.conv1.weight: want (256, 128, 3, 3), got (256, 128, 5, 5)" in message
    assert "bn1.bias: want (64,), got (64,) of int32" in message
    assert "--config.model.encoder=" in message


def test_weights_of_another_architecture_give_a_short_error(tmp_path):
    path = save(tmp_path, published())
    with pytest.raises(ValueError, match="does not fit a resnet50 encoder") as caught:
        pretrained.load_encoder(str(path), "resnet50", *wanted("resnet50"))
    assert len(str(caught.value).splitlines()) < 70
    assert "more" in str(caught.value)


def test_source_that_is_no_file_names_the_setting():
    with pytest.raises(ValueError, match=r"config\.encoder\.weights='nowhere\.pth'"):
        pretrained.load_encoder("nowhere.pth", "resnet18", *wanted())


def test_unknown_ending_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"'\.onnx'.*\.safetensors"):
        pretrained.load_encoder(str(path), "resnet18", *wanted())


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"text" * 9])
def test_damaged_safetensors_file_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        pretrained.load_encoder(str(path), "resnet18", *wanted())


def test_hub_name_is_fetched_from_timm(tmp_path, monkeypatch):
    path, asked = save(tmp_path, published()), {}

    def download(**keywords):
        asked.update(keywords)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    *_, provenance = pretrained.load_encoder("hub:resnet18.a1_in1k", "resnet18", *wanted())
    assert asked == {"repo_id": "timm/resnet18.a1_in1k", "filename": "model.safetensors"}
    assert provenance["source"] == "hub:resnet18.a1_in1k"


def test_unreachable_hub_says_how_to_do_without(monkeypatch):
    def offline(**_keywords):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ValueError, match="no route") as caught:
        pretrained.load_encoder("hub:resnet18.a1_in1k", "resnet18", *wanted())
    assert "hf download timm/resnet18.a1_in1k" in str(caught.value)
    assert "--config.encoder.weights=builtin --config.model.encoder=resnet18" in str(caught.value)


def test_saved_encoder_reads_back_bit_for_bit(tmp_path):
    source = str(save(tmp_path, published()))
    params, stats, _ = pretrained.load_encoder(source, "resnet18", *wanted())
    path = tmp_path / "encoder.safetensors"
    digest = pretrained.save_encoder(path, params, stats)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    again = pretrained.read_encoder(path, *wanted())
    jax.tree.map(np.testing.assert_array_equal, (params, stats), again)


def test_saved_encoder_of_another_architecture_is_refused(tmp_path):
    source = str(save(tmp_path, published()))
    params, stats, _ = pretrained.load_encoder(source, "resnet18", *wanted())
    pretrained.save_encoder(tmp_path / "encoder.safetensors", params, stats)
    with pytest.raises(ValueError, match="missing    params/layer1/block0/conv3/kernel"):
        pretrained.read_encoder(tmp_path / "encoder.safetensors", *wanted("resnet50"))


@pytest.mark.parametrize(
    ("path", "shortcut", "want"),
    [
        ("norm1/var", "downsample", "bn1.running_var"),
        ("layer3/block10/conv2/kernel", "downsample", "layer3.10.conv2.weight"),
        ("layer1/block0/shortcut/conv/kernel", "upsample", "layer1.0.upsample.0.weight"),
        ("layer1/block0/shortcut/norm/mean", "downsample", "layer1.0.downsample.1.running_mean"),
    ],
)
def test_names_follow_pytorch(path, shortcut, want):
    assert pretrained.torch_name(path, shortcut=shortcut) == want
