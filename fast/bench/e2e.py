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
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resa.reference import blocks as plain_blocks
from resa.reference.cache import KVCache
from resa.reference.checks import free_memory, require
from resa.reference.config import GPTConfig, ReSAConfig
from resa.reference.model import GPT
from resa.reference.sampling import Choice

from ..blocks import block_bounds
from ..bounds8 import compress_bounds
from ..elementwise import add_norm, split_heads, swiglu
from ..four_bit import FourBitLinear, quantise, round_to_four_bits, widened
from ..generate import Bounds, DecodeLoop, Forecast, Sampler
from ..model import FusedGPT, FusedLayer, Linear
from .layer import BACKENDS, Shape, distance, floors
from .peers import TorchLayer
from .timing import Time, elapsed, time_calls

QWEN_7B = GPTConfig(
    vocab_size=152_064, n_layer=28, n_head=28, n_kv_head=4, head_dim=128, hidden_size=3584, intermediate_size=18_944,
    context=2**20, rope_theta=1e6, qkv_bias=True, tied_embeddings=False,
)  # fmt: skip
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
        plain = {**model.fused[-1].products(), "output": model.output}
        quantise(model)
        check_four_bits(plain, {**model.fused[-1].products(), "output": model.output})
    return model


def check_four_bits(plain: Mapping[str, Linear], rounded: Mapping[str, FourBitLinear]) -> None:
    """Every product in 4 bits must be that of the rounded weights; `ValueError` where it is too far."""
    for name, linear in plain.items():
        exact = Linear(widened(*round_to_four_bits(linear.weight)), linear.bias)
        for rows in (1, 8, 16, 32, 256):  # of steps, of rectifications
            x = linear.weight.new_empty(rows, linear.weight.shape[1]).normal_()
            error, limit = distance(rounded[name](x), exact(x)), 4 * torch.finfo(x.dtype).eps
            require(error <= limit, f"int4 {name}", f"error {error:.2g}", f"at most {limit:.2g} before it is timed")


def new_cache(model: FusedGPT, config: ReSAConfig, batch: int, context: int, *, is_shared: bool) -> KVCache:
    """A full cache of random keys and values; shared, one layer's memory stands for all of them."""
    shape, like = model.config, model.embed.weight
    layers = 1 if is_shared else shape.n_layer
    n_blocks = math.ceil(context / config.block_size)
    both = like.new_empty(layers, 2, batch, shape.n_kv_head, context, shape.head_dim)
    bounds = like.new_empty(layers, batch, shape.n_kv_head, 2, shape.head_dim, n_blocks)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=like.device)
    for layer in range(layers):
        both[layer].normal_()
        bounds[layer] = block_bounds(both[layer, 0], lengths, config.block_size)
    both, bounds = (tensor.expand(shape.n_layer, *tensor.shape[1:]) for tensor in (both, bounds))
    return KVCache(both[:, 0], both[:, 1], bounds, lengths, config.block_size, block_bounds)


@dataclass(frozen=True)
class Sampling(Choice):
    """How tokens are chosen, for a whole batch on the device."""

    def sampler(self, model: FusedGPT, batch: int, tokens: int) -> Sampler:
        """For so many tokens of so many sequences."""
        own = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return Sampler(self.temperature, self.top_p, self.top_k, own, tokens, model.embed.weight.device)


class DenseStep:
    """Dense decoding of one token per sequence by torch, at place `end` − 1 of the caches (None: their last)."""

    def __init__(
        self, model: FusedGPT, cache: KVCache, sampling: Sampling, backend: SDPBackend, *, end: int | None = None
    ) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.end = cache.capacity if end is None else end
        self.choose = sampling.sampler(model, len(cache.lengths), 1)
        self.pending = torch.ones_like(cache.lengths, dtype=torch.int64)
        self.count = torch.zeros_like(self.pending)
        self.position = torch.full_like(cache.lengths, self.end - 1)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append, in one copy, then attend to everything."""
        keys, values = (x[layer, :, :, : self.end] for x in (self.cache.keys, self.cache.values))
        together(keys[:, :, -1:], values[:, :, -1:]).copy_(together(key, value))
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def logits(self) -> Tensor:
        """Of the tokens that follow the pending ones."""
        return self.model.output(self.model.transform(self.pending[:, None], self.position, self.attend)[:, 0])

    @torch.no_grad()
    def __call__(self) -> None:
        """One step, from the token fed to the token chosen."""
        self.pending.copy_(self.choose(self.logits(), self.count))


def together(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors of one shape that lie in one memory as one tensor [2, …], so that one copy moves both."""
    gap = second.storage_offset() - first.storage_offset()
    return first.as_strided((2, *first.shape), (gap, *first.stride()))


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


@torch.no_grad()
def check(
    model: FusedGPT, config: ReSAConfig, batch: int, context: int = 2048, backends: Mapping[str, SDPBackend] = BACKENDS
) -> dict[str, float]:
    """How far the decode loop, as it is timed, is from dense decoding by torch; `ValueError` if too far.

    Sparse steps over all blocks (active ratio 1) must be dense steps; then noise takes the place of what they wrote,
    and the rectification must bring it back. At the configuration's own ratio every layer must select as the reference.
    """
    f, limit = config.interval, 16 * torch.finfo(model.embed.weight.dtype).eps
    cache = new_cache(model, config, batch, context, is_shared=False)
    cycle = Cycle(model, cache, replace(config, active_ratio=1.0), Sampling(), f=f)
    cycle()
    cycle()  # captures
    first = int(cycle.loop.count[0]) - 1
    written = [x[:, :, :, context - f :] for x in (cache.keys, cache.values)]  # by a cycle
    cycle.cache.lengths.copy_(cycle.start)
    for kinds in cycle.kinds[:-1]:
        cycle.loop.launch(kinds)
    stepped = [rows[:, :, :, :-1].clone() for rows in written]
    for rows in written:
        rows.normal_()
    cycle.loop.launch(cycle.kinds[-1])
    rectified, tokens = [rows.clone() for rows in written], cycle.loop.tokens[:, first : first + f + 1]

    errors: dict[str, float] = {}
    for name, backend in backends.items():
        leads = []
        for i in range(f):
            step = DenseStep(model, cache, Sampling(), backend, end=context - f + i + 1)
            step.pending.copy_(tokens[:, i])
            logits = step.logits().double()
            chosen = logits.gather(1, tokens[:, i + 1, None])
            leads.append(((logits.amax(dim=1, keepdim=True) - chosen) / logits.abs().amax(dim=1, keepdim=True)).max())
        for rows, loops, dense in zip(("keys", "values"), zip(stepped, rectified, strict=True), written, strict=True):
            errors[f"sparse steps, {rows}, {name}"] = distance(loops[0], dense[:, :, :, :-1])
            errors[f"rectified {rows}, {name}"] = distance(loops[1], dense)
        errors[f"tokens, {name}"] = float(torch.stack(leads).max())
    for name, error in errors.items():
        require(error <= limit, name, f"error {error:.2g}", f"at most {limit:.2g} before it is timed")
    return errors | {"selection": check_selection(model, config, cache, limit)}


def check_selection(model: FusedGPT, config: ReSAConfig, cache: KVCache, limit: float) -> float:
    """By how much of their scores the blocks that a sparse step selects fall short of those that it should, at most."""
    cycle = Cycle(model, cache, replace(config, interval=None), Sampling(), f=config.interval)
    cycle.loop.selected = []
    cycle()
    worst, last = 0.0, slice(-1, None)
    for layer, (query, indices) in enumerate(cycle.loop.selected[-model.config.n_layer :]):
        end = cycle.cache.lengths[last]
        bounds = plain_blocks.block_bounds(cache.keys[layer][last], end, config.block_size)
        require(bool((cache.bounds[layer][last] == bounds).all()), "bounds", "others", "those of the keys")
        scores = plain_blocks.score_blocks(query[last], bounds, end, config.block_size)[0]
        right = plain_blocks.select_blocks(scores[None], end, config)[0]
        for score, ours, theirs in zip(scores, indices[-1].long(), right.long(), strict=True):
            require(len(set(ours.tolist())) == len(theirs), "selection", f"{len(ours)} blocks", f"{len(theirs)}")
            short = score[theirs].sort().values - score[ours].sort().values
            worst = max(worst, float(short.abs().max() / score.abs().max()))
    require(worst <= limit, "selection", f"error {worst:.2g}", f"at most {limit:.2g} before it is timed")
    return worst


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
        parts[f"{name}: elementwise work, per layer"] = time_calls(between_products(model, batch, rows))
        if isinstance(model.output, FourBitLinear):
            narrow = {name: x.bfloat16() for name, x in inputs.items()}
            peers = [partial(TorchLayer(product_sizes(model.config), device), narrow) for _ in range(n_layer)]
            parts[f"{name}: matrix products by torch, per layer"] = time_calls(peers)
            if name == "step":  # the many rows of a rectification have them anyway
                own = partial(library_tiles, model, inputs)
                parts[f"{name}: matrix products, the library's tiles, per layer"] = time_calls([own], divide_by=n_layer)
    last = product_inputs(model, batch)["qkv"]
    parts["output projection"] = time_calls([lambda: model.output(last)])
    logits, count = model.output(last), torch.zeros(batch, dtype=torch.int64, device=device)
    for name, sampling in (("greedy", Sampling()), ("temperature 0.7, top_p 0.95", Sampling(0.7, 0.95))):
        parts[f"sampling, {name}"] = time_calls([partial(sampling.sampler(model, batch, 1), logits, count)])
    return {name: asdict(time) for name, time in parts.items()}


def library_tiles(model: FusedGPT, inputs: Mapping[str, Tensor]) -> None:
    """Every product in 4 bits with the tiles that the library would choose."""
    for layer in model.fused:
        for name, product in layer.products().items():
            product.product.layer(inputs[name])


def between_products(model: FusedGPT, batch: int, rows: int) -> list[Callable[[], object]]:
    """For every layer what lies between its matrix products, of so many rows per sequence."""
    shape, like = model.config, model.embed.weight
    sizes = product_sizes(shape)
    x, delta = (like.new_empty(batch, rows, shape.hidden_size).normal_() for _ in range(2))
    projected, gate_up = (like.new_empty(batch, rows, sizes[name][0]).normal_() for name in ("qkv", "gate_up"))
    turn = torch.rand(batch, 1, rows, shape.head_dim // 2, device=like.device)
    heads, eps = (shape.n_head, shape.n_kv_head), shape.norm_eps

    def between(layer: FusedLayer) -> None:
        add_norm(x, delta, layer.attn_norm, eps)
        split_heads(projected, turn, turn, *heads, *layer.head_norms, eps)
        add_norm(x, delta, layer.mlp_norm, eps)
        swiglu(gate_up)

    return [partial(between, layer) for layer in model.fused]


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
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        layer = Shape(shape.n_head, shape.n_kv_head, shape.head_dim, dtype)
        parts = {name: shape.n_layer * size for name, size in floors(layer, config, batch, context).items()}
        sparse = parts["score"] + parts["attend"]
        return cls(weight_bytes(model), parts["rectify"], sparse, ((f - 1) * sparse + parts["rectify"]) / f)

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
    return free_memory(model.embed.weight.device) // each
