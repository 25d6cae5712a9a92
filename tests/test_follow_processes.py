"""A training and its follower as two processes, each of them killed and started again."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_main import tiny

from ccl_jax.follow import COMPLETE, LOG, committed_steps

FOLLOW = ("--job=evaluate", "--config.eval.follow=true", "--config.eval.poll_seconds=0.5")


class Pair:
    """Starts either of them, and waits for what the follower logs."""

    def __init__(self, photos, folder):
        self.workdir = folder / "run"
        # More steps than it gets to: no training ends by itself, nor evaluates at its end.
        changes = {"train.steps": 1_000_000, "train.checkpoint_every": 2, "eval.every_steps": 0}
        self._train = tiny(photos, self.workdir, **changes)
        self._follow = ["main", f"--workdir={self.workdir}", *FOLLOW]
        self._environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        self._outputs = folder
        self._started = []

    def start(self, what):
        words = {"train": self._train, "follow": self._follow}[what]
        with (self._outputs / f"{what}.txt").open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ccl_jax.main", *words[1:]],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def close(self):
        for process in self._started:
            process.kill()  # nothing where it has ended

    def said(self, what):
        return (self._outputs / f"{what}.txt").read_text()

    def logged(self):
        """The steps in the log of the follower, in its order; a cut-off line is none."""
        path = self.workdir / LOG / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def wait_for(self, condition, process, seconds=240):
        until = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, self.said("follow") + self.said("train")
            assert time.monotonic() < until, self.said("follow") + self.said("train")
            time.sleep(0.1)


@pytest.fixture
def pair(photos, tmp_path):
    with contextlib.closing(Pair(photos, tmp_path)) as pair:
        yield pair


@pytest.mark.slow
def test_killed_trainings_and_killed_followers_go_on_to_the_end(pair):
    follower = pair.start("follow")
    pair.wait_for(lambda: "waiting for" in pair.said("follow"), follower)
    assert not pair.workdir.exists(), "a follower that only waits leaves nothing"
    trainer = pair.start("train")
    pair.wait_for(pair.logged, follower)
    assert trainer.poll() is None, "it was to be killed in the middle"
    trainer.kill()
    trainer.wait()

    trainer = pair.start("train")
    pair.wait_for(lambda: "continuing at step" in pair.said("train"), trainer)
    follower.kill()
    assert follower.wait() == -signal.SIGKILL
    before = pair.logged()
    follower = pair.start("follow")
    pair.wait_for(lambda: len(pair.logged()) > len(before), follower)
    assert pair.logged()[: len(before)] == before

    follower.terminate()
    assert follower.wait(timeout=120) == 128 + signal.SIGTERM
    trainer.terminate()
    assert trainer.wait(timeout=120) == 128 + signal.SIGTERM, pair.said("train")
    last = max(committed_steps(pair.workdir / "checkpoints"))
    (pair.workdir / COMPLETE).write_text(json.dumps({"step": last}))
    follower = pair.start("follow")
    assert follower.wait(timeout=240) == 0, pair.said("follow")

    assert f"its last step {last} is evaluated" in pair.said("follow")
    assert "damaged" not in pair.said("follow"), "a deletion was taken for damage"
    logged = pair.logged()
    assert len(logged) == len({*logged}) and max(logged) == last
    for step in logged:
        folder = pair.workdir / f"evaluation/{step}"
        assert json.loads((folder / "results.json").read_text())["step"] == step
        assert (folder / "report.html").exists()
        assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
def test_two_processes_follow_together(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "evaluation")
    (workdir / COMPLETE).write_text(json.dumps({"step": 4}))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--workdir", str(workdir), *FOLLOW, "--config.run.devices=0"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ccl_jax.main", *words],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["its last step 4 is evaluated" in out for out, _ in outputs] == [True, False]
    for step in (2, 4):
        ours, theirs = (
            json.loads((folder / f"evaluation/{step}/results.json").read_text())
            for folder in (workdir, trained)
        )
        assert len(ours["provenance"]["devices"]) == 2
        for name, row in theirs["classes"].items():
            assert ours["classes"][name] == pytest.approx(row, abs=1e-3), name
    lines = (workdir / LOG / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 2]
