"""Small random models, decoding under given tokens, and measures of how far a cache lies from the dense one.

Freshly initialised weights (std 0.02) attend to everything alike and add next to nothing to the residual stream: a
decoder that read the wrong tokens would hardly differ from a right one. The weights here are drawn so that
attention is selective and matters; every parameter is away from its neutral value, norms and biases included.
"""

from dataclasses import asdict, dataclass, replace

import oracle
import torch
from hypothesis import settings
from hypothesis import strategies as st
from tolerances import assert_same_bits

from resa.reference import GPT, Generation, GPTConfig, KVCache, ReSAConfig, block_bounds, decode_step, prefill

EXACT = 1e-9  # the specification's tolerance in float64, for relative differences
# What a test that wants to see a difference asks for: a hundred times what a test of equality lets pass.
VISIBLE = 100 * EXACT
NAN = float("nan")


def share(part):
    """Settings with 1/part of the profile's examples, for properties whose examples are long."""
    return settings(max_examples=max(1, settings.default.max_examples // part))


@dataclass(frozen=True)
class Shape:
    """A model in one line; `seed` decides its weights, and the tokens that tests feed it."""

    seed: int = 0
    layers: int = 2
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 8
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    context: int = 96
    hidden: int = 16

    vocab = 23

    def config(self, **changes):
        fields = {
            "vocab_size": self.vocab,
            "n_layer": self.layers,
            "n_head": self.kv_heads * self.group,
            "n_kv_head": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden + 4,
            "context": self.context,
            "rope_theta": 100.0,  # low, so that every channel pair turns visibly within a few dozen tokens
            "norm_eps": 1e-3,  # large enough to be seen
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "tied_embeddings": self.tied,
        }
        return GPTConfig(**{**fields, **changes})

    def model(self, dtype=torch.float64, **arguments):
        """The model, its weights the same numbers in every dtype, up to rounding."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):  # the constructor draws from torch's default generator
            model = GPT(self.config(), **arguments).to(dtype)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.5 * noise
            elif name.endswith("embed.weight"):
                value = noise
            else:
                gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                value = gain * parameter.shape[1] ** -0.5 * noise
            parameter.data.copy_(value)
        return model

    def tokens(self, length, stream=0):
        """`length` random token ids; another `stream`, other ids."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + stream)
        return torch.randint(self.vocab, (length,), generator=generator).tolist()

    def prompts(self, lengths):
        """One prompt of each length."""
        return [self.tokens(length, stream) for stream, length in enumerate(lengths)]


def shapes(**fixed):
    """Shapes in which mix-ups show: groups and key-value heads differ in number more often than not."""
    drawn = {
        "seed": st.integers(0, 2**32 - 1),
        "layers": st.sampled_from([2, 3]),
        "kv_heads": st.sampled_from([2, 1, 3]),
        "group": st.sampled_from([3, 2, 1]),
        "head_dim": st.sampled_from([8, 4, 16]),
        "qkv_bias": st.booleans(),
        "qk_norm": st.booleans(),
        "tied": st.booleans(),
    }
    return st.builds(Shape, **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


@st.composite
def sparse_configs(draw, interval=None, schedule=None):
    """Decoding that leaves blocks out from a handful of tokens on: at most three small blocks, or a small share."""
    local_blocks = draw(st.integers(1, 2))
    return ReSAConfig(
        block_size=draw(st.sampled_from([2, 1, 3, 4])),
        active_ratio=draw(st.sampled_from([0.1, 0.25, 0.4])),
        min_blocks=local_blocks + draw(st.integers(0, 1)),
        local_blocks=local_blocks,
        interval=draw(st.integers(1, 6)) if interval is None else interval,
        schedule=draw(st.sampled_from(["fused", "paper"])) if schedule is None else schedule,
    )


def never_rectified(config):
    """The same selection without rectification."""
    return replace(config, interval=None)


def leaves_out(config, tokens):
    """Whether a sparse step over a cache of `tokens` tokens, its own included, leaves out any block."""
    n_blocks = oracle.count_blocks(tokens, config.block_size)
    return oracle.count_selected(n_blocks, asdict(config)) < n_blocks


def weights(model):
    """The parameters under the names the oracle knows, as float64 arrays."""
    return {name: parameter.detach().double().numpy() for name, parameter in model.state_dict().items()}


def dense_cache(model, rows, block_size, **arguments):
    """The cache that dense prefill of `rows` gives, and the logits after each."""
    cache = model.new_cache(len(rows), max(len(row) for row in rows), block_size)
    logits = prefill(model, rows, cache, **arguments)
    return cache, logits


def drift(cache, sequence, exact, exact_sequence=None):
    """drift(j) of every cached token of a sequence, from the cache `exact`, which may hold more tokens.

    The specification's measure: max over layers, KV heads, and keys and values, of ‖x − x*‖ / ‖x*‖. -> [T]
    """
    length = int(cache.lengths[sequence])
    other = sequence if exact_sequence is None else exact_sequence
    assert int(exact.lengths[other]) >= length
    worst = torch.zeros(length, dtype=torch.float64)
    for name in ("keys", "values"):
        x = getattr(cache, name)[:, sequence, :, :length].double()  # [layer, Hkv, T, D]
        x_star = getattr(exact, name)[:, other, :, :length].double()
        distance = (x - x_star).norm(dim=-1) / x_star.norm(dim=-1)  # [layer, Hkv, T]
        assert not distance.isnan().any(), f"NaN among the {name} of sequence {sequence}"
        worst = torch.maximum(worst, distance.amax(dim=(0, 1)))
    return worst


def assert_bounds_rebuilt(cache):
    """Law 2, bit for bit: the bounds that came about token by token are those of the keys as they stand."""
    assert cache.bounds.dtype == cache.keys.dtype
    for layer, keys in enumerate(cache.keys):
        rebuilt = block_bounds(keys, cache.lengths, cache.block_size)
        assert_same_bits(cache.bounds[layer], rebuilt, f"bounds of layer {layer}")


def poison(cache, garbage):
    """Fill every slot of keys and values at or past the lengths."""
    past = torch.arange(cache.capacity) >= cache.lengths[:, None]  # [B, T_max]
    for stored in (cache.keys, cache.values):
        stored.masked_fill_(past[None, :, None, :, None], garbage)


def snapshot(cache):
    """A copy of everything a cache holds."""
    return KVCache(
        cache.keys.clone(),
        cache.values.clone(),
        cache.bounds.clone(),
        cache.lengths.clone(),
        cache.block_size,
        cache.block_bounds,
    )


def assert_untouched(cache, before, sequences):
    """The sequences' bytes are as they were in the snapshot `before`, slots past the length included."""
    rows = list(sequences)
    for name in ("keys", "values", "bounds"):
        assert_same_bits(getattr(cache, name)[:, rows], getattr(before, name)[:, rows], f"{name} of sequences {rows}")
    assert_same_bits(cache.lengths[rows], before.lengths[rows], f"lengths of sequences {rows}")


def started(model, prompts, block_size, capacity, tokens=None, window=None):
    """A `Generation` set by hand: prompts prefilled, and `tokens` as if generated, with the newest `window` cached.

    Without these two it stands where generation begins, no token chosen.
    """
    batch = len(prompts)
    tokens = [[] for _ in range(batch)] if tokens is None else tokens
    cache = model.new_cache(batch, capacity, block_size)
    prefill(model, prompts, cache)
    window = torch.zeros(batch, dtype=torch.int64) if window is None else torch.tensor(window)
    return Generation(tokens, cache, window, torch.full((batch,), -1))


def feed(model, generation, config, rows):
    """One decoding step under given tokens: row s feeds `rows[s]`, or nothing where that is None. -> logits [B, V]"""
    active = torch.tensor([token is not None for token in rows])
    for s, token in enumerate(rows):
        if token is not None:
            generation.tokens[s].append(token)
            generation.pending[s] = token
    return decode_step(model, generation, config, active)
