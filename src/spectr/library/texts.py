"""Compare an adapter's tokenizer and chat template with its base model's when it is added to a library."""

from __future__ import annotations

from pathlib import Path

from spectr.adapters import Expert
from spectr.adapters.texts import TextFacts, base_texts
from spectr.errors import AdapterError


def check_text(expert: Expert) -> None:
    """Check that the base model's tokenizer writes the tokens that the expert's own tokenizer writes.

    Nothing is compared if the base model's tokenizer is not on this machine.

    Raises:
        AdapterError: They differ.
    """
    facts, base = TextFacts.read(expert.weights.parent), base_texts(expert.base_model)
    if facts and base and (faults := list(facts.faults(base))):
        raise AdapterError(
            f"expert '{expert.name}' {'; and '.join(faults)}",
            expected=f"a tokenizer that writes the tokens of its base model ({expert.base_model})",
            do="add it to a library of a base model with the same tokenizer",
        )


def text_remarks(folder: Path, base_model: str | None) -> list[str]:
    """Further differences from the base model's tokenizer; texts that follow the adapter's name."""
    facts, base = TextFacts.read(folder), base_texts(base_model)
    if facts is None:
        return []
    if base is None:
        return ["has a tokenizer that was not checked: its base model's tokenizer is not on this machine"]
    return list(facts.remarks(base))
