"""Base models by other names: suggested from a table, and never taken."""

import pytest

from spectr.adapters.base_names import likely_base, named_base, same_base

LIKELY = {
    "unsloth/Qwen3-8B-unsloth-bnb-4bit": "Qwen/Qwen3-8B",
    "unsloth/llama-3-8b-bnb-4bit": "meta-llama/Meta-Llama-3-8B",
    "unsloth/tinyllama-bnb-4bit": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": "meta-llama/Llama-3.1-8B-Instruct",
    "unsloth/mistral-7b-instruct-v0.3-bnb-4bit": "mistralai/Mistral-7B-Instruct-v0.3",
    "unsloth/gemma-2-9b-it-bnb-4bit": "google/gemma-2-9b-it",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-7B-Instruct",
    "/home/me/models/gemma-3-4b-it/": "google/gemma-3-4b-it",
    r"D:\models\Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    "/root/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de2": "Qwen/Qwen3-0.6B",
    "/cache/models--me--own-model/snapshots/ab": "me/own-model",
    "/root/autodl-tmp/qwen/Qwen2___5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "decapoda-research/llama-7b-hf": "huggyllama/llama-7b",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
    "me/own-model": None,
    "./output/checkpoint-100": None,
}


@pytest.mark.parametrize(("named", "likely"), LIKELY.items())
def test_what_a_name_most_likely_means(named, likely):
    assert likely_base(named) == likely


def test_names_in_words():
    assert named_base(None) == ""
    assert named_base("Qwen/Qwen3-8B") == "the adapter names Qwen/Qwen3-8B as its base"
    assert named_base("unsloth/Qwen3-8B").endswith("unsloth/Qwen3-8B as its base, most likely Qwen/Qwen3-8B")
    assert same_base("/models/Qwen3-8B", "unsloth/Qwen3-8B-bnb-4bit")
    assert same_base("/models/own", "me/own")
    assert not same_base("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base")
