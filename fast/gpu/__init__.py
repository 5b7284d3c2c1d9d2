"""Machinery of the Triton path: launching, CUDA graphs, bookkeeping and 8-bit bounds."""
