"""Measures how far this package is from the original, and writes the table of docs/parity.md.

    python -m tests.reference.parity [--golden FOLDER] [--write docs/parity.md] [--only PATTERN]

Each row is a set of recorded numbers (or an independent statement of a formula): the largest
difference in float32 and in float64, with the quantity that has it. With --write the table between
the markers of that file is replaced; without, it is printed. Five minutes on two CPU cores.
"""

import argparse
import fnmatch
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference import goldens
from tests.reference.compare import (
    Differences,
    encoder_differences,
    network_differences,
    worst,
)
from tests.reference.compare_losses import loss_differences, trajectory_differences
from tests.reference.compare_scores import map_differences, metric_differences
from tests.reference.torch_augment import float_view
from tests.reference.views import PUBLISHED, any_view, ours, picture

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEADER = ("component", "compared with", "numbers", "float32", "float64", "largest difference in")
VIEW = "second view"  # compared with formulas
Row = tuple[str, ...]


def rows(only: str) -> Iterator[Row]:
    """The table, row by row; `only` is a pattern of golden names."""
    for pattern, what, kind, compute in (
        ("teacher_*resnet*", "encoder", "relative L2", encoder_differences),
        ("rd_*", "network", "relative L2", network_differences),
        ("loss_*", "losses and gradients", "relative L2", loss_differences),
        ("trajectory_rd*", "three steps: losses", "relative L2", steps("loss_")),
        ("trajectory_rd*", "first gradients, all norms", "relative L2", steps("grad")),
        ("trajectory_rd*", "weights: mean, spread, movement", "relative L2", steps("mean_")),
        ("trajectory_rd*", "single weights after each step", "relative L2", steps("samples after")),
        ("anomaly_map*", "score maps", "absolute", map_differences),
        ("metrics_*", "metrics", "absolute", metrics_of_arrays),
        ("metrics_*", "the same from streaming counts", "absolute", metrics_from_counts),
    ):
        for name in goldens.names(pattern):
            if fnmatch.fnmatch(name, only):
                yield measure(f"{what} ({kind})", name, compute)
    if fnmatch.fnmatch(VIEW, only):
        yield measure("second view (absolute)", "formulas, 24 orders x 3 shapes", view_differences)


def measure(what: str, name: str, compute: Callable[..., Differences | None]) -> Row:
    """One row."""
    start = time.perf_counter()
    single, double = compute(name, f64=False), compute(name, f64=True)
    known = single or double or {}
    key, _ = worst(known)
    cells = ["-" if found is None else f"{worst(found)[1]:.1e}" for found in (single, double)]
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return (what, name, str(len(known)), *cells, key)


def steps(kind: str) -> Callable[..., Differences]:
    """The part of a trajectory's differences whose names contain `kind`."""

    def compute(name: str, *, f64: bool) -> Differences:
        found = trajectory(name, f64)
        return {key: value for key, value in found.items() if kind in key}

    return compute


@functools.cache
def trajectory(name: str, f64: bool) -> Differences:
    """A trajectory's differences; it takes a minute."""
    return trajectory_differences(name, f64=f64)


def metrics_of_arrays(name: str, *, f64: bool) -> Differences | None:
    """The exact metrics and the published conventions, which exist in float64 only."""
    return metric_differences(name, from_counts=False) if f64 else None


def metrics_from_counts(name: str, *, f64: bool) -> Differences | None:
    """What an evaluation reports; its scores are float32."""
    return None if f64 else metric_differences(name, from_counts=True)


def view_differences(_: str, *, f64: bool) -> Differences:
    """The 99 % quantile over pixels, as a rotation may take a pixel's neighbour at its edge."""
    found = {}
    with jax.enable_x64(f64):
        for shape in ((24, 36), (33, 24), (28, 28)):
            for seed, order in enumerate(itertools.permutations(range(4))):
                image, view = picture(*shape, seed) / 255, any_view(seed, *shape, order)
                want = float_view(image, view, PUBLISHED.blur_kernel)
                got = ours(image, view, dtype=jnp.float64 if f64 else jnp.float32)
                difference = np.abs(got - want).max(-1)
                found[f"order {order} of {shape}"] = float(np.quantile(difference, 0.99))
    return found


def markdown(table: list[Row]) -> str:
    """The table as it stands in docs/parity.md."""
    lines = [HEADER, ("---", "---", "--:", "--:", "--:", "---"), *table]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def replaced(text: str, table: str) -> str:
    """A document with the part between its markers replaced; ValueError where it has none."""
    before, found, rest = text.partition(BEGIN)
    _, also_found, after = rest.partition(END)
    if not (found and also_found):
        raise ValueError(f"the document lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(words: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", metavar="FOLDER", help="instead of tests/golden")
    parser.add_argument("--write", metavar="FILE", type=Path, help="document to update")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="goldens to compare")
    arguments = parser.parse_args(words)
    if arguments.golden:
        os.environ[goldens.VARIABLE] = arguments.golden
    if arguments.write and arguments.only != "*":
        parser.error("--only makes a part of the table, and --write needs the whole one")
    try:
        known = [*goldens.names("*"), VIEW]
    except FileNotFoundError as error:
        parser.error(str(error))
    if not fnmatch.filter(known, arguments.only):
        parser.error(f"--only={arguments.only} matches none of {', '.join(known)}")
    table = markdown(list(rows(arguments.only)))
    if arguments.write is None:
        print(table)
    else:
        arguments.write.write_text(replaced(arguments.write.read_text(), table))


if __name__ == "__main__":
    main()
