"""Which blocks of the cache a decoding step reads: bounds (eq. 3), scores (eq. 4), selection (eq. 5).

Each function states its result whole, over the entire cache. Keeping bounds up to date as tokens come and go is
the cache's task; computing attention over the selected blocks is `attention.py`'s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    FLOATS,
    accumulation_dtype,
    bind_shapes,
    check_dtypes,
    check_heads,
    check_lengths,
    is_integer,
    require,
)
from .config import ReSAConfig


def block_bounds(keys: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Smallest and largest key of every block, per channel (eq. 3).

    keys [B, Hkv, T_max, D], lengths [B] → bounds [B, Hkv, 2, D, M] in the keys' dtype: 0 = lo, 1 = hi,
    M = ceil(T_max / block_size). Only keys before the length count; a block without any has lo = +∞, hi = −∞,
    the neutral elements of min and max. Raises `ValueError` for arguments that do not fit together.

    >>> block_bounds(torch.tensor([[[[1.0], [5.0], [3.0]]]]), torch.tensor([3]), 2)[0, 0].tolist()
    [[[1.0, 3.0]], [[5.0, 3.0]]]
    """
    sizes = bind_shapes(keys=(keys, "B Hkv T_max D"), lengths=(lengths, "B"))
    check_dtypes(FLOATS, keys=keys)
    check_lengths("lengths", lengths, sizes["T_max"])
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    n_blocks = -(-sizes["T_max"] // block_size)
    padding = n_blocks * block_size - sizes["T_max"]
    blocks = F.pad(keys, (0, 0, 0, padding)).unflatten(2, (n_blocks, block_size))  # [B, Hkv, M, b, D]
    slots = torch.arange(n_blocks * block_size, device=keys.device).view(n_blocks, block_size, 1)
    valid = slots < lengths.view(-1, 1, 1, 1, 1)  # [B, 1, M, b, 1]
    lo = torch.where(valid, blocks, float("inf")).amin(dim=3)  # [B, Hkv, M, D]
    hi = torch.where(valid, blocks, float("-inf")).amax(dim=3)
    return torch.stack((lo, hi), dim=2).transpose(3, 4).contiguous()


def score_blocks(query: Tensor, bounds: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Upper bound of the pooled query's logit over each block, without the softmax scale (eq. 4).

        score[i] = Σ_d max(q̄_d · lo[i]_d, q̄_d · hi[i]_d),  q̄ = mean of the group's query heads

    query [B, Hq, D], bounds [B, Hkv, 2, D, M], lengths [B] → scores [B, Hkv, M] float32 (float64 for float64
    input), −∞ for blocks past the end. Raises `ValueError` for arguments that do not fit together.
    """
    sizes = bind_shapes(query=(query, "B Hq D"), bounds=(bounds, "B Hkv 2 D M"), lengths=(lengths, "B"))
    check_heads(sizes["Hq"], sizes["Hkv"])
    check_dtypes(FLOATS, query=query, bounds=bounds)
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    check_lengths("lengths", lengths, sizes["M"] * block_size)
    dtype = accumulation_dtype(query.dtype)
    pooled = query.to(dtype).unflatten(1, (sizes["Hkv"], -1)).mean(dim=2)[..., None]  # [B, Hkv, D, 1]
    lo, hi = bounds.to(dtype).unbind(dim=2)  # [B, Hkv, D, M]
    products = torch.maximum(pooled * lo, pooled * hi)
    if (pooled == 0).any():  # 0 · ±∞ is 0 here, not NaN
        products = products.masked_fill((pooled == 0) & (lo.isinf() | hi.isinf()), 0.0)
    scores = products.sum(dim=2)  # [B, Hkv, M]
    first_slot = torch.arange(sizes["M"], device=query.device) * block_size
    return scores.masked_fill(first_slot >= lengths.view(-1, 1, 1), float("-inf"))


def active_blocks(lengths: Tensor, config: ReSAConfig) -> Tensor:
    """n = min(M, max(min_blocks, ceil(p·M))), the number of blocks to attend (eq. 5); lengths [B] → [B] int64.

    >>> active_blocks(torch.tensor([480, 481, 100, 0]), ReSAConfig(min_blocks=3)).tolist()
    [3, 4, 3, 0]
    """
    total = (lengths.long() + config.block_size - 1) // config.block_size  # M
    # Less 1e-9, because 0.28 · 25 is a little more than 7 in float64 and must still give 7.
    share = torch.ceil(config.active_ratio * total.double() - 1e-9).long()
    return torch.minimum(total, share.clamp(min=config.min_blocks))


def select_blocks(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
    """The blocks to attend: the newest `local_blocks`, then the highest scores, n in all (eq. 5).

    scores [B, Hkv, M], lengths [B] → indices [B, Hkv, N] int32, ascending, −1 behind them; N is the largest n
    in the batch. Equal scores: the lower index wins. NaN ranks below every number, and blocks past the end
    are never taken. Raises `ValueError` for arguments that do not fit together.
    """
    sizes = bind_shapes(scores=(scores, "B Hkv M"), lengths=(lengths, "B"))
    check_dtypes((torch.float32, torch.float64), scores=scores)
    check_lengths("lengths", lengths, sizes["M"] * config.block_size)
    index = torch.arange(sizes["M"], device=scores.device).expand_as(scores)
    total = ((lengths + config.block_size - 1) // config.block_size).view(-1, 1, 1)
    tier = torch.where(scores.isnan(), 2, 1)  # 0: newest blocks, 1: numbers, 2: NaN, 3: past the end
    tier = torch.where(index >= total - config.local_blocks, 0, tier)
    tier = torch.where(index >= total, 3, tier)
    # Two stable sorts order by tier, then score, then index. "+ 0.0" turns −0.0 into +0.0: a sort by bits
    # would tell them apart.
    comparable = torch.where(scores.isnan(), float("-inf"), scores) + 0.0
    by_score = comparable.argsort(dim=2, descending=True, stable=True)
    order = by_score.gather(2, tier.gather(2, by_score).argsort(dim=2, stable=True))
    n = active_blocks(lengths, config)
    taken = order[..., : int(n.max()) if len(n) else 0]  # [B, Hkv, N]
    is_spare = index[..., : taken.shape[2]] >= n.view(-1, 1, 1)
    ascending = taken.masked_fill(is_spare, sizes["M"]).sort(dim=2).values  # M stands for −1: it sorts last
    return ascending.masked_fill(ascending == sizes["M"], -1).to(torch.int32)
