"""The porting kit: its vectors are what the oracle makes of them, right ports pass, and wrong ones are told the law.

Mistakes are edits of docs/examples/numpy_port.py, one at a time, as a porter might make them.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import make_vectors
import numpy as np
import oracle
import pytest
from strategies import DEVICE

from resa.reference import conformance
from resa.reference.cli import main
from resa.reference.conformance import FAIL, PASS, UNCHECKED, check_port, first_failures, is_passed, load_vectors

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
NUMPY_PORT, JAX_PORT = EXAMPLES / "numpy_port.py", EXAMPLES / "jax_port.py"
# What each version means: whoever changes a vector raises make_vectors.VERSION and adds a line here.
MEANINGS = {1: "87b5a5fdf0f1a0ecdb962336a44508c7ab4e3010b6023db979ccb063a380f97c"}


@pytest.fixture(scope="module")
def vectors():
    return load_vectors()


@pytest.fixture(scope="module")
def few(vectors):
    """Without the longer half of the generations, for kernels that are interpreted."""
    kept = [entry for entry in vectors.manifest["traces"] if entry["case"] in ("never", "paper_4", "fused_4")]
    return replace(vectors, manifest={**vectors.manifest, "traces": kept})


# ---- The vectors -----------------------------------------------------------------------------------------------------


def test_the_vectors_are_what_the_oracle_makes():
    """Byte for byte, with the pinned versions."""
    assert [name for name, data in make_vectors.files().items() if not make_vectors.is_same(name, data)] == []


def test_another_meaning_is_another_version(vectors):
    digest = hashlib.sha256()
    for path in sorted((ROOT / "tests" / "vectors").iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.read_bytes())
    assert vectors.manifest["version"] == make_vectors.VERSION == max(MEANINGS)
    assert digest.hexdigest() == MEANINGS[make_vectors.VERSION], (
        "raise make_vectors.VERSION, and say so in docs/porting.md"
    )


def test_the_vectors_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "vectors").iterdir() if path.is_file()) < 4_000_000


def test_no_step_of_a_generation_is_a_close_call(vectors):
    assert all(entry["margin"] > 1e-3 for entry in vectors.manifest["traces"])
    assert len({entry["config"]["interval"] for entry in vectors.manifest["traces"]}) >= 4
    assert {entry["config"]["schedule"] for entry in vectors.manifest["traces"]} == {"fused", "paper"}


def test_every_operation_has_its_cases(vectors):
    cases = [(entry["operation"], entry["case"]) for entry in vectors.manifest["operations"]]
    assert len(set(cases)) == len(cases)
    for operation in conformance.OPERATIONS:
        assert sum(name == operation for name, _ in cases) >= 8, operation
    said = f"{len(cases)} cases of the five operations and {len(vectors.manifest['traces'])}"
    assert said in " ".join((ROOT / "README.md").read_text().split())
    page = (ROOT / "docs" / "porting.md").read_text()
    for entry in vectors.manifest["operations"] + vectors.manifest["traces"]:
        assert entry["says"]
        number = entry["law"].split()[0]
        places = [f"\n{entry['law'].split()[1]}. *"] if number == "law" else [f"\n### {number} ", f"\n## {number} "]
        assert any(place in page for place in places), f"{entry['law']} is not in docs/porting.md"


def test_the_worked_example_is_right():
    """The numbers of section 6 of docs/porting.md, by the oracle."""
    page = (ROOT / "docs" / "porting.md").read_text().split("## 6 A worked example")[1].split("\n## 7")[0]
    keys = np.full((1, 2, 4, 2), 99.0)
    keys[0, :, :3] = [[[1, 0], [3, -2], [-1, 4]], [[0, 2], [0, 1], [5, 0]]]
    bounds = oracle.block_bounds(keys, [3], 2)
    assert bounds[0, 0].tolist() == [[[1, -1], [-2, 4]], [[3, -1], [0, 4]]]
    assert bounds[0, 1].tolist() == [[[0, 5], [1, 0]], [[0, 5], [2, 0]]]
    query = np.array([[[1, -1], [-2, 1]]])
    scores = oracle.score_blocks(query, bounds, [3], 2)
    assert scores.tolist() == [[[5, -5], [2, -10]]]
    selection = {"block_size": 2, "min_blocks": 1, "local_blocks": 1}
    for ratio, expected in ((0.5, [[[1], [1]]]), (1.0, [[[0, 1], [0, 1]]])):
        indices = oracle.select_blocks(scores, [3], {**selection, "active_ratio": ratio})
        assert indices.tolist() == expected
        out, lse = oracle.sparse_attention(query, keys, keys, indices, [3], 2, return_lse=True)
        said = {0.5: "−3.536", 1.0: "3.59376"}[ratio]
        assert said in page
        assert float(said.replace("−", "-")) == pytest.approx(lse[0, 0], abs=5e-6 if ratio == 1 else 5e-4)
        assert ratio == 1 or out[0, 0].tolist() == [-1, 4]
    keys[0, 0, 2] = [-1, 3]
    assert oracle.block_bounds(keys, [3], 2)[0, 0, :, :, 1].tolist() == [[-1, 3], [-1, 3]]


# ---- Right ports -----------------------------------------------------------------------------------------------------


def assert_conforms(port, vectors):
    rows = check_port(port, vectors)
    assert first_failures(rows) == []
    assert {row.status for row in rows} == {PASS}
    assert len(rows) == len(vectors.manifest["operations"]) + len(vectors.manifest["traces"])


def test_the_reference_conforms(vectors):
    from resa.reference import port

    assert_conforms(port, vectors)


def test_the_numpy_port_conforms(vectors):
    assert_conforms(conformance.load_port(str(NUMPY_PORT)), vectors)


def test_the_jax_port_conforms(vectors):
    """Jitted, in float32, in fewer than 250 lines; in a process of its own, as JAX's threads do not outlive a fork."""
    if not find_spec("jax"):
        pytest.skip("the extra `dev` has jax from Python 3.11 on")
    assert len(JAX_PORT.read_text().splitlines()) < 250
    command = [sys.executable, "-m", "resa.reference", "conformance", JAX_PORT, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert len(result["rows"]) == len(vectors.manifest["operations"]) + len(vectors.manifest["traces"])
    assert {row["status"] for row in result["rows"]} == {PASS}


@pytest.mark.fast
def test_the_kernels_conform(vectors, few):
    port = pytest.importorskip("resa.fast.port", reason="triton comes for Linux only")
    assert_conforms(port, few if DEVICE == "cpu" else vectors)


def test_examples_stand_alone():
    """A port imports nothing of this project."""
    for path in sorted(EXAMPLES.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not any(name.split(".")[0] == "resa" for name in names), path.name


# ---- Wrong ports -----------------------------------------------------------------------------------------------------

DENSE_PASS = "            model.dense_pass(fed[start:], start)  # its logits are discarded"
FUSED_PASS = "logits, indices = model.dense_pass(fed[start:], start), None"
WRITES = '            self.write(layer, heads["k"], heads["v"], start)\n'
ATTENDS = '            mixed = attention(layer, heads["q"])  # [Hq, n, D]\n'
BLOCKS_TOUCHED = "for i in range(start // b, math.ceil(end / b)):"
# Name: what stands there, what stands there instead, and the law that the report must name first.
MISTAKES = {
    "max for min": (
        "block.min(axis=1), block.max(axis=1)\n    return",
        "block.max(axis=1), block.min(axis=1)\n    return",
        "2.1 eq. 3",
    ),
    "one token too few": (
        "min((i + 1) * block_size, length)]  # [Hkv",
        "min((i + 1) * block_size, max(length - 1, i * block_size + 1))]  # [Hkv",
        "2.1 partial block",
    ),
    "last block unmasked in bounds": (
        "min((i + 1) * block_size, length)]  # [Hkv",
        "(i + 1) * block_size]  # [Hkv",
        "2.1 partial block",
    ),
    "zeros past the end": (
        "bounds[:, :, 0], bounds[:, :, 1] = math.inf, -math.inf",
        "bounds[:] = 0.0",
        "2.1 past the end",
    ),
    "NaN keys dropped": (
        "block.min(axis=1), block.max(axis=1)\n    return",
        "np.fmin.reduce(block, axis=1), np.fmax.reduce(block, axis=1)\n    return",
        "2.1 NaN keys",
    ),
    "capacity rounded down": (
        "n_blocks = math.ceil(capacity / block_size)\n    bounds = np.empty",
        "n_blocks = capacity // block_size\n    bounds = np.empty",
        "2.1 layout",
    ),
    "one bound for both signs": (
        "np.maximum(pooled * bounds[:, :, 0], pooled * bounds[:, :, 1])",
        "pooled * bounds[:, :, 1]",
        "2.2 eq. 4",
    ),
    "scores scaled": ("0.0, products).sum(axis=2)", "0.0, products).sum(axis=2) * head_dim**-0.5", "2.2 eq. 4"),
    "sum for mean": (".mean(axis=2)[..., None]", ".sum(axis=2)[..., None]", "2.2 pooling"),
    "first head for mean": (".mean(axis=2)[..., None]", "[:, :, 0, :, None]", "2.2 pooling"),
    "h % Hkv in scores": (
        "kv_heads, -1, head_dim).mean(axis=2)",
        "-1, kv_heads, head_dim).mean(axis=1)",
        "2.2 group order",
    ),
    "scores past the end": ("return np.where(past_the_end, -math.inf, scores)", "return scores", "2.2 past the end"),
    "0 times infinity": ("np.where((pooled == 0) & is_infinite, 0.0, products)", "products", "2.2 zero times infinity"),
    "floor for ceil": ("share = math.ceil(", "share = math.floor(", "2.3 count"),
    "no allowance in ceil": ("n_blocks - 1e-9)\n", "n_blocks)\n", "2.3 exact products"),
    "min_blocks forgotten": ('max(config["min_blocks"], share)', "share", "2.3 count"),
    "newest block not forced": (
        "taken = best + list(range(oldest_local, total))",
        "taken = sorted(range(total), key=rank)[:count]",
        "2.3 local blocks",
    ),
    "unsorted": ("= sorted(taken)", "= taken", "2.3 order"),
    "-1 in front": ("indices[s, h, :count] =", "indices[s, h, len(indices[s, h]) - count :] =", "2.3 padding"),
    "ties reversed": ("(False, -score[i], i)", "(False, -score[i], -i)", "2.3 ties"),
    "NaN on top": ("(True, 0.0, i) if math", "(False, -math.inf, i) if math", "2.3 order of scores"),
    "no scale": (" * query.shape[1] ** -0.5", "", "2.4 eq. 2"),
    "wrong base": ("np.log(total)", "np.log2(total)", "2.4 log-sum-exp"),
    "h % Hkv in attention": (
        "heads = slice(h * group, (h + 1) * group)",
        "heads = slice(h, None, keys.shape[1])",
        "2.4 group order",
    ),
    "last block unmasked": (
        "min((i + 1) * block_size, length))]",
        "(i + 1) * block_size) if t < keys.shape[2]]",
        "2.4 partial block",
    ),
    "-1 read": (
        "[i for i in indices[s, h] if i >= 0]",
        "[i % math.ceil(length / block_size) for i in indices[s, h] if length]",
        "2.4 padding",
    ),
    "NaN for nothing": (
        "return np.zeros(query.shape), np.full(len(query), -math.inf)",
        "return np.full(query.shape, math.nan), np.full(len(query), math.nan)",
        "2.4 nothing visible",
    ),
    "a finite maximum": (
        "largest = logits.max(axis=1, keepdims=True)",
        "largest = np.maximum(logits.max(axis=1, keepdims=True), -1e9)",
        "2.4 true masks",
    ),
    "does not see itself": ("+ i + 1  # sees itself", "+ i  # sees itself", "2.5 causality"),
    "windows from the left": ("end = lengths[s] - counts[s] + i", "end = lengths[s] - n_queries + i", "2.5 positions"),
    "rows before the start": ("if end > 0:", "if end != 0:", "2.5 rows that mean nothing"),
    "RoPE of pairs twice as slow": ("theta ** (-2 * np.arange(half)", "theta ** (-np.arange(half)", "3 model"),
    "RoPE one position late": (
        "positions = np.arange(start, start + n)",
        "positions = np.arange(start, start + n) + (n == 1)",
        "4.2 pending token",
    ),
    "attends before it writes": (WRITES + ATTENDS, ATTENDS + WRITES, "4.1 prefill"),
    "the newest block is stale": (
        "lengths, b, chosen = [self.length + 1]",
        "lengths, b, chosen = [self.length]",
        "4.2 sparse step",
    ),
    "bounds not extended": (
        BLOCKS_TOUCHED,
        "for i in range(start // b, math.ceil(end / b) if len(key[0]) > 1 else 0):",
        "law 2 online = rebuilt",
    ),
    "bounds not refreshed": (
        BLOCKS_TOUCHED,
        "for i in range(start // b, math.ceil(end / b) if end > self.length or not self.length else 0):",
        "law 2 online = rebuilt",
    ),
    "bounds of the first block touched stale": (
        BLOCKS_TOUCHED,
        "for i in range(math.ceil(start / b), math.ceil(end / b)):",
        "law 2 online = rebuilt",
    ),
    "never rectified": (DENSE_PASS, "            pass", "law 6 rectification is exact"),
    "window one too short": (
        DENSE_PASS,
        "            model.dense_pass(fed[start + 1 :], start + 1) if f > 1 else model.dense_pass(fed[start:], start)",
        "law 6 rectification is exact",
    ),
    "window without its last token": (
        DENSE_PASS,
        "            model.dense_pass(fed[start:-1] or fed[start:], start)\n            model.length = len(fed)",
        "law 6 rectification is exact",
    ),
    "positions from zero": (
        "positions = np.arange(start, start + n)",
        "positions = np.arange(start, start + n) if n in (1, 37) else np.arange(n)",
        "4.3 positions",
    ),
    "logits not discarded": (DENSE_PASS, DENSE_PASS.replace("model.dense", "logits = model.dense"), "4.4 schedules"),
    "fused logits dropped": (FUSED_PASS, "_, indices = model.dense_pass(fed[start:], start), None", "4.4 schedules"),
    "rectified one step late": ("model.window + 1 >= f", "model.window >= f", "4.4 schedules"),
    "w not reset": ("            model.window = 0\n            continue", "            continue", "4.3 window"),
    "last token fed": ("if len(trace) == n_tokens:", "if len(trace) == n_tokens + 1:", "4.5 end of generation"),
    "smallest logit": ("np.argmax(logits)", "np.argmin(logits)", "4.5 greedy choice"),
    "norm of the first token": ("rms_norm(x[-1]", "rms_norm(x[0]", "4.5 greedy choice"),
}


def edited(old, new):
    """The NumPy port with one edit."""
    source = NUMPY_PORT.read_text()
    assert old in source, f"{old!r} does not stand in {NUMPY_PORT.name}"
    module = ModuleType("edited")
    exec(compile(source.replace(old, new, 1), "edited", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_its_law(vectors, name):
    """By the first row of what is to be looked at first; a generation that fails too is said to follow from it."""
    old, new, law = MISTAKES[name]
    failures = first_failures(check_port(edited(old, new), vectors))
    assert failures, "the mistake passed"
    assert failures[0].law == law, failures[0]
    assert len(failures[0].says) > 20
    for row in failures[1:]:
        assert row.operation in ("dense_attention", "decode_trace")


def test_a_missing_refresh_shows_in_more_than_one_generation(vectors):
    old, new, law = MISTAKES["bounds not refreshed"]
    failed = [row.case for row in check_port(edited(old, new), vectors) if row.law == law and row.status == FAIL]
    assert len(failed) >= 2, failed


def port_with(**changes):
    port = conformance.load_port(str(NUMPY_PORT))
    kept = {name: getattr(port, name) for name in (*conformance.OPERATIONS, "decode_trace")}
    return SimpleNamespace(**{name: value for name, value in (kept | changes).items() if value is not None})


def test_what_is_missing_is_said(vectors):
    rows = check_port(port_with(select_blocks=None, decode_trace=None), vectors)
    assert {row.status for row in rows if row.operation == "select_blocks"} == {FAIL}
    assert first_failures(rows)[0].says == "the port has no select_blocks"
    assert {row.status for row in rows if row.operation == "decode_trace"} == {UNCHECKED}
    assert not is_passed(rows)


def test_results_of_another_type_or_shape(vectors):
    def lists(*arguments, **options):
        return np.array(port_with().select_blocks(*arguments, **options), np.float64)

    (row,) = first_failures(check_port(port_with(select_blocks=lists), vectors, ops_only=True))
    assert (row.law, row.case) == ("2 signatures", "highest")
    assert "float64" in row.says

    def transposed(**inputs):
        return port_with().block_bounds(**inputs).swapaxes(3, 4)

    (row,) = first_failures(check_port(port_with(block_bounds=transposed), vectors, ops_only=True))
    assert row.law == "2.1 eq. 3"
    assert "shape" in row.says


def test_longer_lists_and_float32_results_are_right_as_well(vectors):
    def padded(*arguments, **options):
        indices = port_with().select_blocks(*arguments, **options)
        return np.pad(indices, ((0, 0), (0, 0), (0, 3)), constant_values=-1).astype(np.int64)

    def narrow(*arguments, **options):
        return tuple(result.astype(np.float32) for result in port_with().sparse_attention(*arguments, **options))

    rows = check_port(port_with(select_blocks=padded, sparse_attention=narrow), vectors, ops_only=True)
    assert is_passed(rows, ops_only=True)
    assert not is_passed(rows)


def test_a_step_too_few_and_a_trace_that_is_none(vectors):
    short = port_with(decode_trace=lambda *arguments: port_with().decode_trace(*arguments)[:-1])
    (row,) = first_failures(check_port(short, vectors))
    assert (row.law, row.case) == ("4.5 end of generation", "dense")
    (row,) = first_failures(check_port(port_with(decode_trace=lambda *arguments: [1, 2]), vectors))
    assert row.law == "4.6 the trace, an exception"


# ---- The command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_so_by_its_exit_status(capsys):
    assert main(["conformance", str(NUMPY_PORT)]) == 0
    shown = capsys.readouterr().out
    assert "partial_last_block" in shown
    assert shown.rstrip().endswith("60 pass")


@pytest.fixture
def wrong(tmp_path):
    """A file with a wrong port that has no decode_trace."""
    path = tmp_path / "my_port.py"
    source = NUMPY_PORT.read_text().replace("np.log(total)", "np.log2(total)").replace("def decode_trace", "def other")
    path.write_text(source)
    return path


def test_the_command_names_the_law(wrong, capsys):
    assert main(["conformance", str(wrong), "--ops-only"]) == 1
    shown = capsys.readouterr().out
    assert "sparse_attention, sparse_log_sum_exp: 2.4 log-sum-exp" in shown
    assert "the log-sum-exp is the natural one" in shown


def test_the_command_as_json_from_a_working_directory(wrong):
    """A module found where the command runs, as porters will have it."""
    command = [sys.executable, "-m", "resa.reference", "conformance", "my_port", "--json"]
    done = subprocess.run(command, cwd=wrong.parent, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert (result["module"], result["passed"], result["version"]) == ("my_port", False, make_vectors.VERSION)
    assert [row["law"] for row in result["first_failures"]] == ["2.4 log-sum-exp", "2.5 log-sum-exp"]
    assert {row["status"] for row in result["rows"]} == {PASS, FAIL, UNCHECKED}


def test_without_decode_trace_it_does_not_conform(tmp_path, capsys):
    path = tmp_path / "ops.py"
    path.write_text(NUMPY_PORT.read_text().replace("def decode_trace", "def other"))
    assert main(["conformance", str(path)]) == 1
    assert "not checked" in capsys.readouterr().out
    assert main(["conformance", str(path), "--ops-only"]) == 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_module", "MODULE: got no_such_module (ModuleNotFoundError"),
        ("nowhere.py", "MODULE: got nowhere.py; allowed: a module"),
        ("broken.py", "MODULE: got broken.py (SyntaxError"),
    ],
)
def test_modules_that_are_none(module, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def (:")
    assert main(["conformance", module]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"resa conformance: {message}")
    assert shown.count("\n") == 1
