"""Marks of carried values, against decoding step by step, and what is made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resa.reference import GPT, GPTConfig, ReSAConfig, load_model, load_tokenizer
from resa.reference.blocks import block_bounds
from resa.reference.lab import carried
from resa.reference.lab.carried import Checks, Way, marked, measure_carried, summarise
from resa.reference.lab.measure import recovered
from resa.reference.lab.programs import UNSEEN, alias_program, program_rows
from resa.reference.lab.scorers import eight_bit_scores, per_head_scores, pooled_scores
from resa.reference.weights.checkpoint import shipped_checkpoint
from small_models import decoded_along

TOKENIZER = load_tokenizer()
CONFIG = ReSAConfig(block_size=16, active_ratio=0.1, min_blocks=2, interval=32, schedule="paper")


@pytest.fixture(scope="module")
def model():
    return load_model(shipped_checkpoint("carrying"))


def programs(n, length, seed=0):
    return [alias_program(TOKENIZER, np.random.default_rng((seed, index)), length) for index in range(n)]


def asked(n, length):
    """The programs of a measurement with seed 0."""
    return [alias_program(TOKENIZER, np.random.default_rng((0, length, index, UNSEEN)), length) for index in range(n)]


def marks_step_by_step(model, some, checks, config, prompt):
    """With the loop that generation runs on."""
    right = []
    for index, program in enumerate(some):
        logits = decoded_along(model, program.tokens[:prompt], program.tokens[prompt:-1], config)
        chosen = logits.argmax(dim=-1).tolist()  # after position prompt, …
        places = checks.at[checks.program == index]
        right += [chosen[at - 1 - prompt] == program.tokens[at] for at in places]
    return right


# Marks.


@pytest.mark.parametrize(("schedule", "interval"), [("paper", 32), ("fused", 8), ("paper", None)])
def test_marks_are_those_of_decoding_step_by_step(model, monkeypatch, schedule, interval):
    """Trained weights, selection that leaves most blocks out, and programs that don't all fit into one pass."""
    monkeypatch.setitem(carried.TOGETHER, "cpu", 2)
    config, prompt, some = replace(CONFIG, schedule=schedule, interval=interval), 64, programs(3, 112)
    checks = Checks.of(some, prompt)
    expected = marks_step_by_step(model, some, checks, config, prompt)
    assert marked(model, some, checks, [Way(config)], prompt)[Way(config)].tolist() == expected
    assert 0 < np.mean(expected) < 1 or interval is not None


def test_scores_are_what_they_are_called():
    """Per head: the largest of what each head of a group would score alone. 8 bits: bounds that lie further out."""
    torch.manual_seed(0)
    keys, query = torch.randn(1, 2, 64, 8), torch.randn(1, 4, 5, 8)
    bounds = block_bounds(keys, torch.tensor([64]), 16)
    pooled, per_head, eight = (score(query, bounds) for score in (pooled_scores, per_head_scores, eight_bit_scores))
    alone = [pooled_scores(query[:, heads], bounds) for heads in ([0, 2], [1, 3])]
    torch.testing.assert_close(per_head, torch.maximum(*alone))
    assert (eight >= pooled - 1e-6).all()
    assert (eight > pooled).any()


def test_dense_marks_are_those_of_dense_decoding(model):
    """The last token of a program is only predicted."""
    some = programs(2, 400)
    checks, way = Checks.of(some, 64), Way(replace(CONFIG, active_ratio=1.0, interval=None))
    marks = marked(model, some, checks, [way], 64)
    chosen = [model(torch.tensor([program.tokens[:-1]]))[0].argmax(dim=-1).tolist() for program in some]
    assert marks[None].tolist() == [
        chosen[program][at - 1] == some[program].tokens[at]
        for program, at in zip(checks.program, checks.at, strict=True)
    ]
    assert np.array_equal(marks[way], marks[None]), "all blocks are read"


# The measurement.


def test_every_row_is_split_at_the_ends_of_its_own_score_and_ratio(model, monkeypatch):
    """And the second half of the programs is what counts as late."""
    options = {"intervals": [16, 1], "ratios": [0.05, 0.1], "scores": ["pooled", "per-head"]}
    config, some, marks = replace(CONFIG, min_blocks=1), asked(2, 449), {}
    monkeypatch.setattr(carried, "marked", lambda *asked: marks.update(marked(*asked)) or marks)
    result = measure_carried(model, TOKENIZER, 2, 449, 64, config, **options)
    checks, rows = Checks.of(some, 64), result["rows"]
    assert (result["programs"], result["length"], result["checks"]) == (2, 449, len(checks.at))

    def way(row, interval):
        own = {"decode-only": {"interval": 1, "schedule": "paper"}, "never": {"interval": None}}
        changes = own.get(interval, {"interval": interval})
        return Way(replace(config, active_ratio=row["ratio"], **changes), row["score"])

    assert set(marks) == {None, *(way(row, row["interval"]) for row in rows)}
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        own, exact, never = (marks[way(row, name)] for name in (row["interval"], "decode-only", "never"))
        assert row["right"] == checks.per_program(own).mean()
        assert row["step_error"] == checks.per_program(marks[None] - exact).mean()
        assert row["drift"] == checks.per_program(exact - own).mean()
        for part, where in (("recovered", checks.at >= 0), ("recovered_late", checks.at >= 224)):
            drift, left = (checks.per_program(exact - each, where) for each in (never, own))
            assert (
                recovered(part, drift, left, is_end=row["interval"] in ("decode-only", "never")).items() <= row.items()
            )
    assert all(row["recovered"] == 1 for row in rows if row["interval"] == 1), "as good as decode-only"
    assert len({row["step_error"] for row in rows}) == 4
    assert {row["drift"] > 0 for row in rows if row["interval"] == "never"} == {True}, "the test would see nothing"
    assert rows[0]["dense"] > 0.98


def test_no_program_that_is_asked_is_a_row_of_training(monkeypatch):
    """A run of training with the same seed has a row for every number, that of the length among them."""
    seen = []

    def recorded(tokenizer, rng, length):
        seen.append(alias_program(tokenizer, rng, length))
        raise InterruptedError

    model = GPT(GPTConfig(TOKENIZER.n_vocab, 1, 2, 1, 8, 16, 16, context=512))
    monkeypatch.setattr(carried, "alias_program", recorded)
    with pytest.raises(InterruptedError):
        measure_carried(model, TOKENIZER, 1, 320, 64, CONFIG, intervals=[16], ratios=[0.1])
    rows = program_rows(TOKENIZER, 0, 321, 320)
    assert all(seen[0].tokens != row.tolist() for row in rows)
    assert alias_program(TOKENIZER, np.random.default_rng((0, 320, 0)), 320).tokens == rows[320].tolist()


def test_the_last_token_is_only_predicted(model):
    """Programs may be one token longer than the context."""
    small = GPT(replace(model.config, context=384))
    small.load_state_dict(model.state_dict())
    more = {"intervals": [], "ratios": [0.1]}
    assert measure_carried(small, TOKENIZER, 1, 385, 64, CONFIG, **more)["length"] == 385
    with pytest.raises(ValueError, match="length: got 386; allowed: ≤ 385, for the context"):
        measure_carried(small, TOKENIZER, 1, 386, 64, CONFIG, **more)


# Sums.


def test_means_are_over_programs_that_have_checks_where_it_is_asked():
    """Program 1 has nothing to check."""
    checks = Checks(np.array([0, 0, 2, 3]), *(np.arange(4) for _ in range(3)))
    values = np.array([1.0, 0.0, 1.0, 0.0])
    assert checks.per_program(values).tolist() == [0.5, 1.0, 0.0]
    assert checks.per_program(values, values == 1).tolist() == [1.0, 1.0]
    assert checks.per_program(values, values > 1).tolist() == []


def test_shares_by_age_depth_and_position():
    ages = np.array([0, 31, 32, 127, 128, 511, 512, 2047, 2048])
    at = np.array([511, 512, 0, 0, 1023, 1024, 0, 0, 0])
    checks = Checks(np.zeros(9, dtype=int), at, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1]), ages)
    right = np.array([1.0, 0, 0, 0, 1, 1, 1, 0, 1])
    row = summarise(checks, right, right, right)
    assert row["by_age"] == [1 / 2, 0, 1, 1 / 2, 1]
    assert row["by_depth"] == [2 / 5, 3 / 4]
    assert row["by_position"] == [3 / 6, 1 / 2, 1]
    assert row["by_position_95"][0] == [1 / 2, 1 / 2]


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_programs", {"n_programs": 0}),
        ("length", {"length": 99_999}),
        ("length", {"prompt_tokens": 288, "length": 290}),  # nothing is asserted in two tokens
        ("length: got 256; allowed: an integer ≥ 257", {"length": 256}),
        ("interval", {"intervals": [0]}),
        ("prompt_tokens", {"prompt_tokens": 0}),
        ("active_ratio", {"ratios": [0.1, 2]}),
    ],
)
def test_bad_arguments_are_refused_by_name(monkeypatch, named, changes):
    monkeypatch.setattr(carried, "exact_stream", lambda *_: pytest.fail("something was decoded"))
    model = GPT(GPTConfig(TOKENIZER.n_vocab, 1, 2, 1, 8, 16, 16, context=512))
    arguments = {"n_programs": 1, "length": 300, "prompt_tokens": 256, "config": CONFIG}
    arguments |= {"intervals": [16], "ratios": [0.1]} | changes
    with pytest.raises(ValueError, match=named):
        measure_carried(model, TOKENIZER, **arguments)
