"""Which layers will be routed, and everything that can be wrong with it, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from spectr.adapters import Expert, FactorShape
from spectr.adapters.base_names import named_base
from spectr.errors import CompositionError, did_you_mean, raise_together
from spectr.grouping import grouped
from spectr.layers.base_layers import ModelLayers
from spectr.layers.linear_layers import features, is_plain
from spectr.layers.parameters import parameter_layer
from spectr.layers.saved_module import saved_faults
from spectr.layers.swap import plain_modules
from spectr.library.needs import some_of
from spectr.ops import report_once
from spectr.routers.router import Router

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layers to route, in the model's order, each with the names of the experts that adapt it."""

    modules: Mapping[str, tuple[str, ...]]


def make_plan(
    model: nn.Module,
    experts: Sequence[Expert],
    router: Router,
    *,
    uncalled: Set[str] = frozenset(),
    changes_weights: bool = False,
) -> Plan:
    """Match experts to a model's layers.

    Args:
        model: The model.
        experts: The experts to match.
        router: Its requirements on ranks are checked.
        uncalled: Layers whose weights the model uses without calling them
            (:attr:`spectr.layers.weight_reads.WeightReads.outside`). They are not routed: zero updates there, as PEFT's
            training leaves them, are ignored.
        changes_weights: Whether other updates there are added to the weights. Then a prompt must have one expert.

    Raises:
        CompositionError: Experts adapt modules that the model does not have, that are not linear layers, or whose sizes
            differ (an adapter for another base model); they change layers that are not called, and
            ``changes_weights`` is false; or ranks differ although the combination needs equal ones. Lists all faults
            of all experts.
    """
    layers = {name: module for name, module in plain_modules(model) if name}
    base = ModelLayers(model)
    problems = united({expert.name: _faults(expert, layers, base, uncalled, changes_weights) for expert in experts})
    users = grouped((module, expert.name) for expert in experts for module in expert.shapes if module not in uncalled)
    problems += _combination_faults(experts, router)
    for need in router.needs:
        problems += need.problems(experts)
    raise_together("the experts do not fit this model", problems, CompositionError)
    return Plan(modules={name: tuple(sorted(users[name])) for name in _ordered(layers, users)})


def _ordered(layers: Mapping[str, nn.Module], users: Mapping[str, object]) -> list[str]:
    """Names of modules and parameters in the model's order; a parameter follows the module that holds it."""
    places = {name: place for place, name in enumerate(layers)}
    return sorted(users, key=lambda name: (places.get(name, places.get(name.rpartition(".")[0], 0)), name))


def _combination_faults(experts: Sequence[Expert], router: Router) -> list[CompositionError]:
    """Faults of a combination that needs more of each module's experts than their shares' ``A`` and ``B``."""
    fused = [expert.name for expert in experts if any(shape.matrices for shape in expert.shapes.values())]
    if not fused or not (router.combination.prepare or router.combination.raw):
        return []
    return [
        CompositionError(
            f"combine={router.combine!r}, but fused parameters are adapted by {some_of(fused, _SHOWN)}",
            expected="a combination of the router's own factors, such as 'outputs' or 'ties'",
            do="omit combine",
        )
    ]


class Fault(NamedTuple):
    """What is wrong with an expert, as text that follows its name."""

    what: str
    expected: str
    do: str


def _faults(
    expert: Expert, layers: Mapping[str, nn.Module], base_layers: ModelLayers, uncalled: Set[str], changes_weights: bool
) -> list[Fault]:
    missing, strange, unfit = [], [], []
    for module, shape in expert.shapes.items():
        if module in uncalled:
            continue
        layer = layers.get(module) or parameter_layer(layers, module)
        if layer is None:
            holder = _holder(layers, module)
            (strange if holder else missing).append(module + holder)
            continue
        sizes = features(layer)
        if sizes is None:
            strange.append(f"{module} ({type(layer).__name__})")
        elif sizes != (shape.inputs, shape.outputs):
            unfit.append(f"{module} ({shape.inputs} -> {shape.outputs}, here {sizes.inputs} -> {sizes.outputs})")
    for module, parts in expert.saved.items():
        if module not in layers:
            missing.append(module)
        else:
            unfit += [f"{module} ({fault})" for fault in saved_faults(layers[module], parts)]
    base = f"; {named_base(expert.base_model)}" if expert.base_model else ""
    found = []
    if expert.left_out and not expert.modules:
        found.append(
            Fault(
                f"adapts nothing in this model: its configuration targets none of the modules in its file "
                f"({some_of(list(expert.left_out), _SHOWN)})",
                "target_modules that match names of this model",
                "correct target_modules in its adapter_config.json",
            )
        )
    if missing:
        found.append(
            Fault(
                f"adapts {some_of(missing, _SHOWN, ' modules')} that this model does not have",
                f"modules of this model ({did_you_mean_module(missing[0], layers)}){base}",
                "load the base model that the adapter was trained on, in the same class",
            )
        )
    if strange:
        found.append(
            Fault(
                f"adapts {some_of(strange, _SHOWN, ' modules')}, which are not linear layers that can be routed",
                "layers that the model calls, mapping (..., inputs) to (..., outputs)",
                "retrain it without these modules",
            )
        )
    if unfit:
        found.append(
            Fault(
                f"does not fit the sizes of {some_of(unfit, _SHOWN, ' modules')}",
                f"an adapter for this base model{base}",
                "omit the expert, or load its base model, with the same numbers of labels and tokens",
            )
        )
    changed = _changed(expert, base_layers, sorted(uncalled & expert.shapes.keys()))
    changed = [m for m in changed if not (changes_weights and can_change(layers[m], expert.shapes[m]))]
    return [*found, uncalled_fault(changed)] if changed else found


def _holder(layers: Mapping[str, nn.Module], name: str) -> str:
    """The module whose parameter has this name, as text; empty if there is none."""
    module, _, parameter = name.rpartition(".")
    holder = layers.get(module)
    return f" (a parameter of {type(holder).__name__})" if holder and parameter in holder._parameters else ""


def _changed(expert: Expert, base: ModelLayers, modules: Sequence[str]) -> list[str]:
    """Those of these modules whose weights an expert changes; that it has updates of zero at the others is reported."""
    if not modules:
        return []
    with expert.open_on(base) as read:
        changed = [module for module in modules if not read(module).is_zero]
    if len(changed) < len(modules):
        report_once(
            f"expert '{expert.name}' has updates of zero at {len(modules) - len(changed)} layers whose weights this "
            "model uses without calling them; they are left out"
        )
    return changed


def can_change(layer: nn.Module, shape: FactorShape) -> bool:
    """Whether the weight that a model reads of a layer can be one with an expert's update: plain LoRA of a matrix."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not is_plain(weight):
        return False
    sizes = (shape.outputs, shape.inputs) if isinstance(layer, nn.Linear) else (shape.inputs, shape.outputs)
    return tuple(weight.shape) == sizes and not shape.parts.tensors


def uncalled_fault(modules: Sequence[str]) -> Fault:
    """The fault that an expert changes layers that are not called."""
    return Fault(
        f"changes {some_of(modules, _SHOWN, ' layers')}, whose weights this model uses without calling the layer",
        "plain LoRA of linear layers, and one expert for a whole prompt; without merging PEFT has no effect there",
        "use Calibrated() or Oracle(expert=...); or leave these layers out (train without them, spectr extract "
        "--called-only), or merge it into the weights: spectr merge NAME --method average --into-base",
    )


def united(faults: Mapping[str, Sequence[Fault]]) -> list[CompositionError]:
    """One error for each different fault, with the names of all experts that have it."""
    names = grouped((fault, name) for name, found in faults.items() for fault in found)
    return [
        CompositionError(
            f"expert '{who[0]}' {fault.what}" if len(who) == 1 else f"experts {', '.join(who)}: each {fault.what}",
            expected=fault.expected,
            do=fault.do,
        )
        for fault, who in names.items()
    ]


def did_you_mean_module(name: str, layers: Mapping[str, nn.Module]) -> str:
    """A hint: the model's name of such a module."""
    last = name.rpartition(".")[2]
    alike = [layer for layer in layers if layer.rpartition(".")[2] == last]
    return f"it has {alike[0]}" if alike else did_you_mean(last, {layer.rpartition(".")[2] for layer in layers})
