"""PyTorch's names and layouts for the leaves of our trees, and trees filled from named tensors."""

import re
from collections.abc import Callable, Mapping

import numpy as np

from ccl_jax.models.trees import Tree, flatten, unflatten

FLOATS = ("float16", "bfloat16", "float32", "float64")  # what weights may be stored in
LISTED = 20  # differences of a kind that an error shows
_LAST = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_SCALES = "abc"  # of the released projector, fine to coarse
_UPSAMPLING = (2, 2)  # height and width of a kernel that only transposed convolutions have


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


def released_name(path: str, *, depthwise: bool) -> str:
    """The authors' name for a leaf of a network, e.g. mff_oce.bn_layer.0.conv1.weight.

    `path` begins with the part; `depthwise` is the form of the projector, whose layers the released
    code numbers through.
    """
    part, _, rest = path.partition("/")
    if part == "encoder":
        return "net_t." + torch_name(rest)
    if part == "neck":
        return "mff_oce." + re.sub(r"^layer\.", "bn_layer.", torch_name(rest))
    if part == "decoder":
        return "net_s." + torch_name(rest, shortcut="upsample")
    scale, conv, leaf = rest.split("/")
    # A layer is a convolution (or two), a normalisation and an activation; only the first has
    # tensors.
    layer = int(conv[-1]) - 1
    place = 3 * layer
    if depthwise:
        place = 4 * layer + (0 if conv.startswith("depthwise") else 1)
    return f"proj_layer.proj_{_SCALES[int(scale[-1])]}.proj.{place}.{_LAST[leaf]}"


def to_torch_layout(value: np.ndarray) -> np.ndarray:
    """A kernel [h, w, in, out] as PyTorch keeps it; anything else as it is.

    [out, in, h, w], but [in, out, h, w] for a transposed convolution.
    """
    if value.ndim != 4:
        return value
    order = (2, 3, 0, 1) if value.shape[:2] == _UPSAMPLING else (3, 2, 0, 1)
    return np.ascontiguousarray(value.transpose(order))


def from_torch_layout(value: np.ndarray, *, transposed: bool) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if value.ndim != 4:
        return value
    return value.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0))


def fill(
    want: Mapping[str, Tree],
    found: Mapping[str, np.ndarray],
    name_of: Callable[[str], str],
    *,
    fits: str,
    fix: str,
) -> Tree:
    """The tree `want` (arrays or shapes, below "params" and "batch_stats") with found values.

    Kernels are turned into our layout, and everything into the wanted dtype. `name_of` maps a
    path below those two keys to its name in `found`.

    Raises:
        ValueError: "`fits` (n differences)", all missing, unexpected, misshapen and
            not finite tensors, `fix`.
    """
    names = {path: name_of(path.partition("/")[2]) for path in flatten(want)}
    leaves, misshapen, infinite = {}, [], []
    for path, leaf in flatten(want).items():
        if names[path] not in found:
            continue
        value = found[names[path]]
        shape = tuple(leaf.shape)
        turned = from_torch_layout(value, transposed=len(shape) == 4 and shape[:2] == _UPSAMPLING)
        if turned.shape != shape or value.dtype.name not in FLOATS:
            misshapen.append(
                f"{names[path]}: want {published_shape(shape)}, got {value.shape} of {value.dtype}"
            )
            continue
        with np.errstate(over="ignore"):  # noticed in the next line
            leaves[path] = np.asarray(turned, dtype=leaf.dtype, order="C")
        if not np.isfinite(leaves[path]).all():
            infinite.append(f"{names[path]}: NaN or infinite as {leaf.dtype}")
    problems = {
        "missing": sorted(set(names.values()) - found.keys()),
        "unexpected": sorted(found.keys() - set(names.values())),
        "misshapen": misshapen,
        "not finite": infinite,
    }
    number = sum(map(len, problems.values()))
    if number:
        if number == len(infinite):
            fix = "The file is damaged, or was saved by a training that had diverged."
        lines = [f"{fits} ({number} difference{'s' * (number > 1)}):", *_listed(problems), fix]
        raise ValueError("\n".join(lines))
    return unflatten(leaves)


def _listed(problems: Mapping[str, list[str]]) -> list[str]:
    lines = []
    for kind, names in problems.items():
        lines += [f"  {kind:10} {name}" for name in names[:LISTED]]
        if len(names) > LISTED:
            lines.append(f"  {kind:10} ... and {len(names) - LISTED} more")
    return lines


def published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A leaf's shape as PyTorch writes it."""
    return to_torch_layout(np.broadcast_to(np.float32(0), shape)).shape
