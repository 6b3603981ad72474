"""What an adapter's tokenizer and chat template say, where it is added to a library."""

from __future__ import annotations

from pathlib import Path

from spectr.adapters import Expert
from spectr.adapters.texts import TextFacts, base_texts
from spectr.errors import AdapterError


def check_text(expert: Expert) -> None:
    """Check that prompts for an expert's base model are the tokens that the expert's own tokenizer writes.

    Nothing is compared where the base model's tokenizer is not on this machine.

    Raises:
        AdapterError: They are not.
    """
    facts, base = TextFacts.read(expert.weights.parent), base_texts(expert.base_model)
    if facts and base and (faults := list(facts.faults(base))):
        raise AdapterError(
            f"expert '{expert.name}' {'; and '.join(faults)}",
            expected=f"a tokenizer that writes the tokens of its base model ({expert.base_model})",
            do="add it to a library for the base model whose tokenizer it has",
        )


def text_remarks(folder: Path, base_model: str | None) -> list[str]:
    """What else differs between an adapter's tokenizer and its base model's, in words that follow its name."""
    facts, base = TextFacts.read(folder), base_texts(base_model)
    if facts is None:
        return []
    if base is None:
        return ["comes with a tokenizer, which is not compared: its base model's is not on this machine"]
    return list(facts.remarks(base))
