"""Images a second of our loader and of PyTorch's: same files, same cores, one run.

    python -m tests.reference.loader_speed DATA --prepared SHARDS --resized RESIZED \
        --size 256 --output docs/loader.md

DATA has the MVTec layout; SHARDS and RESIZED are the same images as `--job prepare` writes them
with config.data.prepared_images "original" and "resized". PyTorch's DataLoader decodes, resizes and
makes the second view on the CPU. Ours decodes and resizes on the host and makes the second view on
the device, which is timed too: alone, and behind the loader on the same cores. Besides images a
second the table has the CPU time of all processes per image, which hardly depends on what else the
machine does. Every way is timed once per round, and the table shows medians over the rounds. Needs
PyTorch, and Linux's /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from ccl_jax import config as configs
from ccl_jax import mesh, prepare
from ccl_jax.augment import normalize, second_view, to_unit
from ccl_jax.data.layouts import read_mvtec
from ccl_jax.data.pictures import DecodedCache
from ccl_jax.data.pipeline import train_batches
from ccl_jax.data.records import Record
from tests.reference import torch_loader
from tests.reference.views import PUBLISHED

# Where records come from, by the name in the table; each has an option of that name.
SOURCES = ("folder", "prepared", "resized")
ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "torchvision", "jax", "grain", "pillow", "numpy")


class Speed(NamedTuple):
    """What was measured in one window."""

    images_per_second: float
    cpu_per_image: float  # seconds, of this process and its workers


class Way(NamedTuple):
    """A row of the table."""

    what: str
    by: str  # who reads
    open: Callable[[], contextlib.AbstractContextManager[Iterator[Any]]]
    warm_up: int  # batches before the clock starts
    use: Callable[[Any], object] = id  # what is done with a batch


def records_of(source: str, where: Path, size: int) -> list[Record]:
    """The training images of one of `SOURCES`."""
    if source == "folder":
        return read_mvtec(where).train
    config = configs.read_config_file(ROOT / "configs/default.py")
    config.data.source, config.data.prepared = "prepared", str(where)
    config.data.image_size = size
    return prepare.read_prepared(config, None).train


def cpu_seconds() -> float:
    """CPU time so far of this process and of its worker processes."""
    total = sum(os.times()[:2])
    for child in multiprocessing.active_children():
        # After the name, which stands in brackets, come state and numbers; 11 and 12 are ticks.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(way: Way, batch_size: int, seconds: float) -> Speed:
    """Times one way for `seconds`, once its start and its full buffers are behind it."""
    with way.open() as batches:
        for batch in itertools.islice(batches, way.warm_up):
            way.use(batch)
        wall, cpu, images = time.perf_counter(), cpu_seconds(), 0
        while time.perf_counter() - wall < seconds:
            way.use(next(batches))
            images += batch_size
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return Speed(images / wall, cpu / images)


def device_view() -> Callable[[Any], object]:
    """Both views of a batch as a training step makes them; returns when they are there."""
    where, numbers = mesh.make_mesh(1), itertools.count()

    @jax.jit
    def views(images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        clean = to_unit(images)
        return normalize(clean), normalize(second_view(key, clean, PUBLISHED))

    def use(batch: dict[str, np.ndarray]) -> object:
        images = mesh.put_batch({"image": batch["image"]}, where)["image"]
        return jax.block_until_ready(views(images, jax.random.key(next(numbers))))

    return use


def our_ways(
    sources: dict[str, list[Record]], size: int, batch_size: int, readers: Sequence[int]
) -> Iterator[Way]:
    """Our loader, by threads and by processes, from each source and from memory; then the view."""
    view = device_view()
    cores = len(os.sched_getaffinity(0))

    def way(name: str, records: list[Record], cache: DecodedCache, **reading: int) -> Way:
        reading = {"threads": 1, "workers": 0} | reading
        settings = {"image_size": size, "batch_size": batch_size, "seed": 0, "shuffle": "plain"}
        number = max(reading.values())
        epoch = -(-len(records) // batch_size)
        return Way(
            name,
            counted(number, "process" if reading["workers"] else "thread"),
            lambda: train_batches(records, **settings, **reading, cache=cache),
            warm_up=3 * number + 2 + (epoch if cache.budget else 0),
        )

    kept = DecodedCache(2**60)  # the first source's images, whichever it is: all decode alike
    found = next(iter(sources.values()))
    for name, records in sources.items():
        for kind, number in itertools.product(("threads", "workers"), readers):
            yield way(f"ours, {name}", records, DecodedCache(0), **{kind: number})
    for number in readers:
        yield way("ours, cached", found, kept, threads=number)
    one = {"image": np.zeros((batch_size, size, size, 3), np.uint8)}
    forever = partial(contextlib.nullcontext, itertools.repeat(one))
    yield Way("second view alone", "device", forever, 2, view)
    for name, records in [*sources.items(), ("cached", found)]:
        cache = kept if name == "cached" else DecodedCache(0)
        both = way(f"ours, {name}, and second view", records, cache, threads=cores)
        yield both._replace(by=f"{both.by} and device", use=view)


def torch_ways(
    records: Sequence[Record], size: int, batch_size: int, readers: Sequence[int]
) -> Iterator[Way]:
    """PyTorch's DataLoader, with both views."""
    files = [record.image for record in records]
    labels = [record.label for record in records]
    for number in readers:
        loader = partial(
            torch_loader.endless_batches,
            files,
            labels,
            size=size,
            batch_size=batch_size,
            workers=number,
        )
        # It reads two batches ahead per worker.
        warm_up = 3 * number + 2
        yield Way("PyTorch, and second view", counted(number, "process"), loader, warm_up)


def counted(number: int, what: str) -> str:
    """1 thread, 2 threads, 2 processes."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural if number > 1 else ''}"


def table(ways: Iterable[Way], speeds: Sequence[Speed]) -> str:
    """Markdown; ratios are to the best row of PyTorch, for wall and CPU time on its own."""
    rows = list(zip(ways, speeds, strict=True))
    theirs = [speed for way, speed in rows if way.what.startswith("PyTorch")]
    fastest = max(speed.images_per_second for speed in theirs)
    leanest = min(speed.cpu_per_image for speed in theirs)
    lines = [
        "| loader | read by | images/s | of PyTorch's best | CPU ms per image "
        "| images per core-second | of PyTorch's best |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for way, speed in rows:
        lines.append(
            f"| {way.what} | {way.by} | {speed.images_per_second:.0f} "
            f"| {speed.images_per_second / fastest:.2f} | {1e3 * speed.cpu_per_image:.2f} "
            f"| {1 / speed.cpu_per_image:.0f} | {leanest / speed.cpu_per_image:.2f} |"
        )
    return "\n".join(lines)


def circumstances(options: argparse.Namespace, images: int) -> str:
    """What the numbers depend on: machine, versions, settings, and the command."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    cores = len(os.sched_getaffinity(0))
    command = " ".join(["python -m tests.reference.loader_speed", *sys.argv[1:]])
    return (
        f"`{command}`\n\n"
        f"{images} training images, {options.size} pixels, batches of {options.batch}, "
        f"{options.rounds} rounds of {options.seconds:g} s a row, medians; {cores} cores, "
        f"{jax.devices()[0].device_kind}; Python {platform.python_version()}, {versions}."
    )


def main(arguments: Sequence[str] | None = None) -> str:
    """The printed text, which `--output` also gets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder in the MVTec layout")
    for name in SOURCES[1:]:
        parser.add_argument(f"--{name}", type=Path, help=f"the same images, {name}")
    parser.add_argument("--size", type=int, default=256, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4], help="numbers to try")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of every row")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    flags.FLAGS.mark_as_parsed()

    chosen = {name: getattr(options, name) for name in SOURCES}
    sources = {
        name: records_of(name, path, options.size)
        for name, path in chosen.items()
        if path is not None
    }
    shape = options.size, options.batch, options.readers
    ways = [*torch_ways(sources["folder"], *shape), *our_ways(sources, *shape)]
    found: list[list[Speed]] = [[] for _ in ways]
    for _ in range(options.rounds):
        for way, speeds in zip(ways, found, strict=True):
            speeds.append(measure(way, options.batch, options.seconds))
            print(f"{way.what}, {way.by}: {speeds[-1].images_per_second:.0f} images/s", flush=True)
    medians = [Speed(*np.median(speeds, axis=0).tolist()) for speeds in found]
    text = f"{circumstances(options, len(sources['folder']))}\n\n{table(ways, medians)}\n"
    print(text)
    if options.output:
        options.output.write_text(f"# Speed of the loader\n\n{text}")
    return text


if __name__ == "__main__":
    main()
