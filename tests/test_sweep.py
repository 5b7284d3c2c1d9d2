"""The sweep of intervals, ratios, block sizes and suffixes: its cuts, its split of the loss, and its sums."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import EXACT, Shape, dense_cache

from resa.reference import ReSAConfig, decode_along, prefill
from resa.reference.evals import sweep
from resa.reference.evals.fidelity import by_position, follow, teach
from resa.reference.evals.statistics import bootstrap, bootstrap_ratio
from resa.reference.evals.sweep import SCORED, Scores, Setting, decoded, measure_sweep, settings, summarise

SHAPE = Shape(seed=7)
CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, interval=8)
BASE = Setting(CONFIG, 40)
LENGTH = 73  # so that the prompt is whole blocks
NARROW = {"rtol": 1e-5, "atol": 1e-7}  # what is kept in float32


@pytest.fixture(scope="module")
def model():
    return SHAPE.model()


@pytest.fixture(scope="module")
def documents():
    return [SHAPE.tokens(LENGTH, stream) for stream in range(5)]


@pytest.fixture(scope="module")
def swept(model, documents):
    """Fewer values of every factor, in batches of two and of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "LENGTHS", (1, 8, 32))
        patch.setattr(sweep, "RATIOS", (0.1, 1.0))
        patch.setattr(sweep, "BLOCK_SIZES", (4, 8))
        patch.setattr(sweep, "DENSE_LAYERS", (0, 2))
        return [measure_sweep(model, documents, BASE, batch=n, progress=False) for n in (2, 5)]


# ---- Scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("suffix", [5, 40])
def test_scores_are_those_of_plain_loops(model, documents, suffix):
    """The last 32 predictions, of which those before a short suffix are dense ones."""
    setting = Setting(replace(CONFIG, interval=None), suffix)
    accuracy, several = sweep.decode_all(model, torch.tensor(documents), [setting])
    found = several[setting]
    dense = model(torch.tensor(documents)).log_softmax(dim=-1)
    for i, document in enumerate(documents):
        cache = model.new_cache(1, LENGTH, 4)
        prefill(model, [document[: -suffix - 1]], cache)
        kl, hits = 0.0, 0
        fed = decode_along(model, cache, [document[-suffix - 1 : -1]], setting.config)
        sparse = [logits[0].log_softmax(dim=-1) for logits, _ in fed]
        for place in range(LENGTH - 1 - SCORED, LENGTH - 1):
            wanted = dense[i, place]
            step = place - (LENGTH - 1 - suffix)
            given = sparse[step] if step >= 0 else wanted
            kl += float((wanted.exp() * (wanted - given)).sum())
            hits += document[place + 1] in given.topk(3).indices.tolist()
        assert found.kl[i] == pytest.approx(kl / SCORED, rel=1e-5, abs=1e-7)
        assert found.accuracy[i] == hits / SCORED
        places = range(LENGTH - 1 - SCORED, LENGTH - 1)
        assert accuracy[i] == np.mean([document[at + 1] in dense[i, at].topk(3).indices for at in places])


def test_dense_and_decode_only_are_the_ends_of_the_split(swept):
    """An all-dense configuration loses nothing, exactly; decode-only has step error alone; the parts add up."""
    result = swept[0]
    json.dumps(result, allow_nan=False)
    by_interval = {row["interval"]: row for row in result["factors"]["interval"]}
    dense = by_interval[1]
    assert (dense["accuracy"], dense["accuracy_lost"]) == (result["dense_accuracy"], 0.0)
    assert dense["kl"] == pytest.approx(0, abs=EXACT)
    assert dense["kl_drift"] == pytest.approx(-dense["kl_step_error"], abs=EXACT)
    everything = [row for rows in result["factors"].values() for row in rows]
    for row in everything:
        assert row["kl"] == pytest.approx(row["kl_step_error"] + row["kl_drift"], abs=1e-12)
        assert row["accuracy_lost"] == pytest.approx(row["accuracy_step_error"] + row["accuracy_drift"], abs=1e-12)
    whole = [row for row in result["factors"]["active_ratio"] if row["active_ratio"] == 1.0]
    assert [(row["kl"] < EXACT, row["accuracy_lost"]) for row in whole] == [(True, 0.0)]
    layers = {row["dense_layers"]: row for row in result["factors"]["dense_layers"]}
    assert layers[2]["kl"] < EXACT < layers[0]["kl"], "all of its layers being dense"
    assert by_interval[None]["kl_recovered"] is None
    assert by_interval[None]["kl_drift"] > 1e-3, "nothing to recover: the test would see nothing"
    assert by_interval[8]["kl_recovered"] == pytest.approx(
        1 - by_interval[8]["kl_drift"] / by_interval[None]["kl_drift"]
    )


def test_the_batch_changes_nothing(swept):
    one, other = swept
    for factor, rows in one["factors"].items():
        for row, twin in zip(rows, other["factors"][factor], strict=True):
            assert row["kl"] == pytest.approx(twin["kl"], rel=1e-5, abs=1e-7)
            assert row["accuracy"] == twin["accuracy"]


def test_what_is_compared():
    """One factor at a time; a grid of two; everything decoded once, with the corners that the split needs."""
    by_factor = settings(Setting(ReSAConfig(), 256))
    assert [setting.suffix for setting in by_factor["suffix"]] == [1, 8, 16, 32, 64, 128, 256]
    assert [setting.config.interval for setting in by_factor["interval"]] == [1, 8, 16, 32, 64, 128, 256, None]
    assert [setting.config.block_size for setting in by_factor["block_size"]] == [8, 16, 32, 64]
    assert len(by_factor["grid"]) == 8 * 6
    for factor, several in by_factor.items():
        if factor not in ("suffix", "grid"):
            fields = {name for setting in several for name, value in vars(setting.config).items()
                      if value != getattr(ReSAConfig(), name)}  # fmt: skip
            assert fields <= {factor}
    todo = decoded(by_factor)
    assert len(set(todo)) == len(todo)
    for setting in (setting for several in by_factor.values() for setting in several):
        assert {setting, setting.decode_only, replace(setting, config=replace(setting.config, interval=None))} <= {
            *todo
        }


def test_a_row_by_hand():
    """Two documents: never rectified 0.3 and 0.5 nats, 0.1 of them step error; every 8 steps 0.15 and 0.2."""
    setting = Setting(CONFIG, 40)
    never = replace(setting, config=replace(CONFIG, interval=None))
    found = {
        setting: Scores(np.array([0.15, 0.2]), np.array([0.7, 0.6])),
        never: Scores(np.array([0.3, 0.5]), np.array([0.5, 0.5])),
        setting.decode_only: Scores(np.array([0.1, 0.1]), np.array([0.75, 0.65])),
    }
    row = summarise(setting, found, dense=np.array([0.8, 0.7]))
    assert (row["interval"], row["suffix"]) == (8, 40)
    for name, value in {
        "kl": 0.175, "kl_step_error": 0.1, "kl_drift": 0.075, "kl_recovered": 1 - 0.075 / 0.3,
        "accuracy": 0.65, "accuracy_lost": 0.1, "accuracy_step_error": 0.05, "accuracy_drift": 0.05,
        "accuracy_recovered": 1 - 0.05 / 0.2,
    }.items():  # fmt: skip
        assert row[name] == pytest.approx(value), name
    assert row["kl_drift_95"] == pytest.approx([0.05, 0.1])
    assert summarise(never, found | {never.decode_only: found[setting.decode_only]}, np.ones(2))["kl_recovered"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch: got 0"),
        ({"base": replace(BASE, suffix=31)}, "suffix: got 31; allowed: 32 … 71"),
        ({"base": replace(BASE, suffix=72)}, "suffix: got 72"),
        ({"documents": [[1] * 70, [1] * 71]}, r"documents: got of \[70, 71\] tokens"),
        (
            {"base": replace(BASE, suffix=41)},
            "documents: got prompts of 31 tokens; allowed: a multiple of 8 before the suffix",
        ),
        ({"base": Setting(replace(CONFIG, interval=6), 40)}, "config.interval: got 6; allowed: a divisor"),
        ({"documents": [[1] * 9999]}, "documents: got of 9999 tokens; allowed: documents of at most"),
        ({"documents": []}, r"documents: got of \[\] tokens"),
    ],
)
def test_bad_input_is_named_before_anything_is_decoded(model, documents, monkeypatch, changes, message):
    monkeypatch.setattr(sweep, "BLOCK_SIZES", (4, 8))
    monkeypatch.setattr(sweep, "exact_stream", lambda *_: pytest.fail("something was decoded"))
    with pytest.raises(ValueError, match=message):
        measure_sweep(**{"model": model, "documents": documents, "base": BASE, "progress": False, **changes})


# ---- By position -----------------------------------------------------------------------------------------------------


def test_curves_are_means_over_stretches_of_tokens(model, documents):
    """The last stretch is shorter, and its accuracy does without the last token, whose successor is not known."""
    teacher = teach(model, [d[:33] for d in documents], 40, CONFIG, continuations=[d[33:] for d in documents])
    found = {"sparse": [follow(model, teacher, replace(CONFIG, interval=None))]}
    curves = by_position(found, teacher.hits, width=16)
    assert curves["sparse"]["from"] == [0, 16, 32]
    (comparison,) = found["sparse"]
    assert curves["sparse"]["kl"] == pytest.approx(
        [float(comparison.kl[:, a:b].mean()) for a, b in ((0, 16), (16, 32), (32, 39))]
    )
    for name, hits in (("sparse", comparison.hits), ("dense", teacher.hits)):
        assert curves[name]["accuracy"] == pytest.approx(
            [float(hits[:, a:b].float().mean()) for a, b in ((0, 16), (16, 32), (32, 39))]
        )
    assert curves["sparse"]["kl_95"][1] == pytest.approx(
        bootstrap(comparison.kl[:, 16:32].double().mean(dim=1).numpy())
    )
    true = [[token in row.topk(3).indices for token, row in zip(d[34:], logits[33:], strict=False)]
            for d, logits in zip(documents, model(torch.tensor(documents)), strict=True)]  # fmt: skip
    assert teacher.hits[:, :-1].tolist() == true
    assert not teacher.hits[:, -1].any()


# ---- Ratios ----------------------------------------------------------------------------------------------------------


def test_the_ratio_of_equal_pairs_is_a_point():
    assert bootstrap_ratio(np.full(6, 0.5), np.full(6, 2.0)) == [0.25, 0.25]


@given(seed=st.integers(0, 2**32 - 1), ratio=st.floats(-1, 1), n=st.integers(5, 40))
def test_the_interval_of_a_ratio_holds_it(seed, ratio, n):
    totals = np.random.default_rng(seed).uniform(0.5, 2.0, size=n)
    low, high = bootstrap_ratio(ratio * totals, totals)
    assert low == pytest.approx(ratio, abs=1e-12)
    assert high == pytest.approx(ratio, abs=1e-12)
    noisy = ratio * totals + np.random.default_rng(seed + 1).normal(scale=0.1, size=n)
    low, high = bootstrap_ratio(noisy, totals)
    assert low < noisy.mean() / totals.mean() < high


def test_a_ratio_to_what_may_be_nothing_has_no_interval():
    totals = np.array([1.0, -1.0, 0.5, -0.4])
    assert bootstrap_ratio(totals, totals) == [None, None]


def test_the_exact_cache_is_what_the_teacher_holds(model, documents):
    teacher = teach(model, [d[:32] for d in documents], 40, CONFIG, continuations=[d[32:-1] for d in documents])
    exact, _ = dense_cache(model, [d[:-1] for d in documents], 4)
    torch.testing.assert_close(
        teacher.cache.keys[:, :, :, : LENGTH - 1], exact.keys[:, :, :, : LENGTH - 1], rtol=EXACT, atol=EXACT
    )
