"""Training text that every machine with Python already has: Python source code.

The corpus is the standard library and, on request, the installed packages. A file is held out by
its dotted name alone, so every machine and every version of Python holds out the same modules.
Training then loses whatever is nearly a copy of something held out.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
from rich.console import Console
from rich.progress import track

from ..checks import require
from ..weights.tokenizer import END_OF_TEXT

STANDARD_LIBRARY = "standard library"
PACKAGES = "packages"

HELD_OUT_PERCENT = 8
# Distributions differ in whether they ship tests; `_sysconfigdata` describes one machine.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FILES = "_sysconfigdata"

# A shingle is five consecutive lines that are not blank. Unrelated code rarely shares one; a copy
# with scattered edits keeps most of its own.
SHINGLE_LINES = 5
# Largest share of a training file's shingles that may occur in held-out files. Unrelated files
# share a licence header or nothing, vendored and backported copies well over half.
COPY_SHARE = 0.25
# A bundle may swallow a held-out file whole and still be mostly other code, so no training file may
# hold half of any one held-out file. Files with fewer shingles than this are mostly licence.
SWALLOWED_SHARE = 0.5
SWALLOWED_SHINGLES = 40


@dataclass(frozen=True)
class Document:
    """One source file."""

    name: str  # dotted: json.decoder, or json for json/__init__.py
    text: str
    source: str  # STANDARD_LIBRARY or PACKAGES


@dataclass(frozen=True)
class Corpus:
    """Both sides of the split, sorted by source and name: a package's files are neighbours."""

    train: list[Document]
    held_out: list[Document]
    statistics: dict[str, int] = field(default_factory=dict)


def local_corpus(*, packages: bool = False, progress: bool = True) -> Corpus:
    """Read and split the standard library and, with `packages`, the installed packages."""
    # List the files; the first source to reach one names it.
    paths = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    sources = [(STANDARD_LIBRARY, Path(sysconfig.get_path("stdlib")))]
    sources += [(PACKAGES, Path(path)) for path in paths] if packages else []
    found: dict[Path, tuple[str, str]] = {}  # file → name and source
    for source, root in sources:
        for path in python_files(root):
            found.setdefault(path.resolve(), (module_name(path, root), source))

    # Read and split them.
    console = Console(stderr=True)
    shown = track(found.items(), "Reading source files", console=console, disable=not progress)
    documents = [Document(name, read_source(path), source) for path, (name, source) in shown]
    readable = [document for document in documents if document.text.strip()]
    corpus = split_documents(readable, progress=progress)
    corpus.statistics["files_empty_or_not_utf8"] = len(documents) - len(readable)
    return corpus


def held_out_library() -> list[Document]:
    """The standard library's held-out modules, sorted by name: no model trained here read them."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {module_name(path, root): path for path in python_files(root)}
    held_out = sorted(name for name in paths if is_held_out(name))
    documents = [Document(name, read_source(paths[name]), STANDARD_LIBRARY) for name in held_out]
    return [document for document in documents if document.text.strip()]


def python_files(root: Path) -> list[Path]:
    """The sorted *.py files below `root`, without tests, hidden folders and nested packages."""
    found = []
    for folder, subfolders, files in os.walk(root):
        kept = (name for name in subfolders if not name.startswith("."))
        subfolders[:] = [name for name in kept if name not in SKIPPED_FOLDERS]
        python = (name for name in files if name.endswith(".py"))
        found += [Path(folder, name) for name in python if not name.startswith(SKIPPED_FILES)]
    return sorted(found)


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file: json/decoder.py → json.decoder, json/__init__.py → json."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts = parts[:-1] or [root.name]
    return ".".join(parts)


def read_source(path: Path) -> str:
    """The file's text with line ends as \\n; empty if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").replace("\x00", "")
    except UnicodeDecodeError:
        return ""


def is_held_out(name: str) -> bool:
    """Side of the split, from the dotted name alone.

    >>> is_held_out("json.decoder"), is_held_out("json")
    (False, True)
    """
    first_bytes = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(first_bytes, "big") % 100 < HELD_OUT_PERCENT


def split_documents(documents: Sequence[Document], *, progress: bool = True) -> Corpus:
    """Split by name, then drop from training duplicates and near copies of held-out files."""
    documents = sorted(documents, key=lambda document: (document.source, document.name))
    held_out = [document for document in documents if is_held_out(document.name)]
    guarded = [shingles(document.text) for document in held_out]
    guarded_at_all = set().union(*guarded)
    train: list[Document] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    console, title = Console(stderr=True), "Looking for near copies"
    for document in track(documents, title, console=console, disable=not progress):
        if is_held_out(document.name):
            continue
        own = shingles(document.text)
        shared = own & guarded_at_all
        if document.text in seen:
            dropped["duplicates"] += 1
        elif len(shared) >= COPY_SHARE * len(own) or swallows(shared, guarded):
            dropped["near_copies"] += 1
        else:
            train.append(document)
        seen.add(document.text)
    statistics = {f"dropped_{name}": dropped[name] for name in ("duplicates", "near_copies")}
    for side, kept in (("train", train), ("held_out", held_out)):
        statistics[f"{side}_files"] = len(kept)
        statistics[f"{side}_bytes"] = sum(len(document.text.encode()) for document in kept)
    return Corpus(train, held_out, statistics)


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_LINES lines that are not blank; a shorter text is one run."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    starts = range(max(1, len(lines) - SHINGLE_LINES + 1))
    return {hash(tuple(lines[start : start + SHINGLE_LINES])) for start in starts}


def swallows(shared: set[int], guarded: Sequence[set[int]]) -> bool:
    """Tell whether shingles shared with held-out files make up half of any one of these files."""
    least = SWALLOWED_SHARE * SWALLOWED_SHINGLES
    return len(shared) >= least and any(
        len(shared & own) >= SWALLOWED_SHARE * len(own)
        for own in guarded
        if len(own) >= SWALLOWED_SHINGLES
    )


def tokenize(
    documents: Sequence[Document], tokenizer: tiktoken.Encoding, progress: bool = True
) -> np.ndarray:
    """Join all documents into one stream of tokens, `END_OF_TEXT` after each: [n] uint16."""
    end, n_vocab = tokenizer.encode_single_token(END_OF_TEXT), tokenizer.n_vocab
    require(n_vocab <= 2**16, "tokenizer", f"{n_vocab} tokens", f"≤ {2**16}, to fit in uint16")
    pieces = [np.zeros(0, dtype=np.uint16)]
    console = Console(stderr=True)
    for document in track(documents, "Tokenizing", console=console, disable=not progress):
        pieces.append(np.array([*tokenizer.encode_ordinary(document.text), end], dtype=np.uint16))
    return np.concatenate(pieces)
