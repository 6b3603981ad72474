"""Draw the README's picture from real runs of the shipped experts: routing by token, and decisions for whole prompts.

$ python benchmarks/routing_picture.py

On the left the router ``spectr`` reads one prompt: the colour of a cell is the expert with the largest weight at that
token and layer. On the right ``calibrated`` decides for whole prompts: each task's sample in words that no expert was
trained on, and three prompts that fit no expert. A cell is an expert's evidence; a frame marks the chosen expert.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

import spectr
from spectr.models import load_model
from spectr.models.generate import encode_batch
from spectr.models.text import opening_length
from spectr.plots.axes import canvas, cell_texts, save
from spectr.plots.palette import colours
from spectr.plots.token_weights import TokenRouting, token_routing
from spectr.shipped import open_library
from spectr.tasks import shipped_tasks

PROMPT = "Is the sentiment of this movie review positive or negative?\n\nA dull, lifeless film."
ORDINARY = {
    "a fact": "Why is the sky blue?",
    "a recipe": "How do I bake bread without yeast?",
    "a letter": "Write a short letter to my landlord about the broken heating.",
}


def main() -> None:
    """Run both routers and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/routing.png"))
    path = parser.parse_args().output
    model, tokenizer = load_model()
    library = open_library(None)
    prompts = {task.name: task.reworded(0).example(task.sample).prompt for task in shipped_tasks().values()} | ORDINARY
    routed = spectr.compose(model, library, spectr.Spectr())
    with spectr.trace(model) as trace:
        model(**encode_batch(tokenizer, [PROMPT]), logits_to_keep=1)
    routing = token_routing(trace, tokenizer, title="", skip=opening_length(tokenizer))
    routed.remove()
    decisions = spectr.compose(model, library, spectr.Calibrated()).prompt
    assert decisions is not None
    batches = [encode_batch(tokenizer, [prompt]) for prompt in prompts.values()]
    evidence = torch.cat([decisions.evidence(**batch) for batch in batches]).float().numpy()
    weights = torch.cat([decisions.decide(**batch) for batch in batches]).numpy()
    print(f"wrote {draw(routing, list(prompts), evidence, weights, path)}")


def draw(routing: TokenRouting, prompts: list[str], evidence: np.ndarray, weights: np.ndarray, path: Path) -> Path:
    """Both panels, and a legend of the experts' colours."""
    figure, (left, right) = canvas(14, 5.2, 2, width_ratios=(1.25, 1))
    token_panel(left, routing)
    prompt_panel(right, list(routing.experts), prompts, evidence, weights)
    palette = colours(routing.experts)
    handles = [Patch(color=palette[name], label=name) for name in routing.experts]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)
    return save(figure, path)


def token_panel(axes: Axes, routing: TokenRouting) -> None:
    """Layers by tokens in the colour of the first expert; stronger colours are larger weights."""
    palette = colours(routing.experts)
    rgb = np.array([[int(palette[name][i : i + 2], 16) / 255 for i in (1, 3, 5)] for name in routing.experts])
    weights = routing.weights[1:].numpy()  # the first group is all layers
    strength = 0.3 + 0.7 * weights.max(-1, keepdims=True) / weights.max()
    axes.imshow(1 - strength * (1 - rgb[weights.argmax(-1)]), aspect="auto", interpolation="nearest")
    tokens = [token.strip() or "\u23ce" for token in routing.tokens]
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axes.set_yticks(range(0, len(weights), 5))
    axes.set_ylabel("layer")
    axes.set_title("spectr: experts for every token, at every layer", fontsize=11)


def prompt_panel(axes: Axes, experts: list[str], prompts: list[str], evidence: np.ndarray, weights: np.ndarray) -> None:
    """Prompts by experts: the evidence, with a frame around the chosen expert."""
    axes.imshow(evidence, cmap="YlGnBu", aspect="auto", vmin=0, vmax=np.quantile(evidence, 0.95))
    cell_texts(axes, evidence, 0.6 * float(np.quantile(evidence, 0.95)), lambda value: str(round(value)), 7)
    labels = []
    for row, (name, chosen) in enumerate(zip(prompts, weights, strict=True)):
        labels.append(name if chosen.any() else f"{name} \u2192 base model")
        for column in np.flatnonzero(chosen):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#e69f00", lw=2))
    axes.set_xticks(range(len(experts)), experts, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("calibrated: one expert for the whole prompt, or the base model", fontsize=11)


if __name__ == "__main__":
    main()
