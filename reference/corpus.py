"""Training text that every machine with Python already has: its own source code, and lookups written as Python.

The corpus is the standard library; on request also the installed packages and any folder the user names. Which side
of the split a file falls on depends on its dotted name alone, so that every machine and every version of Python
holds out the same modules; training then loses whatever is nearly a copy of something held out.

Real code seldom asks a small model to copy from thousands of tokens back. Lookup documents do: names are assigned
values and asserted much later, at distances spread evenly over all scales. Neighbour: `tokenizer.py` knows tokens
but no files; `train.py` draws batches from the arrays made here.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
from rich.console import Console
from rich.progress import track

from .checks import is_integer, require
from .files import write_atomically
from .tokenizer import END_OF_TEXT

STANDARD_LIBRARY = "standard library"
PACKAGES = "packages"

HELD_OUT_PERCENT = 8
# Distributions differ in whether they ship tests; `_sysconfigdata` describes one machine, not Python.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FILES = "_sysconfigdata"

# A shingle is five consecutive lines, blank ones left out: long enough that unrelated code rarely shares one, short
# enough that a copy with scattered edits keeps most of its own.
SHINGLE_LINES = 5
# Share of a training file's shingles that may occur in held-out files. Unrelated files share a licence header or
# nothing; vendored and backported copies share well over half. A quarter lies between the two.
COPY_SHARE = 0.25
# A bundle may swallow a held-out file whole and still be mostly other code, so a training file may not hold half of
# any one held-out file either; files too short for the rule are mostly licence.
SWALLOWED_SHARE = 0.5
SWALLOWED_SHINGLES = 40


@dataclass(frozen=True)
class Document:
    """One source file."""

    name: str  # dotted: json.decoder, or json for json/__init__.py
    text: str
    source: str  # STANDARD_LIBRARY, PACKAGES or the folder as the user named it


@dataclass(frozen=True)
class Corpus:
    """Documents on both sides of the split, sorted by source and name, so that a package's files are neighbours."""

    train: list[Document]
    held_out: list[Document]
    statistics: dict[str, int] = field(default_factory=dict)


def local_corpus(*, packages: bool = False, folders: Sequence[str | os.PathLike] = (), progress: bool = True) -> Corpus:
    """The standard library's source, with `packages` the installed packages', and that of any folders named.

    Errors: FileNotFoundError for a folder that does not exist, ValueError for one without Python files.
    """
    sources = [(STANDARD_LIBRARY, Path(sysconfig.get_path("stdlib")))]
    if packages:
        sources += [(PACKAGES, Path(path)) for path in sorted({sysconfig.get_path(p) for p in ("purelib", "platlib")})]
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"folders: {folder} is not a folder")
        sources.append((os.fspath(folder), Path(folder)))
    found: dict[Path, tuple[str, str]] = {}  # file → name and source; the first source to reach a file names it
    for source, root in sources:
        files = python_files(root)
        require(source in (STANDARD_LIBRARY, PACKAGES) or files, "folders", root, "a folder with *.py files in it")
        for path in files:
            found.setdefault(path.resolve(), (module_name(path, root), source))
    shown = track(found.items(), "Reading source files", console=Console(stderr=True), disable=not progress)
    documents = [Document(name, read_source(path), source) for path, (name, source) in shown]
    readable = [document for document in documents if document.text.strip()]
    corpus = split_documents(readable, progress=progress)
    corpus.statistics["files_empty_or_not_utf8"] = len(documents) - len(readable)
    return corpus


def held_out_library() -> list[Document]:
    """The standard library's held-out modules, sorted by name: text that no model trained here has read."""
    root = Path(sysconfig.get_path("stdlib"))
    named = ((module_name(path, root), path) for path in python_files(root))
    read = (Document(name, read_source(path), STANDARD_LIBRARY) for name, path in named if is_held_out(name))
    return sorted((document for document in read if document.text.strip()), key=lambda document: document.name)


def python_files(root: Path) -> list[Path]:
    """The *.py files below `root` in sorted order, without tests, hidden folders and other people's packages."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(SKIPPED_FILES)]
    return sorted(found)


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file: lib/json/decoder.py below lib → json.decoder, lib/json/__init__.py → json."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts = parts[:-1] or [root.name]
    return ".".join(parts)


def read_source(path: Path) -> str:
    """The file's text with line ends as \\n; empty if it is not UTF-8 (such files are rare, and skipped)."""
    try:
        return path.read_text(encoding="utf-8-sig").replace("\x00", "")
    except UnicodeDecodeError:
        return ""


def is_held_out(name: str) -> bool:
    """Side of the split, from the dotted name alone: the same on every machine, whatever else is in the corpus.

    >>> is_held_out("json.decoder"), is_held_out("json")
    (False, True)
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def split_documents(documents: Sequence[Document], *, progress: bool = True) -> Corpus:
    """Splits by name, then drops from training exact duplicates and near copies of held-out files."""
    documents = sorted(documents, key=lambda document: (document.source, document.name))
    held_out = [document for document in documents if is_held_out(document.name)]
    owners: dict[int, int] = {}  # shingle → the first held-out file that has it
    sizes: list[int] = []  # shingles of each held-out file
    for index, document in enumerate(held_out):
        hashes = shingles(document.text)
        sizes.append(len(hashes))
        for value in hashes.tolist():
            owners.setdefault(value, index)
    train: list[Document] = []
    seen: set[bytes] = set()
    dropped = Counter()
    shown = track(documents, "Looking for near copies", console=Console(stderr=True), disable=not progress)
    for document in (document for document in shown if not is_held_out(document.name)):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            dropped["duplicates"] += 1
        elif is_near_copy(shingles(document.text), owners, sizes):
            dropped["near_copies"] += 1
        else:
            train.append(document)
        seen.add(digest)
    statistics = {
        "train_files": len(train),
        "train_bytes": sum(len(document.text.encode()) for document in train),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(document.text.encode()) for document in held_out),
        "dropped_duplicates": dropped["duplicates"],
        "dropped_near_copies": dropped["near_copies"],
    }
    return Corpus(train, held_out, statistics)


def shingles(text: str) -> np.ndarray:
    """Distinct hashes (uint64) of every run of SHINGLE_LINES lines; shorter texts are one shingle."""
    lines = [zlib.crc32(line.encode()) for line in map(str.strip, text.splitlines()) if line]
    lines += [0] * (SHINGLE_LINES - len(lines))
    hashes = np.array(lines, dtype=np.uint64)
    count = len(hashes) - SHINGLE_LINES + 1
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_LINES):
        # A polynomial in an odd multiplier, wrapping at 64 bits: it depends on the lines' order.
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    return np.unique(total)


def is_near_copy(hashes: np.ndarray, owners: dict[int, int], sizes: Sequence[int]) -> bool:
    """Whether a file shares too much with the held-out files that own the shingles in `owners`."""
    shared = Counter(owners[value] for value in hashes.tolist() if value in owners)
    if shared.total() >= COPY_SHARE * len(hashes):
        return True
    return any(
        sizes[owner] >= SWALLOWED_SHINGLES and count >= SWALLOWED_SHARE * sizes[owner]
        for owner, count in shared.items()
    )


def tokenize(documents: Sequence[Document], tokenizer: tiktoken.Encoding, progress: bool = True) -> np.ndarray:
    """All documents in their order as one stream of tokens, `END_OF_TEXT` after each: [n] uint16."""
    require(tokenizer.n_vocab <= 2**16, "tokenizer", f"{tokenizer.n_vocab} tokens", f"≤ {2**16}, to fit in uint16")
    end = tokenizer.encode_single_token(END_OF_TEXT)
    texts = [document.text for document in documents]
    starts = range(0, len(texts), 256)  # in batches, because Python's lists of tokens are large
    pieces = []
    for start in track(starts, "Tokenizing", console=Console(stderr=True), disable=not progress):
        batch = tokenizer.encode_ordinary_batch(texts[start : start + 256], num_threads=os.cpu_count() or 1)
        pieces += [np.array([*tokens, end], dtype=np.uint16) for tokens in batch]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)


def cached_array(folder: str | os.PathLike, name: str, key: Iterable[bytes], make: Callable[[], np.ndarray]):
    """The array that `make` gives, kept as `folder/name-digest.npy`; the digest of `key` names all that it depends on.

    A changed input changes the name, so a stale array is never read.
    """
    digest = hashlib.sha256()
    for part in key:
        digest.update(len(part).to_bytes(8, "little") + part)
    path = Path(folder) / f"{name}-{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    array = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    return array


# ---- Lookups -------------------------------------------------------------------------------------------------------

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
# Share of lines that assert a value assigned earlier. Below a half on purpose: every assignment is asserted at most
# once, so that its distance is the true one, and were all of them used up, none would be left far back.
USE_SHARE = 0.4
CODE_STRETCH_RATE = 1 / 80  # stretches of real code per line, in documents that have them
CODE_STRETCH_LINES = (10, 60)


def assignments(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Endless pairs of a new identifier and its value as Python writes them: tamiko, 4821 or zelo_bati, "miruka"."""
    taken: set[str] = set()
    while True:
        drawn = rng.integers(len(SYLLABLES), size=(64, 7)).tolist()  # in batches: one draw at a time is slow
        numbers = rng.integers(1000, 10_000, size=64).tolist()
        kinds = rng.integers(4, size=64).tolist()
        for row, number, kind in zip(drawn, numbers, kinds, strict=True):
            a, b, c, d, *word = (SYLLABLES[index] for index in row)
            name = a + b + c if kind % 2 else f"{a}{b}_{c}{d}"
            if name not in taken:
                taken.add(name)
                yield name, str(number) if kind < 2 else f'"{"".join(word)}"'


def lookup_lines(rng: np.random.Generator, code: Sequence[str] = (), far: float = 0.0) -> Iterator[str]:
    """Endless lines `name = value` and, later, `assert name == value`; with `code`, stretches of it in between.

    The distance between the two is log-uniform from one line to all the lines so far: every scale from a few tokens
    to the whole document has the same number of lookups. A share `far` of them is drawn uniformly instead, which
    triples those that reach back more than half of a long document.
    """
    fresh = assignments(rng)
    waiting: list[tuple[int, str, str]] = []  # (line, name, value), assigned and not yet asserted, in order
    line = 0
    while True:
        for kind, scale in rng.random((64, 2)).tolist():
            line += 1
            if code and kind > 1 - CODE_STRETCH_RATE:
                stretch = code_stretch(rng, code)
                line += stretch.count("\n")
                yield stretch
            elif waiting and kind < USE_SHARE:
                distance = line * scale if kind < USE_SHARE * far else line**scale
                target = bisect_left(waiting, (line - round(distance),))
                _, name, value = waiting.pop(min(target, len(waiting) - 1))
                yield f"assert {name} == {value}\n"
            else:
                name, value = next(fresh)
                waiting.append((line, name, value))
                yield f"{name} = {value}\n"


def code_stretch(rng: np.random.Generator, code: Sequence[str]) -> str:
    """Some consecutive lines out of one text of `code`, ended by a newline."""
    lines = code[rng.integers(len(code))].splitlines()
    count = int(rng.integers(*CODE_STRETCH_LINES, endpoint=True))
    start = int(rng.integers(max(0, len(lines) - count), endpoint=True))
    # Stripped, because a line that starts with a space would share a token with the end of the line before it.
    return "\n".join(lines[start : start + count]).strip() + "\n"


def lookup_document(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = (), far: float = 0.0
) -> list[int]:
    """The first `length` tokens of `lookup_lines`."""
    require(is_integer(length, 1), "length", length, "an integer ≥ 1")
    tokens: list[int] = []
    lines = lookup_lines(rng, code, far)
    while len(tokens) < length:
        # Lines never begin with white space, so encoding them in groups gives the tokens of the whole.
        tokens += tokenizer.encode_ordinary("".join(islice(lines, 32)))
    return tokens[:length]


def lookup_documents(
    tokenizer: tiktoken.Encoding,
    seed: int,
    count: int,
    length: int,
    code: Sequence[str] = (),
    far: float = 0.0,
    progress: bool = True,
) -> np.ndarray:
    """`count` lookup documents, of which every second has stretches of `code`: [count, length] uint16."""
    rows = np.zeros((count, length), dtype=np.uint16)
    for index in track(range(count), "Writing lookups", console=Console(stderr=True), disable=not progress):
        rng = np.random.default_rng((seed, index))
        rows[index] = lookup_document(tokenizer, rng, length, code if index % 2 else (), far)
    return rows


def lookup_probe(tokenizer: tiktoken.Encoding, rng: np.random.Generator, distance: int) -> tuple[list[int], list[int]]:
    """One question: a prompt that ends in `assert name ==` and, as tokens, the value that name was assigned.

    `distance` counts tokens from the value's assignment to where the answer begins, to within one line. Everything
    between is other assignments, as are a few lines before.
    """
    fresh = assignments(rng)
    name, value = next(fresh)
    question, answer = tokenizer.encode_ordinary(f"assert {name} =="), tokenizer.encode_ordinary(f" {value}")
    start = tokenizer.encode_ordinary("".join(f"{other} = {filler}\n" for other, filler in islice(fresh, 8)))
    between = tokenizer.encode_ordinary(f" {value}\n")
    allowed = f"an integer ≥ {len(between) + len(question)}, the tokens of one line"
    require(is_integer(distance, len(between) + len(question)), "distance", distance, allowed)
    for other, filler in fresh:
        line = tokenizer.encode_ordinary(f"{other} = {filler}\n")
        if len(between) + len(line) + len(question) > distance:
            break
        between += line
    return start + tokenizer.encode_ordinary(f"{name} =") + between + question, answer
