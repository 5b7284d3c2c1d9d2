"""A port in NumPy that is built like GPU kernels, so that seeded mistakes fall where kernels go wrong.

Unlike docs/examples/numpy_port.py everything is float32 and comes in tiles with masks: an online softmax over tiles of
tokens, splits of the tokens that are merged in the end, scores that read half of the bounds, a selection that searches
its threshold by counting, channels padded to a power of two, sketches read as 32-bit words. One call of a function with
a leading underscore is what one program of a kernel does. Section numbers are those of docs/porting.md.
"""

import math

import numpy as np

GRADES = ("float32", "batch", "widths", "long")  # what this port supports
F32 = np.float32
TILE = 16  # tokens that a program of attention reads at once
N_SPLITS = 3  # programs among which the tokens of one attention are divided
ROWS = 4  # queries of a window per program
BLOCKS = 4  # blocks that a program of the scores reads at once


def padded(head_dim):
    """Channels of a tile: the next power of two, as kernels need it."""
    return 1 << (head_dim - 1).bit_length()


def load(rows, offsets, mask):
    """Masked load of rows [n, D] at offsets [R] -> [R, width]: zeros where the mask says no, and in padded channels."""
    tile = np.zeros((len(offsets), padded(rows.shape[1])), F32)
    tile[mask, : rows.shape[1]] = rows[offsets[mask]]
    return tile


# ---- 2.1 to 2.3 Bounds, scores, selection ----------------------------------------------------------------------------


def _bounds(keys, first, length, block_size):
    """One block from token `first` on: keys [T_max, D] -> lo and hi [2, D], of the tokens below `length`."""
    tokens = first + np.arange(block_size)
    valid = tokens < length
    tile = keys[np.where(valid, tokens, 0)]  # [b, D]
    low = np.where(valid[:, None], tile, math.inf).min(axis=0)
    high = np.where(valid[:, None], tile, -math.inf).max(axis=0)
    return np.stack((low, high))


def block_bounds(keys, lengths, block_size):
    """2.1: keys [B, Hkv, T_max, D] -> [B, Hkv, 2, D, M]."""
    batch, kv_heads, capacity, head_dim = keys.shape
    bounds = np.empty((batch, kv_heads, 2, head_dim, -(-capacity // block_size)), keys.dtype)
    for s, h, i in np.ndindex(batch, kv_heads, bounds.shape[4]):
        bounds[s, h, :, :, i] = _bounds(keys[s, h], i * block_size, lengths[s], block_size)
    return bounds


def _scores(pooled, bounds, first, length, block_size):
    """Scores of the blocks from `first` on, reading half of the bounds: pooled [D], bounds [2, D, M] -> [BLOCKS]."""
    (_, head_dim, n_blocks), width = bounds.shape, padded(len(pooled))
    blocks, channels = first + np.arange(BLOCKS), np.arange(width)
    is_channel, valid = channels < head_dim, (blocks < n_blocks) & (blocks * block_size < length)
    query = np.where(is_channel, pooled[np.where(is_channel, channels, 0)], F32(0))[:, None]

    # The bound whose product is the larger, channel by channel.
    which = np.where(query >= 0, 1, 0)  # [width, 1]
    bound = bounds[which, np.where(is_channel, channels, 0)[:, None], np.where(valid, blocks, 0)]
    bound = np.where(is_channel[:, None] & valid, bound, F32(0))  # [width, BLOCKS]
    products = np.where((query == 0) & np.isinf(bound), F32(0), query * bound)
    return np.where(valid, products.sum(axis=0, dtype=F32), -math.inf)


def score_blocks(query, bounds, lengths, block_size):
    """2.2: query [B, Hq, D], bounds [B, Hkv, 2, D, M] -> [B, Hkv, M]."""
    batch, kv_heads, _, head_dim, n_blocks = bounds.shape
    pooled = query.reshape(batch, kv_heads, -1, head_dim).mean(axis=2, dtype=F32)
    scores = np.full((batch, kv_heads, n_blocks + BLOCKS), -math.inf, F32)  # room for the last tile
    for s, h, tile in np.ndindex(batch, kv_heads, -(-n_blocks // BLOCKS)):
        first = tile * BLOCKS
        part = _scores(pooled[s, h], bounds[s, h], first, lengths[s], block_size)
        scores[s, h, first : first + BLOCKS] = part
    return scores[:, :, :n_blocks]


def sortable(scores):
    """Scores as 32-bit integers in the order of 2.3: NaN lowest, zeros of both signs alike."""
    bits = (scores.astype(F32) + F32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return np.where(np.isnan(scores), np.uint32(0), ordered)


def _select(scores, total, count, n_local):
    """Blocks of one head, ascending: scores [M_max], of which `total` are blocks of the sequence -> [count]."""
    index, oldest_local = np.arange(total), max(0, total - n_local)
    is_other, wanted = index < oldest_local, count - (total - oldest_local)
    ordered = sortable(scores[:total])

    # The largest threshold that enough blocks reach, bit by bit.
    threshold = 0
    for bit in range(31, -1, -1):
        higher = threshold | 1 << bit
        if np.count_nonzero(is_other & (ordered >= higher)) >= wanted:
            threshold = higher

    # What lies above it, then of equals the lower indices.
    above, equal = is_other & (ordered > threshold), is_other & (ordered == threshold)
    is_first = np.cumsum(equal) <= wanted - np.count_nonzero(above)
    return index[above | (equal & is_first) | (index >= oldest_local)]


def select_blocks(scores, lengths, config):
    """2.3: scores [B, Hkv, M] -> indices [B, Hkv, N], ascending, -1 at the end."""
    totals = [-(-int(length) // config["block_size"]) for length in lengths]
    shares = [math.ceil(config["active_ratio"] * n - 1e-9) for n in totals]  # in float64, on the host
    counts = [min(n, max(config["min_blocks"], share)) for n, share in zip(totals, shares, strict=True)]
    indices = np.full((*scores.shape[:2], max(counts)), -1, np.int32)
    for s, h in np.ndindex(scores.shape[:2]):
        indices[s, h, : counts[s]] = _select(scores[s, h], totals[s], counts[s], config["local_blocks"])
    return indices


# ---- 2.4, 2.5 Attention ----------------------------------------------------------------------------------------------


def _split(query, keys, values, slots, token_of, position):
    """Online softmax over a range of slots: query [R, width], keys, values [T_max, D] -> m, z [R], acc [R, width].

    token_of(slots) names the token in every slot, -1 for nothing. Row r sees the tokens up to position[r].
    """
    scale = F32(keys.shape[1] ** -0.5)
    m, z = np.full(len(query), -math.inf, F32), np.zeros(len(query), F32)
    acc = np.zeros(query.shape, F32)
    for first in range(slots.start, slots.stop, TILE):
        # The tile's tokens, and which row sees which.
        tile = first + np.arange(TILE)
        tokens = np.where(tile < slots.stop, token_of(np.minimum(tile, slots.stop - 1)), -1)
        seen = (tokens >= 0) & (tokens <= position[:, None])  # [R, TILE]
        key, value = (load(rows, tokens, seen.any(axis=0)) for rows in (keys, values))  # [TILE, width]

        # Rescale what there is to the new maximum, and add the tile.
        logits = np.where(seen, query @ key.T * scale, -math.inf)
        peak = np.maximum(m, logits.max(axis=1))
        shift = np.where(peak == -math.inf, F32(0), peak)  # nothing seen yet: -inf - -inf would be NaN
        weights, kept = np.exp(logits - shift[:, None]), np.exp(m - shift)
        z = z * kept + weights.sum(axis=1)
        acc = acc * kept[:, None] + weights @ value
        m = peak
    return m, z, acc


def _merged(splits):
    """Merge the (m, z, acc) of all splits by maximum and sum -> out [R, width], lse [R]."""
    m, z, acc = (np.stack(parts) for parts in zip(*splits, strict=True))
    peak = m.max(axis=0)
    weights = np.exp(m - np.where(peak == -math.inf, F32(0), peak))  # [splits, R]
    total = (z * weights).sum(axis=0)
    out = (acc * weights[..., None]).sum(axis=0) / np.where(total > 0, total, F32(1))[:, None]
    return out, peak + np.log(total)


def attend(query, keys, values, n_slots, token_of, position):
    """Attention of rows [R, D] to the tokens of `n_slots` slots -> out [R, D], lse [R]."""
    query = load(query, np.arange(len(query)), position >= 0)
    size = -(-n_slots // (TILE * N_SPLITS)) * TILE  # of a split, in whole tiles; the last ones may be empty
    ranges = [range(i * size, min((i + 1) * size, n_slots)) for i in range(N_SPLITS)]
    out, lse = _merged([_split(query, keys, values, slots, token_of, position) for slots in ranges])
    return out[:, : keys.shape[1]], lse


def sparse_attention(query, keys, values, indices, lengths, block_size, *, return_lse=False):
    """2.4: query [B, Hq, D] over the valid tokens of the selected blocks -> [B, Hq, D], lse [B, Hq]."""
    (batch, heads, _), (_, kv_heads, capacity, _) = query.shape, keys.shape
    group, n_slots = heads // kv_heads, indices.shape[2] * block_size
    # An index far past the end must not leave 32 bits when it is multiplied.
    indices = np.clip(indices, -1, -(-capacity // block_size)).astype(np.int32)
    out, lse = np.empty(query.shape, F32), np.empty(query.shape[:2], F32)
    for s, h in np.ndindex(batch, kv_heads):

        def token_of(slots, row=indices[s, h], length=lengths[s]):
            block = row[slots // block_size]
            token = block * block_size + slots % block_size
            return np.where((block >= 0) & (token < length), token, -1)

        rows, position = slice(h * group, (h + 1) * group), np.full(group, lengths[s] - 1)
        each = attend(query[s, rows], keys[s, h], values[s, h], n_slots, token_of, position)
        out[s, rows], lse[s, rows] = each
    return (out, lse) if return_lse else out


def dense_attention(query, keys, values, lengths, *, query_lengths=None, return_lse=False):
    """2.5: a window of queries [B, Hq, Q, D] over the whole cache -> [B, Hq, Q, D], lse [B, Hq, Q]."""
    (batch, heads, n_queries, head_dim), kv_heads = query.shape, keys.shape[1]
    group, n_tiles = heads // kv_heads, -(-n_queries // ROWS)
    windows = np.full(batch, n_queries) if query_lengths is None else query_lengths
    out, lse = np.zeros(query.shape, F32), np.full(query.shape[:3], -math.inf, F32)
    for s, h, tile in np.ndindex(batch, kv_heads, n_tiles):
        # The tile's rows: every head of the group with every query.
        i = np.arange(tile * ROWS, min((tile + 1) * ROWS, n_queries))
        position = np.where(i < windows[s], lengths[s] - windows[s] + i, -1)
        rows = query[s, h * group : (h + 1) * group, i[0] : i[-1] + 1].reshape(-1, head_dim)
        n_slots = max(0, int(position.max()) + 1)  # causal: no row of the tile sees more
        each = attend(rows, keys[s, h], values[s, h], n_slots, lambda slots: slots, np.tile(position, group))
        place = s, slice(h * group, (h + 1) * group), slice(i[0], i[-1] + 1)
        out[place], lse[place] = (part.reshape(group, len(i), *part.shape[1:]) for part in each)
    return (out, lse) if return_lse else out


# ---- 2.6, 2.7 Sketches -----------------------------------------------------------------------------------------------


def rotated(x):
    """2.6: rotate x [..., D] in float32 -> [..., width], zeros in padded channels."""
    head_dim, width = x.shape[-1], padded(x.shape[-1])
    hashed = np.arange(1, head_dim + 1, dtype=np.uint32) * np.uint32(2654435761)  # wraps, as it should
    hashed = (hashed ^ (hashed >> 15)) * np.uint32(2246822519)
    tile = np.zeros((*x.shape[:-1], width), F32)
    tile[..., :head_dim] = np.where(hashed >> 31, -x, x)
    run, stride, channels = head_dim & -head_dim, 1, np.arange(width)
    while stride < run:
        partner = tile[..., channels ^ stride]  # a shuffle between lanes
        tile = np.where(channels & stride, partner - tile, tile + partner)
        stride *= 2
    return tile * F32(run**-0.5)


def sketch_keys(keys, bits=2):
    """2.6: keys [B, Hkv, T_max, D] -> codes [B, Hkv, T_max, D bits / 8] uint8, scales [B, Hkv, T_max]."""
    head_dim, is_lost = keys.shape[-1], ~np.isfinite(keys).all(axis=-1)
    r = rotated(np.where(is_lost[..., None], F32(0), keys))[..., :head_dim]
    step = F32(0.9957) * np.sqrt((r * r).sum(axis=-1, keepdims=True) / F32(head_dim))
    thresholds = (0 * step,) if bits == 1 else (-step, 0 * step, step)
    levels = sum((r >= threshold).astype(np.uint32) for threshold in thresholds)
    code = 2 * levels.astype(F32) - 1 if bits == 1 else levels.astype(F32) - F32(1.5)
    scales = (r * code).sum(axis=-1) / (code * code).sum(axis=-1)

    # Pack: the first channel of a byte takes its lowest bits.
    levels = np.where(is_lost[..., None], 0, levels).reshape(*keys.shape[:-1], -1, 8 // bits)
    codes = (levels << np.arange(0, 8, bits, dtype=np.uint32)).sum(axis=-1).astype(np.uint8)
    return codes, np.where(is_lost, F32(math.nan), scales)


def unpacked(codes, bits, head_dim):
    """Codes [n, D bits / 8] as c [n, width], read in 32-bit words; padded channels are 0."""
    words = np.zeros((len(codes), -(-codes.shape[1] // 4) * 4), np.uint8)
    words[:, : codes.shape[1]] = codes
    words = words.view("<u4")
    bit, channels = np.arange(head_dim) * bits, padded(head_dim)
    levels = (words[:, bit // 32] >> (bit % 32).astype(np.uint32) & (2**bits - 1)).astype(F32)
    tile = np.zeros((len(codes), channels), F32)
    tile[:, :head_dim] = 2 * levels - 1 if bits == 1 else levels - F32(1.5)
    return tile


def _logits(query, codes, scales, first, length, block_size):
    """Estimates for the blocks from `first` on: query [G, width], rotated and scaled -> logits [G, n], lost [n]."""
    tokens = first * block_size + np.arange(BLOCKS * block_size)
    valid = tokens < length
    bits = 8 * codes.shape[1] // query.shape[1]
    scale = np.where(valid, scales[np.where(valid, tokens, 0)], F32(0))
    code = unpacked(codes[np.where(valid, tokens, 0)], bits, query.shape[1])
    is_lost = np.isnan(scale)
    logits = rotated(query) @ code.T * F32(query.shape[1] ** -0.5) * np.where(is_lost, F32(0), scale)
    return np.where(valid & ~is_lost, logits, -math.inf), is_lost


def _masses(query, codes, scales, length, block_size, n_blocks):
    """Masses of one KV head's blocks, in two passes over the sketches: query [G, D] -> [M]."""
    firsts = range(0, -(-int(length) // block_size), BLOCKS)

    # The maximum and the sum, online.
    m, z = np.full(len(query), -math.inf, F32), np.zeros(len(query), F32)
    for first in firsts:
        logits, _ = _logits(query, codes, scales, first, length, block_size)
        peak = np.maximum(m, logits.max(axis=1))
        shift = np.where(peak == -math.inf, F32(0), peak)
        z, m = z * np.exp(m - shift) + np.exp(logits - shift[:, None]).sum(axis=1), peak

    # The mass of every block.
    masses = np.full(n_blocks + BLOCKS, -math.inf, F32)  # room for the last tile
    shift, z = np.where(m == -math.inf, F32(0), m), np.where(z > 0, z, F32(1))
    for first in firsts:
        logits, is_lost = _logits(query, codes, scales, first, length, block_size)
        mass = (np.exp(logits - shift[:, None]) / z[:, None]).sum(axis=0)  # over the heads of the group
        mass = np.where(is_lost, F32(math.nan), mass).reshape(BLOCKS, block_size).sum(axis=1)
        is_block = (first + np.arange(BLOCKS)) * block_size < length
        masses[first : first + BLOCKS] = np.where(is_block, mass, -math.inf)
    return masses[:n_blocks]


def score_sketch(query, codes, scales, lengths, block_size):
    """2.7: query [B, Hq, D], codes and scales of every key -> [B, Hkv, M]."""
    batch, kv_heads, capacity, _ = codes.shape
    group, n_blocks = query.shape[1] // kv_heads, -(-capacity // block_size)
    scores = np.empty((batch, kv_heads, n_blocks), F32)
    for s, h in np.ndindex(batch, kv_heads):
        heads = query[s, h * group : (h + 1) * group]
        scores[s, h] = _masses(heads, codes[s, h], scales[s, h], lengths[s], block_size, n_blocks)
    return scores


# ---- 3 The model -----------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) · weight, in float32."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + F32(eps)) * weight


def rope(x, cos, sin):
    """Turn channels of the first half with those of the second: x [H, n, D], cos, sin [n, D / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


class Decoder:
    """Weights, and the cache of one sequence: keys and values [layer, Hkv, T_max, D], bounds or sketches with them."""

    def __init__(self, weights, shape, config, capacity):
        self.weights, self.shape, self.config = weights, shape, config
        self.block_size, self.length, self.window = config["block_size"], 0, 0
        self.bits = config["sketch_bits"] if config.get("selection") == "sketch" else None
        size = shape["n_layer"], shape["n_kv_head"], capacity, shape["head_dim"]
        self.keys, self.values = np.zeros(size, F32), np.zeros(size, F32)
        self.bounds = np.empty((*size[:2], 2, size[3], -(-capacity // self.block_size)), F32)
        self.bounds[:, :, 0], self.bounds[:, :, 1] = math.inf, -math.inf
        self.codes = np.zeros((*size[:3], size[3] * (self.bits or 0) // 8), np.uint8)
        self.scales = np.zeros(size[:3], F32)

        # One table of angles for all positions, from float64.
        powers = float(shape["rope_theta"]) ** (-2 * np.arange(size[3] // 2) / size[3])
        angles = np.outer(np.arange(capacity), powers)
        self.cos, self.sin = np.cos(angles).astype(F32), np.sin(angles).astype(F32)

    def write(self, layer, key, value, start):
        """Store rows [Hkv, n, D] from `start` on, with their sketches or the bounds of the blocks they touch."""
        end, b = start + key.shape[1], self.block_size
        self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value
        if self.bits is not None:
            self.codes[layer, :, start:end], self.scales[layer, :, start:end] = sketch_keys(key, self.bits)
            return
        if start == self.length and end == start + 1:  # an append: bounds are extended
            low, high = self.bounds[layer, :, 0, :, start // b], self.bounds[layer, :, 1, :, start // b]  # views
            np.minimum(low, key[:, 0], out=low)
            np.maximum(high, key[:, 0], out=high)
            return
        for i in range(start // b, -(-end // b)):  # anything else: rebuilt
            for h in range(len(key)):
                self.bounds[layer, h, :, :, i] = _bounds(self.keys[layer, h], i * b, end, b)

    def linear(self, name, x, has_bias=False):
        """x [n, inputs] -> [n, outputs], by the projection of that name."""
        y = np.einsum("ni,oi->no", x, self.weights[f"{name}.weight"])  # a row's bits do not depend on the others
        return y + self.weights[f"{name}.bias"] if has_bias else y

    def forward(self, tokens, start, attention):
        """Feed tokens at start, start + 1, … -> logits after the last; attention(layer, query) -> [Hq, n, D]."""
        shape, w, eps, n = self.shape, self.weights, self.shape["norm_eps"], len(tokens)
        cos, sin = self.cos[start : start + n], self.sin[start : start + n]
        x = w["embed.weight"][tokens]  # [n, C]
        for layer in range(shape["n_layer"]):
            at = f"layers.{layer}"
            y = rms_norm(x, w[f"{at}.attn_norm.weight"], eps)
            projected = (self.linear(f"{at}.attn.{name}_proj", y, shape["qkv_bias"]) for name in "qkv")
            q, k, v = (heads.reshape(n, -1, shape["head_dim"]).swapaxes(0, 1) for heads in projected)
            if shape["qk_norm"]:
                q = rms_norm(q, w[f"{at}.attn.q_norm.weight"], eps)
                k = rms_norm(k, w[f"{at}.attn.k_norm.weight"], eps)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
            self.write(layer, k, v, start)
            mixed = attention(layer, q).swapaxes(0, 1).reshape(n, -1)
            x = x + self.linear(f"{at}.attn.o_proj", mixed)
            y = rms_norm(x, w[f"{at}.mlp_norm.weight"], eps)
            gate = self.linear(f"{at}.mlp.gate_proj", y)
            x = x + self.linear(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * self.linear(f"{at}.mlp.up_proj", y))
        output = w["embed.weight" if shape["tied_embeddings"] else "output.weight"]
        return rms_norm(x[-1], w["norm.weight"], eps) @ output.T

    # ---- 4 Decoding --------------------------------------------------------------------------------------------------

    def dense_pass(self, tokens, start):
        """4.1, 4.3: one pass over the tokens from `start` on, encoded for the first time or anew."""
        end = start + len(tokens)

        def attention(layer, query):
            return dense_attention(query[None], self.keys[layer][None], self.values[layer][None], [end])[0]

        logits = self.forward(tokens, start, attention)
        self.length, self.window = end, 0
        return logits

    def sparse_step(self, token):
        """4.2: append one token; every layer scores, selects, attends -> logits, indices [layer, Hkv, N]."""
        lengths, b, chosen = [self.length + 1], self.block_size, []

        def attention(layer, query):
            query, keys, values = query[None, :, 0], self.keys[layer][None], self.values[layer][None]
            if self.bits is None:
                scores = score_blocks(query, self.bounds[layer][None], lengths, b)
            else:
                scores = score_sketch(query, self.codes[layer][None], self.scales[layer][None], lengths, b)
            chosen.append(select_blocks(scores, lengths, self.config))
            return sparse_attention(query, keys, values, chosen[-1], lengths, b)[0][:, None]

        logits = self.forward([token], self.length, attention)
        self.length, self.window = self.length + 1, self.window + 1
        return logits, np.concatenate(chosen)

    def entry(self, indices, token):
        """One entry of the trace (4.6): copies of all there is."""
        names = ("bounds",) if self.bits is None else ("codes", "scales")
        arrays = {name: getattr(self, name).copy() for name in names}
        arrays |= {name: getattr(self, name)[:, :, : self.length].copy() for name in ("keys", "values")}
        return {**arrays, "indices": indices, "token": token, "window": self.window}


def decode_trace(weights, model_config, prompt, config):
    """4: greedy generation of config["max_new_tokens"] tokens; what there is after the prefill and after every step."""
    n_tokens, interval, schedule = config["max_new_tokens"], config["interval"] or math.inf, config["schedule"]
    decoder, fed = Decoder(weights, model_config, config, len(prompt) + n_tokens), list(prompt)
    logits, trace = decoder.dense_pass(fed, 0), []
    trace.append(decoder.entry(None, int(logits.argmax())))
    while len(trace) < n_tokens:  # the last token is never fed
        indices, start = None, decoder.length - decoder.window  # where the window begins
        fed.append(trace[-1]["token"])
        if schedule == "fused" and decoder.window + 1 >= interval:
            logits = decoder.dense_pass(fed[start:], start)
        else:
            logits, indices = decoder.sparse_step(fed[-1])
        if schedule == "paper" and decoder.window >= interval:
            decoder.dense_pass(fed[start:], start)  # its logits are discarded
        trace.append(decoder.entry(indices, int(logits.argmax())))
    return trace[:n_tokens]  # no entry where no token is asked for
