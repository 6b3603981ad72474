"""Load a base model and its tokenizer, in the precision that is fastest on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from spectr.adapters import CONFIG_FILE
from spectr.adapters.adapter_config import base_named
from spectr.errors import ModelError, SpectrError, first_line, some_of
from spectr.folders import json_object
from spectr.models.fetch import DEFAULT_MODEL, HUB_ID, fetch_default_model

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]")
Check = Callable[[Any, PreTrainedTokenizerBase], None]  # receives a model's configuration and its tokenizer


def pick_dtype(dtype: Dtype = "auto", device: str = "cpu") -> torch.dtype:
    """The dtype of this name; ``auto`` is bfloat16 if the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = capabilities.get("amx_tile") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def load_model(
    name: str | None = None,
    *,
    dtype: Dtype = "auto",
    device: str | None = None,
    base_alone: bool = False,
    check: Check = lambda *_: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: Folder or Hub id. ``None``, ``"smollm2"`` or its Hub id is the default model, which is downloaded if
            necessary.
        dtype: Precision of the weights; see :func:`pick_dtype`.
        device: ``"cpu"``, ``"cuda"``, ...; by default an accelerator if there is one.
        base_alone: Load the base model of a composed folder instead of refusing it.
        check: Called with the configuration and the tokenizer before any weights are read; may raise.

    Raises:
        ModelError: The model does not exist, or cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = fetch_default_model() if name in (None, DEFAULT_MODEL, HUB_ID) else name
    assert path is not None
    composed = _check_reachable(str(path), base_alone)
    try:
        config: Any = AutoConfig.from_pretrained(path)
        if composed:
            del config.quantization_config  # which makes it a composed model
        _check_kind(str(path), config)
        tokenizer = AutoTokenizer.from_pretrained(path)
        check(config, tokenizer)
        kind = pick_dtype(dtype, device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=kind, output_loading_info=True)
        model, found = loaded
    except (SpectrError, MemoryError):
        raise
    except Exception as error:  # damaged files and missing packages raise anything
        there = "the folder holds no model that transformers can load" if Path(path).exists() else "no such folder"
        raise ModelError(
            f"the model '{path}' could not be loaded: {first_line(error)}",
            expected=f"a folder with a transformers model, or a Hub id that can be reached ({there})",
            do="check --model; omit it for the default model",
        ) from error
    if getattr(config, "quantization_config", None) is None:
        _check_complete(str(path), sorted(found["missing_keys"]))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def _check_kind(path: str, config: Any) -> None:
    """Check that a configuration is that of a decoder-only language model; commands run no others.

    Raises:
        ModelError: It is another kind of model.
    """
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False):
        what = "which has an encoder and a decoder"
    elif _OTHER_HEAD.search(named) and named != getattr(_class_of(config) if known else None, "__name__", ""):
        what = "whose output layer writes no text"
    elif not known and not hasattr(config, "auto_map"):
        what = "which transformers does not load as a language model of text alone"
    else:
        return
    raise ModelError(
        f"the model '{path}' is a {named or type(config).__name__}, {what}",
        expected="a causal language model (AutoModelForCausalLM)",
        do="in Python, load it with its own class: spectr.compose(model, library, router) takes it",
    )


def _class_of(config: Any) -> Any:
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _check_complete(path: str, missing: Sequence[str]) -> None:
    """Raise :class:`ModelError` for weights that a checkpoint lacks, which transformers makes up at random."""
    if missing:
        raise ModelError(
            f"the model '{path}' lacks weights of a causal language model: {some_of(missing, 3)}",
            expected="a checkpoint with all weights, its output layer among them",
            do="take the language model that this one was made of",
        )


def _check_reachable(path: str, base_alone: bool) -> bool:
    """A quick check before transformers tries with many retries; returns whether it is a composed folder."""
    if Path(path).is_dir():
        _refuse_adapter(path, Path(path) / CONFIG_FILE)
        if not (Path(path) / "config.json").is_file():
            raise ModelError(
                f"the model '{path}' could not be loaded: the folder has no config.json",
                expected="a folder with a transformers model",
                do="check --model; omit it for the default model",
            )
        composed = composed_config(path) is not None
        if composed and not base_alone:  # it must not silently become its base model
            raise ModelError(
                f"{path} is a composed model, which contains experts",
                expected="a base model",
                do=f"spectr.load_composed({path!r}), or spectr generate -m {path}; or name its base model",
            )
        return composed
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:  # this is not a Hub id
        why = "it is a file" if Path(path).is_file() else "there is no such folder"
        raise ModelError(
            f"the model '{path}' could not be loaded: {why}",
            expected="a folder with a transformers model, or a Hub id, such as org/model",
            do="check --model; omit it for the default model",
        )
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    try:
        if isinstance(known := try_to_load_from_cache(path, CONFIG_FILE), str):
            _refuse_adapter(path, Path(known))
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return False
        if constants.HF_HUB_OFFLINE:
            raise OSError("the Hub is switched off (HF_HUB_OFFLINE)")
        info = HfApi().model_info(path, timeout=10)
        if any(file.rfilename == CONFIG_FILE for file in info.siblings or ()):
            _refuse_adapter(path, Path(hf_hub_download(path, CONFIG_FILE)))
    except SpectrError:
        raise
    except Exception as error:  # the client raises its own, httpx's and OS errors
        raise ModelError(
            f"the model '{path}' could not be loaded: it is not a folder, and the Hub did not return it "
            f"({first_line(error)})",
            expected="a folder with a transformers model, or a Hub id that can be reached",
            do="check --model and the network; omit --model for the default model",
        ) from error
    return False


def _refuse_adapter(path: str, config: Path) -> None:
    """Raise :class:`ModelError` if the folder is an adapter, which transformers would load into its base model."""
    if config.is_file():
        base = base_named(config.parent)
        raise ModelError(
            f"{path} is an adapter{f' for {base}' if base else ''}, which transformers would load into its base model",
            expected="a base model alone",
            do=f"name the base model: --model {base or 'BASE'}; and add the adapter to a library: spectr library add "
            f"NAME {path} --library LIBRARY",
        )


def composed_config(folder: str | Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a composed folder; ``None`` for anything else."""
    known = json_object(Path(folder) / "config.json").get("quantization_config")
    return known if isinstance(known, dict) and known.get("quant_method") == "spectr" else None
