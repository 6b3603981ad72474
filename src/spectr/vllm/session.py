"""What one worker knows: the experts, which of them each token of the step may use, and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spectr.composed.settings import Settings
from spectr.composition import needed_calibration, needed_gates
from spectr.errors import CompositionError, did_you_mean
from spectr.library import ExpertLibrary
from spectr.vllm.requests import Asked


class Session:
    """One worker's experts and buffers. The buffers keep their addresses, so that graphs see what is written there.

    Attributes:
        settings: From the model's config.
        library: The experts.
        experts: Names of all that were loaded, in the order of all masks; a removed one keeps its place.
        allowed_TE: Which of them each token of the step may use; the base model alone until the first step is written.
        sampled_N: For each request in the batch, which token of the step its next token is sampled from.
        layers: The routed layers, by vLLM's name, in the model's order.
        routed: The modules that they stand for, by the library's names.
        removed: Experts that are gone.
        named: What compiled graphs find by name, where the engine keeps such things.
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
        self.settings, self.library, self.router = settings, library, settings.make_router()
        self.experts = library.names
        self.opened = {name: library[name] for name in library}
        found = list(self.opened.values())
        self.calibration = needed_calibration(library, found) if getattr(self.router, "calibrated", False) else None
        self.gates = needed_gates(library, found) if getattr(self.router, "gated", False) else None
        self.allowed_TE = torch.zeros(tokens, len(self.experts), dtype=torch.bool, device=device)
        self.sampled_N = torch.zeros(requests, dtype=torch.long, device=device)
        self.layers: dict[str, Any] = {}
        self.routed: dict[str, Any] = {}
        self.removed: set[str] = set()
        self.named: dict[str, Any] = {} if named is None else named
        self._rows: dict[Asked, np.ndarray] = {}

    def users(self, module: str) -> list[str]:
        """The experts that adapt a module, in their order."""
        return [name for name in self.experts if module in self.opened[name].shapes]

    def row(self, asked: Asked) -> np.ndarray:
        """Which experts a request may use, as one row of the mask; remembered."""
        row = self._rows.get(asked)
        if row is None:
            names = asked.allowed(self.experts, self.settings.access)
            row = np.array([name in names and name not in self.removed for name in self.experts])
            if len(self._rows) > 4096:
                self._rows.clear()
            self._rows[asked] = row
        return row

    def write(self, asked: Sequence[Asked], tokens: np.ndarray) -> None:
        """Write the masks of a step.

        Args:
            asked: What each request of the batch asks for.
            tokens: How many tokens each has in the step.
        """
        plain = [Asked(experts=one.experts, understood=one.understood) for one in asked]
        rows_TE = np.repeat(np.stack([self.row(one) for one in plain]), tokens, axis=0)
        self.allowed_TE[: len(rows_TE)].copy_(torch.from_numpy(rows_TE), non_blocking=True)
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
        self.allowed_TE[:, self.experts.index(name)] = False
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
            "router": str(self.router),
        }

    def check(self) -> None:
        """Raise :class:`CompositionError` unless every module that an expert adapts was found in the model."""
        wanted = {module for expert in self.opened.values() for module in expert.shapes}
        missing = sorted(wanted - set(self.routed))
        if not missing:
            return
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more modules" if len(missing) > 3 else "")
        found = f"{len(self.routed)} of {len(wanted)} modules are routed" if self.routed else "no layer is routed"
        raise CompositionError(
            f"{found}: this model has no linear layer {some}, which experts of {self.library.origin} adapt",
            expected="a model that has all layers that the experts adapt",
            do="serve the base model that the experts were trained on, or leave the experts out",
        )
