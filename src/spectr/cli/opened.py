"""What the options for a library and a model stand for: the objects themselves."""

from __future__ import annotations

import json
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.cli.console import say
from spectr.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.composed import Settings
    from spectr.library import ExpertLibrary


def open_library(path: Path | None) -> ExpertLibrary:
    """The library at that path, or the shipped one.

    Raises:
        LibraryError: There is none, or it is empty.
    """
    from spectr.errors import LibraryError
    from spectr.library import ExpertLibrary
    from spectr.shipped import shipped_experts

    library = ExpertLibrary.open(path or shipped_experts())
    if not len(library):
        raise LibraryError(
            f"{library.origin} is an empty library", do=f"spectr library add NAME ADAPTER --library {library.origin}"
        )
    return library


def open_composed(model: str | None) -> Settings | None:
    """How a composed folder is routed; ``None`` for any other model."""
    if model is None or not (Path(model) / "config.json").is_file():
        return None
    try:
        from spectr.composed import Settings
        from spectr.composed.load import is_composed
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    if not is_composed(model):
        return None
    return Settings.of(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["quantization_config"])


def open_model(name: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer, with a word on what happens."""
    try:
        from transformers.utils import logging

        from spectr.models import DEFAULT_MODEL, HUB_ID, fetch_default_model, load_model
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel("ERROR")  # it warns of a kernel that 4-bit models alone would gain by
    if name in (None, DEFAULT_MODEL, HUB_ID):
        fetch_default_model(say)
    say(f"loading {name or 'SmolLM2-135M-Instruct'}")
    return load_model(name, dtype=dtype, base_alone=True)  # pyright: ignore[reportArgumentType]
