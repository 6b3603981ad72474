"""vLLM's quantisation config ``spectr``: which layers are routed, by what, and the linear method that routes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from spectr.composed_model.quantization_config import METHOD, Settings
from spectr.errors import CompositionError, raise_together
from spectr.library import ExpertLibrary
from spectr.ops.packed import packed_works
from spectr.vllm.layer import Experts, check_sizes
from spectr.vllm.layer_routing import sees_input
from spectr.vllm.prompt_decisions import DECIDES
from spectr.vllm.router_set import decides_on_prompts, fingerprint, routers_of
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


_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@register_quantization_config(METHOD)
class SpectrConfig(QuantizationConfig):
    """The composed model's config. The front-end process makes it and sends it to the workers.

    Attributes:
        settings: The model's ``quantization_config``.
        inner: The base model's own quantisation, or ``None``.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.inner: QuantizationConfig | None = None
        if settings.inner:
            self.inner = get_quantization_config(settings.inner["quant_method"]).from_config(dict(settings.inner))
        self.library: ExpertLibrary | None = None
        self.origin = ""
        self._worker_state: WorkerState | None = None
        self._names: dict[str, str] = {}
        self._mapper: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process, which opens the library itself."""
        return {**self.__dict__, "library": None, "_worker_state": None}

    @classmethod
    def get_name(cls) -> Any:
        """See ``QuantizationConfig``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See ``QuantizationConfig``."""
        return self.inner.get_supported_act_dtypes() if self.inner else [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """See ``QuantizationConfig``."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See ``QuantizationConfig``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpectrConfig:
        """See ``QuantizationConfig``. Masks need vLLM's first model runner, so this selects it."""
        if os.environ.get(_RUNNER, "0") not in ("0", "false", "False"):
            raise CompositionError(
                f"{_RUNNER}={os.environ[_RUNNER]}",
                expected="vLLM's first model runner: experts for each request are not implemented for the second",
                do=f"unset {_RUNNER}",
            )
        os.environ[_RUNNER] = "0"
        settings = Settings.of(config)
        if all(map(decides_on_prompts, routers_of(settings).by_name.values())) and DECIDES not in os.environ:
            raise CompositionError(
                f"vLLM by itself cannot decide on prompts: {settings.router['name']}",
                expected="a router that decides for each token",
                do="spectr serve --engine vllm, or save with calibrated-token",
            )
        return cls(settings)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the library, and add to the model's config what a compiled graph depends on."""
        self.library = self.settings.open_library(model_name)
        self.origin = self.library.origin
        known = getattr(hf_config, "quantization_config", None)
        if isinstance(known, dict):
            known["fingerprint"] = fingerprint(self.library, packed_works(torch.float32))
        if self.inner:
            self.inner.maybe_update_config(model_name, hf_config, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Store how vLLM names the checkpoint's modules."""
        self._mapper = hf_to_vllm_mapper
        if self.inner:
            self.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    @property
    def state(self) -> WorkerState:
        """This worker's experts and buffers; made when the first layer needs them."""
        if self._worker_state is None:
            engine = get_current_vllm_config()  # pyright: ignore[reportCallIssue]  (vLLM is not installed where it runs)
            _check_engine(engine, bool(routers_of(self.settings).prompts))
            library = self.library or self.settings.narrowed(ExpertLibrary.open(self.origin))
            scheduler = engine.scheduler_config
            device = torch.device(engine.device_config.device)
            sizes = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
            graph_objects = engine.compilation_config.static_forward_context
            self._worker_state = WorkerState(self.settings, library, *sizes, device, graph_objects)
            modules = {module for expert in self._worker_state.adapters.values() for module in expert.shapes}
            self._names = {self._vllm_name(module): module for module in modules}
        return self._worker_state

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """See ``QuantizationConfig``."""
        base = None
        if self.inner:
            self.inner.packed_modules_mapping = self.packed_modules_mapping
            base = self.inner.get_quant_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return base
        base = base or UnquantizedLinearMethod()
        assert isinstance(base, LinearMethodBase)
        state, modules = self.state, self._modules(prefix)
        return routed_method(base, state, modules, prefix) if any(map(state.experts_of, modules)) else base

    def _vllm_name(self, module: str) -> str:
        mapped = self._mapper.apply_list([f"{module}.weight"]) if self._mapper else []
        return mapped[0].removesuffix(".weight") if mapped else module

    def _modules(self, prefix: str) -> list[str]:
        """The library's names for the modules that a layer packs."""
        parent, _, last = prefix.rpartition(".")
        packed = self.packed_modules_mapping.get(last) or [last]
        names = [f"{parent}.{one}" if parent else one for one in packed]
        return [self._names.get(name, name) for name in names]


def _check_engine(engine: Any, probes: bool) -> None:
    """Raise :class:`CompositionError` for engine options with which a token's experts cannot be known."""
    parallel = engine.parallel_config
    wrong = {
        "the second model runner": engine.use_v2_model_runner,
        "speculative decoding": engine.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "overlapped batches (dbo)": parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1,
        "a model of images or sound": engine.model_config.is_multimodal_model,
        "KV-sharing fast prefill": engine.cache_config.kv_sharing_fast_prefill,
        "vLLM's own LoRA": engine.lora_config is not None,
        "CUDA graphs and a router that decides on prompts (--enforce-eager)": probes
        and engine.device_config.device_type != "cpu"
        and not engine.model_config.enforce_eager,
    }
    problems = [
        CompositionError(f"routing inside vLLM does not work with {what}", do="disable it")
        for what, there in wrong.items()
        if there
    ]
    raise_together("this engine cannot route", problems, CompositionError)
