"""A base model that is quantised itself: its own method multiplies, and the experts are added."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from engine import composed, engine, tokens
from safetensors.torch import load_file, save_file
from test_bfloat16 import EVERYONE, distance

INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


@pytest.fixture
def quantised(served, tmp_path):
    """The model in eight bits, and in ``plain`` what these stand for."""
    for folder in (tmp_path, tmp_path / "plain"):
        shutil.copytree(served / "model", folder / "model")
        (folder / "library").symlink_to(served / "library")
    bits, plain = {}, {}
    for name, weight in load_file(served / "model" / "model.safetensors").items():
        bits[name] = plain[name] = weight
        if "_proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            bits[name], bits[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
            plain[name] = bits[name] * scale
    save_file(bits, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    save_file(plain, tmp_path / "plain" / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config  # it comes as what is inside ours
    return tmp_path


def in_eight_bits(model, bits):
    """The model with the base layers' products as the engine makes them from inputs and weights of eight bits.

    On a processor without VNNI, oneDNN adds neighbouring products in 16 bits, where large sums saturate. This changes
    the base model's own log-probabilities by 0.7.
    """
    exact = "vnni" in Path("/proc/cpuinfo").read_text()
    weights = {name.removesuffix(".weight"): weight for name, weight in bits.items() if name.endswith("_proj.weight")}

    def product(x, name):
        scale, weight_OI = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127, weights[name].float()
        x = (x / scale).round()
        if exact:
            sums = x @ weight_OI.mT
        else:  # inputs are shifted to be unsigned
            pairs = ((x[..., None, :] + 128) * weight_OI).unflatten(-1, (-1, 2)).sum(-1)
            sums = pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * weight_OI.sum(1)
        return sums * scale * bits[f"{name}.weight_scale"][:, 0]

    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and "_proj" in name:
            layer.forward = partial(product, name=name.removesuffix(".base"))
    return model


def test_experts_of_a_base_model_in_eight_bits(quantised):
    prompt, sets = tokens(30, seed=2), (["nobody"], ["amber"], ["amber", "blue"])
    with engine(quantised, router=EVERYONE, dtype="bfloat16", inner=INT8) as running:
        answers = running.answers([(prompt, experts) for experts in sets])
    bits = load_file(quantised / "model" / "model.safetensors")
    for experts, answer in zip(sets, answers, strict=True):
        known = [] if experts == ["nobody"] else experts
        oracle = in_eight_bits(composed(quantised / "plain", known, EVERYONE), bits)
        assert distance(oracle, prompt, answer) < 0.5
        assert distance(composed(quantised / "plain", ["dun"], EVERYONE), prompt, answer) > 2
