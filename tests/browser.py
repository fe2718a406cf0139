"""A headless Chromium for the tests, with nothing to say to anybody but the page it is shown."""

import shutil
from contextlib import contextmanager

import pytest

try:
    from playwright.sync_api import TimeoutError as Timeout
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright, Timeout = None, TimeoutError

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


@contextmanager
def chromium():
    "A browser; the test is skipped, with the reason, where there is none."
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(NAMES)}): nothing was opened in a browser")
    if sync_playwright is None:
        pytest.skip("the package playwright is not installed: nothing was opened in Chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def watch(page, base: str) -> list[str]:
    "Collects what goes wrong on a page: console errors, exceptions, failed requests, requests to elsewhere."
    wrong, local = [], (base, "data:", "blob:")
    page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(f"exception: {e}"))
    page.on("requestfailed", lambda r: wrong.append(f"failed: {r.url} ({r.failure})"))
    page.on("response", lambda r: wrong.append(f"status {r.status}: {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: wrong.append(f"external: {r.url}") if not r.url.startswith(local) else None)
    return wrong


VISIBLE_PICTURES = """() => [...document.querySelectorAll('.jupyter-widgets img')]
    .filter(image => image.offsetParent !== null && image.naturalWidth > 0).map(image => image.src).join()"""


def move_slider(page) -> tuple[str, str]:
    "Move the page's first slider by one step with the keyboard; the pictures seen before and after."
    knob = page.locator(".noUi-handle").first
    knob.wait_for(state="visible")
    knob.scroll_into_view_if_needed()
    page.wait_for_function(f"({VISIBLE_PICTURES})() !== ''")
    before = page.evaluate(VISIBLE_PICTURES)
    knob.focus()
    at_the_end = knob.get_attribute("aria-valuenow") == knob.get_attribute("aria-valuemax")
    page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
    try:
        page.wait_for_function(f"before => ({VISIBLE_PICTURES})() !== before", arg=before, timeout=5000)
    except Timeout:  # the caller compares, and says what did not move
        pass
    return before, page.evaluate(VISIBLE_PICTURES)
