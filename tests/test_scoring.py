"""Which library of XLA computes the convolutions of scoring."""

import jax
import numpy as np
import pytest

from ccl_jax import scoring
from ccl_jax.state import Architecture


@pytest.fixture
def asked_anew():
    """Lets the options be asked for, and forgets them again."""
    scoring.convolutions_on_all_cores.cache_clear()
    yield
    scoring.convolutions_on_all_cores.cache_clear()


def is_by_ynnpack(options):
    def convolve(maps, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(maps, kernel, (1, 1), "SAME", dimension_numbers=layout)

    arrays = np.ones((8, 32, 32, 64), np.float32), np.ones((3, 3, 64, 64), np.float32)
    program = jax.jit(convolve, compiler_options=dict(options) or None).lower(*arrays).compile()
    return "__ynn_fusion" in program.as_text()


def test_the_options_take_a_convolution_from_the_library_that_leaves_cores_idle(asked_anew):
    options = scoring.convolutions_on_all_cores()
    if not options or not is_by_ynnpack(()):
        pytest.skip("this XLA computes convolutions in another way")
    assert not is_by_ynnpack(options)


def test_options_that_xla_does_not_know_are_not_used(asked_anew, monkeypatch):
    monkeypatch.setattr(scoring, "EIGEN", (("xla_cpu_no_such_option", "1"),))
    assert scoring.convolutions_on_all_cores() == ()


def test_other_devices_get_no_options_of_cpus(asked_anew, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert scoring.convolutions_on_all_cores() == ()


@pytest.mark.parametrize(("encoder", "narrow"), [("resnet18", True), ("resnet50", False)])
def test_scoring_takes_the_options_for_encoders_of_few_channels(monkeypatch, encoder, narrow):
    monkeypatch.setattr(scoring, "compiled_scoring", lambda options: lambda *_, **__: options)
    _, params, stats = Architecture("rd", encoder, "plain", "float32").abstract()
    settings = scoring.MapSettings(64, 4.0, "add", "cosine", 1)
    images = np.zeros((1, 64, 64, 3), np.uint8)
    plain = getattr(scoring.score_images, "__wrapped__", scoring.score_images)  # no check of types
    taken = plain(None, params, stats, images, settings=settings)
    assert taken == (scoring.convolutions_on_all_cores() if narrow else ())
