"""Trains and uses one anomaly detector for many classes: one command line, one job.

    python -m ccl_jax.main --config configs/demo.py --workdir runs/demo [--job JOB]
        [--config.section.key=value ...]

Jobs: train (the default) trains, checkpoints and evaluates, or goes on where it stopped; evaluate
scores the test images of a trained workdir, or with --config.eval.follow=true those of every
checkpoint of a running training; predict scores your images
(--config.predict.input=FILE_OR_FOLDER); import makes a workdir of a checkpoint of the authors' code
(--config.published.checkpoint=FILE), export writes one; prepare generates or counts the data, with
--config.data.check=full opens all of it and says what is wrong, and with
--config.data.source=prepared writes it as shards; baseline prints what trivial detectors reach;
benchmark times training, its parts, scoring, metrics and input on the devices at hand; pretrain
learns an encoder from procedural images (configs/pretrain.py). evaluate, predict, benchmark and
export need no --config: the workdir knows its own. configs/default.py lists every setting with its
unit.

Exit status:
    0    done; of a training: all steps, and their evaluation
    1    an error, also one of another process of the run (all name it); predict: some files could
         not be read; prepare: data would spoil a training
    2    wrong arguments
    70   nothing went on for config.run.stall_seconds, another process of the run is lost, or the
         connection to it: worth another start
    130  stopped by Ctrl-C (SIGINT), 143 by SIGTERM, 138 by SIGUSR1: 128 + the signal's number, or
         config.run.unfinished_exit_code; the same command goes on
    134  JAX ended this process, because another one of the run is lost
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ccl_jax import benchmark_job, data_jobs, exchange, follow, jobs, mesh, notices
from ccl_jax import config as configs
from ccl_jax.signals import StopRequest
from ccl_jax.validation import validate

JOBS: dict[str, Callable[[configs.ConfigDict, Path], int]] = {
    "train": jobs.train_job,
    "evaluate": jobs.evaluate_job,
    "predict": jobs.predict_job,
    "import": exchange.import_job,
    "export": exchange.export_job,
    "prepare": data_jobs.prepare_job,
    "baseline": jobs.baseline_job,
    "benchmark": benchmark_job.benchmark_job,
    "pretrain": jobs.pretrain_job,
}
# Of the others, import then takes the published recipe, and the rest WORKDIR/config.json.
NEEDS_CONFIG = ("train", "prepare", "pretrain")
NEEDS_WORKDIR = ("train", "evaluate", "predict", "import", "export", "benchmark", "pretrain")
NEEDS_NO_DATA = ("predict", "import", "export", "benchmark", "pretrain")
PACKAGE = os.path.dirname(os.path.abspath(__file__))
PUBLISHED_RECIPE = Path(PACKAGE).parent / "configs" / "default.py"  # absent without the sources


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, program name first, and returns its exit status."""
    words = list(sys.argv if argv is None else argv)
    if any(word in ("--help", "-help", "-h", "--helpfull") for word in words[1:]):
        print(__doc__)
        return 0
    try:
        if status := await_training(words):
            return status
        config, workdir, job = parse(words)
    except (flags.Error, ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        print(f"error: {unknown_setting(words) or error}", file=sys.stderr)
        return 2
    try:
        validate(config, needs_data=job not in NEEDS_NO_DATA)
        return JOBS[job](config, workdir)
    except KeyboardInterrupt:
        print(
            "interrupted; what was saved is safe, run the same command to go on.", file=sys.stderr
        )
        if not mesh.is_alone():  # a second Ctrl-C, or one that only this process has got
            leave_at_once(130)
        return 130
    except Exception as error:
        print(explain(error), file=sys.stderr)
        return 1


def await_training(words: Sequence[str]) -> int:
    """Waits for the config of a training that is to be followed; returns 0 once it is there.

    Without --config a follower needs WORKDIR/config.json even for how long to wait for it; that
    is without end, unless the command line says otherwise. Other jobs return 0 at once.
    """
    asked = argument(words, "config.eval.follow")
    workdir = argument(words, "workdir")
    follows = argument(words, "job") == "evaluate" and asked not in (None, "false", "False")
    if not follows or workdir is None or without_config(words)[0] is not None:
        return 0
    patience = float(argument(words, "config.eval.follow_patience") or 0.0)
    code = int(argument(words, "config.run.unfinished_exit_code") or 0)
    with StopRequest() as stop:
        status = follow.wait_for_file(Path(workdir) / "config.json", patience=patience, stop=stop)
        return status if stop.signal is None else notices.status_after(stop.signal, code)


def parse(words: Sequence[str]) -> tuple[configs.ConfigDict, Path, str]:
    """Returns (locked config with its overrides, workdir, job) of a command line.

    Raises ValueError or absl's flags.Error where it makes no sense.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_enum("job", "train", list(JOBS), "What to do.", flag_values=values)
    path, rest = without_config(words)
    config = read_config(path, rest)
    # The overrides are read from sys_argv, everything else from what is parsed.
    config_flags.DEFINE_config_dict(
        "config", config, "Settings.", flag_values=values, sys_argv=list(rest)
    )
    unparsed = values(list(rest))
    if len(unparsed) > 1:
        raise ValueError(f"cannot make sense of {' '.join(unparsed[1:])}; flags start with --.")
    if values.workdir is None and values.job in NEEDS_WORKDIR:
        raise ValueError(f"--job {values.job} needs a folder, e.g. --workdir runs/demo.")
    return values.config, Path(values.workdir or "."), values.job


def without_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns (the value of --config or None, the other arguments)."""
    path, rest = None, []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word in ("--config", "-config"):
            path = queue.pop(0) if queue else ""
        elif word.startswith(("--config=", "-config=")):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    return path, rest


def argument(words: Sequence[str], name: str) -> str | None:
    """The value of --name among the arguments, or None; the last one counts."""
    value = None
    for i, word in enumerate(words):
        head, equals, tail = word.partition("=")
        if head in (f"--{name}", f"-{name}"):
            value = tail if equals else "".join(words[i + 1 : i + 2])
    return value


def read_config(path: str | None, words: Sequence[str]) -> configs.ConfigDict:
    """The config of a file, "FILE" or "FILE:METHOD", or that of the workdir among the arguments.

    Raises ValueError where there is neither, or where the job needs a file.
    """
    if path is not None:
        file, _, method = path.partition(":")
        return configs.read_config_file(file, method or None)
    job, workdir = argument(words, "job") or "train", argument(words, "workdir")
    if job == "import" and PUBLISHED_RECIPE.exists():
        return configs.read_config_file(PUBLISHED_RECIPE)
    if job in (*NEEDS_CONFIG, "import"):
        example = "pretrain" if job == "pretrain" else "demo"
        raise ValueError(f"--job {job} needs a config, e.g. --config configs/{example}.py.")
    if workdir is None:
        raise ValueError(f"--job {job} needs a trained folder, e.g. --workdir runs/demo.")
    config = configs.read_json(Path(workdir) / "config.json")
    if "run" in config and "cluster" in config.run:
        config.run.cluster = "auto"  # how the training's processes met says nothing about this job
    return config


def unknown_setting(words: Sequence[str]) -> str | None:
    """The message for an override of a setting that does not exist, or None if all exist."""
    path, rest = without_config(words)
    try:
        config = read_config(path, rest)
    except (ValueError, OSError, AttributeError):
        return None
    known = [f"config.{key}" for key, _ in configs.flatten(config)]
    for word in rest:
        key = word.lstrip("-").partition("=")[0]
        if key.startswith("config.") and key not in known:
            return f"--{key}: there is no such setting.{configs.did_you_mean(key, known)}"
    return None


def explain(error: Exception) -> str:
    """One clear message for an error that this package raised, else the traceback.

    What a user can cause is raised by our own code with a message that names cause and fix; an
    error from elsewhere is a bug, and its traceback is worth more.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and os.path.abspath(frames[-1].filename).startswith(PACKAGE)
    if isinstance(error, ValueError | OSError | FloatingPointError | RuntimeError) and ours:
        return f"error: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def leave(status: int) -> None:
    """Ends this process; after an error in one of several, without waiting for the others.

    They wait for this one, and at a usual end it would wait for them. On statuses above 2 that
    come here all processes agree: each was asked to stop, or has heard of it before any ends.
    """
    if status in (1, 2) and not mesh.is_alone():
        leave_at_once(status)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def leave_at_once(status: int) -> None:
    """Ends this process whatever the others do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
