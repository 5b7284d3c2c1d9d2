# %% [markdown]
# # 4. Rectification
#
# Sparse steps leave errors in the cache, and these cost SmolLM2 four of six answers. **Can the cache be made exact
# again with few dense passes?**
#
# Yes. Every $f$ tokens, one dense pass runs the newest $f$ tokens through the model once more, all at once, and
# overwrites their keys and values. This is [rectification](../glossary.md#rectification). In this tutorial you write
# the pass and the loop around it. You prove that the cache is exact afterwards. Then SmolLM2 answers from a tenth of
# its blocks.
#
# **Time:** fifteen minutes to read, less than a minute to run. It builds on [drift](03_drift.md).

# %%
from copy import deepcopy
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from resa.reference import ReSAConfig, generate, open_model, prefill, rectify, sparse_step
from resa.reference.lab.fidelity import divergence, kv_drift, read
from resa.reference.lab.parallel import decode_at_once

torch.set_num_threads(1)
b = 16

# %% tags=["hide-input"]
plt.style.use("resa.reference.weights.assets.figure")
n_layers, n_tokens, n_open = 5, 14, 5
with plt.rc_context({"path.sketch": (0.8, 60, 2)}):  # as if drawn by hand
    figure, axes = plt.subplots(figsize=(7.5, 2.4))
    for left, is_after in ((0, False), (19, True)):
        for layer in range(n_layers):
            for token in range(n_tokens):
                is_wrong = not is_after and token >= n_tokens - n_open and layer > 0
                colour = "C1" if is_wrong else "C0"
                axes.add_patch(plt.Rectangle((left + token, -layer), 0.8, 0.8, facecolor=colour, edgecolor="0.3"))
        axes.text(left + 4.4, 1.2, "exact", ha="center", fontsize=9)
        axes.text(left + 11.4, 1.2, "exact" if is_after else "the window", ha="center", fontsize=9)
    axes.annotate("", (18.7, -1.6), (14.2, -1.6), arrowprops={"arrowstyle": "->", "linewidth": 2})
    axes.text(16.4, -1.2, "dense pass", ha="center", fontsize=9)
    axes.text(-0.4, 0.4, "layer 0", ha="right", va="center", fontsize=8)
    axes.text(-0.4, -3.6, f"layer {n_layers - 1}", ha="right", va="center", fontsize=8)
    axes.set(xlim=(-3, 33.2), ylim=(-4.2, 2))
    axes.axis("off")
plt.show()

# %% [markdown]
# *Figure: the cache before and after a rectification. Each square is the key and the value of one token in one layer.
# Those of the newest tokens, the window, come from sparse steps. They are wrong (orange) in all layers except the
# first. The dense pass overwrites them in every layer.*
#
# We use the model, the text and the six questions of tutorial 3. A dense pass over everything gives an exact cache to
# compare with.

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


def open_cache(n_tokens, sketch_bits=None):
    """A cache that holds the first tokens, exactly: filled from the dense reading."""
    cache = model.new_cache(len(tokens), b, sketch_bits)
    for layer, (keys, values) in enumerate(zip(reading.exact.keys, reading.exact.values, strict=True)):
        cache.write(layer, 0, keys[:, :, :n_tokens], values[:, :, :n_tokens])
    cache.length = n_tokens
    return cache


tokens, places = ask(read_text(1000))
n_prompt = 872
reading = read(model, tokens, n_prompt)
exact = open_cache(len(tokens))
prompt, continuation = tokens[:n_prompt], tokens[n_prompt:]

# %% [markdown]
# ## The dense pass
#
# The [window](../glossary.md#window) is all tokens that sparse steps have written since the cache was last exact. The
# pass feeds them all at once. So attention has several queries now. Each of them may see the tokens up to its own
# position:


# %%
def causal_attention(query, keys, values):
    """The newest Q tokens attend to all tokens up to themselves: [Hq, Q, D], [Hkv, T, D] twice → [Hq, Q, D]."""
    n, T = query.shape[1], keys.shape[1]
    is_future = torch.arange(T) > torch.arange(T - n, T)[:, None]  # [Q, T]
    group = query.unflatten(0, (keys.shape[0], -1))  # [Hkv, G, Q, D]
    logits = group @ keys[:, None].mT * query.shape[-1] ** -0.5  # [Hkv, G, Q, T]
    weights = logits.masked_fill(is_future, -float("inf")).softmax(dim=-1)
    return (weights @ values[:, None]).flatten(0, 1)


@torch.no_grad()
def dense_pass(window, cache):
    """Run the newest cached tokens through the model again, and overwrite what they left in the cache."""
    start = cache.length - len(window)

    def attend(layer, query, key, value):  # [1, Hq, Q, D], [1, Hkv, Q, D], [1, Hkv, Q, D] → [1, Hq, Q, D]
        cache.write(layer, start, key, value)  # first overwrite, then attend
        keys, values = (kept[layer, 0, :, : cache.length] for kept in (cache.keys, cache.values))
        return causal_attention(query[0], keys, values)[None]

    model.hidden_states(torch.tensor([window]), torch.arange(start, cache.length)[None], attend)


# %% [markdown]
# We take 32 sparse steps, and then one pass. The library's `kv_drift` measures the error of each token: the largest
# relative error of its keys and values in all layers. (Tutorial 3 took the mean over layers, so its numbers are
# smaller.)

# %%
config = ReSAConfig(block_size=b, active_ratio=0.1, min_blocks=4)
window = continuation[:32]
at = torch.arange(n_prompt, n_prompt + len(window))
cache = open_cache(n_prompt)
for token in window:
    sparse_step(model, token, cache, config)
drifted = deepcopy(cache)  # for later
dense_pass(window, cache)
before, after = kv_drift(drifted, exact, at), kv_drift(cache, exact, at)
print(f"error of a token: before {before.mean():.2f} on average, after the pass at most {after.max():.0e}")
assert before.min() > 1e-2
assert after.max() < 1e-3

library = deepcopy(drifted)
rectify(model, window, library, n_drifted=len(window))
assert kv_drift(library, cache, at).max() < 1e-3, "the library's function does the same"

# %% [markdown]
# ## Why it is exact
#
# Only rounding is left. The pass does not *reduce* the error: it *replaces* the keys and values, and the new ones do
# not depend on the old ones. To show this, we fill the window with NaN before the pass:

# %%
destroyed = deepcopy(drifted)
destroyed.keys[:, :, :, at] = float("nan")
destroyed.values[:, :, :, at] = float("nan")
dense_pass(window, destroyed)
assert torch.equal(destroyed.keys[:, :, :, : cache.length], cache.keys[:, :, :, : cache.length])
assert torch.equal(destroyed.values[:, :, :, : cache.length], cache.values[:, :, :, : cache.length])
print("a window of NaN becomes the same keys and values, bit for bit")

# %% [markdown]
# So the pass reads only two things:
#
# 1. the *ids* of the window's tokens, which are integers and cannot drift, and
# 2. the cache *before* the window.
#
# Suppose that this part is exact. In layer 0, the window's keys and values follow from the ids and positions alone. The
# pass writes them, and then attends to exact keys and values only. So the input of layer 1 is exact, and so are its
# keys and values. The same holds for layer 2, and so on to the last layer.
#
# And the part before the window *is* exact. The first window follows the prompt, which was prefilled densely. After
# each rectification, the cache is exact up to the end of the window, and there the next window begins. So it goes on,
# from window to window. This is law 6 of the project: *right after a rectification, the cache equals the cache of a
# dense prefill of the same tokens.*
#
# That is the proof. It never asks how the sparse steps chose their blocks, so it holds for every choice. We also test
# it in float64, where rounding is tiny, over two windows in a row:

# %%
model64 = deepcopy(model).double()
n_short, f = 96, 4
exact64, cache64 = (model64.new_cache(n_short + 2 * f, b) for _ in range(2))
prefill(model64, tokens[: n_short + 2 * f], exact64)
prefill(model64, tokens[:n_short], cache64)
for start in range(n_short, n_short + 2 * f, f):
    for token in tokens[start : start + f]:
        sparse_step(model64, token, cache64, config)
    since = torch.arange(n_short, start + f)
    wrong = kv_drift(cache64, exact64, since).max()
    rectify(model64, tokens[start : start + f], cache64, n_drifted=f)
    right = kv_drift(cache64, exact64, since).max()
    print(f"{start + f - n_short:2} tokens decoded: largest error {wrong:.2f}, after rectification {right:.0e}")
    assert wrong > 1e-2
    assert right < 1e-9

# %% [markdown]
# (0e+00: here the pass even makes the same bits. On another machine the last digits may differ.)
#
# ## The loop
#
# Rectified decoding is Algorithm 1 of the paper. Take sparse steps and count them. When the window has $f$ tokens, run
# the pass and count from zero again:


# %%
def decode_rectified(cache, logits, n_tokens, f):
    """Write n_tokens, the likeliest each time, and rectify after every f of them → tokens."""
    chosen, w = [], 0
    while True:
        chosen.append(int(logits.argmax()))
        if len(chosen) == n_tokens:
            return chosen
        logits = sparse_step(model, chosen[-1], cache, config)
        w += 1
        if w == f:
            dense_pass(chosen[-f:], cache)
            w = 0


short = prompt[:150]
own = model.new_cache(200, b)
written = decode_rectified(own, prefill(model, short, own), 12, f=5)
[generation] = generate(model, [short], 12, replace(config, interval=5, schedule="paper"))
assert generation.tokens == written, "the library's loop writes the same"
assert kv_drift(generation.cache, own, torch.arange(len(short), own.length)).max() < 1e-3
print(f"{decode(written)!r}, and {generation.n_drifted} token waits in the window")

# %% [markdown]
# The loop chooses 12 tokens and feeds 11 of them. Two windows of 5 were rectified, and one token waits for the next
# pass.
#
# ## The price, and the interval
#
# A dense step reads the whole cache for every token. A rectification reads it once for $f$ tokens. So the loop reads,
# per token and as a share of dense decoding:
#
# $$\underbrace{1/b}_{\mathrm{bounds}} + \underbrace{p}_{\mathrm{blocks}} + \underbrace{1/f}_{\mathrm{rectification}}$$
#
# (A block's bounds are two vectors, and its keys and values are $2b$ vectors. The fast path reads only the bound that
# each channel needs, so there the first term is $1/(2b)$.)
#
# A short [interval](../glossary.md#interval) $f$ leaves fewer wrong tokens in the cache, but it costs more. We decode
# all tokens after the prompt in four ways. (`decode_at_once` computes all steps in one pass, as in tutorial 3.)

# %%
streams = {}
for f in (None, 32, 8, 1):  # None: never. 1: after every token, which is decode-only in this schedule.
    way = replace(config, interval=f, schedule="paper")
    with torch.no_grad():
        streams["bounds", f] = decode_at_once(model, reading.exact, way, n_prompt)
    print(f"f = {f!s:>4}: {1 / b + config.active_ratio + (1 / f if f else 0):.3f} of dense decoding's cache bytes")

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7, 2.8))


def errors_of(stream):
    """Error of every decoded token, as its step wrote it: [n]."""
    found = []
    for written, right in ((stream.keys, reading.exact.keys), (stream.values, reading.exact.values)):
        written, right = torch.cat(written), torch.cat(right)[:, :, n_prompt:]
        found.append(((written - right).norm(dim=-1) / right.norm(dim=-1)).amax(dim=(0, 1)))
    return torch.maximum(*found).tolist()


for f in (None, 32, 8):
    waiting, curve = [], []
    for step, error in enumerate(errors_of(streams["bounds", f]), start=1):
        waiting = [*waiting, error]
        if len(waiting) == f:
            waiting = []  # rectified
        curve.append(sum(waiting) / step)
    axes.plot(range(1, len(curve) + 1), curve, label="never rectified" if f is None else f"every {f} tokens")
axes.set(xlabel="tokens decoded", ylabel="mean error in the cache", xlim=(0, None), ylim=(0, 1.25))
axes.legend(ncols=3, loc="upper right")
plt.show()

# %% [markdown]
# *Figure: mean error of all decoded tokens in the cache. In two of the runs, each rectification brings it down to zero.
# Later peaks are mostly lower, because the mean is taken over more and more exact tokens. But the wrong ones are the
# newest, and every step reads the newest block. So rectification lowers this error more than the loss.*
#
# ## Does it still answer?
#
# Now we reach the goal of the four tutorials. All rows below, except the dense one, attend to a tenth of the blocks.
# They choose them by bounds, or by the key sketches of tutorial 2. We count the right answers. We also measure the loss
# in nats (KL against dense decoding): first over the 128 tokens before the questions, then over the questions.
# (Tutorial 3's losses are means over both.)

# %%
for f in (None, 32, 8):
    way = replace(config, interval=f, schedule="paper", selection="sketch")
    with torch.no_grad():
        streams["sketches", f] = decode_at_once(model, reading.exact, way, n_prompt)

# %% tags=["hide-input"]
loss, right, first = {}, {}, 1000 - n_prompt  # the first token of the questions


@torch.no_grad()
def judged(stream):
    """Judge decoding by its last hidden states → KL [n], and the tokens that it finds most likely as answers."""
    log_probs = model.output(stream.hidden[0, n_prompt:]).log_softmax(dim=-1)
    likeliest = [log_probs[place.start - n_prompt - 1 : place.stop - n_prompt - 1].argmax(dim=-1) for place in places]
    return divergence(reading.log_probs, log_probs), [each.tolist() for each in likeliest]


print("blocks by  rectified    KL text  KL questions  answers")
for (chosen_by, f), stream in {("all", None): reading.exact, **streams}.items():
    kl, answers = judged(stream)
    marks = [found == tokens[place] for found, place in zip(answers, places, strict=True)]
    right[chosen_by, f], loss[chosen_by, f] = sum(marks), float(kl.mean())
    when = "(dense)" if chosen_by == "all" else {None: "never", 1: "every token"}.get(f, f"every {f}")
    shown = " ".join(f"{'✓' if mark else '✗'} {decode(it)!r}" for mark, it in zip(marks, answers, strict=True))
    print(f"{chosen_by:9}  {when:11} {kl[:first].mean():8.3f} {kl[first:].mean():13.3f}  {sum(marks)} of 6: {shown}")

# %%
assert loss["bounds", None] > loss["bounds", 8] > loss["bounds", 1] > 0.01
assert loss["sketches", None] > loss["sketches", 8]
assert loss["bounds", 8] > loss["sketches", 8]
assert not is_real or right["bounds", None] < right["bounds", 1]
assert not is_real or right["bounds", None] < right["sketches", 32]

# %% [markdown]
# With bounds, rectification brings answers back, and a short interval brings back more. A long interval helps less,
# because the question's words are often not yet repaired when the model must answer. On two other pages,
# `topics["customization"]` and `topics["formatstrings"]`, an interval of 32 brings back none.
#
# With sketches, all six answers are right, even without rectification. Here rectification lowers the loss, and it is
# not needed for the answers.
#
# So the model does answer when it attends to a tenth of its blocks: in every row with sketches, and by bounds when
# every token is repaired. The proof above says that the cache is exact after each pass. The table says how far the
# predictions are from dense ones.
#
# What remains, plainly:
#
# - **A tenth of the blocks is not a tenth of the bytes.** A step also reads the bounds of every block, and every 32
#   tokens a pass reads the whole cache. Together this is about a fifth of what dense decoding reads. On a CPU, at this
#   length, that is no faster. [Performance](../performance.md) says when it is faster on a GPU, and by how much.
# - **Step error remains.** Even over an exact cache, a sparse step predicts from a tenth of the blocks. Of the rows
#   with bounds, the one repaired after every token loses least. All that it loses is step error. (The library's
#   default, "fused", is the schedule of exercise 2. It predicts one token in $f$ densely, so there an interval of 1 is
#   dense decoding.)
# - **The newest tokens are still wrong.** Up to $f - 1$ tokens wait for the next pass, and the next steps read them.
# - **A chosen token stays.** The cache is exact *for the tokens that were written*. Dense decoding might have written
#   others.
# - **This is one small model and one text.** [Evidence](../evidence.md) has many texts, with confidence intervals. It
#   also has the toy of tutorial 3, for which rectification repairs most of the drift.
#
# A better choice of blocks lowers the loss more than rectification does, because it lowers step error and drift. **Why
# do bounds choose badly, and how do sketches choose well?**
#
# ## Exercises
#
# ### 1. Only half of the window
#
# To save time, someone rectifies only the newer half of the window. Is that half exact afterwards? Try it: `drifted`
# has a window of 32 tokens.

# %% tags=["hide-cell"]
half = deepcopy(drifted)
dense_pass(window[16:], half)
after = kv_drift(half, exact, at)
print(f"older half: {after[:16].mean():.2f}, newer half: {after[16:].mean():.2f}; all 32 at once: ", end="")
print(f"{kv_drift(cache, exact, at).max():.0e}")
assert after[16:].min() > 1e-3
# No. A dense pass over a wrong cache is wrong too. The pass must reach back to where the cache is exact. If it misses
# only the oldest token, the whole window stays wrong. If it misses only the newest token, that one stays wrong. Every
# later pass reads it, so no later window becomes exact.

# %% [markdown]
# ### 2. Use the logits
#
# Our `dense_pass` makes no use of its predictions. Write a loop that takes $f - 1$ sparse steps, then one pass, again
# and again. The pass takes this window *and the token that was just chosen*, and predicts the next one. (`rectify` also
# takes tokens that are not cached yet. It returns the logits after the last token.) This is the [fused
# schedule](../glossary.md#fused-schedule), the library's default.


# %% tags=["hide-cell"]
def decode_fused(cache, logits, n_tokens, f):
    """Write n_tokens. Every f-th one is fed by a dense pass, which rectifies the window as well → tokens."""
    chosen, w = [], 0
    while True:
        chosen.append(int(logits.argmax()))
        if len(chosen) == n_tokens:
            return chosen
        if w == f - 1:
            logits = rectify(model, chosen[-f:], cache, n_drifted=w)
            w = 0
        else:
            logits = sparse_step(model, chosen[-1], cache, config)
            w += 1


own.truncate(0)
written = decode_fused(own, prefill(model, short, own), 12, f=5)
assert written == generate(model, [short], 12, replace(config, interval=5))[0].tokens
# Each cycle has one sparse step fewer, and one prediction in f is dense: it has no step error.

# %% [markdown]
# `resa exercise 4` lets you write the decoding loop yourself, and says what is still wrong with it.
#
# **Next:** [choosing better](05_choosing_better.md).
