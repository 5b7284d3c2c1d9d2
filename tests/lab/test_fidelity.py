"""Fidelity: every number is computed a second time, by plain loops and by decoding step by step."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resa.reference import ReSAConfig, Sampling, generate, prefill, rectify, sparse_step
from resa.reference.lab import fidelity
from resa.reference.lab.fidelity import (
    NO_TOKEN,
    by_position,
    compare,
    decoding_variants,
    kv_drift,
    measure_fidelity,
    read,
    read_ratio,
)
from resa.reference.lab.follow import follow, teach
from resa.reference.lab.statistics import bootstrap
from small_models import EXACT, VISIBLE, Shape, dense_cache, drift

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
N = 16  # tokens decoded; no multiple of 3 or 7, so that the last window stays open


@pytest.fixture(scope="module")
def model():
    return SHAPE.model()


@pytest.fixture(scope="module")
def prompt():
    return SHAPE.tokens(23)


@pytest.fixture(scope="module")
def continuation():
    """Tokens that no model chose."""
    return SHAPE.tokens(N, 11)


@pytest.fixture(scope="module")
def reading(model, prompt, continuation):
    return read(model, prompt + continuation, len(prompt))


# ---- The cost model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schedule": "paper"}, 1 / 16 + 0.1 + 1 / 32),
        ({"schedule": "paper", "interval": 1}, 1 / 16 + 0.1 + 1),
        ({"schedule": "paper", "interval": 8, "block_size": 32, "active_ratio": 0.2}, 1 / 32 + 0.2 + 1 / 8),
        ({"schedule": "fused"}, (31 * (1 / 16 + 0.1) + 1) / 32),
        ({"schedule": "fused", "interval": 2, "block_size": 8}, (1 / 8 + 0.1 + 1) / 2),
        ({"schedule": "fused", "interval": 1}, 1.0),
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


# ---- Drift -----------------------------------------------------------------------------------------------------------


def hand_made_caches():
    """Two equal caches of 2 layers, 2 KV heads and 3 tokens; every key and value has length 5."""
    model = Shape(layers=2, kv_heads=2, head_dim=2).model()
    pair = [model.new_cache(4, 2) for _ in range(2)]
    for cache in pair:
        cache.keys[..., 0], cache.keys[..., 1] = 3.0, 4.0
        cache.values[..., 0], cache.values[..., 1] = 4.0, -3.0
        cache.keys[..., 3, :] = cache.values[..., 3, :] = float("nan")  # past the length
        cache.length = 3
    return pair


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_drift_of_one_changed_vector(layer, head, name):
    cache, exact = hand_made_caches()
    assert kv_drift(cache, exact, torch.arange(3)).tolist() == [0, 0, 0]
    getattr(cache, name)[layer, 0, head, 2] += torch.tensor([0.6, 0.8])  # of length 1, on one of length 5
    assert kv_drift(cache, exact, torch.arange(3)).tolist() == [0, 0, pytest.approx(0.2)]
    assert kv_drift(cache, exact, torch.tensor([2, 0])).tolist() == [pytest.approx(0.2), 0]


def test_drift_is_the_largest_and_relative_to_the_exact_cache():
    cache, exact = hand_made_caches()
    cache.keys[0, 0, 0, 1] *= 3  # off by 10: relative to the exact 5, not to the given 15
    cache.values[1, 0, 1, 1] *= 1.1
    assert kv_drift(cache, exact, torch.tensor([1])).tolist() == [pytest.approx(2.0)]
    cache.values[1, 0, 1, 1] *= 10
    assert kv_drift(cache, exact, torch.tensor([1])).tolist() == [pytest.approx(10.0)]


# ---- Along given tokens ----------------------------------------------------------------------------------------------


def by_hand(model, prompt, continuation, config):
    """Decode by prefill, sparse steps and rectifications alone.

    -> per step its logits [V], the drift of the continuation's cached tokens after it, the drift of what it wrote, and
    whether it rectified.
    """
    exact, _ = dense_cache(model, prompt + continuation, config.block_size)
    cache = model.new_cache(len(prompt) + len(continuation), config.block_size)
    prefill(model, prompt, cache)
    window, steps = [], []
    for token in continuation:
        window.append(token)
        is_full, n_written = len(window) == config.interval, 1
        if is_full and config.schedule == "fused":
            logits = rectify(model, window, cache, len(window) - 1)
        else:
            logits = sparse_step(model, token, cache, config)
            if is_full:
                rectify(model, window, cache, len(window))
        if is_full:
            n_written, window = len(window), []
        now = drift(cache, exact)[len(prompt) :]
        steps.append((logits, now, float(now[-n_written:].max()), is_full))
    return steps


def dense_bytes(tokens):
    """Bytes of keys and values of every token, once per layer and KV head, in float64."""
    return SHAPE.layers * SHAPE.kv_heads * tokens * 2 * SHAPE.head_dim * 8


def step_bytes(config, tokens, is_full):
    """Bytes that a step reads that leaves `tokens` tokens cached: bounds of every block, tokens of those selected."""
    n_blocks = -(-tokens // config.block_size)
    n_selected = min(n_blocks, max(config.min_blocks, math.ceil(config.active_ratio * n_blocks - 1e-9)))
    newest = tokens - (n_blocks - 1) * config.block_size  # of the newest block, which may be partial
    sparse = dense_bytes(n_blocks + (n_selected - 1) * config.block_size + newest)
    if not is_full:
        return sparse
    return dense_bytes(tokens) + (sparse if config.schedule == "paper" else 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_comparison_equals_the_one_made_by_hand(model, prompt, continuation, reading, name):
    """At once, and step by step."""
    config, dense = VARIANTS[name], model(torch.tensor([prompt + continuation]))[0, len(prompt) :]
    steps = by_hand(model, prompt, continuation, config)
    exact, _ = dense_cache(model, prompt + continuation, 4)
    teacher = given_teacher(prompt, continuation, dense, exact)
    at_once, stepwise = compare(model, reading, config), follow(model, teacher, config)
    for i, (logits, now, _, _) in enumerate(steps):
        p, q = dense[i].softmax(-1).tolist(), logits.softmax(-1).tolist()
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        same = p.index(max(p)) == q.index(max(q))
        for found in (at_once, vars(stepwise)):
            assert float(found["kl"][i]) == pytest.approx(kl, rel=1e-6, abs=EXACT)
            assert bool(found["agreement"][i]) == same
            assert float(found["mean_drift"][i]) == pytest.approx(float(now.mean()), rel=1e-6, abs=EXACT)
        if i < N - 1:
            assert at_once["hits"][i] == (continuation[i + 1] in logits.topk(3).indices.tolist())
    largest = max(float(now.max()) for _, now, _, _ in steps)
    assert at_once["drift"].max() == pytest.approx(largest, rel=1e-6, abs=EXACT)
    assert stepwise.largest_drift == pytest.approx(largest, rel=1e-6, abs=EXACT)
    after = [written for _, _, written, is_full in steps if is_full]
    assert (stepwise.drift_after_rectification is None) == (after == []) == (config.interval is None)
    assert max(after, default=0.0) < EXACT
    assert (stepwise.drift_after_rectification or 0.0) < EXACT
    read_by_hand = [step_bytes(config, len(prompt) + i + 1, is_full) for i, (*_, is_full) in enumerate(steps)]
    assert stepwise.bytes_per_token == pytest.approx(sum(read_by_hand) / N, rel=1e-12)


def given_teacher(prompt, continuation, dense, exact):
    """A teacher that did not choose its tokens."""
    return SimpleNamespace(prompt=prompt, tokens=continuation, log_probs=dense.log_softmax(-1), cache=exact)


def test_step_error_and_drift_are_told_apart(model, reading):
    found = {name: compare(model, reading, config) for name, config in VARIANTS.items()}
    # Decode-only keeps the cache exact and still predicts worse; dense decoding does neither.
    assert found["decode-only"]["drift"].max() == found["dense"]["drift"].max() == 0
    assert found["decode-only"]["kl"].min() > VISIBLE
    assert np.abs(found["dense"]["kl"]).max() < EXACT
    assert found["dense"]["agreement"].all()
    assert not found["sparse"]["agreement"].all()
    # Without rectification tokens drift; with it they do so within a window, and are wiped.
    assert found["sparse"]["mean_drift"].min() > VISIBLE
    for name, f in (("paper 3", 3), ("paper 7", 7), ("fused 3", 3), ("fused 7", 7)):
        assert found[name]["mean_drift"][f - 1 :: f].max() == 0, name
        assert found[name]["mean_drift"][f - 2] > VISIBLE, name


def test_a_reading_is_dense_attention(model, prompt, continuation, reading):
    text = prompt + continuation
    wanted = model(torch.tensor([text]))[0, -N:].log_softmax(-1)
    torch.testing.assert_close(reading.log_probs, wanted, rtol=0, atol=EXACT)
    assert reading.following.tolist() == [*continuation[1:], NO_TOKEN]
    hits = [token in row.topk(3).indices.tolist() for token, row in zip(continuation[1:], wanted[:-1], strict=True)]
    assert reading.hits.tolist() == [*hits, False]
    assert read(model, text, len(prompt), after=5).following[-1] == 5


# ---- A teacher that chooses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_teacher_is_dense_decoding(model, prompt, temperature):
    teacher, own = teach(model, prompt, N, CONFIG, temperature=temperature, seed=4), torch.Generator().manual_seed(4)
    dense = VARIANTS["dense"]
    (wanted,) = generate(model, [prompt], N, dense, Sampling(temperature), generators=[own])
    assert (teacher.prompt, teacher.tokens) == (prompt, wanted.tokens)
    exact, _ = dense_cache(model, prompt + teacher.tokens, 4)
    assert teacher.cache.length == exact.length
    assert float(drift(teacher.cache, exact).max()) < EXACT
    log_probs = model(torch.tensor([prompt + teacher.tokens]))[0, -N:].log_softmax(-1)
    torch.testing.assert_close(teacher.log_probs, log_probs, rtol=0, atol=EXACT)
    read_by_hand = sum(dense_bytes(len(prompt) + step) for step in range(1, N + 1)) / N
    assert teacher.bytes_per_token == pytest.approx(read_by_hand, rel=1e-12)
    assert follow(model, teacher, dense).bytes_per_token == pytest.approx(read_by_hand, rel=1e-12)


def test_following_leaves_the_teacher_as_it_was(model, prompt):
    teacher = teach(model, prompt, N, CONFIG)
    first = follow(model, teacher, VARIANTS["paper 3"])
    follow(model, teacher, VARIANTS["sparse"])
    again = follow(model, teacher, VARIANTS["paper 3"])
    assert torch.equal(first.kl, again.kl)
    assert torch.equal(first.mean_drift, again.mean_drift)
    assert teacher.cache.length == len(prompt) + N


# ---- Over documents --------------------------------------------------------------------------------------------------


def test_fidelity_over_documents_is_the_mean_of_comparisons(model, prompt):
    documents = [prompt, *(SHAPE.tokens(length, 20 + length) for length in (14, 40, 26, 30))]
    n, config = 9, replace(CONFIG, schedule="paper")
    result = measure_fidelity(model, documents, n, config, (2, 4), progress=False)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["documents"], result["tokens_each"], result["config"]["schedule"]) == (5, 9, "paper")
    assert list(result["variants"]) == ["sparse", "ReSA f=4", "ReSA f=2", "decode-only"]
    readings = [read(model, document, len(document) - n) for document in documents]
    found = {
        name: [compare(model, reading, variant) for reading in readings]
        for name, variant in decoding_variants(config, (2, 4)).items()
    }
    kl = {name: np.array([each["kl"].mean() for each in several]) for name, several in found.items()}
    for name, row in result["variants"].items():
        losses = {"kl": kl[name], "drift_kl": kl[name] - kl["decode-only"], "gain_over_sparse": kl["sparse"] - kl[name]}
        for part, values in losses.items():
            assert row[part] == pytest.approx(values.mean(), abs=1e-12)
            assert row[f"{part}_95"] == pytest.approx(bootstrap(values), abs=1e-12)
        for part in ("agreement", "mean_drift"):
            assert row[part] == pytest.approx(np.mean([each[part].mean() for each in found[name]]))
        assert row["largest_drift"] == max(each["drift"].max() for each in found[name])
    assert result["variants"]["decode-only"]["drift_kl_95"] == [0.0, 0.0]
    assert result["by_position"]["dense"]["accuracy"][0] == np.mean([each.hits[:-1].double() for each in readings])


def test_curves_are_means_over_stretches_of_tokens(monkeypatch):
    """The last stretch is shorter, and does without the last token, whose successor is not known."""
    monkeypatch.setattr(fidelity, "WIDTH", 16)
    rng = np.random.default_rng(0)
    found = {"sparse": {name: rng.random((5, 40)) for name in ("hits", "kl", "mean_drift", "agreement")}}
    found["dense"] = {"hits": rng.random((5, 40))}
    curves = by_position(found)
    names = {"hits": "accuracy", "kl": "kl", "mean_drift": "mean_drift"}
    assert set(curves["dense"]) == {"from", "accuracy", "accuracy_95"}
    for way, parts in found.items():
        assert curves[way]["from"] == [0, 16, 32]
        for name in parts.keys() & names.keys():
            stretches = [parts[name][:, a:b].mean(axis=1) for a, b in ((0, 16), (16, 32), (32, 39))]
            assert curves[way][names[name]] == [each.mean() for each in stretches]
            assert curves[way][f"{names[name]}_95"] == [bootstrap(each) for each in stretches]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 0}, "n_tokens: got 0"),
        ({"n_tokens": 22}, "documents: got 23 tokens; allowed: documents of 24 … 96 tokens"),
        ({"documents": [[1] * 97]}, "documents: got 97 tokens"),
        ({"documents": []}, "documents: got 0 tokens"),
        ({"intervals": [0]}, "interval: got 0"),
    ],
)
def test_bad_input_is_named(model, prompt, changes, message):
    arguments = {"documents": [prompt], "n_tokens": 3, "config": CONFIG, "intervals": [2], "progress": False}
    with pytest.raises(ValueError, match=message):
        measure_fidelity(model, **{**arguments, **changes})
