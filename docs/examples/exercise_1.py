"""Exercise 1 (tutorial 1, The cache): attention over a KV cache.

Write the body of the function, then run `resa exercise 1` in this folder. Loops are welcome: nothing has to be fast.

B sequences, Hq query heads, Hkv KV heads, D channels of a head, T tokens in a cache of T_max slots.
"""

import numpy as np


def dense_attention(query, keys, values, lengths):
    """Let the newest Q tokens of every sequence attend to all tokens of its cache that they may see.

    query          [B, Hq, Q, D]
    keys, values   [B, Hkv, T_max, D]   slots from T on hold garbage, perhaps NaN
    lengths        [B]                  T of each sequence, its newest Q tokens included
    returns        [B, Hq, Q, D]        a new array

    Query i stands at position T - Q + i. It sees the tokens at positions 0 to T - Q + i, its own included:

        logit[t]  = sum over channels of q · key[t], divided by sqrt(D)
        weight[t] = exp(logit[t] - m) / sum over t of exp(logit[t] - m),   m the largest logit
        out       = sum over t of weight[t] · value[t]

    Query head h reads KV head h // G, where G = Hq // Hkv.
    """
    raise NotImplementedError
