"""How much memory of a device a program needs."""

from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes of one device, and in words where the number comes from."""

    bytes: int
    source: str


def peak_memory(device: jax.Device, compiled: jax.stages.Compiled) -> Memory | None:
    """The most that was used on the device so far, or what the program says that it needs.

    The first where the device reports it, for all that this process has run on it; else what the
    compiled program plans. None where neither is known.
    """
    return memory_of(device.memory_stats(), compiled.memory_analysis())


def memory_of(stats: dict[str, Any] | None, analysis: Any) -> Memory | None:
    """The peak by a device's statistics, or else by XLA's analysis of the program.

    That is arguments, results and intermediate values, less what the results take over from the
    arguments.
    """
    reported = (stats or {}).get("peak_bytes_in_use")
    if reported:
        return Memory(int(reported), "reported by the device, the peak of the process so far")
    if analysis is None:
        return None
    planned = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return Memory(planned, "planned by the compiled program")
