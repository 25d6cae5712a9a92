"""We compute what the PyTorch twin computes, on weights and images that nobody recorded.

Both sides run in float64, where they differ by rounding alone and any other rule shows far above
it. That the twin computes what the original does is in test_twin_record.py.
"""

import importlib

import jax
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[reference]'")
compare_twin = importlib.import_module("tests.reference.compare_twin")  # imports torch at its top
steps = importlib.import_module("tests.reference.compare_twin_steps")
twin_step = importlib.import_module("tests.reference.twin_step")

# Measured: 1e-15. A count of pairs held in float64 instead of float32 shows at 2e-8.
LOSS = 1e-12
# Measured: 9e-15 in evaluation and 6e-13 in training, where a channel that is almost constant over
# the few positions of a deep map amplifies rounding.
FORWARD = 1e-11
# Measured: 4e-14, through the changed weights; the first step's are equal to 3e-15.
SCALARS = 1e-11
# Absolute. A gradient is rounded by some 1e-16; Adam divides it by no less than its epsilon, 1e-8,
# and multiplies by the rate, 5e-3. So right implementations may differ by 5e-11 in a weight, of the
# 5e-3 that it moves in a step; measured: 4e-11. A clip without PyTorch's 1e-6 shows at 1e-9.
TENSORS = 3e-10


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True), twin_step.one_thread():
        yield


def assert_close(differences, limit):
    assert differences
    assert {key: value for key, value in differences.items() if not value <= limit} == {}


@pytest.mark.parametrize("labels", compare_twin.LABELS.values(), ids=compare_twin.LABELS)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_contrastive_losses_and_gradients_are_the_twins(labels, temperature):
    assert_close(compare_twin.local_differences(labels, temperature), LOSS)
    for form in ("two_view", "second_release"):
        assert_close(compare_twin.global_differences(form, labels, temperature), LOSS)


@pytest.mark.parametrize("flat", [True, False])
def test_cosine_loss_and_gradients_are_the_twins(flat):
    assert_close(compare_twin.cosine_differences(flat=flat), LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("encoder", "projector"), compare_twin.ENCODERS)
def test_forward_pass_of_every_kind_of_block_is_the_twins(encoder, projector, training):
    found = compare_twin.forward_differences(encoder, projector, training=training)
    assert_close(found, FORWARD)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", steps.RECIPES.values(), ids=steps.RECIPES)
def test_training_steps_are_the_twins(recipe):
    scalars, tensors = steps.training_differences(recipe)
    assert_close(scalars, SCALARS)
    assert_close(tensors, TENSORS)
