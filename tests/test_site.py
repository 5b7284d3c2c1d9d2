"""Pages, tutorials and the site made from them: links lead somewhere, code runs, names exist, nothing is out of date.

Tests marked `site` look at build/docs/html, with and without a browser; `make docs` builds it and runs them.
"""

import argparse
import ast
import builtins
import functools
import html.parser
import importlib
import inspect
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import jupytext
import pytest

from resa import fast, reference
from resa.fast.bench.cli import add_bench
from resa.fast.cli import BACKENDS
from resa.reference.cli import build_parser

ROOT = Path(__file__).parent.parent
DOCS, SITE, SCREENSHOTS = ROOT / "docs", ROOT / "build" / "docs" / "html", ROOT / "build" / "docs" / "screenshots"
SCRIPTS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
RENDERED = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *RENDERED, ROOT / "tutorials" / "README.md"]
HAND_WRITTEN = [page for page in PAGES if page not in RENDERED]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^(?P<fence>`{3,})(?P<language>[^`\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
GLOSSARY = [
    "active-ratio", "block", "block-bounds", "block-score", "cache", "certified-bound", "conformance-kit",
    "cuda-graph", "decode-only", "dense-attention", "dense-below", "drift", "fused-schedule", "gqa", "group",
    "head-dimension", "interval", "kv-cache", "kv-head", "law", "local-blocks", "log-sum-exp",
    "memory-bandwidth", "min-blocks", "occupancy", "online-softmax", "oracle", "paper-schedule",
    "pending-token", "prefill", "query-head", "rectification", "roofline", "selection", "self-speculation",
    "sparse-attention", "sparse-step", "split-kv", "step-error", "tile", "top-p", "triton", "window",
]  # fmt: skip


def name_of(path):
    """A page's path in the repository, as the name of its test."""
    return str(path.relative_to(ROOT))


@functools.cache
def text_of(page):
    """A page, or the prose of a tutorial's script."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in jupytext.read(page).cells if cell.cell_type == "markdown")


@functools.cache
def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


@functools.cache
def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    found = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        slug = anchor_of(heading)
        found[slug] = found.get(slug, 0) + 1
    return {name if n == 0 else f"{name}-{n}" for name, count in found.items() for n in range(count)}


def anchor_of(heading):
    """Lower case, marks dropped, spaces as hyphens.

    >>> anchor_of("Attend: `_sparse_kernel`, [here](x.md)")
    'attend-_sparse_kernel-here'
    """
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


# ---- Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)
def test_links_lead_to_files_and_headings(page):
    """Those of scripts are relative to docs/tutorials, where their pages lie."""
    folder = DOCS / "tutorials" if page.suffix == ".py" else page.parent
    here = folder / f"{page.stem}.md"
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = Path(os.path.normpath(folder / target)) if target else here
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(path), link


def test_the_readme_leads_to_the_documentation():
    links = LINK.findall(text_of(ROOT / "README.md"))
    assert {"docs/index.md", "tutorials/README.md"} <= set(links)


# ---- Code and commands -----------------------------------------------------------------------------------------------


def blocks(language, pages=HAND_WRITTEN):
    """(page, reason for not running it or None, code) of every fenced block in that language."""
    return [
        (page, found["reason"], found["code"])
        for page in pages
        for found in FENCE.finditer(text_of(page))
        if found["language"].strip() == language
    ]


def test_python_in_the_pages_runs_as_written(tmp_path, monkeypatch):
    """All of a page in one namespace, in a folder with what the pages speak of; README's has a test of its own."""
    (tmp_path / "runs" / "third").mkdir(parents=True)
    assets = Path(reference.__file__).parent / "assets"
    (tmp_path / "runs" / "third" / "model.safetensors").symlink_to(assets / "carrying.safetensors")
    monkeypatch.chdir(tmp_path)
    spaces, ran = {}, 0
    for page, reason, code in blocks("python", [page for page in HAND_WRITTEN if page.name != "README.md"]):
        space = spaces.setdefault(page, {"__name__": page.stem})
        if reason is None:
            exec(compile(code, name_of(page), "exec"), space)
            ran += 1
        else:
            check_without_running(ast.parse(code), space)
    assert ran > 0


def check_without_running(tree, space):
    """What is imported from the project exists, and is called with arguments that it has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "resa":
            exec(compile(ast.Module([node], []), "page", "exec"), space)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in space:
            options = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(space[node.func.id]).bind(*node.args, **options)


def test_calls_of_blocks_that_are_not_run_are_checked():
    code = "from resa.reference import load_pretrained\nload_pretrained('folder', devise='cuda')"
    with pytest.raises(TypeError, match="devise"):
        check_without_running(ast.parse(code), {})


def commands(text):
    """Command lines of a shell block: comments, assignments, continued lines and $options resolved.

    >>> commands('o="--a 1"\\nresa x $o \\\\\\n  --b  # why')
    ['resa x --a 1   --b']
    """
    lines, values = [], {}
    for line in text.replace("\\\n", "").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        line = re.sub(r"\$(\w+)", lambda match: values.get(match[1], match[0]), line)
        if assigned := re.fullmatch(r"(\w+)=\"(.*)\"", line):
            values[assigned[1]] = assigned[2]
        elif line:
            lines.append(line)
    return lines


def said_commands(page):
    """(command, whether it is a whole one) of shell blocks, of blocks without a language, and of code within prose."""
    for found in FENCE.finditer(text_of(page)):
        language = found["language"].strip()
        if language in ("sh", ""):
            yield from ((line, language == "sh") for line in commands(found["code"]))
    yield from ((code, False) for code in re.findall(r"`([^`\n]+)`", prose(page)))


PARSER = build_parser(BACKENDS, [add_bench])


def subparsers(parser):
    """The commands of a parser by name, none for one without commands."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


@pytest.mark.parametrize("page", [*HAND_WRITTEN, *SCRIPTS], ids=name_of)
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command, is_whole in said_commands(page):
        for made in re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)", command):
            assert made in targets, command
        words = shlex.split(command) if command.startswith("resa ") else []
        for script in re.findall(r"^python (\S+\.py)", command):
            assert (ROOT / script).exists(), command
        if not words:
            continue
        parser, rest = PARSER, words[1:]
        while (names := subparsers(parser)) and rest and not rest[0].startswith("-"):
            assert rest[0] in names, command
            parser, rest = names[rest[0]], rest[1:]
        options = {word for word in rest if word.startswith("--")}
        assert options <= parser._option_string_actions.keys(), command
        if is_whole:
            PARSER.parse_args(words[1:])


def test_a_wrong_command_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    for wrong in ("`resa generat`", "`resa demo --interval 3`", "`make nothing`"):
        page.write_text(wrong)
        text_of.cache_clear(), prose.cache_clear()
        with pytest.raises(AssertionError):
            test_commands_exist(page)


# ---- Names -----------------------------------------------------------------------------------------------------------


def sources():
    """The Python files that the pages speak of."""
    patterns = ("reference/**/*.py", "fast/**/*.py", "tests/*.py", "tutorials/*.py", "docs/*.py", "docs/examples/*.py")
    return [path for pattern in patterns for path in ROOT.glob(pattern) if path.name != Path(__file__).name]


@functools.cache
def known_names():
    """Every identifier of the source, words of the Makefile, keys of results and of the vectors' manifest."""
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")}
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"[A-Za-z_]\w*", node.value)) if len(node.value) < 80 else set()
    others = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "tests" / "vectors" / "manifest.json"]
    others += DOCS.glob("results/**/*.json")
    return found | set(re.findall(r"[A-Za-z_]\w*", "\n".join(path.read_text(encoding="utf-8") for path in others)))


@functools.cache
def known_calls():
    """Every function and class that the source defines or calls."""
    found = set(dir(builtins))
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Call):
                found.add(getattr(node.func, "id", getattr(node.func, "attr", None)))
    return found


@functools.cache
def known_options():
    """Every option of the command line."""
    found, waiting = {"--help"}, [PARSER]
    while waiting:
        parser = waiting.pop()
        found |= parser._option_string_actions.keys()
        waiting += subparsers(parser).values()
    return found


def resolve(dotted):
    """The object behind `resa.a.b.c`."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


OWNERS = {name: [getattr(reference, name)] for name in reference.__all__ if inspect.isclass(getattr(reference, name))}
OWNERS |= {"config": [reference.ReSAConfig, reference.GPTConfig]}
for file in ("blocks", "attention", "generate", "sampling"):  # as modules: `attention.sparse_attention`
    OWNERS[file] = [
        importlib.import_module(f"resa.{side}.{file}")
        for side in ("reference", "fast")
        if (ROOT / side / f"{file}.py").exists()
    ]


def has(owner, member):
    """Whether a class or module has it; fields without a default are no attributes of their class."""
    return hasattr(owner, member) or member in getattr(owner, "__annotations__", {})


FOREIGN = {"custom_generate", "streamer", "assistant_model", "repetition_penalty", "warp_specialize"}  # of libraries


@pytest.mark.parametrize("page", [*HAND_WRITTEN, *SCRIPTS], ids=name_of)
def test_names_in_code_marks_exist(page):
    """Modules and their members, functions, settings, options; names with an underscore, wherever they come from."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        for dotted in re.findall(r"\bresa\.(?:reference|fast|vectors)[\w.]*\w", code):
            resolve(dotted)
        for called in re.findall(r"(?:^|[(=,]\s*)([A-Za-z_]\w*)\(", code):
            assert called in known_calls(), code
        for name, arguments in re.findall(r"([A-Za-z_]\w*)\(([^()]*)\)", code):
            if name in reference.__all__:
                allowed = inspect.signature(getattr(reference, name)).parameters
                assert set(re.findall(r"(\w+)=", arguments)) <= allowed.keys(), code
        for owner, member in re.findall(r"(?<![\w.])(\w+)\.(\w+)(?![\w/.])", code):
            if owner in OWNERS and member not in ("py", "json"):
                assert any(has(each, member) for each in OWNERS[owner]), code
        for word in re.findall(r"(?<![\w./-])[A-Z][a-z]+\w*[A-Z]\w*(?![\w/])", code):
            assert word in known_calls() | known_names(), code
        for path in re.findall(r"^(?:reference|fast|tests|docs|tutorials)/[\w./]+$", code):
            assert (ROOT / path).exists(), code
        if not re.match(r"(resa|make|python|pytest|pip|apt|git|nvcc) ", code):
            for word in re.findall(r"(?<![\w/.])[A-Za-z]\w*_\w+(?![\w/])", code):
                assert word in known_names() | FOREIGN, code
        for option in re.findall(r"^--[\w-]+", code):
            assert option in known_options(), code


def test_a_wrong_name_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    for wrong in (
        "`resa.reference.prefil`",
        "`block_bound`",
        "`prefil(model)`",
        "`ReSAConfig(ratio=1)`",
        "`--activ-ratio`",
        "`KVCache.comit`",
        "`config.activ_ratio`",
        "`ReSAConfg`",
        "`attention.sparse_attn`",
        "`reference/block.py`",
        "`generate(model, promts=x)`",
    ):
        page.write_text(wrong)
        text_of.cache_clear(), prose.cache_clear()
        with pytest.raises((AssertionError, AttributeError)):
            test_names_in_code_marks_exist(page)


# ---- Glossary and API ------------------------------------------------------------------------------------------------


def entries():
    """(term, definition) of the glossary, in order."""
    _, *parts = re.split(r"^## (.+)\n", text_of(DOCS / "glossary.md"), flags=re.MULTILINE)
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_the_glossary_has_its_terms_in_order_each_with_a_link_on():
    terms = [anchor_of(term) for term, _ in entries()]
    assert terms == sorted(GLOSSARY)
    for term, definition in entries():
        explained, link = definition.rsplit("→", 1)
        assert LINK.search(link), term
        sentences = re.split(r"(?<=[.:)])\s+(?=[A-Z`$])", re.sub(r"\$[^$]*\$", "x", explained).strip())
        assert 1 <= len(sentences) <= 4, term


def test_every_term_is_used_elsewhere():
    others = [page for page in [*HAND_WRITTEN, *SCRIPTS] if page.name != "glossary.md"]
    everything = re.sub(r"[-_\s]+", " ", "\n".join(map(text_of, others))).lower()
    unused = [term for term, _ in entries() if re.sub(r"[-_\s]+", " ", term).lower() not in everything]
    assert not unused


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
    arrow = ["config", "cache", "blocks", "attention", "model", "sampling", "generate", "checkpoint"]
    files = [
        getattr(reference, name).__module__.split(".")[-1] for package, name in api_names() if "fast" not in package
    ]
    places = [arrow.index(file) for file in files if file in arrow]
    assert places == sorted(places)


def takes_tensors():
    """(name, function) of every public function, and method of a public class, that takes tensors."""
    for package in (reference, fast):
        for name in package.__all__:
            found = getattr(package, name)
            inner = vars(found).items() if inspect.isclass(found) else [(None, found)]
            for method, function in inner:
                function = inspect.unwrap(getattr(function, "__func__", function))
                is_public = method is None or not method.startswith("_")
                if is_public and inspect.isfunction(function):
                    kinds = {key: str(kind) for key, kind in function.__annotations__.items() if key != "return"}
                    tensors = [key for key, kind in kinds.items() if re.search(r"(?<!\.)\bTensor\b", kind)]
                    if tensors:
                        yield f"{package.__name__}.{name}" + (f".{method}" if method else ""), function, tensors


# What the API page says once for all functions is enough for these; the first and the last take any shape or length.
LEFT_TO_THE_PAGE = {"active_blocks", "decode_step", "rectify", "sample_token", "check_tokens"}


@pytest.mark.parametrize(("name", "function", "tensors"), [pytest.param(*row, id=row[0]) for row in takes_tensors()])
def test_docstrings_say_shapes_and_errors(name, function, tensors):
    """A shape in brackets, every tensor by name, and for functions how bad input is refused."""
    text = inspect.getdoc(function)
    assert text, name
    assert re.search(r"\[[A-Z][\w·, …:]*\]", text) or function.__name__ == "check_tokens", f"{name}: no shape"
    for tensor in tensors:
        assert re.search(rf"\b{tensor}\b", text), f"{name}: nothing about {tensor}"
    if "." not in function.__qualname__ and function.__name__ not in LEFT_TO_THE_PAGE:
        assert re.search(r"Raises `\w+`", text), f"{name}: no errors"


# ---- Tutorials -------------------------------------------------------------------------------------------------------


def test_every_tutorial_has_its_page_and_its_row():
    names = [script.stem for script in SCRIPTS]
    assert [page.stem for page in RENDERED] == names
    table = text_of(ROOT / "tutorials" / "README.md")
    linked = re.findall(r"\(\.\./docs/tutorials/(\w+)\.md\)", table)
    assert linked == names
    assert re.findall(r"\[\w+\.py\]\((\w+)\.py\)", table) == names


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_tutorials_page_is_the_one_of_its_script(script):
    """Every cell of the script, in order; between them nothing but outputs, figures and marks of folding."""
    page = DOCS / "tutorials" / f"{script.stem}.md"
    rest = text_of(page)
    assert rest.startswith(f"<!-- Written from tutorials/{script.name} by `make tutorials`"), page
    rest = rest.partition("\n")[2]
    between = []
    for cell in jupytext.read(script).cells:
        source = cell.source.strip("\n") if cell.cell_type == "code" else cell.source.strip()
        if source:
            source = f"```python\n{source.rstrip()}\n```" if cell.cell_type == "code" else source
            before, found, rest = rest.partition(f"\n{source}\n")
            assert found, f"{page.name} is older than its script (make tutorials):\n{source[:200]}"
            between.append(before)
            assert not source.startswith("*Solution"), "a solution that is not folded"
            if "hide-cell" in cell.metadata.get("tags", []):
                assert before.rstrip().endswith("<details><summary>Solution</summary>")
    outputs = re.sub(r"^(`{3,})text\n.*?^\1$", "", "\n".join([*between, rest]), flags=re.MULTILINE | re.DOTALL)
    outputs, n_images = re.subn(r"^!\[[^]\n]+\]\(images/\w+\.png\)$", "", outputs, flags=re.MULTILINE)
    assert n_images == len(re.findall(r"^\*Figure", text_of(page), re.MULTILINE)), "a figure without its image"
    outputs = outputs.replace("<details><summary>Solution</summary>", "").replace("</details>", "")
    assert not outputs.strip(), f"{page.name} has what its script has not: {outputs.strip()[:200]}"
    assert not re.search(r"(?<![\w.])/(?:tmp|root|home|usr|work)/", text_of(page)), "a folder of one machine"


def test_images_of_tutorials_exist_are_used_and_are_small():
    there = {path.name: path.stat().st_size for path in (DOCS / "tutorials" / "images").glob("*")}
    used = [name for page in RENDERED for name in re.findall(r"\]\(images/(\w+\.png)\)", text_of(page))]
    assert sorted(there) == sorted(used)
    assert sum(there.values()) <= 1_200_000
    assert all(size <= 100_000 for size in there.values()), there


GOOD = "# %%\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(1)\n"
GOOD += "\n# %% [markdown]\n# *Figure: two.*\n"


@pytest.mark.site
@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (GOOD, None),
        (GOOD + "\n# %%\nassert 1 == 2, 'so it is not'\n", r"99_try.py, code cell 2:[\s\S]*so it is not"),
        (
            GOOD.replace("print(1)", "import sys; print(1, file=sys.stderr)"),
            "99_try.py, code cell 1 prints",
        ),
        (GOOD.replace("*Figure: two.*", "Two."), r"99_try.py, code cell 1: a figure without \*Figure"),
    ],
    ids=["good", "false", "noisy", "no caption"],
)
def test_a_tutorial_that_became_false_is_named(tmp_path, monkeypatch, script, complaint):
    monkeypatch.syspath_prepend(str(DOCS))
    run_tutorials = importlib.import_module("run_tutorials")
    (tmp_path / "99_try.py").write_text(script)
    if complaint is None:
        assert len(run_tutorials.figures(run_tutorials.execute(tmp_path / "99_try.py"))) == 1
    else:
        with pytest.raises(RuntimeError, match=complaint):
            run_tutorials.execute(tmp_path / "99_try.py")


# ---- The built site --------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Links, what is loaded, ids, the title and formulas of an HTML page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.title, self.math = [], [], set(), "", []
        self.open = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        loaded = found.get("href") if tag == "link" and found.get("rel") != "canonical" else found.get("src")
        self.loads += [loaded] if loaded else []
        self.open.append(tag)
        if tag == "math":
            self.math.append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "title" in self.open and "svg" not in self.open:
            self.title += data
        if "math" in self.open:
            self.math[-1] += data


@pytest.fixture(scope="module")
def site():
    """Every page of the built site by its path in it."""
    assert (SITE / "index.html").exists(), "there is no site yet: make docs"
    return {str(path.relative_to(SITE)): Page(path) for path in sorted(SITE.rglob("*.html"))}


@pytest.mark.site
def test_links_within_the_site_resolve(site):
    for name, page in site.items():
        for link in [*page.links, *page.loads]:
            if link.startswith("data:"):
                continue
            if re.match(r"\w+:", link):
                assert link in page.links, f"{name} loads {link} from the network"
                continue
            target, _, anchor = unquote(link).partition("#")
            target = target.partition("?")[0]
            path = Path(os.path.normpath(SITE / Path(name).parent / target)) if target else SITE / name
            assert path.is_file(), f"{name}: {link}"
            if anchor and path.suffix == ".html":
                assert anchor in site[str(path.relative_to(SITE))].ids, f"{name}: {link}"


@pytest.mark.site
def test_every_page_is_in_the_site(site):
    for page in DOCS.glob("*.md"):
        assert f"{page.stem}.html" in site
    for script in SCRIPTS:
        assert f"tutorials/{script.stem}.html" in site
    for package, name in api_names():
        assert f"{package}.{name}" in site["api.html"].ids
    assert {"../play.html", "../index.html"} <= set(site["play/index.html"].links), "no way back"


@pytest.mark.site
def test_formulas_are_mathml_without_remains(site):
    assert len(site["algorithm.html"].math) > 20
    for name, page in site.items():
        for formula in page.math:
            assert formula.strip(), name
            assert "\\" not in formula, f"{name}: {formula.strip()}"
        text = re.sub(
            r"<(pre|code|script|math|title)\b.*?</\1>", "", (SITE / name).read_text(encoding="utf-8"), flags=re.S
        )
        if not name.startswith("repository/"):
            assert not re.search(r"\$\$|\\(frac|sum|mathrm|max|bar)\b", re.sub(r"<[^>]*>", "", text)), name


@pytest.fixture
def visit(site, browser):
    """Open pages at a width and collect what goes wrong on them."""
    contexts = []

    def opened(width, height):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("request", lambda request: wrong.append(f"asked: {request.url}") if is_remote(request.url) else None)
        return SimpleNamespace(page=page, wrong=wrong)

    yield opened
    for context in contexts:
        context.close()


def is_remote(url):
    """Whether a request leaves the machine's disk."""
    return not url.startswith(("file:", "data:", "blob:", "about:"))


SHOWN = ("index", "algorithm", "api", "evidence", "glossary", "tutorials/index", "tutorials/01_cache", "play")


@pytest.mark.site
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_pages_in_a_browser(site, visit, width, height):
    """No error, no request that fails or leaves the disk, nothing wider than the screen, formulas with a size."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    opened = visit(width, height)
    for name, parsed in site.items():
        if name.startswith("play/"):
            continue  # a page of its own
        opened.page.goto((SITE / name).as_uri())
        assert not opened.wrong, f"{name}: {opened.wrong}"
        assert opened.page.title().strip() == parsed.title.strip()
        assert "resa" in parsed.title, name
        wide = opened.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide"
        sizes = opened.page.evaluate("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width)")
        assert len(sizes) == len(parsed.math), name
        if name.removesuffix(".html") in SHOWN:
            file = f"{name.removesuffix('.html').replace('/', '_')}_{width}.png"
            opened.page.screenshot(path=SCREENSHOTS / file, full_page=name != "api.html")
        is_folded = "[...document.querySelectorAll('math')].filter(m => m.closest('details:not([open])')).length"
        assert sum(size > 0 for size in sizes) >= len(sizes) - opened.page.evaluate(is_folded), name


@pytest.mark.site
def test_solutions_unfold(site, visit):
    with_solution = [name for name in site if name.startswith("tutorials/") and "Solution" in (SITE / name).read_text()]
    assert with_solution
    opened = visit(1280, 800)
    opened.page.goto((SITE / with_solution[0]).as_uri())
    folded = opened.page.locator("details.hide").first
    code = folded.locator("pre").first
    assert not code.is_visible()
    folded.locator("summary").click()
    assert code.is_visible()


@pytest.mark.site
def test_search_finds(site, visit):
    opened = visit(1280, 800)
    opened.page.goto(f"{(SITE / 'search.html').as_uri()}?q=rectification")
    opened.page.wait_for_selector("#search-results li a", timeout=20_000)
    assert not opened.wrong


@pytest.mark.site
def test_titles_differ(site):
    titles = [page.title for name, page in site.items() if not name.startswith("play/")]
    assert len(set(titles)) == len(titles)
