"""Pages say what is so: the example runs as written, tables and figures equal their files. More in test_site.py."""

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from itertools import product
from pathlib import Path

import pytest

from resa import fast, reference
from resa.reference import ReSAConfig
from resa.reference.weights.models import find_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def run(*arguments):
    """Run a Python program of the project, with one torch thread, because tests run beside each other."""
    environment, command = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.site
def test_the_example_in_the_readme_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120, "it is read in a minute"
    try:
        find_model("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    # 24 tokens are chosen, and the last is never fed. 23 = 2 · 8 + 7.
    ways, drifted = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert [line.split(":")[0] for line in ways] == ["dense", "never rectified", "every 8 tokens"]
    assert [int(line.split()[0]) for line in drifted] == [0, 23, 7]
    assert len({line.split(":", 1)[1] for line in ways}) == 3, "sparse steps read less, so they choose otherwise"


@pytest.mark.site
@pytest.mark.parametrize("script", ["make_tables.py", "make_figures.py"])
def test_tables_and_figures_are_what_their_files_say(script):
    done = run(f"docs/{script}", "--check")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """The module that draws, reading made-up results: by bounds all costs and losses are higher."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    module = importlib.import_module("make_figures")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    ways, scores, ratios = ["sparse", "ReSA f=32", "decode-only"], ["pooled", "sketch-2"], [0.02, 0.05, 0.1, 0.2]
    for folder in ("evidence", "frontier"):
        (tmp_path / folder).mkdir()
    for text, factor in (("english", 1), ("code", 3)):
        rows = [
            {"way": way, "ratio": ratio, "score": score, "kl": factor * (3 - i) * (2 - j) / ratio / 1000}
            for i, way in enumerate(ways)
            for j, score in enumerate(scores)
            for ratio in ratios
        ]
        (tmp_path / "evidence" / f"frontier_{text}.json").write_text(json.dumps({"rows": rows}))
    for (j, selection), ratio in product(enumerate(("bounds", "sketch")), ratios):
        parts = {"rectify": {"us": 900}, "refresh": {"us": 60}}
        row = {"context": 2**18, "interval": 32, "resa_us": (100 - 20 * j) * (1 + ratio), "parts": parts}
        config = asdict(ReSAConfig(active_ratio=ratio, selection=selection))
        (tmp_path / "frontier" / f"{selection}_{ratio}.json").write_text(json.dumps({"config": config, "rows": [row]}))
    return module


def test_the_frontier_has_losses_bytes_and_times_of_every_setting(figures):
    loss, time = figures.losses(), figures.times()
    assert loss.keys() == time.keys()
    assert {interval for _, _, interval in loss} == {None, 32}, "decode-only is no setting"
    assert loss["pooled", 0.1, None] == pytest.approx((1 + 3) / 2 * 3 * 2 / 0.1 / 1000)
    assert time["sketch-2", 0.05, 32] == pytest.approx(80 * 1.05)
    assert time["sketch-2", 0.05, None] == pytest.approx((32 * 80 * 1.05 - 960) / 31)
    assert figures.bytes_read(figures.PAPER) == pytest.approx(1 / 32 + 0.1 + 1 / 32)
    assert figures.bytes_read(("sketch-2", 0.05, None)) == pytest.approx(1 / 16 + 1 / 128 + 0.05)
    assert figures.bytes_read(("sketch-1", 0.05, 64)) == pytest.approx(1 / 32 + 1 / 128 + 0.05 + 1 / 64)


def test_the_frontier_is_drawn_from_files_that_are_there(figures, tmp_path):
    drawn = figures.drawn(*figures.FIGURES["frontier.svg"])
    assert drawn == figures.drawn(*figures.FIGURES["frontier.svg"])
    (tmp_path / "frontier" / "sketch_0.2.json").unlink()
    with pytest.raises(FileNotFoundError):
        figures.drawn(*figures.FIGURES["frontier.svg"])


def test_an_envelope_has_what_nothing_beats(figures):
    points = [(3, 1), (1, 3), (2, 4), (2, 3), (4, 1), (2.5, 2)]
    assert figures.envelope(points) == [(1, 3), (2.5, 2), (3, 1)]
    assert figures.envelope([]) == []


def test_tables_say_what_choosing_blocks_reads(monkeypatch):
    """By hand, for heads of 64 channels; both bounds of 16 tokens are a sixteenth of the cache."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    scores = importlib.import_module("make_tables").SCORES
    shares = {key: tuple(shares) for key, (_, *shares) in scores.items()}
    assert shares["scorers", "pooled"] == pytest.approx((1 / 32, 1 / 16))
    assert shares["scorers", "per-head"] == pytest.approx((1 / 16, 1 / 16))
    assert shares["scorers", "8-bits"] == pytest.approx((1 / 64, 1 / 32))
    assert shares["scorers", "half-blocks"] == shares["blocks", "pooled"] == pytest.approx((1 / 16, 1 / 8))
    assert shares["blocks", "sketch-2"] == pytest.approx((1 / 16 + 1 / 128, 1 / 16 + 1 / 128))
    assert shares["scorers", "sketch-1"] == pytest.approx((1 / 32 + 1 / 128, 1 / 32 + 1 / 128))
    assert shares["scorers", "sketch-4"] == shares["scorers", "mass"] == (None, None)


def test_the_table_of_memory_is_right_by_hand(monkeypatch):
    """28 layers with 4 KV heads of 128 channels: 28 · 4 · 128 keys and as many values of two bytes per token."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    row = importlib.import_module("make_tables").TABLES["memory"]().splitlines()[4]
    token = 2 * 28 * 4 * 128 * 2
    assert token == 57_344 == 56 * 1024
    assert f"| Qwen2.5-7B | 15.2 | 56 | 0.94 | {token * 2**16 / 1e9:.2f} | {token * 2**18 / 1e9:.2f} |" in row


def test_what_is_computed_on_the_page_for_own_models_is_what_it_says(capsys):
    (code, said) = re.findall(
        r"```python\n(weights = .*?)```\n\n```text\n(.*?)```", (ROOT / "docs" / "use.md").read_text(), re.DOTALL
    )[0]
    exec(code, {})
    assert capsys.readouterr().out == said


SAID = {  # on the page "When not to use it": batches and contexts
    "float16": ((1, 2**12), (1, 2**16), (1, 2**18), (8, 2**16)),
    "float16_sketch": ((1, 2**16), (1, 2**18), (8, 2**16)),
    "float16_sketch_10": ((1, 2**16), (1, 2**18), (8, 2**16)),
    "smollm2": ((1, 2**12),),
    "qwen3": ((8, 2**12),),
}


@pytest.mark.parametrize(("file", "point"), [(file, point) for file, points in SAID.items() for point in points])
def test_speed_ups_in_prose_are_measured(file, point):
    rows = json.loads((RESULTS / "end_to_end" / f"h200_{file}.json").read_text())["rows"]
    (ratio,) = (row["ratio"] for row in rows if (row["protocol"], row["batch"], row["context"]) == ("shared", *point))
    assert re.search(rf"\s{ratio:.2f}\b", (ROOT / "docs" / "when_not.md").read_text())


def test_the_table_of_prompts_shows_the_fastest_dense_way_and_what_did_not_fit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    tables = importlib.import_module("make_tables")
    time = {"us": 2000.0, "low": 1900.0, "high": 2100.0}
    dense = {"flash, whole": {**time, "us": 1900.0}, "cudnn, whole": {**time, "us": 1500.0}, "flash, chunks": time}
    peaks = {"resa": 3e8, "flash, whole": 9e9, "cudnn, whole": 8e9, "flash, chunks": 4e8}
    row = {"context": 8192, "layers": 4, "chunk": 1024, "resa": time, "dense": dense, "ratio": 0.75}
    row |= {"peak_bytes": peaks, "all_layers_us": {"resa": 14_000, "dense": 1.05e7}}
    long = {**row, "context": 2**18, "dense": {"flash, chunks": time}, "ratio": 1.0}
    about = {name: name for name in ("device", "torch", "triton", "dtype", "command", "commit")}
    about |= {"shape": {"n_layer": 28}, "config": {"block_size": 16, "selection": "sketch"}, "rows": [row, long]}
    monkeypatch.setattr(tables, "load", {"docs/results/prefill.json": about}.get)
    head, _, *lines = tables.TABLES["prefill"]().split("\n")[:4]
    assert len(head.split("|")) == len(lines[0].split("|")) == len(lines[1].split("|")) == 10
    times = "| 1.9 [1.9, 2.1] | 1.5 [1.9, 2.1] | 2.0 [1.9, 2.1] | 2.0 [1.9, 2.1] |"
    assert lines[0] == f"| 8K {times} **0.75** | 8.00 / 0.30 | 10.50 / 0.01 |"
    times = "| – | – | 2.0 [1.9, 2.1] | 2.0 [1.9, 2.1] |"
    assert lines[1] == f"| 256K {times} **1.00** | 0.40 / 0.30 | 10.50 / 0.01 |"


def test_a_run_is_compared_with_what_is_recorded(tmp_path):
    """By every number that has an interval: in rows, in nested parts, in lists of intervals."""
    names = ("carried_small", "retrieval_1024", "fidelity_ratios_english", "fidelity_code")
    files = [tmp_path / f"{name}.json" for name in names]
    for path in files:
        shutil.copy(RESULTS / "evidence" / path.name, path)
    done = run("docs/compare_evidence.py", tmp_path)
    assert done.returncode == 0, done.stdout
    counts = [int(n) for n in re.findall(r"(\d+) of \d+ numbers", done.stdout)]
    assert len(counts) == len(files)
    assert min(counts) >= 18
    assert f"{sum(counts)} of {sum(counts)}" in done.stdout

    # Leave one file, whose first number is outside its interval and whose other rows are missing.
    other = json.loads(files[0].read_text())
    row, other["rows"] = other["rows"][0], other["rows"][:1]
    row["right"] = row["right_95"][0] - 0.01
    files[0].write_text(json.dumps(other))
    for path in files[1:]:
        path.unlink()
    done = run("docs/compare_evidence.py", tmp_path)
    assert done.returncode == 1, "more than one in twenty is outside"
    assert f"/rows/0/right = {row['right']:.4f}, not in [" in done.stdout
    assert "/rows/1/right = nan, not in [" in done.stdout
    files[0].unlink()
    assert run("docs/compare_evidence.py", tmp_path).returncode == 1, "nothing to compare"


@pytest.mark.parametrize(
    ("question", "python", "value", "ends", "is_given"),
    [
        ("sweep", "3.11.7", 0.39, [0.3, 0.5], True),
        ("sweep", "3.11.7", 0.41, [0.3, 0.5], False),  # the same documents: the number counts
        ("sweep", "3.12.3", 0.41, [0.39, 0.5], True),  # other documents: both intervals count
        ("sweep", "3.12.3", 0.41, [0.401, 0.5], False),
        ("sweep", "3.12.3", 0.1, [0.0, 0.199], False),
        ("sweep", "3.12.3", 0.3, None, False),
        ("carried", "3.12.3", 0.41, [0.39, 0.5], False),  # programs are the same everywhere
    ],
)
def test_intervals_are_compared_where_documents_differ(tmp_path, monkeypatch, question, python, value, ends, is_given):
    monkeypatch.syspath_prepend(ROOT / "docs")
    compare = importlib.import_module("compare_evidence")
    recorded = {"question": question, "device": "CPU", "python": "3.11.7", "row": {"kl": 0.3, "kl_95": [0.2, 0.4]}}
    found = recorded | {"python": python, "row": {"kl": value, "kl_95": ends}}
    for name, result in (("recorded", recorded), ("found", found)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.json").write_text(json.dumps(result))
    assert compare.main(tmp_path / "found", tmp_path / "recorded") == int(not is_given)


def test_no_result_names_a_folder_of_one_machine():
    files = [*RESULTS.rglob("*.json"), *(ROOT / "reference" / "weights" / "assets").glob("*.json")]
    assert len(files) > 15
    for path in files:
        assert not re.search(r"(^|[\s\"=])/\w+/", path.read_text()), path


def test_the_api_page_shows_every_signature():
    """The block that is made from the source, beside what Python itself says of arguments."""
    page = (ROOT / "docs" / "api.md").read_text()
    (code,) = re.findall(r"<!-- table signatures -->.*?```python\n(.*?)```", page, re.DOTALL)
    package, shown = None, set()
    for part in re.split(r"^# ---- .*\((resa\.\w+)\)$", code, flags=re.MULTILINE)[1:]:
        if part.startswith("resa."):
            package = importlib.import_module(part)
            continue
        for node in ast.parse(part).body:
            name = node.target.id if isinstance(node, ast.AnnAssign) else node.name
            shown.add((package.__name__, name))
            if isinstance(node, ast.FunctionDef):
                found = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert found == list(inspect.signature(getattr(package, name)).parameters), name
            elif isinstance(node, ast.ClassDef) and is_dataclass(getattr(package, name)):
                said = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
                assert said == [each.name for each in fields(getattr(package, name))], name
    assert shown == {(each.__name__, name) for each in (reference, fast) for name in each.__all__}


def test_the_folders_in_the_readme_are_those_there_are():
    (tree,) = re.findall(r"```\n(reference/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    listed, parent = set(), ""
    for indent, folder in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        parent = f"{parent.split('/')[0]}/{folder}" if indent else folder
        listed.add(parent)
    assert all((ROOT / folder).is_dir() for folder in listed)
    there = {path.parent for package in ("reference", "fast") for path in (ROOT / package).rglob("__init__.py")}
    assert {str(path.relative_to(ROOT)) for path in there} <= listed


@pytest.mark.parametrize("package", ["reference", "fast"])
def test_the_readme_of_a_package_names_each_of_its_files(package):
    text = (ROOT / package / "README.md").read_text()
    for path in (ROOT / package).glob("*.py"):
        assert path.name.startswith("__") or path.name in text, path
