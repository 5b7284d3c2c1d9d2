"""Ways to score blocks: each is what it is called, found again from the cache that a step has."""

from dataclasses import replace

import pytest
import torch

from resa.reference import ReSAConfig, block_bounds, score_blocks, score_sketch, sketch_keys
from resa.reference.lab.parallel import decode_at_once, exact_stream
from resa.reference.lab.scorers import SCORERS, Steps, approximated, own_scorer
from resa.reference.sketch import rotate
from small_models import EXACT, Shape

B, G, D, T, PROMPT, BLOCK = 2, 3, 16, 45, 20, 4


@pytest.fixture(scope="module")
def steps():
    """Windows of several lengths, some of which begin inside a block; both streams differ all along."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    at = torch.arange(PROMPT, T)
    begins = at - torch.arange(T - PROMPT) % 7
    return Steps(normal(B, 2 * G, len(at), D), normal(B, 2, T, D), normal(B, 2, T, D), begins, at, BLOCK)


def caches(steps):
    """For every step its query [B, Hq, D], the keys that it finds [B, Hkv, t, D], and their number [B]."""
    for i, (begin, at) in enumerate(zip(steps.begins.tolist(), steps.at.tolist(), strict=True)):
        keys = torch.cat((steps.exact[:, :, :begin], steps.decoded[:, :, begin : at + 1]), dim=2)
        yield i, steps.query[:, :, i], keys, torch.full((B,), at + 1)


def by_hand(name, query, keys, lengths):
    """Scores [B, Hkv, M] of one step."""

    def bounded(size):
        return score_blocks(query, block_bounds(keys, lengths, size), lengths, size)

    if name == "first-block":
        return bounded(BLOCK).index_fill(-1, torch.tensor([0]), float("inf"))
    if name == "half-blocks":
        return torch.stack([half.amax(dim=-1) for half in bounded(BLOCK // 2).split(2, dim=-1)], dim=-1)
    if name in ("sketch-1", "sketch-2"):
        return score_sketch(query, *sketch_keys(keys, int(name[-1])), lengths, BLOCK)
    is_lost = ~keys.isfinite().all(dim=-1)[:, :, None]
    if name == "sketch-4":
        query, keys = rotate(query), approximated(keys, 4)
    logits = query.unflatten(1, (2, G)) @ keys.mT * D**-0.5
    mass = logits.masked_fill(is_lost, float("-inf")).softmax(dim=-1)
    mass = mass.masked_fill(is_lost, float("nan")).sum(dim=2)
    return torch.stack([block.sum(dim=-1) for block in mass.split(BLOCK, dim=-1)], dim=-1)


@pytest.mark.parametrize("name", ["first-block", "half-blocks", "sketch-1", "sketch-2", "sketch-4", "mass"])
def test_a_scorer_is_what_it_is_called(steps, name, monkeypatch):
    """All blocks but the newest, which every step selects; several slices of steps."""
    monkeypatch.setattr("resa.reference.lab.scorers.SLICE", 4)
    scores = SCORERS[name](steps)
    for i, query, keys, lengths in caches(steps):
        expected = by_hand(name, query, keys, lengths)[..., :-1]
        torch.testing.assert_close(scores[:, :, i, : expected.shape[-1]], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["sketch-1", "sketch-2", "sketch-4", "mass"])
def test_lost_keys_have_no_mass_and_their_blocks_score_nan(steps, name):
    """One in either stream: a step meets each where it reads that stream."""
    exact, decoded = steps.exact.clone(), steps.decoded.clone()
    exact[:, :, 9, 3], decoded[:, 1, 30, 0] = float("nan"), float("inf")
    spoilt, n_lost = replace(steps, exact=exact, decoded=decoded), set()
    scores = SCORERS[name](spoilt)
    for i, query, keys, lengths in caches(spoilt):
        expected = by_hand(name, query, keys, lengths)
        found = scores[:, :, i, : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT, equal_nan=True)
        n_lost.add(int(expected[0, 1].isnan().sum()))
    assert n_lost == {1, 2}


def test_more_bits_remember_more(steps):
    lost = [(rotate(steps.exact) - approximated(steps.exact, bits)).norm() for bits in (1, 2, 4)]
    assert lost[0] > 1.5 * lost[1] > 2.25 * lost[2]
    assert torch.equal(approximated(steps.exact, None), steps.exact)


def test_half_blocks_need_two_halves(steps):
    odd = Steps(steps.query, steps.exact, steps.decoded, steps.begins, steps.at, 3)
    with pytest.raises(ValueError, match="block_size: got 3; allowed: even, to be halved"):
        SCORERS["half-blocks"](odd)


@torch.no_grad()
def test_a_scorer_takes_the_place_of_the_configurations():
    model = Shape(seed=3, context=96).model()
    exact = exact_stream(model, torch.tensor([Shape(seed=3).tokens(60)]))
    bounds = ReSAConfig(block_size=4, min_blocks=2, interval=5)
    sketch = ReSAConfig(block_size=4, min_blocks=2, interval=5, selection="sketch")
    assert (own_scorer(bounds), own_scorer(sketch)) == ("pooled", "sketch-2")
    own = decode_at_once(model, exact, sketch, 20).hidden
    assert torch.equal(decode_at_once(model, exact, bounds, 20, SCORERS["sketch-2"]).hidden, own)
    assert not torch.equal(decode_at_once(model, exact, bounds, 20).hidden, own)
