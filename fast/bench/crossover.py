"""From how many cached tokens on ReSA is faster than dense decoding: measured, not modelled.

A sparse step has kernels that a dense one does without, so a short cache decodes faster densely.
Where the two cross depends on the GPU and the batch. crossover.json holds the measurements, their
machine and the command that made them. The command line alone asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from resa.reference.checks import require_integer


def crossover(batch: int, rows: Sequence[dict[str, float]] | None = None) -> int:
    """The shortest cache, in tokens, from which ReSA was faster at every length measured.

    rows: {"batch", "context", "dense_us", "resa_us"}, one per measurement; None takes those of
    crossover.json. The largest measured batch up to `batch` counts, else the smallest. Where dense
    decoding is faster even at the longest cache, the result is one token more than that.

    >>> def row(context, dense_us, resa_us):
    ...     return {"batch": 1, "context": context, "dense_us": dense_us, "resa_us": resa_us}
    >>> crossover(1, [row(1024, 50, 60), row(4096, 70, 65), row(16384, 160, 80)])
    4096
    >>> crossover(1, [row(1024, 50, 60), row(4096, 70, 75)])
    4097
    """
    require_integer("batch", batch, 1)
    if rows is None:
        text = Path(__file__).with_name("crossover.json").read_text(encoding="utf-8")
        rows = json.loads(text)["rows"]
    batches = {row["batch"] for row in rows}
    nearest = max((each for each in batches if each <= batch), default=min(batches))

    # Walk from the longest cache down to where dense decoding is the faster one.
    measured = {row["context"]: row for row in rows if row["batch"] == nearest}
    threshold = max(measured) + 1
    for context in sorted(measured, reverse=True):
        if measured[context]["resa_us"] >= measured[context]["dense_us"]:
            break
        threshold = context
    return threshold
