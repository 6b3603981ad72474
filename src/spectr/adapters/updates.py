"""An expert's update of a module: its factors, those of a fused parameter's matrices, DoRA, biases, PiSSA, OLoRA.

A fused parameter holds one matrix per expert of a mixture of experts (MoE), as ``(J, O, I)`` or ``(J, I, O)``. An
adapter has one pair of factors for each of these matrices.

Legend: J matrices of the parameter, R the rank for each, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import AdapterError

if TYPE_CHECKING:
    from spectr.adapters.expert import FactorShape

_ROUNDING = 2**-7  # rounding of magnitudes in bfloat16


class Factors(NamedTuple):
    """One module's low-rank update ``delta = scale * B @ A``; for a fused parameter, of each of its matrices."""

    A: Float[Tensor, "*matrices rank inputs"]
    B: Float[Tensor, "*matrices outputs rank"]
    scale: float

    @property
    def is_zero(self) -> bool:
        """Whether the update changes nothing."""
        return not (self.A.any() and self.B.any() and self.scale)


class Update(NamedTuple):
    """What an expert adds to a layer's output ``W x + b``: ``scale B A x + gain * (W x) + shift``.

    Attributes:
        factors: The low-rank part, which is used to score the expert.
        gain_O: Multiplies ``W x``, float32; ``None`` if there is none.
        shift_O: Is added independently of ``x``, float32; ``None`` if there is none.
    """

    factors: Factors
    gain_O: Float[Tensor, " O"] | None = None
    shift_O: Float[Tensor, " O"] | None = None

    @property
    def is_zero(self) -> bool:
        """Whether the update changes nothing. Gains within the rounding of DoRA's first magnitudes are nothing."""
        gains = self.gain_O is not None and bool((self.gain_O.abs() > _ROUNDING).any())
        shifts = self.shift_O is not None and bool(self.shift_O.any())
        return self.factors.is_zero and not gains and not shifts


class Parts(NamedTuple):
    """The parts of a module's update besides ``A`` and ``B``; empty fields for missing parts.

    Attributes:
        magnitude: The name of the tensor with DoRA's magnitudes ``m``.
        bias_B: The name of the bias of ``B``.
        bias: The name of the trained bias of the base layer.
        initial: The initialisation whose factors PEFT subtracts from the base weight, such as ``"PiSSA"``.
        initial_rank: Their rank.
    """

    magnitude: str = ""
    bias_B: str = ""
    bias: str = ""
    initial: str = ""
    initial_rank: int = 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of tensors; each is a vector over the module's outputs."""
        return tuple(name for name in (self.magnitude, self.bias_B, self.bias) if name)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The present parts, as texts."""
        vectors = ((self.magnitude, "DoRA"), (self.bias_B, "lora_bias"), (self.bias, "trained biases"))
        return tuple(word for there, word in (*vectors, (self.initial, self.initial)) if there)


class BaseLayers(Protocol):
    """What an update reads of the base model's layers, by module name."""

    def weight(self, module: str) -> Float[Tensor, "O I"]:
        """The weight that the layer computes with, float32, on any device."""
        ...

    def bias(self, module: str) -> Float[Tensor, " O"] | None:
        """The bias, of any floating dtype."""
        ...

    def initial(self, module: str, kind: str, rank: int, scale: float) -> Factors:
        """The factors with which PEFT initialises an adapter, float32 on the CPU.

        Args:
            module: The layer's name.
            kind: ``"pissa"`` or ``"olora"``.
            rank: Rank of the adapter at this layer.
            scale: Scale of the adapter at this layer.

        Raises:
            AdapterError: PEFT cannot compute them for such a layer.
        """
        ...


Read = Callable[[str], Tensor]


@torch.no_grad()
def update_on(base: BaseLayers, module: str, factors: Factors, parts: Parts, read: Read) -> Update:
    """What an expert adds to a layer of this base model.

    With DoRA the layer becomes ``g (W + c B A) x + b`` with ``g = m / ||W + c B A||`` for each output, so that
    ``gain = g - 1`` and the factors are those of ``diag(g) c B A``.

    Args:
        base: The base model.
        module: The layer's name.
        factors: The file's factors, without initial ones.
        parts: The update's other parts.
        read: Returns a tensor of the file by name.

    Raises:
        AdapterError: A bias was trained but the layer has none, or a row that DoRA divides by is zero.

    Source: DoRA (Liu et al., 2024), eq. 5; PEFT's ``tuners/lora/dora.py``.
    """
    gain_O, shift_O = None, None
    if parts.bias_B:
        shift_O = factors.scale * read(parts.bias_B).float()
    if parts.bias:
        trained_O = read(parts.bias).float() - _bias(base, module).float().cpu()
        shift_O = trained_O if shift_O is None else shift_O + trained_O
    if parts.magnitude:
        size_O = row_norms(base.weight(module), factors)
        g_O = read(parts.magnitude).float() / size_O
        if not g_O.isfinite().all():
            raise AdapterError(
                f"{module}: W + scale * B @ A has a row of zeros, which DoRA's magnitude cannot scale",
                expected="the base model that the adapter was trained on",
                do="check the base model, or omit the adapter",
            )
        factors, gain_O = factors._replace(B=g_O[:, None] * factors.B.float()), g_O - 1
    return Update(factors, gain_O, shift_O)


def without_initial(factors: Factors, initial: Factors) -> Factors:
    """``c B A - c_0 B_0 A_0`` as factors: ``[c B, -c_0 B_0]`` and ``[A; A_0]``, float32 with the scale 1.

    Source: PEFT's ``LoraModel.subtract_mutated_init``.
    """
    A = torch.cat([factors.A.float(), initial.A.float()])
    B = torch.cat([factors.B.float() * factors.scale, -initial.scale * initial.B.float()], dim=1)
    return Factors(A, B, 1.0)


def row_norms(W_OI: Float[Tensor, "O I"], factors: Factors) -> Float[Tensor, " O"]:
    """``||W + c B A||_2`` of each row, float32 on the CPU, without forming ``B A``.

    ``||W + c B A||^2 = ||W||^2 + 2 c <W A^T, B> + c^2 <B (A A^T), B>``, row by row, summed in float64.

    Args:
        W_OI: The base weight, on any device.
        factors: ``A``, ``B`` and ``c``.
    """
    A_RI, B_OR = factors.A.to(W_OI.device).float(), factors.B.to(W_OI.device).double() * factors.scale
    own_O = torch.linalg.vector_norm(W_OI, dim=1, dtype=torch.float64).square()
    mixed_O = ((W_OI @ A_RI.mT).double() * B_OR).sum(1)
    low_O = ((B_OR @ (A_RI.double() @ A_RI.double().mT)) * B_OR).sum(1)
    return (own_O + 2 * mixed_O + low_O).clamp(min=0).sqrt().float().cpu()


def _bias(base: BaseLayers, module: str) -> Tensor:
    bias = base.bias(module)
    if bias is None:
        raise AdapterError(
            f"{module} has a trained bias in the adapter but no bias in this model",
            expected="the base model that the adapter was trained on",
            do="load that model, or omit the adapter",
        )
    return bias


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


class ManyPairs(NamedTuple):
    """One or several pairs of factors per matrix; the outputs of several pairs follow each other (gate, then up).

    Attributes:
        rows: By matrix its pairs, each of a module of an older model, of rank 0 if the adapter does not change it.
        rank: The parameter's rank: the largest sum of a matrix's ranks. Smaller ones are padded with zeros.
        inputs: The number I.
        outputs: The number O.
    """

    rows: Sequence[tuple[FactorShape, ...]]
    rank: int
    inputs: int
    outputs: int

    @property
    def keys(self) -> tuple[str, ...]:
        """See :class:`Layout`."""
        return tuple(key for row in self.rows for pair in row if pair.rank for key in (pair.key_A, pair.key_B))

    def read(self, get: Get) -> tuple[Float[Tensor, "J R I"], Float[Tensor, "J O R"]]:
        """See :class:`Layout`. ``B`` includes the scales; both are float32."""
        A_JRI = torch.zeros(len(self.rows), self.rank, self.inputs, dtype=torch.float32)
        B_JOR = torch.zeros(len(self.rows), self.outputs, self.rank, dtype=torch.float32)
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
