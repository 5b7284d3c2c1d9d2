"""The installed command: which backend decodes where, what is refused, and where dense decoding ends.

What all backends share is tested in test_cli.py, through the reference alone.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from resa.fast import cli
from resa.reference import REFERENCE_OPS, ReSAConfig, Sampling, load_model, save_model
from resa.reference.cli import demo as demo_module
from resa.reference.cli.main import build_parser, chosen_backend
from small_models import Shape
from strategies import DEVICE

SPARSE = ["--block-size", "8", "--min-blocks", "2"]
TEXT = "def f(x):\n    return x + 1\n\n" * 3
CodeShape = type("CodeShape", (Shape,), {"vocab": 4096})  # over the shipped tokenizer's vocabulary
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton comes for Linux only")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, CodeShape(seed=2, head_dim=16, context=128, tied=False).model(torch.float32))
    return path


@pytest.fixture
def resa(called):
    return lambda *arguments: called(cli.main, *arguments)


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
            monkeypatch.setattr("resa.fast.gpu.limits.INTERPRETED", kind == INTERPRETER)
        else:
            pytest.skip("triton comes for Linux only")

    return become


def chosen(*arguments, command="generate"):
    return chosen_backend(build_parser(cli.BACKENDS).parse_args([command, *arguments]))


MACHINES = [  # kind, --device, what "auto" takes there, and what Triton lacks there
    (NVIDIA, "cuda", "triton", None),
    (NVIDIA, "cuda:0", "triton", None),
    (NVIDIA, "cpu", "reference", "--device cuda"),
    (NO_GPU, "cpu", "reference", "an NVIDIA GPU"),
    (AMD, "cuda", "reference", "an NVIDIA GPU"),
    (INTERPRETER, "cpu", "reference", None),
    (INTERPRETER, "cuda", "reference", "--device cpu while TRITON_INTERPRET=1"),
    (NO_TRITON, "cpu", "reference", "the package triton"),
    (NO_TRITON, "cuda", "reference", "the package triton"),
]


@pytest.mark.parametrize("command", ["generate", "demo"])
@pytest.mark.parametrize(("kind", "device", "expected", "lacks"), MACHINES)
def test_auto_takes_triton_on_an_nvidia_gpu_alone(resa, machine, tmp_path, command, kind, device, expected, lacks):
    """It may be asked for wherever it runs. Elsewhere it is refused before any work: there is no model to be read."""
    machine(kind)
    assert chosen("--device", device, command=command) == expected
    assert chosen("--device", device, "--backend", "auto", command=command) == expected
    assert chosen("--device", device, "--backend", "reference", command=command) == "reference"
    asked = ["--backend", "triton", "--device", device]
    if lacks is None:
        assert chosen(*asked, command=command) == "triton"
        return
    status, out, err = resa(command, *asked, "--model", tmp_path / "missing.safetensors")
    assert (status, out) == (2, "")
    refusal = rf"resa {command}: --backend: got triton; allowed: reference \(triton needs {lacks}[^\n]*\)\n"
    assert re.fullmatch(refusal, err), err


def test_a_gpu_that_is_not_there_is_refused_first(resa, machine):
    machine(NO_GPU)
    err = resa("generate", "--backend", "triton", "--device", "cuda")[2]
    assert err == "resa generate: --device: got cuda; allowed: cpu\n"


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
    words = ["generate", "x = ", "--tokens", "3", "--model", path, "--json"]
    for command in (["-c", WITHOUT_TRITON, *words], ["-m", "resa.fast", *words, "--device", "cpu"]):
        found = python(*command)
        assert (found.returncode, found.stderr) == (0, "")
        assert json.loads(found.stdout)["backend"] == "reference"
    refused = python("-c", WITHOUT_TRITON, *words, "--backend", "triton")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"resa generate: --backend: got triton; allowed: .*the package triton.*\n", refused.stderr)


@needs_triton
@pytest.mark.parametrize("first", ["import resa.fast", "import resa.fast.generate", "from resa.fast import attention"])
def test_the_package_holds_its_functions_whatever_is_imported_first(first):
    """Importing the module `generate` would put it in the place of the function."""
    then = "from resa.fast import TRITON_OPS, generate, sparse_attention as sparse"
    found = python(
        "-c", f"{first}\n{then}\nprint(callable(generate), sparse.__wrapped__ is TRITON_OPS.sparse_attention)"
    )
    assert (found.stdout, found.stderr) == ("True True\n", "")


# ---- Decoding with the kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def on_triton():
    """The arguments that ask for the kernels where they run in this process."""
    pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
    return ["--backend", "triton", "--device", DEVICE]


@pytest.fixture
def pays_from(monkeypatch):
    """Puts a length in the place of the measured crossover."""

    def become(length):
        monkeypatch.setitem(cli.BACKENDS, "triton", replace(cli.BACKENDS["triton"], crossover=lambda selection: length))

    return become


@pytest.mark.fast
@pytest.mark.parametrize("n_dense", [0, 5])
def test_generate_decodes_with_the_kernels_densely_then_sparsely(resa, path, tokenizer, pays_from, on_triton, n_dense):
    """Equal tokens to the library's, one stream of random numbers through both parts."""
    prompt, generators = tokenizer.encode_ordinary(TEXT), [torch.Generator().manual_seed(5)]
    pays_from(len(prompt) + n_dense)
    arguments = ["generate", TEXT, "--tokens", 8, "--model", path, *SPARSE, "--interval", 3, *on_triton]
    sampled = ["--temperature", 0.7, "--top-p", 0.9, "--seed", 5]
    status, out, err = resa(*arguments, *sampled, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    generate, model = import_module("resa.fast.generate").generate, load_model(path, device=DEVICE)
    sparse = ReSAConfig(8, min_blocks=2, interval=3, selection="sketch")
    ways = [(n_dense, ReSAConfig(8, interval=1)), (8 - n_dense, sparse)]
    wanted = []
    for n_tokens, config in ways:
        (part,) = generate(model, [prompt + wanted], n_tokens, config, Sampling(0.7, 0.9), generators=generators)
        wanted += part.tokens
    assert result["tokens"] == wanted
    assert (result["backend"], result["dense_below"]) == ("triton", len(prompt) + n_dense)
    status, out, err = resa(*arguments, *sampled)
    assert (status, out) == (0, TEXT + result["text"] + "\n")
    assert " s (backend triton). A sparse step read 2 of " in err
    assert ("measured to be faster" in err) == (n_dense > 0)


@needs_triton
def test_kernels_that_compile_are_counted_and_those_on_disk_are_not():
    """Whoever listened to Triton before goes on doing so, and afterwards nobody else does."""
    knobs, told, heard = import_module("triton").knobs.compilation, [], []
    knobs.listener = lambda **about: heard.append(about)
    try:
        before = knobs.listener
        with cli.BACKENDS["triton"].watched(told.append):
            for hit in (True, False, True, False):
                knobs.listener(src="a kernel", cache_hit=hit)
        assert told == [f"Compiling kernels, which later runs find on disk: {n} …" for n in (1, 2)]
        assert heard == [{"src": "a kernel", "cache_hit": hit} for hit in (True, False, True, False)]
        with pytest.raises(ZeroDivisionError), cli.BACKENDS["triton"].watched(told.append):
            1 / 0  # noqa: B018
        assert knobs.listener is before
    finally:
        knobs.listener = None


@pytest.mark.fast
def test_the_measured_crossover_is_taken_unless_another_is_given(resa, path, on_triton):
    arguments = ["generate", TEXT, "--tokens", 3, "--model", path, *SPARSE, *on_triton, "--json", "--selection"]
    asked = (["bounds"], ["sketch"], ["sketch", "--dense-below", 0])
    told = [json.loads(resa(*arguments, *more)[1])["dense_below"] for more in asked]
    assert told == [2**14, 2**16, 0]  # docs/performance.md, "Where ReSA begins to pay"


@pytest.mark.fast
def test_the_demo_decodes_with_the_kernels(resa, path, tmp_path, monkeypatch, on_triton):
    """It reports so, and the model that writes has these operations and no others."""
    operations, write_texts = [], demo_module.write_texts

    def watched(model, *arguments):
        operations.append(model.ops)
        return write_texts(model, *arguments)

    monkeypatch.setattr(demo_module, "write_texts", watched)
    (tmp_path / "prompt.py").write_text(TEXT * 2)
    monkeypatch.chdir(tmp_path)
    command = ["demo", "--prompt-file", "prompt.py", "--prompt-tokens", 40, "--tokens", 4, "--intervals", 2, *SPARSE]
    found = [json.loads(resa(*command, "--model", path, *on, "--json")[1]) for on in (on_triton, ["--device", "cpu"])]
    assert [each["backend"] for each in found] == ["triton", "reference"]
    assert operations == [import_module("resa.fast").TRITON_OPS, REFERENCE_OPS]
    assert found[0]["written"] == found[1]["written"]
    assert list(found[0]["written"]) == ["dense", "sparse", "ReSA f=2"]
    for own, other in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert own["way"] == other["way"]
        assert own["kl"] == pytest.approx(other["kl"], abs=1e-3), own["way"]
