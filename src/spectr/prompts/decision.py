"""Decisions for whole prompts: a prompt is read before it is answered, and what was found holds for its sequence."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BASE, BatchRouting, routed_by
from spectr.layers.factors import Factors
from spectr.layers.routed import RoutedLinear
from spectr.routers.evidence import Reader
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


_last = _Last()


class PromptDecision:
    """Has a prompt read and decides. What is decided belongs to a sequence (:mod:`spectr.prompts.calls`).

    Args:
        use: Turns evidence into weights, into a prior, or into a shortlist.
        experts: All experts, in alphabetical order.
        read: Called as the entry is; the evidence for each expert, (batch, experts). While it runs the model is the
            base model for this thread.
        sets: Factors of the experts that a verdict calls for.
    """

    calls: Calls

    def __init__(self, use: Use, experts: Sequence[str], read: Reader, sets: Sets):
        self.use, self.experts, self.read, self.sets = use, tuple(experts), read, sets
        self.held_BE: Tensor | None = None

    def decide(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """Have a prompt read and return what is decided for it. Nothing is changed.

        The experts' weights; or, of a router that decides for each token with the prompt as prior, the prior.

        Args:
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        return self.use.verdict(self.evidence(*args, **kwargs))

    @torch.no_grad()
    def evidence(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """The evidence for each expert, as the reader gives it."""
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

    def show(self, verdict_BE: Float[Tensor, "B E"]) -> None:
        """Remember a verdict as this thread's last one."""
        _last.verdicts[self.calls.key] = verdict_BE

    def routing(self, verdict_NE: Float[Tensor, "N E"], *, by_token: bool = False) -> BatchRouting:
        """What a verdict makes of a call.

        Args:
            verdict_NE: Of each row; one row serves all.
            by_token: Whether these are the tokens of one row instead.
        """
        verdict_BTE = verdict_NE[None] if by_token else verdict_NE[:, None]
        taken = (verdict_NE != 0).any(0).tolist()
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
    gathered = use.fixes or (use.gathers and sets.serve_choices)
    factors = sets.table(taken) if gathered else None
    return BatchRouting(experts, *use.rows(verdict_BTE, among_BTE), factors=factors)


def plain_verdict(verdict_BE: Tensor) -> Float[Tensor, "B E"]:
    """A verdict as sequences keep it: float32 and on the CPU, whatever gave it."""
    return verdict_BE.detach().to("cpu", torch.float32)


def decides_by_prompt(model: nn.Module) -> bool:
    """Whether a model is composed with a policy that reads a prompt before it answers."""
    return any(module.decided for module in model.modules() if isinstance(module, RoutedLinear))


def entry_of(model: nn.Module) -> nn.Module:
    """The module that reads prompts."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    return model
