"""Checks a port against the conformance vectors, and says what is wrong in the terms of the specification.

A port is a module with the five operations, NumPy arrays in and out, and `decode_trace` for whole generations;
docs/porting.md says what each must compute. Cases of one operation form a ladder, each asking for one thing more than
those before it: the first that fails names the law. A generation is compared step by step up to where it first goes
wrong, and what goes wrong there names the law.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

from .checks import require

OPERATIONS = ("block_bounds", "score_blocks", "select_blocks", "sparse_attention", "dense_attention")
DRIFT = 1e-4  # ‖k − k*‖ / ‖k*‖ of a cached key or value: far above float32's rounding, far below any mistake's trace
PASS, FAIL, UNCHECKED = "pass", "FAIL", "not checked"
RAISED = "4.6 the trace, an exception"
# What a step of a generation needs, by the law that it would otherwise seem to break.
NEEDS = {
    "4.1 prefill": ("dense_attention",),
    "4.2 sparse step": ("sparse_attention",),
    "law 2 online = rebuilt": ("block_bounds", "score_blocks", "select_blocks"),
    "law 6 rectification is exact": ("dense_attention",),
    "law 8 corners": ("dense_attention",),
}
STYLES = {PASS: "none", FAIL: "bold red", UNCHECKED: "yellow"}


@dataclass(frozen=True)
class Row:
    """One case and what came of it."""

    operation: str
    case: str
    status: str
    error: float | None = None  # the largest, as a share of what is allowed …
    allowed: float | None = None  # … there; 0 where results must be equal
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
    is_file = name.endswith(".py")
    require(
        not is_file or Path(name).is_file(), "MODULE", name, "a module that can be imported, or a file ending in .py"
    )
    try:
        if is_file:
            spec = importlib.util.spec_from_file_location(Path(name).stem, name)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up there
            spec.loader.exec_module(module)
            return module
        sys.path.insert(0, "")
        return importlib.import_module(name)
    except Exception as error:  # whatever a foreign module raises
        allowed = "a module that can be imported, or a file ending in .py"
        raise ValueError(f"MODULE: got {name} ({type(error).__name__}: {error}); allowed: {allowed}") from error


def check_port(port: ModuleType, vectors: Vectors, *, ops_only: bool = False) -> list[Row]:
    """Every case in order; without `decode_trace`, or if told to leave it, those rows say that they are not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN and infinity, which the vectors are full of
        return _check_port(port, vectors, ops_only=ops_only)


def _check_port(port: ModuleType, vectors: Vectors, *, ops_only: bool) -> list[Row]:
    rows = [check_operation(port, entry, vectors.operations) for entry in vectors.manifest["operations"]]
    broken = {row.operation: row for row in reversed(rows) if row.status == FAIL}  # the first of each stays
    for entry in vectors.manifest["traces"]:
        if ops_only or not hasattr(port, "decode_trace"):
            rows.append(Row("decode_trace", entry["case"], UNCHECKED, says="no decode_trace" * (not ops_only)))
            continue
        row = check_trace(port, entry, vectors)
        for operation in NEEDS.get(row.law, ()) if row.status == FAIL else ():
            if operation in broken:  # a generation can't be right then
                says = f"{row.says}; {operation} fails as well, so mend that first"
                row = replace(row, law=broken[operation].law, says=says)
                break
        rows.append(row)
    return rows


def first_failures(rows: Sequence[Row]) -> list[Row]:
    """Of every operation the first row that failed: what is below it may fail for the same reason.

    A generation that ran tells more than one that raised an exception.
    """
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.law == RAISED):
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
    function = getattr(port, operation, None)
    if function is None:
        return Row(operation, case, FAIL, law="2 signatures", says=f"the port has no {operation}")
    start = f"{operation}/{case}/"
    arrays = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    inputs = {name: array.copy() for name, array in arrays.items() if "/" not in name}
    if operation.endswith("attention"):
        inputs["return_lse"] = True
    try:
        found = function(**inputs, **entry["arguments"])
        found = dict(zip(("out", "lse") if operation.endswith("attention") else (None,), _listed(found), strict=True))
    except Exception as error:  # whatever a foreign function raises
        law = "2 signatures" if isinstance(error, TypeError) else entry["law"]
        return Row(operation, case, FAIL, law=law, says=f"{entry['says']} ({type(error).__name__}: {error})")
    worst = Row(operation, case, PASS, 0.0, 0.0, entry["law"])
    for name in entry["compare"]:
        kept = name if operation.endswith("attention") else {"set": "indices"}.get(name, name)
        actual = found[kept if operation.endswith("attention") else None]
        expected, allowed = arrays[f"expected/{kept}"], arrays.get(f"allowed/{kept}", np.float32(0))
        row = _compared(
            Row(operation, case, PASS, law=entry["law"], says=entry["says"]), actual, expected, allowed, name
        )
        if row.status == FAIL:
            return _as_selection(row, np.asarray(actual), expected, entry) if operation == "select_blocks" else row
        worst = max(worst, row, key=lambda each: _share(each.error, each.allowed))
    return worst


def _listed(found: object) -> tuple:
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _share(error: float, allowed: float) -> float:
    return error / allowed if allowed else float(error > 0)


def _compared(row: Row, actual: object, expected: np.ndarray, allowed: np.ndarray, name: str) -> Row:
    """The row with its verdict; where the shape or the type is wrong, the law is that of the signatures."""
    actual = np.asarray(actual)
    wanted = "i" if expected.dtype.kind == "i" else "f"
    if actual.dtype.kind != wanted or actual.ndim != expected.ndim:
        given = f"{name}: got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        return Row(row.operation, row.case, FAIL, law="2 signatures", says=given)
    if wanted == "i":
        expected = _padded(expected, actual.shape[-1])  # a list may be longer than it must
        if name == "set":
            actual, expected = np.sort(actual, axis=-1), np.sort(expected, axis=-1)
    if actual.shape != expected.shape:
        given = f"{name}: got shape {list(actual.shape)}, expected {list(expected.shape)}"
        return Row(row.operation, row.case, FAIL, law=row.law, says=f"{row.says} ({given})")
    with np.errstate(invalid="ignore"):
        same = (actual == expected) | ((actual != actual) & (expected != expected))
        error = np.where(same, 0.0, np.abs(actual.astype(np.float64) - expected))
    error = np.where(np.isnan(error), np.inf, error)
    allowed = np.broadcast_to(allowed, error.shape).astype(np.float64)
    if error.size == 0:
        return Row(row.operation, row.case, PASS, 0.0, 0.0, row.law)
    is_wrong = error > allowed
    shares = np.where(is_wrong, np.inf, 0) + np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0)
    worst = np.unravel_index(np.argmax(shares), error.shape)
    if not is_wrong.any():
        return Row(row.operation, row.case, PASS, float(error[worst]), float(allowed[worst]), row.law)
    place = [int(i) for i in worst]
    where = f"{name}{place} is {actual[worst]:.6g} instead of {expected[worst]:.6g}"
    says = f"{row.says} ({int(is_wrong.sum())} of {error.size} differ: {where})"
    return Row(row.operation, row.case, FAIL, float(error[worst]), float(allowed[worst]), row.law, says)


def _as_selection(row: Row, actual: np.ndarray, expected: np.ndarray, entry: dict) -> Row:
    """A selection that is wrong in how many it takes, or in leaving out the newest, is told so in plain words."""
    if actual.dtype.kind != "i" or actual.shape[:-1] != expected.shape[:-1]:
        return row
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


@dataclass(frozen=True)
class Step:
    """What is expected after the prefill or after one step; keys and values are the whole cache."""

    keys: np.ndarray  # [layer, Hkv, T, D]
    values: np.ndarray
    indices: np.ndarray | None  # [layer, Hkv, N] of a sparse step
    token: int  # chosen by it
    window: int  # w after it
    start: int  # rows from here on were written by it


def expected_steps(case: str, tensors: Mapping[str, np.ndarray]) -> list[Step]:
    """The generation of one trace, its cache put together from what every step wrote."""
    names = ("token", "window", "start", "end")
    steps, used = [], 0
    cache = [np.zeros((*tensors[f"{case}/keys"].shape[1:3], 0, tensors[f"{case}/keys"].shape[3]))] * 2
    for i, (token, window, start, end) in enumerate(zip(*(tensors[f"{case}/{name}"] for name in names), strict=True)):
        rows = slice(used, used + end - start)
        new = [tensors[f"{case}/{name}"][rows].transpose(1, 2, 0, 3) for name in ("keys", "values")]
        cache = [np.concatenate((old[:, :, :start], fresh), axis=2) for old, fresh in zip(cache, new, strict=True)]
        used += end - start
        indices = tensors.get(f"{case}/indices", np.full((i + 1, 1, 1, 1), -1))[i]
        steps.append(Step(*cache, indices if (indices >= 0).any() else None, int(token), int(window), int(start)))
    return steps


def check_trace(port: ModuleType, entry: dict, vectors: Vectors) -> Row:
    """One generation, up to the first step that goes wrong."""
    case, config = entry["case"], entry["config"]
    weights = {name: tensor.copy() for name, tensor in vectors.weights.items()}
    try:
        found = list(
            port.decode_trace(weights, dict(vectors.manifest["model"]), list(vectors.manifest["prompt"]), dict(config))
        )
        found = [_step_of(step) for step in found]
    except Exception as error:  # whatever a foreign function raises
        return Row("decode_trace", case, FAIL, law=RAISED, says=f"{type(error).__name__}: {error}")
    expected, largest = expected_steps(case, vectors.traces), 0.0
    for i, wanted in enumerate(expected):
        if i == len(found):
            says = f"{len(found)} entries instead of {len(expected)}: one after the prefill, one after every step"
            return Row("decode_trace", case, FAIL, law="4.5 end of generation", says=says)
        wrong, drift = compare_step(
            found[i], wanted, expected[i - 1] if i else None, found[i - 1] if i else None, config
        )
        largest = max(largest, drift)
        if wrong is not None:
            law, says = wrong
            return Row("decode_trace", case, FAIL, drift, DRIFT, law, f"{_name(i)}: {says}")
    if len(found) > len(expected):
        says = f"{len(found)} entries instead of {len(expected)}: the last token is never fed"
        return Row("decode_trace", case, FAIL, law="4.5 end of generation", says=says)
    return Row("decode_trace", case, PASS, largest, DRIFT, entry["law"])


def _name(i: int) -> str:
    return f"step {i}" if i else "after the prefill"


def _step_of(step: Mapping) -> Step:
    indices = step["indices"]
    return Step(
        np.asarray(step["keys"], np.float64),
        np.asarray(step["values"], np.float64),
        None if indices is None else np.asarray(indices),
        int(step["token"]),
        int(step["window"]),
        0,
    )


Wrong = tuple[str, str]  # the law, and what was found


def compare_step(
    found: Step, wanted: Step, before: Step | None, found_before: Step | None, config: Mapping
) -> tuple[Wrong | None, float]:
    """What is wrong with one step, and the drift of its cache from what it should be.

    Looked at in the order in which a step computes, layer by layer, so that the first difference is the cause.
    """
    if found.keys.shape != wanted.keys.shape or found.values.shape != wanted.values.shape:
        return _wrong_shape(found, wanted, before), 0.0
    if (found.indices is None) != (wanted.indices is None):
        return _wrong_kind(found, wanted, config), 0.0
    drift = np.maximum(_drift(found.keys, wanted.keys), _drift(found.values, wanted.values))  # [layer, T]
    largest = float(drift.max())
    if before is not None and (drift[:, : wanted.start] > DRIFT).any():
        return _wrong_elsewhere(drift, wanted, before), largest
    for layer, of_layer in enumerate(drift):
        if (of_layer[wanted.start :] > DRIFT).any():
            return _wrong_rows(layer, of_layer, found, wanted, before, found_before, config), largest
        if wanted.indices is not None and not _same_sets(found.indices[layer], wanted.indices[layer]):
            return _wrong_selection(layer, found, wanted), largest
    if found.window != wanted.window:
        return ("4.3 window", f"w is {found.window} instead of {wanted.window}"), largest
    if found.token != wanted.token:
        return _wrong_token(found, wanted, before, config), largest
    return None, largest


def _drift(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """‖k − k*‖ / ‖k*‖ of every token, the largest over heads: [layer, Hkv, T, D] twice → [layer, T]."""
    ratio = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return np.where(np.isnan(ratio), np.inf, ratio).max(axis=1)


def _same_sets(found: np.ndarray, wanted: np.ndarray) -> bool:
    rows = zip(found.reshape(len(wanted), -1), wanted, strict=True)
    return all(set(ours[ours >= 0].tolist()) == set(theirs[theirs >= 0].tolist()) for ours, theirs in rows)


def _wrong_shape(found: Step, wanted: Step, before: Step | None) -> Wrong:
    given, right = list(found.keys.shape), list(wanted.keys.shape)
    says = f"keys and values of shape {given}, expected [layer, Hkv, T, D] = {right}"
    if len(given) != 4 or given[:2] + given[3:] != right[:2] + right[3:]:
        return "4.6 the trace", says
    if before is None:
        return "4.1 prefill", f"{says}: the prompt is in the cache, the pending token is not"
    return "4.2 sparse step", f"{says}: a step appends one token, a rectification none but the pending one (fused)"


def _wrong_kind(found: Step, wanted: Step, config: Mapping) -> Wrong:
    f, schedule = config["interval"], config["schedule"]
    if wanted.indices is None:
        says = f"a sparse step where a dense pass is due: schedule {schedule}, interval {f}"
        return ("4.4 schedules", says) if wanted.start else ("4.1 prefill", "the prompt is encoded densely")
    return "4.4 schedules", f"a dense pass where a sparse step is due: schedule {schedule}, interval {f}"


def _wrong_elsewhere(drift: np.ndarray, wanted: Step, before: Step) -> Wrong:
    rows = np.flatnonzero((drift[:, : wanted.start] > DRIFT).any(axis=0)).tolist()
    n = before.keys.shape[2]
    if wanted.start < n:
        return "law 7 bounded drift", f"{_listed_rows(rows)} changed, before the window, which begins at {wanted.start}"
    return "law 7 bounded drift", f"{_listed_rows(rows)} changed in a step that writes row {n} alone"


def _wrong_rows(
    layer: int, drift: np.ndarray, found: Step, wanted: Step, before: Step | None, found_before: Step | None,
    config: Mapping,
) -> Wrong:  # fmt: skip
    """Rows that this step had to write are not what they should be."""
    rows = (np.flatnonzero(drift[wanted.start :] > DRIFT) + wanted.start).tolist()
    where = f"keys or values of layer {layer}, {_listed_rows(rows)}, differ"
    if before is None:
        return ("3 model", where) if layer == 0 else ("4.1 prefill", f"{where}: {_PREFILL}")
    n, f = before.keys.shape[2], config["interval"]
    if layer == 0 and rows[0] >= n:
        return "4.2 pending token", f"{where}: a step feeds the pending token, at position T"
    if f is None or wanted.window > 0:
        return "4.2 sparse step", f"{where}, though layer {layer - 1} selected the right blocks: {_ATTENDED}"
    if found.window > 0:
        return "4.4 schedules", f"{where}, and w is {found.window}: a rectification is due, every {f} tokens"
    if f == 1 and config["schedule"] == "fused":
        return "law 8 corners", f"{where}: with interval 1, fused, every step is a dense pass"
    if any(row < n and _is_kept(layer, row, found, found_before) for row in rows):
        return "law 6 rectification is exact", f"{where}: they are still what sparse steps wrote; {_WINDOW}"
    if layer == 0:
        return "4.3 positions", f"{where}: a rectification feeds the same tokens at their original positions"
    return "law 6 rectification is exact", f"{where}: encoded anew, but not as dense prefill encodes them"


def _listed_rows(rows: Sequence[int]) -> str:
    return f"rows {rows}" if len(rows) < 6 else f"{len(rows)} rows from {rows[0]} to {rows[-1]}"


_WINDOW = "the window is the newest w tokens, up to the last one cached"
_PREFILL = "dense causal attention over the prompt, every layer writing before it attends"
_ATTENDED = "each step appends first, so that its token sees itself, then attends to the selected blocks' valid tokens"


def _is_kept(layer: int, row: int, found: Step, before: Step) -> bool:
    """Whether a row of the cache is what it was before the step."""
    pairs = ((found.keys, before.keys), (found.values, before.values))
    return any(np.array_equal(now[layer, :, row], then[layer, :, row]) for now, then in pairs)


def _wrong_selection(layer: int, found: Step, wanted: Step) -> Wrong:
    ours, theirs = (np.asarray(each[layer]).tolist() for each in (found.indices, wanted.indices))
    says = f"layer {layer} selects {ours} instead of {theirs}, its cache being right: bounds must be those of the cache"
    return "law 2 online = rebuilt", f"{says}, after every append and every rectification"


def _wrong_token(found: Step, wanted: Step, before: Step | None, config: Mapping) -> Wrong:
    says = f"token {found.token} instead of {wanted.token}, the cache being right"
    if before is not None and config["schedule"] == "paper" and wanted.window == 0:
        return "4.4 schedules", f"{says}: schedule paper discards the rectification's logits, the step's count"
    if before is not None and config["schedule"] == "fused" and wanted.indices is None:
        return "4.4 schedules", f"{says}: schedule fused takes the dense pass's last logits, those of the pending token"
    return "4.5 greedy choice", f"{says}: the largest logit after the final norm and the output projection"


# ---- Report ----------------------------------------------------------------------------------------------------------


def report(name: str, vectors: Vectors, rows: Sequence[Row], *, ops_only: bool) -> dict[str, object]:
    """The result as one object for --json."""
    return {
        "module": name,
        "version": vectors.manifest["version"],
        "passed": is_passed(rows, ops_only=ops_only),
        "first_failures": [asdict(row) for row in first_failures(rows)],
        "rows": [asdict(row) for row in rows],
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
        console.print(f"\n{row.operation}, {row.case}: {row.law}\n  {row.says}", style=STYLES[FAIL])
    if any(row.status == UNCHECKED for row in rows):
        console.print("\nThe generations are not checked: the port has no decode_trace, or was not to be asked for it.")
    counts = Counter(row.status for row in rows)
    console.print(
        "\n" + ", ".join(f"{counts[status]} {status}" for status in (PASS, FAIL, UNCHECKED) if counts[status])
    )
