"""Attention mass that selection misses: on blocks that are not selected, layer by layer.

Along dense decoding, whose cache and queries are exact, every step's attention is computed in full.
Then we ask what of it a sparse step would have seen. That is the cause of step error, without its
consequences. Ways to score blocks are compared at the same number of blocks:

- *pooled*: the specification's, an upper bound of the group's mean logit;
- *per-head*: the largest of its heads' own upper bounds;
- *8-bits*: pooled, with bounds rounded outward to 8-bit floats;
- *mean-key*: the pooled query times the mean of the block's keys, which is no bound;
- *newest*: no scores, the newest blocks;
- *best*: the blocks of most mass, averaged over the group: no shared selection can have more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import block_bounds, score_blocks, select_blocks
from ..checks import require_integer
from ..config import ReSAConfig
from ..model import GPT, causal_attention
from .measure import check_documents, over_documents, stacked, with_intervals
from .parallel import block_upper_bounds
from .statistics import bootstrap

SLACK = 1e-5  # rounding of float32, on masses of at most 1


@dataclass(frozen=True)
class Step:
    """One layer's attention of one token per sequence, with everything that it could read."""

    query: Tensor  # [B, Hq, D]
    keys: Tensor  # [B, Hkv, T, D]
    lengths: Tensor  # [B]
    block_size: int

    @property
    def logits(self) -> Tensor:
        """Logits [B, Hkv, G, T], −∞ past the lengths."""
        group = self.query.unflatten(1, (self.keys.shape[1], -1))  # [B, Hkv, G, D]
        logits = group @ self.keys.mT * self.query.shape[-1] ** -0.5
        slots = torch.arange(self.keys.shape[2], device=logits.device)
        return logits.masked_fill(slots >= self.lengths.view(-1, 1, 1, 1), float("-inf"))

    @property
    def mass(self) -> Tensor:
        """Share of every head's attention on every block: [B, Hkv, G, M]."""
        return (self.by_block(self.logits) - self.logits.logsumexp(dim=-1, keepdim=True)).exp()

    def by_block(self, tokens: Tensor) -> Tensor:
        """Log-sum-exp over the tokens of every block: [..., T] → [..., M]."""
        padded = pad(tokens, (0, -tokens.shape[-1] % self.block_size), value=float("-inf"))
        return padded.unflatten(-1, (-1, self.block_size)).logsumexp(dim=-1)


def upper_bounds(step: Step, bounds: Tensor) -> Tensor:
    """Upper bounds of every head's logits over every block: [B, Hkv, 2, D, M] → [B, Hkv, G, M]."""
    group = step.query.unflatten(1, (step.keys.shape[1], -1))  # [B, Hkv, G, D]
    return block_upper_bounds(group, bounds) * step.query.shape[-1] ** -0.5


def in_eight_bits(bounds: Tensor) -> Tensor:
    """Round bounds [B, Hkv, 2, D, M] outward to e4m3 numbers times a power of two.

    Each head and channel has a power of its own. Bounds of ±∞, past the end, stay.
    """
    largest = torch.where(bounds.isfinite(), bounds, 0).abs().amax(dim=(2, 4), keepdim=True).float()
    # 448 is the largest e4m3 number.
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448).clamp(min=-120)))
    lo, hi = (bounds.float() / scale).unbind(dim=2)
    rounded = torch.stack((-_rounded_up(-lo), _rounded_up(hi)), dim=2) * scale
    return torch.where(bounds.isfinite(), rounded.to(bounds.dtype), bounds)


def _rounded_up(x: Tensor) -> Tensor:
    """The least e4m3 number that is no less than x, which lies within their range; float32."""
    code = x.nan_to_num(0.0, 0.0, 0.0).to(torch.float8_e4m3fn).view(torch.uint8).int()
    # One step up: away from zero if positive, towards it if negative, from −0 to the least above 0.
    above = torch.where(code < 0x80, code + 1, torch.where(code == 0x80, 1, code - 1))
    nearest, next_one = (
        each.to(torch.uint8).view(torch.float8_e4m3fn).float() for each in (code, above)
    )
    return torch.where(nearest >= x, nearest, next_one)


def _mean_keys(step: Step) -> Tensor:
    """Pooled query · mean key of every block's valid tokens: [B, Hkv, M]."""
    slots = torch.arange(step.keys.shape[2], device=step.keys.device)
    visible = (slots < step.lengths[:, None])[:, None, :, None].expand(*step.keys.shape[:3], 1)
    missing = (0, 0, 0, -step.keys.shape[2] % step.block_size)
    sums, counts = (
        pad(part, missing).unflatten(2, (-1, step.block_size)).sum(dim=3)
        for part in (torch.where(visible, step.keys, 0.0), visible.to(step.keys.dtype))
    )
    pooled = step.query.unflatten(1, (step.keys.shape[1], -1)).mean(dim=2)
    return (pooled[:, :, None] * sums / counts.clamp(min=1)).sum(dim=-1)


def scores_by_name(step: Step, mass: Tensor) -> dict[str, Tensor]:
    """Scores [B, Hkv, M] of every way; mass [B, Hkv, G, M] of every head on every block."""
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    own = torch.where(bounds.isfinite(), bounds, 0)
    newest = torch.arange(bounds.shape[-1], device=mass.device, dtype=mass.dtype)
    return {
        "pooled": score_blocks(step.query, bounds, step.lengths, step.block_size),
        "per-head": upper_bounds(step, own).amax(dim=2),
        "8-bits": score_blocks(step.query, in_eight_bits(bounds), step.lengths, step.block_size),
        "mean-key": _mean_keys(step),
        "newest": newest.expand(mass.shape[:2] + mass.shape[3:]),
        "best": mass.mean(dim=2),
    }


def is_selected(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
    """Mark the blocks that are selected: scores [B, Hkv, M] → [B, Hkv, M] bool."""
    indices = select_blocks(scores.to(torch.float32), lengths, config).long()
    batch, n_kv_head, spare = scores.shape
    chosen = torch.zeros(batch, n_kv_head, spare + 1, dtype=torch.bool, device=scores.device)
    return chosen.scatter(2, indices.masked_fill(indices < 0, spare), True)[..., :-1]


def certified_bound(step: Step, chosen: Tensor) -> Tensor:
    """ε ≥ the mass that every head leaves out (law 10): chosen [B, Hkv, M] bool → [B, Hkv, G].

    ε = R / (Z + R), in logarithms: Z is the sum of exponentials over the selected blocks, R sums
    (tokens in block i) · exp(u[i]) over the others, u[i] being the head's own upper bound.
    """
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    first = torch.arange(bounds.shape[-1], device=chosen.device) * step.block_size
    in_block = (step.lengths[:, None] - first).clamp(0, step.block_size)[:, None, None]
    upper = upper_bounds(step, torch.where(bounds.isfinite(), bounds, 0)) + in_block.log()
    taken = step.by_block(step.logits)
    left, taken = (
        each.masked_fill(hidden[:, :, None], float("-inf")).logsumexp(dim=-1)
        for each, hidden in ((upper, chosen), (taken, ~chosen))
    )
    return torch.sigmoid(left - taken)


@torch.no_grad()
def left_out(
    model: GPT, document: Sequence[int], n_tokens: int, config: ReSAConfig
) -> dict[str, np.ndarray]:
    """Mass that each way leaves out along the last tokens, and under "bound" ε of the pooled one.

    [n_tokens, layer, Hq] each.
    """
    text = torch.tensor([document], device=model.embed.weight.device)
    at = torch.arange(len(document), device=text.device)
    lengths = (at[-n_tokens:] + 1).to(torch.int32)
    layers: list[dict[str, Tensor]] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Every token is a sequence of its own, as long as its cache is then.
        last = query[0, :, -n_tokens:].transpose(0, 1)  # [B, Hq, D]
        step = Step(last, key.expand(n_tokens, -1, -1, -1), lengths, config.block_size)
        mass, found = step.mass, {}
        for name, scores in scores_by_name(step, mass).items():
            chosen = is_selected(scores, lengths, config)
            left = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1)
            found[name] = left.flatten(1)
            if name == "pooled":
                found["bound"] = certified_bound(step, chosen).flatten(1)
        layers.append(found)
        return causal_attention(layer, query, key, value)

    model.hidden_states(text, at.expand_as(text), attend)
    joined = {name: torch.stack([each[name] for each in layers], dim=1) for name in layers[0]}
    return {name: values.double().cpu().numpy() for name, values in joined.items()}


def measure_selection(
    model: GPT,
    documents: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Mass left out by every way to score, over all documents and by layer; JSON-ready.

    `violations` counts heads and steps whose mass exceeds the certified bound: none, by law 10.
    """
    require_integer("n_tokens", n_tokens, 1)
    check_documents(documents, n_tokens + 1, model.config.context)

    def measure(document: Sequence[int], way: ReSAConfig) -> Mapping[str, np.ndarray]:
        return left_out(model, document, n_tokens, way)

    results = over_documents(
        "Selection", documents, [config], lambda document: document, measure, progress=progress
    )
    found = stacked(results[config])
    bound = found.pop("bound")
    violations = int((found["pooled"] > bound + SLACK).sum())
    return {
        "documents": len(documents),
        "tokens_each": n_tokens,
        "config": asdict(config),
        "mass_left_out": {name: averages(values) for name, values in found.items()},
        "certified_bound": {**averages(bound), "violations": violations},
    }


def averages(values: np.ndarray) -> dict[str, Any]:
    """Means of [documents, tokens, layer, Hq], in all and by layer, with their intervals."""
    layers = values.mean(axis=(1, 3))  # [documents, layer]
    return {
        **with_intervals({"mean": values.mean(axis=(1, 2, 3))}),
        "layers": layers.mean(axis=0).tolist(),
        "layers_95": [bootstrap(layer) for layer in layers.T.copy()],
    }
