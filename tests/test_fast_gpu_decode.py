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
from fast_decoding import assert_dense_before_the_window, cached_texts
from near_ties import assert_same_choices
from small_models import Shape, assert_untouched
from strategies import DEVICE, NAN

from resa import reference
from resa.reference import ReSAConfig, load_model, load_tokenizer

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(
        DEVICE != "cuda", reason="compiled kernels only: set RESA_TEST_DEVICE=cuda where there is a GPU"
    ),
]
fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")

N_TOKENS = 1000
SOURCES = ((argparse, 2000), (textwrap, 1300), (shlex, 700))  # modules, and how many tokens of each are the prompt
CHUNKS = (200, 1024)  # of the prefills that the trained model's caches are compared with
SMALL = Shape(seed=36, head_dim=16, hidden=32, context=1024, tied=False)
PROMPTS = SMALL.prompts((70, 20))
SPARSE = ReSAConfig(block_size=8, min_blocks=2, interval=8)


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


# --------------------------------------------------------------------------------------------------------------
# A trained model
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [8, 32, None])
def test_the_shipped_model_says_what_the_reference_has_it_say(trained, sources, interval):
    """A thousand tokens each; the cache is that of dense prefill up to the open window."""
    config = ReSAConfig(interval=interval)
    done = fast.generate(trained, sources, N_TOKENS, config)
    assert_dense_before_the_window(trained, done, cached_texts(sources, done), CHUNKS)
    w = (N_TOKENS - 1) % interval if interval else N_TOKENS - 1
    assert done.window.tolist() == [w] * len(sources)
    expected = reference.generate(trained, sources, N_TOKENS, config)
    agreed = assert_same_choices(trained, sources, done.tokens, expected.tokens, config)
    # On a CPU the reference in float32 and in float64 say the same throughout, at each of these intervals.
    assert agreed.count(N_TOKENS) >= len(sources) - 1, f"near ties are too many to be chance: same until {agreed}"


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_the_shipped_model_with_bounds_in_eight_bits(trained, sources, schedule):
    """Other blocks, perhaps other tokens, and a cache as exact as with the exact bounds."""
    config = ReSAConfig(schedule=schedule, min_blocks=4)
    done = fast.generate(trained, sources, 161, config, eight_bit_bounds=True)
    assert done.window.tolist() == [0, 0, 0]
    assert_dense_before_the_window(trained, done, cached_texts(sources, done), CHUNKS)


# --------------------------------------------------------------------------------------------------------------
# Traffic between device and host
# --------------------------------------------------------------------------------------------------------------

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def traffic(model, n_tokens, config, **options):
    """Of one generation: how often each kernel ran, copies to the host, and waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        done = fast.generate(model, PROMPTS, n_tokens, config, **options)
        torch.cuda.synchronize()
    assert [len(tokens) for tokens in done.tokens] == [n_tokens] * len(PROMPTS)
    counts = Counter()
    for event in trace.key_averages():
        counts[event.key] += event.count
    copies = sum(count for name, count in counts.items() if name.startswith("Memcpy DtoH"))
    return counts, copies, sum(counts[name] for name in WAITS)


def unsaid(model, config):
    """A stop token that is never chosen."""
    said = set().union(*fast.generate(model, PROMPTS, 300, config).tokens)
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


# --------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("options", [{}, {"eight_bit_bounds": True}, {"temperature": 0.9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_graphs_read_no_memory_that_was_freed(small, schedule, options):
    """Whatever free memory holds, before a generation and between its replays, the result keeps every bit."""
    config = replace(SPARSE, schedule=schedule, dense_below=40)

    def run(on_token=None):
        own = [torch.Generator().manual_seed(s) for s in range(len(PROMPTS))]
        return fast.generate(small, PROMPTS, 200, config, generator=own, on_token=on_token, **options)

    plain, spoilt = run(), []
    spoil_free_memory()
    again = run()

    def spoil(sequence, position, token):
        if sequence == 0 and position % 16 == 0:
            spoilt.append(spoil_free_memory())

    between = run(spoil)
    assert sum(spoilt) > 0, "there was no free memory to spoil"
    for other in (again, between):
        assert other.tokens == plain.tokens
        assert other.window.tolist() == plain.window.tolist()
        assert_untouched(other.cache, plain.cache, range(len(PROMPTS)))


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
    caches = sum(getattr(done.cache, name).nbytes for name in ("keys", "values", "bounds", "lengths"))
    assert memory() - before <= caches + 4096, "more is held than the cache, the windows and the pending tokens"
    del done
    assert memory() <= before


@pytest.mark.parametrize(("eight_bit_bounds", "share"), [(False, 16), (True, 32)])
def test_bounds_take_a_small_part_of_the_cache(monkeypatch, eight_bit_bounds, share):
    """At block size 16, in half precision: 1/16 of keys and values, 1/32 in 8 bits; never both at once."""
    sizes, begin = [], fast.DecodeLoop.__init__

    def watched(self, model, cache, bounds, *rest):
        begin(self, model, cache, bounds, *rest)
        tables = [each.codes if eight_bit_bounds else each for each in bounds]
        scales = [each.scale.nbytes for each in bounds] if eight_bit_bounds else [0]
        exact = cache.bounds.nbytes if eight_bit_bounds else 0
        sizes.append((cache.keys.nbytes + cache.values.nbytes, sum(each.nbytes for each in tables), sum(scales), exact))

    monkeypatch.setattr(fast.DecodeLoop, "__init__", watched)
    model = replace(SMALL, context=4096).model(torch.bfloat16).to(DEVICE)
    prompts = SMALL.prompts((4000, 17))
    done = fast.generate(model, prompts, 20, ReSAConfig(), eight_bit_bounds=eight_bit_bounds)
    ((cached, tables, scales, exact),) = sizes
    assert share * tables <= cached
    assert 1000 * scales <= cached
    assert exact == 0
    assert 16 * done.cache.bounds.nbytes <= cached
