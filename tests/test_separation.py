"""Distances to what sound positions say, and the loss that tells damaged positions apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax.pretraining.features import unit
from ccl_jax.pretraining.separation import damaged_cells, rebuilt_distances, separation_loss

GROUP, SIDE = 4, 3


def example():
    """Features [2, 4, 3, 3, 5] of length 1, and which positions are sound: not all."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, GROUP, SIDE, SIDE, 5)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return features, rng.uniform(size=features.shape[:-1]) < 0.7


def by_hand(features, sound, softness):
    """The distances one by one: to sound positions, never to one of the own image."""
    found = np.empty(features.shape[:-1])
    for e, n, y, x in np.ndindex(found.shape):
        query = features[e, n, y, x].astype(np.float64)
        known = [features[e, m][sound[e, m]] for m in range(GROUP) if m != n]
        known = np.concatenate(known).astype(np.float64)
        weights = np.exp(-((known - query) ** 2).sum(-1) / softness)
        mean = (weights[:, None] * known).sum(0)
        found[e, n, y, x] = ((query - mean / np.linalg.norm(mean)) ** 2).sum()
    return found


@pytest.mark.parametrize("softness", [0.1, 1.0])
def test_distance_is_to_the_mean_of_similar_sound_positions_of_other_images(softness):
    features, sound = example()
    found = rebuilt_distances(
        jnp.asarray(features), jnp.asarray(sound), softness=softness, memory=1000
    )
    np.testing.assert_allclose(found, by_hand(features, sound, softness), rtol=1e-4)


def test_no_gradient_passes_through_the_weights():
    features, sound = example()
    fixed = jnp.asarray(features)

    def distances(query, known):
        flat, allowed = known.reshape(2, -1, 5), jnp.asarray(sound).reshape(2, 1, 1, 1, -1)
        squared = 2 - 2 * jnp.einsum("enhwc,emc->enhwm", fixed, fixed.reshape(2, -1, 5))
        owner = jnp.repeat(jnp.arange(GROUP), SIDE * SIDE)
        allowed = allowed & (jnp.arange(GROUP)[:, None, None, None] != owner)
        weights = jax.nn.softmax(jnp.where(allowed, -squared / 0.2, -jnp.inf), -1)
        return jnp.sum((query - unit(jnp.einsum("enhwm,emc->enhwc", weights, flat))) ** 2, -1)

    wanted = jax.grad(lambda features: distances(features, features)[0, 2].sum())(fixed)
    found = jax.grad(
        lambda features: rebuilt_distances(features, jnp.asarray(sound), softness=0.2, memory=1000)[
            0, 2
        ].sum()
    )(fixed)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert np.abs(wanted).max() > 0.1


def test_a_small_memory_is_a_sample_of_all_images():
    features, sound = (jnp.asarray(part) for part in example())
    few = rebuilt_distances(features, sound, softness=0.1, memory=12)
    assert few.shape == sound.shape and np.isfinite(few).all()
    all_of_them = rebuilt_distances(features, sound, softness=0.1, memory=1000)
    assert (np.abs(few - all_of_them) > 1e-3).mean() > 0.9


def test_distances_stay_finite_where_no_position_is_sound():
    features, _ = example()
    nothing = jnp.zeros(features.shape[:-1], bool)
    found = rebuilt_distances(jnp.asarray(features), nothing, softness=0.1, memory=1000)
    assert np.isfinite(found).all()


def cells(mask, *, visible=True):
    """Damaged and sound ones of 2 x 2 positions, for one damaged image."""
    masks = jnp.asarray(mask, jnp.float32)[None, None]
    found = damaged_cells(masks, jnp.full((1, 1), visible), 2)
    return tuple(np.asarray(part)[0, 0].tolist() for part in found)


CORNER = np.kron(np.array([[1, 0], [0, 0]]), np.ones((4, 4)))  # the first of 2 x 2 positions


def test_positions_are_damaged_sound_or_neither():
    first = [[True, False], [False, False]]
    others = [[False, True], [True, True]]
    assert cells(CORNER) == (first, others)
    assert cells(CORNER, visible=False) == ([[False, False]] * 2, others)
    speck = np.zeros((8, 8))
    speck[0, 0] = 1  # a sixteenth of the position: the most covered one counts all the same
    assert cells(speck) == (first, others)
    beside = CORNER.copy()
    beside[0, 4:6] = 1  # an eighth of the second position
    assert cells(beside) == (first, [[False, False], [True, True]])


def separation(corner, elsewhere, *, damaged=True):
    """The losses where two damaged images have these distances, and two whole ones 1."""
    distances = np.ones((1, 4, 2, 2), np.float32)
    distances[:, 2:] = elsewhere
    distances[:, 2:, 0, 0] = corner
    hit = np.zeros((1, 2, 2, 2), bool)
    hit[..., 0, 0] = damaged
    sound = np.ones((1, 4, 2, 2), bool)
    sound[:, 2:, 0, 0] = False
    found = separation_loss(
        jnp.asarray(distances),
        jnp.asarray(hit),
        jnp.asarray(sound),
        jnp.zeros(()),
        jnp.ones(()),
    )
    return [float(value) for value in found]


def test_loss_is_that_of_a_classifier_of_positions_and_pairs_of_images():
    corner = np.e**2
    positions, images, ordered = separation(corner, 1.0)
    logit = np.log(corner + 1e-4) - np.log(1 + 1e-4) - 1  # of the damaged position; others: -1
    soft = lambda value: np.log1p(np.exp(value))  # noqa: E731
    wanted = 0.5 * soft(-logit) * 2 / 3 + 0.5 * soft(-1) * 14 / 15
    assert positions == pytest.approx(wanted, rel=1e-4)
    score = np.log(np.exp(4 * logit) + 3 * np.exp(-4)) / 4
    normal = np.log(4 * np.exp(-4)) / 4
    assert images == pytest.approx(soft(normal - score), rel=1e-4)
    assert ordered == 1


def test_loss_falls_as_the_damaged_position_moves_away_and_only_then():
    assert separation(8.0, 1.0)[0] < separation(2.0, 1.0)[0] < separation(2.0, 4.0)[0]
    assert separation(8.0, 1.0)[1] < separation(2.0, 1.0)[1]
    assert separation(0.5, 0.5)[2] == 0


def test_what_nobody_sees_does_not_count():
    near, far = (separation(corner, 1.0, damaged=False) for corner in (0.1, 8.0))
    assert near == far and near[1] == 0
