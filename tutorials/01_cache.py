# %% [markdown]
# # 1. The cache
#
# After a text of 262,144 tokens, a 7B language model reads **15 gigabytes of notes about that text for every token that
# it writes**. That is more than the parameters that it reads for this token. So long contexts are slow.
#
# Most of these bytes hardly matter for the next token. So tutorials 1 to 4 have one goal: *make a real model answer
# with a tenth of its cache, and test that the answers stay right.* The method is called rectified sparse attention, or
# ReSA ([arXiv 2506.04108](https://arxiv.org/abs/2506.04108)).
#
# The notes are called the [KV cache](../glossary.md#kv-cache). In this tutorial you write the attention that reads it.
# Then you count its bytes and measure how few of them matter.
#
# **Time:** ten minutes to read, half a minute to run. You should know PyTorch and have seen the formula of attention.

# %%
import time

import matplotlib.pyplot as plt
import torch

from resa.reference import GPT, GPTConfig, dense_attention, open_model, prefill

torch.set_num_threads(1)  # steps of one token are too small to share among threads

# %% [markdown]
# ## A real model, and six facts
#
# The model is SmolLM2 with 135 million parameters. It is a real language model, and one CPU core can run it. The text
# is a page of Python's documentation. We hide six short facts in it. One of them is "The captain of the ship is Amelia
# Stone." The prompt ends with the beginning of the same sentence. Will the model find the captain's name?

# %% tags=["hide-input"]
from pydoc_data.topics import topics

try:
    opened, is_real = open_model("smollm2"), True
except (FileNotFoundError, ImportError):
    opened, is_real = open_model("code"), False
    print("SmolLM2 is not installed (`make real` does it). A small model runs instead, and answers worse.")
model, tokenizer = opened.model, opened.tokenizer
encode, decode = tokenizer.encode_ordinary, tokenizer.decode
plt.style.use("resa.reference.weights.assets.figure")

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


# %%
text = read_text(1000)
prompt = text + encode("\n\nThe captain of the ship is")
config = model.config
print(f"{config.n_layer} layers, {config.n_head} query heads, {config.n_kv_head} KV heads, D = {config.head_dim}")
print(f"{len(prompt):,} tokens. The last 60: {decode(prompt[-60:])!r}")

# %% [markdown]
# ## Without a cache
#
# A model that writes text predicts one token, appends it, and predicts the next. The simplest program runs the whole
# text through the model for every token:


# %%
@torch.no_grad()
def next_token(tokens):
    """Predict the token after `tokens`. Everything is computed anew."""
    return int(model(torch.tensor([tokens]))[0, -1].argmax())


anew = list(prompt)
for _ in range(2):
    anew.append(next_token(anew))
print("answer:", decode(anew[len(prompt) :]))
assert not is_real or decode(anew[len(prompt) :]) == " Amelia Stone"

# %% [markdown]
# SmolLM2 finds the name. But for the second token it repeated nearly all the work of the first.
#
# ## With a cache
#
# Tokens meet each other in one place only: attention. For every layer and every head,
#
# $$\mathrm{out} = \sum_{j=0}^{T-1} w_j v_j, \qquad w_j = \frac{e^{s_j}}{\sum_i e^{s_i}}, \qquad s_j = \frac{q \cdot
# k_j}{\sqrt{D}}$$
#
# $T$ is the number of tokens so far, and $q$ is the query of the newest one. Token $j$ has a key $k_j$ and a value
# $v_j$. All three are vectors of $D$ channels. A token sees only itself and the tokens before it. So $k_j$ and $v_j$ do
# not change when the text goes on, and we can keep them. The cache is the place where they are kept.
#
# The model has fewer KV heads than query heads: $G$ query heads share one KV head ([grouped-query
# attention](../glossary.md#gqa)). Attention over a cache then takes three lines:


# %%
def weights_of(query, keys):
    """Attention weights w_j of every head: [Hq, D], [Hkv, T, D] → [Hkv, G, T]. A head's weights add up to 1."""
    group = query.unflatten(0, (keys.shape[0], -1))  # [Hkv, G, D]
    return (group @ keys.mT * query.shape[-1] ** -0.5).softmax(dim=-1)


def attention(query, keys, values):
    """One new token attends to all cached tokens: [Hq, D], [Hkv, T, D], [Hkv, T, D] → [Hq, D]."""
    return (weights_of(query, keys) @ values).flatten(0, 1)


q, k, v = torch.randn(9, 64), torch.randn(3, 100, 64), torch.randn(3, 100, 64)
from_library = dense_attention(q[None, :, None], k[None], v[None], torch.tensor([100]))[0, :, 0]
assert torch.allclose(attention(q, k, v), from_library, atol=1e-5), "the library's function does the same"

# %% [markdown]
# A decoding step feeds one token. The model's method `hidden_states` does everything except attention. For each layer
# it computes the query, the key and the value, and calls a function `attend`. Our `attend` stores the key and the
# value. Then it attends to everything that is stored:


# %%
@torch.no_grad()
def dense_step(token, cache):
    """Feed one token → logits [V] for the next one, and the attention weights [layer, Hkv, G, T]."""
    position, weights = cache.length, []

    def attend(layer, query, key, value):  # [1, Hq, 1, D], [1, Hkv, 1, D], [1, Hkv, 1, D] → [1, Hq, 1, D]
        cache.write(layer, position, key, value)
        keys, values = (kept[layer, 0, :, : position + 1] for kept in (cache.keys, cache.values))  # [Hkv, T, D]
        weights.append(weights_of(query[0, :, 0], keys))
        return attention(query[0, :, 0], keys, values)[None, :, None]

    hidden = model.hidden_states(torch.tensor([[token]]), torch.tensor([[position]]), attend)
    cache.length = position + 1
    return model.output(hidden[0, 0]), torch.stack(weights)


# %% [markdown]
# The library's `prefill` feeds many tokens at once. We use it for the prompt. After that, each token takes one step:

# %%
cache = model.new_cache(capacity=len(prompt) + 8, block_size=16)  # why blocks? That is tutorial 2.
print("keys", list(cache.keys.shape), "= [layer, batch, KV head, room for tokens, D]; values alike")

prefill(model, prompt[:-1], cache)
logits, weights = dense_step(prompt[-1], cache)
answer = [int(logits.argmax())]
answer.append(int(dense_step(answer[-1], cache)[0].argmax()))
assert prompt + answer == anew, "the cache saves work and changes nothing"

cache.truncate(len(prompt) - 1)
assert torch.allclose(prefill(model, prompt[-1:], cache), logits, atol=1e-3), "prefill of one token is the same step"

# %% [markdown]
# ## What a step costs
#
# How much time does the cache save? And is a step slower after a longer text? We time both on this machine. (A cache of
# zeros is good enough: the time does not depend on the numbers in it.)

# %% tags=["hide-input"]
lengths = [250, 500, 1000, 2000, 4000, 8000]


def shortest_ms(function, repeats):
    """Shortest time of a call in milliseconds: other programs can only make it longer."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def step_ms(length):
    """Time of one step over a cache of `length` tokens."""
    zeros = model.new_cache(capacity=length + 8, block_size=16)
    zeros.length = length
    return shortest_ms(lambda: dense_step(0, zeros), 4)


with_cache = [step_ms(length) for length in lengths]
without = [shortest_ms(lambda length=length: next_token([0] * length), 1) for length in lengths[:3]]
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(lengths[:3], without, "o-", label="everything anew")
axes.plot(lengths, with_cache, "s-", label="with a cache")
axes.set(xlabel="T, tokens before the new one", ylabel="time per token [ms]", xscale="log", yscale="log")
axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
axes.set_yticks([100, 300, 1000, 3000], ["100", "300", "1,000", "3,000"])
axes.minorticks_off()
axes.legend()
plt.show()
for length, ms in zip(lengths, with_cache, strict=True):
    print(f"T = {length:5,}: {ms:5.0f} ms with a cache")
assert without[2] > 4 * with_cache[2]
assert with_cache[-1] > 1.2 * with_cache[0]

# %% [markdown]
# *Figure: time per token on this machine. Both axes are logarithmic. Without a cache the time grows with the text. With
# a cache it is nearly flat at first: every step reads all parameters of the model, whatever the length. Then it grows
# too, because every step also reads the whole cache.*
#
# A GPU calculates much faster than it reads from memory, so the bytes decide how long a step takes
# ([performance](../performance.md)). We count them. Every query is multiplied with *all* keys, and the output is a sum
# over *all* values:
#
# $$\mathrm{bytes}(T) = 2 \cdot n_\mathrm{layer} \cdot H_{kv} \cdot D \cdot T \cdot (\mathrm{bytes\ per\ number})$$
#
# The 2 stands for keys and values. A step also reads the model's parameters. Here are both for a model with the shape
# of Qwen2.5-7B, in 16 bits. (PyTorch's `meta` device counts parameters without allocating them. A step reads only one
# row of the input embeddings, so we leave them out.)


# %%
def cache_bytes_per_token(config, bytes_per_number):
    """Bytes that one token takes in the cache."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * bytes_per_number


assert cache_bytes_per_token(config, 4) * cache.capacity == cache.keys.nbytes + cache.values.nbytes

heads = {"n_layer": 28, "n_head": 28, "n_kv_head": 4, "head_dim": 128}
sizes = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
large = GPTConfig(**heads, **sizes, qkv_bias=True, tied_embeddings=False)
with torch.device("meta"):
    shape = GPT(large)
parameter_bytes = 2 * (sum(each.numel() for each in shape.parameters()) - shape.embed.weight.numel())
token_bytes, T = cache_bytes_per_token(large, 2), 262_144
print(f"parameters: {parameter_bytes / 1e9:.1f} GB")
print(f"cache: {token_bytes:,} bytes per token, {T * token_bytes / 1e9:.1f} GB for {T:,} tokens")
assert T * token_bytes > parameter_bytes

# %% [markdown]
# These are the 15 gigabytes. If a batch has eight texts, a step reads the parameters once for all of them, but it reads
# eight caches.
#
# ## How much of it matters?
#
# We go back to SmolLM2 and to the step that found "Amelia". We kept its attention weights. We cut the text into
# *blocks* of 16 tokens and add up the weights in each block. The sum is the *mass* of the block: its share of the
# attention. (We average over the $G$ query heads of a KV head.) How much mass does the best tenth of the blocks get?

# %%
b = 16
padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % b))  # the last block may be partial
mass = padded.unflatten(-1, (-1, b)).sum(dim=-1).mean(dim=2)  # [layer, Hkv, M]
M = mass.shape[-1]
n = -(-M // 10)  # a tenth, rounded up
best_tenth = mass.topk(n).values.sum(dim=-1)  # [layer, Hkv]
print(f"the best {n} of {M} blocks get {best_tenth.mean():.0%} of the attention")
assert best_tenth.mean() > (0.7 if is_real else 0.4)

# %% tags=["hide-input"]
fact = decode(text).index("The captain of the ship is")
at = len(encode(decode(text)[:fact])) // b  # the block in which the fact begins
figure, axes = plt.subplots(figsize=(7, 2.8))
shown = (mass.amax(dim=1).clamp(min=1e-3).log10() * 3).round() / 3
image = axes.imshow(shown, aspect="auto", interpolation="nearest")
axes.annotate("the fact", (at, -0.5), (at, -4), ha="center", arrowprops={"arrowstyle": "->"})
axes.set(xlabel="block of 16 tokens", ylabel="layer")
axes.grid(False)
figure.colorbar(image, ax=axes, label="mass, log10")
plt.show()
print(f"in one layer, one KV head gives the fact's block {mass[:, :, at].max():.0%} of its attention")

# %% [markdown]
# *Figure: the attention of this step. Each row is a layer, and each column is a block of the text. (Each square shows
# the KV head with the most mass.) Two places are bright in most layers: the first block, and the newest ones. In the
# later layers another block is bright, far from both. It holds the fact. In layers 3 to 10 a few other blocks are
# bright too. The darkest colour is 0.001 and less.*
#
# So a tenth of the blocks gets most of the attention. This leads to [sparse
# attention](../glossary.md#sparse-attention): read that tenth, and skip the rest.
#
# There is one problem. To find the best blocks we read all keys, and that is what we want to avoid. **How can a step
# know which tenth to read, before it reads it?**
#
# ## Exercises
#
# ### 1. No shared heads
#
# Suppose the 7B model had one KV head for each query head. How many gigabytes would the cache of 262,144 tokens take?

# %% tags=["hide-cell"]
ungrouped = GPTConfig(**{**vars(large), "n_kv_head": 28})
print(f"{T * cache_bytes_per_token(ungrouped, 2) / 1e9:.1f} GB: G = 7 times as much")

# %% [markdown]
# ### 2. When is the cache half of what is read?
#
# From which length on does a step of the 7B model read more cache than parameters? Answer for one text, and for a batch
# of eight.

# %% tags=["hide-cell"]
for batch in (1, 8):
    print(f"batch {batch}: from {parameter_bytes / (batch * token_bytes):,.0f} tokens on")
# The texts of a batch share the parameters, but not the caches. Eight times the batch means an eighth of the length.

# %% [markdown]
# ### 3. The newest tenth
#
# The simplest choice is to read the newest tenth. Change `dense_step` so that its attention sees only the newest 100
# tokens. Does the model still find the captain's name? Predict, then run it.


# %% tags=["hide-cell"]
@torch.no_grad()
def newest_step(token, cache, n_newest=100):
    """Feed one token that attends to the newest tokens alone → logits [V]."""
    position = cache.length

    def attend(layer, query, key, value):
        cache.write(layer, position, key, value)
        first = max(0, position + 1 - n_newest)
        keys, values = (kept[layer, 0, :, first : position + 1] for kept in (cache.keys, cache.values))
        return attention(query[0, :, 0], keys, values)[None, :, None]

    hidden = model.hidden_states(torch.tensor([[token]]), torch.tensor([[position]]), attend)
    cache.length = position + 1
    return model.output(hidden[0, 0])


cache.truncate(len(text))
for token in prompt[len(text) :]:
    logits = newest_step(token, cache)
print(f"The captain of the ship is{decode([int(logits.argmax())])} …")
assert not is_real or int(logits.argmax()) != answer[0]
# The fact lies hundreds of tokens back, and no step sees it. Whatever the model writes now is a guess.

# %% [markdown]
# `resa exercise 1` lets you write the attention yourself, and says what is still wrong with it.
#
# **Next:** [which tenth to read](02_blocks.md).
