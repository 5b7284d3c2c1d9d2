"""Marks of carried values, against decoding step by step, and what is made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resa.reference import GPT, GPTConfig, ReSAConfig, load_model, load_tokenizer, prefill
from resa.reference.blocks import block_bounds
from resa.reference.lab import carried
from resa.reference.lab.carried import SCORES, Checks, Marks, Way, marked, measure_carried, recovered, summarise
from resa.reference.lab.parallel import decode_along
from resa.reference.lab.programs import UNSEEN, alias_program, program_rows
from resa.reference.weights.checkpoint import shipped_checkpoint

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


def marks_of(model, some, checks, config, prompt, score="pooled"):
    way = Way(config, score)
    return marked(model, some, checks, [way], prompt)[way]


def marks_step_by_step(model, some, checks, config, prompt):
    right = []
    for index, program in enumerate(some):
        cache = model.new_cache(len(program.tokens), config.block_size)
        prefill(model, program.tokens[:prompt], cache)
        steps = decode_along(model, cache, program.tokens[prompt:-1], config)
        chosen = [int(logits.argmax()) for logits, _ in steps]  # after position prompt, …
        places = checks.at[checks.program == index]
        right += [chosen[at - 1 - prompt] == program.tokens[at] for at in places]
    return right


# ---- Marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "interval"), [("paper", 32), ("fused", 8), ("paper", None)])
def test_marks_are_those_of_decoding_step_by_step(model, schedule, interval):
    """Trained weights, selection that leaves most blocks out, and the loop that generation runs on."""
    config, prompt, some = replace(CONFIG, schedule=schedule, interval=interval), 64, programs(2, 256)
    checks = Checks.of(some, prompt)
    expected = marks_step_by_step(model, some, checks, config, prompt)
    assert marks_of(model, some, checks, config, prompt).right.tolist() == expected
    assert 0 < np.mean(expected) < 1 or interval is not None


def largest_bound(query, bounds, lengths, block_size):
    """The largest of the heads' own bounds over every block of one step, channel by channel."""
    group = query.unflatten(1, (bounds.shape[1], -1))[:, :, :, :, None]  # [B, Hkv, G, D, 1]
    lo, hi = bounds[:, :, None].unbind(dim=3)
    products = torch.maximum(torch.nan_to_num(group * lo, neginf=0.0), torch.nan_to_num(group * hi, posinf=0.0))
    beyond = torch.arange(bounds.shape[-1]) * block_size >= lengths.view(-1, 1, 1)
    return products.sum(dim=3).amax(dim=2).masked_fill(beyond, float("-inf"))


def test_per_head_scores_select_as_decoding_step_by_step_does(model):
    """With operations that score a step by each head's own bounds; pooled scores would mark otherwise."""
    config, prompt, some = replace(CONFIG, active_ratio=0.05), 64, programs(2, 320)
    checks = Checks.of(some, prompt)
    scoring = model.with_ops(replace(model.ops, score_blocks=largest_bound))
    expected = marks_step_by_step(scoring, some, checks, config, prompt)
    assert marks_of(model, some, checks, config, prompt, "per-head").right.tolist() == expected
    assert marks_of(model, some, checks, config, prompt).right.tolist() != expected


def test_every_score_is_an_upper_bound():
    """8 bits at least pooled, per head at least any head's own products; eq. 4 with pooled queries."""
    torch.manual_seed(0)
    keys, query = torch.randn(1, 2, 64, 8), torch.randn(1, 4, 5, 8)
    bounds = block_bounds(keys, torch.tensor([64]), 16)
    pooled, per_head, eight = (SCORES[name](query, bounds) for name in ("pooled", "per-head", "8-bits"))
    assert (eight >= pooled - 1e-6).all()
    assert (eight > pooled).any()
    own = query.unflatten(1, (2, 2)) @ keys[:, :, None].mT  # [B, Hkv, G, T, keys]
    largest = own.unflatten(-1, (4, 16)).amax(dim=-1)
    assert (per_head >= largest.amax(dim=2) - 1e-5).all()
    assert (pooled >= own.mean(dim=2).unflatten(-1, (4, 16)).amax(dim=-1) - 1e-5).all()


def test_dense_marks_are_those_of_all_blocks(model):
    """And of dense decoding; the last token of a program is only predicted."""
    some = programs(2, 400)
    checks = Checks.of(some, 64)
    for config in (replace(CONFIG, active_ratio=1.0, interval=None), replace(CONFIG, interval=1, schedule="fused")):
        marks = marks_of(model, some, checks, config, 64)
        assert np.array_equal(marks.right, marks.dense_right)
    chosen = [model(torch.tensor([program.tokens[:-1]]))[0].argmax(dim=-1).tolist() for program in some]
    assert marks.dense_right.tolist() == [
        chosen[program][at - 1] == some[program].tokens[at]
        for program, at in zip(checks.program, checks.at, strict=True)
    ]


# ---- The measurement -------------------------------------------------------------------------------------------------


def test_every_row_is_split_at_the_ends_of_its_own_score_and_ratio(model):
    """And the second half of the programs is what counts as late."""
    options = {"intervals": [16, 1], "ratios": [0.05, 0.1], "scores": ["pooled", "per-head"], "prompt_tokens": 64}
    config, some = replace(CONFIG, min_blocks=1), asked(3, 449)
    result = measure_carried(model, TOKENIZER, 3, 449, config, **options, progress=False)
    checks, rows = Checks.of(some, 64), result["rows"]
    assert (result["programs"], result["length"], result["checks"]) == (3, 449, len(checks.at))

    def way(row, interval):
        own = {"decode-only": {"interval": 1, "schedule": "paper"}, "never": {"interval": None}}
        changes = own.get(interval, {"interval": interval})
        return Way(replace(config, active_ratio=row["ratio"], **changes), row["score"])

    marks = marked(model, some, checks, [way(row, row["interval"]) for row in rows], 64)
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        own, exact, never = (marks[way(row, name)] for name in (row["interval"], "decode-only", "never"))
        step_error, drift = own.dense_right.astype(float) - exact.right, exact.right.astype(float) - own.right
        assert row["right"] == checks.per_program(own.right.astype(float)).mean()
        assert row["step_error"] == checks.per_program(step_error).mean()
        assert row["drift"] == checks.per_program(drift).mean()
        for part, where in (("recovered", checks.at >= 0), ("recovered_late", checks.at >= 224)):
            is_end = row["interval"] in ("decode-only", "never")
            share = None if is_end else recovered(checks, own, exact, never, where)
            assert (row[part], row[f"{part}_95"]) == (share or (None, None))
    assert all(row["recovered"] == 1 for row in rows if row["interval"] == 1), "as good as decode-only"
    assert len({row["step_error"] for row in rows}) == 4
    assert {row["drift"] > 0 for row in rows if row["interval"] == "never"} == {True}, "the test would see nothing"
    assert rows[0]["dense"] > 0.98


@pytest.mark.parametrize("seed", [0, 5])
def test_no_program_that_is_asked_is_a_row_of_training(monkeypatch, seed):
    """A run of training with the same seed has a row for every number, that of the length among them."""
    seen = []

    def recorded(tokenizer, rng, length):
        seen.append(alias_program(tokenizer, rng, length))
        raise InterruptedError

    model = GPT(GPTConfig(TOKENIZER.n_vocab, 1, 2, 1, 8, 16, 16, context=512))
    monkeypatch.setattr(carried, "alias_program", recorded)
    more = {"intervals": [16], "ratios": [0.1], "prompt_tokens": 64, "seed": seed}
    with pytest.raises(InterruptedError):
        measure_carried(model, TOKENIZER, 1, 320, CONFIG, **more)
    rows = program_rows(TOKENIZER, seed, 321, 320, progress=False)
    assert all(seen[0].tokens != row.tolist() for row in rows)


def test_the_last_token_is_only_predicted(model):
    """Programs may be one token longer than the context."""
    small = GPT(replace(model.config, context=384))
    small.load_state_dict(model.state_dict())
    more = {"intervals": [], "ratios": [0.1], "prompt_tokens": 64, "progress": False}
    assert measure_carried(small, TOKENIZER, 1, 385, CONFIG, **more)["length"] == 385
    with pytest.raises(ValueError, match="length: got 386; allowed: ≤ 385, for the context"):
        measure_carried(small, TOKENIZER, 1, 386, CONFIG, **more)


# ---- Sums ------------------------------------------------------------------------------------------------------------


def test_means_are_over_programs():
    """Program 1 has nothing to check."""
    checks = Checks(np.array([0, 0, 2, 3]), *(np.arange(4) for _ in range(3)))
    assert checks.per_program(np.array([1.0, 0.0, 1.0, 0.0])).tolist() == [0.5, 1.0, 0.0]


def test_recovery_is_counted_where_it_is_asked_for():
    """Never rectifying loses all four values of either program; rectifying loses one late, and one early."""
    checks = Checks(np.repeat([0, 1], 4), *(np.arange(8) for _ in range(3)))
    right, is_late = np.ones(8, dtype=bool), np.array([0, 0, 1, 1] * 2, dtype=bool)
    exact, never = Marks(right, right), Marks(~right, right)
    own = Marks(np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=bool), right)
    assert recovered(checks, own, exact, never, right) == (3 / 4, [3 / 4, 3 / 4])
    assert recovered(checks, own, exact, never, is_late) == (3 / 4, [1 / 2, 1])
    assert recovered(checks, own, exact, never, ~right) is None, "nothing is asked"
    assert recovered(checks, own, exact, exact, right) is None, "there is no drift"


def test_shares_by_age_depth_and_position():
    ages = np.array([0, 31, 32, 127, 128, 511, 512, 2047, 2048])
    at = np.array([511, 512, 0, 0, 1023, 1024, 0, 0, 0])
    checks = Checks(np.zeros(9, dtype=int), at, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1]), ages)
    right = np.array([1, 0, 0, 0, 1, 1, 1, 0, 1], dtype=bool)
    row = summarise(checks, Marks(right, right), Marks(right, right))
    assert row["by_age"] == [1 / 2, 0, 1, 1 / 2, 1]
    assert row["by_depth"] == [2 / 5, 3 / 4]
    assert row["by_position"] == [3 / 6, 1 / 2, 1]
    assert row["by_position_95"][0] == [1 / 2, 1 / 2]


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_programs", {"n_programs": 0}),
        ("seed", {"seed": -1}),
        ("length", {"length": 99_999}),
        ("length", {"prompt_tokens": 288, "length": 290}),  # nothing is asserted in two tokens
        ("length: got 256; allowed: an integer ≥ 257", {"length": 256}),
        ("interval", {"intervals": [0]}),
        ("prompt_tokens", {"prompt_tokens": 64.0}),
        ("active_ratio", {"ratios": [0.1, 2]}),
        ("scores", {"scores": ["pooled", "best"]}),
        ("scores", {"scores": []}),
    ],
)
def test_bad_arguments_are_refused_by_name(monkeypatch, named, changes):
    monkeypatch.setattr(carried, "exact_stream", lambda *_: pytest.fail("something was decoded"))
    model = GPT(GPTConfig(TOKENIZER.n_vocab, 1, 2, 1, 8, 16, 16, context=512))
    arguments = {"n_programs": 1, "length": 300, "config": CONFIG, "intervals": [16], "ratios": [0.1]} | changes
    with pytest.raises(ValueError, match=named):
        measure_carried(model, TOKENIZER, **arguments, progress=False)
