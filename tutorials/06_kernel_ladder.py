# %% [markdown]
# # 6. From loops to Triton
#
# A [sparse step](../glossary.md#sparse-step) reads a tenth of the [KV cache](../glossary.md#kv-cache). That only pays
# if it reads this tenth at the speed of memory. This tutorial and [the next](07_kernel_ladder_2.md) climb to a kernel
# that does. Each rung is complete and correct, and each cures one fault of the rung before it:
#
# | rung | what is new |
# | --- | --- |
# | 0 | the formula as loops, and the reference in PyTorch |
# | 1 | one Triton program per query head, two passes over its blocks |
# | 2 | [online softmax](../glossary.md#online-softmax): one pass |
# | 3 | the heads of a [group](../glossary.md#group) share one load, as a matrix product |
# | 4 | many programs per sequence: a split list, merged by [log-sum-exp](../glossary.md#log-sum-exp) |
# | 5 | the project's own kernel |
#
# This sitting takes rungs 0 to 2, the next one takes the rest.
#
# **What you will learn:** what limits such a kernel, how to write your first one in
# [Triton](../glossary.md#triton), and how to check it on any machine.
#
# **Time:** 20 minutes to read, 10 seconds to run. You should know PyTorch. You need no GPU: without one the kernels run
# in Triton's interpreter, one program after another in NumPy, which is exact and slow. With a GPU they are compiled.
#
# Triton decides at import whether to interpret, so this choice comes first.

# %%
import os

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from collections.abc import Callable
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from resa.fast.bench.ladder import check, counted_loads, random_case
from resa.fast.bench.layer import Shape, floors
from resa.fast.gpu.limits import INTERPRETED
from resa.reference import ReSAConfig
from resa.reference import sparse_attention as reference_attention
from resa.results import recorded

DEVICE = "cpu" if INTERPRETED else "cuda"
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
# Full, tidy input does not test a kernel. [`random_case`](../../fast/bench/ladder.py) makes one with lengths that end
# inside a block, a sequence so short that its list holds −1, and NaN in every slot past a sequence's end. We also
# reverse one list. A kernel that reads an invalid slot gives NaN.
#
# `check` compares a kernel with the reference in float64. Outputs come from `torch.empty`, so a row that a kernel
# forgets to write may by chance hold the right numbers of an earlier run. `check` rules this out: it tells PyTorch to
# fill new memory with NaN.

# %%
TOY = Shape(query_heads=6, kv_heads=2, head_dim=32, dtype="float16")
toy_config = ReSAConfig(block_size=16, active_ratio=0.5, min_blocks=4)
toy = random_case(TOY, toy_config, lengths=[250, 128, 19], capacity=256, device=DEVICE)
toy.indices[0] = toy.indices[0].flip(-1)  # no rung may rely on an order
print("lists of the first KV head:", *toy.indices[:, 0].tolist(), sep="\n")
assert (toy.indices[2] == -1).any()

# %% [markdown]
# ## Rung 0: loops
#
# Here is the formula word by word. A sequence has a length, a query head has a KV head, a KV head has a list of blocks,
# and a block has tokens:


# %%
def by_loops(query, keys, values, indices, lengths, block_size):
    """Attend to one token after another."""
    out, group = torch.empty_like(query), query.shape[1] // keys.shape[1]
    for s, length in enumerate(lengths.tolist()):
        for head in range(query.shape[1]):
            kv_head, logits, seen = head // group, [], []
            for block in indices[s, kv_head].tolist():
                if block >= 0:
                    for t in range(block * block_size, min((block + 1) * block_size, length)):
                        logits.append(query[s, head].float() @ keys[s, kv_head, t].float() / query.shape[2] ** 0.5)
                        seen.append(values[s, kv_head, t].float())
            out[s, head] = torch.stack(logits).softmax(dim=0) @ torch.stack(seen)
    return out


print(f"loops:         {check(by_loops, toy):.2f} roundings of float16")
print(f"the reference: {check(reference_attention, toy):.2f} roundings")

# %% [markdown]
# The [reference](../../reference/attention.py) does the same with whole tensors. It gathers the selected keys and
# values into new memory, widens them, writes logits and reads them again. Each of these arrays travels to memory and
# back. A kernel of our own can keep all of that in registers.
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
# ## Counting bytes
#
# An interpreter says nothing about time, but it sees every load. So we can count the bytes of keys and values that a
# rung asks for. The floor is $2n$, with $n$ bytes of selected keys and as many of values. Rung 1 should ask for $3n$
# for each query head, keys twice and values once. Rung 2 should ask for $2n$. Each of the $G$ heads of a group asks for
# itself.

# %%
full = random_case(TOY, toy_config, lengths=[256], capacity=256, device=DEVICE)  # no partial block, no −1
group = TOY.query_heads // TOY.kv_heads
selected = 2 * full.indices.numel() * full.block_size * TOY.head_dim * full.keys.element_size()  # keys and values
if INTERPRETED:
    print(f"{full.indices.shape[2]} of 16 blocks; groups of {group} query heads; bytes asked for ÷ floor")
    for name, launch, predicted in (("1 two passes", two_pass, 1.5 * group), ("2 online", online, group)):
        with counted_loads(full.keys, full.values) as loads:
            launch(*full.arguments())
        print(f"{name:13} {sum(loads) / selected:4.1f}, predicted {predicted:4.1f}")
        assert sum(loads) == predicted * selected

# %% [markdown]
# Here are the times of these rungs on a GPU, from [earlier measurements](../results/ladder.json), and the share of the
# bandwidth that they use: the time for the bytes of the floor, over the time of the call. The shape is that of the 7B
# model above, with groups of 7 heads.

# %%
result = recorded("ladder.json")
print(f"{result['device']}, batch {result['batch']}, copy bandwidth {result['copy_tbs']} TB/s")
us = {(row["context"], row["rung"]): row["us"] for row in result["rows"]}
for context in (2**14, 2**16, 2**18):
    floor_us = floors(shape, config, 8, context)["attend"] / result["copy_tbs"] / 1e6
    for rung in ("0 reference", "1 two passes", "2 online"):
        time = us[context, rung]
        print(f"{context // 1024:4}K  {rung:13} {time:7.1f} µs, {floor_us / time:5.1%} of the bandwidth")
        assert floor_us < 0.05 * time
    assert 0.66 < us[context, "2 online"] / us[context, "1 two passes"] < 0.75
    assert (us[context, "0 reference"] < us[context, "1 two passes"]) == (context == 2**18)

# %% [markdown]
# Rung 2 asks for two thirds of the bytes of rung 1 and takes 67 to 74 % of its time. So bytes do decide. But neither
# uses even 5 % of the bandwidth. At 256K the reference, which gathers with PyTorch's kernels, is faster than rung 1.
#
# The fault is plain from the count: the $G$ heads of a group have the same list and the same keys, and each head reads
# them for itself. A cache near the multiprocessors may serve some of these reads twice, but nothing guarantees it. The
# next sitting cures this, and ends near the speed of a copy.
#
# ## Exercises
#
# **1.** In rung 1, `tokens_of` replaces the position of an invisible token by 0. Why, although the load is masked? What
# would happen without the mask on the values, with only the logits set to −∞?

# %% tags=["hide-cell"]
weights, values = torch.tensor([1.0, 0.0]), torch.tensor([5.0, float("nan")])
print("a weight of zero times NaN:", (weights * values).sum().item())
assert (weights * values).sum().isnan()
# The position must exist, so that the pointer stays inside the cache. With −1 it would point before the row. Without
# the mask, the kernel would load values past the end and multiply them by a weight of exactly zero. If one of them is
# NaN or infinite, the sum is NaN, because 0 · NaN is NaN. A logit of −∞ protects the softmax, but not the sum of values
# (law 5, inertness).

# %% [markdown]
# **2.** Rung 2 subtracts `m_safe`, which is 0 as long as nothing is visible. Let a list begin with −1. What would rung
# 2 give with `m_next` in place of `m_safe`?

# %% tags=["hide-cell"]
nothing = torch.tensor(float("-inf"))
print("weight of an invisible token:", (nothing - nothing).exp().item())
assert (nothing - nothing).isnan()
backwards = replace(toy, indices=toy.indices.flip(-1))
print(f"with m_safe, lists that begin with −1: {check(online, backwards):.2f} roundings")
# NaN, because −∞ − (−∞) is NaN. After the first block z and acc would be NaN, and nothing that follows repairs them.
# With 0 in its place the weight is exp(−∞ − 0) = 0, and so is the decay.

# %% [markdown]
# **Next:** [the same kernel at the speed of memory](07_kernel_ladder_2.md).
