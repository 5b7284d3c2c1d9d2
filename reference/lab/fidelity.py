"""Fidelity: sparse decoding beside dense decoding when both read the same tokens.

Every way of decoding is led along the true text of a document, so its predictions and its cache can
be compared with the dense ones token by token:

- *KL*: Kullback-Leibler divergence of the next-token distributions, KL(dense ‖ other), in nats;
- *agreement*: how often both find the same token most likely;
- *top-3 accuracy*: how often the token that truly follows is among the three found most likely
  (paper, Fig. 1);
- *drift* of token j: max over layers and KV heads of ‖k_j − k*_j‖ / ‖k*_j‖, and the same for v;
  k* and v* come from dense attention over the same tokens.

*Decode-only* keeps the cache exact, so its loss is the *step error* alone. What another way loses
beyond that is due to drift.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import KVCache
from ..checks import require_integer
from ..config import ReSAConfig
from ..model import GPT
from .measure import check_documents, over_documents, stacked, with_intervals
from .parallel import Stream, decode_at_once, exact_stream, windows

WIDTH = 64  # tokens per point of the curves along the text
NO_TOKEN = -1  # follows a text that ends


def decoding_variants(config: ReSAConfig, intervals: Sequence[int]) -> dict[str, ReSAConfig]:
    """The ways of decoding to compare: corners of one configuration, and its rectified forms."""
    variants = {"sparse": replace(config, interval=None)}
    for f in sorted(intervals, reverse=True):
        variants[f"ReSA f={f}"] = replace(config, interval=f)
    variants["decode-only"] = replace(config, interval=1, schedule="paper")
    return variants


def read_ratio(config: ReSAConfig, bounds: float = 1.0) -> float:
    """KV bytes that a layer reads per token relative to dense decoding, by the cost model (eq. 6).

    `bounds` is the share read of both 16-bit bounds: 1/2 if only the one that each channel needs is
    read, 1/4 if that has 8 bits.

    >>> round(read_ratio(ReSAConfig(schedule="paper")), 3)
    0.194
    >>> round(read_ratio(ReSAConfig(interval=None)), 4)
    0.1625
    """
    step = bounds / config.block_size + config.active_ratio
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
    hits: Tensor  # [N] bool: is that one of dense decoding's three likeliest?


@torch.no_grad()
def read(
    model: GPT, tokens: Sequence[int], prompt_tokens: int, *, after: int = NO_TOKEN
) -> Reading:
    """Read a text densely. `after` is the token that comes next, where it is known."""
    text = torch.tensor([tokens], device=model.embed.weight.device)
    exact = exact_stream(model, text)
    log_probs = model.output(exact.hidden[0, prompt_tokens:]).log_softmax(dim=-1)
    following = torch.cat((text[0, prompt_tokens + 1 :], text.new_tensor([after])))
    hits = top_hits(log_probs, following)
    return Reading(exact, prompt_tokens, log_probs, following, hits)


def top_hits(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mark where the three highest scores [..., V] include the token wanted [...]: bool [...]."""
    best = scores.topk(3, dim=-1).indices
    return (best == wanted[..., None]).any(dim=-1)


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense ‖ other) in nats, from log-probabilities [..., V]."""
    return (dense.exp() * (dense - other)).sum(dim=-1)


@torch.no_grad()
def compare(model: GPT, reading: Reading, config: ReSAConfig) -> dict[str, np.ndarray]:
    """Lead a way of decoding along the text; what it makes of each decoded token: [N] per name.

    After each step and its rectification, `drift` is the new token's and `mean_drift` the mean over
    all tokens decoded so far.
    """
    # Predictions.
    exact, n_prompt = reading.exact, reading.prompt_tokens
    decoded = decode_at_once(model, exact, config, n_prompt)
    own = model.output(decoded.hidden[0, n_prompt:]).log_softmax(dim=-1)
    kl = divergence(reading.log_probs, own)
    agreement = own.argmax(dim=-1) == reading.log_probs.argmax(dim=-1)
    hits = top_hits(own, reading.following)

    # After a step the cache holds drifted tokens from where its window then begins.
    pairs = (decoded.keys, exact.keys), (decoded.values, exact.values)
    stacks = ([torch.stack(each)[:, 0] for each in pair] for pair in pairs)
    drift = largest_error((x, y[:, :, n_prompt:]) for x, y in stacks).double().cpu()  # [N]
    begins = windows(exact.tokens.shape[1] + 1, n_prompt, config)[0][1:] - n_prompt
    step = torch.arange(len(drift))
    total = torch.cat((drift.new_zeros(1), drift.cumsum(dim=0)))
    mean = (total[1:] - total[begins]) / (step + 1)
    found = {"kl": kl, "agreement": agreement, "hits": hits, "mean_drift": mean}
    found["drift"] = drift.masked_fill(step < begins, 0.0)
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def measure_fidelity(
    model: GPT,
    documents: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    intervals: Sequence[int],
) -> dict[str, Any]:
    """Compare all ways of decoding along the last `n_tokens` of documents; JSON-ready."""
    require_integer("n_tokens", n_tokens, 1)
    check_documents(documents, n_tokens + 1, model.config.context)
    variants: dict[str, ReSAConfig | None] = dict(decoding_variants(config, intervals))

    def prepare(document: Sequence[int]) -> Reading:
        return read(model, document, len(document) - n_tokens)

    def measure(reading: Reading, name: str) -> Mapping[str, Any]:
        if name == "dense":
            return {"hits": reading.hits.double().cpu()}
        return compare(model, reading, variants[name])

    names = [*variants, "dense"]
    results = over_documents("Fidelity", documents, names, prepare, measure)
    found = {name: stacked(each) for name, each in results.items()}
    about = {"documents": len(documents), "tokens_each": n_tokens, "config": asdict(config)}
    rows = summarise({name: found[name] for name in variants})
    return {**about, "variants": rows, "by_position": by_position(found)}


def summarise(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Means and intervals per way; differences between ways are taken document by document."""
    loss = {name: parts["kl"].mean(axis=1) for name, parts in found.items()}  # [documents]
    rows = {}
    for name, parts in found.items():
        losses = {
            "kl": loss[name],
            "drift_kl": loss[name] - loss["decode-only"],
            "gain_over_sparse": loss["sparse"] - loss[name],
        }
        means = {part: float(parts[part].mean()) for part in ("agreement", "mean_drift")}
        largest = float(parts["drift"].max())
        rows[name] = {**with_intervals(losses), **means, "largest_drift": largest}
    return rows


def by_position(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Means per WIDTH tokens of what there is along the text: [documents, N] per way and name.

    The last token is left out: nobody knows what follows it.
    """
    names = {"hits": "accuracy", "kl": "kl", "mean_drift": "mean_drift"}
    curves: dict[str, dict[str, Any]] = {}
    for way, parts in found.items():
        starts = list(range(0, parts["hits"].shape[1] - 1, WIDTH))
        curves[way] = {"from": starts}
        for part in (part for part in names if part in parts):
            known = parts[part][:, :-1]
            stretches = [known[:, start : start + WIDTH].mean(axis=1) for start in starts]
            points = [with_intervals({names[part]: each}) for each in stretches]
            for key in points[0]:
                curves[way][key] = [point[key] for point in points]
    return curves
