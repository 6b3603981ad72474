"""A module that experts have trained as a whole, or rows and factors of an embedding, next to the base model's.

Legend: B rows of the batch, T tokens of a row, N trained tokens, D features, R rank, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.adapters import SavedParts
from spectr.errors import CompositionError
from spectr.layers.batch_routing import spread, thread
from spectr.layers.linear_layers import is_plain
from spectr.layers.names import take_names_of_base

_NO_PADDING = {"padding_idx": None, "max_norm": None}


class SavedTensors(NamedTuple):
    """What one expert holds for a module, on the module's device and in its dtype.

    Attributes:
        whole: By name, replacements of the module's own parameters and buffers.
        tokens_N: Token ids of trained rows, ascending.
        rows_ND: The trained rows of the weight.
        A_VR: An embedding's input factor, one row per token; or the left factor of a weight that the model reads.
        B_DR: Its output factor, including the scale: the update of the weight is ``A B^T``.
    """

    whole: Mapping[str, Tensor] = {}
    tokens_N: Int[Tensor, " N"] | None = None
    rows_ND: Float[Tensor, "N D"] | None = None
    A_VR: Float[Tensor, "V R"] | None = None
    B_DR: Float[Tensor, "D R"] | None = None

    def named(self) -> dict[str, Tensor]:
        """All tensors, by names that have no dots."""
        own = {field: getattr(self, field) for field in self._fields[1:]}
        return {**{f"whole_{k}": v for k, v in self.whole.items()}, **{k: v for k, v in own.items() if v is not None}}

    def remade(self, tensors: Mapping[str, Tensor]) -> SavedTensors:
        """The same with other tensors in the place of :meth:`named`."""
        own = {field: tensors.get(field) for field in self._fields[1:]}
        return SavedTensors({name: tensors[f"whole_{name}"] for name in self.whole}, **own)


class SavedModule(nn.Module):
    """``y = module of the row's expert (x)``; the base model's module for rows without one.

    It replaces its base module in the model, like :class:`spectr.layers.routed_linear.RoutedLinear`. Rows of a batch
    may have different experts.

    Args:
        base: The original module; never changed.
        tensors: By expert, what it holds for this module.
        only: The expert of all calls, if the model holds no other.
        decided: Whether decisions for whole prompts name the experts, so that a call without one is refused.
        is_read: Whether the model reads the weight without calling the module. All rows must use one expert then.
    """

    def __init__(
        self,
        base: nn.Module,
        tensors: Mapping[str, SavedTensors],
        only: str | None,
        *,
        decided: bool,
        is_read: bool = False,
    ):
        super().__init__()
        self.base = base
        self.experts, self.only, self.decided, self.is_read = tuple(tensors), only, decided, is_read
        self._tensors = dict(tensors)
        for number, own in enumerate(tensors.values()):
            for name, tensor in own.named().items():
                self.register_buffer(f"expert{number}_{name}", tensor, persistent=False)
        take_names_of_base(self)
        self.register_load_state_dict_post_hook(_prepared)
        self.train(base.training)

    def prepare(self) -> None:
        """Make the experts' modules again: tensors moved or were cast, or the base module changed."""
        for number, (name, own) in enumerate(self._tensors.items()):
            mine = {key: self._buffers[f"expert{number}_{key}"] for key in own.named()}
            self._tensors[name] = own.remade(mine)  # pyright: ignore[reportArgumentType]
        self._calls: dict[str, Callable[..., Any]] = {
            name: module_of(self.base, own) for name, own in self._tensors.items()
        }

    def train(self, mode: bool = True) -> SavedModule:
        """As ``nn.Module``."""
        super().train(mode)
        self.prepare()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> SavedModule:
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make their own."""
        return {key: value for key, value in vars(self).items() if key != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A new weight (as tying gives) goes to the base module."""
        self.base.register_parameter(name, param)
        self.prepare()

    def __getattr__(self, name: str) -> Any:
        """What the model reads of its own module: sizes, dtypes, weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            is_own = name in base._parameters or name in base._buffers
            return getattr(self._read() if is_own and self.__dict__.get("is_read") else base, name)

    def _read(self) -> Any:
        """What has the tensors of the expert that all rows hold."""
        chosen = self._chosen()
        if isinstance(chosen, Tensor):
            raise CompositionError(
                f"the model uses the weight of a {type(self.base).__name__} without calling it, experts have changed "
                "it, and rows hold experts of their own",
                expected="prompts of one expert in a batch",
                do="run prompts of different experts one at a time",
            )
        return self._of(chosen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module of the expert that each row holds."""
        chosen = self._chosen()
        if not isinstance(chosen, Tensor):
            return self._of(chosen)(*args, **kwargs)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise self._cannot("is given no tensor")
        numbers = self._spread(chosen, x).to(x.device)
        by_row = numbers.numel() == len(numbers) == len(x) and not any(True for _ in self.base.children())
        return self._by_rows(numbers.flatten(), args, kwargs) if by_row else self._by_tokens(numbers, args, kwargs)

    def _spread(self, chosen_BT: Tensor, x: Tensor) -> Tensor:
        """Rows' numbers so that they broadcast over the module's output."""
        rows, tokens = chosen_BT.shape
        if isinstance(self.base, nn.Embedding) and x.ndim == 2 and len(x) == 1 and rows > tokens == 1:
            return chosen_BT.view(rows, 1, 1)  # positions, which all rows share
        return spread(chosen_BT[..., None], self, x if x.is_floating_point() else x[..., None])

    def _chosen(self) -> str | Int[Tensor, "B T"] | None:
        """The expert of all rows, ``None`` for the base model's module; or numbers, -1 for that."""
        routing = thread.routing
        if routing is None:
            if self.decided:
                raise CompositionError(
                    "a module that experts have trained was called without a decision for its prompt",
                    expected="a call of the model, its inner decoder or its encoder, which reads the prompt first",
                    do="call the model; or decide yourself: with routed.prompt.using(routed.prompt.decide(...)): ...",
                )
            return self.only
        chosen_BT = routing.only_expert(self.experts)
        first = int(chosen_BT.flatten()[0])
        if bool((chosen_BT == first).all()):
            return None if first < 0 else self.experts[first]
        return chosen_BT

    def _of(self, expert: str | None) -> Callable[..., Any]:
        return self.base if expert is None else self._calls[expert]

    def _by_rows(self, numbers_B: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each expert computes its own rows."""
        out: Tensor | None = None
        for number in numbers_B.unique().tolist():
            rows = (numbers_B == number).nonzero()[:, 0]

            def part(value: Any, rows: Tensor = rows) -> Any:
                whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(numbers_B)
                return value[rows] if whole else value

            made = self._of(self._name(number))(*map(part, args), **{key: part(value) for key, value in kwargs.items()})
            if not isinstance(made, Tensor):
                raise self._cannot(f"gives a {type(made).__name__}")
            out = made.new_empty(len(numbers_B), *made.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, made)
        assert out is not None
        return out

    def _by_tokens(self, numbers: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each expert computes all tokens, and its own are kept, where rows are not the first axis."""
        out: Tensor | None = None
        for number in numbers.unique().tolist():
            made = self._of(self._name(number))(*args, **kwargs)
            if not isinstance(made, Tensor) or made.ndim != numbers.ndim:
                raise self._cannot("gives something else than a number of features for each token")
            out = made if out is None else torch.where(numbers == number, made, out)
        assert out is not None
        return out

    def _name(self, number: int) -> str | None:
        return None if number < 0 else self.experts[number]

    def _cannot(self, why: str) -> CompositionError:
        return CompositionError(
            f"a {type(self.base).__name__} that experts have trained {why}, but rows use different experts",
            expected="a module that maps (..., inputs) to (..., outputs)",
            do="run prompts of different experts one at a time",
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows next to the base module."""
        return f"experts={len(self.experts)}"


def saved_faults(base: nn.Module, parts: SavedParts) -> Iterator[str]:
    """What of an expert's tensors does not fit a module."""
    own = {**base._parameters, **base._buffers}
    weight = own.get("weight")
    for name, whole in parts.whole.items():
        there = own.get(name)
        if there is None or tuple(there.shape) != whole.shape:
            yield f"{name} of shape {whole.shape}, here {'none' if there is None else tuple(there.shape)}"
        elif there.is_floating_point() and not is_plain(there):
            yield f"{name}, which is quantised here"
    sizes = None if weight is None else tuple(weight.shape)
    factors, rows = parts.factors, parts.rows
    if factors is not None and (not isinstance(base, nn.Embedding) or sizes != (factors.tokens, factors.features)):
        yield f"an embedding of {factors.tokens} tokens and {factors.features} features, here {sizes}"
    count, features = sizes if sizes is not None and len(sizes) == 2 else (0, 0)
    if rows is not None and not (features == rows.features and max(rows.tokens, default=0) < count):
        yield f"trained rows up to {max(rows.tokens, default=0)} of {rows.features} features, here {sizes}"
    if (factors is not None or rows is not None) and weight is not None and not is_plain(weight):
        yield "its weight is quantised here"


def _prepared(module: nn.Module, _: Any) -> None:
    assert isinstance(module, SavedModule)
    module.prepare()


def module_of(base: nn.Module, own: SavedTensors) -> Callable[..., Any]:
    """What computes as the base module would with an expert's tensors; shares all others with it."""
    whole = with_tensors(base, own.whole) if own.whole else base
    if own.tokens_N is not None:
        assert own.rows_ND is not None
        made = _with_rows if isinstance(base, nn.Embedding) else _with_outputs
        return made(whole, own.tokens_N, own.rows_ND)
    if own.A_VR is not None:
        assert own.B_DR is not None
        if not isinstance(base, nn.Embedding):
            return _Changed(base, own.A_VR, own.B_DR)
        return _with_factors(whole, own.A_VR, own.B_DR)
    return whole


class _Changed:
    """A linear layer with the weight ``W + A B^T``, which is made whenever it is read."""

    def __init__(self, base: nn.Module, A_VR: Tensor, B_DR: Tensor):
        self._base, self._factors = base, (A_VR, B_DR)

    @property
    def weight(self) -> Tensor:
        weight: Any = self._base.weight
        A_VR, B_DR = self._factors
        return weight + (A_VR @ B_DR.mT).to(weight.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return with_tensors(self._base, {"weight": self.weight})(*args, **kwargs)


def with_tensors(base: nn.Module, tensors: Mapping[str, Tensor], **attributes: Any) -> nn.Module:
    """A module like this one with some other parameters and buffers, which shares the rest and its submodules.

    Raises:
        CompositionError: It has more parameters than these, and other code (accelerate) moves them for each call.
    """
    other = copy.copy(base)
    if vars(other).pop("forward", None) is not None and not base._parameters.keys() <= tensors.keys():
        raise CompositionError(
            f"experts have trained a part of a {type(base).__name__}, but its weights are moved for each call",
            expected="a model without offloading",
            do="load it onto one device",
        )
    mine = {name: tensor for name, tensor in tensors.items() if name in base._parameters}
    vars(other)["_parameters"] = {**base._parameters, **mine}
    vars(other)["_buffers"] = {**base._buffers, **{name: tensors[name] for name in tensors.keys() - mine.keys()}}
    vars(other).update(attributes)
    return other


def _with_rows(base: nn.Module, tokens_N: Tensor, rows_ND: Tensor) -> Callable[..., Tensor]:
    """An embedding with trained rows: tokens among these are looked up there, in the base module's own way."""
    trained = with_tensors(base, {"weight": rows_ND}, **_NO_PADDING)

    def embed(input: Tensor) -> Tensor:
        place = torch.searchsorted(tokens_N, input.to(tokens_N.dtype).contiguous()).clamp(max=len(tokens_N) - 1)
        return torch.where((tokens_N[place] == input)[..., None], trained(place), base(input))

    return embed


def _with_outputs(base: nn.Module, tokens_N: Tensor, rows_ND: Tensor) -> Callable[..., Tensor]:
    """A head that is tied to an embedding with trained rows: these are rows of its weight."""

    def head(input: Tensor) -> Tensor:
        out = base(input)
        return out.index_copy(-1, tokens_N, linear(input, rows_ND).to(out.dtype))

    return head


def _with_factors(base: nn.Module, A_VR: Tensor, B_DR: Tensor) -> Callable[..., Tensor]:
    """An embedding with LoRA: ``base(t) + B A[t]``, ``A[t]`` looked up in the base module's own way."""
    factor = with_tensors(base, {"weight": A_VR}, **_NO_PADDING)
    return lambda input: base(input) + linear(factor(input), B_DR)
