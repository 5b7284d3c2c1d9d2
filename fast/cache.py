"""Writing a window of tokens into the cache, in Triton: keys, values and the bounds they touch in one kernel.

The cache itself is the reference's `KVCache`, preallocated for the whole generation. Unlike its `write`, which indexes
the window's tokens on the host first, this kernel finds them from `start` and `end` on the device, so that a CUDA
graph can replay it while the sequences grow. A sparse step's window is one token, a rectification's up to f.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.checks import bind_shapes, check_lengths, is_integer, require

from .bounds8 import Bounds8, encode_e4m3
from .checks import check_kernel_dtypes, check_layout, check_sizes
from .launch import let_next_start


def write_window(
    keys: Tensor, values: Tensor, bounds: Tensor | Bounds8, new_keys: Tensor, new_values: Tensor,
    start: Tensor, end: Tensor, block_size: int,
) -> None:  # fmt: skip
    """Store one layer's new keys and values, and rebuild the bounds of the blocks they touch (law 2), in place.

    keys and values [B, Hkv, T_max, D], bounds [B, Hkv, 2, D, M], exact or in 8 bits, new_keys and new_values
    [B, Hkv, Q, D], start and end [B]: sequence s stores its first end[s] − start[s] ≤ Q new tokens from position
    start[s] on. Positions from end[s] on do not count in the bounds, whatever they hold; end[s] = start[s] leaves
    sequence s as it is. Raises `ValueError` for arguments that do not fit together or that the kernels do not support.
    """
    new, cached = "B Hkv Q D", "B Hkv T_max D"
    is_compressed = isinstance(bounds, Bounds8)
    table = bounds.codes if is_compressed else bounds
    sizes = bind_shapes(
        keys=(keys, cached),
        values=(values, cached),
        bounds=(table, "B Hkv 2 D M"),
        new_keys=(new_keys, new),
        new_values=(new_values, new),
        start=(start, "B"),
        end=(end, "B"),
    )
    floats = {"keys": keys, "values": values, "new_keys": new_keys, "new_values": new_values}
    check_kernel_dtypes(**floats, **({} if is_compressed else {"bounds": bounds}))
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    check_sizes(D=sizes["D"], block_size=block_size, rows=sizes["B"] * sizes["Hkv"])
    n_blocks = triton.cdiv(sizes["T_max"], block_size)
    require(sizes["M"] == n_blocks, "bounds", f"{sizes['M']} blocks", f"{n_blocks} for {sizes['T_max']} tokens")
    check_lengths("start", start, sizes["T_max"])
    check_lengths("end", end, sizes["T_max"])
    check_lengths("end − start", end - start, sizes["Q"])
    check_layout(keys=keys, values=values, bounds=table)
    start, end = (x.to(torch.int32).contiguous() for x in (start, end))
    enqueue_write(keys, values, bounds, new_keys.contiguous(), new_values.contiguous(), start, end, block_size)


def enqueue_write(
    keys: Tensor, values: Tensor, bounds: Tensor | Bounds8, new_keys: Tensor, new_values: Tensor,
    start: Tensor, end: Tensor, block_size: int,
) -> None:  # fmt: skip
    """`write_window` without its checks: nothing is read back from the device."""
    batch, kv_heads, capacity, head_dim = keys.shape
    width = new_keys.shape[2]
    if new_keys.numel():
        touched = (width + block_size - 2) // block_size + 1  # a window of w tokens lies in at most so many blocks
        table, scale = (bounds.codes, bounds.scale) if isinstance(bounds, Bounds8) else (bounds, None)
        # Not started early: beside the scoring there is time enough, and steps have measured up to a quarter slower.
        _write_kernel[(touched, batch * kv_heads)](
            keys, values, table, scale, new_keys, new_values, start, end, kv_heads, capacity, width, table.shape[4],
            head_dim, block_size,
        )  # fmt: skip


@triton.jit
def _write_kernel(
    keys_ptr, values_ptr, bounds_ptr, scale_ptr, new_keys_ptr, new_values_ptr, start_ptr, end_ptr,
    n_kv_head, capacity, width, n_blocks, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One block of one KV head. Grid: (most blocks a window can touch, B·Hkv)."""
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    start, end = tl.load(start_ptr + i_row // n_kv_head), tl.load(end_ptr + i_row // n_kv_head)
    write_block(
        keys_ptr, values_ptr, bounds_ptr, scale_ptr, new_keys_ptr, new_values_ptr, start, end,
        i_row, start // BLOCK_SIZE + tl.program_id(0), capacity, width, n_blocks, D, BLOCK_SIZE,
    )  # fmt: skip


@triton.jit
def write_block(
    keys_ptr, values_ptr, bounds_ptr, scale_ptr, new_keys_ptr, new_values_ptr, start, end,
    i_row, i_block, capacity, width, n_blocks, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Block i_block of KV head i_row: its part of the window, and its bounds anew; nothing past the window.

    Tile: [BLOCK_SIZE, D], the block's tokens. Invariant: afterwards the block's bounds are those of its keys before
    `end`. They are rebuilt rather than extended, because a running minimum could not forget a key that was overwritten.
    """
    if (end > start) & (i_block * BLOCK_SIZE < end):
        o_d = tl.arange(0, D)
        position = i_block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        m_new = ((position >= start) & (position < end))[:, None]
        o_new = (i_row * width + position - start)[:, None] * D + o_d  # [BLOCK_SIZE, D]
        o_cached = (i_row * capacity + position)[:, None] * D + o_d
        value = tl.load(new_values_ptr + o_new, mask=m_new, other=0.0)
        key = tl.load(new_keys_ptr + o_new, mask=m_new, other=0.0)
        old_key = tl.load(keys_ptr + o_cached, mask=(position < start)[:, None], other=0.0)
        tl.store(values_ptr + o_cached, value, mask=m_new)
        tl.store(keys_ptr + o_cached, key, mask=m_new)

        key = tl.where(m_new, key, old_key).to(tl.float32)
        m_key = (position < end)[:, None] & (key == key)
        has_nan = tl.max(((position < end)[:, None] & (key != key)).to(tl.int32), axis=0) > 0  # [D]
        lo = tl.where(has_nan, float("nan"), tl.min(tl.where(m_key, key, float("inf")), axis=0))
        hi = tl.where(has_nan, float("nan"), tl.max(tl.where(m_key, key, float("-inf")), axis=0))
        o_channel = i_row * 2 * D + o_d  # D channels of lo, then D of hi
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + i_row * D + o_d)
            lo, hi = encode_e4m3(lo, scale, False), encode_e4m3(hi, scale, True)
        dtype = bounds_ptr.dtype.element_ty
        tl.store(bounds_ptr + o_channel * n_blocks + i_block, lo.to(dtype))
        tl.store(bounds_ptr + (o_channel + D) * n_blocks + i_block, hi.to(dtype))
