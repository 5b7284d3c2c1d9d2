"""The evidence of docs/evidence.md, part by part: each is a command `resa eval …` and its file.

A part is done, and left alone, if its file was written by the same command, for the same checkpoint
and by the same source. So a run that was interrupted goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..checks import require_integer

LONG = "--documents 16 --prompt-tokens 4096 --tokens 4096 --scored 2048"
WIDE = "--documents 8 --prompt-tokens 4096 --tokens 1024 --min-blocks 2"
WRITTEN = "--documents 16 --prompt-tokens 1024 --tokens 1024 --min-blocks 4 --seeds 8"
SHORT = "--documents 8 --prompt-tokens 1024"
MASS = "--min-blocks 2 --tokens 16"
PROGRAMS = "--prompt-tokens 256 --min-blocks 4"
FEW, MANY = f"{PROGRAMS} --documents 8 --tokens 1792", f"{PROGRAMS} --documents 48 --tokens 3840"
INTERVALS, RATIOS = "8 16 32 64 128 256", "0.02 0.05 0.1 0.2 0.5 1"
LENGTHS = (8192, 4096, 1024)
ASKED = "retrieval --documents 12 --min-blocks 4 --intervals 32"
TENTH = "--intervals 32 --ratios 0.1"
SCORES = "pooled per-head 8-bits first-block half-blocks sketch-1 sketch-2 sketch-4 mass"
GRID = "--intervals 16 32 64 128 --ratios 0.02 0.05 0.1 0.2 --block-sizes 16"


def on_texts(**parts: str) -> dict[str, tuple[str, str]]:
    """Make every part two, one on English and one on source code."""
    return {
        f"{name}_{text}": ("real", f"{words} --text {text}")
        for name, words in parts.items()
        for text in ("english", "code")
    }


# Name of the part: the model that is measured, and the words after `resa eval`. The longest come
# first, so that none is left running alone at the end.
SMALL = {  # minutes on two CPU cores
    **on_texts(fidelity_small=f"fidelity {SHORT} --tokens 512 --min-blocks 4 --intervals 8 32 128"),
    "carried_small": ("carrying", f"carried {FEW} --intervals 8 32 --ratios 0.1"),
}
PARTS = {  # on one GPU
    **{f"retrieval_{length}": ("real", f"{ASKED} --lengths {length}") for length in LENGTHS},
    **{
        f"retrieval_sketch_{length}": ("real", f"{ASKED} --selection sketch --lengths {length}")
        for length in LENGTHS[1:]
    },
    "carried": ("carrying", f"carried {MANY} --intervals {INTERVALS} --ratios {RATIOS}"),
    **on_texts(
        frontier=f"sweep {WIDE} {GRID} --scores pooled sketch-1 sketch-2",
        free=f"free {WRITTEN} --intervals 32",
        sketch=f"fidelity {LONG} --selection sketch --intervals 32 --ratios 0.05 0.1",
        fidelity=f"fidelity {LONG} --intervals 8 16 32 128 256",
        fidelity_ratios=f"fidelity {LONG} --intervals 32 --ratios 0.05 0.2",
        scorers=f"fidelity {WIDE} {TENTH} --scores {SCORES}",
        fidelity_fused=f"fidelity {LONG} --schedule fused --intervals 8 32 128",
    ),
    "carried_scores": (
        "carrying",
        f"carried {MANY} {TENTH} --scores pooled per-head 8-bits sketch-1 sketch-2 mass",
    ),
    **on_texts(
        blocks=f"fidelity {WIDE} {TENTH} --block-sizes 8 --scores pooled sketch-2",
        selection=f"selection --documents 16 --prompt-tokens 4096 {MASS}",
    ),
    "carried_fused": (
        "carrying",
        f"carried {MANY} --schedule fused --intervals 8 32 128 --ratios 0.1",
    ),
    **SMALL,
}
SIZES = {"small": SMALL, "full": PARTS}


@dataclass(frozen=True)
class Part:
    """One command."""

    words: str  # after `resa eval`
    more: Sequence[str]  # words that say where it runs, not what
    digests: Mapping[str, str]  # SHA-256 of what it is measured with, as in its file


def is_done(path: Path, part: Part) -> bool:
    """Tell whether the file holds the result of this part."""
    try:
        result = json.loads(path.read_text())
        command = shlex.split(str(result["command"]))
        found = {name: result[name] for name in part.digests}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # Where it reads and writes may differ.
    asked = without(command, ("--out", "--model", "--device"))
    return asked == ["resa", "eval", *shlex.split(part.words)] and found == part.digests


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """Leave some options and their values out of a command's words.

    >>> without(["eval", "--out", "a.json", "free", "--out=b.json"], ["--out"])
    ['eval', 'free']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(option)
    return parser.parse_known_args(words)[1]


def run_parts(parts: Mapping[str, Part], out: Path, package: str, *, jobs: int = 1) -> None:
    """Run every part that is not done in a process of its own, `jobs` of them side by side.

    `package` is the command line that runs them: resa.reference, or one with more backends. After a
    failure no other part begins, those that run end, and what was written stays.

    Errors: subprocess.CalledProcessError where a part fails.
    """
    require_integer("jobs", jobs, 1)
    files = {name: out / f"{name}.json" for name in parts}
    todo = [name for name, part in parts.items() if not is_done(files[name], part)]
    print(f"{len(parts) - len(todo)} of {len(parts)} parts are done, in {out}", file=sys.stderr)
    failed = threading.Event()

    def work(name: str) -> None:
        if failed.is_set():
            return
        part, started = parts[name], time.monotonic()
        title = f"part {todo.index(name) + 1} of {len(todo)}: {name}"
        print(f"{title} (resa eval {part.words})", file=sys.stderr)
        words = ["eval", *shlex.split(part.words), *part.more, "--out", str(files[name])]
        try:
            run_part([package, *words], is_alone=jobs == 1)
        except BaseException:
            failed.set()
            raise
        print(f"{title} is done, {time.monotonic() - started:.0f} s", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo))


def run_part(words: Sequence[str], *, is_alone: bool) -> None:
    """Run a package with words. What it says is shown at once if it is alone, else if it fails."""
    # One thread: parts side by side use all cores, and their numbers do not depend on how many.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    output = {"stdout": subprocess.DEVNULL, "stderr": None if is_alone else subprocess.PIPE}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, env=environment, text=True, **output)
    if done.returncode != 0:
        print(done.stderr or "", file=sys.stderr, end="")
    done.check_returncode()
