"""The measurements: every number they report is computed a second time here, by plain loops over the primitives."""

import json
import lzma
import math
import plistlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import EXACT, VISIBLE, Shape, dense_cache, drift, share

from resa.reference import GPT, ReSAConfig, decode_along, generate, prefill, rectify, sparse_step
from resa.reference.corpus import STANDARD_LIBRARY, Document
from resa.reference.evals import language
from resa.reference.evals.fidelity import (
    ReadMeter,
    decoding_variants,
    follow,
    kv_drift,
    measure_fidelity,
    read_ratio,
    teach,
)
from resa.reference.evals.language import (
    DocumentLoss,
    document_loss,
    lookup_hits,
    measure_language,
    summarise_losses,
    token_losses,
)
from resa.reference.evals.statistics import bootstrap
from resa.reference.tokenizer import load_tokenizer

SHAPE = Shape(seed=7)
CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2)
VARIANTS = {
    "sparse": replace(CONFIG, interval=None),
    "fused 3": replace(CONFIG, interval=3, schedule="fused"),
    "fused 7": replace(CONFIG, interval=7, schedule="fused"),
    "paper 3": replace(CONFIG, interval=3, schedule="paper"),
    "paper 7": replace(CONFIG, interval=7, schedule="paper"),
    "decode-only": replace(CONFIG, interval=1, schedule="paper"),
    "dense": replace(CONFIG, interval=1, schedule="fused"),
}
PROMPT_LENGTHS = (23, 14, 30)
N = 16  # tokens decoded; no multiple of 3 or 7, so that the last window stays open
# Measurements are kept in float32: one rounding of each value, and one for every token a mean is taken over.
FLOAT32 = {"rtol": N * torch.finfo(torch.float32).eps, "atol": EXACT}


class CodeShape(Shape):
    """A small model over the shipped tokenizer's vocabulary."""

    vocab = 4096


@pytest.fixture(scope="module")
def model():
    return SHAPE.model()


@pytest.fixture(scope="module")
def prompts():
    return SHAPE.prompts(PROMPT_LENGTHS)


@pytest.fixture(scope="module")
def continuations():
    return [SHAPE.tokens(N, stream) for stream in (11, 12, 13)]


@pytest.fixture(scope="module")
def given_teacher(model, prompts, continuations):
    """Along tokens that no model chose."""
    return teach(model, prompts, N, CONFIG, continuations=continuations)


# ---- The cost model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schedule": "paper"}, 1 / 16 + 0.1 + 1 / 32),  # the specification's 0.194
        ({"schedule": "paper", "interval": 1}, 1 / 16 + 0.1 + 1),
        ({"schedule": "paper", "interval": 8, "block_size": 32, "active_ratio": 0.2}, 1 / 32 + 0.2 + 1 / 8),
        ({"schedule": "fused"}, (31 * (1 / 16 + 0.1) + 1) / 32),
        ({"schedule": "fused", "interval": 2, "block_size": 8}, (1 / 8 + 0.1 + 1) / 2),
        ({"schedule": "fused", "interval": 1}, 1.0),
        ({"interval": None}, 1 / 16 + 0.1),
        ({"interval": None, "schedule": "paper", "active_ratio": 0.5}, 1 / 16 + 0.5),
    ],
)
def test_the_cost_model_by_hand(change, expected):
    assert read_ratio(ReSAConfig(**change)) == pytest.approx(expected, rel=1e-12)


def test_the_cost_model_gives_the_specifications_number():
    config = ReSAConfig(block_size=16, active_ratio=0.1, interval=32, schedule="paper")
    assert [round(read_ratio(config, bounds), 3) for bounds in (1, 1 / 2, 1 / 4)] == [0.194, 0.163, 0.147]


def test_variants_are_the_corners_and_one_per_interval():
    config = ReSAConfig(block_size=8, active_ratio=0.3, interval=5, schedule="fused")
    assert decoding_variants(config, (2, 9)) == {
        "sparse": replace(config, interval=None),
        "ReSA f=9": replace(config, interval=9),
        "ReSA f=2": replace(config, interval=2),
        "decode-only": replace(config, interval=1, schedule="paper"),
    }


# ---- Bytes read ------------------------------------------------------------------------------------------------------


def dense_bytes(shape, tokens, itemsize=8):
    """Keys and values of every token, once per layer and KV head."""
    return shape.layers * shape.kv_heads * tokens * 2 * shape.head_dim * itemsize


def sparse_bytes(shape, tokens, config, itemsize=8):
    """Both bounds of every block; keys and values of the blocks selected, of which the newest may be partial."""
    n_blocks = -(-tokens // config.block_size)
    n_selected = min(n_blocks, max(config.min_blocks, math.ceil(config.active_ratio * n_blocks - 1e-9)))
    newest = tokens - (n_blocks - 1) * config.block_size
    attended = (n_selected - 1) * config.block_size + newest  # the newest block is always among them
    return shape.layers * shape.kv_heads * (n_blocks + attended) * 2 * shape.head_dim * itemsize


def bytes_of_step(shape, config, step, tokens, itemsize=8):
    """Bytes that step 1, 2, … reads where `tokens` are cached after it; no sequence is ever short enough for dense."""
    if config.interval is None or step % config.interval != 0:
        return sparse_bytes(shape, tokens, config, itemsize)
    rectification = dense_bytes(shape, tokens, itemsize)
    return rectification + (sparse_bytes(shape, tokens, config, itemsize) if config.schedule == "paper" else 0)


def metered_steps(model, prompts, fed, config):
    """Bytes read by each step of decoding along the tokens `fed`."""
    meter = ReadMeter()
    cache, _ = dense_cache(model, prompts, config.block_size)
    cache = cache.resized(cache.capacity + len(fed[0]))
    found, before = [], 0
    for _ in decode_along(model.with_ops(meter.wrap(model.ops)), cache, fed, config):
        found.append(meter.read - before)
        before = meter.read
    return found


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("itemsize", [8, 4])
def test_bytes_read_equal_those_counted_by_hand(model, prompts, continuations, name, itemsize):
    config = VARIANTS[name]
    model = model if itemsize == 8 else SHAPE.model(torch.float32)
    expected = [
        sum(bytes_of_step(SHAPE, config, step, length + step, itemsize) for length in PROMPT_LENGTHS)
        for step in range(1, N + 1)
    ]
    assert metered_steps(model, prompts, continuations, config) == expected


def test_bytes_of_single_operations(model):
    """What a batch of unequal sequences reads: nothing of absent sequences, −1, or blocks past the end."""
    meter = ReadMeter()
    ops = meter.wrap(model.ops)
    kv_heads, group, D, b = SHAPE.kv_heads, SHAPE.group, SHAPE.head_dim, 4
    token = 2 * D * 4  # bytes of one key and value, or of both bounds of one block, in float32
    query = torch.ones(3, kv_heads * group, D)
    keys = torch.ones(3, kv_heads, 16, D)
    lengths = torch.tensor([9, 0, 16], dtype=torch.int32)
    bounds = model.ops.block_bounds(keys, lengths, b)

    ops.score_blocks(query, bounds, lengths, b)
    assert meter.read == kv_heads * (3 + 0 + 4) * token
    meter.read = 0
    indices = torch.tensor([[[0, 2], [2, -1]], [[-1, -1], [-1, -1]], [[1, 3], [0, 1]]], dtype=torch.int32)
    out = ops.sparse_attention(query, keys, keys, indices, lengths, b)
    assert meter.read == ((4 + 1) + 1 + (4 + 4) + (4 + 4)) * token  # 1: the newest block of a length of 9
    assert torch.equal(out, model.ops.sparse_attention(query, keys, keys, indices, lengths, b))
    meter.read = 0
    query_lengths = torch.tensor([2, 0, 0], dtype=torch.int32)  # the third sits out, though it has a cache
    window = query[:, :, None].expand(-1, -1, 2, -1)
    out = ops.dense_attention(window, keys, keys, lengths, query_lengths=query_lengths)
    assert meter.read == kv_heads * 9 * token
    assert torch.equal(out, model.ops.dense_attention(window, keys, keys, lengths, query_lengths=query_lengths))


@pytest.mark.parametrize("name", ["sparse", "paper 8", "fused 8", "dense"])
def test_bytes_read_approach_the_cost_model(name):
    shape = Shape(seed=1, layers=1, kv_heads=1, group=2, head_dim=4, hidden=8, context=4096)
    length, f = 3600, 8
    schedule, _, interval = name.partition(" ")
    config = {
        "sparse": ReSAConfig(interval=None),
        "dense": ReSAConfig(interval=1, schedule="fused"),
    }.get(schedule) or ReSAConfig(interval=int(interval), schedule=schedule)
    read = sum(metered_steps(shape.model(torch.float32), [shape.tokens(length)], [shape.tokens(2 * f)], config))
    ratio = read / sum(dense_bytes(shape, length + step, 4) for step in range(1, 2 * f + 1))
    # Whole blocks: up to one block of tokens too many or too few, and the bounds of one block, which are as large as
    # one token. Dense passes come at the end of their window: up to f tokens later than on average, once in f steps.
    assert abs(ratio - read_ratio(config)) <= (config.block_size + 2) / length


# ---- Drift -----------------------------------------------------------------------------------------------------------


def hand_made_caches():
    """Two equal caches of 2 layers, 2 sequences, 2 KV heads and 3 tokens; every key and value has length 5."""
    model = Shape(layers=2, kv_heads=2, head_dim=2).model()
    pair = [model.new_cache(2, 4, 2) for _ in range(2)]
    for cache in pair:
        cache.keys[..., 0], cache.keys[..., 1] = 3.0, 4.0
        cache.values[..., 0], cache.values[..., 1] = 4.0, -3.0
        cache.keys[..., 3, :] = cache.values[..., 3, :] = float("nan")  # past the length
        cache.lengths += 3
    return pair


ALL_POSITIONS = torch.tensor([[0, 1, 2], [0, 1, 2]])


def test_drift_of_equal_caches_is_zero():
    assert kv_drift(*hand_made_caches(), ALL_POSITIONS).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_drift_of_one_changed_vector(layer, head, name):
    given_cache, exact = hand_made_caches()
    getattr(given_cache, name)[layer, 1, head, 2] += torch.tensor([0.6, 0.8])  # of length 1, on one of length 5
    assert kv_drift(given_cache, exact, ALL_POSITIONS).tolist() == [[0, 0, 0], [0, 0, pytest.approx(0.2)]]
    assert kv_drift(given_cache, exact, torch.tensor([[2], [2]])).tolist() == [[0], [pytest.approx(0.2)]]
    assert kv_drift(given_cache, exact, torch.tensor([[2, 0], [1, 2]])).tolist() == [[0, 0], [0, pytest.approx(0.2)]]


def test_drift_is_the_largest_and_relative_to_the_exact_cache():
    given_cache, exact = hand_made_caches()
    given_cache.keys[0, 0, 0, 1] *= 3  # off by 10: relative to the exact 5, not to the given 15
    given_cache.values[1, 0, 1, 1] *= 1.1
    assert kv_drift(given_cache, exact, torch.tensor([[1], [1]])).tolist() == [[pytest.approx(2.0)], [0.0]]
    given_cache.values[1, 0, 1, 1] *= 10
    assert kv_drift(given_cache, exact, torch.tensor([[1], [1]])).tolist() == [[pytest.approx(10.0)], [0.0]]


# ---- Decoding along given tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_along_its_own_tokens_is_generation(model, prompts, name):
    config = VARIANTS[name]
    wanted = generate(model, prompts, N, config)
    cache = model.new_cache(len(prompts), wanted.cache.capacity, config.block_size)
    first = prefill(model, prompts, cache)
    chosen = [first.argmax(dim=-1).tolist()]
    for logits, state in decode_along(model, cache, [tokens[:-1] for tokens in wanted.tokens], config):
        chosen.append(logits.argmax(dim=-1).tolist())
        assert state.cache is cache
    assert [list(row) for row in zip(*chosen, strict=True)] == wanted.tokens
    assert state.tokens == [tokens[:-1] for tokens in wanted.tokens]
    assert state.window.tolist() == wanted.window.tolist()
    # The same operations on the same numbers, so the same bits.
    assert cache.lengths.tolist() == wanted.cache.lengths.tolist()
    assert torch.equal(cache.keys, wanted.cache.keys)
    assert torch.equal(cache.values, wanted.cache.values)


def test_decoding_along_ends_with_the_shortest_and_draws_no_further(model, prompts):
    cache, _ = dense_cache(model, prompts[:2], 4)
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield drawn[-1]

    steps = list(decode_along(model, cache.resized(60), [[5, 6, 7], endless()], CONFIG))
    assert len(steps) == 3
    assert drawn == [0, 1, 2]
    assert steps[-1][1].tokens == [[5, 6, 7], [0, 1, 2]]


# ---- Following a teacher ---------------------------------------------------------------------------------------------


def follow_by_hand(model, prompt, continuation, config):
    """One sequence by prefill, sparse steps and rectifications alone: per step its logits and drift, and whether dense.

    Returns logits [N, V], drift of the continuation's cached tokens after each step, the drift of what each step
    wrote, and whether the step rectified.
    """
    tokens = prompt + continuation
    exact, _ = dense_cache(model, [tokens], config.block_size)
    cache = model.new_cache(1, len(tokens), config.block_size)
    prefill(model, [prompt], cache)
    window, steps = [], []
    for step, token in enumerate(continuation):
        window.append(token)
        is_full = len(window) == config.interval
        n_written = 1
        if is_full and config.schedule == "fused":
            logits = rectify(model, [window], cache, torch.tensor([len(window) - 1]))
        else:
            logits = sparse_step(model, torch.tensor([token]), cache, config)
            if is_full:
                rectify(model, [window], cache, torch.tensor([len(window)]))
        if is_full:
            n_written = len(window)
            window = []
        now = drift(cache, 0, exact)[len(prompt) :]
        assert len(now) == step + 1
        steps.append((logits[0], now, now[-n_written:].max(), is_full))
    return steps


@pytest.mark.parametrize("name", VARIANTS)
def test_a_comparison_equals_the_one_made_by_hand(model, prompts, continuations, given_teacher, name):
    config = VARIANTS[name]
    found = follow(model, given_teacher, config)
    by_hand = [follow_by_hand(model, prompt, more, config) for prompt, more in zip(prompts, continuations, strict=True)]
    for s, (prompt, more) in enumerate(zip(prompts, continuations, strict=True)):
        dense = model(torch.tensor([prompt + more]))[0, len(prompt) :]  # after each token of the continuation
        for i in range(N):
            p, q = dense[i].softmax(-1).tolist(), by_hand[s][i][0].softmax(-1).tolist()
            kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            assert found.kl[s, i].item() == pytest.approx(kl, rel=1e-6, abs=EXACT)
            assert found.agreement[s, i].item() == (p.index(max(p)) == q.index(max(q)))
    means = torch.stack([torch.stack([steps[i][1].mean() for i in range(N)]) for steps in by_hand])
    torch.testing.assert_close(found.mean_drift.double(), means, **FLOAT32)
    largest = max(float(steps[i][1].max()) for steps in by_hand for i in range(N))
    assert found.largest_drift == pytest.approx(largest, rel=1e-6, abs=EXACT)
    after = [float(written) for steps in by_hand for _, _, written, is_full in steps if is_full]
    assert (found.drift_after_rectification is None) == (after == []) == (config.interval is None)
    if after:
        assert max(after) < EXACT
        assert found.drift_after_rectification < EXACT
    per_step = [bytes_of_step(SHAPE, config, i, length + i) for i in range(1, N + 1) for length in PROMPT_LENGTHS]
    assert found.bytes_per_token == pytest.approx(sum(per_step) / len(per_step), rel=1e-12)


def test_step_error_and_drift_are_told_apart(model, given_teacher):
    found = {name: follow(model, given_teacher, config) for name, config in VARIANTS.items()}
    # Decode-only keeps the cache exact and still predicts worse; dense decoding does neither.
    assert found["decode-only"].largest_drift < EXACT
    assert float(found["decode-only"].kl.min()) > VISIBLE
    assert found["dense"].largest_drift < EXACT
    assert float(found["dense"].kl.abs().max()) < EXACT
    assert bool(found["dense"].agreement.all())
    assert not bool(found["sparse"].agreement.all())
    # What is never rectified drifts; what is rectified does so within a window, and is wiped.
    assert float(found["sparse"].mean_drift.min()) > VISIBLE
    for name, f in (("paper 3", 3), ("paper 7", 7), ("fused 3", 3), ("fused 7", 7)):
        after = found[name].mean_drift[:, f - 1 :: f]
        assert float(after.max()) < EXACT, name  # right after a rectification nothing of the continuation drifts
        assert float(found[name].mean_drift[:, f - 2].min()) > VISIBLE, name


def test_the_dense_reading_is_the_unit(model, given_teacher):
    by_hand = [dense_bytes(SHAPE, length + step) for length in PROMPT_LENGTHS for step in range(1, N + 1)]
    assert given_teacher.bytes_per_token == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-12)
    found = follow(model, given_teacher, VARIANTS["dense"])
    assert found.bytes_per_token == pytest.approx(given_teacher.bytes_per_token, rel=1e-12)


def test_a_teacher_is_dense_decoding(model, prompts, continuations, given_teacher):
    rows = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)]
    exact, _ = dense_cache(model, rows, 4)
    assert given_teacher.tokens == continuations
    assert given_teacher.cache.lengths.tolist() == [len(row) for row in rows]
    for s, row in enumerate(rows):
        assert float(drift(given_teacher.cache, s, exact).max()) < EXACT
        wanted = model(torch.tensor([row]))[0, -N:].log_softmax(-1)
        torch.testing.assert_close(given_teacher.log_probs[s], wanted, rtol=0, atol=EXACT)
    assert given_teacher.opening.cache.lengths.tolist() == [length - 1 for length in PROMPT_LENGTHS]


def test_following_leaves_the_teacher_as_it_was(model, given_teacher):
    first = follow(model, given_teacher, VARIANTS["paper 3"])
    follow(model, given_teacher, VARIANTS["sparse"])
    again = follow(model, given_teacher, VARIANTS["paper 3"])
    assert torch.equal(first.kl, again.kl)
    assert torch.equal(first.mean_drift, again.mean_drift)
    assert first.own_tokens is again.own_tokens is None  # tokens were given, so nobody chooses


def test_sequences_that_do_not_decode_in_step_are_refused(model):
    config = replace(VARIANTS["paper 3"], dense_below=25)
    teacher = teach(model, SHAPE.prompts([14, 30]), 2, config, continuations=[[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"config\.dense_below: got 25"):
        follow(model, teacher, config)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_left_to_itself_each_way_of_decoding_is_generation(model, prompts, temperature):
    seed = 4

    def alone(prompt, config):
        generators = [torch.Generator().manual_seed(seed)]
        return generate(model, [prompt], N, config, temperature=temperature, generator=generators).tokens[0]

    seen = []
    heard = []
    teacher = teach(
        model, prompts, N, CONFIG, temperature=temperature, seed=seed, on_token=lambda *where: heard.append(where)
    )
    assert teacher.tokens == [alone(prompt, VARIANTS["dense"]) for prompt in prompts]
    assert sorted(heard) == [
        (s, PROMPT_LENGTHS[s] + i, token) for s, tokens in enumerate(teacher.tokens) for i, token in enumerate(tokens)
    ]
    own = {}
    for name in ("sparse", "fused 3", "paper 7", "dense"):
        found = follow(model, teacher, VARIANTS[name], own_choice=True, on_step=seen.append)
        own[name] = found.own_tokens
        assert own[name] == alone(prompts[0], VARIANTS[name]), name
    assert seen == [*range(N)] * 4
    assert own["dense"] == teacher.tokens[0]
    assert own["sparse"] != teacher.tokens[0]  # or nothing was shown
    # The copy that chooses for itself takes no part in the comparison.
    led = follow(model, teach(model, prompts, N, CONFIG, continuations=teacher.tokens), VARIANTS["paper 7"])
    found = follow(model, teacher, VARIANTS["paper 7"], own_choice=True)
    torch.testing.assert_close(found.kl, led.kl, **FLOAT32)
    torch.testing.assert_close(found.mean_drift, led.mean_drift, **FLOAT32)
    assert found.largest_drift == pytest.approx(led.largest_drift, rel=1e-6)


def test_fidelity_over_documents_is_the_mean_of_comparisons(model, prompts):
    documents = [*prompts, SHAPE.tokens(40, 20), SHAPE.tokens(26, 21)]
    n, intervals = 9, (2, 4)
    config = replace(CONFIG, schedule="paper")
    result = measure_fidelity(model, documents, n, config, intervals, batch=5, progress=False)
    assert json.loads(json.dumps(result, allow_nan=False))["variants"] == result["variants"]
    assert (result["documents"], result["tokens_each"]) == (5, 9)
    assert result["config"]["schedule"] == "paper"
    assert list(result["variants"]) == ["sparse", "ReSA f=4", "ReSA f=2", "decode-only"]
    comparisons = {}
    for name, variant in decoding_variants(config, intervals).items():
        teachers = [teach(model, [d[:-n]], n, config, continuations=[d[-n:]]) for d in documents]
        comparisons[name] = [follow(model, teacher, variant) for teacher in teachers]
    kl = {name: np.array([float(each.kl.mean()) for each in several]) for name, several in comparisons.items()}
    for name, row in result["variants"].items():
        several = comparisons[name]
        assert row["kl"] == pytest.approx(kl[name].mean(), rel=1e-5)
        assert row["drift_kl"] == pytest.approx((kl[name] - kl["decode-only"]).mean(), rel=1e-4, abs=1e-7)
        assert row["kl_95"] == pytest.approx(bootstrap(kl[name]), rel=1e-5)
        assert row["drift_kl_95"] == pytest.approx(bootstrap(kl[name] - kl["decode-only"]), rel=1e-4, abs=1e-7)
        gain = kl["sparse"] - kl[name]
        assert row["gain_over_sparse"] == pytest.approx(gain.mean(), rel=1e-4, abs=1e-7)
        assert row["gain_over_sparse_95"] == pytest.approx(bootstrap(gain), rel=1e-4, abs=1e-7)
        assert row["agreement"] == pytest.approx(np.mean([each.agreement.numpy().mean() for each in several]))
        drifts = [float(each.mean_drift.mean()) for each in several]
        assert row["mean_drift"] == pytest.approx(np.mean(drifts), rel=1e-5, abs=EXACT)
        assert row["largest_drift"] == pytest.approx(max(each.largest_drift for each in several), rel=1e-5, abs=EXACT)
    assert result["variants"]["decode-only"]["drift_kl_95"] == [0.0, 0.0]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_fidelity_does_not_depend_on_the_batch(model, prompts, batch):
    """Three documents in batches of two are no even number of batches; every document counts the same."""
    whole = measure_fidelity(model, prompts, 6, CONFIG, (3,), batch=3, progress=False)["variants"]
    parts = measure_fidelity(model, prompts, 6, CONFIG, (3,), batch=batch, progress=False)["variants"]
    for name, row in whole.items():
        for key, value in row.items():
            wanted = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)
            assert parts[name][key] == wanted, (name, key)


# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_the_interval_of_equal_values_is_a_point():
    assert bootstrap(np.full(7, 2.5)) == [2.5, 2.5]
    assert bootstrap(np.array([3.0])) == [3.0, 3.0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
def test_the_interval_covers_the_mean_and_no_more_than_the_values(seed, count):
    values = np.random.default_rng(seed).normal(size=count)
    low, high = bootstrap(values)
    assert values.min() <= low < values.mean() < high <= values.max()
    assert bootstrap(values) == [low, high]
    shifted = bootstrap(values + 10)
    assert shifted == pytest.approx([low + 10, high + 10], abs=1e-9)


def test_the_interval_of_many_values_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=900)
    low, high = bootstrap(values)
    # 95 % is ± 1.96 standard errors. The quantiles of 2,000 resamplings are uncertain by 0.06 of one each.
    error = values.std() / 30
    assert (low - values.mean()) / error == pytest.approx(-1.96, abs=0.25)
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.25)


def test_the_interval_of_few_values_is_too_narrow():
    """As its docstring and docs/evidence.md say: of eight values it holds the mean in 84 to 88 % of the cases."""
    rng = np.random.default_rng(1)
    for draw, mean, said in ((rng.normal, 0.0, 0.88), (rng.exponential, 1.0, 0.84)):
        held = []
        for seed in range(1000):
            low, high = bootstrap(draw(size=8), samples=500, seed=seed)
            held.append(low <= mean <= high)
        assert np.mean(held) == pytest.approx(said, abs=0.03), "three standard errors are 0.03"


# ---- Losses ----------------------------------------------------------------------------------------------------------


class CountingModel:
    """Its loss on any token but 0 tells how many tokens it was given: log(V − 1 + e^n)."""

    vocab = 8

    def __init__(self):
        self.windows = []

    def __call__(self, tokens):
        assert tokens.shape[0] == 1
        self.windows.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], self.vocab, dtype=torch.float64)
        logits[0, :, 0] = torch.arange(1, tokens.shape[1] + 1)
        return logits


@given(st.integers(2, 24), st.integers(1, 100))
@share(2)
def test_every_token_is_scored_once_with_context_before_it(context, n):
    model = CountingModel()
    tokens = torch.randint(1, model.vocab, (n + 1,), generator=torch.Generator().manual_seed(n))
    losses = token_losses(model, tokens, context)
    assert losses.shape == (n,)
    seen = [round(math.log(math.exp(loss) - (model.vocab - 1))) for loss in losses.double().tolist()]
    first = min(context, n) if context % 2 == 0 else min(context - 1, n)  # an odd one's second window begins one early
    assert seen[:first] == list(range(1, first + 1))
    assert all(context // 2 < count <= context for count in seen[first:])
    assert all(len(window) <= context for window in model.windows)
    # Each window begins half a context after the one before, and there are no more than needed.
    starts = range(0, len(model.windows) * (context // 2), context // 2)
    assert model.windows == [tokens[start : start + context][: n - start].tolist() for start in starts]
    assert len(model.windows) == max(1, math.ceil((n - context // 2) / (context // 2)))


@pytest.mark.parametrize("context", [2, 6, 16])
@pytest.mark.parametrize("n", [1, 5, 16, 17, 41])
def test_losses_equal_a_naive_loop(model, context, n):
    tokens = torch.tensor(SHAPE.tokens(n + 1, stream=n))
    half, wanted = context // 2, []
    for i in range(n):
        start = 0 if i < context else (i // half - 1) * half
        logits = model(tokens[None, start : i + 1])[0, -1].detach()
        wanted.append(-float(logits.log_softmax(-1)[tokens[i + 1]]))
    found = token_losses(model, tokens, context)
    assert not found.requires_grad
    # The loss is taken in float32, from float64 logits of a few dozen at most.
    assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def uniform():
    """A model that finds every token equally likely: 12 bits each."""
    model = CodeShape(layers=1, hidden=8, kv_heads=1, group=1, context=256).model(torch.float32)
    model.embed.weight.data.zero_()
    return model


def test_a_uniform_model_spends_twelve_bits_per_token(uniform, tokenizer):
    texts = ["naïve = 'café'\n" * 30, "def f(x):\n    return x\n" * 3]
    documents = [Document(f"d{i}", text, STANDARD_LIBRARY) for i, text in enumerate(texts)]
    losses = [document_loss(uniform, document, tokenizer, long=10**9) for document in documents]
    counts = [len(tokenizer.encode_ordinary(text)) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    assert [len(loss.nats) for loss in losses] == counts
    assert counts[0] > 64 > counts[1]  # more than one window, and less than one
    assert [loss.bits for loss in losses] == pytest.approx([12 * count for count in counts], rel=1e-6)
    assert [loss.n_bytes for loss in losses] == sizes
    assert sizes[0] > len(texts[0])  # bytes, not characters
    assert all(len(loss.nats_short) == 0 for loss in losses)
    packed = sum(loss.n_bytes_xz for loss in losses)
    assert summarise_losses(losses, 64) == {
        "documents": 2,
        "bytes": sum(sizes),
        "tokens": sum(counts),
        "bits_per_byte": pytest.approx(12 * sum(counts) / sum(sizes), rel=1e-6),
        "bits_per_byte_xz": pytest.approx(8 * packed / sum(sizes), rel=1e-12),
        "fewer_bits_than_xz": pytest.approx(1 - 12 * sum(counts) / (8 * packed), rel=1e-6),
    }


def test_the_yardstick_is_xz_at_its_best(uniform, tokenizer):
    document = Document("plistlib", Path(plistlib.__file__).read_text(encoding="utf-8"), STANDARD_LIBRARY)
    raw = document.text.encode()
    wanted = len(lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
    weaker = [len(lzma.compress(raw, preset=0)), len(lzma.compress(raw, preset=9))]
    raw_stream = len(lzma.compress(raw, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME))
    assert wanted not in (*weaker, raw_stream)  # this text tells them apart
    assert document_loss(uniform, document, tokenizer, long=10**9).n_bytes_xz == wanted


def test_a_document_begins_after_the_end_of_another(tokenizer, monkeypatch):
    seen = []
    model = CodeShape(layers=1, hidden=8, context=64).model(torch.float32)
    monkeypatch.setattr(language, "token_losses", lambda *given: seen.append(given) or token_losses(*given))
    monkeypatch.setattr(language, "SHORT_CONTEXT", 4)
    document = Document("d", "a = 1\nb = a\n", STANDARD_LIBRARY)
    ids = tokenizer.encode_ordinary(document.text)
    long = document_loss(model, document, tokenizer, long=len(ids))
    short = document_loss(model, document, tokenizer, long=len(ids) + 1)
    fed = [4095, *ids]  # the last id is the end of text
    assert [(tokens.tolist(), context) for _, tokens, context in seen] == [(fed, 64), (fed, 4), (fed, 64)]
    assert torch.equal(long.nats, token_losses(model, torch.tensor(fed), 64))
    assert torch.equal(long.nats_short, token_losses(model, torch.tensor(fed), 4))
    assert torch.equal(short.nats, long.nats)
    assert len(short.nats_short) == 0


def test_positions_of_long_documents_by_hand():
    context, n = 6000, 7000
    nats, short = torch.zeros(n), torch.zeros(n)
    nats[256:1024], nats[4096:context] = 3.0, 1.0
    short[4096:context] = 1.5
    nats[[255, 1024, 4095, context]] = 100.0  # just outside, on either side
    short[[4095, context]] = 100.0
    unlike = DocumentLoss(10, 10, nats * 2, short * 2)
    brief = DocumentLoss(10, 10, torch.full((50,), 7.0), torch.zeros(0))
    result = summarise_losses([DocumentLoss(10, 10, nats, short), brief, unlike], context)
    position = result["position"]
    assert json.loads(json.dumps(position, allow_nan=False)) == {
        "documents": 2,
        "nats_256_to_1024": pytest.approx(4.5),
        "nats_from_4096": pytest.approx(1.5),
        "nats_from_4096_seeing_1024": pytest.approx(2.25),
        "difference_95": pytest.approx([-4.0, -2.0]),  # two documents, −2 and −4
        "context_gain_95": pytest.approx([-1.0, -0.5]),
    }
    assert result["documents"] == 3
    assert result["tokens"] == 2 * n + 50


# ---- Lookups ---------------------------------------------------------------------------------------------------------

LOOKUP_CONFIGS = {"dense": VARIANTS["dense"], "sparse": VARIANTS["sparse"]}


def successor_model():
    """Finds token t + 1 most likely after token t, whatever came before."""
    shape = Shape(hidden=Shape.vocab, tied=False, layers=1)
    model = shape.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # only the embedding is left in the residual stream
        model.norm.weight.fill_(1.0)
        model.embed.weight.copy_(torch.eye(shape.vocab))
        model.output.weight.copy_(torch.eye(shape.vocab).roll(1, dims=0))
    return model


def test_only_exact_answers_are_hits():
    filler = SHAPE.tokens(20)
    probes = [
        ([*filler, 3], [4, 5, 6]),
        ([*filler, 3], [4]),  # shorter than the longest: nothing is asked of what comes after
        ([*filler[:11], 7], [8, 9]),
        ([*filler, 3], [5, 6, 7]),  # the first token wrong
        ([*filler, 3], [4, 9, 10]),  # a token in the middle wrong, the one after it right again
        ([*filler, 3], [4, 5, 7]),  # the last token wrong
        ([*filler, 3], [3]),
    ]
    hits = lookup_hits(successor_model(), probes, LOOKUP_CONFIGS)
    assert set(hits) == {"dense", "sparse"}
    for name in hits:
        assert hits[name].tolist() == [True, True, True, False, False, False, False], name


def test_hits_are_what_greedy_decoding_writes(model):
    """Answers that sparse decoding gives, fed the prompt's last token itself, are hits; dense ones only where dense."""
    prompts = SHAPE.prompts([20, 31, 26, 40, 33, 24])
    answers = {"dense": [], "sparse": []}
    for prompt in prompts:
        for name, config in LOOKUP_CONFIGS.items():
            cache = model.new_cache(1, len(prompt) + 3, 4)
            prefill(model, [prompt[:-1]], cache)
            token, answer = prompt[-1], []
            for _ in range(3):
                dense = name == "dense"
                logits = (
                    prefill(model, [[token]], cache)
                    if dense
                    else sparse_step(model, torch.tensor([token]), cache, config)
                )
                token = int(logits.argmax())
                answer.append(token)
            answers[name].append(answer)
    same = [a == b for a, b in zip(answers["dense"], answers["sparse"], strict=True)]
    assert False in same  # otherwise the two could be mixed up unseen
    for name, other in (("dense", "sparse"), ("sparse", "dense")):
        hits = lookup_hits(model, list(zip(prompts, answers[name], strict=True)), LOOKUP_CONFIGS)
        assert hits[name].all()
        assert hits[other].tolist() == same


def test_a_short_context_has_no_late_positions():
    nats = torch.ones(500)
    result = summarise_losses([DocumentLoss(10, 10, nats, nats)], 512)
    json.dumps(result, allow_nan=False)


def test_language_measurements_are_json(tokenizer):
    model = CodeShape(layers=1, hidden=8, kv_heads=1, group=2, context=512).model(torch.float32)
    documents = [Document(f"d{i}", f"x = {i}\n" * (20 + i), STANDARD_LIBRARY) for i in range(2)]
    options = {"distances": (64, 96), "n_probes": 3, "progress": False}
    result = measure_language(model, documents, tokenizer, ReSAConfig(), batch=2, **options)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["documents"] == 2
    assert result["tokens"] == sum(len(tokenizer.encode_ordinary(document.text)) for document in documents)
    assert result["bits_per_byte"] > 3  # far from a model that knows anything
    accuracy = result["lookups"].pop("accuracy")
    assert result["lookups"] == {"active_ratio": 0.1, "probes": 3}
    # A model drawn at random knows no answer of several digits.
    assert accuracy == {"64": {"dense": 0.0, "sparse": 0.0}, "96": {"dense": 0.0, "sparse": 0.0}}


def test_lookup_accuracy_is_a_share_of_all_probes(uniform, tokenizer, monkeypatch):
    """Each probe is asked once per way of decoding, whatever the batch, and different ones at each distance."""
    asked = []

    def hits(model, probes, configs):
        asked.append(probes)
        assert isinstance(model, GPT)
        assert (configs["dense"].interval, configs["dense"].schedule, configs["sparse"].interval) == (1, "fused", None)
        assert {config.active_ratio for config in configs.values()} == {0.3}
        return {"dense": torch.ones(len(probes)).bool(), "sparse": torch.arange(len(probes)) == 0}

    monkeypatch.setattr(language, "lookup_hits", hits)
    documents = [Document("d", "x = 1\n", STANDARD_LIBRARY)]
    result = measure_language(
        uniform, documents, tokenizer, ReSAConfig(active_ratio=0.3), distances=(48, 64), n_probes=5, batch=2,
        progress=False,
    )  # fmt: skip
    assert [len(probes) for probes in asked] == [2, 2, 1, 2, 2, 1]
    assert len({tuple(prompt) for probes in asked for prompt, _ in probes}) == 10
    accuracy = {"dense": 1.0, "sparse": pytest.approx(3 / 5)}  # the first of each batch of 2, 2 and 1
    assert result["lookups"] == {"active_ratio": 0.3, "probes": 5, "accuracy": {"48": accuracy, "64": accuracy}}
