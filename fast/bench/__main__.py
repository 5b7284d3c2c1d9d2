"""`python -m resa.fast.bench`: time one layer's attention for batches and contexts, into a JSON file."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from resa.reference.checks import require
from resa.reference.config import ReSAConfig
from resa.reference.files import write_atomically

from .layer import Shape, floors, measure
from .timing import copy_bandwidth

CONTEXTS = [1024 * 2**power for power in range(9)]
BATCHES = [1, 2, 4, 8, 16]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(prog="python -m resa.fast.bench", description=__doc__)
    whole = "a list of whole numbers"
    arguments.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="TOKENS", help=whole)
    arguments.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="SEQUENCES", help=whole)
    arguments.add_argument("--query-heads", type=int, default=28)
    arguments.add_argument("--kv-heads", type=int, default=4)
    arguments.add_argument("--head-dim", type=int, default=128)
    arguments.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    arguments.add_argument("--block-size", type=int, default=16)
    arguments.add_argument("--active-ratio", type=float, default=0.1)
    arguments.add_argument("--interval", type=int, default=32, help="f, tokens per rectification")
    arguments.add_argument("--out", type=Path, default=Path("docs/results/attention.json"), help="file to write")
    arguments.add_argument("--commit", help="the revision measured; by default git is asked")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure what the arguments ask for; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        require(torch.cuda.is_available(), "device", "no NVIDIA GPU", "a machine with one")
        require(arguments.interval > 1, "--interval", arguments.interval, "2 or more, to have sparse steps at all")
        require(min(arguments.contexts) > arguments.interval, "--contexts", min(arguments.contexts), "> --interval")
        config = ReSAConfig(
            block_size=arguments.block_size, active_ratio=arguments.active_ratio, interval=arguments.interval
        )
        shape = Shape(arguments.query_heads, arguments.kv_heads, arguments.head_dim, arguments.dtype)
        result = run(shape, config, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result)
    print(f"written to {arguments.out}")
    return 0


def run(shape: Shape, config: ReSAConfig, arguments: argparse.Namespace) -> dict[str, object]:
    """All rows, written to the file after each, so that an interruption loses one row at most."""
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": arguments.commit or revision(),
        "command": command(arguments),
        "shape": asdict(shape),
        "config": asdict(config),
        "copy_tbs": copy_bandwidth(),
        "rows": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    points = [(batch, context) for context in sorted(arguments.contexts) for batch in sorted(arguments.batches)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("layer attention", total=sum(batch * context for batch, context in points))
        for batch, context in points:
            progress.update(task, description=f"{batch} × {context:,} tokens")
            row = measure(shape, config, batch, context)
            row["floor_us"] = {
                part: round(size / result["copy_tbs"] / 1e6, 3)
                for part, size in floors(shape, config, batch, context).items()
            }
            result["rows"].append(row)
            write_atomically(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
            progress.advance(task, batch * context)
            torch.cuda.empty_cache()
    return result


def command(arguments: argparse.Namespace) -> str:
    """The command that measures the same again: what differs from the defaults, but for where the result goes."""
    words = ["python -m resa.fast.bench"]
    for name, default in vars(parser().parse_args([])).items():
        value = getattr(arguments, name)
        if value != default and name not in ("out", "commit"):
            values = map(str, value if isinstance(value, list) else [value])
            words.append(f"--{name.replace('_', '-')} {' '.join(values)}")
    return " ".join(words)


def revision() -> str:
    """The commit of the working tree, "unknown" where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(result: dict[str, object]) -> None:
    """The rows as a table in the terminal: µs per layer and token, and the share of the floor that bytes set."""
    table = Table(title=f"{result['device']}, copy {result['copy_tbs']} TB/s; µs, share of the floor set by bytes")
    interval = result["config"]["interval"]
    parts = {"append": 1, "score": 1, "select": 1, "attend": 1, "rectify": interval}
    for name in ("batch", "context", *parts, "ReSA, sum", "ReSA, cycle", "dense", "ratio"):
        table.add_column(f"{name} ÷ {interval}" if name == "rectify" else name, justify="right")
    for row in result["rows"]:
        cells = []
        for part, spread_over in parts.items():
            us, floor = row["parts"][part]["us"], row["floor_us"].get(part)
            cells.append(f"{us / spread_over:.1f}" + (f" {floor / us:.0%}" if floor else ""))
        totals = [f"{row[name]:.1f}" for name in ("sum_us", "resa_us", "dense_us")]
        table.add_row(str(row["batch"]), f"{row['context']:,}", *cells, *totals, f"{row['ratio']:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
