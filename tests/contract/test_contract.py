"""Checks stand around the operations, not inside a pass. The way to the paper is short. The rhythm is stated once."""

import ast
import sys
import traceback
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from resa.reference import REFERENCE_OPS, ReSAConfig, checked, generate, prefill, rectify, sparse_step
from small_models import Shape

ROOTS = [Path(find_spec(package).origin).parent for package in ("resa.reference", "resa.fast")]
CHECKED_OPS = checked(REFERENCE_OPS)
KEYS, LENGTHS, CONFIG = torch.zeros(1, 1, 8, 4), torch.tensor([8]), ReSAConfig(block_size=4, min_blocks=1)
CALLS = {
    "block_bounds": (KEYS, LENGTHS, 4),
    "score_blocks": (torch.zeros(1, 2, 4), torch.zeros(1, 1, 2, 4, 2), LENGTHS, 4),
    "select_blocks": (torch.zeros(1, 1, 2), LENGTHS, CONFIG),
    "sparse_attention": (torch.zeros(1, 2, 4), KEYS, KEYS, torch.zeros(1, 1, 1, dtype=torch.int32), LENGTHS, 4),
    "dense_attention": (torch.zeros(1, 2, 1, 4), KEYS, KEYS, LENGTHS),
}


@pytest.mark.parametrize("name", CALLS)
def test_public_operations_refuse_what_those_inside_a_pass_run(name):
    """Lengths in float32 break the contract and harm no mathematics."""
    loose = [each.float() if each is LENGTHS else each for each in CALLS[name]]
    plain, guarded = getattr(REFERENCE_OPS, name), getattr(CHECKED_OPS, name)
    assert torch.equal(guarded(*CALLS[name]), plain(*CALLS[name]))
    assert torch.equal(plain(*loose), plain(*CALLS[name]))
    with pytest.raises(ValueError, match=r"^lengths: got torch\.float32; allowed: int32, int64$"):
        guarded(*loose)
    assert guarded.__doc__ == plain.__doc__


def test_limits_come_after_the_contract():
    seen = []

    def limits(operation, arguments, sizes):
        seen.append((operation, sorted(arguments), sizes))
        raise ValueError("no kernel for it")

    narrow = checked(REFERENCE_OPS, limits=limits)
    for name, call in CALLS.items():
        with pytest.raises(ValueError, match="no kernel for it"):
            getattr(narrow, name)(*call)
    assert [operation for operation, _, _ in seen] == list(CALLS)
    assert seen[0][1:] == (["block_size", "keys", "lengths"], {"B": 1, "Hkv": 1, "T_max": 8, "D": 4})
    with pytest.raises(ValueError, match=r"^lengths"):
        narrow.block_bounds(KEYS, LENGTHS.float(), 4)
    assert len(seen) == len(CALLS)


def count_checks(work):
    """Calls of the functions that check arguments while `work` runs."""
    calls, checks = [], str(ROOTS[0] / "checks.py")

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename == checks and code.co_name not in ("accumulation_dtype", "is_integer"):
            calls.append(code.co_name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_checks_do_not_grow_with_the_layers():
    """A sparse step checks its token and its place once; its layers check nothing. Nor do those of a dense pass."""

    def counted(n_layers):
        model = Shape(layers=n_layers).model(torch.float32)
        cache = model.new_cache(16, 4)
        prefill(model, list(range(10)), cache)
        step = count_checks(lambda: sparse_step(model, 1, cache, CONFIG))
        return step, count_checks(lambda: rectify(model, [1], cache, 1))

    assert counted(2) == counted(4)
    assert min(counted(2)) > 0, "the count sees those that are there"
    assert count_checks(lambda: CHECKED_OPS.block_bounds(*CALLS["block_bounds"])) > 3


def test_the_paper_is_at_most_five_calls_away():
    """Frames of this project between a caller's `generate` and `sparse_attention`."""
    stacks = []

    def attend(*arguments, **options):
        own = [frame for frame in traceback.extract_stack() if ROOTS[0] in Path(frame.filename).parents]
        stacks.append([frame.name for frame in own])
        return REFERENCE_OPS.sparse_attention(*arguments, **options)

    model = Shape().model(torch.float32).with_ops(replace(REFERENCE_OPS, sparse_attention=attend))
    generate(model, [list(range(10))], 3, CONFIG)
    assert stacks[0][0] == "generate"
    assert max(map(len, stacks)) <= 5, stacks[0]


# --- The rhythm ---


def rhythm(schedule, interval, n_events):
    """Section 3 of the specification, word by word: which passes follow each other, and how many tokens each feeds."""
    if interval is None:
        return [("sparse", 1)] * n_events
    n_sparse = interval if schedule == "paper" else interval - 1
    cycle = [("sparse", 1)] * n_sparse + [("dense", interval)]
    return (cycle * n_events)[:n_events]


@pytest.mark.parametrize("schedule", ["paper", "fused"])
@pytest.mark.parametrize("interval", [None, *range(1, 10)])
def test_passes_come_in_the_rhythm_of_the_specification(schedule, interval):
    """Both as `is_pass_due` says, which also takes a tensor, and as `generate` does it."""
    config = replace(CONFIG, schedule=schedule, interval=interval)
    expected = rhythm(schedule, interval, 80)
    told, n_drifted = [], 0
    while len(told) < 80:
        if schedule == "paper" and config.is_pass_due(n_drifted):
            told.append(("dense", n_drifted))
            n_drifted = 0
        elif schedule == "fused" and config.is_pass_due(n_drifted):
            told.append(("dense", n_drifted + 1))
            n_drifted = 0
        else:
            told.append(("sparse", 1))
            n_drifted += 1
    assert told == expected
    if interval is not None:
        due = [config.is_pass_due(n) for n in range(12)]
        assert torch.equal(torch.as_tensor(config.is_pass_due(torch.arange(12))), torch.tensor(due))

    done = []

    def note(operation, kind):
        def call(query, *arguments, **options):
            done.append((kind, query.shape[2] if kind == "dense" else 1))
            return operation(query, *arguments, **options)

        return call

    ops = replace(
        REFERENCE_OPS,
        sparse_attention=note(REFERENCE_OPS.sparse_attention, "sparse"),
        dense_attention=note(REFERENCE_OPS.dense_attention, "dense"),
    )
    model = Shape(layers=1).model(torch.float32).with_ops(ops)
    [generation] = generate(model, [[1, 2, 3]], 30, config)
    assert done[0] == ("dense", 3), "the prompt"
    assert done[1:] == expected[: len(done) - 1]
    assert generation.n_drifted == (29 if interval is None else 29 % interval)


def decisions(tree):
    """Lines that compare or divide a configuration's interval. Anybody may compare it with a constant, None included,
    or ask what a user's `options` say.
    """

    def reads_it(node):
        read = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
        return any(each.attr in ("interval", "drift_limit") and ast.unparse(each.value) != "options" for each in read)

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.FloorDiv)):
            parts = [node.left, node.right]
        else:
            continue
        if any(map(reads_it, parts)) and not any(isinstance(part, ast.Constant) for part in parts):
            yield node.lineno, ast.unparse(node)


def test_only_the_configuration_decides_when_a_pass_is_due():
    """Other files ask `is_pass_due`."""
    assert (
        len(list(decisions(ast.parse("n >= config.interval\nw % c.drift_limit\nc.interval is None\nc.interval == 1"))))
        == 2
    )
    found = [
        f"{path.name}:{line} {text}"
        for root in ROOTS
        for path in sorted(root.rglob("*.py"))
        if path != ROOTS[0] / "config.py"
        for line, text in decisions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
    config = (ROOTS[0] / "config.py").read_text(encoding="utf-8")
    assert [text for _, text in decisions(ast.parse(config))] == ["n_drifted >= self.drift_limit"]
