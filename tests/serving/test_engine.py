"""Inside vLLM every request gets the tokens that it gets from the reference alone."""

import collections
import copy
import gc
import random
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from unittest import mock

import pytest
import torch

from engines import (
    add,
    engine,
    engine_config,
    expected,
    keys_and_values,
    model_of,
    name_of,
    prompts_of,
    record_chunks,
    replayed,
    run,
    save_model,
    scheduler_of,
    tokens_of,
)
from resa.fast import TRITON_OPS
from resa.fast.vllm.options import check_layer, options_of
from resa.reference import prefill

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


def test_running_requests_share_exact_pages_alone(folder):
    """A prompt goes on like a request that is running. It finds the pages up to the last rectification, no others."""
    resa = SPARSE | {"interval": 32}
    (first,) = prompts_of((150,))
    answer = expected(folder, first, 80, resa)

    # At step s the first request has s tokens of its answer. Rectifications end at 182 in step 32, at 214 in step 64.
    steps = {"before": 21, "during": 32, "after": 33, "before the next": 61, "after the next": 65}
    ends = prompts_of([7] * len(steps), seed=2)
    requests = {name: (first + answer[:s] + end, 20) for (name, s), end in zip(steps.items(), ends, strict=True)}
    arrivals = {s: [(name, *requests[name])] for name, s in steps.items()}
    with engine(folder, resa) as vllm:
        outputs = run(vllm, {0: [("first", first, 80)]} | arrivals)
    found = {name: outputs[name].num_cached_tokens for name in steps}
    assert found == {"before": 144, "during": 176, "after": 176, "before the next": 176, "after the next": 208}
    assert tokens_of(outputs) == {"first": answer} | alone(folder, requests, resa)


@dataclass
class Seen:
    """A request after one of its steps: the chunk that was computed, and what the engine's pages hold."""

    step: int
    n_preemptions: int
    start: int
    end: int
    held: torch.Tensor


def run_and_look(vllm, requests):
    """Decode requests that come together → tokens, chunks, and a list of `Seen`, each by name."""
    chunks, seen = record_chunks(vllm), {name: [] for name in requests}

    def look(step):
        for request in scheduler_of(vllm).running:
            name = name_of(request.request_id)
            held = keys_and_values(vllm, request)
            seen[name].append(Seen(step, request.num_preemptions, *chunks[name][-1], held))

    found = tokens_of(run(vllm, {0: [(name, *request) for name, request in requests.items()]}, look))
    return found, chunks, seen


def check_drift(folder, text, n_prompt, seen, interval):
    """Compare with one dense prefill → (what was seen, number of tokens from the first that has drifted to the last).

    Law 6: a dense step leaves no drift. Law 7: tokens drift among the newest f − 1 alone. Rounding is measured: the
    engine may err by four times as much as the reference's own prefill errs in float32.
    """
    exact, rounded = (prefilled(folder, text, dtype) for dtype in (torch.float64, torch.float32))
    allowed = 4 * (rounded - exact).abs().max()
    for each in seen:
        assert each.held.shape[2] == each.end
        error = (each.held - exact[:, :, : each.end]).abs().amax(dim=(0, 1, 3))
        drifted = (error > allowed).nonzero()
        n_drifted = each.end - int(drifted[0]) if len(drifted) else 0
        is_dense = each.end - each.start > 1 or each.start < n_prompt
        assert n_drifted < (1 if is_dense else interval), f"drift {n_drifted} tokens before the end at {each.end}"
        yield each, n_drifted


def prefilled(folder, tokens, dtype):
    """Keys and values [layers, Hkv, T, 2·D] as one dense prefill of the reference writes them."""
    model = copy.deepcopy(model_of(folder)).to(dtype)
    cache = model.new_cache(len(tokens), 16)
    prefill(model, tokens, cache, chunk_size=len(tokens))
    layers = [torch.cat(both, dim=3)[0] for both in zip(cache.keys, cache.values, strict=True)]
    return torch.stack(layers)


@pytest.mark.parametrize("ratio", [1, 0.2])
def test_preempted_requests_are_computed_again(folder, ratio):
    """Too few pages for all. At a ratio of 1 tokens are those of requests alone; below it laws 6 and 7 hold."""
    resa = SPARSE | {"interval": 8, "active_ratio": ratio}
    requests = {f"r{i}": (prompt, 60) for i, prompt in enumerate(prompts_of((60, 70, 80, 90)))}
    with engine(folder, resa, num_gpu_blocks_override=24, max_model_len=256, max_num_batched_tokens=64) as vllm:
        found, chunks, seen = run_and_look(vllm, requests)
    if ratio == 1:
        assert found == alone(folder, requests, resa)

    n_rectified, n_drifted = 0, []  # after a preemption
    for name, (prompt, _) in requests.items():
        assert found[name] == replayed(folder, prompt, found[name], chunks[name], resa)
        for each, n in check_drift(folder, prompt + found[name], len(prompt), seen[name], 8):
            if each.n_preemptions:
                n_rectified += each.start >= len(prompt) and each.end - each.start > 1
                n_drifted.append(n)
    assert n_rectified > 5
    assert max(n_drifted) == (0 if ratio == 1 else 7)


def test_spreading_rectifies_early_never_late(folder):
    """Requests that begin together rectify at different steps: at most ceil(B / f) at once. Laws 6 and 7 hold."""
    resa = SPARSE | {"interval": 8, "spread": True}
    requests = {f"r{i}": (prompt, 40) for i, prompt in enumerate(prompts_of((150, 140, 130, 120, 110, 100)))}
    with engine(folder, resa) as vllm:
        found, chunks, seen = run_and_look(vllm, requests)
    n_each = collections.Counter()
    for name, (prompt, _) in requests.items():
        assert found[name] == replayed(folder, prompt, found[name], chunks[name], resa)
        for each, _ in check_drift(folder, prompt + found[name], len(prompt), seen[name], 8):
            n_each[each.step] += each.start >= len(prompt) and each.end - each.start > 1
    assert found != alone(folder, requests, resa)  # which rectify at other steps
    assert max(n_each.values()) == 1
    assert n_each.total() >= 6 * (40 // 8 - 1)


@pytest.mark.parametrize("ratio", [1, 0.2])
def test_a_thousand_requests_on_few_pages(folder, ratio):
    """Short requests with cancellations: no page lost, no text wrong, nothing left behind. The two are 2,000.

    Below a ratio of 1 a preempted request is computed again, and its text need not be that of a request alone.
    """
    n, resa = 1000, SPARSE | {"interval": 4, "active_ratio": ratio, "block_size": 8}
    chance = random.Random(0)
    prompts = prompts_of([chance.randint(1, 60) for _ in range(40)])
    distinct = [(prompt, chance.randint(1, 16)) for prompt in prompts]
    wanted = [expected(folder, *request, resa) for request in distinct]
    chosen, finished, aborted, left = {}, {}, set(), []
    settings = {"block_size": 8, "num_gpu_blocks_override": 28, "max_model_len": 128, "max_num_batched_tokens": 64}
    with engine(folder, resa, **settings) as vllm:
        scheduler = scheduler_of(vllm)
        pool = scheduler.kv_cache_manager.block_pool
        preempt = mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request).start()
        preempted = set()
        for until in range(n // 4, n + 1, n // 4):
            while len(chosen) < until or vllm.has_unfinished_requests():
                while len(chosen) < until and len(scheduler.requests) < 12:
                    name = f"{len(chosen)}"
                    chosen[name] = chance.randrange(len(distinct))
                    add(vllm, name, *distinct[chosen[name]])
                running = sorted(chosen.keys() - finished.keys() - aborted)
                if running and chance.random() < 0.03:
                    aborted.add(name := chance.choice(running))
                    vllm.abort_request([name])
                ended = tokens_of({output.request_id: output for output in vllm.step()})
                finished |= {name: tuple(tokens) for name, tokens in ended.items()}

            # Now and then all have ended: what is alive then must not grow.
            preempted |= {name_of(call.args[0].request_id) for call in preempt.call_args_list}
            preempt.reset_mock()
            assert not scheduler.requests
            assert not scheduler.exact
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null page
            left.append(alive())
    assert len(finished) + len(aborted) == n
    assert preempted
    for name, tokens in finished.items():
        if ratio == 1 or name not in preempted:
            assert list(tokens) == wanted[chosen[name]], name

    # Memory is flat, once the allocators are warm.
    (objects, tensors, size), last = left[1], left[-1]
    assert last[0] < objects + n // 20
    assert last[1] == tensors
    assert last[2] < size + 5, left


def alive():
    """Number of objects that the collector watches, of tensors among them, and the process's memory in MB."""
    gc.collect()
    objects = gc.get_objects()
    n_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(objects), sum(isinstance(each, torch.Tensor) for each in objects), n_pages * 4096 / 1e6


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
        ({}, {"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
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


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("scheduler_config.async_scheduling", True, "async_scheduling"),
        ("kv_transfer_config", object(), "kv_transfer_config"),
        ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size"),
        ("device_config.device_type", "cuda", "device"),
        ("model_config.hf_text_config.attention_chunk_size", 8192, "attention_chunk_size"),
    ],
)
def test_what_an_engine_cannot_be_made_with_here_is_refused_too(folder, path, value, named):
    config = engine_config(folder, {})
    *owners, name = path.split(".")
    object.__setattr__(reduce(getattr, owners, config), name, value)
    with pytest.raises(ValueError, match=named):
        options_of(config)


def test_attention_of_other_kinds_is_refused():
    plain = {"scale": 0.25, "head_size": 16, "alibi": None, "window": None, "cap": None, "sinks": None,
             "kind": "decoder", "shared": None}  # fmt: skip
    check_layer(**plain)
    other = {"scale": 0.3, "alibi": [0.5], "window": 64, "cap": 30.0, "sinks": torch.zeros(2), "kind": "encoder",
             "shared": "layers.0"}  # fmt: skip
    for name, value in other.items():
        with pytest.raises(ValueError, match="which ReSA does not have"):
            check_layer(**plain | {name: value})


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
    requests = {f"r{i}": (prompt, 7) for i, prompt in enumerate(prompts_of((60, 33)))}
    score = "score_blocks" if selection == "bounds" else "score_sketch"
    names = score, "select_blocks", "sparse_attention", "dense_attention"
    watched = {name: mock.Mock(wraps=getattr(TRITON_OPS, name)) for name in names}
    ops = replace(TRITON_OPS, **watched)
    with mock.patch("resa.fast.vllm.attention.REFERENCE_OPS", ops), engine(folder, resa) as vllm:
        assert tokens_of(run(vllm, {0: [(n, *r) for n, r in requests.items()]})) == alone(folder, requests, resa)
    assert all(each.called for each in watched.values())
