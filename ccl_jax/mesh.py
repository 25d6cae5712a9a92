"""Processes, devices, and where arrays lie on them; nothing else touches jax.distributed.

A run is one or several processes, each with its own devices, that all execute the same program on
the same global arrays (JAX's multi-controller runtime).
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "shard")  # images lie over both, parameters and optimizer state over the second
CLUSTERS = ("slurm", "ompi", "mpi4py", "k8s", "gcetpu", "gketpu")  # JAX's names for what it reads
_SMALL = 2**12  # elements; splitting less saves no memory worth a message
_DIGIT = 16  # bits; sums of 16-bit digits over 2**16 processes fit into 32 bits

# --- processes ---------------------------------------------------------------------------------


def initialize_distributed(cluster: str = "auto", *, heartbeat_seconds: int = 100) -> bool:
    """Joins the other processes of this run; returns False where there are none.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID says so, whatever `cluster`
    is, unless that is "none". Without them "auto" lets JAX read the environment of a SLURM step or
    an Open MPI job of several tasks, and of a TPU slice on Google Kubernetes Engine with several
    hosts; a name among CLUSTERS makes JAX read that one. A process that says nothing for
    `heartbeat_seconds` is taken for lost, which ends the others. Must come before anything touches
    a device; a second call changes nothing.

    Raises:
        ValueError: One of the three variables is missing or no number, or there is no such cluster.
    """
    if cluster == "none" or jax.distributed.is_initialized():
        return jax.distributed.is_initialized()
    if os.environ.get("JAX_COORDINATOR_ADDRESS", ""):
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=_number_from("JAX_NUM_PROCESSES"),
            process_id=_number_from("JAX_PROCESS_ID"),
            cluster_detection_method="deactivate",  # asks nobody else, such as Kubernetes
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
        return True
    method = _detected_cluster() if cluster == "auto" else cluster
    if method is None:
        return False
    try:
        jax.distributed.initialize(
            cluster_detection_method=method, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except (ValueError, KeyError) as error:  # what JAX raises where the environment is another
        raise ValueError(
            f"config.run.cluster={cluster!r}: this process is not in such a cluster ({error}). "
            f"Start it by the cluster's own command, set JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID in every process, or run alone: "
            f"--config.run.cluster=none."
        ) from error
    return True


def _detected_cluster() -> str | None:
    """The cluster in whose job of several processes this one is, by its environment."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return "gketpu"
    return None


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


def is_alone() -> bool:
    """Whether this process is the only one of its run; starts no device."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Returns when every process has called it with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def sum_over_processes(totals: np.ndarray) -> np.ndarray:
    """The exact sum, element by element, of 64-bit integers that every process passes.

    All pass the same shape, and all get the sum, modulo 2**64. Travels as four digits of 16 bits,
    because devices add 32-bit numbers.
    """
    if jax.process_count() == 1:
        return totals
    words = totals.astype(totals.dtype, order="C").view(np.uint64)
    shifts = [np.uint64(_DIGIT * place) for place in range(64 // _DIGIT)]
    digits = np.stack([words >> shift & np.uint64(2**_DIGIT - 1) for shift in shifts])
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    one_each = Mesh([firsts[process] for process in sorted(firsts)], ("process",))
    apart = jax.make_array_from_process_local_data(
        NamedSharding(one_each, PartitionSpec("process")), digits[None].astype(np.uint32)
    )
    added = jax.jit(_sum_of_first_axis, out_shardings=replicated(one_each))(apart)
    parts = np.asarray(added).astype(np.uint64)
    total = np.zeros_like(words)
    for part, shift in zip(parts, shifts, strict=True):
        total += part << shift
    return total.view(totals.dtype)


def _sum_of_first_axis(array: jax.Array) -> jax.Array:
    return array.sum(0, dtype=array.dtype)


def from_first(number: int) -> int:
    """The number that the first process passes, in every process."""
    mine = number if is_first() else 0
    return int(sum_over_processes(np.array([mine], np.int64))[0])


# --- the mesh ----------------------------------------------------------------------------------


def make_mesh(devices: int = 0, parameter_shards: int = 1) -> Mesh:
    """Returns a mesh of the first `devices` devices (0: all), with the axes AXES.

    `parameter_shards` devices, neighbours in the order of the processes, hold one copy of
    parameters and optimizer state together; 1: every device holds all. The axes are of type Auto:
    under JAX's default, Explicit, a Gram matrix over a sharded batch is a type error.

    Raises:
        ValueError: There are fewer devices, the shards do not divide them, or a run of several
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
    if parameter_shards < 1 or len(chosen) % parameter_shards:
        fit = [n for n in range(1, len(chosen) + 1) if len(chosen) % n == 0]
        raise ValueError(
            f"config.run.parameter_shards={parameter_shards} does not divide the {len(chosen)} "
            f"devices; use one of {', '.join(map(str, fit))}, e.g. "
            f"--config.run.parameter_shards={max(n for n in fit if n <= max(parameter_shards, 1))}."
        )
    shape = (len(chosen) // parameter_shards, parameter_shards)
    return Mesh(np.array(chosen).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Splits the first axis, the images of a batch, over all devices of the mesh in their order."""
    return PartitionSpec(mesh.axis_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis, the images of a batch, over the devices."""
    return NamedSharding(mesh, batch_spec(mesh))


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each leaf (with a shape) of parameters, statistics or optimizer state.

    The longest axis that the parameter shards divide is split over them; what has none, or less
    than 4096 elements, lies in full on every device.
    """
    shards = mesh.shape[AXES[1]]

    def sharding(leaf: Any) -> NamedSharding:
        fit = [n for n, length in enumerate(leaf.shape) if length % shards == 0]
        if shards == 1 or not fit or math.prod(leaf.shape) < _SMALL:
            return replicated(mesh)
        longest = max(fit, key=lambda n: leaf.shape[n])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXES[1]))

    return jax.tree.map(sharding, state)


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


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns host arrays, the same in every process, in full on every device."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # device_put would compare the processes' copies first, over the network.
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            sharding, np.asarray(leaf), np.shape(leaf)
        ),
        tree,
    )


def on_every_host(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns global arrays as numpy arrays, whole in every process; all must call it alike."""
    if jax.process_count() > 1:
        tree = jax.jit(_as_it_is, out_shardings=replicated(mesh))(tree)
    return jax.device_get(tree)


def _as_it_is(tree: PyTree) -> PyTree:
    return tree


def check_divisible(batch: int, devices: int, setting: str) -> None:
    """Raises ValueError where `batch` images cannot be split evenly over the devices."""
    if batch % devices:
        up = batch + devices - batch % devices
        raise ValueError(
            f"config.{setting}={batch} cannot be split over {devices} devices; "
            f"use a multiple of {devices}, e.g. --config.{setting}={up}."
        )
