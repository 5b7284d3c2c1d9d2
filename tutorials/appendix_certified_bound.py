# %% [markdown]
# # Appendix: How wrong can one step be?
#
# This is an appendix. No tutorial needs it, and it ends with a method that does not work on real models.
#
# **What you will learn:** nothing repairs the [step error](../glossary.md#step-error), but we can *bound* it. A sparse
# step has read enough to compute a number that the error cannot exceed. You will derive this
# [certified bound](../glossary.md#certified-bound) and see it work on clustered keys. You will also see that it says
# nothing on a real model, and why.
#
# **Time:** 15 minutes to read, 15 seconds to run. It builds on [blocks](02_blocks.md).

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from resa.reference import (
    ReSAConfig,
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
from resa.reference.lab.selection import Step, certified_bound, is_selected, upper_bounds

plt.style.use("resa.reference.weights.assets.figure")
torch.set_num_threads(1)

# %% [markdown]
# ## Keys to try it on
#
# First we take keys that suit the method. In each block, all keys lie close to a common centre, with a spread that we
# choose. Each query points to the centre of one block, so there is something to find. `Step` holds one attention step
# of each of $B$ sequences. Here $B = 32$, one KV head has $G = 2$ query heads, $D = 64$, and $T = 1{,}000$ tokens stand
# in blocks of $b = 16$. Everything is in float64, so that rounding does not blur the comparison.

# %%
B, G, D, T, b = 32, 2, 64, 1000, 16
M = -(-T // b)
config = ReSAConfig(block_size=b, active_ratio=0.1, min_blocks=4)
lengths = torch.full((B,), T, dtype=torch.int32)


def clustered(spread, seed=0):
    """A step over keys that lie around their blocks' centres, and values of norm about 1: [B, Hkv, T, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = normal(B, 1, M, D)
    keys = centres.repeat_interleave(b, dim=2)[:, :, :T] + spread * normal(B, 1, T, D)
    wanted = torch.randint(M, (B,), generator=generator)
    query = 1.5 * centres[torch.arange(B), :, wanted] + 0.2 * normal(B, G, D)  # [B, Hq, D]
    return Step(query, keys, lengths, b), normal(B, 1, T, D) / D**0.5


step, values = clustered(spread=0.1)
bounds = block_bounds(step.keys, lengths, b)  # [B, Hkv, 2, D, M]
scores = score_blocks(step.query, bounds, lengths, b)  # [B, Hkv, M]
chosen = is_selected(scores, lengths, config)  # [B, Hkv, M] bool
print(f"{int(chosen[0].sum())} of {M} blocks are selected")

# %% [markdown]
# ## The attention mass left out
#
# Take one query head. Let $S$ be the selected blocks, and let $s_j = q \cdot k_j / \sqrt D$ be the logit of token $j$.
# A dense step divides by the sum over all tokens. This sum has two parts,
#
# $$Z_S = \sum_{j \in S} e^{s_j} \qquad R^\ast = \sum_{j \notin S} e^{s_j}$$
#
# and the mass left out is $m = R^\ast / (Z_S + R^\ast)$. The sparse step knows $Z_S$, because it has read those keys.
# It does not know $R^\ast$. But it knows the bounds. As in tutorial 2, for the head's own query $q$ `[D]`,
#
# $$u_i = \frac{1}{\sqrt D} \sum_{d=0}^{D-1} \max(q_d \mathrm{lo}_{i,d},  q_d \mathrm{hi}_{i,d}) \ge s_j
# \quad \text{for every token } j \text{ of block } i$$
#
# So each block that the step did not select contributes at most its number of tokens times $e^{u_i}$:
#
# $$R^\ast \le R = \sum_{i \notin S} |\mathrm{block}_i| e^{u_i}$$
#
# and because $x / (Z_S + x)$ grows with $x$,
#
# $$m = \frac{R^\ast}{Z_S + R^\ast} \le \varepsilon = \frac{R}{Z_S + R}$$
#
# Exponentials of large logits overflow, so we keep the sums as logarithms. Then
# $\varepsilon = \mathrm{sigmoid}(\log R - \log Z_S)$.

# %%
own_upper = upper_bounds(step, bounds)  # u: [B, Hkv, G, M], a bound per query head
by_block = step.by_block(step.logits)  # log of the sum of exponentials over every block: [B, Hkv, G, M]
in_block = (lengths[:, None] - torch.arange(M) * b).clamp(0, b)[:, None, None]  # tokens per block; the last is partial

is_chosen = chosen[:, :, None]
log_Z = by_block.masked_fill(~is_chosen, float("-inf")).logsumexp(dim=-1)  # [B, Hkv, G]
log_R_true = by_block.masked_fill(is_chosen, float("-inf")).logsumexp(dim=-1)
log_R = (own_upper + in_block.log()).masked_fill(is_chosen, float("-inf")).logsumexp(dim=-1)

left_out = torch.sigmoid(log_R_true - log_Z)
epsilon = torch.sigmoid(log_R - log_Z)
assert (by_block <= own_upper + in_block.log() + 1e-9).all(), "u bounds every logit of its block"
assert (left_out <= epsilon + 1e-9).all(), "law 10"
assert torch.allclose(epsilon, certified_bound(step, chosen)), "the project's own function"
print(f"mass left out {left_out.median():.4f}, at most {left_out.max():.4f}")
print(f"certified     {epsilon.median():.4f}, at most {epsilon.max():.4f}")

# %% [markdown]
# The bound is above the truth in every case, and it is useful. It says that the step has seen nearly everything,
# without reading the keys that were left out.
#
# Note that $u$ uses *each head's own* query. The score that selects blocks uses the mean of the group's queries. It
# bounds the mean of the heads' logits, which says nothing about a single head: the queries $q$ and $-q$ have a mean of
# zero.
#
# ## The error of the output
#
# Let $o$ `[D]` be the head's output in a dense step, $o_S$ its output in the sparse step, and $o_N$ the attention over
# the tokens that were *not* selected. Attention over a whole is the mean of attention over its parts, weighted by their
# masses (law 4):
#
# $$o = (1 - m) o_S + m o_N \quad\Longrightarrow\quad o_S - o = m (o_S - o_N)$$
#
# $o_S$ and $o_N$ are weighted means of values. So their distance is at most that of the two values that are furthest
# apart:
#
# $$\lVert o_S - o \rVert \le \varepsilon \cdot \max_{j,k} \lVert v_j - v_k \rVert
# \le 2 \varepsilon \cdot \max_j \lVert v_j \rVert$$
#
# The last form needs one number per KV head, the largest norm of a value. A cache could keep this number up to date.


# %%
def output_error(step, values, config):
    """‖o_S − o‖ of every query head: [B, Hq]."""
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    scores = score_blocks(step.query, bounds, step.lengths, step.block_size)
    indices = select_blocks(scores, step.lengths, config)
    sparse = sparse_attention(step.query, step.keys, values, indices, step.lengths, step.block_size)
    dense = dense_attention(step.query[:, :, None], step.keys, values, step.lengths)[:, :, 0]
    return (sparse - dense).norm(dim=-1)


error = output_error(step, values, config)  # [B, Hq]
limit = 2 * epsilon.flatten(1) * values.norm(dim=-1).amax(dim=-1)
assert (error <= limit + 1e-9).all(), "law 10, second part"
print(f"output error {error.median():.4f}, at most {error.max():.4f}; certified {limit.median():.4f}")

# %% [markdown]
# ## When is it tight?
#
# Now we vary the spread of the keys within a block, from zero up to the spread of the centres themselves.

# %%
spreads = [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]
truths, certificates, error_pairs = [], [], []
for spread in spreads:
    step, values = clustered(spread)
    bounds = block_bounds(step.keys, lengths, b)
    chosen = is_selected(score_blocks(step.query, bounds, lengths, b), lengths, config)
    by_block = step.by_block(step.logits)
    mass = (by_block - by_block.logsumexp(dim=-1, keepdim=True)).exp()
    truths.append(mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1).flatten())  # [B·G]
    certificates.append(certified_bound(step, chosen).flatten())
    assert (truths[-1] <= certificates[-1] + 1e-9).all()
    limit = 2 * certificates[-1].view(B, G) * values.norm(dim=-1).amax(dim=-1)
    error_pairs.append((output_error(step, values, config).flatten(), limit.flatten()))

assert torch.allclose(truths[0], certificates[0]), "no spread: the box is one point, and the bound is exact"
assert certificates[-1].median() > 0.99, "spread like the centres: the bound is nearly one"

# %% tags=["hide-input"]
figure, (by_spread, scatter) = plt.subplots(1, 2, figsize=(7.5, 3))
by_spread.plot(spreads, [found.median() for found in certificates], "s-", label="certified, ε")
by_spread.plot(spreads, [found.median() for found in truths], "o-", label="true")
by_spread.set(xlabel="spread of keys within a block", ylabel="attention mass left out", ylim=(-0.03, 1.03))
by_spread.legend()
for spread, (error, limit) in zip(spreads, error_pairs, strict=True):
    if spread in (0, 0.1, 0.3, 1.0):
        scatter.plot(error, limit, ".", markersize=4, label=f"spread {spread:g}")
ends = [1e-6, 3]
scatter.plot(ends, ends, color="0.5", linewidth=0.8)
scatter.set(xlabel="true error of the output", ylabel="certified", xscale="log", yscale="log")
scatter.legend()
plt.show()

# %% [markdown]
# *Figure: left, the median over 64 heads of the mass left out and of its bound. Right, the error of the output and its
# bound $2\varepsilon \max\lVert v \rVert$, one dot per head. On the grey line both would be equal.*
#
# Without spread, the box around a block is a point and $u$ is the logit itself. So the bound of the mass (left) equals
# the truth. The bound of the output (right) still has its factor $2\max\lVert v \rVert$. With a small spread the bound
# is useful. With a large spread it rises to 1, and "at most everything is left out" is true and worthless. The truth
# itself hardly moves meanwhile. So the bound fails, and the selection does not.
#
# ## On the model
#
# Now we take the queries and keys of the shipped model, for 16 steps after a prompt of 1,024 tokens of a Python file,
# in all layers and heads. As in tutorial 2, an attention that takes notes records the queries, and each of the 16 steps
# becomes a sequence of its own.

# %%
model, tokenizer = load_model(), load_tokenizer()
_, text = example_module()
tokens = tokenizer.encode_ordinary(text)
n_prompt, n_steps = 1024, 16
cache = model.new_cache(n_prompt + n_steps, b)
prefill(model, tokens[:n_prompt], cache)
queries = []  # one [1, Hq, n_steps, D] per layer


def attention_with_notes(query, keys, values, lengths, **options):
    queries.append(query)
    return dense_attention(query, keys, values, lengths, **options)


watched = model.with_ops(replace(model.ops, dense_attention=attention_with_notes))
prefill(watched, tokens[n_prompt : n_prompt + n_steps], cache)
model_lengths = torch.arange(n_prompt + 1, n_prompt + n_steps + 1, dtype=torch.int32)
model_steps = [
    Step(query[0].transpose(0, 1).double(), keys.expand(n_steps, -1, -1, -1).double(), model_lengths, b)
    for query, keys in zip(queries, cache.keys, strict=True)
]


def residuals(step, config):
    """log Z_S, log R* and log R of a step that selects as `config` says: three [B, Hkv, G]."""
    bounds = block_bounds(step.keys, step.lengths, step.block_size)
    chosen = is_selected(score_blocks(step.query, bounds, step.lengths, step.block_size), step.lengths, config)
    out = chosen[:, :, None]
    by_block = step.by_block(step.logits)
    log_Z = by_block.masked_fill(~out, float("-inf")).logsumexp(dim=-1)
    log_R_true = by_block.masked_fill(out, float("-inf")).logsumexp(dim=-1)
    return log_Z, log_R_true, torch.special.logit(certified_bound(step, chosen)) + log_Z


found = [residuals(step, config) for step in model_steps]
log_Z, log_R_true, log_R = (torch.stack(parts) for parts in zip(*found, strict=True))  # [layer, B, Hkv, G]
left_out, epsilon = torch.sigmoid(log_R_true - log_Z), torch.sigmoid(log_R - log_Z)
assert (left_out <= epsilon + 1e-6).all(), "law 10 holds here as well"
print(f"mass left out {left_out.mean():.3f} on average")
print(f"certified bound {epsilon.mean():.5f} on average, at least {epsilon.min():.3f}")
assert epsilon.mean() > 0.99, "it says nothing"

# %% [markdown]
# The truth never exceeds the bound, but the bound is nearly one everywhere. Two differences of logarithms tell why:
#
# - The *margin* $\log Z_S - \log R^\ast$ is how much the selected blocks truly outweigh the rest.
# - The *slack* $\log R - \log R^\ast$ is how much the bounds overestimate the rest.
#
# Since $\varepsilon = \mathrm{sigmoid}(\mathrm{slack} - \mathrm{margin})$, the bound says something only where the
# slack is smaller than the margin.

# %%
margin = (log_Z - log_R_true).flatten(1).median(dim=1).values
slack = (log_R - log_R_true).flatten(1).median(dim=1).values
print("margin by layer:", " ".join(f"{each:.1f}" for each in margin.tolist()))
print("slack by layer: ", " ".join(f"{each:.1f}" for each in slack.tolist()))
assert (slack > margin).all()

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 2.8))
layers = torch.arange(len(model_steps))
axes.bar(layers - 0.2, margin, width=0.36, label="margin of the selected blocks")
axes.bar(layers + 0.2, slack, width=0.36, label="slack of the bounds")
axes.set(xlabel="layer", ylabel="median [nats]")
axes.set_xticks(layers.tolist())
axes.legend()
plt.show()

# %% [markdown]
# *Figure: margin and slack by layer, on the model. The bound would say something where the margin is the larger one.
# One nat is a factor of e.*
#
# There are two reasons. First, the margin is small: this model's attention is spread out, and the selected blocks do
# not outweigh the rest by much. Second, the slack is large: for each of the 64 channels the bound takes the most
# favourable key of the block, but no key is the most favourable in all channels. The excess adds up over channels, and
# then the exponential multiplies it.
#
# That alone does not make the score a bad *ranking*. If the bounds overestimate all blocks by about as much, their
# order is right. A ranking needs differences, and a certificate needs the level.
#
# ## Smaller blocks
#
# A box with fewer keys is tighter. With $b = 1$ the box is the key, and the bound must equal the mass left out.

# %%
print(" b   mass left out   certified   bounds read, of the cache")
for size in (1, 2, 4, 8, 16):
    parts = [residuals(replace(step, block_size=size), replace(config, block_size=size)) for step in model_steps]
    log_Z, log_R_true, log_R = (torch.stack(each) for each in zip(*parts, strict=True))
    truth, bound = torch.sigmoid(log_R_true - log_Z).mean(), torch.sigmoid(log_R - log_Z).mean()
    print(f"{size:2}   {truth:13.3f}   {bound:9.3f}   {1 / (2 * size):.3f}")
    if size == 1:
        assert torch.allclose(log_R, log_R_true, atol=1e-4)

# %% [markdown]
# (The last column counts the one bound per channel that a query needs, $1/(2b)$ of all keys and values.) Once the
# blocks are small enough for the bound to say something, it costs more to read than the selected tenth of the blocks.
# On this model no block size gives a cheap certificate.
#
# ## The use of it
#
# - It is a *law*. It holds for every input, so tests can check it (law 10 of the specification), and an implementation
#   with wrong bounds or a wrong selection breaks it.
# - Where keys are clustered within blocks and attention is sharp, it tells at run time whether a step was good or
#   should be repeated densely.
# - It speaks of *one step over the cache as it is*. It says nothing about drift: over a wrong cache, a step may be
#   certified and wrong. Against drift there is [rectification](04_rectification.md). It needs no bound, because it is
#   exact.
#
# ## Exercises
#
# ### 1. From error to density
#
# A decoder could attend densely wherever $\varepsilon$ exceeds 0.05. Take spreads 0.1, 0.3 and 0.5 of the clustered
# keys. Which share of the heads would it attend to densely? For which share is the mass left out truly above 0.05?

# %% tags=["hide-cell"]
for spread in (0.1, 0.3, 0.5):
    index = spreads.index(spread)
    suspected, guilty = (certificates[index] > 0.05).double().mean(), (truths[index] > 0.05).double().mean()
    print(f"spread {spread}: dense for {suspected:.0%} of the heads, needed for {guilty:.0%}")
    assert suspected >= guilty
# A certificate errs on one side only. It may ask for a dense step that was not needed, but it never misses one that
# was.

# %% [markdown]
# ### 2. The best selection for a certificate
#
# Suppose you want $\varepsilon$ itself to be small. Which blocks should a step select, those of highest mean score or
# others? Try the largest of the heads' own upper bounds (`upper_bounds(step, bounds).amax(dim=2)`) on clustered keys.

# %% tags=["hide-cell"]
step, _ = clustered(0.2)
bounds = block_bounds(step.keys, lengths, b)
pooled = is_selected(score_blocks(step.query, bounds, lengths, b), lengths, config)
own = is_selected(upper_bounds(step, bounds).amax(dim=2), lengths, config)
print(f"pooled {certified_bound(step, pooled).mean():.3f}, largest own bound {certified_bound(step, own).mean():.3f}")
# R is a sum of exponentials of each head's u. So a step should select its largest terms, the blocks of large u for some
# head. The two heads of a group ask for nearly the same here, so the choices hardly differ.

# %% [markdown]
# ### 3. Two heads that disagree
#
# Give the two heads of a group the queries $q$ and $-q$ and compare. Is the bound still true? Is it small?

# %% tags=["hide-cell"]
step, _ = clustered(0.1)
opposed = replace(step, query=torch.stack((step.query[:, 0], -step.query[:, 0]), dim=1))
bounds = block_bounds(opposed.keys, lengths, b)
scores = score_blocks(opposed.query, bounds, lengths, b)
chosen = is_selected(scores, lengths, config)
by_block = opposed.by_block(opposed.logits)
mass = (by_block - by_block.logsumexp(dim=-1, keepdim=True)).exp()
lost, bound = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1), certified_bound(opposed, chosen)
print(f"scores of at most {scores.abs().max():.1g}: mass left out {lost.mean():.2f}, certified {bound.mean():.2f}")
assert (lost <= bound + 1e-9).all()
assert bound.mean() > 0.9
# All scores are zero, so the selection is blind. The bound uses the heads' own queries, and it says so.

# %% [markdown]
# **Back:** [all tutorials](../../tutorials/README.md).
