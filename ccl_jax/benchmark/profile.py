"""What a device does during some calls, and which of its kernels take longest."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

Event = dict[str, Any]
LONGEST = 10  # kernels in the table


class Kernel(NamedTuple):
    """One kernel, or an operation of a compiled program, over all its calls."""

    name: str
    seconds: float
    calls: int


def record(folder: Path, call: Callable[[int], Any], *, repeats: int) -> list[Kernel]:
    """Writes a trace of so many calls into the folder; returns its kernels, the longest first.

    TensorBoard and ui.perfetto.dev show the trace. Raises ValueError where nothing of a device is
    in it.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # of the host only what the runtime itself tells
    before = set(folder.rglob("*.trace.json.gz"))
    with jax.profiler.trace(folder, profiler_options=options):
        for number in range(repeats):
            jax.block_until_ready(call(number))
    kernels: list[Kernel] = []
    for path in sorted(set(folder.rglob("*.trace.json.gz")) - before):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            kernels += kernels_of(json.load(file)["traceEvents"])
    if not kernels:
        raise ValueError(
            f"the trace in {folder} names no kernel of a device; look at it in ui.perfetto.dev, or "
            f"leave out --profile."
        )
    return kernels


def kernels_of(events: Iterable[Event]) -> list[Kernel]:
    """The kernels of a trace's events, the longest in all first.

    Of GPUs what ran in their streams, of TPUs their operations; on CPUs the operations of compiled
    programs, each without those that it calls.
    """
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, microseconds in _own_times(_of_devices(list(events))):
        seconds[name] += microseconds / 1e6
        calls[name] += 1
    return sorted(
        (Kernel(name, spent, calls[name]) for name, spent in seconds.items()),
        key=lambda kernel: (-kernel.seconds, kernel.name),
    )


def _of_devices(events: list[Event]) -> list[Event]:
    """The events that are kernels."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    lines = {
        where
        for where, name in threads.items()
        if processes.get(where[0], "").startswith("/device:")
        and (name.startswith("Stream") or name == "XLA Ops")
    }
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    if lines:
        return [event for event in spans if (event["pid"], event["tid"]) in lines]
    return [event for event in spans if "hlo_op" in event.get("args", {})]


def _own_times(events: list[Event]) -> Iterator[tuple[str, float]]:
    """(name, microseconds) of each event, less those of the events within it."""
    by_line: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        by_line[event["pid"], event["tid"]].append(event)
    for line in by_line.values():
        line.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = [event["dur"] for event in line]
        open_: list[int] = []  # events that have not ended yet, the innermost last
        for index, event in enumerate(line):
            while open_ and line[open_[-1]]["ts"] + line[open_[-1]]["dur"] <= event["ts"]:
                open_.pop()
            if open_:
                own[open_[-1]] -= event["dur"]
            open_.append(index)
        yield from zip((event["name"] for event in line), own, strict=True)


def markdown_table(kernels: list[Kernel], *, repeats: int) -> str:
    """The longest kernels as a Markdown table: time and calls per step, share of all."""
    total = sum(kernel.seconds for kernel in kernels)
    lines = ["| kernel | ms a step | calls a step | share |", "|---|---:|---:|---:|"]
    for name, seconds, calls in kernels[:LONGEST]:
        share = f"{seconds / total:.1%}"
        lines.append(
            f"| `{name}` | {1e3 * seconds / repeats:.3f} | {calls / repeats:g} | {share} |"
        )
    return "\n".join(lines) + "\n"
