"""What this package computes on the inputs of a golden, and how far that is from the record.

Each function returns {recorded quantity: relative difference}; `f64` compares a float64 run with
the float64 record. `python -m tests.reference.parity` prints them, the tests bound them.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ccl_jax.models import network as networks
from ccl_jax.models import pretrained, published
from ccl_jax.models.initial import Draws
from ccl_jax.models.resnet import ResNetEncoder
from ccl_jax.models.torch_names import fill, torch_name
from tests.reference.goldens import (
    Golden,
    channels_first,
    channels_last,
    make_input,
    make_integers,
)

PROJECTORS = {"rd": "none", "rd_lgc:dp=False": "plain", "rd_lgc:dp=True": "depthwise"}
Differences = dict[str, float]


@contextlib.contextmanager
def precision(*, f64: bool) -> Iterator[type]:
    """JAX with or without float64 inside the block; yields NumPy's type of that width."""
    with jax.enable_x64(f64):
        yield np.float64 if f64 else np.float32


def of_type(tree: Any, dtype: type) -> Any:
    """Shapes of `tree` with another dtype."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def images(golden: Golden, tag: str, dtype: type) -> jax.Array:
    """Recorded input images, [b, h, w, c]."""
    shape = golden.meta["inputs"][tag]
    pixels = channels_last(make_input(tag, shape, golden.meta["input_seed"]))
    return jnp.asarray(pixels, dtype)


def encoder_differences(name: str, *, f64: bool) -> Differences:
    """Encoder maps of a `teacher_resnet*` golden; our three stages of the recorded ones."""
    golden = Golden(name)
    with precision(f64=f64) as dtype:
        architecture = golden.meta["model"].split(":")[1]
        abstract = nnx.eval_shape(
            lambda: ResNetEncoder(architecture, dtype=None, draws=Draws(jax.random.key(0)))
        )
        graphdef, params, batch_stats = networks.split(abstract)
        weights = {
            key: value
            for key, value in golden.weights(dtype=dtype).items()
            if not pretrained.IGNORED.search(key)
        }
        want = of_type({"params": params, "batch_stats": batch_stats}, dtype)
        tree = fill(want, weights, torch_name, fits=name, fix="")

        @jax.jit
        def run(tree: Any, x: jax.Array) -> tuple:
            return nnx.merge(graphdef, tree["params"], tree["batch_stats"])(x)

        maps = dict(enumerate(run(tree, images(golden, "img", dtype)), start=1))
        # The table's name ends in the recorded stages, e.g. ":1,2,3"; ours are 1 to 3.
        stages = map(int, golden.meta["key_table"].rsplit(":", 1)[1].split(","))
        return {
            f"feat{i}": golden.difference(f"feat{i}", channels_first(maps[stage]), f64=f64)
            for i, stage in enumerate(stages)
            if stage in maps
        }


def load_network(golden: Golden, dtype: type) -> tuple[Any, dict, dict]:
    """(graphdef, params, batch_stats) of a recorded network, through our import of checkpoints."""
    graphdef, *wanted = networks.abstract_network(
        family="rd",
        encoder="wide_resnet50_2",
        projector=PROJECTORS[golden.meta["model"]],
        compute_dtype="float32",
    )
    wanted = [of_type(tree, dtype) for tree in wanted]
    weights = golden.weights(dtype=dtype)
    trees = published.from_published(weights, *wanted, source=golden.name)
    return graphdef, *jax.tree.map(jnp.asarray, trees)


def recorded_noise(golden: Golden, maps: Any, dtype: type) -> Any:
    """The noise and masks of a recording, or None where it had none."""
    seed = golden.meta.get("noise_seed")
    if seed is None:
        return None
    noise = []
    for i, scale in enumerate(maps):
        b, h, w, c = scale.shape
        values = channels_last(make_input(f"noise{i}", (b, c, h, w), seed))
        mask = channels_last(make_integers(f"noise_mask{i}", 0, 2, (b, 1, h, w), seed))
        noise.append((values.astype(dtype), mask.astype(dtype)))
    return tuple(noise)


def network_differences(name: str, *, f64: bool) -> Differences:
    """Everything an `rd*` golden recorded of a forward pass, running statistics included."""
    golden = Golden(name)
    with precision(f64=f64) as dtype:
        graphdef, params, batch_stats = load_network(golden, dtype)
        clean = images(golden, "img", dtype)
        augmented = None
        if "aug_img" in golden.meta["inputs"]:
            augmented = images(golden, "aug_img", dtype)
        shapes = networks.merge(graphdef, params, batch_stats).map_shapes(clean)
        noise = recorded_noise(golden, shapes, dtype)

        @functools.partial(jax.jit, static_argnames="train")
        def run(params: Any, batch_stats: Any, clean: Any, augmented: Any, noise: Any, train: bool):
            network = networks.merge(graphdef, params, batch_stats)
            out = network(clean, augmented, train=train, noise=noise)
            return out, networks.statistics(network)

        train = golden.meta["mode"] == "train"
        out, statistics = run(params, batch_stats, clean, augmented, noise, train)
        values = quantities(out)
        tensors = published.to_published({}, statistics)
        values |= {f"bn/{key}": value for key, value in tensors.items()}
        keys = [key for key in golden if "num_batches" not in key]
        return {key: golden.difference(key, values[key], f64=f64) for key in keys}


def quantities(out: networks.NetworkOutput) -> dict[str, np.ndarray]:
    """A forward pass under the names of the recordings."""
    values = {"glo_feats": squeezed(out.pooled)}
    for i, scale in enumerate(out.targets):
        # With two views the clean one is called q and the augmented one k.
        values[f"feats_t{i}"] = values[f"feats_t_q{i}"] = channels_first(scale)
        values[f"feats_s{i}"] = channels_first(out.rebuilt[i])
        values[f"q_grid{i}"] = channels_first(out.projected[i])
    if out.augmented is not None:
        values["glo_feats_k"] = squeezed(out.augmented.pooled)
        for i, scale in enumerate(out.augmented.targets):
            values[f"feats_t_k{i}"] = channels_first(scale)
            values[f"k_grid{i}"] = channels_first(out.augmented.projected[i])
    return values


def squeezed(pooled: jax.Array) -> np.ndarray:
    """The pooled code as recorded: the original drops the batch axis of a single image."""
    return np.asarray(pooled[0] if len(pooled) == 1 else pooled)


def worst(differences: Differences) -> tuple[str, float]:
    """The quantity that differs most, and by how much; NaN counts as most."""
    key = max(differences, key=lambda k: np.nan_to_num(differences[k], nan=np.inf))
    return key, differences[key]
