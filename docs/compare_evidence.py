"""Say how much of the recorded evidence a new run gives again: python docs/compare_evidence.py out/evidence

Every number that has an interval of confidence in docs/results/evidence is compared with that number of the new run. It
is given again if it lies in the interval. Documents are the library of the Python that runs. Another version has other
documents: then a number is given again if the two intervals meet, and not if the new one has none. The exit
status is 1 if more than one in twenty is not given again, or if there are none.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

RECORDED = Path(__file__).parent / "results" / "evidence"
ROUNDING = 1e-6  # what a kernel or another order of sums may change where an interval has no width
SHARE_OUTSIDE = 0.05  # as large as the error of intervals of 95 %


def numbers(recorded: object, found: object, path: str = "") -> Iterator[tuple[str, list[float], float, list[float]]]:
    """Pair numbers by name and place → (name, recorded interval, new number, new interval).

    Only numbers with a recorded interval count; what is missing is NaN.
    """
    if isinstance(recorded, dict):
        others = found if isinstance(found, dict) else {}
        for name, value in recorded.items():
            ends, new, new_ends = recorded.get(f"{name}_95"), others.get(name), others.get(f"{name}_95")
            if ends is None:
                yield from numbers(value, new, f"{path}/{name}")
            elif isinstance(value, list):  # one interval each
                for i, own in enumerate(ends):
                    if None not in own:
                        yield f"{path}/{name}/{i}", own, number(item(new, i)), interval(item(new_ends, i))
            elif value is not None and None not in ends:
                yield f"{path}/{name}", ends, number(new), interval(new_ends)
    elif isinstance(recorded, list):
        for i, own in enumerate(recorded):
            yield from numbers(own, item(found, i), f"{path}/{i}")


def item(values: object, index: int) -> object:
    """An item of a list, or None."""
    return values[index] if isinstance(values, list) and index < len(values) else None


def number(value: object) -> float:
    """The number, or NaN."""
    return value if isinstance(value, int | float) else math.nan


def interval(ends: object) -> list[float]:
    """Both ends of an interval, or NaN."""
    return [number(item(ends, 0)), number(item(ends, 1))]


def is_of_same_text(before: dict, now: dict) -> bool:
    """Tell whether both measured the same text: programs and questions come from seeds, all else from the library."""
    return before.get("question") in ("carried", "retrieval") or before.get("python") == now.get("python")


def main(folder: Path, recorded: Path = RECORDED) -> int:
    """Compare every file of the folder that has a recorded one; returns the exit status."""
    n_all = n_outside = 0
    for path in sorted(folder.glob("*.json")):
        if not (recorded / path.name).exists():
            print(f"{path.stem:16} not recorded")
            continue
        before, now = json.loads((recorded / path.name).read_text()), json.loads(path.read_text())
        is_same = is_of_same_text(before, now)
        outside, n = [], 0
        for name, (low, high), new, new_ends in numbers(before, now):
            n += 1
            from_, to = (new, new) if is_same else new_ends
            if not (from_ <= high + ROUNDING and low - ROUNDING <= to):  # NaN is not either
                found = f"{new:.4f}, not in" if is_same else f"{new:.4f} [{from_:.4f}, {to:.4f}], apart from"
                outside.append(f"{name} = {found} [{low:.4f}, {high:.4f}]")
        how = "in the recorded intervals" if is_same else "whose intervals meet"
        print(f"{path.stem:16} {n - len(outside)} of {n} numbers {how} ({before['device']})")
        for line in outside[:5]:
            print(" " * 17 + line)
        n_all, n_outside = n_all + n, n_outside + len(outside)
    print(f"{'all':16} {n_all - n_outside} of {n_all}")
    return int(n_all == 0 or n_outside > SHARE_OUTSIDE * n_all)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"{__doc__}\nallowed: the folder of a run, as out/evidence")
    sys.exit(main(Path(sys.argv[1])))
