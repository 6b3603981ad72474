"""Mixtures of experts (MoE) whose experts are fused into parameters: a routed layer for each parameter.

Legend: N tokens, K MoE experts of each token, S = N K pairs, J MoE experts, I inputs, O outputs, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.layers.linear_layers import is_plain
from spectr.layers.pairs import Pairs
from spectr.layers.parameter_layer import ParameterLayer
from spectr.layers.stand_in import StandIn

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")  # of transformers' decorator


class FusedLinear(ParameterLayer):
    """The matrices of one fused parameter, ``y_s = W_j x_s + b_j`` with the MoE expert ``j`` of the pair ``s``.

    Args:
        experts: The module that holds the parameter.
        parameter: Its name.
    """

    def __init__(self, experts: Any, parameter: str):
        matrices, *sizes = getattr(experts, parameter).shape
        inputs, outputs = sizes if experts.is_transposed else reversed(sizes)
        super().__init__(experts, parameter, inputs, outputs)
        self.matrices, self.is_transposed = matrices, bool(experts.is_transposed)

    @property
    def bias(self) -> Tensor | None:
        """Their biases, (J, O)."""
        return getattr(self.holder, f"{self.parameter}_bias") if self.holder.has_bias else None

    def forward(self, pairs: Pairs) -> Float[Tensor, "S O"]:
        """The products of the pairs."""
        weight_JOI = self.weight.mT if self.is_transposed else self.weight
        bias_JO = self.bias
        parts = [
            linear(pairs.x_SI[rows], weight_JOI[j], None if bias_JO is None else bias_JO[j])
            for j, rows in pairs.groups()
        ]
        return torch.cat(parts)


class RoutedExperts(StandIn):
    """The MoE experts of a layer, whose parameters LoRA experts adapt: ``down(gate(up(x)))``, each routed by itself.

    It computes what transformers' experts functions do (``ALL_EXPERTS_FUNCTIONS``), with an update after each product.
    For every pair of a token and its MoE expert, the routed layer of a parameter scores the LoRA experts by their
    factors for that MoE expert, chooses, and adds. Names, settings and ``state_dict`` are those of its base. Where no
    LoRA expert takes part the base computes.

    Args:
        base: The MoE experts' module; never changed.
    """

    def __init__(self, base: nn.Module):
        super().__init__(base, {name: FusedLinear(base, name) for name in fused_parameters(base)})

    def forward(
        self, hidden_states: Float[Tensor, "N H"], top_k_index: Int[Tensor, "N K"], top_k_weights: Float[Tensor, "N K"]
    ) -> Float[Tensor, "N H"]:
        """The sum of each token's MoE experts, weighted; see transformers' ``integrations/moe.py``."""
        if not self.takes_part:
            return self.base(hidden_states, top_k_index, top_k_weights)
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            self.refuse_to_capture()
        base: Any = self.base
        pairs = Pairs.of(hidden_states, top_k_index, base.num_experts)
        up_SF = self.layer(_up(base))(pairs)
        inner_SF = base._apply_gate(up_SF) if base.has_gate else base.act_fn(up_SF)
        down_SH = self.layer("down_proj")(pairs._replace(x_SI=inner_SF))
        if getattr(base, "has_post_expert_norm", False):
            down_SH = base.post_expert_norm(down_SH)
        weighted_SH = down_SH * top_k_weights.flatten()[pairs.place_S, None]
        return pairs.by_token(weighted_SH).sum(1).to(hidden_states.dtype)


def _up(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def fused_parameters(experts: Any) -> tuple[str, ...]:
    """Names of the parameters that can be routed in a module of MoE experts; none in other modules."""
    moved = hasattr(experts, "_hf_hook") and any(weight.is_meta for weight in experts.parameters(recurse=False))
    if moved or not all(hasattr(experts, flag) for flag in _FLAGS) or getattr(experts, "_is_expert_parallel", False):
        return ()
    names = (_up(experts), "down_proj")
    weights: list[Any] = [getattr(experts, name, None) for name in names]
    return names if all(is_plain(weight) and weight.ndim == 3 for weight in weights) else ()
