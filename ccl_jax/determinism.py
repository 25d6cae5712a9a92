"""The same bits from every run on a GPU."""

import os

FLAG = "--xla_gpu_deterministic_ops"


def ask_for_it() -> None:
    """Tells XLA to take only operations that give the same bits every time, on GPUs.

    Sets the flag in XLA_FLAGS, which is read when the first device is used, so call it before that.
    It leaves out autotuning, whose choice of kernels depends on measured times, and sums of
    unsettled order. Programs for CPUs and TPUs give the same bits without it.
    Raises ValueError where XLA_FLAGS already says the contrary.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if f"{FLAG}=false" in flags:
        raise ValueError(
            f"config.run.deterministic=True, but XLA_FLAGS={flags!r} says {FLAG}=false; "
            f"take it out there, or use --config.run.deterministic=False."
        )
    if FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=true".strip()
