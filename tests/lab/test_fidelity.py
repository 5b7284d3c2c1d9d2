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
    compare,
    decoding_variants,
    kv_drift,
    measure_fidelity,
    read,
    read_ratio,
    summarise,
)
from resa.reference.lab.measure import bootstrap, recovered
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


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Several chunks of predictions, the last one shorter."""
    monkeypatch.setattr(fidelity, "CHUNK", 6)


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
        ({"interval": None, "selection": "sketch"}, 1 / 16 + 1 / 256 + 0.1),
        ({"interval": None, "selection": "sketch", "sketch_bits": 1, "block_size": 32}, 1 / 32 + 1 / 256 + 0.1),
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
            assert found["cross_entropy"][i] == pytest.approx(-math.log(q[continuation[i + 1]]), rel=1e-6)
        now = drift(cache, exact)[len(prompt) :]
        assert torch.equal(kv_drift(cache, exact, torch.arange(len(prompt), cache.length)), now)
        assert found["mean_drift"][i] == pytest.approx(float(now.mean()), rel=1e-6, abs=EXACT)
        assert float(now.max()) < EXACT or not is_full
        largest = max(largest, float(now.max()))
    assert math.isnan(found["cross_entropy"][-1]), "nobody knows what follows the last token"
    assert found["drift"].max() == pytest.approx(largest, rel=1e-6, abs=EXACT)
    assert (largest > VISIBLE) == (name not in ("decode-only", "dense"))


def test_a_reading_is_dense_attention(model, prompt, continuation, reading):
    text = prompt + continuation
    wanted = model(torch.tensor([text]))[0, -N:].log_softmax(-1).detach()
    torch.testing.assert_close(reading.log_probs, wanted, rtol=0, atol=EXACT)
    assert reading.following.tolist() == [*continuation[1:], NO_TOKEN]
    surprise = [-float(row[token]) for token, row in zip(continuation[1:], wanted, strict=False)]
    assert reading.cross_entropy.tolist() == pytest.approx([*surprise, float("nan")], nan_ok=True)
    known = read(model, text, len(prompt), after=5)
    assert known.following[-1] == 5
    assert known.cross_entropy.tolist() == pytest.approx([*surprise, -float(wanted[-1, 5])])


# Over documents.


@pytest.mark.parametrize("scored", [None, 4])
def test_fidelity_over_documents_is_the_mean_of_comparisons(model, prompt, scored):
    """A row for every block size, ratio and way; means over the last tokens alone, if that is asked."""
    documents = [prompt, *(SHAPE.tokens(length, 20 + length) for length in (10, 40, 26, 30))]  # 10 is the fewest
    n, config = 9, replace(CONFIG, schedule="paper")
    more = {"intervals": (2, 4), "ratios": (0.1, 0.4), "block_sizes": (4, 2), "scored": scored}
    result = measure_fidelity(model, documents, n, config, **more)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    about = {"documents": 5, "tokens_each": 9, "scored": scored or 9}
    assert about.items() <= result.items()
    assert result["config"]["schedule"] == "paper"

    last = slice(-(scored or n), None)
    readings = [read(model, document, len(document) - n) for document in documents]
    dense = np.array([each.cross_entropy[:-1][-(scored or n) + 1 :].mean() for each in readings])
    assert result["dense_cross_entropy"] == pytest.approx(dense.mean())
    assert result["dense_cross_entropy_95"] == pytest.approx(bootstrap(dense))
    asked = [(b, p, name) for b in (4, 2) for p in (0.1, 0.4) for name in decoding_variants(config, (2, 4))]
    assert [(row["block_size"], row["ratio"], row["way"]) for row in result["rows"]] == asked
    for row in result["rows"]:
        own = replace(config, block_size=row["block_size"], active_ratio=row["ratio"])
        ways = decoding_variants(own, (2, 4))
        ends = "sparse", "decode-only"
        found = {name: [compare(model, r, ways[name]) for r in readings] for name in (row["way"], *ends)}
        mean = {
            name: {part: np.array([x[part][last].mean() for x in each]) for part in ("kl", "agreement", "mean_drift")}
            for name, each in found.items()
        }
        kl = {name: each["kl"] for name, each in mean.items()}
        lost = np.array([x["cross_entropy"][last][:-1].mean() for x in found[row["way"]]]) - dense
        wanted = {
            **mean[row["way"]],
            "step_error": kl["decode-only"],
            "drift": kl[row["way"]] - kl["decode-only"],
            "gain": kl["sparse"] - kl[row["way"]],
            "cross_entropy_lost": lost,
        }
        for part, values in wanted.items():
            assert row[part] == pytest.approx(values.mean(), abs=1e-12), part
            assert row[f"{part}_95"] == pytest.approx(bootstrap(values), abs=1e-12), part
        curve = np.mean([x["kl"] for x in found[row["way"]]], axis=0)
        assert row["by_position"]["kl"] == pytest.approx(curve.tolist()), "of all tokens, scored or not"


def test_scores_are_compared_beside_each_other(model, prompt):
    """Each with the ends of its own; a configuration's own score is one of them."""
    more = {"intervals": [4], "ratios": [0.1], "block_sizes": [4]}
    both = measure_fidelity(model, [prompt], 9, CONFIG, **more, scores=["pooled", "sketch-2"])["rows"]
    sketch = replace(CONFIG, selection="sketch")
    assert both == [
        row for own in (CONFIG, sketch) for row in measure_fidelity(model, [prompt], 9, own, **more)["rows"]
    ]
    assert both[0]["step_error"] != both[3]["step_error"]


@pytest.mark.parametrize("scores", [["pooled"], ["sketch-2"]])
def test_a_default_device_changes_no_number(model, prompt, scores):
    """Every tensor names its device."""
    more = {"intervals": [4], "ratios": [0.1], "block_sizes": [4], "scores": scores}
    expected = measure_fidelity(model, [prompt], 9, CONFIG, **more)
    with torch.device("meta"):
        assert measure_fidelity(model, [prompt], 9, CONFIG, **more) == expected


def test_the_configuration_has_a_way_for_every_interval_and_for_both_ends():
    assert decoding_variants(CONFIG, (2, 4)) == {
        "sparse": replace(CONFIG, interval=None),
        "ReSA f=4": replace(CONFIG, interval=4),
        "ReSA f=2": replace(CONFIG, interval=2),
        "decode-only": replace(CONFIG, interval=1, schedule="paper"),
    }


def test_a_row_by_hand():
    """Two documents: never rectified 0.3 and 0.5 nats, 0.1 of them step error; rectified 0.15 and 0.2."""
    kl = {"sparse": [0.3, 0.5], "ReSA f=8": [0.15, 0.2], "decode-only": [0.1, 0.1]}
    found = {None: {"cross_entropy": np.array([[1.0], [2.0]])}}
    for name, values in kl.items():
        column = np.array(values)[:, None]
        found[16, 0.1, "pooled", name] = {"kl": column, "agreement": 1 - column, "mean_drift": column}
        found[16, 0.1, "pooled", name]["cross_entropy"] = found[None]["cross_entropy"] + 2 * column
    rows = {row["way"]: row for row in summarise(found, 1)}
    expected = {"kl": 0.175, "step_error": 0.1, "drift": 0.075, "gain": 0.225, "cross_entropy_lost": 0.35}
    for name, value in (expected | {"recovered": 1 - 0.075 / 0.3, "agreement": 0.825}).items():
        assert rows["ReSA f=8"][name] == pytest.approx(value), name
    assert rows["ReSA f=8"]["drift_95"] == pytest.approx([0.05, 0.1])
    share = recovered("recovered", np.array([0.2, 0.4]), np.array([0.05, 0.1]))
    assert rows["ReSA f=8"]["recovered_95"] == pytest.approx(share["recovered_95"])
    for end in ("sparse", "decode-only"):
        assert rows[end]["recovered"] is rows[end]["recovered_95"] is None
    assert rows["decode-only"]["drift_95"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 1}, "n_tokens: got 1"),
        ({"n_tokens": 23}, "documents: got 23 tokens; allowed: documents of 24 … 96 tokens"),
        ({"documents": [[1] * 97]}, "documents: got 97 tokens"),
        ({"documents": []}, "documents: got 0 tokens"),
        ({"intervals": [0]}, "interval: got 0"),
        ({"ratios": [0.1, 2.0]}, "active_ratio: got 2"),
        ({"block_sizes": [0]}, "block_size: got 0"),
        ({"scored": 1}, "scored: got 1; allowed: 2 … 3"),
        ({"scored": 4}, "scored: got 4; allowed: 2 … 3"),
    ],
)
def test_bad_input_is_named_before_anything_is_decoded(model, prompt, monkeypatch, changes, message):
    monkeypatch.setattr(fidelity, "read", lambda *_, **__: pytest.fail("something was decoded"))
    arguments = {"documents": [prompt], "n_tokens": 3, "config": CONFIG, "intervals": [2], "ratios": [0.1]}
    with pytest.raises(ValueError, match=message):
        measure_fidelity(model, **{**arguments, "block_sizes": [4], **changes})
