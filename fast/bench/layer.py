"""One layer's attention while decoding: every part of ReSA, whole cycles, dense attention by torch.

A cycle (schedule "fused") is f − 1 sparse steps, each of append, score, select, attend, and one
dense pass over f tokens with a refresh of the bounds it touched.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resa.reference import attention as plain
from resa.reference import blocks as plain_blocks
from resa.reference import sketch as plain_sketch
from resa.reference.checks import require
from resa.reference.config import ReSAConfig

from ..attention import count_split_counters, dense_attention, sparse_attention
from ..blocks import block_bounds, score_blocks, select_blocks
from ..cache import write_window
from ..estimate import score_rotated
from ..generate import SparseStep, attend_sparsely
from ..gpu.bookkeeping import plan_step
from ..gpu.bounds8 import compress_bounds
from ..sketch import Sketches, rotate_queries, sketch_keys, write_sketched
from .timing import Time, time_calls

L2_BYTES = 50e6
OWN_DENSE = "dense, this project's kernel"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """The shape of one layer's attention."""

    query_heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    dtype: str = "float16"

    def token_bytes(self, batch: int) -> int:
        """Bytes of one token's keys, or values, in all sequences."""
        return batch * self.kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize


def torch_dense(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Dense attention of one token by torch."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


class Layer:
    """One layer's cache of `batch` sequences of `context` random tokens, and each part of a cycle
    on it.
    """

    def __init__(
        self, shape: Shape, config: ReSAConfig, batch: int, context: int, seed: int,
        device: str = "cuda",
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)
        heads, size, f, b = shape.kv_heads, shape.head_dim, config.interval, config.block_size

        def normal(*sizes: int) -> Tensor:
            dtype = getattr(torch, shape.dtype)
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        def lengths(value: int) -> Tensor:
            return torch.full((batch,), value, dtype=torch.int32, device=device)

        # The cache, the token of a step and the window of a dense pass.
        self.config, self.end = config, lengths(context)
        self.keys = normal(batch, heads, context, size)
        self.values = normal(batch, heads, context, size)
        self.query = normal(batch, shape.query_heads, size)
        self.token = token = normal(2, batch, heads, 1, size)
        self.window_query = normal(batch, shape.query_heads, f, size)
        window = normal(2, batch, heads, f, size)
        if config.kept_bits is None:
            self.searched = block_bounds(self.keys, self.end, b)
        else:
            self.searched = Sketches(*sketch_keys(self.keys, config.kept_bits), config.kept_bits)

        # The step as the decode loop plans it.
        dense = count_split_counters(self.keys, shape.query_heads // heads, f)
        counters = torch.zeros(max(batch * heads, dense), dtype=torch.int32, device=device)
        running = torch.ones(batch, dtype=torch.bool, device=device)
        self.plan = plan = plan_step(self.end - 1, torch.zeros_like(self.end), running, config)
        if config.kept_bits is None:
            score = partial(score_blocks, self.query, self.searched, plan.completed, b)
        else:
            stored = self.searched.codes, self.searched.scales
            factors = rotate_queries(self.query, heads, config.kept_bits)
            score = partial(score_rotated, factors, *stored, plan.visible, b)
        self.scores = score()
        self.indices = select_blocks(self.scores, self.end, config, counts=plan.counts)
        cached, table = (self.keys, self.values), (self.keys, self.values, self.searched)
        side_stream = torch.cuda.Stream() if device == "cuda" else None
        step = SparseStep(plan, config, counters, side_stream)
        append = partial(write_window, *table, *token, plan.start, self.end, b)
        if config.kept_bits is not None:  # queries are rotated beside it
            append = partial(write_sketched, *table, *token, plan.start, self.end, self.query)

        # Every part as a call without arguments (none holds this layer, which would keep its memory
        # until the garbage collector comes). "step" is append, score, select and attend as the
        # decode loop has them.
        self.parts = {
            "append": append,
            "score": score,
            "select": partial(select_blocks, self.scores, self.end, config, counts=plan.counts),
            "attend": partial(
                sparse_attention, self.query, *cached, self.indices, self.end, b,
                counts=plan.counts, split_counters=counters,
            ),
            "step": partial(attend_sparsely, step, self.query, *token, *table),
            "refresh": partial(write_window, *table, *window, lengths(context - f), self.end, b),
            "rectify": partial(
                dense_attention, self.window_query, *cached, self.end,
                query_lengths=lengths(f), split_counters=counters,
            ),
            OWN_DENSE: partial(
                dense_attention, self.query[:, :, None], *cached, self.end,
                query_lengths=lengths(1), split_counters=counters,
            ),
        }  # fmt: skip
        if config.kept_bits is None:
            bounds8 = compress_bounds(self.searched)
            score = partial(score_blocks, self.query, bounds8, plan.completed, b)
            self.parts["score, 8-bit bounds"] = score
        for name, backend in BACKENDS.items():
            self.parts[name] = partial(torch_dense, backend, self.query[:, :, None], *cached)

    def check(self) -> dict[str, float]:
        """Each part's distance from the reference, for the last sequence; refused if too far."""
        b, last = self.config.block_size, slice(-1, None)
        self.parts["refresh"]()
        self.parts["append"]()
        cached, end, query = (self.keys[last], self.values[last]), self.end[last], self.query[last]
        stored = zip((self.keys, self.values), self.token, strict=True)
        errors = {"append": float(sum((cache[:, :, -1:] != new).sum() for cache, new in stored))}
        if self.config.kept_bits is None:
            bounds = plain_blocks.block_bounds(cached[0], end, b)
            errors["bounds"] = float((self.searched[last] != bounds).sum())
            score = plain_blocks.score_blocks(query, bounds, self.plan.completed[last], b)
        else:
            kept = self.searched.codes[last], self.searched.scales[last]
            codes, _ = plain_sketch.sketch_keys(cached[0], self.config.kept_bits)
            errors["codes"] = float((kept[0] != codes).any(dim=-1).float().mean())
            score = plain_sketch.score_sketch(query, *kept, end, b)
        right = {
            "score": score,
            "select": plain_blocks.select_blocks(self.scores[last], end, self.config),
            "attend": plain.sparse_attention(query, *cached, self.indices[last], end, b),
            "rectify": plain.dense_attention(self.window_query[last], *cached, end),
        }
        dense = plain.dense_attention(query[:, :, None], *cached, end)
        right |= dict.fromkeys((OWN_DENSE, *BACKENDS), dense)
        for name, expected in right.items():
            errors[name] = distance(self.parts[name]()[last], expected)

        # A channel within rounding of a threshold may have either code; sums of exponentials round.
        limits = {"append": 0, "bounds": 0, "select": 0, "codes": 1e-3}
        limits["score"] = 1e-5 if self.config.kept_bits is None else 1e-3
        rounding = 4 * torch.finfo(self.keys.dtype).eps  # of probabilities and outputs
        for name, error in errors.items():
            require_close(name, error, limits.get(name, rounding))
        return errors


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over finite elements; infinite ones must be equal."""
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]):
        return math.inf
    difference = (actual[finite].double() - expected[finite].double()).norm()
    return (difference / expected[finite].double().norm().clamp(min=1e-30)).item()


def require_close(name: str, error: float, limit: float) -> None:
    """Refuse to time what computes something else."""
    allowed = f"at most {limit:.2g} before it is timed"
    require(error <= limit, name, f"error {error:.2g}", allowed)


def measure(
    shape: Shape, config: ReSAConfig, batch: int, context: int, bandwidth: float
) -> dict[str, object]:
    """Time of every part, of a cycle per token, and of dense attention, in µs.

    Beside the parts stands the time for their bytes at `bandwidth` TB/s. It rotates over enough
    caches that half their bounds exceed twice the L2, up to 64.
    """
    cache_bytes = 2 * context * shape.token_bytes(batch)
    half_bounds = cache_bytes / (2 * config.block_size)
    n_layers = max(1, min(64, math.ceil(2 * L2_BYTES / half_bounds), int(30e9 / cache_bytes)))
    layers = [Layer(shape, config, batch, context, seed) for seed in range(n_layers)]
    errors, f = layers[0].check(), config.interval

    def each(part: str, **options: int) -> Time:
        return time_calls([layer.parts[part] for layer in layers], **options)

    # Parts. Decoding rectifies once in f steps, so the pass is timed at about that duty.
    names = ("append", "score", "select", "attend", "refresh", "score, 8-bit bounds", OWN_DENSE)
    parts = {part: each(part) for part in names if part in layers[0].parts}
    sustained = each("rectify")
    parts["rectify"] = each("rectify", pause_us=int(4 * sustained.us * n_layers))
    parts["rectify, without a pause"] = sustained

    # Wholes.
    dense = {name: each(name) for name in BACKENDS}
    sparse = sum(parts[part].us for part in ("append", "score", "select", "attend"))
    cycle = time_calls([lambda: _cycle(layers, f)], divide_by=f)
    best = min(time.us for time in dense.values())
    bytes_moved = floors(shape, config, batch, context)
    return {
        "batch": batch,
        "context": context,
        "interval": f,
        "cache_bytes": cache_bytes,
        "caches": n_layers,
        "errors": errors,
        "parts": {name: asdict(time) for name, time in parts.items()},
        "sum_us": round(((f - 1) * sparse + parts["rectify"].us + parts["refresh"].us) / f, 3),
        "resa": asdict(cycle),
        "dense": {name: asdict(time) for name, time in dense.items()},
        "dense_us": best,
        "resa_us": cycle.us,
        "ratio": round(best / cycle.us, 3),
        "floor_us": {part: round(n / bandwidth / 1e6, 3) for part, n in bytes_moved.items()},
    }


def _cycle(layers: list[Layer], f: int) -> None:
    """f tokens of one layer, each step over another cache, as if other layers came in between."""
    for step in range(f - 1):
        layers[step % len(layers)].parts["step"]()
    layers[-1].parts["refresh"]()
    layers[-1].parts["rectify"]()


def floors(shape: Shape, config: ReSAConfig, batch: int, context: int) -> dict[str, float]:
    """Bytes that each part must move: half the bounds or all sketches, scores, selected blocks, the
    cache.
    """
    token, itemsize = shape.token_bytes(batch), getattr(torch, shape.dtype).itemsize
    n_blocks, cache = math.ceil(context / config.block_size), 2 * context * token
    selected = (
        int(plain_blocks.active_blocks(torch.tensor([context], device="cpu"), config)) / n_blocks
    )
    searched = {"score": n_blocks * token, "score, 8-bit bounds": n_blocks * token // itemsize}
    if config.kept_bits is not None:
        a_key = shape.head_dim * config.kept_bits // 8 + itemsize  # its code and its scale
        searched = {"score": context * batch * shape.kv_heads * a_key}
    return {
        **searched,
        "select": batch * shape.kv_heads * n_blocks * 4,
        "attend": selected * cache,
        "rectify": cache,
        OWN_DENSE: cache,
    }
