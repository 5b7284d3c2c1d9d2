# %% [markdown]
# # 9. Launches and waits
#
# The kernels are fast now. But PyTorch launches them one by one from Python, and each launch costs some microseconds of
# host time. A decoding step of a 28-layer model has hundreds of launches. This tutorial shows how to do without most of
# that time.
#
# **What you will learn:**
#
# - what a [CUDA graph](../glossary.md#cuda-graph) holds, and what must not change in it,
# - how decoding goes on without waiting for the host.
#
# **Time:** 10 minutes to read, 20 seconds to run. Kernels run in Triton's interpreter, on a CPU, because it sees every
# launch. Their times on a GPU come from the recorded results of the benchmark.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import sys
from collections import Counter
from itertools import pairwise

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from resa import fast, reference
from resa.reference import GPT, GPTConfig, ReSAConfig
from resa.results import recorded

torch.manual_seed(0)
attention = recorded("attention.json")
rows = {row["context"]: row for row in attention["rows"] if row["batch"] == 8}
print(f"recorded: {attention['device']}, triton {attention['triton']}, commit {attention['commit']}")

# %% [markdown]
# ## Two measures
#
# *A CUDA graph* records all launches of a step once, with their arguments, and replays them with a single call. In
# return, nothing about the step may change between replays: it has the same kernels, the same addresses and the same
# grid. Everything that does change (lengths, windows, which sequence is finished) must be data that kernels read from
# memory.
#
# *No synchronisation.* Wherever Python asks for a number (`int(tensor)`, `if tensor.any()`), it waits until the GPU has
# caught up. Then the GPU waits for the next launch. The reference does that for every token. The next cell counts, by
# module, the reads for four tokens, a whole cycle of this small random model, on either path:


# %%
class HostReads(TorchDispatchMode):
    """Count, by module of this project, how often the host asks for a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.by = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe(1)
            while not frame.f_globals.get("__name__", "").startswith("resa."):
                frame = frame.f_back
            self.by[frame.f_globals["__name__"].removeprefix("resa.")] += 1
        return function(*arguments, **(options or {}))


tiny = GPTConfig(
    vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, hidden_size=32, intermediate_size=64,
)  # fmt: skip
model = GPT(tiny).requires_grad_(False)
for parameter in model.parameters():
    parameter.normal_(std=0.3)  # as initialised it would attend to everything alike
prompts = [torch.randint(64, (50,)).tolist(), torch.randint(64, (33,)).tolist()]
decoding = ReSAConfig(active_ratio=0.5, min_blocks=2, interval=4)

tokens, extra = {}, {}
for name, package in {"reference": reference, "fast path": fast}.items():
    reads = {}
    for n in (4, 8):
        with HostReads() as counter:
            tokens[name] = [generation.tokens for generation in package.generate(model, prompts, n, decoding)]
        reads[n] = counter.by
    extra[name] = reads[8] - reads[4]  # the reads for four more tokens: a cycle
    print(f"{name}: {extra[name].total()} reads, {dict(extra[name].most_common())}")
assert tokens["reference"] == tokens["fast path"]
assert set(extra["fast path"]) == {"fast.blocks"}
print("and the same tokens:", tokens["fast path"][0])

# %% [markdown]
# The reads in `fast.blocks` are of a tensor that lies on the CPU on purpose. It says how wide the lists are, which
# depends on the cache's capacity alone. Nothing waits for it. In a graph the width is fixed, so the read does not occur
# at all.
#
# ## The kind of the next step
#
# The host must know which kernels to launch, so it must know whether the next step is sparse or a dense pass. It need
# not ask the GPU. All sequences of a batch begin with an exact cache and keep the same rhythm, so the host counts
# along. Each kind of step becomes one graph. A sequence that has met a stop token stays in the batch, but a mask keeps
# it out of every kernel.


# %%
def kinds_of(config: ReSAConfig, n_steps: int) -> list[str]:
    """The kinds of the first steps, counted on the host."""
    kinds, n_drifted = [], 0
    for _ in range(n_steps):
        if config.schedule == "fused" and config.is_pass_due(n_drifted):
            kinds.append("fused")
            n_drifted = 0
            continue
        n_drifted += 1
        is_full = config.is_pass_due(n_drifted)  # schedule "paper": the pass comes after this step
        kinds.append("sparse, rectify" if is_full and config.schedule == "paper" else "sparse")
        n_drifted = 0 if is_full and config.schedule == "paper" else n_drifted
    return kinds


print(kinds_of(decoding, 9))

# %% [markdown]
# The chosen tokens stay on the device as well, in a tensor `[B, N]`. The host reads them back once at the end. If
# there is a callback or a stop token, it reads them once per interval.
#
# ## The launches of one step
#
# The interpreter sees every launch. Here are the launches of each step of the two-layer model, and the kinds that they
# show. A sparse step attends with the kernel `sparse`, and a dense pass with the kernel `dense`.

# %%
launched, plain_call = [], GridExecutor.__call__


def watched_call(self, *arguments, **options):
    launched.append(self.fn.__name__.strip("_").removesuffix("_kernel"))
    return plain_call(self, *arguments, **options)


GridExecutor.__call__ = watched_call
try:
    fast.generate(model, prompts, 8, decoding)
finally:
    GridExecutor.__call__ = plain_call
ends = [0, *(place + 1 for place, name in enumerate(launched) if name == "note")]  # the last kernel of every step
passes = [launched[start:end] for start, end in pairwise(ends)]
steps = passes[1:]  # the first one is the prefill
seen = ["sparse" if "sparse" in step else "fused" for step in steps]
print("launches:", [len(step) for step in steps])
print("a sparse step:", ", ".join(steps[0]))
assert seen == kinds_of(decoding, len(steps))
assert Counter(steps[0])["sparse"] == tiny.n_layer
assert steps[0][0] == "plan"

# %% [markdown]
# Between these launches lie the four matrix products of each layer. `plan` and `note` at both ends keep the books. They
# find which sequences take part, where the token goes, which token was chosen, and which sequences have ended. In torch
# these were some sixty operations, about 200 µs per step ([the log](../log.md)). As two kernels they hardly show. For
# few KV heads the append shares a kernel with the scoring (`append_and_score`). Every step attends to the newest block
# for any score. So scoring may stop before that block, and the two do not depend on each other.
#
# On an H100 the gaps *between* kernels of a graph can shrink further. A kernel may be placed while the last programs of
# its predecessor still run. It waits for them before it reads their results ([launch.py](../../fast/gpu/launch.py)).
# The recorded results show the gain: whole cycles, in the order of the decode loop, beside the sum of their parts, each
# timed alone.

# %%
print("context   sum of parts   whole cycles   dense")
for context in (2**11, 2**12, 2**14, 2**16, 2**18):
    row = rows[context]
    print(f"{context // 1024:6}K {row['sum_us']:11.1f} µs {row['resa_us']:11.1f} µs {row['dense_us']:7.1f} µs")
assert rows[2**12]["resa_us"] < rows[2**12]["sum_us"]
slower = [row for row in attention["rows"] if row["resa_us"] > row["dense_us"]]
faster = {  # by batch: the context from which on ReSA's attention is not slower; 1K is the shortest one measured
    batch: 2 * max((row["context"] for row in slower if row["batch"] == batch), default=512)
    for batch in (1, 2, 4, 8, 16)
}
print("ReSA's attention is not slower from so many tokens on:", faster)

# %% [markdown]
# At short contexts a cycle takes less than its parts, because they overlap. At the longest it takes a little more,
# because a part that is timed alone finds some of its input warm. [The next tutorial](10_roofline.md) adds all this up
# for whole models.
#
# ## Exercises
#
# **1.** How many graphs does schedule `"paper"` need, and what does each hold?

# %% tags=["hide-cell"]
kinds = kinds_of(ReSAConfig(interval=4, schedule="paper"), 8)
print(kinds)
assert len(set(kinds)) == 2
# It needs two: a sparse step, and a sparse step followed by a rectification whose logits are thrown away. Under "fused"
# the second is a dense pass that also feeds the pending token, so a cycle has one sparse step fewer.

# %% [markdown]
# **2.** How many launches of this project's kernels does a sparse step of a 28-layer model have, if its launches grow
# with the layers as they do here? The matrix products come on top.

# %% tags=["hide-cell"]
per_layer = {name: count // tiny.n_layer for name, count in Counter(steps[0]).items()}
per_step = {name: count % tiny.n_layer for name, count in Counter(steps[0]).items()}
print("per layer:", +Counter(per_layer))
print("per step: ", +Counter(per_step))
print("28 layers:", 28 * sum(per_layer.values()) + sum(per_step.values()), "launches")

# %% [markdown]
# **Next:** [the roofline](10_roofline.md).
