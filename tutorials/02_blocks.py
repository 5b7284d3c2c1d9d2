# %% [markdown]
# # 2. Blocks
#
# **What you will learn:** how a decoding step finds the part of the cache worth reading without reading the cache. You
# will meet [blocks](../glossary.md#block), their [bounds](../glossary.md#block-bounds), the
# [score](../glossary.md#block-score) of a block and the [selection](../glossary.md#selection), first by hand on five
# tokens, then on a real Python file. You will also measure what a selection leaves out.
#
# **Time:** fifteen minutes to read, less than half a minute to run. It builds on [the cache](01_cache.md).
#
# Attention gives every cached token a weight, and most weights are tiny. If we knew beforehand which tokens get the
# large weights, we would read only their keys and values. We do not know, because the weights follow from the keys.
# The method Quest found a way out, and ReSA uses it: keep a short *summary* of every block of neighbouring tokens, and
# let the query look at the summaries.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from resa.reference import (
    ReSAConfig,
    active_blocks,
    block_bounds,
    dense_attention,
    load_model,
    load_tokenizer,
    prefill,
    score_blocks,
    select_blocks,
    sparse_attention,
)
from resa.reference.lab.corpus import example_module
from resa.reference.lab.selection import Step, is_selected

plt.style.use("resa.reference.weights.assets.figure")
torch.set_num_threads(1)

# %% [markdown]
# ## By hand: five tokens, two channels
#
# The cache holds five tokens in blocks of $b = 2$. So there are $M = \lceil 5/2 \rceil = 3$ blocks, and the last one is
# only half full. There is one KV head, and two query heads share it, so $G = 2$. The keys have $D = 2$ channels:
#
# | block | keys | lo | hi |
# |---|---|---|---|
# | 0 | (1, 2), (3, 1) | (1, 1) | (3, 2) |
# | 1 | (−2, −1), (−1, 1) | (−2, −1) | (−1, 1) |
# | 2 | (1, −2) | (1, −2) | (1, −2) |
#
# The bounds `lo` and `hi` are the smallest and the largest key of the block, channel by channel. Together they form a
# box that contains all keys of the block. They are small: two vectors instead of $b$ keys and $b$ values.

# %%
b = 2
keys = torch.tensor([[[[1.0, 2.0], [3.0, 1.0], [-2.0, -1.0], [-1.0, 1.0], [1.0, -2.0]]]])  # [B, Hkv, T_max, D]
lengths = torch.tensor([5], dtype=torch.int32)  # [B]
bounds = block_bounds(keys, lengths, b)  # [B, Hkv, 2, D, M], 0 = lo, 1 = hi
lo, hi = bounds[0, 0]
print("lo", lo.T.tolist())
print("hi", hi.T.tolist())
assert lo.T.tolist() == [[1, 1], [-2, -1], [1, -2]]
assert hi.T.tolist() == [[3, 2], [-1, 1], [1, -2]]

# %% [markdown]
# All query heads of a group read the same keys, so they share one selection. It uses the mean of their queries,
#
# $$\bar q = \frac{1}{G} \sum_{g} q_g \qquad [D]$$
#
# The score of a block is the largest value that $\bar q \cdot k$ can take for any $k$ *in the box*. We can maximise
# every channel by itself: take `hi` if $\bar q_d$ is positive, and `lo` if it is negative.
#
# $$\mathrm{score}_i = \sum_{d=0}^{D-1} \max(\bar q_d \mathrm{lo}_{i,d}, \bar q_d \mathrm{hi}_{i,d}) \qquad [M]$$
#
# Let the two queries be (2, −1) and (0, −1). Then $\bar q = (1, -1)$, and the score is `hi` of the first channel minus
# `lo` of the second:
#
# - block 0: 3 − 1 = 2
# - block 1: −1 − (−1) = 0
# - block 2: 1 − (−2) = 3

# %%
query = torch.tensor([[[2.0, -1.0], [0.0, -1.0]]])  # [B, Hq, D]
scores = score_blocks(query, bounds, lengths, b)  # [B, Hkv, M]
true_products = keys[0, 0] @ query[0].mean(dim=0)
print("scores          ", scores[0, 0].tolist())
print("products by key ", true_products.tolist())
assert scores[0, 0].tolist() == [2, 0, 3]

# %%
figure, axes = plt.subplots(figsize=(4, 3.4))
for index in range(3):
    block, colour = keys[0, 0, b * index : b * index + b], f"C{index}"
    (left, bottom), (right, top) = lo[:, index].tolist(), hi[:, index].tolist()
    axes.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=colour, linewidth=1)
    axes.plot(*block.T.tolist(), "o", color=colour, label=f"block {index}")
    axes.plot(right, bottom, "*", color=colour, markersize=14, markerfacecolor="none")
axes.annotate("", (1, -1), (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 2, "color": "0.3"})
axes.text(0.15, -0.9, r"$\bar q$", color="0.3", fontsize=12)
axes.set(xlabel="channel 0", ylabel="channel 1", xlim=(-3, 4), ylim=(-2.8, 2.8), aspect="equal")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# *Figure: keys as dots, bounds as boxes. The star marks the corner of each box that lies furthest in the direction of
# the pooled query. The score is the product of the query with that corner.*
#
# In blocks 0 and 2 a key lies at the star, so the score is exact. In block 1 no key does: the score is 0, but the
# best of its keys reaches only −1. A score may promise too much, but never too little. That is the first
# [law](../glossary.md#law) of this project: the score of a block is at least $\bar q \cdot k$ for each of its keys. So
# a block of low score holds no key that the group wants on average. (A single head may still want it: exercise 2.) A
# block of high score may disappoint.
#
# Selection always takes the newest block, because the last few words nearly always matter
# ([`local_blocks`](../glossary.md#local-blocks) is 1). Then it takes the highest scores, $n$ blocks in all:
#
# $$n = \min(M, \max(\mathrm{min\_blocks}, \lceil p \cdot M \rceil))$$
#
# with the [active ratio](../glossary.md#active-ratio) $p$ and [`min_blocks`](../glossary.md#min-blocks). Here
# $p = 0.5$ gives $n = 2$.

# %%
config = ReSAConfig(block_size=b, active_ratio=0.5, min_blocks=1)
indices = select_blocks(scores, lengths, config)  # [B, Hkv, N]
print("selected blocks", indices[0, 0].tolist())
assert indices[0, 0].tolist() == [0, 2]

# %% [markdown]
# The defaults are $b = 16$, $p = 0.1$ and at least 16 blocks. With them a step attends to so many blocks of longer
# caches:

# %%
for T in (100, 1_000, 4_000, 16_000, 256 * 1024):
    n = int(active_blocks(torch.tensor([T]), ReSAConfig()))
    print(f"T = {T:7,}: n = {n:5,} of M = {-(-T // 16):6,} blocks")

# %% [markdown]
# ## On a real file
#
# Now the shipped model reads a library module that was held out of its training. It prefills 2,048 tokens. Then we
# follow the next 48 tokens and record the queries of every layer. The model takes its operations as an argument, so we
# can give it an attention that takes notes:

# %%
model, tokenizer = load_model(), load_tokenizer()
subject, text = example_module()
tokens = tokenizer.encode_ordinary(text)
n_prompt, n_steps, b = 2048, 48, 16
config = ReSAConfig(active_ratio=0.1, min_blocks=4)

cache = model.new_cache(capacity=n_prompt + n_steps, block_size=b)
prefill(model, tokens[:n_prompt], cache)
queries = []  # one [1, Hq, n_steps, D] per layer


def attention_with_notes(query, keys, values, lengths, **options):
    queries.append(query)
    return dense_attention(query, keys, values, lengths, **options)


watched = model.with_ops(replace(model.ops, dense_attention=attention_with_notes))
prefill(watched, tokens[n_prompt : n_prompt + n_steps], cache)
print(f"{subject}\n")
print(tokenizer.decode(tokens[n_prompt : n_prompt + n_steps]))

# %% [markdown]
# To score all 48 steps at once, we treat each step as a sequence of its own that is as long as the cache was then:
# lengths 2,049, 2,050 and so on, over the same keys. `Step` is a helper of the project. It holds one layer's query,
# keys and lengths, and it computes the exact attention logits. The logits give the *mass* of each block, which is the
# sum of its tokens' attention weights. The masses of all blocks add up to 1.

# %%
lengths = torch.arange(n_prompt + 1, n_prompt + n_steps + 1, dtype=torch.int32)  # [B = n_steps]
steps, masses, scores = [], [], []  # of every layer
for layer, query in enumerate(queries):
    layer_keys = cache.keys[layer].expand(n_steps, -1, -1, -1)  # [B, Hkv, T, D]
    step = Step(query[0].transpose(0, 1), layer_keys, lengths, b)
    mass = (step.by_block(step.logits) - step.logits.logsumexp(dim=-1, keepdim=True)).exp()  # [B, Hkv, G, M]
    steps.append(step)
    masses.append(mass)
    scores.append(score_blocks(step.query, block_bounds(layer_keys, lengths, b), lengths, b))  # [B, Hkv, M]
    assert torch.allclose(mass.sum(dim=-1), torch.ones(()), atol=1e-4)

group_mass = torch.stack([mass.mean(dim=2) for mass in masses])  # [layer, B, Hkv, M], mean over the group's heads
scores = torch.stack(scores)  # [layer, B, Hkv, M]

# %% [markdown]
# First we check the law on all of these steps: the score of a block is no less than $\bar q \cdot k$ for any of its
# keys, up to rounding in float32.

# %%
gaps = []
for layer, step in enumerate(steps):
    pooled = step.query.unflatten(1, (step.keys.shape[1], -1)).mean(dim=2)  # [B, Hkv, D]
    products = (step.keys @ pooled[..., None])[..., 0]  # [B, Hkv, T]
    is_valid = (torch.arange(products.shape[-1]) < lengths[:, None])[:, None]
    best = products.masked_fill(~is_valid, float("-inf")).unflatten(-1, (-1, b)).amax(dim=-1)  # [B, Hkv, M]
    is_block = best.isfinite()
    gap = (scores[layer] - best)[is_block]
    assert gap.min() > -1e-3, "law 1: a score is an upper bound"
    gaps.append(gap.mean() * step.query.shape[-1] ** -0.5)
print(f"a score exceeds the block's best key by {torch.stack(gaps).mean():.1f} on average, in attention logits")

# %% [markdown]
# The law holds, and the bound is generous: in 64 channels a key hardly ever lies at the corner of the box. For
# selection it only matters that blocks of good keys score *higher than others*. It does not matter how much they
# promise.
#
# Now we look for a step at which a layer wanted something specific from far back. We take the largest mass on a single
# block that is neither the first of the text nor among the newest eight.

# %%
newest = (lengths.long() - 1) // b  # [B], the block that holds the newest token
block = torch.arange(group_mass.shape[-1])
is_far = (block > 0) & (block <= newest[:, None] - 8)  # [B, M]
far_mass = group_mass.masked_fill(~is_far[None, :, None], 0.0)
layer, at, head, wanted = (int(index) for index in torch.unravel_index(far_mass.argmax(), far_mass.shape))


def text_of(start, end):
    return repr(tokenizer.decode(tokens[start:end]))


position = n_prompt + at
print(f"layer {layer}, KV head {head}, at the end of {text_of(position - 12, position + 1)}")
print(f"(the file goes on with {text_of(position + 1, position + 5)})\n")
by_score = scores[layer, at, head].argsort(descending=True).tolist()
print("    rank   score  mass  block")
for rank, index in enumerate(by_score, start=1):
    if rank > 6 and index != wanted:
        continue
    value, share = scores[layer, at, head, index] * model.config.head_dim**-0.5, group_mass[layer, at, head, index]
    mark, shown = "->" if index == wanted else "  ", text_of(b * index, min(b * index + b, position + 1))
    print(f"{mark} {rank:5} {value:7.2f} {share:5.2f}  {index:5}  {shown}")

# %% [markdown]
# The table shows the blocks of highest score for this one step, and their text. (Scores are divided by $\sqrt D$, as in
# attention.) The arrow marks the far block that got so much mass. Such a head typically searches for earlier places
# where the newest word occurred, to see how the text went on there. The bounds lead to that block without reading a
# key. Other blocks of high score get hardly any mass: they promised and disappointed. The next picture shows the same
# head over all 48 steps.

# %%
n_seen = scores.shape[-1]
relative = (scores[layer, :, head] - scores[layer, :, head].amax(dim=-1, keepdim=True)) * model.config.head_dim**-0.5
chosen = is_selected(scores[layer], lengths, config)[:, head]
log_mass = group_mass[layer, :, head].clamp(min=1e-4).log10()
panels = {
    "score, less the row's best": relative.clamp(min=-8).round(),
    "attention mass, log10": (2 * log_mass).round() / 2,
    "selected": chosen.float(),
}
figure, all_axes = plt.subplots(1, 3, figsize=(7.5, 2.4), sharey=True)
for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
    image = axes.imshow(values, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set(title=title, xlabel="block")
    if title != "selected":
        figure.colorbar(image, ax=axes, shrink=0.8)
all_axes[0].set_ylabel("decoding step")
plt.show()

# %% [markdown]
# *Figure: one layer and KV head over 48 steps (rows) and all blocks (columns, with the start of the text at the left).
# Left: the scores. Middle: where attention truly goes. Right: the blocks that a step would read at $p = 0.1$. The
# staircase at the right edge is the newest block, which moves on every 16 steps.*
#
# ## What a selection leaves out
#
# [Sparse attention](../glossary.md#sparse-attention) is exact softmax attention over the selected blocks. If it selects
# every block, it equals dense attention (law 3):

# %%
step, values = steps[layer], cache.values[layer].expand(n_steps, -1, -1, -1)
dense = dense_attention(step.query[:, :, None], step.keys, values, lengths)[:, :, 0]  # [B, Hq, D]
whole = select_blocks(scores[layer], lengths, replace(config, active_ratio=1.0))
assert torch.allclose(sparse_attention(step.query, step.keys, values, whole, lengths, b), dense, atol=1e-4)

part = select_blocks(scores[layer], lengths, config)
sparse = sparse_attention(step.query, step.keys, values, part, lengths, b)
print(f"{part.shape[-1]} of {n_seen} blocks: output off by {(sparse - dense).norm() / dense.norm():.0%} of its norm")

# %% [markdown]
# The weights of the tokens that were left out go to the others instead. We measure how much mass that is, by the share
# of blocks attended and by layer, for three ways to choose:
#
# - by score,
# - the newest blocks, without any scores,
# - the best possible choice, which needs to know the masses beforehand.

# %%
ratios = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
ways = ("pooled", "newest", "mass")
left_out = {way: torch.zeros(len(ratios), len(steps)) for way in ways}  # [ratio, layer]
for index, mass in enumerate(masses):
    by_age = block.to(mass).expand_as(scores[index])  # the newest block scores highest
    found = {"pooled": scores[index], "newest": by_age, "mass": group_mass[index]}
    for way in ways:
        for row, ratio in enumerate(ratios):
            chosen = is_selected(found[way], lengths, replace(config, active_ratio=ratio, min_blocks=1))
            left_out[way][row, index] = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1).mean()

figure, (by_ratio, by_layer) = plt.subplots(1, 2, figsize=(7.5, 2.8), sharey=True)
names = {"pooled": "by score", "newest": "the newest", "mass": "best possible"}
for way, marker in zip(ways, "os^", strict=True):
    by_ratio.plot(ratios, left_out[way].mean(dim=1), marker=marker, label=names[way])
    by_layer.plot(left_out[way][ratios.index(0.1)], marker=marker, label=names[way])
by_ratio.set(xlabel="p, share of blocks attended", ylabel="attention mass left out", xscale="log", ylim=(0, 1))
by_ratio.set_xticks(ratios, [str(ratio) for ratio in ratios])
by_ratio.minorticks_off()
by_layer.set(xlabel="layer", title="p = 0.1")
by_ratio.legend()
plt.show()

for way in ways:
    print(f"{names[way]:13}: {left_out[way][ratios.index(0.1)].mean():.3f} of the mass left out at p = 0.1")
    assert (left_out["mass"] <= left_out[way] + 1e-5).all()
    assert left_out[way][-1].max() < 1e-5, "all blocks leave nothing out"
    assert (left_out[way].mean(dim=1).diff() <= 1e-6).all(), "more blocks leave less out"

# %% [markdown]
# *Figure: attention mass on blocks that are not read, mean over steps and heads. Left: all layers together. Right:
# layer by layer, at a tenth of the blocks.*
#
# Read this with care. The model is small (5.7 million parameters), and its attention is spread over the text. So even
# the best choice of a tenth leaves out a good part of the mass, and on average the scores do little or no better than
# the newest blocks. But the scores can find the one block far back that matters, as in the table above, and the newest
# blocks cannot. Attention in large models is known to be far more concentrated, and sparse decoding relies on that.
# [Evidence](../evidence.md#what-is-left-and-why) has the same measurement over more files, with intervals.
#
# The mass left out causes everything that follows. A step that leaves mass out computes a slightly wrong output.
# [The next tutorial](03_drift.md) shows where that error goes.
#
# ## Exercises
#
# ### 1. Blocks of one token
#
# What is the score of a block when $b = 1$? What would selection save then?

# %% tags=["hide-cell"]
ones = torch.tensor([5], dtype=torch.int32)
exact = score_blocks(torch.tensor([[[2.0, -1.0], [0.0, -1.0]]]), block_bounds(keys, ones, 1), ones, 1)
print(exact[0, 0].tolist())
assert torch.equal(exact[0, 0], true_products)
# lo = hi = the key, so the score is the product itself. But lo and hi together are then as large as all keys and
# values. So a step reads as much as a dense one before it has selected anything (half of that, if it reads only the
# bound that each channel needs). The cost of the bounds falls as 1/b. Their precision falls as well.

# %% [markdown]
# ### 2. Two heads that disagree
#
# Let the two heads of a group have the queries $q$ and $-q$. What are the scores? Which blocks are selected? What does
# that mean for the heads?

# %% tags=["hide-cell"]
opposed = torch.stack([torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 1.0])])[None]
nothing = score_blocks(opposed, bounds, ones, 2)
print(nothing[0, 0].tolist(), select_blocks(nothing, ones, ReSAConfig(2, 0.5, 1))[0, 0].tolist())
assert (nothing == 0).all()
# The mean is zero, so all scores are equal. Selection takes the newest block, and then the lower index wins a tie. The
# score bounds the mean of the heads' products and says nothing about a single head. Tutorial 5 comes back to this.

# %% [markdown]
# ### 3. Larger blocks
#
# With $b = 64$ the bounds cost a quarter. Measure the mass left out at $p = 0.1$ with $b$ = 4, 16 and 64.

# %% tags=["hide-cell"]
for size in (4, 16, 64):
    lost = []
    for step in steps:
        coarse = replace(step, block_size=size)
        mass = (coarse.by_block(coarse.logits) - coarse.logits.logsumexp(dim=-1, keepdim=True)).exp()
        scored = score_blocks(step.query, block_bounds(step.keys, lengths, size), lengths, size)
        chosen = is_selected(scored, lengths, ReSAConfig(size, 0.1, 1))
        lost.append(mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1).mean())
    print(f"b = {size:2}: {torch.stack(lost).mean():.3f} of the mass left out")
# A small block brings fewer bystanders along, and its box is tighter.

# %% [markdown]
# ### 4. How deep must one read?
#
# Take the step of the table above. Which rank by score has the block of most far mass? Up to which active ratio would a
# step miss it?

# %% tags=["hide-cell"]
rank, total = by_score.index(wanted), int(newest[at]) + 1
needed = rank + 1 + (int(newest[at]) not in by_score[:rank])  # the newest block takes a place whatever it scores
print(f"rank {rank + 1} of {total}, behind the newest block, which is taken in any case: ", end="")
print(f"n = ⌈p · {total}⌉ must be {needed}, so it is missed up to p = {(needed - 1) / total:.3f}")
for more, is_found in ((-1e-6, False), (1e-6, True)):
    chosen = select_blocks(scores[layer], lengths, ReSAConfig(16, (needed - 1) / total + more, 1))
    assert (wanted in chosen[at, head]) == is_found

# %% [markdown]
# **Next:** [what errors do to the cache](03_drift.md).
