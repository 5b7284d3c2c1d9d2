"""Decoding: prefill, sparse step, rectification, and the loop around them (Algorithm 1).

A sequence is a cache, one *pending* token (chosen, not yet cached) and its *window*: the newest w
cached tokens, which sparse steps wrote. These drift: from the second layer on, keys and values are
computed from the output of sparse attention. Every f tokens a dense pass runs them through the
model again and overwrites them (section 2.2). The tokens already chosen stay as they are.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache
from .checks import check_tokens, require, require_integer
from .config import ReSAConfig
from .model import GPT
from .requests import check_request, open_caches, sequence_generators
from .sampling import Sampling

PREFILL_CHUNK = 256  # tokens per dense pass of a prompt, which bounds its memory


@dataclass
class Generation:
    """One decoded sequence, and everything needed to go on from it."""

    tokens: list[int]  # generated so far; the last one is pending: chosen, not yet cached
    cache: KVCache
    n_drifted: int = 0  # w, newest cached tokens that sparse steps have written


def dense_pass(model: GPT, tokens: Sequence[int], cache: KVCache, start: int) -> Tensor:
    """Feed tokens at positions start, start + 1, …; each sees itself and all before; [Q] → [Q, C].

    Keys and values that the cache held there are overwritten, layer by layer. No cached token may
    come after these: it would have been computed from the keys that are being replaced.
    """
    end, length, device = start + len(tokens), cache.length, model.embed.weight.device
    is_newest = 0 <= start <= length <= end <= cache.capacity
    allowed = f"a window around the length {length}, within the capacity {cache.capacity}"
    require(is_newest, "start … end", f"{start} … {end}", allowed)
    check_tokens(tokens, model.config.vocab_size)

    # Operations take batches: this is a batch of one.
    ids = torch.tensor([tokens], dtype=torch.int64, device=device)  # [1, Q]
    positions = torch.arange(start, end, device=device)[None]
    lengths = torch.tensor([end], dtype=torch.int32, device=device)

    # Write first, then attend: a token sees the new keys of these tokens, not the drifted ones.
    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, start, key, value)
        return model.ops.dense_attention(query, cache.keys[layer], cache.values[layer], lengths)

    # The length moves after the last layer: a token counts in all layers or in none.
    hidden = model.hidden_states(ids, positions, attend)
    cache.length = end
    return hidden[0]


@torch.no_grad()
def prefill(model: GPT, prompt: Sequence[int], cache: KVCache, chunk_size=PREFILL_CHUNK) -> Tensor:
    """Append a prompt to the cache densely → logits [V] after its last token.

    A chunk attends to all chunks before it, so their size changes results by rounding alone.
    """
    chunk_size = require_integer("chunk_size", chunk_size, 1)
    check_tokens(prompt, model.config.vocab_size)
    end, room = cache.length + len(prompt), min(cache.capacity, model.config.context)
    require(len(prompt) > 0, "prompt", "no tokens", "at least one token")
    require(end <= room, "prompt: length in the cache", end, f"at most {room}")

    for first in range(0, len(prompt), chunk_size):
        hidden = dense_pass(model, prompt[first : first + chunk_size], cache, cache.length)
    return model.output(hidden[-1])


@torch.no_grad()
def sparse_step(model: GPT, token: int, cache: KVCache, config: ReSAConfig) -> Tensor:
    """Feed one token that attends to selected blocks alone (eq. 2–5) → logits [V] for the next."""
    position, b, device = cache.length, config.block_size, model.embed.weight.device
    require(position < cache.capacity, "length after the step", position + 1, f"≤ {cache.capacity}")
    require(b == cache.block_size, "config.block_size", b, f"{cache.block_size}")
    bits, kept = config.kept_bits, cache.sketch_bits
    named = {None: "'bounds'", 1: "'sketch' of 1 bit", 2: "'sketch' of 2 bits"}
    require(bits == kept, "config.selection", named[bits], f"{named[kept]}, the cache's")
    check_tokens([token], model.config.vocab_size)
    ids = torch.tensor([[token]], dtype=torch.int64, device=device)  # [1, 1]
    positions = torch.tensor([[position]], device=device)
    lengths = torch.tensor([position + 1], dtype=torch.int32, device=device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Append the token, which rebuilds the bounds of the newest block.
        cache.write(layer, position, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        if layer < config.dense_layers:
            return model.ops.dense_attention(query, keys, values, lengths)

        # Score every block by its bounds, or by its keys' sketches.
        query = query[:, :, 0]  # [1, Hq, D]
        if bits is None:
            scores = model.ops.score_blocks(query, cache.bounds[layer], lengths, b)
        else:
            codes, scales = cache.codes[layer], cache.scales[layer]
            scores = model.ops.score_sketch(query, codes, scales, lengths, b)

        # Select a few, and attend to those alone.
        indices = model.ops.select_blocks(scores, lengths, config)
        return model.ops.sparse_attention(query, keys, values, indices, lengths, b)[:, :, None]

    hidden = model.hidden_states(ids, positions, attend)
    cache.length = position + 1
    return model.output(hidden[0, 0])


@torch.no_grad()
def rectify(model: GPT, tokens: Sequence[int], cache: KVCache, n_drifted: int) -> Tensor:
    """Run the newest tokens through the model again, densely, overwriting their keys and values.

    tokens: the ids of the `n_drifted` newest cached tokens, then any that are appended in the same
    pass (schedule "fused") → logits [V] after the last one. The cache afterwards equals that of a
    dense prefill (law 6). Before the window it is exact already: prefill is dense, and every older
    window was rectified. The pass computes from that and from token ids alone.
    """
    n_drifted = require_integer("n_drifted", n_drifted, 0)
    allowed = f"at least the {n_drifted} tokens of the window, and one"
    require(len(tokens) >= max(n_drifted, 1), "tokens", f"{len(tokens)} tokens", allowed)
    hidden = dense_pass(model, tokens, cache, cache.length - n_drifted)
    return model.output(hidden[-1])


def decode_step(model: GPT, generation: Generation, config: ReSAConfig) -> Tensor:
    """Feed the pending token → logits [V] for the next; rectify when a pass is due (Algorithm 1).

    Under "paper" sparse steps feed all tokens. A dense pass after each f-th one repairs the newest
    f and its logits are not used. Under "fused" the pass itself feeds each f-th token.
    """
    tokens, cache, w = generation.tokens, generation.cache, generation.n_drifted
    require(len(tokens) > w, "tokens", f"{len(tokens)} tokens", f"more than the window's {w}")

    # Fused: the pass re-encodes the window and feeds the pending token in one go.
    newest = tokens[-w - 1 :]  # of the window, then the pending one
    if config.schedule == "fused" and config.is_pass_due(w):
        logits = rectify(model, newest, cache, w)
        generation.n_drifted = 0
        return logits

    # Every other step is sparse: the token that it writes has drifted.
    logits = sparse_step(model, tokens[-1], cache, config)
    generation.n_drifted = w + 1

    # Paper: the window, now with this token, is re-encoded on its own.
    if config.schedule == "paper" and config.is_pass_due(w + 1):
        rectify(model, newest, cache, w + 1)
        generation.n_drifted = 0
    return logits


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: ReSAConfig | None = None,
    sampling: Sampling | None = None,
    *,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int, int], None] | None = None,
    resume: Generation | None = None,
) -> list[Generation]:
    """Continue every prompt by up to `max_new_tokens` tokens, one prompt after the other.

    `config=None` is `ReSAConfig()`, `sampling=None` greedy decoding. `generators` is one per
    prompt, or one that seeds them all (None: torch's default). A stop token ends its sequence.
    Like the last token it is returned and never fed, so a cache ends at prompt + N − 1 tokens.
    `on_token(sequence, position, token)` is called for each token as it is chosen.

    `resume` continues an earlier `Generation`, which stays as it is; the only prompt is the next
    turn and may be empty. The prefill recomputes its open window too, even with `interval=None`.
    """
    config = ReSAConfig() if config is None else config
    sampling = Sampling() if sampling is None else sampling
    check_request(model, prompts, max_new_tokens, config, sampling, stop_tokens, resume, generators)
    opened = open_caches(model, prompts, max_new_tokens, config, resume)
    own = sequence_generators(len(prompts), sampling, generators)

    generations = []
    for index, ((cache, feed), generator) in enumerate(zip(opened, own, strict=True)):
        generation = Generation([], cache)
        logits = prefill(model, feed, cache)  # dense, so decoding starts with an exact cache
        while len(generation.tokens) < max_new_tokens:
            # Choose a token. It is pending until the next step feeds it; the last one never is.
            token = sampling.token(logits, generator)
            generation.tokens.append(token)
            if on_token is not None:
                on_token(index, cache.length, token)
            if token in stop_tokens or len(generation.tokens) == max_new_tokens:
                break
            logits = decode_step(model, generation, config)
        generations.append(generation)
    return generations
