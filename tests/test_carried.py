"""Marks of carried values and of written programs, against decoding step by step and against a text run by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resa.reference import GPT, GPTConfig, ReSAConfig, generate, load_model, load_tokenizer, prefill
from resa.reference.blocks import block_bounds
from resa.reference.checkpoint import shipped_checkpoint
from resa.reference.evals import carried, written
from resa.reference.evals.carried import SCORES, Checks, Marks, Way, marked, measure_carried
from resa.reference.evals.statistics import shares_by_kind
from resa.reference.evals.written import Line, asserted_lines, measure_written, summarise
from resa.reference.generate import decode_along
from resa.reference.programs import UNSEEN, alias_program, program_rows

TOKENIZER = load_tokenizer()
CONFIG = ReSAConfig(block_size=16, active_ratio=0.1, min_blocks=2, interval=32, schedule="paper")


@pytest.fixture(scope="module")
def model():
    return load_model(shipped_checkpoint("carrying"))


def programs(n, length, seed=0):
    return [alias_program(TOKENIZER, np.random.default_rng((seed, index)), length) for index in range(n)]


def marks_of(model, some, checks, config, prompt, batch, score="pooled"):
    way = Way(config, score)
    return marked(model, some, checks, [way], prompt, batch)[way]


@pytest.mark.parametrize(("schedule", "interval"), [("paper", 32), ("fused", 32), ("fused", 8), ("paper", None)])
def test_marks_are_those_of_decoding_step_by_step(model, schedule, interval):
    """Trained weights, selection that leaves most blocks out, and the loop that generation runs on."""
    config, prompt = replace(CONFIG, schedule=schedule, interval=interval), 64
    some = programs(2, 320)
    checks = Checks.of(some, prompt)
    marks = marks_of(model, some, checks, config, prompt, batch=1)
    cache = model.new_cache(2, 320, 16)
    tokens = [program.tokens for program in some]
    prefill(model, [row[:prompt] for row in tokens], cache)
    steps = decode_along(model, cache, [row[prompt:-1] for row in tokens], config)
    chosen = torch.stack([logits.argmax(dim=-1) for logits, _ in steps], dim=1)  # after position prompt, …
    expected = [
        int(chosen[program, at - 1 - prompt]) == tokens[program][at]
        for program, at in zip(checks.program, checks.at, strict=True)
    ]
    assert marks.right.tolist() == expected
    assert 0 < np.mean(expected) < 1 or interval is not None


def largest_bound(query, bounds, lengths, block_size):
    """Of the heads' own bounds over every block of one step, channel by channel."""
    group = query.unflatten(1, (bounds.shape[1], -1))[:, :, :, :, None]  # [B, Hkv, G, D, 1]
    lo, hi = bounds[:, :, None].unbind(dim=3)
    products = torch.maximum(torch.nan_to_num(group * lo, neginf=0.0), torch.nan_to_num(group * hi, posinf=0.0))
    beyond = torch.arange(bounds.shape[-1]) * block_size >= lengths.view(-1, 1, 1)
    return products.sum(dim=3).amax(dim=2).masked_fill(beyond, float("-inf"))


def test_per_head_scores_select_as_decoding_step_by_step_does(model):
    """With operations that score a step by each head's own bounds; pooled scores would mark otherwise."""
    config, prompt = replace(CONFIG, interval=32, active_ratio=0.05), 64
    some = programs(2, 320)
    checks = Checks.of(some, prompt)
    marks = marks_of(model, some, checks, config, prompt, 2, "per-head")
    scoring = model.with_ops(replace(model.ops, score_blocks=largest_bound))
    cache = scoring.new_cache(2, 320, 16)
    tokens = [program.tokens for program in some]
    prefill(scoring, [row[:prompt] for row in tokens], cache)
    steps = decode_along(scoring, cache, [row[prompt:-1] for row in tokens], config)
    chosen = torch.stack([logits.argmax(dim=-1) for logits, _ in steps], dim=1)
    expected = [
        int(chosen[program, at - 1 - prompt]) == tokens[program][at]
        for program, at in zip(checks.program, checks.at, strict=True)
    ]
    assert marks.right.tolist() == expected
    assert marks_of(model, some, checks, config, prompt, 2).right.tolist() != expected


def test_ways_are_marked_together_as_alone(model):
    """In batches of which the last is smaller; `on_pass` counts batches and ways."""
    some, passes = programs(3, 320), []
    checks = Checks.of(some, 64)
    ways = [Way(replace(CONFIG, interval=None)), Way(CONFIG), Way(CONFIG, "per-head")]
    found = marked(model, some, checks, ways, 64, 2, lambda: passes.append(1))
    assert list(found) == ways
    assert len(passes) == 6
    for way, marks in found.items():
        alone = marks_of(model, some, checks, way.config, 64, 3, way.score)
        assert np.array_equal(marks.right, alone.right)
        assert np.array_equal(marks.dense_right, alone.dense_right)


def test_every_score_has_rows_of_its_own(model):
    """As `marked` finds them; two rows of one ratio differ in nothing but the score."""
    options = {"intervals": [32], "ratios": [0.05], "prompt_tokens": 64, "progress": False}
    result = measure_carried(model, TOKENIZER, 2, 321, CONFIG, scores=["pooled", "per-head"], **options)
    rows = {(row["score"], row["interval"]): row["right"] for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6
    some = [alias_program(TOKENIZER, np.random.default_rng((0, 321, index, UNSEEN)), 321) for index in range(2)]
    checks = Checks.of(some, 64)
    for (score, interval), right in rows.items():
        way = {"decode-only": {"interval": 1}, "never": {"interval": None}}.get(interval, {"interval": interval})
        own = marks_of(model, some, checks, replace(CONFIG, active_ratio=0.05, **way), 64, 2, score)
        assert right == pytest.approx(checks.per_program(own.right.astype(float)).mean())
    assert any(rows["pooled", interval] != rows["per-head", interval] for interval in ("decode-only", "never", 32))


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


def test_a_configuration_that_is_all_dense_loses_nothing(model):
    """Every block attended: the marks are plain dense decoding's, one by one, and all parts of the loss are 0."""
    some = programs(2, 400)
    checks = Checks.of(some, 64)
    for config in (replace(CONFIG, active_ratio=1.0, interval=None), replace(CONFIG, interval=1, schedule="fused")):
        marks = marks_of(model, some, checks, config, 64, batch=2)
        assert np.array_equal(marks.right, marks.dense_right)
    result = measure_carried(
        model, TOKENIZER, 2, 400, CONFIG, intervals=[16], ratios=[1.0], prompt_tokens=64, progress=False
    )
    for row in result["rows"]:
        assert row["right"] == row["dense"]
        assert (row["step_error"], row["drift"]) == (0, 0)


def test_the_shipped_model_carries_values_and_sparse_decoding_loses_some(model):
    result = measure_carried(
        model,
        TOKENIZER,
        4,
        1024,
        replace(CONFIG, min_blocks=4),
        intervals=[16],
        ratios=[0.05],
        prompt_tokens=128,
        progress=False,
    )
    rows = {row["interval"]: row for row in result["rows"]}
    assert set(rows) == {"decode-only", "never", 16}
    assert {row["score"] for row in result["rows"]} == {"pooled"}
    assert rows["never"]["dense"] > 0.98
    assert rows["never"]["drift"] > 0
    assert rows["decode-only"]["drift"] == 0
    total, left = rows["never"]["drift"], rows[16]["drift"]
    assert rows[16]["recovered"] == pytest.approx(1 - left / total)
    assert rows[16]["right"] == pytest.approx(rows["decode-only"]["right"] - left)


@pytest.mark.parametrize("measure", ["carried", "written"])
def test_no_program_that_is_asked_is_a_row_of_training(monkeypatch, measure):
    """A run of training with the same seed has a row for every number, that of the length among them."""
    asked = []

    def recorded(tokenizer, rng, length):
        asked.append(alias_program(tokenizer, rng, length))
        raise InterruptedError

    model = GPT(GPTConfig(TOKENIZER.n_vocab, 1, 2, 1, 8, 16, 16, context=512))
    monkeypatch.setattr({"carried": carried, "written": written}[measure], "alias_program", recorded)
    run, n, more = {
        "carried": (measure_carried, 320, {"intervals": [16], "ratios": [0.1], "prompt_tokens": 64}),
        "written": (measure_written, 8, {"prompt_tokens": 320}),
    }[measure]
    with pytest.raises(InterruptedError):
        run(model, TOKENIZER, 1, n, CONFIG, **more)
    rows = program_rows(TOKENIZER, 0, 321, 320, progress=False)
    assert all(asked[0].tokens != row.tolist() for row in rows)


def test_means_are_over_programs():
    """Program 1 has nothing to check."""
    checks = Checks(np.array([0, 0, 2, 3]), *(np.arange(4) for _ in range(3)))
    assert checks.per_program(np.array([1.0, 0.0, 1.0, 0.0])).tolist() == [0.5, 1.0, 0.0]


def test_shares_by_kind_are_pooled_and_their_intervals_drawn_by_document():
    """Document 1 gets 2 of 2 right of kind 0, document 3 none of 1; kind 1 stands in one of them, kind 2 in none."""
    right, document, kind = (np.array(values) for values in ([1, 1, 0, 1], [1, 1, 3, 3], [0, 0, 0, 1]))
    found = shares_by_kind("by_kind", right, document, kind, 3)
    draws = np.random.default_rng(0).integers(2, size=(2000, 2))  # of the two documents that have checks
    ratio = np.array([2, 0])[draws].sum(axis=1) / np.array([2, 1])[draws].sum(axis=1)
    assert found["by_kind"] == [2 / 3, 1.0, None]
    assert found["by_kind_95"] == [np.quantile(ratio, (0.025, 0.975)).tolist(), [None, None], [None, None]]
    nothing = np.zeros(0, dtype=int)
    assert shares_by_kind("by_kind", nothing, nothing, nothing, 1) == {"by_kind": [None], "by_kind_95": [[None, None]]}


def test_what_is_recovered_is_counted_where_it_is_asked_for():
    """Never rectifying loses all four values of either program; rectifying loses one late, and one early."""
    checks = Checks(np.repeat([0, 1], 4), *(np.arange(8) for _ in range(3)))
    right, is_late = np.ones(8, dtype=bool), np.array([0, 0, 1, 1] * 2, dtype=bool)
    exact, never = Marks(right, right), Marks(~right, right)
    own = Marks(np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=bool), right)
    assert carried.recovered(checks, own, exact, never, right) == (3 / 4, [3 / 4, 3 / 4])
    assert carried.recovered(checks, own, exact, never, is_late) == (3 / 4, [1 / 2, 1])
    assert carried.recovered(checks, own, exact, never, ~right) is None, "nothing is asked"
    assert carried.recovered(checks, own, exact, exact, right) is None, "there is no drift"


def test_shares_by_age_depth_and_position():
    ages = np.array([0, 31, 32, 127, 128, 511, 512, 2047, 2048])
    at = np.array([511, 512, 0, 0, 1023, 1024, 0, 0, 0])
    checks = Checks(np.zeros(9, dtype=int), at, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1]), ages)
    right = np.array([1, 0, 0, 0, 1, 1, 1, 0, 1], dtype=bool)
    row = carried.summarise(checks, Marks(right, right), Marks(right, right))
    assert row["by_age"] == [1 / 2, 0, 1, 1 / 2, 1]
    assert row["by_depth"] == [2 / 5, 3 / 4]
    assert row["by_position"] == [3 / 6, 1 / 2, 1]
    assert row["by_position_95"][0] == [1 / 2, 1 / 2]


def test_every_row_is_split_at_the_ends_of_its_own_score_and_ratio(model):
    """And the second half of the programs is what counts as late."""
    options = {"intervals": [16, 1], "ratios": [0.05, 0.1], "scores": ["pooled", "per-head"], "prompt_tokens": 64}
    config = replace(CONFIG, min_blocks=1)
    rows = measure_carried(model, TOKENIZER, 4, 513, config, **options, batch=3, progress=False)["rows"]
    some = [alias_program(TOKENIZER, np.random.default_rng((0, 513, index, UNSEEN)), 513) for index in range(4)]
    checks = Checks.of(some, 64)

    def way(row, interval):
        interval = {"decode-only": 1, "never": None}.get(interval, interval)
        return Way(replace(config, active_ratio=row["ratio"], interval=interval), row["score"])

    marks = marked(model, some, checks, [way(row, row["interval"]) for row in rows], 64, 4)
    for row in rows:
        own, exact, never = (marks[way(row, name)] for name in (row["interval"], "decode-only", "never"))
        step_error, drift = own.dense_right.astype(float) - exact.right, exact.right.astype(float) - own.right
        assert row["step_error"] == checks.per_program(step_error).mean()
        assert row["drift"] == checks.per_program(drift).mean()
        for part, where in (("recovered", checks.at >= 0), ("recovered_late", checks.at >= 256)):
            is_end = row["interval"] in ("decode-only", "never")
            told = None if is_end else carried.recovered(checks, own, exact, never, where)
            assert (row[part], row[f"{part}_95"]) == (told or (None, None))
    assert all(row["recovered"] == 1 for row in rows if row["interval"] == 1), "as good as decode-only"
    assert len({row["step_error"] for row in rows}) == 4


def test_what_cant_be_decoded_at_once_is_refused_before_anything_is(model, monkeypatch):
    monkeypatch.setattr(carried, "exact_stream", lambda *_: pytest.fail("something was decoded"))
    with pytest.raises(ValueError, match=r"config\.interval: got 12; allowed: a divisor"):
        measure_carried(model, TOKENIZER, 1, 321, CONFIG, intervals=[12], ratios=[0.1], prompt_tokens=64)
    with pytest.raises(ValueError, match=r"prompt_tokens: got 64\.0"):
        measure_carried(model, TOKENIZER, 1, 321, CONFIG, intervals=[16], ratios=[0.1], prompt_tokens=64.0)
    with pytest.raises(ValueError, match="prompt_tokens: got 60"):
        measure_carried(model, TOKENIZER, 1, 321, CONFIG, intervals=[16], ratios=[0.1], prompt_tokens=60)


def test_the_last_token_is_only_predicted(model):
    """Programs may be one token longer than the context."""
    config = replace(model.config, context=384)
    small = GPT(config)
    small.load_state_dict(model.state_dict())
    result = measure_carried(
        small, TOKENIZER, 1, 385, CONFIG, intervals=[], ratios=[0.1], prompt_tokens=64, progress=False
    )
    assert result["length"] == 385


def test_lines_are_run_in_their_order():
    def tokens(text):
        return TOKENIZER.encode_ordinary(text)

    prompt = tokens("index = 5\nvalue")
    text = " = 3\nassert index == 5\nassert value == 4\nindex = value\nassert index == 3\nassert root == 1\n"
    text += "name = root\nassert name == 1\nassert value 3\nassert value != 3\nassert index =="
    found = asserted_lines(TOKENIZER, prompt, tokens(text))
    assert [line.is_right for line in found] == [True, False, True, None, None]
    assert found[0] == Line(len(tokens(" = 3\nassert index == 5\n")) - 1, True)


def test_written_programs_are_checked_for_every_way(model):
    result = measure_written(model, TOKENIZER, 2, 96, replace(CONFIG, min_blocks=16), prompt_tokens=128, progress=False)
    ways = result["ways"]
    assert set(ways) == {"dense", "sparse", "sparse, 2 dense layers", "ReSA", "decode-only"}
    # All blocks are attended: all write the same.
    assert len({str(row["by_position"]) for row in ways.values()}) == 1
    assert ways["sparse"]["below_dense"] == ways["sparse"]["below_decode_only"] == 0
    assert ways["dense"]["checked"] > 0


def test_written_programs_are_compared_by_hand():
    """Four assertions per program and way; one that has nothing to check in one way is left out of all."""
    right = {"dense": (4, 4, 4), "sparse": (1, 2, 4), "ReSA": (2, 3, 4), "decode-only": (3, 3, 4)}
    marks = {name: [[Line(i, i < n) for i in range(4)] for n in counts] for name, counts in right.items()}
    marks["sparse"][2] = [Line(0, None)]
    rows = summarise(marks, 512)
    assert rows["sparse"]["right"] == pytest.approx(1.5 / 4)
    assert rows["sparse"]["below_dense"] == pytest.approx(2.5 / 4)
    assert rows["sparse"]["below_decode_only"] == pytest.approx(1.5 / 4)
    assert rows["ReSA"]["below_decode_only"] == pytest.approx(0.5 / 4)
    assert rows["ReSA"]["recovered"] == pytest.approx(2 / 3)  # one of two, and one of one
    assert rows["ReSA"]["recovered_95"] == pytest.approx([1 / 2, 1])
    assert [rows[name]["recovered"] for name in ("dense", "sparse", "decode-only")] == [None] * 3
    assert rows["dense"]["by_position"] == [1.0]
    assert rows["sparse"]["by_position"] == [3 / 8]
    assert rows["sparse"]["by_position_95"] == [[1 / 4, 1 / 2]]
    marks["sparse"] = [[Line(511, True), Line(512, False)], [Line(511, True), Line(512, False)], [Line(1023, False)]]
    assert summarise(marks, 1025)["sparse"]["by_position"] == [1, 0, None]


def test_written_programs_use_the_generator_given(model):
    calls = []

    def decode(model, prompts, n_tokens, config, **options):
        calls.append((len(prompts), config.interval, options["temperature"], len(options["generator"])))
        return generate(model, prompts, n_tokens, config, **options)

    measure_written(model, TOKENIZER, 3, 4, CONFIG, prompt_tokens=128, batch=2, decode=decode, progress=False)
    assert calls[:2] == [(2, 1, 1.0, 2), (1, 1, 1.0, 1)]
    assert len(calls) == 10


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_programs", {"n_programs": 0}),
        ("batch", {"batch": 0}),
        ("seed", {"seed": -1}),
        ("length", {"length": 99_999}),
        ("length", {"prompt_tokens": 288, "length": 290}),  # nothing is asserted in two tokens
        ("config.interval", {"intervals": [16, 12]}),
        ("interval", {"intervals": [0]}),
        ("prompt_tokens", {"prompt_tokens": 100}),
        ("active_ratio", {"ratios": [0.1, 2]}),
        ("scores", {"scores": ["pooled", "best"]}),
        ("scores", {"scores": []}),
    ],
)
def test_bad_arguments_are_refused_by_name(named, changes):
    config = GPTConfig(TOKENIZER.n_vocab, 1, 2, 1, 8, 16, 16, context=512)
    arguments = {"n_programs": 1, "length": 300, "intervals": [16], "ratios": [0.1]} | changes
    n, length = arguments.pop("n_programs"), arguments.pop("length")
    with pytest.raises(ValueError, match=named):
        measure_carried(GPT(config), TOKENIZER, n, length, CONFIG, **arguments, progress=False)
