"""Checks a port case by case, and says what is wrong in the words of docs/porting.md.

A port is a module with the five operations, NumPy arrays in and out, and `decode_trace` for whole
generations. The cases of one operation form a ladder: each asks for one thing more than those
before it, so the first that fails names the law. `trace.py` compares a generation step by step up
to where it first goes wrong.

What is optional, a port offers or not: both operations of key sketches, the parts of a serving
engine, and other number types and sizes, which its `GRADES` names. The rest is "not supported".
"""

import importlib
import importlib.util
import inspect
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from textwrap import wrap
from types import ModuleType

import numpy as np

from ..examples import numpy_port as exact
from .grades import GRADES, OPERATIONS, widened
from .parts import (
    ATTENDED_BY,
    BATCH_MODEL,
    PARTS,
    SCORED_BY,
    check_batch,
    check_passes,
    choice_of,
    decoded_alone,
    passes_of,
    read_result,
    requests_of,
    traced,
)
from .trace import DRIFT, TRACE, check_steps, expected_steps, read_trace
from .unseen import with_garbage
from .vectors import Vectors, part_of
from .wrong import EQUATIONS, IMPRECISE, Wrong, foreign_code, in_one_line, wrong_clause, wrong_order

OPTIONAL = ("sketch_keys", "score_sketch")
PASS, FAIL, UNCHECKED, UNSUPPORTED = "pass", "FAIL", "not checked", "not supported"
SIGNATURES = "2 signatures"
# What an operation returns where it is no single array; attention does so with `return_lse`.
PAIRS = {"lse": ("out", "lse"), "codes": ("codes", "scales")}


@dataclass(frozen=True)
class Row:
    """One case and its result."""

    operation: str
    case: str
    status: str
    grade: str = "float32"
    error: float | None = None  # absolute, of the element that is worst for what it is allowed
    allowed: float | None = None  # of that element; 0 where results must be equal
    law: str = ""  # what the case asks for; if it failed, what broke
    says: str = ""  # if it failed, the law in words and what was found


def load_port(name: str) -> ModuleType:
    """Import a port: a module by its name, from the working directory too, or a path ending in
    .py. ValueError if there is none, if it cannot be imported, or names a grade that is none.
    """
    allowed = "allowed: a module that can be imported, or a file ending in .py"
    path = Path(name) if name.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ValueError(f"MODULE: got {name}; {allowed}")
    sys.path.insert(0, str(path.parent.resolve()) if path else "")  # for modules beside it
    try:
        if path is None:
            module = importlib.import_module(name)
        else:
            spec = importlib.util.spec_from_file_location(f"_port_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up there
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise ValueError(f"MODULE: got {name} ({in_one_line(error)}); {allowed}") from error

    # Python imports a folder without code as an empty module.
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise ValueError(f"MODULE: got {name} (a folder without __init__.py); {allowed}")
    named = getattr(module, "GRADES", ())
    if not isinstance(named, (list, tuple, set, frozenset)) or any(
        grade not in GRADES for grade in named
    ):
        raise ValueError(f"GRADES: got {named!r}; allowed: a list of {', '.join(GRADES[1:])}")
    return module


def check_port(
    port: ModuleType, vectors: Vectors, *, ops_only: bool = False, grades: Sequence[str] = GRADES
) -> list[Row]:
    """Check every case in order, in this process; with `ops_only` operations alone.

    A port with neither operation of key sketches is not asked for anything that needs them.
    """
    return list(rows_as_they_come(port, vectors, ops_only=ops_only, grades=grades))


def rows_as_they_come(
    port: ModuleType, vectors: Vectors, *, ops_only: bool = False, grades: Sequence[str] = GRADES
) -> Iterator[Row]:
    """Check a case whenever the next row is asked for."""
    rows: list[Row] = []
    for entry in chosen_entries(vectors, grades=grades):
        status = left_out(entry, offers(port), ops_only=ops_only)
        outcome = {} if status else outcome_of(port, entry, vectors)
        rows.append(row_of(entry, status, outcome, rows))
        yield rows[-1]


def chosen_entries(
    vectors: Vectors, *, grades: Sequence[str] = GRADES, only: str = "*"
) -> list[dict]:
    """Cases of these grades whose own name or whose operation's fits a pattern."""
    return [
        entry
        for entry in vectors.entries()
        if entry.get("grade", "float32") in grades
        and any(fnmatch(entry[key], only) for key in ("case", "operation"))
    ]


def offers(port: ModuleType) -> list[str]:
    """List what a port has: its functions that the kit may call, and its grades."""
    every = (*OPERATIONS, "decode_trace", *PARTS)
    names = [name for name in every if callable(getattr(port, name, None))]
    return [*names, "float32", *getattr(port, "GRADES", ())]


def left_out(entry: Mapping, offered: Sequence[str], *, ops_only: bool) -> str:
    """Say why a case is not run; empty if it is."""
    operation, grade = entry["operation"], entry.get("grade", "float32")
    has_sketches = any(name in offered for name in OPTIONAL)
    needs_sketches = operation in OPTIONAL or sketch_bits(entry) is not None
    has_part = operation not in PARTS or operation in offered
    if grade not in offered or not has_part or (needs_sketches and not has_sketches):
        return UNSUPPORTED
    is_rest = operation not in OPERATIONS
    return UNCHECKED if is_rest and (ops_only or operation not in offered) else ""


def outcome_of(port: ModuleType, entry: dict, vectors: Vectors) -> dict:
    """Run one case → its worst error and what is allowed there, and what broke, if anything."""
    checks = {"decode_trace": check_trace, "choose_token": check_choice}
    checks |= {"attention_trace": check_part_trace, "paged_trace": check_part_trace}
    checks |= {"decode_batch": check_requests}
    check = checks.get(entry["operation"], check_operation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN and infinity are meant
        try:
            error, allowed = check(port, entry, vectors)
        except Wrong as wrong:
            return asdict(wrong)
    return {"error": error, "allowed": allowed}


def row_of(entry: Mapping, status: str, outcome: Mapping, before: Sequence[Row]) -> Row:
    """Make the row of a case; it may have failed because an operation did whose rows precede it."""
    law, says = outcome.get("law", entry["law"]), outcome.get("says", "")
    broken = {each.operation: each for each in first_failures(before)}
    cause = next((name for name in outcome.get("needs", ()) if name in broken), None)
    if cause is not None:
        law, says = broken[cause].law, f"{says}; {cause} fails as well, so mend that first"
    return Row(
        entry["operation"],
        entry["case"],
        status or (FAIL if "law" in outcome else PASS),
        entry.get("grade", "float32"),
        outcome.get("error"),
        outcome.get("allowed"),
        law,
        says,
    )


def sketch_bits(entry: Mapping) -> int | None:
    """Bits per channel of the sketches that a generation decodes with; None: it needs none."""
    config = entry.get("config", {})
    return config["sketch_bits"] if config.get("selection") == "sketch" else None


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
    operation, names, arrays = entry["operation"], entry["compare"], vectors.arrays(entry)
    inputs = {name: array for name, array in arrays.items() if "/" not in name}
    inputs |= deepcopy(entry["arguments"])
    if "lse" in names:
        inputs["return_lse"] = True
    _check_signature(port, operation, inputs)
    results = _call(port, entry, inputs)
    errors = [_compare(name, results[name], arrays, entry) for name in names]
    _check_equal_blocks(results, entry)

    # Once more, and with other garbage where nothing may look: every bit stays that is compared.
    compared = {name: ~np.isinf(arrays.get(f"allowed/{name}", 0.0)) for name in results}

    def check_second_run() -> None:
        if not _same_bits(results, _call(port, entry, inputs), compared):
            raise Wrong("5 second run", "a second run of the same case gives other bits")

    check_second_run()
    for law, what, changed in with_garbage(operation, inputs):
        again = _call(port, entry | {"law": law, "says": what}, changed)
        if not _same_bits(results, again, compared):
            for _ in range(9):  # it may be chance
                check_second_run()
            raise Wrong(law, f"{what} change the result")
    return max(errors, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)


def _call(port: ModuleType, entry: Mapping, inputs: Mapping) -> dict[str, object]:
    """Call an operation with copies of its inputs → its results by name."""
    operation, names, copies = entry["operation"], entry["compare"], deepcopy(dict(inputs))
    with foreign_code(entry["law"], entry["says"]):
        results = getattr(port, operation)(**copies)
    _check_unwritten(operation, inputs, copies)

    # Of a pair a case may compare one.
    pair = next((PAIRS[name] for name in names if name in PAIRS), None)
    if pair is None:
        return {names[0]: results}
    if not isinstance(results, (tuple, list)) or len(results) != 2:
        given = f"the result is a pair ({', '.join(pair)}), got a {type(results).__name__}"
        says = f"with return_lse {given}" if "lse" in pair else given
        raise Wrong(SIGNATURES, says)
    return dict(zip(pair, results, strict=True))


def _check_unwritten(operation: str, given: Mapping, after: Mapping) -> None:
    """Refuse a function that has changed what it was given."""
    written = [name for name in given if not _is_same(given[name], after[name])]
    if written:
        says = f"{operation} writes to its {' and '.join(written)}: arguments are read only"
        raise Wrong(SIGNATURES, says)


def _is_same(one: object, other: object) -> bool:
    """Compare two arguments, arrays by their bits."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, np.ndarray):
        return one.tobytes() == other.tobytes()
    return one == other


def _same_bits(one: Mapping, other: Mapping, compared: Mapping) -> bool:
    """Compare results bit for bit, but for the payload of NaN and for what no case compares."""

    def is_same(name: str) -> bool:
        ours, theirs = np.asarray(one[name]), np.asarray(other[name])
        if ours.shape != theirs.shape or ours.dtype.kind != "f":
            return np.array_equal(ours, theirs)
        is_equal = (ours == theirs) & (np.signbit(ours) == np.signbit(theirs))
        return bool((is_equal | (np.isnan(ours) & np.isnan(theirs)) | ~compared[name]).all())

    return all(map(is_same, one))


def _check_equal_blocks(results: Mapping, entry: Mapping) -> None:
    """Blocks that hold the same score the same, bit for bit: else ties between them are none."""
    for blocks in entry.get("equal", ()):
        columns = np.asarray(results["scores"])[..., blocks]
        if (columns != columns[..., :1]).any():
            says = f"blocks {blocks} hold the same and score differently: a sum's order may not"
            raise Wrong(entry["law"], f"{says} depend on the block")


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
    if entry.get("grade") == "bf16" and expected.dtype.kind == "f":
        actual = widened(actual)

    # Type and shape. Codes are bytes. A list of indices may be longer than it must.
    given, is_code = f"{actual.dtype} {list(actual.shape)}", name == "codes"
    if not is_code and actual.dtype.kind not in "if":
        numbers = "signed integers, or floats that NumPy has itself"
        raise Wrong(SIGNATURES, f"{name}: got {given}, expected {numbers}")
    is_kind = (actual.dtype.kind, actual.ndim) == (expected.dtype.kind, expected.ndim)
    least = entry.get("least", {}).get(name, expected.dtype.itemsize)
    is_narrow = actual.dtype.itemsize < least
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
    error, is_exact = _errors(actual, expected, allowed), allowed == 0
    share = np.where(is_exact, error, error / np.where(is_exact, 1.0, allowed))
    share = np.where(is_exact, error, 0.0) if (error > 0)[is_exact].any() else share
    worst = np.unravel_index(share.argmax(), share.shape)
    numbers, n_wrong = (float(error[worst]), float(allowed[worst])), (error > allowed).sum()
    if n_wrong == 0:
        return numbers
    where = (
        f"{name}{[int(i) for i in worst]} is {actual[worst]:.6g} instead of {expected[worst]:.6g}"
    )
    law, says, size = entry["law"], entry["says"], np.abs(expected[np.isfinite(expected)])
    if allowed[worst] > 0 and error.max() < IMPRECISE * size.max(initial=0.0):
        where += ", so close that arithmetic may be narrower than float32"
        if "grade" not in entry and law != EQUATIONS.get(entry["operation"], law):
            law, says = EQUATIONS[entry["operation"]], "results are a little off"
    raise Wrong(law, f"{says} ({n_wrong} of {error.size} differ: {where})", (), *numbers)


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
    model = vectors.manifest["models"][entry["model"]]
    arguments = (part_of(vectors.weights, entry["model"]), model, entry["prompt"], config)
    copies = deepcopy(arguments)
    with foreign_code(TRACE, "decode_trace raised an exception"):
        entries = port.decode_trace(*copies)
        found = read_trace(entries, config["max_new_tokens"], has_sketches=bits is not None)
    names = ("weights", "model_config", "prompt", "config")
    _check_unwritten(
        "decode_trace", *(dict(zip(names, x, strict=True)) for x in (arguments, copies))
    )
    expected = expected_steps(exact.decode_trace(*arguments), has_sketches=bits is not None)
    if [step.token for step in expected] != entry["tokens"]:
        raise RuntimeError(f"{entry['case']}: arithmetic on this machine gives other tokens")
    return check_steps(found, expected, config), DRIFT


def check_choice(port: ModuleType, entry: dict, _: Vectors) -> tuple[float, float]:
    """Check the tokens chosen from a few rows of logits."""
    inputs, expected = choice_of(entry["case"])
    _check_signature(port, "choose_token", inputs)
    found = _call(port, entry | {"compare": ["ids"]}, inputs)
    return _compare("ids", found["ids"], {"expected/ids": expected.astype(np.int32)}, entry)


def check_part_trace(port: ModuleType, entry: dict, _: Vectors) -> tuple[float, float]:
    """Check attention alone, pass by pass."""
    given = {"passes": passes_of(entry), "config": entry["config"]}
    copies, expected = deepcopy(given), traced(exact, entry, **given)
    with foreign_code(entry["law"], entry["says"]):  # reading what it returns may fail as well
        found = [dict(each) for each in traced(port, entry, **copies)]
        _check_unwritten(entry["operation"], given, copies)
        return check_passes(given["passes"], found, expected, entry["config"])


def check_requests(port: ModuleType, entry: dict, vectors: Vectors) -> tuple[float, float]:
    """Check a batch, request by request → the largest drift and what is allowed."""
    config, shape = entry["config"], vectors.manifest["models"][BATCH_MODEL]
    model = part_of(vectors.weights, BATCH_MODEL), shape
    names = ("weights", "model_config", "requests", "config")

    def decode(requests: list[dict]) -> list[dict]:
        given = dict(zip(names, (*model, requests, config), strict=True))
        copies = deepcopy(given)
        with foreign_code(entry["law"], entry["says"]):
            found = [read_result(each) for each in port.decode_batch(*copies.values())]
        _check_unwritten("decode_batch", given, copies)
        return found

    requests = requests_of(entry["case"], shape["vocab_size"])
    try:
        return check_batch(requests, decode, decoded_alone(model, requests, config)), DRIFT
    except Wrong as wrong:
        wrong.needs = (*SCORED_BY[sketch_bits(entry) is not None], *ATTENDED_BY, "decode_trace")
        raise


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


def header() -> str:
    """Name the columns of `line`."""
    return f"{'result':13} {'operation':16} {'case':34} {'error':>8} {'allowed':>8}  law"


def line(row: Row) -> str:
    """One row as text."""
    numbers = ["" if number is None else f"{number:.2g}" for number in (row.error, row.allowed)]
    name = f"{row.operation:16} {row.case:34}"
    return f"{row.status:13} {name} {numbers[0]:>8} {numbers[1]:>8}  {row.law}".rstrip()


def summary(rows: Sequence[Row]) -> str:
    """Say what to look at first, and how many cases there are of each result."""
    parts = [
        "\n".join(
            [
                f"{row.operation}, {row.case}: {row.law}",
                *wrap(row.says, 118, initial_indent="  ", subsequent_indent="  "),
            ]
        )
        for row in first_failures(rows)
    ]
    counts = Counter(row.status for row in rows)
    every = (PASS, FAIL, UNCHECKED, UNSUPPORTED)
    total = ", ".join(f"{counts[each]} {each}" for each in every if counts[each])
    left = [row for row in rows if row.status == UNSUPPORTED]
    names = dict.fromkeys(row.operation for row in left if row.operation in PARTS)
    if any(row.operation in OPTIONAL and row.grade == GRADES[0] for row in left):
        names["key sketches"] = None
    names |= dict.fromkeys(row.grade for row in left if row.grade != GRADES[0])
    parts.append(f"{total} ({', '.join(names)})" if names else total)
    return "\n\n".join(parts)
