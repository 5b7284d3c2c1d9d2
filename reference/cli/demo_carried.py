"""`resa demo --model carrying`: programs whose values have to be carried, checked line by line."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import ReSAConfig
from ..lab.carried import SEED, Checks, Way, marked
from ..lab.measure import with_intervals
from ..lab.programs import UNSEEN, Program, alias_program
from ..weights.models import TextModel, Tokenizer

N_PROGRAMS, LENGTH, READ = 6, 3072, 256  # programs, tokens of each, of which so many are prefilled
SHOWN = 20  # assertions


def demo_carried(
    loaded: TextModel, config: ReSAConfig, intervals: Sequence[int], console: Console
) -> dict[str, Any]:
    """Decode programs along their text; print where they fail most, and the score of every way.

    Returns the scores, JSON-ready: `right` is a share, `gain` what is right beyond sparse decoding.
    """
    ways = {"dense": None, "sparse": Way(replace(config, interval=None))}
    ways |= {f"ReSA f={f}": Way(replace(config, interval=f)) for f in sorted(intervals)[::-1]}
    ways["decode-only"] = Way(replace(config, interval=1, schedule="paper"))
    seeds = [(SEED, LENGTH, index, UNSEEN) for index in range(N_PROGRAMS)]
    draws = map(np.random.default_rng, seeds)
    programs = [alias_program(loaded.tokenizer, each, LENGTH) for each in draws]
    checks = Checks.of(programs, READ)
    console.print(
        f"{N_PROGRAMS} programs of {LENGTH:,} tokens assign names to names and assert their values."
        f" The first {READ} tokens are read densely, the others decoded. A value is right if the"
        " digit that the program asserts is the likeliest token. A line such as `b = a` does not"
        " say its value: the model has to carry it in its keys and values.\n"
    )
    found = marked(loaded.model, programs, checks, [way for way in ways.values() if way], READ)
    right = {name: found[way] for name, way in ways.items()}

    # Show the stretch in which sparse decoding gets most wrong, the earliest of equals.
    wrong = np.convolve(1 - right["sparse"], np.ones(SHOWN), "valid")
    is_whole = checks.program[: len(wrong)] == checks.program[SHOWN - 1 :]
    first = int(np.where(is_whole, wrong, -1).argmax())
    shown = range(first, first + SHOWN)
    program = programs[checks.program[first]]
    console.print(checked_lines(program, checks.at, shown, loaded.tokenizer, right))
    never, rows = checks.per_program(right["sparse"]), []
    for name, marks in right.items():
        own = checks.per_program(marks)
        rows.append({"way": name, **with_intervals({"right": own, "gain": own - never})})
    console.print(score_table(rows, len(checks.at)))
    amounts = {"programs": N_PROGRAMS, "length": LENGTH, "read": READ, "checks": len(checks.at)}
    return {**amounts, "config": asdict(config), "rows": rows}


def checked_lines(
    program: Program,
    at: np.ndarray,
    shown: Sequence[int],
    tokenizer: Tokenizer,
    right: Mapping[str, np.ndarray],
) -> Table:
    """Lines of a program, each asserted value with a tick or a cross for every way of decoding."""
    title = f"The {len(shown)} assertions in a row of which sparse decoding gets most wrong"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("line", no_wrap=True)
    for name in right:
        table.add_column(name, justify="center", no_wrap=True)

    # The digit is the line's last token but one, after `assert`, a name, `==` and a space.
    start, end = int(at[shown[0]]) - 4, int(at[shown[-1]]) + 2
    marks = {int(at[index]): index for index in shown}
    line: list[int] = []
    check = None
    for position in range(start, min(end, len(program.tokens))):
        line.append(program.tokens[position])
        check = marks.get(position, check)
        text = tokenizer.decode(line)
        if text.endswith("\n"):
            cells = ["" if check is None else tick(each[check]) for each in right.values()]
            table.add_row(text[:-1], *cells)
            line, check = [], None
    return table


def score_table(rows: Sequence[Mapping[str, Any]], n_checks: int) -> Table:
    """Make the table of what each way gets right, and of what it does better than sparse."""
    title = f"Values right, of {n_checks} in all programs [95 %]"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("decoding", "right", "more than sparse"):
        table.add_column(heading, justify="left" if heading == "decoding" else "right")
    for row in rows:
        cells = []
        for part in ("right", "gain"):
            low, high = row[f"{part}_95"]
            cells.append(f"{row[part]:.1%} [{low:.1%}, {high:.1%}]")
        table.add_row(row["way"], cells[0], "–" if row["way"] == "sparse" else cells[1])
    return table


def tick(mark: float) -> Text:
    """A green tick for a right value, a red cross for a wrong one."""
    return Text("✓", "green") if mark else Text("✗", "bold red")
