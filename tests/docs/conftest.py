"""A browser's pages that may make no mistake and ask for nothing outside the disk."""

import pytest


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
