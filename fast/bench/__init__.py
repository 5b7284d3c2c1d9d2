"""Measurements of the Triton path on a GPU: `make bench`, or `resa bench --help`.

Nothing is timed before it has been compared with the reference. Everything is timed in one way:
captured in a CUDA graph, over inputs too large to stay in the caches between two uses.
"""
