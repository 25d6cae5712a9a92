"""Processes, devices, and where arrays lie on them; nothing else touches jax.distributed."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def initialize_distributed() -> bool:
    """Joins the other processes of this run; returns False where the environment names none.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID says so, or a SLURM step
    (srun) of several tasks, which JAX reads by itself. Must come before anything touches a device.
    Raises ValueError where one of the three variables is missing or no number.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if address:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=_number_from("JAX_NUM_PROCESSES"),
            process_id=_number_from("JAX_PROCESS_ID"),
        )
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()
        return True
    return False


def _number_from(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS is set, so this run has several processes, but "
            f"{variable}={text!r} is not a number. Set it in every process, e.g. "
            f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0, or unset JAX_COORDINATOR_ADDRESS."
        )
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(number: int) -> int:
    """The number that the first process passes, in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def make_mesh(devices: int = 0) -> Mesh:
    """Returns a mesh of the first `devices` devices (0: all), with one axis, "data".

    The axis is of type Auto: under JAX's default, Explicit, a Gram matrix over a sharded batch is
    a type error. Raises ValueError where there are fewer devices, or where a run of several
    processes would leave some out.
    """
    there = jax.devices()
    if not 0 <= devices <= len(there):
        raise ValueError(
            f"config.run.devices={devices}, but this run has {len(there)} "
            f"({there[0].platform}); use 1 to {len(there)}, or --config.run.devices=0 for all."
        )
    if devices and devices != len(there) and jax.process_count() > 1:
        raise ValueError(
            f"config.run.devices={devices} leaves out some of the {len(there)} devices of "
            f"{jax.process_count()} processes; use --config.run.devices=0, and fewer processes."
        )
    chosen = there[: devices or len(there)]
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis, the images of a batch, over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the batch on the devices, split along the first axis.

    Each process passes its own rows, in order of the processes; the arrays that come back are
    global. Raises ValueError where the rows cannot be split over the devices.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


class Ahead(Iterator[dict[str, jax.Array]], AbstractContextManager):
    """The batches on the devices, in their order, and the next `depth` of them sent there already.

    So reading and copying go on while a step computes. What reading raises comes from the `next`
    that asks for that batch, and is the end. Close it, or use it in a `with`, before `batches` is
    closed: that ends its thread, once the batch that is being read is there.
    """

    def __init__(
        self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, *, depth: int = 2
    ) -> None:
        self._batches = batches
        self._mesh = mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches-ahead")
        self._coming: deque[Future[dict[str, jax.Array]]] = deque()
        for _ in range(depth):
            self._send_next()

    def _send_next(self) -> None:
        self._coming.append(self._thread.submit(lambda: put_batch(next(self._batches), self._mesh)))

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


def check_divisible(batch: int, devices: int, setting: str) -> None:
    """Raises ValueError where `batch` images cannot be split evenly over the devices."""
    if batch % devices:
        up = batch + devices - batch % devices
        raise ValueError(
            f"config.{setting}={batch} cannot be split over {devices} devices; "
            f"use a multiple of {devices}, e.g. --config.{setting}={up}."
        )
