"""Decoding on the GPU without waiting for it: sparse steps and rectifications as CUDA graphs.

The reference's loop looks at the device for every token: at lengths, at windows, at the token chosen. Here all of that
stays on the device. Every step is one replay of a graph that decides by per-sequence masks who takes a sparse step and
who is rectified; lengths, windows, chosen tokens and stop flags are tensors that the graph updates in place. The host
only keeps count of which kinds of step can be due, and reads tokens back once per interval when a callback or a stop
token asks for it, else once at the end.

Where the kernels are interpreted (`TRITON_INTERPRET=1`), the same steps run one operation after another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from resa.reference.cache import KVCache, pad_tokens
from resa.reference.checks import check_lengths, is_integer, require
from resa.reference.config import ReSAConfig
from resa.reference.generate import (
    NO_TOKEN,
    Generation,
    check_request,
    needed_capacity,
    open_generation,
)
from resa.reference.model import GPT
from resa.reference.sampling import sequence_generators

from .attention import count_dense_units, enqueue_dense, enqueue_sparse
from .blocks import MANY_SCORES, block_bounds, enqueue_append_and_scores, enqueue_scores, enqueue_selection
from .bookkeeping import enqueue_append, enqueue_plan
from .bounds8 import Bounds8, compress_bounds
from .cache import enqueue_write
from .checks import INTERPRETED, check_kernel_dtypes, check_sizes
from .graphs import capture
from .model import accelerated

PREFILL_CHUNK = 1024  # tokens per dense pass of a prompt, at most; changes no result
PREFILL_ROWS = 8192  # and of all prompts together, because a pass holds some 50,000 numbers per token of a 7B model
Bounds = Sequence[Tensor | Bounds8]  # per layer: [B, Hkv, 2, D, M], exact or in 8 bits
SMALL_BLOCK = 2048  # channels of a block's keys, up to which one warp appends a token while others score
MANY_ROWS = 16  # KV heads of all sequences, from which on appending on a second stream costs less than it saves
READ_BACK = 32  # fewest tokens between two looks at the device; a multiple of the interval is


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
    eight_bit_bounds: bool = False,
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens; the reference's `generate`, argument for argument.

    Three things differ. It does not speculate. `on_token` is called once per interval, for all tokens chosen since. And
    `eight_bit_bounds` lets selection read bounds rounded outward to 8 bits, half the bytes, which may select other
    blocks. Raises `ValueError` naming the argument before any work starts, also for what the kernels do not support.
    """
    config = ReSAConfig() if config is None else config
    check_request(model, prompts, max_new_tokens, config, stop_tokens, resume)
    check_model(model, config, len(prompts))
    capacity = needed_capacity(model, prompts, max_new_tokens, resume)
    own = sequence_generators(len(prompts), temperature, top_p, top_k, generator)
    model = accelerated(model)
    if resume is not None:
        resume = replace(resume, cache=replace(resume.cache, block_bounds=block_bounds))
    generation, feed = open_generation(model, prompts, padded_capacity(capacity, config.block_size), config, resume)
    logits = prefill(model, feed, generation.cache)
    if max_new_tokens == 0:
        return generation
    choose = Sampler(temperature, top_p, top_k, own, max_new_tokens, logits.device)
    cache = generation.cache
    if eight_bit_bounds:
        bounds = [compress_bounds(layer) for layer in cache.bounds]
        cache.bounds = cache.bounds.new_empty(*cache.bounds.shape[:-1], 0)  # not both at once
    else:
        bounds = cache.bounds
    generation = DecodeLoop(model, cache, bounds, max_new_tokens, config, choose, stop_tokens).run(logits, on_token)
    if eight_bit_bounds:
        cache.bounds = torch.stack([block_bounds(keys, cache.lengths, config.block_size) for keys in cache.keys])
    return generation


def padded_capacity(tokens: int, block_size: int) -> int:
    """The next capacity at which every row of bounds is 16 blocks wide or a multiple: loads of it need no splitting."""
    return triton.cdiv(tokens, 16 * block_size) * 16 * block_size


def check_model(model: GPT, config: ReSAConfig, batch: int) -> None:
    """The kernels must support the model's shape, dtype and device, the block size and the batch."""
    shape = model.config
    check_kernel_dtypes(model=model.embed.weight)
    group, rows = shape.n_head // shape.n_kv_head, batch * shape.n_kv_head
    check_sizes(D=shape.head_dim, G=group, block_size=config.block_size, rows=rows)


@torch.no_grad()
def prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: KVCache, *, chunk_size: int | None = None) -> Tensor:
    """Append each sequence's prompt to the cache densely, `chunk_size` tokens at a time (None: by the batch).

    Returns the logits [B, V] after each prompt's last token. An empty prompt leaves its sequence as it is (and its
    logits zero). The result does not depend on the chunking. Raises `ValueError` for prompts that don't fit.
    """
    if chunk_size is None:
        chunk_size = max(1, min(PREFILL_CHUNK, PREFILL_ROWS // max(1, len(prompts))))
    require(is_integer(chunk_size, 1), "chunk_size", chunk_size, "an integer ≥ 1")
    tokens, counts = pad_tokens("prompts", prompts, cache)
    check_lengths("prompts: lengths in the cache", cache.lengths + counts, min(cache.capacity, model.config.context))
    model.check_tokens(tokens)
    check_kernel_dtypes(cache=cache.keys)
    longest = tokens.shape[1]
    logits = torch.zeros(len(prompts), model.config.vocab_size, dtype=cache.keys.dtype, device=counts.device)
    arrivals = new_arrivals(model, cache, min(chunk_size, longest))
    for offset in range(0, longest, chunk_size):
        fed = (counts - offset).clamp(0, chunk_size)
        chunk = tokens[:, offset : offset + chunk_size]
        hidden = dense_pass(model, chunk, cache, cache.bounds, cache.lengths, cache.lengths + fed, arrivals)
        cache.lengths += fed
        ends_here = (fed > 0) & (counts <= offset + chunk_size)
        logits[ends_here] = model.output(hidden[ends_here, fed[ends_here].long() - 1])
    return logits


def new_arrivals(model: GPT, cache: KVCache, width: int) -> Tensor:
    """Zeroed arrival counters, enough for passes of up to `width` tokens over one layer of the cache."""
    group = model.config.n_head // model.config.n_kv_head
    units = max(len(cache.lengths) * model.config.n_kv_head, count_dense_units(cache.keys[0], group, width))
    return torch.zeros(units, dtype=torch.int32, device=cache.lengths.device)


def dense_pass(
    model: GPT, tokens: Tensor, cache: KVCache, bounds: Bounds, start: Tensor, end: Tensor, arrivals: Tensor
) -> Tensor:
    """Feed a window densely, as `GPT.dense_pass`, without reading anything back.

    Sequence s feeds its first end[s] − start[s] tokens at positions start[s], …; none where they are equal. tokens
    [B, Q], start and end [B] int32 → final hidden states [B, Q, C]. `bounds` are kept up to date; the caller moves the
    lengths.
    """
    counts = end - start
    visible = torch.where(counts > 0, end, 0)  # nothing is computed for a sequence that feeds nothing

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values, new = cache.keys[layer], cache.values[layer], (key.contiguous(), value.contiguous())
        enqueue_write(keys, values, bounds[layer], *new, start, end, cache.block_size)
        return enqueue_dense(query.contiguous(), keys, values, visible, counts, arrivals)[0]

    positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    return model.transform(tokens, positions, attend)


@dataclass(frozen=True)
class SparseStep:
    """What all layers of a sparse step share: where each sequence's token goes, and how much there is to read."""

    mask: Tensor  # [B] int32: 1 for the sequences that take the step, 0 for others
    start: Tensor  # [B] int32: the position of the token fed
    end: Tensor  # [B] int32: start + 1, or start for a sequence that feeds nothing
    visible: Tensor  # [B] int32: tokens to attend to, 0 for a sequence that feeds nothing
    completed: Tensor  # [B] int32: those before the newest block
    counts: Tensor  # [B] int32: blocks to select, n
    config: ReSAConfig
    arrivals: Tensor  # [≥ B·Hkv] int32 zeros
    beside: torch.cuda.Stream | None  # for what can wait
    selected: list[tuple[Tensor, Tensor]] | None = None  # where every layer leaves its query and indices, to be seen


def attend_sparsely(
    step: SparseStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor | Bounds8,
) -> Tensor:
    """One layer of a sparse step: append, score, select, attend.

    query [B, Hq, D], key and value [B, Hkv, 1, D]; keys, values [B, Hkv, T_max, D] and bounds [B, Hkv, 2, D, M] are
    extended in place → out [B, Hq, D]. The newest block is always attended, so its score is not needed: scoring covers
    the blocks before it and does not wait for the write.
    """
    b = step.config.block_size
    n_scores = keys.shape[0] * keys.shape[1] * (keys.shape[2] // b)
    if step.beside is None and b * keys.shape[3] <= SMALL_BLOCK and n_scores < MANY_SCORES:
        new = key, value, keys, values, bounds
        scores = enqueue_append_and_scores(query, *new, step.start, step.end, step.completed, b)
    else:
        if step.beside is not None:
            step.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(step.beside):  # does nothing for None
            enqueue_write(keys, values, bounds, key, value, step.start, step.end, b)
        scores = enqueue_scores(query, bounds, step.completed, b)
    indices = enqueue_selection(scores, step.visible, step.counts, step.config)
    if step.selected is not None:
        step.selected.append((query, indices))
    if step.beside is not None:
        torch.cuda.current_stream().wait_stream(step.beside)
    return enqueue_sparse(query, keys, values, indices, step.counts, step.visible, b, step.arrivals)[0]


def sparse_pass(model: GPT, tokens: Tensor, cache: KVCache, bounds: Bounds, step: SparseStep) -> Tensor:
    """Feed one token per sequence, as `GPT.sparse_pass`, without reading anything back.

    tokens [B] → final hidden states [B, C]. `bounds` are kept up to date; the caller moves the lengths.
    """

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        if layer < step.config.dense_layers:
            keys, values = cache.keys[layer], cache.values[layer]
            enqueue_write(keys, values, bounds[layer], key, value, step.start, step.end, cache.block_size)
            return enqueue_dense(query.contiguous(), keys, values, step.visible, step.mask, step.arrivals)[0]
        query = query[:, :, 0].contiguous()
        out = attend_sparsely(step, query, key, value, cache.keys[layer], cache.values[layer], bounds[layer])
        return out[:, :, None]

    return model.transform(tokens[:, None], step.start[:, None], attend)[:, 0]


@dataclass(frozen=True)
class Kinds:
    """What a step consists of; each combination that occurs becomes one CUDA graph."""

    sparse: bool  # some sequence feeds its pending token sparsely
    dense: bool  # some sequence feeds its pending token densely, its cache being short
    fused: bool  # some sequence re-encodes its window together with the pending token
    rectify: bool  # some sequence re-encodes its window alone (schedule "paper")


class Forecast:
    """The host's account of lengths and windows: which kinds of step can be due next.

    It follows every sequence as if none had met a stop token, and so never leaves out a kind that the device needs; a
    kind too many finds its mask empty.
    """

    def __init__(self, lengths: list[int], config: ReSAConfig) -> None:
        self.lengths, self.windows, self.config = lengths, [0] * len(lengths), config

    def advance(self) -> Kinds:
        """The kinds of the step that every sequence takes now."""
        config, kinds = self.config, {"sparse": False, "dense": False, "fused": False, "rectify": False}
        for s, window in enumerate(self.windows):
            is_full = config.interval is not None and window + 1 >= config.interval
            if self.lengths[s] < config.dense_below:
                kinds["dense"], self.windows[s] = True, 0
            elif is_full and config.schedule == "fused":
                kinds["fused"], self.windows[s] = True, 0
            else:
                kinds["sparse"], self.windows[s] = True, window + 1
                if is_full:
                    kinds["rectify"], self.windows[s] = True, 0
            self.lengths[s] += 1
        return Kinds(**kinds)


class DecodeLoop:
    """The state of decoding as tensors on the device, and the steps that update it in place.

    tokens [B, N], −1 where none is chosen yet; count [B] of those chosen; pending [B], the last of them; window [B], w;
    active [B]. The lengths are the cache's own tensor.
    """

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        bounds: Bounds,
        max_new_tokens: int,
        config: ReSAConfig,
        choose: Sampler,
        stop_tokens: Collection[int],
    ) -> None:
        batch, device = len(cache.lengths), cache.lengths.device
        self.model, self.cache, self.bounds, self.config, self.choose = model, cache, bounds, config, choose
        self.tokens = torch.full((batch, max_new_tokens), NO_TOKEN, device=device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.pending = torch.full((batch,), NO_TOKEN, device=device)
        self.window = torch.zeros(batch, dtype=torch.int32, device=device)
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.stop = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device)
        self.arrivals = new_arrivals(model, cache, config.interval or 1)
        has_company = batch * model.config.n_kv_head >= MANY_ROWS and not INTERPRETED
        self.beside = torch.cuda.Stream(device) if has_company else None
        self.graphs: dict[Kinds, torch.cuda.CUDAGraph | None] = {}
        self.delivered = 0  # tokens per sequence that `on_token` has been told of
        self.selected: list[tuple[Tensor, Tensor]] | None = None  # a list gets each layer's query and indices

    @torch.no_grad()
    def run(self, logits: Tensor, on_token: Callable[[int, int, int], None] | None) -> Generation:
        """Decode from the prefill's last logits [B, V] to the end."""
        first_positions = self.cache.lengths.tolist()
        forecast = Forecast(list(first_positions), self.config)
        is_watched = on_token is not None or len(self.stop) > 0
        interval = self.config.interval or 1
        every = interval * triton.cdiv(READ_BACK, interval)
        self.append(logits, self.active, self.cache.lengths, is_sparse=False)
        for step in range(1, self.tokens.shape[1]):
            if is_watched and step % every == 0 and not self.report(first_positions, on_token)[1]:
                break
            self.launch(forecast.advance())
        tokens, _ = self.report(first_positions, on_token)
        self.choose.settle([len(row) for row in tokens])
        return Generation(tokens, self.cache, self.window.long(), self.pending)

    def launch(self, kinds: Kinds) -> None:
        """Run one step: as it stands the first time, which compiles what it needs, and as a graph from then on."""
        if INTERPRETED or kinds not in self.graphs:
            self.graphs[kinds] = None
            return self.step(kinds)
        if self.graphs[kinds] is None:
            self.graphs[kinds] = capture(lambda: self.step(kinds))
        return self.graphs[kinds].replay()

    def step(self, kinds: Kinds) -> None:
        """Feed every active sequence's pending token, by the same rules as the reference's `decode_step`."""
        config = self.config
        if kinds.dense or kinds.fused or kinds.rectify:  # whose turn it is, by the state before a sparse step moves it
            stepping = self.active.clone()
            dense = stepping & (self.cache.lengths < config.dense_below)
        if kinds.fused:
            fused = stepping & ~dense & (self.window + 1 >= config.interval)
        if kinds.sparse:
            self.sparse_step()
        if kinds.dense:
            self.dense_step(dense, 1, appends=True)
        if kinds.fused:
            self.dense_step(fused, config.interval, appends=True)
        if kinds.rectify:
            self.dense_step(stepping & (self.window >= config.interval), config.interval, appends=False)

    def sparse_step(self) -> None:
        """Feed the pending tokens of the sequences whose turn it is, attending to the selected blocks alone."""
        plan = enqueue_plan(self.cache.lengths, self.window, self.active, self.config)
        step = SparseStep(*plan, self.config, self.arrivals, self.beside, self.selected)
        hidden = sparse_pass(self.model, self.pending, self.cache, self.bounds, step)
        self.append(self.model.output(hidden), step.mask, step.end, is_sparse=True)

    def dense_step(self, mask: Tensor, width: int, *, appends: bool) -> None:
        """Re-encode the windows of the sequences in mask [B], and with `appends` their pending tokens as well.

        `width` is the most tokens of one sequence. While a cache is below `dense_below` its window is empty.
        """
        window = self.window * mask
        counts = window + mask if appends else window
        start = self.cache.lengths - window
        end = start + counts
        # The last token chosen is the pending one; the window's tokens come right before it.
        column = (self.count - 1 - window)[:, None] + torch.arange(width, device=mask.device)
        tokens = self.tokens.gather(1, column.clamp(0, self.tokens.shape[1] - 1)).clamp(min=0)
        hidden = dense_pass(self.model, tokens, self.cache, self.bounds, start, end, self.arrivals)
        if appends:
            last = (counts - 1).clamp(min=0).long()
            logits = self.model.output(hidden[torch.arange(len(last), device=last.device), last])
            self.append(logits, mask, end, is_sparse=False)
        else:
            self.window.masked_fill_(mask, 0)

    def append(self, logits: Tensor, mask: Tensor, end: Tensor, *, is_sparse: bool) -> None:
        """Choose the next tokens of the sequences in mask [B], whose caches end at `end` now, from logits [B, V]."""
        chosen = self.choose(logits, self.count)
        state = self.tokens, self.count, self.pending, self.active, self.cache.lengths, self.window
        enqueue_append(chosen, mask, end, *state, self.stop, is_sparse=is_sparse)

    def report(
        self, first_positions: list[int], on_token: Callable[[int, int, int], None] | None
    ) -> tuple[list[list[int]], bool]:
        """Read back what was chosen and hand it to the callback in order → all tokens so far, whether any goes on."""
        waiting = [_to_host(tensor) for tensor in (self.tokens, self.count, self.active)]
        if not INTERPRETED:
            torch.cuda.current_stream().synchronize()
        rows, count, active = (tensor.tolist() for tensor in waiting)
        tokens = [row[:n] for row, n in zip(rows, count, strict=True)]
        for place in range(self.delivered, max(count)):
            for sequence, position in enumerate(first_positions):
                if on_token is not None and place < len(tokens[sequence]):
                    on_token(sequence, position + place, tokens[sequence][place])
        self.delivered = max(count)
        return tokens, any(active)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, there once the stream has been waited for; on the CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class Sampler:
    """The reference's `sample_token` for a whole batch, on the device.

    Its uniform numbers are drawn ahead, from copies of the sequences' generators; `settle` then moves the generators
    themselves by what was used.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        top_k: int | None,
        generators: Sequence[torch.Generator | None],
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        self.temperature, self.top_p, self.top_k, self.generators = temperature, top_p, top_k, generators
        if temperature > 0:
            ahead = [_uniforms(_twin(generator), max_new_tokens) for generator in generators]
            self.uniforms = torch.stack(ahead).to(device)  # [B, N]

    def __call__(self, logits: Tensor, count: Tensor) -> Tensor:
        """The tokens [B] chosen from logits [B, V], each sequence's count[s]-th."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)  # the first of equals
        # Sorted as they are: 16 bits take a fraction of what float64 takes.
        ranked, ids = logits.sort(dim=-1, descending=True, stable=True)
        wide = ranked[:, : self.top_k].double()
        probabilities = torch.softmax((wide - wide[:, :1]) / self.temperature, dim=-1)
        mass = probabilities.cumsum(dim=-1)
        kept = (mass - probabilities < self.top_p - 1e-12).sum(dim=-1, keepdim=True).clamp(min=1)
        uniform = self.uniforms.gather(1, count.clamp(max=self.uniforms.shape[1] - 1)[:, None])
        place = (mass <= uniform * mass.gather(1, kept - 1)).sum(dim=-1, keepdim=True)
        return ids.gather(1, torch.minimum(place, kept - 1))[:, 0]

    def settle(self, count: list[int]) -> None:
        """Let every generator have drawn one number per token that was generated."""
        for generator, n in zip(self.generators, count, strict=True):
            if self.temperature > 0:
                _uniforms(generator, n)


def _twin(generator: torch.Generator) -> torch.Generator:
    """Another generator in the same state."""
    return torch.Generator(generator.device).set_state(generator.get_state())


def _uniforms(generator: torch.Generator, n: int) -> Tensor:
    """n uniform numbers, drawn one by one: a single draw of n gives others."""
    draws = [torch.rand((), dtype=torch.float64, device=generator.device, generator=generator) for _ in range(n)]
    return torch.stack(draws) if draws else torch.zeros(0, dtype=torch.float64)
