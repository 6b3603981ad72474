"""The setting ``abstain`` of routers: its values, what "auto" stands for, and what it needs of a library."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest

from models import peft_library
from spectr import Calibrated, ExpertLibrary, Glider, PromptPolicy, Shortlist, Spectr, calibrate, compose, get_router
from spectr.errors import CompositionError
from spectr.evaluation.experiments.setup import _written
from spectr.ops import report_once
from spectr.routers import DescriptionSimilarity, HoldWeights, ScoreMeans, check_needs
from spectr.routers.abstention import AUTO, always_choosing, in_words, policy_for, why_off
from spectr.routers.router_config import router_config
from spectr.routers.setting_texts import read_settings
from text_model import make_model, make_tokenizer

ENOUGH = math.ceil(2 / AUTO)
VOTES = {"evidence": ScoreMeans(), "use": HoldWeights(), "router": Calibrated(level="token")}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrated")
    peft_library(make_model(), root, {"ants": 4, "bees": 4})
    plain = ExpertLibrary.open(root)
    return plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=["what is it"], null=0))


def with_null(library, count):
    return library.with_calibration(replace(library.calibration, null=[[5, 6]] * count))


@pytest.mark.parametrize("make", [Calibrated, lambda **more: Calibrated(level="prior", **more), Shortlist])
def test_auto_is_a_number_where_the_library_has_the_ordinary_prompts_for_it(library, make):
    assert make().policy.abstain is None
    for count, abstain in ((0, None), (ENOUGH - 1, None), (ENOUGH, AUTO), (160, AUTO)):
        assert policy_for(make(), with_null(library, count)).abstain == abstain
    for router, abstain in ((make(abstain=None), None), (make(abstain=0.3), 0.3)):
        assert policy_for(router, with_null(library, 160)).abstain == abstain


def test_a_composed_model_abstains_as_its_library_allows(library):
    assert compose(make_model(), with_null(library, ENOUGH), Calibrated()).prompt.policy.abstain == AUTO
    assert compose(make_model(), library, Calibrated()).prompt.policy.abstain is None
    assert compose(make_model(), with_null(library, ENOUGH), Calibrated()).router == Calibrated()  # as it was given


def test_that_nothing_abstains_is_logged_once(library, caplog):
    report_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for router in (
            Calibrated(),
            Calibrated(),
            Calibrated(abstain=None),
            Calibrated(level="token"),
            Spectr(top_k=1),
        ):
            compose(make_model(), library, router)
        compose(make_model(), with_null(library, ENOUGH), Calibrated())
    [record] = caplog.records
    assert f"the calibration has 0 ordinary prompts to compare with, but {ENOUGH} are needed" in record.message
    assert f"spectr library calibrate --library {library.origin}" in record.message
    assert why_off(Calibrated(), with_null(library, 3)).endswith("--fresh")


@pytest.mark.parametrize("abstain", [0.1, 0.3])
def test_a_number_needs_as_many_ordinary_prompts(library, abstain):
    least = {0.1: 20, 0.3: 7}[abstain]
    routers = [Calibrated(abstain=abstain), Calibrated(level="prior", abstain=abstain)]
    for router in (*routers, PromptPolicy(**VOTES, abstain=abstain)):
        check_needs(router, with_null(library, least), library.names)
        with pytest.raises(CompositionError, match=f"calibration has {least - 1} ordinary prompts") as error:
            compose(make_model(), with_null(library, least - 1), router)
        assert f"2 / abstain = {least}" in error.value.expected
        assert "spectr library calibrate" in error.value.do
        assert "abstain=None" in error.value.do


@pytest.mark.parametrize("abstain", [0.0, 1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize(
    "make", [Calibrated, Shortlist, lambda abstain: PromptPolicy(**VOTES, abstain=abstain)], ids=["c", "s", "p"]
)
def test_what_is_no_share_of_prompts_is_refused(make, abstain):
    with pytest.raises(CompositionError, match=f"abstain={abstain}") as error:
        make(abstain=abstain)
    assert error.value.expected.startswith("a number above 0 and below 1")


def test_a_router_that_reads_no_prompt_refuses_a_number():
    with pytest.raises(CompositionError, match=r"abstain=0\.1 with level='token'"):
        Calibrated(level="token", abstain=0.1)
    with pytest.raises(CompositionError, match=r"abstain=0\.2 of the token router.*\n.*Shortlist\(abstain"):
        Shortlist(token_router=Calibrated(level="prior", abstain=0.2))
    for abstain in (None, "auto"):
        assert Calibrated(level="token", abstain=abstain).policy is None
    assert Calibrated(abstain=None).policy.router == Calibrated(level="token")


@pytest.mark.parametrize(
    ("text", "abstain"), [("none", None), ("None", None), ("auto", "auto"), ("0.25", 0.25)], ids=str
)
@pytest.mark.parametrize("name", ["calibrated", "calibrated-prior", "shortlist"])
def test_it_is_set_by_text_and_written_down(name, text, abstain):
    router = get_router(name, **read_settings([f"abstain={text}"], [name])[name])
    assert router.abstain == abstain
    config = router_config(router)
    assert config.get("abstain", "auto") == abstain
    assert get_router(**config) == router


def test_results_of_routers_that_always_choose_are_named_as_before():
    """Before there was abstention all were made so."""
    assert always_choosing(Calibrated()) == Calibrated(abstain=None)
    assert always_choosing(Glider()) == Glider()
    assert _written(Calibrated(abstain=None)) == {"name": "calibrated"}
    assert _written(Calibrated(abstain=0.2)) == {"name": "calibrated", "abstain": 0.2}


def test_it_is_said_in_one_sentence():
    assert in_words(0.4) == "no expert stands out (p = 0.40): the base model answered"
    assert in_words(None) == "no expert is used: the base model answered"


def test_evidence_that_compares_with_no_ordinary_prompts_cannot_abstain():
    parts = {"evidence": DescriptionSimilarity(), "use": HoldWeights(), "router": Spectr(top_k=1)}
    assert PromptPolicy(**parts).abstain is None
    with pytest.raises(CompositionError, match=r"abstain=0\.05, but DescriptionSimilarity"):
        PromptPolicy(**parts, abstain=0.05)
