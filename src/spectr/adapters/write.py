"""Write a PEFT adapter where every module has its own rank."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spectr.adapters.adapter_config import CONFIG_FILE
from spectr.adapters.expert import Expert
from spectr.adapters.read import WEIGHTS_FILE
from spectr.atomic_write import save_readable

CARD, CARD_DATA = "README.md", "expert.json"  # for people and for programs
Pair = tuple[Float[Tensor, "outputs rank"], Float[Tensor, "rank inputs"]]


def write_adapter(folder: Path, factors: Mapping[str, Pair], settings: Mapping[str, Any]) -> None:
    """Write the two files of a LoRA adapter whose update is ``B @ A``: the scale is 1 in every module.

    Args:
        folder: An existing folder; the adapter's files in it are replaced.
        factors: ``(B, A)`` by module name, any floating dtype, ranks of at least 1; at least one module.
        settings: Further PEFT settings, such as those of :func:`common_settings`; not ranks and scale.
    """
    tensors: dict[str, Tensor] = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous().cpu()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous().cpu()
    save_readable(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "target_modules": sorted(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        **settings,
        **rank_settings({module: A.shape[0] for module, (_, A) in factors.items()}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_card(folder: Path, card: str, facts: Mapping[str, Any], file: str = CARD_DATA) -> None:
    """Write a card for people, and its facts as JSON for programs."""
    text = json.dumps(facts, indent=2, sort_keys=True, default=str)
    (folder / file).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def common_settings(experts: Iterable[Expert]) -> dict[str, Any]:
    """The base model and task type of an adapter made from experts, if the experts agree."""
    raw = [json.loads((e.weights.parent / CONFIG_FILE).read_text(encoding="utf-8")) for e in experts]
    found: dict[str, Any] = {}
    for key, default in (("base_model_name_or_path", None), ("task_type", None), ("fan_in_fan_out", False)):
        values = [config.get(key) or default for config in raw]
        found[key] = values[0] if all(value == values[0] for value in values) else default
    return found


def targets(chosen: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for exactly these modules of a model.

    PEFT adapts each module whose name is in the list, or ends with a dot and an entry of the list. This returns the
    last parts of the names if they are unambiguous, else whole names, else a regular expression.
    """
    every, wanted = list(modules), set(chosen)
    for names in (sorted({name.rpartition(".")[2] for name in chosen}), sorted(wanted)):
        ends = tuple(f".{name}" for name in names)
        if {module for module in every if f".{module}".endswith(ends)} == wanted:
            return names
    return "|".join(re.escape(name) for name in sorted(wanted))


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The part of a PEFT configuration that sets every module's rank, and the scale 1.

    The most common rank is ``r``. Other ranks are in ``rank_pattern``, and also in ``alpha_pattern``, since PEFT
    divides a module's alpha by its own rank. PEFT reads the keys as regular expressions for the end of a module's
    name. They are escaped and anchored, so that each key matches one module:
    "encoder.q" does not match "decoder.encoder.q".
    """
    counts = Counter(ranks.values())
    commonest = max(counts, key=lambda rank: (counts[rank], rank))
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != commonest}
    sizes = {"r": commonest, "lora_alpha": commonest, "rank_pattern": pattern, "alpha_pattern": pattern}
    return {**sizes, "use_rslora": False}
