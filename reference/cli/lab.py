"""`resa train`, `eval` and `evidence`: the laboratory's commands."""

import argparse
import shlex
import subprocess
import time
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..lab import carried, retrieval, train
from ..lab.corpus import TEXTS, read_documents
from ..lab.evidence import SIZES, Part, run_parts
from ..lab.fidelity import measure_fidelity
from ..lab.free import measure_free
from ..lab.scorers import SCORERS
from ..lab.selection import measure_selection
from ..weights.checkpoint import file_digest
from ..weights.files import source_digest
from ..weights.models import TextModel, find_model
from . import main as cli

QUESTIONS = {  # of `resa eval`
    "fidelity": "how close sparse and rectified decoding stay to dense decoding along given text",
    "sweep": "the same for many ratios and block sizes, without curves",
    "selection": "the attention mass that selection leaves out, layer by layer",
    "free": "how likely dense decoding finds the text that each way writes by itself",
    "retrieval": "what each way still finds in a long text, by family of questions and length",
    "carried": "how many values a model carries through what it decodes, by interval and ratio",
}
NOT_IN_SWEEPS = ("agreement", "by_position", "cross_entropy_lost", "mean_drift")
RATIOS, BLOCK_SIZES = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0], [8, 16, 32, 64]  # of a sweep


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
        cli.writable("--out", options.out / "record.json")
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
    parser.option("--documents", 16, "documents to read; retrieval: questions, carried: programs")
    parser.option(
        "--text", "code", "the library's modules, held-out ones first, or its prose", choices=TEXTS
    )
    parser.option("--prompt-tokens", 4096, "tokens of each that are read before the first step")
    parser.option("--tokens", 512, "tokens of each that are decoded")
    text = "fidelity, sweep: means are over so many last tokens of each (default: all decoded)"
    parser.option("--scored", None, text, type=int)
    parser.option("--intervals", [8, 32, 128], "tokens between rectifications")
    several = {"nargs": "+", "metavar": "P", "type": float}
    text = "fidelity, sweep, carried: active ratios (default: --active-ratio; sweep: 0.02 to 1)"
    parser.option("--ratios", None, text, **several)
    several = {"nargs": "+", "metavar": "N", "type": int}
    text = "fidelity, sweep: block sizes (default: --block-size; sweep: 8 to 64)"
    parser.option("--block-sizes", None, text, **several)
    parser.option("--lengths", [1024, 2048, 4096, 8192], "retrieval: tokens of the texts")
    parser.option("--seeds", 4, "free: texts that are written after each prompt")
    parser.option("--temperature", 0.7, "free: 0 takes the most likely token")
    text = "fidelity, sweep, carried: ways to score blocks, for comparison (default: --selection)"
    parser.option("--scores", None, text, nargs="+", choices=tuple(SCORERS))
    cli.add_sparsity(parser, schedule="paper")
    cli.add_model(parser)
    parser.set_defaults(backend="auto")


def run_eval(options: argparse.Namespace) -> None:
    """Measure a model on text of the library, on questions, or on programs."""
    config = cli.sparsity(options)
    for name in ("documents", "tokens", "prompt_tokens"):
        require_integer(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    if options.out is not None:
        cli.writable("--out", options.out)
    loaded, started = cli.load(options), time.perf_counter()
    result = {"question": options.question, **measure(options, loaded, config)}
    result |= {**cli.provenance(options), "seconds": time.perf_counter() - started}
    cli.report(cli.rounded(result), options.out)


def measure(options: argparse.Namespace, loaded: TextModel, config: ReSAConfig) -> dict[str, Any]:
    """Answer the question of `resa eval`."""
    question, model, tokenizer = options.question, loaded.model, loaded.tokenizer
    n_prompt, n_tokens, intervals = options.prompt_tokens, options.tokens, options.intervals
    ratios = options.ratios or [config.active_ratio]
    if question == "carried":
        more = {"intervals": intervals, "ratios": ratios, "scores": options.scores}
        amounts = options.documents, n_prompt + n_tokens, n_prompt
        return carried.measure_carried(model, tokenizer, *amounts, config, **more)
    if question == "retrieval":
        amounts = options.documents, options.lengths
        return retrieval.measure_retrieval(model, tokenizer, *amounts, config, intervals)

    # All else reads documents. Those of `free` end where it begins to write.
    length, context = n_prompt + n_tokens, model.config.context
    require(length <= context, "--prompt-tokens + --tokens", length, f"≤ {context}")
    read = n_prompt if question == "free" else length
    documents = read_documents(options.text, tokenizer, options.documents, read)
    given, about = (model, documents, n_tokens, config), {"text": options.text}
    if question == "selection":
        return {**about, **measure_selection(*given)}
    if question == "free":
        backend = options.backends[cli.chosen_backend(options)]
        more = {"seeds": options.seeds, "temperature": options.temperature}
        more |= {"intervals": intervals, "generate": backend.generate}
        return {**about, **measure_free(*given, **more)}

    # A sweep has so many rows that it keeps of each what a table shows.
    sizes = [config.block_size]
    if question == "sweep":
        ratios, sizes = options.ratios or RATIOS, BLOCK_SIZES
    more = {"intervals": intervals, "ratios": ratios, "scored": options.scored}
    more |= {"scores": options.scores}
    result = measure_fidelity(*given, block_sizes=options.block_sizes or sizes, **more)
    if question == "sweep":
        for row, name in product(result["rows"], NOT_IN_SWEEPS):
            row.pop(name)
            row.pop(f"{name}_95", None)
    return {**about, **result}


def add_evidence(commands: cli.Commands) -> None:
    """Add `resa evidence`."""
    parser = cli.add_command(commands, "evidence", run_evidence)
    text = "small: minutes on two CPU cores; full: for a GPU"
    parser.option("--size", "small", text, choices=SIZES)
    parser.option("--out", Path("out/evidence"), "folder for the JSON files")
    parser.option("--jobs", 1, "how many parts run side by side, each with one CPU thread")
    cli.add_model(parser)
    parser.set_defaults(model="smollm2")


def run_evidence(options: argparse.Namespace) -> None:
    """Measure what docs/evidence.md says, part by part. Parts that are done are left alone, so an
    interrupted run goes on where it stopped. Parts about carried values are measured on the model
    that was trained for them, all others on --model.
    """
    cli.load(options)  # refuse a bad model before the first part
    cli.writable("--out", options.out / "parts")
    models = {"real": options.model, "carrying": "carrying"}
    checkpoints = {name: file_digest(find_model(model)) for name, model in models.items()}
    parts, source = {}, source_digest()
    for part, (name, words) in SIZES[options.size].items():
        digests = {"checkpoint_sha256": checkpoints[name], "source_sha256": source}
        more = ["--model", str(models[name]), "--device", options.device]
        parts[part] = Part(words, more, digests)

    # Parts run by the command line that this is: its package holds the fastest backend.
    fastest = next(iter(options.backends.values()))
    package = fastest.generate.__module__.rpartition(".")[0]
    try:
        run_parts(parts, options.out, package, jobs=options.jobs)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"a part failed, see above: {shlex.join(error.cmd)}") from None


COMMANDS = (add_train, add_eval, add_evidence)
