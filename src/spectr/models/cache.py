"""Keys and values of the tokens so far, in memory with room for more tokens.

Transformers' own cache copies all of a layer's keys and values for each decoded token, which takes longer with longer
prompts and larger batches. Here each token is appended.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST = 64  # room for at least this many tokens
_SHARE = 4  # room for one part in four of the present tokens; each token is copied four times on average


class Room:
    """Memory that starts with the numbers of all tokens so far, as :meth:`add` returned them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def add(self, past: Shaped[Tensor, "B H S D"], more: Shaped[Tensor, "B H T D"]) -> Shaped[Tensor, "B H U D"]:
        """``past`` followed by ``more``, along the tokens.

        Args:
            past: The last result, or a part of it; anything else is copied.
            more: Numbers of the next tokens.
        """
        before, after = past.shape[-2], past.shape[-2] + more.shape[-2]
        if not self._begins_with(past) or after > self._memory.shape[-2]:
            room = max(_LEAST, after // _SHARE)
            self._memory = more.new_empty(*more.shape[:-2], after + room, more.shape[-1])
            self._memory[..., :before, :] = past
        self._memory[..., before:after, :] = more
        return self._memory[..., :after, :]

    def _begins_with(self, past: Tensor) -> bool:
        memory = self._memory
        if memory.is_inference() and not torch.is_inference_mode_enabled():
            return False  # it can no longer be written
        alike = past.shape[:-2] == memory.shape[:-2] and past.stride() == memory.stride()
        return alike and past.data_ptr() == memory.data_ptr()


class GrowingLayer(DynamicLayer):
    """Transformers' ``DynamicLayer`` with room: the same keys and values, as views of memory that is extended.

    With gradients, or while torch compiles, it works like ``DynamicLayer``.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rooms = Room(), Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Shaped[Tensor, "B H S D"], Shaped[Tensor, "B H S D"]]:
        """See ``DynamicLayer``."""
        if is_compiling() or (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            super().update(key_states[..., :0, :], value_states[..., :0, :], *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self._rooms
        self.keys, self.values = keys.add(self.keys, key_states), values.add(self.values, value_states)
        return self.keys, self.values


def growing_cache(model: nn.Module) -> Cache | None:
    """An empty cache for ``model(past_key_values=...)`` and ``model.generate`` that appends instead of copying.

    Args:
        model: A causal language model of transformers: plain, composed, or wrapped by PEFT.

    Returns:
        The cache; ``None`` (which leaves it to transformers) if the model or its generation configuration uses another
            kind of cache.
    """
    known: Any = model
    settings = known.generation_config
    if settings.cache_implementation is not None or settings.use_cache is False:
        return None
    if known.config.is_encoder_decoder or known._is_stateful or not known._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=known.config)
    if not cache.layers:
        return Cache(layer_class_to_replicate=GrowingLayer)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def reads_in_parts(model: nn.Module, tokens: int | None = None) -> bool:
    """Whether a model may read a shared beginning once, and then rows of different lengths after copies of its cache.

    Not with an encoder, and not with a recurrent state, which counts padding and cannot be repeated for more rows. If
    padding is between the two, not beyond an attention window, which counts it.

    Args:
        model: A causal language model of transformers: plain, composed, or wrapped by PEFT.
        tokens: Length of the longest row with its beginning, if padding is between the two; ``None`` if padding comes
            last.
    """
    known: Any = model
    if known.config.is_encoder_decoder or known._is_stateful or not known._supports_default_dynamic_cache():
        return False
    layers: list[Any] = DynamicCache(config=known.config).layers
    windows = [layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")]
    recurrent = any(hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states") for layer in layers)
    return not recurrent and (tokens is None or tokens <= min(windows, default=tokens))
