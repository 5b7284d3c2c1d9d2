"""The evidence of docs/evidence.md, part by part: every part is a command `resa eval …` and the file that it writes.

A part whose file was written by the same command, for the same checkpoint, by the same source is done and left alone,
so a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..checks import is_integer, require

CODE = "--prompt-tokens 1024 --min-blocks 2"
DOCUMENTS, MORE_DOCUMENTS = f"--documents 8 --batch 8 {CODE}", f"--documents 24 --batch 24 {CODE}"
PROGRAMS = "--prompt-tokens 256 --min-blocks 4"
SHORT, LONG = f"{PROGRAMS} --documents 8 --tokens 1792 --batch 2", f"{PROGRAMS} --documents 48 --tokens 3840 --batch 4"
INTERVALS, RATIOS = "8 16 32 64 128 256", "0.02 0.05 0.1 0.2 0.5 1"
QUESTIONS = "--min-blocks 4 --ratios 0.05 0.1 0.2"
DRIFT = f"fidelity {MORE_DOCUMENTS} --tokens 257 --intervals 32 128"
# Name of the part: the shipped model that is measured, and the words after `resa eval`. Those that took longest come
# first, so that none of them is left running alone at the end.
PARTS = {
    "free": ("model", f"free {MORE_DOCUMENTS} --tokens 257 --intervals 32 128"),
    "written": ("carrying", f"written {PROGRAMS} --documents 128 --tokens 3840 --batch 128"),
    "carried": ("carrying", f"carried {LONG} --intervals {INTERVALS} --ratios {RATIOS}"),
    "retrieval": ("retrieval", f"tasks --lengths 2048 4096 8192 --examples 24 --batch 24 {QUESTIONS}"),
    "retrieval_16384": ("retrieval", f"tasks --lengths 16384 --examples 12 --batch 12 {QUESTIONS}"),
    "carried_scores": ("carrying", f"carried {LONG} --scores pooled per-head 8-bits --intervals 32 --ratios 0.1"),
    "carried_fused": ("carrying", f"carried {LONG} --schedule fused --intervals 8 32 128 --ratios 0.1"),
    "drift": ("model", DRIFT),
    "drift_carrying": ("carrying", DRIFT),
    "sweep_wide": ("model", f"sweep {MORE_DOCUMENTS} --tokens 257"),
    "sweep": ("model", f"sweep {DOCUMENTS} --tokens 129 --no-grid"),
    "speculation": ("model", f"speculation {DOCUMENTS} --tokens 96 --intervals 8 32"),
    "carried_small": ("carrying", f"carried {SHORT} --intervals 8 32 --ratios 0.1"),
    "selection_4096": ("model", "selection --documents 8 --batch 8 --prompt-tokens 4096 --min-blocks 2 --tokens 16"),
    "selection": ("model", f"selection {DOCUMENTS} --tokens 16"),
}
# Plain PyTorch that decodes token by token keeps a GPU waiting, and processes that share it take turns: beside five
# others `drift`, of 8 documents, took 276 s on an H100, alone on one core of a CPU 32.
ON_CPU = {"free", "drift", "drift_carrying", "speculation", "selection", "selection_4096"}
SMALL = ("drift", "drift_carrying", "sweep", "speculation", "carried_small", "selection")
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


def is_done(path: Path, words: Sequence[str], digests: Mapping[str, str]) -> bool:
    """Whether the file holds the result of `resa eval` with these words, and with these SHA-256 by name."""
    try:
        result = json.loads(path.read_text())
        command, found = shlex.split(str(result["command"])), {name: result[name] for name in digests}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # The same but for where it reads and writes.
    return without(command, ("--out", "--model", "--device")) == ["resa", "eval", *words] and found == digests


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command's words less some options and their values."""
    return [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & set(options)]


def run_parts(
    parts: Mapping[str, Part],
    out: Path,
    *,
    jobs: int = 1,
    run: Callable[[Sequence[str], bool], None] | None = None,
) -> list[str]:
    """Run every part that is not done, each in a process of its own; returns the names of those that were run.

    `jobs` run side by side; then what a part says itself is shown only if it fails. Raises
    `subprocess.CalledProcessError` where one fails: no other is begun, those that run end, what was written stays.
    """
    require(is_integer(jobs, 1), "jobs", jobs, "an integer ≥ 1")
    run = run or _run
    console = Console(stderr=True)
    files = {name: out / f"{name}.json" for name in parts}
    todo = {
        name: part for name, part in parts.items() if not is_done(files[name], shlex.split(part.words), part.digests)
    }
    if not todo:
        console.print(f"all {len(parts)} parts are done, in {out}", highlight=False)
        return []
    numbers = {name: f"part {i + 1} of {len(todo)}: {name}" for i, name in enumerate(todo)}
    failed = threading.Event()

    def work(name: str) -> str:
        if failed.is_set():
            return name
        part, started = todo[name], time.monotonic()
        console.print(f"{numbers[name]} (resa eval {part.words})", highlight=False)
        try:
            run(["eval", *shlex.split(part.words), *part.more, "--out", str(files[name])], jobs == 1)
        except BaseException:
            failed.set()
            raise
        console.print(f"{numbers[name]} is done, {time.monotonic() - started:.0f} s", highlight=False)
        return name

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, todo))


def _run(words: Sequence[str], is_alone: bool) -> None:
    # Single tokens are too little work for two threads: they wait for one another, far longer on a busy machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [*_program(), *words]
    said = None if is_alone else subprocess.PIPE
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=said, env=environment, text=True)
    except subprocess.CalledProcessError as error:
        print(error.stderr or "", file=sys.stderr, end="")
        raise


def _program() -> list[str]:
    """How this program was started, so that its parts have the same backends."""
    spec = sys.modules["__main__"].__spec__
    if Path(sys.argv[0]).name == "resa":
        return [sys.argv[0]]
    is_ours = spec is not None and spec.parent in ("resa.reference", "resa.fast")
    return [sys.executable, "-m", spec.parent if is_ours else "resa.reference"]
