"""Which checkpoints of a run are kept, and where damaged ones go."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Keep:
    """What orbax asks which checkpoints to leave when a new one is being written.

    `agreed` calls what it is given in the first process, and returns the number that comes out to
    all: evaluations may appear while they are looked at.
    """

    def __init__(
        self,
        evaluation: Path,
        *,
        newest: int,
        every: int,
        metric: str,
        agreed: Callable[[Callable[[], int]], int],
    ) -> None:
        self._evaluation = evaluation
        self._newest = newest
        self._every = every
        self._metric = metric
        self._agreed = agreed

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of these, ascending by step; the same in every process."""
        steps = [checkpoint.step for checkpoint in checkpoints]

        def best_or_none() -> int:
            found = best_step(self._evaluation, self._metric, steps)
            return -1 if found is None else found

        best = self._agreed(best_or_none) if self._metric else -1
        kept = kept_steps(
            steps, newest=self._newest, every=self._every, best=None if best == -1 else best
        )
        return [step in kept for step in steps]


def kept_steps(steps: Sequence[int], *, newest: int, every: int, best: int | None) -> set[int]:
    """The steps to keep: the `newest` last ones, the multiples of `every` (0: none), and `best`."""
    kept = set(sorted(steps)[-newest:])
    if every:
        kept |= {step for step in steps if step % every == 0}
    if best is not None:
        kept.add(best)
    return kept


def best_step(evaluation: Path, metric: str, steps: Sequence[int]) -> int | None:
    """The step among `steps` with the highest mean of `metric`; of equal ones the newest.

    Read from evaluation/<step>/results.json, so a step that nobody has evaluated yet does not
    count; None where none has. Chosen on the test set, therefore: a checkpoint to look at, and no
    number to report. Results that cannot be read are named, and do not count either.
    """
    values: dict[int, float] = {}
    for step in steps:
        path = evaluation / str(step) / "results.json"
        try:
            value = json.loads(path.read_text())["mean"][metric]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path} cannot be read ({error!r}); step {step} cannot be the best", flush=True)
            continue
        if value is not None:  # a metric that no class can have
            values[step] = value
    return max(values, key=lambda step: (values[step], step), default=None)


def put_aside(path: Path) -> Path:
    """Moves a checkpoint to WORKDIR/damaged-<step>, or -2, -3 and so on; returns where it is."""
    there = path.parent.parent / f"damaged-{path.name}"
    number = 1
    while there.exists():
        number += 1
        there = there.with_name(f"damaged-{path.name}-{number}")
    return path.rename(there)
