"""The oracle is code as well: it stands alone, and its model parts are worked by hand.

Its operations are checked by hand beside the project's, in tests/operations; its decoding is held against the
project's, which has laws of its own, in tests/decoding.
"""

import ast
import math
from pathlib import Path

import numpy as np

import oracle


def test_oracle_imports_nothing_of_the_project():
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"math", "functools", "dataclasses", "numpy"}


def test_rms_norm_by_hand():
    out = oracle.rms_norm(np.array([[3.0, -4.0]]), np.array([1.0, 2.0]), 3.5)  # the mean square is 12.5; 16 = 4 squared
    assert out.tolist() == [[3 / 4, -8 / 4]]


def test_rope_by_hand():
    """Rotate channel d with d + D/2: the first pair by the position, the second by position / sqrt(theta)."""
    x = np.array([[[1.0, 0.0, 0.0, 2.0], [1.0, 2.0, 0.0, 0.0]]])  # one head, two tokens
    out = oracle.rope(x, [0, 5], 100.0)
    assert out[0, 0].tolist() == [1.0, 0.0, 0.0, 2.0]
    np.testing.assert_allclose(out[0, 1], [math.cos(5), 2 * math.cos(0.5), math.sin(5), 2 * math.sin(0.5)], rtol=1e-15)


def test_swiglu_and_residuals_by_hand(monkeypatch):
    """One channel each: norms give 1 (x > 0, no epsilon), and a single token's attention is its value."""
    sizes = {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "head_dim": 2, "hidden_size": 1}
    config = sizes | {"rope_theta": 1.0, "norm_eps": 0}
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
    assert logits.tolist() == [[6.0, -12.0]]  # the last norm makes 1 of any positive number

    # The residual stream is seen where the three norms read it.
    seen, rms_norm = [], oracle.rms_norm
    monkeypatch.setattr(oracle, "rms_norm", lambda x, weight, eps: seen.append(x) or rms_norm(x, weight, eps))
    oracle.dense_pass(weights, config, oracle.Cache.empty(config), [0], 0)
    after_attention = 3 + 10 + 140
    silu = 0.5 / (1 + math.exp(-0.5))
    np.testing.assert_allclose([x.item() for x in seen], [3, after_attention, after_attention + 100 * silu * 4])
