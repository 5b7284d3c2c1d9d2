"""The tokenizer: what it cuts where, and that it loses nothing."""

import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import GPT
from resa.reference.weights.tokenizer import END_OF_TEXT, PATTERN, VOCAB_SIZE, load_tokenizer

SHIPPED = load_tokenizer()
# Text with everything that the pattern names, in any order.
texts = st.one_of(
    st.text(),
    st.text(alphabet=' \t\r\n_aZ09.("#é漢\x00\x0b\x7f\u2028\x85'),
    st.lists(st.sampled_from(["\n", "    ", " ", "__init__", "self", "4821", " == ", "\r\n", '"', "π"])).map("".join),
)


@given(texts)
def test_no_character_is_lost_and_no_token_crosses_a_cut(text):
    pieces = re.findall(PATTERN, text)
    assert "".join(pieces) == text
    tokens = SHIPPED.encode_ordinary(text)
    assert SHIPPED.decode(tokens) == text
    assert tokens == [token for piece in pieces for token in SHIPPED.encode_ordinary(piece)]


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


def test_the_shipped_vocabulary():
    assert SHIPPED.encode_single_token(END_OF_TEXT) == VOCAB_SIZE - 1
    # In a document the mark of its end is text like any other.
    assert max(SHIPPED.encode_ordinary(f"x = '{END_OF_TEXT}'")) < VOCAB_SIZE - 1
    source = inspect.getsource(GPT)
    assert len(source.encode()) / len(SHIPPED.encode_ordinary(source)) > 2.5  # bytes per token
