"""Where a call's tokens are among the inputs of each layer: from known layouts, or by tracking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from spectr.layers.batch_routing import BASE, BatchRouting, routed_by
from spectr.layers.eval_mode import eval_mode
from spectr.layers.pairs import LayerInput
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.token_layout import Layouts, TokenPlaces, few_tokens
from spectr.layers.token_tracking import TokenTracker
from spectr.layers.tracking_rules import RULES
from spectr.prompts.arguments import TOKENS, CallTokens, names_of, tokens_of
from spectr.prompts.inputs_of_rows import InputRows, rows_of_input

See = Callable[[str, LayerInput, Int[Tensor, " N"], int], None]

_DECODER = tuple(f"decoder_{name}" for name in TOKENS)


def places_of(
    layouts: Layouts,
    run: Callable[..., Any],
    names: tuple[str, ...],
    given: Mapping[str, Any],
    tokens: CallTokens,
    module: Any,
    *,
    both: bool = False,
    inner: bool = False,
    positions: bool = False,
) -> TokenPlaces:
    """Where a call's tokens are. Unknown layouts are learned with a few tokens.

    Args:
        layouts: Layouts of the relevant layers.
        run: The module's own ``forward``.
        names: Its parameters.
        given: The call's arguments by name.
        tokens: The call's tokens.
        module: The module that is called; its configuration names the tokens that stand for images.
        both: Whether it runs an encoder and a decoder; then ``tokens`` are the decoder's.
        inner: Whether it is such a decoder, which needs an encoder's outputs.
        positions: Whether the tokens' positions matter too, not only their rows.
    """
    few = None if inner else _few(given, names, module, both)
    if few is not None:
        with routed_by(BASE):
            layouts.learn(module, run, few)
    others = _others(given, tokens, both or inner, getattr(module, "config", None))
    certain = all(found.certain and found.row_N is not None for found in others.values())
    fixed = certain and layouts.are_fixed(positions=positions and few is not None)
    tracker = None if fixed else _marked(given, tokens, both or inner, others)
    known = layouts.known if certain else layouts.of_text
    return TokenPlaces(known, tokens.rows, tokens.count, tracker, layouts.paired)


def learn_rows(layouts: Layouts, entry: Any, ids_BT: Tensor) -> None:
    """Learn where tokens are among the layers' inputs, by two rows of a few tokens that an entry of a model reads."""
    few = {"input_ids": few_tokens(ids_BT), "use_cache": False}
    with routed_by(BASE):
        layouts.learn(entry.module, entry.plain, {name: value for name, value in few.items() if name in entry.names})


def places_in_row(
    layouts: Layouts, given: Mapping[str, Any], routing: BatchRouting | None, entry: Any = None
) -> TokenPlaces:
    """Where the tokens of several requests are, one request after the other in the only row of a call.

    Args:
        layouts: Layouts of the relevant layers.
        given: The call's arguments by name.
        routing: The call's routing. If tokens share their weights, no token has to be tracked.
        entry: The entry that is called, by which unknown layouts are learned; if left out they are tracked.
    """
    ids_1T, tracker = given["input_ids"], None
    tokens = ids_1T.shape[1]
    if entry is not None:
        learn_rows(layouts, entry, ids_1T)
    if routing is not None and routing.by_token and not layouts.are_fixed(positions=True):
        tracker = TokenTracker(1, tokens, RULES)
        tracker.mark_tokens(ids_1T)
    return TokenPlaces(layouts.known, 1, tokens, tracker, layouts.paired)


def followed(layouts: Layouts, places: TokenPlaces | None) -> AbstractContextManager[None]:
    """The context that a call runs in, with its tracker if it has one."""
    tracker = None if places is None else places.tracker
    return nullcontext() if tracker is None else layouts.following(tracker)


def _few(given: Mapping[str, Any], names: tuple[str, ...], module: Any, both: bool) -> dict[str, Any] | None:
    """Arguments with only a few tokens; ``None`` if the call has no tokens, or the module reads no text alone."""
    found = (given.get(name) for name in (*TOKENS, *_DECODER))
    tokens = next((value for value in found if isinstance(value, Tensor) and value.ndim > 1), None)
    if tokens is None:
        return None
    name, few = TOKENS[int(tokens.is_floating_point())], few_tokens(tokens)
    if name not in names:
        return None
    read: dict[str, Any] = {name: few}
    if both:
        read[f"decoder_{name}"] = few.clone()
    if not read.keys() >= _needed(type(module)):
        return None
    return {**read, "use_cache": False} if "use_cache" in names else read


@lru_cache(maxsize=64)
def _needed(kind: type[nn.Module]) -> frozenset[str]:
    """Arguments that modules of a class cannot be called without, such as images. Cached, as each step asks for it."""
    _, *parameters = signature(kind.forward).parameters.values()
    free = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return frozenset(each.name for each in parameters if each.default is Parameter.empty and each.kind not in free)


def _others(given: Mapping[str, Any], tokens: CallTokens, decoder: bool, config: Any) -> dict[str, InputRows]:
    """What a call is given besides its text (images, an encoder's outputs), by the rows that it belongs to."""
    found, main = {}, _DECODER if decoder else TOKENS
    for name, value in given.items():
        tensor = _tensor(name, value)
        if (
            tensor is None
            or tensor.ndim < 2
            or (name in main and tuple(tensor.shape[:2]) == (tokens.rows, tokens.count))
        ):
            continue
        if name in (*TOKENS, *_DECODER, "encoder_outputs"):
            found[name] = InputRows(torch.arange(tokens.rows) if len(tensor) == tokens.rows else None, certain=True)
        elif tensor.is_floating_point() and "mask" not in name:
            found[name] = rows_of_input(name, tensor, tokens.ids, config, tokens.rows)
    return found


def _tensor(name: str, value: Any) -> Tensor | None:
    value = value[0] if name == "encoder_outputs" and not isinstance(value, Tensor) and value else value
    return value if isinstance(value, Tensor) else None


def _marked(
    given: Mapping[str, Any], tokens: CallTokens, decoder: bool, others: Mapping[str, InputRows]
) -> TokenTracker:
    """A tracker of the call's tokens, and of the rows of what else it is given."""
    certain = all(found.certain and found.row_N is not None for found in others.values())
    assumed = any(not found.certain and found.row_N is not None for found in others.values())
    tracker = TokenTracker(tokens.rows, tokens.count, RULES, certain=certain, assumed=assumed)
    main = _DECODER if decoder else TOKENS
    for name, value in given.items():
        tensor = _tensor(name, value)
        if tensor is None:
            continue
        if name in others:
            row_N = others[name].row_N
            if row_N is not None:
                tracker.mark_rows(tensor, row_N)
        elif name in main and tensor.ndim > 1:
            tracker.mark_tokens(tensor)
    return tracker


def read_tokens(
    entry: Any,
    layouts: Layouts,
    names: Mapping[nn.Module, str],
    see: See,
    given: Mapping[str, Any],
    counted_BT: Bool[Tensor, "B T"] | None,
) -> None:
    """Run the base model on this input, without dropout.

    Args:
        entry: The module that is called.
        layouts: Layouts of the modules.
        names: The modules whose inputs are wanted, and the names to report.
        see: Receives, for each of them that is called, its name, its input at the counted tokens, each token's row, and
            the number of rows. For a module that is called several times, all inputs at once.
        given: The call's arguments by name.
        counted_BT: The counted tokens; by default all.
    """
    tokens, names_of_entry = tokens_of(given, decoder=False), names_of(entry.forward, getattr(entry, "config", None))
    places = places_of(layouts, entry.forward, names_of_entry, given, tokens, entry, positions=counted_BT is not None)
    counted_BT = None if counted_BT is None else counted_BT.cpu()
    found_in: dict[str, list[tuple[Any, Tensor]]] = {}

    def observe(module: nn.Module, x: LayerInput) -> None:
        found = places.counted(module, x, counted_BT) if module in names else None
        if found is None or not len(found[1]):
            return
        if isinstance(found[0], Tensor) and (module in layouts.repeated or places.is_followed(module)):
            found_in.setdefault(names[module], []).append(found)
        else:
            see(names[module], *found, tokens.rows)

    with eval_mode(entry), _observed(names, observe), followed(layouts, places):
        entry.forward(**given)  # not __call__: hooks on the model must not see this call
    for name, parts in found_in.items():
        x_NI, row_N = (torch.cat(some) for some in zip(*parts, strict=True))
        see(name, x_NI, row_N, tokens.rows)


@contextmanager
def _observed(modules: Iterable[nn.Module], observe: Callable[[nn.Module, LayerInput], None]) -> Iterator[None]:
    """Routed layers compute as the base model and report their inputs; other modules are watched with hooks."""
    others = [module for module in modules if not isinstance(module, RoutedLinear)]
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: observe(module, args[0] if args else kwargs["input"]), with_kwargs=True
        )
        for module in others
    ]
    try:
        with routed_by(BatchRouting(base_only=True, observe=observe)):
            yield
    finally:
        for handle in handles:
            handle.remove()
