"""Base models: fetch the default one, load any other, and convert between text and tokens."""

from spectr.models.base_model import load_model, pick_dtype
from spectr.models.cache import growing_cache, reads_in_parts
from spectr.models.fetch import DEFAULT_MODEL, HUB_ID, fetch_default_model
from spectr.models.generate import encode_batch, generate_answers, pad_batch, pad_rows
from spectr.models.text import context_length, encode_answer, encode_prompt, opening_length, shared_prefix

__all__ = [
    "DEFAULT_MODEL",
    "HUB_ID",
    "context_length",
    "encode_answer",
    "encode_batch",
    "encode_prompt",
    "fetch_default_model",
    "generate_answers",
    "growing_cache",
    "load_model",
    "opening_length",
    "pad_batch",
    "pad_rows",
    "pick_dtype",
    "reads_in_parts",
    "shared_prefix",
]
