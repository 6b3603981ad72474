"""Corners of composing that once went wrong, or would go wrong in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import close, logits, peft_library, random_factors, tiny_llama, tokens, types_unchecked, write_adapter
from spectr import ExpertLibrary, Oracle, Spectr, compose, get_router, trace
from spectr.errors import CompositionError

ids = tokens(batch=2, length=6)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return peft_library(tiny_llama(), tmp_path_factory.mktemp("adapters"), {"ants": 4, "bees": 4})


def test_a_layer_that_is_read_but_never_called_is_refused(tmp_path):
    """Tokens cannot choose experts for the output projection of nn.MultiheadAttention; one expert is exact."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for seed, name in enumerate(("ants", "bees")):
        write_adapter(tmp_path / name, {"self_attn.out_proj": random_factors(2, 8, 8, seed=seed)})
    with pytest.raises(CompositionError, match=r"changes self_attn.out_proj, whose weights"):
        compose(model, ExpertLibrary.open(tmp_path), Spectr(top_k=1))


def test_weights_of_a_routed_output_layer_can_be_tied(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    write_adapter(tmp_path / "ants", {"lm_head": random_factors(2, 32, 61, seed=1)})
    compose(model, ExpertLibrary.open(tmp_path), Oracle(expert="ants"))
    before = logits(model, ids)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), before)


def test_a_router_class_is_no_router(library):
    with types_unchecked(), pytest.raises(CompositionError, match="is not a router"):
        compose(tiny_llama(), library, Spectr)


def test_a_removed_handle_does_nothing_more(library):
    model = tiny_llama()
    routed = compose(model, library, Spectr(top_k=1))
    routed.remove()
    for change in (lambda: routed.allow(["ants"]), lambda: routed.discard("ants")):
        with pytest.raises(CompositionError, match=r"handle was removed(.|\n)*compose the model again"):
            change()
    assert not any("Routed" in type(module).__name__ for module in model.modules())
    routed.remove()


def test_experts_are_read_anew_after_a_cast(library):
    model = tiny_llama().to(torch.bfloat16)
    routed = compose(model, library, Spectr(top_k=1)).allow(["ants"])
    model.float()
    routed.allow(None)
    fresh = tiny_llama().to(torch.bfloat16).float()
    compose(fresh, library, Spectr(top_k=1))
    assert torch.equal(logits(model, ids), logits(fresh, ids))


def test_a_compiled_model_is_composed_and_traced_as_the_model_itself(library):
    model = tiny_llama()
    routed = compose(torch.compile(model, backend="eager"), library, Spectr(top_k=1))
    assert routed.model is model
    with trace(torch.compile(model, backend="eager")) as record:
        model(ids)
    assert record.shares().keys() == {"ants", "bees"}


def test_a_trace_of_nothing_reports_it(library):
    model = tiny_llama()
    compose(model, library, Spectr(top_k=1))
    with trace(model) as record:
        pass
    with pytest.raises(CompositionError, match=r"no routed layer was traced(.|\n)*inside the with-block"):
        record.shares()


def test_padding_of_embedded_inputs_is_left_out_of_shares(library):
    model = tiny_llama()
    compose(model, library, Spectr(top_k=1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = []
    for inputs in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with trace(model) as record:
            model(**inputs, attention_mask=mask)
        assert torch.equal(record.mask, mask.bool())
        found.append(record.shares())
    assert found[0] == pytest.approx(found[1])


def test_a_layer_is_called_and_traced_by_keyword_as_nn_linear_is(library):
    model = tiny_llama()
    layer = compose(model, library, Oracle(expert="ants")).layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 32)
    with torch.no_grad(), trace(model) as record:
        close(layer(input=x), layer(x))
    assert [scores.shape for scores, _ in record["model.layers.0.self_attn.q_proj"].steps] == [(2, 3, 1)] * 2


@pytest.mark.parametrize(("options", "message"), [({"top_k": True}, "top_k=True"), ({"temperature": "hot"}, "hot")])
def test_a_value_of_the_wrong_kind_is_named_and_not_the_option(options, message):
    with types_unchecked(), pytest.raises(CompositionError, match=f"{message}'?\n  expected: a"):
        get_router("arrow", **options)
