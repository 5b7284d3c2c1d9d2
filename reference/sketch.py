"""Which blocks a step reads, chosen by key sketches instead of bounds; this project's own.

The bounds of eq. 3 say how large a logit in a block could be at most. In many dimensions that is
far more than any logit is: the block would need a key that is extreme in every channel at once. A
*sketch* keeps every key instead, in 1 or 2 bits per channel, and estimates what share of the
attention each block will get. Four ideas:

1. `rotate` spreads what is large in a few channels over all of them. Queries are rotated alike, so
   all products stay what they were.
2. A *code* keeps on which of four levels each rotated channel lies, or its sign alone; a scale per
   key makes up for the rest: k ≈ a · c after rotation.
3. The *estimate* of a logit is then a · ⟨q, c⟩ / sqrt(D).
4. The score of a block is its *mass*: the softmax of the estimates, summed over its tokens and over
   the heads of the group.

Shapes are those of `blocks.py`. Keys that one step appends, or a dense pass overwrites, get new
sketches; all others keep theirs. So nothing is ever rebuilt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import accumulation_dtype

# Of a normal variable with deviation 1, four levels this far apart lose least (Max 1960).
STEP = 0.9957


def random_signs(size: int, device: torch.device) -> Tensor:
    """The signs of the rotation, 1 or −1, from a hash of the channel's number: [D] int64.

    >>> random_signs(8, torch.device("cpu")).tolist()
    [1, -1, 1, 1, -1, 1, 1, -1]
    """
    mask = 2**32 - 1
    x = (torch.arange(1, size + 1, device=device) * 2654435761) & mask  # overflow keeps these bits
    y = ((x ^ (x >> 15)) * 2246822519) & mask
    return 1 - 2 * (y >> 31)


def rotate(x: Tensor) -> Tensor:
    """Rotate keys or queries [..., D] → [..., D] float32 (float64 for float64 input).

    Signs, then a Hadamard transform of each run of m channels, m the largest power of two that
    divides D. Each channel becomes a sum of ± all others of its run: an outlier is then everywhere
    and nowhere.
    """
    wide = x.to(accumulation_dtype(x.dtype)) * random_signs(x.shape[-1], x.device)
    m, stride = x.shape[-1] & -x.shape[-1], 1
    while stride < m:
        first, second = wide.unflatten(-1, (-1, 2, stride)).unbind(dim=-2)
        wide = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        stride *= 2
    return wide * m**-0.5


def sketch_keys(keys: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """Code and scale of every key.

    keys [B, Hkv, T_max, D] → codes [B, Hkv, T_max, D·bits/8] uint8, scales [B, Hkv, T_max] in the
    keys' dtype. A key that is not finite, or whose scale is not, has code 0 and scale NaN.
    """
    # The level of every rotated channel: its sign, or 0 … 3.
    rotated = rotate(keys)
    levels = (rotated >= 0).to(torch.uint8)
    if bits == 2:
        step = STEP * rotated.square().mean(dim=-1, keepdim=True).sqrt()
        levels = levels + (rotated >= -step) + (rotated >= step)

    # The scale for which a · c comes nearest to the rotated key; 0 for a key of zeros.
    code = centred(levels, bits, rotated.dtype)
    scales = ((rotated * code).sum(dim=-1) / code.square().sum(dim=-1)).to(keys.dtype)
    is_lost = ~(scales.isfinite() & keys.isfinite().all(dim=-1))

    # Pack 8 / bits channels into a byte, the first one lowest.
    levels = levels.masked_fill(is_lost[..., None], 0).unflatten(-1, (-1, 8 // bits))
    packed = (levels << places(bits, keys.device)).sum(dim=-1, dtype=torch.uint8)
    return packed, scales.masked_fill(is_lost, float("nan"))


def score_sketch(
    query: Tensor, codes: Tensor, scales: Tensor, lengths: Tensor, block_size: int
) -> Tensor:
    """Estimated attention mass of each block, summed over the heads of a group.

        ℓ[t] = a[t] · ⟨q, c[t]⟩ / sqrt(D),  score[i] = Σ_g Σ_{t ∈ block i} softmax_t(ℓ)

    query [B, Hq, D], codes [B, Hkv, T_max, D·bits/8], scales [B, Hkv, T_max], lengths [B] → scores
    [B, Hkv, M] float32 (float64 for float64 input): between 0 and G, and G in all. −∞ for blocks
    past the end. A valid token whose scale is NaN has no mass, and its block scores NaN.
    """
    # Estimate the logits of all heads of a group at once: the codes are unpacked once.
    rotated = rotate(query).unflatten(1, (codes.shape[1], -1))  # [B, Hkv, G, D]
    code = unpacked(codes, codes.shape[-1] * 8 // query.shape[-1], rotated.dtype)
    scale = scales.to(rotated.dtype)[:, :, None]  # [B, Hkv, 1, T]
    logits = (rotated @ code.mT) * scale * query.shape[-1] ** -0.5  # [B, Hkv, G, T]

    # Softmax over the valid tokens. Where there is none, 0 / 0 is to be 0.
    slots = torch.arange(codes.shape[2], device=query.device)
    is_valid = slots < lengths.view(-1, 1, 1, 1)  # [B, 1, 1, T]
    is_lost = is_valid & scale.isnan()
    is_seen = is_valid & ~is_lost
    mass = logits.masked_fill(~is_seen, float("-inf")).softmax(dim=-1)
    mass = mass.masked_fill(~is_seen, 0.0).masked_fill(is_lost, float("nan"))

    # Sum over each block's tokens and the group's heads.
    blocks = F.pad(mass, (0, -mass.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    scores = blocks.sum(dim=(2, 4))  # [B, Hkv, M]
    first_slot = torch.arange(scores.shape[2], device=query.device) * block_size
    return scores.masked_fill(first_slot >= lengths.view(-1, 1, 1), float("-inf"))


def centred(levels: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Levels as numbers around 0: −1.5, −0.5, 0.5 and 1.5, or −1 and 1 for one bit."""
    wide = levels.to(dtype)
    return wide - 1.5 if bits == 2 else 2 * wide - 1


def unpacked(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Codes [..., D·bits/8] → c [..., D]."""
    levels = (codes[..., None] >> places(bits, codes.device)) & (2**bits - 1)
    return centred(levels.flatten(-2), bits, dtype)


def places(bits: int, device: torch.device) -> Tensor:
    """Where in a byte the channels begin: [8 / bits] uint8."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
