"""Cases of what a serving engine has: attention without a model, pages, and the choice of a token.

All three are optional. Like the drawn cases of operations, they come from a formula, and what is
expected is computed by the NumPy port.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from ..examples import numpy_port as exact
from .grades import DEEPEST, drawn
from .wrong import Wrong, wrong_clause

PARTS = ("choose_token", "attention_trace", "paged_trace")
LAYERS, KV_HEADS, GROUP, HEAD_DIM, BLOCK = 2, 2, 3, 16, 8
PROMPT, WINDOW = 37, 6
CONFIG = {"block_size": BLOCK, "active_ratio": 0.35, "min_blocks": 2, "local_blocks": 1}
SKETCHES = CONFIG | {"selection": "sketch", "sketch_bits": 2}

# Tokens: temperature, top-k, top-p, and how the logits are made.
CHOICES = {
    "greedy": ("4.5 greedy choice", "the largest logit, of equals the lower id", 0.0, None, 1.0),
    "temperature": ("4.5 sampling", "softmax(logits / temperature)", 0.7, None, 1.0),
    "top_k": ("4.5 sampling", "the k likeliest, their mass among themselves", 1.3, 5, 1.0),
    "top_k_of_all": ("4.5 sampling", "k may be more than there are tokens", 1.0, 10**6, 1.0),
    "top_p": ("4.5 sampling", "the shortest prefix whose mass reaches top-p", 1.0, None, 0.6),
    "equal_logits": ("4.5 sampling", "of ten equal logits 0.8 keeps eight", 1.0, None, 0.8),
    "top_k_then_top_p": ("4.5 sampling", "top-k, then top-p of what is left", 1.0, 6, 0.7),
    "likeliest": ("4.5 sampling", "a tiny top-p keeps the likeliest", 1.0, None, 1e-13),
    "cold": ("4.5 sampling", "large quotients do not overflow", 0.01, None, 1.0),
}


def part_entries() -> list[dict]:
    """Entries of all these cases, as in the manifest."""
    entries = [
        {"operation": "choose_token", "case": name, "law": law, "says": says}
        for name, (law, says, *_) in CHOICES.items()
    ]
    traces = [
        ("attention_trace", "attention_by_bounds", CONFIG, None),
        ("attention_trace", "attention_by_sketches", SKETCHES, None),
        ("paged_trace", "page_of_a_block", CONFIG, BLOCK),
        ("paged_trace", "page_of_four_blocks", CONFIG, 4 * BLOCK),
        ("paged_trace", "pages_of_sketches", SKETCHES, BLOCK),
    ]
    says = "the cache is written, then blocks are chosen and attended to, without a model"
    paged = "through pages in any order, some shared, some with another owner before"
    for operation, case, config, page_size in traces:
        entry = {"operation": operation, "case": case, "config": config, "page_size": page_size}
        law = "4.7 attention alone" if page_size is None else "4.7 pages"
        entries.append(entry | {"law": law, "says": says if page_size is None else paged})
    return entries


def choice_of(case: str) -> tuple[dict, np.ndarray]:
    """Arguments of `choose_token`, and the ids that it must return."""
    *_, temperature, top_k, top_p = CHOICES[case]
    logits = drawn(len(case), 6, 40).astype(np.float32)
    if case == "cold":
        logits = 100 + logits / 100
    if case == "greedy":
        logits[:, 5::9] = logits.max() + 1
    if case == "equal_logits":
        logits = np.where(np.arange(40) % 4 == 1, np.float32(2.5), np.float32(-np.inf))[None]
        logits = np.repeat(logits, 6, axis=0)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    # Uniform numbers from the middle of a token's share, and the smallest and the largest.
    u = np.abs(drawn(100 + len(case), 6)) % 1.0
    for s in range(6 if temperature > 0 else 0):
        _, mass = exact.kept_tokens(logits[s], **settings)
        edges = np.concatenate(([0.0], mass / mass[-1]))
        chosen = np.searchsorted(edges, u[s], side="right")
        u[s] = (edges[chosen - 1] + edges[chosen]) / 2
    u[:2] = 0.0, 1 - 2.0**-53
    arguments = {"logits": logits, **settings, "u": u}
    return arguments, exact.choose_token(**arguments)


def passes_of(entry: Mapping) -> list[dict]:
    """Passes that write the cache and attend: a prompt, sparse steps, rectifications."""
    page_size, seed = entry["page_size"], SEEDS[entry["case"]]
    passes: list[dict] = []

    def add(sequence: int, start: int, n_tokens: int, *, is_dense: bool) -> None:
        size = LAYERS, KV_HEADS, n_tokens, HEAD_DIM
        at = seed + 10 * len(passes)
        query = drawn(at, LAYERS, KV_HEADS * GROUP, n_tokens, HEAD_DIM)
        each = {"start": start, "is_dense": is_dense, "queries": query.astype(np.float32)}
        each |= {"keys": drawn(at + 1, *size).astype(np.float32)}
        each |= {"values": drawn(at + 2, *size).astype(np.float32)}
        if page_size is not None:
            n_pages = -(-(start + n_tokens) // page_size)
            each |= {"sequence": sequence, "table": TABLES[page_size][sequence][:n_pages]}
        passes.append(each)

    def decode(sequence: int, length: int) -> None:
        for i in range(WINDOW - 1):
            add(sequence, length + i, 1, is_dense=False)
        add(sequence, length, WINDOW, is_dense=True)  # the window, and the pending token

    add(0, 0, PROMPT, is_dense=True)
    if page_size is None:
        decode(0, PROMPT)
        decode(0, PROMPT + WINDOW)
        add(0, PROMPT + 2 * WINDOW, 1, is_dense=False)
        return passes

    # Sequence 1 shares the first pages of sequence 0. Sequence 2 comes when 0 has ended.
    shared = 32
    add(1, shared, 9, is_dense=True)
    decode(1, shared + 9)
    decode(0, PROMPT)
    add(1, shared + 9 + WINDOW, 1, is_dense=False)
    add(2, 0, PROMPT, is_dense=True)
    decode(2, PROMPT)
    add(1, shared + 10 + WINDOW, 1, is_dense=False)
    return passes


# Pages of the three sequences. The first two share 32 tokens; the third has those that were the
# first's alone.
TABLES = {
    8: ([7, 2, 11, 0, 5, 9], [7, 2, 11, 0, 3, 13, 8], [9, 14, 5, 1, 6, 12]),
    32: ([4, 1], [4, 3], [1, 2]),
}
N_PAGES = 16
SEEDS = {  # with these no selection is a close call
    "attention_by_bounds": 7000,
    "attention_by_sketches": 2000,
    "page_of_a_block": 14000,
    "page_of_four_blocks": 14000,
    "pages_of_sketches": 3000,
}


def traced(port: object, entry: Mapping, passes: list[dict], config: dict) -> Iterable[Mapping]:
    """Run passes through a port."""
    if entry["page_size"] is None:
        return port.attention_trace(passes, config)
    return port.paged_trace(passes, config, N_PAGES, entry["page_size"])


def check_passes(
    passes: Sequence[Mapping],
    found: Iterable[Mapping],
    expected: Sequence[Mapping],
    config: Mapping,
) -> tuple[float, float]:
    """Compare pass by pass → the largest error of an output and what is allowed there."""
    found = list(found)
    if len(found) != len(passes):
        raise Wrong("4.7 attention alone", f"{len(found)} results for {len(passes)} passes")
    errors, before = [], "prompt"
    for i, (each, ours, theirs) in enumerate(zip(passes, found, expected, strict=True)):
        where = f"pass {i}, {'dense' if each['is_dense'] else 'sparse'}, from {each['start']} on"
        if not each["is_dense"]:
            _check_selection(where, ours, theirs, config, is_first=before == "dense")
        out = np.asarray(ours["out"], np.float64)
        if out.shape != theirs["out"].shape:
            says = f"{where}: out of shape {list(out.shape)}, expected {list(theirs['out'].shape)}"
            raise Wrong("4.7 attention alone", says)

        # A bound of section 8's allowance: no key or value is above 4, so no sum of P·abs(v) is.
        size = float(np.abs(each["queries"]).sum(axis=-1).max()) * 4 * HEAD_DIM**-0.5
        allowed = 2.0**-23 * (2 * (HEAD_DIM + 4) * size + DEEPEST + 4) * 4
        error = np.abs(out - theirs["out"])
        error = float(np.where(np.isnan(error), np.inf, error).max())
        if error > allowed:
            _blame(where, each, error, allowed)
        errors.append((error, allowed))
        before = "dense" if each["is_dense"] else "sparse"
    return max(errors, key=lambda pair: pair[0] / pair[1])


def _check_selection(
    where: str, ours: Mapping, theirs: Mapping, config: Mapping, *, is_first: bool
) -> None:
    for layer, (found, wanted) in enumerate(zip(ours["indices"], theirs["indices"], strict=True)):
        found = np.asarray(found)
        sets = [[sorted({*row[row >= 0].tolist()}) for row in x] for x in (found, wanted)]
        if sets[0] == sets[1]:
            continue
        says = f"{where}: layer {layer} selects {sets[0]} instead of {sets[1]}"
        clause = wrong_clause(found, wanted, config["local_blocks"])
        if clause is not None:
            raise Wrong(clause[0], f"{says}: {clause[1]}")
        law = "law 12" if config.get("selection") == "sketch" else "law 2"
        when = "after a dense pass has overwritten keys" if is_first else "after an append"
        raise Wrong(f"{law} online = rebuilt", f"{says}: what scores blocks is stale, {when}")


def _blame(where: str, each: Mapping, error: float, allowed: float) -> NoReturn:
    law = "law 6 rectification is exact" if each["is_dense"] else "4.2 sparse step"
    what = "rows are written first, then attended to, each seeing itself and all before"
    if "table" in each:
        law, what = "4.7 pages", "a page is written by its sequence alone, in the rows of the pass"
    raise Wrong(law, f"{where}: outputs differ: {what}", (), error, allowed)
