"""Small random models, decoding under given tokens, and measures of how far a cache lies from the dense one.

Freshly initialised weights (std 0.02) attend to everything alike and add next to nothing to the residual stream: a
decoder that read the wrong tokens would hardly differ from a right one. The weights here are drawn so that
attention is selective and matters; every parameter is away from its neutral value, norms and biases included.
"""

from dataclasses import asdict, dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

import oracle
from resa.reference import GPT, Generation, GPTConfig, ReSAConfig, block_bounds, decode_step, prefill, sketch_keys
from tolerances import assert_same_bits

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
        """One prompt of each length, all of them different."""
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
        selection=draw(st.sampled_from(["bounds", "sketch"])),
        interval=draw(st.integers(1, 6)) if interval is None else interval,
        schedule=draw(st.sampled_from(["fused", "paper"])) if schedule is None else schedule,
    )


def leaves_out(config, tokens):
    """True if a sparse step over a cache of `tokens` tokens, its own included, leaves out any block."""
    n_blocks = oracle.count_blocks(tokens, config.block_size)
    return oracle.count_selected(n_blocks, asdict(config)) < n_blocks


def weights(model):
    """The parameters under the names the oracle knows, as float64 arrays."""
    return {name: parameter.detach().double().numpy() for name, parameter in model.state_dict().items()}


def dense_cache(model, text, block_size, **arguments):
    """The cache that dense prefill of `text` gives, and the logits [V] after it."""
    cache = model.new_cache(len(text), block_size)
    logits = prefill(model, text, cache, **arguments)
    return cache, logits


def greedy_by_forward(model, prompt, n_tokens):
    """Dense decoding with nothing but the training forward: no cache, no decoding code at all."""
    text = list(prompt)
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([text], device=model.embed.weight.device))[0, -1]
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def drift(cache, exact):
    """drift(j) of every cached token, measured from the cache `exact`, which may hold more tokens.

    The specification's measure: max over layers, KV heads, and keys and values, of ‖x − x*‖ / ‖x*‖. -> [T]
    """
    assert exact.length >= cache.length
    worst = torch.zeros(cache.length, dtype=torch.float64)
    for name in ("keys", "values"):
        x, x_star = (getattr(each, name)[:, 0, :, : cache.length].double().cpu() for each in (cache, exact))
        distance = (x - x_star).norm(dim=-1) / x_star.norm(dim=-1)  # [layer, Hkv, T]
        assert not distance.isnan().any(), f"NaN among the {name}"
        worst = torch.maximum(worst, distance.amax(dim=(0, 1)))
    return worst


def relative(actual, expected):
    """The largest difference in units of the largest expected value."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_bounds_rebuilt(cache, sketch_keys=sketch_keys):
    """Laws 2 and 12: what came about token by token is what the keys as they stand give, bit for bit.

    Bounds up to the sign of zero, of which renderings may take either; sketches by the rendering that made them.
    """
    if cache.sketch_bits is not None:
        assert cache.bounds is None
        for keys, *stored in zip(cache.keys, cache.codes, cache.scales, strict=True):
            rebuilt = sketch_keys(keys[:, :, : cache.length].contiguous(), cache.sketch_bits)
            for kept, expected in zip(stored, rebuilt, strict=True):
                assert_same_bits(kept[:, :, : cache.length], expected, "sketches")
        return
    lengths = torch.tensor([cache.length], device=cache.keys.device)
    assert cache.bounds.dtype == cache.keys.dtype
    for layer, keys in enumerate(cache.keys):
        rebuilt = block_bounds(keys, lengths, cache.block_size)
        assert_same_bits(cache.bounds[layer] + 0.0, rebuilt + 0.0, f"bounds of layer {layer}")


def assert_untouched(cache, before):
    """Every byte is as in the copy `before`, slots past the length included."""
    kept = ("bounds",) if cache.sketch_bits is None else ("codes", "scales")
    for name in ("keys", "values", *kept):
        assert_same_bits(getattr(cache, name), getattr(before, name), name)
    assert cache.length == before.length


def poison(cache, garbage):
    """Fill every slot of keys and values at or past the length."""
    cache.keys[:, :, :, cache.length :] = garbage
    cache.values[:, :, :, cache.length :] = garbage


def started(model, prompt, block_size, capacity, tokens=(), n_drifted=0, sketch_bits=None):
    """A `Generation` set by hand: the prompt prefilled, and `tokens` as if generated, the last of them pending.

    The newest `n_drifted` of the others lie at the end of the prompt, as its open window.
    """
    cache = model.new_cache(capacity, block_size, sketch_bits)
    prefill(model, prompt, cache)
    return Generation(list(tokens), cache, n_drifted)


def feed(model, generation, config, token):
    """One decoding step under a given token. -> logits [V]"""
    generation.tokens.append(token)
    return decode_step(model, generation, config)


def decoded_along(model, prompt, tokens, config):
    """Decode along given tokens after a prompt. -> logits [S, V] after each"""
    generation = started(model, prompt, config.block_size, len(prompt) + len(tokens), sketch_bits=config.kept_bits)
    return torch.stack([feed(model, generation, config, token) for token in tokens])
