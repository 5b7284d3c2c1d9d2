"""The corpus: which files are read, how they are split, and what counts as a copy."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import load_tokenizer
from resa.reference.lab.corpus import (
    PACKAGES,
    STANDARD_LIBRARY,
    Document,
    held_out_library,
    is_held_out,
    local_corpus,
    module_name,
    python_files,
    read_source,
    shingles,
    split_documents,
    tokenize,
)
from resa.reference.weights.tokenizer import END_OF_TEXT

HELD_OUT = ["json", "pprint", "secrets", "getopt", "plistlib", "urllib.response", "asyncio.trsock", "xml.etree"]
TRAINED = ["json.decoder", "heapq", "argparse", "asyncio.base_events", "dataclasses", "email.message", "xml.dom"]


@pytest.fixture(scope="module")
def corpus():
    return local_corpus(progress=False)


# ---- Files and split -------------------------------------------------------------------------------------------------


def test_the_side_of_a_module_never_changes():
    assert [name for name in HELD_OUT + TRAINED if is_held_out(name)] == HELD_OUT


def test_the_standard_library(corpus):
    train = {document.name: document for document in corpus.train}
    held_out = {document.name: document for document in corpus.held_out}
    assert set(TRAINED) <= set(train)
    assert set(HELD_OUT) <= set(held_out)
    assert not set(train) & set(held_out)
    assert all(is_held_out(name) for name in held_out)
    assert train["heapq"].text == Path(sys.modules["heapq"].__file__).read_text()
    parts = {part for name in (*train, *held_out) for part in name.split(".")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__init__"}
    assert {document.source for document in (*corpus.train, *corpus.held_out)} == {STANDARD_LIBRARY}
    names = [document.name for document in corpus.train]
    assert names == sorted(names)  # neighbours in a package are neighbours in the stream
    assert held_out_library() == corpus.held_out


def test_statistics_count_what_is_there(corpus):
    assert corpus.statistics["train_files"] == len(corpus.train) > 300
    assert corpus.statistics["held_out_bytes"] == sum(len(d.text.encode()) for d in corpus.held_out)
    assert corpus.statistics["dropped_near_copies"] > 0  # the tables of `encodings`, for one


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_of_a_folder(tmp_path):
    read = ["a.py", "pkg/__init__.py", "pkg/b.py"]
    skipped = ["pkg/test/c.py", ".hidden/d.py", "venv/site-packages/e.py", "pkg/__pycache__/f.py", "note.txt"]
    write(tmp_path, {name: f"value = {index}\n" for index, name in enumerate(read + skipped)})
    assert python_files(tmp_path) == [tmp_path / name for name in read]
    assert [module_name(path, tmp_path) for path in python_files(tmp_path)] == ["a", "pkg", "pkg.b"]
    assert module_name(tmp_path / "__init__.py", tmp_path) == tmp_path.name
    write(tmp_path, {"latin.py": "x = 'é'".encode("latin-1"), "marked.py": b"\xef\xbb\xbfx = 1\r\n\x00"})
    assert read_source(tmp_path / "latin.py") == ""
    assert read_source(tmp_path / "marked.py") == "x = 1\n"


def test_installed_packages_are_read_on_request(monkeypatch, tmp_path):
    files = {"some_package/module.py": "x = 1\n", "some_package/tests/check.py": "y = 1\n", "empty.py": "\n"}
    write(tmp_path, files)
    real = local_corpus.__globals__["sysconfig"].get_path
    monkeypatch.setattr("sysconfig.get_path", lambda name: real(name) if name == "stdlib" else str(tmp_path))
    (with_packages, without) = (local_corpus(packages=packages, progress=False) for packages in (True, False))
    found = [
        {d.name for d in (*corpus.train, *corpus.held_out) if d.source == PACKAGES}
        for corpus in (with_packages, without)
    ]
    assert found == [{"some_package.module"}, set()]
    unread = [corpus.statistics["files_empty_or_not_utf8"] for corpus in (with_packages, without)]
    assert unread[0] == unread[1] + 1


# ---- Copies ----------------------------------------------------------------------------------------------------------


def lines(prefix, count):
    return [f"{prefix}_{index} = {index}" for index in range(count)]


def split(**texts):
    corpus = split_documents([Document(name, text, "here") for name, text in texts.items()], progress=False)
    return [document.name for document in corpus.train], corpus


@given(st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=30), st.randoms())
def test_shingles_are_the_runs_of_five_lines(rows, random):
    runs = {tuple(rows[i : i + 5]) for i in range(len(rows) - 4)}
    assert len(shingles("\n".join(rows))) == len(runs)
    layout = "".join(" " * random.randrange(9) + row + random.choice(["\n", " \n\n", "\r\n"]) for row in rows)
    assert shingles(layout) == shingles("\n".join(rows))


def test_order_makes_a_shingle():
    texts = ("a\nb\nc\nd\ne", "b\na\nc\nd\ne", "a", "b", "a\nb", "b\na")
    assert [len(shingles(text)) for text in texts] == [1] * 6
    assert len(set().union(*map(shingles, texts))) == 6


@pytest.mark.parametrize(("copied", "kept"), [(28, True), (29, False), (100, False)])
def test_a_quarter_of_shared_shingles_makes_a_copy(copied, kept):
    # 100 shingles in the training file; `copied` consecutive lines give copied - 4 shared ones.
    text = "\n".join([*lines("held", 300)[:copied], *lines("own", 104 - copied)])
    names, corpus = split(json="\n".join(lines("held", 300)), heapq=text)
    assert names == (["heapq"] if kept else [])
    assert corpus.statistics["dropped_near_copies"] == (0 if kept else 1)


@pytest.mark.parametrize(
    ("held", "copied", "kept"),
    # Half of 60 shingles is 30, which 34 lines give; a file of 39 shingles is too short for this rule.
    [(64, 33, True), (64, 34, False), (43, 43, True), (44, 24, False)],
)
def test_a_large_file_may_not_swallow_a_held_out_one(held, copied, kept):
    text = "\n".join([*lines("own", 1000), *lines("held", held)[:copied]])
    assert split(json="\n".join(lines("held", held)), heapq=text)[0] == (["heapq"] if kept else [])


def test_exact_duplicates_are_kept_once():
    text = "\n".join(lines("own", 20))
    names, corpus = split(heapq=text, argparse=text, dataclasses=text + "\nmore = 1")
    assert names == ["argparse", "dataclasses"]
    assert corpus.statistics["dropped_duplicates"] == 1


def test_the_stream_holds_every_document_and_its_end():
    documents = [Document(f"m{index}", f"x = {index}\n" * (index % 3 + 1), "here") for index in range(60)]
    tokenizer = load_tokenizer()
    stream = tokenize(documents, tokenizer, progress=False)
    assert stream.dtype == np.uint16
    texts = tokenizer.decode(stream.tolist()).split(END_OF_TEXT)
    assert texts == [document.text for document in documents] + [""]
    assert tokenize([], tokenizer, progress=False).shape == (0,)
