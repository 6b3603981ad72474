"""The state of one worker: the experts, and how each token of the step may use them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from spectr.adapters import Update
from spectr.composed_model.quantization_config import Settings
from spectr.composition import prepare_module, side_data
from spectr.errors import CompositionError, did_you_mean, some_of
from spectr.library import ExpertLibrary
from spectr.routers import Router, check_needs
from spectr.spectral import Share
from spectr.vllm.probes import Probes, Row
from spectr.vllm.requests import RequestOptions
from spectr.vllm.router_set import routers_of


class WorkerState:
    """One worker's experts and buffers. The buffers keep their addresses, so that graphs read new values.

    Attributes:
        settings: Settings from the model's config.
        library: The experts.
        routers: The routers that choose among them.
        router: The router whose factors the layers hold.
        experts: Names of all loaded experts, in the order of all masks. A removed one keeps its place.
        routing_TE: How each token of the step may use each expert. NaN: not at all. Zero or more: choose it by its
            score, informed by this number (1 if no prompt was read). Below zero: minus the expert's fixed weight.
            Before the first step is written, the base model computes alone.
        router_T: The number of each token's router.
        sampled_N: For each request in the batch, which token of the step its next token is sampled from.
        layers: The routed layers by vLLM's names, in the model's order.
        routed: The modules in these layers, by the library's names.
        removed: The removed experts.
        graph_objects: Objects that compiled graphs find by name.
        probes: The prompts to decide on, if a router decides on prompts.
    """

    def __init__(
        self,
        settings: Settings,
        library: ExpertLibrary,
        tokens: int,
        requests: int,
        device: torch.device,
        graph_objects: Any = None,
    ):
        self.settings, self.library, self.routers = settings, library, routers_of(settings)
        self.router = self.routers.layers
        self.experts = library.names
        self.adapters = {name: library[name] for name in library}
        found = list(self.adapters.values())
        for expert in found:
            expert.check_plain("vLLM", CompositionError)
        for router in self.routers.by_name.values():
            check_needs(router, library, library.names)
        self._side = {router: side_data(router, library, library.names) for router in self.routers.by_name.values()}
        self.routing_TE = torch.full((tokens, len(self.experts)), torch.nan, dtype=torch.float32, device=device)
        self.router_T = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.sampled_N = torch.zeros(requests, dtype=torch.long, device=device)
        self.layers: dict[str, Any] = {}
        self.routed: dict[str, Any] = {}
        self.removed: set[str] = set()
        self.graph_objects: dict[str, Any] = {} if graph_objects is None else graph_objects
        self._rows: dict[RequestOptions, np.ndarray] = {}
        unmeasured = frozenset() if library.calibration is None else library.calibration.unmeasured
        modules = {module for expert in found for module in expert.shapes} - unmeasured
        self.probes = None
        if self.routers.prompts:
            policies = self.routers.prompts_in(library)
            self.probes = Probes(policies, {module: self.experts_of(module) for module in modules})

    def parts(self, module: str, router: Router) -> dict[str, Share]:
        """A module's experts as a router prepares them, in float32, including removed ones."""
        with ExitStack() as stack:
            opened = {name: stack.enter_context(self.adapters[name].open()) for name in self.experts_of(module)}
            readers = {name: lambda one, read=read: Update(read(one)) for name, read in opened.items()}
            return prepare_module(readers, module, router, self._side[router])

    def experts_of(self, module: str) -> list[str]:
        """The experts that adapt a module, in order."""
        return [name for name in self.experts if module in self.adapters[name].shapes]

    def row(self, options: RequestOptions) -> np.ndarray:
        """How a request may use each expert, as one row of :attr:`routing_TE`; cached."""
        row = self._rows.get(options)
        if row is None:
            names = options.allowed(self.experts, self.settings.access)
            numbers = {name: options.number(name) for name in names}
            permitted = self.routers.permitted(options.router, numbers, options.verdict is not None)
            left = {name: number for name, number in permitted.items() if name not in self.removed}
            row = np.array([left.get(name, np.nan) for name in self.experts], dtype=np.float32)
            if len(self._rows) > 4096:
                self._rows.clear()
            self._rows[options] = row
        return row

    def write(self, step: Sequence[Row], alive: Collection[str]) -> None:
        """Write how a step's tokens may use the experts.

        Args:
            step: The requests in the batch.
            alive: All requests that the engine works on.
        """
        options, tokens = [row.options for row in step], np.array([row.tokens for row in step])
        if self.probes is not None:
            self.probes.begin(step, alive, self.routing_TE.device)
        rows_TE = np.repeat(np.stack([self.row(one.for_routing) for one in options]), tokens, axis=0)
        self.routing_TE[: len(rows_TE)].copy_(torch.from_numpy(rows_TE), non_blocking=True)
        if len(self.routers.token_routers) > 1:
            numbers = np.array([self.routers.number_of(one.router) for one in options], dtype=np.int32)
            self.router_T[: len(rows_TE)].copy_(torch.from_numpy(np.repeat(numbers, tokens)), non_blocking=True)
        if self.settings.record:
            ends = torch.from_numpy(np.cumsum(tokens) - 1)
            self.sampled_N[: len(ends)].copy_(ends, non_blocking=True)
            self.sampled_N[len(ends) :] = 0

    def remove(self, name: str) -> None:
        """Remove an expert: its factors become zeros, and no request can use it from now on.

        Raises:
            CompositionError: The expert is unknown.
        """
        if name not in self.experts:
            raise CompositionError(f"unknown expert '{name}'", do=did_you_mean(name, self.experts))
        self.removed.add(name)
        self._rows.clear()
        self.routing_TE[:, self.experts.index(name)] = torch.nan
        for layer in self.layers.values():
            layer.fill(self)

    def status(self) -> dict[str, Any]:
        """The routed layers and modules, the experts and the routers."""
        experts = [name for name in self.experts if name not in self.removed]
        return {
            "layers": len(self.layers),
            "modules": len(self.routed),
            "names": list(self.routed),
            "experts": experts,
            "router": " and ".join(map(str, self.routers.by_name.values())),
        }

    def check(self) -> None:
        """Raise :class:`CompositionError` unless every module that an expert adapts was found in the model."""
        wanted = {module for expert in self.adapters.values() for module in expert.shapes}
        missing = sorted(wanted - set(self.routed))
        if not missing:
            return
        some = some_of(missing, 3, " modules")
        found = f"{len(self.routed)} of {len(wanted)} modules are routed" if self.routed else "no layer is routed"
        raise CompositionError(
            f"{found}: this model lacks linear layers that experts of {self.library.origin} adapt: {some}",
            expected="a model that has all layers that the experts adapt",
            do="serve the base model that the experts were trained on, or omit the experts",
        )
