"""How good a model is at what it was trained for: held-out code, use of its context, lookups over a distance.

- *Bits per byte* of each held-out document, beside `xz -9e` of the same file: the yardstick that needs no model.
- *Loss by position* in long documents, and the loss of the same tokens when only the last 1,024 are visible:
  a model that uses its context is better late than early, and better with the context than without.
- *Lookups*: a value assigned thousands of tokens ago, asked for exactly, by dense and by sparse decoding.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..checks import is_integer, require
from ..config import ReSAConfig
from ..corpus import Document, lookup_probe
from ..generate import decode_along, generate
from ..model import GPT
from ..tokenizer import END_OF_TEXT
from .statistics import bootstrap

SHORT_CONTEXT = 1024  # tokens
LATE = 4096  # tokens: positions from here on must profit from the context before


@dataclass(frozen=True)
class DocumentLoss:
    """Negative log-likelihood of one document's tokens, in nats."""

    n_bytes: int
    n_bytes_xz: int
    nats: Tensor  # [tokens], each given up to `context` tokens before it
    nats_short: Tensor  # [tokens], each given at most SHORT_CONTEXT tokens before it; empty if the document is short

    @property
    def bits(self) -> float:
        return float(self.nats.double().sum()) / float(np.log(2))


def document_loss(model: GPT, document: Document, tokenizer: tiktoken.Encoding, *, long: int) -> DocumentLoss:
    """Loss of every token of a document; the first is predicted from the end of the document before it.

    Documents of `long` tokens or more are read a second time with a short context.
    """
    raw = document.text.encode()
    end = tokenizer.encode_single_token(END_OF_TEXT)
    tokens = torch.tensor([end, *tokenizer.encode_ordinary(document.text)], device=model.embed.weight.device)
    nats = token_losses(model, tokens, model.config.context)
    nats_short = token_losses(model, tokens, SHORT_CONTEXT) if len(nats) >= long else nats[:0]
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)  # what `xz -9e` writes
    return DocumentLoss(len(raw), len(packed), nats, nats_short)


@torch.no_grad()
def token_losses(model: GPT, tokens: Tensor, context: int) -> Tensor:
    """−log p of tokens[1:], in windows of `context` tokens of which all but the first score their second half.

    tokens [n + 1] → nats [n] float32 on the CPU. Every token after the first window sees at least context / 2.
    """
    n, half = len(tokens) - 1, max(context // 2, 1)
    losses = torch.empty(n)
    for begin in range(0, max(n - half, 1), half):
        window = tokens[begin : begin + context + 1]
        loss = F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="none").cpu()
        scored = 0 if begin == 0 else half
        losses[begin + scored : begin + len(loss)] = loss[scored:]
    return losses


@torch.no_grad()
def lookup_hits(
    model: GPT, probes: Sequence[tuple[list[int], list[int]]], configs: Mapping[str, ReSAConfig]
) -> dict[str, Tensor]:
    """Which values are decoded exactly, greedily, under each configuration: name → [probes] bool.

    The prompts are prefilled once, all but their last token: that one is fed by a decoding step, so that sparse
    decoding does the looking up itself. Then the right answer's tokens are fed, which changes nothing for an
    answer that is right so far.
    """
    longest = max(len(answer) for _, answer in probes)
    fed = [(prompt[-1:] + answer + [0] * longest)[:longest] for prompt, answer in probes]
    first = next(iter(configs.values()))
    opening = generate(model, [prompt[:-1] for prompt, _ in probes], 0, first)
    hits = {}
    for name, config in configs.items():
        cache = opening.cache.resized(opening.cache.capacity + longest)
        found = torch.stack([logits.argmax(dim=-1) for logits, _ in decode_along(model, cache, fed, config)], dim=1)
        pairs = zip(found.tolist(), probes, strict=True)
        hits[name] = torch.tensor([row[: len(answer)] == answer for row, (_, answer) in pairs])
    return hits


def measure_language(
    model: GPT,
    documents: Sequence[Document],
    tokenizer: tiktoken.Encoding,
    config: ReSAConfig,
    *,
    distances: Sequence[int] = (256, 1024, 4096, 7680),
    n_probes: int = 64,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, object]:
    """All measurements of this module as one JSON-ready mapping; `documents` are held-out ones.

    Lookups are decoded densely and with `config`'s sparse steps. Raises `ValueError` before any work starts.
    """
    require(len(documents) > 0, "documents", "none", "at least one held-out document")
    require(is_integer(n_probes, 1), "n_probes", n_probes, "an integer ≥ 1")
    require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
    context = model.config.context
    batches = []
    for distance in distances:
        drawn = [lookup_probe(tokenizer, np.random.default_rng((seed, distance, i)), distance) for i in range(n_probes)]
        longest = max(len(prompt) + len(answer) for prompt, answer in drawn)
        require(longest <= context, "distances", distance, f"probes of at most {context} tokens, the model's context")
        batches += [(distance, drawn[first : first + batch]) for first in range(0, n_probes, batch)]
    shown = track(documents, "Held-out documents", console=Console(stderr=True), disable=not progress)
    losses = [document_loss(model, document, tokenizer, long=context * 3 // 4) for document in shown]
    configs = {
        "dense": replace(config, interval=1, schedule="fused"),
        "sparse": replace(config, interval=None),
    }
    hits: dict[int, list[dict[str, Tensor]]] = {distance: [] for distance in distances}
    for distance, probes in track(batches, "Lookups", console=Console(stderr=True), disable=not progress):
        hits[distance].append(lookup_hits(model, probes, configs))
    accuracy = {
        str(distance): {name: float(torch.cat([each[name] for each in found]).float().mean()) for name in configs}
        for distance, found in hits.items()
    }
    lookups = {"active_ratio": config.active_ratio, "probes": n_probes, "accuracy": accuracy}
    return {**summarise_losses(losses, context), "lookups": lookups}


def summarise_losses(losses: Sequence[DocumentLoss], context: int) -> dict[str, object]:
    """Bits per byte over all documents, and loss by position over the long ones."""
    total = sum(loss.n_bytes for loss in losses)
    bits = sum(loss.bits for loss in losses)
    packed = sum(loss.n_bytes_xz for loss in losses)
    result: dict[str, object] = {
        "documents": len(losses),
        "bytes": total,
        "tokens": sum(len(loss.nats) for loss in losses),
        "bits_per_byte": bits / total,
        "bits_per_byte_xz": 8 * packed / total,
        "fewer_bits_than_xz": 1 - bits / (8 * packed),
    }
    long = [loss for loss in losses if len(loss.nats_short)]
    if long and context > LATE:
        early = np.array([float(loss.nats[256:1024].mean()) for loss in long])
        late = np.array([float(loss.nats[LATE:context].mean()) for loss in long])
        late_short = np.array([float(loss.nats_short[LATE:context].mean()) for loss in long])
        result["position"] = {
            "documents": len(long),
            "nats_256_to_1024": early.mean(),
            "nats_from_4096": late.mean(),
            "difference_95": bootstrap(late - early),
            "nats_from_4096_seeing_1024": late_short.mean(),
            "context_gain_95": bootstrap(late - late_short),
        }
    return result
