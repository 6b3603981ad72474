"""What figures share."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = "#9aa3b2"


def legend_below(drawn: Figure, axes: Axes) -> None:
    """One legend for the whole figure, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def percent(axes: Axes, label: str) -> None:
    """A vertical axis in percent."""
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
