"""What all figures share: axes, bars, text in cells, and writing to a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from spectr.folders import with_parents
from spectr.plots.palette import colours

GREY, BLUE, ORANGE = "#9aa3b2", "#4a7fd6", "#e69f00"
DOTTED = {"color": "black", "ls": ":", "lw": 1}
_DPI = 160
_NO_DATE = {"Date": None, "Creator": None}  # the same picture gives the same text


def canvas(width: float, height: float, columns: int = 1, **layout: Any) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes: a single one, or an array of ``columns``."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(1, columns, **layout)


def legend_below(drawn: Figure, number: int = 0) -> Figure:
    """Put the legend of one of the axes below the whole figure, where it covers nothing."""
    handles, labels = drawn.axes[number].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return drawn


def percent(axes: Axes, label: str, **more: Any) -> None:
    """Show the vertical axis in percent; ``more`` is set too, such as limits and a title."""
    axes.set(ylabel=label, **more)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def grouped_bars(
    axes: Axes, groups: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Draw bars side by side: one for each group at each place. The places count from 0."""
    palette, width = colours(list(groups)), 0.8 / max(len(groups), 1)
    for number, (name, values) in enumerate(groups.items()):
        place = np.arange(len(values)) + (number - (len(groups) - 1) / 2) * width
        spread = errors[name] if errors else None
        axes.bar(place, values, width, yerr=spread, capsize=2, label=name, color=palette[name])


def listed_bars(axes: Axes, names: Sequence[str], values: Any, errors: Any, kinds: Sequence[str]) -> None:
    """Draw horizontal bars in the colours ``kinds``, with the first name at the top."""
    axes.barh(range(len(names)), values, xerr=errors, color=kinds, capsize=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()


def cell_texts(axes: Axes, grid: np.ndarray, bound: float, text: Callable[[float], str], fontsize: float) -> None:
    """Write a heat map's numbers into its cells, in white above ``bound``. NaN cells stay empty."""
    for row, column in np.argwhere(~np.isnan(grid)):
        colour = "white" if grid[row, column] > bound else "black"
        style = {"ha": "center", "va": "center", "fontsize": fontsize, "color": colour}
        axes.text(column, row, text(float(grid[row, column])), **style)


def as_svg(drawn: Figure) -> str:
    """A figure as SVG text, which a page can embed."""
    stream = io.StringIO()
    # Text stays text: it is smaller than outlines, and can be searched.
    settings = {"svg.hashsalt": "spectr", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with mpl.rc_context(settings):  # pyright: ignore[reportArgumentType]
        FigureCanvasSVG(drawn)
        drawn.savefig(stream, format="svg", metadata=_NO_DATE)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def save(drawn: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, or as SVG if the path ends in ``.svg``."""
    path = with_parents(path)
    FigureCanvasAgg(drawn)
    with mpl.rc_context({"svg.hashsalt": "spectr"}):
        if path.suffix.lower() == ".svg":
            drawn.savefig(path, metadata=_NO_DATE)
        else:
            drawn.savefig(path, dpi=_DPI, metadata={"Software": "spectr"})
    return path
