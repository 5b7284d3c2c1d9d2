"""Inside vLLM every request gets the tokens that it gets from the reference alone."""

import itertools
import random
from unittest import mock

import pytest

from engines import add, engine, engine_config, expected, prompts_of, run, save_model, scheduler_of, tokens_of
from resa.fast import TRITON_OPS
from resa.fast.vllm.options import options_of

SPARSE = {"active_ratio": 0.2, "min_blocks": 2}
LENGTHS = (150, 33, 300, 64, 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def alone(folder, requests, resa):
    """Decode each request by the reference alone: (prompt, number of tokens) by name → tokens by name."""
    return {name: expected(folder, prompt, n, resa) for name, (prompt, n) in requests.items()}


@pytest.mark.parametrize(
    ("page_size", "interval", "selection"),
    [
        (16, None, "bounds"),
        (64, None, "sketch"),
        (16, 1, "bounds"),
        (64, 2, "bounds"),
        (16, 2, "sketch"),
        (16, 8, "bounds"),
        (64, 8, "sketch"),
        (64, 32, "bounds"),
        (16, 32, "sketch"),
    ],
)
def test_tokens_are_the_references(folder, page_size, interval, selection):
    """Ragged requests that come at different steps, prompts longer than a step's budget."""
    resa = SPARSE | {"interval": interval, "selection": selection}
    requests = {f"r{i}": (prompt, 50 + i) for i, prompt in enumerate(prompts_of(LENGTHS))}
    arrivals = {3 * i: [(name, *request)] for i, (name, request) in enumerate(requests.items())}
    with engine(folder, resa, block_size=page_size, max_num_batched_tokens=128) as vllm:
        assert tokens_of(run(vllm, arrivals)) == alone(folder, requests, resa)


def test_turns_reuse_exact_pages_alone(folder):
    """A second turn finds the pages of the first in the prefix cache, up to the last exact one."""
    resa = SPARSE | {"interval": 8}
    (first,), (second,) = prompts_of((150,)), prompts_of((20,), seed=2)
    with engine(folder, resa) as vllm:
        answer = tokens_of(run(vllm, {0: [("first", first, 45)]}))["first"]
        assert answer == expected(folder, first, 45, resa)

        # 150 + 44 tokens are cached. Rectifications end at 150 + 8·k − 1, and pages at 16·k.
        again = first + answer + second
        requests = {"second": (again, 20), "same": (again, 20), "half": (first[:100] + second, 20)}
        n_found = {}
        for name, request in requests.items():
            outputs = run(vllm, {0: [(name, *request)]})
            assert tokens_of(outputs)[name] == expected(folder, *request, resa)
            n_found[name] = outputs[name].num_cached_tokens
    assert n_found == {"second": 176, "same": 208, "half": 96}


def test_a_request_that_ends_inside_a_window_leaves_nothing(folder):
    """Aborted or stopped by a token in the middle of a window, whose pages others then reuse."""
    resa = SPARSE | {"interval": 32}
    prompts = prompts_of((150, 90, 120, 150))
    with engine(folder, resa, num_gpu_blocks_override=48, max_model_len=256) as vllm:
        wanted = expected(folder, prompts[0], 60, resa)
        add(vllm, "stopped", prompts[0], 60, stop_token_ids=[wanted[13]])
        add(vllm, "aborted", prompts[1], 60)
        (stopped,) = (output for _ in range(20) for output in vllm.step())
        assert tokens_of({"": stopped})[""] == wanted[: wanted.index(wanted[13]) + 1]
        vllm.abort_request(["aborted"])
        assert not scheduler_of(vllm).exact

        requests = {f"r{i}": (prompt, 40) for i, prompt in enumerate(prompts)}
        found = tokens_of(run(vllm, {0: [(name, *request) for name, request in requests.items()]}))
    assert found == alone(folder, requests, resa)


@pytest.mark.parametrize("ratio", [1, 0.2])
def test_preempted_requests_are_computed_again(folder, ratio):
    """Too few pages for all: at a ratio of 1 tokens are the same; below it, laws hold (test_scheduler)."""
    resa = SPARSE | {"interval": 8, "active_ratio": ratio}
    requests = {f"r{i}": (prompt, 100) for i, prompt in enumerate(prompts_of((60, 70, 80, 90)))}
    with engine(folder, resa, num_gpu_blocks_override=26, max_model_len=256) as vllm:
        with mock.patch.object(scheduler_of(vllm), "_preempt_request", wraps=scheduler_of(vllm)._preempt_request) as it:
            found = tokens_of(run(vllm, {0: [(name, *request) for name, request in requests.items()]}))
        assert it.call_count > 0
    wanted = alone(folder, requests, resa)
    if ratio == 1:
        assert found == wanted
    assert [len(tokens) for tokens in found.values()] == [100] * 4
    assert found["r0"] == wanted["r0"]  # the first to come is never preempted


def test_spreading_rectifies_early_never_late(folder):
    """Requests that begin together rectify at different steps: at most ceil(B / f) at once."""
    resa = SPARSE | {"interval": 8, "spread": True}
    prompts = prompts_of((150, 140, 130, 120, 110, 100))
    per_step = []
    with engine(folder, resa) as vllm:
        counts = scheduler_of(vllm).counts
        names = [(f"r{i}", prompt, 60) for i, prompt in enumerate(prompts)]
        run(vllm, {0: names}, lambda step: per_step.append(counts["resa:rectifications"]))
    each = [after - before for before, after in itertools.pairwise(per_step)]
    assert max(each) == 1
    assert sum(each) >= 6 * (60 // 8 - 1)


@pytest.mark.parametrize("ratio", [1, 0.2])
def test_a_thousand_requests_on_few_pages(folder, ratio):
    """Short requests with cancellations: no page lost, none wrong, nothing left behind."""
    resa = SPARSE | {"interval": 8, "active_ratio": ratio}
    chance = random.Random(0)
    distinct = [(prompt, chance.randint(1, 30)) for prompt in prompts_of([chance.randint(1, 120) for _ in range(60)])]
    wanted = [expected(folder, *request, resa) for request in distinct]
    chosen, finished, aborted = {}, {}, set()
    with engine(folder, resa, num_gpu_blocks_override=28, max_model_len=256, max_num_batched_tokens=64) as vllm:
        scheduler = scheduler_of(vllm)
        pool = scheduler.kv_cache_manager.block_pool
        watched = mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request)
        preempt = watched.start()
        while len(chosen) < 1000 or vllm.has_unfinished_requests():
            while len(chosen) < 1000 and len(scheduler.requests) < 12:
                name = f"{len(chosen)}"
                chosen[name] = chance.randrange(len(distinct))
                add(vllm, name, *distinct[chosen[name]])
            running = sorted(chosen.keys() - finished.keys() - aborted)
            if running and chance.random() < 0.02:
                aborted.add(name := chance.choice(running))
                vllm.abort_request([name])
            finished |= {output.request_id: output for output in vllm.step()}
        assert not scheduler.exact
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        preempted = {call.args[0].request_id.partition("-")[0] for call in preempt.call_args_list}
    assert len(finished) + len(aborted) == 1000
    assert preempted
    for name, tokens in tokens_of(finished).items():
        if ratio == 1 or name not in preempted:
            assert tokens == wanted[chosen[name]], name


@pytest.mark.parametrize(
    ("resa", "settings", "named"),
    [
        ({"schedule": "paper"}, {}, "schedule"),
        ({"eight_bit_bounds": True}, {}, "eight_bit_bounds"),
        ({"dense_layers": 1}, {}, "dense_layers"),
        ({"intervall": 8}, {}, "intervall"),
        ({"spread": 1}, {}, "spread"),
        ({"block_size": 24}, {}, "block_size"),
        ({}, {"scheduler_cls": None}, "scheduler_cls"),
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({}, {"max_num_batched_tokens": 32}, "max_num_batched_tokens"),
        ({}, {"long_prefill_token_threshold": 8}, "long_prefill_token_threshold"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({}, {"tensor_parallel_size": 4}, "tensor_parallel_size"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
    ],
)
def test_what_is_not_served_is_refused_by_name(folder, resa, settings, named):
    config = engine_config(folder, resa, **settings)
    with pytest.raises((ValueError, TypeError), match=named):
        options_of(config)


def test_without_options_the_engine_is_itself(folder):
    """The backend is installed, and asked for nothing."""
    (prompt,) = prompts_of((40,))
    plain = {"scheduler_cls": None, "additional_config": {}, "block_size": 32}
    with engine(folder, {}, **plain) as vllm:
        found = tokens_of(run(vllm, {0: [("r", prompt, 10)]}))["r"]
    assert found == expected(folder, prompt, 10, {"interval": 1})


@pytest.mark.parametrize("selection", ["bounds", "sketch"])
def test_the_kernels_interpreted(folder, selection):
    """Attention by the Triton operations gives the same tokens."""
    resa = SPARSE | {"interval": 4, "selection": selection}
    requests = {f"r{i}": (prompt, 12) for i, prompt in enumerate(prompts_of((70, 33)))}
    with mock.patch("resa.fast.vllm.attention.REFERENCE_OPS", TRITON_OPS), engine(folder, resa) as vllm:
        assert tokens_of(run(vllm, {0: [(n, *r) for n, r in requests.items()]})) == alone(folder, requests, resa)
