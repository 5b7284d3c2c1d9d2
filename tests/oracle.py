"""Rectified sparse attention, written a second time: float64 NumPy, plain loops, nothing shared with the project.

The tests compare the project with this file. It imports neither the project nor torch, and it takes the slow and
obvious way everywhere: bounds are rebuilt from the cache instead of maintained, attention is one softmax per query,
one sequence at a time is decoded. (`rotate` alone adds whole rows, in the order of a loop.) "Section" and "eq." refer
to the specification and to arXiv 2506.04108.

Shapes: B sequences, Hq query heads in groups of G = Hq / Hkv per key-value head, D channels per head, T_max slots
of cache, M blocks of b tokens. Configurations are plain mappings with the names of the project's fields.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

# --- Section 2: the operations ---


def count_blocks(tokens, block_size):
    """Blocks that hold `tokens` tokens, the last of them perhaps partial: ceil(T / b). 17 tokens in 16s -> 2."""
    return math.ceil(tokens / block_size)


def block_bounds(keys, lengths, block_size):
    """Smallest and largest valid key of each block, per channel (section 2, "Block bounds"; eq. 3).

    keys [B, Hkv, T_max, D], lengths [B] -> bounds [B, Hkv, 2, D, M] with 0 = lo and 1 = hi. A block without a
    valid key keeps the neutral elements of min and max, +inf and -inf. NaN in a valid key spreads to both bounds.
    """
    keys = np.asarray(keys, np.float64)
    n_sequences, n_kv_heads, capacity, head_dim = keys.shape
    bounds = np.empty((n_sequences, n_kv_heads, 2, head_dim, count_blocks(capacity, block_size)))
    bounds[:, :, 0] = math.inf
    bounds[:, :, 1] = -math.inf
    for s in range(n_sequences):
        for h in range(n_kv_heads):
            for t in range(lengths[s]):
                lo, hi = bounds[s, h, :, :, t // block_size]
                lo[:] = np.minimum(lo, keys[s, h, t])  # NumPy's minimum and maximum keep NaN
                hi[:] = np.maximum(hi, keys[s, h, t])
    return bounds


def score_blocks(query, bounds, lengths, block_size):
    """Upper bound of the group's mean logit, before scaling, over each block (section 2, "Block score"; eq. 4).

    query [B, Hq, D], bounds [B, Hkv, 2, D, M] -> scores [B, Hkv, M]; past the end -inf.
    """
    query, bounds = np.asarray(query, np.float64), np.asarray(bounds, np.float64)
    n_sequences, n_kv_heads, _, head_dim, n_blocks = bounds.shape
    scores = np.full((n_sequences, n_kv_heads, n_blocks), -math.inf)
    for s in range(n_sequences):
        for h, pooled in enumerate(pool(query[s], n_kv_heads)):
            for i in range(count_blocks(lengths[s], block_size)):
                lo, hi = bounds[s, h, :, :, i]
                scores[s, h, i] = sum(upper_bound(pooled[d], lo[d], hi[d]) for d in range(head_dim))
    return scores


def pool(query, n_kv_heads):
    """Mean of the query heads that share a key-value head: [Hq, D] -> [Hkv, D] (section 2, "Block score")."""
    group = len(query) // n_kv_heads
    return [sum(query[h * group + g] for g in range(group)) / group for h in range(n_kv_heads)]


def upper_bound(q, lo, hi):
    """max(q * lo, q * hi) for one channel, where 0 * inf is 0 (section 2, "Block bounds" and "Block score")."""

    def times(bound):
        return 0.0 if q == 0 and math.isinf(bound) else q * bound

    return np.maximum(times(lo), times(hi))


def count_selected(n_blocks, config):
    """n = min(M, max(min_blocks, ceil(p M - 1e-9))) blocks are attended (section 2, "Selection"; eq. 5)."""
    return min(n_blocks, max(config["min_blocks"], math.ceil(config["active_ratio"] * n_blocks - 1e-9)))


def select_blocks(scores, lengths, config):
    """The newest `local_blocks` blocks and the highest scores, n in all (section 2, "Selection"; eq. 5).

    scores [B, Hkv, M], lengths [B] -> indices [B, Hkv, N] int32, N the largest n, ascending, -1 at the end.
    """
    n_sequences, n_kv_heads, _ = np.shape(scores)
    n_blocks = [count_blocks(length, config["block_size"]) for length in lengths]
    width = max(count_selected(n, config) for n in n_blocks)
    indices = np.full((n_sequences, n_kv_heads, width), -1, np.int32)
    for s in range(n_sequences):
        wanted = count_selected(n_blocks[s], config)
        n_local = min(config["local_blocks"], n_blocks[s])
        oldest_local = n_blocks[s] - n_local
        for h in range(n_kv_heads):
            score = scores[s][h]

            def rank(i, score=score):  # numbers from high to low, then NaN; among equals the lower index
                return (1, 0.0, i) if math.isnan(score[i]) else (0, -float(score[i]), i)

            best = sorted(range(oldest_local), key=rank)[: wanted - n_local]
            indices[s, h, :wanted] = sorted([*best, *range(oldest_local, n_blocks[s])])
    return indices


@functools.cache
def sign(channel):
    """1 or -1, from a hash of the channel's number (section 6, "Rotation")."""
    x = (channel + 1) * 2654435761 % 2**32
    y = (x ^ (x >> 15)) * 2246822519 % 2**32
    return 1 - 2 * (y >> 31)


def rotate(x):
    """Signs, then a Hadamard transform of every run of m channels, by its definition (section 6): [D] -> [D]."""
    m = next(m for m in range(len(x), 0, -1) if len(x) % m == 0 and m & (m - 1) == 0)
    signed = np.array([sign(d) * x[d] for d in range(len(x))]).reshape(-1, m)
    rotated = np.zeros(signed.shape)
    for i in range(m):  # one after the other: another order of the sums would be other bits
        rotated += signed[:, i : i + 1] * hadamard(m)[i]
    return rotated.flatten() / math.sqrt(m)


@functools.cache
def hadamard(m):
    """Each channel's part in every other: 1 or -1 [m, m] (section 6, "Rotation")."""
    return np.array([[(-1) ** (d & i).bit_count() for d in range(m)] for i in range(m)])


def sketch_key(key, bits):
    """Levels [D] and scale of one finite key [D] (section 6, "Code" and "Scale")."""
    rotated = rotate(key)
    step = 0.9957 * math.sqrt(np.mean(rotated**2))
    thresholds = [0.0] if bits == 1 else [-step, 0.0, step]
    levels = np.array([sum(r >= threshold for threshold in thresholds) for r in rotated])
    code = code_of(levels, bits)
    return levels, np.dot(rotated, code) / np.dot(code, code)


def code_of(levels, bits):
    """c for levels u: 2 u - 1 of one bit, u - 1.5 of two (section 6, "Code")."""
    return 2 * levels - 1 if bits == 1 else levels - 1.5


def sketch_keys(keys, bits=2):
    """Codes and scales (section 6): keys [B, Hkv, T_max, D] -> [B, Hkv, T_max, D bits / 8] uint8, [B, Hkv, T_max]."""
    keys = np.asarray(keys, np.float64)
    codes = np.zeros((*keys.shape[:3], keys.shape[3] * bits // 8), np.uint8)
    scales = np.full(keys.shape[:3], math.nan)
    for place in np.ndindex(keys.shape[:3]):
        if np.isfinite(keys[place]).all():
            levels, scales[place] = sketch_key(keys[place], bits)
            for d, level in enumerate(levels):
                codes[place][d * bits // 8] |= level << d * bits % 8
    return codes, scales


def score_sketch(query, codes, scales, lengths, block_size):
    """Estimated attention mass of each block, over the heads of a group (section 6, "Estimate" and "Score").

    query [B, Hq, D], codes [B, Hkv, T_max, D bits / 8], scales [B, Hkv, T_max] -> scores [B, Hkv, M]; past the end
    -inf. A valid token whose scale is NaN has no mass, and its block scores NaN.
    """
    query, scales = np.asarray(query, np.float64), np.asarray(scales, np.float64)
    n_sequences, n_kv_heads, capacity, width = codes.shape
    head_dim, group = query.shape[2], query.shape[1] // n_kv_heads
    bits = 8 * width // head_dim
    scores = np.full((n_sequences, n_kv_heads, count_blocks(capacity, block_size)), -math.inf)
    for s in range(n_sequences):
        for h in range(n_kv_heads):
            scores[s, h, : count_blocks(lengths[s], block_size)] = 0
            known = [t for t in range(lengths[s]) if not math.isnan(scales[s, h, t])]
            shifts = np.arange(head_dim) * bits % 8
            levels = [(codes[s, h, t].repeat(8 // bits) >> shifts) % 2**bits for t in known]
            for g in range(group):
                rotated = rotate(query[s, h * group + g])
                logits = np.array(
                    [
                        scales[s, h, t] * np.dot(rotated, code_of(level.astype(np.float64), bits)) / math.sqrt(head_dim)
                        for t, level in zip(known, levels, strict=True)
                    ]
                )
                weights = np.exp(logits - logits.max()) if known else []
                for t, weight in zip(known, weights, strict=True):
                    scores[s, h, t // block_size] += weight / sum(weights)
            for t in set(range(lengths[s])) - set(known):
                scores[s, h, t // block_size] = math.nan
    return scores


def attend(query, keys, values):
    """One query, exactly: softmax(q k D**-0.5) v and the log-sum-exp of the logits (section 2, eq. 2).

    query [D], keys [n, D], values [n, D] -> [D], scalar. No keys at all: zeros and -inf.
    """
    if len(keys) == 0:
        return np.zeros(len(query)), -math.inf
    logits = np.array([np.dot(query, key) for key in keys]) * len(query) ** -0.5
    weights = np.exp(logits - logits.max())
    return sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum(), (
        logits.max() + math.log(weights.sum())
    )


def sparse_attention(query, keys, values, indices, lengths, block_size, return_lse=False):
    """Attention of one query per head over the valid tokens of its group's blocks (section 2, "Sparse attention").

    query [B, Hq, D], keys and values [B, Hkv, T_max, D], indices [B, Hkv, N] -> out [B, Hq, D], lse [B, Hq].
    """
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    n_sequences, n_heads, _ = query.shape
    group = n_heads // keys.shape[1]
    out, lse = np.zeros(query.shape), np.full((n_sequences, n_heads), -math.inf)
    for s in range(n_sequences):
        for h in range(n_heads):
            blocks = [int(i) for i in indices[s][h // group] if i >= 0]
            tokens = [t for i in blocks for t in range(i * block_size, (i + 1) * block_size) if t < lengths[s]]
            out[s, h], lse[s, h] = attend(query[s, h], keys[s, h // group, tokens], values[s, h // group, tokens])
    return (out, lse) if return_lse else out


def dense_attention(query, keys, values, lengths, query_lengths=None, return_lse=False):
    """Causal attention of a window of queries over the whole cache (section 2, "Signatures").

    query [B, Hq, Q, D], keys and values [B, Hkv, T_max, D] -> out [B, Hq, Q, D], lse [B, Hq, Q]. Query i of
    sequence s sits at position lengths[s] - query_lengths[s] + i and sees the keys up to and including it; rows at
    or past query_lengths[s], or at negative positions, are zeros and -inf.
    """
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    n_sequences, n_heads, n_queries, _ = query.shape
    group = n_heads // keys.shape[1]
    if query_lengths is None:
        query_lengths = [n_queries] * n_sequences
    out, lse = np.zeros(query.shape), np.full(query.shape[:-1], -math.inf)
    for s in range(n_sequences):
        for h in range(n_heads):
            for i in range(query_lengths[s]):
                position = lengths[s] - query_lengths[s] + i
                if position >= 0:
                    seen = slice(0, position + 1)
                    out[s, h, i], lse[s, h, i] = attend(
                        query[s, h, i], keys[s, h // group, seen], values[s, h // group, seen]
                    )
    return (out, lse) if return_lse else out


# --- Section 3, "The model": one sequence, weights a mapping from the project's parameter names to arrays ---


@dataclass
class Cache:
    """Keys and values of one sequence, per layer [Hkv, T, D], as they are attended: after norm and RoPE."""

    keys: list
    values: list

    @classmethod
    def empty(cls, config):
        none = [np.zeros((config["n_kv_head"], 0, config["head_dim"])) for _ in range(config["n_layer"])]
        return cls(keys=none, values=list(none))

    @property
    def length(self):
        """T, the tokens held."""
        return self.keys[0].shape[1]


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x**2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rope(x, positions, theta):
    """Rotate channel pairs (d, d + D/2) by position * theta**(-2 d / D): [H, n, D], positions [n] -> [H, n, D]."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for i, position in enumerate(positions):
        for d in range(half):
            angle = position * theta ** (-2 * d / x.shape[-1])
            first, second = x[:, i, d], x[:, i, d + half]
            out[:, i, d] = first * math.cos(angle) - second * math.sin(angle)
            out[:, i, d + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def forward(weights, config, cache, tokens, start, attention):
    """Run `tokens` at positions start, start + 1, ...; their keys and values replace the cache from `start` on.

    Every layer writes before it attends, so a token sees itself. `attention` maps (query [Hq, n, D],
    keys [Hkv, T, D], values [Hkv, T, D]) to [Hq, n, D]; a sparse step and a dense pass differ in it alone.
    -> logits [n, V].
    """
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    eps, positions = config["norm_eps"], range(start, start + len(tokens))

    def linear(x, name):
        bias = weights[f"{name}.bias"] if config.get("qkv_bias") and name[-6:] in ("q_proj", "k_proj", "v_proj") else 0
        return x @ weights[f"{name}.weight"].T + bias

    def heads(x, n_heads):  # [n, H D] -> [H, n, D]
        return x.reshape(len(tokens), n_heads, config["head_dim"]).transpose(1, 0, 2)

    x = weights["embed.weight"][list(tokens)]  # [n, C]
    for i in range(config["n_layer"]):
        here = f"layers.{i}.attn"
        y = rms_norm(x, weights[f"layers.{i}.attn_norm.weight"], eps)
        query = heads(linear(y, f"{here}.q_proj"), config["n_head"])
        key = heads(linear(y, f"{here}.k_proj"), config["n_kv_head"])
        value = heads(linear(y, f"{here}.v_proj"), config["n_kv_head"])
        if config.get("qk_norm"):
            query = rms_norm(query, weights[f"{here}.q_norm.weight"], eps)
            key = rms_norm(key, weights[f"{here}.k_norm.weight"], eps)
        query, key = (rope(z, positions, config["rope_theta"]) for z in (query, key))
        cache.keys[i] = np.concatenate([cache.keys[i][:, :start], key], axis=1)
        cache.values[i] = np.concatenate([cache.values[i][:, :start], value], axis=1)
        mixed = attention(query, cache.keys[i], cache.values[i])  # [Hq, n, D]
        x = x + linear(mixed.transpose(1, 0, 2).reshape(len(tokens), -1), f"{here}.o_proj")

        mlp = f"layers.{i}.mlp"
        y = rms_norm(x, weights[f"layers.{i}.mlp_norm.weight"], eps)
        gate = linear(y, f"{mlp}.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{mlp}.up_proj"), f"{mlp}.down_proj")

    y = rms_norm(x, weights["norm.weight"], eps)
    return y @ (weights["embed.weight"] if config.get("tied_embeddings") else weights["output.weight"]).T


# --- Section 3, "Decoding": prefill, sparse step, rectification, both schedules, greedy ---


def dense_pass(weights, config, cache, tokens, start):
    """One dense causal forward of `tokens` at `start`, the end of the cache or before it. -> logits [n, V].

    Prefill has start = T, a rectification start = T - w; the fused pass appends one token more.
    """

    def attention(query, keys, values):
        return dense_attention(query[None], keys[None], values[None], [keys.shape[1]])[0]

    return forward(weights, config, cache, tokens, start, attention)


def sparse_step(weights, config, resa, cache, token, selected=None):
    """Feed one token at position T; every layer selects blocks of its own cache and attends to them. -> logits [V].

    To the list `selected`, if given, every layer appends its (scores [Hkv, M], indices [Hkv, N]).
    """

    def attention(query, keys, values):
        lengths, block_size = [keys.shape[1]], resa["block_size"]
        query, keys, values = query[None, :, 0], keys[None], values[None]
        if resa.get("selection") == "sketch":
            scores = score_sketch(query, *sketch_keys(keys, resa["sketch_bits"]), lengths, block_size)
        else:
            scores = score_blocks(query, block_bounds(keys, lengths, block_size), lengths, block_size)
        indices = select_blocks(scores, lengths, resa)
        if selected is not None:
            selected.append((scores[0], indices[0]))
        return sparse_attention(query, keys, values, indices, lengths, block_size)[0, :, None]

    return forward(weights, config, cache, [token], cache.length, attention)[-1]


@dataclass
class Generation:
    """Results of `generate`: the tokens, the logits each came from, the cache and w, its newest sparse tokens."""

    tokens: list
    logits: list
    cache: Cache
    w: int


def generate(weights, config, resa, prompt, max_new_tokens, stop=(), forced=None, watch=None):
    """Greedy rectified sparse decoding of one sequence (section 3; Algorithm 1).

    resa holds block_size, active_ratio, min_blocks, local_blocks, interval (None: never rectify), schedule ("paper" or
    "fused") and, where it is "sketch", selection with sketch_bits. The last generated token, or a stop token, is never
    fed. With `forced`, those tokens take the place of the chosen ones, so that two decoders can be compared under the
    same tokens. `watch(done, logits, selected)` is called after the prefill and after every step, a rectification
    included, with the logits of the next token and each layer's selection (empty after a dense pass).
    """
    cache, interval = Cache.empty(config), resa["interval"]
    logits = dense_pass(weights, config, cache, prompt, 0)[-1]
    fed, done, selected = list(prompt), Generation(tokens=[], logits=[], cache=cache, w=0), []
    while len(done.tokens) < max_new_tokens:
        if watch is not None:
            watch(done, logits, selected)
        best = int(np.argmax(logits))  # the first, so the lower id, among equals
        pending = best if forced is None else forced[len(done.tokens)]
        done.tokens.append(pending)
        done.logits.append(logits)
        if len(done.tokens) == max_new_tokens or pending in stop:
            break
        fed.append(pending)
        selected = []
        if resa["schedule"] == "fused" and done.w + 1 == interval:
            window = fed[cache.length - done.w :]  # w sparse tokens and the pending one
            logits = dense_pass(weights, config, cache, window, cache.length - done.w)[-1]
            done.w = 0
            continue
        logits = sparse_step(weights, config, resa, cache, pending, selected)
        done.w += 1
        if resa["schedule"] == "paper" and done.w == interval:
            dense_pass(weights, config, cache, fed[cache.length - interval :], cache.length - interval)
            done.w = 0
    return done
