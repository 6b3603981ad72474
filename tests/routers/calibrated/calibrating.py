"""Three small experts for a tiny chat model, texts and prompts, and what layers are given."""

from __future__ import annotations

import torch

from spectr import Calibrated, compose
from spectr.models import encode_prompt
from text_model import make_model, make_tokenizer

RANKS = {"ants": 4, "bees": 2, "cats": 8}
TEXTS = ["what is the sky", "the film is good", "who is it", "red blue green of the grass"]
PROMPTS = ["what is it", "a good film of the sky is the x y z", "no"]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def routed_model(library, router=None, **options):
    model = make_model()
    return model, compose(model, library, router or Calibrated(**options))


def ids_of(prompt):
    return torch.tensor([encode_prompt(make_tokenizer(), prompt)])


@torch.no_grad()
def inputs_of(model, modules, ids):
    """What each module is given, (tokens, inputs) in float64."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0][0]}))
        for name in modules
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: x.double() for name, x in seen.items()}


def inputs_of_texts(library, modules):
    """All counted inputs of the calibration texts, one unpadded text after the other."""
    rows = {name: [] for name in modules}
    for text in TEXTS:
        for name, x_TI in inputs_of(make_model(), modules, ids_of(text)).items():
            rows[name] += list(x_TI[len(library.calibration.opening) :])
    return rows
