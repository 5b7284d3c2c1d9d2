"""The loop around the steps, on both decoders: ends of generation, callbacks, resuming, batches, reruns."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from decoders import REFERENCE, TRITON, assert_dense_before_the_window
from resa.reference import Sampling, generate
from small_models import (
    EXACT,
    VISIBLE,
    assert_bounds_rebuilt,
    assert_untouched,
    dense_cache,
    drift,
    greedy_by_forward,
    shapes,
    share,
    sparse_configs,
)


def tokens_of(generations):
    return [done.tokens for done in generations]


def assert_state(decoder, model, texts, generations, config):
    """Every cache holds its text but the last token, dense up to an open window of (N − 1) mod f tokens."""
    for text, done in zip(texts, generations, strict=True):
        assert text[len(text) - len(done.tokens) :] == done.tokens
        n_fed = max(len(done.tokens) - 1, 0)
        assert done.n_drifted == (n_fed if config.interval is None else n_fed % config.interval)
        assert_dense_before_the_window(decoder, model, text[: len(text) - (len(done.tokens) > 0)], done)


def endless(decoder, n_tokens=14, **changes):
    """Tokens after each prompt, with no stop token in the way. The reference is quicker to say them."""
    return tokens_of(generate(decoder.model(), decoder.prompts(), n_tokens, replace(decoder.config, **changes)))


# --- Ends ---


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_a_stop_token_is_returned_and_never_fed(decoder, schedule):
    """At every step of two cycles: the first token, the one after the window filled, and those between.

    At place 3 or 6 the step whose logits gave the stop token had filled the window: its rectification ran.
    """
    config, model, prompts = replace(decoder.config, schedule=schedule), decoder.model(), decoder.prompts()
    rows, n_ended = endless(decoder, 11, schedule=schedule), 0
    unsaid = next(token for token in range(decoder.shape.vocab) if not any(token in row for row in rows))
    for at in range(8) if decoder is REFERENCE else (3,):
        for sequence in range(len(prompts)):
            stop = rows[sequence][at]
            cut = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
            done = decoder.generate(model, prompts, 11, config, stop_tokens={unsaid, stop})
            assert tokens_of(done) == cut
            assert_state(decoder, model, [p + row for p, row in zip(prompts, cut, strict=True)], done, config)
            n_ended += len({len(row) for row in cut}) > 1
            for cache in (each.cache for each in done):
                slack = cache.keys[:, :, :, cache.length :]
                assert not slack.any(), "something was written where nothing was fed"
    assert n_ended, "sequences were to end apart"


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_no_token_and_one(decoder, n_tokens):
    """Without a token the cache is the prefilled one; a single token comes from the prefill alone."""
    model, prompts = decoder.model(), decoder.prompts()
    for is_rounded in (False, True) if decoder is TRITON else (False,):
        config, calls = replace(decoder.config, eight_bit_bounds=is_rounded), []
        done = decoder.generate(model, prompts, n_tokens, config, on_token=lambda *call, to=calls: to.append(call))
        rows = [greedy_by_forward(model, prompt, n_tokens) for prompt in prompts]
        assert tokens_of(done) == rows
        assert_state(decoder, model, [p + row for p, row in zip(prompts, rows, strict=True)], done, config)
        assert calls == [(s, len(prompts[s]), token) for s, row in enumerate(rows) for token in row]


@pytest.mark.parametrize(("prompt_length", "n_tokens"), [(10, 3), (12, 1), (12, 0), (1, 12)])
def test_the_context_is_used_to_its_last_token(decoder, prompt_length, n_tokens):
    """prompt + N − 1 = context fits, because the last token is never fed; one more is refused before any work."""
    shape = replace(decoder.shape, context=12)
    model, prompts = decoder.model(shape), shape.prompts((prompt_length, 1))
    done = decoder.generate(model, prompts, n_tokens, decoder.config)
    assert done[0].cache.length == prompt_length + max(n_tokens - 1, 0) == 12
    longer = shape.prompts((prompt_length + 1, 1))
    too_many = (longer, n_tokens) if n_tokens < 2 else (prompts, n_tokens + 1)
    with pytest.raises(ValueError, match=r"prompts\[0\].*context = 12"):
        decoder.generate(model, *too_many, decoder.config)


# --- Callbacks ---


def test_on_token_reports_each_token_where_it_will_stand(decoder):
    """In the order of each sequence, finished ones no more; positions count from the prompt's first token."""
    stop, calls, prompts = endless(decoder)[-1][5], [], decoder.prompts()
    options = {"stop_tokens": [stop], "on_token": lambda *call: calls.append(call)}
    done = decoder.generate(decoder.model(), prompts, 14, decoder.config, **options)
    assert len(done[-1].tokens) <= 6, "a sequence was to end early"
    expected = [
        (s, len(prompt) + place, token)
        for s, (prompt, each) in enumerate(zip(prompts, done, strict=True))
        for place, token in enumerate(each.tokens)
    ]
    assert sorted(calls) == expected
    assert all(type(number) is int for call in calls for number in call)
    by_step = sorted(expected, key=lambda call: (call[1] - len(prompts[call[0]]), call[0]))
    assert calls == (expected if decoder is REFERENCE else by_step)


def test_the_reference_tells_a_token_before_it_computes_the_next(monkeypatch):
    model, events = REFERENCE.model(), []
    hidden_states = model.hidden_states

    def watched(*arguments):
        events.append("pass")
        return hidden_states(*arguments)

    monkeypatch.setattr(model, "hidden_states", watched)
    generate(model, REFERENCE.prompts()[:1], 3, REFERENCE.config, on_token=lambda *call: events.append("token"))
    assert events == ["pass", "token"] * 3


# --- Resuming ---

TURNS = st.tuples(st.integers(0, 4), st.integers(0, 7), st.sampled_from(["bounds", "sketch"]))


@share(2)
@given(shapes(), sparse_configs(), st.lists(TURNS, min_size=1, max_size=4), st.booleans(), st.sampled_from([18, 1]))
def test_turns_equal_one_dense_prefill_up_to_the_last_window(shape, config, turns, endless_window, length):
    """Any number of turns, each with some new prompt tokens, some generated ones, and another selection."""
    config = replace(config, interval=None) if endless_window else config
    model, text = shape.model(), shape.tokens(length)
    (done,) = generate(model, [text], 3, config)
    text = text + done.tokens
    for turn, (n_prompt, n_tokens, selection) in enumerate(turns, start=1):
        config = replace(config, selection=selection)  # what the cache keeps is built again
        if not done.tokens:  # nothing is pending: go on with a prompt, or not at all
            n_prompt = max(1, n_prompt)
        prompt = shape.tokens(n_prompt, stream=turn)
        (done,) = generate(model, [prompt], n_tokens, config, resume=done)
        text += prompt + done.tokens
    exact, _ = dense_cache(model, text, config.block_size)
    w = max(n_tokens - 1, 0) if config.interval is None else max(n_tokens - 1, 0) % config.interval
    held = len(text) - (n_tokens > 0)
    assert (done.n_drifted, done.cache.length) == (w, held)
    worst = drift(done.cache, exact)
    assert (worst[: held - w] <= EXACT).all(), "everything before the last turn's open window is dense"
    assert_bounds_rebuilt(done.cache)
    event(f"open window of {min(w, 3)}{'+' if w > 2 else ''}, {'drifted' if (worst > VISIBLE).any() else 'exact'}")


@pytest.mark.parametrize(("interval", "schedule"), [(5, "fused"), (5, "paper"), (None, "fused")])
def test_resuming_rectifies_the_open_window_and_leaves_its_generation_alone(decoder, interval, schedule):
    """The next turn's first token is the dense model's, although the window had drifted.

    Whichever decoder began; two continuations of one generation do not see each other.
    """
    config = replace(decoder.config, interval=interval, schedule=schedule)
    model, prompt = decoder.model(), decoder.prompts()[0]
    for first in {REFERENCE, decoder}:
        (begun,) = first.generate(model, [prompt], 4, config)
        assert begun.n_drifted == 3, "a window was to be open"
        text, before = prompt + begun.tokens, deepcopy(begun)
        for more in ([], [3, 4]):
            (done,) = decoder.generate(model, [more], 3, config, resume=begun)
            assert done.tokens[:1] == greedy_by_forward(model, text + more, 1)
            assert_state(decoder, model, [text + more + done.tokens], [done], config)
        assert_untouched(begun.cache, before.cache)
        assert (begun.tokens, begun.n_drifted) == (before.tokens, before.n_drifted)


# --- Law 9, reruns ---


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9)], ids=str)
def test_each_sequence_alone_equals_itself_in_any_batch(decoder, sampling):
    """Other prompts, other lengths, another capacity, a stop token that ends the others earlier or later."""
    model, config = decoder.model(), decoder.config
    prompts = decoder.shape.prompts((*decoder.lengths, 70))

    def generators():
        return [torch.Generator().manual_seed(s) for s in range(len(prompts))]

    options = {"stop_tokens": [16]}
    together = decoder.generate(model, prompts, 8, config, sampling, generators=generators(), **options)
    assert len({len(done.tokens) for done in together}) > 1, "sequences were to end apart"
    for s in range(2):
        own = [generators()[s]]
        (alone,) = decoder.generate(model, [prompts[s]], 8, config, sampling, generators=own, **options)
        assert (alone.tokens, alone.n_drifted) == (together[s].tokens, together[s].n_drifted)
        assert alone.cache.length == together[s].cache.length
        _, allowed = decoder.exact(model, (prompts[s] + alone.tokens)[:-1], config.block_size)
        assert drift(alone.cache, together[s].cache).max() <= 2 * allowed


def test_reruns_are_identical(decoder):
    """Same inputs, same bits: tokens, cache, bounds."""
    model, runs = decoder.model(), []
    for _ in range(2):
        own = torch.Generator().manual_seed(2)
        rest = (7, decoder.config, Sampling(0.8, 0.9))
        runs.append(decoder.generate(model, decoder.prompts(), *rest, generators=own))
    for one, other in zip(*runs, strict=True):
        assert one.tokens == other.tokens
        assert_untouched(one.cache, other.cache)


def test_the_model_is_left_without_gradients(decoder):
    """Decoding a model in training neither records nor needs gradients."""
    model = decoder.model().train()
    (done,) = decoder.generate(model, decoder.prompts()[:1], 2, decoder.config)
    assert model.training
    assert not done.cache.keys.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
