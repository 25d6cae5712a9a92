"""Whole networks in the naming of the authors' released RD+CCL checkpoints, in and out."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from ccl_jax.models.torch_names import fill, released_name, to_torch_layout
from ccl_jax.models.trees import Tree, flatten

PREFIXES = {
    "encoder": "net_t.",
    "projector": "proj_layer.",
    "neck": "mff_oce.",
    "decoder": "net_s.",
}
COUNTERS = "num_batches_tracked"  # PyTorch's; unused there at a fixed momentum, and unknown here


def projector_kind(names: Iterable[str]) -> str:
    """The projector in a checkpoint of these tensor names: "plain", "depthwise" or "none"."""
    # The last layer of four is number 9 in the plain form, and 12 and 13 in the depthwise one.
    places = {
        int(match[1])
        for name in names
        if (match := re.match(r"proj_layer\.proj_\w\.proj\.(\d+)\.", name))
    }
    if not places:
        return "none"
    return "depthwise" if max(places) > 9 else "plain"


def from_published(
    tensors: Mapping[str, np.ndarray], params: Tree, batch_stats: Tree, *, source: str
) -> tuple[Tree, Tree]:
    """Parameters and statistics of a network from a released checkpoint's tensors.

    `params` and `batch_stats` are the wanted trees, of arrays or shapes, with any of the keys
    encoder, projector, neck and decoder; the results have their paths, shapes and dtypes.

    Raises:
        ValueError: naming `source`, listing each tensor that is missing, unexpected or misshapen.
    """
    if not any(name.startswith(("mff_oce.", "net_s.")) for name in tensors):
        raise ValueError(
            f"{source} holds no neck (mff_oce.*) and no decoder (net_s.*), so it is no checkpoint "
            f"of the released code. The file of an encoder belongs in config.encoder.weights, e.g. "
            f"--config.encoder.weights={source}."
        )
    kind = projector_kind(tensors)
    want = {"params": params, "batch_stats": batch_stats}
    own = "none" if "projector" not in params else _own_kind(params)
    hint = f"--config.model.projector={kind}"
    if kind == own:
        hint = "another --config.model.encoder, such as wide_resnet50_2"
    filled = fill(
        want,
        {name: value for name, value in tensors.items() if not name.endswith(COUNTERS)},
        lambda path: released_name(path, depthwise=own == "depthwise"),
        fits=f"{source} does not fit this network of {len(flatten(want))} tensors with the "
        f"projector {own!r}; the file's is {kind!r}",
        fix=f"Use the network that the checkpoint was trained with, e.g. {hint}.",
    )
    return filled["params"], filled["batch_stats"]


def to_published(params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """The network's tensors under their released names and in PyTorch's layout.

    Loads with `load_state_dict(strict=True)` there. PyTorch's step counters, which nothing uses,
    are 0. The inverse of `from_published`, exact.
    """
    depthwise = "projector" in params and _own_kind(params) == "depthwise"
    tensors = {}
    for tree in (params, batch_stats):
        for path, leaf in flatten(tree).items():
            name = released_name(path, depthwise=depthwise)
            tensors[name] = np.ascontiguousarray(to_torch_layout(np.asarray(leaf)))
            if name.endswith("running_var"):
                tensors[f"{name.removesuffix('running_var')}{COUNTERS}"] = np.zeros((), np.int64)
    return tensors


def _own_kind(params: Tree) -> str:
    return "depthwise" if any("/depthwise" in path for path in flatten(params)) else "plain"
