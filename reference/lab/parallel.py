"""Decoding along tokens that are known, all steps in one pass: for training and the evaluations.

`decode_at_once` computes what the loop of `generate.py` does, and is tested against it. It needs
two streams. The *exact* one is dense attention over the text. The *decoded* one holds what decoding
computes: at position t it sees exact keys and values before its window of drifted tokens, decoded
ones from there on, and of all these the blocks that a sparse step would select. Many ways of
decoding share one exact stream.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import select_blocks
from ..config import ReSAConfig
from ..model import GPT, causal_attention
from .scorers import SCORERS, Scorer, Steps, own_scorer

SLICE = 512  # steps whose attention is computed together: bounds memory, changes no result


def windows(n_tokens: int, prompt_tokens: int, config: ReSAConfig) -> tuple[Tensor, Tensor]:
    """For every decoded position: where its window begins, and whether a dense pass feeds it; [S].

    The window is what sparse steps have written since the last dense pass (laws 6 and 7).

    >>> windows(8, 2, ReSAConfig(interval=3, schedule="paper"))[0].tolist()
    [2, 2, 2, 5, 5, 5]
    >>> windows(8, 2, ReSAConfig(interval=3, schedule="fused"))[1].tolist()
    [False, False, True, False, False, True]
    """
    begins, is_dense, n_drifted = [], [], 0
    for at in range(prompt_tokens, n_tokens):
        begins.append(at - n_drifted)
        is_dense.append(config.schedule == "fused" and config.is_pass_due(n_drifted))
        n_drifted = 0 if is_dense[-1] else n_drifted + 1
        if config.schedule == "paper" and config.is_pass_due(n_drifted):
            n_drifted = 0
    found = torch.tensor([begins, is_dense], dtype=torch.int64, device="cpu")
    return found[0], found[1].bool()


@dataclass(frozen=True)
class Stream:
    """Keys and values after RoPE, one tensor per layer, and final hidden states along a text.

    The decoded stream has keys and values of its S decoded tokens alone. The exact one has them of
    all T, and its hidden states stand for the prompt's in both.
    """

    tokens: Tensor  # [B, T]
    keys: tuple[Tensor, ...]  # [B, Hkv, T or S, D]
    values: tuple[Tensor, ...]
    hidden: Tensor  # [B, T, C]


def exact_stream(model: GPT, tokens: Tensor) -> Stream:
    """Dense attention over tokens [B, T]; differentiable."""
    keys, values = [], []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(key)
        values.append(value)
        return causal_attention(layer, query, key, value)

    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hidden = model.hidden_states(tokens, positions, attend)
    return Stream(tokens, tuple(keys), tuple(values), hidden)


@dataclass(frozen=True)
class Slice:
    """Some neighbouring steps, and the keys that any of them may see: exact ones, then decoded."""

    steps: slice  # of all S
    n_exact: int  # exact keys, from the first on
    decoded: slice  # of the S decoded keys
    places: Tensor  # [keys] their positions in the text
    may_see: Tensor  # [steps, keys] bool
    is_dense: Tensor  # [steps, 1] bool: a dense pass feeds it


def slices(
    n_tokens: int, prompt_tokens: int, config: ReSAConfig, device: torch.device
) -> list[Slice]:
    """Cut the steps into slices, and find out which keys of either stream they may see."""
    begins, is_dense = windows(n_tokens, prompt_tokens, config)
    text = torch.arange(n_tokens, device=begins.device)
    at = text[prompt_tokens:]
    until = torch.where(is_dense, at + 1, begins)  # a dense pass finds its own token exact as well

    found, most = [], SLICE if device.type == "cpu" else 2 * SLICE  # fewer leave a GPU half idle
    for start in range(0, len(at), most):
        steps = slice(start, min(start + most, len(at)))
        own, end, dense = (each[steps, None] for each in (at, until, is_dense))
        n_exact, first = int(end.max()), int(end.min())
        places = torch.cat((text[:n_exact], text[first : int(own.max()) + 1]))
        is_decoded = torch.arange(len(places), device=places.device) >= n_exact

        own, end, dense, places, is_decoded = (
            each.to(device) for each in (own, end, dense, places, is_decoded)
        )
        may_see = (places <= own) & ((places >= end) == is_decoded)
        decoded = slice(first - prompt_tokens, steps.stop)
        found.append(Slice(steps, n_exact, decoded, places, may_see, dense))
    return found


def decode_at_once(
    model: GPT,
    exact: Stream,
    config: ReSAConfig,
    prompt_tokens: int,
    scorer: Scorer | None = None,
) -> Stream:
    """Decode along the text after its first `prompt_tokens`, which are prefilled and not all of it.

    Differentiable in both streams. `scorer` takes the place of the configuration's, for comparison.
    """
    scorer = SCORERS[own_scorer(config)] if scorer is None else scorer
    n_tokens, device = exact.tokens.shape[1], exact.tokens.device
    begins = windows(n_tokens, prompt_tokens, config)[0].to(device)
    parts = slices(n_tokens, prompt_tokens, config, device)
    keys, values = [], []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_sparse, group = layer >= config.dense_layers, query.shape[1] // key.shape[1]
        if is_sparse:
            chosen = selected_tokens(query, exact.keys[layer], key, begins, config, scorer)
        keys.append(key)
        values.append(value)
        streams = (exact.keys[layer], key), (exact.values[layer], value)

        # A slice reads what it may see, a sparse step of it what is in its blocks.
        outputs = []
        for part in parts:
            mask = part.may_see
            if is_sparse:
                own = chosen[:, :, part.steps][..., part.places] | part.is_dense
                mask = (own & mask).repeat_interleave(group, dim=1)
            both = (
                torch.cat((old[:, :, : part.n_exact], new[:, :, part.decoded]), dim=2)
                for old, new in streams
            )
            both = (each.repeat_interleave(group, dim=1) for each in both)
            own_query = query[:, :, part.steps]
            outputs.append(F.scaled_dot_product_attention(own_query, *both, attn_mask=mask))
        return torch.cat(outputs, dim=2)

    at = torch.arange(prompt_tokens, n_tokens, device=device)
    tokens = exact.tokens[:, prompt_tokens:]
    decoded = model.hidden_states(tokens, at.expand_as(tokens), attend)
    hidden = torch.cat((exact.hidden[:, :prompt_tokens], decoded), dim=1)
    return Stream(exact.tokens, tuple(keys), tuple(values), hidden)


@torch.no_grad()
def selected_tokens(
    query: Tensor,
    exact_key: Tensor,
    key: Tensor,
    begins: Tensor,
    config: ReSAConfig,
    scorer: Scorer,
) -> Tensor:
    """Tokens in the blocks that the last S steps select: [B, Hkv, S, T] bool.

    query [B, Hq, S, D], keys of the exact stream [B, Hkv, T, D] and of the decoded one
    [B, Hkv, S, D], begins [S] of the windows.
    """
    (batch, _, n_tokens, _), n_steps, b = exact_key.shape, len(begins), config.block_size
    decoded_key = torch.cat((exact_key[:, :, : n_tokens - n_steps], key), dim=2)
    at = torch.arange(n_tokens - n_steps, n_tokens, device=key.device)
    scores = scorer(Steps(query, exact_key, decoded_key, begins, at, b))

    # Every step is a sequence of its own, as long as its cache is then.
    flat = scores.transpose(1, 2).flatten(0, 1)  # [B·S, Hkv, M]
    chosen = is_selected(flat, (at + 1).to(torch.int32).repeat(batch), config)
    by_block = chosen.unflatten(0, (batch, n_steps)).transpose(1, 2)
    return by_block.repeat_interleave(b, dim=-1)[..., :n_tokens]


def is_selected(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
    """Mark the blocks that are selected: scores [B, Hkv, M] → [B, Hkv, M] bool."""
    indices = select_blocks(scores, lengths, config).long()
    spare = scores.shape[-1]  # takes the indices of -1
    chosen = torch.zeros(*scores.shape[:2], spare + 1, dtype=torch.bool, device=scores.device)
    return chosen.scatter(2, indices.masked_fill(indices < 0, spare), True)[..., :spare]
