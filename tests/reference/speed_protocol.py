"""Measurements in processes that stay alive: a line of JSON asks, a line of JSON answers.

Frameworks that are compared do not share a process: they would share threads and device memory. A
worker does nothing between two questions, so several can take turns on one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Does so many steps, returns once the device is done, and says what a comparison wants to know.
Job = Callable[[int], dict[str, Any]]

ROOT = Path(__file__).parents[2]


def serve(hello: Mapping[str, Any], jobs: Mapping[str, Job]) -> None:
    """Answers questions {"job", "steps"} on stdin until it ends; first of all it says `hello`.

    An answer is {"seconds", "cpu_seconds"} of wall and CPU time per step and what the job says, or
    {"error": text} where it failed. Whatever else is printed goes to stderr.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # libraries, and the compilers that they start, print there
        print(json.dumps(dict(hello)), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), jobs)), file=answers, flush=True)


def answer(question: Mapping[str, Any], jobs: Mapping[str, Job]) -> dict[str, Any]:
    """What `serve` says to one question."""
    steps = question["steps"]
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        said = jobs[question["job"]](steps)
    except Exception as error:  # every kind: the row of the table says which
        traceback.print_exc()
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall / steps, "cpu_seconds": cpu / steps, **said}


class Worker:
    """A process that `serve`s, started as `python -m MODULE OPTIONS`, with options in JSON."""

    def __init__(self, module: str, options: Mapping[str, Any]) -> None:
        self.module = module
        # Not three quarters of a GPU at once: what the program needs is what others do not get.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        try:
            self.hello = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, job: str, steps: int) -> dict[str, Any]:
        """The answer. Raises RuntimeError where the process ends instead of answering."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_read` says how it ended
            print(json.dumps({"job": job, "steps": steps}), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Ends the process and waits for it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.module} ended with status {self._process.wait()} and without an answer; "
                "what it printed is above."
            )
        return json.loads(line)
