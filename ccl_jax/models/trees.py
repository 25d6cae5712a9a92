"""Nested dicts of arrays: compared before they are used, and kept in safetensors files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

Tree = dict[str, Any]
MADE = "ccl_jax"  # key of what a file says about its origin


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by their "/"-joined path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Nested dicts from "/"-joined paths."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def check_same_tree(want: Any, got: Any, what: str) -> None:
    """Returns if both pytrees have the same paths, shapes and dtypes.

    Raises:
        ValueError: that starts with `what` and lists every leaf that differs. `nnx.merge` would
            take values of another shape, or swap leaves of other names, without a word.
    """
    wanted = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flatten(want).items()}
    found = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flatten(got).items()}
    lines = [f"  missing    {path} {wanted[path]}" for path in sorted(wanted.keys() - found.keys())]
    lines += [f"  unexpected {path} {found[path]}" for path in sorted(found.keys() - wanted.keys())]
    lines += [
        f"  differs    {path}: want {wanted[path]}, got {found[path]}"
        for path in sorted(wanted.keys() & found.keys())
        if wanted[path] != found[path]
    ]
    if lines:
        raise ValueError(
            f"{what} does not fit the model ({len(lines)} differences, the model has "
            f"{len(wanted)} leaves):\n" + "\n".join(lines)
        )


def save_tree(path: str | Path, tree: Tree, made: Mapping[str, Any] | None = None) -> None:
    """Writes nested dicts of arrays as one safetensors file, in one atomic step.

    `made` says how the content came about, in values that JSON can hold; `read_made` returns it.
    """
    path = Path(path)
    leaves = {name: np.asarray(leaf, order="C") for name, leaf in flatten(tree).items()}
    # One text: several would be written in another order each time.
    metadata = None if made is None else {MADE: json.dumps(made)}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(safetensors.numpy.save(leaves, metadata))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_made(path: str | Path) -> dict[str, Any]:
    """What a file of save_tree says about how it was made; {} where it is none or says nothing."""
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(MADE, "{}"))
    except SafetensorError:
        return {}


def load_tree(path: str | Path) -> Tree:
    """The nested dicts of NumPy arrays that save_tree wrote.

    Raises:
        ValueError: where the file is not a safetensors file.
    """
    try:
        return unflatten(safetensors.numpy.load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a safetensors file ({error}); it may be incomplete: "
            "delete it and write it again."
        ) from error
