"""Bounds in 8 bits: the codes, what is read back from them, and the law that makes them bounds.

The oracle knows e4m3 only as torch's `float8_e4m3fn`, from whose 127 magnitudes it makes a table; rounding outward is
a search in that table. `RESA_TEST_DEVICE=cuda` runs all of it compiled.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import event, example, given, target
from hypothesis import strategies as st
from strategies import DEVICE, FAST_DTYPES, NAN, ORDINARY_KEYS, Case, examples, fast_cases
from tolerances import assert_within, eps, score_floor

from resa.reference.blocks import block_bounds

pytestmark = pytest.mark.fast
blocks, bounds8, cache = (
    pytest.importorskip(f"resa.fast.{name}", reason="triton comes for Linux only")
    for name in ("blocks", "bounds8", "cache")
)
Bounds8 = bounds8.Bounds8

INF = float("inf")
# The finite e4m3 numbers ≥ 0 by code: 0, 2^-9, …, 448.
TABLE = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
NO_BOUND, NEGATIVE, LARGEST = 0x7F, 0x80, 448.0
SMALL = {"max_blocks": 4, "max_batch": 2}  # interpreted launches are slow


def here(bounds):
    return Bounds8(bounds.codes.cpu(), bounds.scale.cpu())


def there(bounds):
    return Bounds8(bounds.codes.to(DEVICE), bounds.scale.to(DEVICE))


def compressed(bounds):
    return here(bounds8.compress_bounds(bounds.to(DEVICE)))


def scores_of(query, bounds, lengths, block_size):
    """`score_blocks` over bounds in 8 bits, for tensors on the CPU."""
    return blocks.score_blocks(query.to(DEVICE), there(bounds), lengths.to(DEVICE), block_size).cpu()


def expected_scale(bounds):
    """The smallest power of two by which what there must be room for still fits, channel by channel.

    That is 16 times a channel's largest finite bound, and at least the largest of its head. bounds [B, Hkv, 2, D, M]
    array -> [B, Hkv, D]
    """
    largest = np.abs(np.where(np.isfinite(bounds), bounds, 0.0)).max(axis=(2, 4), initial=0.0)
    room = np.maximum(16 * largest, largest.max(axis=2, keepdims=True))
    exponent = np.ceil(np.log2(np.maximum(room / LARGEST, 2.0**-200)))
    return 2.0 ** np.clip(np.where(room == 0, -9, exponent), -120, 120)


def expected_codes(x, is_hi):
    """Codes of numbers x next to them on the outward side: up for hi, down for lo. Signs are those of x, −0 included.

    Magnitudes grow away from zero where x lies on the outward side of it, and what is beyond the table then has no
    bound; elsewhere they shrink, and what is beyond the table has its largest number.
    """
    is_hi = np.broadcast_to(is_hi, x.shape)
    grows = (x > 0) == is_hi
    magnitude = np.abs(np.nan_to_num(x, nan=0.0, posinf=INF, neginf=-INF))
    above = np.searchsorted(TABLE, magnitude, side="left")  # 127 beyond the table
    below = np.searchsorted(TABLE, magnitude, side="right") - 1
    codes = np.where(np.isnan(x), NO_BOUND, np.where(grows & (x != 0), above, below))
    return (codes + NEGATIVE * np.signbit(x)).astype(np.uint8)


def decoded(bounds):
    """What codes stand for, as an array: what has no bound is −∞ for lo and +∞ for hi."""
    codes, scale = bounds.codes.numpy(), bounds.scale.double().numpy()
    magnitude = codes & 0x7F
    number = np.where(codes & NEGATIVE, -1.0, 1.0) * TABLE[np.minimum(magnitude, 126)] * scale[:, :, None, :, None]
    outward = np.array([-INF, INF]).reshape(2, 1, 1)
    return np.where(magnitude == NO_BOUND, outward, number)


SIDES = np.array([False, True]).reshape(2, 1, 1)  # lo, hi, along [2, D, M]


def assert_codes(bounds, exact, what):
    """The codes of exact bounds [B, Hkv, 2, D, M] at the scale that `bounds` has.

    A NaN may have either sign, and so may zero, because the smaller of its two signs is either.
    """
    x = exact.double().numpy() / bounds.scale.double().numpy()[:, :, None, :, None]
    has_sign = ~(np.isnan(x) | (x == 0))
    codes, expected = bounds.codes.numpy(), expected_codes(x, SIDES)
    codes, expected = (np.where(has_sign, each, each & 0x7F) for each in (codes, expected))
    off = np.argwhere(codes != expected)
    shown = [(tuple(map(int, at)), x[tuple(at)], hex(codes[tuple(at)]), hex(expected[tuple(at)])) for at in off[:3]]
    assert len(off) == 0, f"{what}: {len(off)} of {codes.size} codes differ: place, number, code, expected: {shown}"


def assert_outward(bounds, exact):
    """Bounds of bounds: what is read back lies on the outward side, a NaN on both."""
    read, exact = decoded(bounds), exact.double().numpy()
    assert (np.isnan(exact[:, :, 0]) | (read[:, :, 0] <= exact[:, :, 0]) | (exact[:, :, 0] == INF)).all()
    assert (np.isnan(exact[:, :, 1]) | (read[:, :, 1] >= exact[:, :, 1]) | (exact[:, :, 1] == -INF)).all()


# --------------------------------------------------------------------------------------------------------------
# Codes
# --------------------------------------------------------------------------------------------------------------


def test_the_table_is_e4m3():
    """4 bits of exponent with bias 7, 3 of mantissa: worked by hand where the format changes its step."""
    assert TABLE[[0, 1, 7, 8, 9, 15, 16, 126]].tolist() == [
        0,
        2**-9,
        7 * 2**-9,
        2**-6,
        9 * 2**-9,
        15 * 2**-9,
        2**-5,
        448,
    ]
    assert (np.diff(TABLE) > 0).all()


@pytest.mark.parametrize(
    ("number", "lo", "hi"),
    [
        (0.0, 0x00, 0x00),
        (1.0, 0x38, 0x38),
        (1.01, 0x38, 0x39),
        (-1.01, 0xB9, 0xB8),
        (448.0, 0x7E, 0x7E),
        (449.0, 0x7E, 0x7F),
        (-449.0, 0xFF, 0xFE),
        (INF, 0x7E, 0x7F),
        (-INF, 0xFF, 0xFE),
        (2.0**-9, 0x01, 0x01),
        (2.0**-10, 0x00, 0x01),
        (-(2.0**-10), 0x81, 0x80),
        (1e-30, 0x00, 0x01),
        (2.0**-6, 0x08, 0x08),
        (0.99 * 2.0**-6, 0x07, 0x08),
        (1.9999999, 0x3F, 0x40),
        (15.999999, 0x57, 0x58),
    ],
)
def test_codes_by_hand(number, lo, hi):
    """The oracle, and the kernel at scale 1, over a single key."""
    x = np.float64(np.float32(number)).reshape(1)
    assert expected_codes(x, False)[0] == lo
    assert expected_codes(x, True)[0] == hi
    stored = written(torch.full((1, 1, 1, 16), number), torch.ones(1, 1, 16))
    assert stored.codes[0, 0, 0].unique().tolist() == [lo]
    assert stored.codes[0, 0, 1].unique().tolist() == [hi]


def written(keys, scale):
    """Keys [B, Hkv, M, D] as the only ones of their blocks, put there by `write_window` at a given scale."""
    batch, kv_heads, n_blocks, head_dim = keys.shape
    codes = torch.full((batch, kv_heads, 2, head_dim, n_blocks), 77, dtype=torch.uint8)
    bounds = there(Bounds8(codes, scale))
    stored = torch.full((batch, kv_heads, 8 * n_blocks, head_dim), NAN, dtype=keys.dtype, device=DEVICE)
    for block in range(n_blocks):
        start = torch.full((batch,), 8 * block, dtype=torch.int32, device=DEVICE)
        new = keys[:, :, block : block + 1].to(DEVICE)
        cache.write_window(stored, stored.clone(), bounds, new, new, start, start + 1, 8)
    return here(bounds)


def around(numbers):
    """Float32 numbers, those right below and above them, and all of their negatives."""
    numbers = np.asarray(numbers, dtype=np.float32)
    with np.errstate(over="ignore"):
        near = [numbers, np.nextafter(numbers, np.float32(INF)), np.nextafter(numbers, np.float32(-INF))]
    return np.concatenate([*near, *(-each for each in near)])


EVERY_STEP = np.concatenate(
    [
        around(TABLE),
        around((TABLE[1:] + TABLE[:-1]) / 2),
        around([449, 464, 480, 1e10, np.finfo(np.float32).max, 1e-10, np.finfo(np.float32).tiny]),
        np.array([INF, -INF, NAN], dtype=np.float32),
    ]
)


@pytest.mark.parametrize("power", [0, 3, -7, 100, -100])
def test_every_step_of_the_format(power):
    """All e4m3 numbers, the float32 numbers right beside them, halves between them, and what is too large.

    One channel at a time gets a bound that sets the scale; the other bounds are of any size.
    """
    with np.errstate(over="ignore"):
        numbers = torch.from_numpy(EVERY_STEP * np.float32(2.0**power))
    pad = -len(numbers) % 16
    keys = torch.cat([numbers, numbers[:pad]]).view(1, 1, -1, 16)  # [B, Hkv, M, D]: one number each
    scale = torch.full((1, 1, 16), 2.0**power)
    n_blocks = 64 if DEVICE == "cuda" else 16
    for part in keys.split(n_blocks, dim=2):
        stored = written(part, scale)
        exact = torch.stack([part, part], dim=2).transpose(3, 4)  # lo = hi = key
        assert_codes(stored, exact, f"2^{power}")
        assert_outward(stored, exact)


def test_numbers_below_the_normal_ones():
    """Subnormal float32 numbers are not nothing: a bound of one is rounded away from zero like any other."""
    tiny = around([2.0**-149, 2.0**-140, 3 * 2.0**-130])[:16]
    part = torch.from_numpy(tiny).view(1, 1, 1, 16)
    stored = written(part, torch.ones(1, 1, 16))
    exact = torch.stack([part, part], dim=2).transpose(3, 4)
    assert_codes(stored, exact, "subnormal")
    assert_outward(stored, exact)


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(6)
@given(case=fast_cases())
@example(case=Case(0, 2, 3, 16, 8, lengths=(0, 1, 33), capacity=49))
@example(case=Case(1, 2, 3, 16, 8, lengths=(40, 17), capacity=49, size="huge"))
@example(case=Case(2, 2, 3, 16, 8, lengths=(40, 17), capacity=49, size="tiny"))
def test_compressed_bounds_are_the_oracles(dtype, case):
    """Scales and codes, bit for bit; a byte per bound. Empty blocks included."""
    x = case.build(dtype)
    exact = block_bounds(x.keys, x.lengths, x.block_size)
    bounds = compressed(exact)
    assert bounds.codes.dtype == torch.uint8
    assert bounds.codes.shape == exact.shape
    assert bounds.codes.nbytes == exact.numel()
    assert bounds.scale.dtype == torch.float32
    assert np.array_equal(bounds.scale.double().numpy(), expected_scale(exact.double().numpy()))
    assert_codes(bounds, exact, f"codes {case}")
    assert_outward(bounds, exact)


@pytest.mark.parametrize("n_blocks", [1023, 1024, 1025, 2064])
def test_long_rows(n_blocks):
    """More bounds than one program compresses."""
    exact = torch.randn(1, 1, 2, 16, n_blocks, generator=torch.Generator().manual_seed(n_blocks))
    bounds = compressed(exact)
    assert np.array_equal(bounds.scale.double().numpy(), expected_scale(exact.double().numpy()))
    assert_codes(bounds, exact, "codes")


@pytest.mark.parametrize("largest", [28.0, 28.00001, 27.99999, 1.0, 1.75, 1.7500002, 2.0**-120, 2.0**120])
def test_scales_at_their_edges(largest):
    """Room for 16 times a channel's largest bound and not for 32 times; infinite and NaN bounds have no say in it."""
    exact = torch.zeros(1, 1, 2, 16, 2)
    exact[0, 0, 0, 3, 1] = -largest
    exact[0, 0, 1, 3, 0] = INF
    exact[0, 0, 1, 4, 0] = NAN
    exact[0, 0, 1, 5] = torch.tensor([largest, -INF])
    exact[0, 0, 1, 6] = largest / 1000
    bounds = compressed(exact)
    scale = bounds.scale[0, 0].double().tolist()
    assert np.array_equal(bounds.scale.double().numpy(), expected_scale(exact.double().numpy()))
    assert scale[3] == scale[5]
    assert scale[4] == scale[6] == scale[0], "a silent channel has room for what the others say"
    assert_codes(bounds, exact, "codes")
    if 1e-30 < largest < 1e30:
        assert LARGEST / 2 < 16 * float(np.float32(largest)) / scale[3] <= LARGEST


@pytest.mark.parametrize("number", [3e38, -3e38, 1e-38, 2.0**-149])
def test_bounds_at_the_ends_of_float32(number):
    """Whatever their scale, what is read back lies outward."""
    exact = torch.full((1, 1, 2, 16, 1), number)
    with np.errstate(over="ignore"):
        bounds = compressed(exact)
    assert_codes(bounds, exact, "codes")
    assert_outward(bounds, exact)


# --------------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------------


def pooled_query(query, kv_heads):
    """Mean of the group's query heads in float64, [B, Hkv, D]."""
    return query.double().unflatten(1, (kv_heads, -1)).mean(dim=2).numpy()


def expected_scores(query, read, lengths, block_size):
    """Scores over decoded bounds in float64, the one that the sign of q̄ calls for; 0 · ∞ = 0; −∞ past the end."""
    pooled = pooled_query(query, read.shape[1])[..., None]
    bound = np.where(pooled >= 0, read[:, :, 1], read[:, :, 0])
    with np.errstate(invalid="ignore"):
        scores = np.where((pooled == 0) & np.isinf(bound), 0.0, pooled * bound).sum(axis=2)
    for s, length in enumerate(lengths.tolist()):
        scores[s, :, -(-length // block_size) :] = -INF
    return scores


def check_scores(x, bounds, what):
    """The kernel's scores are those of what the codes stand for."""
    scores = scores_of(x.query, bounds, x.lengths, x.block_size)
    assert scores.dtype == torch.float32
    read = decoded(bounds)
    allowed = score_floor(x.query.dtype, x.query.double().numpy(), read)
    target(assert_within(scores, expected_scores(x.query, read, x.lengths, x.block_size), allowed, what))
    return scores.double().numpy()


def check_law(x, scores, bounds):
    """Law 1: no valid key's q̄·k is above its block's score, nor is the score over exact bounds, up to rounding."""
    pooled, keys = pooled_query(x.query, x.keys.shape[1]), x.keys.double().numpy()
    # The kernel's own rounding comes on top of the law's slack: pooling, products and sums in float32.
    rounding = score_floor(x.query.dtype, x.query.double().numpy(), decoded(bounds))
    exact = block_bounds(x.keys, x.lengths, x.block_size).double().numpy()
    over_exact = expected_scores(x.query, exact, x.lengths, x.block_size)
    for s, length in enumerate(x.lengths.tolist()):
        for block in range(-(-length // x.block_size)):
            valid = keys[s, :, block * x.block_size : min(length, (block + 1) * x.block_size)]  # [Hkv, b, D]
            products = pooled[s, :, None] * valid
            slack = rounding[s, :, block] + 2 * keys.shape[3] * eps(torch.float64) * np.abs(products).sum(-1).max(-1)
            score = scores[s, :, block]
            assert (score >= products.sum(axis=-1).max(axis=-1) - slack).all(), f"sequence {s}, block {block}"
            assert (score >= over_exact[s, :, block] - slack).all(), f"sequence {s}, block {block}"


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(6)
@given(case=fast_cases(keys=ORDINARY_KEYS))
@example(case=Case(0, 2, 3, 16, 8, lengths=(0, 1, 33), capacity=49))
@example(case=Case(0, 3, 16, 32, 8, lengths=(17, 8), capacity=17, query_kind="sparse"))
@example(case=Case(3, 2, 2, 16, 8, lengths=(40, 17), capacity=49, query_kind="opposed", key_kind="clusters"))
def test_scores_are_bounds(dtype, case):
    """Those of the oracle over decoded bounds, and law 1."""
    x = case.build(dtype)
    bounds = compressed(block_bounds(x.keys, x.lengths, x.block_size))
    check_law(x, check_scores(x, bounds, f"scores {case}"), bounds)


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(6)
@given(
    # Opposed heads are left out: they pool to zero or nearly so, and nearly zero times no bound is no bound.
    case=fast_cases(
        keys=("normal", "clusters", "spike"),
        queries=("normal", "grid", "sparse"),
        sizes=("plain",),
        min_length=1,
        **SMALL,
    ),
    power=st.integers(-12, 3),
)
@example(case=Case(0, 2, 3, 16, 8, lengths=(9, 20), capacity=31, query_kind="sparse"), power=-9)
def test_scores_are_bounds_at_any_scale(dtype, case, power):
    """A scale too small leaves channels without a bound, and one too large has few steps: the law holds for both."""
    x = case.build(dtype)
    exact = block_bounds(x.keys, x.lengths, x.block_size)
    scale = torch.full((len(case.lengths), case.kv_heads, case.head_dim), 2.0**power)
    codes = expected_codes((exact.double() / scale[:, :, None, :, None]).numpy(), SIDES)
    bounds = Bounds8(torch.from_numpy(codes), scale)
    scores = check_scores(x, bounds, f"scores {case}")
    check_law(x, scores, bounds)
    event("blocks without a bound" if (scores == INF).any() else "bounds everywhere")


def test_zero_times_no_bound_is_zero():
    """Worked by hand: a channel that has no bound counts only where the query has it."""
    codes = torch.full((1, 1, 2, 16, 3), 0x38, dtype=torch.uint8)  # 1.0
    codes[0, 0, 0, :, 0] = 0xB8  # lo = −1
    codes[0, 0, 1, 5, 1] = 0x7F
    codes[0, 0, 0, 5, 2] = 0xFF
    scale = torch.full((1, 1, 16), 2.0)
    lengths = torch.tensor([24], dtype=torch.int32)
    bounds = Bounds8(codes, scale)
    for number, expected in (
        (0.0, [0.0, 0.0, 0.0]),
        (-0.0, [0.0, 0.0, 0.0]),
        (3.0, [6.0, INF, 6.0]),
        (-3.0, [6.0, -6.0, INF]),
    ):
        query = torch.zeros(1, 2, 16)
        query[0, :, 5] = number
        assert scores_of(query, bounds, lengths, 8)[0, 0].tolist() == expected
    opposed = torch.zeros(1, 2, 16)
    opposed[0, :, 5] = torch.tensor([3.0, -3.0])  # pools to zero
    assert scores_of(opposed, bounds, lengths, 8)[0, 0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("n_blocks", [16, 17])
def test_codes_past_the_end_are_not_read(n_blocks):
    """Whatever they are, the scores keep every bit; with rows of whole sixteens the loads reach past the end."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 2, 2, 16, n_blocks), generator=generator, dtype=torch.uint8)
    query, scale = torch.randn(2, 6, 16, generator=generator), torch.full((2, 2, 16), 0.25)
    lengths = torch.tensor([25, 8], dtype=torch.int32)
    first = scores_of(query, Bounds8(codes, scale), lengths, 8)
    for s, used in enumerate((4, 1)):
        codes[s, ..., used:] = torch.randint(0, 256, (2, 2, 16, n_blocks - used), generator=generator)
        assert (first[s, :, used:] == -INF).all()
    assert torch.equal(scores_of(query, Bounds8(codes, scale), lengths, 8), first)


# --------------------------------------------------------------------------------------------------------------
# Law 2: online = rebuilt
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(4)
@given(case=fast_cases(min_length=2, **SMALL), data=st.data())
def test_codes_written_window_by_window_are_those_of_all_keys(dtype, case, data):
    """Appended, then overwritten, the scale fixed at the start: the codes of the keys as they stand, no other's."""
    x = case.build(dtype)
    scale = compressed(block_bounds(x.keys, x.lengths, x.block_size)).scale / 4  # some will not fit
    n_blocks = -(-case.capacity // case.block_size)
    codes = torch.full((len(case.lengths), case.kv_heads, 2, case.head_dim, n_blocks), 77, dtype=torch.uint8)
    bounds = there(Bounds8(codes, scale))
    stored = [torch.full_like(x.keys, NAN, device=DEVICE) for _ in range(2)]
    final = x.keys.clone()
    starts, held = [0] * len(case.lengths), [0] * len(case.lengths)
    for step in range(3):
        # A window reaches at least to the length, or is none.
        reach = [[start, *range(held[s], case.lengths[s] + 1)] for s, start in enumerate(starts)]
        ends = [data.draw(st.sampled_from(each), label=f"end of {s}") for s, each in enumerate(reach)]
        if step == 2:
            ends = list(case.lengths)
        width = max(1, *(end - start for start, end in zip(starts, ends, strict=True)))
        new = torch.full((len(ends), case.kv_heads, width, case.head_dim), NAN, dtype=dtype)
        for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # Larger than what comes last: a window that overwrites it must make it forgotten.
            fresh = x.keys[s, :, start:end] if step == 2 else -2 * x.keys[s, :, start:end]
            new[s, :, : end - start] = fresh
            final[s, :, start:end] = fresh
        edges = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (starts, ends))
        cache.write_window(*stored, bounds, new.to(DEVICE), new.to(DEVICE), *edges, case.block_size)
        held = [max(reached, end) for reached, end in zip(held, ends, strict=True)]
        exact = block_bounds(final, torch.tensor(held), case.block_size)
        for s, length in enumerate(held):
            used = -(-length // case.block_size)
            row = Bounds8(bounds.codes.cpu()[s : s + 1, ..., :used], scale[s : s + 1])
            assert_codes(row, exact[s : s + 1, ..., :used], f"after window {step} of sequence {s}")
            assert (bounds.codes[s, ..., used:] == 77).all(), "a block without a token was written to"
        starts = [data.draw(st.integers(0, reached), label=f"next start of {s}") for s, reached in enumerate(held)]
    assert torch.equal(bounds.scale.cpu(), scale), "the scale is fixed"


def test_an_overwritten_extreme_leaves_the_codes():
    """A rectification replaces the key that set the bound; a running maximum would not forget it."""
    keys = torch.full((1, 1, 8, 16), NAN, device=DEVICE)
    bounds = there(Bounds8(torch.zeros(1, 1, 2, 16, 1, dtype=torch.uint8), torch.ones(1, 1, 16)))

    def write(number, start, end):
        new = torch.full((1, 1, end - start, 16), number, device=DEVICE)
        edges = (torch.tensor([each], dtype=torch.int32, device=DEVICE) for each in (start, end))
        cache.write_window(keys, keys.clone(), bounds, new, new, *edges, 8)
        return [bounds.codes[0, 0, side].unique().tolist() for side in (0, 1)]

    assert write(1.0, 0, 2) == [[0x38], [0x38]]
    assert write(100.0, 2, 3) == [[0x38], [0x6D]]  # 100 → 104 = 1.625 · 2^6
    assert write(-2.0, 2, 4) == [[0xC0], [0x38]]
    assert write(NAN, 3, 5)[1] in ([0x7F], [0xFF])


# --------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------


def test_compression_refuses_by_name():
    good = torch.zeros(1, 1, 2, 16, 3, device=DEVICE)
    for bad, message in (
        (good[0], r"bounds: got shape \[1, 2, 16, 3\]"),
        (good.expand(1, 1, 2, 16, 3)[:, :, :1], r"bounds: got shape \[1, 1, 1, 16, 3\]"),
        (good.double(), r"bounds: got torch.float64"),
        (good[:, :, :, :12].contiguous(), r"head dimension D: got 12"),
        (good.transpose(3, 4).contiguous().transpose(3, 4), r"bounds: got strides"),
        (good.to("meta"), r"bounds: got device meta"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            bounds8.compress_bounds(bad)


def test_scores_and_windows_refuse_codes_that_do_not_fit():
    bounds = Bounds8(torch.zeros(1, 1, 2, 16, 3, dtype=torch.uint8, device=DEVICE), torch.ones(1, 1, 16, device=DEVICE))
    query, lengths = torch.zeros(1, 2, 16, device=DEVICE), torch.tensor([20], dtype=torch.int32, device=DEVICE)
    narrow = replace(bounds, codes=bounds.codes[..., :2].contiguous())
    with pytest.raises(ValueError, match=r"^lengths: got .*20"):
        blocks.score_blocks(query, narrow, lengths, 8)
    with pytest.raises(ValueError, match=r"^bounds: got strides"):
        blocks.score_blocks(query, replace(bounds, codes=bounds.codes[..., ::2]), lengths[:1] - 8, 8)
    with pytest.raises(ValueError, match=r"^bounds: got shape"):
        blocks.score_blocks(query, replace(bounds, codes=bounds.codes[:, :, 0]), lengths, 8)
    keys, new = torch.zeros(1, 1, 24, 16, device=DEVICE), torch.zeros(1, 1, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"^bounds: got 2 blocks"):
        cache.write_window(keys, keys.clone(), narrow, new, new, lengths, lengths + 1, 8)


def test_no_bounds_at_all():
    empty = compressed(torch.zeros(1, 1, 2, 16, 0))
    assert empty.codes.shape == (1, 1, 2, 16, 0)
    assert empty.scale.shape == (1, 1, 16)
