"""Whole networks in the naming of the authors' released RD+CCL checkpoints, in and out."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from ccl_jax.models.resnet import ARCHITECTURES
from ccl_jax.models.torch_names import fill, published_shape, released_name, to_torch_layout
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


def encoder_name(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The architecture of the encoder in a checkpoint of tensors of these names and shapes.

    None where it is not a known one.
    """
    blocks = {name.split(".")[2] for name in shapes if name.startswith("net_t.layer3.")}
    bottleneck = "net_t.layer1.0.conv3.weight" in shapes
    width, *_ = shapes.get("net_t.layer1.0.conv2.weight", (0,))
    for name, known in ARCHITECTURES.items():
        if (known.depths[2], known.bottleneck, 64 * known.width_factor) == (
            len(blocks),
            bottleneck,
            width,
        ):
            return name
    return None


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
    want = {"params": params, "batch_stats": batch_stats}
    depthwise = "projector" in params and _own_kind(params) == "depthwise"
    shapes = {
        released_name(path, depthwise=depthwise): published_shape(leaf.shape)
        for path, leaf in flatten(params).items()
    }
    theirs = _settings({name: value.shape for name, value in tensors.items()})
    other = {
        name: value
        for name, value in theirs.items()
        if value and value != _settings(shapes).get(name)
    }
    fits = f"{source} does not fit this network"
    fix = "It is of the same kind, so the file is incomplete, or has been added to."
    if other:
        fits += "; the file's has " + " and ".join(f"the {key} {other[key]!r}" for key in other)
        hint = " ".join(f"--config.model.{name}={value}" for name, value in other.items())
        fix = f"Use the network that the checkpoint was trained with: {hint}."
    filled = fill(
        want,
        {name: value for name, value in tensors.items() if not name.endswith(COUNTERS)},
        lambda path: released_name(path, depthwise=depthwise),
        fits=fits,
        fix=fix,
    )
    return filled["params"], filled["batch_stats"]


def _settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | None]:
    """What `config.model` must say for a checkpoint of tensors of these names and shapes."""
    return {"encoder": encoder_name(shapes), "projector": projector_kind(shapes)}


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
