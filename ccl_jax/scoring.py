"""The trained network at test time: images in, score maps, image scores and neck codes out."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree, UInt8

from ccl_jax import anomaly_map, augment, mesh
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.models import network as networks
from ccl_jax.state import TRAINED, Architecture, join, read_encoder, split_parts


class Scores(NamedTuple):
    """What one batch of images gets."""

    maps: Any  # float [b, size, size], 0 where perfectly rebuilt
    images: Any  # float [b], the maximum of each (pooled) map
    codes: Any  # float [b, d], pooled neck codes


@dataclasses.dataclass(frozen=True)
class MapSettings:
    """How feature pairs become a score map and an image score."""

    size: int  # pixels, side of the input image and of the score map
    sigma: float  # pixels, of the Gaussian
    combine: str  # "add", "mul" or "concatenate"
    distance: str  # "cosine" or "l2"
    pool: int  # pixels, side of the average pool before the maximum


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"))
def score_images(
    graphdef: Any,
    params: PyTree,
    batch_stats: PyTree,
    images: UInt8[Array, "b h w 3"],
    *,
    settings: MapSettings,
) -> Scores:
    """Scores a batch of images with running statistics and without noise."""
    network = networks.merge(graphdef, params, batch_stats)
    out = network(augment.normalize(augment.to_unit(images)), train=False)
    maps = anomaly_map.score_map(
        out.targets,
        out.rebuilt,
        size=settings.size,
        sigma=settings.sigma,
        combine=settings.combine,
        distance=settings.distance,
    )
    return Scores(maps, anomaly_map.image_score(maps, pool=settings.pool), out.pooled)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A network with its weights on the devices, ready to score."""

    graphdef: Any
    params: PyTree
    batch_stats: PyTree
    settings: MapSettings
    mesh: jax.sharding.Mesh
    step: int
    encoder: dict  # provenance of the frozen encoder

    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Scores:
        """Scores images that already lie on the devices."""
        return score_images(
            self.graphdef, self.params, self.batch_stats, images, settings=self.settings
        )


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the resolved config of a workdir as plain nested dicts.

    Raises ValueError where the folder is not a workdir.
    """
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist, so {workdir} is not a workdir; name the folder that a "
            f"training was started with (--workdir)."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again from its source.") from error


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The network that a resolved config describes."""
    model = config["model"]
    return Architecture(
        model["family"], model["encoder"], model["projector"], model["compute_dtype"]
    )


def map_settings_of(config: Mapping[str, Any]) -> MapSettings:
    """How a resolved config turns features into score maps.

    Raises ValueError for the config of a workdir that another version wrote.
    """
    settings = config["eval"]
    missing = {"smoothing_sigma", "combine", "distance", "pool"} - settings.keys()
    if missing:
        raise ValueError(
            f"the workdir's config.json has no eval.{', eval.'.join(sorted(missing))}: it comes "
            f"from another version of ccl_jax. Add what configs/default.py says there."
        )
    return MapSettings(
        size=config["data"]["image_size"],
        sigma=settings["smoothing_sigma"],
        combine=settings["combine"],
        distance=settings["distance"],
        pool=settings["pool"],
    )


def load_scorer(
    workdir: Path, *, architecture: Architecture, settings: MapSettings, step: int, devices: int
) -> Scorer:
    """Reads encoder and checkpoint of a workdir; `step` -1 takes the newest undamaged one.

    Raises ValueError where a file is missing, changed, or does not fit the architecture.
    """
    frozen, provenance = read_encoder(workdir / "encoder", architecture)
    where = mesh.make_mesh(devices)
    replicated = mesh.replicated(where)
    graphdef, params, batch_stats = architecture.abstract()
    abstract = {
        "step": jax.ShapeDtypeStruct((), "int32"),
        "params": split_parts(params, TRAINED),
        "batch_stats": split_parts(batch_stats, TRAINED),
    }
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), abstract
    )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        parts = checkpoints.restore_parts(step, abstract)
    frozen = jax.device_put(frozen, replicated)
    params, batch_stats = join(frozen, parts["params"], parts["batch_stats"])
    number = int(parts["step"])
    return Scorer(graphdef, params, batch_stats, settings, where, number, provenance)
