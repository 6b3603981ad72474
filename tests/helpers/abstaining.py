"""Evidence whose p is chosen by the words of a prompt: an ordinary one has the word "red" an odd number of times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from spectr.routers import Evidence, Found
from text_model import make_tokenizer

ORDINARY, SPECIAL = 0.4, 0.01  # p of ordinary prompts, and of others
RED = make_tokenizer().convert_tokens_to_ids("red")
FITTING = ["what is it", "a good film of the sky is the x y z", "the film is bad"]  # prompts that an expert is for
COMMON = ["who is red", "red", "the sky is red of it"]


@dataclass(frozen=True, kw_only=True)
class Foretold(Evidence):
    """Each prompt has an expert, by the sum of its tokens; the others have some evidence, too."""

    def reader(self, source, experts):
        return Reading(len(experts))


@dataclass(frozen=True)
class Reading:
    """A reader that may be copied and pickled, unlike a function."""

    experts: int

    def __call__(self, input_ids, attention_mask=None, **_):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        evidence_BE = 0.3 + 0.6 * one_hot((input_ids * real).sum(-1) % self.experts, self.experts).float()
        is_ordinary = ((input_ids == RED) & (real > 0)).sum(-1) % 2 == 1
        return Found(evidence_BE, torch.where(is_ordinary, ORDINARY, SPECIAL))
