"""Which decision holds for which call of a composed model. A decision belongs to a sequence, never to the model.

1. ``generate`` decides once, on its whole input, for all of its calls. A ``generate`` inside another inherits the
   decision; a composed assistant keeps its first verdict.
2. A cache never changes the answer. If it was filled under another verdict, with other experts or by another model,
   it is reset and its tokens are read again. If its tokens are unknown, the call is refused.
3. Any other call decides for itself; later calls with the cache that it filled keep that decision.
4. ``prompt.hold`` (all threads) and ``prompt.using`` (one thread or asyncio task) override what calls would decide.
5. With an encoder, a decision belongs to the encoder's outputs.

The decision is set for the thread that runs the call (:mod:`spectr.layers.batch_routing`). Next to a cache it is kept
in a record (:mod:`spectr.prompts.cache_records`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BASE, BatchRouting, LayerCall, routed_by, thread
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.layers.token_layout import Layouts, TokenPlaces
from spectr.prompts import cache_records as records
from spectr.prompts.arguments import (
    CallTokens,
    as_prompt,
    as_read,
    expanded,
    has_encoder,
    kept_tokens,
    packed_lengths,
    same_verdict,
    tokens_of,
    unpacked,
)
from spectr.prompts.batches import Batches
from spectr.prompts.cache_records import CacheRecord
from spectr.prompts.decision import PromptDecision, plain_verdict
from spectr.prompts.encodings import encoded_verdict, note_encoded
from spectr.prompts.exclusion import Exclusion
from spectr.prompts.first_calls import FirstCalls
from spectr.prompts.frames import Frame, frame_of, framed
from spectr.prompts.generate_call import Generation
from spectr.prompts.stand_ins import Checkpointing, Entry, Images, entries_of
from spectr.prompts.token_places import followed, places_in_row, places_of

_ROUTINGS = 16  # number of verdicts whose routing is cached
_WHOLE_PROMPT = "pass the whole prompt again, without the cache"


class _Stack(threading.local):
    """For each thread, the compositions that it is currently calling."""

    inside: tuple[Calls, ...] = ()


_stack = _Stack()


class _Step(NamedTuple):
    """A call: the routing of its layers, and the record for a cache that it fills."""

    given: dict[str, Any]
    routing: BatchRouting | None
    places: TokenPlaces | None
    kept: slice | Tensor | None
    tokens: CallTokens | None = None
    record: CacheRecord | None = None


@lru_cache(maxsize=1)
def _keep_out_of_graphs() -> None:
    """Make decisions outside of compiled graphs. Not on import: torch's compiler takes seconds to load."""
    for name, all_inside in {"run": False, "_begin": True, "_end": True}.items():  # the model inside is compiled
        setattr(Calls, name, torch.compiler.disable(getattr(Calls, name), recursive=all_inside))


class Calls:
    """Gives the calls of a composed model their routing, from :func:`spectr.compose` to ``remove()``.

    Args:
        model: The composed model.
        experts: The experts that can be chosen.
        prompt: Decides on prompts, if the router does.
        key: Identifies experts and router in caches' records; by default a new one.
        exclusion: Keeps changes of the experts and running calls apart.
        unknown: Routed layers that the model may or may not call.
    """

    def __init__(
        self,
        model: Any,
        experts: Sequence[str],
        prompt: PromptDecision | None,
        *,
        key: str | None = None,
        exclusion: Exclusion | None = None,
        unknown: Collection[str] = (),
    ):
        self.model, self.experts, self.prompt = model, tuple(experts), prompt
        self.key, self.exclusion = key or uuid4().hex, exclusion or Exclusion()
        self._routings: OrderedDict[tuple[Any, ...], BatchRouting] = OrderedDict()
        self._layers = [module for module in model.modules() if isinstance(module, RoutedLinear)]
        self._layer_calls: list[LayerCall] = []
        self.layouts = Layouts(m for m in model.modules() if isinstance(m, (RoutedLinear, SavedModule)))
        if prompt is not None:
            prompt.calls = self
            _keep_out_of_graphs()
        self.batches, self._first_calls = Batches(self), FirstCalls(model, unknown)
        self._stand_ins: list[tuple[nn.Module, str, Any, Any]] = []
        self.closed = False
        self._install()

    def _install(self) -> None:
        for module, part in entries_of(self.model):
            entry = Entry(self, module, part)
            self._replace(module, "forward", entry)
            if module is self.model:
                self.entry = entry
        if hasattr(self.model, "generate"):
            self._replace(self.model, "generate", Generation(self, self.model))
        if hasattr(self.model, Images.name) and self.prompt is not None:
            self._replace(self.model, Images.name, Images(self, self.model))
        if hasattr(self.model, "init_continuous_batching"):
            self._replace(self.model, "init_continuous_batching", self.batches)
        if hasattr(self.model, "_set_gradient_checkpointing"):
            self._replace(self.model, "_set_gradient_checkpointing", Checkpointing(self.model))
            Checkpointing(self.model).take()  # if it is already on

    def _replace(self, module: nn.Module, name: str, stand_in: Any) -> None:
        self._stand_ins.append((module, name, stand_in, vars(module).get(name)))
        setattr(module, name, stand_in)

    def close(self) -> None:
        """Restore the model's own methods. If another library wrapped ours, as accelerate does, ours stays."""
        for module, name, stand_in, own in reversed(self._stand_ins):
            if vars(module).get(name) is stand_in:
                del vars(module)[name]
                if own is not None:
                    setattr(module, name, own)
        Checkpointing(self.model).leave()
        self._stand_ins, self._layers, self._layer_calls, self.closed = [], [], [], True
        self.layouts = Layouts(())
        self._routings.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_routings": OrderedDict(), "_layer_calls": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.prompt is not None:
            _keep_out_of_graphs()

    @contextmanager
    def using(self, verdict_BE: Tensor) -> Iterator[None]:
        """Use a verdict for this thread's calls."""
        with framed(Frame(self, plain_verdict(verdict_BE))):
            yield

    def adopt(self, state: Any, ids_BT: Tensor) -> None:
        """Treat a cache as if this composition had filled it with these tokens."""
        record = self.fresh(None if self.prompt is None else self.prompt.decide(input_ids=ids_BT), None)
        record.read(ids_BT, None, ids_BT.shape[1])
        records.attach(state, record)

    def request_verdict(self) -> Tensor | None:
        """The row of this thread's verdict for a request that is being added."""
        frame = frame_of(self)
        return None if frame is None else frame.next_row()

    # One call

    @property
    def is_inside(self) -> bool:
        """Whether this thread is inside one of its calls."""
        return self in _stack.inside

    def run(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call: decide or look up the decision, compute, and record what a cache holds now."""
        if self.is_inside:
            return entry.plain(*args, **kwargs)
        with self.exclusion.running():
            if self.closed:  # the experts changed while it waited
                return entry.module.forward(*args, **kwargs)
            step = self._begin(entry, args, kwargs)
            first = self._first_calls.followed(entry.module, step.given)
            with self.inside(step.routing, step.places, step.kept), first, followed(self.layouts, step.places):
                out = entry.plain(*args, **kwargs)
            self._end(step, entry, out)
            return out

    def _begin(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step:
        """The decision for a call, made now or known."""
        given = entry.given(args, kwargs)
        batch = self.batches.of(given)
        if batch is not None:
            return _Step(given, batch.routing, places_in_row(self.layouts, given, batch.routing), batch.kept)
        packed = None if self.prompt is None else packed_lengths(given)
        if packed is not None and self.wanted(frame_of(self)) is None:
            return _Step(given, *self._packed(entry, given, packed), kept_tokens(given))
        tokens = tokens_of(given, decoder=has_encoder(self.model) and entry.part == "model")
        record = self._record_for(entry, given, tokens)
        routing = None if record.verdict_BE is None else self.routing(record.verdict_BE)
        return _Step(given, routing, self.places(entry, given, tokens, routing), None, tokens, record)

    def places(
        self, entry: Entry, given: Mapping[str, Any], tokens: CallTokens, routing: BatchRouting | None
    ) -> TokenPlaces | None:
        """Where a call's tokens are among its layers' inputs, if anything needs that."""
        if not thread.watched and (routing is None or not routing.differs):
            return None
        of_both, part = has_encoder(self.model), entry.part
        roles = {"both": of_both and part == "model", "inner": of_both and part == "decoder"}
        roles["positions"] = bool(thread.watched) or (routing is not None and routing.by_token)
        with self.inside(BASE):
            return places_of(self.layouts, entry.plain, entry.names, given, tokens, entry.module, **roles)

    @contextmanager
    def inside(
        self, routing: BatchRouting | None, places: TokenPlaces | None = None, kept: slice | Tensor | None = None
    ) -> Iterator[None]:
        """Run a block as a call of this composition."""
        before, _stack.inside = _stack.inside, (*_stack.inside, self)
        try:
            with routed_by(routing, places, kept):
                yield
        finally:
            _stack.inside = before

    def routing(self, verdict_NE: Tensor, *, token_rows: int = 0) -> BatchRouting:
        """The routing for a verdict. Cached by value: sequences with equal decisions share it."""
        assert self.prompt is not None
        if token_rows:
            return self.prompt.routing(verdict_NE, token_rows=token_rows)
        if len(verdict_NE) > 1 and bool((verdict_NE == verdict_NE[:1]).all()):
            verdict_NE = verdict_NE[:1]
        key = (tuple(verdict_NE.shape), verdict_NE.detach().cpu().numpy().tobytes())
        calls = [layer.call for layer in self._layers]
        with self.exclusion.lock:
            known = self._layer_calls
            if len(calls) != len(known) or not all(map(is_, calls, known)):  # moved or cast meanwhile
                self._routings.clear()
                self._layer_calls = calls
            found = self._routings.get(key)
            if found is not None:
                self._routings.move_to_end(key)
                return found
            found = self.prompt.routing(verdict_NE)
            self._routings[key] = found
            sets, several = self.prompt.sets, any(kept.several for kept in self._routings.values())
            most = min(_ROUTINGS, sets.gathered if several else sets.single)
            while len(self._routings) > most:
                self._routings.popitem(last=False)
        return found

    def wanted(self, frame: Frame | None) -> Tensor | None:
        """The verdict that overrides what calls decide."""
        if frame is not None and frame.verdict_BE is not None:
            return frame.verdict_BE
        return None if self.prompt is None else self.prompt.held_BE

    def fresh(self, verdict_BE: Tensor | None, frame: Frame | None) -> CacheRecord:
        """The record of an empty cache."""
        return CacheRecord(self.key, self.experts, ((0, verdict_BE),), frame=None if frame is None else frame.token)

    def _record_for(self, entry: Entry, given: Mapping[str, Any], tokens: CallTokens) -> CacheRecord:
        """What is known about the sequences of a call, whose tokens were read or are read now."""
        frame = frame_of(self)
        wanted = self.wanted(frame)
        state = next((state for _, state in records.states_in(given)), None)
        if records.is_filled(state):
            return self._continued(entry, given, state, tokens, frame, wanted)
        if wanted is not None:
            wanted = expanded(wanted, tokens.rows, None if frame is None else frame.expand)
        wanted = encoded_verdict(self, entry.part, given, tokens.rows, wanted)
        if wanted is None and self.prompt is not None:
            wanted = self.decide(given)
        self._show(wanted)
        return self.fresh(wanted, frame)

    def _show(self, verdict_BE: Tensor | None) -> None:
        if verdict_BE is not None and self.prompt is not None:
            self.prompt.show(verdict_BE)

    def decide(self, given: Mapping[str, Any]) -> Tensor:
        """The verdict on the prompts of a call, by argument name."""
        assert self.prompt is not None
        return plain_verdict(self.prompt.decide(**as_read(given)))

    def _continued(
        self, entry: Entry, given: Mapping[str, Any], state: Any, tokens: CallTokens, frame: Frame | None, wanted: Any
    ) -> CacheRecord:
        """The decision for a continued cache, which is read again if it was filled under another one."""
        record = self.known(state)
        if record is not None:
            record.have_rows(tokens.rows)
            mine = frame is not None and record.frame is frame.token
            expand = None if frame is None else frame.expand
            if mine or wanted is None or same_verdict(record.verdict_BE, expanded(wanted, tokens.rows, expand)):
                record.frame = None if frame is None else frame.token
                self._show(record.verdict_BE)
                return record
        elif frame is not None and frame.generates and not hasattr(state, "get_seq_length"):
            return self.fresh(wanted, frame)  # a part of this generation's state, as XLNet cuts it
        return self.read_again(entry, given, state, tokens, frame, wanted)

    def known(self, state: Any) -> CacheRecord | None:
        """A state's record, if it belongs to these experts and is complete."""
        record = records.record_of(state)
        if record is None or record.composition != self.key or record.allowed != self.experts:
            return None
        if not records.agrees(state, record):
            if self.prompt is not None:
                return None
            # filled by compiled calls, which record and decide nothing
            record.ids, record.length, record.before = None, records.length_of(state) or 0, 0
        return record

    def read_again(
        self, entry: Entry, given: Mapping[str, Any], state: Any, tokens: CallTokens, frame: Frame | None, wanted: Any
    ) -> CacheRecord:
        """Empty a cache and read its tokens with the current decision; refused if they are unknown, or a decoder's."""
        before = records.record_of(state)
        ids_BT = None if before is None or not records.agrees(state, before) else before.ids_BT
        readable = records.can_reset(state) and not has_encoder(self.model)
        if before is None or ids_BT is None or not readable or len(ids_BT) != tokens.rows:
            raise CompositionError(
                "the cache was filled with other experts or under another decision, and its tokens are unknown",
                expected="an empty cache, or one that this composition filled from token ids",
                do=_WHOLE_PROMPT,
            )
        if not before.whole:
            raise CompositionError(
                "the cache was filled with other experts or under another decision, and with more than token ids: "
                "images, sounds, token types, or a mask or positions for more than one axis",
                do=_WHOLE_PROMPT,
            )
        if wanted is None and self.prompt is not None:
            if tokens.ids is None:
                raise CompositionError("a filled cache cannot continue with embeddings", do=_WHOLE_PROMPT)
            new_BT = records.masked_ids(tokens.ids, tokens.mask)
            wanted = self.decide(as_prompt(torch.cat([ids_BT.to(new_BT.device), new_BT], dim=1)))
        wanted = None if wanted is None else expanded(wanted, tokens.rows, None if frame is None else frame.expand)
        fresh = self.fresh(wanted, frame)
        record = replace(before, composition=fresh.composition, allowed=fresh.allowed, history=fresh.history)
        record.frame = fresh.frame
        name = next((name for name, given_state in records.states_in(given) if given_state is state), "past_key_values")
        read = {**as_prompt(ids_BT, before.positions_BT), name: state, "use_cache": True}
        state.reset()  # also empties the record
        routing = None if wanted is None else self.routing(wanted)
        places = self.places(entry, read, tokens_of(read, decoder=False), routing)
        with torch.no_grad(), self.inside(routing, places), followed(self.layouts, places):
            entry.plain(**read)
        records.attach(state, record)
        self._show(wanted)
        return record

    def _end(self, step: _Step, entry: Entry, out: Any) -> None:
        """Store the decision with a cache and with an encoder's outputs."""
        given, tokens, record = step.given, step.tokens, step.record
        if tokens is None or record is None:
            return
        note_encoded(self, entry.part, given, out, record)
        states = [state for _, state in records.states_in(out)] or [state for _, state in records.states_in(given)]
        for state in states[:1]:
            if entry.part != "encoder" and records.is_filled(state):
                mask, frame = tokens.mask, frame_of(self)
                if not tokens.masked and frame is not None:
                    mask = frame.real(tokens.rows, record.length + tokens.count)
                whole = tokens.whole and (tokens.masked or mask is not None)
                filled = records.length_of(state)
                record.read(tokens.ids, mask, tokens.count, tokens.positions, filled, whole=whole)
                records.attach(state, record)

    def _packed(
        self, entry: Entry, given: Mapping[str, Any], lengths: list[list[int]]
    ) -> tuple[BatchRouting, TokenPlaces | None]:
        """The routing of rows that hold several prompts, each with its own decision."""
        verdict_BE = self.decide(unpacked(given, lengths))
        self._show(verdict_BE)
        counts = torch.tensor([count for some in lengths for count in some])
        routing = self.routing(verdict_BE.repeat_interleave(counts, 0), token_rows=len(lengths))
        if len(lengths) == 1:
            return routing, places_in_row(self.layouts, given, routing, entry)
        return routing, self.places(entry, given, tokens_of(given, decoder=False), routing)
