import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import jobs, losses, mesh, settings
from ccl_jax.augment import Recipe
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.state import init_state, obtain_encoder, purpose_key
from ccl_jax.train import StopRequest, make_train_step

ROOT_KEY = jax.random.key(0)


def make_step(config, **changes):
    graphdef, *_ = settings.architecture_of(config).abstract()
    return make_train_step(
        graphdef,
        settings.optimizer_of(config, 10),
        dataclasses.replace(settings.loss_settings(config), **changes),
        Recipe(**config.augment.to_dict()),
        noise_probability=config.model.noise_probability,
        root=ROOT_KEY,
    )


def start(config, tmp_path, where):
    architecture = settings.architecture_of(config)
    frozen, _ = obtain_encoder(tmp_path / "encoder", "random", architecture, ROOT_KEY)
    optimizer = settings.optimizer_of(config, 10)
    state = jax.jit(
        lambda key: init_state(architecture, optimizer, key), out_shardings=mesh.replicated(where)
    )(ROOT_KEY)
    return state, jax.device_put(frozen, mesh.replicated(where))


def batch(number=4):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 255, (number, 64, 64, 3)).astype(np.uint8)
    return {"image": images, "label": (np.arange(number) % 2).astype(np.int32)}


def run_steps(config, tmp_path, devices, steps=2, **changes):
    where = mesh.make_mesh(devices)
    state, frozen = start(config, tmp_path, where)
    step = jax.jit(make_step(config, **changes))
    scalars = {}
    for position in range(steps):
        position = jax.device_put(np.int32(position), mesh.replicated(where))
        state, scalars = step(state, frozen, mesh.put_batch(batch(), where), position)
    return state, jax.device_get(scalars)


def largest_difference(one, other):
    differences = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one, other
    )
    return max(jax.tree.leaves(differences))


@pytest.mark.slow
def test_four_devices_compute_what_one_computes(tiny_config, tmp_path):
    one, scalars = run_steps(tiny_config, tmp_path, 1)
    four, other_scalars = run_steps(tiny_config, tmp_path, 4)
    for name, value in scalars.items():
        np.testing.assert_allclose(other_scalars[name], value, rtol=2e-3, err_msg=name)
    assert largest_difference(one.batch_stats, four.batch_stats) < 1e-3
    # Adam turns rounding into steps of up to the rate, so weights are compared by their mean.
    means = [
        np.array([np.mean(np.abs(leaf)) for leaf in jax.tree.leaves(s.params)]) for s in (one, four)
    ]
    np.testing.assert_allclose(means[0], means[1], rtol=2e-2, atol=1e-3)


def test_a_step_moves_the_trained_parts_and_counts_itself(tiny_config, tmp_path):
    where = mesh.make_mesh(1)
    before, _ = start(tiny_config, tmp_path, where)
    after, scalars = run_steps(tiny_config, tmp_path, 1)
    assert int(after.step) == 2
    assert set(scalars) == {"loss", "cosine", "local", "global", "gradient_norm"}
    assert all(np.isfinite(value) for value in scalars.values())
    total = scalars["cosine"] + scalars["local"] + scalars["global"]
    np.testing.assert_allclose(scalars["loss"], total, rtol=1e-5)
    for part in ("projector", "neck", "decoder"):
        assert largest_difference(before.params[part], after.params[part]) > 1e-4, part
    assert "encoder" not in after.params


@pytest.fixture
def brittle_loss(monkeypatch):
    """A cosine loss that is infinite for targets beyond 1e6; `overflowing` makes such targets.

    NaN would not do: XLA compiles a ReLU for the CPU that turns it into 0.
    """
    honest = losses.cosine_distillation_loss

    def brittle(targets, rebuilt, *, flat):
        return honest(targets, rebuilt, flat=flat) / (targets[0].max() < 1e6)

    monkeypatch.setattr(losses, "cosine_distillation_loss", brittle)


def overflowing(frozen, when=True):
    return jax.tree.map(lambda leaf: jnp.where(when, 1e4 * leaf, leaf), frozen)


def test_a_loss_that_is_not_finite_freezes_the_state_from_then_on(
    tiny_config, tmp_path, brittle_loss
):
    where = mesh.make_mesh(1)
    state, frozen = start(tiny_config, tmp_path, where)
    step = jax.jit(make_step(tiny_config))
    images = mesh.put_batch(batch(), where)
    state, _ = step(state, frozen, images, jnp.int32(0))
    after, scalars = step(state, overflowing(frozen), images, jnp.int32(1))
    assert not np.isfinite(scalars["loss"])
    assert largest_difference(state, after) == 0
    later, scalars = step(after, frozen, images, jnp.int32(2))
    assert np.isfinite(scalars["loss"])  # the batch is good, but the state lags behind it
    assert largest_difference(state, later) == 0


def test_the_run_stops_at_a_bad_step_and_names_step_and_term(
    tiny_config, tmp_path, monkeypatch, brittle_loss
):
    honest = jobs.make_train_step

    def poisoned(*args, **kwargs):
        step = honest(*args, **kwargs)
        return lambda state, frozen, batch, position: step(
            state, overflowing(frozen, position == 2), batch, position
        )

    monkeypatch.setattr(jobs, "make_train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 3: not finite: 'cosine' = inf") as error:
        jobs.train_job(tiny_config, tmp_path / "run")
    assert "state after step 2 was kept" in str(error.value)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 2


def leaves_of(workdir, config, step):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        architecture = settings.architecture_of(config)
        optimizer = settings.optimizer_of(config, config.train.steps)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one),
            jax.eval_shape(lambda key: init_state(architecture, optimizer, key), ROOT_KEY),
        )
        return jax.tree.leaves(jax.device_get(checkpoints.restore(step, abstract)))


def test_stop_and_resume_equals_straight_through_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    assert jobs.train_job(tiny_config, tmp_path / "straight") == 0

    honest = jobs.RunLog.advance

    def interrupting(self, step):
        honest(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(jobs.RunLog, "advance", interrupting)
        assert jobs.train_job(tiny_config, tmp_path / "stopped") == 128 + signal.SIGTERM
    with Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 3
    assert not (tmp_path / "stopped" / "evaluation").exists()
    assert jobs.train_job(tiny_config, tmp_path / "stopped") == 0

    straight = leaves_of(tmp_path / "straight", tiny_config, 4)
    resumed = leaves_of(tmp_path / "stopped", tiny_config, 4)
    assert all(np.array_equal(a, b) for a, b in zip(straight, resumed, strict=True))
    scores = [
        json.loads((tmp_path / name / "evaluation/4/results.json").read_text())["classes"]
        for name in ("straight", "stopped")
    ]
    assert scores[0] == scores[1]
    lines = (tmp_path / "stopped/log/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]


def test_a_signal_is_noted_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before  # the second Ctrl-C acts as usual
    assert signal.getsignal(signal.SIGINT) is before


def test_keys_differ_by_purpose_and_step_and_repeat_otherwise():
    keys = [
        tuple(jax.random.key_data(purpose_key(ROOT_KEY, purpose, step)).tolist())
        for purpose in ("noise", "negatives")
        for step in (0, 1)
    ]
    assert len(set(keys)) == 4
    again = jax.random.key_data(purpose_key(ROOT_KEY, "noise", 0)).tolist()
    assert tuple(again) == keys[0]
