"""Training on other families: recurrent states, windows, nested configurations, layers without gradient, mixtures."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from models import SIZES, TEXT, TOKENS, build, close, logits, tokens
from spectr import ExpertLibrary, Oracle, compose
from spectr.adapters import read_adapter
from spectr.errors import DataError
from spectr.evaluation import choice_logprobs
from spectr.models import reads_in_parts
from spectr.tasks import Task
from spectr.training import TrainingSettings, batches, encode, train_expert
from spectr.training.fit import answer_loss
from text_model import make_model, make_tokenizer

TASK = Task.of(
    name="colours", version=1, prompt="what is the colour of the {thing}", choices=("a good film", "blue sky is")
)
EXAMPLES = [TASK.example({"thing": ("sky x y z", "grass")[i % 2], "label": i % 2}) for i in range(6)]
SETTINGS = TrainingSettings(rank=2, learning_rate=1e-2, batch_size=4, seed=3)
GQA = {**TEXT, **TOKENS, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
JAMBA = {
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **{"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
GEMMA3 = {
    **{"text_config": {**GQA, "head_dim": 8}, "vision_config": {**SIZES, "image_size": 16, "patch_size": 4}},
    **{"mm_tokens_per_image": 4, "image_token_id": 55, "boi_token_index": 53, "eoi_token_index": 54},
}
STEADY = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61, **TOKENS}
FAMILIES = {
    "jamba": ("JambaForCausalLM", "JambaConfig", {**GQA, **JAMBA}),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, **TOKENS},
    ),
    "falcon-h1": ("FalconH1ForCausalLM", "FalconH1Config", {**GQA, "head_dim": 8, "mamba_d_ssm": 64, **MAMBA}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**GQA, "layer_types": ["conv", "full_attention"]}),
    "window": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 4}),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**GQA, "num_local_experts": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GQA, **MOE}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**GQA, "num_local_experts": 4, **STEADY}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TEXT, **TOKENS, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "dropout_rate": 0.0, "decoder_start_token_id": 0}),
}


def make(family):
    model, config, settings = FAMILIES[family]
    return build(getattr(transformers, model), getattr(transformers, config)(**settings))


def train(out, model, settings=SETTINGS, **more):
    given = {"name": "colours", "base_model": "tiny", "train": EXAMPLES, "test": EXAMPLES[:4], **more}
    return train_expert(model, make_tokenizer(), settings=settings, out=out, **given)


@torch.no_grad()
def alone(model, prompt, answer):
    """Log-likelihoods of an answer's tokens, from one call without padding and without a cache."""
    if model.config.is_encoder_decoder:
        out, at = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0], 0
    else:
        out, at = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0], len(prompt) - 1
    found = out.float().log_softmax(-1)[at : at + len(answer)]
    return found.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_loss_are_those_of_single_calls(family):
    model, tokenizer = make(family), make_tokenizer()
    data = encode(tokenizer, EXAMPLES[:3], 512, share=False)
    whole = torch.cat([alone(model, *pair) for pair in zip(data.prompts, data.answers, strict=True)])
    found = choice_logprobs(model, tokenizer, EXAMPLES[:3])
    for example, score_C, prompt in zip(EXAMPLES, found, data.prompts, strict=False):
        answers = encode(tokenizer, [replace(example, answer=text) for text in example.choices], 512).answers
        wanted = torch.stack([alone(model, prompt, answer).sum() for answer in answers])
        torch.testing.assert_close(score_C, wanted, rtol=0, atol=2e-4)
    data = encode(tokenizer, EXAMPLES[:3], 512, share=reads_in_parts(model))
    two_sided = model.config.is_encoder_decoder
    [batch] = batches(data, batch_size=3, epochs=1, seed=0, pad=2, two_sided=two_sided)
    loss = answer_loss(model.train(), batch, torch.tensor([data.prefix], dtype=torch.long), torch.device("cpu"))
    torch.testing.assert_close(loss, -whole.mean(), rtol=0, atol=2e-5)


def test_one_name_of_modules_is_no_regular_expression(tmp_path):
    train(tmp_path / "e", make_model(), replace(SETTINGS, target_modules="q_proj"))
    assert {name.rpartition(".")[2] for name in read_adapter(tmp_path / "e", "e").shapes} == {"q_proj"}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT's own, of fused parameters
@pytest.mark.parametrize("family", ["jamba", "gemma3", "t5", "mixtral", "qwen3-moe", "phimoe"])
def test_peft_and_spectr_read_what_was_trained_alike(tmp_path, family):
    """Layers that no gradient reaches are left out: PEFT misses no weights, and finds none that it did not look for."""
    model = make(family)
    report = train(tmp_path / "e", model)
    silent = {"jamba": "dt_proj", "gemma3": "vision_tower"}.get(family)
    assert bool(silent) == bool(report.without_gradient)
    assert all(silent in name for name in report.without_gradient)
    shapes = read_adapter(tmp_path / "e", "e").shapes
    assert not set(shapes) & set(report.without_gradient)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "e")).eval()
    given = {"decoder_input_ids": tokens(seed=1)} if family == "t5" else {}
    wanted = logits(theirs, tokens(), **given)
    assert (wanted - logits(model, tokens(), **given)).abs().max() > 1e-3
    compose(model, ExpertLibrary.from_adapters({"e": str(tmp_path / "e")}), Oracle(expert="e"))
    close(logits(model, tokens(), **given), wanted)


def test_a_killed_run_ends_the_same_where_layers_get_no_gradient(tmp_path):
    train(tmp_path / "whole", make("jamba"), replace(SETTINGS, epochs=2))

    def dies(phase, done, *_):
        if phase == "training" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", make("jamba"), replace(SETTINGS, epochs=2), progress=dies, checkpoint_seconds=0)
    train(tmp_path / "cut", make("jamba"), replace(SETTINGS, epochs=2))
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_the_base_is_measured_anew_on_other_test_rows(tmp_path):
    def dies(phase, done, *_):
        if phase == "training" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "e", make_model(), progress=dies, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):  # with a checkpoint, once there is a step
        train(tmp_path / "e", make_model(), progress=lambda *a: dies(*a[:1], a[1] - 1), checkpoint_seconds=0)
    phases = []
    train(tmp_path / "e", make_model(), test=EXAMPLES[:2], progress=lambda phase, *_: phases.append(phase))
    assert "base model on the test data" in phases


def test_only_layers_that_no_text_reaches(tmp_path):
    with pytest.raises(DataError, match="does not depend on any trained module"):
        train(tmp_path / "e", make("gemma3"), replace(SETTINGS, target_modules=r".*vision_tower.*q_proj"))
    assert not (tmp_path / "e" / "adapter_config.json").exists()


def test_dropout_and_fused_parameters(tmp_path):
    model = make("mixtral")
    names = list(model.state_dict())
    with pytest.raises(DataError, match=r"dropout=0.1(.|\n)*gate_up_proj(.|\n)*omit --dropout"):
        train(tmp_path / "e", model, replace(SETTINGS, dropout=0.1))
    assert list(model.state_dict()) == names
    assert not (tmp_path / "e").exists()


def test_a_model_that_is_no_plain_base_is_refused(tmp_path):
    train(tmp_path / "e", make_model())
    carrying = PeftModel.from_pretrained(make_model(), str(tmp_path / "e"))
    with pytest.raises(DataError, match="carries an adapter"):
        train(tmp_path / "f", carrying)
    model = make_model()
    compose(model, ExpertLibrary.from_adapters({"e": str(tmp_path / "e")}), Oracle(expert="e"))
    with pytest.raises(DataError, match="is composed"):
        train(tmp_path / "f", model)


def test_a_router_that_peft_takes_for_a_linear_layer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"includes model.layers.0.mlp.router, .* which PEFT cannot adapt"):
        train(tmp_path / "e", make("phimoe"), replace(SETTINGS, target_modules="q_proj,router"))


def test_what_spectr_could_not_read_again_is_refused_before_the_run(tmp_path):
    with pytest.raises(DataError, match=r"'patch_embedding'(.|\n)*cannot read"):
        train(tmp_path / "e", make("gemma3"), replace(SETTINGS, target_modules="patch_embedding"))
    assert not (tmp_path / "e").exists()


def test_a_sample_of_the_test_rows_is_drawn_and_named(tmp_path, spectr):
    rows = [{"thing": "sky" if i % 2 else "grass", "label": i % 2} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = ("train", "--data", tmp_path / "rows.jsonl", "--test", tmp_path / "test.jsonl", "-m", tmp_path / "model")
    words += ("--prompt", "the {thing}", "--choices", "green,blue", "--examples", "4", "--rank", "2")
    code, _, err = spectr(*words, "-o", tmp_path / "some", "--test-limit", "5")
    assert code == 0
    assert "measuring on 5 of 20 test rows, drawn at random: " in err
    some = json.loads((tmp_path / "some" / "expert.json").read_text())
    assert (some["test_examples"], len(some["test_rows"])) == (5, 5)
    assert some["test_rows"] != [1, 2, 3, 4, 5]
    assert "The test examples were drawn" in (tmp_path / "some" / "README.md").read_text()
    spectr(*words, "-o", tmp_path / "all", "--all-test-rows")
    every = json.loads((tmp_path / "all" / "expert.json").read_text())
    assert (every["test_examples"], every["test_rows"]) == (20, None)
