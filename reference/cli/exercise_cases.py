"""Cases of `resa exercise`: those of the kit that teach, after small ones of the same kind.

Cases about infinities, NaN and optional arguments are left to `resa conformance`. Hints belong to
the kit's rules.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...conformance.kit import exact, sketch_bits
from ...conformance.vectors import Vectors

LONGEST = 33  # tokens of a generation
HARDER = ("infin", "NaN", "equal blocks", "order of scores", "mean nothing", "log-sum-exp", "masks")

# Small inputs of recorded cases, which say what rule they are about. T is 3 unless it is given.
KEYS = [[[[1, 0], [3, -2], [-1, 4], [99, 99]]]]  # the last slot lies past the length
VALID, TWO, FIRST = ([[KEYS[0][0][:n]]] for n in (3, 2, 1))
BOUNDS = [[[[[1, -1], [-2, 4]], [[3, -1], [0, 4]]]]]
QUERY = [[[1, 0]]]
ON_KEYS = {"query": QUERY, "keys": KEYS, "values": KEYS}
SMALL: list[tuple[str, dict[str, list]]] = [
    ("one_block", {"keys": TWO, "lengths": [2]}),
    ("partial_last_block", {"keys": KEYS}),
    ("one_head", {"query": [[[1, -1]]], "bounds": BOUNDS}),
    ("mean_of_the_group", {"query": [[[3, -1], [-1, -1]]], "bounds": BOUNDS}),
    ("highest", {"scores": [[[4, 9, 6, 1]]], "lengths": [8]}),
    ("ties", {"scores": [[[2, 5, 5, 1]]], "lengths": [8]}),
    ("window", {"query": [QUERY], "keys": FIRST, "values": FIRST, "lengths": [1]}),
    ("dense_one_query", {"query": [QUERY], "keys": VALID, "values": VALID}),
    ("window", {"query": [[[[1, 0], [0, 1]]]], "keys": VALID, "values": VALID}),
    ("sparse_one_head", {**ON_KEYS, "indices": [[[0]]], "lengths": [2]}),
    ("some_blocks", {**ON_KEYS, "indices": [[[0]]]}),
    ("sparse_partial_last_block", {**ON_KEYS, "indices": [[[0, 1]]]}),
    ("sparse_padding", {**ON_KEYS, "indices": [[[0, -1]]]}),
    ("nothing_selected", {**ON_KEYS, "indices": [[[-1, -1]]]}),
]
CONFIG = {"block_size": 2, "active_ratio": 0.5, "min_blocks": 2, "local_blocks": 1}
HINTS = {  # by the name of a rule
    "signatures": "Return what the docstring says, and leave the arguments as they are.",
    "eq. 3": "Take minimum and maximum over the tokens of a block, for each channel by itself.",
    "eq. 4": "Take the larger product of each channel first, then add up the channels.",
    "eq. 5": "Take the newest blocks, then fill up to n with the highest scores of the others.",
    "eq. 2": "Divide by sqrt(D) before exp, and let the weights of a query add up to 1.",
    "layout": "Compare the shape of your result, axis by axis, with that of the docstring.",
    "partial block": "End the last block at T: the slots from T on hold no tokens.",
    "past the end": "Blocks from ceil(T / b) on have no tokens: no bounds, no score, no attention.",
    "pooling": "Average the G query heads of a group before anything else.",
    "group order": "Query heads 0 to G - 1 belong to KV head 0, the next G to KV head 1.",
    "local blocks": "Put the newest local_blocks blocks in first. They count toward n.",
    "count": "n = min(M, max(min_blocks, ceil(p · M - 1e-9))), with M = ceil(T / b).",
    "exact products": "ceil(p · M - 1e-9), in Python's own floats.",
    "ties": 'np.argsort(-scores, kind="stable") keeps the lower index first.',
    "order": "Sort the indices once you have chosen them.",
    "padding": "-1 stands for nothing. As an index in Python it is the last block, so skip it.",
    "nothing visible": "Where no token is left, return zeros: a softmax over nothing is NaN.",
    "large logits": "Subtract the largest visible logit before exp.",
    "causality": "Query i stands at T - Q + i and sees itself: T - Q + i + 1 tokens.",
    "positions": "Count back from each sequence's own length.",
    "inertness": "Leave out what must not matter. A weight of 0 is not enough: 0 · NaN is NaN.",
    "prefill": "One dense pass over the prompt from position 0, then sparse steps.",
    "pending token": "Feed the token that was chosen last, in a sparse step of its own.",
    "sparse step": "Every token after the prompt is fed by one sparse step.",
    "schedules": "After every f sparse steps comes one dense pass. Ignore its logits.",
    "window": "Count the sparse steps since the last dense pass.",
    "end of generation": "Return n_tokens tokens. The last is not fed, so n_tokens - 1 steps do.",
    "greedy choice": "Take np.argmax of the logits.",
    "rectification is exact": "The window is the newest f tokens of the cache, all of them.",
    "bounded drift": "A rectification begins at the first token of the window, not before it.",
}


def lessons(vectors: Vectors, operation: str) -> tuple[Vectors, list[dict]]:
    """Choose the cases of an operation, small ones first → with vectors that hold these as well."""
    if operation == "decode_trace":
        entries = [
            entry
            for entry in vectors.manifest["traces"]
            if entry["config"]["schedule"] == "paper" and sketch_bits(entry) is None
        ]
        entries.sort(key=lambda entry: len(entry["tokens"]))
        return vectors, [entry for entry in entries if len(entry["tokens"]) <= LONGEST]

    # Log-sum-exps and windows of given lengths are for ports.
    recorded = {}
    for entry in vectors.manifest["operations"]:
        compare = [name for name in entry["compare"] if name != "lse"]
        is_easy = compare and not any(word in entry["law"] for word in HARDER)
        is_own = entry["operation"] == operation and "query_lengths" not in vectors.arrays(entry)
        if is_easy and is_own:
            recorded[entry["case"]] = entry | {"compare": compare}
    small, arrays = [], dict(vectors.operations)
    for case, given in SMALL:
        if case in recorded:
            small.append(_small(recorded[case], f"small_{len(small)}", given, arrays))
    return replace(vectors, operations=arrays), [*small, *recorded.values()]


def _small(entry: dict, case: str, given: Mapping, arrays: dict[str, np.ndarray]) -> dict:
    """Make a small case of a recorded one; its arrays go to the others."""
    operation, (name, *_) = entry["operation"], entry["compare"]
    arguments = {"select_blocks": {"config": CONFIG}, "dense_attention": {}}
    arguments = arguments.get(operation, {"block_size": CONFIG["block_size"]})
    inputs = {
        key: np.array(x, np.int32 if key in ("lengths", "indices") else np.float32)
        for key, x in ({"lengths": [3]} | given).items()
    }
    result = getattr(exact, operation)(**inputs, **arguments)
    if name == "set":
        inputs["expected/indices"] = result
    else:
        inputs[f"expected/{name}"] = result.astype(inputs.get("keys", result).dtype)
    if name in ("scores", "out"):
        inputs[f"allowed/{name}"] = np.full(result.shape, 1e-4, np.float32)
    arrays.update({f"{operation}/{case}/{key}": x for key, x in inputs.items()})
    return entry | {"case": case, "arguments": arguments}
