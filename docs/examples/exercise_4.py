"""Exercise 4 (tutorial 4, Rectification): the decoding loop that repairs its own cache.

Write the body of the function, then run `resa exercise 4` in this folder. The model is given, the loop is yours.
"""

import numpy as np


def decode(model, prompt, n_tokens, interval):
    """Generate tokens greedily by sparse steps, and rectify after every f of them (Algorithm 1).

    model      a transformer with the cache of one sequence, empty at first. It has two functions:

        model.dense_pass(tokens, start)   feeds tokens at positions start, start + 1, …; each attends to all before
                                          it. Their keys and values are written to the cache, over those that are
                                          there. Returns the logits after the last of them.
        model.sparse_step(token)          feeds one token at the end of the cache, attends to a few blocks, and
                                          writes its keys and values. Returns the logits after it.

    prompt     a list of token ids
    n_tokens   how many tokens to generate, at least 1
    interval   f; None: never rectify
    returns    the tokens generated, a list

        prefill: a dense pass over the prompt
        choose the token with the largest logit
        until there are n_tokens tokens:
            make a sparse step with the newest token
            if w, the number of sparse steps since the last dense pass, has reached f:
                rectify: a dense pass over the window, the tokens of these w steps, at their own positions
                ignore its logits
            choose the token with the largest logit of the sparse step

    The token that is chosen last is never fed.
    """
    raise NotImplementedError
