"""A browser's pages that may make no mistake and ask for nothing outside the disk."""

import os
import shutil
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window; where there is none, a visible skip, and in continuous integration a failure."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None or find_spec("playwright") is None:
        message = f"{'playwright' if path else 'Chromium'} is missing (docs/contributing.md): no page was looked at"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens pages; when the test is over, nothing may have gone wrong on them or left the disk."""
    contexts, wrong = [], []

    def open_page(address, *, size=(1280, 800), **options):
        context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), **options)
        contexts.append(context)
        page = context.new_page()

        def note(text, is_wrong=True):
            if is_wrong:
                wrong.append(f"{page.url}: {text}")

        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("requestfailed", lambda request: note(f"failed: {request.url}"))
        local = ("file:", "data:", "blob:", "about:")
        page.on("request", lambda request: note(f"asked for {request.url}", not request.url.startswith(local)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
