"""`resa demo`: watch on a real file what sparse decoding loses and what rectification repairs.

Dense, sparse and rectified decoding each continue a held-out file of the standard library. All ways
of decoding are then led along the tokens that dense decoding wrote. The table splits what each
loses into step error and drift; the figure shows how drift builds up and is wiped.
`lab/fidelity.py` does the measuring, for all steps at once.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..generate import Generation, generate, prefill
from ..lab.corpus import held_out_library
from ..lab.fidelity import compare, decoding_variants, read, read_ratio
from ..model import GPT
from ..sampling import Sampling
from ..weights.tokenizer import load_tokenizer
from . import main as cli

DEMO_MODULE = "plistlib"  # held out of training, 8,000 tokens, in every Python since 2.6
SHOWN_LINES = 16
LEGEND = (
    "sparse: every token reads selected blocks alone. ReSA f=N: the same, and every N tokens a"
    " dense pass rectifies the cache. decode-only: rectified after every token, so that the cache"
    " is exact. KL: distance of the next-token distribution from dense decoding's. Step error: the"
    " price of reading a part of the cache; decode-only pays it too. Drift: the errors that sparse"
    " steps leave in the cache for all later steps to read, relative to the norm of keys and"
    " values; this is what rectification repairs. Read: the share of dense decoding's bytes by the"
    " cost model (eq. 6), where it holds.\n"
)
# Okabe and Ito's palette: colour-blind readers can tell them apart, on light and dark ground.
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7")
COLUMNS = (  # heading, key in a row, format
    ("KL\n(nats)", "kl", "{:.4f}"),
    ("= step\nerror", "step_error", "{:.4f}"),
    ("+ drift", "drift_loss", "{:+.4f}"),
    ("same top\ntoken", "agreement", "{:.1%}"),
    ("mean\ndrift", "mean_drift", "{:.2g}"),
    ("read, of\ndense", "read_ratio", "{:.3f}"),
)
Row = dict[str, Any]  # what one way of decoding loses, how far its cache drifts, what it reads


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
    parser.option("--seed", 0, "seed of the random numbers", type=cli.seed)
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
    require_integer("--tokens", options.tokens, 1)
    require_integer("--prompt-tokens", options.prompt_tokens, 2)
    config, sampling = cli.sparsity(options), Sampling(options.temperature)
    variants, backend = decoding_variants(config, options.intervals), cli.chosen_backend(options)
    tokenizer = load_tokenizer()
    model = cli.load(options).with_ops(options.backends[backend].operations())
    if options.prompt_file is None:
        subject, text = demo_prompt()
    else:
        subject, text = options.prompt_file.name, cli.read_text(options.prompt_file)
    prompt = tokenizer.encode_ordinary(text)[: options.prompt_tokens]
    n_prompt, context = len(prompt), model.config.context
    require(n_prompt >= 2, "--prompt-file", f"{n_prompt} tokens", "a text of at least 2 tokens")
    length = n_prompt + options.tokens
    require(length <= context, "--prompt-tokens + --tokens", length, f"≤ {context}")
    cli.writable("--figure", options.figure)

    # Decode. Steps of one token are too small to be worth sharing among threads.
    console = Console(quiet=options.json, highlight=False)
    work = f"{n_prompt:,} tokens read, {options.tokens} to write"
    console.print(f"Continuing {subject}: {work}, on {options.device} (backend {backend}).")
    torch.set_num_threads(1)
    started = time.perf_counter()
    texts, rows, curves = run_demo(model, prompt, options.tokens, variants, sampling, options.seed)
    seconds = round(time.perf_counter() - started, 1)

    # Show.
    console.print(side_by_side(texts, tokenizer))
    console.print(LEGEND)
    console.print(loss_table(rows))
    draw_figure(curves, options.figure, subject.split(" (")[0])
    console.print(f"The figure is {options.figure}; all this took {seconds} s.")
    if options.json:
        asked = {name: getattr(options, name) for name in ("intervals", "temperature", "seed")}
        result = {"prompt_tokens": n_prompt, "tokens": options.tokens, **asked}
        result |= {"config": asdict(config), "rows": rows, "seconds": seconds}
        result["curves"] = {name: [round(x, 4) for x in curve] for name, curve in curves.items()}
        about = {"subject": subject, "figure": str(options.figure), "backend": backend}
        cli.report(cli.six_digits({**result, **about, **cli.provenance(options)}))


def run_demo(
    model: GPT,
    prompt: Sequence[int],
    n_tokens: int,
    variants: Mapping[str, ReSAConfig],
    sampling: Sampling,
    seed: int,
) -> tuple[dict[str, list[int]], dict[str, Row], dict[str, list[float]]]:
    """Decode in every way → the tokens that three of them write; for all of them what they lose
    along dense decoding's tokens, and the mean drift of the generated tokens after each step.
    """
    with Console(stderr=True).status(f"Reading {len(prompt):,} tokens …") as status:
        # Three ways write, from one prefill and with the same random numbers.
        sparse = variants["sparse"]
        cache = model.new_cache(len(prompt) - 1, sparse.block_size)
        prefill(model, prompt[:-1], cache)
        ways = {"dense": replace(sparse, interval=1, schedule="fused"), "sparse": sparse}
        rectified = [name for name in variants if name.startswith("ReSA")]
        shown = "ReSA f=32" if "ReSA f=32" in rectified else rectified[0]
        ways[shown] = variants[shown]
        texts = {}
        for name, way in ways.items():
            status.update(f"Writing {n_tokens} tokens: {name} …")
            start, own = Generation([], cache), [torch.Generator().manual_seed(seed)]
            request = [prompt[-1:]], n_tokens, way, sampling
            texts[name] = generate(model, *request, generators=own, resume=start)[0].tokens

        # Every way is led along the tokens that dense decoding wrote.
        status.update("Comparing with dense decoding …")
        reading = read(model, [*prompt, *texts["dense"]], len(prompt))
        found = {name: compare(model, reading, config) for name, config in variants.items()}

    step_error = float(found["decode-only"]["kl"].mean())  # its cache is exact
    rows, n_blocks = {}, len(prompt) / sparse.block_size
    for name, way in found.items():
        config, kl = variants[name], float(way["kl"].mean())
        is_modelled = config.active_ratio * n_blocks >= config.min_blocks
        rows[name] = {
            "kl": kl,
            "step_error": step_error,
            "drift_loss": kl - step_error,
            "agreement": float(way["agreement"].mean()),
            "mean_drift": float(way["mean_drift"].mean()),
            "read_ratio": read_ratio(config) if is_modelled else None,
        }
    return texts, rows, {name: way["mean_drift"].tolist() for name, way in found.items()}


def loss_table(rows: Mapping[str, Row]) -> Table:
    """Make the table of what each way of decoding loses and reads."""
    title = "Against dense decoding, on the same tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("decoding", no_wrap=True)
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        values = [(row[key], form) for _, key, form in COLUMNS]
        cells = ["–" if value is None else form.format(value) for value, form in values]
        table.add_row(name, *cells)
    return table


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


def draw_figure(curves: Mapping[str, Sequence[float]], path: Path, subject: str) -> None:
    """Draw the mean drift of the cached generated tokens after each step, one line per interval."""
    from matplotlib.figure import Figure  # takes a second to import
    from PIL import Image

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    drawn = {name: curve for name, curve in curves.items() if name != "decode-only"}  # it is zero
    for index, (name, curve) in enumerate(drawn.items()):
        label = f"rectified every {name.removeprefix('ReSA f=')} tokens"
        look = {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.4}
        look["label"] = "sparse, never rectified" if name == "sparse" else label
        axes.plot(range(1, len(curve) + 1), curve, **look)

    axes.set(xlabel="tokens generated", ylabel="mean KV drift of the generated tokens")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(map(len, drawn.values())))
    axes.set_title(f"Drift of the cache while {subject} is continued", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    if path.suffix.lower() == ".png":  # a palette of 64 colours looks alike and is a third as large
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
