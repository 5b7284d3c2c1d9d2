# %% [markdown]
# # 7. From Triton to the speed of memory
#
# [The last sitting](06_kernel_ladder.md) ended with rung 2, a correct Triton kernel with online softmax. It uses less
# than a twentieth of the memory's bandwidth. This one climbs the rest of the ladder:
#
# | rung | what is new |
# | --- | --- |
# | 3 | the heads of a [group](../glossary.md#group) share one load, as a matrix product |
# | 4 | many programs per sequence: a split list, merged by [log-sum-exp](../glossary.md#log-sum-exp) |
# | 5 | the project's own kernel |
#
# **What you will learn:** how to read every byte once and still keep a GPU busy, and how to time kernels.
#
# **Time:** 20 minutes to read, 10 seconds to run. As before, kernels are compiled where there is a GPU, and interpreted
# elsewhere.

# %%
import os

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from functools import cache

import matplotlib.pyplot as plt
import triton
import triton.language as tl
from torch import Tensor

from resa.fast.attention import sparse_attention as own_attention
from resa.fast.bench.ladder import check, counted_loads, random_case
from resa.fast.bench.layer import Shape, distance, floors
from resa.fast.gpu.limits import INTERPRETED
from resa.reference import ReSAConfig
from resa.results import recorded

plt.style.use("resa.reference.weights.assets.figure")
DEVICE = "cpu" if INTERPRETED else "cuda"
print("Triton", triton.__version__, "in its interpreter" if INTERPRETED else f"on {torch.cuda.get_device_name()}")

# %% [markdown]
# The case is that of the last sitting: lengths that end inside a block, lists that hold −1, one of them reversed, and
# NaN in every slot that a kernel must not read.

# %%
config, shape = ReSAConfig(), Shape()  # a tenth of the blocks of 16 tokens; 28 query and 4 KV heads of 128 channels
TOY = Shape(query_heads=6, kv_heads=2, head_dim=32, dtype="float16")
toy_config = ReSAConfig(block_size=16, active_ratio=0.5, min_blocks=4)
toy = random_case(TOY, toy_config, lengths=[250, 128, 19], capacity=256, device=DEVICE)
toy.indices[0] = toy.indices[0].flip(-1)

# %% [markdown]
# ## Rung 3: a group shares its loads
#
# One program takes all G heads of a KV head. Its queries form a matrix. So the logits of a block are a matrix product,
# `[G, D] · [D, b]`, and so is the weighted sum of values, `[G, b] · [b, D]`. A GPU has matrix units for this. They want
# at least 16 rows, so we pad G to 16. The padding costs nothing, because the time goes into waiting for bytes. The
# scalars `m` and `z` become tiles of 16.
#
# The loop over the entries `first` … `last − 1` of the list is a function of its own, because the next rung needs it
# for a part of the list. `tokens_of` is the one of rung 1.


# %%
@triton.jit
def tokens_of(p_list, i_entry, length, BLOCK_SIZE: tl.constexpr):
    """Positions [b] of the tokens of one list entry, and which of them count."""
    block = tl.load(p_list + i_entry)
    position = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    m_token = (position >= 0) & (position < length)
    return tl.where(m_token, position, 0), m_token


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

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(7.2, 1.9))
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
#   are huge (exercise 2).
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
RUNGS = {"3 group": by_group, "4 split": split_attention, "5 this project's": own_kernel}

# %% [markdown]
# ## Counting bytes and programs
#
# We count bytes as before. From rung 3 on, a kernel should ask for every selected key and value once:

# %%
full = random_case(TOY, toy_config, lengths=[256], capacity=256, device=DEVICE)  # no partial block, no −1
selected = 2 * full.indices.numel() * full.block_size * TOY.head_dim * full.keys.element_size()  # keys and values
if INTERPRETED:
    for name, launch in RUNGS.items():
        with counted_loads(full.keys, full.values) as loads:
            launch(*full.arguments())
        print(f"{name:17} {sum(loads) / selected:.1f} times the floor")
        assert sum(loads) == selected

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
for name, (programs, size) in table.items():
    print(f"{name:13} {programs:4} programs, {size / n:6.3f} times the floor")
assert table["4 split"][1] < 1.02 * n
assert table["4 split"][0] > 132 > table["3 group"][0]

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.0), sharey=True)
for name, (programs, size) in table.items():
    left.barh(name, size / n, color="C0")
    right.barh(name, programs, color="C2")
left.set(xlabel="bytes asked for, in floors", ylim=(3.6, -0.6))
right.set(xlabel="programs")
left.axvline(1, color="C4", linewidth=1)
right.axvline(132, color="C4", linewidth=1)
for axis in (left, right):
    axis.grid(False)
plt.show()

# %% [markdown]
# *Figure: computed, not measured. Left: bytes asked for. The line is the floor. Right: programs. The line is the number
# of multiprocessors of an H100. Rungs 1 and 2 have enough programs, but ask for too much. Rung 3 asks for the least,
# with too few programs. Rung 4 does well in both.*
#
# ## Timing the ladder
#
# To time a kernel of microseconds, we capture many calls in a [CUDA graph](../glossary.md#cuda-graph) of some
# milliseconds and time its replay. The calls take turns with enough caches that nothing stays in the L2 between two
# uses. The result is the median of 11 replays, with quartiles. Each rung is compared with the reference before it is
# timed. The reference itself reads lengths on the host, and no graph can hold that, so its plain calls are timed.
#
# The numbers below come from [earlier measurements](../results/ladder.json). In a clone of the project, on a machine
# with a GPU, `python docs/record_ladder.py` times every rung of both sittings and writes that file.

# %%
result = recorded("ladder.json")
print(f"{result['device']}, batch {result['batch']}, copy bandwidth {result['copy_tbs']} TB/s")
shares = {}
for row in result["rows"]:
    floor_us = row["floor_bytes"] / result["copy_tbs"] / 1e6
    shares[row["context"], row["rung"]] = floor_us / row["us"]
    spread = f"{row['us']:7.1f} µs [{row['low']:.1f}, {row['high']:.1f}]"
    print(f"{row['context'] // 1024:4}K  {row['rung']:17} {spread}, {floor_us / row['us']:6.1%} of the bandwidth")
    assert row["us"] > floor_us, "nothing is faster than its bytes"
for context in (2**14, 2**16, 2**18):
    us = {row["rung"]: row["us"] for row in result["rows"] if row["context"] == context}
    assert 2.5 < us["2 online"] / us["3 group"] < 2.7
    assert 3.7 < us["3 group"] / us["4 split"] < 6.8

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.3), sharey=True)
for axis, context in zip(axes, (2**14, 2**16, 2**18), strict=True):
    rungs = {rung: share for (own, rung), share in shares.items() if own == context}
    axis.barh(list(rungs), [100 * share for share in rungs.values()], color="C0")
    axis.axvline(100, color="C4", linewidth=1)
    axis.set(title=f"{context // 1024}K tokens", xlabel="share of the bandwidth [%]", ylim=(5.6, -0.6))
    axis.grid(visible=False, axis="y")
plt.show()

# %% [markdown]
# *Figure: bytes of the selected keys and values, over the median time of a call and the bandwidth of a copy. At the
# line a call would take as long as copying these bytes.*
#
# Compare this with the computed numbers. Rung 3 asks for a seventh of the bytes of rung 2 and gains only a factor of
# 2.6, because 32 programs cannot keep 132 multiprocessors busy. Rung 4 asks for as much as rung 3, with eight times the
# programs, and is 3.8 to 6.7 times as fast. The last rung gathers eight blocks at a time rather than one. Where lists
# are long, it keeps several such loads under way. The last program of a sequence to arrive merges the parts.
#
# At 256K the kernel runs near the speed of a copy. At 16K it does not. There the floor is a few microseconds, and the
# rest is the chain of waits that every launch has, from the length to the index to the key ([kernels](../kernels.md)).
# No rung can remove these waits. [Launches and waits](09_launches.md) shows how to hide them.
#
# ## Exercises
#
# **1.** Rung 3 loads one block of 16 tokens per iteration. Write a version that gathers `TOKENS` tokens at once,
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
# **2.** Rung 4 merges by log-sum-exp. Let all logits of a list be equal and huge, and its parts of different sizes.
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
# **Next:** [the rest of the fast path](08_fast_path.md).
