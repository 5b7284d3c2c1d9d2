"""Intervals of confidence for everything that is averaged over documents."""

from __future__ import annotations

from typing import Any

import numpy as np


def bootstrap(values: np.ndarray, *, samples: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the mean, by drawing documents with replacement.

    It is too narrow for few documents: for eight it holds the mean in 84 to 88 % of the cases.
    """
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(samples, len(values)))].mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def bootstrap_ratio(
    values: np.ndarray, totals: np.ndarray, *, samples: int = 2000, seed: int = 0
) -> list[float | None]:
    """95 % interval of mean(values) / mean(totals), by drawing pairs with replacement.

    [None, None] if the mean of the totals is not positive in every draw: the ratio can then be
    anything.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    value, total = values[drawn].mean(axis=1), totals[drawn].mean(axis=1)
    if (total <= 0).any():
        return [None, None]
    return np.quantile(value / total, (0.025, 0.975)).tolist()


def shares_by_kind(
    name: str, right: np.ndarray, document: np.ndarray, kind: np.ndarray, n_kinds: int
) -> dict[str, Any]:
    """Share of right checks for every kind 0 … n_kinds − 1 as `name`, its interval as `…_95`.

    right, document and kind: [checks]. A share pools the checks of all documents; its interval
    draws documents that have any check. A kind without checks has None, and so have the ends of an
    interval where a draw may hold no check of the kind.
    """
    _, document = np.unique(document, return_inverse=True)
    n_documents = int(document.max(initial=-1)) + 1
    shares: list[float | None] = []
    intervals: list[list[float | None]] = []
    for each in range(n_kinds):
        chosen = kind == each
        n = np.bincount(document[chosen], minlength=n_documents)
        n_right = np.bincount(document[chosen], weights=right[chosen], minlength=n_documents)
        shares.append(float(n_right.sum() / n.sum()) if chosen.any() else None)
        intervals.append(bootstrap_ratio(n_right, n) if chosen.any() else [None, None])
    return {name: shares, f"{name}_95": intervals}
