"""Threads for decoding: as many as the model is worth and the machine has free, never more.

A step of decoding is hundreds of small tensor operations, and threads wait for one another after
each. Beside a busy process the wait is for whichever thread has lost its core, so one thread too
many costs more than it brings. A small model's operations are not worth sharing at all.

Idle threads spin unless OMP_WAIT_POLICY is "passive" before torch is imported. The Makefile sets
it; nothing in a package could do so in time.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from ..model import GPT

# Weights. A token of a model of 135 million takes 80 ms with one thread, 77 with two that spin, 111
# with two that sleep (two idle cores of a server). From where on more help was not measured.
SMALL = 500_000_000
SAMPLED = 0.05  # seconds; the kernel counts time in hundredths


def set_threads(model: GPT) -> None:
    """Choose torch's number of threads for a model. OMP_NUM_THREADS, if it is set, wins."""
    if "OMP_NUM_THREADS" not in os.environ:
        n_weights = sum(parameter.numel() for parameter in model.parameters())
        torch.set_num_threads(choose_threads(n_weights, torch.get_num_threads()))


def set_free_threads() -> None:
    """Use every free core: for long texts at once, which threads share well."""
    if "OMP_NUM_THREADS" not in os.environ:
        most = os.cpu_count() or 1
        torch.set_num_threads(max(1, min(most, round(free_cores()))))


def choose_threads(n_weights: int, most: int) -> int:
    """Threads for a model of so many weights: one if it is small, else the free cores' number."""
    if n_weights < SMALL or most == 1:
        return 1
    return max(1, min(most, round(free_cores())))


def free_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use and no other uses now, by the kernel's files below `root`.

    Systems without such files get all cores that Python sees.
    """
    if not hasattr(os, "sched_getaffinity"):
        return float(os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0)
    try:
        before = _times((root / "proc/stat").read_text(), allowed)
        time.sleep(SAMPLED)
        after = _times((root / "proc/stat").read_text(), allowed)
    except OSError:
        return min(float(len(allowed)), _quota(root))
    return min(_idle(before, after), _quota(root))


def _times(stat: str, cores: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Read from /proc/stat how long each core was idle, and in all, in hundredths of a second.

    >>> _times("cpu 9 9 9\\ncpu0 3 0 2 40 5 0 0 0 0 0\\nintr 7", [0])
    {0: (45, 50)}
    """
    rows = dict(line.split(maxsplit=1) for line in stat.splitlines() if line.startswith("cpu"))
    found = {core: [int(each) for each in rows.get(f"cpu{core}", "").split()] for core in cores}
    return {core: (sum(row[3:5]), sum(row[:8])) for core, row in found.items()}


def _idle(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> float:
    """Sum the cores' idle shares between two readings.

    >>> _idle({0: (45, 50), 1: (0, 50)}, {0: (50, 55), 1: (0, 55)})
    1.0
    """
    spans = [
        (after[core][0] - idle, after[core][1] - all_) for core, (idle, all_) in before.items()
    ]
    return sum(idle / whole if whole > 0 else 1.0 for idle, whole in spans)


def _quota(root: Path) -> float:
    """Cores' worth of time that the process's control group may use; infinite without a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in groups if line.startswith("0::"))  # version 2
        limit, period = (root / "sys/fs/cgroup" / own.lstrip("/") / "cpu.max").read_text().split()
        return float("inf") if limit == "max" else int(limit) / int(period)
    except (OSError, StopIteration):
        return float("inf")
