"""The adapter during training, in PEFT's format: checks before the run, files and card after it."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectr.adapters import CARD, CARD_DATA, WEIGHTS_FILE, read_adapter
from spectr.adapters.write import targets, write_card
from spectr.atomic_write import save_readable
from spectr.errors import AdapterError, DataError, MissingExtraError, some_of
from spectr.hashing import package_versions
from spectr.layers import features
from spectr.layers.linear_layers import returns_more
from spectr.layers.multi_routed import COMPOSED
from spectr.training.training_settings import DROPOUT, TrainingSettings

if TYPE_CHECKING:
    from peft import PeftModel

try:
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
except ImportError as error:
    raise MissingExtraError("training", "train") from error

_PREFIX = "base_model.model."
_NAMES = re.compile(r"^[\w.\s,]+$")  # of modules; anything else is a regular expression


def settle(make: Callable[[], nn.Module], settings: TrainingSettings) -> TrainingSettings:
    """Settings with a dropout that the model allows, after all checks that need no weights.

    Args:
        make: Makes the model; called on the meta device.
        settings: Of the run.

    Raises:
        DataError: No module matches ``target_modules``, spectr could not read the adapter afterwards, or dropout was
            set for fused parameters (of a mixture of experts), for which PEFT has none.
    """
    with torch.device("meta"):
        peft_model = with_adapter(make(), replace(settings, dropout=0.0))
    written: Any = peft_model.peft_config["default"]
    fused = sorted(written.target_parameters or ())
    if fused and settings.dropout:
        raise DataError(
            f"dropout={settings.dropout}, but target_modules={settings.target_modules!r} includes fused parameters "
            f"({', '.join(fused)})",
            expected="no dropout, since PEFT has none for fused parameters",
            do="omit --dropout, or target linear layers: --target-modules q_proj,v_proj",
        )
    _check_readable(peft_model, settings)
    return replace(settings, dropout=0.0 if fused else DROPOUT) if settings.dropout is None else settings


def check_plain(model: nn.Module) -> None:
    """Raise :class:`DataError` if a model is composed or carries an adapter, which would affect the training."""
    for what, kind in {"is composed": COMPOSED, "carries an adapter": BaseTunerLayer}.items():
        if any(isinstance(module, kind) for module in model.modules()):
            raise DataError(f"this model {what}", expected="a base model", do="remove it, or load the model again")


def with_adapter(model: Any, settings: TrainingSettings) -> PeftModel:
    """The model with a new adapter, the same one for the same seed.

    Raises:
        DataError: No module matches ``target_modules``, or PEFT cannot adapt one that does.
    """
    chosen = settings.target_modules
    named = chosen != "all-linear" and _NAMES.match(chosen)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=DROPOUT if settings.dropout is None else settings.dropout,
        use_rslora=settings.rslora,
        target_modules=[name.strip() for name in chosen.split(",")] if named else chosen,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    linear = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if features(part)})
    odd = [name for name, part in model.named_modules() if returns_more(part)]
    if chosen == "all-linear":
        config.exclude_modules = [*(name for name in linear if _is_refused(name, model, config)), *odd] or None
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT uses it
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # and its own keys
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # it sets that itself
        torch.manual_seed(settings.seed)
        try:
            made: Any = get_peft_model(model, config)
        except (ValueError, re.error) as error:  # its NoMatchingPeftModuleError among them
            raise DataError(
                f"target_modules={settings.target_modules!r}: {error}",
                expected=f"all-linear, or some of: {', '.join(linear)}",
            ) from error
    if wrong := [name for name in odd if isinstance(model.get_submodule(name), LoraLayer)]:
        made.unload()
        raise DataError(
            f"target_modules={settings.target_modules!r} includes {some_of(wrong, 3)}, which PEFT cannot adapt",
            expected=f"all-linear, or some of: {', '.join(linear)}",
        )
    return made


def _is_refused(name: str, model: Any, config: LoraConfig) -> bool:
    """Whether PEFT adapts no layers of this name in such a model: Mamba's kernels read the weight of ``out_proj``."""
    try:
        _check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return True
    return False


def untrained(peft_model: PeftModel) -> list[str]:
    """Linear layers whose update is still zero, since no gradient reached them."""
    return [
        name
        for name, part in peft_model.get_base_model().named_modules()
        if isinstance(part, LoraLayer) and not isinstance(part, ParamWrapper) and "default" in part.lora_B
        if not torch.any(part.lora_B["default"].weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
    ]


def write_peft(peft_model: PeftModel, folder: Path, *, base_model: str, without: Collection[str] = ()) -> None:
    """Write PEFT's two files, the factors in bfloat16.

    Args:
        peft_model: The model with the adapter; its configuration is written.
        folder: Folder of the files.
        base_model: Name of the base model in the configuration.
        without: Linear layers whose update is zero; the written configuration does not target them.
    """
    outside = tuple(f"{_PREFIX}{name}.lora_" for name in without)
    tensors = {key: value for key, value in _tensors(peft_model).items() if not key.startswith(outside)}
    config: Any = peft_model.peft_config["default"]
    if without:
        named = dict(peft_model.get_base_model().named_modules())
        adapted = [name for name, part in named.items() if isinstance(part, LoraLayer)]
        inner = tuple(f"{name}." for name in adapted)
        kept = [name for name in adapted if name not in set(without) and not isinstance(named[name], ParamWrapper)]
        config.target_modules = targets(kept, [name for name in named if not name.startswith(inner)])
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    for name, value in list(vars(config).items()):
        if isinstance(value, set):  # PEFT would write its items in an order that differs from process to process
            setattr(config, name, sorted(value))
    save_readable(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config.save_pretrained(str(folder))


def _tensors(peft_model: PeftModel) -> Mapping[str, Tensor]:
    """What PEFT would write, on the CPU; zeros of a model on the meta device."""
    found = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    there = {key: torch.zeros(value.shape) if value.is_meta else value for key, value in found.items()}
    return {key: value.to(torch.bfloat16).contiguous().cpu() for key, value in there.items()}


def _check_readable(peft_model: PeftModel, settings: TrainingSettings) -> None:
    """Write the adapter with zeros, and read it back."""
    with TemporaryDirectory() as folder:
        write_peft(peft_model, Path(folder), base_model="")
        try:
            read_adapter(folder, "trained", check_values=False)
        except AdapterError as error:
            raise DataError(
                f"target_modules={settings.target_modules!r} trains parts that spectr cannot read: {error.given}",
                expected="linear layers",
                do="target these: --target-modules q_proj,v_proj",
            ) from error


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a run, which is also the data of the expert's card.

    Attributes:
        validation_accuracy: After each epoch, from 0 to 1. The weights are those of the best epoch, the first of
            equals.
        metric: The metric of the accuracies: ``"accuracy"`` for choices, or a metric of free text.
        accuracy_before: The base model's accuracy on the test examples, from 0 to 1; ``None`` without test data.
        accuracy_after: The expert's accuracy, measured with the saved weights.
        majority: Share of the most frequent label, if labels mean the same in every row.
        test_rows: Numbers of the measured test rows, starting at 1; ``None`` for all.
        without_gradient: Targeted layers that no gradient reached; the expert leaves them out.
        shortened_prompts: Number of prompts that lost their middle.
        shortened_answers: Number of answers that lost their end.
    """

    name: str
    base_model: str
    settings: TrainingSettings
    metric: str
    data: dict[str, Any]
    train_examples: int
    test_examples: int
    validation_examples: int
    steps: int
    shortened_prompts: int
    last_loss: float
    validation_accuracy: list[float]
    accuracy_before: float | None
    accuracy_after: float | None
    majority: float | None
    seconds: float
    test_rows: list[int] | None = None
    without_gradient: list[str] = field(default_factory=list)
    shortened_answers: int = 0

    @property
    def shortened(self) -> str:
        """How many examples were too long and lost a part, in words; empty if none."""
        parts = {"prompts lose their middle": self.shortened_prompts, "answers lose their end": self.shortened_answers}
        lost = [f"{count} {what}" for what, count in parts.items() if count]
        limit = f"the limit of {self.settings.max_length} tokens, or the model's context"
        return f"{', '.join(lost)}: they are longer than {limit}" if lost else ""


def publish(model: PeftModel, out: Path, report: Report, note: str) -> None:
    """Write adapter (bfloat16), configuration and card into ``out``. The configuration comes last and marks the end."""
    scratch = out / ".partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_peft(model, scratch, base_model=report.base_model, without=report.without_gradient)
    facts = {
        **asdict(report),
        "note": note,
        "versions": package_versions("spectr-lora", "torch", "transformers", "peft"),
    }
    write_card(scratch, card(facts), facts)
    for name in ("adapter_model.safetensors", CARD_DATA, CARD, "adapter_config.json"):
        os.replace(scratch / name, out / name)
    shutil.rmtree(scratch)


def card(facts: dict[str, Any]) -> str:
    """The expert's card in Markdown, with the front matter that the Hub reads."""
    settings = facts["settings"]
    rows = [("training examples", facts["train_examples"]), ("steps", facts["steps"])]
    rows += [(f"shortened {what}", facts[f"shortened_{what}"]) for what in ("prompts", "answers")]
    rows += [(name.replace("_", " "), value) for name, value in settings.items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    data = "\n".join(f"- {key}: `{value}`" for key, value in facts["data"].items()) or "- not stated"
    tools = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    remark = f"\n{facts['note']}\n" if facts["note"] else ""
    return f"""---
base_model: {facts["base_model"]}
library_name: peft
tags: [lora, spectr]
---
# {facts["name"]}

A LoRA expert for `{facts["base_model"]}`, trained with `spectr train`.
{remark}{_left_out(facts)}
## Accuracy
{_accuracy(facts)}
## Data
{data}

## Settings
| setting | value |
| --- | --- |
{table}

{tools}; {facts["seconds"]:.0f} s of training.
"""


def _left_out(facts: dict[str, Any]) -> str:
    names = facts["without_gradient"]
    return f"\nNo gradient reached {some_of(names, 5)}; the expert leaves them out.\n" if names else ""


def _accuracy(facts: dict[str, Any]) -> str:
    before, after = facts["accuracy_before"], facts["accuracy_after"]
    if after is None:
        return "Not measured: no test data was given.\n" + _validation(facts)
    count = facts["test_examples"]
    drawn = (
        ""
        if facts["test_rows"] is None
        else f"The test examples were drawn at random; their rows are in {CARD_DATA}.\n"
    )
    if facts["metric"] != "accuracy":
        return f"{facts['metric']} {after:.1%} on {count} test examples; the base model has {before:.1%}.\n{drawn}"
    error = (after * (1 - after) / count) ** 0.5
    line = f"{after:.1%} on {count} test examples (standard error {error:.1%}); the base model has {before:.1%}"
    line += f", the majority class {facts['majority']:.1%}.\n" if facts["majority"] else ".\n"
    return line + drawn + _validation(facts)


def _validation(facts: dict[str, Any]) -> str:
    values = facts["validation_accuracy"]
    if not values:
        return ""
    listed = ", ".join(f"{value:.1%}" for value in values)
    return (
        f"\nOn {facts['validation_examples']} rows held out of the training data: {listed} after each epoch; "
        f"the weights are those of epoch {values.index(max(values)) + 1}.\n"
    )
