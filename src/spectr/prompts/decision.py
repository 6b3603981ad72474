"""Decisions for whole prompts: a prompt is read before it is answered, and the result holds for its sequence."""

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
from spectr.layers.eval_mode import eval_mode
from spectr.layers.expert_factors import Factors
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.routers.abstention import in_words
from spectr.routers.evidence import Found, Reader
from spectr.routers.policy import PromptPolicy
from spectr.routers.use import Use

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls


class Sets(Protocol):
    """Provides factors of sets of experts; see :class:`spectr.composition.factor_sets.FactorSets`.

    Attributes:
        single: Number of cached sets of one expert.
        gathered: Number of cached sets of several experts.
        serve_choices: Whether tokens can choose among a set's factors; otherwise only fixed weights can be applied.
    """

    single: int
    gathered: int
    serve_choices: bool

    def table(self, names: tuple[str, ...]) -> Mapping[RoutedLinear, Factors | None]:
        """Every layer's factors of these experts."""
        ...


class _Last(threading.local):
    """A thread's last verdict by composition. For display only: nothing reads it to decide."""

    def __init__(self) -> None:
        self.verdicts: dict[str, Tensor] = {}
        self.decided: dict[str, tuple[Tensor, Tensor | None]] = {}  # with the p of the same prompts


_last = _Last()


class PromptDecision:
    """Reads prompts and decides. A decision belongs to a sequence (:mod:`spectr.prompts.calls`).

    Args:
        policy: Turns evidence into weights, a prior or a shortlist.
        experts: All experts, in alphabetical order.
        read: Computes the evidence for each expert; has the model's arguments. While it runs, the model is the base
            model for this thread.
        sets: Factors of the experts that a verdict uses.
    """

    calls: Calls

    def __init__(self, policy: PromptPolicy, experts: Sequence[str], read: Reader, sets: Sets):
        self.policy, self.use = policy, policy.use
        self.experts, self.read, self.sets = tuple(experts), read, sets
        self.held_BE: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which include the reader. A reader that is a function would still read this model.

        Raises:
            CompositionError: The reader is a function.
        """
        if isfunction(self.read):
            raise CompositionError(
                f"a model composed with {self.policy} can neither be copied nor pickled",
                do="compose the library again, or save the composed model: spectr.save_composed(routed, folder)",
            )
        return vars(self)

    def decide(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """Read a prompt and return the verdict. Changes nothing.

        The verdict is the experts' weights, or the prior if the router decides for each token. If no expert stands out
        and the policy abstains, all experts have the number that excludes them.

        Args:
            args: The arguments of the model (or its encoder).
            kwargs: Its keyword arguments.
        """
        found = self.find(*args, **kwargs)
        verdict_BE = self.policy.verdict(found)
        _last.decided[self.calls.key] = plain_verdict(verdict_BE), found.p_B
        return verdict_BE

    def evidence(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """The reader's evidence for each expert, even if the verdict is to abstain."""
        return self.find(*args, **kwargs).evidence_BE

    @torch.no_grad()
    def find(self, *args: Any, **kwargs: Any) -> Found:
        """Everything that the reader finds for a prompt.

        Raises:
            CompositionError: The call is being exported or traced.
        """
        refuse_to_capture()
        with routed_by(BASE), eval_mode(self.calls.model):
            return self.read(*args, **kwargs)

    def hold(self, verdict_BE: Float[Tensor, "B E"] | None) -> None:
        """Use this verdict for all calls of all threads, whatever their prompts; ``None`` ends it.

        One row serves batches of any size. Caches that were filled under another verdict are read again.
        """
        if verdict_BE is not None:
            self._check(verdict_BE)
        self.held_BE = None if verdict_BE is None else plain_verdict(verdict_BE)

    @contextmanager
    def using(self, verdict_BE: Float[Tensor, "B E"]) -> Iterator[None]:
        """Use this verdict for this thread's calls inside the block, instead of what they would decide.

        Use it for a decision on more text than one call contains. In an asyncio task it holds for that task only, and
        for what it runs with ``asyncio.to_thread``. ``generate_batch`` and its manager store the verdict with the
        requests that are added in the block: one row per request, in order.
        """
        self._check(verdict_BE)
        with self.calls.using(verdict_BE):
            yield

    @property
    def weights_BE(self) -> Float[Tensor, "B E"] | None:
        """For display: the last verdict for a call of this thread."""
        return _last.verdicts.get(self.calls.key)

    @property
    def p_B(self) -> Float[Tensor, " B"] | None:
        """For display: for this thread's last prompts, the share of ordinary prompts that fit as well.

        ``None`` if it is unknown, or if another verdict was used since.
        """
        decided = _last.decided.get(self.calls.key)
        return None if decided is None else decided[1]

    @property
    def remark(self) -> str | None:
        """A text that the base model answered, if this thread's last verdict uses no expert."""
        verdict_BE, decided = self.weights_BE, _last.decided.get(self.calls.key)
        if verdict_BE is None or not bool((verdict_BE == self.use.excluded).all()):
            return None
        its_own = decided is not None and _same_rows(decided[0], verdict_BE)
        p_B = decided[1] if decided is not None and its_own else None
        return in_words(None if p_B is None else float(p_B.min()))

    def show(self, verdict_BE: Float[Tensor, "B E"]) -> None:
        """Store a verdict as this thread's last one."""
        key = self.calls.key
        if _last.verdicts.get(key) is verdict_BE:
            return
        _last.verdicts[key] = verdict_BE
        decided = _last.decided.get(key)
        if decided is not None and not _same_rows(decided[0], verdict_BE):
            del _last.decided[key]

    def routing(self, verdict_NE: Float[Tensor, "N E"], *, token_rows: int = 0) -> BatchRouting:
        """The routing for a verdict.

        Args:
            verdict_NE: The verdict of each row; one row serves all.
            token_rows: If these are tokens instead, row by row, the number of their rows.
        """
        verdict_BTE = verdict_NE.view(token_rows, -1, verdict_NE.shape[-1]) if token_rows else verdict_NE[:, None]
        return routing_of(self.use, self.experts, verdict_BTE, self.sets, verdict_NE)

    def _check(self, verdict_BE: Tensor) -> None:
        if self.calls.closed:
            raise CompositionError(
                "the experts changed after you got this object, so that it no longer decides",
                do="use routed.prompt again",
            )
        if verdict_BE.ndim != 2 or verdict_BE.shape[1] != len(self.experts):
            raise CompositionError(
                f"a verdict of shape {tuple(verdict_BE.shape)}",
                expected=f"(rows, {len(self.experts)}), a number for each of {', '.join(self.experts)}",
                do="use the result of prompt.decide(...)",
            )


def routing_of(
    use: Use,
    experts: tuple[str, ...],
    verdict_BTE: Float[Tensor, "B T E"],
    sets: Sets,
    kept_NE: Float[Tensor, "N E"],
    among_BTE: Tensor | None = None,
) -> BatchRouting:
    """The routing for a verdict.

    Args:
        use: The use in the policy that made it.
        experts: Names of its columns.
        verdict_BTE: The verdict of each row or token.
        sets: Provides factors.
        kept_NE: All verdicts whose experts are to be provided.
        among_BTE: The experts that a row may use; by default all.
    """
    used_E = (kept_NE != use.excluded).any(0).tolist()
    taken = tuple(name for name, used in zip(experts, used_E, strict=True) if used)
    if not taken:  # the base model alone; traces still see the layers
        return BatchRouting(experts, factors={})
    gathered = use.fixes or (use.gathers and sets.serve_choices)
    factors = sets.table(taken) if gathered else None
    return BatchRouting(experts, *use.rows(verdict_BTE, among_BTE), factors=factors)


@torch.compiler.assume_constant_result  # a strict export runs it, rather than tracing how an error is made
def refuse_to_capture() -> None:
    """Raise :class:`CompositionError` if a graph is being made of a call: it would fix one prompt's decision."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # pyright: ignore[reportPrivateImportUsage]
        raise CompositionError(
            "a call that decides for its prompt cannot be exported or traced: the graph would always use this decision",
            expected="a router that decides for each token, or a single expert",
            do="compose with spectr.Oracle(expert=...), then export",
        )


def _same_rows(one_BE: Tensor, other_BE: Tensor) -> bool:
    """Whether two verdicts have the same rows, in any order and number: a generation repeats rows."""
    one_BE, other_BE = (torch.unique(verdict_BE.cpu(), dim=0) for verdict_BE in (one_BE, other_BE))
    return torch.equal(one_BE, other_BE)


def plain_verdict(verdict_BE: Tensor) -> Float[Tensor, "B E"]:
    """A verdict as sequences store it: float32 on the CPU, whatever it was."""
    return verdict_BE.detach().to("cpu", torch.float32)


def decides_by_prompt(model: nn.Module) -> bool:
    """Whether a model is composed with a policy that reads a prompt before it answers."""
    return any(module.decided for module in model.modules() if isinstance(module, (RoutedLinear, SavedModule)))


def entry_of(model: nn.Module) -> nn.Module:
    """The module that reads prompts."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    return model
