"""Rectified sparse attention in NumPy, the smallest whole port: `resa conformance docs/examples/numpy_port.py`.

Section numbers are those of docs/porting.md. Everything is computed in float64, one sequence and one head at a time.
"""

import math

import numpy as np

GRADES = ("float64", "fp16", "bf16", "batch", "widths", "long")  # 8: number types and sizes besides float32

# ---- 2 The operations ------------------------------------------------------------------------------------------------


def numbers(x):
    """8: bfloat16 comes as its bits, the upper half of those of a float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def block_bounds(keys, lengths, block_size):
    """2.1: keys [B, Hkv, T_max, D] -> [B, Hkv, 2, D, M]."""
    keys = numbers(keys)
    batch, kv_heads, capacity, head_dim = keys.shape
    n_blocks = math.ceil(capacity / block_size)
    bounds = np.empty((batch, kv_heads, 2, head_dim, n_blocks), keys.dtype)
    bounds[:, :, 0], bounds[:, :, 1] = math.inf, -math.inf
    for s, length in enumerate(lengths):
        for i in range(math.ceil(length / block_size)):
            block = keys[s, :, i * block_size : min((i + 1) * block_size, length)]  # [Hkv, tokens, D]
            bounds[s, :, 0, :, i], bounds[s, :, 1, :, i] = block.min(axis=1), block.max(axis=1)
    return bounds


def score_blocks(query, bounds, lengths, block_size):
    """2.2: query [B, Hq, D], bounds [B, Hkv, 2, D, M] -> [B, Hkv, M]."""
    query, bounds = numbers(query), numbers(bounds)
    batch, kv_heads, _, head_dim, n_blocks = bounds.shape
    pooled = query.astype(np.float64).reshape(batch, kv_heads, -1, head_dim).mean(axis=2)[..., None]
    with np.errstate(invalid="ignore"):
        products = np.maximum(pooled * bounds[:, :, 0], pooled * bounds[:, :, 1])  # [B, Hkv, D, M]
    is_infinite = np.isinf(bounds).any(axis=2)
    scores = np.where((pooled == 0) & is_infinite, 0.0, products).sum(axis=2)
    past_the_end = np.arange(n_blocks) * block_size >= np.asarray(lengths)[:, None, None]
    return np.where(past_the_end, -math.inf, scores)


def count_selected(n_blocks, config):
    """2.3: n = min(M, max(min_blocks, ceil(p M - 1e-9)))."""
    share = math.ceil(config["active_ratio"] * n_blocks - 1e-9)
    return min(n_blocks, max(config["min_blocks"], share))


def select_blocks(scores, lengths, config):
    """2.3: scores [B, Hkv, M] -> indices [B, Hkv, N], ascending, -1 at the end."""
    n_blocks = [math.ceil(length / config["block_size"]) for length in lengths]
    counts = [count_selected(n, config) for n in n_blocks]
    indices = np.full((*scores.shape[:2], max(counts)), -1, np.int32)
    for s, (total, count) in enumerate(zip(n_blocks, counts, strict=True)):
        oldest_local = max(0, total - config["local_blocks"])
        for h in range(scores.shape[1]):

            def rank(i, score=scores[s, h]):  # numbers by value, high to low, then NaN; among equals the lower index
                return (True, 0.0, i) if math.isnan(score[i]) else (False, -score[i], i)

            best = sorted(range(oldest_local), key=rank)[: count - (total - oldest_local)]
            taken = best + list(range(oldest_local, total))
            indices[s, h, :count] = sorted(taken)
    return indices


def attend(query, keys, values):
    """Softmax attention of [R, D] over visible [n, D] tokens -> [R, D] and the natural log-sum-exp [R]."""
    if len(keys) == 0:
        return np.zeros(query.shape), np.full(len(query), -math.inf)
    logits = query.astype(np.float64) @ keys.astype(np.float64).T * query.shape[1] ** -0.5
    largest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ values.astype(np.float64) / total, (largest + np.log(total))[:, 0]


def sparse_attention(query, keys, values, indices, lengths, block_size, *, return_lse=False):
    """2.4: query [B, Hq, D] over the valid tokens of the selected blocks -> [B, Hq, D], lse [B, Hq]."""
    query, keys, values = numbers(query), numbers(keys), numbers(values)
    group = query.shape[1] // keys.shape[1]
    out, lse = np.zeros(query.shape), np.zeros(query.shape[:2])
    for s, length in enumerate(lengths):
        for h in range(keys.shape[1]):
            blocks = [int(i) for i in indices[s, h] if i >= 0]
            tokens = [t for i in blocks for t in range(i * block_size, min((i + 1) * block_size, length))]
            heads = slice(h * group, (h + 1) * group)
            out[s, heads], lse[s, heads] = attend(query[s, heads], keys[s, h, tokens], values[s, h, tokens])
    return (out, lse) if return_lse else out


def dense_attention(query, keys, values, lengths, *, query_lengths=None, return_lse=False):
    """2.5: a window of queries [B, Hq, Q, D] over the whole cache -> [B, Hq, Q, D], lse [B, Hq, Q]."""
    query, keys, values = numbers(query), numbers(keys), numbers(values)
    batch, heads, n_queries, _ = query.shape
    group = heads // keys.shape[1]
    counts = [n_queries] * batch if query_lengths is None else query_lengths
    out, lse = np.zeros(query.shape), np.full(query.shape[:3], -math.inf)
    for s in range(batch):
        for h in range(heads):
            for i in range(counts[s]):
                end = lengths[s] - counts[s] + i + 1  # sees itself
                if end > 0:
                    seen = keys[s, h // group, :end], values[s, h // group, :end]
                    out[s, h, i], lse[s, h, i] = (result[0] for result in attend(query[s, h, i : i + 1], *seen))
    return (out, lse) if return_lse else out


def hadamard(x):
    """2.6: signs, then a Hadamard transform of every run of channels: x [..., D] -> [..., D]."""
    head_dim = x.shape[-1]
    hashed = np.arange(1, head_dim + 1, dtype=np.uint64) * 2654435761 % 2**32
    hashed = (hashed ^ (hashed >> 15)) * 2246822519 % 2**32
    x = x.astype(np.float64) * np.where(hashed >> 31, -1.0, 1.0)
    run, stride = head_dim & -head_dim, 1  # the largest power of two that divides D
    while stride < run:
        pairs = x.reshape(*x.shape[:-1], -1, 2, stride)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack((first + second, first - second), axis=-2).reshape(x.shape)
        stride *= 2
    return x * run**-0.5


def centred(levels, bits):
    """2.6: c of levels u."""
    return levels - 1.5 if bits == 2 else 2.0 * levels - 1.0


def sketch_keys(keys, bits=2):
    """2.6: keys [B, Hkv, T_max, D] -> codes [B, Hkv, T_max, D bits / 8] uint8, scales [B, Hkv, T_max]."""
    keys = numbers(keys)
    is_lost = ~np.isfinite(keys).all(axis=-1)
    rotated = hadamard(np.where(is_lost[..., None], 0.0, keys))
    step = 0.9957 * np.sqrt((rotated**2).mean(axis=-1, keepdims=True))
    levels = (rotated >= 0).astype(np.uint8)
    if bits == 2:
        levels = levels + (rotated >= -step) + (rotated >= step)
    code = centred(levels, bits)
    scales = (rotated * code).sum(axis=-1) / (code**2).sum(axis=-1)
    levels = np.where(is_lost[..., None], 0, levels).reshape(*keys.shape[:-1], -1, 8 // bits)
    codes = (levels << np.arange(0, 8, bits)).sum(axis=-1).astype(np.uint8)  # the first channel lowest
    return codes, np.where(is_lost, math.nan, scales)


def score_sketch(query, codes, scales, lengths, block_size):
    """2.7: query [B, Hq, D], codes and scales of every key -> [B, Hkv, M]."""
    query, scales = numbers(query), numbers(scales)
    (batch, kv_heads, capacity, n_bytes), head_dim = codes.shape, query.shape[-1]
    bits = 8 * n_bytes // head_dim
    levels = codes[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    code = centred(levels.reshape(batch, kv_heads, capacity, head_dim), bits)
    rotated = hadamard(query).reshape(batch, kv_heads, -1, head_dim)  # [B, Hkv, G, D]
    scores = np.full((batch, kv_heads, math.ceil(capacity / block_size)), -math.inf)
    for s, length in enumerate(lengths):
        for h in range(kv_heads):
            scale = scales[s, h, :length].astype(np.float64)
            is_lost = np.isnan(scale)
            logits = rotated[s, h] @ code[s, h, :length].T * scale * head_dim**-0.5  # [G, T]
            logits = np.where(is_lost, -math.inf, logits)
            largest = logits.max(axis=1, keepdims=True, initial=np.finfo(np.float64).min)
            mass = np.exp(logits - largest)
            mass = mass / np.maximum(mass.sum(axis=1, keepdims=True), 1)  # at least the largest token's 1, if any
            mass = np.where(is_lost, math.nan, mass).sum(axis=0)  # over the heads of the group: [T]
            for i in range(math.ceil(length / block_size)):
                scores[s, h, i] = mass[i * block_size : (i + 1) * block_size].sum()
    return scores


# ---- 3 The model -----------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) · weight."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x, positions, theta):
    """RoPE in the half-split layout: x [H, n, D], positions [n]."""
    half = x.shape[-1] // 2
    angles = np.outer(positions, theta ** (-2 * np.arange(half) / x.shape[-1]))  # [n, D/2]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


class Model:
    """Weights, and the cache of one sequence: keys and values [layer, Hkv, T_max, D], bounds or sketches with them."""

    def __init__(self, weights, shape, config, capacity):
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self.shape, self.config, self.length, self.window = shape, config, 0, 0
        size = shape["n_layer"], shape["n_kv_head"], capacity, shape["head_dim"]
        self.keys, self.values = np.full(size, math.nan), np.full(size, math.nan)
        n_blocks = math.ceil(capacity / config["block_size"])
        self.bounds = np.full((*size[:2], 2, size[3], n_blocks), math.nan)
        self.bits = config["sketch_bits"] if config.get("selection") == "sketch" else None
        self.codes = np.zeros((*size[:3], size[3] * (self.bits or 0) // 8), np.uint8)
        self.scales = np.full(size[:3], math.nan)

    def write(self, layer, key, value, start):
        """Store rows [Hkv, n, D] from `start` on, with their sketches or the bounds of the blocks they touch."""
        end, b = start + key.shape[1], self.config["block_size"]
        self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value
        if self.bits is not None:
            codes, scales = sketch_keys(key[None], self.bits)
            self.codes[layer, :, start:end], self.scales[layer, :, start:end] = codes[0], scales[0]
            return
        for i in range(start // b, math.ceil(end / b)):
            block = self.keys[layer, :, i * b : min((i + 1) * b, end)]
            self.bounds[layer, :, 0, :, i], self.bounds[layer, :, 1, :, i] = block.min(axis=1), block.max(axis=1)

    def forward(self, tokens, start, attention):
        """Feed tokens at start, start + 1, … -> logits after the last; attention(layer, query) -> [Hq, n, D]."""
        shape, w, n = self.shape, self.weights, len(tokens)
        positions = np.arange(start, start + n)
        x = w["embed.weight"][tokens]  # [n, C]
        for layer in range(shape["n_layer"]):
            at = f"layers.{layer}.attn."
            normed = rms_norm(x, w[f"layers.{layer}.attn_norm.weight"], shape["norm_eps"])
            heads = {}
            for name in ("q", "k", "v"):
                projected = normed @ w[f"{at}{name}_proj.weight"].T
                if shape["qkv_bias"]:
                    projected = projected + w[f"{at}{name}_proj.bias"]
                heads[name] = projected.reshape(n, -1, shape["head_dim"]).transpose(1, 0, 2)  # [H, n, D]
                if name != "v":
                    if shape["qk_norm"]:
                        heads[name] = rms_norm(heads[name], w[f"{at}{name}_norm.weight"], shape["norm_eps"])
                    heads[name] = rotate(heads[name], positions, shape["rope_theta"])
            self.write(layer, heads["k"], heads["v"], start)
            mixed = attention(layer, heads["q"])  # [Hq, n, D]
            x = x + mixed.transpose(1, 0, 2).reshape(n, -1) @ w[f"{at}o_proj.weight"].T
            normed = rms_norm(x, w[f"layers.{layer}.mlp_norm.weight"], shape["norm_eps"])
            gate, up = (normed @ w[f"layers.{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + gate / (1 + np.exp(-gate)) * up @ w[f"layers.{layer}.mlp.down_proj.weight"].T
        output = w["embed.weight" if shape["tied_embeddings"] else "output.weight"]
        return rms_norm(x[-1], w["norm.weight"], shape["norm_eps"]) @ output.T

    # ---- 4 Decoding --------------------------------------------------------------------------------------------------

    def dense_pass(self, tokens, start):
        """4.1, 4.3: the tokens from `start` on are encoded densely, for the first time (prefill) or anew."""
        end = start + len(tokens)

        def attention(layer, query):
            cache = self.keys[layer][None], self.values[layer][None]
            return dense_attention(query[None], *cache, [end])[0]

        logits = self.forward(tokens, start, attention)
        self.length, self.window = end, 0
        return logits

    def sparse_step(self, token):
        """4.2: append one token; every layer scores, selects, attends -> logits, indices [layer, Hkv, N]."""
        lengths, b, chosen = [self.length + 1], self.config["block_size"], []

        def attention(layer, query):
            query, cache = query[None, :, 0], (self.keys[layer][None], self.values[layer][None])
            if self.bits is None:
                scores = score_blocks(query, self.bounds[layer][None], lengths, b)
            else:
                scores = score_sketch(query, self.codes[layer][None], self.scales[layer][None], lengths, b)
            chosen.append(select_blocks(scores, lengths, self.config))
            return sparse_attention(query, *cache, chosen[-1], lengths, b)[0][:, None]

        logits = self.forward([token], self.length, attention)
        self.length += 1
        self.window += 1
        return logits, np.concatenate(chosen)


def generation(model, fed, config):
    """4.4: feed the tokens that are not cached yet, then step by step -> each token chosen, what its step selected."""
    start = model.length - model.window  # 0, or where the open window of what is resumed begins
    logits, indices, f = model.dense_pass(fed[start:], start), None, config["interval"]
    while True:
        pending = int(np.argmax(logits))
        yield pending, indices
        fed.append(pending)
        if config["schedule"] == "fused" and f is not None and model.window + 1 >= f:
            start = model.length - model.window
            logits, indices = model.dense_pass(fed[start:], start), None  # the window, and the pending token
            continue
        logits, indices = model.sparse_step(pending)
        if config["schedule"] == "paper" and f is not None and model.window >= f:
            start = model.length - model.window
            model.dense_pass(fed[start:], start)  # its logits are discarded


def decode_trace(weights, model_config, prompt, config):
    """4.6: greedy generation of config["max_new_tokens"] tokens; what there is after the prefill and every step."""
    n_tokens, trace = config["max_new_tokens"], []
    if n_tokens == 0:
        return []
    model = Model(weights, model_config, config, len(prompt) + n_tokens)
    for pending, indices in generation(model, list(prompt), config):
        keys, values = (x[:, :, : model.length].copy() for x in (model.keys, model.values))
        trace.append({"keys": keys, "values": values, "bounds": model.bounds.copy()})
        trace[-1] |= {"codes": model.codes.copy(), "scales": model.scales.copy()}
        trace[-1] |= {"indices": indices, "token": pending, "window": model.window}
        if len(trace) == n_tokens:  # the last token is never fed
            break
    return trace


def kept_tokens(logits, temperature, top_k, top_p):
    """4.5: logits [V] -> the ids that may be chosen, likeliest first, and their cumulative mass."""
    ids = np.argsort(-logits, kind="stable")[:top_k]  # of equals the lower id first
    likely = np.exp((logits[ids].astype(np.float64) - logits[ids[0]]) / temperature)
    mass = np.cumsum(likely / likely.sum())
    kept = max(1, int((mass - likely / likely.sum() < top_p - 1e-12).sum()))
    return ids[:kept], mass[:kept]


def choose_token(logits, temperature, top_k, top_p, u):
    """4.5: logits [B, V], uniform numbers u [B] -> ids [B]."""
    chosen = np.argmax(logits, axis=1)
    for s in range(len(logits) if temperature > 0 else 0):
        ids, mass = kept_tokens(logits[s], temperature, top_k, top_p)
        chosen[s] = ids[min(np.searchsorted(mass, u[s] * mass[-1], side="right"), len(ids) - 1)]
    return chosen


# ---- 4.7 What a serving engine has -----------------------------------------------------------------------------------


def attention_trace(passes, config):
    """4.7: attention alone, of one sequence: pages that are one, as long as the cache."""
    capacity = max(each["start"] + each["queries"].shape[2] for each in passes)
    return paged_trace([each | {"table": [0]} for each in passes], config, 1, capacity)


def paged_trace(passes, config, n_pages, page_size):
    """4.7: every pass writes its rows to the pages of its table, then attends to all of them."""
    (n_layer, kv_heads, _, head_dim), b = passes[0]["keys"].shape, config["block_size"]
    pools = np.full((2, n_layer, n_pages, kv_heads, page_size, head_dim), math.nan)  # keys, values
    results = []
    for each in passes:
        start, table, queries = each["start"], np.array(each["table"]), each["queries"]
        end, outs, chosen = start + queries.shape[2], [], []
        slots = np.arange(start, end)
        pages, heads = table[slots // page_size][:, None], np.arange(kv_heads)
        for layer in range(n_layer):
            for pool, name in zip(pools, ("keys", "values"), strict=True):
                pool[layer][pages, heads, slots[:, None] % page_size] = each[name][layer].swapaxes(0, 1)
            keys, values = (x[layer][table].swapaxes(0, 1).reshape(1, kv_heads, -1, head_dim) for x in pools)
            if each["is_dense"]:
                outs.append(dense_attention(queries[layer][None], keys, values, [end])[0])
                continue
            query = queries[layer][None, :, 0]
            if config.get("selection") == "sketch":
                scores = score_sketch(query, *sketch_keys(keys, config["sketch_bits"]), [end], b)
            else:
                scores = score_blocks(query, block_bounds(keys, [end], b), [end], b)
            chosen.append(select_blocks(scores, [end], config))
            outs.append(sparse_attention(query, keys, values, chosen[-1], [end], b)[0][:, None])
        indices = np.concatenate(chosen) if chosen else None
        results.append({"out": np.stack(outs), "indices": indices})  # [layer, Hq, n, D], [layer, Hkv, K]
    return results


def decode_batch(weights, model_config, requests, config):
    """4.8: requests that join, end and go on each in its own time -> what each has left: tokens, cache and w."""
    capacity = sum(len(each["prompt"]) + each["max_new_tokens"] for each in requests)  # enough for all turns of one
    running, ended, results, step = {}, {}, [None] * len(requests), 0
    while len(ended) < len(requests):
        for i, request in enumerate(requests):
            if request["arrival"] == step:
                model, fed = ended.get(request["resumes"]) or (Model(weights, model_config, config, capacity), [])
                fed += request["prompt"]
                running[i] = model, fed, [], generation(model, fed, config)
            if i not in running:
                continue
            model, fed, tokens, steps = running[i]
            token, _ = next(steps)
            tokens += [token][: request["max_new_tokens"]]  # of no tokens there is the prefill alone
            if len(tokens) < request["max_new_tokens"] and token not in request["stop_tokens"]:
                continue
            del running[i]
            ended[i] = model, fed + tokens[-1:]  # the last is pending: it is fed when the sequence goes on
            results[i] = {"tokens": tokens, "window": model.window, "keys": model.keys[:, :, : model.length].copy()}
            results[i]["values"] = model.values[:, :, : model.length].copy()
        step += 1
    return results
