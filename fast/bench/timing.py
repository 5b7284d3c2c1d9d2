"""Timing of GPU work by replaying CUDA graphs, and the bandwidth that times are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..gpu.graphs import capture

GRAPH_US = 5_000  # a graph holds about this much work, so that one launch of it weighs nothing
REPLAYS = 11
CYCLES_PER_US = 1_700  # about; for pauses


@dataclass(frozen=True)
class Time:
    """Microseconds per call: the median over replays, and the quartiles around it."""

    us: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Time:
        """Median and quartiles of samples in µs."""
        points = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64, device="cpu")
        found = torch.tensor(samples, dtype=torch.float64, device="cpu").quantile(points)
        return cls(*(round(each, 3) for each in found.tolist()))


def time_calls(
    calls: Sequence[Callable[[], object]], *, divide_by: int = 1, pause_us: int = 0
) -> Time:
    """Time per call, divided by a number, of calls that do the same work on different data.

    One CUDA graph repeats the round of calls until it holds about 5 ms of work; each sample is one
    replay. With a pause the graph holds one round, and the GPU rests that long before each: matrix
    work that never pauses can run into the power limit.
    """
    # The first run compiles, the second is warm.
    elapsed(lambda: [call() for call in calls])
    once = elapsed(lambda: [call() for call in calls])
    rounds = 1 if pause_us else max(1, min(200, int(GRAPH_US / max(once, 5 * len(calls)))))

    def many_rounds() -> None:  # keeps no result, so that the graph's memory is that of one call
        for _ in range(rounds):
            for call in calls:
                call()

    graph = capture(many_rounds)
    graph.replay()
    samples = []
    for _ in range(REPLAYS):
        if pause_us:
            torch.cuda._sleep(pause_us * CYCLES_PER_US)
        samples.append(elapsed(graph.replay) / (rounds * len(calls) * divide_by))
    return Time.of(samples)


def elapsed(work: Callable[[], object]) -> float:
    """Microseconds that the GPU spends on `work`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of the GPU that `work` holds at a time, beyond those held before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(size: int = 2**31) -> float:
    """TB/s, read plus written, of the faster of a copy and an elementwise kernel."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    copy, add = lambda: target.copy_(source), lambda: torch.add(source, 1.0, out=target)
    return round(2 * size / min(time_calls([work]).us for work in (copy, add)) / 1e6, 3)
