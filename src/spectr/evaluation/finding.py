"""Does a router find the expert that belongs to a prompt: for each token and module, and for the prompt as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spectr.composition import Routed
from spectr.layers import trace
from spectr.models.generate import encode_batch
from spectr.models.text import context_length

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One prompt: shares from 0 to 1 of its tokens and modules, and where the right expert came in the vote.

    Attributes:
        top_1: Share of tokens and modules where the right expert has the largest score.
        top_4: Share where it is among the four largest.
        place: Its place in the vote of all tokens and modules (or in the router's own evidence), from 1.
        winner: The expert with the most votes.
    """

    top_1: float
    top_4: float
    place: int
    winner: str


@torch.inference_mode()
def find_experts(
    model: nn.Module,
    routed: Routed,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    expert: str,
    *,
    skip: int = 0,
) -> list[Finding]:
    """Route prompts that all belong to one expert, and see how often it is found.

    Args:
        model: The composed model.
        routed: Its handle.
        tokenizer: Its tokenizer.
        prompts: What the user says.
        expert: The right one.
        skip: Tokens at the beginning of every prompt (a chat template's) that are left out of the counts.

    Source: SpectR, section 4.3 (Tables 1 and 4).
    """
    found, limit = [], context_length(model)
    for start in range(0, len(prompts), _BATCH):
        batch: dict[str, Any] = encode_batch(tokenizer, prompts[start : start + _BATCH], limit=limit)
        batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
        evidence_BE = routed.prompt.evidence(**batch) if routed.prompt else None
        if routed.prompt and evidence_BE is not None:  # read once, not once more by the call below
            routed.prompt.hold(routed.prompt.router.verdict(evidence_BE))
        with trace(model) as record:
            model(**batch, use_cache=False, logits_to_keep=1)
        if routed.prompt:
            routed.prompt.hold(None)
        real_BT = record.mask & (record.mask.cumsum(1) > skip)
        for row in range(len(real_BT)):
            votes, hits = Counter[str](), torch.zeros(2, dtype=torch.float64)
            total = 0
            for layer in record.values():
                if expert not in layer.experts:
                    continue
                scores_TE = layer.scores[row][real_BT[row]]
                right, order_TE = layer.experts.index(expert), scores_TE.argsort(dim=-1, descending=True, stable=True)
                hits += torch.tensor([(order_TE[:, :k] == right).any(-1).sum().item() for k in (1, 4)])
                total += len(scores_TE)
                votes.update(layer.experts[i] for i in order_TE[:, 0].tolist())
            evidence = {name: float(votes[name]) for name in record.experts}
            if evidence_BE is not None:
                evidence = dict(zip(routed.experts, evidence_BE[row].tolist(), strict=True))
            found.append(_finding(evidence, expert, hits / max(total, 1)))
    return found


def _finding(evidence: dict[str, float], expert: str, hits: Tensor) -> Finding:
    ranking = sorted(evidence, key=lambda name: (-evidence[name], name))
    return Finding(top_1=float(hits[0]), top_4=float(hits[1]), place=ranking.index(expert) + 1, winner=ranking[0])
