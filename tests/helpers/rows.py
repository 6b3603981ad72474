"""Requests as tokens of one row, and what each of them is alone."""

from __future__ import annotations

from functools import cache

import torch

import spectr
from guides import Guide
from spectr import compose
from text_model import make_model, make_tokenizer

SETS = [("ants", "bees", "cats"), ("cats",), (), ("ants", "bees"), ("bees", "cats")]
PROMPTS = ["what is it", "a good film of the sky is the x y z", "no", "who is red", "the film is bad"]


class SameGuide(Guide):
    """Finds the same likeness in every prompt."""

    def reader(self, descriptions, experts):
        found = {"ants": 0.9, "bees": 0.2, "cats": 0.5}
        return lambda input_ids, **_: torch.tensor([[found[name] for name in experts]]).expand(len(input_ids), -1)


def composed(library, router, model=None):
    model = model or make_model()
    if isinstance(router, spectr.Glider):
        return compose(model, library.with_descriptions(dict.fromkeys(library, "x")), router, guide=SameGuide())
    return compose(model, library, router)


def ids_of(prompt):
    return torch.tensor(spectr.models.encode_prompt(make_tokenizer(), prompt))


def alone(library, router, names, ids):
    """Logits of a model that holds these experts and no others; made once for what several tests compare with."""
    return _alone(library, router, names, tuple(ids.tolist()))


@cache
@torch.no_grad()
def _alone(library, router, names, ids):
    model = composed(library, router).allow(names).model if names else make_model()
    return model(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def together(model, request_batch, requests):
    """Logits of all requests as tokens of one row, which a mask keeps apart; a router batch decides for them too."""
    spans = [(decision, len(ids)) for decision, ids in requests]
    owner = torch.cat([torch.full((len(ids),), n) for n, (_, ids) in enumerate(requests)])
    place = torch.cat([torch.arange(len(ids)) for _, ids in requests])
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    request_batch.set_tokens(spans)
    ids = torch.cat([ids for _, ids in requests])[None]
    with request_batch.in_force():
        logits = model(input_ids=ids, position_ids=place[None], attention_mask=mask, use_cache=False).logits[0]
    return logits.split([len(ids) for _, ids in requests])
