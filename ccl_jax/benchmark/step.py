"""The published training step, timed on the devices at hand, without data and without a config.

    python -m ccl_jax.benchmark.step [--batch 16] [--dtype bfloat16] [--encoder wide_resnet50_2]
        [--image-size 256] [--steps 20] [--warm-up 3] [--no-parts] [--json FILE] [--profile FOLDER]

Prints a Markdown table: compile time, images/s, step times, MFU, memory, the parts of the step; and
with --profile the ten longest kernels. Imports neither grain, ml-collections, tensorflow-datasets
nor array-record. The encoder's weights are random numbers, which take as long as others.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from ccl_jax import mesh
from ccl_jax.benchmark import profile, published, table
from ccl_jax.benchmark.parts import SEARCH, Parts
from ccl_jax.benchmark.scoring import time_scoring
from ccl_jax.benchmark.timing import Times
from ccl_jax.benchmark.training import (
    Batch,
    Steps,
    Training,
    first_state,
    random_batches,
    time_training,
)
from ccl_jax.models.resnet import ARCHITECTURES
from ccl_jax.scoring import Scorer
from ccl_jax.state import Architecture, Frozen, TrainState, join, purpose_key
from ccl_jax.throughput import device_peak
from ccl_jax.train import make_train_step

PROFILED = 3  # steps


class Published:
    """The published recipe of one architecture, on all devices at hand, with random inputs."""

    def __init__(self, architecture: Architecture, batch_size: int, image_size: int) -> None:
        self.where = mesh.make_mesh()
        mesh.check_divisible(batch_size, self.where.size, "train.batch_size")
        self.architecture, self.batch_size, self.image_size = architecture, batch_size, image_size
        self.root, self.optimizer = jax.random.key(published.SEED), published.optimizer()
        self.losses = published.losses(architecture.compute_dtype)
        self.graphdef, *_ = architecture.abstract()
        encoder = jax.jit(architecture.random_encoder)(purpose_key(self.root, "encoder", 0))
        self.frozen = mesh.put_replicated(Frozen(*encoder), self.where)
        self.ahead = self.where.devices.flat[0].platform != "cpu"

    def batches(self) -> list[Batch]:
        """Batches of random images and labels."""
        size, classes = self.image_size, published.CLASSES
        return random_batches(
            self.batch_size, size, classes=classes, where=self.where, seed=published.SEED
        )

    def training(self, batches: Sequence[Batch], *, warm_up: int, repeats: int) -> Training:
        """The times of the training step."""
        step = make_train_step(
            self.graphdef,
            self.optimizer,
            self.losses,
            published.RECIPE,
            noise_probability=published.NOISE_PROBABILITY,
            root=self.root,
            where=self.where,
        )
        key = purpose_key(self.root, "weights", 0)
        state = first_state(self.architecture, self.optimizer, key, self.where)
        return time_training(
            step, state, self.frozen, batches, where=self.where, warm_up=warm_up, repeats=repeats
        )

    def parts(self, state: TrainState) -> Parts:
        """The parts of the step."""
        return Parts(
            self.graphdef,
            state,
            self.frozen,
            losses=self.losses,
            recipe=published.RECIPE,
            optimizer=self.optimizer,
            root=self.root,
            where=self.where,
        )

    def scorer(self, state: TrainState) -> Scorer:
        """What gives images score maps."""
        variables = join(self.frozen, state.params, state.batch_stats)
        maps = published.maps(self.image_size)
        return Scorer(self.graphdef, *variables, maps, self.where, int(state.step), {})


def main(words: Sequence[str]) -> int:
    """Measures, prints and writes; returns the exit status."""
    given = arguments(words)
    architecture = Architecture("rd", given.encoder, published.PROJECTOR, given.dtype)
    found = table.circumstances("ccl_jax.benchmark.step", words)
    how = {"warm_up": given.warm_up, "repeats": given.steps}
    try:
        recipe = Published(architecture, given.batch, given.image_size)
        batches = recipe.batches()
        say(f"compiling the training step, then timing {given.steps} of them")
        training = recipe.training(batches, **how)
        rows = table.training_rows(
            training,
            given.batch,
            devices=recipe.where.size,
            peak=device_peak(recipe.where, given.dtype, 0.0),
            kind=found["device"],
        )
        kernels, state = [], training.state
        if given.profile is not None:
            run = Steps(training.step, state, recipe.frozen, batches, recipe.where)
            say("recording a profile")
            kernels = profile.record(given.profile, run, repeats=PROFILED)
            state = run.state
        images = [batch["image"] for batch in batches]
        say("timing the scoring")
        scoring = time_scoring(recipe.scorer(state), images, ahead=recipe.ahead, **how)
        rows.append(table.scoring_row(scoring, given.batch))
        parts: dict[str, Times] = {}
        if not given.no_parts:
            say("timing the parts of the step, each compiled alone (--no-parts leaves them out)")
            parts = recipe.parts(state).time(batches, ahead=recipe.ahead, **how)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if parts:
        rows += table.part_rows(parts, SEARCH, training.times)
    print(f"{table.heading(found)}\n{table.markdown_table(rows)}", flush=True)
    if kernels:
        print(f"\n{profile.markdown_table(kernels, repeats=PROFILED)}", flush=True)
    if given.json is not None:
        found |= {"rows": [row._asdict() for row in rows], **table.training_numbers(training)}
        found["part_seconds"] = table.seconds_of(parts)
        found["scoring_seconds"] = list(scoring.seconds)
        found["kernels"] = [kernel._asdict() for kernel in kernels[: profile.LONGEST]]
        table.write_json(given.json, found)
    return 0


def say(what: str) -> None:
    """Says on stderr what comes next; stdout is for the tables."""
    print(what, file=sys.stderr, flush=True)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line, checked; ends the process where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m ccl_jax.benchmark.step", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--batch", type=_at_least(1), default=16, help="images a step, all devices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--encoder", choices=tuple(ARCHITECTURES), default="wide_resnet50_2")
    parser.add_argument("--image-size", type=_image_size, default=256, help="pixels")
    parser.add_argument("--steps", type=_at_least(1), default=20, help="that are timed")
    parser.add_argument("--warm-up", type=_at_least(1), default=3, help="steps before them")
    parser.add_argument("--no-parts", action="store_true", help="leave the parts of the step out")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--profile", type=Path, help="folder for a trace of three steps")
    return parser.parse_args(words)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return number


def _image_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 64 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 32 from 64 on, such as 256")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
