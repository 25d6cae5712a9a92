"""Figure sheets of test images, and score maps laid over images."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

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
