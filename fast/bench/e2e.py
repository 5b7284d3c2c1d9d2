"""Whole decoding steps of a model, from the token fed to the token chosen.

Dense, sparse and rectified decoding run the same weights through the same fused layers and the same
sampler, in CUDA graphs. Dense attention is torch's, the faster of its backends. The other two are
the decode loop that `resa.fast.generate` runs.

Every sequence is decoded at one length: after each cycle of f tokens the caches are set back, so
that the cycle ends where the cache does. Under the protocol *shared* all layers use one layer's
cache, as the paper does to fit large batches; every layer still reads and writes all of it. Under
*true* every layer has its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resa.reference.checks import free_memory
from resa.reference.config import GPTConfig, ReSAConfig
from resa.reference.model import GPT
from resa.reference.sampling import Sampling

from ..blocks import block_bounds
from ..cache import BatchedCache
from ..generate import DecodeLoop, passes
from ..gpu.bounds8 import compress_bounds
from ..gpu.elementwise import add_norm, split_heads, swiglu
from ..gpu.graphs import capture
from ..gpu.limits import INTERPRETED
from ..model import FusedGPT, FusedLayer, Linear
from ..sampling import Sampler
from ..sketch import Sketches, sketch_keys
from .four_bit import FourBitLinear, quantise, round_to_four_bits, widened
from .layer import BACKENDS, Shape, distance, floors, require_close
from .shapes import QWEN_7B
from .timing import Time, elapsed, time_calls

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.7, top_p=0.95)
SAMPLES, ENOUGH_US = 15, 1e6  # samples of a cycle, fewer once they have taken that long
MIN_SAMPLES = 5


def build(weights: str, shape: GPTConfig = QWEN_7B) -> FusedGPT:
    """A model of random weights on the GPU, "float16", "bfloat16", or "int4": float16 rounded."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if weights == "bfloat16" else torch.float16)
    try:
        with torch.device("cuda"):
            model = FusedGPT(GPT(shape).requires_grad_(False))
    finally:
        torch.set_default_dtype(before)
    if weights == "int4":
        plain = {**model.fused[-1].matmuls(), "output": model.output}
        quantise(model)
        check_four_bits(plain, {**model.fused[-1].matmuls(), "output": model.output})
    return model


def new_cache(
    model: FusedGPT, config: ReSAConfig, batch: int, context: int, *, is_shared: bool
) -> BatchedCache:
    """A full cache of random keys and values; if shared, one layer's memory stands for all."""
    shape, like, b = model.config, model.embed.weight, config.block_size
    layers = 1 if is_shared else shape.n_layer
    both = like.new_empty(layers, 2, batch, shape.n_kv_head, context, shape.head_dim)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=like.device)
    bits, searched, rounded = config.kept_bits, [], []
    for layer in range(layers):
        keys = both[layer].normal_()[0]
        found = (block_bounds(keys, lengths, b),) if bits is None else sketch_keys(keys, bits)
        if config.eight_bit_bounds:
            rounded.append(compress_bounds(*found))
            continue
        searched = searched or [tensor.new_empty(layers, *tensor.shape) for tensor in found]
        for stored, tensor in zip(searched, found, strict=True):
            stored[layer] = tensor
    both, *searched = (
        tensor.expand(shape.n_layer, *tensor.shape[1:]) for tensor in (both, *searched)
    )
    if config.eight_bit_bounds:
        searched = [rounded * (shape.n_layer // layers)]
    if bits is None:
        return BatchedCache(both[:, 0], both[:, 1], *searched, lengths, b)
    return BatchedCache(both[:, 0], both[:, 1], None, lengths, b, Sketches(*searched, bits))


def new_sampler(model: FusedGPT, sampling: Sampling, batch: int, tokens: int) -> Sampler:
    """A sampler for so many tokens of so many sequences."""
    own = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    return Sampler(sampling, own, tokens, model.embed.weight.device)


class DenseStep:
    """Dense decoding by torch of one token per sequence, which takes the caches' last place."""

    def __init__(
        self, model: FusedGPT, cache: BatchedCache, sampling: Sampling, backend: SDPBackend
    ) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.sampler = new_sampler(model, sampling, len(cache.lengths), 1)
        self.pending = torch.ones_like(cache.lengths, dtype=torch.int64)
        self.n_chosen = torch.zeros_like(self.pending)
        self.position = cache.lengths[:, None] - 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append, in one copy, then attend to everything."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        as_one(keys[:, :, -1:], values[:, :, -1:]).copy_(as_one(key, value))
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    @torch.no_grad()
    def __call__(self) -> None:
        """Take one step, from the token fed to the token chosen."""
        hidden = self.model.hidden_states(self.pending[:, None], self.position, self.attend)
        self.pending.copy_(self.sampler(self.model.output(hidden[:, 0]), self.n_chosen))


class DenseCycle:
    """f dense steps, a graph each, as the decode loop launches its own."""

    def __init__(self, step: DenseStep, *, f: int) -> None:
        self.step, self.f = step, f
        step()  # compiles
        self.launch = step if INTERPRETED else capture(step).replay

    def __call__(self) -> None:
        """Take f steps."""
        for _ in range(self.f):
            self.launch()


def as_one(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors of one shape in one memory as one tensor [2, …], so that one copy moves both."""
    gap = second.storage_offset() - first.storage_offset()
    return first.as_strided((2, *first.shape), (gap, *first.stride()))


class Cycle:
    """f steps of the decode loop that end where the cache does."""

    def __init__(
        self, model: FusedGPT, cache: BatchedCache, config: ReSAConfig, sampling: Sampling,
        *, f: int,
    ) -> None:  # fmt: skip
        self.cache, self.f = replace(cache, lengths=cache.lengths.clone()), f
        self.start = cache.lengths - f
        batch, tokens = len(self.start), f * (SAMPLES + 5)  # more than are chosen: nothing ends
        sampler = new_sampler(model, sampling, batch, tokens)
        self.loop = DecodeLoop(model, self.cache, tokens, config, sampler, ())
        self.passes = list(islice(passes(config), f))
        first = model.embed.weight.new_zeros(batch, model.config.vocab_size)
        self.loop.choose(first, self.loop.running, self.cache.lengths, is_sparse=False)

    @torch.no_grad()
    def __call__(self) -> None:
        """Decode f tokens per sequence. The first two calls compile and capture."""
        self.cache.lengths.copy_(self.start)
        for rectifies in self.passes:
            self.loop.launch(rectifies)


def check_four_bits(plain: Mapping[str, Linear], rounded: Mapping[str, FourBitLinear]) -> None:
    """Refuse products in 4 bits that are not those of the rounded weights."""
    for name, linear in plain.items():
        exact = Linear(widened(*round_to_four_bits(linear.weight)), linear.bias)
        for rows in (1, 8, 16, 32, 256):  # of steps, of rectifications
            x = linear.weight.new_empty(rows, linear.weight.shape[1]).normal_()
            error = distance(rounded[name](x), exact(x))
            require_close(f"int4 {name}", error, 4 * torch.finfo(x.dtype).eps)


def measure(
    model: FusedGPT, config: ReSAConfig, batch: int, context: int, bandwidth: float,
    *, is_shared: bool,
) -> dict[str, object]:  # fmt: skip
    """Time per token of the three ways to decode at one batch and context, in µs.

    Beside them stands the time for the bytes that they must read, at `bandwidth` TB/s.
    """
    f, cache = config.interval, new_cache(model, config, batch, context, is_shared=is_shared)
    dense = {}
    for name, backend in BACKENDS.items():
        dense[name] = time_cycle(DenseCycle(DenseStep(model, cache, SAMPLED, backend), f=f))
    never = replace(config, interval=None)
    sparse = time_cycle(Cycle(model, cache, never, SAMPLED, f=f))
    resa = time_cycle(Cycle(model, cache, config, SAMPLED, f=f))
    best = min(time.us for time in dense.values())
    return {
        "protocol": "shared" if is_shared else "true",
        "batch": batch,
        "context": context,
        "interval": f,
        "memory_bytes": torch.cuda.memory_allocated(),
        "dense": {name: asdict(time) for name, time in dense.items()},
        "sparse": asdict(sparse),
        "resa": asdict(resa),
        "dense_us": best,
        "ratio": round(best / resa.us, 3),
        "sparse_ratio": round(best / sparse.us, 3),
        "floor_us": floors_us(model, config, batch, context, bandwidth),
    }


def time_cycle(cycle: Cycle | DenseCycle) -> Time:
    """Microseconds per token over whole cycles."""
    cycle()
    cycle()  # captures
    samples = []
    while len(samples) < SAMPLES:
        samples.append(elapsed(cycle) / cycle.f)
        if len(samples) >= MIN_SAMPLES and sum(samples) * cycle.f >= ENOUGH_US:
            break
    return Time.of(samples)


def measure_parts(model: FusedGPT, config: ReSAConfig, batch: int) -> dict[str, dict[str, float]]:
    """Microseconds of the work besides attention, per layer and once per step."""
    parts = {}
    for name, rows in (("step", 1), ("rectification", config.interval)):
        kinds = ("matrix products", "elementwise work")
        for kind, work in zip(kinds, layer_work(model, batch, rows), strict=True):
            time = time_calls([partial(work, layer) for layer in model.fused])
            parts[f"{name}: {kind}, per layer"] = time

    last = model.embed.weight.new_empty(batch, model.config.hidden_size).normal_()
    parts["output projection"] = time_calls([lambda: model.output(last)])
    logits = model.output(last)
    n_chosen = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    for name, sampling in (("greedy", GREEDY), ("temperature 0.7, top_p 0.95", SAMPLED)):
        sampler = new_sampler(model, sampling, batch, 1)
        parts[f"sampling, {name}"] = time_calls([partial(sampler, logits, n_chosen)])
    return {name: asdict(time) for name, time in parts.items()}


def layer_work(
    model: FusedGPT, batch: int, rows: int
) -> tuple[Callable[[FusedLayer], None], Callable[[FusedLayer], None]]:
    """A layer's matrix products, and the work between them, of random rows [batch, rows, in]."""
    shape, like = model.config, model.embed.weight
    inner, heads, eps = shape.intermediate_size, (shape.n_head, shape.n_kv_head), shape.norm_eps
    sizes = shape.hidden_size, shape.hidden_size, shape.n_head * shape.head_dim, inner
    x, delta, attended, gated = (like.new_empty(batch, rows, n).normal_() for n in sizes)
    projected, gate_up = model.fused[0].qkv(x), model.fused[0].gate_up(x)
    angles = torch.rand(batch, 1, rows, shape.head_dim // 2, device=like.device)

    def products(layer: FusedLayer) -> None:
        layer.qkv(x)
        layer.o(attended)
        layer.gate_up(x)
        layer.down(gated)

    def between(layer: FusedLayer) -> None:
        add_norm(x, delta, layer.attn_norm, eps)
        split_heads(projected, angles, angles, *heads, *layer.head_norms, eps)
        add_norm(x, delta, layer.mlp_norm, eps)
        swiglu(gate_up)

    return products, between


def floors_us(
    model: FusedGPT, config: ReSAConfig, batch: int, context: int, bandwidth: float
) -> dict[str, float]:
    """Microseconds per token, at `bandwidth` TB/s, for the bytes that a step must read.

    These are the weights, and of the cache half the bounds, or the sketches, and the selected
    blocks in a sparse step, all of it in a dense one.
    """
    shape, f, weights = model.config, config.interval, weight_bytes(model)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    layer = Shape(shape.n_head, shape.n_kv_head, shape.head_dim, dtype)
    parts = floors(layer, config, batch, context)
    dense = shape.n_layer * parts["rectify"]
    scored = "score, 8-bit bounds" if config.eight_bit_bounds else "score"
    sparse = shape.n_layer * (parts[scored] + parts["attend"])
    read = {"dense": dense, "sparse": sparse, "resa": ((f - 1) * sparse + dense) / f}
    return {name: round((weights + n) / bandwidth / 1e6, 1) for name, n in read.items()}


def weight_bytes(model: FusedGPT) -> int:
    """Bytes of the matrices. A step reads one row per sequence of the embedding: left out."""
    matmuls = (each for layer in model.fused for each in layer.matmuls().values())
    return model.output.nbytes + sum(each.nbytes for each in matmuls)


def largest_batch(model: FusedGPT, config: ReSAConfig, context: int) -> int:
    """The most sequences of `context` tokens, true caches, that fit the GPU beside the weights."""
    shape, weight = model.config, model.embed.weight
    size = weight.element_size()
    per_token = 2 * shape.head_dim * size  # a key and a value
    if config.kept_bits is None:
        searched = math.ceil(context / config.block_size) * per_token  # lo and hi
    else:
        searched = context * (shape.head_dim * config.kept_bits // 8 + size)
    each = shape.n_layer * shape.n_kv_head * (context * per_token + searched)
    return free_memory(weight.device) // each
