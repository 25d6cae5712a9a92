"""Published encoder weights -> our tree, with every tensor of the file accounted for."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ccl_jax.models.torch_files import read_torch_file
from ccl_jax.models.torch_names import fill, torch_name
from ccl_jax.models.trees import Tree, check_same_tree, flatten, load_tree, read_made, save_tree

__all__ = [
    "check_same_tree",
    "encoder_tensors",
    "load_encoder",
    "load_tree",
    "read_encoder",
    "read_tensors",
    "save_encoder",
    "save_tree",
    "sha256_of",
    "torch_name",
]

HUB = "hub:"
BUILTIN = "builtin"
BUILTIN_ARCHITECTURE = "resnet18"
# Learned from procedural images alone by --job pretrain; its header says how.
BUILTIN_FILE = Path(__file__).parent / "resnet18_procedural.safetensors"
BUILTIN_SHA256 = "83993dbd9a4bdc55994f6cefc726ba5ca03cc969551f1090d999d24238ba2661"


RELEASED = "net_t."  # prefix of the encoder in a released RD+CCL checkpoint
# In published files and of no use here: the classifier, the last stage, PyTorch's step counters.
IGNORED = re.compile(r"^(fc|layer4)\.|num_batches_tracked$")


class HubError(ValueError):
    """A model that is named by the hub's name could not be fetched."""


def load_encoder(
    source: str, architecture: str, params: Tree, batch_stats: Tree
) -> tuple[Tree, Tree, dict[str, Any]]:
    """Encoder parameters and statistics from a file or the hub, and where they came from.

    `source` is a .safetensors, .pth or .pt file in timm or torchvision naming, or a released RD+CCL
    checkpoint, or "hub:NAME" for a timm model, or "builtin" for the ResNet-18 of the package.
    `params` and `batch_stats` are the encoder's own trees, of arrays or shapes; the results have
    their paths, shapes and dtypes, as NumPy arrays. The provenance holds the source, the file, its
    sha256, the number of tensors taken, and what the file says about how it was made.

    Raises:
        ValueError: listing what is missing, unexpected or misshapen; or where the file cannot be
            read, or the hub not be reached.
    """
    if source == BUILTIN:
        check_builtin(architecture)
        path = _builtin_file()
    elif source.startswith(HUB):
        path = _fetch(source.removeprefix(HUB))
    else:
        path = Path(source)
    if not path.is_file():
        raise ValueError(
            f'config.encoder.weights={source!r} is neither a file, nor "builtin", "random" '
            'or "hub:NAME"; give the path of a .safetensors or .pth file, e.g. '
            "--config.encoder.weights=/data/weights/model.safetensors."
        )
    found = encoder_tensors(read_tensors(path, "config.encoder.weights"))
    found = {name: leaf for name, leaf in found.items() if not IGNORED.search(name)}
    want = {"params": params, "batch_stats": batch_stats}
    filled = fill(
        want,
        found,
        torch_name,
        fits=f"{path} does not fit a {architecture} encoder of {len(flatten(want))} tensors",
        fix="Use the architecture that the file was trained with, e.g. "
        "--config.model.encoder=resnet18, or another file in config.encoder.weights.",
    )
    provenance = {
        "source": source,
        "file": path.name,
        "sha256": sha256_of(path),
        "tensors": len(found),
    }
    if made := read_made(path):
        provenance["made"] = made
    return filled["params"], filled["batch_stats"], provenance


def check_builtin(architecture: str) -> None:
    """Raises ValueError where the encoder that comes with the package is of another kind."""
    if architecture != BUILTIN_ARCHITECTURE:
        raise ValueError(
            f"config.encoder.weights='{BUILTIN}' is a {BUILTIN_ARCHITECTURE}, and "
            f"config.model.encoder is {architecture!r}; add "
            f"--config.model.encoder={BUILTIN_ARCHITECTURE}."
        )


def encoder_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's tensors; those of a whole released checkpoint lose their prefix."""
    inner = {
        name.removeprefix(RELEASED): leaf
        for name, leaf in tensors.items()
        if name.startswith(RELEASED)
    }
    return inner or dict(tensors)


def save_encoder(path: str | Path, params: Tree, batch_stats: Tree) -> str:
    """Writes an encoder as one safetensors file under our own names; the file's sha256."""
    save_tree(path, {"params": params, "batch_stats": batch_stats})
    return sha256_of(Path(path))


def read_encoder(path: str | Path, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
    """The encoder that save_encoder wrote, compared with the trees that the model expects.

    Raises:
        ValueError: listing every leaf that differs.
    """
    tree = load_tree(path)
    check_same_tree({"params": params, "batch_stats": batch_stats}, tree, f"The encoder in {path}")
    return tree["params"], tree["batch_stats"]


def read_tensors(path: Path, setting: str) -> Mapping[str, np.ndarray]:
    """All tensors of a .safetensors or .pth file by name; a "module." prefix is dropped.

    Raises:
        ValueError: naming `setting`, where the file cannot be read; or where it holds a tensor
            with and without that prefix.
    """
    readers: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
        ".safetensors": _read_safetensors,
        ".pth": read_torch_file,
        ".pt": read_torch_file,
        ".bin": read_torch_file,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{setting}={str(path)!r} ends in {path.suffix!r}; "
            f"only {', '.join(readers)} can be read."
        )
    tensors = readers[path.suffix.lower()](path)
    renamed = {name.removeprefix("module."): leaf for name, leaf in tensors.items()}
    twice = [name for name in renamed if name in tensors and f"module.{name}" in tensors]
    if twice:
        raise ValueError(
            f"{path} holds {len(twice)} tensors twice, e.g. {twice[0]} and module.{twice[0]}; "
            "save the state_dict of one model only."
        )
    return renamed


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a safetensors file ({error}); it may be incomplete: "
            "fetch it again."
        ) from error


def _builtin_file() -> Path:
    if not BUILTIN_FILE.is_file() or sha256_of(BUILTIN_FILE) != BUILTIN_SHA256:
        raise ValueError(
            f"{BUILTIN_FILE}, a part of ccl_jax, is missing or damaged; install it again: "
            f"pip install --force-reinstall --no-deps <where you got ccl_jax>."
        )
    return BUILTIN_FILE


def _fetch(name: str) -> Path:
    """The weights file of a timm model, downloaded or from the local cache."""
    from huggingface_hub import hf_hub_download  # slow to import, and seldom needed

    try:
        return Path(hf_hub_download(repo_id=f"timm/{name}", filename="model.safetensors"))
    except Exception as error:  # the library's own, its HTTP client's, and the system's
        raise HubError(
            f"config.encoder.weights='{HUB}{name}' could not be fetched "
            f"({type(error).__name__}: {error}). Without a network, run "
            f"`hf download timm/{name} model.safetensors --local-dir weights` on a machine that "
            "has one, copy the file here, and use --config.encoder.weights=weights/"
            "model.safetensors; or use what comes with the package, "
            f"--config.encoder.weights={BUILTIN} --config.model.encoder={BUILTIN_ARCHITECTURE}."
        ) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
