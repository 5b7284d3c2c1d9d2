"""Where a generation goes wrong: a port's trace beside the expected one, step by step.

Everything is compared in the order in which a step computes it, so the first difference is the
cause: rows that a step must leave alone, then layer by layer the rows that it writes and the blocks
that it selects, then bounds or sketches, w and the token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import index
from typing import NoReturn

import numpy as np

from ..examples.numpy_port import centred, hadamard
from .grades import codes_of
from .wrong import IMPRECISE, Wrong, foreign_code, wrong_clause

# ‖k − k*‖ / ‖k*‖ of a cached key or value: far above float32's rounding, far below any mistake.
DRIFT = 1e-4
ARRAYS = ("keys", "values", "bounds", "indices")
SKETCH_ARRAYS = ("keys", "values", "codes", "scales", "indices")  # of a generation with sketches
KINDS = {"indices": "i", "codes": "u"}  # of numbers, where they may not be floats
TRACE = "4.6 the trace"


@dataclass(frozen=True)
class Step:
    """The state of a generation after the prefill or after one step."""

    keys: np.ndarray  # [layer, Hkv, T, D], the whole cache
    values: np.ndarray
    bounds: np.ndarray | None  # [layer, Hkv, 2, D, M]; None: the port does not show them
    indices: np.ndarray | None  # [layer, Hkv, N]; None: the step was a dense pass
    token: int  # chosen by the step
    window: int  # w after the step
    start: int = 0  # the first row that the step wrote
    codes: np.ndarray | None = None  # [layer, Hkv, T, D·bits/8]; None: not shown, or bounds
    scales: np.ndarray | None = None  # [layer, Hkv, T]


def expected_steps(entries: Sequence[Mapping], *, has_sketches: bool) -> list[Step]:
    """Make steps of what the NumPy port returns, with the first row that each has written."""
    steps, length = [], 0
    for step in read_trace(entries, len(entries), has_sketches=has_sketches):
        is_rectified = bool(steps) and step.window == 0
        start = length - (steps[-1].window if is_rectified else 0)
        steps.append(replace(step, start=start))
        length = step.keys.shape[2]
    return steps


def read_trace(
    entries: Iterable[Mapping], n_tokens: int, *, has_sketches: bool = False
) -> list[Step]:
    """Copy a port's entries as they come; one more than there should be is enough to know."""
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable):
        raise Wrong(TRACE, f"a {type(entries).__name__} instead of a list of entries")
    arrays = SKETCH_ARRAYS if has_sketches else ARRAYS
    steps, before, keys = [], None, (*arrays, "token", "window")
    for i, entry in enumerate(islice(entries, n_tokens + 1)):
        if not isinstance(entry, Mapping) or not set(keys) <= set(entry):
            raise Wrong(TRACE, f"entry {i} is not a mapping with the keys {', '.join(keys)}")

        # A list must hold copies. A generator may use its memory again.
        if before is not None and isinstance(entries, Sequence):
            shared = [name for name in arrays[:-1] if _share_memory(entry[name], before[name])]
            if shared:
                says = f"{' and '.join(shared)} of entries {i - 1} and {i} share memory"
                raise Wrong(TRACE, f"{says}: what a later step writes changes both, so copy")
        with foreign_code(TRACE, f"entry {i} can't be read"):
            steps.append(_step_of(entry, arrays))
        before = entry
    return steps


def _share_memory(one: object, other: object) -> bool:
    """True if two arrays, or tensors that NumPy can view, have an element in common."""
    if one is None or other is None:
        return False
    try:
        return np.shares_memory(np.asarray(one), np.asarray(other), max_work=10_000)
    except Exception:  # no view, or too intricate to tell
        return False


def _step_of(entry: Mapping, names: Sequence[str]) -> Step:
    arrays = {name: None if entry[name] is None else np.array(entry[name]) for name in names}
    for name, array in arrays.items():
        if array is not None and array.dtype.kind not in KINDS.get(name, "if"):
            raise TypeError(f"{name} of type {array.dtype}")
    for name in ("keys", "values"):
        arrays[name] = arrays[name].astype(np.float64)
    token, window = (index(entry[name]) for name in ("token", "window"))  # refuses 1.5
    return Step(**{"bounds": None, **arrays}, token=token, window=window)


@dataclass(frozen=True)
class Comparison:
    """One step as found and as expected."""

    found: Step
    wanted: Step
    before: Step | None  # the step before it, as found; None: this is the prefill
    config: Mapping

    @property
    def is_rectified(self) -> bool:
        """True if the step ends in a dense pass over its window, or is one."""
        return self.before is not None and self.wanted.window == 0


def check_steps(found: Sequence[Step], expected: Sequence[Step], config: Mapping) -> float:
    """Compare step by step and raise `Wrong` at the first difference → the largest drift."""
    largest = 0.0
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        at = Comparison(ours, theirs, found[i - 1] if i else None, config)
        try:
            _check_shapes(at)
            drift = np.maximum(_drift(at, "keys"), _drift(at, "values"))  # [layer, T]
            largest = max(largest, float(drift.max()))
            _check_step(at, drift)
        except Wrong as wrong:
            wrong.says = f"step {i}: {wrong.says}" if i else f"after the prefill: {wrong.says}"
            wrong.error, wrong.allowed = largest, DRIFT
            raise
    if len(found) != len(expected):
        says = f"{len(found)} entries instead of {len(expected)}: one after the prefill, one after"
        says = f"{says} every step, and the last token is never fed"
        raise Wrong("4.5 end of generation", says)
    return largest


def _drift(at: Comparison, name: str) -> np.ndarray:
    """‖k − k*‖ / ‖k*‖ of every token, the largest over heads: [layer, T]."""
    found, wanted = getattr(at.found, name), getattr(at.wanted, name)  # [layer, Hkv, T, D]
    ratio = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return np.where(np.isnan(ratio), np.inf, ratio).max(axis=1)


def _check_shapes(at: Comparison) -> None:
    layers, kv_heads, tokens, head_dim = right = at.wanted.keys.shape
    for name in ("keys", "values"):
        given = getattr(at.found, name).shape
        says = f"{name} of shape {list(given)}, expected [layer, Hkv, T, D] = {list(right)}"
        if len(given) != 4 or given[:2] + given[3:] != right[:2] + right[3:]:
            raise Wrong(TRACE, says)
        if given != right and at.before is None:
            says = f"{says}: the prompt is in the cache, the pending token is not"
            raise Wrong("4.1 prefill", says)
        if given != right:
            if at.is_rectified and at.config["schedule"] == "fused":
                says = f"{says}: a dense pass, fused, feeds the window and the pending token"
                raise Wrong("4.4 schedules", says)
            says = f"{says}: every step caches one token more, rectification or not"
            raise Wrong("4.2 sparse step", says)

    # Selections may have any width, bounds and sketches any capacity, which is one axis of each.
    n_blocks = -(-tokens // at.config["block_size"])
    n_bytes = head_dim * at.config.get("sketch_bits", 0) // 8
    shapes = {
        "indices": ((layers, kv_heads, 0), 2),
        "bounds": ((layers, kv_heads, 2, head_dim, n_blocks), 4),
        "codes": ((layers, kv_heads, tokens, n_bytes), 2),
        "scales": ((layers, kv_heads, tokens), 2),
    }
    for name, (least, axis) in shapes.items():
        array = getattr(at.found, name)
        given = least if array is None else array.shape
        rest = given[:axis] + given[axis + 1 :], least[:axis] + least[axis + 1 :]
        if len(given) != len(least) or rest[0] != rest[1] or given[axis] < least[axis]:
            raise Wrong(TRACE, f"{name} of shape {list(given)}, expected {list(least)} or wider")


def _check_step(at: Comparison, drift: np.ndarray) -> None:
    found, wanted = at.found, at.wanted
    _check_kind(at)
    if at.before is not None and (drift[:, : wanted.start] > DRIFT).any():
        _blame_untouched_rows(at, drift)
    for layer in range(len(drift)):
        if (drift[layer, wanted.start :] > DRIFT).any():
            _blame_rows(at, layer, drift[layer])
        if wanted.indices is not None:
            ours, theirs = _sets(found.indices[layer]), _sets(wanted.indices[layer])
            if ours != theirs:
                says = f"layer {layer} selects {ours} instead of {theirs}, its cache being right"
                _blame_selection(at, layer, says)
    for layer in range(len(drift)):
        stale = _stale_blocks(found, layer, at.config["block_size"])
        if stale:
            why = _AS_CACHED if at.before is None else _REBUILT
            says = f"bounds of layer {layer}, blocks {stale}, are not those of its keys: {why}"
            raise Wrong("law 2 online = rebuilt", says, ("block_bounds",))
        stale = _stale_rows(found, layer)
        if stale:
            says = f"sketches of layer {layer}, {_listed(stale)}, are not those of its keys"
            why = _AS_CACHED if at.before is None else _ITS_OWN
            raise Wrong("law 12 online = rebuilt", f"{says}: {why}", ("sketch_keys",))
    _check_choice(at)


def _sets(indices: np.ndarray) -> list[list[int]]:
    """The blocks that every KV head selects, in order and without −1: [Hkv, N] → lists."""
    return [sorted({*row[row >= 0].tolist()}) for row in indices]


def _check_kind(at: Comparison) -> None:
    """Refuse a dense pass in place of a sparse step, and the other way round."""
    kinds = {True: "a dense pass", False: "a sparse step"}
    given, due = (kinds[step.indices is None] for step in (at.found, at.wanted))
    if given != due and at.before is None:
        raise Wrong("4.1 prefill", "blocks are selected, but the prompt is encoded densely")
    if given != due:
        when = f"schedule {at.config['schedule']}, interval {at.config['interval']}"
        raise Wrong("4.4 schedules", f"{given} where {due} is due: {when}")


def _blame_untouched_rows(at: Comparison, drift: np.ndarray) -> NoReturn:
    """Rows changed that this step had to leave alone."""
    start, w, f = at.wanted.start, at.found.window, at.config["interval"]
    rows = np.flatnonzero((drift[:, :start] > DRIFT).any(axis=0)).tolist()
    where = f"{_listed(rows)} changed"
    if w < at.wanted.window:
        says = f"{where}, and w is {w}: no rectification is due, interval {f}"
        raise Wrong("4.4 schedules", says)
    raise Wrong("law 7 bounded drift", f"{where} in a step that writes the rows from {start} on")


_BETWEEN = (
    "queries, attention over what this layer has written, the output projection with heads side by"
    " side, the residual stream, norms, or the MLP"
)
_INTO = (
    "what makes keys and values: the embedding, the norm with its epsilon inside the root,"
    " projections and biases, norms of heads, RoPE"
)
_ATTENDED = "it appends first, so that its token sees itself, then attends to valid tokens alone"
_KEPT = "sparse steps wrote them; the window is the newest w tokens, up to the last one cached"
_AS_CACHED = "they cover keys as they are cached, after norms of heads and RoPE"
_REBUILT = "after every append and every rectification they must be rebuilt, not extended"
_ITS_OWN = "every append and every rectification writes the sketches of the tokens that it writes"


def _blame_rows(at: Comparison, layer: int, drift: np.ndarray) -> NoReturn:
    """Rows are wrong that this step had to write."""
    start, last, f = at.wanted.start, at.wanted.keys.shape[2] - 1, at.config["interval"]
    rows = (np.flatnonzero(drift[start:] > DRIFT) + start).tolist()
    names = [name for name in ("keys", "values") if (_drift(at, name)[layer] > DRIFT).any()]
    where = f"{' and '.join(names)} of layer {layer}, {_listed(rows)}"
    where = f"{where}, off by {drift[rows].max():.1g} of their norm"
    is_close, is_dense = drift[rows].max() < IMPRECISE, f == 1 and at.config["schedule"] == "fused"
    if is_close:
        where += " (so little may be a wrong epsilon, or arithmetic narrower than float32)"

    def wrong(law: str, says: str, *needs: str) -> Wrong:
        return Wrong(law, f"{where}: {says}", needs)

    # The prefill: the model itself. Later steps show it too, if what is wrong is so little that no
    # other token, position or key would do.
    if at.before is None and layer and rows == [last] and last:
        says = "the prompt's last token is part of the dense pass, like those before it"
        raise wrong("4.1 prefill", says)
    if at.before is None or (is_close and (is_dense or layer == 0)):
        needs = ("dense_attention",) if layer else ()
        raise wrong("3 model", _BETWEEN if layer else _INTO, *needs)

    # A sparse step.
    if layer == 0 and rows == [last]:
        raise wrong("4.2 pending token", "a step feeds the pending token, at position T")
    if not at.is_rectified:
        says = f"layer {layer - 1} selected the right blocks, so look at the step: {_ATTENDED}"
        raise wrong("4.2 sparse step", says, "sparse_attention")

    # A step that rectifies.
    if at.found.window > 0:
        says = f"w is {at.found.window}, but a rectification is due, every {f} tokens"
        raise wrong("4.4 schedules", says)
    if is_dense:
        says = "with interval 1, fused, every step is a dense pass"
        raise wrong("law 8 corners", says, "dense_attention")
    pairs = ((at.found.keys, at.before.keys), (at.found.values, at.before.values))
    cached = [row for row in rows if row < last]
    # Layer 0 comes from tokens and positions alone, so what is wrong there was not kept.
    if layer and any(
        (now[layer, :, row] == old[layer, :, row]).all(axis=-1).any()  # one head is enough
        for now, old in pairs
        for row in cached
    ):
        raise wrong("law 6 rectification is exact", _KEPT)
    if layer == 0:
        says = "a rectification feeds the same tokens at their original positions"
        raise wrong("4.3 positions", says)
    says = "encoded anew, but not as dense prefill encodes them"
    if rows == [last]:
        says = "the dense pass must end with the newest token, which is missing from it"
    raise wrong("law 6 rectification is exact", says, "dense_attention")


def _listed(rows: Sequence[int]) -> str:
    return f"rows {rows}" if len(rows) < 6 else f"{len(rows)} rows from {rows[0]} to {rows[-1]}"


def _stale_blocks(found: Step, layer: int, block_size: int) -> list[int]:
    """Blocks whose bounds are not the minima and maxima of the port's own keys."""
    if found.bounds is None:
        return []
    keys, stale = found.keys[layer], []  # [Hkv, T, D]
    for i in range(-(-keys.shape[1] // block_size)):
        block = keys[:, i * block_size : (i + 1) * block_size]
        right = np.stack((block.min(axis=1), block.max(axis=1)), axis=1)  # [Hkv, 2, D]
        if not np.array_equal(found.bounds[layer, ..., i], right, equal_nan=True):
            stale.append(i)
    return stale


def _stale_rows(found: Step, layer: int) -> list[int]:
    """Rows whose codes or scales are not those of the port's own keys, in float32 or wider.

    A level may be the next one where a channel lies within rounding of the threshold between them.
    Scales are compared with those of the codes that are there.
    """
    if found.codes is None or found.scales is None:
        return []
    keys = found.keys[layer]  # [Hkv, T, D]
    codes, scales = found.codes[layer, :, : keys.shape[1]], found.scales[layer, :, : keys.shape[1]]
    rotated, head_dim = hadamard(keys), keys.shape[-1]
    code, bits = codes_of(codes.astype(np.uint8), head_dim), 8 * codes.shape[-1] // head_dim

    # First-order rounding of a channel in float32, twice; it is enough for a scale as well.
    run = head_dim & -head_dim
    size = np.abs(keys).sum(axis=-1, keepdims=True) * run**-0.5  # no rotated channel is larger
    rounding = 2.0**-23 * (2 * head_dim + 8) * size
    step = 0.9957 * np.sqrt((rotated**2).mean(axis=-1, keepdims=True))
    thresholds = (0.0,) if bits == 1 else (-1.0, 0.0, 1.0)
    low, high = (
        centred(
            sum(rotated >= threshold * step + side * rounding for threshold in thresholds), bits
        )
        for side in (1, -1)
    )
    right = (rotated * code).sum(axis=-1) / (code**2).sum(axis=-1)
    is_right = ((low <= code) & (code <= high)).all(axis=-1)
    is_right &= np.abs(scales - right) <= rounding[..., 0]  # False for NaN
    return np.flatnonzero(~is_right.all(axis=0)).tolist()


def _blame_selection(at: Comparison, layer: int, says: str) -> NoReturn:
    found, config = at.found, at.config
    clause = wrong_clause(found.indices[layer], at.wanted.indices[layer], config["local_blocks"])
    if clause is not None:
        law, what = clause
        raise Wrong(law, f"{says}: {what}", ("select_blocks",))
    rest = "scores take this layer's query after norm and RoPE, and T + 1 tokens"
    if config.get("selection") == "sketch":
        needs = ("sketch_keys", "score_sketch", "select_blocks")
        if found.codes is None or found.scales is None or _stale_rows(found, layer):
            says = f"{says}, but not its sketches: {_ITS_OWN}"
            raise Wrong("law 12 online = rebuilt", says, needs)
        raise Wrong("4.2 sparse step", f"{says}, and its sketches: {rest}", needs[1:])
    needs = ("block_bounds", "score_blocks", "select_blocks")
    if found.bounds is None or _stale_blocks(found, layer, config["block_size"]):
        says = f"{says}, but not its bounds: {_REBUILT}"
        raise Wrong("law 2 online = rebuilt", says, needs)
    raise Wrong("4.2 sparse step", f"{says}, and its bounds: {rest}", needs[1:])


def _check_choice(at: Comparison) -> None:
    """Compare w and the token."""
    found, wanted, f = at.found, at.wanted, at.config["interval"]
    if found.window != wanted.window:
        raise Wrong("4.3 window", f"w is {found.window} instead of {wanted.window}")
    if found.token == wanted.token:
        return
    says = f"token {found.token} instead of {wanted.token}, the cache being right"

    # The schedule says which logits choose when a step rectifies. With interval 1, fused, every
    # step is a dense pass: there only the old token once more speaks of logits not taken.
    if at.is_rectified and at.config["schedule"] == "paper":
        says = f"{says}: schedule paper takes the sparse step's logits, not the rectification's"
        raise Wrong("4.4 schedules", says)
    if at.is_rectified and (f != 1 or found.token == at.before.token):
        says = f"{says}: schedule fused takes the dense pass's logits of the pending token,"
        says = f"{says} every layer having attended to the window as it has just written it"
        raise Wrong("4.4 schedules", says, ("dense_attention",))
    if wanted.indices is not None:
        says = f"{says}: the last layer's attention to the blocks selected, from keys to logits"
        raise Wrong("4.2 sparse step", says, ("sparse_attention",))
    rest = "the last layer's attention and MLP, the final norm, the output projection"
    says = f"{says}: {rest}, then the largest logit"
    raise Wrong("4.5 greedy choice", says, ("dense_attention",))
