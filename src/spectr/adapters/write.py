"""Writing an adapter as PEFT does, with a rank of its own for every module."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spectr.adapters.config import CONFIG_FILE
from spectr.adapters.expert import Expert
from spectr.adapters.read import WEIGHTS_FILE
from spectr.atomic_write import save_readable

CARD, CARD_DATA = "README.md", "expert.json"  # for people, and for programs
Pair = tuple[Float[Tensor, "outputs rank"], Float[Tensor, "rank inputs"]]


def write_adapter(folder: Path, factors: Mapping[str, Pair], settings: Mapping[str, Any]) -> None:
    """Write the two files of a LoRA adapter whose update is ``B @ A``: the scale is 1 in every module.

    Args:
        folder: Is there; the files in it are replaced.
        factors: ``(B, A)`` by module name, any floating dtype, ranks of at least 1; at least one module.
        settings: More of PEFT's settings, such as those that :func:`common_settings` finds; ranks and scale excepted.
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


def common_settings(experts: Iterable[Expert]) -> dict[str, Any]:
    """What an adapter made of experts has to say of the base model, where they agree: its name and kind."""
    raw = [json.loads((e.weights.parent / CONFIG_FILE).read_text(encoding="utf-8")) for e in experts]
    found: dict[str, Any] = {}
    for key, default in (("base_model_name_or_path", None), ("task_type", None), ("fan_in_fan_out", False)):
        values = [config.get(key) or default for config in raw]
        found[key] = values[0] if all(value == values[0] for value in values) else default
    return found


def targets(chosen: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for exactly these of a model's modules.

    PEFT adapts every module whose name is one of the list or ends with a dot and one of the list. So: last parts of
    names where these say it all, else whole names, else (one name is the end of another's) a regular expression.
    """
    every, wanted = list(modules), set(chosen)
    for names in (sorted({name.rpartition(".")[2] for name in chosen}), sorted(wanted)):
        ends = tuple(f".{name}" for name in names)
        if {module for module in every if f".{module}".endswith(ends)} == wanted:
            return names
    return "|".join(re.escape(name) for name in sorted(wanted))


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The part of a PEFT configuration that gives every module its rank, and the scale 1.

    The commonest rank is ``r``. The others are in ``rank_pattern``, and in ``alpha_pattern`` since PEFT divides a
    module's alpha by its own rank. PEFT reads their keys as regular expressions for the end of a module's name. The
    keys are escaped and anchored, so that each is one module: "encoder.q" gives no rank to "decoder.encoder.q".
    """
    counts = Counter(ranks.values())
    commonest = max(counts, key=lambda rank: (counts[rank], rank))
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != commonest}
    sizes = {"r": commonest, "lora_alpha": commonest, "rank_pattern": pattern, "alpha_pattern": pattern}
    return {**sizes, "use_rslora": False}
