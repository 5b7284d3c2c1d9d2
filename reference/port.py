"""The reference as a port: NumPy arrays in and out, so that `resa conformance resa.reference.port` checks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .config import GPTConfig, ReSAConfig
from .generate import Generation, decode_step, open_generation, prefill
from .model import GPT, REFERENCE_OPS

CONTEXT = 2**17  # tokens: whatever a port is asked for fits


def as_numpy(operation: Callable, device: str = "cpu") -> Callable:
    """The same operation for NumPy arrays; a configuration is a plain mapping there.

    Errors: the operation's own, and ValueError for a configuration that is none.
    """

    def to_torch(argument: object) -> object:
        if isinstance(argument, np.ndarray):
            return torch.from_numpy(argument).to(device)
        return ReSAConfig(**argument) if isinstance(argument, Mapping) else argument

    def to_numpy(result: Tensor | tuple[Tensor, ...]) -> np.ndarray | tuple[np.ndarray, ...]:
        return tuple(map(to_numpy, result)) if isinstance(result, tuple) else result.cpu().numpy()

    def call(*arguments: object, **options: object) -> object:
        options = {name: to_torch(option) for name, option in options.items()}
        return to_numpy(operation(*map(to_torch, arguments), **options))

    return call


def build_model(weights: Mapping[str, np.ndarray], model_config: Mapping, *, device: str = "cpu") -> GPT:
    """A model of these weights, by the names and in the shapes that docs/porting.md gives them.

    Errors: RuntimeError naming weights that are missing, too many or of another shape; ValueError for a configuration.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_config, context=CONTEXT))
    placed = {name: torch.from_numpy(weight).to(device) for name, weight in weights.items()}
    if model.config.tied_embeddings:
        placed["output.weight"] = placed["embed.weight"]
    model.load_state_dict(placed, assign=True)
    return model.eval()


def entry(generation: Generation, token: int, indices: Sequence[Tensor]) -> dict[str, object]:
    """What a trace holds after one step of the one sequence of `generation`, as docs/porting.md has it.

    `indices` [1, Hkv, N] of every layer, or none after a dense pass.
    """
    cache, length = generation.cache, int(generation.cache.lengths[0])
    keys, values = (x[:, 0, :, :length].cpu().numpy().copy() for x in (cache.keys, cache.values))
    step = {"keys": keys, "values": values, "bounds": cache.bounds[:, 0].cpu().numpy().copy()}
    step["indices"] = torch.cat(list(indices)).cpu().numpy() if indices else None  # [layer, Hkv, N]
    return step | {"token": token, "window": int(generation.window[0])}


@torch.no_grad()
def decode_trace(weights: Mapping, model_config: Mapping, prompt: Sequence[int], config: Mapping) -> list[dict]:
    """Greedy generation of config["max_new_tokens"] tokens, one entry after the prefill and one after every step."""
    selected: list[Tensor] = []

    def watched(*arguments: object) -> Tensor:
        selected.append(REFERENCE_OPS.select_blocks(*arguments))
        return selected[-1]

    config = dict(config)
    n_tokens, resa_config = config.pop("max_new_tokens"), ReSAConfig(**config)
    model = build_model(weights, model_config).with_ops(replace(REFERENCE_OPS, select_blocks=watched))
    generation, feed = open_generation(model, [prompt], len(prompt) + n_tokens, resa_config, None)
    logits, trace, active = prefill(model, feed, generation.cache), [], torch.ones(1, dtype=torch.bool)
    while True:
        token = int(logits[0].argmax())
        trace.append(entry(generation, token, selected))
        if len(trace) == n_tokens:
            return trace
        selected.clear()
        generation.tokens[0].append(token)
        generation.pending[0] = token
        logits = decode_step(model, generation, resa_config, active)


block_bounds = as_numpy(REFERENCE_OPS.block_bounds)
score_blocks = as_numpy(REFERENCE_OPS.score_blocks)
select_blocks = as_numpy(REFERENCE_OPS.select_blocks)
sparse_attention = as_numpy(REFERENCE_OPS.sparse_attention)
dense_attention = as_numpy(REFERENCE_OPS.dense_attention)
