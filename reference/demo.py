"""What rectification repairs, watched on a real file: `resa demo`.

A held-out standard-library file is continued densely; then sparse, rectified and decode-only decoding are led along
those same tokens, two of them beside a copy that chooses its own. The table splits what each loses into step error and
drift; the figure shows the drift building up and being wiped. `evals/fidelity.py` does the measuring.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path

import tiktoken
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .checks import is_integer, require
from .config import ReSAConfig
from .corpus import held_out_library
from .evals.fidelity import Comparison, Teacher, decoding_variants, follow, read_ratio, teach
from .files import write_atomically
from .model import GPT

DEMO_MODULE = "plistlib"  # held out of training, 8,000 tokens long, and part of every Python since 2.6
SHOWN_LINES = 16
LEGEND = (
    "sparse: every token reads selected blocks alone. ReSA f=N: the same, and every N tokens a dense pass rectifies "
    "the cache. decode-only: rectified after every token, so that the cache is exact. KL: distance of the next-token "
    "distribution from dense decoding's. Drift: how far cached keys and values are off, relative to their norm. Cost "
    "model: eq. 6, where it holds. Other intervals: --intervals 4 16 64, or make demo ARGS='--intervals 4 16 64'.\n"
)


@dataclass(frozen=True)
class DemoOptions:
    """What to decode, and how long."""

    n_tokens: int = 512
    intervals: tuple[int, ...] = (8, 32, 128)
    temperature: float = 0.5
    seed: int = 0
    # Every token of the paper's schedule is decoded sparsely, so that the loss of all rows splits alike.
    config: ReSAConfig = field(default_factory=lambda: ReSAConfig(schedule="paper"))

    def __post_init__(self) -> None:
        require(is_integer(self.n_tokens, 2), "tokens", self.n_tokens, "an integer ≥ 2")
        fits = len(self.intervals) > 0 and all(is_integer(f, 1) for f in self.intervals)
        require(fits, "intervals", self.intervals, "integers ≥ 1, at least one")
        is_number = isinstance(self.temperature, (int, float)) and 0 <= self.temperature < float("inf")
        require(is_number, "temperature", self.temperature, "a finite number ≥ 0")


def demo_prompt() -> tuple[str, str]:
    """Name and text of the file that is continued where none is given."""
    for document in held_out_library():
        if document.name == DEMO_MODULE:
            return f"the standard library's {DEMO_MODULE}.py (held out of training)", document.text
    raise FileNotFoundError(f"prompt file: this Python has no source of {DEMO_MODULE}; name another file")


def run_demo(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompt: Sequence[int],
    options: DemoOptions,
    console: Console,
) -> dict[str, object]:
    """Decode, printing as it goes; returns all that was measured, JSON-ready."""
    started = time.perf_counter()
    variants = decoding_variants(options.config, options.intervals)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Console(stderr=True, highlight=False)
    with Progress(*columns, console=progress, transient=True) as bar, one_torch_thread():

        def counter(name: str) -> Callable[..., None]:
            task = bar.add_task(name, total=options.n_tokens)
            return lambda *_: bar.advance(task)

        teacher = teach(
            model,
            [prompt],
            options.n_tokens,
            options.config,
            temperature=options.temperature,
            seed=options.seed,
            on_token=counter("dense"),
        )
        bar.console.print(f"{_elapsed(started)} dense        wrote the tokens that all others are compared on")
        found = {}
        for name, comparison in follow_all(model, teacher, variants, counter):
            found[name] = comparison
            loss, alike = float(comparison.kl.mean()), float(comparison.agreement.float().mean())
            bar.console.print(
                f"{_elapsed(started)} {name:<12} KL from dense {loss:.4f} nats, same top token {alike:.1%}"
            )
    found = {name: found[name] for name in variants}
    rows = summarise(teacher, variants, found)
    beside = side_by_side(teacher, found, tokenizer)
    for part in (beside, LEGEND, loss_table(rows), cache_table(rows), verdict(rows)):
        console.print(part)
    return {
        "prompt_tokens": len(prompt),
        "options": asdict(options),
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "curves": {name: comparison.mean_drift[0].tolist() for name, comparison in found.items()},
    }


def follow_all(
    model: GPT, teacher: Teacher, variants: dict[str, ReSAConfig], counter: Callable[[str], Callable[..., None]]
) -> Iterator[tuple[str, Comparison]]:
    """Each variant's comparison as it is done; on a Linux CPU all run side by side, in processes of their own.

    Threads would not do: a step is hundreds of small operations, and Python's lock makes them wait for each other.
    """
    advance, shown = {name: counter(name) for name in variants}, shown_beside(variants)
    if teacher.cache.keys.device.type != "cpu" or sys.platform != "linux":
        for name, config in variants.items():
            yield name, follow(model, teacher, config, own_choice=name in shown, on_step=advance[name])
        return
    context = multiprocessing.get_context("fork")  # the children begin with the model and the teacher in memory
    running: dict[Connection, str] = {}
    for name, config in variants.items():
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, model, teacher, config, name in shown)
        context.Process(target=_follow_and_send, args=arguments, daemon=True).start()
        sender.close()  # the child has its own: once that is closed, reading ends with an EOFError
        running[receiver] = name
    while running:
        for receiver in wait(list(running)):
            try:
                message = receiver.recv()
            except EOFError:
                raise ChildProcessError(
                    f"{running[receiver]}: its process ended early, perhaps out of memory"
                ) from None
            if message is None:
                advance[running[receiver]]()
            else:
                tensors = {key: torch.tensor(message[key]) for key in ("kl", "agreement", "mean_drift")}
                yield running.pop(receiver), Comparison(**{**message, **tensors})


def _follow_and_send(sender: Connection, model: GPT, teacher: Teacher, config: ReSAConfig, own_choice: bool) -> None:
    """`follow` in a child: None down the pipe for each step, at the end the comparison, its tensors as lists."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its children without a word
    found = follow(model, teacher, config, own_choice=own_choice, on_step=lambda _: sender.send(None))
    values = {entry.name: getattr(found, entry.name) for entry in fields(found)}
    sender.send({key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in values.items()})


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Steps of one token are too small to share among threads, and waiting for each other costs more than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _elapsed(started: float) -> str:
    return f"[{time.perf_counter() - started:5.1f} s]"


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two continuations share before they part.

    >>> common_prefix([5, 6, 7], [5, 6, 8])
    2
    """
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(first))


def summarise(
    teacher: Teacher, variants: dict[str, ReSAConfig], found: dict[str, Comparison]
) -> dict[str, dict[str, float | None]]:
    """One row of numbers per way of decoding, dense first."""
    step_error = float(found["decode-only"].kl.mean())
    rows: dict[str, dict[str, float | None]] = {
        "dense": {
            **dict.fromkeys(("kl", "step_error", "drift_loss", "mean_drift", "largest_drift"), 0.0),
            **dict.fromkeys(("agreement", "read_ratio", "cost_model"), 1.0),
            "after_rectification": None,
            "bytes_per_token": teacher.bytes_per_token,
        }
    }
    for name, comparison in found.items():
        kl = float(comparison.kl.mean())
        config, blocks = variants[name], int(teacher.opening.cache.lengths.min()) / variants[name].block_size
        is_modelled = config.active_ratio * blocks >= config.min_blocks  # below, min_blocks decides what is read
        rows[name] = {
            "kl": kl,
            "step_error": step_error,
            "drift_loss": kl - step_error,
            "agreement": float(comparison.agreement.float().mean()),
            "mean_drift": float(comparison.mean_drift.mean()),
            "largest_drift": comparison.largest_drift,
            "after_rectification": comparison.drift_after_rectification,
            "bytes_per_token": comparison.bytes_per_token,
            "read_ratio": comparison.bytes_per_token / teacher.bytes_per_token,
            "cost_model": read_ratio(variants[name]) if is_modelled else None,
        }
    return rows


def loss_table(rows: dict[str, dict[str, float | None]]) -> Table:
    """What each way of decoding loses, from the rows of `summarise`."""
    table = _table(
        "Against dense decoding, on the same tokens", "KL\n(nats)", "= step\nerror", "+ drift", "same top\ntoken"
    )
    for name, row in rows.items():
        split = (f"{row['kl']:.4f}", f"{row['step_error']:.4f}", f"{row['drift_loss']:+.4f}")
        table.add_row(name, *split, f"{row['agreement']:.1%}")
    return table


def cache_table(rows: dict[str, dict[str, float | None]]) -> Table:
    """How far each cache drifts and what is read of it, from the rows of `summarise`."""
    heads = (
        "mean\ndrift",
        "largest\ndrift",
        "right after\nrectifying",
        "MiB read\nper token",
        "of\ndense",
        "cost\nmodel",
    )
    table = _table("The KV cache", *heads)
    for name, row in rows.items():
        after = row["after_rectification"]
        table.add_row(
            name,
            f"{row['mean_drift']:.2g}",
            f"{row['largest_drift']:.2g}",
            "–" if after is None else f"{after:.1g}",
            f"{row['bytes_per_token'] / 2**20:.2f}",
            f"{row['read_ratio']:.3f}",
            "–" if row["cost_model"] is None else f"{row['cost_model']:.3f}",
        )
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("decoding", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def verdict(rows: dict[str, dict[str, float | None]]) -> str:
    """What the numbers say, in a sentence or two."""
    sparse = rows["sparse"]
    if sparse["kl"] <= sparse["step_error"]:
        return (
            "On these few tokens sparse decoding lost no more than decode-only, which pays for reading a part of the "
            "cache over an exact one: no loss to drift is seen here. Drift is what rectification repairs: the errors "
            "that sparse steps leave in the cache for all later steps to read."
        )
    share = sparse["step_error"] / sparse["kl"]
    return (
        f"Of what sparse decoding loses here, {share:.0%} is step error: the price of reading a part of the cache, "
        "which rectification does not touch (decode-only pays it over an exact cache). What it repairs is drift: "
        "the errors that sparse steps leave in the cache for all later steps to read."
    )


def shown_beside(names: Iterable[str]) -> tuple[str, str]:
    """The two ways whose own texts stand beside dense decoding's: sparse, and an interval of 32, or else the longest.

    >>> shown_beside(["sparse", "ReSA f=64", "ReSA f=8", "decode-only"])
    ('sparse', 'ReSA f=64')
    """
    rectified = [name for name in names if name.startswith("ReSA")]
    return "sparse", "ReSA f=32" if "ReSA f=32" in rectified else rectified[0]


def side_by_side(teacher: Teacher, found: dict[str, Comparison], tokenizer: tiktoken.Encoding) -> Table:
    """The first lines of each continuation, what differs from dense in colour."""
    table = Table(title="The file continued, each choosing its own tokens", title_justify="left", expand=True)
    dense = teacher.tokens[0]
    texts = {"dense": Text(_first_lines(tokenizer.decode(dense)))}
    for name in shown_beside(found):
        own = found[name].own_tokens
        same = common_prefix(dense, own)
        whole, shared = _first_lines(tokenizer.decode(own)), _first_lines(tokenizer.decode(own[:same]))
        text = Text(whole)
        text.stylize("bold yellow", min(len(shared), len(whole)))
        texts[name] = text
    for name in texts:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*texts.values())
    return table


def _first_lines(text: str) -> str:
    return "\n".join(text.expandtabs(4).splitlines()[:SHOWN_LINES])


def draw_figure(result: dict[str, object], path: Path, subject: str) -> None:
    """Mean drift of the cached generated tokens after each step, one line per interval; written as PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")  # no window, whatever machine this is
    from matplotlib import pyplot

    curves = {name: curve for name, curve in result["curves"].items() if name != "decode-only"}
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for index, (name, curve) in enumerate(curves.items()):
        label = "sparse, never rectified" if name == "sparse" else f"rectified every {name.split('=')[1]} tokens"
        axes.plot(range(1, len(curve) + 1), curve, color=COLOURS[index % len(COLOURS)], linewidth=1.4, label=label)
    axes.set(xlabel="tokens generated", ylabel="mean KV drift of the generated tokens")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(len(curve) for curve in curves.values()))
    axes.set_title(f"Drift of the cache while {subject} is continued", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=150)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


# Okabe and Ito's palette: told apart by colour-blind readers, and on light and dark ground.
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7")
