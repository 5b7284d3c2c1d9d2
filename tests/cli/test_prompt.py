"""The text that `resa generate` reads, and what it says it read: chats, ends of long files, pipes, counts of blocks."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import REFERENCE_OPS, ReSAConfig, generate, save_model
from resa.reference.cli import main as command_line
from resa.reference.cli.generate import Reads, count_reads, decode
from resa.reference.cli.main import BACKENDS, REFERENCE, build_parser, main
from resa.reference.weights.checkpoint import file_digest
from resa.reference.weights.models import open_model
from resa.reference.weights.pretrained import foreign_name
from small_models import Shape

tokenizers = pytest.importorskip("tokenizers", reason="the extra `dev` has it")
CodeShape = type("CodeShape", (Shape,), {"vocab": 4096})  # over the shipped tokenizer's vocabulary
N_VOCAB, BOS, END = 260, 256, 257  # bytes, then special tokens
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model as a folder: a token for each byte, one before every text, a template for chats."""
    where = tmp_path_factory.mktemp("folder")
    shape = type("ByteShape", (Shape,), {"vocab": N_VOCAB})(seed=3, context=400, qkv_bias=True)
    weights = shape.model(torch.float32).state_dict()
    del weights["output.weight"]
    named = {foreign_name(name): weight for name, weight in weights.items()}
    safetensors.torch.save_file(named, where / "model.safetensors")
    config = shape.config(context=400)
    values = {
        "model_type": "qwen2", "vocab_size": N_VOCAB, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim,
        "max_position_embeddings": 400, "tie_word_embeddings": True, "eos_token_id": END,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
    }  # fmt: skip
    (where / "config.json").write_text(json.dumps(values))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "<|im_end|>", "<|im_start|>"])
    first = [("<s>", BOS)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    made.save(str(where / "tokenizer.json"))
    more = {"chat_template": CHAT, "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (where / "tokenizer_config.json").write_text(json.dumps(more))
    return where


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random model of ours."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, CodeShape(seed=2, context=128, tied=False).model(torch.float32))
    return path


@pytest.fixture
def resa(called):
    return lambda *arguments, backends=BACKENDS: called(main, *arguments, backends=backends)


@pytest.fixture
def reading(resa, monkeypatch):
    """Runs `resa generate` → (the tokens that were read, status, standard output, standard error)."""

    def run(*arguments):
        read = []

        def watched(model, prompts, *rest, **more):
            read.extend(prompts)
            return generate(model, prompts, *rest, **more)

        backends = {"reference": replace(REFERENCE, generate=watched)}
        found = resa("generate", *arguments, backends=backends)
        return read[0] if read else None, *found

    return run


def assert_refused(result, *named):
    """Status 2, nothing on standard output, one line on standard error, which names what is wrong."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert re.fullmatch(r"resa[ a-z]*: [^\n]+\n", err), err
    assert all(re.search(name, err) for name in named), err


# Chats


def test_a_chat_is_what_transformers_makes_of_one_message(reading, folder):
    transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>")
    message = [{"role": "user", "content": "Größe?\n<|im_end|>"}]
    told = theirs.apply_chat_template(message, chat_template=CHAT, add_generation_prompt=True)
    wanted = told["input_ids"] if isinstance(told, dict) or hasattr(told, "input_ids") else told
    read, status, out, _ = reading("Größe?\n<|im_end|>", "--chat", "--model", folder, "--tokens", 0)
    assert (read, status, out) == (wanted, 0, "\n")
    assert (read[0], read.count(BOS), read.count(END)) == (BOS, 1, 2)
    assert reading("Größe?", "--model", folder, "--tokens", 0)[0][0] == BOS  # a plain text begins so too


def test_an_answer_is_written_without_its_end(resa, folder, monkeypatch):
    """Nor is the message: the answer stands alone."""
    command = ["generate", "hi", "--chat", "--model", folder, "--tokens", 12, "--temperature", 1, "--seed", 4]
    result = json.loads(resa(*command, "--json")[1])
    tokens, load = result["tokens"], command_line.load
    place = next(place for place in range(2, 12) if tokens[place] not in tokens[:place])
    end = tokens[place]
    monkeypatch.setattr(command_line, "load", lambda *asked: replace(load(*asked), stop_tokens=[end]))
    answer = open_model(folder).tokenizer.decode(tokens[:place])
    status, out, err = resa(*command)
    assert (status, out) == (0, answer + "\n")
    assert f"{result['prompt_tokens']} + {place + 1} tokens in " in err
    result = json.loads(resa(*command, "--json")[1])
    assert (result["tokens"], result["text"]) == (tokens[: place + 1], answer)


def test_a_chat_is_refused_by_name(resa, folder, path, monkeypatch, tmp_path):
    for model in ("code", path):
        found = resa("generate", "hi", "--chat", "--model", model)
        assert_refused(found, f"--chat: got model {model}, without a chat template; allowed: .*smollm2")
    failing = tmp_path / "failing"
    failing.mkdir()
    for file in folder.iterdir():
        (failing / file.name).symlink_to(file)
    (failing / "chat_template.jinja").write_text("{{ raise_exception('no\nusers') }}")
    assert_refused(resa("generate", "hi", "--chat", "--model", failing), "chat template: got TemplateError: no; users")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert_refused(resa("generate", "hi", "--chat", "--model", folder), "chat template: .*pip install jinja2")


# The end of a long text


def test_the_last_tokens_of_a_text_are_read_and_printed(reading, path, tokenizer):
    text = "".join(f"value_{i} = {i}\n" for i in range(60))
    tokens = tokenizer.encode_ordinary(text)
    for kept in (1, 17, len(tokens), len(tokens) + 1):
        last = tokens[-kept:]
        if len(last) > 100:
            continue
        read, status, out, _ = reading(text, "--prompt-tokens", kept, "--model", path, "--tokens", 3)
        assert (read, status) == (last, 0)
        assert out.startswith(tokenizer.decode(last))
    short = "x = 1\r\n"
    for kept in (tokenizer.encode_ordinary(short), range(1000)):
        read, _, out, _ = reading(short, "--prompt-tokens", len(kept), "--model", path, "--tokens", 3)
        assert read == tokenizer.encode_ordinary(short)
        assert out.startswith(short)
    for bad in (0, -3):
        found = reading(text, "--prompt-tokens", bad, "--model", path)[1:]
        assert_refused(found, f"--prompt-tokens: got {bad}; allowed: an integer ≥ 1")


def test_a_token_before_every_text_stays_there(reading, folder):
    read, _, out, _ = reading("abcdef", "--prompt-tokens", 4, "--model", folder, "--tokens", 0)
    tokenizer = open_model(folder).tokenizer
    assert read == [BOS, *tokenizer.encode_chat("def")]
    assert out == "def\n"
    found = reading("abcdef", "--prompt-tokens", 1, "--model", folder)[1:]
    assert_refused(found, "--prompt-tokens: got 1; allowed: an integer ≥ 2")


def test_a_chats_message_is_cut_before_the_template_goes_around_it(reading, folder):
    read = reading("abcdef", "--prompt-tokens", 4, "--chat", "--model", folder, "--tokens", 0)[0]
    assert read == reading("def", "--chat", "--model", folder, "--tokens", 0)[0]


def test_a_text_that_is_too_long_is_refused_before_it_is_printed(reading, path, folder, tokenizer, tmp_path):
    """And the number that the message names works."""
    file = tmp_path / "long.py"
    file.write_text("".join(f"value_{i} = {i}\n" for i in range(4000)))
    count = len(tokenizer.encode_ordinary(file.read_text()))
    assert count > 30_000
    command = ["--prompt-file", file, "--model", path, "--tokens", 20]
    read, *found = reading(*command)
    assert read is None
    assert_refused(found, f"prompt: got {count:,} tokens and --tokens 20; allowed: context = 128 .*--prompt-tokens 109")
    read, status, _, err = reading(*command, "--prompt-tokens", 109)
    assert (len(read), status) == (109, 0)
    assert "109 + 20 tokens in " in err
    assert_refused(reading(*command, "--prompt-tokens", 110)[1:], "prompt: got 110 tokens")
    chat = ["--prompt-file", file, "--model", folder, "--tokens", 20, "--chat"]
    err = reading(*chat)[3]
    room = int(re.search(r"context = 400 .*--prompt-tokens (\d+)", err)[1])
    assert len(reading(*chat, "--prompt-tokens", room)[0]) in (380, 381)
    found = reading("x", "--model", path, "--tokens", 130)[1:]
    assert_refused(found, r"prompt: got 1 tokens and --tokens 130; allowed: context = 128 tokens in all\n")


# Prompt files that are no plain files


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no such folder")
def test_pipes_are_prompt_files(reading, path, tokenizer):
    """A shell passes `<(command)` as /dev/fd/N."""
    text = "größe = 1\r\n" * 5
    end, start = os.pipe()
    os.write(start, text.encode())
    os.close(start)
    read, status, out, _ = reading("--prompt-file", f"/dev/fd/{end}", "--model", path, "--tokens", 1)
    os.close(end)
    assert (read, status) == (tokenizer.encode_ordinary(text), 0)
    assert out.startswith(text)
    command = [sys.executable, "-m", "resa.reference", "generate", "--prompt-file", "/dev/stdin", "--model", path]
    done = subprocess.run([*command, "--tokens", "1"], input=text.encode(), capture_output=True, timeout=120)
    assert (done.returncode, done.stdout[: len(text.encode())]) == (0, text.encode())


def test_a_file_without_an_end_is_refused(resa, path, monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "TEXT_LIMIT", 1000)
    file = tmp_path / "file"
    file.write_text("x" * 1000)
    assert resa("generate", "--prompt-file", file, "--model", path, "--tokens", 0, "--prompt-tokens", 9)[0] == 0
    file.write_text("x" * 1001)
    for name in (file, "/dev/zero"):
        if os.path.exists(name):
            found = resa("generate", "--prompt-file", name, "--model", path)
            assert_refused(found, f"--prompt-file: got {name}, more; allowed: at most 1,000 bytes")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_prompt_file_is_named(resa, path, tmp_path):
    file = tmp_path / "secret"
    file.touch(mode=0)
    found = resa("generate", "--prompt-file", file, "--model", path)
    assert_refused(found, f"--prompt-file: {file}: permission denied")


# Arguments that no command can take


def commands():
    """Every command, and its options."""
    (choices,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return choices.choices


VALID = {"eval": ["fidelity"], "conformance": ["port.py"], "train": ["--out", "out"]}


@pytest.mark.parametrize("command", commands())
def test_bytes_that_are_no_text_are_refused(resa, command, folder, monkeypatch, tmp_path):
    """A shell passes any bytes. Python hands on those that are no UTF-8 as halves of surrogate pairs."""
    monkeypatch.chdir(tmp_path)
    told = r"got '.*\\udcff.*'; allowed: arguments that are UTF-8 text"
    for more in (["# \udcff"], ["--model", "\udcff"], ["--out", "a\udcff/b"], ["--figure", "\udcff.png"]):
        assert_refused(resa(command, *VALID.get(command, []), *more), told)
    assert list(tmp_path.iterdir()) == []
    raw = [sys.executable, "-m", "resa.reference", command, b"# \xff", "--model", folder]
    if command == "generate":
        done = subprocess.run(raw, capture_output=True, text=True, timeout=120)
        assert_refused((done.returncode, done.stdout, done.stderr), told)


INTEGERS = [
    (command, action.option_strings[0])
    for command, parser in commands().items()
    for action in parser._actions
    if action.option_strings and getattr(action.type, "__name__", "") in ("int", "integer", "seed", "_interval")
]


def test_the_integer_options_were_found():
    wanted = {"--tokens", "--prompt-tokens", "--block-size", "--interval", "--seed", "--top-k", "--dense-below"}
    assert wanted < {option for command, option in INTEGERS if command == "generate"}
    assert {"demo", "eval", "train", "evidence"} < {command for command, _ in INTEGERS}


@pytest.mark.parametrize(("command", "option"), INTEGERS)
def test_integers_without_measure_are_refused(resa, monkeypatch, tmp_path, command, option):
    """However long, before any work."""
    monkeypatch.chdir(tmp_path)
    for value in (2**63, 10**30, "9" * 5000):
        assert_refused(resa(command, *VALID.get(command, []), option, value), f"argument {option}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [option for command, option in INTEGERS if command == "generate"])
def test_the_largest_integers_work_or_are_refused_by_name(resa, path, option):
    command = ["generate", "x = 1\n", "--tokens", 5, "--model", path]
    found = resa(*command, option, 2**31 - 1)
    if found[0] != 0:
        assert_refused(found, f"(?i){option.lstrip('-').replace('-', '.')}")
    both = resa(*command, "--min-blocks", 2**31 - 1, "--local-blocks", 2**31 - 1, "--interval", "never")
    assert both[0] == 0, both[2]


WRITTEN = {
    "demo": ("--figure", ".png", ["--prompt-file", "prompt.py"]),
    "eval": ("--out", ".json", ["fidelity"]),
}


@pytest.mark.parametrize("command", WRITTEN)
def test_files_that_cannot_be_written_are_named(resa, path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.py").write_text("x = 1\n" * 30)
    option, ending, more = WRITTEN[command]
    (tmp_path / f"folder{ending}").mkdir()
    tokens = ["--prompt-tokens", 40, "--tokens", 8, "--model", path]
    for name in (f"folder{ending}", f"prompt.py/a{ending}", f"prompt.py/a/b{ending}", "a" * 300 + ending):
        found = resa(command, *more, *tokens, option, name)
        assert_refused(found, f"{option}: got {name}; allowed: a file in a writable folder")


@pytest.mark.parametrize("command", [["train", "--device", "cpu"], ["evidence", "--model", "code"]])
def test_folders_that_cannot_be_written_are_named(resa, command, tmp_path):
    """Before the corpus is read."""
    (tmp_path / "file").touch()
    for name in ("file", "file/folder", "a" * 300):
        found = resa(*command, "--out", tmp_path / name)
        assert_refused(found, f"--out: got {tmp_path / name}/[a-z.]+; allowed: a file in a writable folder")


def test_models_that_cannot_be_read_are_named(resa, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "text.gguf").write_text("no weights")
    names = [*("empty", "text.safetensors", "text.gguf", "missing", "missing/too"), "a" * 300]
    for name in names:
        assert_refused(resa("generate", "--model", tmp_path / name), re.escape(name))
    for name in ("empty", "missing.safetensors", "text.safetensors"):
        found = resa("train", "--out", tmp_path / "out", "--device", "cpu", "--init", tmp_path / name)
        assert_refused(found, re.escape(name))


# Names of models


def test_the_help_names_the_models(resa):
    for command in ("demo", "generate", "eval", "evidence"):
        words = " ".join(resa(command, "--help")[1].split())
        assert all(each in words for each in ("code: shipped", "carrying: ", "smollm2: ", ".gguf", "OWNER/NAME"))


def test_a_folders_digest_is_that_of_its_configuration_and_weights(folder, path, tmp_path):
    import hashlib

    names = ("config.json", "model.safetensors")
    whole = b"".join((folder / name).read_bytes() for name in names)
    assert file_digest(folder) == hashlib.sha256(whole).hexdigest()
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# What was read

CONFIGS = st.builds(
    lambda b, p, n, local, f, schedule, dense: ReSAConfig(b, p, n + local - 1, local, f, schedule, dense),
    st.sampled_from([1, 2, 4, 7]),
    st.sampled_from([0.1, 0.3, 1.0]),
    st.integers(1, 4),
    st.integers(1, 2),
    st.none() | st.integers(1, 5),
    st.sampled_from(["fused", "paper"]),
    st.integers(0, 3),
)


@given(CONFIGS, st.integers(1, 20), st.integers(0, 14), st.integers(0, 15), st.none() | st.integers(0, 13))
def test_counts_are_what_decoding_did(config, n_prompt, n_tokens, n_dense, stop):
    """The selections and repairs of a model of three layers, watched where they happen."""
    selected, repaired = [], []
    loop = import_module("resa.reference.generate")
    rectify = loop.rectify

    def select_blocks(scores, lengths, config):
        indices = REFERENCE_OPS.select_blocks(scores, lengths, config)
        selected.append((int((indices[0, 0] >= 0).sum()), -(-int(lengths[0]) // config.block_size)))
        return indices

    def watched(model, tokens, cache, n_drifted):
        repaired.append(n_drifted)
        return rectify(model, tokens, cache, n_drifted)

    model = Shape(layers=3, context=64).model(torch.float32)
    model = model.with_ops(replace(REFERENCE_OPS, select_blocks=select_blocks))
    n_dense, prompt, request = min(n_dense, n_tokens), [index % 23 for index in range(n_prompt)], {"stop_tokens": []}
    if stop is not None and stop < n_tokens:
        request["stop_tokens"] = [decode(REFERENCE, model, prompt, n_tokens, config, n_dense, **request)[stop]]
    selected.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "rectify", watched)
        tokens = decode(REFERENCE, model, prompt, n_tokens, config, n_dense, **request)
    reads = count_reads(n_prompt, len(tokens), config, n_dense)
    layers = max(3 - config.dense_layers, 0)
    assert reads.steps == max(len(tokens) - 1, 0)
    assert reads.rectifications == sum(drifted > 0 for drifted in repaired)
    if layers:
        assert len(selected) == layers * reads.sparse_steps
        assert sum(read for read, _ in selected) == layers * reads.blocks_read
        assert sum(held for _, held in selected) == layers * reads.blocks_held
    if reads.sparse_steps and layers and selected[-1][1]:
        assert reads.longest >= max(held for _, held in selected)


SAID = [
    (Reads(0, 0, 0, 0, 1, 0), ReSAConfig(), ""),
    (Reads(9, 9, 18, 18, 2, 0), ReSAConfig(), "Never longer than 16 blocks: every step read all of it"),
    (Reads(9, 0, 0, 0, 17, 0), ReSAConfig(interval=1), "Every step read all of it"),
    (Reads(9, 9, 180, 180, 20, 1), ReSAConfig(active_ratio=1.0), "Every step read all of it"),
    (Reads(9, 9, 170, 180, 20, 1), ReSAConfig(dense_layers=3), "Every step read all of it"),
    (Reads(9, 8, 128, 160, 20, 1), ReSAConfig(), "A sparse step read 16 of 20 blocks, 1 rectification"),
    (Reads(9, 9, 144, 189, 21, 0), ReSAConfig(), "A sparse step read 16 of 21 blocks, no rectifications"),
    (
        Reads(300, 300, 36_000, 360_000, 1300, 9),
        ReSAConfig(dense_layers=1),
        "A sparse step read 120 of 1,200 blocks in 2 of 3 layers, 9 rectifications",
    ),
]


@pytest.mark.parametrize(("reads", "config", "said"), SAID)
def test_the_last_line_says_what_was_read(reads, config, said):
    assert reads.sentence(config, 3) == said


def test_the_last_line_is_about_this_request(resa, path):
    """60 tokens are read and 9 written, so that 8 steps feed one each: 6 sparse ones, and 2 passes."""
    words = ["generate", "x" * 60, "--prompt-tokens", 60, "--tokens", 9, "--model", path, "--block-size", 4]
    text = resa(*words, "--min-blocks", 5, "--interval", 3)
    number = int(re.match(r"(\d+) \+ 9 tokens in ", text[2])[1])
    config = ReSAConfig(block_size=4, min_blocks=5, interval=3)
    reads = count_reads(number, 9, config)
    assert text[2].endswith(f" s (backend reference). {reads.sentence(config, 3)}\n")
    assert (reads.sparse_steps, reads.rectifications) == (6, 2)
    result = json.loads(resa(*words, "--min-blocks", 5, "--interval", 3, "--json")[1])["reads"]
    assert (result["sparse_steps"], result["blocks_read"]) == (reads.sparse_steps, reads.blocks_read)
