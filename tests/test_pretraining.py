import dataclasses
import hashlib
import math
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ccl_jax import main, mesh
from ccl_jax.models.initial import Draws
from ccl_jax.models.pretrained import load_encoder
from ccl_jax.models.trees import flatten, load_tree, read_made
from ccl_jax.pretraining import probe
from ccl_jax.pretraining.images import Batch
from ccl_jax.pretraining.learn import (
    Classifier,
    Plan,
    Recipe,
    abstract_encoder,
    init_state,
    learning_rate,
    make_optimizer,
    make_step,
    shared_cross_entropy,
)
from ccl_jax.pretraining.run import WEIGHTS, Look, as_json, check_recipe, mean_of, pretrain
from ccl_jax.pretraining.weights import digest_of, write_weights
from ccl_jax.signals import StopRequest

ROOT = Path(__file__).parent.parent

TINY = Recipe(
    architecture="resnet18",
    compute_dtype="float32",
    seed=0,
    kinds=("gratings", "tiles"),
    per_kind=3,
    image_size=32,
    composite=True,
    dense=True,
    head_weights=(0.3, 0.0, 1.0),
    label_smoothing=0.1,
    batch_size=8,
    lr=1e-3,
    weight_decay=0.05,
    warmup_steps=1,
)
PLAN = Plan(steps=4, decay_share=0.5, checkpoint_every=10, log_every=2)


class StopAfter(StopRequest):
    """A request that comes during step number `steps` of a call, 0 for never."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps or math.inf

    @property
    def signal(self):
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None

    @signal.setter
    def signal(self, value):
        pass


def run(workdir, recipe=TINY, plan=PLAN, *, begin=None, stop_after=0):
    look = Look(tensorboard=False, progress=False)
    stop = StopAfter(stop_after)
    return pretrain(
        workdir, recipe, plan, begin=begin, where=mesh.make_mesh(1), look=look, stop=stop
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder after four steps in one go."""
    workdir = tmp_path_factory.mktemp("straight")
    assert run(workdir) is not None
    return workdir


def weights_of(workdir):
    return flatten(load_tree(workdir / WEIGHTS))


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_rate_rises_stays_and_falls_to_zero():
    recipe = dataclasses.replace(TINY, lr=2.0, warmup_steps=4)
    rate = learning_rate(recipe, Plan(20, decay_share=0.25, checkpoint_every=1, log_every=1))
    values = [float(rate(jnp.asarray(step))) for step in range(21)]
    np.testing.assert_allclose(values[:5], [0.5, 1, 1.5, 2, 2])
    assert values[5:16] == [2.0] * 11
    np.testing.assert_allclose(values[16:], [1.6, 1.2, 0.8, 0.4, 0], atol=1e-6)


def batch_of(first, second, share):
    count, size = share.shape[:2]
    images = jnp.zeros((count, size, size, 3))
    return Batch(images, jnp.asarray(first), jnp.asarray(second), jnp.asarray(share, jnp.float32))


def test_loss_of_a_position_weighs_the_classes_by_their_pixels():
    share = np.zeros((1, 4, 4))
    share[0, :2, :2] = 1  # upper left position: all of class 0
    share[0, :2, 2] = 1  # upper right: half; the lower ones: all of class 2
    chances = np.array([[[[0.7, 0.1, 0.2], [0.7, 0.1, 0.2]], [[0.7, 0.1, 0.2], [0.2, 0.1, 0.7]]]])
    loss, accuracy = shared_cross_entropy(
        jnp.asarray(np.log(chances), jnp.float32), batch_of([0], [2], share), smoothing=0.0
    )
    by_hand = -np.mean(np.log([0.7, np.sqrt(0.7 * 0.2), 0.2, 0.7]))
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
    assert accuracy == 0.75  # of the half and half position the first class counts


def test_smoothing_gives_every_class_its_part():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2])).reshape(1, 1, 1, 3)
    loss, _ = shared_cross_entropy(logits, batch_of([1], [1], np.ones((1, 4, 4))), smoothing=0.3)
    np.testing.assert_allclose(
        loss, -0.7 * np.log(0.3) - 0.3 * np.log([0.5, 0.3, 0.2]).mean(), rtol=1e-5
    )


def test_heads_are_those_with_a_weight_and_pool_where_asked():
    shapes = nnx.eval_shape(lambda: Classifier(TINY, draws=Draws(jax.random.key(0))))
    assert not hasattr(shapes, "head2")

    def logits(dense):
        return nnx.eval_shape(
            lambda model, images: model(images, train=False, dense=dense),
            shapes,
            jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),
        )

    assert {stage: leaf.shape for stage, leaf in logits(True).items()} == {
        1: (2, 8, 8, 6),
        3: (2, 2, 2, 6),
    }
    assert {leaf.shape for leaf in logits(False).values()} == {(2, 1, 1, 6)}


@pytest.mark.slow  # compiles for 20 seconds
def test_steps_on_the_same_images_lower_their_loss():
    optimizer = make_optimizer(TINY, dataclasses.replace(PLAN, steps=100))
    state = jax.jit(lambda key: init_state(TINY, optimizer, key))(jax.random.key(1))
    step = jax.jit(make_step(TINY, optimizer, mesh.make_mesh(1)))
    losses = []
    for _ in range(6):
        state, scalars = step(state.replace(step=jnp.zeros((), jnp.int32)))
        losses.append(float(scalars["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow  # compiles for 20 seconds
def test_four_devices_compute_what_one_does():
    optimizer = make_optimizer(TINY, PLAN)
    values = []
    for devices in (1, 4):
        where = mesh.make_mesh(devices)
        init = jax.jit(
            lambda key: init_state(TINY, optimizer, key), out_shardings=mesh.replicated(where)
        )
        _, scalars = jax.jit(make_step(TINY, optimizer, where))(init(jax.random.key(1)))
        values.append({name: float(value) for name, value in scalars.items()})
    assert values[0].keys() == {"loss", "loss1", "accuracy1", "loss3", "accuracy3"}
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_run_that_was_stopped_ends_bit_for_bit_as_one_in_one_go(straight, tmp_path):
    assert run(tmp_path, stop_after=1) is None
    assert not (tmp_path / WEIGHTS).exists()
    assert (tmp_path / "checkpoints/1").is_dir()
    assert run(tmp_path, stop_after=2) is None
    assert (tmp_path / "decay-2-4/3").is_dir()  # while the rate falls
    assert run(tmp_path) is not None
    assert_same_weights(straight, tmp_path)
    starts = read_made(tmp_path / WEIGHTS)["starts"]
    assert [start["step"] for start in starts] == [0, 1, 3]


@pytest.mark.slow  # compiles two more plans
def test_longer_run_goes_on_from_before_the_rate_fell(straight, tmp_path):
    longer = dataclasses.replace(PLAN, steps=6)
    run(tmp_path / "once", plan=longer)
    run(tmp_path / "twice")
    lines = (tmp_path / "twice/log/metrics.jsonl").read_text().splitlines()
    run(tmp_path / "twice", plan=longer)
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    again = (tmp_path / "twice/log/metrics.jsonl").read_text().splitlines()
    assert again[0] == lines[0]  # of step 2, which was not computed again


def test_run_of_fewer_steps_than_are_done_at_the_constant_rate_is_refused(straight):
    with pytest.raises(ValueError, match=r"--config\.pretrain\.steps=5"):
        run(straight, plan=dataclasses.replace(PLAN, steps=2))


def test_folder_of_another_recipe_is_refused(straight):
    with pytest.raises(ValueError, match=r"(?s)per_kind: 3 -> 4.*--workdir="):
        run(straight, dataclasses.replace(TINY, per_kind=4))


def test_written_encoder_reads_back_into_the_tree_of_the_model(straight):
    path = straight / WEIGHTS
    _, params, batch_stats = abstract_encoder("resnet18")
    *read, _ = load_encoder(str(path), "resnet18", params, batch_stats)
    stored = weights_of(straight)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    kernels = {str(leaf.dtype) for leaf in stored.values() if leaf.ndim > 1}
    vectors = {str(leaf.dtype) for leaf in stored.values() if leaf.ndim == 1}
    assert (kernels, vectors) == ({"float16"}, {"float32"})
    assert 5_000_000 < path.stat().st_size < 6_000_000
    assert os.stat(path).st_mode & 0o044  # other users can read what is installed


def test_the_command_line_pretrains(straight, tmp_path, capsys):
    settings = {**dataclasses.asdict(TINY), **dataclasses.asdict(PLAN)}
    command = ["main", "--job=pretrain", f"--workdir={tmp_path / 'run'}"]
    command += ["--config", str(ROOT / "configs" / "pretrain.py"), "--config.run.devices=1"]
    command += ["--config.seed=0", "--config.run.progress=False", "--config.run.tensorboard=False"]
    for name, value in settings.items():
        if name not in ("architecture", "compute_dtype", "seed"):
            command.append(f"--config.pretrain.{name}={value}")
    command.append("--config.pretrain.episodes.steps=0")
    assert main.main(command) == 0
    assert "classes/encoder.safetensors: sha256" in capsys.readouterr().out
    ours, theirs = weights_of(tmp_path / "run/classes"), weights_of(straight)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_a_finished_run_called_again_leaves_its_file_alone(straight):
    before = (straight / WEIGHTS).read_bytes()
    assert run(straight) == hashlib.sha256(before).hexdigest()
    assert (straight / WEIGHTS).read_bytes() == before


def test_file_says_how_it_was_made(straight):
    made = read_made(straight / WEIGHTS)
    assert made["steps"] == 4 and made["images"] == 32
    assert made["recipe"] == as_json(TINY) and made["decay_share"] == PLAN.decay_share
    assert made["seconds"] > 0
    assert made["tensors_sha256"] == digest_of(weights_of(straight))
    (start,) = made["starts"]
    assert start["step"] == 0 and start["device"].startswith("1 x cpu on ")
    assert {"jax", "flax", "numpy"} <= start["versions"].keys()
    assert {"command", "commit"} <= start.keys()


def test_a_digest_changes_with_names_and_values():
    tensors = {"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}
    others = [{"a": tensors["a"], "c": tensors["b"]}, {**tensors, "b": tensors["a"]}]
    assert digest_of(dict(reversed(tensors.items()))) == digest_of(tensors)
    assert digest_of(tensors) not in map(digest_of, others)


def test_running_variances_of_any_size_survive_the_file(tmp_path):
    params = {"conv1": {"kernel": np.full((1, 1, 2, 2), 1 / 3, np.float32)}}
    batch_stats = {"norm1": {"var": np.array([1e-9, 1e6], np.float32)}}
    write_weights(tmp_path / "e.safetensors", params, batch_stats, {})
    kept, statistics, _ = load_encoder(
        str(tmp_path / "e.safetensors"), "resnet18", params, batch_stats
    )
    np.testing.assert_array_equal(statistics["norm1"]["var"], batch_stats["norm1"]["var"])
    np.testing.assert_allclose(kept["conv1"]["kernel"], params["conv1"]["kernel"], rtol=2**-11)


def test_weight_that_float16_cannot_hold_is_refused(tmp_path):
    kernel = np.full((1, 1, 2, 2), 1e5, np.float32)
    with pytest.raises(ValueError, match=r"params/conv1/kernel.*not finite in float16.*100000"):
        write_weights(tmp_path / "e.safetensors", {"conv1": {"kernel": kernel}}, {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, devices, fix",
    [
        ({"batch_size": 10}, 4, "batch_size=16"),
        ({"batch_size": 7}, 1, "batch_size=8"),
    ],
)
def test_impossible_recipe_is_refused_with_a_fix(change, devices, fix):
    with pytest.raises(ValueError, match=rf"--config\.pretrain\.{fix}"):
        check_recipe(dataclasses.replace(TINY, **change), devices, "classes")


def test_distance_is_to_the_nearest_vector_of_the_memory():
    features = jnp.asarray([[[[0.0, 0.0], [3.0, 4.0]]]])
    memory = jnp.asarray([[0.0, 1.0], [3.0, 3.0], [9.0, 9.0]])
    np.testing.assert_allclose(probe.distances(features, memory), [[[1.0, 1.0]]], atol=1e-5)


def test_every_scale_has_length_one_on_the_middle_grid():
    maps = [jnp.full((1, side, side, side), float(side)) for side in (8, 4, 2)]
    joined = np.asarray(probe.joined_features(maps))
    assert joined.shape == (1, 4, 4, 14)
    for part in np.split(joined, [8, 12], axis=-1):
        np.testing.assert_allclose(np.linalg.norm(part, axis=-1), 1, rtol=1e-5)


def test_probe_finds_squares_that_random_weights_see(photos, capsys):
    assert probe.main(["--weights", "random", "--data", str(photos), "--size", "64"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [f"| {photos.name}/bolt", f"| {photos.name}/felt", "| mean"]
    assert [row[0] for row in rows] == names
    assert float(rows[-1][1]) == 1
    assert float(rows[-1][2].rstrip(" |")) > 0.9


def test_probe_reads_what_pretraining_wrote(straight):
    params, batch_stats = probe.encoder_of(str(straight / WEIGHTS), "resnet18")
    kernel = weights_of(straight)["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv1"]["kernel"], kernel.astype(np.float32))
    assert batch_stats["norm1"]["var"].dtype == np.float32


def test_log_takes_the_mean_and_names_the_first_step_that_was_not_finite():
    rows = [{"loss": jnp.float32(value)} for value in (1, 2, 6)]
    assert mean_of(rows, 9) == {"loss": 3} and rows == []
    rows = [{"loss": jnp.float32(value)} for value in (1, np.nan, 6)]
    with pytest.raises(FloatingPointError, match=r"step 8: .*config\.pretrain\.lr of half"):
        mean_of(rows, 9)
