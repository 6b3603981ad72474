"""LoRA adapters in PEFT's formats. No other folder knows these formats."""

from spectr.adapters.adapter_config import CONFIG_FILE
from spectr.adapters.expert import Expert, FactorShape
from spectr.adapters.gates import GATES_FILE, has_gates, read_gates, write_gates
from spectr.adapters.naming import Naming, fused_for, named_for
from spectr.adapters.read import ADAPTER_FILES, WEIGHTS_FILE, locate_adapter, read_adapter
from spectr.adapters.saved_parts import SavedParts
from spectr.adapters.updates import BaseLayers, Factors, Update
from spectr.adapters.write import CARD, CARD_DATA, common_settings, write_adapter

__all__ = [
    "ADAPTER_FILES",
    "CARD",
    "CARD_DATA",
    "CONFIG_FILE",
    "GATES_FILE",
    "WEIGHTS_FILE",
    "BaseLayers",
    "Expert",
    "FactorShape",
    "Factors",
    "Naming",
    "SavedParts",
    "Update",
    "common_settings",
    "fused_for",
    "has_gates",
    "locate_adapter",
    "named_for",
    "read_adapter",
    "read_gates",
    "write_adapter",
    "write_gates",
]
