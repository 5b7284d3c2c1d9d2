"""`resa bench layer` and `resa bench e2e`: what they take, and their results as a JSON file and as a table.

Nothing here imports Triton before it measures, so that the command line has its help everywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from resa.reference.checks import require
from resa.reference.cli import add_command
from resa.reference.config import ReSAConfig
from resa.reference.files import write_atomically

Result = dict[str, object]


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the command `bench`."""
    text = "Time the Triton path on this GPU, dense attention by torch beside it."
    bench = commands.add_parser("bench", help=text, description=text).add_subparsers(required=True, metavar="WHAT")

    layer = add_command(bench, "layer", run_layer, "One layer's attention, part by part and in whole cycles.")
    _add_points(layer, [1024 * 2**power for power in range(9)], [1, 2, 4, 8, 16], "docs/results/attention.json")
    layer.add_argument("--query-heads", type=int, default=28, help="query heads")
    layer.add_argument("--kv-heads", type=int, default=4, help="key-value heads")
    layer.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    layer.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of everything")

    text = (
        "Whole decoding steps of a model of Qwen2.5-7B's shape, with random weights, from token to token. Dense, sparse"
    )
    text += " and rectified decoding; with a cache that all layers share, as the paper has it, and with true caches."
    e2e = add_command(bench, "e2e", run_e2e, text)
    _add_points(e2e, [1024 * 2**power for power in range(2, 9)], [1, 2, 4, 8], "docs/results/end_to_end.json")
    kinds = ("float16", "bfloat16", "int4")
    e2e.add_argument("--weights", choices=kinds, nargs="+", default=["float16", "int4"], help="kinds of weights")
    e2e.add_argument(
        "--true-contexts", type=int, nargs="*", default=[65_536, 262_144], metavar="TOKENS",
        help="contexts to measure at the largest batch whose true caches fit; none: skip that",
    )  # fmt: skip
    e2e.add_argument("--temperature", type=float, default=0.7, help="0 chooses the likeliest token")
    e2e.add_argument("--top-p", type=float, default=0.95, help="keep the likeliest tokens of this mass")


def _add_points(parser: argparse.ArgumentParser, contexts: list[int], batches: list[int], out: str) -> None:
    parser.add_argument("--contexts", type=int, nargs="*", default=contexts, metavar="TOKENS", help="cache lengths")
    parser.add_argument("--batches", type=int, nargs="+", default=batches, metavar="SEQUENCES", help="batch sizes")
    parser.add_argument("--block-size", type=int, default=16, help="tokens per block")
    parser.add_argument("--active-ratio", type=float, default=0.1, help="share of blocks attended")
    parser.add_argument("--interval", type=int, default=32, help="f, tokens per rectification")
    parser.add_argument("--out", type=Path, default=Path(out), help="file to write, after every row")
    parser.add_argument("--commit", default="asked of git", help="the revision measured")
    parser.set_defaults(points=parser)


def run_layer(options: argparse.Namespace) -> None:
    """`resa bench layer`."""
    config = _checked(options)
    from .layer import Shape, floors, measure

    shape = Shape(options.query_heads, options.kv_heads, options.head_dim, options.dtype)
    result = {**_provenance(options, "layer", config), "shape": asdict(shape), "rows": []}

    def row(point: tuple[int, int]) -> Result:
        batch, context = point
        bounds = floors(shape, config, batch, context).items()
        floor_us = {part: round(size / result["copy_tbs"] / 1e6, 3) for part, size in bounds}
        return measure(shape, config, batch, context) | {"floor_us": floor_us}

    points = {(b, n): f"{b} × {n:,} tokens" for n in sorted(options.contexts) for b in sorted(options.batches)}
    _measure_all(options.out, result, points, row, weigh=lambda point: point[0] * point[1])
    show_layer(result)
    print(f"written to {options.out}")


def run_e2e(options: argparse.Namespace) -> None:
    """`resa bench e2e`."""
    config = _checked(options)
    require(options.temperature >= 0, "--temperature", options.temperature, "a number ≥ 0")
    require(0 < options.top_p <= 1, "--top-p", options.top_p, "0 < top_p ≤ 1")
    from .e2e import QWEN_7B, Floors, Sampling, build, check, largest_batch, measure, measure_parts, weight_bytes

    has_library = find_spec("humming") is not None or "int4" not in options.weights
    require(has_library, "--weights", "int4, without humming-kernels", "pip install humming-kernels, or others")
    sampling = Sampling(options.temperature, options.top_p)
    memory = torch.cuda.get_device_properties(0).total_memory
    result = {**_provenance(options, "e2e", config), "memory_bytes": memory, "shape": asdict(QWEN_7B)}
    result |= {"sampling": asdict(sampling), "weights": {}, "rows": []}
    batches, contexts = sorted(options.batches), sorted(options.contexts)
    for weights in options.weights:
        model = build(weights)
        errors = {str(batch): check(model, config, batch) for batch in batches}
        parts = {str(batch): measure_parts(model, config, batch) for batch in batches}
        about = {"bytes": weight_bytes(model), "errors": errors, "parts": parts}
        result["weights"][weights] = about

        def row(point: tuple[int, int, bool], model: object = model, weights: str = weights) -> Result:
            batch, context, is_shared = point
            times = measure(model, config, batch, context, sampling, is_shared=is_shared)
            floors = Floors.of(model, config, batch, context).at(result["copy_tbs"])
            return {"weights": weights, **times, "floor_us": floors}

        points = {(b, n, True): f"{weights}, {b} × {n:,} tokens, shared cache" for n in contexts for b in batches}
        for n in sorted(options.true_contexts):
            largest = largest_batch(model, config, n)
            if largest >= 1:
                points[largest, n, False] = f"{weights}, {largest} × {n:,} tokens, true caches"
        _measure_all(options.out, result, points, row, weigh=lambda point: 20_000 + point[0] * point[1] // 50)
        del model, row
        torch.cuda.empty_cache()
    show_e2e(result)
    print(f"written to {options.out}")


def _checked(options: argparse.Namespace) -> ReSAConfig:
    """What is wrong with the arguments is said before anything is measured."""
    config = ReSAConfig(
        block_size=options.block_size, active_ratio=options.active_ratio, interval=options.interval
    )  # its own complaints first
    require(options.interval > 1, "--interval", options.interval, "2 or more, to have sparse steps at all")
    contexts = [*options.contexts, *getattr(options, "true_contexts", [])]
    require(len(contexts) > 0, "--contexts", "none", "at least one")
    require(min(contexts) > options.interval, "--contexts", min(contexts), "> --interval")
    require(min(options.batches) >= 1, "--batches", min(options.batches), "1 or more")
    require(torch.cuda.device_count() > 0, "device", "no NVIDIA GPU", "a machine with one")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return config


def _provenance(options: argparse.Namespace, what: str, config: ReSAConfig) -> Result:
    import triton

    from .timing import copy_bandwidth

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": revision() if options.commit == "asked of git" else options.commit,
        "command": command(options, what),
        "config": asdict(config),
        "copy_tbs": copy_bandwidth(),
    }


def _measure_all(
    out: Path, result: Result, points: dict[tuple, str], row: Callable[[tuple], Result], weigh: Callable[[tuple], int]
) -> None:
    """All rows, written to the file after each, so that an interruption loses one row at most."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(map(weigh, points)))
        for point, description in points.items():
            progress.update(task, description=description)
            result["rows"].append(row(point))
            write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
            progress.advance(task, weigh(point))
            torch.cuda.empty_cache()


def command(options: argparse.Namespace, what: str) -> str:
    """The command that measures the same again: what differs from the defaults, but for where the result goes."""
    words = [f"resa bench {what}"]
    for name, default in vars(options.points.parse_args([])).items():
        value = getattr(options, name)
        if value != default and name not in ("out", "commit"):
            values = [str(each) for each in (value if isinstance(value, list) else [value])]
            words += [f"--{name.replace('_', '-')}", *values]
    return " ".join(words)


def revision() -> str:
    """The commit of the working tree, "unknown" where there is no repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show_layer(result: Result) -> None:
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


def show_e2e(result: Result) -> None:
    """The rows as a table in the terminal: ms per step, and the share of the memory's bandwidth."""
    table = Table(title=f"{result['device']}, copy {result['copy_tbs']} TB/s; ms per step, share of the roofline")
    for name in ("weights", "cache", "batch", "context", "dense", "sparse", "ReSA", "tokens/s", "ratio", "limit"):
        table.add_column(name, justify="right" if name not in ("weights", "cache") else "left")
    for row in result["rows"]:
        floor = row["floor_us"]
        times = {"dense": row["dense_us"], "sparse": row["sparse"]["us"], "resa": row["resa"]["us"]}
        cells = [f"{us / 1e3:.2f} {floor[name] / us:.0%}" for name, us in times.items()]
        point = row["weights"], row["protocol"], str(row["batch"]), f"{row['context']:,}"
        rate = f"{row['batch'] / row['resa']['us'] * 1e6:,.0f}"
        table.add_row(*point, *cells, rate, f"{row['ratio']:.2f}", f"{floor['dense'] / floor['resa']:.2f}")
    Console(width=150).print(table)
