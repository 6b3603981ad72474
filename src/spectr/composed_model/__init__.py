"""A composed model as a folder: the base model, its experts in it, and a config that says how they are routed.

Importing this teaches transformers to load such a folder as it loads any other.
"""

from spectr.composed_model.load import load_composed
from spectr.composed_model.save import save_composed
from spectr.composed_model.settings import Settings

__all__ = ["Settings", "load_composed", "save_composed"]
