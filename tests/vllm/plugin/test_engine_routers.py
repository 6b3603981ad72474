"""Which routers an engine of vLLM can run, alone and with each other, and what their requests may use."""

import pytest

import spectr
from adapters_on_disk import assert_says
from composed_parts import several
from spectr.composed_model import Settings
from spectr.errors import CompositionError
from spectr.vllm.router_set import decides_on_prompts, routers_of, supported


@pytest.mark.parametrize("name", ["lag", "shortlist", "glider-global", "glider"])
def test_other_routers_for_prompts_are_refused(name):
    with pytest.raises(CompositionError) as error:
        supported(spectr.get_router(name))
    assert_says(error.value, given=("cannot run inside vLLM",), expected="calibrated-token", do="or spectr")


def test_calibrated_decides_on_prompts_inside_vllm():
    for name, decides in (("calibrated", True), ("calibrated-prior", True), ("calibrated-token", False)):
        assert decides_on_prompts(supported(spectr.get_router(name))) is decides


@pytest.mark.parametrize(
    ("name", "top_k", "held", "prior"),
    [("calibrated", 1, 0, False), ("calibrated", 3, 3, False), ("calibrated-prior", 3, 0, True)],
)
@pytest.mark.parametrize("others", [(), ("spectr",)], ids=["alone", "with another"])
def test_who_may_have_how_many_experts(name, top_k, held, prior, others):
    routers = routers_of(several(*others, {"name": name, "top_k": top_k}))
    assert routers.most_fixed == held
    numbers = {"amber": 0.5, "blue": 0.25, "cyan": 0.25, "dun": 0.0}
    two, three = (dict(list(numbers.items())[:count]) for count in (2, 3))
    assert routers.permitted(name, {"amber": 1.0}, False) == {"amber": 1.0}
    assert routers.permitted("arrow", {"amber": 1.0}, False) == {"amber": 1.0}
    assert routers.permitted(name, dict.fromkeys(two, 1.0), False) == {}  # nobody has decided
    assert routers.permitted("", dict.fromkeys(two, 1.0), False) == (dict.fromkeys(two, 1.0) if others else {})
    assert routers.permitted("arrow", two, True) == routers.permitted("arrow", two, False) == {}  # which is not there
    if prior:
        assert routers.permitted(name, numbers, True) == numbers
    else:
        minus = {expert: -number for expert, number in three.items()}
        assert routers.permitted(name, numbers, True) == (minus if held else {})
        assert routers.permitted(name, dict.fromkeys(numbers, 0.25), True) == {}


def test_routers_next_to_each_other_share_a_way_where_they_choose_alike():
    routers = routers_of(several("calibrated-token", "calibrated"))
    assert routers.token_routers == (spectr.get_router("calibrated-token"),)
    assert routers.prompts == {"calibrated": spectr.Calibrated().policy}
    assert routers.share_factors
    assert not routers_of(several("spectr", "calibrated")).share_factors  # prompts are scored by calibrated factors
    prior = {"name": "calibrated-prior", "top_k": 4}
    informed = routers_of(several("calibrated-token", prior))
    assert informed.token_routers == (spectr.Calibrated(level="prior", top_k=4),)  # who asks for no prior has ones
    every = routers_of(several("spectr", "arrow", "calibrated", "calibrated-token", prior, "uniform"))
    assert [type(way).__name__ for way in every.token_routers] == ["Spectr", "Arrow", "Calibrated", "Uniform"]
    turns = [
        every.number_of(name)
        for name in ("spectr", "arrow", "calibrated", "calibrated-token", "calibrated-prior", "uniform")
    ]
    assert turns == [0, 1, 2, 2, 2, 3]
    assert routers_of(several("calibrated")).token_routers == (spectr.Calibrated(),)
    assert not routers_of(Settings(library="experts")).prompts


def test_routers_that_score_by_other_factors_are_refused_next_to_others():
    with pytest.raises(CompositionError) as error:
        routers_of(several("spectr", "phatgoose"))
    assert_says(
        error.value, given=("Phatgoose(",), expected="spectr, seqr, calibrated, arrow, uniform", do="use fewer routers"
    )
    assert len(routers_of(several("phatgoose", "calibrated")).token_routers) == 1  # which chooses nothing


def test_routers_that_read_other_parts_of_a_prompt_are_refused():
    with pytest.raises(CompositionError) as error:
        routers_of(several("calibrated", {"name": "calibrated-prior", "probe_tokens": 7}))
    assert_says(error.value, given=("probe_tokens differ",), expected="equal numbers", do=None)


def test_routers_whose_combinations_differ_are_refused():
    with pytest.raises(CompositionError) as error:
        routers_of(several("spectr", {"name": "calibrated", "combine": "dare:density=0.5"}))
    assert_says(
        error.value, given=("'outputs'", "'dare:density=0.5'"), expected="a single combination", do="omit --combine"
    )


def test_a_combination_that_needs_whole_outputs_is_refused():
    with pytest.raises(CompositionError) as error:
        supported(spectr.Spectr(combine="ties"))
    assert_says(error.value, given=("combine='ties'",), expected="'outputs'", do=None)
