"""Does a router find a prompt's expert: for each token and module, and for the whole prompt."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spectr.atomic_write import replacing
from spectr.composition import Routed
from spectr.evaluation.score import Measurement
from spectr.folders import with_parents
from spectr.grouping import chunks
from spectr.hashing import json_sha256
from spectr.layers import trace
from spectr.layers.linear_layers import input_device
from spectr.models import context_length, encode_batch
from spectr.routers.abstention import AUTO

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One prompt: shares from 0 to 1 of its tokens and modules, and the right expert's place in the vote.

    Attributes:
        top_1: Share of tokens and modules where the right expert has the largest score. For a decision on the whole
            prompt, 1 or 0.
        top_4: Share where it is among the four largest scores.
        place: Its place in the vote of all tokens and modules (or in the router's own evidence), from 1.
        winner: The expert with the most votes.
        p: The share of ordinary prompts with as much evidence; ``None`` if unknown.
        ratio: The right expert's score as a share of the largest one, mean over tokens and modules. For a decision on
            the whole prompt, NaN.
    """

    top_1: float
    top_4: float
    place: int
    winner: str
    p: float | None = None
    ratio: float = math.nan

    @property
    def to_base(self) -> float:
        """1 if the base model answers with the default of ``abstain``, else 0; NaN if ``p`` is unknown."""
        return math.nan if self.p is None else float(self.p > AUTO)


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
    """Route prompts of one expert, and count how often it is found.

    Args:
        model: The composed model.
        routed: Its handle.
        tokenizer: Its tokenizer.
        prompts: What the user says.
        expert: The right expert.
        skip: Tokens at the beginning of every prompt (a chat template's) that are not counted.

    Source: SpectR, section 4.3 (Tables 1 and 4).
    """
    found, limit, device = [], context_length(model), input_device(model)
    for some in chunks(prompts, _BATCH):
        batch = encode_batch(tokenizer, some, limit=limit, device=device)
        read = routed.prompt.find(**batch) if routed.prompt else None
        evidence_BE = None if read is None else read.evidence_BE
        p_B = [None] * len(batch["input_ids"]) if read is None or read.p_B is None else read.p_B.tolist()
        if evidence_BE is not None and routed.policy is not None and routed.policy.use.fixes:
            rows = [dict(zip(routed.experts, row, strict=True)) for row in evidence_BE.tolist()]
            found += [_finding(row, expert, p) for row, p in zip(rows, p_B, strict=True)]
            continue
        decided = nullcontext()
        if routed.prompt and read is not None:  # read once, not once more by the call below
            decided = routed.prompt.using(routed.prompt.policy.verdict(read))
        with trace(model) as record, decided:
            model(**batch, use_cache=False, logits_to_keep=1)
        real_BT = record.mask & (record.mask.cumsum(1) > skip)
        for row in range(len(real_BT)):
            votes, hits, total = Counter[str](), torch.zeros(3, dtype=torch.float64), 0
            for layer in record.values():
                if expert not in layer.experts:
                    continue
                scores_TE = layer.scores[row][real_BT[row]]
                right, order_TE = layer.experts.index(expert), scores_TE.argsort(dim=-1, descending=True, stable=True)
                ratios_T = score_ratios(scores_TE, right)
                found_K = [(order_TE[:, :k] == right).any(-1).sum().item() for k in (1, 4)]
                hits += torch.tensor([*found_K, ratios_T.sum().item()])
                total += len(scores_TE)
                votes.update(layer.experts[i] for i in order_TE[:, 0].tolist())
            evidence = {name: float(votes[name]) for name in record.experts}
            if evidence_BE is not None and routed.policy and routed.policy.evidence.reads != "words":
                evidence = dict(zip(routed.experts, evidence_BE[row].tolist(), strict=True))
            found.append(_finding(evidence, expert, p_B[row], hits / max(total, 1)))
    return found


def score_ratios(scores_TE: Float[Tensor, "T E"], right: int) -> Float[Tensor, " T"]:
    """Of each token the right expert's score as a share of the largest: 1 where it is the largest, be that 0 or less.

    A score below zero, as trained gates give, counts as zero.

    Source: SpectR, Figure 6.
    """
    scores_TE = scores_TE.double()
    best_T, own_T = scores_TE.amax(-1), scores_TE[:, right]
    share_T = own_T.clamp(min=0) / best_T.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(best_T > 0, share_T, (own_T == best_T).double())


def kept_findings(path: Path, *made_of: Mapping[str, Any]) -> list[Finding] | None:
    """What :func:`keep_findings` wrote of the same prompts, model, experts and router; ``None`` if it did not.

    Args:
        path: The file.
        made_of: As that takes it, and how earlier versions wrote it.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [Finding(**one) for one in kept["findings"]] if kept["key"] in map(json_sha256, made_of) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_findings(path: Path, made_of: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """Write findings, so that a killed run need not find them again.

    Args:
        path: The file.
        made_of: All that decides them, JSON.
        findings: One for each prompt.
    """
    kept = {"key": json_sha256(made_of), "findings": [asdict(finding) for finding in findings], "origin": made_of}
    with replacing(with_parents(path)) as scratch:
        scratch.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def over_runs(
    runs: Sequence[Mapping[str, Sequence[Finding]]],
    value: Callable[[Finding], float],
    tasks: Collection[str] | None = None,
) -> Measurement:
    """A value's mean over prompts, each prompt's being its mean over the runs; the error is over prompts.

    Args:
        runs: Findings by task of the same prompts; several of a router that depends on a seed.
        value: What is averaged.
        tasks: Only these.
    """
    names = [task for task in runs[0] if tasks is None or task in tasks]
    prompts = [
        sum(value(finding) for finding in findings) / len(findings)
        for task in names
        for findings in zip(*(run[task] for run in runs), strict=True)
    ]
    return Measurement.of(prompts)


def _finding(evidence: dict[str, float], expert: str, p: float | None, hits: Tensor | None = None) -> Finding:
    ranking = sorted(evidence, key=lambda name: (-evidence[name], name))
    place = ranking.index(expert) + 1
    decided = float(place <= 1), float(place <= 4), math.nan
    top_1, top_4, ratio = decided if hits is None else map(float, hits)
    return Finding(top_1=top_1, top_4=top_4, place=place, winner=ranking[0], p=p, ratio=ratio)
