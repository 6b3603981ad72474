"""Mixtures of experts with fused parameters, against PEFT, and against loops over tokens, MoE and LoRA experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models import close, logits, peft_model, tokens, types_unchecked
from moe import EXPERTS, FAMILIES, moe_adapter, tiny_moe
from spectr import ExpertLibrary, Oracle, Spectr, compose, trace
from spectr.errors import CompositionError
from spectr.layers.linear_layers import returns_more


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_is_what_peft_makes_of_it(family, tmp_path):
    base, ids = tiny_moe(family), tokens()
    folder = moe_adapter(base, tmp_path / "a", 1, [*EXPERTS, "router.weight" if family == "GptOss" else "gate.weight"])
    want, before = logits(peft_model(base, folder), ids), logits(base, ids)
    assert (want - before).norm() > 0.05 * before.norm()
    routed = compose(base, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
    close(logits(base, ids), want)
    assert any(name.endswith("experts.down_proj") for name in routed.layers)
    routed.remove()
    assert torch.equal(logits(base, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_and_moe_expert_chooses_by_its_own_input_and_factors(family, tmp_path):
    base, ids = tiny_moe(family), tokens()
    folders = {name: moe_adapter(base, tmp_path / name, seed, rank=seed + 1) for seed, name in enumerate("abc")}
    slow = copy.deepcopy(base)
    deltas = {name: parameter_deltas(base, folder) for name, folder in folders.items()}
    chosen = route_by_loops(slow, deltas, top_k=2)
    want = logits(slow, ids)
    assert len(set(chosen)) > 2  # decisions differ
    compose(base, ExpertLibrary.from_adapters(folders), Spectr(top_k=2))
    close(logits(base, ids), want)


def parameter_deltas(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each parameter that it wraps."""
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{layer.parameter_name}": (
            layer.get_delta_weight("default").detach()
        )
        for name, layer in peft_model(model, folder).named_modules()
        if hasattr(layer, "parameter_name")
    }


def route_by_loops(model: nn.Module, deltas: dict[str, dict[str, Tensor]], top_k: int) -> list[tuple[int, ...]]:
    """Give MoE experts a slow forward with routed updates; returns what is chosen, as it is chosen."""
    chosen: list[tuple[int, ...]] = []

    def product(x, weight, bias, updates):
        each = torch.stack([linear(x, update) for update in updates])
        best = each.norm(dim=-1).argsort(descending=True)[:top_k]
        chosen.append(tuple(sorted(best.tolist())))
        return linear(x, weight, bias) + each[best].mean(0)

    def patch(name, experts):
        def side(x, parameter, j):
            weight = getattr(experts, parameter)[j]
            bias = getattr(experts, f"{parameter}_bias")[j] if experts.has_bias else None
            updates = [delta[f"{name}.{parameter}"][j] for delta in deltas.values()]
            if experts.is_transposed:
                weight, updates = weight.mT, [update.mT for update in updates]
            return product(x, weight, bias, updates)

        def forward(hidden, index, weights):
            out = torch.zeros_like(hidden)
            for n, token in enumerate(hidden):
                for j, weight in zip(index[n].tolist(), weights[n], strict=True):
                    inner = experts._apply_gate(side(token, "gate_up_proj", j)[None])[0]
                    out[n] += weight * side(inner, "down_proj", j)
            return out

        experts.forward = forward

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj"):
            patch(name, module)
    return chosen


def test_a_trace_shows_the_mean_of_what_a_tokens_moe_experts_decide(tmp_path):
    base, ids = tiny_moe(), tokens()
    folders = {name: moe_adapter(base, tmp_path / name, seed) for seed, name in enumerate("ab")}
    slow = copy.deepcopy(base)
    chosen = route_by_loops(slow, {name: parameter_deltas(base, folder) for name, folder in folders.items()}, top_k=1)
    logits(slow, ids)
    routed = compose(base, ExpertLibrary.from_adapters(folders), Spectr(top_k=1))
    with trace(base) as record:
        logits(base, ids)
    first = torch.tensor(chosen[: 4 * ids.numel()]).view(ids.numel(), 2, 2)  # of layer 0: token, MoE expert, parameter
    for place, parameter in enumerate(("gate_up_proj", "down_proj")):
        weights_NE = record[f"model.layers.0.mlp.experts.{parameter}"].weights.flatten(0, 1)
        close(weights_NE[:, 1], first[..., place].float().mean(1))
    close(torch.tensor(sum(record.shares().values())), torch.tensor(1.0))
    assert set(record) == set(routed.layers)


class Packed(nn.Linear):
    """A layer as quantisers make it: without a weight."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it is not tried")


def test_a_layer_without_a_weight_returns_one_tensor():
    assert not returns_more(Packed(3, 4))


class Logits(nn.Module):
    """A model that takes and returns one tensor, as ``torch.jit.trace`` needs it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("parameters", [EXPERTS, ["gate.weight"]], ids=["experts", "gate"])
def test_graphs_of_a_model_choose_for_other_tokens_or_are_refused(parameters, tmp_path):
    base, ids, other = tiny_moe("Mixtral"), tokens(), tokens(seed=7)
    folders = {name: moe_adapter(base, tmp_path / name, seed, parameters) for seed, name in enumerate("ab")}
    compose(base, ExpertLibrary.from_adapters(folders), Spectr(top_k=1))
    model = Logits(base)
    with pytest.raises(CompositionError, match="cannot be exported or traced"):
        torch.export.export(base, (ids,), {"use_cache": False}, strict=False)
    if parameters == EXPERTS:
        with pytest.raises(CompositionError, match="cannot be exported or traced"):
            torch.jit.trace(model, (ids,), check_trace=False)
    else:
        with types_unchecked():
            close(torch.compile(model, backend="eager")(ids), model(ids))
        close(torch.jit.trace(model, (ids,), check_trace=False)(other), model(other))
