"""Any screen, any eyes: narrow, dark, colour-blind, still; and text that wants to be more than text."""

from __future__ import annotations

import itertools
import re
import threading

import numpy as np
import pytest
from looking import expect, sideways
from stand_in import BASE, PAGE, chunk

pytestmark = pytest.mark.browser

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


def colour_of(locator, name):
    """A computed colour as red, green and blue from 0 to 1, and alpha."""
    text = locator.evaluate("(node, name) => getComputedStyle(node).getPropertyValue(name)", name)
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", text)]
    scale = 1 if text.startswith("color(") else 255
    return np.array(numbers[:3]) / scale, numbers[3] if len(numbers) > 3 else 1.0


def luminance(rgb):
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    """WCAG 2's contrast ratio."""
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def palette(scheme):
    """The ten colours that style.css has for a scheme."""
    css = (PAGE / "style.css").read_text(encoding="utf-8")
    block = css.split("prefers-color-scheme: dark")[scheme == "dark"]
    found = dict(re.findall(r"--(e\d): #(\w{6})", block))
    return np.array([[int(found[f"e{n}"][i : i + 2], 16) / 255 for i in (0, 2, 4)] for n in range(10)])


@SCHEMES
def test_the_colours_stay_apart_for_all_kinds_of_colour_vision(scheme):
    # Full protanopia, deuteranopia and tritanopia: Machado, Oliveira and Fernandes (2009), table 1, on linear RGB.
    # Distances in OKLab (Ottosson, 2020).
    eyes = {
        "usual": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_lms.append([0.0883024619, 0.2817188376, 0.6299787005])
    to_lab = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
    to_lab.append([0.0259040371, 0.7827717662, -0.808675766])
    rgb = palette(scheme)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for eye in eyes.values():
        seen = np.clip(linear @ np.array(eye).T, 0, 1)
        lab = np.cbrt(seen @ np.array(to_lms).T) @ np.array(to_lab).T
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 0.09


@SCHEMES
def test_text_and_bars_have_contrast(server, visit, ask, scheme):
    names = [f"e{number:02}" for number in range(10)]
    server.models = ["spectr", *(f"spectr/{name}" for name in names), BASE]
    server.replies["spectr"] = [chunk(f" {name}", {name: 1.0}, experts=names) for name in names]
    page = visit(color_scheme=scheme)
    answer = ask(page)
    paper, _ = colour_of(answer, "background-color")
    assert (luminance(paper) < 0.05) == (scheme == "dark")
    ink, _ = colour_of(answer, "color")
    for word in answer.locator(".word").all():
        tint, alpha = colour_of(word, "background-color")
        assert contrast(ink, tint * alpha + paper * (1 - alpha)) >= 4.5
    for colour in palette(scheme):
        assert contrast(colour, paper) >= 3
    for number, token in enumerate(answer.locator(".token").all()):
        token.click()
        background, _ = colour_of(page.locator(f"[data-number='{number}']"), "background-color")
        assert contrast(ink, background) >= 4.5
    for quiet in (".end", ".answer h3"):
        assert contrast(colour_of(page.locator(quiet).first, "color")[0], paper) >= 4.5


def test_a_phone_never_scrolls_sideways(server, visit, ask):
    long = "Donaudampfschifffahrtsgesellschaft" * 4
    server.models = ["spectr", f"spectr/{long}", "spectr/cola", f"org/{long}"]
    server.replies["spectr"] = [
        chunk(text, {long: 0.7, "cola": 0.1}, experts=[long, "cola"]) for text in ("Oh", f" {long}", "\n", long)
    ]
    page = visit(**PHONE)
    assert sideways(page) <= 0
    page.locator("summary").tap()
    page.select_option("#beside", f"org/{long}")
    assert sideways(page) <= 0
    page.fill("#question", long)
    page.locator("#send").tap()
    page.locator("#send").wait_for()
    expect(page.locator("#settings")).not_to_have_attribute("open", "")
    assert sideways(page) <= 0
    page.locator(".token").nth(1).tap()
    expect(page.locator("#detail h2")).to_contain_text(long)
    assert sideways(page) <= 0


def test_on_a_phone_a_tap_opens_a_sheet_that_leaves_the_token_in_sight(server, visit):
    server.replies["spectr"] = [chunk(f" word{number}", {"cola": 1.0}) for number in range(120)]
    page = visit(**PHONE)
    page.locator("#question").fill("Go")
    page.locator("#send").tap()
    page.locator("#send").wait_for()
    page.locator(".token").nth(110).tap()
    sheet = page.locator("#detail").bounding_box()
    token = page.locator(".token").nth(110).bounding_box()
    assert sheet["width"] == 360
    assert sheet["y"] + sheet["height"] <= 741
    assert 0 <= token["y"] < token["y"] + token["height"] <= sheet["y"]
    expect(page.locator("#tip")).to_be_hidden()
    page.locator("[data-number='3']").tap()
    expect(page.locator(".readout .layer")).to_have_text("model.layers.0.self_attn.o_proj")
    page.get_by_role("button", name="Close").tap()
    expect(page.locator("#detail")).to_be_hidden()


def test_controls_are_large_enough_for_fingers(visit):
    page = visit(**PHONE)
    page.locator("summary").tap()
    for control in page.locator(
        "button:visible, select:visible, input:visible:not([type=checkbox]), label.check:visible"
    ).all():
        box = control.bounding_box()
        assert min(box["width"], box["height"]) >= 24, control.evaluate("node => node.outerHTML")


@pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_nothing_moves_for_who_wants_it_still(server, visit, ask, motion, moves):
    server.replies["spectr"] = [chunk("A", {"cola": 1.0}), threading.Event()]
    page = visit(reduced_motion=motion)
    answer = ask(page, wait=False)
    expect(answer.locator(".token")).to_have_count(1)
    assert bool(page.evaluate("document.getAnimations().length")) == moves


def test_markup_stays_text(server, visit, ask):
    evil = "<img src=x onerror=document.title=1><script>document.title=2</script>"
    server.models = ["spectr", f"spectr/{evil}", f"org/{evil}"]
    server.replies["spectr"] = [chunk(evil, {evil: 1.0}, experts=[evil], names=[f"model.layers.0.{evil}"])]
    page = visit()
    page.select_option("#beside", f"org/{evil}")
    server.refusals[f"org/{evil}"] = (400, {"error": {"message": evil, "code": evil, "param": evil}})
    answer = page.locator(".answer").first
    ask(page, evil)
    expect(answer.locator(".body")).to_have_text(evil)
    answer.locator(".token").hover()
    answer.locator(".token").click()
    expect(page.locator(".readout .layer")).to_contain_text(evil)
    expect(page.get_by_role("alert").last).to_contain_text(evil)
    assert page.locator("img, body script").count() == 0
    assert page.title() == "SpectR playground"


def test_the_strictest_policy_is_enough_and_holds(server, visit):
    page = visit()
    response = page.request.get(server.url)
    assert response.headers["content-security-policy"] == "default-src 'self'"
    page.evaluate("document.body.append(Object.assign(document.createElement('b'), {id: 'b'}))")
    page.evaluate("document.querySelector('#b').setAttribute('style', 'color: red')")
    refused = page.evaluate(
        "try { document.querySelector('#b').innerHTML = '<i>'; 'done' } catch (error) { error.name }"
    )
    assert refused == "TypeError"
    faults = [visit.faults.pop() for _ in range(len(visit.faults))]
    assert any("inline style violates" in fault for fault in faults)
    assert any("TrustedHTML" in fault for fault in faults)


def test_the_page_brings_nothing_inline_and_asks_nobody_else():
    sources = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert {"index.html", "style.css", "app.js"} <= set(sources)
    html = sources.pop("index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name, text in [("index.html", html), *sources.items()]:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|insertAdjacentHTML|\beval\(", text), name


def test_what_is_read_scrolls_along_unless_the_reader_left(server, page, ask):
    gate = threading.Event()
    lines = [chunk(f"line {number}\n", {"cola": 1.0}) for number in range(60)]
    server.replies["spectr"] = [*lines[:40], gate, *lines[40:]]
    ask(page, wait=False)
    expect(page.locator(".token")).to_have_count(40)
    expect(page.locator(".token").nth(39)).to_be_in_viewport()
    page.mouse.move(640, 300)
    page.mouse.wheel(0, -900)
    page.wait_for_timeout(200)
    before = page.evaluate("scrollY")
    gate.set()
    page.locator("#send").wait_for()
    assert page.evaluate("scrollY") == before


def test_the_end_of_an_answer_is_in_sight(server, visit):
    server.replies["spectr"] = [chunk(f"line {number}\n", {"cola": 1.0}) for number in range(30)]
    page = visit(**PHONE)
    page.fill("#question", "Go")
    page.locator("#send").tap()
    page.locator("#send").wait_for()
    expect(page.locator(".end")).to_be_in_viewport()


def test_a_phone_on_its_side_still_shows_the_layers(visit):
    page = visit(**PHONE | {"viewport": {"width": 740, "height": 360}})
    page.fill("#question", "Go")
    page.locator("#send").tap()
    page.locator(".token").first.tap()
    page.locator("[data-number='20']").tap()
    expect(page.locator(".readout .layer")).to_have_text("model.layers.2.mlp.down_proj")
    assert sideways(page) <= 0
