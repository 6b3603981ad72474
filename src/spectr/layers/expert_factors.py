"""The experts of one layer in the form that its calls need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spectr.combine import merge_outputs
from spectr.ops import KernelPlan, Selector, make_kernel_plan
from spectr.ops.add_outputs import gathering_pays
from spectr.routers.router import LengthRouter, Router, ShortlistRouter
from spectr.routers.use import Use
from spectr.selection import TopK
from spectr.spectral import Stack, remade


class Factors(NamedTuple):
    """Experts of one layer, on its device and in its dtype. Immutable.

    Attributes:
        experts: Their names, in the order of the E axis.
        ranks: Their ranks; the P axis has their sum.
        common_rank: The rank of all experts; ``None`` if they differ.
        A_PI: Input factors; for experts that share their input factor, that one.
        B_OP: Output factors; an expert's columns are adjacent in memory.
        owner_P: The expert's index for each row.
        member_EP: One if row ``p`` belongs to expert ``e``, else zero.
        rows_ER: Each expert's rows, if only those of the chosen experts are read.
        own: The router's own tensors; see :attr:`spectr.spectral.Share.own`.
        mix_PR: Maps a shared input factor to the experts' factors.
        C_QP: What the combination made of the output factors, which it replaces.
        U_OQ: The combination's second tensor.
        gain_EO: Factor by which each expert multiplies the base layer's ``W x`` and adds it; ``None`` if none does.
        shift_EO: What each expert adds independently of the input.
        raw_A_PI: The adapters' own input factors, if the combination merges these.
        raw_B_OP: The adapters' own output factors, likewise.
        plan: How they are computed; ``None``: nothing is prepared, and torch computes.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    common_rank: int | None
    A_PI: Float[Tensor, "_ I"]
    B_OP: Float[Tensor, "O P"]
    owner_P: Int[Tensor, " P"]
    member_EP: Float[Tensor, "E P"]
    rows_ER: Int[Tensor, "E R"] | None = None
    own: Any = ()
    mix_PR: Float[Tensor, "P Q"] | None = None
    C_QP: Float[Tensor, "Q P"] | None = None
    U_OQ: Float[Tensor, "O Q"] | None = None
    gain_EO: Float[Tensor, "E O"] | None = None
    shift_EO: Float[Tensor, "E O"] | None = None
    raw_A_PI: Float[Tensor, "_ I"] | None = None
    raw_B_OP: Float[Tensor, "O _"] | None = None
    plan: KernelPlan | None = None

    @staticmethod
    def of(stack: Stack, router: Router) -> Factors:
        """Experts for a router's calls, without a plan."""
        count, device = len(stack.experts), stack.A_PI.device
        owner_P, combination = stack.owner_P, router.combination
        rows_ER = None
        products = stack.gain_EO is None and stack.shift_EO is None
        gathers = products and combination.merge is merge_outputs and not isinstance(router, ShortlistRouter)
        if gathers and gathering_pays(router.selection, count, stack.common_rank):
            rows_ER = torch.arange(len(owner_P)).view(count, -1).to(device)
        C_QP, U_OQ = (None, None) if combination.prepare is None else combination.prepare(stack)
        return Factors(
            C_QP=C_QP,
            U_OQ=U_OQ,
            experts=stack.experts,
            ranks=stack.ranks,
            common_rank=stack.common_rank,
            A_PI=stack.A_PI.contiguous(),
            B_OP=stack.B_OP.mT.contiguous().mT,  # an expert's rows lie together
            owner_P=owner_P.to(device),
            member_EP=stack.member_EP,
            rows_ER=rows_ER,
            own=stack.own,
            mix_PR=stack.mix_PR,
            gain_EO=stack.gain_EO,
            shift_EO=stack.shift_EO,
            raw_A_PI=stack.raw_A_PI,
            raw_B_OP=stack.raw_B_OP,
        )

    def stack(self) -> Stack:
        """The experts in the router's stack."""
        return Stack(**{field.name: getattr(self, field.name) for field in fields(Stack)})

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, the router's own included."""
        named = {**self._asdict(), **(self.own._asdict() if self.own else {})}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Factors:
        """The factors with other tensors instead of :meth:`tensors`, without a plan."""
        own = remade(self.own, [tensors[name] for name in self.own._fields]) if self.own else ()
        others = {name: tensors[name] for name in self._fields if isinstance(getattr(self, name), Tensor)}
        return self._replace(plan=None, own=own, **others)

    def subset(self, names: tuple[str, ...]) -> Factors | None:
        """Some of the experts, for fixed weights, without a plan; a single one without a copy."""
        places = [place for place, name in enumerate(self.experts) if name in names]
        if not places or len(places) == len(self.experts):
            return self if places else None
        ranks, device = tuple(self.ranks[place] for place in places), self.owner_P.device
        starts = torch.tensor((0, *self.ranks)).cumsum(0).tolist()
        rows: Any = slice(starts[places[0]], starts[places[0] + 1])
        if len(places) > 1:
            rows = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in places]).to(device)
        owner_P = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(device)
        return Factors(
            experts=tuple(self.experts[place] for place in places),
            ranks=ranks,
            common_rank=ranks[0] if len(set(ranks)) == 1 else None,
            A_PI=self.A_PI[..., rows, :] if self.mix_PR is None else self.mix_PR[rows] @ self.A_PI,
            B_OP=self.B_OP.mT[..., rows, :].mT,
            C_QP=None if self.C_QP is None else self.C_QP[:, rows],
            U_OQ=self.U_OQ,
            gain_EO=_rows(self.gain_EO, places),
            shift_EO=_rows(self.shift_EO, places),
            raw_A_PI=_parts(self.raw_A_PI, len(self.experts), places, 0),
            raw_B_OP=_parts(self.raw_B_OP, len(self.experts), places, 1),
            owner_P=owner_P,
            member_EP=torch.nn.functional.one_hot(owner_P, len(places)).mT.to(self.A_PI),
        )

    @property
    def has_matrices(self) -> bool:
        """Whether these are factors of a fused parameter: tensors of factors have an axis more, its matrices' first."""
        return self.A_PI.ndim > 2

    def of_matrix(self, matrix: int) -> Factors:
        """Of a fused parameter the factors for one of its matrices."""
        return self._replace(
            A_PI=self.A_PI[matrix], B_OP=self.B_OP[matrix], own=remade(self.own, [each[matrix] for each in self.own])
        )

    def planned(self, base: nn.Module, router: Router, use: Use | None = None, *, fixed: bool = False) -> Factors:
        """The factors with a layer's plan.

        Args:
            base: The base layer.
            router: Chooses among them.
            use: Use of the evidence for whole prompts.
            fixed: Whether weights are fixed instead of chosen for each token.
        """
        refusal = self._refusal(router, use, fixed)
        if fixed or refusal:
            return self._replace(plan=make_kernel_plan(base, self.A_PI, self.B_OP, refusal=refusal))
        select = router.selection
        assert isinstance(select, TopK)
        temperature = select.temperature if select.weighting == "softmax" else 0.0
        numbers = Selector(len(self.experts), min(select.k, len(self.experts)), temperature, router.rule)
        assert isinstance(router, LengthRouter)
        return self._replace(plan=make_kernel_plan(base, self.A_PI, self.B_OP, router.lengths(self).centers_P, numbers))

    def _refusal(self, router: Router, use: Use | None, fixed: bool) -> str:
        """Why no kernel can compute what the router needs; empty if one may."""
        combines = router.combination.merge is merge_outputs
        refusal = "" if combines else f"no kernel supports combine='{router.combine}'"
        if self.exceeds_products:
            refusal = "experts scale the layer's outputs or add a bias"
        if self.has_matrices:
            refusal = "no kernel takes a matrix for each expert of a mixture"
        if fixed or refusal:
            return refusal
        informs = use is None or use.in_kernels
        if not router.rule or not informs:
            return f"{type(router if informs else use).__name__} has no kernel for its scores"
        if not isinstance(router.selection, TopK):
            return f"no kernel selects like {type(router.selection).__name__}"
        if self.common_rank is None:
            return "the experts' ranks differ"
        return "" if self.mix_PR is None else "the experts share their input factor"

    @property
    def exceeds_products(self) -> bool:
        """Whether an expert adds more than a product ``B A x``."""
        return self.gain_EO is not None or self.shift_EO is not None

    def beyond_products(
        self, out: Float[Tensor, "*T O"], bias_O: Tensor | None, weights_TE: Float[Tensor, "*T E"]
    ) -> Float[Tensor, "*T O"]:
        """``sum_i w_i (gain_i * (W x) + shift_i)``: what the experts add besides ``B A x``.

        Args:
            out: The base layer's output.
            bias_O: The bias that it contains.
            weights_TE: Of the experts.
        """
        weights_TE = weights_TE.to(out.device, out.dtype)
        added_TO = out.new_zeros(())
        if self.gain_EO is not None:
            product_TO = out if bias_O is None else out - bias_O.to(out.device, out.dtype)
            added_TO = (weights_TE @ self.gain_EO.to(out.device, out.dtype)) * product_TO
        if self.shift_EO is not None:
            added_TO = added_TO + weights_TE @ self.shift_EO.to(out.device, out.dtype)
        return added_TO

    def bytes_read(self, taken: float) -> int:
        """The minimum of bytes that a call reads.

        Args:
            taken: Share of the output factors that it reads.
        """
        whole = (self.A_PI, self.mix_PR, self.gain_EO, self.shift_EO, self.raw_A_PI, self.raw_B_OP, *self.own)
        inputs = sum(t.numel() for t in whole if t is not None)
        return round(self.A_PI.element_size() * (inputs + taken * self.B_OP.numel()))


def _rows(rows_EO: Tensor | None, places: list[int]) -> Tensor | None:
    """Those of some experts; ``None`` where they are all zero."""
    some = None if rows_EO is None else rows_EO[places]
    return some if some is not None and bool(some.any()) else None


def _parts(whole: Tensor | None, experts: int, places: list[int], dim: int) -> Tensor | None:
    """The parts of some experts; all parts have equal sizes."""
    if whole is None:
        return None
    parts = whole.chunk(experts, dim)
    return torch.cat([parts[place] for place in places], dim)


class Decision(NamedTuple):
    """One module's routing of one call: ``h = A x``, float32 scores, and weights (zero where not chosen)."""

    h_TP: Float[Tensor, "*T P"]
    scores_TE: Float[Tensor, "*T E"]
    weights_TE: Float[Tensor, "*T E"]
