"""The contract: the five operations that decoding is made of, for every implementation of them.

`blocks.py` and `attention.py` check nothing, so that no check runs in a layer of a step. `checked`
makes operations public: they refuse by name what does not fit. At a first reading, skip it. The
Triton path and ports keep the same contract and add their own limits.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from . import attention, blocks, checks, sketch


@dataclass(frozen=True)
class Operations:
    """One implementation of the five operations, for `GPT(config, ops=…)` to decode with."""

    block_bounds: Callable[..., Tensor]  # keys → bounds (eq. 3). Not used in a pass: see `KVCache`
    score_blocks: Callable[..., Tensor]  # query, bounds → scores [B, Hkv, M] (eq. 4)
    select_blocks: Callable[..., Tensor]  # scores → indices [B, Hkv, N] int32 (eq. 5)
    sparse_attention: Callable[..., Any]  # query [B, Hq, D], the cache, indices → out (eq. 2)
    dense_attention: Callable[..., Any]  # query [B, Hq, Q, D], the cache → out

    # Instead of bounds; this project's own. None: an implementation without them.
    sketch_keys: Callable[..., Any] | None = None  # keys → codes, scales. As `block_bounds`
    score_sketch: Callable[..., Tensor] | None = None  # query, codes, scales → scores [B, Hkv, M]


REFERENCE_OPS = Operations(
    blocks.block_bounds,
    blocks.score_blocks,
    blocks.select_blocks,
    attention.sparse_attention,
    attention.dense_attention,
    sketch.sketch_keys,
    sketch.score_sketch,
)

# Shapes in the letters that `blocks.py` explains. A letter has one size per call.
_CACHE = {"keys": "B Hkv T_max D", "values": "B Hkv T_max D"}
_SKETCH = {"codes": "B Hkv T_max W", "scales": "B Hkv T_max"}  # W bytes a key
SHAPES = {
    "block_bounds": {"keys": "B Hkv T_max D", "lengths": "B"},
    "score_blocks": {"query": "B Hq D", "bounds": "B Hkv 2 D M", "lengths": "B"},
    "select_blocks": {"scores": "B Hkv M", "lengths": "B"},
    "sparse_attention": {"query": "B Hq D", **_CACHE, "indices": "B Hkv N", "lengths": "B"},
    "dense_attention": {"query": "B Hq Q D", **_CACHE, "lengths": "B", "query_lengths": "B"},
    "sketch_keys": {"keys": "B Hkv T_max D"},
    "score_sketch": {"query": "B Hq D", **_SKETCH, "lengths": "B"},
}
# Tensors that share one dtype, and what that may be. Scores are sums, so they have 32 or 64 bits.
DTYPES = {
    ("query", "keys", "values", "bounds", "scales"): checks.FLOATS,
    ("scores",): (torch.float32, torch.float64),
    ("indices",): checks.INTEGERS,
    ("codes",): (torch.uint8,),
}


def checked(ops: Operations, *, limits: Callable[..., None] | None = None) -> Operations:
    """Make operations public: check their arguments first, raising `ValueError` by name.

    `limits(operation, arguments by name, sizes by letter)` refuses what one of them cannot do.
    """

    def check_first(name: str) -> Callable[..., Any]:
        operation = getattr(ops, name)
        parameters = signature(operation)

        # Positional and keyword arguments are checked alike, by their names.
        @wraps(operation)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = parameters.bind(*args, **kwargs)
            sizes = check_arguments(name, bound.arguments)
            if limits is not None:
                limits(name, bound.arguments, sizes)
            return operation(*bound.args, **bound.kwargs)

        return call

    names = [field.name for field in fields(Operations) if getattr(ops, field.name) is not None]
    return Operations(**{name: check_first(name) for name in names})


def check_arguments(name: str, arguments: dict[str, Any]) -> dict[str, int]:
    """Check one operation's arguments against the contract; returns the size of every letter."""
    # Shapes first: every later check may rely on them.
    shapes = SHAPES[name]
    given = {key: arguments.get(key) for key in shapes}
    if given.get("query_lengths", ...) is None:  # the only argument that may be left out
        del given["query_lengths"]
    sizes = checks.bind_shapes(**{key: (tensor, shapes[key]) for key, tensor in given.items()})
    if "query" in given:
        checks.check_heads(sizes["Hq"], sizes["Hkv"])

    # Then dtypes: what is multiplied together shares one.
    for names, allowed in DTYPES.items():
        checks.check_dtypes(allowed, **{key: given[key] for key in names if key in given})

    # Lengths lie within the cache, or within the blocks that there are bounds or scores for.
    block_size = arguments.get("block_size", 1)  # dense attention knows no blocks
    if "config" in arguments:
        block_size = getattr(arguments["config"], "block_size", None)
    block_size = checks.require_integer("block_size", block_size, 1)
    if "block_size" in arguments:  # kernels need Python's own integers
        arguments["block_size"] = block_size
    capacity = sizes["T_max"] if "T_max" in sizes else sizes["M"] * block_size
    if "lengths" in given:
        checks.check_lengths("lengths", given["lengths"], capacity)
    if "query_lengths" in given:
        checks.check_lengths("query_lengths", given["query_lengths"], sizes["Q"])

    # The width of the codes says how many bits a channel has.
    if name == "sketch_keys":
        checks.check_sketch(arguments.get("bits", 2), sizes["D"])
    if name == "score_sketch":
        n_bytes, is_width = sizes["W"], 8 * sizes["W"] in (sizes["D"], 2 * sizes["D"])
        checks.require(is_width, "codes", f"{n_bytes} bytes a key", "1 or 2 bits per channel")
    return sizes


# What `resa.reference` exports under the operations' names.
CHECKED_OPS = checked(REFERENCE_OPS)
