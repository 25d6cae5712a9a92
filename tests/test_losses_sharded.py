"""The losses over several devices are those of one: values, gradients, and what travels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from ccl_jax import losses
from ccl_jax.collectives import with_next

KEY = jax.random.key(3)
SHAPES = ((4, 4, 8), (2, 2, 16))
AXES = ("data", "shard")
LABELS = {
    "mixed": [0, 1, 2, 0, 1, 0, 2, 2],
    "a device with one class": [0, 0, 1, 2, 1, 0, 2, 2],
    "every device with one class": [0, 0, 1, 1, 2, 2, 0, 0],
    "one class": [1] * 8,
    "one image of another class": [0] * 7 + [1],
}
LOCAL = {
    "batch": {},
    "near": {"reach": 5},
    "nearer than a device": {"reach": 1},
    "near, longer than the batch": {"reach": 15},
    "partners": {"same_class_candidates": True, "window": 3},
    "near partners": {"same_class_candidates": True, "reach": 3},
}


def mesh_of(devices):
    rows = devices // 2 or 1
    chosen = np.array(jax.devices()[:devices]).reshape(rows, -1)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * 2)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


MAPS = [[random(10 * i + j, 8, *shape) for j, shape in enumerate(SHAPES)] for i in range(4)]
CODES = [random(5, 8, 6), random(6, 8, 6)]


def all_terms(maps, codes, labels, *, axis=None, **local):
    terms = {
        "cosine": losses.cosine_distillation_loss(maps[0], maps[2], axis=axis),
        "local": losses.local_contrastive_loss(
            *maps, labels, KEY, temperature=0.2, axis=axis, **local
        ),
        "global": losses.two_view_supervised_contrastive_loss(
            *codes, labels, temperature=0.1, axis=axis
        ),
        "second": losses.second_release_contrastive_loss(
            codes[0], labels, temperature=0.1, axis=axis
        ),
    }
    return sum(terms.values()), terms


@functools.cache
def compiled(devices, local):
    """(sum of the losses, terms), gradients: as on one device, or over a mesh."""
    terms = functools.partial(all_terms, **LOCAL[local])
    if devices:
        rows = jax.P(AXES)
        terms = jax.shard_map(
            functools.partial(terms, axis=AXES),
            mesh=mesh_of(devices),
            in_specs=(rows, rows, rows),
            out_specs=jax.P(),
        )
    return jax.jit(jax.value_and_grad(terms, argnums=(0, 1), has_aux=True))


def assert_as_on_one_device(devices, local, labels):
    labels = jnp.array(LABELS[labels], jnp.int32)
    want = compiled(0, local)(MAPS, CODES, labels)
    got = compiled(devices, local)(MAPS, CODES, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("labels", LABELS)
def test_losses_and_gradients_are_those_of_one_device(devices, labels):
    assert_as_on_one_device(devices, "batch", labels)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("local", list(LOCAL)[1:])
def test_every_way_to_draw_is_the_same_on_all_numbers_of_devices(devices, local):
    assert_as_on_one_device(devices, local, "a device with one class")


def test_near_negatives_are_of_another_class_and_within_reach():
    labels = jnp.array([0, 0, 0, 1, 1, 2, 0, 0], jnp.int32)
    draw = jax.vmap(lambda key: losses.draw_negatives(key, labels, reach=2))
    drawn, found = draw(jax.random.split(KEY, 200))
    assert found[0].tolist() == [False, True, True, True, True, True, False, False]
    distance = (drawn - jnp.arange(8)) % 8
    assert set(np.unique(distance[:, found[0]])) == {1, 2}
    assert not bool(jnp.any((labels[drawn] == labels) & found))
    assert set(np.unique(drawn[:, 2])) == {3, 4}  # both, where both are allowed


def loss_of_one_image(maps, image, other, temperature):
    """By the formula: mean over positions of -log(e^pos / (e^pos + e^neg + 1e-6)), over scales."""
    values = []
    for scale in range(len(SHAPES)):
        rows = [
            np.asarray(view[scale], np.float64).reshape(8, -1, SHAPES[scale][2]) for view in maps
        ]
        clean, augmented, queries, keys = (
            row / np.linalg.norm(row, axis=-1, keepdims=True) for row in rows
        )
        match = np.argmax(clean[image] @ augmented[image].T, axis=1)
        pos = np.sum(queries[image] * keys[image][match], -1) / temperature
        neg = np.sum(queries[image] * keys[other], -1) / temperature
        values.append(np.mean(np.log(np.exp(pos) + np.exp(neg) + 1e-6) - pos))
    return np.mean(values)


def test_image_without_a_negative_within_reach_is_left_out_of_the_mean():
    labels = jnp.array([0, 0, 0, 0, 0, 0, 0, 1], jnp.int32)  # only 6 and 7 have a neighbour to draw

    def loss(maps):
        return losses.local_contrastive_loss(*maps, labels, KEY, temperature=0.2, reach=1)

    value, gradient = jax.jit(jax.value_and_grad(loss))(MAPS)
    want = (loss_of_one_image(MAPS, 6, 7, 0.2) + loss_of_one_image(MAPS, 7, 0, 0.2)) / 2
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert not np.any(gradient[2][0][:6])
    assert np.all(np.any(gradient[2][0][6:] != 0, axis=(1, 2, 3)))


def test_images_after_the_last_are_the_first():
    rows = jnp.arange(8.0)
    for devices, reach in ((2, 3), (4, 3), (4, 7), (4, 2)):
        there = jax.jit(
            jax.shard_map(
                lambda mine, reach=reach: with_next(mine, reach, AXES)[None],
                mesh=mesh_of(devices),
                in_specs=jax.P(AXES),
                out_specs=jax.P(AXES),
            )
        )(rows)
        own = 8 // devices
        want = [[(d * own + i) % 8 for i in range(own + reach)] for d in range(devices)]
        assert there.tolist() == want


def permutes(devices, local):
    """Shapes of the maps that each device sends to one other, as compiled."""
    maps = [[jnp.zeros((2 * devices, *shape)) for shape in SHAPES] for _ in range(4)]
    codes = [jnp.zeros((2 * devices, 6))] * 2
    labels = jnp.arange(2 * devices, dtype=jnp.int32)
    text = compiled(devices, local).lower(maps, codes, labels).compile().as_text()
    found = re.findall(r"= f32\[([\d,]+)\]\S* collective-permute", text)
    return sorted(tuple(map(int, shape.split(","))) for shape in found)


def test_near_negatives_are_sent_to_one_device_and_no_more_of_them_than_are_in_reach():
    assert permutes(4, "batch") == []
    there_and_back = sorted([(1, *shape) for shape in SHAPES] * 2)  # maps, then their gradients
    assert permutes(4, "nearer than a device") == there_and_back
    assert permutes(2, "nearer than a device") == there_and_back
