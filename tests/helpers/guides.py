"""Guides that find what a test wants in prompts, in place of an embedder."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot


class Guide:
    """Compares descriptions with each other as GLIDER's authors' threshold takes them to be."""

    def between(self, descriptions):
        return torch.full((len(descriptions), len(descriptions)), 0.8)


class GuideBySum(Guide):
    """Finds likeness in the sum of a prompt's tokens."""

    def reader(self, descriptions, experts):
        def read(input_ids=None, attention_mask=None, **_):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return 0.3 + 0.6 * one_hot((input_ids * real).sum(-1) % len(experts), len(experts)).float()

        return read
