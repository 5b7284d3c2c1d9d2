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

CODE = "--prompt-tokens 1024 --min-blocks 2"
DOCUMENTS, MORE_DOCUMENTS = f"--documents 8 {CODE}", f"--documents 24 {CODE}"
PROGRAMS = "--prompt-tokens 256 --min-blocks 4"
SHORT, LONG = f"{PROGRAMS} --documents 8 --tokens 1792", f"{PROGRAMS} --documents 48 --tokens 3840"
INTERVALS, RATIOS = "8 16 32 64 128 256", "0.02 0.05 0.1 0.2 0.5 1"
DRIFT = f"fidelity {MORE_DOCUMENTS} --tokens 257 --intervals 32 128"
BY_SCORE = "--scores pooled per-head 8-bits --intervals 32 --ratios 0.1"
SELECTION = "--min-blocks 2 --tokens 16"
# Name of the part: the shipped model that is measured, and the words after `resa eval`. The longest
# come first, so that none is left running alone at the end.
PARTS = {
    "free": ("model", f"free {MORE_DOCUMENTS} --tokens 257 --intervals 32 128"),
    "carried": ("carrying", f"carried {LONG} --intervals {INTERVALS} --ratios {RATIOS}"),
    "carried_scores": ("carrying", f"carried {LONG} {BY_SCORE}"),
    "carried_fused": (
        "carrying",
        f"carried {LONG} --schedule fused --intervals 8 32 128 --ratios 0.1",
    ),
    "sweep_wide": ("model", f"sweep {MORE_DOCUMENTS} --tokens 257"),
    "drift": ("model", DRIFT),
    "drift_carrying": ("carrying", DRIFT),
    "sweep": ("model", f"sweep {DOCUMENTS} --tokens 129 --no-grid"),
    "carried_small": ("carrying", f"carried {SHORT} --intervals 8 32 --ratios 0.1"),
    "selection_4096": ("model", f"selection --documents 8 --prompt-tokens 4096 {SELECTION}"),
    "selection": ("model", f"selection {DOCUMENTS} --tokens 16"),
}
# Plain PyTorch that decodes token by token keeps a GPU waiting, and processes that share it wait
# for each other: these parts run on the CPU.
ON_CPU = {"free"}
SMALL = ("drift", "drift_carrying", "sweep", "carried_small", "selection")
SIZES = {
    "small": {name: PARTS[name] for name in SMALL},  # minutes on two CPU cores
    "full": PARTS,  # on one GPU and the CPU beside it
}


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


def run_parts(parts: Mapping[str, Part], out: Path, *, jobs: int = 1) -> None:
    """Run every part that is not done in a process of its own, `jobs` of them side by side.

    After a failure no other part begins, those that run end, and what was written stays.

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
            run_part(words, is_alone=jobs == 1)
        except BaseException:
            failed.set()
            raise
        print(f"{title} is done, {time.monotonic() - started:.0f} s", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo))


def run_part(words: Sequence[str], *, is_alone: bool) -> None:
    """Run one command. What it says is shown at once if it is alone, else only if it fails."""
    # Single tokens are too little work for two threads, which wait for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    output = {"stdout": subprocess.DEVNULL, "stderr": None if is_alone else subprocess.PIPE}
    command = [sys.executable, "-m", "resa.reference", *words]
    done = subprocess.run(command, env=environment, text=True, **output)
    if done.returncode != 0:
        print(done.stderr or "", file=sys.stderr, end="")
    done.check_returncode()
