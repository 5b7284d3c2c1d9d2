"""How close sparse decoding stays to dense decoding when both read the same tokens.

Dense decoding writes a continuation; every other way of decoding is then led along those same tokens, so that its
predictions and its cache can be compared with the dense ones position by position. Against dense:

- *KL*: Kullback-Leibler divergence of the next-token distributions, KL(dense ‖ other), in nats;
- *agreement*: how often both find the same token most likely;
- *top-3 accuracy*: how often the token that truly follows is among the three found most likely (paper, Fig. 1);
- *drift* of token j: max over layers and KV heads of ‖k_j − k*_j‖ / ‖k*_j‖, and the same for v, with k*, v* from
  one dense pass over the same tokens.

*Decode-only* keeps the cache exact, so that its loss is the *step error* alone; what another loses beyond that is
owed to drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..cache import KVCache
from ..checks import is_integer, require
from ..config import ReSAConfig
from ..generate import NO_TOKEN, Generation, decode_along, generate, prefill
from ..model import GPT, Operations
from ..sampling import sample_token
from .statistics import bootstrap


def decoding_variants(config: ReSAConfig, intervals: Sequence[int]) -> dict[str, ReSAConfig]:
    """The ways of decoding that are compared: corners of one configuration and its rectified forms."""
    variants = {"sparse": replace(config, interval=None)}
    variants |= {f"ReSA f={f}": replace(config, interval=f) for f in sorted(intervals, reverse=True)}
    variants["decode-only"] = replace(config, interval=1, schedule="paper")
    return variants


def read_ratio(config: ReSAConfig, bounds: float = 1.0) -> float:
    """KV bytes that a layer reads per token relative to dense decoding, by the cost model (eq. 6).

    `bounds`: what is read of both 16-bit bounds, 1/2 for the one that each channel needs, 1/4 where that has 8 bits.

    >>> round(read_ratio(ReSAConfig(schedule="paper")), 3), round(read_ratio(ReSAConfig(interval=None)), 4)
    (0.194, 0.1625)
    """
    step = bounds / config.block_size + config.active_ratio
    if config.interval is None:
        return step
    if config.schedule == "paper":
        return step + 1 / config.interval
    return ((config.interval - 1) * step + 1) / config.interval


@dataclass
class ReadMeter:
    """Counts the bytes of keys, values and bounds that the operations passed through `wrap` have to read."""

    read: int = 0

    def wrap(self, ops: Operations) -> Operations:
        """The same operations, metered. Each visible token counts once per KV head, however often it is used."""

        def score_blocks(query: Tensor, bounds: Tensor, lengths: Tensor, block_size: int) -> Tensor:
            blocks = int(((lengths + block_size - 1) // block_size).sum())
            self.read += blocks * bounds[0, :, :, :, 0].numel() * bounds.element_size()
            return ops.score_blocks(query, bounds, lengths, block_size)

        def sparse_attention(
            query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, lengths: Tensor, block_size: int
        ) -> Tensor:
            in_block = (lengths.view(-1, 1, 1) - indices * block_size).clamp(0, block_size)
            self.read += int((in_block * (indices >= 0)).sum()) * 2 * keys.shape[-1] * keys.element_size()
            return ops.sparse_attention(query, keys, values, indices, lengths, block_size)

        def dense_attention(
            query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, query_lengths: Tensor
        ) -> Tensor:
            tokens = int((lengths * (query_lengths > 0)).sum())
            self.read += tokens * 2 * keys.shape[1] * keys.shape[-1] * keys.element_size()
            return ops.dense_attention(query, keys, values, lengths, query_lengths=query_lengths)

        return replace(
            ops, score_blocks=score_blocks, sparse_attention=sparse_attention, dense_attention=dense_attention
        )


@dataclass
class Teacher:
    """A dense continuation of each prompt and what dense decoding made of it."""

    opening: Generation  # every prompt prefilled but for its last token
    last_tokens: list[list[int]]  # that last token of each prompt
    tokens: list[list[int]]  # [B][N] the continuation
    log_probs: Tensor  # [B, N, V] log-probabilities after each of its tokens
    cache: KVCache  # of one dense pass over prompt and continuation
    temperature: float  # with which it chose, and its seed
    seed: int
    following: Tensor  # [B, N] the token after each of the continuation, −1 where none is known

    @property
    def bytes_per_token(self) -> float:
        """What dense decoding reads: all keys and values up to the token fed, on average."""
        keys = self.cache.keys
        per_cached_token = 2 * keys.shape[0] * keys.shape[2] * keys.shape[4] * keys.element_size()
        before = self.opening.cache.lengths.double().mean().item() + 1
        return per_cached_token * (before + (len(self.tokens[0]) + 1) / 2)

    @property
    def hits(self) -> Tensor:
        """[B, N] bool: whether the token that follows is among dense decoding's three likeliest."""
        return top_hits(self.log_probs, self.following)


@dataclass
class Comparison:
    """One way of decoding, led along the teacher's tokens; every tensor is on the CPU."""

    kl: Tensor  # [B, N] nats, after each token of the continuation
    agreement: Tensor  # [B, N] bool
    hits: Tensor  # [B, N] bool, whether the token that follows is among the three likeliest; False where none is known
    mean_drift: Tensor  # [B, N] mean over the continuation's tokens cached so far, after each step
    largest_drift: float  # of any token at any step
    drift_after_rectification: float | None  # largest over all rectifications, None if there was none
    bytes_per_token: float  # keys, values and bounds read per sequence and decoded token
    own_tokens: list[int] | None  # the first prompt's continuation where it chose for itself


@torch.no_grad()
def teach(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    *,
    continuations: Sequence[Sequence[int]] | None = None,
    following: Sequence[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int, int, int], None] | None = None,
) -> Teacher:
    """Continue every prompt densely by `n_tokens`, or take the `continuations` given, and keep the predictions.

    `following` are the tokens that come after the continuations, one each, where they are known.
    """
    opening = generate(model, [list(prompt[:-1]) for prompt in prompts], 0, config)
    last_tokens = [list(prompt[-1:]) for prompt in prompts]
    if continuations is None:
        chosen = generate(
            model,
            last_tokens,
            n_tokens,
            replace(config, interval=1, schedule="fused"),
            temperature=temperature,
            generator=[torch.Generator().manual_seed(seed) for _ in prompts],
            on_token=on_token,
            resume=opening,
        )
        continuations = chosen.tokens
    cache = opening.cache.resized(int(opening.cache.lengths.max()) + 1 + n_tokens)
    fed = torch.tensor([last + list(more) for last, more in zip(last_tokens, continuations, strict=True)])
    counts = torch.full_like(cache.lengths, n_tokens + 1)
    hidden = model.dense_pass(fed.to(cache.keys.device), cache, cache.lengths, counts)
    log_probs = model.output(hidden[:, 1:]).log_softmax(dim=-1)
    tokens = [list(row) for row in continuations]
    after = torch.full((len(prompts), 1), NO_TOKEN) if following is None else torch.tensor(following)[:, None]
    next_tokens = torch.cat((fed[:, 2:], after), dim=1).to(log_probs.device)
    return Teacher(opening, last_tokens, tokens, log_probs, cache, temperature, seed, next_tokens)


def top_hits(scores: Tensor, wanted: Tensor, n: int = 3) -> Tensor:
    """Whether the token wanted is among the n of highest score: scores [B, N, V], wanted [B, N] → [B, N] bool."""
    return (scores.topk(min(n, scores.shape[-1]), dim=-1).indices == wanted[..., None]).any(dim=-1)


class OwnChoice:
    """A sequence of tokens that chooses itself: each is sampled from the `logits` [V] last set."""

    def __init__(self, logits: Tensor, temperature: float, seed: int) -> None:
        self.logits, self.temperature = logits, temperature
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        while True:
            yield sample_token(self.logits, self.temperature, 1.0, self.generator)


def follow(
    model: GPT,
    teacher: Teacher,
    config: ReSAConfig,
    *,
    own_choice: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Comparison:
    """Lead `config`'s way of decoding along the teacher's tokens and compare it step by step.

    All sequences are rectified at the same steps, so `config.dense_below` must be 0 (`ValueError` otherwise).

    With `own_choice` a second copy of the first prompt runs in the same batch and chooses its tokens itself, as the
    teacher did and with the same random numbers. `on_step(step)` is called after each token.
    """
    require(config.dense_below == 0, "config.dense_below", config.dense_below, "0: all sequences decode in step")
    batch, n_tokens = len(teacher.tokens), len(teacher.tokens[0])
    rows = [*range(batch), 0] if own_choice else list(range(batch))
    meter = ReadMeter()
    model = model.with_ops(meter.wrap(model.ops))
    cache = teacher.opening.cache.selected(rows).resized(teacher.cache.capacity)
    logits = prefill(model, [teacher.last_tokens[row] for row in rows], cache)
    meter.read = 0  # what counts is decoding
    fed: list[Iterable[int]] = list(teacher.tokens)
    if own_choice:
        fed.append(own := OwnChoice(logits[-1], teacher.temperature, teacher.seed))
    record = _Record.start(batch, n_tokens)
    window, state = 0, None
    for step, (logits, state) in enumerate(decode_along(model, cache, fed, config)):
        if own_choice:
            own.logits = logits[-1]
        record.add_predictions(step, logits[:batch], teacher.log_probs[:, step], teacher.following[:, step])
        record.add_drift(step, state, window, teacher.cache)
        window = int(state.window[0])
        if on_step is not None:
            on_step(step)
    return Comparison(
        record.kl,
        record.agreement,
        record.hits,
        record.mean_drift,
        record.largest_drift,
        record.after_rectification,
        meter.read / (len(rows) * n_tokens),
        state.tokens[-1] if own_choice else None,
    )


def kv_drift(cache: KVCache, exact: KVCache, positions: Tensor) -> Tensor:
    """Drift of the tokens at `positions` [B, n] → [B, n]."""
    row = torch.arange(len(positions), device=positions.device)[:, None]
    largest = []
    for given, wanted in ((cache.keys, exact.keys), (cache.values, exact.values)):
        given, wanted = given[:, row, :, positions], wanted[:, row, :, positions]  # [B, n, layer, Hkv, D]
        largest.append(((given - wanted).norm(dim=-1) / wanted.norm(dim=-1)).amax(dim=(2, 3)))
    return torch.maximum(*largest)


@dataclass
class _Record:
    """The running measurements of `follow`."""

    kl: Tensor  # [B, N]
    agreement: Tensor  # [B, N]
    hits: Tensor  # [B, N]
    drift: Tensor  # [B, N] as of now
    mean_drift: Tensor  # [B, N]
    largest_drift: float = 0.0
    after_rectification: float | None = None

    @classmethod
    def start(cls, batch: int, n_tokens: int) -> _Record:
        zeros = torch.zeros(batch, n_tokens)
        return cls(zeros.clone(), zeros.bool(), zeros.bool(), zeros.clone(), zeros)

    def add_predictions(self, step: int, logits: Tensor, wanted: Tensor, following: Tensor) -> None:
        given = logits.log_softmax(dim=-1)
        self.hits[:, step] = top_hits(given[:, None], following[:, None])[:, 0]
        self.kl[:, step] = (wanted.exp() * (wanted - given)).sum(dim=-1)
        self.agreement[:, step] = given.argmax(dim=-1) == wanted.argmax(dim=-1)

    def add_drift(self, step: int, state: Generation, window_before: int, exact: KVCache) -> None:
        """Measure the tokens that this step wrote: the newest one, after a rectification the whole window."""
        is_rectified = int(state.window[0]) <= window_before
        written = window_before + 1 if is_rectified else 1
        lengths = state.cache.lengths.long()
        positions = lengths[: len(self.drift), None] - written + torch.arange(written, device=lengths.device)
        drift = kv_drift(state.cache, exact, positions).to(self.drift)
        self.drift[:, step + 1 - written : step + 1] = drift
        self.mean_drift[:, step] = self.drift[:, : step + 1].mean(dim=1)
        self.largest_drift = max(self.largest_drift, float(drift.max()))
        if is_rectified:
            self.after_rectification = max(self.after_rectification or 0.0, float(drift.max()))


def measure_fidelity(
    model: GPT,
    documents: Sequence[Sequence[int]],
    n_tokens: int,
    config: ReSAConfig,
    intervals: Sequence[int],
    *,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, object]:
    """Compare all variants over many documents, along the documents' own last `n_tokens`; JSON-ready.

    documents: token lists of any lengths above n_tokens + 1. Intervals of confidence: bootstrap over documents.
    """
    require(is_integer(n_tokens, 1), "n_tokens", n_tokens, "an integer ≥ 1")
    require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
    shortest = min(map(len, documents), default=0)
    require(shortest > n_tokens + 1, "documents", f"{shortest} tokens", f"documents of more than {n_tokens + 1} tokens")
    variants = decoding_variants(config, intervals)
    found: dict[str, list[Comparison]] = {name: [] for name in variants}
    dense_hits: list[Tensor] = []
    starts = range(0, len(documents), batch)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Fidelity", total=len(starts) * len(variants))
        for start in starts:
            some = documents[start : start + batch]
            prompts, continuations = [d[:-n_tokens] for d in some], [d[-n_tokens:] for d in some]
            teacher = teach(model, prompts, n_tokens, config, continuations=continuations)
            dense_hits.append(teacher.hits.cpu())
            for name, variant in variants.items():
                found[name].append(follow(model, teacher, variant))
                bar.advance(task)
    rows = summarise_fidelity(found)
    about = {"documents": len(documents), "tokens_each": n_tokens, "config": asdict(config)}
    return {**about, "variants": rows, "by_position": by_position(found, torch.cat(dense_hits))}


def summarise_fidelity(found: Mapping[str, Sequence[Comparison]]) -> dict[str, dict[str, object]]:
    """Means and intervals per variant; differences between variants are taken document by document."""
    losses = {name: torch.cat([each.kl for each in several]).mean(dim=1) for name, several in found.items()}
    rows = {}
    for name, several in found.items():
        kl = losses[name]  # [documents]
        drift, gain = kl - losses["decode-only"], losses["sparse"] - kl
        after = [each.drift_after_rectification for each in several if each.drift_after_rectification is not None]
        rows[name] = {
            "kl": float(kl.mean()),
            "kl_95": bootstrap(kl.numpy()),
            "drift_kl": float(drift.mean()),
            "drift_kl_95": bootstrap(drift.numpy()),
            "gain_over_sparse": float(gain.mean()),
            "gain_over_sparse_95": bootstrap(gain.numpy()),
            "agreement": float(torch.cat([each.agreement for each in several]).float().mean()),
            "mean_drift": float(torch.cat([each.mean_drift for each in several]).mean()),
            "largest_drift": max(each.largest_drift for each in several),
            "drift_after_rectification": max(after, default=None),
        }
    return rows


def by_position(
    found: Mapping[str, Sequence[Comparison]], dense_hits: Tensor, *, width: int = 64
) -> dict[str, dict[str, object]]:
    """How top-3 accuracy, KL and drift go on as more is decoded (paper, Fig. 1): means over `width` tokens each.

    dense_hits [documents, N]. The last token's successor is not known, so the last token is left out. Drift is that of
    all tokens decoded so far, so it shrinks where most of them are exact.
    """
    curves = {
        name: {part: torch.cat([getattr(each, part) for each in several]) for part in ("hits", "kl", "mean_drift")}
        for name, several in found.items()
    }
    curves["dense"] = {"hits": dense_hits}
    n_tokens = dense_hits.shape[1]
    starts = list(range(0, n_tokens - 1, width))
    result: dict[str, dict[str, object]] = {}
    for name, parts in curves.items():
        rows: dict[str, object] = {"from": starts}
        for part, values in parts.items():
            known = values[:, : n_tokens - 1]
            means = [known[:, start : start + width].double().mean(dim=1).numpy() for start in starts]
            label = "accuracy" if part == "hits" else part
            rows |= {label: [each.mean() for each in means], f"{label}_95": [bootstrap(each) for each in means]}
        result[name] = rows
    return result
