"""The porting kit: its vectors are what the oracle makes of them, right ports pass, and wrong ones are told the law.

Mistakes are edits of docs/examples/numpy_port.py, one at a time, as a porter might make them.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch

import make_vectors
import oracle
from port_mistakes import FIRST
from resa.conformance import grades, kit, parts, unseen
from resa.conformance import trace as trace_module
from resa.conformance import wrong as wrong_module
from resa.conformance.kit import FAIL, PASS, UNCHECKED, UNSUPPORTED, first_failures, is_passed
from resa.conformance.vectors import load_vectors, read_tensors
from resa.reference.cli.main import main
from strategies import DEVICE

pytestmark = pytest.mark.usefixtures("remembered")
ROOT = Path(__file__).parents[2]
IS_NIGHT = os.environ.get("RESA_TEST_PROFILE") == "nightly"  # then ports that are slow to test decode every generation
EXAMPLES = ROOT / "docs" / "examples"
NUMPY_PORT, JAX_PORT = EXAMPLES / "numpy_port.py", EXAMPLES / "jax_port.py"
# What each version means: whoever changes a vector raises make_vectors.VERSION and adds a line here.
MEANINGS = {
    2: "64ead870c4b789317de968f02ec9bdb782f45cb73b4bca2cebd3a37523f0a29c",
    3: "619586d8ca3d1576e9f5942ffb89890536d9603d8e164a7e74b8e811b9737847",
    4: "cac9eb043cd4fef0325eab712688f886dfc32661b2dfdd60b19e1a501dff09a3",
}


def check_port(port, vectors, **options):
    """Check the recorded cases and the parts, without the drawn cases of other types and sizes."""
    return kit.check_port(port, vectors, grades=["float32"], **options)


def failures_of(port, vectors):
    """The first failures of a wrong port, without the cases after the generation that told what broke."""
    rows = []
    for row in kit.rows_as_they_come(port, vectors, grades=["float32"]):
        rows.append(row)
        if row.status == FAIL and row.operation not in kit.OPERATIONS and row.law != trace_module.TRACE:
            break
    return first_failures(rows)


@pytest.fixture(scope="module")
def vectors():
    return load_vectors()


def with_traces(vectors, *names):
    """Vectors with these generations alone."""
    kept = [entry for entry in vectors.manifest["traces"] if entry["case"] in names]
    assert len(kept) == len(names)
    return replace(vectors, manifest={**vectors.manifest, "traces": kept})


# The vectors.


def test_the_vectors_are_what_the_oracle_makes():
    """Byte for byte, with the pinned versions."""
    assert list(make_vectors.changed()) == []


def test_expected_generations_are_those_of_the_oracle():
    """The NumPy port makes what a port is compared with: caches to 1e-9, selections and tokens as they are."""
    weights, decoded = make_vectors.decodings()
    port = kit.load_port(str(NUMPY_PORT))
    for entry, steps in decoded:
        of_model = {
            name.split("/", 1)[1]: each for name, each in weights.items() if name.startswith(entry["model"] + "/")
        }
        model = make_vectors.MODELS[entry["model"]]
        found = port.decode_trace(of_model, model, entry["prompt"], entry["config"])
        found = trace_module.expected_steps(found, has_sketches=needs_sketches(entry))
        assert [step.token for step in found] == [step["token"] for step in steps] == entry["tokens"]
        for ours, theirs in zip(found, steps, strict=True):
            assert (ours.window, ours.start, ours.keys.shape[2]) == tuple(
                theirs[key] for key in ("window", "start", "end")
            )
            for name in ("keys", "values"):
                np.testing.assert_allclose(getattr(ours, name)[:, :, ours.start :], theirs[name], rtol=1e-9, atol=1e-12)
            assert (ours.indices is None) == (theirs["indices"] is None)
            if ours.indices is not None:
                assert [*map(trace_module._sets, ours.indices)] == [*map(trace_module._sets, theirs["indices"])]


def meaning(vectors):
    """A digest of everything that a verdict depends on: tensors, models, arguments, laws, what is compared.

    Of cases that are drawn, their inputs; not those of long contexts, which take seconds, or of `score_sketch`, whose
    scales are sums.
    """
    digest = hashlib.sha256()
    drawn = [
        (entry, grades._inputs(entry))
        for entry in grades.drawn_entries()
        if entry["grade"] != "long" and entry["operation"] != "score_sketch"
    ]
    for entry in parts.part_entries():
        given = {
            "choose_token": lambda entry: parts.choice_of(entry["case"])[0] | {"u": None},  # made of sums as well
            "decode_batch": lambda entry: {"requests": parts.requests_of(entry["case"], 29)},
        }.get(entry["operation"], lambda entry: dict(enumerate(parts.passes_of(entry))))
        drawn.append((entry, given(entry)))
    for entry, inputs in drawn:
        digest.update(json.dumps(entry | {"says": None}, sort_keys=True).encode())
        digest.update(json.dumps(inputs, sort_keys=True, default=lambda array: array.tolist()).encode())
    for tensors in (vectors.operations, vectors.weights):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    wordless = {name: part for name, part in vectors.manifest.items() if name not in ("operations", "traces")}
    entries = vectors.manifest["operations"] + vectors.manifest["traces"]
    wordless["entries"] = [{key: part for key, part in entry.items() if key != "says"} for entry in entries]
    digest.update(json.dumps(wordless, sort_keys=True).encode())
    return digest.hexdigest()


def test_another_meaning_is_another_version(vectors):
    assert vectors.manifest["version"] == make_vectors.VERSION == max(MEANINGS)
    said = "raise make_vectors.VERSION, add its meaning to MEANINGS, and say so in docs/porting.md"
    assert meaning(vectors) == MEANINGS[make_vectors.VERSION], said


def needs_sketches(entry):
    return entry["operation"] in kit.OPTIONAL or kit.sketch_bits(entry) is not None


def test_the_readme_counts_the_cases(vectors):
    """Those that every port has to pass."""
    cases, traces = (
        [entry for entry in vectors.manifest[kind] if not needs_sketches(entry)] for kind in ("operations", "traces")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"runs {len(cases)} cases of the five operations (" in readme
    assert f") and {len(traces)} whole generations" in readme


def laws_told(vectors):
    """Every law that a report can name: of the vectors, and in the code that compares."""
    entries = vectors.manifest["operations"] + vectors.manifest["traces"]
    laws = {entry["law"] for entry in entries}
    assert all(entry["says"] for entry in entries)
    for module in (grades, kit, parts, trace_module, unseen, wrong_module):
        constants = (node.value for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if is_text(node))
        laws |= {text for text in constants if re.fullmatch(r"(\d(\.\d)?|law \d+) [\w =.+-]+", text)}
    return sorted(laws)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_law_is_in_the_page_by_its_number_and_its_name(vectors):
    """Named as the header of its section, or in italics within it."""
    page = "\n" + re.sub(r"```.*?```|`[^`\n]*`|\\\*", "", (ROOT / "docs" / "porting.md").read_text(), flags=re.DOTALL)
    told = laws_told(vectors)
    assert len(told) > 35
    for law in told:
        number, name = law.removeprefix("law ").split(" ", 1)
        start = f"\n{number}. " if law.startswith("law") else f"\n### {number} " if "." in number else f"\n## {number} "
        place = page.split("\n## 5 Laws")[1] if law.startswith("law") else page
        section = re.split(r"\n\d+\. |\n#", place.split(start)[1])[0]
        terms = re.findall(r"(?<![\w*])\*([A-Za-z0-9][^*]*)\*(?![\w*])", section)
        terms = [" ".join(term.split()).strip(" .").lower() for term in terms]
        assert name.lower() in terms or name.lower() in section.splitlines()[0].lower(), f"{law} is not in its section"


def decimal(value, places):
    """The form in which the page writes numbers."""
    text = f"{value:.{places}f}"
    return (re.sub(r"\.?0+$", "", text) if places else text).replace("-", "−")


def test_the_worked_example_is_right():
    """The numbers of section 6 of docs/porting.md, by the oracle."""
    page = (ROOT / "docs" / "porting.md").read_text().split("## 6 A worked example")[1].split("\n## 7")[0]
    page = " ".join(page.split())
    keys = np.full((1, 2, 4, 2), 99.0)
    keys[0, :, :3] = [[[1, 0], [3, -2], [-1, 4]], [[0, 2], [0, 1], [5, 0]]]
    for token in range(3):
        cells = [f"({decimal(row[0], 0)}, {decimal(row[1], 0)})" for row in keys[0, :, token]]
        assert f"| {token} | {cells[0]} | {cells[1]} |" in page
    bounds = oracle.block_bounds(keys, [3], 2)
    assert bounds[0, 0].tolist() == [[[1, -1], [-2, 4]], [[3, -1], [0, 4]]]
    assert bounds[0, 1].tolist() == [[[0, 5], [1, 0]], [[0, 5], [2, 0]]]
    for said in ("lo = (1, −2), hi = (3, 0)", "lo = hi = (−1, 4)", "lo = (0, 1), hi = (0, 2)", "lo = hi = (5, 0)"):
        assert said in page
    query = np.array([[[3, -1], [-1, -1], [-4, 0], [0, 2]]])
    assert "(3, −1), (−1, −1) of heads 0 and 1, which pool to (1, −1)" in page
    assert "(−4, 0), (0, 2) of heads 2 and 3, which pool to (−2, 1)" in page
    scores = oracle.score_blocks(query, bounds, [3], 2)
    assert scores.tolist() == [[[5, -5], [2, -10]]]
    for said in ("= 3 + 2 = 5", "−1 − 4 = −5", "max(0, 0) + max(1, 2) = 2", "−10 + 0 = −10"):
        assert said in page
    selection = {"block_size": 2, "min_blocks": 1, "local_blocks": 1}
    for ratio, expected in ((0.5, [[[1], [1]]]), (1.0, [[[0, 1], [0, 1]]])):
        indices = oracle.select_blocks(scores, [3], {**selection, "active_ratio": ratio})
        assert indices.tolist() == expected
        out, lse = oracle.sparse_attention(query, keys, keys, indices, [3], 2, return_lse=True)
        if ratio == 0.5:
            assert out[0, 0].tolist() == [-1, 4]
            assert f"−7 · 2**-0.5 = {decimal(lse[0, 0], 4)}" in page
            continue
        logits = keys[0, 0, :3] @ query[0, 0] * 2**-0.5
        assert f"are {', '.join(decimal(logit, 4) for logit in logits)}; " in page
        terms = np.exp(logits - logits.max())
        assert f"z = {' + '.join(decimal(term, 6) for term in terms)} = {decimal(terms.sum(), 6)}" in page
        for head in (0, 1):
            pair = f"lse = {lse[0, head]:.5f}, out = ({out[0, head, 0]:.4f}, {out[0, head, 1]:.4f})".replace("-", "−")
            assert pair in page
    keys[0, 0, 2] = [-1, 3]
    assert oracle.block_bounds(keys, [3], 2)[0, 0, :, :, 1].tolist() == [[-1, 3], [-1, 3]]


def test_the_worked_example_of_a_sketch_is_right():
    page = " ".join(
        (ROOT / "docs" / "porting.md").read_text().split("*A sketch* of two bits")[1].split("## 7")[0].split()
    )
    key, query = np.array([1.0, 0, 0, 2]), np.array([2.0, 0, 0, 1])
    codes, scales = oracle.sketch_keys(key[None, None, None])
    levels, scale = oracle.sketch_key(key, 2)
    step = 0.9957 * np.sqrt(np.mean(oracle.rotate(key) ** 2))
    assert (levels.tolist(), codes.tolist(), scales.tolist()) == ([3, 1, 1, 3], [[[[215]]]], [[[1.0]]])
    rotated = [f"r = ({', '.join(decimal(r, 1) for r in oracle.rotate(x))})" for x in (key, query)]
    for said in (*rotated, f"s = {step:.4f}", "u = (3, 1, 1, 3)", "= 215", "scale 5 / 5 = 1", "4 · 4**-0.5 = 2"):
        assert said in page
    assert scale * np.dot(oracle.rotate(query), oracle.code_of(levels, 2)) == np.dot(query, key) == 4


# Right ports.


def assert_conforms(port, vectors, chosen):
    rows = kit.check_port(port, vectors, grades=chosen)
    assert first_failures(rows) == []
    assert {row.operation for row in rows if row.status != PASS} == set()
    assert {row.grade for row in rows} == {*chosen}
    assert len(rows) == len(kit.chosen_entries(vectors, grades=chosen))


def test_the_reference_conforms(vectors):
    """In every grade."""
    from resa.conformance import port

    assert_conforms(port, vectors, grades.GRADES)


def test_the_numpy_port_conforms(vectors):
    """Recorded cases alone: what is expected of drawn ones, it has computed."""
    assert_conforms(kit.load_port(str(NUMPY_PORT)), vectors, ["float32"])


JAX_CHECK = """
import json, sys
from resa.conformance.kit import check_port, load_port
from resa.conformance.vectors import load_vectors

port, vectors = load_port(sys.argv[1]), load_vectors()
traces = vectors.manifest["traces"]
traces[:] = [entry for entry in traces if entry["case"] in sys.argv[2:]]
rows = check_port(port, vectors, grades=["float32"])
rows = [(row.operation, row.case, row.status, row.says) for row in rows]
print(json.dumps([rows, port._sparse_step._cache_size(), port._dense_pass._cache_size()]))
"""


@pytest.mark.site
def test_the_jax_port_conforms(vectors):
    """Jitted, in float32, in fewer than 320 lines; in a process of its own, as JAX's threads do not outlive a fork."""
    if not find_spec("jax"):
        pytest.skip("the extra `dev` has jax from Python 3.11 on")
    assert len(JAX_PORT.read_text().splitlines()) < 320
    traces = [entry["case"] for entry in vectors.manifest["traces"]]
    traces = traces if IS_NIGHT else ["never", "paper_4", "fused_12_from_one", "biases", "sketch_paper_4"]
    command = [sys.executable, "-c", JAX_CHECK, JAX_PORT, *traces]
    # Compiling takes most of the time, and arrays this small gain nothing from optimised code.
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    chosen = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **chosen})
    assert done.returncode == 0, done.stderr[-2000:]
    rows, n_sparse, n_dense = json.loads(done.stdout)
    assert {operation for operation, _, status, _ in rows if status == UNSUPPORTED} == {*kit.PARTS}
    assert [row for row in rows if row[2] not in (PASS, UNSUPPORTED)] == []
    # Static shapes: lengths and positions compile nothing; a generation has prompts, windows and steps of one width.
    assert {case for operation, case, *_ in rows if operation == "decode_trace"} == {*traces}
    assert 0 < n_sparse <= len(traces)
    assert 0 < n_dense <= 2 * len(traces)


@pytest.mark.fast
def test_the_kernels_conform(vectors, monkeypatch):
    port = pytest.importorskip("resa.fast.port", reason="triton comes for Linux only")
    if DEVICE == "cpu" and not IS_NIGHT:
        by_day = {"paged_trace": "pages_of_sketches", "decode_batch": "resume_with_sketches"}
        few = [each for each in parts.part_entries() if by_day.get(each["operation"], each["case"]) == each["case"]]
        assert {each["operation"] for each in few} == {*kit.PARTS}
        monkeypatch.setattr("resa.conformance.vectors.part_entries", lambda: few)
        assert_conforms(port, with_traces(vectors, "norms", "biases", "sketch_fused_5_one_bit"), ["float32"])
    else:
        grades_of_own = [] if DEVICE == "cpu" else port.GRADES
        assert_conforms(port, vectors, ["float32", *grades_of_own])


def test_examples_stand_alone():
    """A port imports nothing of this project."""
    for path in sorted(EXAMPLES.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not any(name.split(".")[0] == "resa" for name in names), path.name


# Wrong ports.

# The first of those that `make conformance-score` seeds: minutes in place of a quarter of an hour.
MISTAKES = FIRST


def edited(old, new):
    """The NumPy port with one edit."""
    source = NUMPY_PORT.read_text()
    assert old in source, f"{old!r} does not stand in {NUMPY_PORT.name}"
    module = ModuleType("edited")
    exec(compile(source.replace(old, new, 1), "edited", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_its_law(vectors, name):
    """By the first row of what is to be looked at first."""
    law, old, new = MISTAKES[name]
    port = edited(old, new)
    failures = first_failures(check_port(port, vectors, ops_only=True)) or failures_of(port, vectors)
    assert failures, "the mistake passed"
    assert failures[0].law == law, failures[0]
    assert len(failures[0].says) > 20
    for row in failures[1:]:
        assert row.operation in ("dense_attention", "score_sketch", "decode_trace", "decode_batch")


def test_a_generation_that_fails_too_is_said_to_follow(vectors):
    law, old, new = MISTAKES["one bound for both signs"]
    first, *others = first_failures(check_port(edited(old, new), with_traces(vectors, "paper_4")))
    assert (first.operation, first.law) == ("score_blocks", law)
    assert {"decode_trace", "attention_trace", "decode_batch"} <= {row.operation for row in others}
    for row in others:
        assert (row.law, row.says.split("; ")[-1]) == (law, "score_blocks fails as well, so mend that first")


def port_with(**changes):
    port = kit.load_port(str(NUMPY_PORT))
    kept = {name: getattr(port, name) for name in (*kit.OPERATIONS, "decode_trace", *kit.PARTS)}
    return SimpleNamespace(**{name: value for name, value in (kept | changes).items() if value is not None})


def test_what_is_missing_is_said(vectors):
    rows = check_port(port_with(select_blocks=None, decode_trace=None), vectors)
    assert {row.status for row in rows if row.operation == "select_blocks"} == {FAIL}
    assert first_failures(rows)[0].says == "the port has no select_blocks"
    assert {row.status for row in rows if row.operation == "decode_trace"} == {UNCHECKED}
    assert not is_passed(rows)


def test_sketches_are_optional(vectors):
    """Without both operations a port conforms as well, and one of them alone is refused by name."""
    few = with_traces(vectors, "paper_4", "sketch_paper_4")
    rows = check_port(port_with(sketch_keys=None, score_sketch=None), few)
    assert is_passed(rows)
    asked = [needs_sketches(entry) for entry in kit.chosen_entries(few, grades=["float32"])]
    assert [row.status == UNSUPPORTED for row in rows] == asked
    assert {row.status for row in rows} == {PASS, UNSUPPORTED}
    for name in kit.OPTIONAL:
        rows = check_port(port_with(**{name: None}), few)
        failures = first_failures(rows)
        assert [row.operation for row in failures] == [name, "decode_trace"]
        for row in failures:
            assert (row.law, row.says) == ("2 signatures", f"the port has no {name}: sketches need both operations")


def test_codes_are_unsigned_bytes(vectors):
    def failing(change):
        (row,) = first_failures(check_port(port_with(sketch_keys=change), vectors, ops_only=True))
        assert (row.operation, row.law) == ("sketch_keys", "2 signatures")
        return row.says

    def signed(**inputs):
        codes, scales = port_with().sketch_keys(**inputs)
        return codes.astype(np.int64), scales

    assert "got int64 [1, 1, 4, 4], expected" in failing(signed)
    assert failing(lambda **inputs: port_with().sketch_keys(**inputs)[0]).startswith(
        "the result is a pair (codes, scales)"
    )


def test_sketches_in_a_trace(vectors):
    """They need not be shown; a level may be the next one within rounding of a threshold, and no other may."""
    sketched = [entry for entry in vectors.manifest["traces"] if needs_sketches(entry)]
    few = replace(vectors, manifest={**vectors.manifest, "operations": [], "traces": sketched})
    assert is_passed(check_port(entries_with(lambda entry: entry | {"codes": None}), few))
    wrong = {
        "sketches of layer 0, rows [2], are not": lambda entry: entry["codes"][0, 1, 2].__setitem__(0, 0b11001),
        "sketches of layer 1, rows [3], are not": lambda entry: entry["scales"][1, 0].__setitem__(3, np.nan),
        "codes of shape [2, 2, 17, 4], expected": lambda entry: entry.update(codes=entry["codes"][:, :, :-13]),
        "codes of type int8": lambda entry: entry.update(codes=entry["codes"].astype(np.int8)),
        "share memory": lambda entry: entry.update(scales=np.broadcast_to(SHARED, entry["scales"].shape)),
    }
    for said, change in wrong.items():
        (row,) = first_failures(check_port(entries_with(lambda entry, change=change: change(entry) or entry), few))
        assert said in row.says, row.says

    # Keys on both sides of a threshold, each with the other's sketch.
    for size, stale in ((1e-9, []), (1e-3, [0])):
        keys = np.zeros((2, 1, 1, 1, 16))
        keys[..., 0], keys[..., 4] = 1.0, [[[[1 + size]]], [[[1 - size]]]]
        codes, scales = zip(*map(oracle.sketch_keys, keys), strict=True)
        assert (codes[0] != codes[1]).any()
        step = trace_module.Step(keys[0], keys[0], None, None, 0, 0, codes=codes[1], scales=scales[1])
        assert trace_module._stale_rows(step, 0) == stale


SHARED = np.zeros(())


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
    assert "got float32 [1, 1, 2, 1, 16], expected [1, 1, 2, 16, 1]" in row.says


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
    (row,) = failures_of(short, vectors)
    assert (row.law, row.case) == ("4.5 end of generation", "dense")
    (row,) = failures_of(port_with(decode_trace=lambda *arguments: [1, 2]), with_traces(vectors, "dense"))
    assert row.law == "4.6 the trace"


class Elsewhere:
    """An array of another framework, which converts itself; or, on a device of its own, refuses to."""

    def __init__(self, array, error=None):
        self.array, self.error = array, error

    def __array__(self, dtype=None, copy=None):
        if self.error:
            raise self.error
        return np.asarray(self.array, dtype)


def test_results_are_whatever_numpy_reads(vectors):
    def scores(make):
        return port_with(score_blocks=lambda **inputs: make(port_with().score_blocks(**inputs)))

    for make in (Elsewhere, lambda array: array.tolist()):
        assert is_passed(check_port(scores(make), vectors, ops_only=True), ops_only=True)
    wrong = {
        "can't be read as a NumPy array (TypeError: it lies on a GPU": lambda a: Elsewhere(
            a, TypeError("it lies on a GPU")
        ),
        "expected signed integers, or floats": lambda array: array.astype(object),
        "expected float32 or wider": lambda array: array.astype(np.float16),
    }
    for said, make in wrong.items():
        (row,) = first_failures(check_port(scores(make), vectors, ops_only=True))
        assert row.law == "2 signatures"
        assert said in row.says


def test_a_port_that_can_not_be_called_as_it_should_be(vectors):
    """Told apart from one that is called and fails: other names, no pair, an exception, an exit."""
    right = port_with()

    def failing(**changes):
        return first_failures(check_port(port_with(**changes), vectors, ops_only=True))[0]

    row = failing(block_bounds=lambda k, lengths, block_size: right.block_bounds(k, lengths, block_size))
    assert row.law == "2 signatures"
    assert "block_bounds can't be called with the arguments" in row.says
    row = failing(sparse_attention=lambda *inputs, return_lse=False, **more: right.sparse_attention(*inputs, **more))
    assert (row.law, row.case) == ("2 signatures", "sparse_log_sum_exp")
    assert "a pair (out, lse), got a ndarray" in row.says

    def leaves(**_):
        sys.exit(0)

    row = failing(score_blocks=leaves)
    assert row.law == "2.2 eq. 4"
    assert "(SystemExit: 0 at test_kit.py:" in row.says

    def divides(**inputs):
        with np.errstate(all="raise"):
            return np.mean(np.float32([3e38, 3e38]) * 2)

    row = failing(score_blocks=divides)
    assert "FloatingPointError" in row.says
    assert "at test_kit.py:" in row.says  # not in NumPy's own code


def test_a_port_may_not_write_into_its_inputs(vectors):
    """It gets copies, of configurations and weights too: the next case has its own."""
    right = port_with()

    def spoils(function):
        def spoilt(*arguments, **options):
            result = function(*arguments, **options)
            for each in (*arguments, *options.values()):
                if isinstance(each, np.ndarray):
                    each[...] = 0
                elif isinstance(each, (dict, list)):
                    each.clear()
            return result

        return spoilt

    every = (*kit.OPERATIONS, "decode_trace", *kit.PARTS)
    changes = {name: spoils(getattr(right, name)) for name in every}
    rows = check_port(port_with(**changes), with_traces(vectors, "paper_4", "sketch_paper_4"))
    assert {(row.status, row.law) for row in rows} == {(FAIL, "2 signatures")}
    assert {row.operation for row in rows if "writes to its" in row.says} == {*changes}


def test_a_generation_in_16_bits_is_told_so(vectors):
    port = edited("np.full(size, math.nan), np.full", "np.full(size, math.nan, np.float16), np.full")
    row, *_ = failures_of(port, vectors)
    assert (row.law, "narrower than float32" in row.says) == ("3 model", True)


def entries_with(change):
    """A port whose entries are changed, one by one, from what they should be."""
    return port_with(decode_trace=lambda *arguments: [change(entry) for entry in port_with().decode_trace(*arguments)])


def test_traces_that_are_hard_to_read(vectors):
    """Told as what they are: by where they may be read, by their types, or by their end."""
    cases = {
        "bounds of type object": lambda entry: entry | {"bounds": entry["bounds"].astype(object)},
        "keys of type complex128": lambda entry: entry | {"keys": entry["keys"] * 1j},
        "'float' object cannot be interpreted as an integer": lambda entry: entry | {"token": entry["token"] + 0.5},
    }
    for said, change in cases.items():
        (row,) = failures_of(entries_with(change), with_traces(vectors, "paper_4"))
        assert (row.law, said in row.says) == ("4.6 the trace", True), row.says

    def endless(*arguments):
        entries = port_with().decode_trace(*arguments)
        yield from entries
        while True:
            yield entries[-1]

    (row,) = failures_of(port_with(decode_trace=endless), vectors)
    assert row.law == "4.5 end of generation"


@pytest.mark.parametrize("name", ["keys", "bounds"])
def test_memory_that_entries_share(vectors, name):
    """Views of one buffer are refused, another framework's too; parts of one buffer that do not meet are right."""

    def decoded(place):
        def decode_trace(*arguments):
            entries = port_with().decode_trace(*arguments)
            size = max((entry[name].size for entry in entries), default=0)
            memory = np.zeros((len(entries), size))
            for i, entry in enumerate(entries):
                row = memory[i if place is None else 0][: entry[name].size].reshape(entry[name].shape)
                row[...] = entry[name]
                entry[name] = place(row) if place else row
            return entries

        return port_with(decode_trace=decode_trace)

    few = with_traces(vectors, "paper_4", "fused_8")
    for place in (lambda row: row, torch.from_numpy):
        row = failures_of(decoded(place), few)[0]
        assert (row.law, f"{name} of entries 0 and 1 share memory" in row.says) == ("4.6 the trace", True)
    assert is_passed(check_port(decoded(None), few))


# The command.


def test_the_command_prints_a_table_and_says_so_by_its_exit_status(capsys):
    assert main(["conformance", str(NUMPY_PORT), "--grade", "float32", "widths"]) == 0
    shown = capsys.readouterr().out
    assert "partial_last_block" in shown
    assert re.search(r"\n\d+ pass$", shown.rstrip())


@pytest.fixture
def wrong(tmp_path):
    """A file with a wrong port that has no decode_trace."""
    path = tmp_path / "my_port.py"
    source = NUMPY_PORT.read_text().replace("np.log(total)", "np.log2(total)").replace("def decode_trace", "def other")
    path.write_text(source)
    return path


def test_the_command_as_json_from_a_working_directory(wrong):
    """A module found where the command runs, as porters will have it."""
    command = [sys.executable, "-m", "resa.conformance", "my_port", "--json", "--grade", "float32"]
    done = subprocess.run(command, cwd=wrong.parent, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert (result["module"], result["passed"], result["version"]) == ("my_port", False, make_vectors.VERSION)
    assert [row["law"] for row in result["first_failures"]] == ["2.4 log-sum-exp", "2.5 log-sum-exp"]
    assert {row["status"] for row in result["rows"]} == {PASS, FAIL, UNCHECKED}


def test_the_report_in_the_page_is_what_is_printed(tmp_path, capsys):
    _, old, new = MISTAKES["bounds not refreshed"]
    path = tmp_path / "my_port.py"
    path.write_text(NUMPY_PORT.read_text().replace(old, new, 1))
    assert main(["conformance", str(path), "--grade", "float32"]) == 1
    page = (ROOT / "docs" / "porting.md").read_text()
    first, last = page.split("forgets the bounds:\n\n```\n")[1].split("\n```")[0].split("…\n")
    shown = capsys.readouterr()
    assert shown.out.startswith(first)
    assert shown.out.rstrip().endswith(last)
    assert re.fullmatch(r"\d+ s", shown.err.splitlines()[-1])


def test_what_a_port_prints_and_imports(tmp_path):
    """Its own modules lie beside it; what it prints goes to standard error; an infinite error is no JSON number."""
    (tmp_path / "helper.py").write_text("import math\nINFINITY = math.inf\nprint('imported')\n")
    source = (
        "import ctypes, helper, os\nos.write(1, b'from below')\nctypes.CDLL(None).puts(b'from C')\n"
        + NUMPY_PORT.read_text().replace("np.where(past_the_end, -math.inf, scores)", "0 * scores")
    )
    path = tmp_path / "port" / "mine.py"
    path.parent.mkdir()
    (tmp_path / "helper.py").rename(path.parent / "helper.py")
    path.write_text(source.replace("def score_blocks", "print('a [bold] line')\n\n\ndef score_blocks"))
    command = [
        sys.executable,
        "-m",
        "resa.reference",
        "conformance",
        str(path),
        "--json",
        "--only",
        "s*_b*s",
        "--grade",
        "float32",
    ]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # C keeps what it prints to the end
    done = subprocess.run(command, cwd=tmp_path, env=buffered, capture_output=True, text=True)
    result = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert done.returncode == 1
    assert "inf" in [row["error"] for row in result["rows"]]
    for said in ("imported\n", "a [bold] line\n", "from below", "from C\n"):
        assert said in done.stderr


def test_without_decode_trace_it_does_not_conform(tmp_path, capsys):
    path = tmp_path / "ops.py"
    path.write_text(NUMPY_PORT.read_text().replace("def decode_trace", "def other"))
    assert main(["conformance", str(path), "--grade", "float32"]) == 1
    assert "not checked" in capsys.readouterr().out
    assert main(["conformance", str(path), "--grade", "float32", "--ops-only"]) == 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_module", "MODULE: got no_such_module (ModuleNotFoundError"),
        ("nowhere.py", "MODULE: got nowhere.py; allowed: a module"),
        ("broken.py", "MODULE: got broken.py (SyntaxError"),
        ("leaves.py", "MODULE: got leaves.py (SystemExit: 0 at leaves.py:1)"),
        ("folder", "MODULE: got folder (a folder without __init__.py); allowed: a module"),
        ("grades.py", "GRADES: got ['fp8', 'fp16']; allowed: a list of float64, fp16, bf16, batch, widths, long"),
        ("grade.py", "GRADES: got 'fp16'; allowed: a list of float64"),
    ],
)
def test_modules_that_are_none(module, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    (tmp_path / "folder").mkdir()
    (tmp_path / "grades.py").write_text("GRADES = ['fp8', 'fp16']")
    (tmp_path / "grade.py").write_text("GRADES = 'fp16'")
    assert main(["conformance", module]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"resa conformance: {message}")
    assert shown.count("\n") == 1


# Processes of their own.

UNRULY = """
    if block_size == 16:
        import os, time
        {}
    keys = numbers(keys)
    batch, kv_heads, capacity, head_dim = keys.shape
    n_blocks"""


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("os.abort()", "the process ended, signal 6"),
        ("os._exit(3)", "the process ended, exit status 3"),
        ("time.sleep(60)", "no result within 2 s"),
    ],
)
def test_a_crash_or_a_hang_is_a_row(does, said, tmp_path, capfd):
    """It names its case, and the next case runs."""
    path = tmp_path / "unruly.py"
    old = UNRULY.split("{}")[1]
    assert old in NUMPY_PORT.read_text()
    path.write_text(NUMPY_PORT.read_text().replace(old, UNRULY.format(does), 1))
    only = ["--only", "block_bounds", "--grade", "float32", "--timeout", "2", "--json"]
    assert main(["conformance", str(path), *only]) == 1
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert {row["case"] for row in rows if row["status"] == FAIL} == {"capacity_between_blocks"}
    (row,) = (row for row in rows if row["status"] == FAIL)
    assert row["law"] == "2.1 layout"
    assert said in row["says"]
    assert rows[-1]["status"] == PASS


def test_rows_are_printed_as_they_come(tmp_path):
    """Not when all is over."""
    path = tmp_path / "slow.py"
    path.write_text(NUMPY_PORT.read_text().replace("def score_blocks(", "def score_blocks(*_, **__):\n    import time\n"
                                                   "    time.sleep(60)\n\n\ndef other("))  # fmt: skip
    command = [sys.executable, "-u", "-m", "resa.conformance", str(path), "--only", "[bs]*_b*s", "--ops-only"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().split() == ["result", "operation", "case", "error", "allowed", "law"]
        assert process.stdout.readline().startswith("pass          block_bounds     one_block")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_reader_that_has_seen_enough():
    """`… | head -1` ends without a traceback."""
    command = [sys.executable, "-m", "resa.conformance", NUMPY_PORT, "--only", "block_bounds"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline().startswith("result")
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only: got nothing; allowed: the name of a case or an operation"),
        (["--timeout", "0"], "--timeout: got 0; allowed: more than 0 seconds"),
    ],
)
def test_options_that_are_refused(arguments, message, capsys):
    assert main(["conformance", str(NUMPY_PORT), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_names_its_grades(tmp_path, capsys):
    """Grades that it does not name are counted, and no failure."""
    path = tmp_path / "port.py"
    path.write_text(re.sub(r"GRADES = .*", 'GRADES = ("widths",)', NUMPY_PORT.read_text()))
    assert main(["conformance", str(path), "--only", "select_blocks"]) == 0
    shown = capsys.readouterr().out
    assert "widths_96" in shown
    assert re.search(r"\d+ pass, \d+ not supported \(float64, fp16, bf16, batch, long\)\n$", shown)


# Drawn cases, and garbage.


def test_the_reader_of_tensors_reads_what_the_library_does():
    data = (make_vectors.FOLDER / "operations.safetensors").read_bytes()
    ours, theirs = read_tensors(data), safetensors.numpy.load(data)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name], equal_nan=True)
               for name in ours)  # fmt: skip


@pytest.mark.parametrize("grade", ["float64", "fp16", "bf16", "widths"])
def test_what_is_expected_of_drawn_cases_is_what_the_oracle_says(vectors, grade):
    """But for float32's rounding; an allowance is small beside what is expected."""
    for entry in kit.chosen_entries(vectors, grades=[grade]):
        arrays = vectors.arrays(entry)
        inputs = {name: grades.widened(array) for name, array in arrays.items() if "/" not in name}
        options = {"return_lse": True} if "lse" in entry["compare"] else {}
        results = getattr(oracle, entry["operation"])(**inputs, **entry["arguments"], **options)
        for name, right in zip(entry["compare"], results if isinstance(results, tuple) else (results,), strict=True):
            expected = arrays[f"expected/{name}"]
            assert np.allclose(expected, right, rtol=1e-12 if grade == "float64" else 1e-6, atol=1e-30, equal_nan=True)
            allowed, finite = arrays.get(f"allowed/{name}", np.zeros(1)), np.abs(right[np.isfinite(right)])
            assert allowed.max() <= 0.05 * finite.max()


DRAWN = ("0x1.496e750400000p-1", "-0x1.323b3b3000000p-1", "-0x1.eb810ab000000p-2")


def test_drawn_numbers_are_about_normal_and_always_the_same():
    numbers = grades.drawn(7, 1000, 50)
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1.155) < 0.01
    assert numbers[0, :3].tolist() == grades.drawn(7, 3).tolist() == [float.fromhex(x) for x in DRAWN]


def test_no_selection_of_attention_alone_is_a_close_call(vectors, monkeypatch):
    """Every block that is chosen leads the next one by more than 1e-3 of it."""
    leads, select = [], parts.exact.select_blocks

    def watched(scores, lengths, config):
        indices = select(scores, lengths, config)
        for score, row in zip(scores[0], indices[0], strict=True):
            total = -(-lengths[0] // config["block_size"])
            others = [score[i] for i in range(total - 1) if i not in row]
            chosen = [score[i] for i in row[row >= 0] if i < total - 1]
            if others and chosen:
                leads.append((min(chosen) - max(others)) / abs(min(chosen)))
        return indices

    monkeypatch.setattr(parts.exact, "select_blocks", watched)
    for entry in parts.part_entries():
        if "page_size" in entry:
            parts.traced(parts.exact, entry, parts.passes_of(entry), entry["config"])
    assert len(leads) > 100
    assert min(leads) > 1e-3


def test_results_that_depend_on_what_must_not_matter(vectors):
    """A last bit is enough."""
    right = port_with()

    def leaks(keys, lengths, **rest):
        bounds = right.block_bounds(keys, lengths, **rest)
        bounds[:, :, 0, 0, 0] *= 1 + np.float32(2e-7) * (np.isnan(keys[:, :, -1, 0]) | (keys[:, :, -1, 0] > 1e9))
        return bounds

    changed = port_with(block_bounds=leaks)
    rows = [row for row in check_port(changed, vectors, ops_only=True) if row.status == FAIL]
    assert {row.law for row in rows} == {"law 5 inertness"}
    assert "in what must not matter change the result" in rows[0].says

    # What changes by chance, at once or some calls later, is no leak.
    for n in (1, 3):
        calls = iter(range(10**9))
        drifts = port_with(
            score_blocks=lambda n=n, calls=calls, **inputs: right.score_blocks(**inputs) + 1e-12 * (next(calls) // n)
        )
        row = first_failures(check_port(drifts, vectors, ops_only=True))[0]
        assert (row.law, row.operation) == ("5 second run", "score_blocks")

    # Nor is a change where nothing is compared: rows past the window are a later case's matter.
    changed = edited("for i in range(counts[s]):", "for i in range(n_queries):")
    row = first_failures(check_port(changed, vectors, ops_only=True))[0]
    assert (row.law, row.case) == ("2.5 rows that mean nothing", "rows_past_the_window")


def test_results_that_are_nearly_right(vectors):
    """The equation is told, not the clause of the case that happens to show it."""
    right = port_with()

    def off(by):
        def score_blocks(query, bounds, lengths, block_size):
            scores = right.score_blocks(query, bounds, lengths, block_size)
            return scores * (1 + by * (min(lengths) == 0))

        (row,) = first_failures(check_port(port_with(score_blocks=score_blocks), vectors, ops_only=True))
        assert row.case == "score_past_the_end"
        return row

    row = off(1e-3)
    assert row.law == "2.2 eq. 4"
    assert row.says.startswith("results are a little off (")
    assert off(0.1).law == "2.2 past the end"


def test_generations_that_are_nearly_right(vectors):
    """A small error belongs to the model, and a wrong token of a sparse step to its attention."""

    def shifted(by):
        def decode_trace(*arguments):
            entries = port_with().decode_trace(*arguments)
            for entry in entries[3:]:
                entry["values"][0, 0, -1] *= 1 + by
            return entries

        return failures_of(port_with(decode_trace=decode_trace), vectors)[0]

    assert (shifted(1e-3).law, shifted(1.0).law) == ("3 model", "4.2 pending token")

    def tokens(*arguments):
        entries = port_with().decode_trace(*arguments)
        if entries and arguments[3]["interval"] is None:
            entries[1]["token"] += 1
        return entries

    row = failures_of(port_with(decode_trace=tokens), vectors)[0]
    assert (row.law, row.case) == ("4.2 sparse step", "never")


def test_passes_that_can_not_be_read(vectors):
    """Told as a failure of the port, not of the kit."""

    def no_selection(*arguments):
        return [each | {"indices": None} for each in port_with().attention_trace(*arguments)]

    row = failures_of(port_with(attention_trace=no_selection), with_traces(vectors))[0]
    assert (row.operation, row.law) == ("attention_trace", "4.7 attention alone")


def test_equal_blocks_that_score_differently(vectors):
    entry = {"law": "2.2 equal blocks", "equal": [[0, 2]]}
    kit._check_equal_blocks({"scores": np.ones((1, 1, 3))}, entry)
    with pytest.raises(wrong_module.Wrong, match=r"2\.2 equal blocks"):
        kit._check_equal_blocks({"scores": np.array([[[1.0, 1.0, 1 + 1e-7]]])}, entry)
