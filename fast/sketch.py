"""Key sketches in Triton: written with the keys. `estimate.py` scores blocks by them.

One kernel stores a window's keys and values with their sketches, and rotates the queries of a step
beside it. Both sides are rotated alike, by a Hadamard transform in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.sketch import STEP

from .gpu.launch import let_next_start, overlapped, wait_for_previous
from .pages import cached_rows, layout, row_stride

LEVELS_APART = tl.constexpr(STEP)
TILE = 16  # tokens: one size, so that a token's sums are the same in every window (law 12)
MAGIC = tl.constexpr(3 << 22)  # 1.5 · 2^23 as a float32 has room for an integer in its last bits
LOG2_E = tl.constexpr(1.4426950408889634)
# Scales of large keys, times integers, would overflow. So from 5e36 on they still do.
SHRUNK = tl.constexpr(2.0**-16)


@dataclass(frozen=True)
class Sketches:
    """Sketches of a batch, of one layer or, with a dimension more in front, of all."""

    codes: Tensor  # [B, Hkv, T_max, D·bits/8] uint8
    scales: Tensor  # [B, Hkv, T_max]
    bits: int

    def of_layer(self, layer: int) -> "Sketches":
        """Take the sketches of one layer."""
        return Sketches(self.codes[layer], self.scales[layer], self.bits)


@dataclass(frozen=True)
class Factors:
    """Rotated queries of a step as factors of the levels 0, 1, … of keys, eight heads at a time.

    The estimated logit of a key, base 2, is unit · scale · (rows · levels + offset). Rows g and
    8 + g belong to a head: it has 256 times the first and the second, two signed bytes. In float32,
    and for few channels, the second is 0. A product goes over `width` bytes or channels.
    """

    rows: Tensor  # [B·Hkv, ceil(G / 8), D / width, 16, width] int8, or float32
    offset: Tensor  # [B·Hkv, ceil(G / 8), 16] int32, or float32
    unit: Tensor  # [B·Hkv, G] float32

    @classmethod
    def of(cls, query: Tensor, n_kv_head: int, bits: int) -> "Factors":
        """Room for the factors of queries [B, Hq, D]."""
        batch, n_head, head_dim = query.shape
        rows, group = batch * n_kv_head, n_head // n_kv_head
        is_integer = head_dim >= 64 and query.dtype != torch.float32
        width = max(32, head_dim * bits // 8) if is_integer else head_dim
        number, total = (torch.int8, torch.int32) if is_integer else (torch.float32, torch.float32)
        sizes = rows, triton.cdiv(group, 8)
        return cls(
            query.new_empty(*sizes, head_dim // width, 16, width, dtype=number),
            query.new_empty(*sizes, 16, dtype=total),
            query.new_empty(rows, group, dtype=torch.float32),
        )

    @property
    def width(self) -> int:
        """Bytes, or channels, of one product."""
        return self.rows.shape[4]


def sketch_keys(keys: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """Code and scale of every key.

    keys [B, Hkv, T_max, D] → codes [B, Hkv, T_max, D·bits/8] uint8, scales [B, Hkv, T_max] in the
    keys' dtype; code 0 and scale NaN for a key that is not finite, or whose scale is not.
    """
    batch, n_kv_head, capacity, head_dim = keys.shape
    codes = keys.new_empty(batch, n_kv_head, capacity, head_dim * bits // 8, dtype=torch.uint8)
    sketches = Sketches(codes, keys.new_empty(batch, n_kv_head, capacity), bits)
    start = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    write_sketched(None, None, sketches, keys, None, start, start + capacity)
    return sketches.codes, sketches.scales


def write_sketched(
    keys: Tensor | None, values: Tensor | None, sketches: Sketches, new_keys: Tensor,
    new_values: Tensor | None, start: Tensor, end: Tensor, query: Tensor | None = None,
    *, table: Tensor | None = None,
) -> Factors | None:  # fmt: skip
    """Store a window's keys, values and sketches in place; without values, its sketches alone.

    new_keys and new_values [B, Hkv, Q, D], start and end [B] int32: sequence s stores its first
    end[s] − start[s] ≤ Q new tokens at positions start[s], start[s] + 1, … The queries [B, Hq, D]
    of a step become factors beside it. With a table [B, pages] int32, keys, values and sketches are
    pools [P, Hkv, N, …] (see `pages.py`).
    """
    batch, n_kv_head, width, head_dim = new_keys.shape
    factors, rotating, n_eights, group = None, (None,) * 4, 0, 1
    if query is not None:
        factors = Factors.of(query, n_kv_head, sketches.bits)
        rotating = query.contiguous(), factors.rows, factors.offset, factors.unit
        n_eights, group = factors.rows.shape[1], factors.unit.shape[1]
    if new_keys.numel():
        _, _, capacity, page_size = layout(sketches.scales, table)
        of_cache = {"keys": keys, "values": values} if values is not None else {"keys": new_keys}
        strides = (
            row_stride(table, **of_cache),
            row_stride(table, codes=sketches.codes),
            row_stride(table, scales=sketches.scales),
        )
        _write_sketches_kernel[(n_eights + triton.cdiv(width, TILE), batch * n_kv_head)](
            keys, values, sketches.codes, sketches.scales, table, new_keys.contiguous(),
            None if new_values is None else new_values.contiguous(), start, end, *rotating,
            n_kv_head, capacity, width, n_eights, group, head_dim, sketches.bits,
            factors.width if factors is not None else 0, TILE, page_size, *strides,
            **overlapped(new_keys.device)
        )  # fmt: skip
    return factors


def rotate_queries(query: Tensor, n_kv_head: int, bits: int) -> Factors:
    """Factors of queries [B, Hq, D] for levels of `bits` bits."""
    factors = Factors.of(query, n_kv_head, bits)
    rows, n_eights = factors.rows.shape[:2]
    group, head_dim = factors.unit.shape[1], query.shape[2]
    _rotate_kernel[(n_eights, rows)](
        query.contiguous(), factors.rows, factors.offset, factors.unit,
        group, head_dim, bits, factors.width, **overlapped(query.device)
    )  # fmt: skip
    return factors


# Not one variant for every width of a window: a token's sums must be the same in all (law 12).
@triton.jit(do_not_specialize=["width"])
def _write_sketches_kernel(
    keys_ptr, values_ptr, codes_ptr, scales_ptr, table_ptr, new_keys_ptr, new_values_ptr,
    start_ptr, end_ptr, query_ptr, rows_ptr, offset_ptr, unit_ptr, n_kv_head, capacity, width,
    N_EIGHTS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr
):  # fmt: skip
    """The window of one KV head, TOKENS tokens a program, and its queries, eight heads a program.

    Grid: (ceil(G / 8) or 0 without queries, plus ceil(Q / TOKENS), B·Hkv).
    """
    wait_for_previous()
    i_row = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) >= N_EIGHTS:
        start, end = tl.load(start_ptr + i_row // n_kv_head), tl.load(end_ptr + i_row // n_kv_head)
        _write_tile(
            keys_ptr, values_ptr, codes_ptr, scales_ptr, table_ptr, new_keys_ptr, new_values_ptr,
            start, end, i_row, tl.program_id(0) - N_EIGHTS, n_kv_head, capacity, width,
            D, BITS, TOKENS, PAGE, STRIDE, CODE_STRIDE, SCALE_STRIDE
        )  # fmt: skip
    elif N_EIGHTS > 0:
        _rotate_eight(
            query_ptr, rows_ptr, offset_ptr, unit_ptr, i_row, tl.program_id(0), N_EIGHTS,
            G, D, BITS, WIDTH
        )  # fmt: skip
    let_next_start()


@triton.jit
def _rotate_kernel(
    query_ptr, rows_ptr, offset_ptr, unit_ptr,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The queries of one KV head, eight heads a program. Grid: (ceil(G / 8), B·Hkv)."""
    wait_for_previous()
    let_next_start()
    _rotate_eight(
        query_ptr, rows_ptr, offset_ptr, unit_ptr, tl.program_id(1).to(tl.int64), tl.program_id(0),
        tl.num_programs(0), G, D, BITS, WIDTH
    )  # fmt: skip


@triton.jit
def _write_tile(
    keys_ptr, values_ptr, codes_ptr, scales_ptr, table_ptr, new_keys_ptr, new_values_ptr,
    start, end, i_row, i_tile, n_kv_head, capacity, width, D: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr, CODE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr
):  # fmt: skip
    """TOKENS tokens of a window. Tile: [TOKENS, D].

    Invariant: a token's key, value, code and scale are written together.
    """
    o_t = i_tile * TOKENS + tl.arange(0, TOKENS)
    o_d, m_t = tl.arange(0, D), o_t < end - start
    o_new = (i_row * width + o_t)[:, None] * D + o_d  # [TOKENS, D]
    o_token = cached_rows(table_ptr, i_row, n_kv_head, capacity, start + o_t, m_t, PAGE)  # [TOKENS]
    key = tl.load(new_keys_ptr + o_new, mask=m_t[:, None], other=0.0)
    if new_values_ptr is not None:
        value = tl.load(new_values_ptr + o_new, mask=m_t[:, None], other=0.0)
        tl.store(keys_ptr + o_token[:, None] * STRIDE + o_d, key, mask=m_t[:, None])
        tl.store(values_ptr + o_token[:, None] * STRIDE + o_d, value, mask=m_t[:, None])

    # The level of every rotated channel: its sign, or 0 … 3.
    key = key.to(tl.float32)
    rotated = _rotated(key, TOKENS, D)
    level = (rotated >= 0).to(tl.int32)
    if BITS == 2:
        step = LEVELS_APART * tl.sqrt_rn(tl.sum(rotated * rotated, axis=1) / D)[:, None]
        level += (rotated >= -step).to(tl.int32) + (rotated >= step).to(tl.int32)

    # The scale in the keys' dtype, and whether it and the key are numbers.
    code = _centred(level, BITS)
    scale = tl.sum(rotated * code, axis=1) / tl.sum(code * code, axis=1)
    scale = scale.to(scales_ptr.dtype.element_ty)
    is_finite = tl.min((tl.abs(key) < float("inf")).to(tl.int32), axis=1) > 0
    is_finite = is_finite & (tl.abs(scale.to(tl.float32)) < float("inf"))
    scale = tl.where(is_finite, scale.to(tl.float32), float("nan"))
    tl.store(scales_ptr + o_token * SCALE_STRIDE, scale, mask=m_t)

    # Pack 8 / BITS channels into a byte, the first one lowest.
    PER_BYTE: tl.constexpr = 8 // BITS
    level = tl.reshape(tl.where(is_finite[:, None], level, 0), [TOKENS, D // PER_BYTE, PER_BYTE])
    packed = tl.sum(level << (tl.arange(0, PER_BYTE) * BITS)[None, None, :], axis=2)
    o_byte = tl.arange(0, D // PER_BYTE)
    p_code = codes_ptr + o_token[:, None] * CODE_STRIDE + o_byte
    tl.store(p_code, packed.to(tl.uint8), mask=m_t[:, None])


@triton.jit
def _rotate_eight(
    query_ptr, rows_ptr, offset_ptr, unit_ptr, i_row, i_eight, n_eights,
    G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Factors of eight query heads of KV head i_row (see `Factors`). Tile: [8, D]."""
    o_row, o_d = tl.arange(0, 8), tl.arange(0, D)
    o_g = i_eight * 8 + o_row
    p_query = query_ptr + (i_row * G + o_g)[:, None] * D + o_d
    query = tl.load(p_query, mask=(o_g < G)[:, None], other=0.0).to(tl.float32)
    query = _rotated(query, 8, D)
    unit = tl.full([8], LOG2_E * D**-0.5 * (1 if BITS == 2 else 2), tl.float32)
    N_LEVELS: tl.constexpr = 2**BITS
    dtype = rows_ptr.dtype.element_ty
    if dtype == tl.int8:
        # The channel's place in its byte → its product, and its column and weight there.
        PER_BYTE: tl.constexpr = 8 // BITS
        N_BYTES: tl.constexpr = D // PER_BYTE
        PLACES: tl.constexpr = WIDTH // N_BYTES
        place = o_d % PER_BYTE
        o_factor = place // PLACES * 16 * WIDTH + place % PLACES * N_BYTES + o_d // PER_BYTE
        weight = 1 << (place % (2 if PLACES == 1 else PLACES) * BITS)

        # Two signed bytes, so small that a sum over levels fits the integer part of MAGIC.
        LARGEST: tl.constexpr = 2**15 // (D * (N_LEVELS - 1))
        FINEST: tl.constexpr = (LARGEST if LARGEST < 127 else 127) * 256
        size = tl.max(tl.abs(query), axis=1)
        is_finite, size = size < float("inf"), tl.maximum(size, 1e-30)
        unit = tl.where(is_finite, unit * (size / (FINEST * SHRUNK)), float("nan"))
        query = query / size[:, None] * FINEST
        number = tl.floor(query / weight.to(tl.float32)[None, :] + 0.5).to(tl.int32)
        first = (number + 128) >> 8
        second = number - first * 256
        offset = tl.zeros([8], tl.int32)
        middle = tl.sum(number * weight[None, :], axis=1) * (N_LEVELS - 1) >> 1
        second_offset = tl.full([8], MAGIC, tl.float32).to(tl.int32, bitcast=True) - middle
    else:
        o_factor = o_d
        first, second = query / 256, tl.zeros([8, D], tl.float32)
        offset = tl.sum(first, axis=1) * (0.5 - 0.5 * N_LEVELS)
        second_offset = tl.zeros([8], tl.float32)
    i_tile = i_row * n_eights + i_eight
    p_factor = rows_ptr + i_tile * 16 * D + o_row[:, None] * WIDTH + o_factor[None, :]
    tl.store(p_factor, first.to(dtype))
    tl.store(p_factor + 8 * WIDTH, second.to(dtype))
    tl.store(offset_ptr + i_tile * 16 + o_row, offset)
    tl.store(offset_ptr + i_tile * 16 + 8 + o_row, second_offset)
    tl.store(unit_ptr + i_row * G + o_g, unit, mask=o_g < G)


@triton.jit
def _rotated(x, ROWS: tl.constexpr, D: tl.constexpr):
    """Signs, then a Hadamard transform: x [ROWS, D] float32, D a power of two → the same."""
    # The hash of the channel's number, modulo 2^32.
    mixed = ((tl.arange(0, D) + 1).to(tl.int64) * 2654435761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    x = x * (1 - 2 * (mixed >> 31)).to(tl.float32)[None, :]

    # Butterflies of stride 1, 2, 4, …, in the order in which the reference adds.
    for log_stride in tl.static_range(8):
        if (1 << log_stride) < D:
            pairs = tl.reshape(x, [ROWS, D >> (log_stride + 1), 2, 1 << log_stride])
            first, second = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
            pairs = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
            x = tl.reshape(pairs, [ROWS, D])
    return x * (D**-0.5)


@triton.jit
def _centred(level, BITS: tl.constexpr):
    """Levels as numbers around 0: −1.5, −0.5, 0.5 and 1.5, or −1 and 1 for one bit."""
    return level.to(tl.float32) - 1.5 if BITS == 2 else 2.0 * level.to(tl.float32) - 1.0
