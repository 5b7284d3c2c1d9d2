"""The Triton path's own affairs: one state for a batch, masks that decide who takes part, reading back now and then.

That it decodes like the reference, prompt by prompt, is shown beside the reference's laws in the other files.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoders import COMPILED, REFERENCE, TRITON, assert_dense_before_the_window
from near_ties import agreement, near_tie
from resa import reference
from resa.reference import ReSAConfig, Sampling
from small_models import drift, relative
from strategies import DEVICE
from tolerances import assert_same_bits

pytestmark = pytest.mark.fast
fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
attention = pytest.importorskip("resa.fast.attention", reason="triton comes for Linux only")
operations = pytest.importorskip("resa.fast.operations", reason="triton comes for Linux only")

SMALL, SPARSE = TRITON.shape, TRITON.config
PROMPTS = TRITON.prompts()
INF = float("inf")


def batched_cache(model, prompts, capacity=128, block_size=8):
    """A prefilled cache of a batch, and the logits after each prompt."""
    cache = fast.BatchedCache.empty(
        model.config, len(prompts), capacity, block_size, dtype=torch.float32, device=DEVICE
    )
    return cache, fast.prefill(model, prompts, cache)


def loop_over(model, prompts, config, n_tokens=12):
    """A decode loop whose sequences have chosen their first token."""
    model = fast.accelerated(model)
    cache, logits = batched_cache(model, prompts)
    sampler = fast.Sampler(Sampling(), [None] * len(prompts), n_tokens, logits.device)
    loop = fast.DecodeLoop(model, cache, n_tokens, config, sampler, ())
    with torch.no_grad():
        loop.choose(logits, loop.running, cache.lengths, is_sparse=False)
    return loop


LOOP_STATE = ("tokens", "n_chosen", "pending", "n_drifted", "running")
CACHE_STATE = ("keys", "values", "bounds", "lengths")


def state_of(loop):
    """A copy of everything that a step may change."""
    own = {name: getattr(loop, name) for name in LOOP_STATE}
    return {
        name: tensor.clone() for name, tensor in (own | vars(loop.cache)).items() if isinstance(tensor, torch.Tensor)
    }


# --------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["fused", "paper"])
@pytest.mark.parametrize("interval", [1, 2, 3, 5, None])
def test_the_host_counts_the_rhythm_along(interval, schedule):
    """Against the rules of both schedules written out, for sequences that begin together."""
    config, n_drifted = ReSAConfig(interval=interval, schedule=schedule), 0
    for kinds in islice(fast.schedule(config), 20):
        is_full = interval is not None and n_drifted + 1 == interval
        is_fused = is_full and schedule == "fused"
        assert kinds == fast.StepKinds(sparse=not is_fused, fused=is_fused, rectify=is_full and not is_fused)
        n_drifted = 0 if is_full else n_drifted + 1


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_masks_decide_who_takes_part(schedule):
    """A sequence that has ended keeps every bit while the other goes on; when nobody runs, a step does nothing."""
    config, model = replace(SPARSE, schedule=schedule), TRITON.model()
    loop, alone = loop_over(model, PROMPTS, config), loop_over(model, PROMPTS[:1], config)
    steps = list(islice(fast.schedule(config), 6))
    with torch.no_grad():
        for step, kinds in enumerate(steps):
            if step == 2:  # its window is open
                loop.running[1] = False
                before = state_of(loop)
            loop.step(kinds)
            alone.step(kinds)
        after = state_of(loop)
        assert loop.n_drifted.tolist() == [0, 2]
        assert loop.n_chosen.tolist() == [7, 3]
        for name in LOOP_STATE:
            assert torch.equal(after[name][1], before[name][1]), name
        for name in CACHE_STATE:
            own = (1,) if name == "lengths" else (slice(None), 1)
            assert torch.equal(after[name][own], before[name][own]), name
        assert loop.tokens[0].tolist() == alone.tokens[0].tolist()
        one, other = (each.cache.sequence(0, int(each.cache.lengths[0])) for each in (loop, alone))
        _, allowed = TRITON.exact(model, (PROMPTS[0] + loop.tokens[0, :7].tolist())[:-1], 8)
        assert drift(one, other).max() <= 2 * allowed

        loop.running.zero_()
        idle = state_of(loop)
        for kinds in steps:
            loop.step(kinds)
    for name, tensor in state_of(loop).items():
        assert torch.equal(tensor, idle[name]), name


@pytest.mark.parametrize("interval", [4, 32, None])
def test_split_counters_suffice_for_the_widest_pass(interval):
    """One for each KV head, and for each tile of a rectification's window; a wide window has several tiles per head."""
    shape = replace(SMALL, group=16)
    loop = loop_over(TRITON.model(shape), shape.prompts((9, 3)), replace(SPARSE, interval=interval))
    tiles = attention.count_split_counters(loop.cache.keys[0], 16, interval or 1)
    assert len(loop.split_counters) >= max(tiles, 2)
    if interval == 32:
        assert tiles > 2, "the window was to have several tiles per KV head"
    assert not loop.split_counters.any()


def test_the_references_loop_runs_on_the_triton_operations():
    model = TRITON.model()
    expected = reference.generate(model, PROMPTS, 6, SPARSE)
    done = reference.generate(model.with_ops(operations.TRITON_OPS), PROMPTS, 6, SPARSE)
    for prompt, ours, theirs in zip(PROMPTS, done, expected, strict=True):
        assert (ours.tokens, ours.n_drifted) == (theirs.tokens, theirs.n_drifted)
        assert_dense_before_the_window(TRITON, model, (prompt + ours.tokens)[:-1], ours)


def test_bounds_in_eight_bits(monkeypatch):
    """Never the exact ones beside them while decoding; afterwards the exact ones again, and laws 2 and 6."""
    seen, begin = [], fast.DecodeLoop.__init__

    def watched(self, model, cache, *rest):
        seen.append(([each.codes.nbytes for each in cache.bounds], [keys.numel() for keys in cache.keys]))
        begin(self, model, cache, *rest)

    monkeypatch.setattr(fast.DecodeLoop, "__init__", watched)
    model, config = TRITON.model(), replace(SPARSE, interval=4, eight_bit_bounds=True)
    prompts = SMALL.prompts((40, 12))
    done = TRITON.generate(model, prompts, 10, config)
    for prompt, each in zip(prompts, done, strict=True):
        assert each.n_drifted == 1
        assert_dense_before_the_window(TRITON, model, (prompt + each.tokens)[:-1], each)
    ((codes, keys),) = seen
    assert codes == [size * 2 // config.block_size for size in keys], "one byte per bound, 2·D bounds per block"
    text = prompts[0] + done[0].tokens
    (again,) = TRITON.generate(model, [[7]], 2, config, resume=done[0])
    assert_dense_before_the_window(TRITON, model, [*text, 7, again.tokens[0]], again)


# --------------------------------------------------------------------------------------------------------------
# Reading back
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "every"), [(3, 6), (None, 4), (4, 4), (6, 6)])
def test_callbacks_come_a_few_intervals_at_a_time(monkeypatch, interval, every):
    """At multiples of the interval that are at least READ_BACK tokens apart, and at the end for the rest."""
    calls, told, launch = [], [], fast.DecodeLoop.launch

    def watched(self, kinds):
        told.append(len(calls))
        launch(self, kinds)

    monkeypatch.setattr(fast, "READ_BACK", 4)
    monkeypatch.setattr(fast.DecodeLoop, "launch", watched)
    config = replace(SPARSE, interval=interval)
    (done,) = TRITON.generate(TRITON.model(), PROMPTS[:1], 9, config, on_token=lambda *call: calls.append(call))
    # How many tokens the callback had been told when a step began that `chosen` tokens came before.
    assert told == [chosen // every * every for chosen in range(1, 9)]
    assert calls == [(0, len(PROMPTS[0]) + place, token) for place, token in enumerate(done.tokens)]


def test_decoding_stops_when_every_sequence_has_ended(monkeypatch):
    """At the next look; nothing of it shows in the result."""
    steps, launch = [], fast.DecodeLoop.launch

    def watched(self, kinds):
        steps.append(kinds)
        launch(self, kinds)

    monkeypatch.setattr(fast, "READ_BACK", 2)
    monkeypatch.setattr(fast.DecodeLoop, "launch", watched)
    model = TRITON.model()
    rows = [each.tokens for each in reference.generate(model, PROMPTS, 4, SPARSE)]
    stops = {rows[0][2], rows[1][1]}
    expected = reference.generate(model, PROMPTS, 400, SPARSE, stop_tokens=stops)
    done = TRITON.generate(model, PROMPTS, 400, SPARSE, stop_tokens=stops)
    assert len(steps) <= 3
    for ours, theirs in zip(done, expected, strict=True):
        assert (ours.tokens, ours.n_drifted, ours.cache.length) == (
            theirs.tokens,
            theirs.n_drifted,
            theirs.cache.length,
        )


# --------------------------------------------------------------------------------------------------------------
# Prefill, capacity
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "widths"), [(1, [1024, 76]), (8, [1024, 76]), (16, [512, 512, 76])])
def test_many_prompts_are_read_in_smaller_parts(monkeypatch, batch, widths):
    """A pass never holds more rows than a few prompts would."""
    model, read = TRITON.model(replace(SMALL, context=1200)), []

    def dense_pass(model, tokens, *rest):
        read.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, SMALL.hidden, device=tokens.device)

    monkeypatch.setattr(fast, "dense_pass", dense_pass)
    batched_cache(model, [[1] * 1100] * batch, capacity=1104)
    assert read == widths


@pytest.mark.parametrize(("chunk_size", "ends"), [(1, [1, 1]), (5, [1, 1]), (8, [2]), (1024, [2])])
def test_prefill_is_the_references_in_any_chunks(monkeypatch, chunk_size, ends):
    """Ragged, in two calls, one of whose prompts is empty: its sequence stays as it is, its logits are zero.

    Logits are taken where a prompt ends, and nowhere else.
    """
    model, rows = fast.accelerated(TRITON.model()), []
    texts, output = SMALL.prompts((19, 11)), model.output
    monkeypatch.setattr(model, "output", lambda x: rows.append(len(x)) or output(x))
    cache = fast.BatchedCache.empty(model.config, 2, 24, 8, dtype=torch.float32, device=DEVICE)
    fast.prefill(model, [texts[0][:10], texts[1]], cache, chunk_size=chunk_size)
    before = deepcopy(cache.sequence(1, 11))
    logits = fast.prefill(model, [texts[0][10:], []], cache, chunk_size=chunk_size)
    assert rows == [*ends, 1]
    assert cache.lengths.tolist() == [19, 11]
    for name in ("keys", "values", "bounds"):
        assert_same_bits(getattr(cache.sequence(1, 11), name), getattr(before, name), name)
    assert not logits[1].any()
    for s, text in enumerate(texts):
        done = reference.Generation([], cache.sequence(s, len(text)))
        assert_dense_before_the_window(TRITON, TRITON.model(), text, done)
    exact = REFERENCE.model(SMALL)(torch.tensor([texts[0]]))[0, -1]
    assert relative(logits[0], exact) <= 1e-5


def test_prefill_refuses_by_name():
    model = TRITON.model()
    cache = fast.BatchedCache.empty(model.config, 1, 8, 8, dtype=torch.float32, device=DEVICE)
    for chunk_size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"^chunk_size: got"):
            fast.prefill(model, [[1]], cache, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=r"^prompts: lengths in the cache: got 9"):
        fast.prefill(model, [[1] * 9], cache)
    with pytest.raises(ValueError, match=r"^prompts: got 2 lists; allowed: 1, one per sequence"):
        fast.prefill(model, [[1], [1]], cache)
    with pytest.raises(ValueError, match=r"^tokens: got 1 … 23; allowed: token ids 0 … 22"):
        fast.prefill(model, [[1, 23]], cache, chunk_size=1)
    assert cache.lengths.tolist() == [0]


@given(tokens=st.integers(0, 10**6), block_size=st.sampled_from([8, 16, 32, 64, 128]))
def test_capacity_is_padded_to_whole_rows_of_bounds(tokens, block_size):
    capacity = fast.padded_capacity(tokens, block_size)
    assert capacity % (16 * block_size) == 0
    assert tokens <= capacity < tokens + 16 * block_size


# --------------------------------------------------------------------------------------------------------------
# Models beyond the kernels
# --------------------------------------------------------------------------------------------------------------

REFUSED_MODELS = {
    "head_dim": (replace(SMALL, head_dim=24), torch.float32, DEVICE, r"head dimension D: got 24; allowed: 16, 32"),
    "tiny head_dim": (replace(SMALL, head_dim=8), torch.float32, DEVICE, r"head dimension D: got 8; allowed: 16, 32"),
    "group": (replace(SMALL, group=17), torch.float32, DEVICE, r"query heads per KV head: got 17; allowed: 1 … 16"),
    "float64": (SMALL, torch.float64, DEVICE, r"model: got torch.float64; allowed: "),
    "bfloat16": (SMALL, torch.bfloat16, "cpu", r"model: got (torch.bfloat16|device cpu); allowed: (float16|cuda)"),
    "elsewhere": (SMALL, torch.float32, "cpu" if COMPILED else "meta", r"model: got device (cpu|meta); allowed: "),
}


@pytest.mark.parametrize("what", [*REFUSED_MODELS, "block_size"])
def test_models_beyond_the_kernels_are_refused(monkeypatch, what):
    """Before any work."""
    if what == "block_size":
        shape, dtype, device, message = SMALL, torch.float32, DEVICE, r"block_size: got 4; allowed: 8, 16"
    else:
        shape, dtype, device, message = REFUSED_MODELS[what]
    model = shape.model(dtype).to(device)
    monkeypatch.setattr(fast, "open_cache", lambda *_: pytest.fail("work was started before the model was checked"))
    config = replace(SPARSE, block_size=4) if what == "block_size" else SPARSE
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="^" + message):
        TRITON.generate(model, PROMPTS, 3, config, Sampling(1.0))
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------------
# The judge
# --------------------------------------------------------------------------------------------------------------


def test_near_ties_are_told_from_clear_choices():
    """The judge of all comparisons excuses what rounding can decide, and nothing else."""
    model, prompt = TRITON.model(), PROMPTS[0]
    config = replace(SPARSE, interval=None)
    (done,) = reference.generate(model, [prompt], 8, config)
    tokens = done.tokens
    other = (tokens[-1] + 1) % SMALL.vocab
    assert near_tie(model, prompt, tokens[:-1], config, (tokens[-1], other)) > 10
    model.output.weight.data[other] = model.output.weight.data[tokens[-1]]  # their logits are equal now
    assert near_tie(model, prompt, tokens[:-1], config, (tokens[-1], other)) <= 1
    assert near_tie(model, prompt, tokens[:-1], config) > 10
    for layer in model.layers:
        layer.attn.k_proj.weight.data.zero_()  # all keys are equal: selection is all ties
    assert near_tie(model, prompt, tokens[:-1], config) <= 1
    assert near_tie(model, prompt, tokens[:-1], replace(config, active_ratio=1)) == INF
    dense = replace(config, interval=1)
    assert near_tie(model, prompt, tokens[:-1], dense) == INF
    assert near_tie(model, prompt, tokens[:-1], replace(dense, schedule="paper")) <= 1


def test_the_judge_condemns_a_token_that_rounding_did_not_choose():
    model, config = TRITON.model(), replace(SPARSE, interval=None)
    (done,) = reference.generate(model, PROMPTS[:1], 6, config)
    wrong = list(done.tokens)
    wrong[4] = (wrong[4] + 1) % SMALL.vocab
    assert agreement(model, PROMPTS[0], done.tokens, done.tokens, config) == 6
    with pytest.raises(AssertionError, match="they part at token 4"):
        agreement(model, PROMPTS[0], wrong, done.tokens, config)
