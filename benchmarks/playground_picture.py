"""Take the docs' picture of the playground from a running server.

spectr serve ...
python benchmarks/playground_picture.py http://127.0.0.1:8000/playground/
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

LIMIT = 300_000  # bytes
QUESTION = "Is the sentiment of this movie review positive or negative?\n\nA dull, lifeless film."


def main():
    """Ask the routed model and the base model, look at one token's layers, and save what the page shows."""
    given = arguments()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=given.chromium)
        page = browser.new_page(viewport={"width": 1280, "height": given.height}, color_scheme=given.scheme)
        page.set_default_timeout(given.timeout * 1000)
        page.goto(given.url)
        talk(page, given)
        page.screenshot(path=given.output)
        browser.close()
    size = given.output.stat().st_size
    if size > LIMIT:
        sys.exit(f"{given.output} has {size} bytes, the docs take {LIMIT}: give a smaller --height")
    print(f"{given.output}: {size} bytes")


def talk(page, given):
    """Bring the page to where the picture is taken."""
    if given.key:
        page.locator("#key").fill(given.key)
        page.locator("#key").press("Tab")
    base = page.locator("#beside optgroup[label='Base model'] option").first
    base.wait_for(state="attached")
    page.select_option("#beside", base.get_attribute("value"))
    page.locator("#tokens").fill(str(given.max_tokens))
    page.locator("#question").fill(given.question)
    page.locator("#send").click()
    page.locator("#send").wait_for()
    if trouble := page.get_by_role("alert").all_inner_texts():
        sys.exit(f"{given.url} did not answer: {'; '.join(filter(None, trouble))}")
    tokens = page.locator(".answer").first.locator(".token")
    if not tokens.count():
        sys.exit(f"{given.url} sends no routing with its answers: the picture would show nothing of it")
    tokens.nth(min(given.token, tokens.count() - 1)).click()
    page.mouse.move(0, 0)


def arguments():
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the page of a running server")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/playground.png"))
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--token", type=int, default=0, help="number of the token to look at")
    parser.add_argument("--max-tokens", type=int, default=60, help="of each answer")
    parser.add_argument("--key", help="API key, where the server asks for one")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    parser.add_argument("--height", type=int, default=800, help="of the picture, in pixels")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for the answers")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    return parser.parse_args()


if __name__ == "__main__":
    main()
