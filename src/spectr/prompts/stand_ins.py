"""Replacements of a composed model's methods, which give each call its decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import signature, unwrap
from itertools import count
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.compiler import is_compiling

from spectr.layers.batch_routing import routed_by, thread
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.layers.token_layout import tracking
from spectr.prompts import cache_records as records
from spectr.prompts.arguments import TOKENS, expanded, has_encoder, names_of, tokens_of
from spectr.prompts.decision import refuse_to_capture
from spectr.prompts.frames import frame_of
from spectr.prompts.token_places import followed

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls

_OURS = (RoutedLinear, SavedModule)
_CHECKPOINT = "_gradient_checkpointing_func"  # its attribute in transformers


class Entry:
    """Replaces the ``forward`` of a module that is called with prompts.

    Args:
        calls: Decides.
        module: The model, or its inner decoder or encoder.
        part: ``"model"``, ``"encoder"`` or ``"decoder"``.
    """

    def __init__(self, calls: Calls, module: nn.Module, part: str):
        self.calls, self.module, self.part = calls, module, part
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")  # such as accelerate's
        self.names = names_of(self, getattr(module, "config", None))

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``forward``."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(
            self.module, *args, **kwargs
        )  # Dynamo would take a bound method for this entry

    @property
    def __signature__(self) -> Any:
        return signature(self.own or type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        return unwrap(type(self.module).forward).__code__  # torch.export names the module's source by it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Like the module's own."""
        if thread.routing is not None or self.calls.closed or (is_compiling() and self.calls.prompt is None):
            return self.plain(*args, **kwargs)
        if torch.compiler.is_exporting():
            refuse_to_capture()
        return self.calls.run(self, args, kwargs)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class Images:
    """Replaces the method with which transformers encodes the images of a generation, ahead of its calls.

    Args:
        calls: Decides.
        model: The composed model.
    """

    name: ClassVar[str] = "_prepare_multimodal_encoder_kwargs_for_generation"

    def __init__(self, calls: Calls, model: Any):
        self.calls, self.model = calls, model

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own method."""
        return getattr(type(self.model), self.name).__get__(self.model)

    @property
    def __signature__(self) -> Any:
        return signature(self.plain)

    def __call__(self, model_kwargs: dict[str, Any]) -> Any:
        """Like the model's own, under the generation's decision."""
        calls, frame = self.calls, frame_of(self.calls)
        wanted = calls.wanted(frame)
        if calls.closed or calls.is_inside or frame is None or wanted is None:
            return self.plain(model_kwargs)
        given = {**model_kwargs, "input_ids": frame.ids_BT}
        tokens = tokens_of(given, decoder=False)
        routing = calls.routing(expanded(wanted, tokens.rows, None))
        places = calls.places(calls.entry, given, tokens, routing)
        if places is not None and places.tracker is not None and places.tracker.assumed and frame.ids_BT is not None:
            states = {name for name, _ in records.states_in(given)}
            read = {name: value for name, value in given.items() if name in calls.entry.names and name not in states}
            with torch.no_grad(), calls.inside(routing, places), followed(calls.layouts, places):
                calls.entry.plain(**{**read, "use_cache": False})  # images meet the text in a whole call alone
            places.tracker.assumed = False
        with calls.inside(routing, places), followed(calls.layouts, places):
            return self.plain(model_kwargs)


class Checkpointing:
    """Replaces the method with which transformers turns on gradient checkpointing.

    What is recomputed in the backward pass, possibly by another thread, is routed as before.
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
        """Like the model's own."""
        done = self.plain(*args, **kwargs)
        self.take()
        return done

    def take(self) -> None:
        """Make the modules' current checkpoint functions keep the decision."""
        for module in self.model.modules():
            own = vars(module).get(_CHECKPOINT)
            if own is not None and not isinstance(own, _Again):
                setattr(module, _CHECKPOINT, _Again(own))

    def leave(self) -> None:
        """Restore the modules' own functions."""
        for module in self.model.modules():
            again = vars(module).get(_CHECKPOINT)
            if isinstance(again, _Again):
                setattr(module, _CHECKPOINT, again.checkpoint)


class _Again:
    """A checkpoint function that routes its function equally whenever it runs."""

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing, places, kept = thread.routing, thread.places, thread.kept
        if not torch.is_grad_enabled():  # for example while a prompt is read for a decision
            return function(*args, **kwargs)

        tracker = None if places is None else places.tracker
        runs = count()

        def again(*given: Any, **more: Any) -> Any:
            recomputes = next(runs) > 0  # the call's tracker has ended by then
            with routed_by(routing, places, kept), tracking(tracker if recomputes else None):
                return function(*given, **more)

        return self.checkpoint(again if routing is not None else function, *args, **kwargs)


def entries_of(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules that are called with prompts and hold routed layers, each with its part; always the model."""
    encoder = model.get_encoder() if has_encoder(model) else None
    decoder = model.get_decoder() if has_encoder(model) else None
    parts = {id(module): "decoder" for module in (decoder.modules() if decoder is not None else ())}
    parts |= {id(module): "encoder" for module in (encoder.modules() if encoder is not None else ())}
    for module in model.modules():
        if module is model:
            yield module, "model"
        elif not isinstance(module, (*_OURS, nn.ModuleList, nn.ModuleDict)):
            takes = any(name in signature(type(module).forward).parameters for name in TOKENS)
            if (takes or module is encoder) and any(isinstance(inner, _OURS) for inner in module.modules()):
                yield module, parts.get(id(module), "model")
