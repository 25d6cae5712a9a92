"""Training and scoring speed of this package and of PyTorch: same machine, batch and work, one run.

    python -m tests.reference.speed_torch --encoder resnet18 --image-size 128 --batches 8 \
        --page docs/benchmarks.md

A training step: both views given, three losses, backward pass, clip, both optimizers. Inference:
images to score maps of their size, without smoothing. PyTorch runs the parity twin (twin_fast.py)
as published and tuned; speed_theirs.py says how. Each way is a process of its own; on CPUs they
take turns, round by round, and on GPUs, for the memory, one follows the other. The table shows
medians over the rounds. What only this package does on the device, the second view and the noise,
is in its row of the whole step; PyTorch's loader makes the view on the host (docs/loader.md).

That the work is the same, the terms of the first step show: where they differ by more than the
dtype explains, the comparison is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.reference.speed_protocol import Worker

TASKS = ("training", "inference")
PARTS = ("encoder", "projector, neck, decoder", "local loss", "best-match search", "optimizer")
WHOLE = "whole step"  # of this package alone
OURS = "this package"
FORMS = {"eager": "PyTorch as published", "tuned": "PyTorch tuned"}
DIFFERENT = 4  # batches that the steps take in turns
MEASUREMENT = 1.0  # seconds, about, of one measurement; a longer step is measured alone
TRIES = 2  # steps of each variant after its first, before the quickest is chosen
# Relative difference of the first step's terms, beyond which it is other work.
SAME = {"float32": 2e-3, "bfloat16": 0.2}


class Way(NamedTuple):
    """One of the ways to run that are compared."""

    name: str
    module: str
    options: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether it is this package's."""
        return self.name == OURS


@dataclasses.dataclass
class Row:
    """What was measured of one task in one way."""

    way: str
    task: str
    images: int  # in a batch
    variant: str = ""  # the quickest that works
    job: str = ""  # what the worker calls it; "" where none works
    steps: int = 0  # of a measurement
    first_seconds: float = math.nan  # the first step, compilation included
    terms: dict[str, float] = dataclasses.field(default_factory=dict)  # of the first step
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # other variants: why
    seconds: list[float] = dataclasses.field(default_factory=list)  # per step, by round
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> float:
        """The median time of a step; NaN where no variant works."""
        return statistics.median(self.seconds) if self.seconds else math.nan


def ways_of(options: argparse.Namespace, images: int, weights: Path) -> list[Way]:
    """All that are compared at one batch size; PyTorch comes first, it writes the weights."""
    common = {
        "encoder": options.encoder,
        "image_size": options.image_size,
        "images": images,
        "weights": str(weights),
        "different": DIFFERENT,
    }
    return [
        *(
            Way(FORMS[form], "tests.reference.speed_theirs", common | {"form": form})
            for form in options.forms
        ),
        *(
            Way(OURS, "tests.reference.speed_ours", common | {"dtype": dtype})
            for dtype in options.dtypes
        ),
    ]


def started(worker: Worker, way: Way, task: str, variants: Sequence[str]) -> Row:
    """The row of a task before its measurements, with the quickest of the variants chosen."""
    row = Row(way.name, task, way.options["images"])
    quickest = math.inf
    for variant in variants:
        if not worth_trying(variant, row):
            continue
        job = f"{variant}: {task}"
        first, *others = answers = [worker.ask(job, 1) for _ in range(1 + TRIES)]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            row.failed[variant] = errors[0]
            continue
        seconds = min(answer["seconds"] for answer in others)
        if seconds < quickest:
            quickest = seconds
            row.variant, row.job, row.steps = variant, job, steps_for(seconds)
            row.first_seconds, row.terms = first["seconds"], first.get("terms", {})
    return row


def worth_trying(variant: str, row: Row) -> bool:
    """Whether a variant may be the quickest: only the quicker dtype is compiled, for the time."""
    dtype, _, how = variant.partition(", ")
    return how != "compiled" or not row.variant or row.variant.startswith(dtype)


def steps_for(seconds: float) -> int:
    """How many steps of this length make a measurement."""
    return max(1, min(100, round(MEASUREMENT / seconds)))


def measure(worker: Worker, row: Row) -> None:
    """One measurement more, where any variant works.

    Raises RuntimeError where that fails now, though it worked before.
    """
    if not row.job:
        return
    answer = worker.ask(row.job, row.steps)
    if "error" in answer:
        raise RuntimeError(f"{row.way}, {row.task}, {row.variant}: {answer['error']}")
    row.seconds.append(answer["seconds"])
    row.cpu_seconds.append(answer["cpu_seconds"])
    wall, cpu = 1e3 * answer["seconds"], 1e3 * answer["cpu_seconds"]
    print(f"{row.way}, {row.task}, {row.variant}: {wall:.1f} ms, CPU {cpu:.1f} ms", flush=True)


class Contest(NamedTuple):
    """All ways at one batch size."""

    rows: list[Row]
    hellos: list[dict[str, Any]]  # what the workers say of machine and versions


def contest(options: argparse.Namespace, images: int, weights: Path) -> Contest:
    """Measures all ways: in turns on a CPU, one after the other on GPUs.

    Raises RuntimeError where they do not run on one kind of device.
    """
    hellos: list[dict[str, Any]] = []
    lanes: list[tuple[Worker, list[Row]]] = []
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        for way in ways_of(options, images, weights):
            worker = stack.enter_context(Worker(way.module, way.options))
            hellos.append(worker.hello)
            mine = rows_of(worker, way, parts=options.parts)
            rows += mine
            if worker.hello["platform"] == "cpu":
                lanes.append((worker, mine))
                continue
            for _ in range(options.repeats):
                for row in mine:
                    measure(worker, row)
            worker.close()
        for _ in range(options.repeats):
            for place in range(max((len(mine) for _, mine in lanes), default=0)):
                for worker, mine in lanes:
                    if place < len(mine):
                        measure(worker, mine[place])
    platforms = {hello["platform"] for hello in hellos}
    if len(platforms) > 1:
        raise RuntimeError(
            f"the frameworks see different devices ({', '.join(sorted(platforms))}); install JAX "
            "and PyTorch for the same one, or hide it: JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=."
        )
    refuse_other_work(rows)
    return Contest(rows, hellos)


def rows_of(worker: Worker, way: Way, *, parts: bool) -> list[Row]:
    """A row per task; parts run in the variant that is the quickest at training."""
    variants = worker.hello["variants"]
    rows = [started(worker, way, task, variants) for task in TASKS]
    if way.ours:
        rows.append(started(worker, way, WHOLE, variants))
    if parts and rows[0].variant:
        rows += [started(worker, way, part, [rows[0].variant]) for part in PARTS]
    return rows


def difference(row: Row, other: Row) -> float:
    """The largest relative difference of the first step's terms."""
    return max(abs(row.terms[name] / other.terms[name] - 1) for name in other.terms)


def refuse_other_work(rows: Sequence[Row]) -> None:
    """Raises RuntimeError where a first step's terms are not those of the first way."""
    for task in TASKS:
        first, *others = [row for row in rows if row.task == task and row.job]
        for row in others:
            dtype = "bfloat16" if "bfloat16" in row.variant else "float32"
            if not difference(row, first) <= SAME[dtype]:
                raise RuntimeError(
                    f"{row.way} ({row.variant}) and {first.way} do not compute the same in "
                    f"{task}: {row.terms} and {first.terms}; no comparison of their times."
                )


# --- the text ---


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per row; the ratios are of images a second, to PyTorch's two forms."""
    lines = [
        f"| task | images | way | variant | ms per step | images/s "
        f"| {' | '.join(f'times {name}' for name in FORMS.values())} | first step, s |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        rivals = [
            other for name in FORMS.values() for other in [find(rows, name, row.task, row.images)]
        ]
        ratios = [
            "-"
            if rival is None or math.isnan(rival.step / row.step)
            else f"{rival.step / row.step:.2f}"
            for rival in rivals
        ]
        lines.append(
            f"| {row.task} | {row.images} | {row.way} | {row.variant or 'none works'} "
            f"| {1e3 * row.step:.3g} | {row.images / row.step:.3g} | {' | '.join(ratios)} "
            f"| {row.first_seconds:.1f} |"
        )
    return "\n".join(lines)


def find(rows: Sequence[Row], way: str, task: str, images: int) -> Row | None:
    """The row of a way; a whole step is held against training."""
    wanted = (way, "training" if task == WHOLE else task, images)
    found = [row for row in rows if (row.way, row.task, row.images) == wanted]
    return found[0] if found else None


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence for each variant that did not work."""
    return [
        f"{row.way}, {variant}, {row.task}, {row.images} images: failed, {why}"
        for row in rows
        for variant, why in row.failed.items()
    ]


def circumstances(options: argparse.Namespace, hellos: Sequence[dict[str, Any]]) -> str:
    """What the numbers depend on: the command, versions, date, settings."""
    versions: dict[str, str] = {}
    for hello in hellos:
        versions |= hello["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = " ".join(["python -m tests.reference.speed_torch", *options.words])
    return (
        f"`{command}`\n\n"
        f"{options.encoder}, {options.image_size} pixels, {options.repeats} rounds, medians; "
        f"{named}; {datetime.date.today():%d %B %Y}."
    )


def report(options: argparse.Namespace, contests: Sequence[Contest]) -> str:
    """The body of the page's part."""
    rows = [row for each in contests for row in each.rows]
    hellos = [hello for each in contests for hello in each.hellos]
    pieces = [circumstances(options, hellos), table(rows), *failures(rows)]
    return "\n\n".join(pieces) + "\n"


def names_of(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options, and the words that they were given in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--encoder", default="resnet18", help="or another ResNet of the package")
    parser.add_argument("--image-size", type=int, default=128, help="pixels, a multiple of 32")
    parser.add_argument("--batches", default="8", help="images in a batch; several: 16,64,128")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--forms", default="eager,tuned", help="of PyTorch's")
    parser.add_argument("--dtypes", default="float32", help="of this package: float32,bfloat16")
    parser.add_argument("--parts", action="store_true", help="also each part of a step alone")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--page", type=Path, help="Markdown page whose part is replaced")
    options = parser.parse_args(words)
    options.words = list(words)
    options.forms, options.dtypes = names_of(options.forms), names_of(options.dtypes)
    unknown = [form for form in options.forms if form not in FORMS]
    if unknown:
        parser.error(f"--forms {','.join(unknown)}: use some of {','.join(FORMS)}")
    return options


def main(words: Sequence[str]) -> str:
    """The printed text, which `--page` also gets."""
    options = parsed(words)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.npz")
        contests = [contest(options, int(n), weights) for n in names_of(options.batches)]
    text = report(options, contests)
    print(text)
    hellos = contests[0].hellos
    if options.json:
        rows = [dataclasses.asdict(row) for each in contests for row in each.rows]
        found = {"command": options.words, "workers": hellos, "rows": rows}
        options.json.write_text(json.dumps(found, indent=2))
    if options.page:
        from ccl_jax.benchmark.page import replace_part  # imports jax, which the workers need alone

        title = f"Against PyTorch: {options.encoder}, {options.image_size} pixels"
        replace_part(options.page, hellos[-1]["machine"], title, text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
