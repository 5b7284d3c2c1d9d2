"""Capturing work as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The graph of what `work` launches, which must have run once before: its kernels are compiled then.

    Python's garbage collector rests meanwhile. A graph that is part of a cycle, as of a decoding that an error ended,
    would be freed when it is found, and freeing one invalidates the capture.
    """
    graph = torch.cuda.CUDAGraph()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        if was_enabled:
            gc.enable()
    return graph
