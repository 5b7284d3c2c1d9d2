"""Chats: the text that a model's own template makes of one message.

A template is a program in Jinja's language that comes with the weights. It runs in a sandbox, sees
plain text alone, and is given what transformers gives it, so that both render the same bytes.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from ..checks import refuse
from .pretrained import read_json


def render_chat(template: str, message: str, special_tokens: Mapping[str, str]) -> str:
    """Render one message of a user, and the opening of the answer.

    `special_tokens` are texts by their names in templates, such as `bos_token`.
    Errors: ImportError without the package `jinja2`; ValueError if the template fails.
    """
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        hint = "rendering it takes the package `jinja2`: pip install jinja2"
        raise ImportError(f"chat template: {hint}") from None

    def raise_exception(text: str) -> NoReturn:
        raise TemplateError(text)

    def to_json(value: Any, **how: Any) -> str:  # Jinja's own would escape HTML
        return json.dumps(value, **{"ensure_ascii": False, **how})

    class Generation(Extension):
        """Marks which text is the model's, for training; here it renders what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    given = {"messages": [{"role": "user", "content": message}], "add_generation_prompt": True}
    given |= {"tools": None, "documents": None, **special_tokens}
    try:
        return environment.from_string(template).render(given)
    except Exception as error:  # an expression of the template may raise anything
        refuse(
            "chat template", f"{type(error).__name__}: {error}", "one that takes a user's message"
        )


def folder_special_tokens(folder: Path) -> dict[str, str]:
    """Read the texts of a folder's special tokens, by their names in templates."""
    path = folder / "tokenizer_config.json"
    given = read_json(path) if path.is_file() else {}
    tokens = {name: value for name, value in given.items() if name.endswith("_token")}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
