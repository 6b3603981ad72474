"""LoRA adapters as PEFT writes them. All of PEFT's quirks end here."""

from spectr.adapters.expert import Expert, Factors, FactorShape
from spectr.adapters.read import read_adapter
from spectr.adapters.source import locate_adapter

__all__ = ["Expert", "FactorShape", "Factors", "locate_adapter", "read_adapter"]
