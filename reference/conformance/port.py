"""The reference as a port, for `resa conformance resa.conformance.port`.

A port is NumPy in and out; `docs/porting.md` says what it offers. The helpers here turn any torch
rendering of the contract in `operations.py` into one, so the Triton path uses them too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resa.reference.cache import KVCache
from resa.reference.config import GPTConfig, ReSAConfig
from resa.reference.generate import Generation, decode_step, generate, prefill
from resa.reference.model import GPT
from resa.reference.operations import CHECKED_OPS, REFERENCE_OPS, Operations
from resa.reference.sampling import Sampling, place
from resa.reference.weights.checkpoint import filled, hollow_model

GRADES = ("float64", "fp16", "bf16", "batch", "widths", "long")
CONTEXT = 2**17  # tokens, more than any case asks for


def as_numpy(operation: Callable, device: str = "cpu") -> Callable:
    """Wrap a torch operation so that it takes and returns NumPy arrays.

    A configuration comes as a plain mapping and reaches the operation as a `ReSAConfig`. bfloat16
    comes as its bits, and goes as float32.
    """

    def to_torch(argument: object) -> object:
        if isinstance(argument, np.ndarray) and argument.dtype == np.uint16:
            return torch.from_numpy(argument.view(np.int16)).view(torch.bfloat16).to(device)
        if isinstance(argument, np.ndarray):
            return torch.from_numpy(argument).to(device)
        return ReSAConfig(**argument) if isinstance(argument, Mapping) else argument

    def to_numpy(tensor: Tensor) -> np.ndarray:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()

    def call(*arguments: object, **options: object) -> np.ndarray | tuple[np.ndarray, ...]:
        options = {name: to_torch(option) for name, option in options.items()}
        result = operation(*map(to_torch, arguments), **options)
        return tuple(map(to_numpy, result)) if isinstance(result, tuple) else to_numpy(result)

    return call


block_bounds = as_numpy(CHECKED_OPS.block_bounds)
score_blocks = as_numpy(CHECKED_OPS.score_blocks)
select_blocks = as_numpy(CHECKED_OPS.select_blocks)
sparse_attention = as_numpy(CHECKED_OPS.sparse_attention)
dense_attention = as_numpy(CHECKED_OPS.dense_attention)
sketch_keys = as_numpy(CHECKED_OPS.sketch_keys)
score_sketch = as_numpy(CHECKED_OPS.score_sketch)


def build_model(
    weights: Mapping[str, np.ndarray], model_config: Mapping, *, device: str = "cpu"
) -> GPT:
    """A model of these weights, whose names and shapes are those of docs/porting.md."""
    placed = {name: torch.from_numpy(weight).to(device) for name, weight in weights.items()}
    return filled(hollow_model(GPTConfig(**model_config, context=CONTEXT)), placed)


def entry(generation: Generation, selected: Sequence[Tensor]) -> dict[str, object]:
    """One entry of a trace: the state of a generation after a step, its last token pending.

    `selected` holds the indices [1, Hkv, N] of every layer; it is empty after a dense pass.
    """
    cache = generation.cache
    of_blocks = ("codes", "scales") if cache.bounds is None else ("bounds",)
    step = {name: getattr(cache, name)[:, 0].cpu().numpy().copy() for name in of_blocks}
    step["indices"] = torch.cat(list(selected)).cpu().numpy() if selected else None
    return cached(generation) | step | {"token": generation.tokens[-1]}


def cached(generation: Generation) -> dict[str, object]:
    """Copies of the keys and values [layer, Hkv, T, D] of a generation, and its window w."""
    cache = generation.cache
    keys, values = (
        x[:, 0, :, : cache.length].cpu().numpy().copy() for x in (cache.keys, cache.values)
    )
    return {"keys": keys, "values": values, "window": generation.n_drifted}


@torch.no_grad()
def decode_trace(
    weights: Mapping, model_config: Mapping, prompt: Sequence[int], config: Mapping
) -> list[dict]:
    """Greedy generation: one entry after the prefill and one after every step."""
    # Note what every layer of a sparse step selects.
    selected: list[Tensor] = []

    def watched(*arguments: object) -> Tensor:
        selected.append(REFERENCE_OPS.select_blocks(*arguments))
        return selected[-1]

    settings = dict(config)
    n_tokens = settings.pop("max_new_tokens")
    if n_tokens == 0:
        return []
    resa_config = ReSAConfig(**settings)
    ops = replace(REFERENCE_OPS, select_blocks=watched)
    model = build_model(weights, model_config).with_ops(ops)

    # Decode. The last token is never fed.
    capacity, bits = len(prompt) + n_tokens - 1, resa_config.kept_bits
    cache = model.new_cache(capacity, resa_config.block_size, bits)
    generation, trace = Generation([], cache), []
    logits = prefill(model, prompt, cache)
    while True:
        generation.tokens.append(int(logits.argmax()))
        trace.append(entry(generation, selected))
        if len(trace) == n_tokens:
            return trace
        selected.clear()
        logits = decode_step(model, generation, resa_config)


def choose_token(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float, u: np.ndarray
) -> np.ndarray:
    """Choose a token per row of logits [B, V] by the uniform numbers u [B] → [B]."""
    sampling, chosen = Sampling(temperature, top_p, top_k), []
    for row, number in zip(torch.from_numpy(logits), u.tolist(), strict=True):
        if temperature == 0:
            chosen.append(sampling.token(row, None))
            continue
        ids, mass = sampling.kept(row)
        chosen.append(int(ids[place(mass, number)]))
    return np.array(chosen)


def attention_trace(passes: Sequence[Mapping], config: Mapping) -> list[dict[str, Any]]:
    """Attention alone: every pass writes its rows to the cache, then attends."""
    return trace_attention(passes, config, KVCache.empty, KVCache.write, REFERENCE_OPS)


def trace_attention(
    passes: Sequence[Mapping],
    config: Mapping,
    new_cache: Callable,
    write: Callable,
    ops: Operations,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Trace attention through any cache, which `write(cache, layer, start, keys, values)` fills."""
    config = ReSAConfig(**config)
    capacity = max(each["start"] + each["queries"].shape[2] for each in passes)
    kept = config.block_size, config.kept_bits
    cache = new_cache(shape_of(passes), capacity, *kept, device=device)
    return [attend(each, cache, config, write, ops, device) for each in passes]


def paged_trace(
    passes: Sequence[Mapping], config: Mapping, n_pages: int, page_size: int
) -> list[dict[str, Any]]:
    """Attention alone, in pages of one long cache: a pass takes out its own and puts them back."""
    config, results = ReSAConfig(**config), []
    b, bits = config.block_size, config.kept_bits
    pool = KVCache.empty(shape_of(passes), n_pages * page_size, b, bits)
    for each in passes:
        table = torch.tensor(each["table"])
        slots = (table[:, None] * page_size + torch.arange(page_size)).flatten()
        rows = (..., slots, slice(None))
        places = {"keys": rows, "values": rows, "codes": rows, "scales": (..., slots)}
        if bits is None:
            places = {"keys": rows, "values": rows, "bounds": (..., slots[::b] // b)}

        # Sequences that share pages put back what was there.
        own = replace(pool, **{name: getattr(pool, name)[at] for name, at in places.items()})
        results.append(attend(each, own, config, KVCache.write, REFERENCE_OPS))
        for name, at in places.items():
            getattr(pool, name)[at] = getattr(own, name)
    return results


def shape_of(passes: Sequence[Mapping]) -> GPTConfig:
    """The shape of a model that would make these queries, keys and values."""
    n_layer, n_kv_head, _, head_dim = passes[0]["keys"].shape
    n_head = passes[0]["queries"].shape[1]
    return GPTConfig(1, n_layer, n_head, n_kv_head, head_dim, hidden_size=1, intermediate_size=1)


def attend(
    each: Mapping,
    cache: Any,
    config: ReSAConfig,
    write: Callable,
    ops: Operations,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run one pass: in every layer write its rows, then attend."""
    rows = [torch.from_numpy(each[name]).to(device) for name in ("queries", "keys", "values")]
    lengths = torch.tensor([each["start"] + rows[0].shape[2]], dtype=torch.int32, device=device)
    outs, chosen = [], []
    for layer, row in enumerate(zip(*rows, strict=True)):
        query, key, value = (x[None] for x in row)
        write(cache, layer, each["start"], key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        if each["is_dense"]:
            outs.append(ops.dense_attention(query, keys, values, lengths)[0])
            continue
        query = query[:, :, 0].contiguous()
        if cache.bounds is None:
            kept = cache if isinstance(cache, KVCache) else cache.sketches
            sketches = kept.codes[layer], kept.scales[layer]
            scores = ops.score_sketch(query, *sketches, lengths, config.block_size)
        else:
            scores = ops.score_blocks(query, cache.bounds[layer], lengths, config.block_size)
        chosen.append(ops.select_blocks(scores, lengths, config))
        selected = chosen[-1], lengths, config.block_size
        outs.append(ops.sparse_attention(query, keys, values, *selected)[0][:, None])
    indices = torch.cat(chosen).cpu().numpy() if chosen else None
    return {"out": torch.stack(outs).cpu().numpy(), "indices": indices}


def decode_batch(
    weights: Mapping, model_config: Mapping, requests: Sequence[Mapping], config: Mapping
) -> list[dict]:
    """Greedy generation of many requests → what each leaves: its tokens, its cache and w."""
    return decode_requests(generate, build_model(weights, model_config), requests, config)


def decode_requests(
    generate: Callable, model: GPT, requests: Sequence[Mapping], config: Mapping
) -> list[dict]:
    """Decode through any `generate`. New requests of equal N and stop tokens are one batch.

    Nothing depends on when a request joins (law 9), so all of these join at once.
    """
    groups: dict[tuple, list[int]] = {}
    for i, each in enumerate(requests):
        turn = None if each["resumes"] is None else i  # resumed alone, after what it resumes
        groups.setdefault((turn, each["max_new_tokens"], *each["stop_tokens"]), []).append(i)

    config, done = ReSAConfig(**config), {}
    for (_, n_tokens, *stop_tokens), group in groups.items():
        prompts, resume = [requests[i]["prompt"] for i in group], requests[group[0]]["resumes"]
        options = {"stop_tokens": stop_tokens, "resume": done.get(resume)}
        done |= zip(group, generate(model, prompts, n_tokens, config, **options), strict=True)
    return [cached(done[i]) | {"tokens": done[i].tokens} for i in range(len(requests))]
