# %% [markdown]
# # 4. Rectification
#
# **What you will learn:** how a single dense pass puts a drifted cache right, why the result is *exact* and not merely
# better, and how decoding with [rectification](../glossary.md#rectification) is put together: the whole loop in thirty
# lines. You will choose the [interval](../glossary.md#interval), see its price, and see what rectification cannot
# repair.
#
# **Time:** twenty minutes to read, less than half a minute to run. It builds on [drift](03_drift.md).

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import resa.reference
from resa.reference import ReSAConfig, generate, load_model, load_tokenizer, prefill, rectify, sparse_step
from resa.reference.demo import demo_prompt
from resa.reference.evals.fidelity import kv_drift, read_ratio

plt.style.use("resa.reference.assets.figure")
torch.set_num_threads(1)

model, tokenizer = load_model(), load_tokenizer()
subject, text = demo_prompt()  # a library module that the model has never seen
tokens = tokenizer.encode_ordinary(text)
n_prompt, n_steps = 1024, 128
prompt, continuation = tokens[:n_prompt], tokens[n_prompt : n_prompt + n_steps]
config = ReSAConfig(active_ratio=0.1, min_blocks=4)  # 16 blocks, the default minimum, would be nearly a quarter here

exact = model.new_cache(batch=1, capacity=n_prompt + n_steps, block_size=config.block_size)
prefill(model, [prompt + continuation], exact)
opened = model.new_cache(batch=1, capacity=n_prompt + n_steps, block_size=config.block_size)
prefill(model, [prompt], opened)


def drift(cache, positions):
    """Largest relative error of each token's keys and values over layers and KV heads: [n]."""
    return kv_drift(cache, exact, positions[None])[0]


# %% [markdown]
# ## One window
#
# Take 32 sparse steps, as in the last tutorial. The tokens that were written by sparse steps since the cache was last
# exact are called the [window](../glossary.md#window); their number is $w$. Then `rectify`: it runs the window's
# tokens through the model once more, all of them at once and densely, and overwrites their keys and values in every
# layer.

# %%
n_window = 32
window_tokens, window_at = continuation[:n_window], torch.arange(n_prompt, n_prompt + n_window)
cache = opened.resized(opened.capacity)  # a copy
for token in window_tokens:
    sparse_step(model, torch.tensor([token]), cache, config)


def key_errors(cache):
    """Largest relative error of the window's keys, per layer: [layer]."""
    ours, wanted = cache.keys[:, 0, :, window_at], exact.keys[:, 0, :, window_at]  # [layer, Hkv, n, D]
    return ((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)).amax(dim=(1, 2))


drifted = cache.resized(cache.capacity)  # a copy, for later
before = key_errors(cache)
rectify(model, [window_tokens], cache, window=torch.tensor([n_window]))
after = key_errors(cache)

print("layer   error before   after rectification")
for layer, (wrong, right) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
    print(f"{layer:5}   {wrong:12.2g}   {right:19.2g}")
assert before[0] < 1e-5, "layer 0's keys depend on the token alone"
assert before[1:].min() > 1e-3
assert after.max() < 1e-4

# %% [markdown]
# ## Why it is exact
#
# What is left, if anything, is rounding. Rectification does not *reduce* the error, it *replaces* the keys and values,
# and the new ones do not depend on the old ones. To see that, let us destroy the window: before rectifying, fill its
# keys and values with NaN in all layers.

# %%
destroyed = drifted.resized(drifted.capacity)
destroyed.keys[:, :, :, window_at] = float("nan")
destroyed.values[:, :, :, window_at] = float("nan")
rectify(model, [window_tokens], destroyed, window=torch.tensor([n_window]))
assert torch.equal(destroyed.keys[:, :, :, : n_prompt + n_window], cache.keys[:, :, :, : n_prompt + n_window])
assert torch.equal(destroyed.values[:, :, :, : n_prompt + n_window], cache.values[:, :, :, : n_prompt + n_window])
print("a window of NaN is rectified to the same keys and values, bit for bit")

# %% [markdown]
# So all that rectification reads is
#
# 1. the *ids* of the window's tokens, which are integers and cannot drift, and
# 2. the cache *before* the window.
#
# If 2 is exact, the pass computes what a dense prefill of the same text computes: in layer 0 the window's keys and
# values follow from the ids. They are written first, then the window's tokens attend, densely, to the cache before the
# window and to the window itself, both exact. So what flows on to layer 1 is exact, so are its keys and values, and so
# on to the last layer. A rectification is nothing else than one more chunk of a chunked prefill; it only comes late.
# (A prefill may be cut anywhere: attention is causal, so a token sees the same keys and values whether they were
# computed in the same pass or before. The sixteen steps of tutorial 1 were chunks of one token.)
#
# And 2 *is* exact, by induction over windows. At the beginning the cache holds the prompt, taken in densely: exact. If
# the cache is exact up to a window, rectifying the window makes it exact up to the window's end, which is where the
# next window begins. Each rectification hands an exact cache to the next. That is law 6 of the specification: *right
# after a rectification, the cache of every layer equals the cache that dense prefill of the same tokens gives.*
#
# It holds in exact arithmetic. So we test it in float64, where rounding is tiny, over several windows in a row:

# %%
model64 = load_model(dtype=torch.float64)
exact64 = model64.new_cache(1, 256 + 24, config.block_size)
prefill(model64, [tokens[: 256 + 24]], exact64)
cache64 = model64.new_cache(1, 256 + 24, config.block_size)
prefill(model64, [tokens[:256]], cache64)
sparse64 = ReSAConfig(active_ratio=0.1, min_blocks=2)
for start in range(256, 256 + 24, 8):
    for token in tokens[start : start + 8]:
        sparse_step(model64, torch.tensor([token]), cache64, sparse64)
    at = torch.arange(256, start + 8)[None]
    wrong = float(kv_drift(cache64, exact64, at).max())
    rectify(model64, [tokens[start : start + 8]], cache64, window=torch.tensor([8]))
    right = float(kv_drift(cache64, exact64, at).max())
    print(f"{start + 8 - 256:2} tokens generated: drift {wrong:.2f}, after rectification {right:.0e}")
    assert wrong > 1e-2
    assert right < 1e-9, "law 6"

# %% [markdown]
# ## The loop
#
# Now the whole decoder. At every moment there is one [pending token](../glossary.md#pending-token), which has
# been chosen and is not yet in the cache. Feeding it by a sparse step gives the logits for the next one. This is
# Algorithm 1 of the paper, which this project calls the [paper schedule](../glossary.md#paper-schedule):


# %%
def decode_by_hand(model, opened, logits, n_tokens, config, given=None, watch=None):
    """Decode n_tokens greedily, or along the tokens `given`, from a prefilled cache and the logits after it.

    Returns the tokens, the cache and w. `watch(logits, cache, w)` is called after every step.
    """
    cache, chosen, w = opened.resized(opened.capacity), [], 0  # the cache is a copy
    while True:
        pending = int(logits[0].argmax()) if given is None else given[len(chosen)]
        chosen.append(pending)
        if len(chosen) == n_tokens:
            return chosen, cache, w  # the last token is never fed
        logits = sparse_step(model, torch.tensor([pending]), cache, config)
        w += 1
        if w == config.interval:  # the window is full
            rectify(model, [chosen[-w:]], cache, window=torch.tensor([w]))  # its logits are not needed
            w = 0
        if watch is not None:
            watch(logits, cache, w)


# %% [markdown]
# It does what `generate` does, bit for bit:

# %%
paper = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=16, schedule="paper")
n_new = 40
prefilled = model.new_cache(1, n_prompt + n_new - 1, config.block_size)
logits = prefill(model, [prompt], prefilled)
chosen, cache, w = decode_by_hand(model, prefilled, logits, n_new, paper)

generation = generate(model, [prompt], n_new, paper)
assert generation.tokens[0] == chosen
assert torch.equal(generation.cache.keys, cache.keys)
assert torch.equal(generation.cache.values, cache.values)
assert int(generation.window[0]) == w == (n_new - 1) % 16
print(tokenizer.decode(chosen))
print(f"\n{n_new} tokens generated, {n_new - 1} of them fed; {w} since the last rectification")

# %% [markdown]
# ## The saw-tooth
#
# Watch the drift while decoding goes on. So that all caches can be compared with one exact cache, every decoder is led
# along the file's true text. After each step we take the mean drift of all generated tokens in the cache; each time we
# also check the laws: right after a rectification everything is exact (law 6), and in between only the newest $w$
# tokens are wrong, however long the generation (law 7).

# %%
intervals = [None, 64, 32, 8]  # None: never
curves = {}
for interval in intervals:
    mean_drift = []

    def watch(logits, cache, w, mean_drift=mean_drift):
        length = int(cache.lengths[0])
        found = drift(cache, torch.arange(n_prompt, length))
        old, newest = found[: len(found) - w], found[len(found) - w :]
        assert (old < 1e-3).all(), "laws 6 and 7: but for the newest w tokens, the cache is exact"
        assert (newest > 1e-3).all(), "a sparse step leaves an error"
        mean_drift.append(float(found.mean()))

    way = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=interval, schedule="paper")
    decode_by_hand(model, opened, None, n_steps, way, given=continuation, watch=watch)
    curves[interval] = mean_drift

figure, axes = plt.subplots(figsize=(7, 3))
for interval, curve in curves.items():
    label = "never rectified" if interval is None else f"rectified every {interval} tokens"
    axes.plot(range(1, n_steps), curve, label=label, linewidth=1.2)
axes.set(xlabel="tokens generated", ylabel="mean drift of the generated tokens", xlim=(0, n_steps), ylim=(0, 0.6))
axes.legend(ncols=2, loc="upper right")
plt.show()

for interval, curve in curves.items():
    print(f"f = {interval}: mean drift {sum(curve) / len(curve):.3f}, at the end {curve[-1]:.3f}")

# %% [markdown]
# *Figure: mean drift of all generated tokens in the cache, after each step. At every rectification it falls to zero.
# The teeth become flatter on the way, because the same number of wrong tokens is shared among more and more exact
# ones.*
#
# Compare with `make demo`, which draws this picture for a longer text.
#
# ## Choosing the interval
#
# The interval $f$ is one argument of `ReSAConfig`. A small one keeps fewer wrong tokens in the cache, and costs more,
# because each rectification reads the whole cache once, for $f$ tokens. Per token and relative to dense decoding, the
# schedule above reads
#
# $$\underbrace{1/b}_{\mathrm{bounds}} + \underbrace{p}_{\mathrm{blocks}} + \underbrace{1/f}_{\mathrm{rectification}}$$

# %%
for interval in (None, 128, 64, 32, 16, 8, 4, 1):
    share = read_ratio(ReSAConfig(interval=interval, schedule="paper"))
    print(f"f = {interval!s:>4}: {share:.3f} of dense decoding's cache bytes")

# %% [markdown]
# At $f = 32$, the default, rectification costs half of what the bounds cost. From $f = 8$ down it is the largest part,
# and at $f = 1$ it alone costs what dense decoding costs: that is decode-only, a yardstick and not a way to be fast.
#
# ## The fused schedule
#
# In the paper's schedule the dense pass ends in logits, and these are thrown away. The
# [fused schedule](../glossary.md#fused-schedule), this project's default, uses them: after $f - 1$ sparse steps, one
# dense pass takes in those $f - 1$ tokens *and the pending one*. It rectifies the window and is itself the step that
# predicts the next token, with dense quality. One sparse step fewer per cycle, nothing thrown away.


# %%
def decode_fused(model, opened, logits, n_tokens, config):
    """The same loop, fused. Returns the tokens and the cache, and a letter per pass: s sparse, D dense."""
    cache, chosen, w, passes = opened.resized(opened.capacity), [], 0, ""
    while True:
        chosen.append(int(logits[0].argmax()))
        if len(chosen) == n_tokens:
            return chosen, cache, passes
        if w + 1 == config.interval:
            logits = rectify(model, [chosen[-(w + 1) :]], cache, window=torch.tensor([w]))  # w tokens, and one more
            w, passes = 0, passes + "D"
        else:
            logits = sparse_step(model, torch.tensor(chosen[-1:]), cache, config)
            w, passes = w + 1, passes + "s"


own_schedule = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=16, schedule="fused")
chosen, cache, passes = decode_fused(model, prefilled, logits, n_new, own_schedule)
fused = generate(model, [prompt], n_new, own_schedule)
assert fused.tokens[0] == chosen
assert torch.equal(fused.cache.keys, cache.keys)
print("fused:", passes)
print("paper:", ("s" * 16 + "D") * 2 + "s" * 7)

# %% [markdown]
# Both schedules are exact after each D, and in both $w = (N - 1) \bmod f$ after $N$ generated tokens.
#
# ## What is repaired, and what is not
#
# A sparse step loses twice. *Drift* is what its predecessors left in the cache. Rectification wipes that out, except
# for the newest tokens, fewer than $f$, that still wait for it. *Step error* is what the step itself does not read.
# Rectification comes after the step and cannot touch it: even over an exact cache, a step that attends to a tenth of
# the blocks predicts with a tenth of the blocks. What decode-only loses is the floor of the paper's schedule; of the
# fused one's predictions, one in $f$ is dense and has no step error.
#
# Nor does rectification take a token back. What a sparse step chose stays in the text, and the cache becomes exact *for
# that text*: equal to dense prefill of the tokens that were written, which may be others than dense decoding would have
# written. (Checking the choices too is self-speculation, `generate(…, speculate=True)`, and costs more.)
#
# How much of the loss is which depends on the model and the text. The next cell reads measurements of two of the
# project's models, with 95 % intervals, from its files.

# %%
results = Path(resa.reference.__file__).parents[1] / "docs" / "results"
code = json.loads((results / "fidelity.json").read_text())
values = json.loads((results / "evidence" / "carried.json").read_text())

names = ["sparse", "ReSA f=128", "ReSA f=32", "ReSA f=8", "decode-only"]
rows = [code["variants"][name] for name in names]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.8))
step_error = rows[-1]["kl"]
left.barh(names, [step_error] * len(names), color="0.75", label="step error")
left.barh(names, [row["drift_kl"] for row in rows], left=step_error, color="C1", label="drift")
left.set(xlabel="KL from dense per token [nats]", title="source code")

ways = {"sparse": "never", "ReSA f=32": 32, "decode-only": "decode-only"}
found = {row["interval"]: row for row in values["rows"] if row["ratio"] == 0.1}
step_error = found["decode-only"]["step_error"]
right.barh(list(ways), [100 * step_error] * len(ways), color="0.75", label="step error")
right.barh(
    list(ways), [100 * found[way]["drift"] for way in ways.values()], left=100 * step_error, color="C1", label="drift"
)
right.set(xlabel="values lost against dense decoding [%]", title="values to carry", xlim=(0, 14))
for axes in (left, right):
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.grid(False, axis="y")
right.legend(loc="lower right")
plt.show()

for name, row in zip(names, rows, strict=True):
    print(f"{name:12} KL {row['kl']:.4f}, of it drift {row['drift_kl']:.4f}", end=" ")
    print("[{:.4f}, {:.4f}]".format(*row["drift_kl_95"]))
for name, way in ways.items():
    print(f"{name:12} {found[way]['right']:.1%} of the values right")
recovered, (low, high) = found[32]["recovered"], found[32]["recovered_95"]
print(f"of the values lost to drift, f = 32 wins back {recovered:.0%} [{low:.0%}, {high:.0%}]")
assert step_error > 0, "no interval wins this back"
assert low > 0.5

# %% [markdown]
# *Figure: loss against dense decoding, from the files in `docs/results`. Left, the model of source code on held-out
# modules; right, the model that carries values, on programs that it has not seen. Rectification shortens the coloured
# part and leaves the grey one.*
#
# On source code nearly all of the loss is step error, so even a perfect cache gains little. Where values must be
# carried through what was decoded, drift is a large part, and rectifying every 32 tokens wins most of it back.
# [Evidence](../evidence.md) goes through intervals, ratios, block sizes and layers. How wrong a single step may be is
# the subject of [the next tutorial](05_certified_bound.md).
#
# ## In short
#
# - Each step reads a small part of the cache: the bounds of all blocks, and the blocks whose scores are highest.
# - What it writes is therefore a little wrong, and later steps read it: the cache drifts.
# - Every $f$ tokens, one dense pass computes the newest tokens' keys and values anew and overwrites them in every
#   layer.
# - It reads only token ids and a cache that is exact already, so the cache is exact afterwards, each time.
# - That repairs drift. It repairs neither step error nor tokens that were chosen already.
#
# ## Exercises
#
# ### 1. Change the interval
#
# Generate 50 tokens with an interval of 8 and the fused schedule. How many tokens will be waiting for rectification at
# the end? How many dense passes were there? Predict, then check.

# %% tags=["hide-cell"]
eight = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=8)
short = generate(model, [prompt], 50, eight)
print(f"waiting: {int(short.window[0])}")
assert int(short.window[0]) == (50 - 1) % 8 == 1
# 49 tokens are fed (the last one never is), 8 per cycle, the eighth by the dense pass: 6 dense passes, and 1 token
# over.

# %% [markdown]
# ### 2. `interval=1`
#
# What is decoding with `interval=1` in the fused schedule, and what in the paper's? Which of them gives the tokens of
# dense decoding for certain, and why does the other not?

# %% tags=["hide-cell"]
dense = generate(model, [prompt], 24, ReSAConfig(active_ratio=1.0))  # every block: dense, whatever the interval
fused_one = generate(model, [prompt], 24, ReSAConfig(active_ratio=0.1, min_blocks=4, interval=1, schedule="fused"))
paper_one = generate(model, [prompt], 24, ReSAConfig(active_ratio=0.1, min_blocks=4, interval=1, schedule="paper"))
assert fused_one.tokens == dense.tokens
at = torch.arange(n_prompt, n_prompt + 23)
own_exact = model.new_cache(1, n_prompt + 23, config.block_size)
prefill(model, [prompt + paper_one.tokens[0][:-1]], own_exact)
assert kv_drift(paper_one.cache, own_exact, at[None]).max() < 1e-3
print("the paper's schedule gives dense decoding's tokens:", paper_one.tokens == dense.tokens)
# Fused with f = 1 has no sparse step at all: the dense pass takes in the pending token and predicts. That is dense
# decoding. The paper's schedule predicts from the sparse step and repairs afterwards: decode-only. Its cache is exact
# for its own tokens, but every prediction has step error, so its tokens may differ.

# %% [markdown]
# ### 3. A lazy rectification
#
# Suppose that a rectification left the keys of one layer, say 5, as the sparse steps had written them. Which law
# breaks? Does the next rectification mend it? Which layers suffer?

# %% tags=["hide-cell"]
lazy = drifted.resized(drifted.capacity)
kept = lazy.keys[5, :, :, window_at].clone()
rectify(model, [window_tokens], lazy, window=torch.tensor([n_window]))
lazy.keys[5, :, :, window_at] = kept
for token in continuation[n_window : 2 * n_window]:
    sparse_step(model, torch.tensor([token]), lazy, config)
rectify(model, [continuation[n_window : 2 * n_window]], lazy, window=torch.tensor([n_window]))  # a proper one


def errors_of(cache, start, end):
    """Largest error of keys by layer for generated tokens start … end − 1: [layer]."""
    at = torch.arange(n_prompt + start, n_prompt + end)
    ours, wanted = cache.keys[:, 0, :, at], exact.keys[:, 0, :, at]
    return ((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)).amax(dim=(1, 2))


print("first window :", " ".join(f"{error:.0e}" for error in errors_of(lazy, 0, n_window).tolist()))
print("second window:", " ".join(f"{error:.0e}" for error in errors_of(lazy, n_window, 2 * n_window).tolist()))
assert errors_of(lazy, 0, n_window)[5] > 1e-3, "nobody comes back to the first window: law 7 is broken"
assert errors_of(lazy, n_window, 2 * n_window)[6:].min() > 1e-4, "law 6 is broken"
assert errors_of(lazy, n_window, 2 * n_window)[:6].max() < 1e-4, "layers up to 5 read nothing that was wrong"
# The second window attends to wrong keys in layer 5, so all layers above compute wrong keys, even in a dense pass. The
# induction needs *every* layer of *every* window.

# %% [markdown]
# ### 4. Only the newest window
#
# To save time, someone skips every second rectification and, when it comes, rectifies only the newest $f$ tokens
# instead of $2f$. Is the cache exact afterwards? What is the largest $w$ that one may pass to `rectify`?

# %% tags=["hide-cell"]
skipped = drifted.resized(drifted.capacity)
for token in continuation[n_window : 2 * n_window]:
    sparse_step(model, torch.tensor([token]), skipped, config)
both = skipped.resized(skipped.capacity)
rectify(
    model, [continuation[n_window : 2 * n_window]], skipped, window=torch.tensor([n_window])
)  # the newest half alone
rectify(
    model, [continuation[: 2 * n_window]], both, window=torch.tensor([2 * n_window])
)  # everything since the cache was exact
at = torch.arange(n_prompt, n_prompt + 2 * n_window)
half, whole = drift(skipped, at), drift(both, at)
print(f"newest half rectified: drift {half[:n_window].mean():.2f} and {half[n_window:].mean():.2f}")
print(f"all of it rectified: {whole.max():.0e}")
assert half[n_window:].min() > 1e-3, "a dense pass over a wrong cache is wrong"
assert whole.max() < 1e-3
# The pass must reach back to where the cache is exact. Any w up to the whole generation will do; a longer window costs
# arithmetic, and no more bytes.

# %% [markdown]
# **Next:** [how wrong one step can be](05_certified_bound.md).
