"""Continuous batching of transformers: each request has its own decision, and each token its request's decision."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BASE, BatchRouting
from spectr.layers.linear_layers import input_device
from spectr.prompts.token_places import learn_rows

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls

_KEPT = 1 << 16  # number of requests whose verdict is stored
_managers: WeakSet[Any] = WeakSet()  # managers of all composed models; they survive a change of the experts


class Batch(NamedTuple):
    """One step of a batch: the routing and number of its tokens, and the tokens that the output head receives."""

    routing: BatchRouting | None
    tokens: int
    kept: Tensor | None


class Batches:
    """Replaces a model's ``init_continuous_batching``, and identifies the requests of each step.

    Requests share no part of the cache, since another request may have other experts. Graphs are not used and steps do
    not overlap, since each step has its own decisions.

    Args:
        calls: Decides.
    """

    def __init__(self, calls: Calls):
        self.calls, self.model = calls, calls.model
        self._verdicts: WeakKeyDictionary[Any, OrderedDict[str, Tensor]] = WeakKeyDictionary()

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
            if not self.calls.closed:  # while the model reads rows: a manager has it read blocks of a cache
                device = input_device(self.model)
                learn_rows(self.calls.layouts, self.calls.entry, torch.zeros(1, 1, dtype=torch.long, device=device))
        manager = self.plain(**{**given, "continuous_batching_config": config})
        if self.calls.closed:
            return manager
        if manager.continuous_batching_config.allow_block_sharing:
            raise CompositionError(
                "the model has a manager from before it was composed, whose requests share a cache",
                do="call model.destroy_cached_continuous_batching_manager() first",
            )
        _managers.add(manager)
        manager.add_request = _Adding(manager)
        return manager

    def begin(self, manager: Any, request: str, verdict_1E: Tensor | None) -> None:
        """Store a request's decision before it is added; removes an older request of the same name."""
        self._verdicts.setdefault(manager, OrderedDict()).pop(request, None)
        if verdict_1E is not None:
            self._remember(manager, request, verdict_1E)

    def check_idle(self) -> None:
        """Refuse to change the experts while requests that used them are being answered.

        Raises:
            CompositionError: A request is being answered.
        """
        for manager in list(_managers):
            processor = manager.batch_processor
            if manager.model is self.model and processor is not None and processor.has_pending_requests():
                raise CompositionError(
                    "the experts cannot change while requests of a batch are being answered",
                    do="wait for these requests, or stop their manager",
                )

    def of(self, given: Mapping[str, Any]) -> Batch | None:
        """The step that a call belongs to, if it is part of a batch."""
        cache = given.get("cache")
        if cache is None:
            return None
        known = ((m, m.batch_processor) for m in list(_managers))
        manager, processor = next((pair for pair in known if getattr(pair[1], "cache", None) is cache), (None, None))
        if processor is None:
            return None
        tokens = given["input_ids"].shape[-1]
        if self.calls.prompt is None:
            return Batch(None, tokens, None)
        futures = processor.inputs_and_outputs.requests_in_batch
        counts = [future.query_length for future in futures]
        if not futures or sum(counts) > tokens:
            return Batch(BASE, tokens, None)  # a warm-up without tokens of a request
        rows = torch.cat([self._verdict(manager, future.state) for future in futures])
        counts[-1] += tokens - sum(counts)  # padding
        verdict_TE = rows.repeat_interleave(torch.tensor(counts), 0)
        kept = given.get("logits_to_keep", given.get("logits_indices"))
        return Batch(self.calls.routing(verdict_TE, token_rows=1), tokens, kept if isinstance(kept, Tensor) else None)

    def _verdict(self, manager: Any, state: Any) -> Tensor:
        name = str(state.request_id).partition("__child#")[0]
        found = self._verdicts.get(manager, {}).get(name)
        if found is None:
            fixed = self.calls.prompt.held_BE if self.calls.prompt is not None else None
            ids = torch.tensor([state.initial_tokens], device=input_device(self.model))
            found = fixed[:1] if fixed is not None else self.calls.decide({"input_ids": ids})
            self._remember(manager, name, found)
        return found

    def _remember(self, manager: Any, request: str, verdict_1E: Tensor) -> None:
        verdicts = self._verdicts.setdefault(manager, OrderedDict())
        verdicts[request] = verdict_1E
        while len(verdicts) > _KEPT:
            verdicts.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        """Managers are not copied."""
        return {"calls": self.calls, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _verdicts=WeakKeyDictionary())


class _Adding:
    """Replaces a manager's ``add_request``."""

    def __init__(self, manager: Any):
        self.manager, self.plain = manager, type(manager).add_request.__get__(manager)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batches = vars(self.manager.model).get("init_continuous_batching")
        if not isinstance(batches, Batches):  # the experts were removed
            return self.plain(*args, **kwargs)
        given = {**dict(zip(signature(self.plain).parameters, args, strict=False)), **kwargs}
        if given.get("request_id") is None:
            with self.manager._request_lock:  # the name is needed before the request is added
                given["request_id"] = f"req_{self.manager._request_counter}"
                self.manager._request_counter += 1
        batches.begin(self.manager, given["request_id"], batches.calls.request_verdict())
        return self.plain(**given)
