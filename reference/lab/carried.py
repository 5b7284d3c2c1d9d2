"""Values that a model has to carry through what it decodes: how many it gets right (paper, Fig. 9,
Table 1).

Programs of `programs.py` are decoded along their true text, so all ways of decoding are asked the
same, and every asserted digit is checked. Lines that assign do not say the value: what the model
found stands in keys and values alone. The loss against dense decoding is split as everywhere:
decode-only has the step error, what another way loses beyond it is drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..model import GPT
from .measure import over_documents, with_intervals
from .parallel import (
    Score,
    Stream,
    block_upper_bounds,
    decode_at_once,
    exact_stream,
    pooled_scores,
)
from .programs import UNSEEN, Program, alias_program
from .selection import in_eight_bits
from .statistics import bootstrap_ratio, shares_by_kind

WIDTH = 512  # tokens per point of the curve along the text
AGES = (0, 32, 128, 512, 2048)  # tokens: where the classes of ages begin
ENDS = ("decode-only", "never")  # no drift, and all of it


def per_head_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """The largest of the heads' own upper bounds; shapes as in `pooled_scores`."""
    group = query.unflatten(1, (bounds.shape[1], -1))  # [B, Hkv, G, S, D]
    return block_upper_bounds(group, bounds[:, :, None]).amax(dim=2)


def eight_bit_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """Pooled, with bounds rounded outward to 8-bit floats that share scales over all blocks."""
    return pooled_scores(query, in_eight_bits(bounds))


SCORES: dict[str, Score] = {
    "pooled": pooled_scores,
    "per-head": per_head_scores,
    "8-bits": eight_bit_scores,
}


@dataclass(frozen=True)
class Way:
    """One way of decoding."""

    config: ReSAConfig
    score: str = "pooled"  # one of SCORES, by which blocks are selected


@dataclass(frozen=True)
class Checks:
    """All checks of all programs that are decoded rather than prefilled, as arrays [checks]."""

    program: np.ndarray  # its index
    at: np.ndarray  # position
    depth: np.ndarray
    age: np.ndarray  # tokens since the value could be known

    @classmethod
    def of(cls, programs: Sequence[Program], prompt_tokens: int) -> Checks:
        """Collect the checks whose token before is decoded."""
        rows = [
            (index, check.at, check.depth, check.at - check.assigned)
            for index, program in enumerate(programs)
            for check in program.checks
            if check.at > prompt_tokens
        ]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)

    def per_program(self, values: np.ndarray) -> np.ndarray:
        """Mean of `values` [checks] over each program's checks, for programs that have any."""
        n = np.bincount(self.program)
        return (np.bincount(self.program, weights=values) / np.maximum(n, 1))[n > 0]


@dataclass(frozen=True)
class Marks:
    """Marks of all checks, in their order."""

    right: np.ndarray  # [checks] bool
    dense_right: np.ndarray  # [checks] bool, by dense decoding


def marked(
    model: GPT,
    programs: Sequence[Program],
    checks: Checks,
    ways: Sequence[Way],
    prompt_tokens: int,
    *,
    progress: bool = False,
) -> dict[Way, Marks]:
    """Decode along the programs in every way and mark every check."""
    device = model.embed.weight.device

    @torch.no_grad()
    def prepare(index: int) -> tuple[int, Stream]:
        return index, exact_stream(
            model, torch.tensor([programs[index].tokens[:-1]], device=device)
        )

    @torch.no_grad()
    def mark(shared: tuple[int, Stream], way: Way | None) -> np.ndarray:
        # Whether the likeliest token is the one asserted. None is dense decoding.
        index, stream = shared
        if way is not None:
            score = SCORES[way.score]
            stream = decode_at_once(model, stream, way.config, prompt_tokens, score)
        at = checks.at[checks.program == index]
        chosen = model.output(stream.hidden[0, at - 1]).argmax(dim=-1).cpu().numpy()
        return chosen == np.array(programs[index].tokens)[at]

    every = [None, *ways]
    results = over_documents(
        "Carried values", range(len(programs)), every, prepare, mark, progress=progress
    )
    right = {way: np.concatenate(marks) for way, marks in results.items()}
    return {way: Marks(right[way], right[None]) for way in ways}


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
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Shares of right values for every interval, ratio and score, with intervals over programs;
    JSON-ready.
    """
    # Check the request, and list the ways of decoding.
    require_integer("n_programs", n_programs, 1)
    require_integer("seed", seed, 0)
    require_integer("prompt_tokens", prompt_tokens, 1)
    is_known = len(scores) > 0 and set(scores) <= set(SCORES)
    require(is_known, "scores", list(scores), f"some of {', '.join(SCORES)}")
    require_integer("length", length, prompt_tokens + 1)
    longest = model.config.context + 1  # the last token is only predicted
    require(length <= longest, "length", length, f"≤ {longest}, for the context")
    by_interval: dict[str | int, ReSAConfig] = {
        "decode-only": replace(config, interval=1, schedule="paper"),
        "never": replace(config, interval=None),
        **{f: replace(config, interval=f) for f in intervals},
    }
    ways = {
        (score, ratio, name): Way(replace(own, active_ratio=ratio), score)
        for score, ratio, (name, own) in product(scores, ratios, by_interval.items())
    }

    # Write the programs and mark them.
    programs = [
        alias_program(tokenizer, np.random.default_rng((seed, length, index, UNSEEN)), length)
        for index in range(n_programs)
    ]
    checks = Checks.of(programs, prompt_tokens)
    require(len(checks.at) > 0, "length", length, "more: no value is asserted after the prompt")
    todo = list(dict.fromkeys(ways.values()))
    marks = marked(model, programs, checks, todo, prompt_tokens, progress=progress)

    # Compare each way with the ends of its own score and ratio.
    rows = []
    halves = {"recovered": checks.at >= 0, "recovered_late": checks.at >= length // 2}
    for (score, ratio, name), way in ways.items():
        exact, never = (marks[ways[score, ratio, end]] for end in ENDS)
        row = {"interval": name, "ratio": ratio, "score": score}
        row |= summarise(checks, marks[way], exact)
        for part, where in halves.items():
            share = None if name in ENDS else recovered(checks, marks[way], exact, never, where)
            row[part], row[f"{part}_95"] = share or (None, None)
        rows.append(row)
    about = {"programs": n_programs, "length": length, "prompt_tokens": prompt_tokens}
    about |= {"checks": len(checks.at), "seed": seed, "config": asdict(config)}
    return {**about, "rows": rows}


def summarise(checks: Checks, own: Marks, exact: Marks) -> dict[str, Any]:
    """One way: shares right, and the loss split into step error and drift.

    `exact` are the marks of decode-only.
    """
    parts = {
        "right": own.right,
        "dense": own.dense_right,
        "step_error": own.dense_right.astype(float) - exact.right,
        "drift": exact.right.astype(float) - own.right,
    }
    means = {name: checks.per_program(values.astype(float)) for name, values in parts.items()}
    row = with_intervals(means)
    kinds = {
        "depth": checks.depth,
        "age": np.digitize(checks.age, AGES) - 1,
        "position": checks.at // WIDTH,
    }
    for name, kind in kinds.items():
        row |= shares_by_kind(f"by_{name}", own.right, checks.program, kind, int(kind.max()) + 1)
    return row


def recovered(
    checks: Checks, own: Marks, exact: Marks, never: Marks, where: np.ndarray
) -> tuple[float, list[float | None]] | None:
    """Share of never rectifying's drift that is recovered, and its interval; None without drift.

    `exact` are the marks of decode-only. Only checks `where` [checks] bool count.
    """
    counted = Checks(*(array[where] for array in astuple(checks)))
    total, left = (
        counted.per_program((exact.right.astype(float) - marks.right)[where])
        for marks in (never, own)
    )
    if not total.sum() > 0:
        return None
    return float(1 - left.mean() / total.mean()), bootstrap_ratio(total - left, total)
