"""Measurements of the Triton path on a GPU: `make bench`, or `resa bench --help`.

The parts of attention and 4-bit products are compared with the reference before they are timed;
the decode loop and prefill are left to the tests. Decoding is timed in one way: captured in a CUDA
graph, over inputs too large to stay in the caches between two uses. A prompt is read as it stands.
"""
