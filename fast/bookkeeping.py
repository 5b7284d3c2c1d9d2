"""What a decoding step keeps account of, in one kernel before the model and one after it.

Lengths, windows, masks and counts are a few numbers per sequence, and every operation on them costs its launch: written
with torch, a step had some sixty, as much time as two layers take. The rules are the reference's (`decode_step`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resa.reference.config import ReSAConfig

SEQUENCES = 128  # per program
NEVER = 2**30  # a window that no sequence reaches


def enqueue_plan(lengths: Tensor, window: Tensor, active: Tensor, config: ReSAConfig) -> tuple[Tensor, ...]:
    """Who takes a sparse step, where its token goes, and how much there is to read.

    lengths and window [B] int32, active [B] bool → mask, start, end, visible, completed, counts, each [B] int32. The
    mask is 1 for active sequences that are neither shorter than `dense_below` nor due for a fused rectification; they
    feed one token at `start` = end − 1 and attend to `visible` tokens in `counts` blocks (eq. 5), of which those before
    `completed` lie in blocks that are older than the newest. For all others start = end and nothing is visible.
    """
    batch = len(lengths)
    plan = lengths.new_empty(6, batch)
    fused_at = config.interval if config.interval is not None and config.schedule == "fused" else NEVER
    _plan_kernel[(triton.cdiv(batch, SEQUENCES),)](
        lengths, window, active, plan, batch, config.dense_below, fused_at, config.min_blocks,
        float(config.active_ratio), config.block_size, SEQUENCES,
    )  # fmt: skip
    return plan.unbind()


@triton.jit
def _plan_kernel(
    lengths_ptr, window_ptr, active_ptr, plan_ptr, batch, dense_below, fused_at, min_blocks,
    RATIO: tl.constexpr, BLOCK_SIZE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Some sequences. Grid: (ceil(B / SEQUENCES),). Tile: [SEQUENCES]."""
    o_s = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    m_s = o_s < batch
    length = tl.load(lengths_ptr + o_s, mask=m_s, other=0)
    window = tl.load(window_ptr + o_s, mask=m_s, other=0)
    is_active = tl.load(active_ptr + o_s, mask=m_s, other=0) != 0
    is_sparse = is_active & (length >= dense_below) & (window + 1 < fused_at)
    end = length + is_sparse.to(tl.int32)
    visible = tl.where(is_sparse, end, 0)
    total = tl.cdiv(visible, BLOCK_SIZE)
    # In float64, and less 1e-9, as the reference has it: 0.28 · 25 is 7.
    ratio, little = tl.full([SEQUENCES], RATIO, tl.float64), tl.full([SEQUENCES], 1e-9, tl.float64)
    share = tl.ceil(total.to(tl.float64) * ratio - little).to(tl.int32)
    tl.store(plan_ptr + o_s, is_sparse.to(tl.int32), mask=m_s)
    tl.store(plan_ptr + batch + o_s, length, mask=m_s)
    tl.store(plan_ptr + 2 * batch + o_s, end, mask=m_s)
    tl.store(plan_ptr + 3 * batch + o_s, visible, mask=m_s)
    tl.store(plan_ptr + 4 * batch + o_s, tl.maximum(visible - 1, 0) // BLOCK_SIZE * BLOCK_SIZE, mask=m_s)
    tl.store(plan_ptr + 5 * batch + o_s, tl.minimum(total, tl.maximum(share, min_blocks)), mask=m_s)


def enqueue_append(
    chosen: Tensor, mask: Tensor, end: Tensor, tokens: Tensor, count: Tensor, pending: Tensor,
    active: Tensor, lengths: Tensor, window: Tensor, stop: Tensor, *, is_sparse: bool,
) -> None:  # fmt: skip
    """The sequences in `mask` have fed their tokens up to `end` and chosen another; see whose generation it ends.

    chosen [B] int64, mask [B] integer or bool, end [B] int32, stop [n] int64. Updated in place where the mask says so:
    tokens [B, N] int64 at place count[s], count and pending [B] int64, active [B] bool, lengths [B] int32, and window
    [B] int32, one more after a sparse step and 0 after a dense one.
    """
    batch, n_tokens = tokens.shape
    _append_kernel[(triton.cdiv(batch, SEQUENCES),)](
        chosen, mask, end, tokens, count, pending, active, lengths, window, stop, batch, n_tokens, len(stop),
        is_sparse, SEQUENCES,
    )  # fmt: skip


@triton.jit
def _append_kernel(
    chosen_ptr, mask_ptr, end_ptr, tokens_ptr, count_ptr, pending_ptr, active_ptr, lengths_ptr, window_ptr, stop_ptr,
    batch, n_tokens, n_stop, IS_SPARSE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Some sequences. Grid: (ceil(B / SEQUENCES),). Tile: [SEQUENCES]."""
    o_s = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    m_s = o_s < batch
    m_s &= tl.load(mask_ptr + o_s, mask=m_s, other=0) != 0
    token = tl.load(chosen_ptr + o_s, mask=m_s, other=0)
    count = tl.load(count_ptr + o_s, mask=m_s, other=0)
    tl.store(tokens_ptr + o_s.to(tl.int64) * n_tokens + count, token, mask=m_s & (count < n_tokens))
    tl.store(pending_ptr + o_s, token, mask=m_s)
    tl.store(count_ptr + o_s, count + 1, mask=m_s)
    has_ended = count + 1 >= n_tokens
    for i in range(n_stop):
        has_ended |= token == tl.load(stop_ptr + i)
    tl.store(active_ptr + o_s, False, mask=m_s & has_ended)
    tl.store(lengths_ptr + o_s, tl.load(end_ptr + o_s, mask=m_s, other=0), mask=m_s)
    window = tl.load(window_ptr + o_s, mask=m_s, other=0) + 1
    tl.store(window_ptr + o_s, window if IS_SPARSE else 0 * window, mask=m_s)
