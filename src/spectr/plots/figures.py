"""The figures of the experiments, and heat maps of a text's routing, as matplotlib draws them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from spectr.plots.axes import (
    BLUE,
    DOTTED,
    GREY,
    ORANGE,
    canvas,
    cell_texts,
    grouped_bars,
    legend_below,
    listed_bars,
    percent,
    save,
)
from spectr.plots.palette import TINT, colours
from spectr.plots.token_weights import TokenRouting

if TYPE_CHECKING:
    from spectr.evaluation.experiments import Result

_FAMILIES = [
    f"{name}{weights}"
    for weights in ("", ", weights softmax")
    for name in ("spectr", "spectr-paper", "spectr-projection", "spectr-code")
]


def figure(result: Result) -> Figure:
    """The picture that belongs to an experiment's result."""
    with mpl.rc_context({"axes.titlesize": 10}):
        return _DRAW[result.name](dict(result.data))


def _quality(data: dict[str, Any]) -> Figure:
    tasks = data["tasks"]
    drawn, axes = canvas(2 + 0.75 * len(tasks), 3.6)
    place = np.arange(len(tasks))
    for shift, key, label, colour in ((-0.2, "base", "base model", GREY), (0.2, "expert", "own expert", BLUE)):
        values, errors = np.array(data[key]) * 100, np.array(data[f"{key}_error"]) * 100
        axes.bar(place + shift, values, 0.38, yerr=errors, capsize=2, label=label, color=colour)
    known = [(i, share) for i, share in enumerate(data["majority"]) if share is not None]
    for number, (i, share) in enumerate(known):
        label = None if number else "majority class"
        axes.plot([i - 0.42, i + 0.42], [share * 100] * 2, color="black", lw=1.2, ls=":", label=label)
    axes.set_xticks(place, tasks, rotation=30, ha="right")
    percent(axes, "accuracy, %")
    return legend_below(drawn)


def _similarity(data: dict[str, Any]) -> Figure:
    names, shown = data["experts"], np.array(data["mean"])
    drawn, (left, middle, right) = canvas(3.6 + 0.45 * len(names) + 7, 1.8 + 0.42 * len(names), 3)
    np.fill_diagonal(shown, np.nan)
    limit = max(float(np.nanmax(np.abs(shown))), 1e-6)
    image = left.imshow(shown, cmap="PuOr", vmin=-limit, vmax=limit)
    left.set_xticks(range(len(names)), names, rotation=40, ha="right")
    left.set_yticks(range(len(names)), names)
    left.set_title("mean cosine of the updates")
    drawn.colorbar(image, ax=left, shrink=0.8)
    both = {"updates": data["by_expert"], "factors": data["factors_by_expert"]}
    grouped_bars(middle, both)
    middle.set_xticks(range(len(names)), names, rotation=40, ha="right")
    middle.set_title("mean cosine with the others")
    middle.legend(fontsize=7)
    palette = colours(list(data["by_kind"]))
    for kind, blocks in data["by_kind"].items():
        right.plot([*map(int, blocks)], list(blocks.values()), marker=".", lw=1, label=kind, color=palette[kind])
    right.set(xlabel="transformer block", ylabel="mean cosine of all pairs", title="by kind of layer")
    right.legend(fontsize=7, ncols=2)
    right.grid(alpha=0.3)
    return drawn


def _routing(data: dict[str, Any]) -> Figure:
    tasks, per_task = data["tasks"], data["per_task"]
    drawn, (left, right) = canvas(4 + 0.9 * len(tasks), 3.8, 2, width_ratios=[3, 2])
    grouped_bars(left, {name: [shares[task]["first"] * 100 for task in tasks] for name, shares in per_task.items()})
    left.axhline(100 / len(data["experts"]), **DOTTED)
    left.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    percent(left, "prompts, %", ylim=(0, 105), title="prompts whose expert is found")
    legend_below(drawn)
    palette = colours(list(per_task))
    for name, shares in per_task.items():
        top_4 = [shares[task]["top_4"] * 100 for task in tasks]
        right.scatter([data["similarity"][task] for task in tasks], top_4, s=18, color=palette[name], label=name)
    right.axhline(100 * min(4, len(data["experts"])) / len(data["experts"]), **DOTTED)
    right.set(xlabel="mean cosine with the other experts", ylabel="tokens and modules, %")
    right.set_title("right expert among four, by task similarity")
    right.grid(alpha=0.3)
    return drawn


def _multitask(data: dict[str, Any]) -> Figure:
    methods = data["methods"]
    shown = {name: m for name, m in methods.items() if m["family"] not in _FAMILIES or m["k"] in (None, 4)}
    drawn, (left, right) = canvas(11, 1.6 + 0.28 * len(shown), 2, width_ratios=[3, 2])
    kinds = [GREY if name in ("base", "its own expert") else BLUE for name in shown]
    kinds = [ORANGE if name.startswith("calibrated") else kind for name, kind in zip(shown, kinds, strict=True)]
    shares, errors = ([m[key] * 100 for m in shown.values()] for key in ("share", "error"))
    listed_bars(left, list(shown), shares, errors, kinds)
    left.axvline(100, **DOTTED)
    for number, share in enumerate(shares):
        left.text(2, number, f"{share:.1f}", va="center", color="white", fontsize=8)
    left.set_xlabel("accuracy as a share of the own expert's, mean over tasks, %")
    families = [family for family in _FAMILIES if any(m["family"] == family for m in methods.values())]
    palette = colours([family.partition(",")[0] for family in families])
    for family in families:
        name = family.partition(",")[0]
        alone = name.replace("-paper", "").replace("-code", "-projection")  # with k = 1 all the same
        line = sorted(
            (m["k"], m["share"] * 100, m["error"] * 100)
            for m in methods.values()
            if m["family"] == family or (m["k"] == 1 and m["family"] == alone)
        )
        k, share, error = zip(*line, strict=True)
        style = {"ls": "--" if "softmax" in family else "-", "color": palette[name]}
        right.errorbar(k, share, yerr=error, marker=".", lw=1, capsize=2, label=family, **style)
    right.axhline(100, **DOTTED)
    right.set_xlabel("experts for each token (k)")
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    return drawn


def _tokens(data: dict[str, Any]) -> Figure:
    """Rows of text for each router, with every token on its expert's colour."""
    palette, width, rows = colours(data["experts"]), 100, []
    scores = {f"{router}: scores": _shares(rows) for router, rows in data["scores"].items()}
    for router, weights in {**data["weights"], **scores}.items():
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
    axes.set(xlim=(0, width * 1.02), ylim=(len(rows), 0))
    axes.axis("off")
    strongest = max(max(row) for weights in (*data["weights"].values(), *scores.values()) for row in weights)
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


def _shares(scores: list[list[float]]) -> list[list[float]]:
    return [[value / max(sum(row), 1e-9) for value in row] for row in scores]


_OF_RANKS = {
    "ratio": "score, % of the largest",
    "tokens": "tokens and modules, first, %",
    "prompts": "prompts, by vote, %",
}


def _ranks(data: dict[str, Any]) -> Figure:
    routers = data["routers"]
    drawn, all_axes = canvas(12, 3.4, 3)
    palette = colours(list(routers))
    for axes, (what, label) in zip(all_axes, _OF_RANKS.items(), strict=True):
        for router, by_rank in routers.items():
            ranks = sorted(map(int, by_rank))
            values = np.array([by_rank[str(rank)][what] for rank in ranks]) * 100
            style = {"marker": ".", "lw": 1.2, "capsize": 2, "color": palette[router], "label": router}
            axes.errorbar(ranks, values[:, 0], yerr=values[:, 1], **style)
        if what != "ratio":
            axes.axhline(data["chance"] * 100, **DOTTED)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        percent(axes, label, ylim=(0, 105), xlabel="rank of the experts")
    return legend_below(drawn)


def _mixed(data: dict[str, Any]) -> Figure:
    drawn, axes = canvas(8, 3.2)
    columns = {name: np.array(values).T * 100 for name, values in data["routers"].items()}
    shares, errors = ({name: column[i] for name, column in columns.items()} for i in (0, 1))
    grouped_bars(axes, shares, errors)
    axes.set_xticks(range(3), ["both experts are\nthe first two", "one of them is", "their share of the work"])
    percent(axes, "%", ylim=(0, 105))
    return legend_below(drawn)


def _wording(data: dict[str, Any]) -> Figure:
    tasks = data["tasks"]
    drawn, axes = canvas(2.5 + 0.9 * len(tasks), 3.6)
    grouped_bars(axes, {name: [shares[task] * 100 for task in tasks] for name, shares in data["per_task"].items()})
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    percent(axes, "prompts whose expert is found, %", ylim=(0, 105))
    return legend_below(drawn)


def _robustness(data: dict[str, Any]) -> Figure:
    cases = data["cases"]
    drawn, both = canvas(5 + 1.2 * len(cases), 3.4, 2)
    labels = {"found": "prompts whose expert is found, %", "stolen": "prompts that the odd one took, %"}
    for axes, (key, label) in zip(both, labels.items(), strict=True):
        routers = next(iter(cases.values()))
        grouped_bars(axes, {name: [case[name][key] * 100 for case in cases.values()] for name in routers})
        axes.set_xticks(range(len(cases)), ["\n".join(textwrap.wrap(name, 16)) for name in cases], fontsize=7)
        percent(axes, label, ylim=(0, 105))
    return legend_below(drawn)


def _costs(data: dict[str, Any]) -> Figure:
    routers = data["routers"]
    drawn, axes = canvas(7, 1.2 + 0.5 * len(routers))
    place = np.arange(len(routers))
    for shift, key, label, colour in ((-0.2, "formula", "formula", GREY), (0.2, "flops", "measured", BLUE)):
        shares = [row[key] / data["base"] * 100 for row in routers.values()]
        axes.barh(place + shift, shares, 0.38, label=label, color=colour)
    axes.set_yticks(place, list(routers))
    axes.invert_yaxis()
    axes.set_xlabel("arithmetic added for each token, % of the base model's")
    axes.legend(fontsize=8)
    return drawn


def _heldout(data: dict[str, Any]) -> Figure:
    """Points over the base model by method, and accuracy by task."""
    methods, names, palette = data["methods"], list(data["methods"]), colours(data["tasks"])
    drawn, (left, right) = canvas(11, 1.8 + 0.3 * len(methods), 2, sharey=True)
    gains, errors = (np.array([method[key] for method in methods.values()]) * 100 for key in ("gain", "error"))
    kinds = [GREY if "hindsight" in name or name == "base" else BLUE for name in names]
    listed_bars(left, names, gains, errors, kinds)
    left.axvline(0, color="black", lw=1)
    left.set_xlabel("points over the base model, mean over tasks")
    for task, colour in palette.items():
        values = [method["accuracy"][task] * 100 for method in methods.values()]
        right.plot(values, range(len(names)), marker="o", ls="", ms=5, color=colour, label=task)
        right.axvline(methods["base"]["accuracy"][task] * 100, color=colour, lw=0.8, ls=":")
    right.set_xlabel("accuracy, % (dotted: the base model)")
    right.grid(axis="x", alpha=0.3)
    return legend_below(drawn, 1)


def _agreement(data: dict[str, Any]) -> Figure:
    """How often a cheaper router makes SpectR's first choice, by its arithmetic."""
    drawn, axes = canvas(7, 3.6)
    for name, row in data["routers"].items():
        kind, _, more = name.partition(", ")
        place = (row["flops"], row["agreement"] * 100)
        axes.plot(*place, marker="o", color=BLUE if kind == "lag" else ORANGE, ls="")
        words = f"{kind.upper()}\n{more.removeprefix('shortlist ') if kind == 'lag' else 'shared A'}"
        side = {"xytext": (0, 6), "ha": "center"} if kind == "lag" else {"xytext": (8, -8), "ha": "left"}
        axes.annotate(words, place, textcoords="offset points", fontsize=8, **side)
    axes.axhline(100, **DOTTED)
    axes.axvline(1, **DOTTED)
    axes.set(xlabel="arithmetic added, as a share of SpectR's", xlim=(0, 1.15))
    percent(axes, "same first choice, %", ylim=(0, 122))
    return drawn


def _tradeoff(data: dict[str, Any]) -> Figure:
    """Quality by cost: held-in tasks on the left, held-out tasks on the right."""
    points = data["points"]
    drawn, (inside, outside) = canvas(11, 4.2, 2)
    palette, place = colours(list(points)), _apart({name: point["cost"] * 100 for name, point in points.items()})
    for axes, key in ((inside, "held_in"), (outside, "held_out")):
        for name, (value, error) in ((name, point[key]) for name, point in points.items() if point[key]):
            style = {"marker": "o", "ms": 6, "capsize": 3, "color": palette[name], "label": name}
            axes.errorbar(place[name], value * 100, yerr=error * 100, **style)
        axes.set(xlabel="arithmetic added to a token, % of the base model's", xlim=(0, None))
        axes.grid(alpha=0.3)
    inside.axhline(100, **DOTTED)
    inside.axhline(data["base"] * 100, color=GREY, lw=1)
    inside.set_ylabel("held-in: share of the own expert's accuracy, %")
    outside.axhline(0, color=GREY, lw=1)
    outside.set_ylabel("held-out: points over the base model")
    return legend_below(drawn)


def _apart(costs: dict[str, float]) -> dict[str, float]:
    """Positions on an axis, at least 0.45 apart, in the order of the costs."""
    step = 0.45
    placed, last = {}, -step
    for name in sorted(costs, key=costs.__getitem__):
        last = placed[name] = max(costs[name], last + step)
    return placed


_DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "quality": _quality,
    "similarity": _similarity,
    "tokens": _tokens,
    "routing": _routing,
    "ranks": _ranks,
    "multitask": _multitask,
    "heldout": _heldout,
    "tradeoff": _tradeoff,
    "agreement": _agreement,
    "wording": _wording,
    "mixed": _mixed,
    "robustness": _robustness,
    "costs": _costs,
}


def write_heat_map(routings: Sequence[TokenRouting], path: str | Path, *, title: str) -> Path:
    """Write a heat map of texts by experts: each expert's share of the work, in percent."""
    experts = routings[0].experts
    share = 100 * np.array([[routing.shares[name] for name in experts] for routing in routings])
    figure, axes = canvas(1.9 + 0.72 * len(experts), 1.5 + 0.42 * len(routings))
    image = axes.imshow(share, cmap="YlGnBu", aspect="auto", vmin=0)
    axes.set_xticks(range(len(experts)), experts, rotation=40, ha="right")
    axes.set_yticks(range(len(routings)), [routing.title for routing in routings])
    axes.set(xlabel="expert", ylabel="prompt")
    cell_texts(axes, share, 0.6 * share.max(), "{:.1f}".format, 8)
    figure.colorbar(image, label="share of the work, %")
    axes.set_title(title, fontsize=11)
    return save(figure, path)


def write_token_map(routing: TokenRouting, path: str | Path) -> Path:
    """Write a map of layers by tokens (the paper's Figure 4), in the colour of each cell's leading expert."""
    palette = colours(routing.experts)
    rgb_E3 = np.array([[int(palette[name][i : i + 2], 16) / 255 for i in (1, 3, 5)] for name in routing.experts])
    first = min(1, len(routing.layers) - 1)  # "all layers" only if there is nothing else
    weights, layers = routing.weights[first:], routing.layers[first:]
    if not routing.experts:  # the base model alone
        rgb_E3, weights = np.ones((1, 3)), weights.new_zeros(*weights.shape[:-1], 1)
    strength = weights.amax(-1).numpy()[..., None]
    strength = np.where(strength > 0, 0.25 + 0.75 * strength / max(strength.max(), 1e-9), 0)
    width = min(2.5 + 0.24 * len(routing.tokens), 40)
    figure, axes = canvas(width, 2.2 + 0.16 * len(layers))
    axes.imshow(1 - strength * (1 - rgb_E3[weights.argmax(-1).numpy()]), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(routing.tokens)), [_shown(t) for t in routing.tokens], rotation=90, fontsize=7)
    step = max(1, len(layers) // 15)
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=7)
    axes.set_title(routing.title or "Expert with the largest weight, for each token and layer", fontsize=10)
    handles = [Patch(color=palette[name], label=f"{name} {share:.0%}") for name, share in routing.leaders]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, title="share of the work", title_fontsize=7)
    return save(figure, path)


def _shown(token: str) -> str:
    return token.strip().replace("$", r"\$") or {"\n": "\u23ce"}.get(token, "\u2423")
