"""Batches on the devices before they are asked for."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import jax
import numpy as np

from ccl_jax.mesh import put_batch


class Ahead(Iterator[dict[str, jax.Array]], AbstractContextManager):
    """The batches on the devices, in their order, and the next `depth` of them sent there already.

    So reading and copying go on while a step computes. What reading raises comes from the `next`
    that asks for that batch, and is the end. Close it, or use it in a `with`, before `batches` is
    closed: that ends its thread, once the batch that is being read is there.
    """

    def __init__(
        self,
        batches: Iterator[Mapping[str, np.ndarray]],
        mesh: jax.sharding.Mesh,
        *,
        depth: int = 2,
    ) -> None:
        self._batches = batches
        self._mesh = mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches-ahead")
        self._coming: deque[Future[dict[str, jax.Array]]] = deque()
        for _ in range(depth):
            self._send_next()

    def _send_next(self) -> None:
        self._coming.append(self._thread.submit(lambda: put_batch(next(self._batches), self._mesh)))

    def ready(self) -> bool:
        """Whether the next batch is there, so that `next` need not wait."""
        return not self._coming or self._coming[0].done()

    def __next__(self) -> dict[str, jax.Array]:
        if not self._coming:
            raise StopIteration
        try:
            batch = self._coming.popleft().result()
        except Exception:
            self._forget()
            raise
        self._send_next()
        return batch

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; nothing comes after the call."""
        self._forget()
        self._thread.shutdown()

    def _forget(self) -> None:
        while self._coming:
            self._coming.pop().cancel()
