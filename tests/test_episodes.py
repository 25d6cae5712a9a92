"""Episodes: products never seen, their defects, and learning to find them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import mesh
from ccl_jax.models.trees import read_made
from ccl_jax.pretraining.defects import (
    FAINTEST,
    PALEST,
    box_blur,
    conspicuous,
    contents,
    damage,
    pushed,
    region,
    tones,
)
from ccl_jax.pretraining.episodes import VISIBLE, Episodes, draw_episode, init_state, make_step
from ccl_jax.pretraining.learn import Plan, Recipe, make_optimizer
from ccl_jax.pretraining.lots import Lot, Near
from ccl_jax.pretraining.run import WEIGHTS, check_recipe
from tests.test_pretraining import PLAN, TINY, assert_same_weights, run

SIZE = 32
RECIPE = Episodes(
    architecture="resnet18",
    compute_dtype="float32",
    seed=0,
    kinds=("gratings", "tiles"),
    per_kind=2,
    image_size=SIZE,
    group=4,
    sound=1,
    softness=0.15,
    memory=64,
    stage_weight=0.5,
    image_weight=0.5,
    lr=1e-3,
    weight_decay=0.05,
    warmup_steps=1,
)


def grating():
    """A picture of diagonal waves in grey."""
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = 0.5 + 0.4 * np.sin((x + 2 * y) / 3)
    return jnp.asarray(np.repeat(waves[..., None], 3, -1), jnp.float32)


@functools.cache
def damaged(count=200):
    keys = jax.random.split(jax.random.key(0), count)
    other, variant = jnp.full((SIZE, SIZE, 3), 0.5), grating()[::-1]
    return jax.jit(jax.vmap(damage, (0, None, None, None)))(keys, grating(), other, variant)


@functools.cache
def drawn(seed=0):
    return jax.jit(lambda key: draw_episode(key, RECIPE))(jax.random.key(seed))


def numbers_near(spread, member):
    source = Near(jax.random.key(1), jax.random.key(member), jnp.asarray(spread))
    return np.asarray(Lot(source, 1000).between(0, 1, 1000))


def test_members_of_a_family_differ_by_their_spread():
    np.testing.assert_array_equal(numbers_near(0.0, 2), numbers_near(0.0, 3))
    for spread in (0.1, 0.5):
        apart = np.abs(numbers_near(spread, 2) - numbers_near(spread, 3))
        assert apart.max() < spread
        assert apart.mean() == pytest.approx(spread / 3, rel=0.15)  # of two uniform numbers
    assert numbers_near(1.0, 2).min() >= 0 and numbers_near(1.0, 2).max() < 1


def test_a_picture_is_damaged_within_the_mask_only():
    image, found = np.asarray(grating()), jax.device_get(damaged())
    assert found.image.min() >= 0 and found.image.max() <= 1
    assert found.mask.min() >= 0 and found.mask.max() <= 1
    far = found.mask < 1e-4
    assert far.mean() > 0.3
    assert np.abs(found.image - image).max(-1)[far].max() < 0.02
    assert 0.6 < (found.change > VISIBLE).mean() < 1


def test_a_change_that_nobody_could_find_is_not_conspicuous():
    mask = jnp.zeros((SIZE, SIZE)).at[8:24, 8:24].set(1)
    grains, others = jax.random.uniform(jax.random.key(0), (2, SIZE, SIZE, 3))
    covered = mask[..., None] * others + (1 - mask[..., None]) * grains
    assert float(jnp.abs(covered - grains).mean((0, 1, 2))) > VISIBLE
    calm = jnp.full((SIZE, SIZE, 3), 0.5)
    assert float(conspicuous(calm, calm, mask)) == 0
    found = float(conspicuous(calm, calm + 0.2 * mask[..., None], mask))
    assert found == pytest.approx(0.2, rel=0.1)  # less at the border
    smooth = mask[..., None] * 0.5 + (1 - mask[..., None]) * grains
    assert float(conspicuous(grains, smooth, mask)) > 2 * float(conspicuous(grains, covered, mask))


def test_tones_have_either_sign_and_are_never_faint():
    found = np.asarray(tones(Lot(jax.random.key(0), 1000), 1000))
    assert np.abs(found).min() >= PALEST and 0.95 < np.abs(found).max() <= 1
    assert 0.4 < (found > 0).mean() < 0.6


def test_defects_are_those_that_the_shipped_encoder_learned_from():
    found = damaged()
    changes, shares = found.change[:5], found.mask[:5].mean((1, 2))
    np.testing.assert_allclose(changes, [0.0692, 0.0710, 0.1692, 0.0761, 0.0867], atol=1e-3)
    np.testing.assert_allclose(shares, [0.0144, 0.0354, 0.0608, 0.1885, 0.0205], atol=1e-3)


def test_masks_have_many_sizes_and_places():
    mask = np.asarray(damaged().mask)
    shares = (mask > 0.5).mean((1, 2))
    assert np.quantile(shares, 0.1) < 0.01 and np.quantile(shares, 0.9) > 0.08
    assert (mask > 0.5).any(0).mean() > 0.95


def test_every_sort_of_defect_changes_the_picture_in_its_own_way():
    image, other = grating(), jnp.full((SIZE, SIZE, 3), 0.9)
    sorts = contents(Lot(jax.random.key(3), 96), jax.random.key(4), image, other, image[::-1])
    np.testing.assert_array_equal(sorts.pop(1), sorts[1])  # the likeliest stands twice
    sorts.append(pushed(Lot(jax.random.key(3), 96), image, jnp.ones((SIZE, SIZE))))
    assert len(sorts) == 10
    for number, content in enumerate(sorts):
        assert float(jnp.abs(content - image).mean()) > 0.02, number
        for before in sorts[:number]:
            assert float(jnp.abs(content - before).mean()) > 0.02, number


def test_box_blur_is_the_mean_of_a_square():
    image = jax.random.uniform(jax.random.key(0), (8, 8, 1))
    blurred = np.asarray(box_blur(image, 3))
    assert blurred[4, 5, 0] == pytest.approx(float(image[3:6, 4:7].mean()), rel=1e-5)
    assert blurred[0, 0, 0] == pytest.approx(
        float(np.pad(image[..., 0], 1, mode="edge")[:3, :3].mean()), rel=1e-5
    )


def test_regions_are_the_same_share_of_pictures_of_any_size():
    def share(size):
        draw = jax.vmap(lambda key: region(Lot(key, 96), size))
        return (np.asarray(draw(jax.random.split(jax.random.key(0), 50))) > 0.5).mean((1, 2))

    np.testing.assert_allclose(share(32), share(64), atol=0.02)
    assert 0 < FAINTEST < 1


def test_an_episode_is_fixed_by_its_key_and_damages_all_but_the_sound_images():
    episode = jax.device_get(drawn())
    assert episode.images.shape == (4, 4, SIZE, SIZE, 3)
    assert episode.masks.shape == (4, 3, SIZE, SIZE) and episode.visible.shape == (4, 3)
    again = jax.jit(lambda key: draw_episode(key, RECIPE))(jax.random.key(0))
    np.testing.assert_array_equal(episode.images, again.images)
    assert (np.asarray(drawn(1).images) != episode.images).mean() > 0.5
    assert episode.images.min() >= 0 and episode.images.max() <= 1


def test_images_of_a_product_resemble_each_other_more_than_those_of_others():
    images = np.concatenate([np.asarray(drawn(seed).images) for seed in range(8)])[:, :2]
    tones = images.mean((2, 3))  # product, image, channel
    own = np.abs(tones[:, 0] - tones[:, 1]).mean()
    others = np.abs(tones[:, 0] - np.roll(tones[:, 1], 1, 0)).mean()
    assert own < 0.5 * others


@pytest.mark.parametrize("devices, fix", [(4, "per_kind=4"), (3, "per_kind=3")])
def test_products_that_devices_cannot_share_are_refused_with_a_fix(devices, fix):
    with pytest.raises(ValueError, match=rf"--config\.pretrain\.episodes\.{fix}"):
        check_recipe(RECIPE, devices, "episodes")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A file of the first phase."""
    workdir = tmp_path_factory.mktemp("classes")
    plan = Plan(steps=1, decay_share=0.0, checkpoint_every=10, log_every=1)
    recipe = Recipe(**dataclasses.asdict(dataclasses.replace(TINY, composite=False)))
    assert run(workdir, recipe, plan) is not None
    return workdir / WEIGHTS


@pytest.mark.slow  # compiles for a minute
def test_stopped_episodes_end_bit_for_bit_as_in_one_go(classes, tmp_path):
    assert run(tmp_path / "once", RECIPE, begin=classes) is not None
    for stop_after in (1, 2):
        assert run(tmp_path / "parts", RECIPE, begin=classes, stop_after=stop_after) is None
    assert run(tmp_path / "parts", RECIPE, begin=classes) is not None
    assert_same_weights(tmp_path / "once", tmp_path / "parts")
    made = read_made(tmp_path / "once" / WEIGHTS)
    assert made["begun_from"] == read_made(classes)
    assert made["images"] == PLAN.steps * RECIPE.batch_size == 64
    other = tmp_path / "other.safetensors"
    other.write_bytes((tmp_path / "once" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"begun with another encoder.*--workdir="):
        run(tmp_path / "once", RECIPE, begin=other)


@pytest.mark.slow  # compiles for a minute
def test_two_devices_compute_what_one_does_and_the_loss_falls():
    optimizer = make_optimizer(RECIPE, dataclasses.replace(PLAN, steps=100))
    values = []
    for devices in (1, 2):
        where = mesh.make_mesh(devices)
        init = jax.jit(
            lambda key: init_state(RECIPE, optimizer, key), out_shardings=mesh.replicated(where)
        )
        state = init(jax.random.key(1))
        step = jax.jit(make_step(RECIPE, optimizer, where))
        losses = []
        for _ in range(4 if devices == 1 else 1):
            state, scalars = step(state.replace(step=jnp.zeros((), jnp.int32)))
            losses.append(float(scalars["loss"]))
        values.append(losses)
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-4)
    assert values[0][-1] < 0.9 * values[0][0]
