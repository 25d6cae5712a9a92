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

# Channels of an encoder, at most, whose convolutions leave cores idle: a ResNet of basic blocks.
NARROW = 256
# Options for XLA on CPUs: of its two libraries YNNPACK keeps the products, Eigen gets convolutions.
EIGEN = (("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_DOT"),)


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


def score_images(
    graphdef: Any,
    params: PyTree,
    batch_stats: PyTree,
    images: UInt8[Array, "b h w 3"],
    *,
    settings: MapSettings,
    where: jax.sharding.Mesh | None = None,
) -> Scores:
    """Scores a batch of images with running statistics and without noise, in a compiled program.

    With `where` the scores lie on the devices that their images lie on.
    """
    program = compiled_scoring(options_for(params["encoder"]))
    return program(graphdef, params, batch_stats, images, settings=settings, where=where)


def options_for(encoder: PyTree) -> tuple[tuple[str, str], ...]:
    """The options for XLA that scoring with an encoder of these parameters takes."""
    channels = max(leaf.shape[-1] for leaf in jax.tree.leaves(encoder) if leaf.ndim == 4)
    return convolutions_on_all_cores() if channels <= NARROW else ()


@functools.cache
def convolutions_on_all_cores() -> tuple[tuple[str, str], ...]:
    """Options for XLA with which a convolution of few channels runs on more than one core.

    A convolution of YNNPACK, which XLA takes on CPUs, runs on one core where its kernel has up to
    64 x 128 channels (measured with jaxlib 0.10.2). Eigen's take more time of all cores together,
    but less on the clock in a narrow encoder (docs/benchmarks.md, "Single computations"). Not for
    training: `python -m ccl_jax.benchmark.step --batch 8 --encoder resnet18 --image-size 128
    --dtype float32` took 710 ms a step with it (in XLA_FLAGS), and 657 ms without. () on other
    devices, and where XLA has no such option: it is an experimental one.
    """
    if jax.default_backend() != "cpu":
        return ()
    try:
        jax.jit(lambda x: x, compiler_options=dict(EIGEN)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # no such option, or no such value
        return ()
    return EIGEN


@functools.cache
def compiled_scoring(options: tuple[tuple[str, str], ...]) -> Any:
    """The scoring of `score_images`, jitted, with options for XLA."""
    return jax.jit(
        _score_images,
        static_argnames=("graphdef", "settings", "where"),
        compiler_options=dict(options) or None,
    )


def _score_images(
    graphdef: Any,
    params: PyTree,
    batch_stats: PyTree,
    images: UInt8[Array, "b h w 3"],
    *,
    settings: MapSettings,
    where: jax.sharding.Mesh | None,
) -> Scores:
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
    scores = Scores(maps, anomaly_map.image_score(maps, pool=settings.pool), out.pooled)
    if where is None:
        return scores
    return jax.lax.with_sharding_constraint(scores, mesh.batch_sharding(where))


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
            self.graphdef,
            self.params,
            self.batch_stats,
            images,
            settings=self.settings,
            where=self.mesh,
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


class Scorers:
    """The scorers of a workdir's checkpoints: the encoder is read, and scoring compiled, once.

    Raises ValueError where the encoder is missing, changed, or does not fit the architecture.
    """

    def __init__(
        self, workdir: Path, *, architecture: Architecture, settings: MapSettings, devices: int
    ) -> None:
        frozen, self._provenance = read_encoder(workdir / "encoder", architecture)
        self._folder = workdir / "checkpoints"
        self._settings = settings
        self._mesh = mesh.make_mesh(devices)
        self._frozen = mesh.put_replicated(frozen, self._mesh)
        self._graphdef, params, batch_stats = architecture.abstract()
        replicated = mesh.replicated(self._mesh)
        self._abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
            {
                "step": jax.ShapeDtypeStruct((), "int32"),
                "params": split_parts(params, TRAINED),
                "batch_stats": split_parts(batch_stats, TRAINED),
            },
        )

    def at(self, step: int) -> Scorer:
        """The scorer of one checkpoint; `step` -1 takes the newest undamaged one.

        Raises ValueError where the checkpoint is missing, damaged, or does not fit.
        """
        with Checkpoints(self._folder) as checkpoints:
            parts = checkpoints.restore_parts(step, self._abstract)
        params, batch_stats = join(self._frozen, parts["params"], parts["batch_stats"])
        return Scorer(
            self._graphdef,
            params,
            batch_stats,
            self._settings,
            self._mesh,
            int(parts["step"]),
            self._provenance,
        )


def load_scorer(
    workdir: Path, *, architecture: Architecture, settings: MapSettings, step: int, devices: int
) -> Scorer:
    """Reads encoder and checkpoint of a workdir; `step` -1 takes the newest undamaged one.

    Raises ValueError where a file is missing, changed, or does not fit the architecture.
    """
    scorers = Scorers(workdir, architecture=architecture, settings=settings, devices=devices)
    return scorers.at(step)
