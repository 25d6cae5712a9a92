"""Every launch script opens, and hands its arguments on unchanged."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_main import tiny

from ccl_jax import main

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ARGUMENTS = ["--config", "my configs/a.py", "--workdir", "run 1", "--config.train.steps=3"]

PRINT_ARGUMENTS = """#!/usr/bin/env bash
printf '%s\\n' "$@"
exit 7
"""
PRINT_PLACE = """#!/usr/bin/env bash
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"
echo "$JAX_NUM_CPU_DEVICES $JAX_PLATFORMS"
printf '%s\\n' "$@"
"""
WAIT_FOR_SIGNAL = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
trap 'echo saved; exit 130' INT
echo ready
for _ in {1..300}; do sleep 0.1; done
"""
ONE_IS_LOST = """#!/usr/bin/env bash
if [[ $JAX_PROCESS_ID == 1 ]]; then kill -KILL $$; fi
trap 'echo saved; exit 143' TERM
for _ in {1..300}; do sleep 0.1; done
"""
ONE_IS_LOST_ONE_HANGS = """#!/usr/bin/env bash
if [[ $JAX_PROCESS_ID == 1 ]]; then exit 9; fi
trap '' TERM
for _ in {1..300}; do sleep 0.1; done
"""


@pytest.fixture
def python(tmp_path):
    """Writes a program that stands in for the interpreter, and returns its path."""

    def write(program: str) -> str:
        path = tmp_path / "python"
        path.write_text(program)
        path.chmod(0o755)
        return str(path)

    return write


def start(script: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [str(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_there_is_a_script_for_every_place():
    names = {path.name for path in LAUNCH.iterdir()}
    assert names == {
        "benchmark.sh",
        "local.sh",
        "multiprocess_cpu.sh",
        "slurm.sbatch",
        "kubernetes_jobset.yaml",
        "tpu_pod.sh",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_stops_at_the_first_error_and_explains_itself(script):
    assert "set -euo pipefail" in script.read_text()
    asked = start(script, "--help")
    assert asked.returncode == 0
    assert asked.stdout.startswith(f"Usage: launch/{script.name} ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_without_arguments_shows_its_usage_and_fails(script):
    asked = start(script)
    assert asked.returncode == 2
    assert "Usage:" in asked.stderr


def test_local_hands_arguments_and_exit_status_on(python):
    run = start(LAUNCH / "local.sh", *ARGUMENTS, PYTHON=python(PRINT_ARGUMENTS))
    assert run.stdout.splitlines() == ["-m", "ccl_jax.main", "--job", "train", *ARGUMENTS]
    assert run.returncode == 7


@pytest.mark.parametrize(
    "wrong",
    [["--processes", "0"], ["--processes"], ["--processes", "2", "--devices-per-process", "x"], []],
)
def test_processes_that_cannot_be_counted_are_refused(wrong):
    asked = start(LAUNCH / "multiprocess_cpu.sh", *wrong)
    assert asked.returncode == 2
    assert "--processes N" in asked.stderr


def test_every_process_has_its_number_the_devices_and_the_arguments(python):
    run = start(
        LAUNCH / "multiprocess_cpu.sh",
        *["--processes", "3", "--devices-per-process", "2", *ARGUMENTS],
        PYTHON=python(PRINT_PLACE),
    )
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert len({line.partition(" at ")[2] for line in lines if " at " in line}) == 1
    for number in range(3):
        place, *rest = [line[4:] for line in lines if line.startswith(f"[{number}] ")]
        assert re.fullmatch(rf"{number} of 3 at localhost:\d+", place)
        assert rest == ["2 cpu", "-m", "ccl_jax.main", "--job", "train", *ARGUMENTS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_every_process_once_and_its_status_comes_back(python, number):
    script = subprocess.Popen(
        [LAUNCH / "multiprocess_cpu.sh", "--processes", "2", *ARGUMENTS],
        env=os.environ | {"PYTHON": python(WAIT_FOR_SIGNAL)},
        stdout=subprocess.PIPE,
        text=True,
    )
    ready = [script.stdout.readline() for _ in range(2)]
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    script.send_signal(number)
    output, _ = script.communicate(timeout=120)
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
    assert script.returncode == 128 + number


def test_others_are_stopped_where_one_process_is_lost(python):
    begin = time.monotonic()
    run = start(
        LAUNCH / "multiprocess_cpu.sh",
        *["--processes", "2", "--grace", "1", *ARGUMENTS],
        PYTHON=python(ONE_IS_LOST),
    )
    assert run.returncode == 128 + signal.SIGKILL
    assert run.stdout == "[0] saved\n"
    assert time.monotonic() - begin >= 1  # the program itself would end after 30, with 0


def test_process_that_hangs_is_killed_after_another_was_lost(python):
    run = start(
        LAUNCH / "multiprocess_cpu.sh",
        *["--processes", "2", "--grace", "1", *ARGUMENTS],
        PYTHON=python(ONE_IS_LOST_ONE_HANGS),
    )
    assert run.returncode == 9


@pytest.mark.slow
def test_two_processes_train_stop_on_a_signal_and_the_same_command_goes_on(photos, tmp_path):
    workdir = tmp_path / "run"
    settings = {"train.steps": 12, "train.log_every": 1, "run.devices": 0, "eval.every_steps": 0}
    command = [
        *(LAUNCH / "multiprocess_cpu.sh", "--processes", "2", "--devices-per-process", "2"),
        *tiny(photos, workdir, **settings)[1:],
    ]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHON": sys.executable,
    }
    begin = {"env": environment, "cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **begin) as script:
        log = workdir / "log" / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            assert script.poll() is None, script.stdout.read()
            time.sleep(0.1)
        script.send_signal(signal.SIGTERM)
        output, _ = script.communicate(timeout=300)
    assert script.returncode == 143, output
    (saved,) = re.findall(r"^\[0\] SIGTERM: saved step (\d+) of 12", output, re.MULTILINE)
    with subprocess.Popen(command, **begin) as script:
        output, _ = script.communicate(timeout=600)
    assert script.returncode == 0, output
    assert f"on 4 x cpu in 2 processes, continuing at step {saved}\n" in output
    assert (workdir / "evaluation" / "12" / "results.json").exists()


TPU = {"TPU_NAME": "ccl", "ZONE": "us-east5-b", "PROJECT": "mine"}
WHERE = "--project=mine --zone=us-east5-b --worker=all"
# Runs what it is told to on "the host", which is the folder that it is started in.
GCLOUD = """#!/usr/bin/env bash
for argument; do
  case $argument in
    --command=*) HOME=$PWD exec bash -c "${argument#--command=}" ;;
  esac
done
"""


def test_tpu_pod_prints_the_commands_in_a_dry_run():
    install = start(LAUNCH / "tpu_pod.sh", "--dry-run", "--install", **TPU).stdout.splitlines()
    assert len(install) == 3
    names = ("pyproject.toml", "README.md", "LICENSE", "ccl_jax", "configs")
    sources = " ".join(str(ROOT / name) for name in names)
    assert install[1].strip() == (
        f"gcloud compute tpus tpu-vm scp --recurse {sources} ccl:ccl_jax/ {WHERE}"
    )
    train = start(LAUNCH / "tpu_pod.sh", "--dry-run", *ARGUMENTS, **TPU)
    assert train.returncode == 0
    assert train.stdout.startswith(f"gcloud compute tpus tpu-vm ssh ccl {WHERE} --command=")
    stop = start(LAUNCH / "tpu_pod.sh", "--dry-run", "--stop", **TPU)
    assert "kill" in stop.stdout


@pytest.mark.parametrize("missing", list(TPU))
def test_tpu_pod_names_the_variable_that_is_missing(missing):
    asked = start(LAUNCH / "tpu_pod.sh", *ARGUMENTS, **(TPU | {missing: ""}))
    assert asked.returncode == 2
    assert asked.stderr.startswith(f"{missing} is not set")


def test_tpu_pod_hands_arguments_on_through_two_shells_and_stops_what_it_started(tmp_path):
    host = tmp_path / "ccl_jax"
    interpreter = host / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(PRINT_ARGUMENTS)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gcloud").write_text(GCLOUD)
    for program in (interpreter, tools / "gcloud"):
        program.chmod(0o755)

    def call(*arguments: str, **settings):
        environment = os.environ | TPU | {"PATH": f"{tools}:{os.environ['PATH']}"}
        command = [str(LAUNCH / "tpu_pod.sh"), *arguments]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, **settings
        )

    run = call(*ARGUMENTS)
    output, _ = run.communicate(timeout=120)
    cluster = "--config.run.cluster=gcetpu"
    assert output.splitlines() == ["-m", "ccl_jax.main", "--job", "train", cluster, *ARGUMENTS]
    assert run.returncode == 7

    interpreter.write_text(WAIT_FOR_SIGNAL)
    run = call(*ARGUMENTS)
    assert run.stdout.readline() == "ready\n"
    stop = call("--stop")
    assert stop.communicate(timeout=120) == ("", None)
    assert stop.returncode == 0
    output, _ = run.communicate(timeout=120)
    assert output == "saved\n"
    assert run.returncode == 143


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((LAUNCH / "kubernetes_jobset.yaml").read_text())


def job_of(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]["containers"][0]


def test_jobset_is_valid_and_has_no_key_that_the_schema_lacks(manifest):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    # Keys that it does not know are dropped, and come back as a difference.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


def test_jobset_with_a_mistake_is_told_from_a_valid_one(manifest):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    mistyped = yaml.safe_load(yaml.safe_dump(manifest).replace("completionMode", "completionmode"))
    assert JobsetV1alpha2JobSet.from_dict(mistyped).to_dict() != mistyped
    wrong = yaml.safe_load(yaml.safe_dump(manifest).replace("parallelism: 2", "parallelism: two"))
    with pytest.raises(ValueError, match="parallelism"):
        JobsetV1alpha2JobSet.from_dict(wrong)


def test_jobset_tells_every_pod_the_coordinator_the_number_and_its_own(manifest):
    job, name = job_of(manifest), manifest["metadata"]["name"]
    workers = manifest["spec"]["replicatedJobs"][0]
    environment = {entry["name"]: entry for entry in container_of(manifest)["env"]}
    port = container_of(manifest)["ports"][0]["containerPort"]
    assert job["completionMode"] == "Indexed"
    assert workers["replicas"] == 1
    assert job["completions"] == job["parallelism"]
    assert environment["JAX_NUM_PROCESSES"]["value"] == str(job["completions"])
    # Pods are called JOBSET-REPLICATEDJOB-JOB-POD, in the JobSet's own domain.
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == (
        f"{name}-{workers['name']}-0-0.{name}:{port}"
    )
    assert "job-completion-index" in str(environment["JAX_PROCESS_ID"]["valueFrom"])


def test_jobset_starts_again_after_everything_but_an_error(manifest):
    job, policy = job_of(manifest), manifest["spec"]["failurePolicy"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container_of(manifest)["name"]
    assert rule["onExitCodes"]["values"] == [1, 2]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # or podFailurePolicy is refused
    (fail,) = policy["rules"]
    assert (fail["action"], fail["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0


def test_command_line_of_the_jobset_can_be_read(manifest):
    container = container_of(manifest)
    assert container["command"][:3] == ["python", "-m", "ccl_jax.main"]
    words = [*container["command"][2:], *container["args"]]
    here = [word.replace("=configs/", f"={ROOT}/configs/") for word in words]
    config, workdir, job = main.parse(here)
    assert job == "train"
    assert config.data.root.startswith(container["volumeMounts"][0]["mountPath"])
    assert workdir.is_relative_to(container["volumeMounts"][0]["mountPath"])


def test_options_of_the_batch_script_let_it_come_back():
    options = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120"} <= set(options)
