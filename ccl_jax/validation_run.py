"""Illegal values of the settings for how a run starts and ends, and of a benchmark."""

from ccl_jax.problems import Problems, is_integer, is_number
from ccl_jax.signals import SIGNALS


def check_faults(p: Problems) -> None:
    """Adds what is wrong with `run.stop_signals`, `run.compilation_cache` and the like."""
    p.check(
        "run.stop_signals",
        lambda v: isinstance(v, tuple) and all(name in SIGNALS for name in v),
        f"a tuple of names out of {', '.join(SIGNALS)}",
        "\"('SIGINT','SIGTERM')\"",
    )
    p.check(
        "run.unfinished_exit_code",
        lambda v: is_integer(v) and (v == 0 or 3 <= v <= 125),
        "in 3 .. 125, or 0 for 128 + the signal's number",
        75,
    )
    p.check(
        "run.stall_seconds",
        lambda v: is_number(v) and (v == 0 or v >= 1),
        "seconds, at least 1, or 0 for never",
        600.0,
    )
    p.number("run.peak_tflops", 0.0, 1e6, 989.0)
    p.check(
        "run.compilation_cache",
        lambda v: isinstance(v, str),
        'a folder, or "" for none',
        "~/.cache/ccl_jax/xla",
    )


def check_benchmark(p: Problems) -> None:
    """Adds what is wrong with the settings of `--job benchmark`."""
    p.integer("benchmark.steps", 1, 20)
    p.integer("benchmark.warm_up", 1, 3)
    p.integer("benchmark.images", 1, 320)
    p.integer("benchmark.metric_images", 0, 1725)
    p.check(
        "benchmark.page",
        lambda v: v == "" or (isinstance(v, str) and v.endswith(".md")),
        'a Markdown file, or "" for none',
        "docs/benchmarks.md",
    )
