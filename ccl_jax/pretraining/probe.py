"""How well an encoder's plain features find defects, without any training: a cheap comparison.

    python -m ccl_jax.pretraining.probe --weights builtin --data ROOT [--size 128] [--classes a b]

Every position of a test image is compared with positions of the normal training images of its class
(as PatchCore does, arXiv 2106.08265, with a random instead of a chosen memory). `--weights` takes
what `config.encoder.weights` does; "random" gives the encoder of a training with the same seed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from ccl_jax.augment import normalize, to_unit
from ccl_jax.data.layouts import Split, read_mvtec
from ccl_jax.data.records import Record, read_image, read_mask
from ccl_jax.metrics.scores import auroc
from ccl_jax.models.pretrained import load_encoder
from ccl_jax.pretraining.features import joined_features
from ccl_jax.pretraining.learn import abstract_encoder
from ccl_jax.state import Architecture, purpose_key

METRICS = ("image_auroc", "pixel_auroc")
CHUNK = 16  # images that pass the encoder at once


class Bounds(NamedTuple):
    """What keeps the probe cheap."""

    images: int  # training images of a class that are remembered
    memory: int  # positions of them, drawn at random


def probe(
    params: Any, batch_stats: Any, split: Split, *, architecture: str, size: int, bounds: Bounds
) -> dict[str, dict[str, float | None]]:
    """Image and pixel AUROC by class, and their plain "mean" over the classes that have them."""
    graphdef, *_ = abstract_encoder(architecture)

    @jax.jit
    def features(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        encoder = nnx.merge(graphdef, params, batch_stats)
        return joined_features(encoder(normalize(to_unit(images)), train=False))

    results: dict[str, dict[str, float | None]] = {}
    for label, name in enumerate(split.class_names):
        train = [record for record in split.train if record.label == label][: bounds.images]
        test = [record for record in split.test if record.label == label]
        if not test:
            results[name] = dict.fromkeys(METRICS)
            continue
        memory = np.concatenate(list(_in_chunks(features, train, size)))
        memory = memory.reshape(-1, memory.shape[-1])
        chosen = np.random.default_rng(0).permutation(len(memory))[: bounds.memory]
        maps = [
            np.asarray(distances(jnp.asarray(chunk), jnp.asarray(memory[chosen])))
            for chunk in _in_chunks(features, test, size)
        ]
        results[name] = _metrics(np.concatenate(maps), test, size)
    results["mean"] = {
        metric: _mean([row[metric] for row in results.values()]) for metric in METRICS
    }
    return results


@jax.jit
def distances(
    features: Float[Array, "b h w c"], memory: Float[Array, "n c"]
) -> Float[Array, "b h w"]:
    """Squared distance of every position to the nearest vector of the memory, at least 0."""
    nearest = (jnp.sum(memory**2, -1) - 2 * features @ memory.T).min(-1)
    return jnp.maximum(nearest + jnp.sum(features**2, -1), 0)


def markdown_table(results: dict[str, dict[str, float | None]]) -> str:
    """A row per class, then the mean, with three decimals; "-" where there is no value."""
    lines = ["| class | image AUROC | pixel AUROC |", "|---|---|---|"]
    for name, row in results.items():
        cells = ["-" if row[metric] is None else f"{row[metric]:.3f}" for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_chunks(features: Any, records: Sequence[Record], size: int) -> Any:
    """Features of the records, CHUNK images at a time; the last chunk is filled up and cut."""
    for start in range(0, len(records), CHUNK):
        images = [read_image(record, size) for record in records[start : start + CHUNK]]
        full = np.stack(images + images[:1] * (CHUNK - len(images)))
        yield np.asarray(features(full))[: len(images)]


def _metrics(maps: np.ndarray, records: Sequence[Record], size: int) -> dict[str, float | None]:
    anomalous = np.array([record.anomalous for record in records])
    pixels = None
    if all(record.mask is not None for record in records if record.anomalous):
        large = np.asarray(jax.image.resize(maps, (len(maps), size, size), "linear"))
        masks = np.stack([read_mask(record, size) for record in records])
        pixels = auroc(large.ravel(), masks.ravel() > 0)
    return {"image_auroc": auroc(maps.max((1, 2)), anomalous), "pixel_auroc": pixels}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def encoder_of(weights: str, architecture: str, seed: int = 42) -> tuple[Any, Any]:
    """Parameters and statistics of what `config.encoder.weights` takes."""
    if weights == "random":
        plan = Architecture("rd", architecture, "none", "float32")
        key = purpose_key(jax.random.key(seed), "encoder", 0)
        trees = jax.jit(plan.random_encoder)(key)
        return trees[0], trees[1]
    _, params, batch_stats = abstract_encoder(architecture)
    return load_encoder(weights, architecture, params, batch_stats)[:2]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--weights", required=True, help="as config.encoder.weights")
    parser.add_argument("--data", required=True, type=Path, help="folder in MVTec AD layout")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--classes", nargs="*", default=(), help="names; all where left out")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--seed", type=int, default=42, help="of random weights")
    values = parser.parse_args(words)
    try:
        results = probe(
            *encoder_of(values.weights, values.architecture, values.seed),
            read_mvtec(values.data, classes=values.classes),
            architecture=values.architecture,
            size=values.size,
            bounds=Bounds(images=60, memory=4096),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
