"""The adapter during training, in PEFT's format: checks before the run, and files after it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from spectr.adapters import WEIGHTS_FILE, read_adapter
from spectr.adapters.write import targets
from spectr.atomic_write import save_readable
from spectr.errors import AdapterError, DataError, MissingExtraError
from spectr.layers import RoutedLinear, features
from spectr.training.settings import DROPOUT, TrainingSettings

try:
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
except ImportError as error:
    raise MissingExtraError("training", "train") from error

_PREFIX = "base_model.model."
_NAMES = re.compile(r"^[\w.\s,]+$")  # of modules; anything else is a regular expression


def settle(make: Callable[[], nn.Module], settings: TrainingSettings) -> TrainingSettings:
    """Settings with a dropout that the model allows, after all checks that need no weights.

    Args:
        make: Makes the model; called on the meta device.
        settings: Of the run.

    Raises:
        DataError: No module matches ``target_modules``, spectr could not read the adapter afterwards, or dropout was
            set for fused parameters (of a mixture of experts), for which PEFT has none.
    """
    with torch.device("meta"):
        peft_model = with_adapter(make(), replace(settings, dropout=0.0))
    written: Any = peft_model.peft_config["default"]
    fused = sorted(written.target_parameters or ())
    if fused and settings.dropout:
        raise DataError(
            f"dropout={settings.dropout}, but target_modules={settings.target_modules!r} includes fused parameters "
            f"({', '.join(fused)})",
            expected="no dropout, since PEFT has none for fused parameters",
            do="omit --dropout, or target linear layers: --target-modules q_proj,v_proj",
        )
    _check_readable(peft_model, settings)
    return replace(settings, dropout=0.0 if fused else DROPOUT) if settings.dropout is None else settings


def check_plain(model: nn.Module) -> None:
    """Raise :class:`DataError` if a model is composed or carries an adapter, which would affect the training."""
    for what, kind in {"is composed": RoutedLinear, "carries an adapter": BaseTunerLayer}.items():
        if any(isinstance(module, kind) for module in model.modules()):
            raise DataError(f"this model {what}", expected="a base model", do="remove it, or load the model again")


def with_adapter(model: Any, settings: TrainingSettings) -> PeftModel:
    """The model with a new adapter, the same one for the same seed.

    Raises:
        DataError: No module matches ``target_modules``, or PEFT cannot adapt one that does.
    """
    chosen = settings.target_modules
    named = chosen != "all-linear" and _NAMES.match(chosen)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=DROPOUT if settings.dropout is None else settings.dropout,
        use_rslora=settings.rslora,
        target_modules=[name.strip() for name in chosen.split(",")] if named else chosen,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    linear = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if features(part)})
    if chosen == "all-linear":
        config.exclude_modules = [name for name in linear if _is_refused(name, model, config)] or None
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's matter
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # and its own keys
        torch.manual_seed(settings.seed)
        try:
            return get_peft_model(model, config)  # pyright: ignore[reportReturnType]
        except ValueError as error:  # its NoMatchingPeftModuleError among them
            raise DataError(
                f"target_modules={settings.target_modules!r}: {error}",
                expected=f"all-linear, or some of: {', '.join(linear)}",
            ) from error


def _is_refused(name: str, model: Any, config: LoraConfig) -> bool:
    """Whether PEFT adapts no layers of this name in such a model: Mamba's kernels read the weight of ``out_proj``."""
    try:
        _check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return True
    return False


def untrained(peft_model: PeftModel) -> list[str]:
    """Linear layers whose update is still zero, since no gradient reached them."""
    return [
        name
        for name, part in peft_model.get_base_model().named_modules()
        if isinstance(part, LoraLayer) and not isinstance(part, ParamWrapper) and "default" in part.lora_B
        if not torch.any(part.lora_B["default"].weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
    ]


def write_peft(peft_model: PeftModel, folder: Path, *, base_model: str, without: Collection[str] = ()) -> None:
    """Write PEFT's two files, the factors in bfloat16.

    Args:
        peft_model: The model with the adapter; its configuration is written.
        folder: Folder of the files.
        base_model: Name of the base model in the configuration.
        without: Linear layers whose update is zero; the written configuration does not target them.
    """
    outside = tuple(f"{_PREFIX}{name}.lora_" for name in without)
    tensors = {key: value for key, value in _tensors(peft_model).items() if not key.startswith(outside)}
    config: Any = peft_model.peft_config["default"]
    if without:
        named = dict(peft_model.get_base_model().named_modules())
        adapted = [name for name, part in named.items() if isinstance(part, LoraLayer)]
        inner = tuple(f"{name}." for name in adapted)
        kept = [name for name in adapted if name not in set(without) and not isinstance(named[name], ParamWrapper)]
        config.target_modules = targets(kept, [name for name in named if not name.startswith(inner)])
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    save_readable(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config.save_pretrained(str(folder))


def _tensors(peft_model: PeftModel) -> Mapping[str, Tensor]:
    """What PEFT would write, on the CPU; zeros of a model on the meta device."""
    found = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    there = {key: torch.zeros(value.shape) if value.is_meta else value for key, value in found.items()}
    return {key: value.to(torch.bfloat16).contiguous().cpu() for key, value in there.items()}


def _check_readable(peft_model: PeftModel, settings: TrainingSettings) -> None:
    """Write the adapter with zeros, and read it back."""
    with TemporaryDirectory() as folder:
        write_peft(peft_model, Path(folder), base_model="")
        try:
            read_adapter(folder, "trained", check_values=False)
        except AdapterError as error:
            raise DataError(
                f"target_modules={settings.target_modules!r} trains parts that spectr cannot read: {error.given}",
                expected="linear layers",
                do="target these: --target-modules q_proj,v_proj",
            ) from error
