"""Which blocks of the cache a step reads: bounds (eq. 3), scores (eq. 4), selection (eq. 5).

Each function is the mathematics alone, over a whole cache; `cache.py` rebuilds only the blocks that
change. Shapes: B sequences (`generate` has one), Hq query and Hkv KV heads of D channels, T_max
slots in the cache, M blocks of b slots, N selected blocks, Q queries, C hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import accumulation_dtype
from .config import ReSAConfig


def block_bounds(keys: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Smallest and largest key of every block, per channel (eq. 3).

    keys [B, Hkv, T_max, D], lengths [B] → bounds [B, Hkv, 2, D, M] in the keys' dtype, lo then hi;
    M = ceil(T_max / block_size). Only keys before the length count. A block without any has
    lo = +∞ and hi = −∞, the neutral elements of min and max.

    >>> block_bounds(torch.tensor([[[[1.0], [5.0], [3.0]]]]), torch.tensor([3]), 2)[0, 0].tolist()
    [[[1.0, 3.0]], [[5.0, 3.0]]]
    """
    # Cut the cache into blocks; the last one may be padded.
    n_blocks = -(-keys.shape[2] // block_size)
    padding = n_blocks * block_size - keys.shape[2]
    padded = F.pad(keys, (0, 0, 0, padding))
    blocks = padded.unflatten(2, (n_blocks, block_size))  # [B, Hkv, M, b, D]
    slots = torch.arange(n_blocks * block_size, device=keys.device).view(n_blocks, block_size, 1)
    valid = slots < lengths.view(-1, 1, 1, 1, 1)  # [B, 1, M, b, 1]

    # Take the extremes over the valid keys of each block.
    lo = torch.where(valid, blocks, float("inf")).amin(dim=3)  # [B, Hkv, M, D]
    hi = torch.where(valid, blocks, float("-inf")).amax(dim=3)

    # Channel-major: a product needs hi if q > 0, else lo, and a kernel then loads only that one.
    return torch.stack((lo, hi), dim=2).transpose(3, 4).contiguous()


def score_blocks(query: Tensor, bounds: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Upper bound of the pooled query's logit over each block, without the softmax scale (eq. 4).

        score[i] = Σ_d max(q̄_d · lo[i]_d, q̄_d · hi[i]_d),  q̄ = mean of the group's query heads

    query [B, Hq, D], bounds [B, Hkv, 2, D, M], lengths [B] → scores [B, Hkv, M] float32 (float64
    for float64 input), −∞ for blocks past the end.
    """
    # Pool the queries of each group: the G heads share one selection.
    dtype, n_kv_head = accumulation_dtype(query.dtype), bounds.shape[1]
    pooled = query.to(dtype).unflatten(1, (n_kv_head, -1)).mean(dim=2)[..., None]  # [B, Hkv, D, 1]

    # Sum the larger product of each channel. A key that overflowed is ±∞; 0 · ±∞ counts as 0.
    lo, hi = bounds.to(dtype).unbind(dim=2)  # [B, Hkv, D, M]
    products = torch.maximum(pooled * lo, pooled * hi)
    if (pooled == 0).any():
        products = products.masked_fill((pooled == 0) & (lo.isinf() | hi.isinf()), 0.0)
    scores = products.sum(dim=2)  # [B, Hkv, M]

    # Blocks past the end are never selected.
    first_slot = torch.arange(scores.shape[2], device=query.device) * block_size
    return scores.masked_fill(first_slot >= lengths.view(-1, 1, 1), float("-inf"))


def active_blocks(lengths: Tensor, config: ReSAConfig) -> Tensor:
    """Blocks to read, a number n = min(M, max(min_blocks, ceil(p·M))) (eq. 5); lengths [B] → [B].

    >>> active_blocks(torch.tensor([480, 481, 100, 0]), ReSAConfig(min_blocks=3)).tolist()
    [3, 4, 3, 0]
    """
    total = (lengths.long() + config.block_size - 1) // config.block_size  # M in use
    # 0.28 · 25 is a little more than 7 in float64 and must still give 7: hence 1e-9 less.
    share = torch.ceil(config.active_ratio * total.double() - 1e-9).long()
    return torch.minimum(total, share.clamp(min=config.min_blocks))


def select_blocks(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
    """The blocks to read: the newest `local_blocks`, then the highest scores, n in all (eq. 5).

    scores [B, Hkv, M], lengths [B] → indices [B, Hkv, N] int32, ascending, −1 behind them; N is the
    largest n in the batch. Equal scores: the lower index wins. NaN ranks below every number, and
    blocks past the end are never taken.
    """
    # Without ties and NaN this is top-n with the newest blocks at +∞. The rest makes the result
    # unique, so that ports can agree. Tiers: 0 newest blocks, 1 numbers, 2 NaN, 3 past the end.
    index = torch.arange(scores.shape[2], device=scores.device).expand_as(scores)
    total = ((lengths + config.block_size - 1) // config.block_size).view(-1, 1, 1)
    tier = torch.where(scores.isnan(), 2, 1)
    tier = torch.where(index >= total - config.local_blocks, 0, tier)
    tier = torch.where(index >= total, 3, tier)

    # Two stable sorts order by tier, then score, then index. Adding 0.0 turns −0.0 into +0.0, which
    # a sort by bits would tell apart.
    comparable = torch.where(scores.isnan(), float("-inf"), scores) + 0.0
    by_score = comparable.argsort(dim=2, descending=True, stable=True)
    order = by_score.gather(2, tier.gather(2, by_score).argsort(dim=2, stable=True))

    # Keep the first n of each sequence, ascending. M stands for −1 until then: it sorts last.
    n, n_blocks = active_blocks(lengths, config), scores.shape[2]
    taken = order[..., : int(n.max()) if len(n) else 0]  # [B, Hkv, N]
    is_spare = index[..., : taken.shape[2]] >= n.view(-1, 1, 1)
    ascending = taken.masked_fill(is_spare, n_blocks).sort(dim=2).values
    return ascending.masked_fill(ascending == n_blocks, -1).to(torch.int32)
