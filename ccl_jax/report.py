"""Results as JSON, as a Markdown table and as an HTML page with figure sheets."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import filelock

from ccl_jax.atomic import write_atomically
from ccl_jax.metrics.scores import METRICS, SAMPLE_METRIC

_NAMES = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", "P-AP", "P-F1", "AUPRO")
_HEADINGS = {**dict(zip(METRICS, _NAMES, strict=True)), SAMPLE_METRIC: "S-AUROC"}
_LEGEND = (
    "I: per image, P: per pixel; F1 at its best threshold; AUPRO: share of each defect region "
    "found, up to a false-positive rate of {}. Values in 0..1, higher is better."
)
_SAMPLE_LEGEND = " S: per part, by the highest score of its views."
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Table(NamedTuple):
    """What the Markdown and the HTML page show alike."""

    title: str
    header: list[str]
    rows: list[list[str]]
    mean: list[str]
    notes: list[str]


def summarize(
    classes: Mapping[str, Mapping[str, Any]],
    reasons: Mapping[str, Mapping[str, str]],
    *,
    step: int,
    dataset: str,
    conventions: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of results.json: values per class, and the plain mean over the classes with one.

    Each class needs `n_normal`, `n_anomalous` and every name of `METRICS`, and may have
    `SAMPLE_METRIC`; the conventions need `aupro_fpr_limit`. Raises ValueError for a missing name,
    a value outside 0..1, and a null without a reason.
    """
    if "aupro_fpr_limit" not in conventions:
        raise ValueError("conventions lack aupro_fpr_limit, without which AUPRO means nothing.")
    for name, values in classes.items():
        _check_class(name, values, reasons.get(name) or {})
    mean: dict[str, float | None] = {}
    mean_over: dict[str, int] = {}
    for metric in _metrics_of(classes):
        known = [v for c in classes.values() if (v := c.get(metric)) is not None]
        mean[metric] = math.fsum(known) / len(known) if known else None
        mean_over[metric] = len(known)
    columns = ("n_normal", "n_anomalous", *mean)
    return {
        "step": step,
        "dataset": dataset,
        "conventions": dict(conventions),
        "mean": mean,
        "mean_over": mean_over,
        "reasons": {name: dict(why) for name, why in reasons.items() if why},
        "classes": {
            name: {key: c[key] for key in columns if key in c} for name, c in classes.items()
        },
        "provenance": dict(provenance),
    }


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block in which no other process writes the results of this run.

    A training and an evaluator that follows it may come to the same step at once; the files of the
    folder then all come from the one that was last.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / ".lock"):
        yield


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes results.md, report.html with links to the figure sheets that are there, results.json.

    That one comes last: where it is, the evaluation is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{results['dataset']}, step {results['step']}"
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    lists = [
        f"## {part.capitalize()}\n\n" + "\n".join(f"- {k}: `{v}`" for k, v in items.items())
        for part, items in _details(results)
    ]
    more = [f"## {table.title}\n\n{_markdown(table)}" for table in _published_tables(results)]
    markdown = "\n\n".join([f"# {title}", markdown_table(results), *more, *lists]) + "\n"
    write_atomically(folder / "results.md", markdown)
    write_atomically(folder / "report.html", _html(folder, title, results))
    write_atomically(folder / "results.json", text)


def markdown_table(results: Mapping[str, Any]) -> str:
    """A row per class, then the mean, with three decimals; footnotes say why a value is missing."""
    return _markdown(_main_table(results))


def _markdown(table: _Table) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    rows.append([f"**{cell}**" if cell else "" for cell in table.mean])
    widths = [max(map(len, column)) for column in zip(table.header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n\n".join(["\n".join(map(line, [table.header, rule, *rows])), *table.notes])


def sheet_path(folder: Path, class_name: str) -> Path:
    """Where the figure sheet of a class belongs, so that the report finds it."""
    figures = (folder / "figures").absolute()
    path = Path(os.path.normpath(figures / f"{class_name}.png"))
    if not path.is_relative_to(figures):
        raise ValueError(
            f"class {class_name!r} would put its figures outside of {figures}; choose another "
            "name, e.g. with --config.data.name."
        )
    return path


def _metrics_of(classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All metrics that any of the classes has."""
    sampled = any(SAMPLE_METRIC in values for values in classes.values())
    return [*METRICS, SAMPLE_METRIC] if sampled else [*METRICS]


def _check_class(name: str, values: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    missing = [key for key in ("n_normal", "n_anomalous", *METRICS) if key not in values]
    if missing:
        raise ValueError(
            f"results of class {name} lack {', '.join(missing)}; give null if unknown."
        )
    for metric in _metrics_of({name: values}):
        value = values[metric]
        if value is None and not reasons.get(metric):
            raise ValueError(f"{metric} of class {name} is null without a reason; add one.")
        if value is not None and not 0 <= value <= 1 + 1e-9:
            raise ValueError(
                f"{metric} of class {name} is {value}, outside 0..1; look for NaN in its scores."
            )


def _main_table(results: Mapping[str, Any]) -> _Table:
    """The exact metrics; footnotes say why a value is missing."""
    marks: dict[str, str] = {}

    def number(value: float | None, note: str) -> str:
        if note and note not in marks:
            marks[note] = str(len(marks) + 1).translate(_SUPERSCRIPTS)
        return ("-" if value is None else f"{value:.3f}") + marks.get(note, "")

    classes, metrics = results["classes"], list(results["mean"])
    datasets = {name.rpartition("/")[0] for name in classes}
    rows = []
    for name, values in classes.items():
        why = results["reasons"].get(name, {})
        shown = name.rpartition("/")[2] if len(datasets) == 1 else name
        counts = [str(values["n_normal"]), str(values["n_anomalous"])]
        cells = (number(values[m], why.get(m, "")) if m in values else "" for m in metrics)
        rows.append([shown, *counts, *cells])
    mean = ["mean", "", ""]
    for metric in metrics:
        known = results["mean_over"][metric]
        partial = f"mean over {known} of {len(classes)} classes" if 0 < known < len(classes) else ""
        mean.append(number(results["mean"][metric], partial))
    notes = [f"{mark} {note}" for note, mark in marks.items()]
    legend = _LEGEND.format(results["conventions"]["aupro_fpr_limit"])
    notes.append(legend + (_SAMPLE_LEGEND if SAMPLE_METRIC in metrics else ""))
    header = ["class", "normal", "anomalous", *(_HEADINGS[metric] for metric in metrics)]
    return _Table("", header, rows, mean, notes)


def _published_tables(results: Mapping[str, Any]) -> list[_Table]:
    """A table for each published convention that was asked for."""

    def cells(name: str, values: Mapping[str, float | None]) -> list[str]:
        return [name, *("-" if value is None else f"{value:.3f}" for value in values.values())]

    return [
        _Table(
            f"Convention {name}",
            ["class", *found["mean"]],
            [cells(*row) for row in found["classes"].items()],
            cells("mean", found["mean"]),
            [found["description"]],
        )
        for name, found in results.get("published_conventions", {}).items()
    ]


def _html(folder: Path, title: str, results: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined  # here: the first step need not wait for it

    template = resources.files("ccl_jax").joinpath("report.html.jinja").read_text("utf-8")
    figures = [
        (name, quote(f"figures/{name}.png"))
        for name in results["classes"]
        if sheet_path(folder, name).is_file()
    ]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return page.from_string(template).render(
        title=title,
        tables=[_main_table(results), *_published_tables(results)],
        figures=figures,
        details=_details(results),
    )


def _details(results: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """What is listed below the table: strings as they are, everything else as JSON."""
    return [
        (
            part,
            {
                key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for key, value in results[part].items()
            },
        )
        for part in ("diagnostics", "conventions", "provenance")
        if results.get(part)
    ]
