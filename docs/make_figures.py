"""Draw the figures of docs/ from the JSON files that commands wrote: python docs/make_figures.py.

With --check nothing is written, and the exit status is 1 if any figure is not what its file says. Equal numbers give
equal bytes with the version of matplotlib in constraints.txt.
"""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
STYLE = "resa.reference.weights.assets.figure"
COLOURS = [f"C{index}" for index in range(5)]


def load(part: str) -> dict:
    """Read the result of one part of the evidence."""
    return json.loads((ROOT / "docs" / "results" / "evidence" / f"{part}.json").read_text())


def errors(means: list[float], intervals: list[list[float]]) -> np.ndarray:
    """Distances of the ends of the intervals from the means: [2, means]; NaN where there is no interval."""
    (low, high), middle = np.array(intervals, dtype=float).T, np.array(means, dtype=float)
    return np.stack([middle - low, high - middle])


def real_model(figure: Figure) -> None:
    """The loss of every way on the real model, in two parts, on two kinds of text."""
    for axes, text in zip(figure.subplots(1, 2, sharey=True), ("english", "code"), strict=True):
        rows = {row["way"]: row for row in load(f"fidelity_{text}")["rows"]}
        names = [name.replace("ReSA f=", "f = ") for name in rows]
        steps, drifts = ([row[part] for row in rows.values()] for part in ("step_error", "drift"))
        ends = errors([row["kl"] for row in rows.values()], [row["kl_95"] for row in rows.values()])
        axes.barh(names, steps, color="0.75", label="step error: blocks not read")
        axes.barh(names, drifts, left=steps, xerr=ends, color=COLOURS[0], ecolor="0.4", label="drift")
        axes.set(xlabel="nats lost per token", title={"english": "English", "code": "Python source"}[text])
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def carried_values(figure: Figure) -> None:
    """Share of carried values right, by interval, one line per ratio, and decode-only beside it."""
    axes, result = figure.subplots(), load("carried")
    names = [row["interval"] for row in result["rows"] if row["ratio"] == 0.1 and row["interval"] != "decode-only"]
    names = [*sorted(name for name in names if name != "never"), "never"]
    for ratio, colour in zip((0.02, 0.05, 0.1, 0.2), COLOURS, strict=False):
        rows = {row["interval"]: row for row in result["rows"] if row["ratio"] == ratio}
        chosen = [rows[name] for name in names]
        right = [row["right"] for row in chosen]
        bars = errors(right, [row["right_95"] for row in chosen])
        axes.errorbar(range(len(names)), right, bars, color=colour, capsize=2, label=f"p = {ratio}")
        axes.axhline(rows["decode-only"]["right"], color=colour, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(names)), [str(name) for name in names])
    axes.set(xlabel="tokens between rectifications (f)", ylabel="share of carried values right")
    axes.set_title("Dotted: decode-only, whose cache is exact")
    axes.set_ylim(bottom=axes.get_ylim()[0] - 0.06)  # room for the legend
    axes.legend(frameon=False, loc="lower center", ncols=4)


def what_is_left(figure: Figure) -> None:
    """Both errors on the real model by the share of blocks that is read, one pair of lines per block size."""
    for axes, text in zip(figure.subplots(1, 2, sharey=True), ("english", "code"), strict=True):
        rows = [row for row in load(f"sweep_{text}")["rows"] if row["way"] == "ReSA f=32"]
        for size, colour in zip((8, 16, 32, 64), COLOURS, strict=False):
            own = [row for row in rows if row["block_size"] == size]
            ratios = [row["ratio"] for row in own]
            axes.plot(ratios, [row["step_error"] for row in own], color=colour, marker=".", label=f"blocks of {size}")
            axes.plot(ratios, [row["drift"] for row in own], color=colour, linestyle=":")
        axes.set(
            xscale="log", yscale="log", xlabel="active ratio p", title={"english": "English", "code": "Python"}[text]
        )
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("nats lost per token")
    figure.axes[0].legend(frameon=False)


def drawn(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    """Draw a figure as SVG."""
    with plt.style.context(STYLE):
        figure, buffer = plt.figure(figsize=size, layout="constrained"), io.BytesIO()
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # A tenth of a point is finer than most screens. Labels stand outside of the tags.
    return re.sub(rb"<[^>]*>", lambda tag: re.sub(rb"(\.\d)\d+", rb"\1", tag[0]), buffer.getvalue())


FIGURES = {
    "real.svg": (real_model, (10, 3.6)),
    "carried.svg": (carried_values, (6.5, 3.8)),
    "left.svg": (what_is_left, (10, 3.8)),
}


def main() -> int:
    """Write or check every figure; returns the exit status."""
    stale = []
    for name, (draw, size) in FIGURES.items():
        path, content = IMAGES / name, drawn(draw, size)
        if not path.exists() or path.read_bytes() != content:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_bytes(content)
    if "--check" in sys.argv and stale:
        print("\n".join(f"{name}: not what docs/results says" for name in stale))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
