"""A learned encoder as one small file: convolutions in float16, all else in float32."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ccl_jax.models.pretrained import sha256_of
from ccl_jax.models.torch_names import to_torch_layout, torch_name
from ccl_jax.models.trees import Tree, flatten, save_tree

NARROW = np.dtype(np.float16)


def write_weights(path: str | Path, params: Tree, batch_stats: Tree, made: dict[str, Any]) -> str:
    """Writes an encoder as torchvision would, with `made` in its header; the file's sha256.

    `config.encoder.weights` takes it; in PyTorch stage 4 and the classifier are missing. Kernels
    become float16. Vectors, among them the running variances, stay float32: they are a hundredth
    of the file, and a variance may lie outside what float16 holds.

    Raises:
        ValueError: where a weight is not finite in float16.
    """
    leaves = {}
    for name, leaf in flatten({"params": params, "batch_stats": batch_stats}).items():
        array = np.asarray(leaf, np.float32, order="C")
        with np.errstate(over="ignore"):  # noticed in a moment
            narrow = array.astype(NARROW) if array.ndim > 1 else array
        leaves[torch_name(name.partition("/")[2])] = to_torch_layout(narrow)
        if not np.isfinite(narrow).all():
            raise ValueError(
                f"{name} has values that are not finite in {narrow.dtype}, the largest is "
                f"{np.abs(array).max():g}; {path} was not written. Begin again in a new workdir, "
                "with a config.pretrain.lr of half as much."
            )
    save_tree(path, leaves, {**made, "tensors_sha256": digest_of(leaves)})
    return sha256_of(Path(path))


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of all names and values in order of the names, which a file can hold itself."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
