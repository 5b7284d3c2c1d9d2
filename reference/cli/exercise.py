"""`resa exercise`: write the method yourself, and have it checked by the conformance kit.

The templates lie beside the example ports, in `docs/examples`. The learner's functions stand in for
a port, and the kit judges them case by case, in this process.
"""

import argparse
import functools
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from ...conformance.kit import exact, load_port, outcome_of
from ...conformance.vectors import Vectors, load_vectors
from ...conformance.wrong import Wrong, in_one_line
from ..checks import require
from . import main as cli
from .exercise_cases import HINTS, lessons

LIMIT = 10.0  # seconds that one call may take
SHOWN = 40  # numbers in all of a case that is printed
SPARE = 64  # slots for a loop that feeds too much
UNWRITTEN, RAISED = "not written yet", "an exception"
# Exercise: what it is about, its tutorial, its functions.
EXERCISES = {
    1: ("attention over a KV cache", "01_cache", "dense_attention"),
    2: ("which blocks to read", "02_blocks", "block_bounds score_blocks select_blocks"),
    3: ("attention to the chosen blocks alone", "03_drift", "sparse_attention"),
    4: ("the loop that repairs its own cache", "04_rectification", "decode"),
}


@dataclass(frozen=True)
class Verdict:
    """One function, up to the first case that it gets wrong."""

    line: str
    mistake: str = ""  # in full, if it is about a rule
    is_right: bool = False


def add_exercise(commands: cli.Commands) -> None:
    """Add the command."""
    parser = cli.add_command(commands, "exercise", exercise)
    text = "1 to 4; left out, the exercises are listed"
    parser.add_argument("number", metavar="N", nargs="?", type=int, choices=EXERCISES, help=text)
    text = "the file to write and check (default: exercise_N.py in this folder)"
    parser.option("--file", None, text, type=Path)


def exercise(options: argparse.Namespace) -> int:
    """Write the method yourself, in four exercises that are checked. `resa exercise` lists them.
    `resa exercise 2` writes exercise_2.py into this folder: NumPy functions with shapes and
    equations, without bodies. Write the bodies and run the same command again. It prints green or
    red for each function. For the first mistake it prints the rule that broke, a hint, and the
    smallest input that shows it. No file is ever overwritten. The exit status is 0 if everything is
    green, 1 if not, 2 if the file cannot be imported. `resa conformance exercise_2.py --only
    select_blocks` asks for more: infinities, NaN, other number types.
    """
    number, console = options.number, Console(highlight=False, markup=False, soft_wrap=True)
    if number is None:
        require(options.file is None, "N", "no number beside --file", "1 to 4")
        for number, (about, tutorial, _) in EXERCISES.items():
            console.print(f"{number}  {about:37} tutorial: docs/tutorials/{tutorial}.md")
        console.print("Begin with `resa exercise 1`: it writes a file and says what to do.")
        return 0

    # The first call writes the file, all others check it.
    path, (_, tutorial, names) = options.file or Path(f"exercise_{number}.py"), EXERCISES[number]
    require(path.suffix == ".py" and not path.is_dir(), "--file", path, "a file ending in .py")
    if not path.exists():
        template = Path(exact.__file__).with_name(f"exercise_{number}.py")
        cli.writable("--file", path).write_bytes(template.read_bytes())
        console.print(f"{path} is new. Write {', '.join(names.split())} and run this again.")
        console.print(f"The tutorial is docs/tutorials/{tutorial}.md.")
        return 1
    if not check(path, names.split(), console):
        return 1
    more = f" Next: `resa exercise {number + 1}`." if number + 1 in EXERCISES else ""
    console.print(f"Everything is green.{more}")
    return 0


def check(path: Path, functions: Sequence[str], console: Console) -> bool:
    """Print a line per function, and the first mistake in full → True if all are right."""
    module, vectors = imported(path), load_vectors()
    verdicts = []
    for name in functions:
        verdicts.append(judge(module, name, vectors))
        colour = "green" if verdicts[-1].is_right else "red"
        console.print(f"{name:18}", end="")
        console.print(f"{colour:7}", style=colour, end="")
        console.print(verdicts[-1].line)
    mistakes = [each.mistake for each in verdicts if each.mistake]
    if mistakes:
        console.print(f"\n{mistakes[0]}")
    return all(each.is_right for each in verdicts)


def imported(path: Path) -> ModuleType:
    """Import a learner's file and leave nothing beside it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return load_port(str(path))
    except ValueError as error:
        reason = in_one_line(error.__cause__ or error)
        raise ValueError(f"{path} can't be imported: {reason}") from None
    finally:
        sys.dont_write_bytecode = before


def judge(module: ModuleType, name: str, vectors: Vectors) -> Verdict:
    """Run the cases of a function until one is wrong."""
    is_loop, seen = name == "decode", {}
    operation = "decode_trace" if is_loop else name
    vectors, entries = lessons(vectors, operation)
    if not callable(function := getattr(module, name, None)):
        return Verdict("the file has no such function")
    function = watched(function, module.__file__, seen)
    port = SimpleNamespace(**{operation: traced(function, seen) if is_loop else function})
    for i, entry in enumerate(entries, 1):
        outcome = outcome_of(port, entry, vectors)
        if "law" not in outcome:
            continue
        law, says, line = outcome["law"], outcome["says"], f"case {i} of {len(entries)} is wrong"
        if law in (UNWRITTEN, RAISED):
            line = says
            if i == 1 or is_loop or law == UNWRITTEN:
                return Verdict(line)
            law, says = entry["law"], entry["says"]  # others are right, so it is about this rule
        if not is_loop:
            kept = {"set": "indices"}.get(entry["compare"][0], entry["compare"][0])
            yours = seen.pop("yours", "an exception")
            seen.update(right=vectors.arrays(entry)[f"expected/{kept}"], yours=yours)
        return Verdict(line, explained(name, law, says, seen))
    return Verdict(f"all {len(entries)} cases", is_right=True)


def explained(name: str, law: str, says: str, seen: Mapping[str, Any]) -> str:
    """Say which rule broke, in which call if that is small, and give a hint."""
    number, rule = law.removeprefix("law ").split(" ", 1)
    place = f"law {number}" if law.startswith("law") else f"section {number}"
    lines = [f"{name}, {rule}: {says}."]
    if sum(np.size(x) for x in seen.values()) <= SHOWN:
        lines += [f"  {key} = {_plain(x)}" for key, x in seen.items()]
    if rule in HINTS:
        lines.append(f"Hint: {HINTS[rule]}")
    return "\n".join([*lines, f"More on it: docs/porting.md, {place}."])


def _plain(x: Any) -> str:
    """Write numbers as short as they are, arrays as lists."""
    if isinstance(x, list) or (isinstance(x, np.ndarray) and x.ndim):
        return f"[{', '.join(map(_plain, x))}]"
    return f"{x:.4g}" if isinstance(x, (float, np.floating)) else str(x)


# ---- The learner's functions ---------------------------------------------------------------------


def watched(function: Callable, file: str, seen: dict[str, Any]) -> Callable:
    """Wrap a function: note what it is given and returns, and say in which line it raises."""

    @functools.wraps(function)
    def call(**inputs: Any) -> Any:
        seen.clear()
        seen.update(inputs)
        try:
            with limited(LIMIT):
                result = function(**inputs)
        except NotImplementedError:
            raise Wrong(UNWRITTEN, UNWRITTEN) from None
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == file]
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise Wrong(RAISED, f"line {lines[-1]}: {text}" if lines else text) from None
        is_array = isinstance(result, np.ndarray)
        seen["yours"] = result if is_array else f"a {type(result).__name__}"
        return result

    return call


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, on systems that have signals for it."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no result within {seconds:g} s")

    before, left = signal.signal(signal.SIGALRM, stop), signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)


class Given:
    """The model of exercise 4. It notes its passes, and its cache at the end of every step."""

    def __init__(self, model: Any) -> None:
        self.model, self.indices = model, None
        self.passes: list[str] = []
        self.entries: list[dict[str, Any]] = []

    def dense_pass(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Feed tokens at positions start, start + 1, … → the logits after the last."""
        logits = self.model.dense_pass(list(tokens), start)
        self.passes.append(f"dense {start}–{self.model.length - 1}")
        return logits

    def sparse_step(self, token: int) -> np.ndarray:
        """Feed one token at the end of the cache → the logits after it."""
        self.end_step()  # a rectification belongs to the step before it
        logits, self.indices = self.model.sparse_step(token)
        self.passes.append(f"sparse {self.model.length - 1}")
        return logits

    def end_step(self) -> None:
        """Note the cache as it is now."""
        rows = {x: getattr(self.model, x)[:, :, : self.model.length] for x in ("keys", "values")}
        entry = rows | {"bounds": self.model.bounds, "indices": self.indices}
        self.entries.append(deepcopy(entry) | {"window": self.model.window})


def traced(decode: Callable, seen: dict[str, Any]) -> Callable:
    """Make of a learner's loop the `decode_trace` that the kit calls."""

    def decode_trace(
        weights: Mapping, model_config: Mapping, prompt: Sequence[int], config: Mapping
    ) -> list[dict]:
        n_tokens, interval = config["max_new_tokens"], config["interval"]
        given = Given(exact.Model(weights, model_config, config, len(prompt) + n_tokens + SPARE))
        tokens = decode(model=given, prompt=list(prompt), n_tokens=n_tokens, interval=interval)
        seen.clear()
        seen.update(prompt=f"{len(prompt)} tokens", n_tokens=n_tokens, interval=str(interval))
        seen["passes"] = given.passes
        if not isinstance(tokens, list):
            raise Wrong(
                "4.5 end of generation", f"a {type(tokens).__name__} is returned, not a list"
            )

        # What is fed or returned too much becomes an entry too much, which the kit tells.
        given.end_step()
        entries, n_more = given.entries, len(given.entries) - n_tokens
        entries += [deepcopy(entries[-1]) for _ in tokens[len(entries) :]]
        tokens = tokens + tokens[-1:] * n_more
        return [entry | {"token": x} for entry, x in zip(entries, tokens, strict=False)]

    return decode_trace
