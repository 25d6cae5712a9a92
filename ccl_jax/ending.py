"""The end of a process that hangs: how long it has stood still, last words, and the end itself."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

FAILED_TOO = 1  # exit status where another process of the run ended with an error of its own
STALLED = 70  # that of a process that ends because nothing goes on, or another one is lost
_PATIENCE = 10.0  # seconds for writing to standard error, which may lie on a disk that hangs


class Idle:
    """Counts for how long there was no move; asked every `interval` seconds or so.

    A gap between two questions is one in which this process was stopped, and not one of waiting.
    """

    def __init__(self, clock: Callable[[], float], interval: float) -> None:
        self._clock, self._longest = clock, 2 * interval
        self._last, self._seen = clock(), 0
        self.seconds = 0.0

    def count(self, moves: int) -> bool:
        """Takes note of the number of moves so far; whether there was one since the last time."""
        now = self._clock()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
        if moves == self._seen:
            return False
        self._seen, self.seconds = moves, 0.0
        return True


def tell(text: str) -> None:
    """Writes to standard error, if that can be done: whoever cannot be told must end all the same.

    A closed standard error, a full disk or one that hangs is no reason to stay.
    """
    _try(lambda: print(f"\n{text}", file=sys.stderr, flush=True))


def end_process(status: int) -> None:
    """Ends this process from any thread; standard error gets the place of all if it has stalled."""
    if status == STALLED:
        _try(lambda: faulthandler.dump_traceback(all_threads=True))
    os._exit(status)


def _try(write: Callable[[], object]) -> None:
    """Calls what writes in a thread of its own, and waits for that, but not for ever."""

    def attempt() -> None:
        try:
            write()
        except (OSError, ValueError, AttributeError, RuntimeError):
            # Closed, full, away or None; there is no other place to say so.
            return

    thread = threading.Thread(target=attempt, name="last words", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
