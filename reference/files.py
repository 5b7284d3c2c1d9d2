"""Writing a file so that no reader ever sees half of it, and a name for the source that computed what is in it."""

import hashlib
import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replaces `path` by `content` in one step: readers, and whoever comes after a crash, see the old or the new file.

    On any failure (a full disk, say) the temporary file is removed and the old file stays as it was. A killed
    process may leave its temporary file behind; it begins with a dot and ends with `.tmp`, and nothing reads it.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # a rename lasts only once its folder is on disk; Windows has no such call
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def source_digest() -> str:
    """SHA-256 of this package's source: a result with the same one was computed by the same code."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder).as_posix()).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
