"""Text that ways of decoding write by themselves, and what dense decoding makes of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from resa.reference import ReSAConfig, Sampling, generate
from resa.reference.lab import free, measure
from resa.reference.lab.free import log_likelihood, measure_free, repeated
from resa.reference.lab.measure import bootstrap
from small_models import Shape

CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, interval=8, schedule="paper")
SHAPE = Shape(seed=7)
WAYS = {
    "dense": replace(CONFIG, interval=1, schedule="fused"),
    "sparse": replace(CONFIG, interval=None),
    "ReSA f=8": CONFIG,
    "decode-only": replace(CONFIG, interval=1),
}
ASKED = {"intervals": [8], "seeds": 2, "temperature": 4.0}


@pytest.fixture(scope="module")
def model():
    return SHAPE.model()


@pytest.fixture(scope="module")
def prompts():
    return SHAPE.prompts([30, 41, 35])


def test_dense_decoding_reads_what_was_written(model, prompts):
    """Every token under one dense pass over all before it, the first one included."""
    written = SHAPE.tokens(12, 9)
    log_probs = model(torch.tensor([prompts[0] + written])).log_softmax(dim=-1)[0, 29:-1]
    wanted = log_probs[range(12), written].tolist()
    assert log_likelihood(model, prompts[0], written).tolist() == pytest.approx(wanted)


def test_repetitions_are_counted_by_runs_of_eight():
    assert repeated([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert repeated([1, 2, 3, 4] * 5) == 9 / 13
    assert repeated([*range(20), *range(8)]) == 1 / 21
    assert repeated([*range(20), *range(7)]) == 0


def test_rows_are_means_over_the_texts_of_every_prompt(model, prompts, monkeypatch):
    """Texts have random numbers of their own, the same in all ways; differences are taken prompt by prompt."""
    monkeypatch.setattr(measure, "POINTS", 2)
    result = measure_free(model, prompts, 20, CONFIG, **ASKED)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["documents"], result["seeds"], result["tokens_each"]) == (3, 2, 20)
    likely, again = {}, {}
    for name, config in WAYS.items():
        asked, texts = [prompt for prompt in prompts for _ in range(2)], []
        for index, prompt in enumerate(asked):
            own = [torch.Generator().manual_seed(index)]
            texts.append(generate(model, [prompt], 20, config, Sampling(4.0), generators=own)[0].tokens)
        tokens = np.stack([log_likelihood(model, *pair) for pair in zip(asked, texts, strict=True)])
        likely[name] = tokens.reshape(3, 2, 20).mean(axis=1)
        again[name] = np.reshape([repeated(text) for text in texts], (3, 2)).mean(axis=1)
    assert [row["way"] for row in result["rows"]] == list(WAYS)
    for row in result["rows"]:
        name = row["way"]
        for part, found in (("log_likelihood", {k: x.mean(axis=1) for k, x in likely.items()}), ("repeated", again)):
            differences = {f"{part}_over_{end}": found[name] - found[end] for end in ("dense", "sparse")}
            for key, values in {part: found[name], **differences}.items():
                assert row[key] == pytest.approx(values.mean(), abs=1e-12)
                assert row[f"{key}_95"] == pytest.approx(bootstrap(values), abs=1e-12)
        halves = [likely[name][:, :10].mean(), likely[name][:, 10:].mean()]
        assert row["by_position"]["log_likelihood"] == pytest.approx(halves)
    assert len({row["log_likelihood"] for row in result["rows"]}) == 4, "ways write different texts"


def test_another_backend_writes_all_texts_of_a_way_together(model, prompts):
    asked = []

    def backend(model, prompts, n_tokens, config, sampling, *, generators):
        asked.append((len(prompts), n_tokens, config, sampling.temperature))
        return generate(model, prompts, n_tokens, config, sampling, generators=generators)

    result = measure_free(model, prompts, 8, CONFIG, **ASKED, generate=backend)
    assert asked == [(6, 8, config, 4.0) for config in WAYS.values()]
    assert result == measure_free(model, prompts, 8, CONFIG, **ASKED)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_tokens: got 7; allowed: an integer ≥ 8", {"n_tokens": 7}),
        ("n_tokens: got 56; allowed: ≤ 55, for the context", {"n_tokens": 56}),
        ("documents", {"prompts": []}),
        ("interval", {"intervals": [0]}),
        ("seeds: got 0", {"seeds": 0}),
        ("temperature", {"temperature": -1.0}),
    ],
)
def test_bad_arguments_are_refused_by_name(model, prompts, monkeypatch, named, changes):
    monkeypatch.setattr(free, "read", lambda *_, **__: pytest.fail("something was decoded"))
    arguments = {"prompts": prompts, "n_tokens": 9, "config": CONFIG, **ASKED}
    with pytest.raises(ValueError, match=named):
        measure_free(model, **{**arguments, **changes})
