"""Published encoder weights -> our tree, with every tensor of the file accounted for."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ccl_jax.models.torch_files import read_torch_file
from ccl_jax.models.trees import Tree, check_same_tree, flatten, load_tree, save_tree, unflatten

__all__ = [
    "check_same_tree",
    "load_encoder",
    "load_tree",
    "read_encoder",
    "save_encoder",
    "save_tree",
    "torch_name",
]

HUB = "hub:"
# In published files and of no use here: the classifier, the last stage, PyTorch's step counters.
IGNORED = re.compile(r"^(fc|layer4)\.|num_batches_tracked$")
LISTED = 20  # differences of a kind that an error shows
_LAST = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_encoder(
    source: str, architecture: str, params: Tree, batch_stats: Tree
) -> tuple[Tree, Tree, dict[str, Any]]:
    """Encoder parameters and statistics from a file or the hub, and where they came from.

    `source` is a .safetensors, .pth or .pt file in timm or torchvision naming, or "hub:NAME" for
    a timm model. `params` and `batch_stats` are the encoder's own trees, of arrays or shapes; the
    results have their paths, shapes and dtypes, as NumPy arrays. The provenance holds the source,
    the file, its sha256, and the number of tensors taken.

    Raises:
        ValueError: listing what is missing, unexpected or misshapen; or where the file cannot be
            read, or the hub not be reached.
    """
    path = _fetch(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source)
    if not path.is_file():
        raise ValueError(
            f'config.encoder.weights={source!r} is neither a file, nor "random", nor '
            '"hub:NAME"; give the path of a .safetensors or .pth file, e.g. '
            "--config.encoder.weights=/data/weights/model.safetensors."
        )
    found = {name.removeprefix("module."): leaf for name, leaf in _read(path).items()}
    found = {name: leaf for name, leaf in found.items() if not IGNORED.search(name)}
    filled = _fill({"params": params, "batch_stats": batch_stats}, found, path, architecture)
    provenance = {
        "source": source,
        "file": path.name,
        "sha256": _sha256(path),
        "tensors": len(found),
    }
    return filled["params"], filled["batch_stats"], provenance


def torch_name(path: str, *, shortcut: str = "downsample") -> str:
    """PyTorch's name for a leaf of an encoder, e.g. layer1.0.downsample.1.weight.

    `shortcut` is what the published model calls a block's resampling branch.
    """
    *folders, leaf = path.split("/")
    # Within a shortcut the convolution comes first.
    renamed = {"shortcut": shortcut, "conv": "0", "norm": "1"}
    names = [re.sub(r"^block(?=\d)", "", renamed.get(folder, folder)) for folder in folders]
    names = [re.sub(r"^norm(?=\d)", "bn", name) for name in names]
    return ".".join([*names, _LAST[leaf]])


def save_encoder(path: str | Path, params: Tree, batch_stats: Tree) -> str:
    """Writes an encoder as one safetensors file under our own names; the file's sha256."""
    save_tree(path, {"params": params, "batch_stats": batch_stats})
    return _sha256(Path(path))


def read_encoder(path: str | Path, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
    """The encoder that save_encoder wrote, compared with the trees that the model expects.

    Raises:
        ValueError: listing every leaf that differs.
    """
    tree = load_tree(path)
    check_same_tree({"params": params, "batch_stats": batch_stats}, tree, f"The encoder in {path}")
    return tree["params"], tree["batch_stats"]


def _fill(want: Tree, found: Mapping[str, np.ndarray], path: Path, architecture: str) -> Tree:
    """Our tree `want` with the file's values."""
    expected = {torch_name(name.partition("/")[2]): name for name in flatten(want)}
    leaves, misshapen = {}, []
    for name, leaf in flatten(want).items():
        foreign = torch_name(name.partition("/")[2])
        if foreign not in found:
            continue
        value = found[foreign]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        if value.shape != tuple(leaf.shape) or value.dtype.kind in "iub":
            misshapen.append(
                f"{foreign}: want {_published(leaf.shape)}, got {found[foreign].shape} "
                f"of {value.dtype}"
            )
        else:
            leaves[name] = np.asarray(value, dtype=leaf.dtype, order="C")
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": misshapen,
    }
    if any(problems.values()):
        raise ValueError(_complaint(problems, path, architecture, total=len(expected)))
    return unflatten(leaves)


def _complaint(
    problems: Mapping[str, list[str]], path: Path, architecture: str, *, total: int
) -> str:
    lines = []
    for kind, names in problems.items():
        lines += [f"  {kind:10} {name}" for name in names[:LISTED]]
        if len(names) > LISTED:
            lines.append(f"  {kind:10} ... and {len(names) - LISTED} more")
    number = sum(map(len, problems.values()))
    return (
        f"{path} does not fit a {architecture} encoder of {total} tensors ({number} differences):\n"
        + "\n".join(lines)
        + "\nUse the architecture that the file was trained with, e.g. "
        "--config.model.encoder=resnet18, or another file in config.encoder.weights."
    )


def _published(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape as PyTorch writes it."""
    if len(shape) != 4:
        return tuple(shape)
    height, width, channels_in, channels_out = shape
    return (channels_out, channels_in, height, width)


def _read(path: Path) -> Mapping[str, np.ndarray]:
    readers: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
        ".safetensors": _read_safetensors,
        ".pth": read_torch_file,
        ".pt": read_torch_file,
        ".bin": read_torch_file,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"config.encoder.weights={str(path)!r} ends in {path.suffix!r}; "
            f"only {', '.join(readers)} can be read."
        )
    return readers[path.suffix.lower()](path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names if not IGNORED.search(name)}
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a safetensors file ({error}); it may be incomplete: "
            "fetch it again."
        ) from error


def _fetch(name: str) -> Path:
    """The weights file of a timm model, downloaded or from the local cache."""
    from huggingface_hub import hf_hub_download  # slow to import, and seldom needed

    try:
        return Path(hf_hub_download(repo_id=f"timm/{name}", filename="model.safetensors"))
    except Exception as error:  # the library's own, its HTTP client's, and the system's
        raise ValueError(
            f"config.encoder.weights='{HUB}{name}' could not be fetched "
            f"({type(error).__name__}: {error}). Without a network, run "
            f"`hf download timm/{name} model.safetensors --local-dir weights` on a machine that "
            "has one, copy the file here, and use --config.encoder.weights=weights/"
            "model.safetensors; or use --config.encoder.weights=random."
        ) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
