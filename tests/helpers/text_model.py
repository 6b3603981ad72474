"""A tiny chat model with a tokenizer of its own, and experts for it, all made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    *("is", "it", "the", "a", "of", "what", "no", "who", "why", "yes", "true", "false"),
    *("good", "bad", "film", "red", "blue", "green", "colour", "sky", "grass", "x", "y", "z"),
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|bot|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|> ' if m['role'] == 'user' else '<|bot|> ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|bot|> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        model = LlamaForCausalLM(config).eval()
        model.lm_head.weight.data.mul_(20)  # a random head this small could not tell words apart whatever it learnt
        return model


def save_model(folder: Path) -> Path:
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_experts(folder: Path, names: tuple[str, ...]) -> Path:
    """A plain folder of random adapters."""
    for seed, name in enumerate(names):
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            get_peft_model(make_model(), config).save_pretrained(str(folder / name))
    return folder


def save_rows(path: Path, count: int = 40) -> Path:
    """Rows whose label the prompt gives away: what a few steps can learn."""
    rows = [{"thing": "sky" if i % 2 else "grass", "label": i % 2} for i in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path
