"""Add a merge to the base model's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectr.composition.model_naming import naming_of
from spectr.errors import MergeError, SpectrError, collecting, raise_together, some_of
from spectr.layers import RoutedLinear, make_plan
from spectr.layers.linear_layers import is_plain
from spectr.layers.moe import FusedLinear
from spectr.layers.swap import layer_at
from spectr.library import ExpertLibrary
from spectr.merging.lowrank import LowRank
from spectr.merging.merge import MergedModule, Progress, merged_modules
from spectr.merging.recipe import Recipe, expert_faults
from spectr.routers import Uniform
from spectr.spectral.precision import without_autocast

_SHOWN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedBase:
    """A base model with a merge in its weights.

    Attributes:
        recipe: How it was made.
        change: By module name ``||delta|| / ||W||`` (Frobenius); infinite where the weight was zero.
        before: The original weights, while :meth:`undo` is possible.
    """

    recipe: Recipe
    change: Mapping[str, float]
    before: Mapping[nn.Module, Tensor]

    def undo(self) -> None:
        """Restore the layers' original weights.

        Raises:
            MergeError: The merge was made with ``undoable=False``.
        """
        if not self.before:
            raise MergeError("the original weights were not kept", do="merge with undoable=True, or load the model")
        _put_back(self.before)


@without_autocast()
@torch.no_grad()
def merge_into(
    model: nn.Module,
    library: ExpertLibrary,
    recipe: Recipe,
    *,
    undoable: bool = True,
    progress: Progress = lambda done, total: None,
) -> MergedBase:
    """Add the merge of experts to a model's weights, in place: the exact update, of any rank.

    The sum is computed in float32 and rounded to the weight's dtype. Both layouts of a weight are supported: (outputs,
    inputs), and that of transformers' ``Conv1D``.

    Args:
        model: A module with the experts' linear layers; unchanged if an error is raised (an error of a file that is
            read only then leaves it changed with ``undoable=False``).
        library: The library of the experts.
        recipe: The experts, and how to merge them.
        undoable: Keep the original weights as long as the result exists.
        progress: Called after each module with (modules done, total).

    Raises:
        MergeError: Experts are unknown, or the model's layers cannot take an update.
        CompositionError: The experts do not fit this model.
    """
    library = library.named_for(naming_of(model))
    raise_together("the experts cannot be merged into this model", into_faults(model, library, recipe), MergeError)
    before: dict[nn.Module, Tensor] = {}
    try:
        change = _added(model, merged_modules(library, recipe, progress), before, undoable)
    except BaseException:
        _put_back(before)
        raise
    return MergedBase(recipe=recipe, change=change, before=before)


def _added(
    model: nn.Module, merged: Iterator[MergedModule], before: dict[nn.Module, Tensor], undoable: bool
) -> dict[str, float]:
    """Add the updates to the weights, whose originals go into ``before``; returns :attr:`MergedBase.change`."""
    change: dict[str, float] = {}
    for module, delta, _, matrix in merged:
        if module not in change:
            layer = layer_at(model, module)
            weight, norm, square = _weight(layer), float(_weight(layer).float().norm()), 0.0
            if undoable:
                before[layer] = weight.data
            weight.data = weight.data.clone()
        place = weight.data if matrix is None else weight.data[matrix]
        update = _in_layout(layer, delta.dense() if isinstance(delta, LowRank) else delta).to(weight.device)
        square += float(update.norm()) ** 2
        change[module] = square**0.5 / norm if norm else math.inf
        place.copy_(place.to(torch.promote_types(weight.dtype, torch.float32)) + update)
    return change


def _put_back(before: Mapping[nn.Module, Tensor]) -> None:
    for layer, weight in before.items():
        _weight(layer).data = weight


def into_faults(model: nn.Module, library: ExpertLibrary, recipe: Recipe) -> list[SpectrError]:
    """All reasons why a merge cannot be added to a model's weights."""
    names = [*recipe.experts, *recipe.subtract]
    faults = expert_faults(library, recipe.experts, recipe.subtract, recipe.method.name)
    if faults:
        return faults
    if any(isinstance(module, RoutedLinear) for module in model.modules()):
        return [MergeError("the model is composed with experts", do="call routed.remove() first")]
    with collecting(faults):
        make_plan(model, [library[name] for name in names], Uniform())
    return faults or list(_weight_faults(model, sorted({m for name in names for m in library[name].shapes})))


def _weight_faults(model: nn.Module, modules: list[str]) -> Iterator[MergeError]:
    holders: dict[int, set[str]] = {}
    for name, layer in model.named_modules():
        for parameter in layer.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(name)
    layers = {name: layer_at(model, name) for name in modules}
    packed = [name for name, layer in layers.items() if not _takes_sum(layer)]
    if packed:
        yield MergeError(
            f"the weights of {some_of(packed, _SHOWN)} cannot be changed: they are quantised, or not in memory",
            expected="weights in float32, bfloat16 or float16",
            do="load the model unquantised and on one device, or merge into an adapter",
        )
    tied = [name for name in layers if name not in packed and len(holders[id(_weight(layers[name]))]) > 1]
    if tied:
        others = sorted(holders[id(_weight(layers[tied[0]]))] - {tied[0]})
        yield MergeError(
            f"{some_of(tied, _SHOWN)} shares its weight with {some_of(others, _SHOWN)}, which the merge would "
            "change too",
            expected="layers that share no weight",
            do="untie the weights, or merge into an adapter",
        )


def _takes_sum(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and is_plain(weight) and not weight.is_meta and weight.ndim in (2, 3)


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _in_layout(layer: nn.Module, delta: Tensor) -> Tensor:
    """The update (outputs, inputs) in the weight's layout: transformers' ``Conv1D`` uses (inputs, outputs)."""
    if isinstance(layer, FusedLinear):
        return delta.mT if layer.is_transposed else delta
    return delta if isinstance(getattr(layer, "in_features", None), int) else delta.mT
