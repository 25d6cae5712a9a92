"""Where every process of a run is, and an end for one that would wait for ever.

The processes of a run compute every step together: where one is lost, hangs or fails, the others
wait in a collective, which no Python exception ends. So each writes where it is into a folder that
all see, and a thread of each ends its process, with the name of the one that holds all up, when
nothing has gone on for `run.stall_seconds`.
"""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ccl_jax.whereabouts import FIRST, Report, behind, read_report, report_of

FOLDER = ".processes"  # of a workdir
FAILED = "failed.json"  # in it: the first process of a run that ended with an error of its own
STALLED = 70  # exit status of a process that ends because nothing goes on, or another one is lost
INTERVAL = 5.0  # seconds between two reports of a process, at most
SILENT = 3  # intervals without a report, after which a process counts as stopped or lost
# These take long: compiling, also in the others, which the first steps and evaluations wait for;
# reading all; a network file system that wakes up.
PATIENT = {"starting": 6, "compiling": 6, FIRST: 6, "evaluating": 3}  # times `stall_seconds`


def end_process(status: int) -> None:
    """Ends this process from any thread, once standard error has the place of every thread."""
    faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    os._exit(status)


class Watch:
    """Reports where this process is, and ends it when the run stands still; a context manager.

    The block that an error leaves in a run of several processes tells the others of it, because
    they wait for this process: they end too, and name it. A computer that sleeps, or a process that
    is stopped and continued (Ctrl-Z), has not stalled. `stall_seconds` 0: never ends a process.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        index: int,
        count: int,
        stall_seconds: float,
        end: Callable[[int], Any] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = workdir / FOLDER
        self._index, self._count = index, count
        self._limit, self._end, self._clock = stall_seconds, end, clock
        self.interval = min(INTERVAL, stall_seconds / 8) if stall_seconds else INTERVAL
        self._place: tuple[str, int | None] = ("starting", None)
        self._moves, self._seen, self._beat = 0, 0, 0
        self._idle = 0.0  # seconds without a move, as the thread has counted them
        self._last = clock()
        self._heard: dict[int, tuple[int, float]] = {}  # beat, and since when it is the same
        self._noted: set[int] = set()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._since = self._file(self._index).stat().st_mtime  # by the file system's clock
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and self._count > 1:
            self._tell_of(error)
        self._leaving.set()
        self._thread.join()
        if error is None or isinstance(error, KeyboardInterrupt):
            self._file(self._index).unlink(missing_ok=True)

    def at(self, phase: str, step: int | None = None) -> None:
        """Says what this process does from now on; that counts as progress."""
        self._place = (phase, step)
        self._moves += 1

    @contextlib.contextmanager
    def during(self, phase: str, step: int | None = None) -> Iterator[None]:
        """A block that is a phase of its own; what came before it goes on after it."""
        before = self._place
        self.at(phase, step)
        try:
            yield
        finally:
            self.at(*before)

    def over(
        self, check: Callable[[], None]
    ) -> Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]:
        """Returns what goes over batches: each counts as progress, and `check` is called before."""

        def batches_in(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for batch in batches:
                check()
                self._moves += 1
                yield batch

        return batches_in

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._leaving.wait(self.interval):
            self.tick()

    def tick(self) -> None:
        """Reports, looks at the others where this process waits, and ends it where it must."""
        now = self._clock()
        # A gap between two ticks is one in which this process was stopped, and not one of waiting.
        self._idle += min(now - self._last, 2 * self.interval)
        self._last = now
        if self._moves != self._seen:
            self._seen, self._idle = self._moves, 0.0
            self._heard.clear()
        with contextlib.suppress(OSError):  # a disk that is full or away is for the run to meet
            self._write()
        failed = self._failed()
        if failed is not None:
            self._leave(
                f"{failed} ended with an error: {failed.error}\nThis process cannot go "
                f"on without it."
            )
            return
        patience = PATIENT.get(self._place[0], 1)
        limit = self._limit * patience
        # Every process reads the files of all; not while all of them compile.
        listens_from = SILENT * self.interval if patience == 1 else limit / 2
        if self._count > 1 and self._idle >= listens_from:
            self._listen()
        if self._limit and self._idle >= limit:
            self._leave(self._explanation())

    def _listen(self) -> None:
        """Remembers since when each other process has said nothing new; notes the silent ones."""
        for report in self._others():
            index, beat = report.index, report.beat
            if self._heard.get(index, (None, 0.0))[0] != beat:
                self._heard[index] = (beat, self._clock())
                self._noted.discard(index)
        for report in self._silent():
            if report.index not in self._noted:
                self._noted.add(report.index)
                _tell(f"{report} gives no sign of life; it was {report.place}.")

    def _silent(self) -> list[Report]:
        """The last reports of those that have said nothing new for SILENT intervals."""
        now = self._clock()
        return [
            report
            for report in self._others()
            if report.index in self._heard
            and now - self._heard[report.index][1] >= SILENT * self.interval
        ]

    def _explanation(self) -> str:
        """Who holds all up, as far as it can be told from what the processes last wrote."""
        head = f"nothing has gone on for {self._idle:.0f} s; this process is {self._mine().place}"
        if self._count == 1:
            return f"{head}."
        others = self._others()
        missing = set(range(self._count)) - {report.index for report in others} - {self._index}
        silent = self._silent()
        if silent or missing:
            names = [f"{each}, which was {each.place}" for each in silent]
            names += [
                f"process {index}, which has not begun or has ended" for index in sorted(missing)
            ]
            return f"{head}, and waits for {'; '.join(names)}: stopped or lost, with its host."
        last = behind([self._mine(), *others])
        if not last:
            return f"{head}, and so are all others: devices or the network between them hang."
        names = [
            "this process" if each.index == self._index else f"{each}, {each.place}"
            for each in last
        ]
        return f"{head}. What holds all up is {'; '.join(names)}."

    # --- errors --------------------------------------------------------------------------------

    def _tell_of(self, error: Exception) -> None:
        """Ends this process where `error` is only that another one is gone; else tells the others.

        A collective without one of its processes fails at once on CPUs; who is gone shows then or
        when it has not reported for some intervals. The others get some time to read of an error.
        """
        words = " ".join(str(error).split())[:500]
        if _is_of_a_collective(error):
            _tell(f"a computation of all processes failed ({words[:160]}); who is gone?")
            gone = self._gone()
            if gone:
                names = "; ".join(f"{each}, which was {each.place}" for each in gone)
                self._leave(f"lost {names}: killed, or its host is gone.")
                return
        report = dataclasses.replace(self._mine(), error=f"{type(error).__name__}: {words}")
        _tell(f"{report} fails: {report.error}")
        with contextlib.suppress(OSError):  # the error itself may be that nothing can be written
            if self._failed() is None:
                report.write(self._folder / FAILED)
                time.sleep(2 * self.interval)

    def _gone(self) -> list[Report]:
        """The processes that are there no more, as soon as any shows; [] where all are there."""
        self._heard.clear()
        end = self._clock() + (SILENT + 2) * self.interval
        while self._clock() < end:
            failed = self._failed()
            gone = [failed] if failed else [each for each in self._others() if each.is_dead_here]
            self._listen()
            gone = gone or self._silent()
            if gone:
                return gone
            time.sleep(self.interval / 4)
        return []

    def _leave(self, message: str) -> None:
        """Ends this process, wherever its main thread hangs."""
        if self._index == 0 and self._count > 1:
            # With the first process its coordination service ends, which ends the others at once.
            time.sleep(2 * self.interval)
        _tell(
            f"error: {message} Ended with status {STALLED} (config.run.stall_seconds="
            f"{self._limit:g}); start again with the same --workdir: the run goes on from its "
            f"newest checkpoint."
        )
        self._end(STALLED)

    # --- files ---------------------------------------------------------------------------------

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.json"

    def _mine(self) -> Report:
        return report_of(self._index, *self._place, self._beat)

    def _write(self) -> None:
        self._beat += 1
        self._mine().write(self._file(self._index))

    def _others(self) -> list[Report]:
        indices = (index for index in range(self._count) if index != self._index)
        found = [read_report(self._file(index)) for index in indices]
        return [report for report in found if report is not None]

    def _failed(self) -> Report | None:
        """What another process wrote of its own error, since this one began."""
        path = self._folder / FAILED
        try:
            if self._count == 1 or path.stat().st_mtime < self._since:
                return None
        except FileNotFoundError:
            return None
        report = read_report(path)
        return None if report is None or report.index == self._index else report


def _is_of_a_collective(error: Exception) -> bool:
    """Whether JAX raised it: a failed collective is a ValueError or a RuntimeError of its own."""
    words = str(error)
    return any(word in words for word in ("Gloo", "NCCL", "collective", "UNAVAILABLE", "barrier"))


def _tell(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
