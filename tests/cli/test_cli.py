"""The command line: what it prints where, and that a bad argument is one line, status 2 and never a traceback."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from resa.reference import ReSAConfig, Sampling, generate, load_model, save_model
from resa.reference.cli import demo as demo_module
from resa.reference.cli import demo_carried, lab
from resa.reference.cli import generate as generate_command
from resa.reference.cli import main as command_line
from resa.reference.cli.main import BACKENDS, REFERENCE, build_parser, main, sparsity
from resa.reference.lab import corpus, evidence, fidelity, train
from resa.reference.lab.corpus import Corpus, Document, read_documents
from resa.reference.weights import models
from resa.reference.weights.checkpoint import shipped_checkpoint
from resa.reference.weights.files import source_digest
from small_models import Shape

COMMANDS = ["demo", "generate", "train", "eval", "evidence", "conformance", "exercise"]
SPARSE = ["--block-size", "4", "--min-blocks", "2"]
SKETCH = ReSAConfig(selection="sketch")  # the default of `resa generate`
CodeShape = type("CodeShape", (Shape,), {"vocab": 4096})  # over the shipped tokenizer's vocabulary
FUNCTIONS = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(4))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random model on disk."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, CodeShape(seed=2, context=128, tied=False).model(torch.float32), dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def long_path(tmp_path_factory):
    """A model with a long context, and as little else as possible."""
    path = tmp_path_factory.mktemp("model") / "long.safetensors"
    save_model(path, CodeShape(layers=1, kv_heads=1, group=1, head_dim=2, hidden=4, context=8192).model(torch.float32))
    return path


@pytest.fixture
def resa(called):
    return lambda *arguments, backends=BACKENDS: called(main, *arguments, backends=backends)


@pytest.fixture
def library(monkeypatch):
    """A standard library of a few hundred tokens, for commands that would read the real one for seconds."""
    code = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40))
    train_side = [Document("a", code), Document("b", code.replace("f", "g"))]
    held_out = [Document(f"h{i}", code.replace("x", f"y{i}")[i:]) for i in range(3)]
    asked = []

    def local_corpus(*, packages=False):
        asked.append(packages)
        return Corpus(train_side, held_out, {"train_files": 2})

    monkeypatch.setattr(train, "local_corpus", local_corpus)
    monkeypatch.setattr(corpus, "library", lambda: held_out)
    return asked


def assert_refused(result, command, *named):
    """Status 2 and exactly one line on standard error, which names what is wrong."""
    status, _, err = result
    assert status == 2, err
    assert re.fullmatch(rf"resa {command}: [^\n]+\n", err), err
    assert all(re.search(name, err) for name in named), err


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(resa, command):
    status, out, err = resa(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: resa {command}")


def test_the_defaults_are_those_of_the_configuration_but_blocks_are_chosen_by_sketches():
    options = build_parser().parse_args(["generate"])
    assert sparsity(options, interval=options.interval) == ReSAConfig(selection="sketch")
    assert REFERENCE.crossover is None


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate", "--nonsense"], ["eval", "taste"]])
def test_unknown_commands_and_options_are_refused(resa, arguments):
    """In one line, which says where help is to be had."""
    status, out, err = resa(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"resa[ a-z]*: [^\n]+ --help\)\n", err), err


def test_the_package_is_a_command_whose_help_lists_the_commands():
    found = subprocess.run([sys.executable, "-m", "resa.reference", "--help"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert all(re.search(rf"^ +{command}\b", found.stdout, re.MULTILINE) for command in COMMANDS)


# generate


def by_hand(path, tokenizer, text, n_tokens, config, sampling=None):
    generators, prompt = [torch.Generator().manual_seed(0)], tokenizer.encode_ordinary(text)
    return generate(load_model(path), [prompt], n_tokens, config, sampling, generators=generators)[0].tokens


@pytest.mark.parametrize(
    ("arguments", "config", "sampling"),
    [
        ([], SKETCH, Sampling()),
        (["--temperature", "1.5", "--top-p", "0.9"], SKETCH, Sampling(1.5, 0.9)),
        (["--temperature", "0.7", "--top-k", "20"], SKETCH, Sampling(0.7, top_k=20)),
        ([*SPARSE, "--interval", "never"], replace(SKETCH, block_size=4, min_blocks=2, interval=None), Sampling()),
        (
            [*SPARSE, "--interval", "3", "--schedule", "paper", "--active-ratio", "0.3", "--local-blocks", "2"],
            ReSAConfig(4, 0.3, 2, 2, 3, "paper", selection="sketch"),
            Sampling(),
        ),
        ([*SPARSE, "--selection", "bounds"], ReSAConfig(block_size=4, min_blocks=2), Sampling()),
        ([*SPARSE, "--interval", "1"], replace(SKETCH, block_size=4, min_blocks=2, interval=1), Sampling()),
        ([*SPARSE, "--dense-layers", "1"], replace(SKETCH, block_size=4, min_blocks=2, dense_layers=1), Sampling()),
    ],
)
def test_generate_is_generate(resa, path, tokenizer, arguments, config, sampling):
    wanted = by_hand(path, tokenizer, FUNCTIONS, 12, config, sampling)
    status, out, err = resa("generate", FUNCTIONS, "--tokens", 12, "--model", path, "--json", *arguments)
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert result["tokens"] == wanted
    assert result["text"] == tokenizer.decode(wanted)
    assert result["prompt_tokens"] == len(tokenizer.encode_ordinary(FUNCTIONS))
    assert (result["backend"], result["dense_below"]) == ("reference", 0)
    assert result["seconds"] >= 0


def test_generate_writes_the_prompt_and_its_continuation(resa, path, tokenizer):
    text = "naïve = 1\n"
    wanted = tokenizer.decode(by_hand(path, tokenizer, text, 9, SKETCH))
    status, out, err = resa("generate", text, "--tokens", 9, "--model", path)
    assert (status, out) == (0, text + wanted + "\n")
    n_prompt = len(tokenizer.encode_ordinary(text))
    said = "Never longer than 16 blocks: every step read all of it"
    assert re.fullmatch(rf"{n_prompt} \+ 9 tokens in [0-9.]+ s \(backend reference\)\. {said}\n", err)


def test_generate_without_a_prompt_or_without_tokens(resa, path):
    assert resa("generate", "--tokens", 0, "--model", path)[:2] == (0, "def fibonacci(n):\n\n")
    out = resa("generate", "--tokens", 0, "--model", path, "--json")[1]
    assert json.loads(out)["tokens"] == []


def test_a_seed_decides_the_sample(resa, path):
    def tokens(seed):
        out = resa("generate", "x = ", "--tokens", 8, "--temperature", 1, "--seed", seed, "--model", path, "--json")[1]
        return json.loads(out)["tokens"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_prompt_file_is_the_prompt(resa, path, tmp_path):
    """Its bytes are: line ends stay as they are."""
    file = tmp_path / "größe.py"
    file.write_bytes("y = 'ü'\r\n".encode())
    assert resa("generate", "--prompt-file", file, "--tokens", 5, "--model", path)[1].startswith("y = 'ü'\r\n")
    by_file = json.loads(resa("generate", "--prompt-file", file, "--tokens", 5, "--model", path, "--json")[1])
    by_text = json.loads(resa("generate", "y = 'ü'\r\n", "--tokens", 5, "--model", path, "--json")[1])
    assert by_file["tokens"] == by_text["tokens"]


def test_the_end_of_text_is_the_stop_token(path, tokenizer):
    found = command_line.load(build_parser().parse_args(["generate", "--model", str(path)]))
    assert found.stop_tokens == [tokenizer.encode_single_token("<|endoftext|>")] == [4095]


TEXT_BYTES = st.binary(max_size=4) | st.text(max_size=2).map(str.encode)


@given(st.lists(TEXT_BYTES, max_size=4), st.integers(0, 3))
@example(["é".encode(), "€".encode()], 1)
@example([b"a\xe2", b"\x82", b"\xacb"], 0)
@example([b"\xff", b"\xe2"], 0)
@example([b"\xff\xe2", b"\x82", b"\xac"], 4)
def test_characters_are_written_whole(pieces, cut):
    """Bytes arrive in tokens that may cut a character; what is written is the text of them all."""
    whole = b"".join(pieces)
    tokens = [whole[:cut], *(whole[i : i + 1] for i in range(cut, len(whole)))]
    written = []

    def decode(indices):
        return b"".join(tokens[index] for index in indices).decode(errors="replace")

    writer = generate_command.Writer(decode, lambda: written.append("begun "))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, end="\n", flush=False: written.append(text + end))
        for index in range(len(tokens)):
            writer(0, index, index)
        writer.close()
    try:
        expected = whole.decode()
    except UnicodeDecodeError:  # how many marks stand for what is no text is nobody's business
        assert "\ufffd" in "".join(written)
        assert "".join(written).replace("\ufffd", "") == "begun " + whole.decode(errors="ignore") + "\n"
    else:
        assert "".join(written) == "begun " + expected + "\n"


def test_nothing_is_printed_before_the_backend_takes_the_request(resa, path):
    """Neither the prompt nor how much is decoded densely, if the backend refuses what the others would take."""

    def refuse(*_, **__):
        raise ValueError("block_size: got 16; allowed: 17")

    backends = {"reference": replace(REFERENCE, generate=refuse, crossover=lambda selection: 100)}
    status, out, err = resa("generate", "--tokens", 3, "--model", path, backends=backends)
    assert (status, out, err) == (2, "", "resa generate: block_size: got 16; allowed: 17\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_delays_the_first_tokens_is_told_on_a_terminal(resa, path, monkeypatch, is_terminal):
    """In place of the line about the prompt, gone before the text; a file gets neither."""
    monkeypatch.setattr(generate_command, "Console", partial(Console, force_terminal=is_terminal, width=80))
    telling = []

    @contextmanager
    def watched(tell):
        telling.append(tell)
        yield
        telling.clear()

    def slow(*arguments, **more):
        telling[0]("Compiling: 1 …")
        done = generate(*arguments, **more)
        telling[0]("Compiling: 2 …")  # the text is there by now
        return done

    backends = {"reference": replace(REFERENCE, generate=slow, watched=watched)}
    status, out, err = resa("generate", "x = ", "--tokens", 3, "--model", path, backends=backends)
    assert (status, telling) == (0, [])
    assert out.startswith("x = ")
    assert ("Compiling: 1 …" in err) == is_terminal
    assert "Compiling: 2 …" not in err


def test_an_interruption_is_one_line(resa, path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    backends = {"reference": replace(REFERENCE, generate=interrupted)}
    status, _, err = resa("generate", "--tokens", 3, "--model", path, backends=backends)
    assert (status, err) == (130, "resa generate: interrupted\n")


def test_a_closed_pipe_is_no_error_to_read_about(path):
    """`resa generate … | head -1`: whoever reads has gone, which is neither a traceback nor a page of excuses."""
    command = [sys.executable, "-m", "resa.reference", "generate", "a\nb\n", "--tokens", "20", "--model", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # before the first word is written
    err = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert len(err.splitlines()) <= 1


# generate: densely up to the crossover, then sparsely

N_PROMPT, N_TOKENS = 52, 24  # of FUNCTIONS, and what is written below
FUSED, PAPER = ["--interval", "4"], ["--interval", "never", "--schedule", "paper"]


class Watched:
    """The reference as a backend with a crossover, which keeps what its `generate` was called with."""

    def __init__(self, crossover):
        self.calls, self.told = [], []
        own = replace(REFERENCE, generate=self.generate, crossover=lambda selection: crossover)
        self.backends = {"watched": own, **BACKENDS}

    def generate(self, model, prompts, n_tokens, config, *, on_token, resume=None, generators, **request):
        self.calls.append((len(prompts[0]), n_tokens, config.interval, config.schedule))
        self.generator = generators[0]

        def told(sequence, position, token):
            self.told.append((sequence, position, token))
            if on_token is not None:
                on_token(sequence, position, token)

        return generate(
            model, prompts, n_tokens, config, on_token=told, resume=resume, generators=generators, **request
        )


@pytest.fixture
def decoded(resa, path):
    """Continues FUNCTIONS with a crossover → (the backend, standard output, standard error)."""

    def run(crossover, *arguments):
        watched = Watched(crossover)
        command = ["generate", FUNCTIONS, "--tokens", N_TOKENS, "--model", path, "--backend", "watched", *SPARSE]
        status, out, err = resa(*command, *arguments, backends=watched.backends)
        assert status == 0, err
        return watched, out, err

    return run


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1"]])
@pytest.mark.parametrize("way", [FUSED, PAPER])
@pytest.mark.parametrize(
    "crossover", [0, N_PROMPT, N_PROMPT + 1, N_PROMPT + 9, N_PROMPT + N_TOKENS - 1, N_PROMPT + N_TOKENS]
)
def test_a_request_is_dense_up_to_the_crossover_and_one_stream(decoded, path, tokenizer, way, sampling, crossover):
    n_dense = max(crossover - N_PROMPT, 0)
    watched, out, _ = decoded(crossover, *way, *sampling)
    dense, sparse = ("1", "fused"), (way[1], "paper" if way == PAPER else "fused")
    calls = [(N_PROMPT, n_dense, *dense)] if n_dense else []
    calls += [(0 if n_dense else N_PROMPT, N_TOKENS - n_dense, *sparse)] if n_dense < N_TOKENS else []
    assert [(*sizes, str(f or "never"), s) for *sizes, f, s in watched.calls] == calls

    # Every token was told once, at its own position, and written.
    tokens = [token for _, _, token in watched.told]
    assert [(s, p) for s, p, _ in watched.told] == [(0, N_PROMPT + i) for i in range(N_TOKENS)]
    assert out == FUNCTIONS + tokenizer.decode(tokens) + "\n"

    # The parts are what dense and sparse decoding write, one uniform number each from one generator.
    model, prompt = load_model(path), tokenizer.encode_ordinary(FUNCTIONS)
    own, choice = [torch.Generator().manual_seed(0)], Sampling(float(bool(sampling)))
    start = generate(model, [prompt], n_dense, ReSAConfig(4, 0.1, 2, interval=1), choice, generators=own)[0].tokens
    config = ReSAConfig(4, 0.1, 2, 1, 4 if way == FUSED else None, sparse[1], selection="sketch")
    rest = generate(model, [prompt + start], N_TOKENS - n_dense, config, choice, generators=own)[0].tokens
    assert tokens == start + rest
    drawn = torch.Generator().manual_seed(0)
    if sampling:
        torch.rand(N_TOKENS, dtype=torch.float64, generator=drawn)
    assert torch.equal(watched.generator.get_state(), drawn.get_state())


def test_where_sparse_decoding_begins_makes_a_difference(decoded):
    told = {c: [token for _, _, token in decoded(c, *PAPER)[0].told] for c in (0, N_PROMPT + 9, 1000)}
    assert len({tuple(tokens) for tokens in told.values()}) == 3
    assert told[N_PROMPT + 9][:9] == told[1000][:9]


@pytest.mark.parametrize(("n_dense", "place"), [(0, 2), (9, 2), (9, 8), (9, 9), (9, 15)])  # 8: the last dense token
def test_a_stop_token_ends_the_text_on_either_side_of_the_seam(decoded, monkeypatch, n_dense, place):
    arguments = [N_PROMPT + n_dense, *FUSED, "--temperature", "1"]
    tokens = [token for _, _, token in decoded(*arguments)[0].told]
    assert tokens.index(tokens[place]) == place, "another seed: a token must not come earlier"
    load = command_line.load
    monkeypatch.setattr(command_line, "load", lambda *asked: replace(load(*asked), stop_tokens=[tokens[place]]))
    watched, _, err = decoded(*arguments)
    assert [token for _, _, token in watched.told] == tokens[: place + 1]
    assert len(watched.calls) == (2 if place >= n_dense > 0 else 1)
    assert f"{N_PROMPT} + {place + 1} tokens in " in err


@pytest.mark.parametrize(
    ("crossover", "arguments", "says"),
    [
        (N_PROMPT + 5, [], "dense up to 57 tokens, measured to be faster"),
        (2048, [], "all of it is dense, below 2,048 tokens, measured to be faster"),
        (2048, ["--dense-below", "60"], "dense up to 60 tokens, as --dense-below says"),
        (2048, ["--dense-below", "0"], None),
        (N_PROMPT, [], None),  # long enough from the start
        (2048, ["--interval", "1"], None),  # dense anyway
    ],
)
def test_dense_decoding_is_said(decoded, crossover, arguments, says):
    _, _, err = decoded(crossover, *arguments)
    assert err.splitlines()[:-1] == ([] if says is None else [says])
    watched, out, err = decoded(crossover, *arguments, "--json")
    wanted = int(arguments[1]) if "--dense-below" in arguments else crossover
    assert (err, json.loads(out)["dense_below"]) == ("", wanted)
    assert json.loads(out)["tokens"] == [token for _, _, token in watched.told]


# Bad input


REFUSED = {
    "generate": {
        "--active-ratio 0": r"active_ratio: got 0\.0; allowed: 0 < active_ratio ≤ 1",
        "--interval 0": "interval: got 0; allowed: .*never",
        "--interval often": "--interval",
        "--block-size 10000000": "--block-size: got 10000000; allowed: 1 … 65536",
        "--dense-below -1": "--dense-below: got -1; allowed: an integer ≥ 0",
        "--tokens -1": "--tokens: got -1; allowed: an integer ≥ 0",
        "--tokens 1000": "tokens.*1000.*context = 128",
        "--tokens many": "--tokens",
        "--temperature -1": r"temperature: got -1\.0",
        "--top-p 0": r"top_p: got 0\.0",
        "--device gpu": "--device: got gpu; allowed: cpu",
        "--seed -1": "--seed: got -1; allowed: 0",
        "--backend triton": "--backend",  # the reference does not know it
        "--prompt-file b": "--prompt-file",  # beside a prompt
    },
    "demo": {
        "--tokens 0": "--tokens: got 0; allowed: an integer ≥ 1",
        "--tokens 100": r"--prompt-tokens \+ --tokens: got 140; allowed: ≤ 128",
        "--intervals 0": "interval: got 0; allowed: ",
        "--figure figure.bmp": r"--figure: got figure.bmp; allowed: .*\.png",
        "--figure folder.png": "--figure: got folder.png; allowed: a file in a writable folder",
        "--temperature -1": "temperature: got -1",
        "--prompt-tokens 1": "--prompt-tokens: got 1; allowed: an integer ≥ 2",
    },
    "eval": {
        "--prompt-tokens 200": r"--prompt-tokens \+ --tokens: got 206; allowed: ≤ 128",
        "--prompt-tokens 0": "--prompt-tokens: got 0",
        "--intervals 0": "interval: got 0",
        "--documents 0": "--documents: got 0; allowed: an integer ≥ 1",
        "--tokens 0": "--tokens: got 0",
    },
    "train": {
        "--steps 0": "steps: got 0",
        "--batch-tokens 100": "batch_tokens: got 100; allowed: a multiple of context = 96",
        "--device tpu": "device: got tpu; allowed: cpu",
    },
}


@pytest.mark.parametrize(
    ("command", "words", "named"), [(name, *each) for name, table in REFUSED.items() for each in table.items()]
)
def test_bad_arguments_are_refused_by_name_before_any_work(
    resa, path, library, tmp_path, monkeypatch, command, words, named
):
    """In one line on standard error; nothing else is printed, and nothing written."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "prompt.py").write_text("x = 1\n" * 30)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    valid = {
        "generate": ["generate", "a = 1\n", "--model", path, "--tokens", 9],
        "demo": ["demo", "--prompt-file", "prompt.py", *DEMO, "--model", path],
        "eval": ["eval", "fidelity", "--model", path, "--prompt-tokens", 30, "--tokens", 6],
        "train": training("out"),
    }[command]
    status, out, err = resa(*valid, *words.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"resa {command}: [^\n]+\n", err), err
    assert re.search(named, err), err
    assert sorted(tmp_path.rglob("*")) == before


LOADING = [["generate"], ["demo"], ["eval", "fidelity"], ["eval", "carried"], ["evidence"]]


@pytest.mark.parametrize("command", LOADING)
def test_every_command_refuses_a_gpu_that_is_not_there(resa, path, command, library, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    for device in ("cuda", "cuda:3"):
        assert_refused(resa(*command, "--model", path, "--device", device), command[0], f"--device: got {device}")


@pytest.mark.parametrize("command", LOADING)
def test_every_command_refuses_a_model_that_is_missing_or_damaged(resa, path, command, tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-1])
    assert_refused(resa(*command, "--model", damaged), command[0], "damaged.safetensors", "damaged file")
    missing = tmp_path / "missing.safetensors"
    assert_refused(resa(*command, "--model", missing), command[0], "missing.safetensors", "no such file")
    assert_refused(resa(*command, "--model", tmp_path), command[0], "no such file")


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_prompt_files_are_refused_by_name(resa, path, tmp_path, command):
    (tmp_path / "latin.py").write_bytes("größe = 1\n".encode("latin-1"))
    (tmp_path / "empty.py").touch()
    said = {
        "missing.py": f"--prompt-file: {tmp_path / 'missing.py'}: no such file",
        "": f"--prompt-file: got {tmp_path}, a folder; allowed: a file",
        "latin.py": f"--prompt-file: {tmp_path / 'latin.py'} is not UTF-8 text",
        "empty.py": "prompt.*: got .*; allowed: .*at least",
    }
    for name, named in said.items():
        assert_refused(resa(command, "--prompt-file", tmp_path / name, "--model", path), command, named)


# demo

DEMO = ["--prompt-tokens", 40, "--tokens", 8, "--intervals", 4, 3, *SPARSE]


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompt.py"
    file.write_text("".join(f"v{i} = {i}\n" for i in range(30)))
    return file


def test_the_demo_prints_draws_and_continues_a_given_file(resa, path, tokenizer, prompt_file, tmp_path):
    figure = tmp_path / "out" / "figure.png"
    command = ["demo", "--prompt-file", prompt_file, *DEMO, "--model", path, "--seed", 9]
    status, out, err = resa(*command, "--figure", figure)
    assert (status, err) == (0, "")
    said = "".join(out.split())
    assert "millionweights,continuesprompt.py:40tokensread,8towrite." in said
    assert "Attheendasparsestepreads2of12blocks" in said
    assert f"{demo_module.N_TEXTS}othertexts:thefirst96tokensofeacharetheprompt,thenext32are" in said
    names = ["sparse", "ReSA f=4", "ReSA f=3", "decode-only"]
    assert all(name in out for name in ["dense", *names])
    assert "Sparsedecodingloses" in said
    assert f"Thefigureis{figure}." in said
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    figure = tmp_path / "figure.svg"
    status, out, _ = resa(*command, "--figure", figure, "--active-ratio", 0.5, "--json")
    result = json.loads(out)  # nothing but one object
    wanted = {"block_size": 4, "active_ratio": 0.5, "min_blocks": 2, "schedule": "paper"}
    assert wanted.items() <= result["config"].items()
    about = {"subject": "prompt.py", "backend": "reference", "torch": torch.__version__, "read": 96, "given": 32}
    asked = {"prompt_tokens": 40, "tokens": 8, "intervals": [4, 3], "temperature": 0.5, "seed": 9}
    assert (about | asked).items() <= result.items()
    assert list(result["written"]) == ["dense", "sparse", "ReSA f=4"]
    assert figure.read_text().lstrip().startswith("<?xml")

    # The rows are what the evaluation finds on the same texts.
    documents, config = read_documents("english", tokenizer, demo_module.N_TEXTS, 128), ReSAConfig(**result["config"])
    more = {"intervals": [4, 3], "ratios": [0.5], "block_sizes": [4]}
    rows = fidelity.measure_fidelity(load_model(path), documents, 32, config, **more)["rows"]
    assert [row["way"] for row in result["rows"]] == names
    for row, own in zip(result["rows"], rows, strict=True):
        assert row["kl"] == pytest.approx(own["kl"], rel=5e-4)  # four digits


def test_where_everything_is_read_the_demo_says_so_and_divides_nothing(resa, path, tokenizer, tmp_path, monkeypatch):
    """17 + 8 tokens are two blocks; the other texts are eight, and as many are always read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.py").write_text(tokenizer.decode(tokenizer.encode_ordinary(FUNCTIONS)[:17]))
    command = ["demo", "--prompt-file", "short.py", "--tokens", 8, "--intervals", 4, "--min-blocks", 8, "--model", path]
    status, out, err = resa(*command)
    assert (status, err) == (0, "")
    said = " ".join(out.split())
    assert said.count("a step reads all of them: all ways are dense decoding") == 2
    assert said.count("lower --min-blocks or --active-ratio") == 2
    assert "sparse" not in said.replace("A sparse step", "")
    assert not (tmp_path / "out" / "demo.png").exists()
    result = json.loads(resa(*command, "--json")[1])
    assert (result["prompt_tokens"], result["rows"], result["verdict"]) == (17, [], [])
    assert list(result["written"]) == ["dense"]


def test_the_demo_refuses_a_folder_that_it_may_not_write_before_it_decodes(resa, path, prompt_file, monkeypatch):
    monkeypatch.setattr(demo_module, "write_texts", lambda *_: pytest.fail("something was decoded"))
    access, folder = os.access, prompt_file.parent / "closed"
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda name, mode: name != folder and access(name, mode))  # root may write all
    found = resa("demo", "--prompt-file", prompt_file, *DEMO, "--model", path, "--figure", folder / "a.png")
    assert_refused(found, "demo", "--figure: got .*closed/a.png; allowed: a file in a writable folder")
    assert found[1] == ""


def test_the_demo_runs_on_a_model_of_small_context(resa, prompt_file, tmp_path):
    """The texts that are measured are as long as the context, a quarter of them decoded."""
    path = tmp_path / "small.safetensors"
    save_model(path, CodeShape(seed=2, layers=1, context=24).model(torch.float32))
    command = ["demo", "--prompt-file", prompt_file, "--intervals", 2, "--block-size", 2, "--min-blocks", 2]
    command += ["--figure", tmp_path / "a.png", "--model", path, "--json"]
    assert_refused(resa(*command), "demo", r"--prompt-tokens \+ --tokens: got \d+; allowed: ≤ 24")
    status, out, _ = resa(*command, "--prompt-tokens", 10, "--tokens", 4)
    result = json.loads(out)
    assert (status, result["read"], result["given"]) == (0, 18, 6)
    assert [row["way"] for row in result["rows"]] == ["sparse", "ReSA f=2", "decode-only"]


def test_the_demo_of_the_carrying_model_prints_programs_or_one_object(resa, monkeypatch):
    for name, value in {"N_PROGRAMS": 2, "LENGTH": 200, "READ": 40, "SHOWN": 3}.items():
        monkeypatch.setattr(demo_carried, name, value)
    command = ["demo", "--model", "carrying", "--intervals", 8, "--device", "cpu"]
    status, out, err = resa(*command)
    assert (status, err, "Values right" in out) == (0, "", True)
    status, out, err = resa(*command, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert {"programs": 2, "length": 200, "read": 40, "device": result["device"]}.items() <= result.items()
    assert [row["way"] for row in result["rows"]] == ["dense", "sparse", "ReSA f=8", "decode-only"]
    assert all(0 <= row["right"] <= 1 for row in result["rows"])
    assert result["checkpoint_sha256"] == hashlib.sha256(shipped_checkpoint("carrying").read_bytes()).hexdigest()


def test_the_demo_takes_the_real_model_or_says_that_it_runs_a_toy(monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "find_model", lambda name: name)
    assert (demo_module.default_model(), capsys.readouterr().err) == ("smollm2", "")
    monkeypatch.setattr(demo_module, "find_model", models.find_model)
    monkeypatch.setattr(models, "SMOLLM2", "no-such-package")
    assert demo_module.default_model() == "code"
    assert re.search(r"make real.*\. The shipped model runs instead, a toy\.\n", capsys.readouterr().err)


# train

SMALL = {
    "--steps": 4, "--batch-tokens": 192, "--context": 96, "--short-context": 48, "--warmup-steps": 1,
    "--program-rows": 2, "--device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """A shape that trains in no time."""
    shape = CodeShape(layers=1, kv_heads=1, group=2, head_dim=4, hidden=8).config(context=64)
    monkeypatch.setattr(train, "SMALL_MODEL", shape)


def training(out, **changes):
    options = {**SMALL, "--out": out, **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
    return ["train", *(part for pair in options.items() for part in pair)]


def test_training_writes_a_model_and_prints_its_record(resa, library, tmp_path):
    status, out, err = resa(*training(tmp_path, seed=3, context=80, short_context=40, batch_tokens=160), "--packages")
    assert (status, "Traceback" in err) == (0, False)
    record = json.loads(out)
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert (record["tokens_seen"], record["train"]["seed"]) == (4 * 160, 3)
    shape = load_model(tmp_path / "model.safetensors").config
    assert (shape.n_layer, shape.n_head, shape.n_kv_head, shape.head_dim, shape.context) == (1, 2, 1, 4, 80)
    assert library == [True]
    # What was trained can be used at once, and be trained further.
    assert resa("generate", "x", "--tokens", 3, "--model", tmp_path / "model.safetensors")[0] == 0
    assert resa(*training(tmp_path / "more", steps=2, init=tmp_path / "model.safetensors"))[0] == 0
    assert library == [True, False]


def test_a_diverging_run_is_one_line(resa, library, tmp_path):
    status, _, err = resa(*training(tmp_path, learning_rate=1e30))
    assert status != 0
    assert "Traceback" not in err
    assert re.search("^resa train: the loss is (nan|inf) after step .*learning_rate", err, re.MULTILINE)


# eval, evidence


@pytest.fixture
def evaluated(resa, library):
    """Answers a question → its result, read from standard output."""

    def run(question, model, *arguments):
        status, out, err = resa("eval", question, "--model", model, "--documents", 2, *arguments)
        assert (status, "Traceback" in err) == (0, False), err
        assert library == [], "the held-out side alone is read"
        return json.loads(out)

    return run


def test_eval_keeps_the_result_with_what_it_was_measured_on(evaluated, path, tmp_path):
    out = tmp_path / "new" / "fidelity.json"
    options = ["--prompt-tokens", 30, "--tokens", 6, "--intervals", 3, 2, *SPARSE, "--schedule", "fused"]
    result = evaluated("fidelity", path, *options, "--out", out)
    assert json.loads(out.read_text()) == result
    about = {"question": "fidelity", "text": "code", "documents": 2, "tokens_each": 6, "scored": 6}
    assert about.items() <= result.items()
    assert [row["way"] for row in result["rows"]] == ["sparse", "ReSA f=3", "ReSA f=2", "decode-only"]
    assert {"block_size": 4, "min_blocks": 2, "schedule": "fused"}.items() <= result["config"].items()
    assert result["torch"] == torch.__version__
    assert result["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_fidelity_and_sweep_take_ratios_and_block_sizes(evaluated, path):
    """By default fidelity has those of --active-ratio and --block-size, a sweep many and no curves."""
    short = ["--prompt-tokens", 32, "--tokens", 12, "--intervals", 4, *SPARSE]

    def asked(*words):
        result = evaluated(words[0], path, *short, *words[1:])
        pairs = dict.fromkeys((row["block_size"], row["ratio"]) for row in result["rows"])
        return list(pairs), result

    assert asked("fidelity", "--active-ratio", 0.3)[0] == [(4, 0.3)]
    pairs, result = asked("fidelity", "--ratios", 0.2, 0.5, "--block-sizes", 8, 4, "--scored", 5)
    assert pairs == [(8, 0.2), (8, 0.5), (4, 0.2), (4, 0.5)]
    assert result["scored"] == 5
    assert "by_position" in result["rows"][0]
    pairs, result = asked("sweep")
    assert pairs == [(b, p) for b in (8, 16, 32, 64) for p in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    assert all("by_position" not in row for row in result["rows"])
    assert all(row["kl"] < 1e-6 for row in result["rows"] if row["ratio"] == 1)
    pairs, _ = asked("sweep", "--ratios", 0.2, "--block-sizes", 8)
    assert pairs == [(8, 0.2)]


def test_eval_asks_every_question(evaluated, path, long_path, monkeypatch):
    short = ["--prompt-tokens", 32, "--tokens", 34, "--intervals", 4, *SPARSE]
    result = evaluated("selection", path, *short)
    assert (result["question"], result["documents"], result["tokens_each"]) == ("selection", 2, 34)
    result = evaluated("free", path, *short, "--seeds", 1, "--temperature", 0.0)
    about = {"question": "free", "documents": 2, "tokens_each": 34, "seeds": 1, "temperature": 0.0}
    assert about.items() <= result.items()
    assert [row["way"] for row in result["rows"]] == ["dense", "sparse", "ReSA f=4", "decode-only"]
    result = evaluated("retrieval", long_path, *short, "--lengths", 600)
    assert (result["question"], result["questions"], result["lengths"]) == ("retrieval", 2, [600])
    monkeypatch.setattr(corpus, "english_texts", lambda: [f"Word {i} of a text." for i in range(60)])
    result = evaluated("fidelity", path, *short, "--text", "english")
    assert (result["text"], result["documents"]) == ("english", 2)


def test_free_writes_with_the_backend_that_is_chosen(resa, path, library, monkeypatch):
    used = []

    def generated(*arguments, **more):
        used.append(len(arguments[1]))
        return generate(*arguments, **more)

    monkeypatch.setattr(command_line, "chosen_backend", lambda options: f"fast, by {options.backend}")
    backends = {"fast, by auto": replace(REFERENCE, generate=generated), "reference": REFERENCE}
    words = ["--documents", 2, "--seeds", 3, "--prompt-tokens", 20, "--tokens", 8, "--intervals", 4]
    assert resa("eval", "free", "--model", path, *words, backends=backends)[0] == 0
    assert used == [6] * 4, "all texts of a way together"


def test_eval_carried(resa, evaluated, long_path, monkeypatch, tmp_path):
    words = ["--prompt-tokens", "64", "--tokens", "200", "--intervals", "16", "--ratios", "0.1", "1.0"]
    command = ["eval", "carried", *words, "--min-blocks", "2"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/resa", *command, "--out", "carried.json"])
    result = evaluated("carried", long_path, *words, "--min-blocks", "2")
    assert (result["programs"], result["length"], result["prompt_tokens"]) == (2, 264, 64)
    assert {(row["ratio"], row["interval"]) for row in result["rows"]} == {
        (ratio, interval) for ratio in (0.1, 1.0) for interval in ("decode-only", "never", 16)
    }
    assert result["command"] == shlex.join(["resa", *command])  # not where it was written
    assert_refused(resa(*command, "--ratios", 2, "--model", long_path), "eval", "active_ratio: got 2")
    too_long = ["eval", "fidelity", "--model", long_path, "--prompt-tokens", 8000, "--tokens", 6]
    assert_refused(resa(*too_long), "eval", "documents: got 16; allowed: ≤ 0, for 8,006 tokens of code each")


def test_results_keep_four_digits(evaluated, path, monkeypatch):
    nested = {"share": 1 / 3, "ends": [(2e-20 / 3, 1234567.0)], "of": 1234567, "name": "1.23456789", "none": None}
    monkeypatch.setattr(lab, "measure", lambda options, model, config: nested)
    shown = evaluated("free", path)
    rounded = {"share": 0.3333, "ends": [[6.667e-21, 1235000.0]]}
    assert {name: shown[name] for name in nested} == nested | rounded


def test_evidence_measures_every_part_on_its_model(resa, path, monkeypatch, tmp_path):
    """Programs are for the model that was trained on them, all else for the model that is given."""
    ran = []
    monkeypatch.setattr(lab, "run_parts", lambda *arguments, **more: ran.append((*arguments, more)))
    options = ["--out", tmp_path, "--jobs", 3, "--device", "cpu"]
    assert resa("evidence", "--size", "full", "--model", path, *options)[0] == 0
    ((parts, out, package, more),) = ran
    assert (out, package, more) == (tmp_path, "resa.reference", {"jobs": 3})
    assert list(parts) == list(evidence.SIZES["full"])
    for part, (name, words) in evidence.SIZES["full"].items():
        assert (name == "carrying") == part.startswith("carried")
        own, named = (shipped_checkpoint(name), name) if name == "carrying" else (path, str(path))
        assert parts[part].words == words
        digest = hashlib.sha256(own.read_bytes()).hexdigest()
        assert parts[part].digests == {"checkpoint_sha256": digest, "source_sha256": source_digest()}
        assert parts[part].more == ["--model", named, "--device", "cpu"]
    assert set(evidence.SIZES["small"]) < set(evidence.SIZES["full"])


def test_evidence_runs_on_the_real_model_or_says_how_to_get_it(resa, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert build_parser().parse_args(["evidence"]).model == "smollm2"
    monkeypatch.setattr(models, "SMOLLM2", "no-such-package")
    assert_refused(resa("evidence"), "evidence", "smollm2", "make real")
    assert list(tmp_path.iterdir()) == [], "nothing was run"
