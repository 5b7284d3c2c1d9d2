"""Speculation measured: its passes counted by hand, its tokens dense decoding's, its cost by the cost model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_models import Shape

from resa.reference import ReSAConfig, generate
from resa.reference.evals.fidelity import read_ratio
from resa.reference.evals.speculation import Passes, agreement, measure_speculation
from resa.reference.evals.statistics import bootstrap

SHAPE = Shape(seed=11)
CONFIG = ReSAConfig(block_size=2, active_ratio=0.2, min_blocks=2)
DOCUMENTS = [SHAPE.tokens(length, stream) for stream, length in enumerate((19, 8, 25))]


def test_passes_by_hand():
    """Nine tokens after the first, of three passes of four drafts; read: 12 sparse steps and 3 dense passes for 9."""
    passes = Passes(10, (4, 4, 4), (4, 1, 1))
    config = replace(CONFIG, interval=5)
    found = passes.measures(config)
    assert found == {
        "drafted": 4.0,
        "accepted": 2.0,
        "acceptance": 0.5,
        "tokens_per_pass": 3.0,
        "read": pytest.approx((12 * (1 / 2 + 0.2) + 3) / 9),
    }


def test_agreement_by_hand():
    """Tokens up to the first other."""
    assert agreement([1, 2, 3, 4], [1, 2, 7, 4]) == {"same_tokens": 2.0}
    assert agreement([1, 2], [1, 2]) == {"same_tokens": 2.0}
    assert agreement([3, 2], [1, 2]) == {"same_tokens": 0.0}


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_speculation_agrees_and_rectification_need_not(schedule):
    """Each measure once more, from generations of one document at a time."""
    config, model = replace(CONFIG, schedule=schedule), SHAPE.model()
    result = measure_speculation(model, DOCUMENTS, 15, config, (4, 2), batch=2, progress=False)
    rows = result["variants"]
    json.dumps(result, allow_nan=False)
    assert list(rows) == ["speculation f=4", "ReSA f=4", "speculation f=2", "ReSA f=2"]
    dense = [generate(model, [d], 15, replace(config, interval=1, schedule="fused")).tokens[0] for d in DOCUMENTS]
    for f in (4, 2):
        own = rows[f"speculation f={f}"]
        assert own["same_tokens"] == 15
        most = f - 1 if schedule == "fused" else f
        assert 0 <= own["accepted"] <= own["drafted"] <= most
        # A pass yields what it accepts and one token more, but for "paper" where all was accepted, and at the end.
        assert own["accepted"] - 1e-9 <= own["tokens_per_pass"] <= own["accepted"] + 1 + 1e-9
        tokens = [generate(model, [d], 15, replace(config, interval=f)).tokens[0] for d in DOCUMENTS]
        same = np.array([[*np.not_equal(a, b), True].index(True) for a, b in zip(tokens, dense, strict=True)])
        assert rows[f"ReSA f={f}"]["same_tokens"] == pytest.approx(same.mean())
        assert rows[f"ReSA f={f}"]["same_tokens_95"] == pytest.approx(bootstrap(same))
        assert rows[f"ReSA f={f}"]["read"] == pytest.approx(read_ratio(replace(config, interval=f)))
    assert rows["ReSA f=4"]["same_tokens"] < 15, "sparse steps chose nothing else: the test would see nothing"
    assert rows["speculation f=4"]["acceptance"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 1}, "n_tokens: got 1"),
        ({"batch": 0}, "batch: got 0"),
        ({"intervals": ()}, "intervals: got none"),
        ({"config": replace(CONFIG, dense_layers=1)}, "config.dense_layers: got 1; allowed: 0"),
        ({"documents": [[1]]}, "documents: got 1 tokens"),
        ({"documents": [[1] * 90]}, "documents: got 90 tokens; allowed: ≤ 82"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"documents": DOCUMENTS, "n_tokens": 15, "config": CONFIG, "intervals": (2,), "progress": False}
    with pytest.raises(ValueError, match=message):
        measure_speculation(SHAPE.model(), **{**given, **changes})
