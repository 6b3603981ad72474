"""Initialisations where PEFT subtracts the initial factors from the base weight: PiSSA, OLoRA, CorDA, LoRA-GA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_KINDS = re.compile(r"(pissa_niter_\d+|pissa|olora|corda|lora_ga)", re.IGNORECASE)
_NAMES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}
# Subfolders of an adapter that may hold its initial factors as an adapter.
INITIAL_FILES = tuple(f"{kind}_init/{file}" for kind in _NAMES for file in _FILES)


class InitialSettings(NamedTuple):
    """How an adapter was initialised.

    Attributes:
        kind: ``"pissa"``, ``"olora"``, ``"corda"`` or ``"lora_ga"``; empty if the base weight is unchanged.
        computed: Whether PEFT can recompute the same initial factors from the base weight.
    """

    kind: str = ""
    computed: bool = False

    @staticmethod
    def of(raw: Mapping[str, Any]) -> InitialSettings:
        """Read PEFT's configuration."""
        given = raw.get("init_lora_weights")
        match = _KINDS.fullmatch(given) if isinstance(given, str) else None
        if match is None:
            return InitialSettings()
        kind = match[1].lower()
        return InitialSettings(kind.partition("_niter_")[0], given == "pissa" or kind == "olora")

    @property
    def name(self) -> str:
        """The name of the initialisation."""
        return _NAMES.get(self.kind, "")

    @property
    def folder(self) -> str:
        """The subfolder of saved initial factors."""
        return f"{self.kind}_init"

    def saved_in(self, folder: Path) -> Path | None:
        """Where an adapter's initial factors are saved; ``None`` if they are not."""
        found = folder / self.folder
        return found if self.kind and (found / _FILES[1]).is_file() else None

    def faults(self, folder: Path) -> Iterator[str]:
        """What is wrong if they are needed and not saved."""
        if self.kind and not self.computed and self.saved_in(folder) is None:
            yield (
                f"init_lora_weights names {self.name}, which moves initial factors out of the base model's weights. "
                f"They cannot be recomputed, and the adapter has none in {self.folder}"
            )


NOT_FROM_BASE = InitialSettings()
