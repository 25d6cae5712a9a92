"""How fast images get score maps."""

from collections.abc import Sequence

from jaxtyping import Array

from ccl_jax.benchmark.timing import Times, time_calls
from ccl_jax.scoring import Scorer


def time_scoring(
    scorer: Scorer, batches: Sequence[Array], *, warm_up: int, repeats: int, ahead: bool
) -> Times:
    """The times of scoring uint8 batches [b, h, w, 3] that lie on the devices."""
    return time_calls(
        lambda number: scorer(batches[number % len(batches)]),
        warm_up=warm_up,
        repeats=repeats,
        ahead=ahead,
    )
