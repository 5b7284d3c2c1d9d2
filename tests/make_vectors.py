"""Conformance vectors, as the oracle makes them: `python tests/make_vectors.py` writes tests/vectors.

Cases of one operation form a ladder: each asks for one thing more than those above it, its *clause*, so that the first
one that a port fails says what is wrong. Inputs are short binary fractions and results are rounded to float32, so that
every machine writes the same bytes. Whoever changes what a vector means raises VERSION.
"""

import functools
import json
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.numpy import save

import oracle
from resa.conformance.grades import codes_of, run_sizes
from tolerances import eps, logit_size, lse_floor, output_floor, score_floor

VERSION = 4
FOLDER = Path(__file__).parent / "vectors"
INF, NAN = math.inf, math.nan
D, BLOCK = 16, 8  # small, and what kernels that need powers of two can take; some cases have 32 and 16
HUGE = 2.0**104  # garbage that is finite: times a query of about 1 it is a logit of 5e30
MANY = 37  # blocks: whole tiles of 4, 8, 16 or 32, and some more
REPEATED = [[0, 3, 4, 7, 10], [2, 5, 9]]  # groups of blocks that hold the same
at = np.s_  # a place in a tensor


def draw(rng, *shape):
    """Numbers of about normal distribution, whole multiples of 2**-20: exact in float32, and in nothing narrower."""
    return (np.round(2**20 * rng.standard_normal(shape)) / 2**20).astype(np.float32)


def coarse(rng, *shape, scale):
    """Numbers of about normal distribution, whole multiples of 1/64: exact in print too."""
    return (np.round(64 * scale * rng.standard_normal(shape)) / 64).astype(np.float32)


def past(keys, lengths, value):
    """A copy of keys [B, Hkv, T_max, D] with `value` in every slot at or past the length."""
    keys = keys.copy()
    for s, length in enumerate(lengths):
        keys[s, :, length:] = value
    return keys


def put(inputs, name, *changes):
    """The inputs, with other numbers in one of its tensors: (place, value) for each change."""
    for place, value in changes:
        inputs[name][place] = value
    return inputs


# Inputs of the operations.


def keys_of(rng, lengths, kv_heads=1, capacity=None, garbage=None, head_dim=D, block_size=BLOCK):
    keys = draw(rng, len(lengths), kv_heads, capacity or max(lengths), head_dim)
    keys = keys if garbage is None else past(keys, lengths, garbage)
    return {"keys": keys, "lengths": lengths, "block_size": block_size}


def newest_twice(inputs, before):
    """The last token's key is that of another one: who stops one token early is told so by a later case."""
    inputs["keys"][:, :, -1] = inputs["keys"][:, :, before]
    return inputs


def bounds_of(rng, lengths, kv_heads=1, group=1, **more):
    keys = keys_of(rng, lengths, kv_heads, **more)
    bounds = oracle.block_bounds(**keys).astype(np.float32)
    query = draw(rng, len(lengths), kv_heads * group, keys["keys"].shape[3])
    return {"query": query, "bounds": bounds, "lengths": lengths, "block_size": keys["block_size"]}


def opposed(inputs):
    """Heads q and -q."""
    inputs["query"][:, 1] = -inputs["query"][:, 0]
    return inputs


def scores_of(rng, blocks, *, kv_heads=1, capacity=None, ratio=0.25, min_blocks=2, local_blocks=1, lengths=None):
    """Distinct scores, any two at least 1/16 apart, for sequences of so many whole blocks."""
    width = capacity or max(blocks)
    scores = np.stack([[rng.permutation(width) for _ in range(kv_heads)] for _ in blocks]) / 16.0 - width / 32
    config = {
        "block_size": BLOCK,
        "active_ratio": ratio,
        "min_blocks": min_blocks,
        "local_blocks": local_blocks,
    }
    lengths = [n * BLOCK for n in blocks] if lengths is None else lengths
    return {"scores": scores.astype(np.float32), "lengths": lengths, "config": config}


def both_signs(inputs):
    """The first sequence's scores, and the same less 1, which are all negative."""
    return with_scores(inputs, lambda scores: np.stack((scores[0], scores[0] - 1)))


def with_scores(inputs, change):
    """The inputs, with the scores that `change` makes of theirs."""
    return inputs | {"scores": change(inputs["scores"]).astype(np.float32)}


def cache_of(rng, lengths, kv_heads=1, group=1, capacity=None, garbage=None, head_dim=D):
    shape = len(lengths), kv_heads, capacity or max(max(lengths), 1), head_dim
    keys, values = draw(rng, *shape), draw(rng, *shape)
    if garbage is not None:
        keys, values = past(keys, lengths, garbage), past(values, lengths, garbage)
    query = draw(rng, len(lengths), kv_heads * group, head_dim)
    return {"query": query, "keys": keys, "values": values, "lengths": lengths}


def sparse_of(rng, lengths, indices, block_size=BLOCK, **more):
    inputs = cache_of(rng, lengths, **more)
    inputs["indices"] = np.array(indices, np.int32)
    return {**inputs, "block_size": block_size}


def dense_of(rng, lengths, n_queries, query_lengths=None, **more):
    inputs = cache_of(rng, lengths, **more)
    batch, heads, head_dim = inputs["query"].shape
    inputs["query"] = draw(rng, batch, heads, n_queries, head_dim)
    return {**inputs, "query_lengths": query_lengths}


def faint(inputs):
    """The last token weighs next to nothing: who leaves it out is told so by a later case."""
    inputs["keys"][:, :, -1] = -4 * inputs["query"].reshape(inputs["keys"][:, :, -1].shape)
    return inputs


def abyss(inputs, sign):
    """All logits the same, ±2**122: one channel, powers of two, and no sum or product above 2**124."""
    inputs["query"][:], inputs["keys"][:] = 0.0, 0.0
    inputs["query"][..., 0], inputs["keys"][..., 0] = 2.0**62, sign * 2.0**62
    return inputs


def unseen(inputs, *changes):
    """The inputs with other keys and values where nothing should look: (place, key, value) for each change."""
    for place, key, value in changes:
        inputs["keys"][place], inputs["values"][place] = key, value
    return inputs


def huge(inputs, *places):
    """The inputs with finite keys where nothing should look, whose logits, of every head, are above all others."""
    inputs["query"][..., 0] = 1.0
    one_channel = HUGE * (np.arange(inputs["keys"].shape[3]) == 0)
    return unseen(inputs, *((place, one_channel, HUGE) for place in places))


def rising(inputs, *newest):
    """One channel, short fractions, so that all logits are exact; and the last keys are these."""
    keys = np.round(16 * inputs["keys"][..., 0]) / 16
    keys[..., -len(newest) :] = newest
    inputs["query"][:], inputs["keys"][:] = 0.0, 0.0
    inputs["query"][..., 0], inputs["keys"][..., 0] = 1.0, keys
    return inputs


def channels_of(*keys, head_dim=D):
    """One sequence, one KV head: a key for each mapping from channels to numbers, 0 elsewhere."""
    inputs = {"keys": np.zeros((1, 1, len(keys), head_dim), np.float32)}
    for t, key in enumerate(keys):
        for channel, number in key.items():
            inputs["keys"][0, 0, t, channel] = number
    return inputs


def rows_of(rng, batch, kv_heads, tokens, **more):
    return {"keys": draw(rng, batch, kv_heads, tokens, D), **more}


def sketches_of(rng, lengths, kv_heads=1, group=1, bits=2, capacity=None, head_dim=D, block_size=BLOCK):
    keys = draw(rng, len(lengths), kv_heads, capacity or max(lengths), head_dim)
    codes, scales = oracle.sketch_keys(keys, bits)
    query = draw(rng, len(lengths), kv_heads * group, head_dim)
    rest = {"lengths": lengths, "block_size": block_size}
    return {"query": query, "codes": codes, "scales": scales.astype(np.float32), **rest}


def repeated_bounds(inputs):
    """Inputs whose blocks hold the same within each group of REPEATED."""
    for first, *others in REPEATED:
        inputs["bounds"][..., others] = inputs["bounds"][..., [first]]
    return inputs


def repeated_sketches(inputs):
    """Inputs whose blocks hold the same within each group of REPEATED."""
    for name in ("codes", "scales"):
        blocks = np.split(inputs[name], inputs[name].shape[2] // BLOCK, axis=2)  # views
        for first, *others in REPEATED:
            for block in others:
                blocks[block][...] = blocks[first]
    return inputs


def sketch_garbage(inputs, *values):
    """Other codes past every length, and one of the values there for the scales of each sequence."""
    for s, (length, value) in enumerate(zip(inputs["lengths"], values, strict=True)):
        inputs["codes"][s, :, length:], inputs["scales"][s, :, length:] = 0b10010011, value
    return inputs


def huge_sketches(inputs):
    """Huge scales past every length; there one of two opposite codes has a logit far above all others, for any head."""
    for s, length in enumerate(inputs["lengths"]):
        inputs["codes"][s, :, length:], inputs["scales"][s, :, length:] = 0b10010011, HUGE
        inputs["codes"][s, :, length + 1 :: 2] ^= 0xFF
    return inputs


def sketch_abyss(inputs, sign):
    """All logits the same, ±3·2**119: one channel, powers of two, and no sum or product above 2**125."""
    query = np.zeros_like(inputs["query"])
    query[..., 0] = sign * 2.0**60
    inputs["codes"][...] = oracle.sketch_keys(channels_of({0: 1.0})["keys"])[0]
    inputs["scales"][...] = 2.0**60
    return inputs | {"query": query}


# Operation: its ladder of (name, law, what the case says, inputs drawn from a generator).
CASES = {
    "block_bounds": [
        ("one_block", "2.1 eq. 3",
         "lo, at index 0, is the smallest key of a block per channel, hi, at 1, the largest",
         lambda rng: put(newest_twice(keys_of(rng, [8]), 0), "keys", (at[..., 2], -1.5), (at[..., 5], 1.5))),
        ("heads_and_blocks", "2.1 layout",
         "the result is [B, Hkv, 2, D, M], blocks last, each from its own keys",
         lambda rng: newest_twice(keys_of(rng, [24, 24], kv_heads=3), -2)),
        ("partial_last_block", "2.1 partial block",
         "the tokens before the length take part, and no slot at or past it",
         lambda rng: put(keys_of(rng, [19, 17, 21], kv_heads=2, capacity=24, garbage=50.0), "keys",
                         (at[0, :, 20::2], -50.0), (at[1, :, 18::2], -50.0), (at[2, :, 22::2], -50.0))),
        ("past_the_end", "2.1 past the end",
         "blocks past the end have lo = +inf and hi = -inf, a length of 0 has no others",
         lambda rng: keys_of(rng, [0, 1, 7, 8, 9], capacity=24, garbage=0.0)),
        ("capacity_between_blocks", "2.1 layout",
         "M = ceil(T_max / b): the capacity need not be a multiple of the block size",
         lambda rng: keys_of(rng, [41, 20, 12], capacity=41, garbage=7.0, head_dim=32, block_size=16)),
        ("garbage_past_the_end", "law 5 inertness",
         "slots at or past the length never take part, NaN and infinity in them included",
         lambda rng: put(keys_of(rng, [19, 9], kv_heads=2, capacity=24, garbage=NAN), "keys",
                         (at[0, :, 20:22], INF), (at[1, 0, 9:12], -INF))),
        ("infinite_keys", "2.1 infinite keys",
         "infinite keys are keys: they are bounds",
         lambda rng: put(keys_of(rng, [24]), "keys", (at[0, 0, 3, 2], INF), (at[0, 0, 12, 5], -INF))),
        ("nan_in_a_valid_key", "2.1 NaN keys",
         "NaN in a valid key makes both bounds of its channel in its block NaN",
         lambda rng: put(keys_of(rng, [24], kv_heads=2), "keys", (at[0, 1, 11, 4], NAN))),
    ],
    "score_blocks": [
        ("one_head", "2.2 eq. 4",
         "one query head: the sum over channels of max(q·lo, q·hi), without the softmax scale",
         lambda rng: bounds_of(rng, [MANY * BLOCK])),
        ("mean_of_the_group", "2.2 pooling",
         "the pooled query is the mean of the group's heads",
         lambda rng: bounds_of(rng, [32], group=3)),
        ("groups_in_order", "2.2 group order",
         "query head h belongs to KV head h // G",
         lambda rng: bounds_of(rng, [32, 32], kv_heads=2, group=3)),
        ("wider_heads", "2.2 eq. 4",
         "a score sums all channels, be there 16 or 32, and knows blocks of 16 tokens",
         lambda rng: bounds_of(rng, [64, 64], kv_heads=2, group=4, head_dim=32, block_size=16)),
        ("score_past_the_end", "2.2 past the end",
         "blocks past the end score -inf",
         lambda rng: bounds_of(rng, [0, 1, 8, 9, 24], kv_heads=2, group=2, capacity=32)),
        ("bounds_garbage_past_the_end", "law 5 inertness",
         "what bounds hold past the end does not matter, NaN included",
         lambda rng: put(bounds_of(rng, [9, 24], capacity=32), "bounds", (at[0, ..., 2:], NAN), (at[1, ..., 3:], INF))),
        ("opposed_heads", "2.2 pooling",
         "heads q and -q pool to zero: such a group scores 0 everywhere",
         lambda rng: opposed(bounds_of(rng, [32], group=2))),
        ("zero_times_infinity", "2.2 zero times infinity",
         "0 · ±inf is 0 in a score; an infinite bound counts elsewhere",
         lambda rng: put(put(bounds_of(rng, [32], group=2), "query", (at[..., 3], [[1.0, -1.0]]), (at[..., 5], 1.0)),
                         "bounds", (at[..., 0, 3, 1], -INF), (at[..., 1, 3, 2], INF), (at[..., 1, 5, 3], INF))),
        ("nan_bounds", "2.2 NaN bounds",
         "NaN bounds make their block's score NaN, and no other's",
         lambda rng: put(bounds_of(rng, [32], group=2), "bounds", (at[..., 4, 1], NAN))),
        ("opposite_infinities", "2.2 NaN bounds",
         "a term of +inf and one of -inf make a score NaN, as their sum does",
         lambda rng: put(put(bounds_of(rng, [32]), "query", (at[..., 2:4], 1.0)), "bounds",
                         (at[..., 1, 2, 1], INF), (at[..., :, 3, 1], -INF), (at[..., 1, 2, 3], INF))),
        ("nan_bounds_at_a_zero", "2.2 NaN bounds",
         "0 · NaN is NaN: NaN bounds count where the pooled query is 0 as well",
         lambda rng: put(put(bounds_of(rng, [32], group=2), "query", (at[..., 4], [[1.0, -1.0]])),
                         "bounds", (at[..., 4, 1], NAN))),
        ("score_groups_of_one", "2.2 group order",
         "a group may be one head: query head h is KV head h's own",
         lambda rng: bounds_of(rng, [32, 20], kv_heads=3, capacity=32)),
        ("equal_blocks", "2.2 equal blocks",
         "blocks of equal bounds score equal, bit for bit, wherever they stand",
         lambda rng: repeated_bounds(bounds_of(rng, [88, 88], kv_heads=2, group=3))),
    ],
    "select_blocks": [
        ("highest", "2.3 eq. 5",
         "the highest scores are taken, and the newest block (in whatever order)",
         lambda rng: both_signs(scores_of(rng, [13, 13]))),
        ("ascending", "2.3 order",
         "indices ascend",
         lambda rng: both_signs(scores_of(rng, [13, 13]))),
        ("each_for_itself", "2.3 layout",
         "every sequence and KV head selects for itself",
         lambda rng: put(scores_of(rng, [13, 13], kv_heads=3), "scores", (at[..., -1], -9.0))),
        ("newest_blocks", "2.3 local blocks",
         "the newest local_blocks blocks are in whatever they score, and count toward n",
         lambda rng: put(scores_of(rng, [15, 15], local_blocks=2, lengths=[14 * BLOCK + 3, 15 * BLOCK]), "scores",
                         (at[0, :, -2:], -9.0), (at[1, :, -2:], 9.0))),
        ("share_rounded_up", "2.3 count",
         "n = ceil(p·M) where that is more than min_blocks, M counting a partial block",
         lambda rng: scores_of(rng, [26, 26], ratio=0.28, lengths=[26 * BLOCK, 25 * BLOCK + 1])),
        ("exact_product", "2.3 exact products",
         "ceil(p·M) is taken as ceil(p·M - 1e-9): 0.28 · 25 is 7, in float64 a little more",
         lambda rng: scores_of(rng, [25], ratio=0.28)),
        ("exact_product_in_float64", "2.3 exact products",
         "float64 it must be: in float32 0.3 · 50 is more than 15",
         lambda rng: scores_of(rng, [50], ratio=0.3)),
        ("almost_an_exact_product", "2.3 exact products",
         "the allowance is 1e-9, no more: 0.2000000004 · 25 is 5 + 1e-8, so 6",
         lambda rng: scores_of(rng, [25], ratio=0.2000000004)),
        ("as_good_as_an_exact_product", "2.3 exact products",
         "and no less: 0.20000000002 · 25 is 5 + 5e-10, so 5",
         lambda rng: scores_of(rng, [25], ratio=0.20000000002)),
        ("at_least_min_blocks", "2.3 count",
         "n is at least min_blocks",
         lambda rng: scores_of(rng, [20], ratio=0.05, min_blocks=4, local_blocks=2)),
        ("no_more_than_there_are", "2.3 count",
         "n is at most M: a short cache is attended whole",
         lambda rng: scores_of(rng, [3], min_blocks=16)),
        ("fewer_than_local_blocks", "2.3 local blocks",
         "there may be fewer blocks than local_blocks asks for",
         lambda rng: scores_of(rng, [2], min_blocks=4, local_blocks=3)),
        ("padded", "2.3 padding",
         "n follows each sequence's own length; -1 pads the shorter lists at the end",
         lambda rng: scores_of(rng, [3, 20, 9], kv_heads=2)),
        ("no_blocks", "2.3 padding",
         "no blocks, no indices: a length of 0 gives -1 alone",
         lambda rng: scores_of(rng, [12, 1], lengths=[96, 0])),
        ("never_past_the_end", "2.3 past the end",
         "blocks past the end are never taken, whatever they score",
         lambda rng: put(scores_of(rng, [5, 9], capacity=12), "scores", (at[0, :, 5:], INF), (at[1, :, 9:], NAN))),
        ("scores_close_together", "2.3 order of scores",
         "scores are compared as they are: one may lead by the last bit of float32",
         lambda rng: with_scores(scores_of(rng, [24]), lambda scores: 1 + scores * 2.0**-19)),  # 2**-23 apart
        ("ties", "2.3 ties",
         "of equal scores the lower block index wins",
         lambda rng: put(with_scores(scores_of(rng, [16, 16], ratio=0.5), lambda scores: np.round(scores * 4)),
                         "scores", (1, 2.5))),
        ("zeros_of_both_signs", "2.3 ties",
         "-0.0 equals +0.0, so that the lower index wins between them",
         lambda rng: put(scores_of(rng, [12]), "scores",
                         (at[0, 0], [-1, -0.0, 0.0, -0.0, 0.0, 0.0, -1, -0.0, 0.0, -1, -1, -1]))),
        ("infinite_scores", "2.3 order of scores",
         "infinities rank by value",
         # In the second sequence more than there is room for beside the newest block.
         lambda rng: put(scores_of(rng, [12, 12]), "scores",
                         (at[0, 0, [1, 4, 8]], [-INF, INF, INF]), (at[1, 0, [1, 4, 8]], INF))),
        ("nan_scores", "2.3 order of scores",
         "NaN ranks below every number and above no block: it is taken last",
         lambda rng: put(scores_of(rng, [8, 8], ratio=0.5), "scores",
                         (at[0, 0, [0, 3, 5]], NAN), (at[1, 0, :7], [NAN, NAN, NAN, NAN, NAN, -INF, NAN]))),
        ("nan_before_the_end", "2.3 past the end",
         "not even where what is left scores NaN",
         lambda rng: put(scores_of(rng, [8], capacity=12, ratio=0.5), "scores",
                         (at[0, 0, [0, 1, 2, 4, 5, 6]], NAN), (at[0, 0, 8:], -INF))),
    ],
    "sparse_attention": [
        ("sparse_one_head", "2.4 eq. 2",
         "softmax of q·k·D**-0.5 over the selected tokens, then the weighted sum of values",
         lambda rng: faint(sparse_of(rng, [16], [[[0, 1]]]))),
        ("sparse_log_sum_exp", "2.4 log-sum-exp",
         "the log-sum-exp is the natural one, of the scaled logits",
         lambda rng: faint(sparse_of(rng, [16], [[[0, 1]]]))),
        ("some_blocks", "2.4 eq. 2",
         "tokens of blocks that are not selected do not take part",
         lambda rng: sparse_of(rng, [112], [[[1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]]])),
        ("sparse_groups", "2.4 group order",
         "query head h reads KV head h // G, and the G heads of a group share a selection",
         lambda rng: sparse_of(rng, [40, 40], [[[0, 2, 4], [1, 2, 4]], [[1, 3, 4], [0, 1, 4]]], kv_heads=2, group=3)),
        ("sparse_wider_heads", "2.4 eq. 2",
         "the scale is D**-0.5, be D 16 or 32, and block i begins at token i·b",
         lambda rng: sparse_of(rng, [80, 80], [[[0, 3, 4]], [[1, 2, 4]]], 16, group=4, head_dim=32)),
        ("sparse_partial_last_block", "2.4 partial block",
         "the tokens before the length take part, and no slot at or past it",
         lambda rng: sparse_of(rng, [35, 33], [[[0, 2, 4]], [[1, 3, 4]]], group=2, capacity=40, garbage=3.0)),
        ("sparse_padding", "2.4 padding",
         "-1 stands for nothing",
         lambda rng: sparse_of(rng, [40, 24], [[[0, 2, 4, -1]], [[1, 2, -1, -1]]], group=2, capacity=40)),
        ("any_order", "2.4 padding",
         "the order of the indices does not matter, nor where -1 stands",
         lambda rng: sparse_of(rng, [40, 24], [[[4, -1, 0, 2]], [[-1, 2, -1, 1]]], group=2, capacity=40)),
        ("index_past_the_end", "2.4 past the end",
         "an index past the end contributes nothing",
         lambda rng: sparse_of(rng, [24, 9, 40], [[[0, 2, 3, 9]], [[1, 2, 4, 100]], [[0, 2, 5, -1]]],
                               group=2, capacity=40)),
        ("index_far_past_the_end", "2.4 past the end",
         "however far past: an index times the block size may leave 32 bits",
         lambda rng: sparse_of(rng, [24, 9, 24],
                               [[[0, 2, 2**28, -1]], [[1, 2**29, 2**30, -1]], [[2, 2**29 + 1, 2**31 - 1, -1]]],
                               group=2, capacity=40)),
        ("nothing_selected", "2.4 nothing visible",
         "no visible token gives zeros and a log-sum-exp of -inf, not NaN",
         lambda rng: sparse_of(rng, [24, 0, 9], [[[-1, -1]], [[0, -1]], [[3, -1]]], group=2, capacity=40)),
        ("sparse_garbage", "law 5 inertness",
         "NaN and infinity in blocks not selected, or past the length, change nothing",
         lambda rng: unseen(sparse_of(rng, [35, 9], [[[0, 2, 4]], [[1, -1, -1]]], group=2, capacity=40, garbage=NAN),
                            (at[0, :, 8:16], NAN, NAN), (at[1, :, :8], INF, INF))),
        ("sparse_large_logits", "2.4 large logits",
         "large logits do not overflow: the largest is subtracted first",
         lambda rng: abyss(sparse_of(rng, [35], [[[-1, -1, 0, 4]]], group=2, capacity=40), 1)),
        ("sparse_logits_below_any_sentinel", "2.4 true masks",
         "masking is true -inf: logits may lie below any finite sentinel",
         lambda rng: abyss(sparse_of(rng, [35], [[[-1, -1, 0, 4]]], group=2, capacity=40, garbage=3.0), -1)),
        ("sparse_huge_garbage", "law 5 inertness",
         "finite garbage as well, however large its logits: the maximum is that of visible tokens alone",
         lambda rng: huge(sparse_of(rng, [35, 20], [[[0, 2, 4]], [[1, 2, -1]]], group=2, capacity=40),
                          at[0, :, 8:16], at[0, :, 24:32], at[0, :, 35:], at[1, :, :8], at[1, :, 20:])),
        ("sparse_groups_of_one", "2.4 group order",
         "a group may be one head: query head h is KV head h's own",
         lambda rng: sparse_of(rng, [40, 27], [[[0, 2, 4], [1, 2, 4], [0, 3, 4]], [[1, 3, -1], [0, 3, -1], [2, 3, -1]]],
                               kv_heads=3)),
    ],
    "dense_attention": [
        ("dense_one_query", "2.5 eq. 2",
         "one query, the newest token: softmax of q·k·D**-0.5 over the whole cache",
         lambda rng: faint(dense_of(rng, [77], 1))),
        ("dense_log_sum_exp", "2.5 log-sum-exp",
         "the log-sum-exp is the natural one, of the scaled logits",
         lambda rng: faint(dense_of(rng, [77], 1))),
        ("window", "2.5 causality",
         "query i of Q sees the keys up to and including its own, the window is the newest Q",
         lambda rng: dense_of(rng, [41], 35)),
        ("dense_groups", "2.5 group order",
         "query head h reads KV head h // G",
         lambda rng: dense_of(rng, [13, 13], 3, kv_heads=2, group=3)),
        ("dense_wider_heads", "2.5 eq. 2",
         "the scale is D**-0.5, be D 16 or 32",
         lambda rng: dense_of(rng, [29], 2, group=4, head_dim=32)),
        ("dense_ragged", "2.5 positions",
         "the window ends at each sequence's own length",
         lambda rng: dense_of(rng, [13, 4, 21], 4, group=2, garbage=3.0)),
        ("shorter_windows", "2.5 positions",
         "query i stands at lengths - query_lengths + i",
         lambda rng: dense_of(rng, [13, 9, 21], 4, [4, 1, 3], group=2, garbage=3.0)),
        ("rows_past_the_window", "2.5 rows that mean nothing",
         "rows at or past query_lengths give zeros and -inf",
         lambda rng: dense_of(rng, [13, 9, 21], 4, [4, 0, 3], group=2, garbage=3.0)),
        ("negative_positions", "2.5 rows that mean nothing",
         "queries at negative positions give zeros and -inf",
         lambda rng: dense_of(rng, [2, 0], 4, group=2, capacity=9, garbage=3.0)),
        ("windows_longer_than_the_cache", "2.5 rows that mean nothing",
         "and so they do where query_lengths is more than there are tokens",
         lambda rng: dense_of(rng, [2, 0, 1, 9], 4, [3, 2, 4, 3], group=2, capacity=12, garbage=3.0)),
        ("queries_that_mean_nothing", "2.5 rows that mean nothing",
         "whatever the query holds in such rows, NaN and infinity included",
         lambda rng: put(dense_of(rng, [13, 9, 2], 4, [3, 1, 4], group=2, garbage=3.0), "query",
                         (at[0, :, 3:], NAN), (at[1, :, 1:], INF), (at[2, :, :2], NAN))),
        ("dense_garbage", "law 5 inertness",
         "NaN and infinity past the length change nothing, for one query as for more",
         lambda rng: unseen(dense_of(rng, [13, 4, 9], 1, group=2, capacity=20, garbage=NAN),
                            (at[1, :, 4:12], INF, -INF), (at[2, :, 9:], -INF, INF))),
        ("dense_large_logits", "2.5 large logits",
         "large logits do not overflow: the largest is subtracted first",
         lambda rng: abyss(dense_of(rng, [13], 4, group=2, capacity=20, garbage=3.0), 1)),
        ("dense_logits_below_any_sentinel", "2.5 true masks",
         "masking is true -inf: logits may lie below any finite sentinel",
         lambda rng: abyss(dense_of(rng, [13], 4, group=2, capacity=20, garbage=3.0), -1)),
        ("dense_huge_garbage", "law 5 inertness",
         "finite garbage as well, however large its logits: the maximum is that of visible tokens alone",
         lambda rng: huge(dense_of(rng, [13, 4, 9], 4, group=2, capacity=20),
                          at[0, :, 13:], at[1, :, 4:], at[2, :, 9:])),
        ("newer_tokens_huge", "2.5 causality",
         "the maximum of a query is that of the keys it sees: newer ones may have far larger logits",
         lambda rng: rising(dense_of(rng, [13], 4, group=2), HUGE / 16, HUGE / 4, HUGE)),
        ("dense_groups_of_one", "2.5 group order",
         "a group may be one head: query head h is KV head h's own",
         lambda rng: dense_of(rng, [13, 9], 3, kv_heads=3)),
    ],
    # Up to the packing, neighbours that share a byte have one level: their order in it does not matter.
    "sketch_keys": [
        ("two_channels", "2.6 rotation",
         "signs of the channels, then a Hadamard transform: two channels are then in all, as their sum or difference",
         lambda rng: channels_of({4: 1.0, 8: 3.0}, {8: 3.0, 12: 1.0}, {4: -3.0, 12: 1.0}, {4: 0.5, 8: 1.5})),
        ("four_levels", "2.6 code",
         "levels 0 to 3: r is compared with -s, 0 and s, which is 0.9957 times the root of the mean of r²",
         lambda rng: channels_of({0: 1.0, 4: 0.75, 8: 0.25}, {0: 0.25, 4: -0.5, 12: 1.0}, {0: -1.0, 8: 0.875},
                                 {4: 3.0, 8: 0.625, 12: 1.0}, {8: -2.0}, {0: 1.0, 4: 2.0**-7}, {0: 1.0, 8: 2.0**-8})),
        ("on_a_threshold", "2.6 code",
         "r = 0 belongs to the level above it: r >= 0",
         lambda rng: channels_of({0: 1.0, 4: 1.0}, {0: 2.0, 4: 2.0, 8: -2.0, 12: 2.0}, {8: -0.5, 12: 0.5})),
        ("first_channel_lowest", "2.6 packing",
         "channel d takes two bits of byte d // 4, the first channel the lowest ones",
         lambda rng: rows_of(rng, 1, 1, 4)),
        ("scale_of_a_key", "2.6 scale",
         "the scale is <r, c> / <c, c>, r having the key's own length and c = u - 1.5",
         lambda rng: rows_of(rng, 1, 1, 4)),
        ("sketches_of_heads", "2.6 layout",
         "codes are [B, Hkv, T_max, D·bits/8] and scales [B, Hkv, T_max]: every key has its own",
         lambda rng: rows_of(rng, 2, 3, 2)),
        ("one_bit", "2.6 one bit",
         "bits=1: u = [r >= 0], c = 2u - 1, eight channels in a byte",
         lambda rng: rows_of(rng, 1, 2, 3, bits=1)),
        ("key_of_zeros", "2.6 scale",
         "a key of zeros has scale 0, not NaN; its r lie on all thresholds, so above them",
         lambda rng: put(rows_of(rng, 1, 1, 2), "keys", (at[0, 0, 1], 0.0))),
        ("keys_not_finite", "2.6 NaN keys",
         "a key that is not finite has codes 0 and scale NaN, and spoils no other",
         lambda rng: put(rows_of(rng, 1, 2, 4), "keys",
                         (at[0, 0, 1, 3], NAN), (at[0, 1, 0, 5], INF), (at[0, 1, 2, :2], -INF))),
    ],
    "score_sketch": [
        ("estimated_mass", "2.7 estimate",
         "softmax of a·<r_q, c>·D**-0.5 over the tokens, r_q the rotated query, summed over each block",
         lambda rng: sketches_of(rng, [32 * BLOCK])),
        ("heads_add_up", "2.7 mass",
         "every head of the group has its own softmax, and their masses add up: G in all",
         lambda rng: sketches_of(rng, [32], group=3)),
        ("sketch_groups", "2.7 group order",
         "query head h belongs to KV head h // G",
         lambda rng: sketches_of(rng, [32, 32], kv_heads=2, group=3)),
        ("sketch_wider_heads", "2.7 estimate",
         "the scale is D**-0.5, be D 16 or 32, and blocks may have 16 tokens",
         lambda rng: sketches_of(rng, [64], group=2, head_dim=32, block_size=16)),
        ("sketch_partial_last_block", "2.7 partial block",
         "the tokens before the length take part in the softmax, and no slot at or past it",
         lambda rng: sketches_of(rng, [33, 37], kv_heads=2, group=2, capacity=40)),
        ("sketch_past_the_end", "2.7 past the end",
         "blocks past the end score -inf, a length of 0 has no others",
         lambda rng: sketches_of(rng, [0, 1, 8, 9], group=2, capacity=20)),
        ("sketch_garbage", "law 13 inertness",
         "what codes and scales hold past the length does not matter, NaN and infinity included",
         lambda rng: sketch_garbage(sketches_of(rng, [9, 19, 13], group=2, capacity=24), NAN, INF, -3e38)),
        ("lost_tokens", "2.7 NaN scales",
         "a token whose scale is NaN leaves the softmax, its block scores NaN, and no other does; a scale of 0 stays",
         lambda rng: put(sketches_of(rng, [24, 10], group=2), "scales",
                         (at[0, 0, [3, 21]], NAN), (at[0, 0, 10], 0.0), (at[1, 0, :], NAN))),
        ("score_of_one_bit", "2.7 one bit",
         "D/8 bytes a key are one bit per channel: c = 2u - 1",
         lambda rng: sketches_of(rng, [24], group=2, bits=1)),
        ("sketch_large_logits", "2.7 large logits",
         "large logits do not overflow: the largest is subtracted first",
         lambda rng: sketch_abyss(sketches_of(rng, [19], group=2, capacity=24), 1)),
        ("sketch_logits_below_any_sentinel", "2.7 true masks",
         "masking is true -inf: logits may lie below any finite sentinel",
         lambda rng: sketch_abyss(sketches_of(rng, [19], group=2, capacity=24), -1)),
        ("sketch_huge_garbage", "law 13 inertness",
         "finite scales as well, however large: the maximum is that of the tokens before the length alone",
         lambda rng: huge_sketches(sketches_of(rng, [9, 19, 13], group=2, capacity=24))),
        ("sketch_groups_of_one", "2.7 group order",
         "a group may be one head: query head h is KV head h's own",
         lambda rng: sketches_of(rng, [24, 17], kv_heads=3)),
        ("equal_blocks_of_sketches", "2.7 equal blocks",
         "blocks of equal codes and scales score equal, bit for bit, wherever they stand",
         lambda rng: repeated_sketches(sketches_of(rng, [88, 88], kv_heads=2, group=3))),
    ],
}  # fmt: skip
# What is compared: both results of an attention unless one is named; of a selection the sets, or the lists as they are.
COMPARED = {
    "sparse_one_head": ["out"],
    "dense_one_query": ["out"],
    "sparse_log_sum_exp": ["lse"],
    "dense_log_sum_exp": ["lse"],
    "highest": ["set"],
    "two_channels": ["codes"],
    "four_levels": ["codes"],
    "on_a_threshold": ["codes"],
    "first_channel_lowest": ["codes"],
}
# Blocks whose scores must be equal bit for bit, for every sequence and KV head.
EQUAL = {"equal_blocks": REPEATED, "equal_blocks_of_sketches": REPEATED}
CLEARANCE = 1e-4  # relative: from every rotated channel to every threshold of its code, so that codes must be equal
# Cases whose logits are exact: one channel, and powers of two or short fractions.
EXACT = (
    *(f"{name}_large_logits" for name in ("sparse", "dense", "sketch")),
    *(f"{name}_logits_below_any_sentinel" for name in ("sparse", "dense", "sketch")),
    "newer_tokens_huge",
)
WITHIN_THE_WINDOW = ("shorter_windows",)  # rows past it are the next case's matter
SAME_INPUTS = {
    "sparse_log_sum_exp": "sparse_one_head",
    "dense_log_sum_exp": "dense_one_query",
    "ascending": "highest",
    "scale_of_a_key": "first_channel_lowest",
}


def attention_allowance(inputs, name):
    """Allowed errors of out and lse, by the formulas of tolerances.py for float32; an exact logit has no error, L = 0.

    Where out must be zero and lse infinite, nothing is allowed; what is not compared, anything. Garbage counts as 0.
    """
    lengths, finite = inputs["lengths"], {}
    for tensor in ("query", "keys", "values"):
        is_garbage = ~np.isfinite(inputs[tensor]) | (np.abs(inputs[tensor]) == HUGE) & (name not in EXACT)
        finite[tensor] = np.where(is_garbage, 0, inputs[tensor]).astype(np.float64)
    rest = {key: value for key, value in inputs.items() if key not in finite}
    operation = oracle.sparse_attention if "indices" in inputs else oracle.dense_attention
    positive, lse = operation(**{**finite, "values": np.abs(finite["values"])}, **rest, return_lse=True)
    size = np.zeros(lse.shape) if name in EXACT else logit_size(finite["query"], finite["keys"], lengths)
    about = torch.float32, size, finite["query"].shape[-1], max(lengths)
    of_out = output_floor(*about)[..., None] * positive
    of_lse = np.where(np.isfinite(lse), lse_floor(*about, lse, math.e), 0)
    if name in WITHIN_THE_WINDOW:
        is_past = np.arange(lse.shape[2]) >= np.array(inputs["query_lengths"])[:, None, None]
        return np.where(is_past[..., None], INF, of_out), np.where(is_past, INF, of_lse)
    return of_out, of_lse


def clearance(keys, bits=2):
    """Distance of the nearest rotated channel from a threshold, relative to the step s; exact zeros do not count."""
    nearest = INF
    for key in keys.reshape(-1, keys.shape[-1]):
        if np.isfinite(key).all():
            rotated = np.abs(oracle.rotate(key))
            step = 0.9957 * math.sqrt(np.mean(rotated**2))
            distances = np.stack((rotated, np.abs(rotated - step) if bits == 2 else rotated))[:, rotated > 0]
            nearest = min(nearest, distances.min(initial=INF) / (step or 1.0))
    return nearest


def scale_allowance(keys, codes):
    """Allowed error of scales: m + 2 roundings of at most eps/2 · ρ per channel, D + 1 of the sum and the quotient."""
    keys = np.where(np.isfinite(keys).all(axis=-1, keepdims=True), keys, 0.0)
    code = codes_of(codes, keys.shape[-1])
    terms = (run_sizes(keys) * np.abs(code)).sum(axis=-1) / (code**2).sum(axis=-1)
    return eps(torch.float32) * (keys.shape[-1] + 4) * terms


def mass_allowance(inputs, name):
    """Allowed error of masses: twice that of a logit, exp's, and of the sums; masses that underflow may be anything."""
    query, lengths, block_size = (inputs[key] for key in ("query", "lengths", "block_size"))
    (batch, kv_heads, capacity, _), head_dim = inputs["codes"].shape, query.shape[-1]
    group, code = query.shape[1] // kv_heads, np.abs(codes_of(inputs["codes"], head_dim))
    is_seen = np.arange(capacity) < np.array(lengths)[:, None, None]
    scales = np.where(is_seen & np.isfinite(inputs["scales"]), np.abs(inputs["scales"]), 0.0)
    allowed = np.zeros((batch, kv_heads, -(-capacity // block_size)))
    for g in range(group):
        heads = query[:, g::group]  # the g-th of every group
        size = np.einsum("shd,shtd,sht->sht", run_sizes(heads), code, scales).max(axis=2) * head_dim**-0.5
        mass = oracle.score_sketch(**inputs | {"query": heads})
        roundings = 0 * size if name in EXACT else 2 * (head_dim + 4) * size
        roundings = roundings + max(lengths) + block_size + group + 4
        allowed += eps(torch.float32) * roundings[..., None] * np.where(np.isfinite(mass), mass, 0.0)
    scores = oracle.score_sketch(**inputs)
    return np.where(np.isfinite(scores), np.maximum(allowed, 2.0**-100), 0.0)


def results(operation, name, inputs):
    """Expected results and allowed errors of one case, by name; results that must be equal have no allowance."""
    if operation in ("block_bounds", "select_blocks"):
        return {"bounds" if operation == "block_bounds" else "indices": getattr(oracle, operation)(**inputs)}, {}
    if operation == "score_blocks":
        allowed = score_floor(torch.float32, inputs["query"], inputs["bounds"])
        return {"scores": oracle.score_blocks(**inputs)}, {"scores": allowed}
    if operation == "score_sketch":
        return {"scores": oracle.score_sketch(**inputs)}, {"scores": mass_allowance(inputs, name)}
    if operation == "sketch_keys":
        if clearance(**inputs) <= CLEARANCE:
            raise ValueError(f"case {name}: a rotated channel lies too close to a threshold")
        codes, scales = oracle.sketch_keys(**inputs)
        if COMPARED.get(name) == ["codes"]:
            return {"codes": codes}, {}
        return {"codes": codes, "scales": scales}, {"scales": scale_allowance(inputs["keys"], codes)}
    out, lse = getattr(oracle, operation)(**inputs, return_lse=True)
    allowed = dict(zip(("out", "lse"), attention_allowance(inputs, name), strict=True))
    found, kept = {"out": out, "lse": lse}, COMPARED.get(name, ["out", "lse"])
    return {key: found[key] for key in kept}, {key: allowed[key] for key in kept}


# Whole models, decoding.

MODELS = {
    "two_layers": {
        "vocab_size": 29,
        "n_layer": 2,
        "n_head": 6,
        "n_kv_head": 2,
        "head_dim": D,
        "hidden_size": 24,
        "intermediate_size": 40,
        "rope_theta": 100.0,
        "norm_eps": 0.001,
        "qkv_bias": True,
        "qk_norm": True,
        "tied_embeddings": False,
    },
    "four_layers": {
        "vocab_size": 31,
        "n_layer": 4,
        "n_head": 8,
        "n_kv_head": 2,
        "head_dim": D,
        "hidden_size": 32,
        "intermediate_size": 48,
        "rope_theta": 1000.0,
        "norm_eps": 0.0001,
        "qkv_bias": False,
        "qk_norm": False,
        "tied_embeddings": True,
    },
    "biases": {
        "vocab_size": 23,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 1,
        "head_dim": D,
        "hidden_size": 16,
        "intermediate_size": 24,
        "rope_theta": 100.0,
        "norm_eps": 0.001,
        "qkv_bias": True,
        "qk_norm": False,
        "tied_embeddings": True,
    },
    "norms": {
        "vocab_size": 23,
        "n_layer": 2,
        "n_head": 3,
        "n_kv_head": 3,
        "head_dim": D,
        "hidden_size": 16,
        "intermediate_size": 24,
        "rope_theta": 100.0,
        "norm_eps": 0.001,
        "qkv_bias": False,
        "qk_norm": True,
        "tied_embeddings": True,
    },
}
# With these no step of any trace is a close call.
SEEDS = {"two_layers": 352, "four_layers": 80, "biases": 16, "norms": 31}
PROMPT_LENGTH, NEW_TOKENS = 21, 33
MARGIN = 1e-3  # relative: every selection's gap, and every token's lead over the next
# Generations with a prompt of their own: its seed. No step is a close call, and sketches, or bounds of middle blocks,
# that a rectification leaves as they were select other blocks.
PROMPT_SEEDS = {
    "sketch_paper_4": 2,
    "sketch_fused_5_one_bit": 57,
    "fused_12_over_three_blocks": 166,
    "paper_20_over_three_blocks": 180,
    "sketch_paper_12_over_three_blocks": 59,
}
# Blocks in which each window drifts.
DRIFTING = {
    "fused_12_over_three_blocks": [[4, 5, 6], [6, 7]],
    "paper_20_over_three_blocks": [[4, 5, 6], [6, 7, 8]],
    "sketch_paper_12_over_three_blocks": [[4, 5, 6], [6, 7]],
}
# N, where it is not NEW_TOKENS.
N_TOKENS = {
    "sketch_paper_4": 13,
    "sketch_fused_5_one_bit": 11,
    "biases": 7,
    "norms": 7,
    "no_token": 0,
    "one_token": 1,
    "interval_beyond_the_end": 10,
    "fused_32": 34,
    "every_block": 8,
    "fused_12_over_three_blocks": 26,
    "paper_20_over_three_blocks": 42,
    "sketch_paper_12_over_three_blocks": 26,
}
SMALL = {"block_size": BLOCK, "active_ratio": 0.35, "min_blocks": 2, "local_blocks": 1}
LOCAL = {"block_size": BLOCK, "active_ratio": 0.35, "min_blocks": 3, "local_blocks": 2}
EVERY = SMALL | {"active_ratio": 1.0}
TWO_BITS, ONE_BIT = ({"selection": "sketch", "sketch_bits": bits} for bits in (2, 1))
# Name: model, prompt tokens, selection, interval, schedule, law, what it says.
TRACES = {
    "dense": ("two_layers", PROMPT_LENGTH, SMALL, 1, "fused", "law 8 corners",
              "interval 1, fused: dense decoding, which tells a wrong model from wrong decoding"),
    "never": ("two_layers", PROMPT_LENGTH, SMALL, None, "fused", "4.2 sparse step",
              "sparse steps alone: append, select, attend; the cache is never rectified"),
    "paper_4": ("two_layers", PROMPT_LENGTH, SMALL, 4, "paper", "law 6 rectification is exact",
                "every 4 sparse steps those 4 tokens are encoded again, and their logits discarded"),
    "fused_4": ("two_layers", PROMPT_LENGTH, SMALL, 4, "fused", "law 6 rectification is exact",
                "3 sparse steps, then those 3 tokens and the pending one in one dense pass"),
    "paper_8": ("two_layers", PROMPT_LENGTH, SMALL, 8, "paper", "law 7 bounded drift",
                "between rectifications just the newest w tokens differ from the dense cache"),
    "fused_8": ("two_layers", PROMPT_LENGTH, SMALL, 8, "fused", "law 7 bounded drift",
                "between rectifications just the newest w tokens differ from the dense cache"),
    "decode_only": ("two_layers", PROMPT_LENGTH, SMALL, 1, "paper", "law 6 rectification is exact",
                    "interval 1, paper: every token is encoded again at once, its logits discarded"),
    "dense_from_one": ("four_layers", 1, LOCAL, 1, "fused", "law 8 corners",
                       "another model (no biases, no norms of heads, tied embeddings), from a prompt of one token"),
    "fused_12_from_one": ("four_layers", 1, LOCAL, 12, "fused", "law 6 rectification is exact",
                          "windows over several blocks, two newest blocks, and a prompt of one token"),
    "paper_12_from_a_block": ("four_layers", BLOCK, LOCAL, 12, "paper", "law 6 rectification is exact",
                              "windows over several blocks, two newest blocks, and a prompt of exactly one block"),
    "fused_5_from_a_block_and_one": (
        "four_layers", BLOCK + 1, LOCAL, 5, "fused", "law 6 rectification is exact",
        "an interval that no multiple of blocks meets, and a prompt of one block and one token"),
    "sketch_paper_4": ("two_layers", 2 * BLOCK + 1, SMALL | TWO_BITS, 4, "paper", "law 12 online = rebuilt",
                       "blocks are scored by sketches; a rectification writes those of its window anew"),
    "sketch_fused_5_one_bit": ("two_layers", 2 * BLOCK + 1, SMALL | ONE_BIT, 5, "fused", "law 12 online = rebuilt",
                               "sketches of one bit, and windows over two blocks"),
    "biases": ("biases", PROMPT_LENGTH, SMALL, 4, "fused", "3 model",
               "biases without norms of heads, and one KV head for all query heads"),
    "norms": ("norms", PROMPT_LENGTH, SMALL, 4, "paper", "3 model",
              "norms of heads without biases, and a KV head for every query head"),
    "paper_never": ("two_layers", PROMPT_LENGTH, SMALL, None, "paper", "4.4 schedules",
                    "without an interval there is no rectification under schedule paper either"),
    "no_token": ("two_layers", PROMPT_LENGTH, SMALL, 4, "fused", "4.5 end of generation",
                 "N = 0: nothing is chosen, so there is no entry"),
    "one_token": ("two_layers", PROMPT_LENGTH, SMALL, 4, "paper", "4.5 end of generation",
                  "N = 1: the prefill chooses the only token, which is never fed"),
    "interval_beyond_the_end": ("two_layers", PROMPT_LENGTH, SMALL, 11, "fused", "4.4 schedules",
                                "an interval longer than the generation: nothing is rectified, w is N - 1"),
    "every_block": ("two_layers", PROMPT_LENGTH, EVERY, 3, "paper", "law 8 corners",
                    "active ratio 1: every block is selected, and the result is that of dense decoding"),
    "fused_12_over_three_blocks": (
        "four_layers", 5 * BLOCK - 2, LOCAL, 12, "fused", "law 6 rectification is exact",
        "windows that drift in three blocks: the whole window is encoded again, and bounds of its middle block"),
    "paper_20_over_three_blocks": (
        "four_layers", 4 * BLOCK + 1, LOCAL, 20, "paper", "law 6 rectification is exact",
        "windows that drift in three blocks: all 20 tokens are encoded again, and bounds of all blocks"),
    "fused_32": ("two_layers", PROMPT_LENGTH, SMALL, 32, "fused", "4.3 window",
                 "the default interval: a window of 31 tokens, and the pending one"),
    "sketch_paper_12_over_three_blocks": (
        "two_layers", 5 * BLOCK - 2, SMALL | TWO_BITS, 12, "paper", "law 12 online = rebuilt",
        "windows that drift in three blocks: sketches of the middle one are written anew as well"),
}  # fmt: skip


def weights_of(rng, model):
    """Weights large enough that attention chooses and matters, by the names that docs/porting.md gives them."""
    channels, inner = model["hidden_size"], model["intermediate_size"]
    sizes = {"q": model["n_head"] * D, "k": model["n_kv_head"] * D, "v": model["n_kv_head"] * D}
    shapes = {"embed.weight": (model["vocab_size"], channels)}
    for i in range(model["n_layer"]):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        shapes[f"layers.{i}.attn_norm.weight"] = (channels,)
        for name, size in sizes.items():
            shapes[f"{attn}.{name}_proj.weight"] = (size, channels)
            if model["qkv_bias"]:
                shapes[f"{attn}.{name}_proj.bias"] = (size,)
        if model["qk_norm"]:
            shapes |= {f"{attn}.q_norm.weight": (D,), f"{attn}.k_norm.weight": (D,)}
        shapes |= {f"{attn}.o_proj.weight": (channels, sizes["q"]), f"layers.{i}.mlp_norm.weight": (channels,)}
        shapes |= {f"{mlp}.gate_proj.weight": (inner, channels), f"{mlp}.up_proj.weight": (inner, channels)}
        shapes |= {f"{mlp}.down_proj.weight": (channels, inner)}
    shapes["norm.weight"] = (channels,)
    if not model["tied_embeddings"]:
        shapes["output.weight"] = (model["vocab_size"], channels)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = 1 + coarse(rng, *shape, scale=0.25)
        elif name.endswith("bias"):
            weights[name] = coarse(rng, *shape, scale=0.5)
        else:
            gain = 1.0 if name == "embed.weight" else 1.5 * shape[1] ** -0.5
            weights[name] = coarse(rng, *shape, scale=gain)
    return weights


def setting(name):
    """Configuration of one trace, without max_new_tokens."""
    _, _, selection, interval, schedule, *_ = TRACES[name]
    return selection | {"interval": interval, "schedule": schedule}


def gaps(logits, selected, config):
    """Relative leads of one step: the best token's, and for every selection that of its last block."""
    second, first = np.sort(logits)[-2:]
    yield (first - second) / max(abs(first), abs(second))
    for scores, indices in selected:
        for score, row in zip(scores, indices, strict=True):
            others = [score[i] for i in range(len(score) - config["local_blocks"]) if i not in row]
            taken = [score[i] for i in row[: len(row) - config["local_blocks"]]]
            if others and taken:
                low, high = max(others), min(taken)
                yield (high - low) / max(abs(high), abs(low))


def drifted(old, new, start):
    """Blocks in which a rectification changes a key by more than 1e-2 of its norm, and a bound by more than 1e-2.

    Keys [layer, Hkv, n, D] at positions from `start` on, as sparse steps wrote them and as they are now.
    """
    blocks = []
    for block in sorted({(start + i) // BLOCK for i in range(old.shape[2])}):
        part = at[:, :, max(block * BLOCK - start, 0) : (block + 1) * BLOCK - start]
        distance, size = (np.linalg.norm(keys, axis=-1) for keys in (old[part] - new[part], new[part]))
        is_stale = any(
            np.abs(extreme(old[part], axis=2) - extreme(new[part], axis=2)).max() > 1e-2 for extreme in (np.min, np.max)
        )
        blocks += [block] if (distance / size).max() > 1e-2 and is_stale else []
    return blocks


def trace(weights, model, prompt, config):
    """Everything that the oracle does, one dictionary after the prefill and one after every step."""
    steps, before, sketch_keys = [], 0, oracle.sketch_keys  # before: tokens in the cache
    cached = np.zeros((model["n_layer"], model["n_kv_head"], 0, model["head_dim"]))  # keys, after the step before

    def far_from_thresholds(keys, bits):
        if clearance(keys, bits) <= CLEARANCE:
            raise ValueError("a rotated channel lies too close to a threshold: another prompt is needed")
        return sketch_keys(keys, bits)

    def watch(done, logits, selected):
        nonlocal before, cached
        keys, values = np.stack(done.cache.keys), np.stack(done.cache.values)  # [layer, Hkv, T, D]
        is_rectified = steps and done.w == 0
        start = keys.shape[2] - steps[-1]["window"] - 1 if is_rectified else before  # the window, and this step's token
        step = {"token": int(np.argmax(logits)), "window": done.w, "start": start, "end": keys.shape[2]}
        step |= {
            "keys": keys[:, :, start:],
            "values": values[:, :, start:],
            "margin": min(gaps(logits, selected, config)),
            "drifted": drifted(cached[:, :, start:], keys[:, :, start:before], start),
        }
        step["indices"] = np.stack([indices for _, indices in selected]) if selected else None  # [layer, Hkv, N]
        steps.append(step)
        before, cached = keys.shape[2], keys

    with patch.object(oracle, "sketch_keys", far_from_thresholds):
        oracle.generate(weights, model, config, prompt, config["max_new_tokens"], watch=watch)
    return steps


def drawn(name, seed):
    """Weights and prompt of one model."""
    rng, model = np.random.default_rng(seed), MODELS[name]
    return weights_of(rng, model), rng.integers(0, model["vocab_size"], PROMPT_LENGTH).tolist()


def prompt_of(name):
    """Tokens of a prompt that a trace has for itself."""
    model, length, *_ = TRACES[name]
    return np.random.default_rng(PROMPT_SEEDS[name]).integers(0, MODELS[model]["vocab_size"], length).tolist()


# Files.


def stored(value):
    """The array as it is stored: numbers in float32, indices and lengths in int32, codes as they are."""
    array = np.asarray(value)
    if array.dtype == np.uint8:
        return array
    return np.ascontiguousarray(array, np.int32 if array.dtype.kind in "iu" else np.float32)


def halved(weight):
    """The array in float16, which holds every weight exactly."""
    half = weight.astype(np.float16)
    if not np.array_equal(half, weight):
        raise ValueError("a weight needs more than 11 bits")
    return half


def operations():
    """Tensors and manifest entries of every case of the operations."""
    tensors, entries = {}, []
    for operation, name, law, says, inputs_of in ((name, *case) for name, ladder in CASES.items() for case in ladder):
        inputs = inputs_of(np.random.default_rng([*SAME_INPUTS.get(name, name).encode()]))
        with np.errstate(invalid="ignore"):  # NaN where a case asks for it
            expected, allowed = results(operation, name, inputs)
        entry = {"operation": operation, "case": name, "law": law, "says": says}
        entry["arguments"] = {}  # those that are no tensors
        for key, value in inputs.items():
            if isinstance(value, (int, dict)):
                entry["arguments"][key] = value
            elif value is not None:
                tensors[f"{operation}/{name}/{key}"] = stored(value)
        for key, value in expected.items():
            tensors[f"{operation}/{name}/expected/{key}"] = stored(value)
        for key, value in allowed.items():
            tensors[f"{operation}/{name}/allowed/{key}"] = stored(value)
        entry["compare"] = COMPARED.get(name, list(expected))
        if name in EQUAL:
            entry["equal"] = EQUAL[name]
        entries.append(entry)
    return tensors, entries


@functools.cache
def decodings():
    """Weights of the models, and for every trace its manifest entry and the oracle's steps."""
    of_models, prompts, decoded = {}, {}, []
    for name in MODELS:
        of_models[name], prompts[name] = drawn(name, SEEDS[name])
    for name, (model, length, *_, law, says) in TRACES.items():
        config = setting(name) | {"max_new_tokens": N_TOKENS.get(name, NEW_TOKENS)}
        prompt = prompt_of(name) if name in PROMPT_SEEDS else prompts[model][:length]
        steps = trace(of_models[model], MODELS[model], prompt, config)
        margin = min((step["margin"] for step in steps), default=None)
        if margin is not None and margin <= MARGIN:
            raise ValueError(f"trace {name}: margin {margin:.2g}; {model} needs another seed")
        if name in DRIFTING and [step["drifted"] for step in steps if step["drifted"]] != DRIFTING[name]:
            raise ValueError(f"trace {name}: its windows do not drift in every block")
        entry = {"operation": "decode_trace", "case": name, "law": law, "says": says, "model": model}
        entry |= {"prompt": prompt, "config": config, "tokens": [step["token"] for step in steps]}
        decoded.append((entry | {"margin": None if margin is None else float(f"{margin:.3g}")}, steps))
    weights = {f"{name}/{key}": weight for name in MODELS for key, weight in of_models[name].items()}
    return weights, decoded


def files():
    """Name -> bytes of everything under tests/vectors that this command writes."""
    cases, operation_entries = operations()
    weights, decoded = decodings()
    manifest = {
        "version": VERSION,
        "specification": "docs/porting.md",
        "models": MODELS,
        "operations": operation_entries,
        "traces": [entry for entry, _ in decoded],
    }
    return {
        "manifest.json": (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(),
        "operations.safetensors": save(dict(sorted(cases.items()))),
        "weights.safetensors": save({name: halved(weight) for name, weight in sorted(weights.items())}),
    }


def changed():
    """Name -> bytes of the files that do not hold what this command would write."""
    return {
        name: data
        for name, data in files().items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_bytes() != data
    }


if __name__ == "__main__":
    written = changed()
    for name, data in written.items():
        (FOLDER / name).write_bytes(data)
    print(f"{len(written)} files changed in {FOLDER}")
