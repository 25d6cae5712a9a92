"""The published model at its published size: WideResNet-50-2 at 256x256."""

import jax
import numpy as np
import pytest
from conftest import ROOT

from ccl_jax import config as configs
from ccl_jax import mesh, setup
from ccl_jax.models.network import parameter_counts
from ccl_jax.scoring import architecture_of, map_settings_of, score_images
from ccl_jax.state import join


def test_the_mvtec_config_has_the_published_parameter_counts():
    config = configs.read_config_file(ROOT / "configs/mvtec.py")
    _, params, _ = architecture_of(config.to_dict()).abstract()
    assert parameter_counts(params) == {
        "encoder": 24_862_528,
        "projector": 15_486_912,
        "neck": 30_829_568,
        "decoder": 24_917_504,
    }


@pytest.mark.slow
def test_the_published_model_trains_a_step_and_scores_a_batch(tmp_path):
    config = configs.read_config_file(ROOT / "configs/mvtec.py")
    config.encoder.weights = "random"  # the published ones need the hub
    where = mesh.make_mesh(1)
    training = setup.set_up(config, tmp_path, where, 10, fresh=True)
    state = jax.jit(training.init)(training.key)
    images = np.random.default_rng(0).integers(0, 255, (2, 256, 256, 3)).astype(np.uint8)
    batch = mesh.put_batch({"image": images, "label": np.array([0, 1], np.int32)}, where)
    state, scalars = jax.jit(training.step, donate_argnums=0)(
        state, training.frozen, batch, np.int32(0)
    )
    assert int(state.step) == 1
    assert all(np.isfinite(value) for value in scalars.values())
    scores = score_images(
        training.graphdef,
        *join(training.frozen, state.params, state.batch_stats),
        batch["image"],
        settings=map_settings_of(config.to_dict()),
    )
    assert scores.maps.shape == (2, 256, 256)
    assert scores.images.shape == (2,)
    assert scores.codes.shape == (2, 2048)
    assert np.isfinite(scores.maps).all()
