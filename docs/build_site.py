"""Build the site from docs/*.md and the executed tutorials: build/docs/html, which opens from the disk.

    python docs/run_tutorials.py && python docs/build_site.py

The pages are written for GitHub, so their links lead to files of the repository. This script copies the pages to
build/docs/source and changes the links to the same thing in the site: a page, a tutorial, or a copy of the file
(`repository/…`). It makes such a copy of every file that some page links to. Sphinx's warnings are errors.

A tutorial's page offers its notebook, executed. The links of such a notebook lead to the site as well, relative to the
folder that it is downloaded from. With `--address https://…`, where the site will be published, they are absolute.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import sys
from base64 import b64decode
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
from bs4 import BeautifulSoup
from PIL import Image
from sphinx.cmd.build import main as sphinx

from make_figures import FIGURES, drawn
from run_tutorials import FOLDED, NOTEBOOKS, ROOT, figures, tutorials

DOCS = ROOT / "docs"
BUILD = ROOT / "build" / "docs"
SOURCE, HTML, EXTRA = BUILD / "source", BUILD / "html", BUILD / "extra"
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".css": "css", ".js": "javascript", ".html": "html"}
TEXT = {*LANGUAGES, ".txt", ".md", ".jsonl", ".svg", ".mplstyle", ".tiktoken", ""}
LARGEST = 400_000  # bytes; the site shows smaller files and only names larger ones
# Pages made from READMEs, by their place in the repository.
READMES = {"README.md": "readme.md", "reference/README.md": "reference.md", "fast/README.md": "fast.md"}
MENU = [  # captions and pages of the menu
    ("Learn", ["play", "tutorials/index", "glossary"]),
    ("Read the code", ["reference", "fast", "design", "numerics"]),
    ("Understand", ["algorithm", "kernels", "performance", "evidence", "training"]),
    ("Use", ["use", "when_not", "compared", "questions", "models", "api", "serving", "vllm_scheduler", "porting"]),
    ("The project", ["contributing", "changelog", "log"]),
]
FENCED = re.compile(r"(^ {0,3}(?P<fence>`{3,}|~{3,}).*?^ {0,3}(?P=fence)`*[ ]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*)\]\((?P<target>[^()\s]+)\)")


@dataclass
class Site:
    """Maps files of the repository to pages of the site's source, and remembers the files to copy."""

    wanted: dict[PurePosixPath, str] = field(default_factory=dict)  # repository path -> page of its copy

    def place(self, path: PurePosixPath) -> str | None:
        """Find the page, relative to the source folder, that shows a file or folder of the repository, or None.

        >>> Site().place(PurePosixPath("docs/tutorials/03_drift.md"))
        'tutorials/03_drift.ipynb'
        """
        special = READMES | {"tutorials/README.md": "tutorials/index.md", "docs": "index.md"}
        special |= {"docs/tutorials": "tutorials/index.md", "tutorials": "tutorials/index.md"}
        if str(path) in special:
            return special[str(path)]
        if path.parent == PurePosixPath("docs/tutorials") and path.suffix == ".md":
            return f"tutorials/{path.stem}.ipynb"
        if path.parent == PurePosixPath("docs") and path.suffix == ".md":
            return path.name
        if path.parts[:2] == ("docs", "images"):
            return str(PurePosixPath(*path.parts[1:]))
        if path.parts[:2] == ("docs", "play") and path.suffix:
            return str(PurePosixPath(*path.parts[1:]))
        there = ROOT / path
        if there.is_dir():
            self.wanted[path] = f"repository/{path}/index.md"
        elif there.is_file() and there.suffix in TEXT and there.stat().st_size <= LARGEST:
            self.wanted[path] = f"repository/{path}.md"
        return self.wanted.get(path)

    def relinked(self, markdown: str, origin: PurePosixPath, page: str) -> str:
        """Change the links of the repository's file `origin` so that they fit on `page` of the site."""

        def replace(match: re.Match) -> str:
            target, _, anchor = match["target"].partition("#")
            if re.match(r"\w+:", target) or not target:
                return match[0]
            path = PurePosixPath(os.path.normpath(origin.parent / target))
            place = self.place(path)
            if place is None:
                return match[0]
            relative = os.path.relpath(place, PurePosixPath(page).parent)
            text = LINK.sub(replace, match["text"]) if "](" in match["text"] else match["text"]
            if place.startswith("play/"):  # Sphinx does not know these files
                return f'<a href="{relative}">{text}</a>'
            return f"{match['image']}[{text}]({relative}{'#' if anchor else ''}{anchor})"

        prose, end = [], 0
        for code in FENCED.finditer(markdown):
            prose += [LINK.sub(replace, markdown[end : code.start()]), code[0]]
            end = code.end()
        return "".join([*prose, LINK.sub(replace, markdown[end:])])

    def copies(self) -> None:
        """Write the pages that show files and folders of the repository, until no page links to another."""
        done: set[PurePosixPath] = set()
        while self.wanted.keys() - done:
            path = min(self.wanted.keys() - done)
            done.add(path)
            write(self.wanted[path], self.listing(path) if (ROOT / path).is_dir() else self.copy(path))

    def listing(self, path: PurePosixPath) -> str:
        """List the files of a folder, with links to those that the site can show."""
        lines = [f"---\norphan: true\n---\n\n# {path}/\n"]
        for entry in sorted((ROOT / path).iterdir(), key=lambda entry: (entry.is_file(), entry.name)):
            if entry.name != "__pycache__" and not entry.name.startswith("."):
                place = self.place(path / entry.name)
                name = f"`{entry.name}{'/' if entry.is_dir() else ''}`"
                here = PurePosixPath(self.wanted[path]).parent
                lines.append(f"- {name}" if place is None else f"- [{name}]({os.path.relpath(place, here)})")
        return "\n".join(lines) + "\n"

    def copy(self, path: PurePosixPath) -> str:
        """Show a file as it is."""
        text = (ROOT / path).read_text(encoding="utf-8")
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=2))
        language = LANGUAGES.get(path.suffix, "none")
        return f"---\norphan: true\n---\n\n# {path}\n\n{fence}{{code-block}} {language}\n\n{text.rstrip()}\n{fence}\n"


def write(page: str, text: str) -> None:
    """Write a page of the site's source."""
    (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / page).write_text(text, encoding="utf-8")


def assemble(address: str) -> None:
    """Lay out build/docs/source: pages, tutorials, images, copies of what they link to; and what Sphinx only copies."""
    for folder in (SOURCE, EXTRA):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    site = Site()
    for path in sorted(DOCS.glob("*.md")):
        name = PurePosixPath("docs") / path.name
        write(path.name, site.relinked(path.read_text(encoding="utf-8"), name, path.name))
    for name, page in READMES.items():
        text = site.relinked((ROOT / name).read_text(encoding="utf-8"), PurePosixPath(name), page)
        write(page, f"---\norphan: true\n---\n\n{text}" if name == "README.md" else text)
    table = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    page = site.relinked(table, PurePosixPath("tutorials/README.md"), "tutorials/index.md")
    write("tutorials/index.md", page + toctree("", [script.stem for script in tutorials()]))
    for script in tutorials():
        notebook_page(site, NOTEBOOKS / f"{script.stem}.ipynb", address)
    shutil.copytree(DOCS / "images", SOURCE / "images")
    shutil.copytree(DOCS / "play", EXTRA / "play")
    link_back(EXTRA / "play" / "index.html")
    write("index.md", with_entrance((SOURCE / "index.md").read_text(encoding="utf-8")) + navigation())
    site.copies()


def link_back(page: Path) -> None:
    """Link the interactive page to the documentation, which lies beside it only in the site."""
    text, mark = page.read_text(encoding="utf-8"), "<!-- documentation: the site puts a link here -->"
    if text.count(mark) != 1:
        raise ValueError(f"{page}: got {text.count(mark)} places for the link; allowed: 1, {mark}")
    link = '<p>More: <a href="../play.html">about this page</a>, <a href="../index.html">the documentation</a>.</p>'
    page.write_text(text.replace(mark, link), encoding="utf-8")


def toctree(caption: str, pages: Sequence[str]) -> str:
    """Write one part of the navigation. The pages do not hold it, because GitHub would show it as code."""
    title = f":caption: {caption}\n" if caption else ""
    return "\n".join(["", f"```{{toctree}}\n:hidden:\n{title}", *pages, "```", ""])


def navigation() -> str:
    """Write the menu of all pages that exist. The tutorials have a list of their own."""
    parts = (toctree(caption, [name for name in names if (SOURCE / f"{name}.md").exists()]) for caption, names in MENU)
    return "".join(parts)


ENTRANCE = """<p class="entrance"><a href="play/index.html"><strong>Watch it, token by token.</strong>
A real model decodes the same text densely, sparsely and with rectification. Three stops show what happens.</a></p>
"""


def with_entrance(page: str) -> str:
    """Put the way to the interactive page below the title of the first page; only the site has that page."""
    title, rest = page.split("\n", 1)
    return f"{title}\n\n{ENTRANCE}{rest}"


OFFER = '<p class="download"><a href="{name}.ipynb" download>Download this page as a notebook</a></p>'
ABOUT = """*An executed notebook of the documentation of resa. To run it, install the package from a clone:
`pip install '.[fast]'`. {links}*"""


def notebook_page(site: Site, path: Path, address: str) -> None:
    """Copy an executed tutorial with changed links, as a page and as a notebook that the page offers."""
    notebook = nbformat.read(path, as_version=4)
    captions = figures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            origin = PurePosixPath("docs/tutorials") / f"{path.stem}.md"
            cell.source = site.relinked(cell.source, origin, f"tutorials/{path.name}")
        elif cell.id in captions:
            classes = {"classes": "wide"} if max(map(width, cell.outputs)) > WIDE else {}
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(captions[cell.id]), **classes}}
        if "hide-input" in cell.metadata.get("tags", []):
            cell.metadata.setdefault("mystnb", {}).update(code_prompt_show="Code", code_prompt_hide="Code")
    (EXTRA / "tutorials").mkdir(exist_ok=True)
    nbformat.write(offered(notebook, address), EXTRA / "tutorials" / path.name)

    title, *rest = notebook.cells[0].source.split("\n")
    notebook.cells[0].source = "\n".join([title, "", OFFER.format(name=path.stem), *rest])
    nbformat.write(notebook, SOURCE / "tutorials" / path.name)


def offered(page: nbformat.NotebookNode, address: str) -> nbformat.NotebookNode:
    """Turn a tutorial's page into the notebook to download: links to the site's files, solutions and plots folded."""
    notebook = deepcopy(page)
    title, *rest = notebook.cells[0].source.split("\n")
    links = "Links lead to the site" + ("." if address else ", if this file lies in its folder `tutorials`.")
    notebook.cells[0].source = "\n".join([title, "", ABOUT.format(links=links), *rest])
    base = f"{address.rstrip('/')}/tutorials/" if address else ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda match: in_notebook(match, base), cell.source)
        tags = FOLDED.keys() & set(cell.metadata.get("tags", []))
        if tags:
            cell.metadata["jupyter"] = {"source_hidden": True, "outputs_hidden": "hide-cell" in tags}
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def in_notebook(match: re.Match, base: str) -> str:
    """Change a link between pages of the site's source to one between its files; notebooks stay notebooks.

    >>> in_notebook(LINK.match("[a](../glossary.md#drift)"), "")
    '[a](../glossary.html#drift)'
    """
    target = match["target"]
    if re.match(r"\w+:", target):
        return match[0]
    return f"[{match['text']}]({base}{re.sub(r'[.]md(?=#|$)', '.html', target)})"


WIDE = 640  # pixels of a figure that a phone lets scroll, because its letters would be too small


def width(output: nbformat.NotebookNode) -> int:
    """Width of a figure in pixels, or 0."""
    png = output.get("data", {}).get("image/png")
    return Image.open(io.BytesIO(b64decode(png))).width if png else 0


# ---- What Sphinx leaves open ----------------------------------------------------------------------------------------


def stack_figures() -> None:
    """Offer narrow screens the drawn figures with their panels below each other."""
    wide = {name: draw for name, (draw, (width, height)) in FIGURES.items() if width > 2 * height}
    for name, draw in wide.items():
        (HTML / "_images" / f"narrow_{name}").write_bytes(drawn(draw, (4.6, 7.2)))
    image = re.compile(rf'<img [^>]*src="((?:\.\./)*_images/)({"|".join(map(re.escape, wide))})"[^>]*>')
    for page in HTML.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        if image.search(text):
            both = r'<picture><source media="(max-width: 40em)" srcset="\1narrow_\2">\g<0></picture>'
            page.write_text(image.sub(both, text), encoding="utf-8")


def write_excerpts() -> None:
    """Write _static/texts.js: the text of every page by section, for the search to quote. See excerpts.js."""
    texts = {}
    for path in sorted(HTML.rglob("*.html")):
        name = str(path.relative_to(HTML)).removesuffix(".html")
        if name.startswith("repository/"):
            continue
        article = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").select_one('[role="main"]')
        if article is None:
            continue
        for unwanted in article.select(".headerlink, .download, script, style, math, pre, svg"):
            unwanted.decompose()
        texts[name] = [[section["id"], own_text(section)] for section in article.select("section[id]")]
    script = f"globalThis.RESA_TEXTS = {json.dumps(texts, ensure_ascii=False, separators=(',', ':'))};\n"
    (HTML / "_static" / "texts.js").write_text(script, encoding="utf-8")


def own_text(section: BeautifulSoup) -> str:
    """Text of a section without that of the sections inside of it."""
    parts = (child.get_text() for child in section.children if child.name != "section")
    return " ".join(" ".join(parts).split())


def main() -> int:
    """Lay out the source and let Sphinx make the site."""
    parser = argparse.ArgumentParser(description="build the site")
    parser.add_argument("--address", default="", help="where it will be published; for the links of notebooks")
    assemble(parser.parse_args().address)
    shutil.rmtree(HTML, ignore_errors=True)
    options = ["-W", "--keep-going", "-q", "-E", "-j", "auto", "-c", str(DOCS), "-d", str(BUILD / "doctrees")]
    status = sphinx([*options, str(SOURCE), str(HTML)])
    stack_figures()
    write_excerpts()
    if status == 0:
        print(f"the site: {(HTML / 'index.html').relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
