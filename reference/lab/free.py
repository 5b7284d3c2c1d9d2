"""Text that every way of decoding writes by itself, as dense decoding sees it (paper, Fig. 1).

All ways continue the same prompts with the same random numbers, and soon write different tokens. So
each is measured on its own text: dense decoding reads what was written, and the way is led along it
once more.

- *likely*: how often the token written is among dense decoding's three likeliest;
- *surprise*: −log of the probability that dense decoding gives it, in nats;
- *KL*, *drift*: as in `fidelity.py`, which measures along true text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..generate import generate
from ..model import GPT
from ..sampling import Sampling
from .fidelity import WIDTH, compare, decoding_variants, read
from .measure import check_documents, over_documents, stacked, with_intervals

TEMPERATURE = 1.0


def own_text(
    model: GPT, prompt: Sequence[int], n_tokens: int, config: ReSAConfig, seed: int
) -> dict[str, np.ndarray]:
    """Let a way of decoding continue a prompt and measure every token it writes: [n_tokens]."""
    # The first token is only fed, the last one only predicted.
    sampling, own = Sampling(TEMPERATURE), [torch.Generator().manual_seed(seed)]
    (written,) = generate(model, [prompt], n_tokens + 1, config, sampling, generators=own)
    *fed, last = written.tokens
    reading = read(model, [*prompt, *fed], len(prompt), after=last)
    found = compare(model, reading, config)
    surprise = -reading.log_probs.gather(-1, reading.following[:, None])[:, 0]
    return {
        "likely": reading.hits.double().cpu().numpy(),
        "surprise": surprise.double().cpu().numpy(),
        "kl": found["kl"],
        "mean_drift": found["mean_drift"],
    }


def measure_free(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    intervals: Sequence[int],
) -> dict[str, Any]:
    """Means over prompts, in all and per WIDTH tokens, for every way of decoding; JSON-ready."""
    require_integer("n_tokens", n_tokens, 1)
    longest, context = max(map(len, prompts), default=0), model.config.context
    allowed = f"< {context - longest}, for the context"
    require(longest + n_tokens < context, "n_tokens", n_tokens, allowed)
    check_documents(prompts, 1, context)
    ways = {
        "dense": replace(config, interval=1, schedule="fused"),
        **decoding_variants(config, intervals),
    }

    def measure(document: tuple[int, Sequence[int]], name: str) -> dict[str, np.ndarray]:
        index, prompt = document
        return own_text(model, prompt, n_tokens, ways[name], index)

    numbered = list(enumerate(prompts))
    results = over_documents("Free-running text", numbered, ways, lambda each: each, measure)
    about = {"documents": len(prompts), "tokens_each": n_tokens}
    about |= {"temperature": TEMPERATURE, "seed": 0, "config": asdict(config), "width": WIDTH}
    return {**about, "ways": {name: summarise(stacked(each)) for name, each in results.items()}}


def summarise(parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One way: means over [documents, tokens], and over WIDTH tokens after WIDTH tokens."""

    def means(start: int, end: int | None) -> dict[str, Any]:
        return with_intervals({name: x[:, start:end].mean(axis=1) for name, x in parts.items()})

    starts = range(0, parts["kl"].shape[1], WIDTH)
    return {**means(0, None), "by_position": [means(start, start + WIDTH) for start in starts]}
