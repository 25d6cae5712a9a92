"""Losses: worked by hand, against explicit loops, at their edges, and over four devices."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ccl_jax import losses

KEY = jax.random.key(0)
LABELS = jnp.array([0, 1, 2, 0, 1, 0, 2, 2], jnp.int32)
SHAPES = ((6, 6, 8), (3, 4, 16))  # two scales, one of them not square
SETTINGS = ("temperature", "window", "same_class_candidates")
# Compiled: dispatching the same operations one by one takes ten times as long.
local_loss = jax.jit(losses.local_contrastive_loss, static_argnames=SETTINGS)
local_gradient = jax.jit(
    jax.value_and_grad(losses.local_contrastive_loss, argnums=(0, 1, 2, 3)),
    static_argnames=SETTINGS,
)
best_matches = jax.jit(losses.best_matches, static_argnames=("window", "block", "maps_dtype"))


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def random_maps(seed, b=8, shapes=SHAPES):
    """Encoder clean, encoder augmented, projected clean, projected augmented; a map per scale."""
    return [[random(seed + 10 * i + j, b, *s) for j, s in enumerate(shapes)] for i in range(4)]


def unit(rows):
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def all_zero(tree):
    return all(not bool(jnp.any(leaf)) for leaf in jax.tree.leaves(tree))


# --- distillation ------------------------------------------------------------------------------


def test_cosine_distillation_by_hand():
    # Two positions, two channels. Flat: cosine of (1,0,0,1) with (1,0,1,0) is 1/2.
    # By position: cosines 1 and 0, mean 1/2; and again with lengths that only `flat` notices.
    target = jnp.array([1.0, 0, 0, 1]).reshape(1, 1, 2, 2)
    rebuilt = jnp.array([1.0, 0, 1, 0]).reshape(1, 1, 2, 2)
    for flat in (True, False):
        loss = losses.cosine_distillation_loss([target], [rebuilt], flat=flat)
        np.testing.assert_allclose(loss, 0.5, rtol=1e-6)
    longer = rebuilt.at[0, 0, 0].multiply(3)
    by_position = losses.cosine_distillation_loss([target], [longer], flat=False)
    np.testing.assert_allclose(by_position, 0.5, rtol=1e-6)
    flattened = losses.cosine_distillation_loss([target], [longer], flat=True)
    np.testing.assert_allclose(flattened, 1 - 3 / np.sqrt(2) / np.sqrt(10), rtol=1e-6)


def test_cosine_distillation_sums_scales_and_averages_images():
    target, rebuilt = random(0, 3, 4, 4, 5), random(1, 3, 4, 4, 5)
    one = losses.cosine_distillation_loss([target], [rebuilt])
    two = losses.cosine_distillation_loss([target, target], [rebuilt, -rebuilt])
    np.testing.assert_allclose(two, 2.0, rtol=1e-5)  # (1 - x) + (1 + x)
    each = [
        losses.cosine_distillation_loss([target[i : i + 1]], [rebuilt[i : i + 1]]) for i in range(3)
    ]
    np.testing.assert_allclose(one, np.mean(each), rtol=1e-5)


def test_cosine_distillation_sends_no_gradient_into_the_targets():
    target, rebuilt = random(0, 2, 2, 2, 3), random(1, 2, 2, 2, 3)
    to_target, to_rebuilt = jax.grad(
        lambda t, r: losses.cosine_distillation_loss([t], [r]), argnums=(0, 1)
    )(target, rebuilt)
    assert all_zero(to_target)
    assert float(jnp.abs(to_rebuilt).max()) > 1e-3


def test_cosine_distillation_ends_in_its_range():
    target = random(0, 2, 4, 4, 5)
    for factor, expected in ((2.0, 0.0), (-0.5, 2.0)):
        loss = losses.cosine_distillation_loss([target], [factor * target])
        np.testing.assert_allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize("flat", [True, False])
def test_cosine_distillation_of_zero_maps_is_one_without_gradient(flat):
    target, zero = random(0, 2, 4, 4, 5), jnp.zeros((2, 4, 4, 5))
    for pair in ((target, zero), (zero, target), (zero, zero)):
        value, grad = jax.value_and_grad(
            lambda r, t=pair[0]: losses.cosine_distillation_loss([t], [r], flat=flat)
        )(pair[1])
        assert float(value) == 1.0
        assert all_zero(grad)


def test_cosine_distillation_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match="zip"):
        losses.cosine_distillation_loss([random(0, 1, 2, 2, 3)] * 2, [random(0, 1, 2, 2, 3)])


# --- global ------------------------------------------------------------------------------------


def two_view_by_loops(clean, augmented, labels, temperature):
    rows = unit(np.concatenate([clean, augmented]))
    classes = list(labels) * 2
    total, pairs = 0.0, 0
    for i, anchor in enumerate(rows):
        cosines = [float(anchor @ other) / temperature for other in rows]
        denominator = sum(np.exp(x) for x in cosines)
        for j in range(len(rows)):
            if i != j and classes[i] == classes[j]:
                total -= np.log(np.exp(cosines[j]) / denominator)
                pairs += 1
    return total / pairs


def second_release_by_loops(pooled, labels, temperature):
    rows = unit(pooled)
    total = 0.0
    for i, anchor in enumerate(rows):
        cosines = [float(anchor @ other) / temperature for other in rows]
        denominator = sum(np.exp(x) for x in cosines)
        for same in (True, False):
            chosen = [j for j in range(len(rows)) if (labels[i] == labels[j]) == same]
            log_p = sum(np.log(np.exp(cosines[j]) / denominator) for j in chosen)
            total -= log_p / (len(chosen) + 1e-6)
    return total / len(rows)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_global_losses_equal_explicit_loops(temperature):
    clean, augmented = random(0, 8, 5), random(1, 8, 5)
    labels = np.asarray(LABELS)
    np.testing.assert_allclose(
        losses.two_view_supervised_contrastive_loss(
            clean, augmented, LABELS, temperature=temperature
        ),
        two_view_by_loops(clean, augmented, labels, temperature),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        losses.second_release_contrastive_loss(clean, LABELS, temperature=temperature),
        second_release_by_loops(clean, labels, temperature),
        rtol=1e-5,
    )


def test_two_view_loss_by_hand():
    # Views agree, classes are orthogonal: per row e^1 for itself, e^1 for its view, 2 e^0.
    codes = jnp.eye(2)
    loss = losses.two_view_supervised_contrastive_loss(
        codes, codes, jnp.array([0, 1]), temperature=1.0
    )
    np.testing.assert_allclose(loss, -np.log(np.e / (2 * np.e + 2)), rtol=1e-6)


def test_second_release_loss_by_hand():
    # Two orthogonal rows of two classes: p is e/(e+1) on itself and 1/(e+1) on the other.
    loss = losses.second_release_contrastive_loss(jnp.eye(2), jnp.array([0, 1]), temperature=1.0)
    np.testing.assert_allclose(loss, -np.log(np.e / (np.e + 1) ** 2), rtol=1e-5)


def test_two_view_loss_falls_when_classes_part_and_second_release_loss_rises():
    labels = jnp.array([0, 0, 1, 1])
    mixed = unit(np.array([[1, 0.9], [1, 0.8], [0.9, 1], [0.8, 1]]))
    parted = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    two_view = [
        losses.two_view_supervised_contrastive_loss(
            jnp.asarray(x, jnp.float32), jnp.asarray(x, jnp.float32), labels, temperature=0.5
        )
        for x in (mixed, parted)
    ]
    second = [
        losses.second_release_contrastive_loss(jnp.asarray(x, jnp.float32), labels, temperature=0.5)
        for x in (mixed, parted)
    ]
    assert two_view[1] < two_view[0] - 0.3
    assert second[1] > second[0] + 0.3


def global_losses(clean, augmented, labels):
    return losses.two_view_supervised_contrastive_loss(
        clean, augmented, labels, temperature=0.05
    ) + losses.second_release_contrastive_loss(clean, labels, temperature=0.05)


global_gradient = jax.jit(jax.value_and_grad(global_losses, argnums=(0, 1)))


def test_global_losses_ignore_the_order_of_images_and_the_names_of_classes():
    clean, augmented = random(0, 8, 5), random(1, 8, 5)
    order = jax.random.permutation(KEY, 8)
    expected = global_losses(clean, augmented, LABELS)
    shuffled = global_losses(clean[order], augmented[order], 7 - 3 * LABELS[order])
    np.testing.assert_allclose(shuffled, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 1]],
    ids=["one class", "every anchor lonely", "one lonely anchor"],
)
@pytest.mark.parametrize("codes", ["random", "identical", "zero", "one zero", "huge", "tiny"])
def test_global_losses_stay_finite_in_value_and_gradient(labels, codes):
    clean = {
        "random": random(0, 4, 3),
        "identical": jnp.ones((4, 3)),
        "zero": jnp.zeros((4, 3)),
        "one zero": random(0, 4, 3).at[1].set(0),
        "huge": 1e15 * random(0, 4, 3),
        "tiny": 1e-15 * random(0, 4, 3),
    }[codes]
    value, grads = global_gradient(clean, clean, jnp.array(labels))
    assert all_finite((value, grads))
    if codes in ("zero", "tiny"):
        assert all_zero(grads)


def test_global_losses_of_a_single_image_are_finite():
    for codes in (random(0, 1, 3), jnp.zeros((1, 3))):
        value, grads = global_gradient(codes, codes + 1, jnp.array([5]))
        assert all_finite((value, grads))


# --- draws -------------------------------------------------------------------------------------


def test_negatives_are_of_another_class_and_partners_are_others_of_the_same():
    for seed in range(20):
        negative, found = losses.draw_negatives(jax.random.key(seed), LABELS)
        assert bool(jnp.all(found)) and bool(jnp.all(LABELS[negative] != LABELS))
        partner, found = losses.draw_partners(jax.random.key(seed), LABELS)
        assert bool(jnp.all(found)) and bool(jnp.all(LABELS[partner] == LABELS))
        assert bool(jnp.all(partner != jnp.arange(len(LABELS))))


def test_draws_are_uniform_over_those_allowed():
    labels = jnp.array([0, 1, 1, 0, 2, 0])
    keys = jax.random.split(KEY, 4000)
    for draw, of_first in (
        (losses.draw_negatives, [0, 1 / 3, 1 / 3, 0, 1 / 3, 0]),
        (losses.draw_partners, [0, 0, 0, 0.5, 0, 0.5]),
    ):
        drawn, _ = jax.vmap(lambda key, draw=draw: draw(key, labels))(keys)
        share = jnp.bincount(drawn[:, 0], length=6) / len(keys)
        # Six standard deviations of a share of 4,000 draws are below 0.048.
        np.testing.assert_allclose(share, of_first, atol=0.048)


def test_draws_say_who_has_nobody():
    _, found = losses.draw_negatives(KEY, jnp.zeros(3, int))
    assert found.tolist() == [False] * 3
    partner, found = losses.draw_partners(KEY, jnp.array([4, 9, 4]))
    assert found.tolist() == [True, False, True]
    assert (int(partner[0]), int(partner[2])) == (2, 0)


# --- best matches ------------------------------------------------------------------------------


def best_matches_by_loops(queries, keys, window):
    queries, keys = unit(queries), unit(keys)
    b, h, w, _ = queries.shape
    index, cosine = np.zeros((b, h * w), int), np.full((b, h * w), -np.inf)
    reach = max(h, w) if window is None else window // 2
    for i, y, x in np.ndindex(b, h, w):
        for v, u in np.ndindex(h, w):
            if abs(v - y) <= reach and abs(u - x) <= reach:
                similarity = queries[i, y, x] @ keys[i, v, u]
                if similarity > cosine[i, y * w + x]:
                    index[i, y * w + x], cosine[i, y * w + x] = v * w + u, similarity
    return index, cosine


@pytest.mark.parametrize(
    ("window", "block"),
    [(None, 1), (None, 7), (None, 256), (1, 256), (3, 256), (5, 256), (21, 256)],
)
def test_best_matches_equal_explicit_loops(window, block):
    queries, keys = random(0, 2, 5, 7, 4), random(1, 2, 5, 7, 4)
    index, cosine = best_matches(queries, keys, window=window, block=block)
    expected_index, expected_cosine = best_matches_by_loops(queries, keys, window)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(cosine, expected_cosine, atol=1e-6)


@pytest.mark.parametrize("maps_dtype", [None, jnp.bfloat16])
def test_matches_of_maps_that_bfloat16_holds_are_those_of_float64(maps_dtype):
    """Unrelated images, vectors of lengths from 1e-3 to 1e3, and some without a direction."""
    queries, keys = (random(seed, 2, 9, 8, 48).astype(jnp.bfloat16) for seed in (0, 1))
    keys = keys * jnp.logspace(-3, 3, 72, dtype=jnp.bfloat16).reshape(1, 9, 8, 1)
    keys, queries = keys.at[0, 3, 3].set(0), queries.at[1, 2, 2].set(0)
    index, cosine = best_matches(
        queries.astype(jnp.float32), keys.astype(jnp.float32), maps_dtype=maps_dtype
    )
    wanted, expected = best_matches_by_loops(
        *(np.asarray(maps, np.float64) for maps in (queries, keys)), None
    )
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_allclose(cosine, expected, atol=1e-6)


def test_a_vector_too_short_to_have_a_direction_matches_the_first_position():
    """Its cosine is 0 with all of them, so they tie."""
    queries = random(0, 1, 3, 3, 4).at[0, 1, 1].multiply(1e-9)
    index, cosine = best_matches(queries, random(1, 1, 3, 3, 4))
    assert (int(index[0, 4]), float(cosine[0, 4])) == (0, 0.0)
    assert jnp.all(cosine[0, :4] > 0) and jnp.unique(index[0]).size > 2


def test_maps_are_rounded_before_their_lengths_are_taken():
    """So that no cosine exceeds 1, whatever XLA keeps of values that bfloat16 does not hold."""
    maps = 1 + random(0, 1, 6, 6, 8) / 256
    _, cosine = best_matches(maps, maps, maps_dtype=jnp.bfloat16)
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    rounded = jax.lax.reduce_precision(maps, 8, 7)
    _, expected = best_matches(rounded, rounded)
    np.testing.assert_allclose(cosine, expected, atol=1e-6)


def test_a_match_of_what_is_not_a_number_is_no_number():
    maps = random(0, 1, 3, 3, 4)
    index, cosine = best_matches(maps, maps.at[0, 1, 1, 2].set(jnp.nan))
    assert np.isnan(cosine).all()
    assert (index == 8).all()  # a position, for whoever looks there


@pytest.mark.parametrize("window", [None, 3])
def test_the_first_of_equal_matches_wins(window):
    same = jnp.ones((1, 4, 4, 3))
    index, cosine = best_matches(same, same, window=window)
    first = [max(y - 1, 0) * 4 + max(x - 1, 0) for y in range(4) for x in range(4)]
    assert index[0].tolist() == (first if window else [0] * 16)
    np.testing.assert_allclose(cosine, 1, rtol=1e-6)


def test_a_map_matches_itself_and_a_shifted_map_at_the_shift():
    maps = random(0, 1, 6, 6, 16)
    index, cosine = best_matches(maps, 3 * maps)
    assert index[0].tolist() == list(range(36))
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    moved = jnp.roll(maps, (1, 1), axis=(1, 2))
    index, _ = best_matches(maps, moved, window=3)
    inner = [y * 6 + x for y in range(5) for x in range(5)]
    assert index[0, jnp.array(inner)].tolist() == [i + 7 for i in inner]


@pytest.mark.parametrize("window", [0, 4, -1])
def test_a_window_without_centre_is_refused_with_a_fix(window):
    maps = random(0, 1, 4, 4, 2)
    with pytest.raises(
        ValueError, match=rf"window={window} .*--config.loss.local.window=\d*[1357]"
    ):
        best_matches(maps, maps, window=window)


def avals_of(jaxpr):
    """Every array that a program makes, also those inside its loops."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from avals_of(inner)


@pytest.mark.parametrize("window", [None, 5])
def test_best_matches_at_64x64_never_hold_the_whole_matrix(window):
    b, positions = 4, 64 * 64
    maps = jax.ShapeDtypeStruct((b, 64, 64, 8), jnp.float32)
    search = jax.jit(lambda q, k: losses.best_matches(q, k, window=window))
    traced = search.trace(maps, maps)
    largest = max(np.prod(aval.shape, dtype=int) for aval in avals_of(traced.jaxpr.jaxpr))
    assert largest <= b * positions * 128  # one block of queries against all keys
    needed = traced.lower().compile().memory_analysis().temp_size_in_bytes
    assert needed < b * positions**2 * 4 / 8  # the whole matrix would be 256 MiB


# --- local -------------------------------------------------------------------------------------


def local_by_loops(maps, labels, negatives, temperature, window=None, partners=None):
    per_scale = []
    for scale, (clean, augmented, queries, keys) in enumerate(zip(*maps, strict=True)):
        b, h, w, c = queries.shape
        index, cosine = best_matches_by_loops(clean, augmented, window)
        query, key = (unit(x).reshape(b, h * w, c) for x in (queries, keys))
        if partners is not None:
            other = [int(p) for p in partners[scale]]
            other_index, other_cosine = best_matches_by_loops(
                clean, augmented[jnp.array(other)], window
            )
        values = []
        for i in range(b):
            if all(label == labels[i] for label in labels):
                continue
            for n in range(h * w):
                positive = key[i, index[i, n]]
                if partners is not None and other[i] != i and other_cosine[i, n] > cosine[i, n]:
                    positive = key[other[i], other_index[i, n]]
                pos = np.exp(query[i, n] @ positive / temperature)
                neg = np.exp(query[i, n] @ key[int(negatives[scale][i]), n] / temperature)
                values.append(-np.log(pos / (pos + neg + 1e-6)))
        per_scale.append(np.mean(values))
    return np.mean(per_scale)


def drawn(labels, key=KEY, scales=2):
    """The negatives and partners that the loss itself draws, a partner-less image its own."""
    negative_keys, partner_keys = jax.random.split(key, (2, scales))
    negatives = [losses.draw_negatives(k, labels)[0] for k in negative_keys]
    drawn_partners = [losses.draw_partners(k, labels) for k in partner_keys]
    own = jnp.arange(len(labels))
    return negatives, [jnp.where(found, partner, own) for partner, found in drawn_partners]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("same_class", [False, True])
def test_local_loss_equals_explicit_loops(window, same_class):
    maps = random_maps(0)
    labels = LABELS.at[1].set(9)  # nobody else is of class 9: no partner
    negatives, partners = drawn(labels)
    loss = local_loss(
        *maps, labels, KEY, temperature=0.1, window=window, same_class_candidates=same_class
    )
    expected = local_by_loops(
        maps, labels.tolist(), negatives, 0.1, window, partners if same_class else None
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_local_loss_by_hand():
    # One position: pos is cos 60 degrees = 1/2, neg is -1, temperature 1/2.
    query = jnp.array([[1.0, 0], [-1, 0]]).reshape(2, 1, 1, 2)
    key = jnp.array([[0.5, 3**0.5 / 2], [-1, 0]]).reshape(2, 1, 1, 2)
    loss = local_loss([query], [key], [query], [key], jnp.array([0, 1]), KEY, temperature=0.5)
    first = -np.log(np.e / (np.e + np.exp(-2) + 1e-6))
    second = -np.log(np.exp(2) / (np.exp(2) + np.exp(-1) + 1e-6))
    np.testing.assert_allclose(loss, (first + second) / 2, rtol=1e-5)


def test_matches_come_from_the_frozen_encoder_and_send_it_no_gradient():
    maps = random_maps(0)
    value, grads = local_gradient(*maps, LABELS, KEY, temperature=0.1)
    assert all_zero(grads[:2])
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[2:])) > 1e-4
    other_encoder = random_maps(77)[:2]
    other, _ = local_gradient(*other_encoder, *maps[2:], LABELS, KEY, temperature=0.1)
    assert abs(float(value - other)) > 1e-3


def test_another_image_of_the_class_is_preferred_only_where_it_matches_better():
    # Encoder vectors a, b, c are orthogonal; both images of class 0 look for (a, b). The views are
    # (a, c) and (b, c): image 0 finds b, and image 1 finds a, in the other's view only.
    a, b, c = jnp.eye(3)
    clean = jnp.stack([jnp.stack([a, b])[None]] * 3)
    augmented = jnp.stack([jnp.stack([a, c])[None], jnp.stack([b, c])[None], -clean[0]])
    maps = [[x] for x in (clean, augmented, random(0, 3, 1, 2, 4), random(1, 3, 1, 2, 4))]
    labels, negatives = jnp.array([0, 0, 1]), jnp.array([[2, 2, 0]])
    to_queries = [
        local_gradient(
            *maps,
            labels,
            KEY,
            temperature=0.5,
            same_class_candidates=same_class,
            negatives=negatives,
        )[1][2][0]
        for same_class in (False, True)
    ]
    changed = jnp.abs(to_queries[0] - to_queries[1]).max(-1)[:, 0] > 1e-4
    assert changed.tolist() == [[False, True], [True, False], [False, False]]


def test_local_loss_ignores_the_order_of_images():
    maps, order = random_maps(0), jax.random.permutation(KEY, len(LABELS))
    negatives = jnp.stack(drawn(LABELS)[0])
    place = jnp.argsort(order)
    loss = local_loss(*maps, LABELS, KEY, temperature=0.1, negatives=negatives)
    shuffled = local_loss(
        *jax.tree.map(lambda x: x[order], maps),
        LABELS[order],
        KEY,
        temperature=0.1,
        negatives=place[negatives[:, order]],
    )
    np.testing.assert_allclose(shuffled, loss, rtol=1e-5)


def test_negatives_differ_between_keys_and_scales():
    maps = [[m[0]] * 2 for m in random_maps(0)]

    def loss(maps, key):
        return float(local_loss(*maps, LABELS, key, temperature=0.1))

    assert loss(maps, KEY) == loss(maps, KEY)
    assert loss(maps, KEY) != loss(maps, jax.random.key(1))
    assert loss(maps, KEY) != loss([m[:1] for m in maps], KEY)


@pytest.mark.parametrize("b", [1, 3])
def test_a_batch_of_one_class_costs_nothing_and_moves_nothing(b):
    value, grads = local_gradient(
        *random_maps(0, b), jnp.full(b, 3), KEY, temperature=1e-3, same_class_candidates=True
    )
    assert float(value) == 0.0
    assert all_zero(grads) and all_finite(grads)


@pytest.mark.parametrize("window", [None, 3])
def test_local_loss_stays_finite_in_value_and_gradient(window):
    for change in (
        jnp.ones_like,  # identical vectors
        jnp.zeros_like,
        lambda x: x.at[:, 0, 0].set(0),  # one zero vector
        lambda x: 1e15 * x,
        lambda x: 1e-15 * x,
    ):
        maps = jax.tree.map(change, random_maps(0, 3))
        value, grads = local_gradient(
            *maps,
            jnp.array([0, 1, 0]),
            KEY,
            temperature=1e-3,  # e^(1 / temperature) overflows
            window=window,
            same_class_candidates=True,
        )
        assert all_finite((value, grads))
        if not jnp.any(jnp.abs(maps[2][0]) > 1e-9):
            assert all_zero(grads)


def test_identical_views_and_classes_cost_log_two():
    maps = jax.tree.map(jnp.ones_like, random_maps(0))
    loss = local_loss(*maps, LABELS, KEY, temperature=0.1)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)


# --- precision and devices ---------------------------------------------------------------------


def all_losses(maps, codes, labels):
    clean, augmented, queries, keys = maps
    local = losses.local_contrastive_loss(
        clean, augmented, queries, keys, labels, KEY, temperature=0.1, same_class_candidates=True
    )
    windowed = losses.local_contrastive_loss(
        clean, augmented, queries, keys, labels, KEY, temperature=0.1, window=3
    )
    distillation = losses.cosine_distillation_loss(clean, queries)
    return distillation + local + windowed + global_losses(*codes, labels)


compiled_losses = jax.jit(all_losses)


def test_bfloat16_inputs_give_float32_losses():
    maps, codes = random_maps(0, shapes=SHAPES[1:]), [random(5, 8, 4), random(6, 8, 4)]
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (maps, codes))
    value = compiled_losses(*low, LABELS)
    assert value.dtype == jnp.float32
    # The inputs are rounded, the arithmetic is not: the same values in float32 give the same loss.
    np.testing.assert_allclose(
        value,
        compiled_losses(*jax.tree.map(lambda x: x.astype(jnp.float32), low), LABELS),
        rtol=1e-6,
    )


def test_float64_inputs_give_float64_losses_of_the_same_draws():
    maps, codes = random_maps(0, shapes=SHAPES[1:]), [random(5, 8, 4), random(6, 8, 4)]
    single = compiled_losses(maps, codes, LABELS)
    with jax.enable_x64(True):
        as_double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (maps, codes))
        double = compiled_losses(*as_double, LABELS)
        assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=1e-5)


def test_four_devices_give_the_loss_and_gradient_of_one():
    maps, codes = random_maps(0, shapes=SHAPES[1:]), [random(5, 8, 4), random(6, 8, 4)]
    both = jax.jit(jax.value_and_grad(all_losses, argnums=(0, 1)))
    expected = both(maps, codes, LABELS)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put((maps, codes, LABELS), split)
    value, grads = both(*sharded)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6),
        (value, grads),
        expected,
    )
    assert grads[0][2][0].sharding.is_equivalent_to(split, 4)
