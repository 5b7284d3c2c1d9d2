"""Decoding with rectified sparse attention: prefill, sparse steps, rectification, and the loop around them.

The loop keeps, per sequence, a cache of T tokens, one pending token (chosen, not yet in the cache), and w, the
number of newest cached tokens that sparse steps wrote. Every f tokens a dense pass runs those tokens through the
model again and overwrites their keys and values, so that the error of a sparse step never outlives a window
(section 2.2 and Algorithm 1 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .cache import NO_TOKEN, Generation, KVCache, pad_tokens
from .checks import bind_shapes, check_lengths, is_integer, require
from .config import ReSAConfig
from .model import GPT
from .sampling import Choice, sample_token, sequence_generators
from .speculate import Speculation

PREFILL_CHUNK = 256  # tokens per dense pass: bounds the [G·Q, T] logits of one pass, and changes no result


@torch.no_grad()
def prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: KVCache, *, chunk_size: int = PREFILL_CHUNK) -> Tensor:
    """Append each sequence's prompt to the cache densely, `chunk_size` tokens at a time.

    Returns the logits [B, V] after each prompt's last token. An empty prompt leaves its sequence as it is (and
    its logits zero). The result does not depend on the chunking. Raises `ValueError` for prompts that don't fit.
    """
    require(is_integer(chunk_size, 1), "chunk_size", chunk_size, "an integer ≥ 1")
    tokens, lengths = pad_tokens("prompts", prompts, cache)
    room = min(cache.capacity, model.config.context)
    check_lengths("prompts: lengths in the cache", cache.lengths + lengths, room)
    model.check_tokens(tokens)
    logits = torch.zeros(len(prompts), model.config.vocab_size, dtype=cache.keys.dtype, device=tokens.device)
    for offset in range(0, tokens.shape[1], chunk_size):
        counts = (lengths - offset).clamp(0, chunk_size)
        chunk = tokens[:, offset : offset + chunk_size]
        hidden = model.dense_pass(chunk, cache, cache.lengths, counts)
        ends_here = (counts > 0) & (lengths <= offset + chunk_size)
        logits[ends_here] = model.output(hidden[ends_here, counts[ends_here].long() - 1])
    return logits


@torch.no_grad()
def sparse_step(
    model: GPT, tokens: Tensor, cache: KVCache, config: ReSAConfig, *, active: Tensor | None = None
) -> Tensor:
    """Feed one token per sequence, attending to the selected blocks alone (eq. 2–5).

    tokens [B], active [B] bool (default: all) → logits [B, V]; inactive sequences stay as they are and their
    rows mean nothing. Raises `ValueError` for tokens or lengths out of range.
    """
    if active is None:
        active = torch.ones_like(tokens, dtype=torch.bool)
    return model.output(model.sparse_pass(tokens, cache, active, config))


@torch.no_grad()
def rectify(model: GPT, windows: Sequence[Sequence[int]], cache: KVCache, window: Tensor) -> Tensor:
    """Run the newest tokens through the model again, densely, overwriting their keys and values.

    `windows[s]` are the ids of the newest `window[s]` cached tokens, then (schedule "fused") any tokens to append
    in the same pass; an empty one leaves its sequence as it is. window [B] → logits [B, V] after the last token of
    each. By induction over windows the cache afterwards equals that of a dense prefill (law 6): the pass computes
    from the token ids and from the cache before the window, which is exact already.
    """
    tokens, counts = pad_tokens("windows", windows, cache)
    bind_shapes(cache=(cache.lengths, "B"), window=(window, "B"))
    start = torch.where(counts > 0, cache.lengths - window, cache.lengths)
    if tokens.shape[1] == 0:  # nothing to do for any sequence
        return torch.zeros(len(windows), model.config.vocab_size, dtype=cache.keys.dtype, device=tokens.device)
    is_covered = bool(((counts >= window) | (counts == 0)).all())
    require(is_covered, "windows", f"{counts.tolist()} tokens", f"at least the window of {window.tolist()}, or none")
    hidden = model.dense_pass(tokens, cache, start, counts)
    row = torch.arange(len(windows), device=tokens.device)
    return model.output(hidden[row, (counts.long() - 1).clamp(min=0)])


@torch.no_grad()
def decode_step(model: GPT, generation: Generation, config: ReSAConfig, active: Tensor) -> Tensor:
    """Feed every active sequence's pending token, sparsely or densely as the schedule has it.

    Updates `generation.cache` and `generation.window`; active [B] bool → logits [B, V] for the next tokens.
    The two schedules differ only in when the dense pass comes: "fused" has it in place of the f-th sparse step,
    "paper" after it, its logits discarded.
    """
    cache, window = generation.cache, generation.window
    bind_shapes(cache=(cache.lengths, "B"), active=(active, "B"))
    require(active.dtype == torch.bool, "active", active.dtype, "bool")
    require(
        bool((generation.pending[active] >= 0).all()), "pending", generation.pending.tolist(), "a token where active"
    )
    check_lengths("lengths after the step", cache.lengths + active, cache.capacity)
    dense_due = cache.lengths < config.dense_below
    if config.interval is not None and config.schedule == "fused":
        dense_due = dense_due | (window + 1 >= config.interval)
    dense, sparse = active & dense_due, active & ~dense_due
    logits = torch.zeros(len(window), model.config.vocab_size, dtype=cache.keys.dtype, device=window.device)
    if sparse.any():
        tokens = generation.pending.clamp(min=0)  # finished sequences may have none
        logits = sparse_step(model, tokens, cache, config, active=sparse)
        window += sparse
    if dense.any():
        newest = _newest_tokens(generation, (window + 1) * dense)  # the window, and the pending token
        logits = torch.where(dense[:, None], rectify(model, newest, cache, window), logits)
        window[dense] = 0
    if config.interval is not None and config.schedule == "paper":
        full = active & (window >= config.interval)
        if full.any():
            rectify(model, _newest_tokens(generation, window * full), cache, window)
            window[full] = 0
    return logits


def decode_along(
    model: GPT, cache: KVCache, tokens: Sequence[Iterable[int]], config: ReSAConfig
) -> Iterator[tuple[Tensor, Generation]]:
    """Decode along tokens that are given rather than chosen (teacher forcing), from a prefilled cache.

    tokens: one iterable per sequence, drawn from step by step; the first to end ends them all. Yields the logits
    [B, V] after each step, and the state that decoding has reached; its last tokens have been fed, so it is none to
    resume from. The cache is extended in place and must have room.
    """
    window = torch.zeros_like(cache.lengths, dtype=torch.int64)
    state = Generation([[] for _ in tokens], cache, window, torch.full_like(window, NO_TOKEN))
    active = torch.ones_like(window, dtype=torch.bool)
    for fed in zip(*tokens, strict=False):
        for generated, token in zip(state.tokens, fed, strict=True):
            generated.append(token)
        state.pending = torch.tensor(fed, dtype=torch.int64, device=window.device)
        yield decode_step(model, state, config, active), state


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: ReSAConfig | None = None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int, int], None] | None = None,
    resume: Generation | None = None,
    speculate: bool = False,
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens; the batch may be ragged.

    `config=None` is `ReSAConfig()`. Temperature 0 takes the most likely token (ties: the lower id); otherwise `top_k`
    and `top_p` say from how many of the likeliest one is drawn, and each token costs one uniform number of its
    sequence's own generator: one given per prompt, or seeded in prompt order from the one given (None: torch's
    default). A stop token ends its sequence; it is returned, never fed.
    `on_token(sequence, position, token)` is called for each token as it is chosen, with the position in the
    sequence that it will occupy.

    The last token is never fed, so a cache ends at prompt + N − 1 tokens, which must fit `model.config.context`.

    `resume` continues an earlier `Generation`, left untouched, with `prompts` as the next turn (an empty one just
    goes on): its open window is rectified, whatever the interval, and its pending token prefilled with the prompt.

    With `speculate` what sparse steps choose is a draft that the rectification's dense pass confirms or corrects
    (Appendix B): greedy output equals dense decoding's, sampled output is distributed as it, and `on_token` is called
    after each pass. It needs an interval. A draft costs a uniform number, its acceptance another, and a rejection a
    third, drafts that are thrown away included.

    Raises `ValueError` naming the argument before any work starts.
    """
    config = ReSAConfig() if config is None else config
    check_request(model, prompts, max_new_tokens, config, stop_tokens, resume)
    require(not speculate or config.interval is not None, "config.interval", None, "an integer, to speculate")
    capacity = needed_capacity(model, prompts, max_new_tokens, resume)
    own = sequence_generators(len(prompts), temperature, top_p, top_k, generator)
    generation, feed = open_generation(model, prompts, capacity, config, resume)
    logits = prefill(model, feed, generation.cache)
    if speculate:
        choice = Choice(temperature, top_p, top_k)
        Speculation(model, generation, config, choice, own, max_new_tokens, stop_tokens, on_token).run(logits)
        return generation
    active = torch.full((len(prompts),), max_new_tokens > 0, device=logits.device)
    while active.any():
        for sequence in active.nonzero()[:, 0].tolist():
            token = sample_token(logits[sequence], temperature, top_p, own[sequence], top_k)
            generation.tokens[sequence].append(token)
            generation.pending[sequence] = token
            if on_token is not None:
                on_token(sequence, int(generation.cache.lengths[sequence]), token)
            active[sequence] = token not in stop_tokens and len(generation.tokens[sequence]) < max_new_tokens
        if active.any():
            logits = decode_step(model, generation, config, active)
    return generation


def check_request(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: ReSAConfig,
    stop_tokens: Collection[int],
    resume: Generation | None,
) -> None:
    """Refuse by name what `generate` can't work with."""
    require(isinstance(config, ReSAConfig), "config", type(config).__name__, "a ReSAConfig")
    require(is_integer(max_new_tokens, 0), "max_new_tokens", max_new_tokens, "an integer ≥ 0")
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    require(is_list, "prompts", repr(prompts)[:60], "a non-empty list of token lists")
    is_generation = resume is None or isinstance(resume, Generation)
    require(is_generation, "resume", type(resume).__name__, "a Generation, or None")
    vocabulary = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        is_continued = resume is not None and index < len(resume.tokens) and len(resume.tokens[index]) > 0
        is_fed = isinstance(prompt, Sequence) and not isinstance(prompt, str) and (len(prompt) > 0 or is_continued)
        require(is_fed, f"prompts[{index}]", repr(prompt)[:60], "a non-empty list of token ids")
        is_known = all(is_integer(token, 0) and token < vocabulary for token in prompt)
        require(is_known, f"prompts[{index}]", repr(prompt)[:60], f"token ids 0 … {vocabulary - 1}")
    require(isinstance(stop_tokens, Collection), "stop_tokens", stop_tokens, "a list or set of token ids")
    for token in stop_tokens:
        require(is_integer(token, 0) and token < vocabulary, "stop_tokens", token, f"token ids 0 … {vocabulary - 1}")
    if resume is not None:
        require(len(prompts) == len(resume.tokens), "prompts", f"{len(prompts)} lists", f"{len(resume.tokens)}")
        block_size = resume.cache.block_size
        keys, weight, shape = resume.cache.keys, model.embed.weight, model.config
        given = (keys.shape[0], keys.shape[2], keys.shape[4], keys.dtype, keys.device)
        wanted = (shape.n_layer, shape.n_kv_head, shape.head_dim, weight.dtype, weight.device)
        require(given == wanted, "resume", f"a cache of {given}", f"this model's layers, KV heads, head_dim … {wanted}")
        require(config.block_size == block_size, "config.block_size", config.block_size, f"{block_size}, the cache's")


def needed_capacity(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, resume: Generation | None
) -> int:
    """Tokens per sequence that the cache must hold, refused if the model can't; the last generated one is never fed."""
    held = [0] * len(prompts)
    if resume is not None:
        has_pending = (resume.pending != NO_TOKEN).to(resume.cache.lengths)
        held = (resume.cache.lengths + has_pending).tolist()
    context = model.config.context
    for index, (prompt, before) in enumerate(zip(prompts, held, strict=True)):
        needed = before + len(prompt) + max(max_new_tokens - 1, 0)
        given = f"{before + len(prompt)} tokens and max_new_tokens = {max_new_tokens}"
        require(needed <= context, f"prompts[{index}]", given, f"prompt + max_new_tokens − 1 ≤ context = {context}")
    return max(before + len(prompt) for prompt, before in zip(prompts, held, strict=True)) + max(max_new_tokens - 1, 0)


def open_generation(
    model: GPT, prompts: Sequence[Sequence[int]], capacity: int, config: ReSAConfig, resume: Generation | None
) -> tuple[Generation, list[list[int]]]:
    """The generation to work on, and what each sequence prefills before its first new token."""
    if resume is None:
        cache = model.new_cache(len(prompts), capacity, config.block_size)
        feed = [list(prompt) for prompt in prompts]
    else:
        cache = resume.cache.resized(max(capacity, resume.cache.capacity))
        cache.truncate(cache.lengths - resume.window.to(cache.lengths))  # the open window is encoded again
        newest = _newest_tokens(resume, resume.window + 1)
        feed = [tokens + list(prompt) for tokens, prompt in zip(newest, prompts, strict=True)]
    window = torch.zeros(len(prompts), dtype=torch.int64, device=cache.lengths.device)
    return Generation([[] for _ in prompts], cache, window, torch.full_like(window, NO_TOKEN)), feed


def _newest_tokens(generation: Generation, counts: Tensor) -> list[list[int]]:
    """The last counts[s] generated tokens of each sequence."""
    return [tokens[max(len(tokens) - n, 0) :] for tokens, n in zip(generation.tokens, counts.tolist(), strict=True)]
