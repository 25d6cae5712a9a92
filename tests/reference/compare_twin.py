"""How far this package is from the PyTorch twin on weights and inputs that nobody recorded.

Both sides in float64. Each function returns {quantity: relative difference}. Optimisation steps are
in compare_twin_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ccl_jax import losses, state
from ccl_jax.models import network as networks
from ccl_jax.models import published
from tests.reference import goldens, twin_losses, twin_record
from tests.reference.twin_model import Twin, randomise, to_numpy

Differences = dict[str, float]

# Without any optimisation, as conftest sets it, XLA's float64 convolutions take five times as long.
OPTIMISED = {"xla_backend_optimization_level": 1}
LABELS = {
    "three classes": (0, 1, 2, 0, 1, 0),
    "two classes": (5, 3, 3, 5, 3, 5),
    "a lonely image": (0, 0, 7, 0, 0, 0),
    "all different": (4, 1, 0, 2, 3, 5),
    "one class": (2, 2, 2, 2, 2, 2),
}
ENCODERS = (("resnet18", "plain"), ("resnet34", None), ("resnet50", "depthwise"))


def channels_last(maps: Any) -> jax.Array:
    return jnp.asarray(goldens.channels_last(maps))


def relative(ours: Any, theirs: Any) -> float:
    """Relative L2 difference; absolute where `theirs` is zero."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    length = np.linalg.norm(theirs)
    return float(np.linalg.norm(ours - theirs) / (length if length > 0 else 1.0))


def our_trees(twin: Twin, encoder: str, projector: str | None) -> tuple[Any, dict, dict]:
    """(graphdef, params, batch_stats) of our network with the twin's weights and their dtype."""
    architecture = state.Architecture("rd", encoder, projector or "none", "float32")
    graphdef, *abstract = architecture.abstract()
    tensors = to_numpy(twin)
    dtype = tensors["net_t.conv1.weight"].dtype
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)
    trees = published.from_published(tensors, *wanted, source="the twin")
    return graphdef, *jax.tree.map(jnp.asarray, trees)


# --- losses ---


def gradient_differences(
    theirs: Callable[..., torch.Tensor], ours: Callable[..., jax.Array], *inputs: np.ndarray
) -> Differences:
    """Of a loss that both sides compute from the same arrays: value, and worst gradient."""
    tensors = [torch.from_numpy(x).requires_grad_() for x in inputs]
    want = theirs(*tensors)
    gradients = [torch.zeros_like(tensor) for tensor in tensors]
    if want.requires_grad:
        gradients = torch.autograd.grad(want, tensors, allow_unused=True, materialize_grads=True)
    arrays = tuple(map(jnp.asarray, inputs))
    got, mine = jax.value_and_grad(ours, tuple(range(len(arrays))))(*arrays)
    pairs = zip(mine, gradients, strict=True)
    return {
        "value": relative(got, want.item()),
        "gradient": max(relative(a, b.numpy()) for a, b in pairs),
    }


def drawn_negatives(rng: np.random.Generator, labels: np.ndarray, scales: int) -> np.ndarray:
    """[scales, b]: per image one of another class, any where there is none."""
    others = [np.flatnonzero(labels != label) for label in labels]
    others = [images if len(images) else np.arange(len(labels)) for images in others]
    return np.array([[rng.choice(images) for images in others] for _ in range(scales)])


def global_differences(form: str, labels: tuple[int, ...], temperature: float) -> Differences:
    """The global loss of either release on random codes, of quite different lengths."""
    rng = np.random.default_rng(3)
    clean, augmented = rng.normal(size=(2, 6, 20)) * np.array([1.0, 30.0])[:, None, None]
    theirs, ours = torch.tensor(labels), jnp.array(labels)
    if form == "second_release":
        return gradient_differences(
            lambda a: twin_losses.global_second_release(a, theirs, temperature=temperature),
            lambda a: losses.second_release_contrastive_loss(a, ours, temperature=temperature),
            clean,
        )
    return gradient_differences(
        lambda a, b: twin_losses.global_two_view(a, b, theirs, temperature=temperature),
        lambda a, b: losses.two_view_supervised_contrastive_loss(
            a, b, ours, temperature=temperature
        ),
        clean,
        augmented,
    )


def local_differences(labels: tuple[int, ...], temperature: float) -> Differences:
    """The local loss on random maps of two scales, not square."""
    rng = np.random.default_rng(4)
    shapes = [(6, 7, 5, 6), (6, 12, 3, 3)]  # [b, c, h, w]
    maps = [rng.normal(size=shape) for _ in twin_record.LOCAL_INPUTS for shape in shapes]
    negatives = drawn_negatives(rng, np.array(labels), len(shapes))

    def lists(maps: tuple) -> Iterator[list]:
        return (list(maps[start : start + 2]) for start in (0, 2, 4, 6))

    return gradient_differences(
        lambda *maps: twin_losses.local_contrastive(
            *lists(maps), torch.tensor(labels), torch.tensor(negatives), temperature=temperature
        ),
        lambda *maps: losses.local_contrastive_loss(
            *lists(tuple(jnp.moveaxis(scale, 1, -1) for scale in maps)),
            jnp.array(labels),
            jax.random.key(0),
            temperature=temperature,
            negatives=jnp.array(negatives),
        ),
        *maps,
    )


def cosine_differences(*, flat: bool) -> Differences:
    """Cosine distillation of random maps of two scales, towards fixed targets."""
    rng = np.random.default_rng(5)
    targets = [rng.normal(size=shape) for shape in ((4, 7, 5, 6), (4, 12, 3, 3))]
    fixed, constant = [torch.from_numpy(t) for t in targets], [channels_last(t) for t in targets]
    return gradient_differences(
        lambda *maps: twin_losses.cosine_distillation(fixed, maps, flat=flat),
        lambda *maps: losses.cosine_distillation_loss(
            constant, [jnp.moveaxis(scale, 1, -1) for scale in maps], flat=flat
        ),
        *(rng.normal(size=target.shape) * 40 for target in targets),
    )


# --- networks ---


def is_compared(name: str) -> bool:
    """Whether both sides define a tensor of the released network.

    PyTorch counts steps, we do not. The projector's biases stand before an instance normalisation:
    their true gradient is zero and no output depends on them (RECIPES 2.4).
    """
    of_no_effect = name.startswith("proj_layer.") and name.endswith(".bias")
    return not name.endswith("num_batches_tracked") and not of_no_effect


def forward_differences(encoder: str, projector: str | None, *, training: bool) -> Differences:
    """Everything that a pass of two views computes, and the running statistics after it."""
    clean, augmented = np.random.default_rng(6).normal(size=(2, 3, 3, 64, 64))
    twin = randomise(Twin(encoder, projector).double(), seed=21)
    graphdef, params, batch_stats = our_trees(twin, encoder, projector)

    def forward(params: Any, batch_stats: Any, clean: jax.Array, augmented: jax.Array) -> Any:
        network = networks.merge(graphdef, params, batch_stats)
        return network(clean, augmented, train=training), networks.statistics(network)

    run = jax.jit(forward, compiler_options=OPTIMISED)
    out, statistics = run(params, batch_stats, channels_last(clean), channels_last(augmented))
    twin.train(training)
    with torch.no_grad():
        first, second = twin.two_views(torch.from_numpy(clean), torch.from_numpy(augmented))
    lists = {
        "clean targets": (out.targets, first.targets),
        "clean projected": (out.projected, first.projected),
        "rebuilt": (out.rebuilt, first.rebuilt),
        "augmented targets": (out.augmented.targets, second.targets),
        "augmented projected": (out.augmented.projected, second.projected),
    }
    found = {
        f"{name} {i}": relative(ours, goldens.channels_last(theirs))
        for name, pair in lists.items()
        for i, (ours, theirs) in enumerate(zip(*pair, strict=True))
    }
    found["clean pooled"] = relative(out.pooled, first.pooled)
    found["augmented pooled"] = relative(out.augmented.pooled, second.pooled)
    ours, theirs = published.to_published({}, statistics), to_numpy(twin)
    return found | {name: relative(ours[name], theirs[name]) for name in ours if is_compared(name)}
