"""Time to the first token: a model reads a prompt and chooses the next token.

`resa.fast.generate.prefill` reads chunk by chunk. It writes keys, values and the bounds or sketches
of blocks. Beside it the same fused layers attend by torch's scaled dot-product attention, and write
keys and values alone. torch has three ways. Flash and cuDNN read the whole prompt at once, so their
activations grow with it. Flash also reads the same chunks, under a lower-right causal mask. cuDNN's
causal mask is upper-left, which is right for a whole prompt alone.
"""

from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resa.reference import attention as plain
from resa.reference.config import ReSAConfig

from ..attention import dense_attention
from ..cache import BatchedCache
from ..generate import open_cache, prefill
from ..model import FusedGPT
from .layer import distance, require_close
from .shapes import QWEN_7B
from .timing import Time, elapsed, peak_bytes, time_calls

OWN = "resa"
# torch's ways: the backend, and whether it reads the whole prompt at once
WAYS = {
    "flash, whole": (SDPBackend.FLASH_ATTENTION, True),
    "cudnn, whole": (SDPBackend.CUDNN_ATTENTION, True),
    "flash, chunks": (SDPBackend.FLASH_ATTENTION, False),
}
ROUNDS, ENOUGH_US = 11, 10e6  # samples of each way, fewer once all have taken that long
FEWEST_ROUNDS = 3
CHECKED = 1024  # queries compared before anything is timed, with as many tokens before them


def causal_attention(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention by torch of the newest tokens' queries, each to the keys up to its own."""
    from torch.nn.attention.bias import causal_lower_right  # takes a second to import

    mask = causal_lower_right(query.shape[2], keys.shape[2])  # not a tensor of so many numbers
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


class TorchPrefill:
    """Prefill of one prompt [1, T] by the same layers with attention by torch."""

    def __init__(
        self, model: FusedGPT, cache: BatchedCache, tokens: Tensor, chunk: int, backend: SDPBackend
    ) -> None:
        self.model, self.cache, self.tokens = model, cache, tokens
        self.chunk, self.backend = chunk, backend

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Read the prompt → the next token [1]."""
        for first in range(0, self.tokens.shape[1], self.chunk):
            chunk = self.tokens[:, first : first + self.chunk]
            positions = first + torch.arange(chunk.shape[1], device=chunk.device)[None]
            hidden = self.model.hidden_states(chunk, positions, partial(self.attend, first))
        return self.model.output(hidden[:, -1]).argmax(dim=-1)

    def attend(self, first: int, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write a chunk's keys and values, then attend to all so far."""
        end = first + query.shape[2]
        keys, values = self.cache.keys[layer, :, :, :end], self.cache.values[layer, :, :, :end]
        keys[:, :, first:], values[:, :, first:] = key, value
        return causal_attention(self.backend, query, keys, values)


def check(model: FusedGPT) -> dict[str, float]:
    """Each way's attention: its distance from the reference, refused if too far."""
    shape, like = model.config, model.embed.weight
    query = like.new_empty(1, shape.n_head, 2 * CHECKED, shape.head_dim).normal_()
    keys, values = like.new_empty(2, 1, shape.n_kv_head, 2 * CHECKED, shape.head_dim).normal_()
    lengths = torch.tensor([2 * CHECKED], dtype=torch.int32, device=like.device)
    expected = plain.dense_attention(query, keys, values, lengths)

    window = query[:, :, CHECKED:].contiguous()
    found = {OWN: dense_attention(window, keys, values, lengths)}
    for name, (backend, is_whole) in WAYS.items():
        found[name] = causal_attention(backend, query if is_whole else window, keys, values)
    errors = {name: distance(out, expected[:, :, -out.shape[2] :]) for name, out in found.items()}
    for name, error in errors.items():  # of probabilities and outputs, which round
        require_close(name, error, 4 * torch.finfo(like.dtype).eps)
    return errors


def measure(model: FusedGPT, config: ReSAConfig, context: int, chunk: int) -> dict[str, object]:
    """Time to the first token after `context` random tokens, in µs, and the memory it takes.

    The ways take turns, so that a clock that falls slows all of them. A way of torch's whose
    activations do not fit the GPU is left out. Beside the times of this model stand estimates for
    all layers of `QWEN_7B`: the time without the output projection, times their number.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
    cache, feed = open_cache(model, [prompt], 1, config, None)
    tokens = torch.tensor(feed, device=model.embed.weight.device)

    def own() -> Tensor:
        cache.lengths.zero_()
        return prefill(model, feed, cache, chunk_size=chunk).argmax(dim=-1)

    # The first run compiles, the second is warm.
    ways, peaks = {OWN: own}, {}
    for name, (backend, is_whole) in WAYS.items():
        width = context if is_whole else chunk
        ways[name] = TorchPrefill(model, cache, tokens, width, backend)
    for name, work in list(ways.items()):
        try:
            work()
            peaks[name] = peak_bytes(work)
        except torch.OutOfMemoryError:
            if name == OWN:
                raise
            del ways[name]
            torch.cuda.empty_cache()

    samples: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(ROUNDS):
        if done >= FEWEST_ROUNDS and sum(map(sum, samples.values())) >= ENOUGH_US:
            break
        for name, work in ways.items():
            samples[name].append(elapsed(work))
    times = {name: Time.of(each) for name, each in samples.items()}
    last = model.embed.weight.new_empty(1, model.config.hidden_size).normal_()
    output = time_calls([lambda: model.output(last).argmax(dim=-1)]).us

    resa, depth = times.pop(OWN), QWEN_7B.n_layer / model.config.n_layer
    best = min(time.us for time in times.values())
    sketches = cache.sketches
    searched = [cache.bounds] if sketches is None else [sketches.codes, sketches.scales]
    return {
        "context": context,
        "layers": model.config.n_layer,
        "chunk": chunk,
        "cache_bytes": sum(each.nbytes for each in (cache.keys, cache.values, *searched)),
        "peak_bytes": peaks,
        OWN: asdict(resa),
        "dense": {name: asdict(time) for name, time in times.items()},
        "dense_us": best,
        "ratio": round(best / resa.us, 3),
        "tokens_per_second": round(context / resa.us * 1e6),
        "output_us": output,
        "all_layers_us": {
            name: round((us - output) * depth + output)
            for name, us in ((OWN, resa.us), ("dense", best))
        },
    }
