"""Key sketches (section 6 of the specification) and their laws 11 to 15, in float64 unless a test says otherwise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import oracle
from backends import poisoned_memory
from judging import arrays, full, int32
from resa.reference import ReSAConfig, score_sketch, select_blocks, sketch_keys
from resa.reference.sketch import rotate, unpacked
from small_models import EXACT
from strategies import (
    DEVICE,
    FAST_BLOCK_SIZES,
    FAST_DTYPES,
    FAST_HEAD_DIMS,
    GARBAGE,
    INF,
    NAN,
    ORDINARY_KEYS,
    Case,
    cases,
    examples,
    garbage,
)
from tolerances import assert_same_bits, eps

HEAD_DIMS = (8, 16, 24, 64, 80, 96, 128)
BITS = (1, 2)

a_case = cases(
    head_dims=HEAD_DIMS, block_sizes=(2, 3, 8), groups=(1, 2, 3), keys=ORDINARY_KEYS, max_blocks=4, max_batch=2
)
drawn = examples(12)


def sketched(x, bits):
    """Scores of a case, and the sketch they come from."""
    codes, scales = sketch_keys(x.keys, bits)
    return score_sketch(x.query, codes, scales, x.lengths, x.block_size), codes, scales


def logits_of(query, keys):
    """True logits [B, Hkv, G, T]: query [B, Hq, D], keys [B, Hkv, T, D]."""
    return query.unflatten(1, (keys.shape[1], -1)) @ keys.mT * query.shape[-1] ** -0.5


def estimates(query, codes, scales):
    """Estimated logits [B, Hkv, G, T] and the approximate keys [B, Hkv, T, D] that give them, rotated."""
    approximate = scales[..., None] * unpacked(codes, codes.shape[-1] * 8 // query.shape[-1], scales.dtype)
    return logits_of(rotate(query), approximate), approximate


def to_thresholds(keys, bits):
    """Distance of each rotated channel from the nearest threshold, in steps: [..., D]. A key of zeros lies on them."""
    rotated = rotate(keys)
    step = 0.9957 * rotated.square().mean(dim=-1, keepdim=True).sqrt()
    thresholds = (0 * step,) if bits == 1 else (-step, 0 * step, step)
    nearest = torch.stack([(rotated - threshold).abs() for threshold in thresholds]).amin(dim=0)
    return torch.where(step > 0, nearest / step, 0.0)


# --- By hand ---


def test_a_channel_alone_is_spread_over_all():
    """A key of one channel: every rotated channel is its size over sqrt(D), so the outer levels, by signs."""
    keys = full(1, 1, 1, 8, dtype=torch.float64)
    keys[..., 0] = -4.0  # sign 1: all rotated channels are -4 / sqrt(8)
    codes, scales = sketch_keys(keys, 2)
    assert codes.tolist() == [[[[0, 0]]]]
    assert scales.item() == pytest.approx(4 / math.sqrt(8) / 1.5, rel=1e-15)
    keys[..., 0], keys[..., 1] = 0.0, 4.0  # sign -1, and ± by turns after the first butterfly
    codes, scales = sketch_keys(keys, 2)
    assert codes.tolist() == [[[[0b11001100, 0b11001100]]]], "the first channel takes the lowest bits"
    assert sketch_keys(keys, 1)[0].tolist() == [[[[0b10101010]]]]
    assert sketch_keys(keys, 1)[1].item() == pytest.approx(4 / math.sqrt(8), rel=1e-15)


def test_a_key_of_zeros_has_scale_zero_and_its_token_still_has_mass():
    keys = full(1, 1, 2, 8, dtype=torch.float64)
    for bits in BITS:
        codes, scales = sketch_keys(keys, bits)
        assert scales.tolist() == [[[0.0, 0.0]]]
        assert score_sketch(full(1, 1, 8, value=3.0, dtype=torch.float64), codes, scales, int32(2), 1).tolist() == [
            [[0.5, 0.5]]
        ]


def test_a_length_of_zero_scores_nothing():
    codes, scales = sketch_keys(full(1, 1, 3, 8), 2)
    assert score_sketch(full(1, 2, 8), codes, scales, int32(0), 2).tolist() == [[[-INF, -INF]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lost", [NAN, INF, -INF])
def test_a_key_that_is_not_finite_leaves_the_softmax(dtype, lost):
    """Its block scores NaN, which ranks last; the other tokens share the whole mass."""
    keys = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys[0, 0, 5, 3] = lost
    codes, scales = sketch_keys(keys, 2)
    assert codes[0, 0, 5].tolist() == [0, 0]
    assert scales.isnan().nonzero().tolist() == [[0, 0, 5]]
    scores = score_sketch(full(1, 2, 8, value=1.0, dtype=dtype), codes, scales, int32(12), 4)
    assert scores.isnan().tolist() == [[[False, True, False]]]
    alone = score_sketch(full(1, 2, 8, value=1.0, dtype=dtype), codes, scales, int32(12), 1)
    assert alone.nansum().item() == pytest.approx(2, rel=1e-6)
    config = ReSAConfig(block_size=4, min_blocks=2, active_ratio=0.1)
    assert select_blocks(scores, int32(12), config).tolist() == [[[0, 2]]]


def test_a_scale_that_its_dtype_cannot_hold_counts_as_lost():
    """In float16, keys near the largest number whose rotated channels lie between the levels."""
    keys = full(1, 1, 1, 8, value=65504.0, dtype=torch.float16) * rotate(torch.eye(8)).T[0].sign().to(torch.float16)
    codes, scales = sketch_keys(keys, 2)
    assert scales.isfinite().all() == (codes.sum() > 0), "a code and a scale, or neither"


# --- Beside the oracle ---


@given(st.integers(0, 2**32), st.sampled_from(HEAD_DIMS))
def test_rotation_is_the_oracles_and_keeps_products(seed, head_dim):
    q, k = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for x in (q, k):
        np.testing.assert_allclose(rotate(x), oracle.rotate(x.numpy()), atol=1e-13)
    assert float(rotate(q) @ rotate(k)) == pytest.approx(float(q @ k), abs=1e-12)
    assert not torch.allclose(rotate(k), k)


@drawn
@given(a_case, st.sampled_from(BITS))
def test_sketches_are_the_oracles(case, bits):
    """Codes may differ where a rotated channel lies within rounding of a threshold: grids have such."""
    x = case.build(slack=0.0)
    codes, scales = sketch_keys(x.keys, bits)
    expected_codes, expected_scales = oracle.sketch_keys(*arrays(x.keys), bits)
    is_clear = (to_thresholds(x.keys, bits) > 1e-12).all(dim=-1)
    same = (codes.numpy() == expected_codes).all(axis=-1)
    assert (same | ~is_clear.numpy()).all()
    np.testing.assert_allclose(scales.numpy()[same], expected_scales[same], rtol=1e-12)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] * 8 == bits * case.head_dim


@drawn
@given(a_case, st.sampled_from(BITS))
def test_scores_are_the_oracles(case, bits):
    x = case.build(slack=0.0)
    scores, codes, scales = sketched(x, bits)
    expected = oracle.score_sketch(*arrays(x.query), codes.numpy(), *arrays(scales), x.lengths.tolist(), x.block_size)
    np.testing.assert_allclose(scores, expected, atol=1e-9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_summed_in_float32(dtype, bits):
    """Scales have the keys' dtype, rounded to nearest; scores are float32."""
    x = Case(3, 2, 3, 64, 8, lengths=(37, 5), capacity=40).build(dtype, slack=0.0)
    scores, codes, scales = sketched(x, bits)
    assert (scores.dtype, scales.dtype) == (torch.float32, dtype)
    wide, expected_scales = oracle.sketch_keys(*arrays(x.keys), bits)
    same = (codes.numpy() == wide).all(axis=-1)
    assert same.mean() > 0.95, "thresholds are rarely within rounding"
    np.testing.assert_allclose(scales.double()[same], expected_scales[same], rtol=eps(dtype) + 8 * eps(torch.float32))
    expected = oracle.score_sketch(*arrays(x.query), codes.numpy(), *arrays(scales), [37, 5], 8)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


# --- Law 11, estimate, and what it certifies ---


@drawn
@given(a_case, st.sampled_from(BITS))
def test_the_estimate_is_within_the_residual(case, bits):
    x = case.build(slack=0.0)
    _, codes, scales = sketched(x, bits)
    found, approximate = estimates(x.query, codes, scales)
    residual = (rotate(x.keys) - approximate).norm(dim=-1)[:, :, None]
    limit = x.query.unflatten(1, (case.kv_heads, -1)).norm(dim=-1, keepdim=True) * residual * case.head_dim**-0.5
    size = logits_of(x.query.abs(), x.keys.abs())
    assert ((found - logits_of(x.query, x.keys)).abs() <= limit + 1e-12 * size).all()


@drawn
@given(a_case, st.sampled_from(BITS), st.floats(0.2, 0.8))
def test_the_mass_left_out_is_certified(case, bits, ratio):
    """Law 10's twin: ε = R / (Z + R), where R sums exp(estimate + its error) over tokens that are not selected."""
    x = case.build(slack=0.0)
    scores, codes, scales = sketched(x, bits)
    config = ReSAConfig(block_size=case.block_size, min_blocks=1, active_ratio=ratio)
    indices = select_blocks(scores, x.lengths, config)
    found, approximate = estimates(x.query, codes, scales)
    residual = (rotate(x.keys) - approximate).norm(dim=-1)[:, :, None]
    norms = x.query.unflatten(1, (case.kv_heads, -1)).norm(dim=-1, keepdim=True)
    upper, true = found + norms * residual * case.head_dim**-0.5, logits_of(x.query, x.keys)
    for s, length in enumerate(case.lengths):
        for h in range(case.kv_heads):
            block = torch.arange(length) // case.block_size
            chosen = torch.isin(block, indices[s, h])
            if length == 0 or chosen.all():
                continue
            own, bound = true[s, h, :, :length], upper[s, h, :, :length]
            taken = own[:, chosen].logsumexp(dim=-1)
            left_out = torch.sigmoid(own[:, ~chosen].logsumexp(dim=-1) - taken)
            certified = torch.sigmoid(bound[:, ~chosen].logsumexp(dim=-1) - taken)
            assert (left_out <= certified + 1e-9).all()


# --- Laws 12 to 15 ---


@drawn
@given(a_case, st.sampled_from(BITS), st.data())
def test_a_sketch_belongs_to_its_token(case, bits, data):
    """Law 12: sketching keys in parts gives the same bits as sketching them together."""
    keys = case.build(torch.float32, slack=0.0).keys
    at = data.draw(st.integers(0, case.capacity), label="first part")
    parts = [sketch_keys(part, bits) for part in (keys[:, :, :at], keys[:, :, at:])]
    for together, apart in zip(sketch_keys(keys, bits), zip(*parts, strict=True), strict=True):
        assert_same_bits(together, torch.cat(apart, dim=2), "sketches in parts")


@drawn
@given(a_case, st.sampled_from(BITS), st.sampled_from(GARBAGE))
def test_what_lies_past_the_length_changes_no_bit(case, bits, kind):
    x = case.build(torch.float32, slack=0.0)
    scores, codes, scales = sketched(x, bits)
    past = torch.arange(case.capacity) >= x.lengths[:, None, None]
    other = codes.masked_fill(past[..., None], 0b10010011), scales.masked_fill(past, garbage(kind, torch.float32))
    assert_same_bits(score_sketch(x.query, *other, x.lengths, x.block_size), scores, f"past the length lies {kind}")


@drawn
@given(a_case, st.sampled_from(BITS))
def test_scores_add_up_to_the_group(case, bits):
    scores, _, _ = sketched(case.build(slack=NAN), bits)
    total = scores.masked_fill(scores == -INF, 0.0).sum(dim=-1)
    expected = torch.tensor([case.group if length else 0 for length in case.lengths], dtype=torch.float64)
    assert (total - expected[:, None]).abs().max() <= EXACT
    assert (
        scores.isfinite().sum(dim=-1) == torch.tensor([[math.ceil(n / case.block_size)] for n in case.lengths])
    ).all()


@drawn
@given(a_case, st.sampled_from(BITS))
def test_keys_that_lie_on_their_levels_get_their_true_mass(case, bits):
    """Law 15: a key that equals its sketch loses nothing to it."""
    x = case.build(slack=0.0)
    _, codes, scales = sketched(x, bits)
    _, approximate = estimates(x.query, codes, scales)
    # Undo the rotation: its rows are the rotated unit vectors.
    own = approximate @ rotate(torch.eye(case.head_dim, dtype=torch.float64)).T
    is_kept = (sketch_keys(own, bits)[0] == codes).all(dim=-1)  # a scale times a level may lie beyond another threshold
    kept = replace(x, keys=torch.where(is_kept[..., None], own, 0.0))
    scores, codes, scales = sketched(kept, bits)
    true = logits_of(kept.query, kept.keys)
    for s, length in enumerate(case.lengths):
        mass = true[s, :, :, :length].softmax(dim=-1).sum(dim=1)  # [Hkv, T]
        blocks = torch.nn.functional.pad(mass, (0, -length % case.block_size)).unflatten(-1, (-1, case.block_size))
        n_blocks = math.ceil(length / case.block_size)
        np.testing.assert_allclose(scores[s, :, :n_blocks], blocks.sum(dim=-1), atol=1e-9)
    assert is_kept.double().mean() > 0.5 or case.key_kind != "normal"


# --- The kernels beside the reference ---


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("resa.fast", reason="triton comes for Linux only")


RAGGED = Case(0, 2, 3, 16, 8, lengths=(33, 5), capacity=40)
a_kernels_case = cases(
    head_dims=FAST_HEAD_DIMS, block_sizes=FAST_BLOCK_SIZES, groups=(3, 1, 7, 16), sizes=("plain",), max_batch=2
)


@pytest.mark.fast
@examples(8)
@example(case=RAGGED, bits=2, dtype=torch.float16)
@example(case=RAGGED, bits=1, dtype=torch.float32)
@given(case=a_kernels_case, bits=st.sampled_from(BITS), dtype=st.sampled_from(FAST_DTYPES))
def test_kernels_sketch_like_the_reference(kernels, case, bits, dtype):
    """Codes may differ where a rotated channel lies within rounding of a threshold. What is not finite is lost."""
    keys = case.build(dtype, slack=0.0).keys
    if case.capacity > 2:
        keys[0, :, 2, 1] = INF
    codes, scales = (each.cpu() for each in kernels.sketch_keys(keys.to(DEVICE), bits))
    expected_codes, expected = sketch_keys(keys, bits)
    is_clear = ~(to_thresholds(keys, bits) <= 1e-5).any(dim=-1)
    same = (codes == expected_codes).all(dim=-1)
    assert (same | ~is_clear).all()
    assert torch.equal(scales.isnan(), expected.isnan())
    rtol = 2 * eps(dtype) + 8 * eps(torch.float32)
    torch.testing.assert_close(scales[same], expected[same], rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.fast
@examples(8)
@example(case=RAGGED, bits=2, dtype=torch.float16, kind="NaN")
@example(case=replace(RAGGED, head_dim=64, lengths=(129, 128), capacity=250), bits=2, dtype=torch.float16, kind="huge")
@example(case=replace(RAGGED, head_dim=64, group=10), bits=1, dtype=torch.float16, kind="NaN")
@example(case=replace(RAGGED, head_dim=128, block_size=32), bits=2, dtype=torch.float16, kind="NaN")
@example(case=RAGGED, bits=1, dtype=torch.float32, kind="huge")
@given(
    case=a_kernels_case, bits=st.sampled_from(BITS), dtype=st.sampled_from(FAST_DTYPES), kind=st.sampled_from(GARBAGE)
)
def test_kernels_score_like_the_reference(kernels, case, bits, dtype, kind):
    """From the same sketches, of which one is lost, and with garbage past the lengths."""
    x = case.build(dtype, slack=0.0)
    x.query[0, 0] = 0.0  # all tokens weigh the same
    check_scores(kernels, x, bits, [(0, 0, 0)], kind)


def check_scores(kernels, x, bits, lost, kind):
    """Scores like the reference's from sketches of which `lost` name some (sequence, KV head, token)."""
    (codes, scales), capacity, dtype = sketch_keys(x.keys, bits), x.keys.shape[2], x.keys.dtype
    head_dim, group = x.keys.shape[3], x.query.shape[1] // x.keys.shape[1]
    for each in lost:
        scales[each] = NAN
    past = torch.arange(capacity) >= x.lengths[:, None, None]

    def scored(code, scale):
        stored = codes.masked_fill(past[..., None], code), scales.masked_fill(past, scale)
        call = (each.to(DEVICE) for each in (x.query, *stored, x.lengths))
        with poisoned_memory():
            return kernels.score_sketch(*call, x.block_size).cpu()

    found = scored(0xA7, garbage(kind, dtype))
    assert_same_bits(found, scored(0, 0.0), "law 13, on kernels")
    expected = score_sketch(x.query.double(), codes, scales.double(), x.lengths, x.block_size)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found == -INF, expected == -INF)
    # A logit is off by some roundings of its size L, and the mass by twice as much of itself.
    size = logits_of(x.query.double().abs(), x.keys.double().abs()).amax() if capacity else 1.0
    allowed = 1e-6 + 2 * eps(torch.float32) * (head_dim + 8) * 2 * float(size) * group
    is_number = expected.isfinite()
    total = found.masked_fill(~is_number, 0.0).sum(dim=-1)
    is_whole = ~expected.isnan().any(dim=-1) & (x.lengths > 0)[:, None]
    assert ((total - group)[is_whole].abs() <= 1e-4).all(), "law 14, on kernels"
    assert ((found.double() - expected)[is_number].abs() <= allowed).all()


# Five tiles of tokens in the first sequence, the last of nine tokens, and two whole ones in the second.
RUNS = Case(5, 1, 3, 64, 16, lengths=(4 * 128 + 9, 2 * 128), capacity=4 * 128 + 20)


@pytest.mark.parametrize(
    ("splits", "case", "bits", "dtype"),
    [
        (1, RUNS, 2, torch.float16),
        (2, replace(RUNS, group=1, head_dim=128), 2, torch.float16),
        (3, replace(RUNS, group=16, block_size=128), 1, torch.float16),
        (5, replace(RUNS, head_dim=128), 1, torch.float16),
        (2, replace(RUNS, head_dim=16, key_kind="spike"), 1, torch.float32),
    ],
)
@pytest.mark.fast
def test_any_number_of_runs(kernels, monkeypatch, splits, case, bits, dtype):
    """Runs of 5, 3, 2 and 1 tiles; then tokens are lost in the middle of a whole run and in the last tile."""
    monkeypatch.setattr("resa.fast.estimate.count_splits", lambda *_: splits)
    monkeypatch.setattr("resa.fast.estimate.LONG", 1 if splits > 1 else 2**62)
    x = case.build(dtype, slack=0.0)
    x.query[:, -1] *= 4  # few tokens have most of this head's mass
    for lost in ([], [(0, 0, 300), (0, 0, 4 * 128 + 3)]):
        check_scores(kernels, x, bits, lost, "NaN")


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)])
@pytest.mark.fast
def test_sums_at_their_limit(kernels, head_dim, bits):
    """Queries and keys of one channel: rotated channels are all as large, so that sums of levels come to the most."""
    sizes = torch.linspace(-2, 2, 40, dtype=torch.float16)
    keys, query = full(1, 1, 40, head_dim, dtype=torch.float16), full(1, 2, head_dim, dtype=torch.float16)
    keys[0, 0, :, 0], query[0, :, 0] = sizes, torch.tensor([7.0, -9.0], dtype=torch.float16)
    codes, scales = sketch_keys(keys, bits)
    found = kernels.score_sketch(*(each.to(DEVICE) for each in (query, codes, scales, int32(40))), 8).cpu()
    expected = score_sketch(query.double(), codes, scales.double(), int32(40), 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy notices
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (16, torch.float32)], ids=str)
@pytest.mark.fast
def test_a_query_that_is_not_finite_scores_nan(kernels, head_dim, dtype, odd):
    """All blocks of its group, as in the reference, and no others."""
    x = Case(0, 2, 3, head_dim, 8, lengths=(150,), capacity=160).build(dtype, slack=0.0)
    x.query[0, 1, 3] = odd
    codes, scales = sketch_keys(x.keys, 2)
    found = kernels.score_sketch(*(each.to(DEVICE) for each in (x.query, codes, scales, x.lengths)), 8).cpu()
    expected = score_sketch(x.query, codes, scales, x.lengths, 8)
    assert expected[0, 0, :19].isnan().all()
    assert torch.equal(found.isnan(), expected.isnan())


def test_a_sketch_finds_what_bounds_hide():
    """Two large channels in one block, never in one key: its bounds promise what no key has."""
    from resa.reference import block_bounds, score_blocks

    keys = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys[0, 0, 0, 0] = keys[0, 0, 1, 1] = 30.0  # block 0: one channel each
    keys[0, 0, 40, :2] = 20.0  # block 2: both
    query = full(1, 1, 64, dtype=torch.float64)
    query[..., :2] = 4.0
    bounds = score_blocks(query, block_bounds(keys, int32(64), 16), int32(64), 16)
    codes, scales = sketch_keys(keys, 2)
    assert bounds.argmax().item() == 0
    assert score_sketch(query, codes, scales, int32(64), 16).argmax().item() == 2
