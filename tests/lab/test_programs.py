"""Programs whose values are carried: what they assert holds, and their tokens are the text's."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resa.reference import load_tokenizer
from resa.reference.lab.programs import SHORTEST, alias_program, is_checked, words

TOKENIZER = load_tokenizer()


def program(seed, length):
    return alias_program(TOKENIZER, np.random.default_rng(seed), length)


def solve(text):
    """The values that a program's assertions should have, by running all other lines."""
    scope, values = {}, []
    for line in text.splitlines():
        if line.startswith("assert "):
            values.append(scope[line.split()[1]])
        else:
            exec(line, {"__builtins__": {}}, scope)
    return values


def whole_lines(made):
    """The text, without a last line that was cut short."""
    text = TOKENIZER.decode(made.tokens)
    return text[: text.rindex("\n") + 1]


@given(seed=st.integers(0, 2**32), length=st.integers(SHORTEST, 1500))
@settings(max_examples=40)
def test_running_it_gives_every_value(seed, length):
    made = program(seed, length)
    assert len(made.tokens) == length
    lines = whole_lines(made)
    exec(lines, {})  # every assertion holds
    assert TOKENIZER.encode_ordinary(lines) == made.tokens[: len(TOKENIZER.encode_ordinary(lines))]
    expected = solve(lines)
    stated = [int(TOKENIZER.decode([made.tokens[check.at]])) for check in made.checks]
    assert stated[: len(expected)] == expected
    assert len(stated) - len(expected) in (0, 1)  # a digit without its newline


@given(seed=st.integers(0, 2**32), length=st.integers(SHORTEST, 1000))
@settings(max_examples=20)
def test_checks_say_how_deep_and_how_old_a_value_is(seed, length):
    """Against the text: hops from name to name, and the place of the line that assigns it."""
    made = program(seed, length)
    source, ends, at = {}, {}, 0
    asserted = []
    for line in whole_lines(made).splitlines(keepends=True):
        at += len(TOKENIZER.encode_ordinary(line))
        if found := re.fullmatch(r"(\w+) = (\w+)\n", line):
            assert found[1] not in source  # nothing is assigned twice
            source[found[1]], ends[found[1]] = found[2], at - 2
        else:
            asserted.append((re.fullmatch(r"assert (\w+) == \d\n", line)[1], at - 2))
    for check, (name, place) in zip(made.checks, asserted, strict=False):
        hops = 0
        while not source[name].isdigit():
            name, hops = source[name], hops + 1
        assert (check.at, check.depth) == (place, hops)
    for check, (name, _) in zip(made.checks, asserted, strict=False):
        assert check.assigned == ends[name]


def test_values_are_asked_at_every_depth_and_age():
    checks = [check for seed in range(8) for check in program(seed, 4096).checks]
    depths = np.bincount([check.depth for check in checks])
    assert len(depths) == 5
    assert depths.min() > len(checks) / 40
    ages = np.array([check.at - check.assigned for check in checks])
    assert (ages < 32).mean() < 0.2  # most were assigned before any window that is open
    assert np.median(ages) > 512


def test_what_is_checked_is_found_in_the_tokens():
    made = program(3, 700)
    found = is_checked(words(TOKENIZER), torch.tensor(made.tokens))
    assert found.nonzero()[:, 0].tolist() == [check.at for check in made.checks]
    code = "if len(x) == 2 and index == 10:\n    assert len(x) == len(y), 'message'\n    assert index == 10\n\n"
    code += "    assert index == 1\n    pass\nassert len(x) == 1\nassert index != 2\nindex == 3\n"
    assert not is_checked(words(TOKENIZER), torch.tensor(TOKENIZER.encode_ordinary(code))).any()


def test_rows_of_a_batch_are_looked_at_alone():
    """A row begins a line, whatever stands at the end of the row before."""
    lines = ["assert index == 1\n", "assert index == \n", "xassert index == 2"]
    rows = [TOKENIZER.encode_ordinary(line) for line in lines]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [words(TOKENIZER).space] * (width - len(row)) for row in rows])
    assert is_checked(words(TOKENIZER), tokens).sum(dim=1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("length", [SHORTEST - 1, 200.0])
def test_a_length_that_does_not_fit_is_refused_by_name(length):
    with pytest.raises(ValueError, match="length"):
        program(0, length)


def test_any_tokenizer_that_cuts_lines_alike_will_do():
    """It needs no more than text to tokens and back; one that puts a token before every text is refused."""

    class Other:
        n_vocab = TOKENIZER.n_vocab
        encode_ordinary, decode = staticmethod(TOKENIZER.encode_ordinary), staticmethod(TOKENIZER.decode)

    assert words(Other()) == words(TOKENIZER)
    begins = Other()
    begins.encode_ordinary = lambda text: [0, *TOKENIZER.encode_ordinary(text)]
    with pytest.raises(ValueError, match="tokenizer: got 0 names; allowed: one with more than 32"):
        words(begins)
