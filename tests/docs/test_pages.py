"""Pages and tutorials: links lead somewhere, code runs, commands and names exist, nothing is older than its source."""

import argparse
import ast
import builtins
import functools
import importlib
import inspect
import os
import pydoc
import re
import shlex
from pathlib import Path

import pytest

from resa import fast, reference
from resa.fast.bench.cli import add_bench
from resa.fast.cli import BACKENDS
from resa.reference.cli.main import build_parser

jupytext = pytest.importorskip("jupytext", reason="the extra `docs` has jupytext")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCRIPTS = sorted((ROOT / "tutorials").glob("*.py"))
RENDERED = sorted((DOCS / "tutorials").glob("*.md"))
READMES = [ROOT / folder / "README.md" for folder in (".", "reference", "fast", "tutorials")]
HAND_WRITTEN = [*READMES, *sorted(DOCS.glob("*.md"))]
HISTORY = ("log", "changelog")  # these speak of what is gone
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^(?P<fence>`{3,})(?P<language>[^`\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def name_of(page):
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


def text_of(page):
    """A page, or the prose of a tutorial's script."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in jupytext.read(page).cells if cell.cell_type == "markdown")


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def anchor_of(heading):
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


# ---- Links, code and commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*HAND_WRITTEN, *RENDERED, *SCRIPTS], ids=name_of)
def test_links_lead_to_files_and_headings(page):
    """Those of scripts are relative to docs/tutorials, where their pages lie."""
    here = DOCS / "tutorials" / f"{page.stem}.md" if page.suffix == ".py" else page
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = Path(os.path.normpath(here.parent / target)) if target else here
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        headings = re.findall(r"^#{1,6} +(.+?) *$", prose(path), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(anchor_of, headings), link


def check_python(page):
    """Run the Python blocks of a page in one namespace → how many ran. Of the others check imports and arguments."""
    space, ran = {"__name__": page.stem}, 0
    for found in FENCE.finditer(text_of(page)):
        if found["language"].strip() != "python":
            continue
        if found["reason"] is None:
            exec(compile(found["code"], str(page), "exec"), space)
            ran += 1
            continue
        for node in ast.walk(ast.parse(found["code"])):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "resa":
                exec(compile(ast.Module([node], []), str(page), "exec"), space)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in space:
                options = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(space[node.func.id]).bind(*node.args, **options)
    return ran


def test_python_in_the_pages_runs_as_written(tmp_path, monkeypatch):
    """In a folder with what the pages speak of; README's has a test of its own."""
    (tmp_path / "runs" / "third").mkdir(parents=True)
    assets = ROOT / "reference" / "weights" / "assets"
    (tmp_path / "runs" / "third" / "model.safetensors").symlink_to(assets / "carrying.safetensors")
    monkeypatch.chdir(tmp_path)
    assert sum(check_python(page) for page in HAND_WRITTEN[1:]) > 0


def said_commands(page):
    """(command, whether it is a whole one) of shell blocks, of blocks without a language, and of code within prose."""
    for found in FENCE.finditer(text_of(page)):
        language, code = found["language"].strip(), found["code"].replace("\\\n", "")
        for name, value in re.findall(r'^(\w+)="(.*)"$', code, re.MULTILINE):
            code = code.replace(f"${name}", value)
        if language in ("sh", ""):
            yield from ((re.sub(r"(^|\s)#.*$", "", line).strip(), language == "sh") for line in code.splitlines())
    yield from ((code, False) for code in re.findall(r"`([^`\n]+)`", prose(page)))


PARSER = build_parser(BACKENDS, [add_bench])


def subparsers(parser):
    """The commands of a parser by name."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def check_commands(page):
    """Check every command that a page names."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command, is_whole in said_commands(page):
        assert set(re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)", command)) <= targets, command
        assert all((ROOT / script).exists() for script in re.findall(r"^python (\S+\.py)", command)), command
        parser, rest = PARSER, shlex.split(command)[1:] if command.startswith("resa ") else []
        while (names := subparsers(parser)) and rest and not rest[0].startswith("-"):
            assert rest[0] in names, command
            parser, rest = names[rest[0]], rest[1:]
        assert {word for word in rest if word.startswith("--")} <= parser._option_string_actions.keys(), command
        if is_whole and command.startswith("resa "):
            PARSER.parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("page", [page for page in [*HAND_WRITTEN, *SCRIPTS] if page.stem not in HISTORY], ids=name_of)
def test_commands_and_names_exist(page):
    check_commands(page)
    check_names(page)


# ---- Names -----------------------------------------------------------------------------------------------------------


@functools.cache
def known():
    """(names, functions and classes) of the source; names are also those of the Makefile, results and vectors."""
    names, calls = set(), set(dir(builtins))
    folders = ("reference", "fast", "tests", "tutorials", "docs")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")}
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
                names |= {node.value, *re.findall(r"[A-Za-z_]\w*", node.value)}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                calls.add(node.name)
            elif isinstance(node, ast.Call):
                calls.add(getattr(node.func, "id", getattr(node.func, "attr", None)))
    others = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "tests" / "vectors" / "manifest.json"]
    others += DOCS.glob("results/**/*.json")
    return names | set(re.findall(r"[A-Za-z_]\w*", "\n".join(path.read_text() for path in others))), calls


FOREIGN = {"custom_generate", "streamer", "assistant_model", "repetition_penalty", "warp_specialize"}  # of libraries


def check_names(page):
    """Check modules, functions, arguments and options in code marks, and names with an underscore."""
    names, calls = known()
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        for dotted in re.findall(r"\bresa\.(?:reference|fast|vectors)[\w.]*\w", code):
            assert pydoc.locate(dotted) is not None, code
        assert set(re.findall(r"(?:^|[(=,]\s*)([A-Za-z_]\w*)\(", code)) <= calls, code
        for name, arguments in re.findall(r"([A-Za-z_]\w*)\(([^()]*)\)", code):
            if name in reference.__all__:
                allowed = inspect.signature(getattr(reference, name)).parameters
                assert set(re.findall(r"(\w+)=", arguments)) <= allowed.keys(), code
        assert set(re.findall(r"(?<![\w./-])[A-Z][a-z]+\w*[A-Z]\w*(?![\w/])", code)) <= calls | names, code
        for path in re.findall(r"^(?:reference|fast|tests|docs|tutorials)/[\w./]+$", code):
            assert (ROOT / path).exists(), code
        if not re.match(r"(resa|make|python|pytest|pip|apt|git|nvcc) ", code):
            assert set(re.findall(r"(?<![\w/])[A-Za-z]\w*_\w+(?![\w/])", code)) <= names | FOREIGN, code
        assert set(re.findall(r"^--[\w-]+", code)) <= names | {"--help"}, code


WRONG = {
    check_commands: ("`resa generat`", "`resa demo --interval 3`", "`make nothing`"),
    check_names: (
        *("`resa.reference.activ_ratio`", "`ReSAConfg`", "`attention.sparse_attn`", "`reference/block.py`"),
        *("`generate(model, promts=x)`", "`--dense-bellow`"),
    ),
    check_python: (
        "<!-- not run: x -->\n```python\nfrom resa.reference import rectify\nrectify(windw=1)\n```\n",
        "```python\nassert 1 == 2\n```\n",
    ),
}


@pytest.mark.parametrize(("check", "wrong"), [(check, wrong) for check, all_ in WRONG.items() for wrong in all_])
def test_what_is_wrong_would_be_seen(tmp_path, check, wrong):
    page = tmp_path / "page.md"
    page.write_text(wrong)
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        check(page)


# ---- Glossary and API ------------------------------------------------------------------------------------------------


def test_the_glossary_is_in_order_linked_and_used():
    """Each term leads on and occurs outside the glossary; a definition has at most four sentences."""
    _, *parts = re.split(r"^## (.+)\n", text_of(DOCS / "glossary.md"), flags=re.MULTILINE)
    terms = parts[::2]
    assert len(terms) > 40
    assert list(map(anchor_of, terms)) == sorted(map(anchor_of, terms))
    others = [page for page in [*HAND_WRITTEN, *SCRIPTS] if page.name != "glossary.md"]
    everything = re.sub(r"[-_\s]+", " ", "\n".join(map(text_of, others))).lower()
    for term, definition in zip(terms, parts[1::2], strict=True):
        explained, link = definition.rsplit("→", 1)
        assert LINK.search(link), term
        sentences = re.split(r"(?<=[.:)])\s+(?=[A-Z`$])", re.sub(r"\$[^$]*\$", "x", explained).strip())
        assert 1 <= len(sentences) <= 4, term
        assert re.sub(r"[-_\s]+", " ", term).lower() in everything, term


def api_names():
    """(package, name) of the API page, in its order."""
    package, found = None, []
    for line in text_of(DOCS / "api.md").splitlines():
        if line.startswith(".. currentmodule:: "):
            package = line.split()[-1]
        elif documented := re.match(r"\.\. auto(?:class|function|data):: (\w+)", line):
            found.append((package, documented[1]))
    return found


def test_the_api_page_has_every_public_name_in_the_order_of_the_arrow():
    exported = [(package.__name__, name) for package in (reference, fast) for name in package.__all__]
    assert sorted(api_names()) == sorted(exported)
    arrow = ["config", "blocks", "attention", "operations", "cache", "model", "sampling", "generate", "speculate"]
    found = [getattr(reference, name) for package, name in api_names() if "fast" not in package]
    files = [each.__module__.split(".")[-1] for each in found if hasattr(each, "__module__")]
    places = [arrow.index(file) for file in files if file in arrow]
    assert len(places) > 15
    assert places == sorted(places)


def test_docstrings_say_shapes():
    """A public function or method that takes tensors names each of them, and gives a shape in brackets."""
    for package in (reference, fast):
        for name in package.__all__:
            found = getattr(package, name)
            for function in vars(found).values() if inspect.isclass(found) else [found]:
                function = inspect.unwrap(getattr(function, "__func__", function))
                if not inspect.isfunction(function) or function.__name__.startswith("_"):
                    continue
                kinds = function.__annotations__.items()
                tensors = [key for key, kind in kinds if re.search(r"\bTensor\b", str(kind)) and key != "return"]
                text = inspect.getdoc(function) or ""
                assert all(re.search(rf"\b{tensor}\b", text) for tensor in tensors), function.__qualname__
                has_shape = re.search(r"\[[A-Z1][\w·, …:]*\]", text)
                assert not tensors or has_shape, function.__qualname__


# ---- Tutorials -------------------------------------------------------------------------------------------------------


def test_every_tutorial_has_its_page_and_its_row():
    names = [script.stem for script in SCRIPTS]
    assert [page.stem for page in RENDERED] == names
    table = text_of(ROOT / "tutorials" / "README.md")
    assert re.findall(r"\(\.\./docs/tutorials/(\w+)\.md\)", table) == names
    assert re.findall(r"\[\w+\.py\]\((\w+)\.py\)", table) == names


def test_the_table_of_tutorials_says_how_long_they_are(monkeypatch):
    """In minutes to read, as the program that executes them counts them."""
    monkeypatch.syspath_prepend(str(DOCS))
    minutes = importlib.import_module("run_tutorials").reading_minutes
    told = re.findall(r"/(\w+)\.md\).*?\| (\d+) min \| \d+ s \|", text_of(ROOT / "tutorials" / "README.md"))
    assert [name for name, _ in told] == [script.stem for script in SCRIPTS]
    for script, (_, number) in zip(SCRIPTS, told, strict=True):
        assert minutes(jupytext.read(script)) == pytest.approx(int(number), abs=5), script


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_tutorials_page_is_the_one_of_its_script(script):
    """Every cell of the script, in order; between them nothing but outputs, figures and marks of folding."""
    page = DOCS / "tutorials" / f"{script.stem}.md"
    first, _, rest = text_of(page).partition("\n")
    assert first.startswith(f"<!-- Written from tutorials/{script.name} by `make tutorials`"), page
    between = []
    for cell in jupytext.read(script).cells:
        if not cell.source.strip():
            continue
        is_code = cell.cell_type == "code"
        source = f"```python\n{cell.source.strip(chr(10)).rstrip()}\n```" if is_code else cell.source.strip()
        before, found, rest = rest.partition(f"\n{source}\n")
        assert found, f"{page.name} is older than its script (make tutorials):\n{source[:200]}"
        between.append(before)
        for tag, summary in (("hide-cell", "Solution"), ("hide-input", "Code")):
            is_folded = before.rstrip().endswith(f"<details><summary>{summary}</summary>")
            assert is_folded == (tag in cell.metadata.get("tags", [])), cell.source
    outputs = re.sub(r"^(`{3,})text\n.*?^\1$", "", "\n".join([*between, rest]), flags=re.MULTILINE | re.DOTALL)
    outputs, n_images = re.subn(r"^!\[[^]\n]+\]\(images/\w+\.png\)$", "", outputs, flags=re.MULTILINE)
    assert n_images == len(re.findall(r"^\*Figure", text_of(page), re.MULTILINE)), "a figure without its image"
    outputs = re.sub("<details><summary>(Solution|Code)</summary>|</details>", "", outputs)
    assert not outputs.strip(), f"{page.name} has what its script has not: {outputs.strip()[:200]}"
    assert not re.search(r"(?<![\w.])/(?:tmp|root|home|usr|work)/", text_of(page)), "a folder of one machine"


def test_images_of_tutorials_exist_are_used_and_are_small():
    there = {path.name: path.stat().st_size for path in (DOCS / "tutorials" / "images").glob("*")}
    used = [name for page in RENDERED for name in re.findall(r"\]\(images/(\w+\.png)\)", text_of(page))]
    assert sorted(there) == sorted(used)
    assert sum(there.values()) <= 1_200_000
    assert all(size <= 100_000 for size in there.values()), there
