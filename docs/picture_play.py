"""Photograph the interactive page into images/play.png: python docs/picture_play.py (needs playwright, Chromium)."""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
CHROMIUM = shutil.which("chromium")


def main() -> None:
    """Photograph the page as it opens, in the light theme."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 700}, color_scheme="light")
        page.goto((DOCS / "play" / "index.html").as_uri())
        page.wait_for_selector("body[data-ready]")
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    # The page has few colours, so a palette makes the file smaller. Median cut would lose the green.
    small = picture.convert("RGB").quantize(32, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(DOCS / "images" / "play.png", optimize=True)


if __name__ == "__main__":
    main()
