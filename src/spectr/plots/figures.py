"""The figures of the experiments, as matplotlib draws them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from spectr.plots.axes import GREY, legend_below, percent
from spectr.plots.family import agreement, heldout, tradeoff
from spectr.plots.palette import TINT, colours

if TYPE_CHECKING:
    from spectr.evaluation.experiments import Result

_FAMILIES = [
    f"{name}{weights}"
    for weights in ("", ", weights softmax")
    for name in ("spectr", "spectr-paper", "spectr-projection", "spectr-code")
]


def figure(result: Result) -> Figure:
    """The picture that belongs to an experiment's result."""
    return _DRAW[result.name](dict(result.data))


def as_svg(drawn: Figure) -> str:
    """A figure as SVG text, to be put into a page as it is."""
    stream = io.StringIO()
    # The same picture gives the same text; words stay words, which are smaller than outlines and can be searched.
    settings = {"svg.hashsalt": "spectr", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with mpl.rc_context(settings):  # pyright: ignore[reportArgumentType]
        FigureCanvasSVG(drawn)
        drawn.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _quality(data: dict[str, Any]) -> Figure:
    tasks = data["tasks"]
    drawn = Figure(figsize=(2 + 0.75 * len(tasks), 3.6), layout="constrained")
    axes = drawn.subplots()
    place = np.arange(len(tasks))
    for shift, key, label, colour in ((-0.2, "base", "base model", GREY), (0.2, "expert", "own expert", "#4a7fd6")):
        values, errors = np.array(data[key]) * 100, np.array(data[f"{key}_error"]) * 100
        axes.bar(place + shift, values, 0.38, yerr=errors, capsize=2, label=label, color=colour)
    known = [(i, share) for i, share in enumerate(data["majority"]) if share is not None]
    for number, (i, share) in enumerate(known):
        label = None if number else "majority class"
        axes.plot([i - 0.42, i + 0.42], [share * 100] * 2, color="black", lw=1.2, ls=":", label=label)
    axes.set_xticks(place, tasks, rotation=30, ha="right")
    percent(axes, "accuracy, %")
    legend_below(drawn, axes)
    return drawn


def _similarity(data: dict[str, Any]) -> Figure:
    names, mean = data["experts"], np.array(data["mean"])
    drawn = Figure(figsize=(3.6 + 0.45 * len(names) + 4, 1.8 + 0.42 * len(names)), layout="constrained")
    left, right = drawn.subplots(1, 2)
    shown = mean.copy()
    np.fill_diagonal(shown, np.nan)
    limit = max(float(np.nanmax(np.abs(shown))), 1e-6)
    image = left.imshow(shown, cmap="PuOr", vmin=-limit, vmax=limit)
    left.set_xticks(range(len(names)), names, rotation=40, ha="right")
    left.set_yticks(range(len(names)), names)
    left.set_title("mean cosine of the updates", fontsize=10)
    drawn.colorbar(image, ax=left, shrink=0.8)
    palette = colours(list(data["by_kind"]))
    for kind, blocks in data["by_kind"].items():
        depth = [int(block) for block in blocks]
        right.plot(depth, list(blocks.values()), marker=".", lw=1, label=kind, color=palette[kind])
    right.set_xlabel("layer")
    right.set_ylabel("mean cosine of all pairs")
    right.set_title("by layer and kind of module", fontsize=10)
    right.legend(fontsize=7, ncols=2)
    right.grid(alpha=0.3)
    return drawn


def _routing(data: dict[str, Any]) -> Figure:
    tasks, routers = data["tasks"], list(data["per_task"])
    drawn = Figure(figsize=(4 + 0.9 * len(tasks), 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[3, 2])
    palette = colours(routers)
    place, width = np.arange(len(tasks)), 0.8 / len(routers)
    for number, router in enumerate(routers):
        shares = [data["per_task"][router][task]["first"] * 100 for task in tasks]
        left.bar(place + (number - (len(routers) - 1) / 2) * width, shares, width, label=router, color=palette[router])
        top_4 = [data["per_task"][router][task]["top_4"] * 100 for task in tasks]
        right.scatter([data["nearest"][task] for task in tasks], top_4, s=18, color=palette[router], label=router)
    left.axhline(100 / len(data["experts"]), color="black", ls=":", lw=1)
    left.set_xticks(place, tasks, rotation=30, ha="right")
    left.set_title("prompts whose expert is found", fontsize=10)
    percent(left, "prompts, %")
    legend_below(drawn, left)
    left.set_ylim(0, 105)
    right.set_xlabel("cosine to the nearest other expert")
    right.set_title("right expert among four, by task similarity", fontsize=10)
    right.set_ylabel("tokens and modules, %")
    right.grid(alpha=0.3)
    return drawn


def _multitask(data: dict[str, Any]) -> Figure:
    methods = data["methods"]
    shown = {name: m for name, m in methods.items() if m["family"] not in _FAMILIES or m["k"] in (None, 4)}
    drawn = Figure(figsize=(11, 1.6 + 0.28 * len(shown)), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[3, 2], sharex=False)
    names = list(shown)
    shares = [shown[name]["share"] * 100 for name in names]
    kinds = [GREY if name in ("base", "its own expert") else "#4a7fd6" for name in names]
    kinds = ["#e69f00" if name.startswith("calibrated") else kind for name, kind in zip(names, kinds, strict=True)]
    errors = [shown[name]["error"] * 100 for name in names]
    left.barh(range(len(names)), shares, xerr=errors, color=kinds, capsize=2)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.axvline(100, color="black", ls=":", lw=1)
    for number, share in enumerate(shares):
        left.text(2, number, f"{share:.1f}", va="center", color="white", fontsize=8)
    left.set_xlabel("accuracy as a share of the own expert's, mean over tasks, %")
    families = [family for family in _FAMILIES if any(m["family"] == family for m in methods.values())]
    palette = colours([family.partition(",")[0] for family in families])
    for family in families:
        alone = (
            family.replace("-paper", "").replace("-code", "-projection").partition(",")[0]
        )  # with k = 1 all the same
        line = sorted(
            (m["k"], m["share"] * 100, m["error"] * 100)
            for m in methods.values()
            if m["family"] == family or (m["k"] == 1 and m["family"] == alone)
        )
        k, share, error = zip(*line, strict=True)
        style = {"ls": "--" if "softmax" in family else "-", "color": palette[family.partition(",")[0]]}
        right.errorbar(k, share, yerr=error, marker=".", lw=1, capsize=2, label=family, **style)
    right.axhline(100, color="black", ls=":", lw=1)
    right.set_xlabel("experts for each token (k)")
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    return drawn


def _tokens(data: dict[str, Any]) -> Figure:
    """Rows of text for each router, every token on the colour of its expert."""
    palette, width, rows = colours(data["experts"]), 100, []
    for router, weights in data["weights"].items():
        rows.append([(router, None, 0.0)])
        line, used = [], 0
        for token, row in zip(data["tokens"], weights, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            text = token.replace("\n", "\u23ce").replace("$", r"\$") or " "
            if line and used + len(token) > width:
                rows.append(line)
                line, used = [], 0
            line.append((text, palette[data["experts"][best]], row[best]))
            used += len(token)
        rows.append(line)
    drawn = Figure(figsize=(11, 0.6 + 0.27 * len(rows)))
    axes = drawn.add_axes((0.01, 0.02, 0.98, 0.9))
    axes.set_xlim(0, width * 1.02)
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    strongest = max(max(row) for weights in data["weights"].values() for row in weights)
    for number, line in enumerate(rows):
        place = 0.0
        for text, colour, weight in line:
            if colour is None:
                axes.text(0, number + 0.7, text, fontsize=9, fontweight="bold")
                continue
            strength = TINT * (0.15 + 0.85 * weight / max(strongest, 1e-9))
            axes.add_patch(Rectangle((place, number + 0.05), len(text), 0.9, color=colour, alpha=strength, lw=0))
            axes.text(place + len(text) / 2, number + 0.7, text, fontsize=8, family="monospace", ha="center")
            place += len(text)
    handles = [Patch(color=palette[name], label=name) for name in data["experts"]]
    drawn.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=7, frameon=False)
    return drawn


def _ranks(data: dict[str, Any]) -> Figure:
    routers = data["routers"]
    drawn = Figure(figsize=(9, 3.4), layout="constrained")
    palette = colours(list(routers))
    pairs = ((0, "tokens and modules, %"), (2, "prompts, by vote, %"))
    for axes, (place, label) in zip(drawn.subplots(1, 2), pairs, strict=True):
        for router, by_rank in routers.items():
            ranks = sorted(map(int, by_rank))
            values = np.array([by_rank[str(rank)] for rank in ranks]) * 100
            style = {"marker": ".", "lw": 1.2, "capsize": 2, "color": palette[router], "label": router}
            axes.errorbar(ranks, values[:, place], yerr=values[:, place + 1], **style)
        axes.axhline(data["chance"] * 100, color="black", ls=":", lw=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_ylim(0, 105)
        axes.set_xlabel("rank of the experts")
        percent(axes, label)
    legend_below(drawn, drawn.axes[0])
    return drawn


def _mixed(data: dict[str, Any]) -> Figure:
    routers = data["routers"]
    drawn = Figure(figsize=(8, 3.2), layout="constrained")
    axes = drawn.subplots()
    palette = colours(list(routers))
    place, width = np.arange(3), 0.8 / max(len(routers), 1)
    for number, (router, values) in enumerate(routers.items()):
        shares, errors = np.array(values).T * 100
        shift = (number - (len(routers) - 1) / 2) * width
        axes.bar(place + shift, shares, width, yerr=errors, capsize=2, label=router, color=palette[router])
    axes.set_xticks(place, ["both experts are\nthe first two", "one of them is", "their share of the work"])
    axes.set_ylim(0, 105)
    percent(axes, "%")
    legend_below(drawn, axes)
    return drawn


def _wording(data: dict[str, Any]) -> Figure:
    tasks, routers = data["tasks"], list(data["per_task"])
    drawn = Figure(figsize=(2.5 + 0.9 * len(tasks), 3.6), layout="constrained")
    axes = drawn.subplots()
    palette = colours(routers)
    place, width = np.arange(len(tasks)), 0.8 / len(routers)
    for number, router in enumerate(routers):
        shares = [data["per_task"][router][task] * 100 for task in tasks]
        axes.bar(place + (number - (len(routers) - 1) / 2) * width, shares, width, label=router, color=palette[router])
    axes.set_xticks(place, tasks, rotation=30, ha="right")
    axes.set_ylim(0, 105)
    percent(axes, "prompts whose expert is found, %")
    legend_below(drawn, axes)
    return drawn


def _robustness(data: dict[str, Any]) -> Figure:
    cases = data["cases"]
    routers = list(next(iter(cases.values())))
    drawn = Figure(figsize=(5 + 1.2 * len(cases), 3.4), layout="constrained")
    palette = colours(routers)
    pairs = (("found", "prompts whose expert is found, %"), ("stolen", "prompts that the odd one took, %"))
    for axes, (key, label) in zip(drawn.subplots(1, 2), pairs, strict=True):
        place, width = np.arange(len(cases)), 0.8 / len(routers)
        for number, router in enumerate(routers):
            shares = [case[router][key] * 100 for case in cases.values()]
            shift = (number - (len(routers) - 1) / 2) * width
            axes.bar(place + shift, shares, width, label=router, color=palette[router])
        axes.set_xticks(place, ["\n".join(textwrap.wrap(name, 16)) for name in cases], fontsize=7)
        axes.set_ylim(0, 105)
        percent(axes, label)
    legend_below(drawn, drawn.axes[0])
    return drawn


def _costs(data: dict[str, Any]) -> Figure:
    routers = data["routers"]
    drawn = Figure(figsize=(7, 1.2 + 0.5 * len(routers)), layout="constrained")
    axes = drawn.subplots()
    place = np.arange(len(routers))
    for shift, key, label, colour in ((-0.2, "formula", "formula", GREY), (0.2, "flops", "measured", "#4a7fd6")):
        axes.barh(
            place + shift, [row[key] / data["base"] * 100 for row in routers.values()], 0.38, label=label, color=colour
        )
    axes.set_yticks(place, list(routers))
    axes.invert_yaxis()
    axes.set_xlabel("arithmetic added for each token, % of the base model's")
    axes.legend(fontsize=8)
    return drawn


_DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "quality": _quality,
    "similarity": _similarity,
    "tokens": _tokens,
    "routing": _routing,
    "ranks": _ranks,
    "multitask": _multitask,
    "heldout": heldout,
    "tradeoff": tradeoff,
    "agreement": agreement,
    "wording": _wording,
    "mixed": _mixed,
    "robustness": _robustness,
    "costs": _costs,
}
