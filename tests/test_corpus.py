"""The corpus: which files are read, how they are split, what counts as a copy; and what lookup documents promise."""

import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resa.reference.corpus import (
    PACKAGES,
    STANDARD_LIBRARY,
    Document,
    assignments,
    cached_array,
    is_held_out,
    local_corpus,
    lookup_document,
    lookup_documents,
    lookup_lines,
    lookup_probe,
    module_name,
    shingles,
    split_documents,
    tokenize,
)
from resa.reference.tokenizer import END_OF_TEXT, load_tokenizer

TOKENIZER = load_tokenizer()
HELD_OUT = ["json", "pprint", "secrets", "getopt", "plistlib", "urllib.response", "asyncio.trsock", "xml.etree"]
TRAINED = ["json.decoder", "heapq", "argparse", "asyncio.base_events", "dataclasses", "email.message", "xml.dom"]


@pytest.fixture(scope="module")
def corpus():
    return local_corpus(progress=False)


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- Files and split -----------------------------------------------------------------------------------------------


def test_the_side_of_a_module_never_changes():
    assert [name for name in HELD_OUT + TRAINED if is_held_out(name)] == HELD_OUT


def test_about_eight_percent_are_held_out():
    share = sum(is_held_out(f"package.module_{index}") for index in range(10_000)) / 10_000
    assert share == pytest.approx(0.08, abs=0.01)  # 3.7 standard deviations


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


def test_statistics_count_what_is_there(corpus):
    assert corpus.statistics["train_files"] == len(corpus.train) > 300
    assert corpus.statistics["held_out_bytes"] == sum(len(d.text.encode()) for d in corpus.held_out)
    assert corpus.statistics["dropped_near_copies"] > 0  # the tables of `encodings`, for one


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def named(corpus, source):
    return sorted(d.name for d in (*corpus.train, *corpus.held_out) if d.source == source)


def test_folders(tmp_path):
    read = ["a.py", "pkg/__init__.py", "pkg/b.py"]
    skipped = ["pkg/test/c.py", ".hidden/d.py", "venv/site-packages/e.py", "pkg/__pycache__/f.py", "note.txt"]
    write(tmp_path, {name: f"value = {index}\n" for index, name in enumerate(read + skipped)})
    write(tmp_path, {"latin.py": "x = 'é'".encode("latin-1"), "empty.py": "\n"})
    corpus = local_corpus(folders=[tmp_path], progress=False)
    assert named(corpus, str(tmp_path)) == ["a", "pkg", "pkg.b"]
    without = local_corpus(progress=False).statistics["files_empty_or_not_utf8"]
    assert corpus.statistics["files_empty_or_not_utf8"] == without + 2


def test_a_file_reached_twice_is_read_once(tmp_path):
    write(tmp_path, {"pkg/a.py": "a = 1\n", "pkg/b.py": "b = 2\n"})
    corpus = local_corpus(folders=[tmp_path, tmp_path / "pkg"], progress=False)
    assert named(corpus, str(tmp_path)) == ["pkg.a", "pkg.b"]
    assert named(corpus, str(tmp_path / "pkg")) == []


def test_installed_packages_are_read_on_request(monkeypatch, tmp_path):
    write(tmp_path, {"some_package/module.py": "x = 1\n", "some_package/tests/check.py": "y = 1\n"})
    real = local_corpus.__globals__["sysconfig"].get_path
    monkeypatch.setattr("sysconfig.get_path", lambda name: real(name) if name == "stdlib" else str(tmp_path))
    assert named(local_corpus(packages=True, progress=False), PACKAGES) == ["some_package.module"]
    assert named(local_corpus(progress=False), PACKAGES) == []


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folders: .*nowhere is not a folder"):
        local_corpus(folders=[tmp_path / "nowhere"], progress=False)
    with pytest.raises(ValueError, match=r"folders: got .*; allowed: a folder with \*.py files in it"):
        local_corpus(folders=[tmp_path], progress=False)


def test_module_names():
    root = Path("lib")
    assert module_name(root / "json" / "decoder.py", root) == "json.decoder"
    assert module_name(root / "json" / "__init__.py", root) == "json"
    assert module_name(root / "__init__.py", root) == "lib"


# ---- Copies --------------------------------------------------------------------------------------------------------


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
    assert shingles(layout).tolist() == shingles("\n".join(rows)).tolist()


def test_order_makes_a_shingle():
    short = [shingles(text).tolist() for text in ("a\nb\nc\nd\ne", "b\na\nc\nd\ne", "a", "b", "a\nb", "b\na")]
    assert [len(hashes) for hashes in short] == [1] * 6
    assert len({hashes[0] for hashes in short}) == 6


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


# ---- Arrays --------------------------------------------------------------------------------------------------------


def test_the_stream_holds_every_document_and_its_end():
    documents = [Document(f"m{index}", f"x = {index}\n" * (index % 3 + 1), "here") for index in range(600)]
    stream = tokenize(documents, TOKENIZER, progress=False)
    assert stream.dtype == np.uint16
    texts = TOKENIZER.decode(stream.tolist()).split(END_OF_TEXT)
    assert texts == [document.text for document in documents] + [""]
    assert tokenize([], TOKENIZER, progress=False).shape == (0,)


def test_an_array_is_made_once_for_each_key(tmp_path):
    made = []

    def make():
        made.append(True)
        return np.arange(len(made), dtype=np.uint16)

    first = cached_array(tmp_path / "new", "tokens", [b"a", b"bc"], make)
    again = cached_array(tmp_path / "new", "tokens", [b"a", b"bc"], make)
    assert first.tolist() == again.tolist() == [0]
    assert cached_array(tmp_path / "new", "tokens", [b"ab", b"c"], make).tolist() == [0, 1]  # not the same key


# ---- Lookups -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(64, 3000))
def test_every_assertion_in_a_lookup_document_holds(seed, length):
    tokens = lookup_document(TOKENIZER, rng(seed), length)
    assert len(tokens) == length
    text = TOKENIZER.decode(tokens)
    assert TOKENIZER.encode_ordinary(text) == tokens  # tokens of the text as a whole
    complete = text[: text.rindex("\n") + 1]
    exec(complete, names := {})  # AssertionError or NameError if a use differs from its assignment
    assert sum(name != "__builtins__" for name in names) == complete.count(" = ")  # no name is assigned twice
    again = lookup_document(TOKENIZER, rng(seed), length)
    assert again == tokens


def test_an_assertion_can_fail():
    with pytest.raises(AssertionError):
        exec("tamiko = 4821\nassert tamiko == 4822\n", {})


def test_uses_are_plenty_and_their_distances_cover_every_scale():
    counts = np.zeros(10, dtype=int)
    total = uses = 0
    for seed in range(30):
        assigned = {}
        for line, text in enumerate(islice(lookup_lines(rng(seed)), 1024)):
            total += 1
            if text.startswith("assert "):
                distance = line - assigned.pop(text.split()[1])  # each name is used once: KeyError otherwise
                counts[int(np.log2(distance))] += 1
                uses += 1
            else:
                assigned[text.split()[0]] = line
    assert uses / total == pytest.approx(0.4, abs=0.02)
    # Every octave from one line to half the document has its share; a uniform spread would leave the first with 0.1 %.
    assert (counts[:8] > 0.04 * uses).all()
    assert counts[8:].sum() > 0.02 * uses


def test_names_are_distinct_identifiers_and_values_literals():
    pairs = list(islice(assignments(rng()), 5000))
    names, values = zip(*pairs, strict=True)
    assert len(set(names)) == 5000
    assert all(name.isidentifier() for name in names)
    kinds = {type(eval(value)) for value in values}
    assert kinds == {int, str}


def test_stretches_of_code_stand_between_lookups():
    marker = ["    marker = 1", "", "def marked():", "    return marker"] * 30
    plain = "".join(islice(lookup_lines(rng(3)), 2000))
    mixed = "".join(islice(lookup_lines(rng(3), ["\n".join(marker)]), 2000))
    assert "marker" not in plain
    share = mixed.count("mark") / mixed.count("\n")
    assert 0.1 < share < 0.6
    values = dict(re.findall(r"^(\w+) = (\S+)$", mixed, re.MULTILINE))
    uses = re.findall(r"^assert (\w+) == (\S+)$", mixed, re.MULTILINE)
    assert len(uses) > 500
    assert all(values[name] == value for name, value in uses)


def test_code_never_shifts_the_tokens():
    code = ["  indented\n\n\n   more\n", "\n\n", "x"]
    for seed in range(20):
        tokens = lookup_document(TOKENIZER, rng(seed), 1500, code)
        assert TOKENIZER.encode_ordinary(TOKENIZER.decode(tokens)) == tokens


def test_rows_depend_on_seed_and_index_alone():
    code = ["def unmistakable():\n    pass\n"]
    rows = lookup_documents(TOKENIZER, 5, 4, 8000, code, progress=False)
    assert rows.dtype == np.uint16
    assert rows.shape == (4, 8000)
    assert (lookup_documents(TOKENIZER, 5, 2, 8000, code, progress=False) == rows[:2]).all()
    assert not (lookup_documents(TOKENIZER, 6, 4, 8000, code, progress=False) == rows).all(axis=1).any()
    assert ["unmistakable" in TOKENIZER.decode(row.tolist()) for row in rows] == [False, True, False, True]


@given(st.integers(0, 2**32), st.integers(32, 3000))
def test_a_probe_asks_for_what_was_assigned_that_far_back(seed, distance):
    prompt, answer = lookup_probe(TOKENIZER, rng(seed), distance)
    text, value = TOKENIZER.decode(prompt), TOKENIZER.decode(answer)
    *complete, question = text.split("\n")
    name = re.fullmatch(r"assert (\w+) ==", question)[1]
    assigned = [line for line in complete if line.startswith(f"{name} =")]
    assert assigned == [f"{name} ={value}"]
    assert all(re.fullmatch(r'\w+ = (\d{4}|"[a-z]+")', line) for line in complete)
    assert TOKENIZER.encode_ordinary(text + value) == prompt + answer
    before = TOKENIZER.encode_ordinary(text[: text.index(assigned[0])] + f"{name} =")
    real = len(prompt) - len(before)
    longest_line = max(len(TOKENIZER.encode_ordinary(line + "\n")) for line in [*complete, "kalumi_motari = 4821"])
    assert distance - longest_line - 8 <= real <= distance


def test_a_probe_refuses_a_distance_below_one_line():
    with pytest.raises(ValueError, match="distance: got 3; allowed: an integer ≥"):
        lookup_probe(TOKENIZER, rng(), 3)
    with pytest.raises(ValueError, match="length: got 0"):
        lookup_document(TOKENIZER, rng(), 0)
