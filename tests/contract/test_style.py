"""Prose that a rule can hold: how docstrings begin, and how many comments the reading path has."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [
    path for folder in ("reference", "fast", "tests", "docs", "tutorials") for path in (ROOT / folder).rglob("*.py")
]
READING_PATH = ("config", "blocks", "sketch", "attention", "operations", "cache", "model", "sampling", "generate")
# A docstring begins with a verb or a noun.
WEAK = ("Of ", "What ", "How ", "Whether ", "The same ", "As ")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(tree):
    """(line, text) of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            yield node.body[0], ast.get_docstring(node)


def test_docstrings_begin_with_a_verb_or_a_noun():
    assert len(FILES) > 50
    weak = [
        f"{path.relative_to(ROOT)}:{node.lineno} {text.splitlines()[0]}"
        for path in sorted(FILES)
        for node, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if text.startswith(WEAK)
    ]
    assert weak == []


def lines_of(source):
    """(lines of code, comments on lines of their own); docstrings are neither."""
    prose = set()
    for node, _ in docstrings(ast.parse(source)):
        prose |= set(range(node.lineno, node.end_lineno + 1))
    code, comments = set(), 0
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += token.line.lstrip().startswith("#")
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose), comments


def test_lines_are_counted_right():
    assert lines_of('"""Title."""\n\nx = 1  # not this one\n# this one\ny = (\n    2\n)\n') == (4, 1)


def test_the_reading_path_says_what_its_paragraphs_do():
    counted = [lines_of((ROOT / "reference" / f"{name}.py").read_text(encoding="utf-8")) for name in READING_PATH]
    code, comments = map(sum, zip(*counted, strict=True))
    assert 10 <= 100 * comments / code <= 20, f"{comments} comments on {code} lines of code"
