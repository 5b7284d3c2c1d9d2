"""The reference as a port, for `resa conformance resa.reference.conformance.port`.

A port is NumPy in and out; `docs/porting.md` says what it offers. The helpers here turn any torch
rendering of the contract in `operations.py` into one, so the Triton path uses them too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..config import GPTConfig, ReSAConfig
from ..generate import Generation, decode_step, prefill
from ..model import GPT
from ..operations import CHECKED_OPS, REFERENCE_OPS
from ..weights.checkpoint import filled, hollow_model

CONTEXT = 2**17  # tokens, more than any case asks for


def as_numpy(operation: Callable, device: str = "cpu") -> Callable:
    """Wrap a torch operation so that it takes and returns NumPy arrays.

    A configuration comes as a plain mapping and reaches the operation as a `ReSAConfig`.
    """

    def to_torch(argument: object) -> object:
        if isinstance(argument, np.ndarray):
            return torch.from_numpy(argument).to(device)
        return ReSAConfig(**argument) if isinstance(argument, Mapping) else argument

    def call(*arguments: object, **options: object) -> np.ndarray | tuple[np.ndarray, ...]:
        options = {name: to_torch(option) for name, option in options.items()}
        result = operation(*map(to_torch, arguments), **options)
        if isinstance(result, tuple):
            return tuple(each.cpu().numpy() for each in result)
        return result.cpu().numpy()

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
    cached = (x[:, 0, :, : cache.length] for x in (cache.keys, cache.values))
    step = dict(zip(("keys", "values"), cached, strict=True))
    of_blocks = ("codes", "scales") if cache.bounds is None else ("bounds",)
    step |= {name: getattr(cache, name)[:, 0] for name in of_blocks}
    step = {name: tensor.cpu().numpy().copy() for name, tensor in step.items()}
    step["indices"] = torch.cat(list(selected)).cpu().numpy() if selected else None
    return step | {"token": generation.tokens[-1], "window": generation.n_drifted}


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
