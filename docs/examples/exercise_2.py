"""Exercise 2 (tutorial 2, Blocks): choose which blocks of the cache to read.

Write the bodies from top to bottom, then run `resa exercise 2` in this folder. Loops are welcome: nothing has to be
fast.

B sequences, Hq query heads, Hkv KV heads, D channels of a head, T tokens in a cache of T_max slots. Block i holds the
tokens at positions i·b to (i + 1)·b - 1. M = ceil(T / b) blocks hold tokens, the last of them perhaps not b.
"""

import math

import numpy as np


def block_bounds(keys, lengths, block_size):
    """Find the smallest and the largest key of every block, channel by channel (equation 3).

    keys         [B, Hkv, T_max, D]   slots from T on hold garbage, perhaps NaN
    lengths      [B]                  T of each sequence
    block_size   b
    returns      [B, Hkv, 2, D, ceil(T_max / b)], as wide as the keys: minima at index 0, maxima at index 1

        lo[d, i] = min over the tokens t < T of block i of key[t, d]
        hi[d, i] = max over the same tokens

    A block without a token has lo = +inf and hi = -inf.
    """
    raise NotImplementedError


def score_blocks(query, bounds, lengths, block_size):
    """Bound the attention score that any key of a block can reach (equation 4).

    query        [B, Hq, D]               one new token per sequence
    bounds       [B, Hkv, 2, D, blocks]   as block_bounds returns them
    lengths      [B]                      T of each sequence
    block_size   b
    returns      [B, Hkv, blocks], higher for blocks that matter more

        pooled[d] = mean of q[h, d] over the G = Hq // Hkv query heads h of a KV head: 0 to G - 1, G to 2G - 1, …
        score[i]  = sum over d of max(pooled[d] · lo[d, i], pooled[d] · hi[d, i])

    Blocks from M on score -inf, whatever their bounds hold.
    """
    raise NotImplementedError


def select_blocks(scores, lengths, config):
    """Choose the n blocks that a sparse step reads (equation 5).

    scores    [B, Hkv, blocks]
    lengths   [B], T of each sequence
    config    a dictionary: "block_size" b, "active_ratio" p, "min_blocks", "local_blocks"
    returns   [B, Hkv, N] integers, N being the largest n of the batch

        n = min(M, max(min_blocks, ceil(p · M - 1e-9)))    1e-9 undoes the rounding of p · M

    The newest local_blocks blocks are always in and count toward n. The others are those of the highest scores, and of
    equal scores the lower index wins. Indices ascend; a sequence with a smaller n has -1 at the end.
    """
    raise NotImplementedError
