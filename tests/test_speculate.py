"""Self-speculation: greedy output is dense decoding's, sampled output is distributed as it, and the cache is exact."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from small_models import EXACT, Shape, assert_bounds_rebuilt, dense_cache, drift, shapes, share

from resa.reference import ReSAConfig, generate, sample_token, speculate
from resa.reference.generate import open_generation, prefill
from resa.reference.sampling import Choice, distribution
from resa.reference.speculate import Draft, Speculation, confirm

SHAPE = Shape(seed=11)
PROMPTS = SHAPE.prompts((19, 1, 8))
SPARSE = ReSAConfig(block_size=2, min_blocks=2, interval=5)
DENSE = replace(SPARSE, interval=1, schedule="fused")


def watched(n_tokens=20, config=SPARSE, shape=SHAPE, prompts=PROMPTS):
    """A greedy generation, and the drafts and accepted drafts of every dense pass."""
    passes, model = [], shape.model()
    generation, feed = open_generation(model, prompts, max(map(len, prompts)) + n_tokens, config, None)
    logits = prefill(model, feed, generation.cache)
    own = [None] * len(prompts)
    run = Speculation(model, generation, config, Choice(), own, n_tokens, (), on_pass=lambda *call: passes.append(call))
    run.run(logits)
    return generation, passes


# ---- Greedy ----------------------------------------------------------------------------------------------------------


@share(2)
@given(
    shape=shapes(),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    n_tokens=st.integers(0, 24),
    interval=st.integers(1, 9),
    schedule=st.sampled_from(["fused", "paper"]),
    ratio=st.sampled_from([0.1, 0.4, 1.0]),
    dense_below=st.sampled_from([0, 12, 24]),
    stop_after=st.sampled_from([None, 0, 3, 7]),
)
def test_greedy_output_is_dense_decodings(shape, lengths, n_tokens, interval, schedule, ratio, dense_below, stop_after):
    """Token for token, whatever is drafted; the cache ends exact, with bounds rebuilt and the last token not fed."""
    model, prompts = shape.model(), shape.prompts(lengths)
    config = ReSAConfig(2, ratio, 2, interval=interval, schedule=schedule, dense_below=dense_below)
    dense = replace(config, interval=1, schedule="fused", dense_below=0)
    endless = generate(model, prompts, n_tokens, dense).tokens
    stops = [] if stop_after is None else [row[stop_after] for row in endless[:1] if len(row) > stop_after]
    expected, calls = generate(model, prompts, n_tokens, dense, stop_tokens=stops), []
    done = generate(
        model, prompts, n_tokens, config, stop_tokens=stops, speculate=True, on_token=lambda *call: calls.append(call)
    )
    event(f"stopped early: {expected.tokens != endless}")
    assert done.tokens == expected.tokens
    assert done.window.tolist() == [0] * len(prompts)
    assert done.pending.tolist() == expected.pending.tolist()
    assert done.cache.lengths.tolist() == expected.cache.lengths.tolist()
    for s, (prompt, tokens) in enumerate(zip(prompts, done.tokens, strict=True)):
        told = [(position, token) for sequence, position, token in calls if sequence == s]
        assert told == [(len(prompt) + i, token) for i, token in enumerate(tokens)]
    exact, _ = dense_cache(model, [prompt + tokens for prompt, tokens in zip(prompts, done.tokens, strict=True)], 2)
    for s in range(len(prompts)):
        assert (drift(done.cache, s, exact)[: int(done.cache.lengths[s])] <= EXACT).all()
    assert_bounds_rebuilt(done.cache)


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_drafts_are_rejected_and_accepted_here(schedule):
    """So that the equality above says something: sparse decoding alone says something else, and most passes cut."""
    config = replace(SPARSE, schedule=schedule)
    assert generate(SHAPE.model(), PROMPTS, 20, replace(config, interval=None)).tokens != (
        generate(SHAPE.model(), PROMPTS, 20, DENSE).tokens
    )
    generation, passes = watched(config=config)
    drafted, accepted = ([call[i] for call in passes] for i in (1, 2))
    most = 4 if schedule == "fused" else 5
    assert max(drafted) == most
    assert 0 < sum(accepted) < sum(drafted)
    assert any(n == most for n in accepted)
    assert any(n < most for n in accepted)
    assert [len(row) for row in generation.tokens] == [20] * 3


def test_every_pass_gives_a_token_at_least():
    """One that the prefill chose; then per pass the drafts accepted, and one more unless "paper" accepts them all."""
    for schedule in ("fused", "paper"):
        _, passes = watched(config=replace(SPARSE, schedule=schedule))
        for sequence in range(len(PROMPTS)):
            own = [(drafted, accepted) for each, drafted, accepted in passes if each == sequence]
            for i, (drafted, accepted) in enumerate(own):
                is_last = i == len(own) - 1
                assert drafted == (4 if schedule == "fused" else 5) or is_last
                assert 0 <= accepted <= drafted
            gained = [n + (n < drafted or (schedule == "fused" and drafted == 4)) for drafted, n in own]
            assert all(gained)
            assert 1 + sum(gained) in (20, 21)  # the last pass may end one short of what it could give


def test_it_goes_on_like_any_other_generation():
    model = SHAPE.model()
    first = generate(model, PROMPTS, 9, SPARSE, speculate=True)
    onward = generate(model, [[], [3, 4], []], 8, SPARSE, speculate=True, resume=first)
    expected = generate(model, [[], [3, 4], []], 8, DENSE, resume=generate(model, PROMPTS, 9, DENSE))
    assert onward.tokens == expected.tokens


def test_nothing_is_drawn_at_temperature_0():
    own = [torch.Generator().manual_seed(i) for i in range(3)]
    before, default = [each.get_state() for each in own], torch.get_rng_state()
    generate(SHAPE.model(), PROMPTS, 12, SPARSE, generator=own, speculate=True)
    assert all(torch.equal(each.get_state(), state) for each, state in zip(own, before, strict=True))
    assert torch.equal(torch.get_rng_state(), default)


def test_without_an_interval_there_is_nothing_to_decide():
    with pytest.raises(ValueError, match=r"config.interval: got None; allowed: an integer, to speculate"):
        generate(SHAPE.model(), PROMPTS, 4, replace(SPARSE, interval=None), speculate=True)


# ---- Sampled ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("choice", [Choice(1.0), Choice(0.7, 0.8), Choice(1.3, 1.0, 4)], ids=str)
def test_what_is_confirmed_is_distributed_as_the_dense_choice(choice):
    """One draft, 20,000 times: min(1, p/q), or what p has more than q."""
    dense, sparse = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own, counts, accepted = torch.Generator().manual_seed(4), Counter(), 0
    q, p = choice.distribution(sparse), choice.distribution(dense)
    for _ in range(20_000):
        (token,), n = confirm([Draft(choice.token(sparse, own), q)], dense[None], choice, own)
        counts[token] += 1
        accepted += n
    assert set(counts) <= set(p.nonzero()[:, 0].tolist())
    assert excess(counts, dict(enumerate(p.tolist()))) < 4
    assert accepted / 20_000 == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.015)


def test_the_distribution_is_that_of_sample_token():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    for temperature, top_p, top_k in ((1.0, 1.0, None), (0.6, 0.7, None), (2.0, 0.9, 5)):
        own = torch.Generator().manual_seed(6)
        counts = Counter(sample_token(logits, temperature, top_p, own, top_k) for _ in range(10_000))
        assert excess(counts, dict(enumerate(distribution(logits, temperature, top_p, top_k).tolist()))) < 4
    assert distribution(torch.tensor([1.0, 3.0, 3.0]), 0.0, 1.0).tolist() == [0, 1, 0]


def sampled_texts(n_tokens, repeats, config, temperature):
    """Counts of whole continuations of one prompt, and their exact probabilities under dense decoding."""
    model, prompt = TINY.model(), TINY.prompts((13,))[0]
    counts = Counter()
    for seed in range(repeats // 500):
        own = [torch.Generator().manual_seed(1000 * seed + i) for i in range(500)]
        done = generate(model, [prompt] * 500, n_tokens, config, temperature=temperature, generator=own, speculate=True)
        counts.update(map(tuple, done.tokens))
    texts = list(itertools.product(range(TINY.vocab), repeat=n_tokens))
    logits = model(torch.tensor([[*prompt, *text] for text in texts])).double()[:, len(prompt) - 1 : -1]
    log_probs = (logits / temperature).log_softmax(dim=-1)
    each = log_probs.gather(2, torch.tensor(texts)[..., None])[..., 0].sum(dim=1).exp()
    return counts, dict(zip(texts, each.tolist(), strict=True))


class Tiny(Shape):
    """Few enough tokens that whole texts can be counted."""

    vocab = 4


TINY = Tiny(seed=5)


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_sampled_texts_are_distributed_as_dense_ones(schedule):
    """Four tokens of four, 256 texts, 4,000 times: drafts of three, of which later ones depend on what was accepted."""
    config = ReSAConfig(2, 0.1, 2, interval=4 if schedule == "fused" else 3, schedule=schedule)
    counts, probabilities = sampled_texts(4, 4000, config, temperature=1.5)
    assert excess(counts, probabilities) < 4


def test_the_count_would_see_a_wrong_rule(monkeypatch):
    """Everything accepted: the texts are then sparse decoding's."""

    def credulous(drafts, logits, choice, generator):
        tokens = [draft.token for draft in drafts]
        return [*tokens, choice.token(logits[-1], generator)][: len(logits)], len(drafts)

    monkeypatch.setattr(speculate, "confirm", credulous)
    counts, probabilities = sampled_texts(4, 4000, ReSAConfig(2, 0.1, 2, interval=4), temperature=1.5)
    assert excess(counts, probabilities) > 10
