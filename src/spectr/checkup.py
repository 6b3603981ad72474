"""Check an adapter without loading its base model: what it is, and which modules would be routed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectr.adapters import Expert, named_for, read_adapter
from spectr.adapters.base_names import likely_base, named_base, same_base
from spectr.adapters.expert import open_safetensors
from spectr.adapters.text_facts import check_text, text_remarks
from spectr.composition.find_weight_reads import find_weight_reads
from spectr.composition.model_naming import naming_of
from spectr.errors import SpectrError, some_of
from spectr.layers.linear_layers import features
from spectr.layers.plan import can_change, make_plan, uncalled_fault, united
from spectr.models.fetch import DEFAULT_MODEL, HUB_ID
from spectr.routers import Oracle

_SHOWN = 3
ROUTES, IDLE, REFUSED, BASE_UNKNOWN = range(4)  # exit codes
_HEADS = {  # by PEFT's task type, the class of a model with another head than its checkpoint's
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LABELLED = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


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
        missing: Modules and parameters that the configuration targets or saves but the file lacks.
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
        error = SpectrError(
            f"the base model {model} is not on this machine, or its configuration cannot be read",
            do="pass its folder, or download it first",
        )
        return replace(result, refused=_words(error))
    if base is None:
        return replace(result, idle={**idle, **_left_out(expert)})
    return _in_model(result, expert, base, model)


def _in_model(result: Checkup, expert: Expert, base: Any, model: str | None) -> Checkup:
    """The part of the check that needs the base model, on the meta device, in the first class that the expert fits."""
    result, faults = replace(result, base=model or expert.base_model), list[SpectrError]()
    try:
        check_text(replace(expert, base_model=result.base))
        for shell in _shells(base, expert):
            try:
                return _in_shell(result, expert, base, model, shell)
            except SpectrError as error:
                faults.append(error)
    except SpectrError as error:
        faults.append(error)
    return replace(result, refused=_words(faults[0]))


def _in_shell(result: Checkup, expert: Expert, base: Any, model: str | None, shell: Any) -> Checkup:
    """The check in one class of the base model.

    Raises:
        SpectrError: The expert does not fit it.
    """
    naming = naming_of(shell)
    named = named_for(expert, naming)
    uncalled = find_weight_reads(shell).outside
    shapes = {name: shape for name, shape in named.shapes.items() if name not in uncalled}
    called = replace(named, shapes=shapes, left_out={} if named.modules else named.left_out)
    make_plan(shell, [called], Oracle(expert=expert.name))
    untrained = _untrained(named, shell, uncalled)
    new = {named.file_names.get(module, module): module for module in named.modules}
    idle = {new[module]: why for module, why in result.idle.items() if module in new} | _left_out(named)
    idle |= dict.fromkeys(untrained, "the model uses its weight without calling the layer, and its factors are zero")
    remarks = [*result.remarks, *_class_remark(shell, base, expert)]
    if model and expert.base_model and not same_base(model, expert.base_model):
        remarks.append(
            f"its sizes fit {model}, but {named_base(expert.base_model)}: check that they are the same model"
        )
    whole = sorted({*named.saved, *(uncalled & named.shapes.keys())} - idle.keys())
    if whole:
        remarks.append(f"changes {some_of(whole, _SHOWN)} as a whole: it needs a router that takes one expert a prompt")
    return replace(
        result,
        idle=idle,
        routed=[module for module in named.modules if module not in idle],
        missing=sorted(_missing(named, shell, frozenset(naming.heads))),
        remarks=remarks,
    )


def _zero(expert: Expert) -> list[str]:
    """Modules whose update is zero; holds one tensor at a time in memory."""
    with open_safetensors(expert.weights, expert.name) as file:
        return [module for module in expert.modules if not expert.is_alive(module, file.get_tensor)]


def _untrained(expert: Expert, model: nn.Module, uncalled: Set[str]) -> list[str]:
    """Layers that are not called, with factors of zero and more than these; without weights there is no other sign.

    Raises:
        CompositionError: Factors there are not zero, and only plain LoRA can change such layers.
    """
    shapes = {module: expert.shapes[module] for module in sorted(uncalled & expert.shapes.keys())}
    shapes = {module: shape for module, shape in shapes.items() if not can_change(model.get_submodule(module), shape)}
    with expert.open_saved() as read:
        zero = [
            module
            for module, shape in shapes.items()
            if not (read(shape.key_A).any() and read(shape.key_B).any())
            and not (shape.parts.bias_B and read(shape.parts.bias_B).any())
        ]
    if changed := [module for module in shapes if module not in zero]:
        raise united({expert.name: [uncalled_fault(changed)]})[0]
    return zero


def _left_out(expert: Expert) -> dict[str, str]:
    return dict.fromkeys(expert.left_out, "the configuration does not target it, so PEFT ignores it")


def _missing(expert: Expert, model: Any, heads: Set[str]) -> Iterator[str]:
    """What the configuration targets or saves but the file has no tensors for."""
    config, layers = expert.config, dict(model.named_modules())
    if config is None:
        return
    there = {*expert.modules, *expert.left_out}
    embeddings = {name for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    linear = {name for name, layer in layers.items() if features(layer)}
    targeted = linear - heads if config.targets.all_linear else linear | embeddings
    if config.targets.modules is not None:
        yield from (name for name in targeted - there if config.targets.has(name))
    parameters = (name for name, _ in model.named_parameters() if config.targets_parameter(name))
    yield from (name for name in parameters if not there & {name, name.removesuffix(".weight")})
    trained = (name for name in layers if config.saved.modules and name.endswith(config.saved.modules))
    yield from (name for name in trained if not any(f"{one}.".startswith(f"{name}.") for one in there))
    for end in config.saved.tokens:
        ours = {n for n in embeddings if (n.endswith(end) if end else layers[n] is model.get_input_embeddings())}
        yield from () if any(expert.saved[name].rows for name in ours & expert.saved.keys()) else ours


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
    except Exception:  # a damaged file may raise anything
        return None


def _shells(config: Any, expert: Expert) -> Iterator[Any]:
    """The model on the meta device, in the classes that users load it in: all modules, no weights.

    Raises:
        SpectrError: No class can build a model from this configuration.
    """
    import transformers

    config, task = copy.deepcopy(config), _HEADS.get(expert.config.task if expert.config else "")
    kinds: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()]
    ways: list[Callable[[Any], Any]] = [kind for kind in kinds if kind is not None][:1]
    ways.append(transformers.AutoModelForCausalLM.from_config)
    if task:
        config.num_labels = _labels(expert) or config.num_labels
        ways.insert(0, getattr(transformers, task).from_config)
    made, errors = set[type](), list[Exception]()
    for make in ways:
        try:
            with torch.device("meta"):
                shell = make(copy.deepcopy(config))
        except Exception as caught:  # a model's class may raise anything
            errors.append(caught)
            continue
        if type(shell) not in made:
            made.add(type(shell))
            yield shell
    if not made:
        raise SpectrError(
            f"the base model cannot be built from its configuration: {type(errors[0]).__name__}: {errors[0]}",
            expected="a configuration that this version of transformers supports",
            do="check config.json of the base model, and the version of transformers",
        ) from errors[0]


def _labels(expert: Expert) -> int | None:
    """The number of labels of a trained head: the outputs of its last matrix, the fewest; ``None`` of other tasks."""
    if expert.config is None or expert.config.task not in _LABELLED:
        return None
    shapes = [whole.shape for parts in expert.saved.values() for whole in parts.whole.values()]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)


def _class_remark(model: Any, config: Any, expert: Expert) -> Iterator[str]:
    name, labels, named = type(model).__name__, _labels(expert), config.architectures or ()
    if name not in named and (named or (expert.config and expert.config.task in _HEADS)):
        yield f"needs its base model as {name}" + (f" with num_labels={labels}" if labels else "")


def _words(error: SpectrError) -> str:
    return str(error).replace("expert 'adapter': ", "").replace("expert 'adapter' ", "it ")
