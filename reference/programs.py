"""Programs whose values have to be carried: names assigned names, and asserted long after.

    cre = 8
    device = cre
    index = device
    assert index == 8

A line `index = device` does not say which value it stands for; whoever reads it must find the line of `device` and keep
what it finds. In a transformer that is kept in the keys and values of the line's tokens and nowhere else, so an error
there is found again by every later line that needs it. That is what rectification is there for. Running the text checks
every value: it raises AssertionError if one is wrong.

Neighbour: `corpus.py` writes lookups, whose values stand in the text itself.
"""

from __future__ import annotations

import builtins
import keyword
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tiktoken
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .checks import is_integer, require

DIGITS = 10
UNSEEN = 1  # ends the seeds of what models are asked; those of training end otherwise (zeros do not count)
ROOTS = (8, 32)  # fewest and most names that are assigned digits
ROOT_TOKENS, ALIAS_TOKENS, ASSERT_TOKENS = 5, 4, 6  # of the lines `a = 1`, `b = a`, `assert b == 1`
SHORTEST = 2 * ROOTS[0] * ROOT_TOKENS


@dataclass(frozen=True)
class Check:
    """One asserted digit."""

    at: int  # its position in the program's tokens
    assigned: int  # the position of the token after which the name's value can be known: its line's last but one
    depth: int  # lines between the name and a digit: 0 for `a = 1`, 1 for `b = a`, …


@dataclass(frozen=True)
class Program:
    """Tokens of a program, cut to length, and where they assert what."""

    tokens: list[int]
    checks: list[Check]


@dataclass(frozen=True)
class Words:
    """The tokens that programs are made of."""

    names: tuple[tuple[int, int], ...]  # of every name: at a line's beginning, and after a space
    digits: tuple[int, ...]
    equals: int
    space: int
    newline: int
    asserts: int
    compares: int
    line_ends: tuple[int, ...]  # all tokens with a newline in them


@lru_cache(maxsize=8)
def words(tokenizer: tiktoken.Encoding) -> Words:
    """Names are all words of three letters and more that are one token with and without a space, and mean nothing yet.

    So all lines of a kind have as many tokens. Errors: ValueError if the tokenizer cuts lines otherwise.
    """
    names = []
    for token in range(tokenizer.n_vocab - 1):
        text = tokenizer.decode_single_token_bytes(token).decode(errors="replace")
        is_free = not keyword.iskeyword(text) and not hasattr(builtins, text)
        if text.isascii() and text.isalpha() and text.islower() and len(text) >= 3 and is_free:
            spaced = tokenizer.encode_ordinary(f" {text}")
            names += [(token, spaced[0])] if len(spaced) == 1 else []

    require(len(names) > ROOTS[1], "tokenizer", f"{len(names)} names", f"one with more than {ROOTS[1]}")

    def single(text: str) -> int:
        tokens = tokenizer.encode_ordinary(text)
        require(len(tokens) == 1, "tokenizer", tokenizer.name, f"one in which {text!r} is one token")
        return tokens[0]

    parts = [single(text) for text in (" =", " ", "\n", "assert", " ==")]
    ends = (token for token in range(tokenizer.n_vocab - 1) if b"\n" in tokenizer.decode_single_token_bytes(token))
    return Words(tuple(names), tuple(single(str(digit)) for digit in range(DIGITS)), *parts, tuple(ends))


def alias_program(tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, *, depth: int = 4) -> Program:
    """A program of exactly `length` tokens, its last line perhaps cut short; any beginning of it is one too.

    First come `ROOTS` names with digits, then lines that assign a name to a new one and lines that assert one; as many
    of either, until the new names are about to run out. All names that stand fewer than `depth` lines from a digit are
    as likely to be assigned, and all new names to be asserted; a tenth of the asserted ones are roots. Errors:
    ValueError for bad arguments.
    """
    require(is_integer(length, SHORTEST), "length", length, f"an integer ≥ {SHORTEST}")
    require(is_integer(depth, 1), "depth", depth, "an integer ≥ 1")
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
    readable = list(range(n_roots))  # those that a new name may be assigned
    # What is left must do for the new names that are left.
    n_new = len(order) - n_roots
    asserted = max(0.5, 1 - n_new * (ALIAS_TOKENS + ASSERT_TOKENS) / 2 / max(1, length - len(tokens)))
    draws = iter(rng.random(length).tolist())  # at most three per line, which has four tokens and more
    while len(tokens) < length:
        n = len(values)
        if n == len(order) or (next(draws) < asserted and n > n_roots):
            is_root = n == n_roots or next(draws) < 0.1
            chosen = int(next(draws) * n_roots) if is_root else n_roots + int(next(draws) * (n - n_roots))
            tokens += [w.asserts, w.names[order[chosen]][1], w.compares, w.space]
            checks.append(Check(len(tokens), assigned[chosen], depths[chosen]))
            tokens += [w.digits[values[chosen]], w.newline]
        else:
            source = readable[int(next(draws) * len(readable))]
            tokens += [w.names[order[n]][0], w.equals, w.names[order[source]][1], w.newline]
            assigned.append(len(tokens) - 2)
            values.append(values[source])
            depths.append(depths[source] + 1)
            if depths[n] < depth:
                readable.append(n)
    return Program(tokens[:length], [check for check in checks if check.at < length])


def is_checked(w: Words, tokens: Tensor) -> Tensor:
    """Which tokens are what a line asserts, as `8` in `assert index == 8`: tokens [..., T] → bool of that shape.

    All tokens after ` ==` in a line that begins with `assert`, not indented, but for single spaces and the line's end.
    """
    at = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    is_end = torch.isin(tokens, torch.tensor(w.line_ends, device=tokens.device))
    nowhere = torch.full_like(at, -1)
    end = torch.where(is_end, at, nowhere).cummax(dim=-1).values  # the newest line's end, this token included
    compared = torch.where(tokens == w.compares, at, nowhere).cummax(dim=-1).values
    first = tokens.gather(-1, (end + 1).clamp(max=tokens.shape[-1] - 1))  # of the line
    is_bare = (end < 0) | (tokens.gather(-1, end.clamp(min=0)) == w.newline)  # other line ends hold indentation as well
    is_answer = (compared > end) & (at > compared) & (first == w.asserts) & is_bare
    return is_answer & (tokens != w.space)


def program_rows(tokenizer: tiktoken.Encoding, seed: int, count: int, length: int, progress: bool = True) -> np.ndarray:
    """`count` programs for training: [count, length] uint16."""
    rows = np.zeros((count, length), dtype=np.uint16)
    for index in track(range(count), "Writing programs", console=Console(stderr=True), disable=not progress):
        rows[index] = alias_program(tokenizer, np.random.default_rng((seed, index)), length).tokens
    return rows
