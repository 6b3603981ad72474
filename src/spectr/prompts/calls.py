"""Which decision holds for which call of a composed model. A decision belongs to a sequence, never to the model.

1. ``generate`` decides once, on its whole input, for all of its calls. A ``generate`` inside another inherits that; a
   composed assistant keeps its first verdict.
2. A cache never changes the answer: one that was filled under another verdict or other experts, or by somebody else, is
   reset and its tokens are read again. Where its tokens are not known the call is refused.
3. Any other call decides for itself; calls on the cache that it filled keep that.
4. ``prompt.hold`` (all threads) and ``prompt.using`` (one thread or asyncio task) take the place of what calls decide.
5. With an encoder a decision belongs to the encoder's outputs.

What is decided is set for the thread that runs the call (:mod:`spectr.layers.batch_routing`); next to a cache it is
kept in a record (:mod:`spectr.prompts.cache_records`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import signature
from operator import is_
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BatchRouting, LayerCall, routed_by, thread
from spectr.layers.routed import RoutedLinear
from spectr.prompts import cache_records as records
from spectr.prompts.arguments import (
    CallTokens,
    GenerationSettings,
    as_prompt,
    begins_with,
    expanded,
    has_encoder,
    kept_tokens,
    packed_lengths,
    part_of,
    prompt_of,
    same_verdict,
    tokens_of,
)
from spectr.prompts.batches import Batches
from spectr.prompts.cache_records import CacheRecord
from spectr.prompts.decision import PromptDecision, plain_verdict
from spectr.prompts.exclusion import Exclusion
from spectr.prompts.stand_ins import Checkpointing, Entry, Generation, entries_of

_TOKENS_FIRST = ("xlnet", "fsmt")  # kinds of models whose layers are given (tokens, rows, features)
_ROUTINGS = 16  # verdicts whose routing is kept


class _Token:
    """Names a frame in records, which must not keep the frame alive."""


@dataclass(eq=False)
class Frame:
    """A generation, or a block, whose verdict holds for all of its calls.

    Attributes:
        verdict_BE: ``None`` of a router that decides for each token.
        generates: Whether it is a generation.
        expand: How many sequences each row becomes (beams, sequences to return); ``None`` where that is not known.
        assistants: The first verdict of each composition that assists.
    """

    calls: Calls
    verdict_BE: Float[Tensor, "B E"] | None
    generates: bool = False
    expand: int | None = None
    assistants: dict[str, Tensor | None] = field(default_factory=dict)
    token: _Token = field(default_factory=_Token)
    requests: int = 0


class _Stack(threading.local):
    """Of a thread: the compositions that one of its calls is in."""

    inside: tuple[Calls, ...] = ()


_stack = _Stack()
_frames: ContextVar[tuple[Frame, ...]] = ContextVar("spectr_frames", default=())  # of a thread or task; innermost last


class _Step(NamedTuple):
    """A call: what holds for its layers, and what will be known of a cache that it fills."""

    given: dict[str, Any]
    routing: BatchRouting | None
    shape: tuple[int, int] | None
    kept: slice | Tensor | None
    tokens: CallTokens | None = None
    record: CacheRecord | None = None


@lru_cache(maxsize=1)
def _keep_out_of_graphs() -> None:
    """Have decisions made outside of compiled graphs. Not on import, as torch's compiler takes seconds to load."""
    for name, all_inside in {"run": False, "_begin": True, "_end": True}.items():  # the model inside is compiled
        setattr(Calls, name, torch.compiler.disable(getattr(Calls, name), recursive=all_inside))


class Calls:
    """Gives the calls of a composed model their routing, from :func:`spectr.compose` to ``remove()``.

    Args:
        model: The composed model.
        experts: Those that can be chosen.
        prompt: Decides on prompts, where the router does that.
        key: Names experts and router in caches' records; a new one, if left out.
        exclusion: Keeps changes of the experts out of running calls.
    """

    def __init__(
        self,
        model: Any,
        experts: Sequence[str],
        prompt: PromptDecision | None,
        *,
        key: str | None = None,
        exclusion: Exclusion | None = None,
    ):
        self.model, self.experts, self.prompt = model, tuple(experts), prompt
        self.key, self.exclusion = key or uuid4().hex, exclusion or Exclusion()
        self._routings: OrderedDict[tuple[Any, ...], BatchRouting] = OrderedDict()
        self._layers = [module for module in model.modules() if isinstance(module, RoutedLinear)]
        self._held: list[LayerCall] = []
        self._batch_axis = int(getattr(getattr(model, "config", None), "model_type", "") in _TOKENS_FIRST)
        if prompt is not None:
            prompt.calls = self
            _keep_out_of_graphs()
        self.batches = Batches(self)
        self._stand_ins: list[tuple[nn.Module, str, Any, Any]] = []
        self.closed = False
        self._install()

    # Standing in for the model's methods

    def _install(self) -> None:
        for module, part in entries_of(self.model):
            self._replace(module, "forward", Entry(self, module, part))
        if hasattr(self.model, "generate"):
            self._replace(self.model, "generate", Generation(self, self.model))
        if hasattr(self.model, "init_continuous_batching"):
            self._replace(self.model, "init_continuous_batching", self.batches)
        if hasattr(self.model, "_set_gradient_checkpointing"):
            self._replace(self.model, "_set_gradient_checkpointing", Checkpointing(self.model))
            Checkpointing(self.model).take()  # where it is on already

    def _replace(self, module: nn.Module, name: str, stand_in: Any) -> None:
        self._stand_ins.append((module, name, stand_in, vars(module).get(name)))
        setattr(module, name, stand_in)

    def close(self) -> None:
        """Give the model its own methods back. Where somebody has wrapped ours since, as accelerate does, it stays."""
        for module, name, stand_in, own in reversed(self._stand_ins):
            if vars(module).get(name) is not stand_in:
                continue
            if own is None:
                del vars(module)[name]
            else:
                setattr(module, name, own)
        Checkpointing(self.model).leave()
        self._stand_ins, self._layers, self._held, self.closed = [], [], [], True
        self._routings.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_routings": OrderedDict(), "_held": []}

    # Frames

    def _frame(self) -> Frame | None:
        return next((frame for frame in reversed(_frames.get()) if frame.calls is self), None)

    @contextmanager
    def using(self, verdict_BE: Tensor) -> Iterator[None]:
        """Have a verdict hold for this thread's calls."""
        with self._framed(Frame(self, plain_verdict(verdict_BE))):
            yield

    @contextmanager
    def _framed(self, frame: Frame) -> Iterator[None]:
        _frames.set((*_frames.get(), frame))
        try:
            yield
        finally:
            _frames.set(tuple(other for other in _frames.get() if other is not frame))

    def adopt(self, state: Any, ids_BT: Tensor) -> None:
        """Have a cache go on as if this composition had filled it with these tokens."""
        record = self._fresh(None if self.prompt is None else self.prompt.decide(input_ids=ids_BT), None)
        record.read(ids_BT, None, ids_BT.shape[1])
        records.attach(state, record)

    def request_verdict(self) -> Tensor | None:
        """Of the verdict that holds for this thread the row that a request which is added now has."""
        frame = self._frame()
        if frame is None or frame.verdict_BE is None:
            return None
        rows, number = len(frame.verdict_BE), frame.requests
        if rows > 1 and number >= rows:
            raise CompositionError(
                f"a verdict of {rows} rows, and a further request",
                do="decide on all requests that are added in this block, or on one for all",
            )
        frame.requests += 1
        return frame.verdict_BE[:1] if rows == 1 else frame.verdict_BE[number : number + 1]

    # One call

    def run(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of an entry: decide, or find what was decided; compute; and note what a cache holds now."""
        if self in _stack.inside:
            return entry.plain(*args, **kwargs)
        with self.exclusion.running():
            if self.closed:  # the experts were changed while it waited
                return entry.module.forward(*args, **kwargs)
            step = self._begin(entry, args, kwargs)
            with self._inside(step.routing, step.shape, step.kept):
                out = entry.plain(*args, **kwargs)
            self._end(step, entry, out)
            return out

    def _begin(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step:
        """What holds for a call, decided now or known."""
        given = entry.given(args, kwargs)
        batch = self.batches.of(given)
        if batch is not None:
            return _Step(given, batch.routing, (1, batch.tokens), batch.kept)
        packed = None if self.prompt is None else packed_lengths(given)
        if packed is not None and self._wanted(self._frame()) is None:
            return _Step(given, self._packed(given, packed), None, kept_tokens(given))
        tokens = tokens_of(given, decoder=has_encoder(self.model) and entry.part == "model")
        record = self._record_for(entry, given, tokens)
        verdict_BE = record.verdict_BE
        routing = None if verdict_BE is None else self.routing(verdict_BE)
        return _Step(given, routing, (tokens.rows, tokens.count), None, tokens, record)

    @contextmanager
    def _inside(
        self, routing: BatchRouting | None, shape: tuple[int, int] | None, kept: slice | Tensor | None = None
    ) -> Iterator[None]:
        before, _stack.inside = _stack.inside, (*_stack.inside, self)
        try:
            if routing is None:
                yield
            else:
                with routed_by(routing, shape, kept):
                    yield
        finally:
            _stack.inside = before

    def routing(self, verdict_NE: Tensor, *, by_token: bool = False) -> BatchRouting:
        """What a verdict makes of a call. Kept by what it says: sequences that were decided alike share it."""
        assert self.prompt is not None
        if by_token:
            return self.prompt.routing(verdict_NE, by_token=True)
        if len(verdict_NE) > 1 and bool((verdict_NE == verdict_NE[:1]).all()):
            verdict_NE = verdict_NE[:1]
        key = (tuple(verdict_NE.shape), verdict_NE.detach().cpu().numpy().tobytes())
        held = [layer.call for layer in self._layers]
        with self.exclusion.lock:
            if len(held) != len(self._held) or not all(map(is_, held, self._held)):  # moved or cast since
                self._routings.clear()
                self._held = held
            found = self._routings.get(key)
            if found is not None:
                self._routings.move_to_end(key)
                return found
            found = replace(self.prompt.routing(verdict_NE), batch_axis=self._batch_axis)
            self._routings[key] = found
            sets, several = self.prompt.sets, any(kept.several for kept in self._routings.values())
            most = min(_ROUTINGS, sets.gathered if several else sets.single)
            while len(self._routings) > most:
                self._routings.popitem(last=False)
        return found

    def _wanted(self, frame: Frame | None) -> Tensor | None:
        if frame is not None and frame.verdict_BE is not None:
            return frame.verdict_BE
        return None if self.prompt is None else self.prompt.held_BE

    def _fresh(self, verdict_BE: Tensor | None, frame: Frame | None) -> CacheRecord:
        token = None if frame is None else frame.token
        return CacheRecord(self.key, self.experts, ((0, verdict_BE),), frame=token)

    def _record_for(self, entry: Entry, given: Mapping[str, Any], tokens: CallTokens) -> CacheRecord:
        """What is known of the sequences of a call, whose tokens were read or are read now."""
        frame = self._frame()
        wanted = self._wanted(frame)
        if wanted is not None:
            wanted = expanded(wanted, tokens.rows, None if frame is None else frame.expand)
        state = next((state for _, state in records.states_in(given)), None)
        if records.is_filled(state):
            return self._continued(entry, given, state, tokens, frame, wanted)
        if wanted is None and self.prompt is not None:
            wanted = self._encoded(entry, given, tokens)
            wanted = self._decide(given) if wanted is None else wanted
        if wanted is not None and self.prompt is not None:
            self.prompt.show(wanted)
        return self._fresh(wanted, frame)

    def _decide(self, given: Mapping[str, Any]) -> Tensor:
        assert self.prompt is not None
        return plain_verdict(self.prompt.decide(**{name: value for name, value in given.items() if value is not None}))

    def _continued(
        self, entry: Entry, given: Mapping[str, Any], state: Any, tokens: CallTokens, frame: Frame | None, wanted: Any
    ) -> CacheRecord:
        """What holds for a cache that goes on; read again, where it was filled under something else."""
        record = self._known(state)
        if record is not None:
            verdict_BE = record.verdict_BE
            if verdict_BE is not None and len(verdict_BE) != tokens.rows:
                raise CompositionError(
                    f"the cache goes on with {tokens.rows} rows, and {len(verdict_BE)} were decided on",
                    do="reorder, repeat or select its rows by the cache's own methods",
                )
            mine = frame is not None and record.frame is frame.token
            if mine or wanted is None or same_verdict(verdict_BE, wanted):
                record.frame = None if frame is None else frame.token
                if verdict_BE is not None and self.prompt is not None:
                    self.prompt.show(verdict_BE)
                return record
        elif frame is not None and frame.generates and not hasattr(state, "get_seq_length"):
            return self._fresh(wanted, frame)  # a part of what this generation had, as XLNet cuts its own
        return self._read_again(entry.plain, given, state, tokens, frame, wanted)

    def _known(self, state: Any) -> CacheRecord | None:
        """A state's record, where it is of these experts and complete."""
        record = records.record_of(state)
        if record is None or record.composition != self.key or record.allowed != self.experts:
            return None
        if not records.agrees(state, record):
            if self.prompt is not None:
                return None
            # by compiled calls, which note nothing and decide nothing
            record.ids, record.length, record.before = None, records.length_of(state) or 0, 0
        return record

    def _read_again(
        self,
        forward: Callable[..., Any],
        given: Mapping[str, Any],
        state: Any,
        tokens: CallTokens,
        frame: Frame | None,
        wanted: Tensor | None,
    ) -> CacheRecord:
        """Empty a cache and read its tokens under what holds now; refused where these are not known."""
        before = records.record_of(state)
        ids_BT = None if before is None or not records.agrees(state, before) else before.ids_BT
        if ids_BT is None or not records.can_reset(state) or len(ids_BT) != tokens.rows:
            raise CompositionError(
                "the cache was filled under other experts or another decision, and its tokens are not known",
                expected="an empty cache, or one that this composition filled from token ids",
                do="read the prompt again, without that cache",
            )
        if wanted is None and self.prompt is not None:
            if tokens.ids is None:
                raise CompositionError("a cache goes on with embeddings", do="read the prompt again, without it")
            new_BT = records.masked_ids(tokens.ids, tokens.mask)
            wanted = self._decide(as_prompt(torch.cat([ids_BT.to(new_BT.device), new_BT], dim=1)))
        assert before is not None
        positions = before.positions_BT
        record = self._fresh(wanted, frame)  # before the reset, which empties the record there is
        record.ids, record.positions, record.length, record.before = (
            before.ids,
            before.positions,
            before.length,
            before.before,
        )
        state.reset()
        routing = None if wanted is None else self.routing(wanted)
        read = {**as_prompt(ids_BT), "past_key_values": state, "use_cache": True}
        if positions is not None:
            read["position_ids"] = positions
        with torch.no_grad(), self._inside(routing, (len(ids_BT), ids_BT.shape[1])):
            forward(**read)
        records.attach(state, record)
        if wanted is not None and self.prompt is not None:
            self.prompt.show(wanted)
        return record

    def _encoded(self, entry: Entry, given: Mapping[str, Any], tokens: CallTokens) -> Tensor | None:
        """What was decided for the outputs of an encoder that a call is given; ``None`` where it is given none."""
        outputs = given.get("encoder_outputs") if entry.part == "model" else given.get("encoder_hidden_states")
        if entry.part == "encoder" or outputs is None or (entry.part == "model" and not has_encoder(self.model)):
            return None
        hidden = outputs if isinstance(outputs, Tensor) else outputs[0]
        record = records.record_of(hidden)
        if record is None or record.composition != self.key or record.allowed != self.experts:
            raise CompositionError(
                "nothing was decided for these outputs of the encoder",
                expected="the very tensor that this model's encoder gave, under the experts that are allowed now",
                do="give the model its input, or encode it again; to change rows, decide yourself: "
                "with routed.prompt.using(routed.prompt.decide(...)): ...",
            )
        assert record.verdict_BE is not None
        return expanded(record.verdict_BE, tokens.rows, None)

    def _end(self, step: _Step, entry: Entry, out: Any) -> None:
        """Keep with a cache and with an encoder's outputs what held for a call."""
        given, tokens, record = step.given, step.tokens, step.record
        if tokens is None or record is None:
            return
        if has_encoder(self.model) and self.prompt is not None:
            hidden = part_of(out, "last_hidden_state" if entry.part == "encoder" else "encoder_last_hidden_state")
            if isinstance(hidden, Tensor):
                records.attach(hidden, self._fresh(record.verdict_BE, None))
        states = [state for _, state in records.states_in(out)] or [state for _, state in records.states_in(given)]
        for state in states[:1]:
            if entry.part != "encoder" and records.is_filled(state):
                record.read(tokens.ids, tokens.mask, tokens.count, tokens.positions, records.length_of(state))
                records.attach(state, record)

    # Several prompts in one row

    def _packed(self, given: Mapping[str, Any], lengths: list[int]) -> BatchRouting:
        ids = given.get("input_ids")
        if ids is None:
            raise CompositionError("packed rows of embeddings cannot be decided on", do="pass input_ids")
        pieces = ids[0].split(lengths)
        padded = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in pieces], batch_first=True)
        verdict_BE = self._decide({"input_ids": padded, "attention_mask": mask})
        assert self.prompt is not None
        self.prompt.show(verdict_BE)
        return self.routing(verdict_BE.repeat_interleave(torch.tensor(lengths), 0), by_token=True)

    # A generation

    def generate(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide once for all calls of ``generate``, and see to it that a given cache fits that."""
        outer = self._frame()
        if thread.routing is not None or self in _stack.inside or (outer is not None and outer.generates):
            return generation.plain(*args, **kwargs)
        with self.exclusion.running():
            if self.closed:
                return self.model.generate(*args, **kwargs)
            names = tuple(signature(generation.plain).parameters)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            settings = GenerationSettings.of(self.model, given)
            prompt = prompt_of(self.model, given, settings)
            name, state = next(records.states_in(given), ("", None))
            if not records.is_filled(state):
                state = None
            frame = Frame(self, None, generates=True, expand=settings.expand)
            known = None if state is None else self._known(state)
            whole, only_new = self._whole(prompt, given, state)
            frame.verdict_BE = self._verdict_for(whole, outer, settings, known, given)
            with self._framed(frame):
                if state is not None:
                    # assisted, transformers reads the whole text again behind what a cache holds
                    again = settings.assisted or records.is_recurrent(state)
                    known = None if again else known
                    kwargs = {**kwargs, name: self._fitting(state, known, whole, prompt, frame, only_new)}
                    kwargs = {key: value for key, value in kwargs.items() if value is not None or key != name}
                return generation.plain(*args, **kwargs)

    def _whole(self, prompt: dict[str, Any], given: Mapping[str, Any], state: Any) -> tuple[dict[str, Any], bool]:
        """A generation's whole input, and whether it is given the new tokens alone, as its mask shows."""
        ids, mask = prompt.get("input_ids"), given.get("attention_mask")
        if state is None or not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or has_encoder(self.model):
            return prompt, False
        if mask.ndim != 2 or mask.shape[1] <= ids.shape[1]:
            return prompt, False
        record = records.record_of(state)
        before = None if record is None or not records.agrees(state, record) else record.ids_BT
        if before is None or before.shape[1] + ids.shape[1] != mask.shape[1]:
            raise CompositionError(
                "generate is given new tokens alone, and those of the cache are not known",
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
        if self.prompt is None:
            return None
        verdict_BE = self._wanted(outer)
        around = next(iter(_frames.get()[-1:]), None)
        around = None if around is None or around.calls is self else around
        if verdict_BE is None and around is not None and self.key in around.assistants:
            verdict_BE = around.assistants[self.key]
        if verdict_BE is None and settings.assists and known is not None:
            verdict_BE = known.verdict_BE
        if verdict_BE is None and has_encoder(self.model) and given.get("encoder_outputs") is not None:
            outputs = given["encoder_outputs"]
            hidden = outputs if isinstance(outputs, Tensor) else outputs[0]
            entry = Entry(self, self.model, "model")
            verdict_BE = self._encoded(entry, given, CallTokens(None, None, None, len(hidden), 1))
        if verdict_BE is None:
            verdict_BE = self._decide(whole)
        if around is not None:
            around.assistants.setdefault(self.key, verdict_BE)
        self.prompt.show(verdict_BE)
        return verdict_BE

    def _fitting(
        self, state: Any, known: CacheRecord | None, whole: dict[str, Any], prompt: Any, frame: Frame, only_new: bool
    ) -> Any:
        """A given cache, so that it does not change the answer: as it is, read again, or emptied."""
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
            entry = next(entry for module, _, entry, _ in self._stand_ins if module is self.model)
            self._read_again(entry.plain, {}, state, tokens, frame, frame.verdict_BE)
            return state
        if not records.can_reset(state):
            return None  # then generate begins without
        state.reset()
        records.attach(state, self._fresh(frame.verdict_BE, frame))
        return state
