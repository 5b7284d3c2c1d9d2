"""Checks a port against the conformance vectors, and says what is wrong in the page's own words.

A port is a module with the five operations of `operations.py`, NumPy arrays in and out, and
`decode_trace` for whole generations; docs/porting.md says what each must compute. The cases of one
operation form a ladder: each asks for one thing more than those before it, so the first that fails
names the law. `trace.py` compares a generation step by step up to where it first goes wrong.

The two operations of key sketches are optional. A port offers both or neither.
"""

import importlib
import importlib.util
import inspect
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

from ..checks import refuse, require
from ..operations import Operations
from .trace import DRIFT, TRACE, check_steps, expected_steps, read_trace
from .wrong import IMPRECISE, Wrong, foreign_code, in_one_line, part_of, wrong_clause, wrong_order

OPERATIONS = tuple(field.name for field in fields(Operations))
OPTIONAL = tuple(field.name for field in fields(Operations) if field.default is not MISSING)
PASS, FAIL, UNCHECKED, UNSUPPORTED = "pass", "FAIL", "not checked", "not supported"
STYLES = {PASS: "none", FAIL: "bold red", UNCHECKED: "yellow", UNSUPPORTED: "dim"}
SIGNATURES = "2 signatures"
# What an operation returns where it is no single array; attention does so with `return_lse`.
PAIRS = {"lse": ("out", "lse"), "codes": ("codes", "scales")}


@dataclass(frozen=True)
class Row:
    """One case and its result."""

    operation: str
    case: str
    status: str
    error: float | None = None  # absolute, of the element that is worst for what it is allowed
    allowed: float | None = None  # of that element; 0 where results must be equal
    law: str = ""  # what the case asks for; if it failed, what broke
    says: str = ""  # if it failed, the law in words and what was found


@dataclass(frozen=True)
class Vectors:
    """The manifest and the tensors of all cases."""

    manifest: dict
    operations: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    traces: Mapping[str, np.ndarray]


def load_vectors() -> Vectors:
    """Load the vectors that come with the package."""
    folder = files("resa.vectors")
    names = ("operations", "weights", "traces")
    stored = ((folder / f"{name}.safetensors").read_bytes() for name in names)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    operations, weights, traces = map(safetensors.numpy.load, stored)
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}  # half the file
    return Vectors(manifest, operations, weights, traces)


def load_port(name: str) -> ModuleType:
    """Import a port: a module by its name, from the working directory too, or a path ending in
    .py. ValueError if there is none, or if it cannot be imported.
    """
    allowed = "a module that can be imported, or a file ending in .py"
    path = Path(name) if name.endswith(".py") else None
    require(path is None or path.is_file(), "MODULE", name, allowed)
    sys.path.insert(0, str(path.parent.resolve()) if path else "")  # for modules beside it
    try:
        if path is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(f"_port_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        refuse("MODULE", f"{name} ({in_one_line(error)})", allowed)


def check_port(port: ModuleType, vectors: Vectors, *, ops_only: bool = False) -> list[Row]:
    """Check every case in order; without `decode_trace`, or with `ops_only`, no generation.

    A port with neither operation of key sketches is not asked for anything that needs them.
    """
    rows: list[Row] = []
    has_trace = callable(getattr(port, "decode_trace", None)) and not ops_only
    has_sketches = any(getattr(port, name, None) is not None for name in OPTIONAL)
    for entry in vectors.manifest["operations"] + vectors.manifest["traces"]:
        row = Row(entry["operation"], entry["case"], PASS, law=entry["law"])
        is_operation = row.operation in OPERATIONS
        if not has_sketches and (row.operation in OPTIONAL or sketch_bits(entry) is not None):
            rows.append(replace(row, status=UNSUPPORTED))
            continue
        if not is_operation and not has_trace:
            rows.append(replace(row, status=UNCHECKED))
            continue
        check = check_operation if is_operation else check_trace
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NaN and infinity are meant
            try:
                error, allowed = check(port, entry, vectors)
                rows.append(replace(row, error=error, allowed=allowed))
            except Wrong as wrong:
                rows.append(_failed(row, wrong, rows))
    return rows


def sketch_bits(entry: Mapping) -> int | None:
    """Bits per channel of the sketches that a generation decodes with; None: it needs none."""
    config = entry.get("config", {})
    return config["sketch_bits"] if config.get("selection") == "sketch" else None


def _failed(row: Row, wrong: Wrong, before: Sequence[Row]) -> Row:
    """A row that failed, perhaps because an operation did whose rows stand before it."""
    broken = {each.operation: each for each in first_failures(before)}
    law, says = wrong.law, wrong.says
    cause = next((name for name in wrong.needs if name in broken), None)
    if cause is not None:
        law, says = broken[cause].law, f"{says}; {cause} fails as well, so mend that first"
    numbers = {"error": wrong.error, "allowed": wrong.allowed}
    return replace(row, status=FAIL, law=law, says=says, **numbers)


def first_failures(rows: Sequence[Row]) -> list[Row]:
    """The first row of every operation that failed: those below may fail for the same reason.

    A generation that ran says more than one that raised an exception.
    """
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.law == TRACE):
        if row.status == FAIL:
            first.setdefault(row.operation, row)
    return [row for row in rows if row is first.get(row.operation)]


def is_passed(rows: Sequence[Row], *, ops_only: bool = False) -> bool:
    """True if all rows passed that the port supports, except those that `ops_only` left out."""
    right = (PASS, UNSUPPORTED, UNCHECKED) if ops_only else (PASS, UNSUPPORTED)
    return all(row.status in right for row in rows)


def check_operation(port: ModuleType, entry: dict, vectors: Vectors) -> tuple[float, float]:
    """Check one case of one operation → its worst error and what is allowed there."""
    operation, names = entry["operation"], entry["compare"]
    arrays = part_of(vectors.operations, f"{operation}/{entry['case']}")
    inputs = {name: array for name, array in arrays.items() if "/" not in name}
    inputs |= deepcopy(entry["arguments"])
    if "lse" in names:
        inputs["return_lse"] = True
    _check_signature(port, operation, inputs)
    with foreign_code(entry["law"], entry["says"]):
        results = getattr(port, operation)(**inputs)

    # Of a pair a case may compare one.
    found, pair = {names[0]: results}, next((PAIRS[name] for name in names if name in PAIRS), None)
    if pair is not None:
        if not isinstance(results, (tuple, list)) or len(results) != 2:
            given = f"the result is a pair ({', '.join(pair)}), got a {type(results).__name__}"
            says = f"with return_lse {given}" if "lse" in pair else given
            raise Wrong(SIGNATURES, says)
        found = dict(zip(pair, results, strict=True))
    errors = [_compare(name, found[name], arrays, entry) for name in names]
    return max(errors, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)


def _missing(operation: str) -> Wrong:
    both = ": sketches need both operations" if operation in OPTIONAL else ""
    return Wrong(SIGNATURES, f"the port has no {operation}{both}")


def _check_signature(port: ModuleType, operation: str, inputs: Mapping) -> None:
    function = getattr(port, operation, None)
    if function is None:
        raise _missing(operation)
    try:
        inspect.signature(function).bind(**inputs)
    except TypeError:
        says = f"{operation} can't be called with the arguments {', '.join(inputs)}, by name"
        raise Wrong(SIGNATURES, says) from None
    except ValueError:  # compiled functions do not tell
        pass


def _compare(name: str, result: object, arrays: Mapping, entry: dict) -> tuple[float, float]:
    """Compare one result with the expected one → the worst error and what is allowed there."""
    kept = {"set": "indices"}.get(name, name)
    expected, allowed = arrays[f"expected/{kept}"], arrays.get(f"allowed/{kept}", 0.0)
    with foreign_code(SIGNATURES, f"{name}: can't be read as a NumPy array"):
        actual = np.asarray(result)

    # Type and shape. Codes are bytes. A list of indices may be longer than it must.
    given, is_code = f"{actual.dtype} {list(actual.shape)}", name == "codes"
    if not is_code and actual.dtype.kind not in "if":
        numbers = "signed integers, or floats that NumPy has itself"
        raise Wrong(SIGNATURES, f"{name}: got {given}, expected {numbers}")
    is_kind = (actual.dtype.kind, actual.ndim) == (expected.dtype.kind, expected.ndim)
    is_narrow = actual.dtype.itemsize < expected.dtype.itemsize
    if not is_kind or is_narrow or (is_code and actual.dtype != expected.dtype):
        wanted = f"{expected.dtype}{'' if is_code else ' or wider'}, {list(expected.shape)}"
        raise Wrong(SIGNATURES, f"{name}: got {given}, expected {wanted}")
    if kept == "indices":
        width = max(actual.shape[-1], expected.shape[-1])
        actual, expected = _padded(actual, width), _padded(expected, width)
    if actual.shape != expected.shape:
        says = f"{name}: got {given}, expected {list(expected.shape)}"
        raise Wrong(entry["law"], f"{entry['says']} ({says})")
    if name == "indices":
        clause = wrong_order(actual, expected)
        if clause is not None:
            raise Wrong(*clause)
    if name == "set":
        actual, expected = np.sort(actual, axis=-1), np.sort(expected, axis=-1)
        clause = wrong_clause(actual, expected, entry["arguments"]["config"]["local_blocks"])
        if clause is not None:
            raise Wrong(*clause)

    # The worst element is the largest error where results must be equal, else the largest share.
    allowed = np.broadcast_to(allowed, expected.shape).astype(np.float64)
    error = _errors(actual, expected, allowed)
    worst = max(
        np.ndindex(error.shape),
        key=lambda i: (error[i] if allowed[i] == 0 else 0.0, error[i] / (allowed[i] or 1.0)),
    )
    numbers, n_wrong = (float(error[worst]), float(allowed[worst])), (error > allowed).sum()
    if n_wrong == 0:
        return numbers
    where = f"{name}{list(worst)} is {actual[worst]:.6g} instead of {expected[worst]:.6g}"
    if error.max() < IMPRECISE * np.abs(expected[np.isfinite(expected)]).max(initial=0.0):
        where += ", so close that arithmetic may be narrower than float32"
    says = f"{entry['says']} ({n_wrong} of {error.size} differ: {where})"
    raise Wrong(entry["law"], says, (), *numbers)


def _errors(actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Absolute errors: 0 where both are NaN or infinite alike, infinite where one of them is."""
    with np.errstate(invalid="ignore"):
        error = np.abs(actual.astype(np.float64) - expected)
    is_right = (actual == expected) | (np.isnan(actual) & np.isnan(expected)) | np.isinf(allowed)
    return np.where(is_right, 0.0, np.where(np.isnan(error), np.inf, error))


def _padded(indices: np.ndarray, width: int) -> np.ndarray:
    spare = np.full((*indices.shape[:-1], width - indices.shape[-1]), -1, indices.dtype)
    return np.concatenate((indices, spare), axis=-1)


def check_trace(port: ModuleType, entry: dict, vectors: Vectors) -> tuple[float, float]:
    """Check one generation → its largest drift and what is allowed."""
    config, bits = entry["config"], sketch_bits(entry)
    lacking = [name for name in OPTIONAL if getattr(port, name, None) is None]
    if bits is not None and lacking:
        raise _missing(lacking[0])
    weights = part_of(vectors.weights, entry["model"])
    arguments = deepcopy((vectors.manifest["models"][entry["model"]], entry["prompt"], config))
    with foreign_code(TRACE, "decode_trace raised an exception"):
        entries = port.decode_trace(weights, *arguments)
        found = read_trace(entries, config["max_new_tokens"], has_sketches=bits is not None)
    expected = expected_steps(part_of(vectors.traces, entry["case"]))
    return check_steps(found, expected, config), DRIFT


def report(
    name: str, vectors: Vectors, rows: Sequence[Row], *, ops_only: bool
) -> dict[str, object]:
    """The result as one object for --json. JSON has no infinity: such an error is a string."""

    def plain(row: Row) -> dict[str, object]:
        return asdict(row) | ({"error": "inf"} if row.error == math.inf else {})

    return {
        "module": name,
        "version": vectors.manifest["version"],
        "passed": is_passed(rows, ops_only=ops_only),
        "first_failures": [plain(row) for row in first_failures(rows)],
        "rows": [plain(row) for row in rows],
    }


def show(rows: Sequence[Row]) -> None:
    """Print every row as a table, then the first failures."""
    table = Table(box=None, pad_edge=False)
    for name in ("operation", "case", "", "largest error", "allowed", "law"):
        table.add_column(name, justify="right" if name in ("largest error", "allowed") else "left")
    for row in rows:
        numbers = ["" if number is None else f"{number:.2g}" for number in (row.error, row.allowed)]
        cells = (row.operation, row.case, row.status, *numbers, row.law)
        table.add_row(*cells, style=STYLES[row.status])
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)

    # The brackets of indices are no markup.
    for row in first_failures(rows):
        text = f"\n{row.operation}, {row.case}: {row.law}\n  {row.says}"
        console.print(text, style=STYLES[FAIL], markup=False)
    counts = Counter(row.status for row in rows)
    console.print("\n" + ", ".join(f"{counts[each]} {each}" for each in STYLES if counts[each]))
