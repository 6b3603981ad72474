"""A composed model as a folder: the base model, its experts, and a config that describes their routing.

Importing this package teaches transformers to load such a folder.
"""

from spectr.composed_model.load import load_composed
from spectr.composed_model.quantization_config import Settings
from spectr.composed_model.save import save_composed

__all__ = ["Settings", "load_composed", "save_composed"]
