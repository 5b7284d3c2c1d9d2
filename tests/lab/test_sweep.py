"""The sweep of intervals, ratios, block sizes and suffixes: its cuts, its split of the loss, and its sums."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from resa.reference import ReSAConfig
from resa.reference.lab import sweep
from resa.reference.lab.fidelity import read
from resa.reference.lab.sweep import SCORED, Setting, measure_sweep, score, settings, summarise
from small_models import EXACT, Shape, decoded_along

SHAPE = Shape(seed=7)
CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, interval=8)
BASE = Setting(CONFIG, 40)
LENGTH = 75


@pytest.fixture(scope="module")
def model():
    return SHAPE.model()


@pytest.fixture(scope="module")
def documents():
    return [SHAPE.tokens(LENGTH, stream) for stream in range(3)]


@pytest.fixture(scope="module")
def swept(model, documents):
    """A sweep over fewer values of every factor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "LENGTHS", (1, 8, 32))
        patch.setattr(sweep, "RATIOS", (0.1, 1.0))
        patch.setattr(sweep, "BLOCK_SIZES", (4, 8))
        patch.setattr(sweep, "DENSE_LAYERS", (0, 2))
        return measure_sweep(model, documents, BASE)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [5, 40])
def test_scores_are_those_of_plain_loops(model, documents, suffix):
    """The last 32 predictions count; those before a short suffix are dense ones."""
    setting = Setting(replace(CONFIG, interval=None), suffix)
    for document in documents:
        reading = read(model, document[:-1], LENGTH - 1 - SCORED, after=document[-1])
        dense = model(torch.tensor([document]))[0].log_softmax(dim=-1)
        logits = decoded_along(model, document[: -suffix - 1], document[-suffix - 1 : -1], setting.config)
        sparse = logits.log_softmax(dim=-1)
        kl, hits, dense_hits = 0.0, 0, 0
        for place in range(LENGTH - 1 - SCORED, LENGTH - 1):
            wanted, step = dense[place], place - (LENGTH - 1 - suffix)
            given = sparse[step] if step >= 0 else wanted
            kl += float((wanted.exp() * (wanted - given)).sum())
            hits += document[place + 1] in given.topk(3).indices.tolist()
            dense_hits += document[place + 1] in wanted.topk(3).indices.tolist()
        assert score(model, reading, setting) == {"kl": pytest.approx(kl / SCORED), "accuracy": hits / SCORED}
        assert score(model, reading, None) == {"kl": 0.0, "accuracy": dense_hits / SCORED}


def test_settings_that_read_everything_lose_nothing(swept):
    """An all-dense configuration loses nothing, and neither does one whose blocks or layers are all read."""
    json.dumps(swept, allow_nan=False)
    assert (swept["documents"], swept["document_tokens"], swept["base"]["suffix"]) == (3, LENGTH, 40)
    by_interval = {row["interval"]: row for row in swept["factors"]["interval"]}
    dense = by_interval[1]
    assert (dense["accuracy"], dense["accuracy_lost"]) == (swept["dense_accuracy"], 0.0)
    assert dense["kl"] == pytest.approx(0, abs=EXACT)
    whole = [row for row in swept["factors"]["active_ratio"] if row["active_ratio"] == 1.0]
    assert [(row["kl"] < EXACT, row["accuracy_lost"]) for row in whole] == [(True, 0.0)]
    layers = {row["dense_layers"]: row for row in swept["factors"]["dense_layers"]}
    assert layers[2]["kl"] < EXACT < layers[0]["kl"], "all of its layers are dense"
    assert by_interval[None]["kl_drift"] > 1e-3


def test_everything_compared_is_listed():
    """One factor at a time, and a grid of two."""
    by_factor = settings(Setting(ReSAConfig(), 256))
    assert [setting.suffix for setting in by_factor["suffix"]] == [1, 8, 16, 32, 64, 128, 256]
    assert [setting.config.interval for setting in by_factor["interval"]] == [1, 8, 16, 32, 64, 128, 256, None]
    assert [setting.config.block_size for setting in by_factor["block_size"]] == [8, 16, 32, 64]
    assert len(by_factor["grid"]) == 8 * 6
    assert "grid" not in settings(Setting(ReSAConfig(), 256), grid=False)
    for factor, several in by_factor.items():
        changed = {
            name
            for setting in several
            for name, value in vars(setting.config).items()
            if value != getattr(ReSAConfig(), name)
        }
        allowed = {"suffix": {"interval"}, "grid": {"interval", "active_ratio"}}
        assert changed <= allowed.get(factor, {factor})


def test_a_row_by_hand():
    """Two documents: never rectified 0.3 and 0.5 nats, 0.1 of them step error; every 8 steps 0.15 and 0.2."""
    setting = Setting(CONFIG, 40)
    scores = {
        setting: ([0.15, 0.2], [0.7, 0.6]),
        setting.never: ([0.3, 0.5], [0.5, 0.5]),
        setting.decode_only: ([0.1, 0.1], [0.75, 0.65]),
    }
    found = {way: {"kl": np.array(kl), "accuracy": np.array(hits)} for way, (kl, hits) in scores.items()}
    row = summarise(setting, found, dense=np.array([0.8, 0.7]))
    assert (row["interval"], row["suffix"]) == (8, 40)
    for name, value in {
        "kl": 0.175, "kl_step_error": 0.1, "kl_drift": 0.075, "kl_recovered": 1 - 0.075 / 0.3,
        "accuracy": 0.65, "accuracy_lost": 0.1, "accuracy_step_error": 0.05, "accuracy_drift": 0.05,
        "accuracy_recovered": 1 - 0.05 / 0.2,
    }.items():  # fmt: skip
        assert row[name] == pytest.approx(value), name
    assert row["kl_drift_95"] == pytest.approx([0.05, 0.1])
    assert summarise(setting.never, found, np.ones(2))["kl_recovered"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": replace(BASE, suffix=31)}, "suffix: got 31; allowed: 32 … 73"),
        ({"base": replace(BASE, suffix=74)}, "suffix: got 74"),
        ({"documents": [[1] * 98]}, "documents: got 98 tokens; allowed: documents of 34 … 97 tokens"),
        ({"documents": []}, "documents: got 0 tokens"),
    ],
)
def test_bad_input_is_named_before_anything_is_decoded(model, documents, monkeypatch, changes, message):
    monkeypatch.setattr(sweep, "read", lambda *_, **__: pytest.fail("something was decoded"))
    with pytest.raises(ValueError, match=message):
        measure_sweep(**{"model": model, "documents": documents, "base": BASE, **changes})
