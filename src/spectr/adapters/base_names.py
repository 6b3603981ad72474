"""Guess the base model that an adapter's configuration means if it names a copy, or a path on another machine.

The guess comes from a table and is a suggestion for people. It is never loaded instead of the named model.
"""

from __future__ import annotations

import re

_QUANTISED = re.compile(
    r"[-_.](?:unsloth|bnb|dynamic|4bit|8bit|int4|int8|fp8|nf4|gptq|awq|gguf|bf16|fp16|mlx|quantized|w4a16|w8a8)"
    r"(?=$|[-_.])",
    re.IGNORECASE,
)
_CACHED = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)")
# Model names by owner. To add a model, add its name on the Hub.
_MODELS = {
    "HuggingFaceTB": "SmolLM2-135M SmolLM2-360M SmolLM2-1.7B SmolLM2-135M-Instruct SmolLM2-360M-Instruct "
    "SmolLM2-1.7B-Instruct SmolLM3-3B SmolLM3-3B-Base SmolVLM-Instruct",
    "Qwen": "Qwen2-0.5B Qwen2-1.5B Qwen2-7B Qwen2-0.5B-Instruct Qwen2-1.5B-Instruct Qwen2-7B-Instruct Qwen2.5-0.5B "
    "Qwen2.5-1.5B Qwen2.5-3B Qwen2.5-7B Qwen2.5-14B Qwen2.5-32B Qwen2.5-0.5B-Instruct Qwen2.5-1.5B-Instruct "
    "Qwen2.5-3B-Instruct Qwen2.5-7B-Instruct Qwen2.5-14B-Instruct Qwen2.5-32B-Instruct Qwen2.5-72B-Instruct "
    "Qwen2.5-72B Qwen2.5-Coder-0.5B-Instruct Qwen2.5-Coder-1.5B-Instruct Qwen2.5-Coder-3B-Instruct "
    "Qwen2.5-Coder-7B-Instruct Qwen2.5-Coder-14B-Instruct Qwen2.5-Coder-32B-Instruct Qwen2.5-Coder-1.5B "
    "Qwen2.5-Coder-7B Qwen2.5-Math-1.5B Qwen2.5-Math-7B Qwen2.5-Math-1.5B-Instruct Qwen2.5-Math-7B-Instruct "
    "Qwen1.5-0.5B Qwen1.5-1.8B Qwen1.5-4B Qwen1.5-7B Qwen1.5-14B Qwen1.5-0.5B-Chat Qwen1.5-1.8B-Chat Qwen1.5-4B-Chat "
    "Qwen1.5-7B-Chat Qwen1.5-14B-Chat Qwen3-14B-Base Qwen3-4B-Instruct-2507 Qwen3-4B-Thinking-2507 "
    "Qwen3-30B-A3B-Instruct-2507 Qwen3-VL-4B-Instruct Qwen3-VL-8B-Instruct Qwen2.5-VL-3B-Instruct "
    "Qwen2.5-VL-7B-Instruct Qwen2-VL-2B-Instruct Qwen2-VL-7B-Instruct Qwen3-0.6B Qwen3-1.7B Qwen3-4B Qwen3-8B "
    "Qwen3-14B Qwen3-32B Qwen3-30B-A3B Qwen3-0.6B-Base Qwen3-1.7B-Base Qwen3-4B-Base Qwen3-8B-Base",
    "meta-llama": "Llama-2-7b-hf Llama-2-13b-hf Llama-2-70b-hf Llama-2-7b-chat-hf Llama-2-13b-chat-hf "
    "Meta-Llama-3-8B Meta-Llama-3-8B-Instruct Meta-Llama-3-70B Meta-Llama-3-70B-Instruct Llama-3.1-8B "
    "Llama-3.1-8B-Instruct Llama-3.1-70B Llama-3.1-70B-Instruct Llama-3.2-1B Llama-3.2-3B Llama-3.2-1B-Instruct "
    "Llama-3.2-3B-Instruct Llama-3.2-11B-Vision-Instruct Llama-3.3-70B-Instruct",
    "mistralai": "Mistral-7B-v0.1 Mistral-7B-v0.3 Mistral-7B-Instruct-v0.1 Mistral-7B-Instruct-v0.2 "
    "Mistral-7B-Instruct-v0.3 Mixtral-8x7B-v0.1 Mixtral-8x7B-Instruct-v0.1 Mistral-Nemo-Base-2407 "
    "Mistral-Nemo-Instruct-2407 Mistral-Small-Instruct-2409 Mistral-Small-24B-Base-2501 "
    "Mistral-Small-24B-Instruct-2501 Ministral-8B-Instruct-2410",
    "google": "gemma-2b gemma-7b gemma-2b-it gemma-7b-it gemma-2-2b gemma-2-9b gemma-2-27b gemma-2-2b-it gemma-2-9b-it "
    "gemma-2-27b-it gemma-3-270m gemma-3-270m-it gemma-3-1b-pt gemma-3-1b-it gemma-3-4b-pt gemma-3-4b-it "
    "gemma-3-12b-it gemma-3-27b-it flan-t5-small flan-t5-base flan-t5-large flan-t5-xl",
    "microsoft": "phi-2 Phi-3-mini-4k-instruct Phi-3-mini-128k-instruct Phi-3.5-mini-instruct phi-4 "
    "Phi-4-mini-instruct",
    "openai": "gpt-oss-20b gpt-oss-120b",
    "openai-community": "gpt2 gpt2-medium gpt2-large gpt2-xl",
    "distilbert": "distilgpt2 distilbert-base-uncased distilbert-base-cased",
    "facebook": "opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b opt-13b",
    "FacebookAI": "roberta-base roberta-large xlm-roberta-base xlm-roberta-large",
    "google-bert": "bert-base-uncased bert-base-cased bert-large-uncased bert-base-multilingual-cased",
    "google-t5": "t5-small t5-base t5-large t5-3b",
    "EleutherAI": "pythia-70m pythia-160m pythia-410m pythia-1b pythia-1.4b pythia-2.8b pythia-6.9b pythia-12b "
    "gpt-j-6b gpt-neo-125m gpt-neo-1.3B gpt-neo-2.7B gpt-neox-20b",
    "bigscience": "bloom-560m bloom-1b1 bloom-1b7 bloom-3b bloom-7b1 bloomz-560m bloomz-1b1 bloomz-3b bloomz-7b1",
    "tiiuae": "falcon-7b falcon-7b-instruct falcon-40b falcon-40b-instruct",
    "codellama": "CodeLlama-7b-hf CodeLlama-13b-hf CodeLlama-34b-hf CodeLlama-7b-Instruct-hf CodeLlama-13b-Instruct-hf "
    "CodeLlama-7b-Python-hf",
    "huggyllama": "llama-7b llama-13b llama-30b llama-65b",
    "lmsys": "vicuna-7b-v1.5 vicuna-13b-v1.5",
    "HuggingFaceH4": "zephyr-7b-alpha zephyr-7b-beta",
    "01-ai": "Yi-6B Yi-34B Yi-1.5-6B Yi-1.5-9B Yi-6B-Chat Yi-1.5-6B-Chat Yi-1.5-9B-Chat",
    "TinyLlama": "TinyLlama-1.1B-Chat-v1.0 TinyLlama-1.1B-intermediate-step-1431k-3T",
    "deepseek-ai": "DeepSeek-R1-Distill-Llama-8B DeepSeek-R1-Distill-Qwen-1.5B DeepSeek-R1-Distill-Qwen-7B "
    "DeepSeek-R1-Distill-Qwen-14B",
    "llava-hf": "llava-1.5-7b-hf llava-1.5-13b-hf llava-v1.6-mistral-7b-hf",
}
# Names of copies that are no owner's names, in lower case.
_OTHERS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama-3.1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    **{f"llama-{size}-hf": f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b")},
    **{f"decapoda-research-llama-{size}-hf": f"huggyllama/llama-{size}" for size in ("7b", "13b")},
    "codellama-7b": "codellama/CodeLlama-7b-hf",
    "codellama-13b": "codellama/CodeLlama-13b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "zephyr-sft": "HuggingFaceH4/mistral-7b-sft-beta",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-4b": "google/gemma-3-4b-pt",
}
_KNOWN = {name.lower(): f"{owner}/{name}" for owner, names in _MODELS.items() for name in names.split()} | _OTHERS


def likely_base(named: str) -> str | None:
    """The Hub id that a name most likely means; ``None`` if the table does not list it.

    Args:
        named: A Hub id, a copy's (``unsloth/Qwen3-8B-unsloth-bnb-4bit``), or a path (``/models/gemma-2-9b-it``).
    """
    cached = _CACHED.search(named)
    if cached:
        return likely_base(found := f"{cached['owner']}/{cached['name']}") or found
    return _KNOWN.get(_plain(named))


def same_base(one: str, other: str) -> bool:
    """Whether two names most likely mean the same model."""
    return (likely_base(one) or _plain(one)).lower() == (likely_base(other) or _plain(other)).lower()


def named_base(named: str | None) -> str:
    """The base model that an adapter names, with its most likely meaning, as text; empty if it names none."""
    if not named:
        return ""
    likely = likely_base(named)
    return f"the adapter names {named} as its base" + (f", most likely {likely}" if likely not in (None, named) else "")


def _plain(name: str) -> str:
    """The last part of a name or path in lower case, without its quantisation."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().replace("___", ".")  # as ModelScope's folders
    while (shorter := _QUANTISED.sub("", last)) != last:
        last = shorter
    return last
