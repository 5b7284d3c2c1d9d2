# %% [markdown]
# # 5. Choosing better
#
# In tutorial 2, SmolLM2 looked for six facts with a tenth of its cache. Bounds found a part of them, and
# [key sketches](../glossary.md#key-sketch) found all, with as many blocks. Rectification makes the cache exact, but it
# does not change how a step chooses. **Why do bounds choose badly, and how can two bits per channel choose well?**
#
# In this tutorial you measure how loose [bounds](../glossary.md#block-bounds) are, and build the sketch that chooses
# nearly as well as the keys themselves. You compare the bytes that both read, and write a scorer of your own.
#
# **Time:** half an hour to read, less than a minute to run. It builds on [blocks](02_blocks.md) and
# [rectification](04_rectification.md).

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from resa.reference import ReSAConfig, block_bounds
from resa.reference.lab.corpus import example_module
from resa.reference.lab.fidelity import compare, read, read_ratio
from resa.reference.lab.parallel import is_selected
from resa.reference.lab.scorers import SCORERS, approximated, block_upper_bounds, by_bounds, by_mass
from resa.reference.sketch import rotate
from resa.reference.weights.models import find_model, open_model
from resa.results import recorded

plt.style.use("resa.reference.weights.assets.figure")
torch.set_num_threads(1)

# %% [markdown]
# ## What there is to win
#
# Six questions say little about how much is lost. So from here on we measure. The model reads 1,024 tokens of a Python
# file. Then it is led along the next 96 tokens. Every step reads a tenth of the blocks, and a rectification follows
# after every 32. We do this twice. First the blocks are chosen by bounds. Then they are chosen by the attention mass
# that they will truly get. A decoder could know that mass only by reading all keys. So the second result shows how much
# a better choice could win.
#
# (The model is SmolLM2, if `make real` has installed it, and the small model that ships with the project otherwise. The
# text says where a claim holds for SmolLM2 alone.)

# %%
try:
    find_model("smollm2")
    name = "smollm2"
except FileNotFoundError:
    name = "code"
opened = open_model(name)
model, tokenizer = opened.model, opened.tokenizer
b, D = 16, model.config.head_dim
config = ReSAConfig(block_size=b, active_ratio=0.1, min_blocks=4, interval=32, schedule="paper")
print(f"{name}: {model.config.n_layer} layers, {model.config.n_kv_head} KV heads, D = {D}")

n_prompt, n_steps = 1024, 96
T = n_prompt + n_steps
M = T // b
_, text = example_module()
reading = read(model, tokenizer.encode_ordinary(text)[:T], n_prompt)


def loss(scorer, ratio=0.1):
    """KL from dense decoding in nats, mean over the decoded tokens."""
    return float(compare(model, reading, replace(config, active_ratio=ratio), scorer)["kl"].mean())


losses = {(score, 0.1): loss(SCORERS[score]) for score in ("pooled", "mass")}
print(f"blocks chosen by bounds:         KL {losses['pooled', 0.1]:.3f}")
print(f"blocks chosen by their own mass: KL {losses['mass', 0.1]:.3f}")
assert losses["mass", 0.1] < (0.5 if name == "smollm2" else 0.7) * losses["pooled", 0.1]

# %% [markdown]
# Both read equally many blocks. The difference is the price of choosing badly. To see where it comes from, we look at
# the queries and keys of all layers.
#
# A *scorer* is a function from `Steps` to scores. `Steps` holds all steps of one layer: the queries, the exact keys and
# the keys that decoding wrote. (A step reads exact keys up to its [window](../glossary.md#window), and decoded ones
# from there on.) A scorer that takes notes therefore sees all we need. Let it select every block, so that decoding is
# dense and the notes are exact:

# %%
layers = []  # Steps of every layer


def taking_notes(steps):
    layers.append(steps)
    return torch.zeros(*steps.exact.shape[:2], n_steps, M)  # [B, Hkv, S, M]


everything = replace(config, active_ratio=1.0)
assert compare(model, reading, everything, taking_notes)["kl"].max() < 1e-3, "all blocks: dense decoding"
assert all(torch.allclose(steps.exact, steps.decoded, atol=1e-2) for steps in layers)

# Every eighth step is enough to look at.
layers = [
    replace(steps, query=steps.query[:, :, 7::8], begins=steps.begins[7::8], at=steps.at[7::8]) for steps in layers
]
print(f"queries {list(layers[0].query.shape)}, keys {list(layers[0].exact.shape)}, in {len(layers)} layers")

# %% [markdown]
# ## Why bounds are loose
#
# The bound of a block takes the most favourable key in every channel: $\max(q_d \mathrm{lo}_d, q_d \mathrm{hi}_d)$,
# summed over the $D$ channels. But each channel has its own favourite. In how many channels is the best key of the
# block the favourite?


# %%
def logits_of(query, keys):
    """Attention logits of all query heads: [B, Hq, S, D], [B, Hkv, T, D] → [B, Hkv, G, S, T]."""
    return query.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].mT * D**-0.5


def best_of(logits):
    """Largest logit of each block of the prompt: [..., T] → [..., n_prompt / b]."""
    return logits[..., :n_prompt].unflatten(-1, (-1, b)).amax(dim=-1)


def bounds_of(query, keys):
    """Upper bounds of those, for each query head by itself."""
    bounds = block_bounds(keys[:, :, :n_prompt], torch.tensor([n_prompt]), b)
    return block_upper_bounds(query.unflatten(1, (keys.shape[1], -1)), bounds[:, :, None]) * D**-0.5


shares = []
for steps in layers:
    query = steps.query[:, :, -1].unflatten(1, (steps.exact.shape[1], -1))  # [B, Hkv, G, D], of the last step
    blocks = steps.exact[:, :, None, :n_prompt].unflatten(3, (-1, b))  # [B, Hkv, 1, n_prompt / b, b, D]
    products = query[:, :, :, None, None] * blocks  # of every channel: they add up to the logits
    best = products.sum(dim=-1).argmax(dim=-1)  # [B, Hkv, G, n_prompt / b]
    shares.append((products.argmax(dim=-2) == best[..., None]).float().mean())
share = torch.stack(shares).mean()
print(f"the best key of a block is the favourite in {D * share:.1f} of {D} channels")
assert 1 / b < share < 0.2

# %% [markdown]
# By pure chance it would be one channel in 16, that is 4 of 64. In all other channels the bound takes something that
# the best key does not have. Each of them adds to the *slack*, bound less truth, and none takes anything away. So the
# slack grows like the number of channels. The products themselves have both signs and partly cancel, so the logits grow
# more slowly. We can watch this on the same keys if we keep only some of their channels, drawn at random. (Every query
# head has its own bound here. The score of [tutorial 2](02_blocks.md) bounds the mean query of a group, which has slack
# for the same reason.)

# %%
generator = torch.Generator().manual_seed(0)
counts = [2**i for i in range(D.bit_length())]  # 1, 2, 4, … D
slacks, slack_spreads, truth_spreads = (torch.zeros(len(counts)) for _ in range(3))
for steps in layers:
    order = torch.randperm(D, generator=generator)
    for row, count in enumerate(counts):
        some = order[:count]
        query, keys = steps.query[..., some], steps.exact[..., some]
        truth, bound = best_of(logits_of(query, keys)), bounds_of(query, keys)
        assert (bound >= truth - 1e-3).all(), "law 1, for every head"
        slacks[row] += (bound - truth).mean() / len(layers)
        slack_spreads[row] += (bound - truth).std(dim=-1).mean() / len(layers)  # over the blocks
        truth_spreads[row] += truth.std(dim=-1).mean() / len(layers)

print("channels   slack   its spread over blocks   spread of the best logits")
for row, count in enumerate(counts):
    print(f"{count:8}  {slacks[row]:6.2f}   {slack_spreads[row]:22.2f}   {truth_spreads[row]:25.2f}")
assert slacks[0] < 1e-3, "one channel: some key lies at the bound"
assert slacks[-1] / slacks[-2] > 1.7, "twice the channels, twice the slack"
assert slacks[-1] / slacks[-3] > 1.3 * truth_spreads[-1] / truth_spreads[-3]
assert slack_spreads[-1] > 0.5 * truth_spreads[-1]

# %%
shown, head = len(layers) // 2, 0
steps = layers[shown]
truth = best_of(logits_of(steps.query, steps.exact))[0, head, 0, -1]  # [n_prompt / b], of one query head and step
bound = bounds_of(steps.query, steps.exact)[0, head, 0, -1]
by_truth = truth.argsort(descending=True)

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9))
left.plot(bound[by_truth], "o", color="C1", markersize=4, label="bound")
left.plot(truth[by_truth], color="C0", label="largest logit")
left.set(xlabel="block, best first", ylabel="logit")
left.legend()
right.plot(counts[1:], slacks[1:], "o-", color="C1", label="slack")
right.plot(counts, truth_spreads, "s-", color="C0", label="spread of the largest logits")
right.plot(counts[1:], slack_spreads[1:], "^--", color="C1", label="spread of the slack")
right.set(xlabel="channels", ylabel="logit", xscale="log", yscale="log")
right.set_xticks(counts, [str(count) for count in counts])
right.minorticks_off()
right.legend()
plt.show()

# %% [markdown]
# *Figure: on the left, the bound of every block of the prompt and the largest logit that the block holds, for one head
# and step in the middle of the model. Blocks are sorted by that logit. On the right, means over all layers, heads and
# steps, for keys with some of their channels. A spread is the standard deviation over blocks.*
#
# It would be no harm if all bounds were too high by the same amount, because a ranking needs differences alone. But the
# slack differs from block to block, and its spread is over half that of the logits to be ranked. A bound is the sum of
# a logit and a slack, so its rank depends on both. (What bounds can *certify* is another question. [The
# appendix](appendix_certified_bound.md) answers it.)
#
# ## What a rotation does to outliers
#
# Two bounds of 16 bits for every 16 tokens are $2 \cdot 16 / 16 = 2$ bits per channel and token. For the same memory we
# can keep *every key*, in two bits per channel. Two bits can name four levels. To save memory, all channels of a key
# share the same four. Real keys make that hard:

# %%
keys = layers[shown].exact[0]  # [Hkv, T, D]


def sizes(keys):
    """Root mean square of every channel: [..., T, D] → [..., D]."""
    return keys.square().mean(dim=-2).sqrt()


outliers = {"keys": [], "rotated": []}
for steps in layers:
    for which, found in (("keys", sizes(steps.exact)), ("rotated", sizes(rotate(steps.exact)))):
        outliers[which].append((found.amax(dim=-1) / found.median(dim=-1).values).mean())
before, after = (torch.stack(ratios).mean() for ratios in outliers.values())
print(f"the largest channel is {before:.1f} times the median one, after rotation {after:.1f} times")
assert before > 1.25 * after
assert before > 5 or name != "smollm2"

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.4), sharey=True)
left.bar(range(D), sizes(keys)[head])
left.set(xlabel="channel", ylabel="root mean square", title="keys")
right.bar(range(D), sizes(rotate(keys))[head], color="C2")
right.set(xlabel="channel", title="rotated keys")
plt.show()

# %% [markdown]
# *Figure: size of the channels of one head's keys, before and after the rotation.*
#
# A few channels are larger than the others, on SmolLM2 many times. Levels that suit them are too far apart for the
# rest. So every key is *rotated* first. Some channels change their sign. Then each channel becomes a sum of all of
# them, with signs, divided by $\sqrt D$. (This is a Hadamard transform: 6 rounds of sums and differences for 64
# channels.) A large value in one channel becomes a moderate value in all:

# %%
print("outlier ", rotate(torch.tensor([0.0, 8.0, 0.0, 0.0])).tolist())
print("all over", rotate(torch.tensor([1.0, 8.0, 2.0, -1.0])).tolist())
assert rotate(torch.tensor([0.0, 8.0, 0.0, 0.0])).abs().tolist() == [4.0] * 4

# %% [markdown]
# Queries are rotated in the same way. A rotation $R$ keeps all products,
# $\langle Rq, Rk \rangle = \langle q, k \rangle$, so the logits stay what they were:

# %%
for steps in layers:
    rotated = logits_of(rotate(steps.query), rotate(steps.exact))
    assert torch.allclose(rotated, logits_of(steps.query, steps.exact), rtol=1e-4, atol=1e-3)
print("all logits are the same")

# %% [markdown]
# ## A key in two bits per channel
#
# A rotated channel is a sum of many terms, so its values are distributed much like a normal variable. Let $\sigma$ be
# the root mean square of a rotated key $r$. For a normal variable of that size, four evenly spaced levels lose least at
# a distance of $s = 0.9957 \sigma$. They are $-1.5s$, $-0.5s$, $0.5s$ and $1.5s$. The *code* $c$ of the key holds the
# nearest level of each channel, in units of $s$. The *scale* $a$ is one number for the whole key, chosen so that
# $a \cdot c$ comes nearest to $r$.


# %%
def two_bits(keys):
    """Keys [..., D] as their codes remember them, a · c: [..., D]."""
    s = 0.9957 * keys.square().mean(dim=-1, keepdim=True).sqrt()
    code = (keys >= -s).float() + (keys >= 0) + (keys >= s) - 1.5  # −1.5, −0.5, 0.5 or 1.5
    scale = (keys * code).sum(dim=-1, keepdim=True) / code.square().sum(dim=-1, keepdim=True)
    return scale * code


steps, token = layers[shown], 500
key, query = rotate(steps.exact[0, head, token]), rotate(steps.query[0, head, 0])  # [D] each
kept = two_bits(key)
assert torch.allclose(kept, approximated(steps.exact[0, head, token], bits=2), atol=1e-4), "the project's own function"
print("rotated key", "  ".join(f"{value:6.2f}" for value in key[:8].tolist()), " …")
print("kept as    ", "  ".join(f"{value:6.2f}" for value in kept[:8].tolist()), " …")

error = (query @ kept - query @ key) * D**-0.5
limit = query.norm() * (key - kept).norm() * D**-0.5
print(f"logit {query @ key * D**-0.5:.2f}, estimate {query @ kept * D**-0.5:.2f}, ", end="")
print(f"off by {error.abs():.2f}, at most {limit:.2f}")
assert error.abs() <= limit + 1e-4, "law 11"

# %% [markdown]
# The estimate $\ell$ of a logit is the product of the rotated query with $a \cdot c$, divided by $\sqrt D$. The product
# is wrong by that of the query with the *residual* $r - a \cdot c$. By Cauchy and Schwarz this is at most the product
# of their lengths (law 11):
#
# $$\left| \ell - \frac{q \cdot k}{\sqrt D} \right| \le \frac{\lVert q \rVert \lVert r - a \cdot c \rVert}{\sqrt D}$$
#
# To reach that limit, the query would have to point along the residual. But the two directions have little to do with
# each other, and in $D$ dimensions the cosine of two random directions is around $\pm 1/\sqrt D$. In other words, the
# errors of the channels have both signs and mostly cancel. Slack never cancels.

# %%
print("bits   residual / key   error / its limit (root mean square)")
for bits in (1, 2, 4):
    residuals, ratios = [], []
    for steps in layers:
        rest = rotate(steps.exact) - approximated(steps.exact, bits)
        error = logits_of(rotate(steps.query), rest)
        lengths = steps.query.norm(dim=-1).unflatten(1, (rest.shape[1], -1))[..., None], rest.norm(dim=-1)
        limit = lengths[0] * lengths[1][:, :, None, None] * D**-0.5
        assert (error.abs() <= 1.001 * limit + 1e-4).all(), "law 11"
        residuals.append((rest.norm(dim=-1) / steps.exact.norm(dim=-1)).mean())
        ratios.append((error / limit).square().mean().sqrt())
    residual, ratio = torch.stack(residuals).mean(), torch.stack(ratios).mean()
    print(f"{bits:4}   {residual:14.2f}   {ratio:17.3f}")
    assert abs(residual - {1: 0.603, 2: 0.345, 4: 0.107}[bits]) < 0.05, "as for a normal variable"
    assert 0.8 < ratio * D**0.5 < 2
print(f"1 / sqrt(D) = {D**-0.5:.3f}")

# %% [markdown]
# ## Ranking blocks
#
# Now we can compare. Bounds and sketches both estimate the largest logit of a block, and both are wrong. If they were
# wrong by the same amount for all blocks, the ranking would be right. So we ask for the *spread* of their errors over
# the blocks, beside the spread of the logits themselves.

# %%
estimates = {"bounds": bounds_of}
for bits in (1, 2, 4):
    name_of_bits = f"{bits} bit{'s' if bits > 1 else ''}"
    estimates[name_of_bits] = lambda query, keys, bits=bits: best_of(logits_of(rotate(query), approximated(keys, bits)))

spreads, shown_estimates = {}, {}
for way, estimate in estimates.items():
    found = []
    for layer, steps in enumerate(layers):
        guess, truth = estimate(steps.query, steps.exact), best_of(logits_of(steps.query, steps.exact))
        found.append((guess - truth).std(dim=-1).mean())
        if layer == shown:
            shown_estimates[way] = guess[0, head, 0, -1]
    spreads[way] = float(torch.stack(found).mean())
    print(f"{way:7} spread of the errors over blocks {spreads[way]:.2f}, of the truth {truth_spreads[-1]:.2f}")
assert 0.75 * spreads["bounds"] > spreads["2 bits"] > 1.5 * spreads["4 bits"]
assert spreads["1 bit"] > 1.25 * spreads["2 bits"]
assert 0.7 < spreads["1 bit"] / spreads["bounds"] < 1.4

# %% tags=["hide-input"]
truth = best_of(logits_of(layers[shown].query, layers[shown].exact))[0, head, 0, -1]
figure, all_axes = plt.subplots(1, 3, figsize=(7.5, 2.6), sharey=True)
for axes, (way, colour) in zip(all_axes, {"bounds": "C1", "1 bit": "C3", "2 bits": "C2"}.items(), strict=True):
    axes.plot(shown_estimates[way][by_truth], "o", color=colour, markersize=3.5)
    axes.plot(truth[by_truth], color="C0")
    axes.set(title=way, xlabel="block, best first")
all_axes[0].set_ylabel("logit")
plt.show()

# %% [markdown]
# *Figure: the largest logit of every block (line) and three estimates of it (dots), for the head and step of the first
# picture.*
#
# The errors of one bit vary about as much as those of the bounds. With two bits they vary much less, and with four they
# hardly matter.
#
# A ranking is a means to an end. What counts is the attention mass of the chosen blocks. The score by sketches
# estimates it directly: the softmax of all estimated logits, summed over the tokens of a block and over the heads of
# the group. We score all blocks at all these steps, choose a tenth, and add up their true mass. We also try two bits
# *without* the rotation.

# %%
lengths = (layers[0].at + 1).to(torch.int32)  # [S]: each step is a sequence of its own
is_whole = (torch.arange(M) + 1) * b <= lengths[:, None]  # [S, M], blocks without future tokens


def not_rotated(steps):
    """Score by the mass that keys would have in two bits per channel, as they are."""
    return by_mass(replace(steps, exact=two_bits(steps.exact), decoded=two_bits(steps.decoded)), bits=None)


def ranks(scores):
    """Ranks of whole blocks, less their mean, and 0 for all others."""
    order = scores.masked_fill(~is_whole, float("inf")).argsort(dim=-1).argsort(dim=-1).float()
    return (order - (is_whole.sum(dim=-1, keepdim=True) - 1) / 2).masked_fill(~is_whole, 0.0)


def chosen_by(scores):
    """Mark the blocks that the steps select: [1, Hkv, S, M] → [Hkv, S, M] bool."""
    return is_selected(scores[0].transpose(0, 1), lengths, config).transpose(0, 1)


masses = [SCORERS["mass"](steps) for steps in layers]  # [B, Hkv, S, M] each: G in all


def covered(scorer):
    """Rank correlation of scores with masses, and the share of the mass on the blocks chosen."""
    correlations, shares = [], []
    for steps, mass in zip(layers, masses, strict=True):
        scores = scorer(steps)
        ours, wanted = ranks(scores), ranks(mass)
        correlations.append(((ours * wanted).sum(-1) / (ours.norm(dim=-1) * wanted.norm(dim=-1))).mean())
        shares.append((mass[0] * chosen_by(scores)).sum() / mass.sum())
    return float(torch.stack(correlations).mean()), float(torch.stack(shares).mean())


ways = {
    "bounds": SCORERS["pooled"],
    "1 bit": SCORERS["sketch-1"],
    "2 bits": SCORERS["sketch-2"],
    "2 bits, not rotated": not_rotated,
    "4 bits": SCORERS["sketch-4"],
    "the true mass": SCORERS["mass"],
}
found = {}
print("blocks chosen by      rank correlation   mass covered   short of the best")
for way, scorer in ways.items():
    found[way] = covered(scorer)
best_share = found["the true mass"][1]
for way, (correlation, share) in found.items():
    print(f"{way:20}  {correlation:16.3f}   {share:12.3f}   {best_share - share:17.3f}")
short = {way: best_share - share for way, (_, share) in found.items()}
assert min(short.values()) > -1e-3, "no choice covers more"
assert short["2 bits"] < 0.4 * short["bounds"]
assert short["4 bits"] < 0.4 * short["2 bits"]
assert short["1 bit"] < short["bounds"] + 0.04
assert (short["2 bits, not rotated"] > short["bounds"]) == (name == "smollm2")

# %% [markdown]
# The last column shows what a choice misses. Two bits miss a small part of what bounds miss. On SmolLM2, one bit misses
# as much as bounds do. Four bits win little over two, because little is left to win.
#
# Without the rotation, two bits are far worse than bounds on SmolLM2. A few large channels decide its logits, and
# levels that all channels share cut them off at $1.5s$.
#
# How much memory is that? A key and a value take $2 \cdot 16 \cdot D$ bits per token and KV head. Two bounds of 16 bits
# per 16 tokens take $2D$ bits per token, and so do codes of two bits, with 16 bits more for the scale:

# %%
print("  D   key and value   bounds   sketch, 2 bits   (bytes per token and KV head)")
for channels in (64, 128):
    cached, bounds, sketch = 2 * 2 * channels, 2 * 2 * channels / 16, channels * 2 / 8 + 2
    print(f"{channels:3}   {cached:13}   {bounds:6.0f}   {sketch:14.0f}")
    assert bounds / cached == 1 / 16
    assert sketch / cached == 1 / 16 + 1 / (2 * channels)

# %% [markdown]
# ## The frontier
#
# Equal memory does not mean equal reads. A step needs only one bound per channel, `hi` or `lo`, but it needs every bit
# of a sketch. So with sketches it reads over twice as much before anything is selected. Is that worth it? The same
# bytes could go into more blocks, or into bounds of smaller blocks. So we vary $p$ and measure the loss of the whole
# decoding. The [cost model](10_roofline.md) counts the bytes: all that a layer reads per token, rectification included,
# relative to dense decoding.

# %%
settings = [("pooled", 0.05), ("pooled", 0.2), ("half-blocks", 0.1), ("sketch-1", 0.1)]
settings += [("sketch-2", 0.05), ("sketch-2", 0.1)]
for score, ratio in settings:
    losses[score, ratio] = loss(SCORERS[score], ratio)


def bytes_read(score, ratio):
    """Bytes that a layer reads per token, as a share of dense decoding's (eq. 6)."""
    own = replace(config, active_ratio=ratio)
    if score.startswith("sketch"):
        own = replace(own, selection="sketch", sketch_bits=int(score[-1]))
    return read_ratio(own, bounds=1.0 if score == "half-blocks" else 0.5, head_dim=D)


labels = {"pooled": "bounds", "half-blocks": "bounds of 8 tokens", "sketch-1": "sketch, 1 bit"}
labels |= {"sketch-2": "sketch, 2 bits"}
points = {key: (bytes_read(*key), kl) for key, kl in losses.items() if key[0] in labels}  # (bytes, loss)
print("blocks chosen by         p   bytes read      KL")
for (score, ratio), (share_read, kl) in sorted(points.items()):
    print(f"{labels[score]:20} {ratio:5}   {share_read:10.3f}   {kl:.3f}")
print(f"{'the true mass':20}   0.1     (all keys)   {losses['mass', 0.1]:.3f}")

for key, (share_read, kl) in points.items():
    is_beaten = any(x <= share_read and y <= kl for other, (x, y) in points.items() if other != key)
    assert not (key[0] == "sketch-2" and is_beaten)
assert losses["sketch-2", 0.1] < 0.8 * losses["pooled", 0.1]
assert 1.2 < bytes_read("sketch-2", 0.1) / bytes_read("pooled", 0.1) < 1.3, "a quarter more"
assert bytes_read("sketch-2", 0.05) < bytes_read("pooled", 0.1)
if name == "smollm2":
    assert losses["sketch-2", 0.1] < 0.15 * losses["pooled", 0.1]
    assert losses["sketch-2", 0.05] < losses["pooled", 0.1], "fewer bytes and less loss"
    assert losses["sketch-1", 0.1] < 0.6 * losses["pooled", 0.1], "at the same mass"

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 3))
for (score, label), mark in zip(labels.items(), ("o-", "^", "v", "s-"), strict=True):
    line = sorted(point for (way, _), point in points.items() if way == score)
    axes.plot(*zip(*line, strict=True), mark, color="C2" if "sketch" in score else "C1", label=label)
for (score, ratio), point in points.items():
    if score in ("pooled", "sketch-2"):
        axes.annotate(f"p = {ratio}", point, (5, 4), textcoords="offset points", fontsize=8)
axes.axhline(losses["mass", 0.1], color="0.5", linewidth=0.8)
axes.text(0.27, 0.92 * losses["mass", 0.1], "true mass, p = 0.1", color="0.4", fontsize=8, ha="right", va="top")
axes.set(xlabel="bytes read per token, of dense decoding", ylabel="KL from dense [nats]", yscale="log")
axes.set_ylim(0.6 * losses["mass", 0.1], None)
axes.set_yticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# *Figure: loss against bytes read. Single points have p = 0.1. The grey line is the loss of the choice by true mass at
# p = 0.1.*
#
# Points are better the further down and the further left they lie. The best ones form the *frontier*: no other point
# has both fewer bytes and less loss. Both points of the two-bit sketch are on it. At $p = 0.1$ the sketch reads a
# quarter more than bounds. In return it loses less, on SmolLM2 a tenth as much. There the sketch with $p = 0.05$ even
# beats bounds with $p = 0.1$: it reads fewer bytes and loses less.
#
# One bit covered no more mass than bounds on SmolLM2, and yet it loses half as much. So the mass that a step misses
# does not determine the loss alone. It also matters which tokens were missed.
#
# Read this with care. It is one text, 96 decoded tokens, and a cache of 70 blocks. On other texts sketches win by more
# or by less. Bytes are not time either, because codes must be unpacked. [Evidence](../evidence.md) measures more and
# longer documents, with intervals, and compares losses with times too.
#
# ## The answer
#
# Does it answer better? Here are twelve stories of 1,024 tokens, each with a secret number in it, from [earlier
# measurements](../results/evidence). An answer counts as right if each of its tokens is the likeliest one.

# %%
for label, file in (("bounds", "retrieval_1024"), ("sketches", "retrieval_sketch_1024")):
    result = recorded(f"evidence/{file}.json")
    (row,) = (
        row
        for row in result["rows"]
        if (row["family"], row["start"], row["way"]) == ("single", "question", "ReSA f=32")
    )
    low, high = row["right_95"]
    print(f"by {label}: {row['right']:.0%} right [{low:.0%}, {high:.0%}], dense decoding {row['dense']:.0%}")
    assert row["dense"] == 1
    assert row["right"] == 1 if label == "sketches" else row["right"] < 0.2

# %% [markdown]
# So this real model answers with a tenth of its cache, if it reads the right tenth. [Evidence](../evidence.md) has
# harder questions too, some of which dense decoding does not answer either.
#
# ## Exercises
#
# ### 1. A scorer of your own
#
# Write a function from `Steps` to scores `[B, Hkv, S, M]`. Where does it land in the two tables? Here is an idea to
# start with. Keep the mean and the variance of each block's keys, channel by channel, in place of `lo` and `hi`. They
# take as much memory. If the logits of a block were normal with mean $\mu$ and variance $v$, the mean of their
# exponentials would be $e^{\mu + v/2}$.


# %% tags=["hide-cell"]
def by_moments(steps):
    """Mass that each block would have if its keys were normal in every channel."""
    # The mean of q · k over a block is q · mean, its variance (channels being independent) q² · variance.
    query = steps.query.unflatten(1, (steps.exact.shape[1], -1)) * D**-0.5  # [B, Hkv, G, S, D]
    streams = []
    for keys in (steps.exact, steps.decoded):
        blocks = keys.unflatten(2, (-1, steps.block_size))  # T is a multiple of b here
        mean, variance = blocks.mean(dim=3)[:, :, None], blocks.var(dim=3, unbiased=False)[:, :, None]
        streams.append(query @ mean.mT + query.square() @ variance.mT / 2)  # [B, Hkv, G, S, M]

    # A step finds exact keys before its window. Its own block is taken anyway.
    ends = (torch.arange(streams[0].shape[-1]) + 1) * steps.block_size
    logits = torch.where(ends <= steps.begins[:, None], *streams)
    logits = logits.masked_fill(ends > steps.at[:, None], float("-inf"))
    return logits.softmax(dim=-1).sum(dim=2)


def report(label, scorer, share_read):
    """Print a row of both tables; return the rank correlation, the mass covered and the loss."""
    (correlation, share), kl = covered(scorer), loss(scorer)
    print(f"{label}: rank correlation {correlation:.3f}, mass {share:.3f}, bytes {share_read:.3f}, KL {kl:.3f}")
    return correlation, share, kl


correlation, share, kl = report("mean and variance", by_moments, read_ratio(config, bounds=1.0))
assert correlation > found["bounds"][0]
assert (share < found["bounds"][1]) == (name == "smollm2")
assert share < found["2 bits"][1]
assert kl > losses["sketch-2", 0.1]

# The mass on the very first token, and how often its block is chosen.
group = model.config.n_head // model.config.n_kv_head
first = [SCORERS["mass"](replace(steps, block_size=1))[..., 0].mean() / group for steps in layers]
print(f"first token: mass {torch.stack(first).mean():.3f}; its block is chosen by", end="")
for label, scorer in (("bounds", SCORERS["pooled"]), ("mean and variance", by_moments)):
    times = torch.stack([chosen_by(scorer(steps))[..., 0].float().mean() for steps in layers]).mean()
    print(f" {label} in {times:.0%} of all cases", end="," if label == "bounds" else "\n")
# On SmolLM2 this ranks all blocks better than bounds do here, and still chooses far worse. A good rank correlation over
# all blocks says little about the top. SmolLM2 puts a third of its attention on the very first token. The key of that
# token is unlike its 15 neighbours, so their mean hides it, while bounds show it. The shipped model has no such token.
# There this scorer covers more than bounds, though less than the sketch.

# %% [markdown]
# ### 2. The largest channels of the query
#
# Few channels decide a logit. So score by exact keys, but only in the 16 channels in which the group's queries are
# largest. (The method SparQ chooses tokens in this way.) What does it read?


# %% tags=["hide-cell"]
def by_largest_channels(steps, n=16):
    """Attention mass by the n channels in which a group's queries are largest."""
    group = steps.query.unflatten(1, (steps.exact.shape[1], -1))  # [B, Hkv, G, S, D]
    strength = group.square().sum(dim=2)  # [B, Hkv, S, D]
    largest = strength.argsort(dim=-1, descending=True)[..., :n]
    mask = torch.zeros_like(strength).scatter(-1, largest, 1.0)
    return by_mass(replace(steps, query=(group * mask[:, :, None]).flatten(1, 2)), bits=None)


share_read = 16 / (2 * D) + config.active_ratio + 1 / 32  # 16 channels of every key, the blocks, the rectification
_, share, kl = report("16 channels", by_largest_channels, share_read)
assert share > found["bounds"][1]
assert kl < losses["pooled", 0.1]
assert share_read > bytes_read("sketch-2", 0.1)
# It chooses better than bounds, but it reads more than a sketch: 16 of 64 channels of all keys are an eighth of the
# cache. It needs no memory of its own. But keys must be stored channel by channel, so that 16 channels can be read
# alone, and that makes it slower to read single tokens.

# %% [markdown]
# ### 3. Rotated bounds
#
# The rotation helps the sketch very much. Would it help the bounds as well? Predict, then look.

# %% tags=["hide-cell"]
rotated_bounds = covered(
    lambda steps: by_bounds(
        replace(steps, query=rotate(steps.query), exact=rotate(steps.exact), decoded=rotate(steps.decoded))
    )
)
print(f"mass covered: bounds {found['bounds'][1]:.3f}, of rotated keys {rotated_bounds[1]:.3f}")
assert rotated_bounds[1] < found["2 bits"][1]
assert name != "smollm2" or rotated_bounds[1] < found["bounds"][1] - 0.05
# Not on SmolLM2, where they become much worse. If one large channel decides, the bound is nearly exact, because one
# channel alone has no slack. After the rotation 64 channels of similar size decide, and each adds its slack. A sketch
# needs outliers spread out. Bounds need them in one place.

# %% [markdown]
# [The algorithm](../algorithm.md#selection-by-key-sketches-this-projects-own) defines key sketches in full, and
# [sketch.py](../../reference/sketch.py) is the code.
#
# **Next:** [how to read a tenth of the cache fast](06_kernel_ladder.md). If you want no kernels, go on with
# [the roofline](10_roofline.md).
