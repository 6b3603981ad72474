"""A browser, a page in it, and the server that it talks to. Where there is no browser its tests are left out."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import pytest
from stand_in import served

CHROMIUM = os.environ.get("SPECTR_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
LACKS = [what for what, there in {"chromium": CHROMIUM, "playwright": find_spec("playwright")}.items() if not there]
left_out = []


def pytest_collection_modifyitems(config, items):
    """Leave out what cannot run here; the last lines of the run report it."""
    if LACKS:
        left_out[:] = [item for item in items if item.get_closest_marker("browser")]
        items[:] = [item for item in items if not item.get_closest_marker("browser")]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter):
    """Why tests were left out, and what to do."""
    if left_out:
        lacks = " and ".join(LACKS)
        terminalreporter.write_line(
            f"{len(left_out)} browser tests left out: no {lacks} here. Run them: make test-browser"
        )


@pytest.fixture(scope="session")
def browser():
    """Debian's own Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def server():
    """The server that the page talks to."""
    with served() as stand_in:
        yield stand_in


@pytest.fixture
def visit(browser, server):
    """Open the page in its own window. At the end no fault may be on the console, and nobody else have been asked."""
    contexts, faults = [], []
    home = server.url.removesuffix("playground/")

    def open_page(**options):
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        )
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if is_fault(message) else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(home) else faults.append(request.url))
        page.goto(server.url)
        page.locator("#model option").first.or_(page.locator("#trouble:not([hidden])")).wait_for(state="attached")
        return page

    open_page.faults = faults
    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def is_fault(message):
    """Whether the console shows more than that the server refused something, which tests do on purpose."""
    return message.type in ("error", "warning") and "the server responded with a status" not in message.text


@pytest.fixture
def page(visit):
    """The page on a desktop, in the light."""
    return visit()


@pytest.fixture
def ask():
    """Ask a question and wait for the end of all answers."""

    def send(page, question="Who are you?", *, wait=True):
        page.fill("#question", question)
        page.locator("#question").press("Enter")
        if wait:
            page.locator("#send").wait_for()
        return page.locator(".answer").last

    return send
