"""What experts read of a base model's layers: the weights that they compute with."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.adapters import Factors
from spectr.errors import AdapterError
from spectr.layers.initial_factors import initial_factors
from spectr.layers.linear_layers import features, is_plain, placement
from spectr.layers.multi_routed import MultiRoutedLinear
from spectr.layers.swap import plain_module
from spectr.spectral.initial import InitialFactors

_ROWS = 1024  # unit vectors that a layer is given at once
_PROBED = 16  # unit vectors that show whether a layer uses its weight as it is


class ModelLayers:
    """The linear layers of a model, composed or not, by module name; see :class:`spectr.adapters.BaseLayers`.

    Args:
        model: The model. A layer is read on request.
        folder: Folder for decompositions of weights, such as a library's; ``None`` keeps them in memory.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None):
        self._model, self._folder = model, folder
        self._initial: dict[tuple[str, str, int], InitialFactors] = {}

    @torch.no_grad()
    def weight(self, module: str) -> Float[Tensor, "O I"]:
        """The layer's weight, (outputs, inputs), float32, on the layer's device.

        A quantised or offloaded layer is called with unit vectors; its outputs are the columns that it computes with.
        """
        layer = self.layer(module)
        weight: Any = getattr(layer, "weight", None)
        if _is_here(weight):
            return (weight if isinstance(getattr(layer, "in_features", None), int) else weight.mT).float()
        sizes = features(layer)
        assert sizes is not None, "only linear layers are adapted"
        device, dtype = placement(layer, self._model)
        zero_1O = layer.forward(torch.zeros(1, sizes.inputs, device=device, dtype=dtype)).float()
        eye_II = torch.eye(sizes.inputs, device=device, dtype=dtype)
        # forward itself: torch's hooks are for the model's own calls
        return torch.cat([layer.forward(rows).float() - zero_1O for rows in eye_II.split(_ROWS)]).mT

    def bias(self, module: str) -> Float[Tensor, " O"] | None:
        """The layer's bias."""
        bias = getattr(self.layer(module), "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @torch.no_grad()
    def initial(self, module: str, kind: str, rank: int, scale: float) -> Factors:
        """The initial factors of PiSSA or OLoRA, decomposed once for a weight and a rank.

        Raises:
            AdapterError: The layer is quantised; PEFT then quantises the remaining weight again.
        """
        layer = self.layer(module)
        if not _is_here(getattr(layer, "weight", None)) or not _multiplies(layer, self.weight(module)):
            raise AdapterError(
                f"{module} is quantised or not in memory, but the adapter's initial factors are a part of its weight",
                expected="weights in float32, bfloat16 or float16",
                do="load the model unquantised, or convert the adapter with PEFT: save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...)",
            )
        key = module, kind, rank
        if key not in self._initial:
            transposed = kind == "olora" and not isinstance(getattr(layer, "in_features", None), int)
            self._initial[key] = initial_factors(self.weight(module), *key, self._folder, transposed=transposed)
        A, B = self._initial[key]
        return Factors(A, B, 1.0 if kind == "pissa" else scale)  # PEFT divides PiSSA's singular values by the scale

    def layer(self, module: str) -> Any:
        """The layer itself; in a composed model, the one that it replaces."""
        layer = self._model.get_submodule(module)
        return plain_module(layer.base if isinstance(layer, MultiRoutedLinear) else layer)


def _is_here(weight: Any) -> bool:
    """Whether this is a matrix of numbers in memory."""
    return is_plain(weight) and not weight.is_meta and weight.ndim == 2


@torch.no_grad()
def _multiplies(layer: Any, weight_OI: Float[Tensor, "O I"]) -> bool:
    """Whether a layer multiplies by its weight as it is. Quanto's do not, also before they are frozen."""
    if type(layer).forward is nn.Linear.forward:
        return True
    x_PI = torch.eye(weight_OI.shape[1], device=weight_OI.device, dtype=torch.float32)[:_PROBED]
    exact, out = copy.deepcopy(layer).float(), None
    with suppress(Exception):  # a layer that needs another input
        out = type(layer).forward(exact, x_PI)  # not what accelerate put in its place
    want = linear(x_PI, weight_OI, exact.bias)
    return isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out, want, rtol=1e-5, atol=1e-7)
