"""From what adapters hold besides factors to the modules that stand in a composed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from spectr.adapters import Expert, SavedParts
from spectr.errors import CompositionError, raise_together, some_of
from spectr.grouping import grouped
from spectr.layers.base_layers import ModelLayers
from spectr.layers.linear_layers import placement
from spectr.layers.plan import uncalled_fault, united
from spectr.layers.saved_module import SavedModule, SavedTensors
from spectr.layers.swap import plain_modules
from spectr.routers import Router
from spectr.routers.router import takes_one

_SHOWN = 3
Read = Callable[[str], Tensor]


def saved_modules(
    model: nn.Module, experts: Mapping[str, Expert], router: Router, uncalled: Set[str] = frozenset()
) -> dict[str, SavedModule]:
    """What takes the place of modules that experts have trained; what equals the base model's is left alone.

    Args:
        model: Composed or not; nothing is changed.
        experts: Those that the model will hold. They fit it (:func:`spectr.layers.make_plan`).
        router: Decides.
        uncalled: Modules whose weights the model uses without calling them
            (:attr:`spectr.layers.weight_reads.WeightReads.outside`). Updates by factors are computed here too.

    Raises:
        CompositionError: The router mixes experts, and some of them have trained modules; or these are not called,
            and are more than a weight.
        AdapterError: A tensor holds NaN or infinity.
    """
    bases = dict(plain_modules(model))
    found: dict[str, dict[str, SavedTensors]] = {}
    with ExitStack() as files, torch.no_grad():
        for name, expert in experts.items():
            read = files.enter_context(expert.open_saved())
            for module, tensors in _tensors_of(expert, bases, model, read).items():
                found.setdefault(module, {})[name] = tensors
            for module, tensors in _changes(expert, bases, model, uncalled).items():
                found.setdefault(module, {})[name] = tensors
    users = grouped(
        (name, module)
        for module in sorted(uncalled & found.keys())
        for name, tensors in found[module].items()
        if isinstance(bases[module], nn.Embedding) and (tensors.tokens_N is not None or tensors.A_VR is not None)
    )
    problems = united({name: [uncalled_fault(modules)] for name, modules in users.items()})
    raise_together("the experts do not fit this model", problems, CompositionError)
    one = len(experts) == 1
    if not one:
        _check_scored(experts, router, uncalled)
    if found and not one and not takes_one(router):
        raise _mixed(found, router)
    only = next(iter(experts)) if one else None
    decided = router.policy is not None
    return {
        module: SavedModule(bases[module], tensors, only, decided=decided, is_read=module in uncalled)
        for module, tensors in found.items()
    }


def _changes(
    expert: Expert, bases: Mapping[str, nn.Module], model: nn.Module, uncalled: Set[str]
) -> dict[str, SavedTensors]:
    """By layer that is not called, the factors by which an expert changes its weight."""
    modules, found = sorted(uncalled & expert.shapes.keys()), {}
    if not modules:
        return {}
    with expert.open_on(ModelLayers(model)) as read:
        updates = {module: read(module) for module in modules}
    for module, update in updates.items():
        if not update.is_zero:
            base, (A_RI, B_OR, scale) = bases[module], update.factors
            pair = B_OR.float() * scale, A_RI.float().mT.contiguous()
            left, right = pair if isinstance(base, nn.Linear) else pair[::-1]
            weight = tensor_of(base, "weight")
            left, right = (_placed(factor, weight, base, model) for factor in (left, right))
            found[module] = SavedTensors(A_VR=left, B_DR=right)
    return found


def _check_scored(experts: Mapping[str, Expert], router: Router, uncalled: Set[str]) -> None:
    """Raise :class:`CompositionError` for experts without factors if the router chooses by factors."""
    alone = [name for name, expert in experts.items() if not expert.shapes.keys() - uncalled]
    if alone and (router.policy is None or router.policy.evidence.reads != "words"):
        raise CompositionError(
            f"{some_of(alone, _SHOWN, ' experts')} have no LoRA factors, and {router} chooses by these",
            expected="experts with factors, or a router that chooses by something else, such as Oracle(expert=...)",
            do="leave them out, or compose with a library of one of them alone",
        )


def _mixed(found: Mapping[str, Mapping[str, SavedTensors]], router: Router) -> CompositionError:
    names = sorted({name for tensors in found.values() for name in tensors})
    return CompositionError(
        f"{some_of(names, _SHOWN, ' experts')} have trained {some_of(list(found), _SHOWN, ' modules')} besides LoRA's "
        f"factors. {router} mixes experts, and such modules cannot be mixed",
        expected="a router that takes one expert for a whole prompt, such as Calibrated() or Oracle(expert=...)",
        do=f"compose with one of those, or with a library of '{names[0]}' alone; or leave these experts out",
    )


def _tensors_of(
    expert: Expert, bases: Mapping[str, nn.Module], model: nn.Module, read: Read
) -> dict[str, SavedTensors]:
    """By module what an expert has for it that differs from the base model's; a tensor is read where it is used."""
    found: dict[str, dict[str, Any]] = {}
    for module, parts in expert.saved.items():
        base = bases[module]
        for name, whole in parts.whole.items():
            own = tensor_of(base, name)
            value = read(whole.key)
            if _same(value, own):
                continue
            for holder, its in _sharing(bases, own) if whole.shared else _same_module(bases, base, name):
                placed = _placed(value, tensor_of(bases[holder], its), bases[holder], model)
                found.setdefault(holder, {}).setdefault("whole", {})[its] = placed
        for holder, values in _embedding(expert, module, parts, bases, model, read):
            found.setdefault(holder, {}).update(values)
    return {module: SavedTensors(**values) for module, values in found.items()}


def _embedding(
    expert: Expert, module: str, parts: SavedParts, bases: Mapping[str, nn.Module], model: nn.Module, read: Read
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Trained rows, also for a tied head unless it has its own; and factors."""
    if parts.rows is not None:
        weight = tensor_of(bases[module], "weight")
        tokens_N, order_N = torch.tensor(parts.rows.tokens).sort()
        rows_ND = read(parts.rows.key)[order_N]
        for holder, _ in _sharing(bases, weight):
            own = expert.saved.get(holder)
            if holder == module or own is None or own.rows is None:
                placed = _placed(rows_ND, weight, bases[holder], model)
                yield holder, {"tokens_N": tokens_N.to(placed.device), "rows_ND": placed}
    if parts.factors is not None:
        weight = tensor_of(bases[module], "weight")
        A_VR = read(parts.factors.key_A).mT.contiguous()
        B_DR = read(parts.factors.key_B).float() * parts.factors.scale
        placed = [_placed(factor, weight, bases[module], model) for factor in (A_VR, B_DR)]
        yield module, {"A_VR": placed[0], "B_DR": placed[1]}


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter or buffer."""
    found = module._parameters.get(name)
    found = module._buffers.get(name) if found is None else found
    assert found is not None, "the plan checks that it is there"
    return found


def _sharing(bases: Mapping[str, nn.Module], tensor: Tensor) -> list[tuple[str, str]]:
    """Modules that have this very tensor, each with its name there."""
    return [
        (module, name)
        for module, base in bases.items()
        for name, own in (*base._parameters.items(), *base._buffers.items())
        if own is tensor
    ]


def _same_module(bases: Mapping[str, nn.Module], base: nn.Module, name: str) -> list[tuple[str, str]]:
    return [(module, name) for module, other in bases.items() if other is base]


def _same(value: Tensor, own: Tensor) -> bool:
    """Whether a saved tensor is the base model's, in the file's dtype or in the model's."""
    if own.is_meta:
        return False
    value, own = value.detach(), own.detach().to(value.device)
    return torch.equal(value.to(own.dtype), own) or torch.equal(value, own.to(value.dtype))


def _placed(value: Tensor, own: Tensor, base: nn.Module, model: nn.Module) -> Tensor:
    device = placement(base, model)[0] if own.is_meta else own.device
    return value.to(device, own.dtype if value.is_floating_point() else value.dtype)
