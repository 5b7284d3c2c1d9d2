"""Fidelity: sparse decoding beside dense decoding when both read the same tokens.

Every way of decoding is led along the true text of a document, so its predictions and its cache can
be compared with the dense ones token by token:

- *KL*: Kullback-Leibler divergence of the next-token distributions, KL(dense ‖ other), in nats;
- *agreement*: how often both find the same token most likely;
- *cross-entropy*: −log of the probability of the token that truly follows, in nats;
- *drift* of token j: max over layers and KV heads of ‖k_j − k*_j‖ / ‖k*_j‖, and the same for v;
  k* and v* come from dense attention over the same tokens.

*Decode-only* keeps the cache exact, so its loss is the *step error* alone. What another way loses
beyond that is due to drift.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import KVCache
from ..checks import require, require_integer
from ..config import ReSAConfig
from ..model import GPT
from .measure import check_documents, over_documents, recovered, stacked, stretches, with_intervals
from .parallel import Stream, decode_at_once, exact_stream, windows
from .scorers import SCORERS, Scorer, own_scorer

Key = tuple[int, float, str, str]  # block size, active ratio, scorer, name of the way
NO_TOKEN = -1  # follows a text that ends
CHUNK = 256  # predictions compared together: each takes as many numbers as there are tokens


def decoding_variants(config: ReSAConfig, intervals: Sequence[int]) -> dict[str, ReSAConfig]:
    """The ways of decoding to compare: corners of one configuration, and its rectified forms."""
    variants = {"sparse": replace(config, interval=None)}
    for f in sorted(intervals, reverse=True):
        variants[f"ReSA f={f}"] = replace(config, interval=f)
    variants["decode-only"] = replace(config, interval=1, schedule="paper")
    return variants


def read_ratio(config: ReSAConfig, bounds: float = 1.0, head_dim: int = 128) -> float:
    """KV bytes that a layer reads per token relative to dense decoding, by the cost model (eq. 6).

    `bounds` is the share read of both 16-bit bounds: 1/2 if only the one that each channel needs is
    read, 1/4 if that has 8 bits. Sketches of `head_dim` channels are read whole.

    >>> round(read_ratio(ReSAConfig(schedule="paper")), 3)
    0.194
    >>> round(read_ratio(ReSAConfig(interval=None)), 4)
    0.1625
    """
    searched = bounds / config.block_size
    if config.selection == "sketch":  # codes, and a scale of 16 bits
        searched = config.sketch_bits / 32 + 1 / (2 * head_dim)
    step = searched + config.active_ratio
    if config.interval is None:
        return step
    if config.schedule == "paper":
        return step + 1 / config.interval
    return ((config.interval - 1) * step + 1) / config.interval


def kv_drift(cache: KVCache, exact: KVCache, positions: Tensor) -> Tensor:
    """Drift of the tokens at `positions` [n] → [n]."""
    pairs = (cache.keys, exact.keys), (cache.values, exact.values)
    return largest_error((x[:, 0, :, positions], y[:, 0, :, positions]) for x, y in pairs)


def largest_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Largest ‖x − x*‖ / ‖x*‖ over layers, heads and pairs of x and x* [layer, Hkv, n, D] → [n]."""
    errors = [(x - y).norm(dim=-1) / y.norm(dim=-1) for x, y in pairs]
    return torch.stack(errors).amax(dim=(0, 1, 2))


@dataclass(frozen=True)
class Reading:
    """Dense decoding along one text: the measure of all other ways."""

    exact: Stream  # [1, T]
    prompt_tokens: int  # the N = T − prompt_tokens others are decoded
    log_probs: Tensor  # [N, V] after each decoded token
    following: Tensor  # [N] the tokens that truly follow
    cross_entropy: Tensor  # [N]


@torch.no_grad()
def read(
    model: GPT, tokens: Sequence[int], prompt_tokens: int, *, after: int = NO_TOKEN
) -> Reading:
    """Read a text densely. `after` is the token that comes next, where it is known."""
    text = torch.tensor([tokens], device=model.embed.weight.device)
    exact = exact_stream(model, text)
    log_probs = model.output(exact.hidden[0, prompt_tokens:]).log_softmax(dim=-1)
    following = torch.cat((text[0, prompt_tokens + 1 :], text.new_tensor([after])))
    return Reading(exact, prompt_tokens, log_probs, following, surprise(log_probs, following))


def surprise(log_probs: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of the tokens that follow: [..., V], [...] → [...]; NaN for NO_TOKEN."""
    found = -log_probs.gather(-1, following.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(following == NO_TOKEN, float("nan"))


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense ‖ other) in nats, from log-probabilities [..., V]."""
    return (dense.exp() * (dense - other)).sum(dim=-1)


@torch.no_grad()
def compare(
    model: GPT, reading: Reading, config: ReSAConfig, scorer: Scorer | None = None
) -> dict[str, np.ndarray]:
    """Lead a way of decoding along the text; what it makes of each decoded token: [N] per name.

    After each step and its rectification, `drift` is the new token's and `mean_drift` the mean over
    all tokens decoded so far.
    """
    # Predictions.
    exact, n_prompt = reading.exact, reading.prompt_tokens
    decoded = decode_at_once(model, exact, config, n_prompt, scorer)
    own_hidden = decoded.hidden[0, n_prompt:].split(CHUNK)
    parts: dict[str, list[Tensor]] = {"kl": [], "agreement": [], "cross_entropy": []}
    dense_parts, followings = reading.log_probs.split(CHUNK), reading.following.split(CHUNK)
    for hidden, dense, following in zip(own_hidden, dense_parts, followings, strict=True):
        own = model.output(hidden).log_softmax(dim=-1)
        parts["kl"].append(divergence(dense, own))
        parts["agreement"].append(own.argmax(dim=-1) == dense.argmax(dim=-1))
        parts["cross_entropy"].append(surprise(own, following))

    # After a step the cache holds drifted tokens from where its window then begins.
    pairs = (decoded.keys, exact.keys), (decoded.values, exact.values)
    stacks = ([torch.stack(each)[:, 0] for each in pair] for pair in pairs)
    drift = largest_error((x, y[:, :, n_prompt:]) for x, y in stacks).double().cpu()  # [N]
    begins = windows(exact.tokens.shape[1] + 1, n_prompt, config)[0][1:] - n_prompt
    step = torch.arange(len(drift), device=drift.device)
    total = torch.cat((drift.new_zeros(1), drift.cumsum(dim=0)))
    found = {name: torch.cat(several) for name, several in parts.items()}
    found["drift"] = drift.masked_fill(step < begins, 0.0)
    found["mean_drift"] = (total[1:] - total[begins]) / (step + 1)
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def measure_fidelity(
    model: GPT,
    documents: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    *,
    intervals: Sequence[int],
    ratios: Sequence[float],
    block_sizes: Sequence[int],
    scores: Sequence[str] | None = None,
    scored: int | None = None,
) -> dict[str, Any]:
    """Compare all ways of decoding along the last `n_tokens` of documents; JSON-ready.

    Every interval with every ratio, block size and score makes a row; `scores` are names of SCORERS
    (None: the configuration's own). Means are over the `scored` last tokens (None: all of them),
    curves over all.
    """
    # Check the request, and list the ways of decoding.
    require_integer("n_tokens", n_tokens, 2)
    scored = n_tokens if scored is None else scored
    require(2 <= scored <= n_tokens, "scored", scored, f"2 … {n_tokens}, of the tokens decoded")
    check_documents(documents, n_tokens + 1, model.config.context)
    ways = {
        (size, ratio, score, name): way
        for size, ratio, score in product(block_sizes, ratios, scores or [own_scorer(config)])
        for name, way in decoding_variants(
            replace(config, block_size=size, active_ratio=ratio), intervals
        ).items()
    }

    def prepare(document: Sequence[int]) -> Reading:
        return read(model, document, len(document) - n_tokens)

    def measure(reading: Reading, key: Key | None) -> Mapping[str, Any]:
        if key is None:
            return {"cross_entropy": reading.cross_entropy.double().cpu()}
        return compare(model, reading, ways[key], SCORERS[key[2]])

    results = over_documents("Fidelity", documents, [None, *ways], prepare, measure)
    found = {key: stacked(each) for key, each in results.items()}
    about = {"documents": len(documents), "tokens_each": n_tokens, "scored": scored}
    dense = found[None]["cross_entropy"]
    about |= with_intervals({"dense_cross_entropy": np.nanmean(dense[:, -scored:], axis=1)})
    return {**about, "config": asdict(config), "rows": list(summarise(found, scored))}


def summarise(
    found: Mapping[Key | None, Mapping[str, np.ndarray]], scored: int
) -> Iterator[dict[str, Any]]:
    """A row per way: means with intervals, differences between ways document by document.

    `found` has [documents, N] per way and name. `gain` is what never rectifying loses more.
    """

    def mean(key: Key | None, part: str) -> np.ndarray:
        return np.nanmean(found[key][part][:, -scored:], axis=1)  # [documents]

    for key in found:
        if key is None:
            continue
        size, ratio, score, name = key
        exact, never = (mean((size, ratio, score, end), "kl") for end in ("decode-only", "sparse"))
        own, drift = mean(key, "kl"), mean(key, "kl") - exact
        row = {"way": name, "block_size": size, "ratio": ratio, "score": score}
        row |= with_intervals(
            {
                "kl": own,
                "step_error": exact,
                "drift": drift,
                "gain": never - own,
                "agreement": mean(key, "agreement"),
                "cross_entropy_lost": mean(key, "cross_entropy") - mean(None, "cross_entropy"),
                "mean_drift": mean(key, "mean_drift"),
            }
        )
        is_end = name in ("decode-only", "sparse")
        row |= recovered("recovered", never - exact, drift, is_end=is_end)
        curves = {part: found[key][part] for part in ("kl", "mean_drift")}
        yield {**row, "by_position": stretches(curves)}
