"""Watching a routed model: what is recorded is what was computed, and watching changes nothing."""

from __future__ import annotations

import pytest
import torch

from models import build, greedy, logits, peft_adapter, peft_library, tiny_llama, tokens
from spectr import Arrow, ExpertLibrary, RoutedLinear, Spectr, Uniform, compose, trace
from spectr.errors import CompositionError

RANKS = {"dogs": 4, "ants": 2, "cats": 8}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
ROUTERS = [Spectr(top_k=2), Spectr(top_k=2, weights="softmax"), Arrow(top_k=2), Uniform()]
ids = tokens(batch=2, length=6)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return peft_library(tiny_llama(), tmp_path_factory.mktemp("experts"), RANKS)


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """ants adapt everything, cats only the attention's queries."""
    root = tmp_path_factory.mktemp("partial")
    peft_adapter(tiny_llama(), root / "ants", seed=1)
    peft_adapter(tiny_llama(), root / "cats", seed=2, targets=["q_proj"])
    return ExpertLibrary.open(root)


def routed_llama(library, router=None):
    model = tiny_llama()
    compose(model, library, router or Spectr(top_k=2))
    return model


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@torch.no_grad()
def inputs_of(model, layer, **inputs):
    """What a layer is given, seen by a hook of the test's own."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__ + getattr(r, "weights", ""))
@pytest.mark.parametrize("name", [Q, UP])
def test_scores_and_weights_are_those_that_are_computed(library, router, name):
    model = routed_llama(library, router)
    layer = model.get_submodule(name)
    x = inputs_of(model, layer, input_ids=ids)
    with trace(model) as record:
        logits(model, ids)
    parts = layer.stack().parts()
    if isinstance(router, Spectr):
        scores = torch.stack([(x @ part.A.T).norm(dim=-1) for part in parts.values()], dim=-1)
    elif isinstance(router, Arrow):
        scores = torch.stack([(x @ part.own.prototypes_EI[0]).abs() for part in parts.values()], dim=-1)
    else:
        scores = torch.ones(2, 6, 3)
    torch.testing.assert_close(record[name].scores, scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record[name].weights, router.selection(scores), rtol=0, atol=1e-5)
    assert record[name].experts == layer.experts == ("ants", "cats", "dogs")


def test_every_routed_layer_is_there_in_the_models_order(library):
    model = routed_llama(library)
    with trace(model) as record:
        logits(model, ids)
    assert list(record) == [name for name, module in model.named_modules() if isinstance(module, RoutedLinear)]
    assert len(record) == 14
    assert record.experts == ("ants", "cats", "dogs")
    assert {layer.scores.shape for layer in record.values()} == {(2, 6, 3)}
    assert {layer.weights.dtype for layer in record.values()} == {torch.float32}
    assert torch.equal(record.input_ids, ids)
    assert record.mask.all()


def test_chosen_are_the_experts_with_a_weight_the_heaviest_first(library):
    model = routed_llama(library, Spectr(top_k=2, weights="softmax"))
    with trace(model) as record:
        logits(model, ids)
    for batch in range(2):
        for token in range(6):
            weights = dict(zip(record[UP].experts, record[UP].weights[batch, token].tolist(), strict=True))
            chosen = record[UP].chosen(batch, token)
            assert len(chosen) == 2
            assert chosen == tuple(sorted((n for n in weights if weights[n] > 0), key=lambda n: -weights[n]))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__ + getattr(r, "weights", ""))
def test_a_trace_leaves_the_outputs_and_the_model_as_they_are(library, router):
    model = routed_llama(library, router)
    before, count = logits(model, ids), hooks(model)
    with trace(model):
        assert torch.equal(logits(model, ids), before)
        assert hooks(model) > count
    assert hooks(model) == count
    assert torch.equal(logits(model, ids), before)


def test_hooks_are_removed_after_an_error_inside(library):
    model = routed_llama(library)
    count = hooks(model)
    with pytest.raises(KeyError), trace(model):
        raise KeyError
    assert hooks(model) == count


def test_weights_are_the_mean_over_layers_and_zero_where_a_layer_lacks_the_expert(partial):
    model = routed_llama(partial, Uniform())
    with trace(model) as record:
        logits(model, ids)
    assert record[Q].experts == ("ants", "cats")
    assert record[UP].experts == ("ants",)
    # cats: half of 2 of the 14 layers
    torch.testing.assert_close(record.weights(), torch.tensor([13 / 14, 1 / 14]).expand(2, 6, 2))
    torch.testing.assert_close(record.weights(lambda name: "q_proj" in name), torch.full((2, 6, 2), 0.5))
    assert record.shares() == pytest.approx({"ants": 13 / 14, "cats": 1 / 14})


@pytest.mark.parametrize("side", ["left", "right"])
def test_shares_sum_to_one_and_leave_padding_out(library, side):
    model = routed_llama(library)
    pad = torch.zeros(1, 2, dtype=torch.long)
    short = torch.cat([pad, ids[:1, :4]] if side == "left" else [ids[:1, :4], pad], dim=1)
    mask = (short != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with trace(model) as padded:
        logits(model, short, attention_mask=mask, position_ids=positions)
    with trace(model) as alone:
        logits(model, ids[:1, :4])
    assert torch.equal(padded.mask, mask.bool())
    assert sum(padded.shares().values()) == pytest.approx(1, abs=1e-6)
    assert padded.shares() == pytest.approx(alone.shares(), abs=1e-6)


def test_generation_with_a_cache_is_one_trace_of_all_tokens(library):
    model = routed_llama(library)
    with trace(model) as record:
        out = greedy(model, ids, new=4)
    assert record[Q].scores.shape == (2, 6 + 4 - 1, 3)  # the last token is never put in
    assert torch.equal(record.input_ids, out[:, :-1])
    assert record.mask.all()
    with trace(model) as at_once:
        logits(model, out[:, :-1])
    torch.testing.assert_close(record[UP].scores, at_once[UP].scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(record[UP].weights, at_once[UP].weights, rtol=0, atol=1e-5)
    assert record.shares() == pytest.approx(at_once.shares(), abs=1e-5)


def test_generation_of_a_left_padded_batch_is_traced_with_its_padding(library):
    model = routed_llama(library)
    batch = ids.clone()
    batch[0, :2] = 0
    mask = (batch != 0).long()
    with trace(model) as record:
        model.generate(batch, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert record.mask.tolist() == [[False] * 2 + [True] * 6, [True] * 8]
    assert sum(record.shares().values()) == pytest.approx(1, abs=1e-6)


def test_beam_search_is_traced_beam_by_beam(library):
    model = routed_llama(library)
    with trace(model) as record:
        greedy(model, ids, new=4, num_beams=3)
    assert record[Q].scores.shape[0] == 2 * 3
    assert sum(record.shares().values()) == pytest.approx(1, abs=1e-6)


def test_calls_follow_each_other(library):
    model = routed_llama(library)
    with trace(model) as record:
        logits(model, ids[:, :4])
        logits(model, ids[:, 4:])
    assert [scores.shape for scores, _ in record[Q].steps] == [(2, 4, 3), (2, 2, 3)]
    assert torch.equal(record.input_ids, ids)


def test_an_encoder_and_its_decoder_are_traced_each_over_its_tokens(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)
    model = build(T5ForConditionalGeneration, config)
    peft_library(model, tmp_path, {"ants": 2, "cats": 4})
    compose(model, tmp_path, Spectr(top_k=1))
    with trace(model) as record:
        logits(model, ids, decoder_input_ids=ids[:, :3])
    shapes = {
        "encoder.block.0.layer.0.SelfAttention.q": (2, 6, 2),
        "decoder.block.0.layer.0.SelfAttention.q": (2, 3, 2),
        "decoder.block.0.layer.1.EncDecAttention.q": (2, 3, 2),
        "decoder.block.0.layer.1.EncDecAttention.k": (2, 6, 2),
    }
    assert {name: record[name].scores.shape for name in shapes} == shapes
    assert record.weights(lambda name: name.startswith("encoder")).shape == (2, 6, 2)
    assert sum(record.shares().values()) == pytest.approx(1, abs=1e-6)
    with trace(model) as record:
        greedy(model, ids, new=3)
    assert record["encoder.block.0.layer.0.SelfAttention.q"].scores.shape == (2, 6, 2)
    assert record["decoder.block.1.layer.0.SelfAttention.q"].scores.shape == (2, 3, 2)
    assert sum(record.shares().values()) == pytest.approx(1, abs=1e-6)


def test_a_plain_model_cannot_be_traced():
    with pytest.raises(CompositionError, match=r"no routed layers\n  to do: compose it first: spectr.compose"):
        trace(tiny_llama()).__enter__()


def test_a_removed_model_cannot_be_traced(library):
    model = tiny_llama()
    compose(model, library, Spectr(top_k=2)).remove()
    with pytest.raises(CompositionError, match="no routed layers"), trace(model):
        pass


def test_a_layer_that_is_not_there_is_answered_with_the_nearest(library):
    with trace(routed_llama(library)) as record:
        pass
    with pytest.raises(CompositionError, match=r"no trace of a layer 'model\.layers\.0\.self_attn\.qproj'") as caught:
        record["model.layers.0.self_attn.qproj"]
    assert "did you mean 'model.layers.0.self_attn.q_proj'" in caught.value.do


def test_layers_by_no_name_are_refused(library):
    model = routed_llama(library)
    with trace(model) as record:
        logits(model, ids)
    with pytest.raises(CompositionError, match=r"no routed layer was traced"):
        record.weights(lambda name: "nowhere" in name)
