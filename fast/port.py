"""The Triton path as a port, for `resa conformance resa.fast.port`, also with TRITON_INTERPRET=1.

Its operations are the public ones. A trace runs through the decode loop of `generate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resa.conformance.port import (
    as_numpy,
    attend,
    build_model,
    decode_requests,
    entry,
    shape_of,
    trace_attention,
)  # fmt: skip
from resa.reference import Generation, GPTConfig, ReSAConfig, Sampling

from .cache import BatchedCache, write_window
from .generate import DecodeLoop, check_model, generate, open_cache, passes, prefill
from .gpu.limits import INTERPRETED
from .model import accelerated
from .operations import CHECKED_OPS, TRITON_OPS
from .sampling import Sampler
from .sketch import Sketches

if not (INTERPRETED or torch.cuda.is_available()):
    raise ImportError("resa.fast.port needs an NVIDIA GPU, or TRITON_INTERPRET=1")
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes with bfloat16's bits as if they were integers, and long contexts take it
# too long. No kernel takes float64, or head dimensions that are no powers of two.
GRADES = ("fp16", "batch") if INTERPRETED else ("fp16", "bf16", "batch", "long")

block_bounds = as_numpy(CHECKED_OPS.block_bounds, DEVICE)
score_blocks = as_numpy(CHECKED_OPS.score_blocks, DEVICE)
select_blocks = as_numpy(CHECKED_OPS.select_blocks, DEVICE)
sparse_attention = as_numpy(CHECKED_OPS.sparse_attention, DEVICE)
dense_attention = as_numpy(CHECKED_OPS.dense_attention, DEVICE)
sketch_keys = as_numpy(CHECKED_OPS.sketch_keys, DEVICE)
score_sketch = as_numpy(CHECKED_OPS.score_sketch, DEVICE)


@torch.no_grad()
def decode_trace(
    weights: Mapping, model_config: Mapping, prompt: Sequence[int], config: Mapping
) -> list[dict]:
    """Greedy generation: one entry after the prefill and one after every step."""
    settings = dict(config)
    n_tokens, resa_config = settings.pop("max_new_tokens"), ReSAConfig(**settings)
    if n_tokens == 0:
        return []
    model = build_model(weights, model_config, device=DEVICE)
    check_model(model, resa_config, 1)
    model, longer = accelerated(model), n_tokens + 1  # longer, so that no token ends the sequence
    cache, feed = open_cache(model, [prompt], longer, resa_config, None)
    logits = prefill(model, feed, cache)

    sampler = Sampler(Sampling(), [None], longer, logits.device)
    loop = DecodeLoop(model, cache, longer, resa_config, sampler, ())
    trace: list[dict] = []
    loop.choose(logits, loop.running, cache.lengths, is_sparse=False)
    loop.selected = []
    for rectifies in passes(resa_config):
        sequence = cache.sequence(0, int(cache.lengths[0]))
        generation = Generation([int(loop.pending[0])], sequence, int(loop.n_drifted[0]))
        trace.append(entry(generation, loop.selected))
        if len(trace) == n_tokens:
            break
        loop.selected.clear()
        loop.step(rectifies)
    return trace


def decode_batch(
    weights: Mapping, model_config: Mapping, requests: Sequence[Mapping], config: Mapping
) -> list[dict]:
    """Greedy generation of many requests → what each leaves: its tokens, its cache and w."""
    model = build_model(weights, model_config, device=DEVICE)
    return decode_requests(generate, model, requests, config)


def choose_token(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float, u: np.ndarray
) -> np.ndarray:
    """Choose a token per row of logits [B, V] by the uniform numbers u [B] → [B]."""
    sampler = Sampler(Sampling(temperature, top_p, top_k), [torch.Generator()] * len(u), 1, DEVICE)
    sampler.uniforms = torch.from_numpy(u)[:, None].to(DEVICE)  # in place of the generators'
    first = torch.zeros(len(u), dtype=torch.int64, device=DEVICE)
    return sampler(torch.from_numpy(logits).to(DEVICE), first).cpu().numpy()


def attention_trace(passes: Sequence[Mapping], config: Mapping) -> list[dict[str, Any]]:
    """Attention alone: every pass writes its rows to the cache, then attends."""

    def new_cache(shape: GPTConfig, capacity: int, *kept: Any, device: str) -> BatchedCache:
        return BatchedCache.empty(shape, 1, capacity, *kept, dtype=torch.float32, device=device)

    return trace_attention(passes, config, new_cache, _write_rows, TRITON_OPS, DEVICE)


def paged_trace(
    passes: Sequence[Mapping], config: Mapping, n_pages: int, page_size: int
) -> list[dict[str, Any]]:
    """Attention alone, in pages: keys and values are halves of one pool."""
    config, shape, results = ReSAConfig(**config), shape_of(passes), []
    d, b, bits = shape.head_dim, config.block_size, config.kept_bits
    size = shape.n_layer, n_pages, shape.n_kv_head, page_size
    pool, lengths = torch.full((*size, 2 * d), torch.nan, device=DEVICE), torch.zeros(0)
    bounds = sketches = None
    if bits is None:
        bounds = torch.full((*size[:3], page_size // b, 2, d), torch.nan, device=DEVICE)
    else:
        codes = torch.zeros(*size, d * bits // 8, dtype=torch.uint8, device=DEVICE)
        sketches = Sketches(codes, torch.full(size, torch.nan, device=DEVICE), bits)
    cache = BatchedCache(pool[..., :d], pool[..., d:], bounds, lengths, b, sketches)

    for each in passes:
        table = torch.tensor([each["table"]], dtype=torch.int32, device=DEVICE)
        names = "score_blocks", "sparse_attention", "dense_attention", "score_sketch"
        paged = {name: partial(getattr(TRITON_OPS, name), table=table) for name in names}
        write = partial(_write_rows, table=table)
        results.append(attend(each, cache, config, write, replace(TRITON_OPS, **paged), DEVICE))
    return results


def _write_rows(
    cache: BatchedCache, layer: int, start: int, keys: Tensor, values: Tensor, **options: Any
) -> None:
    ends = (torch.tensor([at], device=DEVICE) for at in (start, start + keys.shape[2]))
    rows = cache.keys[layer], cache.values[layer], cache.searched(layer), keys, values
    write_window(*rows, *ends, cache.block_size, **options)
