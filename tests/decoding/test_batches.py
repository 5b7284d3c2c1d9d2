"""The Triton path's own affairs: bounds in 8 bits, reading back now and then, prefill of a batch, models refused.

That it decodes like the reference, prompt by prompt, is shown beside the reference's laws in the other files.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from decoders import COMPILED, REFERENCE, TRITON, assert_dense_before_the_window
from near_ties import agreement, near_tie
from resa import reference
from resa.reference import Sampling
from small_models import relative
from strategies import DEVICE
from tolerances import assert_same_bits

pytestmark = pytest.mark.fast
fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
operations = pytest.importorskip("resa.fast.operations", reason="triton comes for Linux only")

SMALL, SPARSE = TRITON.shape, TRITON.config
PROMPTS = TRITON.prompts()


# --- Steps ---


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


@pytest.mark.parametrize(
    ("bits", "schedule", "interval", "dense_layers"), [(2, "fused", 3, 0), (1, "paper", 4, 1), (2, "fused", None, 0)]
)
def test_sketches_decode_like_the_references(bits, schedule, interval, dense_layers):
    """A batch of unequal lengths, then another turn of its first sequence, which has a cache of its own."""
    how = {"schedule": schedule, "interval": interval, "dense_layers": dense_layers}
    model, config = TRITON.model(), replace(SPARSE, selection="sketch", sketch_bits=bits, **how)
    prompts = SMALL.prompts((40, 12))
    expected = reference.generate(model, prompts, 8, config)
    done = TRITON.generate(model, prompts, 8, config)
    for prompt, ours, theirs in zip(prompts, done, expected, strict=True):
        assert ours.cache.bounds is None
        assert ours.n_drifted == theirs.n_drifted
        agreement(model, prompt, ours.tokens, theirs.tokens, config)
        assert_dense_before_the_window(TRITON, model, (prompt + ours.tokens)[:-1], ours)
    text = prompts[0] + done[0].tokens
    for selection in ("sketch", "bounds"):
        own = replace(config, selection=selection)
        (again,) = TRITON.generate(model, [[7]], 2, own, resume=done[0])
        assert (again.cache.bounds is None) == (selection == "sketch")
        assert_dense_before_the_window(TRITON, model, [*text, 7, again.tokens[0]], again)


def test_a_rectification_whose_window_has_several_tiles_per_head():
    """3 tokens of 16 heads are 48 rows of queries, more than a tile holds; the steps between them need but one."""
    model, config = TRITON.model(replace(SMALL, group=16)), replace(SPARSE, interval=3)
    (done,) = TRITON.generate(model, PROMPTS[:1], 5, config)
    assert_dense_before_the_window(TRITON, model, (PROMPTS[0] + done.tokens)[:-1], done)


# --- Reading back ---


@pytest.mark.parametrize(("interval", "every"), [(3, 6), (None, 4), (4, 4), (6, 6)])
def test_callbacks_come_a_few_intervals_at_a_time(monkeypatch, interval, every):
    """At multiples of the interval that are at least READ_BACK tokens apart, and at the end for the rest."""
    calls, told, launch = [], [], fast.DecodeLoop.launch

    def watched(self, rectifies):
        told.append(len(calls))
        launch(self, rectifies)

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

    def watched(self, rectifies):
        steps.append(rectifies)
        launch(self, rectifies)

    monkeypatch.setattr(fast, "READ_BACK", 2)
    monkeypatch.setattr(fast.DecodeLoop, "launch", watched)
    model = TRITON.model()
    rows = [each.tokens for each in reference.generate(model, PROMPTS, 4, SPARSE)]
    stops = {rows[0][2], rows[1][1]}
    expected = reference.generate(model, PROMPTS, 400, SPARSE, stop_tokens=stops)
    done = TRITON.generate(model, PROMPTS, 400, SPARSE, stop_tokens=stops)
    assert len(steps) <= 3
    for ours, theirs in zip(done, expected, strict=True):
        assert (ours.tokens, ours.n_drifted) == (theirs.tokens, theirs.n_drifted)
        assert ours.cache.length == theirs.cache.length


# --- Prefill ---


def empty_cache(model, batch, capacity):
    return fast.BatchedCache.empty(model.config, batch, capacity, 8, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize(("batch", "widths"), [(1, [1120]), (8, [1024, 96]), (16, [512, 512, 96])])
def test_many_prompts_are_read_in_smaller_parts(monkeypatch, batch, widths):
    """A pass never holds more rows than a few prompts would. The last is padded to a multiple of 32 tokens."""
    model, read = TRITON.model(replace(SMALL, context=1200)), []

    def dense_pass(model, tokens, *rest):
        read.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, SMALL.hidden, device=tokens.device)

    monkeypatch.setattr(fast, "dense_pass", dense_pass)
    fast.prefill(model, [[1] * 1100] * batch, empty_cache(model, batch, 1104))
    assert read == widths


@pytest.mark.parametrize(("chunk_size", "ends"), [(1, [1, 1]), (5, [1, 1]), (8, [2]), (1024, [2])])
def test_prefill_is_the_references_in_any_chunks(monkeypatch, chunk_size, ends):
    """Ragged, in two calls, one of whose prompts is empty: its sequence stays as it is, its logits are zero.

    Logits are taken where a prompt ends, and nowhere else.
    """
    model, rows = fast.accelerated(TRITON.model()), []
    texts, output = SMALL.prompts((19, 11)), model.output
    monkeypatch.setattr(model, "output", lambda x: rows.append(len(x)) or output(x))
    cache = empty_cache(model, 2, 24)
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
    cache = empty_cache(model, 1, 8)
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


# --- Models beyond the kernels ---


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "block_size", "message"),
    [
        (replace(SMALL, head_dim=24), torch.float32, DEVICE, 8, r"head dimension D: got 24; allowed: 16, 32"),
        (replace(SMALL, group=17), torch.float32, DEVICE, 8, r"query heads per KV head: got 17; allowed: 1 … 16"),
        (SMALL, torch.float64, DEVICE, 8, r"model: got torch.float64; allowed: "),
        (SMALL, torch.float32, "cpu" if COMPILED else "meta", 8, r"model: got device (cpu|meta); allowed: "),
        (SMALL, torch.float32, DEVICE, 4, r"block_size: got 4; allowed: 8, 16"),
    ],
)
def test_models_beyond_the_kernels_are_refused(monkeypatch, shape, dtype, device, block_size, message):
    """Before any work."""
    model, config = shape.model(dtype).to(device), replace(SPARSE, block_size=block_size)
    monkeypatch.setattr(fast, "open_cache", lambda *_: pytest.fail("work was started before the model was checked"))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="^" + message):
        TRITON.generate(model, PROMPTS, 3, config, Sampling(1.0))
    assert torch.equal(torch.get_rng_state(), before)


# --- The judge ---


def test_the_judge_condemns_a_token_that_rounding_did_not_choose():
    model, config = TRITON.model(), replace(SPARSE, interval=None)
    (done,) = reference.generate(model, PROMPTS[:1], 6, config)
    wrong = list(done.tokens)
    wrong[4] = (wrong[4] + 1) % SMALL.vocab
    assert agreement(model, PROMPTS[0], done.tokens, done.tokens, config) == 6
    with pytest.raises(AssertionError, match="they part at token 4"):
        agreement(model, PROMPTS[0], wrong, done.tokens, config)


def test_the_judge_tells_near_ties_from_clear_choices():
    """Rounding may decide between logits that differ by a millionth, not by twenty; and between equal scores."""
    model, prompt, config = TRITON.model(), PROMPTS[0], replace(SPARSE, interval=None)
    (done,) = reference.generate(model, [prompt], 8, config)
    *tokens, last = done.tokens
    other, rows = (last + 1) % SMALL.vocab, model.output.weight.data
    assert near_tie(model, prompt, tokens, config, (last, other)) > 10
    for difference, is_tie in ((2e-5, False), (1e-6, True)):
        rows[other] = rows[last] * (1 - difference)
        assert (near_tie(model, prompt, tokens, config, (last, other)) <= 1) == is_tie
    assert near_tie(model, prompt, tokens, config) > 10, "without rivals only selections count"

    for layer in model.layers:
        layer.attn.k_proj.weight.data.zero_()  # all keys are equal, so all scores of one query are
    assert near_tie(model, prompt, tokens, config) <= 1
    # Where nothing is left out, or every step is dense, there is no selection. The paper's schedule selects first.
    dense = replace(config, interval=1)
    assert near_tie(model, prompt, tokens, replace(config, active_ratio=1)) == math.inf
    assert near_tie(model, prompt, tokens, dense) == math.inf
    assert near_tie(model, prompt, tokens, replace(dense, schedule="paper")) <= 1
