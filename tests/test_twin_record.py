"""The PyTorch twin in tests/reference computes what was recorded from the original code.

In float64, where the two differ by rounding alone: this is what makes the twin a check of ours on
inputs that nobody recorded (test_twin.py).
"""

import importlib
import json

import pytest

from tests.reference import goldens

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[reference]'")
twin_record = importlib.import_module("tests.reference.twin_record")  # imports torch at its top
twin_step = importlib.import_module("tests.reference.twin_step")
twin_model = importlib.import_module("tests.reference.twin_model")

# The reference README calls 1e-8 attainable; measured: 9e-15 in evaluation, 2e-13 in training.
FORWARD = 1e-11
LOSS = 1e-13  # measured: 4e-16
# The README's criterion is 1e-6, as a change of 1e-13 in the images grows to 1e-11 in the losses
# and 3e-9 in the weights over these steps; measured: 1e-12 and 3e-11.
TRAJECTORY = 1e-8
CHEAP = ("rd_lgc_dp0_train", "rd_lgc_dp1_train")  # drawing a network's weights takes seconds


@pytest.fixture(autouse=True)
def one_thread():
    with twin_step.one_thread():
        yield


def assert_close(differences, limit):
    assert differences
    assert {key: value for key, value in differences.items() if not value <= limit} == {}


@pytest.mark.parametrize("table", twin_record.PROJECTORS)
def test_twin_has_the_names_and_shapes_of_the_released_checkpoint(table):
    rows = json.loads((goldens.OWN / "model_keys.json").read_text())[table]
    with torch.device("meta"):
        twin = twin_model.Twin("wide_resnet50_2", twin_record.PROJECTORS[table])
    have = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    assert have == {name: tuple(shape) for name, shape, *_ in rows}


@pytest.mark.parametrize("name", goldens.names("teacher_resnet*", "teacher_wide_resnet*"))
def test_encoder_of_the_twin_reproduces_the_record(name):
    assert_close(twin_record.encoder_differences(name), FORWARD)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow)
        for name in goldens.names("rd_*")
    ],
)
def test_network_of_the_twin_reproduces_the_record(name):
    assert_close(twin_record.network_differences(name), FORWARD)


@pytest.mark.parametrize("name", goldens.names("loss_*"))
def test_losses_of_the_twin_reproduce_the_record(name):
    assert_close(twin_record.loss_differences(name), LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("name", goldens.names("trajectory_rd_*"))
def test_training_of_the_twin_reproduces_the_recorded_steps(name):
    assert_close(twin_record.trajectory_differences(name), TRAJECTORY)
