"""Routers by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

import spectr
from models import (
    types_unchecked,
)
from spectr import (
    Arrow,
    Calibrated,
    Glider,
    Lag,
    Oracle,
    Phatgoose,
    Seqr,
    SeqrNormalised,
    Shortlist,
    Spectr,
    Uniform,
)
from spectr.combine import COMBINATIONS, Combination, get_combination, merge_outputs
from spectr.errors import CompositionError, SpectrError, SpectrWarning
from spectr.merging.method import METHODS
from spectr.registry import Registry, entry
from spectr.routers import Router, get_router, router_names
from spectr.routers.registries import ROUTERS
from spectr.routers.router_config import router_config

UNKNOWN_COMBINATION = (
    "unknown combination 'sum'\n  to do: known: dare, dare-ties, factors, knots, outputs, raw-factors, ties"
)

BY_NAME = {
    "arrow": Arrow(),
    "glider": Glider(),
    "glider-global": Glider(token_router=None),
    "glider-paper": Glider(threshold=0.8),
    "glider-spectr": Glider(token_router=Spectr(top_k=1)),
    "lag": Lag(),
    "mu": Uniform(),
    "phatgoose": Phatgoose(),
    "seqr": Seqr(),
    "seqr-normalised": SeqrNormalised(),
    "shortlist": Shortlist(),
    "spectr": Spectr(),
    "spectr-code": Spectr(score="projection", combine="factors"),
    "spectr-paper": Spectr(combine="factors"),
    "spectr-projection": Spectr(score="projection"),
    "spectr-softmax": Spectr(weights="softmax"),
    "uniform": Uniform(),
    "calibrated": Calibrated(),
    "calibrated-prior": Calibrated(level="prior"),
    "calibrated-token": Calibrated(level="token", top_k=4),
}


@pytest.mark.parametrize(("name", "router"), BY_NAME.items(), ids=BY_NAME.keys())
def test_a_name_stands_for_its_settings(name, router):
    assert get_router(name) == router
    assert isinstance(router, Router)


def test_names_are_all_names_in_alphabetical_order():
    assert router_names() == tuple(sorted([*BY_NAME, "oracle", "policy"]))


def test_options_are_settings():
    assert get_router("spectr-paper", top_k=2) == Spectr(combine="factors", top_k=2)
    assert get_router("oracle", expert="sql") == Oracle(expert="sql")


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(CompositionError, match="unknown router 'sepctr'") as caught:
        get_router("sepctr")
    assert caught.value.do == f"did you mean 'spectr'? known: {', '.join(router_names())}"


@pytest.mark.parametrize("name", ["arrow", "spectr-paper"])
def test_an_unknown_option_is_answered_with_those_that_are_known(name):
    with pytest.raises(CompositionError, match=f"router '{name}' has no topk") as caught:
        get_router(name, topk=2, temperature=1.0)
    assert "top_k, weights, temperature, combine" in caught.value.expected
    assert "did you mean 'top_k'" in caught.value.do


def test_a_missing_option_is_asked_for():
    with pytest.raises(CompositionError, match="router 'oracle'") as caught:
        get_router("oracle")
    assert caught.value.do == "--set expert=..., or in Python expert=..."


def test_a_router_inside_a_router_can_be_plain_data():
    assert get_router("glider", token_router={"name": "spectr", "top_k": 1}) == get_router("glider-spectr")


# Other packages


class Theirs(Spectr):
    pass


class Later(Spectr):
    spectr_protocol = 3


@dataclass(frozen=True, kw_only=True)
class Tabled(Spectr):
    table: object = None


def theirs(top_k=3):
    return Spectr(top_k=top_k, weights="softmax")


def their_combination(share=1.0):
    return Combination(merge_outputs, share)


@pytest.fixture
def plugins(monkeypatch):
    """Entry points by group, name and value."""
    found = []
    monkeypatch.setattr(
        "spectr.registry.entry_points", lambda group: [point for point in found if point.group == group]
    )

    def add(name, value, group="spectr.routers"):
        found.append(EntryPoint(name=name, value=value if ":" in value else f"{__name__}:{value}", group=group))

    return add


def test_a_third_partys_router_is_found_by_entry_point(plugins):
    plugins("theirs", "theirs")
    assert "theirs" in router_names()
    assert get_router("theirs") == Spectr(top_k=3, weights="softmax")
    assert get_router("theirs", top_k=1) == Spectr(top_k=1, weights="softmax")
    with pytest.raises(CompositionError, match="router 'theirs' has no k"):
        get_router("theirs", k=1)
    with pytest.raises(CompositionError, match="did you mean 'theirs'"):
        get_router("their")


def test_a_broken_plugin_breaks_no_other_name(plugins):
    plugins("broken", "no_such_package:Router")
    plugins("bare", "NoSuchRouter")
    plugins("theirs", "Theirs")
    assert {"broken", "bare", "theirs", "spectr"} <= set(router_names())
    assert get_router("theirs") == Theirs()
    assert router_config(Spectr(top_k=2)) == {"name": "spectr", "top_k": 2}
    assert router_config(Theirs(top_k=2)) == {"name": "theirs", "top_k": 2}
    with pytest.raises(
        CompositionError, match=r"'broken' of no_such_package:Router cannot be imported: ModuleNotFound"
    ):
        get_router("broken")
    with pytest.raises(CompositionError, match=r"'bare' of .*NoSuchRouter cannot be imported: AttributeError"):
        get_router("bare")


NO_MAKER = "text"


def raises(limit=1):
    raise ZeroDivisionError("by 0")


def makes_a_text():
    return "text"


def needs_a_number(alpha):
    return Combination(merge_outputs, alpha)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NO_MAKER", "cannot be called: 'text' is not a callable object"),
        ("raises", "cannot be made: ZeroDivisionError: by 0"),
        ("makes_a_text", "makes an object of type str\n  expected: a spectr.routers.Router"),
    ],
)
def test_a_plugin_that_makes_no_router_is_refused_with_its_package(plugins, value, message):
    plugins("theirs", value)
    with types_unchecked(), pytest.raises(CompositionError) as caught:
        get_router("theirs")
    assert f"the router 'theirs' of {__name__}:{value} {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("registry", "group", "do"),
    [
        (ROUTERS, "spectr.routers", "--set alpha=..., or in Python alpha=..."),
        (COMBINATIONS, "spectr.combinations", "theirs:alpha=..., or in Python alpha=..."),
        (METHODS, "spectr.merge_methods", "in Python alpha=..."),
    ],
)
def test_a_missing_option_is_asked_for_in_the_form_of_its_kind(plugins, registry, group, do):
    plugins("theirs", "needs_a_number", group)
    with pytest.raises(SpectrError) as caught:
        registry.make("theirs")
    assert caught.value.do == do


def test_a_plugin_of_another_protocol_is_refused_by_name_or_adapted(plugins):
    plugins("later", "Later")
    with pytest.raises(CompositionError, match=r"router 'later' of .*:Later implements version 3") as caught:
        get_router("later")
    assert caught.value.expected == "version 1, 2"
    plugins("old", "theirs", "things")
    plugins("new", "Later", "things")
    things = Registry(
        kind="thing", group="things", entries={}, protocol=3, adapters={1: lambda make: lambda: ["adapted", make()]}
    )
    assert things.make("old") == ["adapted", theirs()]
    assert things.make("new") == Later()


def test_a_router_with_a_setting_that_is_no_plain_value_cannot_be_written_down(plugins):
    plugins("tabled", "Tabled")
    assert router_config(Tabled()) == {"name": "tabled"}
    with pytest.raises(CompositionError, match="cannot be saved: table is not a plain value"):
        router_config(Tabled(table=b"1"))


def test_two_packages_of_one_name_are_refused(plugins):
    plugins("twice", "theirs")
    plugins("twice", "Theirs")
    with pytest.raises(CompositionError, match=r"several packages add the router 'twice': .*:theirs, .*:Theirs"):
        get_router("twice")


def test_a_plugin_with_a_built_in_name_is_ignored_with_one_warning(plugins):
    plugins("pair", "theirs", "things")
    things = Registry(kind="thing", group="things", entries={"pair": "builtins:dict", "list": "builtins:list"})
    things.load("list")
    with pytest.warns(SpectrWarning, match=r"the thing 'pair' of .*:theirs is ignored, since pair is built in"):
        assert things.load("pair") is dict
    assert things.load("pair") is dict


def test_a_groups_former_name_works_with_a_warning(plugins):
    plugins("old", "theirs", "former")
    with pytest.warns(FutureWarning, match="the entry-point group former is now things"):
        assert Registry(kind="thing", group="things", entries={}, old_group="former").make("old") == theirs()


def test_names_are_listed_and_entries_loaded_without_importing_the_rest():
    things = Registry(
        kind="thing",
        group="things",
        entries={"missing": "no_such_package:Thing", "pair": entry("builtins:dict", a=entry("builtins:int"))},
    )
    assert things.names() == ("missing", "pair")
    assert things.load("pair")() == {"a": 0}


def test_a_third_partys_combination_is_called_with_what_follows_its_name(plugins):
    plugins("theirs", "their_combination", "spectr.combinations")
    assert get_combination("theirs:share=0.75") == Combination(merge_outputs, 0.75)
    assert Spectr(combine="theirs:share=0.75").combine == "theirs:share=0.75"


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spectr(top_k=0), "top_k=0\n  expected: a whole number of at least 1"),
        (lambda: Arrow(top_k=-2), "top_k=-2\n  expected: a whole number of at least 1"),
        (lambda: Spectr(score="cosine"), "score='cosine'\n  expected: 'spectral' or 'projection'"),
        (lambda: Spectr(combine="sum"), UNKNOWN_COMBINATION),
        (lambda: Arrow(combine="sum"), UNKNOWN_COMBINATION),
        (lambda: Uniform(combine="sum"), UNKNOWN_COMBINATION),
        (lambda: Spectr(weights="equal"), "weights='equal'\n  expected: 'uniform' or 'softmax'"),
        (lambda: Arrow(temperature=0.0), "temperature=0.0\n  expected: a finite number above zero"),
        (lambda: Spectr(temperature=-1.0), "temperature=-1.0\n  expected: a finite number above zero"),
    ],
)
def test_settings_out_of_range_are_refused_when_the_router_is_made(make, message):
    with types_unchecked(), pytest.raises(CompositionError) as caught:
        make()
    assert str(caught.value) == message


def test_a_router_is_its_settings():
    assert Spectr(top_k=2) == Spectr(top_k=2)
    assert hash(Arrow()) == hash(Arrow())
    with pytest.raises(AttributeError):
        Spectr().top_k = 3


def test_every_router_of_the_package_can_be_imported_from_its_front():
    assert {spectr.Spectr, spectr.Arrow, spectr.Uniform, spectr.Oracle} == {Spectr, Arrow, Uniform, Oracle}
