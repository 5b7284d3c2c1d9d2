"""Photograph the interactive page into images/play.png: python docs/picture_play.py (needs playwright, Chromium)."""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
PLACE = "#interval=16&ratio=0.1&step=75"
CHROMIUM = shutil.which("chromium")


def main() -> None:
    """Photograph one place in one generation, in the light theme."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1120, "height": 985}, color_scheme="light")
        page.goto((DOCS / "play" / "index.html").as_uri() + PLACE)
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    # The page has few colours, so a palette makes the file a third as large.
    picture.convert("RGB").quantize(48, dither=Image.Dither.NONE).save(DOCS / "images" / "play.png", optimize=True)


if __name__ == "__main__":
    main()
