"""Continuous batching of transformers: each request has its own decision, and each token its request's."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from spectr.layers.batch_routing import BASE, BatchRouting

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls

_KEPT = 1 << 16  # requests whose verdict is remembered


class Batch(NamedTuple):
    """A step of a batch: what holds for its tokens, how many they are, and those that the output head is given."""

    routing: BatchRouting | None
    tokens: int
    kept: Tensor | None


class Batches:
    """Stands in for a model's ``init_continuous_batching``, and tells the requests of each step.

    Requests share no part of the cache: what one expert wrote is not read by another. Graphs are not used, and steps do
    not overlap, as each has other decisions.

    Args:
        calls: Decides.
    """

    def __init__(self, calls: Calls):
        self.calls, self.model = calls, calls.model
        self._managers: WeakSet[Any] = WeakSet()
        self._verdicts: OrderedDict[tuple[int, str], Tensor] = OrderedDict()

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own method."""
        return type(self.model).init_continuous_batching.__get__(self.model)

    @property
    def __signature__(self) -> Any:
        return signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        from transformers import ContinuousBatchingConfig

        given = {**dict(zip(signature(self.plain).parameters, args, strict=False)), **kwargs}
        config = copy.copy(given.get("continuous_batching_config") or ContinuousBatchingConfig())
        config.allow_block_sharing = False
        if self.calls.prompt is not None:
            config.use_cuda_graph = False
            config.use_async_batching = False
        manager = self.plain(**{**given, "continuous_batching_config": config})
        if manager not in self._managers:
            self._managers.add(manager)
            manager.add_request = _Adding(self, manager)
        return manager

    def take_along(self, manager: Any, request: str | None, verdict_1E: Tensor | None) -> None:
        """Remember what was decided for a request before it was added."""
        if request is not None and verdict_1E is not None:
            self._remember(manager, request, verdict_1E)

    def of(self, given: Mapping[str, Any]) -> Batch | None:
        """The step that a call is, where it is one of a batch."""
        cache = given.get("cache")
        manager = next((m for m in self._managers if cache is not None and _processor(m).cache is cache), None)
        if manager is None:
            return None
        tokens = given["input_ids"].shape[-1]
        if self.calls.prompt is None:
            return Batch(None, tokens, None)
        futures = _processor(manager).inputs_and_outputs.requests_in_batch
        counts = [future.query_length for future in futures]
        if not futures or sum(counts) > tokens:
            return Batch(BASE, tokens, None)  # a rehearsal, of nobody's tokens
        rows = torch.cat([self._verdict(manager, future.state) for future in futures])
        counts[-1] += tokens - sum(counts)  # padding
        verdict_TE = rows.repeat_interleave(torch.tensor(counts), 0)
        kept = given.get("logits_to_keep", given.get("logits_indices"))
        return Batch(self.calls.routing(verdict_TE, by_token=True), tokens, kept if isinstance(kept, Tensor) else None)

    def _verdict(self, manager: Any, state: Any) -> Tensor:
        name = str(state.request_id).partition("__child#")[0]
        found = self._verdicts.get((id(manager), name))
        if found is None:
            held = self.calls.prompt.held_BE if self.calls.prompt is not None else None
            ids = torch.tensor([state.initial_tokens], device=next(self.model.parameters()).device)
            found = held[:1] if held is not None else self.calls._decide({"input_ids": ids})
            self._remember(manager, name, found)
        return found

    def _remember(self, manager: Any, request: str, verdict_1E: Tensor) -> None:
        self._verdicts[id(manager), request] = verdict_1E
        while len(self._verdicts) > _KEPT:
            self._verdicts.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        """Managers are not copied."""
        return {"calls": self.calls, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _managers=WeakSet(), _verdicts=OrderedDict())


class _Adding:
    """Stands in for a manager's ``add_request``."""

    def __init__(self, batches: Batches, manager: Any):
        self.batches, self.manager, self.plain = batches, manager, manager.add_request

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        verdict_1E = self.batches.calls.request_verdict()
        if verdict_1E is not None and kwargs.get("request_id") is None and len(args) < 2:
            with self.manager._request_lock:  # its name is needed before it is added
                kwargs["request_id"] = f"req_{self.manager._request_counter}"
                self.manager._request_counter += 1
        name = kwargs.get("request_id") if len(args) < 2 else args[1]
        self.batches.take_along(self.manager, name, verdict_1E)
        return self.plain(*args, **kwargs)


def _processor(manager: Any) -> Any:
    return manager.batch_processor
