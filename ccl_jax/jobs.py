"""The jobs behind the door: each takes a validated config apart and calls the plain functions."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from ccl_jax import baseline, mesh, report, settings
from ccl_jax import config as configs
from ccl_jax.augment import Recipe
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts, pipeline, synthetic
from ccl_jax.data.records import check_records
from ccl_jax.evaluate import Conventions, evaluate
from ccl_jax.predict import Detector, predict_files, scorer_of
from ccl_jax.provenance import provenance
from ccl_jax.run_log import RunLog
from ccl_jax.scoring import Scorer
from ccl_jax.state import (
    Frozen,
    TrainState,
    init_state,
    join,
    obtain_encoder,
    purpose_key,
)
from ccl_jax.train import StopRequest, make_train_step, train
from ccl_jax.workdir import check_writable, lock_workdir


class Training(NamedTuple):
    """All that a training is made of, before its first step."""

    graphdef: Any
    frozen: Frozen
    encoder: dict[str, Any]  # provenance
    init: Callable[[jax.Array], TrainState]
    key: jax.Array  # of the weights
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def train_job(config: ConfigDict, workdir: Path) -> int:
    """Trains, or goes on training, in `workdir`; evaluates on the way and at the end."""
    start = time.perf_counter()
    where = devices_of(config)
    split = read_split(config)
    total, per_epoch = settings.total_steps(config, len(split.train))
    with lock_workdir(workdir), StopRequest() as stop:
        settle_config(config, workdir)
        training = set_up(config, workdir, where, total)

        def evaluation(number: int, state: TrainState) -> None:
            variables = join(training.frozen, state.params, state.batch_stats)
            maps = settings.map_settings(config)
            scorer = Scorer(training.graphdef, *variables, maps, where, number, training.encoder)
            evaluate_and_print(config, workdir, scorer, split, time.perf_counter() - start)

        with Checkpoints(
            workdir / "checkpoints", keep=config.train.keep_checkpoints
        ) as checkpoints:
            state = first_or_saved(training, checkpoints, where)
            done = int(state.step)
            print(
                f"{config.name}: {len(split.train)} training images of {len(split.class_names)} "
                f"classes, {total} steps of {config.train.batch_size} images "
                f"({total / per_epoch:.1f} epochs) on {where.size} x {jax.devices()[0].device_kind}"
                + (f", continuing at step {done}" if done else ""),
                flush=True,
            )
            with (
                train_batches(config, split, done) as batches,
                run_log(config, workdir, total, done) as log,
            ):
                state = train(
                    state,
                    training.frozen,
                    batches,
                    training.step,
                    where=where,
                    schedule=settings.schedule_of(config, total),
                    checkpoints=checkpoints,
                    log=log,
                    evaluate=evaluation,
                    stop=stop,
                )
        if stop.signal is None:
            evaluation(total, state)
            return 0
        print(
            f"{stop.signal.name}: saved step {int(state.step)} of {total}; run the same command to "
            f"go on.",
            flush=True,
        )
        return 128 + stop.signal


def devices_of(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the devices to run on; ValueError where they cannot divide a batch."""
    mesh.initialize_distributed()
    where = mesh.make_mesh(config.run.devices)
    mesh.check_divisible(config.train.batch_size, where.size, "train.batch_size")
    mesh.check_divisible(config.eval.batch_size, where.size, "eval.batch_size")
    return where


def set_up(config: ConfigDict, workdir: Path, where: jax.sharding.Mesh, total: int) -> Training:
    """Encoder, optimizer and step of a training of `total` steps."""
    root = jax.random.key(config.seed)
    architecture = settings.architecture_of(config)
    frozen, encoder = obtain_encoder(
        workdir / "encoder", config.encoder.weights, architecture, purpose_key(root, "encoder", 0)
    )
    optimizer = settings.optimizer_of(config, total)
    graphdef, *_ = architecture.abstract()
    step = make_train_step(
        graphdef,
        optimizer,
        settings.loss_settings(config),
        Recipe(**config.augment.to_dict()),
        noise_probability=config.model.noise_probability,
        root=root,
    )
    return Training(
        graphdef,
        jax.device_put(frozen, mesh.replicated(where)),
        encoder,
        functools.partial(init_state, architecture, optimizer),
        purpose_key(root, "weights", 0),
        step,
    )


def run_log(config: ConfigDict, workdir: Path, total: int, done: int) -> RunLog:
    """The log of a training that begins at step `done`."""
    return RunLog(
        workdir / "log",
        total_steps=total,
        start_step=done,
        images_per_step=config.train.batch_size,
        tensorboard=config.run.tensorboard,
        progress=config.run.progress,
    )


def evaluate_job(config: ConfigDict, workdir: Path) -> int:
    """Evaluates a checkpoint of `workdir`."""
    start = time.perf_counter()
    mesh.initialize_distributed()
    split = read_split(config)
    scorer = scorer_of(workdir, config.to_dict(), step=config.eval.step, devices=config.run.devices)
    mesh.check_divisible(config.eval.batch_size, scorer.mesh.size, "eval.batch_size")
    check_writable(workdir)
    evaluate_and_print(config, workdir, scorer, split, time.perf_counter() - start)
    return 0


def predict_job(config: ConfigDict, workdir: Path) -> int:
    """Scores `config.predict.input`, and writes a CSV file and overlays."""
    if not config.predict.input:
        raise ValueError(
            "--job predict needs an image or a folder of them, e.g. --config.predict.input=photos."
        )
    output = Path(config.predict.output or workdir / "predictions")
    check_writable(output)
    scorer = scorer_of(
        workdir, config.to_dict(), step=config.predict.step, devices=config.run.devices
    )
    table = predict_files(
        Detector(scorer),
        Path(config.predict.input),
        output,
        batch_size=config.predict.batch_size,
    )
    print(f"{table}: scores; {table.parent / 'overlays'}: pictures")
    return 0


def prepare_job(config: ConfigDict, workdir: Path) -> int:
    """Generates the benchmark where the config asks for one, and says what the data holds."""
    split = read_split(config)
    rows = []
    for label, name in enumerate(split.class_names):
        test = [record for record in split.test if record.label == label]
        rows.append(
            f"{name}: {sum(record.label == label for record in split.train)} to train on, "
            f"{sum(not record.anomalous for record in test)} normal and "
            f"{sum(record.anomalous for record in test)} anomalous to test on"
        )
    print("\n".join([f"{config.data.root}: {len(rows)} classes", *rows]))
    return 0


def baseline_job(config: ConfigDict, workdir: Path) -> int:
    """Prints what trivial detectors reach on the data: a floor for every real one."""
    split = read_split(config)
    results = baseline.pixel_statistics_baseline(
        split.train,
        split.test,
        image_size=config.data.image_size,
        sigma=config.eval.smoothing_sigma,
    )
    print(baseline.markdown_table(results))
    return 0


def read_split(config: ConfigDict) -> layouts.Split:
    """The records of the config's data, generated first where they are to be."""
    root = Path(config.data.root)
    if config.data.layout == "synthetic":
        with tqdm(desc="generating images", unit="image", disable=not config.run.progress) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            synthetic.write_benchmark(root, **config.synthetic.to_dict(), progress=progress)
    split = layouts.read_mvtec(root, dataset=config.data.name, classes=config.data.classes)
    check_records(split.train, split.test)
    return split


def settle_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json, or compares with the one that is there.

    Raises ValueError where they differ in what is computed; says what else differs.
    """
    path = workdir / "config.json"
    if path.exists():
        what, how = configs.differences(configs.from_json(path.read_text()), config)
        if what:
            lines = "\n  ".join(what)
            raise ValueError(
                f"{workdir} was started with other settings:\n  {lines}\n"
                f"Use the settings of {path}, or another folder, e.g. --workdir={workdir}-2."
            )
        if how:
            print("continuing with other settings of how to run: " + "; ".join(how))
    partial = path.with_suffix(".partial")
    partial.write_text(configs.to_json(config))
    os.replace(partial, path)


def first_or_saved(
    training: Training, checkpoints: Checkpoints, where: jax.sharding.Mesh
) -> TrainState:
    """The newest saved state, or the one before the first step, on all devices of the mesh."""
    replicated = mesh.replicated(where)
    if checkpoints.latest is None:
        return jax.jit(training.init, out_shardings=replicated)(training.key)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(training.init, training.key),
    )
    return checkpoints.restore(-1, abstract)


def train_batches(config: ConfigDict, split: layouts.Split, start: int) -> Any:
    """The batches from number `start` on."""
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
    )


def evaluate_and_print(
    config: ConfigDict, workdir: Path, scorer: Scorer, split: layouts.Split, seconds: float
) -> None:
    """Evaluates a scorer on the test images, and prints the table and where the rest is."""
    folder = workdir / "evaluation" / str(scorer.step)
    dataset = split.train[0].dataset
    with pipeline.evaluation_batches(
        split.test,
        image_size=config.data.image_size,
        batch_size=config.eval.batch_size,
        threads=config.run.threads,
        workers=config.run.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ) as batches:
        results = evaluate(
            scorer,
            split.test,
            batches,
            [f"{dataset}/{name}" for name in split.class_names],
            conventions=Conventions(
                image_label=config.eval.image_label,
                aupro_fpr_limit=config.eval.aupro_fpr_limit,
                figures_per_class=config.eval.figures_per_class,
            ),
            folder=folder,
            dataset=dataset,
            provenance={
                **provenance(config.to_dict()),
                "seconds_before_evaluation": round(seconds, 3),
            },
        )
    print(
        f"\nstep {scorer.step}\n\n{report.markdown_table(results)}\n\n{folder}/report.html: figures"
    )
