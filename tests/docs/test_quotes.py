"""Code that a page quotes stands in its file, line for line."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"<!-- not run: quoted from (\S+) -->\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTES = [
    (page.name, path, code)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for path, code in QUOTED.findall(page.read_text(encoding="utf-8"))
]


def stands_in(code, source):
    """True if the lines of `code` follow each other in `source`, all of them indented alike."""
    return any(f"\n{textwrap.indent(code, ' ' * n)}" in f"\n{source}" for n in (0, 4, 8))


@pytest.mark.parametrize(("page", "path", "code"), QUOTES)
def test_quoted_code_is_that_of_the_file(page, path, code):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert stands_in(code, source), f"{page} quotes what {path} does not say:\n{code}"
    first, *rest = code.splitlines(keepends=True)
    assert not stands_in(first + "    pass\n" + "".join(rest), source)


def test_the_schedulers_page_quotes_all_but_its_counters():
    tree = ast.parse((ROOT / "fast" / "vllm" / "scheduler.py").read_text(encoding="utf-8"))
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    code = "".join(code for page, _, code in QUOTES if page == "vllm_scheduler.md")
    quoted = set(re.findall(r"^def (\w+)", code, re.MULTILINE))
    assert methods - quoted == {"_count_sparse", "make_stats"}
