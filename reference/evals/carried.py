"""How many asserted values a model gets right that it has to carry through what it decodes (paper, Fig. 9, Table 1).

Programs of `programs.py` are decoded along their true text, so that all ways of decoding are asked the same, and every
asserted digit is checked. Lines that assign do not say the value; what the model found stands in keys and values alone.
The loss against dense decoding is split as everywhere: decode-only makes the step error, what else is lost is drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import product

import numpy as np
import tiktoken
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..checks import is_integer, require
from ..config import ReSAConfig
from ..model import GPT
from ..parallel import Score, block_upper_bounds, check_decoding, decode_at_once, exact_stream, pooled_scores
from ..programs import UNSEEN, Program, alias_program
from .selection import in_eight_bits
from .statistics import bootstrap_ratio, shares_by_kind, with_intervals

WIDTH = 512  # tokens per point of the curve along the text


def per_head_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """The largest of the heads' own upper bounds: query [B, Hq, T, D], bounds [B, Hkv, 2, D, M] → [B, Hkv, T, M]."""
    return block_upper_bounds(query.unflatten(1, (bounds.shape[1], -1)), bounds[:, :, None]).amax(dim=2)


def eight_bit_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """Pooled, of bounds rounded outward to 8-bit floats, whose scales are those of the whole text; shapes as above."""
    return pooled_scores(query, in_eight_bits(bounds))


ENDS = ("decode-only", "never")  # no drift, and all of it
SCORES: dict[str, Score] = {"pooled": pooled_scores, "per-head": per_head_scores, "8-bits": eight_bit_scores}


@dataclass(frozen=True)
class Marks:
    """Of every check of some programs, in their order."""

    right: np.ndarray  # [checks] bool
    dense_right: np.ndarray  # [checks] bool, by dense decoding


@dataclass(frozen=True)
class Checks:
    """All checks of all programs that were decoded rather than prefilled, as arrays [checks]."""

    program: np.ndarray  # its index
    at: np.ndarray  # position
    depth: np.ndarray
    age: np.ndarray  # tokens since the value could be known

    @classmethod
    def of(cls, programs: Sequence[Program], prompt_tokens: int) -> Checks:
        rows = [
            (index, check.at, check.depth, check.at - check.assigned)
            for index, program in enumerate(programs)
            for check in program.checks
            if check.at > prompt_tokens  # the token before it is decoded
        ]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)

    def per_program(self, values: np.ndarray) -> np.ndarray:
        """Mean of `values` [checks] over each program's checks: [programs], those with none left out."""
        n = np.bincount(self.program)
        return (np.bincount(self.program, weights=values) / np.maximum(n, 1))[n > 0]


@dataclass(frozen=True)
class Way:
    """One way of decoding."""

    config: ReSAConfig
    score: str = "pooled"  # of SCORES: blocks are selected by it


@torch.no_grad()
def marked(
    model: GPT,
    programs: Sequence[Program],
    checks: Checks,
    ways: Sequence[Way],
    prompt_tokens: int,
    batch: int,
    on_pass: Callable[[], None] = lambda: None,
) -> dict[Way, Marks]:
    """Decode along the programs, which have one length, in every way and mark every check.

    `on_pass` is called after every batch of every way. Errors: ValueError for what can't be decoded at once.
    """
    device = model.embed.weight.device
    right: dict[Way, list[np.ndarray]] = {way: [] for way in ways}
    dense_right = []
    for start in range(0, len(programs), batch):
        tokens = torch.tensor([program.tokens for program in programs[start : start + batch]], device=device)
        own = (checks.program >= start) & (checks.program < start + batch)
        row, at = (torch.from_numpy(each).to(device) for each in (checks.program[own] - start, checks.at[own]))
        exact = exact_stream(model, tokens[:, :-1])
        dense_right.append(likeliest_is_right(model, exact.hidden, tokens, row, at))
        for way, found in right.items():
            hidden = decode_at_once(model, exact, way.config, prompt_tokens, SCORES[way.score])
            found.append(likeliest_is_right(model, hidden, tokens, row, at))
            on_pass()
    dense = np.concatenate(dense_right)
    return {way: Marks(np.concatenate(found), dense) for way, found in right.items()}


def likeliest_is_right(model: GPT, hidden: Tensor, tokens: Tensor, row: Tensor, at: Tensor) -> np.ndarray:
    """Whether the likeliest token is the one at (row, at): hidden [B, T, C], tokens [B, T + 1], row and at [checks]."""
    return (model.output(hidden[row, at - 1]).argmax(dim=-1) == tokens[row, at]).cpu().numpy()


def measure_carried(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    n_programs: int,
    length: int,
    config: ReSAConfig,
    *,
    intervals: Sequence[int],
    ratios: Sequence[float],
    scores: Sequence[str] = ("pooled",),
    prompt_tokens: int = 256,
    batch: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, object]:
    """Shares of right values for every interval, ratio and score, with 95 % intervals over programs; JSON-ready.

    Raises `ValueError` before any work starts.
    """
    for name, number in (("n_programs", n_programs), ("batch", batch)):
        require(is_integer(number, 1), name, number, "an integer ≥ 1")
    require(is_integer(seed, 0), "seed", seed, "an integer ≥ 0")
    known = ", ".join(SCORES)
    require(len(scores) > 0 and set(scores) <= set(SCORES), "scores", list(scores), f"some of {known}")
    require(is_integer(prompt_tokens, 1), "prompt_tokens", prompt_tokens, "an integer ≥ 1")
    context = model.config.context
    fits = is_integer(length, prompt_tokens + 1) and length <= context + 1
    require(fits, "length", length, f"{prompt_tokens + 1} … {context + 1}")
    by_interval = {
        "decode-only": replace(config, interval=1, schedule="paper"),
        "never": replace(config, interval=None),
        **{f: replace(config, interval=f) for f in intervals},
    }
    ways = {
        (score, ratio, name): Way(replace(own, active_ratio=ratio), score)
        for score, ratio, (name, own) in product(scores, ratios, by_interval.items())
    }
    for way in ways.values():
        check_decoding(length - 1, way.config, prompt_tokens)
    programs = [
        alias_program(tokenizer, np.random.default_rng((seed, length, index, UNSEEN)), length)
        for index in range(n_programs)
    ]
    checks = Checks.of(programs, prompt_tokens)
    require(len(checks.at) > 0, "length", length, "more: no value is asserted after the prompt")
    todo = list(dict.fromkeys(ways.values()))
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Carried values", total=len(todo) * -(-n_programs // batch))
        marks = marked(model, programs, checks, todo, prompt_tokens, batch, lambda: bar.advance(task))
    rows = []
    for (score, ratio, name), way in ways.items():
        exact, never = (marks[ways[score, ratio, end]] for end in ENDS)
        row = {"interval": name, "ratio": ratio, "score": score, **summarise(checks, marks[way], exact)}
        for part, where in (("recovered", checks.at >= 0), ("recovered_late", checks.at >= length // 2)):
            told = None if name in ENDS else recovered(checks, marks[way], exact, never, where)
            row[part], row[f"{part}_95"] = told or (None, None)
        rows.append(row)
    about = {"programs": n_programs, "length": length, "prompt_tokens": prompt_tokens, "checks": len(checks.at)}
    return {**about, "seed": seed, "config": asdict(config), "rows": rows}


def summarise(checks: Checks, own: Marks, exact: Marks) -> dict[str, object]:
    """One way: shares right, and the loss split in step error and drift; `exact` are the marks of decode-only."""
    parts = {
        "right": own.right,
        "dense": own.dense_right,
        "step_error": own.dense_right.astype(float) - exact.right,
        "drift": exact.right.astype(float) - own.right,
    }
    row: dict[str, object] = with_intervals(
        {name: checks.per_program(values.astype(float)) for name, values in parts.items()}
    )
    edges = [0, 32, 128, 512, 2048]  # tokens
    kinds = {"depth": checks.depth, "age": np.digitize(checks.age, edges) - 1, "position": checks.at // WIDTH}
    for name, kind in kinds.items():
        row |= shares_by_kind(f"by_{name}", own.right, checks.program, kind, int(kind.max()) + 1)
    return row


def recovered(
    checks: Checks, own: Marks, exact: Marks, never: Marks, where: np.ndarray
) -> tuple[float, list[float | None]] | None:
    """Share of the drift of never rectifying that is recovered, of the checks `where` [checks] bool, and its interval.

    `exact` and `never` are the marks of decode-only and of never rectifying. None where there is no drift to recover.
    """
    counted = Checks(*(array[where] for array in astuple(checks)))
    total, left = (counted.per_program((exact.right.astype(float) - marks.right)[where]) for marks in (never, own))
    if not total.sum() > 0:
        return None
    return 1 - left.mean() / total.mean(), bootstrap_ratio(total - left, total)
