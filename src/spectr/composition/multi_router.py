"""One model composed by several routers at once. They share its weights, and the parts of their factors that agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from spectr.composition.routed import Routed
from spectr.errors import CompositionError, some_of
from spectr.layers.multi_routed import MultiRoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.layers.swap import swap_module
from spectr.lazy import lazy


class MultiRouter:
    """A model where each token uses the composition of one of several routers.

    Each router composes its own copy of the model: other modules around the same weights. The copy is what
    :func:`compose` makes of it, independent of other routers. In the model itself, a
    :class:`spectr.layers.multi_routed.MultiRoutedLinear` sends each token to its router's layer. A single router
    composes the model itself.

    Args:
        model: Is called for the tokens of all routers.
        makers: By router name, a function that composes a given model; the first router is the default.

    Attributes:
        compositions: The routers' handles by name.

    Raises:
        CompositionError: The routers hold different experts, or a composition fails. The model is unchanged.
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
        """Raise :class:`CompositionError` if several routers would need experts' trained modules."""
        for name, routed in self.compositions.items():
            if len(self.compositions) > 1 and any(isinstance(m, SavedModule) for m in routed.model.modules()):
                raise CompositionError(
                    f"several routers cannot share the model: with '{name}', experts have trained modules besides "
                    "LoRA's factors",
                    expected="one router, which chooses one expert per prompt",
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
        """Memory of each router's experts, minus what an earlier router already holds."""
        seen: set[int] = set()
        taken = {}
        for name, routed in self.compositions.items():
            tensors = {t.data_ptr(): t.nbytes for layer in routed.layers.values() for t in layer.buffers(False)}
            taken[name] = sum(size for place, size in tensors.items() if place not in seen)
            seen |= set(tensors)
        return taken

    def refresh(self) -> None:
        """Use the routers' current layers; call this after a router changed its own."""
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
        """Share the parts of this router's layers that an earlier router holds already."""
        before = list(self.compositions)[: list(self.compositions).index(name)]
        for other in before:
            theirs = self.compositions[other].layers
            for module, layer in self.compositions[name].layers.items():
                layer.share(theirs[module])


def check_alike(experts_of: Mapping[str, Sequence[str]]) -> None:
    """Raise :class:`CompositionError` for a router that holds other experts than the first router."""
    (first, experts), *others = experts_of.items()
    for name, found in others:
        if tuple(found) != tuple(experts):
            raise CompositionError(
                f"router '{name}' holds {', '.join(found)}, but router '{first}' holds {', '.join(experts)}",
                expected="routers that hold the same experts, so that each can answer every request",
                do=f"omit '{name}'; requests can ask for one expert with any router",
            )


def _check_modules(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise :class:`CompositionError` for routed layers that are parameters instead of modules."""
    modules = dict(model.named_modules())
    parameters = [name for name in layers if name not in modules]
    if parameters:
        raise CompositionError(
            f"several routers cannot share the model: experts adapt MoE parameters ({some_of(parameters, 3)})",
            expected="one router for a model whose parameters are routed",
            do="use one router, or omit these experts",
        )


def weight_sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with the same weights in separate modules and parameters.

    Replacing a module or freezing weights in one copy does not affect the other. For torch a frozen layer is another
    product, for which it may first copy the weights.
    """
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        plain = type(weight) is nn.Parameter
        shared[id(weight)] = nn.Parameter(weight.detach(), weight.requires_grad) if plain else weight
    return copy.deepcopy(model, shared)


__getattr__ = lazy(__name__, {}, renamed={"Several": "MultiRouter", "twin": "weight_sharing_copy"})
