"""Self-speculation beside rectification (paper, Table 3): what a dense pass yields, and what it costs.

Both re-encode f tokens in one dense pass. Rectification keeps what sparse steps chose and mends the cache; speculation
keeps only what dense decoding would have chosen too, and so is exact, at the price of passes that yield fewer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..checks import is_integer, require
from ..config import ReSAConfig
from ..generate import Generation, generate, open_generation, prefill
from ..model import GPT
from ..sampling import Choice
from ..speculate import Speculation
from .fidelity import read_ratio
from .statistics import with_intervals


@dataclass(frozen=True)
class Passes:
    """Of one generation: the drafts of every dense pass, and how many of them it accepted."""

    tokens: int  # generated
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    def measures(self, config: ReSAConfig) -> dict[str, float]:
        """Means over its passes; what it reads per token beside dense decoding, by the cost model (eq. 6)."""
        step = read_ratio(replace(config, interval=None))
        return {
            "drafted": float(np.mean(self.drafted)),
            "accepted": float(np.mean(self.accepted)),
            "acceptance": sum(self.accepted) / max(sum(self.drafted), 1),
            "tokens_per_pass": (self.tokens - 1) / len(self.drafted),  # the first came from the prefill
            "read": (sum(self.drafted) * step + len(self.drafted)) / (self.tokens - 1),
        }


def speculated(
    model: GPT, prompts: Sequence[Sequence[int]], opening: Generation, n_tokens: int, config: ReSAConfig
) -> tuple[list[list[int]], list[Passes]]:
    """Greedy speculation from an opening on, and its passes, sequence by sequence.

    prompts: the last token of each, as `opening` holds those before it.
    """
    longest = int(opening.cache.lengths.max()) + 1 + n_tokens
    generation, feed = open_generation(model, prompts, longest, config, opening)
    seen: list[list[tuple[int, int]]] = [[] for _ in prompts]
    run = Speculation(
        model, generation, config, Choice(), [None] * len(prompts), n_tokens, (),
        on_pass=lambda sequence, drafted, accepted: seen[sequence].append((drafted, accepted)),
    )  # fmt: skip
    run.run(prefill(model, feed, generation.cache))
    passes = [Passes(n_tokens, tuple(d for d, _ in own), tuple(a for _, a in own)) for own in seen]
    return generation.tokens, passes


def agreement(tokens: Sequence[int], dense: Sequence[int]) -> dict[str, float]:
    """How many tokens of a continuation are dense decoding's, up to the first other: what follows can't be compared."""
    equal = [token == other for token, other in zip(tokens, dense, strict=True)]
    return {"same_tokens": float(equal.index(False) if False in equal else len(equal))}


def measure_speculation(
    model: GPT,
    documents: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    intervals: Sequence[int],
    *,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, object]:
    """Continue every document greedily by `n_tokens`, with and without speculation; JSON-ready.

    Means over documents with 95 % intervals. Raises `ValueError` before any work starts.
    """
    require(is_integer(n_tokens, 2), "n_tokens", n_tokens, "an integer ≥ 2")
    require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
    shortest = min(map(len, documents), default=0)
    require(shortest > 1, "documents", f"{shortest} tokens", "documents of two tokens or more")
    room = model.config.context - n_tokens + 1
    require(max(map(len, documents)) <= room, "documents", f"{max(map(len, documents))} tokens", f"≤ {room}")
    require(len(intervals) > 0, "intervals", "none", "at least one")
    for name in ("dense_below", "dense_layers"):  # the cost model knows neither
        require(getattr(config, name) == 0, f"config.{name}", getattr(config, name), "0")
    configs = {f: replace(config, interval=f) for f in intervals}
    found: dict[str, list[dict[str, float]]] = {}
    starts = range(0, len(documents), batch)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Speculation", total=len(starts) * (1 + 2 * len(configs)))
        for start in starts:
            some = documents[start : start + batch]
            opening = generate(model, [list(d[:-1]) for d in some], 0, config)
            last = [list(d[-1:]) for d in some]
            dense = generate(
                model, last, n_tokens, replace(config, interval=1, schedule="fused"), resume=opening
            ).tokens
            bar.advance(task)
            for f, each in configs.items():
                tokens, passes = speculated(model, last, opening, n_tokens, each)
                rows = [own.measures(each) | agreement(*pair) for own, *pair in zip(passes, tokens, dense, strict=True)]
                found.setdefault(f"speculation f={f}", []).extend(rows)
                bar.advance(task)
                tokens = generate(model, last, n_tokens, each, resume=opening).tokens
                rows = [{"read": read_ratio(each)} | agreement(*pair) for pair in zip(tokens, dense, strict=True)]
                found.setdefault(f"ReSA f={f}", []).extend(rows)
                bar.advance(task)
    rows = {
        name: with_intervals({each: np.array([row[each] for row in several]) for each in several[0]})
        for name, several in found.items()
    }
    return {"documents": len(documents), "tokens_each": n_tokens, "config": asdict(config), "variants": rows}
