"""Marks for answers: given by hand, and by plain generation; decoding that is dense answers as dense decoding does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import Shape

from resa.reference import ReSAConfig, generate, load_tokenizer
from resa.reference.evals import answers
from resa.reference.evals.answers import (
    answered,
    continued,
    marks,
    measure_answers,
    read_prompts,
    shares,
    ways_to_decode,
)
from resa.reference.tasks import Example

CONFIG = ReSAConfig(block_size=2, min_blocks=2, interval=3)


class CodeShape(Shape):
    """A small model over the shipped tokenizer's vocabulary."""

    vocab = 4096


SHAPE = Shape(seed=11)


def example(prompt, answer, checked):
    return Example(list(prompt), list(answer), checked, "")


def test_marks_by_hand():
    """All of it, and the last line in its place, whatever comes after."""
    long = example([1], [5, 6, 7, 8], 2)
    assert marks([5, 6, 7, 8, 9], long) == (True, True)
    assert marks([5, 0, 7, 8, 9], long) == (False, True)
    assert marks([5, 6, 7, 0, 8], long) == (False, False)
    assert marks([6, 7, 8, 5], long) == (False, False)


@pytest.mark.parametrize("name", ["dense", "sparse", "ReSA", "decode-only"])
def test_continuations_are_those_of_generation(name):
    """But for the first step, which is sparse where the configuration is; at interval 1, fused, all are equal."""
    model, config = SHAPE.model(), ways_to_decode(CONFIG)[name]
    prompts = SHAPE.prompts((19, 4, 11))
    opening = generate(model, [p[:-1] for p in prompts], 0, config)
    found = continued(model, opening, [p[-1] for p in prompts], 12, config)
    for prompt, tokens in zip(prompts, found, strict=True):
        if name == "dense":
            assert tokens == generate(model, [prompt], 12, config).tokens[0]
        alone = continued(model, generate(model, [prompt[:-1]], 0, config), [prompt[-1]], 12, config)
        assert alone == [tokens]
    if name == "sparse":
        assert found != continued(model, opening, [p[-1] for p in prompts], 12, ways_to_decode(CONFIG)["dense"])


@pytest.mark.parametrize("sizes", [(19, 4, 11), (300, 270)])  # the latter longer than a chunk
def test_prompts_are_read_as_prefill_reads_them(sizes):
    shape = Shape(seed=11, context=512)
    model, prompts = shape.model(torch.float64), shape.prompts(sizes)
    found, expected = read_prompts(model, prompts, 4), generate(model, prompts, 0, ReSAConfig(block_size=4))
    assert torch.equal(found.cache.lengths, expected.cache.lengths)
    for name in ("keys", "values"):
        ours, theirs = getattr(found.cache, name), getattr(expected.cache, name)
        for s, prompt in enumerate(prompts):
            torch.testing.assert_close(ours[:, s, :, : len(prompt)], theirs[:, s, :, : len(prompt)], rtol=0, atol=1e-12)
    for s, prompt in enumerate(prompts):
        blocks = -(-len(prompt) // 4)
        ours, theirs = (each.cache.bounds[:, s, ..., :blocks] for each in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_answers_are_marked_by_what_each_way_says():
    """Examples whose answers are what dense decoding says: dense is right, and so is every way that reads all."""
    model = SHAPE.model()
    prompts = SHAPE.prompts((19, 7, 12, 23))
    dense = generate(model, prompts, 9, replace(CONFIG, interval=1, schedule="fused")).tokens
    examples = [example(p, t[:n], 2) for p, t, n in zip(prompts, dense, (9, 5, 9, 7), strict=True)]
    found = answered(model, examples, ways_to_decode(CONFIG))
    assert found["dense"] == [(True, True)] * 4
    assert (False, False) in found["sparse"], "sparse decoding says the same: nothing to see"
    whole = answered(model, examples, ways_to_decode(replace(CONFIG, active_ratio=1.0)))
    assert {mark for own in whole.values() for mark in own} == {(True, True)}


def test_a_family_is_measured_over_all_its_examples():
    model, tokenizer = CodeShape(seed=3, context=512).model(), load_tokenizer()
    config = ReSAConfig(8, 0.1, 2, interval=4)
    result = measure_answers(model, tokenizer, ["single_needle", "tracing"], [256], 3, config, batch=2, progress=False)
    json.dumps(result, allow_nan=False)
    assert [(row["family"], row["length"]) for row in result["rows"]] == [("single_needle", 256), ("tracing", 256)]
    assert set(result["rows"][0]) == {"family", "length", "longest_answer", "ratio", *ways_to_decode(config)}
    assert [row["ratio"] for row in result["rows"]] == [0.1, 0.1], "the configuration's own"
    found = [row[name]["right"] for row in result["rows"] for name in ways_to_decode(config)]
    assert set(found) == {0}, "nobody trained it"


def test_every_ratio_is_asked_and_equal_ways_once(monkeypatch):
    """An answer that takes all blocks is right when all are read; dense decoding is the same for every ratio."""
    model, dense = SHAPE.model(), ways_to_decode(CONFIG)["dense"]
    asked = []

    def family(tokenizer, rng, length, code):
        prompt = SHAPE.tokens(19, 0)
        return example(prompt, generate(model, [prompt], 9, dense).tokens[0], 2)

    def counted(model, opening, last, n_tokens, config, run=continued):
        asked.append(config)
        return run(model, opening, last, n_tokens, config)

    monkeypatch.setattr(answers, "FAMILIES", {"own": family})
    monkeypatch.setattr(answers, "continued", counted)
    result = measure_answers(model, None, ["own"], [30], 1, CONFIG, ratios=[0.1, 1.0], progress=False)
    some, all_blocks = result["rows"]
    assert (some["ratio"], all_blocks["ratio"], some["longest_answer"]) == (0.1, 1.0, 9)
    assert some["sparse"]["right"] == 0
    assert some["dense"]["right"] == all_blocks["dense"]["right"] == all_blocks["sparse"]["right"] == 1
    assert len(asked) == len(set(asked)) == 9
    asked.clear()
    measure_answers(model, None, ["own"], [30], 1, replace(CONFIG, interval=10), ratios=[0.1, 1.0], progress=False)
    assert len(asked) == 7, "answers of 9 tokens end before the first rectification"
    asked.clear()
    measure_answers(model, None, ["own"], [30], 1, replace(CONFIG, interval=9), ratios=[0.1, 1.0], progress=False)
    assert len(asked) == 9, "the ninth prediction of the fused schedule is dense"


def test_the_longest_answer_of_a_batch_decides(monkeypatch):
    """What no answer reaches is as if there were none; a short one beside a long one changes nothing."""
    model, dense = SHAPE.model(), ways_to_decode(CONFIG)["dense"]
    sizes, asked = iter((5, 9)), []

    def family(tokenizer, rng, length, code):
        prompt = SHAPE.tokens(19, 0)
        return example(prompt, generate(model, [prompt], next(sizes), dense).tokens[0], 2)

    def counted(model, opening, last, n_tokens, config, run=continued):
        asked.append((n_tokens, config.interval))
        return run(model, opening, last, n_tokens, config)

    monkeypatch.setattr(answers, "FAMILIES", {"own": family})
    monkeypatch.setattr(answers, "continued", counted)
    (row,) = measure_answers(model, None, ["own"], [30], 2, replace(CONFIG, interval=7), progress=False)["rows"]
    assert row["longest_answer"] == 9
    assert (9, 7) in asked, "the longer answer is rectified"


def test_shares_are_of_all_examples_by_each_way(monkeypatch):
    """A family whose answers are dense decoding's own, three of them in batches of two; once the second is wrong."""
    model, dense = SHAPE.model(), ways_to_decode(CONFIG)["dense"]
    for spoilt in (None, 1):
        seen = []

        def family(tokenizer, rng, length, code, spoilt=spoilt, seen=seen):
            prompt = SHAPE.tokens(19, len(seen))
            answer = generate(model, [prompt], 9, dense).tokens[0]
            seen.append(prompt)
            if len(seen) - 1 == spoilt:
                answer = [(answer[0] + 1) % 23, *answer[1:]]
            return example(prompt, answer, 2)

        monkeypatch.setattr(answers, "FAMILIES", {"own": family})
        result = measure_answers(model, None, ["own"], [30], 3, CONFIG, batch=2, progress=False)
        (row,) = result["rows"]
        assert row["dense"]["right"] == (1 if spoilt is None else 2 / 3)
        assert row["dense"]["last_line"] == 1
        assert row["sparse"]["right"] < row["dense"]["right"]


def test_no_question_that_is_asked_is_one_of_training(monkeypatch):
    """Training draws row i from (seed, i), and zeros at a seed's end do not count: (0, 30, 0) would be its row 30."""
    drawn = []

    def family(tokenizer, rng, length, code):
        drawn.append(rng.random())
        return example(SHAPE.tokens(19, 1), SHAPE.tokens(9, 2), 2)

    monkeypatch.setattr(answers, "FAMILIES", {"own": family})
    measure_answers(SHAPE.model(), None, ["own"], [30], 3, CONFIG, progress=False)
    assert len(set(drawn)) == 3
    assert not set(drawn) & {np.random.default_rng((0, row)).random() for row in range(64)}


def test_shares_by_hand():
    row = shares([(True, True), (False, True), (False, False), (True, True)])
    assert (row["right"], row["last_line"]) == (0.5, 0.75)
    assert row["right_95"] == pytest.approx([0.150, 0.850], abs=1e-3)  # Wilson's, of 2 in 4
    certain = shares([(True, False)] * 8)
    assert certain["right_95"] == pytest.approx([0.676, 1.0], abs=1e-3)
    assert certain["last_line_95"] == pytest.approx([0.0, 0.324], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"families": ["single_needle", "none"]},
            r"families: got \['single_needle', 'none'\]; allowed: some of single_needle",
        ),
        ({"families": []}, "families: got"),
        ({"lengths": []}, "lengths: got none"),
        ({"lengths": [97]}, "lengths: got 97; allowed: ≤ 96"),
        ({"n_examples": 0}, "n_examples: got 0"),
        ({"batch": 0}, "batch: got 0"),
        ({"config": replace(CONFIG, interval=None)}, "config.interval: got None"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"families": ["single_needle"], "lengths": [90], "n_examples": 1, "config": CONFIG, "progress": False}
    with pytest.raises(ValueError, match=message):
        measure_answers(SHAPE.model(), load_tokenizer(), **{**given, **changes})
