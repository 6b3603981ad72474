"""Write merges as folders: an adapter or a whole model, each with a card for people and one for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectr.adapters import CONFIG_FILE, WEIGHTS_FILE, common_settings, write_adapter
from spectr.adapters.write import write_card
from spectr.errors import MergeError
from spectr.folders import new_folder
from spectr.hashing import file_sha256, known_sha256, package_versions
from spectr.library import ExpertLibrary
from spectr.merging.into_base import MergedBase
from spectr.merging.merge import MergedAdapter, spread
from spectr.merging.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FACTS = "merge.json"


def save_merged_adapter(
    merged: MergedAdapter, library: ExpertLibrary, out: str | Path, name: str | None = None
) -> Path:
    """Write an adapter folder as PEFT does, with a card and its origin as JSON.

    Args:
        merged: The merge.
        library: The library of the experts, for the origin.
        out: A new or empty folder.
        name: Name in the card; by default the folder's.

    Returns:
        The folder.

    Raises:
        MergeError: The folder cannot be written, or is not empty.
    """
    out = Path(out)
    settings = common_settings(library[expert] for expert in merged.recipe.experts)
    with new_folder(out, MergeError) as folder:
        write_adapter(folder, merged.deltas, settings)
        facts = {
            **origin(library, merged.recipe),
            "base_model": settings["base_model_name_or_path"],
            "energy": dict(merged.energy),
            "ranks": {module: delta.rank for module, delta in merged.deltas.items()},
            "sha256": {file: file_sha256(folder / file) for file in (WEIGHTS_FILE, CONFIG_FILE)},
        }
        write_card(folder, _adapter_card(name or out.absolute().name, facts), facts)
    return out


def save_merged_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    merged: MergedBase,
    library: ExpertLibrary,
    out: str | Path,
    base_model: str,
) -> Path:
    """Write a model that contains a merge, with its tokenizer, a card and its origin as JSON.

    Args:
        model: A model after :func:`merge_into`; saved in its dtype, as safetensors.
        tokenizer: Its tokenizer.
        merged: The merge in it.
        library: The library of the experts, for the origin.
        out: A new or empty folder.
        base_model: Name of the original model.

    Returns:
        The folder.

    Raises:
        MergeError: The folder cannot be written, or is not empty.
    """
    out = Path(out)
    with new_folder(out, MergeError) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in filter(Path.is_file, folder.iterdir()):
            file.chmod(0o644)  # safetensors writes private files
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        facts = {
            **origin(library, merged.recipe),
            "base_model": base_model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "change": dict(merged.change),
            "sha256": {file: file_sha256(folder / file) for file in weights},
        }
        write_card(folder, _model_card(out.absolute().name, facts), facts, MODEL_FACTS)
    return out


def origin(library: ExpertLibrary, recipe: Recipe) -> dict[str, Any]:
    """The origin of a merge: experts with hashes of their weights, the method with its settings, versions."""

    def source(expert_name: str) -> dict[str, Any]:
        expert = library[expert_name]
        known = {"expert": expert_name, "origin": expert.origin, "base_model": expert.base_model}
        return {**known, "sha256": known_sha256(expert.weights)}

    weights = recipe.effective_weights
    return {
        "merge": {"method": recipe.method.name, **vars(recipe.method)},
        "experts": [{**source(n), "weight": w} for n, w in zip(recipe.experts, weights, strict=True)],
        "subtracted": [source(expert) for expert in recipe.subtract],
        "strength": recipe.strength if recipe.subtract else None,
        "versions": package_versions("spectr-lora", "torch"),
    }


def _adapter_card(name: str, facts: Mapping[str, Any]) -> str:
    low, middle, high = spread(facts["energy"])
    ranks = sorted(set(facts["ranks"].values()))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    body = (
        f"A LoRA adapter with {len(facts['ranks'])} modules, {shown}, scale 1. Share of the exact merge in its factors "
        f"(squared Frobenius norm): {low:.1%} to {high:.1%}, median {middle:.1%}."
    )
    return _card(name, facts, "library_name: peft", "lora, spectr, merge", body)


def _model_card(name: str, facts: Mapping[str, Any]) -> str:
    low, middle, high = spread(facts["change"])
    body = (
        f"A whole model in {facts['dtype']}: {len(facts['change'])} layers changed by {low:.2%} to {high:.2%} of the "
        f"weight's norm, median {middle:.2%}."
    )
    return _card(name, facts, "library_name: transformers", "spectr, merge", body)


def _card(name: str, facts: Mapping[str, Any], kind: str, tags: str, body: str) -> str:
    rows = "\n".join(f"| {e['expert']} | {e['weight']:g} | `{e['sha256'][:12]}` |" for e in facts["experts"])
    settings = ", ".join(f"{key} {value}" for key, value in facts["merge"].items() if key != "method")
    method = facts["merge"]["method"] + (f" ({settings})" if settings else "")
    taken = ", ".join(e["expert"] for e in facts["subtracted"])
    taken = f"\nSubtracted from each expert first: {facts['strength']:g} times the mean of {taken}.\n" if taken else ""
    named = facts["base_model"]
    base, made_for = (f"base_model: {named}\n", f" for `{named}`") if named else ("", "")
    return f"""---
{base}{kind}
tags: [{tags}]
---
# {name}

Made with `spectr merge` from {len(facts["experts"])} experts{made_for}. {body}

| expert | weight | SHA-256 of its weights |
| --- | --- | --- |
{rows}
{taken}
Method: {method}. {", ".join(f"{package} {number}" for package, number in facts["versions"].items())}.
"""
