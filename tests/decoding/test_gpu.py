"""Decoding as only a GPU shows it: a trained model over a thousand tokens, CUDA graphs, traffic, memory.

The shipped checkpoint continues sources of the standard library, greedily, in float32, in one ragged batch. Everything
else runs on a small random model.
"""

import argparse
import gc
import shlex
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decoders import TRITON, TritonDecoder, assert_dense_before_the_window
from near_ties import agreement
from resa import reference
from resa.reference import ReSAConfig, Sampling, load_model, load_tokenizer
from small_models import Shape, assert_untouched
from strategies import DEVICE, NAN

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(
        DEVICE != "cuda", reason="compiled kernels only: set RESA_TEST_DEVICE=cuda where there is a GPU"
    ),
]
fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")

N_TOKENS = 1000
SOURCES = ((argparse, 2000), (textwrap, 1300), (shlex, 700))  # modules, and how many tokens of each are the prompt
SMALL = Shape(seed=36, head_dim=16, hidden=32, context=1024, tied=False)
PROMPTS = SMALL.prompts((70, 20))
SPARSE = ReSAConfig(block_size=8, min_blocks=2, interval=8)


class LongTexts(TritonDecoder):
    """Prefills of thousands of tokens are compared in large chunks alone."""

    chunks = (200, 1024)


@pytest.fixture(scope="module")
def trained():
    return load_model(device=DEVICE)


@pytest.fixture(scope="module")
def sources():
    tokenizer = load_tokenizer()
    texts = [(Path(module.__file__).read_text(), length) for module, length in SOURCES]
    prompts = [tokenizer.encode_ordinary(text)[:length] for text, length in texts]
    assert [len(prompt) for prompt in prompts] == [length for _, length in SOURCES]
    return prompts


@pytest.fixture(scope="module")
def small():
    return SMALL.model(torch.float32).to(DEVICE)


# --- Accuracy ---


@pytest.mark.parametrize("interval", [8, 32, None])
def test_the_shipped_model_says_what_it_says_in_the_reference(trained, sources, interval):
    """A thousand tokens each; the cache is that of dense prefill up to the open window."""
    config, agreed = ReSAConfig(interval=interval), []
    done = fast.generate(trained, sources, N_TOKENS, config)
    expected = reference.generate(trained, sources, N_TOKENS, config)
    for prompt, ours, theirs in zip(sources, done, expected, strict=True):
        assert_dense_before_the_window(LongTexts(), trained, (prompt + ours.tokens)[:-1], ours)
        assert ours.n_drifted == ((N_TOKENS - 1) % interval if interval else N_TOKENS - 1)
        agreed.append(agreement(trained, prompt, ours.tokens, theirs.tokens, config))
    # On a CPU the reference in float32 and in float64 say the same throughout, at each of these intervals.
    assert agreed.count(N_TOKENS) >= len(sources) - 1, f"near ties are too many to be chance: same until {agreed}"


@pytest.mark.parametrize("schedule", ["fused", "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rectification_is_exact_in_half_precision(dtype, schedule):
    shape, config = replace(SMALL, seed=61, qk_norm=True), replace(SPARSE, interval=8, schedule=schedule)
    model, prompts = shape.model(dtype).to(DEVICE), shape.prompts((70, 9))
    for prompt, done in zip(prompts, TRITON.generate(model, prompts, 8 * 8 + 1, config), strict=True):
        assert done.n_drifted == 0
        assert_dense_before_the_window(TRITON, model, (prompt + done.tokens)[:-1], done)


# --- Traffic between device and host ---

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def traffic(model, n_tokens, config, **options):
    """Counts of one generation: runs of each kernel, copies to the host, and waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        done = fast.generate(model, PROMPTS, n_tokens, config, **options)
        torch.cuda.synchronize()
    assert [len(each.tokens) for each in done] == [n_tokens] * len(PROMPTS)
    counts = Counter()
    for event in trace.key_averages():
        counts[event.key] += event.count
    copies = sum(count for name, count in counts.items() if name.startswith("Memcpy DtoH"))
    return counts, copies, sum(counts[name] for name in WAITS)


def unsaid(model, config):
    """A stop token that is never chosen."""
    said = set().union(*(done.tokens for done in fast.generate(model, PROMPTS, 300, config)))
    return max(set(range(SMALL.vocab)) - said)


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_nothing_is_read_back_per_token(small, schedule):
    """Without callback and stop tokens: as many copies to the host, and waits, for 260 tokens as for 68."""
    config = replace(SPARSE, schedule=schedule)
    traffic(small, 68, config)  # compiles what there is to compile, and starts the profiler up
    few, few_copies, few_waits = traffic(small, 68, config)
    many, many_copies, many_waits = traffic(small, 260, config)
    sparse_steps = {n: n - 1 - (n - 1) // 8 if schedule == "fused" else n - 1 for n in (68, 260)}
    for counts, n in ((few, 68), (many, 260)):
        launched = counts["_sparse_kernel"]
        assert launched == SMALL.layers * sparse_steps[n], "the trace does not show what ran: it proves nothing"
    assert few_copies >= 1, "the trace shows no copy at all, although the tokens came home"
    assert many_copies == few_copies
    assert many_waits == few_waits


@pytest.mark.parametrize("interval", [8, None])
def test_callbacks_and_stop_tokens_read_back_once_in_a_while(small, interval):
    """Three small copies and a wait or two for every READ_BACK tokens, a multiple of the interval."""
    config, calls = replace(SPARSE, interval=interval), []
    options = {"on_token": lambda *call: calls.append(call), "stop_tokens": [unsaid(small, config)]}
    assert fast.READ_BACK == 32
    traffic(small, 68, config, **options)
    _, few_copies, few_waits = traffic(small, 68, config, **options)
    _, many_copies, many_waits = traffic(small, 260, config, **options)
    looks = (260 - 68) // fast.READ_BACK
    assert 1 <= many_copies - few_copies <= 3 * looks
    assert many_waits - few_waits <= 2 * looks
    assert len(calls) == len(PROMPTS) * (68 + 68 + 260)


# --- Memory ---


def spoil_free_memory():
    """Fill with NaN what the allocator holds and has lent to nobody; returns how many bytes that was.

    Graphs have memory of their own, which is left out. So are small rests of large segments, which nobody could ask
    for: requests of up to a mebibyte are served from small segments.
    """
    torch.cuda.synchronize()
    free = [
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
        for block in segment["blocks"]
        if block["state"] == "inactive" and (segment["segment_type"] == "small" or block["size"] > 2**20)
    ]
    held = [torch.full((size // 4,), NAN, device=DEVICE) for size in sorted(free, reverse=True)]
    torch.cuda.synchronize()
    return sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("eight_bit_bounds", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 0.9)], ids=str)
@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_graphs_read_no_memory_that_was_freed(small, schedule, sampling, eight_bit_bounds):
    """Whatever free memory holds, before a generation and between its replays, the result keeps every bit."""
    config = replace(SPARSE, schedule=schedule, eight_bit_bounds=eight_bit_bounds)

    def run(on_token=None):
        own = [torch.Generator().manual_seed(s) for s in range(len(PROMPTS))]
        return fast.generate(small, PROMPTS, 200, config, sampling, generators=own, on_token=on_token)

    plain, spoilt = run(), []
    spoil_free_memory()
    again = run()

    def spoil(sequence, position, token):
        if sequence == 0 and position % 16 == 0:
            spoilt.append(spoil_free_memory())

    between = run(spoil)
    assert sum(spoilt) > 0, "there was no free memory to spoil"
    for other in (again, between):
        for one, expected in zip(other, plain, strict=True):
            assert (one.tokens, one.n_drifted) == (expected.tokens, expected.n_drifted)
            assert_untouched(one.cache, expected.cache)


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_an_append_beside_the_scoring_changes_no_bit(small, monkeypatch, schedule):
    """Many sequences append on a stream of their own, few in one kernel with the scoring."""
    config = replace(SPARSE, schedule=schedule)
    few = fast.generate(small, PROMPTS, 100, config)
    monkeypatch.setattr(fast, "MANY_ROWS", 1)
    for one, other in zip(fast.generate(small, PROMPTS, 100, config), few, strict=True):
        assert (one.tokens, one.n_drifted) == (other.tokens, other.n_drifted)
        assert_untouched(one.cache, other.cache)


@pytest.mark.parametrize(("interval", "schedule"), [(8, "fused"), (8, "paper"), (None, "fused")])
def test_memory_does_not_grow_with_tokens(small, interval, schedule):
    """From token 40 to token 400 not a byte; and once a generation is dropped, nothing of it is left."""
    config, held = replace(SPARSE, interval=interval, schedule=schedule), {}

    def watch(sequence, position, token):
        held[position - len(PROMPTS[sequence])] = torch.cuda.memory_allocated()

    def memory():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    fast.generate(small, PROMPTS, 440, config, on_token=watch)  # libraries take their workspaces
    before = memory()
    done = fast.generate(small, PROMPTS, 440, config, on_token=watch)
    assert held[400] <= held[40]
    caches = sum(getattr(each.cache, name).nbytes for each in done for name in ("keys", "values", "bounds"))
    assert memory() - before <= caches + 4096, "more is held than the caches"
    del done
    assert memory() <= before
