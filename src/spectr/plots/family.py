"""Figures of the experiments beside the paper's: held-out tasks, cheaper choices, and quality against cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from spectr.plots.axes import GREY, legend_below, percent
from spectr.plots.palette import colours


def heldout(data: dict[str, Any]) -> Figure:
    """Points over the base model by method, and accuracy by task."""
    methods, tasks = data["methods"], data["tasks"]
    drawn = Figure(figsize=(11, 1.8 + 0.3 * len(methods)), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    names = list(methods)
    gains = np.array([methods[name]["gain"] for name in names]) * 100
    errors = np.array([methods[name]["error"] for name in names]) * 100
    kinds = [GREY if "hindsight" in name or name == "base" else "#4a7fd6" for name in names]
    left.barh(range(len(names)), gains, xerr=errors, color=kinds, capsize=2)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.axvline(0, color="black", lw=1)
    left.set_xlabel("points over the base model, mean over tasks")
    palette = colours(tasks)
    for task in tasks:
        values = [methods[name]["accuracy"][task] * 100 for name in names]
        right.plot(values, range(len(names)), marker="o", ls="", ms=5, color=palette[task], label=task)
        right.axvline(methods["base"]["accuracy"][task] * 100, color=palette[task], lw=0.8, ls=":")
    right.set_xlabel("accuracy, % (dotted: the base model)")
    right.grid(axis="x", alpha=0.3)
    legend_below(drawn, right)
    return drawn


def agreement(data: dict[str, Any]) -> Figure:
    """How often a cheaper router chooses as SpectR does, against its arithmetic."""
    drawn = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawn.subplots()
    for name, row in data["routers"].items():
        kind, _, more = name.partition(", ")
        place = (row["flops"], row["agreement"] * 100)
        axes.plot(*place, marker="o", color="#4a7fd6" if kind == "lag" else "#e69f00", ls="")
        words = f"{kind.upper()}\n{more.removeprefix('shortlist ') if kind == 'lag' else 'shared A'}"
        side = {"xytext": (0, 6), "ha": "center"} if kind == "lag" else {"xytext": (8, -8), "ha": "left"}
        axes.annotate(words, place, textcoords="offset points", fontsize=8, **side)
    axes.axhline(100, color="black", ls=":", lw=1)
    axes.axvline(1, color="black", ls=":", lw=1)
    axes.set_xlabel("arithmetic added, as a share of SpectR's")
    axes.set_xlim(0, 1.15)
    axes.set_ylim(0, 122)
    percent(axes, "same first choice, %")
    return drawn


def tradeoff(data: dict[str, Any]) -> Figure:
    """Quality against cost: held-in on the left, held-out on the right."""
    points = data["points"]
    drawn = Figure(figsize=(11, 4.2), layout="constrained")
    palette = colours(list(points))
    inside, outside = drawn.subplots(1, 2)
    place = _apart({name: point["cost"] * 100 for name, point in points.items()})
    for axes, key in ((inside, "held_in"), (outside, "held_out")):
        for name, point in points.items():
            if point[key] is None:
                continue
            value, error = (number * 100 for number in point[key])
            style = {"marker": "o", "ms": 6, "capsize": 3, "color": palette[name], "label": name}
            axes.errorbar(place[name], value, yerr=error, **style)
        axes.set_xlabel("arithmetic added to a token, % of the base model's")
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    inside.axhline(100, color="black", ls=":", lw=1)
    inside.axhline(data["base"] * 100, color=GREY, lw=1)
    inside.set_ylabel("held-in: share of the own expert's accuracy, %")
    outside.axhline(0, color=GREY, lw=1)
    outside.set_ylabel("held-out: points over the base model")
    legend_below(drawn, inside)
    return drawn


def _apart(costs: dict[str, float], step: float = 0.45) -> dict[str, float]:
    """Places on an axis that are at least ``step`` apart, in the order of the costs."""
    placed: dict[str, float] = {}
    for name in sorted(costs, key=costs.__getitem__):
        last = max(placed.values(), default=-step)
        placed[name] = max(costs[name], last + step)
    return placed
