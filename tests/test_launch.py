"""Every launch script opens, and hands its arguments on unchanged."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

PRINT_ARGUMENTS = """#!/usr/bin/env bash
printf '%s\\n' "$@"
exit 7
"""


def start(script: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [str(script), *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def test_there_is_a_script():
    assert LAUNCH / "local.sh" in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_stops_at_the_first_error_and_explains_itself(script):
    assert "set -euo pipefail" in script.read_text()
    asked = start(script, "--help")
    assert asked.returncode == 0
    assert asked.stdout.startswith(f"Usage: launch/{script.name} ")


def test_local_without_arguments_shows_its_usage_and_fails():
    asked = start(LAUNCH / "local.sh")
    assert asked.returncode == 2
    assert "Usage:" in asked.stderr


def test_local_hands_arguments_and_exit_status_on(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRINT_ARGUMENTS)
    python.chmod(0o755)
    arguments = ["--config", "my configs/a.py", "--workdir", "run 1", "--config.train.steps=3"]
    run = start(LAUNCH / "local.sh", *arguments, PYTHON=str(python))
    assert run.stdout.splitlines() == ["-m", "ccl_jax.main", "--job", "train", *arguments]
    assert run.returncode == 7
