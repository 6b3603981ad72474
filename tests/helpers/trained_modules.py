"""Adapters with trained modules, made by PEFT, and a policy that takes one expert a prompt by its first token."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model

import spectr
from adapters_on_disk import of_others
from models import TEXT, TOKENS, VOCAB, build
from spectr.routers import Evidence, HoldWeights, PromptPolicy
from spectr.routers.evidence import Found


@dataclass(frozen=True, kw_only=True)
class ByFirst(Evidence):
    """The first token's number says which expert."""

    def reader(self, source, experts):
        def read(input_ids, attention_mask=None, **_):
            first = 0 if attention_mask is None else attention_mask.int().argmax(-1)
            chosen = input_ids[torch.arange(len(input_ids)), first] % len(experts)
            return Found(torch.nn.functional.one_hot(chosen, len(experts)).float())

        return read


ROWS = PromptPolicy(evidence=ByFirst(), use=HoldWeights(), router=spectr.Spectr(top_k=1))


def moved(model, folder, config, seed):
    """An adapter whose trained parameters are all moved, made and saved by PEFT."""
    with of_others():
        wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                fresh = 0.4 * noise if "lora_" in name else weight.data + 0.3 * noise
                weight.data.copy_(fresh)
        wrapped.save_pretrained(folder)
    return folder


def as_peft(model, folder):
    with of_others():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


@torch.no_grad()
def out(model, ids, **inputs):
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :4]
    return model(input_ids=ids, **inputs).logits


def library_of(model, root, config, names=("ants", "bees")):
    folders = {name: moved(model, root / name, config, seed) for seed, name in enumerate(names, start=1)}
    return spectr.ExpertLibrary.from_adapters(folders), folders


def llama_classifier(labels=3):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**{**TEXT, **TOKENS, "num_key_value_heads": 2, "num_labels": labels})
    return build(LlamaForSequenceClassification, config)


def roberta(kind="RobertaForSequenceClassification"):
    import transformers

    config = transformers.RobertaConfig(**{**TEXT, **TOKENS, "num_labels": 3, "is_decoder": "CausalLM" in kind})
    return build(getattr(transformers, kind), config)


def gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return build(Gemma3ForCausalLM, Gemma3TextConfig(**{**TEXT, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return build(GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=16))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB}
    return build(T5ForConditionalGeneration, T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
