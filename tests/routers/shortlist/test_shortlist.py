"""Routing among very many: whatever is on a shortlist is routed as a library of those alone."""

from __future__ import annotations

import pytest
import torch

from models import close, greedy, logits, peft_adapter, types_unchecked
from scaling import PROMPTS, TEXTS, ids_of, listed, routed_model
from spectr import (
    Arrow,
    Calibrated,
    ExpertLibrary,
    Lag,
    Oracle,
    Seqr,
    Shortlist,
    Spectr,
    Uniform,
    build_index,
    calibrate,
    compose,
    trace,
)
from spectr.errors import CompositionError
from spectr.models import encode_batch
from spectr.paging import Lfu
from text_model import make_model, make_tokenizer

LOCALS = [
    Spectr(top_k=2),
    Spectr(top_k=2, weights="softmax"),
    Spectr(top_k=1, score="projection"),
    Spectr(top_k=3, combine="ties"),
    Arrow(top_k=2),
    Lag(shortlist=2, top_k=1),
    Seqr(top_k=2),
    Uniform(),
    Calibrated(level="token", top_k=2),
]


def alone(library, names, router):
    model, routed = routed_model(library, router)
    routed.allow(names)
    return model


@pytest.mark.parametrize("local", LOCALS, ids=str)
def test_it_equals_the_local_router_on_a_library_of_the_listed(library, local):
    model, routed = routed_model(library, Shortlist(size=3, token_router=local))
    for prompt in PROMPTS:
        found = logits(model, ids_of(prompt))
        [names] = listed(routed)
        assert len(names) == 3
        close(found, logits(alone(library, names, local), ids_of(prompt)), 1e-4)


def test_of_a_shortlist_of_one_the_one_is_held(library):
    model, routed = routed_model(library, Shortlist(size=1))
    chosen = set()
    for prompt in PROMPTS:
        found = logits(model, ids_of(prompt))
        [[name]] = listed(routed)
        chosen.add(name)
        expert, _ = routed_model(library, Oracle(expert=name))
        close(found, logits(expert, ids_of(prompt)), 1e-4)
    assert len(chosen) > 1


def test_the_evidence_informs_a_prior(library):
    """With a strong prior every token takes the prompt's first expert, where it adapts the module."""
    local = Calibrated(level="prior", prior_strength=50.0)
    model, routed = routed_model(library, Shortlist(size=3, token_router=local))
    with trace(model) as record:
        logits(model, ids_of(PROMPTS[1]))
    best = routed.prompt.evidence(ids_of(PROMPTS[1]))[0].argmax()
    layer = record["model.layers.0.self_attn.k_proj"]
    assert all(layer.chosen(0, token) == (routed.experts[best],) for token in range(layer.weights.shape[1]))


@pytest.mark.parametrize(
    "local", [Spectr(top_k=2), Spectr(top_k=2, weights="softmax"), Calibrated(level="prior", top_k=2)]
)
@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_a_batch_do_not_see_each_others_shortlists(library, local, size):
    batch = encode_batch(make_tokenizer(), PROMPTS)
    model, routed = routed_model(library, Shortlist(size=size, token_router=local))
    with torch.no_grad():
        together = model(**batch).logits
    lists = listed(routed)
    assert len(set(lists)) > 1
    for row, prompt in enumerate(PROMPTS):
        one = logits(model, ids_of(prompt))[0]
        assert listed(routed) == [lists[row]]
        close(together[row, -one.shape[0] :], one, 1e-4)


def test_an_answer_keeps_its_shortlist(library):
    model, routed = routed_model(library, Shortlist(size=2, token_router=Spectr(top_k=1)))
    answer = greedy(model, ids_of(PROMPTS[0]), 5)
    [names] = listed(routed)
    assert torch.equal(answer, greedy(alone(library, names, Spectr(top_k=1)), ids_of(PROMPTS[0]), 5))
    assert routed.expert_cache.figures.misses == 2


def test_the_whole_library_on_the_shortlist_is_the_local_router(library):
    model, _ = routed_model(library, Shortlist(size=20, token_router=Spectr(top_k=2)))
    close(
        logits(model, ids_of(PROMPTS[3])), logits(routed_model(library, Spectr(top_k=2))[0], ids_of(PROMPTS[3])), 1e-4
    )


def test_every_other_module_can_be_asked(library):
    _, every = routed_model(library, Shortlist(size=1))
    _, other = routed_model(library, Shortlist(size=1, module_stride=2))
    assert not torch.equal(every.prompt.evidence(ids_of(PROMPTS[1])), other.prompt.evidence(ids_of(PROMPTS[1])))


def test_an_expert_that_would_never_be_chosen_is_reported(library):
    with pytest.raises(
        CompositionError, match=r"wasp adapt no module(.|\n)*among down_proj, (.|\n)*each expert adapts"
    ):
        compose(make_model(), library, Shortlist(size=1, modules=("k_proj",)))
    with pytest.raises(CompositionError, match="but ants, bees, cats, dogs, eels and 2 more adapt no module"):
        compose(make_model(), library, Shortlist(size=1, modules=("proj",)))


def test_bfloat16_models_are_served(library):
    model = make_model().bfloat16()
    routed = compose(model, library, Shortlist(size=2, token_router=Spectr(top_k=1)))
    plain = make_model().bfloat16()
    logits(model, ids_of(PROMPTS[0]))
    compose(plain, library, Spectr(top_k=1)).allow(listed(routed)[0])
    close(logits(model, ids_of(PROMPTS[0])).float(), logits(plain, ids_of(PROMPTS[0])).float(), 1e-2)


# Memory


def test_experts_that_leave_come_back_the_same(library):
    room = 4 * 8 * sum(m.inputs + m.outputs for m in library.index["cats"].modules)  # the largest expert, rank 8
    model, routed = routed_model(library, Shortlist(size=1), expert_memory=room, policy=Lfu())
    first = [logits(model, ids_of(prompt)) for prompt in PROMPTS]
    assert routed.expert_cache.figures.evictions > 0
    assert routed.expert_cache.bytes <= room
    for prompt, before in zip(PROMPTS, first, strict=True):
        assert torch.equal(logits(model, ids_of(prompt)), before)


def test_a_shortlist_has_to_fit(library):
    model = make_model()
    with pytest.raises(CompositionError, match="expert_memory=1000 bytes"):
        compose(model, library, Shortlist(size=2), expert_memory=1000)
    assert not any(hasattr(module, "experts") for module in model.modules())


# The handle


def test_experts_come_and_go(root, library):
    model, routed = routed_model(library, Shortlist(size=1))
    routed.allow(["ants", "bees"])
    logits(model, ids_of(PROMPTS[0]))
    assert listed(routed)[0][0] in ("ants", "bees")
    routed.allow(None).discard("ants")
    assert "ants" not in routed.experts
    with pytest.raises(CompositionError, match=r"not indexed: gnats(.|\n)*library index"):
        routed.add("gnats", root / "ants")
    assert "gnats" not in routed.experts
    plain = routed.remove()
    assert torch.equal(logits(plain, ids_of(PROMPTS[0])), logits(make_model(), ids_of(PROMPTS[0])))


def test_a_trace_follows_the_shortlist(library):
    model, routed = routed_model(library, Shortlist(size=1))
    with trace(model) as record:
        for prompt in PROMPTS[:2]:
            logits(model, ids_of(prompt))
            last = listed(routed)[0][0]
    assert last in record.experts
    assert sum(record.shares().values()) == pytest.approx(1, abs=0.3)  # an expert may leave modules alone


def test_a_trace_has_modules_that_none_of_a_shortlist_adapts(tmp_path):
    targets = {"moth": "q_proj", "newt": "down_proj"}
    for seed, (name, target) in enumerate(targets.items()):
        peft_adapter(make_model(), tmp_path / name, seed, targets=[target])
    plain = ExpertLibrary.open(tmp_path)
    known = plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS, null=0))
    model, routed = routed_model(build_index(make_model(), known), Shortlist(size=1))
    with trace(model) as record:
        logits(model, ids_of(PROMPTS[0]))
    [first] = listed(routed)[0]
    assert {name for name, layer in record.items() if layer.experts} == {n for n in record if targets[first] in n}
    assert record.shares() == {first: pytest.approx(0.5)}


def test_the_library_needs_an_index(root, library):
    model = make_model()
    with pytest.raises(CompositionError, match="not calibrated"):
        compose(model, ExpertLibrary.open(root), Shortlist())
    plain = ExpertLibrary.open(root).with_calibration(library.calibration)
    with pytest.raises(CompositionError, match=r"not indexed: ants, bees, cats, dogs, eels and 2 more"):
        compose(model, plain, Shortlist())


def test_settings_for_a_shelf_are_refused_elsewhere(library):
    with pytest.raises(CompositionError, match="all experts in memory"):
        compose(make_model(), library, Spectr(top_k=1), expert_memory=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": True}, "size=True"),
        ({"module_stride": 0}, "module_stride=0"),
        ({"modules": ("q_proj", "")}, "a tuple of names"),
        ({"probe_tokens": 0}, "probe_tokens=0"),
        ({"token_router": Calibrated()}, "for each token"),
        ({"token_router": Shortlist()}, "for each token"),
        ({"token_router": Oracle(expert="ants")}, "for each token"),
        ({"token_router": Spectr}, "is not a router"),
        ({"size": 2, "token_router": Spectr(top_k=4)}, "at least top_k"),
    ],
)
def test_settings_out_of_range_are_reported(options, message):
    with types_unchecked(), pytest.raises(CompositionError, match=message):
        Shortlist(**options)
