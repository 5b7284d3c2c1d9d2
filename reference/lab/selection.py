"""Attention mass that selection misses: on blocks that are not selected, layer by layer.

Along dense decoding, whose cache and queries are exact, every step's attention is computed in full.
Then we ask what of it a sparse step would have seen. That is the cause of step error, without its
consequences. Ways to score blocks are compared at the same number of blocks:

- *pooled*: the specification's, an upper bound of the group's mean logit;
- *per-head*: the largest of its heads' own upper bounds;
- *8-bits*: pooled, with bounds rounded outward to 8-bit floats;
- *sketch-1*, *sketch-2*: the mass that key sketches of 1 or 2 bits per channel predict;
- *mean-key*: the pooled query times the mean of the block's keys, which is no bound;
- *newest*: no scores, the newest blocks;
- *mass*: the blocks of most mass, averaged over the group: no shared selection can have more.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import block_bounds, score_blocks
from ..checks import require_integer
from ..config import ReSAConfig
from ..model import GPT, causal_attention
from ..sketch import score_sketch, sketch_keys
from .measure import check_documents, shown, stacked, with_intervals
from .parallel import is_selected
from .scorers import block_upper_bounds, in_eight_bits

SLICE = 16  # steps looked at together: each copies the keys of its cache
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
        by_block = self.by_block(self.logits)
        return (by_block - by_block.logsumexp(dim=-1, keepdim=True)).exp()

    def in_blocks(self, logits: Tensor) -> Tensor:
        """Cut logits into blocks, the last one filled up with −∞: [..., T] → [..., M, b]."""
        padded = pad(logits, (0, -logits.shape[-1] % self.block_size), value=float("-inf"))
        return padded.unflatten(-1, (-1, self.block_size))

    def by_block(self, logits: Tensor) -> Tensor:
        """Log-sum-exp over the tokens of every block: [..., T] → [..., M]."""
        return self.in_blocks(logits).logsumexp(dim=-1)


def upper_bounds(step: Step, bounds: Tensor) -> Tensor:
    """Upper bounds of every head's logits over every block: [B, Hkv, 2, D, M] → [B, Hkv, G, M]."""
    group = step.query.unflatten(1, (step.keys.shape[1], -1))  # [B, Hkv, G, D]
    finite = torch.where(bounds.isfinite(), bounds, 0)  # a block past the end has none
    return block_upper_bounds(group, finite) * step.query.shape[-1] ** -0.5


def mean_logits(step: Step) -> Tensor:
    """Logits averaged over a group's heads and a block's tokens: [B, Hkv, M].

    That is the pooled query times the block's mean key.
    """
    logits = step.in_blocks(step.logits.mean(dim=2))  # [B, Hkv, M, b]
    is_visible = logits.isfinite()
    return logits.masked_fill(~is_visible, 0.0).sum(dim=-1) / is_visible.sum(dim=-1).clamp(min=1)


def sketch_scores(step: Step, bits: int) -> Tensor:
    """Scores [B, Hkv, M] by key sketches."""
    codes, scales = sketch_keys(step.keys, bits)
    return score_sketch(step.query, codes, scales, step.lengths, step.block_size)


def scores_by_name(step: Step, mass: Tensor) -> dict[str, Tensor]:
    """Scores [B, Hkv, M] of every way; mass [B, Hkv, G, M] of every head on every block."""
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    newest = torch.arange(bounds.shape[-1], device=mass.device, dtype=mass.dtype)
    return {
        "pooled": score_blocks(step.query, bounds, step.lengths, step.block_size),
        "per-head": upper_bounds(step, bounds).amax(dim=2),
        "8-bits": score_blocks(step.query, in_eight_bits(bounds), step.lengths, step.block_size),
        **{f"sketch-{bits}": sketch_scores(step, bits) for bits in (1, 2)},
        "mean-key": mean_logits(step),
        "newest": newest.expand(mass.shape[:2] + mass.shape[3:]),
        "mass": mass.mean(dim=2),
    }


def certified_bound(step: Step, chosen: Tensor) -> Tensor:
    """ε ≥ the mass that every head leaves out (law 10): chosen [B, Hkv, M] bool → [B, Hkv, G].

    ε = R / (Z + R), in logarithms: Z is the sum of exponentials over the selected blocks, R sums
    (tokens in block i) · exp(u[i]) over the others, u[i] being the head's own upper bound.
    """
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    first = torch.arange(bounds.shape[-1], device=chosen.device) * step.block_size
    in_block = (step.lengths[:, None] - first).clamp(0, step.block_size)[:, None, None]
    upper = upper_bounds(step, bounds) + in_block.log()
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
    layers: list[dict[str, Tensor]] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Every token is a sequence of its own, as long as its cache is then.
        queries = query[0, :, -n_tokens:].transpose(0, 1).split(SLICE)  # [B, Hq, D] each
        found = []
        for own, places in zip(queries, at[-n_tokens:].split(SLICE), strict=True):
            lengths = (places + 1).to(torch.int32)
            step = Step(own, key.expand(len(own), -1, -1, -1), lengths, config.block_size)
            found.append(left_out_by(step, config))
        layers.append({name: torch.cat([each[name] for each in found]) for name in found[0]})
        return causal_attention(layer, query, key, value)

    model.hidden_states(text, at.expand_as(text), attend)
    joined = {name: torch.stack([each[name] for each in layers], dim=1) for name in layers[0]}
    return {name: values.double().cpu().numpy() for name, values in joined.items()}


def left_out_by(step: Step, config: ReSAConfig) -> dict[str, Tensor]:
    """Mass [B, Hq] that each way leaves out, and under "bound" ε of the pooled one."""
    mass, found = step.mass, {}
    for name, scores in scores_by_name(step, mass).items():
        chosen = is_selected(scores, step.lengths, config)
        found[name] = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1).flatten(1)
        if name == "pooled":
            found["bound"] = certified_bound(step, chosen).flatten(1)
    return found


def measure_selection(
    model: GPT, documents: Sequence[Sequence[int]], n_tokens: int, config: ReSAConfig
) -> dict[str, Any]:
    """Mass left out by every way to score, over all documents and by layer; JSON-ready.

    `violations` counts heads and steps whose mass exceeds the certified bound: none, by law 10.
    """
    require_integer("n_tokens", n_tokens, 1)
    check_documents(documents, n_tokens + 1, model.config.context)

    each = shown(documents, "Selection")
    found = stacked([left_out(model, document, n_tokens, config) for document in each])
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
    """Means of [documents, tokens, layer, Hq]: in all, with an interval, and by layer."""
    mean = with_intervals({"mean": values.mean(axis=(1, 2, 3))})
    return {**mean, "layers": values.mean(axis=(0, 1, 3)).tolist()}
