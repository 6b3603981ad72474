"""On a CPU: few calls for all that experts add to a layer, into which graphs do not look.

In bfloat16, where there is a matrix unit, one operation in C beside the base layer; else base layer and input factors
in one product, and all the rest in one call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.combine import get_combination, merge_outputs
from spectr.layers.kernels.masked import Masked, Part, add_rows, few_tokens, masked_works
from spectr.layers.kernels.tiles import Choosing, Module, Tiles, tiles_work
from spectr.routers.settings import combination_of
from spectr.selection import TopK
from spectr.vllm.product import Product

_NEAR = 128  # tokens


def fits(experts: Any, layer: Any, base: Any) -> bool:
    """Whether a layer can be computed so: plain weights on a CPU, and experts that are scored by norms alone.

    It does not depend on whether there is a compiler, so that a compiled graph is the same with and without one.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    weight: Any = getattr(layer, "weight", None)
    plain = type(base) is UnquantizedLinearMethod and isinstance(weight, Tensor) and weight.dim() == 2
    return plain and weight.device.type == "cpu" and _simple(experts)


def by_tiles(experts: Any, dtype: torch.dtype, device: torch.device, inputs: int) -> bool:
    """Whether the matrix unit can do it; what the base layer is does not matter."""
    suits = dtype == torch.bfloat16 and device.type == "cpu" and inputs % 32 == 0
    return suits and _simple(experts) and tiles_work()


def tiles_of(experts: Any, A_PI: Tensor, B_SOP: list[Tensor]) -> Tiles:
    """A layer's experts for the matrix unit."""
    [group] = experts.groups
    centers = group.centers_SP
    modules = [
        Module(B_OP, None if centers is None else centers[s], experts.places[s][0]) for s, B_OP in enumerate(B_SOP)
    ]
    kept = experts.kept() if experts.record else None
    return Tiles(
        A_PI, modules, Choosing(group.columns_E, experts.allowed_TE, group.select.k, _temperature(group), kept)
    )


def _simple(experts: Any) -> bool:
    """Whether one set of experts of one rank is scored by norms alone, and the best ones' outputs are added up."""
    if experts.split.by_input or len(experts.groups) != 1:
        return False
    [group] = experts.groups
    router = group.router
    outputs = get_combination(combination_of(router)).merge is merge_outputs
    ours = getattr(router, "by_norms", False) and outputs and isinstance(group.select, TopK)
    return bool(ours and group.common_rank is not None)


def _temperature(group: Any) -> float:
    return group.select.temperature if group.select.weighting == "softmax" else 0.0


class Fused(nn.Module):
    """``[W; A] x`` at once, then the decision and the chosen experts' outputs.

    Args:
        experts: The layer's, which are built.
        weight_OI: The base layer's.
        A_PI: Of all modules, one below the other.
        B_SOP: Of each.
        name: The layer's own; unique in an engine.
    """

    def __init__(self, experts: Any, weight_OI: Tensor, A_PI: Tensor, B_SOP: list[Tensor], name: str):
        super().__init__()
        _define()
        self.experts, self.name, self.outputs = [experts], name, len(weight_OI)
        self.product = Product(torch.cat([weight_OI, A_PI]))
        [self.group] = experts.groups
        self.Bt_SPO = [B_OP.mT.contiguous() for B_OP in B_SOP]
        select, dtype = self.group.select, weight_OI.dtype
        centers = self.group.centers_SP
        self.centers_SP = None if centers is None else centers.to(dtype).contiguous()
        parts = [
            Part(Bt, None if self.centers_SP is None else self.centers_SP[s], experts.places[s][0])
            for s, Bt in enumerate(self.Bt_SPO)
        ]
        self.masked = Masked(parts, self.group.columns_E, select.k, _temperature(self.group), self.outputs)
        self.compiled, self.few = masked_works(dtype), few_tokens(dtype)

    def forward(self, x_TI: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """The routed layer's output, without a bias."""
        return torch.ops.spectr.routed(self.product(x_TI), self.name, self.outputs)

    def fill(self, A_PI: Tensor, B_SOP: list[Tensor]) -> None:
        """Other factors of the same sizes, in the place of what was there."""
        identity = torch.eye(self.product.size[1], dtype=self.Bt_SPO[0].dtype)
        weight_OI = self.product(identity)[:, : self.outputs].mT  # exact: of each sum all terms but one are zero
        self.product.replace(torch.cat([weight_OI, A_PI]))
        for Bt_PO, B_OP in zip(self.Bt_SPO, B_SOP, strict=True):
            Bt_PO.copy_(B_OP.mT)
        if self.centers_SP is not None:
            self.centers_SP.copy_(self.group.centers_SP)

    def finish(self, y_TW: Tensor) -> Tensor:
        """What the operation does: outputs of the base layer and ``A x`` become the routed layer's output."""
        [experts] = self.experts
        if not self.compiled:
            return experts.added(y_TW[:, : self.outputs].contiguous(), y_TW[:, self.outputs :].contiguous(), y_TW)
        tokens = len(y_TW)
        out_TO, weighted = y_TW.new_empty(tokens, self.outputs), y_TW.new_empty(tokens * self.masked.rows)
        kept = experts.kept() if experts.record else None
        done = self.masked.decide(y_TW, experts.allowed_TE, kept, weighted)
        if done and tokens <= self.few:
            done = self.masked.add(y_TW, weighted, out_TO)
        elif done:
            self._add_many(y_TW, weighted, out_TO)
        if not done:
            raise MemoryError(f"no memory for {tokens} tokens of {self.name}")
        return out_TO

    def _add_many(self, y_TW: Tensor, weighted: Tensor, out_TO: Tensor) -> None:
        """Many tokens: products with all experts' outputs, of which the weights leave few."""
        [experts], start, tokens = self.experts, 0, len(y_TW)
        for product, (begin, length), Bt_PO in zip(experts.B, experts.places, self.Bt_SPO, strict=True):
            end = start + tokens * len(Bt_PO)
            whole_TP = weighted[start:end].view(tokens, -1)
            y_TO, to_TO = y_TW[:, begin : begin + length], out_TO[:, begin : begin + length]
            for first in range(0, tokens, _NEAR):  # what is added is read again while it is in the cache
                rows = slice(first, first + _NEAR)
                add_rows(y_TO[rows], product(whole_TP[rows]), to_TO[rows])
            start = end


@cache
def _define() -> torch.library.Library:
    """The operation; what it needs beside its input it finds by the layer's name, as attention does in vLLM."""
    from vllm.forward_context import get_forward_context

    def routed(y: Tensor, name: str, outputs: int) -> Tensor:
        return get_forward_context().no_compile_layers[key_of(name)].finish(y)

    ours = torch.library.Library("spectr", "FRAGMENT")
    ours.define("routed(Tensor y, str name, int outputs) -> Tensor")
    ours.impl("routed", routed, "CPU")
    torch.library.register_fake("spectr::routed", lambda y, name, outputs: y.new_empty(y.shape[0], outputs))
    return ours


def key_of(name: str) -> str:
    """A layer's key among those that the engine finds by name."""
    return f"{name}.spectr"
