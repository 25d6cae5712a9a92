"""Histograms of pixel scores per class, which add up over batches, devices and hosts.

A non-negative float32 compares like its bits, so the leading bits of a score are its bin: 8192 bins
per octave between 2**-10 and 4, 1024 per octave from there down to 2**-42 and up to 1024. Scores
that differ by less than one part in 8192 (elsewhere: in 1024) may share a bin and count as tied. On
smoothed maps whose scores spread by 5 % or more this changes AUROC and AUPRO by less than 1e-5, AP
and F1-max by about 1e-4. Everything is counted in whole numbers, so that the result does not depend
on how the images were batched or over how many devices and processes they were spread.
Devices count in 32 bits, the host adds up in 64 (`counter.Counter`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, UInt8

_FINE_BITS, _COARSE_BITS = 13, 10  # bins per octave, as powers of two
_LOW_BINS = 32 << _COARSE_BITS  # 2**-42 to 2**-10: products of cosine distances go there
_FINE_BINS = 12 << _FINE_BITS  # 2**-10 to 2**2
_HIGH_BINS = 8 << _COARSE_BITS  # 2**2 to 2**10: Euclidean distances go there
BINS = _LOW_BINS + _FINE_BINS + _HIGH_BINS

_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127  # of float32
_FINE_FROM = (_EXPONENT_BIAS - 10) << _FINE_BITS  # leading bits of 2**-10
_COARSE_FROM = (_EXPONENT_BIAS - 42) << _COARSE_BITS  # leading bits of 2**-42
_COARSE_SKIPPED = 12 << _COARSE_BITS  # coarse bins whose place the fine ones take
_SLACK = 1e-4  # rounding makes a cosine distance of zero slightly negative; that is no error

_HIGH_BITS, _WEIGHT_BITS = 15, 35  # a region weight is kept in units of 2**-35, in two words
MOST_PIXELS = 2**31 - 1  # that an int32 counts
MOST_REGIONS = 2 ** (32 - _HIGH_BITS) - 1  # whose weights the high word holds, rest included


class ScoreCounts(NamedTuple):
    """Pixels and region weights per class and bin, and unusable maps per class, on a device.

    `normal` and `anomalous` are int32 [k, bins]. `region` is two words, uint32 [k, bins] each, in
    units of 2**-15 and 2**-35. `invalid` is int32 [k]: maps left out because of NaN, infinite or
    negative scores.
    """

    normal: jax.Array
    anomalous: jax.Array
    region: tuple[jax.Array, jax.Array]
    invalid: jax.Array


class Totals(NamedTuple):
    """The same on the host, in 64 bits: over batches, devices and processes.

    `normal` and `anomalous` are int64 [k, bins]; `region` is uint64 [k, bins] in units of 2**-35,
    enough for 2**29 regions of a class in a bin; `invalid` is int64 [k]. `class_counts` makes
    histograms of it.
    """

    normal: np.ndarray
    anomalous: np.ndarray
    region: np.ndarray
    invalid: np.ndarray


class UnusableScoresError(ValueError):
    """A network's score maps are NaN, infinite or negative, so it has no metrics."""


class ClassCounts(NamedTuple):
    """One class's histograms on the host, [bins] each, over ascending scores."""

    normal: np.ndarray
    anomalous: np.ndarray
    region: np.ndarray


def empty_counts(classes: int) -> ScoreCounts:
    """Counts of no image at all: a little over 2 MiB per class."""
    return ScoreCounts(
        normal=jnp.zeros((classes, BINS), jnp.int32),
        anomalous=jnp.zeros((classes, BINS), jnp.int32),
        region=(jnp.zeros((classes, BINS), jnp.uint32), jnp.zeros((classes, BINS), jnp.uint32)),
        invalid=jnp.zeros(classes, jnp.int32),
    )


def score_bins(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Bin of each score, in 0 .. BINS - 1; never decreases as the score grows."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(scores.astype(jnp.float32), 0.0), jnp.int32)
    fine = (bits >> (_MANTISSA_BITS - _FINE_BITS)) - _FINE_FROM
    coarse = (bits >> (_MANTISSA_BITS - _COARSE_BITS)) - _COARSE_FROM
    above = coarse - _COARSE_SKIPPED + _FINE_BINS
    bins = jnp.where(fine < 0, coarse, jnp.where(fine < _FINE_BINS, _LOW_BINS + fine, above))
    return jnp.clip(bins, 0, BINS - 1)


def bin_values() -> Float64[np.ndarray, "bins"]:
    """The middle of each bin, ascending: what every score in it is taken for.

    The first bin also holds all smaller scores and zero, the last also all greater ones.
    """
    low = np.arange(_LOW_BINS) + _COARSE_FROM
    fine = np.arange(_FINE_BINS) + _FINE_FROM
    high = np.arange(_HIGH_BINS) + _LOW_BINS + _COARSE_SKIPPED + _COARSE_FROM
    coarse_shift, fine_shift = _MANTISSA_BITS - _COARSE_BITS, _MANTISSA_BITS - _FINE_BITS
    starts = np.concatenate([low << coarse_shift, fine << fine_shift, high << coarse_shift])
    edges = np.append(starts, (_EXPONENT_BIAS + 10) << _MANTISSA_BITS).astype(np.int32)
    return (edges[1:].view(np.float32) + edges[:-1].view(np.float32).astype(np.float64)) / 2


def add_scores(
    counts: ScoreCounts,
    maps: Float[Array, "b h w"],
    masks: UInt8[Array, "b h w"],
    region_weight: Float32[Array, "b h w"],
    labels: Int[Array, "b"],
    counted: Bool[Array, "b"],
) -> ScoreCounts:
    """Counts that include the pixels of the images where `counted` is True.

    `masks` is non-zero on anomalous pixels; `region_weight` is one over the number of pixels of the
    pixel's region (`scores.region_weights`), 0 on normal pixels. Exact for up to MOST_PIXELS and
    MOST_REGIONS of a class in one bin. Call it under `jax.jit` with the counts donated.
    """
    usable = (jnp.isfinite(maps) & (maps >= -_SLACK)).all(axis=(1, 2))
    used = (counted & usable)[:, None, None]
    anomalous = masks > 0
    bins = score_bins(maps)
    classes = counts.invalid.shape[0]

    def add(into: jax.Array, where: jax.Array, amount: jax.Array | int) -> jax.Array:
        # Pixels that do not belong here get a row that does not exist, which "drop" leaves out.
        rows = jnp.where(where, labels[:, None, None], classes)
        return into.at[rows, bins].add(amount, mode="drop")

    invalid = (counted & ~usable).astype(jnp.int32)
    high, low = counts.region
    used_bits = 0
    remainder = region_weight
    for bits in _digit_sizes(maps.size):
        scaled = remainder * 2.0**bits
        digit = jnp.floor(scaled)
        remainder = scaled - digit
        used_bits += bits
        digits = add(
            jnp.zeros((classes, BINS), jnp.uint32), used & anomalous, digit.astype(jnp.uint32)
        )
        high, low = _add_digits(high, low, digits, used_bits)
    return ScoreCounts(
        normal=add(counts.normal, used & ~anomalous, 1),
        anomalous=add(counts.anomalous, used & anomalous, 1),
        region=(high, low),
        invalid=counts.invalid.at[labels].add(invalid, mode="drop"),
    )


def empty_totals(classes: int) -> Totals:
    """Totals of no image at all: a little over 3 MiB per class."""
    return Totals(
        normal=np.zeros((classes, BINS), np.int64),
        anomalous=np.zeros((classes, BINS), np.int64),
        region=np.zeros((classes, BINS), np.uint64),
        invalid=np.zeros(classes, np.int64),
    )


def host_totals(counts: ScoreCounts) -> Totals:
    """The counts of one device as 64-bit integers on the host."""
    totals = empty_totals(len(counts.invalid))
    add_to_totals(totals, jax.device_get(counts))
    return totals


def add_to_totals(totals: Totals, counts: ScoreCounts) -> None:
    """Adds the counts of a device, fetched, to the totals in place."""
    for label in range(len(totals.invalid)):
        totals.normal[label] += counts.normal[label]
        totals.anomalous[label] += counts.anomalous[label]
        high, low = (np.asarray(word[label], np.uint64) for word in counts.region)
        totals.region[label] += (high << np.uint64(_WEIGHT_BITS - _HIGH_BITS)) + low
        totals.invalid[label] += counts.invalid[label]


def class_counts(totals: Totals, class_names: Sequence[str]) -> dict[str, ClassCounts]:
    """The histograms of every class.

    Raises:
        UnusableScoresError: NaN, infinite or negative scores; names the classes.
        ValueError: Another number of names than of classes.
    """
    if len(class_names) != len(totals.invalid):
        raise ValueError(
            f"{len(class_names)} class names for counts of {len(totals.invalid)} classes; "
            "pass one name for each label, in the order of the labels."
        )
    bad = [f"{name} ({n} maps)" for name, n in zip(class_names, totals.invalid, strict=True) if n]
    if bad:
        raise UnusableScoresError(
            f"NaN, infinite or negative pixel scores in class {', '.join(bad)}; the checkpoint has "
            "most likely diverged: evaluate an earlier step (--config.eval.step) or train with a "
            "lower --config.optimizer.lr."
        )
    return {
        name: ClassCounts(
            totals.normal[i], totals.anomalous[i], totals.region[i] * 2.0**-_WEIGHT_BITS
        )
        for i, name in enumerate(class_names)
    }


def _digit_sizes(pixels: int) -> list[int]:
    """Bits of each digit of a weight, so that a digit summed over all pixels fits into 32 bits.

    A float32 sum would round: adding 1/50000 again and again drifts by more than 1e-4.
    """
    most = 32 - (pixels - 1).bit_length()
    return [min(most, _WEIGHT_BITS - start) for start in range(0, _WEIGHT_BITS, most)]


def _add_digits(
    high: jax.Array, low: jax.Array, digits: jax.Array, position: int
) -> tuple[jax.Array, jax.Array]:
    """The two words plus `digits` in units of 2**-position, the low word carried over."""
    below = position - _HIGH_BITS
    if below <= 0:
        return high + (digits << -below), low
    high = high + (digits >> below)
    low = low + ((digits & (2**below - 1)) << (_WEIGHT_BITS - position))
    low_bits = _WEIGHT_BITS - _HIGH_BITS
    return high + (low >> low_bits), low & (2**low_bits - 1)
