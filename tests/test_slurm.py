"""A real SLURM of one node: a job is stopped, saves, is requeued, resumes, and completes."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin"
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "srun")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
STEPS = 12
# Small enough for two processes on two cores.
DEMO = [
    "--config=configs/demo.py",
    "--config.synthetic.image_size=64",
    "--config.synthetic.train_per_class=4",
    "--config.synthetic.test_normal_per_class=1",
    "--config.synthetic.test_per_defect=1",
    "--config.data.image_size=64",
    f"--config.train.steps={STEPS}",
    "--config.model.projector=depthwise",
    "--config.train.batch_size=4",
    "--config.train.checkpoint_every=2",
    "--config.train.keep_checkpoints=100",
    "--config.eval.batch_size=16",
    "--config.eval.figures_per_class=0",
    "--config.run.tensorboard=False",
    "--config.run.progress=False",
]
SAVES_WHEN_STOPPED = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
echo ready
for _ in {1..600}; do sleep 0.1; done
"""
NEVER_DONE = "#!/usr/bin/env bash\nexit 143\n"
LOST_PROCESS = """#!/usr/bin/env bash
if [[ $SLURM_PROCID == 1 ]]; then kill -KILL $$; fi
sleep 2
exit 70
"""
ERROR_OF_ONE = """#!/usr/bin/env bash
if [[ $SLURM_PROCID == 1 ]]; then exit 1; fi
sleep 1
exit 70
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"{', '.join(MISSING)} missing: apt-get install slurm-wlm munge"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons have to be started by root"),
]


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs a command of the cluster and returns what it prints."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"PATH": PATH}
    up = subprocess.run([CLUSTER, "up", folder], env=environment, capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    environment["SLURM_CONF"] = up.stdout.strip().rpartition("=")[2]

    def run(*command: str, **settings: str) -> str:
        return subprocess.run(
            command,
            env=environment | settings,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    yield run
    subprocess.run([CLUSTER, "down", folder], env=environment, check=True)
    assert not list(folder.glob("*.pid"))


class Job:
    """A training that sbatch was given."""

    def __init__(self, slurm: Callable[..., str], log: Path, *arguments: str, **settings: str):
        self.slurm, self.log = slurm, log
        self.number = slurm(
            *("sbatch", "--parsable", "--ntasks=2", f"--output={log}", "launch/slurm.sbatch"),
            *arguments,
            **settings,
        ).strip()

    def says(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()

    def field(self, name: str) -> str:
        shown = self.slurm("scontrol", "show", "job", self.number)
        return re.search(rf"\b{name}=(\S+)", shown)[1]

    def is_over(self) -> bool:
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED")


def program(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_training_of_two_tasks_is_stopped_requeued_resumed_and_completed(slurm, tmp_path):
    workdir = tmp_path / "run"
    job = Job(
        slurm,
        tmp_path / "log",
        *DEMO,
        f"--config.data.root={tmp_path / 'data'}",
        f"--workdir={workdir}",
        PYTHON=sys.executable,
        XLA_FLAGS="--xla_backend_optimization_level=0",  # compiles in half the time
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),  # and once
    )
    wait_until((workdir / "checkpoints" / "2").exists, "a checkpoint")
    slurm("scancel", "--signal=TERM", job.number)
    wait_until(lambda: job.says("status 143: requeued"), "requeued")
    wait_until(job.is_over, "over")
    log = job.log.read_text()
    saved = int(re.search(rf"SIGTERM: saved step (\d+) of {STEPS}", log)[1])
    resumed = int(re.search(r"continuing at step (\d+)", log)[1])
    assert 2 <= saved == resumed < STEPS
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0"), log
    assert job.field("Restarts") == "1"
    assert (workdir / "evaluation" / str(STEPS) / "results.json").exists()
    # Of two processes one speaks, of two starts each once.
    assert len(re.findall(r"training images of 10 classes", log)) == 2


def test_cancelled_job_saves_and_does_not_come_back(slurm, tmp_path):
    job = Job(slurm, tmp_path / "log", "x", PYTHON=program(tmp_path, SAVES_WHEN_STOPPED))
    wait_until(lambda: job.says("ready"), "ready", 60)
    slurm("scancel", job.number)
    wait_until(lambda: job.log.read_text().count("saved") == 2, "saved", 60)
    wait_until(lambda: job.field("JobState") == "CANCELLED", "cancelled", 60)
    assert job.field("Restarts") == "0"


def test_number_of_restarts_has_a_bound(slurm, tmp_path):
    job = Job(slurm, tmp_path / "log", "x", PYTHON=program(tmp_path, NEVER_DONE), MAX_RESTARTS="1")
    wait_until(job.is_over, "over", 120)
    assert (job.field("JobState"), job.field("Restarts")) == ("FAILED", "1")
    assert job.says("status 143 after 1 restarts: not requeued")


def test_lost_process_leaves_the_other_its_time_and_is_worth_a_restart(slurm, tmp_path):
    job = Job(
        slurm, tmp_path / "log", "x", PYTHON=program(tmp_path, LOST_PROCESS), MAX_RESTARTS="0"
    )
    wait_until(job.is_over, "over", 60)
    assert job.says("Exited with exit code 70")
    assert job.says("status 137 after 0 restarts: not requeued")


def test_error_of_one_task_is_not_tried_again(slurm, tmp_path):
    job = Job(slurm, tmp_path / "log", "x", PYTHON=program(tmp_path, ERROR_OF_ONE))
    wait_until(job.is_over, "over", 60)
    assert (job.field("JobState"), job.field("ExitCode")) == ("FAILED", "1:0")
    assert job.field("Restarts") == "0"
