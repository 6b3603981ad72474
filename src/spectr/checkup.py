"""Check an adapter without loading its base model: what it is, and which modules would be routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectr.adapters import Expert, named_for, read_adapter
from spectr.adapters.base_names import likely_base, named_base, same_base
from spectr.adapters.expert import open_safetensors
from spectr.adapters.texts import check_text, text_remarks
from spectr.composition.find_weight_reads import find_weight_reads
from spectr.composition.naming import naming_of
from spectr.errors import SpectrError, some_of
from spectr.layers.linear import features
from spectr.layers.plan import make_plan
from spectr.models.fetch import DEFAULT_MODEL, HUB_ID
from spectr.routers import Oracle

_SHOWN = 3
ROUTES, IDLE, REFUSED, BASE_UNKNOWN = range(4)  # exit codes


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """The result of checking an adapter.

    Attributes:
        source: The folder or Hub id.
        kind: A description of its format.
        named: The base model in its configuration.
        likely: The Hub id that this name most likely means, if it is not a Hub id itself.
        base: The base model of the check; ``None`` if there is none on this machine.
        routed: Modules where experts will be routed.
        idle: Modules without effect, each with the reason.
        missing: Modules that the configuration targets but the file lacks.
        remarks: Further remarks.
        refused: Why it cannot be routed; ``None`` if it can.
    """

    source: str
    kind: str = ""
    named: str | None = None
    likely: str | None = None
    base: str | None = None
    routed: Sequence[str] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()
    remarks: Sequence[str] = ()
    refused: str | None = None

    @property
    def exit_code(self) -> int:
        """0: all of it is routed; 1: parts have no effect; 2: it is refused; 3: its base model is not known here."""
        if self.refused:
            return REFUSED
        if self.base is None:
            return BASE_UNKNOWN
        return IDLE if self.idle or self.missing else ROUTES


def check_adapter(source: str | Path, model: str | None = None) -> Checkup:
    """Check an adapter's configuration, its file's header and its factors, one tensor at a time.

    Args:
        source: A folder or Hub id.
        model: The base model; by default the one in the adapter's configuration. Only its configuration is read.

    Returns:
        The findings. An adapter that cannot be routed is a result, not an error.

    Raises:
        SpectrError: The given ``model`` is not on this machine.
    """
    result = Checkup(source=str(source))
    try:
        expert = read_adapter(source, "adapter", check_values=False)
        idle = dict.fromkeys(_zero(expert), "its update is zero")
    except SpectrError as error:
        return replace(result, refused=_words(error))
    likely = likely_base(expert.base_model) if expert.base_model else None
    result = replace(
        result,
        kind=_kind(expert),
        named=expert.base_model,
        likely=None if likely == expert.base_model else likely,
        idle=idle,
        routed=[module for module in expert.modules if module not in idle],
        remarks=text_remarks(expert.weights.parent, model or expert.base_model),
    )
    base = _configuration(model or expert.base_model)
    if base is None and model is not None:
        raise SpectrError(f"the base model {model} is not on this machine", do="pass its folder, or download it first")
    if base is None:
        return replace(result, idle={**idle, **_left_out(expert)})
    return _in_model(result, expert, base, model)


def _in_model(result: Checkup, expert: Expert, base: Any, model: str | None) -> Checkup:
    """The part of the check that needs the base model, on the meta device."""
    try:
        check_text(replace(expert, base_model=model or expert.base_model))
        shell = _shell(base)
        naming = naming_of(shell)
        named = named_for(expert, naming)
        uncalled = find_weight_reads(shell).outside
        make_plan(shell, [named], Oracle(expert=expert.name), uncalled=uncalled, changes_weights=True)
    except SpectrError as error:
        return replace(result, base=model or expert.base_model, refused=_words(error))
    new = {named.file_names.get(module, module): module for module in named.modules}
    idle = {new[module]: why for module, why in result.idle.items() if module in new} | _left_out(named)
    remarks = list(result.remarks)
    if model and expert.base_model and not same_base(model, expert.base_model):
        remarks.append(
            f"its sizes fit {model}, but {named_base(expert.base_model)}: check that they are the same model"
        )
    whole = sorted({*named.saved, *(uncalled & named.shapes.keys())} - idle.keys())
    if whole:
        remarks.append(f"changes {some_of(whole, _SHOWN)} as a whole: it needs a router that takes one expert a prompt")
    return replace(
        result,
        base=model or expert.base_model,
        idle=idle,
        routed=[module for module in named.modules if module not in idle],
        missing=_missing(named, shell, naming.heads),
        remarks=remarks,
    )


def _zero(expert: Expert) -> list[str]:
    """Modules whose update is zero; holds one tensor at a time in memory."""
    with open_safetensors(expert.weights, expert.name) as file:
        return [module for module in expert.shapes if not expert.is_alive(module, file.get_tensor)]


def _left_out(expert: Expert) -> dict[str, str]:
    return dict.fromkeys(expert.left_out, "the configuration does not target it, so PEFT ignores it")


def _missing(expert: Expert, model: nn.Module, heads: Any) -> list[str]:
    """Linear layers that the configuration targets but the file has no factors for."""
    if expert.config is None or expert.config.targets.modules is None:
        return []
    targets, there = expert.config.targets, {*expert.modules, *expert.left_out}
    linear = [name for name, module in model.named_modules() if features(module) and name not in there]
    return [name for name in linear if targets.has(name) and not (targets.all_linear and name in heads)]


def _kind(expert: Expert) -> str:
    ranks = "/".join(map(str, expert.ranks))
    factors = f"LoRA of rank {ranks} in {len(expert.shapes)} modules" if expert.shapes else "no LoRA factors"
    more = [*expert.kinds, *([f"trained {', '.join(expert.saved)}"] if expert.saved else [])]
    return ", with ".join([factors, *more]) + f"; {expert.parameters:,} parameters"


def _configuration(name: str | None) -> Any:
    """A base model's configuration, from its folder or the Hub's cache; ``None`` if it is in neither."""
    from transformers import AutoConfig

    if not name:
        return None
    if name in (DEFAULT_MODEL, HUB_ID):
        from spectr.atomic_write import cache_folder

        kept = cache_folder() / HUB_ID.rpartition("/")[2]
        name = str(kept) if kept.is_dir() else HUB_ID
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def _shell(config: Any) -> nn.Module:
    """A model on the meta device: all modules, no weights.

    Raises:
        SpectrError: The class cannot build a model from this configuration.
    """
    import transformers

    kinds = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((kind for kind in kinds if kind is not None), None)
    try:
        with torch.device("meta"):
            return kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's class may raise anything
        raise SpectrError(
            f"the base model cannot be built from its configuration: {type(error).__name__}: {error}",
            expected="a configuration that this version of transformers supports",
            do="check config.json of the base model, and the version of transformers",
        ) from error


def _words(error: SpectrError) -> str:
    return str(error).replace("expert 'adapter': ", "").replace("expert 'adapter' ", "it ")
