"""The KV cache of a batch, and the kernel that writes a window of tokens into it.

Unlike the reference's `KVCache`, which holds one sequence and its length as a number, this one
holds a ragged batch and keeps the lengths on the device. `write_window` finds its place there, so a
CUDA graph can replay it while the sequences grow. A sparse step's window is one token, a
rectification's up to f.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.cache import KVCache
from resa.reference.checks import check_cache_memory
from resa.reference.config import GPTConfig

from .gpu.bounds8 import Bounds8, encode_e4m3, table_and_scale
from .gpu.launch import let_next_start
from .pages import cached_rows, check_bounds, layout, row_stride
from .sketch import Sketches, write_sketched


@dataclass
class BatchedCache:
    """Keys and values [layer, B, Hkv, T_max, D] of B sequences, their bounds and lengths.

    `bounds` holds one table [B, Hkv, 2, D, M] per layer, exact or in 8 bits; with `sketches` it is
    None. Slots at or past a length hold anything at all.
    """

    keys: Tensor
    values: Tensor
    bounds: Tensor | Sequence[Tensor | Bounds8] | None
    lengths: Tensor  # [B] int32, tokens cached
    block_size: int
    sketches: Sketches | None = None

    @classmethod
    def empty(
        cls, config: GPTConfig, batch: int, capacity: int, block_size: int,
        sketch_bits: int | None = None, *, dtype: torch.dtype, device: torch.device | str,
    ) -> BatchedCache:  # fmt: skip
        """A cache with room for `capacity` tokens per sequence and none in it."""
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        check_cache_memory(shape, block_size, dtype, torch.device(device), sketch_bits)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        values, lengths = (
            torch.zeros_like(keys),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )
        if sketch_bits is not None:
            codes = keys.new_zeros(*shape[:4], shape[4] * sketch_bits // 8, dtype=torch.uint8)
            sketches = Sketches(codes, keys.new_zeros(shape[:4]), sketch_bits)
            return cls(keys, values, None, lengths, block_size, sketches)
        n_blocks = triton.cdiv(capacity, block_size)
        bounds = keys.new_empty(*shape[:3], 2, config.head_dim, n_blocks)
        bounds[:, :, :, 0] = float("inf")  # no block holds a token yet
        bounds[:, :, :, 1] = float("-inf")
        return cls(keys, values, bounds, lengths, block_size)

    @property
    def capacity(self) -> int:
        """T_max, the most tokens of a sequence that fit."""
        return self.keys.shape[3]

    def searched(self, layer: int) -> Tensor | Bounds8 | Sketches:
        """Bounds or sketches of one layer, whichever a step searches for blocks in."""
        return self.bounds[layer] if self.sketches is None else self.sketches.of_layer(layer)

    def sequence(self, index: int, length: int) -> KVCache:
        """One sequence, `length` tokens of it, as the reference's cache.

        Its tensors are views. They keep the memory of the whole batch alive for as long as any one
        of its sequences is held.
        """
        own = slice(index, index + 1)
        keys, values, sketches = self.keys[:, own], self.values[:, own], self.sketches
        if sketches is None:
            return KVCache(keys, values, self.bounds[:, own], length, self.block_size)
        stored = sketches.bits, sketches.codes[:, own], sketches.scales[:, own]
        return KVCache(keys, values, None, length, self.block_size, *stored)


def write_window(
    keys: Tensor, values: Tensor, bounds: Tensor | Bounds8 | Sketches, new_keys: Tensor,
    new_values: Tensor, start: Tensor, end: Tensor, block_size: int,
    *, table: Tensor | None = None,
) -> None:  # fmt: skip
    """Store one layer's new keys and values in place, and rebuild the bounds they touch (law 2).

    keys and values [B, Hkv, T_max, D], bounds [B, Hkv, 2, D, M], exact or in 8 bits, or sketches,
    new_keys and new_values [B, Hkv, Q, D], start and end [B]. Sequence s stores its first end[s] −
    start[s] ≤ Q new tokens at positions start[s], start[s] + 1, … Positions from end[s] on do not
    count in the bounds, whatever they hold. end[s] = start[s] leaves sequence s as it is.

    With a table [B, pages] int32, keys, values and sketches are pools [P, Hkv, N, …] (see
    `pages.py`), and bounds, then exact, [P, Hkv, N / block_size, 2, D]: they lie with their page.
    """
    batch, n_kv_head, capacity, page_size = layout(keys, table)
    width, head_dim = new_keys.shape[2:]
    if new_keys.numel():
        start, end = (ends.to(torch.int32).contiguous() for ends in (start, end))
        if isinstance(bounds, Sketches):
            write_sketched(keys, values, bounds, new_keys, new_values, start, end, table=table)
            return
        touched = (width + block_size - 2) // block_size + 1  # by a window of so many tokens
        if table is not None:
            check_bounds(bounds, keys, block_size)
        bounds, scale = table_and_scale(bounds)
        n_blocks = 0 if page_size else bounds.shape[4]
        # Not started early: beside the scoring there is time enough, and steps have measured up to
        # a quarter slower.
        _write_kernel[(touched, batch * n_kv_head)](
            keys, values, bounds, scale, table, new_keys.contiguous(), new_values.contiguous(),
            start, end, n_kv_head, capacity, width, n_blocks, head_dim, block_size, page_size,
            row_stride(table, keys=keys, values=values)
        )  # fmt: skip


@triton.jit
def _write_kernel(
    keys_ptr, values_ptr, bounds_ptr, scale_ptr, table_ptr, new_keys_ptr, new_values_ptr,
    start_ptr, end_ptr, n_kv_head, capacity, width, n_blocks, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """One block of one KV head. Grid: (most blocks a window can touch, B·Hkv)."""
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    start, end = tl.load(start_ptr + i_row // n_kv_head), tl.load(end_ptr + i_row // n_kv_head)
    write_block(
        keys_ptr, values_ptr, bounds_ptr, scale_ptr, table_ptr, new_keys_ptr, new_values_ptr,
        start, end, i_row, start // BLOCK_SIZE + tl.program_id(0), n_kv_head, capacity, width,
        n_blocks, D, BLOCK_SIZE, PAGE, STRIDE
    )  # fmt: skip


@triton.jit
def write_block(
    keys_ptr, values_ptr, bounds_ptr, scale_ptr, table_ptr, new_keys_ptr, new_values_ptr,
    start, end, i_row, i_block, n_kv_head, capacity, width, n_blocks, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Write block i_block of KV head i_row: its part of the window, and its bounds anew.

    Tile: [BLOCK_SIZE, D], the block's tokens. Invariant: afterwards the block's bounds are those of
    its keys before `end`. They are rebuilt, because a running minimum cannot forget a key that was
    overwritten.
    """
    if (end > start) & (i_block * BLOCK_SIZE < end):
        # Store the block's part of the window.
        o_d = tl.arange(0, D)
        position = i_block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        m_new = ((position >= start) & (position < end))[:, None]
        o_new = (i_row * width + position - start)[:, None] * D + o_d  # [BLOCK_SIZE, D]
        m_cached = position < end
        o_row = cached_rows(table_ptr, i_row, n_kv_head, capacity, position, m_cached, PAGE)
        o_cached = o_row[:, None] * STRIDE + o_d
        value = tl.load(new_values_ptr + o_new, mask=m_new, other=0.0)
        key = tl.load(new_keys_ptr + o_new, mask=m_new, other=0.0)
        old_key = tl.load(keys_ptr + o_cached, mask=(position < start)[:, None], other=0.0)
        tl.store(values_ptr + o_cached, value, mask=m_new)
        tl.store(keys_ptr + o_cached, key, mask=m_new)

        # Take the extremes of all its keys before `end`. A NaN makes its channel's bounds NaN.
        key = tl.where(m_new, key, old_key).to(tl.float32)
        m_key = (position < end)[:, None] & (key == key)
        has_nan = tl.max(((position < end)[:, None] & (key != key)).to(tl.int32), axis=0) > 0  # [D]
        lo = tl.where(has_nan, float("nan"), tl.min(tl.where(m_key, key, float("inf")), axis=0))
        hi = tl.where(has_nan, float("nan"), tl.max(tl.where(m_key, key, float("-inf")), axis=0))

        # Store them, rounded outward where bounds have 8 bits: D channels of lo, then D of hi.
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + i_row * D + o_d)
            lo, hi = encode_e4m3(lo, scale, False), encode_e4m3(hi, scale, True)
        dtype = bounds_ptr.dtype.element_ty
        p_lo = bounds_ptr + (i_row * 2 * D + o_d) * n_blocks + i_block
        p_hi = p_lo + D * n_blocks
        if PAGE > 0:
            first = i_block * BLOCK_SIZE
            i_first = cached_rows(table_ptr, i_row, n_kv_head, capacity, first, first < end, PAGE)
            p_lo = bounds_ptr + i_first // BLOCK_SIZE * 2 * D + o_d
            p_hi = p_lo + D
        tl.store(p_lo, lo.to(dtype))
        tl.store(p_hi, hi.to(dtype))
