"""A run that is asked to stop: Ctrl-C, a scheduler's SIGTERM, a cluster's notice of preemption."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

# What may ask a run to stop; without a handler each of them ends the process.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Stopped(KeyboardInterrupt):
    """Raised where a run that was asked to stop has nothing left to save, as Ctrl-C would be.

    Its text says what is on disk.
    """

    def __init__(self, received: signal.Signals, saved: str = "what was saved is safe") -> None:
        super().__init__(f"{received.name}: {saved}")
        self.signal = received


class StopRequest:
    """Turns signals into a flag, so that a run can save before it ends.

    A second signal acts as it would without this. Outside the main thread (some notebooks) Python
    allows no handlers, and signals act as usual. To be entered after jax.distributed is
    initialized, which may take SIGTERM for itself.
    """

    def __init__(self, signals: Sequence[str] = ("SIGINT", "SIGTERM")) -> None:
        self.signal: signal.Signals | None = None
        self._numbers = [signal.Signals[name] for name in signals]
        self._before: dict[signal.Signals, Any] = {}
        self._raises = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends by raising `Stopped`: nothing in it needs to be saved."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def check(self, saved: str = "what was saved is safe") -> None:
        """Raises `Stopped` where a signal has come; `saved` says what is on disk."""
        if self.signal is not None:
            raise Stopped(self.signal, saved)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        if self._raises:
            raise Stopped(self.signal)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
