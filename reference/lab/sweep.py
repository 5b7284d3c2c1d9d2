"""Sweeps over interval, sparsity and length of the sparse suffix (paper, Fig. 4, 5 and 9).

Held-out text is read densely up to a suffix, which is decoded sparsely along its true tokens. The
predictions of the last 32 tokens count. The loss against dense decoding is split in two: *step
error*, which decode-only has as well, its cache being exact, and *drift*, the rest, which
rectification is there to remove.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..checks import require
from ..config import ReSAConfig
from ..model import GPT
from .fidelity import Reading, divergence, read, top_hits
from .measure import check_documents, over_documents, recovered, stacked, with_intervals
from .parallel import decode_at_once

SCORED = 32  # predictions at the end of every document
LENGTHS = (1, 8, 16, 32, 64, 128, 256)  # of the suffix, and of intervals
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BLOCK_SIZES = (8, 16, 32, 64)
DENSE_LAYERS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Setting:
    """One way of decoding a suffix of `suffix` tokens."""

    config: ReSAConfig
    suffix: int

    def changed(self, **changes: Any) -> Setting:
        """This suffix, decoded with some fields of the configuration changed."""
        return replace(self, config=replace(self.config, **changes))

    @property
    def decode_only(self) -> Setting:
        """This setting with a cache that is always exact."""
        return self.changed(interval=1, schedule="paper")

    @property
    def never(self) -> Setting:
        """This setting without rectification."""
        return self.changed(interval=None)


def settings(base: Setting, *, grid: bool = True) -> dict[str, list[Setting]]:
    """List what is compared: one factor at a time around `base`; `grid` adds interval × ratio."""
    lengths = [x for x in LENGTHS if x <= base.suffix]
    intervals = [*lengths, None]
    by_factor = {
        "suffix": [replace(base.never, suffix=x) for x in lengths],
        "interval": [base.changed(interval=f) for f in intervals],
        "active_ratio": [base.changed(active_ratio=p) for p in RATIOS],
        "block_size": [base.changed(block_size=b) for b in BLOCK_SIZES],
        "dense_layers": [base.changed(dense_layers=n) for n in DENSE_LAYERS],
        "schedule": [base.changed(schedule=s) for s in ("fused", "paper")],
    }
    if grid:
        pairs = [(f, p) for f in intervals for p in RATIOS]
        by_factor["grid"] = [base.changed(interval=f, active_ratio=p) for f, p in pairs]
    return by_factor


@torch.no_grad()
def score(model: GPT, reading: Reading, setting: Setting | None) -> dict[str, float]:
    """KL from dense and top-3 accuracy of a document's last predictions; None is dense decoding.

    Predictions before a suffix that is shorter than what is scored are dense, and lose nothing.
    """
    own = reading.log_probs
    if setting is not None:
        prompt_tokens = reading.exact.tokens.shape[1] - setting.suffix
        decoded = decode_at_once(model, reading.exact, setting.config, prompt_tokens)
        own = model.output(decoded.hidden[0, -SCORED:]).log_softmax(dim=-1)
    kl = divergence(reading.log_probs, own).double().mean()
    accuracy = top_hits(own, reading.following).double().mean()
    return {"kl": float(kl), "accuracy": float(accuracy)}


def measure_sweep(
    model: GPT, documents: Sequence[Sequence[int]], base: Setting, *, grid: bool = True
) -> dict[str, Any]:
    """Every setting over all documents, which have one length: factor → rows, JSON-ready."""
    check_documents(documents, SCORED + 2, model.config.context + 1)
    length = len(documents[0])
    allowed = f"{SCORED} … {length - 2} tokens of the documents"
    require(SCORED <= base.suffix <= length - 2, "suffix", base.suffix, allowed)

    # Each setting needs its ends as well: decode-only and never rectified.
    by_factor = settings(base, grid=grid)
    every = [setting for several in by_factor.values() for setting in several]
    ways = [None, *(end for each in every for end in (each, each.decode_only, each.never))]

    def prepare(document: Sequence[int]) -> Reading:
        return read(model, document[:-1], length - 1 - SCORED, after=document[-1])

    results = over_documents("Sweep", documents, ways, prepare, partial(score, model))
    found = {setting: stacked(each) for setting, each in results.items()}
    dense = found[None]["accuracy"]
    return {
        "documents": len(documents),
        "document_tokens": length,
        "scored": SCORED,
        "base": asdict(base),
        **with_intervals({"dense_accuracy": dense}),
        "factors": {
            factor: [summarise(setting, found, dense) for setting in several]
            for factor, several in by_factor.items()
        },
    }


def summarise(
    setting: Setting, found: Mapping[Setting | None, Mapping[str, np.ndarray]], dense: np.ndarray
) -> dict[str, Any]:
    """One row: means over documents with intervals, the loss split into step error and drift.

    `…_recovered` is the share of never rectifying's drift that this setting does not have; None if
    the setting never rectifies, or if there is no drift to recover.
    """
    never, exact, own = (found[each] for each in (setting.never, setting.decode_only, setting))
    row: dict[str, Any] = {**asdict(setting.config), "suffix": setting.suffix}
    row |= with_intervals(
        {
            "accuracy": own["accuracy"],
            "accuracy_lost": dense - own["accuracy"],
            "accuracy_step_error": dense - exact["accuracy"],
            "accuracy_drift": exact["accuracy"] - own["accuracy"],
            "kl": own["kl"],
            "kl_step_error": exact["kl"],
            "kl_drift": own["kl"] - exact["kl"],
        }
    )
    for name, sign in (("accuracy", -1), ("kl", 1)):
        drift, left = (sign * (each[name] - exact[name]) for each in (never, own))
        row |= recovered(f"{name}_recovered", drift, left, is_end=setting.config.interval is None)
    return row
