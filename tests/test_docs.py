"""What the pages say is so: the example runs as written, tables and figures equal their files. More in test_site.py."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """A Python program of the project; one torch thread, as several tests may run beside each other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_example_in_the_readme_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert sum(1 for line in code.splitlines() if line.strip()) <= 10
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith('path, "rb") as f:\n        return f.read()')
    # 38 tokens chosen, the last never fed: 37 = 32 + 5.
    assert done.stdout.endswith("\n5 tokens since the last rectification\n")


def test_tables_are_what_their_files_say():
    done = run("docs/make_tables.py", "--check")
    assert (done.returncode, done.stdout) == (0, "")


def test_figures_are_what_their_files_say():
    done = run("docs/make_figures.py", "--check")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_run_is_compared_with_what_is_recorded(tmp_path):
    """By every number that has an interval: in rows, in nested parts, in lists of intervals."""
    folder = ROOT / "docs" / "results" / "evidence"
    files = ("carried_small", "selection", "sweep", "drift")
    for name in files:
        shutil.copy(folder / f"{name}.json", tmp_path)
    done = run("docs/compare_evidence.py", tmp_path)
    assert done.returncode == 0, done.stdout
    counts = [int(n) for n in re.findall(r"(\d+) of \d+ numbers", done.stdout)]
    assert len(counts) == len(files)
    assert min(counts) >= 18
    assert f"{sum(counts)} of {sum(counts)}" in done.stdout
    other = json.loads((folder / "carried_small.json").read_text())
    for i, row in enumerate(other["rows"]):
        row["right"] = row["right_95"][1] + 0.01 if i % 2 else row["right_95"][0] - 0.01
    (tmp_path / "carried_small.json").write_text(json.dumps(other))
    done = run("docs/compare_evidence.py", tmp_path)
    for i in (0, 1):
        assert f"/rows/{i}/right = {other['rows'][i]['right']:.4f}, not in [" in done.stdout
    for name in files[1:]:
        (tmp_path / f"{name}.json").unlink()
    assert run("docs/compare_evidence.py", tmp_path).returncode == 1, "more than one in twenty is outside"
    del other["rows"][1:]
    (tmp_path / "carried_small.json").write_text(json.dumps(other))
    done = run("docs/compare_evidence.py", tmp_path)
    assert done.returncode == 1
    assert "/rows/1/right = nan, not in [" in done.stdout, "what is missing is not given again"
    (tmp_path / "carried_small.json").unlink()
    assert run("docs/compare_evidence.py", tmp_path).returncode == 1, "nothing to compare"


@pytest.mark.parametrize(
    ("question", "python", "value", "ends", "is_given"),
    [
        ("sweep", "3.11.7", 0.39, [0.3, 0.5], True),
        ("sweep", "3.11.7", 0.41, [0.3, 0.5], False),  # of the same text the number counts
        ("sweep", "3.12.3", 0.41, [0.39, 0.5], True),  # of other documents both intervals do
        ("sweep", "3.12.3", 0.41, [0.401, 0.5], False),
        ("sweep", "3.12.3", 0.1, [0.0, 0.199], False),
        ("sweep", "3.12.3", 0.3, None, False),
        ("carried", "3.12.3", 0.41, [0.39, 0.5], False),  # programs are the same everywhere
        ("written", "3.12.3", 0.39, None, True),
    ],
)
def test_of_other_documents_intervals_are_compared(
    tmp_path, monkeypatch, capsys, question, python, value, ends, is_given
):
    monkeypatch.syspath_prepend(ROOT / "docs")
    compare = importlib.import_module("compare_evidence")
    recorded = {"question": question, "device": "CPU", "python": "3.11.7", "row": {"kl": 0.3, "kl_95": [0.2, 0.4]}}
    found = recorded | {"python": python, "row": {"kl": value, "kl_95": ends}}
    for name, result in (("recorded", recorded), ("found", found)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.json").write_text(json.dumps(result))
    assert compare.main(tmp_path / "found", tmp_path / "recorded") == int(not is_given)
    assert f"{int(is_given)} of 1" in capsys.readouterr().out


def test_no_result_names_a_folder_of_one_machine():
    files = [*(ROOT / "docs" / "results").rglob("*.json"), *(ROOT / "reference" / "assets").glob("*.json")]
    assert len(files) > 15
    for path in files:
        assert not re.search(r"(^|[\s\"=])/\w+/", path.read_text()), path


def test_the_file_tree_in_the_readme_is_the_one_there_is():
    (tree,) = re.findall(r"```\n(reference/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    reference, fast = tree.split("\nfast/")
    fast = fast.split("\ntests/")[0]
    for package, part, inner in (("reference", reference, "evals"), ("fast", fast, "bench")):
        listed = set(re.findall(r"\b(\w+\.py)\b", part))
        there = {path.name for path in (ROOT / package).rglob("*.py")} - {"__init__.py", "__main__.py"}
        unlisted = {"statistics.py", "timing.py", "layer.py", "e2e.py", "peers.py"}  # helpers of the folders named
        assert there - unlisted <= listed <= there, package
        assert f"{inner}/" in part
    for folder in ("reference", "fast", "tests", "tutorials", "docs"):
        assert re.search(rf"^{folder}/ ", tree, re.MULTILINE)
        assert (ROOT / folder).is_dir()
