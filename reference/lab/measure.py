"""The loop that all evaluations share: documents, ways of decoding, numbers of each document."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..checks import require
from .statistics import bootstrap

Way = TypeVar("Way", bound=Hashable)


def over_documents(
    title: str,
    documents: Sequence[Any],
    ways: Iterable[Way],
    prepare: Callable[[Any], Any],
    measure: Callable[[Any, Way], Any],
    *,
    progress: bool,
) -> dict[Way, list[Any]]:
    """Measure every document in every way → for each way what was found, document by document.

    `prepare` makes what all ways share, such as the dense reading of a document.
    """
    found: dict[Way, list[Any]] = {way: [] for way in ways}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(title, total=len(documents) * len(found))
        for document in documents:
            shared = prepare(document)
            for way, results in found.items():
                results.append(measure(shared, way))
                bar.advance(task)
    return found


def stacked(results: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Join what documents have in common: name → [documents, …]."""
    return {name: np.stack([np.asarray(each[name]) for each in results]) for name in results[0]}


def with_intervals(parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The mean of every part [documents] and, under `…_95`, its 95 % interval over documents."""
    row: dict[str, Any] = {}
    for name, values in parts.items():
        row |= {name: float(values.mean()), f"{name}_95": bootstrap(values)}
    return row


def check_documents(documents: Sequence[Sequence[int]], least: int, most: int) -> None:
    """Refuse documents of fewer or more tokens than allowed, and none at all."""
    lengths = [len(document) for document in documents] or [0]
    allowed = f"documents of {least} … {most} tokens"
    for length in (min(lengths), max(lengths)):
        require(least <= length <= most, "documents", f"{length} tokens", allowed)
