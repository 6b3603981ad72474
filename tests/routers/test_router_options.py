"""Settings of routers as texts: what ``--set`` takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from spectr import Calibrated, Glider, Shortlist, Spectr, get_router
from spectr.errors import CompositionError
from spectr.routers import Router, router_names
from spectr.routers.setting_texts import _parser, kinds, options_of, read_settings

if TYPE_CHECKING:
    from decimal import Decimal


class Level(Enum):
    LOW = "low"
    HIGH = 2


@dataclass(frozen=True, kw_only=True)
class Theirs(Spectr):
    """Another package's router, with every type that a setting may have."""

    share: float
    modules: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1,)
    limit: int | None = None
    loud: bool = False
    mode: float | Literal["auto"] = "auto"
    inner: Router | None = None
    names: list[str] | None = None
    level: Level = Level.LOW
    place: Path = Path()
    pair: tuple[int, float] = (1, 1.0)
    table: dict[str, int] | None = None
    price: Decimal | None = None


def made_by_a_function(count: int = 2, anything=None):
    return Spectr(top_k=count)


@pytest.fixture
def plugins(monkeypatch):
    values = {"theirs": "Theirs", "function": "made_by_a_function", "always": "Always"}
    points = [EntryPoint(name=n, value=f"{__name__}:{v}", group="spectr.routers") for n, v in values.items()]
    monkeypatch.setattr("spectr.registry.entry_points", lambda group: points if group == "spectr.routers" else [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("share=0.5", 0.5),
        ("modules=q_proj, v_proj", ("q_proj", "v_proj")),
        ("modules=", ()),
        ("sizes=2,3", (2, 3)),
        ("limit=3", 3),
        ("limit=none", None),
        ("loud=true", True),
        ("loud=0", False),
        ("mode=auto", "auto"),
        ("mode=2", 2.0),
        ("inner=none", None),
        ("inner=arrow", {"name": "arrow"}),
        ("top-k=3", 3),
        ("combine=dare:0.1", "dare:0.1"),
        ("weights=softmax", "softmax"),
        ("names=a, b", ["a", "b"]),
        ("level=HIGH", Level.HIGH),
        ("level=low", Level.LOW),
        ("level=2", Level.HIGH),
        ("place=a/b", Path("a/b")),
        ("pair=2,0.5", (2, 0.5)),
        ("table=none", None),
    ],
)
def test_a_value_has_the_type_of_its_field(plugins, text, value):
    assert list(read_settings([text], ["theirs"])["theirs"].values()) == [value]


def test_a_third_partys_router_is_usable_by_its_fields_alone(plugins):
    [given] = read_settings(["share=0.5", "inner=spectr", "inner.top_k=2"], ["theirs"]).values()
    assert get_router("theirs", **given) == Theirs(share=0.5, inner=Spectr(top_k=2))
    assert get_router("function", **read_settings(["count=3"], ["function"])["function"]) == Spectr(top_k=3)
    assert read_settings(["anything=[1, 2]"], ["function"]) == {"function": {"anything": [1, 2]}}
    assert list(options_of("theirs"))[-13:-6] == ["share", "modules", "sizes", "limit", "loud", "mode", "inner"]


def test_a_list_stays_a_list_where_the_field_is_one(plugins):
    assert get_router("theirs", share=1.0, names=["a"], sizes=[2]) == Theirs(share=1.0, names=["a"], sizes=(2,))


def test_every_type_of_our_own_routers_can_be_set_from_text():
    types = [
        (key, kind) for n in router_names() for key, option in options_of(n).items() for kind in kinds(option.hint)
    ]
    assert [key for key, kind in types if _parser(kind, key) is None] == []


def test_a_setting_of_the_router_inside_is_found_by_its_name_or_its_place():
    inside = {"token_router": {"name": "calibrated-prior", "top_k": 2}}
    assert read_settings(["top_k=2"], ["shortlist"]) == {"shortlist": inside}
    assert read_settings(["token_router.top_k=2"], ["shortlist"]) == {"shortlist": inside}
    assert get_router("shortlist", **inside) == Shortlist(token_router=Calibrated(level="prior", top_k=2))
    given = read_settings(["token_router=spectr", "temperature=2", "token_router.temperature=3"], ["glider"])["glider"]
    assert get_router("glider", **given) == Glider(temperature=2.0, token_router=Spectr(temperature=3.0))


def test_a_setting_of_the_router_inside_changes_the_one_that_is_given():
    given = {"shortlist": {"size": 4, "token_router": {"name": "spectr", "combine": "ties"}}}
    inside = {"token_router": {"name": "spectr", "combine": "ties", "top_k": 2}}
    for text in ("top_k=2", "token_router.top_k=2"):
        assert read_settings([text], ["shortlist"], defaults=given) == {"shortlist": inside}
    replaced = read_settings(["token_router=arrow", "token_router.top_k=2"], ["shortlist"], defaults=given)
    assert replaced == {"shortlist": {"token_router": {"name": "arrow", "top_k": 2}}}


def test_with_several_routers_a_setting_is_for_all_that_have_it_or_for_the_one_that_is_named():
    given = read_settings(["temperature=2", "arrow.temperature=3", "spectr.top_k=1"], ["arrow", "spectr", "mu"])
    assert given == {"arrow": {"temperature": 3.0}, "spectr": {"temperature": 2.0, "top_k": 1}, "mu": {}}
    assert read_settings(["shortlist=3"], ["lag"]) == {"lag": {"shortlist": 3}}  # a setting, and a router's name


@pytest.mark.parametrize(
    ("texts", "routers", "message"),
    [
        (["temperature"], ["arrow"], "--set temperature\n  expected: NAME=VALUE"),
        (["=2"], ["arrow"], "--set =2\n  expected: NAME=VALUE"),
        (["temprature=2"], ["arrow"], "router 'arrow' has no temprature"),
        (["temprature=2"], ["arrow"], "(with their defaults): arrow: top_k=4, weights=softmax, temperature=1.0"),
        (["temprature=2"], ["arrow"], "to do: did you mean 'temperature'?"),
        (["temperature=2"], ["mu", "oracle"], "none of these routers has temperature"),
        (["temperature=2"], ["mu", "oracle"], "mu: combine=outputs; oracle: expert"),
        (["arrow.temperature=2"], ["mu"], "the router arrow is not used here\n  expected: one of mu"),
        (["arrow.temprature=2"], ["arrow", "mu"], "router 'arrow' has no temprature"),
        (["token_router.topk=2"], ["shortlist"], "did you mean 'token_router.top_k'?"),
        (["temperature=2", "temperature=3"], ["arrow"], "temperature set twice"),
        (["temperature=hot"], ["arrow"], "temperature=hot\n  expected: a number"),
        (["top_k=2.5"], ["arrow"], "top_k=2.5\n  expected: a whole number"),
        (["weights=soft"], ["arrow"], "weights=soft\n  expected: uniform or softmax"),
        (["loud=perhaps"], ["theirs"], "loud=perhaps\n  expected: true or false"),
        (["sizes=1,x"], ["theirs"], "sizes=x\n  expected: a whole number"),
        (["limit=few"], ["theirs"], "limit=few\n  expected: none or a whole number"),
        (["pair=2"], ["theirs"], "pair=2\n  expected: 2 values, separated by commas: a whole number, a number"),
        (["level=mid"], ["theirs"], "level=mid\n  expected: LOW or HIGH"),
        (["table={}"], ["theirs"], "table cannot be set from text: its type is dict[str, int] | None\n  to do: set it"),
        (["price=2"], ["theirs"], "price cannot be set from text: its type cannot be resolved: NameError: name 'Dec"),
        (["inner=arow"], ["theirs"], "did you mean 'arrow'"),
    ],
)
def test_mistakes(plugins, texts, routers, message):
    with pytest.raises(CompositionError) as caught:
        read_settings(texts, routers)
    assert message in str(caught.value)


# From the command line


def test_a_third_partys_router_from_the_command_line(spectr, given, plugins):
    code, out, _ = spectr("generate", "what", "-n", 1, "--json", "-r", "theirs", "--set", "share=1", "-k", 2, *given)
    assert code == 0
    assert "share=1.0" in json.loads(out)["router"]
    code, _, err = spectr("generate", "what", "-r", "theirs", *given)
    assert code == 2
    assert "router 'theirs' needs share\n  to do: --set share=..." in err


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--router-temperature", 2.0, "use --set temperature=2.0"),
        ("--local", "spectr", "use --set token_router=spectr"),
        ("--bits", 16, "use --set bits=16"),
        ("--shortlist", 3, "use --set size=3"),
    ],
)
def test_the_options_before_set_still_work_with_a_warning(spectr, given, flag, value, told):
    router = "arrow" if flag == "--router-temperature" else "shortlist"
    code, _, err = spectr("generate", "what", "-n", 1, "-r", router, flag, value, *given)
    assert code == (0 if router == "arrow" else 2)  # of this library there is no index
    assert f"warning: {flag} is deprecated" in " ".join(err.split())
    assert told in " ".join(err.split())
    assert router == "arrow" or "not calibrated" in err


def test_combine_is_short_for_a_setting(spectr, given):
    code, _, err = spectr("generate", "what", "-n", 1, "-r", "mu", "--combine", "ties", "--set", "combine=dare", *given)
    assert code == 2
    assert "combine set twice" in err


@pytest.mark.filterwarnings("always::spectr.errors.SpectrWarning")
def test_a_deprecated_text_is_one_line(spectr, given):
    code, _, err = spectr("generate", "what", "-n", 1, "-r", "mu", "--combine", "dare:0.5", *given)
    assert code == 0
    lines = [line for line in err.splitlines() if "deprecated" in line]
    assert lines == ["\u00b7 warning: combine='dare:0.5' is deprecated: write 'dare:density=0.5'"]
    assert "Warning" not in err


@dataclass(frozen=True, kw_only=True)
class Always(Spectr):
    """Another package's router with a setting of the oracle's name."""

    expert: str = "amber"


def test_the_expert_of_another_packages_router(spectr, given, plugins):
    code, out, _ = spectr("generate", "what", "-n", 1, "--json", "-r", "always", "-e", "blue", *given)
    assert code == 0
    assert "expert='blue'" in json.loads(out)["router"]
    code, _, err = spectr("generate", "what", "-n", 1, "-r", "mu", "-e", "blue", *given)
    assert code == 2
    assert "-r oracle -e NAME, or --allow NAME" in err
