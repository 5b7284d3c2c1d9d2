"""Write the signatures of the API page from the code, for readers of the Markdown; make_tables.py puts them there.

Names and order are those of the directives on the page, which Sphinx replaces by whole docstrings.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parent / "api.md"
DIRECTIVE = re.compile(
    r"^#{2,3} (?P<heading>.+)|^\.\. currentmodule:: (?P<module>.+)"
    r"|^\.\. auto\w+:: (?P<name>\w+)(?:\n +:(?P<option>[\w-]+):(?P<members>.*))?",
    re.MULTILINE,
)
MARKS = ("property", "classmethod", "staticmethod")


def signatures() -> str:
    """Write one block of Python with every name of the page."""
    parts = []
    for heading, module, name, members in documented():
        title = f"# ---- {heading} ({module.__name__})"
        text = stub(getattr(module, name), name, members)
        parts += [text] if title in parts else [title, text]
    text = "\n\n".join(parts)
    return f"<!-- not run: signatures -->\n```python\n{text}\n```"


def documented() -> Iterator[tuple[str, ModuleType, str, list[str] | None]]:
    """Yield heading, package, name and members of every directive; [] are all members, None is no member."""
    heading = module = None
    for found in DIRECTIVE.finditer(PAGE.read_text(encoding="utf-8")):
        if found["heading"]:
            heading = found["heading"]
        elif found["module"]:
            module = importlib.import_module(found["module"])
        else:
            members = re.findall(r"\w+", found["members"]) if found["option"] == "members" else None
            yield heading, module, found["name"], members


def stub(found: object, name: str, members: list[str] | None) -> str:
    """Write a class, a function or a constant without what is in it."""
    if inspect.isclass(found):
        return class_stub(found, members)
    return function_stub(found) if callable(found) else f"{name}: {type(found).__name__}"


def parsed(found: object) -> tuple[list[str], ast.AST]:
    """Read the source of a class or function → its lines and its tree."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(found)))
    return source.splitlines(), ast.parse(source).body[0]


def summary(node: ast.AST) -> str:
    """Write the first sentence of a docstring as a comment."""
    first = re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n", ast.get_docstring(node) or "", maxsplit=1)[0]
    return textwrap.fill(" ".join(first.split()), 100, initial_indent="# ", subsequent_indent="# ")


def function_stub(found: object) -> str:
    """Write a function's head as it stands in the source."""
    lines, node = parsed(found)
    marks = [f"@{each.id}" for each in node.decorator_list if getattr(each, "id", None) in MARKS]
    head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
    return "\n".join([*filter(None, [summary(node)]), *marks, re.sub(r":(\s*#.*)?$", ": ...", head)])


def class_stub(kind: type, members: list[str] | None) -> str:
    """Write a class with its fields and their comments, its constructor, and its methods."""
    lines, node = parsed(kind)
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    text = [summary(node), f"class {node.name}:"]
    text += [line for each in fields for line in lines[each.lineno - 1 : each.end_lineno]]
    for each in node.body if members is not None else []:
        name = getattr(each, "name", "_")
        if name == "__init__" or name in members or not (members or name.startswith("_")):
            found = inspect.getattr_static(kind, name)
            found = getattr(found, "fget", None) or getattr(found, "__func__", found)
            text.append(textwrap.indent(function_stub(found), "    "))
    return "\n".join(text)
