"""Extraction from checkpoints of many families, as transformers writes them, with file names of their own."""

import json

import pytest
import torch
import transformers
from checkpoints import low_rank, rewrite, take
from safetensors.torch import load_file, save_file

from models import SIZES, TEXT, TOKENS, build, close, peft_model, tiny_llama, tokens
from spectr import ExpertLibrary, Oracle, compose
from spectr.errors import ExtractionError
from spectr.extraction import Extraction, extract

GQA = {**TEXT, **TOKENS, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
PARTS = {"mm_tokens_per_image": 4, "image_token_id": 55, "boi_token_index": 53, "eoi_token_index": 54}
QWEN_VL = {
    "text_config": {**GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
    "vision_config": {**{"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}}
    | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
    **{"image_token_id": 55, "video_token_id": 56, "vision_start_token_id": 53, "vision_end_token_id": 54},
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61, **TOKENS}
FAMILIES = {  # class, configuration, settings, and whether the names in its files differ from the model's
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GQA, **MOE}, True),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}, True),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**GQA, "num_local_experts": 4}, True),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, **TOKENS}, True),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**GQA, "head_dim": 8}, "vision_config": VISION, **PARTS},
        True,
    ),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN_VL, True),
    "bamba": ("BambaForCausalLM", "BambaConfig", {**GQA, "attn_layer_indices": [1], **MAMBA}, False),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", GQA, False),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}, False),
}
CHANGED = ("q_proj", "query_key_value", "down_proj.weight", "in_proj.weight", "SelfAttention.q")


def make(family):
    model, config, settings, _ = FAMILIES[family]
    return build(getattr(transformers, model), getattr(transformers, config)(**settings))


def tune(model, change=CHANGED):
    """Add matrices of rank 2 to some weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in change):
                weight.add_(low_rank(2, outputs=weight.shape[0], inputs=weight.shape[1], seed=len(name)))
    return model


@torch.no_grad()
def answer(model):
    ids = tokens()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids.clamp(max=52), **more).logits


def composed(model, folder):
    compose(model, ExpertLibrary.from_adapters({"e": str(folder)}), Oracle(expert="e"))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fine_tuned_model_comes_back(tmp_path, family):
    """By PEFT and by spectr; from shards of its own names too, and from files in which several tensors are joined."""
    make(family).save_pretrained(tmp_path / "base")
    tuned = tune(make(family))
    tuned.save_pretrained(tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "new", save_original_format=False, max_shard_size="20KB")
    names = load_file(tmp_path / "tuned" / "model.safetensors").keys()
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())["weight_map"]
    assert (names != index.keys()) == FAMILIES[family][3]
    for source in ("tuned", "new"):
        report = take(tmp_path / "base", tmp_path / source, tmp_path / f"from {source}", rank=2)
        assert report.left == report.remarks == ()
    one, other = ((tmp_path / f"from {s}" / "adapter_model.safetensors").read_bytes() for s in ("tuned", "new"))
    assert one == other
    wanted = answer(tuned)
    close(answer(peft_model(make(family), tmp_path / "from new")), wanted, 1e-4)
    close(answer(composed(make(family), tmp_path / "from new")), wanted, 1e-4)
    assert (answer(make(family)) - wanted).abs().max() > 0.01 * wanted.abs().max()


def test_changed_experts_of_a_mixture_are_reported_by_parameter(tmp_path):
    """Norms do not depend on how the parameter's tensors are joined, so both forms give the same ones."""
    make("mixtral").save_pretrained(tmp_path / "base")
    tuned = tune(make("mixtral"))
    with torch.no_grad():
        tuned.model.layers[1].mlp.experts.gate_up_proj[2].add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "new", save_original_format=False)
    reports = [take(tmp_path / "base", tmp_path / s, tmp_path / f"from {s}", rank=2) for s in ("tuned", "new")]
    for report in reports:
        [left] = report.left
        assert (left.name, left.kind) == ("model.layers.1.mlp.experts.gate_up_proj", "weight of MixtralExperts")
        assert left.change == pytest.approx(0.1 * (96 * 32) ** 0.5, rel=1e-4)
    with pytest.raises(ExtractionError, match=r"gate_up_proj is split differently(.|\n)*the same version"):
        extract(tmp_path / "new", tmp_path / "base", tmp_path / "no", Extraction(rank=2, max_memory=50_000))


def test_an_incomplete_mixture_is_reported(tmp_path):
    for name in ("base", "tuned"):
        make("mixtral").save_pretrained(tmp_path / name)
    lost = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    rewrite(tmp_path / "tuned", lambda tensors: {key: value for key, value in tensors.items() if key != lost})
    with pytest.raises(ExtractionError, match=r"fine-tuned checkpoint lacks model.layers.0.mlp.experts.gate_up_proj"):
        take(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", rank=2)


def test_a_reward_model_gives_the_expert_of_its_layers(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    config = transformers.LlamaConfig(**GQA, num_labels=1)
    reward = build(transformers.LlamaForSequenceClassification, config)
    reward.model.load_state_dict(base.model.state_dict())
    tune(reward).save_pretrained(tmp_path / "reward")
    report = take(tmp_path / "base", tmp_path / "reward", tmp_path / "e", rank=2)
    assert [(left.name, left.kind) for left in report.left] == [("score.weight", "tensor that the base lacks")]
    assert "is a LlamaForSequenceClassification, the expert one for a LlamaForCausalLM" in report.remarks[0]
    base.model.load_state_dict(reward.model.state_dict())
    close(answer(composed(tiny_llama(), tmp_path / "e")), answer(base), 1e-4)
    rewrite(tmp_path / "base", lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(ExtractionError, match=r"base checkpoint lacks lm_head.weight"):
        take(tmp_path / "base", tmp_path / "reward", tmp_path / "f", rank=2)


def test_weights_that_no_layer_call_uses_need_one_expert_a_prompt(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4, **TOKENS}
    for name, change in (("base", ()), ("tuned", ("in_proj.weight", "dt_proj.weight")), ("only", ("dt_proj.weight",))):
        model = build(transformers.MambaForCausalLM, transformers.MambaConfig(**sizes))
        tune(model, change).save_pretrained(tmp_path / name)
    report = take(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", rank=2, called_only=True)
    assert {one.module.rpartition(".")[2] for one in report.modules} == {"in_proj"}
    assert [left.name for left in report.left] == [f"backbone.layers.{i}.mixer.dt_proj.weight" for i in range(2)]
    with pytest.raises(ExtractionError, match=r"dt_proj.weight \(weight that is used without its layer"):
        take(tmp_path / "base", tmp_path / "only", tmp_path / "f", rank=2, called_only=True)
    for name in ("tuned", "only"):
        report = take(tmp_path / "base", tmp_path / name, tmp_path / f"of {name}", rank=2)
        assert not report.left
        assert "backbone.layers.0.mixer.dt_proj" in report.remarks[0]
        fresh = build(transformers.MambaForCausalLM, transformers.MambaConfig(**sizes))
        tuned = transformers.MambaForCausalLM.from_pretrained(tmp_path / name).eval()
        close(answer(composed(fresh, tmp_path / f"of {name}")), answer(tuned), 1e-4)


def test_what_peft_does_not_load_is_reported(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4, **TOKENS}
    for name, change in (("base", ()), ("tuned", ("out_proj",))):
        model = build(transformers.MambaForCausalLM, transformers.MambaConfig(**sizes))
        tune(model, change).save_pretrained(tmp_path / name)
    [remark] = take(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", rank=2).remarks
    assert remark.startswith("PEFT does not load this expert")


def test_eight_bit_floating_numbers_are_refused(tmp_path):
    for name in ("base", "tuned"):
        tiny_llama().save_pretrained(tmp_path / name)
    path = tmp_path / "base" / "model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ExtractionError, match=r"q_proj.weight is F32 \(base: F8_E4M3\)(.|\n)*dequantise"):
        take(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", rank=2)


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_the_default_dtype_has_no_say(tmp_path, method):
    tiny_llama().save_pretrained(tmp_path / "base")
    tune(tiny_llama()).save_pretrained(tmp_path / "tuned")
    take(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", rank=2, method=method)
    torch.set_default_dtype(torch.bfloat16)
    try:
        take(tmp_path / "base", tmp_path / "tuned", tmp_path / "f", rank=2, method=method)
    finally:
        torch.set_default_dtype(torch.float32)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ef")
    assert all(torch.equal(one[key], other[key]) for key in one)
