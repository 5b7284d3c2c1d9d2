"""The command line: `resa demo`, `generate`, `train`, `tokenizer`, `eval`, `conformance`, each a layer over a module.

A bad argument is one clear line on standard error and exit status 2. Progress goes to standard error, results to
standard output; `--json` turns the results into one JSON object.

`python -m resa.reference` decodes with the reference alone. The installed command is `resa.fast.cli`, which hands
`main` a second backend: nothing here knows which.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import ctypes
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import tiktoken
import torch
from rich.console import Console

from .checkpoint import file_digest, load_model, shipped_checkpoint
from .checks import checked_device, require
from .config import SCHEDULES, GPTConfig, ReSAConfig
from .corpus import Document
from .evals.evidence import ON_CPU, SIZES, without
from .files import source_digest, write_atomically
from .generate import Generation, generate
from .model import GPT, REFERENCE_OPS, Operations
from .tasks import RETRIEVAL
from .tokenizer import END_OF_TEXT, load_tokenizer, shipped_ranks


@dataclass(frozen=True)
class Backend:
    """One rendering of decoding, for the commands to run on; its functions import what they need when called."""

    generate: Callable[..., Generation]  # with the signature of `resa.reference.generate`
    operations: Callable[[], Operations]  # for commands with a loop of their own
    needs: Callable[[torch.device], str | None]  # what is missing to run on the device, None where it runs
    dense_below: Callable[[int], int]  # caches of fewer tokens decode faster densely, in a batch of so many


REFERENCE = Backend(generate, lambda: REFERENCE_OPS, needs=lambda device: None, dense_below=lambda batch: 0)
BACKENDS = {"reference": REFERENCE}


def main(
    arguments: Sequence[str] | None = None,
    *,
    backends: Mapping[str, Backend] = BACKENDS,
    more: Sequence[Callable[[argparse._SubParsersAction], None]] = (),
) -> int:
    """Run one command; returns its exit status: 0, 1 for a port that does not conform, 2 for bad input, 130 or 141 as
    shells have them for signals.

    backends: by name, the fastest first; "reference" must be among them. more: functions that add commands.
    """
    options = build_parser(backends, more).parse_args(arguments)
    try:
        status = options.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"resa {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resa {options.command}: interrupted", file=sys.stderr)
        return 130
    return status or 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


DESCRIPTION = (
    "Rectified sparse attention: decode by reading a tenth of the KV cache per token (sparse steps), and every few"
    " tokens make the cache exact again by one dense pass (rectification)."
)


def build_parser(
    backends: Mapping[str, Backend] = BACKENDS, more: Sequence[Callable[[argparse._SubParsersAction], None]] = ()
) -> argparse.ArgumentParser:
    """Every command and its arguments."""
    parser = _Parser(prog="resa", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands, backends)
    _add_generate(commands, backends)
    _add_train(commands)
    _add_tokenizer(commands)
    _add_eval(commands, backends)
    _add_evidence(commands)
    _add_conformance(commands)
    for add in more:
        add(commands)
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that a help text gives itself, and those that are nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_itself = "(default:" in action.help or action.default is None or action.default == []
        return action.help if says_itself else super()._get_help_string(action)


def add_command(commands: argparse._SubParsersAction, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    """A command whose --help shows defaults, first sentence in the list, the whole text on its own page."""
    parser = commands.add_parser(name, help=text.split(". ")[0], description=text, formatter_class=_Defaults)
    parser.set_defaults(run=run)
    return parser


# ---- Arguments that several commands share ---------------------------------------------------------------------------


def _add_model(parser: argparse.ArgumentParser, *, folders: bool = False) -> None:
    text = "checkpoint (safetensors)" + (", or the folder of a Qwen2, Qwen3 or Llama 3 model" if folders else "")
    parser.add_argument("--model", type=Path, default=shipped_checkpoint(), help=text)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cpu or cuda, which is the default where there is one")


def _load(options: argparse.Namespace) -> GPT:
    return load_model(options.model, device=checked_device("--device", options.device))


@dataclass(frozen=True)
class _Language:
    """A model's text <-> tokens, of whichever library."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]
    stop_tokens: list[int]


def _load_any(options: argparse.Namespace) -> tuple[GPT, _Language]:
    """The model of a checkpoint file or of a folder, and its language."""
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.model.is_dir():
        from .pretrained import PretrainedTokenizer, load_pretrained, stop_tokens

        found = PretrainedTokenizer(options.model)  # before the weights, which take longer
        language = _Language(found.encode, found.decode, found.token_bytes, stop_tokens(options.model))
        device = checked_device("--device", options.device)
        return load_pretrained(options.model, dtype=dtype, device=device, progress=True), language
    shipped = load_tokenizer()
    stop = [shipped.encode_single_token(END_OF_TEXT)]
    language = _Language(shipped.encode_ordinary, shipped.decode, shipped.decode_single_token_bytes, stop)
    device = checked_device("--device", options.device)
    return load_model(options.model, dtype=dtype or torch.float32, device=device), language


def _add_backend(parser: argparse.ArgumentParser, backends: Mapping[str, Backend]) -> None:
    text = "what decodes; auto is the fastest that runs on the --device if that is a GPU, else the reference"
    parser.add_argument("--backend", choices=("auto", *backends), default="auto", help=text)
    parser.set_defaults(backends=backends)


def _chosen_backend(options: argparse.Namespace) -> str:
    """Name of the backend to use; one that was asked for by name runs on the device asked for, or is refused."""
    name, backends, device = options.backend, options.backends, checked_device("--device", options.device)
    if name == "auto" and device.type == "cpu":
        return "reference"
    if name == "auto":
        return next(each for each, backend in backends.items() if backend.needs(device) is None)
    needed = backends[name].needs(device)
    require(needed is None, "--backend", name, f"reference ({name} needs {needed})")
    return name


def _add_sparsity(parser: argparse.ArgumentParser) -> None:
    default = ReSAConfig()
    group = parser.add_argument_group("sparse attention")
    group.add_argument("--block-size", type=int, default=default.block_size, help="tokens per block")
    group.add_argument("--active-ratio", type=float, default=default.active_ratio, help="share of blocks attended")
    text = "fewest blocks attended, however small the ratio: a cache of no more is read whole"
    group.add_argument("--min-blocks", type=int, default=default.min_blocks, help=text)
    group.add_argument("--local-blocks", type=int, default=default.local_blocks, help="newest blocks always attended")
    text = "first layers that attend to everything"
    group.add_argument("--dense-layers", type=int, default=default.dense_layers, help=text)


def _add_schedule(parser: argparse.ArgumentParser, *, default: str) -> None:
    text = "paper: after every f sparse steps a dense pass repairs what they cached, and predicts nothing; fused: after"
    text += " f - 1 steps it takes the next token along, and predicts the one after it"
    parser.add_argument("--schedule", choices=SCHEDULES, default=default, help=text)


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"got {value}; allowed: 0 … 2**63 − 1")
    return value


def _interval(text: str) -> int | None:
    if text != "never" and not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: an integer ≥ 1, or never")
    return None if text == "never" else int(text)


def _dense_below(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _sparsity(options: argparse.Namespace, **more: object) -> ReSAConfig:
    shared = ("block_size", "active_ratio", "min_blocks", "local_blocks", "dense_layers")
    return ReSAConfig(**{name: getattr(options, name) for name in shared}, **more)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--prompt-file: {path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file: {path} is not UTF-8 text ({error})") from None


def _writable(argument: str, path: Path) -> Path:
    """The path, in a folder that exists from now on and may be written: found out before the work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}: got {path}; allowed: a file in a folder that can be made ({error})") from None
    require(os.access(path.parent, os.W_OK) and not path.is_dir(), argument, path, "a file in a folder one may write")
    return path


def _report(result: dict[str, object], out: Path | None) -> None:
    """Print a result as JSON and, if asked, keep it in a file with what it was measured on."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        write_atomically(out, (text + "\n").encode())


def _provenance(options: argparse.Namespace) -> dict[str, str]:
    """Command, checkpoint, device and versions that a result was measured with; not where it was written."""
    device = options.device
    is_gpu = torch.device(device).type == "cuda"
    return {
        "command": shlex.join(["resa", *without(sys.argv[1:], ["--out"])]),
        "checkpoint_sha256": file_digest(options.model),
        "source_sha256": source_digest(),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---- demo ------------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction, backends: Mapping[str, Backend]) -> None:
    text = (
        "Continue a real Python file with dense, sparse and rectified sparse decoding side by side. Prints what each"
        " writes, a table of what each loses against dense decoding on the same tokens and what it reads, and draws"
        " how the cache drifts and is rectified."
    )
    parser = add_command(commands, "demo", _run_demo, text)
    parser.add_argument("--prompt-file", type=Path, help="continue this file (default: a held-out library module)")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="take at most this many of the file's tokens")
    parser.add_argument("--tokens", type=int, default=512, help="how many tokens to write")
    parser.add_argument("--intervals", type=int, nargs="+", default=[8, 32, 128], help="tokens per rectification")
    _add_schedule(parser, default="paper")
    parser.add_argument("--temperature", type=float, default=0.5, help="0 takes the most likely token")
    parser.add_argument("--seed", type=_seed, default=0, help="of the random numbers")
    parser.add_argument("--figure", type=Path, default=Path("out/demo.png"), help="where to draw the figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_sparsity(parser)
    _add_model(parser)
    _add_backend(parser, backends)


def _run_demo(options: argparse.Namespace) -> None:
    from .demo import DemoOptions, demo_prompt, draw_figure, run_demo

    figure_format = options.figure.suffix.lower()
    require(
        figure_format in (".png", ".svg", ".pdf"), "--figure", options.figure, "a name ending in .png, .svg or .pdf"
    )
    config = _sparsity(options, schedule=options.schedule)
    settings = DemoOptions(options.tokens, tuple(options.intervals), options.temperature, options.seed, config)
    console = Console(quiet=options.json, highlight=False)
    name = _chosen_backend(options)
    tokenizer, model = load_tokenizer(), _load(options).with_ops(options.backends[name].operations())
    if options.prompt_file is None:
        subject, text = demo_prompt()
    else:
        subject, text = options.prompt_file.name, _read_text(options.prompt_file)
    require(options.prompt_tokens >= 2, "--prompt-tokens", options.prompt_tokens, "an integer ≥ 2")
    prompt = tokenizer.encode_ordinary(text)[: options.prompt_tokens]
    length = len(prompt) + options.tokens
    require(len(prompt) >= 2, "--prompt-file", f"{len(prompt)} tokens", "a text of at least 2 tokens")
    require(length <= model.config.context, "--prompt-tokens + --tokens", length, f"≤ {model.config.context}")
    work = f"{len(prompt):,} tokens read, {options.tokens} to write"
    console.print(f"Continuing {subject}: {work}, on {options.device} (backend {name}).")
    result = run_demo(model, tokenizer, prompt, settings, console)
    draw_figure(result, options.figure, subject.split(" (")[0])
    console.print(f"The figure is {options.figure}; all this took {result['seconds']} s.")
    if options.json:
        told = {"subject": subject, "figure": str(options.figure), "backend": name}
        _report({**result, **told, **_provenance(options)}, None)


# ---- generate --------------------------------------------------------------------------------------------------------


def _add_generate(commands: argparse._SubParsersAction, backends: Mapping[str, Backend]) -> None:
    text = (
        "Continue a text. Reads a prompt and writes what the model makes of it, token by token. The shipped model"
        " writes Python; --model takes the folder of a Qwen2, Qwen3 or Llama 3 checkpoint."
    )
    parser = add_command(commands, "generate", _run_generate, text)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", default="def fibonacci(n):\n", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help="continue this file instead")
    parser.add_argument("--tokens", type=int, default=128, help="how many tokens to write")
    text = "tokens per rectification, or never; 1 is dense decoding (with --schedule paper: decode-only)"
    parser.add_argument("--interval", type=_interval, default=32, help=text)
    _add_schedule(parser, default="fused")
    text = "caches shorter than this decode densely; auto is the backend's measured crossover, 0 for the reference"
    parser.add_argument("--dense-below", type=_dense_below, default="auto", help=text)
    _add_sparsity(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="mass of the tokens sampled from")
    parser.add_argument("--top-k", type=int, help="sample from that many of the likeliest tokens (default: all)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the random numbers")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    text = "of weights and cache; auto is the one that a folder's weights are stored in, float32 for a file"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=text)
    _add_model(parser, folders=True)
    _add_backend(parser, backends)


def _run_generate(options: argparse.Namespace) -> None:
    text = options.prompt if options.prompt_file is None else _read_text(options.prompt_file)
    name = _chosen_backend(options)
    backend = options.backends[name]
    dense_below = backend.dense_below(1) if options.dense_below is None else options.dense_below
    config = _sparsity(options, interval=options.interval, schedule=options.schedule, dense_below=dense_below)
    require(options.tokens >= 0, "--tokens", options.tokens, "an integer ≥ 0")
    model, language = _load_any(options)
    prompt = language.encode(text)
    require(len(prompt) > 0, "prompt", repr(text), "at least one character")
    if not options.json:
        print(text, end="", flush=True)
    reading = Console(stderr=True).status(f"Reading {len(prompt):,} tokens …")
    writer = _Writer(language.token_bytes, reading.stop, silent=options.json)
    started = time.perf_counter()
    reading.start()
    generation = backend.generate(
        model,
        [prompt],
        options.tokens,
        config,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        generator=[torch.Generator().manual_seed(options.seed)],
        stop_tokens=language.stop_tokens,
        on_token=writer,
    )
    reading.stop()
    seconds = time.perf_counter() - started
    tokens = generation.tokens[0]
    if options.json:
        result = {"prompt_tokens": len(prompt), "tokens": tokens, "text": language.decode(tokens)}
        _report({**result, "backend": name, "dense_below": dense_below, "seconds": round(seconds, 3)}, None)
    else:
        writer.close()
        chosen = f"backend {name}, dense below {dense_below:,} tokens" if dense_below else f"backend {name}"
        print(f"{len(prompt)} + {len(tokens)} tokens in {seconds:.1f} s ({chosen})", file=sys.stderr)


class _Writer:
    """Writes tokens as they come; a character whose bytes span tokens waits until it is whole."""

    def __init__(self, token_bytes: Callable[[int], bytes], on_first: Callable[[], None], *, silent: bool) -> None:
        self.token_bytes, self.on_first, self.silent = token_bytes, on_first, silent
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, sequence: int, position: int, token: int) -> None:
        self.on_first()  # does nothing from the second token on
        text = self.decoder.decode(self.token_bytes(token))
        if not self.silent:
            print(text, end="", flush=True)

    def close(self) -> None:
        """Write what never became whole, and end the line."""
        print(self.decoder.decode(b"", final=True))


# ---- train, tokenizer ------------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction) -> None:
    from .train import SMALL_MODEL, TrainConfig

    text = (
        "Train a small GPT on the Python source this machine already has. The standard library, with --packages the"
        " installed packages, and any --folder; part of it lookups over long distances. Stopped or killed, the same"
        " command goes on where it was."
    )
    parser = add_command(commands, "train", _run_train, text)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    _add_corpus(parser, packages=False)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the model on a GPU")
    parser.add_argument("--init", type=Path, help="begin with this finished model's weights, not with random ones")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity: the record is printed as JSON")
    parser.add_argument("--fresh", action="store_true", help="start over, even if --out holds a checkpoint")
    shape = parser.add_argument_group("the model's shape")
    for name in SHAPE_FIELDS:
        _add_field(shape, name, getattr(SMALL_MODEL, name))
    training = parser.add_argument_group("the training run")
    for entry in fields(TrainConfig):
        if entry.name not in ("betas", "context"):  # one context for both
            _add_field(training, entry.name, getattr(TrainConfig(), entry.name))


SHAPE_FIELDS = [entry.name for entry in fields(GPTConfig) if entry.name != "rope_scaling"]  # that one is for folders
FIELD_HELP = {
    "vocab_size": "tokens in the vocabulary",
    "n_layer": "layers",
    "n_head": "query heads",
    "n_kv_head": "KV heads; each serves n-head / n-kv-head query heads",
    "head_dim": "channels per head",
    "hidden_size": "channels of the residual stream",
    "intermediate_size": "channels inside the MLP",
    "context": "tokens per row, and the longest sequence the model is for",
    "rope_theta": "base of the rotary angles",
    "norm_eps": "epsilon of the RMS norms",
    "qkv_bias": "bias of the query, key and value projections (Qwen2)",
    "qk_norm": "RMS norm of queries and keys before RoPE (Qwen3)",
    "tied_embeddings": "use the embedding as the output projection",
    "steps": "optimizer steps",
    "batch_tokens": "tokens per step, a multiple of the context",
    "short_context": "tokens per row in the first part of the run",
    "short_share": "that part's share of the steps",
    "learning_rate": "the peak, after the warm-up",
    "warmup_steps": "steps up to the peak",
    "weight_decay": "of matrices",
    "grad_clip": "largest norm of the whole gradient",
    "lookup_fraction": "share of rows that are lookups rather than code, of those that are nothing else",
    "lookup_rows": "distinct lookup documents",
    "lookup_far": "share of lookups with a uniform rather than log-uniform distance",
    "program_fraction": "share of rows that are programs whose values must be carried",
    "program_rows": "distinct programs",
    "task_fraction": "share of rows that are questions after RULER, of those that are no programs",
    "task_rows": "distinct rows of questions",
    "task_long": "share of those rows that are one question as long as the row",
    "checked_weight": "of the own mean loss of what is asserted, added to that of all tokens",
    "sparse_share": "share of steps, the last ones, that decode sparsely beside the dense pass and learn from both",
    "sparse_interval": "tokens between rectifications in those steps; 0: never",
    "part": "what is trained: all of the model, or its attention alone, the rest staying as in --init",
    "seed": "of weights and batches",
    "checkpoint_seconds": "between checkpoints",
    "log_every": "steps per line of the log",
    "eval_every": "steps per evaluation",
}


def _add_field(group: argparse._ArgumentGroup, name: str, default: object) -> None:
    flag, text = "--" + name.replace("_", "-"), FIELD_HELP[name]
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    else:
        group.add_argument(flag, type=type(default), default=default, help=text)


def _add_corpus(parser: argparse.ArgumentParser, *, packages: bool) -> None:
    parser.add_argument(
        "--packages",
        action=argparse.BooleanOptionalAction,
        default=packages,
        help="read the installed packages beside the standard library",
    )
    parser.add_argument("--folder", action="append", default=[], type=Path, help="read this folder too (repeatable)")


def _run_train(options: argparse.Namespace) -> None:
    from .train import TrainConfig, run

    model_config = GPTConfig(**{name: getattr(options, name) for name in SHAPE_FIELDS})
    known = {entry.name: getattr(options, entry.name) for entry in fields(TrainConfig) if entry.name != "betas"}
    try:
        run(
            model_config,
            TrainConfig(**known),
            options.out,
            packages=options.packages,
            folders=options.folder,
            device=options.device,
            compiled=not options.no_compile,
            resume=not options.fresh,
            init=options.init,
        )
    except RuntimeError as error:  # the loss diverged, or the device ran out of memory
        raise ValueError(error) from error
    print((options.out / "record.json").read_text(), end="")


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    text = "Train the vocabulary, or look at how it cuts a text. With TEXT or --prompt-file, shows the tokens."
    parser = add_command(commands, "tokenizer", _run_tokenizer, text)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("text", nargs="?", help="show the tokens of this text")
    task.add_argument("--prompt-file", type=Path, help="show the tokens of this file")
    task.add_argument("--train", type=Path, metavar="FILE", help="train ranks and write them to FILE")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, with the 256 bytes and the end of text")
    parser.add_argument("--ranks", type=Path, default=shipped_ranks(), help="the ranks to show tokens with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_corpus(parser, packages=True)


def _run_tokenizer(options: argparse.Namespace) -> None:
    from .train import run_tokenizer

    if options.train is not None:
        _writable("--train", options.train)
        result = run_tokenizer(
            options.train, vocab_size=options.vocab_size, packages=options.packages, folders=options.folder
        )
        _report(result, None)
        return
    require(options.text is not None or options.prompt_file is not None, "TEXT", "nothing", "a text, or --train FILE")
    text = options.text if options.prompt_file is None else _read_text(options.prompt_file)
    tokenizer = load_tokenizer(options.ranks)
    ids = tokenizer.encode_ordinary(text)
    pieces = [tokenizer.decode_single_token_bytes(token).decode(errors="replace") for token in ids]
    if options.json:
        print(json.dumps({"ids": ids, "pieces": pieces}))
    else:
        print(" ".join(map(repr, pieces)))
        print(f"{len(text.encode())} bytes, {len(ids)} tokens", file=sys.stderr)


# ---- eval ------------------------------------------------------------------------------------------------------------


def _add_eval(commands: argparse._SubParsersAction, backends: Mapping[str, Backend]) -> None:
    told = "; ".join(f"`{name}`: {text}" for name, (text, _) in QUESTIONS.items())
    parser = add_command(commands, "eval", _run_eval, f"Measure a checkpoint. {told}.")
    parser.add_argument("question", choices=QUESTIONS, help="what to measure")
    parser.add_argument("--out", type=Path, help="write the JSON result to this file too")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity: the result is printed as JSON")
    parser.add_argument("--documents", type=int, default=16, help="how many held-out documents, or programs")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="tokens before the first step (not language)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens decoded per document (not language)")
    parser.add_argument("--no-grid", action="store_true", help="sweep: one factor at a time alone")
    text = "fidelity, speculation, carried, free: between rectifications"
    parser.add_argument("--intervals", type=int, nargs="+", default=[8, 32, 128], help=text)
    text = "active ratios of carried (default: 0.05 0.1 0.2) and of tasks (default: --active-ratio)"
    parser.add_argument("--ratios", type=float, nargs="+", help=text)
    parser.add_argument("--scores", nargs="+", default=["pooled"], help="carried: by pooled, per-head, 8-bits")
    text = "carried, written: of the programs; tasks: of the questions; free: of what is sampled"
    parser.add_argument("--seed", type=int, default=0, help=text)
    parser.add_argument("--temperature", type=float, default=1.0, help="free: 0 is greedy")
    _add_schedule(parser, default="paper")
    parser.add_argument("--probes", type=int, default=64, help="language: lookups per distance")
    text = "language: tokens to look back"
    parser.add_argument("--distances", type=int, nargs="+", default=[256, 1024, 4096, 7680], help=text)
    parser.add_argument("--families", nargs="+", default=list(RETRIEVAL), help="tasks: kinds of questions")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tasks: tokens of an example")
    parser.add_argument("--examples", type=int, default=32, help="tasks: questions per kind and length")
    parser.add_argument("--batch", type=int, default=8, help="sequences decoded at a time")
    _add_sparsity(parser)
    _add_corpus(parser, packages=False)
    _add_model(parser)
    _add_backend(parser, backends)


def _run_eval(options: argparse.Namespace) -> None:
    from .corpus import held_out_library, local_corpus

    config = _sparsity(options, schedule=options.schedule)
    is_used = options.backend == "auto" or options.question in ("written", "tasks")
    require(is_used, "--backend", options.backend, "auto: only `written` and `tasks` have a choice")
    if options.out is not None:
        _writable("--out", options.out)
    for name in ("probes", "batch", "documents", "tokens", "prompt_tokens"):
        require(getattr(options, name) >= 1, f"--{name.replace('_', '-')}", getattr(options, name), "an integer ≥ 1")
    tokenizer, model = load_tokenizer(), _load(options)
    started = time.perf_counter()
    if options.packages or options.folder:
        held_out = local_corpus(packages=options.packages, folders=options.folder).held_out
    else:
        held_out = held_out_library()
    _, measure = QUESTIONS[options.question]
    result = measure(options, _Subject(model, tokenizer, held_out, config))
    seconds = round(time.perf_counter() - started, 1)
    result = {"question": options.question, **_rounded(result), **_provenance(options), "seconds": seconds}
    _report(result, options.out)


def _rounded(value: object) -> object:
    """What was measured with six significant digits, far more than any interval leaves sure; settings as given."""
    if isinstance(value, dict):
        settings = {*ReSAConfig.__dataclass_fields__, "ratio", "temperature"}
        is_setting = {name: name in settings and isinstance(each, float) for name, each in value.items()}
        return {name: each if is_setting[name] else _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class _Subject:
    """What is measured."""

    model: GPT
    tokenizer: tiktoken.Encoding
    held_out: Sequence[Document]
    config: ReSAConfig

    def documents(self, options: argparse.Namespace) -> list[list[int]]:
        """Beginnings of the held-out documents that are long enough, as tokens."""
        length, context = options.prompt_tokens + options.tokens, self.model.config.context
        require(length <= context, "--prompt-tokens + --tokens", length, f"≤ {context}")
        encoded = [self.tokenizer.encode_ordinary(document.text) for document in self.held_out]
        long = [tokens[:length] for tokens in encoded if len(tokens) >= length][: options.documents]
        require(len(long) > 0, "--prompt-tokens", options.prompt_tokens, "less than the longest held-out document")
        return long

    def prompts(self, options: argparse.Namespace) -> list[list[int]]:
        """The same, but for the tokens to be decoded."""
        return [tokens[: options.prompt_tokens] for tokens in self.documents(options)]


def _eval_language(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.language import measure_language

    amounts = {"distances": options.distances, "n_probes": options.probes, "batch": options.batch}
    return measure_language(of.model, of.held_out, of.tokenizer, of.config, **amounts)


def _eval_fidelity(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.fidelity import measure_fidelity

    amounts = options.tokens, of.config, options.intervals
    return measure_fidelity(of.model, of.documents(options), *amounts, batch=options.batch)


def _eval_sweep(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.sweep import Setting, measure_sweep

    # Of the tokens of a document the last one is predicted only.
    base = Setting(replace(of.config, interval=32), options.tokens - 1)
    return measure_sweep(of.model, of.documents(options), base, grid=not options.no_grid, batch=options.batch)


def _eval_speculation(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.speculation import measure_speculation

    amounts = {"intervals": options.intervals, "batch": options.batch}
    return measure_speculation(of.model, of.prompts(options), options.tokens, of.config, **amounts)


def _eval_selection(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.selection import measure_selection

    return measure_selection(of.model, of.documents(options), options.tokens, of.config, batch=options.batch)


def _eval_tasks(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.answers import measure_answers

    name = _chosen_backend(options)
    model = of.model.with_ops(options.backends[name].operations())
    kinds = options.families, options.lengths, options.examples
    amounts = {"ratios": options.ratios or (), "batch": options.batch, "seed": options.seed}
    amounts["code"] = [document.text for document in of.held_out]
    return {**measure_answers(model, of.tokenizer, *kinds, of.config, **amounts), "backend": name}


def _eval_carried(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.carried import measure_carried

    length, ratios = options.prompt_tokens + options.tokens, options.ratios or [0.05, 0.1, 0.2]
    amounts = {"intervals": options.intervals, "ratios": ratios, "prompt_tokens": options.prompt_tokens}
    amounts |= {"scores": options.scores, "batch": options.batch, "seed": options.seed}
    return measure_carried(of.model, of.tokenizer, options.documents, length, of.config, **amounts)


def _eval_written(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.written import measure_written

    name = _chosen_backend(options)
    amounts = {"prompt_tokens": options.prompt_tokens, "batch": options.batch, "seed": options.seed}
    amounts["decode"] = options.backends[name].generate
    result = measure_written(of.model, of.tokenizer, options.documents, options.tokens, of.config, **amounts)
    return {**result, "backend": name}


def _eval_free(options: argparse.Namespace, of: _Subject) -> dict[str, object]:
    from .evals.free import measure_free

    amounts = {"temperature": options.temperature, "batch": options.batch, "seed": options.seed}
    return measure_free(of.model, of.prompts(options), options.tokens - 1, of.config, options.intervals, **amounts)


QUESTIONS = {  # of `resa eval`: what it measures, and by what
    "language": ("held-out code against xz, use of context, lookups", _eval_language),
    "fidelity": ("how close sparse and rectified decoding stay to dense along held-out code", _eval_fidelity),
    "sweep": ("what interval, active ratio, block size and length of the sparse suffix do to accuracy", _eval_sweep),
    "speculation": ("what a dense pass yields if it only confirms", _eval_speculation),
    "selection": ("the attention mass that is left out, layer by layer", _eval_selection),
    "tasks": ("questions whose answers can be checked by running them", _eval_tasks),
    "carried": ("values that must be carried through what is decoded, for every interval and ratio", _eval_carried),
    "written": ("how many assertions hold in programs that the model writes by itself", _eval_written),
    "free": ("what dense decoding thinks of the text that every way writes by itself", _eval_free),
}


# ---- evidence --------------------------------------------------------------------------------------------------------


def _add_evidence(commands: argparse._SubParsersAction) -> None:
    text = (
        "Measure what docs/evidence.md says, part by part. What is done already is left alone, so that an interrupted"
        " run goes on where it stopped. Parts that decode token by token in plain PyTorch (free, fidelity, speculation,"
        " selection) run on the CPU, whatever --device says: sharing a GPU they took longer."
    )
    parser = add_command(commands, "evidence", _run_evidence, text)
    text = "small: minutes on two CPU cores; full: for a GPU, and the CPU beside it"
    parser.add_argument("--size", choices=SIZES, default="small", help=text)
    parser.add_argument("--out", type=Path, default=Path("out/evidence"), help="folder for the JSON files")
    parser.add_argument("--jobs", type=int, default=1, help="parts that run side by side")
    _add_model(parser)


def _run_evidence(options: argparse.Namespace) -> None:
    from .evals.evidence import Part, run_parts

    _load(options)  # refused before the first part
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {}
    names = {name for name, _ in SIZES[options.size].values()}
    models = {name: options.model if name == "model" else shipped_checkpoint(name) for name in names}
    digests = {name: {"checkpoint_sha256": file_digest(path)} for name, path in models.items()}
    source = source_digest()
    for part, (name, words) in SIZES[options.size].items():
        # Relative, because the command is recorded and the folder is this machine's.
        is_default = models[name] == shipped_checkpoint()
        named = [] if is_default else ["--model", os.path.relpath(models[name])]
        device = "cpu" if part in ON_CPU else options.device
        parts[part] = Part(words, ["--device", device, *named], {**digests[name], "source_sha256": source})
    try:
        run_parts(parts, options.out, jobs=options.jobs)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"a part failed, see above: {shlex.join(error.cmd)}") from None


# ---- conformance -----------------------------------------------------------------------------------------------------


def _add_conformance(commands: argparse._SubParsersAction) -> None:
    text = (
        "Check a port against the conformance vectors. MODULE offers the five operations, NumPy arrays in and out, and"
        " decode_trace for whole generations, as docs/porting.md says. Prints every case, and for what fails the law"
        " that broke. The exit status is 0 if all passes, 1 if not, 2 if there is no such module. What the port prints"
        " goes to standard error."
    )
    parser = add_command(commands, "conformance", _run_conformance, text)
    parser.add_argument("module", metavar="MODULE", help="a module that can be imported from here, or a .py file")
    parser.add_argument("--ops-only", action="store_true", help="leave decode_trace out, and do not ask for it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


@contextlib.contextmanager
def _standard_output_for_errors() -> Iterator[None]:
    """What is printed meanwhile goes to standard error, by compiled code and subprocesses too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what C code has printed and not yet written
        os.dup2(kept, 1)
        os.close(kept)


def _run_conformance(options: argparse.Namespace) -> int:
    from .conformance import check_port, is_passed, load_port, load_vectors, report, show

    with _standard_output_for_errors():
        port, vectors = load_port(options.module), load_vectors()
        rows = check_port(port, vectors, ops_only=options.ops_only)
    if options.json:
        _report(report(options.module, vectors, rows, ops_only=options.ops_only), None)
    else:
        show(rows)
    return 0 if is_passed(rows, ops_only=options.ops_only) else 1
