"""Build the site from docs/*.md and the executed tutorials: build/docs/html, which opens from the disk.

    python docs/run_tutorials.py && python docs/build_site.py

The pages are written for GitHub, so their links lead to files of the repository. This script copies the pages to
build/docs/source and changes the links to the same thing in the site: a page, a tutorial, or a copy of the file
(`repository/…`). It makes such a copy of every file that some page links to. Sphinx's warnings are errors.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
from sphinx.cmd.build import main as sphinx

from run_tutorials import NOTEBOOKS, ROOT, figures

DOCS = ROOT / "docs"
BUILD = ROOT / "build" / "docs"
SOURCE, HTML, EXTRA = BUILD / "source", BUILD / "html", BUILD / "extra"
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".css": "css", ".js": "javascript", ".html": "html"}
TEXT = {*LANGUAGES, ".txt", ".md", ".jsonl", ".svg", ".mplstyle", ".tiktoken", ""}
LARGEST = 400_000  # bytes; the site shows smaller files and only names larger ones
# Pages made from READMEs, by their place in the repository.
READMES = {"README.md": "readme.md", "reference/README.md": "reference.md", "fast/README.md": "fast.md"}
MENU = [  # captions and pages of the menu
    ("Learn", ["tutorials/index", "play", "glossary"]),
    ("Read the code", ["reference", "fast", "design", "numerics"]),
    ("Understand", ["algorithm", "kernels", "performance", "evidence", "training"]),
    ("Use", ["api", "models", "porting", "serving"]),
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


def assemble() -> None:
    """Lay out build/docs/source: pages, tutorials, images, copies of what they link to."""
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
    notebooks = sorted(NOTEBOOKS.glob("*.ipynb"))
    write("tutorials/index.md", page + toctree("", [path.stem for path in notebooks]))
    for path in notebooks:
        notebook_page(site, path)
    shutil.copytree(DOCS / "images", SOURCE / "images")
    shutil.copytree(DOCS / "play", EXTRA / "play")
    link_back(EXTRA / "play" / "index.html")
    write("index.md", (SOURCE / "index.md").read_text(encoding="utf-8") + navigation())
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


def notebook_page(site: Site, path: Path) -> None:
    """Copy an executed tutorial with changed links and with alternative texts for its figures."""
    notebook = nbformat.read(path, as_version=4)
    captions = figures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            origin = PurePosixPath("docs/tutorials") / f"{path.stem}.md"
            cell.source = site.relinked(cell.source, origin, f"tutorials/{path.name}")
        elif cell.id in captions:
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(captions[cell.id])}}
    nbformat.write(notebook, SOURCE / "tutorials" / path.name)


def main() -> int:
    """Lay out the source and let Sphinx make the site."""
    assemble()
    shutil.rmtree(HTML, ignore_errors=True)
    options = ["-W", "--keep-going", "-q", "-E", "-j", "auto", "-c", str(DOCS), "-d", str(BUILD / "doctrees")]
    status = sphinx([*options, str(SOURCE), str(HTML)])
    if status == 0:
        print(f"the site: {(HTML / 'index.html').relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
