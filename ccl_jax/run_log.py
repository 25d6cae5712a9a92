"""What a run reports while it runs: scalars to JSONL and TensorBoard, a progress bar, its speed."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
from tqdm import tqdm


class Throughput:
    """Images per second, and the share of the time in which the devices waited for the host's data.

    Counts from the end of the first step, so that compilation does not enter.
    """

    def __init__(
        self, images_per_step: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._images_per_step = images_per_step
        self._clock = clock
        self._start: float | None = None
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0

    def step(self) -> None:
        """Counts a step."""
        if self._start is None:
            self._restart()
        else:
            self._steps += 1

    def waited(self, seconds: float) -> None:
        """Adds to the time spent waiting for input."""
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out: an evaluation is no training."""
        before = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - before

    def figures(self) -> dict[str, float]:
        """The figures since the last call, which then start anew; {} where no step was counted.

        `images_per_second` over all devices; `input_wait`, a share in [0, 1]. Right after the
        losses were fetched they are exact, for until then steps may still be computing.
        """
        if self._start is None or self._steps == 0:
            return {}
        seconds = max(self._clock() - self._start - self._paused, 1e-9)
        figures = {
            "images_per_second": self._steps * self._images_per_step / seconds,
            "input_wait": min(self._waited / seconds, 1.0),
        }
        self._restart()
        return figures

    def _restart(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0


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
    ) -> None:
        self._throughput = Throughput(images_per_step)
        self._lines: IO[str] | None = None
        self._writing = threading.Lock()  # notes come from other threads
        self._events: Any = None
        first = jax.process_index() == 0
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = _reopen(folder / "metrics.jsonl", start_step)
        if first and tensorboard:
            self._events = _open_events(folder, start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # seconds; a file gets few lines
            disable=not (first and progress),
        )
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

    def advance(self, step: int) -> None:
        """Counts the step and moves the progress bar to it."""
        self._throughput.step()
        self._bar.update(step - self._step)
        self._step = step

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars; after training steps also the speed, and the bar shows both.

        A line is {"step", "time" (Unix seconds), ...}; what is not finite becomes null, because
        JSON knows no NaN.
        """
        values = {name: float(value) for name, value in scalars.items()}
        speed = self._throughput.figures()
        if speed:
            shown = [f"{name} {value:.4g}" for name, value in values.items()]
            shown.append(f"{speed['images_per_second']:.0f} images/s")
            self._bar.set_postfix_str(", ".join(shown))
        values |= speed
        line: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        self._line(line | {name: v if math.isfinite(v) else None for name, v in values.items()})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def _line(self, line: Mapping[str, Any]) -> None:
        if self._lines is not None:
            with self._writing:
                self._lines.write(json.dumps(line, allow_nan=False) + "\n")
                self._lines.flush()


def _reopen(path: Path, start_step: int) -> IO[str]:
    """Opens for appending, once every line beyond `start_step`, or cut off, is taken out."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
    return path.open("a")


def _step_of(line: str) -> float:
    """The step of a line; infinity where the line was cut off."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def _open_events(folder: Path, start_step: int) -> Any:
    """Opens TensorBoard events, which hide those of a killed run beyond `start_step`."""
    import tensorboardX  # here, because it takes a second that a run without it need not spend

    return tensorboardX.SummaryWriter(str(folder), purge_step=start_step + 1)
