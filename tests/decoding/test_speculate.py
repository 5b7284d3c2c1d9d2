"""Self-speculation: greedy output is dense decoding's, sampled output is distributed as it, and the cache is exact."""

import itertools
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from resa.reference import ReSAConfig, Sampling, generate, speculate
from resa.reference.speculate import Draft, confirm, distribution
from small_models import EXACT, Shape, assert_bounds_rebuilt, dense_cache, drift, greedy_by_forward, shapes, share

SHAPE = Shape(seed=11)
PROMPTS = SHAPE.prompts((19, 1, 8))
SPARSE = ReSAConfig(block_size=2, min_blocks=2, interval=5)


def tokens_of(generations):
    return [done.tokens for done in generations]


# --- Greedy ---


@share(2)
@given(
    shape=shapes(),
    length=st.integers(1, 20),
    n_tokens=st.integers(0, 24),
    interval=st.integers(1, 9),
    schedule=st.sampled_from(["fused", "paper"]),
    selection=st.sampled_from(["bounds", "sketch"]),
    ratio=st.sampled_from([0.1, 0.4, 1.0]),
    stop_after=st.sampled_from([None, 0, 3, 7]),
)
def test_greedy_output_is_dense_decodings(shape, length, n_tokens, interval, schedule, selection, ratio, stop_after):
    """Token for token, whatever is drafted; the cache ends exact, with bounds rebuilt and the last token not fed."""
    model, prompt, calls = shape.model(), shape.tokens(length), []
    expected = greedy_by_forward(model, prompt, n_tokens)
    stops = [] if stop_after is None else expected[stop_after : stop_after + 1]
    if stops:
        expected = expected[: expected.index(stops[0]) + 1]
    config = ReSAConfig(2, ratio, 2, interval=interval, schedule=schedule, selection=selection)
    options = {"stop_tokens": stops, "on_token": lambda *call: calls.append(call)}
    (done,) = speculate(model, [prompt], n_tokens, config, **options)
    event(f"stopped early: {len(expected) < n_tokens}")
    assert done.tokens == expected
    assert done.n_drifted == 0
    assert calls == [(0, length + place, token) for place, token in enumerate(expected)]
    exact, _ = dense_cache(model, prompt + expected, 2)
    assert done.cache.length == length + max(len(expected) - 1, 0)
    assert (drift(done.cache, exact) <= EXACT).all()
    assert_bounds_rebuilt(done.cache)


@pytest.mark.parametrize(("schedule", "most"), [("fused", 4), ("paper", 5)])
def test_drafts_are_accepted_and_rejected_here(monkeypatch, schedule, most):
    """So that the equality above says something: most passes cut, and sparse decoding alone says something else.

    The prefill chooses a token; then every pass gives the drafts accepted, and one more unless "paper" accepts all.
    """
    config, passes, model = replace(SPARSE, schedule=schedule), [], SHAPE.model()

    def watched(drafts, *rest):
        kept = confirm(drafts, *rest)
        passes.append((len(drafts), sum(draft.token == token for draft, token in zip(drafts, kept, strict=False))))
        return kept

    monkeypatch.setattr(sys.modules["resa.reference.speculate"], "confirm", watched)
    texts = []
    for prompt in PROMPTS:
        begin = len(passes)
        texts += tokens_of(speculate(model, [prompt], 20, config))
        own = passes[begin:]
        assert all(drafts == most for drafts, _ in own[:-1])
        gained = [n + (n < drafts or (schedule == "fused" and drafts == most)) for drafts, n in own]
        assert all(gained), "a pass gives a token at least"
        assert 1 + sum(gained) in (20, 21)  # the last pass may end one short of what it could give
    assert texts != tokens_of(generate(model, PROMPTS, 20, replace(config, interval=None)))
    drafted, accepted = zip(*passes, strict=True)
    assert max(drafted) == most
    assert any(n == most for n in accepted)
    assert any(n < most for n in accepted)


def test_it_goes_on_like_any_other_generation():
    model, prompt, turn = SHAPE.model(), PROMPTS[0], [3, 4]
    (first,) = speculate(model, [prompt], 9, SPARSE)
    (onward,) = speculate(model, [turn], 8, SPARSE, resume=first)
    text = prompt + greedy_by_forward(model, prompt, 9) + turn
    assert onward.tokens == greedy_by_forward(model, text, 8)
    (sparsely_begun,) = generate(model, [prompt], 4, SPARSE)
    assert sparsely_begun.n_drifted == 3
    (onward,) = speculate(model, [[]], 8, SPARSE, resume=sparsely_begun)
    assert onward.tokens == greedy_by_forward(model, prompt + sparsely_begun.tokens, 8)


def test_nothing_is_drawn_at_temperature_0():
    own = [torch.Generator().manual_seed(i) for i in range(3)]
    before, default = [each.get_state() for each in own], torch.get_rng_state()
    speculate(SHAPE.model(), PROMPTS, 12, SPARSE, generators=own)
    assert all(torch.equal(each.get_state(), state) for each, state in zip(own, before, strict=True))
    assert torch.equal(torch.get_rng_state(), default)


# --- Sampled ---


def excess(counts, probabilities):
    """Pearson's statistic less its mean, in its standard deviations; rare outcomes are taken together."""
    n = sum(counts.values())
    rare = [outcome for outcome, p in probabilities.items() if n * p < 8]
    cells = [(counts[outcome], p) for outcome, p in probabilities.items() if n * p >= 8]
    cells.append((sum(counts[outcome] for outcome in rare), sum(probabilities[outcome] for outcome in rare)))
    cells = [(count, p) for count, p in cells if p > 0]
    statistic = sum((count - n * p) ** 2 / (n * p) for count, p in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.8), Sampling(1.3, 1.0, 4)], ids=str)
def test_confirmed_tokens_are_distributed_like_the_dense_choice(sampling):
    """One draft, 10,000 times: min(1, p/q), or what p has more than q."""
    dense, sparse = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own, counts, accepted = torch.Generator().manual_seed(4), Counter(), 0
    q, p = distribution(sampling, sparse), distribution(sampling, dense)
    for _ in range(10_000):
        draft = Draft(sampling.token(sparse, own), q)
        (token,) = confirm([draft], dense[None], sampling, own)
        counts[token] += 1
        accepted += token == draft.token  # what p has more than q is nothing for a rejected token
    assert set(counts) <= set(p.nonzero()[:, 0].tolist())
    assert excess(counts, dict(enumerate(p.tolist()))) < 4
    assert accepted / 10_000 == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.015)


def test_the_distribution_is_that_of_the_sampled_tokens():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    for sampling in (Sampling(1.0), Sampling(0.6, 0.7), Sampling(2.0, 0.9, 5)):
        own = torch.Generator().manual_seed(6)
        counts = Counter(sampling.token(logits, own) for _ in range(10_000))
        assert excess(counts, dict(enumerate(distribution(sampling, logits).tolist()))) < 4
    assert distribution(Sampling(), torch.tensor([1.0, 3.0, 3.0])).tolist() == [0, 1, 0]


class Tiny(Shape):
    """Few enough tokens that whole texts can be counted."""

    vocab = 4


TINY = Tiny(seed=5)


def sampled_texts(config, n_tokens=4, repeats=400, temperature=1.5):
    """Counts of whole continuations of one prompt, and their exact probabilities under dense decoding."""
    model, prompt = TINY.model(), TINY.tokens(25)
    own = [torch.Generator().manual_seed(i) for i in range(repeats)]
    done = speculate(model, [prompt] * repeats, n_tokens, config, Sampling(temperature), generators=own)
    counts = Counter(map(tuple, tokens_of(done)))
    texts = list(itertools.product(range(TINY.vocab), repeat=n_tokens))
    logits = model(torch.tensor([[*prompt, *text] for text in texts])).double()[:, len(prompt) - 1 : -1]
    log_probs = (logits / temperature).log_softmax(dim=-1)
    each = log_probs.gather(2, torch.tensor(texts)[..., None])[..., 0].sum(dim=1).exp()
    return counts, dict(zip(texts, each.tolist(), strict=True))


DRAFTS_OF_TWO = [ReSAConfig(2, 0.1, 2, interval=3), ReSAConfig(2, 0.1, 2, interval=2, schedule="paper")]


@pytest.mark.parametrize("config", DRAFTS_OF_TWO, ids=lambda config: config.schedule)
def test_sampled_texts_are_distributed_like_dense_ones(config):
    """Four tokens of four, 256 texts: two drafts, and what follows depends on how many of them were accepted."""
    assert excess(*sampled_texts(config)) < 4
