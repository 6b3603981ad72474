"""Call a model with two tokens or a small input to find out how it uses the weights of its linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spectr.layers.eval_mode import eval_mode
from spectr.layers.linear_layers import features
from spectr.layers.weight_reads import WeightReads, uncompiled

_SAMPLES = 2000  # audio samples: a few frames for every model that reads waveforms


def find_weight_reads(model: nn.Module) -> WeightReads:
    """Find out how a model uses the weights of its linear layers, with one minimal call.

    It costs as much as one token. The model is called as it is (on its devices, with its kernels) in eval mode, and its
    state is restored, including random numbers. A part that is not reached, such as the vision tower of a language
    model, is called separately. Parts that cannot be called, or need other inputs than these, stay unknown.

    Args:
        model: The base model or a composed one. A model whose weights accelerate offloads is not called.
    """
    reads = WeightReads(model)
    layers = {module: name for name, module in model.named_modules() if features(module)}
    if any(p.is_meta for p in model.parameters()) and any(hasattr(part, "_hf_hook") for part in model.modules()):
        return reads
    for part in model.modules():
        if not hasattr(part, "main_input_name") or not hasattr(part, "config"):
            continue
        inner = [layers[module] for module in part.modules() if module in layers]
        if not reads.unknown(inner):
            continue
        for inputs in _inputs(part):
            if _runs(part, inputs, reads):
                break
    return reads


def _runs(part: nn.Module, inputs: Mapping[str, Tensor], reads: WeightReads) -> bool:
    """Whether a module could be called with these inputs."""
    devices = {tensor.device for tensor in part.parameters() if tensor.is_cuda}
    try:
        with eval_mode(part), torch.random.fork_rng(devices), torch.no_grad(), uncompiled(), reads:
            part(**inputs)
    except Exception:  # a model that needs other inputs may raise anything
        return False
    return True


def _inputs(part: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs for a module: its main input first, then all inputs that it has a name for."""
    weight = next(weight for weight in part.parameters() if weight.is_floating_point())
    vision = getattr(part.config, "vision_config", part.config)
    size = getattr(vision, "image_size", None)
    ids_BT = _token_ids(part.config, weight.device)
    plain = {"dtype": weight.dtype, "device": weight.device}  # not as the weight itself, which may be quantised
    made = {"input_values": torch.zeros(1, _SAMPLES, **plain)}
    if ids_BT is not None:
        made |= {"input_ids": ids_BT, "decoder_input_ids": ids_BT}
    if isinstance(size, (int, list, tuple)):
        sides = (size, size) if isinstance(size, int) else size
        made["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), *sides, **plain)
    accepted = signature(type(part).forward).parameters
    made = {name: tensor for name, tensor in made.items() if name in accepted}
    main = {name: tensor for name, tensor in made.items() if name in (part.main_input_name, "decoder_input_ids")}
    yield main
    if len(made) > len(main):
        yield made


def _token_ids(config: Any, device: torch.device) -> Tensor | None:
    """Two tokens of a model's vocabulary without a special meaning."""
    text = config.get_text_config()
    special = [value for part in (config, text) for name, value in vars(part).items() if name.endswith("token_id")]
    words = range(getattr(text, "vocab_size", None) or 0)
    plain = list(islice((word for word in words if word not in special and [word] not in special), 2))
    return torch.tensor([plain], device=device) if len(plain) == 2 else None
