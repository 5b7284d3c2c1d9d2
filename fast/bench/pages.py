"""Kernels through page tables, beside the same kernels over one long cache per sequence.

Keys and values are halves of one pool, as engines have them, and pages lie in random order. What
selection reads lies in pools of its own.
"""

import math
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from resa.reference.config import ReSAConfig

from ..blocks import score_blocks
from ..cache import write_window
from ..estimate import score_rotated
from ..sketch import Sketches, rotate_queries, write_sketched
from .layer import L2_BYTES, OWN_DENSE, Layer, Shape, distance, require_close
from .timing import Time, time_calls

PARTS = ("append", "score", "attend", "refresh", "rectify", OWN_DENSE)


class PagedLayer:
    """A layer's cache moved to pages of `page_size` tokens, and the parts of a cycle over them."""

    def __init__(self, layer: Layer, page_size: int, seed: int) -> None:
        config, (batch, heads, context, d) = layer.config, layer.keys.shape
        n_pages, b = batch * context // page_size, config.block_size
        order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(seed)).int()
        self.table = table = order.view(batch, -1).to(layer.keys.device)

        def moved(cache: Tensor, to: Tensor) -> Tensor:
            """Move [B, Hkv, T_max, …] to its pages in [P, Hkv, N, …]."""
            pages = cache.unflatten(2, (-1, to.shape[2])).transpose(1, 2).flatten(0, 1)
            to[order.long().to(to.device)] = pages
            return to

        pool = layer.keys.new_empty(n_pages, heads, page_size, 2 * d)
        keys, values = moved(layer.keys, pool[..., :d]), moved(layer.values, pool[..., d:])
        append, score = layer.parts["append"], layer.parts["score"]
        if config.kept_bits is None:
            of_blocks = layer.searched.permute(0, 1, 4, 2, 3)  # [B, Hkv, M, 2, D]
            searched = moved(of_blocks, pool.new_empty(n_pages, heads, page_size // b, 2, d))
            score = partial(score_blocks, *score.args[:1], searched, *score.args[2:], table=table)
            write = partial(write_window, keys, values, searched)
        else:
            size = n_pages, heads, page_size
            codes = layer.searched.codes
            codes = moved(codes, codes.new_empty(*size, codes.shape[3]))
            scales = moved(layer.searched.scales, pool.new_empty(size))
            searched = Sketches(codes, scales, config.kept_bits)
            factors = rotate_queries(layer.query, heads, config.kept_bits)
            score = partial(score_rotated, factors, codes, scales, *score.args[3:], table=table)
            write = partial(write_sketched, keys, values, searched)

        def paged(part: partial, *pools: Tensor) -> partial:
            query, rest = part.args[0], part.args[3:]
            return partial(part.func, query, *pools, *rest, table=table, **part.keywords)

        self.parts = {
            "append": partial(write, *append.args[3:], table=table),
            "score": score,
            "attend": paged(layer.parts["attend"], keys, values),
            "refresh": partial(
                write_window, keys, values, searched, *layer.parts["refresh"].args[3:], table=table
            ),
            "rectify": paged(layer.parts["rectify"], keys, values),
            OWN_DENSE: paged(layer.parts[OWN_DENSE], keys, values),
        }


def measure(
    shape: Shape, config: ReSAConfig, batch: int, context: int, page_size: int
) -> dict[str, object]:
    """Time of every part through a page table, of the same over one cache, and their ratios.

    Both rotate over enough caches that sketches, or half of all bounds, exceed twice the L2.
    """
    cache_bytes = 2 * context * shape.token_bytes(batch)
    n_layers = max(1, min(16, math.ceil(2 * L2_BYTES * 2 * config.block_size / cache_bytes)))
    plain = [Layer(shape, config, batch, context, seed) for seed in range(n_layers)]
    paged = [PagedLayer(layer, page_size, seed) for seed, layer in enumerate(plain)]
    for part in ("score", "attend", "rectify", OWN_DENSE):
        error = distance(paged[0].parts[part](), plain[0].parts[part]())
        rounding = 4 * torch.finfo(plain[0].keys.dtype).eps  # of outputs; a sum has other splits
        require_close(part, error, 1e-5 if part == "score" else rounding)

    def each(layers: list, part: str) -> Time:
        calls, pause = [layer.parts[part] for layer in layers], 0
        if part == "rectify":  # at about its duty in decoding, as in `layer.py`
            pause = int(4 * time_calls(calls).us * n_layers)
        return time_calls(calls, pause_us=pause)

    times = {part: (each(plain, part), each(paged, part)) for part in PARTS}
    return {
        "batch": batch,
        "context": context,
        "page_size": page_size,
        "caches": n_layers,
        "contiguous": {part: asdict(time) for part, (time, _) in times.items()},
        "paged": {part: asdict(time) for part, (_, time) in times.items()},
        "ratio": {part: round(ours.us / theirs.us, 3) for part, (theirs, ours) in times.items()},
    }
