"""Rectified sparse attention in Triton: the operations of `resa.reference`, at memory's speed.

The same files hold the same functions under the same names; `README.md` in this folder lays them
next to each other. `generate` decodes a batch through CUDA graphs. Without Triton nothing is here
but the command line, with the reference behind it.
"""

from importlib.util import find_spec

if __name__ != "resa.fast":
    raise ImportError(
        "the folder `fast` is the package `resa.fast`: run `make install`, then import that"
    )

if find_spec("triton") is not None:
    from .cache import BatchedCache
    from .generate import generate, prefill
    from .gpu.bounds8 import Bounds8, compress_bounds
    from .operations import CHECKED_OPS, TRITON_OPS, score_blocks

    # The public operations check their arguments. TRITON_OPS, inside a pass, do not.
    block_bounds = CHECKED_OPS.block_bounds
    select_blocks = CHECKED_OPS.select_blocks
    sparse_attention = CHECKED_OPS.sparse_attention
    dense_attention = CHECKED_OPS.dense_attention
    sketch_keys = CHECKED_OPS.sketch_keys
    score_sketch = CHECKED_OPS.score_sketch

    __all__ = [
        "TRITON_OPS",
        "BatchedCache",
        "Bounds8",
        "block_bounds",
        "compress_bounds",
        "dense_attention",
        "generate",
        "prefill",
        "score_blocks",
        "score_sketch",
        "select_blocks",
        "sketch_keys",
        "sparse_attention",
    ]
