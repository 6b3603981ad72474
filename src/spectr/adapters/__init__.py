"""LoRA adapters as PEFT writes them. All of PEFT's quirks end here."""

from spectr.adapters.expert import Expert, Factors, FactorShape
from spectr.adapters.gates import GATES_FILE, has_gates, read_gates, write_gates
from spectr.adapters.read import locate_adapter, read_adapter

__all__ = [
    "GATES_FILE",
    "Expert",
    "FactorShape",
    "Factors",
    "has_gates",
    "locate_adapter",
    "read_adapter",
    "read_gates",
    "write_gates",
]
