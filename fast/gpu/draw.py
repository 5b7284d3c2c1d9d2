"""Drawing tokens from logits of 16 bits without a sort: temperature, top-k, top-p, one number each.

The reference sorts a row, likeliest first. But 16 bits have 65,536 values, so it is enough to count
how many tokens have each. A value's *place* is its number in descending order. Counts and masses of
the places say where the order is cut and which token is drawn. Of tokens in one place the lower id
comes first.

Masses are float64, added up in a fixed order, so that reruns draw the same tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import let_next_start, overlapped, wait_for_previous

PLACES = tl.constexpr(2**16)
ROW = tl.constexpr(2**16 + 16)  # numbers per row: its counts, then how far its first place is up
SEGMENTS, SEGMENT = tl.constexpr(64), tl.constexpr(1024)  # of places, and places of one
COUNTED, SCANNED = 2048, 2**14  # tokens that a program counts, or looks at together


def draw_tokens(
    logits: Tensor, temperature_and_top_p: Tensor, top_k: int | None, uniforms: Tensor,
    n_chosen: Tensor,
) -> Tensor:  # fmt: skip
    """Draw each row's token as `Sampling.token` does, with the uniform number u[s, n_chosen[s]].

    logits [B, V] of 16 bits, the temperature and top-p [2] float64, uniforms u [B, N] float64 whose
    last is repeated, n_chosen [B] → ids [B] int64. Where the largest logit is NaN or infinite, its
    first token is drawn.
    """
    (batch, size), device = logits.shape, logits.device
    counts = torch.zeros(batch, ROW.value, dtype=torch.int32, device=device)
    numbers = torch.empty(batch, SEGMENTS.value, dtype=torch.int32, device=device)
    masses = torch.empty(batch, SEGMENTS.value, dtype=torch.float64, device=device)
    ids = torch.empty(batch, dtype=torch.int64, device=device)
    logits, early = logits.contiguous(), overlapped(device)
    _count_kernel[(triton.cdiv(size, COUNTED), batch)](logits, counts, size, COUNTED, **early)
    _weigh_kernel[(SEGMENTS.value, batch)](
        logits, counts, temperature_and_top_p, numbers, masses, **early
    )
    _draw_kernel[(batch,)](
        logits, counts, numbers, masses, temperature_and_top_p, uniforms, n_chosen, ids,
        uniforms.shape[1], size, min(top_k or size, size), SCANNED, num_warps=16, **early
    )  # fmt: skip
    return ids


@triton.jit
def _count_kernel(logits_ptr, counts_ptr, size, TOKENS: tl.constexpr):
    """Count the tokens of every place, and find the first place.

    Grid: (ceil(V / TOKENS), B). Tile: [TOKENS]. Counts are zero before. Impossible tokens are left
    out: they weigh nothing, and where a mask has made many, all would wait for one counter.
    """
    wait_for_previous()
    let_next_start()
    p_row = counts_ptr + tl.program_id(1).to(tl.int64) * ROW
    o_v = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    p_logit = logits_ptr + tl.program_id(1).to(tl.int64) * size + o_v
    logit = tl.load(p_logit, mask=o_v < size, other=float("-inf"))
    place = _place(logit)
    tl.atomic_add(p_row + _slot(place), 1, mask=logit != float("-inf"), sem="relaxed")
    up = PLACES - 1 - tl.min(place, axis=0, keep_dims=True)  # [1]
    tl.atomic_max(p_row + PLACES + tl.arange(0, 1), up, sem="relaxed")


@triton.jit
def _weigh_kernel(logits_ptr, counts_ptr, settings_ptr, numbers_ptr, masses_ptr):
    """Number and mass of the tokens of one segment. Grid: (SEGMENTS, B). Tile: [SEGMENT] places."""
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    p_row = counts_ptr + i_row * ROW
    first, temperature = PLACES - 1 - tl.load(p_row + PLACES), tl.load(settings_ptr)
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    count, mass = _segment(p_row, tl.program_id(0), first, temperature, DTYPE)
    o_segment = i_row * SEGMENTS + tl.program_id(0)
    tl.store(numbers_ptr + o_segment, tl.sum(count, axis=0))
    tl.store(masses_ptr + o_segment, tl.sum(mass, axis=0))


@triton.jit
def _draw_kernel(
    logits_ptr, counts_ptr, numbers_ptr, masses_ptr, settings_ptr, uniforms_ptr, n_chosen_ptr,
    ids_ptr, n_uniforms, size, top_k, TOKENS: tl.constexpr
):  # fmt: skip
    """One row's cuts by top-k and top-p, then the place drawn, then its token. Grid: (B,)."""
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(0).to(tl.int64)
    p_row = counts_ptr + i_row * ROW
    o_s = tl.arange(0, SEGMENTS)
    numbers = tl.load(numbers_ptr + i_row * SEGMENTS + o_s)
    masses = tl.load(masses_ptr + i_row * SEGMENTS + o_s)
    first = PLACES - 1 - tl.load(p_row + PLACES)
    temperature, top_p = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    n_chosen = tl.minimum(tl.load(n_chosen_ptr + i_row), n_uniforms - 1)
    uniform = tl.load(uniforms_ptr + i_row * n_uniforms + n_chosen)
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty

    drawn, rank = first, 0
    if tl.abs(_value(first, DTYPE).to(tl.float32)) < float("inf"):
        # Top-k keeps all places before its last, and there as many tokens as are left.
        total = tl.sum(masses, axis=0)
        if top_k < size:
            cut, n_before, n = _find(numbers, top_k - 1, p_row, first, temperature, False, DTYPE)
            i_segment = cut // SEGMENT
            _, mass = _segment(p_row, i_segment, first, temperature, DTYPE)
            is_before = i_segment * SEGMENT + tl.arange(0, SEGMENT) < cut
            total = tl.sum(tl.where(o_s < i_segment, masses, 0.0), axis=0)
            total += tl.sum(tl.where(is_before, mass, 0.0), axis=0)
            total += tl.minimum(top_k - n_before, n) * _weight(cut, first, temperature, DTYPE)

        # Top-p keeps the tokens before which there is less than its share; 1e-12 absorbs rounding.
        goal = (top_p - 1e-12) * total
        last, before, count = _find(masses, goal, p_row, first, temperature, True, DTYPE)
        weight = _weight(last, first, temperature, DTYPE)
        kept = tl.maximum(tl.ceil((goal - before) / weight), 1.0)
        kept = tl.minimum(kept, count.to(tl.float64))

        # Drawn is the first up to which there is more than the uniform number's share of the kept.
        # Rounding may put it past the last.
        goal = uniform * (before + kept * weight)
        drawn, before, count = _find(masses, goal, p_row, first, temperature, True, DTYPE)
        rank = tl.floor((goal - before) / _weight(drawn, first, temperature, DTYPE))
        rank = tl.where(drawn > last, kept, rank)
        count = tl.where(drawn >= last, kept, count.to(tl.float64))
        drawn = tl.minimum(drawn, last)
        rank = tl.maximum(tl.minimum(rank, count - 1), 0).to(tl.int32)

    # Of the tokens in its place the one of this rank.
    start, token = 0, 0
    while rank >= 0:
        o_v = start + tl.arange(0, TOKENS)
        logit = tl.load(logits_ptr + i_row * size + o_v, mask=o_v < size, other=0.0)
        is_there = ((_place(logit) == drawn) & (o_v < size)).to(tl.int32)
        n = tl.sum(is_there, axis=0)
        if rank < n:
            token = start + tl.sum((tl.cumsum(is_there, axis=0) <= rank).to(tl.int32), axis=0)
        rank -= n
        start += TOKENS
    tl.store(ids_ptr + i_row, token.to(tl.int64))


@triton.jit
def _find(amounts, goal, p_row, first, temperature, BY_MASS: tl.constexpr, DTYPE: tl.constexpr):
    """The first place up to which there is more than `goal` → it, the amount before it, its count.

    amounts [SEGMENTS] are numbers or masses of tokens. Where rounding leaves nothing beyond the
    goal it is the last place that has tokens.
    """
    o_s, o_p = tl.arange(0, SEGMENTS), tl.arange(0, SEGMENT)
    i_segment = tl.sum((tl.cumsum(amounts, axis=0) <= goal).to(tl.int32), axis=0)
    i_segment = tl.minimum(i_segment, tl.max(tl.where(amounts > 0, o_s, 0), axis=0))
    before = tl.sum(tl.where(o_s < i_segment, amounts, 0), axis=0)
    count, mass = _segment(p_row, i_segment, first, temperature, DTYPE)
    amount = mass if BY_MASS else count
    i_place = tl.sum((before + tl.cumsum(amount, axis=0) <= goal).to(tl.int32), axis=0)
    i_place = tl.minimum(i_place, tl.max(tl.where(count > 0, o_p, 0), axis=0))
    before += tl.sum(tl.where(o_p < i_place, amount, 0), axis=0)
    own = tl.sum(tl.where(o_p == i_place, count, 0), axis=0)
    return i_segment * SEGMENT + i_place, before, own


@triton.jit
def _segment(p_row, i_segment, first, temperature, DTYPE: tl.constexpr):
    """Count and mass of the tokens of each of a segment's places, [SEGMENT] each."""
    o_place = i_segment * SEGMENT + tl.arange(0, SEGMENT)
    count = tl.load(p_row + _slot(o_place))
    weight = _weight(o_place, first, temperature, DTYPE)
    return count, tl.where(count > 0, count * weight, 0.0)


@triton.jit
def _slot(place):
    """Where a place's count lies. Likely places are neighbours, and their counters should not be:
    the memory adds up in 32 bytes at once, which would wait for one another.
    """
    return (place & 127) * 512 + (place >> 10) * 8 + (place >> 7 & 7)


@triton.jit
def _weight(place, first, temperature, DTYPE: tl.constexpr):
    """A token's mass: exp of its logit less the largest, over the temperature."""
    below = _value(place, DTYPE).to(tl.float64) - _value(first, DTYPE).to(tl.float64)
    return tl.exp(below / temperature)


@triton.jit
def _place(value):
    """The place of a value of 16 bits. Both zeros have one, and all NaN have the first."""
    bits = (value + 0.0).to(tl.int16, bitcast=True).to(tl.int32)
    order = bits ^ ((bits >> 31) & 0x7FFF)
    return tl.where(value != value, 0, 32767 - order)


@triton.jit
def _value(place, DTYPE: tl.constexpr):
    """The value that has this place."""
    order = 32767 - place
    return (order ^ ((order >> 31) & 0x7FFF)).to(tl.int16).to(DTYPE, bitcast=True)
