"""Cases of what a serving engine has: attention without a model, pages, tokens chosen, and batches.

All four are optional. Like the drawn cases of operations, they come from a formula, and what is
expected is computed by the NumPy port.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from operator import index
from typing import NoReturn

import numpy as np

from ..examples import numpy_port as exact
from .grades import DEEPEST, drawn
from .trace import DRIFT
from .wrong import EQUATIONS, IMPRECISE, Wrong, wrong_clause

PARTS = ("choose_token", "attention_trace", "paged_trace", "decode_batch")
LAYERS, KV_HEADS, GROUP, HEAD_DIM, BLOCK = 2, 2, 3, 16, 8
PROMPT, WINDOW = 37, 6
CONFIG = {"block_size": BLOCK, "active_ratio": 0.35, "min_blocks": 2, "local_blocks": 1}
SKETCHES = CONFIG | {"selection": "sketch", "sketch_bits": 2}

# Operations that choose blocks, by bounds or by sketches (True), and those that do the rest.
SCORED_BY = {False: ("block_bounds", "score_blocks"), True: ("sketch_keys", "score_sketch")}
ATTENDED_BY = ("select_blocks", "sparse_attention", "dense_attention")

# Tokens: temperature, top-k, top-p, and how the logits are made.
CHOICES = {
    "greedy": ("4.5 greedy choice", "the largest logit, of equals the lower id", 0.0, None, 1.0),
    "temperature": ("4.5 sampling", "softmax(logits / temperature), none left out", 0.7, None, 1.0),
    "top_k": ("4.5 sampling", "the k likeliest, their mass among themselves", 1.3, 5, 1.0),
    "top_k_of_all": ("4.5 sampling", "k may be more than there are tokens", 1.0, 10**6, 1.0),
    "top_p": ("4.5 sampling", "the shortest prefix whose mass reaches top-p", 1.0, None, 0.6),
    "equal_logits": ("4.5 sampling", "of ten equal logits 0.8 keeps eight", 1.0, None, 0.8),
    "top_k_then_top_p": ("4.5 sampling", "top-k, then top-p of what is left", 1.0, 6, 0.7),
    "likeliest": ("4.5 sampling", "a tiny top-p keeps the likeliest", 1.0, None, 1e-13),
    "edges": ("4.5 sampling", "of four equal logits u = 0.5 takes the third", 1.0, None, 1.0),
    "float64": ("4.5 sampling", "in float64: all tokens but one share 3e-8", 1.0, None, 1.0),
    "cold": ("4.5 sampling", "large quotients do not overflow", 0.01, None, 1.0),
}

# Batches of a stored model: schedule, interval, the seed of the prompts, with which no step is a
# close call; then of every request the prompt's length, N, arrival, what it resumes, stop tokens.
BATCH_MODEL, BY_ITSELF = "two_layers", "law 9 batch independence"
BATCH_LAWS = {
    BY_ITSELF: "each request decodes as it would alone, whenever it joins or ends",
    "4.8 stop tokens": "a stop token is returned and not fed, and ends the request that chose it",
    "4.8 resuming": "its cache is kept; open window, pending and new tokens are fed densely",
}
BATCHES = {
    "join": (BY_ITSELF, CONFIG, "fused", 4, 3060, [
        (21, 11, 0), (7, 11, 0), (30, 6, 2), (13, 8, 3), (16, 6, 9)]),
    "stop": ("4.8 stop tokens", CONFIG, "paper", 4, 3260, [
        (18, 10, 0, None, [12, 7]), (9, 10, 1, None, [12, 7]), (25, 9, 1, None, [28]), (12, 0, 2),
        (20, 1, 2), (14, 12, 2, None, [15, 21]), (10, 7, 9)]),
    "resume": ("4.8 resuming", CONFIG, "fused", 5, 3300, [
        (18, 8, 0), (9, 0, 0), (22, 12, 1, None, [22]), (5, 7, 9, 0), (1, 7, 4, 1), (0, 8, 17, 3),
        (4, 5, 14, 2), (3, 0, 26, 5), (6, 9, 28, 7)]),
    "resume_without_interval": ("4.8 resuming", CONFIG, "fused", None, 3040, [
        (18, 7, 0), (11, 5, 1), (6, 6, 8, 0), (2, 7, 7, 1)]),
    "resume_with_sketches": ("4.8 resuming", SKETCHES, "paper", 3, 3100, [
        (18, 6, 0), (11, 4, 1), (4, 6, 8, 0), (0, 5, 6, 1)]),
}  # fmt: skip


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
    for case, (law, config, schedule, interval, *_) in BATCHES.items():
        entry = {"operation": "decode_batch", "case": case, "law": law, "says": BATCH_LAWS[law]}
        entries.append(entry | {"config": config | {"schedule": schedule, "interval": interval}})
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
    if case == "edges":
        logits[:] = np.where(np.arange(40) % 10 == 3, np.float32(2.5), np.float32(-np.inf))
    if case == "float64":
        logits = np.where(np.arange(40) == 7, np.float32(21), logits / 8)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    # Uniform numbers from the middle of a token's share, and the smallest and the largest.
    u = np.abs(drawn(100 + len(case), 6)) % 1.0
    u = 1 - 1e-8 * (1 + u) if case == "float64" else u
    for s in range(6 if temperature > 0 else 0):
        _, mass = exact.kept_tokens(logits[s], **settings)
        edges = np.concatenate(([0.0], mass / mass[-1]))
        chosen = np.searchsorted(edges, u[s], side="right")
        u[s] = (edges[chosen - 1] + edges[chosen]) / 2
    u[:2] = 0.0, 1 - 2.0**-53
    if case == "edges":
        u[2:] = 0.25, 0.5, 0.75, 0.5  # sums of quarters are exact
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
    errors = []
    for i, (each, ours, theirs) in enumerate(zip(passes, found, expected, strict=True)):
        where = f"pass {i}, {'dense' if each['is_dense'] else 'sparse'}, from {each['start']} on"
        if not each["is_dense"]:
            _check_selection(where, ours, theirs, config)
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
    return max(errors, key=lambda pair: pair[0] / pair[1])


def _check_selection(where: str, ours: Mapping, theirs: Mapping, config: Mapping) -> None:
    for layer, (found, wanted) in enumerate(zip(ours["indices"], theirs["indices"], strict=True)):
        found = np.asarray(found)
        sets = [[sorted({*row[row >= 0].tolist()}) for row in x] for x in (found, wanted)]
        if sets[0] == sets[1]:
            continue
        says = f"{where}: layer {layer} selects {sets[0]} instead of {sets[1]}"
        clause = wrong_clause(found, wanted, config["local_blocks"])
        if clause is not None:
            raise Wrong(clause[0], f"{says}: {clause[1]}", ("select_blocks",))
        by_sketches = config.get("selection") == "sketch"
        law, needs = "law 12" if by_sketches else "law 2", SCORED_BY[by_sketches]
        says = (
            f"{says}: what scores blocks is stale, since this pass or an earlier one: every write"
        )
        says = f"{says} must renew it, a dense pass's too"
        raise Wrong(f"{law} online = rebuilt", says, (*needs, "select_blocks"))


def _blame(where: str, each: Mapping, error: float, allowed: float) -> NoReturn:
    law, needs = "4.2 sparse step", "sparse_attention"
    if each["is_dense"]:
        law, needs = "law 6 rectification is exact", "dense_attention"
    what = "rows are written first, then attended to, each seeing itself and all before"
    if "table" in each:
        law, what = "4.7 pages", "a page is written by its sequence alone, in the rows of the pass"
    elif each["start"] == 0:
        law = "4.1 prefill"
    if error < IMPRECISE:
        law, what = EQUATIONS[needs], "so little may be arithmetic narrower than float32"
    raise Wrong(law, f"{where}: outputs differ: {what}", (needs,), error, allowed)


def requests_of(case: str, vocab_size: int) -> list[dict]:
    """Requests of a batch."""
    names, requests = ("prompt", "max_new_tokens", "arrival", "resumes", "stop_tokens"), []
    *_, seed, rows = BATCHES[case]
    for i, row in enumerate(rows):
        request = {"resumes": None, "stop_tokens": []} | dict(zip(names, row, strict=False))
        ids = (np.abs(drawn(seed + i, request["prompt"])) * 1000).astype(int) % vocab_size
        requests.append(request | {"prompt": ids.tolist()})
    return requests


def read_result(result: Mapping) -> dict:
    """Copy what a request leaves."""
    keys, values = (np.array(result[name], np.float64) for name in ("keys", "values"))
    tokens = [index(token) for token in result["tokens"]]
    return {"tokens": tokens, "keys": keys, "values": values, "window": index(result["window"])}


def decoded_alone(model: Sequence, requests: Sequence[Mapping], config: Mapping) -> list[dict]:
    """Decode each request alone, in the NumPy port → what it leaves.

    A turn that resumes is a prompt of all tokens before it: its prefill makes them exact (law 6).
    """
    results, texts = [], []
    for request in requests:
        before = [] if request["resumes"] is None else texts[request["resumes"]]
        text, n_tokens = before + request["prompt"], request["max_new_tokens"]
        trace = exact.decode_trace(*model, text, config | {"max_new_tokens": max(1, n_tokens)})
        is_stop = [step["token"] in request["stop_tokens"] for step in trace]
        trace = trace[: is_stop.index(True) + 1] if any(is_stop) else trace
        results.append(trace[-1] | {"tokens": [step["token"] for step in trace][:n_tokens]})
        texts.append(text + results[-1]["tokens"])
    return results


def check_batch(requests: Sequence[dict], decode: Callable, expected: Sequence[Mapping]) -> float:
    """Compare request by request → the largest drift. What is wrong is decoded alone as well."""
    found, drifts = decode(requests), []
    if len(found) != len(requests):
        raise Wrong("4.8 batches", f"{len(found)} results for {len(requests)} requests")
    for i, (request, ours, theirs) in enumerate(zip(requests, found, expected, strict=True)):
        try:
            drifts.append(_check_request(request, ours, theirs))
        except Wrong as wrong:
            wrong.says, turns = f"request {i}: {wrong.says}", [request | {"resumes": None}]
            while (i := requests[i]["resumes"]) is not None:
                turns = [turn | {"resumes": at} for at, turn in enumerate(turns)]
                turns.insert(0, requests[i] | {"resumes": None})
            with suppress(Wrong):
                _check_request(request, decode(turns)[-1], theirs)
                wrong.says, wrong.law = f"{wrong.says}; alone it is right", BY_ITSELF
            if wrong.law in BATCH_LAWS:
                wrong.says = f"{wrong.says}: {BATCH_LAWS[wrong.law]}"
            raise
    return max(drifts)


def _check_request(request: Mapping, ours: Mapping, theirs: Mapping) -> float:
    """Compare what a request leaves → its largest drift."""
    tokens, wanted, w = ours["tokens"], theirs["tokens"], theirs["window"]
    ends = "4.8 stop tokens" if request["stop_tokens"] else "4.5 end of generation"
    resuming = None if request["resumes"] is None else "4.8 resuming"
    if tokens != wanted:
        n = min(len(tokens), len(wanted))
        law = ends if tokens[:n] == wanted[:n] else resuming or "4.8 batches"
        raise Wrong(law, f"tokens {tokens} instead of {wanted}")
    drift = 0.0
    for name in ("keys", "values"):
        found, right = ours[name], theirs[name]
        if found.shape != right.shape:
            says = f"{name} of shape {list(found.shape)}, expected {list(right.shape)}, as at the"
            raise Wrong(resuming or ends, f"{says} request's end: the last token is not among them")
        off, size = (np.linalg.norm(x, axis=-1) for x in (found - right, right))
        drift = np.maximum(drift, np.nan_to_num(off / size, nan=np.inf).max(axis=(0, 1)))  # [T]
    if ours["window"] != w:
        raise Wrong(resuming or "4.3 window", f"w is {ours['window']} instead of {w}")
    rows = np.flatnonzero(drift > DRIFT).tolist()
    if rows:
        law = "law 7 bounded drift" if rows[0] < len(drift) - w else "4.2 sparse step"
        says = f"rows {rows} of {len(drift)} are wrong, w being {w}"
        raise Wrong(resuming or law, says, (), float(drift.max()), DRIFT)
    return float(drift.max())
