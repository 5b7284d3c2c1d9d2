# %% [markdown]
# # 3. Drift
#
# With bounds, SmolLM2 missed three of six facts. One of them was the captain's name, although the scores of a dense
# step had found its block. **What do sparse steps write into the cache, and what does that do to the steps after
# them?**
#
# They write wrong keys and values, and later steps read them. The cache [drifts](../glossary.md#drift). In this
# tutorial you write the sparse step and compare its cache with an exact one. You will see where the error begins, how
# it is passed on, and what it costs.
#
# **Time:** fifteen minutes to read, less than a minute to run. It builds on [blocks](02_blocks.md).

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

from resa.reference import ReSAConfig, load_model, load_tokenizer, open_model, prefill, score_blocks, select_blocks
from resa.reference import sparse_attention as library_attention
from resa.reference import sparse_step as library_step
from resa.reference.lab.fidelity import divergence, read
from resa.reference.lab.parallel import decode_at_once

torch.set_num_threads(1)
b = 16

# %% [markdown]
# We use the model and the text of tutorial 2. After its 1,000 tokens come all six questions, each with its right
# answer. (In tutorial 2 each question stood alone, so its answers differ from those below.) The first 872 tokens are
# prefilled densely. All tokens after these are decoded: each step is given the next token of this text, whatever it
# predicted. So every way of decoding reads the same tokens, and we can compare the caches. When the questions come, 128
# tokens have been decoded, and the cache is already wrong. An answer counts as right if the model predicts each of its
# tokens.

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


def ask(text):
    """Put all questions and their answers behind a text → token ids, and the places of each answer."""
    ids, places = list(text), []
    for begin, end in FACTS.items():
        ids += encode("\n\n" + begin)
        places.append(slice(len(ids), len(ids) + len(encode(end))))
        ids += encode(end) + encode(".")
    return ids, places


# %%
tokens, places = ask(read_text(1000))
n_prompt, n_steps = 872, 64
prompt, continuation = tokens[:n_prompt], tokens[n_prompt:]
print(f"{len(prompt)} tokens are prefilled, {len(continuation)} are decoded, the last of them: ", end="")
print(repr(decode(tokens[-40:])))

# %% [markdown]
# ## The sparse step
#
# [Sparse attention](../glossary.md#sparse-attention) is attention to the selected blocks, as if there were no others.
# The weights of their tokens add up to 1. Every KV head has its own blocks:


# %%
def sparse_attention(query, keys, values, blocks):
    """One new token attends to chosen blocks: [Hq, D], [Hkv, T, D] twice, blocks [Hkv, n] → [Hq, D]."""
    outputs, groups = [], query.unflatten(0, (keys.shape[0], -1))  # [Hkv, G, D]
    for group, own_keys, own_values, own_blocks in zip(groups, keys, values, blocks, strict=True):
        positions = (own_blocks[:, None] * b + torch.arange(b)).flatten()
        positions = positions[positions < keys.shape[1]]  # the newest block may be partial
        weights = (group @ own_keys[positions].T * query.shape[-1] ** -0.5).softmax(dim=-1)  # [G, n·b]
        outputs.append(weights @ own_values[positions])
    return torch.cat(outputs)


q, k, v, some = torch.randn(9, 64), torch.randn(3, 100, 64), torch.randn(3, 100, 64), torch.tensor([[0, 6]] * 3)
from_library = library_attention(q[None], k[None], v[None], some[None], torch.tensor([100]), b)[0]
assert torch.allclose(sparse_attention(q, k, v, some), from_library, atol=1e-5), "the library's function does the same"

# %% [markdown]
# The [sparse step](../glossary.md#sparse-step) is the dense step of tutorial 1 with a new `attend`. It stores the key
# and the value, scores the blocks, selects some, and attends to them. (`cache.bounds` has the bounds of all blocks.
# `write` updates them.)


# %%
@torch.no_grad()
def sparse_step(token, cache, config):
    """Feed one token that attends to the selected blocks → logits [V] for the next one."""
    position, length = cache.length, torch.tensor([cache.length + 1])

    def attend(layer, query, key, value):  # [1, Hq, 1, D], [1, Hkv, 1, D], [1, Hkv, 1, D] → [1, Hq, 1, D]
        cache.write(layer, position, key, value)
        scores = score_blocks(query[:, :, 0], cache.bounds[layer], length, b)
        blocks = select_blocks(scores, length, config)[0]
        keys, values = (kept[layer, 0, :, : position + 1] for kept in (cache.keys, cache.values))
        return sparse_attention(query[0, :, 0], keys, values, blocks)[None, :, None]

    hidden = model.hidden_states(torch.tensor([[token]]), torch.tensor([[position]]), attend)
    cache.length = position + 1
    return model.output(hidden[0, 0])


config = ReSAConfig(block_size=b, active_ratio=0.1, min_blocks=4)
cache = model.new_cache(capacity=len(tokens), block_size=b)
prefill(model, prompt, cache)
ours = sparse_step(continuation[0], cache, config)
cache.truncate(n_prompt)
assert torch.allclose(ours, library_step(model, continuation[0], cache, config), atol=1e-3)
cache.truncate(n_prompt)

# %% [markdown]
# ## Two caches of the same text
#
# One cache comes from a dense pass over all tokens. A cache should look like this, so we call it *exact*. The other
# cache has the same exact prompt, and then 64 sparse steps write into it. (The library's `read` does the dense pass. It
# keeps the keys and values of all layers, and the predictions after the prompt.)

# %%
reading = read(model, tokens, n_prompt)
exact = torch.cat(reading.exact.keys), torch.cat(reading.exact.values)  # [layer, Hkv, T, D] each
for token in continuation[:n_steps]:
    sparse_step(token, cache, config)


def errors(written, first):
    """Relative error of each token's key or value, the larger one: (keys, values) [layer, Hkv, n, D] → [layer, n]."""
    found = []
    for ours, right in zip(written, exact, strict=True):
        right = right[:, :, first : first + ours.shape[2]]
        found.append(((ours - right).norm(dim=-1) / right.norm(dim=-1)).amax(dim=1))
    return torch.maximum(*found)


drifted = errors(
    (cache.keys[:, 0, :, n_prompt : cache.length], cache.values[:, 0, :, n_prompt : cache.length]), n_prompt
)
assert errors((cache.keys[:, 0, :, :n_prompt], cache.values[:, 0, :, :n_prompt]), 0).max() < 1e-3, "the prompt is exact"

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7, 2.6))
image = axes.imshow((drifted.clamp(min=10**-1.6).log10() * 5).round() / 5, aspect="auto", interpolation="nearest")
axes.set(xlabel="decoded token", ylabel="layer")
axes.grid(False)
figure.colorbar(image, ax=axes, label="relative error, log10")
plt.show()
print("mean error in every fifth layer:", " ".join(f"{error:.2g}" for error in drifted.mean(dim=1)[::5].tolist()))

# %% [markdown]
# *Figure: the errors in the cache after 64 sparse steps. Each column is a token, and each row is a layer. The error is
# relative to the length of the exact key or value. Yellow is about 1: the error is as large as the key itself. The
# darkest colour is 0.025 and less.*
#
# ## Where the error begins
#
# The top row has no error beyond rounding. Layer 0 computes keys and values from the token and its position alone,
# before any attention. But then its attention skips most blocks, so its output is a little wrong. Layer 1 computes its
# keys and values from that output *and writes them into the cache*. From there on all layers are wrong:

# %%
assert drifted[0].max() < 1e-4
assert drifted[1:].min() > 10 * drifted[0].max()
print("the first decoded token, layers 0 to 4:", " ".join(f"{error:.2g}" for error in drifted[:5, 0].tolist()))

# %% [markdown]
# The first decoded token reads the exact prompt, and itself. A later token is wrong for two reasons: its own step skips
# blocks, *and* it reads earlier tokens that are already wrong. We can separate the two. Imagine a decoder that repairs
# its cache after every token: it takes a sparse step, then runs the same token through the model once more, densely,
# and overwrites its keys and values. The paper calls this [decode-only](../glossary.md#decode-only): only the decoding
# of a token is sparse, and what stays in the cache comes from a dense pass. So when a step begins, all earlier tokens
# are exact. Any error that this step writes, before the repair, comes only from the blocks that it skips itself.
#
# All tokens are known here. A step never needs a higher layer of an earlier token. So we can go layer by layer, and
# compute all tokens of a layer together, as in training. Every token chooses its own blocks, and a mask hides all other
# blocks from it. The library's `decode_at_once` does this. The first assertion below compares it with the 64 sparse
# steps above. (A *schedule* says how sparse steps and dense passes take turns. With "paper", every token first gets a
# sparse step, and a pass repairs it later. Tutorial 4 shows another schedule.)

# %%
never = replace(config, interval=None, schedule="paper")  # sparse steps, never repaired
repaired = replace(config, interval=1, schedule="paper")  # decode-only: repaired after every token
with torch.no_grad():
    decoded = {way: decode_at_once(model, reading.exact, way, n_prompt) for way in (never, repaired)}
total, own = (errors((torch.cat(d.keys), torch.cat(d.values)), n_prompt) for d in decoded.values())  # [layer, n] each
assert (total[:, :n_steps] - drifted).abs().median() < 1e-3, "the loop and the single pass agree"
print(f"mean error {total.mean():.2f}; of it the step's own {own.mean():.2f}, the rest is inherited")
assert own[:, 16:].mean() < total[:, 16:].mean(), "a step that reads wrong tokens writes larger errors"

# %% [markdown]
# ## What it costs
#
# Errors in the cache matter only if they change what the model predicts. So we compare each prediction $Q$ with the
# dense prediction $P$ by their Kullback-Leibler divergence (KL), $\sum_x P(x) \log (P(x)/Q(x))$ over the vocabulary. It
# is measured in nats, and 0 means equal. The loss of sparse decoding has two parts:
#
# - *[Step error](../glossary.md#step-error)* is the loss of decode-only. Its cache is exact, so this is the price of
#   skipping blocks in the present step.
# - The *cost of drift* is what sparse decoding loses beyond that. This is the price of having skipped blocks in earlier
#   steps.
#
# Step error is not the "own" error above. Step error is a loss of prediction, in nats. The own error is one of the keys
# and values that a step writes. It stays in the cache, and what later steps lose by reading it is cost of drift. So
# most of the error in the cache can be the steps' own, and most of the loss can be the cost of drift.


# %%
def judged(stream):
    """Judge decoding by its last hidden states → KL [n], and the tokens that it finds most likely as answers."""
    log_probs = model.output(stream.hidden[0, n_prompt:]).log_softmax(dim=-1)
    likeliest = [log_probs[place.start - n_prompt - 1 : place.stop - n_prompt - 1].argmax(dim=-1) for place in places]
    return divergence(reading.log_probs, log_probs), [each.tolist() for each in likeliest]


names = {"dense": reading.exact, "decode-only": decoded[repaired], "never repaired": decoded[never]}
loss, right = {}, {}
with torch.no_grad():
    for name, stream in names.items():
        loss[name], answers = judged(stream)
        marks = [found == tokens[place] for found, place in zip(answers, places, strict=True)]
        right[name] = sum(marks)
        shown = "  ".join(f"{'✓' if mark else '✗'}{decode(found)}" for mark, found in zip(marks, answers, strict=True))
        print(f"{name:14}  KL {loss[name].mean():.2f}   {right[name]} of 6:  {shown}")
assert loss["never repaired"].mean() > loss["decode-only"].mean() > 0.01
assert not is_real or right["never repaired"] < right["decode-only"] <= right["dense"]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.axvspan(1000 - n_prompt, len(continuation), color="0.92")
axes.text(1000 - n_prompt + 2, 0, "the questions", fontsize=8)
for name, style in (("never repaired", "-"), ("decode-only", "--")):
    axes.plot(loss[name].cumsum(dim=0), style, label=name)
axes.set(xlabel="decoded token", ylabel="KL from dense, summed [nats]")
axes.legend()
plt.show()

# %% [markdown]
# *Figure: the loss of both decoders along the same tokens, summed up. Both choose blocks by bounds and read equally
# many. The distance between the lines is the cost of drift. No repair of the cache can win back more than that.*
#
# More than half of the loss here is the cost of drift. It also costs four answers. With an exact cache, the same bounds
# find all six facts. The facts themselves lie in the prompt, which was exact all the time. But the words of the
# *questions* have wrong keys and values in the cache, and the last step of a question reads them.
#
# ## Is that luck?
#
# Six questions are few, and SmolLM2 is too slow to ask hundreds on a CPU. So the project ships a second model, a toy
# with one skill. We ask it for 290 values, and find the same ranking. It reads programs that assign values to names,
# and completes the asserted values:

# %%
from resa.reference.lab.carried import Checks, Way, marked
from resa.reference.lab.programs import UNSEEN, alias_program
from resa.reference.weights.checkpoint import shipped_checkpoint

toy, toy_tokenizer = load_model(shipped_checkpoint("carrying")), load_tokenizer()
seeds = [(0, 1025, index, UNSEEN) for index in range(4)]  # UNSEEN: seeds that training never drew
programs = [alias_program(toy_tokenizer, np.random.default_rng(seed), 1025) for seed in seeds]
print(toy_tokenizer.decode(programs[0].tokens[-35:-1]))

# %% [markdown]
# The line `body = fill` does not say which digit `body` has. The toy must look up `fill`. It can keep the digit only in
# the keys and values of this line. If a sparse step misses `fill`, the cache has a wrong value for `body`, and every
# later line that uses `body` is wrong too. We decode four programs along their true text, and count how many asserted
# digits are right. (`marked` computes all steps in one pass, as above.)

# %%
checks = Checks.of(programs, 256)  # the first 256 tokens of each are prefilled
toy_ways = {"decode-only": Way(repaired), "never repaired": Way(never)}
marks = marked(toy, programs, checks, list(toy_ways.values()), 256)
shares = {"dense": marks[None].mean()} | {name: marks[way].mean() for name, way in toy_ways.items()}
print(f"{len(checks.at)} values:", ", ".join(f"{name} {share:.1%} right" for name, share in shares.items()))
assert shares["dense"] > shares["decode-only"] > shares["never repaired"]

# %% [markdown]
# The toy shows the same ranking. How much drift costs depends on the model and on the task. [Evidence](../evidence.md)
# measures it for both models on many texts.
#
# Decode-only shows what an exact cache is worth. But it is not fast: it needs a dense pass after every token. **Can the
# cache be made exact again with fewer dense passes?**
#
# ## Exercises
#
# ### 1. How many layers deep?
#
# Let the first four layers attend densely: use the library's step with `dense_layers=4` in `ReSAConfig`. In which layer
# does the first error appear? Predict, then run it.

# %% tags=["hide-cell"]
cache.truncate(n_prompt)
for token in continuation[:8]:
    library_step(model, token, cache, replace(config, dense_layers=4))
written = (each[:, 0, :, n_prompt : cache.length] for each in (cache.keys, cache.values))
by_layer = errors(written, n_prompt).mean(dim=1)
print(" ".join(f"{error:.1g}" for error in by_layer[:8].tolist()))
assert by_layer[:5].max() < 1e-4 < by_layer[5]
# Layer 4 is the first to skip blocks, but it computes its own keys and values before its attention. Layer 5 is wrong.

# %% [markdown]
# ### 2. All blocks
#
# How large are the errors in the cache with `active_ratio=1.0`? Are they exactly zero?

# %% tags=["hide-cell"]
cache.truncate(n_prompt)
for token in continuation[:8]:
    sparse_step(token, cache, replace(config, active_ratio=1.0))
written = (each[:, 0, :, n_prompt : cache.length] for each in (cache.keys, cache.values))
all_blocks = errors(written, n_prompt).max()
print(f"{all_blocks:.0e}")
assert all_blocks < 1e-2
# A sparse step over all blocks is a dense step. The rest is rounding in float32: the sums have another order.

# %% [markdown]
# ### 3. Do dense steps write exact keys again?
#
# Suppose steps 0 to 9 are sparse and all later ones are dense, but nobody repairs tokens 0 to 9. Is the key of token 20
# exact?

# %% tags=["hide-cell"]
cache.truncate(n_prompt)
for token in continuation[:10]:
    sparse_step(token, cache, config)
prefill(model, continuation[10:32], cache)  # dense
written = (each[:, 0, :, n_prompt : cache.length] for each in (cache.keys, cache.values))
later = errors(written, n_prompt).mean(dim=0)
print(f"tokens 0 to 9: {later[:10].mean():.2g}, tokens 10 to 31: {later[10:].mean():.2g}")
assert later[10:].min() > 1e-4
# The error is smaller, but not zero. Dense steps read the whole cache, and a part of it is wrong. Only overwriting that
# part helps.

# %% [markdown]
# `resa exercise 3` lets you write the sparse attention yourself, and says what is still wrong with it.
#
# **Next:** [making the cache exact again](04_rectification.md).
