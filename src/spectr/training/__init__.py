"""Train one LoRA expert with peft and transformers."""

from typing import TYPE_CHECKING

from spectr.lazy import lazy

if TYPE_CHECKING:
    from spectr.training.adapter import Report
    from spectr.training.data import Encoded, batches, encode
    from spectr.training.gate_training import train_gates
    from spectr.training.training_run import check_folder, checkpoint_step, train_expert
    from spectr.training.training_settings import AUTHORS_GATES, GateSettings, TrainingSettings

_HOMES = {
    "data": ("Encoded", "batches", "encode"),
    "gate_training": ("train_gates",),
    "adapter": ("Report",),
    "training_run": ("check_folder", "checkpoint_step", "train_expert"),
    "training_settings": ("AUTHORS_GATES", "GateSettings", "TrainingSettings"),
}

__all__ = [
    "AUTHORS_GATES",
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
__getattr__ = lazy(__name__, {name: home for home, names in _HOMES.items() for name in names})
