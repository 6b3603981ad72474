"""The experts of one of vLLM's linear layers, which may pack several modules, and the products that add them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.combine import merge_outputs
from spectr.errors import CompositionError
from spectr.ops.packed import Choosing, Module, Packed, TopKNumbers, packed_works
from spectr.routers import LengthRouter, Router
from spectr.selection import Selection, TopK
from spectr.spectral import Share, Stack
from spectr.vllm.layer_routing import Group, ScoreTransform, needs_transforms, same_layout
from spectr.vllm.probes import ProbeScorer, key_of
from spectr.vllm.tensor_parallel import Split
from spectr.vllm.worker_state import WorkerState


class Product(nn.Module):
    """``x @ weight^T``. On a CPU, oneDNN keeps the weight in its own order, and the plain copy is freed.

    Args:
        weight_NK: The weight, on its device and in the dtype of the computation.
    """

    weight_NK: Tensor
    packed: Any = None
    multiply: Any = None

    def __init__(self, weight_NK: Float[Tensor, "N K"]):
        super().__init__()
        self.size = tuple(weight_NK.shape)
        self.register_buffer("weight_NK", weight_NK.contiguous(), persistent=False)
        if weight_NK.device.type == "cpu" and weight_NK.numel():
            self.packed = _pack(self.weight_NK)
            self.multiply = getattr(_ops(), "onednn_mm", None)
            if self.packed is not None:
                self.weight_NK = weight_NK.new_empty(0)

    def forward(self, x_TK: Float[Tensor, "*T K"]) -> Float[Tensor, "*T N"]:
        """The product."""
        return linear(x_TK, self.weight_NK) if self.packed is None else self.multiply(self.packed, x_TK, None)

    def replace(self, weight_NK: Float[Tensor, "N K"]) -> None:
        """Replace the weight by one of the same size, from the next call on. Compiled graphs use it too."""
        assert tuple(weight_NK.shape) == self.size
        if self.packed is None:
            self.weight_NK.copy_(weight_NK)
            return
        fresh = _pack(weight_NK.to(self.weight_NK.dtype).contiguous())
        old, new = self.packed.handler_tensor, fresh.handler_tensor
        address = old.item()
        old.copy_(new)
        new.fill_(address)  # so that what goes with `fresh` are the old weight's own bytes


def _pack(weight_NK: Tensor) -> Any:
    ops = _ops()
    if not getattr(ops, "_supports_onednn", False):
        return None
    try:
        return ops.create_onednn_mm(weight_NK.t(), 32)
    except RuntimeError:  # a dtype or size that oneDNN does not support
        return None


@cache
def _ops() -> Any:
    return import_module("vllm._custom_ops")


def fits(experts: Any) -> bool:
    """Whether this operation can compute a layer: its experts need one rank and scores that are norms."""
    return experts.device.type == "cpu" and _simple(experts) and packed_works(experts.dtype)


def packed_of(experts: Any, A_PI: Tensor, B_SOP: list[Tensor]) -> Packed:
    """A layer's experts for this operation."""
    [group] = experts.groups
    tables = group.centers_SWP, group.scales_SWP
    centers, scales = ([None] * len(B_SOP) if table is None else table for table in tables)
    begins = (begin for begin, _ in experts.places)
    modules = [Module(*one) for one in zip(B_SOP, centers, begins, scales, strict=True)]
    kept = experts.kept() if experts.record else None
    selects = [_top_k(select, group.experts) for select in group.selects]
    routers = experts.router_T if len(selects) > 1 else None
    most = max(group.most_fixed, *(select.k for select in selects), 1)
    return Packed(A_PI, modules, Choosing(group.columns_E, experts.routing_TE, selects, routers, most, kept))


def _simple(experts: Any) -> bool:
    """Whether one set of experts of one rank has norms as scores, and the best experts' outputs are added."""
    if experts.split.by_input or len(experts.groups) != 1:
        return False
    [group] = experts.groups
    outputs = group.router.combination.merge is merge_outputs
    return bool(outputs and isinstance(group.router, LengthRouter) and group.common_rank is not None)


def _top_k(select: Selection, experts: int) -> TopKNumbers:
    if not isinstance(select, TopK):
        return TopKNumbers(experts, 0.0)
    return TopKNumbers(select.k, select.temperature if select.weighting == "softmax" else 0.0)


Reduce = Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """The experts' update of a layer's output.

    Args:
        modules: The library's names for the packed modules, in the order of the output.
        split: How tensor parallelism cuts the layer.
        state: The worker's state.
        reduce: Sums a tensor over the ranks; used in row-parallel layers.
    """

    routing_TE: Tensor
    router_T: Tensor
    sampled_N: Tensor
    groups: Any
    B: Any
    packed: Any
    probe_scorer: Any
    scores_0: Tensor
    weights_0: Tensor

    def __init__(self, modules: Sequence[str], split: Split, state: WorkerState, reduce: Reduce):
        super().__init__()
        self.modules_S, self.split, self.reduce = tuple(modules), split, reduce
        self.record = state.settings.record
        self.packed = self.probe_scorer = None
        for name in ("routing_TE", "router_T", "sampled_N"):
            self.register_buffer(name, getattr(state, name), persistent=False)

    def build(self, state: WorkerState, device: torch.device, dtype: torch.dtype, name: str) -> None:
        """Prepare the experts as :func:`spectr.compose` does, and keep this rank's share.

        Args:
            state: The worker's state.
            device: The layer's device.
            dtype: The layer's dtype.
            name: The layer's name.
        """
        self.device, self.dtype = device, dtype
        self.routed_modules = [module for module in self.modules_S if state.experts_of(module)]
        stacks = self._stacks(state, state.router)
        self.runs, self.groups = self._grouped(state, stacks, state.routers.token_routers)
        places = dict(zip(self.modules_S, self.split.places(len(self.modules_S)), strict=True))
        self.places = [places[module] for module in self.routed_modules]
        if self.record:
            self._keep(state)
        A_PI, B_SOP = self._factors(stacks)
        if state.probes is not None:
            self.probe_scorer = state.graph_objects[key_of(name)] = ProbeScorer(
                state.probes, *self._probe_factors(state, A_PI)
            )
        if fits(self):
            self.packed = packed_of(self, A_PI, B_SOP)
        else:
            self.A, self.B = Product(A_PI), nn.ModuleList(Product(B_OP) for B_OP in B_SOP)

    def fill(self, state: WorkerState) -> None:
        """Write the factors again, with zeros for removed experts."""
        stacks = self._stacks(state, state.router)
        transforms = self._transforms(state, stacks, state.routers.token_routers)
        for run, group in zip(self.runs, self.groups, strict=True):
            group.refill([stacks[i] for i in run], [transforms[i] for i in run])
        A_PI, B_SOP = self._factors(stacks)
        if self.probe_scorer is not None:
            self.probe_scorer.score_by(*self._probe_factors(state, A_PI))
        if self.packed is not None:
            self.packed.fill(A_PI, B_SOP, self.groups[0].centers_SWP)
            return
        self.A.replace(A_PI)
        for product, B_OP in zip(self.B, B_SOP, strict=True):
            product.replace(B_OP)

    def forward(self, out_TO: Float[Tensor, "T O"], x_TI: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """Add the chosen experts' update to the base layer's output, in the memory of ``out_TO``."""
        if self.packed is not None:
            return self.packed(out_TO, x_TI)
        h_TQ = self.A(x_TI)
        if self.split.by_input:
            h_TQ = self.reduce(h_TQ)
        routing_TF, router_T = self.routing_TE[: len(x_TI)], self.router_T[: len(x_TI)]
        start, module = 0, 0
        for number, group in enumerate(self.groups):
            rows = group.modules_S * group.rows
            h_TSP = h_TQ[:, start : start + rows].unflatten(-1, (group.modules_S, group.rows))
            scores_TSE, weights_TSE = group.choose(h_TSP, x_TI, routing_TF, router_T)
            if self.record:
                self._write(number, scores_TSE, weights_TSE)
            weighted_TSP = group.weighted(h_TSP, weights_TSE)[..., self.split.columns(group.rows)]
            for one_TP in weighted_TSP.unbind(1):
                begin, length = self.places[module]
                out_TO.narrow(-1, begin, length).add_(self.B[module](one_TP.contiguous()))
                module += 1
            start += rows
        return out_TO

    def _stacks(self, state: WorkerState, router: Router) -> list[Stack]:
        """Each module's experts, prepared in float32. Removed ones are zero."""
        parts = [state.parts(module, router) for module in self.routed_modules]
        return [Stack.of({name: _kept(part, name in state.removed) for name, part in one.items()}) for one in parts]

    def _grouped(
        self, state: WorkerState, stacks: Sequence[Stack], routers: Sequence[Router]
    ) -> tuple[list[list[int]], nn.ModuleList]:
        """The stacks that are scored together, by number, with what scores them for each router."""
        runs = _runs(stacks, routers[0])
        transforms = self._transforms(state, stacks, routers)
        columns = {
            module: [state.experts.index(name) for name in state.experts_of(module)] for module in self.routed_modules
        }
        engine = len(state.experts), state.routers.most_fixed
        groups = (
            Group(
                [stacks[i] for i in run],
                routers,
                columns[self.routed_modules[run[0]]],
                *engine,
                [transforms[i] for i in run],
            )
            for run in runs
        )
        return runs, nn.ModuleList(groups).to(self.device)

    def _transforms(
        self, state: WorkerState, stacks: Sequence[Stack], routers: Sequence[Router]
    ) -> list[list[ScoreTransform]]:
        """Each router's score transform for each module, if transforms are needed."""
        transforms: list[list[ScoreTransform]] = [[] for _ in stacks]
        for router in routers if needs_transforms(routers) else ():
            assert isinstance(router, LengthRouter)
            for row, own, stack in zip(transforms, self._stacks(state, router), stacks, strict=True):
                row.append(ScoreTransform.of(own, stack, router))
        return transforms

    def _probe_factors(self, state: WorkerState, A_PI: Tensor) -> tuple[Tensor, list[tuple[Any, list[str]]], Reduce]:
        """The factors that score probes: the layer's own, or those of the router that decides on prompts."""
        runs, groups = self.runs, self.groups
        if not state.routers.share_factors:
            router = state.routers.by_name[next(iter(state.routers.prompts))]
            stacks = self._stacks(state, router)
            runs, groups = self._grouped(state, stacks, [router])
            A_PI = self._placed(torch.cat([self.split.inputs(stack.A_PI) for stack in stacks]))
        names = [[self.routed_modules[number] for number in run] for run in runs]
        reduce = self.reduce if self.split.by_input else lambda h: h
        return A_PI, list(zip(groups, names, strict=True)), reduce

    def _factors(self, stacks: Sequence[Stack]) -> tuple[Tensor, list[Tensor]]:
        """Input factors of all modules, stacked, and each module's output factors."""
        order = [number for run in self.runs for number in run]
        assert order == list(range(len(stacks)))
        rows = [self.split.inputs(stack.A_PI) for stack in stacks]
        names = self.modules_S
        B_SOP = [
            self.split.outputs(stack.B_OP, names.index(module), len(names))
            for module, stack in zip(self.routed_modules, stacks, strict=True)
        ]
        return self._placed(torch.cat(rows)), [self._placed(B_OP) for B_OP in B_SOP]

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype).contiguous()

    def _keep(self, state: WorkerState) -> None:
        """Make buffers for scores and weights, one pair for each group."""
        requests = len(state.sampled_N)
        for number, group in enumerate(self.groups):
            for name in ("scores", "weights"):
                empty = torch.zeros(requests, group.modules_S, group.experts, dtype=torch.float32, device=self.device)
                self.register_buffer(f"{name}_{number}", empty, persistent=False)

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """For a layer with one group: the sampled tokens, and the buffers for their scores and weights."""
        return self.sampled_N, self.scores_0, self.weights_0

    def _write(self, number: int, scores_TSE: Tensor, weights_TSE: Tensor) -> None:
        getattr(self, f"scores_{number}").copy_(scores_TSE.index_select(0, self.sampled_N))
        getattr(self, f"weights_{number}").copy_(weights_TSE.index_select(0, self.sampled_N))

    def recorded(self, name: str, requests: Sequence[int]) -> list[Tensor]:
        """Each module's ``"scores"`` or ``"weights"``, (requests, experts), for these requests' sampled tokens."""
        rows = torch.tensor(requests, dtype=torch.long, device=self.device)
        kept = [getattr(self, f"{name}_{number}").index_select(0, rows) for number in range(len(self.groups))]
        return [rows_NE for rows_NSE in kept for rows_NE in rows_NSE.unbind(1)]


def check_sizes(name: str, module: str, inputs: int, outputs: int, state: WorkerState) -> None:
    """Raise :class:`CompositionError` for experts that were made for a layer of another size."""
    unfit = [
        f"{expert} ({shape.inputs} -> {shape.outputs})"
        for expert in state.experts_of(module)
        if ((shape := state.adapters[expert].shapes[module]).inputs, shape.outputs) != (inputs, outputs)
    ]
    if unfit:
        raise CompositionError(
            f"these experts do not fit {module}: {', '.join(unfit)}; {name} has {inputs} -> {outputs}",
            expected="experts for this base model",
            do="omit them, or serve their base model",
        )


def _kept(share: Share, removed: bool) -> Share:
    """A share as the engine holds it: zero if the expert was removed."""
    return share.mapped(torch.zeros_like) if removed else share


def _runs(stacks: Sequence[Stack], router: Router) -> list[list[int]]:
    """The numbers of stacks, in groups that are scored together."""
    runs = [[0]]
    for before, number in pairwise(range(len(stacks))):
        if same_layout(stacks[before], stacks[number], router):
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
