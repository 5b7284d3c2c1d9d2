"""Values that a model has to carry through what it decodes: how many it gets right (paper, Fig. 9,
Table 1).

Programs of `programs.py` are decoded along their true text, so all ways of decoding are asked the
same, and every asserted digit is checked. Lines that assign do not say the value: what the model
found stands in keys and values alone. The loss against dense decoding is split as everywhere:
decode-only has the step error, what another way loses beyond it is drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..model import GPT
from ..weights.models import Tokenizer
from .measure import over_documents, recovered, shares_by_kind, with_intervals
from .parallel import Stream, decode_at_once, exact_stream
from .programs import UNSEEN, Program, alias_program
from .scorers import SCORERS, own_scorer

WIDTH = 512  # tokens per point of the curve along the text
AGES = (0, 32, 128, 512, 2048)  # tokens: where the classes of ages begin
ENDS = ("decode-only", "never")  # no drift, and all of it
SEED = 0  # of the programs
TOGETHER = {"cuda": 8}  # programs decoded side by side: one alone leaves a GPU idle
ALL = slice(None)


@dataclass(frozen=True)
class Way:
    """One way of decoding."""

    config: ReSAConfig
    score: str | None = None  # one of SCORERS, by which blocks are selected; None: its own


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

    def per_program(self, values: np.ndarray, where: np.ndarray | slice = ALL) -> np.ndarray:
        """Mean of `values` [checks] over each program's checks, for programs that have any.

        Only checks `where` [checks] bool count.
        """
        program = self.program[where]
        n = np.bincount(program)
        return (np.bincount(program, weights=values[where]) / np.maximum(n, 1))[n > 0]


def marked(
    model: GPT, programs: Sequence[Program], checks: Checks, ways: Sequence[Way], prompt_tokens: int
) -> dict[Way | None, np.ndarray]:
    """Decode along the programs in every way → per way 1.0 for every check that is right, or 0.0.

    None is dense decoding.
    """
    device = model.embed.weight.device

    @torch.no_grad()
    def prepare(some: range) -> tuple[range, Stream]:
        tokens = [programs[index].tokens[:-1] for index in some]
        return some, exact_stream(model, torch.tensor(tokens, device=device))

    @torch.no_grad()
    def mark(shared: tuple[range, Stream], way: Way | None) -> np.ndarray:
        # A check is right if the likeliest token is the one asserted.
        some, stream = shared
        if way is not None:
            scorer = SCORERS[way.score or own_scorer(way.config)]
            stream = decode_at_once(model, stream, way.config, prompt_tokens, scorer)
        right = []
        for index, hidden in zip(some, stream.hidden, strict=True):
            at = checks.at[checks.program == index]
            chosen = model.output(hidden[at - 1]).argmax(dim=-1).cpu().numpy()
            right.append(chosen == np.array(programs[index].tokens)[at])
        return np.concatenate(right).astype(float)

    n, each = TOGETHER.get(device.type, 1), range(len(programs))
    together = [each[first : first + n] for first in each[::n]]
    results = over_documents("Carried values", together, [None, *ways], prepare, mark)
    return {way: np.concatenate(marks) for way, marks in results.items()}


def measure_carried(
    model: GPT,
    tokenizer: Tokenizer,
    n_programs: int,
    length: int,
    prompt_tokens: int,
    config: ReSAConfig,
    *,
    intervals: Sequence[int],
    ratios: Sequence[float],
    scores: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Shares of right values for every interval, ratio and score, with intervals over programs;
    JSON-ready. `scores` are names of SCORERS; None is the configuration's own.
    """
    # Check the request, and list the ways of decoding.
    scores = scores or [own_scorer(config)]
    require_integer("n_programs", n_programs, 1)
    require_integer("prompt_tokens", prompt_tokens, 1)
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
        alias_program(tokenizer, np.random.default_rng((SEED, length, index, UNSEEN)), length)
        for index in range(n_programs)
    ]
    checks = Checks.of(programs, prompt_tokens)
    require(len(checks.at) > 0, "length", length, "more: no value is asserted after the prompt")
    right = marked(model, programs, checks, list(ways.values()), prompt_tokens)

    # Compare each way with the ends of its own score and ratio.
    rows = []
    halves = {"recovered": ALL, "recovered_late": checks.at >= length // 2}
    for score, ratio, name in ways:
        own, exact, never = (right[ways[score, ratio, each]] for each in (name, *ENDS))
        row = {"interval": name, "ratio": ratio, "score": score}
        row |= summarise(checks, own, exact, right[None])
        for part, where in halves.items():
            drift, left = (checks.per_program(exact - each, where) for each in (never, own))
            row |= recovered(part, drift, left, is_end=name in ENDS)
        rows.append(row)
    about = {"programs": n_programs, "length": length, "prompt_tokens": prompt_tokens}
    about |= {"checks": len(checks.at), "seed": SEED, "config": asdict(config)}
    return {**about, "rows": rows}


def summarise(
    checks: Checks, own: np.ndarray, exact: np.ndarray, dense: np.ndarray
) -> dict[str, Any]:
    """Shares right of one way, and its loss split into step error and drift.

    Marks [checks] are its own, those of decode-only (`exact`) and of dense decoding.
    """
    parts = {"right": own, "dense": dense, "step_error": dense - exact, "drift": exact - own}
    row = with_intervals({name: checks.per_program(values) for name, values in parts.items()})
    kinds = {
        "depth": checks.depth,
        "age": np.digitize(checks.age, AGES) - 1,
        "position": checks.at // WIDTH,
    }
    for name, kind in kinds.items():
        row |= shares_by_kind(f"by_{name}", own, checks.program, kind)
    return row
