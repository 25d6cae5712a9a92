"""What is trained, what is frozen, and where every random number comes from."""

import functools
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Key, PyTree

from ccl_jax.atomic import write_atomically
from ccl_jax.models import network as networks
from ccl_jax.models import pretrained
from ccl_jax.models.random_encoder import settle_statistics

TRAINED = ("projector", "neck", "decoder")


@struct.dataclass
class TrainState:
    """Everything that a step changes, and all that a checkpoint holds."""

    step: Any  # int32 scalar: steps done, which is also the position in the data
    params: PyTree  # of the trained parts: {"projector": ..., "neck": ..., "decoder": ...}
    batch_stats: PyTree  # running statistics of the trained parts
    opt_state: optax.OptState


class Frozen(NamedTuple):
    """The encoder: an argument of a step, never donated, never in a step's checkpoint."""

    params: PyTree
    batch_stats: PyTree


class Architecture(NamedTuple):
    """The settings that fix the shape of every array in a network."""

    family: str
    encoder: str
    projector: str
    compute_dtype: str

    def build(self, key: Key[Array, ""]) -> networks.Network:
        """Returns the network with fresh weights drawn from `key`."""
        return networks.build_network(**self._asdict(), rngs=nnx.Rngs(key))

    def random_encoder(self, key: Key[Array, ""]) -> tuple[dict, dict]:
        """Returns (params, batch_stats) of an encoder with random weights."""
        weights, pictures = jax.random.split(key)
        encoder = self.build(weights).encoder
        settle_statistics(encoder, pictures)
        _, params, batch_stats = networks.split(encoder)
        return params, batch_stats

    def abstract(self, *, norm_images: int = 0, remat: bool = False) -> tuple[Any, dict, dict]:
        """Returns (graphdef, params, batch_stats) with shapes instead of arrays."""
        graphdef, *trees = _abstract(self, norm_images=norm_images, remat=remat)
        params, batch_stats = jax.tree.map(lambda leaf: leaf, trees)  # dicts of the caller's own
        return graphdef, params, batch_stats


@functools.cache  # a start asks three times, and each takes a fifth of a second
def _abstract(
    architecture: Architecture, *, norm_images: int, remat: bool
) -> tuple[Any, dict, dict]:
    return networks.abstract_network(**architecture._asdict(), norm_images=norm_images, remat=remat)


def purpose_key(root: Key[Array, ""], purpose: str, step: Any) -> Key[Array, ""]:
    """The key for one purpose at one step, the same on every host and in every resumed run."""
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(purpose.encode())), step)


def make_optimizer(
    *,
    projector_lr: float,
    lr: float,
    betas: tuple[float, float],
    clip_norm: float,
    decay_step: int | None,
) -> optax.GradientTransformation:
    """One clip over all trained parameters, then Adam with one rate per group.

    The groups are the projector, and the rest. Both rates are divided by ten from `decay_step` on,
    or stay constant where it is None (what the released code does in effect).
    """

    def adam(rate: float) -> optax.GradientTransformation:
        schedule: Any = rate
        if decay_step is not None:
            schedule = optax.piecewise_constant_schedule(rate, {decay_step: 0.1})
        return optax.adam(schedule, b1=betas[0], b2=betas[1], eps=1e-8)

    groups = {"projector": adam(projector_lr), "rest": adam(lr)}
    by_group = optax.partition(groups, optimizer_groups)
    return optax.chain(clip_by_global_norm(clip_norm), by_group) if clip_norm > 0 else by_group


def optimizer_groups(params: PyTree) -> PyTree:
    """Names the optimizer group, "projector" or "rest", of every leaf."""
    return {
        part: jax.tree.map(
            lambda _, part=part: "projector" if part == "projector" else "rest", tree
        )
        for part, tree in params.items()
    }


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), PyTorch's rule.

    optax's own clip lacks the 1e-6, which shows in a parity run.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        scale = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def split_parts(tree: dict, parts: tuple[str, ...]) -> dict:
    """Returns the named top-level parts of a tree, as far as they are there."""
    return {part: tree[part] for part in parts if part in tree}


def init_state(
    architecture: Architecture, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Returns the state before the first step; call it under jit, which places it."""
    _, params, batch_stats = networks.split(architecture.build(key))
    params = split_parts(params, TRAINED)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=split_parts(batch_stats, TRAINED),
        opt_state=optimizer.init(params),
    )


def join(frozen: Frozen, params: dict, batch_stats: dict) -> tuple[dict, dict]:
    """Returns the whole network's (params, batch_stats) from the frozen and the trained parts."""
    return (
        {"encoder": frozen.params, **params},
        {"encoder": frozen.batch_stats, **batch_stats},
    )


def obtain_encoder(
    folder: Path, source: str, architecture: Architecture, key: Key[Array, ""], *, fresh: bool
) -> tuple[Frozen, dict]:
    """The frozen encoder of a workdir; a `fresh` training writes it there first.

    Returns numpy arrays and the provenance {"source", "written_sha256", ...}. Raises ValueError
    where the weights do not fit, or where the file no longer has the hash it was written with.
    """
    if fresh:
        create_encoder(folder, source, architecture, key)
    return read_encoder(folder, architecture)


def create_encoder(
    folder: Path, source: str, architecture: Architecture, key: Key[Array, ""]
) -> None:
    """Writes encoder.safetensors and provenance.json, the file's hash in it."""
    if source == "random":
        params, batch_stats = jax.device_get(jax.jit(architecture.random_encoder)(key))
        provenance = {"source": "random"}
    else:
        _, *wanted = architecture.abstract()
        params, batch_stats, provenance = pretrained.load_encoder(
            source, architecture.encoder, *(tree["encoder"] for tree in wanted)
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = pretrained.save_encoder(folder / "encoder.safetensors", params, batch_stats)
    provenance |= {"architecture": architecture.encoder, "written_sha256": written}
    write_atomically(folder / "provenance.json", json.dumps(provenance, indent=2) + "\n")


def read_encoder(folder: Path, architecture: Architecture) -> tuple[Frozen, dict]:
    """Reads what `create_encoder` wrote, compared by hash, names, shapes and dtypes first."""
    path = folder / "encoder.safetensors"
    try:
        provenance = json.loads((folder / "provenance.json").read_text())
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} does not exist, so {folder.parent} holds no encoder; name the "
            f"folder of a training (--workdir)."
        ) from error
    if found != provenance["written_sha256"]:
        raise ValueError(
            f"{path} has the hash {found[:12]}, but {provenance['written_sha256'][:12]} was "
            f"written: the file was changed or cut off. Restore it, or train in a new workdir."
        )
    _, *wanted = architecture.abstract()
    return Frozen(*pretrained.read_encoder(path, *(tree["encoder"] for tree in wanted))), provenance
