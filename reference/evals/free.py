"""Text that every way of decoding writes by itself, as dense decoding sees it (free-running; paper, Fig. 1).

Each way continues the same prompts with the same random numbers, and soon along other tokens than the rest. So each is
measured on its own text: dense decoding reads what was written, and the way is led along it once more, beside it.

- *likely*: how often the token written is among dense decoding's three likeliest;
- *surprise*: −log of the probability that dense decoding gives it, in nats;
- *KL*, *drift*: as in `fidelity.py`, which measures along true text instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..checks import is_integer, require
from ..config import ReSAConfig
from ..generate import generate
from ..model import GPT
from .fidelity import decoding_variants, follow, teach
from .statistics import with_intervals

WIDTH = 64  # tokens per point of the curves


@torch.no_grad()
def written_text(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    temperature: float,
    generators: Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """What one way writes, measured token by token: [B, n_tokens] each."""
    texts = generate(
        model, prompts, n_tokens + 1, config, temperature=temperature, generator=list(generators)
    ).tokens  # the last token is only predicted
    continuations, following = [text[:-1] for text in texts], [text[-1] for text in texts]
    teacher = teach(model, prompts, n_tokens, config, continuations=continuations, following=following)
    comparison = follow(model, teacher, config)
    surprise = -teacher.log_probs.gather(-1, teacher.following[..., None])[..., 0]
    found = {"likely": teacher.hits, "surprise": surprise, "kl": comparison.kl, "mean_drift": comparison.mean_drift}
    return {name: values.double().cpu() for name, values in found.items()}


def measure_free(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    intervals: Sequence[int],
    *,
    temperature: float = 1.0,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, object]:
    """Means over prompts with 95 % intervals, in all and per WIDTH tokens, for every way to decode; JSON-ready.

    Errors: ValueError before any work starts.
    """
    for name, number in (("n_tokens", n_tokens), ("batch", batch)):
        require(is_integer(number, 1), name, number, "an integer ≥ 1")
    require(is_integer(seed, 0), "seed", seed, "an integer ≥ 0")
    require(temperature >= 0, "temperature", temperature, "≥ 0")
    longest, context = max(map(len, prompts), default=0), model.config.context
    require(longest > 0, "prompts", "none", "at least one token")
    require(longest + n_tokens < context, "n_tokens", n_tokens, f"< {context - longest}, for the context")
    ways = {"dense": replace(config, interval=1, schedule="fused"), **decoding_variants(config, intervals)}
    starts = range(0, len(prompts), batch)
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ways}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Free-running text", total=len(starts) * len(ways))
        for start in starts:
            some = [list(prompt) for prompt in prompts[start : start + batch]]
            for name, way in ways.items():
                own = [torch.Generator().manual_seed(seed * 100_003 + start + index) for index in range(len(some))]
                parts[name].append(written_text(model, some, n_tokens, way, temperature, own))
                bar.advance(task)
    about = {"documents": len(prompts), "tokens_each": n_tokens, "temperature": temperature, "seed": seed}
    rows = {name: summarise(several) for name, several in parts.items()}
    return {**about, "config": asdict(config), "width": WIDTH, "ways": rows}


def summarise(several: Sequence[dict[str, Tensor]]) -> dict[str, object]:
    """Of one way, over all batches."""
    values = {name: torch.cat([each[name] for each in several]).numpy() for name in several[0]}
    starts = range(0, values["kl"].shape[1], WIDTH)
    curves = [means_of({name: each[:, start : start + WIDTH] for name, each in values.items()}) for start in starts]
    return {**means_of(values), "by_position": curves}


def means_of(values: dict[str, np.ndarray]) -> dict[str, object]:
    """Over tokens, then over documents with intervals: [documents, tokens] each."""
    return with_intervals({name: each.mean(axis=1) for name, each in values.items()})
