"""The command line: what it prints where, and that a bad argument is one line, status 2 and never a traceback."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import Shape

from resa.reference import REFERENCE_OPS, ReSAConfig, cli, generate, load_model, save_model
from resa.reference import corpus as corpus_module
from resa.reference import train as train_module
from resa.reference.corpus import STANDARD_LIBRARY, Corpus, Document
from resa.reference.evals import evidence, sweep
from resa.reference.files import source_digest
from resa.reference.tokenizer import load_tokenizer
from resa.reference.train import Trainer

COMMANDS = ["demo", "generate", "train", "tokenizer", "eval"]
END_OF_TEXT = 4095


class CodeShape(Shape):
    """A small model over the shipped tokenizer's vocabulary."""

    vocab = 4096


SPARSE = ["--block-size", "4", "--min-blocks", "2"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random model on disk."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, CodeShape(seed=2, context=128, tied=False).model(torch.float32))
    return path


@pytest.fixture(scope="module")
def long_path(tmp_path_factory):
    """One with the context that the questions of `eval language` need, and as little else as possible."""
    path = tmp_path_factory.mktemp("model") / "long.safetensors"
    save_model(path, CodeShape(layers=1, kv_heads=1, group=1, head_dim=2, hidden=4, context=8192).model(torch.float32))
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


@pytest.fixture
def library(monkeypatch):
    """A standard library of a few hundred tokens, for commands that would read the real one for seconds."""
    code = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40))
    train = [Document("a", code, STANDARD_LIBRARY), Document("b", code.replace("f", "g"), STANDARD_LIBRARY)]
    held_out = [Document(f"h{i}", code.replace("x", f"y{i}")[i:], STANDARD_LIBRARY) for i in range(3)]
    asked = []

    def local_corpus(*, packages, folders, progress=True):
        asked.append((packages, [str(folder) for folder in folders]))
        return Corpus(train, held_out, {"train_files": 2})

    monkeypatch.setattr(train_module, "local_corpus", local_corpus)
    monkeypatch.setattr(corpus_module, "local_corpus", local_corpus)
    monkeypatch.setattr(corpus_module, "held_out_library", lambda: held_out)
    return asked


def assert_refused(result, command, *named):
    """Status 2 and exactly one line on standard error, which names what is wrong."""
    status, _, err = result
    assert status == 2, err
    assert re.fullmatch(rf"resa {command}: [^\n]+\n", err), err
    assert all(re.search(name, err) for name in named), err


def assert_refused_by_argparse(result, name=""):
    """One line that names what is wrong and where help is to be had."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(r"resa[ a-z]*: [^\n]+ --help\)\n", err), err
    assert name in err


# ---- Help ------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(resa):
    status, out, err = resa("--help")
    assert (status, err) == (0, "")
    assert all(re.search(rf"^ +{command}\b", out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_and_shows_defaults(resa, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # or argparse breaks the lines that are looked at
    status, out, err = resa(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: resa {command}")
    some = {
        "demo": {
            "--tokens": 512,
            "--schedule": "paper",
            "--temperature": 0.5,
            "--active-ratio": 0.1,
            "--device": "cpu",
            "--backend": "auto",
        },
        "generate": {
            "--tokens": 128,
            "--interval": 32,
            "--schedule": "fused",
            "--dense-below": "auto",
            "--block-size": 16,
            "--min-blocks": 16,
            "--backend": "auto",
        },
        "train": {"--seed": 0, "--n-layer": 12, "--vocab-size": 4096},
        "tokenizer": {"--vocab-size": 4096},
        "eval": {"--documents": 16, "--probes": 64, "--batch": 8, "--local-blocks": 1},
    }[command]
    text = re.sub(r"\s+", " ", out)
    for flag, default in some.items():
        assert re.search(rf"{flag} .*?\(default: {re.escape(str(default))}\)", text), flag
    for nothing in ("==SUPPRESS==", "(default: None)", "(default: [])"):
        assert nothing not in out
    assert not re.search(r"\(default: [^)]*\) \(default:", text), "a default stands there twice"


def test_the_defaults_are_those_of_the_configuration(resa):
    options = cli.build_parser().parse_args(["generate"])
    given_config = cli._sparsity(options, interval=options.interval, schedule=options.schedule)
    assert given_config == ReSAConfig()
    assert options.dense_below is None  # left to the backend
    assert cli.REFERENCE.dense_below(1) == ReSAConfig().dense_below


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate", "--nonsense"], ["eval"], ["eval", "taste"], ["train"]])
def test_unknown_commands_and_options_are_refused(resa, arguments):
    assert_refused_by_argparse(resa(*arguments))


def test_the_package_is_a_command():
    found = subprocess.run([sys.executable, "-m", "resa.reference", "--help"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert all(command in found.stdout for command in COMMANDS)


# ---- generate --------------------------------------------------------------------------------------------------------


def by_hand(path, tokenizer, text, n_tokens, config, seed=0, **options):
    generators = [torch.Generator().manual_seed(seed)]
    prompt = tokenizer.encode_ordinary(text)
    return generate(load_model(path), [prompt], n_tokens, config, generator=generators, **options).tokens[0]


@pytest.mark.parametrize(
    ("arguments", "config", "options"),
    [
        ([], ReSAConfig(), {}),
        (["--temperature", "1.5", "--top-p", "0.9"], ReSAConfig(), {"temperature": 1.5, "top_p": 0.9}),
        (["--temperature", "0.7", "--top-k", "20"], ReSAConfig(), {"temperature": 0.7, "top_k": 20}),
        ([*SPARSE, "--interval", "never"], ReSAConfig(block_size=4, min_blocks=2, interval=None), {}),
        (
            [*SPARSE, "--interval", "3", "--schedule", "paper", "--active-ratio", "0.3", "--local-blocks", "2"],
            ReSAConfig(4, 0.3, 2, 2, 3, "paper"),
            {},
        ),
        ([*SPARSE, "--interval", "1"], ReSAConfig(block_size=4, min_blocks=2, interval=1), {}),
        ([*SPARSE, "--dense-below", "64"], ReSAConfig(block_size=4, min_blocks=2, dense_below=64), {}),
    ],
)
def test_generate_is_generate(resa, path, tokenizer, arguments, config, options):
    text = "def f(x):\n    return x + 1\n\n" * 2
    wanted = by_hand(path, tokenizer, text, 12, config, **options)
    status, out, err = resa("generate", text, "--tokens", 12, "--model", path, "--json", *arguments)
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert result["tokens"] == wanted
    assert result["text"] == tokenizer.decode(wanted)
    assert result["prompt_tokens"] == len(tokenizer.encode_ordinary(text))
    assert (result["backend"], result["dense_below"]) == ("reference", config.dense_below)
    assert result["seconds"] >= 0


def test_sparsity_reaches_the_model(resa, path):
    """The cases above would all pass if no option did anything: here they must make a difference."""
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(4))
    found = set()
    for arguments in (["--interval", "never"], ["--interval", "1"], ["--interval", "1", "--schedule", "paper"]):
        out = resa("generate", text, "--tokens", 12, "--model", path, "--json", *SPARSE, *arguments)[1]
        found.add(tuple(json.loads(out)["tokens"]))
    assert len(found) == 3


def test_generate_writes_the_prompt_and_its_continuation(resa, path, tokenizer):
    text = "naïve = 1\n"
    wanted = tokenizer.decode(by_hand(path, tokenizer, text, 9, ReSAConfig()))
    status, out, err = resa("generate", text, "--tokens", 9, "--model", path)
    assert (status, out) == (0, text + wanted + "\n")
    n_prompt = len(tokenizer.encode_ordinary(text))
    assert re.fullmatch(rf"{n_prompt} \+ 9 tokens in [0-9.]+ s \(backend reference\)\n", err)
    err = resa("generate", text, "--tokens", 9, "--model", path, "--dense-below", 2000)[2]
    assert err.endswith(" s (backend reference, dense below 2,000 tokens)\n")


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
    file = tmp_path / "größe.py"
    file.write_text("y = 'ü'\n", encoding="utf-8")
    assert resa("generate", "--prompt-file", file, "--tokens", 5, "--model", path)[1].startswith("y = 'ü'\n")
    by_file = json.loads(resa("generate", "--prompt-file", file, "--tokens", 5, "--model", path, "--json")[1])
    by_text = json.loads(resa("generate", "y = 'ü'\n", "--tokens", 5, "--model", path, "--json")[1])
    assert by_file["tokens"] == by_text["tokens"]


def test_the_end_of_text_ends_generation(resa, tmp_path, tokenizer):
    model = CodeShape(hidden=8, tied=False, context=64).model(torch.float32)
    with torch.no_grad():  # one direction leads to the end of text, and all else goes along it
        model.norm.weight.zero_()
        model.output.weight.zero_()
    save_model(tmp_path / "model", model)
    out = resa("generate", "a", "--tokens", 3, "--model", tmp_path / "model", "--json")[1]
    assert json.loads(out)["tokens"] == [0, 0, 0]  # every logit 0: the lowest id
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.embed.weight.fill_(1.0)
        model.output.weight[END_OF_TEXT] = 1.0
        for layer in model.layers:  # nothing but the embedding is left in the residual stream
            layer.attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save_model(tmp_path / "model", model)
    out = resa("generate", "a", "--tokens", 3, "--model", tmp_path / "model", "--json")[1]
    assert json.loads(out)["tokens"] == [END_OF_TEXT]
    assert tokenizer.encode_single_token("<|endoftext|>") == END_OF_TEXT


TEXT_BYTES = st.binary(max_size=4) | st.text(max_size=2).map(str.encode)


@given(st.lists(TEXT_BYTES, max_size=4), st.integers(0, 3))
@example(["é".encode(), "€".encode()], 1)
@example([b"a\xe2", b"\x82", b"\xacb"], 0)
@example([b"\xff", b"\xe2"], 0)
def test_characters_are_written_whole(pieces, cut):
    """Bytes arrive in tokens that may cut a character; what is written is the text of them all."""
    whole = b"".join(pieces)
    tokens = [whole[:cut], *(whole[i : i + 1] for i in range(cut, len(whole)))]
    writer = cli._Writer(lambda index: tokens[index], lambda: None, silent=False)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, end="\n", flush=False: written.append(text + end))
        for index in range(len(tokens)):
            writer(0, index, index)
        writer.close()
    try:
        expected = whole.decode()
    except UnicodeDecodeError:  # how many marks stand for what is no text is nobody's business
        assert "\ufffd" in "".join(written)
    else:
        assert "".join(written) == expected + "\n"


def test_a_character_is_written_whole_after_bytes_that_are_none(capsys):
    tokens = [b"\xff\xe2", b"\x82", b"\xac"]
    writer = cli._Writer(lambda index: tokens[index], lambda: None, silent=False)
    for index in range(3):
        writer(0, index, index)
    writer.close()
    assert capsys.readouterr().out == "\ufffd€\n"


def test_an_interruption_is_one_line(path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    backends = {"reference": replace(cli.REFERENCE, generate=interrupted)}
    assert cli.main(["generate", "--model", str(path)], backends=backends) == 130
    assert capsys.readouterr().err == "resa generate: interrupted\n"


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


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--active-ratio", "0"], r"active_ratio: got 0\.0; allowed: 0 < active_ratio ≤ 1"),
        (["--active-ratio", "nan"], "active_ratio: got nan"),
        (["--interval", "0"], r"interval: got 0; allowed: .*never"),
        (["--block-size", "0"], "block_size: got 0"),
        (["--local-blocks", "17"], "min_blocks: got 16"),
        (["--dense-below", "-1"], "dense_below: got -1"),
        (["--tokens", "-1"], r"--tokens: got -1; allowed: an integer ≥ 0"),
        (["--tokens", "1000"], r"tokens.*1000.*context = 128"),
        (["--temperature", "-1"], r"temperature: got -1\.0"),
        (["--temperature", "inf"], "temperature: got inf"),
        (["--top-p", "0"], r"top_p: got 0\.0"),
        (["--device", "gpu"], "--device: got gpu; allowed: cpu"),
        (["--device", "meta"], "--device: got meta; allowed: cpu"),
    ],
)
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_generate_refuses_by_name(resa, path, arguments, named, as_json):
    result = resa("generate", "a = 1\n", "--model", path, "--tokens", 9, *arguments, *as_json)
    assert_refused(result, "generate", named)
    assert not as_json or result[1] == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--interval", "often"], "--interval"),
        (["--interval", "1.5"], "--interval"),
        (["--tokens", "many"], "--tokens"),
        (["--schedule", "weekly"], "--schedule"),
        (["--dense-below", "later"], "--dense-below"),
        (["--backend", "triton"], "--backend"),  # the reference does not know it
        (["--active-ratio", "a lot"], "--active-ratio"),
        (["a", "--prompt-file", "b"], "--prompt-file"),
    ],
)
def test_what_is_no_number_is_refused_by_name(resa, path, arguments, named):
    assert_refused_by_argparse(resa("generate", "--model", path, *arguments), named)


@pytest.mark.parametrize("command", [["generate"], ["demo"], ["eval", "fidelity"], ["eval", "language"]])
def test_every_command_refuses_a_gpu_that_is_not_there(resa, path, command, library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:3"):
        assert_refused(resa(*command, "--model", path, "--device", device), command[0], f"--device: got {device}")


@pytest.mark.parametrize("command", [["generate"], ["demo"], ["eval", "fidelity"], ["eval", "language"]])
def test_every_command_refuses_a_model_that_is_missing_or_damaged(resa, path, command, tmp_path, library):
    damaged = tmp_path / "damaged.safetensors"
    for kept in (0, 7, 300, path.stat().st_size - 1):
        damaged.write_bytes(path.read_bytes()[:kept])
        assert_refused(resa(*command, "--model", damaged), command[0], "damaged.safetensors", "damaged file")
    damaged.write_text("no model at all\n" * 100)
    assert_refused(resa(*command, "--model", damaged), command[0], "damaged.safetensors", "damaged file")
    missing = tmp_path / "missing.safetensors"
    assert_refused(resa(*command, "--model", missing), command[0], "missing.safetensors", "no such file")
    assert_refused(resa(*command, "--model", tmp_path), command[0], "no such file")


@pytest.mark.parametrize("command", ["generate", "demo", "tokenizer"])
def test_prompt_files_are_refused_by_name(resa, path, tmp_path, command):
    model = [] if command == "tokenizer" else ["--model", path]

    def given_file(file):
        return resa(command, "--prompt-file", file, *model)

    assert_refused(given_file(tmp_path / "missing.py"), command, "--prompt-file", "missing.py", "no such file")
    assert_refused(given_file(tmp_path), command, "--prompt-file", "no such file")
    latin = tmp_path / "latin.py"
    latin.write_bytes("größe = 1\n".encode("latin-1"))
    assert_refused(given_file(latin), command, "--prompt-file", "latin.py", "not UTF-8")


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_empty_prompts_are_refused(resa, path, tmp_path, command):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    assert_refused(resa(command, "--prompt-file", empty, "--model", path), command, "prompt", "at least")
    if command == "generate":
        assert_refused(resa(command, "", "--model", path), command, "prompt: got ''; allowed: at least one character")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_prompt_file_is_refused(resa, path, tmp_path):
    file = tmp_path / "secret.py"
    file.write_text("x")
    file.chmod(0)
    assert_refused(resa("generate", "--prompt-file", file, "--model", path), "generate", "secret.py")


# ---- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompt.py"
    file.write_text("".join(f"v{i} = {i}\n" for i in range(30)))
    return file


DEMO = ["--prompt-tokens", 40, "--tokens", 8, "--intervals", 4, 3, *SPARSE]


def test_the_demo_prints_draws_and_continues_a_given_file(resa, path, prompt_file, tmp_path):
    figure = tmp_path / "out" / "figure.png"
    status, out, err = resa("demo", "--prompt-file", prompt_file, *DEMO, "--figure", figure, "--model", path)
    assert status == 0
    assert "decode-only  KL from dense" in err  # as it goes
    assert "Continuing prompt.py: 40 tokens read, 8 to write, on cpu (backend reference)." in out
    for name in ("dense", "sparse", "ReSA f=4", "ReSA f=3", "decode-only"):
        assert name in out
    assert str(figure) in out.replace("\n", "")
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_demo_in_json(resa, path, prompt_file, tmp_path):
    figure = tmp_path / "figure.svg"
    command = ["demo", "--prompt-file", prompt_file, *DEMO, "--figure", figure, "--model", path, "--json"]
    options = ["--active-ratio", 0.2, "--schedule", "fused", "--temperature", 0, "--seed", 9]
    status, out, _ = resa(*command, *options)
    result = json.loads(out)  # nothing but one object
    assert status == 0
    assert list(result["rows"]) == ["dense", "sparse", "ReSA f=4", "ReSA f=3", "decode-only"]
    assert (result["subject"], result["figure"], result["prompt_tokens"]) == ("prompt.py", str(figure), 40)
    assert result["backend"] == "reference"
    told = result["options"]
    assert (told["n_tokens"], told["temperature"], told["seed"]) == (8, 0.0, 9)
    config = told["config"]
    given_numbers = [config[name] for name in ("block_size", "active_ratio", "min_blocks", "schedule")]
    assert given_numbers == [4, 0.2, 2, "fused"]
    assert result["torch"] == torch.__version__
    assert figure.read_text().lstrip().startswith("<?xml")
    again = json.loads(resa(*command, *options)[1])
    assert again["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", 1], "tokens: got 1; allowed: an integer ≥ 2"),
        (["--tokens", 100], "--prompt-tokens .* --tokens: got 140; allowed: ≤ 128"),
        (["--intervals", 0], r"intervals: got \(0,\)"),
        (["--figure", "figure.bmp"], r"--figure: got figure.bmp; allowed: .*\.png"),
        (["--figure", "figure"], "--figure: got figure"),
        (["--active-ratio", 2], "active_ratio: got 2"),
        (["--temperature", -1], "temperature: got -1"),
        (["--prompt-tokens", 1], "--prompt-.*: got 1"),
    ],
)
def test_the_demo_refuses_by_name(resa, path, prompt_file, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)  # nothing is written anywhere else
    before = sorted(tmp_path.rglob("*"))
    command = ["demo", "--prompt-file", prompt_file, *DEMO, "--model", path, *arguments]
    assert_refused(resa(*command), "demo", named)
    assert sorted(tmp_path.rglob("*")) == before


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_shows_the_tokens_of_a_text(resa, tokenizer, tmp_path):
    text = "def größe(x):\n    return x"
    ids = tokenizer.encode_ordinary(text)
    pieces = [tokenizer.decode_single_token_bytes(token) for token in ids]
    status, out, err = resa("tokenizer", text)
    assert status == 0
    assert out == " ".join(repr(piece.decode(errors="replace")) for piece in pieces) + "\n"
    assert err == f"{len(text.encode())} bytes, {len(ids)} tokens\n"
    file = tmp_path / "file.py"
    file.write_text(text, encoding="utf-8")
    status, out, err = resa("tokenizer", "--prompt-file", file, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["ids"] == ids
    assert len(json.loads(out)["pieces"]) == len(ids)


def test_the_tokenizer_refuses_by_name(resa, tmp_path):
    assert_refused(resa("tokenizer"), "tokenizer", "TEXT: got nothing")
    assert_refused(resa("tokenizer", "x", "--ranks", tmp_path / "none"), "tokenizer", "ranks .*none: no such file")
    broken = tmp_path / "broken"
    broken.write_text("AA==\n")
    assert_refused(resa("tokenizer", "x", "--ranks", broken), "tokenizer", "broken, line 1")
    folder = tmp_path / "nowhere"
    assert_refused(
        resa("tokenizer", "--train", tmp_path / "new", "--folder", folder), "tokenizer", "folders: .*nowhere"
    )


def test_the_tokenizer_is_trained(resa, library, tmp_path):
    pytest.importorskip("tokenizers")
    out = tmp_path / "ranks"
    status, text, _ = resa("tokenizer", "--train", out, "--vocab-size", 270, "--no-packages", "--folder", tmp_path)
    assert status == 0
    assert json.loads(text)["vocab_size"] == 270 == load_tokenizer(out).n_vocab
    assert json.loads(text)["held_out_bytes_per_token"] > 1
    assert library == [(False, [str(tmp_path)])]
    assert json.loads(resa("tokenizer", "zebra", "--ranks", out, "--json")[1])["pieces"] == list(
        "zebra"
    )  # of which nothing was learnt


# ---- train -----------------------------------------------------------------------------------------------------------

SMALL = {
    "--n-layer": 1, "--n-head": 2, "--n-kv-head": 1, "--head-dim": 4, "--hidden-size": 8, "--intermediate-size": 8,
    "--steps": 4, "--batch-tokens": 128, "--context": 64, "--short-context": 32, "--warmup-steps": 1,
    "--lookup-rows": 2, "--log-every": 2, "--eval-every": 4, "--device": "cpu",
}  # fmt: skip


def training(out, **changes):
    options = {**SMALL, "--out": out, **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
    return ["train", *(part for pair in options.items() for part in pair)]


def test_training_writes_a_model_and_prints_its_record(resa, library, tmp_path):
    status, out, err = resa(*training(tmp_path, seed=3), "--qk-norm", "--packages", "--folder", "mine")
    assert status == 0
    assert "Traceback" not in err
    record = json.loads(out)
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["tokens_seen"] == 4 * 128
    assert [step for step, _ in record["loss_curve"]] == [2, 4]
    assert record["train"]["seed"] == 3
    model = load_model(tmp_path / "model.safetensors")
    shape = model.config
    assert (shape.n_layer, shape.n_head, shape.n_kv_head, shape.head_dim, shape.context) == (1, 2, 1, 4, 64)
    assert shape.qk_norm
    assert library == [(True, ["mine"])]
    # What was trained can be used at once.
    assert resa("generate", "x", "--tokens", 3, "--model", tmp_path / "model.safetensors")[0] == 0


def test_training_goes_on_where_it_was_stopped(resa, library, tmp_path, monkeypatch):
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    assert resa(*training(uncut))[0] == 0
    take_step = Trainer.take_step

    def stopped(trainer, rows):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGINT)
        take_step(trainer, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", stopped)
        status, out, err = resa(*training(cut))
    assert (status, out) == (130, "")
    assert "Stopped after step 2, saved; the same command goes on from there." in " ".join(err.split())
    assert err.endswith("resa train: interrupted\n")
    steps = []

    def counted(trainer, rows):
        steps.append(trainer.step)
        take_step(trainer, rows)

    monkeypatch.setattr(Trainer, "take_step", counted)
    assert resa(*training(cut))[0] == 0
    assert steps == [2, 3]
    assert (cut / "model.safetensors").read_bytes() == (uncut / "model.safetensors").read_bytes()
    # Another run in the same folder is refused by the option that differs, or starts afresh when told to.
    assert_refused(resa(*training(cut, learning_rate=0.01)), "train", "learning_rate: got 0.01", "a fresh start")
    steps.clear()
    assert resa(*training(cut, learning_rate=0.01), "--fresh")[0] == 0
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_tokens": 100}, "batch_tokens: got 100; allowed: a multiple of context = 64"),
        ({"head_dim": 3}, "head_dim: got 3"),
        ({"n_head": 3, "n_kv_head": 2}, "n_head: got 3"),
        ({"vocab_size": 100}, "vocab_size: got 100; allowed: 4096"),
        ({"device": "tpu"}, "device: got tpu; allowed: cpu"),
        ({"learning_rate": 0}, "learning_rate: got 0"),
    ],
)
def test_training_refuses_by_name_before_any_work(resa, library, tmp_path, changes, named):
    assert_refused(resa(*training(tmp_path / "out", **changes)), "train", named)
    assert not (tmp_path / "out").exists()


def test_training_refuses_a_folder_that_is_not_there(resa, tmp_path):
    command = [*training(tmp_path / "out"), "--folder", tmp_path / "nowhere"]
    assert_refused(resa(*command), "train", "folders: .*nowhere is not a folder")


def test_a_diverging_run_is_one_line(resa, library, tmp_path):
    status, _, err = resa(*training(tmp_path, learning_rate=1e30))
    assert status != 0
    assert "Traceback" not in err
    assert re.search("^resa train: the loss is (nan|inf) after step .*learning_rate", err, re.MULTILINE)


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_eval_fidelity(resa, path, library, tmp_path):
    out_file = tmp_path / "new" / "fidelity.json"
    command = ["eval", "fidelity", "--model", path, "--documents", 2, "--prompt-tokens", 30, "--tokens", 6]
    options = ["--intervals", 3, 2, "--batch", 1, *SPARSE, "--schedule", "fused"]
    status, out, err = resa(*command, *options, "--out", out_file)
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert json.loads(out_file.read_text()) == result
    assert (result["question"], result["documents"], result["tokens_each"]) == ("fidelity", 2, 6)
    assert list(result["variants"]) == ["sparse", "ReSA f=3", "ReSA f=2", "decode-only"]
    assert (result["config"]["block_size"], result["config"]["schedule"]) == (4, "fused")
    assert result["variants"]["decode-only"]["drift_kl"] == 0.0
    assert result["torch"] == torch.__version__
    assert library == []  # the standard library's held-out part alone was read
    assert json.loads(resa(*command, *options)[1])["variants"] == result["variants"]


def test_eval_fidelity_reads_what_it_is_given(resa, path, library, tmp_path):
    command = ["eval", "fidelity", "--model", path, "--documents", 1, "--prompt-tokens", 20, "--tokens", 2]
    assert resa(*command, "--intervals", 2, "--packages", "--folder", tmp_path)[0] == 0
    assert library == [(True, [str(tmp_path)])]


def test_eval_sweep(resa, path, library, monkeypatch):
    monkeypatch.setattr(sweep, "LENGTHS", (1, 8))
    monkeypatch.setattr(sweep, "RATIOS", (0.3, 1.0))
    monkeypatch.setattr(sweep, "BLOCK_SIZES", (4, 8))
    monkeypatch.setattr(sweep, "DENSE_LAYERS", (0, 1))
    command = ["eval", "sweep", "--model", path, "--documents", 2, "--prompt-tokens", 32, "--tokens", 34, *SPARSE]
    status, out, err = resa(*command, "--no-grid")
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["question"], result["documents"], result["document_tokens"]) == ("sweep", 2, 66)
    assert set(result["factors"]) == {"suffix", "interval", "active_ratio", "block_size", "dense_layers", "schedule"}
    assert result["base"]["suffix"] == 33  # the last token is predicted only
    dense = [row["accuracy_lost"] for row in result["factors"]["active_ratio"] if row["active_ratio"] == 1.0]
    assert dense == [0.0]
    assert (
        "prompts of 30 tokens; allowed: a multiple of 8 before the suffix" in resa(*command, "--prompt-tokens", 30)[2]
    )
    assert "suffix: got 5" in resa(*command, "--tokens", 6)[2]


@pytest.mark.parametrize(("question", "parts"), [("speculation", ["variants"]), ("selection", ["mass_left_out"])])
def test_eval_speculation_and_selection(resa, path, library, question, parts):
    command = ["eval", question, "--model", path, "--documents", 2, "--prompt-tokens", 30, "--tokens", 6, *SPARSE]
    status, out, err = resa(*command, "--intervals", 3)
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["question"], result["documents"], result["tokens_each"]) == (question, 2, 6)
    assert all(len(result[part]) >= 2 for part in parts)


def test_eval_tasks(resa, long_path, library):
    command = ["eval", "tasks", "--model", long_path, "--families", "multi_key", "--lengths", 256, 300]
    status, out, err = resa(*command, "--examples", 2, *SPARSE)
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    rows = [("multi_key", length, 0.1) for length in (256, 300)]
    assert [(row["family"], row["length"], row["ratio"]) for row in result["rows"]] == rows, "--active-ratio's own"
    assert result["backend"] == "reference"
    result = json.loads(resa(*command, "--examples", 1, "--ratios", 0.05, 0.2, "--backend", "reference")[1])
    assert [row["ratio"] for row in result["rows"]] == [0.05, 0.2] * 2
    assert_refused(resa(*command, "--families", "riddles"), "eval", r"families: got \['riddles'\]")
    assert_refused(resa(*command, "--examples", 0), "eval", "n_examples: got 0")


def test_questions_are_answered_by_the_backend_that_was_chosen(long_path, library, capsys):
    calls = []

    def score_blocks(*arguments):
        calls.append(arguments)
        return REFERENCE_OPS.score_blocks(*arguments)

    own = replace(cli.REFERENCE, operations=lambda: replace(REFERENCE_OPS, score_blocks=score_blocks))
    words = ["eval", "tasks", "--model", long_path, "--families", "multi_key", "--lengths", 256, "--examples", 1]
    words = [str(word) for word in (*words, *SPARSE, "--backend", "own")]
    assert cli.main(words, backends={"own": own, **cli.BACKENDS}) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "own"
    assert calls


def test_eval_carried(resa, long_path, library, monkeypatch, tmp_path):
    command = ["eval", "carried", "--model", long_path, "--documents", 2, "--prompt-tokens", 64, "--tokens", 200]
    options = ["--intervals", 16, "--ratios", 0.1, 1.0, "--min-blocks", 2, "--seed", 3]
    out_file = tmp_path / "carried.json"
    words = [str(word) for word in (*command, *options, "--out", out_file)]
    monkeypatch.setattr("sys.argv", ["/usr/bin/resa", *words])
    status, out, err = resa(*words)
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["programs"], result["length"], result["prompt_tokens"], result["seed"]) == (2, 264, 64, 3)
    assert {(row["ratio"], row["interval"]) for row in result["rows"]} == {
        (ratio, interval) for ratio in (0.1, 1.0) for interval in ("decode-only", "never", 16)
    }
    assert result["command"] == shlex.join(["resa", *words[:-2]])  # not where it was written
    assert_refused(resa(*command, "--ratios", 2), "eval", "active_ratio: got 2")
    assert_refused(resa(*command, "--backend", "reference"), "eval", "--backend: got reference")


def test_results_keep_six_digits(resa, monkeypatch, library):
    nested = {"share": 1 / 3, "ends": [(2e-20 / 3, 1234567.0)], "of": 1234567, "name": "1.23456789", "none": None}
    nested |= {"config": {"active_ratio": 1 / 7}, "rows": [{"ratio": 1 / 7, "active_ratio": 1 / 7, "value": 1 / 7}]}
    nested |= {"factors": {"active_ratio": [{"value": 1 / 7}]}}
    monkeypatch.setitem(cli.QUESTIONS, "free", ("", lambda options, of: nested))
    status, out, _ = resa("eval", "free")
    assert status == 0
    shown = {name: json.loads(out)[name] for name in nested}
    rows = [{"ratio": 1 / 7, "active_ratio": 1 / 7, "value": 0.142857}]  # settings stay as they were given
    factors = {"active_ratio": [{"value": 0.142857}]}
    rounded = {"share": 0.333333, "ends": [[6.66667e-21, 1234570.0]], "factors": factors}
    assert shown == nested | rounded | {"rows": rows}


def test_eval_written(resa, long_path, library):
    command = ["eval", "written", "--model", long_path, "--documents", 1, "--prompt-tokens", 160, "--tokens", 3]
    status, out, err = resa(*command)
    assert (status, out) == (2, "")
    assert "n_tokens: got 3; allowed: more" in err  # three tokens of an untrained model assert nothing
    command[3] = cli.shipped_checkpoint("carrying")
    status, out, err = resa(*command, "--tokens", 80, "--backend", "reference")
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["backend"], result["programs"], result["tokens_each"]) == ("reference", 1, 80)
    assert set(result["ways"]) >= {"dense", "sparse", "ReSA", "decode-only"}


def test_eval_free(resa, long_path, library):
    command = ["eval", "free", "--model", long_path, "--documents", 2, "--prompt-tokens", 40, "--tokens", 9]
    status, out, err = resa(*command, "--intervals", 4, "--min-blocks", 1, "--temperature", 0, "--batch", 2)
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["documents"], result["tokens_each"], result["temperature"]) == (2, 8, 0)
    assert set(result["ways"]) == {"dense", "sparse", "ReSA f=4", "decode-only"}
    assert result["ways"]["dense"]["likely"] == 1
    assert_refused(resa(*command, "--temperature", -1), "eval", "temperature: got -1")


def test_evidence_measures_every_part_on_its_model(resa, monkeypatch, tmp_path):
    """The parts about programs on the model of programs, whatever model is given for the others.

    What is decoded token by token by a small model runs on the CPU, whatever device is given for the others.
    """
    ran = []
    monkeypatch.setattr(evidence, "run_parts", lambda *arguments, **more: ran.append((*arguments, more)))
    monkeypatch.setattr(cli, "_load", lambda options: None)
    assert resa("evidence", "--size", "full", "--out", tmp_path, "--jobs", 3, "--device", "cuda")[0] == 0
    ((parts, out, options),) = ran
    assert (out, options) == (tmp_path, {"jobs": 3})
    assert set(parts) == set(evidence.SIZES["full"])
    for part, (name, words) in evidence.SIZES["full"].items():
        path = cli.shipped_checkpoint(name)
        assert parts[part].words == words
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert parts[part].digests == {"checkpoint_sha256": digest, "source_sha256": source_digest()}
        named = [] if name == "model" else ["--model", os.path.relpath(path)]
        where = "cpu" if words.split()[0] in ("free", "fidelity", "speculation", "selection") else "cuda"
        assert parts[part].more == ["--device", where, *named]
    assert set(evidence.SIZES["small"]) < set(evidence.SIZES["full"])


def test_eval_language(resa, long_path, library):
    status, out, err = resa("eval", "language", "--model", long_path, "--probes", 2, "--batch", 2)
    assert status == 0
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["question"], result["documents"]) == ("language", 3)
    assert result["bits_per_byte"] > result["bits_per_byte_xz"] > 0  # nobody has trained this one
    assert set(result["lookups"]["accuracy"]) == {"256", "1024", "4096", "7680"}
    assert all(0 <= share <= 1 for each in result["lookups"]["accuracy"].values() for share in each.values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt-tokens", 200], r"--prompt-tokens \+ --tokens: got 206; allowed: ≤ 128"),
        (["--intervals", 0], "interval: got 0"),
        (["--active-ratio", 0], "active_ratio: got 0"),
    ],
)
def test_eval_refuses_by_name(resa, path, library, arguments, named):
    command = ["eval", "fidelity", "--model", path, "--prompt-tokens", 30, "--tokens", 6, *arguments]
    assert_refused(resa(*command), "eval", named)


@pytest.mark.parametrize(
    ("question", "flag", "value"),
    [
        ("fidelity", "--batch", 0),
        ("language", "--batch", 0),
        ("fidelity", "--documents", 0),
        ("fidelity", "--tokens", 0),
        ("fidelity", "--tokens", -6),
        ("fidelity", "--prompt-tokens", 0),
    ],
)
def test_eval_refuses_counts_by_name(resa, long_path, library, question, flag, value):
    command = ["eval", question, "--model", long_path, "--prompt-tokens", 30, "--tokens", 6, flag, value]
    assert_refused(resa(*command), "eval", f"{flag}: got {value}")


def test_eval_needs_documents_that_are_long_enough(resa, long_path, library):
    command = ["eval", "fidelity", "--model", long_path, "--prompt-tokens", 8000, "--tokens", 6]
    assert_refused(resa(*command), "eval", "--prompt-tokens: got 8000")
