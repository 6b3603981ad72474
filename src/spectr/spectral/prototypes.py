"""Scoring very many experts by one direction each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor


class Codes(NamedTuple):
    """Prototypes in 8 bits, ``steps_E codes_EI``, and the root mean squares of ``v . (x - m)`` that they are due."""

    codes_EI: Int8[Tensor, "E I"]
    steps_E: Float[Tensor, " E"]
    rms_E: Float[Tensor, " E"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prototypes:
    """The experts of one module by their prototypes ``v_t``: the direction that each amplifies most.

    Attributes:
        experts: Their names, those of the first part first.
        parts: Their prototypes; experts that adapt the same modules in one part.
        mean_I: The module's mean input ``m``.
    """

    experts: tuple[str, ...]
    parts: tuple[Codes, ...]
    mean_I: Float[Tensor, " I"]

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        """``|v_t . (x - m)|`` over its root mean square, float32; 0 for an expert that does nothing here.

        That is Arrow's score (SpectR, eq. 4 and 5), calibrated. The prototypes are unpacked as they are needed.
        """
        y_TI = x.to(self.mean_I.device).float() - self.mean_I
        scores = []
        for codes_EI, steps_E, rms_E in self.parts:
            gains_E = torch.where(rms_E > 0, steps_E / rms_E.clamp(min=1e-30), 0.0)
            scores.append((y_TI @ codes_EI.float().mT).abs() * gains_E)
        return scores[0] if len(scores) == 1 else torch.cat(scores, -1)

    @property
    def bytes(self) -> int:
        """What they take of memory."""
        return sum(t.numel() * t.element_size() for part in self.parts for t in part)
