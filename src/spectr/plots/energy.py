"""What a low-rank expert keeps of an update, by transformer block and kind of layer."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spectr.grouping import grouped
from spectr.plots.axes import cell_texts, save

if TYPE_CHECKING:
    from spectr.extraction import Kept, Report

_UNCHANGED = "#e3e5e8"
_LEAST_RANGE = 5.0  # least range of a colour scale, so that small differences look alike
_NUMBERED = 40  # layers up to which the cells are wide enough for numbers


def energy_figure(report: Report) -> Figure:
    """Two heat maps by transformer block and kind of layer: the percentage of the squared norm kept, and the rank used.

    A cell may stand for several modules (a mixture's experts). It shows their common share and mean rank. The second
    map is left out where all ranks are the same.
    """
    cells, kinds, columns = _cells(report)
    labels = ["\u2013" if layer is None else str(layer) for layer in columns]
    maps = [("squared norm kept, %", "YlGnBu", _percent, _grid(cells, kinds, columns, _share))]
    ranks = {one.rank for one in report.modules}
    if len(ranks) > 1:
        maps.append(
            (
                "rank",
                "YlOrBr",
                "{:.0f}".format,
                _grid(cells, kinds, columns, lambda some: mean(one.rank for one in some)),
            )
        )
    width = max(5.0, 2.6 + 0.3 * len(columns)) if len(columns) <= _NUMBERED else 2.6 + 0.14 * len(columns)
    drawn = Figure(figsize=(width, 0.9 + len(maps) * (0.75 + 0.3 * len(kinds))), layout="constrained")
    for axes, (label, colours, text, grid) in zip(np.atleast_1d(drawn.subplots(len(maps), 1)), maps, strict=True):
        _heat_map(drawn, axes, grid, label, colours, text if len(columns) <= _NUMBERED else None)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        step = 1 if len(columns) <= _NUMBERED else 5
        axes.set_xticks(range(0, len(columns), step), labels[::step], fontsize=7)
    notes = ["\u2013: outside the layers"] if None in columns else []
    notes += ["grey: no change there"] if len(cells) < len(kinds) * len(columns) else []
    drawn.axes[len(maps) - 1].set_xlabel("layer" + (f" ({'; '.join(notes)})" if notes else ""), fontsize=9)
    drawn.suptitle(textwrap.fill(_title(report, ranks), int(12 * width)), fontsize=10)
    return drawn


def write_energy_map(report: Report, path: str | Path) -> Path:
    """Write :func:`energy_figure` as PNG, or as SVG if the path ends in ``.svg``."""
    return save(energy_figure(report), path)


def _cells(report: Report) -> tuple[dict[tuple[str, int | None], list[Kept]], list[str], list[int | None]]:
    from spectr.extraction import places

    where = places(one.module for one in report.modules)
    cells = grouped(((where[one.module].kind, where[one.module].layer), one) for one in report.modules)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    numbered = [layer for _, layer in cells if layer is not None]
    outside: list[int | None] = [None] if any(layer is None for _, layer in cells) else []
    layers = range(min(numbered), max(numbered) + 1) if numbered else ()
    return cells, kinds, [*layers, *outside]


def _grid(cells: dict, kinds: list[str], columns: list[int | None], value: Callable[[list[Kept]], float]) -> np.ndarray:
    """Kinds by columns; NaN where there is nothing."""
    rows = [[value(cells[kind, layer]) if (kind, layer) in cells else np.nan for layer in columns] for kind in kinds]
    return np.array(rows)


def _share(modules: list[Kept]) -> float:
    total = sum(one.change**2 for one in modules)
    return 100 * sum(one.share * one.change**2 for one in modules) / total if total else 100.0


def _heat_map(
    drawn: Figure, axes: Axes, grid: np.ndarray, label: str, colours: str, text: Callable[[float], str] | None
) -> None:
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    low = min(low, high - _LEAST_RANGE)
    shades = mpl.colormaps[colours].with_extremes(bad=_UNCHANGED)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=shades, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(np.arange(grid.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(grid.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    scale = drawn.colorbar(image, ax=axes, pad=0.01, ticks=MaxNLocator(nbins=6, integer=True))
    scale.set_label(label, fontsize=8)
    scale.ax.tick_params(labelsize=7)
    scale.outline.set_visible(False)
    if text is not None:
        cell_texts(axes, grid, low + 0.6 * (high - low), text, 6.5)


def _percent(value: float) -> str:
    """A percentage that shows "100" only from 99.95 upwards."""
    return "100" if value >= 99.95 else f"{min(value, 99.0):.0f}"


def _title(report: Report, ranks: set[int]) -> str:
    ranked = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    name = report.name.replace("$", r"\$")
    return f"{name}: {report.share:.1%} of the squared norm of the update kept, {ranked}"
