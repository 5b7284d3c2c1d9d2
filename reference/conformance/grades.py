"""Cases in other number types and sizes than the recorded ones, drawn from a formula.

Nothing of them is stored. Inputs come from `drawn`, expected results from the NumPy port in
float64, allowances from the formulas of docs/porting.md, section 8.
"""

from collections.abc import Mapping
from math import ceil

import numpy as np

from ..examples import numpy_port as exact

GRADES = ("float32", "float64", "fp16", "bf16", "batch", "widths", "long")
# Grade: the clause of docs/porting.md, and sizes (lengths, Hkv, G, D, b, bits of sketches).
SIZES = {
    "float64": ("8 float64", [((137, 20), 2, 3, 16, 8, 2)]),
    "fp16": ("8 16-bit numbers", [((200,), 2, 4, 64, 16, 2), ((300, 129), 1, 2, 128, 64, 1)]),
    "bf16": ("8 16-bit numbers", [((200,), 2, 4, 64, 16, 2), ((300, 129), 1, 2, 128, 64, 1)]),
    "batch": (
        "8 batches",
        [
            ((0, 1, 513, 64, 95), 8, 1, 32, 16, 2),
            ((17, 80, 49), 2, 8, 64, 16, 1),
            ((130, 64), 4, 5, 128, 64, 2),
        ],
    ),
    "widths": ("8 widths", [((33, 0, 95), 8, 2, 80, 16, 2), ((17, 80), 2, 4, 96, 16, 1)]),
    "long": ("8 long contexts", [((2**17,), 1, 2, 64, 16, 2)]),
}
SAYS = {
    "float64": "float64 comes in and goes out, and nothing is narrower in between",
    "fp16": "16-bit inputs, sums in float32",
    "bf16": "16-bit inputs, sums in float32; bfloat16 comes as its bits, which are uint16",
    "batch": "ragged sequences, an empty one among them, up to 8 KV heads and groups of 8",
    "widths": "heads of 80 and 96 channels, which are no powers of two",
    "long": "131,072 tokens, whose softmax has a few needles; more than 512 scores are equal",
}
OPERATIONS = (
    "block_bounds", "score_blocks", "select_blocks", "sparse_attention", "dense_attention",
    "sketch_keys", "score_sketch",
)  # fmt: skip
COMPARED = {
    "block_bounds": ["bounds"], "score_blocks": ["scores"], "select_blocks": ["indices"],
    "sparse_attention": ["out", "lse"], "dense_attention": ["out", "lse"],
    "sketch_keys": ["codes", "scales"], "score_sketch": ["scores"],
}  # fmt: skip
EPS = {"float64": 2.0**-51}  # float32's elsewhere: in it sums are taken
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # two roundings: of weights, and of the output
NEEDLES, LOUD = 28, 24.0  # tokens with all but 1e-6 of a long context, and their logits
DEEPEST = 64  # roundings of a sum over a long context: what is small is lost, and costs nothing
CLEAR = 1e-3  # relative distance of a rotated channel from a threshold: codes must be equal


def drawn_entries() -> list[dict]:
    """One entry, as in the manifest, for every grade, size and operation."""
    entries = []
    for grade, (law, sizes) in SIZES.items():
        for seed, size in enumerate(sizes):
            *_, head_dim, block_size, bits = size
            for operation in OPERATIONS:
                about = {"operation": operation, "case": f"{grade}_{head_dim}", "grade": grade}
                about |= {"law": law, "says": SAYS[grade], "shape": size, "seed": seed}
                about |= {"arguments": _arguments(operation, block_size, bits)}
                if grade in ROUNDING:  # bytes of a number; scores and lse have float32's
                    about["least"] = {"bounds": 2, "out": 2, "scales": 2}
                entries.append(about | {"compare": COMPARED[operation]})
    return entries


def _arguments(operation: str, block_size: int, bits: int) -> dict:
    """Arguments of an operation that are no arrays."""
    config = {"block_size": block_size, "active_ratio": 0.1, "min_blocks": 3, "local_blocks": 2}
    return {
        "select_blocks": {"config": config},
        "dense_attention": {},
        "sketch_keys": {"bits": bits},
    }.get(operation, {"block_size": block_size})


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Numbers of about normal distribution: four parts of a hash of their places, added.

    The hash is splitmix64. They are whole multiples of 2**-15, but for a small part below that.
    """
    with np.errstate(over="ignore"):
        z = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed << 40)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    parts = [(z >> np.uint64(16 * i) & np.uint64(0xFFFF)).astype(np.float64) for i in range(4)]
    below = parts[0] * 2.0**-31
    return ((sum(parts) - 2 * 65535) * 2.0**-15 + below).reshape(shape)


def stored_as(grade: str, x: np.ndarray) -> np.ndarray:
    """Round numbers to those of a grade, as a port is given them."""
    if grade == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype({"float64": np.float64, "fp16": np.float16}.get(grade, np.float32))


def widened(x: np.ndarray) -> np.ndarray:
    """Read bfloat16 from its bits; other numbers are what they are."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def drawn_case(entry: Mapping) -> dict[str, np.ndarray]:
    """Inputs of a case, and under expected/ and allowed/ what is compared."""
    inputs = _inputs(entry)
    wide = {
        name: widened(x).astype(np.float64) if widened(x).dtype.kind == "f" else x
        for name, x in inputs.items()
    }
    options = {"return_lse": True} if "lse" in entry["compare"] else {}
    with np.errstate(all="ignore"):
        results = getattr(exact, entry["operation"])(**wide, **entry["arguments"], **options)
    results = results if isinstance(results, tuple) else (results,)
    expected = dict(zip(entry["compare"], results, strict=True))
    allowed = _allowed(entry, wide, expected)
    for name, x in expected.items():  # what a port may return: float32 and wider, or float64
        if x.dtype == np.float64 and entry["grade"] != "float64":
            expected[name] = x.astype(np.float32)
    case = inputs | {f"expected/{name}": x for name, x in expected.items()}
    return case | {f"allowed/{name}": x for name, x in allowed.items()}


def _inputs(entry: Mapping) -> dict[str, np.ndarray]:
    """Arrays that an operation takes."""
    grade, operation, seed = entry["grade"], entry["operation"], 1000 * entry["seed"]
    lengths, kv_heads, group, head_dim, block_size, bits = entry["shape"]
    batch, capacity = len(lengths), max(lengths) + (0 if grade == "long" else 5)
    n_blocks = ceil(capacity / block_size)

    sizes = {"lengths": np.array(lengths, np.int32)}
    scores = drawn(seed + 6, batch, kv_heads, n_blocks)
    if operation == "select_blocks" and grade == "float64":
        return {"scores": 1 + 2.0**-40 * scores} | sizes  # in float32 they would all be equal
    if operation == "select_blocks":
        is_tie = (grade == "long") & (scores > 1) & (scores < 2)  # far more than 512
        return {"scores": np.where(is_tie, 1.0, scores).astype(np.float32)} | sizes

    # Keys and queries. In long contexts a few keys point where the queries do.
    query = drawn(seed + 1, batch, kv_heads * group, head_dim)
    keys = drawn(seed + 2, batch, kv_heads, capacity, head_dim)
    if "sketch" in operation:
        _clear_of_thresholds(keys.reshape(-1, head_dim), grade, bits, seed)
    if grade == "long":
        query = query[:, :1] + query / 64
        at = [0, 1, 2**16 - 1, 2**16, 2**17 - 1]
        at += [abs(int(x * 1e6)) % capacity for x in drawn(seed + 4, NEEDLES - len(at))]
        direction = query[0, 0] / (query[0, 0] @ query[0, 0])
        loud = LOUD + drawn(seed + 5, len(at))[:, None] / 4
        keys[0, 0, at] = loud * head_dim**0.5 * direction
    keys = stored_as(grade, keys)
    if operation == "sketch_keys":
        return {"keys": keys}
    if operation == "block_bounds":
        return {"keys": keys} | sizes
    if operation == "score_blocks":
        bounds = exact.block_bounds(widened(keys), lengths, block_size)
        return {"query": stored_as(grade, query), "bounds": stored_as(grade, bounds)} | sizes
    if operation == "score_sketch":
        codes, scales = exact.sketch_keys(widened(keys), bits)
        scales = stored_as(grade, scales)
        return {"query": stored_as(grade, query), "codes": codes, "scales": scales} | sizes

    # Values, and a window of three queries. Half of the 16-bit cases weigh all tokens nearly alike:
    # sums in 16 bits stop growing then.
    values = drawn(seed + 3, batch, kv_heads, capacity, head_dim)
    if grade in ROUNDING and seed:
        query, values = query / 64, np.abs(values)
    others = (
        (query * 1.125, query * 1.25) if grade == "long" else (query[..., ::-1] / 2, query * 0.75)
    )
    cache = {"keys": keys, "values": stored_as(grade, values)} | sizes
    if operation == "sparse_attention":
        config = {"block_size": block_size, "active_ratio": 0.3, "min_blocks": 2, "local_blocks": 1}
        indices = exact.select_blocks(scores, lengths, config)
        return {"query": stored_as(grade, query), **cache, "indices": indices}
    window = np.stack([query, *others], axis=2)  # [B, Hq, 3, D]
    return {"query": stored_as(grade, window), **cache}


def _clear_of_thresholds(keys: np.ndarray, grade: str, bits: int, seed: int) -> None:
    """Draw keys [n, D] again, in place, until every rotated channel is far from all thresholds."""
    wrong, attempt = np.arange(len(keys)), 100
    while len(wrong):
        if attempt > 100:
            keys[wrong] = drawn(seed + attempt, len(wrong), keys.shape[1])
        attempt += 1
        rotated = exact.hadamard(widened(stored_as(grade, keys[wrong])))
        rotated /= 0.9957 * np.sqrt((rotated**2).mean(axis=-1, keepdims=True))
        nearest = np.abs(rotated) if bits == 1 else np.minimum(
            np.abs(rotated), np.abs(np.abs(rotated) - 1)
        )  # fmt: skip
        wrong = wrong[(nearest < CLEAR).any(axis=-1)]


def _allowed(entry: Mapping, wide: Mapping, expected: Mapping) -> dict[str, np.ndarray]:
    """Allowed errors by first-order rounding analysis; nothing for bounds, codes, selections."""
    grade, operation = entry["grade"], entry["operation"]
    lengths, _, group, head_dim, block_size, _ = entry["shape"]
    eps, rounding = EPS.get(grade, 2.0**-23), ROUNDING.get(grade, 0.0)
    depth = DEEPEST if grade == "long" else max(lengths)  # additions of a sum over tokens
    if operation == "score_blocks":
        query, bounds = wide["query"], wide["bounds"]
        mean = np.abs(query).reshape(*bounds.shape[:2], group, head_dim).mean(axis=2)[..., None]
        largest = np.abs(np.where(np.isfinite(bounds), bounds, 0.0)).max(axis=2)
        return {"scores": eps * (group + head_dim + 2) * (mean * largest).sum(axis=2)}
    if operation == "sketch_keys":
        keys, (codes, scales) = wide["keys"], expected.values()
        code = codes_of(codes, head_dim)
        terms = (run_sizes(keys) * np.abs(code)).sum(axis=-1) / (code**2).sum(axis=-1)
        return {"scales": eps * (head_dim + 4) * terms + rounding * np.abs(scales)}
    if operation == "score_sketch":
        return {"scores": _mass_allowed(wide, expected["scores"], eps, depth + block_size + group)}
    if operation not in ("sparse_attention", "dense_attention"):
        return {}

    # Attention: L is the largest sum of a logit's terms, whatever their signs.
    query, keys, values = wide["query"], wide["keys"], wide["values"]
    size = np.zeros(query.shape[:-1])
    for s, length in enumerate(lengths):
        for h in range(query.shape[1]):
            terms = np.abs(query[s, h]) @ np.abs(keys[s, h // group, :length]).T
            size[s, h] = terms.max(axis=-1, initial=0.0) * head_dim**-0.5
    rest = {name: x for name, x in wide.items() if name != "values"} | entry["arguments"]
    positive = getattr(exact, operation)(**rest, values=np.abs(values))
    unit = eps * (2 * (head_dim + 4) * size + depth + 4) + rounding
    lse = np.where(np.isfinite(expected["lse"]), np.abs(expected["lse"]), 0.0)
    nothing = np.isinf(expected["lse"])
    of_lse = np.where(nothing, 0.0, eps * ((head_dim + 4) * size + depth + 4 + lse))
    return {"out": unit[..., None] * positive, "lse": of_lse}


def run_sizes(x: np.ndarray) -> np.ndarray:
    """ρ of a rotation, of which rounding is a share: the sum of abs(x) over a run / sqrt(m)."""
    m = x.shape[-1] & -x.shape[-1]
    runs = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, m).sum(axis=-1, keepdims=True)
    return np.broadcast_to(runs * m**-0.5, (*runs.shape[:-1], m)).reshape(x.shape)


def codes_of(codes: np.ndarray, head_dim: int) -> np.ndarray:
    """Read the codes c [..., D] of packed bytes."""
    bits = 8 * codes.shape[-1] // head_dim
    levels = codes[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    return exact.centred(levels.reshape(*codes.shape[:-1], head_dim), bits)


def _mass_allowed(wide: Mapping, scores: np.ndarray, eps: float, additions: int) -> np.ndarray:
    """Allowed error of masses: twice that of a logit, relative, and that of the sums."""
    query, codes, scales, lengths = (wide[name] for name in ("query", "codes", "scales", "lengths"))
    kv_heads, head_dim = codes.shape[1], query.shape[-1]
    code, rotated = np.abs(codes_of(codes, head_dim)), run_sizes(query)
    size = np.zeros(scores.shape[:2])
    for s, length in enumerate(lengths):
        for h, heads in enumerate(np.split(rotated[s], kv_heads)):
            terms = heads @ code[s, h, :length].T * np.abs(scales[s, h, :length])  # [G, T]
            size[s, h] = terms.max(initial=0.0) * head_dim**-0.5
    unit = eps * (2 * (head_dim + 4) * size + additions + 4)
    mass = np.where(np.isfinite(scores), scores, 0.0)
    return np.where(np.isfinite(scores), np.maximum(unit[..., None] * mass, 2.0**-100), 0.0)
