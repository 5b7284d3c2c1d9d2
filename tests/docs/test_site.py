"""The site in build/docs/html, with and without a browser, and the program that executes tutorials for it.

`make docs` builds the site and runs these tests.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DOCS, SITE, SCREENSHOTS = ROOT / "docs", ROOT / "build" / "docs" / "html", ROOT / "build" / "docs" / "screenshots"
pytestmark = pytest.mark.site

GOOD = "# %%\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(1)\n"
GOOD += "\n# %% [markdown]\n# *Figure: two.*\n"
NOISY = GOOD.replace("print(1)", "import sys; print(1, file=sys.stderr)")


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (GOOD, None),
        (GOOD + "\n# %%\nassert 1 == 2, 'so it is not'\n", r"99_try.py, code cell 2:[\s\S]*so it is not"),
        (NOISY, "99_try.py, code cell 1 prints"),
        (GOOD.replace("*Figure: two.*", "Two."), r"99_try.py, code cell 1: a figure without \*Figure"),
    ],
    ids=["good", "false", "noisy", "no caption"],
)
def test_a_tutorial_that_became_false_is_named(tmp_path, monkeypatch, script, complaint):
    monkeypatch.syspath_prepend(str(DOCS))
    run_tutorials = importlib.import_module("run_tutorials")
    (tmp_path / "99_try.py").write_text(script)
    if complaint is None:
        assert len(run_tutorials.figures(run_tutorials.execute(tmp_path / "99_try.py")[0])) == 1
    else:
        with pytest.raises(RuntimeError, match=complaint):
            run_tutorials.execute(tmp_path / "99_try.py")


def test_the_ladder_can_be_recorded_again():
    """Rehearsed without a GPU: the rungs of both tutorials compute what they should, and are those in the file."""
    done = subprocess.run(
        [sys.executable, DOCS / "record_ladder.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = re.findall(r"'(\d [^']+)': |\"(\d [^\"]+)\": ", done.stdout.splitlines()[-1])
    rows = json.loads((DOCS / "results" / "ladder.json").read_text())["rows"]
    assert {one or other for one, other in told} == {row["rung"] for row in rows}


def without_colours(page):
    """A page without the tags that colour code: nine tenths of all tags."""

    def plain(code):
        return re.sub(r'<span( class="\w+")?>|</span>', "", code[0])

    return re.sub(r"<pre>.*?</pre>", plain, page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def site():
    """Every page of the built site by its path in it, parsed."""
    from bs4 import BeautifulSoup  # the theme's own parser

    assert (SITE / "index.html").exists(), "there is no site yet: make docs"
    pages = {str(path.relative_to(SITE)): path.read_text(encoding="utf-8") for path in sorted(SITE.rglob("*.html"))}
    return {name: BeautifulSoup(without_colours(page), "html.parser") for name, page in pages.items()}


def ids(page):
    """The places on a page that a link can name."""
    return {tag.get("id") or tag.get("name") for tag in page.select("[id], [name]")}


def test_links_within_the_site_resolve(site):
    places = {name: ids(page) for name, page in site.items()}
    for name, page in site.items():
        loads = [tag["src"] for tag in page.select("[src]")]
        loads += [tag["href"] for tag in page.select("link[href]") if "canonical" not in tag.get("rel", [])]
        for link in [*(tag["href"] for tag in page.select("a[href]")), *loads]:
            if re.match(r"\w+:", link):
                assert link not in loads or link.startswith("data:"), f"{name} loads {link} from the network"
                continue
            target, _, anchor = unquote(link).partition("#")
            target = target.partition("?")[0]
            path = Path(os.path.normpath(SITE / Path(name).parent / target)) if target else SITE / name
            assert path.is_file(), f"{name}: {link}"
            if anchor and path.suffix == ".html":
                assert anchor in places[str(path.relative_to(SITE))], f"{name}: {link}"


def test_every_page_is_in_the_site(site):
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= site.keys()
    assert {f"tutorials/{script.stem}.html" for script in (ROOT / "tutorials").glob("*.py")} <= site.keys()
    assert {"reference.html", "fast.html"} <= site.keys()
    documented = re.findall(r"^\.\. auto(?:class|function|data):: (\w+)", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert set(documented) <= {str(place).split(".")[-1] for place in ids(site["api.html"])}
    assert {"../play.html", "../index.html"} <= {tag["href"] for tag in site["play/index.html"].select("a[href]")}
    titles = [page.title.text for name, page in site.items() if not name.startswith("play/")]
    assert len(set(titles)) == len(titles)


HIDDEN = ["pre", "code", "script", "math", "title"]


def test_formulas_are_mathml_without_remains(site):
    assert len(site["algorithm.html"].select("math")) > 20
    for name, page in site.items():
        for formula in page.select("math"):
            assert formula.text.strip(), name
            assert "\\" not in formula.text, f"{name}: {formula.text.strip()}"
        if not name.startswith("repository/"):
            strings = [text for text in page.find_all(string=True) if not text.find_parent(HIDDEN)]
            assert not re.search(r"\$\$|\\(frac|sum|mathrm|max|bar)\b", "".join(strings)), name


SHOWN = ("index", "algorithm", "api", "evidence", "glossary", "tutorials/index", "tutorials/01_cache", "play")


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_pages_in_a_browser(site, visit, size):
    """No error, no request that fails or leaves the disk, nothing wider than the screen, formulas with a size.

    Of the copies of files, which are 300 pages of one kind, every tenth.
    """
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = visit((SITE / "index.html").as_uri(), size=size)
    copies = [name for name in site if name.startswith("repository/")]
    chosen = [name for name in site if name not in copies] + copies[::10]
    assert len(copies) > 200
    for name in chosen:
        parsed = site[name]
        page.goto((SITE / name).as_uri())
        assert page.title().strip() == parsed.title.text.strip()
        assert "resa" in parsed.title.text, name
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size[0], f"{name} is {wide} pixels wide"
        shown = "[...document.querySelectorAll('math')].filter(m => !m.closest('details:not([open])'))"
        widths = page.evaluate(f"{shown}.map(m => m.getBoundingClientRect().width)")
        assert min(widths, default=1) > 0, name
        if name.removesuffix(".html") in SHOWN:
            file = f"{name.removesuffix('.html').replace('/', '_')}_{size[0]}.png"
            page.screenshot(path=SCREENSHOTS / file, full_page=name != "api.html")


def test_every_tutorial_offers_its_notebook(site):
    """Executed, with solutions and plots folded, and its links lead somewhere from the folder that it lies in."""
    nbformat = importlib.import_module("nbformat")
    for script in sorted((ROOT / "tutorials").glob("*.py")):
        (offer,) = site[f"tutorials/{script.stem}.html"].select("a[download]")
        path = SITE / "tutorials" / offer["href"]
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        assert all(cell.execution_count for cell in code), path
        assert sum(bool(cell.outputs) for cell in code) > 3, path
        for cell in code:
            is_folded = bool({"hide-cell", "hide-input"} & set(cell.metadata.get("tags", [])))
            assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == is_folded, cell.source
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        links = re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", prose)
        assert links, path
        for link in links:
            assert re.match(r"https?:", link) or (path.parent / link).is_file(), f"{path.name}: {link}"


def test_the_first_page_leads_to_the_interactive_one(site):
    first = site["index.html"].select_one("article p a")
    assert first["href"] == "play/index.html"


def test_search_finds_and_quotes(visit):
    """From the disk, where no page can be fetched."""
    page = visit(f"{(SITE / 'search.html').as_uri()}?q=rectification")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    page.wait_for_selector("#search-results p.context", timeout=20_000)
    quotes = page.locator("#search-results p.context").all_inner_texts()
    assert sum("rectification" in quote.lower() for quote in quotes) > 5


@pytest.mark.parametrize("name", ["evidence", "tutorials/01_cache"])
def test_the_contents_of_a_page_stand_beside_it(visit, name):
    page = visit((SITE / f"{name}.html").as_uri())
    contents = page.locator(".toc-tree").bounding_box()
    text = page.locator("article").bounding_box()
    assert text["x"] + text["width"] <= contents["x"]
    assert contents["x"] + contents["width"] <= 1280


def test_a_phone_keeps_the_first_column_and_stacks_panels(visit):
    page = visit((SITE / "evidence.html").as_uri(), size=(390, 844))
    table = page.locator(".table-wrapper").filter(has=page.locator("td.text-right")).first
    table.evaluate("table => { table.scrollLeft = 200; }")
    assert table.evaluate("table => table.scrollLeft") == 200
    cell = table.locator("tbody tr").first.locator("td").first
    assert abs(cell.bounding_box()["x"] - table.bounding_box()["x"]) <= 4
    shown = page.locator("picture img").evaluate_all("images => images.map(image => image.currentSrc)")
    assert any(source.endswith("narrow_real.svg") for source in shown)
