"""Whole decoding steps of a model: dense, sparse and rectified, from the token fed to the token chosen.

All three decode the same weights through the same fused layers and the same sampler, in CUDA graphs; only what happens
between a layer's queries and its attention output differs. Dense attention is torch's, the faster of its backends.
Sparse and rectified decoding are the decode loop that `resa.fast.generate` runs.

Every sequence is decoded at one length: after each cycle of f tokens the caches are set back, so that the cycle ends
where the cache does. Under the protocol *shared* all layers use one layer's cache, as the paper does to fit large
batches; every layer still reads and writes all of it. Under *true* every layer has its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resa.reference.blocks import active_blocks
from resa.reference.cache import KVCache
from resa.reference.checks import require
from resa.reference.config import GPTConfig, ReSAConfig
from resa.reference.model import GPT

from ..blocks import block_bounds
from ..bounds8 import compress_bounds
from ..generate import Bounds, DecodeLoop, Forecast, Sampler
from ..model import FusedGPT
from .layer import BACKENDS
from .timing import Time, elapsed, time_calls

QWEN_7B = GPTConfig(
    vocab_size=152_064, n_layer=28, n_head=28, n_kv_head=4, head_dim=128, hidden_size=3584, intermediate_size=18_944,
    context=2**20, rope_theta=1e6, qkv_bias=True, tied_embeddings=False,
)  # fmt: skip
RESERVE = 1.5 * 2**30  # bytes left free beside weights and caches: activations, graphs, the library's own
SAMPLES, ENOUGH_US = 15, 2e6  # samples of a cycle: so many, fewer once they have taken that long
MIN_SAMPLES = 5
CHECKED_TOKENS = 2_048


def build(weights: str, shape: GPTConfig = QWEN_7B) -> FusedGPT:
    """A model of random weights on the GPU; weights "float16", "bfloat16", or "int4": float16 rounded to 4 bits."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if weights == "bfloat16" else torch.float16)
    try:
        with torch.device("cuda"):
            model = FusedGPT(GPT(shape).requires_grad_(False))
    finally:
        torch.set_default_dtype(before)
    if weights == "int4":
        from ..four_bit import FourBitLinear, quantise

        plain = model.fused[0].o
        rounded, x = (
            FourBitLinear(plain),
            torch.randn(8, plain.weight.shape[1], device="cuda", dtype=plain.weight.dtype),
        )
        error = distance(rounded(x), plain(x))  # normal weights lose 0.11 to 4 bits
        require(error <= 0.15, "int4", f"error {error:.2g} of one product", "at most 0.15 before it is timed")
        quantise(model)
    return model


def new_cache(model: FusedGPT, config: ReSAConfig, batch: int, context: int, *, is_shared: bool) -> KVCache:
    """A full cache of random keys and values; shared, one layer's memory stands for all of them."""
    shape, dtype = model.config, model.embed.weight.dtype
    layers = 1 if is_shared else shape.n_layer
    n_blocks = math.ceil(context / config.block_size)
    sizes = (layers, batch, shape.n_kv_head)
    keys, values = (torch.empty(*sizes, context, shape.head_dim, dtype=dtype, device="cuda") for _ in range(2))
    bounds = torch.empty(*sizes, 2, shape.head_dim, n_blocks, dtype=dtype, device="cuda")
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    for layer in range(layers):
        keys[layer].normal_()
        values[layer].normal_()
        bounds[layer] = block_bounds(keys[layer], lengths, config.block_size)
    tensors = (tensor.expand(shape.n_layer, *tensor.shape[1:]) for tensor in (keys, values, bounds))
    return KVCache(*tensors, lengths, config.block_size, block_bounds)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    top_p: float = 1.0

    def sampler(self, batch: int, tokens: int) -> Sampler:
        """For so many tokens of so many sequences."""
        own = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return Sampler(self.temperature, self.top_p, own, tokens, torch.device("cuda"))


class DenseStep:
    """Dense decoding of one token per sequence at the cache's last position, by torch."""

    def __init__(self, model: FusedGPT, cache: KVCache, sampling: Sampling, backend: SDPBackend) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.choose = sampling.sampler(len(cache.lengths), 1)
        self.pending = torch.ones_like(cache.lengths, dtype=torch.int64)
        self.count = torch.zeros_like(self.pending)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append, then attend to everything."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def logits(self) -> Tensor:
        """Of the tokens that follow the pending ones."""
        position = (self.cache.lengths - 1)[:, None]
        return self.model.output(self.model.transform(self.pending[:, None], position, self.attend)[:, 0])

    @torch.no_grad()
    def __call__(self) -> None:
        """One step, from the token fed to the token chosen."""
        self.pending.copy_(self.choose(self.logits(), self.count))


class Cycle:
    """f steps of the decode loop that end where the cache does."""

    def __init__(
        self,
        model: FusedGPT,
        cache: KVCache,
        config: ReSAConfig,
        sampling: Sampling,
        *,
        f: int,
        bounds: Bounds | None = None,
    ) -> None:
        self.cache, self.f = replace(cache, lengths=cache.lengths.clone()), f
        self.start = cache.lengths - f
        tokens = f * (SAMPLES + 4)  # more than are ever chosen, so that no sequence ends
        choose = sampling.sampler(len(self.start), tokens)
        bounds = cache.bounds if bounds is None else bounds
        self.loop = DecodeLoop(model, self.cache, bounds, tokens, config, choose, ())
        forecast = Forecast(self.start.tolist(), config)
        self.kinds = [forecast.advance() for _ in range(f)]
        self.loop.append(torch.zeros(len(self.start), model.config.vocab_size, device="cuda"), self.loop.active.clone())

    @torch.no_grad()
    def __call__(self) -> None:
        """f tokens per sequence; the first two calls compile and capture."""
        self.cache.lengths.copy_(self.start)
        for kinds in self.kinds:
            self.loop.launch(kinds)


def check(model: FusedGPT, config: ReSAConfig) -> dict[str, float]:
    """How far the steps are from dense decoding by torch where they should equal it; `ValueError` if too far.

    Sparse steps over all blocks (active ratio 1), and after them the rectification, which encodes all of a window anew.
    """
    f, batch = config.interval, 2
    cache = new_cache(model, config, batch, CHECKED_TOKENS, is_shared=False)
    everything = replace(config, active_ratio=1.0)
    cycle = Cycle(model, cache, everything, Sampling(), f=f)
    cycle.cache.lengths.copy_(cycle.start)
    seen: list[Tensor] = []
    output, model.output = model.output, _Recorder(model.output, seen)
    try:
        with torch.no_grad():
            for kinds in cycle.kinds:
                cycle.loop.step(kinds)
    finally:
        model.output = output
    tokens = cycle.loop.tokens[:, :f]
    errors = {}
    for name, step in (("sparse", f - 2), ("rectified", f - 1)):
        shorter = CHECKED_TOKENS - f + step + 1
        tensors = (tensor[..., :shorter, :].contiguous() for tensor in (cache.keys, cache.values))
        before = KVCache(
            *tensors, cache.bounds, torch.full_like(cache.lengths, shorter), cache.block_size, block_bounds
        )
        for backend_name, backend in BACKENDS.items():
            dense = DenseStep(model, before, Sampling(), backend)
            dense.pending.copy_(tokens[:, step])
            with torch.no_grad():
                errors[f"{name}, {backend_name}"] = distance(seen[step], dense.logits())
    limit = 16 * torch.finfo(model.embed.weight.dtype).eps
    for name, error in errors.items():
        require(error <= limit, name, f"error {error:.2g}", f"at most {limit:.2g} before it is timed")
    return errors


class _Recorder(torch.nn.Module):
    """An output projection that keeps what it gave."""

    def __init__(self, output: torch.nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.output, self.seen = output, seen

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(self.output(hidden))
        return self.seen[-1]


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def measure(
    model: FusedGPT, config: ReSAConfig, batch: int, context: int, sampling: Sampling, *, is_shared: bool
) -> dict[str, object]:
    """Time per token of the three ways to decode, in ms, at one batch and context."""
    f = config.interval
    cache = new_cache(model, config, batch, context, is_shared=is_shared)
    dense = {}
    for name, backend in BACKENDS.items():
        step = DenseStep(model, cache, sampling, backend)
        dense[name] = time_calls([step])
    sparse = _time_cycle(Cycle(model, cache, replace(config, interval=None), sampling, f=f))
    resa = _time_cycle(Cycle(model, cache, config, sampling, f=f))
    compressed = [compress_bounds(layer) for layer in cache.bounds[:1]] * len(cache.bounds) if is_shared else None
    eight_bit = _time_cycle(Cycle(model, cache, config, sampling, f=f, bounds=compressed)) if is_shared else None
    best = min(dense.values(), key=lambda time: time.us)
    return {
        "protocol": "shared" if is_shared else "true",
        "batch": batch,
        "context": context,
        "memory_bytes": torch.cuda.memory_allocated(),
        "dense": {name: asdict(time) for name, time in dense.items()},
        "sparse": asdict(sparse),
        "resa": asdict(resa),
        **({"resa, 8-bit bounds": asdict(eight_bit)} if is_shared else {}),
        "dense_us": best.us,
        "ratio": round(best.us / resa.us, 3),
        "sparse_ratio": round(best.us / sparse.us, 3),
    }


def _time_cycle(cycle: Cycle) -> Time:
    """Microseconds per token over whole cycles."""
    cycle()
    cycle()  # captures
    samples = []
    while len(samples) < SAMPLES and (len(samples) < MIN_SAMPLES or sum(samples) * cycle.f < ENOUGH_US):
        samples.append(elapsed(cycle) / cycle.f)
    return Time.of(samples)


def measure_parts(model: FusedGPT, config: ReSAConfig, batch: int) -> dict[str, dict[str, float]]:
    """Microseconds of what is not attention: of one layer and one row per sequence, or f; of what comes once a step."""
    shape, dtype = model.config, model.embed.weight.dtype
    parts = {}
    for name, rows in (("step", 1), ("rectification", config.interval)):
        tokens = torch.ones(batch, rows, dtype=torch.int64, device="cuda")
        hidden, wide = (
            torch.randn(batch, rows, size, device="cuda", dtype=dtype)
            for size in (shape.hidden_size, shape.intermediate_size)
        )

        def products(hidden: Tensor = hidden, wide: Tensor = wide) -> None:
            for layer in model.fused:
                layer.qkv(hidden), layer.o(hidden), layer.gate_up(hidden), layer.down(wide)

        def transform(tokens: Tensor = tokens) -> Tensor:
            return model.transform(tokens, tokens, lambda layer, query, key, value: query)

        parts[f"{name}: matrix products, per layer"] = time_calls([products], divide_by=shape.n_layer)
        parts[f"{name}: with elementwise work, per layer"] = time_calls([transform], divide_by=shape.n_layer)
    last = hidden[:, -1]
    parts["output projection"] = time_calls([lambda: model.output(last)])
    logits, count = model.output(last), torch.zeros(batch, dtype=torch.int64, device="cuda")
    for name, sampling in (("greedy", Sampling()), ("temperature 0.7, top_p 0.95", Sampling(0.7, 0.95))):
        sampler = sampling.sampler(batch, 1)
        parts[f"sampling, {name}"] = time_calls([lambda sampler=sampler: sampler(logits, count)])
    return {name: asdict(time) for name, time in parts.items()}


@dataclass(frozen=True)
class Floors:
    """What a step can't avoid reading, per token: the weights, and of the cache what the way of decoding reads."""

    weights: float
    dense: float
    sparse: float
    resa: float

    @classmethod
    def of(cls, model: FusedGPT, config: ReSAConfig, batch: int, context: int) -> Floors:
        """Half the bounds and the selected blocks in a sparse step; the whole cache once in f steps."""
        shape, f = model.config, config.interval
        n_blocks = math.ceil(context / config.block_size)
        selected = int(active_blocks(torch.tensor([context]), config)) / n_blocks
        channels = shape.n_layer * batch * shape.n_kv_head * shape.head_dim * model.embed.weight.element_size()
        cache, half_bounds = 2 * channels * context, channels * n_blocks
        sparse = half_bounds + selected * cache
        return cls(weight_bytes(model), cache, sparse, ((f - 1) * sparse + cache) / f)

    def at(self, bandwidth: float) -> dict[str, float]:
        """Microseconds per token at `bandwidth` TB/s."""
        return {
            name: round((self.weights + getattr(self, name)) / bandwidth / 1e6, 1)
            for name in ("dense", "sparse", "resa")
        }


def weight_bytes(model: FusedGPT) -> int:
    """Bytes of the matrices, the embedding not among them: of that a step reads a row per sequence."""
    total = sum(p.nbytes for p in model.output.parameters())
    for layer in model.fused:
        for product in (layer.qkv, layer.o, layer.gate_up, layer.down):
            held = product.parameters() if isinstance(product, torch.nn.Module) else [product.weight]
            total += sum(tensor.nbytes for tensor in held)
    return total


def largest_batch(model: FusedGPT, config: ReSAConfig, context: int) -> int:
    """How many sequences of `context` tokens, every layer with a cache of its own, fit the GPU beside the weights."""
    shape = model.config
    numbers = 2 * context * shape.head_dim + 2 * shape.head_dim * math.ceil(context / config.block_size)
    each = shape.n_layer * shape.n_kv_head * numbers * model.embed.weight.element_size()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return int((free - RESERVE) / each)
