"""Decoding at once gives what decoding step by step gives: every schedule, interval and corner."""

import copy

import pytest
import torch
from small_models import Shape

from resa.reference import ReSAConfig, prefill
from resa.reference.generate import decode_along
from resa.reference.parallel import decode_at_once, exact_stream, exact_until, pooled_scores

B, T, PROMPT = 2, 150, 32


@pytest.fixture(scope="module")
def model():
    return Shape(layers=3, group=2, qk_norm=True, context=256).model()


@pytest.fixture(scope="module")
def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


def step_by_step(model, tokens, config, prompt_tokens):
    cache = model.new_cache(len(tokens), tokens.shape[1], config.block_size)
    prefill(model, tokens[:, :prompt_tokens].tolist(), cache)
    steps = decode_along(model, cache, tokens[:, prompt_tokens:].tolist(), config)
    return torch.stack([logits.clone() for logits, _ in steps], dim=1)


def both(model, tokens, config, prompt_tokens=PROMPT):
    """Final hidden states of dense attention and of decoding."""
    exact = exact_stream(model, tokens)
    return exact.hidden, decode_at_once(model, exact, config, prompt_tokens)


@pytest.mark.parametrize("schedule", ["paper", "fused"])
@pytest.mark.parametrize("interval", [1, 4, 8, 16, 32, None])
@pytest.mark.parametrize("more", [{}, {"local_blocks": 2}, {"dense_layers": 1}, {"active_ratio": 0.5}])
def test_it_equals_the_loop(model, tokens, schedule, interval, more):
    if schedule == "fused" and interval is None:
        pytest.skip("never rectified is the same under both")
    config = ReSAConfig(**{"block_size": 8, "active_ratio": 0.2, "min_blocks": 2, **more}, interval=interval)
    config = ReSAConfig(**{**config.__dict__, "schedule": schedule})
    with torch.no_grad():
        dense, decoded = (model.output(hidden) for hidden in both(model, tokens, config))
        expected = step_by_step(model, tokens, config, PROMPT)
        torch.testing.assert_close(decoded[:, PROMPT:], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(dense, model(tokens), rtol=0, atol=1e-9)
    if (schedule, interval) != ("fused", 1):  # which is dense
        assert (decoded - dense)[:, PROMPT:].abs().max() > 1e-3  # something was left out
    torch.testing.assert_close(decoded[:, :PROMPT], dense[:, :PROMPT], rtol=0, atol=1e-9)


def test_all_blocks_are_dense(model, tokens):
    config = ReSAConfig(block_size=8, active_ratio=1, interval=None)
    with torch.no_grad():
        dense, decoded = both(model, tokens, config)
    torch.testing.assert_close(decoded, dense, rtol=0, atol=1e-9)


def test_gradients_reach_both_streams(model, tokens):
    """The exact stream's keys learn to be found by the decoded one's queries."""
    config = ReSAConfig(block_size=8, active_ratio=1.0, interval=1, schedule="paper")
    # Of decode-only's last step only its own token is in the decoded stream: all others reach it as exact keys.
    tokens = tokens.clamp(max=model.config.vocab_size - 2)
    tokens[:, PROMPT + 3] = only_there = model.config.vocab_size - 1
    _, decoded = both(model, tokens, config)
    (gradient,) = torch.autograd.grad(decoded[:, -1].square().sum(), model.embed.weight)
    assert gradient.isfinite().all()
    assert gradient[only_there].abs().max() > 0


def test_what_is_exact():
    assert exact_until(10, 4, ReSAConfig(interval=2)).tolist() == [4, 4, 4, 4, 4, 4, 6, 6, 8, 8]


@pytest.mark.parametrize(
    ("config", "prompt_tokens", "named"),
    [
        (ReSAConfig(block_size=8, interval=12), 32, "config.interval"),
        (ReSAConfig(block_size=8, dense_below=9), 32, "config.dense_below"),
        (ReSAConfig(block_size=8), 33, "prompt_tokens: got 33; allowed: a multiple of block_size = 8, 8 … 150"),
        (ReSAConfig(block_size=8), 0, "prompt_tokens"),
        (ReSAConfig(block_size=8), 160, "prompt_tokens"),
        (ReSAConfig(block_size=8, interval=None), 0, "prompt_tokens: got 0; allowed: 1 … 150"),
        (ReSAConfig(block_size=8, interval=1), 151, "prompt_tokens: got 151; allowed: 1 … 150"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, tokens, config, prompt_tokens, named):
    with pytest.raises(ValueError, match=named):
        both(model, tokens, config, prompt_tokens)


def test_more_tokens_than_the_context_are_refused_by_name(model):
    tokens = torch.zeros(1, model.config.context + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="tokens: got 257; allowed: at most context = 256"):
        both(model, tokens, ReSAConfig(block_size=8))


@pytest.mark.parametrize("prompt_tokens", [1, 30, 33, 148, 149, 150])
@pytest.mark.parametrize(("interval", "schedule"), [(None, "paper"), (1, "paper"), (1, "fused")])
def test_a_prompt_may_cut_a_block_where_no_window_does(model, tokens, prompt_tokens, interval, schedule):
    config = ReSAConfig(block_size=8, active_ratio=0.1, min_blocks=2, interval=interval, schedule=schedule)
    with torch.no_grad():
        dense, decoded = (model.output(hidden) for hidden in both(model, tokens, config, prompt_tokens))
        if prompt_tokens < T:
            expected = step_by_step(model, tokens, config, prompt_tokens)
            torch.testing.assert_close(decoded[:, prompt_tokens:], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(decoded[:, :prompt_tokens], dense[:, :prompt_tokens], rtol=0, atol=1e-9)


def test_nothing_is_decoded_of_a_prompt_alone(model, tokens):
    for config in (ReSAConfig(block_size=8), ReSAConfig(block_size=8, interval=None)):
        dense, decoded = both(model, tokens[:, :144], config, 144)
        assert torch.equal(decoded, dense)


def test_scores_are_asked_for_decoded_steps_alone_and_in_float32(model, tokens):
    """In half precision what differs would tie; steps of the prompt need no scores."""
    half, asked = copy.deepcopy(model).bfloat16(), []

    def score(query, bounds):
        asked.append((query.shape[2], query.dtype))
        return pooled_scores(query, bounds)

    config = ReSAConfig(block_size=8, active_ratio=0.1, min_blocks=2, dense_layers=1)
    with torch.no_grad():
        decode_at_once(half, exact_stream(half, tokens), config, PROMPT, score)
    assert asked == [(T - PROMPT, torch.float32)] * 4  # of both streams, in the two layers that select


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (torch.zeros(4, dtype=torch.long), "tokens"),
        (torch.full((1, 4), 10_000), "tokens: got 10000 … 10000"),
        (torch.zeros(1, 4), "tokens"),
    ],
)
def test_tokens_that_are_not_the_models_are_refused_by_name(model, tokens, named):
    with pytest.raises((ValueError, TypeError), match=named):
        exact_stream(model, tokens)


def test_ways_share_one_exact_stream(model, tokens):
    exact = exact_stream(model, tokens)
    for interval in (4, None, 8):
        config = ReSAConfig(block_size=8, active_ratio=0.1, min_blocks=2, interval=interval)
        with torch.no_grad():
            _, alone = both(model, tokens, config)
            assert torch.equal(decode_at_once(model, exact, config, PROMPT), alone)
