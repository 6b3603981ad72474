"""The routed linear layer: a base layer with the experts that adapt it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from spectr.combine import merge_outputs
from spectr.errors import CompositionError
from spectr.layers.batch_routing import LayerCall, spread, thread
from spectr.layers.expert_factors import Decision, Factors
from spectr.layers.linear_layers import Features, features
from spectr.layers.names import take_names_of_base
from spectr.layers.pairs import LayerInput, Pairs
from spectr.layers.token_layout import ROWS_FIRST
from spectr.ops import NOT_PREPARED, report_once, update_by_kernels
from spectr.ops.add_outputs import add_masked, gathered_sum, weighted
from spectr.ops.grouped import grouped_inputs, grouped_outputs
from spectr.routers.router import Router, ShortlistRouter
from spectr.routers.use import Use
from spectr.selection import is_captured, select_among
from spectr.spectral import Stack

# Tensors are named by their shapes; and the router's own.
_BUFFERS = [name for name in Factors._fields if name.rpartition("_")[2].isupper()]


class RoutedLinear(nn.Module):
    """``y = base(x) + combine(select(score(x)))``.

    It replaces its base layer in the model: ``weight``, ``bias`` and sizes are the base layer's, and so are the names
    in ``state_dict``. So a composed model is saved and loaded like the plain one. A call only computes; its routing is
    the thread's :class:`spectr.layers.batch_routing.BatchRouting`.

    Args:
        base: The original layer; never changed.
        stack: Its experts, on the device and in the dtype of the computation; ``None`` for none.
        router: Decides for each token.
        use: Use of the evidence for whole prompts, so that a call without a decision is refused; ``None``: only tokens
            decide.

    Attributes:
        experts: Names of the experts that it holds.
        call: The default routing: every token chooses among all experts.
    """

    A_PI: Tensor
    call: LayerCall

    def __init__(self, base: nn.Module, stack: Stack | None, router: Router, *, use: Use | None = None):
        super().__init__()
        self.base = base
        self.router = router
        self.select, self.combination = router.selection, router.combination
        self.combine = self.combination.merge
        self.sums = self.combine is merge_outputs
        self.lister = router if isinstance(router, ShortlistRouter) else None
        self.use, self.decided = use, use is not None
        self.fill(stack)
        take_names_of_base(self)
        self.train(base.training)

    def fill(self, stack: Stack | None) -> None:
        """Replace the experts; without any, the layer is its base layer."""
        factors = None if stack is None else Factors.of(stack, self.router)
        self._prepared_dtype = None if factors is None else factors.A_PI.dtype
        self._buffers.clear()
        tensors = {} if factors is None else factors.tensors()
        for name in dict.fromkeys((*_BUFFERS, *tensors)):
            self.register_buffer(name, tensors.get(name), persistent=False)
        self._keep(factors)

    def _keep(self, factors: Factors | None) -> None:
        if factors is not None:
            fixed = self.use is not None and self.use.fixes  # no token chooses there
            factors = factors.planned(self.base, self.router, self.use, fixed=fixed)
        self.call = LayerCall(factors, factors)

    def factors_of(self, stack: Stack, *, fixed: bool = False) -> Factors:
        """Experts in the form that this layer's calls need.

        Args:
            stack: The experts.
            fixed: Whether weights are fixed instead of chosen for each token.
        """
        return Factors.of(stack, self.router).planned(self.base, self.router, self.use, fixed=fixed)

    def subset(self, names: tuple[str, ...]) -> Factors | None:
        """The factors of some experts, for fixed weights; a single one without a copy."""
        some = None if self.factors is None else self.factors.subset(names)
        return None if some is None else some.planned(self.base, self.router, self.use, fixed=True)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLinear:
        """As ``nn.Module``; the factors are taken from the buffers, which may have moved or been cast."""
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def share(self, other: RoutedLinear) -> None:
        """Use the other layer's tensors instead of equal ones."""
        for name, mine in list(self._buffers.items()):
            theirs = other._buffers.get(name)
            if mine is not None and theirs is not None and mine.shape == theirs.shape and torch.equal(mine, theirs):
                self._buffers[name] = theirs
        self.prepare()

    def prepare(self) -> None:
        """Make a new plan: the factors moved or were cast, or the kernels changed."""
        factors = self.call.factors
        if factors is not None:
            self._keep(factors.with_tensors(self._buffers))  # pyright: ignore[reportArgumentType]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: plans contain memory addresses and are made again."""
        factors = self.call.factors
        plain = None if factors is None else factors._replace(plan=None)
        return {**vars(self), "call": LayerCall(plain, plain)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A new weight, for example after tying or resizing, belongs to the base layer."""
        self.base.register_parameter(name, param)

    @property
    def factors(self) -> Factors | None:
        """The factors of its experts."""
        return self.call.factors

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it holds."""
        factors = self.call.factors
        return () if factors is None else factors.experts

    @property
    def can_share(self) -> bool:
        """Whether other factors can be made from its experts: a single matrix, in the dtype of preparation."""
        return self.A_PI.dtype == self._prepared_dtype and self.A_PI.ndim == 2

    def in_force(self) -> LayerCall:
        """The routing of this thread's current call.

        Raises:
            CompositionError: The router decides on prompts, but there is no decision for this call.
        """
        routing = thread.routing
        if routing is not None:
            return routing.of(self)
        if self.decided:
            raise CompositionError(
                "a routed layer was called without a decision for its prompt",
                expected="a call of the model, its inner decoder or its encoder, which reads the prompt first",
                do="call the model; or decide yourself: with routed.prompt.using(routed.prompt.decide(...)): ...",
            )
        return self.call

    def route(self, x: Float[Tensor, "*T I"]) -> Decision:
        """Score the experts for each token and choose. Tokens are all leading axes of ``x``."""
        h_TP, scores_TE = self._score(x, self._own())
        return Decision(h_TP, scores_TE, self.select(scores_TE))

    def scores(self, x: LayerInput) -> Float[Tensor, "*T E"]:
        """Scores of the experts for each token, float32."""
        factors = self._own()
        if isinstance(x, Pairs):
            return torch.cat([self._score(x.x_SI[rows], factors.of_matrix(j))[1] for j, rows in x.groups()])
        if "h" in self.router.reads:
            return self._score(x, factors)[1]
        return self.router.scores(factors, x.to(factors.A_PI.device, factors.A_PI.dtype), x.new_empty(0), None)

    def explain(self, x: LayerInput, call: LayerCall | None = None) -> Decision:
        """The routing of these tokens: the router's scores, and the chosen or fixed weights.

        Args:
            x: The layer's input; for pairs the result is each token's mean over its MoE experts.
            call: The routing; by default the thread's.
        """
        call = self.in_force() if call is None else call
        shown = call.shown
        assert shown is not None, "there is nothing to explain where no expert is held"
        if isinstance(x, Pairs):
            parts = [self.explain(x_NI, part) for x_NI, _, part in x.calls(call, self)]
            return Decision(*(x.by_token(torch.cat(some)).mean(1) for some in zip(*parts, strict=True)))
        if call.fixed is not None:
            h_TP, scores_TE = self._score(x, shown)
            return Decision(h_TP, scores_TE, spread(call.fixed.shown_BTF, self, x).expand_as(scores_TE))
        h_TP, scores_TE = self._informed(x, call._replace(factors=shown))
        if call.factors is None:
            return Decision(h_TP, scores_TE, torch.zeros_like(scores_TE))
        return Decision(h_TP, scores_TE, self._weights(scores_TE, x, call))

    def _own(self) -> Factors:
        factors = self.call.factors
        assert factors is not None, "the layer holds no expert"
        return factors

    def _score(
        self, x: Float[Tensor, "*T I"], factors: Factors, allowed_TE: Tensor | None = None
    ) -> tuple[Float[Tensor, "*T P"], Float[Tensor, "*T E"]]:
        """``A x`` and the scores. Of experts that are not on a token's shortlist, zero and minus infinity."""
        A_PI = factors.A_PI
        if x.dtype != A_PI.dtype or x.device != A_PI.device:
            x = x.to(A_PI.device, A_PI.dtype)
        if self.lister is not None:
            listed_TE = self.lister.candidates(factors, x, allowed_TE)
            h_TP = grouped_inputs(x, A_PI, factors.ranks, listed_TE)
            return h_TP, self.lister.listed_scores(factors, h_TP, listed_TE)
        h_TP = self.router.inputs(factors, x)
        return h_TP, self.router.scores(factors, x, h_TP, allowed_TE)

    def _weights(self, scores_TE: Float[Tensor, "*T E"], x: Tensor, call: LayerCall) -> Float[Tensor, "*T E"]:
        """The selection's weights, among the experts that a row may choose from."""
        if call.among_BTE is None:
            return self.select(scores_TE)
        return select_among(self.select, scores_TE, spread(call.among_BTE, self, x))

    def _informed(
        self, x: Float[Tensor, "*T I"], call: LayerCall
    ) -> tuple[Float[Tensor, "*T P"], Float[Tensor, "*T E"]]:
        assert call.factors is not None
        allowed_TE = None if call.among_BTE is None else spread(call.among_BTE, self, x)
        h_TP, scores_TE = self._score(x, call.factors, allowed_TE)
        if call.prior_BTE is not None:
            assert self.use is not None
            scores_TE = self.use.informed(scores_TE, spread(call.prior_BTE, self, x))
        if allowed_TE is not None:
            scores_TE = scores_TE.masked_fill(~allowed_TE, -torch.inf)
        return h_TP, scores_TE

    def forward(self, input: LayerInput, *args: Any, **kwargs: Any) -> Float[Tensor, "*T O"]:
        """The base layer's output plus the chosen experts' update."""
        call = self.in_force()
        if not (args or kwargs or is_captured()):
            whole = self._whole(input, call)
            if whole is not None:
                return whole
        return self._update(self.base(input, *args, **kwargs), input, call)

    def update(self, out: Float[Tensor, "*T O"], x: LayerInput) -> Float[Tensor, "*T O"]:
        """The base layer's output for these tokens plus the chosen experts' update; maybe in the memory of ``out``."""
        return self._update(out, x, self.in_force())

    def _update(self, out: Tensor, x: LayerInput, call: LayerCall) -> Tensor:
        if call.observe is not None:
            call.observe(self, x)
        if call.factors is None:
            return out
        if isinstance(x, Pairs):
            return torch.cat([self._update(out[rows], x_NI, part) for x_NI, rows, part in x.calls(call, self)])
        fused = self._by_kernels(out, x, call, call.factors)
        if fused is not None:
            return fused
        return self._add_chosen(out, x, call) if call.fixed is None else self._add_fixed(out, x, call)

    def _by_kernels(self, out: Tensor, x: Tensor, call: LayerCall, factors: Factors) -> Tensor | None:
        """Compute everything in one compiled call if possible, in the memory of ``out`` if nothing else uses it."""
        fixed, plan = call.fixed, factors.plan
        if plan is None:
            if not is_compiling():
                report_once(NOT_PREPARED)
            return None
        if plan.backend is None or call.among_BTE is not None or (plan.select is None) is (fixed is None):
            return None
        rows = call.prior_BTE if fixed is None else fixed.weights_BTP
        if rows is not None and not _fits(rows, self, x):
            return None
        return update_by_kernels(plan, out, x, factors.A_PI, rows, in_place=self._owns(out))

    def _add_chosen(self, out: Tensor, x: Tensor, call: LayerCall) -> Tensor:
        factors = call.factors
        assert factors is not None
        h_TP, scores_TE = self._informed(x, call)
        B_OP = factors.B_OP
        if factors.rows_ER is not None and call.among_BTE is None:
            index_TK, weights_TK = self.select.choose(scores_TE)  # pyright: ignore[reportAttributeAccessIssue]
            return _add(out, gathered_sum(h_TP, index_TK, weights_TK, B_OP, factors.rows_ER))
        weights_TE = self._weights(scores_TE, x, call)
        if factors.exceeds_products:
            out = out + factors.beyond_products(out, self.bias, weights_TE)
        if not self.sums:
            return _add(out, self._combined(h_TP, weights_TE, factors, x))
        if self.lister is not None:
            return _add(out, grouped_outputs(h_TP, weights_TE, B_OP, factors.ranks))
        return self._add_masked(out, weighted(h_TP, weights_TE, factors.common_rank, factors.member_EP), B_OP)

    def _whole(self, x: Any, call: LayerCall) -> Tensor | None:
        """As :meth:`_by_kernels`, the base layer too, if nothing observes it. Few lines: they run for every token."""
        factors, fixed = call.factors, call.fixed
        if factors is None or call.observe is not None or call.among_BTE is not None or call.some_base:
            return None  # rows of the base model get what its own layer computes, to the last digit
        plan = factors.plan
        if plan is None or plan.linear is None or (plan.select is None) is (fixed is None):
            return None
        rows = call.prior_BTE if fixed is None else fixed.weights_BTP
        return plan.linear(x, rows) if rows is None or _fits(rows, self, x) else None

    def _add_fixed(self, out: Tensor, x: Tensor, call: LayerCall) -> Tensor:
        factors, fixed = call.factors, call.fixed
        assert factors is not None
        assert fixed is not None
        h_TP = self.router.inputs(factors, x.to(factors.A_PI.device, factors.A_PI.dtype))
        if factors.exceeds_products:
            out = out + factors.beyond_products(out, self.bias, spread(fixed.weights_BTE, self, x))
        if self.sums:
            return self._add_masked(out, h_TP * spread(fixed.weights_BTP, self, x), factors.B_OP)
        weights_TE = spread(fixed.weights_BTE, self, x).expand(*h_TP.shape[:-1], -1)
        return _add(out, self._combined(h_TP, weights_TE, factors, x))

    def _combined(self, h_TP: Tensor, weights_TE: Tensor, factors: Factors, x: Tensor) -> Float[Tensor, "*T O"]:
        """What the combination makes of output factors, of what it prepared of these, or of the adapters' own."""
        if factors.raw_A_PI is not None:
            h_TP = linear(x.to(h_TP.device, h_TP.dtype), factors.raw_A_PI)
            return self.combine(h_TP, weights_TE, factors.raw_B_OP, factors.owner_P)
        if factors.C_QP is None:
            return self.combine(h_TP, weights_TE, factors.B_OP, factors.owner_P)
        return self.combine(h_TP, weights_TE, factors.C_QP, factors.owner_P, factors.U_OQ)

    def _add_masked(self, out: Tensor, weighted_TP: Tensor, B_OP: Tensor) -> Float[Tensor, "*T O"]:
        if out.dtype != B_OP.dtype or out.device != B_OP.device:
            return _add(out, linear(weighted_TP, B_OP))
        return add_masked(out, weighted_TP, B_OP, in_place=self._owns(out))

    def _owns(self, out: Tensor) -> bool:
        """Whether nothing else can see the base layer's output: no autograd, no hook."""
        plain = type(self.base) is nn.Linear and not self.base._forward_hooks
        return plain and out.is_contiguous() and not torch.is_grad_enabled()

    def bytes_read(self, tokens: int) -> int:
        """The minimum of bytes of the experts' factors that are read for this number of tokens, which choose."""
        factors = self.call.factors
        if factors is None:
            return 0
        plan = factors.plan
        by_kernels = plan is not None and plan.backend is not None and plan.select is not None
        chosen = factors.rows_ER is not None or by_kernels
        return factors.bytes_read(min(1.0, tokens * (self.select.k or 1) / len(factors.experts)) if chosen else 1.0)

    def stack(self) -> Stack:
        """Its experts; there must be at least one."""
        return self._own().stack()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, if any."""
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return _sizes(self.base).inputs

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return _sizes(self.base).outputs

    def extra_repr(self) -> str:
        """The part of ``print(model)`` about routing."""
        ranks = self.call.factors.ranks if self.call.factors else ()
        return f"experts={len(self.experts)}, ranks={sorted(set(ranks))}, router={self.router}"


def _fits(rows: Tensor, layer: RoutedLinear, x: Tensor) -> bool:
    """Whether there is one row for all tokens, or one for each of the batch, the first axis; not one for each token."""
    if rows.shape[1] > 1 or len(rows) == 1:
        return rows.shape[1] == 1
    rows_first = thread.places is None or thread.places.layouts.get(layer) in ROWS_FIRST
    return rows_first and x.ndim > 2 and len(rows) == len(x)


def _sizes(base: nn.Module) -> Features:
    found = features(base)
    assert found is not None, "only linear layers are routed"
    return found


def _add(out_TO: Tensor, delta_TO: Tensor) -> Float[Tensor, "*T O"]:
    if delta_TO.dtype != out_TO.dtype or delta_TO.device != out_TO.device:
        delta_TO = delta_TO.to(out_TO.device, out_TO.dtype)
    return out_TO + delta_TO
