"""Which linear layers' weights a model uses without calling the layer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode

from spectr.layers.linear_layers import features
from spectr.layers.shared_context import SharedContext

# Of these, only the first argument's numbers are in the result, or none.
_LIKE_ANOTHER = frozenset(("to", "type_as", "view_as", "expand_as", "reshape_as"))
_SIZES_ALONE = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint"))
_SIZES_ALONE |= {f"new_{kind}" for kind in ("zeros", "ones", "empty", "full")}
_NUMBER = re.compile(r"\d+")


class WeightReads(TorchFunctionMode):
    """Follows the weights of a model's linear layers and embeddings through what this thread computes in the block.

    A weight that meets another tensor outside of its layer's own ``forward`` is used without the layer: what stands in
    for the layer has no effect there. To read a weight's dtype is no use of it. What is made of weights alone
    (transposed or joined ones) is followed on. Nothing is put into the model.

    Args:
        model: Its linear layers and embeddings are followed.

    Attributes:
        called: Names of the layers whose weights their own ``forward`` used.
        outside: Names of those whose weights were used outside of it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.called: set[str] = set()
        self.outside: set[str] = set()
        self._owners: dict[int, list[nn.Module]] = {}
        self._layers: dict[int, set[str]] = {}  # by weight, the names of its layers
        self._made: dict[int, tuple[Tensor, frozenset[int]]] = {}  # what was made of weights alone; holds it in memory
        moved = any(hasattr(module, "_hf_hook") for module in model.modules())
        for name, module in model.named_modules():
            linear = features(module) is not None
            for weight in module.parameters(recurse=linear):
                self._owners.setdefault(id(weight), []).append(module)
                kept_elsewhere = weight.is_meta and moved  # accelerate replaces them for a call
                if (linear or isinstance(module, nn.Embedding)) and weight.ndim > 1 and not kept_elsewhere:
                    self._layers.setdefault(id(weight), set()).add(name)
            if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention never calls its own
                self.outside.add(name)

    def unknown(self, names: Iterable[str]) -> set[str]:
        """Those of these layers whose use was not seen, nor that of a layer at the same place of another block."""
        seen = {_place(name) for name in (*self.called, *self.outside)}
        return {name for name in names if _place(name) not in seen}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _SIZES_ALONE:
            return out
        given = _tensors(args[:1] if name in _LIKE_ANOTHER else (args, kwargs))
        weights = [self._weights(tensor) for tensor in given]
        if not any(weights):
            return out
        used = frozenset(weight for some in weights for weight in some if not self._is_inside(weight))
        if used and all(weights):
            self._made.update((id(made), (made, used)) for made in _tensors(out))
        else:
            self.outside.update(name for weight in used for name in self._layers[weight])
        return out

    def _weights(self, tensor: Tensor) -> frozenset[int]:
        """The linear layers' weights that a tensor is, or was made of."""
        if id(tensor) in self._layers:
            return frozenset([id(tensor)])
        made = self._made.get(id(tensor))
        return frozenset() if made is None else made[1]

    def _is_inside(self, weight: int) -> bool:
        """Whether a method of a module that has this weight runs now."""
        owners, frame = self._owners[weight], sys._getframe(1)
        while frame is not None:
            running = frame.f_locals.get("self")
            if any(running is owner for owner in owners):
                self.called |= self._layers[weight]
                return True
            frame = frame.f_back
        return False


_eager = SharedContext(lambda: torch.compiler.set_stance("force_eager"))


def uncompiled() -> AbstractContextManager[None]:
    """Have compiled models run as they are written, so that their calls can be followed. Holds for all threads."""
    # the compiler's import takes seconds, and without it nothing is compiled
    return _eager() if "torch._dynamo" in sys.modules else nullcontext()


def _place(name: str) -> str:
    return _NUMBER.sub("*", name)


def _tensors(value: Any) -> Iterable[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
