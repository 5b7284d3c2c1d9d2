"""Intervals of confidence for everything that is averaged over documents."""

from __future__ import annotations

import numpy as np


def bootstrap(values: np.ndarray, *, samples: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the mean, documents drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(samples, len(values)))].mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def bootstrap_ratio(
    values: np.ndarray, totals: np.ndarray, *, samples: int = 2000, seed: int = 0
) -> list[float | None]:
    """95 % interval of mean(values) / mean(totals), pairs drawn with replacement; None for an end without bound.

    Where the mean of the totals is not positive in more than 2.5 % of the samples, the ratio can be anything.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    value, total = values[drawn].mean(axis=1), totals[drawn].mean(axis=1)
    if (total <= 0).mean() > 0.025:
        return [None, None]
    ratio = value[total > 0] / total[total > 0]
    return np.quantile(ratio, (0.025, 0.975)).tolist()
