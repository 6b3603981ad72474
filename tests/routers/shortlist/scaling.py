"""What the tests of this folder share."""

from __future__ import annotations

import torch

from models import peft_library
from spectr import compose
from spectr.models import encode_prompt
from text_model import make_model, make_tokenizer

RANKS = {"ants": 4, "bees": 2, "cats": 8, "dogs": 4, "eels": 4, "foxes": 4}
SPARSE = ("q_proj", "down_proj")
TEXTS = ["what is the sky", "the film is good", "who is it", "red blue green of the grass"]
PROMPTS = ["what is it", "a good film of the sky is the x y z", "no", "why is the grass green"]


def make_library(root):
    peft_library(make_model(), root, RANKS)


def routed_model(library, router, **options):
    model = make_model()
    return model, compose(model, library, router, **options)


def ids_of(prompt):
    return torch.tensor([encode_prompt(make_tokenizer(), prompt)])


def listed(routed):
    """The experts of each row's shortlist, as they are held now."""
    return [tuple(routed.experts[i] for i in row.nonzero()[:, 0]) for row in routed.prompt.weights_BE]
