"""Mistakes seeded one at a time into a copy of the project: the suite must catch every one of them.

    python tests/mutants.py [--jobs 2] [WORD …]    # all, or those whose file or description holds a WORD

Each line changes one piece of a file and names the tests that must then fail. A copy is made in a temporary folder, so
the working tree stays as it is. Exit status 1 if any mistake goes unnoticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OPERATIONS, DECODING, CONTRACT = "tests/operations", "tests/decoding", "tests/contract"
SKETCHES = "tests/operations/test_sketch.py"
MERGING = "tests/operations/test_hopper.py"
DRAWING = "tests/operations/test_draw.py"


class Mistake(NamedTuple):
    """One seeded mistake."""

    what: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str = DECODING  # folder or file that must turn red


PATH = [
    # config: the rhythm.
    Mistake("fused pass one step late", "reference/config.py", "self.interval - 1 if", "self.interval if"),
    Mistake("paper pass one step early", "reference/config.py", "else self.interval\n", "else self.interval - 1\n"),
    Mistake("pass due only beyond the limit", "reference/config.py", "n_drifted >= self.drift_limit", "n_drifted > self.drift_limit"),
    Mistake("never rectifying rectifies", "reference/config.py", "            return None\n", "            return 64\n", CONTRACT),
    # blocks: bounds, scores, selection.
    Mistake("bounds count a key past the length", "reference/blocks.py", "valid = slots < lengths", "valid = slots <= lengths", OPERATIONS),
    Mistake("lo and hi swapped", "reference/blocks.py", "torch.stack((lo, hi)", "torch.stack((hi, lo)", OPERATIONS),
    Mistake("bounds drop the last partial block", "reference/blocks.py", "n_blocks = -(-keys.shape[2] // block_size)\n    padding", "n_blocks = keys.shape[2] // block_size\n    padding", OPERATIONS),
    Mistake("pooled by the sum", "reference/blocks.py", ".mean(dim=2)", ".sum(dim=2)", OPERATIONS),
    Mistake("query heads grouped across", "reference/blocks.py", "unflatten(1, (n_kv_head, -1)).mean(dim=2)", "unflatten(1, (-1, n_kv_head)).mean(dim=1)", OPERATIONS),
    Mistake("the smaller product", "reference/blocks.py", "torch.maximum(pooled", "torch.minimum(pooled", OPERATIONS),
    Mistake("0 times infinity is NaN", "reference/blocks.py", "if (pooled == 0).any():", "if False:", OPERATIONS),
    Mistake("scores past the end stay", "reference/blocks.py", "first_slot >= lengths", "first_slot > lengths", OPERATIONS),
    Mistake("ceil without its allowance", "reference/blocks.py", " - 1e-9", "", OPERATIONS),
    Mistake("floor instead of ceil", "reference/blocks.py", "torch.ceil(config.active_ratio", "torch.floor(config.active_ratio", OPERATIONS),
    Mistake("fewest blocks ignored", "reference/blocks.py", "share.clamp(min=config.min_blocks)", "share.clamp(min=1)", OPERATIONS),
    Mistake("NaN ranks with numbers", "reference/blocks.py", "torch.where(scores.isnan(), 2, 1)", "torch.where(scores.isnan(), 1, 1)", OPERATIONS),
    Mistake("newest blocks one short", "reference/blocks.py", "index >= total - config.local_blocks", "index > total - config.local_blocks", OPERATIONS),
    Mistake("minus zero ranks below zero", "reference/blocks.py", 'scores) + 0.0', 'scores).view(torch.int64 if scores.dtype == torch.float64 else torch.int32)', OPERATIONS),
    Mistake("ties go to the higher index", "reference/blocks.py", "comparable.argsort(dim=2, descending=True, stable=True)", "comparable.flip(2).argsort(dim=2, descending=True, stable=True).mul(-1).add(scores.shape[2] - 1)", OPERATIONS),
    Mistake("indices by score, not ascending", "reference/blocks.py", ".sort(dim=2).values", "", OPERATIONS),
    # sketch.
    Mistake("signs of the wrong hash bit", "reference/sketch.py", "y >> 31", "(y >> 30) & 1", SKETCHES),
    Mistake("every run of channels one sign", "reference/sketch.py", "* random_signs(x.shape[-1], x.device)", "", SKETCHES),
    Mistake("butterflies without the last stride", "reference/sketch.py", "while stride < m:", "while stride < m // 2:", SKETCHES),
    Mistake("rotation not normalised", "reference/sketch.py", "return wide * m**-0.5", "return wide", SKETCHES),
    Mistake("normalised by all channels", "reference/sketch.py", "return wide * m**-0.5", "return wide * x.shape[-1] ** -0.5", SKETCHES),
    Mistake("another step of levels", "reference/sketch.py", "STEP = 0.9957", "STEP = 1.0957", SKETCHES),
    Mistake("a threshold is exclusive", "reference/sketch.py", "(rotated >= 0).to(torch.uint8)", "(rotated > 0).to(torch.uint8)", SKETCHES),
    Mistake("the highest level is never reached", "reference/sketch.py", "+ (rotated >= step)", "+ (rotated >= 9 * step)", SKETCHES),
    Mistake("step from the largest channel", "reference/sketch.py", "rotated.square().mean(dim=-1, keepdim=True).sqrt()", "rotated.abs().amax(dim=-1, keepdim=True)", SKETCHES),
    Mistake("scale by the root of the code", "reference/sketch.py", "/ code.square().sum(dim=-1)", "/ code.square().sum(dim=-1).sqrt()", SKETCHES),
    Mistake("a key that is not finite has a code", "reference/sketch.py", "levels.masked_fill(is_lost[..., None], 0)", "levels", SKETCHES),
    Mistake("a key that is not finite has a scale", "reference/sketch.py", 'scales.masked_fill(is_lost, float("nan"))', "scales.nan_to_num()", SKETCHES),
    Mistake("the first channel takes the highest bits", "reference/sketch.py", "torch.arange(0, 8, bits, dtype=torch.uint8, device=device)", "torch.arange(0, 8, bits, dtype=torch.uint8, device=device).flip(0)", SKETCHES),
    Mistake("estimates without the scale of the softmax", "reference/sketch.py", " * query.shape[-1] ** -0.5  # [B, Hkv, G, T]", "  # [B, Hkv, G, T]", SKETCHES),
    Mistake("the query is not rotated", "reference/sketch.py", "rotate(query).unflatten", "query.to(accumulation_dtype(query.dtype)).unflatten", SKETCHES),
    Mistake("tokens past the length have mass", "reference/sketch.py", "is_seen = is_valid & ~is_lost", "is_seen = ~is_lost", SKETCHES),
    Mistake("a lost token keeps its block a number", "reference/sketch.py", '.masked_fill(is_lost, float("nan"))\n\n    # Sum', '\n\n    # Sum', SKETCHES),
    Mistake("the largest head instead of the sum", "reference/sketch.py", "blocks.sum(dim=(2, 4))", "blocks.sum(dim=4).amax(dim=2)", SKETCHES),
    Mistake("scores of sketches past the end stay", "reference/sketch.py", "first_slot >= lengths", "first_slot > lengths", SKETCHES),
    Mistake("a window keeps its old sketches", "reference/cache.py", "self.codes[layer, :, :, start:end] = codes", "self.codes[layer, :, :, end - 1 : end] = codes[:, :, -1:]"),
    Mistake("a window keeps its old scales", "reference/cache.py", "self.scales[layer, :, :, start:end] = scales", "self.scales[layer, :, :, end - 1 : end] = scales[:, :, -1:]"),
    # attention.
    Mistake("selected tokens past the length count", "reference/attention.py", "(positions < lengths", "(positions <= lengths", OPERATIONS),
    Mistake("minus one wraps to the end", "reference/attention.py", "(positions >= 0) & ", "", OPERATIONS),
    Mistake("a large number instead of minus infinity", "reference/attention.py", 'logits.masked_fill(~visible, float("-inf"))', "logits.masked_fill(~visible, -1e30)", OPERATIONS),
    Mistake("scale forgotten", "reference/attention.py", "* query.shape[-1] ** -0.5", "* 1.0", OPERATIONS),
    Mistake("log-sum-exp in base two", "reference/attention.py", "lse = logits.logsumexp(dim=-1)", "lse = logits.logsumexp(dim=-1) / 0.6931471805599453", OPERATIONS),
    Mistake("empty rows stay NaN", "reference/attention.py", 'out.masked_fill(lse[..., None] == float("-inf"), 0.0)', "out", OPERATIONS),
    Mistake("causal mask one short", "reference/attention.py", "<= last_seen[..., None]", "< last_seen[..., None]", OPERATIONS),
    Mistake("padded query rows attend", "reference/attention.py", "    last_seen = last_seen.masked_fill(row >= query_lengths[:, None], -1)\n", "", OPERATIONS),
    Mistake("NaN of unseen values leaks", "reference/attention.py", "if unseen.any():", "if False:", OPERATIONS),
    Mistake("groups laid out head by head", "reference/attention.py", "out = out.unflatten(2, (group, n_queries)).flatten(1, 2)", "out = out.unflatten(2, (n_queries, group)).transpose(2, 3).flatten(1, 2)", OPERATIONS),
    # cache.
    Mistake("bounds not rebuilt after a write", "reference/cache.py", "            self._rebuild_bounds(layer, start, end, end)\n", "            pass\n"),
    Mistake("values not overwritten", "reference/cache.py", "        self.values[layer, :, :, start:end] = values\n", "        self.values[layer, :, :, max(start, self.length):end] = values[:, :, max(start, self.length) - start:]\n"),
    Mistake("bounds of the last touched block stale", "reference/cache.py", "first, stop = start // b, -(-end // b)", "first, stop = start // b, max(start // b + 1, end // b)"),
    Mistake("truncated tokens stay in the bounds", "reference/cache.py", "self._rebuild_bounds(layer, length, self.length, length)", "self._rebuild_bounds(layer, length, self.length, self.length)"),
    # model.
    Mistake("residual of the attention lost", "reference/model.py", "x = x + layer.attn.project(", "x = layer.attn.project("),
    Mistake("norm without its epsilon", "reference/model.py", "keepdim=True) + self.eps)", "keepdim=True))"),
    Mistake("key heads not normed", "reference/model.py", "apply_rotary(self.k_norm(key), cos, sin)", "apply_rotary(key, cos, sin)"),
    Mistake("interleaved rotation", "reference/rope.py", "first, second = x.to(cos.dtype).chunk(2, dim=-1)", "first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)"),
    Mistake("yarn's ramp ends at the last pair", "reference/rope.py", "min(last, size - 1)", "min(last, size // 2 - 1)"),
    # sampling.
    Mistake("top-p without its allowance", "reference/sampling.py", "self.top_p - 1e-12", "self.top_p"),
    Mistake("top-p leaves out the token that reaches it", "reference/sampling.py", "(mass - probabilities < self.top_p", "(mass < self.top_p"),
    # generate.
    Mistake("rectification starts one token late", "reference/generate.py", "dense_pass(model, tokens, cache, cache.length - n_drifted)", "dense_pass(model, tokens[1:] or tokens, cache, cache.length - n_drifted + (len(tokens) > 1))"),
    Mistake("positions restart at a window", "reference/generate.py", "positions = torch.arange(start, end, device=device)[None]", "positions = torch.arange(end - start, device=device)[None]"),
    Mistake("a sparse step reads the old length", "reference/generate.py", "lengths = torch.tensor([position + 1], dtype", "lengths = torch.tensor([max(position, 1)], dtype"),
    Mistake("drifted tokens are not counted", "reference/generate.py", "generation.n_drifted = w + 1", "generation.n_drifted = w"),
    Mistake("a stop token goes on", "reference/generate.py", "if token in stop_tokens or len", "if len"),
    Mistake("dense layers are sparse", "reference/generate.py", "if layer < config.dense_layers:", "if False:"),
    Mistake("the last token is fed", "reference/generate.py", "if token in stop_tokens or len(generation.tokens) == max_new_tokens:", "if token in stop_tokens:"),
    Mistake("resumed without its open window", "reference/requests.py", "kept = resume.cache.length - resume.n_drifted\n", "kept = resume.cache.length\n"),
    Mistake("one generator for all prompts", "reference/requests.py", "return [torch.Generator().manual_seed(int(seed)) for seed in draw]", "return [base for _ in draw]"),
    Mistake("a model spread over devices passes", "reference/requests.py", "len(devices) == 1 and ", "", "tests/contract/test_given_models.py"),
    # transformers: nothing set on the caller's model, objects by their value.
    Mistake("our attention on the caller's configuration", "reference/weights/extension.py", "own = copy(value)", "own = value", "tests/weights/test_extension.py"),
    Mistake("the longest of the lengths", "reference/weights/extension.py", "return min(lengths), ends", "return max(lengths), ends", "tests/weights/test_extension.py"),
    Mistake("no share at all is everything", "reference/weights/extension.py", "not is_sampled or top_p == 0", "not is_sampled", "tests/weights/test_extension.py"),
    # speculation.
    Mistake("every draft is accepted", "reference/speculate.py", "< dense[draft.token]:", "<= 1.0:"),
    Mistake("rejected drafts stay cached", "reference/speculate.py", "        cache.truncate(start + len(kept))\n", ""),
    Mistake("the rest is not clamped", "reference/speculate.py", ".clamp(min=0)\n", ".abs()\n"),
    # contract.
    Mistake("an operation goes unchecked", "reference/operations.py", "            sizes = check_arguments(name, bound.arguments)\n", "            sizes = {}\n", CONTRACT),
    Mistake("lengths beyond the cache are taken", "reference/operations.py", '    checks.check_lengths("lengths", given["lengths"], capacity)\n', "    pass\n", CONTRACT),
]  # fmt: skip

KERNELS = [
    # sketch.
    Mistake("kernel: signs of the wrong hash bit", "fast/sketch.py", "1 - 2 * (mixed >> 31)", "1 - 2 * ((mixed >> 30) & 1)", SKETCHES),
    Mistake("kernel: a step of all levels", "fast/sketch.py", "+= (rotated >= -step).to(tl.int32) + (rotated >= step).to(tl.int32)", "+= (rotated >= -step).to(tl.int32)", SKETCHES),
    Mistake("kernel: a key that is not finite has a scale", "fast/sketch.py", 'tl.where(is_finite, scale.to(tl.float32), float("nan"))', "scale.to(tl.float32)", SKETCHES),
    Mistake("kernel: queries take a window's first tile", "fast/sketch.py", "tl.program_id(0) - N_EIGHTS, n_kv_head, capacity", "tl.program_id(0), n_kv_head, capacity", "tests/operations/test_kernels.py"),
    Mistake("kernel: weights of odd steps forgotten", "fast/sketch.py", "tl.floor(query / weight.to(tl.float32)[None, :] + 0.5)", "tl.floor(query + 0.5)", SKETCHES),
    Mistake("kernel: the second byte is unsigned", "fast/sketch.py", "first = (number + 128) >> 8", "first = number >> 8", SKETCHES),
    Mistake("kernel: levels not around their middle", "fast/sketch.py", ".to(tl.int32, bitcast=True) - middle", ".to(tl.int32, bitcast=True)", SKETCHES),
    Mistake("kernel: one bit has the unit of two", "fast/sketch.py", "D**-0.5 * (1 if BITS == 2 else 2)", "D**-0.5", SKETCHES),
    Mistake("kernel: sums beyond the digits of a float32", "fast/sketch.py", "(LARGEST if LARGEST < 127 else 127) * 256", "127 * 256", SKETCHES),
    Mistake("kernel: a query that is not finite is a number", "fast/sketch.py", 'tl.where(is_finite, unit * (size / (FINEST * SHRUNK)), float("nan"))', "unit * (size / (FINEST * SHRUNK))", SKETCHES),
    # estimate.
    Mistake("kernel: sketches of tokens past the length count", "fast/estimate.py", "m_t = o_t < left", "m_t = o_t <= left", SKETCHES),
    Mistake("kernel: the block of a lost token stays a number", "fast/estimate.py", 'tl.where(lost[None, :], float("nan"), own_z)', "own_z", SKETCHES),
    Mistake("kernel: a lost token in a whole tile is not looked at again", "fast/estimate.py", "if check != check:", "if check < 0:", SKETCHES),
    Mistake("kernel: the second eight heads are the first", "fast/estimate.py", "i_row * tl.num_programs(2) + tl.program_id(2)", "i_row * tl.num_programs(2)", SKETCHES),
    Mistake("kernel: odd steps take the lower half of the mask", "fast/estimate.py", "(IS_ODD if PLACES == 1 else 0)", "0", SKETCHES),
    Mistake("kernel: half a shift between two steps", "fast/estimate.py", "BITS * (2 if PLACES == 1 else PLACES)", "BITS * PLACES", SKETCHES),
    Mistake("kernel: the last tile of a run has no scales", "fast/estimate.py", "(i_tile + 1 < end)", "(i_tile + 2 < end)", SKETCHES),
    Mistake("kernel: a run goes on behind its last tile", "fast/estimate.py", "tl.minimum(n_tiles, left // TOKENS)", "left // TOKENS", SKETCHES),
    Mistake("kernel: a run's sum does not decay", "fast/estimate.py", "z = z * tl.exp2((m - safe) * unit) + tl.sum(by_top, axis=1)", "z = z + tl.sum(by_top, axis=1)", SKETCHES),
    Mistake("kernel: the last run does not count", "fast/estimate.py", "tl.cdiv(length, run)", "length // run", SKETCHES),
    Mistake("kernel: runs' sums without their maxima", "fast/estimate.py", "tl.sum(own_z * tl.exp2(own_m - safe[:, None]), axis=1)", "tl.sum(own_z, axis=1)", SKETCHES),
    Mistake("kernel: shares without the heads' totals", "fast/estimate.py", " / z[:, None]", "", SKETCHES),
    Mistake("kernel: a block without tokens has maximum 0", "fast/estimate.py", "top = tl.max(logit, axis=2)  # [8, BLOCKS]", "top = tl.maximum(tl.max(logit, axis=2), 0.0)", "tests/conformance"),
    Mistake("kernel: a head without tokens has maximum 0", "fast/estimate.py", "safe = _finite(new)\n            z = z", "safe = tl.maximum(new, 0.0)\n            z = z", "tests/conformance"),
    Mistake("a step scores sketches before it appends", "fast/generate.py", "bounds.codes, bounds.scales, plan.visible, b", "bounds.codes, bounds.scales, plan.start, b", "tests/decoding/test_batches.py"),
    # blocks: bounds, scores, selection.
    Mistake("kernel: a key past the length counts", "fast/blocks.py", "o_block * BLOCK_SIZE + j < length", "o_block * BLOCK_SIZE + j <= length", OPERATIONS),
    Mistake("kernel: a NaN key is dropped", "fast/blocks.py", "tl.minimum(lo, key, propagate_nan=tl.PropagateNan.ALL)", "tl.minimum(lo, key)", OPERATIONS),
    Mistake("kernel: the other bound", "fast/blocks.py", "tl.where(pooled >= 0, D, 0)", "tl.where(pooled >= 0, 0, D)", OPERATIONS),
    Mistake("kernel: heads of the next group", "fast/blocks.py", "tl.arange(0, 16)\n    p_query = query_ptr + (i_row * G + o_g)", "tl.arange(0, 16)\n    p_query = query_ptr + (i_row + o_g)", OPERATIONS),
    Mistake("kernel: in pages, heads of the next group", "fast/blocks.py", "o_block < total\n    p_query = query_ptr + (i_row * G + o_g)", "o_block < total\n    p_query = query_ptr + (i_row + o_g)", "tests/operations/test_pages.py"),
    Mistake("kernel: 0 times infinity is NaN", "fast/blocks.py", "product = tl.where(is_zero, 0.0, weight * bound.to(tl.float32))", "product = weight * bound.to(tl.float32)", OPERATIONS),
    Mistake("kernel: nothing below an end that is no number", "fast/blocks.py", "tl.where(score >= _number(high), float(\"-inf\"), score)", "tl.where(score < _number(high), score, float(\"-inf\"))", OPERATIONS),
    Mistake("kernel: one score from the goal, the wrong one", "fast/blocks.py", "tl.where(score >= _number(low), score, float(\"inf\"))", "tl.where(score > _number(low), score, float(\"inf\"))", OPERATIONS),
    Mistake("kernel: none needed, one dropped", "fast/blocks.py", "(needed > 0) & (at_low - needed == 1)", "at_low - needed == 1", OPERATIONS),
    Mistake("kernel: one block too few", "fast/blocks.py", "needed = n - (total - candidates)", "needed = tl.maximum(n - (total - candidates) - 1, 0)", OPERATIONS),
    Mistake("kernel: the last of tied blocks", "fast/blocks.py", "tl.where(o_block < first, float(\"inf\")", "tl.where(o_block > first, float(\"inf\")", OPERATIONS),
    Mistake("kernel: no padding behind the selection", "fast/blocks.py", "    if n < width:\n", "    if n < 0:\n", OPERATIONS),
    # attention.
    Mistake("kernel: a block past the end is read", "fast/attention.py", "(block >= 0) & (block < total)", "(block >= 0)", OPERATIONS),
    Mistake("kernel: minus one is dereferenced", "fast/attention.py", "is_visible = is_block & (position < length)", "is_visible = position < length", OPERATIONS),
    Mistake("kernel: the last share of the list is lost", "fast/attention.py", "share = tl.cdiv(count, tl.num_programs(0))", "share = count // tl.num_programs(0)", OPERATIONS),
    Mistake("kernel: sums do not decay", "fast/attention.py", "z = z * decay + tl.sum(weight, axis=1)", "z = z + tl.sum(weight, axis=1)", OPERATIONS),
    Mistake("kernel: minus infinity minus itself", "fast/attention.py", "weight = tl.exp2((product - m_safe[:, None])", "weight = tl.exp2((product - m_next[:, None])", OPERATIONS),
    Mistake("kernel: splits merged without their maxima", "fast/attention.py", "acc = acc * decay[:, None] + acc_i * decay_i[:, None]", "acc = acc + acc_i", OPERATIONS),
    Mistake("kernel: a counter is left behind", "fast/attention.py", "            tl.store(split_counters_ptr + i_counter, 0)\n", "", f"{OPERATIONS} {DECODING}"),
    Mistake("kernel: causal mask one short", "fast/attention.py", "(token + o_t[None, :] <= start + o_q[:, None])", "(token + o_t[None, :] < start + o_q[:, None])", OPERATIONS),
    Mistake("kernel: rows past the window keep their sums", "fast/attention.py", "    z = tl.where(m_query, z, 0.0)\n", "", OPERATIONS),
    Mistake("kernel: parts of one KV head are all its first", "fast/attention.py", "i_part = i_row * n_parts + tl.program_id(0) * ROWS // R", "i_part = i_row * n_parts", MERGING),
    Mistake("kernel: rows of a part are all its first", "fast/attention.py", "splits, o_r % R, m_out", "splits, o_r % ROWS, m_out", MERGING),
    Mistake("kernel: a split too few is merged", "fast/attention.py", "partial, out, lse, n_queries, splits, len", "partial, out, lse, n_queries, splits - 1, len", MERGING),
    Mistake("kernel: only the first splits are merged", "fast/attention.py", "range(0, splits, AT_ONCE)", "range(0, AT_ONCE, AT_ONCE)", OPERATIONS),
    Mistake("kernel: rows of another tile", "fast/gpu/hopper.py", "i_first = _row_tile() * PROGRAM_ROWS", "i_first = gl.program_id(0) * PROGRAM_ROWS", MERGING),
    Mistake("kernel: a slot is loaded while it is read", "fast/gpu/hopper.py", "        mbarrier.wait(done.index(slot + 1), phase ^ 1)\n", "", MERGING),
    Mistake("kernel: the loader waits for a phase that never ends", "fast/gpu/hopper.py", "mbarrier.wait(done.index(slot), phase ^ 1)", "mbarrier.wait(done.index(slot), phase)", MERGING),
    Mistake("kernel: both groups wait for their turn", "fast/gpu/hopper.py", "(i - 1 + W) & 1", "i & 1", MERGING),
    Mistake("kernel: values of the tile before are not waited for", "fast/gpu/hopper.py", "            mbarrier.wait(loaded.index(before + 1), phase_before)\n            mbarrier.wait(loaded.index(slot)", "            mbarrier.wait(loaded.index(slot)", MERGING),
    Mistake("kernel: the tile's values are weighed a tile early", "fast/gpu/hopper.py", "acc = warpgroup_mma(weight, slots.index(before + 1), acc, is_async=True)", "acc = warpgroup_mma(weight, slots.index(slot + 1), acc, is_async=True)", MERGING),
    Mistake("kernel: the last tile's values are forgotten", "fast/gpu/hopper.py", "        acc = warpgroup_mma(weight, slots.index(slot + 1), acc)\n        mbarrier.arrive(done.index(slot + 1), count=1)\n\n    # The tokens", "        mbarrier.arrive(done.index(slot + 1), count=1)\n\n    # The tokens", MERGING),
    Mistake("kernel: hidden values stay NaN", "fast/gpu/hopper.py", "gl.where((o_t < n_tokens)[:, None], values.load(MEMORY), 0.0)", "values.load(MEMORY)", MERGING),
    Mistake("kernel: nobody waits for the cleaning", "fast/gpu/hopper.py", "        mbarrier.wait(cleaned, 0)", "        mbarrier.wait(cleaned, 1)", MERGING),
    Mistake("kernel: a row on Hopper sees a token ahead", "fast/gpu/hopper.py", "(position[None, :] <= (start + o_q)[:, None])", "(position[None, :] <= (start + o_q)[:, None] + 1)", MERGING),
    Mistake("kernel: sums on Hopper do not decay", "fast/gpu/hopper.py", "            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]\n        slot", "        slot", MERGING),
    Mistake("kernel: rows past the window keep what they summed", "fast/gpu/hopper.py", "    z = gl.where((i_first + o_m) // G < n_valid, z, 0.0)\n", "", MERGING),
    Mistake("kernel: top-k counts a tie too few", "fast/gpu/draw.py", "tl.minimum(top_k - n_before, n)", "tl.minimum(top_k - 1 - n_before, n)", DRAWING),
    Mistake("kernel: top-p leaves out the token that reaches it", "fast/gpu/draw.py", "tl.maximum(tl.ceil((goal - before)", "tl.maximum(tl.floor((goal - before)", DRAWING),
    Mistake("kernel: a negative NaN is the last", "fast/gpu/draw.py", "tl.where(value != value, 0, 32767 - order)", "32767 - order", DRAWING),
    Mistake("kernel: zeros have two places", "fast/gpu/draw.py", "(value + 0.0)", "value", DRAWING),
    Mistake("kernel: the temperature is forgotten", "fast/gpu/draw.py", "below / temperature", "below", DRAWING),
    Mistake("kernel: of tied tokens always the first", "fast/gpu/draw.py", "tl.cumsum(is_there, axis=0) <= rank", "tl.cumsum(is_there, axis=0) <= 0", DRAWING),
    Mistake("kernel: every token takes the first number", "fast/gpu/draw.py", "uniforms_ptr + i_row * n_uniforms + n_chosen", "uniforms_ptr + i_row * n_uniforms", DRAWING),
    Mistake("kernel: log-sum-exp in base two", "fast/attention.py", "tl.log(total)", "tl.log2(total)", OPERATIONS),
    # cache, steps, sampling.
    Mistake("kernel: bounds extended, not rebuilt", "fast/cache.py", "mask=(position < start)[:, None]", "mask=(position < 0)[:, None]", f"{OPERATIONS} {DECODING}"),
    Mistake("kernel: the window's last block is not written", "fast/cache.py", "touched = (width + block_size - 2) // block_size + 1", "touched = max(1, (width + block_size - 2) // block_size)", f"{OPERATIONS} {DECODING}"),
    Mistake("kernel: a sparse step where a pass is due", "fast/gpu/bookkeeping.py", "(n_drifted < drift_limit)", "(n_drifted <= drift_limit)"),
    Mistake("kernel: a stop token goes on", "fast/gpu/bookkeeping.py", "        has_ended |= token == tl.load(stop_ptr + i)\n", "        has_ended |= token < 0\n"),
    Mistake("hooks on fused modules pass", "fast/model.py", "is_hooked = bool(module._forward_hooks or module._forward_pre_hooks)", "is_hooked = False", "tests/contract/test_given_models.py"),
    Mistake("batched top-p without its allowance", "fast/sampling.py", "self.sampling.top_p - 1e-12", "self.sampling.top_p"),
    Mistake("8-bit bounds rounded inward", "fast/gpu/bounds8.py", "is_outward = (x > 0) == is_hi", "is_outward = (x > 0) != is_hi", OPERATIONS),
]  # fmt: skip


def check(mistake, copies):
    """Run the tests with the mistake in a copy → (mistake, whether a test failed, seconds, the line that says so)."""
    copy = copies.pop()
    path = copy / mistake.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mistake.old) == 1, f"{mistake.what}: found {text.count(mistake.old)} times in {mistake.file}"
    mistaken = text.replace(mistake.old, mistake.new)
    compile(mistaken, mistake.file, "exec")  # a syntax error would show nothing
    path.write_text(mistaken, encoding="utf-8")
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mistake.tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy / "packages"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(text, encoding="utf-8")
    copies.append(copy)
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    is_caught = run.returncode == 1 or run.returncode < 0  # a crash is red as well
    said = [*failed, *run.stdout.splitlines(), *run.stderr.splitlines()[-1:], ""][0]
    return mistake, is_caught, time.perf_counter() - started, said


def copy_project(folder):
    """The project in `folder`, importable as `resa` from its subfolder packages."""
    for name in ("reference", "fast", "tests", "docs", "tutorials"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    packages = folder / "packages" / "resa"
    packages.mkdir(parents=True)
    for name, target in (("reference", "reference"), ("fast", "fast"), ("vectors", "tests/vectors")):
        (packages / name).symlink_to(folder / target)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mistakes whose file or description holds one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many to try at a time")
    options = parser.parse_args()
    chosen = [
        each
        for each in PATH + KERNELS
        if not options.words or any(word in f"{each.what} {each.file}" for word in options.words)
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = [copy_project(Path(folder) / str(job)) for job in range(options.jobs)]
        missed = 0
        for mistake, is_caught, seconds, line in pool.map(lambda each: check(each, copies), chosen):
            missed += not is_caught
            print(f"{'caught' if is_caught else 'MISSED'}  {seconds:5.0f} s  {mistake.what}: {line[:140]}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mistakes caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
