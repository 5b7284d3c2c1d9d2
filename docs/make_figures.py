"""Draw the figures of docs/ from the JSON files that commands wrote: python docs/make_figures.py.

With --check nothing is written, and the exit status is 1 if any figure is not what its file says. Equal numbers give
equal bytes with the version of matplotlib in constraints.txt.
"""

import io
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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


def carried(axes: plt.Axes) -> None:
    """Share of carried values right, by interval, one line per ratio, and decode-only beside it."""
    result = load("carried")
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
    axes.set_title("Along given programs (dotted: decode-only)")
    axes.set_ylim(bottom=axes.get_ylim()[0] - 0.06)  # room for the legend
    axes.legend(frameon=False, loc="lower center", ncols=4)


def written(axes: plt.Axes) -> None:
    """Share of assertions right in programs that the model wrote, along them."""
    result = load("written")
    for place, ((name, row), colour) in enumerate(
        zip(result["ways"].items(), (*COLOURS[4:], *COLOURS[:4]), strict=True)
    ):
        right = row["by_position"]
        edges = np.minimum(np.arange(len(right) + 1) * result["width"], result["tokens_each"])
        at = (edges[:-1] + edges[1:]) / 2 + 20 * (place - 2)  # side by side, to keep the bars apart
        bars = errors(right, row["by_position_95"])
        axes.errorbar(at, right, bars, color=colour, marker=".", capsize=2, elinewidth=0.8, label=name)
    axes.set(xlabel="tokens written", ylabel="share right, of assertions of names with a value")
    f, ratio = result["config"]["interval"], result["config"]["active_ratio"]
    axes.set_title(f"In programs that the model writes itself (f = {f}, p = {ratio})")
    axes.legend(frameon=False)


def carried_values() -> bytes:
    """Draw both, side by side."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
        carried(axes[0])
        written(axes[1])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # A hundredth of a point is finer than any screen.
    return re.sub(rb"(\.\d\d)\d+", rb"\1", buffer.getvalue())


FIGURES = {"carried.svg": carried_values}


def main() -> int:
    """Write or check every figure; returns the exit status."""
    stale = []
    for name, draw in FIGURES.items():
        path, content = IMAGES / name, draw()
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
