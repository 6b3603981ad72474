"""``generate`` of a composed model: one decision for all of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectr.errors import CompositionError
from spectr.layers.batch_routing import thread
from spectr.prompts import cache_records as records
from spectr.prompts.arguments import (
    CallTokens,
    GenerationSettings,
    begins_with,
    by_tokens_alone,
    expanded,
    has_encoder,
    prompt_of,
    same_verdict,
)
from spectr.prompts.cache_records import CacheRecord
from spectr.prompts.encodings import encoded_verdict
from spectr.prompts.frames import Frame, frame_of, framed, innermost

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls


class Generation:
    """Replaces a model's ``generate``.

    Args:
        calls: Decides.
        model: The composed model.
    """

    def __init__(self, calls: Calls, model: Any):
        self.calls, self.model = calls, model
        self.own: Callable[..., Any] | None = model.__dict__.get("generate")

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own ``generate``."""
        return self.own or type(self.model).generate.__get__(self.model)

    @property
    def __signature__(self) -> Any:
        return signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Like the model's own. Decides once for all of its calls, and makes a given cache match the decision."""
        calls = self.calls
        if calls.closed:
            return self.plain(*args, **kwargs)
        outer = frame_of(calls)
        if thread.routing is not None or calls.is_inside or (outer is not None and outer.generates):
            return self.plain(*args, **kwargs)
        with calls.exclusion.running():
            if calls.closed:
                return self.model.generate(*args, **kwargs)
            names = tuple(signature(self.plain).parameters)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            settings = GenerationSettings.of(self.model, given)
            prompt = prompt_of(self.model, given, settings)
            name, state = next(records.states_in(given), ("", None))
            if not records.is_filled(state):
                state = None
            frame = Frame(calls, None, generates=True, expand=settings.expand)
            known = None if state is None else calls.known(state)
            whole, only_new = self._whole(prompt, given, state)
            frame.ids_BT, frame.mask_BT = whole.get("input_ids"), _mask_of(whole)
            frame.verdict_BE = self._verdict_for(whole, outer, settings, known, given)
            with framed(frame):
                if state is not None:
                    # with an assistant, transformers reads the whole text again after a cache's tokens
                    again = settings.assisted or records.is_recurrent(state)
                    if again or not (only_new or by_tokens_alone(given)):  # other images may have the same tokens
                        known = None
                    kwargs = {**kwargs, name: self._fitting(name, state, known, whole, prompt, frame, only_new)}
                    kwargs = {key: value for key, value in kwargs.items() if value is not None or key != name}
                return self.plain(*args, **kwargs)

    def _whole(self, prompt: dict[str, Any], given: Mapping[str, Any], state: Any) -> tuple[dict[str, Any], bool]:
        """A generation's whole input, and whether it received only the new tokens, judged by its mask."""
        ids, mask = prompt.get("input_ids"), given.get("attention_mask")
        if state is None or not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or has_encoder(self.model):
            return prompt, False
        if mask.ndim != 2 or mask.shape[1] <= ids.shape[1]:
            return prompt, False
        record = records.record_of(state)
        before = None if record is None or not records.agrees(state, record) else record.ids_BT
        if before is None or before.shape[1] + ids.shape[1] != mask.shape[1]:
            raise CompositionError(
                "generate received only new tokens, and the tokens in the cache are unknown",
                do="pass the whole text as input_ids, with or without the cache",
            )
        whole = torch.cat([before.to(ids.device).clamp(min=0), ids], dim=1)
        return {**prompt, "input_ids": whole, "attention_mask": mask}, True

    def _verdict_for(
        self,
        whole: dict[str, Any],
        outer: Frame | None,
        settings: GenerationSettings,
        known: CacheRecord | None,
        given: Any,
    ) -> Tensor | None:
        calls = self.calls
        if calls.prompt is None:
            return None
        verdict_BE = calls.wanted(outer)
        around = innermost()
        if around is not None and not (settings.assists and around.generates and around.calls is not calls):
            around = None  # a generation of its own, whatever runs around it
        if verdict_BE is None and around is not None and calls.key in around.assistants:
            verdict_BE = around.assistants[calls.key]
        if verdict_BE is None and settings.assists and known is not None:
            verdict_BE = known.verdict_BE
        outputs = given.get("encoder_outputs")
        if has_encoder(self.model) and outputs is not None:
            rows = len(outputs if isinstance(outputs, Tensor) else outputs[0])
            wanted_BE = None if verdict_BE is None else expanded(verdict_BE, rows, None)
            verdict_BE = encoded_verdict(calls, "model", given, rows, wanted_BE)
        if verdict_BE is None:
            verdict_BE = calls.decide(whole)
        if around is not None:
            around.assistants.setdefault(calls.key, verdict_BE)
        calls.prompt.show(verdict_BE)
        return verdict_BE

    def _fitting(
        self,
        name: str,
        state: Any,
        known: CacheRecord | None,
        whole: dict[str, Any],
        prompt: Any,
        frame: Frame,
        only_new: bool,
    ) -> Any:
        """A given cache that does not change the answer: unchanged, read again, or emptied."""
        if known is not None and begins_with(whole, known, only_new):
            wanted = frame.verdict_BE
            fits = wanted is None or (
                known.verdict_BE is not None
                and same_verdict(known.verdict_BE, expanded(wanted, len(known.verdict_BE), None))
            )
            if fits:
                known.frame = frame.token
                return state
        if only_new:
            ids = prompt["input_ids"]
            tokens = CallTokens(ids, None, None, len(ids), ids.shape[1])
            self.calls.read_again(self.calls.entry, {name: state}, state, tokens, frame, frame.verdict_BE)
            return state
        if not records.can_reset(state):
            return None  # then generate starts without one
        state.reset()
        records.attach(state, self.calls.fresh(frame.verdict_BE, frame))
        return state


def _mask_of(whole: Mapping[str, Any]) -> Tensor | None:
    """The mask of a generation's input, (rows, tokens); ``None`` if it is unknown which tokens are real."""
    ids, mask = whole.get("input_ids"), whole.get("attention_mask")
    if mask is None and isinstance(ids, Tensor):
        return torch.ones_like(ids)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
