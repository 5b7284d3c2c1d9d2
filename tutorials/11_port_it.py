# %% [markdown]
# # 11. Port it
#
# This project has a test for code that it has never seen: the [conformance kit](../glossary.md#conformance-kit). It
# holds 96 cases with inputs and expected results, and more for what is optional, such as key sketches, which this port
# leaves out. Its command says *that* a port is wrong, and also which rule of the specification the port breaks. In this
# tutorial you start with an empty file and end with a whole port of rectified sparse decoding to NumPy: the five
# operations, the model, the decode loop. After every step the kit says what is still missing.
#
# **What you will learn:**
#
# - what a port must offer, and how the cases lead from one requirement to the next,
# - where the traps are: partial blocks, ties, 0 · ∞, exact products, the window of a rectification,
# - how to read a report, by making mistakes on purpose.
#
# **Time:** half an hour to read, half a minute to run. [Porting](../porting.md) is the full specification. Section
# numbers in reports refer to that page. This tutorial imports only the kit, and no finished implementation.

# %%
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np

from resa.conformance.kit import check_port, first_failures, is_passed
from resa.conformance.vectors import load_vectors

plt.style.use("resa.reference.weights.assets.figure")
OPERATIONS = ("block_bounds", "score_blocks", "select_blocks", "sparse_attention", "dense_attention", "decode_trace")

# %% [markdown]
# ## An empty file
#
# A port is a module. The next cell makes an empty one and runs the command on it:

# %%
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "my_port.py").write_text("")
    words = [sys.executable, "-m", "resa.reference", "conformance", "my_port.py"]
    plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # which notebooks set
    done = subprocess.run(words, cwd=folder, env=plain, capture_output=True, text=True)
lines = [line.rstrip() for line in done.stdout.splitlines()]
print(*lines[:4], "…", *lines[lines.index("block_bounds, one_block: 2 signatures") :], sep="\n")
print("exit status", done.returncode)
assert done.returncode == 1
assert "the port has no block_bounds" in done.stdout

# %% [markdown]
# A module has the names that its file defines. In this tutorial functions come one by one, and the module grows with
# them. `add` puts a function into it. Then it runs the cases of the kit, as the command does, and prints the first
# failure of every operation that the port has so far. Its second argument is the rule that should break first, or None.
# In this way the claims of this text are checked.

# %%
my_port, vectors, history = ModuleType("my_port"), load_vectors(), []


def add(function, first_wrong: str | None = None) -> None:
    """Put a function into the port, and check the port with it."""
    setattr(my_port, function.__name__, function)
    every = [row for row in check_port(my_port, vectors) if row.status != "not supported"]
    history.append([row.status == "pass" for row in every])
    rows = [row for row in every if hasattr(my_port, row.operation)]
    own = [row.status == "pass" for row in rows if row.operation == function.__name__]
    others = [row.status == "pass" for row in rows if row.operation != function.__name__]
    print(f"{function.__name__}: {sum(own)} of {len(own)} cases pass; of what was there {sum(others)} of {len(others)}")
    for row in first_failures(rows):
        print(f"\n{row.operation}, {row.case}: {row.law}\n  {row.says}")
    assert [row.law for row in first_failures(rows)] == ([first_wrong] if first_wrong else [])


print(Counter(entry["operation"] for entry in vectors.manifest["operations"]))
print(f"and {len(vectors.manifest['traces'])} whole generations")

# %% [markdown]
# ## 1 Block bounds
#
# The bounds are the smallest and the largest key of every [block](../glossary.md#block), per channel: keys
# `[B, Hkv, T_max, D]` → bounds `[B, Hkv, 2, D, M]`, 0 for `lo` and 1 for `hi`, with
# $M = \lceil T_\mathrm{max} / b \rceil$. Here is a first version that knows nothing of lengths:


# %%
def block_bounds(keys, lengths, block_size):
    batch, heads, capacity, channels = keys.shape
    blocks = keys.reshape(batch, heads, capacity // block_size, block_size, channels)
    return np.stack((blocks.min(axis=3), blocks.max(axis=3)), axis=2).swapaxes(3, 4)


add(block_bounds, "2.1 partial block")

# %% [markdown]
# The cases form a ladder: each asks for one thing more than those before it. The easy ones pass. The first failure says
# what is missing: only tokens before the length count. (A capacity that is not a multiple of the block size fails too,
# further down. One thing after the other.) Slots that do not count become the neutral elements of minimum and maximum,
# so a block without a token ends with `lo` = +∞, `hi` = −∞. We must *replace* these slots, because they may hold NaN,
# and no arithmetic removes a NaN.


# %%
def block_bounds(keys, lengths, block_size):
    """keys [B, Hkv, T_max, D] → [B, Hkv, 2, D, M]."""
    batch, heads, capacity, channels = keys.shape
    n_blocks = math.ceil(capacity / block_size)
    is_valid = np.arange(capacity) < np.asarray(lengths)[:, None]  # [B, T_max]
    bounds = []
    for neutral, extreme in ((math.inf, np.min), (-math.inf, np.max)):
        padded = np.full((batch, heads, n_blocks * block_size, channels), neutral, keys.dtype)
        padded[:, :, :capacity] = np.where(is_valid[:, None, :, None], keys, padded[:, :, :capacity])
        bounds.append(extreme(padded.reshape(batch, heads, n_blocks, block_size, channels), axis=3))
    return np.stack(bounds, axis=2).swapaxes(3, 4)  # [B, Hkv, 2, D, M]


add(block_bounds)

# %% [markdown]
# NumPy's minimum passes NaN on. So a NaN in a valid key reaches the bounds of its channel, as the specification
# demands. In other frameworks it may get lost. The case `nan_in_a_valid_key` would show it.
#
# ## 2 Block scores
#
# The pooled query of a [group](../glossary.md#group) is the mean of its G consecutive heads, and
# $\mathrm{score}_i = \sum_d \max(\bar q_d\, \mathrm{lo}_{d,i},\ \bar q_d\, \mathrm{hi}_{d,i})$:


# %%
def score_blocks(query, bounds, lengths, block_size):
    batch, heads, _, channels, n_blocks = bounds.shape
    pooled = query.astype(np.float64).reshape(batch, heads, -1, channels).mean(axis=2)[..., None]  # [B, Hkv, D, 1]
    scores = np.maximum(pooled * bounds[:, :, 0], pooled * bounds[:, :, 1]).sum(axis=2)
    is_past = np.arange(n_blocks) * block_size >= np.asarray(lengths)[:, None]  # [B, M]
    return np.where(is_past[:, None], -math.inf, scores)


add(score_blocks, "2.2 zero times infinity")

# %% [markdown]
# One more rule: 0 · ∞ is 0. If the query is zero in a channel, this channel says nothing, even if its bounds are
# infinite.


# %%
def score_blocks(query, bounds, lengths, block_size):
    """query [B, Hq, D], bounds [B, Hkv, 2, D, M] → [B, Hkv, M]."""
    batch, heads, _, channels, n_blocks = bounds.shape
    pooled = query.astype(np.float64).reshape(batch, heads, -1, channels).mean(axis=2)[:, :, None, :, None]
    with np.errstate(invalid="ignore"):
        products = np.where((pooled == 0) & np.isinf(bounds), 0.0, pooled * bounds)  # [B, Hkv, 2, D, M]
        scores = products.max(axis=2).sum(axis=2)  # [B, Hkv, M]
    is_past = np.arange(n_blocks) * block_size >= np.asarray(lengths)[:, None]
    return np.where(is_past[:, None], -math.inf, scores)


add(score_blocks)

# %% [markdown]
# ## 3 Selection, and a mistake
#
# Selection takes $n = \min(M, \max(n_\mathrm{min}, \lceil p M - 10^{-9} \rceil))$ blocks: the newest `local_blocks`,
# then the highest scores. Of equal scores it takes the lower index. The result is ascending indices with −1 behind
# them. A reversed sort by score looks right:


# %%
def count_selected(n_blocks, config):
    """n of eq. 5. The 1e-9 is for 0.28 · 25, which floats make a little more than 7."""
    share = math.ceil(config["active_ratio"] * n_blocks - 1e-9)
    return min(n_blocks, max(config["min_blocks"], share))


def select_blocks(scores, lengths, config):
    totals = [math.ceil(length / config["block_size"]) for length in lengths]
    counts = [count_selected(total, config) for total in totals]
    indices = np.full((*scores.shape[:2], max(counts)), -1, np.int32)
    for s, (total, n) in enumerate(zip(totals, counts, strict=True)):
        oldest_local = max(0, total - config["local_blocks"])
        n_others = n - (total - oldest_local)
        for h, row in enumerate(scores[s]):
            best = np.argsort(row[:oldest_local], kind="stable")[::-1][:n_others]  # the highest first
            indices[s, h, :n] = np.sort(np.append(best, np.arange(oldest_local, total)))
    return indices


add(select_blocks, "2.3 ties")

# %% [markdown]
# Counts, order and padding pass, and the report names the one rule that fails: ties. The sort is stable, so equal
# scores stand in the order of their indices. Reversing the list reverses that order too, so of equal scores the
# *highest* index wins. Without a case for ties, nobody would notice this for long, because scores of real keys are
# rarely equal. But it happens: a block that repeats another has the same score, and a query that pools to zero gives
# every block the same score.
#
# The fix is to sort the negated scores. The same sort must put NaN after all numbers (NumPy's does), and it must treat
# −0.0 and 0.0 as equal (comparisons do).


# %%
def select_blocks(scores, lengths, config):
    """scores [B, Hkv, M] → [B, Hkv, N], ascending, −1 behind them."""
    totals = [math.ceil(length / config["block_size"]) for length in lengths]
    counts = [count_selected(total, config) for total in totals]
    indices = np.full((*scores.shape[:2], max(counts)), -1, np.int32)
    for s, (total, n) in enumerate(zip(totals, counts, strict=True)):
        oldest_local = max(0, total - config["local_blocks"])
        n_others = n - (total - oldest_local)
        for h, row in enumerate(scores[s]):
            best = np.argsort(-row[:oldest_local], kind="stable")[:n_others]
            indices[s, h, :n] = np.sort(np.append(best, np.arange(oldest_local, total)))
    return indices


add(select_blocks)

# %% [markdown]
# ## 4 Sparse attention
#
# Sparse attention is softmax attention with scale $D^{-1/2}$ over the valid tokens of the selected blocks. All G heads
# of a group share a list. On request it also returns the [log-sum-exp](../glossary.md#log-sum-exp) of the scaled
# logits. Both attentions need the same softmax over a few tokens, so we write that first. Without any token it gives
# zeros and −∞.


# %%
def softmax_attention(query, keys, values):
    """[R, D] over [n, D] → [R, D], and log-sum-exp [R]."""
    if len(keys) == 0:
        return np.zeros(query.shape), np.full(len(query), -math.inf)
    query, keys, values = (x.astype(np.float64) for x in (query, keys, values))
    logits = query @ keys.T * query.shape[1] ** -0.5  # [R, n]
    largest = logits.max(axis=1, keepdims=True)  # subtracted, so that no exponential overflows
    weights = np.exp(logits - largest)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ values / total, (largest + np.log(total))[:, 0]


def sparse_attention(query, keys, values, indices, lengths, block_size, *, return_lse=False):
    """query [B, Hq, D], indices [B, Hkv, N] → [B, Hq, D], log-sum-exp [B, Hq]."""
    batch, heads, channels = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, channels)  # [B, Hkv, G, D]
    out, lse = np.zeros(grouped.shape), np.zeros(grouped.shape[:3])
    for s in range(batch):
        for h in range(kv_heads):
            is_selected = np.isin(np.arange(keys.shape[2]) // block_size, indices[s, h])
            is_selected[lengths[s] :] = False
            seen = keys[s, h, is_selected], values[s, h, is_selected]
            out[s, h], lse[s, h] = softmax_attention(grouped[s, h], *seen)
    out, lse = out.reshape(query.shape), lse.reshape(batch, heads)
    return (out, lse) if return_lse else out


add(sparse_attention)

# %% [markdown]
# It passes at once, because it uses a mask over *positions* instead of a list of addresses. No position belongs to
# block −1, and an index past the end matches nothing. The code never touches a token that is not selected, so a NaN
# there does no harm (law 5). A fast port cannot afford to look at every position. There each of these points is a trap
# of its own ([traps](../porting.md#7-traps)).
#
# ## 5 Dense attention of a window
#
# Query $i$ of a window of $W$ stands at position $T - W + i$ and sees the keys up to its own. Rows at or past $W$, and
# rows that would stand before the beginning, are zeros and −∞. A plausible first version takes $W$ to be Q, the size of
# the array:


# %%
def dense_attention(query, keys, values, lengths, *, query_lengths=None, return_lse=False):
    batch, heads, n_queries, _ = query.shape
    group = heads // keys.shape[1]
    out, lse = np.zeros(query.shape), np.full(query.shape[:3], -math.inf)
    for s in range(batch):
        for h in range(heads):
            for i in range(n_queries):
                end = max(0, lengths[s] - n_queries + i + 1)
                row = softmax_attention(query[s, h, i : i + 1], keys[s, h // group, :end], values[s, h // group, :end])
                out[s, h, i], lse[s, h, i] = row[0][0], row[1][0]
    return (out, lse) if return_lse else out


add(dense_attention, "2.5 positions")

# %% [markdown]
# In a batch every sequence has a window of its own length, and the report says so. `query_lengths` holds these lengths:


# %%
def dense_attention(query, keys, values, lengths, *, query_lengths=None, return_lse=False):
    """query [B, Hq, Q, D] → [B, Hq, Q, D], log-sum-exp [B, Hq, Q]."""
    batch, heads, n_queries, _ = query.shape
    group = heads // keys.shape[1]
    windows = [n_queries] * batch if query_lengths is None else query_lengths
    out, lse = np.zeros(query.shape), np.full(query.shape[:3], -math.inf)
    for s, window in enumerate(windows):
        for h in range(heads):
            for i in range(window):
                end = max(0, lengths[s] - window + i + 1)
                row = softmax_attention(query[s, h, i : i + 1], keys[s, h // group, :end], values[s, h // group, :end])
                out[s, h, i], lse[s, h, i] = row[0][0], row[1][0]
    return (out, lse) if return_lse else out


add(dense_attention)
operations_only = check_port(my_port, vectors, ops_only=True)
assert is_passed(operations_only, ops_only=True)
print(f"all {sum(row.status == 'pass' for row in operations_only)} cases of the operations pass")

# %% [markdown]
# ## 6 The model
#
# The vectors hold four small models with weights, and 24 generations by them. The model is the usual one ([section
# 3](../porting.md#3-the-model)): RMSNorm, projections, optional norms of heads, RoPE, attention, SwiGLU. In a layer the
# order of three acts matters. First it *writes* its keys and values to the cache. Then it *rebuilds* the bounds of the
# touched blocks. Only then it *attends*. The attention is an argument, so that a dense pass and a sparse step share
# everything else.


# %%
def rms_norm(x, weight, eps):
    """Over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x, positions, theta):
    """Rotate [H, n, D]. Channel i of the first half goes with channel i of the second."""
    first, second = np.split(x, 2, axis=-1)
    angles = positions[:, None] * theta ** (-2 * np.arange(first.shape[-1]) / x.shape[-1])  # [n, D/2]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


class Sequence:
    """A model, and the cache of one sequence: keys and values [layer, Hkv, T_max, D], their bounds, T and w."""

    def __init__(self, weights, shape, config, capacity):
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self.shape, self.config, self.length, self.window = shape, config, 0, 0
        size = shape["n_layer"], shape["n_kv_head"], capacity, shape["head_dim"]
        self.keys, self.values = np.zeros(size), np.zeros(size)
        n_blocks = math.ceil(capacity / config["block_size"])
        self.bounds = np.zeros((*size[:2], 2, size[3], n_blocks))

    def write(self, layer, keys, values, start, end):
        """Store rows start … end − 1 of a layer and rebuild all bounds of the layer, which is more than needed."""
        self.keys[layer, :, start:end], self.values[layer, :, start:end] = keys, values
        self.bounds[layer] = block_bounds(self.keys[layer][None], [end], self.config["block_size"])[0]

    def forward(self, tokens, start, attend):
        """Feed tokens at start, start + 1, … → logits after the last. attend(layer, [Hq, n, D]) → [Hq, n, D]."""
        shape, w, n = self.shape, self.weights, len(tokens)
        positions, eps = np.arange(start, start + n), shape["norm_eps"]
        x = w["embed.weight"][list(tokens)]  # [n, C]
        for layer in range(shape["n_layer"]):
            at = f"layers.{layer}."
            y = rms_norm(x, w[f"{at}attn_norm.weight"], eps)
            heads = []
            for name in "qkv":
                z = y @ w[f"{at}attn.{name}_proj.weight"].T + w.get(f"{at}attn.{name}_proj.bias", 0.0)
                z = z.reshape(n, -1, shape["head_dim"]).swapaxes(0, 1)  # [H, n, D]
                if name != "v":
                    z = rms_norm(z, w[f"{at}attn.{name}_norm.weight"], eps) if shape["qk_norm"] else z
                    z = rope(z, positions, shape["rope_theta"])
                heads.append(z)
            query, key, value = heads
            self.write(layer, key, value, start, start + n)
            mixed = attend(layer, query).swapaxes(0, 1).reshape(n, -1)  # heads side by side
            x = x + mixed @ w[f"{at}attn.o_proj.weight"].T
            y = rms_norm(x, w[f"{at}mlp_norm.weight"], eps)
            gate, up = y @ w[f"{at}mlp.gate_proj.weight"].T, y @ w[f"{at}mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}mlp.down_proj.weight"].T
        output = w["embed.weight"] if shape["tied_embeddings"] else w["output.weight"]
        return rms_norm(x[-1], w["norm.weight"], eps) @ output.T

    def dense_pass(self, tokens, start):
        """Feed the tokens densely from `start` on. A rectification is a prefill that starts earlier."""
        end = start + len(tokens)

        def attend(layer, query):
            return dense_attention(query[None], self.keys[layer][None], self.values[layer][None], [end])[0]

        logits = self.forward(tokens, start, attend)
        self.length, self.window = end, 0
        return logits


# %% [markdown]
# The kit watches a generation through `decode_trace`. It has one entry after the prefill and one after every step, with
# copies of the whole cache, its bounds, every layer's selection, the token chosen and w. We start with dense passes
# alone. That can only be right where every step is dense, with `interval=1`. But it separates a wrong model from wrong
# decoding.


# %%
def entry(sequence, logits, indices):
    """Copy the state that the kit checks after a step."""
    cached = {name: getattr(sequence, name)[:, :, : sequence.length].copy() for name in ("keys", "values")}
    state = {"bounds": sequence.bounds.copy(), "indices": indices, "window": sequence.window}
    return cached | state | {"token": int(np.argmax(logits))}  # of equal logits the lower id, as it should be


def decode_trace(weights, model_config, prompt, config):
    n_tokens, fed = config["max_new_tokens"], list(prompt)
    sequence = Sequence(weights, model_config, config, len(prompt) + n_tokens)
    trace = [entry(sequence, sequence.dense_pass(fed, 0), None)]
    while len(trace) < n_tokens:
        fed.append(trace[-1]["token"])  # the pending token: chosen, not yet in the cache
        trace.append(entry(sequence, sequence.dense_pass(fed[-1:], sequence.length), None))
    return trace[:n_tokens]  # none, if there is nothing to generate


add(decode_trace, "4.4 schedules")
passed = [row.case for row in check_port(my_port, vectors) if row.operation == "decode_trace" and row.status == "pass"]
print("passed:", passed)
assert {"dense", "dense_from_one"} <= {*passed}
assert "never" not in passed

# %% [markdown]
# The two dense generations pass, so the model is right, and the report asks for the next thing: a
# [sparse step](../glossary.md#sparse-step).
#
# ## 7 Sparse steps
#
# A sparse step feeds one token at position T. Every layer scores, selects and attends. The token's own key counts, so
# all three get the length T + 1.


# %%
class SparseSequence(Sequence):
    """A sequence with sparse steps."""

    def sparse_step(self, token):
        """Feed one token → logits, and the indices [layer, Hkv, N] that were selected."""
        lengths, b, chosen = [self.length + 1], self.config["block_size"], []

        def attend(layer, query):
            query = query[None, :, 0]  # [1, Hq, D]
            scores = score_blocks(query, self.bounds[layer][None], lengths, b)
            chosen.append(select_blocks(scores, lengths, self.config))
            cached = self.keys[layer][None], self.values[layer][None]
            return sparse_attention(query, *cached, chosen[-1], lengths, b)[0][:, None]

        logits = self.forward([token], self.length, attend)
        self.length, self.window = self.length + 1, self.window + 1
        return logits, np.concatenate(chosen)


def decode_trace(weights, model_config, prompt, config):
    n_tokens, fed, f = config["max_new_tokens"], list(prompt), config["interval"]
    sequence = SparseSequence(weights, model_config, config, len(prompt) + n_tokens)
    trace = [entry(sequence, sequence.dense_pass(fed, 0), None)]
    while len(trace) < n_tokens:
        fed.append(trace[-1]["token"])
        if f == 1 and config["schedule"] == "fused":
            logits, indices = sequence.dense_pass(fed[-1:], sequence.length), None
        else:
            logits, indices = sequence.sparse_step(fed[-1])
        trace.append(entry(sequence, logits, indices))
    return trace[:n_tokens]


add(decode_trace, "4.4 schedules")

# %% [markdown]
# ## 8 Rectification
#
# The last part gives the method its name. The [window](../glossary.md#window) is the newest $w$ cached tokens, those
# that sparse steps wrote. A rectification feeds their ids once more, as one dense pass from position $T - w$ on, and
# every layer overwrites their keys and values. `dense_pass` can do that already, with a `start` in the past.
#
# There are two schedules. `"paper"` rectifies after a sparse step that fills the window, and throws the logits away.
# `"fused"` acts when the pending token would fill the window: it feeds the window and the pending token together, and
# takes the logits.


# %%
def decode_trace(weights, model_config, prompt, config):
    n_tokens, fed, f = config["max_new_tokens"], list(prompt), config["interval"]
    sequence = SparseSequence(weights, model_config, config, len(prompt) + n_tokens)
    trace = [entry(sequence, sequence.dense_pass(fed, 0), None)]
    while len(trace) < n_tokens:
        fed.append(trace[-1]["token"])
        if f is not None and config["schedule"] == "fused" and sequence.window + 1 >= f:
            start = sequence.length - sequence.window
            logits, indices = sequence.dense_pass(fed[start:], start), None
        else:
            logits, indices = sequence.sparse_step(fed[-1])
            if f is not None and config["schedule"] == "paper" and sequence.window >= f:
                start = sequence.length - sequence.window
                sequence.dense_pass(fed[start:], start)
        trace.append(entry(sequence, logits, indices))
    return trace[:n_tokens]


add(decode_trace)
rows = [row for row in check_port(my_port, vectors) if row.status != "not supported"]
assert is_passed(rows)
largest = max(row.error for row in rows if row.operation == "decode_trace")
print(f"all {len(rows)} cases pass; the caches of all generations are within {largest:.0e} of the expected ones")

# %% [markdown]
# That is a whole port. Interval 1 needs no code of its own any more. It is dense decoding, because the window is full
# before it begins. The next picture shows the way there, case by case:

# %%
ends = [0, *np.cumsum([n for _, n in Counter(row.operation for row in rows).items()])]
figure, axis = plt.subplots(figsize=(7.2, 2.4))
axis.imshow(np.array(history), aspect="auto", cmap="cividis", interpolation="none", extent=(0, len(rows), 12.5, 0.5))
axis.vlines(ends[1:-1], 0.5, 12.5, color="white", linewidth=2)
axis.set_xticks([(a + b) / 2 for a, b in pairwise(ends)], OPERATIONS, fontsize=7)
axis.set(ylabel="version", yticks=range(2, 13, 2))
axis.tick_params(length=0)
axis.grid(False)
plt.show()
assert len(history) == 12

# %% [markdown]
# *Figure: the 96 cases from left to right, one row for each version of the port, from the top. Bright cases pass.
# Within an operation each case asks for one thing more.*
#
# ## Mistakes that the kit finds
#
# A kit is as good as the mistakes it finds. Here are four mistakes that a port might well contain, each made in a copy
# of this port, with the first line of the report. Each mistake replaces one function or class of this tutorial.


# %%
def law_broken_by(name: str, wrong) -> str:
    """Run the kit with one name of this tutorial replaced. Prints the first failure and returns its law."""
    right = globals()[name]
    port = ModuleType("wrong_port")
    globals()[name] = wrong
    try:
        for function in OPERATIONS:
            setattr(port, function, globals()[function])
        row = first_failures(check_port(port, vectors))[0]
    finally:
        globals()[name] = right
    print(f"{row.operation}, {row.case}: {row.law}\n  {row.says}\n")
    return row.law


def in_half_precision(query, keys, values):
    """Softmax attention in half precision."""
    narrow = [x.astype(np.float16) for x in (query, keys, values)]
    return right_attention(*narrow)


class Extending(SparseSequence):
    """Extends the old bounds of a block by the keys that are written, which is right only for an append."""

    def write(self, layer, keys, values, start, end):
        before, b = self.bounds[layer].copy(), self.config["block_size"]
        super().write(layer, keys, values, start, end)
        if start % b:
            lo, hi = self.bounds[layer, :, 0, :, start // b], self.bounds[layer, :, 1, :, start // b]  # views
            np.minimum(lo, before[:, 0, :, start // b], out=lo)
            np.maximum(hi, before[:, 1, :, start // b], out=hi)


class OneTokenShort(SparseSequence):
    """Begins a rectification one token late."""

    def dense_pass(self, tokens, start):
        is_rectification = start > 0 and len(tokens) > 1
        return super().dense_pass(tokens[1:], start + 1) if is_rectification else super().dense_pass(tokens, start)


right_attention = softmax_attention
assert law_broken_by("count_selected", lambda m, c: min(m, max(c["min_blocks"], math.ceil(c["active_ratio"] * m)))) == (
    "2.3 exact products"
)
assert law_broken_by("softmax_attention", in_half_precision) == "2.4 eq. 2"
assert law_broken_by("SparseSequence", Extending) == "law 2 online = rebuilt"
assert law_broken_by("SparseSequence", OneTokenShort) == "law 6 rectification is exact"

# %% [markdown]
# In order: the count without its 1e-9, attention in half precision, bounds that are extended where a rectification has
# *replaced* keys (so they still bound keys that are gone), and a window that begins one token late. Each of these
# mistakes gives fluent text and no error message.
#
# ## Exercises
#
# **1.** Change the group order: let query head $h$ use KV head $h \bmod H_{kv}$ in `dense_attention`. Which case
# notices it first? Why not the first case of all?


# %% tags=["hide-cell"]
def interleaved(query, keys, values, lengths, **options):
    """Dense attention with query head h on KV head h mod Hkv."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    order = [h for k in range(kv_heads) for h in range(k, heads, kv_heads)]  # heads of one KV head side by side
    result = right_dense(query[:, order], keys, values, lengths, **options)
    back = np.argsort(order)
    return tuple(part[:, back] for part in result) if options.get("return_lse") else result[:, back]


right_dense = dense_attention
assert law_broken_by("dense_attention", interleaved) == "2.5 group order"
# The case `dense_groups` notices it. Its law is *group order*. Cases before it have one KV head, or one query head for
# each KV head, so every order gives the same result. This is the point of a ladder: the first failure names the cause,
# not a consequence.

# %% [markdown]
# **2.** `write` rebuilds the bounds of the whole layer at every step. How many blocks can a window of $w$ tokens touch?
# Rebuild only those, and let the kit check it.


# %% tags=["hide-cell"]
class Frugal(SparseSequence):
    """Rebuilds only the bounds of the blocks touched: at most ceil((w − 1) / b) + 1 for w tokens."""

    def write(self, layer, keys, values, start, end):
        b = self.config["block_size"]
        self.keys[layer, :, start:end], self.values[layer, :, start:end] = keys, values
        first, last = start // b, math.ceil(end / b)
        touched = self.keys[layer][None, :, first * b : last * b]
        self.bounds[layer, ..., first:last] = block_bounds(touched, [end - first * b], b)[0]


thorough, SparseSequence = SparseSequence, Frugal
assert is_passed(check_port(my_port, vectors))
SparseSequence = thorough
print("all cases pass")
# A window touches at most ⌈(w − 1) / b⌉ + 1 blocks, when it begins at the last slot of a block. The kit checks law 2
# here (online = rebuilt): bounds in the trace must be those of the port's own keys.

# %% [markdown]
# **3.** Take another framework that you know, and start from an empty file. [Porting](../porting.md) lists the traps
# and an order to follow. [A port to JAX](../examples/jax_port.py) was written from that page alone.
#
# This is the last tutorial. [An appendix](appendix_certified_bound.md) asks how wrong a single step can be.
