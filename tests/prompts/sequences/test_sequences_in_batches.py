"""Sequences in one call: rows of a batch, packed rows and continuous batching, each as it is alone."""

from __future__ import annotations

import gc

import pytest
import torch
from sequences import FREE, NEW, decided, next_of, prompts_of, say
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import spectr
from models import close, peft_library, tiny_llama, tokens
from picked_experts import with_picked_experts
from spectr.errors import CompositionError
from trained_modules import ROWS


def test_batches_whose_rows_have_different_experts(world, shared):
    model, routed, ((a, one), (b, two)) = shared
    both = torch.cat([a, b])
    short = b[:, :4]
    right, left = (torch.nn.functional.pad(short, pad) for pad in ((0, 2), (2, 0)))
    third = decided(routed, short)

    def alone(**options):
        return torch.cat([say(world.oracle(name), ids, **options) for ids, name in ((a, one), (b, two))])

    for options in ({}, {"num_beams": 2}, {"guidance_scale": 1.5}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        assert torch.equal(say(model, both, **options), alone(**options)), options
    negative = say(model, both, guidance_scale=1.5, negative_prompt_ids=both.flip(0))
    assert torch.equal(negative[:1], say(world.oracle(one), a, guidance_scale=1.5, negative_prompt_ids=b))
    several = model.generate(both, **{**FREE, "num_beams": 2, "num_return_sequences": 2})
    assert torch.equal(
        several[2:], world.oracle(two).generate(b, **{**FREE, "num_beams": 2, "num_return_sequences": 2})
    )
    cache = DynamicCache(config=model.config)
    model(both[:, :3], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert torch.equal(say(model, both, num_beams=2, past_key_values=cache), alone(num_beams=2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    padded = say(model, torch.cat([a, left]), attention_mask=mask)
    assert torch.equal(padded, torch.cat([say(world.oracle(one), a), say(world.oracle(third), short)]))
    logits = model(torch.cat([a, right]), attention_mask=mask.flip(1)).logits
    close(logits[1:, :4], world.oracle(third)(short).logits)
    close(logits[:1], world.oracle(one)(a).logits)


@pytest.mark.parametrize("cache", ["selects", "is cut", "none"])
@pytest.mark.parametrize("alike", [True, False])
def test_a_loop_drops_rows_that_are_done(world, shared, cache, alike):
    model, _, ((a, one), (b, two)) = shared
    batch = torch.cat([a, a, a, a] if alike else [a, b, a, b])
    kept = torch.tensor([1, 2, 3])

    def drops_the_first(model, input_ids, **given):
        options = {
            "past_key_values": given["past_key_values"] if cache != "none" else None,
            "use_cache": cache != "none",
        }
        out = model(input_ids, **options)
        ids, state = torch.cat([input_ids, next_of(out)], 1)[kept], out.past_key_values
        if cache == "selects":
            state.batch_select_indices(kept)
        elif cache == "is cut":
            for layer in state.layers:
                layer.keys, layer.values = layer.keys[kept], layer.values[kept]
        read = ids if cache == "none" else ids[:, -1:]
        return model(read, **options).logits[:, -1]

    if not alike and cache != "selects":
        with pytest.raises(CompositionError, match="3 rows, but the decision has 4"):
            model.generate(batch, custom_generate=drops_the_first, **FREE)
        return
    got = model.generate(batch, custom_generate=drops_the_first, **FREE)
    for row, number in enumerate(kept.tolist()):
        ids, name = ((a, one), (b, two))[0 if alike else number % 2]
        oracle = world.oracle(name)
        text = torch.cat([ids, next_of(oracle(ids))], 1)
        close(got[row], oracle(text).logits[0, -1], 1e-4)


def test_packed_rows(world, shared):
    model, routed, ((a, one), (b, two)) = shared
    row, places = torch.cat([a, b], 1), torch.arange(6).repeat(2)[None]
    want = torch.cat([world.oracle(one)(a).logits, world.oracle(two)(b).logits], 1)
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    for options in ({}, lengths):
        close(model(row, position_ids=places, use_cache=False, **options).logits, want)
    close(model(row, position_ids=places, use_cache=False, logits_to_keep=3).logits, want[:, -3:])
    close(model.lm_head(model.model(row, position_ids=places, use_cache=False).last_hidden_state), want)
    with routed.prompt.using(routed.prompt.decide(input_ids=b)):
        close(model(row, position_ids=places, use_cache=False).logits[:, 6:], want[:, 6:])


@pytest.mark.parametrize("picks", [False, True])
def test_packed_rows_of_a_batch(tmp_path, picks):
    """Each prompt in each row has its own expert, also where MoE experts pick tokens of all rows."""
    made, oracles = with_picked_experts if picks else tiny_llama, []
    model, targets = made(), r".*experts\.\d\.[02]|.*q_proj" if picks else "all-linear"
    library = peft_library(model, tmp_path, {"ants": 4, "bees": 4}, targets=targets)
    for expert in library.names:
        oracles.append(made())
        spectr.compose(oracles[-1], library, spectr.Oracle(expert=expert))
    spectr.compose(model, library, ROWS)
    rows = [[tokens(1, 3, 0), tokens(1, 5, 1), tokens(1, 1, 2)], [tokens(1, 7, 3), tokens(1, 2, 4)]]
    for number, prompt in enumerate(prompt for row in rows for prompt in row):
        prompt[0, 0] = 4 + number % 2
    for batch in (rows, [[tokens(1, 9, 7)], rows[1]]):
        ids = torch.cat([torch.cat(row, 1) for row in batch])
        places = torch.stack([torch.cat([torch.arange(p.shape[1]) for p in row]) for row in batch])
        want = [torch.cat([oracles[int(p[0, 0]) % 2](p).logits for p in row], 1) for row in batch]
        got = model(ids, position_ids=places, use_cache=False)
        close(got.logits, torch.cat(want), 1e-4)
        got = model(ids, position_ids=places, use_cache=False, logits_to_keep=2)
        close(got.logits, torch.cat(want)[:, -2:], 1e-4)


def test_continuous_batching(world, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # as each manager's end does, which takes longer than all else here
    model, routed = world.routed(spectr.Calibrated())
    (a, one), (b, two) = prompts_of(routed)
    inputs, verdicts = [a[0].tolist(), b[0].tolist()], [routed.prompt.decide(input_ids=ids) for ids in (a, b)]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)

    def batch(returned=1, **more):
        sampling = {"do_sample": True, "top_k": 1, "num_return_sequences": returned}
        settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0, **sampling)
        said = model.generate_batch(inputs, settings, small, warmup=False, **more)
        return sorted(output.generated_tokens for output in said.values())

    def want(*names, times=1):
        return sorted(
            times * [say(world.oracle(name), ids)[0].tolist() for name, ids in zip(names, (a, b), strict=True)]
        )

    assert batch() == want(one, two)
    assert batch(returned=2) == want(one, two, times=2)
    with routed.prompt.using(verdicts[1]):
        assert batch() == want(two, two)
    with routed.prompt.using(torch.cat(verdicts[::-1])):
        assert batch() == want(two, one)
    routed.prompt.hold(verdicts[0])
    assert batch() == want(one, one)
    routed.prompt.hold(None)
    assert batch(persistent_manager=True) == want(one, two)
    routed.allow([two])
    assert batch(persistent_manager=True) == want(two, two)
    routed.allow(None)
    model.destroy_cached_continuous_batching_manager()
    settings = GenerationConfig(max_new_tokens=30, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(settings, continuous_batching_config=small, warmup=False) as manager:
        for ids in (a, b, a):  # a name that is used again is another request
            manager.add_request(ids[0].tolist(), request_id="again", max_new_tokens=NEW)
            said = manager.get_result("again", timeout=30).generated_tokens
            assert said == say(world.oracle(decided(routed, ids)), ids)[0].tolist()
        manager.add_request(a[0].tolist(), request_id="long", streaming=True)
        next(iter(manager.request_id_iter("long")))
        with pytest.raises(CompositionError):
            routed.allow([two])
    assert torch.equal(say(model, a), say(world.oracle(one), a))


def test_tokens_that_moe_experts_pick_keep_the_expert_of_their_request(monkeypatch, tmp_path):
    """As many tokens are picked as there are requests, now and then: the sizes alone tell nothing."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    model, prompts = with_picked_experts(), [tokens(1, length, seed) for seed, length in enumerate((5, 6, 7, 4))]
    library = peft_library(model, tmp_path, {"ants": 4, "bees": 4}, targets=r".*experts\.\d\.[02]|.*q_proj")
    oracles = []
    for name in library.names:
        oracles.append(with_picked_experts())
        spectr.compose(oracles[-1], library, spectr.Oracle(expert=name))
    routed = spectr.compose(model, library, ROWS)
    want = [say(oracles[int(ids[0, 0]) % 2], ids)[0].tolist() for ids in prompts]
    assert len({int(ids[0, 0]) % 2 for ids in prompts}) == 2
    settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0, do_sample=True, top_k=1)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    said = model.generate_batch([ids[0].tolist() for ids in prompts], settings, small, warmup=False)
    assert sorted(output.generated_tokens for output in said.values()) == sorted(want)
    routed.remove()
    spectr.compose(model, library, ROWS)
    row, places = torch.cat(prompts, 1), torch.cat([torch.arange(ids.shape[1]) for ids in prompts])[None]
    logits = torch.cat([oracles[int(ids[0, 0]) % 2](ids).logits for ids in prompts], 1)
    last = torch.tensor([4, 10, 17, 21])
    close(model(row, position_ids=places, use_cache=False).logits, logits)
    close(model(row, position_ids=places, use_cache=False, logits_to_keep=last).logits, logits[:, last])
