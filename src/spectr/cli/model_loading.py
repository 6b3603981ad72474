"""Load the base model that an option names."""

from __future__ import annotations

from logging import getLogger
from typing import TYPE_CHECKING

from spectr.cli.console import say
from spectr.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.models.load import Check


def open_model(
    name: str | None, dtype: str, check: Check = lambda *_: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model and its tokenizer. Checks run before the weights are read."""
    try:
        from transformers.utils import logging

        from spectr.models import DEFAULT_MODEL, HUB_ID, fetch_default_model, load_model
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel("ERROR")  # it warns about a kernel that only 4-bit models use
    if name in (None, DEFAULT_MODEL, HUB_ID):
        fetch_default_model(say)
    say(f"loading {name or 'SmolLM2-135M-Instruct'}")
    return load_model(name, dtype=dtype, base_alone=True, check=check)  # pyright: ignore[reportArgumentType]
