"""Shortlists of no expert: the base model answers, and nothing is read from disk for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from abstaining import COMMON, FITTING, RED
from scaling import ids_of, listed, routed_model
from spectr import Calibrated, Lag, Shortlist, Spectr
from spectr.layers import trace
from spectr.models.generate import encode_batch
from spectr.plots.figures import write_token_map
from spectr.plots.token_weights import token_routing
from spectr.routers.abstention import AUTO, always_choosing
from text_model import make_model, make_tokenizer

ROUTERS = [
    Shortlist(size=1),
    Shortlist(size=2),
    Shortlist(size=1, bits=32),
    Shortlist(size=2, token_router=Spectr(top_k=2, weights="softmax")),
    Shortlist(size=3, token_router=Lag(shortlist=2)),
    Calibrated(),
    Calibrated(level="prior"),
]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def with_null(library):
    return library.with_calibration(replace(library.calibration, null=[[5, 6], [5, 9, 7]] * math.ceil(1 / AUTO)))


def abstaining(library, router):
    """A composed model that finds prompts with the word "red" ordinary."""
    model, routed = routed_model(with_null(library), router)
    assert routed.prompt.policy.abstain == AUTO
    plain = routed.prompt.read

    def read(input_ids, **given):
        p_B = torch.where((input_ids == RED).any(-1), 0.4, 0.01)
        return plain(input_ids=input_ids, **given)._replace(p_B=p_B)

    routed.prompt.read = read
    return model, routed


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_an_ordinary_prompt_has_the_base_models_answer(library, router):
    model, routed = abstaining(library, router)
    base, always = make_model(), routed_model(with_null(library), always_choosing(router))[0]
    for prompt in (COMMON[0], FITTING[1], COMMON[1]):
        ids = ids_of(prompt)
        ordinary = prompt in COMMON
        expected = (base if ordinary else always).generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        assert (routed.prompt.remark is None) is not ordinary
        assert torch.equal(model(ids).logits, base(ids).logits) is ordinary
    assert listed(routed) == [()]
    given = encode_batch(make_tokenizer(), [COMMON[0], FITTING[1]])
    mixed, real = model(**given).logits, given["attention_mask"].bool()
    assert torch.equal(mixed[0][real[0]], base(**given).logits[0][real[0]])
    torch.testing.assert_close(mixed[1][real[1]], always(**given).logits[1][real[1]], rtol=1e-4, atol=1e-4)


def test_no_expert_is_read_from_disk_for_an_ordinary_prompt(library, tmp_path):
    model, routed = abstaining(library, Shortlist(size=2))
    with trace(model) as record:
        model(ids_of(COMMON[0]))
    assert routed.expert_cache.experts == ()
    assert record.shares() == {}
    found = token_routing(record, make_tokenizer())
    assert found.leaders == ()
    assert write_token_map(found, tmp_path / "map.png").stat().st_size > 1000
