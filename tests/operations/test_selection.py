"""Selection of blocks (eq. 5): integers, so they are compared without a tolerance."""

import pytest
import torch
from hypothesis import strategies as st

import oracle
from backends import a_case, drawn
from judging import arrays, full, select, selected_by_oracle
from strategies import INF, NAN, SCORE_KINDS, WHOLE, build_scores, decoding


def config_of(n, **fields):
    """Fields that select n blocks of eight tokens, the newest among them."""
    return {"block_size": 8, "active_ratio": 0.01, "min_blocks": n, "local_blocks": 1} | fields


def test_selection_by_hand(backend):
    """33 tokens: five blocks, the fifth local; block 5 is past the end."""
    rows = [
        ([1.0, 3.0, NAN, 3.0, -INF, 99.0], [1, 3, 4]),
        ([5.0, 4.0, 3.0, 2.0, 1.0, NAN], [0, 1, 4]),
        ([NAN, -INF, NAN, -3e38, NAN, INF], [1, 3, 4]),  # NaN is below −∞
        ([NAN, NAN, NAN, NAN, 0.0, INF], [0, 1, 4]),  # of equals the lower index
        ([-1.0, -0.0, 2.0**-149, 0.0, 0.0, INF], [1, 2, 4]),  # zeros of both signs are equals
    ]
    scores, expected = torch.tensor([[row for row, _ in rows]]), [[blocks for _, blocks in rows]]
    assert select(backend, scores, [33], **config_of(3)) == expected
    assert selected_by_oracle(scores, [33], config_of(3)) == expected


@pytest.mark.parametrize(("n", "local_blocks", "expected"), [(2, 1, [2, 5]), (1, 1, [5]), (2, 2, [4, 5])], ids=str)
def test_one_block_or_none_beside_an_infinite_score(backend, n, local_blocks, expected):
    """No number lies above the largest score; where the local blocks are enough, it is not taken."""
    scores = torch.tensor([[[1.0, 0.0, INF, -INF, -1.0, 0.0]]])
    assert select(backend, scores, [41], **config_of(n, local_blocks=local_blocks)) == [[expected]]


@pytest.mark.parametrize(
    ("scores", "n", "expected"), [([1.0, INF, 0.0], 1, [2]), ([3.0, INF, 0.0, 0.0], 2, [2, 3])], ids=str
)
def test_local_blocks_alone_beside_an_infinite_score(backend, scores, n, expected):
    found = select(backend, torch.tensor([[scores]]), [8 * len(scores)], **config_of(n, local_blocks=n))
    assert found == [[expected]]


@pytest.mark.parametrize("kind", SCORE_KINDS)
@drawn(
    6,
    config=lambda backend: st.sampled_from(backend.shapes["block_sizes"]).flatmap(decoding),
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    spare=st.integers(0, 3),
    data=st.data(),
)
def test_selection_is_the_oracles_exactly(backend, wide, kind, config, seed, kv_heads, blocks, spare, data):
    b = config["block_size"]
    lengths = [max(0, n * b - data.draw(st.integers(0, b - 1))) for n in blocks]
    scores = build_scores(kind, seed, (len(blocks), kv_heads, max(1, max(blocks) + spare)), wide)
    past = torch.arange(scores.shape[2]) >= torch.tensor(blocks)[:, None, None]
    scores = scores.masked_fill(past, INF)  # where a block past the end would be taken if it could
    assert select(backend, scores, lengths, wide, **config) == selected_by_oracle(scores, lengths, config)


@pytest.mark.parametrize(
    ("kind", "lengths", "n_blocks"),
    [
        *((kind, (700 * 8, 13, 4999), 700) for kind in SCORE_KINDS),
        ("normal", (5000 * 8 - 3,), 5000),
        ("ties", (5000 * 8 - 3,), 5000),
        ("equal", (4097 * 8, 4096 * 8), 4097),
        ("specials", (1025 * 8,), 1100),
    ],
)
def test_selection_from_long_rows(backend, kind, lengths, n_blocks):
    """More blocks than fit one tile, ties across tiles, and 1 to 5,000 blocks in a batch."""
    scores = build_scores(kind, n_blocks, (len(lengths), 2, n_blocks), torch.float32)
    for config in (config_of(16, active_ratio=0.1), config_of(5, active_ratio=0.85, local_blocks=3)):
        assert select(backend, scores, lengths, **config) == selected_by_oracle(scores, lengths, config)


@pytest.mark.parametrize(
    ("n_blocks", "ratio", "min_blocks", "expected"),
    [
        (30, 0.1, 1, 3),  # in float32 0.1 is 0.100000001, which would give 4
        (31, 0.1, 1, 4),
        (29, 0.1, 1, 3),
        (3, 0.1, 1, 1),
        (25, 0.28, 1, 7),  # 0.28 * 25 is 7.000000000000001
        (100, 0.07, 1, 7),  # 7.000000000000001
        (100, 0.29, 1, 29),  # 28.999999999999996
        (100, 0.05000000002, 1, 6),  # 5.000000002 is above 5 by more than the 1e-9 that rounding is granted
        (10, 0.1, 4, 4),  # the minimum
        (3, 0.1, 4, 3),  # no more than there are
        (7, 1.0, 1, 7),
        (1, 0.01, 1, 1),
        (0, 0.5, 1, 0),
    ],
)
def test_number_of_blocks(backend, n_blocks, ratio, min_blocks, expected):
    config = config_of(min_blocks, active_ratio=ratio)
    lengths = [8 * n_blocks, max(0, 8 * n_blocks - 7)]  # the last block full, and with one token
    rows = select(backend, full(2, 1, max(1, n_blocks)), lengths, **config)
    assert [len(blocks) for [blocks] in rows] == [expected, expected]
    assert oracle.count_selected(n_blocks, config) == expected


@drawn(5, case=a_case(**WHOLE, max_blocks=8), data=st.data())
def test_bounds_scores_and_selection_together_are_exact_on_whole_numbers(backend, case, data):
    """No rounding, so not even a tie may fall differently from the oracle's."""
    config, x = data.draw(decoding(case.block_size)), case.build(torch.float16)
    bounds = backend.block_bounds(x.keys, x.lengths, x.block_size)
    scores = backend.score_blocks(x.query, bounds, x.lengths, x.block_size)
    found = select(backend, scores, case.lengths, **config)
    bounds = oracle.block_bounds(*arrays(x.keys), case.lengths, x.block_size)
    scores = oracle.score_blocks(*arrays(x.query), bounds, case.lengths, x.block_size)
    assert found == selected_by_oracle(scores, case.lengths, config)
