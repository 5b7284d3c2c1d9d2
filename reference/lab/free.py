"""Text that every way of decoding writes by itself, as dense decoding sees it (paper, Fig. 1).

All ways continue the same prompts with the same random numbers, and soon write different tokens.
Dense decoding then reads each text:

- *log-likelihood*: log of the probability that it gives the tokens written, in nats per token;
- *repeated*: share of the text's runs of RUN tokens that stood in it before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..generate import Generation, generate
from ..model import GPT
from ..sampling import Sampling
from .fidelity import decoding_variants, read
from .measure import check_documents, shown, stretches, with_intervals

RUN = 8


def log_likelihood(model: GPT, prompt: Sequence[int], written: Sequence[int]) -> np.ndarray:
    """Log-probabilities that dense decoding gives the tokens after a prompt: [written]."""
    *fed, last = [*prompt, *written]
    reading = read(model, fed, len(prompt) - 1, after=last)
    return -reading.cross_entropy.double().cpu().numpy()


def repeated(tokens: Sequence[int]) -> float:
    """Share of the runs of RUN tokens that stood in the text before.

    >>> repeated(range(20)), repeated([7] * 20)
    (0.0, 0.9230769230769231)
    """
    runs = [tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]
    return (len(runs) - len(set(runs))) / len(runs)


def measure_free(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    *,
    intervals: Sequence[int],
    seeds: int,
    temperature: float,
    generate: Callable[..., list[Generation]] = generate,
) -> dict[str, Any]:
    """Let every way write `seeds` texts after each prompt; JSON-ready.

    Means are over prompts, and differences between ways are taken prompt by prompt. `generate` has
    the arguments of the reference's.
    """
    # Check the request, and list the ways of decoding.
    require_integer("n_tokens", n_tokens, RUN)
    require_integer("seeds", seeds, 1)
    check_documents(prompts, 1, model.config.context)
    longest, context = max(map(len, prompts)), model.config.context
    allowed = f"≤ {context - longest}, for the context"
    require(longest + n_tokens <= context, "n_tokens", n_tokens, allowed)
    dense = replace(config, interval=1, schedule="fused")
    ways = {"dense": dense, **decoding_variants(config, intervals)}

    # Every text has random numbers of its own, the same in all ways.
    sampling = Sampling(temperature)
    asked = [prompt for prompt in prompts for _ in range(seeds)]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, way in shown(ways.items(), "Free-running text"):
        own = [torch.Generator().manual_seed(index) for index in range(len(asked))]
        written = generate(model, asked, n_tokens, way, sampling, generators=own)
        texts = [each.tokens for each in written]
        likely = [log_likelihood(model, *pair) for pair in zip(asked, texts, strict=True)]
        parts = {"log_likelihood": np.stack(likely), "repeated": np.array([*map(repeated, texts)])}
        by_prompt = {part: x.reshape(len(prompts), seeds, -1) for part, x in parts.items()}
        found[name] = {part: x.mean(axis=1) for part, x in by_prompt.items()}  # [prompts, …]

    about = {"documents": len(prompts), "seeds": seeds, "tokens_each": n_tokens}
    about |= {"temperature": temperature, "config": asdict(config)}
    return {**about, "rows": [summarise(name, found) for name in ways]}


def summarise(name: str, found: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """One way: means, what differs from dense and from sparse decoding, and a curve.

    `found` has [prompts, tokens] or [prompts, 1] per way and part.
    """
    parts = {}
    for part in found[name]:
        own, *ends = (found[each][part].mean(axis=1) for each in (name, "dense", "sparse"))
        parts |= {part: own, f"{part}_over_dense": own - ends[0]}
        parts[f"{part}_over_sparse"] = own - ends[1]
    curve = stretches({"log_likelihood": found[name]["log_likelihood"]})
    return {"way": name, **with_intervals(parts), "by_position": curve}
