"""Text that every machine with Python already has, for training and for the evaluations.

Training reads source code: the standard library and, on request, the installed packages. A file is
held out by its dotted name alone, so every machine and every version of Python holds out the same
modules. Training then loses whatever is nearly a copy of something held out.

Evaluations read source code, held-out modules first, or English prose, cut into documents.
"""

import ast
import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken

from ..checks import require
from ..weights.models import Tokenizer, encode_onward
from ..weights.tokenizer import END_OF_TEXT
from .measure import shown

HELD_OUT_PERCENT = 8
EXAMPLE = "plistlib"  # held out, 8,000 tokens, in every Python since 2.6
# Distributions differ in whether they ship tests; `_sysconfigdata` describes one machine.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FILES = "_sysconfigdata"

# A shingle is five consecutive lines that are not blank. Unrelated code rarely shares one; a copy
# with scattered edits keeps most of its own.
SHINGLE_LINES = 5
# A training file is a copy if held-out files have so many of its shingles, or such a share of them.
# Unrelated files share a licence header or nothing, vendored and backported copies well over half;
# a bundle may hold a whole held-out file and still be mostly other code.
COPY_SHINGLES = 40
COPY_SHARE = 0.25

TEXTS = ("code", "english")  # what evaluations read
TABLES = "encodings."  # modules that are tables of characters
LONG_DOCSTRING = 1000  # characters


@dataclass(frozen=True)
class Document:
    """One source file."""

    name: str  # dotted: json.decoder, or json for json/__init__.py
    text: str


@dataclass(frozen=True)
class Corpus:
    """Both sides of the split, sorted by name: a package's files are neighbours."""

    train: list[Document]
    held_out: list[Document]
    statistics: dict[str, int] = field(default_factory=dict)


def local_corpus(*, packages: bool = False) -> Corpus:
    """Read and split the standard library and, with `packages`, the installed packages."""
    # List the files; the first folder to reach one names it.
    installed = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    found: dict[Path, str] = {}
    for root in (sysconfig.get_path("stdlib"), *(installed if packages else [])):
        for path in python_files(Path(root)):
            found.setdefault(path.resolve(), module_name(path, Path(root)))

    # Read and split them.
    each = shown(found.items(), "Reading source files")
    documents = [Document(name, read_source(path)) for path, name in each]
    readable = [document for document in documents if document.text.strip()]
    corpus = split_documents(readable)
    corpus.statistics["files_empty_or_not_utf8"] = len(documents) - len(readable)
    return corpus


def library() -> list[Document]:
    """The standard library's modules, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {module_name(path, root): path for path in python_files(root)}
    documents = [Document(name, read_source(paths[name])) for name in sorted(paths)]
    return [document for document in documents if document.text.strip()]


def held_out_library() -> list[Document]:
    """The library's held-out modules, sorted by name: no model trained here read them."""
    return [document for document in library() if is_held_out(document.name)]


def example_module() -> tuple[str, str]:
    """Name and text of a held-out module that every Python has: what the tutorials read."""
    for document in held_out_library():
        if document.name == EXAMPLE:
            return f"the standard library's {EXAMPLE}.py (held out of training)", document.text
    raise FileNotFoundError(f"this Python has no source of {EXAMPLE}")


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


def split_documents(documents: Sequence[Document]) -> Corpus:
    """Split by name, then drop from training duplicates and near copies of held-out files."""
    documents = sorted(documents, key=lambda document: document.name)
    held_out = [document for document in documents if is_held_out(document.name)]
    guarded = set().union(*(shingles(document.text) for document in held_out))
    train: list[Document] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    for document in shown(documents, "Looking for near copies"):
        if is_held_out(document.name):
            continue
        own = shingles(document.text)
        n_shared = len(own & guarded)
        if document.text in seen:
            dropped["duplicates"] += 1
        elif n_shared >= min(COPY_SHINGLES, COPY_SHARE * len(own)):
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


def tokenize(documents: Sequence[Document], tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Join all documents into one stream of tokens, `END_OF_TEXT` after each: [n] uint16."""
    end = tokenizer.encode_single_token(END_OF_TEXT)
    pieces = [np.zeros(0, dtype=np.uint16)]
    for document in shown(documents, "Tokenizing"):
        pieces.append(np.array([*tokenizer.encode_ordinary(document.text), end], dtype=np.uint16))
    return np.concatenate(pieces)


# ---- Documents of the evaluations ----------------------------------------------------------------


def library_texts(kind: str) -> Iterator[str]:
    """Texts of one of TEXTS, in an order that is always the same.

    Code is the library's modules, first those that are held out. English is its language
    reference, then its long docstrings. These repeat each other: a paragraph that was there before
    is left out.
    """
    if kind == "code":
        modules = [each for each in library() if not each.name.startswith(TABLES)]
        yield from (
            each.text for each in sorted(modules, key=lambda each: not is_held_out(each.name))
        )
        return
    seen: set[str] = set()
    for text in english_texts():
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                yield paragraph + "\n\n"


def english_texts() -> Iterator[str]:
    """The topics of Python's own help, then long docstrings, which take seconds to find."""
    from pydoc_data.topics import topics  # half a megabyte

    yield from (topics[name] for name in sorted(topics))
    for path in python_files(Path(sysconfig.get_path("stdlib"))):
        try:
            nodes = ast.walk(ast.parse(read_source(path)))
        except SyntaxError:  # some modules are there to be refused
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        yield from (text for text in found if text and len(text) >= LONG_DOCSTRING)


def read_documents(kind: str, tokenizer: Tokenizer, n: int, length: int) -> list[list[int]]:
    """Cut the joined texts of a kind into the first `n` documents of `length` tokens.

    Documents are disjoint. One may begin and end anywhere in a text, and hold several. Tokens that
    open every text stand at its beginning alone.
    """
    documents: list[list[int]] = []
    left: list[int] = []
    opening = tokenizer.encode_ordinary("")
    n_own = length - len(opening)
    require(n_own >= 1, "length", length, f"≥ {len(opening) + 1}, for this tokenizer")
    for text in library_texts(kind):
        left += encode_onward(tokenizer, text)
        while len(left) >= n_own and len(documents) < n:
            documents.append(opening + left[:n_own])
            left = left[n_own:]
        if len(documents) == n:
            return documents
    allowed = f"≤ {len(documents)}, for {length:,} tokens of {kind} each"
    require(len(documents) == n, "documents", n, allowed)
    return documents
