"""From how many cached tokens on ReSA is faster than dense decoding: measured, not modelled.

A sparse step has kernels that a dense one does without, so a short cache decodes faster densely. Where the two cross
depends on the GPU and the batch; crossover.json holds what was measured, on what, and by which command. The command
line takes `ReSAConfig.dense_below` from here; the library's default stays 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from resa.reference.checks import is_integer, require


def dense_below(batch: int, rows: Sequence[dict[str, float]] | None = None) -> int:
    """The shortest cache, in tokens, from which on ReSA was faster than dense decoding at every length measured.

    rows: {"batch", "context", "dense_us", "resa_us"}, one per measurement; None takes those of crossover.json. The
    batch that counts is the largest measured that is not above `batch`, or the smallest there is. Where ReSA is not
    the faster one at the longest cache, the answer is one token more than that: always dense, as far as is known.

    >>> def row(context, dense_us, resa_us):
    ...     return {"batch": 1, "context": context, "dense_us": dense_us, "resa_us": resa_us}
    >>> dense_below(1, [row(1024, 50, 60), row(4096, 70, 65), row(16384, 160, 80)])
    4096
    >>> dense_below(1, [row(1024, 50, 60), row(4096, 70, 75)])
    4097
    """
    require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
    rows = _shipped_rows() if rows is None else rows
    batches = {row["batch"] for row in rows}
    nearest = max((each for each in batches if each <= batch), default=min(batches))
    measured = sorted((row for row in rows if row["batch"] == nearest), key=lambda row: row["context"], reverse=True)
    threshold = measured[0]["context"] + 1
    for row in measured:
        if row["resa_us"] >= row["dense_us"]:
            break
        threshold = row["context"]
    return threshold


def _shipped_rows() -> list[dict[str, float]]:
    return json.loads(Path(__file__).with_name("crossover.json").read_text(encoding="utf-8"))["rows"]
