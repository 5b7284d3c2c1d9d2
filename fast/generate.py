"""Decoding on the GPU without waiting for it: sparse steps and rectifications as CUDA graphs.

The reference decodes one sequence and looks at every token. Here a batch decodes together, and its
state stays on the device: lengths, drift, chosen tokens and ends are tensors that a step updates in
place. Every step is one replay of a graph, in which masks decide which sequences take part. The
host only counts along to know which kinds of step come next. It reads tokens back once per interval
where a callback or a stop token asks for it, else once at the end.

Where the kernels are interpreted (`TRITON_INTERPRET=1`), the same steps run without graphs.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import triton
from torch import Tensor

from resa.reference.checks import check_lengths, check_tokens, require, require_integer
from resa.reference.config import ReSAConfig
from resa.reference.generate import Generation
from resa.reference.model import GPT
from resa.reference.operations import REFERENCE_OPS
from resa.reference.requests import check_request, sequence_generators
from resa.reference.sampling import Sampling

from .attention import count_split_counters, dense_attention, sparse_attention
from .blocks import MANY_SCORES, append_and_score, block_bounds, score_blocks, select_blocks
from .cache import BatchedCache, write_window
from .estimate import score_rotated
from .gpu.bookkeeping import Plan, note_tokens, plan_step
from .gpu.bounds8 import Bounds8, compress_bounds
from .gpu.graphs import capture
from .gpu.limits import INTERPRETED, check_kernel_dtypes, check_sizes
from .model import accelerated, check_plain
from .operations import TRITON_OPS
from .sampling import Sampler
from .sketch import Sketches, sketch_keys, write_sketched

NO_TOKEN = -1
# Tokens per dense pass of all prompts together. It changes no result. A pass of a 7B model holds
# some 100,000 numbers per token.
PREFILL_ROWS = 8192
PREFILL_WIDTH = 32  # a prompt's last pass has a multiple of this: any other would compile anew
SMALL_BLOCK = 2048  # numbers in a block's keys, up to which one warp appends while others score
MANY_ROWS = 16  # KV heads of all sequences, from which on appending beside the scoring pays
READ_BACK = 32  # fewest tokens between two looks at the device


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    config: ReSAConfig | None = None, sampling: Sampling | None = None,
    *, generators: torch.Generator | Sequence[torch.Generator] | None = None,
    stop_tokens: Collection[int] = (), on_token: Callable[[int, int, int], None] | None = None,
    resume: Generation | None = None,
) -> list[Generation]:  # fmt: skip
    """Continue every prompt by up to `max_new_tokens` tokens, all prompts together.

    Arguments and results are those of the reference's `generate`, with two differences. `on_token`
    is called every READ_BACK tokens or so, for all tokens chosen since. With
    `config.eight_bit_bounds` selection reads bounds rounded outward to 8 bits, half the bytes,
    which may select other blocks. A request that the kernels cannot serve is refused by name before
    any work starts.
    """
    config = ReSAConfig() if config is None else config
    sampling = Sampling() if sampling is None else sampling
    check_request(model, prompts, max_new_tokens, config, sampling, stop_tokens, resume, generators)
    max_new_tokens = int(max_new_tokens)
    check_model(model, config, len(prompts))

    # Prefill the prompts.
    model = accelerated(model)
    cache, feed = open_cache(model, prompts, max_new_tokens, config, resume)
    own = sequence_generators(len(prompts), sampling, generators)
    logits = prefill(model, feed, cache)
    if max_new_tokens == 0:
        lengths = enumerate(cache.lengths.tolist())
        return [Generation([], cache.sequence(s, length)) for s, length in lengths]

    # Decode. The loop holds either exact bounds or codes, never both.
    if config.eight_bit_bounds:
        cache.bounds = [compress_bounds(layer) for layer in cache.bounds]
    sampler = Sampler(sampling, own, max_new_tokens, logits.device)
    loop = DecodeLoop(model, cache, max_new_tokens, config, sampler, stop_tokens)
    tokens = loop.run(logits, on_token)
    if config.eight_bit_bounds:
        b, ends = config.block_size, cache.lengths
        cache.bounds = torch.stack([block_bounds(keys, ends, b) for keys in cache.keys])

    # Hand out the sequences. Their caches are views, which keep the batch's memory alive.
    rows = zip(tokens, cache.lengths.tolist(), loop.n_drifted.tolist(), strict=True)
    return [
        Generation(row, cache.sequence(s, length), n_drifted)
        for s, (row, length, n_drifted) in enumerate(rows)
    ]


def check_model(model: GPT, config: ReSAConfig, batch: int) -> None:
    """Refuse a model, block size or batch that the kernels do not support."""
    shape, is_known = model.config, model.ops in (REFERENCE_OPS, TRITON_OPS)
    require(is_known, "model.ops", "operations of its own", "the reference's or the kernels'")
    check_kernel_dtypes(model=model.embed.weight)
    group, rows = shape.n_head // shape.n_kv_head, batch * shape.n_kv_head
    check_sizes(D=shape.head_dim, G=group, block_size=config.block_size, rows=rows)
    check_plain(model)


def padded_capacity(tokens: int, block_size: int) -> int:
    """The next capacity whose rows of bounds are a multiple of 16 blocks: loads need no splitting.

    >>> padded_capacity(257, 16)
    512
    """
    return triton.cdiv(tokens, 16 * block_size) * 16 * block_size


def open_cache(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ReSAConfig,
    resume: Generation | None,
) -> tuple[BatchedCache, list[list[int]]]:  # fmt: skip
    """A cache with room for what is to come, and each sequence's tokens to prefill."""
    feed, kept = [list(prompt) for prompt in prompts], 0
    if resume is not None:
        # The tokens of the open window are encoded again, with the pending one and the prompt.
        kept = resume.cache.length - resume.n_drifted
        feed = [[*resume.tokens[-resume.n_drifted - 1 :], *prompts[0]]]
    room = max(max_new_tokens - 1, 0)  # the last token is never fed
    capacity = padded_capacity(kept + max(map(len, feed)) + room, config.block_size)
    weight, b = model.embed.weight, config.block_size
    cache = BatchedCache.empty(
        model.config, len(prompts), capacity, b, config.kept_bits,
        dtype=weight.dtype, device=weight.device
    )  # fmt: skip

    if resume is not None:
        cache.keys[:, :, :, :kept] = resume.cache.keys[:, :, :, :kept]
        cache.values[:, :, :, :kept] = resume.cache.values[:, :, :, :kept]
        cache.lengths += kept
        for layer, keys in enumerate(cache.keys):
            if cache.sketches is None:
                cache.bounds[layer] = block_bounds(keys, cache.lengths, b)
            else:
                codes, scales = sketch_keys(keys, cache.sketches.bits)
                cache.sketches.codes[layer], cache.sketches.scales[layer] = codes, scales
    return cache, feed


@torch.no_grad()
def prefill(
    model: GPT, prompts: Sequence[Sequence[int]], cache: BatchedCache,
    *, chunk_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Append each sequence's prompt to the cache densely → logits [B, V] after its last token.

    Each is read `chunk_size` tokens at a time (None: by the batch); the result does not depend on
    the chunking. An empty prompt leaves its sequence as it is, and its logits zero.
    """
    # Check, and pad the prompts to one length.
    batch, device = len(cache.lengths), cache.lengths.device
    if chunk_size is None:
        chunk_size = max(1, PREFILL_ROWS // max(1, batch))
    chunk_size = require_integer("chunk_size", chunk_size, 1)
    given, allowed = f"{len(prompts)} lists", f"{batch}, one per sequence of the cache"
    require(len(prompts) == batch, "prompts", given, allowed)
    longest = max(map(len, prompts))
    width = triton.cdiv(longest, PREFILL_WIDTH) * PREFILL_WIDTH
    padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    tokens = torch.tensor(padded, dtype=torch.int64, device=device).view(batch, width)
    counts = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    room = min(cache.capacity, model.config.context)
    check_lengths("prompts: lengths in the cache", cache.lengths + counts, room)
    check_tokens(tokens[:, :longest], model.config.vocab_size)
    check_kernel_dtypes(cache=cache.keys)

    # Read them chunk by chunk. A sequence's logits come from the chunk in which its prompt ends.
    vocabulary, dtype = model.config.vocab_size, cache.keys.dtype
    logits = torch.zeros(batch, vocabulary, dtype=dtype, device=device)
    split_counters = new_split_counters(model, cache, min(chunk_size, width))
    for first in range(0, longest, chunk_size):
        end = cache.lengths + (counts - first).clamp(0, chunk_size)
        chunk = tokens[:, first : first + chunk_size]
        hidden = dense_pass(model, chunk, cache, cache.lengths, end, split_counters)
        cache.lengths.copy_(end)
        lasts = [len(prompt) - first - 1 for prompt in prompts]  # each prompt's last token
        ending = [s for s, last in enumerate(lasts) if 0 <= last < chunk_size]
        if ending:
            logits[ending] = model.output(hidden[ending, [lasts[s] for s in ending]])
    return logits


def new_split_counters(model: GPT, cache: BatchedCache, width: int) -> Tensor:
    """Zeros, enough for passes of up to `width` tokens and for sparse steps over one layer."""
    n_kv_head = model.config.n_kv_head
    dense = count_split_counters(cache.keys[0], model.config.n_head // n_kv_head, width)
    needed = max(len(cache.lengths) * n_kv_head, dense)
    return torch.zeros(needed, dtype=torch.int32, device=cache.lengths.device)


def dense_pass(
    model: GPT, tokens: Tensor, cache: BatchedCache, start: Tensor, end: Tensor,
    split_counters: Tensor,
) -> Tensor:  # fmt: skip
    """Feed a window of tokens densely, overwriting keys and values that the cache held there.

    tokens [B, Q], start and end [B] int32 → final hidden states [B, Q, C]. Sequence s feeds its
    first end[s] − start[s] tokens at positions start[s], start[s] + 1, … The caller moves the
    lengths.
    """
    counts = end - start
    visible = torch.where(counts > 0, end, 0)  # a sequence that feeds nothing computes nothing

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values, searched = cache.keys[layer], cache.values[layer], cache.searched(layer)
        write_window(keys, values, searched, key, value, start, end, cache.block_size)
        return dense_attention(
            query, keys, values, visible, query_lengths=counts, split_counters=split_counters
        )

    positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    return model.hidden_states(tokens, positions, attend)


@dataclass(frozen=True)
class SparseStep:
    """State that all layers of a sparse step share."""

    plan: Plan
    config: ReSAConfig
    split_counters: Tensor  # [≥ B·Hkv] int32, zeros before and after
    side_stream: torch.cuda.Stream | None  # for work that can wait
    selected: list[Tensor] | None = None  # gets each layer's indices


def attend_sparsely(
    step: SparseStep, query: Tensor, key: Tensor, value: Tensor,
    keys: Tensor, values: Tensor, bounds: Tensor | Bounds8 | Sketches,
) -> Tensor:  # fmt: skip
    """One layer of a sparse step: append, score, select, attend.

    query [B, Hq, D], key and value [B, Hkv, 1, D] → out [B, Hq, D]. keys, values [B, Hkv, T_max, D]
    and bounds [B, Hkv, 2, D, M] or sketches are extended in place.
    """
    # Append and score side by side. The newest block is always attended, so its score is not
    # needed: scoring covers the blocks before it and does not wait for the write. Sketches share
    # one softmax among all tokens, the new one included.
    plan, side, b = step.plan, step.side_stream, step.config.block_size
    n_scores = keys.shape[0] * keys.shape[1] * (keys.shape[2] // b)
    if isinstance(bounds, Sketches):
        side = None
        new = keys, values, bounds, key, value, plan.start, plan.end
        factors = write_sketched(*new, query=query)
        scores = score_rotated(factors, bounds.codes, bounds.scales, plan.visible, b)
    elif side is None and b * keys.shape[3] <= SMALL_BLOCK and n_scores < MANY_SCORES:
        new = key, value, keys, values, bounds
        scores = append_and_score(query, *new, plan.start, plan.end, plan.completed, b)
    else:
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # does nothing for None
            write_window(keys, values, bounds, key, value, plan.start, plan.end, b)
        scores = score_blocks(query, bounds, plan.completed, b)

    # Select, then attend to what is selected, the new token included.
    indices = select_blocks(scores, plan.visible, step.config, counts=plan.counts)
    if step.selected is not None:
        step.selected.append(indices)
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
    return sparse_attention(
        query, keys, values, indices, plan.visible, b,
        counts=plan.counts, split_counters=step.split_counters
    )  # fmt: skip


def sparse_step(model: GPT, tokens: Tensor, cache: BatchedCache, step: SparseStep) -> Tensor:
    """Feed one token per sequence that the plan names → logits [B, V]; tokens [B].

    The caller moves the lengths.
    """
    plan, b = step.plan, step.config.block_size

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values, searched = cache.keys[layer], cache.values[layer], cache.searched(layer)
        key, value = key.contiguous(), value.contiguous()
        if layer < step.config.dense_layers:
            write_window(keys, values, searched, key, value, plan.start, plan.end, b)
            return dense_attention(
                query, keys, values, plan.visible,
                query_lengths=plan.mask, split_counters=step.split_counters
            )  # fmt: skip
        query = query[:, :, 0].contiguous()
        return attend_sparsely(step, query, key, value, keys, values, searched)[:, :, None]

    hidden = model.hidden_states(tokens[:, None], plan.start[:, None], attend)
    return model.output(hidden[:, 0])


def passes(config: ReSAConfig) -> Iterator[bool]:
    """True for each step that holds a dense pass, step by step without end.

    Sequences that begin together stay in step until they end. A step that a sequence no longer
    takes finds it masked.
    """
    n_drifted = 0
    while True:
        is_due = config.is_pass_due(n_drifted if config.schedule == "fused" else n_drifted + 1)
        yield is_due
        n_drifted = 0 if is_due else n_drifted + 1


class DecodeLoop:
    """The state of decoding as tensors on the device, and the steps that update it in place."""

    def __init__(
        self, model: GPT, cache: BatchedCache, max_new_tokens: int, config: ReSAConfig,
        sampler: Sampler, stop_tokens: Collection[int],
    ) -> None:  # fmt: skip
        batch, device = len(cache.lengths), cache.lengths.device
        self.model, self.cache, self.config, self.sampler = model, cache, config, sampler

        # State. The lengths are the cache's own tensor.
        self.tokens = torch.full((batch, max_new_tokens), NO_TOKEN, device=device)  # [B, N]
        self.n_chosen = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens so far
        self.pending = torch.full((batch,), NO_TOKEN, device=device)  # the last of them
        self.n_drifted = torch.zeros(batch, dtype=torch.int32, device=device)  # w
        self.running = torch.ones(batch, dtype=torch.bool, device=device)
        self.stop = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device)

        # Workspace, enough for the widest pass: a rectification's.
        self.split_counters = new_split_counters(model, cache, config.interval or 1)
        has_company = batch * model.config.n_kv_head >= MANY_ROWS and not INTERPRETED
        self.side_stream = torch.cuda.Stream(device) if has_company else None
        self.graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}  # with and without a dense pass
        self.n_reported = 0  # tokens per sequence that `on_token` has been called for
        self.selected: list[Tensor] | None = None  # see SparseStep

    @torch.no_grad()
    def run(
        self, logits: Tensor, on_token: Callable[[int, int, int], None] | None
    ) -> list[list[int]]:
        """Decode from the prefill's last logits [B, V] to the end → each sequence's tokens."""
        first_positions = self.cache.lengths.tolist()
        is_watched = on_token is not None or len(self.stop) > 0
        interval = self.config.interval or 1
        every = interval * triton.cdiv(READ_BACK, interval)

        self.choose(logits, self.running, self.cache.lengths, is_sparse=False)
        n_steps = self.tokens.shape[1] - 1  # the last token is never fed
        for step, rectifies in enumerate(islice(passes(self.config), n_steps), start=1):
            if is_watched and step % every == 0 and not self.report(first_positions, on_token)[1]:
                break
            self.launch(rectifies)

        tokens, _ = self.report(first_positions, on_token)
        self.sampler.advance_generators([len(row) for row in tokens])
        return tokens

    def launch(self, rectifies: bool) -> None:
        """Run one step: as it stands the first time, which compiles, then as a graph."""
        if INTERPRETED or rectifies not in self.graphs:
            self.graphs[rectifies] = None
            self.step(rectifies)
            return
        if self.graphs[rectifies] is None:
            self.graphs[rectifies] = capture(lambda: self.step(rectifies))
        self.graphs[rectifies].replay()

    def step(self, rectifies: bool) -> None:
        """Feed every running sequence's pending token, as the reference's `decode_step` does."""
        config = self.config
        if rectifies and config.schedule == "fused":
            due = self.running & config.is_pass_due(self.n_drifted)
            self.rectify(due, appends=True)
            return

        running = self.running.clone() if rectifies else None  # before the step ends some
        plan = plan_step(self.cache.lengths, self.n_drifted, self.running, config)
        step = SparseStep(plan, config, self.split_counters, self.side_stream, self.selected)
        logits = sparse_step(self.model, self.pending, self.cache, step)
        self.choose(logits, plan.mask, plan.end, is_sparse=True)
        if rectifies:
            self.rectify(running & config.is_pass_due(self.n_drifted), appends=False)

    def rectify(self, mask: Tensor, *, appends: bool) -> None:
        """Re-encode the windows of the sequences in mask [B], and if asked their pending tokens."""
        # The last token chosen is the pending one. The window's tokens come right before it.
        n_drifted = self.n_drifted * mask
        counts = n_drifted + mask if appends else n_drifted
        start = self.cache.lengths - n_drifted
        end = start + counts
        columns = torch.arange(self.config.interval, device=mask.device)
        columns = (self.n_chosen - 1 - n_drifted)[:, None] + columns
        tokens = self.tokens.gather(1, columns.clamp(0, self.tokens.shape[1] - 1)).clamp(min=0)
        hidden = dense_pass(self.model, tokens, self.cache, start, end, self.split_counters)

        if appends:
            last = (counts - 1).clamp(min=0).long()
            logits = self.model.output(hidden[torch.arange(len(last), device=last.device), last])
            self.choose(logits, mask, end, is_sparse=False)
        else:
            self.n_drifted.masked_fill_(mask, 0)

    def choose(self, logits: Tensor, mask: Tensor, end: Tensor, *, is_sparse: bool) -> None:
        """Choose the next tokens of the sequences in mask [B], whose caches now end at `end`."""
        chosen = self.sampler(logits, self.n_chosen)
        state = self.tokens, self.n_chosen, self.pending, self.running
        drift = self.cache.lengths, self.n_drifted
        note_tokens(chosen, mask, end, *state, *drift, self.stop, is_sparse=is_sparse)

    def report(
        self, first_positions: list[int], on_token: Callable[[int, int, int], None] | None
    ) -> tuple[list[list[int]], bool]:
        """Hand new tokens to the callback → all tokens so far, and whether any sequence goes on."""
        # One copy to the host, for which the device is waited for once.
        ends = self.n_chosen[:, None], self.running[:, None]
        state = torch.cat((self.tokens, *ends), dim=1).tolist()
        tokens = [row[:n] for *row, n, _ in state]
        longest = max(map(len, tokens))
        for place in range(self.n_reported, longest):
            for sequence, position in enumerate(first_positions):
                if on_token is not None and place < len(tokens[sequence]):
                    on_token(sequence, position + place, tokens[sequence][place])
        self.n_reported = longest
        return tokens, any(is_running for *_, is_running in state)
