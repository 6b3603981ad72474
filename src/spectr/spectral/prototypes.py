"""Scores of very many experts, by one direction each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, Int16
from torch import Tensor

_KINDS = {8: torch.int8, 16: torch.int16, 32: torch.float32}
_ROUNDING = 2.0**-52  # twice what one float64 operation is off by, relative


class Codes(NamedTuple):
    """Prototypes ``v ~ steps_E codes_EI`` in integers of 8 or 16 bits, or unchanged in float32.

    Attributes:
        codes_EI: One row for each expert.
        steps_E: The value of one unit of a code.
        rms_E: Root mean square of ``v . (x - m)`` over the calibration's texts; 0 for an expert that does nothing here.
        error_E: The quantisation error ``||v - steps codes||_2``.
    """

    codes_EI: Int8[Tensor, "E I"] | Int16[Tensor, "E I"] | Float[Tensor, "E I"]
    steps_E: Float[Tensor, " E"]
    rms_E: Float[Tensor, " E"]
    error_E: Float[Tensor, " E"]

    @staticmethod
    def of(v_EI: Float[Tensor, "E I"], rms_E: Float[Tensor, " E"], bits: int) -> Codes:
        """Codes with ``bits`` bits per number. With 32 bits, the prototypes themselves."""
        if bits == 32:
            return Codes(v_EI, torch.ones_like(rms_E), rms_E, torch.zeros_like(rms_E).double())
        steps_E = (v_EI.abs().amax(-1) / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
        codes_EI = (v_EI / steps_E[:, None]).round()
        left_EI = v_EI.double() - steps_E.double()[:, None] * codes_EI
        error_E = torch.linalg.vector_norm(left_EI, dim=-1) * (1 + 1e-9)  # float64 rounds it, too
        return Codes(codes_EI.to(_KINDS[bits]), steps_E, rms_E, error_E)

    def to(self, device: torch.device) -> Codes:
        """The codes on a device."""
        return Codes(*(t.to(device) for t in self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Prototypes:
    """The prototypes ``v_t`` of one module's experts: the direction that each expert amplifies most.

    Attributes:
        experts: The experts' names, in the order of the parts.
        parts: The prototypes. Experts that adapt the same modules form one part.
        mean_I: The module's mean input ``m``.
        full: Reads the parts' prototypes in float32 from disk.
    """

    experts: tuple[str, ...]
    parts: tuple[Codes, ...]
    mean_I: Float[Tensor, " I"]
    full: Callable[[], tuple[Float[Tensor, "E I"], ...]] | None = None

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        """``|v_t . (x - m)|`` divided by its root mean square, float32; 0 for an expert that does nothing here.

        This is Arrow's score (SpectR, eq. 4 and 5), calibrated. The prototypes are unpacked when they are needed.
        """
        y_TI = x.to(self.mean_I.device).float() - self.mean_I
        scores = []
        for codes_EI, steps_E, rms_E, _ in self.parts:
            gains_E = torch.where(rms_E > 0, steps_E / rms_E.clamp(min=1e-30), 0.0)
            scores.append((y_TI @ codes_EI.float().mT).abs() * gains_E)
        return scores[0] if len(scores) == 1 else torch.cat(scores, -1)

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """The scores, float64, and a bound on how far each is from the exact score of the full prototype.

        By Cauchy and Schwarz the bound is ``||v - steps codes|| ||x - m||`` over the root mean square, plus what a sum
        of I products can lose to rounding in any order.
        """
        y_TI = x.to(self.mean_I.device).double() - self.mean_I.double()
        length_T1 = torch.linalg.vector_norm(y_TI, dim=-1, keepdim=True)
        scores, off = [], []
        for codes_EI, steps_E, rms_E, error_E in self.parts:
            wide_EI = codes_EI.double()
            size_E = torch.linalg.vector_norm(wide_EI, dim=-1) * steps_E.double()
            over_E = torch.where(rms_E > 0, 1 / rms_E.double().clamp(min=1e-30), 0.0)
            scores.append((y_TI @ wide_EI.mT).abs() * (steps_E * over_E))
            off.append(length_T1 * ((error_E + _ROUNDING * (y_TI.shape[-1] + 8) * size_E) * over_E))
        return torch.cat(scores, -1), torch.cat(off, -1)

    def in_full(self) -> Prototypes:
        """The same with the full prototypes, which are read for this."""
        assert self.full is not None
        rows = zip(self.full(), self.parts, strict=True)
        return replace(self, parts=tuple(Codes.of(v_EI.to(part.rms_E.device), part.rms_E, 32) for v_EI, part in rows))

    @property
    def bytes(self) -> int:
        """Their size in memory."""
        return sum(t.numel() * t.element_size() for part in self.parts for t in part)
