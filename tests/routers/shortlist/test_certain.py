"""Shortlists that are certain: bounds hold whatever the experts are like, and the lists are those of float64."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from scaling import PROMPTS, TEXTS, ids_of, listed, make_library, routed_model
from spectr import ExpertLibrary, Shortlist, Spectr, build_index, calibrate, compose
from spectr.composition.subset_probes import Readers
from spectr.errors import CompositionError
from spectr.library import IndexEntry
from spectr.models import encode_batch
from spectr.prompts.bounds import Interval
from spectr.routers import PrototypeMeans
from spectr.routers.evidence import ModuleScores
from spectr.spectral import Codes, Prototypes
from text_model import make_model, make_tokenizer

WILD = [1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e20, 1e34]


def hostile(seed, experts=12, inputs=40):
    """Prototypes and usual sizes of all orders of magnitude, some zero, some alike but for their last bits."""
    draw = torch.Generator().manual_seed(seed)
    size_E1 = torch.tensor(WILD)[torch.randint(len(WILD), (experts, 1), generator=draw)]
    v_EI = torch.randn(experts, inputs, generator=draw) * size_E1
    v_EI[1] = v_EI[0]
    v_EI[2] = torch.nextafter(v_EI[0], torch.full((inputs,), torch.inf))
    v_EI[3] = 0
    v_EI[4, 1:] = 0
    rms_E = size_E1[:, 0] * torch.rand(experts, generator=draw)
    rms_E[5] = 0
    rms_E[2] = rms_E[1] = rms_E[0]
    x_TI = torch.randn(9, inputs, generator=draw) * torch.tensor([*WILD[2:], 0.0, 1.0, 1.0, 1.0])[:, None]
    return v_EI, rms_E, x_TI, torch.randn(inputs, generator=draw)


def true_scores(v_EI, rms_E, x_TI, mean_I):
    """Term by term, in float64."""
    products_TE = ((x_TI.double() - mean_I.double())[:, None] * v_EI.double()).sum(-1).abs()
    return torch.where(rms_E > 0, products_TE / rms_E.double().clamp(min=1e-30), 0.0)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("seed", range(20))
def test_scores_are_as_near_as_they_say(bits, seed):
    v_EI, rms_E, x_TI, mean_I = hostile(seed)
    names = tuple(map(str, range(len(v_EI))))
    voter = Prototypes(experts=names, parts=(Codes.of(v_EI, rms_E, bits),), mean_I=mean_I, full=lambda: (v_EI,))
    exact_TE = true_scores(v_EI, rms_E, x_TI, mean_I)
    for bounded in (voter, voter.in_full()):
        scores_TE, off_TE = bounded.bounded(x_TI)
        assert scores_TE.dtype == torch.float64
        assert ((scores_TE - exact_TE).abs() <= off_TE).all()
    left = (v_EI.double() - voter.parts[0].steps_E.double()[:, None] * voter.parts[0].codes_EI).norm(dim=-1)
    assert (left <= voter.parts[0].error_E).all()
    assert (left <= v_EI.double().norm(dim=-1) * 40**0.5 * 2.0 ** (1 - bits) + 1e-28).all()


def powers(scores_TE):
    """What each token adds to both means, term by term."""
    s_TE = scores_TE.clamp(0.05, 1e6)
    takes_part_E = scores_TE.amax(0) > 0
    level_T1 = s_TE[:, takes_part_E].log().mean(-1, keepdim=True)
    return torch.stack([s_TE**2.25, (5 * (s_TE.log() - level_T1)).exp()])[..., takes_part_E], takes_part_E


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("seed", range(10))
def test_powers_are_within_their_bounds(bits, seed):
    v_EI, rms_E, x_TI, mean_I = hostile(seed)
    scorer = Prototypes(experts=tuple("abcdefghijkl"), parts=(Codes.of(v_EI, rms_E, bits),), mean_I=mean_I)
    exact_2TE, takes_part_E = powers(true_scores(v_EI, rms_E, x_TI, mean_I))
    least_2TE, most_2TE = PrototypeMeans(bits=16).token_bounds(*scorer.bounded(x_TI))
    assert (least_2TE[..., takes_part_E] <= exact_2TE).all()
    assert (exact_2TE <= most_2TE[..., takes_part_E]).all()
    assert torch.isfinite(most_2TE[..., takes_part_E]).all()


def test_powers_are_within_their_bounds_wherever_the_scores_are():
    """Scores anywhere in what they may be, their ends among them."""
    draw = torch.Generator().manual_seed(3)
    scores_TE = 10 ** (8 * torch.rand(200, 7, generator=draw, dtype=torch.float64) - 5)
    off_TE = scores_TE * 10 ** (6 * torch.rand(200, 7, generator=draw, dtype=torch.float64) - 5)
    least_2TE, most_2TE = PrototypeMeans(bits=16).token_bounds(scores_TE, off_TE)
    for _ in range(50):
        sign_TE = torch.randint(-1, 2, (200, 7), generator=draw)
        exact_2TE, _ = powers((scores_TE + sign_TE * off_TE).clamp(min=0))
        assert (least_2TE <= exact_2TE).all()
        assert (exact_2TE <= most_2TE).all()


def test_bounds_of_what_is_known_are_narrow():
    draw = torch.Generator().manual_seed(4)
    scores_TE = torch.rand(50, 1000, generator=draw, dtype=torch.float64)
    least_2TE, most_2TE = PrototypeMeans(bits=16).token_bounds(scores_TE, torch.zeros_like(scores_TE))
    assert (most_2TE <= least_2TE * (1 + 1e-11)).all()


def test_standardised_intervals_hold_what_any_values_in_them_give():
    draw = torch.Generator().manual_seed(5)

    def some(rows, off):
        middle = torch.randn(2, rows, 6, generator=draw, dtype=torch.float64)
        return Interval(middle - off, middle + off)

    for off in (0.0, 1e-6, 0.3):
        found, null = some(5, off), some(9, off)
        z = found.standardised(null)
        for _ in range(50):
            inside, texts = (
                one.least + (one.most - one.least) * torch.rand(one.least.shape, generator=draw, dtype=torch.float64)
                for one in (found, null)
            )
            exact = (inside - texts.mean(1, keepdim=True)) / texts.std(1, keepdim=True).clamp(min=1e-3)
            assert (z.least <= exact).all()
            assert (exact <= z.most).all()


def test_what_an_interval_decides():
    spread_BE = torch.tensor([[0.1, 0.1, 0.1], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]).double()
    middle_BE = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.5, 1.0], [1.0, 1.0, 1.0]]).double()
    interval = Interval(middle_BE - spread_BE, middle_BE + spread_BE)
    assert interval.decides(1).tolist() == [True, False, False]
    assert interval.decides(2).tolist() == [True, True, False]
    assert interval.decides(3).tolist() == [True, True, True]


# In a model


@torch.no_grad()
def true_evidence(library, ids, modules=("",)):
    """From the adapters' own factors, in float64: no index, no codes, no bounds."""
    known, total, count = library.calibration, {}, {}
    inputs = read(ids, known.means)
    texts = [read(row[real][None], known.means) for row, real in zip(known.input_ids, known.real, strict=True)]
    for module in (name for name in known.means if name.endswith(modules)):
        names = [name for name in library if module in library[name].shapes]
        v_EI = torch.stack([full_prototype(library, name, module) for name in names])
        rms_E = torch.stack([usual_size(library, name, module) for name in names])
        scores = [true_scores(v_EI, rms_E, x[module], known.means[module]) for x in (inputs, *texts)]
        one = [ModuleScores(s_TE, torch.zeros(len(s_TE), dtype=torch.long), 1) for s_TE in scores]
        means_2KE = torch.cat([PrototypeMeans().of_module(of_text) for of_text in one], dim=1)
        for name, mean_2K in zip(names, means_2KE.unbind(-1), strict=True):
            if not mean_2K.isnan().any():
                total[name] = total.get(name, 0) + mean_2K
                count[name] = count.get(name, 0) + 1
    means_2EK = torch.stack([total[name] / count[name] for name in library], dim=1)
    z_2E = (means_2EK[..., 0] - means_2EK[..., 1:].mean(-1)) / means_2EK[..., 1:].std(-1)
    return z_2E.mean(0)


def read(ids, modules):
    model, kept = make_model(), {}
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: kept.update({name: x[0][0]}))
    model(input_ids=ids)
    return kept


def full_prototype(library, name, module):
    entry = library.index[name]
    start = sum(m.inputs for m in entry.modules if m.name < module)
    inputs = next(m.inputs for m in entry.modules if m.name == module)
    return entry.full_C[start : start + inputs]


def usual_size(library, name, module):
    entry = library.index[name]
    return entry.rms_M[[m.name for m in entry.modules].index(module)]


@pytest.fixture(scope="module")
def plain(library):
    """Without a chat's frame, which has no say."""
    return build_index(make_model(), library.with_calibration(replace(library.calibration, settings={})))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_lists_are_those_of_the_truth(plain, bits, size):
    _, routed = routed_model(plain, Shortlist(size=size, token_router=Spectr(top_k=1), bits=bits))
    for prompt in PROMPTS:
        truth_E = true_evidence(plain, ids_of(prompt))
        evidence_E = routed.prompt.evidence(ids_of(prompt))[0]
        torch.testing.assert_close(evidence_E, truth_E, rtol=0, atol=2e-2 if bits == 16 else 1e-4)
        held_E = routed.prompt.use.verdict(evidence_E[None])[0]
        assert set(held_E.nonzero()[:, 0].tolist()) == set(truth_E.topk(min(size, len(truth_E))).indices.tolist())
    figures = routed.certainty
    assert figures.at_once + figures.in_full == len(PROMPTS)
    assert figures.tied == 0
    assert figures.in_full == 0 or bits == 16


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("modules", [("q_proj",), ("self_attn.q_proj", "down_proj")], ids=str)
def test_the_modules_that_are_named_decide_alone(plain, bits, modules):
    _, routed = routed_model(plain, Shortlist(size=1, bits=bits, modules=modules))
    assert all(module.endswith(modules) for module in routed.prototypes)
    for prompt in PROMPTS:
        truth_E = true_evidence(plain, ids_of(prompt), modules)
        atol = {8: 0.5, 16: 2e-2, 32: 1e-4}[bits]
        torch.testing.assert_close(routed.prompt.evidence(ids_of(prompt))[0].double(), truth_E, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A library with an expert twice, and once more in nearly the same way."""
    root = tmp_path_factory.mktemp("twins")
    make_library(root)
    for name in ("cats-again", "cats-nearly"):
        shutil.copytree(root / "cats", root / name)
    nudge(root / "cats-nearly" / "adapter_model.safetensors")
    plain = ExpertLibrary.open(root)
    known = plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS, null=0))
    return build_index(make_model(), known)


def nudge(path):
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(5)
    tensors = {key: t * (1 + 1e-6 * torch.randn(t.shape, generator=draw)) for key, t in load_file(path).items()}
    save_file(tensors, path)


def lists(library, bits, among, size=1):
    model = make_model()
    routed = compose(model, library, Shortlist(size=size, token_router=Spectr(top_k=1), bits=bits)).allow(among)
    found = []
    for prompt in PROMPTS:
        weights_BE = routed.prompt.decide(ids_of(prompt))
        found.append([routed.experts[place] for place in weights_BE[0].nonzero()[:, 0].tolist()])
    return found, routed.certainty


def test_what_codes_do_not_decide_is_decided_in_full(twins):
    """Two experts whose evidence differs by a millionth."""
    codes, figures = lists(twins, 16, ["cats", "cats-nearly"])
    assert (figures.at_once, figures.in_full, figures.tied) == (0, len(PROMPTS), 0)
    full, figures = lists(twins, 32, ["cats", "cats-nearly"])
    assert (figures.at_once, figures.in_full, figures.tied) == (len(PROMPTS), 0, 0)
    assert codes == full


@pytest.mark.parametrize("bits", [16, 32])
def test_experts_that_are_alike_are_said_to_tie(twins, bits):
    _, figures = lists(twins, bits, ["cats", "cats-again"])
    assert (figures.at_once, figures.in_full, figures.tied) == (0, 0, len(PROMPTS))
    both, figures = lists(twins, bits, ["cats", "cats-again", "dogs"], size=3)
    assert figures.tied == 0
    assert all(len(names) == 3 for names in both)


def test_a_batch_is_read_in_full_for_the_rows_that_need_it(twins):
    """Of rows that codes decide and rows that they do not."""
    among = ["bees", "cats", "cats-nearly"]
    alone, figures = lists(twins, 16, among)
    routed = compose(make_model(), twins, Shortlist(size=1, bits=16)).allow(among)
    held_BE = routed.prompt.decide(**encode_batch(make_tokenizer(), PROMPTS))
    assert [[routed.experts[place]] for place in held_BE.argmax(-1).tolist()] == alone
    assert routed.certainty == figures
    assert 0 < figures.in_full < len(PROMPTS)


def test_eight_bits_count_nothing(library):
    _, figures = lists(library, 8, list(library))
    assert (figures.at_once, figures.in_full, figures.tied) == (0, 0, 0)


@pytest.mark.parametrize("bits", [16, 32])
def test_rows_of_a_batch_are_decided_each(library, bits):
    model, routed = routed_model(library, Shortlist(size=2, token_router=Spectr(top_k=1), bits=bits))
    with torch.no_grad():
        model(**encode_batch(make_tokenizer(), PROMPTS))
    together = listed(routed)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            model(input_ids=ids_of(prompt))
        assert listed(routed) == [together[row]]


@pytest.mark.parametrize("bits", [16, 32])
def test_a_set_is_read_for_as_a_library_of_it_alone(library, bits):
    names = ("ants", "bees", "dogs", "wasp")
    router = Shortlist(size=2, token_router=Spectr(top_k=1), bits=bits)
    _, routed = routed_model(library, router)
    _, alone = routed_model(library, router)
    alone.allow(names)
    reader = Readers(routed).of(names)
    for prompt in PROMPTS:
        found = reader(input_ids=ids_of(prompt))
        torch.testing.assert_close(found.evidence_BE, alone.prompt.evidence(ids_of(prompt)), rtol=1e-6, atol=1e-6)
    assert routed.certainty.at_once + routed.certainty.in_full == len(PROMPTS)


def test_an_index_without_prototypes_in_full_is_reported(library, tmp_path):
    old = {}
    for name, entry in library.index.items():
        replace(entry, full_C=None).save(tmp_path / "index" / f"{name}.safetensors")
        old[name] = IndexEntry.load(tmp_path / "index" / f"{name}.safetensors")
    older = library.with_index(library.index.joined(old))
    before, _ = lists(library, 8, list(library))
    assert lists(older, 8, list(library))[0] == before
    with pytest.raises(CompositionError, match=r"in 8 bits only: ants, bees(.|\n)*library index .* --fresh"):
        compose(make_model(), older, Shortlist(bits=16))


def test_other_bits_are_refused():
    with pytest.raises(CompositionError, match="bits=12"):
        Shortlist(bits=12)
