"""How tests look at the page. Nothing here needs a browser to be imported."""

from __future__ import annotations


def expect(what):
    """Playwright's waiting assertions."""
    from playwright.sync_api import expect as expect_

    return expect_(what, "")


def words(answer):
    """The text of each token of an answer."""
    return answer.locator(".token").evaluate_all("nodes => nodes.map(node => node.textContent)")


def bar(token):
    """The shares that the bar under a token shows: [(colour variable, percent)], widths from left to right."""
    text = token.evaluate("node => node.style.getPropertyValue('--bar')")
    parts = [
        part.strip().split(" ") for part in text.removeprefix("linear-gradient(90deg,").removesuffix(")").split(",")
    ]
    stops = [(part[0], float(part[2][:-1]) - float(part[1][:-1])) for part in parts if len(part) == 3]
    return [(hue, round(width)) for hue, width in stops]


def sideways(page):
    """How many pixels the page can be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")
