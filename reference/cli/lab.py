"""`resa train`, `tokenizer`, `eval` and `evidence`: the laboratory's commands."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
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

# Options of `resa train`: fields of `TrainConfig`. One --context serves the model as well.
TRAINING = {
    "steps": "optimizer steps",
    "batch_tokens": "tokens per step, a multiple of the context",
    "context": "tokens per row, and the longest sequence that the model is for",
    "short_context": "tokens per row in the first part of the run",
    "short_share": "that part's share of the steps",
    "learning_rate": "the peak, after the warm-up",
    "warmup_steps": "steps up to the peak",
    "program_fraction": "share of rows that are programs, not source code",
    "program_rows": "distinct programs",
    "checked_weight": "weight of the mean loss over asserted values, added to that over all tokens",
    "sparse_share": "share of steps, the last ones, that learn from sparse decoding as well",
    "sparse_interval": "tokens between rectifications in those steps; 0: never",
    "seed": "of weights and batches",
    "checkpoint_seconds": "seconds between checkpoints",
    "log_every": "steps per line of the log",
}
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
    parser.option("--fresh", False, "start over, even if --out holds a checkpoint")
    for name, text in TRAINING.items():
        parser.option(f"--{name.replace('_', '-')}", getattr(train.TrainConfig(), name), text)


def run_training(options: argparse.Namespace) -> None:
    """Train a small GPT on the Python source that this machine already has. It reads the standard
    library, with --packages the installed packages as well. A part of the rows are programs whose
    values must be carried. A stopped run goes on by the same command.
    """
    shape = replace(train.SMALL_MODEL, context=options.context)
    config = train.TrainConfig(**{name: getattr(options, name) for name in TRAINING})
    how = {"packages": options.packages, "device": options.device, "init": options.init}
    how |= {"compiled": not options.no_compile, "resume": not options.fresh}
    try:
        train.run(shape, config, options.out, **how)
    except RuntimeError as error:  # the loss diverged, or the device ran out of memory
        raise ValueError(error) from error
    print((options.out / "record.json").read_text(), end="")


def add_tokenizer(commands: cli.Commands) -> None:
    """Add `resa tokenizer`."""
    parser = cli.add_command(commands, "tokenizer", run_tokenizer)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("text", nargs="?", help="show the tokens of this text")
    task.add_argument("--prompt-file", type=Path, help="show the tokens of this file")
    text = "train ranks on the standard library and the installed packages; write them to FILE"
    task.add_argument("--train", type=Path, metavar="FILE", help=text)


def run_tokenizer(options: argparse.Namespace) -> None:
    """Show how the vocabulary cuts a text into tokens, or train a new one on the Python source of
    this machine.
    """
    if options.train is not None:
        cli.report(train.run_tokenizer(cli.writable("--train", options.train)))
        return

    is_given = options.text is not None or options.prompt_file is not None
    require(is_given, "TEXT", "nothing", "a text, or --train FILE")
    text = options.text if options.prompt_file is None else cli.read_text(options.prompt_file)
    tokenizer = load_tokenizer()
    ids = tokenizer.encode_ordinary(text)
    pieces = [tokenizer.decode_single_token_bytes(token).decode(errors="replace") for token in ids]
    print(" ".join(map(repr, pieces)))
    print(f"{len(text.encode())} bytes, {len(ids)} tokens", file=sys.stderr)


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
    text = "carried: how blocks are scored, out of pooled, per-head and 8-bits"
    parser.option("--scores", ["pooled"], text)
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
        amounts = options.documents, n_prompt + n_tokens, config
        tokenizer = load_tokenizer()
        return carried.measure_carried(model, tokenizer, *amounts, prompt_tokens=n_prompt, **more)

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


COMMANDS = (add_train, add_tokenizer, add_eval, add_evidence)
