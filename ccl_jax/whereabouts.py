"""Where the processes of a run are: what each tells the others in files that all see."""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from ccl_jax.atomic import write_atomically

COMPUTING = "computing"
FIRST = "computing the first steps"  # until one has ended


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a process is, when it said so, and which of its reports it is; or its error."""

    index: int
    host: str
    pid: int
    phase: str
    step: int | None
    time: float  # Unix seconds
    beat: int
    run: int = 0  # which start of the run it belongs to
    error: str = ""

    def __str__(self) -> str:
        return f"process {self.index} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        """Its phase, and the step if it has one."""
        return self.phase if self.step is None else f"{self.phase}, step {self.step}"

    @property
    def is_dead_here(self) -> bool:
        """Whether it ran on this host and is no more; False too where that cannot be told."""
        if self.host != socket.gethostname():
            return False
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # the latter: while it was read
            return Path("/proc/self").exists()  # only Linux lists its processes there
        return stat.rpartition(")")[2].split()[0] in "ZX"  # nobody has waited for it yet

    def write(self, path: Path) -> None:
        """Puts it in place of what the file was."""
        write_atomically(path, json.dumps(dataclasses.asdict(self)) + "\n")


def report_of(index: int, phase: str, step: int | None, beat: int, run: int = 0) -> Report:
    """Where this process is now."""
    return Report(
        index, socket.gethostname(), os.getpid(), phase, step, round(time.time(), 3), beat, run
    )


def read_report(path: Path) -> Report | None:
    """What a process wrote last; None where it has written nothing, or that cannot be read now.

    A network file system may be away for a while, and come back.
    """
    try:
        return Report(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # TypeError: by another version of this package
        return None


def behind(reports: Sequence[Report]) -> list[Report]:
    """Those that the others wait for; [] where all are at the same place."""
    if len({(report.step or 0, report.phase) for report in reports}) == 1:
        return []
    least = min(report.step or 0 for report in reports)
    last = [report for report in reports if (report.step or 0) == least]
    return [report for report in last if report.phase not in (COMPUTING, FIRST)] or last
