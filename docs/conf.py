"""Settings of the site, for Sphinx. `build_site.py` lays out the source and calls Sphinx with this folder.

Neither the build nor a reader's browser fetches anything. Formulas become MathML while the site is built, and the theme
brings its own fonts and scripts.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import re
import textwrap
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent

project = "resa"
author = "the resa authors"
version = release = installed_version("resa")
extensions = ["myst_nb", "sphinx.ext.autodoc"]
nitpicky = False
highlight_language = "none"  # for fences without a language
suppress_warnings = ["misc.highlighting_failure"]  # examples with an ellipsis in them

myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4  # the anchors that GitHub gives headings
nb_execution_mode = "off"  # run_tutorials.py has executed them
nb_merge_streams = True
nb_code_prompt_show = "Solution"
nb_code_prompt_hide = "Solution"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = "resa"
html_static_path = ["_static"]
html_css_files = ["resa.css"]
html_extra_path = [str(ROOT / "build" / "docs" / "extra")]  # the interactive page's own files
html_copy_source = False
html_permalinks_icon = "link"  # a word, for those who hear the page
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"


def mathml(latex: str, display: str) -> str:
    """Convert a formula to MathML, which browsers draw themselves."""
    return convert(latex, display=display)


def visit_inline_math(translator, node: nodes.math) -> None:
    """Write an inline formula."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_display_math(translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own. It scrolls where it is wider than the page."""
    number = f'<span class="eqno">({html.escape(node["number"])})</span>' if node.get("number") else ""
    anchor = f' id="{node["ids"][0]}"' if node.get("ids") else ""
    translator.body.append(f'<div class="math"{anchor}>{number}{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def docstring_as_rst(lines: list[str]) -> list[str]:
    """Convert the project's docstrings, written to be read in an editor, to the text that Sphinx reads.

    Code marks are doubled. Other marks of reStructuredText are taken literally. Indented lines and examples stay.

    >>> docstring_as_rst(["of `lo` and |v|, w_", "", "    a = b * c", "", ">>> f(1)", "2"])
    ['of ``lo`` and \\\\|v\\\\|, w\\\\_', '', '::', '', '    a = b * c', '', '>>> f(1)', '2']
    """
    result: list[str] = []
    is_example = is_literal = False
    for line in lines:
        is_indented = line.startswith("    ")
        is_example = line.startswith(">>>") or (is_example and bool(line.strip()))
        continues = is_literal and (is_indented or not line.strip())
        if is_indented and not is_literal and (not result or not result[-1].strip()):
            result += ["::", ""]
            is_literal = True
        elif not continues:
            is_literal = False
        result.append(line if is_example or is_literal else escaped(line))
    return result


def escaped(line: str) -> str:
    """Convert one line of prose: double the marks of `code`, keep emphasis, take everything else literally."""
    parts = re.split(r"(`[^`]+`|(?<![\w*])\*[^\s*][^*]*[^\s*]\*(?![\w*]))", line)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = re.sub(r"([\\*|])", r"\\\1", re.sub(r"(?<=\w)_(?!\w)", r"\\_", part))
        elif part.startswith("`"):
            parts[index] = f"`{part}`"
    return "".join(parts)


def field_comments(kind: type) -> dict[str, str]:
    """The source's comment behind each field of a dataclass."""
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    fields = [node for node in ast.parse("\n".join(lines)).body[0].body if isinstance(node, ast.AnnAssign)]
    found = {}
    for node in fields:
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        found[node.target.id] = rest.partition("#")[2].strip()
    return found


def process_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Convert a docstring to reStructuredText. A dataclass also gets a list of its fields with their comments."""
    lines[:] = docstring_as_rst(lines)
    if what == "class" and dataclasses.is_dataclass(obj):
        comments = field_comments(obj)
        lines += ["Fields:", ""]
        for field in dataclasses.fields(obj):
            default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            comment = f": {escaped(comments[field.name])}" if comments.get(field.name) else ""
            lines.append(f"- ``{field.name}: {kind}{default}``{comment}")
        lines.append("")


def add_excerpts(app: Sphinx, page: str, template: str, context: dict, tree: nodes.document | None) -> None:
    """Let the search quote the pages that it finds."""
    if page == "search":
        app.add_js_file("excerpts.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    """Register the hooks above. Sphinx calls this."""
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_display_math, None))
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("html-page-context", add_excerpts)
