"""One layer's attention work while decoding: every part of ReSA, the whole cycle, and dense attention by torch.

A cycle (schedule "fused") is f − 1 sparse steps, each of append, score, select, attend, and one dense pass over f
tokens with a refresh of the bounds it touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resa.reference import attention as plain
from resa.reference import blocks as plain_blocks
from resa.reference.checks import require
from resa.reference.config import ReSAConfig

from ..attention import count_dense_units, enqueue_dense, enqueue_sparse
from ..blocks import block_bounds, enqueue_scores, enqueue_selection
from ..bookkeeping import enqueue_plan
from ..bounds8 import compress_bounds
from ..cache import enqueue_write
from ..generate import SparseStep, attend_sparsely
from .timing import Time, time_calls

L2_BYTES = 50e6
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """The shape of one layer's attention."""

    query_heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    dtype: str = "float16"


class Layer:
    """One layer's cache of `batch` sequences of `context` tokens each, all but the last window already in it."""

    def __init__(self, shape: Shape, config: ReSAConfig, batch: int, context: int, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        heads, size, dtype, f = shape.kv_heads, shape.head_dim, getattr(torch, shape.dtype), config.interval

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device="cuda", dtype=dtype)

        def lengths(value: int) -> Tensor:
            return torch.full((batch,), value, dtype=torch.int32, device="cuda")

        self.config = config
        self.keys, self.values = normal(batch, heads, context, size), normal(batch, heads, context, size)
        self.query, self.key, self.value = normal(batch, shape.query_heads, size), *normal(2, batch, heads, 1, size)
        self.window_query = normal(batch, shape.query_heads, f, size)
        self.window_key, self.window_value = normal(2, batch, heads, f, size)
        self.end, self.window_start, self.window_lengths = lengths(context), lengths(context - f), lengths(f)
        self.bounds = block_bounds(self.keys, self.end, config.block_size)
        self.bounds8 = compress_bounds(self.bounds)
        group = shape.query_heads // heads
        units = max(batch * heads, count_dense_units(self.keys, group, f))
        self.arrivals = torch.zeros(units, dtype=torch.int32, device="cuda")
        stepping = torch.ones(batch, dtype=torch.bool, device="cuda")
        plan = enqueue_plan(self.end - 1, torch.zeros_like(self.end), stepping, config)
        self.plan = SparseStep(*plan, config, self.arrivals, torch.cuda.Stream())
        self.scores = self.score()
        self.indices = self.select()

    def append(self) -> None:
        """One token into the cache, and the bounds of its block."""
        cached = self.keys, self.values, self.bounds
        enqueue_write(*cached, self.key, self.value, self.plan.start, self.end, self.config.block_size)

    def score(self) -> Tensor:
        """Scores of all blocks before the newest."""
        return enqueue_scores(self.query, self.bounds, self.plan.completed, self.config.block_size)

    def score8(self) -> Tensor:
        """The same from bounds in 8 bits."""
        return enqueue_scores(self.query, self.bounds8, self.plan.completed, self.config.block_size)

    def select(self) -> Tensor:
        """The blocks to attend."""
        return enqueue_selection(self.scores, self.end, self.plan.counts, self.config)

    def attend(self) -> Tensor:
        """Sparse attention over the blocks selected."""
        selected = self.indices, self.plan.counts, self.end
        b = self.config.block_size
        return enqueue_sparse(self.query, self.keys, self.values, *selected, b, self.arrivals)[0]

    def step(self) -> Tensor:
        """Append, score, select, attend, as the decode loop has them."""
        cached = self.keys, self.values, self.bounds
        return attend_sparsely(self.plan, self.query, self.key, self.value, *cached)

    def refresh(self) -> None:
        """A window into the cache, and the bounds of the blocks it touches."""
        cached = self.keys, self.values, self.bounds
        window = self.window_key, self.window_value
        enqueue_write(*cached, *window, self.window_start, self.end, self.config.block_size)

    def rectify(self) -> Tensor:
        """Dense attention of a window over the whole cache."""
        cached = self.keys, self.values
        return enqueue_dense(self.window_query, *cached, self.end, self.window_lengths, self.arrivals)[0]

    def own_dense(self) -> Tensor:
        """Dense attention of one token by this project's kernel, which `dense_below` decodes with."""
        query, one = self.query[:, :, None], torch.ones_like(self.end)
        return enqueue_dense(query, self.keys, self.values, self.end, one, self.arrivals)[0][:, :, 0]

    def dense(self, backend: SDPBackend) -> Tensor:
        """Dense attention of one token by torch."""
        with sdpa_kernel(backend):
            query = self.query[:, :, None]
            return F.scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)[:, :, 0]

    def check(self) -> dict[str, float]:
        """How far each part is from the reference for the last sequence; `ValueError` where it is too far."""
        b, last = self.config.block_size, slice(-1, None)
        cached, end = (self.keys[last], self.values[last]), self.end[last]
        self.refresh()
        self.append()
        bounds = plain_blocks.block_bounds(cached[0], end, b)
        errors = {"bounds": float((self.bounds[last] != bounds).sum())}
        scores = plain_blocks.score_blocks(self.query[last], bounds, self.plan.completed[last], b)
        errors["score"] = distance(self.score()[last], scores)
        selected = plain_blocks.select_blocks(self.scores[last], end, self.config)
        errors["select"] = float((self.select()[last] != selected).sum())
        expected = plain.sparse_attention(self.query[last], *cached, self.indices[last], end, b)
        errors["attend"] = distance(self.attend()[last], expected)
        expected = plain.dense_attention(self.window_query[last], *cached, end)
        errors["rectify"] = distance(self.rectify()[last], expected)
        expected = plain.dense_attention(self.query[last][:, :, None], *cached, end)[:, :, 0]
        errors["own_dense"] = distance(self.own_dense()[last], expected)
        for name, backend in BACKENDS.items():
            errors[name] = distance(self.dense(backend)[last], expected)
        limits = {"bounds": 0, "select": 0, "score": 1e-5}
        rounding = 4 * torch.finfo(self.keys.dtype).eps  # of probabilities and outputs
        for name, error in errors.items():
            limit = limits.get(name, rounding)
            require(error <= limit, name, f"error {error:.2g}", f"at most {limit:.2g} before it is timed")
        return errors


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over finite elements, the infinite ones being equal."""
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]):
        return math.inf
    difference = (actual[finite].double() - expected[finite].double()).norm()
    return (difference / expected[finite].double().norm().clamp(min=1e-30)).item()


def measure(shape: Shape, config: ReSAConfig, batch: int, context: int) -> dict[str, object]:
    """Every part's time, the cycle's per token, and dense attention's, over enough layers to defeat the caches."""
    itemsize = getattr(torch, shape.dtype).itemsize
    cache_bytes = 2 * batch * shape.kv_heads * context * shape.head_dim * itemsize
    # As many caches, up to a deep model's layers, as it takes for the least of what is read, half the bounds, to pass
    # through the L2 twice before one comes round again.
    half_bounds = cache_bytes / (2 * config.block_size)
    n_layers = max(1, min(64, math.ceil(2 * L2_BYTES / half_bounds), int(30e9 / cache_bytes)))
    layers = [Layer(shape, config, batch, context, seed) for seed in range(n_layers)]
    errors = layers[0].check()
    f = config.interval

    def each(part: str) -> Time:
        return time_calls([getattr(layer, part) for layer in layers])

    parts = {part: each(part) for part in ("append", "score", "select", "attend", "refresh")}
    parts["score, 8-bit bounds"] = each("score8")
    parts["dense, this project's kernel"] = each("own_dense")
    # Decoding rectifies once in f steps, so the pass is timed at about that duty.
    passes = [layer.rectify for layer in layers]
    sustained = time_calls(passes)
    parts["rectify"] = time_calls(passes, pause_us=int(4 * sustained.us * len(passes)))
    parts["rectify, without a pause"] = sustained
    dense = {name: time_calls(_bound(layers, backend)) for name, backend in BACKENDS.items()}
    sparse = sum(parts[part].us for part in ("append", "score", "select", "attend"))
    cycle = time_calls([lambda: _cycle(layers, f)], divide_by=f)
    best = min(dense.values(), key=lambda time: time.us)
    return {
        "batch": batch,
        "context": context,
        "cache_bytes": cache_bytes,
        "caches": n_layers,
        "errors": errors,
        "parts": {name: asdict(time) for name, time in parts.items()},
        "sum_us": round(((f - 1) * sparse + parts["rectify"].us + parts["refresh"].us) / f, 3),
        "resa": asdict(cycle),
        "dense": {name: asdict(time) for name, time in dense.items()},
        "dense_us": best.us,
        "resa_us": cycle.us,
        "ratio": round(best.us / cycle.us, 3),
    }


def _bound(layers: list[Layer], backend: SDPBackend) -> list[Callable[[], Tensor]]:
    return [lambda layer=layer: layer.dense(backend) for layer in layers]


def _cycle(layers: list[Layer], f: int) -> None:
    """f tokens of one layer, each step over another cache, as it is when a model's other layers come in between."""
    for step in range(f - 1):
        layers[step % len(layers)].step()
    layers[-1].refresh()
    layers[-1].rectify()


def floors(shape: Shape, config: ReSAConfig, batch: int, context: int) -> dict[str, float]:
    """Bytes that each part can't avoid moving: half the bounds, the scores, the selected blocks, the cache."""
    itemsize, rows = getattr(torch, shape.dtype).itemsize, batch * shape.kv_heads
    n_blocks = math.ceil(context / config.block_size)
    cache = 2 * rows * context * shape.head_dim * itemsize
    selected = int(plain_blocks.active_blocks(torch.tensor([context]), config)) / n_blocks
    bounds = rows * n_blocks * shape.head_dim * itemsize
    return {
        "score": bounds,
        "score, 8-bit bounds": bounds // itemsize,
        "select": rows * n_blocks * 4,
        "attend": selected * cache,
        "rectify": cache,
        "dense, this project's kernel": cache,
    }
