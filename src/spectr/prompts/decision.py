"""Decisions for whole prompts: a prompt is read before it is answered, and what was found holds for its sequence."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import isfunction
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BASE, BatchRouting, routed_by
from spectr.layers.factors import Factors
from spectr.layers.routed import RoutedLinear
from spectr.layers.saved import SavedModule
from spectr.routers.abstention import in_words
from spectr.routers.evidence import Found, Reader
from spectr.routers.policy import PromptPolicy
from spectr.routers.use import Use

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls


class Sets(Protocol):
    """Where factors of sets of experts come from; see :class:`spectr.composition.factor_sets.FactorSets`.

    Attributes:
        single: Sets of one expert that are kept.
        gathered: Sets of several experts that are kept.
        serve_choices: Whether tokens can choose among a set's factors; otherwise only fixed weights can be applied.
    """

    single: int
    gathered: int
    serve_choices: bool

    def table(self, names: tuple[str, ...]) -> Mapping[RoutedLinear, Factors | None]:
        """Every layer's factors of these experts."""
        ...


class _Last(threading.local):
    """A thread's last verdict by composition. For display: nothing reads it to decide."""

    def __init__(self) -> None:
        self.verdicts: dict[str, Tensor] = {}
        self.decided: dict[str, tuple[Tensor, Tensor | None]] = {}  # with the p of the same prompts


_last = _Last()


class PromptDecision:
    """Has a prompt read and decides. What is decided belongs to a sequence (:mod:`spectr.prompts.calls`).

    Args:
        policy: Turns evidence into weights, into a prior, or into a shortlist.
        experts: All experts, in alphabetical order.
        read: Called as the entry is; finds the evidence for each expert. While it runs the model is the base model for
            this thread.
        sets: Factors of the experts that a verdict calls for.
    """

    calls: Calls

    def __init__(self, policy: PromptPolicy, experts: Sequence[str], read: Reader, sets: Sets):
        self.policy, self.use = policy, policy.use
        self.experts, self.read, self.sets = tuple(experts), read, sets
        self.held_BE: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, of which a reader has to be a part: a function would go on reading by this model.

        Raises:
            CompositionError: The reader is a function.
        """
        if isfunction(self.read):
            raise CompositionError(
                f"a model composed with {self.policy} can neither be copied nor pickled",
                do="compose again from the library, or keep the composed model: spectr.save_composed(routed, folder)",
            )
        return vars(self)

    def decide(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """Have a prompt read and return what is decided for it. Nothing is changed.

        The experts' weights; or, of a router that decides for each token with the prompt as prior, the prior. Where no
        expert stands out, and the policy abstains then, all experts have the number that excludes them.

        Args:
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        found = self.find(*args, **kwargs)
        verdict_BE = self.policy.verdict(found)
        _last.decided[self.calls.key] = plain_verdict(verdict_BE), found.p_B
        return verdict_BE

    def evidence(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """The evidence for each expert, as the reader gives it, whether the verdict is to abstain or not."""
        return self.find(*args, **kwargs).evidence_BE

    @torch.no_grad()
    def find(self, *args: Any, **kwargs: Any) -> Found:
        """All that the reader finds of a prompt.

        Raises:
            CompositionError: The call is exported or traced.
        """
        refuse_to_capture()
        with routed_by(BASE):
            return self.read(*args, **kwargs)

    def hold(self, verdict_BE: Float[Tensor, "B E"] | None) -> None:
        """Have this verdict hold for all calls of all threads, whatever their prompts; ``None`` ends that.

        One row serves batches of any size. Caches that were filled under another verdict are read again.
        """
        if verdict_BE is not None:
            self._check(verdict_BE)
        self.held_BE = None if verdict_BE is None else plain_verdict(verdict_BE)

    @contextmanager
    def using(self, verdict_BE: Float[Tensor, "B E"]) -> Iterator[None]:
        """Have this verdict hold for this thread's calls while the block runs, in the place of what they would decide.

        For what was decided on more text than one call sees. In a task of asyncio it holds for that task alone, and for
        what it runs by ``asyncio.to_thread``. ``generate_batch`` and its manager take the verdict along with the
        requests that are added in the block, a row for each in turn.
        """
        self._check(verdict_BE)
        with self.calls.using(verdict_BE):
            yield

    @property
    def weights_BE(self) -> Float[Tensor, "B E"] | None:
        """The last verdict that held for a call of this thread, for display."""
        return _last.verdicts.get(self.calls.key)

    @property
    def p_B(self) -> Float[Tensor, " B"] | None:
        """For display: of the prompts that this thread decided on last, the shares of ordinary ones that fit as well.

        ``None`` where it is not known, or another verdict than the decided one has held since.
        """
        decided = _last.decided.get(self.calls.key)
        return None if decided is None else decided[1]

    @property
    def remark(self) -> str | None:
        """That the base model answered, in words, where this thread's last verdict has no expert take part."""
        verdict_BE, decided = self.weights_BE, _last.decided.get(self.calls.key)
        if verdict_BE is None or not bool((verdict_BE == self.use.excluded).all()):
            return None
        its_own = decided is not None and _same_rows(decided[0], verdict_BE)
        p_B = decided[1] if decided is not None and its_own else None
        return in_words(None if p_B is None else float(p_B.min()))

    def show(self, verdict_BE: Float[Tensor, "B E"]) -> None:
        """Remember a verdict as this thread's last one."""
        key = self.calls.key
        if _last.verdicts.get(key) is verdict_BE:
            return
        _last.verdicts[key] = verdict_BE
        decided = _last.decided.get(key)
        if decided is not None and not _same_rows(decided[0], verdict_BE):
            del _last.decided[key]

    def routing(self, verdict_NE: Float[Tensor, "N E"], *, by_token: bool = False) -> BatchRouting:
        """What a verdict makes of a call.

        Args:
            verdict_NE: Of each row; one row serves all.
            by_token: Whether these are the tokens of one row instead.
        """
        verdict_BTE = verdict_NE[None] if by_token else verdict_NE[:, None]
        taken = (verdict_NE != self.use.excluded).any(0).tolist()
        names = tuple(name for name, takes_part in zip(self.experts, taken, strict=True) if takes_part)
        return routing_of(self.use, self.experts, verdict_BTE, self.sets, names)

    def _check(self, verdict_BE: Tensor) -> None:
        if self.calls.closed:
            raise CompositionError(
                "the experts were changed since this handle on decisions was taken, and it decides nothing any more",
                do="take routed.prompt again",
            )
        if verdict_BE.ndim != 2 or verdict_BE.shape[1] != len(self.experts):
            raise CompositionError(
                f"a verdict of shape {tuple(verdict_BE.shape)}",
                expected=f"(rows, {len(self.experts)}), a number for each of {', '.join(self.experts)}",
                do="take it from prompt.decide(...)",
            )


def routing_of(
    use: Use,
    experts: tuple[str, ...],
    verdict_BTE: Float[Tensor, "B T E"],
    sets: Sets,
    taken: tuple[str, ...],
    among_BTE: Tensor | None = None,
) -> BatchRouting:
    """What a verdict makes of a call.

    Args:
        use: Of the policy that gave it.
        experts: Names of its columns.
        verdict_BTE: Of each row or token.
        sets: Where factors come from.
        taken: The experts that take part, where others do not.
        among_BTE: Those that a row may use; all, if left out.
    """
    if not taken:  # the base model alone; traces see the layers nonetheless
        return BatchRouting(experts, factors={})
    gathered = use.fixes or (use.gathers and sets.serve_choices)
    factors = sets.table(taken) if gathered else None
    return BatchRouting(experts, *use.rows(verdict_BTE, among_BTE), factors=factors)


def refuse_to_capture() -> None:
    """Raise :class:`CompositionError` where a graph is made of a call: it would hold one prompt's decision for all."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # pyright: ignore[reportPrivateImportUsage]
        raise CompositionError(
            "a call that decides for its prompt cannot be exported or traced: the graph would hold this one decision",
            expected="a router that decides for each token, or a single expert",
            do="compose with spectr.Oracle(expert=...), and export that",
        )


def _same_rows(one_BE: Tensor, other_BE: Tensor) -> bool:
    """Whether two verdicts have the same rows, in whatever order and however often: a generation repeats them."""
    one_BE, other_BE = (torch.unique(verdict_BE.cpu(), dim=0) for verdict_BE in (one_BE, other_BE))
    return torch.equal(one_BE, other_BE)


def plain_verdict(verdict_BE: Tensor) -> Float[Tensor, "B E"]:
    """A verdict as sequences keep it: float32 and on the CPU, whatever gave it."""
    return verdict_BE.detach().to("cpu", torch.float32)


def decides_by_prompt(model: nn.Module) -> bool:
    """Whether a model is composed with a policy that reads a prompt before it answers."""
    return any(module.decided for module in model.modules() if isinstance(module, (RoutedLinear, SavedModule)))


def entry_of(model: nn.Module) -> nn.Module:
    """The module that reads prompts."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    return model
