"""Where every process of a run is, and an end for one that would wait for ever.

The processes of a run compute every step together: where one is lost, hangs or fails, the others
wait in a collective, which no Python exception ends. So each writes where it is into a folder that
all see, and a thread of each ends its process, with the name of the one that holds all up, when
nothing has gone on for `run.stall_seconds`. A second thread does the same without any file, because
a network file system that hangs holds up the first.
"""

import contextlib
import dataclasses
import threading
import time
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ccl_jax.ending import FAILED_TOO, STALLED, Idle, end_process, tell
from ccl_jax.whereabouts import FIRST, Report, behind, read_report, report_of

FOLDER = ".processes"  # of a workdir
FAILED = "failed.json"  # in it: the first process of a run that ended with an error of its own
COLLECTIVE = ("gloo", "nccl", "collective", "unavailable", "deadline_exceeded", "barrier")
PACKAGE = Path(__file__).resolve().parent
INTERVAL = 5.0  # seconds between two reports of a process, at most
LATE = 8  # intervals after which the second thread ends what the first should have ended
SILENT = 3  # intervals without a report, after which a process counts as stopped or lost
# These take long: compiling, also in the others, which the first steps and evaluations wait for;
# reading all; a network file system that wakes up.
PATIENT = {"starting": 6, "compiling": 6, FIRST: 6, "evaluating": 3}  # times `stall_seconds`


class Watch:
    """Reports where this process is, and ends it when the run stands still; a context manager.

    The block that an error leaves in a run of several processes tells the others of it, because
    they wait for this process: they end too, and name it. A computer that sleeps, or a process that
    is stopped and continued (Ctrl-Z), has not stalled. `stall_seconds` 0: never ends a process.
    `run` is a number that this start of the run has to itself: what another start has left in the
    folder does not count.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        index: int,
        count: int,
        stall_seconds: float,
        run: int = 0,
        end: Callable[[int], Any] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = workdir / FOLDER
        self._index, self._count, self._run_number = index, count, run
        self._limit, self._end, self._clock = stall_seconds, end, clock
        self.interval = min(INTERVAL, stall_seconds / 8) if stall_seconds else INTERVAL
        self._place: tuple[str, int | None] = ("starting", None)
        self._moves, self._beat = 0, 0
        self._idle = Idle(clock, self.interval)  # as the first thread has counted it
        self._idle_by_second = Idle(clock, self.interval)
        self._heard: dict[int, tuple[int, float]] = {}  # beat, and since when it is the same
        self._noted: set[int] = set()
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(act,), name=name, daemon=True)
            for name, act in (
                ("watch", self.tick),
                ("watch without files", self.tick_without_files),
            )
        ]

    def __enter__(self) -> "Watch":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        for thread in self._threads:
            thread.start()
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
        for thread in self._threads:
            thread.join()
        if error is None or isinstance(error, KeyboardInterrupt):
            with contextlib.suppress(OSError):  # no reason to fail at the very end
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

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._leaving.wait(self.interval):
            act()

    @property
    def _patience(self) -> float:
        """Seconds that this phase may take, if there is a limit."""
        return self._limit * PATIENT.get(self._place[0], 1)

    def tick(self) -> None:
        """Reports, looks at the others where this process waits, and ends it where it must."""
        if self._idle.count(self._moves):
            self._heard.clear()
        with contextlib.suppress(OSError):  # a disk that is full or away is for the run to meet
            self._write()
        failed = self._failed()
        if failed is not None:
            self._follow(failed)
            return
        patient = PATIENT.get(self._place[0], 1) > 1
        # Every process reads the files of all; not while all of them compile.
        listens_from = self._patience / 2 if patient else SILENT * self.interval
        if self._count > 1 and self._idle.seconds >= listens_from:
            self._listen()
        if self._limit and self._idle.seconds >= self._patience:
            self._leave(self._explanation())

    def tick_without_files(self) -> None:
        """Ends this process where `tick` should have done so long ago: it hangs at a file."""
        self._idle_by_second.count(self._moves)
        late = LATE * self.interval
        if self._limit and self._idle_by_second.seconds >= self._patience + late:
            self._leave(
                f"nothing has gone on for {self._idle_by_second.seconds:.0f} s; this process is "
                f"{self._mine().place}. What the others do cannot be read: {self._folder} hangs."
            )

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
                tell(f"{report} gives no sign of life; it was {report.place}.")

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
        seconds, place = self._idle.seconds, self._mine().place
        head = f"nothing has gone on for {seconds:.0f} s; this process is {place}"
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
            tell(f"a computation of all processes failed ({words[:160]}); who is gone?")
            self._leave_without(self._gone())
            return
        report = dataclasses.replace(self._mine(), error=f"{type(error).__name__}: {words}")
        tell(f"{report} fails: {report.error}")
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

    def _leave_without(self, gone: Sequence[Report]) -> None:
        """Ends this process after a failed computation, with the names of those that are gone."""
        if gone and gone[0].error:
            self._follow(gone[0])
        elif gone:
            names = "; ".join(f"{each}, which was {each.place}" for each in gone)
            self._leave(f"lost {names}: killed, or its host is gone.")
        else:
            self._leave("lost the connection, and no process is gone: the network has a fault.")

    def _follow(self, failed: Report) -> None:
        """Ends this process as the other one ended: an error of one is an error of the run."""
        self._end_with(
            FAILED_TOO,
            f"error: {failed} ended with an error: {failed.error}\nThis process cannot go on "
            f"without it, and ends with status {FAILED_TOO}, too.",
        )

    def _leave(self, message: str) -> None:
        """Ends this process, wherever its main thread hangs, for another start to go on."""
        self._end_with(
            STALLED,
            f"error: {message} Ended with status {STALLED} (config.run.stall_seconds="
            f"{self._limit:g}); start again with the same --workdir: the run goes on from its "
            f"newest checkpoint.",
        )

    def _end_with(self, status: int, words: str) -> None:
        if self._index == 0 and self._count > 1:
            # With the first process its coordination service ends, which ends the others at once.
            time.sleep(2 * self.interval)
        tell(words)
        self._end(status)

    # --- files ---------------------------------------------------------------------------------

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.json"

    def _mine(self) -> Report:
        return report_of(self._index, *self._place, self._beat, self._run_number)

    def _write(self) -> None:
        self._beat += 1
        self._mine().write(self._file(self._index))

    def _others(self) -> list[Report]:
        indices = (index for index in range(self._count) if index != self._index)
        found = [self._read(self._file(index)) for index in indices]
        return [report for report in found if report is not None]

    def _failed(self) -> Report | None:
        """What another process of this start of the run wrote of its own error."""
        report = self._read(self._folder / FAILED) if self._count > 1 else None
        return None if report is None or report.index == self._index else report

    def _read(self, path: Path) -> Report | None:
        report = read_report(path)
        return None if report is None or report.run != self._run_number else report


def _is_of_a_collective(error: Exception) -> bool:
    """Whether JAX raised it, or what it comes from: a ValueError or a RuntimeError of its own."""
    cause: BaseException | None = error
    while cause is not None:
        frames = tracebacks.extract_tb(cause.__traceback__)
        ours = frames and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)
        # Words of our own, such as the name of a file, say nothing.
        if not ours and any(word in str(cause).lower() for word in COLLECTIVE):
            return True
        cause = cause.__cause__
    return False
