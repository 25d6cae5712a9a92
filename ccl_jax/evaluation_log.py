"""The log of an evaluator that follows a training: a line for every step that has results."""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ccl_jax.atomic import write_atomically


class EvaluationLog(AbstractContextManager):
    """`folder/metrics.jsonl` and TensorBoard events; goes on with what is there.

    `steps` are those that have a line, {"step", "time" (Unix seconds), metric: mean over the
    classes}, in the order in which they were written. A line that a kill cut off is taken out.
    """

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._events: Any = None
        self.steps: set[int] = set()

    def __enter__(self) -> "EvaluationLog":
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                self.steps.add(json.loads(line)["step"])
            except json.JSONDecodeError:
                continue
            kept.append(line + "\n")
        write_atomically(self._path, "".join(kept))
        if self._tensorboard:
            import tensorboardX  # here, because it takes a second that others need not spend

            self._events = tensorboardX.SummaryWriter(str(self._folder))
        return self

    def __exit__(self, *error: object) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, step: int, mean: Mapping[str, float | None]) -> None:
        """Logs the mean metrics of a step; one that no class has is null."""
        if self._events is not None:
            for name, value in mean.items():
                if value is not None:
                    self._events.add_scalar(f"evaluation/{name}", value, step)
            self._events.flush()
        line = {"step": step, "time": round(time.time(), 3), **mean}
        with self._path.open("a") as file:  # last: a step with a line is logged completely
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.steps.add(step)
