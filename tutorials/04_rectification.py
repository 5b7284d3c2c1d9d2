# %% [markdown]
# # 4. Rectification
#
# **What you will learn:** how a single dense pass makes a drifted cache exact again, and why the result is *exact* and
# not merely better. You will write the whole decoding loop with [rectification](../glossary.md#rectification) in thirty
# lines. You will choose the [interval](../glossary.md#interval), see its price, and see what rectification cannot
# repair.
#
# **Time:** twenty minutes to read, less than half a minute to run. It builds on [drift](03_drift.md).

# %%
import json
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from resa.reference import ReSAConfig, generate, load_model, load_tokenizer, prefill, rectify, sparse_step
from resa.reference.lab.corpus import example_module
from resa.reference.lab.fidelity import kv_drift, read_ratio

plt.style.use("resa.reference.weights.assets.figure")
torch.set_num_threads(1)

model, tokenizer = load_model(), load_tokenizer()
subject, text = example_module()  # a library module that the model has never seen
tokens = tokenizer.encode_ordinary(text)
n_prompt, n_steps = 1024, 128
prompt, continuation = tokens[:n_prompt], tokens[n_prompt : n_prompt + n_steps]
config = ReSAConfig(active_ratio=0.1, min_blocks=4)  # 16 blocks, the default minimum, would be nearly a quarter here

exact = model.new_cache(capacity=n_prompt + n_steps, block_size=config.block_size)
prefill(model, prompt + continuation, exact)
opened = model.new_cache(capacity=n_prompt + n_steps, block_size=config.block_size)
prefill(model, prompt, opened)


def drift(cache, positions):
    """Largest relative error of each token's keys and values over layers and KV heads: [n]."""
    return kv_drift(cache, exact, positions)


# %% [markdown]
# ## One window
#
# We take 32 sparse steps, as in the last tutorial. The tokens that sparse steps wrote since the cache was last exact
# are called the [window](../glossary.md#window). Their number is $w$, in code `n_drifted`. Then we call `rectify`. It
# runs the window's tokens through the model once more, densely and all at once, and overwrites their keys and values in
# every layer.

# %%
n_window = 32
window_tokens, window_at = continuation[:n_window], torch.arange(n_prompt, n_prompt + n_window)
cache = deepcopy(opened)
for token in window_tokens:
    sparse_step(model, token, cache, config)


def key_errors(cache):
    """Largest relative error of the window's keys, per layer: [layer]."""
    ours, wanted = cache.keys[:, 0, :, window_at], exact.keys[:, 0, :, window_at]  # [layer, Hkv, n, D]
    return ((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)).amax(dim=(1, 2))


drifted = deepcopy(cache)  # for later
before = key_errors(cache)
rectify(model, window_tokens, cache, n_drifted=n_window)
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
# Only rounding is left. Rectification does not *reduce* the error. It *replaces* the keys and values, and the new ones
# do not depend on the old ones. To see this, we destroy the window: before rectifying, we fill its keys and values with
# NaN in all layers.

# %%
destroyed = deepcopy(drifted)
destroyed.keys[:, :, :, window_at] = float("nan")
destroyed.values[:, :, :, window_at] = float("nan")
rectify(model, window_tokens, destroyed, n_drifted=n_window)
assert torch.equal(destroyed.keys[:, :, :, : n_prompt + n_window], cache.keys[:, :, :, : n_prompt + n_window])
assert torch.equal(destroyed.values[:, :, :, : n_prompt + n_window], cache.values[:, :, :, : n_prompt + n_window])
print("a window of NaN is rectified to the same keys and values, bit for bit")

# %% [markdown]
# So rectification reads only two things:
#
# 1. the *ids* of the window's tokens, which are integers and cannot drift, and
# 2. the cache *before* the window.
#
# If 2 is exact, the pass computes the same as a dense prefill of the same text. In layer 0 the window's keys and values
# follow from the ids. The pass writes them first. Then the window's tokens attend, densely, to the cache before the
# window and to the window itself. Both are exact, so the input of layer 1 is exact. Then its keys and values are exact
# too, and so on to the last layer. A rectification is just one more chunk of a chunked prefill. It only comes late.
# (A prefill may be cut anywhere. Attention is causal, so a token sees the same keys and values, whether the same pass
# computed them or an earlier one. The sixteen steps of tutorial 1 were chunks of one token.)
#
# And 2 *is* exact, by induction over windows. At the beginning the cache holds the prompt, which was read densely, so
# it is exact. If the cache is exact up to a window, then rectifying the window makes it exact up to the window's end.
# The next window begins there. So each rectification hands an exact cache to the next. That is law 6 of the
# specification: *right after a rectification, the cache of every layer equals the cache that dense prefill of the same
# tokens gives.*
#
# The law holds in exact arithmetic. So we test it in float64, where rounding is tiny, over several windows in a row:

# %%
model64 = load_model(dtype=torch.float64)
exact64 = model64.new_cache(256 + 24, config.block_size)
prefill(model64, tokens[: 256 + 24], exact64)
cache64 = model64.new_cache(256 + 24, config.block_size)
prefill(model64, tokens[:256], cache64)
sparse64 = ReSAConfig(active_ratio=0.1, min_blocks=2)
for start in range(256, 256 + 24, 8):
    for token in tokens[start : start + 8]:
        sparse_step(model64, token, cache64, sparse64)
    at = torch.arange(256, start + 8)
    wrong = float(kv_drift(cache64, exact64, at).max())
    rectify(model64, tokens[start : start + 8], cache64, n_drifted=8)
    right = float(kv_drift(cache64, exact64, at).max())
    print(f"{start + 8 - 256:2} tokens generated: drift {wrong:.2f}, after rectification {right:.0e}")
    assert wrong > 1e-2
    assert right < 1e-9, "law 6"

# %% [markdown]
# ## The loop
#
# Now we write the whole decoder. At every moment there is one [pending token](../glossary.md#pending-token). It has
# been chosen and is not yet in the cache. A sparse step feeds it and gives the logits for the next token.
# `is_pass_due(w)` of the configuration says when a dense pass comes next, here once $w = f$. This loop is Algorithm 1
# of the paper. This project calls it the [paper schedule](../glossary.md#paper-schedule):


# %%
def decode_by_hand(model, opened, logits, n_tokens, config, given=None, watch=None):
    """Decode n_tokens greedily, or along the tokens `given`, from a prefilled cache and the logits after it.

    Returns the tokens, the cache and w. `watch(logits, cache, w)` is called after every step.
    """
    cache, chosen, w = deepcopy(opened), [], 0
    while True:
        pending = int(logits.argmax()) if given is None else given[len(chosen)]
        chosen.append(pending)
        if len(chosen) == n_tokens:
            return chosen, cache, w  # the last token is never fed
        logits = sparse_step(model, pending, cache, config)
        w += 1
        if config.is_pass_due(w):  # the window is full
            rectify(model, chosen[-w:], cache, n_drifted=w)  # its logits are not needed
            w = 0
        if watch is not None:
            watch(logits, cache, w)


# %% [markdown]
# The result equals that of `generate`, bit for bit:

# %%
paper = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=16, schedule="paper")
n_new = 40
prefilled = model.new_cache(n_prompt + n_new - 1, config.block_size)
logits = prefill(model, prompt, prefilled)
chosen, cache, w = decode_by_hand(model, prefilled, logits, n_new, paper)

[generation] = generate(model, [prompt], n_new, paper)
assert generation.tokens == chosen
assert torch.equal(generation.cache.keys, cache.keys)
assert torch.equal(generation.cache.values, cache.values)
assert generation.n_drifted == w == (n_new - 1) % 16
print(tokenizer.decode(chosen))
print(f"\n{n_new} tokens generated, {n_new - 1} of them fed; {w} since the last rectification")

# %% [markdown]
# ## The saw-tooth
#
# Now we watch the drift while decoding goes on. We lead every decoder along the file's true text, so that we can
# compare all caches with one exact cache. After each step we take the mean drift of all generated tokens in the cache.
# We also check two laws each time. Right after a rectification everything is exact (law 6). In between, only the newest
# $w$ tokens are wrong, however long the generation (law 7).

# %%
intervals = [None, 64, 32, 8]  # None: never
curves = {}
for interval in intervals:
    mean_drift = []

    def watch(logits, cache, w, mean_drift=mean_drift):
        found = drift(cache, torch.arange(n_prompt, cache.length))
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
# The teeth become flatter on the way, because the cache holds ever more exact tokens beside the same number of wrong
# ones.*
#
# `make demo` draws the same picture for a longer text.
#
# ## Choosing the interval
#
# The interval $f$ is one argument of `ReSAConfig`. A small interval keeps fewer wrong tokens in the cache. It also
# costs more, because each rectification reads the whole cache once for $f$ tokens. Per token and relative to dense
# decoding, the schedule above reads
#
# $$\underbrace{1/b}_{\mathrm{bounds}} + \underbrace{p}_{\mathrm{blocks}} + \underbrace{1/f}_{\mathrm{rectification}}$$

# %%
for interval in (None, 128, 64, 32, 16, 8, 4, 1):
    share = read_ratio(ReSAConfig(interval=interval, schedule="paper"))
    print(f"f = {interval!s:>4}: {share:.3f} of dense decoding's cache bytes")

# %% [markdown]
# At the default of $f = 32$, rectification costs half as much as the bounds. From $f = 8$ down it is the largest part.
# At $f = 1$ it alone costs as much as dense decoding. That is decode-only, a yardstick and not a way to be fast.
#
# ## The fused schedule
#
# In the paper's schedule the dense pass ends in logits, and the loop throws them away. The
# [fused schedule](../glossary.md#fused-schedule), this project's default, uses them. After $f - 1$ sparse steps, one
# dense pass reads those $f - 1$ tokens *and the pending one*. It rectifies the window and also predicts the next token,
# with dense quality. So each cycle has one sparse step fewer, and nothing is thrown away. Here a pass is due once
# $w = f - 1$, and it takes the place of the step.


# %%
def decode_fused(model, opened, logits, n_tokens, config):
    """Decode greedily, schedule "fused". Returns the tokens, the cache, and a letter per pass: s sparse, D dense."""
    cache, chosen, w, passes = deepcopy(opened), [], 0, ""
    while True:
        chosen.append(int(logits.argmax()))
        if len(chosen) == n_tokens:
            return chosen, cache, passes
        if config.is_pass_due(w):
            logits = rectify(model, chosen[-(w + 1) :], cache, n_drifted=w)  # w tokens, and one more
            w, passes = 0, passes + "D"
        else:
            logits = sparse_step(model, chosen[-1], cache, config)
            w, passes = w + 1, passes + "s"


own_schedule = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=16, schedule="fused")
chosen, cache, passes = decode_fused(model, prefilled, logits, n_new, own_schedule)
[fused] = generate(model, [prompt], n_new, own_schedule)
assert fused.tokens == chosen
assert torch.equal(fused.cache.keys, cache.keys)
print("fused:", passes)
print("paper:", ("s" * 16 + "D") * 2 + "s" * 7)

# %% [markdown]
# Both schedules are exact after each D. In both, $w = (N - 1) \bmod f$ after $N$ generated tokens.
#
# ## What is repaired, and what is not
#
# A sparse step loses twice. *Drift* is the error that earlier steps left in the cache. Rectification removes it, except
# in the newest tokens, fewer than $f$, that still wait for it. *Step error* comes from the blocks that the step itself
# does not read. Rectification comes after the step and cannot change it: even over an exact cache, a step that attends
# to a tenth of the blocks predicts from a tenth of the blocks. The loss of decode-only is the floor of the paper's
# schedule. In the fused schedule one prediction in $f$ is dense and has no step error.
#
# Rectification also takes no token back. A token that a sparse step chose stays in the text, and the cache becomes
# exact *for that text*. It equals dense prefill of the tokens that were written, and dense decoding might have written
# others. (Self-speculation checks the choices too, and costs more: `speculate`.)
#
# The shares of the two depend on the model and the text. The next cell reads measurements of two of the project's
# models from its files, with 95 % intervals.

# %%
folder = Path(globals().get("__file__", "here")).resolve().parent  # of this script, or where a notebook runs
results = next(each / "docs" / "results" for each in [folder, *folder.parents] if (each / "docs" / "results").is_dir())
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
# *Figure: loss against dense decoding, from the files in `docs/results`. Left: the model of source code on held-out
# modules. Right: the model that carries values, on programs that it has not seen. Rectification shortens the coloured
# part and leaves the grey one.*
#
# On source code nearly all of the loss is step error, so even a perfect cache gains little. Where the model must carry
# values through decoded text, drift is a large part, and rectifying every 32 tokens wins most of it back.
# [Evidence](../evidence.md) goes through intervals, ratios, block sizes and layers. [The next
# tutorial](05_certified_bound.md) shows how wrong a single step may be.
#
# ## In short
#
# - Each step reads a small part of the cache: the bounds of all blocks, and the blocks of highest score.
# - So its keys and values are a little wrong, and later steps read them. The cache drifts.
# - Every $f$ tokens, one dense pass computes the newest tokens' keys and values anew and overwrites them in every
#   layer.
# - The pass reads only token ids and a cache that is exact already. So the cache is exact afterwards, each time.
# - That repairs drift. It does not repair step error, and it does not change tokens that were chosen already.
#
# ## Exercises
#
# ### 1. Change the interval
#
# Generate 50 tokens with an interval of 8 and the fused schedule. How many tokens wait for rectification at the end?
# How many dense passes were there? Predict, then check.

# %% tags=["hide-cell"]
eight = ReSAConfig(active_ratio=0.1, min_blocks=4, interval=8)
[short] = generate(model, [prompt], 50, eight)
print(f"waiting: {short.n_drifted}")
assert short.n_drifted == (50 - 1) % 8 == 1
# The decoder feeds 49 tokens, because the last one is never fed. A cycle has 8, and the dense pass feeds the eighth. So
# there are 6 dense passes, and 1 token waits.

# %% [markdown]
# ### 2. `interval=1`
#
# What does `interval=1` mean in the fused schedule, and what in the paper's? Which of them always gives the tokens of
# dense decoding? Why does the other not?

# %% tags=["hide-cell"]
[dense] = generate(model, [prompt], 24, ReSAConfig(active_ratio=1.0))  # every block: dense, for any interval
[fused_one] = generate(model, [prompt], 24, ReSAConfig(active_ratio=0.1, min_blocks=4, interval=1, schedule="fused"))
[paper_one] = generate(model, [prompt], 24, ReSAConfig(active_ratio=0.1, min_blocks=4, interval=1, schedule="paper"))
assert fused_one.tokens == dense.tokens
at = torch.arange(n_prompt, n_prompt + 23)
own_exact = model.new_cache(n_prompt + 23, config.block_size)
prefill(model, prompt + paper_one.tokens[:-1], own_exact)
assert kv_drift(paper_one.cache, own_exact, at).max() < 1e-3
print("the paper's schedule gives dense decoding's tokens:", paper_one.tokens == dense.tokens)
# Fused with f = 1 has no sparse step at all: the dense pass reads the pending token and predicts. That is dense
# decoding. The paper's schedule predicts from the sparse step and repairs afterwards. That is decode-only. Its cache is
# exact for its own tokens, but every prediction has step error, so its tokens may differ.

# %% [markdown]
# ### 3. A lazy rectification
#
# Suppose a rectification left the keys of one layer, say layer 5, as the sparse steps had written them. Which law
# breaks? Does the next rectification mend it? Which layers suffer?

# %% tags=["hide-cell"]
lazy = deepcopy(drifted)
kept = lazy.keys[5, :, :, window_at].clone()
rectify(model, window_tokens, lazy, n_drifted=n_window)
lazy.keys[5, :, :, window_at] = kept
for token in continuation[n_window : 2 * n_window]:
    sparse_step(model, token, lazy, config)
rectify(model, continuation[n_window : 2 * n_window], lazy, n_drifted=n_window)  # a proper one


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
# The second window attends to wrong keys in layer 5. So all layers above compute wrong keys, even in a dense pass. The
# induction needs *every* layer of *every* window.

# %% [markdown]
# ### 4. Only the newest window
#
# To save time, someone skips every second rectification. When one comes, it rectifies only the newest $f$ tokens
# instead of $2f$. Is the cache exact afterwards? What is the largest $w$ that `rectify` may get?

# %% tags=["hide-cell"]
skipped = deepcopy(drifted)
for token in continuation[n_window : 2 * n_window]:
    sparse_step(model, token, skipped, config)
both = deepcopy(skipped)
rectify(model, continuation[n_window : 2 * n_window], skipped, n_drifted=n_window)  # the newest half alone
rectify(model, continuation[: 2 * n_window], both, n_drifted=2 * n_window)  # everything since the cache was exact
at = torch.arange(n_prompt, n_prompt + 2 * n_window)
half, whole = drift(skipped, at), drift(both, at)
print(f"newest half rectified: drift {half[:n_window].mean():.2f} and {half[n_window:].mean():.2f}")
print(f"all of it rectified: {whole.max():.0e}")
assert half[n_window:].min() > 1e-3, "a dense pass over a wrong cache is wrong"
assert whole.max() < 1e-3
# The pass must reach back to where the cache is exact. Any w up to the whole generation is allowed. A longer window
# costs more arithmetic, but no more bytes.

# %% [markdown]
# **Next:** [how wrong one step can be](05_certified_bound.md).
