"""Three losses: cosine distillation, and class-aware contrastive learning (CCL), local and global.

CCL is Fan et al., "Salvaging the Overlooked", arXiv 2412.04769. Its authors released their code
twice; the global loss differs between the two releases, the rest does not. Where the code and the
paper disagree, the code is followed and the paper's variant is an argument.

A map is (b, h, w, c), a position is one (h, w) of it. "Clean" and "augmented" are two views of the
same images; the encoder is frozen, the projector is trained. Everything is computed over the whole
batch, in at least float32. A vector of zero length has cosine 0 with everything, and no gradient.

With `axis`, the name (or names) of mesh axes, a loss is called within `jax.shard_map`: the arrays
are one device's images, as many on each, and the loss is that of all of them, the same on every
device. What then travels is written out here: `all_gather`, `ppermute` and sums.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ccl_jax.collectives import Axis, of_all, positions_of_mine, summed, with_next
from ccl_jax.matching import EXACT, best_matches, unit

Maps = Sequence[Float[Array, "b _ _ _"]]  # one map per scale, fine -> coarse
Scalar = Float[Array, ""]

EPSILON = 1e-6  # what the reference adds to the local loss's denominator, and to counts


# --- distillation ------------------------------------------------------------------------------


def cosine_distillation_loss(
    targets: Maps, rebuilt: Maps, *, flat: bool = True, axis: Axis = None
) -> Scalar:
    """How far the decoder is from the encoder: 1 - cosine, mean over the batch, summed over scales.

    In [0, 2 * scales]. With `flat` (both releases) an image's whole map is one vector; without, the
    cosine is taken over the channels of each position and averaged over positions. No gradient
    flows into the targets.
    """
    within = (1, 2, 3) if flat else -1
    total = jnp.zeros(())
    for target, copy in zip(targets, rebuilt, strict=True):
        cosine = jnp.sum(unit(jax.lax.stop_gradient(target), within) * unit(copy, within), within)
        total += jnp.mean(1 - cosine)
    return total if axis is None else jax.lax.pmean(total, axis)


# --- global contrastive loss: pooled codes of the images ---------------------------------------


def _log_softmax_of_cosines(
    rows: Float[Array, "n d"], all_rows: Float[Array, "m d"], temperature: float
) -> Float[Array, "n m"]:
    """Log p_ij: row i's softmax over the cosines with all rows, itself included, / temperature."""
    cosines = jnp.matmul(unit(rows), unit(all_rows).T, precision=EXACT)
    return jax.nn.log_softmax(cosines / temperature, axis=1)


def two_view_supervised_contrastive_loss(
    clean: Float[Array, "b d"],
    augmented: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    temperature: float,
    axis: Axis = None,
) -> Scalar:
    """Global CL of the paper and its first release: minus the mean of log p_ij over positive pairs.

    The 2b rows are both views of every image; a positive pair is two different rows of one class,
    so an image that is alone in its class still has its other view. Supervised contrastive learning
    (Khosla et al., arXiv 2004.11362) but for two things, as released: a row stays in its own
    denominator, and the mean is over all pairs, not first per row: common classes weigh more.
    """
    all_rows = jnp.concatenate([of_all(clean, axis), of_all(augmented, axis)])
    log_p = _log_softmax_of_cosines(jnp.concatenate([clean, augmented]), all_rows, temperature)
    all_labels = of_all(labels, axis)
    same = jnp.tile(labels[:, None] == all_labels[None, :], (2, 2))
    mine = positions_of_mine(len(labels), axis)
    number = jnp.concatenate([mine, len(all_labels) + mine])
    positive = same & (number[:, None] != jnp.arange(len(all_rows), dtype=jnp.int32))
    total = summed(jnp.sum(jnp.where(positive, log_p, 0.0)), axis)
    return -total / summed(jnp.sum(positive), axis)


def second_release_contrastive_loss(
    pooled: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    temperature: float,
    axis: Axis = None,
) -> Scalar:
    """Global CL of the second release: a cross-entropy that gives both kinds of pairs equal mass.

    The mean over rows of -sum_P log p / (|P| + 1e-6) - sum_N log p / (|N| + 1e-6), with P the rows
    of the same class (the row itself among them) and N those of other classes. The second term is
    described as repulsion, but its gradient pulls the negatives in: at the optimum p is 1 / 2|P|
    on positives and 1 / 2|N| on negatives. Only the clean view takes part.
    """
    log_p = _log_softmax_of_cosines(pooled, of_all(pooled, axis), temperature)
    same = labels[:, None] == of_all(labels, axis)[None, :]

    def mean_over(pairs: Bool[Array, "n b"]) -> Float[Array, "n"]:
        count = jnp.sum(pairs, axis=1, dtype=jnp.float32)  # as the reference, also in float64
        return jnp.sum(jnp.where(pairs, log_p, 0.0), axis=1) / (count + EPSILON)

    mean = -jnp.mean(mean_over(same) + mean_over(~same))
    return mean if axis is None else jax.lax.pmean(mean, axis)


# --- local contrastive loss: positions of the projected maps -----------------------------------


def _draw(
    key: PRNGKeyArray, allowed: Bool[Array, "b m"]
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """One uniformly drawn allowed column per row; 0 and False for a row that allows none."""
    # float32 also under x64, so that a float64 run draws the same images.
    logits = jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)
    return jax.random.categorical(key, logits).astype(jnp.int32), jnp.any(allowed, axis=1)


def draw_negatives(
    key: PRNGKeyArray, labels: Int[Array, "b"], *, reach: int | None = None
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """For each image one image of another class, and whether there is any.

    Drawn from the whole batch; with `reach` from the images at the next `reach` positions, the
    first after the last.
    """
    if reach is None:
        return _draw(key, labels[:, None] != labels[None, :])
    after = _positions_after(len(labels), reach)
    return _drawn_after(key, after, labels[after] != labels[:, None])


def draw_partners(
    key: PRNGKeyArray, labels: Int[Array, "b"], *, reach: int | None = None
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """For each image one other image of its class, and whether there is any; as above."""
    if reach is None:
        other = ~jnp.eye(len(labels), dtype=bool)
        return _draw(key, (labels[:, None] == labels[None, :]) & other)
    after = _positions_after(len(labels), reach)
    return _drawn_after(key, after, labels[after] == labels[:, None])


def _positions_after(images: int, reach: int) -> Int[Array, "b reach"]:
    steps = jnp.arange(1, reach + 1, dtype=jnp.int32)
    return (jnp.arange(images, dtype=jnp.int32)[:, None] + steps) % images


def _drawn_after(
    key: PRNGKeyArray, after: Int[Array, "b reach"], allowed: Bool[Array, "b reach"]
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    column, found = _draw(key, allowed)
    return jnp.take_along_axis(after, column[:, None], axis=1)[:, 0], found


def _at(maps: Float[Array, "b n c"], index: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """The vectors of each image at that image's positions."""
    return jax.vmap(lambda vectors, where: vectors[where])(maps, index)


class _Others:
    """The images that this device's may be compared with, and how it gets at them.

    `mine` are the positions of this device's own images in the whole batch.
    """

    def __init__(
        self,
        labels: Int[Array, "n"],
        reach: int | None,
        axis: Axis,
        maps_dtype: DTypeLike | None,
    ) -> None:
        self.labels = of_all(labels, axis)
        self.mine = positions_of_mine(len(labels), axis)
        self._reach = None if reach is None or reach >= len(self.labels) else reach
        self._axis = axis
        self._maps_dtype = maps_dtype

    def draw(
        self, one_for_each: Callable[..., tuple[Array, Array]], keys: Key[Array, "scales"]
    ) -> tuple[Int[Array, "scales n"], Bool[Array, "scales n"]]:
        """Per scale the position of an image for each of this device's, and whether there is one.

        Every device draws for the whole batch, so that the draw does not depend on their number.
        """
        drawn, found = jax.vmap(lambda key: one_for_each(key, self.labels, reach=self._reach))(keys)
        return drawn[:, self.mine], found[:, self.mine]

    def received(self, maps: Float[Array, "n ..."]) -> Float[Array, "m ..."]:
        """These maps of this device's images, and of all others that one may draw."""
        sent = maps if self._maps_dtype is None else maps.astype(self._maps_dtype)
        if self._axis is None or self._reach is None:
            return of_all(sent, self._axis).astype(maps.dtype)
        return with_next(sent, self._reach, self._axis).astype(maps.dtype)

    def rows(self, positions: Int[Array, "n"]) -> Int[Array, "n"]:
        """Where in `received` the images at these positions of the batch are."""
        if self._axis is None or self._reach is None:
            return positions
        distance = (positions - self.mine) % len(self.labels)
        return jnp.arange(len(positions), dtype=jnp.int32) + distance


class _Partners(NamedTuple):
    """Another image of the same class for each of this device's, of one scale."""

    targets: Float[Array, "n h w c"]  # the encoder's maps
    keys: Float[Array, "n h w d"]  # the projected ones
    found: Bool[Array, "n"]  # whether there is one


def _positive_keys(
    encoder_clean: Float[Array, "b h w c"],
    encoder_augmented: Float[Array, "b h w c"],
    keys: Float[Array, "b h*w d"],
    partner: _Partners | None,
    window: int | None,
    maps_dtype: DTypeLike | None,
) -> Float[Array, "b h*w d"]:
    """The key where the frozen encoder finds the best match of each clean position.

    Searched in the image's own augmented view and, given one, also in the partner's.
    """
    search = functools.partial(best_matches, encoder_clean, window=window, maps_dtype=maps_dtype)
    index, cosine = search(encoder_augmented)
    positive = _at(keys, index)
    if partner is None:
        return positive
    index, other_cosine = search(partner.targets)
    better = partner.found[:, None] & (other_cosine > cosine)
    other_keys = unit(partner.keys).reshape(keys.shape)
    return jnp.where(better[..., None], _at(other_keys, index), positive)


def local_contrastive_loss(
    encoder_clean: Maps,
    encoder_augmented: Maps,
    projected_clean: Maps,
    projected_augmented: Maps,
    labels: Int[Array, "b"],
    key: PRNGKeyArray,
    *,
    temperature: float,
    window: int | None = None,
    same_class_candidates: bool = False,
    negatives: Int[Array, "scales b"] | None = None,
    reach: int | None = None,
    axis: Axis = None,
    maps_dtype: DTypeLike | None = None,
) -> Scalar:
    """Local CL: each clean position is told from the same position of an image of another class.

    Per position, with cosines of projected maps over the temperature, -log(e^pos / (e^pos + e^neg
    + 1e-6)); mean over the positions of all images, then over scales.
    - pos: with the augmented view, there where the frozen encoder sees the best match.
    - neg: with the augmented view of one random image of another class, at the same position;
      one draw per image and scale, or the positions in the batch in `negatives`.

    As released, matches are searched over the whole map of the own image. As the paper's supplement
    states it, they lie within `window` positions, and another image of the class takes part
    (`same_class_candidates`; one draw per image and scale, none for an image that is alone in its
    class). An image without a negative is left out of the mean; a batch of a single class has no
    negatives: 0, without gradient.

    As released, negatives and partners come from the whole batch, so every device receives the maps
    of all others. With `reach` they come from the images at the next `reach` positions of the
    batch, a random sample where its order is random: what a device receives then does not grow with
    their number, and the loss is still the same for any number.

    `maps_dtype` is the dtype that a network computed the maps in: in it they travel, and in it they
    are multiplied where the whole map is searched for matches. None: their own.
    """
    others = _Others(labels, reach, axis, maps_dtype)
    negative_keys, partner_keys = jax.random.split(key, (2, len(encoder_clean)))
    drawn, has_negative = others.draw(draw_negatives, negative_keys)
    drawn = drawn if negatives is None else negatives[:, others.mine]
    partners, has_partner = others.draw(draw_partners, partner_keys)

    losses = []
    maps = zip(encoder_clean, encoder_augmented, projected_clean, projected_augmented, strict=True)
    for scale, (clean, augmented, queries, keys) in enumerate(maps):
        b, h, w, c = queries.shape
        query, own = (unit(x).reshape(b, h * w, c) for x in (queries, keys))
        there = others.received(keys)
        partner = None
        if same_class_candidates:
            row = others.rows(partners[scale])
            partner = _Partners(others.received(augmented)[row], there[row], has_partner[scale])
        positive = _positive_keys(clean, augmented, own, partner, window, maps_dtype)
        negative = unit(there[others.rows(drawn[scale])]).reshape(b, h * w, c)
        pos = jnp.sum(query * positive, -1) / temperature
        neg = jnp.sum(query * negative, -1) / temperature
        floor = jnp.full_like(pos, jnp.log(EPSILON))
        loss = jnp.mean(jax.nn.logsumexp(jnp.stack([pos, neg, floor]), axis=0) - pos, axis=1)
        counted = has_negative[scale]
        total = summed(jnp.sum(jnp.where(counted, loss, 0.0)), axis)
        losses.append(total / jnp.maximum(summed(jnp.sum(counted), axis), 1))
    return jnp.mean(jnp.stack(losses))
