"""Bookkeeping of a decoding step: one kernel plans it, and one notes what was chosen.

Lengths, masks and counts are a few numbers per sequence, and every operation on them costs its
launch. Written with torch, a step had some sixty, as much time as two layers take.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resa.reference.config import ReSAConfig

SEQUENCES = 128  # per program
NEVER = 2**30  # more tokens than any sequence drifts by


class Plan(NamedTuple):
    """Who takes a sparse step, where its token goes, and how much there is to read; [B] int32 each.

    Sequences that do not take it have start = end, and nothing to read.
    """

    mask: Tensor  # 1 for the sequences that take the step, 0 for others
    start: Tensor  # the position of the token fed
    end: Tensor  # start + 1
    visible: Tensor  # tokens to attend to, the one fed included
    completed: Tensor  # the ones before the newest block
    counts: Tensor  # blocks to select, n (eq. 5)


def plan_step(lengths: Tensor, n_drifted: Tensor, running: Tensor, config: ReSAConfig) -> Plan:
    """Plan the sparse step of the running sequences, those that are due for a dense pass excepted.

    lengths and n_drifted [B] int32, running [B] bool. Under "paper" a pass that is due has run
    before the next step begins, so there nobody is.
    """
    batch = len(lengths)
    plan = lengths.new_empty(6, batch)
    limit = NEVER if config.drift_limit is None else config.drift_limit
    _plan_kernel[(triton.cdiv(batch, SEQUENCES),)](
        lengths, n_drifted, running, plan, batch, limit, config.min_blocks,
        float(config.active_ratio), config.block_size, SEQUENCES
    )  # fmt: skip
    return Plan(*plan.unbind())


@triton.jit
def _plan_kernel(
    lengths_ptr, n_drifted_ptr, running_ptr, plan_ptr, batch, drift_limit, min_blocks,
    RATIO: tl.constexpr, BLOCK_SIZE: tl.constexpr, SEQUENCES: tl.constexpr
):  # fmt: skip
    """Plan of some sequences. Grid: (ceil(B / SEQUENCES),). Tile: [SEQUENCES]."""
    # A sequence takes the step while fewer than `drift_limit` of its tokens drift.
    o_s = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    m_s = o_s < batch
    length = tl.load(lengths_ptr + o_s, mask=m_s, other=0)
    n_drifted = tl.load(n_drifted_ptr + o_s, mask=m_s, other=0)
    is_running = tl.load(running_ptr + o_s, mask=m_s, other=0) != 0
    is_sparse = is_running & (n_drifted < drift_limit)
    end = length + is_sparse.to(tl.int32)
    visible = tl.where(is_sparse, end, 0)

    # Blocks to select: in float64, and 1e-9 less, because 0.28 · 25 must give 7.
    total = tl.cdiv(visible, BLOCK_SIZE)
    ratio, little = tl.full([SEQUENCES], RATIO, tl.float64), tl.full([SEQUENCES], 1e-9, tl.float64)
    share = tl.ceil(total.to(tl.float64) * ratio - little).to(tl.int32)
    counts = tl.minimum(total, tl.maximum(share, min_blocks))
    completed = tl.maximum(visible - 1, 0) // BLOCK_SIZE * BLOCK_SIZE

    tl.store(plan_ptr + o_s, is_sparse.to(tl.int32), mask=m_s)
    tl.store(plan_ptr + batch + o_s, length, mask=m_s)
    tl.store(plan_ptr + 2 * batch + o_s, end, mask=m_s)
    tl.store(plan_ptr + 3 * batch + o_s, visible, mask=m_s)
    tl.store(plan_ptr + 4 * batch + o_s, completed, mask=m_s)
    tl.store(plan_ptr + 5 * batch + o_s, counts, mask=m_s)


def note_tokens(
    chosen: Tensor, mask: Tensor, end: Tensor, tokens: Tensor, n_chosen: Tensor, pending: Tensor,
    running: Tensor, lengths: Tensor, n_drifted: Tensor, stop: Tensor, *, is_sparse: bool
) -> None:  # fmt: skip
    """Note the tokens that the sequences in `mask` have chosen, their caches now ending at `end`.

    chosen [B] int64, mask [B] integer or bool, end [B] int32, stop [n] int64. Updated in place
    where the mask says so: tokens [B, N] int64 at place n_chosen[s], n_chosen and pending [B]
    int64, running [B] bool (false after the last token or a stop token), lengths [B] int32, and
    n_drifted [B] int32, one more after a sparse step and 0 after a dense pass.
    """
    batch, n_tokens = tokens.shape
    _note_kernel[(triton.cdiv(batch, SEQUENCES),)](
        chosen, mask, end, tokens, n_chosen, pending, running, lengths, n_drifted, stop,
        batch, n_tokens, len(stop), is_sparse, SEQUENCES
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "n_stop"])
def _note_kernel(
    chosen_ptr, mask_ptr, end_ptr, tokens_ptr, n_chosen_ptr, pending_ptr, running_ptr, lengths_ptr,
    n_drifted_ptr, stop_ptr, batch, n_tokens, n_stop,
    IS_SPARSE: tl.constexpr, SEQUENCES: tl.constexpr
):  # fmt: skip
    """Tokens of some sequences. Grid: (ceil(B / SEQUENCES),). Tile: [SEQUENCES]."""
    # The token itself.
    o_s = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    m_s = o_s < batch
    m_s &= tl.load(mask_ptr + o_s, mask=m_s, other=0) != 0
    token = tl.load(chosen_ptr + o_s, mask=m_s, other=0)
    n_chosen = tl.load(n_chosen_ptr + o_s, mask=m_s, other=0)
    p_token = tokens_ptr + o_s.to(tl.int64) * n_tokens + n_chosen
    tl.store(p_token, token, mask=m_s & (n_chosen < n_tokens))
    tl.store(pending_ptr + o_s, token, mask=m_s)
    tl.store(n_chosen_ptr + o_s, n_chosen + 1, mask=m_s)

    # Whether it ends its sequence.
    has_ended = n_chosen + 1 >= n_tokens
    for i in range(n_stop):
        has_ended |= token == tl.load(stop_ptr + i)
    tl.store(running_ptr + o_s, False, mask=m_s & has_ended)

    # The cache behind it.
    tl.store(lengths_ptr + o_s, tl.load(end_ptr + o_s, mask=m_s, other=0), mask=m_s)
    n_drifted = tl.load(n_drifted_ptr + o_s, mask=m_s, other=0) + 1
    tl.store(n_drifted_ptr + o_s, n_drifted if IS_SPARSE else 0 * n_drifted, mask=m_s)
