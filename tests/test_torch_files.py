"""Files as PyTorch writes them, made here by hand: PyTorch is not needed to read or test them."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from ccl_jax.models.torch_files import LEGACY_MAGIC, read_torch_file

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


@pytest.fixture
def torch(monkeypatch):
    """Stand-ins for the names that a .pth file refers to, so that pickle can write them."""
    fakes = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for name in STORAGES.values():
        setattr(fakes["torch"], name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(fakes["torch._utils"], name, function)
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fakes


class Storage:
    def __init__(self, kind, key, elements):
        self.pid = ("storage", kind, key, "cpu", elements)


class Rebuilt:
    """Pickles as a call of one of PyTorch's rebuilding functions."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Writer(pickle.Pickler):
    legacy = False

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return (*obj.pid, None) if self.legacy else obj.pid
        return None


def describe(torch, tensors):
    """The pickled form of a state dict, and the bytes of its storages."""
    content, blobs = OrderedDict(), {}
    for key, (name, value) in enumerate(tensors.items()):
        kind = getattr(torch["torch"], STORAGES[value.dtype])
        base = value if value.base is None else value.base
        start = np.lib.array_utils.byte_bounds(value)[0] - np.lib.array_utils.byte_bounds(base)[0]
        content[name] = Rebuilt(
            torch["torch._utils"]._rebuild_tensor_v2,
            Storage(kind, str(key), base.size),
            start // value.itemsize,
            value.shape,
            tuple(stride // value.itemsize for stride in value.strides),
            False,
            OrderedDict(),
        )
        blobs[str(key)] = (base.size, base.tobytes(order="A"))
    return content, blobs


def dumps(content, legacy=False):
    buffer = io.BytesIO()
    writer = Writer(buffer, protocol=2)
    writer.legacy = legacy
    writer.dump(content)
    return buffer.getvalue()


def write_zip(path, content, blobs):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dumps(content))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, (_, raw) in blobs.items():
            archive.writestr(f"archive/data/{key}", raw)


def write_legacy(path, content, blobs):
    with open(path, "wb") as file:
        for head in (LEGACY_MAGIC, 1001, {"little_endian": True}):
            file.write(dumps(head))
        file.write(dumps(content, legacy=True))
        file.write(dumps(list(blobs)))
        for elements, raw in blobs.values():
            file.write(struct.pack("<q", elements) + raw)


WRITERS = [write_zip, write_legacy]


def some_tensors():
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((4, 6)).astype(np.float32)
    return {
        "plain": rng.standard_normal((2, 3, 1, 1)).astype(np.float32),
        "view": whole[1:, 2:5],
        "turned": rng.standard_normal((2, 5)).astype(np.float32).T,
        "half": rng.standard_normal(3).astype(np.float16),
        "brain": rng.standard_normal(3).astype(ml_dtypes.bfloat16),
        "double": rng.standard_normal(3),
        "scalar": np.array(7, np.int64),
    }


@pytest.mark.parametrize("write", WRITERS)
def test_tensors_views_and_all_widths_read_back(torch, tmp_path, write):
    write(tmp_path / "m.pth", *describe(torch, some_tensors()))
    got = read_torch_file(tmp_path / "m.pth")
    assert got.keys() == some_tensors().keys()
    for name, want in some_tensors().items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name], want)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapper_of_a_training_script_is_looked_through(torch, tmp_path, write, wrapper):
    content, blobs = describe(torch, some_tensors())
    write(tmp_path / "m.pth", {"epoch": 3, "best": 0.5, wrapper: content}, blobs)
    assert read_torch_file(tmp_path / "m.pth").keys() == some_tensors().keys()


def test_parameters_are_tensors(torch, tmp_path):
    content, blobs = describe(torch, some_tensors())
    content["plain"] = Rebuilt(
        torch["torch._utils"]._rebuild_parameter, content["plain"], True, OrderedDict()
    )
    write_zip(tmp_path / "m.pth", content, blobs)
    got = read_torch_file(tmp_path / "m.pth")
    np.testing.assert_array_equal(got["plain"], some_tensors()["plain"])


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_would_run_code_is_refused_by_name_and_runs_none(torch, tmp_path, write):
    content, blobs = describe(torch, some_tensors())
    content["extra"] = Evil(tmp_path / "owned")
    write(tmp_path / "m.pth", content, blobs)
    with pytest.raises(ValueError, match=r"m\.pth .* refers to _?io\.open.*safetensors"):
        read_torch_file(tmp_path / "m.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"ctorch\n_utils\n.",
    ],
)
def test_no_name_but_those_of_tensors_is_looked_up(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match="refers to"):
        read_torch_file(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))],
)
def test_a_tensor_outside_its_storage_is_refused(torch, tmp_path, offset, shape, strides):
    storage = Storage(torch["torch"].FloatStorage, "0", 4)
    rebuild = torch["torch._utils"]._rebuild_tensor_v2
    tensor = Rebuilt(rebuild, storage, offset, shape, strides, False, None)
    write_zip(tmp_path / "m.pth", {"x": tensor}, {"0": (4, bytes(16))})
    with pytest.raises(ValueError, match="tensor that"):
        read_torch_file(tmp_path / "m.pth")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_named(torch, tmp_path, write, share):
    path = tmp_path / "m.pth"
    write(path, *describe(torch, some_tensors()))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"m\.pth cannot be opened"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "it is empty"), (b"<html>not found</html>", "does not start like a PyTorch file")],
)
def test_a_file_that_is_no_pickle_is_called_so(tmp_path, content, complaint):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.pth cannot be opened .*{complaint}"):
        read_torch_file(tmp_path / "m.pth")


def test_storage_shorter_than_announced_is_refused(torch, tmp_path):
    content, blobs = describe(torch, some_tensors())
    blobs["0"] = (6, blobs["0"][1][:-4])
    write_zip(tmp_path / "m.pth", content, blobs)
    with pytest.raises(ValueError, match="ends within a tensor"):
        read_torch_file(tmp_path / "m.pth")


def test_a_tensor_that_repeats_a_few_bytes_without_end_is_refused(torch, tmp_path):
    content, blobs = describe(torch, {"a": np.ones(1, np.float32)})
    function, (storage, offset, _, _, *rest) = content["a"].call
    content["a"] = Rebuilt(function, storage, offset, (1 << 20, 1 << 20), (0, 0), *rest)
    write_zip(tmp_path / "m.pth", content, blobs)
    with pytest.raises(ValueError, match="far larger than its storage"):
        read_torch_file(tmp_path / "m.pth")


def test_a_compressed_archive_is_refused(torch, tmp_path):
    content, blobs = describe(torch, some_tensors())
    write_zip(tmp_path / "m.pth", content, blobs)
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as plain,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="the archive is compressed"):
        read_torch_file(tmp_path / "c.pth")


def test_big_endian_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("archive/data.pkl", dumps({}))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="byte order"):
        read_torch_file(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2]])
def test_file_without_named_tensors_says_so(tmp_path, content):
    write_zip(tmp_path / "m.pth", content, {})
    with pytest.raises(ValueError, match=r"m\.pth .* it holds"):
        read_torch_file(tmp_path / "m.pth")


def test_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pth")
