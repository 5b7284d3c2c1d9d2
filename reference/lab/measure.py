"""The loop that all evaluations share, and what is made of its numbers: means with intervals."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from ..checks import require

Item = TypeVar("Item")
Way = TypeVar("Way", bound=Hashable)
SAMPLES = 2000  # draws of the bootstrap
POINTS = 16  # of curves along the text


def shown(items: Iterable[Item], title: str, total: int | None = None) -> Iterable[Item]:
    """Iterate with a progress bar on standard error, where that is a terminal.

    `total` is the number of items, for those that don't know it themselves.
    """
    console = Console(stderr=True)
    return track(items, title, total, console=console, disable=not console.is_terminal)


def over_documents(
    title: str,
    documents: Sequence[Any],
    ways: Iterable[Way],
    prepare: Callable[[Any], Any],
    measure: Callable[[Any, Way], Any],
) -> dict[Way, list[Any]]:
    """Measure every document in every way → for each way what was found, document by document.

    `prepare` makes what all ways share, such as the dense reading of a document.
    """
    found: dict[Way, list[Any]] = {way: [] for way in ways}

    def measured() -> Iterator[None]:
        for document in documents:
            shared = prepare(document)
            for way, results in found.items():
                results.append(measure(shared, way))
                yield

    for _ in shown(measured(), title, len(documents) * len(found)):
        pass
    return found


def stacked(results: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Join what documents have in common: name → [documents, …]."""
    return {name: np.stack([np.asarray(each[name]) for each in results]) for name in results[0]}


def check_documents(documents: Sequence[Sequence[int]], least: int, most: int) -> None:
    """Refuse documents of fewer or more tokens than allowed, and none at all."""
    lengths = [len(document) for document in documents] or [0]
    allowed = f"documents of {least} … {most} tokens"
    for length in (min(lengths), max(lengths)):
        require(least <= length <= most, "documents", f"{length} tokens", allowed)


def bootstrap(values: np.ndarray, totals: np.ndarray | None = None) -> list[float | None]:
    """95 % interval of mean(values), or of mean(values) / mean(totals); [documents] each.

    Documents are drawn with replacement. The interval of few is too narrow: for eight it holds the
    mean in 84 to 88 % of the cases. [None, None] if the mean of the totals is not positive in every
    draw: the ratio can then be anything.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(SAMPLES, len(values)))
    means = values[drawn].mean(axis=1)
    if totals is not None:
        divisors = totals[drawn].mean(axis=1)
        if (divisors <= 0).any():
            return [None, None]
        means = means / divisors
    return np.quantile(means, (0.025, 0.975)).tolist()


def with_intervals(parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The mean of every part [documents] and, under `…_95`, its interval."""
    row: dict[str, Any] = {}
    for name, values in parts.items():
        row |= {name: float(values.mean()), f"{name}_95": bootstrap(values)}
    return row


def stretches(parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Curves along the text: means over POINTS stretches of every part [documents, N], as lists.

    `from` says where they begin.
    """
    n = min(values.shape[1] for values in parts.values())
    bounds = [round(n * point / POINTS) for point in range(POINTS + 1)]
    pairs = [(start, end) for start, end in pairwise(bounds) if start < end]
    curves = {
        name: [float(values[:, start:end].mean()) for start, end in pairs]
        for name, values in parts.items()
    }
    return {"from": [start for start, _ in pairs], **curves}


def recovered(
    name: str, never: np.ndarray, own: np.ndarray, *, is_end: bool = False
) -> dict[str, Any]:
    """Share of the drift `never` [documents] that is gone from `own`, as `name`, and its interval.

    None in place of both if there is no drift, or nothing to recover at an end of the scale.
    """
    if is_end or not never.sum() > 0:
        return {name: None, f"{name}_95": None}
    share = float(1 - own.mean() / never.mean())
    return {name: share, f"{name}_95": bootstrap(never - own, never)}


def shares_by_kind(
    name: str, right: np.ndarray, document: np.ndarray, kind: np.ndarray
) -> dict[str, Any]:
    """Share of right checks for every kind 0, 1, … as `name`, and its interval as `…_95`.

    right, document and kind: [checks]. A share pools the checks of all documents; its interval
    draws documents that have any check. A kind without checks has None, and so have the ends of an
    interval where a draw may hold no check of the kind.
    """
    _, document = np.unique(document, return_inverse=True)
    n_documents = int(document.max(initial=-1)) + 1
    shares: list[float | None] = []
    intervals: list[list[float | None]] = []
    for each in range(int(kind.max()) + 1):
        chosen = kind == each
        n = np.bincount(document[chosen], minlength=n_documents)
        n_right = np.bincount(document[chosen], weights=right[chosen], minlength=n_documents)
        shares.append(float(n_right.sum() / n.sum()) if chosen.any() else None)
        intervals.append(bootstrap(n_right, n) if chosen.any() else [None, None])
    return {name: shares, f"{name}_95": intervals}
