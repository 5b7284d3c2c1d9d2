"""Fidelity: every number is computed a second time, by plain loops and by decoding step by step."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from resa.reference import ReSAConfig, prefill, rectify, sparse_step
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
from resa.reference.lab.measure import bootstrap
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


# The cost model.


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


def test_the_cost_model_counts_the_share_of_bounds_that_is_read():
    shares = [read_ratio(ReSAConfig(schedule="paper"), bounds) for bounds in (1, 1 / 2, 1 / 4)]
    assert [round(share, 3) for share in shares] == [0.194, 0.163, 0.147]


# Along given tokens.


def by_hand(model, prompt, continuation, config):
    """Decode by prefill, sparse steps and rectifications alone.

    -> per step its logits [V], the cache after it, and whether it rectified.
    """
    cache = model.new_cache(len(prompt) + len(continuation), config.block_size)
    prefill(model, prompt, cache)
    window = []
    for token in continuation:
        window.append(token)
        is_full = len(window) == config.interval
        if is_full and config.schedule == "fused":
            logits = rectify(model, window, cache, len(window) - 1)
        else:
            logits = sparse_step(model, token, cache, config)
            if is_full:
                rectify(model, window, cache, len(window))
        if is_full:
            window = []
        yield logits, cache, is_full


@pytest.mark.parametrize("name", VARIANTS)
def test_a_comparison_equals_the_one_made_by_hand(model, prompt, continuation, reading, name):
    """Right after a rectification nothing has drifted."""
    config, dense = VARIANTS[name], model(torch.tensor([prompt + continuation]))[0, len(prompt) :]
    exact, _ = dense_cache(model, prompt + continuation, 4)
    found, largest = compare(model, reading, config), 0.0
    for i, (logits, cache, is_full) in enumerate(by_hand(model, prompt, continuation, config)):
        p, q = dense[i].softmax(-1).tolist(), logits.softmax(-1).tolist()
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        assert found["kl"][i] == pytest.approx(kl, rel=1e-6, abs=EXACT)
        assert found["agreement"][i] == (p.index(max(p)) == q.index(max(q)))
        if i < N - 1:
            assert found["hits"][i] == (continuation[i + 1] in logits.topk(3).indices.tolist())
        now = drift(cache, exact)[len(prompt) :]
        assert torch.equal(kv_drift(cache, exact, torch.arange(len(prompt), cache.length)), now)
        assert found["mean_drift"][i] == pytest.approx(float(now.mean()), rel=1e-6, abs=EXACT)
        assert float(now.max()) < EXACT or not is_full
        largest = max(largest, float(now.max()))
    assert found["drift"].max() == pytest.approx(largest, rel=1e-6, abs=EXACT)
    assert (largest > VISIBLE) == (name not in ("decode-only", "dense"))


def test_a_reading_is_dense_attention(model, prompt, continuation, reading):
    text = prompt + continuation
    wanted = model(torch.tensor([text]))[0, -N:].log_softmax(-1)
    torch.testing.assert_close(reading.log_probs, wanted, rtol=0, atol=EXACT)
    assert reading.following.tolist() == [*continuation[1:], NO_TOKEN]
    hits = [token in row.topk(3).indices.tolist() for token, row in zip(continuation[1:], wanted[:-1], strict=True)]
    assert reading.hits.tolist() == [*hits, False]
    assert read(model, text, len(prompt), after=5).following[-1] == 5


# Over documents.


def test_fidelity_over_documents_is_the_mean_of_comparisons(model, prompt):
    documents = [prompt, *(SHAPE.tokens(length, 20 + length) for length in (10, 40, 26, 30))]  # 10 is the fewest
    n, config = 9, replace(CONFIG, schedule="paper")
    result = measure_fidelity(model, documents, n, config, (2, 4))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["documents"], result["tokens_each"], result["config"]["schedule"]) == (5, 9, "paper")
    assert decoding_variants(config, (2, 4)) == {
        "sparse": replace(config, interval=None),
        "ReSA f=4": replace(config, interval=4),
        "ReSA f=2": replace(config, interval=2),
        "decode-only": replace(config, interval=1, schedule="paper"),
    }
    assert list(result["variants"]) == list(decoding_variants(config, (2, 4)))
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
        ({"n_tokens": 23}, "documents: got 23 tokens; allowed: documents of 24 … 96 tokens"),
        ({"documents": [[1] * 97]}, "documents: got 97 tokens"),
        ({"documents": []}, "documents: got 0 tokens"),
        ({"intervals": [0]}, "interval: got 0"),
    ],
)
def test_bad_input_is_named(model, prompt, changes, message):
    arguments = {"documents": [prompt], "n_tokens": 3, "config": CONFIG, "intervals": [2]}
    with pytest.raises(ValueError, match=message):
        measure_fidelity(model, **{**arguments, **changes})
