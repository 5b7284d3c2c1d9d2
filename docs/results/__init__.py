"""Recorded results: what measurements wrote, and what pages and tutorials speak of. They ship with the package."""

import json
from importlib.resources import files


def recorded(name: str) -> dict:
    """Load a file by its name in this folder, such as "ladder.json" or "end_to_end/h100_int4.json"."""
    return json.loads((files(__package__) / name).read_text(encoding="utf-8"))
