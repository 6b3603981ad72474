"""The routed linear layer: a base layer with the experts that adapt it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from spectr.combine import get_combination, merge_outputs
from spectr.layers.decision import Decision, Fusable, Held
from spectr.layers.grouped import grouped_inputs, grouped_outputs
from spectr.layers.kernels import Choice, Kernels, kernels_for
from spectr.layers.linear import Features, features
from spectr.layers.names import take_names_of_base
from spectr.layers.outputs import add_masked, gathered_sum, gathering_pays, weighted
from spectr.routers.base import Router, ShortlistRouter, segment_norms
from spectr.routers.settings import combination_of, selection_of
from spectr.selection import TopK
from spectr.spectral import Stack


class RoutedLinear(nn.Module):
    """``y = base(x) + combine(select(score(x)))``.

    It stands in for its base layer wherever the model looks: ``weight``, ``bias`` and sizes are the base layer's, and
    so are the names in ``state_dict``, so that a composed model is saved and loaded like the plain one.

    Args:
        base: The layer as it was; never changed.
        stack: Its experts, on the device and in the dtype to compute in; ``None`` for none yet.
        router: Decides for each token.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    A_PI: Tensor
    B_OP: Tensor
    owner_P: Tensor
    member_EP: Tensor
    rows_ER: Tensor | None
    prototypes_EI: Tensor | None
    centers_P: Tensor | None
    mix_PR: Tensor | None
    C_QP: Tensor | None
    U_OQ: Tensor | None
    held: Held | None = None
    fusable: Fusable | None = None
    prior_B1E: Tensor | None = None
    among_B1E: Tensor | None = None
    listen: Callable[[Tensor], None] | None = None
    asleep: bool = False

    def __init__(self, base: nn.Module, stack: Stack | None, router: Router):
        super().__init__()
        self.base = base
        self.router = router
        self.select = selection_of(router)
        combination = get_combination(combination_of(router))
        self.combine, self.prepare = combination.merge, combination.prepare
        self.sums = self.combine is merge_outputs
        self.shortlists = isinstance(router, ShortlistRouter)
        stacked = ("A_PI", "B_OP", "owner_P", "member_EP", "rows_ER", "prototypes_EI", "centers_P", "mix_PR")
        for name in (*stacked, "C_QP", "U_OQ"):
            self.register_buffer(name, None, persistent=False)
        self.fill(stack)
        take_names_of_base(self)
        self.train(base.training)

    def fill(self, stack: Stack | None) -> None:
        """Hold these experts in the place of those before; without any the layer is its base layer.

        What was held, or known of a prompt, is forgotten.
        """
        self.fusable = None  # which holds on to them
        self.hold(None)
        self.inform(None)
        self.narrow(None)
        if stack is None:
            self.experts, self.ranks, self.common_rank, self._prepared_dtype = (), (), None, None
            self.gathers = self.fuses = False
            for name in self._buffers:
                self._buffers[name] = None
            return
        self.experts, self.ranks, self.common_rank = stack.experts, stack.ranks, stack.common_rank
        self._prepared_dtype = stack.A_PI.dtype
        self.fuses = (
            self.sums
            and getattr(self.router, "by_norms", False)
            and isinstance(self.select, TopK)
            and stack.common_rank is not None
            and stack.mix_PR is None
        )
        gathers = self.sums and not self.shortlists
        self.gathers = gathers and gathering_pays(self.select, len(self.experts), self.common_rank)
        owner_P = stack.owner_P
        self.A_PI = stack.A_PI.contiguous()
        self.B_OP = stack.B_OP.mT.contiguous().mT  # an expert's rows lie together
        self.owner_P = owner_P.to(stack.A_PI.device)
        member_PE = torch.nn.functional.one_hot(owner_P, len(self.experts))
        self.member_EP = member_PE.mT.contiguous().to(stack.A_PI)
        rows_ER = torch.arange(len(owner_P)).view(len(self.experts), -1) if self.gathers else None
        self.rows_ER = None if rows_ER is None else rows_ER.to(stack.A_PI.device)
        self.prototypes_EI, self.centers_P, self.mix_PR = stack.prototypes_EI, stack.centers_P, stack.mix_PR
        self.C_QP, self.U_OQ = (None, None) if self.prepare is None else self.prepare(stack)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which look at their own factors."""
        return {**vars(self), "fusable": None}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A new weight (as tying or resizing gives) goes to the base layer."""
        self.base.register_parameter(name, param)

    @property
    def is_as_prepared(self) -> bool:
        """Whether the experts are still in the dtype they were prepared in; a cast may have cost them digits."""
        return self.A_PI.dtype == self._prepared_dtype

    def route(self, x: Float[Tensor, "*T I"]) -> Decision:
        """Score the experts for each token and choose. Tokens are all leading axes of ``x``."""
        h_TP, scores_TE = self._score(x)
        return Decision(h_TP, scores_TE, self.select(scores_TE))

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        """Scores of the experts for each token, float32."""
        return self._score(x)[1]

    def decide(self, x: Float[Tensor, "*T I"]) -> Decision:
        """As :meth:`route`, the scores informed by the prompt's prior where there is one."""
        h_TP, scores_TE = self._informed(x)
        return Decision(h_TP, scores_TE, self._weights(scores_TE))

    def _score(self, x: Float[Tensor, "*T I"]) -> tuple[Float[Tensor, "*T P"], Float[Tensor, "*T E"]]:
        """``A x`` and the scores. Of experts that are not on a token's shortlist, zero and minus infinity."""
        tensors = self._buffers  # a module's own look-up of an attribute costs more than a small product
        A_PI, member_EP, prototypes_EI = tensors["A_PI"], tensors["member_EP"], tensors["prototypes_EI"]
        assert A_PI is not None
        assert member_EP is not None
        if x.dtype != A_PI.dtype or x.device != A_PI.device:
            x = x.to(A_PI.device, A_PI.dtype)
        if self.shortlists:
            taken_TE = self.router.candidates(x, prototypes_EI, self.among_B1E)  # pyright: ignore[reportAttributeAccessIssue]
            h_TP = grouped_inputs(x, A_PI, self.ranks, taken_TE)
            norms_TE = segment_norms(h_TP, self.common_rank, member_EP)
            return h_TP, self.router.scores(x, norms_TE, prototypes_EI).masked_fill(~taken_TE, -torch.inf)
        h_TP = linear(x, A_PI)
        mix_PR, centers_P = tensors["mix_PR"], tensors["centers_P"]
        if mix_PR is not None:
            h_TP = linear(h_TP, mix_PR)
        scored_TP = h_TP if centers_P is None else h_TP - centers_P
        return h_TP, self.router.scores(x, segment_norms(scored_TP, self.common_rank, member_EP), prototypes_EI)

    def _weights(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """The selection's weights, among the experts that a row may choose from."""
        weights_TE = self.select(scores_TE)
        if self.among_B1E is None:
            return weights_TE
        weights_TE = weights_TE.where(self.among_B1E, 0.0)  # a selection may have had to fill up with others
        return weights_TE / weights_TE.sum(-1, keepdim=True).clamp(min=1e-30)

    def _informed(self, x: Float[Tensor, "*T I"]) -> tuple[Float[Tensor, "*T P"], Float[Tensor, "*T E"]]:
        h_TP, scores_TE = self._score(x)
        if self.prior_B1E is not None:
            prior = _by_row(self.prior_B1E, x)
            scores_TE = self.router.informed(scores_TE, prior)  # pyright: ignore[reportAttributeAccessIssue]
        if self.among_B1E is not None:
            scores_TE = scores_TE.masked_fill(~self.among_B1E, -torch.inf)
        return h_TP, scores_TE

    def forward(self, input: Float[Tensor, "*T I"], *args: Any, **kwargs: Any) -> Float[Tensor, "*T O"]:
        """The base layer's output plus the chosen experts' update."""
        if not (args or kwargs or is_compiling()):
            whole = self._whole(input)
            if whole is not None:
                return whole
        return self.update(self.base(input, *args, **kwargs), input)

    def update(self, out: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """The base layer's output for these tokens plus the chosen experts' update; maybe in the memory of ``out``."""
        if self.listen is not None:
            self.listen(x)
        if self.asleep or not self.experts:
            return out
        fused = self._fused(out, x)
        if fused is not None:
            return fused
        return self._add_routed(out, x) if self.held is None else self._add_held(out, x, self.held)

    def _add_routed(self, out: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        tensors = self._buffers
        B_OP = tensors["B_OP"]
        assert B_OP is not None
        h_TP, scores_TE = self._informed(x)
        if self.gathers and self.among_B1E is None:
            index_TK, weights_TK = self.select.choose(scores_TE)  # pyright: ignore[reportAttributeAccessIssue]
            return _add(out, gathered_sum(h_TP, index_TK, weights_TK, B_OP, tensors["rows_ER"]))  # pyright: ignore
        weights_TE = self._weights(scores_TE)
        if not self.sums:
            return _add(out, self._combined(h_TP, weights_TE, B_OP if self.C_QP is None else self.C_QP, self.owner_P))
        if self.shortlists:
            return _add(out, grouped_outputs(h_TP, weights_TE, self.B_OP, self.ranks))
        return self._add_masked(out, weighted(h_TP, weights_TE, self.common_rank, tensors["member_EP"]), B_OP)  # pyright: ignore

    def _fused(self, out: Tensor, x: Tensor) -> Tensor | None:
        """All by one compiled call, where that is possible; in the memory of ``out`` where nobody else sees it."""
        ready, held = self._ready(x), self.held
        if ready is None or not ready.able or x.dtype != ready.A_PI.dtype or not ready.kernels.take(x, out):
            return None
        kernels = ready.kernels
        if held is not None:
            if not (self._fits(held.weights_B1P, x) and self._owns(out)):
                return None
            return out if kernels.held(x, ready.A_PI, ready.Bt_PO, held.weights_B1P, out) else None
        if self.among_B1E is not None or not self._fits(self.prior_B1E, x):
            return None
        target = out if self._owns(out) else out.clone()
        centers_P = self._buffers["centers_P"]
        done = kernels.route(x, ready.A_PI, ready.Bt_PO, centers_P, self.prior_B1E, target, ready.choice)
        return target if done else None

    def _whole(self, x: Tensor) -> Tensor | None:
        """As :meth:`_fused`, the base layer too, where nobody watches it. With little Python: every token waits."""
        if self.asleep or self.listen is not None or self.among_B1E is not None:
            return None
        ready, held, tensors = self.fusable, self.held, self._buffers
        if ready is None:
            ready = self._ready(x)
        if ready is None or ready.whole is None:
            return None
        A_PI, B_OP = (tensors["A_PI"], tensors["B_OP"]) if held is None else (held.A_PI, held.B_OP)
        if A_PI is not ready.A_PI or B_OP is not ready.B_OP:
            return None
        rows = self.prior_B1E if held is None else held.weights_B1P
        return ready.whole(x, rows) if rows is None or self._fits(rows, x) else None

    def _ready(self, x: Tensor) -> Fusable | None:
        """What the kernels for this device can do with the factors that are in force."""
        kernels = _kernels(x)
        if kernels is None or not self.experts:
            return None
        held = self.held
        A_PI, B_OP = (self._buffers["A_PI"], self._buffers["B_OP"]) if held is None else (held.A_PI, held.B_OP)
        ready = self.fusable
        if ready is None or ready.A_PI is not A_PI or ready.B_OP is not B_OP or ready.kernels is not kernels:
            assert A_PI is not None
            assert B_OP is not None
            ready = self.fusable = self._look_at(kernels, A_PI, B_OP)
        return ready

    def _look_at(self, kernels: Kernels, A_PI: Tensor, B_OP: Tensor) -> Fusable:
        """What the kernels can do with these factors, as the router and the combination want it."""
        select: Any = self.select
        routes, Bt_PO = self.held is None, B_OP.mT
        able = kernels.know(A_PI, Bt_PO) and (self.fuses if routes else self.sums)
        softmax = getattr(select, "weighting", None) == "softmax"
        k = min(getattr(select, "k", 0), len(self.experts))
        choice = Choice(len(self.experts), k, select.temperature if softmax else 0.0)
        centers_P = self._buffers["centers_P"] if routes else None
        whole = kernels.whole(self.base, A_PI, Bt_PO, centers_P, choice if routes else None) if able else None
        return Fusable(kernels, A_PI, B_OP, Bt_PO, able, choice, whole)

    @staticmethod
    def _fits(rows: Tensor | None, x: Tensor) -> bool:
        """Whether there is one row for all tokens, or one for each of the batch; not one for each token."""
        return rows is None or (rows.shape[1] == 1 and (len(rows) == 1 or (x.ndim > 2 and len(rows) == len(x))))

    def _add_held(self, out: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], held: Held) -> Float[Tensor, "*T O"]:
        h_TP = linear(x.to(held.A_PI.device, held.A_PI.dtype), held.A_PI)
        if self.sums:
            return self._add_masked(out, h_TP * _by_row(held.weights_B1P, x), held.B_OP)
        weights_TE = _by_row(held.weights_B1E, x).expand(*h_TP.shape[:-1], -1)
        return _add(out, self._combined(h_TP, weights_TE, held.B_OP, held.owner_P))

    def _combined(self, h_TP: Tensor, weights_TE: Tensor, B_OP: Tensor, owner_P: Tensor) -> Float[Tensor, "*T O"]:
        """What the combination makes of output factors, or of what it prepared of these."""
        prepared = () if self.U_OQ is None else (self.U_OQ,)
        return self.combine(h_TP, weights_TE, B_OP, owner_P, *prepared)

    def _add_masked(self, out: Tensor, weighted_TP: Tensor, B_OP: Tensor) -> Float[Tensor, "*T O"]:
        if out.dtype != B_OP.dtype or out.device != B_OP.device:
            return _add(out, linear(weighted_TP, B_OP))
        return add_masked(out, weighted_TP, B_OP, in_place=self._owns(out))

    def _owns(self, out: Tensor) -> bool:
        """Whether nobody else can see the base layer's output: not autograd, and no hook."""
        plain = type(self.base) is nn.Linear and not self.base._forward_hooks
        return plain and out.is_contiguous() and not torch.is_grad_enabled()

    def hold(self, weights_BE: Float[Tensor, "B E"] | None) -> None:
        """Give every token of row ``b`` these weights of the layer's experts from now on; ``None`` routes again.

        Only the experts that some row takes are computed. One row serves batches of any size.
        """
        self.fusable = None
        if weights_BE is None:
            self.held = None
            return
        taken_E = (weights_BE != 0).any(0)
        rows_P = taken_E.to(self.owner_P.device)[self.owner_P].nonzero().squeeze(1)
        ranks = torch.tensor([rank for rank, taken in zip(self.ranks, taken_E.tolist(), strict=True) if taken])
        owner_P = torch.repeat_interleave(torch.arange(len(ranks)), ranks.long()).to(self.owner_P.device)
        weights_B1E = weights_BE[:, None, taken_E].to(self.A_PI.device)
        self.held = Held(
            A_PI=self.A_PI[rows_P] if self.mix_PR is None else self.mix_PR[rows_P] @ self.A_PI,
            B_OP=(self.B_OP if self.C_QP is None else self.C_QP).mT[rows_P].mT,  # an expert's rows lie together
            owner_P=owner_P,
            weights_B1E=weights_B1E,
            weights_B1P=weights_B1E[..., owner_P].to(self.A_PI.dtype).contiguous(),
            all_weights_B1E=weights_BE[:, None].to(self.A_PI.device),
        )

    def inform(self, prior_BE: Float[Tensor, "B E"] | None) -> None:
        """Inform the scores of every token of row ``b`` by this prior from now on; ``None`` ends that."""
        prior_BE = None if prior_BE is None else prior_BE.to(self.A_PI.device, torch.float32).contiguous()
        self.prior_B1E = None if prior_BE is None else prior_BE[:, None]

    def narrow(self, among_BE: Bool[Tensor, "B E"] | None) -> None:
        """Let the tokens of row ``b`` choose among these of the layer's experts alone; ``None`` ends that."""
        self.among_B1E = None if among_BE is None or bool(among_BE.all()) else among_BE[:, None].to(self.A_PI.device)

    def explain(self, x: Float[Tensor, "*T I"]) -> Decision:
        """What is in force for these tokens: the router's decision, with the weights that are held, if any are."""
        decision = self.decide(x)
        if self.held is None:
            return decision
        return decision._replace(weights_TE=self.held.all_weights_B1E.expand_as(decision.scores_TE))

    def bytes_read(self, tokens: int) -> int:
        """Bytes of the experts' factors that a call with so many tokens reads at least."""
        if not self.experts:
            return 0
        size = self.A_PI.element_size()
        if self.held is not None:
            return size * (self.held.A_PI.numel() + self.held.B_OP.numel())
        share = 1.0
        if self.gathers or (self.fuses and kernels_for(self.A_PI.device.type) is not None):
            share = min(1.0, tokens * self.select.k / len(self.experts))  # pyright: ignore[reportAttributeAccessIssue]
        mixing = 0 if self.mix_PR is None else self.mix_PR.numel()
        prototypes = 0 if self.prototypes_EI is None else self.prototypes_EI.numel()
        return round(size * (self.A_PI.numel() + mixing + prototypes + share * self.B_OP.numel()))

    def stack(self) -> Stack:
        """The experts, as they are held now."""
        return Stack(
            experts=self.experts,
            ranks=self.ranks,
            A_PI=self.A_PI,
            B_OP=self.B_OP,
            prototypes_EI=self.prototypes_EI,
            centers_P=self.centers_P,
            mix_PR=self.mix_PR,
        )

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # pyright: ignore[reportReturnType]

    @property
    def in_features(self) -> int:
        """Numbers a token brings."""
        return _sizes(self.base).inputs

    @property
    def out_features(self) -> int:
        """Numbers a token takes along."""
        return _sizes(self.base).outputs

    def extra_repr(self) -> str:
        """What ``print(model)`` shows beside the base layer."""
        return f"experts={len(self.experts)}, ranks={sorted(set(self.ranks))}, router={self.router}"


def _by_row(rows_B1N: Tensor, x: Tensor) -> Tensor:
    """Numbers of each row of a batch, so that they broadcast over its tokens; tokens in one axis have one row."""
    return rows_B1N if x.ndim > 2 else rows_B1N[:, 0] if x.ndim == 2 else rows_B1N[0, 0]


def _kernels(x: Tensor) -> Kernels | None:
    return None if is_compiling() else kernels_for(x.device.type)  # a compiler makes its own


def _sizes(base: nn.Module) -> Features:
    found = features(base)
    assert found is not None, "only linear layers are routed"
    return found


def _add(out_TO: Tensor, delta_TO: Tensor) -> Float[Tensor, "*T O"]:
    if delta_TO.dtype != out_TO.dtype or delta_TO.device != out_TO.device:
        delta_TO = delta_TO.to(out_TO.device, out_TO.dtype)
    return out_TO + delta_TO
