"""Fills the tables in README.md and docs/ from the JSON files that commands wrote: python docs/make_tables.py.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; with --check, nothing is written and the exit status
is 1 if any table is not what its file says.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/training.md")


def load(name: str) -> dict:
    """A result by its path below the root."""
    return json.loads((ROOT / name).read_text())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(values: list[float]) -> str:
    """An interval of confidence in brackets."""
    return f"[{values[0]:.4f}, {values[1]:.4f}]"


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


TABLES = {"fidelity": fidelity, "language": language, "curve": curve}
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
    if "--check" in sys.argv:
        print("\n".join(f"{page}: a table is not what its file says" for page in stale), end="\n" if stale else "")
        return 1 if stale else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
