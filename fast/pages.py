"""Caches in pages, as serving engines keep them.

Without pages a cache is [B, Hkv, T_max, D]: every sequence has a stretch of memory of its own. With
pages it is a pool [P, Hkv, N, D] that all sequences share, and token t of sequence s is slot t mod
N of page table[s, t // N]. N is one block or several, and several sequences may name one page.

The kernels take either. All that differs is where a token lies: both give the same bits, as long as
equally many programs share a sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.checks import require


def layout(cache: Tensor, table: Tensor | None) -> tuple[int, int, int, int]:
    """B, Hkv, T_max and, with a table [B, pages], the page size N; 0 without.

    cache [B, Hkv, T_max, …], or [P, Hkv, N, …] with a table. T_max is then what the table holds.
    """
    if table is None:
        return *cache.shape[:3], 0
    (batch, n_pages), (n_kv_head, page_size) = table.shape, cache.shape[1:3]
    require(table.dtype == torch.int32, "table", str(table.dtype), "torch.int32")
    require(table.is_contiguous(), "table", f"strides {table.stride()}", "a contiguous tensor")
    return batch, n_kv_head, n_pages * page_size, page_size


def check_bounds(bounds: Tensor, keys: Tensor | None, block_size: int) -> None:
    """Refuse bounds that are not [P, Hkv, N / block_size, 2, D] beside keys [P, Hkv, N, D]."""
    require(isinstance(bounds, Tensor), "bounds", "8 bits", "exact ones, with a page table")
    given = f"strides {tuple(bounds.stride())}"
    require(bounds.is_contiguous(), "bounds", given, "a contiguous tensor")
    if keys is not None:
        n_pages, n_kv_head, page_size, head_dim = keys.shape
        given = f"pages of {page_size}"
        require(page_size % block_size == 0, "keys", given, f"a multiple of {block_size}")
        wanted = n_pages, n_kv_head, page_size // block_size, 2, head_dim
        require(bounds.shape == wanted, "bounds", tuple(bounds.shape), str(wanted))


def row_stride(table: Tensor | None, **caches: Tensor) -> int:
    """Numbers from one token to the next: in a pool the same everywhere, and in all of `caches`.

    Keys and values may be halves of one pool [P, Hkv, N, 2·D]. Its tokens are counted in 32 bits.
    """
    cache = next(iter(caches.values()))
    if table is None:
        return cache.shape[3:].numel()
    stride = cache.stride(2)
    for name, cache in caches.items():
        _, n_kv_head, page_size = cache.shape[:3]
        wanted = n_kv_head * page_size * stride, page_size * stride, stride, 1
        found = zip(cache.shape, cache.stride(), wanted, strict=False)
        is_even = all(size == 1 or step == each for size, step, each in found)
        require(is_even, name, f"strides {cache.stride()}", "tokens of a pool at equal distances")
        # Loads are of 16 bytes, or of a token where that is less.
        wide, n_bytes = min(16, cache.shape[3:].numel() * cache.itemsize), stride * cache.itemsize
        is_aligned = n_bytes % wide == 0 and cache.data_ptr() % wide == 0
        allowed = f"tokens at multiples of {wide} bytes"
        require(is_aligned, name, f"tokens {n_bytes} bytes apart", allowed)
    return stride


@triton.jit
def cached_rows(
    table_ptr, i_row, n_kv_head, capacity, position, m_position, PAGE: tl.constexpr
):  # fmt: skip
    """Rows of a cache, or of a pool, that hold these positions of KV head i_row = s · Hkv + h.

    A row is a token's place in [B, Hkv, T_max] or [P, Hkv, N]. Only masked positions are looked up.
    """
    if PAGE == 0:
        o_row = i_row * capacity + position
    else:
        p_page = table_ptr + i_row // n_kv_head * (capacity // PAGE) + position // PAGE
        page = tl.load(p_page, mask=m_position, other=0)
        i_head = (i_row % n_kv_head).to(tl.int32)
        o_row = ((page * n_kv_head + i_head) * PAGE + position % PAGE).to(tl.int64)
    return o_row


@triton.jit
def tile_rows(table_ptr, i_row, n_kv_head, capacity, token, o_t, m_t, PAGE: tl.constexpr):
    """Rows of the tokens `token` + o_t of a tile, whose first is a multiple of its size.

    Where whole pages make up a tile, a token's slot is the same in every tile.
    """
    if PAGE == 0 or o_t.shape[0] % PAGE != 0:
        o_row = cached_rows(table_ptr, i_row, n_kv_head, capacity, token + o_t, m_t, PAGE)
    else:
        p_page = table_ptr + i_row // n_kv_head * (capacity // PAGE) + token // PAGE + o_t // PAGE
        page = tl.load(p_page, mask=m_t, other=0)
        slot = (i_row % n_kv_head).to(tl.int32) * PAGE + o_t % PAGE
        o_row = (page * (n_kv_head * PAGE) + slot).to(tl.int64)
    return o_row
