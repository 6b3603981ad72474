"""Policies for prompts: evidence x use x token router, also those without a name, and other packages' evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

from guided import DESCRIPTIONS, NAMES, embed, library_with_gates
from models import types_unchecked
from spectr import (
    Arrow,
    Calibrated,
    Glider,
    Lag,
    Oracle,
    Phatgoose,
    PromptPolicy,
    SeqrNormalised,
    Shortlist,
    Spectr,
    compose,
    get_router,
)
from spectr.choosing import fit_to
from spectr.errors import CompositionError, SpectrError
from spectr.guidance import QueryGuide
from spectr.models.generate import encode_batch
from spectr.routers import (
    AddToScores,
    DescriptionSimilarity,
    Evidence,
    Found,
    HoldWeights,
    KeepShortlist,
    ModuleEvidence,
    MultiplyScores,
    PrototypeMeans,
    ScoreMeans,
    router_names,
)
from spectr.routers.registries import EVIDENCE
from spectr.routers.router_config import part_config, router_config
from spectr.routers.setting_texts import read_settings
from spectr.spectral import reference
from spectr.vllm.router_set import supported
from text_model import make_model, make_tokenizer

PROMPTS = ("what is the blue sky", "who is it", "green grass is good")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return library_with_gates(tmp_path_factory.mktemp("library"), NAMES).with_descriptions(DESCRIPTIONS)


@pytest.fixture
def plugins(monkeypatch):
    """Entry points by group, name and value."""
    found = []
    monkeypatch.setattr(
        "spectr.registry.entry_points", lambda group: [point for point in found if point.group == group]
    )
    return lambda group, name, value: found.append(EntryPoint(name=name, value=f"{__name__}:{value}", group=group))


def batch(*prompts):
    return encode_batch(make_tokenizer(), prompts)


def cosines(prompt):
    return embed([prompt]) @ embed([DESCRIPTIONS[name] for name in NAMES]).mT


def dense(library, listed, top_k):
    """The base model with ``W x + sum_t w_t delta_t x`` written out at each module, Arrow among the listed experts."""
    model, deltas = make_model(), {}
    for name in listed:
        with library[name].open() as read:
            for module in library[name].shapes:
                A, B, scale = read(module)
                deltas.setdefault(module, []).append(scale * B.double() @ A.double())

    def update(mine):
        def hook(_, args, out):
            x_TI = args[0].double().flatten(0, -2)
            scores_TE = torch.tensor([[reference.arrow_score(delta, x) for delta in mine] for x in x_TI])
            top = scores_TE.topk(min(top_k, len(mine)), dim=-1)
            weights_TE = torch.zeros_like(scores_TE).scatter(-1, top.indices, top.values.softmax(-1))
            added = sum(w[:, None] * (x_TI @ delta.mT) for w, delta in zip(weights_TE.mT, mine, strict=True))
            return out + added.view(out.shape).to(out.dtype)

        return hook

    for module, mine in deltas.items():
        model.get_submodule(module).register_forward_hook(update(mine))
    return model


def nearest(prompt, size):
    return [NAMES[place] for place in cosines(prompt)[0].topk(size).indices.tolist()]


def words(size, router):
    return PromptPolicy(evidence=DescriptionSimilarity(), use=KeepShortlist(size=size), router=router)


@torch.no_grad()
@pytest.mark.parametrize(("size", "top_k"), [(1, 1), (2, 1), (2, 2)])
def test_a_row_without_a_name_decides_and_generates_as_the_reference(library, size, top_k):
    """Similarity to descriptions x shortlist x Arrow."""
    model = make_model()
    compose(model, library, words(size, Arrow(top_k=top_k)), guide=QueryGuide(make_tokenizer(), embed))
    together, settings = batch(*PROMPTS), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    answers = model.generate(**together, **settings)
    for row, prompt in enumerate(PROMPTS):
        slow, alone = dense(library, nearest(prompt, size), top_k), batch(prompt)
        torch.testing.assert_close(model(**alone).logits, slow(**alone).logits, rtol=1e-4, atol=1e-4)
        written = slow.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert answers[row, together["input_ids"].shape[1] :][: len(written)].tolist() == written.tolist()


@pytest.mark.parametrize("router", [Lag(shortlist=2, top_k=1), Spectr(top_k=2)], ids=str)
def test_a_shortlist_chooses_as_a_library_of_the_listed(library, router):
    model, alone = make_model(), make_model()
    compose(model, library, words(2, router), guide=QueryGuide(make_tokenizer(), embed))
    routed = compose(alone, library, router)
    for prompt in PROMPTS:
        routed.allow(nearest(prompt, 2))
        torch.testing.assert_close(model(**batch(prompt)).logits, alone(**batch(prompt)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", [Glider(), Glider(token_router=None), Glider(token_router=Spectr(), alpha=2.0)])
def test_a_named_row_is_its_parts(library, router):
    model, parts, guide = make_model(), make_model(), QueryGuide(make_tokenizer(), embed)
    compose(model, library, router, guide=guide)
    compose(parts, library, router.policy, guide=guide)
    assert torch.equal(model(**batch(*PROMPTS)).logits, parts(**batch(*PROMPTS)).logits)


def test_a_bias_is_added_whatever_computes_the_scores(library):
    """Kernels multiply a prior: a router that they score for must not have its bias multiplied."""
    model, plain, guide = make_model(), make_model(), QueryGuide(make_tokenizer(), embed)
    router = Spectr(top_k=2, weights="softmax")
    bias = AddToScores(alpha=2.0)
    compose(model, library, PromptPolicy(evidence=DescriptionSimilarity(), use=bias, router=router), guide=guide)
    compose(plain, library, Glider(token_router=router, alpha=2.0, top_k=2), guide=guide)
    torch.testing.assert_close(model(**batch(*PROMPTS)).logits, plain(**batch(*PROMPTS)).logits)


# From plain data


def test_a_row_is_plain_data_for_files_and_the_command_line():
    row = words(2, Arrow(top_k=1))
    config = {
        "name": "policy",
        "evidence": {"name": "descriptions"},
        "use": {"name": "shortlist", "size": 2},
        "router": {"name": "arrow", "top_k": 1},
    }
    assert router_config(row) == config
    assert get_router(**config) == row
    texts = ["evidence=descriptions", "use=shortlist", "use.size=2", "router=arrow", "router.top_k=1"]
    assert get_router("policy", **read_settings(texts, ["policy"])["policy"]) == row
    for router in (Calibrated(), Calibrated(level="prior"), Shortlist(size=3), Shortlist(size=1)):
        assert get_router(**router_config(router.policy)) == router.policy
    prior = KeepShortlist(size=2, prior=MultiplyScores(strength=3.0))
    assert part_config(prior) == {"name": "shortlist", "size": 2, "prior": {"name": "prior", "strength": 3.0}}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["evidence=description"], "did you mean 'descriptions'"),
        (["evidence=descriptions", "use=hold", "use.topk=2"], "no use.topk"),
        (["use=keep"], "unknown use 'keep'"),
    ],
)
def test_unknown_parts_are_named(texts, message):
    with pytest.raises(CompositionError, match=message):
        read_settings(texts, ["policy"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: words(2, Calibrated()), "does not decide for each token"),
        (lambda: words(2, Oracle(expert="sky")), "does not decide for each token"),
        (lambda: words(2, Spectr(top_k=3)), "a shortlist of 2, but"),
        (lambda: words(0, Spectr()), "size=0"),
        (lambda: words(2, None), "expected: a spectr.routers.Router"),
        (
            lambda: PromptPolicy(evidence=PrototypeMeans(), use=MultiplyScores(), router=Spectr()),
            "uses all experts",
        ),
        (
            lambda: PromptPolicy(evidence=PrototypeMeans(), use=HoldWeights(), router=Spectr(combine="knots")),
            "merges with all experts in memory",
        ),
        (lambda: votes(HoldWeights(), Spectr(top_k=1)), "needs calibrated scores"),
        (lambda: similar(MultiplyScores(), Phatgoose()), "may be below zero"),
        (lambda: similar(KeepShortlist(prior=MultiplyScores()), SeqrNormalised()), "may be below zero"),
        (lambda: ScoreMeans(attention_weight=0.0), "attention_weight=0.0"),
        (lambda: ScoreMeans(attention_weight="4"), "attention_weight='4'"),
        (lambda: ScoreMeans(attention_weight=math.nan), "attention_weight=nan"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with types_unchecked(), pytest.raises(CompositionError, match=message):
        make()


def similar(use, router):
    return PromptPolicy(evidence=DescriptionSimilarity(), use=use, router=router)


def votes(use, router):
    return PromptPolicy(evidence=ScoreMeans(), use=use, router=router)


def test_a_strong_prior_takes_no_expert_off_a_shortlist():
    use = KeepShortlist(size=2, prior=MultiplyScores(strength=20.0))
    verdict_BE = use.verdict(torch.tensor([[2.0, 0.0, -1.0]]))
    assert (verdict_BE != 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: votes(KeepShortlist(size=2), Calibrated(level="token")),
        lambda: votes(AddToScores(), Calibrated(level="token")),
        lambda: PromptPolicy(evidence=Loudest(), use=HoldWeights(), router=Lag(top_k=1)),
        lambda: words(2, Spectr(top_k=1)),
    ],
)
def test_vllm_refuses_what_its_layers_would_do_another_way(make):
    with pytest.raises(CompositionError, match="cannot run inside vLLM"):
        supported(make())
    assert supported(votes(HoldWeights(top_k=2), Calibrated(level="token")))


def test_a_policy_is_not_changed_to_fit_a_small_library():
    assert fit_to(2, words(4, Spectr(top_k=4))) == words(4, Spectr(top_k=4))
    assert fit_to(2, Spectr(top_k=4)) == Spectr(top_k=2)


# Other packages


@dataclass(frozen=True, kw_only=True)
class Mentions(Evidence):
    """How often a prompt has a word of the vocabulary that has the number ``first`` plus the expert's place."""

    first: int = 5

    def reader(self, source, experts):
        places = [source.library.names.index(name) for name in experts]

        def read(input_ids, **_):
            return Found(torch.stack([(input_ids == self.first + place).sum(-1) for place in places], dim=-1).float())

        return read


@dataclass(frozen=True, kw_only=True)
class Loudest(ModuleEvidence):
    """The largest score of any token at any module, over the mean of all experts'."""

    reads = "scores"

    def of_module(self, scores):
        relative_NE = scores.scores_NE / scores.scores_NE.mean(-1, keepdim=True)
        return torch.stack([relative_NE[scores.row_N == row].amax(0) for row in range(scores.rows)])[None]

    def of_prompt(self, found, holders, experts):
        return torch.stack(list(found.values())).amax(0)

    def compare(self, found_QBE, null_QKE, *, ordinary):
        return Found(found_QBE[0])


def test_another_packages_evidence_is_found_by_entry_point(library, plugins):
    plugins("spectr.evidence", "mentions", "Mentions")
    assert "mentions" in EVIDENCE.names()
    assert "mentions" not in router_names()
    texts = ["evidence=mentions", "evidence.first=7", "use=hold", "router=spectr", "router.top_k=1"]
    router = get_router("policy", **read_settings(texts, ["policy"])["policy"])
    assert router == PromptPolicy(evidence=Mentions(first=7), use=HoldWeights(), router=Spectr(top_k=1))
    assert router_config(router)["evidence"] == {"name": "mentions", "first": 7}
    model = make_model()
    routed = compose(model, library, router)
    ids = torch.tensor([[5, 8, 8, 9, 3], [9, 9, 9, 7, 1]])
    assert routed.prompt.evidence(ids).tolist() == [[0, 2, 1], [1, 0, 3]]
    answers = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)
    for row, name in enumerate((NAMES[1], NAMES[2])):
        alone = make_model()
        compose(alone, library, Oracle(expert=name))
        written = alone.generate(ids[row : row + 1], max_new_tokens=3, do_sample=False, pad_token_id=2)[0]
        assert answers[row][: len(written)].tolist() == written.tolist()
    routed.allow(NAMES[:2])
    assert routed.prompt.evidence(ids).tolist() == [[0, 2], [1, 0]]


def test_another_packages_evidence_reads_the_token_routers_scores(library):
    router = PromptPolicy(evidence=Loudest(), use=HoldWeights(), router=Spectr(top_k=1))
    model, plain = make_model(), make_model()
    routed = compose(model, library, router)
    seen, layers = [], compose(make_model(), library, Spectr(top_k=1)).layers
    for name, layer in layers.items():
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, of=layer: seen.append(of.scores(args[0])))
    given = encode_batch(make_tokenizer(), ["what is the blue sky"])
    plain(**given)
    loudest = torch.stack([scores[0] / scores[0].mean(-1, keepdim=True) for scores in seen]).amax((0, 1))
    opening = routed.prompt.read.opening.first
    assert opening == ()
    torch.testing.assert_close(routed.prompt.evidence(**given)[0], loudest, rtol=1e-5, atol=1e-5)


def test_what_makes_no_evidence_is_refused_with_its_package(plugins):
    plugins("spectr.evidence", "mentions", "words")
    with pytest.raises(SpectrError, match="evidence 'mentions' needs size and router"):
        get_router("policy", evidence={"name": "mentions"}, use=HoldWeights(), router=Spectr())


# Old names


@pytest.mark.parametrize(
    ("make", "now", "old"),
    [
        (lambda: Shortlist(heard=("q_proj",)), Shortlist(modules=("q_proj",)), "heard"),
        (lambda: Shortlist(every=2), Shortlist(module_stride=2), "every"),
        (lambda: Shortlist(local=Spectr(top_k=2)), Shortlist(token_router=Spectr(top_k=2)), "local"),
        (lambda: Glider(local=None), Glider(token_router=None), "local"),
        (lambda: get_router("glider", local={"name": "arrow"}), Glider(token_router=Arrow()), "local"),
        (
            lambda: get_router("glider", **read_settings(["local=arrow", "local.top_k=2"], ["glider"])["glider"]),
            Glider(token_router=Arrow(top_k=2)),
            "local",
        ),
    ],
)
def test_old_names_of_options_work_with_a_warning(make, now, old):
    with pytest.warns(DeprecationWarning, match=f"the option {old} is "):
        made = make()
    assert made == now
    with pytest.warns(DeprecationWarning, match=f"{old} is "):
        getattr(made, old)


def test_an_option_by_both_names_is_refused():
    with pytest.raises(CompositionError, match="local is now token_router, and both were given"), pytest.warns():
        Glider(local=None, token_router=Spectr())
