"""The corpus: which files are read, how they are split, and what counts as a copy."""

import inspect
import plistlib
import sys
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import load_tokenizer
from resa.reference.lab import corpus, retrieval
from resa.reference.lab.corpus import (
    Document,
    english_texts,
    example_module,
    held_out_library,
    is_held_out,
    library_texts,
    local_corpus,
    module_name,
    python_files,
    read_documents,
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


# Documents of the evaluations.

TOKENIZER = load_tokenizer()


@pytest.mark.parametrize("kind", corpus.TEXTS)
def test_documents_are_long_disjoint_and_always_the_same(kind):
    """Fewer are the first of them."""
    found = read_documents(kind, TOKENIZER, 8, 8192)
    assert [len(document) for document in found] == [8192] * 8
    assert read_documents(kind, TOKENIZER, 2, 8192) == found[:2]
    joined = [token for document in found for token in document]
    written, text = TOKENIZER.decode(joined), ""
    for each in library_texts(kind):
        text += each
        if len(text) >= len(written):
            break
    assert text.startswith(written)

    # A document does not repeat itself or others: runs of a hundred tokens are there once.
    runs = [tuple(joined[start : start + 100]) for start in range(len(joined) - 99)]
    assert len(set(runs)) > 0.99 * len(runs)


def test_the_example_is_a_module_that_no_model_read(monkeypatch):
    subject, text = example_module()
    assert text == inspect.getsource(plistlib)
    assert is_held_out("plistlib")
    assert "plistlib.py" in subject
    monkeypatch.setattr(corpus, "library", lambda: [Document("json", "x = 1")])
    with pytest.raises(FileNotFoundError, match="this Python has no source of plistlib"):
        example_module()


def test_code_is_first_what_is_held_out_then_the_other_modules(monkeypatch):
    """In either part by name; tables of characters are in neither."""
    names = ["argparse", "encodings.cp037", "heapq", "json", "json.decoder", "pprint", "secrets"]
    monkeypatch.setattr(corpus, "library", lambda: [Document(name, f"{name}\n") for name in names])
    assert list(library_texts("code")) == [
        f"{name}\n" for name in ("json", "pprint", "secrets", "argparse", "heapq", "json.decoder")
    ]


def test_code_holds_no_table_of_characters():
    text = "".join(library_texts("code"))
    by_name = {document.name: document.text for document in held_out_library()}
    assert by_name["plistlib"] in text
    assert any(name.startswith("encodings.") for name in by_name)
    assert all(each not in text for name, each in by_name.items() if name.startswith("encodings."))


def test_english_is_the_language_reference_then_docstrings():
    first, *_, last = islice(english_texts(), len(topics) + 1)
    assert first == topics["assert"]
    assert last not in topics.values()
    assert len(last) >= corpus.LONG_DOCSTRING


def test_a_paragraph_is_read_once(monkeypatch):
    """However its lines are broken."""
    monkeypatch.setattr(corpus, "english_texts", lambda: ["One\ntwo.\n\nThree.\n \nOne two.", "Four.\n\n\nThree."])
    assert "".join(library_texts("english")) == "One\ntwo.\n\nThree.\n\nFour.\n\n"


def test_documents_are_cut_from_joined_texts(monkeypatch):
    monkeypatch.setattr(corpus, "library_texts", lambda kind: ["a b c", " d", " e f g h", " i"])
    words = [TOKENIZER.encode_ordinary("a"), *(TOKENIZER.encode_ordinary(f" {x}") for x in "bcdefghi")]
    tokens = [token for word in words for token in word]
    assert read_documents("code", TOKENIZER, 3, 2) == [tokens[0:2], tokens[2:4], tokens[4:6]]
    assert read_documents("code", TOKENIZER, 1, 7) == [tokens[:7]]
    assert read_documents("code", TOKENIZER, 1, 9) == [tokens[:9]]
    with pytest.raises(ValueError, match="documents: got 5; allowed: ≤ 4, for 2 tokens of code each"):
        read_documents("code", TOKENIZER, 5, 2)


class Opened:
    """A tokenizer that puts a token before every text, as those of Llama 3 do."""

    def encode_ordinary(self, text):
        return [4095, *TOKENIZER.encode_ordinary(text)]


def test_a_token_that_opens_texts_stands_at_the_beginning_alone():
    opened, plain = read_documents("english", Opened(), 3, 201), read_documents("english", TOKENIZER, 3, 200)
    assert opened == [[4095, *document] for document in plain]
    _, asked = retrieval.ask(Opened(), "multi-query", 700, 0)
    assert [at for at, token in enumerate(asked.tokens) if token == 4095] == [0]
    assert all(4095 not in asked.tokens[places.start : places.stop] for places in asked.answers)
    with pytest.raises(ValueError, match="length: got 1; allowed: ≥ 2, for this tokenizer"):
        read_documents("english", Opened(), 1, 1)
