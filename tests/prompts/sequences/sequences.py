"""Tiny models whose experts answer visibly differently, and the ways to call them that tests/prompts go through."""

from __future__ import annotations

import copy

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, QuantizedCache, StaticCache

import spectr
from guides import GuideBySum
from models import TOKENS, VOCAB, build, peft_adapter, tokens
from spectr import ExpertLibrary, build_index, calibrate, compose
from spectr.models import growing_cache

NEW = 4
FREE = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NAMES = ("ants", "bees", "cats")
SEVEN = torch.tensor([[7]])  # one more token
BY_SUM = spectr.Glider(token_router=None, top_k=1)  # one expert a prompt, with the guide above; needs no calibration
ROUTERS = {
    "calibrated": spectr.Calibrated(),
    "prior": spectr.Calibrated(level="prior"),
    "two": spectr.Calibrated(top_k=2, weights="softmax"),
    "shortlist": spectr.Shortlist(size=2),
    "shortlist of one": spectr.Shortlist(size=1),
    "global": BY_SUM,
    "glider": spectr.Glider(token_router=spectr.Spectr(top_k=2)),
}


def make_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


class World:
    """A base model and a library for it.

    Args:
        base: Never changed.
        root: An empty folder.
        targets: Modules that the experts adapt.
        calibrated: Whether the library is calibrated and indexed.
    """

    def __init__(self, base, root, targets="all-linear", *, calibrated=False):
        self.base, self._oracles = base, {}
        for seed, name in enumerate(NAMES, start=3):
            conv = any(type(module).__name__ == "Conv1D" for module in base.modules())
            peft_adapter(base, root / name, seed, targets=targets, lora_alpha=24, fan_in_fan_out=conv)
        self.library = ExpertLibrary.open(root)
        if calibrated:
            texts = [" ".join(f"w{i}" for i in row) for row in tokens(8, 10, 99).tolist()]
            made = calibrate(copy.deepcopy(base), self.library, make_tokenizer(), texts=texts, null=0)
            self.library = build_index(copy.deepcopy(base), self.library.with_calibration(made))

    def routed(self, router=BY_SUM):
        """A composed copy of the model, and its handle."""
        model, library, guide = copy.deepcopy(self.base), self.library, None
        if isinstance(router, spectr.Glider):
            library, guide = library.with_descriptions(dict.fromkeys(library, "x")), GuideBySum()
        return model, compose(model, library, router, guide=guide)

    def oracle(self, name):
        """The model with one expert for everything."""
        if name not in self._oracles:
            self._oracles[name] = self.routed(spectr.Oracle(expert=name))[0]
        return self._oracles[name]


def decided(routed, ids, **more):
    """The expert that is decided for a prompt; of several the strongest."""
    return routed.experts[routed.prompt.decide(input_ids=ids, **more)[0].argmax().item()]


def prompts_of(routed, length=6):
    """Two prompts of different experts, [(ids, expert)]."""
    found = {}
    for seed in range(300):
        ids = tokens(1, length, 1000 + seed)
        found.setdefault(decided(routed, ids), ids)
        if len(found) == 2:
            return [(ids, name) for name, ids in found.items()]
    raise AssertionError("one expert is always chosen")


STATES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")

# Ways of calling a decoder: (model, prompt, another prompt, what else happens in between) -> tokens. All are greedy.


def say(model, ids, new_only=True, **options):
    """What ``generate`` adds."""
    said = model.generate(ids, **{**FREE, **options})
    return said[:, -NEW:] if new_only else said


def next_of(out):
    return out.logits[:, -1:].argmax(-1)


def step_by_step(model, ids, between, call=None, whole=False, **state):
    """A decoding loop by hand, on whatever state the model returns."""
    call, said = call or model, []
    out = call(ids, use_cache=True, **state)
    for _ in range(NEW):
        between()
        said.append(next_of(out))
        ids = torch.cat([ids, said[-1]], 1)
        name = next(name for name in STATES if out.get(name) is not None)
        out = call(ids if whole else said[-1], use_cache=True, **{name: out[name]})
    return torch.cat(said, 1)


def by_inner_decoder(model, ids, between):
    out, said = model.model(ids, use_cache=True), []
    for _ in range(NEW):
        between()
        said.append(model.lm_head(out.last_hidden_state[:, -1:]).argmax(-1))
        out = model.model(said[-1], past_key_values=out.past_key_values)
    return torch.cat(said, 1)


def custom(model, input_ids, **given):
    """For ``custom_generate``: a local decoding loop."""
    out = model(input_ids, past_key_values=given.get("past_key_values"), attention_mask=given.get("attention_mask"))
    for _ in range(NEW):
        input_ids = torch.cat([input_ids, next_of(out)], 1)
        out = model(input_ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
    return input_ids


def sampled(model, ids, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.generate(ids, **{**FREE, "do_sample": True, **options})


def left_padded(model, ids):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    return say(model, padded, attention_mask=(padded > 0).long())


WAYS = {
    "generate": lambda m, x, o, b: say(m, x),
    "use_cache=False": lambda m, x, o, b: say(m, x, use_cache=False),
    "prefill_chunk_size": lambda m, x, o, b: say(m, x, prefill_chunk_size=2),
    "static": lambda m, x, o, b: say(m, x, cache_implementation="static"),
    "fp8": lambda m, x, o, b: say(m, x, cache_implementation="quantized", cache_config={"backend": "fp8"}),
    "inner decoder": lambda m, x, o, b: by_inner_decoder(m, x, b),
    "one call without a cache": lambda m, x, o, b: next_of(m(x, use_cache=False)),
    "custom_generate": lambda m, x, o, b: say(m, x, custom_generate=custom),
    "beams": lambda m, x, o, b: m.generate(x, **{**FREE, "num_beams": 3, "num_return_sequences": 2}),
    "beams without a cache": lambda m, x, o, b: say(m, x, num_beams=3, use_cache=False),
    "sampled beams": lambda m, x, o, b: sampled(m, x, num_beams=3, num_return_sequences=2),
    "samples": lambda m, x, o, b: sampled(m, x, num_return_sequences=3),
    "guided by another prompt": lambda m, x, o, b: say(m, x, guidance_scale=1.5, negative_prompt_ids=o),
    "guided": lambda m, x, o, b: say(m, x, guidance_scale=1.5),
    "guided without a cache": lambda m, x, o, b: say(m, x, guidance_scale=1.5, negative_prompt_ids=o, use_cache=False),
    "embeddings": lambda m, x, o, b: m.generate(inputs_embeds=m.get_input_embeddings()(x), **FREE),
    "prompt lookup": lambda m, x, o, b: say(m, x, prompt_lookup_num_tokens=2),
    "its own assistant": lambda m, x, o, b: say(m, x, assistant_model=m),
    "left padding": lambda m, x, o, b: left_padded(m, x),
}

CACHES = {
    "DynamicCache()": lambda model: DynamicCache(),
    "DynamicCache(config)": lambda model: DynamicCache(config=model.config),
    "growing": growing_cache,
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "fp8": lambda model: QuantizedCache("fp8", model.config),
}


def with_filled(model, ids, between, make, new_alone=False, by=None, generated=False, **options):
    """``generate`` on a cache that holds the prompt's beginning, or something else."""
    cache = make(model)
    if generated:
        model.generate(ids[:, :3], past_key_values=cache, **{**FREE, "max_new_tokens": 1})
    else:
        model(ids[:, :3] if by is None else by, past_key_values=cache)
    between()
    if new_alone:
        return say(model, ids[:, 3:], attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    return say(model, ids, past_key_values=cache, **options)


def with_copies(model, ids, between, make):
    """A prefilled beginning, copied for each request."""
    cache = make(model)
    model(ids[:, :2], past_key_values=cache)
    between()
    first = say(model, ids, past_key_values=copy.deepcopy(cache))
    model(torch.tensor([[5, 4]]), past_key_values=copy.deepcopy(cache))
    between()
    assert torch.equal(first, say(model, ids, past_key_values=cache)), "the copies differ"
    return first


CACHE_WAYS = {
    "empty": lambda m, x, o, b, c: say(m, x, past_key_values=c(m)),
    "filled": lambda m, x, o, b, c: with_filled(m, x, b, c),
    "filled by generate": lambda m, x, o, b, c: with_filled(m, x, b, c, generated=True),
    "only new tokens": lambda m, x, o, b, c: with_filled(m, x, b, c, new_alone=True),
    "only new tokens, after generate": lambda m, x, o, b, c: with_filled(m, x, b, c, new_alone=True, generated=True),
    "filled by another prompt": lambda m, x, o, b, c: with_filled(m, x, b, c, by=o),
    "copied": lambda m, x, o, b, c: with_copies(m, x, b, c),
    "loop": lambda m, x, o, b, c: step_by_step(m, x, b, past_key_values=c(m)),
    "loop of forward": lambda m, x, o, b, c: step_by_step(m, x, b, call=m.forward, past_key_values=c(m)),
    "custom_generate": lambda m, x, o, b, c: say(m, x, custom_generate=custom, past_key_values=c(m)),
    "beams": lambda m, x, o, b, c: say(m, x, num_beams=3, past_key_values=c(m)),
    "chunks": lambda m, x, o, b, c: say(m, x, prefill_chunk_size=2, past_key_values=c(m)),
}

# An fp8 layer takes its scale from the tokens that it is given first, so these change its numbers in any model.
FP8_DEPENDS = {
    "filled",
    "filled by generate",
    "only new tokens",
    "only new tokens, after generate",
    "copied",
    "chunks",
}


def pair(name, root):
    """An encoder with a decoder, with three experts."""
    special = {"decoder_start_token_id": 0, **TOKENS}
    if name == "T5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
        config = transformers.T5Config(vocab_size=VOCAB, **sizes, **special)
        return World(build(transformers.T5ForConditionalGeneration, config), root)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.BartConfig(vocab_size=VOCAB, init_std=0.25, forced_eos_token_id=None, **sizes, **special)
    return World(build(transformers.BartForConditionalGeneration, config), root)


def differences(what, got, want):
    """A line for the report, where something is not as it should be."""
    same = got.shape == want.shape and torch.equal(got, want)
    return [] if same else [f"{what}: {got.tolist()} in place of {want.tolist()}"]
