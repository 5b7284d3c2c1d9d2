"""The account that a step keeps: two kernels against the rules written out, sequence by sequence, in Python."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import ReSAConfig
from strategies import DEVICE, examples

pytestmark = pytest.mark.fast
bookkeeping = pytest.importorskip("resa.fast.gpu.bookkeeping", reason="triton comes for Linux only")

BATCHES = st.sampled_from([1, 3, 127, 128, 129, 300])


def whole(seed, low, high, batch, dtype=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (batch,), generator=generator).to(dtype)


@st.composite
def configs(draw):
    return ReSAConfig(
        block_size=draw(st.sampled_from([8, 16, 128])),
        active_ratio=draw(st.one_of(st.integers(1, 100).map(lambda n: n / 100), st.floats(0.001, 1))),
        min_blocks=draw(st.integers(1, 20)),
        interval=draw(st.sampled_from([None, 1, 2, 32])),
        schedule=draw(st.sampled_from(["fused", "paper"])),
    )


@examples(60)
@given(config=configs(), batch=BATCHES, seed=st.integers(0, 2**32 - 4))
def test_a_plan_says_who_steps_where_and_how_much_there_is_to_read(config, batch, seed):
    lengths, n_drifted = whole(seed, 0, 1000, batch), whole(seed + 1, 0, (config.interval or 40) - 1, batch)
    running = whole(seed + 2, 0, 2, batch) > 0
    state = (lengths, n_drifted, running)
    found = torch.stack(bookkeeping.plan_step(*(tensor.to(DEVICE) for tensor in state), config)).cpu().T.tolist()
    for row, length, w, is_running in zip(found, *(tensor.tolist() for tensor in state), strict=True):
        is_due = config.interval is not None and config.schedule == "fused" and w + 1 >= config.interval
        if not is_running or is_due:
            assert row == [0, length, length, 0, 0, 0]
            continue
        total = -(-(length + 1) // config.block_size)
        # Exact, as the ratio is a fraction; what is within 1e-9 above a whole number counts as that number.
        share = math.ceil(Fraction(config.active_ratio) * total - Fraction(1, 10**9))
        n = min(total, max(share, config.min_blocks))
        assert row == [1, length, length + 1, length + 1, length // config.block_size * config.block_size, n]


@examples(60)
@given(
    batch=BATCHES, n_tokens=st.integers(1, 5), n_stop=st.integers(0, 3), is_sparse=st.booleans(),
    seed=st.integers(0, 2**32 - 9),
)  # fmt: skip
def test_tokens_are_noted_where_the_mask_says_and_end_whom_they_must(batch, n_tokens, n_stop, is_sparse, seed):
    long = torch.int64
    mask = whole(seed, 0, 1, batch)
    chosen, n_chosen = whole(seed + 1, 0, 6, batch, long), whole(seed + 2, 0, n_tokens - 1, batch, long)
    end, lengths, n_drifted = (whole(seed + i, 0, 90, batch) for i in (3, 4, 5))
    pending, running = whole(seed + 6, -1, 6, batch, long), (whole(seed + 7, 0, 1, batch) > 0) | (mask > 0)
    tokens, stop = torch.full((batch, n_tokens), -1, dtype=long), torch.arange(n_stop)
    state = [tensor.to(DEVICE, copy=True) for tensor in (tokens, n_chosen, pending, running, lengths, n_drifted)]
    given_mask = (mask > 0) if seed % 2 else mask  # of either type
    bookkeeping.note_tokens(
        chosen.to(DEVICE), given_mask.to(DEVICE), end.to(DEVICE), *state, stop.to(DEVICE), is_sparse=is_sparse
    )
    for s in range(batch):
        if mask[s]:
            tokens[s, n_chosen[s]] = pending[s] = chosen[s]
            n_chosen[s] += 1
            lengths[s] = end[s]
            n_drifted[s] = n_drifted[s] + 1 if is_sparse else 0
            running[s] = running[s] and n_chosen[s] < n_tokens and chosen[s] not in stop
    expected = (tokens, n_chosen, pending, running, lengths, n_drifted)
    for name, ours, theirs in zip(
        ("tokens", "n_chosen", "pending", "running", "lengths", "n_drifted"), state, expected, strict=True
    ):
        assert torch.equal(ours.cpu(), theirs), name
