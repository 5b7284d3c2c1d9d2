"""Where a generation goes wrong: a port's trace against what is expected, in the terms of docs/porting.md.

Everything is compared in the order in which a step computes it, layer by layer, so that the first difference is the
cause: rows that a step must leave alone, then layer by layer the rows that it writes and the blocks that it selects,
then bounds, w and the token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index

import numpy as np

DRIFT = 1e-4  # ‖k − k*‖ / ‖k*‖ of a cached key or value: far above float32's rounding, far below any mistake's trace
IMPRECISE = 1e-2  # below this a drift may come from arithmetic narrower than float32
KEYS = ("keys", "values", "bounds", "indices", "token", "window")


@dataclass(frozen=True)
class Step:
    """What there is after the prefill or after one step; keys and values are the whole cache."""

    keys: np.ndarray  # [layer, Hkv, T, D]
    values: np.ndarray
    bounds: np.ndarray | None  # [layer, Hkv, 2, D, M], if the port tells
    indices: np.ndarray | None  # [layer, Hkv, N] of a sparse step
    token: int  # chosen by it
    window: int  # w after it
    start: int = 0  # rows from here on were written by it


@dataclass(frozen=True)
class Wrong:
    """The law that broke, what was found, and the operations without which it can't hold."""

    law: str
    says: str
    needs: tuple[str, ...] = ()


class NoTrace(ValueError):
    """What a port returned is not a trace."""


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
        chosen = indices if (indices >= 0).any() else None
        steps.append(Step(*cache, None, chosen, int(token), int(window), int(start)))
    return steps


def read_trace(entries: Iterable[Mapping], n_tokens: int) -> list[Step]:
    """A port's entries as steps, each copied when it comes; one more than there should be is enough to know.

    Errors: NoTrace if they are none, and whatever a port raises that makes them one by one.
    """
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable):
        raise NoTrace(f"a {type(entries).__name__} instead of a list of entries")
    steps, before = [], None
    for i, entry in enumerate(islice(entries, n_tokens + 1)):
        if not isinstance(entry, Mapping) or not set(KEYS) <= set(entry):
            raise NoTrace(f"entry {i} is not a mapping with the keys {', '.join(KEYS)}")
        if before is not None and isinstance(entries, Sequence):  # one that makes them one by one may reuse memory
            shared = [name for name in ("keys", "values", "bounds") if _share_memory(entry[name], before[name])]
            if shared:
                says = f"{' and '.join(shared)} of entries {i - 1} and {i} share memory"
                raise NoTrace(f"{says}: what a later step writes changes both, so copy")
        try:
            steps.append(_step_of(entry))
        except Exception as error:  # whatever a foreign object raises when it is read
            raise NoTrace(f"entry {i} can't be read ({type(error).__name__}: {error})") from error
        before = entry
    return steps


def _share_memory(one: object, other: object) -> bool:
    """Whether two arrays, or tensors that NumPy can view, have an element in common."""
    if one is None or other is None:
        return False
    try:
        return np.shares_memory(np.asarray(one), np.asarray(other), max_work=10_000)
    except Exception:  # not to be viewed, or too intricate to tell
        return False


def _step_of(entry: Mapping) -> Step:
    arrays = {name: None if entry[name] is None else np.array(entry[name]) for name in KEYS[:4]}
    for name, array in arrays.items():
        kinds = "i" if name == "indices" else "if"
        if array is not None and array.dtype.kind not in kinds:
            raise TypeError(f"{name} of type {array.dtype}")
    keys, values = (arrays[name].astype(np.float64) for name in ("keys", "values"))
    token, window = (index(entry[name]) for name in ("token", "window"))  # integers, not what can be cut to one
    return Step(keys, values, arrays["bounds"], arrays["indices"], token, window)


@dataclass(frozen=True)
class Comparison:
    """One step as it was found and as it should be, and both before it, which are None at the prefill."""

    found: Step
    wanted: Step
    found_before: Step | None
    before: Step | None
    config: Mapping

    def is_rectified(self) -> bool:
        """Whether the step ends in a dense pass over its window, or is one."""
        return self.before is not None and self.wanted.window == 0


def find_wrong(at: Comparison) -> tuple[Wrong | None, float]:
    """What is wrong first with one step, if anything, and the largest drift of its cache."""
    found, wanted = at.found, at.wanted
    wrong = _wrong_shape(at) or _wrong_kind(at)
    if wrong is not None:
        return wrong, 0.0
    drift = np.maximum(_drift(found.keys, wanted.keys), _drift(found.values, wanted.values))  # [layer, T]
    largest = float(drift.max())
    if at.before is not None and (drift[:, : wanted.start] > DRIFT).any():
        return _wrong_elsewhere(at, drift), largest
    for layer in range(len(drift)):
        if (drift[layer, wanted.start :] > DRIFT).any():
            return _wrong_rows(at, layer, drift[layer]), largest
        if wanted.indices is not None and _sets(found.indices[layer]) != _sets(wanted.indices[layer]):
            return _wrong_selection(at, layer), largest
    return _wrong_bounds(at) or _wrong_choice(at), largest


def _drift(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """‖k − k*‖ / ‖k*‖ of every token, the largest over heads: [layer, Hkv, T, D] twice → [layer, T]."""
    ratio = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return np.where(np.isnan(ratio), np.inf, ratio).max(axis=1)


def _sets(indices: np.ndarray) -> list[list[int]]:
    """What every KV head selects, in order and without −1: [Hkv, N] → lists."""
    return [sorted({*row[row >= 0].tolist()}) for row in indices]


def _wrong_shape(at: Comparison) -> Wrong | None:
    right = list(at.wanted.keys.shape)
    for name, array in (("keys", at.found.keys), ("values", at.found.values)):
        given = list(array.shape)
        if given == right:
            continue
        says = f"{name} of shape {given}, expected [layer, Hkv, T, D] = {right}"
        if len(given) != 4 or given[:2] + given[3:] != right[:2] + right[3:]:
            return Wrong("4.6 the trace", says)
        if at.before is None:
            return Wrong("4.1 prefill", f"{says}: the prompt is in the cache, the pending token is not")
        return Wrong("4.2 sparse step", f"{says}: every step caches one token more, rectification or not")
    layers, kv_heads, tokens, head_dim = right
    indices, bounds = at.found.indices, at.found.bounds
    if indices is not None and (indices.ndim != 3 or list(indices.shape[:2]) != right[:2]):
        return Wrong("4.6 the trace", f"indices of shape {list(indices.shape)}, expected [layer, Hkv, N] = {right[:2]}")
    least = [layers, kv_heads, 2, head_dim, -(-tokens // at.config["block_size"])]
    if bounds is not None and (bounds.ndim != 5 or list(bounds.shape[:4]) != least[:4] or bounds.shape[4] < least[4]):
        return Wrong("4.6 the trace", f"bounds of shape {list(bounds.shape)}, expected [layer, Hkv, 2, D, M] = {least}")
    return None


def _wrong_kind(at: Comparison) -> Wrong | None:
    """A dense pass for a sparse step, or the other way round."""
    due = f"schedule {at.config['schedule']}, interval {at.config['interval']}"
    if at.wanted.indices is not None and at.found.indices is None:
        return Wrong("4.4 schedules", f"a dense pass where a sparse step is due: {due}")
    if at.wanted.indices is None and at.found.indices is not None:
        if at.before is None:
            return Wrong("4.1 prefill", "blocks are selected, but the prompt is encoded densely")
        return Wrong("4.4 schedules", f"a sparse step where a dense pass is due: {due}")
    return None


def _wrong_elsewhere(at: Comparison, drift: np.ndarray) -> Wrong:
    """Rows that this step had to leave alone are changed."""
    rows = np.flatnonzero((drift[:, : at.wanted.start] > DRIFT).any(axis=0)).tolist()
    cached, where = at.before.keys.shape[2], f"{_listed(rows)} changed"
    if at.found.window < at.wanted.window:
        f = at.config["interval"]
        return Wrong("4.4 schedules", f"{where}, and w is {at.found.window}: no rectification is due, interval {f}")
    if at.wanted.start < cached:
        return Wrong("law 7 bounded drift", f"{where}, before the window, which begins at {at.wanted.start}")
    return Wrong("law 7 bounded drift", f"{where} in a step that writes row {cached} alone")


_BETWEEN = (
    "queries (their projection, bias, norm and RoPE) and attention over what this layer has written; or what lies"
    " between two layers: the output projection, heads side by side; the residual stream; norms; the MLP"
)
_INTO = (
    "what makes keys and values: the embedding, the norm with its epsilon inside the root, projections and biases,"
    " norms of heads, RoPE"
)
_ATTENDED = "each step appends first, so that its token sees itself, then attends to the selected blocks' valid tokens"
_WINDOW = "the window is the newest w tokens, up to the last one cached"


def _wrong_rows(at: Comparison, layer: int, drift: np.ndarray) -> Wrong:
    """Rows that this step had to write are not what they should be."""
    rows = (np.flatnonzero(drift[at.wanted.start :] > DRIFT) + at.wanted.start).tolist()
    where = f"{_which(at, layer)} of layer {layer}, {_listed(rows)}, off by {drift[rows].max():.1g} of their norm"
    if drift[rows].max() < IMPRECISE:
        where += " (so little may be arithmetic narrower than float32)"
    dense, f = ("dense_attention",), at.config["interval"]
    if at.before is None:
        last = at.wanted.keys.shape[2] - 1
        if layer and rows == [last] and last:
            return Wrong(
                "4.1 prefill", f"{where}: the prompt's last token is part of the dense pass, like those before it"
            )
        return Wrong("3 model", f"{where}: {_BETWEEN}", dense) if layer else Wrong("3 model", f"{where}: {_INTO}")
    cached = at.before.keys.shape[2]
    if layer == 0 and rows[0] >= cached:
        return Wrong("4.2 pending token", f"{where}: a step feeds the pending token, at position T")
    if not at.is_rectified():
        says = f"{where}, though layer {layer - 1} selected the right blocks: {_ATTENDED}"
        return Wrong("4.2 sparse step", says, ("sparse_attention",))
    if at.found.window > 0:
        return Wrong("4.4 schedules", f"{where}, and w is {at.found.window}: a rectification is due, every {f} tokens")
    if f == 1 and at.config["schedule"] == "fused":
        return Wrong("law 8 corners", f"{where}: with interval 1, fused, every step is a dense pass", dense)
    if any(row < cached and _is_kept(at, layer, row) for row in rows):
        says = f"{where}: they are still what sparse steps wrote; {_WINDOW}"
        return Wrong("law 6 rectification is exact", says)
    if layer == 0:
        return Wrong("4.3 positions", f"{where}: a rectification feeds the same tokens at their original positions")
    return Wrong("law 6 rectification is exact", f"{where}: encoded anew, but not as dense prefill encodes them", dense)


def _which(at: Comparison, layer: int) -> str:
    pairs = {"keys": (at.found.keys, at.wanted.keys), "values": (at.found.values, at.wanted.values)}
    return " and ".join(name for name, (ours, theirs) in pairs.items() if (_drift(ours, theirs)[layer] > DRIFT).any())


def _listed(rows: Sequence[int]) -> str:
    return f"rows {rows}" if len(rows) < 6 else f"{len(rows)} rows from {rows[0]} to {rows[-1]}"


def _is_kept(at: Comparison, layer: int, row: int) -> bool:
    """Whether a row of the cache is what it was before the step."""
    pairs = ((at.found.keys, at.found_before.keys), (at.found.values, at.found_before.values))
    return any(np.array_equal(now[layer, :, row], then[layer, :, row]) for now, then in pairs)


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


_REBUILT = "bounds must be those of the cache after every append and every rectification, rebuilt, not extended"


def _wrong_selection(at: Comparison, layer: int) -> Wrong:
    found, wanted = at.found, at.wanted
    ours, theirs = _sets(found.indices[layer]), _sets(wanted.indices[layer])
    says = f"layer {layer} selects {ours} instead of {theirs}, its cache being right"
    blocks = -(-wanted.keys.shape[2] // at.config["block_size"])
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        return Wrong("2.3 count", f"{says}: n of the {blocks} blocks at T + 1 tokens", ("select_blocks",))
    newest = range(max(0, blocks - at.config["local_blocks"]), blocks)
    if not all(set(newest) <= set(row) for row in ours):
        return Wrong("2.3 local blocks", f"{says}: the newest are in, whatever they score", ("select_blocks",))
    if found.bounds is None or _stale_blocks(found, layer, at.config["block_size"]):
        return Wrong("law 2 online = rebuilt", f"{says}: {_REBUILT}", ("block_bounds", "score_blocks", "select_blocks"))
    says = f"{says}, and its bounds: scores take this layer's query after norm and RoPE, and T + 1 tokens"
    return Wrong("4.2 sparse step", says, ("score_blocks", "select_blocks"))


def _wrong_bounds(at: Comparison) -> Wrong | None:
    for layer in range(len(at.found.keys)):
        stale = _stale_blocks(at.found, layer, at.config["block_size"])
        if stale:
            says = f"bounds of layer {layer}, blocks {stale}, are not the minima and maxima of its keys: {_REBUILT}"
            return Wrong("law 2 online = rebuilt", says, ("block_bounds",))
    return None


_FUSED_LOGITS = (
    "schedule fused takes the dense pass's last logits, the pending token's,"
    " every layer having attended to the window as it has just written it"
)


def _wrong_choice(at: Comparison) -> Wrong | None:
    """Of w and the token."""
    found, wanted, schedule = at.found, at.wanted, at.config["schedule"]
    if found.window != wanted.window:
        return Wrong("4.3 window", f"w is {found.window} instead of {wanted.window}")
    if found.token == wanted.token:
        return None
    says = f"token {found.token} instead of {wanted.token}, the cache being right"
    if schedule == "paper" and at.is_rectified():
        return Wrong("4.4 schedules", f"{says}: schedule paper discards the rectification's logits, the step's count")
    # With interval 1 every step is a dense pass: then only the old choice once more speaks of logits not taken.
    is_old = at.config["interval"] != 1 or (at.before is not None and found.token == at.found_before.token)
    if schedule == "fused" and at.is_rectified() and is_old:
        return Wrong("4.4 schedules", f"{says}: {_FUSED_LOGITS}", ("dense_attention",))
    needs = ("dense_attention",) if wanted.indices is None else ("sparse_attention",)
    rest = "the last layer's attention and MLP, the final norm, the output projection, then the largest logit"
    return Wrong("4.5 greedy choice", f"{says}: {rest}", needs)
