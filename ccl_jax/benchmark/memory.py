"""How much memory of a device a program needs."""

from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes of one device, and in words where the number comes from."""

    bytes: int
    source: str


def peak_memory(device: jax.Device, compiled: jax.stages.Compiled) -> Memory | None:
    """The most that was used on the device so far, or what the program says that it needs.

    The first where the device reports it, for all that this process has run on it; else arguments,
    results and intermediate values of the compiled program, less what its results take over from
    its arguments. None where neither is known.
    """
    reported = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if reported:
        return Memory(int(reported), "reported by the device, the peak of the process so far")
    planned = planned_memory(compiled.memory_analysis())
    return None if planned is None else Memory(planned, "planned by the compiled program")


def planned_memory(analysis: Any) -> int | None:
    """Bytes that a program needs by XLA's analysis of it; None where there is none."""
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
