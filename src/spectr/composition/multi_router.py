"""One model composed by several routers at once, which share its weights and what their factors have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from spectr.composition.routed import Routed
from spectr.errors import CompositionError, some_of
from spectr.layers.multi_routed import MultiRoutedLinear
from spectr.layers.routed import RoutedLinear
from spectr.layers.saved import SavedModule
from spectr.layers.swap import swap_module
from spectr.lazy import lazy


class MultiRouter:
    """A model whose tokens each go through the composition of one of several routers.

    Each router composes a copy of the model, modules of its own around the same weights, so that it is what
    :func:`compose` made it, whatever the others are. In the model itself a
    :class:`spectr.layers.multi_routed.MultiRoutedLinear` takes each token to its router's layer. A single router
    composes the model itself.

    Args:
        model: Is called for the tokens of all routers.
        makers: By a router's name, for clients, what composes the model that it is given; the first is the default.

    Attributes:
        compositions: By name the routers' own handles.

    Raises:
        CompositionError: The routers do not hold the same experts, or a composition fails. The model is as before.
    """

    def __init__(self, model: nn.Module, makers: Mapping[str, Callable[[nn.Module], Routed]]):
        self.model, self._multi_routed = model, dict[str, MultiRoutedLinear]()
        self.compositions: dict[str, Routed] = {}
        for name, make in makers.items():
            self.compositions[name] = make(weight_sharing_copy(model) if len(makers) > 1 else model)
            check_alike({name: routed.experts for name, routed in self.compositions.items()})
            self._share(name)
        self._check_factors_alone()
        self._place()

    def _check_factors_alone(self) -> None:
        """Raise :class:`CompositionError` where several routers would need trained modules of experts."""
        for name, routed in self.compositions.items():
            if len(self.compositions) > 1 and any(isinstance(m, SavedModule) for m in routed.model.modules()):
                raise CompositionError(
                    f"several routers are to share the model, and with '{name}' experts have trained modules besides "
                    "LoRA's factors",
                    expected="one router, which takes one expert a prompt",
                    do="serve with one router",
                )

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that can be chosen now, in alphabetical order."""
        return next(iter(self.compositions.values())).experts

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the routed layers, in the model's order."""
        return tuple(next(iter(self.compositions.values())).layers)

    @property
    def bytes(self) -> dict[str, int]:
        """What each router's experts take of memory, less what a router before it has too."""
        seen: set[int] = set()
        taken = {}
        for name, routed in self.compositions.items():
            tensors = {t.data_ptr(): t.nbytes for layer in routed.layers.values() for t in _held(layer).values()}
            taken[name] = sum(size for place, size in tensors.items() if place not in seen)
            seen |= set(tensors)
        return taken

    def refresh(self) -> None:
        """Take to the layers that the routers have now; to be called when one of them has changed its own."""
        for name in self.compositions:
            self._share(name)
        self._place()

    def _place(self) -> None:
        routed = list(self.compositions.values())
        if len(routed) == 1:
            return
        layers = [one.layers for one in routed]
        _check_modules(self.model, layers[0])
        for module in set(self._multi_routed) - set(layers[0]):
            swap_module(self.model, module, self._multi_routed.pop(module).base)
        for module in layers[0]:
            base = self._multi_routed[module].base if module in self._multi_routed else self.model.get_submodule(module)
            layer = self._multi_routed[module] = MultiRoutedLinear(base, [own[module] for own in layers])
            swap_module(self.model, module, layer)

    def _share(self, name: str) -> None:
        """Keep what this router's layers have in common with those of the routers before it once."""
        before = list(self.compositions)[: list(self.compositions).index(name)]
        for other in before:
            theirs = self.compositions[other].layers
            for module, layer in self.compositions[name].layers.items():
                layer.share(theirs[module])


def check_alike(held: Mapping[str, Sequence[str]]) -> None:
    """Raise :class:`CompositionError` for a router that holds other experts than the first of them does."""
    (first, experts), *others = held.items()
    for name, found in others:
        if tuple(found) != tuple(experts):
            raise CompositionError(
                f"router '{name}' holds {', '.join(found)}, and router '{first}' {', '.join(experts)}",
                expected="routers that hold the same experts, so that every request's set can be answered by each",
                do=f"leave '{name}' out; one expert alone can be asked for with any router",
            )


def _check_modules(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise :class:`CompositionError` for layers that are parameters of the model and no modules."""
    modules = dict(model.named_modules())
    parameters = [name for name in layers if name not in modules]
    if parameters:
        raise CompositionError(
            f"several routers at once, and experts adapt parameters of a mixture of experts ({some_of(parameters, 3)})",
            expected="one router for a model whose parameters are routed",
            do="name one router, or leave these experts out",
        )


def weight_sharing_copy(model: nn.Module) -> nn.Module:
    """The same weights in modules and parameters of their own.

    What is put in the place of one is not seen by the other, nor whether its weights are frozen, as PEFT does: a frozen
    layer is another product for torch, which may copy its weights for it first.
    """
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        plain = type(weight) is nn.Parameter
        shared[id(weight)] = nn.Parameter(weight.detach(), weight.requires_grad) if plain else weight
    return copy.deepcopy(model, shared)


def _held(layer: RoutedLinear) -> dict[str, Tensor]:
    return dict(layer.named_buffers(recurse=False))


__getattr__ = lazy(__name__, {}, renamed={"Several": "MultiRouter", "twin": "weight_sharing_copy"})
