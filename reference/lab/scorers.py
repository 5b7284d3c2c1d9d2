"""Ways to score blocks, for whoever compares them: bounds, sketches, and what neither can reach.

A scorer sees all steps of one layer at once. A step finds exact keys before its window and decoded
ones from there on, so a scorer gets both streams and where each step's window begins.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import block_bounds
from ..checks import accumulation_dtype, require
from ..config import ReSAConfig
from ..sketch import rotate, sketch_keys, unpacked

SLICE = 256  # steps whose logits are estimated together: bounds memory, changes no result
FINE_STEP = 0.3352  # of sixteen levels for a normal variable (Max 1960)


@dataclass(frozen=True)
class Steps:
    """One layer of S steps after a prompt. Blocks of exact keys end where a window begins."""

    query: Tensor  # [B, Hq, S, D]
    exact: Tensor  # keys [B, Hkv, T, D]
    decoded: Tensor  # keys [B, Hkv, T, D]
    begins: Tensor  # [S] position at which a step's window begins
    at: Tensor  # [S] its own position
    block_size: int


Scorer = Callable[[Steps], Tensor]  # → scores [B, Hkv, S, M]
BoundScore = Callable[[Tensor, Tensor], Tensor]  # [B, Hq, S, D], [B, Hkv, 2, D, M] → as above


# ---- By bounds -----------------------------------------------------------------------------------


def pooled_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """Scores of eq. 4 for many queries: [B, Hq, S, D], [B, Hkv, 2, D, M] → [B, Hkv, S, M]."""
    return block_upper_bounds(query.unflatten(1, (bounds.shape[1], -1)).mean(dim=2), bounds)


def per_head_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """The largest of the heads' own upper bounds; shapes as in `pooled_scores`."""
    group = query.unflatten(1, (bounds.shape[1], -1))  # [B, Hkv, G, S, D]
    return block_upper_bounds(group, bounds[:, :, None]).amax(dim=2)


def eight_bit_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """Pooled, with bounds rounded outward to 8-bit floats that share scales over all blocks."""
    return pooled_scores(query, in_eight_bits(bounds))


def block_upper_bounds(query: Tensor, bounds: Tensor) -> Tensor:
    """Upper bounds of query · key over every block: [..., S, D], [..., 2, D, M] → [..., S, M].

    max(q·lo, q·hi) is q·hi where q is positive and q·lo where it is negative: two matrix products.
    """
    lo, hi = bounds.to(query.dtype).unbind(dim=-3)
    return query.clamp(min=0) @ hi + query.clamp(max=0) @ lo


def in_eight_bits(bounds: Tensor) -> Tensor:
    """Round bounds [B, Hkv, 2, D, M] outward to e4m3 numbers times a power of two.

    Each head and channel has a power of its own. Bounds of ±∞, past the end, stay.
    """
    # 448 is the largest e4m3 number.
    finite = torch.where(bounds.isfinite(), bounds, 0).float()
    largest = finite.abs().amax(dim=(2, 4), keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448).clamp(min=-120)))
    lo, hi = (bound.contiguous() for bound in (finite / scale).unbind(dim=2))

    # Look up the greatest number that is no greater than lo, and the least that is no less than hi.
    numbers = torch.arange(256, dtype=torch.uint8, device=bounds.device).view(torch.float8_e4m3fn)
    numbers = numbers.float()[numbers.float().isfinite()].unique()  # ascending
    below = numbers[torch.searchsorted(numbers, lo, right=True) - 1]
    above = numbers[torch.searchsorted(numbers, hi)]
    rounded = torch.stack((below, above), dim=2) * scale
    return torch.where(bounds.isfinite(), rounded.to(bounds.dtype), bounds)


def by_bounds(steps: Steps, score: BoundScore = pooled_scores) -> Tensor:
    """Score blocks by bounds of their keys.

    A step selects its own block whatever that scores, so bounds of whole blocks do, future tokens
    included.
    """
    # Score the blocks of both streams, in float32: half precision would tie what differs.
    (batch, _, n_tokens, _), b, device = steps.exact.shape, steps.block_size, steps.at.device
    wide = steps.query.to(accumulation_dtype(steps.query.dtype))
    lengths = torch.full((batch,), n_tokens, dtype=torch.int32, device=device)
    with torch.autocast(device.type, enabled=False):
        exact, decoded = (
            score(wide, block_bounds(keys, lengths, b)) for keys in (steps.exact, steps.decoded)
        )
        ends = (torch.arange(exact.shape[-1], device=device) + 1) * b
        scores = torch.where(ends <= steps.begins[:, None], exact, decoded)

        # A window that begins inside an older block finds keys of both streams in it.
        first = steps.begins // b
        (cut,) = ((steps.begins % b > 0) & (first < steps.at // b)).nonzero(as_tuple=True)
        if len(cut):
            own, window = steps.begins[cut].unique(return_inverse=True)  # [W], [cut]
            slots = (own // b * b)[:, None] + torch.arange(b, device=device)  # [W, b]
            is_exact = (slots < own[:, None])[..., None]
            mixed = torch.where(is_exact, steps.exact[:, :, slots], steps.decoded[:, :, slots])
            bounds = torch.stack((mixed.amin(dim=3), mixed.amax(dim=3)), dim=2).mT
            own_scores = score(wide[:, :, cut], bounds)  # [B, Hkv, cut, W]
            rows = torch.arange(len(cut), device=device)
            scores[:, :, cut, first[cut]] = own_scores[:, :, rows, window]
    return scores


def with_first_block(steps: Steps) -> Tensor:
    """Pooled, and the first block always, where models put attention that has no better place."""
    scores = by_bounds(steps)
    scores[..., 0] = float("inf")
    return scores


def by_half_blocks(steps: Steps) -> Tensor:
    """Pooled, by bounds of half blocks: a block scores what its better half does."""
    require(steps.block_size % 2 == 0, "block_size", steps.block_size, "even, to be halved")
    halves = by_bounds(replace(steps, block_size=steps.block_size // 2))
    padded = F.pad(halves, (0, halves.shape[-1] % 2), value=float("-inf"))
    return padded.unflatten(-1, (-1, 2)).amax(dim=-1)


# ---- By mass -------------------------------------------------------------------------------------


def by_mass(steps: Steps, bits: int | None) -> Tensor:
    """Score blocks by their attention mass as sketches predict it, or, for None, as it is."""
    with torch.autocast(steps.at.device.type, enabled=False):
        return _by_mass(steps, bits)


def _by_mass(steps: Steps, bits: int | None) -> Tensor:
    b, n_tokens, n_kv_head = steps.block_size, steps.exact.shape[2], steps.exact.shape[1]
    slots = torch.arange(n_tokens, device=steps.at.device)
    query = steps.query if bits is None else rotate(steps.query)
    query = query.to(accumulation_dtype(query.dtype)).unflatten(1, (n_kv_head, -1))
    query = query * query.shape[-1] ** -0.5  # [B, Hkv, G, S, D]
    streams = [approximated(keys, bits) for keys in (steps.exact, steps.decoded)]
    lost = [~keys.isfinite().all(dim=-1)[:, :, None] for keys in streams]  # [B, Hkv, 1, T] each
    all_begins, all_at = steps.begins.tolist(), steps.at.tolist()

    scores = []
    for start in range(0, len(all_at), SLICE):
        # Estimate the logits of what these steps see: decoded keys from the first window on.
        some = slice(start, start + SLICE)
        first, end = min(all_begins[some]), max(all_at[some]) + 1
        exact, decoded = (keys[:, :, :end].mT for keys in streams)
        rows = query[:, :, :, some].flatten(2, 3)  # [B, Hkv, G·S, D]
        logits = (rows @ exact).unflatten(2, (query.shape[2], -1))  # [B, Hkv, G, S, end]
        own = (rows @ decoded[..., first:]).unflatten(2, (query.shape[2], -1))
        is_own = slots[:end] >= steps.begins[some, None]  # [S, end]
        logits[..., first:] = torch.where(is_own[:, first:], own, logits[..., first:])

        # Sum their softmax over heads and blocks, as `score_sketch` does.
        is_future = slots[:end] > steps.at[some, None]
        is_lost = torch.where(is_own, lost[1][..., :end], lost[0][..., :end]) & ~is_future
        logits.masked_fill_((is_future | is_lost)[:, :, None], float("-inf"))
        mass = logits.softmax(dim=-1).sum(dim=2).masked_fill(is_lost, float("nan"))
        mass = F.pad(mass, (0, n_tokens - end + -n_tokens % b))
        scores.append(mass.unflatten(-1, (-1, b)).sum(dim=-1))
    return torch.cat(scores, dim=2)


def approximated(keys: Tensor, bits: int | None) -> Tensor:
    """Keys [..., D] as sketches remember them, rotated; for None the keys themselves.

    Four bits are no sketch of the specification: sixteen levels, to see what more bits would give.
    """
    if bits is None:
        return keys.to(accumulation_dtype(keys.dtype))
    if bits == 4:
        rotated = rotate(keys)
        step = FINE_STEP * rotated.square().mean(dim=-1, keepdim=True).sqrt()
        code = ((rotated / step).floor() + 0.5).clamp(-7.5, 7.5)
        scales = (rotated * code).sum(dim=-1) / code.square().sum(dim=-1)
        return scales[..., None] * code
    codes, scales = sketch_keys(keys, bits)
    wide = accumulation_dtype(keys.dtype)
    return scales.to(wide)[..., None] * unpacked(codes, bits, wide)


SCORERS: dict[str, Scorer] = {
    "pooled": by_bounds,
    "per-head": partial(by_bounds, score=per_head_scores),
    "8-bits": partial(by_bounds, score=eight_bit_scores),
    "first-block": with_first_block,
    "half-blocks": by_half_blocks,
    "sketch-1": partial(by_mass, bits=1),
    "sketch-2": partial(by_mass, bits=2),
    "sketch-4": partial(by_mass, bits=4),
    "mass": partial(by_mass, bits=None),
}


def own_scorer(config: ReSAConfig) -> str:
    """Name the scorer by which a configuration decodes."""
    return "pooled" if config.selection == "bounds" else f"sketch-{config.sketch_bits}"
