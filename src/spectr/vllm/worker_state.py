"""What one worker knows: the experts, what each token of the step may do with them, and what was chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from spectr.composed_model.settings import Settings
from spectr.composition import prepare_module, side_data
from spectr.errors import CompositionError, did_you_mean, some_of
from spectr.library import ExpertLibrary
from spectr.routers import Router, check_needs
from spectr.spectral import Share
from spectr.vllm.probes import Hearing, Row
from spectr.vllm.requests import Asked
from spectr.vllm.router_set import routers_of


class Session:
    """One worker's experts and buffers. The buffers keep their addresses, so that graphs see what is written there.

    Attributes:
        settings: From the model's config.
        library: The experts.
        routers: Who chooses among them.
        router: The one whose factors the layers hold.
        experts: Names of all that were loaded, in the order of all masks; a removed one keeps its place.
        granted_TE: What each token of the step may do with each of them. NaN: nothing. From zero on: choose it by its
            score, which this informs; 1 where no prompt was read. Below zero: minus the weight that it has unchosen.
            The base model alone until the first step is written.
        turns_T: Which of several ways to choose is each token's.
        sampled_N: For each request in the batch, which token of the step its next token is sampled from.
        layers: The routed layers, by vLLM's name, in the model's order.
        routed: The modules that they stand for, by the library's names.
        removed: Experts that are gone.
        named: What compiled graphs find by name, where the engine keeps such things.
        hearing: What is heard of prompts that are decided on, where a router does that.
    """

    def __init__(
        self,
        settings: Settings,
        library: ExpertLibrary,
        tokens: int,
        requests: int,
        device: torch.device,
        named: Any = None,
    ):
        self.settings, self.library, self.routers = settings, library, routers_of(settings)
        self.router = self.routers.layers
        self.experts = library.names
        self.opened = {name: library[name] for name in library}
        found = list(self.opened.values())
        for router in self.routers.named.values():
            check_needs(router, library, library.names)
        self._side = {router: side_data(router, library, library.names) for router in self.routers.named.values()}
        self.granted_TE = torch.full((tokens, len(self.experts)), torch.nan, dtype=torch.float32, device=device)
        self.turns_T = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.sampled_N = torch.zeros(requests, dtype=torch.long, device=device)
        self.layers: dict[str, Any] = {}
        self.routed: dict[str, Any] = {}
        self.removed: set[str] = set()
        self.named: dict[str, Any] = {} if named is None else named
        self._rows: dict[Asked, np.ndarray] = {}
        modules = {module for expert in found for module in expert.shapes}
        self.hearing = None
        if self.routers.prompts:
            self.hearing = Hearing(self.routers.prompts, {module: self.users(module) for module in modules})

    def parts(self, module: str, router: Router) -> dict[str, Share]:
        """A module's experts as a router prepares them, float32; removed ones too."""
        with ExitStack() as stack:
            readers = {name: stack.enter_context(self.opened[name].open()) for name in self.users(module)}
            return prepare_module(readers, module, router, self._side[router])

    def users(self, module: str) -> list[str]:
        """The experts that adapt a module, in their order."""
        return [name for name in self.experts if module in self.opened[name].shapes]

    def row(self, asked: Asked) -> np.ndarray:
        """What a request may do with each expert, as one row of :attr:`granted_TE`; remembered."""
        row = self._rows.get(asked)
        if row is None:
            names = asked.allowed(self.experts, self.settings.access)
            numbers = {name: asked.number(name) for name in names}
            granted = self.routers.granted(asked.router, numbers, asked.verdict is not None)
            left = {name: number for name, number in granted.items() if name not in self.removed}
            row = np.array([left.get(name, np.nan) for name in self.experts], dtype=np.float32)
            if len(self._rows) > 4096:
                self._rows.clear()
            self._rows[asked] = row
        return row

    def write(self, step: Sequence[Row], alive: Collection[str]) -> None:
        """Write what a step's tokens may do.

        Args:
            step: The requests of the batch.
            alive: All that the engine works on.
        """
        asked, tokens = [row.asked for row in step], np.array([row.tokens for row in step])
        if self.hearing is not None:
            self.hearing.begin(step, alive, self.granted_TE.device)
        rows_TE = np.repeat(np.stack([self.row(one.granted) for one in asked]), tokens, axis=0)
        self.granted_TE[: len(rows_TE)].copy_(torch.from_numpy(rows_TE), non_blocking=True)
        if len(self.routers.ways) > 1:
            turns = np.array([self.routers.turn(one.router) for one in asked], dtype=np.int32)
            self.turns_T[: len(rows_TE)].copy_(torch.from_numpy(np.repeat(turns, tokens)), non_blocking=True)
        if self.settings.record:
            ends = torch.from_numpy(np.cumsum(tokens) - 1)
            self.sampled_N[: len(ends)].copy_(ends, non_blocking=True)
            self.sampled_N[len(ends) :] = 0

    def remove(self, name: str) -> None:
        """Forget an expert: its factors become zeros, and no request may use it from now on.

        Raises:
            CompositionError: There is no such expert.
        """
        if name not in self.experts:
            raise CompositionError(f"unknown expert '{name}'", do=did_you_mean(name, self.experts))
        self.removed.add(name)
        self._rows.clear()
        self.granted_TE[:, self.experts.index(name)] = torch.nan
        for layer in self.layers.values():
            layer.fill(self)

    def status(self) -> dict[str, Any]:
        """What is routed, for a proof at the start."""
        experts = [name for name in self.experts if name not in self.removed]
        return {
            "layers": len(self.layers),
            "modules": len(self.routed),
            "names": list(self.routed),
            "experts": experts,
            "router": " and ".join(map(str, self.routers.named.values())),
        }

    def check(self) -> None:
        """Raise :class:`CompositionError` unless every module that an expert adapts was found in the model."""
        wanted = {module for expert in self.opened.values() for module in expert.shapes}
        missing = sorted(wanted - set(self.routed))
        if not missing:
            return
        some = some_of(missing, 3, " modules")
        found = f"{len(self.routed)} of {len(wanted)} modules are routed" if self.routed else "no layer is routed"
        raise CompositionError(
            f"{found}: this model has no linear layer {some}, which experts of {self.library.origin} adapt",
            expected="a model that has all layers that the experts adapt",
            do="serve the base model that the experts were trained on, or leave the experts out",
        )
