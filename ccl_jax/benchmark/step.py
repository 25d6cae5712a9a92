"""The published training step, timed on the devices at hand; needs no data and no config.

    python -m ccl_jax.benchmark.step [--batch 16] [--dtype bfloat16] [--encoder wide_resnet50_2]
        [--image-size 256] [--steps 20] [--warm-up 3] [--no-parts] [--json FILE] [--profile FOLDER]

Prints a Markdown table: compile time, images/s, step times, MFU, memory, the parts of the step; and
with --profile the ten longest kernels. Imports neither grain, ml-collections, tensorflow-datasets
nor array-record. The encoder's weights are random numbers, which take as long as others.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ccl_jax import mesh
from ccl_jax.benchmark import profile, published, table
from ccl_jax.benchmark.parts import SEARCH, Parts
from ccl_jax.benchmark.training import Steps, first_state, random_batches, time_training
from ccl_jax.models.resnet import ENCODERS
from ccl_jax.state import Architecture, Frozen, purpose_key
from ccl_jax.throughput import device_peak
from ccl_jax.train import make_train_step

PROFILED = 3  # steps


class Wanted(NamedTuple):
    """What to time."""

    architecture: Architecture
    batch_size: int  # images over all devices
    image_size: int  # pixels
    repeats: int  # steps
    warm_up: int  # steps
    parts: bool


def measure(wanted: Wanted, folder: Path | None) -> tuple[list[table.Row], dict[str, Any], str]:
    """Returns (rows, plain numbers, table of the longest kernels or "")."""
    where = mesh.make_mesh()
    mesh.check_divisible(wanted.batch_size, where.size, "train.batch_size")
    root, optimizer = jax.random.key(published.SEED), published.optimizer()
    graphdef, *_ = wanted.architecture.abstract()
    losses = published.LOSSES._replace_dtype(wanted.architecture.compute_dtype)
    step = make_train_step(
        graphdef,
        optimizer,
        losses,
        published.RECIPE,
        noise_probability=published.NOISE_PROBABILITY,
        root=root,
        where=where,
    )
    encoder = jax.jit(wanted.architecture.random_encoder)(purpose_key(root, "encoder", 0))
    frozen = mesh.put_replicated(Frozen(*encoder), where)
    state = first_state(wanted.architecture, optimizer, purpose_key(root, "weights", 0), where)
    batches = random_batches(
        wanted.batch_size,
        wanted.image_size,
        classes=published.CLASSES,
        where=where,
        seed=published.SEED,
    )
    how = {"warm_up": wanted.warm_up, "repeats": wanted.repeats}
    training = time_training(step, state, frozen, batches, where=where, **how)
    first = where.devices.flat[0]
    rows = table.training_rows(
        training,
        wanted.batch_size,
        devices=where.size,
        peak=device_peak(where, wanted.architecture.compute_dtype, 0.0),
        kind=first.device_kind,
    )
    kernels = ""
    state = training.state
    if folder is not None:
        run = Steps(training.step, state, frozen, batches, where)
        longest = profile.record(folder, run, repeats=PROFILED)
        kernels, state = profile.markdown_table(longest, repeats=PROFILED), run.state
    parts = {}
    if wanted.parts:
        parts = Parts(
            graphdef,
            state,
            frozen,
            losses=losses,
            recipe=published.RECIPE,
            optimizer=optimizer,
            root=root,
            where=where,
        ).time(batches, ahead=first.platform != "cpu", **how)
        rows += table.part_rows(parts, SEARCH, training.times)
    return rows, table.as_numbers(training, parts), kernels
