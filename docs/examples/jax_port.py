"""Rectified sparse attention in JAX: a port of docs/porting.md, whose section numbers and letters are used here.

Everything compiled has static shapes: a cache of fixed capacity, lengths as arrays, masks instead of ragged loops.
Functions with a leading underscore work on one sequence, without a batch axis. The operations map them over the batch;
decoding calls them as they are, from one compiled function for the sparse step and one for the dense pass of a given
window width. Lengths, positions and tokens are traced: they cause no compilation.
"""

import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np

# What selection and the model need to know beyond the shapes of arrays: hashable, so that it can be static under jit.
Selection = namedtuple("Selection", "block_size active_ratio min_blocks local_blocks")
Model = namedtuple("Model", "n_layer n_kv_head head_dim rope_theta norm_eps")
# keys, values [layer, Hkv, capacity, D], bounds [layer, Hkv, 2, D, M]; the capacity is that of M whole blocks.
Cache = namedtuple("Cache", "keys values bounds")
# Instead of bounds: codes [layer, Hkv, capacity, D bits / 8], scales [layer, Hkv, capacity].
SketchCache = namedtuple("SketchCache", "keys values codes scales")

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _pick(kind, mapping):
    """The fields of `kind`, out of a mapping that has more."""
    return kind(*(mapping[name] for name in kind._fields))


def _bounds(keys, length, block_size):
    """keys [Hkv, T_max, D] -> [Hkv, 2, D, M]."""
    heads, slots, channels = keys.shape
    blocks = -(-slots // block_size)
    keys = jnp.pad(keys, ((0, 0), (0, -slots % block_size), (0, 0))).reshape(heads, blocks, block_size, channels)
    valid = (jnp.arange(blocks * block_size) < length).reshape(blocks, block_size, 1)
    low, high = jnp.where(valid, keys, jnp.inf).min(axis=2), jnp.where(valid, keys, -jnp.inf).max(axis=2)
    return jnp.stack([low, high], axis=1).swapaxes(2, 3)


def _scores(query, bounds, length, block_size):
    """query [Hq, D], bounds [Hkv, 2, D, M] -> [Hkv, M]."""
    heads, _, channels, blocks = bounds.shape
    pooled = query.astype(jnp.float32).reshape(heads, -1, channels).mean(axis=1)[..., None]
    bound = jnp.where(pooled >= 0, bounds[:, 1], bounds[:, 0])  # the one whose product is the larger
    product = jnp.where((pooled == 0) & jnp.isinf(bound), 0, pooled * bound)
    return jnp.where(jnp.arange(blocks) * block_size < length, product.sum(axis=1), -jnp.inf)


def _hadamard(x):
    """Rotate [..., D]: signs, then butterflies within runs of m channels, m the largest power of two that divides D."""
    channels = x.shape[-1]
    hashed = np.arange(1, channels + 1, dtype=np.uint64) * 2654435761 % 2**32
    hashed = (hashed ^ (hashed >> 15)) * 2246822519 % 2**32
    run, stride = channels & -channels, 1
    x = x.astype(jnp.float32) * np.where(hashed >> 31, -1, 1).astype(np.float32)
    while stride < run:
        first, second = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, 2, stride), -2, 0)
        x = jnp.stack([first + second, first - second], axis=-2).reshape(x.shape)
        stride *= 2
    return x * np.float32(run**-0.5)


def _sketch(keys, bits):
    """keys [Hkv, n, D] -> codes [Hkv, n, D bits / 8], scales [Hkv, n]."""
    rotated = _hadamard(keys)
    step = 0.9957 * jnp.sqrt(jnp.mean(rotated * rotated, axis=-1, keepdims=True))
    levels = sum((rotated >= limit).astype(jnp.uint8) for limit in ((0,) if bits == 1 else (-step, 0, step)))
    code = 2.0 * levels - 1 if bits == 1 else levels - 1.5
    scales = (rotated * code).sum(axis=-1) / (code * code).sum(axis=-1)
    lost = ~jnp.isfinite(keys).all(axis=-1)
    levels = jnp.where(lost[..., None], 0, levels).reshape(*keys.shape[:-1], -1, 8 // bits)
    codes = (levels << np.arange(0, 8, bits, dtype=np.uint8)).sum(axis=-1, dtype=jnp.uint8)
    return codes, jnp.where(lost, jnp.nan, scales)


def _masses(query, codes, scales, length, block_size):
    """query [Hq, D], codes [Hkv, T_max, D bits / 8], scales [Hkv, T_max] -> [Hkv, M]."""
    (heads, slots, width), channels = codes.shape, query.shape[-1]
    bits = 8 * width // channels
    levels = (codes[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & 2**bits - 1).reshape(heads, slots, channels)
    code = 2.0 * levels - 1 if bits == 1 else levels - 1.5
    logits = _einsum("hgd,hnd->hgn", _hadamard(query).reshape(heads, -1, channels), code) * channels**-0.5
    valid = jnp.arange(slots) < length
    seen = valid & ~jnp.isnan(scales)
    logits = jnp.where(seen[:, None], logits * scales[:, None], -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    mass = (weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)).sum(axis=1)  # over the group's heads
    mass = jnp.pad(jnp.where(valid & ~seen, jnp.nan, mass), ((0, 0), (0, -slots % block_size)))
    scores = mass.reshape(heads, -1, block_size).sum(axis=-1)
    return jnp.where(jnp.arange(scores.shape[-1]) * block_size < length, scores, -jnp.inf)


def _select(scores, length, selection):
    """scores [Hkv, M] -> [Hkv, N], N being the count at M blocks."""
    block_size, ratio, fewest, newest = selection
    capacity, blocks = scores.shape[-1], -(-length // block_size)
    # The counts of all possible M, as constants: they want float64, which a device may lack.
    every = np.arange(capacity + 1)
    counts = np.minimum(every, np.maximum(fewest, np.ceil(ratio * every - 1e-9))).astype(np.int32)
    index = jnp.broadcast_to(jnp.arange(capacity), scores.shape)
    tier = jnp.where(index >= blocks, 2, jnp.where(index >= blocks - newest, 0, 1))
    # Within a tier, lax.sort takes zeros of both signs for equal and puts NaN last, as the order asks.
    ranked = jax.lax.sort((tier, -scores, index), num_keys=3)[2][:, : counts[-1]]
    taken = jnp.arange(counts[-1]) < jnp.asarray(counts)[blocks]
    chosen = jnp.sort(jnp.where(taken, ranked, capacity))
    return jnp.where(chosen < capacity, chosen, -1)


def _attend(query, keys, values, visible):
    """query [Hkv, G, Q, D], keys, values [Hkv, n, D], visible [Hkv or 1, Q, n] -> out [Hq, Q, D], lse [Hq, Q]."""
    heads, group, width, channels = query.shape
    logits = _einsum("hgqd,hnd->hgqn", query, keys) * channels**-0.5
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    # A row that sees nothing has a finite peak too, below any real logit: -inf - -inf would be NaN.
    peak = logits.max(axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    values = jnp.where(visible.any(axis=1)[..., None], values, 0)  # a weight of 0 does not silence NaN
    out = _einsum("hgqn,hnd->hgqd", weights / jnp.where(total > 0, total, 1), values)
    return out.reshape(heads * group, width, channels), (peak + jnp.log(total)).reshape(heads * group, width)


def _sparse(query, keys, values, indices, length, block_size):
    """query [Hq, D], keys, values [Hkv, T_max, D], indices [Hkv, N] -> out [Hq, D], lse [Hq]."""
    heads, slots, channels = keys.shape
    indices = jnp.clip(indices, -1, -(-slots // block_size))  # so that the products cannot wrap around
    tokens = (indices[..., None] * block_size + jnp.arange(block_size)).reshape(heads, -1)
    visible = (tokens >= 0) & (tokens < length)
    tokens = jnp.where(visible, tokens, 0)[..., None]
    keys, values = (jnp.take_along_axis(array, tokens, axis=1) for array in (keys, values))
    out, lse = _attend(query.reshape(heads, -1, 1, channels), keys, values, visible[:, None])
    return out[:, 0], lse[:, 0]


def _dense(query, keys, values, length, window):
    """query [Hq, Q, D], its first `window` rows valid, keys, values [Hkv, T_max, D] -> out [Hq, Q, D], lse [Hq, Q]."""
    heads, slots, channels = keys.shape
    row = jnp.arange(query.shape[1])
    position = jnp.where(row < window, length - window + row, -1)
    visible = jnp.arange(slots) <= position[:, None]
    return _attend(query.reshape(heads, -1, len(row), channels), keys, values, visible[None])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch(function, static, *arrays):
    """function(*arrays of one sequence, *static) of every sequence, compiled."""
    return jax.vmap(lambda *sequence: function(*sequence, *static))(*arrays)


def block_bounds(keys, lengths, block_size):
    """Minima and maxima of every block's keys: [B, Hkv, T_max, D] -> [B, Hkv, 2, D, M] (section 2.1)."""
    return np.asarray(_batch(_bounds, (block_size,), keys, lengths))


def score_blocks(query, bounds, lengths, block_size):
    """Upper bounds of the pooled logits: [B, Hq, D], [B, Hkv, 2, D, M] -> [B, Hkv, M] (section 2.2)."""
    return np.asarray(_batch(_scores, (block_size,), query, bounds, lengths))


def select_blocks(scores, lengths, config):
    """The blocks to attend, ascending, then -1: [B, Hkv, M] -> [B, Hkv, N] (section 2.3)."""
    return np.asarray(_batch(_select, (_pick(Selection, config),), scores, lengths))


def sparse_attention(query, keys, values, indices, lengths, block_size, *, return_lse=False):
    """One token's attention to the blocks named: [B, Hq, D] -> [B, Hq, D], and lse [B, Hq] (section 2.4)."""
    out, lse = map(np.asarray, _batch(_sparse, (block_size,), query, keys, values, indices, lengths))
    return (out, lse) if return_lse else out


def dense_attention(query, keys, values, lengths, *, query_lengths=None, return_lse=False):
    """A window's causal attention: [B, Hq, Q, D] -> [B, Hq, Q, D], and lse [B, Hq, Q] (section 2.5)."""
    windows = np.full_like(lengths, query.shape[2]) if query_lengths is None else query_lengths
    out, lse = map(np.asarray, _batch(_dense, (), query, keys, values, lengths, windows))
    return (out, lse) if return_lse else out


def sketch_keys(keys, bits=2):
    """Code and scale of every key: [B, Hkv, T_max, D] -> [B, Hkv, T_max, D bits / 8], [B, Hkv, T_max] (section 2.6)."""
    return tuple(map(np.asarray, _batch(_sketch, (bits,), keys)))


def score_sketch(query, codes, scales, lengths, block_size):
    """Estimated mass of every block: [B, Hq, D], codes, scales -> [B, Hkv, M] (section 2.7)."""
    return np.asarray(_batch(_masses, (block_size,), query, codes, scales, lengths))


def _linear(weights, name, x):
    """x [n, inputs] -> [n, outputs], by the projection of that name, with a bias if it has one."""
    out = _einsum("ni,oi->no", x, weights[f"{name}.weight"])
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def _rms_norm(weights, name, x, eps):
    """x [..., C] -> [..., C], by the norm of that name."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weights[f"{name}.weight"]


def _turns(positions, capacity, channels, theta):
    """cos and sin [n, D/2] for RoPE at positions [n], all below the capacity."""
    powers = -2 * np.arange(channels // 2) / channels  # in float64: float32 angles lose digits as positions grow
    angles = np.outer(np.arange(capacity), float(theta) ** powers)
    return (jnp.asarray(table, jnp.float32)[positions] for table in (np.cos(angles), np.sin(angles)))


def _rope(x, cos, sin):
    """x [heads, n, D] -> [heads, n, D]."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _store(cache, layer, keys, values, start, block_size):
    """Write keys, values [Hkv, n, D] at start, start + 1, ... and their sketches, or bounds of the blocks touched."""
    width, write = keys.shape[1], jax.lax.dynamic_update_slice
    all_keys = write(cache.keys, keys[None], (layer, 0, start, 0))
    all_values = write(cache.values, values[None], (layer, 0, start, 0))
    if isinstance(cache, SketchCache):
        codes, scales = _sketch(keys, 8 * cache.codes.shape[-1] // keys.shape[-1])
        all_codes = write(cache.codes, codes[None], (layer, 0, start, 0))
        return SketchCache(all_keys, all_values, all_codes, write(cache.scales, scales[None], (layer, 0, start)))
    blocks = cache.bounds.shape[-1]
    touched = min((width + block_size - 2) // block_size + 1, blocks)  # the most, wherever in its block start lies
    first = jnp.minimum(start // block_size, blocks - touched)
    part = jax.lax.dynamic_slice_in_dim(all_keys[layer], first * block_size, touched * block_size, axis=1)
    rebuilt = _bounds(part, start + width - first * block_size, block_size)
    return Cache(all_keys, all_values, write(cache.bounds, rebuilt[None], (layer, 0, 0, 0, first)))


def _forward(model, block_size, weights, cache, tokens, start, attend):
    """Feed tokens [n] at start, start + 1, ...: the greedy choice after the last, the cache, a note of every layer.

    attend(q [Hq, n, D], the layer's keys, values and bounds, or codes and scales) returns its output [Hq, n, D] and the
    note. What is optional in the model (biases, norms of q and k, output weights) is there if its weights are.
    """
    width, notes = len(tokens), []
    linear = functools.partial(_linear, weights)
    norm = functools.partial(_rms_norm, weights, eps=model.norm_eps)
    cos, sin = _turns(start + jnp.arange(width), cache.keys.shape[2], model.head_dim, model.rope_theta)
    x = weights["embed.weight"][tokens]
    for layer in range(model.n_layer):
        at = f"layers.{layer}."
        y = norm(at + "attn_norm", x)
        projected = (linear(f"{at}attn.{name}_proj", y) for name in "qkv")
        q, k, v = (heads.reshape(width, -1, model.head_dim).swapaxes(0, 1) for heads in projected)
        if at + "attn.q_norm.weight" in weights:
            q, k = norm(at + "attn.q_norm", q), norm(at + "attn.k_norm", k)
        q, k = _rope(q, cos, sin), _rope(k, cos, sin)
        cache = _store(cache, layer, k, v, start, block_size)
        out, note = attend(q, *(array[layer] for array in cache))
        notes.append(note)
        x = x + linear(at + "attn.o_proj", out.swapaxes(0, 1).reshape(width, -1))
        y = norm(at + "mlp_norm", x)
        gate, up = jax.nn.silu(linear(at + "mlp.gate_proj", y)), linear(at + "mlp.up_proj", y)
        x = x + linear(at + "mlp.down_proj", gate * up)
    logits = linear("output" if "output.weight" in weights else "embed", norm("norm", x[-1:]))
    return jnp.argmax(logits[0]), cache, notes


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _dense_pass(model, selection, weights, cache, tokens, start):
    """Tokens [n] at start, against the whole cache: the token chosen next and the cache, now of start + n tokens."""

    def attend(q, keys, values, *_):
        return _dense(q, keys, values, start + len(tokens), len(tokens))[0], None

    return _forward(model, selection.block_size, weights, cache, tokens, start, attend)[:2]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _sparse_step(model, selection, weights, cache, token, start):
    """One token at start, against blocks selected: the token chosen next, the cache, the indices [layer, Hkv, N]."""
    length, block_size = start + 1, selection.block_size

    def attend(q, keys, values, *known):
        score = _masses if isinstance(cache, SketchCache) else _scores
        indices = _select(score(q[:, 0], *known, length, block_size), length, selection)
        return _sparse(q[:, 0], keys, values, indices, length, block_size)[0][:, None], indices

    chosen, written, indices = _forward(model, block_size, weights, cache, token[None], start, attend)
    return chosen, written, jnp.stack(indices)


def decode_trace(weights, model_config, prompt, config):
    """Greedy generation: the cache, selection, choice and w after the prefill and after every step (section 4.6)."""
    model, selection = _pick(Model, model_config), _pick(Selection, config)
    interval, fused = config["interval"] or np.inf, config["schedule"] == "fused"
    weights = {name: jnp.asarray(array) for name, array in weights.items()}
    ids = np.pad(np.asarray(prompt, np.int32), (0, config["max_new_tokens"]))  # what is cached, then what is pending
    capacity = len(ids) + -len(ids) % selection.block_size
    keys = jnp.zeros((model.n_layer, model.n_kv_head, capacity, model.head_dim))
    if config.get("selection") == "sketch":
        codes = jnp.zeros((*keys.shape[:3], model.head_dim * config["sketch_bits"] // 8), jnp.uint8)
        cache = SketchCache(keys, jnp.zeros_like(keys), codes, jnp.zeros(keys.shape[:3]))
    else:
        bounds = _batch(_bounds, (selection.block_size,), keys, np.zeros(model.n_layer, int))
        cache = Cache(keys, jnp.zeros_like(keys), bounds)
    trace, length, window = [], 0, 0
    for end in range(len(prompt), len(ids)):  # every step leaves that many tokens in the cache
        indices = None
        if not trace or (fused and window + 1 >= interval):
            chosen, cache = _dense_pass(model, selection, weights, cache, ids[length - window : end], length - window)
            window = 0
        else:
            chosen, cache, indices = _sparse_step(model, selection, weights, cache, ids[length], length)
            window += 1
            if not fused and window >= interval:
                _, cache = _dense_pass(model, selection, weights, cache, ids[end - window : end], end - window)
                window = 0
        length, ids[end] = end, chosen
        entry = {name: np.array(array) for name, array in cache._asdict().items()}  # copies: later steps write there
        entry |= {name: entry[name][:, :, :end] for name in ("keys", "values")}
        entry |= {"indices": None if indices is None else np.asarray(indices), "token": int(chosen)}
        trace.append(entry | {"window": window})
    return trace
