"""How many assertions hold in programs that a model writes by itself (free-running, paper, Fig. 1 and Table 1).

Every way of decoding starts from the same prompts, beginnings of programs, and samples with the same random numbers.
What was written is then run line by line; assertions of names that have no value do not count. Nobody corrects a wrong
value or name: as the text goes on, decoding depends more and more on what decoding has put into the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import tiktoken
import torch
from rich.console import Console
from rich.progress import track

from ..cache import Generation
from ..checks import is_integer, require
from ..config import ReSAConfig
from ..generate import generate
from ..model import GPT
from ..programs import UNSEEN, alias_program
from .answers import ways_to_decode
from .statistics import bootstrap_ratio, shares_by_kind, with_intervals

WIDTH = 512  # tokens per point of the curve


@dataclass(frozen=True)
class Line:
    """One line that a program asserts."""

    at: int  # tokens generated before its end
    is_right: bool | None  # None where the name has no value: nobody assigned it, or from a name without one


def asserted_lines(tokenizer: tiktoken.Encoding, prompt: Sequence[int], written: Sequence[int]) -> list[Line]:
    """Run a prompt and what was written after it line by line; a last line without an end does not count."""
    scope: dict[str, str | None] = {}
    found = []
    line: list[int] = []
    newline = tokenizer.encode_single_token("\n")
    for index, token in enumerate([*prompt, *written]):
        line.append(token)
        if token != newline:
            continue
        words = tokenizer.decode(line).split()
        line = []
        if len(words) == 3 and words[1] == "=":
            source = words[2]
            scope[words[0]] = source if source.isdigit() else scope.get(source)
        elif len(words) == 4 and (words[0], words[2]) == ("assert", "==") and index >= len(prompt):
            value = scope.get(words[1])
            found.append(Line(index - len(prompt), None if value is None else words[3] == value))
    return found


@torch.no_grad()
def measure_written(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    n_programs: int,
    n_tokens: int,
    config: ReSAConfig,
    *,
    prompt_tokens: int = 256,
    batch: int = 8,
    seed: int = 0,
    decode: Callable[..., Generation] = generate,
    progress: bool = True,
) -> dict[str, object]:
    """Shares of right assertions, in all and per WIDTH tokens, with 95 % intervals over programs; JSON-ready.

    `decode` is `generate`, or another with its signature. Errors: ValueError before any work starts.
    """
    for name, number in (("n_programs", n_programs), ("n_tokens", n_tokens), ("batch", batch)):
        require(is_integer(number, 1), name, number, "an integer ≥ 1")
    require(is_integer(seed, 0), "seed", seed, "an integer ≥ 0")
    context = model.config.context
    require(prompt_tokens + n_tokens <= context, "n_tokens", n_tokens, f"≤ {context - prompt_tokens}, for the context")
    require(config.interval is not None, "config.interval", None, "an integer: it is compared with never")
    prompts = [
        alias_program(tokenizer, np.random.default_rng((seed, prompt_tokens, index, UNSEEN)), prompt_tokens).tokens
        for index in range(n_programs)
    ]
    ways = ways_to_decode(config)
    marks: dict[str, list[list[Line]]] = {}
    for name in track(ways, "Written programs", console=Console(stderr=True), disable=not progress):
        marks[name] = []
        for start in range(0, n_programs, batch):
            some = prompts[start : start + batch]
            own = [torch.Generator().manual_seed(seed * 100_003 + start + index) for index in range(len(some))]
            texts = decode(model, some, n_tokens, ways[name], temperature=1.0, generator=own).tokens
            marks[name] += [asserted_lines(tokenizer, *pair) for pair in zip(some, texts, strict=True)]
    about = {"programs": n_programs, "tokens_each": n_tokens, "prompt_tokens": prompt_tokens, "seed": seed}
    return {**about, "config": asdict(config), "width": WIDTH, "ways": summarise(marks, n_tokens)}


def summarise(marks: dict[str, list[list[Line]]], n_tokens: int) -> dict[str, dict[str, object]]:
    """Per way: shares per program, averaged, and how far they lie below dense decoding's and decode-only's.

    Differences are of programs with the same prompt and random numbers; `recovered` is the share of what sparse
    decoding loses to decode-only. From the first other token on, two ways write different programs.
    """
    nothing = float("nan")
    share = {
        name: np.array([nothing if (own := share_right(lines)) is None else own for lines in several])
        for name, several in marks.items()
    }
    in_all = np.isfinite(np.stack(list(share.values()))).all(axis=0)  # programs with something to check in every way
    require(bool(in_all.any()), "n_tokens", n_tokens, "more: in no program is there something to check")
    share = {name: own[in_all] for name, own in share.items()}
    to_recover = share["decode-only"] - share["sparse"]
    rows = {}
    for name, own in share.items():
        lost = {"right": own, "below_dense": share["dense"] - own, "below_decode_only": share["decode-only"] - own}
        rows[name] = with_intervals(lost)
        rows[name]["asserted"] = float(np.mean([len(lines) for lines in marks[name]]))
        rows[name]["checked"] = float(np.mean([sum(x.is_right is not None for x in lines) for lines in marks[name]]))
        known = [
            (line.is_right, program, line.at // WIDTH)
            for program, lines in enumerate(marks[name])
            for line in lines
            if line.is_right is not None
        ]
        right, program, stretch = np.array(known, dtype=np.int64).reshape(-1, 3).T
        rows[name] |= shares_by_kind("by_position", right, program, stretch, -(-n_tokens // WIDTH))
        is_told = name not in ("decode-only", "sparse", "dense") and to_recover.mean() > 0
        gained = own - share["sparse"]
        rows[name]["recovered"] = gained.mean() / to_recover.mean() if is_told else None
        rows[name]["recovered_95"] = bootstrap_ratio(gained, to_recover) if is_told else None
    return rows


def share_right(lines: Sequence[Line]) -> float | None:
    """Of the lines whose names have values; None where there are none."""
    known = [line.is_right for line in lines if line.is_right is not None]
    return float(np.mean(known)) if known else None
