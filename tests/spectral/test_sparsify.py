"""TIES and DARE by themselves: the papers' closed forms, and where peers differ."""

import pytest
import torch
from peft.utils import merge_utils as peft

from spectr.combine import COMBINATIONS, get_combination
from spectr.composed_model.quantization_config import Settings
from spectr.errors import CompositionError
from spectr.spectral.sparsify import drop, elect_and_mean, trim


def test_trimming_keeps_the_largest_entries_of_each_row_rounded_down_and_at_least_one():
    rows = torch.tensor([[1.0, -5.0, 3.0, 2.0], [0.0, 7.0, 0.0, -6.0]])
    assert trim(rows, 0.5).tolist() == [[0.0, -5.0, 3.0, 0.0], [0.0, 7.0, 0.0, -6.0]]
    assert trim(rows, 0.7).tolist() == trim(rows, 0.5).tolist()
    assert trim(rows, 0.01).tolist() == [[0.0, -5.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]]
    assert trim(rows, 1.0) is rows


def test_entries_as_large_as_the_smallest_kept_are_kept_in_any_order():
    row = torch.tensor([2.0, -2.0, 1.0, 2.0])
    assert trim(row, 0.25).tolist() == [2.0, -2.0, 0.0, 2.0]
    assert trim(row.flip(0), 0.25).tolist() == trim(row, 0.25).flip(0).tolist()


@pytest.mark.parametrize("columns", [15, 500])  # 0.29 * 3500 is 1014.9999999999999
@pytest.mark.parametrize("density", [0.2, 0.29, 0.5, 0.999, 1.0])
def test_trimming_is_pefts_where_no_two_entries_are_of_one_size(density, columns):
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trim(x.flatten(), density).view_as(x), peft.magnitude_based_pruning(x, density))


def test_opposed_entries_leave_the_larger_one_and_zeros_do_not_count():
    a, b, c = torch.tensor([3.0, -1.0, 0.0, 4.0]), torch.tensor([-1.0, -3.0, 0.0, 0.0]), torch.tensor([1.0, 0, 0, 0])
    assert elect_and_mean([a, b, c]).tolist() == [2.0, -2.0, 0.0, 4.0]


def test_weights_that_agree_divide():
    a, b, c = torch.tensor([[3.0]]), torch.tensor([[-1.0]]), torch.tensor([[1.0]])
    weights = [torch.tensor([[share]]) for share in (0.5, 0.3, 0.2)]
    parts = [x * weight for x, weight in zip((a, b, c), weights, strict=True)]
    torch.testing.assert_close(elect_and_mean(parts, weights), torch.tensor([[(1.5 + 0.2) / 0.7]]))


def test_a_vote_of_exactly_zero_elects_nothing_where_peft_elects_the_positive():
    updates = torch.tensor([[2.0], [-2.0]])
    assert elect_and_mean(list(updates)).tolist() == [0.0]
    theirs = peft.disjoint_merge(updates, peft.calculate_majority_sign_mask(updates))
    assert theirs.tolist() == [2.0]
    assert peft.disjoint_merge(-updates, peft.calculate_majority_sign_mask(-updates)).tolist() == [2.0]


def test_election_and_mean_are_pefts_where_no_vote_is_zero():
    updates = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    theirs = peft.disjoint_merge(updates, peft.calculate_majority_sign_mask(updates))
    torch.testing.assert_close(elect_and_mean(list(updates)), theirs)


def test_the_negated_updates_have_the_negated_merge():
    updates = list(torch.randint(-2, 3, (3, 200), generator=torch.Generator().manual_seed(2)).float())
    assert torch.equal(elect_and_mean([-update for update in updates]), -elect_and_mean(updates))


def test_a_mask_depends_on_seed_expert_and_module_alone():
    ones = torch.ones(200, 100)

    def mask(seed=0, expert="a", module="m"):
        return drop(ones, 0.2, seed=seed, expert=expert, module=module)

    before = torch.random.get_rng_state()
    first = mask()
    assert torch.equal(first, mask())
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(first.unique().tolist()) == {0.0, 5.0}
    assert float((first > 0).float().mean()) == pytest.approx(0.2, abs=0.02)
    for other in (mask(seed=1), mask(expert="b"), mask(module="n")):
        # two independent masks of density 0.2 share a fifth of what each keeps
        assert float((other[first > 0] > 0).float().mean()) == pytest.approx(0.2, abs=0.03)


def test_the_mean_over_masks_is_the_matrix():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([drop(x, 0.5, seed=seed, expert="a", module="m") for seed in range(400)]).mean(0)
    assert ((mean - x).abs() < 6 * x.abs() / 20 + 1e-6).all()  # the error of each entry is |x| / sqrt(400)
    assert torch.equal(drop(x, 1.0, seed=0, expert="a", module="m"), x)


# Options of a combination


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ties:0.5", "ties:density=0.5"),
        ("dare:0.9", "dare:density=0.1"),
        ("dare:0", "dare:density=1"),
        ("dare-ties:0.4", "dare-ties:density=0.5,trim=0.4"),
        ("dare-ties:0.4:0.1", "dare-ties:density=0.9,trim=0.4"),
    ],
)
def test_numbers_without_names_keep_their_meaning_and_warn(old, new):
    with pytest.warns(FutureWarning, match=f"combine='{old}' is deprecated: write '{new}'"):
        combination = get_combination(old)
    named = get_combination(new)
    assert combination.density == named.density
    assert getattr(combination.merge, "keywords", None) == getattr(named.merge, "keywords", None)


def test_a_saved_model_with_a_number_without_a_name_loads_as_it_was():
    saved = {
        "quant_method": "spectr",
        "version": 1,
        "library": "x",
        "router": {"name": "spectr", "combine": "dare:0.9"},
    }
    with pytest.warns(FutureWarning, match="write 'dare:density=0.1'"):
        router = Settings.of(saved).make_router()
    with pytest.warns(FutureWarning, match="write 'dare:density=0.1'"):
        combination = router.combination
    assert combination == get_combination("dare:density=0.1")


@pytest.mark.parametrize("name", COMBINATIONS.names())
def test_every_combination_is_made_by_its_name_alone(name):
    assert callable(get_combination(name).merge)


WRONG = ["ties:0", "ties:2", "ties:x", "ties:0.2:0.3", "ties:", "ties:density=0", "ties:density=nan", "ties:trim=0.5"]
WRONG += ["ties:density=0.1,density=0.2", "ties:density=0.1=2", "dare:1", "dare-ties:0.5:1", "dare-ties:0.5,trim=1"]
WRONG += ["outputs:1", "factors:density=1"]


@pytest.mark.parametrize("text", WRONG)
def test_options_that_are_none_or_out_of_range_are_refused(text):
    with pytest.raises(CompositionError, match=r"combine='.*'\n  expected: (.*=SHARE.*above 0|no options after .*)"):
        get_combination(text)
