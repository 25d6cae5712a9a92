"""Results as JSON, as a Markdown table and as an HTML page with figure sheets."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
from jaxtyping import Float, Num, UInt8
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ccl_jax.metrics.scores import METRICS

_HEADINGS = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", "P-AP", "P-F1", "AUPRO")  # as METRICS
_LEGEND = (
    "I: per image, P: per pixel; F1 at its best threshold; AUPRO: share of each defect region "
    "found, up to a false-positive rate of {}. Values in 0..1, higher is better."
)
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_CAPTION = 30  # characters that fit over a picture
_COLOURS = "turbo"
_OPACITY = (0.3, 0.7)  # of the colours over the image, at the lowest and the highest score
_DEFECT, _NORMAL, _OUTLINE = "#b3261e", "#1b6e3c", "#ff2bd6"


@dataclass(frozen=True, slots=True)
class Panel:
    """One test image on a figure sheet; without a mask the sheet says so."""

    image: UInt8[np.ndarray, "h w 3"]
    score_map: Float[np.ndarray, "h w"]
    mask: Num[np.ndarray, "h w"] | None
    anomalous: bool
    score: float  # of the image
    caption: str  # kind of defect, file name or whatever tells the image from the others


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

    Each class needs `n_normal`, `n_anomalous` and every name of `METRICS`; the conventions need
    `aupro_fpr_limit`. Raises ValueError for a missing name, a value outside 0..1, and a null
    without a reason.
    """
    if "aupro_fpr_limit" not in conventions:
        raise ValueError("conventions lack aupro_fpr_limit, without which AUPRO means nothing.")
    for name, values in classes.items():
        _check_class(name, values, reasons.get(name) or {})
    mean: dict[str, float | None] = {}
    mean_over: dict[str, int] = {}
    for metric in METRICS:
        known = [v for c in classes.values() if (v := c[metric]) is not None]
        mean[metric] = math.fsum(known) / len(known) if known else None
        mean_over[metric] = len(known)
    columns = ("n_normal", "n_anomalous", *METRICS)
    return {
        "step": step,
        "dataset": dataset,
        "conventions": dict(conventions),
        "mean": mean,
        "mean_over": mean_over,
        "reasons": {name: dict(why) for name, why in reasons.items() if why},
        "classes": {name: {key: c[key] for key in columns} for name, c in classes.items()},
        "provenance": dict(provenance),
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json, results.md and report.html; links the figure sheets that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{results['dataset']}, step {results['step']}"
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    lists = [
        f"## {part.capitalize()}\n\n" + "\n".join(f"- {k}: `{v}`" for k, v in items.items())
        for part, items in _details(results)
    ]
    more = [f"## {table.title}\n\n{_markdown(table)}" for table in _published_tables(results)]
    markdown = "\n\n".join([f"# {title}", markdown_table(results), *more, *lists]) + "\n"
    _write_atomically(folder / "results.json", text.encode())
    _write_atomically(folder / "results.md", markdown.encode())
    _write_atomically(folder / "report.html", _html(folder, title, results).encode())


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


def class_sheet(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes a PNG with a column per test image: image, outlined defect, score map on one scale.

    The colours run from the smallest to the greatest pixel score among the panels.
    """
    if not panels:
        raise ValueError(f"no test image to show on {path}; leave the sheet out.")
    low = min(float(panel.score_map.min()) for panel in panels)
    high = max(float(panel.score_map.max()) for panel in panels)
    columns = len(panels)
    figure = Figure(figsize=(1.9 * columns + 1.1, 6.5), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(3, columns + 1, width_ratios=[1.0] * columns + [0.07])
    for column, panel in enumerate(panels):
        _draw_panel([figure.add_subplot(grid[row, column]) for row in range(3)], panel, low, high)
    for axes, name in zip(figure.axes[:3], ("image", "ground truth", "score map"), strict=True):
        axes.set_ylabel(name, fontsize=10)
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), _COLOURS), cax=figure.add_subplot(grid[2, columns])
    )
    bar.set_label("pixel score, one\nscale per class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    with warnings.catch_warnings():
        # A class named in a script that the font lacks still gets its sheet.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        figure.savefig(draft, format="png")
    draft.replace(path)


def overlay(
    image: UInt8[np.ndarray, "h w 3"], score_map: Float[np.ndarray, "_ _"], vmin: float, vmax: float
) -> UInt8[np.ndarray, "h w 3"]:
    """The image in grey under its score map: faint blue up to `vmin`, strong red from `vmax` on."""
    if image.shape[:2] != score_map.shape:
        raise ValueError(
            f"an image of {image.shape[:2]} pixels and a score map of {score_map.shape} cannot be "
            "laid over each other; resize the image to the size of the map."
        )
    level = np.clip((score_map - vmin) / max(vmax - vmin, 1e-12), 0, 1)
    heat = matplotlib.colormaps[_COLOURS](level)[..., :3] * 255
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    opacity = (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * level)[..., None]
    return np.round(opacity * heat + (1 - opacity) * grey).astype(np.uint8)


def _check_class(name: str, values: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    missing = [key for key in ("n_normal", "n_anomalous", *METRICS) if key not in values]
    if missing:
        raise ValueError(
            f"results of class {name} lack {', '.join(missing)}; give null if unknown."
        )
    for metric in METRICS:
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

    classes = results["classes"]
    datasets = {name.rpartition("/")[0] for name in classes}
    rows = []
    for name, values in classes.items():
        why = results["reasons"].get(name, {})
        shown = name.rpartition("/")[2] if len(datasets) == 1 else name
        counts = [str(values["n_normal"]), str(values["n_anomalous"])]
        rows.append([shown, *counts, *(number(values[m], why.get(m, "")) for m in METRICS)])
    mean = ["mean", "", ""]
    for metric in METRICS:
        known = results["mean_over"][metric]
        partial = f"mean over {known} of {len(classes)} classes" if 0 < known < len(classes) else ""
        mean.append(number(results["mean"][metric], partial))
    notes = [f"{mark} {note}" for note, mark in marks.items()]
    notes.append(_LEGEND.format(results["conventions"]["aupro_fpr_limit"]))
    return _Table("", ["class", "normal", "anomalous", *_HEADINGS], rows, mean, notes)


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


def _write_atomically(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(content)
    draft.replace(path)


def _draw_panel(column: Sequence[Axes], panel: Panel, low: float, high: float) -> None:
    """Fills one column of a sheet from top to bottom."""
    image_axes, truth_axes, score_axes = column
    pictures = (panel.image, panel.image, overlay(panel.image, panel.score_map, low, high))
    for axes, picture in zip(column, pictures, strict=True):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    kind, colour = ("anomalous", _DEFECT) if panel.anomalous else ("normal", _NORMAL)
    caption = panel.caption
    if len(caption) > _CAPTION:
        caption = "…" + caption[1 - _CAPTION :]
    image_axes.set_title(f"{kind}\n{caption}", fontsize=8.5, color=colour, parse_math=False)
    score_axes.set_xlabel(f"image score {panel.score:.4g}", fontsize=8.5)
    _draw_truth(truth_axes, panel)


def _draw_truth(axes: Axes, panel: Panel) -> None:
    """The outline of the defect, or in words why there is none."""
    if panel.mask is not None and panel.mask.any():
        # The margin closes the outline of a defect that touches the border.
        height, width = panel.mask.shape
        rim = np.pad((panel.mask > 0).astype(float), 1)
        across, down = np.arange(-1, width + 1), np.arange(-1, height + 1)
        axes.contour(across, down, rim, levels=[0.5], colors=_OUTLINE, linewidths=1.2)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        return
    text = "no defect"
    if panel.anomalous:
        text = "no mask" if panel.mask is None else "defect lost in resizing"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 2}
    axes.text(0.5, 0.04, text, transform=axes.transAxes, fontsize=8, ha="center", bbox=box)
