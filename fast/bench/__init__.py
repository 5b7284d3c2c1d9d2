"""Measurements of the Triton path on a GPU: `make bench`, or `python -m resa.fast.bench --help`.

Nothing is timed before it has been compared with the reference, and everything is timed the same way: captured in a
CUDA graph, over inputs too large to stay in the caches between two uses.
"""
