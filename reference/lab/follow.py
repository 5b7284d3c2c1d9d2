"""One prompt, step by step: how a way of decoding fares along the tokens that dense decoding wrote.

`fidelity.py` computes the same at once, without steps. Here the model's own operations decode, so
tokens are measured after they were rectified. The demo shows this.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blocks import active_blocks
from ..cache import KVCache
from ..config import ReSAConfig
from ..generate import dense_pass, generate
from ..model import GPT
from ..sampling import Sampling
from .fidelity import divergence, kv_drift
from .parallel import decode_along


@dataclass(frozen=True)
class Teacher:
    """A prompt, its dense continuation, and what dense decoding made of that."""

    prompt: list[int]
    tokens: list[int]  # N, the continuation
    log_probs: Tensor  # [N, V] after each of its tokens
    cache: KVCache  # one dense pass over the continuation

    @property
    def bytes_per_token(self) -> float:
        """Bytes that dense decoding reads: all keys and values up to the token fed, on average."""
        steps = range(len(self.prompt) + 1, self.cache.length + 1)
        return sum(dense_bytes(self.cache, length) for length in steps) / len(steps)


def dense_bytes(cache: KVCache, length: int) -> int:
    """Bytes of the keys and values of `length` tokens in all layers."""
    n_layer, _, n_kv_head, _, head_dim = cache.keys.shape
    return length * 2 * n_layer * n_kv_head * head_dim * cache.keys.element_size()


def sparse_bytes(cache: KVCache, length: int, config: ReSAConfig) -> int:
    """Bytes that a sparse step reads: both bounds of every block, and the selected blocks' tokens.

    Bounds take as many bytes as one token's key and value. The newest block may be partial.
    """
    b, n_layer = config.block_size, len(cache.keys)
    n_blocks, n_dense = -(-length // b), min(config.dense_layers, n_layer)
    n_selected = int(active_blocks(torch.tensor([length]), config))
    attended = n_selected * b - (n_blocks * b - length)
    tokens = n_dense * length + (n_layer - n_dense) * (n_blocks + attended)
    return dense_bytes(cache, tokens) // n_layer


@torch.no_grad()
def teach(
    model: GPT,
    prompt: Sequence[int],
    n_tokens: int,
    config: ReSAConfig,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Teacher:
    """Continue a prompt densely by `n_tokens`, and keep the predictions and the cache."""
    # One token more than is kept, which is only chosen: so the cache has room for all of them.
    dense, sampling = replace(config, interval=1, schedule="fused"), Sampling(temperature)
    own = [torch.Generator().manual_seed(seed)]
    (written,) = generate(model, [prompt], n_tokens + 1, dense, sampling, generators=own)
    tokens, cache = written.tokens[:-1], written.cache
    hidden = dense_pass(model, tokens, cache, len(prompt))
    return Teacher(list(prompt), tokens, model.output(hidden).log_softmax(dim=-1), cache)


@dataclass(frozen=True)
class Comparison:
    """One way of decoding along the teacher's tokens; tensors [N] hold a value per step."""

    kl: Tensor  # nats
    agreement: Tensor  # bool
    mean_drift: Tensor  # mean over the continuation's tokens cached so far
    largest_drift: float  # of any token after any step
    drift_after_rectification: float | None  # largest over all rectifications; None without one
    bytes_per_token: float  # keys, values and bounds read


@torch.no_grad()
def follow(model: GPT, teacher: Teacher, config: ReSAConfig) -> Comparison:
    """Lead a way of decoding along the teacher's tokens."""
    n_tokens, n_read = len(teacher.tokens), 0
    cache = deepcopy(teacher.cache)
    cache.truncate(len(teacher.prompt))

    kl, mean_drift, drift = (torch.zeros(n_tokens, dtype=torch.float64) for _ in range(3))
    agreement, largest, after = torch.zeros(n_tokens, dtype=torch.bool), 0.0, []
    n_drifted = 0
    for step, (logits, state) in enumerate(decode_along(model, cache, teacher.tokens, config)):
        dense, own = teacher.log_probs[step], logits.log_softmax(dim=-1)
        kl[step] = divergence(dense, own)
        agreement[step] = own.argmax() == dense.argmax()

        # A step writes its own token; a rectification writes the window once more.
        is_rectified = state.n_drifted <= n_drifted
        n_written = n_drifted + 1 if is_rectified else 1
        n_drifted = state.n_drifted
        written = torch.arange(cache.length - n_written, cache.length, device=cache.keys.device)
        now = kv_drift(cache, teacher.cache, written).to(drift)
        drift[step + 1 - n_written : step + 1] = now
        mean_drift[step] = drift[: step + 1].mean()
        largest = max(largest, float(now.max()))
        if is_rectified:
            after.append(float(now.max()))
            n_read += dense_bytes(cache, cache.length)
        if config.schedule == "paper" or not is_rectified:
            n_read += sparse_bytes(cache, cache.length, config)

    rectified = max(after, default=None)
    return Comparison(kl, agreement, mean_drift, largest, rectified, n_read / n_tokens)
