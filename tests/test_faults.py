"""Two real processes of one training, of which one is killed, stopped, or asked to end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_photos
from test_main import tiny

from ccl_jax.checkpoint import Checkpoints
from ccl_jax.ending import FAILED_TOO, STALLED

pytestmark = pytest.mark.slow
ABORTED = -signal.SIGABRT  # by JAX, once its first process is gone


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Programs that the processes of all tests compile once."""
    return tmp_path_factory.mktemp("compiled")


class Pair:
    """Two processes that train in one folder; `output(n)` is what process n has said so far."""

    def __init__(self, folder, photos, compiled, workdir=None, **settings):
        self.workdir = workdir or folder / "run"
        settings = {
            "train.steps": 100000,
            "train.log_every": 1,
            "train.checkpoint_every": 5,
            "eval.every_steps": 0,
            "run.devices": 0,
        } | settings
        words = [sys.executable, "-m", "ccl_jax.main", *tiny(photos, self.workdir, **settings)[1:]]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.logs = [folder / f"output-{number}.txt" for number in range(2)]
        self.processes = []
        for number, log in enumerate(self.logs):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
                "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, number):
        return self.logs[number].read_text()

    def log_lines(self):
        log = self.workdir / "log/metrics.jsonl"
        return log.read_text().splitlines() if log.exists() else []

    def has_trained(self, lines, seconds=400):
        """Waits until the log has so many lines, whatever another start has left there."""
        end = time.monotonic() + seconds
        while len(self.log_lines()) < lines:
            assert all(process.poll() is None for process in self.processes), self.output(
                0
            ) + self.output(1)
            assert time.monotonic() < end, self.output(0) + self.output(1)
            time.sleep(0.2)

    def named(self, number):
        host = re.escape(socket.gethostname())
        return rf"process {number} \(pid {self.processes[number].pid} on {host}\)"


def test_a_signal_to_one_or_to_all_stops_all_after_the_same_step(photos, tmp_path, compiled):
    saved = []
    for asked in ([1], [0, 1]):
        with Pair(tmp_path, photos, compiled, **{"run.unfinished_exit_code": 75}) as pair:
            pair.has_trained(8 if not saved else saved[-1] + 4)
            for number in asked:
                pair.processes[number].send_signal(signal.SIGTERM)
                time.sleep(0.1)  # they do not reach all at the same moment
            codes = [process.wait(timeout=300) for process in pair.processes]
            assert codes == [75, 75], pair.output(0) + pair.output(1)
            (said,) = set(re.findall(r"SIGTERM: saved step (\d+) of", pair.output(0)))
            saved.append(int(said))
            assert f"--workdir {pair.workdir}" in pair.output(0).split("run the same command")[1]
        with Checkpoints(pair.workdir / "checkpoints") as checkpoints:
            assert checkpoints.latest == saved[-1]
        assert not list((pair.workdir / ".processes").glob("*.json"))
    assert saved[1] > saved[0] and f"continuing at step {saved[0]}" in pair.output(0)


def test_two_processes_complete_a_training_and_say_so_once(photos, tmp_path, compiled):
    with Pair(tmp_path, photos, compiled, **{"train.steps": 4, "eval.every_steps": 2}) as pair:
        codes = [process.wait(timeout=500) for process in pair.processes]
        assert codes == [0, 0], pair.output(0) + pair.output(1)
    mark = json.loads((pair.workdir / "complete.json").read_text())
    assert mark["step"] == 4 and 0 < mark["goodput"] < 1
    for step in (2, 4):
        assert (pair.workdir / f"evaluation/{step}/results.json").exists()
    lines = (pair.workdir / "log/metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    speeds = [line for line in log if "images_per_second" in line]
    assert [line["step"] for line in speeds] == [1, 2, 3, 4]
    for line in speeds:  # two processes with one device each
        assert line["images_per_second"] == pytest.approx(2 * line["images_per_second_per_device"])
    assert "**mean**" in pair.output(0) and "**mean**" not in pair.output(1)


def test_a_killed_process_ends_the_other_one_soon_and_is_named(photos, tmp_path, compiled):
    with Pair(tmp_path, photos, compiled) as pair:
        pair.has_trained(6)
        pair.processes[1].kill()
        # By itself: far earlier than `run.stall_seconds`, which is 600.
        assert pair.processes[0].wait(timeout=300) == STALLED, pair.output(0)
        assert re.search(f"lost {pair.named(1)}, which was .*, step", pair.output(0))
    with Checkpoints(pair.workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest is not None and checkpoints.latest >= 5


def test_without_the_first_process_the_other_one_ends_too(photos, tmp_path, compiled):
    with Pair(tmp_path, photos, compiled) as pair:
        pair.has_trained(6)
        pair.processes[0].kill()
        assert pair.processes[1].wait(timeout=300) in (STALLED, ABORTED), pair.output(1)
        by_us = re.search(f"lost {pair.named(0)}", pair.output(1))
        assert by_us or "leader task was preempted/died" in pair.output(1)


def test_a_stopped_process_ends_the_other_one_in_time_and_is_named(photos, tmp_path, compiled):
    limit = 60  # other tests on the same cores must not make it stall
    # JAX sends a sign of life at every half of `heartbeat_seconds`, so it gives a process up after
    # the half at the earliest: here it must not come before.
    limits = {"run.stall_seconds": limit, "run.heartbeat_seconds": 600}
    with Pair(tmp_path, photos, compiled, **limits) as pair:
        pair.has_trained(6)
        pair.processes[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert pair.processes[0].wait(timeout=300) == STALLED, pair.output(0)
        assert limit / 2 < time.monotonic() - start
        assert re.search(f"{pair.named(1)} gives no sign of life", pair.output(0))
        assert re.search(f"waits for {pair.named(1)}.*: stopped or lost", pair.output(0))


def test_an_error_of_one_process_ends_both_and_the_other_one_names_it(tmp_path, compiled):
    photos = write_photos(tmp_path / "photos")
    with Pair(tmp_path, photos, compiled, **{"data.cache_gib": 0.0, "run.threads": 1}) as pair:
        pair.has_trained(4)
        (photos / "bolt/train/good/000.png").write_bytes(b"")  # one of the two meets it first
        codes = [process.wait(timeout=300) for process in pair.processes]
        said = [pair.output(number) for number in range(2)]
        assert codes == [1, FAILED_TOO], said
        assert [bool(re.search("fails: ValueError.*cannot be read", text)) for text in said].count(
            True
        ) == 1, said
        first = 0 if "fails: ValueError" in said[0] else 1
        assert re.search(rf"{pair.named(first)}.*ended with an error", said[1 - first]), said


def test_a_second_start_is_refused_in_both_processes_and_leaves_the_first_alone(
    photos, tmp_path, compiled
):
    second = tmp_path / "second"
    second.mkdir()
    with Pair(tmp_path, photos, compiled) as pair:
        pair.has_trained(4)
        with Pair(second, photos, compiled, workdir=pair.workdir) as other:
            codes = [process.wait(timeout=300) for process in other.processes]
            said = [other.output(number) for number in range(2)]
        assert codes == [1, 1], said
        assert "in use by another run" in said[0], said
        assert "refused to the first process" in said[1], said
        for number, process in enumerate(pair.processes):
            report = json.loads((pair.workdir / f".processes/{number}.json").read_text())
            assert report["pid"] == process.pid
        pair.has_trained(len(pair.log_lines()) + 2)
