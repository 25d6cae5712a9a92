"""Mean and spread of several runs: python -m ccl_jax.compare "CCL=runs/ccl-*" "RD=runs/rd-*".

Each argument is NAME=PATTERN, where the pattern matches workdirs; their newest results count.
"""

import glob
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "image AUROC": ("mean", "image_auroc"),
    "image AP": ("mean", "image_ap"),
    "pixel AUROC": ("mean", "pixel_auroc"),
    "pixel AP": ("mean", "pixel_ap"),
    "AUPRO": ("mean", "pixel_aupro"),
    "neck v-measure": ("diagnostics", "neck_v_measure"),
}


def newest_results(workdir: Path) -> dict[str, Any]:
    """The results of the highest step; ValueError where the workdir has none."""
    found = sorted(workdir.glob("evaluation/*/results.json"), key=lambda p: int(p.parent.name))
    if not found:
        raise ValueError(f"{workdir} holds no evaluation/<step>/results.json; evaluate it first.")
    return json.loads(found[-1].read_text())


def mean_and_spread(values: Sequence[float | None]) -> str:
    """The mean and the sample standard deviation, or "-" where a run has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}"


def comparison_table(runs: dict[str, list[Path]]) -> str:
    """A Markdown row per name: number of runs, then mean ± standard deviation over them."""
    rows = [["", "runs", *COLUMNS], ["---", "---:", *["---:"] * len(COLUMNS)]]
    for name, workdirs in runs.items():
        results = [newest_results(workdir) for workdir in workdirs]
        cells = [
            mean_and_spread([result[section][key] for result in results])
            for section, key in COLUMNS.values()
        ]
        rows.append([name, str(len(workdirs)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str]) -> int:
    """Prints the table for NAME=PATTERN arguments; returns the exit status."""
    runs: dict[str, list[Path]] = {}
    for argument in arguments:
        name, _, pattern = argument.partition("=")
        runs[name] = sorted(Path(path) for path in glob.glob(pattern))
        if not runs[name]:
            print(f"error: {argument!r} matches no folder; write NAME=PATTERN.", file=sys.stderr)
            return 2
    try:
        print(comparison_table(runs) if runs else __doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
