"""Mistakes in ports, one at a time, and changes that leave a port right: how good is the conformance kit?

    python tests/port_mistakes.py [WORD …]    # all, or those whose name or file holds a WORD

Every mistake edits one port at one place, as a porter might get it wrong, and names the law that the kit's report must
name first. A good kit refuses all of them, names the right law, and refuses no equivalent. The last line is the score;
exit status 1 if it misses the targets. Every edit is judged in a process of its own, with a time limit: one that never
ends counts as rejected.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from resa.conformance.kit import check_port, first_failures
from resa.conformance.vectors import load_vectors

ROOT = Path(__file__).parents[1]
PORTS = {path.name: path for path in (ROOT / "docs/examples/numpy_port.py", Path(__file__).parent / "tiled_port.py")}
LIMIT_S = 120  # for one edit
TARGETS = {"rejected": 0.98, "told": 0.95}  # shares of all mistakes
THE_TRACE = "4.6 the trace"  # told for exceptions too: a generation that runs says more
# Operations, which are judged before generations.
NAMES = (
    "block_bounds", "score_blocks", "select_blocks", "sparse_attention", "dense_attention", "sketch_keys",
    "score_sketch",
)  # fmt: skip

DENSE_PASS = "            model.dense_pass(fed[start:], start)  # its logits are discarded"
PREFILL = "model.dense_pass(fed[start:], start), None, config"
FUSED_PASS = "logits, indices = model.dense_pass(fed[start:], start), None"
WRITES = '            self.write(layer, heads["k"], heads["v"], start)\n'
ATTENDS = '            mixed = attention(layer, heads["q"])  # [Hq, n, D]\n'
KNOWN_SCALES = """            scale = scales[s, h, :length].astype(np.float64)
            is_lost = np.isnan(scale)
            logits = rotated[s, h] @ code[s, h, :length].T"""
WRITES_SKETCHES = "self.codes[layer, :, start:end], self.scales[layer, :, start:end] = codes[0], scales[0]"
REBUILT = "self.bounds[layer, :, 0, :, i], self.bounds[layer, :, 1, :, i] = block.min(axis=1), block.max(axis=1)"
BLOCKS_TOUCHED = "for i in range(start // b, math.ceil(end / b)):"
STEPS = "token, _ = next(steps)"
JOINS = "running[i] = model, fed, [], generation(model, fed, config)"
ALONE = "law 9 batch independence"
# Name: the law that a report must name first, or one of several; what stands there; what stands there instead.
FIRST = {  # the suite takes these
    "bounds in 16 bits": ("2 signatures", "return bounds\n", "return bounds.astype(np.float16)\n"),
    "NaN keys dropped": ("2.1 NaN keys",
        "block.min(axis=1), block.max(axis=1)\n    return",
        "np.fmin.reduce(block, axis=1), np.fmax.reduce(block, axis=1)\n    return"),
    "max for min": ("2.1 eq. 3",
        "block.min(axis=1), block.max(axis=1)\n    return", "block.max(axis=1), block.min(axis=1)\n    return"),
    "infinite keys skipped": ("2.1 infinite keys",
        "block.min(axis=1), block.max(axis=1)\n    return",
        "np.where(np.isinf(block), 9e9, block).min(axis=1), block.max(axis=1)\n    return"),
    "capacity rounded down": ("2.1 layout",
        "n_blocks = math.ceil(capacity / block_size)\n    bounds = np.empty",
        "n_blocks = capacity // block_size\n    bounds = np.empty"),
    "one token too few": ("2.1 partial block",
        "min((i + 1) * block_size, length)]  # [Hkv",
        "min((i + 1) * block_size, max(length - 1, i * block_size + 1))]  # [Hkv"),
    "last block unmasked in bounds": ("2.1 partial block",
        "min((i + 1) * block_size, length)]  # [Hkv", "(i + 1) * block_size]  # [Hkv"),
    "zeros past the end": ("2.1 past the end",
        "bounds[:, :, 0], bounds[:, :, 1] = math.inf, -math.inf", "bounds[:] = 0.0"),
    "infinities that do not cancel": ("2.2 NaN bounds",
        "0.0, products).sum(axis=2)",
        "0.0, products).sum(axis=2)\n"
        "    scores = np.where(np.isnan(scores) & ~np.isnan(bounds).any(axis=(2, 3)), math.inf, scores)"),
    "one bound for both signs": ("2.2 eq. 4",
        "np.maximum(pooled * bounds[:, :, 0], pooled * bounds[:, :, 1])", "pooled * bounds[:, :, 1]"),
    "h % Hkv in scores": ("2.2 group order",
        "kv_heads, -1, head_dim).mean(axis=2)", "-1, kv_heads, head_dim).mean(axis=1)"),
    "scores past the end": ("2.2 past the end", "return np.where(past_the_end, -math.inf, scores)", "return scores"),
    "first head for mean": ("2.2 pooling", ".mean(axis=2)[..., None]", "[:, :, 0, :, None]"),
    "0 times infinity": ("2.2 zero times infinity", "np.where((pooled == 0) & is_infinite, 0.0, products)", "products"),
    "floor for ceil": ("2.3 count", "share = math.ceil(", "share = math.floor("),
    "min_blocks forgotten": ("2.3 count", 'max(config["min_blocks"], share)', "share"),
    "local blocks on top of min_blocks": ("2.3 count",
        'max(config["min_blocks"], share)', 'max(config["min_blocks"] + config["local_blocks"] - 1, share)'),
    "every block in decoding": ("2.3 count",
        "select_blocks(scores, lengths, self.config)",
        "select_blocks(scores, lengths, {**self.config, 'active_ratio': 1.0})"),
    "no allowance in ceil": ("2.3 exact products", "n_blocks - 1e-9)\n", "n_blocks)\n"),
    "a configuration's numbers in float32": ("2.3 exact products",
        'math.ceil(config["active_ratio"] * n_blocks - 1e-9)',
        'math.ceil(np.float32(config["active_ratio"]) * np.float32(n_blocks) - np.float32(1e-9))'),
    "too generous an allowance in ceil": ("2.3 exact products", "n_blocks - 1e-9)\n", "n_blocks - 1e-2)\n"),
    "hardly an allowance in ceil": ("2.3 exact products", "n_blocks - 1e-9)\n", "n_blocks - 1e-13)\n"),
    "newest block not forced": ("2.3 local blocks",
        "taken = best + list(range(oldest_local, total))", "taken = sorted(range(total), key=rank)[:count]"),
    "one newest block, whatever is asked": ("2.3 local blocks",
        'oldest_local = max(0, total - config["local_blocks"])', "oldest_local = max(0, total - 1)"),
    "no newest block in decoding": ("2.3 local blocks",
        "chosen.append(select_blocks(scores, lengths, self.config))",
        "chosen.append(np.argsort(-scores)[..., : select_blocks(scores, lengths, self.config).shape[2]])"),
    "one newest block in decoding": ("2.3 local blocks",
        "select_blocks(scores, lengths, self.config)",
        "select_blocks(scores, lengths, {**self.config, 'local_blocks': 1})"),
    "unsorted": ("2.3 order", "= sorted(taken)", "= taken"),
    "scores ranked in half precision": ("2.3 order of scores",
        "def rank(i, score=scores[s, h])", "def rank(i, score=scores[s, h].astype(np.float16))"),
    "NaN on top": ("2.3 order of scores", "(True, 0.0, i) if math", "(False, -math.inf, i) if math"),
    "NaN as the least of numbers": ("2.3 order of scores",
        "(True, 0.0, i) if math.isnan(score[i])", "(False, math.inf, i) if math.isnan(score[i])"),
    "the newest as infinite scores": ("2.3 order of scores",
        "taken = best + list(range(oldest_local, total))",
        "local = set(range(oldest_local, total))\n"
        "            taken = sorted(range(total), key=lambda i: (-math.inf if i in local else -scores[s, h, "
        "i], i))[:count]"),
    "-1 in front": ("2.3 padding", "indices[s, h, :count] =", "indices[s, h, len(indices[s, h]) - count :] ="),
    "n of the cache's capacity": ("2.3 padding",
        "counts = [count_selected(n, config) for n in n_blocks]",
        "counts = [min(n, count_selected(scores.shape[2], config)) for n in n_blocks]"),
    "past the end before NaN": ("2.3 past the end",
        "best = sorted(range(oldest_local), key=rank)",
        "blocks = [*range(oldest_local), *range(total, len(scores[s, h]))]\n"
        "            best = sorted(blocks, key=lambda i: rank(i) if i < total else (False, math.inf, i))"),
    "ties reversed": ("2.3 ties", "(False, -score[i], i)", "(False, -score[i], -i)"),
    "no scale": ("2.4 eq. 2", " * query.shape[1] ** -0.5", ""),
    "a scale for heads of 16 channels": ("2.4 eq. 2", "query.shape[1] ** -0.5", "0.25"),
    "h % Hkv in attention": ("2.4 group order",
        "heads = slice(h * group, (h + 1) * group)", "heads = slice(h, None, keys.shape[1])"),
    "the maximum not subtracted": ("2.4 large logits",
        "largest = logits.max(axis=1, keepdims=True)", "largest = np.minimum(logits.max(axis=1, keepdims=True), 80)"),
    "wrong base": ("2.4 log-sum-exp", "np.log(total)", "np.log2(total)"),
    "NaN for nothing": ("2.4 nothing visible",
        "return np.zeros(query.shape), np.full(len(query), -math.inf)",
        "return np.full(query.shape, math.nan), np.full(len(query), math.nan)"),
    "-1 read": ("2.4 padding",
        "[int(i) for i in indices[s, h] if i >= 0]",
        "[int(i) % math.ceil(length / block_size) for i in indices[s, h] if length]"),
    "last block unmasked": ("2.4 partial block",
        "min((i + 1) * block_size, length))]", "(i + 1) * block_size) if t < keys.shape[2]]"),
    "an index that leaves 32 bits": ("2.4 past the end",
        "range(i * block_size, min((i + 1) * block_size, length))]",
        "range(max(0, int(np.int64(i * block_size).astype(np.int32))), min((i + 1) * block_size, length))]"),
    "an index past the end read": ("2.4 past the end",
        "min((i + 1) * block_size, length))]",
        "min((i + 1) * block_size, length if i * block_size < length else keys.shape[2]))]"),
    "a finite maximum": ("2.4 true masks",
        "largest = logits.max(axis=1, keepdims=True)", "largest = np.maximum(logits.max(axis=1, keepdims=True), -1e9)"),
    "does not see itself": ("2.5 causality", "+ i + 1  # sees itself", "+ i  # sees itself"),
    "windows from the left": ("2.5 positions", "end = lengths[s] - counts[s] + i", "end = lengths[s] - n_queries + i"),
    "rows before the start": ("2.5 rows that mean nothing", "if end > 0:", "if end != 0:"),
    "zeros times what is not seen": ("2.5 rows that mean nothing",
        "out, lse = np.zeros(query.shape), np.full(query.shape[:3], -math.inf)\n    for s in range(batch)",
        "out, lse = query * 0.0, np.full(query.shape[:3], -math.inf)\n    for s in range(batch)"),
    "windows cut to the cache": ("2.5 rows that mean nothing",
        "counts = [n_queries] * batch if query_lengths is None else query_lengths",
        "counts = [n_queries] * batch if query_lengths is None else np.minimum(query_lengths, lengths)"),
    "signs of the next channel": ("2.6 rotation", "np.arange(1, head_dim + 1,", "np.arange(2, head_dim + 2,"),
    "no signs": ("2.6 rotation", "np.where(hashed >> 31, -1.0, 1.0)", "1.0"),
    "butterflies the other way round": ("2.6 rotation",
        "(first + second, first - second)", "(first - second, first + second)"),
    "thresholds of a key's size alone": ("2.6 code", "0.9957 * np.sqrt", "np.sqrt"),
    "above a threshold, not on it": ("2.6 code", "(rotated >= 0).astype", "(rotated > 0).astype"),
    "the first channel highest": ("2.6 packing", "<< np.arange(0, 8, bits))", "<< np.arange(8 - bits, -1, -bits))"),
    "a transform that is not normalised": ("2.6 scale", "return x * run**-0.5", "return x"),
    "the step as scale": ("2.6 scale", "(rotated * code).sum(axis=-1) / (code**2).sum(axis=-1)", "step[..., 0]"),
    "scales that divide by the key": ("2.6 scale",
        "(rotated * code).sum(axis=-1) / (code**2).sum(axis=-1)",
        "(rotated * code).sum(axis=-1) * (rotated**2).sum(axis=-1)\n"
        "    scales = scales / (rotated**2).sum(axis=-1) / (code**2).sum(axis=-1)"),
    "halves for one bit": ("2.6 one bit", "2.0 * levels - 1.0", "levels - 0.5"),
    "keys that are not finite kept": ("2.6 NaN keys",
        "is_lost = ~np.isfinite(keys).all(axis=-1)", "is_lost = np.zeros(keys.shape[:-1], bool)"),
    "the query not rotated": ("2.7 estimate", "rotated = hadamard(query)", "rotated = query"),
    "a scale for sketches of 16 channels": ("2.7 estimate", "scale * head_dim**-0.5", "scale * 0.25"),
    "the best head for all": ("2.7 mass", "mass).sum(axis=0)", "mass).max(axis=0)"),
    "the mean of the heads": ("2.7 mass", "mass).sum(axis=0)", "mass).mean(axis=0)"),
    "h % Hkv in sketches": ("2.7 group order",
        "hadamard(query).reshape(batch, kv_heads, -1, head_dim)",
        "hadamard(query).reshape(batch, -1, kv_heads, head_dim).swapaxes(1, 2)"),
    "softmax over every slot": ("2.7 partial block", KNOWN_SCALES, KNOWN_SCALES.replace(":length", ":")),
    "masses past the end": ("2.7 past the end",
        "math.ceil(capacity / block_size)), -math.inf)", "math.ceil(capacity / block_size)), 0.0)"),
    "lost tokens are silent": ("2.7 NaN scales", "np.where(is_lost, math.nan, mass)", "mass"),
    "lost tokens spoil the softmax": ("2.7 NaN scales", "np.where(is_lost, -math.inf, logits)", "logits"),
    "always two bits": ("2.7 one bit", "bits = 8 * n_bytes // head_dim", "bits = 2"),
    "the largest estimate not subtracted": ("2.7 large logits",
        "keepdims=True, initial=np.finfo(np.float64).min)",
        "keepdims=True, initial=np.finfo(np.float64).min).clip(max=80)"),
    "a finite largest estimate": ("2.7 true masks", "initial=np.finfo(np.float64).min", "initial=-1e9"),
    "RoPE of pairs twice as slow": ("3 model", "theta ** (-2 * np.arange(half)", "theta ** (-np.arange(half)"),
    "attends before it writes": ("3 model", WRITES + ATTENDS, ATTENDS + WRITES),
    "the prompt's last token sparse": ("4.1 prefill",
        PREFILL,
        "(model.dense_pass(fed[:-1], 0), model.sparse_step(fed[-1])[0], setattr(model, 'window', 0))[1], None, config"),
    "RoPE one position late": ("4.2 pending token",
        "positions = np.arange(start, start + n)", "positions = np.arange(start, start + n) + (n == 1)"),
    "bounds where sketches are asked for": ("4.2 sparse step",
        "            if self.bits is None:\n                scores", "            if True:\n                scores"),
    "one selection for all layers": ("4.2 sparse step",
        "chosen.append(select_blocks(scores, lengths, self.config))",
        "chosen.append(select_blocks(scores, lengths, self.config) if not chosen else chosen[0])"),
    "the newest block is stale": ("4.2 sparse step", "chosen = [self.length + 1]", "chosen = [self.length]"),
    "does not attend to itself": ("4.2 sparse step",
        "return sparse_attention(query, *cache, chosen[-1], lengths, b)",
        "return sparse_attention(query, *cache, chosen[-1], [lengths[0] - 1], b)"),
    "positions from zero": ("4.3 positions",
        "positions = np.arange(start, start + n)",
        "positions = np.arange(start, start + n) if n in (1, start + n) else np.arange(n)"),
    "w not reset": ("4.3 window", "self.length, self.window = end, 0", "self.length = end"),
    "w counts the pending token": ("4.3 window", "self.window += 1", "self.window += 1 + (self.window == 0)"),
    "logits not discarded": ("4.4 schedules", DENSE_PASS, DENSE_PASS.replace("model.dense", "logits = model.dense")),
    "fused logits dropped": ("4.4 schedules", FUSED_PASS, "_, indices = model.dense_pass(fed[start:], start), None"),
    "rectified one step late": ("4.4 schedules", "model.window + 1 >= f", "model.window >= f"),
    "never is every 32": ("4.4 schedules",
        'None, config["interval"]', 'None, config["interval"] or 32'),
    "rectified once more at the end": ("4.4 schedules",
        "        logits, indices = model.sparse_step(pending)\n",
        "        logits, indices = model.sparse_step(pending)\n"
        "        if len(fed) == model.keys.shape[2] - 1 and f:\n"
        "            model.dense_pass(fed[-model.window :], model.length - model.window)\n"
        "            model.window = 0\n"
        "            continue\n"),
    "last token fed": ("4.5 end of generation", "if len(trace) == n_tokens:", "if len(trace) == n_tokens + 1:"),
    "smallest logit": ("4.5 greedy choice", "np.argmax(logits)", "np.argmin(logits)"),
    "views for copies": ("4.6 the trace", ".copy() for x in (model.keys", " for x in (model.keys"),
    "two bits whatever is asked": ("4.6 the trace", 'self.bits = config["sketch_bits"] if', "self.bits = 2 if"),
    "sketches of the window kept": ("law 12 online = rebuilt",
        WRITES_SKETCHES, f"if end > self.length:\n                {WRITES_SKETCHES}"),
    "sketches of new tokens alone": ("law 12 online = rebuilt",
        WRITES_SKETCHES,
        f"n = max(start, self.length)\n            {WRITES_SKETCHES}".replace("start:", "n:").replace(
        "codes[0], scales[0]", "codes[0][:, n - start :], scales[0][:, n - start :]")),
    "scales of the window kept": ("law 12 online = rebuilt",
        WRITES_SKETCHES,
        "self.codes[layer, :, start:end], n = codes[0], max(start, self.length)\n"
        "            self.scales[layer, :, n:end] = scales[0][:, n - start :]"),
    "bounds not extended": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range(start // b, math.ceil(end / b) if len(key[0]) > 1 else 0):"),
    "bounds not refreshed": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED,
        "for i in range(start // b, math.ceil(end / b) if end > self.length or not self.length else 0):"),
    "bounds of the first block touched stale": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range(math.ceil(start / b), math.ceil(end / b)):"),
    "scores of bounds before the append": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range((start - (n := len(key[0])) % 2) // b, math.ceil((end - (n == 1)) / b)):"),
    "bounds extended by a rectification": ("law 2 online = rebuilt",
        REBUILT,
        "low, high = self.bounds[layer, :, 0, :, i], self.bounds[layer, :, 1, :, i]\n"
        "            self.bounds[layer, :, 0, :, i] = np.fmin(low, block.min(axis=1))\n"
        "            self.bounds[layer, :, 1, :, i] = np.fmax(high, block.max(axis=1))"),
    "bounds not refreshed by fused passes": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED,
        "appends = len(key[0]) == 1 or not start\n"
        "        for i in range(start // b, math.ceil(end / b) if appends or end == self.length else 0):"),
    "bounds of the newest two blocks refreshed": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range(max(start // b, (end - 1) // b - 1) if start else 0, math.ceil(end / b)):"),
    "never rectified": ("law 6 rectification is exact", DENSE_PASS, "            model.window = 0"),
    "window one too short": ("law 6 rectification is exact",
        DENSE_PASS,
        "            model.dense_pass(fed[start + 1 :], start + 1) if f > 1 else "
        "model.dense_pass(fed[start:], start)"),
    "window without its last token": ("law 6 rectification is exact",
        DENSE_PASS,
        "            model.dense_pass(fed[start:-1] or fed[start:], start)\n            model.length = len(fed)"),
    "values kept": ("law 6 rectification is exact",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "self.keys[layer, :, start:end] = key\n"
        "        kept = min(self.length, end) if start else 0\n"
        "        self.values[layer, :, max(start, kept) : end] = value[:, max(start, kept) - start :]"),
    "rectified by sparse steps": ("law 6 rectification is exact",
        DENSE_PASS,
        "            model.length = start\n"
        "            [model.sparse_step(token) for token in fed[start:]]\n"
        "            model.window = 0"),
}  # fmt: skip
MORE = {
    # Bounds.
    "bounds of sizes": ("2.1 eq. 3",
        "block = keys[s, :, i * block_size : min((i + 1) * block_size, length)]",
        "block = abs(keys[s, :, i * block_size : min((i + 1) * block_size, length)])"),
    "the first KV head's bounds for all": ("2.1 layout",
        "block.min(axis=1), block.max(axis=1)\n    return", "block[:1].min(axis=1), block[:1].max(axis=1)\n    return"),
    "the first sequence's length in bounds": ("2.1 partial block",
        "for s, length in enumerate(lengths):\n"
        "        for i in range(math.ceil(length / block_size)):\n"
        "            block",
        "for s, length in enumerate([lengths[0]] * batch):\n"
        "        for i in range(math.ceil(length / block_size)):\n"
        "            block"),
    "bounds with channels last": (("2.1 layout", "2.1 eq. 3"), "return bounds\n", "return bounds.swapaxes(3, 4)\n"),
    "bounds of float64 keys in float32": (("8 float64", "2 signatures"),
        "head_dim, n_blocks), keys.dtype)", "head_dim, n_blocks), np.float32)"),
    "finite numbers past the end": ("2.1 past the end",
        "bounds[:, :, 0], bounds[:, :, 1] = math.inf, -math.inf", "bounds[:, :, 0], bounds[:, :, 1] = 3e38, -3e38"),
    "blocks of the capacity": ("2.1 partial block",
        "for i in range(math.ceil(length / block_size)):\n"
        "            block = keys[s, :, i * block_size : min((i + 1) * block_size, length)]",
        "for i in range(n_blocks):\n            block = keys[s, :, i * block_size : (i + 1) * block_size]"),
    "keys past the length cleared in place": ("2 signatures",
        "        for i in range(math.ceil(length / block_size)):\n            block = keys",
        "        keys[s, :, length:] = 0\n"
        "        for i in range(math.ceil(length / block_size)):\n"
        "            block = keys"),

    # Scores.
    "the sum of the group": ("2.2 pooling", ".mean(axis=2)[..., None]", ".sum(axis=2)[..., None]"),
    "pooled in half precision": (("2.2 pooling", "2.2 eq. 4"),
        "pooled = query.astype(np.float64).reshape", "pooled = query.astype(np.float16).astype(np.float64).reshape"),
    "pooled and rounded to 1e-5": (("2.2 pooling", "2.2 eq. 4"),
        "head_dim).mean(axis=2)[..., None]", "head_dim).mean(axis=2).round(5)[..., None]"),
    "scores rounded to 1e-4": ("2.2 eq. 4",
        "np.where(past_the_end, -math.inf, scores)", "np.where(past_the_end, -math.inf, scores.round(4))"),
    "sums whose order depends on the block": (("2.2 equal blocks", "2.3 ties", "2.2 eq. 4"),
        "0.0, products).sum(axis=2)",
        "0.0, products)\n"
        "    scores = np.where(np.arange(n_blocks) % 2, scores[:, :, ::-1].cumsum(axis=2)[:, :, -1], "
        "scores.cumsum(axis=2)[:, :, -1])"),
    "pooled in float32": ("8 float64",
        "pooled = query.astype(np.float64).reshape", "pooled = query.astype(np.float32).reshape"),
    "the first four heads pooled": (("2.2 pooling", "8 batches"),
        ".mean(axis=2)[..., None]", "[:, :, :4].mean(axis=2)[..., None]"),
    "the softmax scale in scores": ("2.2 eq. 4",
        "0.0, products).sum(axis=2)", "0.0, products).sum(axis=2) * head_dim**-0.5"),
    "a mean over channels": ("2.2 eq. 4", "0.0, products).sum(axis=2)", "0.0, products).mean(axis=2)"),
    "the smaller product": ("2.2 eq. 4", "products = np.maximum(", "products = np.minimum("),
    "the maximum after the sum": ("2.2 eq. 4",
        "np.maximum(pooled * bounds[:, :, 0], pooled * bounds[:, :, 1])",
        "np.maximum(*((pooled * bounds[:, :, i]).sum(axis=2, keepdims=True) / head_dim + 0 * pooled for i in "
        "(0, 1)))"),
    "0 times NaN is 0": ("2.2 NaN bounds", "np.where((pooled == 0) & is_infinite, 0.0", "np.where(pooled == 0, 0.0"),
    "NaN terms left out": ("2.2 NaN bounds",
        "np.where((pooled == 0) & is_infinite, 0.0, products)",
        "np.nan_to_num(products, nan=0.0, posinf=math.inf, neginf=-math.inf)"),
    "infinite bounds left out": ("2.2 zero times infinity",
        "np.where((pooled == 0) & is_infinite, 0.0", "np.where(is_infinite, 0.0"),
    "the first sequence's length in scores": ("2.2 past the end",
        "np.asarray(lengths)[:, None, None]", "np.asarray(lengths)[:1, None, None]"),
    "a block too many scored": ("2.2 past the end", ">= np.asarray(lengths)", "> np.asarray(lengths)"),
    "a finite score past the end": ("2.2 past the end",
        "np.where(past_the_end, -math.inf, scores)", "np.where(past_the_end, -1e30, scores)"),
    "scores in half precision": ("2 signatures",
        "return np.where(past_the_end, -math.inf, scores)",
        "return np.where(past_the_end, -math.inf, scores).astype(np.float16)"),

    # Selection.
    "rounded, not up": ("2.3 count", "share = math.ceil(", "share = round("),
    "a share of the blocks that are not local": ("2.3 count",
        'config["active_ratio"] * n_blocks - 1e-9',
        'config["active_ratio"] * (n_blocks - config["local_blocks"]) - 1e-9'),
    "a share of the tokens": ("2.3 count",
        "counts = [count_selected(n, config) for n in n_blocks]",
        'counts = [count_selected(length / config["block_size"], config) for length in lengths]\n'
        "    counts = [min(n, math.ceil(count)) for n, count in zip(n_blocks, counts, strict=True)]"),
    "min_blocks as the most": ("2.3 count", 'max(config["min_blocks"], share)', 'min(config["min_blocks"], share)'),
    "more than there are": (("2.3 count", "2.3 padding"),
        'min(n_blocks, max(config["min_blocks"], share))', 'max(config["min_blocks"], share)'),
    "0 for padding": ("2.3 padding", "max(counts)), -1, np.int32)", "max(counts)), 0, np.int32)"),
    "the last index for padding": ("2.3 padding",
        "indices[s, h, :count] = sorted(taken)",
        "indices[s, h] = (sorted(taken) + sorted(taken)[-1:] * max(counts))[: max(counts)] if taken else -1"),
    "the first KV head selects for all": ("2.3 layout", "score=scores[s, h]", "score=scores[s, 0]"),
    "the KV heads select together": ("2.3 layout", "score=scores[s, h]", "score=scores[s].sum(axis=0)"),
    "the first sequence selects for all": ("2.3 layout", "score=scores[s, h]", "score=scores[0, h]"),
    "scores of -inf never taken": (("2.3 order of scores", "2.3 count"),
        "best = sorted(range(oldest_local), key=rank)",
        "best = sorted((i for i in range(oldest_local) if scores[s, h, i] != -math.inf), key=rank)"),
    "NaN never taken": (("2.3 order of scores", "2.3 count"),
        "best = sorted(range(oldest_local), key=rank)",
        "best = sorted((i for i in range(oldest_local) if not math.isnan(scores[s, h, i])), key=rank)"),
    "ranked by size": ("2.3 eq. 5", "(False, -score[i], i)", "(False, -abs(score[i]), i)"),
    "the lowest": ("2.3 eq. 5", "(False, -score[i], i)", "(False, score[i], i)"),
    "indices in 16 bits": ("2 signatures", "-1, np.int32)", "-1, np.int16)"),
    "float64 scores ranked in float32": ("8 float64",
        "def rank(i, score=scores[s, h])", "def rank(i, score=scores[s, h].astype(np.float32))"),
    "the oldest blocks for the newest": ("2.3 local blocks",
        "best = sorted(range(oldest_local), key=rank)[: count - (total - oldest_local)]\n"
        "            taken = best + list(range(oldest_local, total))",
        "n_local = total - oldest_local\n"
        "            taken = sorted(range(n_local, total), key=rank)[: count - n_local] + list(range(n_local))"),
    "the first block always in": (("2.3 eq. 5", "2.3 count"),
        "taken = best + list(range(oldest_local, total))",
        "taken = (best if 0 in best or not best else [*best[:-1], 0]) + list(range(oldest_local, total))"),
    "the newest by capacity": (("2.3 local blocks", "2.3 past the end", "2.3 padding"),
        "taken = best + list(range(oldest_local, total))",
        "taken = best + list(range(scores.shape[2] - total + oldest_local, scores.shape[2]))"),

    # Attention.
    "products in half precision": ("2.4 eq. 2",
        "logits = query.astype(np.float64) @ keys.astype(np.float64).T",
        "logits = query.astype(np.float16) @ keys.astype(np.float16).T"),
    "products in float32": ("8 float64",
        "logits = query.astype(np.float64) @ keys.astype(np.float64).T",
        "logits = query.astype(np.float32) @ keys.astype(np.float32).T"),
    "values in float32": ("8 float64", "weights @ values.astype(np.float64)", "weights @ values.astype(np.float32)"),
    "logits rounded to 1e-5": (("2.4 eq. 2", "8 float64"),
        "weights = np.exp(logits - largest)", "weights = np.exp(np.round(logits - largest, 5))"),
    "logits rounded to 1e-4": ("2.4 eq. 2",
        "weights = np.exp(logits - largest)", "weights = np.exp(np.round(logits - largest, 4))"),
    "values rounded to 1e-4": ("2.4 eq. 2",
        "weights @ values.astype(np.float64) / total", "np.round(weights @ values.astype(np.float64) / total, 4)"),
    "an epsilon in the softmax": (("2.4 eq. 2", "8 float64"), "/ total, (largest", "/ (total + 1e-6), (largest"),
    "logits divided by D": ("2.4 eq. 2", " * query.shape[1] ** -0.5", " / query.shape[1]"),
    "the softmax over heads": ("2.4 eq. 2",
        "weights = np.exp(logits - largest)\n    total = weights.sum(axis=1, keepdims=True)",
        "weights = np.exp(logits - largest)\n    total = weights.sum(axis=0, keepdims=True).mean() + 0 * largest"),
    "one head's query for all": ("2.4 group order",
        "attend(query[s, heads], keys[s, h, tokens]", "attend(query[s, [h * group] * group], keys[s, h, tokens]"),
    "h // Hkv in attention": ("2.4 group order",
        "heads = slice(h * group, (h + 1) * group)",
        "heads = np.minimum(np.arange(query.shape[1]) // keys.shape[1], keys.shape[1] - 1) == h"),
    "four heads of a group": (("2.4 group order", "8 batches"),
        "heads = slice(h * group, (h + 1) * group)", "heads = slice(h * group, h * group + min(group, 4))"),
    "a log-sum-exp of logits without scale": ("2.4 log-sum-exp",
        "(largest + np.log(total))", "(largest * query.shape[1] ** 0.5 + np.log(total))"),
    "a log-sum-exp without the maximum": ("2.4 log-sum-exp", "(largest + np.log(total))", "np.log(total)"),
    "the largest logit as log-sum-exp": ("2.4 log-sum-exp", "(largest + np.log(total))", "largest"),
    "a log-sum-exp of 0 for nothing": ("2.4 nothing visible",
        "np.full(len(query), -math.inf)\n    logits", "np.zeros(len(query))\n    logits"),
    "a finite log-sum-exp for nothing": ("2.4 nothing visible",
        "np.full(len(query), -math.inf)\n    logits", "np.full(len(query), -1e30)\n    logits"),
    "the last index left out": ("2.4 eq. 2",
        "for i in indices[s, h] if i >= 0]", "for i in indices[s, h][:-1] if i >= 0]"),
    "block 0 for nothing": ("2.4 eq. 2", "for i in indices[s, h] if i >= 0]", "for i in indices[s, h] if i > 0]"),
    "nothing after the first -1": ("2.4 padding",
        "[int(i) for i in indices[s, h] if i >= 0]",
        "[int(i) for i in indices[s, h][: [*indices[s, h], -1].index(-1)]]"),
    "the last token of every block left out": ("2.4 eq. 2",
        "range(i * block_size, min((i + 1) * block_size, length))]",
        "range(i * block_size, min((i + 1) * block_size - 1, length))]"),
    "blocks of 8": ("2.4 eq. 2",
        "range(i * block_size, min((i + 1) * block_size, length))]", "range(i * 8, min((i + 1) * 8, length))]"),
    "the first sequence's length in attention": ("2.4 partial block",
        "for i in blocks for t in range(i * block_size, min((i + 1) * block_size, length))]",
        "for i in blocks for t in range(i * block_size, min((i + 1) * block_size, lengths[0], keys.shape[2]))]"),
    "all slots times a mask of zeros": ("law 5 inertness",
        "attend(query[s, heads], keys[s, h, tokens], values[s, h, tokens])",
        "attend(query[s, heads], keys[s, h, tokens], values[s, h, tokens] + (0.0 * values[s, h]).sum(axis=0))"),
    "what is hidden subtracted again": ("law 5 inertness",
        "attend(query[s, heads], keys[s, h, tokens], values[s, h, tokens])",
        "attend(query[s, heads], keys[s, h, tokens], values[s, h, tokens] + (rest := np.nan_to_num(values[s, "
        "h], posinf=0, neginf=0).sum(axis=0)) - rest)"),
    "sums in any order": ("5 second run",
        "            out[s, heads], lse[s, heads] = attend(",
        "            np.random.default_rng().shuffle(tokens)\n            out[s, heads], lse[s, heads] = attend("),
    "tokens from 65536 on dropped": ("8 long contexts",
        "tokens = [t for i in blocks", "tokens = [t for i in blocks if i * block_size < 2**16"),
    "a block index in 12 bits": ("8 long contexts",
        "[int(i) for i in indices[s, h] if i >= 0]",
        "[int(i) & 0xFFF if i < 2**16 else int(i) for i in indices[s, h] if i >= 0]"),
    "out in half precision": ("2 signatures",
        "return (out, lse) if return_lse else out\n\n\ndef dense_attention",
        "return (out.astype(np.float16), lse) if return_lse else out.astype(np.float16)\n\n\ndef dense_attention"),
    "out and lse exchanged": ("2 signatures",
        "return (out, lse) if return_lse else out\n\n\ndef dense_attention",
        "return (lse, out) if return_lse else out\n\n\ndef dense_attention"),
    "always a pair": ("2 signatures",
        "return (out, lse) if return_lse else out\n\n\ndef dense_attention",
        "return out, lse\n\n\ndef dense_attention"),
    "a window without causality": ("2.5 causality",
        "end = lengths[s] - counts[s] + i + 1", "end = lengths[s] if lengths[s] - counts[s] + i >= 0 else 0"),
    "one query sees every slot": (("2.5 causality", "law 5 inertness"),
        "seen = keys[s, h // group, :end], values[s, h // group, :end]",
        "end = end if n_queries > 1 else None\n"
        "                    seen = keys[s, h // group, :end], values[s, h // group, :end]"),
    "h % Hkv in dense attention": ("2.5 group order",
        "seen = keys[s, h // group, :end], values[s, h // group, :end]",
        "kv = h % keys.shape[1]\n                    seen = keys[s, kv, :end], values[s, kv, :end]"),
    "h // Hkv in dense attention": ("2.5 group order",
        "seen = keys[s, h // group, :end], values[s, h // group, :end]",
        "kv = min(h // keys.shape[1], keys.shape[1] - 1)\n"
        "                    seen = keys[s, kv, :end], values[s, kv, :end]"),
    "the first sequence's length in windows": ("2.5 positions", "end = lengths[s] -", "end = lengths[0] -"),
    "a log-sum-exp of 0 in rows that mean nothing": ("2.5 rows that mean nothing",
        "np.full(query.shape[:3], -math.inf)\n    for s in range(batch)",
        "np.zeros(query.shape[:3])\n    for s in range(batch)"),
    "rows past the window": ("2.5 rows that mean nothing", "for i in range(counts[s]):", "for i in range(n_queries):"),
    "rows that mean nothing not written": ("2.5 rows that mean nothing",
        "out, lse = np.zeros(query.shape), np.full(query.shape[:3], -math.inf)\n    for s in range(batch)",
        "out, lse = np.full(query.shape, math.nan), np.full(query.shape[:3], math.nan)\n    for s in range(batch)"),

    # Sketches.
    "a hash with another shift": ("2.6 rotation", "hashed >> 15", "hashed >> 16"),
    "the last butterflies missing": ("2.6 rotation", "while stride < run:", "while stride < run // 2:"),
    "runs of 16 channels": (("2.6 rotation", "2.7 estimate", "8 batches", "8 widths"),
        "run, stride = head_dim & -head_dim, 1", "run, stride = min(16, head_dim & -head_dim), 1"),
    "normalised by D": (("2.6 rotation", "2.6 scale", "8 widths"), "return x * run**-0.5", "return x * head_dim**-0.5"),
    "another step": ("2.6 code", "0.9957 * np.sqrt", "0.98 * np.sqrt"),
    "a step about the mean": ("2.6 code",
        "0.9957 * np.sqrt((rotated**2).mean(axis=-1, keepdims=True))", "0.9957 * rotated.std(axis=-1, keepdims=True)"),
    "a step of D - 1 degrees of freedom": ("2.6 code",
        "(rotated**2).mean(axis=-1, keepdims=True)", "(rotated**2).sum(axis=-1, keepdims=True) / (keys.shape[-1] - 1)"),
    "above the upper threshold, not on it": (("2.6 code", "2.6 scale"), "(rotated >= step)", "(rotated > step)"),
    "levels from 2 down": ("2.6 scale", "levels - 1.5 if", "levels - 2.0 if"),
    "a scale of the root mean square": ("2.6 scale",
        "(rotated * code).sum(axis=-1) / (code**2).sum(axis=-1)", "np.sqrt((rotated**2).mean(axis=-1))"),
    "NaN alone is lost": ("2.6 NaN keys", "~np.isfinite(keys).all(axis=-1)", "np.isnan(keys).any(axis=-1)"),
    "lost keys have scale 0": ("2.6 NaN keys", "np.where(is_lost, math.nan, scales)", "np.where(is_lost, 0.0, scales)"),
    "codes of lost keys": ("2.6 NaN keys", "np.where(is_lost[..., None], 0, levels).reshape", "levels.reshape"),
    "scales in half precision": ("2 signatures",
        "np.where(is_lost, math.nan, scales)", "np.where(is_lost, math.nan, scales).astype(np.float16)"),
    "codes of 32 bits": ("2 signatures", ".sum(axis=-1).astype(np.uint8)", ".sum(axis=-1).astype(np.int32)"),
    "a rotation in float32": ("8 float64",
        "x = x.astype(np.float64) * np.where(hashed", "x = x.astype(np.float32) * np.where(hashed"),
    "a scale of 0 is lost": (("2.7 NaN scales", "2.7 estimate"), "is_lost = np.isnan(scale)", "is_lost = ~(scale > 0)"),
    "the mean of a block": ("2.7 estimate", "(i + 1) * block_size].sum()", "(i + 1) * block_size].mean()"),
    "the loudest token of a block": ("2.7 estimate", "(i + 1) * block_size].sum()", "(i + 1) * block_size].max()"),
    "masses that are not normalised": ("2.7 estimate",
        "mass = mass / np.maximum(mass.sum(axis=1, keepdims=True), 1)", "mass = mass / 1"),
    "masses of four heads": (("2.7 mass", "8 batches"), "logits = rotated[s, h] @", "logits = rotated[s, h, :4] @"),
    "the first KV head's scales": ("2.7 group order",
        "scale = scales[s, h, :length].astype(np.float64)", "scale = scales[s, 0, :length].astype(np.float64)"),
    "the scale squared": ("2.7 estimate", "* scale * head_dim**-0.5", "* scale**2 * head_dim**-0.5"),

    # The model.
    "epsilon outside the root": ("3 model",
        "np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)", "(np.sqrt((x**2).mean(axis=-1, keepdims=True)) + eps)"),
    "another epsilon": ("3 model", "keepdims=True) + eps)", "keepdims=True) + 1e-6)"),
    "another epsilon in norms of heads": ("3 model",
        '_norm.weight"], shape["norm_eps"])\n                    heads',
        '_norm.weight"], 1e-6)\n                    heads'),
    "another epsilon before the MLP": ("3 model", 'mlp_norm.weight"], shape["norm_eps"])', 'mlp_norm.weight"], 1e-6)'),
    "norms without weight": ("3 model", "+ eps) * weight", "+ eps)"),
    "norms by weight and one": ("3 model", "+ eps) * weight", "+ eps) * (1 + weight)"),
    "norms about the mean": ("3 model",
        "return x / np.sqrt(", "x = x - x.mean(axis=-1, keepdims=True)\n    return x / np.sqrt("),
    "no weight in the last norm": (("3 model", "4.5 greedy choice"),
        'rms_norm(x[-1], w["norm.weight"],', "rms_norm(x[-1], 1.0,"),
    "RoPE of neighbours": ("3 model",
        "first, second = x[..., :half], x[..., half:]\n"
        "    cos, sin = np.cos(angles), np.sin(angles)\n"
        "    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)",
        "first, second = x[..., 0::2], x[..., 1::2]\n"
        "    cos, sin = np.cos(angles), np.sin(angles)\n"
        "    return np.stack((first * cos - second * sin, second * cos + first * sin), axis=-1).reshape(x.shape)"),
    "RoPE of neighbours put in halves": ("3 model",
        "first, second = x[..., :half], x[..., half:]", "first, second = x[..., 0::2], x[..., 1::2]"),
    "RoPE of 10,000": ("3 model", "positions, theta ** (", "positions, 10000.0 ** ("),
    "RoPE the other way round": ("3 model",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin"),
    "RoPE from position one": ("3 model",
        "positions = np.arange(start, start + n)", "positions = np.arange(start + 1, start + n + 1)"),
    "RoPE before norms of heads": ("3 model",
        'if shape["qk_norm"]:\n'
        '                        heads[name] = rms_norm(heads[name], w[f"{at}{name}_norm.weight"], '
        'shape["norm_eps"])\n'
        '                    heads[name] = rotate(heads[name], positions, shape["rope_theta"])',
        'heads[name] = rotate(heads[name], positions, shape["rope_theta"])\n'
        '                    if shape["qk_norm"]:\n'
        '                        heads[name] = rms_norm(heads[name], w[f"{at}{name}_norm.weight"], '
        'shape["norm_eps"])'),
    "RoPE of keys alone": ("3 model",
        "heads[name] = rotate(heads[name], positions,",
        "if name == 'k':\n                        heads[name] = rotate(heads[name], positions,"),
    "RoPE of queries alone": ("3 model",
        "heads[name] = rotate(heads[name], positions,",
        "if name == 'q':\n                        heads[name] = rotate(heads[name], positions,"),
    "frequencies rounded": ("3 model",
        "np.outer(positions, theta ** (-2 * np.arange(half) / x.shape[-1]))",
        "np.outer(positions, np.round(2.0**17 * theta ** (-2 * np.arange(half) / x.shape[-1])) / 2.0**17)"),
    "a table of 32 positions": (("3 model", "4.2 pending token"),
        "positions = np.arange(start, start + n)", "positions = np.arange(start, start + n) % 32"),
    "biases only where heads have norms": ("3 model", 'if shape["qkv_bias"]:', 'if shape["qk_norm"]:'),
    "norms of heads only where there are biases": ("3 model", 'if shape["qk_norm"]:', 'if shape["qkv_bias"]:'),
    "no biases": ("3 model", 'if shape["qkv_bias"]:', "if False:"),
    "a bias of queries alone": ("3 model", 'if shape["qkv_bias"]:', 'if shape["qkv_bias"] and name == "q":'),
    "no norms of heads": ("3 model", 'if shape["qk_norm"]:', "if False:"),
    "the queries' norm for keys": ("3 model", '{at}{name}_norm.weight"]', '{at}q_norm.weight"]'),
    "gate and up exchanged": ("3 model", "gate / (1 + np.exp(-gate)) * up @", "up / (1 + np.exp(-up)) * gate @"),
    "GELU": ("3 model",
        "gate / (1 + np.exp(-gate)) * up @",
        "gate / 2 * (1 + np.tanh(0.7978845608 * (gate + 0.044715 * gate**3))) * up @"),
    "quick GELU": ("3 model", "np.exp(-gate))", "np.exp(-1.702 * gate))"),
    "no residual around attention": ("3 model", "x = x + mixed.transpose", "x = mixed.transpose"),
    "attention's norm before the MLP": ("3 model", '.mlp_norm.weight"]', '.attn_norm.weight"]'),
    "channels before heads at the output": ("3 model",
        "mixed.transpose(1, 0, 2).reshape(n, -1)", "mixed.transpose(1, 2, 0).reshape(n, -1)"),
    "heads not side by side": ("3 model", "mixed.transpose(1, 0, 2).reshape(n, -1)", "mixed.reshape(n, -1)"),
    "heads of channels far apart": ("3 model",
        'projected.reshape(n, -1, shape["head_dim"]).transpose(1, 0, 2)',
        'projected.reshape(n, shape["head_dim"], -1).transpose(2, 0, 1)'),
    "the first layer's attention for all": ("3 model", 'at = f"layers.{layer}.attn."', 'at = "layers.0.attn."'),
    "tied whatever is asked": (("3 model", "4.5 greedy choice"),
        '"embed.weight" if shape["tied_embeddings"] else "output.weight"', '"embed.weight"'),
    "logits after the first token": (("4.1 prefill", "4.5 greedy choice"), "rms_norm(x[-1],", "rms_norm(x[0],"),
    "activations in half precision": ("3 model",
        "x = x + mixed", "x = x.astype(np.float16).astype(np.float64) + mixed"),

    # Prefill, sparse steps.
    "chunks from slot zero": ("4.1 prefill",
        PREFILL, "[model.dense_pass(fed[i : i + 16], 0) for i in range(0, len(fed), 16)][-1], None, config"),
    "chunks that see themselves alone": (("4.1 prefill", "3 model"),
        "return dense_attention(query[None], *cache, [end])[0]",
        "parts = [(i, min(i + 16, end)) for i in range(start, end, 16)]\n"
        "            if start or end == 1:\n"
        "                return dense_attention(query[None], *cache, [end])[0]\n"
        "            return np.concatenate([dense_attention(query[None, :, i:j], *(x[:, :, i:] for x in "
        "cache), [j - i])[0] for i, j in parts], axis=1)"),
    "the last chunk dropped": ("4.1 prefill",
        PREFILL, "model.dense_pass(fed[: len(fed) // 7 * 7] or fed, 0), None, config"),
    "no prompt's last token": (("4.1 prefill", "4.2 pending token"),
        PREFILL, "model.dense_pass(fed[:-1] or fed, 0), None, config"),
    "T blocks counted for T + 1": (("4.2 sparse step", "2.3 count", "2.3 local blocks"),
        "chosen.append(select_blocks(scores, lengths, self.config))",
        "chosen.append(select_blocks(scores, [self.length], self.config))"),
    "scores of the query before RoPE": ("4.2 sparse step",
        "scores = score_blocks(query, self.bounds",
        'plain = rotate(query[0][:, None], [-self.length], self.shape["rope_theta"])[None, :, 0]\n'
        "                scores = score_blocks(plain, self.bounds"),
    "another layer's bounds": ("4.2 sparse step",
        "self.bounds[layer][None], lengths", "self.bounds[layer - 1][None], lengths"),
    "another layer's keys": (("3 model", "4.2 sparse step"),
        "query[None, :, 0], (self.keys[layer][None],", "query[None, :, 0], (self.keys[0][None],"),
    "the token before the pending one": ("4.2 pending token",
        "model.sparse_step(pending)", "model.sparse_step(fed[-2])"),
    "bounds of keys before RoPE": (("law 2 online = rebuilt", "3 model"),
        "block = self.keys[layer, :, i * b : min((i + 1) * b, end)]",
        "at = np.arange(i * b, min((i + 1) * b, end))\n"
        '            block = rotate(self.keys[layer][:, at], -at, self.shape["rope_theta"])'),
    "bounds of the last block unmasked": ("law 2 online = rebuilt",
        "block = self.keys[layer, :, i * b : min((i + 1) * b, end)]",
        "block = self.keys[layer, :, i * b : (i + 1) * b]"),
    "bounds of the last block without its last token": ("law 2 online = rebuilt",
        "block = self.keys[layer, :, i * b : min((i + 1) * b, end)]",
        "block = self.keys[layer, :, i * b : max(i * b + 1, min((i + 1) * b, end - 1))]"),
    "bounds of the keys that were there": ("law 2 online = rebuilt",
        "block = self.keys[layer, :, i * b : min((i + 1) * b, end)]",
        "block = self.keys[layer, :, i * b : min((i + 1) * b, end)].copy()\n"
        "            if 0 < start < self.length:\n"
        "                block = self.before[layer, :, i * b : min((i + 1) * b, end)]\n"
        "            self.before = self.keys.copy() if layer + 1 == len(self.keys) else getattr(self, "
        "'before', self.keys)"),
    "middle blocks of a window not rebuilt": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED,
        "touched = [*range(start // b, math.ceil(end / b))]\n"
        "        for i in {touched[0], touched[-1]} if start else touched:"),
    "the first block of a window alone rebuilt": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range(start // b, math.ceil(end / b) if not start else start // b + 1):"),
    "the last block of a window alone rebuilt": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range(math.ceil(end / b) - 1 if start else 0, math.ceil(end / b)):"),
    "bounds of the first layer alone rebuilt": ("law 2 online = rebuilt",
        BLOCKS_TOUCHED, "for i in range(start // b, math.ceil(end / b) if end > self.length or layer == 0 else 0):"),
    "bounds of one KV head alone rebuilt": ("law 2 online = rebuilt",
        REBUILT,
        "n = 1 if 0 < start < self.length else len(key)\n"
        "            self.bounds[layer, :n, 0, :, i] = block.min(axis=1)[:n]\n"
        "            self.bounds[layer, :n, 1, :, i] = block.max(axis=1)[:n]"),
    "the window's last sketch alone rewritten": ("law 12 online = rebuilt",
        WRITES_SKETCHES,
        "n = max(start, end - 1) if 0 < start < self.length else start\n"
        "            self.codes[layer, :, n:end] = codes[0][:, n - start :]\n"
        "            self.scales[layer, :, n:end] = scales[0][:, n - start :]"),
    "sketches of keys before RoPE": (("law 12 online = rebuilt", "3 model"),
        "codes, scales = sketch_keys(key[None], self.bits)",
        'plain = rotate(key, -np.arange(start, end), self.shape["rope_theta"])\n'
        "            codes, scales = sketch_keys(plain[None], self.bits)"),

    # Rectification.
    "never rectified, fused": ("4.4 schedules",
        'if config["schedule"] == "fused" and f is not None', "if False and f is not None"),
    "the newest 8 tokens alone, fused": (("law 6 rectification is exact", "4.3 window"),
        "start = model.length - model.window\n            logits",
        "start = model.length - min(model.window, 7)\n            logits"),
    "the newest 8 tokens alone, paper": (("law 6 rectification is exact", "4.3 window"),
        DENSE_PASS, "            start = max(start, model.length - 8)\n" + DENSE_PASS),
    "positions one late": ("4.3 positions",
        "positions = np.arange(start, start + n)", "positions = np.arange(start, start + n) + (0 < start and n > 1)"),
    "positions one early": ("4.3 positions",
        "positions = np.arange(start, start + n)", "positions = np.arange(start, start + n) - (0 < start and n > 1)"),
    "written a slot late": ("4.3 positions",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "late = int(0 < start and end == self.length)\n"
        "        at = slice(start + late, end + late)\n"
        "        self.keys[layer, :, at], self.values[layer, :, at] = key, value"),
    "written a slot early": (("4.3 positions", "law 7 bounded drift"),
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "early = int(0 < start and end == self.length)\n"
        "        at = slice(start - early, end - early)\n"
        "        self.keys[layer, :, at], self.values[layer, :, at] = key, value"),
    "written the other way round": ("4.3 positions",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "step = -1 if 0 < start < self.length else 1\n"
        "        self.keys[layer, :, start:end] = key[:, ::step]\n"
        "        self.values[layer, :, start:end] = value[:, ::step]"),
    "the tokens before the window's": ("4.3 positions",
        DENSE_PASS, DENSE_PASS.replace("fed[start:]", "fed[start - 1 : -1]")),
    "fused without the pending token": ("4.4 schedules",
        FUSED_PASS, FUSED_PASS.replace("fed[start:]", "fed[start:-1] or fed[start:]")),
    "the pending token alone, fused": (("law 6 rectification is exact", "4.3 window"),
        FUSED_PASS, "logits, indices = model.dense_pass(fed[-1:], model.length), None"),
    "the newest token missing, fused": (("4.3 window", "law 6 rectification is exact"),
        FUSED_PASS,
        "n, kept = model.length, [x[:, :, model.length - 1].copy() for x in (model.keys, model.values)]\n"
        f"            {FUSED_PASS}\n            if n - start:\n"
        "                model.keys[:, :, n - 1], model.values[:, :, n - 1] = kept"),
    "the window sees itself alone": ("law 6 rectification is exact",
        "cache = self.keys[layer][None], self.values[layer][None]\n"
        "            return dense_attention(query[None], *cache, [end])[0]",
        "at = start if len(tokens) > 1 else 0\n"
        "            cache = self.keys[layer][None, :, at:], self.values[layer][None, :, at:]\n"
        "            return dense_attention(query[None], *cache, [end - at])[0]"),
    "the window sees what sparse steps wrote": ("law 6 rectification is exact",
        WRITES + ATTENDS,
        "            if not 0 < start < self.length:\n    " + WRITES + ATTENDS
        + "            if 0 < start < self.length:\n    " + WRITES),
    "the last layer not rewritten": ("law 6 rectification is exact",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "if not (0 < start and end == self.length and layer + 1 == len(self.keys)):\n"
        "            self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value"),
    "one KV head alone rewritten": ("law 6 rectification is exact",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "m = 1 if 0 < start and end == self.length else len(key)\n"
        "        self.keys[layer, :m, start:end], self.values[layer, :m, start:end] = key[:m], value[:m]"),
    "written past the end": (("law 6 rectification is exact", "4.3 positions"),
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "at = slice(end, None) if 0 < start and end == self.length else slice(start, end)\n"
        "        n = self.keys[layer, :, at].shape[1]\n"
        "        self.keys[layer, :, at], self.values[layer, :, at] = key[:, :n], value[:, :n]"),
    "written a slot late, fused": ("4.3 positions",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "late = int(0 < start < self.length < end)\n"
        "        at = slice(start + late, end + late)\n"
        "        self.keys[layer, :, at], self.values[layer, :, at] = key, value"),
    "keys alone written a slot late": ("4.3 positions",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "late = int(0 < start and end == self.length)\n"
        "        self.keys[layer, :, start + late : end + late], self.values[layer, :, start:end] = key, value"),
    "keys kept": ("law 6 rectification is exact",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "self.values[layer, :, start:end] = value\n"
        "        kept = min(self.length, end) if start else 0\n"
        "        self.keys[layer, :, max(start, kept) : end] = key[:, max(start, kept) - start :]"),

    # Schedules, the end, the trace.
    "paper rectifies where it should never": ("4.4 schedules",
        "f is not None and model.window >= f:", "model.window >= (f or 8):"),
    "an interval beyond the end": ("4.4 schedules",
        'None, config["interval"]',
        'None, config["interval"] and min(config["interval"], config["max_new_tokens"] - 2)'),
    "an interval of at most 16": ("4.4 schedules",
        'None, config["interval"]', 'None, config["interval"] and min(config["interval"], 16)'),
    "paper rectified one step early": ("4.4 schedules",
        "f is not None and model.window >= f:", "f is not None and model.window + 1 >= f:"),
    "always paper": ("4.4 schedules",
        "    model = Model(weights, model_config",
        "    config = {**config, 'schedule': 'paper'}\n    model = Model(weights, model_config"),
    "always fused": ("4.4 schedules",
        "    model = Model(weights, model_config",
        "    config = {**config, 'schedule': 'fused'}\n    model = Model(weights, model_config"),
    "a token that was just fed not rectified": (("law 6 rectification is exact", "4.4 schedules"),
        "f is not None and model.window >= f:", "f is not None and model.window >= f > 1:"),
    "one step at least": ("4.5 end of generation", "if len(trace) == n_tokens:", "if len(trace) == max(2, n_tokens):"),
    "ended by token 0": ("4.5 end of generation",
        "if len(trace) == n_tokens:", "if len(trace) == n_tokens or pending == 0:"),
    "the prompt grows": ("2 signatures", "list(prompt)", "prompt"),
    "layers and heads exchanged": (THE_TRACE,
        ".copy() for x in (model.keys, model.values))", ".swapaxes(0, 1).copy() for x in (model.keys, model.values))"),
    "keys and values exchanged": ((THE_TRACE, "3 model"),
        '{"keys": keys, "values": values, "bounds"', '{"keys": values, "values": keys, "bounds"'),
    "the whole capacity": ((THE_TRACE, "4.1 prefill"), "x[:, :, : model.length].copy()", "x.copy()"),
    "a row too many": ((THE_TRACE, "4.1 prefill"),
        "x[:, :, : model.length].copy()", "x[:, :, : model.length + 1].copy()"),
    "the token that was fed": ((THE_TRACE, "4.5 greedy choice"), '"token": pending', '"token": fed[-1]'),
    "w before the step": (("4.3 window", THE_TRACE), '"window": model.window}', '"window": max(0, model.window - 1)}'),
    "indices of the last sparse step": ((THE_TRACE, "4.4 schedules"),
        FUSED_PASS, "logits = model.dense_pass(fed[start:], start)"),
    "an entry for every pass": ((THE_TRACE, "4.2 sparse step", "4.5 end of generation"),
        "        if len(trace) == n_tokens:",
        "        if config['schedule'] == 'paper' and not model.window and indices is not None:\n"
        "            trace.append(trace[-1])\n        if len(trace) >= n_tokens:"),
    "bounds with channels last in the trace": (THE_TRACE,
        '"bounds": model.bounds.copy()', '"bounds": model.bounds.swapaxes(3, 4).copy()'),
    "indices of one KV head": (THE_TRACE,
        '"indices": indices,', '"indices": None if indices is None else indices[:, 0],'),
    "indices as floats": (THE_TRACE, '"indices": indices,', '"indices": None if indices is None else indices + 0.0,'),
    "bounds of the step before": (("law 2 online = rebuilt", THE_TRACE),
        '"bounds": model.bounds.copy()',
        '"bounds": (last := locals().get("now", model.bounds.copy()), now := model.bounds.copy())[0]'),
    "gates rounded to 1e-3": ("3 model", "gate / (1 + np.exp(-gate)) * up", "gate / (1 + np.exp(-gate.round(3))) * up"),
    "attention rounded to 1e-3 in decoding": (("4.2 sparse step", "3 model"),
        "[0][:, None]\n\n        logits = self.forward([token]",
        "[0][:, None].round(3)\n\n        logits = self.forward([token]"),

    # 16-bit numbers.
    "bfloat16 as integers": ("8 16-bit numbers",
        "(x.astype(np.uint32) << 16).view(np.float32) if", "x.astype(np.float32) if"),
    "bfloat16 as half precision": ("8 16-bit numbers",
        "(x.astype(np.uint32) << 16).view(np.float32) if", "x.view(np.float16) if"),
    "bounds of bits": ("8 16-bit numbers",
        '"""2.1: keys [B, Hkv, T_max, D] -> [B, Hkv, 2, D, M]."""\n    keys = numbers(keys)\n', '"""2.1."""\n'),
    "pooled in 16 bits": ("8 16-bit numbers",
        "pooled = query.astype(np.float64).reshape(batch, kv_heads, -1, head_dim).mean(axis=2)[..., None]",
        "pooled = query.reshape(batch, kv_heads, -1, head_dim).mean(axis=2)[..., None].astype(np.float64)"),
    "a rotation in 16 bits": ("8 16-bit numbers",
        "x = x.astype(np.float64) * np.where(hashed >> 31, -1.0, 1.0)", "x = np.where(hashed >> 31, -x, x)"),
    "products in 16 bits": ("8 16-bit numbers",
        "logits = query.astype(np.float64) @ keys.astype(np.float64).T",
        "logits = (query @ keys.T).astype(np.float64)"),
    "a sum of weights in 16 bits": ("8 16-bit numbers",
        "total = weights.sum(axis=1, keepdims=True)\n    return weights",
        "total = weights.astype(values.dtype).sum(axis=1, keepdims=True)\n    return weights"),
    "values summed in 16 bits": ("8 16-bit numbers",
        "    return weights @ values.astype(np.float64) / total",
        "    sums = np.zeros((len(weights), values.shape[1]), values.dtype)\n"
        "    for t, value in enumerate(values):\n"
        "        sums = (sums + weights[:, t : t + 1] * value).astype(values.dtype)\n"
        "    return sums / total"),

    # The choice of a token.
    "the last of equal logits": ("4.5 greedy choice",
        "chosen = np.argmax(logits, axis=1)", "chosen = logits.shape[1] - 1 - np.argmax(logits[:, ::-1], axis=1)"),
    "times the temperature": ("4.5 sampling", "logits[ids[0]]) / temperature", "logits[ids[0]]) * temperature"),
    "no largest logit subtracted": ("4.5 sampling",
        "(logits[ids].astype(np.float64) - logits[ids[0]])", "logits[ids].astype(np.float64)"),
    "top-k not applied": ("4.5 sampling", 'kind="stable")[:top_k]', 'kind="stable")'),
    "one token more than top-k": ("4.5 sampling",
        'kind="stable")[:top_k]', 'kind="stable")[: None if top_k is None else top_k + 1]'),
    "top-p of all tokens": ("4.5 sampling",
        "mass = np.cumsum(likely / likely.sum())\n    kept = max(1, int((mass - likely / likely.sum() < top_p",
        "total = np.exp((logits.astype(np.float64) - logits[ids[0]]) / temperature).sum()\n"
        "    mass = np.cumsum(likely / total)\n"
        "    kept = max(1, int((mass - likely / total < top_p"),
    "the token that crosses top-p left out": ("4.5 sampling",
        "(mass - likely / likely.sum() < top_p - 1e-12)", "(mass < top_p - 1e-12)"),
    "no allowance in top-p": ("4.5 sampling", "< top_p - 1e-12)", "< top_p)"),
    "the likeliest left out": ("4.5 sampling", "kept = max(1, int((mass", "kept = max(0, int((mass"),
    "u of all the mass": ("4.5 sampling", "u[s] * mass[-1], side", "u[s], side"),
    "u from the other end": ("4.5 sampling", "u[s] * mass[-1], side", "(1 - u[s]) * mass[-1], side"),
    "the token that only reaches u": ("4.5 sampling", 'side="right"), len', 'side="left"), len'),
    "sampling in float32": ("4.5 sampling",
        "(logits[ids].astype(np.float64) - logits[ids[0]]) / temperature",
        "(logits[ids] - logits[ids[0]]) / np.float32(temperature)"),
    "one token too few of top-p": ("4.5 sampling", "< top_p - 1e-12).sum()))", "< top_p - 1e-12).sum()) - 1)"),
    "one u for all": ("4.5 sampling", "u[s] * mass[-1], side", "u[0] * mass[-1], side"),
    "the lower id last": ("4.5 sampling",
        'np.argsort(-logits, kind="stable")', 'np.argsort(logits, kind="stable")[::-1]'),

    # Attention alone, and pages.
    "slots before pages": ("4.7 pages",
        "pages, heads = table[slots // page_size][:, None]", "pages, heads = table[slots % len(table)][:, None]"),
    "pages in ascending order": ("4.7 pages", 'np.array(each["table"])', 'np.sort(each["table"])'),
    "pages read as they lie": ("4.7 pages", "x[layer][table].swapaxes", "x[layer][np.sort(table)].swapaxes"),
    "the length in whole pages": (("4.7 pages", "4.7 attention alone"),
        "end, outs, chosen = start + queries.shape[2], [], []",
        "end, outs, chosen = start + queries.shape[2], [], []\n"
        "        length = len(table) * page_size\n"
        "        end = end if page_size > 32 or not each['is_dense'] else min(length, end + 1)"),
    "one pool for all layers": (("4.7 attention alone", "4.7 pages", "law 2 online = rebuilt"),
        "pool[layer][pages, heads, slots[:, None] % page_size] = each[name][layer].swapaxes(0, 1)\n"
        "            keys, values = (x[layer][table]",
        "pool[0][pages, heads, slots[:, None] % page_size] = each[name][layer].swapaxes(0, 1)\n"
        "            keys, values = (x[0][table]"),
    "T tokens in a sparse step": (("4.2 sparse step", "4.7 attention alone"),
        "chosen[-1], [end], b)[0][:, None])", "chosen[-1], [end - 1], b)[0][:, None])"),
    "pages of the first sequence": ("4.7 pages",
        'np.array(each["table"])', 'np.array(each["table"] if each["start"] else passes[0]["table"])'),
    "an entry of the table too many": ("4.7 pages", 'np.array(each["table"])', 'np.roll(each["table"], 1)'),
    "every step dense": (("4.7 attention alone", "4.4 schedules", "4.2 sparse step"),
        'if each["is_dense"]:', "if True:"),
}  # fmt: skip
OF_BATCHES = {
    # Batches: requests that join, stop and go on.
    "one w for the batch": (ALONE, STEPS,
        "model.window = max(each[0].window for each in running.values()) if tokens else 0\n            " + STEPS),
    "a prefill clears the w of all": (ALONE, JOINS,
        JOINS + "\n                for other, *_ in running.values():\n                    other.window = 0"),
    "the w that a slot had before": (ALONE, STEPS,
        STEPS + "\n            if not tokens and ended and request['resumes'] is None:\n"
        "                model.window = [*ended.values()][-1][0].window"),
    "all rectified when one is": (ALONE, STEPS,
        STEPS + "\n            for other, told, *_ in running.values() if tokens and not model.window else ():\n"
        "                start = other.length - other.window\n"
        "                _ = other.window and other.dense_pass(told[start : other.length], start)"),
    "the batch's longest length": (ALONE, STEPS,
        STEPS + "\n            model.length = max(each[0].length for each in running.values())"),
    "steps after the end": (ALONE, "            del running[i]\n", ""),
    "N of the longest": (ALONE,
        "tokens += [token][: request[\"max_new_tokens\"]]  # of no tokens there is the prefill alone\n"
        "            if len(tokens) < request[\"max_new_tokens\"]",
        "tokens += [token]\n            if len(tokens) < max(each[\"max_new_tokens\"] for each in requests)"),
    "stop tokens of all requests": (ALONE,
        'token not in request["stop_tokens"]', 'not any(token in each["stop_tokens"] for each in requests)'),
    "the cache that the next turn goes on with": (ALONE,
        '"keys": model.keys[:, :, : model.length].copy()', '"keys": model.keys[:, :, : model.length]'),
    "the turn that ended last resumed": ((ALONE, "4.8 resuming"),
        'ended.get(request["resumes"])', 'ended.get(max(ended) if request["resumes"] is not None else None)'),
    "stop tokens ignored": ("4.8 stop tokens", ' and token not in request["stop_tokens"]', ""),
    "the first stop token alone": ("4.8 stop tokens",
        'token not in request["stop_tokens"]', 'token not in request["stop_tokens"][:1]'),
    "a stop token fed": ("4.8 stop tokens",
        "            del running[i]\n",
        "            del running[i]\n            _ = token in request['stop_tokens'] and next(steps)\n"),
    "a stop token not returned": ("4.8 stop tokens",
        '[token][: request["max_new_tokens"]]',
        '[token][: request["max_new_tokens"] * (token not in request["stop_tokens"])]'),
    "a stop token in the prompt": ("4.8 stop tokens",
        'token not in request["stop_tokens"]', 'not {token, *request["prompt"]} & {*request["stop_tokens"]}'),
    "one token at least": ("4.5 end of generation",
        '[token][: request["max_new_tokens"]]', '[token][: max(1, request["max_new_tokens"])]'),
    "a drifted window left when resumed": ("4.8 resuming",
        "start = model.length - model.window  # 0", "start = model.length  # 0"),
    "the pending token lost": ("4.8 resuming", "fed + tokens[-1:]", "fed"),
    "the pending token of the turn before the last": ("4.8 resuming",
        "fed + tokens[-1:]",
        "fed + (tokens or (request['resumes'] is not None and results[request['resumes']]['tokens']) or [])[-1:]"),
    "the pending token twice": ("4.8 resuming", "fed + tokens[-1:]", "fed + 2 * tokens[-1:]"),
    "resumed without bounds": ("4.8 resuming", JOINS,
        JOINS + "\n                model.bounds[..., : model.length // config['block_size']] = math.nan"),
    "resumed without sketches": ("4.8 resuming", JOINS, JOINS + "\n                model.codes[:] = 0"),
    "a turn's tokens with those before": ("4.8 resuming",
        "generation(model, fed, config)\n            if", "generation(model, fed, config)\n"
        "                running[i][2].extend(fed[: -len(request['prompt']) or None] if model.length else [])\n"
        "            if"),
}  # fmt: skip

# Edits of tiled_port.py: where kernels go wrong.
LOAD = "tile[mask, : rows.shape[1]] = rows[offsets[mask]]"
ONLINE_Z, ONLINE_ACC = "z = z * kept + weights.sum(axis=1)", "acc = acc * kept[:, None] + weights @ value"
SPLIT_SIZE = "size = -(-n_slots // (TILE * N_SPLITS)) * TILE"
RANGES = "range(i * size, min((i + 1) * size, n_slots)) for i in range(N_SPLITS)]"
CLIPPED = "np.clip(indices, -1, -(-capacity // block_size)).astype(np.int32)"
PADDED_SCORES = """which = np.where(query >= 0, 1, 0)  # [width, 1]
    bound = bounds[which, np.where(is_channel, channels, 0)[:, None], np.where(valid, blocks, 0)]
    bound = np.where(is_channel[:, None] & valid, bound, F32(0))  # [width, BLOCKS]"""
APPENDS = "if start == self.length and end == start + 1:"
WIDTHS = ("2.4 eq. 2", "8 batches", "8 widths")
TILES = ("2.4 eq. 2", "2.5 eq. 2", "8 batches", "8 widths", "8 long contexts")
TILED = {
    # Channels that are padded to a power of two.
    "padded channels read": (WIDTHS,
        LOAD,
        "at = offsets[mask][:, None] * rows.shape[1] + np.arange(tile.shape[1])\n"
        "    tile[mask] = np.nan_to_num(rows.ravel()[np.minimum(at, rows.size - 1)])"),
    "the scale of padded channels": (WIDTHS,
        "scale = F32(keys.shape[1] ** -0.5)", "scale = F32(query.shape[1] ** -0.5)"),
    "64 channels at most": (WIDTHS, LOAD, "tile[mask, : min(64, rows.shape[1])] = rows[offsets[mask], :64]"),
    "the power of two below": (WIDTHS,
        LOAD, "n = 1 << rows.shape[1].bit_length() - 1\n    tile[mask, :n] = rows[offsets[mask], :n]"),
    "padded channels of scores read": (("2.2 eq. 4", "8 batches", "8 widths"),
        "query = np.where(is_channel, pooled[np.where(is_channel, channels, 0)], F32(0))[:, None]\n\n"
        "    # The bound whose product is the larger, channel by channel.\n    " + PADDED_SCORES,
        "query = pooled[np.minimum(channels, head_dim - 1)][:, None]\n"
        "    which = np.where(query >= 0, 1, 0)\n"
        "    bound = bounds[which, np.minimum(channels, head_dim - 1)[:, None], np.where(valid, blocks, 0)]"),
    "a rotation of padded channels": (("2.6 rotation", "8 batches", "8 widths"),
        "run, stride, channels = head_dim & -head_dim,", "run, stride, channels = width,"),
    "a mean over padded channels": (("2.6 code", "8 batches", "8 widths"),
        "/ F32(head_dim))", "/ F32(padded(head_dim)))"),
    "the scale of a padded query": (("2.7 estimate", "8 batches", "8 widths"),
        "F32(query.shape[1] ** -0.5) * np.where(is_lost", "F32(padded(query.shape[1]) ** -0.5) * np.where(is_lost"),
    "bits from padded channels": (("2.7 one bit", "2.7 estimate", "8 batches", "8 widths"),
        "bits = 8 * codes.shape[1] // query.shape[1]", "bits = max(1, 8 * codes.shape[1] // padded(query.shape[1]))"),

    # Tiles of tokens and the online softmax.
    "the last tile dropped": ("2.4 eq. 2",
        "range(slots.start, slots.stop, TILE)", "range(slots.start, slots.stop - TILE + 1, TILE)"),
    "the end of a split one late": ("2.4 eq. 2",
        "np.where(tile < slots.stop, token_of", "np.where(tile <= slots.stop, token_of"),
    "the end of a split one early": ("2.4 eq. 2",
        "np.where(tile < slots.stop, token_of", "np.where(tile < slots.stop - 1, token_of"),
    "the end of a split unmasked": ("2.4 eq. 2",
        "np.where(tile < slots.stop, token_of(np.minimum(tile, slots.stop - 1)), -1)",
        "token_of(np.minimum(tile, slots.stop - 1))"),
    "a tile that begins at its number": (TILES,
        "tile = first + np.arange(TILE)", "tile = slots.start + (first - slots.start) // TILE + np.arange(TILE)"),
    "z not rescaled": (TILES, ONLINE_Z, "z = z + weights.sum(axis=1)"),
    "acc not rescaled": (TILES, ONLINE_ACC, "acc = acc + weights @ value"),
    "rescaled the other way round": (TILES,
        "np.exp(logits - shift[:, None]), np.exp(m - shift)",
        "np.exp(logits - shift[:, None]), np.exp(np.where(m == -math.inf, m, shift - m))"),
    "the maximum of the tile alone": (TILES,
        "peak = np.maximum(m, logits.max(axis=1))\n        shift = np.where(peak == -math.inf, F32(0), peak)  #",
        "peak = logits.max(axis=1)\n        shift = np.where(peak == -math.inf, F32(0), peak)  #"),
    "m not kept": (TILES, ONLINE_ACC + "\n        m = peak", ONLINE_ACC),
    "a running maximum from 0": ("2.4 true masks",
        "m, z = np.full(len(query), -math.inf, F32), np.zeros(len(query), F32)\n    acc",
        "m, z = np.zeros(len(query), F32), np.zeros(len(query), F32)\n    acc"),
    "a running maximum from -1e9": ("2.4 true masks",
        "m, z = np.full(len(query), -math.inf, F32), np.zeros(len(query), F32)\n    acc",
        "m, z = np.full(len(query), -1e9, F32), np.zeros(len(query), F32)\n    acc"),
    "a tile that sees nothing": (("2.4 nothing visible", "2.4 padding"),
        "shift = np.where(peak == -math.inf, F32(0), peak)  #", "shift = peak  #"),
    "masks of -1e30": (("2.4 true masks", "2.4 nothing visible"),
        "np.where(seen, query @ key.T * scale, -math.inf)", "np.where(seen, query @ key.T * scale, F32(-1e30))"),
    "masks that multiply": ("2.4 eq. 2",
        "np.where(seen, query @ key.T * scale, -math.inf)", "query @ key.T * scale * seen"),
    "the maximum before the mask": ("law 5 inertness",
        "peak = np.maximum(m, logits.max(axis=1))\n        shift = np.where(peak == -math.inf, F32(0), peak)  #",
        "hidden = load(keys, np.arange(len(keys)), np.ones(len(keys), bool))\n"
        "        hidden = np.fmax.reduce(query @ hidden.T * scale, axis=1)\n"
        "        peak = np.fmax(np.maximum(m, logits.max(axis=1)), np.where(seen.any(axis=1), hidden, -math.inf))\n"
        "        shift = np.where(peak == -math.inf, F32(0), peak)  #"),
    "values of hidden tokens read": ("law 5 inertness",
        "key, value = (load(rows, tokens, seen.any(axis=0)) for rows in (keys, values))",
        "key, value = (load(rows, tokens, mask) for rows, mask in ((keys, seen.any(axis=0)), (values, tokens "
        "< len(keys))))"),
    "weights in half precision": ("2.4 eq. 2", "+ weights @ value", "+ weights.astype(np.float16).astype(F32) @ value"),
    "weights in bfloat16": ("2.4 eq. 2",
        "+ weights @ value", "+ (weights.view(np.uint32) >> 16 << 16).view(F32) @ value"),
    "TF32 in products": ("2.4 eq. 2",
        "query @ key.T * scale", "(query.view(np.uint32) >> 13 << 13).view(F32) @ key.T * scale"),
    "acc in half precision": ("2.4 eq. 2",
        ONLINE_ACC, ONLINE_ACC.replace("acc = ", "acc = (") + ").astype(np.float16)"),
    "z in half precision": (("2.4 eq. 2", "2.4 log-sum-exp"),
        ONLINE_Z, "z = (z * kept + weights.sum(axis=1)).astype(np.float16)"),
    "base two in half of it": (TILES,
        "np.exp(logits - shift[:, None]), np.exp(m - shift)",
        "np.exp2((logits - shift[:, None]) * F32(1.442695)), np.exp2(m - shift)"),
    "exp2 without log2 e": ("2.4 eq. 2",
        "np.exp(logits - shift[:, None]), np.exp(m - shift)", "np.exp2(logits - shift[:, None]), np.exp2(m - shift)"),

    # Splits and their merging.
    "the remainder after whole splits dropped": (TILES, SPLIT_SIZE, "size = n_slots // N_SPLITS"),
    "the remainder after whole tiles dropped": (TILES,
        SPLIT_SIZE, "size = max(1, n_slots // (TILE * N_SPLITS)) * TILE"),
    "the last split left out": (TILES, "for slots in ranges])", "for slots in ranges[: N_SPLITS - 1]])"),
    "splits that overlap": ("2.4 eq. 2", RANGES, RANGES.replace("(i + 1) * size,", "(i + 1) * size + 1,")),
    "splits of 16,384 tokens at most": ("8 long contexts",
        SPLIT_SIZE, "size = min(-(-n_slots // (TILE * N_SPLITS)) * TILE, 16384)"),
    "no maximum in the merge": ("2.4 large logits",
        "weights = np.exp(m - np.where(peak == -math.inf, F32(0), peak))  # [splits, R]",
        "weights = np.exp(m)\n    peak = F32(0)"),
    "empty splits poison the merge": (("2.4 nothing visible", "2.4 padding"),
        "np.exp(m - np.where(peak == -math.inf, F32(0), peak))", "np.exp(m - peak)"),
    "splits not weighted": (TILES, "out = (acc * weights[..., None]).sum(axis=0) /", "out = acc.sum(axis=0) /"),
    "splits averaged": (TILES,
        "out = (acc * weights[..., None]).sum(axis=0) / np.where(total > 0, total, F32(1))[:, None]",
        "out = (acc / np.where(z > 0, z, F32(1))[..., None]).mean(axis=0)"),
    "normalised before the merge": (TILES,
        "out = (acc * weights[..., None]).sum(axis=0) / np.where(total > 0, total, F32(1))[:, None]",
        "share = weights / np.where(z > 0, z, F32(1))\n    out = (acc * share[..., None]).sum(axis=0)"),
    "the merge by maxima alone": (TILES, "total = (z * weights).sum(axis=0)", "total = (z[:1] * weights).sum(axis=0)"),
    "the log-sum-exp of the loudest split": (("2.4 log-sum-exp", "law 4 partition", *TILES),
        "return out, peak + np.log(total)", "return out, (m + np.log(np.where(z > 0, z, F32(1)))).max(axis=0)"),
    "0 / 0 for nothing": ("2.4 nothing visible", "np.where(total > 0, total, F32(1))[:, None]", "total[:, None]"),
    "a maximum from 0 in the merge": ("2.4 true masks", "peak = m.max(axis=0)", "peak = m.max(axis=0, initial=0)"),

    "splits merged in any order": ("5 second run",
        "out, lse = _merged([", "np.random.default_rng().shuffle(ranges)\n    out, lse = _merged(["),

    # Indices, lengths, groups.
    "an index that wraps": ("2.4 past the end", CLIPPED, "indices.astype(np.int32)"),
    "an index clipped to the last block": ("2.4 past the end",
        CLIPPED, "np.clip(indices, -1, -(-capacity // block_size) - 1).astype(np.int32)"),
    "-1 clipped to 0": ("2.4 padding", CLIPPED, "np.clip(indices, 0, -(-capacity // block_size)).astype(np.int32)"),
    "the selection of one KV head": ("2.4 group order", "row=indices[s, h], length", "row=indices[s, 0], length"),
    "the selection of one sequence": (("2.4 eq. 2", "2.4 group order"),
        "row=indices[s, h], length", "row=indices[0, h], length"),
    "the keys of one KV head": (("2.4 group order", "2.4 eq. 2"),
        "each = attend(query[s, rows], keys[s, h], values[s, h], n_slots, token_of",
        "each = attend(query[s, rows], keys[s, 0], values[s, 0], n_slots, token_of"),
    "groups of 4 at most": (("2.4 group order", "8 batches"),
        "rows, position = slice(h * group, (h + 1) * group), np.full(group, lengths[s] - 1)",
        "rows, position = slice(h * group, h * group + min(group, 4)), np.full(min(group, 4), lengths[s] - 1)"),
    "tokens in 16 bits": ("8 long contexts",
        "tokens <= position[:, None])  # [R, TILE]",
        "tokens <= position[:, None])\n        tokens = tokens.astype(np.uint16).astype(np.int64)"),
    "65,536 slots at most": ("8 long contexts",
        "query = load(query, np.arange(len(query)), position >= 0)",
        "query, n_slots = load(query, np.arange(len(query)), position >= 0), min(n_slots, 2**16)"),
    "a block index in 8 bits": ("8 long contexts",
        "block = row[slots // block_size]\n",
        "block = row[slots // block_size]\n"
        "            block = np.where((block >= 0) & (block < 2**14), block & 0xFF, block)\n"),

    # Windows.
    "the last rows of a window dropped": ("2.5 eq. 2",
        "n_tiles = heads // kv_heads, -(-n_queries // ROWS)", "n_tiles = heads // kv_heads, n_queries // ROWS"),
    "causal by a tile's first row": ("2.5 causality",
        "n_slots = max(0, int(position.max()) + 1)", "n_slots = max(0, int(position[0]) + 1)"),
    "a row's number within its tile": (("2.5 causality", "2.5 positions"),
        "lengths[s] - windows[s] + i, -1)", "lengths[s] - windows[s] + i % ROWS, -1)"),
    "positions by head": (("2.5 causality", "2.5 group order"),
        "np.tile(position, group)", "np.repeat(position, group)"),
    "windows at the end of the slots": ("2.5 positions",
        "np.where(i < windows[s], lengths[s] - windows[s] + i, -1)",
        "np.where(i < windows[s], keys.shape[2] - windows[s] + i, -1)"),
    "rows past the window seen": (("2.5 rows that mean nothing", "law 5 inertness"),
        "np.where(i < windows[s], lengths[s] - windows[s] + i, -1)",
        "np.minimum(lengths[s] - windows[s] + i, keys.shape[2] - 1)"),
    "the first window's length": ("2.5 positions",
        "lengths[s] - windows[s] + i, -1)", "lengths[s] - windows[0] + i, -1)"),
    "the last row of a window twice": (("2.5 causality", "2.5 eq. 2"),
        "min((tile + 1) * ROWS, n_queries))\n        position",
        "min((tile + 1) * ROWS, n_queries))\n        i[-1] = max(i[-1] - 1, i[0])\n        position"),

    # Bounds and scores.
    "a token too many in a block's bounds": ("2.1 partial block",
        "valid = tokens < length\n    tile = keys",
        "valid = (tokens <= length) & (tokens < len(keys))\n    tile = keys"),
    "masked keys as zeros": ("2.1 partial block",
        "low = np.where(valid[:, None], tile, math.inf).min(axis=0)",
        "low = np.where(valid[:, None], tile, 0).min(axis=0, initial=math.inf)"),
    "hi from 0": ("2.1 eq. 3", ".max(axis=0)\n    return np.stack", ".max(axis=0, initial=0)\n    return np.stack"),
    "the last tile of blocks dropped": (("2.2 eq. 4", "8 batches", "8 widths", "8 long contexts"),
        "-(-n_blocks // BLOCKS)):\n        first = tile * BLOCKS",
        "n_blocks // BLOCKS or 1):\n        first = tile * BLOCKS"),
    "the other half of the bounds": ("2.2 eq. 4", "np.where(query >= 0, 1, 0)", "np.where(query >= 0, 0, 1)"),
    "half of the bounds by block": ("2.2 eq. 4",
        "which = np.where(query >= 0, 1, 0)", "which = np.where(query.sum() >= 0, 1, 0)"),
    "0 times infinity in tiles": ("2.2 zero times infinity",
        "products = np.where((query == 0) & np.isinf(bound), F32(0), query * bound)", "products = query * bound"),
    "0 times NaN in tiles": ("2.2 NaN bounds",
        "products = np.where((query == 0) & np.isinf(bound), F32(0), query * bound)",
        "products = np.where(query == 0, F32(0), query * bound)"),
    "blocks of the slots scored": (("2.2 past the end", "law 5 inertness"),
        "(blocks < n_blocks) & (blocks * block_size < length)", "blocks < n_blocks"),
    "a block past the end scored": (("2.2 past the end", "law 5 inertness"),
        "(blocks * block_size < length)", "(blocks * block_size <= length)"),
    "scores summed in half precision": ("2.2 eq. 4",
        "products.sum(axis=0, dtype=F32)", "products.sum(axis=0, dtype=np.float16)"),
    "4,096 blocks at most": ("8 long contexts",
        "-(-n_blocks // BLOCKS)):\n        first = tile * BLOCKS",
        "min(1024, -(-n_blocks // BLOCKS))):\n        first = tile * BLOCKS"),

    # Selection by counting.
    "above the threshold alone": ("2.3 ties", "ordered >= higher", "ordered > higher"),
    "16 of 32 bits searched": ("2.3 order of scores", "range(31, -1, -1)", "range(31, 15, -1)"),
    "the sign not searched": ("2.3 eq. 5", "range(31, -1, -1)", "range(30, -1, -1)"),
    "negative scores in the wrong order": (("2.3 eq. 5", "2.3 order of scores"),
        "np.where(bits >> 31, ~bits,", "np.where(bits >> 31, bits ^ np.uint32(2**31),"),
    "zeros apart": ("2.3 ties", "scores.astype(F32) + F32(0)).view", "scores.astype(F32)).view"),
    "NaN as the largest integer": ("2.3 order of scores",
        "np.where(np.isnan(scores), np.uint32(0), ordered)", "ordered"),
    "all ties taken": ("2.3 ties", "above | (equal & is_first) |", "above | equal |"),
    "the last of ties": ("2.3 ties", "np.cumsum(equal) <=", "np.cumsum(equal[::-1])[::-1] <="),
    "the newest among the candidates": ("2.3 local blocks",
        "is_other, wanted = index < oldest_local,", "is_other, wanted = index < total,"),
    "one more than asked for": ("2.3 count", "counts = [min(n, max(", "counts = [min(n, 1 + max("),
    "candidates of the capacity": (("2.3 past the end", "2.3 padding"),
        "index, oldest_local = np.arange(total), max(0, total - n_local)",
        "total = max(total, len(scores) * (total > 0))\n"
        "    index, oldest_local = np.arange(total), max(0, total - n_local)"),
    "counts that wrap": ("8 long contexts",
        "np.count_nonzero(is_other & (ordered >= higher)) >= wanted",
        "np.count_nonzero(is_other & (ordered >= higher)) % 4096 >= wanted"),
    "512 ties at most": (("2.3 ties", "8 long contexts"),
        "np.cumsum(equal) <= wanted", "np.cumsum(equal[:512].tolist() + [False] * len(equal[512:])) <= wanted"),

    # Sketches.
    "a signed hash": ("2.6 rotation",
        "hashed = (hashed ^ (hashed >> 15))", "hashed = (hashed ^ (hashed.view(np.int32) >> 15).view(np.uint32))"),
    "lanes that both add": ("2.6 rotation", "partner - tile, tile + partner", "tile + partner, tile + partner"),
    "lanes the wrong way round": ("2.6 rotation", "partner - tile, tile + partner", "tile - partner, tile + partner"),
    "the transform of a warp": (("2.6 rotation", "2.7 estimate", "8 batches", "8 widths", "8 long contexts"),
        "while stride < run:\n        partner", "while stride < min(run, 32):\n        partner"),
    "words from the highest byte": (("2.7 estimate", "2.6 packing"), 'view("<u4")', 'view(">u4")'),
    "whole words alone": (("2.7 one bit", "2.7 estimate", "8 batches", "8 widths"),
        "-(-codes.shape[1] // 4) * 4), np.uint8)\n    words[:, : codes.shape[1]] = codes",
        "-(-codes.shape[1] // 4) * 4), np.uint8)\n"
        "    whole = codes.shape[1] // 4 * 4\n"
        "    words[:, :whole] = codes[:, :whole]"),
    "two bits of every code": ("2.7 one bit", "& (2**bits - 1)).astype(F32)", "& 3).astype(F32)"),
    "halves of one bit": ("2.7 one bit",
        "tile[:, :head_dim] = 2 * levels - 1 if", "tile[:, :head_dim] = levels - F32(0.5) if"),
    "the bit of another word": (("2.7 estimate", "8 batches", "8 widths", "8 long contexts"),
        "words[:, bit // 32]", "words[:, bit // 32 % 4]"),
    "masses not rescaled": (("2.7 estimate", "8 batches", "8 widths", "8 long contexts"),
        "z, m = z * np.exp(m - shift) +", "z, m = z +"),
    "whole blocks of sketches alone": (("2.7 partial block", "8 batches", "8 widths", "8 long contexts"),
        "firsts = range(0, -(-int(length) // block_size), BLOCKS)",
        "firsts = range(0, max(1, int(length) // block_size) * (length > 0), BLOCKS)"),
    "masses of hidden tokens": ("2.7 partial block",
        "np.where(valid & ~is_lost, logits, -math.inf), is_lost", "np.where(~is_lost, logits, -math.inf), is_lost"),
    "masses of the tile's maximum": (("2.7 estimate", "8 batches", "8 widths", "8 long contexts"),
        "mass = (np.exp(logits - shift[:, None]) / z[:, None])",
        "mass = (np.exp(logits - logits.max(axis=1, keepdims=True)) / z[:, None])"),
    "masses by block": (("2.7 equal blocks", "2.7 estimate"),
        "mass).reshape(BLOCKS, block_size).sum(axis=1)",
        "mass).reshape(BLOCKS, block_size)\n"
        "        mass = np.where((first + np.arange(BLOCKS)) % 2, mass[:, ::-1].cumsum(axis=1)[:, -1], "
        "mass.cumsum(axis=1)[:, -1])"),
    "lost tokens as nothing": ("2.7 NaN scales",
        "np.where(is_lost, F32(math.nan), mass).reshape", "np.where(is_lost, F32(0), mass).reshape"),
    "a lost token spoils the tile": ("2.7 NaN scales",
        "mass = np.where(is_lost, F32(math.nan), mass).reshape(BLOCKS, block_size)",
        "mass = (mass + (F32(math.nan) if is_lost.any() else 0)).reshape(BLOCKS, block_size)"),
    "estimates in half precision": (("2.7 estimate", "2.7 mass"),
        "logits = rotated(query) @ code.T", "logits = rotated(query).astype(np.float16).astype(F32) @ code.T"),
    "65,536 sketches at most": ("8 long contexts",
        "range(0, -(-int(length) // block_size), BLOCKS)",
        "range(0, -(-min(2**16, int(length)) // block_size), BLOCKS)"),

    # Decoding.
    "bounds extended by every pass": ("law 2 online = rebuilt",
        "self.bounds[layer, h, :, :, i] = _bounds(self.keys[layer, h], i * b, end, b)",
        "new = _bounds(self.keys[layer, h], i * b, end, b)\n"
        "                np.minimum(self.bounds[layer, h, 0, :, i], new[0], out=self.bounds[layer, h, 0, :, i])\n"
        "                np.maximum(self.bounds[layer, h, 1, :, i], new[1], out=self.bounds[layer, h, 1, :, i])"),
    "a window of one token appended": ("law 2 online = rebuilt", APPENDS, "if end == start + 1:"),
    "lo alone extended": ("law 2 online = rebuilt", "            np.maximum(high, key[:, 0], out=high)\n", ""),
    "extended in the next block": ("law 2 online = rebuilt",
        "self.bounds[layer, :, 0, :, start // b], self.bounds[layer, :, 1, :, start // b]",
        "self.bounds[layer, :, 0, :, (start + 1) // b], self.bounds[layer, :, 1, :, start // b]"),
    "bounds of whole blocks": ("law 2 online = rebuilt",
        "_bounds(self.keys[layer, h], i * b, end, b)",
        "_bounds(self.keys[layer, h], i * b, min((i + 1) * b, self.keys.shape[2]), b)"),
    "the last block touched not rebuilt": ("law 2 online = rebuilt",
        "for i in range(start // b, -(-end // b)):  #",
        "for i in range(start // b, max(start // b + 1, end // b)):  #"),
    "rebuilt from the block after the start": ("law 2 online = rebuilt",
        "for i in range(start // b, -(-end // b)):  #", "for i in range(-(-start // b), -(-end // b)):  #"),
    "one KV head rebuilt": ("law 2 online = rebuilt",
        "for h in range(len(key)):", "for h in range(len(key) if not start else 1):"),
    "bounds of the first layer for all": ("4.2 sparse step",
        "score_blocks(query, self.bounds[layer][None]", "score_blocks(query, self.bounds[0][None]"),
    "T tokens attended": ("4.2 sparse step",
        "return sparse_attention(query, keys, values, chosen[-1], lengths, b)",
        "return sparse_attention(query, keys, values, chosen[-1], [self.length], b)"),
    "a table without the last position": (("3 model", "4.2 pending token", "4.3 positions"),
        "cos, sin = self.cos[start : start + n], self.sin[start : start + n]",
        "at = np.minimum(np.arange(start, start + n), len(self.cos) - 3 if n == 1 else len(self.cos))\n"
        "        cos, sin = self.cos[at], self.sin[at]"),
    "a window's positions one late": ("4.3 positions",
        "cos, sin = self.cos[start : start + n], self.sin[start : start + n]",
        "at = start + (0 < start < self.length)\n        cos, sin = self.cos[at : at + n], self.sin[at : at + n]"),
    "a window's positions from zero": ("4.3 positions",
        "cos, sin = self.cos[start : start + n], self.sin[start : start + n]",
        "at = 0 if start < self.length else start\n        cos, sin = self.cos[at : at + n], self.sin[at : at + n]"),
    "a window written a slot late": ("4.3 positions",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "late = int(0 < start < self.length and end < self.keys.shape[2])\n"
        "        at = slice(start + late, end + late)\n"
        "        self.keys[layer, :, at], self.values[layer, :, at] = key, value"),
    "a window's keys written a slot early": (("4.3 positions", "law 7 bounded drift"),
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "early = int(0 < start < self.length)\n"
        "        self.keys[layer, :, start - early : end - early], self.values[layer, :, start:end] = key, value"),
    "a window's rows in another order": ("4.3 positions",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "step = -1 if 0 < start < self.length else 1\n"
        "        self.keys[layer, :, start:end], self.values[layer, :, start:end] = key[:, ::step], value[:, "
        "::step]"),
    "a window's values alone rewritten": ("law 6 rectification is exact",
        "self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value",
        "self.values[layer, :, start:end] = value\n"
        "        n = max(self.length - start, 0) if start else 0\n"
        "        self.keys[layer, :, start + n : end] = key[:, n:]"),
    "the newest token of a window left out": (("4.3 window", "law 6 rectification is exact"),
        "decoder.dense_pass(fed[start:], start)  #",
        "decoder.dense_pass(fed[start:-1] or fed[start:], start)\n            decoder.length = len(fed)  #"),
    "sums by block": (("2.2 equal blocks", "2.3 ties", "2.2 eq. 4"),
        "products.sum(axis=0, dtype=F32)",
        "np.where(blocks % 2, products[::-1].cumsum(axis=0, dtype=F32)[-1], products.cumsum(axis=0, dtype=F32)[-1])"),
    "the norm's epsilon outside the root": ("3 model",
        "np.sqrt((x * x).mean(axis=-1, keepdims=True) + F32(eps))",
        "(np.sqrt((x * x).mean(axis=-1, keepdims=True)) + F32(eps))"),
    "a norm in half precision": ("3 model",
        "(x * x).mean(axis=-1, keepdims=True)", "(x * x).astype(np.float16).astype(F32).mean(axis=-1, keepdims=True)"),
    "angles in half precision": ("3 model",
        "angles = np.outer(np.arange(capacity), powers)",
        "angles = np.outer(np.arange(capacity), powers).astype(np.float16).astype(np.float64)"),
    "the newest 8 tokens of a window": (("law 6 rectification is exact", "4.3 window"),
        "decoder.dense_pass(fed[start:], start)  #",
        "start = max(start, len(fed) - 8)\n            decoder.dense_pass(fed[start:], start)  #"),
    "a window that begins one late": (("law 6 rectification is exact", "4.3 window"),
        "start = None, decoder.length - decoder.window", "start = None, decoder.length - max(0, decoder.window - 1)"),
    "rectified below the interval alone": ("4.4 schedules",
        "decoder.window + 1 >= interval", "decoder.window + 1 > interval"),
    "the interval counts prompt tokens": ("4.4 schedules",
        "decoder.window + 1 >= interval", "(decoder.length + 1) % interval == 0"),
    "the next window begins one early": (("4.3 window", "4.4 schedules"),
        "self.length, self.window = end, 0", "self.length, self.window = end, int(start > 0)"),
    "entries without copies": (THE_TRACE,
        'self.length].copy() for name in ("keys", "values")', 'self.length] for name in ("keys", "values")'),
}  # fmt: skip
NUMPY = FIRST | MORE | OF_BATCHES
MISTAKES = {"numpy_port.py": NUMPY, "tiled_port.py": TILED}

# Name: the port, what stands there, what may stand there instead.
SORTED_BLOCKS = "best = sorted(range(oldest_local), key=rank)[: count - (total - oldest_local)]"
ATTENDS_TO = "attend(query[s, heads], keys[s, h, tokens], values[s, h, tokens])"
MODEL = f"# ---- 3 The model {'-' * 101}\n"
EQUIVALENTS = {
    "sums the other way round": ("numpy_port.py",
        "return weights @ values.astype(np.float64) / total",
        "return weights[:, ::-1] @ values[::-1].astype(np.float64) / total"),
    "normalised before the sum": ("numpy_port.py",
        "return weights @ values.astype(np.float64) / total", "return weights / total @ values.astype(np.float64)"),
    "tokens in the order of the indices backwards": ("numpy_port.py",
        "[int(i) for i in indices[s, h] if i >= 0]", "[int(i) for i in indices[s, h][::-1] if i >= 0]"),
    "exp2 with log2 e folded in": ("numpy_port.py",
        "weights = np.exp(logits - largest)", "weights = np.exp2((logits - largest) * 1.4426950408889634)"),
    "the query scaled first": ("numpy_port.py",
        "query.astype(np.float64) @ keys.astype(np.float64).T * query.shape[1] ** -0.5",
        "(query.astype(np.float64) * query.shape[1] ** -0.5) @ keys.astype(np.float64).T"),
    "hidden tokens masked by where": ("numpy_port.py",
        ATTENDS_TO,
        "masked(query[s, heads], keys[s, h], values[s, h], np.isin(np.arange(keys.shape[2]), tokens))\n"
        "    return (out, lse) if return_lse else out\n"
        "\n"
        "\n"
        "def masked(query, keys, values, seen):\n"
        "    keys, values = np.where(seen[:, None], keys, 0), np.where(seen[:, None], values, 0)\n"
        "    logits = np.where(seen, query.astype(np.float64) @ keys.T.astype(np.float64) * query.shape[1] "
        "** -0.5, -math.inf)\n"
        "    weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=np.finfo(np.float64).min))\n"
        "    total = weights.sum(axis=1, keepdims=True)\n"
        "    lse = np.log(total) + logits.max(axis=1, keepdims=True)\n"
        "    return weights @ values.astype(np.float64) / np.where(total > 0, total, 1), lse[:, 0]\n"
        "\n"
        "\n"
        "def nothing(out, lse, return_lse):"),
    "keys repeated for every head": ("numpy_port.py",
        "seen = keys[s, h // group, :end], values[s, h // group, :end]",
        "seen = (np.repeat(x[s], group, axis=0)[h, :end] for x in (keys, values))"),
    "half of the bounds": ("numpy_port.py",
        "np.maximum(pooled * bounds[:, :, 0], pooled * bounds[:, :, 1])",
        "pooled * np.where(pooled >= 0, bounds[:, :, 1], bounds[:, :, 0])"),
    "fmax for maximum": ("numpy_port.py", "products = np.maximum(", "products = np.fmax("),
    "a stable sort": ("numpy_port.py",
        SORTED_BLOCKS,
        "score = scores[s, h, :oldest_local] + 0.0\n"
        "            best = np.lexsort((-np.nan_to_num(score, nan=0.0, posinf=math.inf, neginf=-math.inf), "
        "np.isnan(score)))\n"
        "            best = best[: count - (total - oldest_local)].tolist()"),
    "a partition, ties by a count": ("numpy_port.py",
        SORTED_BLOCKS,
        "n, keys = count - (total - oldest_local), [rank(i) for i in range(oldest_local)]\n"
        "            best = [i for i in range(oldest_local) if sum(key < keys[i] for key in keys) < n]"),
    "64-bit indices": ("numpy_port.py", "-1, np.int32)", "-1, np.int64)"),
    "longer lists of indices": ("numpy_port.py",
        "(*scores.shape[:2], max(counts)), -1", "(*scores.shape[:2], max(counts) + 3), -1"),
    "lists for arrays": ("numpy_port.py",
        MODEL,
        "def listed(operation):\n    def call(*arguments, **options):\n"
        "        result = operation(*arguments, **options)\n"
        "        return result.tolist() if isinstance(result, np.ndarray) else result\n\n    return call\n\n\n"
        "score_for_all = score_blocks\n\n\n"
        "def score_blocks(query, bounds, lengths, block_size):\n"
        "    return np.array(score_for_all(query, bounds, lengths, block_size).tolist())\n\n\n" + MODEL),
    "the reciprocal of the root": ("numpy_port.py",
        "return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight",
        "return x * ((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + eps) ** -0.5 * weight"),
    "SiLU by tanh": ("numpy_port.py", "gate / (1 + np.exp(-gate)) * up", "gate / 2 * (1 + np.tanh(gate / 2)) * up"),
    "angles in float32": ("numpy_port.py",
        "angles = np.outer(positions, theta ** (-2 * np.arange(half) / x.shape[-1]))",
        "angles = np.outer(positions, theta ** (-2 * np.arange(half) / x.shape[-1])).astype(np.float32)"),
    "tied where there are no output weights": ("numpy_port.py",
        'w["embed.weight" if shape["tied_embeddings"] else "output.weight"]',
        'w.get("output.weight", w["embed.weight"])'),
    "a cache in float32": ("numpy_port.py",
        "np.full(size, math.nan), np.full(size, math.nan)\n        n_blocks",
        "np.full(size, math.nan, np.float32), np.full(size, math.nan, np.float32)\n        n_blocks"),
    "activations in float32": ("numpy_port.py", "x = x + mixed", "x = x.astype(np.float32) + mixed"),
    "a larger capacity": ("numpy_port.py", "config, len(prompt) + n_tokens)", "config, len(prompt) + n_tokens + 41)"),
    "a prompt in chunks": ("numpy_port.py",
        PREFILL,
        "[model.dense_pass(fed[i : i + 5], i) for i in range(start, len(fed), 5)][-1], None, config"),
    "a prompt token by token": ("numpy_port.py",
        PREFILL, "[model.dense_pass(fed[i : i + 1], i) for i in range(start, len(fed))][-1], None, config"),
    "the window and the pending token in two passes": ("numpy_port.py",
        FUSED_PASS,
        "if model.window:\n"
        "                model.dense_pass(fed[start:-1], start)\n"
        "            logits, indices = model.dense_pass(fed[-1:], model.length), None"),
    "the window token by token": ("numpy_port.py",
        DENSE_PASS,
        "            for i, token in enumerate(fed[start:]):\n                model.dense_pass([token], start + i)"),
    "rectified twice": ("numpy_port.py", DENSE_PASS, DENSE_PASS + "\n" + DENSE_PASS),
    "the whole text encoded anew": ("numpy_port.py", DENSE_PASS, "            model.dense_pass(fed, 0)"),
    "bounds extended by appends": ("numpy_port.py",
        REBUILT,
        "if start == self.length and len(key[0]) == 1 and start % b:\n"
        "                block = np.concatenate((key, self.bounds[layer, :, :, :, i]), axis=1)\n"
        "            " + REBUILT),
    "all bounds rebuilt every time": ("numpy_port.py",
        BLOCKS_TOUCHED,
        "for i in range(math.ceil(max(end, self.length) / b)):\n            end = max(end, self.length)"),
    "all sketches rewritten every time": ("numpy_port.py",
        "codes, scales = sketch_keys(key[None], self.bits)",
        "codes, scales = sketch_keys(self.keys[layer, None, :, :end], self.bits)\n            start = 0"),
    "a scale of one bit by the mean": ("numpy_port.py",
        "scales = (rotated * code).sum(axis=-1) / (code**2).sum(axis=-1)",
        "scales = abs(rotated).mean(axis=-1) if bits == 1 else (rotated * code).sum(axis=-1) / "
        "(code**2).sum(axis=-1)"),
    "a transform by its matrix": ("numpy_port.py",
        "run, stride = head_dim & -head_dim, 1",
        "run, stride = head_dim & -head_dim, head_dim\n"
        "    ones = np.array([[(i & j).bit_count() % 2 for j in range(run)] for i in range(run)])\n"
        "    x = (x.reshape(*x.shape[:-1], -1, run) @ (1.0 - 2 * ones)).reshape(x.shape)"),
    "indices in another order in the trace": ("numpy_port.py",
        '"indices": indices,', '"indices": None if indices is None else indices[..., ::-1],'),
    "no bounds in the trace": ("numpy_port.py", '"bounds": model.bounds.copy()', '"bounds": None'),
    "a trace that is generated": ("numpy_port.py", "    return trace\n", "    return iter(trace)\n"),
    "weights in 16 bits for values in 16 bits": ("numpy_port.py",
        "weights @ values.astype(np.float64) / total",
        "weights.astype(values.dtype if values.dtype == np.float16 else np.float64) @ "
        "values.astype(np.float64) / total"),
    "bounds of slots not yet written": ("numpy_port.py",
        "block_bounds(keys, [end], b), [end], b)", "block_bounds(np.nan_to_num(keys), [keys.shape[2]], b), [end], b)"),
    "all that is new joins at once": ("numpy_port.py",
        'request["arrival"] == step', '(request["arrival"] if request["resumes"] is not None else 0) == step'),
    "the last request first": ("numpy_port.py", "in enumerate(requests):", "in [*enumerate(requests)][::-1]:"),
    "a turn prefilled from the start": ("numpy_port.py",
        "start = model.length - model.window  # 0", "start = 0  # 0"),
    "one split": ("tiled_port.py", "N_SPLITS = 3 ", "N_SPLITS = 1 "),
    "seven splits": ("tiled_port.py", "N_SPLITS = 3 ", "N_SPLITS = 7 "),
    "tiles of 8": ("tiled_port.py", "TILE = 16 ", "TILE = 8 "),
    "tiles of 128": ("tiled_port.py", "TILE = 16 ", "TILE = 128 "),
    "one query a program": ("tiled_port.py", "ROWS = 4 ", "ROWS = 1 "),
    "sixteen blocks a program": ("tiled_port.py", "BLOCKS = 4 ", "BLOCKS = 16 "),
    "splits that are no whole tiles": ("tiled_port.py", SPLIT_SIZE, "size = -(-n_slots // N_SPLITS)"),
    "sums in float64": ("tiled_port.py",
        "acc = np.zeros(query.shape, F32)", "acc, z = np.zeros(query.shape), z.astype(np.float64)"),
    "splits merged by log-sum-exp": ("tiled_port.py",
        "    out = (acc * weights[..., None]).sum(axis=0) / np.where(total > 0, total, F32(1))[:, None]\n"
        "    return out, peak + np.log(total)",
        "    lse, each = peak + np.log(total), m + np.log(z)\n"
        "    share = np.exp(each - np.where(lse == -math.inf, F32(0), lse)) / np.where(z > 0, z, F32(1))\n"
        "    return (acc * share[..., None]).sum(axis=0), lse"),
    "padded channels of codes": ("tiled_port.py",
        "tile = np.zeros((len(codes), channels), F32)", "tile = np.full((len(codes), channels), F32(-1.5))"),
    "signed words": ("tiled_port.py", 'view("<u4")', 'view("<i4")'),
    "lengths checked once": ("tiled_port.py", "(block >= 0) & (token < length), token, -1)", "block >= 0, token, -1)"),
    "negative tokens as masks": ("tiled_port.py",
        "np.where((block >= 0) & (token < length), token, -1)", "np.where(token < length, token, -1)"),
    "a token more encoded anew": ("tiled_port.py",
        "start = None, decoder.length - decoder.window", "start = None, max(0, decoder.length - decoder.window - 1)"),
    "rows that mean nothing loaded": ("tiled_port.py",
        "np.arange(len(query)), position >= 0)", "np.arange(len(query)), position >= -1)"),
    "bounds never extended": ("tiled_port.py", APPENDS, "if False:"),
}  # fmt: skip

# Words that would be false of a mistake, whatever its law: it counts as told wrongly if they are in the report.
FALSE = {
    "window without its last token": "encoded anew",
    "bounds of keys before RoPE": "not extended",
    "sketches of keys before RoPE": "every append and every rectification",
    "written a slot late": "sparse steps wrote",
    "written a slot late, fused": "sparse steps wrote",
    "keys alone written a slot late": "sparse steps wrote",
    "a window's positions one late": "sparse steps wrote",
    "a window's positions from zero": "sparse steps wrote",
    "a window written a slot late": "sparse steps wrote",
    "a window's rows in another order": "sparse steps wrote",
    "the newest token of a window left out": "encoded anew",
    "one KV head alone rewritten": "encoded anew",
}


@dataclass(frozen=True)
class Some:
    """Some cases of the vectors. What is drawn from a formula is drawn once."""

    vectors: object
    chosen: list
    drawn: dict

    def entries(self):
        return self.chosen

    def arrays(self, entry):
        name = entry["operation"], entry["case"]
        if name not in self.drawn:
            self.drawn[name] = self.vectors.arrays(entry)
        return self.drawn[name]

    def __getattr__(self, name):
        return getattr(self.vectors, name)


def stages(vectors):
    """Order the cases: operations, generations one by one and what else there is, then long contexts."""
    drawn, operations, others, long = {}, [], [], []
    for entry in vectors.entries():
        is_operation = entry["operation"] in NAMES
        (long if entry.get("grade") == "long" else operations if is_operation else others).append(entry)
    for entry in [*operations, *long]:
        drawn[entry["operation"], entry["case"]] = vectors.arrays(entry)
    return [Some(vectors, some, drawn) for some in (operations, *([entry] for entry in others), long)]


def edited(source, old, new, name="edited"):
    """Make a module of a port with one edit. ValueError unless `old` stands there exactly once."""
    count = source.count(old)
    if count != 1:
        raise ValueError(f"{name}: the text to replace stands there {count} times: {old!r}")
    module = ModuleType(name)
    exec(compile(source.replace(old, new), name, "exec"), module.__dict__)
    return module


def verdict(port, parts):
    """Judge a port: the law and the words of what is to be mended first, or None for a port that conforms."""
    rows = []
    for part in parts:
        rows += check_port(port, part)
        failures = first_failures(rows)
        if failures and failures[0].law != THE_TRACE:
            break
    failures = first_failures(rows)
    return (failures[0].law, failures[0].says) if failures else None


def judge(sender, path, old, new, parts):
    """Send the verdict on one edit, in a process of its own. What a port prints is dropped."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        sender.send(verdict(edited(path.read_text(), old, new), parts))
    except BaseException as error:  # whatever the module raises when it is made
        sender.send(("no verdict", f"{type(error).__name__}: {error}"))


def judged(file, old, new, parts):
    """Judge one edit within the time limit → the law and the words, or None."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=judge, args=(sender, PORTS[file], old, new, parts))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT_S) else ("no end", f"not done after {LIMIT_S} s")
    except EOFError:
        return "no verdict", "the process died"
    finally:
        child.kill()
        child.join()


def main(words=()):
    """Judge everything, or what holds one of the words → the exit status."""
    start, vectors = time.monotonic(), load_vectors()
    sources = {name: path.read_text() for name, path in PORTS.items()}
    mistakes = [(file, name, *edit) for file, edits in MISTAKES.items() for name, edit in edits.items()]
    equivalents = [(file, name, old, new) for name, (file, old, new) in EQUIVALENTS.items()]
    chosen, equal = (
        [each for each in some if not words or any(word in f"{each[0]}: {each[1]}" for word in words)]
        for some in (mistakes, equivalents)
    )
    for file, name, *_, old, new in chosen + equal:  # before anything is run
        edited(sources[file], old, new, f"{file}: {name}")
    parts = stages(vectors)

    # Judge one after another.
    accepted, told_wrong, refused, n_told = [], [], [], 0
    for file, name, laws, old, new in chosen:
        found, expected = judged(file, old, new, parts), (laws,) if isinstance(laws, str) else laws
        law, says = found or ("accepted", "")
        false = FALSE.get(name, "no such words")
        if found is None:
            accepted.append(f"{file}: {name} (should be told {' or '.join(expected)})")
        elif law in expected and false not in says:
            n_told += 1
        else:
            but = f", but not {false!r}" if false in says else ""
            told_wrong.append(f"{file}: {name}\n    expected {' or '.join(expected)}{but}\n    told     {law}: {says}")
        print(f"{'ok' if law in expected and false not in says else '!!'}  {file}: {name}: {law}", flush=True)
    for file, name, old, new in equal:
        found = judged(file, old, new, parts)
        if found:
            refused.append(f"{file}: {name}\n    told {found[0]}: {found[1]}")
        print(f"{'!!' if found else 'ok'}  {file}: {name}: {found[0] if found else 'equivalent'}", flush=True)

    # What there is to do, and the score.
    lists = {"Accepted": accepted, "Told another law": told_wrong, "Equivalents rejected": refused}
    for title, lines in lists.items():
        if lines:
            print("\n".join(["", f"{title}:", *(f"  {line}" for line in lines)]))
    n, n_rejected = len(chosen), len(chosen) - len(accepted)
    print(
        f"\n{time.monotonic() - start:.0f} s\nversion {vectors.manifest['version']}: {n_rejected} of {n} rejected,"
        f" {n_told} under the right law, {len(refused)} of {len(equal)} equivalents rejected"
    )
    is_good = n_rejected >= TARGETS["rejected"] * n and n_told >= TARGETS["told"] * n and not refused
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
