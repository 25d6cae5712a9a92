"""A learned encoder as one small file: convolutions in float16, all else in float32."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ccl_jax.models.pretrained import sha256_of
from ccl_jax.models.torch_names import to_torch_layout, torch_name
from ccl_jax.models.trees import Tree, flatten

NARROW = np.dtype(np.float16)


def write_weights(
    path: str | Path, params: Tree, batch_stats: Tree, metadata: dict[str, Any]
) -> str:
    """Writes an encoder as torchvision would, with `metadata` in its header; the file's sha256.

    `config.encoder.weights` takes it; in PyTorch stage 4 and the classifier are missing. Kernels
    become float16. Vectors, among them the running variances, stay float32: they are a hundredth
    of the file, and a variance may lie outside what float16 holds.

    Raises:
        ValueError: where a weight is not finite in float16.
    """
    path = Path(path)
    leaves = {}
    for name, leaf in flatten({"params": params, "batch_stats": batch_stats}).items():
        array = np.asarray(leaf, np.float32, order="C")
        narrow = array.astype(NARROW) if array.ndim > 1 else array
        leaves[torch_name(name.partition("/")[2])] = to_torch_layout(narrow)
        if not np.isfinite(narrow).all():
            raise ValueError(
                f"{name} has values that are not finite in {narrow.dtype}, the largest is "
                f"{np.abs(array).max():g}; {path} was not written. Train with a lower rate, e.g. "
                "--config.pretrain.lr=1e-3."
            )
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.numpy.save_file(leaves, draft, metadata=texts)
        draft.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return sha256_of(path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What the file says about how it was made; nothing where it is no safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: _parsed(text) for name, text in (file.metadata() or {}).items()}
    except SafetensorError:
        return {}


def _parsed(text: str) -> Any:
    """The value of a JSON text; other programs' texts as they are."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
