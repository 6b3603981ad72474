"""Where no expert fits a prompt the base model answers it, to the last digit, whatever happens around it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import spectr
from abstaining import COMMON, FITTING, ORDINARY, RED, SPECIAL, Foretold
from models import peft_library
from rows import ids_of, together
from spectr import Arrow, ExpertLibrary, Lag, PromptPolicy, Seqr, Spectr, compose
from spectr.composition.multi_router import MultiRouter
from spectr.composition.request_batch import RequestBatch
from spectr.composition.router_batch import RouterBatch
from spectr.layers import trace
from spectr.models.generate import encode_batch
from spectr.ops import backend_for
from spectr.routers import AddToScores, Found, HoldWeights, KeepShortlist, MultiplyScores
from spectr.routers.abstention import always_choosing
from text_model import make_model, make_tokenizer

NAMES = ("ants", "bees", "cats")
ALIKE = dict.fromkeys(NAMES, 4)
SOFT = Spectr(top_k=2, weights="softmax")
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def policy(use, router=None, **more):
    return PromptPolicy(evidence=Foretold(), use=use, router=router or Spectr(top_k=2), **{"abstain": 0.1, **more})


def plain(name):
    """A row of the matrix: a use and a token router, at least each with each other's kind."""
    return {
        "held": policy(HoldWeights()),
        "two held": policy(HoldWeights(top_k=2, weights="softmax")),
        "held by a bias": policy(HoldWeights(bias=AddToScores(alpha=2.0))),
        "prior": policy(MultiplyScores()),
        "prior, softmax": policy(MultiplyScores(), SOFT),
        "prior, uniform": policy(MultiplyScores(), spectr.Uniform()),
        "bias": policy(AddToScores(alpha=2.0)),
        "bias, softmax": policy(AddToScores(), SOFT),
        "bias, arrow": policy(AddToScores(), Arrow(top_k=2)),
        "shortlist": policy(KeepShortlist(size=2)),
        "shortlist, softmax": policy(KeepShortlist(size=2), SOFT),
        "shortlist, prior": policy(KeepShortlist(size=2, prior=MultiplyScores())),
        "prior, LAG": policy(MultiplyScores(), Lag(shortlist=2, top_k=2, weights="softmax")),
        "shortlist, LAG": policy(KeepShortlist(size=2), Lag(shortlist=1)),
        "prior, SEQR": policy(MultiplyScores(), Seqr(top_k=2)),
        **{
            f"{how}, {combine}": policy(use, Spectr(top_k=2, combine=combine))
            for how, use in (("held", HoldWeights(top_k=2)), ("prior", MultiplyScores()), ("bias", AddToScores()))
            for combine in ("factors", "ties", "dare", "dare-ties", "knots")
        },
    }[name]


POLICIES = ["held", "two held", "held by a bias", "prior", "prior, softmax", "prior, uniform", "bias", "bias, softmax"]
POLICIES += ["bias, arrow", "shortlist", "shortlist, softmax", "shortlist, prior", "prior, LAG", "shortlist, LAG"]
POLICIES += ["prior, SEQR"]
COMBINED = [
    f"{how}, {combine}"
    for how in ("held", "prior", "bias")
    for combine in ("factors", "ties", "dare", "dare-ties", "knots")
]
every_policy = pytest.mark.parametrize("name", [*POLICIES, *COMBINED])
SOME = ["held", "two held", "prior, softmax", "bias", "shortlist, prior"]
WAYS = {  # by dtype and backend: each policy in both dtypes, and some with each backend
    (torch.float32, "kernels"): [*POLICIES, *COMBINED],
    (torch.bfloat16, "torch"): POLICIES,
    (torch.float32, "torch"): SOME,
    (torch.bfloat16, "kernels"): SOME,
}
every_way = pytest.mark.parametrize(
    ("name", "dtype", "backend"), [(name, *way) for way, names in WAYS.items() for name in names], indirect=["backend"]
)
some_policies = pytest.mark.parametrize("name", SOME)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("alike")
    peft_library(make_model(), root, ALIKE)
    return ExpertLibrary.open(root)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    root = tmp_path_factory.mktemp("unequal")
    peft_library(make_model(), root, {"ants": 4, "bees": 2, "cats": 8})
    return ExpertLibrary.open(root)


@pytest.fixture
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("SPECTR_KERNELS", "0")
    backend_for.cache_clear()
    yield request.param
    backend_for.cache_clear()


def batch(*prompts):
    return encode_batch(make_tokenizer(), prompts)


def composed(library, router, dtype=torch.float32):
    model = make_model().to(dtype)
    return model, compose(model, library, router)


# Outputs


@torch.no_grad()
@every_way
def test_abstained_prompts_and_rows_have_the_base_models_output_to_the_last_digit(library, name, dtype, backend):
    model, routed = composed(library, plain(name), dtype)
    base = make_model().to(dtype)
    for prompt in COMMON:
        assert torch.equal(model(**batch(prompt)).logits, base(**batch(prompt)).logits)
        assert routed.prompt.remark == "no expert stands out (p = 0.40): the base model answered"
    for prompt in FITTING:
        assert not torch.equal(model(**batch(prompt)).logits, base(**batch(prompt)).logits)
        assert routed.prompt.remark is None
        torch.testing.assert_close(routed.prompt.p_B, torch.tensor([SPECIAL]))
    given = batch(COMMON[0], FITTING[0], COMMON[1], FITTING[1])
    mixed, base = model(**given).logits, base(**given).logits
    real = given["attention_mask"].bool()
    for row in (0, 2):
        assert torch.equal(mixed[row][real[row]], base[row][real[row]])
    assert not torch.equal(mixed[[1, 3]], base[[1, 3]])
    if dtype is torch.float32:  # in bfloat16 kernels and torch may differ in near ties
        always, _ = composed(library, always_choosing(plain(name)), dtype)
        torch.testing.assert_close(mixed[[1, 3]], always(**given).logits[[1, 3]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@some_policies
def test_experts_of_unequal_ranks_step_back_too(unequal, name):
    model, _ = composed(unequal, plain(name))
    given = batch(COMMON[0], FITTING[0])
    real = given["attention_mask"][0].bool()
    assert torch.equal(model(**given).logits[0][real], make_model()(**given).logits[0][real])


@every_policy
def test_gradients_of_a_mixed_batch_are_finite(library, name):
    model, _ = composed(library, plain(name))
    embeddings = model.get_input_embeddings()
    given = batch(COMMON[0], FITTING[0])
    model(**given).logits[given["attention_mask"].bool()].sum().backward()
    assert embeddings.weight.grad.isfinite().all()


@some_policies
def test_an_expert_that_alone_may_be_chosen_is_taken(library, name):
    model, routed = composed(library, plain(name))
    routed.allow("bees")
    base = make_model()
    assert not torch.equal(model(**batch(COMMON[0])).logits, base(**batch(COMMON[0])).logits)


def test_without_abstaining_or_without_a_p_an_expert_always_answers(library):
    base = make_model()
    for router in (policy(HoldWeights(), abstain=None), policy(HoldWeights(), abstain=0.5)):
        model, _ = composed(library, router)
        assert not torch.equal(model(**batch(COMMON[0])).logits, base(**batch(COMMON[0])).logits)
    evidence_BE = torch.tensor([[0.1, 0.2]])
    assert policy(HoldWeights()).verdict(Found(evidence_BE)).tolist() == [[0, 1]]
    assert policy(HoldWeights()).verdict(Found(evidence_BE, torch.tensor([0.1]))).tolist() == [[0, 1]]
    assert policy(HoldWeights()).verdict(Found(evidence_BE, torch.tensor([0.11]))).tolist() == [[0, 0]]
    assert policy(AddToScores()).verdict(Found(evidence_BE, torch.tensor([1.0]))).tolist() == [[-torch.inf] * 2]


def test_evidence_is_the_same_whether_a_prompt_is_abstained_from_or_not(library):
    _, routed = composed(library, plain("held"))
    _, always = composed(library, policy(HoldWeights(), abstain=None))
    given = batch(COMMON[0], FITTING[0])
    assert torch.equal(routed.prompt.evidence(**given), always.prompt.evidence(**given))
    assert routed.prompt.decide(**given).count_nonzero(-1).tolist() == [0, 1]


# Sequences


def say(model, ids, **options):
    return model.generate(ids, **GREEDY, **options)[:, ids.shape[1] :]


def alone(library, name, ids, **options):
    """What a fresh model generates."""
    return say(composed(library, plain(name))[0], ids, **options)


@some_policies
def test_generate_gives_the_base_models_answer_and_beams_too(library, name):
    model, routed = composed(library, plain(name))
    base = make_model()
    for prompt in (COMMON[0], FITTING[0], COMMON[2]):
        ids = ids_of(prompt)[None]
        expected = say(base, ids) if prompt in COMMON else alone(library, name, ids)
        assert torch.equal(say(model, ids), expected)
        assert (routed.prompt.remark is None) == (prompt in FITTING)
    ids = ids_of(COMMON[0])[None]
    assert torch.equal(say(model, ids, num_beams=3), say(base, ids, num_beams=3))
    torch.testing.assert_close(routed.prompt.p_B, torch.tensor([ORDINARY]))
    assert routed.prompt.remark == "no expert stands out (p = 0.40): the base model answered"


@some_policies
def test_conversations_in_turn_keep_their_own_verdicts(library, name):
    """One with an expert and one without, step by step on caches of their own."""
    model, _ = composed(library, plain(name))
    asked = [ids_of(COMMON[0])[None], ids_of(FITTING[0])[None]]
    written = [[], []]
    with torch.no_grad():
        outs = [model(ids, past_key_values=DynamicCache(config=model.config)) for ids in asked]
        for _ in range(GREEDY["max_new_tokens"]):
            for place, out in enumerate(outs):
                written[place].append(out.logits[:, -1:].argmax(-1))
                outs[place] = model(written[place][-1], past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(written[0], 1), say(make_model(), asked[0]))
    assert torch.equal(torch.cat(written[1], 1), alone(library, name, asked[1]))


@some_policies
@pytest.mark.parametrize("start", [COMMON[0], FITTING[0]], ids=["from the base model", "from an expert"])
def test_a_conversation_may_go_from_an_expert_to_the_base_model_and_back(library, name, start):
    """What is cached under one verdict is not used under another."""
    model, routed = composed(library, plain(name))
    cache, whole = DynamicCache(config=model.config), ids_of(start)[None]
    for turn in range(4):
        asked = whole if turn < 2 else torch.cat([whole, torch.tensor([[RED]])], 1)  # the second turn goes on alike
        is_ordinary = int((asked == RED).sum()) % 2 == 1
        whole = model.generate(asked, past_key_values=cache, **GREEDY)
        expected = say(make_model(), asked) if is_ordinary else alone(library, name, asked)
        assert torch.equal(whole[:, asked.shape[1] :], expected)
        assert (routed.prompt.remark is not None) == is_ordinary


@some_policies
def test_a_held_verdict_of_the_base_model_is_a_verdict_like_any_other(library, name):
    model, routed = composed(library, plain(name))
    verdict = routed.prompt.decide(**batch(COMMON[0]))
    ids = ids_of(FITTING[0])[None]
    with routed.prompt.using(verdict):
        assert torch.equal(say(model, ids), say(make_model(), ids))
        assert routed.prompt.remark == "no expert stands out (p = 0.40): the base model answered"
    assert torch.equal(say(model, ids), alone(library, name, ids))


def test_a_copy_of_a_composed_model_abstains_too(library):
    model, _ = composed(library, plain("held"))
    ids = ids_of(COMMON[0])[None]
    assert torch.equal(say(copy.deepcopy(model), ids), say(make_model(), ids))


# Traces


@some_policies
def test_a_trace_shows_that_no_expert_works(library, name):
    model, routed = composed(library, plain(name))
    with trace(model) as record:
        say(model, ids_of(COMMON[0])[None])
    assert record.shares() == dict.fromkeys(routed.experts, 0.0)
    with trace(model) as record:
        model(**batch(COMMON[0], FITTING[0]))
    weights = record.weights()
    assert not weights[0].any()
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(weights.shape[1]))


# Requests in batches


@torch.no_grad()
@every_policy
def test_requests_of_one_batch_abstain_each_for_itself(library, name):
    model, routed = composed(library, plain(name))
    requests = RequestBatch(routed)
    prompts = [COMMON[0], FITTING[0], COMMON[0], FITTING[1], COMMON[0]]
    sets = [NAMES, NAMES, (), NAMES[:2], ("bees",)]
    made = [(requests.decide(names, ids_of(p)), ids_of(p)) for names, p in zip(sets, prompts, strict=True)]
    assert [decision.has_base_alone for decision, _ in made] == [True, False, True, False, False]
    assert [decision.abstains for decision, _ in made] == [True, False, False, False, False]
    assert made[0][0].p == pytest.approx(ORDINARY)
    assert made[1][0].p == pytest.approx(SPECIAL)
    assert made[2][0].p is None
    answered = together(model, requests, made)
    nothing = RequestBatch(compose(make_model(), library, Spectr(top_k=2)))
    base = together(nothing.routed.model, nothing, [(nothing.decide((), None), ids) for _, ids in made])
    for place in (0, 2):
        assert torch.equal(answered[place], base[place])
    for place in (1, 3, 4):
        assert not torch.equal(answered[place], base[place])


@some_policies
def test_what_is_seen_of_an_abstained_request_is_nothing(library, name):
    model, routed = composed(library, plain(name))
    requests = RequestBatch(routed)
    made = [(requests.decide(NAMES, ids_of(p)), ids_of(p)) for p in (COMMON[0], FITTING[0])]
    assert requests.share(made[0][0]).shares == {}
    requests.watch([len(made[0][1]) - 1, -1], layers=True)
    together(model, requests, made)
    nobody, somebody = requests.seen()
    assert nobody.shares == {}
    assert not any(nobody.layers)
    assert sum(somebody.shares.values()) == pytest.approx(1)
    requests.watch([-1], layers=True)
    together(model, requests, made[:1])
    assert requests.seen()[0].shares == {}


@torch.no_grad()
def test_requests_of_several_routers_abstain_each_for_itself(library):
    routers = {"held": plain("held"), "prior": plain("prior, softmax"), "tokens": Spectr(top_k=2)}
    makers = {name: (lambda model, router=router: compose(model, library, router)) for name, router in routers.items()}
    several = MultiRouter(make_model(), makers)
    requests = RouterBatch(several)
    ids = [ids_of(COMMON[0]), ids_of(FITTING[0])]
    made = [(requests.decide(name, NAMES, one), one) for name in routers for one in ids]
    answered = together(several.model, requests, made)
    none = [(requests.decide("tokens", (), None), one) for _ in routers for one in ids]
    base = together(several.model, requests, none)
    same = [torch.equal(one, other) for one, other in zip(answered, base, strict=True)]
    assert same == [True, False, True, False, False, False]


@pytest.mark.parametrize("name", ["held", "prior, softmax", "shortlist"])
def test_generate_batch_abstains_for_each_request(library, name):
    model, _ = composed(library, plain(name))
    prompts = [ids_of(prompt).tolist() for prompt in (COMMON[0], FITTING[0])]
    settings = {key: GREEDY[key] for key in ("max_new_tokens", "do_sample", "pad_token_id")}
    config = GenerationConfig(**settings, bos_token_id=1, eos_token_id=2)
    found = model.generate_batch(prompts, config, SMALL, warmup=False)
    answers = [torch.tensor([one.generated_tokens]) for one in found.values()]
    fresh = composed(library, plain(name))[0]
    for prompt, answer, other in zip(prompts, answers, (make_model(), fresh), strict=True):
        ids = torch.tensor([prompt])
        expected = other.generate(ids, **settings)[:, ids.shape[1] :]
        assert torch.equal(answer, expected[:, : answer.shape[1]])
