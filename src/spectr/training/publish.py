"""The result of a training run, and writing the expert: PEFT's two files, and a card for people and programs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectr.adapters import CARD, CARD_DATA
from spectr.errors import some_of
from spectr.training.adapter import write_peft
from spectr.training.settings import TrainingSettings
from spectr.versions import package_versions

if TYPE_CHECKING:
    from peft import PeftModel


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
    (scratch / CARD_DATA).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (scratch / CARD).write_text(card(facts), encoding="utf-8")
    for name in ("adapter_model.safetensors", CARD_DATA, CARD, "adapter_config.json"):
        os.replace(scratch / name, out / name)
    shutil.rmtree(scratch)


def card(facts: dict[str, Any]) -> str:
    """The expert's card in Markdown, with the front matter that the Hub reads."""
    settings = facts["settings"]
    rows = [("training examples", facts["train_examples"]), ("steps", facts["steps"])]
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
