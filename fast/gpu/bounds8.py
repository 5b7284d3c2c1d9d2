"""Bounds in 8 bits, rounded outward so that they still are bounds (law 1). The reference has none.

A score then reads a quarter of what both 16-bit bounds would cost. The loss is precision: an e4m3
number has three bits of mantissa, so a bound moves outward by up to an eighth of itself, and other
blocks may be selected.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.checks import bind_shapes, require

from .limits import check_kernel_dtypes, check_layout, check_sizes


@dataclass(frozen=True)
class Bounds8:
    """Bounds in 8 bits, rounded outward: half the bytes of float16, and still bounds (law 1).

    A code is an e4m3 number, to be multiplied by its channel's scale. What is too large for it, or
    NaN, has the code of NaN and reads as −∞ for lo and +∞ for hi.
    """

    codes: Tensor  # [B, Hkv, 2, D, M] uint8
    scale: Tensor  # [B, Hkv, D] float32, powers of two


def table_and_scale(bounds: Tensor | Bounds8) -> tuple[Tensor, Tensor | None]:
    """Tensors that a kernel reads: the bounds themselves, or their codes and scales."""
    return (bounds.codes, bounds.scale) if isinstance(bounds, Bounds8) else (bounds, None)


def compress_bounds(bounds: Tensor) -> Bounds8:
    """Bounds [B, Hkv, 2, D, M] in 8 bits.

    Later keys are written with the scales chosen here. So a channel has room for bounds 16 times as
    large as its largest, and a channel that is silent so far for the largest of its head. What
    outgrows even that reads as no bound.
    """
    sizes = bind_shapes(bounds=(bounds, "B Hkv 2 D M"))
    check_kernel_dtypes(bounds=bounds)
    check_sizes(D=sizes["D"])
    check_layout("bounds", bounds)
    if bounds.is_cuda:
        capability = torch.cuda.get_device_capability(bounds.device)
        given = f"a GPU of compute capability {capability}"
        require(capability >= (8, 9), "bounds", given, "(8, 9) or later")

    # A scale is the smallest power of two that leaves this room below 448 = 0.875 · 2^9, the
    # largest e4m3 number.
    batch, n_kv_head, _, head_dim, n_blocks = bounds.shape
    codes = torch.empty_like(bounds, dtype=torch.uint8)
    if not codes.numel():
        return Bounds8(codes, bounds.new_ones(batch, n_kv_head, head_dim, dtype=torch.float32))
    finite = torch.where(bounds.isfinite(), bounds, 0)
    largest = finite.abs().amax(dim=(2, 4)).float()  # [B, Hkv, D]
    largest = torch.maximum(16 * largest, largest.amax(dim=2, keepdim=True))
    mantissa, exponent = torch.frexp(largest)  # mantissa · 2^exponent, mantissa from ½ to 1
    exponent = torch.where(mantissa > 0.875, exponent - 8, exponent - 9).clamp(-120, 120)
    scale = ((exponent + 127) << 23).view(torch.float32)  # 2^exponent, by its bits
    grid = (bounds[..., 0].numel(), triton.cdiv(n_blocks, 1024))
    _compress_kernel[grid](bounds, scale, codes, n_blocks, head_dim, 1024)
    return Bounds8(codes, scale)


@triton.jit
def _compress_kernel(
    bounds_ptr, scale_ptr, codes_ptr, n_blocks, D: tl.constexpr, BLOCKS: tl.constexpr
):
    """Codes of BLOCKS bounds of one channel, lo or hi.

    Grid: (B·Hkv·2·D, ceil(M / BLOCKS)). Tile: [BLOCKS]. Invariant: lo is rounded down, hi up.
    """
    i_channel = tl.program_id(0).to(tl.int64)  # ((sequence · Hkv + head) · 2 + side) · D + channel
    o_block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    m_block = o_block < n_blocks
    bound = tl.load(bounds_ptr + i_channel * n_blocks + o_block, mask=m_block, other=0.0)
    scale = tl.load(scale_ptr + i_channel // (2 * D) * D + i_channel % D)
    code = encode_e4m3(bound.to(tl.float32), scale, (i_channel // D) % 2 == 1)
    tl.store(codes_ptr + i_channel * n_blocks + o_block, code, mask=m_block)


@triton.jit
def encode_e4m3(x, scale, is_hi):
    """The e4m3 code next to float32 x / scale, above it for hi and below it for lo.

    The scale is a power of two. e4m3 has 4 bits of exponent (bias 7) and 3 of mantissa, and codes
    rise with magnitude: the code towards zero is the float's upper bits, the one away from zero the
    next. 0x7F is NaN, here: no bound.
    """
    # Multiply by the scale's inverse, found by its bits: a division need not be exact, and outward
    # rounding relies on that.
    x *= (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF

    # Find the code towards zero. Below 2^-6 the exponent stays and the steps are 2^-9.
    is_small = magnitude < 0x3C800000
    steps = tl.minimum(tl.abs(x), 1.0) * 512.0
    toward_zero = tl.where(is_small, steps.to(tl.int32), (magnitude >> 20) - (120 << 3))
    is_inexact = tl.where(is_small, steps != tl.floor(steps), (magnitude & 0xFFFFF) != 0)

    # Outward is away from zero for a positive hi or a negative lo.
    is_outward = (x > 0) == is_hi
    away = toward_zero + is_inexact.to(tl.int32)
    code = tl.where(is_outward, away, tl.minimum(toward_zero, 0x7E))
    code = tl.where(x != x, 0x7F, tl.minimum(code, 0x7F))
    return (code | ((bits >> 31) & 0x80)).to(tl.uint8)
