"""Checks stand around the operations, not inside a pass. Sparse and dense passes follow each other in one rhythm."""

import ast
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import resa.fast
import resa.reference
from resa.reference import REFERENCE_OPS, ReSAConfig, checked, checks, generate, prefill, sparse_step
from small_models import Shape

ROOTS = [Path(package.__path__[0]) for package in (resa.reference, resa.fast)]
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


def test_no_layer_of_a_sparse_step_checks_anything(monkeypatch):
    """Every check goes through `require` or `refuse`; a step asks them as often with four layers as with two."""
    calls = []
    require, refuse = checks.require, checks.refuse
    for module in (checks, resa.reference.cache, resa.reference.model):
        monkeypatch.setattr(module, "require", lambda *given: (calls.append(given), require(*given)), raising=False)
        monkeypatch.setattr(module, "refuse", lambda *given: (calls.append(given), refuse(*given)), raising=False)

    def counted(n_layers):
        model = Shape(layers=n_layers).model(torch.float32)
        cache = model.new_cache(16, 4)
        prefill(model, list(range(10)), cache)
        calls.clear()
        sparse_step(model, 1, cache, CONFIG)
        return len(calls)

    assert Shape().model().ops is REFERENCE_OPS
    assert counted(2) == counted(4) > 0


def test_the_paper_is_at_most_five_calls_away():
    """Frames of this project from a caller's `generate` to `sparse_attention`."""
    names = []

    def attend(*arguments):
        frames = traceback.extract_stack()
        names[:] = [frame.name for frame in frames if ROOTS[0] in Path(frame.filename).parents]
        return REFERENCE_OPS.sparse_attention(*arguments)

    model = Shape().model(torch.float32, ops=replace(REFERENCE_OPS, sparse_attention=attend))
    generate(model, [list(range(10))], 3, CONFIG)
    assert names == ["generate", "decode_step", "sparse_step", "hidden_states", "attend"]


def test_only_the_configuration_decides_when_a_pass_is_due():
    """No other file compares or divides the interval, but with a constant. A kernel is told the limit."""
    found = {}
    for path in sorted(path for root in ROOTS for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_division = isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.FloorDiv))
            parts = list(ast.iter_child_nodes(node))
            if isinstance(node, ast.Compare) or is_division:
                reads = [text for text in map(ast.unparse, parts) if text.endswith((".interval", ".drift_limit"))]
                if reads and not any(isinstance(part, ast.Constant) for part in parts):
                    found.setdefault(path.name, []).append(ast.unparse(node))
    assert found == {"config.py": ["n_drifted >= self.drift_limit"]}


@pytest.mark.parametrize("schedule", ["paper", "fused"])
@pytest.mark.parametrize("interval", [None, *range(1, 10)])
def test_passes_come_in_the_rhythm_of_the_specification(schedule, interval):
    """Section 3, as `is_pass_due` says it for a number or a tensor of them, and as `generate` does it."""
    config = replace(CONFIG, schedule=schedule, interval=interval)
    n_sparse = 99 if interval is None else interval - (schedule == "fused")
    due = [n >= n_sparse for n in range(99)]
    assert [config.is_pass_due(n) for n in range(99)] == due
    assert torch.as_tensor(config.is_pass_due(torch.arange(99))).expand(99).tolist() == due

    passes = []

    def note(operation, kind):
        def call(query, *arguments, **options):
            passes.append((kind, query.shape[2] if kind == "dense" else 1))
            return operation(query, *arguments, **options)

        return call

    ops = replace(
        REFERENCE_OPS,
        sparse_attention=note(REFERENCE_OPS.sparse_attention, "sparse"),
        dense_attention=note(REFERENCE_OPS.dense_attention, "dense"),
    )
    [generation] = generate(Shape(layers=1).model(torch.float32, ops=ops), [[1, 2, 3]], 30, config)
    cycle = [("sparse", 1)] * n_sparse + [("dense", interval)]
    assert passes == [("dense", 3), *(cycle * 30)][: len(passes)], "the prompt, then one cycle after another"
    assert generation.n_drifted == (29 if interval is None else 29 % interval)
