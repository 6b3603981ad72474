"""Load the base model that an option names, and what compares prompts with descriptions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from logging import getLogger
from typing import TYPE_CHECKING

from spectr.cli.console import say
from spectr.errors import DataError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.composition import Routed
    from spectr.guidance import QueryGuide
    from spectr.models.base_model import Check
    from spectr.models.writer import Writer


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


def open_writer(name: str | None, dtype: str) -> Writer:
    """Open a writer: an endpoint (``http://host/v1#MODEL``), a folder or a Hub id; by default the default model."""
    from spectr.models.writer import EndpointWriter, LocalWriter

    if _is_endpoint(check_writer(name)):
        url, _, model = str(name).partition("#")
        return EndpointWriter(url, model)
    try:
        return LocalWriter(*open_model(name, dtype))
    except ModelError as error:
        raise ModelError(f"--writer {name}: {error.given}", expected=error.expected, do="check --writer") from error


def check_writer(name: str | None) -> str | None:
    """Check a writer's name without loading it."""
    if _is_endpoint(name) and not str(name).partition("#")[2]:
        raise DataError(f"--writer {name}", expected="the model's name after the address: http://host/v1#MODEL")
    return name


def _is_endpoint(name: str | None) -> bool:
    return name is not None and name.startswith(("http://", "https://"))


def make_guide(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, writer: str | None, embedder: str | None, dtype: str
) -> QueryGuide:
    """Make what compares prompts with descriptions. By default the base model writes; with "none" nothing writes."""
    from spectr.guidance import QueryGuide
    from spectr.models.embed import load_embedder
    from spectr.models.writer import LocalWriter

    embed = load_embedder(embedder)
    if writer == "none":
        return QueryGuide(tokenizer, embed)
    return QueryGuide(tokenizer, embed, open_writer(writer, dtype) if writer else LocalWriter(model, tokenizer))


def guide_maker(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, writer: str | None, dtype: str
) -> Callable[[], QueryGuide] | None:
    """A function that makes one guide on first use and then returns it; ``None`` if nothing can embed."""
    if find_spec("sentence_transformers") is None:
        return None
    return cache(lambda: make_guide(model, tokenizer, writer, None, dtype))


def tell_guide(routed: Routed) -> None:
    """Print the cost of comparing descriptions."""
    from spectr.guidance import QueryGuide

    if isinstance(routed.guide, QueryGuide):
        say(f"comparing descriptions: {routed.guide.spent}")
