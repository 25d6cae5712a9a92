"""An evaluator that follows a training: it waits for checkpoints, and evaluates each of them once.

All that it knows lies on disk: a step whose evaluation/<step>/results.json is there is done,
whoever wrote it. So the training and its follower may be stopped and started again at any time,
and may run on different machines that share the workdir's file system.

The newest step comes first. A follower that keeps up so takes the steps in their order; one that
is slower than the training leaves out those whose checkpoints are deleted before it comes to them,
rather than run after them.

Of several processes only the first looks at the disk, which they may see at different moments; what
follows from that it tells the others.
"""

import contextlib
import json
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np

from ccl_jax import mesh
from ccl_jax.evaluation_log import EvaluationLog
from ccl_jax.loop import check_together
from ccl_jax.metrics.counts import UnusableScoresError
from ccl_jax.scoring import Scorer
from ccl_jax.signals import StopRequest
from ccl_jax.watch import Watch
from ccl_jax.workdir import is_locked

COMPLETE = "complete.json"  # {"step", ...}, which a training leaves when it has come to its end
LOG = "log-evaluation"
LOCK = ".lock"  # in it
_NAP = 0.2  # seconds between looks at whether a signal came
_WAIT, _END = -1, -2  # what to do next is a step, _WAIT, or _END minus the exit status

Folder = tuple[int, int]  # inode and time of change: another one under the same name differs


class Evaluator(NamedTuple):
    """How checkpoints are evaluated."""

    load: Callable[[int], Scorer]  # ValueError where the step's checkpoint cannot be read
    evaluate: Callable[[Scorer], Any]  # writes evaluation/<step>/; `Stopped` after a signal


def follow(
    workdir: Path,
    open_evaluator: Callable[[], Evaluator],
    *,
    conventions: Mapping[str, Any],
    poll_seconds: float,
    patience: float,
    stop: StopRequest,
    watch: Watch,
    tensorboard: bool,
) -> int:
    """Evaluates the checkpoints of the training in `workdir` until it is complete.

    Returns 0 then; 1 where its last checkpoint cannot be evaluated, or where for `patience` seconds
    (0: without end) there was no new checkpoint and no training in the workdir. `open_evaluator` is
    called once the first checkpoint is there. Steps that were evaluated by other `conventions` are
    named, and left as they are. Raises `Stopped` in all processes after a signal to one, and
    ValueError where another follower is at work.
    """
    with contextlib.ExitStack() as entered:
        log, free = None, True
        if mesh.is_first():
            log = EvaluationLog(workdir / LOG, tensorboard=tensorboard)
            try:
                entered.enter_context(filelock.FileLock(workdir / LOG / LOCK, blocking=False))
            except filelock.Timeout:
                free = False
        if not mesh.from_first(free):
            raise ValueError(
                f"another evaluator follows --workdir={workdir} already, and logs to "
                f"{workdir / LOG}; leave it the work, or stop it first."
            )
        if log is not None:
            entered.enter_context(log)
        entered.enter_context(watch)  # after the lock: its files are those of one follower
        follower = _Follower(workdir, conventions, patience, stop, watch, log)
        return follower.run(open_evaluator, poll_seconds)


class _Follower:
    def __init__(
        self,
        workdir: Path,
        conventions: Mapping[str, Any],
        patience: float,
        stop: StopRequest,
        watch: Watch,
        log: EvaluationLog | None,
    ) -> None:
        self._workdir = workdir
        self._conventions = json.loads(json.dumps(conventions))
        self._patience = patience
        self._stop = stop
        self._watch = watch
        self._log = log
        self._evaluator: Evaluator | None = None
        # From here on, what only the first process knows.
        self._evaluated: set[int] = set()
        self._there: dict[int, Folder] = {}  # the checkpoints at the last look
        self._known: set[int] = set()  # had a checkpoint at some time
        # Could not be read once: a deletion that goes on, or a file system that is behind.
        self._doubtful: dict[int, Folder | None] = {}
        self._skipped: dict[int, Folder | None] = {}  # None: there was no folder
        self._said: set[str] = set()
        self._moved = time.monotonic()  # when something last happened

    def run(self, open_evaluator: Callable[[], Evaluator], poll_seconds: float) -> int:
        """Follows to the end; the first process decides for all."""
        while True:
            check_together(self._stop, "stopped; what was evaluated stays")
            todo = mesh.from_first(self._next() if mesh.is_first() else 0)
            if todo <= _END:
                return _END - todo
            if todo == _WAIT or not mesh.from_first(self._attempt(todo, open_evaluator)):
                self._pause(poll_seconds)

    def _pause(self, seconds: float) -> None:
        """Waits so long, or until a signal comes to this process."""
        while seconds > 0 and self._stop.signal is None:
            self._watch.at("waiting for checkpoints")
            nap(min(seconds, self._watch.interval), self._stop)
            seconds -= self._watch.interval

    def _next(self) -> int:
        """The step to evaluate, _WAIT, or _END minus the exit status."""
        self._there = steps = committed_steps(self._workdir / "checkpoints")
        self._take_note_of_results()
        self._forget_replaced()
        if not self._known >= steps.keys():
            self._known |= steps.keys()
            self._moved = time.monotonic()
        last = completed_step(self._workdir)
        for step in sorted(self._known - {*steps, last} - self._evaluated - self._skipped.keys()):
            self._skip(step, "its checkpoint was deleted before it could be read")
        waiting = {*steps, *([] if last is None else [last])} - self._evaluated
        waiting -= self._skipped.keys()
        if waiting:
            return max(waiting)
        if last is None:
            return self._wait()
        if last in self._evaluated:
            mesh.say(f"the training is complete, and its last step {last} is evaluated.")
            return _END
        mesh.say(
            f"the training is complete, but its last step {last} could not be evaluated: see above."
        )
        return _END - 1

    def _wait(self) -> int:
        """_WAIT, or the end after too long a time in which nothing happened."""
        self._say_once(f"waiting for checkpoints in {self._workdir / 'checkpoints'}")
        if self._patience and time.monotonic() - self._moved > self._patience:
            if not is_locked(self._workdir):
                mesh.say(
                    f"gave up: for {self._patience:g} seconds there was no new checkpoint, and no "
                    f"training holds {self._workdir}. To wait longer: "
                    f"--config.eval.follow_patience=0 (without end)."
                )
                return _END - 1
            self._moved = time.monotonic()
        return _WAIT

    def _forget_replaced(self) -> None:
        """Gives a step another try that a training has saved again since it could not be read."""
        for tried in (self._doubtful, self._skipped):
            for step, folder in [*tried.items()]:
                if self._there.get(step, folder) != folder:
                    del tried[step]
                    self._moved = time.monotonic()

    def _take_note_of_results(self) -> None:
        """Logs the evaluations that are new on disk, whoever made them."""
        found = self._workdir.glob("evaluation/*/results.json")
        there = {int(path.parent.name): path for path in found if path.parent.name.isdecimal()}
        self._evaluated &= there.keys()  # a fresh training puts those of the one before aside
        for step, path in sorted(there.items()):
            if step in self._evaluated:
                continue
            try:
                results = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                self._say_once(f"{path} is damaged ({error}); the step is evaluated again")
                continue
            self._evaluated.add(step)
            if self._log is None or step in self._log.steps:
                continue
            self._log.write(step, results["mean"])
            made = results["conventions"]
            if others := [key for key, v in self._conventions.items() if made.get(key) != v]:
                mesh.say(
                    f"step {step} was evaluated by other settings ({', '.join(others)}), which is "
                    f"left so; again by these: --job evaluate --config.eval.step={step}"
                )

    def _attempt(self, step: int, open_evaluator: Callable[[], Evaluator]) -> bool:
        """Evaluates a step; False where there is a reason to wait before the next look."""
        if self._evaluator is None and mesh.from_first(bool(self._known)):
            with self._watch.during("starting"):
                self._evaluator = open_evaluator()
        scorer, reason = None, "there is no checkpoint at all"
        with self._watch.during("evaluating", step):
            if self._evaluator is not None:
                try:
                    scorer = self._evaluator.load(step)
                except (ValueError, OSError) as error:
                    reason = str(error)
            loaded = mesh.sum_over_processes(np.array([scorer is not None], np.int64))
            if self._evaluator is None or scorer is None or loaded[0] < jax.process_count():
                return self._doubt(step, "another process could not read it" if scorer else reason)
            try:
                self._evaluator.evaluate(scorer)
            except UnusableScoresError as error:
                self._skip(step, str(error))
                return True
        if not (self._workdir / f"evaluation/{step}/results.json").exists():
            self._skip(step, "its evaluation left no results.json")
        self._moved = time.monotonic()
        return True

    def _doubt(self, step: int, reason: str) -> bool:
        """Skips a step that could not be read twice; False after the first time."""
        if step in self._doubtful:
            self._skip(step, reason)
            return True
        self._doubtful[step] = self._there.get(step)
        return False

    def _skip(self, step: int, reason: str) -> None:
        mesh.say(f"step {step} is skipped: {reason}")
        self._skipped[step] = self._there.get(step)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            mesh.say(text)


def committed_steps(folder: Path) -> dict[int, Folder]:
    """The steps that have a finished checkpoint, each with what tells its folder from a later one.

    A checkpoint gets its name, the number of its step, once it is written. Found without orbax,
    whose readers wait for those of all processes.
    """
    found = {}
    with contextlib.suppress(FileNotFoundError):  # no folder yet
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # deleted since
                status = path.stat()
                if path.name.isdecimal() and stat.S_ISDIR(status.st_mode):
                    found[int(path.name)] = (status.st_ino, status.st_mtime_ns)
    return found


def completed_step(workdir: Path) -> int | None:
    """The last step of a training that is complete; None while it is not."""
    try:
        return int(json.loads((workdir / COMPLETE).read_text())["step"])
    except FileNotFoundError:
        return None


def nap(seconds: float, stop: StopRequest) -> None:
    """Sleeps so long, or until a signal comes."""
    until = time.monotonic() + seconds
    while stop.signal is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(_NAP, left))


def wait_for_file(path: Path, *, patience: float, stop: StopRequest) -> int:
    """Returns 0 once the file is there; 1 after `patience` seconds (0: without end).

    128 plus the number of a signal that came. Touches no device, so it may come before the
    processes of a run have found each other.
    """
    start = time.monotonic()
    if not path.exists():
        print(f"waiting for {path}, which a training writes when it starts", flush=True)
    while not path.exists():
        if stop.signal is not None:
            return 128 + stop.signal
        if patience and time.monotonic() - start > patience:
            print(f"gave up: {path} was not there within {patience:g} seconds.", flush=True)
            return 1
        nap(1.0, stop)
    return 0
