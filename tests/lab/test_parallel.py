"""Decoding at once gives what decoding step by step gives: every schedule, interval, block size and corner."""

import copy
from functools import partial
from itertools import product

import pytest
import torch

from resa.reference import ReSAConfig
from resa.reference.lab import parallel
from resa.reference.lab.parallel import decode_at_once, exact_stream
from resa.reference.lab.scorers import by_bounds, pooled_scores
from small_models import EXACT, VISIBLE, Shape, decoded_along

T, PROMPT = 86, 24
SKETCH = {"selection": "sketch", "sketch_bits": 2}
CORNERS = [
    {"interval": None},
    {"interval": 1, "schedule": "paper"},
    {"interval": 1, "schedule": "fused"},
    {"interval": 3, "schedule": "paper"},
    {"interval": 7, "schedule": "fused"},
    {"interval": 7, "schedule": "fused", "selection": "sketch", "sketch_bits": 1},
]


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """Several slices of steps, which end inside blocks and windows; other files' texts are shorter than one."""
    monkeypatch.setattr(parallel, "SLICE", 22)


@pytest.fixture(scope="module")
def model():
    return Shape(layers=3, group=2, qk_norm=True, context=256).model()


@pytest.fixture(scope="module")
def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (2, T), generator=generator)


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
        expected = decoded_along(model, row[:prompt_tokens], row[prompt_tokens:], config)
        assert float((logits[prompt_tokens:] - expected).abs().max()) < EXACT
    return float((decoded - dense).abs().max())


# The same as steps.


FEW = [*product([2, 12], [{}, {"active_ratio": 0.5}, SKETCH]), (1, SKETCH), (None, SKETCH)]


@pytest.mark.parametrize("schedule", ["paper", "fused"])
@pytest.mark.parametrize(
    ("interval", "more"),
    [*product([1, 5, 8, 32, None], [{"local_blocks": 2, "dense_layers": 1}]), *FEW],
)
def test_it_equals_the_loop(model, tokens, schedule, interval, more):
    """Windows may begin inside a block, which then holds tokens of both streams."""
    options = {"block_size": 8, "active_ratio": 0.2, "min_blocks": 2, **more, "schedule": schedule}
    tokens = tokens if interval in (5, None) else tokens[:1]
    lost = assert_same(model, tokens, ReSAConfig(**options, interval=interval), PROMPT)
    assert (lost > VISIBLE) == ((schedule, interval) != ("fused", 1)), "nothing was left out"


@pytest.mark.parametrize(("prompt_tokens", "block_size"), [(1, 3), (27, 8), (85, 3)])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_prompt_may_have_any_length(model, tokens, prompt_tokens, block_size, corner):
    config = ReSAConfig(block_size=block_size, active_ratio=0.1, min_blocks=2, **corner)
    assert_same(model, tokens[:1], config, prompt_tokens)


# Training and scores.


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
    decode_at_once(half, exact_stream(half, tokens), config, PROMPT, partial(by_bounds, score=score))
    assert asked == [(T - PROMPT, torch.float32)] * 4  # of both streams, in the two layers that select
