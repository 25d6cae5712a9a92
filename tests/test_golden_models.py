"""Encoders and whole networks compute what the original computes (float32 and float64)."""

import numpy as np
import pytest

from tests.reference.compare import encoder_differences, network_differences, worst
from tests.reference.goldens import Golden, names

# The original's own rounding: its float32 run is up to 9.1e-7 (encoders, evaluation), 1.8e-6
# (evaluation with projector) and 4.4e-5 (training: tiny batches leave some channels almost
# constant) away from its float64 run. The reference's README calls ten to twenty times that real.
EVALUATION, TRAINING = 2e-5, 1e-3
FLOAT64 = 1e-8  # said there to be attainable; we are at 3e-13


def encoders() -> list[str]:
    return [name for name in names("teacher_*") if "resnet" in Golden(name).meta["model"]]


def networks() -> list[str]:
    return names("rd_*")


def in_float64(found: list[str]) -> list:
    """One evaluation, and the training mode with everything in it, by default; the rest slow."""
    chosen = ("rd_lgc_dp0_eval", "rd_lgc_dp1_train_noise")
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in found
    ]


def tolerance(name: str) -> float:
    return TRAINING if Golden(name).meta["mode"] == "train" else EVALUATION


def test_there_are_goldens_to_compare_with():
    assert encoders() and networks()


@pytest.mark.parametrize("name", encoders())
@pytest.mark.parametrize("f64", [False, True])
def test_encoder_maps_are_the_originals(name, f64):
    differences = encoder_differences(name, f64=f64)
    assert len(differences) == 3
    assert worst(differences)[1] < (FLOAT64 if f64 else EVALUATION), differences


@pytest.mark.parametrize("name", networks())
def test_every_output_and_statistic_is_the_originals(name):
    differences = network_differences(name, f64=False)
    assert differences.keys() == {k for k in Golden(name) if "num_batches" not in k}
    assert worst(differences)[1] < tolerance(name), worst(differences)


@pytest.mark.parametrize("name", in_float64(networks()))
def test_every_output_and_statistic_is_the_originals_in_float64(name):
    differences = network_differences(name, f64=True)
    assert worst(differences)[1] < FLOAT64, worst(differences)


def test_a_difference_would_be_seen():
    name = networks()[0]
    golden = Golden(name)
    key = "feats_s2"
    want, _ = golden.recorded(key, np.zeros(golden.meta["arrays"][key]["shape"]), f64=False)
    assert np.linalg.norm(want) > 0
    assert golden.difference(key, np.zeros(golden.meta["arrays"][key]["shape"])) == 1.0
