"""`resa train`, `eval` and `evidence`: the laboratory's commands."""

import argparse
import os
import shlex
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..lab import carried, fidelity, free, selection, sweep, train
from ..lab.corpus import held_out_library
from ..lab.evidence import ON_CPU, SIZES, Part, run_parts
from ..model import GPT
from ..weights.checkpoint import file_digest, shipped_checkpoint
from ..weights.files import source_digest
from ..weights.tokenizer import load_tokenizer
from . import main as cli

QUESTIONS = {  # of `resa eval`
    "fidelity": "how close sparse and rectified decoding stay to dense decoding on held-out code",
    "sweep": "what interval, active ratio, block size and number of decoded tokens do to accuracy",
    "selection": "the attention mass that selection leaves out, layer by layer",
    "carried": "how many values a model carries through what it decodes, by interval and ratio",
    "free": "how likely dense decoding finds the text that each way writes by itself",
}


def add_train(commands: cli.Commands) -> None:
    """Add `resa train`."""
    parser = cli.add_command(commands, "train", run_training)
    parser.option("--out", None, "folder for checkpoint, log, model", type=Path, required=True)
    parser.option("--packages", False, "read the installed packages as well")
    parser.option("--device", None, "cpu or cuda (default: cuda where there is a GPU)")
    parser.option("--no-compile", False, "do not compile the model on a GPU")
    parser.option("--init", None, "begin with this finished model's weights", type=Path)
    for each in fields(train.TrainConfig):  # one --context serves the model as well
        parser.option(f"--{each.name.replace('_', '-')}", each.default, each.metadata["help"])


def run_training(options: argparse.Namespace) -> None:
    """Train a small GPT on the Python source that this machine already has. It reads the standard
    library, with --packages the installed packages as well. A part of the rows are programs whose
    values must be carried. A stopped run goes on by the same command.
    """
    shape = replace(train.SMALL_MODEL, context=options.context)
    values = {each.name: getattr(options, each.name) for each in fields(train.TrainConfig)}
    config = train.TrainConfig(**values)
    how = {"device": options.device, "compiled": not options.no_compile, "init": options.init}
    try:
        trainer = train.Trainer(shape, config, **how)
        data = train.prepare_data(config, packages=options.packages)
        train.train(trainer, data, options.out)
    except RuntimeError as error:  # the loss diverged, or the device ran out of memory
        raise ValueError(error) from error
    print((options.out / "record.json").read_text(), end="")


def add_eval(commands: cli.Commands) -> None:
    """Add `resa eval`."""
    parser = cli.add_command(commands, "eval", run_eval)
    questions = "; ".join(f"{name}: {text}" for name, text in QUESTIONS.items())
    parser.add_argument("question", choices=QUESTIONS, help=questions)
    parser.option("--out", None, "write the JSON result to this file too", type=Path)
    parser.option("--documents", 16, "how many held-out documents to read; carried: programs")
    parser.option("--prompt-tokens", 4096, "tokens of each that are read before the first step")
    parser.option("--tokens", 512, "tokens of each that are decoded")
    parser.option("--no-grid", False, "sweep: change one factor at a time only")
    text = "fidelity, carried, free: tokens between rectifications"
    parser.option("--intervals", [8, 32, 128], text)
    parser.option("--ratios", [0.05, 0.1, 0.2], "carried: active ratios")
    text = "carried: how blocks are scored"
    parser.option("--scores", ["pooled"], text, choices=tuple(carried.SCORES))
    cli.add_sparsity(parser, schedule="paper")
    cli.add_model(parser)


def run_eval(options: argparse.Namespace) -> None:
    """Measure a checkpoint on held-out source code, or on programs."""
    config = cli.sparsity(options)
    for name in ("documents", "tokens", "prompt_tokens"):
        require_integer(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    if options.out is not None:
        cli.writable("--out", options.out)
    model, started = cli.load(options), time.perf_counter()
    result = {"question": options.question, **measure(options, model, config)}
    result |= {**cli.provenance(options), "seconds": time.perf_counter() - started}
    cli.report(cli.six_digits(result), options.out)


def measure(options: argparse.Namespace, model: GPT, config: ReSAConfig) -> dict[str, Any]:
    """Answer the question of `resa eval`."""
    n_prompt, n_tokens = options.prompt_tokens, options.tokens
    if options.question == "carried":
        more = {"intervals": options.intervals, "ratios": options.ratios, "scores": options.scores}
        amounts = options.documents, n_prompt + n_tokens, n_prompt
        return carried.measure_carried(model, load_tokenizer(), *amounts, config, **more)

    documents = _documents(options, model.config.context)
    if options.question == "fidelity":
        return fidelity.measure_fidelity(model, documents, n_tokens, config, options.intervals)
    if options.question == "selection":
        return selection.measure_selection(model, documents, n_tokens, config)

    # The last token of a document is predicted, never fed.
    if options.question == "sweep":
        base = sweep.Setting(replace(config, interval=32), n_tokens - 1)
        return sweep.measure_sweep(model, documents, base, grid=not options.no_grid)
    prompts = [tokens[:n_prompt] for tokens in documents]
    return free.measure_free(model, prompts, n_tokens - 1, config, options.intervals)


def _documents(options: argparse.Namespace, context: int) -> list[list[int]]:
    """Beginnings of the held-out documents that are long enough, as tokens."""
    length, tokenizer = options.prompt_tokens + options.tokens, load_tokenizer()
    require(length <= context, "--prompt-tokens + --tokens", length, f"≤ {context}")
    encoded = [tokenizer.encode_ordinary(document.text) for document in held_out_library()]
    found = [tokens[:length] for tokens in encoded if len(tokens) >= length]
    allowed = "less than the longest held-out document"
    require(len(found) > 0, "--prompt-tokens", options.prompt_tokens, allowed)
    return found[: options.documents]


def add_evidence(commands: cli.Commands) -> None:
    """Add `resa evidence`."""
    parser = cli.add_command(commands, "evidence", run_evidence)
    text = "small: minutes on two CPU cores; full: for a GPU, and the CPU beside it"
    parser.option("--size", "small", text, choices=SIZES)
    parser.option("--out", Path("out/evidence"), "folder for the JSON files")
    parser.option("--jobs", 1, "how many parts run side by side")
    cli.add_model(parser)


def run_evidence(options: argparse.Namespace) -> None:
    """Measure what docs/evidence.md says, part by part. Parts that are done are left alone, so an
    interrupted run goes on where it stopped. Parts that decode token by token in plain PyTorch run
    on the CPU, whatever --device says: sharing a GPU, they took longer.
    """
    cli.load(options)  # refuse a bad model before the first part
    options.out.mkdir(parents=True, exist_ok=True)
    parts, source = {}, source_digest()
    for part, (name, words) in SIZES[options.size].items():
        path = options.model if name == "model" else shipped_checkpoint(name)
        # The path is relative: the command is recorded, and the folder is this machine's.
        named = [] if path == shipped_checkpoint() else ["--model", os.path.relpath(path)]
        device = "cpu" if part in ON_CPU else options.device
        digests = {"checkpoint_sha256": file_digest(path), "source_sha256": source}
        parts[part] = Part(words, ["--device", device, *named], digests)
    try:
        run_parts(parts, options.out, jobs=options.jobs)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"a part failed, see above: {shlex.join(error.cmd)}") from None


COMMANDS = (add_train, add_eval, add_evidence)
