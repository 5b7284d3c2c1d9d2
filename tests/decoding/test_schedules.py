"""When a pass is sparse and when it is dense: the rhythm of both schedules, and layers that read everything."""

from dataclasses import replace

import pytest
import torch

from resa.reference import REFERENCE_OPS, ReSAConfig, generate
from small_models import EXACT, Shape, assert_bounds_rebuilt, drift, greedy_by_forward

SHAPE = Shape(seed=11)
PROMPT = SHAPE.tokens(19)
SPARSE = ReSAConfig(block_size=2, min_blocks=2, interval=3)


@pytest.mark.parametrize(
    ("interval", "schedule", "due"),
    [
        (1, "fused", [0, 1, 2, 3, 4, 5]),  # every step is dense
        (1, "paper", [1, 2, 3, 4, 5]),  # after every sparse step
        (4, "fused", [3, 4, 5]),  # three sparse steps, then the pending token makes four
        (4, "paper", [4, 5]),
        (None, "fused", []),
        (None, "paper", []),
    ],
)
def test_a_pass_is_due(interval, schedule, due):
    """Worked by hand, one number and a tensor of them; the limit is the first of them."""
    config = ReSAConfig(interval=interval, schedule=schedule)
    assert [w for w in range(6) if config.is_pass_due(w)] == due
    assert config.drift_limit == (due[0] if due else None)
    elementwise = torch.as_tensor(config.is_pass_due(torch.arange(6))).expand(6)
    assert elementwise.nonzero()[:, 0].tolist() == due


def passes(n_tokens, config, shape=SHAPE, prompt=PROMPT):
    """Each pass after the prefill: "s" for a sparse step, the number of its tokens for a dense one."""
    calls = []

    def note(name, n_queries):
        def call(query, *rest):
            calls.append(n_queries(query))
            return getattr(REFERENCE_OPS, name)(query, *rest)

        return call

    ops = replace(
        REFERENCE_OPS,
        sparse_attention=note("sparse_attention", lambda query: "s"),
        dense_attention=note("dense_attention", lambda query: str(query.shape[2])),
    )
    generate(shape.model(ops=ops), [prompt], n_tokens, config)
    per_layer = [calls[first :: shape.layers] for first in range(shape.layers)]
    assert all(layer == per_layer[0] for layer in per_layer)
    assert per_layer[0].pop(0) == str(len(prompt))
    return "".join(per_layer[0])


@pytest.mark.parametrize(
    ("changes", "n_tokens", "expected"),
    [
        ({}, 9, "ss3ss3ss"),
        ({"schedule": "paper"}, 9, "sss3sss3ss"),
        ({"schedule": "paper"}, 7, "sss3sss3"),  # the window that the last step fills is rectified
        ({"interval": 1}, 4, "111"),
        ({"interval": 1, "schedule": "paper"}, 4, "s1s1s1"),
        ({"interval": None}, 7, "ssssss"),
        ({"interval": None, "schedule": "paper"}, 7, "ssssss"),
        ({"interval": 6}, 7, "sssss6"),
        ({}, 2, "s"),
        ({}, 1, ""),
        ({}, 0, ""),
    ],
)
def test_each_schedule_runs_the_passes_it_says(changes, n_tokens, expected):
    assert passes(n_tokens, replace(SPARSE, **changes)) == expected


@pytest.mark.parametrize("schedule", ["fused", "paper"])
@pytest.mark.parametrize("dense_layers", [0, 1, 2, 3, 7])
def test_the_first_layers_may_attend_to_everything(schedule, dense_layers):
    """Like a step that selects every block there; with all layers so, sparse decoding is dense decoding."""
    shape, calls = replace(SHAPE, layers=3), []
    config, prompt = replace(SPARSE, schedule=schedule), PROMPT

    def select_blocks(scores, lengths, resa):
        is_dense = len(calls) % shape.layers < dense_layers
        calls.append(is_dense)
        return REFERENCE_OPS.select_blocks(scores, lengths, replace(resa, active_ratio=1.0 if is_dense else 0.1))

    model = shape.model()
    watched = model.with_ops(replace(REFERENCE_OPS, select_blocks=select_blocks))
    (expected,) = generate(watched, [prompt], 15, config)
    (done,) = generate(model, [prompt], 15, replace(config, dense_layers=dense_layers))
    assert done.tokens == expected.tokens
    assert drift(done.cache, expected.cache).max() <= EXACT
    assert_bounds_rebuilt(done.cache)
    dense = greedy_by_forward(model, prompt, 15)
    if dense_layers >= shape.layers:
        assert done.tokens == dense
    elif dense_layers == 0:
        assert done.tokens != dense, "nothing was left out: the test would see nothing"
