"""The oracle is code as well: its model parts by hand, and its decoding against the laws that need no second decoder.

Its five operations are checked by hand beside the project's, in test_operations.py.
"""

import ast
import math
from pathlib import Path

import numpy as np
import oracle
import pytest

CONFIG = {
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 4,
    "hidden_size": 12,
    "rope_theta": 100.0,
    "norm_eps": 1e-3,
    "qkv_bias": True,
    "qk_norm": True,
}
SELECTION = {"block_size": 2, "active_ratio": 0.1, "min_blocks": 2, "local_blocks": 1}
VOCABULARY, PROMPT = 11, [3, 1, 4, 1, 5, 9, 2, 6, 5]


def random_weights(seed, config=CONFIG):
    """Weights large enough that attention chooses and matters."""
    rng = np.random.default_rng(seed)
    channels, inner = config["hidden_size"], 16
    q_size, kv_size = config["n_head"] * config["head_dim"], config["n_kv_head"] * config["head_dim"]
    shapes = {
        "embed.weight": (VOCABULARY, channels),
        "norm.weight": (channels,),
        "output.weight": (VOCABULARY, channels),
    }
    for i in range(config["n_layer"]):
        here = f"layers.{i}"
        for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            shapes |= {f"{here}.attn.{name}.weight": (size, channels), f"{here}.attn.{name}.bias": (size,)}
        shapes |= {f"{here}.attn.{name}.weight": (config["head_dim"],) for name in ("q_norm", "k_norm")}
        shapes |= {f"{here}.{name}.weight": (channels,) for name in ("attn_norm", "mlp_norm")}
        shapes |= {f"{here}.mlp.{name}.weight": (inner, channels) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{here}.attn.o_proj.weight": (channels, q_size), f"{here}.mlp.down_proj.weight": (channels, inner)}
    return {
        name: rng.normal(1.0, 0.3, shape) if "norm" in name else rng.normal(0.0, 1.5 * shape[-1] ** -0.5, shape)
        for name, shape in shapes.items()
    }


def decode(weights, n_tokens, forced=None, **resa):
    return oracle.generate(weights, CONFIG, SELECTION | resa, PROMPT, n_tokens, forced=forced)


def dense_cache(weights, tokens):
    cache = oracle.Cache.empty(CONFIG)
    oracle.dense_pass(weights, CONFIG, cache, tokens, 0)
    return cache


def moved(cache, exact):
    """The largest relative distance of each token's keys and values from the exact cache's, over layers and heads."""
    pairs = [*zip(cache.keys, exact.keys, strict=True), *zip(cache.values, exact.values, strict=True)]
    return np.max([np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1) for x, y in pairs], axis=(0, 1))


def test_oracle_imports_nothing_of_the_project():
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"math", "dataclasses", "numpy"}


def test_rms_norm_by_hand():
    out = oracle.rms_norm(np.array([[3.0, -4.0]]), np.array([1.0, 2.0]), 3.5)  # the mean square is 12.5; 16 = 4 squared
    assert out.tolist() == [[3 / 4, -8 / 4]]


def test_rope_by_hand():
    """Channel d turns with channel d + D/2: the first pair by the position, the second by position / sqrt(theta)."""
    x = np.array([[[1.0, 0.0, 0.0, 2.0], [1.0, 2.0, 0.0, 0.0]]])  # one head, two tokens
    out = oracle.rope(x, [0, 5], 100.0)
    assert out[0, 0].tolist() == [1.0, 0.0, 0.0, 2.0]
    np.testing.assert_allclose(out[0, 1], [math.cos(5), 2 * math.cos(0.5), math.sin(5), 2 * math.sin(0.5)], rtol=1e-15)


def test_swiglu_and_residuals_by_hand(monkeypatch):
    """One channel each: norms give 1 (x > 0, no epsilon), attention of a single token is its value."""
    config = {
        "n_layer": 1,
        "n_head": 1,
        "n_kv_head": 1,
        "head_dim": 2,
        "hidden_size": 1,
        "rope_theta": 1.0,
        "norm_eps": 0,
    }
    weights = {
        "embed.weight": [[3.0]],
        "layers.0.attn_norm.weight": [2.0],
        "layers.0.attn.q_proj.weight": [[1.0], [1.0]],
        "layers.0.attn.k_proj.weight": [[1.0], [1.0]],
        "layers.0.attn.v_proj.weight": [[5.0], [7.0]],
        "layers.0.attn.o_proj.weight": [[1.0, 10.0]],
        "layers.0.mlp_norm.weight": [1.0],
        "layers.0.mlp.gate_proj.weight": [[0.5]],
        "layers.0.mlp.up_proj.weight": [[4.0]],
        "layers.0.mlp.down_proj.weight": [[100.0]],
        "norm.weight": [6.0],
        "output.weight": [[1.0], [-2.0]],
    }
    cache = oracle.Cache.empty(config)
    logits = oracle.dense_pass(weights, config, cache, [0], 0)
    assert cache.values[0].tolist() == [[[10.0, 14.0]]]  # 2 · 5 and 2 · 7
    assert logits.tolist() == [[6.0, -12.0]]  # the last norm makes 1 of whatever positive number arrives

    # The residual stream is seen where the three norms read it.
    seen, rms_norm = [], oracle.rms_norm
    monkeypatch.setattr(oracle, "rms_norm", lambda x, weight, eps: seen.append(x) or rms_norm(x, weight, eps))
    oracle.dense_pass(weights, config, oracle.Cache.empty(config), [0], 0)
    after_attention = 3 + 10 + 140
    silu = 0.5 / (1 + math.exp(-0.5))
    np.testing.assert_allclose([x.item() for x in seen], [3, after_attention, after_attention + 100 * silu * 4])


@pytest.mark.parametrize("tied", [False, True])
def test_prefill_does_not_depend_on_the_chunking(tied):
    weights, config = random_weights(1), CONFIG | {"tied_embeddings": tied}
    whole, pieces = oracle.Cache.empty(config), oracle.Cache.empty(config)
    logits = oracle.dense_pass(weights, config, whole, PROMPT, 0)
    parts = [oracle.dense_pass(weights, config, pieces, PROMPT[a:b], a) for a, b in ((0, 1), (1, 6), (6, 9))]
    np.testing.assert_allclose(np.concatenate(parts), logits, rtol=1e-9, atol=1e-9)
    assert moved(pieces, whole).max() < 1e-9


@pytest.mark.parametrize("schedule", ["paper", "fused"])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 8])
def test_only_the_open_window_differs_from_the_dense_cache(schedule, interval, n_tokens):
    """Laws 6 and 7; and w = (N - 1) mod f."""
    weights = random_weights(2)
    done = decode(weights, n_tokens, schedule=schedule, interval=interval)
    tokens = (PROMPT + done.tokens)[: len(PROMPT) + max(0, n_tokens - 1)]
    assert done.cache.length == len(tokens)
    assert done.w == max(0, n_tokens - 1) % interval
    distance = moved(done.cache, dense_cache(weights, tokens))
    assert distance[: len(tokens) - done.w].max() < 1e-9
    assert (distance[len(tokens) - done.w :] > 1e-6).all()


def test_never_rectified_drifts_and_dense_corners_do_not():
    """Law 8, and that sparse decoding of these weights is no disguised dense decoding."""
    weights = random_weights(3)
    dense = decode(weights, 12, schedule="fused", interval=1)
    tokens = PROMPT + dense.tokens[:-1]
    assert moved(dense.cache, dense_cache(weights, tokens)).max() < 1e-9
    sparse = decode(weights, 12, forced=dense.tokens, schedule="fused", interval=None)
    assert sparse.w == 11
    assert (moved(sparse.cache, dense.cache)[-11:] > 1e-6).all()
    for corner in ({"active_ratio": 1.0}, {"min_blocks": 10}, {"dense_below": 20}):
        for schedule, interval in (("fused", None), ("fused", 4), ("paper", 3)):
            other = decode(weights, 12, schedule=schedule, interval=interval, **corner)
            assert other.tokens == dense.tokens
            np.testing.assert_allclose(other.logits, dense.logits, rtol=1e-9, atol=1e-9)


def test_a_stop_token_is_returned_and_never_fed():
    weights = random_weights(4)
    free = decode(weights, 8, schedule="paper", interval=3)
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    done = oracle.generate(weights, CONFIG, SELECTION | {"schedule": "paper", "interval": 3}, PROMPT, 8, stop={stop})
    assert done.tokens == free.tokens[: first + 1]
    assert done.cache.length == len(PROMPT) + first
