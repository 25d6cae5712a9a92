"""Evaluations of equal maps are equal bit for bit, on any number of devices and processes."""

import json
import os
import socket
import subprocess
import sys

import exact_evaluation as exact
import numpy as np
import pytest
from conftest import ROOT, write_photos

from ccl_jax import mesh


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve test images, so that the second batch of eight is half empty."""
    return write_photos(tmp_path_factory.mktemp("photos"), train=1, test=3)


@pytest.fixture(scope="module")
def alone(photos):
    """What one device finds."""
    return exact.leaves_of(exact.collected(photos, mesh.make_mesh(1)))


def same(one, other):
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and np.array_equal(value, other[name])
        for name, value in one.items()
    )


def test_every_image_has_its_own_scores(alone, photos):
    assert alone["['image_scores']"].shape == (12,)
    assert np.isfinite(alone["['image_scores']"]).all()
    counts = [alone[f"['counts'].{name}"] for name in ("normal", "anomalous", "region")]
    assert sum(counts[:2]).sum() == 12 * 64 * 64
    assert counts[2].sum() / 2**35 == pytest.approx(alone["['regions']"].sum(), abs=1e-5) == 6
    assert sum(name.startswith("['maps']") for name in alone) == 4


@pytest.mark.parametrize(("devices", "shards"), [(2, 1), (4, 1), (4, 2)])
def test_several_devices_find_what_one_finds(alone, photos, devices, shards):
    found = exact.collected(photos, mesh.make_mesh(devices, shards))
    assert same(exact.leaves_of(found), alone)


def start(photos, folder, number, port):
    environment = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "exact_evaluation", str(photos), str(folder)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_of_two_devices_find_what_one_device_finds(alone, photos, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(photos, tmp_path, number, port) for number in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    words = []
    for number, (process, (out, err)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, err
        with np.load(tmp_path / f"{number}/found.npz") as found:
            assert same(dict(found), alone), number
        words.append(out.rpartition("result ")[2].split())  # Gloo speaks before
    assert [word[0] for word in words] == ["True", "False"], "only the first process writes"
    expected = exact.results_in(tmp_path / "alone/7", photos, mesh.make_mesh(1))
    written = json.loads((tmp_path / "0/evaluation/7/results.json").read_text())
    assert {float(word[1]) for word in words} == {expected["mean"]["pixel_aupro"]}
    for part in ("mean", "classes", "diagnostics", "conventions"):
        assert written[part] == json.loads(json.dumps(expected[part])), part
    assert len(list((tmp_path / "0/evaluation/7/figures/toy").iterdir())) == 2
