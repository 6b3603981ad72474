"""A linear method for vLLM that routes; it wraps the layer's own method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)

from spectr.errors import CompositionError
from spectr.vllm.layer import Experts, check_sizes
from spectr.vllm.routing import sees_input
from spectr.vllm.tensor_parallel import Split
from spectr.vllm.worker_state import WorkerState


class RoutedLinearMethod(LinearMethodBase):
    """``y = base(x) + the chosen experts' update``.

    Args:
        base: The method of the layer without experts: unquantised, or an inner quantisation's.
        state: The worker's state.
        modules: The library's names for the modules that the layer packs.
        name: The layer's name.
    """

    def __init__(self, base: LinearMethodBase, state: WorkerState, modules: list[str], name: str):
        self.base, self.state, self.modules, self.name = base, state, modules, name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """See vLLM's ``LinearMethodBase``. The experts become a submodule of the layer."""
        self.base.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        split = Split.of(layer, output_partition_sizes)
        split.check(self.name, self.modules)
        wholes = split.whole if len(self.modules) > 1 else [sum(split.whole)]
        for module, outputs in zip(self.modules, wholes, strict=True):
            check_sizes(self.name, module, input_size, outputs, self.state)
        if split.by_input and sees_input(self.state.router):
            raise CompositionError(
                f"{self.state.router} scores whole inputs, but {self.name} receives a part of them on each rank",
                expected="no tensor parallelism, or a router that scores products: spectr, calibrated-token, arrow",
                do="remove --tensor-parallel-size",
            )
        layer.spectr = Experts(self.modules, split, self.state, tensor_model_parallel_all_reduce)
        layer.spectr_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """See vLLM's ``QuantizeMethodBase``. This loads the experts too."""
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        layer.spectr.build(self.state, device, layer.spectr_dtype, self.name)
        self.base.process_weights_after_loading(layer)
        self.state.layers[self.name] = layer.spectr
        self.state.routed.update(dict.fromkeys(layer.spectr.routed_modules, self.name))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The base layer's output plus the chosen experts' update."""
        out, flat = self.base.apply(layer, x, bias), x.reshape(-1, x.shape[-1])
        out = layer.spectr(out.reshape(-1, out.shape[-1]), flat).reshape(out.shape)
        if layer.spectr.probe_scorer is not None:
            torch.ops.spectr.score_probe(out, flat, self.name)
        return out


@register_weight_loader_v2_supported_method
class RoutedLinearMethodV2(RoutedLinearMethod):
    """The same for a base method with vLLM's second protocol of loading, which vLLM selects by the class's name."""


def routed_method(base: LinearMethodBase, state: WorkerState, modules: list[str], name: str) -> RoutedLinearMethod:
    """A routed method whose weights vLLM loads in the same way as those of ``base``."""
    newer = type(base).__name__ in WEIGHT_LOADER_V2_SUPPORTED
    return (RoutedLinearMethodV2 if newer else RoutedLinearMethod)(base, state, modules, name)
