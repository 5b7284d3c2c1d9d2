"""What a cache that the Triton path has filled is compared with: dense prefill, in float64 and in the model's dtype.

Errors are measured from float64's dense prefill of the same tokens by a model of the same weights, and may be twice
those of dense prefill in the model's own dtype, the worst of several chunkings.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from small_models import dense_cache, drift
from tolerances import assert_same_bits

from resa import reference

CHUNKS = (1, 7, 256)  # tokens per dense pass


def at_home(cache):
    """A copy on the CPU, where the helpers of the other tests look at it."""
    tensors = {name: getattr(cache, name).cpu() for name in ("keys", "values", "bounds", "lengths")}
    return replace(cache, **tensors)


def rounding(model, texts, block_size, chunks=CHUNKS):
    """The exact cache of some texts, and per sequence the largest error of dense prefill in the model's own dtype."""
    exact = at_home(dense_cache(deepcopy(model).double(), texts, block_size)[0])
    chunked = [at_home(dense_cache(model, texts, block_size, chunk_size=size)[0]) for size in chunks]
    return exact, [max(float(drift(cache, s, exact).max()) for cache in chunked) for s in range(len(texts))]


def assert_bounds_rebuilt(cache):
    """Law 2: the bounds are those that the reference finds in the keys, bit for bit up to the sign of zero."""
    for layer, keys in enumerate(cache.keys):
        rebuilt = reference.block_bounds(keys, cache.lengths, cache.block_size)
        assert_same_bits(cache.bounds[layer] + 0.0, rebuilt + 0.0, f"bounds of layer {layer}")


def assert_dense_before_the_window(model, done, texts, chunks=CHUNKS):
    """Law 6: keys, values and bounds of what the windows don't cover are those of dense prefill; law 2 for all.

    texts: what each sequence's cache must hold. Returns the caches' errors and those allowed.
    """
    cache, block_size = at_home(done.cache), done.cache.block_size
    assert cache.lengths.tolist() == [len(text) for text in texts]
    exact, errors = rounding(model, texts, block_size, chunks)
    found = []
    for s, (text, w) in enumerate(zip(texts, done.window.tolist(), strict=True)):
        worst, kept = drift(cache, s, exact), len(text) - w
        found.append(worst)
        largest = float(worst[:kept].max())
        assert largest <= 2 * errors[s], f"sequence {s}: {largest:.2g}, allowed 2 · {errors[s]:.2g}"
        # A block of exact keys has exact bounds, to what a key's channel may be off.
        blocks = kept // block_size + (w == 0 and kept % block_size > 0)
        off = 2 * errors[s] * exact.keys[:, s, :, :kept].norm(dim=-1).amax()
        for ours, theirs in zip(cache.bounds[:, s], exact.bounds[:, s], strict=True):
            ours, theirs = ours[..., :blocks].double(), theirs[..., :blocks]
            assert torch.allclose(ours, theirs, rtol=0, atol=float(off)), f"bounds of sequence {s}"
    assert_bounds_rebuilt(done.cache)
    return found, [2 * error for error in errors]


def cached_texts(prompts, done):
    """What the caches hold: all but the last token, which is never fed."""
    return [(list(prompt) + tokens)[:-1] for prompt, tokens in zip(prompts, done.tokens, strict=True)]
