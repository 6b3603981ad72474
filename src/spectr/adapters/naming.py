"""Give an expert the module names of one model if its file uses other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from spectr.adapters.config import AdapterConfig
from spectr.adapters.expert import Expert, FactorShape
from spectr.adapters.fused_names import ParameterNames, fused_for
from spectr.adapters.targets import Targets
from spectr.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a model knows about its modules' names.

    Attributes:
        modules: The names of all modules.
        renamed: Current names by the names of older versions.
        heads: Modules that PEFT's ``all-linear`` skips: the output head.
        parameters: Its parameters that are not weights of linear layers; ``None`` if these do not matter.
    """

    modules: Collection[str]
    renamed: Callable[[str], str] = lambda name: name
    heads: Collection[str] = frozenset()
    parameters: ParameterNames | None = None

    def of(self, module: str) -> str:
        """The name of a module in the model; unchanged if the model has no such module."""
        if module in self.modules:
            return module
        new = self.renamed(module)
        return new if new in self.modules else module


def named_for(expert: Expert, naming: Naming) -> Expert:
    """An expert with a model's module names, restricted to the modules that its configuration targets there.

    PEFT matches targets, ranks and scales with the model's names, whatever the names in the file are.

    Raises:
        AdapterError: Two modules in the file are one module of the model; or see :func:`fused_for`.
    """
    config, found = expert.config, {**expert.shapes, **expert.left_out}
    names = {old: naming.of(old) for old in found}
    if config is None:
        return expert
    twice = [new for new, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise AdapterError(
            f"expert '{expert.name}' has factors of {twice[0]} twice: under this name and under an older one",
            expected="one pair of factors for a module",
            do="save the adapter again with PEFT",
        )
    shapes: dict[str, FactorShape] = {}
    left_out: dict[str, FactorShape] = {}
    for old, new in sorted(names.items(), key=lambda pair: pair[1]):
        place = shapes if _targeted(config.targets, old, new, naming) else left_out
        place[new] = found[old] if new == old else _rescaled(config, new, found[old])
    kept = {new: old for old, new in names.items() if new != old}
    saved = {naming.of(module): parts for module, parts in expert.saved.items()}
    named = replace(expert, shapes=shapes, saved=saved, left_out=left_out, file_names=kept)
    return named if naming.parameters is None else fused_for(named, naming.parameters)


def _targeted(targets: Targets, old: str, new: str, naming: Naming) -> bool:
    if targets.all_linear and new in naming.heads:
        return False
    if targets.tied and new in naming.heads:
        return True
    return targets.has(new) or (new != old and targets.lists(old) and targets.has(old))


def _rescaled(config: AdapterConfig, new: str, shape: FactorShape) -> FactorShape:
    """The scale of a renamed module: by its new name, unless only the old name gives the rank in the file."""
    return shape._replace(scale=config.scale_of(new)) if config.rank_of(new) == shape.file_rank else shape
