# %% [markdown]
# # 8. The rest of the fast path
#
# [The last tutorial](07_kernel_ladder_2.md) built the kernel that attends. A [sparse step](../glossary.md#sparse-step)
# has three more parts before it, and a [rectification](../glossary.md#rectification) comes every f tokens. At short
# contexts these parts decide how fast decoding is.
#
# **What you will learn:**
#
# - how to select without sorting,
# - why a step never reads half of the [block bounds](../glossary.md#block-bounds),
# - why a window of f queries costs little more than one query, so that rectification costs about 1/f of a dense step
#   per token.
#
# **Time:** 15 minutes to read, 10 seconds to run. Kernels run in Triton's interpreter, on a CPU, because this tutorial
# looks at their work. Their times on a GPU come from the recorded results of the benchmark.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import matplotlib.pyplot as plt
import torch

from resa import fast, reference
from resa.fast.bench.layer import Shape, floors
from resa.reference import ReSAConfig
from resa.results import recorded

plt.style.use("resa.reference.weights.assets.figure")
torch.manual_seed(0)
attention = recorded("attention.json")
rows = {row["context"]: row for row in attention["rows"] if row["batch"] == 8}
print(f"recorded: {attention['device']}, triton {attention['triton']}, commit {attention['commit']}")

# %% [markdown]
# ## Where the time goes
#
# One layer of a sparse step has four kernels: *append* the new key and value and refresh the bounds of its block,
# *score* the blocks, *select*, *attend*. Once in f tokens a *rectification* attends with a whole window to the whole
# cache. Here are the times for 8 sequences, with rectification spread over its 32 tokens.

# %%
parts = ("append", "score", "select", "attend", "rectify")
for context in (2**12, 2**14, 2**18):
    times = ", ".join(f"{part} {rows[context]['parts'][part]['us']:.1f}" for part in parts)
    print(f"{context // 1024:3}K, µs per call: {times}; dense {rows[context]['dense_us']:.1f}")

# %% tags=["hide-input"]
share = {part: 1 / 32 if part == "rectify" else 31 / 32 for part in parts}  # of a cycle's 32 tokens
contexts = [2**power for power in range(12, 19)]
figure, axis = plt.subplots(figsize=(5.6, 2.6))
bottom = [0.0] * len(contexts)
for part in parts:
    heights = [share[part] * rows[context]["parts"][part]["us"] / rows[context]["dense_us"] for context in contexts]
    axis.bar(range(len(contexts)), heights, bottom=bottom, label=part)
    bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
axis.axhline(1, color="C4", linewidth=1)
axis.set(xlabel="context (tokens)", ylabel="time per token ÷ dense", ylim=(0, 1.1))
axis.set_xticks(range(len(contexts)), [f"{context // 1024}K" for context in contexts])
axis.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.15), columnspacing=1, handlelength=1)
plt.show()

# %% [markdown]
# *Figure: recorded on an H100, one layer, 8 sequences. The line is dense attention by torch. At long contexts,
# attention over the selected blocks and the rectification take most of the time. At short contexts the append, the
# scores and the selection do, because their times hardly depend on the context.*
#
# ## Half of the bounds
#
# The score of block $i$ is an upper bound of the product of the pooled query $\bar q \in \mathbb{R}^D$ with any key in
# the block. It follows from the channel-wise minima and maxima $\mathrm{lo}_i, \mathrm{hi}_i \in \mathbb{R}^D$:
#
# $$ \mathrm{score}_i = \sum_{d=1}^{D} \max(\bar q_d\, \mathrm{lo}_{i,d},\ \bar q_d\, \mathrm{hi}_{i,d}) $$
#
# The sign of $\bar q_d$ alone decides which of the two products is larger, because $\mathrm{lo} \le \mathrm{hi}$: it is
# $\bar q_d\, \mathrm{hi}$ where $\bar q_d \ge 0$, and $\bar q_d\, \mathrm{lo}$ elsewhere. All blocks share the query.
# So for each channel the kernel never needs one of the two rows. Bounds are stored channel by channel, `[B, Hkv, 2, D,
# M]`, so that a row of M blocks lies in one piece. The kernel computes the address of the row from the sign and does
# not touch the other row.
#
# To check this, we put NaN wherever the kernel should not look. Not a bit of the scores may change.

# %%
keys, lengths = torch.randn(1, 2, 512, 64), torch.tensor([512], dtype=torch.int32)
query = torch.randn(1, 8, 64)  # two groups of four heads
bounds = fast.block_bounds(keys, lengths, 16)
scores = fast.score_blocks(query, bounds, lengths, 16)
pooled = query.unflatten(1, (2, 4)).mean(dim=2)  # [B, Hkv, D]
is_unread = torch.stack((pooled >= 0, pooled < 0), dim=2)  # [B, Hkv, 2, D]: lo where the query is positive, else hi
poisoned = bounds.masked_fill(is_unread[..., None], float("nan"))
print(f"{poisoned.isnan().float().mean():.0%} of the bounds are NaN now")
assert torch.equal(fast.score_blocks(query, poisoned, lengths, 16), scores)
assert torch.allclose(scores, reference.score_blocks(query, bounds, lengths, 16), atol=1e-4)
assert reference.score_blocks(query, poisoned, lengths, 16).isnan().all(), "the reference reads both"

# %% [markdown]
# The recorded times on the GPU agree. At 256K tokens the kernel is faster than a copy could read both halves:

# %%
time, half_us = rows[2**18]["parts"]["score"]["us"], rows[2**18]["floor_us"]["score"]
print(f"score at 256K: {time:.1f} µs; half the bounds by bytes {half_us:.1f}, both {2 * half_us:.1f}")
assert half_us < time < 2 * half_us
eight = rows[2**18]["parts"]["score, 8-bit bounds"]["us"]
print(f"with bounds in 8 bits, rounded outward so that they still are bounds: {eight:.1f} µs")
assert eight < time

# %% [markdown]
# ## Selection without sorting
#
# The kernel must find the n highest of M scores, as ascending indices. (The [local blocks](../glossary.md#local-blocks)
# are in anyway.) Of equal scores the lower index comes first. Sorting 16,384 scores would be more work than this needs.
# The kernel only needs one number, the n-th highest score. Then two easy steps are left: mark the scores at or above
# it, and number the marked ones.
#
# The kernel finds this number by guessing. To count the scores at or above a guess takes one comparison per score and a
# sum, and the scores stay in registers. If the count is too high, the guess was too low.
#
# Guessing among floats has a trap: halving the distance between two floats may take many steps where floats are
# unevenly spaced. But the bit patterns of floats, read as integers, have the order of the floats, once the negative
# ones are reversed. Between two 32-bit integers there are at most 32 halvings.


# %%
def order(numbers: torch.Tensor) -> torch.Tensor:
    """Map float32 to int64 in the same order. Both zeros become 0."""
    bits = (numbers + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


examples = torch.tensor([-float("inf"), -2.5, -1e-40, -0.0, 0.0, 1e-40, 2.5, float("inf")])
print(order(examples).tolist())
assert (order(examples).diff() >= 0).all()

# %% [markdown]
# The counts allow better guesses than halving. Suppose 3,000 scores lie above `low` and 10 above `high`, and 1,638 are
# wanted. Then a bit less than half way is a good guess. This is *interpolation*. On smooth distributions it needs few
# passes. On others it can go astray, so the kernel interpolates at most 12 times and halves from then on.


# %%
def search(scores: torch.Tensor, n: int, interpolations: int) -> list[tuple[int, int]]:
    """Search for the n-th highest score. Returns the guesses, as integers, and their counts."""
    place = order(scores)
    low, high, at_low, at_high, passes = int(place.min()), int(place.max()) + 1, len(place), 0, []
    while at_low > n and high > low + 1:
        if len(passes) < interpolations:
            guess = low + int((high - low) * (at_low - n) / (at_low - at_high))
            guess = min(max(guess, low + 1), high - 1)
        else:
            guess = (low + high) // 2
        count = int((place >= guess).sum())
        passes.append((guess, count))
        if count >= n:
            low, at_low = guess, count
        else:
            high, at_high = guess, count
    return passes


keys = torch.randn(1, 1, 4096 * 16, 16)
many = torch.tensor([keys.shape[2]])
smooth = reference.score_blocks(torch.randn(1, 4, 16), reference.block_bounds(keys, many, 16), many, 16)[0, 0]
lumpy = torch.where(torch.arange(4096) < 400, 1e6, torch.rand(4096))  # a little less than a tenth is a million
for name, row in {"scores of random keys": smooth, "an awkward row": lumpy}.items():
    passes = {limit: len(search(row, 410, limit)) for limit in (0, 12, 1000)}
    print(f"{name}: {passes[0]} passes by halving, {passes[1000]} by interpolation, {passes[12]} as the kernel does it")
    assert passes[12] <= 12 + 32
assert passes[1000] > 100
assert len(search(smooth, 410, 12)) < len(search(smooth, 410, 0))

# %%
found = search(smooth, 410, 12)
back = torch.tensor([guess for guess, _ in found])
floats = (back ^ ((back >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
print("guess and count:", [(round(x, 3), count) for x, (_, count) in zip(floats.tolist(), found, strict=True)])
assert found[-1][1] == 410

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(5.6, 2.4))
grid = torch.linspace(float(smooth.min()), float(smooth.max()), 300)
axis.plot(grid, (smooth[None] >= grid[:, None]).sum(dim=1), color="C0")
axis.axhline(410, color="C4", linewidth=1)
axis.plot(floats, [count for _, count in found], "o", color="C1", markersize=4)
for i, (x, (_, count)) in enumerate(zip(floats.tolist(), found, strict=True)):
    if i < 3:
        axis.annotate(str(i + 1), (x, count), xytext=(5, 5), textcoords="offset points")
axis.set(xlabel="score", ylabel="blocks at or above it")
plt.show()

# %% [markdown]
# *Figure: how many of 4,096 blocks score at least as much as a number. The line marks the 410 that are wanted. The dots
# are the kernel's guesses, and the first three have numbers. The search ends when exactly 410 scores lie at or above
# the guess.*
#
# Now the kernel writes the indices of the marked blocks, ascending. The place of each is the number of marked blocks
# before it, a *prefix sum*:

# %%
threshold = float(floats[-1])
taken = (smooth >= threshold).int()
place = taken.cumsum(0) - taken
indices = torch.full((410,), -1)
indices[place[taken > 0]] = torch.arange(4096)[taken > 0]
assert torch.equal(indices, smooth.topk(410).indices.sort().values)
some = slice(int(indices[0]) - 2, int(indices[0]) + 14)
print("marked:", taken[some].tolist(), "\nplaces:", place[some].tolist())

# %% [markdown]
# More scores may equal the last one taken than there is room for. Then the search never reaches n. In that case alone,
# a second search finds the index up to which the kernel takes the equal ones. Here the real kernel and the reference
# select among ties, a few infinities and a NaN:

# %%
config = ReSAConfig(active_ratio=0.25, min_blocks=4, local_blocks=2)
ties = torch.randint(-2, 3, (1, 3, 64)).float()
ties[0, 1, 5], ties[0, 1, 40], ties[0, 2, ::3] = float("inf"), float("nan"), -0.0
ends = torch.tensor([61 * 16 - 5])
ours, right = fast.select_blocks(ties, ends, config), reference.select_blocks(ties, ends, config)
print("a row of scores:", ties[0, 1].tolist()[:12], "…")
print("selected:", ours[0, 1].tolist())
assert torch.equal(ours[..., : right.shape[2]], right)
for context in (2**14, 2**16, 2**18):
    time = rows[context]["parts"]["select"]["us"]
    print(f"recorded: select at {context // 1024:3}K, {context // 16:6,} scores: {time:.1f} µs")

# %% [markdown]
# ## The window of a rectification
#
# A rectification is [dense attention](../glossary.md#dense-attention) for the newest f tokens at once. It reads the
# whole cache, like a step of dense decoding. How much more do f queries cost than one? For each cached token and
# KV head, with 2 bytes per number, the pass moves $4D$ bytes (a key and a value) and does $4 f G D$ operations (two
# products with $fG$ rows, multiply and add). So
#
# $$ \frac{\text{operations}}{\text{bytes}} = \frac{4 f G D}{4 D} = f\,G . $$
#
# At $f = 1$ and $G = 7$ that is 7. At $f = 32$ it is 224. By its datasheet an H100 can do 989 · 10¹² operations and
# move 3.35 · 10¹² bytes per second, 295 operations per byte. Up to there, more queries cost no time, because the memory
# is busy anyway. So one pass for 32 tokens should take about as long as a pass for one token, and per token 1/f of it.
#
# The kernel packs the $fG$ query rows of a KV head into one matrix. All rows see all but the newest tokens, so the main
# loop over the cache has no mask. Causality matters among the last f tokens alone.

# %%
f, length = 8, 200
keys, values = torch.randn(2, 1, 2, 256, 16)
window = torch.randn(1, 6, f, 16)
end = torch.tensor([length], dtype=torch.int32)
together = fast.dense_attention(window, keys, values, end)
for i in range(f):
    alone = fast.dense_attention(window[:, :, i : i + 1], keys, values, end - f + i + 1)
    assert torch.allclose(together[:, :, i : i + 1], alone, atol=1e-5)
assert torch.allclose(together, reference.dense_attention(window, keys, values, end), atol=1e-5)
print(f"{f} queries in one pass, or one by one: the same; {length - f + 1} of {length} tokens are seen by all of them")

# %%
print("context   rectify 32   dense 1   ratio   rectify ÷ 32")
for context in (2**12, 2**14, 2**16, 2**18):
    window_us = rows[context]["parts"]["rectify"]["us"]
    print(
        f"{context // 1024:6}K   {window_us:7.1f} µs {rows[context]['dense_us']:7.1f} µs"
        f"   {window_us / rows[context]['dense_us']:.2f}   {window_us / 32:7.2f} µs"
    )
    assert window_us < 2 * rows[context]["dense_us"], "32 queries cost less than two"

# %% [markdown]
# The ratio is not quite 1. 224 operations per byte are near the balance of the machine, and Triton's kernel reaches
# about half of the matrix units' peak ([kernels](../kernels.md)). So arithmetic limits the pass, and it takes about 1.5
# times as long as the dense step. Spread over 32 tokens that is still little. A larger f would cost more arithmetic per
# pass and no more bytes. So beyond about 32 the cost per token falls more slowly than 1/f.
#
# ## Exercises
#
# **1.** Bounds in 8 bits are rounded outward: `lo` down, `hi` up. Check on random keys that their scores are never
# below the exact ones, so that law 1 holds. How many of the selected blocks change?

# %% tags=["hide-cell"]
keys, query = torch.randn(1, 1, 128 * 16, 64), torch.randn(1, 4, 64)
end = torch.tensor([128 * 16])
exact = fast.block_bounds(keys, end, 16)
scores = {
    "exact": fast.score_blocks(query, exact, end, 16),
    "8-bit": fast.score_blocks(query, fast.compress_bounds(exact), end, 16),
}
chosen = {name: set(fast.select_blocks(row, end, ReSAConfig())[0, 0].tolist()) for name, row in scores.items()}
print(f"{len(chosen['exact'] - chosen['8-bit'])} of {len(chosen['exact'])} selected blocks are others")
assert (scores["8-bit"] >= scores["exact"] - 1e-4).all()
# Random keys are the hard case. Their blocks are so much alike that small changes of the scores reorder them.

# %% [markdown]
# **2.** A window of f queries has $fG$ operations per byte. Suppose matrix units reach 55 % of 989 TFLOP/s and memory
# reaches 3.0 TB/s. From which f on does arithmetic limit a rectification for $G = 7$? And for $G = 1$?

# %% tags=["hide-cell"]
balance = 0.55 * 989e12 / 3.0e12
print(f"{balance:.0f} operations per byte: f = {balance / 7:.0f} for G = 7, {balance:.0f} for G = 1")
measured = 4 * 32 * 28 * 128 * 8 * 2**18 / rows[2**18]["parts"]["rectify"]["us"] / 1e6
print(f"the recorded pass at 256K does {measured:.0f} TFLOP/s, the padding of 224 rows to 256 not counted")
assert 24 < balance / 7 < 32
assert 4 * 32 * 28 * 128 * 8 * 2**18 / floors(Shape(), ReSAConfig(), 8, 2**18)["rectify"] == 32 * 7
# For G = 7 it does from a little below the default of 32 on. Without groups, f could be seven times as large before
# arithmetic mattered. If more heads share keys, the dense step costs less per head, and a window costs more beside it.

# %% [markdown]
# **Next:** [launches and waits](09_launches.md).
