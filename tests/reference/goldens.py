"""Numbers recorded from the original PyTorch code, and the rules of their inputs and weights.

A golden is `NAME.npz` beside an `index.json` that describes it: seeds, shapes, mode. Weights and
images are not stored; every tensor is a function of its name, its shape and a seed. Maps are
[b, c, h, w], kernels are in PyTorch's layout. Small arrays are stored whole (`key`), large ones as
256 sampled values (`key__idx`, `key__val`) and their norm (`key__l2`); `key__f64` and `key__val64`
come from the same code in float64.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

OWN = Path(__file__).parent.parent / "golden"
VARIABLE = "CCL_JAX_GOLDEN"  # set by pytest's option --golden: compare with another folder
_BLOCK_NORM = re.compile(r"(^|\.)\d+\.bn[23]\.weight$")


def folder() -> Path:
    """Where the goldens lie."""
    return Path(os.environ.get(VARIABLE) or OWN)


def index(where: Path | None = None) -> dict[str, dict]:
    """The description of every golden of a folder, by name.

    Raises:
        FileNotFoundError: where the folder has no index.json.
    """
    path = (where or folder()) / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --golden needs a folder of recordings")
    entries = json.loads(path.read_text())["files"]
    return {entry["file"].removesuffix(".npz"): entry for entry in entries}


def names(*patterns: str) -> list[str]:
    """Names of the goldens that match one of the patterns, as in `teacher_*`."""
    known = index()
    found = {path.stem for pattern in patterns for path in folder().glob(f"{pattern}.npz")}
    return sorted(name for name in found if name in known)


class Golden:
    """One file of a folder, else the chosen one: `meta` as in its index, `arrays` as stored."""

    def __init__(self, name: str, where: Path | None = None):
        self.name = name
        self.meta = index(where)[name]
        with np.load((where or folder()) / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}

    def keys(self) -> list[str]:
        """Names of the recorded quantities."""
        return list(self.meta["arrays"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def recorded(self, key: str, value: np.ndarray, *, f64: bool) -> tuple[np.ndarray, np.ndarray]:
        """(what was recorded, the same entries of `value`), both float64."""
        value = np.asarray(value, np.float64)
        shape = tuple(self.meta["arrays"][key]["shape"])
        if value.shape != shape:
            raise ValueError(f"{self.name}/{key}: shape {value.shape}, recorded {shape}")
        whole, sampled = (f"{key}__f64", f"{key}__val64") if f64 else (key, f"{key}__val")
        if whole in self.arrays:
            return self.arrays[whole].astype(np.float64), value
        samples = value.reshape(-1)[self.arrays[f"{key}__idx"]]
        return self.arrays[sampled].astype(np.float64), samples

    def difference(self, key: str, value: np.ndarray, *, f64: bool = False) -> float:
        """Relative L2 difference from the recorded values; absolute where those are all zero.

        Of a sampled array at least that of its norm.
        """
        want, got = self.recorded(key, value, f64=f64)
        length = np.linalg.norm(want)
        worst = float(np.linalg.norm(got - want) / (length if length > 0 else 1.0))
        if f"{key}__l2" in self.arrays and not f64:
            norm = float(self.arrays[f"{key}__l2"])
            worst = max(worst, abs(float(np.linalg.norm(np.asarray(value, np.float64))) / norm - 1))
        return worst

    def weights(self, *, dtype: type = np.float32) -> dict[str, np.ndarray]:
        """Every tensor of the recorded model by its published name."""
        file, table = self.meta["key_table"].split(" / ")
        path = folder() / file
        tables = json.loads((path if path.exists() else OWN / file).read_text())
        made = {
            name: make_weight(name, shape, self.meta["weight_seed"])
            for name, shape, *_ in tables[table]
        }
        return {
            name: value.astype(dtype) if value.dtype == np.float32 else value
            for name, value in made.items()
        }


def rng_for(name: str, seed: int) -> np.random.Generator:
    """The generator of a named tensor."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))


def make_weight(name: str, shape: list[int], seed: int) -> np.ndarray:
    """A tensor of a ResNet-like model; int64 zeros for step counters, else float32."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    rng = rng_for(name, seed)
    # The last normalisations of residual blocks are halved, which keeps deep stacks tame.
    factor = 0.5 if _BLOCK_NORM.search(name) else 1.0
    if last == "running_mean":
        value = 0.1 * rng.standard_normal(shape)
    elif last == "running_var":
        value = rng.uniform(0.5, 1.5, shape)
    elif last.endswith("bias"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) <= 1:
        value = rng.uniform(0.5, 1.5, shape) * factor
    else:
        value = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:])) * factor
    return value.astype(np.float32)


def make_input(tag: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard-normal float32 numbers."""
    return rng_for(tag, seed).standard_normal(tuple(shape)).astype(np.float32)


def make_integers(tag: str, low: int, high: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Integers in [low, high)."""
    return rng_for(tag, seed).integers(low, high, tuple(shape))


def sample_indices(key: str, size: int, number: int) -> np.ndarray:
    """Flat indices at which a tensor of a trajectory is sampled."""
    return rng_for("sample:" + key, 0).integers(0, size, number)


def channels_last(maps: np.ndarray) -> np.ndarray:
    """[b, c, h, w] -> [b, h, w, c]."""
    return np.asarray(maps).transpose(0, 2, 3, 1)


def channels_first(maps: np.ndarray) -> np.ndarray:
    """[b, h, w, c] -> [b, c, h, w]."""
    return np.asarray(maps).transpose(0, 3, 1, 2)
