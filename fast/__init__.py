"""Rectified sparse attention in Triton: the operations of `resa.reference`, at the speed of memory.

The same files hold the same functions under the same names; `generate` decodes through CUDA graphs. The model is the
reference's own, which takes these operations as `GPT(config, ops=TRITON_OPS)`. Where Triton is not installed there is
nothing here but the command line, with the reference behind it.
"""

from importlib.util import find_spec

if __name__ != "resa.fast":
    raise ImportError("the folder `fast` is the package `resa.fast`: run `make install`, then import that")

if find_spec("triton") is not None:
    from .attention import dense_attention, sparse_attention
    from .blocks import block_bounds, score_blocks, select_blocks
    from .bounds8 import Bounds8, compress_bounds
    from .cache import write_window
    from .generate import generate, prefill
    from .model import TRITON_OPS

    __all__ = [
        "TRITON_OPS",
        "Bounds8",
        "block_bounds",
        "compress_bounds",
        "dense_attention",
        "generate",
        "prefill",
        "score_blocks",
        "select_blocks",
        "sparse_attention",
        "write_window",
    ]
