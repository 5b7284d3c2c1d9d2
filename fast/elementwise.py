"""What a transformer does between its matrix products, in Triton: residual and norm, RoPE, SwiGLU, one kernel each.

While decoding, a few rows pass through, and every kernel's time is its launch. Written with torch, a layer takes some
forty of them; here four. They round where the reference rounds, so results differ by the order of a sum at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import let_next_start, overlapped, wait_for_previous


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, None adding nothing; then RMSNorm of x: x / sqrt(mean(x²) + eps) · weight.

    x and delta [..., C], weight [C] → [..., C]; all contiguous, of one dtype; sums in float32.
    """
    size, out = x.shape[-1], torch.empty_like(x)
    if out.numel():
        padded = triton.next_power_of_2(size)
        warps = max(1, min(16, padded // 256))
        grid = (x.numel() // size,)
        _add_norm_kernel[grid](x, delta, weight, out, size, eps, padded, num_warps=warps, **overlapped(x.device))
    return out


@triton.jit
def _add_norm_kernel(x_ptr, delta_ptr, weight_ptr, out_ptr, size, eps, C: tl.constexpr):
    """One row. Grid: (rows). Tile: [C], the row padded to a power of two."""
    o_c = tl.arange(0, C)
    m_c = o_c < size
    o_row = tl.program_id(0).to(tl.int64) * size + o_c
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0)
    wait_for_previous()
    let_next_start()
    x = tl.load(x_ptr + o_row, mask=m_c, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + o_row, mask=m_c, other=0.0).to(tl.float32)
        wide = (wide + delta).to(dtype).to(tl.float32)
        tl.store(x_ptr + o_row, wide.to(dtype), mask=m_c)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    tl.store(out_ptr + o_row, _weighted(wide * scale, weight, dtype).to(dtype), mask=m_c)


@triton.jit
def _weighted(normed, weight, dtype: tl.constexpr):
    """normed · weight in float32, both factors and the product rounded to dtype, as the reference rounds."""
    return (normed.to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)


def split_heads(
    projected: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values out of one projection, each contiguous; queries and keys normed if asked, and turned.

    projected [B, Q, (Hq + 2·Hkv)·D]; cos and sin [B, 1, Q, D/2] float32; q_weight and k_weight [D], of the RMSNorm per
    head, or both None → query [B, Hq, Q, D], key and value [B, Hkv, Q, D].
    """
    batch, width, _ = projected.shape
    heads = (n_head, n_kv_head, n_kv_head)
    size = projected.shape[2] // sum(heads)
    out = torch.empty_like(projected)
    if out.numel():
        _split_kernel[(batch * width, sum(heads))](
            projected, cos, sin, q_weight, k_weight, out, batch, width, eps, n_head, n_kv_head, size // 2,
            num_warps=1, **overlapped(out.device),
        )  # fmt: skip
    parts = out.view(-1).split([batch * n * width * size for n in heads])
    return tuple(part.view(batch, n, width, size) for part, n in zip(parts, heads, strict=True))


@triton.jit
def _split_kernel(
    projected_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, out_ptr, batch, width, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token. Grid: (B·Q, Hq + 2·Hkv). Tiles: [HALF], the channels that turn with one another.

    The output holds all queries, then all keys, then all values.
    """
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, HALF)
    p_in = projected_ptr + (i_token * (HQ + 2 * HKV) + i_head) * 2 * HALF + o_d
    is_query, is_turned = i_head < HQ, i_head < HQ + HKV
    n_heads = tl.where(is_query, HQ, HKV)
    n_before = tl.where(is_query, 0, tl.where(is_turned, HQ, HQ + HKV))  # heads of the parts before this one
    i_row = n_before * batch * width + ((i_token // width) * n_heads + i_head - n_before) * width + i_token % width
    wait_for_previous()
    let_next_start()
    first, second = tl.load(p_in), tl.load(p_in + HALF)
    if is_turned:
        dtype = first.dtype
        a, b = first.to(tl.float32), second.to(tl.float32)
        if q_weight_ptr is not None:
            scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / (2 * HALF) + eps)
            p_weight = (q_weight_ptr if is_query else k_weight_ptr) + o_d
            a = _weighted(a * scale, tl.load(p_weight), dtype)
            b = _weighted(b * scale, tl.load(p_weight + HALF), dtype)
        cos, sin = tl.load(cos_ptr + i_token * HALF + o_d), tl.load(sin_ptr + i_token * HALF + o_d)
        first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    p_out = out_ptr + i_row * 2 * HALF + o_d
    tl.store(p_out, first)
    tl.store(p_out + HALF, second)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up; gate_up [..., 2·I], gate first, contiguous → [..., I]."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    if out.numel():
        grid = (out.numel() // size, triton.cdiv(size, 1024))
        _swiglu_kernel[grid](gate_up, out, size, 1024, **overlapped(out.device))
    return out


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, size, TILE: tl.constexpr):
    """Part of one row. Grid: (rows, tiles). Tile: [TILE] channels."""
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_c = o_c < size
    wait_for_previous()
    let_next_start()
    gate = tl.load(gate_up_ptr + i_row * 2 * size + o_c, mask=m_c, other=0.0)
    up = tl.load(gate_up_ptr + (i_row * 2 + 1) * size + o_c, mask=m_c, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    gated = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + i_row * size + o_c, (gated * up).to(gate.dtype), mask=m_c)
