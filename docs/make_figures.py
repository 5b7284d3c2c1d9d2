"""Draw the figures of docs/ from the JSON files that commands wrote: python docs/make_figures.py.

With --check nothing is written, and the exit status is 1 if any figure is not what its file says. Equal numbers give
equal bytes with the version of matplotlib in constraints.txt.
"""

import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resa.reference.config import ReSAConfig
from resa.reference.lab.fidelity import read_ratio
from resa.reference.lab.scorers import own_scorer

ROOT = Path(__file__).parent.parent
IMAGES, RESULTS = ROOT / "docs" / "images", ROOT / "docs" / "results"
STYLE = "resa.reference.weights.assets.figure"
COLOURS = [f"C{index}" for index in range(5)]
TEXTS = {"english": "English", "code": "Python source"}

# Settings: how blocks are scored, the active ratio, the interval (None: never rectified).
Setting = tuple[str, float, int | None]
PAPER, RECOMMENDED = ("pooled", 0.1, 32), ("sketch-2", 0.1, 32)
SCORES = {"pooled": "bounds", "sketch-1": "sketches, 1 bit", "sketch-2": "sketches, 2 bits"}
WEIGHTS = {"float16": "16-bit weights", "int4": "4-bit weights"}
HEAD_DIM = 64  # of the model whose loss is drawn
TIMED_AT = 2**18  # tokens of context


def load(name: str) -> dict:
    """Read a result by its path below docs/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def errors(means: list[float], intervals: list[list[float]]) -> np.ndarray:
    """Distances of the ends of the intervals from the means: [2, means]; NaN where there is no interval."""
    (low, high), middle = np.array(intervals, dtype=float).T, np.array(means, dtype=float)
    return np.stack([middle - low, high - middle])


def two_panels(figure: Figure) -> np.ndarray:
    """Two panels with one vertical axis, side by side, or below each other in a figure that is taller than wide."""
    is_tall = figure.get_figheight() > figure.get_figwidth()
    return figure.subplots(*((2, 1) if is_tall else (1, 2)), sharey=True)


def real_model(figure: Figure) -> None:
    """The loss of every way on the real model, in two parts, on two kinds of text."""
    for axes, text in zip(two_panels(figure), TEXTS, strict=True):
        rows = {row["way"]: row for row in load(f"evidence/fidelity_{text}")["rows"]}
        names = [name.replace("ReSA f=", "f = ") for name in rows]
        steps, drifts = ([row[part] for row in rows.values()] for part in ("step_error", "drift"))
        ends = errors([row["kl"] for row in rows.values()], [row["kl_95"] for row in rows.values()])
        axes.barh(names, steps, color="0.75", label="step error: blocks not read")
        axes.barh(names, drifts, left=steps, xerr=ends, color=COLOURS[0], ecolor="0.4", label="drift")
        axes.set(xlabel="nats lost per token", title=TEXTS[text])
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def carried_values(figure: Figure) -> None:
    """Share of carried values right, by interval, one line per ratio, and decode-only beside it."""
    axes, result = figure.subplots(), load("evidence/carried")
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


def losses() -> dict[Setting, float]:
    """The loss of every setting, the mean of both kinds of text."""
    found: dict[Setting, list[float]] = {}
    for row in (row for text in TEXTS for row in load(f"evidence/frontier_{text}")["rows"]):
        if row["way"] != "decode-only":  # rectifies after every token, so it is slower than dense decoding
            interval = None if row["way"] == "sparse" else int(row["way"].removeprefix("ReSA f="))
            found.setdefault((row["score"], row["ratio"], interval), []).append(row["kl"])
    return {setting: float(np.mean(values)) for setting, values in found.items()}


def bytes_read(setting: Setting) -> float:
    """Bytes of keys and values that a token reads, relative to dense decoding."""
    score, ratio, interval = setting
    kept = {"selection": "bounds"} if score == "pooled" else {"selection": "sketch", "sketch_bits": int(score[-1])}
    config = ReSAConfig(active_ratio=ratio, interval=interval, schedule="paper", **kept)
    return read_ratio(config, bounds=1 / 2, head_dim=HEAD_DIM)


def times() -> dict[Setting, float]:
    """Time per token and layer in µs of every setting.

    Whole cycles were timed at f = 32, and at all intervals by bounds at a ratio of 0.1. What is left of one without its
    pass is the time of its steps. So others are put together from steps and passes: a pass depends on its interval.
    """

    def a_pass(row: dict) -> float:
        return row["parts"]["rectify"]["us"] + row["parts"]["refresh"]["us"]

    passes = {row["interval"]: a_pass(row) for row in load("frontier/bounds_0.1")["rows"]}
    found: dict[Setting, float] = {}
    for selection, ratio in product(("bounds", "sketch"), (0.02, 0.05, 0.1, 0.2)):
        result = load(f"frontier/{selection}_{ratio}")
        score = own_scorer(ReSAConfig(**result["config"]))
        rows = {row["interval"]: row for row in result["rows"] if row["context"] == TIMED_AT}
        step = (32 * rows[32]["resa_us"] - a_pass(rows[32])) / 31
        found[score, ratio, None] = step
        found |= {(score, ratio, f): ((f - 1) * step + passes[f]) / f for f in passes}
        found |= {(score, ratio, f): row["resa_us"] for f, row in rows.items()}
    return found


def envelope(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, loss) that no other beats in both, the cheapest first.

    >>> envelope([(3, 1), (1, 3), (2, 4)])
    [(1, 3), (3, 1)]
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw_frontier(axes: Axes, cost: Mapping[Setting, float], loss: Mapping[Setting, float]) -> None:
    """Every setting a point, those of one ratio joined by a thin line, the frontier of a score by a thick one."""
    for (score, label), colour, marker in zip(SCORES.items(), COLOURS, "osD", strict=False):
        points = {each: (cost[each], loss[each]) for each in loss if each[0] == score and each in cost}
        for ratio in sorted({ratio for _, ratio, _ in points}):
            line = sorted(point for setting, point in points.items() if setting[1] == ratio)
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=3, linewidth=0.8, alpha=0.5)
        if points:
            best = zip(*envelope(list(points.values())), strict=True)
            axes.plot(*best, color=colour, marker=marker, markersize=4, label=label)


def frontier(figure: Figure) -> None:
    """The loss against what a token costs, in bytes and in time."""
    loss, time = losses(), times()
    read = {setting: bytes_read(setting) for setting in loss}
    left, right = two_panels(figure)
    for axes, cost in ((left, read), (right, time)):
        draw_frontier(axes, cost, loss)
        for setting, name, place in ((PAPER, "the paper's setting", (6, 8)), (RECOMMENDED, "recommended", (-80, -14))):
            point = cost[setting], loss[setting]
            axes.plot(*point, "o", markersize=11, markerfacecolor="none", markeredgecolor="0.2")
            axes.annotate(name, point, place, textcoords="offset points")
        axes.set_xlim(left=0)
    left.set(yscale="log", ylabel="nats lost per token", xlabel="bytes read, relative to dense decoding")
    left.yaxis.set_major_formatter("{x:g}")
    right.set_xlabel("µs per token and layer: 8 × 256K tokens on one H200")
    for setting in (each for each in time if each[2] is None):  # the leftmost of its ratio
        colour = COLOURS[list(SCORES).index(setting[0])]
        place = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 7, "color": colour}
        right.annotate(f"p = {setting[1]}", (time[setting], loss[setting]), (-4, -2), **place)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def speedup_line(gpu: str, weights: str, batch: int) -> list[tuple[int, float]]:
    """Speed-ups of whole steps over dense decoding, by context in units of 1,024 tokens."""
    rows = load(f"end_to_end/{gpu}_{weights}")["rows"]
    own = [row for row in rows if row["batch"] == batch and row["protocol"] == "shared"]
    return sorted((row["context"] // 1024, row["ratio"]) for row in own)


def speedup(figure: Figure) -> None:
    """The speed-up of whole steps over dense decoding on two GPUs, by context and batch, for both kinds of weights."""
    panels = zip(two_panels(figure), WEIGHTS.items(), strict=True)
    for axes, (weights, title) in panels:
        axes.axhline(1, color="0.6", linewidth=0.8)
        for batch, colour in zip((8, 1), COLOURS, strict=False):
            other, line = (speedup_line(gpu, weights, batch) for gpu in ("h100", "h200"))
            axes.plot(*zip(*other, strict=True), color=colour, linewidth=1, linestyle=(0, (4, 2)), alpha=0.8)
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.8, marker="o", markersize=4)

            # Label both ends, the higher of them a little higher.
            apart = 4 if other[-1] > line[-1] else -4
            style = {"textcoords": "offset points", "va": "center", "color": colour}
            axes.annotate("H100", other[-1], (7, apart), fontsize=7.5, **style)
            name = f"{batch} sequences" if batch > 1 else "1 sequence"
            axes.annotate(f"{name}: {line[-1][1]:.1f}", line[-1], (7, -apart), **style)
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        ticks = [context for context, _ in line]
        axes.set_xticks(ticks, [f"{context}K" for context in ticks])
        axes.set(title=title, xlabel="tokens of context", xlim=(ticks[0] * 0.8, ticks[-1] * 7))
    figure.axes[0].set(ylabel="times faster than dense", ylim=(0.8, None))


def drawn(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    """Draw a figure as SVG."""
    with plt.style.context(STYLE):
        figure, buffer = plt.figure(figsize=size, layout="constrained"), io.BytesIO()
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # A tenth of a point is finer than most screens. Labels stand outside of the tags. Indentation takes 10 KB.
    short = re.sub(rb"<[^>]*>", lambda tag: re.sub(rb"(\.\d)\d+", rb"\1", tag[0]), buffer.getvalue())
    return re.sub(rb"\n +", b"\n", short)


FIGURES = {
    "speedup.svg": (speedup, (9, 3.6)),
    "real.svg": (real_model, (10, 3.6)),
    "carried.svg": (carried_values, (6.5, 3.8)),
    "frontier.svg": (frontier, (10, 4.2)),
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
