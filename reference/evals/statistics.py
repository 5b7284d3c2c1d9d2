"""Intervals of confidence for everything that is averaged over documents."""

from __future__ import annotations

import numpy as np


def bootstrap(values: np.ndarray, *, samples: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the mean, documents drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(samples, len(values)))].mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).tolist()
