"""MoE experts that are modules of their own. Each gets the tokens that a gate picks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import tiny_llama


class PickedExperts(nn.Module):
    """Three of them, two for each token.

    Args:
        size: Features of a token.
    """

    def __init__(self, size: int = 8):
        super().__init__()
        self.size, self.gate = size, nn.Linear(size, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 12), nn.ReLU(), nn.Linear(12, size)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of each token's experts, and the token."""
        flat, out = x.reshape(-1, self.size), torch.zeros(x.shape).reshape(-1, self.size)
        chosen = self.gate(flat).topk(2, dim=-1).indices
        for number, expert in enumerate(self.experts):
            tokens, _ = torch.where(chosen == number)
            out.index_add_(0, tokens, expert(flat[tokens]))
        return x + out.view(x.shape)


def with_picked_experts() -> nn.Module:
    """A tiny Llama whose MLPs are such experts."""
    model: Any = tiny_llama()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in model.model.layers:
            layer.mlp = PickedExperts(32).eval()
    return model
