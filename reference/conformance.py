"""Checks a port against the conformance vectors, and says what is wrong in the terms of the specification.

A port is a module with the five operations, NumPy arrays in and out, and `decode_trace` for whole generations;
docs/porting.md says what each must compute. Cases of one operation form a ladder, each asking for one thing more than
those before it: the first that fails names the law. A generation is compared step by step up to where it first goes
wrong, and what goes wrong there names the law.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

from .checks import require
from .conformance_trace import DRIFT, IMPRECISE, Comparison, NoTrace, expected_steps, find_wrong, read_trace

OPERATIONS = ("block_bounds", "score_blocks", "select_blocks", "sparse_attention", "dense_attention")
PASS, FAIL, UNCHECKED = "pass", "FAIL", "not checked"
TRACE = "4.6 the trace"
_OWN = {__file__, importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"}
STYLES = {PASS: "none", FAIL: "bold red", UNCHECKED: "yellow"}


@dataclass(frozen=True)
class Row:
    """One case and what came of it."""

    operation: str
    case: str
    status: str
    error: float | None = None  # absolute, of the element that is worst for what it is allowed
    allowed: float | None = None  # of that element; 0 where results must be equal
    law: str = ""  # what the case asks for; of one that failed, what broke
    says: str = ""  # of one that failed, the law in words and what was found


@dataclass(frozen=True)
class Vectors:
    """The manifest and the tensors of all cases."""

    manifest: dict
    operations: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    traces: Mapping[str, np.ndarray]


def load_vectors() -> Vectors:
    """Those that come with the package."""
    folder = files("resa.vectors")
    parts = (
        safetensors.numpy.load((folder / f"{name}.safetensors").read_bytes())
        for name in ("operations", "weights", "traces")
    )
    return Vectors(json.loads((folder / "manifest.json").read_text(encoding="utf-8")), *parts)


def load_port(name: str) -> ModuleType:
    """A module by its name, searched in the working directory too, or by its file's path ending in .py.

    Errors: ValueError if there is none, or if it can't be imported.
    """
    allowed = "a module that can be imported, or a file ending in .py"
    path = Path(name) if name.endswith(".py") else None
    require(path is None or path.is_file(), "MODULE", name, allowed)
    sys.path.insert(0, str(path.parent.resolve()) if path else "")  # a port may have modules beside it
    try:
        if path is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(f"_port_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise ValueError(f"MODULE: got {name} ({_said(error)}); allowed: {allowed}") from error


def _said(error: BaseException) -> str:
    """An exception in one line, with where it was raised: the last place that is no library's, nor this package's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename not in _OWN]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def check_port(port: ModuleType, vectors: Vectors, *, ops_only: bool = False) -> list[Row]:
    """Every case in order; without `decode_trace`, or if told to leave it, those rows say that they are not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN and infinity, which the vectors are full of
        rows = [check_operation(port, entry, vectors.operations) for entry in vectors.manifest["operations"]]
        broken = {row.operation: row for row in reversed(rows) if row.status == FAIL}  # the first of each stays
        for entry in vectors.manifest["traces"]:
            if ops_only or not callable(getattr(port, "decode_trace", None)):
                said = "" if ops_only else "no decode_trace"
                rows.append(Row("decode_trace", entry["case"], UNCHECKED, says=said))
            else:
                rows.append(check_trace(port, entry, vectors, broken))
        return rows


def first_failures(rows: Sequence[Row]) -> list[Row]:
    """Of every operation the first row that failed: what is below it may fail for the same reason.

    A generation that ran tells more than one that raised an exception.
    """
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.law == TRACE):
        if row.status == FAIL:
            first.setdefault(row.operation, row)
    return [row for row in rows if row is first.get(row.operation)]


def is_passed(rows: Sequence[Row], *, ops_only: bool = False) -> bool:
    """Whether all rows passed, those that were left out on request aside."""
    return all(row.status == PASS or (ops_only and row.status == UNCHECKED) for row in rows)


# ---- Operations ------------------------------------------------------------------------------------------------------


def check_operation(port: ModuleType, entry: dict, tensors: Mapping[str, np.ndarray]) -> Row:
    """One case of one operation."""
    operation, case = entry["operation"], entry["case"]
    start = f"{operation}/{case}/"
    arrays = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    function, names = getattr(port, operation, None), entry["compare"]
    inputs = {name: array.copy() for name, array in arrays.items() if "/" not in name} | deepcopy(entry["arguments"])
    if "lse" in names:
        inputs["return_lse"] = True
    failed = Row(operation, case, FAIL, law="2 signatures")
    if function is None:
        return replace(failed, says=f"the port has no {operation}")
    if not _takes(function, inputs):
        return replace(failed, says=f"{operation} can't be called with the arguments {', '.join(inputs)}, by name")
    try:
        results = function(**inputs)
    except (Exception, SystemExit) as error:  # whatever a foreign function raises
        return replace(failed, law=entry["law"], says=f"{entry['says']} ({_said(error)})")
    found = _named(results, pair="lse" in names)
    if found is None:
        return replace(failed, says=f"with return_lse the result is a pair (out, lse), got a {type(results).__name__}")
    rows = []
    for name in names:
        kept = {"set": "indices"}.get(name, name)
        row = Row(operation, case, PASS, law=entry["law"], says=entry["says"])
        actual, given = _as_array(found.get(kept, found.get("")))
        if actual is None:
            return replace(failed, says=f"{name}: {given}")
        rows.append(_compared(row, actual, arrays[f"expected/{kept}"], arrays.get(f"allowed/{kept}"), name))
        if rows[-1].status == FAIL:
            is_selection = operation == "select_blocks" and rows[-1].law == entry["law"]
            return _as_selection(rows[-1], actual, arrays["expected/indices"], entry) if is_selection else rows[-1]
    worst = max(rows, key=lambda row: row.error / row.allowed if row.allowed else 0.0)
    return replace(worst, says="")


def _takes(function: Callable, inputs: Mapping) -> bool:
    """Whether a function can be called with these names, as far as it tells."""
    try:
        inspect.signature(function).bind(**inputs)
    except TypeError:
        return False
    except ValueError:  # of compiled functions, which do not tell
        return True
    return True


def _named(results: object, *, pair: bool) -> dict[str, object] | None:
    """Results by name, "" where there is one alone; None if there should be a pair and is none."""
    if not pair:
        return {"": results}
    if not isinstance(results, (tuple, list)) or len(results) != 2:
        return None
    return dict(zip(("out", "lse"), results, strict=True))


def _as_array(result: object) -> tuple[np.ndarray | None, str]:
    """As an array of numbers; or None, and what there is instead."""
    try:
        array = np.asarray(result)
    except Exception as error:  # ragged lists, tensors that need a gradient or lie elsewhere, …
        return None, f"can't be read as a NumPy array ({_said(error)})"
    if array.dtype.kind not in "if":
        return None, f"got {array.dtype} {list(array.shape)}, expected signed integers, or floats that NumPy has itself"
    return array, ""


def _compared(row: Row, actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray | None, name: str) -> Row:
    """The row with its verdict; where the type or the number of axes is wrong, the law is that of the signatures."""
    failed = replace(row, status=FAIL)
    wide, given = expected.dtype.itemsize, f"{name}: got {actual.dtype} {list(actual.shape)}, expected"
    if actual.dtype.kind != expected.dtype.kind or actual.ndim != expected.ndim or actual.dtype.itemsize < wide:
        says = f"{given} {expected.dtype} or wider, {list(expected.shape)}"
        return replace(failed, law="2 signatures", says=says)
    if expected.dtype.kind == "i":
        expected = _padded(expected, actual.shape[-1])  # a list may be longer than it must
        if name == "set":
            actual, expected = np.sort(actual, axis=-1), np.sort(expected, axis=-1)
    if actual.shape != expected.shape:
        return replace(failed, says=f"{row.says} ({given} {list(expected.shape)})")
    allowed = np.broadcast_to(0.0 if allowed is None else allowed, expected.shape).astype(np.float64)
    error = _errors(actual, expected, allowed)
    worst = _worst(error, allowed)
    row = replace(row, error=float(error[worst]), allowed=float(allowed[worst]))
    n_wrong = int((error > allowed).sum())
    if n_wrong == 0:
        return row
    where = f"{name}{[int(i) for i in worst]} is {actual[worst]:.6g} instead of {expected[worst]:.6g}"
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    if error.max() < IMPRECISE * size:
        where += ", so close that arithmetic may be narrower than float32"
    return replace(row, status=FAIL, says=f"{row.says} ({n_wrong} of {error.size} differ: {where})")


def _errors(actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Absolute errors; 0 where both are NaN or infinite alike, or anything is allowed, infinite where but one is."""
    with np.errstate(invalid="ignore"):
        is_right = (actual == expected) | (np.isnan(actual) & np.isnan(expected)) | np.isinf(allowed)
        error = np.where(is_right, 0.0, np.abs(actual.astype(np.float64) - expected))
    return np.where(np.isnan(error), np.inf, error)


def _worst(error: np.ndarray, allowed: np.ndarray) -> tuple[int, ...]:
    """Where the error is the largest share of what is allowed; where nothing is, the largest of those."""
    share = np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0)
    forbidden = np.where(allowed == 0, error, 0.0)
    return np.unravel_index(np.argmax(forbidden if forbidden.any() else share), error.shape)


def _as_selection(row: Row, actual: np.ndarray, expected: np.ndarray, entry: dict) -> Row:
    """A selection that is wrong in its order, in how many it takes, or in leaving out the newest, is told so."""
    if actual.shape[:-1] != expected.shape[:-1]:
        return row
    expected = _padded(expected, actual.shape[-1])
    if actual.shape == expected.shape and (np.sort(actual, axis=-1) == np.sort(expected, axis=-1)).all():
        if ((actual < 0) != (expected < 0)).any():
            return replace(row, law="2.3 padding", says="the right blocks, but -1 does not come after them")
        return replace(row, law="2.3 order", says="the right blocks, but not in ascending order")
    ours, theirs = ((indices >= 0).sum(axis=-1) for indices in (actual, expected))
    if (ours != theirs).any():
        law = row.law if row.law in ("2.3 exact products", "2.3 padding") else "2.3 count"
        says = f"{ours.tolist()} blocks are selected instead of {theirs.tolist()}"
        if row.law == "2.3 eq. 5" and (ours == theirs + entry["arguments"]["config"]["local_blocks"]).all():
            law, says = "2.3 local blocks", f"{says}: the newest count toward n"
        return replace(row, law=law, says=says)
    newest = expected.max(axis=-1, keepdims=True)
    if row.law == "2.3 eq. 5" and not ((actual == newest) | (newest < 0)).any(axis=-1).all():
        return replace(row, law="2.3 local blocks", says="the newest block is always in")
    return row


def _padded(indices: np.ndarray, width: int) -> np.ndarray:
    spare = np.full((*indices.shape[:-1], max(0, width - indices.shape[-1])), -1, indices.dtype)
    return np.concatenate((indices, spare), axis=-1)


# ---- Generations -----------------------------------------------------------------------------------------------------


def check_trace(port: ModuleType, entry: dict, vectors: Vectors, broken: Mapping[str, Row]) -> Row:
    """One generation, up to the first step that goes wrong; `broken` has the first failure of each operation."""
    case, config, start = entry["case"], entry["config"], f"{entry['model']}/"
    weights = {
        name.removeprefix(start): tensor.copy() for name, tensor in vectors.weights.items() if name.startswith(start)
    }
    arguments = deepcopy((vectors.manifest["models"][entry["model"]], entry["prompt"], config))
    failed = Row("decode_trace", case, FAIL)
    try:
        found = read_trace(port.decode_trace(weights, *arguments), config["max_new_tokens"])
    except NoTrace as error:
        return replace(failed, law=TRACE, says=str(error))
    except (Exception, SystemExit) as error:  # whatever a foreign function raises
        return replace(failed, law=TRACE, says=_said(error))
    expected, largest = expected_steps(case, vectors.traces), 0.0
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        before = (found[i - 1], expected[i - 1]) if i else (None, None)
        wrong, drift = find_wrong(Comparison(ours, theirs, *before, config))
        largest = max(largest, drift)
        if wrong is not None:
            says = f"step {i}: {wrong.says}" if i else f"after the prefill: {wrong.says}"
            row = replace(failed, error=drift, allowed=DRIFT, law=wrong.law, says=says)
            return _because(row, wrong.needs, broken)
    if len(found) != len(expected):
        says = f"{len(found)} entries instead of {len(expected)}: one after the prefill, one after every step"
        return replace(failed, law="4.5 end of generation", says=f"{says}, and the last token is never fed")
    return Row("decode_trace", case, PASS, largest, DRIFT, entry["law"])


def _because(row: Row, needs: Sequence[str], broken: Mapping[str, Row]) -> Row:
    """The row, told to be a consequence if an operation without which it can't be right is wrong."""
    for operation in needs:
        if operation in broken:
            says = f"{row.says}; {operation} fails as well, so mend that first"
            return replace(row, law=broken[operation].law, says=says)
    return row


# ---- Report ----------------------------------------------------------------------------------------------------------


def report(name: str, vectors: Vectors, rows: Sequence[Row], *, ops_only: bool) -> dict[str, object]:
    """The result as one object for --json; an infinite error is the string "inf", which JSON has no number for."""

    def plain(row: Row) -> dict[str, object]:
        is_number = row.error is None or math.isfinite(row.error)
        return asdict(row) | ({} if is_number else {"error": str(row.error)})

    return {
        "module": name,
        "version": vectors.manifest["version"],
        "passed": is_passed(rows, ops_only=ops_only),
        "first_failures": [plain(row) for row in first_failures(rows)],
        "rows": [plain(row) for row in rows],
    }


def show(rows: Sequence[Row]) -> None:
    """Every row as a table, then what to look at first."""
    table = Table(box=None, pad_edge=False)
    for name in ("operation", "case", "", "largest error", "allowed", "law"):
        table.add_column(name, justify="right" if name in ("largest error", "allowed") else "left")
    for row in rows:
        numbers = ["" if number is None else f"{number:.2g}" for number in (row.error, row.allowed)]
        table.add_row(row.operation, row.case, row.status, *numbers, row.law, style=STYLES[row.status])
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    for row in first_failures(rows):
        text = f"\n{row.operation}, {row.case}: {row.law}\n  {row.says}"
        console.print(text, style=STYLES[FAIL], markup=False)  # brackets of indices are not the console's
    if any(row.status == UNCHECKED for row in rows):
        console.print("\nThe generations are not checked: the port has no decode_trace, or was not to be asked for it.")
    counts = Counter(row.status for row in rows)
    console.print(
        "\n" + ", ".join(f"{counts[status]} {status}" for status in (PASS, FAIL, UNCHECKED) if counts[status])
    )
