"""Programs whose values have to be carried: names assigned to names, and asserted long after.

    cre = 8
    device = cre
    index = device
    assert index == 8

A line `index = device` does not say its value. Whoever reads it must find the line of `device` and
keep what it finds. A transformer keeps that in the keys and values of the line's tokens and nowhere
else, so an error there is met again by every later line that needs it. Rectification is there to
remove such errors. Running the text checks every value.
"""

import builtins
import keyword
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import require, require_integer
from ..weights.models import Tokenizer
from .measure import shown

DIGITS = 10
DEPTH = 4  # most lines between a name and its digit
UNSEEN = 1  # ends the seeds of evaluations; those of training end otherwise (zeros do not count)
ROOTS = (8, 32)  # fewest and most names that are assigned digits
ROOT_TOKENS, ALIAS_TOKENS, ASSERT_TOKENS = 5, 4, 6  # of `a = 1`, `b = a`, `assert b == 1`
SHORTEST = 2 * ROOTS[0] * ROOT_TOKENS


@dataclass(frozen=True)
class Check:
    """One asserted digit."""

    at: int  # its position in the program's tokens
    assigned: int  # the position after which the name's value can be known: its line's last but one
    depth: int  # lines between the name and a digit: 0 for `a = 1`, 1 for `b = a`, …


@dataclass(frozen=True)
class Program:
    """Tokens of a program, cut to length, and where they assert what."""

    tokens: list[int]
    checks: list[Check]


@dataclass(frozen=True)
class Words:
    """The tokens that programs are made of."""

    names: tuple[tuple[int, int], ...]  # each at a line's beginning, and after a space
    digits: tuple[int, ...]
    equals: int
    space: int
    newline: int
    asserts: int
    compares: int


@lru_cache(maxsize=8)
def words(tokenizer: Tokenizer) -> Words:
    """Find names: words of three letters and more that are one token each and mean nothing yet.

    So all lines of a kind have as many tokens. A tokenizer that cuts them otherwise is refused.
    """
    names = []
    for token in range(tokenizer.n_vocab - 1):
        text = tokenizer.decode([token])
        is_word = text.isascii() and text.isalpha() and text.islower() and len(text) >= 3
        if is_word and not keyword.iskeyword(text) and not hasattr(builtins, text):
            alone, spaced = (tokenizer.encode_ordinary(each) for each in (text, f" {text}"))
            names += [(token, spaced[0])] if alone == [token] and len(spaced) == 1 else []
    allowed = f"one with more than {ROOTS[1]}"
    require(len(names) > ROOTS[1], "tokenizer", f"{len(names)} names", allowed)

    def single(text: str) -> int:
        tokens, allowed = tokenizer.encode_ordinary(text), f"one in which {text!r} is one token"
        require(len(tokens) == 1, "tokenizer", f"{len(tokens)} tokens", allowed)
        return tokens[0]

    digits = tuple(single(str(digit)) for digit in range(DIGITS))
    return Words(tuple(names), digits, *map(single, (" =", " ", "\n", "assert", " ==")))


def alias_program(tokenizer: Tokenizer, rng: np.random.Generator, length: int) -> Program:
    """A program of exactly `length` tokens, its last line perhaps cut short.

    `ROOTS` names with digits come first. Then lines that assign a name to a new one and lines that
    assert one are equally frequent, until the new names are about to run out. All names fewer than
    `DEPTH` lines from a digit are equally likely to be assigned, all new names to be asserted; a
    tenth of the asserted ones are roots.
    """
    # Assign digits to the roots.
    require_integer("length", length, SHORTEST)
    w = words(tokenizer)
    order = rng.permutation(len(w.names)).tolist()
    n_roots = int(rng.integers(ROOTS[0], max(ROOTS[0], min(ROOTS[1], length // 24)), endpoint=True))
    values = rng.integers(DIGITS, size=n_roots).tolist()
    depths, assigned = [0] * n_roots, []
    tokens: list[int] = []
    checks: list[Check] = []
    for name, value in zip(order, values, strict=False):
        tokens += [w.names[name][0], w.equals, w.space, w.digits[value], w.newline]
        assigned.append(len(tokens) - 2)

    # The new names have to last for the rest of the text.
    n_new, n_left = len(order) - n_roots, max(1, length - len(tokens))
    asserted = max(0.5, 1 - n_new * (ALIAS_TOKENS + ASSERT_TOKENS) / 2 / n_left)
    readable = list(range(n_roots))  # names that a new one may be assigned to
    draws = iter(rng.random(length).tolist())  # a line takes three at most, and has four tokens
    while len(tokens) < length:
        n = len(values)
        if n == len(order) or (next(draws) < asserted and n > n_roots):
            is_root = n == n_roots or next(draws) < 0.1
            first, count = (0, n_roots) if is_root else (n_roots, n - n_roots)
            chosen = first + int(next(draws) * count)
            tokens += [w.asserts, w.names[order[chosen]][1], w.compares, w.space]
            checks.append(Check(len(tokens), assigned[chosen], depths[chosen]))
            tokens += [w.digits[values[chosen]], w.newline]
        else:
            source = readable[int(next(draws) * len(readable))]
            tokens += [w.names[order[n]][0], w.equals, w.names[order[source]][1], w.newline]
            assigned.append(len(tokens) - 2)
            values.append(values[source])
            depths.append(depths[source] + 1)
            if depths[n] < DEPTH:
                readable.append(n)
    return Program(tokens[:length], [check for check in checks if check.at < length])


def is_checked(w: Words, tokens: Tensor) -> Tensor:
    """Mark digits that a line asserts: tokens [..., T] → bool of that shape."""

    def earlier(n: int) -> Tensor:  # the token n places before; a text begins a line
        return pad(tokens, (n, 0), value=w.newline)[..., :-n]

    line = {1: w.space, 2: w.compares, 4: w.asserts, 5: w.newline}
    is_digit = torch.isin(tokens, torch.tensor(w.digits, device=tokens.device))
    for n, token in line.items():
        is_digit &= earlier(n) == token
    return is_digit


def program_rows(tokenizer: Tokenizer, seed: int, count: int, length: int) -> np.ndarray:
    """`count` programs for training: [count, length] uint16."""
    rows = np.zeros((count, length), dtype=np.uint16)
    for index in shown(range(count), "Writing programs"):
        rows[index] = alias_program(tokenizer, np.random.default_rng((seed, index)), length).tokens
    return rows
