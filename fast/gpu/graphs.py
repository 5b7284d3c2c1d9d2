"""Capturing work as a CUDA graph."""

import gc
from collections.abc import Callable

import torch


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The graph of what `work` launches. It must have run once before: its kernels compile then.

    Python's garbage collector rests meanwhile. It could find an older graph that is part of a
    cycle, left by a decoding that an error ended. Freeing a graph invalidates the capture.
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
