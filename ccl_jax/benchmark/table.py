"""What was measured, as rows of a table and as JSON."""

import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ccl_jax.atomic import write_atomically
from ccl_jax.benchmark.memory import Memory
from ccl_jax.benchmark.timing import Times
from ccl_jax.benchmark.training import Training
from ccl_jax.provenance import commit, version

PACKAGES = ("jax", "jaxlib", "flax", "optax")


class Row(NamedTuple):
    """One measured thing, in words."""

    what: str
    value: str
    how: str


def training_rows(
    training: Training, images: int, *, devices: int, peak: float | None, kind: str
) -> list[Row]:
    """The rows of a training step of so many images over all devices.

    `peak` is what one device, of this kind, can do at most, in FLOP/s.
    """
    times = training.times
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    mean = times.total / len(times.seconds)
    done = training.flops / devices / mean
    repeats = f"{len(times.seconds)} steps"
    if peak is None:
        how = f"no peak is known of {kind}; config.run.peak_tflops may say it"
        mfu = Row("MFU", "unknown peak", how)
    else:
        mfu = Row("MFU", f"{done / peak:.1%}", f"of {peak / 1e12:.0f} TFLOP/s of a device")
    return [
        Row(
            "compile time of the step",
            f"{training.compile_seconds:.1f} s",
            "traced, lowered and compiled; "
            + (f"the persistent cache {cache} may have had it" if cache else "no persistent cache"),
        ),
        Row("training", f"{images / mean:.4g} images/s", f"mean of {repeats}"),
        Row("step, median", in_words(times.median), repeats),
        Row("step, 95th percentile", in_words(times.p95), repeats),
        Row(
            "FLOPs of a step",
            f"{training.flops / 1e12:.4g} TFLOP",
            f"products and convolutions; {done / 1e12:.4g} TFLOP/s on each device",
        ),
        mfu,
        memory_row(training.memory),
    ]


def memory_row(memory: Memory | None) -> Row:
    """The row of the peak memory of a device."""
    if memory is None:
        return Row("device memory at the peak", "unknown", "neither reported nor planned")
    return Row("device memory at the peak", f"{memory.bytes / 2**30:.3g} GiB", memory.source)


def scoring_row(times: Times, images: int) -> Row:
    """The row of scoring so many images at once."""
    return Row(
        "inference with score maps",
        f"{images / times.median:.4g} images/s",
        f"batches of {images}, median of {len(times.seconds)}, {in_words(times.median)} each",
    )


def part_rows(parts: dict[str, Times], within: str, step: Times) -> list[Row]:
    """The rows of the parts of a step, and of what they leave; `within` is in another part."""
    rows = [
        Row(
            f"part: {name}",
            in_words(times.median),
            f"{times.median / step.median:.1%} of the median step, median of {len(times.seconds)}",
        )
        for name, times in parts.items()
    ]
    known = sum(times.median for name, times in parts.items() if name != within)
    left = step.median - known
    rows.append(
        Row(
            "median step less its parts",
            ("-" if left < 0 else "") + in_words(abs(left)),
            "noise and what else is not a part"
            + (f"; {within} counts within the losses" if within in parts else ""),
        )
    )
    return rows


def in_words(seconds: float) -> str:
    """A time in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} µs"


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | measured | how |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def training_numbers(training: Training) -> dict[str, Any]:
    """What was measured of the training as plain numbers: seconds, FLOPs, bytes."""
    memory = training.memory
    return {
        "compile_seconds": training.compile_seconds,
        "step_seconds": list(training.times.seconds),
        "step_flops": training.flops,
        "memory_bytes": None if memory is None else memory.bytes,
        "memory_source": None if memory is None else memory.source,
    }


def seconds_of(parts: dict[str, Times]) -> dict[str, list[float]]:
    """The seconds of every repeat of each part."""
    return {name: list(times.seconds) for name, times in parts.items()}


def circumstances(module: str, words: Sequence[str]) -> dict[str, Any]:
    """Command (python -m `module` with these arguments), versions, commit, date and devices."""
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
    }


def heading(found: dict[str, Any]) -> str:
    """The circumstances as Markdown, to stand above a table."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    at = f", commit {found['commit'][:12]}" if found["commit"] else ""
    return f"`{found['command']}`\n\n{found['date']}, {versions}{at}.\n"


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Writes what was measured; raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found, indent=2) + "\n")
