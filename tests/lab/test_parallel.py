"""Decoding at once gives what decoding step by step gives: every schedule, interval, block size and corner."""

import copy

import pytest
import torch

from resa.reference import ReSAConfig, generate, prefill
from resa.reference.lab.parallel import decode_along, decode_at_once, exact_stream, pooled_scores, windows
from small_models import EXACT, VISIBLE, Shape

T, PROMPT = 86, 24
CORNERS = [
    {"interval": None},
    {"interval": 1, "schedule": "paper"},
    {"interval": 1, "schedule": "fused"},
    {"interval": 3, "schedule": "paper"},
    {"interval": 7, "schedule": "fused"},
]


@pytest.fixture(scope="module")
def model():
    return Shape(layers=3, group=2, qk_norm=True, context=256).model()


@pytest.fixture(scope="module")
def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (2, T), generator=generator)


def step_by_step(model, tokens, config, prompt_tokens):
    """Logits [S, V] of every step, and the states [S] that steps leave behind: (tokens drifted, cache length)."""
    cache = model.new_cache(len(tokens), config.block_size)
    prefill(model, tokens[:prompt_tokens], cache)
    steps = decode_along(model, cache, tokens[prompt_tokens:], config)
    logits, states = zip(*((logits, (state.n_drifted, state.cache.length)) for logits, state in steps), strict=True)
    return torch.stack(logits), states


@torch.no_grad()
def at_once(model, tokens, config, prompt_tokens=PROMPT):
    """Logits [B, T, V] of dense attention and of decoding."""
    exact = exact_stream(model, tokens)
    decoded = decode_at_once(model, exact, config, prompt_tokens)
    return model.output(exact.hidden), model.output(decoded.hidden)


@torch.no_grad()
def assert_same(model, tokens, config, prompt_tokens):
    dense, decoded = at_once(model, tokens, config, prompt_tokens)
    assert float((dense - model(tokens)).abs().max()) < EXACT
    assert float((decoded - dense)[:, :prompt_tokens].abs().max()) < EXACT
    for row, logits in zip(tokens.tolist(), decoded, strict=True):
        expected, _ = step_by_step(model, row, config, prompt_tokens)
        assert float((logits[prompt_tokens:] - expected).abs().max()) < EXACT
    return float((decoded - dense).abs().max())


# ---- The same as steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["paper", "fused"])
@pytest.mark.parametrize("interval", [1, 2, 5, 8, 12, 32, None])
@pytest.mark.parametrize("more", [{}, {"local_blocks": 2, "dense_layers": 1}, {"active_ratio": 0.5}])
def test_it_equals_the_loop(model, tokens, schedule, interval, more):
    """Windows may begin inside a block, which then holds tokens of both streams."""
    options = {"block_size": 8, "active_ratio": 0.2, "min_blocks": 2, **more, "schedule": schedule}
    lost = assert_same(model, tokens, ReSAConfig(**options, interval=interval), PROMPT)
    assert (lost > VISIBLE) == ((schedule, interval) != ("fused", 1)), "nothing was left out"


@pytest.mark.parametrize("prompt_tokens", [1, 27, 85])
@pytest.mark.parametrize("block_size", [3, 8])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_prompt_may_have_any_length(model, tokens, prompt_tokens, block_size, corner):
    config = ReSAConfig(block_size=block_size, active_ratio=0.1, min_blocks=2, **corner)
    assert_same(model, tokens[:1], config, prompt_tokens)


def test_nothing_is_decoded_after_a_prompt_alone(model, tokens):
    for corner in CORNERS:
        dense, decoded = at_once(model, tokens, ReSAConfig(block_size=8, **corner), T)
        assert torch.equal(decoded, dense)


def test_all_blocks_are_dense(model, tokens):
    dense, decoded = at_once(model, tokens, ReSAConfig(block_size=8, active_ratio=1, interval=None))
    assert float((decoded - dense).abs().max()) < EXACT


@torch.no_grad()
def test_ways_share_one_exact_stream(model, tokens):
    exact = exact_stream(model, tokens)
    for corner in CORNERS:
        config = ReSAConfig(block_size=8, active_ratio=0.1, min_blocks=2, **corner)
        decoded = model.output(decode_at_once(model, exact, config, PROMPT).hidden)
        assert torch.equal(decoded, at_once(model, tokens, config)[1])


@pytest.mark.parametrize("corner", CORNERS)
def test_windows_are_those_of_the_loop(model, tokens, corner):
    config = ReSAConfig(block_size=8, **corner)
    begins, is_dense = windows(T, PROMPT, config)
    _, states = step_by_step(model, tokens[0].tolist(), config, PROMPT)
    before = [0, *(n_drifted for n_drifted, _ in states[:-1])]
    assert begins.tolist() == [PROMPT + step - n_drifted for step, n_drifted in enumerate(before)]
    assert is_dense.tolist() == [config.schedule == "fused" and n_drifted == 0 for n_drifted, _ in states]


def test_keys_and_values_are_those_that_steps_write(model, tokens):
    """Read from the cache where nothing is ever rectified."""
    config = ReSAConfig(block_size=8, active_ratio=0.2, min_blocks=2, interval=None)
    cache = model.new_cache(T, 8)
    prefill(model, tokens[0, :PROMPT].tolist(), cache)
    list(decode_along(model, cache, tokens[0, PROMPT:].tolist(), config))
    with torch.no_grad():
        decoded = decode_at_once(model, exact_stream(model, tokens), config, PROMPT)
    for name in ("keys", "values"):
        written = torch.stack(getattr(decoded, name))[:, :1]  # [layer, 1, Hkv, S, D]
        torch.testing.assert_close(written, getattr(cache, name)[:, :, :, PROMPT:], rtol=0, atol=EXACT)


# ---- Training and scores ---------------------------------------------------------------------------------------------


def test_gradients_reach_both_streams(model, tokens):
    """The exact stream's keys learn to be found by the decoded one's queries."""
    config = ReSAConfig(block_size=8, active_ratio=1.0, interval=1, schedule="paper")
    # Decode-only's last step has only its own token in the decoded stream: all others reach it as exact keys.
    tokens = tokens.clamp(max=model.config.vocab_size - 2)
    tokens[:, PROMPT + 3] = only_there = model.config.vocab_size - 1
    decoded = decode_at_once(model, exact_stream(model, tokens), config, PROMPT)
    (gradient,) = torch.autograd.grad(decoded.hidden[:, -1].square().sum(), model.embed.weight)
    assert gradient.isfinite().all()
    assert gradient[only_there].abs().max() > 0


@torch.no_grad()
def test_scores_are_asked_for_decoded_steps_alone_and_in_float32(model, tokens):
    """In half precision what differs would tie; steps of the prompt need no scores."""
    half, asked = copy.deepcopy(model).bfloat16(), []

    def score(query, bounds):
        asked.append((query.shape[2], query.dtype))
        return pooled_scores(query, bounds)

    config = ReSAConfig(block_size=8, active_ratio=0.1, min_blocks=2, dense_layers=1)
    decode_at_once(half, exact_stream(half, tokens), config, PROMPT, score)
    assert asked == [(T - PROMPT, torch.float32)] * 4  # of both streams, in the two layers that select


# ---- The plain loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", CORNERS)
def test_decoding_along_its_own_tokens_is_generation(model, tokens, corner):
    config, prompt = ReSAConfig(block_size=8, active_ratio=0.1, min_blocks=2, **corner), tokens[0, :PROMPT].tolist()
    (wanted,) = generate(model, [prompt], 20, config)
    cache = model.new_cache(wanted.cache.capacity, 8)
    chosen = [int(prefill(model, prompt, cache).argmax())]
    for logits, state in decode_along(model, cache, wanted.tokens[:-1], config):
        chosen.append(int(logits.argmax()))
        assert state.cache is cache
    assert chosen == wanted.tokens
    assert (state.tokens, state.n_drifted) == (wanted.tokens[:-1], wanted.n_drifted)
    # Operations and numbers are the same, and so are the bits.
    assert cache.length == wanted.cache.length
    assert torch.equal(cache.keys, wanted.cache.keys)
    assert torch.equal(cache.values, wanted.cache.values)


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_tokens", [0, T + 1, 24.0])
def test_a_prompt_that_is_none_is_refused_by_name(model, tokens, prompt_tokens):
    with pytest.raises(ValueError, match=rf"prompt_tokens: got {prompt_tokens}; allowed: 1 … 86"):
        at_once(model, tokens, ReSAConfig(block_size=8), prompt_tokens)


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (torch.zeros(4, dtype=torch.long), "tokens"),
        (torch.full((1, 4), 10_000), "tokens: got 10000 … 10000"),
        (torch.zeros(1, 4), "tokens"),
        (torch.zeros(1, 257, dtype=torch.long), "tokens: got 257; allowed: at most context = 256"),
    ],
)
def test_tokens_that_are_not_the_models_are_refused_by_name(model, tokens, named):
    with pytest.raises(ValueError, match=named):
        exact_stream(model, tokens)
