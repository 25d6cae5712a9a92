"""A census in words and as JSON: a table of the classes, then what was found."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ccl_jax.data.census import FAR_FROM_SQUARE, KINDS, NEAR_CONSTANT, Census, ClassCount

SHOWN = 3  # of the pictures of a finding; all of them are in the JSON


def as_text(census: Census) -> str:
    """The table, one row per class, and the findings with their first files."""
    head = (
        "class",
        "train",
        "normal",
        "anomalous",
        "defects",
        "size",
        "modes",
        "masks",
        "defective",
    )
    rows = [head, *(_row(name, count) for name, count in census.classes.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    text = "\n".join([*table, "", *_findings(census)])
    return text.encode(errors="backslashreplace").decode()  # a name that is no UTF-8 can be printed


def as_json(census: Census) -> dict[str, Any]:
    """Everything: `classes` by name, `findings` by kind, each with `count` and all `files`."""
    return {
        "image_size": census.image_size,
        "bounds": {"near_constant": NEAR_CONSTANT, "far_from_square": FAR_FROM_SQUARE},
        "spoiled": census.spoiled,
        "classes": {name: _class_json(count) for name, count in census.classes.items()},
        "findings": {
            kind: {
                "severity": _severity(kind),
                "what": _words(kind, census),
                "count": len(found),
                "files": [
                    {"file": file} | ({KINDS[kind].detail: detail} if KINDS[kind].detail else {})
                    for file, detail in found
                ],
            }
            for kind, found in census.findings.items()
        },
    }


def _row(name: str, count: ClassCount) -> tuple[str, ...]:
    sizes = _sizes(count.sizes) or {"min": (0, 0), "max": (0, 0), "different": 0}
    anomalous = count.test_anomalous.total()
    return (
        name,
        str(count.train),
        str(count.test_normal),
        str(anomalous),
        str(len(count.test_anomalous)),
        _times(sizes["min"])
        + (
            f" to {_times(sizes['max'])}, {sizes['different']} sizes"
            if sizes["different"] > 1
            else ""
        ),
        " ".join(mode for mode, _ in count.modes.most_common()),
        f"{anomalous - len(count.missing)} of {anomalous}" if anomalous else "",
        f"{statistics.fmean(count.shares):.2%}" if count.shares else "",
    )


def _class_json(count: ClassCount) -> dict[str, Any]:
    shares = count.shares
    return {
        "train_normal": count.train,
        "test_normal": count.test_normal,
        "test_anomalous": dict(sorted(count.test_anomalous.items())),
        "sizes": _sizes(count.sizes),
        "modes": dict(count.modes.most_common()),
        "masks": {
            "present": count.masks,
            "missing": len(count.missing),
            "defective_share": {
                "min": min(shares),
                "mean": statistics.fmean(shares),
                "max": max(shares),
            }
            if shares
            else None,
        },
    }


def _sizes(sizes: Counter[tuple[int, int]]) -> dict[str, Any] | None:
    """(width, height) of the images with the fewest, the median and the most pixels."""
    if not sizes:
        return None
    ordered = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
    return {
        "min": ordered[0],
        "median": ordered[(len(ordered) - 1) // 2],
        "max": ordered[-1],
        "different": len(sizes),
    }


def _findings(census: Census) -> list[str]:
    lines = []
    for kind, found in census.findings.items():
        if found:
            lines.append(f"{_severity(kind)}: {_words(kind, census)}: {len(found)}")
            lines += [f"  {line}" for line in _first([_entry(kind, *entry) for entry in found])]
    return lines or ["nothing is wrong"]


def _entry(kind: str, file: str, detail: Any) -> str:
    """One picture of a finding, in a line."""
    match KINDS[kind].detail:
        case "reason":
            return detail  # which begins with the file
        case "same_as":
            return " = ".join([file, *_first(detail)])
        case "size":
            return f"{file}: {_times(detail)}"
        case "share":
            return f"{file}: {detail:.2%} of the pixels"
        case "deviation":
            return f"{file}: {detail:g}"
    return file


def _first(lines: Sequence[str]) -> list[str]:
    return [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]


def _severity(kind: str) -> str:
    return "error" if KINDS[kind].spoils else "warning"


def _words(kind: str, census: Census) -> str:
    return KINDS[kind].words.format(size=census.image_size)


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
