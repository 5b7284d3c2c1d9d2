"""Files that no reader ever sees half written, and a fingerprint of the source that wrote them."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader, or a crash, finds the old or the new file.

    On any failure, such as a full disk, the temporary file is removed and the old file stays. A
    killed process may leave its temporary file behind. The name begins with a dot and ends with
    `.tmp`, and nothing reads it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content is on disk before it gets the name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on disk as well; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def as_json(result: Mapping[str, Any]) -> str:
    """Indented JSON in which a list or a mapping of plain values takes one line.

    >>> print(as_json({"f": [8, 32], "rows": [{"kl": 0.5}]}))
    {
     "f": [8, 32],
     "rows": [
      {"kl": 0.5}
     ]
    }
    """
    # A line never breaks inside a string, so a bracket before a break opens a list or a mapping.
    innermost = re.compile(r"([\[{])\n *([^\[\]{}]*?)\n *([\]}])")
    text = json.dumps(result, indent=1)
    return innermost.sub(lambda found: found[1] + re.sub(r"\n *", " ", found[2]) + found[3], text)


def source_digest() -> str:
    """SHA-256 of the source of `resa.reference`: results that share it come from the same code."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
