"""The Triton path as a port, for `resa conformance resa.fast.port`: on a GPU, or interpreted with TRITON_INTERPRET=1.

The operations are those of the contract; generations run through the decode loop that `generate` runs, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from resa.reference import Generation, ReSAConfig
from resa.reference.generate import open_generation
from resa.reference.port import as_numpy, build_model, entry

from .checks import INTERPRETED
from .generate import DecodeLoop, Forecast, Sampler, check_model, padded_capacity, prefill
from .model import TRITON_OPS, accelerated

if not (INTERPRETED or torch.cuda.is_available()):
    raise ImportError("resa.fast.port needs an NVIDIA GPU, or TRITON_INTERPRET=1")
DEVICE = "cpu" if INTERPRETED else "cuda"

block_bounds = as_numpy(TRITON_OPS.block_bounds, DEVICE)
score_blocks = as_numpy(TRITON_OPS.score_blocks, DEVICE)
select_blocks = as_numpy(TRITON_OPS.select_blocks, DEVICE)
sparse_attention = as_numpy(TRITON_OPS.sparse_attention, DEVICE)
dense_attention = as_numpy(TRITON_OPS.dense_attention, DEVICE)


@torch.no_grad()
def decode_trace(weights: Mapping, model_config: Mapping, prompt: Sequence[int], config: Mapping) -> list[dict]:
    """Greedy generation of config["max_new_tokens"] tokens, one entry after the prefill and one after every step."""
    config = dict(config)
    n_tokens, resa_config = config.pop("max_new_tokens"), ReSAConfig(**config)
    model = build_model(weights, model_config, device=DEVICE)
    check_model(model, resa_config, 1)
    model = accelerated(model)
    capacity = padded_capacity(len(prompt) + n_tokens, resa_config.block_size)
    generation, feed = open_generation(model, [prompt], capacity, resa_config, None)
    logits, cache = prefill(model, feed, generation.cache), generation.cache
    longer = n_tokens + 1  # than asked for, so that no token ends the sequence
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": None, "generators": [None]}
    choose = Sampler(**greedy, max_new_tokens=longer, device=logits.device)
    loop = DecodeLoop(model, cache, cache.bounds, longer, resa_config, choose, ())
    forecast, trace = Forecast(cache.lengths.tolist(), resa_config), []
    loop.append(logits, loop.active, cache.lengths, is_sparse=False)
    loop.selected = []
    while True:
        state = Generation([], cache, loop.window, loop.pending)
        trace.append(entry(state, int(loop.pending[0]), [indices for _, indices in loop.selected]))
        if len(trace) == n_tokens:
            return trace
        loop.selected.clear()
        loop.step(forecast.advance())
