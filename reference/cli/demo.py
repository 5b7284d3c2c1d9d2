"""`resa demo`: watch on real text what sparse decoding loses and what rectification repairs.

Dense, sparse and rectified decoding each continue a text. Then all ways of decoding are led along
other texts, and the table splits what each loses into step error and drift. The figure shows the
loss as it builds up. `lab/fidelity.py` does the measuring, for all steps at once. A model that
carries values shows its programs instead (`demo_carried.py`).
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ..blocks import active_blocks
from ..checks import require, require_integer
from ..config import ReSAConfig
from ..generate import Generation, generate, prefill
from ..lab.corpus import read_documents
from ..lab.fidelity import decoding_variants, measure_fidelity
from ..model import GPT
from ..sampling import Sampling
from ..weights.models import SHIPPED, Tokenizer, find_model
from . import main as cli
from .demo_carried import demo_carried
from .generate import newest_tokens
from .threads import set_free_threads

N_TEXTS, READ, GIVEN = 6, 1024, 256  # texts that losses are measured on; tokens read, then decoded
MIN_BLOCKS = 4  # less than a tenth of the blocks of READ tokens
SHOWN_LINES = 16
# Okabe and Ito's palette: colour-blind readers can tell them apart, on light and dark ground.
COLOURS = ("#D55E00", "#009E73", "#0072B2", "#E69F00", "#CC79A7")
Row = dict[str, Any]  # one way of decoding, as `measure_fidelity` returns it


def add_demo(commands: cli.Commands) -> cli.Parser:
    """Add the command."""
    parser = cli.add_command(commands, "demo", demo)
    text = "continue this file (default: the library's own text)"
    parser.option("--prompt-file", None, text, type=Path)
    parser.option("--prompt-tokens", 2048, "length of the prompt: the file's last tokens")
    parser.option("--tokens", 256, "how many tokens to write")
    parser.option("--intervals", [8, 32], "tokens per rectification")
    parser.option("--temperature", 0.5, "0 takes the most likely token")
    parser.option("--seed", 0, "seed of the random numbers", type=cli.seed)
    parser.option("--figure", Path("out/demo.png"), "where to draw the figure")
    parser.option("--json", False, "print one JSON object instead of text")
    # Under "paper" no token is decoded densely: in every row the loss is step error + drift.
    cli.add_sparsity(parser, schedule="paper")
    parser.set_defaults(min_blocks=MIN_BLOCKS)
    cli.add_model(parser)
    parser.set_defaults(model=None)
    return parser


def demo(options: argparse.Namespace) -> None:
    """Continue real text with dense, sparse and rectified decoding. Prints what each writes, and a
    table of what each loses along other texts: step error, drift, and how much of the drift is
    repaired. The model is smollm2 where `make real` has installed it, else the shipped one.
    `--model carrying` shows programs and which of their values each way gets right.
    """
    # Refuse what is wrong before anything is decoded.
    is_picture = options.figure.suffix.lower() in (".png", ".svg", ".pdf")
    require(is_picture, "--figure", options.figure, "a name ending in .png, .svg or .pdf")
    require_integer("--tokens", options.tokens, 1)
    require_integer("--prompt-tokens", options.prompt_tokens, 2)
    config, sampling = cli.sparsity(options), Sampling(options.temperature)
    variants, backend = decoding_variants(config, options.intervals), cli.chosen_backend(options)
    if options.model is None:
        options.model = default_model()
    text = None if options.prompt_file is None else cli.read_text(options.prompt_file)
    is_carrying = options.model == "carrying"
    allowed = "a model that writes text: carrying shows programs of its own"
    require(text is None or not is_carrying, "--prompt-file", options.prompt_file, allowed)
    loaded, console = cli.load(options), Console(quiet=options.json, highlight=False)
    if is_carrying:
        scores = demo_carried(loaded, config, options.intervals, console)
        if options.json:
            cli.report(cli.rounded({**scores, **cli.provenance(options)}))
        return

    # The text to continue, and others on which losses are measured.
    tokenizer, context = loaded.tokenizer, loaded.model.config.context
    given = min(GIVEN, context // 4)
    read = min(READ, context - given)
    subject, prompt, documents = choose_texts(options, text, tokenizer, read + given)
    require(len(prompt) >= 2, "--prompt-file", f"{len(prompt)} tokens", "at least 2 tokens")
    total = len(prompt) + options.tokens
    require(total <= context, "--prompt-tokens + --tokens", total, f"≤ {context}")
    cli.writable("--figure", options.figure)

    # Write. Where all ways are dense decoding, one of them is enough.
    started, model = time.perf_counter(), loaded.model
    model = model.with_ops(options.backends[backend].operations())
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    work = f"{len(prompt):,} tokens read, {options.tokens} to write"
    where = f"{options.device} (backend {backend})"
    console.print(f"{options.model}, {weights:.0f} million weights, continues {subject}: {work}.")
    console.print(f"Decoding on {where}. {what_is_read(config, total)}\n")
    ways = {"dense": replace(config, interval=1, schedule="fused")}
    if n_read(config, total) < n_blocks(config, total):
        shown = f"ReSA f={32 if 32 in options.intervals else max(options.intervals)}"
        ways |= {name: variants[name] for name in ("sparse", shown)}
    written = write_texts(model, prompt, options.tokens, ways, sampling, options.seed)
    console.print(side_by_side(written, tokenizer))
    console.print("One text proves nothing, so we measure on given texts what each way loses.")

    # Measure. All tokens of a text go through the model at once.
    set_free_threads()
    texts = f"{N_TEXTS} other texts: the first {read:,} tokens of each are the prompt"
    console.print(f"{texts}, the next {given} are given one by one, whatever a way predicts.")
    console.print(what_is_read(config, read + given))
    rows: list[Row] = []
    if n_read(config, read + given) < n_blocks(config, read + given):
        one = {"ratios": [config.active_ratio], "block_sizes": [config.block_size]}
        result = measure_fidelity(
            model, documents, given, config, intervals=options.intervals, **one
        )
        rows = result["rows"]
        console.print(loss_table(rows))
        console.print("decode-only: with a cache that is repaired after every token.")
        note = "In brackets: 95% confidence intervals. Over only six texts they are too narrow,"
        console.print(f"{note} and hold the true mean in about 85 of 100 cases.\n")
        console.print("\n".join(verdict(rows)))
        title = f"{options.model}, {N_TEXTS} texts, p = {config.active_ratio:g}"
        draw_figure(rows, given, options.figure, title)
    seconds = round(time.perf_counter() - started, 1)
    drawn = f" The figure is {options.figure}." if rows else ""
    console.print(f"\nAll this took {seconds} s.{drawn}")
    if options.json:
        asked = {name: getattr(options, name) for name in ("intervals", "temperature", "seed")}
        amounts = {"prompt_tokens": len(prompt), "tokens": options.tokens, "texts": N_TEXTS}
        amounts |= {"read": read, "given": given, "config": asdict(config), **asked}
        texts = {name: tokenizer.decode(tokens) for name, tokens in written.items()}
        found = {"rows": rows, "verdict": verdict(rows), "written": texts}
        about = {"subject": subject, "backend": backend, "seconds": seconds}
        cli.report(cli.rounded({**amounts, **found, **about, **cli.provenance(options)}))


def choose_texts(
    options: argparse.Namespace, text: str | None, tokenizer: Tokenizer, length: int
) -> tuple[str, list[int], list[list[int]]]:
    """Choose what is continued → its name and its tokens, and other documents of `length` tokens.

    `text` is the user's; without one, the library's text comes first.
    """
    kind, n_prompt = "code" if options.model in SHIPPED else "english", options.prompt_tokens
    if text is not None:
        prompt = newest_tokens(tokenizer, text, n_prompt)
        return options.prompt_file.name, prompt, read_documents(kind, tokenizer, N_TEXTS, length)
    n_pieces = -(-n_prompt // length)
    pieces = read_documents(kind, tokenizer, n_pieces + N_TEXTS, length)
    subject = "held-out modules of Python's library" if kind == "code" else "Python's own help"
    return subject, [*chain(*pieces[:n_pieces])][:n_prompt], pieces[n_pieces:]


def default_model() -> str:
    """Name the real model where it is installed, else the shipped one, and say so."""
    try:
        find_model("smollm2")
    except FileNotFoundError as error:
        print(f"{error}. The shipped model runs instead, a toy.", file=sys.stderr)
        return "code"
    return "smollm2"


def n_blocks(config: ReSAConfig, n_tokens: int) -> int:
    """Blocks of a cache."""
    return -(-n_tokens // config.block_size)


def n_read(config: ReSAConfig, n_tokens: int) -> int:
    """Blocks of a cache that a sparse step reads."""
    return int(active_blocks(torch.tensor([n_tokens], device="cpu"), config))


def what_is_read(config: ReSAConfig, n_tokens: int) -> str:
    """Say how much of a cache a sparse step reads, and what to change if that is all."""
    read, there, least = n_read(config, n_tokens), n_blocks(config, n_tokens), config.min_blocks
    size = f"{there} blocks of {config.block_size} tokens"
    if read < there:
        said = f"At the end a sparse step reads {read} of {size}."
        return f"{said} It never reads fewer than {least}."
    return (
        f"There are {size}, and with these settings a step reads all of them: all ways are dense"
        " decoding. Give a longer text, or lower --min-blocks or --active-ratio."
    )


def write_texts(
    model: GPT,
    prompt: Sequence[int],
    n_tokens: int,
    ways: Mapping[str, ReSAConfig],
    sampling: Sampling,
    seed: int,
) -> dict[str, list[int]]:
    """Continue a prompt in every way, from one prefill and with the same random numbers."""
    texts = {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("Reading the prompt", total=n_tokens * len(ways))
        config = next(iter(ways.values()))
        cache = model.new_cache(len(prompt) - 1, config.block_size)
        prefill(model, prompt[:-1], cache)
        for name, way in ways.items():
            progress.update(bar, description=f"Writing: {name}")
            texts[name] = generate(
                model,
                [prompt[-1:]],
                n_tokens,
                way,
                sampling,
                generators=[torch.Generator().manual_seed(seed)],
                on_token=lambda *_: progress.advance(bar),
                resume=Generation([], cache),
            )[0].tokens
    return texts


def side_by_side(texts: Mapping[str, Sequence[int]], tokenizer: Tokenizer) -> Table:
    """The first lines of each continuation. What differs from dense decoding's is coloured."""

    def first_lines(tokens: Sequence[int]) -> str:
        return "\n".join(tokenizer.decode(tokens).expandtabs(4).splitlines()[:SHOWN_LINES])

    title = "What each way writes. All after the first difference from dense decoding is coloured."
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


def loss_table(rows: Sequence[Row]) -> Table:
    """Make the table of what each way of decoding loses."""
    title = "Loss per token: KL divergence from dense decoding, in nats"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("decoding", no_wrap=True)
    for heading in ("lost", "= step\nerror", "+ drift", "drift\nrepaired", "same\ntoken"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        repaired = "–"
        if is_share(row, rows):
            repaired = f"{percent(row['recovered'])}"
            repaired += f" [{', '.join(map(percent, row['recovered_95']))}]"
        low, high = row["drift_95"]
        is_exact = row["way"] == "decode-only"
        drift = "0" if is_exact else f"{row['drift']:.3f} [{low:.3f}, {high:.3f}]"
        parts = f"{row['kl']:.3f}", f"{row['step_error']:.3f}", drift, repaired
        table.add_row(row["way"], *parts, percent(row["agreement"]))
    return table


def is_share(row: Row, rows: Sequence[Row]) -> bool:
    """Tell whether a row repairs a share of something: never rectifying must drift visibly."""
    has_share = row["recovered"] is not None and None not in row["recovered_95"]
    return has_share and all(each["drift_95"][0] > 0 for each in rows if each["way"] == "sparse")


def percent(share: float) -> str:
    """Write a share as whole per cent."""
    return f"{share:.0%}"


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say in words what the table shows, and which differences cannot be distinguished."""
    by_name = {row["way"]: row for row in rows}
    if not rows:
        return []
    sparse, exact = by_name["sparse"], by_name["decode-only"]
    said = [
        f"Sparse decoding loses {sparse['kl']:.3f} nats a token: {sparse['step_error']:.3f} because"
        f" it does not read all blocks (step error), {sparse['drift']:.3f} because its errors stay"
        " in the cache (drift)."
    ]
    if sparse["drift_95"][0] <= 0:
        said.append("So few texts cannot tell this drift from zero.")
    for row in rows:
        if not row["way"].startswith("ReSA"):
            continue
        every = f"Rectifying every {row['way'].removeprefix('ReSA f=')} tokens"
        if row["gain_95"][0] > 0:
            share = f", {percent(row['recovered'])} of the drift" if is_share(row, rows) else ""
            said.append(f"{every} repairs {row['gain']:.3f}{share}.")
        else:
            said.append(f"{every} cannot be distinguished from never rectifying here.")
    said.append(
        f"Rectification cannot repair step error. With a cache that is repaired after every token"
        f" (decode-only), sparse decoding still loses {exact['kl']:.3f}: a step cannot use a block"
        " that it does not read."
    )
    return said


def draw_figure(rows: Sequence[Row], n_tokens: int, path: Path, title: str) -> None:
    """Draw the loss as it builds up along the texts, a line per way, and its two parts as bars."""
    from matplotlib.figure import Figure  # takes a second to import
    from PIL import Image

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {row["way"]: COLOURS[index % len(COLOURS)] for index, row in enumerate(rows)}
    for row in rows:
        starts = [*row["by_position"]["from"], n_tokens]
        lost = [0.0]
        for (start, end), mean in zip(pairwise(starts), row["by_position"]["kl"], strict=True):
            lost.append(lost[-1] + (end - start) * mean)
        left.plot(starts, lost, color=colours[row["way"]], label=row["way"], linewidth=1.6)
    left.set(xlabel="tokens decoded", ylabel="nats lost so far, mean of the texts")
    left.set_xlim(0, n_tokens)
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=9)

    names = [row["way"] for row in rows]
    steps, drifts = ([row[part] for row in rows] for part in ("step_error", "drift"))
    right.barh(names, steps, color="0.7", label="step error: blocks not read")
    right.barh(names, drifts, left=steps, color=[colours[n] for n in names], label="drift")
    right.invert_yaxis()
    right.set(xlabel="nats lost per token")
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title(title, fontsize=11)
    figure.savefig(path, dpi=110)
    if path.suffix.lower() == ".png":  # a palette of 64 colours looks alike and is a third as large
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
