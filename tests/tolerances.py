"""The distance that a correct result may have from the oracle: one table, and where each number comes from.

Errors of an attention output are measured in units of Σ p·|v|, what the sum would be without cancellation; the
output itself can be close to zero although every term is rounded. First-order rounding analysis of

    logit_j = scale · Σ_d q_d k_jd        D + 1 roundings of at most eps/2 · L each, L = scale · max_j Σ_d |q_d k_jd|
    p_j = exp(logit_j - lse)              its exponent is off by both errors, and by eps/2 · 2L from the subtraction
    out = Σ_j p_j v_j / Σ_j p_j           n additions above and below

gives eps · ((D + 4)·2·L + n + 4) · Σ p·|v| for the output and eps · ((D + 4)·L + n + 4 + |lse|) for the log-sum-exp,
with the eps of the dtype that sums are taken in: float32, and float64 for float64 input.

dtype              output, in units of Σ p·|v|    log-sum-exp
float64            1e-9, the specification's       1e-9 · max(1, |lse|)
float32            the sum above                   the sum above
bfloat16, float16  2·eps(dtype)                    the sum above

An exact logit has L = 0 here. Below float64 twice the error of plain PyTorch in the same dtype comes on top, row by row
(`assert_three_way`): probabilities may be rounded before they meet the values, and what float32 sums lose shows there
too. The kernels' log-sum-exps are taken in base 2: the scale times log2 e, that times the logit, and ln 2 times the sum
are up to five more roundings of eps/2 · |lse|, an exact logit's too.
"""

import numpy as np
import torch


def eps(dtype):
    """Distance from 1 to the next number."""
    return torch.finfo(dtype).eps


def logit_size(query, keys, lengths):
    """L per query head: query [B, Hq, D] or [B, Hq, Q, D], keys [B, Hkv, T_max, D] arrays -> [B, Hq] or [B, Hq, Q]."""
    group = query.shape[1] // keys.shape[1]
    size = np.zeros(query.shape[:-1])
    for s, length in enumerate(lengths):
        for h in range(query.shape[1]):
            terms = np.abs(query[s, h]) @ np.abs(keys[s, h // group, :length]).T  # [..., T]
            size[s, h] = terms.max(axis=-1, initial=0.0)
    return size * query.shape[-1] ** -0.5


def output_floor(dtype, L, head_dim, n_tokens):
    """Allowed error of an output element in units of its Σ p·|v|, where plain PyTorch happens to be exact."""
    if dtype == torch.float64:
        return 1e-9 + 0 * L
    if dtype == torch.float32:
        return eps(torch.float32) * (2 * (head_dim + 4) * L + n_tokens + 4)
    return 2 * eps(dtype) + 0 * L


def lse_floor(dtype, L, head_dim, n_tokens, lse, base):
    """Allowed error of a log-sum-exp; where it is -inf nothing but -inf will do."""
    size = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    if dtype == torch.float64:
        return 1e-9 * np.maximum(1.0, size)
    conversions = 2.5 * size if base == 2 else 0.0
    return eps(torch.float32) * ((head_dim + 4) * L + n_tokens + 4 + size + conversions)


def plain_attention(query, keys, values, visible):
    """The usual PyTorch attention in the query's dtype, its probabilities rounded before they meet the values.

    query [B, Hq, Q, D], keys and values [B, Hkv, T, D], finite, visible [B, 1 or Hq, Q, T] -> [B, Hq, Q, D].
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(group, dim=1).float() for tensor in (keys, values))
    logits = (query.float() @ keys.mT * query.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    weights = logits.softmax(dim=-1).nan_to_num(0.0).to(query.dtype)
    return (weights.float() @ values).to(query.dtype)


def assert_three_way(actual, exact, plain, floor, what):
    """Errors ≤ 2 × the largest of the row's errors in plain PyTorch + floor; in float64 the floor alone judges.

    Returns the largest ratio to what is allowed.
    """
    plain_error = np.abs(plain.double().numpy() - exact).max(axis=-1, keepdims=True, initial=0.0)
    return assert_within(actual, exact, floor + (0.0 if plain.dtype == torch.float64 else 2 * plain_error), what)


def assert_within(actual, expected, allowed, what):
    """|actual - expected| ≤ allowed elementwise; infinities must be equal, NaN never is. Returns the largest ratio."""
    actual = actual.double().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}"
    with np.errstate(invalid="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
    allowed = np.broadcast_to(allowed, error.shape)
    good = error <= allowed  # False for NaN
    if not good.all():
        worst = np.unravel_index(np.argmax(np.where(good, -1.0, np.nan_to_num(error, nan=np.inf))), error.shape)
        raise AssertionError(
            f"{what}: {(~good).sum()} of {good.size} elements off; at {tuple(map(int, worst))} {actual[worst]} "
            f"instead of {expected[worst]}, allowed {allowed[worst]:.3g}"
        )
    return float((error / np.maximum(allowed, np.finfo(np.float64).tiny)).max(initial=0.0))


def assert_same_bits(actual, expected, what):
    """Equal bit for bit, zeros' signs and NaN payloads included."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert actual.dtype == expected.dtype, what
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer)), f"{what}: bits differ"


def score_floor(dtype, query, bounds):
    """Allowed error of block scores: query [B, Hq, D], bounds [B, Hkv, 2, D, M] arrays -> [B, Hkv, M].

    G + 1 roundings per pooled channel and D + 1 per score, each relative to the terms they add:
    eps · (G + D + 2) · Σ_d mean_g |q_gd| · max(|lo_d|, |hi_d|), for float64 1e-9 of the same sum.
    """
    batch, kv_heads, _, head_dim, _ = bounds.shape
    group = query.shape[1] // kv_heads
    terms = np.abs(query).reshape(batch, kv_heads, group, head_dim).mean(axis=2)[..., None]  # [B, Hkv, D, 1]
    largest = np.abs(np.where(np.isfinite(bounds), bounds, 0.0)).max(axis=2)  # [B, Hkv, D, M]
    unit = 1e-9 if dtype == torch.float64 else eps(torch.float32) * (group + head_dim + 2)
    return unit * (terms * largest).sum(axis=2)
