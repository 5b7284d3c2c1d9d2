"""Fills the tables in README.md and docs/ from the JSON files that commands wrote: python docs/make_tables.py.

It also writes what the command line needs of them, fast/crossover.json.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; with --check, nothing is written and the exit status
is 1 if any table is not what its file says.
"""

import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path

from resa.reference.evals.evidence import without

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/training.md", "docs/evidence.md", "docs/performance.md", "docs/kernels.md")
CROSSOVER = "fast/crossover.json"


def load(name: str) -> dict:
    """A result by its path below the root."""
    return json.loads((ROOT / name).read_text())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(values: list[float], digits: int = 4) -> str:
    """An interval of confidence in brackets."""
    return f"[{values[0]:.{digits}f}, {values[1]:.{digits}f}]"


def fidelity() -> str:
    """What each way of decoding loses against dense decoding."""
    result = load("docs/results/fidelity.json")
    head = ["decoding", "KL from dense (nats)", "of it drift [95 %]", "less than sparse by [95 %]", "same top token"]
    rows = [
        [
            name,
            f"{row['kl']:.4f}",
            f"{row['drift_kl']:.4f} {interval(row['drift_kl_95'])}" if row["drift_kl"] else "0",
            f"{row['gain_over_sparse']:.4f} {interval(row['gain_over_sparse_95'])}" if row["gain_over_sparse"] else "–",
            f"{row['agreement']:.1%}",
        ]
        for name, row in sorted(result["variants"].items(), key=lambda pair: -pair[1]["kl"])
    ]
    config = result["config"]
    note = (
        f"{result['documents']} held-out library modules, {result['tokens_each']} tokens each after a prompt of 4,096; "
        f"active ratio {config['active_ratio']}, schedule `{config['schedule']}`; bootstrap over modules; "
        f"{result['device']}."
    )
    return markdown(head, rows) + "\n\n" + note


def language() -> str:
    """How good the model is."""
    result = load("docs/results/language.json")
    position = result["position"]
    rows = [
        ["bits per byte, held-out library", f"{result['bits_per_byte']:.3f}"],
        ["the same by `xz -9e`, file by file", f"{result['bits_per_byte_xz']:.3f}"],
        ["fewer bits than `xz -9e`", f"{result['fewer_bits_than_xz']:.1%}"],
        ["nats per token at positions 256 to 1,024 of the long modules", f"{position['nats_256_to_1024']:.3f}"],
        ["from 4,096 on", f"{position['nats_from_4096']:.3f}"],
        ["late less early, over modules [95 %]", interval(position["difference_95"])],
        ["from 4,096 on, seeing only 1,024 tokens", f"{position['nats_from_4096_seeing_1024']:.3f}"],
        ["difference that the context makes [95 %]", interval(position["context_gain_95"])],
    ]
    rows += [
        [f"lookups over {int(distance):,} tokens, {name} decoding", f"{share:.1%}"]
        for distance, shares in result["lookups"]["accuracy"].items()
        for name, share in shares.items()
    ]
    note = (
        f"{result['documents']} modules of {result['bytes']:,} bytes, {position['documents']} of them long; "
        f"{result['lookups']['probes']} lookups per distance, sparse ones at active ratio "
        f"{result['lookups']['active_ratio']}; {result['device']}, Python {result['python']}."
    )
    return markdown(["measure", "value"], rows) + "\n\n" + note


def curve() -> str:
    """Loss over the two training runs; the second counts on from the first."""
    log = load("docs/results/training.json")
    head = [
        "run",
        "step",
        "tokens (millions)",
        "loss on the batch",
        "loss on held-out library",
        "lookups at 1,024",
        "at 4,096",
    ]
    rows = [
        [
            run["name"],
            f"{line['step']:,}",
            f"{line['tokens'] / 1e6:.0f}",
            f"{line['loss']:.3f}",
            f"{line['held_out_loss']:.3f}",
            f"{line['lookup_accuracy']['1024']:.0%}",
            f"{line['lookup_accuracy']['4096']:.0%}",
        ]
        for run in log["runs"]
        for line in run["evaluations"]
    ]
    return markdown(head, rows)


STEP = ("append", "score", "select", "attend")
EXTRA = ("score, 8-bit bounds", "dense, this project's kernel")


def attention_rows() -> tuple[dict, list[dict]]:
    """The attention measurement, and of its rows those of the widths that the tables show."""
    result = load("docs/results/attention.json")
    return result, [row for row in result["rows"] if row["batch"] == 8 and row["context"] in (2**14, 2**16, 2**18)]


def setting(result: dict) -> str:
    """What was measured on what, in a sentence."""
    shape, config = result["shape"], result["config"]
    return (
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}; copy bandwidth in the same run "
        f"{result['copy_tbs']:.2f} TB/s. {shape['query_heads']} query and {shape['kv_heads']} KV heads, head dimension "
        f"{shape['head_dim']}, {shape['dtype']}, block size {config['block_size']}, active ratio "
        f"{config['active_ratio']}, interval {config['interval']}. `{result['command']}`, commit {result['commit']}."
    )


def spread(time: dict, digits: int = 1) -> str:
    """A median with its quartiles."""
    return f"{time['us']:.{digits}f} [{time['low']:.{digits}f}, {time['high']:.{digits}f}]"


def attention() -> str:
    """ReSA and dense attention per layer and token."""
    result, rows = attention_rows()
    head = ["context", "dense, flash", "dense, cuDNN", "ReSA, sum of parts", "dense ÷ sum", "ReSA, whole cycles"]
    table = [
        [
            f"{row['context'] // 1024}K",
            spread(row["dense"]["flash"]),
            spread(row["dense"]["cudnn"]),
            f"{row['sum_us']:.1f}",
            f"{row['dense_us'] / row['sum_us']:.2f}",
            spread(row["resa"]),
        ]
        for row in rows
    ]
    return markdown(head, table) + f"\n\nµs per layer and token, batch 8; medians [quartiles]. {setting(result)}"


def parts() -> str:
    """Every part of a cycle, with its floor."""
    _, rows = attention_rows()
    table = []
    for part in (*STEP, "refresh", "rectify", "rectify, without a pause", *EXTRA):
        if part not in rows[0]["parts"]:
            continue
        line = [part]
        for row in rows:
            floor = row["floor_us"].get(part.removesuffix(", without a pause"))
            share = f"; {floor / row['parts'][part]['us']:.0%} of {floor:.0f}" if floor and floor > 1 else ""
            line.append(spread(row["parts"][part]) + share)
        table.append(line)
    head = ["part", *(f"{row['context'] // 1024}K" for row in rows)]
    note = (
        "µs per call, batch 8; medians [quartiles]; where bytes limit the part, the share reached of the floor: its "
        "bytes at the copy bandwidth of the same run. `refresh` and `rectify` come once per interval."
    )
    return markdown(head, table) + "\n\n" + note


def crossover() -> str:
    """Dense time over ReSA time for every batch and context."""
    result = load("docs/results/attention.json")
    contexts = sorted({row["context"] for row in result["rows"]})
    ratios = {(row["batch"], row["context"]): row["ratio"] for row in result["rows"]}
    table = [
        [str(batch), *(f"{ratios[batch, context]:.2f}" if (batch, context) in ratios else "–" for context in contexts)]
        for batch in sorted({row["batch"] for row in result["rows"]})
    ]
    return markdown(["batch", *(f"{context // 1024}K" for context in contexts)], table)


def crossover_file() -> str:
    """What `resa generate` sets `dense_below` from."""
    result = load("docs/results/attention.json")
    keys = ("batch", "context", "dense_us", "resa_us")
    kept = {name: result[name] for name in ("device", "torch", "triton", "commit", "command", "shape")}
    kept["shape"] |= {name: result["config"][name] for name in ("block_size", "active_ratio", "interval")}
    rows = ",\n".join("  " + json.dumps({key: row[key] for key in keys}) for row in result["rows"])
    return json.dumps(kept, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


def end_to_end_results() -> list[dict]:
    """The measurements of whole decoding steps, one per command that was run."""
    return [load(str(path.relative_to(ROOT))) for path in sorted((ROOT / "docs/results").glob("end_to_end*.json"))]


def end_to_end_rows(protocol: str) -> list[dict]:
    """Their rows of one protocol, ordered by weights, batch and context."""
    rows = {}
    for result in end_to_end_results():
        for row in result["rows"]:
            point = row["weights"], row["batch"], row["context"]
            if row["protocol"] == protocol:
                if point in rows:
                    raise ValueError(f"docs/results/end_to_end*.json: {point} was measured twice; drop a file")
                rows[point] = row
    return [rows[point] for point in sorted(rows)]


def end_to_end_table(protocol: str) -> str:
    """Whole decoding steps: dense, sparse, ReSA."""
    head = ["weights", "batch", "context", "dense", "sparse", "ReSA", "tokens/s", "dense ÷ ReSA", "limit by bytes"]
    table = []
    for row in end_to_end_rows(protocol):
        times = {"dense": row["dense_us"], "sparse": row["sparse"]["us"], "resa": row["resa"]["us"]}
        cells = [f"{us / 1e3:.2f} ({row['floor_us'][name] / us:.0%})" for name, us in times.items()]
        limit = row["floor_us"]["dense"] / row["floor_us"]["resa"]
        rate = row["batch"] / row["resa"]["us"] * 1e6
        point = [row["weights"], str(row["batch"]), f"{row['context'] // 1024}K"]
        table.append([*point, *cells, f"{rate:,.0f}", f"**{row['ratio']:.2f}**", f"{limit:.2f}"])
    return markdown(head, table)


def end_to_end_setting() -> str:
    """What was measured on what, by which commands."""
    results = end_to_end_results()
    first, config = results[0], results[0]["config"]
    devices = ", ".join(sorted({result["device"] for result in results}))
    copies = sorted(result["copy_tbs"] for result in results)
    commands = "; ".join(f"`{result['command']}`, commit {result['commit']}" for result in results)
    tokens = " or ".join(sorted({chosen_how(result) for result in results}))
    return (
        f"ms per step (share of the memory roofline: bytes at the copy bandwidth of the same run, {copies[0]:.2f} to "
        f"{copies[-1]:.2f} TB/s); medians. Tokens {tokens}. {devices}, torch {first['torch']}, triton "
        f"{first['triton']}; block size {config['block_size']}, active ratio {config['active_ratio']}, interval "
        f"{config['interval']}. {commands}."
    )


def chosen_how(result: dict) -> str:
    """How the tokens of a measurement were chosen."""
    sampling = result["sampling"]
    if sampling["temperature"] == 0:
        return "greedy"
    return f"sampled, temperature {sampling['temperature']}, top-p {sampling['top_p']}"


def end_to_end() -> str:
    """All layers share one cache, as in the paper."""
    return end_to_end_table("shared") + "\n\n" + end_to_end_setting()


def true_caches() -> str:
    """Every layer has a cache of its own."""
    return end_to_end_table("true") if end_to_end_rows("true") else "Not measured yet."


PAPER = {"float16": ("16-bit", "2.28"), "int4": ("4-bit", "2.42 to 2.44")}  # arXiv 2506.04108, 8 × 256K on an A100


def paper() -> str:
    """The paper's speed-up beside this project's, at the point that both measured."""
    rows = {row["weights"]: row for row in end_to_end_rows("shared") if (row["batch"], row["context"]) == (8, 2**18)}
    head = ["weights", "paper, A100", "this project, H100", "limit by bytes", "dense, ms", "ReSA, ms"]
    table = [
        [
            name,
            ratio,
            f"**{rows[weights]['ratio']:.2f}**",
            f"{rows[weights]['floor_us']['dense'] / rows[weights]['floor_us']['resa']:.2f}",
            f"{rows[weights]['dense_us'] / 1e3:.2f}",
            spread({key: value / 1e3 for key, value in rows[weights]["resa"].items()}, digits=2),
        ]
        for weights, (name, ratio) in PAPER.items()
        if weights in rows
    ]
    tokens = " or ".join(sorted({chosen_how(result) for result in end_to_end_results()}))
    note = f"8 sequences of 256K tokens, one cache shared by all layers, tokens {tokens}; speed-up over dense decoding."
    return markdown(head, table) + "\n\n" + note


def beside_attention() -> str:
    """What a step does beside attention."""
    columns = {}
    for result in end_to_end_results():
        for name, about in result["weights"].items():
            for batch, parts in about["parts"].items():
                columns[name, int(batch)] = parts
    ends = {1, max(batch for _, batch in columns)}
    columns = {key: columns[key] for key in sorted(columns) if key[1] in ends}
    lines = []
    for what in ("step", "rectification"):
        products = "matrix products", "matrix products, the library's tiles", "matrix products by torch"
        for part in (*products, "elementwise work"):
            name = f"{what}: {part}, per layer"
            cells = [spread(parts[name]) if name in parts else "–" for parts in columns.values()]
            is_same = what == "rectification" and "tiles" in part  # for so many rows they are the library's anyway
            if set(cells) != {"–"} and not is_same:
                lines.append([name, *cells])
    for name in ("output projection", "sampling, greedy", "sampling, temperature 0.7, top_p 0.95"):
        lines.append([name, *(spread(parts[name]) for parts in columns.values())])
    note = "µs; medians [quartiles]. Elementwise work: residuals, norms, RoPE, SwiGLU."
    return markdown(["part", *(f"{name}, batch {batch}" for name, batch in columns)], lines) + "\n\n" + note


def evidence(part: str) -> dict:
    """The result of one part of the evidence."""
    return load(f"docs/results/evidence/{part}.json")


def within(row: dict, name: str, digits: int = 3) -> str:
    """A mean and its 95 % interval."""
    return f"{row[name]:.{digits}f} {interval(row[f'{name}_95'], digits)}"


def measured(result: dict) -> str:
    """The command and the machine of a part."""
    command = " ".join(without(shlex.split(result["command"]), ["--device", "--out"]))  # not the same elsewhere
    return f"`{command}`; {result['device']}, {result['seconds']:.0f} s."


def evidence_paired() -> str:
    """The loss of every way to decode, differences taken document by document."""
    result = evidence("drift")
    lines = []
    for name, row in result["variants"].items():
        gain = "–" if name == "sparse" else within(row, "gain_over_sparse", 4)
        drift = "0" if name == "decode-only" else within(row, "drift_kl", 4)
        lines.append([name, within(row, "kl", 4), drift, gain, f"{row['agreement']:.1%}"])
    head = ["decoding", "KL from dense (nats)", "of it drift", "less than sparse by", "same top token"]
    note = f"{result['documents']} documents, {result['tokens_each']} tokens each{settings_of(result['config'])}"
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def settings_of(config: dict) -> str:
    """What a table's note says of the configuration."""
    ratio, b, fewest = config["active_ratio"], config["block_size"], config["min_blocks"]
    return f"; active ratio {ratio}, block size {b}, at least {fewest} blocks; means [95 %]."


def evidence_drift() -> str:
    """Top-3 accuracy, KL and drift along the text."""
    result = evidence("drift")
    curves = result["by_position"]
    starts = curves["dense"]["from"]
    lines = []
    for name, parts in curves.items():
        for what, key in (("top-3 accuracy", "accuracy"), ("KL from dense", "kl"), ("mean drift so far", "mean_drift")):
            if key in parts:
                pairs = zip(parts[key], parts[f"{key}_95"], strict=True)
                lines.append([name, what, *(f"{value:.3f} {interval(ends, 3)}" for value, ends in pairs)])
    head = ["decoding", "what", *(f"from token {start:,}" for start in starts)]
    note = f"{result['documents']} documents{settings_of(result['config'])}"
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_split() -> str:
    """The loss of every variant, as step error and drift."""
    result = evidence("sweep")
    titles = {"suffix": "suffix, never rectified", "interval": "interval", "active_ratio": "active ratio",
              "block_size": "block size", "dense_layers": "dense layers", "schedule": "schedule"}  # fmt: skip
    lines = []
    for factor, rows in result["factors"].items():
        for row in rows:
            value = row["suffix"] if factor == "suffix" else row[factor]
            cells = [within(row, name) for name in ("accuracy", "kl", "kl_step_error", "kl_drift")]
            share = recovered(row["kl_recovered"], row["kl_recovered_95"])
            lines.append([titles[factor], "never" if value is None else str(value), *cells, share])
    base = result["base"]["config"]
    head = ["factor", "value", "top-3 accuracy", "KL from dense", "of it step error", "of it drift", "drift recovered"]
    note = (
        f"{result['documents']} documents of {result['document_tokens']:,} tokens, the last {result['scored']} "
        f"predictions of each; dense top-3 accuracy {within(result, 'dense_accuracy')}. Where nothing else is said: "
        f"interval {base['interval']}, active ratio {base['active_ratio']}, block size {base['block_size']}, schedule "
        f"`{base['schedule']}`, at least {base['min_blocks']} blocks, a suffix of "
        f"{result['base']['suffix']}. Means [95 %]."
    )
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_grid() -> str:
    """KL from dense on source code, split, for every interval and ratio."""
    result = evidence("sweep_wide")
    rows = {(row["interval"], row["active_ratio"]): row for row in result["factors"]["grid"]}
    ratios = sorted({ratio for _, ratio in rows if ratio < 1})  # with every block there is nothing to lose
    lines = [["step error", *(within(rows[None, ratio], "kl_step_error") for ratio in ratios)]]
    for f in dict.fromkeys(interval for interval, _ in rows):
        if f != 1:  # decode-only, which has no drift
            name = "never" if f is None else f"f = {f}"
            lines.append([f"drift, {name}", *(within(rows[f, ratio], "kl_drift") for ratio in ratios)])
    head = ["KL from dense (nats)", *(f"p = {ratio}" for ratio in ratios)]
    config = result["base"]["config"]
    note = (
        f"{result['documents']} documents of {result['document_tokens']:,} tokens, a suffix of "
        f"{result['base']['suffix']}, the last {result['scored']} predictions; schedule `{config['schedule']}`, "
        f"block size {config['block_size']}, at least {config['min_blocks']} blocks; means [95 %]."
    )
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def recovered(share: float | None, ends: list[float | None] | None) -> str:
    """A share of the drift; none where there is so little drift that it could be anything of it."""
    return "–" if share is None or None in ends else f"{share:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]"


def evidence_speculation() -> str:
    """What a dense pass yields, and how much of the output is dense decoding's."""
    result = evidence("speculation")
    lines = []
    for name, row in result["variants"].items():
        names = ("drafted", "accepted", "tokens_per_pass", "same_tokens")
        # What rectification reads is a formula, and has no spread.
        read = within(row, "read", 2) if "drafted" in row else f"{row['read']:.2f}"
        lines.append([name, *(within(row, each, 1) if each in row else "–" for each in names), read])
    head = ["decoding", "drafts per pass", "accepted", "tokens per pass", "tokens before the first other", "reads"]
    note = (
        f"{result['documents']} documents, {result['tokens_each']} tokens each, greedy{settings_of(result['config'])}"
    )
    note += " Other: than dense decoding's. Reads: KV bytes per token, dense decoding being 1 (eq. 6)."
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_selection() -> str:
    """Attention mass left out, by way of scoring."""
    result = evidence("selection")
    lines = []
    for name, row in (*result["mass_left_out"].items(), ("certified bound of pooled", result["certified_bound"])):
        layers = row["layers"]
        lines.append(
            [name, within(row, "mean"), f"{min(layers):.3f}", f"{max(layers):.3f}", str(layers.index(max(layers)))]
        )
    head = ["blocks by", "mass left out", "best layer", "worst layer", "which"]
    note = f"{result['documents']} documents, {result['tokens_each']} tokens each{settings_of(result['config'])}"
    note += f" {result['certified_bound']['violations']} violations of the bound."
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_carried(part: str = "carried") -> str:
    """Values carried along given programs, by ratio and interval."""
    result = evidence(part)
    lines = []
    for row in result["rows"]:
        if row["ratio"] > 0.2:  # those say nothing new
            continue
        depths = " / ".join(f"{share:.2f}" for share in row["by_depth"])
        drift = "0" if row["interval"] == "decode-only" else within(row, "drift")
        share = recovered(row["recovered"], row["recovered_95"])
        lines.append([str(row["ratio"]), str(row["interval"]), within(row, "right"), drift, share, depths])
    head = ["ratio", "interval", "right", "of the loss drift", "drift recovered", "right at depth 0 / 1 / 2 / 3 / 4"]
    first = result["rows"][0]
    note = (
        f"{result['programs']} programs of {result['length']:,} tokens, {result['prompt_tokens']} of them prefilled, "
        f"{result['checks']:,} values; dense decoding gets {within(first, 'dense', 4)} right. Schedule "
        f"`{result['config']['schedule']}`, block size {result['config']['block_size']}, at least "
        f"{result['config']['min_blocks']} blocks; means over programs [95 %]."
    )
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_scores() -> str:
    """Values carried along given programs, by how blocks are scored."""
    result = evidence("carried_scores")
    lines = []
    for score in dict.fromkeys(row["score"] for row in result["rows"]):
        rows = {row["interval"]: row for row in result["rows"] if row["score"] == score}
        never = rows.pop("never")
        exact = rows.pop("decode-only")
        ((f, resa),) = rows.items()
        share = recovered(resa["recovered"], resa["recovered_95"])
        lines.append(
            [
                score,
                within(exact, "step_error"),
                within(never, "drift"),
                within(resa, "drift"),
                within(resa, "right"),
                share,
            ]
        )
    head = [
        "blocks by",
        "step error",
        "drift, never rectified",
        f"drift, f = {f}",
        f"right, f = {f}",
        "drift recovered",
    ]
    note = f"{result['programs']} programs of {result['length']:,} tokens, {result['checks']:,} values"
    return (
        markdown(head, lines)
        + f"\n\n{note}{settings_of({**result['config'], 'active_ratio': resa['ratio']})} {measured(result)}"
    )


def evidence_free() -> str:
    """What dense decoding makes of the text that every way writes by itself, along it."""
    result = evidence("free")
    lines = []
    for name, way in result["ways"].items():
        for what, key in (("among dense's three likeliest", "likely"), ("surprise (nats)", "surprise"),
                          ("KL from dense", "kl"), ("mean drift so far", "mean_drift")):  # fmt: skip
            if name != "dense" or key in ("likely", "surprise"):
                lines.append([name, what, within(way, key), *(within(part, key) for part in way["by_position"])])
    starts = range(0, result["tokens_each"], result["width"])
    head = ["decoding", "what", "in all", *(f"from token {start:,}" for start in starts)]
    note = f"{result['documents']} prompts, {result['tokens_each']} tokens each, sampled at temperature "
    note += f"{result['temperature']:g} with the same random numbers{settings_of(result['config'])}"
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_layers() -> str:
    """Attention mass that the specification's scores leave out, by layer and length of the prompt."""
    results = {name: evidence(name) for name in ("selection", "selection_4096")}
    columns = {name: result["mass_left_out"]["pooled"] for name, result in results.items()}
    lines = [
        [
            str(layer),
            *(f"{row['layers'][layer]:.3f} {interval(row['layers_95'][layer], 3)}" for row in columns.values()),
        ]
        for layer in range(len(columns["selection"]["layers"]))
    ]
    lines.append(["mean", *(within(row, "mean") for row in columns.values())])
    commands = [shlex.split(result["command"]) for result in results.values()]
    lengths = [int(words[words.index("--prompt-tokens") + 1]) for words in commands]
    head = ["layer", *(f"prompt of {length:,}" for length in lengths)]
    first = results["selection"]
    note = (
        f"{first['documents']} documents, {first['tokens_each']} tokens each; mass left out by *pooled*; means [95 %]."
    )
    return markdown(head, lines) + f"\n\n{note} " + " ".join(measured(result) for result in results.values())


def evidence_written() -> str:
    """Assertions in programs that the model wrote."""
    result = evidence("written")
    lines = []
    for name, row in result["ways"].items():
        below = within(row, "below_decode_only") if name.startswith(("sparse", "ReSA")) else "–"
        curve = " / ".join(f"{share:.2f}" for share in row["by_position"][1::2])
        share = recovered(row["recovered"], row["recovered_95"])
        lines.append([name, within(row, "right"), below, share, f"{row['checked']:.1f}", curve])
    head = ["decoding", "right", "less than decode-only by", "of that recovered", "checked per program"]
    head += ["right along the text"]
    note = (
        f"{result['programs']} programs, {result['tokens_each']:,} tokens each after {result['prompt_tokens']}, "
        f"sampled at temperature 1 with the same random numbers{settings_of(result['config'])} Along the text: every "
        f"second stretch of {result['width']} tokens. Backend {result['backend']}."
    )
    return markdown(head, lines) + f"\n\n{note} {measured(result)}"


def evidence_retrieval() -> str:
    """Questions answered exactly, by family, length and ratio."""
    results = [evidence("retrieval"), evidence("retrieval_16384")]
    all_rows = [row for result in results for row in result["rows"]]
    ratios = sorted({row["ratio"] for row in all_rows}, reverse=True)
    lines = []
    for family in dict.fromkeys(row["family"] for row in all_rows):
        rows = {(row["length"], row["ratio"]): row for row in all_rows if row["family"] == family}
        for length in sorted({length for length, _ in rows}):
            ways = [rows[length, ratios[0]]["dense"], *(rows[length, ratio]["sparse"] for ratio in ratios)]
            ways.append(rows[length, 0.1]["decode-only"])
            cells = [f"{way['right']:.2f} {interval(way['right_95'], 2)}" for way in ways]
            lines.append([family.replace("_", " "), f"{length:,}", *cells])
    head = ["family", "tokens", "dense", *(f"sparse, p = {ratio}" for ratio in ratios), "decode-only, p = 0.1"]
    config, (n_each, n_longest) = results[0]["config"], (result["examples"] for result in results)
    longest = max(row["longest_answer"] for row in all_rows)
    assert longest < config["interval"], "some answers are rectified: ReSA needs columns of its own"
    note = (
        f"{n_each} questions each, {n_longest} at 16,384 tokens; shares answered exactly, Wilson's intervals [95 %]. "
        f"Block size {config['block_size']}, at least {config['min_blocks']} blocks. No answer has more than {longest} "
        f"tokens, so none reaches a rectification every {config['interval']}: ReSA gives what sparse decoding gives."
    )
    return markdown(head, lines) + f"\n\n{note} " + " ".join(measured(result) for result in results)


RHYTHMS = {"rectified": "every 32 tokens", "never": "never"}  # of training, by what its results are called


def evidence_training() -> str:
    """What training with sparse steps does to both errors, ratio 0.1."""
    lines = []
    runs = [run["train"]["steps"] for run in load("reference/assets/carrying.json")["runs"]]
    for name, rhythm in RHYTHMS.items():
        for stage in ("second", "third"):
            result = evidence(f"training/{name}_{stage}")
            rows = {row["interval"]: row for row in result["rows"] if row["ratio"] == 0.1}
            exact, own, never = rows["decode-only"], rows[32], rows["never"]
            share = recovered(own["recovered"], own["recovered_95"])
            steps = str({"second": runs[1], "third": runs[1] + runs[2]}[stage])
            lines.append([rhythm, steps, within(exact, "step_error"), within(never, "drift"), share])
    head = ["rectified in training", "steps that decode", "step error", "drift of sparse", "recovered at f = 32"]
    return (
        markdown(head, lines)
        + f"\n\n{result['programs']} programs of {result['length']:,} tokens, ratio 0.1; 16-bit weights; "
        f"means [95 %]. {result['device']}."
    )


def evidence_training_written() -> str:
    """The same models, those of all steps, in programs that they write by themselves."""
    lines = []
    for name, rhythm in RHYTHMS.items():
        result = evidence(f"training/written_{name}_third")
        sparse, resa, exact = (result["ways"][way] for way in ("sparse", "ReSA", "decode-only"))
        right = [within(way, "right", 2) for way in (sparse, resa, exact)]
        share = recovered(resa["recovered"], resa["recovered_95"])
        lines.append([rhythm, *right, within(sparse, "below_decode_only"), share])
    head = ["rectified in training", "sparse", "ReSA", "decode-only", "sparse less than decode-only by", "recovered"]
    return (
        markdown(head, lines)
        + f"\n\nShare of assertions that are right. {result['programs']} programs, {result['tokens_each']:,} tokens "
        f"each; f = {result['config']['interval']}{settings_of(result['config'])} {result['device']}."
    )


TABLES = {
    "evidence_carried": evidence_carried,
    "evidence_fused": partial(evidence_carried, "carried_fused"),
    "evidence_scores": evidence_scores,
    "evidence_free": evidence_free,
    "evidence_layers": evidence_layers,
    "evidence_written": evidence_written,
    "evidence_retrieval": evidence_retrieval,
    "evidence_training": evidence_training,
    "evidence_training_written": evidence_training_written,
    "evidence_paired": evidence_paired,
    "evidence_drift": evidence_drift,
    "evidence_split": evidence_split,
    "evidence_grid": evidence_grid,
    "evidence_speculation": evidence_speculation,
    "evidence_selection": evidence_selection,
    "fidelity": fidelity,
    "language": language,
    "curve": curve,
    "attention": attention,
    "parts": parts,
    "crossover": crossover,
    "end_to_end": end_to_end,
    "true_caches": true_caches,
    "paper": paper,
    "beside_attention": beside_attention,
}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write or check every table; returns the exit status."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        filled = BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)
        if filled != text:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(filled)
    path = ROOT / CROSSOVER
    if not path.exists() or path.read_text() != crossover_file():
        stale.append(CROSSOVER)
        if "--check" not in sys.argv:
            path.write_text(crossover_file())
    if "--check" in sys.argv:
        print("\n".join(f"{page}: not what docs/results says" for page in stale), end="\n" if stale else "")
        return 1 if stale else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
