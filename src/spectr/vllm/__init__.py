"""Routing inside vLLM, as a plugin that vLLM finds. Nothing here imports vLLM before vLLM loads the plugin.

A composed folder's config chooses it, or ``hf_overrides={"quantization_config": {"quant_method": "spectr", ...}}``;
see :class:`spectr.composed_model.quantization_config.Settings` for what that holds, and docs/howto/vllm.md.
"""

from spectr.composed_model.quantization_config import Settings
from spectr.vllm.register import SUPPORTED, register
from spectr.vllm.requests import EXPERTS, ROUTE_ID, ROUTING

__all__ = ["EXPERTS", "ROUTE_ID", "ROUTING", "SUPPORTED", "Settings", "register"]
