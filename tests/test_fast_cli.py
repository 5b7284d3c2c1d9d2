"""The installed command: which backend decodes where, what is refused, and where `dense_below` comes from.

What all backends share is tested in test_cli.py, through `python -m resa.reference`.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import Shape
from strategies import DEVICE

from resa.fast import cli, crossover
from resa.fast.crossover import dense_below
from resa.reference import ReSAConfig, load_model, save_model
from resa.reference import cli as reference_cli
from resa.reference import demo as demo_module
from resa.reference.tokenizer import load_tokenizer

TABLE = Path(crossover.__file__).with_name("crossover.json")
SPARSE = ["--block-size", "8", "--min-blocks", "2"]
TEXT = "def f(x):\n    return x + 1\n\n" * 3
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton comes for Linux only")


class CodeShape(Shape):
    """A small model that the kernels can decode, over the shipped tokenizer's vocabulary."""

    vocab = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, CodeShape(seed=2, head_dim=16, context=128, tied=False).model(torch.float32))
    return path


@pytest.fixture
def resa(capsys):
    """Runs one command in this process -> (exit status, standard output, standard error)."""

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse leaves so
            status = leaving.code
        return status, *capsys.readouterr()

    return run


def row(context, dense_us, resa_us, batch=1):
    return {"batch": batch, "context": context, "dense_us": dense_us, "resa_us": resa_us}


@pytest.fixture
def measured(monkeypatch):
    """A table in the place of the shipped one: at batch 1, ReSA is the faster from 2,048 tokens on."""
    rows = [row(1024, 50.0, 60.0), row(2048, 60.0, 59.0), row(4096, 90.0, 61.0), row(1024, 90.0, 60.0, batch=8)]
    monkeypatch.setattr(crossover, "_shipped_rows", lambda: rows)


# ---- Which backend ---------------------------------------------------------------------------------------------------

NVIDIA, NO_GPU, AMD, INTERPRETER, NO_TRITON = "an NVIDIA GPU", "no GPU", "an AMD GPU", "the interpreter", "no triton"


@pytest.fixture
def machine(monkeypatch):
    """Makes torch and Triton say what they would on another machine; there is a GPU unless it says otherwise."""

    def become(kind):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind != NO_GPU)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(kind != NO_GPU))
        monkeypatch.setattr(torch.version, "hip", "6.4" if kind == AMD else None)
        if kind == NO_TRITON:
            monkeypatch.setattr(cli, "find_spec", lambda name: None)
        elif find_spec("triton"):
            monkeypatch.setattr("resa.fast.checks.INTERPRETED", kind == INTERPRETER)
        else:
            pytest.skip("triton comes for Linux only")

    return become


def chosen(*arguments, command="generate"):
    options = reference_cli.build_parser(cli.BACKENDS).parse_args([command, *arguments])
    return reference_cli._chosen_backend(options)


@pytest.mark.parametrize("command", ["generate", "demo"])
@pytest.mark.parametrize(
    ("kind", "device", "expected"),
    [
        (NVIDIA, "cuda", "triton"),
        (NVIDIA, "cuda:0", "triton"),
        (NVIDIA, "cpu", "reference"),
        (NO_GPU, "cpu", "reference"),
        (AMD, "cuda", "reference"),
        (INTERPRETER, "cpu", "reference"),
        (INTERPRETER, "cuda", "reference"),
        (NO_TRITON, "cpu", "reference"),
        (NO_TRITON, "cuda", "reference"),
    ],
)
def test_auto_takes_triton_on_an_nvidia_gpu_alone(machine, command, kind, device, expected):
    machine(kind)
    assert chosen("--device", device, command=command) == expected
    assert chosen("--device", device, "--backend", "auto", command=command) == expected
    assert chosen("--device", device, "--backend", "reference", command=command) == "reference"


@pytest.mark.parametrize(("kind", "device"), [(NVIDIA, "cuda"), (INTERPRETER, "cpu")])
def test_triton_may_be_asked_for_where_it_runs(machine, kind, device):
    machine(kind)
    assert chosen("--device", device, "--backend", "triton") == "triton"


@pytest.mark.parametrize("command", ["generate", "demo"])
@pytest.mark.parametrize(
    ("kind", "device", "needed"),
    [
        (NVIDIA, "cpu", "--device cuda"),
        (NO_GPU, "cpu", "an NVIDIA GPU"),
        (AMD, "cuda", "an NVIDIA GPU"),
        (INTERPRETER, "cuda", "--device cpu while TRITON_INTERPRET=1"),
        (NO_TRITON, "cuda", "the package triton"),
        (NO_TRITON, "cpu", "the package triton"),
    ],
)
def test_triton_is_refused_by_name_where_it_does_not_run(resa, machine, tmp_path, command, kind, device, needed):
    """Before any work: there is no model to be read."""
    machine(kind)
    missing = tmp_path / "missing.safetensors"
    status, out, err = resa(command, "--backend", "triton", "--device", device, "--model", missing)
    assert (status, out) == (2, "")
    refusal = rf"resa {command}: --backend: got triton; allowed: reference \(triton needs {needed}[^\n]*\)\n"
    assert re.fullmatch(refusal, err), err


def test_a_gpu_that_is_not_there_is_refused_first(resa, machine):
    machine(NO_GPU)
    err = resa("generate", "--backend", "triton", "--device", "cuda")[2]
    assert err == "resa generate: --device: got cuda; allowed: cpu\n"


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_help_names_the_backends(resa, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")  # or argparse breaks the lines that are looked at
    status, out, err = resa(command, "--help")
    assert (status, err) == (0, "")
    assert re.search(r"--backend \{auto,triton,reference\}\s+[^-]*--device [^-]*\(default: auto\)", out)
    assert resa(command, "--backend", "cublas")[2].startswith(f"resa {command}: argument --backend: invalid choice")


# ---- Where Triton is missing -----------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from resa.fast.cli import main
sys.exit(main())
"""


def python(*arguments):
    """A Python process that interprets no kernels, whatever this one does."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_where_triton_is_missing_the_reference_decodes(path):
    command = ["-c", WITHOUT_TRITON, "generate", "x = ", "--tokens", "3", "--model", path, "--json"]
    found = python(*command)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["backend"] == "reference"
    refused = python(*command, "--backend", "triton")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"resa generate: --backend: got triton; allowed: .*the package triton.*\n", refused.stderr)


def test_the_package_is_a_command(path):
    found = python("-m", "resa.fast", "generate", "x = ", "--tokens", "3", "--model", path)
    assert found.returncode == 0
    assert found.stderr.endswith(" s (backend reference)\n")


@needs_triton
@pytest.mark.parametrize("first", ["import resa.fast", "import resa.fast.generate", "from resa.fast import attention"])
def test_the_package_holds_its_functions_whatever_is_imported_first(first):
    """Importing the module `generate` would put it in the place of the function."""
    then = "from resa.fast import TRITON_OPS, generate, sparse_attention as sparse"
    found = python("-c", f"{first}\n{then}\nprint(callable(generate), TRITON_OPS.sparse_attention is sparse)")
    assert (found.stdout, found.stderr) == ("True True\n", "")


# ---- Decoding with the kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def on_triton():
    """The arguments that ask for the kernels where they run in this process."""
    pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
    return ["--backend", "triton", "--device", DEVICE]


@pytest.mark.fast
def test_generate_decodes_with_the_kernels(resa, path, tokenizer, measured, on_triton):
    arguments = ["generate", TEXT, "--tokens", 8, "--model", path, *SPARSE, "--interval", 3, *on_triton]
    sampled = ["--temperature", 0.7, "--top-p", 0.9, "--seed", 5, "--dense-below", 0]
    status, out, err = resa(*arguments, *sampled, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    wanted = import_module("resa.fast.generate").generate(
        load_model(path, device=DEVICE),
        [tokenizer.encode_ordinary(TEXT)],
        8,
        ReSAConfig(block_size=8, min_blocks=2, interval=3),
        temperature=0.7,
        top_p=0.9,
        generator=[torch.Generator().manual_seed(5)],
    )
    assert result["tokens"] == wanted.tokens[0]
    assert (result["backend"], result["dense_below"]) == ("triton", 0)
    status, out, err = resa(*arguments, *sampled)
    assert (status, out) == (0, TEXT + result["text"] + "\n")
    assert err.endswith(" s (backend triton)\n")


@pytest.mark.fast
def test_generate_takes_dense_below_from_the_table_and_says_so(resa, path, measured, on_triton):
    arguments = ["generate", TEXT, "--tokens", 3, "--model", path, *SPARSE, *on_triton]
    told = {}
    for given_value in ([], ["--dense-below", "auto"], ["--dense-below", 0], ["--dense-below", 77]):
        status, out, _ = resa(*arguments, *given_value, "--json")
        assert status == 0
        told[tuple(given_value[1:])] = json.loads(out)["dense_below"]
    assert told == {(): 2048, ("auto",): 2048, (0,): 0, (77,): 77}
    assert resa(*arguments)[2].endswith(" s (backend triton, dense below 2,048 tokens)\n")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_reference_needs_no_table(resa, path, monkeypatch, backend):
    monkeypatch.setattr(crossover, "_shipped_rows", lambda: pytest.fail("nobody was to ask for it"))
    status, out, _ = resa("generate", TEXT, "--tokens", 3, "--model", path, "--backend", backend, "--json")
    result = json.loads(out)
    assert (status, result["backend"], result["dense_below"]) == (0, "reference", 0)


@pytest.mark.fast
def test_what_the_kernels_do_not_support_is_refused_by_name(resa, path, measured, on_triton):
    status, out, err = resa("generate", TEXT, "--block-size", 4, "--model", path, "--json", *on_triton)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"resa generate: block_size: got 4; allowed: [^\n]+\n", err), err


@pytest.mark.fast
def test_the_demo_decodes_with_the_kernels(resa, path, tmp_path, monkeypatch, on_triton):
    """It reports so, and the model it runs on has these operations and no others."""
    operations = []
    run_demo = demo_module.run_demo

    def watched(model, *arguments):
        operations.append(model.ops)
        return run_demo(model, *arguments)

    monkeypatch.setattr(demo_module, "run_demo", watched)
    file = tmp_path / "prompt.py"
    file.write_text(TEXT * 2)
    size = ["--prompt-tokens", 40, "--tokens", 4, "--intervals", 2, *SPARSE, "--figure", tmp_path / "figure.png"]
    command = ["demo", "--prompt-file", file, *size, "--model", path]
    status, out, _ = resa(*command, *on_triton)
    assert status == 0
    assert f"Continuing prompt.py: 40 tokens read, 4 to write, on {DEVICE} (backend triton)." in out
    status, out, _ = resa(*command, *on_triton, "--json")
    assert (status, json.loads(out)["backend"]) == (0, "triton")
    assert operations == [import_module("resa.fast").TRITON_OPS] * 2
    rows = {"triton": json.loads(out)["rows"], "reference": json.loads(resa(*command, "--json")[1])["rows"]}
    for name, numbers in rows["reference"].items():
        assert rows["triton"][name]["kl"] == pytest.approx(numbers["kl"], abs=1e-3), name
        assert rows["triton"][name]["mean_drift"] == pytest.approx(numbers["mean_drift"], abs=1e-3), name


# ---- Where dense decoding ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch", "expected"),
    [
        ([row(1024, 2, 1), row(2048, 2, 1)], 1, 1024),  # the shortest measured: of shorter ones nothing is known
        ([row(1024, 1, 2), row(2048, 2, 1)], 1, 2048),
        ([row(1024, 1, 2), row(2048, 1, 2)], 1, 2049),  # never
        ([row(1024, 1, 2), row(2048, 1, 1)], 1, 2049),  # as fast is not faster
        ([row(1024, 2, 1), row(2048, 1, 2), row(4096, 2, 1)], 1, 4096),  # for good, not for once
        ([row(4096, 2, 1), row(1024, 1, 2), row(2048, 2, 1)], 1, 2048),  # in any order
        ([row(1024, 1, 2), row(2048, 2, 1), row(1024, 2, 1, batch=8)], 7, 2048),  # the batch below
        ([row(1024, 1, 2), row(2048, 2, 1), row(1024, 2, 1, batch=8)], 8, 1024),
        ([row(1024, 1, 2), row(2048, 2, 1), row(1024, 2, 1, batch=8)], 64, 1024),  # beyond the table
        ([row(512, 2, 1, batch=4), row(1024, 2, 1, batch=8)], 2, 512),  # before it
    ],
)
def test_the_crossover_by_hand(rows, batch, expected):
    assert dense_below(batch, rows) == expected


ROWS = st.lists(
    st.builds(row, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 4, 16])),
    min_size=1,
    unique_by=lambda each: (each["batch"], each["context"]),
)


@given(ROWS, st.integers(1, 20))
def test_the_crossover_is_the_first_length_that_never_loses(rows, batch):
    """From it on ReSA wins everywhere, and a table of the winning lengths alone has no shorter one that could do."""
    known = {each["batch"] for each in rows}
    near = max((each for each in known if each <= batch), default=min(known))
    wins = {each["context"]: each["resa_us"] < each["dense_us"] for each in rows if each["batch"] == near}
    found = dense_below(batch, rows)
    assert all(won for context, won in wins.items() if context >= found)
    assert found in wins or found == max(wins) + 1
    assert not any(all(wins[longer] for longer in wins if longer >= context) for context in wins if context < found)


@pytest.mark.parametrize("batch", [0, -1, True, 1.0, None])
def test_a_batch_is_a_positive_integer(batch):
    with pytest.raises(ValueError, match="batch: got"):
        dense_below(batch, [row(1024, 1, 2)])


def test_the_example_is_true():
    assert doctest.testmod(crossover) == (0, 3)


@pytest.mark.skipif(not TABLE.is_file(), reason="nothing was measured yet")
def test_the_shipped_table_is_whole():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert all(table[name] for name in ("device", "torch", "triton", "commit", "command"))
    default = ReSAConfig()
    shape = table["shape"]
    assert all(shape[name] == getattr(default, name) for name in ("block_size", "active_ratio", "interval"))
    assert len({(each["batch"], each["context"]) for each in table["rows"]}) == len(table["rows"])
    for each in table["rows"]:
        assert each["batch"] >= 1
        assert each["context"] >= 1
        assert min(each["dense_us"], each["resa_us"]) > 0
    assert {dense_below(batch) for batch in (1, 8, 64)} <= {
        edge for each in table["rows"] for edge in (each["context"], each["context"] + 1)
    }
