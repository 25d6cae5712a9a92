"""Three losses: cosine distillation, and class-aware contrastive learning (CCL), local and global.

CCL is Fan et al., "Salvaging the Overlooked", arXiv 2412.04769. Its authors released their code
twice; the global loss differs between the two releases, the rest does not. Where the code and the
paper disagree, the code is followed and the paper's variant is an argument.

A map is (b, h, w, c), a position is one (h, w) of it. "Clean" and "augmented" are two views of the
same images; the encoder is frozen, the projector is trained. Everything is computed over the whole
batch that is passed in, in at least float32. A vector of zero length has cosine 0 with everything,
and no gradient.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Maps = Sequence[Float[Array, "b _ _ _"]]  # one map per scale, fine -> coarse
Scalar = Float[Array, ""]

NORM_FLOOR = 1e-8  # shorter vectors have no direction; the clamp of the reference's cosine
EPSILON = 1e-6  # what the reference adds to the local loss's denominator, and to counts
EXACT = jax.lax.Precision.HIGHEST  # accelerators multiply float32 in fewer bits by default


def _unit(vectors: Float[Array, "..."], axis: int | tuple[int, ...] = -1) -> Float[Array, "..."]:
    """The vectors along `axis`, scaled to length 1; below NORM_FLOOR zero, with zero gradient."""
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    squares = jnp.sum(vectors * vectors, axis, keepdims=True)
    long_enough = squares > NORM_FLOOR**2
    # The inner `where` keeps the square root, whose slope at 0 is infinite, away from 0.
    return jnp.where(long_enough, vectors / jnp.sqrt(jnp.where(long_enough, squares, 1.0)), 0.0)


# --- distillation ------------------------------------------------------------------------------


def cosine_distillation_loss(targets: Maps, rebuilt: Maps, *, flat: bool = True) -> Scalar:
    """How far the decoder is from the encoder: 1 - cosine, mean over the batch, summed over scales.

    In [0, 2 * scales]. With `flat` (both releases) an image's whole map is one vector; without, the
    cosine is taken over the channels of each position and averaged over positions. No gradient
    flows into the targets.
    """
    axis = (1, 2, 3) if flat else -1
    total = jnp.zeros(())
    for target, copy in zip(targets, rebuilt, strict=True):
        cosine = jnp.sum(_unit(jax.lax.stop_gradient(target), axis) * _unit(copy, axis), axis)
        total += jnp.mean(1 - cosine)
    return total


# --- global contrastive loss: pooled codes of the images ---------------------------------------


def _log_softmax_of_cosines(rows: Float[Array, "n d"], temperature: float) -> Float[Array, "n n"]:
    """Log p_ij: row i's softmax over the cosines with all rows, itself included, / temperature."""
    unit = _unit(rows)
    return jax.nn.log_softmax(jnp.matmul(unit, unit.T, precision=EXACT) / temperature, axis=1)


def two_view_supervised_contrastive_loss(
    clean: Float[Array, "b d"],
    augmented: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    temperature: float,
) -> Scalar:
    """Global CL of the paper and its first release: minus the mean of log p_ij over positive pairs.

    The 2b rows are both views of every image; a positive pair is two different rows of one class,
    so an image that is alone in its class still has its other view. Supervised contrastive learning
    (Khosla et al., arXiv 2004.11362) but for two things, as released: a row stays in its own
    denominator, and the mean is over all pairs, not first per row: common classes weigh more.
    """
    log_p = _log_softmax_of_cosines(jnp.concatenate([clean, augmented]), temperature)
    classes = jnp.concatenate([labels, labels])
    positive = (classes[:, None] == classes[None, :]) & ~jnp.eye(len(classes), dtype=bool)
    return -jnp.sum(jnp.where(positive, log_p, 0.0)) / jnp.sum(positive)


def second_release_contrastive_loss(
    pooled: Float[Array, "b d"], labels: Int[Array, "b"], *, temperature: float
) -> Scalar:
    """Global CL of the second release: a cross-entropy that gives both kinds of pairs equal mass.

    The mean over rows of -sum_P log p / (|P| + 1e-6) - sum_N log p / (|N| + 1e-6), with P the rows
    of the same class (the row itself among them) and N those of other classes. The second term is
    described as repulsion, but its gradient pulls the negatives in: at the optimum p is 1 / 2|P|
    on positives and 1 / 2|N| on negatives. Only the clean view takes part.
    """
    log_p = _log_softmax_of_cosines(pooled, temperature)
    same = labels[:, None] == labels[None, :]

    def mean_over(pairs: Bool[Array, "b b"]) -> Float[Array, "b"]:
        count = jnp.sum(pairs, axis=1, dtype=jnp.float32)  # as the reference, also in float64
        return jnp.sum(jnp.where(pairs, log_p, 0.0), axis=1) / (count + EPSILON)

    return -jnp.mean(mean_over(same) + mean_over(~same))


# --- local contrastive loss: positions of the projected maps -----------------------------------


def _draw(
    key: PRNGKeyArray, allowed: Bool[Array, "b b"]
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """One uniformly drawn allowed column per row; 0 and False for a row that allows none."""
    # float32 also under x64, so that a float64 run draws the same images.
    logits = jnp.where(allowed, 0.0, -jnp.inf).astype(jnp.float32)
    return jax.random.categorical(key, logits).astype(jnp.int32), jnp.any(allowed, axis=1)


def draw_negatives(
    key: PRNGKeyArray, labels: Int[Array, "b"]
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """For each image one image of another class, and whether the batch has any."""
    return _draw(key, labels[:, None] != labels[None, :])


def draw_partners(
    key: PRNGKeyArray, labels: Int[Array, "b"]
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """For each image one other image of its class, and whether the batch has any."""
    return _draw(key, (labels[:, None] == labels[None, :]) & ~jnp.eye(len(labels), dtype=bool))


def best_matches(
    queries: Float[Array, "b h w c"],
    keys: Float[Array, "b h w c"],
    *,
    window: int | None = None,
    block: int = 256,
) -> tuple[Int[Array, "b h*w"], Float[Array, "b h*w"]]:
    """For each position of `queries` the most similar position of `keys`, and their cosine.

    A position is counted row by row (y * w + x); the first wins a tie. With `window` only the
    square of that side around the same position is searched. Neither way builds the whole
    (h*w, h*w) matrix: memory is b * block * h*w, or b * h*w with a window. No gradient.

    Raises:
        ValueError: the window has no centre.
    """
    queries, keys = _unit(jax.lax.stop_gradient(queries)), _unit(jax.lax.stop_gradient(keys))
    if window is not None:
        return _best_matches_in_window(queries, keys, window)
    b, h, w, c = queries.shape
    keys = keys.reshape(b, h * w, c)

    def match(query: Float[Array, "b c"]) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
        cosines = jnp.einsum("bc,bnc->bn", query, keys, precision=EXACT)
        return jnp.argmax(cosines, axis=1).astype(jnp.int32), jnp.max(cosines, axis=1)

    by_position = queries.reshape(b, h * w, c).swapaxes(0, 1)
    index, cosine = jax.lax.map(match, by_position, batch_size=block)
    return index.T, cosine.T


def _best_matches_in_window(
    queries: Float[Array, "b h w c"], keys: Float[Array, "b h w c"], window: int
) -> tuple[Int[Array, "b h*w"], Float[Array, "b h*w"]]:
    """`best_matches` of unit vectors, one shift of the keys at a time, keeping the best so far."""
    if window < 1 or window % 2 == 0:
        raise ValueError(
            f"config.loss.local.window={window} has no central position; use an odd number, "
            f"e.g. --config.loss.local.window={max(window, 0) + 1}."
        )
    b, h, w, _ = queries.shape
    reach = window // 2
    margin = [(0, 0), (reach, reach), (reach, reach), (0, 0)]
    padded = jnp.pad(keys, margin)
    inside = jnp.pad(jnp.ones((1, h, w, 1), bool), margin)
    position = jnp.arange(h * w, dtype=jnp.int32).reshape(1, h, w)

    def try_shift(best: tuple, shift: Int[Array, "2"]) -> tuple:
        def shifted(maps: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(maps, shift[0], h, axis=1)
            return jax.lax.dynamic_slice_in_dim(rows, shift[1], w, axis=2)

        cosine = jnp.sum(queries * shifted(padded), -1)
        cosine = jnp.where(shifted(inside)[..., 0], cosine, -jnp.inf)
        index = position + (shift[0] - reach) * w + (shift[1] - reach)
        better = cosine > best[1]
        return (jnp.where(better, index, best[0]), jnp.where(better, cosine, best[1])), None

    nothing = (jnp.zeros((b, h, w), jnp.int32), jnp.full((b, h, w), -jnp.inf, queries.dtype))
    shifts = jnp.stack(jnp.divmod(jnp.arange(window**2, dtype=jnp.int32), window), axis=1)
    (index, cosine), _ = jax.lax.scan(try_shift, nothing, shifts)
    return index.reshape(b, h * w), cosine.reshape(b, h * w)


def _at(maps: Float[Array, "b n c"], index: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """The vectors of each image at that image's positions."""
    return jax.vmap(lambda vectors, where: vectors[where])(maps, index)


def _positive_keys(
    encoder_clean: Float[Array, "b h w c"],
    encoder_augmented: Float[Array, "b h w c"],
    keys: Float[Array, "b h*w d"],
    partner: tuple[Int[Array, "b"], Bool[Array, "b"]] | None,
    window: int | None,
) -> Float[Array, "b h*w d"]:
    """The key where the frozen encoder finds the best match of each clean position.

    Searched in the image's own augmented view and, given one, also in the partner's.
    """
    index, cosine = best_matches(encoder_clean, encoder_augmented, window=window)
    positive = _at(keys, index)
    if partner is None:
        return positive
    other, has_other = partner
    index, other_cosine = best_matches(encoder_clean, encoder_augmented[other], window=window)
    better = has_other[:, None] & (other_cosine > cosine)
    return jnp.where(better[..., None], _at(keys[other], index), positive)


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
) -> Scalar:
    """Local CL: each clean position is told from the same position of an image of another class.

    Per position, with cosines of projected maps over the temperature, -log(e^pos / (e^pos + e^neg
    + 1e-6)); mean over the positions of all images, then over scales.
    - pos: with the augmented view, there where the frozen encoder sees the best match.
    - neg: with the augmented view of one random image of another class, at the same position;
      one draw per image and scale, or the batch indices in `negatives`.

    As released, matches are searched over the whole map of the own image. As the paper's supplement
    states it, they lie within `window` positions, and another image of the class takes part
    (`same_class_candidates`; one draw per image and scale, none for an image that is alone in its
    class). A batch of a single class has no negatives: 0, without gradient.
    """
    negative_keys, partner_keys = jax.random.split(key, (2, len(encoder_clean)))
    drawn, has_negative = jax.vmap(draw_negatives, (0, None))(negative_keys, labels)
    negatives = drawn if negatives is None else negatives
    partners, has_partner = jax.vmap(draw_partners, (0, None))(partner_keys, labels)

    losses = []
    maps = zip(encoder_clean, encoder_augmented, projected_clean, projected_augmented, strict=True)
    for scale, (clean, augmented, queries, keys) in enumerate(maps):
        b, h, w, c = queries.shape
        query, own = (_unit(x).reshape(b, h * w, c) for x in (queries, keys))
        partner = (partners[scale], has_partner[scale]) if same_class_candidates else None
        positive = _positive_keys(clean, augmented, own, partner, window)
        pos = jnp.sum(query * positive, -1) / temperature
        neg = jnp.sum(query * own[negatives[scale]], -1) / temperature
        floor = jnp.full_like(pos, jnp.log(EPSILON))
        losses.append(jnp.mean(jax.nn.logsumexp(jnp.stack([pos, neg, floor]), axis=0) - pos))
    return jnp.where(jnp.all(has_negative), jnp.mean(jnp.stack(losses)), 0.0)
