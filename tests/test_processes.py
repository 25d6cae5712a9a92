"""Two processes, with a state that lies over all their devices, train and evaluate as one does."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_main import tiny

from ccl_jax.main import main
from tests.reference import equality


def log_of(workdir):
    lines = (workdir / "log/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_one_goes_on_where_they_stopped(photos, tmp_path):
    settings = {"train.log_every": 1, "train.checkpoint_every": 1, "eval.every_steps": 0}
    together = {"run.devices": 0, "run.parameter_shards": 4, "train.steps": 2}
    command = [str(ROOT / "launch/multiprocess_cpu.sh"), "--processes", "2"]
    command += ["--devices-per-process", "2"]
    words = tiny(photos, tmp_path / "two", **settings, **together)[1:]
    run = subprocess.run(
        [*command, *words], env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 steps of 4 images" in run.stdout and "on 4 x cpu in 2 processes" in run.stdout
    assert run.stdout.count("| **mean**") == 1  # the first speaks for both
    assert main(tiny(photos, tmp_path / "one", **settings, **{"train.steps": 2})) == 0
    two, one = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    for name in ("loss", "local", "global", "cosine"):
        np.testing.assert_allclose(two[0][name], one[0][name], rtol=1e-5, err_msg=name)
        # The second step sees the first one's rounding, through Adam's division.
        np.testing.assert_allclose(two[1][name], one[1][name], rtol=2e-2, err_msg=name)
    results = [
        json.loads((tmp_path / name / "evaluation/2/results.json").read_text())
        for name in ("two", "one")
    ]
    assert [len(r["provenance"]["devices"]) for r in results] == [4, 1]
    for name, value in results[1]["classes"].items():
        assert results[0]["classes"][name]["n_anomalous"] == value["n_anomalous"]

    # Saved by two processes and split four ways; read by one process and device.
    shutil.rmtree(tmp_path / "two/checkpoints/2")
    assert main(tiny(photos, tmp_path / "two", **settings, **{"train.steps": 2})) == 0
    again = [line for line in log_of(tmp_path / "two") if "loss" in line]
    assert [line["step"] for line in again] == [1, 2]
    np.testing.assert_allclose(again[1]["loss"], two[1]["loss"], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_in_four_processes_compute_what_one_does_in_float64(capfd):
    words = ["--grid", "4x2", "--dtypes", "float64", "--encoder", "resnet10"]
    assert equality.main(words) == 0, capfd.readouterr().err


def test_differences_that_the_dtype_does_not_explain_are_named():
    rows = {"local, batch; mixed: gradient": 2e-11, "training: gradients": 1e-13}
    differences = {(1, 1, "float64"): dict.fromkeys(rows, 0.0), (2, 4, "float64"): rows}
    assert equality.too_large(differences, "float64") == []
    rows["training: gradients"] = 3e-10
    assert equality.too_large(differences, "float64") == [
        "training: gradients, 2 processes, 4 devices: 3.0e-10"
    ]
