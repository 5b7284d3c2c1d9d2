"""Fill the tables of README.md and docs/ from the JSON files that commands wrote: python docs/make_tables.py.

It also writes the API page's signatures, from the code, and fast/bench/crossover.json, the part of the results that the
command line needs.

A table stands between `<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit status is
1 if any table is not what its file says.
"""

import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from resa.reference.config import GPTConfig, ReSAConfig
from resa.reference.lab.evidence import without
from resa.reference.lab.fidelity import read_ratio
from resa.reference.model import GPT
from signatures import signatures

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("use", "training", "performance", "evidence", "api")))
CROSSOVER = "fast/bench/crossover.json"
SHOWN_RATIOS = (0.02, 0.05, 0.1, 0.2)  # at larger ones there is next to nothing to lose
LONG = (2**14, 2**16, 2**18)  # contexts that tables of speed show


def load(name: str) -> dict:
    """Read a result by its path below the root."""
    return json.loads((ROOT / name).read_text())


def table(head: list[str], rows: list[list[str]], *notes: str) -> str:
    """Write a Markdown table, its first column left-aligned, and notes below it."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = textwrap.fill(" ".join(notes), 120, break_long_words=False, break_on_hyphens=False)
    return f"{text}\n\n{note}" if notes else text


def interval(values: list[float], digits: int = 4) -> str:
    """An interval of confidence in brackets."""
    return f"[{values[0]:.{digits}f}, {values[1]:.{digits}f}]"


def within(row: dict, name: str, digits: int = 3) -> str:
    """A mean and its 95 % interval."""
    return f"{row[name]:.{digits}f} {interval(row[f'{name}_95'], digits)}"


def recovered(share: float | None, ends: list[float | None] | None) -> str:
    """A share of the drift; a dash where there is too little drift to take a share of."""
    return "–" if share is None or None in ends else f"{share:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]"


# ---- Evidence --------------------------------------------------------------------------------------------------------


def evidence(part: str) -> dict:
    """Read the result of one part of the evidence."""
    return load(f"docs/results/evidence/{part}.json")


def measured(result: dict) -> str:
    """The command of a result, or the commit that had it if it is gone by now, and the machine."""
    if "commit" in result:
        command = f"Commit {result['commit']}"
    else:  # neither where it ran nor how many sequences at a time says what was measured
        words = without(shlex.split(result["command"]), ["--device", "--out", "--batch"])
        command = " ".join(words).replace(" reference/assets/", " reference/weights/assets/")  # moved since
        command = f"`{command}`"
    shipped = load("reference/weights/assets/record.json")
    is_wide = result.get("checkpoint_sha256") == shipped["rounded_from"]
    of_it = "; the model before its weights were rounded to 8 bits" if is_wide else ""
    return f"{command}{of_it}; {result['device']}, {result['seconds']:.0f} s."


def settings_of(config: dict) -> str:
    """The part of the configuration that a table's note names."""
    ratio, b, fewest = config["active_ratio"], config["block_size"], config["min_blocks"]
    return f"; active ratio {ratio}, block size {b}, at least {fewest} blocks; means [95 %]."


def fidelity() -> str:
    """Losses of the shipped model, differences taken document by document."""
    result = load("docs/results/fidelity.json")
    lines = []
    for name, row in result["variants"].items():
        gain = "–" if name == "sparse" else within(row, "gain_over_sparse", 4)
        drift = "0" if name == "decode-only" else within(row, "drift_kl", 4)
        lines.append([name, within(row, "kl", 4), drift, gain, f"{row['agreement']:.1%}"])
    head = ["decoding", "KL from dense (nats)", "of it drift", "less than sparse by", "same top token"]
    note = f"{result['documents']} documents, {result['tokens_each']} tokens each{settings_of(result['config'])}"
    return table(head, lines, note, measured(result))


def real_rows(text: str, *parts: str) -> dict[tuple[float, str], dict]:
    """Rows of the real model on one kind of text, by ratio and way; by default those of bounds."""
    results = (evidence(f"{part}_{text}") for part in parts or ("fidelity", "fidelity_ratios"))
    return {(row["ratio"], row["way"]): row for result in results for row in result["rows"]}


def loss_cells(row: dict, digits: int = 3) -> list[str]:
    """Say what a way loses, the part of it that is drift, and the share of the drift that it repairs."""
    is_exact = row["way"] == "decode-only"
    drift = "0" if is_exact else within(row, "drift", digits)
    return [within(row, "kl", digits), drift, recovered(row["recovered"], row["recovered_95"])]


def of_documents(result: dict) -> str:
    """The documents of a measurement on text."""
    n_prompt = int(re.search(r"--prompt-tokens (\d+)", result["command"])[1])
    scored = result["scored"]
    last = "" if scored == result["tokens_each"] else f", scored on the last {scored:,}"
    return (
        f"{result['documents']} documents of each kind; {n_prompt:,} tokens read, {result['tokens_each']:,} decoded"
        f"{last}; schedule `{result['config']['schedule']}`"
    )


def evidence_real() -> str:
    """Losses on the real model, on English and source code, at three ratios."""
    english, code = (real_rows(text) for text in ("english", "code"))
    lines = []
    for (ratio, way), row in english.items():
        if way != "ReSA f=256":  # as near to never as f = 128, and the table is long enough
            lines.append([f"{ratio}, {way}", *loss_cells(row), *loss_cells(code[ratio, way])[::2]])
    head = ["ratio, decoding", "English: lost", "of it drift", "drift repaired", "code: lost", "drift repaired"]
    result = evidence("fidelity_english")
    config = result["config"]
    note = f"Nats per token [95 %]. {of_documents(result)}, block size {config['block_size']}, at least "
    return table(head, lines, f"{note}{config['min_blocks']} blocks.", measured(result))


def evidence_sketch() -> str:
    """Losses on the real model by key sketches, beside those by bounds."""
    columns = [real_rows(text, *parts) for text in ("english", "code") for parts in ((), ("sketch",))]
    lines = []
    for ratio, way in sorted(columns[-1], key=lambda key: -key[0]):  # a tenth first, as elsewhere
        lines.append([f"{ratio}, {way}", *(within(rows[ratio, way], "kl") for rows in columns)])
    head = ["ratio, decoding", "English: bounds", "English: sketches", "code: bounds", "code: sketches"]
    result = evidence("sketch_english")
    config = result["config"]
    note = f"Nats lost per token [95 %]. {of_documents(result)}, block size {config['block_size']}, at least "
    return table(head, lines, f"{note}{config['min_blocks']} blocks.", measured(result))


def searched(bounds: float = 1.0, **changes: object) -> float:
    """Bytes by which blocks are chosen, as a share of a cache with SmolLM2's heads (eq. 6)."""
    config = ReSAConfig(interval=None, **changes)
    return read_ratio(config, bounds, head_dim=64) - config.active_ratio


SCORES = {  # part, score: name, what a step reads, what is kept
    ("scorers", "pooled"): ("bounds (the paper)", searched(1 / 2), searched()),
    ("scorers", "per-head"): ("bounds, head by head", searched(), searched()),
    ("scorers", "8-bits"): ("bounds in 8 bits", searched(1 / 4), searched(1 / 2)),
    ("scorers", "first-block"): ("bounds, the first block always", searched(1 / 2), searched()),
    ("scorers", "half-blocks"): ("bounds of half blocks", searched(1 / 2, block_size=8), searched(block_size=8)),
    ("blocks", "pooled"): ("bounds, blocks of 8", searched(1 / 2, block_size=8), searched(block_size=8)),
    ("scorers", "sketch-1"): ("sketches, 1 bit", *2 * [searched(selection="sketch", sketch_bits=1)]),
    ("scorers", "sketch-2"): ("**sketches, 2 bits**", *2 * [searched(selection="sketch")]),
    ("blocks", "sketch-2"): ("sketches, 2 bits, blocks of 8", *2 * [searched(selection="sketch")]),
    ("scorers", "sketch-4"): ("sketches, 4 bits", None, None),
    ("scorers", "mass"): ("the true attention mass", None, None),
}


def evidence_scorers() -> str:
    """Losses on the real model by what blocks are chosen by, at the same number of tokens read."""
    rows = {
        (text, part, row["score"], row["way"]): row
        for text in ("english", "code")
        for part in ("scorers", "blocks")
        for row in evidence(f"{part}_{text}")["rows"]
    }
    lines = []
    for (part, score), (name, *shares) in SCORES.items():
        columns = [(text, way) for text in ("english", "code") for way in ("decode-only", "ReSA f=32")]
        lost = (within(rows[text, part, score, way], "kl") for text, way in columns)
        lines.append([name, *("–" if share is None else f"{share:.1%}" for share in shares), *lost])
    head = ["blocks chosen by", "read", "kept", "English: decode-only", "f = 32", "code: decode-only", "f = 32"]
    result = evidence("scorers_english")
    note = (
        f"Read and kept: bytes by which blocks are chosen, as a share of the cache. Nats lost per token. "
        f"{of_documents(result)}{settings_of(result['config'])}"
    )
    return table(head, lines, note, measured(result))


def evidence_selection() -> str:
    """Attention mass left out by every way of scoring blocks."""
    results = {text: evidence(f"selection_{text}") for text in ("english", "code")}
    lines = []
    for name in next(iter(results.values()))["mass_left_out"]:
        found = (result["mass_left_out"][name] for result in results.values())
        lines.append([name, *(within(each, "mean") for each in found)])
    first = results["english"]
    note = f"{first['documents']} documents, {first['tokens_each']} tokens each{settings_of(first['config'])}"
    return table(["blocks chosen by", *results], lines, note, measured(first))


def evidence_retrieval(length: int = 4096) -> str:
    """Answers found in a text, by family and by what blocks are chosen by."""
    results = [evidence(f"retrieval_{length}"), evidence(f"retrieval_sketch_{length}")]
    bounds, sketches = (
        {(row["family"], row["way"]): row for row in result["rows"] if row["start"] == "middle"} for result in results
    )
    lines = []
    for family in dict.fromkeys(family for family, _ in bounds):
        row = bounds[family, "sparse"]
        name = family if row["is_answered"] else f"{family} (not answered)"
        columns = [(rows, way) for way in ("decode-only", "ReSA f=32") for rows in (bounds, sketches)]
        lines.append([name, within(row, "dense", 2), *(within(rows[family, way], "right", 2) for rows, way in columns)])
    head = ["family", "dense", "decode-only: bounds", "sketches", "f = 32: bounds", "sketches"]
    result = results[-1]
    note = (
        f"Share of answers right. {result['questions']} questions of {length:,} tokens each, the second half decoded"
        f"{settings_of(result['config'])}"
    )
    return table(head, lines, note, measured(result))


def of_programs(result: dict) -> str:
    """The programs of a measurement of carried values."""
    config = result["config"]
    return (
        f"{result['programs']} programs of {result['length']:,} tokens, {result['prompt_tokens']} of them prefilled, "
        f"{result['checks']:,} values; schedule `{config['schedule']}`, block size {config['block_size']}, at least "
        f"{config['min_blocks']} blocks; means over programs [95 %]."
    )


def evidence_carried() -> str:
    """Values carried along given programs, by ratio; what rectification recovers, by interval."""
    result = evidence("carried")
    by_ratio: dict[float, dict] = {}
    for row in result["rows"]:
        by_ratio.setdefault(row["ratio"], {})[row["interval"]] = row
    lines = []
    for ratio in SHOWN_RATIOS:
        rows = by_ratio[ratio]
        exact, never = rows["decode-only"], rows["never"]
        shares = [recovered(rows[f]["recovered"], rows[f]["recovered_95"]) for f in (128, 32, 8)]
        cells = [within(exact, "right"), within(exact, "step_error"), within(never, "drift")]
        lines.append([str(ratio), *cells, *shares])
    head = ["ratio", "decode-only right", "step error", "drift of sparse", "f = 128 repairs", "f = 32", "f = 8"]
    return table(head, lines, of_programs(result), measured(result))


def evidence_carried_scores() -> str:
    """Values carried along given programs, by what blocks are chosen by."""
    result = evidence("carried_scores")
    by_score: dict[str, dict] = {}
    for row in result["rows"]:
        by_score.setdefault(row["score"], {})[row["interval"]] = row
    lines = []
    for score, rows in by_score.items():
        exact, never, own = (rows[name] for name in ("decode-only", "never", 32))
        right = [within(row, "right") for row in (exact, own, never)]
        lines.append([score, *right, within(never, "drift"), recovered(own["recovered"], own["recovered_95"])])
    head = ["blocks chosen by", "decode-only right", "f = 32", "sparse", "drift of sparse", "f = 32 repairs"]
    return table(head, lines, f"Active ratio {result['rows'][0]['ratio']}.", of_programs(result), measured(result))


def evidence_training() -> str:
    """Both errors after training with sparse steps, ratio 0.1."""
    lines = []
    runs = [run["train"]["steps"] for run in load("reference/weights/assets/carrying.json")["runs"]]
    for name, rhythm in (("rectified", "every 32 tokens"), ("never", "never")):
        for stage, steps in (("second", runs[1]), ("third", runs[1] + runs[2])):
            result = evidence(f"training/{name}_{stage}")
            rows = {row["interval"]: row for row in result["rows"] if row["ratio"] == 0.1}
            share = recovered(rows[32]["recovered"], rows[32]["recovered_95"])
            cells = [within(rows["decode-only"], "step_error"), within(rows["never"], "drift"), share]
            lines.append([rhythm, str(steps), *cells])
    head = ["rectified in training", "steps that decode", "step error", "drift of sparse", "recovered at f = 32"]
    return table(head, lines, f"Active ratio 0.1; 16-bit weights; {result['device']}.", of_programs(result))


# ---- Speed -----------------------------------------------------------------------------------------------------------


def spread(time: dict, digits: int = 1) -> str:
    """A median with its quartiles."""
    return f"{time['us']:.{digits}f} [{time['low']:.{digits}f}, {time['high']:.{digits}f}]"


def kilo(context: int) -> str:
    """A context in units of 1,024 tokens."""
    return f"{context // 1024}K"


def cycles(name: str) -> dict:
    """Read a measurement of one layer's attention."""
    return load(f"docs/results/cycles/{name}.json")


def attention_rows() -> tuple[dict, list[dict]]:
    """The measurement of attention, and its rows of the widths that tables show."""
    result = cycles("bounds_0.1")
    return result, [row for row in result["rows"] if row["batch"] == 8 and row["context"] in LONG]


def attention() -> str:
    """ReSA and dense attention per layer and token."""
    result, rows = attention_rows()
    head = ["context", "dense, flash", "dense, cuDNN", "ReSA, sum of parts", "dense ÷ sum", "ReSA, whole cycles"]
    lines = []
    for row in rows:
        dense = [spread(row["dense"][kernel]) for kernel in ("flash", "cudnn")]
        ratio = f"{row['dense_us'] / row['sum_us']:.2f}"
        lines.append([kilo(row["context"]), *dense, f"{row['sum_us']:.1f}", ratio, spread(row["resa"])])
    shape, config = result["shape"], result["config"]
    note = (
        f"µs per layer and token, batch 8; medians [quartiles]. {result['device']}, torch {result['torch']}, triton "
        f"{result['triton']}; copy bandwidth in the same run {result['copy_tbs']:.2f} TB/s. {shape['query_heads']} "
        f"query and {shape['kv_heads']} KV heads, head dimension {shape['head_dim']}, {shape['dtype']}, block size "
        f"{config['block_size']}, active ratio {config['active_ratio']}, interval {config['interval']}. "
        f"`{result['command']}`, commit {result['commit']}."
    )
    return table(head, lines, note)


def parts() -> str:
    """Every part of a cycle, with its floor."""
    _, rows = attention_rows()
    step = ("append", "score", "select", "attend", "refresh", "rectify")
    lines = []
    for part in (*step, "score, 8-bit bounds", "dense, this project's kernel"):
        if part in rows[0]["parts"]:
            lines.append([part])
            for row in rows:
                floor = row["floor_us"].get(part)
                share = f"; {floor / row['parts'][part]['us']:.0%} of {floor:.0f}" if floor and floor > 1 else ""
                lines[-1].append(spread(row["parts"][part]) + share)
    note = (
        "µs per call, batch 8; medians [quartiles]; where bytes limit the part, the share reached of the floor: its "
        "bytes at the copy bandwidth of the same run. `refresh` and `rectify` come once per interval."
    )
    return table(["part", *(kilo(row["context"]) for row in rows)], lines, note)


def selections() -> str:
    """Times by bounds and by sketches, beside what they lose."""
    lost = {
        (name, ratio): [real_rows(text, *parts)[ratio, "ReSA f=32"]["kl"] for text in ("english", "code")]
        for name, parts in (("bounds", ()), ("sketch", ("sketch",)))
        for ratio in (0.05, 0.1)
    }
    files = [("bounds", 0.1), ("sketch", 0.1), ("sketch", 0.05)]
    lines = []
    for name, ratio in files:
        result = cycles(f"{name}_{ratio}")
        for row in result["rows"]:
            if row["batch"] == 8 and row["context"] in LONG:
                parts = [f"{row['parts'][part]['us']:.1f}" for part in ("append", "score", "select", "attend")]
                cycle = [f"{row['parts']['rectify']['us'] / 32:.1f}", spread(row["resa"]), f"**{row['ratio']:.2f}**"]
                losses = " / ".join(f"{loss:.3f}" for loss in lost[name, ratio])
                lines.append([f"{name}, {ratio}, {kilo(row['context'])}", *parts, *cycle, losses])
    head = ["chosen by, ratio, context", "append", "score", "select", "attend", "rectify ÷ 32", "whole cycles"]
    note = (
        f"µs per layer and token, batch 8; medians [quartiles]. {result['device']}, torch {result['torch']}, triton "
        f"{result['triton']}; 28 query and 4 KV heads of 128, float16, block size 16, interval 32. Lost: nats on "
        f"SmolLM2, English / code ([evidence.md](evidence.md)). Commands and commits stand in the files of "
        f"[cycles/](results/cycles)."
    )
    return table([*head, "dense ÷ ReSA", "lost, 4,096 tokens"], lines, note)


SELECTIONS = {"bounds": "bounds_0.1", "sketch": "sketch_0.1"}  # the measurements of both


def crossover() -> str:
    """Dense time over ReSA time for every batch and context."""
    lines, contexts = [], sorted({row["context"] for row in cycles("bounds_0.1")["rows"]})
    for batch, (selection, name) in product((1, 8), SELECTIONS.items()):
        ratios = {row["context"]: row["ratio"] for row in cycles(name)["rows"] if row["batch"] == batch}
        lines.append([f"{batch}, {selection}", *(f"{ratios[context]:.2f}" for context in contexts)])
    return table(["batch, chosen by", *map(kilo, contexts)], lines)


def crossover_file() -> str:
    """The times from which `resa generate` decides how long a request decodes densely."""
    kept, dense_below = {}, {}
    for selection, name in SELECTIONS.items():
        result = cycles(name)
        kept = {key: result[key] for key in ("device", "torch", "triton", "commit", "shape")}
        kept["shape"] |= {key: result["config"][key] for key in ("block_size", "active_ratio", "interval")}

        # The shortest cache of one sequence from which ReSA was faster at every length measured.
        rows = [row for row in result["rows"] if row["batch"] == 1]
        slower = max((row["context"] for row in rows if row["resa_us"] >= row["dense_us"]), default=0)
        dense_below[selection] = min((row["context"] for row in rows if row["context"] > slower), default=slower + 1)
    return json.dumps({**kept, "dense_below_tokens": dense_below}, indent=1) + "\n"


WEIGHTS = {"float16": "16-bit", "int4": "4-bit"}
H100 = "h100_float16", "h100_int4", "h100_int4_true"
H200 = "h200_float16", "h200_int4", "h200_int4_true"
Point = tuple[str, str, int, int]  # weights, whose caches, batch, context


def whole_steps(name: str) -> dict:
    """Read a measurement of whole decoding steps."""
    return load(f"docs/results/end_to_end/{name}.json")


def step_rows(*names: str) -> dict[Point, dict]:
    """Rows of measurements of whole decoding steps."""
    rows = {}
    for name in names:
        for row in whole_steps(name)["rows"]:
            point = row["weights"], row["protocol"], row["batch"], row["context"]
            if point in rows:
                raise ValueError(f"{', '.join(names)}: {point} was measured twice; drop a row")
            rows[point] = row
    return rows


def limit(row: dict) -> str:
    """Dense over ReSA if both moved their least bytes at the speed of a copy."""
    return f"{row['floor_us']['dense'] / row['floor_us']['resa']:.2f}"


STEP_HEAD = ["dense", "sparse", "ReSA", "tokens/s", "dense ÷ ReSA", "limit by bytes"]


def step_cells(row: dict) -> list[str]:
    """Times of whole decoding steps, and what follows from them."""
    times = {"dense": row["dense_us"], "sparse": row["sparse"]["us"], "resa": row["resa"]["us"]}
    cells = [f"{us / 1e3:.2f} ({row['floor_us'][name] / us:.0%})" for name, us in times.items()]
    rate = row["batch"] / row["resa"]["us"] * 1e6
    return [*cells, f"{rate:,.0f}", f"**{row['ratio']:.2f}**", limit(row)]


def end_to_end() -> str:
    """Whole decoding steps, all layers sharing one cache, as in the paper."""
    own, others = step_rows(*H200), step_rows(*H100)
    lines = []
    for (weights, name), batch, context in product(WEIGHTS.items(), (1, 8), LONG):
        point = weights, "shared", batch, context
        cells = [*step_cells(own[point]), f"{others[point]['ratio']:.2f}"]
        lines.append([name, str(batch), kilo(context), *cells])
    result = whole_steps(H200[0])
    config, sampling = result["config"], result["sampling"]
    note = (
        f"ms per step (share of the memory roofline: bytes at the copy bandwidth of the same run, "
        f"{result['copy_tbs']:.2f} TB/s); medians. Tokens sampled, temperature {sampling['temperature']}, top-p "
        f"{sampling['top_p']}. {result['device']}, torch {result['torch']}, triton {result['triton']}; block size "
        f"{config['block_size']}, active ratio {config['active_ratio']}, interval {config['interval']}. The files in "
        f"[end_to_end/](results/end_to_end) have more rows, the commands and the commits."
    )
    return table(["weights", "batch", "context", *STEP_HEAD, "dense ÷ ReSA, H100"], lines, note)


def true_caches() -> str:
    """Whole decoding steps, every layer with a cache of its own, at the largest batch that fits."""
    lines = []
    for weights, names in product(WEIGHTS, (H200, H100)):
        gpu = whole_steps(names[0])["device"].split()[1]
        rows = {point: row for point, row in step_rows(*names).items() if point[:2] == (weights, "true")}
        for (_, _, batch, context), row in sorted(rows.items(), reverse=True):
            lines.append([f"{WEIGHTS[weights]}, {gpu}", str(batch), kilo(context), *step_cells(row)])
    return table(["weights, GPU", "batch", "context", *STEP_HEAD], lines)


CHOSEN = {  # ending of the files: what chooses blocks, the part and the score of its losses
    "": ("bounds", "scorers", "pooled"),
    "_8bit": ("bounds in 8 bits", "scorers", "8-bits"),
    "_sketch_10": ("sketches", "frontier", "sketch-2"),
    "_sketch": ("sketches", "frontier", "sketch-2"),
}


def loss(part: str, text: str, score: str, ratio: float) -> float:
    """Losses of ReSA at f = 32 on the real model, in nats."""
    asked = {"score": score, "ratio": ratio, "way": "ReSA f=32"}.items()
    return next(row["kl"] for row in evidence(f"{part}_{text}")["rows"] if asked <= row.items())


def whole_steps_by_selection() -> str:
    """Speed-ups of whole decoding steps by what blocks are chosen by, and what each loses."""
    points = [("shared", 8, 2**18), ("true", 8, 2**18), ("shared", 8, 2**16), ("shared", 1, 2**16)]
    lines = []
    for (ending, (chosen, part, score)), (weights, name) in product(CHOSEN.items(), WEIGHTS.items()):
        file = f"h200_{weights}{ending}"
        if not (ROOT / f"docs/results/end_to_end/{file}.json").exists():  # not measured
            continue
        files = (file, "h200_int4_true") if file == "h200_int4" else (file,)
        rows, ratio = step_rows(*files), whole_steps(file)["config"]["active_ratio"]
        gains = [rows.get((weights, *point)) for point in points]
        cells = ["–" if row is None else f"**{row['ratio']:.2f}**" for row in gains]
        losses = " / ".join(f"{loss(part, text, score, ratio):.3f}" for text in ("english", "code"))
        lines.append([f"{chosen}, {ratio}, {name}", *cells, losses])
    head = ["chosen by, ratio, weights"]
    head += [f"{batch} × {kilo(context)}, {whose}" for whose, batch, context in points]
    note = (
        "Dense ÷ ReSA of whole steps, H200, one cache shared by all layers or true caches. Lost: nats along 1,024 "
        "decoded tokens of SmolLM2, f = 32, English / code ([evidence.md](evidence.md))."
    )
    return table([*head, "lost, 1,024 tokens"], lines, note)


def small_shapes() -> str:
    """Speed-ups of whole decoding steps of small models, by batch and context."""
    contexts = [2**12, 2**13, 2**14]
    lines = []
    for file, name in (("smollm2", "SmolLM2-135M"), ("qwen3", "Qwen3-0.6B"), ("float16", "Qwen2.5-7B")):
        files = (f"h200_{file}", "h200_float16_32") if file == "float16" else (f"h200_{file}",)
        rows, shape = step_rows(*files), whole_steps(files[0])["shape"]
        for batch in (1, 8, 32):
            found = [rows.get(("float16", "shared", batch, context)) for context in contexts]
            if any(found):
                heads = f"{shape['n_head']}/{shape['n_kv_head']} heads of {shape['head_dim']}"
                cells = ["–" if row is None else f"**{row['ratio']:.2f}**" for row in found]
                lines.append([f"{name}, {heads}", str(batch), *cells])
    note = "Dense ÷ ReSA of whole steps, H200, 16-bit weights, one cache shared by all layers, bounds, ratio 0.1."
    return table(["shape", "batch", *map(kilo, contexts)], lines, note)


PAPER = {"float16": "2.28", "int4": "2.42 to 2.44"}  # arXiv 2506.04108, 8 × 256K on an A100


def paper() -> str:
    """The paper's speed-up beside this project's, at the point that both measured."""
    lines = []
    for weights, ratio in PAPER.items():
        rows = [step_rows(*names)[weights, "shared", 8, 2**18] for names in (H100, H200)]
        gains = (f"**{row['ratio']:.2f}**" for row in rows)
        times = (f"{row['dense_us'] / 1e3:.2f} / {row['resa']['us'] / 1e3:.2f}" for row in rows)
        lines.append([WEIGHTS[weights], ratio, *gains, limit(rows[-1]), *times])
    head = ["weights", "paper, A100", "this project, H100", "H200", "limit by bytes"]
    sampling = whole_steps(H200[0])["sampling"]
    note = (
        f"Dense ÷ ReSA of whole steps: 8 sequences of 256K tokens, one cache shared by all layers, tokens sampled, "
        f"temperature {sampling['temperature']}, top-p {sampling['top_p']}. H100: an earlier version of the code."
    )
    return table([*head, "H100, ms: dense / ReSA", "H200, ms: dense / ReSA"], lines, note)


def beside_attention() -> str:
    """Times of a step beside attention."""
    columns = {
        f"{WEIGHTS[weights]}, batch {batch}": whole_steps(f"h200_{weights}")["weights"][weights]["parts"][str(batch)]
        for weights, batch in product(WEIGHTS, (1, 8))
    }
    names = [
        f"{what}: {part}, per layer"
        for what, part in product(("step", "rectification"), ("matrix products", "elementwise work"))
    ]
    names += ["output projection", "sampling, greedy", "sampling, temperature 0.7, top_p 0.95"]
    lines = [[name, *(spread(times[name]) for times in columns.values())] for name in names]
    note = "µs; medians [quartiles]. H200. Elementwise work: residuals, norms, RoPE, SwiGLU."
    return table(["part", *columns], lines, note)


def prefill() -> str:
    """Time to the first token, and memory beside weights and cache."""
    result = load("docs/results/prefill.json")
    ways, depth = ("flash, whole", "cudnn, whole", "flash, chunks"), result["shape"]["n_layer"]
    lines = []
    for row in result["rows"]:
        times = {"resa": row["resa"], **row["dense"]}
        cells = {name: spread({key: us / 1e3 for key, us in time.items()}) for name, time in times.items()}
        fastest = min(row["dense"], key=lambda name: row["dense"][name]["us"])
        memory = " / ".join(f"{row['peak_bytes'][name] / 1e9:.2f}" for name in (fastest, "resa"))
        whole = " / ".join(f"{row['all_layers_us'][name] / 1e6:.2f}" for name in ("dense", "resa"))
        times = [cells.get(name, "–") for name in (*ways, "resa")]
        lines.append([kilo(row["context"]), *times, f"**{row['ratio']:.2f}**", memory, whole])
    head = ["context", "dense, flash", "dense, cuDNN", "dense, flash by chunks", "ReSA", "dense ÷ ReSA"]
    head += ["memory, GB: dense / ReSA", f"{depth} layers, s: dense / ReSA"]
    layers, chunk, config = result["rows"][0]["layers"], result["rows"][0]["chunk"], result["config"]
    note = (
        f"ms for one prompt and {layers} layers, up to the first token chosen; medians [quartiles]; a dash where the "
        f"whole prompt's activations did not fit. Times of {depth} layers are estimates: the time without the output "
        f"projection, times {depth / layers:g}. Memory is the peak beside weights and cache, dense for its fastest "
        f"way. ReSA and the dense chunks read {chunk:,} tokens at a time. {result['device']}, torch {result['torch']}, "
        f"triton {result['triton']}; {result['dtype']}, block size {config['block_size']}, blocks chosen by "
        f"{config['selection']}. `{result['command']}`, commit {result['commit']}."
    )
    return table(head, lines, note)


# ---- The front page and "Use it on your model" -----------------------------------------------------------------------


def payoff() -> str:
    """Say in three lines what is gained, what is lost, and for whom it is not."""
    runs = (("", 8), ("", 1), ("_sketch_10", 8), ("_sketch", 8))
    eight, one, same, half = (
        f"{step_rows(f'h200_float16{name}')['float16', 'shared', batch, 2**18]['ratio']:.1f}" for name, batch in runs
    )
    by_bounds, by_sketches = real_rows("english"), real_rows("english", "sketch")
    found = by_bounds[0.1, "ReSA f=32"], by_sketches[0.1, "ReSA f=32"], by_sketches[0.05, "ReSA f=32"]
    bounds, sketches, fewer = (f"{100 * row['agreement']:.0f}" for row in found)
    lines = (
        f"- **Speed.** A batch of eight sequences, each of 256K tokens, decodes **{eight} times** as fast as with "
        f"dense attention. A single one decodes {one} times as fast. We timed whole steps, with a dense pass every 32 "
        f"tokens, of a model of Qwen2.5-7B's shape with 16-bit weights, on one {whole_steps(H200[0])['device']}. Steps "
        "read a tenth of the blocks, chosen as in the paper.",
        f"- **Price.** The text can differ from dense decoding's. SmolLM2-135M reads a tenth of the blocks and is "
        f"rectified every 32 tokens. We gave it English text: at {bounds} of 100 tokens, its likeliest next token is "
        f"that of dense decoding. With *key sketches*, this project's own way of choosing blocks, the two agree "
        f"at **{sketches} of 100**. Sketches make a step slower: the batch then decodes {same} times as fast as with "
        f"dense attention. With sketches and a twentieth of the blocks, it decodes {half} times as fast, and SmolLM2 "
        f"agrees at {fewer} of 100 tokens.",
        "- **Not for you** if you decode one text at a time and it is shorter than 16K tokens (with sketches: "
        "about 64K), if you have no NVIDIA GPU, or if you need exactly dense decoding's text: "
        "[when not to use it](docs/when_not.md).",
    )
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in lines)


def demo() -> str:
    """Quote what the demo says at its end."""
    result = load("docs/results/demo.json")
    said = "\n".join(textwrap.fill(line, 88) for line in result["verdict"][:-1])
    return f"```text\n{said}\n```\n\nThat took {result['seconds']:.0f} s ({result['device']})."


def memory() -> str:
    """Say what weights and caches take, and how many sequences fit, for the shapes that were timed."""
    gpus = [whole_steps(names[0]) for names in (H100, H200)]
    gigabytes = [24, *(round(gpu["memory_bytes"] / 1e9) for gpu in gpus)]
    lines = []
    for file, name in (("smollm2", "SmolLM2-135M"), ("qwen3", "Qwen3-0.6B"), ("float16", "Qwen2.5-7B")):
        shape = GPTConfig(**whole_steps(f"h200_{file}")["shape"])
        with torch.device("meta"):
            weights = 2 * sum(parameter.numel() for parameter in GPT(shape).parameters())
        token = 2 * 2 * shape.n_layer * shape.n_kv_head * shape.head_dim  # key and value, two bytes each
        with_sketch = token * (1 + 1 / 16 + 1 / (2 * shape.head_dim))
        caches = [f"{token * context / 1e9:.2f}" for context in LONG]
        fit = [str(int((size * 1e9 - weights) / (with_sketch * 2**16))) for size in gigabytes]
        lines.append([name, f"{weights / 1e9:.1f}", f"{token / 1024:.0f}", *caches, " / ".join(fit)])
    head = ["model's shape", "weights, GB", "one token, KiB", *(f"{kilo(context)} tokens, GB" for context in LONG)]
    head.append(f"sequences of 64K in {', '.join(map(str, gigabytes[:-1]))} and {gigabytes[-1]} GB")
    note = "Computed for 16-bit weights and caches. The last column counts weights, caches and sketches, nothing else."
    return table(head, lines, note)


TABLES = {
    "payoff": payoff,
    "demo": demo,
    "memory": memory,
    "signatures": signatures,
    "fidelity": fidelity,
    "evidence_real": evidence_real,
    "evidence_carried": evidence_carried,
    "evidence_carried_scores": evidence_carried_scores,
    "evidence_scorers": evidence_scorers,
    "evidence_selection": evidence_selection,
    "evidence_sketch": evidence_sketch,
    "evidence_retrieval": evidence_retrieval,
    "evidence_training": evidence_training,
    "attention": attention,
    "selections": selections,
    "parts": parts,
    "crossover": crossover,
    "end_to_end": end_to_end,
    "true_caches": true_caches,
    "whole_steps_by_selection": whole_steps_by_selection,
    "small_shapes": small_shapes,
    "paper": paper,
    "beside_attention": beside_attention,
    "prefill": prefill,
}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def wanted() -> Iterator[tuple[str, str]]:
    """Make every file with its tables, one after the other → (name, text)."""
    yield CROSSOVER, crossover_file()
    for page in PAGES:
        text = (ROOT / page).read_text()
        yield page, BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> int:
    """Write or check every table; returns the exit status."""
    is_check, n_stale = "--check" in sys.argv, 0
    for name, text in wanted():
        if (ROOT / name).read_text() != text:
            n_stale += 1
            if is_check:
                print(f"{name}: not what docs/results says")
            else:
                (ROOT / name).write_text(text)
    return int(is_check and n_stale > 0)


if __name__ == "__main__":
    sys.exit(main())
