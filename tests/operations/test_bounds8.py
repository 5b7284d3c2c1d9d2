"""Bounds in 8 bits: the codes, the numbers read back from them, and the law that makes them bounds.

The oracle knows e4m3 only as torch's `float8_e4m3fn`, from whose 127 magnitudes it makes a table; rounding outward is
a search in that table.
"""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis import target

import oracle
from backends import TRITON, a_case, drawn, moved
from judging import arrays, exact_bounds, full, int32
from strategies import DEVICE, INF, NAN, ORDINARY_KEYS, Case
from tolerances import assert_within, score_floor

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("kernels")]
each_dtype = pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)

# The finite e4m3 numbers ≥ 0 by code: 0, 2^-9, …, 448.
TABLE = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
NO_BOUND, NEGATIVE, LARGEST = 0x7F, 0x80, 448.0
SIDES = np.array([False, True]).reshape(2, 1, 1)  # is it hi? along [2, D, M]
SMALL = {"max_blocks": 4, "max_batch": 2}  # interpreted launches are slow


def bounds8(codes, scale):
    return import_module("resa.fast").Bounds8(codes, scale)


def expected_scale(bounds):
    """The smallest power of two by which every number that needs room still fits, channel by channel.

    That is 16 times a channel's largest finite bound, and at least the largest of its head. bounds [B, Hkv, 2, D, M]
    array -> [B, Hkv, D]
    """
    largest = np.abs(np.where(np.isfinite(bounds), bounds, 0.0)).max(axis=(2, 4), initial=0.0)
    room = np.maximum(16 * largest, largest.max(axis=2, keepdims=True))
    exponent = np.ceil(np.log2(np.maximum(room / LARGEST, 2.0**-200)))
    return 2.0 ** np.clip(np.where(room == 0, -9, exponent), -120, 120)


def expected_codes(x, is_hi):
    """Codes of numbers x next to them on the outward side: up for hi, down for lo. Signs are those of x, −0 included.

    Magnitudes grow away from zero where x lies on the outward side of it, and a number beyond the table then has no
    bound; elsewhere they shrink, and a number beyond the table becomes its largest.
    """
    grows = (x > 0) == np.broadcast_to(is_hi, x.shape)
    magnitude = np.abs(np.nan_to_num(x, nan=0.0, posinf=INF, neginf=-INF))
    above = np.searchsorted(TABLE, magnitude, side="left")  # 127 beyond the table
    below = np.searchsorted(TABLE, magnitude, side="right") - 1
    codes = np.where(np.isnan(x), NO_BOUND, np.where(grows & (x != 0), above, below))
    return (codes + NEGATIVE * np.signbit(x)).astype(np.uint8)


def decoded(bounds):
    """Numbers that codes stand for, as an array: without a bound −∞ for lo and +∞ for hi."""
    codes, scale = bounds.codes.numpy(), bounds.scale.double().numpy()
    magnitude = codes & 0x7F
    number = np.where(codes & NEGATIVE, -1.0, 1.0) * TABLE[np.minimum(magnitude, 126)] * scale[:, :, None, :, None]
    return np.where(magnitude == NO_BOUND, np.where(SIDES, INF, -INF), number)


def assert_codes(bounds, exact, what):
    """The codes of exact bounds [B, Hkv, 2, D, M] at the scale that `bounds` has; read back, they lie outward.

    A NaN may have either sign, and so may zero, because the smaller of its two signs is either.
    """
    exact = exact.double().numpy()
    x = exact / bounds.scale.double().numpy()[:, :, None, :, None]
    has_sign = ~(np.isnan(x) | (x == 0))
    codes, expected = bounds.codes.numpy(), expected_codes(x, SIDES)
    codes, expected = (np.where(has_sign, each, each & 0x7F) for each in (codes, expected))
    off = np.argwhere(codes != expected)
    shown = [(tuple(map(int, at)), x[tuple(at)], hex(codes[tuple(at)]), hex(expected[tuple(at)])) for at in off[:3]]
    assert len(off) == 0, f"{what}: {len(off)} of {codes.size} codes differ: place, number, code, expected: {shown}"
    read = decoded(bounds)
    assert (np.isnan(exact[:, :, 0]) | (read[:, :, 0] <= exact[:, :, 0]) | (exact[:, :, 0] == INF)).all()
    assert (np.isnan(exact[:, :, 1]) | (read[:, :, 1] >= exact[:, :, 1]) | (exact[:, :, 1] == -INF)).all()


def assert_compressed(exact, what):
    """Scales and codes of compressed bounds, bit for bit."""
    bounds = TRITON.compress_bounds(exact)
    assert (bounds.codes.dtype, bounds.codes.shape) == (torch.uint8, exact.shape)
    assert bounds.scale.dtype == torch.float32
    assert np.array_equal(bounds.scale.double().numpy(), expected_scale(exact.double().numpy()))
    assert_codes(bounds, exact, what)
    return bounds


# --- Codes ---


def written(keys, scale):
    """Keys [B, Hkv, M, D] as the only ones of their blocks, put there by `write_window` at a chosen scale."""
    batch, kv_heads, n_blocks, head_dim = keys.shape
    bounds = bounds8(full(batch, kv_heads, 2, head_dim, n_blocks, value=77, dtype=torch.uint8), scale)
    stored = full(batch, kv_heads, 8 * n_blocks, head_dim, value=NAN, dtype=keys.dtype)
    for block in range(n_blocks):
        start, new = int32(*[8 * block] * batch), keys[:, :, block : block + 1]
        _, _, bounds = TRITON.write_window(stored, stored, bounds, new, new, start, start + 1, 8)
    return bounds


CODES_OF = {
    0.0: (0x00, 0x00), 1.0: (0x38, 0x38), 1.01: (0x38, 0x39), -1.01: (0xB9, 0xB8), 448.0: (0x7E, 0x7E),
    449.0: (0x7E, 0x7F), -449.0: (0xFF, 0xFE), INF: (0x7E, 0x7F), -INF: (0xFF, 0xFE), 2.0**-9: (0x01, 0x01),
    2.0**-10: (0x00, 0x01), -(2.0**-10): (0x81, 0x80), 1e-30: (0x00, 0x01), 2.0**-6: (0x08, 0x08),
    0.99 * 2.0**-6: (0x07, 0x08), 1.9999999: (0x3F, 0x40), 15.999999: (0x57, 0x58),
}  # fmt: skip


@pytest.mark.parametrize("number", CODES_OF)
def test_codes_by_hand(number):
    """The oracle, and the kernel at scale 1, over a single key."""
    x, (lo, hi) = np.float64(np.float32(number)).reshape(1), CODES_OF[number]
    assert (expected_codes(x, False)[0], expected_codes(x, True)[0]) == (lo, hi)
    stored = written(full(1, 1, 1, 16, value=number), torch.ones(1, 1, 16))
    assert [stored.codes[0, 0, side].unique().tolist() for side in (0, 1)] == [[lo], [hi]]


def around(numbers):
    """Float32 numbers, those right below and above them, and all of their negatives."""
    numbers = np.asarray(numbers, dtype=np.float32)
    with np.errstate(over="ignore"):
        near = [numbers, np.nextafter(numbers, np.float32(INF)), np.nextafter(numbers, np.float32(-INF))]
    return np.concatenate([*near, *(-each for each in near)])


LIMITS = np.finfo(np.float32)
EVERY_STEP = np.concatenate(
    [
        around(TABLE),
        around((TABLE[1:] + TABLE[:-1]) / 2),
        around([449, 464, 480, 1e10, LIMITS.max, 1e-10, LIMITS.tiny, 2.0**-149, 2.0**-140, 3 * 2.0**-130]),
        np.array([INF, -INF, NAN], dtype=np.float32),
    ]
)


@pytest.mark.parametrize("power", [0, 3, -7, 100, -100])
def test_every_step_of_the_format(power):
    """All e4m3 numbers, the float32 numbers right beside them, halves between them, and those out of range."""
    with np.errstate(over="ignore", under="ignore"):
        numbers = torch.from_numpy(EVERY_STEP * np.float32(2.0**power))
    keys = torch.cat([numbers, numbers[: -len(numbers) % 16]]).view(1, 1, -1, 16)  # [B, Hkv, M, D]: one number each
    for part in keys.split(64 if DEVICE == "cuda" else 16, dim=2):
        exact = torch.stack([part, part], dim=2).transpose(3, 4)  # lo = hi = key
        assert_codes(written(part, full(1, 1, 16, value=2.0**power)), exact, f"2^{power}")


@each_dtype
@drawn(
    6,
    {"case": Case(0, 2, 3, 16, 8, lengths=(0, 1, 33), capacity=49)},
    {"case": Case(1, 2, 3, 16, 8, lengths=(40, 17), capacity=49, size="huge")},
    {"case": Case(2, 2, 3, 16, 8, lengths=(40, 17), capacity=49, size="tiny")},
    case=a_case(),
)
def test_compressed_bounds_are_the_oracles(kernels, dtype, case):
    """Scales and codes, bit for bit; a byte per bound. Empty blocks included."""
    exact = exact_bounds(case.build(dtype))
    assert assert_compressed(exact, f"codes {case}").codes.nbytes == exact.numel()


@pytest.mark.parametrize("n_blocks", [1023, 1024, 1025, 2064])
def test_long_rows(n_blocks):
    """More bounds than one program compresses."""
    assert_compressed(torch.randn(1, 1, 2, 16, n_blocks, generator=torch.Generator().manual_seed(n_blocks)), "codes")


@pytest.mark.parametrize("largest", [28.0, 28.00001, 27.99999, 1.0, 1.75, 1.7500002, 2.0**-120, 2.0**120])
def test_scales_at_their_edges(largest):
    """Room for 16 times a channel's largest bound and not for 32 times; infinite and NaN bounds have no say in it."""
    exact = full(1, 1, 2, 16, 2)
    exact[0, 0, 0, 3, 1] = -largest
    exact[0, 0, 1, 3, 0] = INF
    exact[0, 0, 1, 4, 0] = NAN
    exact[0, 0, 1, 5] = torch.tensor([largest, -INF])
    exact[0, 0, 1, 6] = largest / 1000
    scale = assert_compressed(exact, "codes").scale[0, 0].double().tolist()
    assert scale[3] == scale[5]
    assert scale[4] == scale[6] == scale[0], "a silent channel has room for the others' bounds"
    if 1e-30 < largest < 1e30:
        assert LARGEST / 2 < 16 * float(np.float32(largest)) / scale[3] <= LARGEST


@pytest.mark.parametrize("number", [3e38, -3e38, 1e-38, 2.0**-149])
def test_bounds_at_the_ends_of_float32(number):
    """At any scale, numbers that are read back lie outward."""
    exact = full(1, 1, 2, 16, 1, value=number)
    with np.errstate(over="ignore"):
        assert_codes(TRITON.compress_bounds(exact), exact, "codes")


# --- Scores ---


def check_scores(x, bounds):
    """The kernel's scores are the oracle's of the decoded bounds, and law 1 holds for them.

    They are not below the scores over exact bounds, which are at least q̄·k of every key (test_laws.py).
    """
    scores, read, lengths = TRITON.score_blocks(x.query, bounds, x.lengths, x.block_size), decoded(bounds), x.lengths
    assert scores.dtype == torch.float32
    rounding = score_floor(x.query.dtype, *arrays(x.query), read)
    expected, over_exact = (
        oracle.score_blocks(*arrays(x.query), each, lengths.tolist(), x.block_size)
        for each in (read, *arrays(exact_bounds(x)))
    )
    target(assert_within(scores, expected, rounding, "scores"))
    assert (scores.double().numpy() >= over_exact - rounding).all()


@each_dtype
@drawn(
    6,
    {"case": Case(0, 2, 3, 16, 8, lengths=(0, 1, 33), capacity=49)},
    {"case": Case(0, 3, 16, 32, 8, lengths=(17, 8), capacity=17, query_kind="sparse")},
    {"case": Case(3, 2, 2, 16, 8, lengths=(40, 17), capacity=49, query_kind="opposed", key_kind="clusters")},
    case=a_case(keys=ORDINARY_KEYS),
)
def test_scores_are_bounds(kernels, dtype, case):
    x = case.build(dtype)
    check_scores(x, TRITON.compress_bounds(exact_bounds(x)))


@each_dtype
@drawn(
    6,
    {"case": Case(0, 2, 3, 16, 8, lengths=(9, 20), capacity=31, query_kind="sparse"), "power": -9},
    # Opposed heads are left out: they pool to zero or nearly so, and nearly zero times no bound is no bound.
    case=a_case(
        keys=("normal", "clusters", "spike"),
        queries=("normal", "grid", "sparse"),
        sizes=("plain",),
        min_length=1,
        **SMALL,
    ),
    power=st.integers(-12, 3),
)
def test_scores_are_bounds_at_any_scale(kernels, dtype, case, power):
    """A scale too small leaves channels without a bound, and one too large has few steps: the law holds for both."""
    x = case.build(dtype)
    scale = full(len(case.lengths), case.kv_heads, case.head_dim, value=2.0**power)
    codes = expected_codes((exact_bounds(x).double() / scale[:, :, None, :, None]).numpy(), SIDES)
    check_scores(x, bounds8(torch.from_numpy(codes), scale))


def test_zero_times_no_bound_is_zero():
    """Worked by hand: a channel that has no bound counts only where the query has it."""
    codes = full(1, 1, 2, 16, 3, value=0x38, dtype=torch.uint8)  # 1.0
    codes[0, 0, 0, :, 0] = 0xB8  # lo = −1
    codes[0, 0, 1, 5, 1], codes[0, 0, 0, 5, 2] = 0x7F, 0xFF
    bounds = bounds8(codes, full(1, 1, 16, value=2.0))
    for first, second, expected in (
        (0.0, 0.0, [0.0, 0.0, 0.0]),
        (-0.0, -0.0, [0.0, 0.0, 0.0]),
        (3.0, -3.0, [0.0, 0.0, 0.0]),  # pools to zero
        (3.0, 3.0, [6.0, INF, 6.0]),
        (-3.0, -3.0, [6.0, -6.0, INF]),
    ):
        query = full(1, 2, 16)
        query[0, :, 5] = torch.tensor([first, second])
        assert TRITON.score_blocks(query, bounds, int32(24), 8)[0, 0].tolist() == expected


@pytest.mark.parametrize("n_blocks", [16, 17])
def test_codes_past_the_end_are_not_read(n_blocks):
    """Whatever they are, the scores keep every bit; with rows of whole sixteens the loads reach past the end."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 2, 2, 16, n_blocks), generator=generator, dtype=torch.uint8)
    query, scale = torch.randn(2, 6, 16, generator=generator), full(2, 2, 16, value=0.25)
    first = TRITON.score_blocks(query, bounds8(codes, scale), int32(25, 8), 8)
    for s, used in enumerate((4, 1)):
        codes[s, ..., used:] = torch.randint(0, 256, (2, 2, 16, n_blocks - used), generator=generator)
        assert (first[s, :, used:] == -INF).all()
    assert torch.equal(TRITON.score_blocks(query, bounds8(codes, scale), int32(25, 8), 8), first)


# --- Law 2: online = rebuilt ---


@each_dtype
@drawn(4, case=a_case(min_length=2, **SMALL), data=st.data())
def test_codes_written_window_by_window_are_those_of_all_keys(kernels, dtype, case, data):
    """Appended, then overwritten, the scale fixed at the start: the codes of the keys as they stand, no other's."""
    x = case.build(dtype)
    scale = TRITON.compress_bounds(exact_bounds(x)).scale / 4  # some will not fit
    n_blocks = -(-case.capacity // case.block_size)
    codes = full(len(case.lengths), case.kv_heads, 2, case.head_dim, n_blocks, value=77, dtype=torch.uint8)
    stored = [torch.full_like(x.keys, NAN), torch.full_like(x.keys, NAN), bounds8(codes, scale)]
    final = x.keys.clone()
    starts, held = [0] * len(case.lengths), [0] * len(case.lengths)
    for step in range(3):
        # A window reaches at least to the length, or is none.
        reach = [[start, *range(held[s], case.lengths[s] + 1)] for s, start in enumerate(starts)]
        ends = [data.draw(st.sampled_from(each), label=f"end of {s}") for s, each in enumerate(reach)]
        ends = list(case.lengths) if step == 2 else ends
        width = max(1, *(end - start for start, end in zip(starts, ends, strict=True)))
        new = full(len(ends), case.kv_heads, width, case.head_dim, value=NAN, dtype=dtype)
        for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # Larger than the last ones: a window that overwrites it must make it forgotten.
            fresh = x.keys[s, :, start:end] if step == 2 else -2 * x.keys[s, :, start:end]
            new[s, :, : end - start] = fresh
            final[s, :, start:end] = fresh
        stored = kernels.write_window(*stored, new, new, int32(*starts), int32(*ends), case.block_size)
        held = [max(reached, end) for reached, end in zip(held, ends, strict=True)]
        exact = exact_bounds(x.but(keys=final, lengths=int32(*held)))
        for s, length in enumerate(held):
            used = -(-length // case.block_size)
            row = bounds8(stored[2].codes[s : s + 1, ..., :used], scale[s : s + 1])
            assert_codes(row, exact[s : s + 1, ..., :used], f"after window {step} of sequence {s}")
            assert (stored[2].codes[s, ..., used:] == 77).all(), "a block without a token was written to"
        starts = [data.draw(st.integers(0, reached), label=f"next start of {s}") for s, reached in enumerate(held)]
    assert torch.equal(stored[2].scale, scale), "the scale is fixed"


# --- Refusals ---


def test_compression_refuses_by_name():
    good = full(1, 1, 2, 16, 3).to(DEVICE)
    compress_bounds = import_module("resa.fast").compress_bounds
    for bad, message in (
        (good[0], r"bounds: got shape \[1, 2, 16, 3\]"),
        (good[:, :, :1], r"bounds: got shape \[1, 1, 1, 16, 3\]"),
        (good.double(), r"bounds: got torch.float64"),
        (good[:, :, :, :12].contiguous(), r"head dimension D: got 12"),
        (good.transpose(3, 4).contiguous().transpose(3, 4), r"bounds: got strides"),
        (good.to("meta"), r"bounds: got device meta"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            compress_bounds(bad)


def test_scores_refuse_codes_that_do_not_fit():
    bounds = bounds8(full(1, 1, 2, 16, 3, dtype=torch.uint8), torch.ones(1, 1, 16))
    query = full(1, 2, 16)
    narrow = replace(bounds, codes=bounds.codes[..., :2].contiguous())
    flat = replace(bounds, codes=bounds.codes[:, :, 0])
    with pytest.raises(ValueError, match=r"^lengths: got .*20"):
        TRITON.score_blocks(query, narrow, int32(20), 8)
    with pytest.raises(ValueError, match=r"^bounds: got shape"):
        TRITON.score_blocks(query, flat, int32(20), 8)
    spread = replace(
        moved(bounds, DEVICE), codes=torch.zeros(1, 1, 2, 16, 6, dtype=torch.uint8, device=DEVICE)[..., ::2]
    )
    with pytest.raises(ValueError, match=r"^bounds: got strides"):
        TRITON.score_blocks(query, spread, int32(12), 8)
