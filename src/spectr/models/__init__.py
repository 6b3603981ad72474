"""Base models: fetching the default one, loading any other, and turning a prompt into tokens."""

from spectr.models.fetch import fetch_default_model
from spectr.models.load import load_model, pick_dtype
from spectr.models.text import encode_answer, encode_prompt, shared_prefix

__all__ = [
    "encode_answer",
    "encode_prompt",
    "fetch_default_model",
    "load_model",
    "pick_dtype",
    "shared_prefix",
]
