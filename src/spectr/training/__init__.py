"""Training one LoRA expert on peft and transformers."""

from spectr.training.data import Encoded, batches, encode
from spectr.training.gates import train_gates
from spectr.training.report import Report
from spectr.training.run import check_folder, checkpoint_step, train_expert
from spectr.training.settings import GateSettings, TrainingSettings

__all__ = [
    "Encoded",
    "GateSettings",
    "Report",
    "TrainingSettings",
    "batches",
    "check_folder",
    "checkpoint_step",
    "encode",
    "train_expert",
    "train_gates",
]
