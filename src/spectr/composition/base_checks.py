"""Whether a model, and the prompts for it, are those that experts were trained on, as far as names and files say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from spectr.adapters import Expert
from spectr.adapters.base_names import named_base, same_base
from spectr.adapters.text_facts import TextFacts, base_texts
from spectr.errors import CompositionError, raise_together
from spectr.library import Calibration
from spectr.ops import report_once

_COMPOSED = "spectr"  # what a composed folder's configuration has as its quant_method


def check_texts(model: nn.Module, experts: Iterable[Expert]) -> None:
    """As :func:`compare_texts`, of a model in memory."""
    compare_texts(getattr(getattr(model, "config", None), "_name_or_path", None), experts, _rows(model))


def compare_texts(model: str | None, experts: Iterable[Expert], rows: int | None = None) -> None:
    """Compare what experts keep of tokenizers and chat templates with the base model's, and report what differs.

    Nothing is compared where the base model's tokenizer is not on this machine.

    Args:
        model: The base model's folder or Hub id.
        experts: To be compared.
        rows: Of the base model's embedding, where it is known.

    Raises:
        CompositionError: Prompts would become other tokens than those that experts were trained on.
    """
    found = [(expert, facts) for expert in experts if (facts := TextFacts.read(expert.weights.parent))]
    base = base_texts(model) if found else None
    problems = []
    for expert, facts in found:
        for remark in facts.remarks(base or replace(facts, size=0), rows):
            report_once(f"expert '{expert.name}' {remark}")
        problems += [
            CompositionError(
                f"expert '{expert.name}' {fault}",
                expected="an expert whose prompts become the tokens that the base model's tokenizer writes",
                do="load the base model that it was trained on, or leave the expert out",
            )
            for fault in (facts.faults(base) if base else ())
        ]
    raise_together("the experts' tokenizers do not fit this model's", problems, CompositionError)


def report_names(model: nn.Module, experts: Iterable[Expert]) -> None:
    """Report experts that fit a model by their sizes and name another one as their base."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", None) or "")
    if getattr(getattr(config, "quantization_config", None), "quant_method", None) == _COMPOSED:
        return  # a composed folder has its own name, and its experts fitted when it was written
    for expert in experts if name else ():
        if expert.base_model and not same_base(name, expert.base_model):
            report_once(
                f"the sizes of expert '{expert.name}' fit this model ({name}), but {named_base(expert.base_model)}: "
                "make sure that they are one model"
            )


def report_calibration(model: nn.Module, calibration: Calibration | None) -> None:
    """Report a calibration that a base model of another name made: its means and scales are that model's."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", None) or "")
    made_by = str(calibration.settings.get("base_model") or "") if calibration else ""
    composed = getattr(getattr(config, "quantization_config", None), "quant_method", None) == _COMPOSED
    if name and made_by and not composed and made_by != name.rpartition("/")[2] and not same_base(name, made_by):
        report_once(
            f"the library was calibrated with the base model {made_by}, but this model is {name}: if they differ, "
            "calibrate again with spectr library calibrate --fresh, or spectr.calibrate(..., fresh=True)"
        )


def _rows(model: Any) -> int | None:
    """Tokens that a model's embedding has; ``None`` where it has no such table."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # no model of transformers, or its own refusal: there is no table
        return None
