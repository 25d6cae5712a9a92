"""Times of work that devices do after the call has returned."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Times(NamedTuple):
    """How long each of several repeats took, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one, in seconds."""
        return float(np.median(self.seconds))

    @property
    def p95(self) -> float:
        """What 95 % of them do not exceed, in seconds, linear between two of them."""
        return float(np.percentile(self.seconds, 95))

    @property
    def total(self) -> float:
        """All of them together, in seconds."""
        return float(sum(self.seconds))


def time_calls(
    call: Callable[[int], Any],
    *,
    warm_up: int,
    repeats: int,
    ahead: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """The times of `repeats` calls, each until what it returns is computed.

    The calls are numbered from 0, so that each can have inputs of its own; the first `warm_up` do
    not count: they compile and fill caches. With `ahead` a call is made before the one before it
    has ended, as in a training, so that devices never wait for the host; its time is then that from
    the end of the one before to its own. CPUs would compute two calls at once, unless the second
    needs what comes out of the first.
    """
    for number in range(warm_up):
        jax.block_until_ready(call(number))
    seconds = []
    begin = clock()
    running = call(warm_up)
    for number in range(warm_up + 1, warm_up + repeats + 1):
        more = number < warm_up + repeats
        following = call(number) if ahead and more else None
        jax.block_until_ready(running)
        end = clock()
        seconds.append(end - begin)
        begin = end
        running = call(number) if not ahead and more else following
    return Times(tuple(seconds))
