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
from itertools import pairwise
from operator import is_
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BatchRouting, LayerCall, routed_by, thread
from spectr.layers.routed import RoutedLinear
from spectr.prompts import cache_records as records
from spectr.prompts.batches import Batches
from spectr.prompts.cache_records import CacheRecord
from spectr.prompts.decision import PromptDecision, plain_verdict
from spectr.prompts.exclusion import Exclusion

_TOKENS = ("input_ids", "inputs_embeds")
_TOKENS_FIRST = ("xlnet", "fsmt")  # kinds of models whose layers are given (tokens, rows, features)
_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps it
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # what others propose is verified
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


class Entry:
    """Stands in for the ``forward`` of a module that is called with prompts.

    Args:
        calls: Decides.
        module: The model, or its inner decoder or encoder.
        part: ``"model"``, ``"encoder"`` or ``"decoder"``.
    """

    def __init__(self, calls: Calls, module: nn.Module, part: str):
        self.calls, self.module, self.part = calls, module, part
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")  # accelerate's, for one
        self.names = tuple(self.__signature__.parameters)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``forward``."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)  # Dynamo takes a bound one for this entry

    @property
    def __signature__(self) -> Any:
        return signature(self.own or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if thread.routing is not None or self.calls.closed or (is_compiling() and self.calls.prompt is None):
            return self.plain(*args, **kwargs)
        return self.calls.run(self, args, kwargs)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class Generation:
    """Stands in for the ``generate`` of a model.

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
        """As the model's own."""
        return self.plain(*args, **kwargs) if self.calls.closed else self.calls.generate(self, args, kwargs)


class Checkpointing:
    """Stands in for the method by which transformers turns gradient checkpointing on.

    What is computed again in the backward pass, perhaps by another thread, is routed as it was before.
    """

    def __init__(self, model: Any):
        self.model = model

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own method."""
        return type(self.model)._set_gradient_checkpointing.__get__(self.model)

    @property
    def __signature__(self) -> Any:
        return signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        done = self.plain(*args, **kwargs)
        self.take()
        return done

    def take(self) -> None:
        """Have the checkpoint functions that modules have now keep what holds."""
        for module in self.model.modules():
            own = vars(module).get(_CHECKPOINT)
            if own is not None and not isinstance(own, _Again):
                setattr(module, _CHECKPOINT, _Again(own))

    def leave(self) -> None:
        """Give modules their own functions back."""
        for module in self.model.modules():
            again = vars(module).get(_CHECKPOINT)
            if isinstance(again, _Again):
                setattr(module, _CHECKPOINT, again.checkpoint)


class _Again:
    """A checkpoint function whose function is routed alike whenever it runs."""

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing, shape, kept = thread.routing, thread.shape, thread.kept
        if not torch.is_grad_enabled():  # as while a prompt is read for a decision
            return function(*args, **kwargs)

        def again(*given: Any, **more: Any) -> Any:
            with routed_by(routing, shape, kept):
                return function(*given, **more)

        return self.checkpoint(again if routing is not None else function, *args, **kwargs)


class _Tokens(NamedTuple):
    """The tokens of a call that a cache will hold."""

    ids: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    rows: int
    count: int


class _Step(NamedTuple):
    """A call: what holds for its layers, and what will be known of a cache that it fills."""

    given: dict[str, Any]
    routing: BatchRouting | None
    shape: tuple[int, int] | None
    kept: slice | Tensor | None
    tokens: _Tokens | None = None
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
        for module, part in _entries(self.model):
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
        packed = None if self.prompt is None else _packed_lengths(given)
        if packed is not None and self._wanted(self._frame()) is None:
            return _Step(given, self._packed(given, packed), None, _kept(given))
        tokens = _tokens_of(entry, given)
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

    def _record_for(self, entry: Entry, given: Mapping[str, Any], tokens: _Tokens) -> CacheRecord:
        """What is known of the sequences of a call, whose tokens were read or are read now."""
        frame = self._frame()
        wanted = self._wanted(frame)
        if wanted is not None:
            wanted = _expanded(wanted, tokens.rows, None if frame is None else frame.expand)
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
        self, entry: Entry, given: Mapping[str, Any], state: Any, tokens: _Tokens, frame: Frame | None, wanted: Any
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
            if mine or wanted is None or _same(verdict_BE, wanted):
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
        tokens: _Tokens,
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
            wanted = self._decide(_as_prompt(torch.cat([ids_BT.to(new_BT.device), new_BT], dim=1)))
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
        read = {**_as_prompt(ids_BT), "past_key_values": state, "use_cache": True}
        if positions is not None:
            read["position_ids"] = positions
        with torch.no_grad(), self._inside(routing, (len(ids_BT), ids_BT.shape[1])):
            forward(**read)
        records.attach(state, record)
        if wanted is not None and self.prompt is not None:
            self.prompt.show(wanted)
        return record

    def _encoded(self, entry: Entry, given: Mapping[str, Any], tokens: _Tokens) -> Tensor | None:
        """What was decided for the outputs of an encoder that a call is given; ``None`` where it is given none."""
        outputs = given.get("encoder_outputs") if entry.part == "model" else given.get("encoder_hidden_states")
        if entry.part == "encoder" or outputs is None or (entry.part == "model" and not _is_pair(self.model)):
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
        return _expanded(record.verdict_BE, tokens.rows, None)

    def _end(self, step: _Step, entry: Entry, out: Any) -> None:
        """Keep with a cache and with an encoder's outputs what held for a call."""
        given, tokens, record = step.given, step.tokens, step.record
        if tokens is None or record is None:
            return
        if _is_pair(self.model) and self.prompt is not None:
            hidden = _get(out, "last_hidden_state" if entry.part == "encoder" else "encoder_last_hidden_state")
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
            settings = _Settings.of(self.model, given)
            prompt = _prompt_of(self.model, given, settings)
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
        if state is None or not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or _is_pair(self.model):
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
        self, whole: dict[str, Any], outer: Frame | None, settings: _Settings, known: CacheRecord | None, given: Any
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
        if verdict_BE is None and _is_pair(self.model) and given.get("encoder_outputs") is not None:
            outputs = given["encoder_outputs"]
            hidden = outputs if isinstance(outputs, Tensor) else outputs[0]
            entry = Entry(self, self.model, "model")
            verdict_BE = self._encoded(entry, given, _Tokens(None, None, None, len(hidden), 1))
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
        if known is not None and _begins(whole, known, only_new):
            wanted = frame.verdict_BE
            fits = wanted is None or (
                known.verdict_BE is not None and _same(known.verdict_BE, _expanded(wanted, len(known.verdict_BE), None))
            )
            if fits:
                known.frame = frame.token
                return state
        if only_new:
            ids = prompt["input_ids"]
            tokens = _Tokens(ids, None, None, len(ids), ids.shape[1])
            entry = next(entry for module, _, entry, _ in self._stand_ins if module is self.model)
            self._read_again(entry.plain, {}, state, tokens, frame, frame.verdict_BE)
            return state
        if not records.can_reset(state):
            return None  # then generate begins without
        state.reset()
        records.attach(state, self._fresh(frame.verdict_BE, frame))
        return state


class _Settings(NamedTuple):
    """What of a generation's settings matters for decisions."""

    pad: Any
    eos: Any
    bos: Any
    expand: int | None
    assists: bool
    assisted: bool

    @staticmethod
    def of(model: Any, given: Mapping[str, Any]) -> _Settings:
        """From the arguments of ``generate`` and the model's own configuration."""
        config, own = given.get("generation_config"), getattr(model, "generation_config", None)

        def find(name: str) -> Any:
            found = (given.get(name), getattr(config, name, None), getattr(own, name, None))
            return next((value for value in found if value is not None), None)

        expand = max(find("num_beams") or 1, find("num_return_sequences") or 1)
        known = given.get("custom_generate") is None
        assists = bool(getattr(config, "is_assistant", False))
        eos = find("eos_token_id")
        eos = eos.tolist() if isinstance(eos, Tensor) else eos
        assisted = any(find(name) is not None for name in _ASSISTED)
        return _Settings(find("pad_token_id"), eos, find("bos_token_id"), expand if known else None, assists, assisted)


def _prompt_of(model: Any, given: Mapping[str, Any], settings: _Settings) -> dict[str, Any]:
    """What a generation is given to answer, as the module that reads prompts is called."""
    main = getattr(model, "main_input_name", "input_ids")
    if _is_pair(model):
        main = getattr(model.get_encoder(), "main_input_name", main)
    prompt = {name: given[name] for name in (*_TOKENS, main, "attention_mask") if given.get(name) is not None}
    if given.get("inputs") is not None:
        prompt[main] = given["inputs"]
    if not any(name in prompt for name in (*_TOKENS, main)) and given.get("encoder_outputs") is None:
        bos = settings.bos if settings.bos is not None else 0
        prompt["input_ids"] = torch.full((1, 1), bos, dtype=torch.long)
    if "inputs_embeds" in prompt and main == "input_ids":
        prompt.pop("input_ids", None)
    ids = prompt.get("input_ids")
    if isinstance(ids, Tensor) and "attention_mask" not in prompt and settings.pad is not None:
        eos = settings.eos if isinstance(settings.eos, (list, tuple)) else [settings.eos]
        pad = int(settings.pad)
        if pad not in eos and bool((ids == pad).any()):  # as transformers takes it then
            prompt["attention_mask"] = (ids != pad).long()
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in prompt.items()}


def _begins(whole: Mapping[str, Any], record: CacheRecord, only_new: bool) -> bool:
    """Whether a generation's input begins with the tokens of a cache, and goes on."""
    ids, before = whole.get("input_ids"), record.ids_BT
    if only_new:
        return True
    if not isinstance(ids, Tensor) or before is None or ids.ndim != 2 or before.shape[1] >= ids.shape[1]:
        return False
    mine = records.masked_ids(ids, whole.get("attention_mask"))[:, : before.shape[1]]
    return mine.shape == before.shape and bool((mine == before.to(mine.device)).all())


def _as_prompt(ids_BT: Tensor) -> dict[str, Tensor]:
    """Arguments for token ids of which -1 are masked."""
    real_BT = ids_BT >= 0
    given = {"input_ids": ids_BT.clamp(min=0)}
    return given if bool(real_BT.all()) else {**given, "attention_mask": real_BT.long()}


def _same(one_BE: Tensor | None, other_BE: Tensor) -> bool:
    return one_BE is not None and one_BE.shape == other_BE.shape and bool((one_BE == other_BE).all())


def _expanded(verdict_BE: Tensor, rows: int, expand: int | None) -> Tensor:
    """A verdict for the rows that a generation makes of those that were decided on.

    Each becomes ``expand`` rows, one after the other; then all of them together may be there several times, as guidance
    has them.
    """
    given = len(verdict_BE)
    if given == rows:
        return verdict_BE
    if given == 1:
        return verdict_BE.expand(rows, -1)
    times, rest = divmod(rows, given)
    if rest or not times:
        raise CompositionError(
            f"{rows} rows are computed, and {given} were decided on",
            expected=f"{given} rows, or several for each of them",
            do="decide on all rows: with routed.prompt.using(routed.prompt.decide(...)): ...",
        )
    if expand is None or times % expand:
        return verdict_BE.repeat_interleave(times, 0)
    return verdict_BE.repeat_interleave(expand, 0).repeat(times // expand, 1)


def _tokens_of(entry: Entry, given: Mapping[str, Any]) -> _Tokens:
    pair = _is_pair(entry.calls.model) and entry.part == "model"
    ids_name, embeds_name = ("decoder_input_ids", "decoder_inputs_embeds") if pair else _TOKENS
    ids, embeds = given.get(ids_name), given.get(embeds_name)
    mask = given.get("decoder_attention_mask" if pair else "attention_mask")
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        positions = None
    if not isinstance(mask, Tensor):
        mask = None
    for tokens in (ids, embeds):
        if isinstance(tokens, Tensor) and tokens.ndim > 1:
            return _Tokens(ids if tokens is ids else None, mask, positions, tokens.shape[0], tokens.shape[1])
    first = next((value for value in given.values() if isinstance(value, Tensor) and value.ndim > 1), None)
    outputs = given.get("encoder_outputs")
    if first is None and outputs is not None:
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return _Tokens(None, None, None, 1 if first is None else len(first), 1 if first is None else first.shape[1])


def _packed_lengths(given: Mapping[str, Any]) -> list[int] | None:
    """Lengths of the prompts that stand one after the other in the only row of a call, as their positions show."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    tokens = ids if ids is not None else given.get("inputs_embeds")
    filled = any(records.is_filled(state) for _, state in records.states_in(given))
    if not isinstance(tokens, Tensor) or len(tokens) != 1 or filled:
        return None
    ends = given.get("cu_seq_lens_q")
    if isinstance(ends, Tensor) and ends.ndim == 1 and int(ends[-1]) == tokens.shape[1]:
        lengths = ends.diff().tolist()
    elif given.get("attention_mask") is None and isinstance(positions, Tensor) and positions.shape == tokens.shape[:2]:
        starts = [0, *((positions[0].diff() != 1).nonzero()[:, 0] + 1).tolist(), tokens.shape[1]]
        lengths = [end - start for start, end in pairwise(starts)]
    else:
        return None
    return lengths if len(lengths) > 1 else None


def _kept(given: Mapping[str, Any]) -> slice | Tensor | None:
    """The tokens that the output head is given."""
    kept = given.get("logits_to_keep")
    return kept if isinstance(kept, Tensor) else slice(-kept, None) if kept else None


def _get(out: Any, name: str) -> Any:
    if isinstance(out, Mapping):
        return out.get(name)
    return getattr(out, name, None) if not isinstance(out, tuple) else (out[0] if name == "last_hidden_state" else None)


def _is_pair(model: Any) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _entries(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules that are called with prompts and hold routed layers, each with what it is; the model always."""
    encoder = model.get_encoder() if _is_pair(model) else None
    decoder = model.get_decoder() if _is_pair(model) else None
    parts = {id(module): "decoder" for module in (decoder.modules() if decoder is not None else ())}
    parts |= {id(module): "encoder" for module in (encoder.modules() if encoder is not None else ())}
    for module in model.modules():
        if module is model:
            yield module, "model"
        elif not isinstance(module, (RoutedLinear, nn.ModuleList, nn.ModuleDict)):
            takes = any(name in signature(type(module).forward).parameters for name in _TOKENS)
            if (takes or module is encoder) and any(isinstance(inner, RoutedLinear) for inner in module.modules()):
                yield module, parts.get(id(module), "model")
