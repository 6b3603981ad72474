"""A base model that is quantised itself: its own method multiplies, and the experts are added."""

import json
import shutil

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


def rounding(model):
    """The model with inputs of eight bits for its base layers, each token as the engine rounds it."""

    def rounded(layer, args):
        scale = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return ((args[0] / scale).round() * scale,)

    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and "_proj" in name:
            layer.register_forward_pre_hook(rounded)
    return model


def test_experts_of_a_base_model_in_eight_bits(quantised):
    prompt, sets = tokens(30, seed=2), (["nobody"], ["amber"], ["amber", "blue"])
    with engine(quantised, router=EVERYONE, dtype="bfloat16", inner=INT8) as running:
        answers = running.answers([(prompt, experts) for experts in sets])
    for experts, answer in zip(sets, answers, strict=True):
        known = [] if experts == ["nobody"] else experts
        assert distance(rounding(composed(quantised / "plain", known, EVERYONE)), prompt, answer) < 0.5
        assert distance(composed(quantised / "plain", ["dun"], EVERYONE), prompt, answer) > 2
