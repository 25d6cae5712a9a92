"""A training that is asked to stop: Ctrl-C, or a scheduler's SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag, so that a run can save before it ends.

    A second signal acts as it would without this. Outside the main thread (some notebooks) Python
    allows no handlers, and signals act as usual.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
