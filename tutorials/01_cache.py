# %% [markdown]
# # 1. The cache
#
# **What you will learn:** how a transformer decodes token by token, what it keeps in its
# [KV cache](../glossary.md#kv-cache), how many bytes of that cache every new token reads, and why this makes long
# contexts slow. Times are measured on the machine that runs this page. Numbers from a GPU are read from files, and the
# text says where.
#
# The first four tutorials lead to *rectified sparse attention* (ReSA, [arXiv
# 2506.04108](https://arxiv.org/abs/2506.04108)). It reads a small part of the cache at each step. That leaves errors in
# the cache, and every few tokens ReSA removes them. This tutorial is about the cache itself.
#
# **Time:** ten minutes to read, less than half a minute to run. You should know PyTorch and have seen the
# formula of attention.
#
# The model is a small GPT that comes with the project. It continues Python source. The text is a module of Python's
# standard library that the model did not see in training.

# %%
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from resa.reference import GPT, GPTConfig, ReSAConfig, dense_attention, generate, load_model, load_tokenizer, prefill
from resa.reference.lab.corpus import example_module
from resa.reference.lab.fidelity import read_ratio

plt.style.use("resa.reference.weights.assets.figure")
torch.set_num_threads(1)  # steps of one token are too small to share among threads

model, tokenizer = load_model(), load_tokenizer()
subject, text = example_module()
tokens = tokenizer.encode_ordinary(text)
print(f"{subject}: {len(tokens):,} tokens")
print(f"{model.config.n_layer} layers, {model.config.n_head} query heads, {model.config.n_kv_head} KV heads, ", end="")
print(f"head dimension {model.config.head_dim}")

# %% [markdown]
# ## Decoding without a cache, and with one
#
# A model that writes text predicts one token, appends it, and predicts the next. The simplest program runs the whole
# text through the model each time and keeps the last row of the output:

# %%
prompt = tokens[:512]


@torch.no_grad()
def next_token_logits(context):
    """Logits [V] after the last token. Everything is computed anew."""
    return model(torch.tensor([context]))[0, -1]


anew = list(prompt)
for _ in range(16):
    anew.append(int(next_token_logits(anew).argmax()))
print(repr(tokenizer.decode(anew[len(prompt) :])))

# %% [markdown]
# Nearly all of that work is repeated. Tokens meet each other in one place only: attention. For every layer and every
# head,
#
# $$\mathrm{out} = \sum_{j=0}^{T-1} \frac{e^{s_j}}{\sum_i e^{s_i}} v_j, \qquad s_j = \frac{q \cdot k_j}{\sqrt{D}}$$
#
# where $q$ `[D]` is the query of the newest token, $k_j$ and $v_j$ `[D]` are the key and the value of token $j$, and
# $T$ is the number of tokens so far. Attention here is causal: a token sees itself and the tokens before it. So
# $k_j$ and $v_j$ depend on tokens $0 … j$ alone. They do not change when more text follows, so they can be kept. The
# KV cache is the place where they are kept.
#
# Several query heads share one key head and one value head: $G = H_q / H_{kv}$ of them
# ([grouped-query attention](../glossary.md#gqa)). The cache here holds one sequence. Its keys are a tensor
# `[layer, 1, Hkv, T_max, D]`, and its values are another. (The 1 is the batch. A fast implementation keeps $B$
# sequences in one tensor.)

# %%
cache = model.new_cache(capacity=len(prompt) + 16, block_size=16)  # blocks: tutorial 2
logits = prefill(model, prompt, cache)  # [V]; the whole prompt at once
print("keys", list(cache.keys.shape), "  values", list(cache.values.shape), "  length", cache.length)

# %% [markdown]
# [`prefill`](../glossary.md#prefill) runs any number of tokens through the model and appends their keys and values to
# the cache. With a single token it is a decoding step:

# %%
cached = list(prompt)
for _ in range(16):
    cached.append(int(logits.argmax()))
    logits = prefill(model, cached[-1:], cache)
assert cached == anew, "the cache changes what is computed, not what comes out"

# %% [markdown]
# `generate` runs this loop when it decodes densely. It takes a list of prompts and returns one generation per prompt.
# ([Tutorial 4](04_rectification.md) explains why `interval=1` means *dense* decoding.)

# %%
[generation] = generate(model, [prompt], 16, ReSAConfig(interval=1))
assert prompt + generation.tokens == anew

# %% [markdown]
# How much time does the cache save? And how does the remaining time depend on the length? The time of a step does not
# depend on what the cache holds. So we fill a cache with random numbers and set its length. That is faster than
# prefilling it.


# %%
def median_ms(function, repeats):
    """Median time of a call in milliseconds, after one call that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def step_ms(length):
    """Time of a dense decoding step of the small model over a cache of `length` tokens."""
    cache = model.new_cache(capacity=length + 20, block_size=16)
    cache.keys.normal_()
    cache.values.normal_()
    cache.length = length
    return median_ms(lambda: prefill(model, [0], cache), 15)


lengths_anew = [256, 512, 1024, 2048]
lengths_cached = [256, 512, 1024, 2048, 4096, 8000]
ms_anew = [median_ms(lambda length=length: next_token_logits([0] * length), 2) for length in lengths_anew]
ms_cached = [step_ms(length) for length in lengths_cached]

figure, axes = plt.subplots(figsize=(6, 2.8))
axes.plot(lengths_anew, ms_anew, "o-", label="everything anew")
axes.plot(lengths_cached, ms_cached, "s-", label="with the cache")
axes.set(xlabel="T, tokens before the new one", ylabel="time per token [ms]", yscale="log", xscale="log")
axes.set_xticks(lengths_cached, [f"{length:,}" for length in lengths_cached])
axes.minorticks_off()
axes.legend()
plt.show()

for length, ms in zip(lengths_anew, ms_anew, strict=True):
    print(f"T = {length:5,}: {ms:7.1f} ms anew, {ms_cached[lengths_cached.index(length)]:5.1f} ms with the cache")
assert ms_anew[-1] > 4 * ms_cached[lengths_cached.index(2048)]

# %% [markdown]
# *Figure: time per token of the small model on this machine. Both axes are logarithmic. Without a cache the time grows
# faster than the text. With a cache it is nearly flat at first, where the model's weights and the overhead of many
# small operations dominate. Then it rises with T.*
#
# ## What a step reads
#
# The rise has one cause. Every new token's query meets *all* cached keys, and attention sums *all* values. Nothing in
# the cache can be skipped, so each step of [dense attention](../glossary.md#dense-attention) reads
#
# $$\mathrm{bytes}(T) = 2 \cdot n_\mathrm{layer} \cdot H_{kv} \cdot D \cdot T \cdot (\mathrm{bytes\ per\ number})$$
#
# per sequence. The 2 stands for keys and values. Each step also reads the weights of the model once, for any length
# and any batch.


# %%
def cache_bytes_per_token(config, bytes_per_number):
    """Bytes that one token takes up in the cache: keys and values of all layers."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * bytes_per_number


per_token = cache_bytes_per_token(model.config, 4)  # float32
weights = sum(parameter.nbytes for parameter in model.parameters())
assert per_token * cache.capacity == cache.keys.nbytes + cache.values.nbytes
print(f"weights {weights / 1e6:.1f} MB; cache {per_token:,} bytes per token")
print(f"from {weights / per_token:,.0f} tokens on, a step reads more cache than weights")

# %% [markdown]
# ## Attention alone, over longer caches
#
# To look at attention alone, we call the operation itself. The caches are synthetic. They have the shape of one layer
# of Qwen2.5-7B: 28 query heads, 4 KV heads, head dimension 128. For comparison we time how long it takes to *read* as
# many bytes. That is the [memory bandwidth](../glossary.md#memory-bandwidth) of one core.

# %%
Hq, Hkv, D = 28, 4, 128
lengths = [4096, 8192, 16384, 32768, 65536]
attention_ms, reading_ms, read_bytes = [], [], []
for T in lengths:
    keys_and_values = torch.randn(2, 1, Hkv, T, D)
    query = torch.randn(1, Hq, 1, D)
    keys, values = keys_and_values
    T_valid = torch.tensor([T], dtype=torch.int32)
    attention_ms.append(median_ms(lambda q=query, k=keys, v=values, n=T_valid: dense_attention(q, k, v, n), 7))
    reading_ms.append(median_ms(keys_and_values.sum, 7))
    read_bytes.append(keys_and_values.nbytes)

figure, axes = plt.subplots(figsize=(6, 2.8))
axes.plot(lengths, attention_ms, "o-", label="dense attention, one layer")
axes.plot(lengths, reading_ms, "s--", label="only reading the same bytes")
axes.set(xlabel="T, tokens in the cache", ylabel="time [ms]", ylim=(0, None))
axes.set_xticks(lengths[1:], [f"{T // 1024}K" for T in lengths[1:]])
axes.legend()
plt.show()

for T, ms, reading, size in zip(lengths, attention_ms, reading_ms, read_bytes, strict=True):
    print(f"T = {T:6,}: {size / 1e6:6.1f} MB, attention {ms:6.2f} ms = {size / ms / 1e6:5.1f} GB/s, ", end="")
    print(f"reading {reading:5.2f} ms = {size / reading / 1e6:5.1f} GB/s")
assert attention_ms[-1] > 4 * attention_ms[0], "16 times the bytes take many times as long"

# %% [markdown]
# *Figure: dense attention of one layer for one new token on this machine. Both lines are nearly straight: the time is
# proportional to the bytes.*
#
# On one CPU core, attention is slower than pure reading. Each key meets $G = 7$ queries, and one core is slow at the
# arithmetic. A GPU can do hundreds of multiplications in the time that one number takes to arrive from memory, so
# there the bytes alone decide. The next numbers were measured on a GPU. They come with the project and are read from a
# file. "Copying" is a plain copy within the GPU's memory, timed in the same run.

# %%
folder = Path(globals().get("__file__", "here")).resolve().parent  # of this script, or where a notebook runs
results = next(each / "docs" / "results" for each in [folder, *folder.parents] if (each / "docs" / "results").is_dir())
measured = json.loads((results / "attention.json").read_text())
print(f"{measured['device']}, copying runs at {measured['copy_tbs']} TB/s")
for row in measured["rows"]:
    if row["batch"] == 8 and row["context"] >= 16384:
        share = row["cache_bytes"] / row["dense_us"] / 1e6 / measured["copy_tbs"]
        print(f"8 sequences of {row['context']:7,} tokens: {row['cache_bytes'] / 1e6:7.1f} MB per layer, ", end="")
        print(f"dense attention {row['dense_us']:7.1f} µs, {share:.0%} of the copying speed")
        assert share > 0.8

# %% [markdown]
# A share above 100 % is no mistake. Copying also writes, and pure reading is a little faster.
#
# ## A large model at 256K tokens
#
# Now we compute the bytes for a whole model of Qwen2.5-7B's shape, in 16 bits. We only count the parameters, on
# PyTorch's `meta` device, which allocates nothing. We leave out the table of input embeddings, because a step reads
# only one row of it per sequence.

# %%
qwen = GPTConfig(
    vocab_size=152064,
    n_layer=28,
    n_head=28,
    n_kv_head=4,
    head_dim=128,
    hidden_size=3584,
    intermediate_size=18944,
    qkv_bias=True,
    tied_embeddings=False,
)
with torch.device("meta"):
    shape = GPT(qwen)
read_parameters = sum(p.numel() for p in shape.parameters()) - shape.embed.weight.numel()
weight_bytes = 2 * read_parameters
token_bytes = cache_bytes_per_token(qwen, 2)
T = 256 * 1024
print(f"weights: {weight_bytes / 1e9:.2f} GB per step")
print(f"cache: {token_bytes:,} bytes per token, {T * token_bytes / 1e9:.2f} GB per step at {T:,} tokens")
assert token_bytes == 2 * 28 * 4 * 128 * 2 == 57_344

# %% [markdown]
# At 256K tokens the cache of one sequence is as large as the weights. With eight sequences in the batch a step still
# reads the weights once, because it multiplies all eight rows with them together. But every sequence has a cache of
# its own, so a step reads eight caches. From the bytes and the GPU's copying speed we can predict how long a whole
# step takes, and compare:

# %%
measured = json.loads((results / "end_to_end" / "h100_float16.json").read_text())
print(f"{measured['device']}, copying runs at {measured['copy_tbs']} TB/s; {T:,} tokens per sequence")
for row in measured["rows"]:
    if row["context"] == T and row["protocol"] == "shared":
        step_bytes = weight_bytes + row["batch"] * T * token_bytes
        predicted = step_bytes / measured["copy_tbs"] / 1e9
        taken = row["dense_us"] / 1e3
        print(
            f"batch {row['batch']}: {step_bytes / 1e9:6.1f} GB, predicted {predicted:5.1f} ms, measured {taken:5.1f} ms"
        )
        assert 0.8 < predicted / taken < 1.2

# %% [markdown]
# ("Shared" in the code: the caches of all layers do not fit on one GPU, so all layers of the measured model read the
# same cache. The number of bytes read does not change.)

# %%
contexts = [4, 16, 64, 256]  # in units of 1,024 tokens
figure, axes = plt.subplots(figsize=(6, 2.8))
ways = {"dense": 1.0, "ReSA": read_ratio(ReSAConfig(active_ratio=0.1, interval=32, schedule="paper"))}
for offset, (name, share) in zip((-0.2, 0.2), ways.items(), strict=True):
    at = [index + offset for index in range(len(contexts))]
    cache_gb = [8 * 1024 * each * token_bytes * share / 1e9 for each in contexts]
    label = "weights" if offset < 0 else None
    axes.bar(at, [weight_bytes / 1e9] * len(at), width=0.36, color="0.7", label=label)
    axes.bar(at, cache_gb, width=0.36, bottom=weight_bytes / 1e9, label=f"cache, {name}")
axes.set_xticks(range(len(contexts)), [f"{each}K" for each in contexts])
axes.set(xlabel="T, tokens per sequence", ylabel="read per step [GB], batch 8")
axes.legend()
plt.show()

print(f"ReSA reads {ways['ReSA']:.4f} of dense decoding's cache bytes at these settings")
assert abs(ways["ReSA"] - (1 / 16 + 0.1 + 1 / 32)) < 1e-9

# %% [markdown]
# *Figure: bytes that one step reads for 8 sequences, computed for a model of Qwen2.5-7B's shape. In short contexts the
# weights dominate, and reading less of the cache gains nothing. In long contexts nearly all bytes belong to the cache.*
#
# This is the whole motive for [sparse attention](../glossary.md#sparse-attention): to produce a token from a tenth of
# the cache. The bar for ReSA adds up three parts, which the next tutorials explain one by one:
#
# - the bounds that say which blocks are worth reading, $1/b$ of the dense bytes with $b = 16$,
# - those blocks, $p = 0.1$,
# - a dense pass every $f = 32$ tokens that makes the cache exact again, $1/f$.
#
# ## Exercises
#
# ### 1. No grouped queries
#
# Suppose the large model had one KV head per query head. How many gigabytes would one sequence of 256K tokens
# read per step?

# %% tags=["hide-cell"]
ungrouped = GPTConfig(**{**vars(qwen), "n_kv_head": 28})
print(f"{T * cache_bytes_per_token(ungrouped, 2) / 1e9:.1f} GB: G = 7 times as much")
assert cache_bytes_per_token(ungrouped, 2) == 7 * token_bytes

# %% [markdown]
# ### 2. When is the cache half of what is read?
#
# Take the large model at batch 1 and at batch 8. From which length $T$ on does a step read more cache than weights?

# %% tags=["hide-cell"]
for batch in (1, 8):
    print(f"batch {batch}: from {weight_bytes / (batch * token_bytes):,.0f} tokens on")
# The batch shares the weights, but not the caches. So eight times the batch means an eighth of the length.

# %% [markdown]
# ### 3. Predict, then measure
#
# From the numbers above, predict how long `dense_attention` takes on this machine for $T = 131{,}072$ in the same
# shape. Then measure it. Why is doubling the last row a fair prediction? Why is doubling the first row often not?

# %% tags=["hide-cell"]
predicted = 2 * attention_ms[-1]
keys, values = torch.randn(2, 1, Hkv, 131072, D)
query, T_valid = torch.randn(1, Hq, 1, D), torch.tensor([131072], dtype=torch.int32)
taken = median_ms(lambda: dense_attention(query, keys, values, T_valid), 3)
print(f"predicted {predicted:.1f} ms, measured {taken:.1f} ms")
# The line goes through the origin only where the bytes dominate. Short caches have a fixed overhead. They also fit in
# the processor's own cache, which is faster to read than memory.

# %% [markdown]
# **Next:** [which tenth of the cache to read](02_blocks.md).
