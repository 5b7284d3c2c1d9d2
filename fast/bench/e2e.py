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
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

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
from ..four_bit import FourBitLinear, quantise, round_to_four_bits, widened
from ..generate import Bounds, DecodeLoop, Forecast, Sampler
from ..model import FusedGPT, FusedLayer, Linear
from .layer import BACKENDS, distance
from .peers import TorchLayer
from .timing import Time, elapsed, time_calls

QWEN_7B = GPTConfig(
    vocab_size=152_064, n_layer=28, n_head=28, n_kv_head=4, head_dim=128, hidden_size=3584, intermediate_size=18_944,
    context=2**20, rope_theta=1e6, qkv_bias=True, tied_embeddings=False,
)  # fmt: skip
RESERVE = 1.5 * 2**30  # bytes left free beside weights and caches: activations, graphs, the library's own
SAMPLES, ENOUGH_US = 15, 1e6  # samples of a cycle: so many, fewer once they have taken that long
MIN_SAMPLES = 5


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
        plain = copy(model.fused[0])
        check_four_bits(plain, quantise(model).fused[0])
    return model


def check_four_bits(plain: FusedLayer, rounded: FusedLayer) -> None:
    """Every product of a layer in 4 bits must be that of its rounded weights; `ValueError` where it is too far."""
    for name, linear in plain.products().items():
        exact = Linear(widened(*round_to_four_bits(linear.weight)), linear.bias)
        for rows in (1, 8, 256):  # of a step, of a rectification
            x = linear.weight.new_empty(rows, linear.weight.shape[1]).normal_()
            error, limit = distance(rounded.products()[name](x), exact(x)), 4 * torch.finfo(x.dtype).eps
            require(error <= limit, f"int4 {name}", f"error {error:.2g}", f"at most {limit:.2g} before it is timed")


def new_cache(model: FusedGPT, config: ReSAConfig, batch: int, context: int, *, is_shared: bool) -> KVCache:
    """A full cache of random keys and values; shared, one layer's memory stands for all of them."""
    shape, like = model.config, model.embed.weight
    layers = 1 if is_shared else shape.n_layer
    n_blocks = math.ceil(context / config.block_size)
    sizes = (layers, batch, shape.n_kv_head)
    keys, values = (like.new_empty(*sizes, context, shape.head_dim) for _ in range(2))
    bounds = like.new_empty(*sizes, 2, shape.head_dim, n_blocks)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=like.device)
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

    def sampler(self, model: FusedGPT, batch: int, tokens: int) -> Sampler:
        """For so many tokens of so many sequences."""
        own = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return Sampler(self.temperature, self.top_p, own, tokens, model.embed.weight.device)


class DenseStep:
    """Dense decoding of one token per sequence at the cache's last position, by torch."""

    def __init__(self, model: FusedGPT, cache: KVCache, sampling: Sampling, backend: SDPBackend) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.choose = sampling.sampler(model, len(cache.lengths), 1)
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
        tokens = f * (SAMPLES + 5)  # more than are ever chosen, so that no sequence ends
        choose = sampling.sampler(model, len(self.start), tokens)
        bounds = cache.bounds if bounds is None else bounds
        self.loop = DecodeLoop(model, self.cache, bounds, tokens, config, choose, ())
        forecast = Forecast(self.start.tolist(), config)
        self.kinds = [forecast.advance() for _ in range(f)]
        first = model.embed.weight.new_zeros(len(self.start), model.config.vocab_size)
        self.loop.append(first, self.loop.active, self.cache.lengths, is_sparse=False)

    @torch.no_grad()
    def __call__(self, mark: Callable[[], None] | None = None) -> None:
        """f tokens per sequence, and a mark after each; the first two calls compile and capture."""
        self.cache.lengths.copy_(self.start)
        for kinds in self.kinds:
            self.loop.launch(kinds)
            if mark is not None:
                mark()


def check(
    model: FusedGPT, config: ReSAConfig, context: int = 2048, backends: Mapping[str, SDPBackend] = BACKENDS
) -> dict[str, float]:
    """How far the steps are from dense decoding by torch where they should equal it; `ValueError` if too far.

    Sparse steps over all blocks (active ratio 1), and after them the rectification, which encodes all of a window anew.
    """
    f, batch = config.interval, 2
    cache = new_cache(model, config, batch, context, is_shared=False)
    everything = replace(config, active_ratio=1.0)
    cycle = Cycle(model, cache, everything, Sampling(), f=f)
    cycle.cache.lengths.copy_(cycle.start)
    seen: list[Tensor] = []
    output = model.output

    def recorded(hidden: Tensor) -> Tensor:
        seen.append(output(hidden))
        return seen[-1]

    model.output = recorded
    try:
        with torch.no_grad():
            for kinds in cycle.kinds:
                cycle.loop.step(kinds)
    finally:
        model.output = output
    tokens = cycle.loop.tokens[:, :f]
    errors = {}
    for name, step in (("sparse", f - 2), ("rectified", f - 1)):
        shorter = context - f + step + 1
        tensors = (tensor[..., :shorter, :].contiguous() for tensor in (cache.keys, cache.values))
        before = KVCache(
            *tensors, cache.bounds, torch.full_like(cache.lengths, shorter), cache.block_size, block_bounds
        )
        for backend_name, backend in backends.items():
            dense = DenseStep(model, before, Sampling(), backend)
            dense.pending.copy_(tokens[:, step])
            with torch.no_grad():
                errors[f"{name}, {backend_name}"] = distance(seen[step], dense.logits())
    limit = 16 * torch.finfo(model.embed.weight.dtype).eps
    for name, error in errors.items():
        require(error <= limit, name, f"error {error:.2g}", f"at most {limit:.2g} before it is timed")
    return errors


def measure(
    model: FusedGPT, config: ReSAConfig, batch: int, context: int, sampling: Sampling, *, is_shared: bool
) -> dict[str, object]:
    """Time per token of the three ways to decode at one batch and context, in µs, and how they compare."""
    f = config.interval
    cache = new_cache(model, config, batch, context, is_shared=is_shared)
    dense = {}
    for name, backend in BACKENDS.items():
        step = DenseStep(model, cache, sampling, backend)
        dense[name] = time_calls([step])
    sparse = _time_cycle(Cycle(model, cache, replace(config, interval=None), sampling, f=f))
    cycle = Cycle(model, cache, config, sampling, f=f)
    resa, steps = _time_cycle(cycle), step_times(cycle)
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
        "resa_steps_us": steps,
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


def step_times(cycle: Cycle) -> list[float]:
    """Microseconds of each of the f steps of one more cycle; the last holds the dense pass."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(cycle.f + 1)]
    waiting = iter(events)
    next(waiting).record()
    cycle(lambda: next(waiting).record())
    torch.cuda.synchronize()
    return [round(1e3 * before.elapsed_time(after), 1) for before, after in pairwise(events)]


def measure_parts(model: FusedGPT, config: ReSAConfig, batch: int) -> dict[str, dict[str, float]]:
    """Microseconds of what is not attention: of one layer and one row per sequence, or f; of what comes once a step."""
    device, n_layer = model.embed.weight.device, model.config.n_layer
    parts = {}
    for name, rows in (("step", 1), ("rectification", config.interval)):
        tokens = torch.ones(batch, rows, dtype=torch.int64, device=device)
        inputs = product_inputs(model, batch * rows)

        def products(*names: str, inputs: dict[str, Tensor] = inputs) -> None:
            for layer in model.fused:
                for each in names:
                    layer.products()[each](inputs[each])

        def transform(tokens: Tensor = tokens) -> Tensor:
            return model.transform(tokens, tokens, lambda layer, query, key, value: query)

        for names in (*([each] for each in inputs), list(inputs)):
            what = names[0] if len(names) == 1 else "matrix products"
            parts[f"{name}: {what}, per layer"] = time_calls([partial(products, *names)], divide_by=n_layer)
        parts[f"{name}: with elementwise work, per layer"] = time_calls([transform], divide_by=n_layer)
        if isinstance(model.output, FourBitLinear):
            narrow = {name: x.bfloat16() for name, x in inputs.items()}
            peers = [partial(TorchLayer(product_sizes(model.config), device), narrow) for _ in range(n_layer)]
            parts[f"{name}: matrix products by torch, per layer"] = time_calls(peers)
    last = product_inputs(model, batch)["qkv"]
    parts["output projection"] = time_calls([lambda: model.output(last)])
    logits, count = model.output(last), torch.zeros(batch, dtype=torch.int64, device=device)
    for name, sampling in (("greedy", Sampling()), ("temperature 0.7, top_p 0.95", Sampling(0.7, 0.95))):
        parts[f"sampling, {name}"] = time_calls([partial(sampling.sampler(model, batch, 1), logits, count)])
    return {name: asdict(time) for name, time in parts.items()}


def product_sizes(shape: GPTConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's matrix products, by name."""
    query, key, inner = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim, shape.intermediate_size
    return {
        "qkv": (query + 2 * key, shape.hidden_size),
        "o": (shape.hidden_size, query),
        "gate_up": (2 * inner, shape.hidden_size),
        "down": (shape.hidden_size, inner),
    }


def product_inputs(model: FusedGPT, rows: int) -> dict[str, Tensor]:
    """Random rows for a layer's matrix products, by name."""
    like = model.embed.weight
    return {name: like.new_empty(rows, size).normal_() for name, (_, size) in product_sizes(model.config).items()}


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
    return model.output.nbytes + sum(product.nbytes for layer in model.fused for product in layer.products().values())


def largest_batch(model: FusedGPT, config: ReSAConfig, context: int) -> int:
    """How many sequences of `context` tokens, every layer with a cache of its own, fit the GPU beside the weights."""
    shape = model.config
    numbers = 2 * context * shape.head_dim + 2 * shape.head_dim * math.ceil(context / config.block_size)
    each = shape.n_layer * shape.n_kv_head * numbers * model.embed.weight.element_size()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return int((free - RESERVE) / each)
