"""Reads the tensors of a PyTorch checkpoint without PyTorch, and without running code from it.

A .pth file is a pickle, and a pickle may call any function. Here every name that it refers to is
refused, but for the few that describe tensors, and those only make inert descriptions.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file before PyTorch 1.6
WRAPPERS = ("state_dict", "model", "net")  # keys under which training scripts put the tensors
# What numbers and bytes that lie beside the tensors are made with; they become placeholders.
HARMLESS = {
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


REPEATED = 2**20  # elements to which a tensor may repeat a smaller storage


class _Storage(NamedTuple):
    kind: str  # key of DTYPES
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Placeholder:
    """Stands for a value of no interest, such as a metric in a training script's record."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Inert(pickle.Unpickler):
    """Builds containers, numbers, strings and tensor descriptions; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for an allowed name; a pickle cannot alter what these do."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._parameter
        if module in ("torch", "torch.cuda") and name in DTYPES:
            return name
        if (module, name) in HARMLESS:
            return _Placeholder
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """The description of a storage, whose bytes lie elsewhere in the file."""
        match pid:
            case ("storage", str(kind), str(key), str(), int(count), *view) if (
                kind in DTYPES and view in ([], [None])
            ):
                return _Storage(kind, key, count)
        raise pickle.UnpicklingError("it refers to a storage in a way that is not known")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any
    ) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(
            isinstance(number, int) and number >= 0 for number in numbers
        ):
            raise pickle.UnpicklingError("it describes a tensor that cannot be")
        last = offset + sum(
            (side - 1) * stride for side, stride in zip(shape, strides, strict=True)
        )
        if 0 not in shape and last >= storage.elements:
            raise pickle.UnpicklingError("it describes a tensor that exceeds its storage")
        # A stride of 0 repeats elements: a few bytes could ask for any amount of memory.
        if math.prod(shape) > max(storage.elements, REPEATED):
            raise pickle.UnpicklingError("it describes a tensor far larger than its storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor: Any, *_unused: Any) -> Any:
        return tensor


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors of a .pth file by name; a `state_dict` or `model` wrapper is looked through.

    Reads the zip format and the one before PyTorch 1.6.

    Raises:
        ValueError: where the file is damaged, is something else, or would have to run code; the
            latter names the function or class.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        with open(path, "rb") as file:
            return _read_legacy(file)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(
            f"{path} cannot be opened as a file of plain tensors: "
            f"{error or type(error).__name__}. Nothing in it was executed. If it is complete, save "
            "only its tensors, in PyTorch with "
            'safetensors.torch.save_file(model.state_dict(), "model.safetensors").'
        ) from error


def _read_zip(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("the archive is compressed, which PyTorch never does")
    heads = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(heads) != 1:
        raise ValueError("the archive holds no data.pkl")
    folder = heads[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = archive.read(f"{folder}byteorder")
        if order != b"little":
            raise ValueError(f"its byte order is {order!r}; only little is read")
    content = _Inert(io.BytesIO(archive.read(heads[0]))).load()
    return {
        name: _materialise(tensor, archive.read(f"{folder}data/{tensor.storage.key}"))
        for name, tensor in _tensors_in(content).items()
    }


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    start = file.read(2)
    file.seek(0)
    if not start:
        raise ValueError("it is empty")
    if start[:1] != pickle.PROTO:
        raise ValueError("it does not start like a PyTorch file")
    if _Inert(file).load() != LEGACY_MAGIC:
        raise ValueError("it does not start like a PyTorch file")
    _Inert(file).load()  # protocol version
    _Inert(file).load()  # sizes of the writing machine's integers
    reader = _Recording(file)
    content = reader.load()
    blobs: dict[str, bytes] = {}
    for key in _Inert(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        blobs[key] = file.read(count * np.dtype(DTYPES[reader.kinds[key]]).itemsize)
    return {
        name: _materialise(tensor, blobs[tensor.storage.key])
        for name, tensor in _tensors_in(content).items()
    }


class _Recording(_Inert):
    """Remembers every storage's kind: the legacy format gives sizes in elements only."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.kinds: dict[str, str] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        """As in a zip file, and its kind is noted: the bytes come after the pickles."""
        storage = super().persistent_load(pid)
        self.kinds[storage.key] = storage.kind
        return storage


def _tensors_in(content: Any) -> dict[str, _Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    found = {str(name): value for name, value in content.items() if isinstance(value, _Tensor)}
    if not found:
        raise ValueError(f"it holds no tensors by name, only {sorted(map(str, content))[:5]}")
    return found


def _materialise(tensor: _Tensor, storage: bytes) -> np.ndarray:
    dtype = np.dtype(DTYPES[tensor.storage.kind])
    flat = np.frombuffer(storage, dtype)
    if flat.size < tensor.storage.elements:
        raise ValueError("the file ends within a tensor")
    steps = tuple(stride * dtype.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps)
    return view.copy()
