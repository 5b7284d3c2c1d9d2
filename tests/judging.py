"""Operations held against the oracle: what they may err is in tolerances.py."""

import math

import numpy as np
import torch

import oracle
from resa.reference import ReSAConfig
from tolerances import (
    assert_same_bits,
    assert_three_way,
    assert_within,
    logit_size,
    lse_floor,
    output_floor,
    plain_attention,
    score_floor,
)


def arrays(*tensors):
    """Equal numbers in float64, for the oracle."""
    return [tensor.double().cpu().numpy() for tensor in tensors]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def full(*shape, value=0.0, dtype=torch.float32):
    return torch.full(shape, value, dtype=dtype)


def widened(dtype):
    """The dtype that sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_bounds(x):
    """The oracle's bounds, in the dtype of the keys: they do not depend on what is tested."""
    return torch.from_numpy(oracle.block_bounds(*arrays(x.keys), x.lengths.tolist(), x.block_size)).to(x.keys.dtype)


def check_bounds(backend, x):
    bounds = backend.block_bounds(x.keys, x.lengths, x.block_size)
    assert bounds.dtype == x.keys.dtype
    np.testing.assert_array_equal(bounds.double(), exact_bounds(x).double())


def check_scores(backend, x, bounds=None):
    """Scores within their floor of the oracle's; returns the largest ratio to what is allowed."""
    bounds = exact_bounds(x) if bounds is None else bounds
    scores = backend.score_blocks(x.query, bounds, x.lengths, x.block_size)
    assert scores.dtype == widened(x.query.dtype)
    exact = oracle.score_blocks(*arrays(x.query, bounds), x.lengths.tolist(), x.block_size)
    return assert_within(scores, exact, score_floor(x.query.dtype, *arrays(x.query, bounds)), "scores")


def select(backend, scores, lengths, dtype=torch.float32, **config):
    """Selected blocks of [B, Hkv, M] without the -1 at the end, after checking the form of the result."""
    scores, lengths = torch.as_tensor(scores, dtype=dtype), torch.as_tensor(lengths, dtype=torch.int32)
    indices = backend.select_blocks(scores, lengths, ReSAConfig(**config))
    assert indices.dtype == torch.int32
    assert indices.shape[:2] == scores.shape[:2]
    for row in indices.flatten(0, 1).tolist():
        blocks = [block for block in row if block >= 0]
        assert row == sorted(set(blocks)) + [-1] * (len(row) - len(blocks)), "ascending, then -1 only"
    return trimmed(indices)


def selected_by_oracle(scores, lengths, config):
    """The oracle's selection, as `select` returns it."""
    return trimmed(oracle.select_blocks(scores.tolist(), list(lengths), config))


def trimmed(indices):
    return [[row[row >= 0].tolist() for row in sequence] for sequence in indices]


def sparse(backend, x, indices):
    return backend.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)


def dense(backend, x):
    """One query at the newest position of each sequence: [B, Hq, D], [B, Hq]."""
    query, keys, values = x.attention
    out, lse = backend.dense_attention(query[:, :, None], keys, values, x.lengths, return_lse=True)
    return out[:, :, 0], lse[:, :, 0]


def check_sparse(backend, case, x, indices):
    """Attention over the selected blocks as `judge` has it."""
    found = sparse(backend, x, indices)
    query, keys, values = arrays(*x.attention)
    rest = (indices.cpu().numpy(), case.lengths, x.block_size)
    exact = oracle.sparse_attention(query, keys, values, *rest, return_lse=True)
    unit = oracle.sparse_attention(query, keys, np.abs(values), *rest)
    position = torch.arange(x.keys.shape[2])
    in_block = (indices.cpu().long()[..., None] == position // x.block_size).any(dim=2)  # [B, Hkv, T_max]
    visible = (in_block & (position < x.lengths.cpu()[:, None, None])).repeat_interleave(case.group, dim=1)[:, :, None]
    one_row = [[each[:, :, None] for each in pair] for pair in (found, exact)]
    return judge(backend, case, x, *one_row, unit[:, :, None], visible, "sparse")


def check_dense(backend, case, x, query_lengths=None):
    """Attention of a window as `judge` has it."""
    used = None if query_lengths is None else int32(*query_lengths)
    found = backend.dense_attention(*x.attention, x.lengths, query_lengths=used, return_lse=True)
    query, keys, values = arrays(*x.attention)
    exact = oracle.dense_attention(query, keys, values, case.lengths, query_lengths, return_lse=True)
    unit = oracle.dense_attention(query, keys, np.abs(values), case.lengths, query_lengths)
    n_queries = x.query.shape[2]
    used = (torch.full_like(x.lengths, n_queries) if used is None else used).view(-1, 1, 1, 1)
    row, position = torch.arange(n_queries)[:, None], torch.arange(case.capacity)
    visible = (position <= x.lengths.view(-1, 1, 1, 1) - used + row) & (row < used)  # [B, 1, Q, T_max]
    return judge(backend, case, x, found, exact, unit, visible, "dense")


def judge(backend, case, x, found, exact, unit, visible, what):
    """Outputs by the three-way criterion, log-sum-exps by their floor; returns the largest ratio to what is allowed.

    found and exact: (out [B, Hq, Q, D], lse [B, Hq, Q]); unit: Σ p |v|, like out; visible [B, 1 or Hq, Q, T_max].
    """
    (out, lse), (exact_out, exact_lse), dtype = found, exact, x.query.dtype
    assert out.dtype == dtype
    assert lse.dtype == widened(dtype)
    query, keys, values = (tensor.cpu() for tensor in x.attention)
    query = query if query.ndim == 4 else query[:, :, None]
    L = np.asarray(0.0 if case.exact_logits else logit_size(*arrays(query, keys), case.lengths))
    n_tokens = max(case.lengths)
    base = math.e if backend.is_reference else 2
    allowed = lse_floor(dtype, L, case.head_dim, n_tokens, exact_lse, base)
    lse_ratio = assert_within(lse, exact_lse, allowed, f"{what}: lse {case}")
    floor = output_floor(dtype, L, case.head_dim, n_tokens)[..., None] * unit
    past = (torch.arange(case.capacity)[:, None] >= x.lengths.cpu()[:, None, None, None]).expand_as(keys)
    plain = plain_attention(query, keys.masked_fill(past, 0), values.masked_fill(past, 0), visible)
    return max(lse_ratio, assert_three_way(out, exact_out, plain, floor, f"{what}: out {case}"))


def all_results(backend, x, config, query_lengths=None):
    """Every tensor that the five operations give for one case."""
    bounds = backend.block_bounds(x.keys, x.lengths, x.block_size)
    scores = backend.score_blocks(x.query, bounds, x.lengths, x.block_size)
    indices = backend.select_blocks(scores, x.lengths, config)
    attended = backend.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)
    window = torch.stack([x.query, -x.query], dim=2)
    causal = backend.dense_attention(window, x.keys, x.values, x.lengths, query_lengths=query_lengths, return_lse=True)
    return bounds, scores, indices, *attended, *causal


def assert_all_same_bits(found, expected, what):
    for left, right in zip(found, expected, strict=True):
        assert_same_bits(left, right, what)
