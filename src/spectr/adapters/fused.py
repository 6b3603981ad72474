"""Where an adapter's file holds the factors of a fused parameter.

A fused parameter holds one matrix per expert of a mixture of experts (MoE), as ``(J, O, I)`` or ``(J, I, O)``. An
adapter has one pair of factors for each of these matrices.

Legend: J matrices of the parameter, R the rank for each, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Get = Callable[[str], Tensor]


class Layout(Protocol):
    """How to read the factors of a parameter's matrices."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all tensors that are read."""
        ...

    def read(self, get: Get) -> tuple[Float[Tensor, "J R I"], Float[Tensor, "J O R"]]:
        """Read the factors.

        Args:
            get: Reads a tensor by name.
        """
        ...


class OnePair(NamedTuple):
    """PEFT's layout for ``target_parameters``: all matrices in one pair of factors.

    In ``A``, ``(J R, I)``, the rows of one matrix are adjacent; in ``B``, ``(O, R J)``, the columns of one rank are.

    Attributes:
        key_A: Name of ``A``.
        key_B: Name of ``B``.
        matrices: The number J.

    Source: PEFT, ``lora.ParamWrapper``.
    """

    key_A: str
    key_B: str
    matrices: int

    @property
    def keys(self) -> tuple[str, ...]:
        """See :class:`Layout`."""
        return self.key_A, self.key_B

    def read(self, get: Get) -> tuple[Float[Tensor, "J R I"], Float[Tensor, "J O R"]]:
        """See :class:`Layout`."""
        A_JRI = get(self.key_A).unflatten(0, (self.matrices, -1))
        B_JOR = get(self.key_B).unflatten(1, (-1, self.matrices)).permute(2, 0, 1)
        return A_JRI, B_JOR


class Pair(NamedTuple):
    """Factors of one module of an older model, which is now part of a parameter.

    Attributes:
        key_A: Name of ``A``.
        key_B: Name of ``B``.
        rank: Rank of both.
        inputs: Inputs of the module.
        outputs: Outputs of the module.
        scale: ``alpha / r`` or ``alpha / sqrt(r)``.
    """

    key_A: str
    key_B: str
    rank: int
    inputs: int
    outputs: int
    scale: float


class ManyPairs(NamedTuple):
    """One or several pairs of factors per matrix; the outputs of several pairs follow each other (gate, then up).

    Attributes:
        rows: By matrix its pairs, of rank 0 if the adapter does not change it.
        rank: The parameter's rank: the largest sum of a matrix's ranks. Smaller ones are padded with zeros.
        inputs: The number I.
        outputs: The number O.
    """

    rows: Sequence[tuple[Pair, ...]]
    rank: int
    inputs: int
    outputs: int

    @property
    def keys(self) -> tuple[str, ...]:
        """See :class:`Layout`."""
        return tuple(key for row in self.rows for pair in row if pair.rank for key in (pair.key_A, pair.key_B))

    def read(self, get: Get) -> tuple[Float[Tensor, "J R I"], Float[Tensor, "J O R"]]:
        """See :class:`Layout`. ``B`` includes the scales; both are float32."""
        A_JRI = torch.zeros(len(self.rows), self.rank, self.inputs)
        B_JOR = torch.zeros(len(self.rows), self.outputs, self.rank)
        for A_RI, B_OR, row in zip(A_JRI, B_JOR, self.rows, strict=True):
            r = o = 0
            for pair in row:
                if not pair.rank:  # not adapted
                    o += pair.outputs
                    continue
                A_RI[r : r + pair.rank] = get(pair.key_A)
                B_OR[o : o + pair.outputs, r : r + pair.rank] = get(pair.key_B).float() * pair.scale
                r, o = r + pair.rank, o + pair.outputs
        return A_JRI, B_JOR
