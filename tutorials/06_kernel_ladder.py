# %% [markdown]
# # 6. From loops to Triton
#
# A [sparse step](../glossary.md#sparse-step) reads a tenth of the [KV cache](../glossary.md#kv-cache). That only pays
# if it reads this tenth at the speed of memory. This tutorial climbs to such a kernel in five rungs. Each rung is
# complete and correct, and each cures one fault of the rung before it:
#
# | rung | what is new |
# | --- | --- |
# | 0 | the reference: gather, one softmax, in PyTorch |
# | 1 | one Triton program per query head, two passes over its blocks |
# | 2 | [online softmax](../glossary.md#online-softmax): one pass |
# | 3 | the heads of a [group](../glossary.md#group) share one load, as a matrix product |
# | 4 | many programs per sequence: a split list, merged by [log-sum-exp](../glossary.md#log-sum-exp) |
# | 5 | the project's own kernel, imported |
#
# **What you will learn:** what limits such a kernel, how to write it so that you can check it on any machine, and how
# to time it.
#
# **Time:** half an hour to read, less than half a minute to run. You should know PyTorch. The text explains
# [Triton](../glossary.md#triton) where it first uses it. You need no GPU: without one the kernels run in Triton's
# interpreter, one program after another in NumPy, which is exact and slow. With a GPU they are compiled, and the end of
# this tutorial times them.
#
# Triton decides at import whether to interpret, so this choice comes first.

# %%
import os

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import triton
import triton.language as tl
from torch import Tensor

from resa.fast.attention import sparse_attention as own_attention
from resa.fast.bench.cli import revision
from resa.fast.bench.layer import L2_BYTES, Shape, distance, floors
from resa.fast.bench.timing import Time, copy_bandwidth, elapsed, time_calls
from resa.fast.gpu.limits import INTERPRETED
from resa.reference import ReSAConfig, select_blocks
from resa.reference import sparse_attention as reference_attention

plt.style.use("resa.reference.weights.assets.figure")
DEVICE = "cpu" if INTERPRETED else "cuda"
folder = Path(globals().get("__file__", "here")).resolve().parent  # of this script, or where a notebook runs
RESULTS = next(each / "docs" / "results" for each in [folder, *folder.parents] if (each / "docs" / "results").is_dir())
print("Triton", triton.__version__, "in its interpreter" if INTERPRETED else f"on {torch.cuda.get_device_name()}")

# %% [markdown]
# ## The computation, and what it must cost
#
# One query per sequence attends to the tokens of the blocks on its list. For query head $g$ of a KV head's group, with
# query $q_g \in \mathbb{R}^D$, keys and values $k_t, v_t \in \mathbb{R}^D$, and $S$ the set of valid tokens of the
# selected blocks:
#
# $$ s_{gt} = \frac{q_g \cdot k_t}{\sqrt{D}}, \qquad
#    o_g = \frac{\sum_{t \in S} e^{s_{gt}}\, v_t}{\sum_{t \in S} e^{s_{gt}}} \in \mathbb{R}^D $$
#
# Shapes, as everywhere in this project: queries `[B, Hq, D]`, keys and values `[B, Hkv, T_max, D]`, block indices
# `[B, Hkv, N]` with −1 for nothing, lengths `[B]`. The $G = H_q / H_{kv}$ heads of a group share one list.
#
# The kernel must read every selected key and value once. Each number takes part in about $2G$ multiplications and
# additions. With $G = 7$ and 16-bit numbers, that makes 7 operations per byte. A GPU like the H100 could do some 300 in
# the time that a byte takes to arrive. So only bytes count: the *floor* of this kernel is the size of the selected keys
# and values over the [memory bandwidth](../glossary.md#memory-bandwidth).

# %%
config = ReSAConfig()  # block size 16, a tenth of the blocks, at least 16
shape = Shape()  # 28 query and 4 KV heads of 128 channels, 16 bits: those of Qwen2.5-7B
for context in (2**14, 2**16, 2**18):
    floor = floors(shape, config, batch=8, context=context)["attend"]
    print(f"8 × {context // 1024:3}K tokens: {floor / 1e6:5.0f} MB to read, {floor / 3.0e6:5.1f} µs at 3 TB/s")

# %% [markdown]
# ## A case to test every rung on
#
# Full, tidy input does not test a kernel. This case has lengths that end inside a block, a sequence so short that its
# list holds −1, lists in no order, and NaN in every slot past a sequence's end. A kernel that reads an invalid slot
# gives NaN.
#
# Outputs come from `torch.empty`. So a row that a kernel forgets to write may by chance hold the right numbers of an
# earlier run. The test rules this out: it tells PyTorch to fill new memory with NaN.


# %%
@dataclass(frozen=True)
class Case:
    """Arguments of `sparse_attention`: lists of `n` selected blocks of each of B·Hkv rows, −1 behind them."""

    query: Tensor  # [B, Hq, D]
    keys: Tensor  # [B, Hkv, T_max, D]
    values: Tensor
    indices: Tensor  # [B, Hkv, N] int32
    lengths: Tensor  # [B] int32
    block_size: int

    def arguments(self) -> tuple:
        """In the order in which every rung takes them."""
        return self.query, self.keys, self.values, self.indices, self.lengths, self.block_size


def random_case(shape: Shape, config: ReSAConfig, lengths: list[int], capacity: int, *, seed: int = 0) -> Case:
    """Random queries, keys and values, and lists of as many random blocks as the configuration selects."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    dtype, batch, heads = getattr(torch, shape.dtype), len(lengths), shape.kv_heads

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE, dtype=dtype)

    ends = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    query = normal(batch, shape.query_heads, shape.head_dim)
    keys, values = (normal(batch, heads, capacity, shape.head_dim) for _ in range(2))
    for s, length in enumerate(lengths):
        keys[s, :, length:] = values[s, :, length:] = float("nan")
    scores = torch.rand(batch, heads, capacity // config.block_size, generator=generator, device=DEVICE)
    return Case(query, keys, values, select_blocks(scores, ends, config), ends, config.block_size)


TOY = Shape(query_heads=6, kv_heads=2, head_dim=32, dtype="float16")
toy_config = ReSAConfig(block_size=16, active_ratio=0.5, min_blocks=4)
toy = random_case(TOY, toy_config, lengths=[250, 128, 19], capacity=256)
toy.indices[0] = toy.indices[0].flip(-1)  # no rung may rely on an order
print("lists of the first KV head:", *toy.indices[:, 0].tolist(), sep="\n")
assert (toy.indices[2] == -1).any()


# %%
@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin give NaN instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(launch: Callable[..., Tensor], case: Case) -> float:
    """The largest error of a rung against the reference in float64, in units of float16's rounding."""
    query, keys, values, *rest = case.arguments()
    exact = reference_attention(query.double(), keys.double(), values.double(), *rest)
    with poisoned_memory():
        out = launch(*case.arguments())
    rounding = torch.finfo(query.dtype).eps * exact.abs().clamp(min=0.25)
    error = ((out.double() - exact).abs() / rounding).max().item()  # NaN if anything was left out or let in
    assert error <= 4, f"off by {error} roundings"
    return error


print(f"rung 0, the reference itself in float16: {check(reference_attention, toy):.2f} roundings")

# %% [markdown]
# Rung 0 is right, but slow. It gathers the selected keys and values into new memory, widens them, writes logits and
# reads them again. Each of these arrays travels to memory and back.
#
# ## Rung 1: one program per query head
#
# A Triton kernel is a *program* that runs many times, side by side. `tl.program_id` tells a program which one it is.
# Values within a program are small arrays (*[tiles](../glossary.md#tile)*) that live in registers. `tl.arange` makes a
# tile, and `tl.load` reads one through a tile of pointers. Names follow a scheme: `i_` is an index of one thing, `o_` a
# tile of offsets, `m_` a mask, `p_` a pointer. Capital letters are constants of compilation.
#
# No argument is a stride. All arrays are contiguous, so the query of sequence $s$ and head $h$ is row $s H_q + h$ of D
# numbers. Its keys belong to row $(s H_q + h) \mathbin{/\!/} G = s H_{kv} + h \mathbin{/\!/} G$ of the cache, because
# $H_q = G H_{kv}$.
#
# A list entry may be −1, and a block may end past the sequence. Neither needs an `if`. (A branch that depends on loaded
# data makes loads wait for each other.) Instead the kernel makes the address harmless, masks the load, and sets the
# logit to −∞, which weighs $e^{-\infty} = 0$.


# %%
@triton.jit
def tokens_of(p_list, i_entry, length, BLOCK_SIZE: tl.constexpr):
    """Positions [b] of the tokens of one list entry, and which of them count."""
    block = tl.load(p_list + i_entry)
    position = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    m_token = (position >= 0) & (position < length)
    return tl.where(m_token, position, 0), m_token


@triton.jit
def logits_of(query, p_keys, position, m_token, D: tl.constexpr):
    """Scaled logits [b] of one query [D]; −∞ where a token does not count."""
    o_key = position[:, None] * D + tl.arange(0, D)[None, :]  # [b, D]
    key = tl.load(p_keys + o_key, mask=m_token[:, None], other=0.0).to(tl.float32)
    return tl.where(m_token, tl.sum(key * query[None, :], axis=1) * D**-0.5, float("-inf"))


# %% [markdown]
# The softmax takes two passes over the list, like a loop in plain Python. The first pass finds the largest logit $m$.
# The second sums $\sum_t e^{s_t - m}$ and $\sum_t e^{s_t - m} v_t$. Subtracting $m$ does not change the quotient, and
# it keeps exponentials from overflowing.


# %%
@triton.jit
def two_pass_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, lengths_ptr, out_ptr, capacity, width,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of one query head. Grid: (Hq, B). Tiles: keys and values [b, D]."""
    i_query = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    i_row = i_query // G
    length = tl.load(lengths_ptr + tl.program_id(1))
    o_d = tl.arange(0, D)
    query = tl.load(query_ptr + i_query * D + o_d).to(tl.float32)  # [D]
    p_list = indices_ptr + i_row * width
    p_keys, p_values = keys_ptr + i_row * capacity * D, values_ptr + i_row * capacity * D

    m = float("-inf")
    for i in range(width):
        position, m_token = tokens_of(p_list, i, length, BLOCK_SIZE)
        m = tl.maximum(m, tl.max(logits_of(query, p_keys, position, m_token, D), axis=0))
    m = tl.where(m == float("-inf"), 0.0, m)  # nothing visible: −∞ − −∞ would be NaN

    z, acc = 0.0, tl.zeros([D], tl.float32)
    for i in range(width):
        position, m_token = tokens_of(p_list, i, length, BLOCK_SIZE)
        weight = tl.exp(logits_of(query, p_keys, position, m_token, D) - m)  # [b]
        value = tl.load(p_values + position[:, None] * D + o_d, mask=m_token[:, None], other=0.0).to(tl.float32)
        z += tl.sum(weight, axis=0)
        acc += tl.sum(weight[:, None] * value, axis=0)
    out = acc / tl.where(z == 0, 1.0, z)
    tl.store(out_ptr + i_query * D + o_d, out.to(out_ptr.dtype.element_ty))


def by_head(kernel: Callable) -> Callable[..., Tensor]:
    """The launcher of a kernel with one program per query head."""

    def launch(query, keys, values, indices, lengths, block_size):
        (batch, heads, head_dim), out = query.shape, torch.empty_like(query)
        capacity, group = keys.shape[2], heads // keys.shape[1]
        arrays = query, keys, values, indices, lengths, out
        kernel[(heads, batch)](*arrays, capacity, indices.shape[2], group, head_dim, block_size)
        return out

    return launch


two_pass = by_head(two_pass_kernel)
print(f"rung 1: {check(two_pass, toy):.2f} roundings")

# %% [markdown]
# The result is right. The fault: each pass reads every key, so every key is read twice.
#
# ## Rung 2: online softmax, one pass
#
# We need not know the maximum beforehand. We keep the maximum $m$ *so far*, and sums relative to it,
# $z = \sum e^{s_t - m}$ and $a = \sum e^{s_t - m} v_t$ with $a \in \mathbb{R}^D$. When a block brings a larger logit,
# $m' > m$, the sums so far are too large by $e^{m' - m}$, and one multiplication corrects them:
#
# $$ m' = \max(m, \max_t s_t), \qquad
#    z' = z\, e^{m - m'} + \sum_t e^{s_t - m'}, \qquad
#    a' = a\, e^{m - m'} + \sum_t e^{s_t - m'} v_t $$
#
# At the end $o = a / z$. The log-sum-exp of the logits comes for free: it is $\ln z + m$. Here are the steps for six
# logits in blocks of two, with plain numbers as values:

# %%
logits, numbers = torch.tensor([1.0, 3.0, 2.0, 7.0, -1.0, 6.0]), torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
m, z, a = torch.tensor(float("-inf")), torch.tensor(0.0), torch.tensor(0.0)
for block in range(0, 6, 2):
    s, v = logits[block : block + 2], numbers[block : block + 2]
    larger = torch.maximum(m, s.max())
    weight, decay = (s - larger).exp(), (m - larger).exp()
    m, z, a = larger, z * decay + weight.sum(), a * decay + weight @ v
    print(f"after {s.tolist()}: decay {decay:.4f}, m {m:.0f}, z {z:.4f}, a {a:8.4f}, a / z {a / z:.4f}")
assert torch.isclose(a / z, logits.softmax(0) @ numbers)
assert torch.isclose(z.log() + m, logits.logsumexp(0))


# %%
@triton.jit
def online_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, lengths_ptr, out_ptr, capacity, width,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of one query head. Grid: (Hq, B). Tiles: keys and values [b, D].

    Invariant: z = Σ exp(s − m) and acc = Σ exp(s − m)·v over the visible tokens so far, m their largest logit.
    """
    i_query = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    i_row = i_query // G
    length = tl.load(lengths_ptr + tl.program_id(1))
    o_d = tl.arange(0, D)
    query = tl.load(query_ptr + i_query * D + o_d).to(tl.float32)  # [D]
    p_keys, p_values = keys_ptr + i_row * capacity * D, values_ptr + i_row * capacity * D
    m, z, acc = float("-inf"), 0.0, tl.zeros([D], tl.float32)
    for i in range(width):
        position, m_token = tokens_of(indices_ptr + i_row * width, i, length, BLOCK_SIZE)
        logit = logits_of(query, p_keys, position, m_token, D)
        value = tl.load(p_values + position[:, None] * D + o_d, mask=m_token[:, None], other=0.0).to(tl.float32)
        m_next = tl.maximum(m, tl.max(logit, axis=0))
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
        weight, decay = tl.exp(logit - m_safe), tl.exp(m - m_safe)
        z = z * decay + tl.sum(weight, axis=0)
        acc = acc * decay + tl.sum(weight[:, None] * value, axis=0)
        m = m_next
    out = acc / tl.where(z == 0, 1.0, z)
    tl.store(out_ptr + i_query * D + o_d, out.to(out_ptr.dtype.element_ty))


online = by_head(online_kernel)
print(f"rung 2: {check(online, toy):.2f} roundings")

# %% [markdown]
# The fault: the G heads of a group have the same list and the same keys, and each head reads them for itself. A cache
# near the multiprocessors may serve some of these reads twice, but nothing guarantees it.
#
# ## Rung 3: a group shares its loads
#
# One program takes all G heads of a KV head. Its queries form a matrix. So the logits of a block are a matrix product,
# `[G, D] · [D, b]`, and so is the weighted sum of values, `[G, b] · [b, D]`. A GPU has matrix units for this. They want
# at least 16 rows, so we pad G to 16. The padding costs nothing, because the time goes into waiting for bytes. The
# scalars `m` and `z` become tiles of 16.
#
# The loop over the entries `first` … `last − 1` of the list is a function of its own, because the next rung needs it
# for a part of the list.


# %%
@triton.jit
def attend_list(
    query, p_keys, p_values, p_list, first, last, length, D: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Running m [16], z [16] and acc [16, D] of the queries [16, D] over some entries of a list of blocks."""
    o_d = tl.arange(0, D)
    m = tl.full([16], float("-inf"), tl.float32)
    z = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)
    for i in range(first, last):
        position, m_token = tokens_of(p_list, i, length, BLOCK_SIZE)
        o_token = position[:, None] * D + o_d[None, :]  # [b, D]
        key = tl.load(p_keys + o_token, mask=m_token[:, None], other=0.0)
        value = tl.load(p_values + o_token, mask=m_token[:, None], other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * D**-0.5  # [16, b]
        logit = tl.where(m_token[None, :], logit, float("-inf"))
        m_next = tl.maximum(m, tl.max(logit, axis=1))
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
        weight, decay = tl.exp(logit - m_safe[:, None]), tl.exp(m - m_safe)
        z = z * decay + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
        m = m_next
    return m, z, acc


@triton.jit
def group_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, lengths_ptr, out_ptr, capacity, width,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of the G heads of one KV head. Grid: (Hkv, B). Tiles: queries [16, D], keys and values [b, D]."""
    i_row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(lengths_ptr + tl.program_id(1))
    o_g, o_d = tl.arange(0, 16), tl.arange(0, D)
    o_query = (i_row * G + o_g)[:, None] * D + o_d[None, :]  # [16, D]
    query = tl.load(query_ptr + o_query, mask=(o_g < G)[:, None], other=0.0)
    p_keys, p_values = keys_ptr + i_row * capacity * D, values_ptr + i_row * capacity * D
    _, z, acc = attend_list(query, p_keys, p_values, indices_ptr + i_row * width, 0, width, length, D, BLOCK_SIZE)
    out = acc / tl.where(z == 0, 1.0, z)[:, None]
    tl.store(out_ptr + o_query, out.to(out_ptr.dtype.element_ty), mask=(o_g < G)[:, None])


def by_group(query, keys, values, indices, lengths, block_size):
    """One program per KV head."""
    (batch, kv_heads, capacity, head_dim), out = keys.shape, torch.empty_like(query)
    arrays = query, keys, values, indices, lengths, out
    group = query.shape[1] // kv_heads
    group_kernel[(kv_heads, batch)](*arrays, capacity, indices.shape[2], group, head_dim, block_size)
    return out


print(f"rung 3: {check(by_group, toy):.2f} roundings")

# %% [markdown]
# Now the kernel asks for every byte once. The fault: 8 sequences with 4 KV heads make 32 programs, but an H100 has 132
# multiprocessors. A hundred of them idle, and 32 cannot keep enough loads in flight to use the memory. A kernel that
# shares more leaves fewer programs. The next rung solves this.
#
# ## Rung 4: split the list, merge the parts
#
# Attention over parts of the tokens merges into attention over all of them (the [law](../glossary.md#law) of partition,
# law 4). With $o_i \in \mathbb{R}^D$ and $\ell_i = \ln \sum_{t \in S_i} e^{s_t}$ of the parts $S_i$ of $S$:
#
# $$ \ell = \ln \sum_i e^{\ell_i}, \qquad o = \sum_i e^{\ell_i - \ell}\, o_i $$
#
# So we cut the list of every KV head into `splits` parts. Each part has a program of its own, and a second small kernel
# merges them. This is called [split-KV](../glossary.md#split-kv) decoding. The parts cost memory traffic of their own,
# 16·D numbers each. That is little beside hundreds of blocks.


# %%
@triton.jit
def split_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, lengths_ptr, part_ptr, part_lse_ptr, capacity, width,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The G heads of one KV head over one part of its list. Grid: (splits, Hkv, B). Tiles as before.

    Writes each part's own attention to part [B·Hkv, splits, 16, D] and its log-sum-exp to part_lse [B·Hkv, splits, 16].
    """
    i_row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    o_g, o_d = tl.arange(0, 16), tl.arange(0, D)
    o_query = (i_row * G + o_g)[:, None] * D + o_d[None, :]
    query = tl.load(query_ptr + o_query, mask=(o_g < G)[:, None], other=0.0)
    p_keys, p_values = keys_ptr + i_row * capacity * D, values_ptr + i_row * capacity * D
    share = tl.cdiv(width, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, width)
    m, z, acc = attend_list(query, p_keys, p_values, indices_ptr + i_row * width, first, last, length, D, BLOCK_SIZE)
    o_part = (i_row * tl.num_programs(0) + tl.program_id(0)) * 16 + o_g  # [16]
    is_empty = z == 0
    total = tl.where(is_empty, 1.0, z)
    tl.store(part_ptr + o_part[:, None] * D + o_d[None, :], acc / total[:, None])
    tl.store(part_lse_ptr + o_part, tl.where(is_empty, float("-inf"), m + tl.log(total)))


@triton.jit
def merge_kernel(part_ptr, part_lse_ptr, out_ptr, splits, G: tl.constexpr, D: tl.constexpr):
    """Merge the parts of one KV head, again with a running maximum. Grid: (Hkv, B). Tile: [16, D]."""
    i_row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    o_g, o_d = tl.arange(0, 16), tl.arange(0, D)
    m = tl.full([16], float("-inf"), tl.float32)
    z = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)
    for i in range(splits):
        o_part = (i_row * splits + i) * 16 + o_g
        lse = tl.load(part_lse_ptr + o_part)
        part = tl.load(part_ptr + o_part[:, None] * D + o_d[None, :])
        m_next = tl.maximum(m, lse)
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
        weight, decay = tl.exp(lse - m_safe), tl.exp(m - m_safe)
        z = z * decay + weight
        acc = acc * decay[:, None] + part * weight[:, None]
        m = m_next
    out = acc / tl.where(z == 0, 1.0, z)[:, None]
    o_out = (i_row * G + o_g)[:, None] * D + o_d[None, :]
    tl.store(out_ptr + o_out, out.to(out_ptr.dtype.element_ty), mask=(o_g < G)[:, None])


def split_attention(query, keys, values, indices, lengths, block_size, *, splits=None):
    """Launch enough programs to fill the GPU about twice. In the interpreter a few are enough to merge."""
    (batch, kv_heads, capacity, head_dim), out = keys.shape, torch.empty_like(query)
    group, rows, width = query.shape[1] // kv_heads, batch * kv_heads, indices.shape[2]
    if splits is None:
        processors = 16 if INTERPRETED else torch.cuda.get_device_properties(0).multi_processor_count
        splits = max(1, min(2 * processors // rows, width))
    part = query.new_empty(rows, splits, 16, head_dim, dtype=torch.float32)
    part_lse = query.new_empty(rows, splits, 16, dtype=torch.float32)
    arrays = query, keys, values, indices, lengths, part, part_lse
    split_kernel[(splits, kv_heads, batch)](*arrays, capacity, width, group, head_dim, block_size)
    merge_kernel[(kv_heads, batch)](part, part_lse, out, splits, group, head_dim)
    return out


print(f"rung 4: {check(split_attention, toy):.2f} roundings")
for splits in (1, 3, 7, 20):  # also more parts than entries, so that some are empty
    check(lambda *arguments, splits=splits: split_attention(*arguments, splits=splits), toy)

# %% [markdown]
# The next picture shows which program reads which block, for one sequence, one KV head with three query heads, and a
# list of twelve blocks:

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.2, 1.9), gridspec_kw={"width_ratios": [1, 1, 1]})
grids = {
    "rungs 1 and 2: a program per head": [list(range(12))] * 3,
    "rung 3: a program per KV head": [list(range(12))],
    "rung 4: a program per part": [list(range(3 * i, 3 * i + 3)) for i in range(4)],
}
for axis, (title, programs) in zip(axes, grids.items(), strict=True):
    for i, blocks in enumerate(programs):
        for order, block in enumerate(blocks):
            axis.barh(i, 0.9, left=block + 0.05, height=0.8, color=plt.get_cmap("cividis")(order / 12))
    axis.set(title=title, xlabel="entry of the list", xlim=(0, 12), xticks=range(0, 13, 3))
    axis.set(ylim=(3.6, -0.6), yticks=range(len(programs)))
    axis.grid(False)
axes[0].set_ylabel("program")
plt.show()

# %% [markdown]
# *Figure: each row is a program, and each square is a block that it reads. Darker squares are read earlier. Rungs 1 and
# 2 read every block once per head (rung 1 reads its keys twice). Rung 3 reads each block once, but one program works
# through the whole list. Rung 4 reads each block once, and all parts at the same time.*
#
# ## Rung 5: the project's kernel
#
# [`fast/attention.py`](../../fast/attention.py) is rung 4 with improvements that measurements asked for
# ([kernels](../kernels.md) has the history in numbers):
#
# - It loads eight blocks of 16 tokens per iteration instead of one, so that more bytes are on their way at any time.
#   Where the list is long enough, it issues loads some iterations ahead.
# - The part that arrives *last* merges, in the same kernel, so there is no second launch. It merges in the order of the
#   splits, so two runs give the same bits.
# - It merges parts by $m$ and $z$ and keeps the two apart. The log-sum-exp $m + \ln z$ of a part loses $z$ when logits
#   are huge (exercise 3).
# - It takes exponentials in base 2, as the hardware does.
# - It may start while the kernel before it still runs.

# %%
split_counters = torch.zeros(4096, dtype=torch.int32, device=DEVICE)  # count the parts; every call leaves zeros


@cache
def counts_of(batch: int, width: int) -> Tensor:
    """The number of entries to read of each list: all."""
    return torch.full((batch,), width, dtype=torch.int32, device=DEVICE)


def own_kernel(query, keys, values, indices, lengths, block_size):
    """Launch the project's kernel as the decode loop does: unchecked, and with tensors made beforehand."""
    own = {"counts": counts_of(len(lengths), indices.shape[2]), "split_counters": split_counters}
    return own_attention(query, keys, values, indices, lengths, block_size, **own)


print(f"rung 5: {check(own_kernel, toy):.2f} roundings")
RUNGS = {
    "0 reference": reference_attention,
    "1 two passes": two_pass,
    "2 online": online,
    "3 group": by_group,
    "4 split": split_attention,
    "5 this project's": own_kernel,
}

# %% [markdown]
# ## Counting bytes
#
# An interpreter says nothing about time, but it sees every load. Here it counts the bytes of keys and values that each
# rung asks for. Let $n$ be the bytes of the selected keys. The values have as many, so the floor is $2n$. By the
# argument above the rungs should ask for $3nG$, $2nG$, $2n$ and $2n$.


# %%
@contextmanager
def counted_loads(*tensors: Tensor) -> Iterator[list[int]]:
    """Yield a list that collects the bytes of these tensors that each load in the interpreter takes."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain, loads = InterpreterBuilder.create_masked_load, []

    def create_masked_load(self, pointers, mask, *rest, **options):
        for tensor in tensors:
            begin = tensor.data_ptr()
            is_inside = (pointers.data >= begin) & (pointers.data < begin + tensor.nbytes) & mask.data
            loads.append(int(is_inside.sum()) * tensor.element_size())
        return plain(self, pointers, mask, *rest, **options)

    InterpreterBuilder.create_masked_load = create_masked_load
    try:
        yield loads
    finally:
        InterpreterBuilder.create_masked_load = plain


full = random_case(TOY, toy_config, lengths=[256], capacity=256)  # no partial block, no −1
group = TOY.query_heads // TOY.kv_heads
selected = 2 * full.indices.numel() * full.block_size * TOY.head_dim * full.keys.element_size()  # keys and values
predicted = {"1 two passes": 1.5 * group, "2 online": group, "3 group": 1, "4 split": 1, "5 this project's": 1}
if INTERPRETED:
    print(f"{full.indices.shape[2]} of 16 blocks; groups of {group} query heads; bytes asked for ÷ floor")
    for name, times in predicted.items():
        with counted_loads(full.keys, full.values) as loads:
            RUNGS[name](*full.arguments())
        print(f"{name:17} {sum(loads) / selected:4.1f}, predicted {times:4.1f}")
        assert sum(loads) == times * selected

# %% [markdown]
# So two things decide: the bytes that a kernel asks for, and the number of programs that ask. No rung before the fourth
# does well in both. Here are both for 8 sequences of 256K tokens and the heads of a 7B model. Rung 4 includes the parts
# that it writes and reads:

# %%
n = int(floors(shape, config, batch=8, context=2**18)["attend"])
heads_per_group = shape.query_heads // shape.kv_heads
splits = 2 * 132 // (8 * shape.kv_heads)  # an H100 has 132 multiprocessors
parts = 8 * shape.kv_heads * splits * 16 * (shape.head_dim + 1) * 4
table = {
    "1 two passes": (8 * shape.query_heads, 1.5 * heads_per_group * n),
    "2 online": (8 * shape.query_heads, heads_per_group * n),
    "3 group": (8 * shape.kv_heads, n),
    "4 split": (8 * shape.kv_heads * splits, n + 2 * parts),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.0), sharey=True)
for name, (programs, size) in table.items():
    print(f"{name:13} {programs:4} programs, {size / n:6.3f} times the floor")
    left.barh(name, size / n, color="C0")
    right.barh(name, programs, color="C2")
left.set(xlabel="bytes asked for, in floors", ylim=(3.6, -0.6))
right.set(xlabel="programs")
left.axvline(1, color="C4", linewidth=1)
right.axvline(132, color="C4", linewidth=1)
for axis in (left, right):
    axis.grid(False)
plt.show()
assert table["4 split"][1] < 1.02 * n
assert table["4 split"][0] > 132 > table["3 group"][0]

# %% [markdown]
# *Figure: computed, not measured. Left: bytes asked for. The line is the floor. Right: programs. The line is the number
# of multiprocessors of an H100. Rungs 1 and 2 have enough programs, but ask for too much. Rung 3 asks for the least,
# with too few programs. Rung 4 does well in both.*
#
# ## Timing the ladder
#
# We use the tools of the benchmark. They capture calls in a [CUDA graph](../glossary.md#cuda-graph) of some
# milliseconds and time its replay. They use enough caches that nothing stays in the L2 between two uses. The result is
# the median of 11 replays, with quartiles. Each rung is compared with the reference before it is timed. The reference
# itself reads lengths on the host, and no graph can hold that, so we time its plain calls.


# %%
def time_ladder(
    shape: Shape, config: ReSAConfig, batch: int, contexts: list[int], clock: Callable, clock_by_hand: Callable
) -> list[dict]:
    """Time every rung: a row per context and rung with µs, quartiles, error and the bytes of the floor."""
    rows = []
    for context in contexts:
        floor = floors(shape, config, batch, context)["attend"]
        cache = floors(shape, config, batch, context)["rectify"]
        n_cases = max(1, min(64, round(2 * L2_BYTES / floor), int(30e9 / cache))) if not INTERPRETED else 2
        cases = [random_case(shape, config, [context] * batch, context, seed=seed) for seed in range(n_cases)]
        right = reference_attention(*cases[0].arguments())
        for name, launch in RUNGS.items():
            error = distance(launch(*cases[0].arguments()), right)
            assert error <= 4 * torch.finfo(right.dtype).eps, f"{name} is off by {error}, so it is not timed"
            calls = [lambda case=case, launch=launch: launch(*case.arguments()) for case in cases]
            time = (clock_by_hand if launch is reference_attention else clock)(calls)
            rows.append({"context": context, "rung": name, **asdict(time), "error": error, "floor_bytes": floor})
    return rows


def clock_by_hand(calls: list[Callable]) -> Time:
    """Time plain calls, with their launches and checks. No graph can hold the reference."""
    for call in calls:
        call()
    return Time.of([elapsed(call) for call in calls * 11])


def run_once(calls: list[Callable]) -> Time:
    """Run every call and measure nothing: without a GPU this is all that can be tried."""
    for call in calls:
        call()
    return Time(float("nan"), float("nan"), float("nan"))


# %% [markdown]
# Without a GPU this is a rehearsal at a toy size. Everything that a GPU would time runs and passes the check, and the
# numbers below come from a file of earlier measurements. With a GPU,
# `python tutorials/06_kernel_ladder.py --out docs/results/ladder.json` times every rung and writes that file.

# %%
if INTERPRETED:
    rehearsal = time_ladder(TOY, toy_config, 1, [128], run_once, run_once)
    print("rehearsed:", ", ".join(row["rung"] for row in rehearsal))
    assert len(rehearsal) == len(RUNGS)
    result = json.loads((RESULTS / "ladder.json").read_text())
else:
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": revision(),
        "command": "python tutorials/06_kernel_ladder.py --out docs/results/ladder.json",
        "shape": asdict(shape),
        "config": asdict(config),
        "batch": 8,
        "copy_tbs": copy_bandwidth(),
    }
    result["rows"] = time_ladder(shape, config, 8, [2**14, 2**16, 2**18], time_calls, clock_by_hand)
    if "--out" in sys.argv:
        Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(result, indent=1) + "\n")

# %%
print(f"{result['device']}, batch {result['batch']}, copy bandwidth {result['copy_tbs']} TB/s")
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.3), sharey=True)
for axis, context in zip(axes, (2**14, 2**16, 2**18), strict=True):
    rows = [row for row in result["rows"] if row["context"] == context]
    floor_us = rows[0]["floor_bytes"] / result["copy_tbs"] / 1e6
    for row in rows:
        spread = f"{row['us']:7.1f} µs [{row['low']:.1f}, {row['high']:.1f}]"
        print(f"{context // 1024:4}K  {row['rung']:17} {spread}, {floor_us / row['us']:6.1%} of the bandwidth")
        assert row["us"] > floor_us, "nothing is faster than its bytes"
    us = {row["rung"]: row["us"] for row in rows}
    if INTERPRETED:  # the text speaks of the recorded times
        assert 0.66 < us["2 online"] / us["1 two passes"] < 0.75
        assert 2.5 < us["2 online"] / us["3 group"] < 2.7
        assert 3.7 < us["3 group"] / us["4 split"] < 6.8
        assert (us["0 reference"] < us["1 two passes"]) == (context == 2**18)
    axis.barh([row["rung"] for row in rows], [100 * floor_us / row["us"] for row in rows], color="C0")
    axis.axvline(100, color="C4", linewidth=1)
    axis.set(title=f"{context // 1024}K tokens", xlabel="share of the bandwidth [%]", ylim=(5.6, -0.6))
    axis.grid(visible=False, axis="y")
plt.show()

# %% [markdown]
# *Figure: bytes of the selected keys and values, over the median time of a call and the bandwidth of a copy. At the
# line a call would take as long as copying these bytes.*
#
# Compare this with the computed numbers. Rung 2 asks for two thirds of the bytes of rung 1 and takes 67 to 74 % of its
# time. Rung 3 asks for a seventh of that and gains only a factor of 2.6, because 32 programs cannot keep 132
# multiprocessors busy. Rung 4 asks for as much as rung 3, with eight times the programs, and is 3.8 to 6.7 times as
# fast. The reference gathers with PyTorch's kernels. At 256K it beats rung 1, which asks for everything ten times over.
# The last rung gathers eight blocks at a time rather than one. Where lists are long, it keeps several such loads under
# way. The last program of a sequence to arrive merges the parts.
#
# At 256K the kernel runs near the speed of a copy. At 16K it does not. There the floor is a few microseconds, and the
# rest is the chain of waits that every launch has, from the length to the index to the key ([kernels](../kernels.md)).
# No rung can remove these waits. [The next tutorial](07_fast_path.md) shows how to hide them.
#
# ## Exercises
#
# **1.** In rung 1, `tokens_of` replaces the position of an invisible token by 0. Why, although the load is masked? What
# would happen in rung 3 without the mask, with only the logits set to −∞?

# %% tags=["hide-cell"]
weights, values = torch.tensor([1.0, 0.0]), torch.tensor([5.0, float("nan")])
print("a weight of zero times NaN:", (weights * values).sum().item())
assert (weights * values).sum().isnan()
# The position must exist, so that the pointer stays inside the cache. With −1 it would point before the row. Without
# the mask, the kernel would load values past the end and multiply them by a weight of exactly zero. If one of them is
# NaN or infinite, the sum is NaN, because 0 · NaN is NaN. A logit of −∞ protects the softmax, but not the sum of values
# (law 5, inertness).

# %% [markdown]
# **2.** Rung 3 loads one block of 16 tokens per iteration. Write a version that gathers `TOKENS` tokens at once,
# several blocks of the list in one tile. (Token $t$ of a tile that begins at token $t_0$ of the list belongs to entry
# $(t_0 + t) \mathbin{/\!/} b$.)


# %% tags=["hide-cell"]
@triton.jit
def wide_group_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, lengths_ptr, out_ptr, capacity, width,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The attention of `group_kernel`, with tiles of keys and values [TOKENS, D] gathered from TOKENS / b blocks."""
    i_row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(lengths_ptr + tl.program_id(1))
    o_g, o_d, o_t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, TOKENS)
    o_query = (i_row * G + o_g)[:, None] * D + o_d[None, :]
    query = tl.load(query_ptr + o_query, mask=(o_g < G)[:, None], other=0.0)
    p_keys, p_values = keys_ptr + i_row * capacity * D, values_ptr + i_row * capacity * D
    m = tl.full([16], float("-inf"), tl.float32)
    z = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)
    for start in range(0, width * BLOCK_SIZE, TOKENS):
        o_entry = (start + o_t) // BLOCK_SIZE  # [TOKENS]
        block = tl.load(indices_ptr + i_row * width + o_entry, mask=o_entry < width, other=-1)
        position = block * BLOCK_SIZE + (start + o_t) % BLOCK_SIZE
        m_token = (block >= 0) & (position < length)
        o_token = tl.where(m_token, position, 0)[:, None] * D + o_d[None, :]
        key = tl.load(p_keys + o_token, mask=m_token[:, None], other=0.0)
        value = tl.load(p_values + o_token, mask=m_token[:, None], other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * D**-0.5
        logit = tl.where(m_token[None, :], logit, float("-inf"))
        m_next = tl.maximum(m, tl.max(logit, axis=1))
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
        weight, decay = tl.exp(logit - m_safe[:, None]), tl.exp(m - m_safe)
        z = z * decay + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
        m = m_next
    out = acc / tl.where(z == 0, 1.0, z)[:, None]
    tl.store(out_ptr + o_query, out.to(out_ptr.dtype.element_ty), mask=(o_g < G)[:, None])


def by_wide_group(query, keys, values, indices, lengths, block_size):
    """One program per KV head, with 64 tokens, four blocks of 16, per iteration."""
    (batch, kv_heads, capacity, head_dim), out = keys.shape, torch.empty_like(query)
    arrays = query, keys, values, indices, lengths, out
    group = query.shape[1] // kv_heads
    wide_group_kernel[(kv_heads, batch)](*arrays, capacity, indices.shape[2], group, head_dim, block_size, 64)
    return out


print(f"wide tiles: {check(by_wide_group, toy):.2f} roundings")
# The kernel loads the list as a tile of entries with a mask of its own. An entry past its end reads as −1. This also
# lifts a limit of rungs 3 and 4: a matrix product needs at least 16 tokens, so they cannot take blocks of 8.

# %% [markdown]
# **3.** Rung 4 merges by log-sum-exp. Let all logits of a list be equal and huge, and its parts of different sizes.
# What should the output be? What does rung 4 give?

# %% tags=["hide-cell"]
huge = random_case(Shape(1, 1, 32, "float32"), ReSAConfig(active_ratio=1, min_blocks=1), [80], 80)
huge.query.fill_(2.0**60)
huge.keys.fill_(-(2.0**58))
plain = huge.values.mean(dim=2)  # equal logits: the mean of the 80 values
merged_by_lse = split_attention(*huge.arguments(), splits=2)  # three blocks, two blocks
print(f"every logit is {-(2.0**118) * 32**0.5:.3g}")
print(f"rung 4 is off by {distance(merged_by_lse, plain):.2g} of the output's norm")
print(f"rung 5 is off by {distance(own_kernel(*huge.arguments()), plain):.1g}")
by_halves = (huge.values[:, :, :48].mean(dim=2) + huge.values[:, :, 48:].mean(dim=2)) / 2
assert distance(merged_by_lse, plain) > 0.01
assert distance(merged_by_lse, by_halves) < 1e-5
assert distance(own_kernel(*huge.arguments()), plain) < 1e-5
# The output should be the mean of all values. Rung 4 gives the mean of the two parts' means, as if 48 tokens weighed as
# much as 32. Beside m ≈ −10³⁶, float32 has no digits left for ln 48 or ln 32. The project's kernel keeps m and z apart,
# which costs one more number per row. Real logits are not that large, but a kernel should not depend on that.

# %% [markdown]
# [Next: the rest of the fast path](07_fast_path.md)
