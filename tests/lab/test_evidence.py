"""Parts of the evidence: each run once, gone on with after an interruption, done again where anything is another."""

import json
import shlex
import subprocess
import threading
from pathlib import Path

import pytest

from resa.reference.cli.main import build_parser
from resa.reference.lab import evidence
from resa.reference.lab.evidence import ON_CPU, PARTS, SIZES, Part, is_done, run_parts, without
from shipped import digests

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "evidence"
DIGESTS = {"checkpoint_sha256": "abc", "source_sha256": "def"}
WORDS = {"first": "fidelity --tokens 9", "second": "sweep --no-grid"}


def parts(words=WORDS, more=(), measured_with=DIGESTS):
    return {name: Part(own, more, measured_with) for name, own in words.items()}


@pytest.fixture
def out(tmp_path):
    return tmp_path


def written(ran, digest="abc", fails_at=None):
    """A runner that leaves what `resa eval` leaves, and what it was asked."""

    def run(words, is_alone):
        ran.append(words)
        if len(ran) == fails_at:
            raise subprocess.CalledProcessError(1, words)
        path = words[words.index("--out") + 1]
        result = {"command": shlex.join(["resa", *words]), **DIGESTS, "checkpoint_sha256": digest}
        with open(path, "w") as file:
            json.dump(result, file)

    return run


def test_every_part_is_run_once(out, capsys):
    ran = []
    assert run_parts(parts(more=["--device", "cpu"]), out, run=written(ran)) == ["first", "second"]
    assert ran[0] == ["eval", "fidelity", "--tokens", "9", "--device", "cpu", "--out", str(out / "first.json")]
    assert "part 2 of 2: second (resa eval sweep --no-grid)" in capsys.readouterr().err
    assert run_parts(parts(more=["--device", "cuda"]), out, run=written(ran)) == []
    assert len(ran) == 2
    assert "all 2 parts are done" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupted_run_goes_on(out, jobs):
    ran = []
    with pytest.raises(subprocess.CalledProcessError):
        run_parts(parts(), out, run=written(ran, fails_at=2), jobs=jobs)
    (left,) = {"first", "second"} - {path.stem for path in out.iterdir()}
    assert run_parts(parts(), out, run=written(ran), jobs=jobs) == [left]


def test_parts_run_side_by_side(out):
    """Two at a time: each waits until another runs, and no third does."""
    together, running, most = threading.Barrier(2), set(), []
    lock = threading.Lock()

    def run(words, is_alone):
        assert not is_alone
        with lock:
            running.add(words[-1])
            most.append(len(running))
        together.wait(timeout=60)
        with lock:
            running.remove(words[-1])

    many = {str(number): "selection" for number in range(6)}
    assert set(run_parts(parts(many), out, run=run, jobs=2)) == set(many)
    assert max(most) == 2


def test_after_a_failure_nothing_is_begun(out):
    ran = []
    with pytest.raises(subprocess.CalledProcessError):
        run_parts(parts({str(i): "selection" for i in range(9)}), out, run=written(ran, fails_at=2))
    assert len(ran) == 2


def test_what_a_part_says_is_shown_where_it_fails(out, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        run_parts(parts({"one": "selection --tokens 0"}), out, jobs=2)
    assert "resa eval: --tokens: got 0" in capfd.readouterr().err


def test_parts_have_one_thread_unless_told_and_jobs_are_counted_from_one(out, monkeypatch):
    seen = []
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, env, **__: seen.append(env["OMP_NUM_THREADS"]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_parts(parts({"one": "selection"}), out)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_parts(parts({"one": "selection"}), out)
    assert seen == ["1", "3"]
    with pytest.raises(ValueError, match="jobs: got 0; allowed: an integer ≥ 1"):
        run_parts(parts(), out, jobs=0)


def test_another_command_or_checkpoint_is_another_result(out):
    run_parts(parts(), out, run=written([]))
    path, part = out / "first.json", parts()["first"]
    assert is_done(path, part)
    for name in DIGESTS:
        assert not is_done(path, Part(part.words, (), DIGESTS | {name: "abd"}))
    assert not is_done(path, Part("fidelity --tokens 8", (), DIGESTS))
    other = parts(measured_with=DIGESTS | {"checkpoint_sha256": "abd"})
    assert run_parts(other, out, run=written([])) == ["first", "second"], "nothing is of that checkpoint"
    assert run_parts(parts(WORDS | {"first": "fidelity --tokens 8"}), out, run=written([])) == ["first"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"command": 3, "checkpoint_sha256": "abc"}', None])
def test_files_that_hold_no_result_are_not_done(out, content):
    if content is not None:
        (out / "first.json").write_text(content)
    assert not is_done(out / "first.json", Part("", (), DIGESTS))


def test_options_and_their_values_are_left_out():
    assert without(["a", "--out", "x", "b", "--model", "y"], ("--out", "--model")) == ["a", "b"]


def test_sizes_hold_known_parts():
    assert SIZES["small"].items() <= SIZES["full"].items()
    assert set(PARTS) >= ON_CPU


@pytest.mark.parametrize(("name", "model", "words"), [(name, *part) for name, part in PARTS.items()], ids=list(PARTS))
def test_recorded_files_are_of_these_commands(name, model, words):
    """Sequences were decoded several at a time then, which changed no number."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    recorded = without(shlex.split(result["command"])[2:], ["--device", "--model", "--batch"])
    assert recorded == shlex.split(words)
    assert build_parser().parse_args(["eval", *shlex.split(words)]).question == result["question"]
    assert result["checkpoint_sha256"] in digests(model)
