"""Load a composed folder with transformers, as a quantised model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectr.composed_model.quantization_config import METHOD, Settings
from spectr.composition import Routed, compose
from spectr.errors import ModelError
from spectr.models import pick_dtype
from spectr.models.base_model import composed_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@register_quantization_config(METHOD)
class SpectrFolder(QuantizationConfigMixin):
    """The ``quantization_config`` of a composed folder, as transformers holds it."""

    def __init__(self, **config: Any):
        self.quant_method: Any = METHOD
        self.__dict__.update(config)

    @property
    def settings(self) -> Settings:
        """The settings in it."""
        return Settings.of(dict(self.__dict__))


@register_quantizer(METHOD)
class SpectrQuantizer(HfQuantizer):
    """Composes a model after its weights are loaded; quantises nothing. The handle is ``model.spectr``."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        settings = self.quantization_config.settings  # pyright: ignore[reportAttributeAccessIssue]
        self._library, self._router = settings.open_library(model.config._name_or_path), settings.make_router()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.eval()
        model.spectr = compose(model, self._library, self._router)
        return model

    @property
    def is_trainable(self) -> bool:
        """See ``HfQuantizer``."""
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """See ``HfQuantizer``; :func:`save_composed` writes a folder."""
        return False


def load_composed(
    folder: str | Path, *, dtype: str = "auto", device: str = "cpu"
) -> tuple[Routed, PreTrainedTokenizerBase]:
    """Load a composed folder in evaluation mode, with its tokenizer.

    Args:
        folder: A folder of :func:`save_composed`.
        dtype: See :func:`spectr.models.load_model`.
        device: Device of the model.

    Returns:
        The handle, whose ``model`` is the composed model, and the tokenizer.

    Raises:
        ModelError: The folder holds no composed model.
    """
    if composed_config(folder) is None:
        raise ModelError(
            f"{folder} is not a composed folder",
            expected=f'a config.json whose quantization_config has "quant_method": "{METHOD}"',
            do="create one: spectr compose --save FOLDER",
        )
    kind = pick_dtype(dtype, device)  # pyright: ignore[reportArgumentType]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    return model.spectr, AutoTokenizer.from_pretrained(folder)
