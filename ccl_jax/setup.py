"""A training put together from a config: what `jobs.train_job` starts."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from ccl_jax import config as configs
from ccl_jax import determinism, mesh, settings
from ccl_jax.atomic import write_atomically
from ccl_jax.augment import Recipe
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.compiled import keep_compiled
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts, pipeline
from ccl_jax.data.pictures import DecodedCache, decoded_bytes
from ccl_jax.run_log import RunLog
from ccl_jax.scoring import MapSettings, Scorer, architecture_of
from ccl_jax.settle import skipped_in
from ccl_jax.state import (
    Frozen,
    TrainState,
    create_encoder,
    init_state,
    join,
    purpose_key,
    read_encoder,
)
from ccl_jax.throughput import device_peak
from ccl_jax.train import Schedule, make_train_step
from ccl_jax.watch import Watch

TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


class Training(NamedTuple):
    """All that a training is made of, before its first step."""

    graphdef: Any
    frozen: Frozen
    encoder: dict[str, Any]  # provenance
    init: Callable[[jax.Array], TrainState]
    key: jax.Array  # of the weights
    step: TrainStep

    def scorer(
        self, number: int, state: TrainState, maps: MapSettings, where: jax.sharding.Mesh
    ) -> Scorer:
        """What evaluates the state after step `number`."""
        variables = join(self.frozen, state.params, state.batch_stats)
        return Scorer(self.graphdef, *variables, maps, where, number, self.encoder)


def devices_of(config: ConfigDict, *batches: str, shards: int | None = None) -> jax.sharding.Mesh:
    """Joins the other processes, if there are any; returns the mesh of the devices to run on.

    With `shards` a job that has no parameters to split ignores `run.parameter_shards`. Raises
    ValueError where the devices cannot divide one of the batch sizes, settings like
    "train.batch_size".
    """
    if config.run.deterministic:
        determinism.ask_for_it()
    keep_compiled(config.run.compilation_cache)
    mesh.initialize_distributed(config.run.cluster, heartbeat_seconds=config.run.heartbeat_seconds)
    shards = config.run.parameter_shards if shards is None else shards
    where = mesh.make_mesh(config.run.devices, shards)
    sizes = dict(configs.flatten(config))
    for setting in batches:
        mesh.check_divisible(sizes[setting], where.size, setting)
    return where


def one_process(job: str) -> None:
    """Raises ValueError where the run of a job that one process does has several."""
    if jax.process_count() > 1:
        raise ValueError(
            f"--job {job} runs in one process, and this run has {jax.process_count()}; start it "
            f"once, without srun and without JAX_COORDINATOR_ADDRESS, or with "
            f"--config.run.cluster=none."
        )


def with_negatives(config: ConfigDict, workdir: Path, devices: int, *, fresh: bool) -> ConfigDict:
    """A copy of the config in which loss.local.negatives="auto" has become what it means.

    A workdir that is continued keeps what it was started with, on any number of devices.
    """
    config = config.copy_and_resolve_references()
    chosen = config.loss.local.negatives
    if chosen == "auto" and not fresh:
        before = configs.read_json(workdir / "config.json")
        if "negatives" in before.loss.local:  # else `compare_settings` names what is missing
            chosen = before.loss.local.negatives
    if chosen == "auto":  # an imported workdir still says so, too
        chosen = settings.negatives_of(config, devices)
    config.loss.local.negatives = chosen
    return config


def lacks_evaluation(workdir: Path, schedule: Schedule, step: int) -> bool:
    """Whether the evaluation that was due at this step is missing; in all processes alike."""
    results = workdir / "evaluation" / str(step) / "results.json"
    due = step > 0 and schedule.evaluates_at(step)
    return due and bool(mesh.from_first(not results.exists()))


def checkpoints_of(config: ConfigDict, workdir: Path) -> Checkpoints:
    """The checkpoints of a workdir, to write; what is kept is as the config says."""
    return Checkpoints(
        workdir / "checkpoints",
        keep=config.train.keep_checkpoints,
        keep_best=config.train.keep_best,
        keep_every=config.train.keep_every,
    )


def set_up(
    config: ConfigDict, workdir: Path, where: jax.sharding.Mesh, total: int, *, fresh: bool
) -> Training:
    """Encoder, optimizer and step of a training of `total` steps.

    A `fresh` training, one without a checkpoint, writes the encoder anew; others, and all processes
    but the first, read it.
    """
    root = jax.random.key(config.seed)
    architecture = architecture_of(config.to_dict())
    if fresh and mesh.is_first():
        create_encoder(
            workdir / "encoder",
            config.encoder.weights,
            architecture,
            purpose_key(root, "encoder", 0),
        )
    mesh.barrier("the encoder is written")
    frozen, encoder = read_encoder(workdir / "encoder", architecture)
    optimizer = settings.optimizer_of(config, total)
    graphdef, *_ = abstract_network(config)
    return Training(
        graphdef,
        mesh.put_replicated(frozen, where),
        encoder,
        functools.partial(init_state, architecture, optimizer),
        purpose_key(root, "weights", 0),
        train_step_of(config, graphdef, optimizer, where),
    )


def abstract_network(config: ConfigDict) -> tuple[Any, dict, dict]:
    """Structure, parameters and running statistics, as shapes, of the network that is trained."""
    return architecture_of(config.to_dict()).abstract(
        norm_images=config.model.norm_images, remat=config.run.remat
    )


def train_step_of(
    config: ConfigDict,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    where: jax.sharding.Mesh,
) -> TrainStep:
    """The pure training step that the config describes, over the devices of a mesh."""
    return make_train_step(
        graphdef,
        optimizer,
        settings.loss_settings(config, where.size),
        Recipe(**config.augment.to_dict()),
        noise_probability=config.model.noise_probability,
        root=jax.random.key(config.seed),
        where=where,
    )


def run_log(
    config: ConfigDict, workdir: Path, where: jax.sharding.Mesh, total: int, done: int
) -> RunLog:
    """The log of a training that begins at step `done`."""
    return RunLog(
        workdir / "log",
        total_steps=total,
        start_step=done,
        images_per_step=config.train.batch_size,
        tensorboard=config.run.tensorboard,
        progress=config.run.progress,
        devices=where.size,
        peak=device_peak(where, config.model.compute_dtype, config.run.peak_tflops),
    )


def watch(config: ConfigDict, workdir: Path, run: int) -> Watch:
    """Ends this process where the run in `workdir`, whose number is `run`, stands still."""
    return Watch(
        workdir,
        index=jax.process_index(),
        count=jax.process_count(),
        stall_seconds=config.run.stall_seconds,
        run=run,
    )


def first_or_saved(
    training: Training, checkpoints: Checkpoints, where: jax.sharding.Mesh
) -> TrainState:
    """The newest undamaged state, or the one before the first step, on the devices of the mesh.

    Raises ValueError where there are checkpoints and all are damaged: nothing starts anew unasked.
    """
    shapes = jax.eval_shape(training.init, training.key)
    shardings = mesh.state_shardings(shapes, where)
    if checkpoints.latest is None:
        return jax.jit(training.init, out_shardings=shardings)(training.key)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return checkpoints.restore(-1, abstract)


def decoded_cache(config: ConfigDict, split: layouts.Split) -> DecodedCache:
    """The memory for decoded images; says whether the training images fit."""
    cache = DecodedCache(int(config.data.cache_gib * 2**30))
    needed = decoded_bytes(len(split.train), config.data.image_size)
    fits = needed <= cache.budget
    what = "stay in memory" if fits else "are decoded anew in every epoch"
    mesh.say(
        f"the training images {what}: they take {needed / 2**30:.3g} GiB, and "
        f"config.data.cache_gib={config.data.cache_gib:g}"
        + ("; threads read them, no workers" if fits and config.run.workers else "")
    )
    return cache


def train_batches(
    config: ConfigDict,
    workdir: Path,
    split: layouts.Split,
    start: int,
    cache: DecodedCache,
    log: RunLog,
) -> pipeline.Batches:
    """The batches from number `start` on; the log and `skipped_in` learn of unreadable files."""
    number = jax.process_index()  # each process reads files of its own
    skipped = workdir / ("skipped.json" if number == 0 else f"skipped-{number}.json")

    def report(reason: str) -> None:
        log.note(reason)
        reasons = skipped_in(workdir)
        if reason not in reasons:
            mine = json.loads(skipped.read_text()) if skipped.exists() else []
            text = json.dumps([*mine, reason], indent=2, ensure_ascii=False)
            write_atomically(skipped, text + "\n")

    return pipeline.train_batches(
        split.train,
        image_size=config.data.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        start=start,
        threads=config.run.threads,
        workers=config.run.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        cache=cache,
        bad_files=config.data.bad_files,
        report=report,
    )
