"""The corpus: which files are read, how they are split, and what counts as a copy."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resa.reference.lab.corpus import (
    Document,
    held_out_library,
    is_held_out,
    local_corpus,
    module_name,
    python_files,
    read_source,
    shingles,
    split_documents,
)

HELD_OUT = ["json", "pprint", "secrets", "getopt", "plistlib", "urllib.response", "asyncio.trsock", "xml.etree"]
TRAINED = ["json.decoder", "heapq", "argparse", "asyncio.base_events", "dataclasses", "email.message", "xml.dom"]


# Files and split.


def test_the_side_of_a_module_never_changes():
    assert [name for name in HELD_OUT + TRAINED if is_held_out(name)] == HELD_OUT


def test_the_standard_library():
    corpus = local_corpus()
    train = {document.name: document for document in corpus.train}
    held_out = {document.name: document for document in corpus.held_out}
    assert set(TRAINED) <= set(train)
    assert set(HELD_OUT) <= set(held_out)
    assert not set(train) & set(held_out)
    assert all(is_held_out(name) for name in held_out)
    assert train["heapq"].text == Path(sys.modules["heapq"].__file__).read_text()
    parts = {part for name in (*train, *held_out) for part in name.split(".")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__init__"}
    names = [document.name for document in corpus.train]
    assert names == sorted(names)  # neighbours in a package are neighbours in the stream
    assert held_out_library() == corpus.held_out
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
    (with_packages, without) = (local_corpus(packages=packages) for packages in (True, False))
    found, known = ({d.name for d in (*corpus.train, *corpus.held_out)} for corpus in (with_packages, without))
    assert found - known == {"some_package.module"}
    unread = [corpus.statistics["files_empty_or_not_utf8"] for corpus in (with_packages, without)]
    assert unread[0] == unread[1] + 1


# Copies.


def lines(prefix, count):
    return [f"{prefix}_{index} = {index}" for index in range(count)]


def split(**texts):
    corpus = split_documents([Document(name, text) for name, text in texts.items()])
    return [document.name for document in corpus.train], corpus


@given(st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=30), st.randoms())
def test_shingles_are_the_runs_of_five_lines(rows, random):
    runs = {tuple(rows[i : i + 5]) for i in range(len(rows) - 4)}
    assert len(shingles("\n".join(rows))) == len(runs)
    layout = "".join(" " * random.randrange(9) + row + random.choice(["\n", " \n\n", "\r\n"]) for row in rows)
    assert shingles(layout) == shingles("\n".join(rows))


@pytest.mark.parametrize(
    ("copied", "own", "kept"),
    # Consecutive lines give four shingles fewer. A quarter of 100 is too many, and so are 40 of a large file.
    [(28, 76, True), (29, 75, False), (100, 4, False), (43, 1000, True), (44, 1000, False)],
)
def test_a_copy_of_held_out_text_is_dropped(copied, own, kept):
    text = "\n".join([*lines("held", 300)[:copied], *lines("own", own)])
    names, corpus = split(json="\n".join(lines("held", 300)), heapq=text)
    assert names == (["heapq"] if kept else [])
    assert corpus.statistics["dropped_near_copies"] == (0 if kept else 1)


def test_exact_duplicates_are_kept_once():
    text = "\n".join(lines("own", 20))
    names, corpus = split(heapq=text, argparse=text, dataclasses=text + "\nmore = 1")
    assert names == ["argparse", "dataclasses"]
    assert corpus.statistics["dropped_duplicates"] == 1
