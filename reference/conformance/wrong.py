"""Findings: the law that a port breaks, and the exceptions that its code raises."""

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMPRECISE = 1e-2  # a smaller relative error may come from arithmetic narrower than float32
# What an operation computes: broken by what is nearly right, whatever else its case asks for.
EQUATIONS = {
    "score_blocks": "2.2 eq. 4",
    "sparse_attention": "2.4 eq. 2",
    "dense_attention": "2.5 eq. 2",
    "score_sketch": "2.7 estimate",
}
# Frames of these never say where a port went wrong.
NOT_THE_PORT = ("site-packages", "<frozen", importlib.__file__, str(Path(__file__).parent))


@dataclass(eq=False)
class Wrong(Exception):
    """A fault of a port, in the words of docs/porting.md."""

    law: str
    says: str
    needs: tuple[str, ...] = ()  # operations without which the law cannot hold
    error: float | None = None  # the worst absolute error, and what is allowed there
    allowed: float | None = None


@contextmanager
def foreign_code(law: str, says: str) -> Iterator[None]:
    """Raise `Wrong` for whatever a port raises, with the exception behind `says`."""
    try:
        yield
    except Wrong:
        raise
    except (Exception, SystemExit) as error:
        raise Wrong(law, f"{says} ({in_one_line(error)})") from error


def in_one_line(error: BaseException) -> str:
    """An exception with the last line of the port that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not any(name in each.filename for name in NOT_THE_PORT)]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def wrong_clause(found: np.ndarray, wanted: np.ndarray, n_local: int) -> tuple[str, str] | None:
    """The clause of eq. 5 that a selection [..., N] breaks: the count, or the newest blocks."""
    ours, theirs = ((indices >= 0).sum(axis=-1) for indices in (found, wanted))
    if (ours != theirs).any():
        return "2.3 count", f"{ours.tolist()} blocks are selected instead of {theirs.tolist()}"

    # The newest blocks are the last of those that should be selected.
    newest = wanted.max(axis=-1, keepdims=True) - np.arange(n_local)  # [..., n_local]
    is_in = (newest[..., None] == found[..., None, :]).any(axis=-1)
    if not (is_in | (newest < 0)).all():
        return "2.3 local blocks", "the newest are in, whatever they score"
    return None


def wrong_order(found: np.ndarray, wanted: np.ndarray) -> tuple[str, str] | None:
    """The clause that the right blocks [..., N] break where they stand in the wrong places."""
    if (found == wanted).all() or (np.sort(found, axis=-1) != np.sort(wanted, axis=-1)).any():
        return None
    if ((found < 0) != (wanted < 0)).any():
        return "2.3 padding", "the right blocks, but -1 does not come after them"
    return "2.3 order", "the right blocks, but not in ascending order"
