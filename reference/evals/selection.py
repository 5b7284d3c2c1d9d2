"""What selection misses: the attention mass on blocks that are not selected, layer by layer, and what can be certified.

Along dense decoding, whose cache and queries are exact, every step's attention is computed in full; then one asks what
of it a sparse step would have seen. That is the cause of step error, without its consequences. Several ways to score
blocks are compared at the same number of blocks:

- *pooled*: the specification's, an upper bound of the group's mean logit;
- *per-head*: the largest of its heads' own upper bounds;
- *8-bits*: pooled, bounds rounded outward to 8-bit floats;
- *mean-key*: pooled query times the mean of the block's keys, no bound at all;
- *newest*: no scores, the newest blocks;
- *best*: the blocks of most mass, averaged over the group: the most that heads which share a selection can have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..blocks import block_bounds, score_blocks, select_blocks
from ..checks import is_integer, require
from ..config import ReSAConfig
from ..generate import decode_along, generate
from ..model import GPT
from ..parallel import block_upper_bounds
from .statistics import bootstrap, with_intervals


@dataclass(frozen=True)
class Step:
    """One layer's attention of one token per sequence, with everything that it could read."""

    query: Tensor  # [B, Hq, D]
    keys: Tensor  # [B, Hkv, T, D]
    lengths: Tensor  # [B]
    block_size: int

    @property
    def logits(self) -> Tensor:
        """[B, Hkv, G, T], −∞ past the lengths."""
        group = self.query.unflatten(1, (self.keys.shape[1], -1))  # [B, Hkv, G, D]
        logits = group @ self.keys.mT * self.query.shape[-1] ** -0.5
        visible = torch.arange(self.keys.shape[2], device=logits.device) < self.lengths.view(-1, 1, 1, 1)
        return logits.masked_fill(~visible, float("-inf"))

    def by_block(self, tokens: Tensor) -> Tensor:
        """Log-sum-exp over the tokens of every block: [..., T] → [..., M]."""
        missing = -tokens.shape[-1] % self.block_size
        padded = torch.nn.functional.pad(tokens, (0, missing), value=float("-inf"))
        return padded.unflatten(-1, (-1, self.block_size)).logsumexp(dim=-1)


def upper_bounds(step: Step, bounds: Tensor) -> Tensor:
    """Of every head's own logits over every block, scaled: bounds [B, Hkv, 2, D, M] → [B, Hkv, G, M]."""
    group = step.query.unflatten(1, (step.keys.shape[1], -1))  # [B, Hkv, G, D]
    return block_upper_bounds(group, bounds) * step.query.shape[-1] ** -0.5


def in_eight_bits(bounds: Tensor) -> Tensor:
    """Finite bounds [B, Hkv, 2, D, M] rounded outward to e4m3 numbers times one power of two per head and channel.

    What stands past the end, ±∞, stays.
    """
    largest = torch.where(bounds.isfinite(), bounds, 0).abs().amax(dim=(2, 4), keepdim=True).float()
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448).clamp(min=-120)))  # 448 is the largest e4m3 number
    lo, hi = (bounds.float() / scale).unbind(dim=2)
    rounded = torch.stack((-_rounded_up(-lo), _rounded_up(hi)), dim=2) * scale
    return torch.where(bounds.isfinite(), rounded.to(bounds.dtype), bounds)


def _rounded_up(x: Tensor) -> Tensor:
    """The least e4m3 number that is no less than x, which lies within their range: float32 → float32."""
    code = x.nan_to_num(0.0, 0.0, 0.0).to(torch.float8_e4m3fn).view(torch.uint8).int()
    # One step up: away from zero where positive, towards it where negative, from −0 to the least above zero.
    above = torch.where(code < 0x80, code + 1, torch.where(code == 0x80, 1, code - 1))
    nearest, next_one = (each.to(torch.uint8).view(torch.float8_e4m3fn).float() for each in (code, above))
    return torch.where(nearest >= x, nearest, next_one)


def _mean_keys(step: Step) -> Tensor:
    """Pooled query · mean key of every block's valid tokens: [B, Hkv, M]."""
    slots = torch.arange(step.keys.shape[2], device=step.keys.device)
    visible = (slots < step.lengths[:, None])[:, None, :, None]
    missing = (0, 0, 0, -step.keys.shape[2] % step.block_size)
    parts = [torch.where(visible, step.keys, 0.0), visible.to(step.keys.dtype).expand(*step.keys.shape[:3], 1)]
    sums, counts = (
        torch.nn.functional.pad(part, missing).unflatten(2, (-1, step.block_size)).sum(dim=3) for part in parts
    )
    pooled = step.query.unflatten(1, (step.keys.shape[1], -1)).mean(dim=2)
    return (pooled[:, :, None] * sums / counts.clamp(min=1)).sum(dim=-1)


def scores_by_name(step: Step, mass: Tensor) -> dict[str, Tensor]:
    """Scores [B, Hkv, M] of every way; mass [B, Hkv, G, M] of every head on every block."""
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    own = torch.where(bounds.isfinite(), bounds, 0)
    newest = torch.arange(bounds.shape[-1], device=mass.device, dtype=mass.dtype).expand(
        mass.shape[:2] + mass.shape[3:]
    )
    return {
        "pooled": score_blocks(step.query, bounds, step.lengths, step.block_size),
        "per-head": upper_bounds(step, own).amax(dim=2),
        "8-bits": score_blocks(step.query, in_eight_bits(bounds), step.lengths, step.block_size),
        "mean-key": _mean_keys(step),
        "newest": newest,
        "best": mass.mean(dim=2),
    }


def is_selected(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
    """Which blocks are selected: scores [B, Hkv, M] → [B, Hkv, M] bool."""
    indices = select_blocks(scores.to(torch.float32), lengths, config).long()
    chosen = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool, device=scores.device)
    spare = torch.where(indices < 0, scores.shape[2], indices)
    return chosen.scatter(2, spare, True)[..., :-1]


def certified_bound(step: Step, chosen: Tensor) -> Tensor:
    """ε ≥ the mass that every head leaves out (law 10): chosen [B, Hkv, M] bool → [B, Hkv, G].

    ε = R / (Z + R), in logarithms: Z the sum of exponentials over the selected blocks, R Σ (tokens in i) · exp(u[i])
    over the others, u[i] the head's own upper bound.
    """
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    first = torch.arange(bounds.shape[-1], device=chosen.device) * step.block_size
    tokens = (step.lengths[:, None] - first).clamp(0, step.block_size)[:, None, None]  # [B, 1, 1, M]
    upper = upper_bounds(step, torch.where(bounds.isfinite(), bounds, 0)) + tokens.log()
    left = upper.masked_fill(chosen[:, :, None], float("-inf")).logsumexp(dim=-1)
    taken = step.by_block(step.logits).masked_fill(~chosen[:, :, None], float("-inf")).logsumexp(dim=-1)
    return torch.sigmoid(left - taken)


@dataclass
class Watch:
    """Takes the place of dense attention for one token, and measures what a sparse step would have missed."""

    attend: Callable[..., Tensor]
    config: ReSAConfig
    lost: dict[str, list[Tensor]] = field(default_factory=dict)  # per way and call: mass left out [B, Hq]
    bound: list[Tensor] = field(default_factory=list)  # per call: ε of the pooled selection [B, Hq]

    def dense_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options: object
    ) -> Tensor:
        """As the operation; windows of several tokens are let through."""
        if query.shape[2] == 1:
            step = Step(query[:, :, 0], keys, lengths, self.config.block_size)
            mass = (step.by_block(step.logits) - step.logits.logsumexp(dim=-1, keepdim=True)).exp()  # [B, Hkv, G, M]
            for name, scores in scores_by_name(step, mass).items():
                chosen = is_selected(scores, lengths, self.config)
                left = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1)
                self.lost.setdefault(name, []).append(left.flatten(1).cpu())
                if name == "pooled":
                    self.bound.append(certified_bound(step, chosen).flatten(1).cpu())
        return self.attend(query, keys, values, lengths, **options)


@torch.no_grad()
def watched(
    model: GPT, documents: Sequence[Sequence[int]], n_tokens: int, config: ReSAConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Mass left out per way, and the certified bound, along the last tokens: [documents, tokens, layer, Hq] each."""
    watch = Watch(model.ops.dense_attention, config)
    opening = generate(model, [list(d[:-n_tokens]) for d in documents], 0, config)
    dense = replace(config, interval=1, schedule="fused")
    watching = model.with_ops(replace(model.ops, dense_attention=watch.dense_attention))
    cache = opening.cache.resized(opening.cache.capacity + n_tokens)
    for _ in decode_along(watching, cache, [d[-n_tokens:] for d in documents], dense):
        pass
    layers = model.config.n_layer

    def together(calls: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(calls)).unflatten(0, (n_tokens, layers)).permute(2, 0, 1, 3)

    return {name: together(calls) for name, calls in watch.lost.items()}, together(watch.bound)


def measure_selection(
    model: GPT,
    documents: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    *,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, object]:
    """Mass left out by every way to score, over all documents and by layer, with 95 % intervals; JSON-ready.

    `violations` counts heads and steps whose mass left out exceeds the certified bound: none, by law 10. Raises
    `ValueError` before any work starts.
    """
    require(is_integer(n_tokens, 1), "n_tokens", n_tokens, "an integer ≥ 1")
    require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
    shortest = min(map(len, documents), default=0)
    require(shortest > n_tokens, "documents", f"{shortest} tokens", f"documents of more than {n_tokens} tokens")
    starts = range(0, len(documents), batch)
    shown = track(starts, "Selection", console=Console(stderr=True), disable=not progress)
    parts = [watched(model, documents[start : start + batch], n_tokens, config) for start in shown]
    lost = {name: torch.cat([each[name] for each, _ in parts]).double() for name in parts[0][0]}
    bound = torch.cat([each for _, each in parts]).double()
    slack = 1e-5  # of float32, on masses of at most 1
    return {
        "documents": len(documents),
        "tokens_each": n_tokens,
        "config": asdict(config),
        "mass_left_out": {name: averages(values) for name, values in lost.items()},
        "certified_bound": averages(bound) | {"violations": int((lost["pooled"] > bound + slack).sum())},
    }


def averages(values: Tensor) -> dict[str, object]:
    """[documents, tokens, layer, Hq] → the mean with its interval over documents, and the mean of every layer."""
    by_document = values.mean(dim=(1, 2, 3)).numpy()
    layers = values.mean(dim=(1, 3)).numpy()  # [documents, layer]
    return {
        **with_intervals({"mean": by_document}),
        "layers": layers.mean(axis=0).tolist(),
        "layers_95": [bootstrap(np.ascontiguousarray(layer)) for layer in layers.T],
    }
