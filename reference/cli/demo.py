"""`resa demo`: watch on a real file what sparse decoding loses and what rectification repairs.

Dense decoding continues a held-out file of the standard library. Sparse, rectified and decode-only
decoding are then led along those same tokens. The table splits what each loses into step error and
drift; the figure shows how drift builds up and is wiped. `lab/follow.py` does the measuring.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import tiktoken
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checks import is_integer, require, require_integer
from ..config import ReSAConfig
from ..generate import Generation, generate
from ..lab.corpus import held_out_library
from ..lab.fidelity import decoding_variants, read_ratio
from ..lab.follow import Teacher, follow, teach
from ..model import GPT
from ..sampling import Sampling
from ..weights.files import write_atomically
from ..weights.tokenizer import load_tokenizer
from . import main as cli

DEMO_MODULE = "plistlib"  # held out of training, 8,000 tokens, in every Python since 2.6
SHOWN_LINES = 16
LEGEND = (
    "sparse: every token reads selected blocks alone. ReSA f=N: the same, and every N tokens a"
    " dense pass rectifies the cache. decode-only: rectified after every token, so that the cache"
    " is exact. KL: distance of the next-token distribution from dense decoding's. Drift: how far"
    " cached keys and values are off, relative to their norm. Cost model: eq. 6, where it holds."
    " Other intervals: --intervals 4 16 64, or make demo ARGS='--intervals 4 16 64'.\n"
)
# Okabe and Ito's palette: colour-blind readers can tell them apart, on light and dark ground.
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7")
TABLES = {  # title: columns, each with its head, its key in a row, and its format
    "Against dense decoding, on the same tokens": (
        ("KL\n(nats)", "kl", "{:.4f}"),
        ("= step\nerror", "step_error", "{:.4f}"),
        ("+ drift", "drift_loss", "{:+.4f}"),
        ("same top\ntoken", "agreement", "{:.1%}"),
    ),
    "The KV cache": (
        ("mean\ndrift", "mean_drift", "{:.2g}"),
        ("largest\ndrift", "largest_drift", "{:.2g}"),
        ("right after\nrectifying", "after_rectification", "{:.1g}"),
        ("MiB read\nper token", "mib_per_token", "{:.2f}"),
        ("of\ndense", "read_ratio", "{:.3f}"),
        ("cost\nmodel", "cost_model", "{:.3f}"),
    ),
}
DRIFT = "the errors that sparse steps leave in the cache for all later steps to read."
Row = dict[str, Any]  # what one way of decoding loses, how far its cache drifts, what it reads


@dataclass(frozen=True)
class DemoOptions:
    """The text to decode, and the settings."""

    n_tokens: int
    intervals: tuple[int, ...]
    temperature: float
    seed: int
    config: ReSAConfig

    def __post_init__(self) -> None:
        require_integer("tokens", self.n_tokens, 2)
        fits = len(self.intervals) > 0 and all(is_integer(f, 1) for f in self.intervals)
        require(fits, "intervals", self.intervals, "integers ≥ 1, at least one")
        Sampling(self.temperature)  # refuses what is no temperature


def demo_prompt() -> tuple[str, str]:
    """Name and text of the file that is continued by default."""
    for document in held_out_library():
        if document.name == DEMO_MODULE:
            return f"the standard library's {DEMO_MODULE}.py (held out of training)", document.text
    missing = f"prompt file: this Python has no source of {DEMO_MODULE}; name another file"
    raise FileNotFoundError(missing)


def add_demo(commands: cli.Commands) -> cli.Parser:
    """Add the command."""
    parser = cli.add_command(commands, "demo", demo)
    text = "continue this file (default: a held-out module of the standard library)"
    parser.option("--prompt-file", None, text, type=Path)
    parser.option("--prompt-tokens", 4096, "read at most this many of the file's tokens")
    parser.option("--tokens", 512, "how many tokens to write")
    parser.option("--intervals", [8, 32, 128], "tokens per rectification")
    parser.option("--temperature", 0.5, "0 takes the most likely token")
    parser.option("--seed", 0, "of the random numbers", type=cli.seed)
    parser.option("--figure", Path("out/demo.png"), "where to draw the figure")
    parser.option("--json", False, "print one JSON object instead of text")
    # Under "paper" every token is decoded sparsely, so the loss of all rows splits alike.
    cli.add_sparsity(parser, schedule="paper")
    cli.add_model(parser)
    return parser


def demo(options: argparse.Namespace) -> None:
    """Continue a real Python file with dense, sparse and rectified decoding. Prints what each
    writes, a table of what each loses against dense decoding on the same tokens and of what it
    reads, and draws how the cache drifts and is rectified.
    """
    # Refuse what is wrong before anything is decoded.
    is_picture = options.figure.suffix.lower() in (".png", ".svg", ".pdf")
    require(is_picture, "--figure", options.figure, "a name ending in .png, .svg or .pdf")
    amounts = options.tokens, tuple(options.intervals), options.temperature, options.seed
    settings, backend = DemoOptions(*amounts, cli.sparsity(options)), cli.chosen_backend(options)
    tokenizer = load_tokenizer()
    model = cli.load(options).with_ops(options.backends[backend].operations())
    if options.prompt_file is None:
        subject, text = demo_prompt()
    else:
        subject, text = options.prompt_file.name, cli.read_text(options.prompt_file)
    require_integer("--prompt-tokens", options.prompt_tokens, 2)
    prompt = tokenizer.encode_ordinary(text)[: options.prompt_tokens]
    n_prompt, context = len(prompt), model.config.context
    require(n_prompt >= 2, "--prompt-file", f"{n_prompt} tokens", "a text of at least 2 tokens")
    length = n_prompt + options.tokens
    require(length <= context, "--prompt-tokens + --tokens", length, f"≤ {context}")
    cli.writable("--figure", options.figure)

    console = Console(quiet=options.json, highlight=False)
    work = f"{n_prompt:,} tokens read, {options.tokens} to write"
    console.print(f"Continuing {subject}: {work}, on {options.device} (backend {backend}).")
    torch.set_num_threads(1)  # steps of one token are too small to be worth sharing
    result = run_demo(model, tokenizer, prompt, settings, console)
    draw_figure(result, options.figure, subject.split(" (")[0])
    console.print(f"The figure is {options.figure}; all this took {result['seconds']} s.")
    if options.json:
        about = {"subject": subject, "figure": str(options.figure), "backend": backend}
        curves = {name: [round(x, 4) for x in curve] for name, curve in result["curves"].items()}
        result = {**result, "curves": curves, **about, **cli.provenance(options)}
        cli.report(cli.six_digits(result))


def run_demo(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompt: Sequence[int],
    options: DemoOptions,
    console: Console,
) -> dict[str, Any]:
    """Decode, printing as it goes; returns all that was measured, JSON-ready."""
    started, variants = time.perf_counter(), decoding_variants(options.config, options.intervals)
    shown = "sparse", f"ReSA f={32 if 32 in options.intervals else max(options.intervals)}"
    progress = Console(stderr=True, highlight=False)

    def log(name: str, says: str) -> None:
        progress.print(f"[{time.perf_counter() - started:5.1f} s] {name:<12} {says}")

    # Dense decoding writes. The others are led along its tokens; two write their own as well.
    found: dict[str, Any] = {}
    with progress.status(f"Writing {options.n_tokens} tokens …") as status:
        how = {"temperature": options.temperature, "seed": options.seed}
        teacher = teach(model, prompt, options.n_tokens, options.config, **how)
        log("dense", "wrote the tokens that all others are compared on")
        status.update(f"Decoding them in {len(variants)} other ways …")
        jobs = {n: partial(measure, model, teacher, config) for n, config in variants.items()}
        jobs |= {f"{n}, own": partial(write, model, teacher, variants[n], options) for n in shown}
        for name, result in run_all(jobs, teacher.cache.keys.device):
            found[name] = result
            if name in variants:
                alike = f"same top token {result['agreement']:.1%}"
                log(name, f"KL from dense {result['kl']:.4f} nats, {alike}")

    curves = {name: found[name].pop("curve") for name in variants}
    rows = all_rows(teacher, {name: found[name] for name in variants})
    texts = {"dense": teacher.tokens} | {name: found[f"{name}, own"] for name in shown}
    for part in (side_by_side(texts, tokenizer), LEGEND, *tables(rows), verdict(rows)):
        console.print(part)
    return {
        "prompt_tokens": len(prompt),
        "options": asdict(options),
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "curves": curves,
    }


def measure(model: GPT, teacher: Teacher, config: ReSAConfig) -> Row:
    """Lead one way of decoding along the dense tokens."""
    found = follow(model, teacher, config)
    blocks = (len(teacher.prompt) - 1) / config.block_size
    is_modelled = config.active_ratio * blocks >= config.min_blocks  # below, that decides instead
    return {
        "kl": float(found.kl.mean()),
        "agreement": float(found.agreement.float().mean()),
        "mean_drift": float(found.mean_drift.mean()),
        "largest_drift": found.largest_drift,
        "after_rectification": found.drift_after_rectification,
        "bytes_per_token": found.bytes_per_token,
        "read_ratio": found.bytes_per_token / teacher.bytes_per_token,
        "cost_model": read_ratio(config) if is_modelled else None,
        "curve": found.mean_drift.tolist(),
    }


def write(model: GPT, teacher: Teacher, config: ReSAConfig, options: DemoOptions) -> list[int]:
    """Let one way of decoding choose its own tokens, with dense decoding's random numbers."""
    # The prompt without its last token is cached already.
    start = Generation([], replace(teacher.cache, length=len(teacher.prompt) - 1))
    sampling, own = Sampling(options.temperature), torch.Generator().manual_seed(options.seed)
    request = [teacher.prompt[-1:]], options.n_tokens, config, sampling
    return generate(model, *request, generators=[own], resume=start)[0].tokens


def run_all(
    jobs: Mapping[str, Callable[[], Any]], device: torch.device
) -> Iterator[tuple[str, Any]]:
    """Yield the results of jobs; on a Linux CPU they run at once, in processes of their own.

    Threads would not do: a step is hundreds of small operations, and Python's lock makes them wait
    for each other.
    """
    if device.type != "cpu" or sys.platform != "linux":
        yield from ((name, job()) for name, job in jobs.items())
        return

    context = multiprocessing.get_context("fork")  # children begin with model and teacher in memory
    running: dict[Connection, str] = {}
    for name, job in jobs.items():
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=_send, args=(sender, job), daemon=True).start()
        sender.close()  # the child has its own; once that is closed, reading ends with an EOFError
        running[receiver] = name
    while running:
        for receiver in wait(list(running)):
            name = running.pop(receiver)
            try:
                result = receiver.recv()
            except EOFError:
                ended = f"{name}: its process ended early, perhaps out of memory"
                raise ChildProcessError(ended) from None
            yield name, result


def _send(sender: Connection, job: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends its children
    sender.send(job())


def all_rows(teacher: Teacher, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Put dense decoding first, and split every loss into step error and drift."""
    zeros = dict.fromkeys(("kl", "mean_drift", "largest_drift"), 0.0)
    ones = dict.fromkeys(("agreement", "read_ratio", "cost_model"), 1.0)
    read = {"after_rectification": None, "bytes_per_token": teacher.bytes_per_token}
    step_error = rows["decode-only"]["kl"]  # its cache is exact
    split = {"dense": zeros | ones | read | {"step_error": 0.0, "drift_loss": 0.0}}
    for name, row in rows.items():
        split[name] = {**row, "step_error": step_error, "drift_loss": row["kl"] - step_error}
    return split


def tables(rows: Mapping[str, Row]) -> Iterator[Table]:
    """Make a table of what each way of decoding loses, and one of how its cache drifts."""
    for title, columns in TABLES.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("decoding", no_wrap=True)
        for head, _, _ in columns:
            table.add_column(head, justify="right", no_wrap=True)
        for name, row in rows.items():
            row = {**row, "mib_per_token": row["bytes_per_token"] / 2**20}
            values = [(row[key], form) for _, key, form in columns]
            cells = ["–" if value is None else form.format(value) for value, form in values]
            table.add_row(name, *cells)
        yield table


def verdict(rows: Mapping[str, Row]) -> str:
    """Say what the numbers mean, in a sentence or two."""
    kl, step_error = rows["sparse"]["kl"], rows["sparse"]["step_error"]
    if kl <= step_error:
        return (
            "On these few tokens sparse decoding lost no more than decode-only, which pays for"
            " reading a part of the cache over an exact one: no loss to drift is seen here. Drift"
            f" is what rectification repairs: {DRIFT}"
        )
    return (
        f"Of what sparse decoding loses here, {step_error / kl:.0%} is step error: the price of"
        " reading a part of the cache, which rectification does not touch (decode-only pays it over"
        f" an exact cache). What it repairs is drift: {DRIFT}"
    )


def side_by_side(texts: Mapping[str, Sequence[int]], tokenizer: tiktoken.Encoding) -> Table:
    """The first lines of each continuation. What differs from dense decoding's is coloured."""

    def first_lines(tokens: Sequence[int]) -> str:
        return "\n".join(tokenizer.decode(tokens).expandtabs(4).splitlines()[:SHOWN_LINES])

    title = "The file continued, each choosing its own tokens"
    table, cells = Table(title=title, title_justify="left", expand=True), []
    for name, tokens in texts.items():
        table.add_column(name, ratio=1, overflow="fold")
        pairs = enumerate(zip(tokens, texts["dense"], strict=True))
        same = next((index for index, (own, dense) in pairs if own != dense), len(tokens))
        whole, shared = first_lines(tokens), first_lines(tokens[:same])
        cells.append(Text(whole))
        cells[-1].stylize("bold yellow", min(len(shared), len(whole)))
    table.add_row(*cells)
    return table


def draw_figure(result: Mapping[str, Any], path: Path, subject: str) -> None:
    """Draw the mean drift of the cached generated tokens after each step, one line per interval."""
    from matplotlib.figure import Figure  # takes a second to import
    from PIL import Image

    curves = {name: curve for name, curve in result["curves"].items() if name != "decode-only"}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        label = f"rectified every {name.removeprefix('ReSA f=')} tokens"
        look = {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.4}
        look["label"] = "sparse, never rectified" if name == "sparse" else label
        axes.plot(range(1, len(curve) + 1), curve, **look)

    axes.set(xlabel="tokens generated", ylabel="mean KV drift of the generated tokens")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(map(len, curves.values())))
    axes.set_title(f"Drift of the cache while {subject} is continued", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    kind = path.suffix.lstrip(".")
    figure.savefig(buffer, format=kind, dpi=110)
    if kind == "png":  # a palette of 64 colours looks the same and is a third as large
        picture = Image.open(buffer).convert("RGB").quantize(64)
        picture.save(buffer := io.BytesIO(), format=kind, optimize=True)
    write_atomically(path, buffer.getvalue())
