"""The work of a transformer between its matrix products, in Triton: residual and norm, RoPE,
SwiGLU, one kernel each.

While decoding, a few rows pass through, and every kernel's time is its launch. Written with torch,
a layer takes some forty of them; here four. They round where the reference rounds, so results
differ by the order of a sum at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import let_next_start, overlapped, wait_for_previous
from .limits import INTERPRETED

# Rows per program. An interpreted program costs milliseconds, however little it does.
ROWS = 16 if INTERPRETED else 1
HEADS = 16  # of a token's heads, per program and row


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, None adding nothing; then RMSNorm: x / sqrt(mean(x²) + eps) · weight.

    x and delta [..., C], weight [C] → [..., C]; all contiguous, of one dtype; sums in float32.
    """
    size, out = x.shape[-1], torch.empty_like(x)
    if out.numel():
        padded, n_rows = triton.next_power_of_2(size), x.numel() // size
        _add_norm_kernel[(triton.cdiv(n_rows, ROWS),)](
            x, delta, weight, out, n_rows, size, eps, ROWS, padded,
            num_warps=max(1, min(16, padded // 256)), **overlapped(x.device)
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _add_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, n_rows, size, eps, ROWS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Some rows. Grid: (ceil(rows / ROWS),). Tile: [ROWS, C], the row padded to a power of two."""
    # The weight may be loaded early: no kernel right before this one writes it.
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, C)[None, :]
    m_c = o_c < size
    m_x = (o_row < n_rows) & m_c
    o_x = o_row * size + o_c
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0)
    wait_for_previous()
    let_next_start()

    # Add, rounded as the reference rounds.
    x = tl.load(x_ptr + o_x, mask=m_x, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        wide = (wide + delta).to(dtype).to(tl.float32)
        tl.store(x_ptr + o_x, wide.to(dtype), mask=m_x)

    # Norm.
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)[:, None]
    tl.store(out_ptr + o_x, _weighted(wide * scale, weight, dtype).to(dtype), mask=m_x)


@triton.jit
def _weighted(normed, weight, dtype: tl.constexpr):
    """normed · weight in float32; both factors and the product are rounded to dtype."""
    return (normed.to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)


def split_heads(
    projected: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values out of one projection, each contiguous. Queries and keys are normed
    where weights are given, and rotated.

    projected [B, Q, (Hq + 2·Hkv)·D]; cos and sin [B, 1, Q, D/2] float32; q_weight and k_weight [D],
    of the RMSNorm per head, or both None → query [B, Hq, Q, D], key and value [B, Hkv, Q, D].
    """
    batch, width, _ = projected.shape
    heads = (n_head, n_kv_head, n_kv_head)
    size, n_rows = projected.shape[2] // sum(heads), batch * width * sum(heads)
    out = torch.empty_like(projected)
    if out.numel():
        _split_kernel[(triton.cdiv(n_rows, HEADS * ROWS),)](
            projected, cos, sin, q_weight, k_weight, out, batch, width, eps,
            n_head, n_kv_head, size // 2, HEADS * ROWS, **overlapped(out.device)
        )  # fmt: skip
    parts = out.view(-1).split([batch * n * width * size for n in heads])
    return tuple(part.view(batch, n, width, size) for part, n in zip(parts, heads, strict=True))


@triton.jit
def _split_kernel(
    projected_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, out_ptr, batch, width, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Some rows of projected heads, token by token. Grid: (ceil(B·Q·(Hq + 2·Hkv) / ROWS),).

    Tiles: [ROWS, HALF], twice: the two halves of the channels, which rotate with one another. The
    output holds all queries, then all keys, then all values.
    """
    # The place of each row, a token's head, in the output.
    ALL: tl.constexpr = HQ + 2 * HKV
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_token, o_head = o_row // ALL, o_row % ALL
    o_d = tl.arange(0, HALF)[None, :]
    m_row = (o_token < batch * width)[:, None]
    is_query, is_rotated = o_head < HQ, o_head < HQ + HKV
    n_heads = tl.where(is_query, HQ, HKV)
    n_before = tl.where(is_query, 0, tl.where(is_rotated, HQ, HQ + HKV))  # heads of earlier parts
    place = (o_token // width) * n_heads + o_head - n_before
    o_target = n_before * batch * width + place * width + o_token % width
    p_in = projected_ptr + o_row[:, None] * 2 * HALF + o_d
    p_out = out_ptr + o_target[:, None] * 2 * HALF + o_d
    o_angle = o_token[:, None] * HALF + o_d
    is_query, is_rotated = is_query[:, None], is_rotated[:, None]
    wait_for_previous()
    let_next_start()
    first = tl.load(p_in, mask=m_row, other=0.0)
    second = tl.load(p_in + HALF, mask=m_row, other=0.0)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)

    # Norm, over both halves.
    if q_weight_ptr is not None:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        q_weight, k_weight = tl.load(q_weight_ptr + o_d), tl.load(k_weight_ptr + o_d)
        a = _weighted(a * scale, tl.where(is_query, q_weight, k_weight), dtype)
        q_weight, k_weight = tl.load(q_weight_ptr + HALF + o_d), tl.load(k_weight_ptr + HALF + o_d)
        b = _weighted(b * scale, tl.where(is_query, q_weight, k_weight), dtype)

    # Rotate queries and keys; values pass through.
    cos = tl.load(cos_ptr + o_angle, mask=m_row, other=1.0)
    sin = tl.load(sin_ptr + o_angle, mask=m_row, other=0.0)
    tl.store(p_out, tl.where(is_rotated, (a * cos - b * sin).to(dtype), first), mask=m_row)
    tl.store(p_out + HALF, tl.where(is_rotated, (b * cos + a * sin).to(dtype), second), mask=m_row)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up; gate_up [..., 2·I], gate first, contiguous → [..., I]."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    if out.numel():
        n_rows = out.numel() // size
        grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(size, 1024))
        _swiglu_kernel[grid](gate_up, out, n_rows, size, ROWS, 1024, **overlapped(out.device))
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _swiglu_kernel(gate_up_ptr, out_ptr, n_rows, size, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Part of some rows. Grid: (ceil(rows / ROWS), tiles). Tile: [ROWS, TILE] channels."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    m_out = (o_row < n_rows) & (o_c < size)
    wait_for_previous()
    let_next_start()
    gate = tl.load(gate_up_ptr + o_row * 2 * size + o_c, mask=m_out, other=0.0)
    up = tl.load(gate_up_ptr + (o_row * 2 + 1) * size + o_c, mask=m_out, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    gated = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + o_row * size + o_c, (gated * up).to(gate.dtype), mask=m_out)
