"""The page without a mouse: the order in which Tab goes, where the focus is seen, and what Enter does."""

from __future__ import annotations

import pytest
from looking import expect
from stand_in import BASE
from test_looks import PHONE, SCHEMES, colour_of, contrast

pytestmark = pytest.mark.browser

SETTINGS = ["model", "beside", "all", "none", *(f"box {name}" for name in ("agnews", "cola", "mnli", "sst2"))]
SETTINGS += ["system", "tokens", "temperature", "layers", "key"]
ORDER = ["skip", "fresh", *SETTINGS, "sample", "sample", "sample", "question", "send"]
NAME = """() => {
  const node = document.activeElement;
  if (node.type === "checkbox" && !node.id) return "box " + node.value;
  if (node.closest("#samples")) return "sample";
  return node.id || node.className || node.tagName;
}"""


def focused(page):
    """What has the focus, by its id or kind."""
    return page.evaluate(NAME)


def from_the_top(page):
    """Go back with the keyboard until the first stop of the page."""
    for _ in range(40):
        if focused(page) == "skip":
            return
        page.keyboard.press("Shift+Tab")
    raise AssertionError("the first stop is never reached")


def test_tab_goes_through_the_page_in_the_order_that_it_is_read(page):
    from_the_top(page)
    seen = []
    for _ in ORDER:
        seen.append(focused(page))
        page.keyboard.press("Tab")
    assert seen == ORDER


@SCHEMES
def test_the_focus_is_seen_at_every_stop(visit, scheme):
    page = visit(color_scheme=scheme)
    from_the_top(page)
    for name in ORDER:
        here = page.locator(":focus")
        assert here.evaluate("node => getComputedStyle(node).outlineStyle") == "solid", name
        assert float(here.evaluate("node => parseFloat(getComputedStyle(node).outlineWidth)")) >= 2, name
        ring, _ = colour_of(here, "outline-color")
        for ground in ("body", ".settings"):
            assert contrast(ring, colour_of(page.locator(ground), "background-color")[0]) >= 3, name
        box = here.bounding_box()
        assert box["width"] > 1, name
        assert box["height"] > 1, name
        page.keyboard.press("Tab")


@SCHEMES
def test_the_focus_is_seen_on_tokens_and_cells(visit, ask, scheme):
    page = visit(color_scheme=scheme)
    answer = ask(page)
    page.keyboard.press("Shift+Tab")
    for _ in page.locator(".legend button").all():
        page.keyboard.press("Shift+Tab")
    expect(page.locator(".token").first).to_be_focused()
    word = page.locator(".token:focus .word").first
    assert word.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    assert contrast(colour_of(word, "outline-color")[0], colour_of(answer, "background-color")[0]) >= 3
    page.keyboard.press("Enter")
    page.locator("[data-number='0']").press("ArrowRight")
    cell = page.locator("[data-number='1']")
    expect(cell).to_be_focused()
    assert cell.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"


def test_the_skip_link_leads_to_the_question(page):
    from_the_top(page)
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "sample"


def test_all_is_done_by_keyboard_alone(server, page):
    from_the_top(page)
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.type(BASE)  # the model to compare with
    expect(page.locator("#beside")).to_have_value(BASE)
    while focused(page) != "box cola":
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    while focused(page) != "sample":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_count(2)
    page.locator("#send").wait_for()
    asked = next(request for request in server.asked if request["model"] == "spectr")
    assert asked["experts"] == ["agnews", "mnli", "sst2"]
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Escape")  # nothing is open: nothing happens
    expect(page.locator(".answer")).to_have_count(2)


def test_on_a_phone_enter_begins_a_line(server, visit):
    page = visit(**PHONE)
    page.locator("#question").tap()
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    expect(page.locator("#question")).to_have_value("one\ntwo")
    assert server.asked == []


def test_on_a_phone_tab_skips_folded_settings(visit):
    page = visit(**PHONE)
    from_the_top(page)
    seen = []
    for _ in range(4):
        seen.append(focused(page))
        page.keyboard.press("Tab")
    assert seen == ["skip", "fresh", "SUMMARY", "sample"]


@SCHEMES
def test_a_phone_shows_the_right_scheme_from_edge_to_edge(visit, ask, scheme):
    page = visit(**PHONE, color_scheme=scheme)
    page.fill("#question", "Go")
    page.locator("#send").tap()
    page.locator("#send").wait_for()
    box = page.locator(".answer").bounding_box()
    assert 0 <= box["x"] < box["x"] + box["width"] <= 360
    ink, paper = (colour_of(page.locator(".answer"), name)[0] for name in ("color", "background-color"))
    assert contrast(ink, paper) >= 7
    assert (ink.mean() > paper.mean()) == (scheme == "dark")
