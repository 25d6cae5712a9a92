"""The jobs behind the door: each takes a validated config apart and calls the plain functions."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from ccl_jax import follow, mesh, notices, report, settings, settle, setup
from ccl_jax.ahead import Ahead
from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts, pipeline
from ccl_jax.data.pictures import DecodedCache
from ccl_jax.datasets import read_split
from ccl_jax.evaluate import Conventions, evaluate
from ccl_jax.loop import check_together
from ccl_jax.predict import Detector, predict_files, scorer_of
from ccl_jax.pretraining.episodes import Episodes
from ccl_jax.pretraining.learn import Plan, Recipe
from ccl_jax.pretraining.run import WEIGHTS, Look, check_recipe, pretrain
from ccl_jax.progress import over_images
from ccl_jax.provenance import provenance
from ccl_jax.scoring import Scorer, Scorers, architecture_of, map_settings_of
from ccl_jax.signals import Stopped, StopRequest
from ccl_jax.state import TrainState
from ccl_jax.train import train
from ccl_jax.workdir import check_writable, lock_workdir, only_run


def train_job(config: ConfigDict, workdir: Path) -> int:
    """Trains, or goes on training, in `workdir`; evaluates on the way and at the end.

    Returns 0 once that is complete; where it was asked to stop, `run.unfinished_exit_code`.
    """
    where = setup.devices_of(config, "train.batch_size", "eval.batch_size")
    try:
        with StopRequest(config.run.stop_signals) as stop:
            # Of several processes one that ends here would leave the others waiting for it.
            with stop.at_once() if mesh.is_alone() else contextlib.nullcontext():
                split = read_split(config)
            check_together(stop, "nothing was begun")
            train_in(config, workdir, where, split, stop)
    except Stopped as stopped:
        return notices.unfinished(config, stopped)
    return 0


def train_in(
    config: ConfigDict,
    workdir: Path,
    where: jax.sharding.Mesh,
    split: layouts.Split,
    stop: StopRequest,
) -> None:
    """Trains and evaluates until all is done; raises `Stopped` where a signal ended it before."""
    start = time.perf_counter()
    total, _ = settings.total_steps(config, len(split.train))
    with (
        only_run(workdir) as run,
        setup.watch(config, workdir, run) as watch,
        setup.checkpoints_of(config, workdir) as checkpoints,
    ):
        fresh = checkpoints.latest is None  # asked in all before the first process writes
        config = setup.with_negatives(config, workdir, where.size, fresh=fresh)
        if mesh.is_first():
            settle.settle_workdir(config, workdir, split, fresh=fresh)
        training = setup.set_up(config, workdir, where, total, fresh=fresh)
        state = setup.first_or_saved(training, checkpoints, where)
        done = int(state.step)
        notices.begin(config, workdir, split, where, done=done, total=total)
        cache = setup.decoded_cache(config, split)

        def evaluation(number: int, state: TrainState) -> dict[str, float]:
            scorer = training.scorer(number, state, map_settings_of(config.to_dict()), where)
            seconds = time.perf_counter() - start
            again = cache if config.eval.every_steps else None  # kept images pay when reread
            saved = f"saved step {number} of {total}, whose evaluation is missing"
            over = watch.over(functools.partial(check_together, stop, saved))
            with watch.during("evaluating", number):
                return evaluate_and_print(config, workdir, scorer, split, seconds, again, over)

        schedule = settings.schedule_of(config, total)
        with setup.run_log(config, workdir, where, total, done) as log:
            try:
                with (
                    setup.train_batches(config, workdir, split, done, cache, log) as batches,
                    Ahead(batches, where) as sent,
                ):
                    state = train(
                        state,
                        training.frozen,
                        sent,
                        training.step,
                        where=where,
                        schedule=schedule,
                        checkpoints=checkpoints,
                        log=log,
                        evaluate=evaluation,
                        stop=stop,
                        watch=watch,
                        missing_evaluation=setup.lacks_evaluation(workdir, schedule, done),
                    )
            finally:
                print_skipped(workdir)
            with watch.during("saving", total):
                checkpoints.wait()
            mesh.barrier("the training has ended")
            if (last := int(state.step)) < total:
                stop.check(f"saved step {last} of {total}")
            notices.mark_complete(workdir, total, log)
            log.finish()
            log.write(total, evaluation(total, state))


def evaluate_job(config: ConfigDict, workdir: Path) -> int:
    """Evaluates a checkpoint of `workdir`, or follows the training there."""
    if config.eval.follow:
        return follow_job(config, workdir)
    start = time.perf_counter()
    setup.devices_of(config, "eval.batch_size", shards=1)
    settle.check_same_model(config, workdir)
    check_writable(workdir, "--workdir")
    run = mesh.from_first(time.time_ns())
    with setup.watch(config, workdir / "evaluation", run) as watch:
        split = read_split(config)
        scorer = scorer_of(
            workdir, config.to_dict(), step=config.eval.step, devices=config.run.devices
        )
        with watch.during("evaluating", scorer.step):
            over = watch.over(lambda: None)
            seconds = time.perf_counter() - start
            evaluate_and_print(config, workdir, scorer, split, seconds, over=over)
    return 0


def follow_job(config: ConfigDict, workdir: Path) -> int:
    """Evaluates every checkpoint of the training in `workdir` as it comes; see `follow`."""
    start = time.perf_counter()
    setup.devices_of(config, "eval.batch_size", shards=1)
    check_writable(workdir, "--workdir")
    maps = map_settings_of(config.to_dict())
    run = mesh.from_first(time.time_ns())
    watch = setup.watch(config, workdir / follow.LOG, run)  # the training has files of its own

    def opened() -> follow.Evaluator:  # the training has prepared its data by then
        settle.check_same_model(config, workdir)
        split = read_split(config)
        cache = DecodedCache(int(config.data.cache_gib * 2**30))
        architecture = architecture_of(config.to_dict())
        scorers = Scorers(
            workdir, architecture=architecture, settings=maps, devices=config.run.devices
        )

        def evaluated(scorer: Scorer) -> None:
            seconds = time.perf_counter() - start
            left = f"stopped while it evaluated step {scorer.step}, which has no results yet"
            over = watch.over(functools.partial(check_together, stop, left))
            evaluate_and_print(config, workdir, scorer, split, seconds, cache, over)

        return follow.Evaluator(scorers.at, evaluated)

    try:
        with StopRequest(config.run.stop_signals) as stop:
            return follow.follow(
                workdir,
                opened,
                conventions=dataclasses.asdict(conventions_of(config)) | dataclasses.asdict(maps),
                poll_seconds=config.eval.poll_seconds,
                patience=config.eval.follow_patience,
                stop=stop,
                watch=watch,
                tensorboard=config.run.tensorboard,
            )
    except Stopped as stopped:
        return notices.unfinished(config, stopped)


def predict_job(config: ConfigDict, workdir: Path) -> int:
    """Scores `config.predict.input`; returns 1 where some of the files could not be read."""
    if not config.predict.input:
        raise ValueError(
            "--job predict needs an image or a folder of them, e.g. --config.predict.input=photos."
        )
    output = Path(config.predict.output or workdir / "predictions")
    setup.devices_of(config, shards=1)
    setup.one_process("predict")
    settle.check_same_model(config, workdir)
    check_writable(output, "--config.predict.output")
    scorer = scorer_of(
        workdir, config.to_dict(), step=config.predict.step, devices=config.run.devices
    )
    print(f"scoring {config.predict.input} with step {scorer.step} of {workdir}", flush=True)
    table, unreadable = predict_files(
        Detector(scorer),
        Path(config.predict.input),
        output,
        batch_size=config.predict.batch_size,
    )
    print(f"{table}: scores; {output / 'overlays'}: pictures, all on one colour scale")
    if unreadable:
        print(f"{unreadable} files could not be read; see the column error of {table}.")
    return 1 if unreadable else 0


def baseline_job(config: ConfigDict, workdir: Path) -> int:
    """Prints what trivial detectors reach on the data: a floor for every real one."""
    from ccl_jax import baseline  # here: scipy and scikit-learn

    split = read_split(config)
    results = baseline.pixel_statistics_baseline(
        split.train,
        split.test,
        image_size=config.data.image_size,
        sigma=config.eval.smoothing_sigma,
    )
    print(baseline.markdown_table(results))
    return 0


def pretrain_job(config: ConfigDict, workdir: Path) -> int:
    """Learns an encoder from procedural images, phase after phase, or goes on."""
    where = setup.devices_of(config, shards=1)
    setup.one_process("pretrain")
    look = Look(tensorboard=config.run.tensorboard, progress=config.run.progress)
    phases: list[tuple[str, Recipe | Episodes, Plan]] = [
        ("classes", *settings.pretraining_of(config))
    ]
    if config.pretrain.episodes.steps:
        phases.append(("episodes", *settings.episodes_of(config)))
    for name, recipe, _ in phases:
        check_recipe(recipe, where.size, name)
    begin = None
    with lock_workdir(workdir), StopRequest(config.run.stop_signals) as stop:
        for name, recipe, plan in phases:
            folder = workdir / name
            print(f"{name}: {plan.steps} steps of {recipe.batch_size} images", flush=True)
            written = pretrain(folder, recipe, plan, begin=begin, where=where, look=look, stop=stop)
            if written is None and stop.signal is not None:
                return notices.unfinished(config, Stopped(stop.signal, "saved"))
            begin = folder / WEIGHTS
    print(f"{begin}: sha256 {written}, for config.encoder.weights")
    return 0


def print_skipped(workdir: Path) -> None:
    """Names the training images that others stood in for, if there were any."""
    reasons = settle.skipped_in(workdir)
    if reasons:
        lines = "\n  ".join(reasons)
        mesh.say(
            f"{len(reasons)} training images could not be read, and others of their classes stood "
            f"in for them (config.data.bad_files=skip):\n  {lines}"
        )


def evaluate_and_print(
    config: ConfigDict,
    workdir: Path,
    scorer: Scorer,
    split: layouts.Split,
    seconds: float,
    cache: DecodedCache | None = None,
    over: Callable[[Iterable[dict[str, np.ndarray]]], Iterable[dict[str, np.ndarray]]] = iter,
) -> dict[str, float]:
    """Evaluates a scorer on the test images, and prints the table and where the rest is.

    Returns the mean metrics as they are logged. `cache` keeps the test images for the next
    evaluation; `over` goes over the batches, and may raise between two of them.
    """
    folder = workdir / "evaluation" / str(scorer.step)
    shown = config.run.progress and mesh.is_first()
    with pipeline.evaluation_batches(
        split.test,
        image_size=config.data.image_size,
        batch_size=config.eval.batch_size,
        threads=config.run.threads,
        workers=config.run.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        cache=cache,
    ) as batches:
        results = evaluate(
            scorer,
            split.test,
            over_images(over(batches), len(split.test), config.eval.batch_size, shown=shown),
            split.class_names,
            conventions=conventions_of(config),
            folder=folder,
            dataset=config.data.name or " + ".join(sorted({r.dataset for r in split.test})),
            provenance={
                **provenance(config.to_dict()),
                "seconds_before_evaluation": round(seconds, 3),
                "skipped_training_images": settle.skipped_in(workdir),
            },
        )
    lines = [f"step {scorer.step}\n\n{report.markdown_table(results)}\n"]
    if config.eval.published_metrics:
        names = " and ".join(config.eval.published_metrics)
        lines.append(f"{folder}/results.md: also {names}")
    pictures = " and figures" if config.eval.figures_per_class else ""
    lines.append(f"{folder}/report.html: table{pictures}, to open in a browser")
    mesh.say("\n" + "\n".join(lines))
    mean = results["mean"].items()
    return {f"evaluation/{name}": value for name, value in mean if value is not None}


def conventions_of(config: ConfigDict) -> Conventions:
    """How the config wants metrics to be made."""
    return Conventions(
        image_label=config.eval.image_label,
        aupro_fpr_limit=config.eval.aupro_fpr_limit,
        figures_per_class=config.eval.figures_per_class,
        published_metrics=config.eval.published_metrics,
    )
