import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax.pretraining.images import KINDS, Lot, check_batch, draw_batch, render

LAWS = jax.random.key(3)
SIZE = 32
FIRST = ("networks", "gratings", "noise", "leaves", "tiles")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def renderer(kind):
    return jax.jit(functools.partial(render, kind=kind, size=SIZE))


def pictures(kind, key, numbers):
    return np.asarray(renderer(kind)(jax.random.key(key), LAWS, jnp.asarray(numbers)))


@functools.cache
def batch_drawer(composite):
    kinds = ("noise", "tiles")
    draw = functools.partial(
        draw_batch, count=8, kinds=kinds, per_kind=5, size=SIZE, composite=composite
    )
    return jax.jit(lambda key: draw(key, LAWS))


@EVERY_KIND
def test_picture_is_fixed_by_key_and_class(kind):
    numbers = np.arange(32)
    first = pictures(kind, 0, numbers)
    np.testing.assert_array_equal(first, pictures(kind, 0, numbers))
    assert (first != pictures(kind, 1, numbers)).mean((1, 2, 3)).min() > 0.1
    assert (first != pictures(kind, 0, numbers + 32)).mean((1, 2, 3)).min() > 0.1


@EVERY_KIND
def test_picture_does_not_depend_on_the_others_of_the_batch(kind):
    numbers = np.arange(32)
    changed = np.where(numbers < 16, numbers, 99)
    before, after = pictures(kind, 0, numbers), pictures(kind, 0, changed)
    np.testing.assert_array_equal(before[:16], after[:16])


@EVERY_KIND
def test_pictures_are_in_range_and_show_something(kind):
    found = pictures(kind, 0, np.arange(32))
    assert found.shape == (32, SIZE, SIZE, 3)
    assert found.min() >= 0 and found.max() <= 1
    spread = found.std((1, 2)).mean(-1)
    assert (spread > 0.02).mean() > 0.9
    assert spread.mean() > 0.06


@EVERY_KIND
def test_pictures_of_a_class_are_more_alike_than_those_of_two(kind):
    def description(images):  # colour, contrast, and how much neighbours differ
        parts = [images.mean((1, 2)), images.std((1, 2))]
        parts += [np.abs(np.diff(images, axis=axis)).mean((1, 2)) for axis in (1, 2)]
        return np.concatenate(parts, -1)

    numbers = np.arange(32)
    one, other = (description(pictures(kind, key, numbers)) for key in (0, 1))
    far = np.linalg.norm(one[:, None] - other, axis=-1)
    same, different = np.diag(far), far[~np.eye(32, dtype=bool)]
    assert np.median(same) < 0.6 * np.median(different)
    nearest = far.argmin(1) == numbers
    assert nearest.mean() > 0.3  # by chance 0.03


def test_batch_holds_every_kind_equally_often():
    batch = batch_drawer(composite=False)(jax.random.key(0))
    labels = np.asarray(batch.first)
    np.testing.assert_array_equal(labels // 5, [0, 1] * 4)
    assert labels.min() >= 0 and labels.max() < 10
    np.testing.assert_array_equal(batch.second, labels)
    assert batch.share.min() == 1
    assert batch.images.min() >= 0 and batch.images.max() <= 1


def test_pictures_are_those_of_the_recipe_that_made_the_shipped_encoder():
    """A change of any of these laws makes other classes of the same settings."""
    draw = functools.partial(
        draw_batch, count=10, kinds=FIRST, per_kind=64, size=SIZE, composite=False
    )
    batch = jax.jit(draw)(jax.random.key(1), jax.random.key(2))
    np.testing.assert_array_equal(batch.first, [58, 118, 161, 220, 279, 0, 118, 138, 252, 291])
    means = [0.5312, 0.6004, 0.3328, 0.3226, 0.3077, 0.7042, 0.5750, 0.8226, 0.5076, 0.1826]
    spreads = [0.2316, 0.2534, 0.1374, 0.0404, 0.0746, 0.2703, 0.3031, 0.1080, 0.0674, 0.0417]
    np.testing.assert_allclose(batch.images.mean((1, 2, 3)), means, atol=2e-3)
    np.testing.assert_allclose(batch.images.std((1, 2, 3)), spreads, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "means", "spreads"),
    [
        (
            "objects",
            [0.4286, 0.3656, 0.6572, 0.3791, 0.2512],
            [0.0954, 0.0894, 0.1312, 0.0844, 0.1530],
        ),
        (
            "reliefs",
            [0.7533, 0.5652, 0.3862, 0.5142, 0.4105],
            [0.0573, 0.1663, 0.0773, 0.1626, 0.2302],
        ),
    ],
)
def test_products_are_those_that_the_shipped_encoder_learned_from(kind, means, spreads):
    found = pictures(kind, 0, np.arange(32))[:5]
    np.testing.assert_allclose(found.mean((1, 2, 3)), means, atol=2e-3)
    np.testing.assert_allclose(found.std((1, 2, 3)), spreads, atol=2e-3)


def test_composite_shows_two_pictures_with_a_border_between_them():
    batch = batch_drawer(composite=True)(jax.random.key(0))
    plain = batch_drawer(composite=False)(jax.random.key(0))
    share = np.asarray(batch.share)
    np.testing.assert_array_equal(batch.first, plain.first)
    assert sorted(batch.second.tolist()) == sorted(plain.first.tolist())
    assert share.min() >= 0 and share.max() <= 1
    assert 0.2 < share.mean() < 0.8
    assert ((share > 0.9) | (share < 0.1)).mean() > 0.5  # sharp borders
    unchanged = np.asarray(batch.images == plain.images).all(-1)
    assert unchanged[share > 0.9999].mean() > 0.5 > unchanged[share < 0.1].mean()


def test_batches_of_other_keys_differ():
    one, other = (batch_drawer(composite=True)(jax.random.key(key)) for key in (0, 1))
    assert (one.first != other.first).any()
    assert (one.share != other.share).any()


@pytest.mark.parametrize(
    "count, kinds, fix",
    [(7, ("noise", "tiles"), "batch_size=8"), (4, ("noise", "photos"), "kinds"), (4, (), "kinds")],
)
def test_batch_that_cannot_be_drawn_is_refused_with_a_fix(count, kinds, fix):
    with pytest.raises(ValueError, match=rf"--config\.pretrain\.{fix}"):
        check_batch(count, kinds)


def test_lot_hands_out_each_number_once_and_says_when_none_is_left():
    lot = Lot(jax.random.key(0), 12)
    numbers = np.concatenate([lot.between(2, 3, 2, 4).ravel(), lot.between(2, 3, 3)])
    assert len(set(numbers.tolist())) == 11
    assert numbers.min() >= 2 and numbers.max() < 3
    lot.normal()
    with pytest.raises(ValueError, match="12 numbers is used up"):
        lot.between(0, 1)


def test_normal_numbers_have_mean_zero_and_deviation_one():
    numbers = Lot(jax.random.key(0), 4000).normal(4000)
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
