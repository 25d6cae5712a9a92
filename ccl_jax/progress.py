"""Progress bars on standard error, for whoever watches and for logs that bars are written into."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

SELDOM = 30.0  # seconds between two states of a bar that goes to a file
Batch = TypeVar("Batch")


def new_bar(total: int, unit: str, *, shown: bool, **more: Any) -> tqdm:
    """A bar up to `total`, silent unless `shown`; `more` goes to tqdm."""
    interval = 0.5 if sys.stderr.isatty() else SELDOM
    return tqdm(
        total=total,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=max(10.0, interval),  # after which tqdm draws a bar that has hardly moved
        disable=not shown,
        **more,
    )


def callback(what: str, unit: str, *, shown: bool) -> Callable[[int, int], None] | None:
    """A function (done, total) that draws a bar from its first call on; None unless `shown`."""
    if not shown:
        return None
    bar: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(new_bar(total, unit, shown=True, desc=what))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return progress


def over_images(
    batches: Iterable[Batch], images: int, batch_size: int, *, shown: bool
) -> Iterator[Batch]:
    """Goes over the batches of so many test images beside a bar."""
    with new_bar(images, "image", shown=shown, desc="scoring", leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(min(batch_size, images - bar.n))
