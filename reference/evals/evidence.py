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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

DOCUMENTS = "--documents 8 --batch 8 --prompt-tokens 1024 --min-blocks 2"
CODE = {  # on the model of source code
    "drift": f"fidelity {DOCUMENTS} --tokens 257 --intervals 32 128",
    "sweep": f"sweep {DOCUMENTS} --tokens 129 --no-grid",
    "speculation": f"speculation {DOCUMENTS} --tokens 96 --intervals 8 32",
    "selection": f"selection {DOCUMENTS} --tokens 16",
}
PROGRAMS = "--prompt-tokens 256 --min-blocks 4"
SHORT = f"{PROGRAMS} --documents 8 --tokens 1792 --batch 2"
CARRYING = {  # on the model of programs
    "carried_small": f"carried {SHORT} --intervals 8 32 --ratios 0.1",
    "drift_carrying": CODE["drift"],
}
INTERVALS, RATIOS = "8 16 32 64 128 256", "0.02 0.05 0.1 0.2 0.5 1"
# For each size, by the shipped model that is measured: name of the part → words after `resa eval`.
SIZES = {
    "small": {"model": CODE, "carrying": CARRYING},  # minutes on two CPU cores
    "full": {  # on one GPU; everything of the small size as well
        "carrying": {
            "carried": f"carried {PROGRAMS} --documents 24 --tokens 3840 --batch 8 --intervals {INTERVALS}"
            f" --ratios {RATIOS}",
            "carried_fused": f"carried {SHORT} --schedule fused --intervals 8 32 128 --ratios 0.1",
            "carried_scores": f"carried {SHORT} --scores pooled per-head 8-bits --intervals 32 --ratios 0.1",
            "written": f"written {PROGRAMS} --documents 32 --tokens 3840 --batch 32",
            **CARRYING,
        },
        "model": {
            **CODE,
            "free": f"free {DOCUMENTS} --tokens 257 --intervals 32 128",
            "selection_4096": "selection --documents 8 --batch 8 --prompt-tokens 4096 --min-blocks 2 --tokens 16",
            "sweep_wide": f"sweep {DOCUMENTS} --tokens 257",
        },
    },
}


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
    parts: Mapping[str, str],
    out: Path,
    more: Sequence[str],
    digests: Mapping[str, str],
    *,
    run: Callable[[Sequence[str]], None] | None = None,
) -> list[str]:
    """Run every part that is not done, each in a process of its own; returns the names of those that were run.

    parts: name → words after `resa eval`; `more` words for all of them, as `--model FILE`; `digests` as in the files.
    Raises `subprocess.CalledProcessError` where one fails; what was written stays.
    """
    run = run or _run
    console = Console(stderr=True)
    files = {name: out / f"{name}.json" for name in parts}
    todo = {name: words for name, words in parts.items() if not is_done(files[name], shlex.split(words), digests)}
    for i, (name, words) in enumerate(todo.items()):
        console.print(f"part {i + 1} of {len(todo)}: {name} (resa eval {words})", highlight=False)
        run(["eval", *shlex.split(words), *more, "--out", str(files[name])])
    if not todo:
        console.print(f"all {len(parts)} parts are done, in {out}", highlight=False)
    return list(todo)


def _run(words: Sequence[str]) -> None:
    # Single tokens are too little work for two threads: they wait for one another, far longer on a busy machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([*_program(), *words], check=True, stdout=subprocess.DEVNULL, env=environment)


def _program() -> list[str]:
    """How this program was started, so that its parts have the same backends."""
    spec = sys.modules["__main__"].__spec__
    if Path(sys.argv[0]).name == "resa":
        return [sys.argv[0]]
    is_ours = spec is not None and spec.parent in ("resa.reference", "resa.fast")
    return [sys.executable, "-m", spec.parent if is_ours else "resa.reference"]
