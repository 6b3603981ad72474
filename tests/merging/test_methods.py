"""Each method against its slow dense oracle, and what has to hold for all of them."""

import math

import pytest
import torch
from dense_merges import (
    UP,
    K,
    Q,
    dense_of,
    low_rank,
    slow_cut,
    slow_elect,
    slow_knots,
    slow_sum,
    slow_ties,
)

from adapters_on_disk import assert_says
from beyond_lora import moved_adapter
from models import close, tiny_llama
from spectr import ExpertLibrary
from spectr.errors import MergeError
from spectr.merging import (
    Average,
    Dare,
    DareTies,
    GenKnowSub,
    Knots,
    Linear,
    LowRank,
    Products,
    Recipe,
    Site,
    Ties,
    get_method,
    merge_adapter,
    merged_modules,
    method_names,
)
from spectr.merging.lowrank import cut_dense, cut_factors
from spectr.spectral.sparsify import drop

NAMES = ("amber", "blue", "cyan")
WEIGHTS = (1.0, 0.5, -0.75)
THIRD = [1 / 3] * 3


def dense(delta):
    return delta.dense() if isinstance(delta, LowRank) else delta


def merged(library, **recipe) -> dict:
    """Exact merges, dense, by module."""
    return {m: dense(delta) for m, delta, *_ in merged_modules(library, Recipe(**{"experts": NAMES, **recipe}))}


def of_all(library, slow) -> dict:
    """The oracle of every module."""
    experts = [dense_of(library, name) for name in NAMES]
    return {module: slow([expert[module] for expert in experts]) for module in (Q, K, UP)}


def masked(density, seed):
    """The oracle's updates after DARE, by what ``drop`` does to a matrix of ones."""
    names = dict(enumerate(NAMES))

    def slow(deltas, module):
        ones = [
            drop(torch.ones(d.shape), density, seed=seed, expert=names[i], module=module) for i, d in enumerate(deltas)
        ]
        return [one.double() * delta for one, delta in zip(ones, deltas, strict=True)]

    return slow


ORACLES = {
    "average": (Average(), None, lambda deltas: slow_sum(deltas, THIRD)),
    "linear": (Linear(), WEIGHTS, lambda deltas: slow_sum(deltas, WEIGHTS)),
    "ties": (Ties(), None, lambda deltas: slow_ties(deltas, [1] * 3, 0.2)),
    "ties weighted": (Ties(density=0.5, scale=0.7), WEIGHTS, lambda deltas: slow_ties(deltas, WEIGHTS, 0.5, 0.7)),
    "knots": (Knots(), None, lambda deltas: slow_knots(deltas, [1] * 3, 1.0)),
    "knots trimmed": (Knots(density=0.3, scale=0.6), WEIGHTS, lambda deltas: slow_knots(deltas, WEIGHTS, 0.3, 0.6)),
    "knots average": (Knots(inner="average"), None, lambda deltas: slow_sum(deltas, THIRD)),
}


@pytest.mark.parametrize("case", ORACLES)
def test_a_method_is_its_slow_oracle(experts, case):
    method, weights, slow = ORACLES[case]
    ours = merged(experts, method=method, weights=weights)
    for module, theirs in of_all(experts, slow).items():
        close(ours[module].double(), theirs, 1e-4)


@pytest.mark.parametrize(("method", "weights"), [(Dare(seed=3), None), (Dare(density=0.6), WEIGHTS)])
def test_dare_is_the_sum_of_what_its_masks_leave(experts, method, weights):
    ours = merged(experts, method=method, weights=weights)
    for module in (Q, K, UP):
        deltas = [dense_of(experts, name)[module] for name in NAMES]
        left = masked(method.density, method.seed)(deltas, module)
        close(ours[module].double(), slow_sum(left, list(weights or THIRD)), 1e-5)


def test_dare_ties_elects_among_what_its_masks_leave(experts):
    ours = merged(experts, method=DareTies(density=0.5, scale=0.8, seed=1), weights=WEIGHTS)
    for module in (Q, K, UP):
        deltas = [w * dense_of(experts, n)[module] for n, w in zip(NAMES, WEIGHTS, strict=True)]
        close(ours[module].double(), 0.8 * slow_elect(masked(0.5, 1)(deltas, module)), 1e-5)


METHODS = [Average(), Ties(), Ties(density=1.0), Dare(), DareTies(), Knots(), Knots(density=0.4)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_order_of_the_experts_does_not_matter(experts, method):
    one = merged(experts, method=method)
    other = merged(experts, method=method, experts=NAMES[::-1])
    for module in one:
        close(other[module], one[module], 1e-4)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_updates_twice_as_large_give_a_merge_twice_as_large(method):
    deltas = [low_rank(3, 12, 10, seed) for seed in range(3)]
    site = Site("m", NAMES)
    once = dense(method.merge(deltas, site))
    twice = dense(method.merge([delta.times(2.0) for delta in deltas], site))
    close(twice, 2 * once, 1e-5)


@pytest.mark.parametrize("method", [Ties(density=0.3), Dare(), DareTies(), Knots(density=0.3), Linear()], ids=repr)
def test_a_weight_is_the_size_of_the_update_and_none_is_leaving_it_out(experts, method):
    weighted = merged(experts, method=method, weights=(2.0, 1.0, 0.0))
    site_of = {m: Site(m, ("amber", "blue")) for m in (Q, K, UP)}
    for module, ours in weighted.items():
        pair = [dense_of(experts, name)[module].float() for name in ("amber", "blue")]
        parts = [LowRank(pair[0] * 2, torch.eye(32)), LowRank(pair[1], torch.eye(32))]
        close(ours, dense(method.merge(parts, site_of[module])), 1e-4)


@pytest.mark.parametrize(
    "method", [Average(), Ties(density=1.0), Dare(density=1.0), DareTies(density=1.0), Knots()], ids=repr
)
def test_one_expert_alone_is_itself(experts, method):
    ours = merged(experts, experts=("amber",), method=method)
    for module, theirs in dense_of(experts, "amber").items():
        close(ours[module].double(), theirs, 1e-5)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_updates_that_are_zero_merge_to_zero(method):
    zeros = [LowRank.zero(10, 12), LowRank(torch.zeros(10, 2), torch.ones(2, 12))]
    assert not dense(method.merge(zeros, Site("m", ("a", "b")))).any()


@pytest.mark.parametrize("method", [Ties(density=1.0), DareTies(density=1.0), Knots()], ids=repr)
def test_experts_alike_merge_to_what_they_are(method):
    delta = low_rank(3, 12, 10, 0)
    close(dense(method.merge([delta] * 3, Site("m", NAMES))), delta.dense(), 1e-5)


def test_the_companions_do_not_change_what_dare_leaves_of_an_expert(experts):
    alone = merged(experts, experts=("blue",), method=Dare(), weights=(1.0,))
    with_others = merged(experts, method=Dare(), weights=(0.0, 1.0, 0.0))
    for module, delta in alone.items():
        assert torch.equal(with_others[module], delta)


SUBTRACTED = {
    "products": (("amber",), Products(), None, lambda d: slow_sum(d, [1.0])),
    "average": (("amber", "blue"), Average(), None, lambda d: slow_sum(d, [0.5, 0.5])),
    "ties": (("amber", "blue"), Ties(density=0.5), None, lambda d: slow_ties(d, [1, 1], 0.5)),
    "knots": (("amber", "blue"), Knots(), (1.0, 0.3), lambda d: slow_knots(d, [1.0, 0.3], 1.0)),
}


@pytest.mark.parametrize("case", SUBTRACTED)
def test_subtracting_a_general_expert_is_done_on_products_before_the_method(experts, case):
    names, method, weights, slow = SUBTRACTED[case]
    ours = merged(experts, experts=names, method=method, weights=weights, subtract=("cyan",), strength=0.4)
    general = dense_of(experts, "cyan")
    for module in (Q, K, UP):
        theirs = slow([dense_of(experts, name)[module] - 0.4 * general[module] for name in names])
        close(ours[module].double(), theirs, 1e-4)


def test_several_general_experts_are_subtracted_as_their_mean(experts):
    ours = merged(experts, experts=("amber",), method=Products(), subtract=("blue", "cyan"))
    for module, delta in ours.items():
        blue, cyan = dense_of(experts, "blue")[module], dense_of(experts, "cyan")[module]
        close(delta.double(), dense_of(experts, "amber")[module] - (blue + cyan) / 2)


def test_the_subtraction_does_not_depend_on_how_an_update_is_split_into_factors():
    """Another basis of the same update: factors subtracted from factors would give something else."""
    delta, general = low_rank(3, 12, 10, 0), low_rank(3, 12, 10, 1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned = LowRank(general.B @ turn, turn.T @ general.A)
    ours = LowRank.joined([delta, turned.times(-1.0)]).dense()
    close(ours, delta.dense() - general.dense())
    of_factors = (delta.B - turned.B) @ (delta.A - turned.A)
    assert (of_factors - ours).norm() > 0.5 * ours.norm()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_a_cut_is_the_best_of_its_rank_and_says_what_it_keeps(shape, rank):
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    cut, energy = cut_dense(delta, rank)
    theirs = slow_cut(delta.double(), rank)
    close(cut.dense().double(), theirs, 1e-5)
    assert cut.rank == min(rank, 20)
    assert energy == pytest.approx(float(theirs.norm() ** 2 / delta.double().norm() ** 2), abs=1e-6)


def test_factors_are_cut_as_their_product_would_be():
    delta = LowRank.joined([low_rank(4, 30, 20, seed) for seed in range(3)])
    cut, energy = cut_factors(delta, 5)
    theirs = slow_cut(delta.dense().double(), 5)
    close(cut.dense().double(), theirs, 1e-5)
    assert energy == pytest.approx(float(theirs.norm() ** 2 / delta.dense().double().norm() ** 2), abs=1e-6)
    assert cut_factors(delta, 12) == (delta, 1.0)
    assert cut_factors(delta) == (delta, 1.0)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_an_energy_gets_the_smallest_rank_that_keeps_it(share):
    delta = LowRank.joined([low_rank(4, 30, 20, seed) for seed in range(2)])
    for cut, energy in (cut_factors(delta, energy=share), cut_dense(delta.dense(), energy=share)):
        S = torch.linalg.svdvals(delta.dense().double())
        shares = (S**2).cumsum(0) / (S**2).sum()
        assert cut.rank == next(r for r in range(1, 21) if shares[r - 1] >= share - 1e-9)
        assert energy >= share - 1e-6
    assert cut_factors(delta, 1, share).delta.rank == 1


def test_what_cancels_out_has_no_rank():
    delta = low_rank(4, 30, 20, 0)
    assert cut_factors(LowRank.joined([delta, delta.times(-1.0)])).delta.rank == 0
    assert cut_dense(torch.zeros(20, 30)).delta.rank == 0


def test_a_sum_of_updates_keeps_their_factors(experts):
    adapter = merge_adapter(experts, Recipe(experts=NAMES, method=Average()))
    assert {module: delta.rank for module, delta in adapter.deltas.items()} == {Q: 13, K: 10, UP: 7}
    assert set(adapter.energy.values()) == {1.0}


def test_a_dense_merge_has_by_default_the_rank_that_the_experts_have_in_sum(experts):
    adapter = merge_adapter(experts, Recipe(experts=NAMES))
    assert {module: delta.rank for module, delta in adapter.deltas.items()} == {Q: 13, K: 10, UP: 7}
    for module, theirs in of_all(experts, lambda deltas: slow_ties(deltas, [1] * 3, 0.2)).items():
        rank = adapter.deltas[module].rank
        close(adapter.deltas[module].dense().double(), slow_cut(theirs, rank), 1e-4)


def test_progress_counts_the_modules(experts):
    told = []
    merge_adapter(experts, Recipe(experts=NAMES), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_methods_by_name():
    assert method_names() == ("average", "dare", "dare-ties", "genknowsub", "knots", "linear", "products", "ties")
    assert get_method("dare-ties", density=0.4, seed=7) == DareTies(density=0.4, seed=7)


def test_a_package_can_add_a_method_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint(name="soup", value="spectr.merging.linear:Average", group="spectr.merge_methods")
    monkeypatch.setattr("spectr.registry.entry_points", lambda group: [point] if group == point.group else [])
    assert "soup" in method_names()
    assert get_method("soup") == Average()


REFUSALS = {
    "unknown": (lambda: get_method("tie"), "unknown method 'tie'", "did you mean 'ties'?"),
    "a setting of another": (lambda: get_method("ties", seed=1), "method 'ties' has no seed", "density, scale"),
    "no settings": (lambda: get_method("average", density=1.0), "method 'average' has no density", "no settings"),
    "density": (
        lambda: Ties(density=0.0),
        "settings of 'ties' out of range: density=0.0",
        "a density above 0, at most 1",
    ),
    "both": (lambda: Knots(density=2, scale=math.nan), "density=2, scale=nan", "a finite scale that is not 0"),
    "inner": (lambda: get_method("knots", inner="dare"), "inner='dare'", "'ties' or 'average'"),
    "weights of an average": (
        lambda: Recipe(experts=("a", "b"), method=Average(), weights=(1.0, 1.0)),
        "method 'average' takes no weights",
        "use the method 'linear'",
    ),
    "a sum without weights": (
        lambda: Recipe(experts=("a", "b"), method=Linear()),
        "method 'linear' needs weights",
        "--weights 1,1",
    ),
    "too few weights": (
        lambda: Recipe(experts=("a", "b"), weights=(1.0,)),
        "1 weight for 2 experts",
        "pass 2 numbers, for a, b",
    ),
    "infinite weight": (lambda: Recipe(experts=("a",), weights=(math.inf,)), "weights inf", "finite numbers"),
    "only zeros": (lambda: Recipe(experts=("a",), weights=(0.0,)), "weights 0.0", "not all 0"),
    "nobody": (lambda: Recipe(experts=()), "no experts were named", "at least one expert"),
    "twice": (lambda: Recipe(experts=("a", "b", "a")), "merged more than once: a", "give it a weight"),
    "subtracted twice": (lambda: Recipe(experts=("a",), subtract=("b", "b")), "subtracted more than once: b", "once"),
    "on both sides": (
        lambda: Recipe(experts=("a", "b"), subtract=("b",)),
        "both merged and subtracted: b",
        "remove it from one",
    ),
    "strength": (lambda: Recipe(experts=("a",), subtract=("b",), strength=0.0), "strength=0.0", "not 0"),
    "nothing to subtract": (
        lambda: Recipe(experts=("a",), method=GenKnowSub()),
        "'genknowsub' needs a general expert",
        "--subtract GENERAL",
    ),
    "strength of factors": (
        lambda: Recipe(experts=("a",), method=GenKnowSub(), subtract=("c",), strength=0.5),
        "method 'genknowsub' has no strength",
        "use the method 'products'",
    ),
    "several for one": (
        lambda: Recipe(experts=("a", "b"), method=Products(), subtract=("c",)),
        "method 'products' merges one expert, not 2",
        "use another method with --subtract",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_merged_is_refused_by_name(case):
    call, given, hint = REFUSALS[case]
    with pytest.raises(MergeError) as caught:
        call()
    assert given in str(caught.value)
    assert hint in str(caught.value)


def test_all_faults_of_a_recipe_are_reported_at_once():
    with pytest.raises(MergeError, match="the experts cannot be merged: 4 problems") as caught:
        Recipe(experts=("a", "a"), method=Average(), weights=(1.0,), strength=math.nan)
    for phrase in ("more than once", "1 weight for 2", "strength=nan", "takes no weights"):
        assert phrase in str(caught.value)


def test_updates_that_are_more_than_factors_are_refused(tmp_path):
    folder = moved_adapter(tiny_llama(), tmp_path / "ants", 1, use_dora=True)
    library = ExpertLibrary.from_adapters({"ants": folder})
    with pytest.raises(MergeError) as caught:
        merge_adapter(library, Recipe(experts=("ants",), method=Average()))
    given = ("expert 'ants' is no plain LoRA adapter (DoRA)", "merging reads factors only")
    assert_says(caught.value, given=given, expected="plain LoRA", do="spectr extract")
