"""`resa bench layer`, `pages`, `e2e`, `prefill`: their arguments, and their results as a JSON file.

Nothing here imports Triton before it measures, so the command line has its help everywhere.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from resa.reference.checks import require
from resa.reference.cli.main import Commands, Parser, add_command
from resa.reference.config import SELECTIONS, ReSAConfig
from resa.reference.lab.evidence import without
from resa.reference.weights.files import as_json, write_atomically

from .shapes import QWEN_7B, SHAPES

Result = dict[str, Any]


def add_bench(commands: Commands) -> None:
    """Add the command `bench`."""
    text = "Time the Triton path on this GPU, dense attention by torch beside it."
    bench = commands.add_parser("bench", help=text, description=text)
    bench = bench.add_subparsers(required=True, metavar="WHAT")
    contexts = [1024 * 2**power for power in range(9)]

    layer = add_command(bench, "layer", run_layer)
    _add_points(layer, contexts, [1, 2, 4, 8, 16], "docs/results/attention.json")
    layer.option("--query-heads", 28, "query heads")
    layer.option("--kv-heads", 4, "key-value heads")
    layer.option("--head-dim", 128, "channels of a head")
    layer.option("--dtype", "float16", "data type of everything", choices=("float16", "bfloat16"))

    pages = add_command(bench, "pages", run_pages)
    _add_points(pages, [16_384, 65_536, 262_144], [8], "docs/results/pages.json")
    pages.option("--page-blocks", [1, 4], "blocks per page")

    e2e = add_command(bench, "e2e", run_e2e)
    _add_points(e2e, contexts[2:], [1, 2, 4, 8], "docs/results/end_to_end/own.json")
    kinds = ("float16", "bfloat16", "int4")
    e2e.option("--model", "qwen2.5-7b", "whose shape; weights are random", choices=tuple(SHAPES))
    e2e.option("--weights", ["float16", "int4"], "kinds of weights", choices=kinds)
    text = "select by bounds rounded outward to 8 bits"
    e2e.option("--eight-bit-bounds", False, text)
    text = "contexts to measure at the largest batch whose true caches fit; give none to skip this"
    e2e.option("--true-contexts", [65_536, 262_144], text, nargs="*")

    prefill = add_command(bench, "prefill", run_prefill)
    _add_cache(prefill, contexts[3:], "docs/results/prefill.json")
    prefill.set_defaults(selection="sketch")  # as `resa generate` has it
    prefill.option("--layers", 4, "layers of the model, of 28")
    text = "tokens of a prompt read at a time (default: those of resa.fast.generate)"
    prefill.option("--chunk", None, text, type=int)
    prefill.option("--dtype", "float16", "data type of everything", choices=kinds[:2])


def _add_points(parser: Parser, contexts: list[int], batches: list[int], out: str) -> None:
    _add_cache(parser, contexts, out)
    parser.option("--batches", batches, "batch sizes")
    parser.option("--active-ratio", 0.1, "share of blocks that a sparse step reads")
    parser.option("--intervals", [32], "f, tokens per rectification")


def _add_cache(parser: Parser, contexts: list[int], out: str) -> None:
    parser.option("--contexts", contexts, "cache lengths in tokens", nargs="*")
    parser.option("--block-size", 16, "tokens per block")
    parser.option("--selection", "bounds", "what blocks are chosen by", choices=SELECTIONS)
    parser.option("--sketch-bits", 2, "bits per channel of a sketch", choices=(1, 2))
    parser.option("--out", Path(out), "file to write, after every row")
    parser.option("--commit", None, "the revision measured; the default asks git")


def run_layer(options: argparse.Namespace) -> None:
    """Time one layer's attention, part by part and in whole cycles."""
    config = _checked(options)
    from .layer import Shape, measure

    shape = Shape(options.query_heads, options.kv_heads, options.head_dim, options.dtype)
    result = {**_provenance(options, config), "shape": asdict(shape), "rows": []}
    points = product(sorted(options.contexts), sorted(options.batches), sorted(options.intervals))
    for context, batch, f in points:
        row = measure(shape, replace(config, interval=f), batch, context, result["copy_tbs"])
        _keep(options.out, result, row, f"{batch} × {context:,} tokens, f = {f}")


def run_pages(options: argparse.Namespace) -> None:
    """Time the kernels through page tables in random order, beside the same over one long cache."""
    config = _checked(options)
    from .layer import Shape
    from .pages import measure

    shape, result = Shape(), {**_provenance(options, config), "rows": []}
    points = product(sorted(options.contexts), sorted(options.batches), options.page_blocks)
    for context, batch, n_blocks in points:
        page_size = n_blocks * config.block_size
        require(context % page_size == 0, "--contexts", context, f"a multiple of {page_size}")
        row = measure(shape, config, batch, context, page_size)
        result["rows"].append(row)
        write_atomically(options.out, (as_json(result) + "\n").encode())
        print(f"{batch} × {context:,} tokens, pages of {page_size}: {row['ratio']}", flush=True)
        torch.cuda.empty_cache()


def run_e2e(options: argparse.Namespace) -> None:
    """Time whole decoding steps of a model of a known shape, with random weights. Dense, sparse
    and rectified decoding run from the token fed to the token chosen, with a cache that all
    layers share, as the paper has it, and with true caches.
    """
    config = _checked(options)
    from . import e2e

    has_library = find_spec("humming") is not None or "int4" not in options.weights
    allowed = "pip install humming-kernels, or others"
    require(has_library, "--weights", "int4, without humming-kernels", allowed)
    result = {
        **_provenance(options, config),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "shape": asdict(SHAPES[options.model]),
        "sampling": asdict(e2e.SAMPLED),
        "weights": {},
        "rows": [],
    }
    batches, contexts = sorted(options.batches), sorted(options.contexts)
    for weights in options.weights:
        # What does not depend on the context.
        model = e2e.build(weights, SHAPES[options.model])
        parts = {str(batch): e2e.measure_parts(model, config, batch) for batch in batches}
        result["weights"][weights] = {"bytes": e2e.weight_bytes(model), "parts": parts}

        # All points, those of true caches last, as far as they fit.
        points = [(batch, context, True) for context in contexts for batch in batches]
        for context in sorted(options.true_contexts):
            points.append((e2e.largest_batch(model, config, context), context, False))
        for (batch, context, is_shared), f in product(points, sorted(options.intervals)):
            if batch > 0:
                point = batch, context, result["copy_tbs"]
                own = replace(config, interval=f)
                row = e2e.measure(model, own, *point, is_shared=is_shared)
                title = (
                    f"{weights}, {batch} × {context:,} tokens, {row['protocol']} caches, f = {f}"
                )
                _keep(options.out, result, {"weights": weights, **row}, title)
        del model
        torch.cuda.empty_cache()


def run_prefill(options: argparse.Namespace) -> None:
    """Time the first token of a prompt: a model of Qwen2.5-7B's layers, with random weights, reads
    random tokens and chooses the next one. Beside it the same layers attend by torch.
    """
    how = {"selection": options.selection, "sketch_bits": options.sketch_bits}
    config, contexts = ReSAConfig(block_size=options.block_size, **how), sorted(options.contexts)
    require(len(contexts) > 0, "--contexts", "none", "at least one")
    require(contexts[0] >= 1, "--contexts", contexts[0], "1 or more")
    require(options.chunk is None or options.chunk >= 1, "--chunk", options.chunk, "1 or more")
    _check_machine(options)
    from ..generate import PREFILL_ROWS
    from . import e2e, prefill

    shape, layers = QWEN_7B, options.layers
    require(contexts[-1] <= shape.context, "--contexts", contexts[-1], f"≤ {shape.context:,}")
    require(1 <= layers <= shape.n_layer, "--layers", layers, f"1 … {shape.n_layer}")
    chunk = PREFILL_ROWS if options.chunk is None else options.chunk
    model = e2e.build(options.dtype, replace(shape, n_layer=layers))
    result = {**_provenance(options, config), "shape": asdict(shape), "dtype": options.dtype}
    result |= {"errors": prefill.check(model), "rows": []}
    for context in contexts:
        row = prefill.measure(model, config, context, chunk)
        _keep(options.out, result, row, f"{context:,} tokens, {layers} layers")


def _checked(options: argparse.Namespace) -> ReSAConfig:
    """The configuration; what is wrong with the arguments is said before anything is measured."""
    b, p, longest = options.block_size, options.active_ratio, max(options.intervals)
    how = {"selection": options.selection, "sketch_bits": options.sketch_bits}
    how["eight_bit_bounds"] = getattr(options, "eight_bit_bounds", False)
    config = ReSAConfig(block_size=b, active_ratio=p, interval=longest, **how)
    least, allowed = min(options.intervals), "2 or more, to have sparse steps at all"
    require(least > 1, "--intervals", least, allowed)
    contexts = [*options.contexts, *getattr(options, "true_contexts", [])]
    require(len(contexts) > 0, "--contexts", "none", "at least one")
    require(min(contexts) > longest, "--contexts", min(contexts), "> --intervals")
    require(min(options.batches) >= 1, "--batches", min(options.batches), "1 or more")
    _check_machine(options)
    return config


def _check_machine(options: argparse.Namespace) -> None:
    """Refuse a machine without a GPU, and make the folder of the results."""
    require(torch.cuda.device_count() > 0, "device", "no NVIDIA GPU", "a machine with one")
    options.out.parent.mkdir(parents=True, exist_ok=True)


def _provenance(options: argparse.Namespace, config: ReSAConfig) -> Result:
    import triton

    from .timing import copy_bandwidth

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": options.commit or revision(),
        "command": shlex.join(["resa", *without(sys.argv[1:], ["--out", "--commit"])]),
        "config": asdict(config),
        "copy_tbs": copy_bandwidth(),
    }


def _keep(out: Path, result: Result, row: Result, title: str) -> None:
    """Print a row and write all rows so far, so that an interruption loses one."""
    result["rows"].append(row)
    write_atomically(out, (as_json(result) + "\n").encode())
    dense, resa, ratio = row["dense_us"], row["resa"]["us"], row["ratio"]
    times = f"dense {dense:,.1f} µs, ReSA {resa:,.1f} µs, ratio {ratio:.2f}"
    print(f"{title}: {times}; written to {out}", flush=True)
    torch.cuda.empty_cache()


def revision() -> str:
    """The commit of the working tree, "unknown" where there is no repository."""
    words = ["git", "-C", str(Path(__file__).parent)]
    words += ["describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
