"""Experts with gates and descriptions, and an embedder whose cosines can be worked out by hand."""

from __future__ import annotations

import torch

from spectr import ExpertLibrary
from spectr.library import LibraryStore
from text_model import save_experts

NAMES = ("grass", "sky", "who")


DESCRIPTIONS = {"grass": "green grass", "sky": "blue sky", "who": "who is it"}


WORDS = ("green", "blue", "who", "sky", "grass", "film")


def embed(texts):
    """A word count that is near one axis for each word: cosines that can be worked out by hand."""
    counts = torch.tensor([[float(text.split().count(word)) for word in WORDS] + [0.1] for text in texts])
    return torch.nn.functional.normalize(counts, dim=-1)


def library_with_gates(folder, names=("one", "two", "three")):
    save_experts(folder / "plain", names)
    for name in names:
        LibraryStore(folder / "experts").add(name, folder / "plain" / name)
    for seed, name in enumerate(names):
        expert = ExpertLibrary.open(folder / "experts")[name]
        generator = torch.Generator().manual_seed(seed)
        gates = {m: torch.randn(shape.inputs, generator=generator) for m, shape in expert.shapes.items()}
        LibraryStore(folder / "experts").add_gates(name, gates, {"seed": seed})
    return ExpertLibrary.open(folder / "experts")
