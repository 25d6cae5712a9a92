"""`--job benchmark`: what a config's training, scoring, metrics and input take on these devices."""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ccl_jax import mesh, settings, setup
from ccl_jax.atomic import write_atomically
from ccl_jax.augment import Recipe
from ccl_jax.benchmark import table
from ccl_jax.benchmark.metric_time import time_metrics
from ccl_jax.benchmark.page import machine, replace_part
from ccl_jax.benchmark.parts import SEARCH, Parts
from ccl_jax.benchmark.reading import Reading, Source, time_reading
from ccl_jax.benchmark.scoring import time_scoring
from ccl_jax.benchmark.table import Row
from ccl_jax.benchmark.training import (
    Steps,
    Training,
    first_state,
    random_batches,
    time_training,
)
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts
from ccl_jax.data.pictures import decoded_bytes
from ccl_jax.datasets import read_split
from ccl_jax.scoring import Scorer, architecture_of, map_settings_of
from ccl_jax.state import Frozen, create_encoder, join, purpose_key, read_encoder
from ccl_jax.throughput import device_peak
from ccl_jax.workdir import check_writable

MVTEC_TEST, MVTEC_CLASSES = 1725, 15  # what is timed where no data are at hand
STEPS_WITHOUT_DATA = 1000  # of a training whose rate falls at a share of them


class Found(NamedTuple):
    """What one part of the job has measured."""

    rows: list[Row]
    numbers: dict[str, Any]


def benchmark_job(config: ConfigDict, workdir: Path) -> int:
    """Prints the table, and writes WORKDIR/benchmark.md, benchmark.json and the part of a page."""
    where = setup.devices_of(config, "train.batch_size", "eval.batch_size")
    setup.one_process("benchmark")
    check_writable(workdir, "--workdir")
    found = table.circumstances("ccl_jax.main", sys.argv[1:])
    split, reason = readable_split(config)
    mesh.say(f"compiling the training step, then timing {config.benchmark.steps} of them")
    step = Step(config, workdir, where, split)
    parts = [step.found]
    mesh.say("timing the parts of the step, each compiled alone")
    parts.append(step.parts())
    mesh.say("timing the scoring")
    parts.append(step.scoring())
    mesh.say("timing the metrics")
    parts.append(metrics(config, where, split))
    if split is None:
        parts.append(without_reading(reason))
    else:
        mesh.say("timing the input pipeline")
        parts.append(reading(config, where, split, step.steps))
    rows = [described(config, where), *(row for part in parts for row in part.rows)]
    for part in parts:
        found |= part.numbers
    found |= {"rows": [row._asdict() for row in rows], "config": config.to_dict()}
    body = f"{table.heading(found)}\n{table.markdown_table(rows)}"
    table.write_json(workdir / "benchmark.json", found)
    write_atomically(workdir / "benchmark.md", body)
    mesh.say(f"\n{body}\n{workdir / 'benchmark.json'}: all numbers")
    if config.benchmark.page:
        title = f"Training, scoring, metrics and input: {described(config, where).how}"
        replace_part(Path(config.benchmark.page), machine(), title, body)
        mesh.say(f"{config.benchmark.page}: {title}")
    return 0


def described(config: ConfigDict, where: jax.sharding.Mesh) -> Row:
    """The row that says what was timed, and on what."""
    model = config.model
    what = (
        f"{config.name}, {model.encoder}, {config.data.image_size} pixels, "
        f"batch {config.train.batch_size}, {model.compute_dtype}"
    )
    kind = where.devices.flat[0].device_kind
    return Row("timed", f"{where.size} x {kind}", what)


def readable_split(config: ConfigDict) -> tuple[layouts.Split | None, str]:
    """Returns (the config's data, ""), or (None, why they cannot be read)."""
    try:
        return read_split(config), ""
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        mesh.say(f"times no input, because the data cannot be read: {reason}")
        return None, reason


def encoder_of(config: ConfigDict, workdir: Path) -> Frozen:
    """The encoder of the workdir, or where there is none that of `encoder.weights`.

    Raises ValueError where neither can be had.
    """
    architecture = architecture_of(config.to_dict())
    if (workdir / "encoder" / "provenance.json").exists():
        return read_encoder(workdir / "encoder", architecture)[0]
    with tempfile.TemporaryDirectory() as folder:
        key = purpose_key(jax.random.key(config.seed), "encoder", 0)
        create_encoder(Path(folder) / "encoder", config.encoder.weights, architecture, key)
        return read_encoder(Path(folder) / "encoder", architecture)[0]


class Step:
    """The training step of a config, timed once it is made, and what is timed with its state."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        where: jax.sharding.Mesh,
        split: layouts.Split | None,
    ) -> None:
        """Raises ValueError where the encoder's weights cannot be had."""
        self._config, self._where = config, where
        architecture = architecture_of(config.to_dict())
        self._root = jax.random.key(config.seed)
        self._classes = MVTEC_CLASSES if split is None else len(split.class_names)
        total = STEPS_WITHOUT_DATA
        if split is not None:
            total, _ = settings.total_steps(config, len(split.train))
        self._optimizer = settings.optimizer_of(config, total)
        self._graphdef, *_ = setup.abstract_network(config)
        self._frozen = mesh.put_replicated(encoder_of(config, workdir), where)
        self._how = {"warm_up": config.benchmark.warm_up, "repeats": config.benchmark.steps}
        self._ahead = where.devices.flat[0].platform != "cpu"
        self._batches = self._random(config.train.batch_size)
        self._training = self._timed(architecture)
        self.steps = Steps(
            self._training.step, self._training.state, self._frozen, self._batches, where
        )

    def _random(self, images: int) -> list[dict[str, jax.Array]]:
        size, seed = self._config.data.image_size, self._config.seed
        return random_batches(images, size, classes=self._classes, where=self._where, seed=seed)

    def _timed(self, architecture: Any) -> Training:
        key = purpose_key(self._root, "weights", 0)
        step = setup.train_step_of(self._config, self._graphdef, self._optimizer, self._where)
        state = first_state(architecture, self._optimizer, key, self._where)
        return time_training(
            step, state, self._frozen, self._batches, where=self._where, **self._how
        )

    @property
    def found(self) -> Found:
        """The step as a whole."""
        config = self._config
        peak = device_peak(self._where, config.model.compute_dtype, config.run.peak_tflops)
        rows = table.training_rows(
            self._training,
            config.train.batch_size,
            devices=self._where.size,
            peak=peak,
            kind=self._where.devices.flat[0].device_kind,
        )
        return Found(rows, table.training_numbers(self._training))

    def parts(self) -> Found:
        """Each of its parts, as a program of its own."""
        config = self._config
        times = Parts(
            self._graphdef,
            self.steps.state,
            self._frozen,
            losses=settings.loss_settings(config, self._where.size),
            recipe=Recipe(**config.augment.to_dict()),
            optimizer=self._optimizer,
            root=self._root,
            where=self._where,
        ).time(self._batches, ahead=self._ahead, **self._how)
        rows = table.part_rows(times, SEARCH, self._training.times)
        return Found(rows, {"part_seconds": table.seconds_of(times)})

    def scoring(self) -> Found:
        """The network that scores."""
        config, state = self._config, self.steps.state
        variables = join(self._frozen, state.params, state.batch_stats)
        maps = map_settings_of(config.to_dict())
        scorer = Scorer(self._graphdef, *variables, maps, self._where, int(state.step), {})
        images = [batch["image"] for batch in self._random(config.eval.batch_size)]
        times = time_scoring(scorer, images, ahead=self._ahead, **self._how)
        row = table.scoring_row(times, config.eval.batch_size)
        return Found([row], {"scoring_seconds": list(times.seconds)})


def metrics(config: ConfigDict, where: jax.sharding.Mesh, split: layouts.Split | None) -> Found:
    """The metrics of a test set of full size."""
    images = config.benchmark.metric_images
    classes = MVTEC_CLASSES if split is None else len(split.class_names)
    whose = "config.benchmark.metric_images"
    if not images:
        images, whose = MVTEC_TEST, "as many as MVTec AD has"
        if split is not None:
            images, whose = len(split.test), "as many as the test set has"
    size = config.data.image_size
    took = time_metrics(
        images,
        size,
        batch_size=config.eval.batch_size,
        classes=classes,
        fpr_limit=config.eval.aupro_fpr_limit,
        where=where,
        key=purpose_key(jax.random.key(config.seed), "score maps", 0),
    )
    row = Row(
        f"seven metrics of {images} maps",
        table.in_words(took.total),
        f"{whose}; {size}x{size}, {classes} classes, one pass; {table.in_words(took.counting)} to "
        f"count",
    )
    return Found([row], {"metric_images": images, "metric_seconds": took._asdict()})


def without_reading(reason: str) -> Found:
    """Why the input pipeline was left out."""
    row = Row("input pipeline", "left out", f"the data cannot be read: {reason}")
    return Found([row], {"reading": None, "reading_left_out": reason})


def reading(
    config: ConfigDict,
    where: jax.sharding.Mesh,
    split: layouts.Split,
    steps: Steps,
) -> Found:
    """The input pipeline, and the wait for it."""
    cache_bytes = int(config.data.cache_gib * 2**30)
    source = Source(
        records=split.train,
        image_size=config.data.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        threads=config.run.threads,
        workers=config.run.workers,
        cache_bytes=cache_bytes,
        keeps=decoded_bytes(len(split.train), config.data.image_size) <= cache_bytes,
        bad_files=config.data.bad_files,
    )
    found = time_reading(
        source, config.benchmark.images, steps, where=where, repeats=config.benchmark.steps
    )
    return Found(reading_rows(found, source, config.benchmark.steps), {"reading": found._asdict()})


def reading_rows(found: Reading, source: Source, steps: int) -> list[Row]:
    """The rows of the input pipeline."""
    who = f"{source.threads} threads, {source.workers} workers"
    how = f"{found.images} images, {who}, one pass"
    rows = [Row("input pipeline, from files", f"{found.from_files:.4g} images/s", how)]
    if found.from_memory is not None:
        rows.append(
            Row("input pipeline, from memory", f"{found.from_memory:.4g} images/s", "the next pass")
        )
    place = "files" if found.from_memory is None else "memory"
    rows.append(
        Row(
            "wait for input in a loop",
            f"{found.input_wait:.1%} of the time",
            f"{steps} steps fed from {place}, {found.loop_images_per_second:.4g} images/s",
        )
    )
    return rows
