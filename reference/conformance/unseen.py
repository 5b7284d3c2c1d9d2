"""Masks of what must not matter to an operation, and garbage for it (laws 5 and 13)."""

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np


def unseen(operation: str, inputs: Mapping) -> dict[str, dict[str, np.ndarray]]:
    """Masks of the elements of the inputs that must not matter, by the law that says so."""
    if operation == "sketch_keys":
        return {}
    lengths = np.asarray(inputs["lengths"], np.int64)
    if operation in ("score_blocks", "select_blocks"):
        name = "bounds" if operation == "score_blocks" else "scores"
        n_blocks, dims = inputs[name].shape[-1], inputs[name].ndim
        block_size = inputs.get("config", inputs)["block_size"]
        past = np.arange(n_blocks) * block_size >= lengths[:, None]  # [B, M]
        law = "law 5 inertness" if operation == "score_blocks" else "2.3 past the end"
        return {law: {name: past.reshape(len(lengths), *[1] * (dims - 2), n_blocks)}}
    slots = np.arange(inputs["codes" if operation == "score_sketch" else "keys"].shape[2])
    past = (slots >= lengths[:, None])[:, None]  # [B, 1, T_max]
    if operation == "score_sketch":
        return {"law 13 inertness": {"codes": past[..., None], "scales": past}}
    if operation == "block_bounds":
        return {"law 5 inertness": {"keys": past[..., None]}}
    if operation == "sparse_attention":
        block = slots // inputs["block_size"]
        is_selected = (inputs["indices"][..., None] == block).any(axis=2)  # [B, Hkv, T_max]
        hidden = (past | ~is_selected)[..., None]
        return {"law 5 inertness": {"keys": hidden, "values": hidden}}

    # Dense attention, and the rows of its window that mean nothing.
    batch, _, n_queries, _ = inputs["query"].shape
    counts = inputs.get("query_lengths")
    counts = np.full(batch, n_queries) if counts is None else np.asarray(counts, np.int64)
    row = np.arange(n_queries)
    nothing = (row >= counts[:, None]) | (lengths[:, None] - counts[:, None] + row < 0)
    return {
        "law 5 inertness": {"keys": past[..., None], "values": past[..., None]},
        "2.5 rows that mean nothing": {"query": nothing[:, None, :, None]},
    }


def with_garbage(operation: str, inputs: Mapping) -> Iterator[tuple[str, str, dict]]:
    """Make inputs with other garbage in what must not matter → (law, what it is, inputs).

    Huge numbers come before NaN: a maximum in C drops NaN, so that NaN alone would not show one
    that is taken before the mask.
    """
    for (law, masks), what in product(unseen(operation, inputs).items(), ("huge numbers", "NaN")):
        changed, is_changed = dict(inputs), False
        for name, mask in masks.items():
            array = np.array(inputs[name])
            mask = np.broadcast_to(mask, array.shape)
            is_changed |= bool(mask.any())
            array[mask] = _garbage(array.dtype, what)[np.arange(mask.sum()) % 2]
            changed[name] = array
        if is_changed:
            yield law, f"{what} in what must not matter", changed


def _garbage(dtype: np.dtype, what: str) -> np.ndarray:
    """Two values of a type that spoil whatever they take part in."""
    is_nan = what == "NaN"
    if dtype == np.uint8:
        return np.array([0x93, 0x6C] if is_nan else [0xFF, 0x00], dtype)
    if dtype == np.uint16:  # bits of bfloat16
        return np.array([0x7FC0, 0x7FC0] if is_nan else [0x7F7F, 0xFF7F], dtype)
    largest = np.finfo(dtype).max
    return np.array([np.nan, np.nan] if is_nan else [largest, -largest], dtype)
