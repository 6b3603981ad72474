"""PNG pictures with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from spectr.plots.axes import canvas, cell_texts, save
from spectr.plots.palette import colours
from spectr.plots.tokens import TokenRouting


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
    first = min(1, len(routing.layers) - 1)  # "all layers" only where there is nothing else
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
