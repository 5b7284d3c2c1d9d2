# %% [markdown]
# # 10. The roofline: predicting the speed-up
#
# How much faster should rectified sparse decoding be? We can compute the answer from bytes alone, before we write a
# line of code. This tutorial does that. Then it compares the prediction with measurements on a GPU, finds where they
# differ, and explains the difference to within a few per cent.
#
# **What you will learn:**
#
# - what a [roofline](../glossary.md#roofline) is, and on which side of it each part of decoding lies,
# - the cost model of the paper (its equation 6), and what it leaves out: weights, and everything that is not bytes,
# - how to predict whole steps from timings of parts, and how to read the remainder.
#
# **Time:** 20 minutes to read, a few seconds to run. Nothing is timed here. The measurements are the recorded ones of
# [performance](../performance.md), read from their files. That page says how they were made.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt

from resa.fast.bench.layer import Shape, floors
from resa.reference import ReSAConfig
from resa.reference.lab.fidelity import read_ratio
from resa.results import recorded

plt.style.use("resa.reference.weights.assets.figure")
attention = recorded("attention.json")
models = {name: recorded(f"end_to_end/h100_{name}.json") for name in ("float16", "int4")}
settings = {name: value for name, value in attention["config"].items() if name != "dense_below"}  # no longer an option
config, shape = ReSAConfig(**settings), Shape(**attention["shape"])
print(f"{attention['device']}: copies at {attention['copy_tbs']} TB/s; one layer, commit {attention['commit']}")
for name, result in models.items():
    print(f"whole steps with {name} weights, commit {result['commit']}, copies at {result['copy_tbs']} TB/s")
    assert result["device"] == attention["device"]
    assert result["config"] == attention["config"]

# %% [markdown]
# ## Two ceilings
#
# A kernel cannot take less time than its bytes need at the memory's bandwidth (bytes per second). It also cannot take
# less than its arithmetic operations need at the peak rate (operations per second):
#
# $$ \mathrm{time} \ge \max\left(\frac{\mathrm{bytes}}{\mathrm{bandwidth}},
#    \frac{\mathrm{operations}}{\mathrm{peak}}\right)
#    \qquad\Longleftrightarrow\qquad
#    \frac{\mathrm{operations}}{\mathrm{time}} \le
#    \min\left(\frac{\mathrm{operations}}{\mathrm{bytes}} \cdot \mathrm{bandwidth}, \mathrm{peak}\right) $$
#
# Operations per byte are called the *intensity*. Plotted over it on logarithmic axes, the bound on the right has the
# shape of a roof. It is a slope where memory limits, and a ceiling where arithmetic does. Attention of f queries and G
# heads per cached token does $4 f G D$ operations for $4 D$ bytes of 16-bit keys and values, an intensity of $fG$.
# Scoring does one multiplication and one addition per bound of 2 bytes, an intensity of 1.

# %%
PEAK = 989e12  # operations per second: the datasheet's for 16-bit matrix products
rows = {(row["batch"], row["context"]): row for row in attention["rows"]}
group = shape.query_heads // shape.kv_heads
intensity = {
    "score": 1,
    "attend": group,
    "dense, this project's kernel": group,
    "rectify": config.interval * group,
}
print("8 sequences                       4K tokens   256K tokens, TFLOP/s and share of the roof")
reached = {}  # TFLOP/s
for part, per_byte in intensity.items():
    for context in (2**12, 2**14, 2**16, 2**18):
        size = floors(shape, config, 8, context)[part]
        reached[part, context] = size * per_byte / rows[8, context]["parts"][part]["us"] / 1e6
    bound = min(per_byte * attention["copy_tbs"], PEAK / 1e12)
    shares = [f"{reached[part, context]:6.1f} ({reached[part, context] / bound:4.0%})" for context in (2**12, 2**18)]
    print(f"{part.partition(',')[0]:8} {per_byte:3} operations per byte    {shares[0]}  {shares[1]}")
    assert reached[part, 2**18] < 1.1 * bound
    assert reached[part, 2**18] > 2 * reached[part, 2**12] or part != "attend"

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(5.6, 3.0))
roof = [0.5, PEAK / attention["copy_tbs"] / 1e12, 1000]
axis.plot(roof, [min(x * attention["copy_tbs"], PEAK / 1e12) for x in roof], color="C4")
for i, (part, per_byte) in enumerate(intensity.items()):
    # The two of one intensity are drawn side by side.
    x = per_byte * (1.12 if part.startswith("dense") else 0.9 if part == "attend" else 1)
    dots = [reached[part, context] for context in (2**12, 2**14, 2**16, 2**18)]
    axis.plot([x] * 4, dots, "o-", markersize=4, color=f"C{i}", label=part.partition(",")[0])
axis.set(xlabel="operations per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
axis.legend()
plt.show()

# %% [markdown]
# *Figure: recorded on an H100, 8 sequences. The grey line is the roof: copy bandwidth measured in the same run, and the
# datasheet's peak. Each column of dots is one kernel at 4K, 16K, 64K and 256K tokens, from below. Long caches bring
# every kernel near the slope. Short caches leave it far below. Rectification stands under the corner. It uses neither
# memory nor arithmetic in full.*
#
# So for one query per sequence, decoding is a matter of bytes, and we can forget arithmetic. A share slightly above
# 100 % is no mistake. A copy reads and writes, and reading alone is a little faster.
#
# ## Equation 6: the bytes of the KV cache
#
# Dense decoding reads the whole [KV cache](../glossary.md#kv-cache) for each token. Call these bytes 1. A sparse step
# reads the bounds, a share $\beta$, and the selected blocks, the [active ratio](../glossary.md#active-ratio) $p$. A
# [rectification](../glossary.md#rectification) reads everything once in $f$ tokens. The
# [schedule](../glossary.md#paper-schedule) of the paper therefore reads the share on the left.
# [This project's](../glossary.md#fused-schedule) has one sparse step fewer per cycle and reads the share on the right:
#
# $$ \text{paper: } \beta + p + \frac{1}{f} \qquad\qquad \text{fused: } \frac{(f - 1)(\beta + p) + 1}{f} $$
#
# A block has two bounds per channel, and its keys and values are $2b$ numbers per channel. So $\beta = 1/b$ if a step
# reads both bounds, $1/(2b)$ if it reads [only the one needed](08_fast_path.md), and half of that again in 8 bits.
# `read_ratio` is this formula. Its second argument is the share of the bounds' bytes that a step reads.

# %%
b, p, f = config.block_size, config.active_ratio, config.interval
schedules = [replace(config, schedule=schedule) for schedule in ("paper", "fused")]
for text, bounds in {"both bounds": 1, "the one needed": 1 / 2, "that in 8 bits": 1 / 4}.items():
    paper, fused = (read_ratio(each, bounds) for each in schedules)
    print(f"{text:15} paper {paper:.3f}, fused {fused:.3f}: at most {1 / fused:.1f} times as fast")
assert round(read_ratio(schedules[0]), 3) == round(1 / b + p + 1 / f, 3) == 0.194
assert round(read_ratio(schedules[0], 1 / 4), 3) == 0.147

# %% [markdown]
# The benchmark counts bytes with a function of its own, `floors`, block by block. Both agree where the formula holds,
# that is, where $p \cdot M$ is at least [`min_blocks`](../glossary.md#min-blocks). In a short cache the fewest blocks
# allowed are more than a tenth.

# %%
print("context   counted   eq. 6   measured (attention alone)")
for context in (2**10, 2**12, 2**14, 2**16, 2**18):
    parts = floors(shape, config, 8, context)
    counted = ((f - 1) * (parts["score"] + parts["attend"]) + parts["rectify"]) / f / parts["rectify"]
    predicted = read_ratio(schedules[1], 1 / 2)
    measured = rows[8, context]["resa_us"] / rows[8, context]["dense_us"]
    print(f"{context // 1024:6}K   {counted:7.3f} {predicted:7.3f}   {measured:.3f}")
    if p * context / b >= config.min_blocks:
        assert abs(counted - predicted) < 0.003
    assert measured > counted

# %% [markdown]
# Even for attention alone, the measurement comes near the prediction only at long contexts. At short contexts a sparse
# step consists of four kernels that must start and end, even if they read little. Eq. 6 also leaves out the append, the
# selection, and the arithmetic of the rectification.
#
# ## The weights count too
#
# Every step multiplies by every weight matrix, $W$ bytes, for any kind of attention. With the cache's bytes
# $C = 4 \cdot L \cdot B \cdot H_{kv} \cdot T \cdot D$ ($L$ layers, 16 bits) and the share $\sigma$ of eq. 6:
#
# $$ \text{speed-up} \;\le\; \frac{W + C}{W + \sigma C} $$
#
# This is Amdahl's law: the weights stay, even if $\sigma$ is small. The bandwidth has dropped out. As long as only
# bytes count, the ratio is the same on every GPU. The measured model has the shape of Qwen2.5-7B, with weights of 16
# and of 4 bits. All its layers share one layer's cache, so that 8 sequences of 256K tokens fit. (Each layer still reads
# all of it.)


# %%
def step_bytes(weights: str, batch: int, context: int) -> dict[str, float]:
    """Bytes per token of a dense step, and of an average ReSA step."""
    layers, parts = models[weights]["shape"]["n_layer"], floors(shape, config, batch, context)
    cached = ((f - 1) * (parts["score"] + parts["attend"]) + parts["rectify"]) / f
    loaded = models[weights]["weights"][weights]["bytes"]
    return {"dense": loaded + layers * parts["rectify"], "resa": loaded + layers * cached}


def limit(weights: str, batch: int, context: int) -> float:
    """The speed-up that bytes allow."""
    size = step_bytes(weights, batch, context)
    return size["dense"] / size["resa"]


measured = {
    (weights, row["batch"], row["context"]): row
    for weights, result in models.items()
    for row in result["rows"]
    if row["protocol"] == "shared"
}
for (weights, batch, context), row in measured.items():
    floor = row["floor_us"]["dense"] / row["floor_us"]["resa"]
    assert abs(limit(weights, batch, context) / floor - 1) < 1e-3, "the limit in the file is the one computed here"

for weights, batch, context in (("float16", 1, 2**12), ("float16", 8, 2**18), ("int4", 8, 2**16), ("int4", 8, 2**18)):
    ratio, most = measured[weights, batch, context]["ratio"], limit(weights, batch, context)
    print(
        f"{weights:7} {batch} × {context // 1024:3}K: limit {most:.2f}, measured {ratio:.2f}, {ratio / most:.0%} of it"
    )

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), sharey=True)
contexts = sorted({context for _, _, context in measured})
for axis, weights in zip(axes, models, strict=True):
    for batch, colour in ((1, "C0"), (8, "C1")):
        limits = [limit(weights, batch, context) for context in contexts]
        ratios = [measured[weights, batch, context]["ratio"] for context in contexts]
        axis.plot(contexts, limits, "--", color=colour, label=f"batch {batch}, limit by bytes")
        axis.plot(contexts, ratios, "o-", color=colour, markersize=4, label=f"batch {batch}, measured")
    axis.set(title=f"{weights} weights", xlabel="context (tokens)", xscale="log")
    axis.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
    axis.minorticks_off()
axes[0].set_ylabel("speed-up over dense")
axes[0].legend()
plt.show()

# %% [markdown]
# *Figure: whole decoding steps of a 7B model on an H100, recorded. Dashed: the limit by bytes. Solid: measured. The
# limit has the right shape but is too high, most of all with 4-bit weights.*
#
# The picture shows three things. With one short sequence there is nothing to gain, as predicted, because the cache is
# small beside the weights. (There the measured ratio may even exceed the limit, because dense decoding does not reach
# its own limit either.) Prediction and measurement rise together with batch and context. And smaller weights raise the
# limit more than the measurement. To see why, we look at the work of a step besides reading.
#
# ## Predicting from parts
#
# The benchmark also timed the other parts of a step: a layer's matrix products with the elementwise work between them,
# the output projection, and the choice of a token. It timed the products for the rows of a step and for the many more
# rows of a rectification. The other benchmark has the attention of one layer. So we can add up a whole step:
#
# $$ t_\mathrm{dense} = L\,(t_\mathrm{layer} + t_\mathrm{attention}) + t_\mathrm{output} + t_\mathrm{sampling} $$
#
# and the same for ReSA, with $t_\mathrm{layer}$ and $t_\mathrm{attention}$ averaged over a cycle of $f$ steps.

# %%
SAMPLING = "sampling, temperature 0.7, top_p 0.95"


def predicted_us(weights: str, batch: int, context: int) -> dict[str, dict[str, float]]:
    """µs per token of a dense step and of ReSA's, by part."""
    result, row = models[weights], rows[batch, context]
    us = {name: time["us"] for name, time in result["weights"][weights]["parts"][str(batch)].items()}
    layers = result["shape"]["n_layer"]
    products = {"dense": us["step: matrix products, per layer"]}
    whole = {"dense": us["step: with elementwise work, per layer"]}
    for into, name in ((products, "matrix products, per layer"), (whole, "with elementwise work, per layer")):
        into["resa"] = ((f - 1) * us[f"step: {name}"] + us[f"rectification: {name}"]) / f
    return {
        way: {
            "products": layers * products[way] + us["output projection"],
            "attention": layers * row[f"{way}_us"],
            "elementwise": layers * (whole[way] - products[way]),
            "sampling": us[SAMPLING],
        }
        for way in ("dense", "resa")
    }


def total(weights: str, batch: int, context: int, way: str) -> float:
    """Sum of the parts."""
    return sum(predicted_us(weights, batch, context)[way].values())


errors = {
    way: [
        total(*point, way) / (row["dense_us"] if way == "dense" else row["resa"]["us"]) - 1
        for point, row in measured.items()
    ]
    for way in ("dense", "resa")
}
for way, values in errors.items():
    print(f"{way:5}: the parts add up to {min(values):+.1%} to {max(values):+.1%} of what whole steps take")
    assert max(map(abs, values)) < 0.06

# %%
for weights in models:
    points = [point for point in measured if point[0] == weights]
    off = [total(*point, "dense") / total(*point, "resa") / measured[point]["ratio"] - 1 for point in points]
    print(f"{weights:7}: speed-up predicted from parts is off by {min(off):+.1%} to {max(off):+.1%}")
    assert max(map(abs, off)) < 0.06

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(3.6, 3.4))
for weights, colour in (("float16", "C0"), ("int4", "C1")):
    points = [point for point in measured if point[0] == weights]
    ratios = [measured[point]["ratio"] for point in points]
    sums = [total(*point, "dense") / total(*point, "resa") for point in points]
    axis.plot([limit(*point) for point in points], ratios, "o", color=colour, markersize=4, fillstyle="none")
    axis.plot(sums, ratios, "o", color=colour, markersize=4, label=f"{weights} weights")
axis.plot([1, 5.5], [1, 5.5], color="C4", linewidth=1)
axis.set(xlabel="predicted speed-up", ylabel="measured speed-up", xlim=(0.8, 5.6), ylim=(0.8, 5.6))
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# *Figure: every batch (1 to 8) and context (4K to 256K) that was measured, 40 points. Empty circles: predicted by
# bytes. Full circles: predicted by the sum of parts. On the line, prediction and measurement agree.*
#
# The parts explain the measurement. So they also show what lies between the limit by bytes and the measurement.
#
# ## Where prediction and measurement differ
#
# The next cell compares the bytes of each part with its time, for ReSA's step with 4-bit weights:

# %%
BYTES_OF = {"products": "weights", "attention": "cache"}


def excess(weights: str, batch: int, context: int) -> dict[str, float]:
    """µs of ReSA's step: its bytes at the speed of a copy, then the time of each part beyond that, and the rest."""
    result, point = models[weights], (weights, batch, context)
    loaded = result["weights"][weights]["bytes"]
    by_bytes = {"products": loaded, "attention": step_bytes(*point)["resa"] - loaded}
    by_bytes = {part: size / result["copy_tbs"] / 1e6 for part, size in by_bytes.items()}
    parts = predicted_us(*point)["resa"]
    beyond = {part: time - by_bytes.get(part, 0.0) for part, time in parts.items()}
    rest = measured[point]["resa"]["us"] - sum(parts.values())
    return {"bytes": sum(by_bytes.values()), **beyond, "not in any part": rest}


chosen = [(1, 2**12), (1, 2**18), (8, 2**14), (8, 2**16), (8, 2**18)]
names = [f"{batch} × {context // 1024}K" for batch, context in chosen]
bars = [excess("int4", *point) for point in chosen]
print("µs".ljust(10), *(f"{part:>16}" for part in bars[0]))
for name, bar in zip(names, bars, strict=True):
    print(name.ljust(10), *(f"{time:16.0f}" for time in bar.values()))
    assert abs(sum(bar.values()) - measured[("int4", *chosen[names.index(name)])]["resa"]["us"]) < 1
    assert bar["bytes"] > 0.35 * sum(bar.values())

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.4, 2.6))
left = [0.0] * len(chosen)
for part, colour in zip(bars[0], ("C4", "C0", "C1", "C2", "C3", "C5"), strict=True):
    widths = [max(0.0, bar[part]) / 1e3 for bar in bars]
    axis.barh(names, widths, left=left, color=colour, label=part)
    left = [start + width for start, width in zip(left, widths, strict=True)]
axis.set(xlabel="ms per step")
axis.invert_yaxis()
axis.grid(axis="y", visible=False)
axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.3))
plt.show()

# %% [markdown]
# *Figure: ReSA's step with 4-bit weights, recorded: its bytes at the speed of a copy, and the time on top. Names are
# batch × context.*
#
# Read from left to right:
#
# - **Products.** Weights of a quarter the size do not take a quarter of the time, because their kernels must also widen
#   them. And for the many rows of a rectification, arithmetic limits the products. The limit by bytes ignores that.
# - **Attention.** At short contexts, the kernels' start and end. At long contexts, the arithmetic of the rectification.
# - **Elementwise work** and **sampling** read next to no bytes and still take time. They are many small launches and a
#   sort of the vocabulary.
# - **Not in any part.** For one, the steps right after a rectification are slower than others
#   ([performance](../performance.md), *what was found*).
#
# Both ways of decoding have fixed costs. Dense decoding hides them behind its bytes. ReSA has fewer bytes left. The
# faster attention gets, the more everything else matters.
#
# ## Exercises
#
# **1.** Suppose attention cost nothing at all. How high could the speed-up get for 8 sequences of 256K tokens, by bytes
# and by the parts?

# %% tags=["hide-cell"]
for weights in models:
    size, loaded = step_bytes(weights, 8, 2**18)["dense"], models[weights]["weights"][weights]["bytes"]
    free = predicted_us(weights, 8, 2**18)["resa"] | {"attention": 0.0}
    ratio = total(weights, 8, 2**18, "dense") / sum(free.values())
    reached = measured[weights, 8, 2**18]["ratio"]
    print(f"{weights}: {size / loaded:.1f} by bytes, {ratio:.1f} by parts; measured, with attention, {reached:.2f}")
    assert ratio < size / loaded
# By bytes it is (W + C) / W. By parts it is a good deal less, because products, elementwise work and sampling stay.

# %% [markdown]
# **2.** Bounds in 8 bits halve $\beta$. Which speed-up do they promise for whole steps with 8 × 256K tokens? Which was
# measured?

# %% tags=["hide-cell"]
for weights in models:
    point = weights, 8, 2**18
    parts = floors(shape, config, 8, 2**18)
    saved = models[weights]["shape"]["n_layer"] * (f - 1) / f * (parts["score"] - parts["score, 8-bit bounds"])
    size, row = step_bytes(*point)["resa"], measured[point]
    print(
        f"{weights}: promised {size / (size - saved):.3f},"
        f" measured {row['resa']['us'] / row['resa, 8-bit bounds']['us']:.3f} times as fast"
    )
    assert 1 < row["resa"]["us"] / row["resa, 8-bit bounds"]["us"] < 1.1
# They promise a few per cent. With 16-bit weights about three quarters of that were measured, with 4-bit weights about
# half, because a part of the scoring time is not bytes. In return, a step may select other blocks (exercise 1 of
# tutorial 8).

# %% [markdown]
# **3.** With `interval` 64 instead of 32, by how much does the limit by bytes rise at 8 × 256K tokens and 4-bit
# weights? Is that worth twice the window in which the cache may [drift](../glossary.md#drift)?

# %% tags=["hide-cell"]
loaded, size = models["int4"]["weights"]["int4"]["bytes"], step_bytes("int4", 8, 2**18)["dense"]
cached = size - loaded
limits = {}
for n in (8, 16, 32, 64, 128):
    limits[n] = size / (loaded + read_ratio(replace(schedules[1], interval=n), 1 / 2) * cached)
print({n: round(value, 2) for n, value in limits.items()})
assert limits[64] / limits[32] < limits[16] / limits[8]
# The printed limits rise ever more slowly. The smaller 1/f is beside β + p, the less there is to save. Whether the
# longer window is worth it is a question of quality (the page on evidence), not of bytes.

# %% [markdown]
# **4.** By datasheet an A100 has 2.0 TB/s and an H100 has 3.35. How does that change the limit by bytes? Suppose all
# parts that are not bytes took as long as here. Would the measured ratio be higher or lower than on an H100?

# %% tags=["hide-cell"]
for bandwidth in (3.35, 2.0):
    slower = 3.35 / bandwidth
    times = {}
    for way in ("dense", "resa"):
        by_bytes = step_bytes("int4", 8, 2**16)[way] / models["int4"]["copy_tbs"] / 1e6
        times[way] = slower * by_bytes + total("int4", 8, 2**16, way) - by_bytes
    print(f"{bandwidth} TB/s: limit {limit('int4', 8, 2**16):.2f}, expected {times['dense'] / times['resa']:.2f}")
# The limit does not change, because it is a ratio of bytes. With slower memory the fixed costs weigh less, so the ratio
# moves towards the limit. (A real A100 is slower at everything else too.)

# %% [markdown]
# **Next:** [port it](11_port_it.md).
