"""Seconds from the command to the first training step, of a first start and of a second one.

    python -m tests.reference.start_time [--page docs/benchmarks.md] [--folder FOLDER]

Generates the demo's data first, which counts for neither. Then the demo's command is started twice
in the same folder of compiled programs, empty at the first, each time in a new workdir, until
its log has a line of step 1, and is then ended.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ccl_jax.benchmark.page import machine, replace_part
from ccl_jax.benchmark.table import circumstances, heading

ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0  # seconds for a start


def command(folder: Path, *words: str) -> list[str]:
    """The demo's command line, with data and compiled programs in a folder of its own."""
    return [
        *(sys.executable, "-m", "ccl_jax.main", "--config", str(ROOT / "configs/demo.py")),
        f"--config.data.root={folder / 'data'}",
        f"--config.run.compilation_cache={folder / 'compiled'}",
        *words,
    ]


def environment() -> dict[str, str]:
    """This process's environment, with the package, and without another folder for programs."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"PYTHONPATH": str(ROOT)}


def seconds_to_first_step(folder: Path, name: str) -> float:
    """Starts the demo in a new workdir; returns when the first line of its log was there.

    Raises RuntimeError where it ends before, or takes longer than PATIENCE.
    """
    workdir, output = folder / name, folder / f"{name}.txt"
    log = workdir / "log/metrics.jsonl"
    words = (f"--workdir={workdir}", "--config.train.log_every=1")
    with output.open("w") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command(folder, *words), env=environment(), stdout=out, stderr=out
        )
        try:
            while not (log.is_file() and '"step": 1,' in log.read_text()):
                if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                    raise RuntimeError(f"no first step ({process.poll()}): {output.read_text()}")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def measure(folder: Path) -> tuple[float, float]:
    """Seconds of the first and of the second start; data are generated before."""
    prepare = command(folder, "--job=prepare", "--config.run.progress=False")
    subprocess.run(prepare, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return seconds_to_first_step(folder, "first"), seconds_to_first_step(folder, "second")


def main() -> None:
    """Prints both times, and writes them to the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write the table to")
    parser.add_argument(
        "--folder", type=Path, help="a new folder for all; default: a temporary one"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        first, second = measure(chosen.folder or Path(temporary))
    print(f"first start {first:.1f} s, second start {second:.1f} s")
    if chosen.page is None:
        return
    body = (
        f"{heading(circumstances('tests.reference.start_time', sys.argv[1:]))}\n"
        f"From the demo's command to the end of its first training step, its data being there: "
        f"first start {first:.1f} s, with nothing compiled yet; second start, in another workdir, "
        f"{second:.1f} s (goal: under 10 s).\n"
    )
    replace_part(chosen.page, machine(), "From the command to the first step", body)


if __name__ == "__main__":
    main()
