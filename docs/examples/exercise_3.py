"""Exercise 3 (tutorial 3, Drift): attention that reads the chosen blocks and nothing else.

Write the body of the function, then run `resa exercise 3` in this folder. Loops are welcome: nothing has to be fast.

B sequences, Hq query heads, Hkv KV heads, D channels of a head, T tokens in a cache of T_max slots. Block i holds the
tokens at positions i·b to (i + 1)·b - 1.
"""

import numpy as np


def sparse_attention(query, keys, values, indices, lengths, block_size):
    """Let one new token per sequence attend to the chosen blocks of its cache (equation 2).

    query          [B, Hq, D]
    keys, values   [B, Hkv, T_max, D]   what is not chosen, and slots from T on, may hold NaN
    indices        [B, Hkv, N]          chosen blocks in any order; -1 stands for nothing
    lengths        [B]                  T of each sequence, the new token included
    block_size     b
    returns        [B, Hq, D]           a new array

    Over the tokens t < T of the chosen blocks:

        logit[t]  = sum over channels of q · key[t], divided by sqrt(D)
        weight[t] = exp(logit[t] - m) / sum over t of exp(logit[t] - m),   m the largest logit
        out       = sum over t of weight[t] · value[t],   zeros where there is no such token

    Query head h reads KV head h // G, where G = Hq // Hkv, and the blocks chosen for that KV head.
    """
    raise NotImplementedError
