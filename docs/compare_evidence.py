"""Says how much of the recorded evidence a new run gives again: python docs/compare_evidence.py out/evidence

Every number that has an interval of confidence in docs/results/evidence is compared with the same number of the new
run; it is given again if it lies in that interval. The exit status is 1 if more than one in twenty does not, or if
there are none.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

RECORDED = Path(__file__).parent / "results" / "evidence"
ROUNDING = 1e-6  # what a kernel or another order of sums may change where an interval has no width
SHARE_OUTSIDE = 0.05  # as large as the error of intervals of 95 %


def numbers(recorded: object, found: object, path: str = "") -> Iterator[tuple[str, float, list[float]]]:
    """(name, the new number, the recorded interval) of all that have one; NaN where the new run lacks the number.

    Lists go by place.
    """
    if isinstance(recorded, dict):
        others = found if isinstance(found, dict) else {}
        for name, value in recorded.items():
            ends, new = recorded.get(f"{name}_95"), others.get(name)
            if ends is None:
                yield from numbers(value, new, f"{path}/{name}")
            elif isinstance(value, list):  # one interval each
                told = ((i, own) for i, own in enumerate(ends) if None not in own)
                yield from ((f"{path}/{name}/{i}", number(item(new, i)), own) for i, own in told)
            elif value is not None and None not in ends:
                yield f"{path}/{name}", number(new), ends
    elif isinstance(recorded, list):
        for i, own in enumerate(recorded):
            yield from numbers(own, item(found, i), f"{path}/{i}")


def item(values: object, index: int) -> object:
    """Of a list, None where there is none."""
    return values[index] if isinstance(values, list) and index < len(values) else None


def number(value: object) -> float:
    """The number, NaN where it is none."""
    return value if isinstance(value, int | float) else math.nan


def main(folder: Path, recorded: Path = RECORDED) -> int:
    """Compare every file of the folder that has a recorded one; returns the exit status."""
    n_all = n_outside = 0
    for path in sorted(folder.glob("*.json")):
        if not (recorded / path.name).exists():
            print(f"{path.stem:16} not recorded")
            continue
        before, now = json.loads((recorded / path.name).read_text()), json.loads(path.read_text())
        outside, n = [], 0
        for name, new, (low, high) in numbers(before, now):
            n += 1
            if not low - ROUNDING <= new <= high + ROUNDING:  # NaN is not either
                outside.append(f"{name} = {new:.4f}, not in [{low:.4f}, {high:.4f}]")
        print(f"{path.stem:16} {n - len(outside)} of {n} numbers in the recorded intervals ({before['device']})")
        for line in outside[:5]:
            print(" " * 17 + line)
        n_all, n_outside = n_all + n, n_outside + len(outside)
    print(f"{'all':16} {n_all - n_outside} of {n_all}")
    return int(n_all == 0 or n_outside > SHARE_OUTSIDE * n_all)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"{__doc__}\nallowed: the folder of a run, as out/evidence")
    sys.exit(main(Path(sys.argv[1])))
