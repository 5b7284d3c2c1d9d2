# %% [markdown]
# # 2. Blocks
#
# A tenth of the blocks gets most of the attention. But to find that tenth, tutorial 1 read all keys. **How can a step
# know which tenth to read, before it reads it?**
#
# We keep a short summary of every block of 16 tokens. A step reads all the summaries first, and they tell it which
# blocks to read. This idea comes from a method called Quest ([arXiv 2406.10774](https://arxiv.org/abs/2406.10774)), and
# ReSA uses it. In this tutorial you write the summary, the score and the selection, a few lines each. Then you ask
# SmolLM2 six questions, to see whether it still finds the facts.
#
# **Time:** fifteen minutes to read, less than a minute to run. It builds on [the cache](01_cache.md).

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from resa.reference import (
    ReSAConfig,
    block_bounds,
    dense_attention,
    open_model,
    prefill,
    score_blocks,
    select_blocks,
    sparse_step,
)

torch.set_num_threads(1)

# %% tags=["hide-input"]
plt.style.use("resa.reference.weights.assets.figure")
chosen = [[1, 2, 9, 14], [0, 6, 7, 14]]
with plt.rc_context({"path.sketch": (0.8, 60, 2)}):  # as if drawn by hand
    figure, axes = plt.subplots(figsize=(7.5, 2.9))
    for head, blocks in enumerate(chosen):
        y = 2.4 * (1 - head)
        axes.text(-0.3, y + 1.45, "summaries", ha="right", va="center", fontsize=8)
        axes.text(-0.3, y + 0.5, f"KV head {head}\nkeys, values", ha="right", va="center", fontsize=8)
        for block in range(15):
            is_read = block in blocks
            colour = "C1" if is_read else "white"
            axes.add_patch(plt.Rectangle((block, y), 0.85, 1, facecolor=colour, edgecolor="0.3"))
            axes.add_patch(plt.Rectangle((block, y + 1.3), 0.85, 0.3, facecolor="C0", edgecolor="0.3"))
    axes.annotate("newest block", (14.4, -0.1), (14.4, -0.8), ha="center", fontsize=8, arrowprops={"arrowstyle": "->"})
    axes.annotate("", (0, -0.45), (13, -0.45), arrowprops={"arrowstyle": "<-"})
    axes.text(6.5, -0.8, "the text, in blocks of 16 tokens", ha="center", fontsize=8)
    axes.set(xlim=(-3, 15.2), ylim=(-1, 4.3))
    axes.axis("off")
plt.show()

# %% [markdown]
# *Figure: what a sparse step reads. First it reads all summaries (blue), which are small. Then it selects a few blocks
# (orange) and reads their keys and values. It does not read the white blocks. Every KV head selects for itself.*
#
# ## By hand: five tokens, two channels
#
# The cache holds five tokens in blocks of $b = 2$. The last block is only half full. There is one KV head, and two
# query heads share it. The keys have $D = 2$ channels:
#
# | block | keys | lo | hi |
# |---|---|---|---|
# | 0 | (1, 2), (3, 1) | (1, 1) | (3, 2) |
# | 1 | (−2, −1), (−1, 1) | (−2, −1) | (−1, 1) |
# | 2 | (1, −2) | (1, −2) | (1, −2) |
#
# The summary of a block consists of two vectors, its [bounds](../glossary.md#block-bounds): `lo` is the smallest value
# in every channel, and `hi` is the largest. Together they form a box that contains all keys of the block.


# %%
def bounds_of(keys, b):
    """Smallest and largest key of every block, channel by channel: [Hkv, T, D] → lo and hi, [Hkv, M, D] each."""
    blocks = keys.split(b, dim=1)
    return torch.stack([x.amin(dim=1) for x in blocks], dim=1), torch.stack([x.amax(dim=1) for x in blocks], dim=1)


five = torch.tensor([[[1.0, 2.0], [3.0, 1.0], [-2.0, -1.0], [-1.0, 1.0], [1.0, -2.0]]])  # [Hkv, T, D]
lo, hi = bounds_of(five, 2)
assert lo[0].tolist() == [[1, 1], [-2, -1], [1, -2]]
assert hi[0].tolist() == [[3, 2], [-1, 1], [1, -2]]

# %% [markdown]
# The query heads that share a KV head read the same blocks. So we take the mean of their queries, $\bar q$. The *score*
# of a block is the largest product that $\bar q$ can have with any point in the box. Each channel can be maximised by
# itself: take `hi` where $\bar q_d$ is positive, and `lo` where it is negative.
#
# $$\mathrm{score}_i = \sum_{d=0}^{D-1} \max(\bar q_d \mathrm{lo}_{i,d}, \bar q_d \mathrm{hi}_{i,d})$$
#
# Let the two queries be (2, −1) and (0, −1). Then $\bar q = (1, -1)$, and the score is `hi` of the first channel minus
# `lo` of the second.


# %%
def scores_of(query, lo, hi):
    """Score of every block: [Hq, D], [Hkv, M, D] twice → [Hkv, M]."""
    mean = query.unflatten(0, (lo.shape[0], -1)).mean(dim=1)[:, None]  # [Hkv, 1, D]
    return torch.maximum(mean * lo, mean * hi).sum(dim=-1)


query = torch.tensor([[2.0, -1.0], [0.0, -1.0]])  # [Hq, D]
scores = scores_of(query, lo, hi)
products = (five[0] @ query.mean(dim=0)).tolist()
print("scores of the blocks   ", scores[0].tolist())
print("products with the keys ", [products[:2], products[2:4], products[4:]])
assert scores[0].tolist() == [2, 0, 3]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(4, 3.2))
for index in range(3):
    points, colour = five[0, 2 * index : 2 * index + 2], f"C{index}"
    (left, bottom), (right, top) = lo[0, index].tolist(), hi[0, index].tolist()
    axes.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=colour, linewidth=1)
    axes.plot(*points.T.tolist(), "o", color=colour, label=f"block {index}")
    axes.plot(right, bottom, "*", color=colour, markersize=14, markerfacecolor="none")
axes.annotate("", (1, -1), (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 2, "color": "0.3"})
axes.text(0.15, -0.9, r"$\bar q$", color="0.3", fontsize=12)
axes.set(xlabel="channel 0", ylabel="channel 1", xlim=(-3, 4), ylim=(-2.8, 2.8), aspect="equal")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# *Figure: keys as dots, bounds as boxes. The star marks the corner of each box that lies furthest in the direction of
# the mean query. The score is the product of the query with that corner. Block 2 has one key, so its box is a point.*
#
# In blocks 0 and 2 a key lies at the star, so the score is exact. In block 1 no key lies there. Its score is 0, but its
# best key has a product of only −1. A score may promise too much, but never too little. This is the first
# [law](../glossary.md#law) of the project.
#
# The [selection](../glossary.md#selection) takes the newest block, because the last words nearly always matter. Then it
# takes the blocks of highest score. In all it takes $n$ of the $M$ blocks:
#
# $$n = \min(M, \max(\mathrm{min\_blocks}, \lceil p \cdot M \rceil))$$
#
# The [active ratio](../glossary.md#active-ratio) $p$ is the share of blocks to take: 0.1 is a tenth. In short texts,
# `min_blocks` keeps $n$ from becoming too small. The library's `local_blocks` says how many newest blocks are always
# taken, here 1. They are part of the $n$: with more of them, fewer blocks are chosen by score.


# %%
def top_blocks(scores, n):
    """The newest block and those of highest score, n in all: [Hkv, M] → [Hkv, n], ascending."""
    scores = scores.clone()
    scores[:, -1] = float("inf")
    return scores.topk(n).indices.sort().values


assert top_blocks(scores, 2).tolist() == [[0, 2]]

# %% [markdown]
# That is the whole selection. The library's functions compute the same, and they also handle batches and ties.
# `ReSAConfig` holds the settings, and its ratio is 0.1:

# %%
q, k, lengths, tenth = torch.randn(9, 64), torch.randn(3, 1000, 64), torch.tensor([1000]), ReSAConfig(min_blocks=4)
library_scores = score_blocks(q[None], block_bounds(k[None], lengths, 16), lengths, 16)
assert torch.allclose(scores_of(q, *bounds_of(k, 16)), library_scores[0], atol=1e-4)
assert torch.equal(top_blocks(library_scores[0], 7), select_blocks(library_scores, lengths, tenth)[0])

# %% [markdown]
# ## On the real model
#
# SmolLM2 reads the text of tutorial 1 with its six facts, and then "The captain of the ship is". The last step has to
# find the name. It still attends densely, but we keep its queries. They tell us which blocks it would have selected.

# %% tags=["hide-input"]
from pydoc_data.topics import topics

try:
    opened, is_real = open_model("smollm2"), True
except (FileNotFoundError, ImportError):
    opened, is_real = open_model("code"), False
    print("SmolLM2 is not installed (`make real` does it). A small model runs instead, and answers worse.")
model, tokenizer = opened.model, opened.tokenizer
encode, decode = tokenizer.encode_ordinary, tokenizer.decode
FACTS = {  # how a sentence begins, and how it ends
    "The password of the library is": " walnut",
    "The captain of the ship is": " Amelia Stone",
    "The next festival takes place in": " Lisbon",
    "The old baker lives at number": " 47",
    "The train to Geneva leaves at": " 6:35",
    "The favourite fruit of the queen is the": " apricot",
}


def read_text(n_tokens):
    """Token ids of the documentation's first paragraphs, with the facts as paragraphs between them."""
    ids, facts = [], [f"{begin}{end}.\n\n" for begin, end in FACTS.items()]
    for paragraph in topics["compound"].split("\n\n"):
        if facts and len(ids) > n_tokens * (0.86 - 0.13 * len(facts)):
            ids += encode(facts.pop(0))
        ids += encode(paragraph + "\n\n")
    return ids[:n_tokens]


text = read_text(1000)

# %%
b = 16
prompt = text + encode("\n\nThe captain of the ship is")
cache = model.new_cache(capacity=len(prompt) + 16, block_size=b)
prefill(model, prompt[:-1], cache)
queries = []  # of every layer, [Hq, D]


def attention_with_notes(query, keys, values, lengths, **options):
    queries.append(query[0, :, -1])
    return dense_attention(query, keys, values, lengths, **options)


watched = model.with_ops(replace(model.ops, dense_attention=attention_with_notes))
logits = prefill(watched, prompt[-1:], cache)
print("the next token, densely:", decode([int(logits.argmax())]))

# %% [markdown]
# `with_ops` gives the model other operations. (Below, you change the selection in the same way.) Now we compute the
# score of every block in every layer. We also compute its *mass*, the share of the attention that it truly gets.


# %%
def by_block(x, filler):
    """Cut the tokens into blocks, and fill up the last one: [..., T] → [..., M, b]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % b), value=filler).unflatten(-1, (-1, b))


scores, mass = [], []  # of every layer, [Hkv, M]
for query, keys in zip(queries, cache.keys[:, 0, :, : cache.length], strict=True):
    scores.append(scores_of(query, *bounds_of(keys, b)))
    products = query.unflatten(0, (keys.shape[0], -1)) @ keys.mT  # [Hkv, G, T]
    best_key = by_block(products.mean(dim=1), -float("inf")).amax(dim=-1)  # [Hkv, M]
    assert (scores[-1] >= best_key - 1e-3).all(), "law 1: no key has a larger product than its block's score"
    weights = (products * query.shape[-1] ** -0.5).softmax(dim=-1)
    mass.append(by_block(weights, 0.0).sum(dim=-1).mean(dim=1))
scores, mass = torch.stack(scores), torch.stack(mass)  # [layer, Hkv, M]

# %% [markdown]
# Do the scores find the fact's block? We take the layer and the KV head in which it has the most mass, and list the
# blocks of highest score:

# %% tags=["hide-input"]
wanted = len(encode(decode(text).partition("The captain of the ship is")[0])) // b  # the block in which the fact begins
layer, head = divmod(int(mass[:, :, wanted].argmax()), mass.shape[1])
order = scores[layer, head].argsort(descending=True).tolist()
print(f"layer {layer}, KV head {head}, {len(order)} blocks\n\n    rank  mass  text")
for rank, block in enumerate(order, start=1):
    mark = "->" if block == wanted else "  "
    if rank <= 6 or block == wanted:
        print(f"{mark} {rank:4}  {mass[layer, head, block]:4.2f}  {decode(prompt[b * block : b * block + b])!r}")

# %% [markdown]
# The arrow marks the fact. Its score is among the highest, and it comes from the bounds alone. (Here we computed them
# from the keys. A real cache keeps them.) But other blocks with high scores get hardly any mass. They promised too
# much. Some of them hold sentences of the same form.
#
# Now we take all layers and heads together, and choose a tenth of the blocks by score. How much of the attention do
# they get? We compare with the newest blocks, and with the best ones. (Only a step that reads all keys can know the
# best.)

# %%
M = scores.shape[-1]
n = -(-M // 10)  # a tenth, rounded up
choices = {"the newest": torch.arange(M).expand_as(scores).float(), "by score": scores, "the best": mass}
kept = {}
for name, numbers in choices.items():
    chosen = torch.stack([top_blocks(each, n) for each in numbers])  # [layer, Hkv, n]
    kept[name] = float(mass.gather(-1, chosen).sum(dim=-1).mean())
    print(f"{n} of {M} blocks, {name:10}: {kept[name]:.0%} of the attention")
assert max(kept.values()) == kept["the best"]
assert not is_real or kept["by score"] > kept["the newest"] + 0.2

# %% [markdown]
# ## Six questions
#
# Does the model still answer, if every step reads only a tenth of the blocks? The library's `sparse_step` attends to
# the selected blocks alone. (You will write it in tutorial 3.) We feed the beginning of each sentence with such steps.
# Then the model goes on by itself. The blocks are chosen in three ways:
#
# - *The newest blocks.* For this we replace the score by a function of our own.
# - *Bounds*, the score of this tutorial and of the paper.
# - *[Key sketches](../glossary.md#key-sketch)*, this project's own way. A sketch is a rough copy of one key, with two
#   bits per channel. The sketches of all keys take about as much memory as the bounds. Tutorial 5 builds them.


# %%
def by_age(query, bounds, lengths, block_size):
    """Score blocks by their number, so that the newest ones win: [1, Hkv, M]. Blocks past the end get −∞."""
    number = torch.arange(bounds.shape[-1]).expand(1, bounds.shape[1], -1).float()
    return number.masked_fill(number * block_size >= lengths, -float("inf"))


def answer(model, cache, config, sentence, n_tokens):
    """Feed a sentence by sparse steps, then let the model go on: token ids."""
    cache.truncate(len(text))
    for token in encode("\n\n" + sentence):
        logits = sparse_step(model, token, cache, config)
    found = [int(logits.argmax())]
    while len(found) < n_tokens:
        found.append(int(sparse_step(model, found[-1], cache, config).argmax()))
    return found


by_bounds = ReSAConfig(block_size=b, active_ratio=0.1, min_blocks=4)
by_sketches = replace(by_bounds, selection="sketch")
with_sketches = model.new_cache(cache.capacity, b, by_sketches.kept_bits)  # the same keys and values
for index in range(model.config.n_layer):
    with_sketches.write(index, 0, cache.keys[index, :, :, : len(text)], cache.values[index, :, :, : len(text)])
with_sketches.length = len(text)

ways = {
    "the newest": (model.with_ops(replace(model.ops, score_blocks=by_age)), cache, by_bounds),
    "bounds": (model, cache, by_bounds),
    "key sketches": (model, with_sketches, by_sketches),
}
right = {}
for name, way in ways.items():
    answers = [answer(*way, begin, len(encode(end))) for begin, end in FACTS.items()]
    marks = [found == encode(end) for found, end in zip(answers, FACTS.values(), strict=True)]
    right[name] = sum(marks)
    shown = "  ".join(f"{'✓' if mark else '✗'}{decode(found)}" for mark, found in zip(marks, answers, strict=True))
    print(f"{name:12} {right[name]} of 6:  {shown}")
assert not is_real or right["the newest"] < right["bounds"] < right["key sketches"]

# %% [markdown]
# Choosing by score beats taking the newest blocks, which miss every fact. Bounds find some of the facts. Sketches find
# more, and they read no more blocks. Six questions are few, but longer measurements say the same
# ([evidence](../evidence.md#what-does-a-better-selection-give)). [Choosing better](05_choosing_better.md) shows why
# bounds often choose badly, and builds the sketches.
#
# One thing is strange. In the dense step above, the bounds found the captain's block. So why does the model with bounds
# answer "a man" now? In a sparse step, every layer works with the outputs of sparse layers below it. It writes keys and
# values into the cache, and later steps read them. **What do sparse steps write into the cache, and what does that do
# to the steps after them?**
#
# ## Exercises
#
# ### 1. Blocks of one token
#
# What is the score of a block when $b = 1$? What would selection save then?

# %% tags=["hide-cell"]
single = scores_of(torch.tensor([[2.0, -1.0], [0.0, -1.0]]), *bounds_of(five, 1))[0]
print(single.tolist())
# The score is the product with the key itself. But lo and hi together are then as large as all keys and values, so a
# step reads more than a dense step. With blocks of b tokens the bounds take 1/b of that. But larger boxes are less
# precise.

# %% [markdown]
# ### 2. Two heads that disagree
#
# Let the two heads of a group have the queries $q$ and $-q$. What are the scores? Which blocks are selected?

# %% tags=["hide-cell"]
opposed = scores_of(torch.tensor([[2.0, -1.0], [-2.0, 1.0]]), lo, hi)
print(opposed[0].tolist())
assert (opposed == 0).all()
# The mean query is zero, so all scores are equal. The newest block is taken, and then the library takes the blocks of
# lowest number. The score is an upper limit for the mean of the heads' products. A single head's can be larger.

# %% [markdown]
# ### 3. Change the selection
#
# In tutorial 1 the first block got much attention in most layers. Write a score that always selects the first block,
# and otherwise follows the bounds. Does the model then find the baker's number? Predict, then run it.


# %% tags=["hide-cell"]
def first_too(query, bounds, lengths, block_size):
    """Score by bounds, but let the first block win."""
    scores = score_blocks(query, bounds, lengths, block_size)
    scores[..., 0] = float("inf")
    return scores


missed = 1 - torch.stack([(top_blocks(each, n) == 0).any(dim=-1) for each in scores]).float().mean()
print(f"in {missed:.0%} of the heads, bounds do not select the first block")
print(f"on average over all heads, it gets {mass[..., 0].mean():.0%} of the attention")
changed = model.with_ops(replace(model.ops, score_blocks=first_too))
for name, chosen in (("bounds", model), ("the first block too", changed)):
    found = answer(chosen, cache, by_bounds, "The old baker lives at number", 3)
    print(f"{name}: The old baker lives at number{decode(found)}")
# SmolLM2 finds it now. Many heads attend to the first block when nothing else fits, and they go wrong without it.

# %% [markdown]
# `resa exercise 2` lets you write the bounds, the score and the selection yourself, and says what is still wrong.
#
# **Next:** [what errors do to the cache](03_drift.md).
