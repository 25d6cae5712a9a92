"""What a run reports while it runs: scalars to JSONL and TensorBoard, a progress bar, its speed."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ccl_jax import mesh
from ccl_jax.atomic import write_atomically
from ccl_jax.progress import new_bar
from ccl_jax.throughput import Goodput, SlowStep, Throughput


class RunLog:
    """The log of a run, `folder/metrics.jsonl` and TensorBoard events; use it as a context manager.

    A run that resumes at `start_step` appends, after what a killed run logged beyond that step is
    taken out: each training step appears once, evaluations in lines of their own. Of several
    processes only the first writes, or shows more than its notes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        start_step: int,
        images_per_step: int,
        tensorboard: bool,
        progress: bool,
        devices: int = 1,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Of a run on `devices`, each of which can do `peak` FLOP/s at most, if that is known."""
        self._throughput = Throughput(images_per_step, clock, devices=devices, peak=peak)
        self._compile_seconds: float | None = None
        self._goodput: Goodput | None = None
        self._lines: IO[str] | None = None
        self._writing = threading.Lock()  # notes come from other threads
        self._events: Any = None
        first = mesh.is_first()
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines, useful = _reopen(folder / "metrics.jsonl", start_step)
            self._goodput = Goodput(folder / "goodput.json", useful, wall_clock)
        self._events_wanted = first and tensorboard
        self._folder, self._start_step = folder, start_step
        self._bar = new_bar(total_steps, "step", shown=progress and first, initial=start_step)
        self._step = start_step

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._begin_events()  # which hides what a killed run left, also where no line came
        if self._events is not None:
            self._events.close()
        if self._lines is not None:
            self._lines.close()

    def waited(self, seconds: float) -> None:
        """Adds to the time spent waiting for input."""
        self._throughput.waited(seconds)

    def note(self, text: str) -> None:
        """Shows a text on standard error, and logs it as {"step", "time", "note"}.

        It may come from another thread than the steps, such as one that reads ahead of them.
        """
        self._bar.write(text, file=sys.stderr)
        self._line({"step": self._step, "time": round(time.time(), 3), "note": text})

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """A block whose time counts neither as training nor as waiting, e.g. an evaluation."""
        return self._throughput.paused()

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """A block whose time counts as one in which a checkpoint held the steps up."""
        return self._throughput.saving()

    def compiling(self) -> None:
        """Says beside the progress bar why no step ends for a while."""
        self._bar.set_postfix_str("compiling the training step")

    def compiled(self, seconds: float, flops: float) -> None:
        """Starts counting speed: the step is compiled, and takes `flops` over all devices."""
        self._compile_seconds = seconds
        self._throughput.begin(flops)
        self._bar.set_postfix_str("")
        self._bar.unpause()  # so that its rate is that of the steps

    def advance(self, step: int) -> None:
        """Counts the step and moves the progress bar to it; notes a step that took far too long."""
        slow = self._throughput.step()
        self._bar.update(step - self._step)
        self._step = step
        if slow is not None and self._speaks_of(slow):
            self.note(f"step {step} {slow}")

    def finish(self) -> None:
        """Takes the progress bar away: no steps follow."""
        self._bar.close()

    def summary(self) -> dict[str, float]:
        """`seconds` since the very first start, `step_seconds` and `goodput`; {} but in the first.

        Only the first process keeps them.
        """
        if self._goodput is None:
            return {}
        figures = self._goodput.figures(self._throughput.step_seconds)
        return {"seconds": self._goodput.elapsed} | figures

    def _speaks_of(self, slow: SlowStep) -> bool:
        """Whether this process is the first, or the one that the others may have waited for."""
        return self._lines is not None or slow.waiting > slow.seconds / 2

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars; after training steps also the speed, and the bar shows both.

        A line is {"step", "time" (Unix seconds), ...}; what is not finite becomes null, because
        JSON knows no NaN.
        """
        self._begin_events()
        values = {name: float(value) for name, value in scalars.items()}
        speed = self._throughput.figures()
        if speed:
            shown = [f"{name} {value:.4g}" for name, value in values.items()]
            shown.append(f"{speed['images_per_second']:.0f} images/s")
            self._bar.set_postfix_str(", ".join(shown))
            if self._goodput is not None:
                speed |= self._goodput.figures(self._throughput.step_seconds)
            if self._compile_seconds is not None:
                speed["compile_seconds"], self._compile_seconds = self._compile_seconds, None
        values |= speed
        line: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        self._line(line | {name: v if math.isfinite(v) else None for name, v in values.items()})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def _begin_events(self) -> None:
        """Opens TensorBoard events, if wanted, before the first line: the first step is past."""
        if self._events_wanted and self._events is None:
            with self._throughput.paused():
                self._events = _open_events(self._folder, self._start_step)

    def _line(self, line: Mapping[str, Any]) -> None:
        if self._lines is not None:
            with self._writing:
                self._lines.write(json.dumps(line, allow_nan=False) + "\n")
                self._lines.flush()


def _reopen(path: Path, start_step: int) -> tuple[IO[str], float]:
    """Opens for appending, once every line beyond `start_step`, or cut off, is taken out.

    Also returns the useful seconds of the steps before, as the last line that has them says.
    """
    useful = 0.0
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
        write_atomically(path, "".join(line + "\n" for line in kept))
        useful = max((json.loads(line).get("step_seconds", 0.0) for line in kept), default=0.0)
    return path.open("a"), useful


def _step_of(line: str) -> float:
    """The step of a line; infinity where the line was cut off."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def _open_events(folder: Path, start_step: int) -> Any:
    """Opens TensorBoard events, which hide those of a killed run beyond `start_step`."""
    import tensorboardX  # here: it takes most of a second, which the first step need not wait for

    return tensorboardX.SummaryWriter(str(folder), purge_step=start_step + 1)
