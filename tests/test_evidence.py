"""Parts of the evidence: each run once, gone on with after an interruption, done again where anything is another."""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from resa.reference.cli import build_parser
from resa.reference.evals import evidence
from resa.reference.evals.evidence import SIZES, is_done, run_parts, without

DIGESTS = {"checkpoint_sha256": "abc", "source_sha256": "def"}
PARTS = {"first": "fidelity --tokens 9", "second": "sweep --no-grid"}


@pytest.fixture
def out(tmp_path):
    return tmp_path


def written(ran, digest="abc", fails_at=None):
    """A runner that leaves what `resa eval` leaves, and what it was asked."""

    def run(words):
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
    assert run_parts(PARTS, out, ["--device", "cpu"], DIGESTS, run=written(ran)) == ["first", "second"]
    assert ran[0] == ["eval", "fidelity", "--tokens", "9", "--device", "cpu", "--out", str(out / "first.json")]
    assert "part 2 of 2: second (resa eval sweep --no-grid)" in capsys.readouterr().err
    assert run_parts(PARTS, out, ["--device", "cuda"], DIGESTS, run=written(ran)) == []
    assert len(ran) == 2
    assert "all 2 parts are done" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(out):
    ran = []
    with pytest.raises(subprocess.CalledProcessError):
        run_parts(PARTS, out, [], DIGESTS, run=written(ran, fails_at=2))
    assert run_parts(PARTS, out, [], DIGESTS, run=written(ran)) == ["second"]


def test_another_command_or_checkpoint_is_another_result(out):
    run_parts(PARTS, out, [], DIGESTS, run=written([]))
    path = out / "first.json"
    assert is_done(path, ["fidelity", "--tokens", "9"], DIGESTS)
    for name in DIGESTS:
        assert not is_done(path, ["fidelity", "--tokens", "9"], DIGESTS | {name: "abd"})
    assert not is_done(path, ["fidelity", "--tokens", "8"], DIGESTS)
    assert run_parts(PARTS | {"first": "fidelity --tokens 8"}, out, [], DIGESTS, run=written([])) == ["first"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"command": 3, "checkpoint_sha256": "abc"}'])
def test_files_that_hold_no_result_are_not_done(out, content):
    (out / "first.json").write_text(content)
    assert not is_done(out / "first.json", [], DIGESTS)
    assert not is_done(out / "missing.json", [], DIGESTS)


@pytest.mark.parametrize(
    ("program", "package", "expected"),
    [
        ("/usr/bin/resa", "", ["/usr/bin/resa"]),
        ("x/fast/__main__.py", "resa.fast", [sys.executable, "-m", "resa.fast"]),
        ("x/reference/__main__.py", "resa.reference", [sys.executable, "-m", "resa.reference"]),
        ("pytest", "pytest", [sys.executable, "-m", "resa.reference"]),
    ],
)
def test_parts_run_in_the_program_that_asked_for_them(monkeypatch, program, package, expected):
    """Or else kernels would be left unused without a word."""
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(parent=package))
    assert evidence._program() == expected


def test_options_and_their_values_are_left_out():
    assert without(["a", "--out", "x", "b", "--model", "y"], ("--out", "--model")) == ["a", "b"]


@pytest.mark.parametrize(
    "words", [words for models in SIZES.values() for parts in models.values() for words in parts.values()]
)
def test_every_part_is_a_command(words):
    options = build_parser().parse_args(["eval", *shlex.split(words)])
    assert options.question == shlex.split(words)[0]
