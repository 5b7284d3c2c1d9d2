"""The tokenizer: what it cuts where, that it loses nothing, and that both libraries cut alike."""

import base64
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resa.reference.weights.tokenizer import (
    END_OF_TEXT,
    PATTERN,
    VOCAB_SIZE,
    learn_merges,
    load_tokenizer,
    make_tokenizer,
    merges_of,
    read_ranks,
    save_ranks,
    shipped_ranks,
    train_tokenizer,
)

SHIPPED = load_tokenizer()
SOURCES = sorted((Path(__file__).parents[2] / "reference").rglob("*.py"))
# Text with everything that the pattern names, in any order.
texts = st.one_of(
    st.text(),
    st.text(alphabet=' \t\r\n_aZ09.("#é漢\x00\x0b\x7f\u2028\x85'),
    st.lists(st.sampled_from(["\n", "    ", " ", "__init__", "self", "4821", " == ", "\r\n", '"', "π"])).map("".join),
)


@given(texts)
def test_decoding_undoes_encoding(text):
    assert SHIPPED.decode(SHIPPED.encode_ordinary(text)) == text


@given(texts)
def test_the_pattern_covers_every_character_and_no_token_crosses_a_cut(text):
    pieces = re.findall(PATTERN, text)
    assert "".join(pieces) == text
    alone = [token for piece in pieces for token in SHIPPED.encode_ordinary(piece)]
    assert alone == SHIPPED.encode_ordinary(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("x = 4821", ["x", " =", " ", "4", "8", "2", "1"]),
        ("def f(a):\n    return a", ["def", " f", "(", "a", "):", "\n    ", "return", " a"]),
        ("max_new_tokens", ["max", "_new", "_tokens"]),
        ("__init__(self)", ["__init", "__(", "self", ")"]),
        ("a  # note", ["a", "  ", "#", " note"]),
        ("a\r\n\r\n\tb", ["a", "\r\n\r\n\t", "b"]),
        ("f_1 naïve", ["f", "_", "1", " na", "ï", "ve"]),
        ("a.b_\x0c", ["a", ".", "b", "_", "\x0c"]),
    ],
)
def test_cuts(text, pieces):
    assert re.findall(PATTERN, text) == pieces


@pytest.fixture(scope="module")
def trained():
    """`tokenizers` trained on every second source file, and the same vocabulary in tiktoken."""
    read = [path.read_text() for path in SOURCES[::2]]
    return learn_merges(read, 899, progress=False), make_tokenizer(train_tokenizer(read, 900, progress=False))


def assert_same_segments(trained, text):
    """Both cut into tokens of the same numbers of bytes: `tokenizers` writes one letter for each byte."""
    theirs, ours = trained
    lengths = [len(token) for token in theirs.encode(text, add_special_tokens=False).tokens]
    assert [len(ours.decode_single_token_bytes(token)) for token in ours.encode_ordinary(text)] == lengths
    return lengths


def test_both_libraries_cut_files_alike(trained):
    lengths = [length for path in SOURCES for length in assert_same_segments(trained, path.read_text())]
    assert sum(lengths) > 2 * len(lengths)  # the vocabulary is in use: tokens are longer than two bytes


@given(text=texts)
def test_both_libraries_cut_any_text_alike(trained, text):
    assert_same_segments(trained, text)


def test_training_is_reproducible_and_fills_the_vocabulary(trained):
    read = [path.read_text() for path in SOURCES[::2]]
    ranks = train_tokenizer(iter(read), 900, progress=False)
    assert make_tokenizer(ranks).encode_ordinary(read[0]) == trained[1].encode_ordinary(read[0])
    assert sorted(ranks.values()) == list(range(899))
    assert trained[1].n_vocab == 900


def test_merges_are_read_as_bytes():
    # "a " and "é" are spelled with stand-ins; the commonest pair comes first.
    trained = learn_merges(["é é é é"], 258, progress=False)
    assert merges_of(trained)[0] == ("é".encode()[:1], "é".encode()[1:])
    tabs = learn_merges(["x\n\t\t\n\t\t"], 257, progress=False)
    assert merges_of(tabs) == [(b"\t", b"\t")]


def test_training_refuses_what_cannot_work(monkeypatch):
    with pytest.raises(ValueError, match="vocab_size: got 256; allowed: an integer ≥ 257"):
        train_tokenizer(["abc"], 256, progress=False)
    with pytest.raises(ValueError, match="vocab_size: got 400; allowed: ≤ 260, all that these texts give"):
        train_tokenizer(["abc abc"], 400, progress=False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install tokenizers"):
        train_tokenizer(["abc"], 300, progress=False)


def test_the_shipped_vocabulary():
    assert SHIPPED.n_vocab == VOCAB_SIZE
    assert SHIPPED.encode_single_token(END_OF_TEXT) == VOCAB_SIZE - 1
    # In a document the mark of its end is text like any other.
    assert max(SHIPPED.encode_ordinary(f"x = '{END_OF_TEXT}'")) < VOCAB_SIZE - 1
    source = Path(__file__).read_text()
    assert len(source.encode()) / len(SHIPPED.encode_ordinary(source)) > 2.5  # bytes per token


def test_ranks_are_saved_and_read_afresh(tmp_path):
    path = tmp_path / "ranks"
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    for merge in (b"ab", b"bc"):  # the second file under the same name must not be mistaken for the first
        ranks = {**bytes_only, merge: 256}
        save_ranks(path, ranks)
        assert read_ranks(path) == ranks
        assert load_tokenizer(path).encode_ordinary("abc") == [ranks[piece] for piece in split_once(b"abc", merge)]
    assert [found.name for found in tmp_path.iterdir()] == ["ranks"]


def split_once(text, merge):
    """b"abc", b"bc" -> [b"a", b"bc"]"""
    return [piece for piece in text.partition(merge) if piece]


def encoded(token):
    return base64.b64encode(token).decode()


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (3, "AA== 2 2", r"line 3: must be 'base64 rank', got b'AA== 2 2'"),
        (3, "", r"line 3: must be 'base64 rank'"),
        (3, "A*== 2", r"line 3: b'A\*==' is not base64"),
        (3, "Ag== 3", r"line 3: rank must be 2, got b'3'"),
        (3, "Ag== 02", r"line 3: rank must be 2, got b'02'"),
        (3, "Ag== -2", r"line 3: rank must be 2"),
        (3, "Ag== two", r"line 3: rank must be 2"),
        (3, "AQ== 2", r"line 3: token b'\\x01' is repeated"),
        (3, " 2", r"line 3: token b'' is empty"),
        (257, f"{encoded(b'abc')} 256", r"line 257: token b'abc' does not join two earlier tokens"),
        (256, f"{encoded(b'ab')} 255", r"must hold all 256 single bytes, lacks 1, the first 255"),
    ],
)
def test_malformed_ranks_are_refused_by_line(tmp_path, line, text, message):
    lines = [f"{encoded(bytes([byte]))} {byte}" for byte in range(256)]
    lines[line - 1 : line] = [text]
    path = tmp_path / "ranks"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        read_ranks(path)


def test_ranks_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load_tokenizer(tmp_path / "nowhere")
    assert shipped_ranks().is_file()
