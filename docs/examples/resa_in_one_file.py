"""Rectified sparse attention in one file of NumPy. Run it: python docs/examples/resa_in_one_file.py

To write one token, a language model reads the keys and values of all tokens before it: the KV cache. In a long text
this takes most of the time. Rectified Sparse Attention (Sun et al., arXiv 2506.04108) alternates two kinds of steps:

 1. A sparse step reads only a few blocks of the cache. It sees only part of the text, so the keys and values that it
    adds to the cache are a little wrong. Later tokens read them, and errors grow.
 2. Every f tokens, a dense pass runs the newest f tokens through the model again. Now they attend to everything, and
    their new keys and values replace the wrong ones. The cache is exact again: it has been rectified.

Shapes: C channels per token, D per head. Hq query heads, G for each of the Hkv KV heads. T tokens in the cache, Q fed
at once. The cache has M blocks of b tokens. A sparse step reads n of them. Equation numbers are the paper's.
"""

import base64
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np

BLOCK_SIZE = 16  # b, tokens per block
ACTIVE_RATIO = 0.1  # p, share of all blocks that a sparse step reads
MIN_BLOCKS = 4  # n_min, fewest blocks that it reads; the text below is short, so this number decides
LOCAL_BLOCKS = 1  # n_local, newest blocks that it always reads
INTERVAL = 8  # f, tokens per dense pass

# The model is small and was trained to follow programs. Its files come with the project.
FOLDER = next(up / "reference/weights/assets" for up in Path(__file__).resolve().parents if (up / "reference").is_dir())
N_LAYER, N_KV_HEAD, HEAD_DIM = 12, 2, 64  # layers, Hkv, D
ROPE_THETA, NORM_EPS = 10_000.0, 1e-6

# The text is a program. Its first 16 names get the digits of pi, every later name the value of the name 16 lines above.
# A line such as `method = path` does not say the digit: the model has to carry it in the keys and values of that line.
# At the end the program asks for the values of the last 16 names. At each question mark the model writes a digit.
NAMES = """path node lock version code time line test place device edge result module group root date
method text layout view index local string order point rank state user work call part message
mask doc limit axis core script tree copy sign width model style side label scale level
mark table mode frame parent prefix sample stream host event batch domain factor body image record"""
NAMES, DIGITS, BLANK = NAMES.split(), "3141592653589793", ord("?")  # the first 256 tokens are bytes
PROMPT = "".join(f"{name} = {digit}\n" for name, digit in zip(NAMES[:16], DIGITS, strict=True))
SCRIPT = "".join(f"{NAMES[i]} = {NAMES[i - 16]}\n" for i in range(16, 64))
SCRIPT += "\n".join(f"assert {name} == ?" for name in NAMES[48:])


def load_weights(path):
    """Read a safetensors file: 8 bytes with the length of its header, the header in JSON, then the numbers."""
    content, weights = path.read_bytes(), {}
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        numbers = content[start + first : start + end]
        if entry["dtype"] == "F32":  # a scale for each row of a matrix; all scales come first in the file
            weights[name] = np.frombuffer(numbers, np.float32)[:, None]
        elif entry["dtype"] == "U8":  # a matrix of 8-bit integers, compressed
            scale = weights[name + ".scale"]
            weights[name] = np.frombuffer(zlib.decompress(numbers), np.int8).reshape(len(scale), -1) * scale
        else:  # a vector in bfloat16, which is the upper half of float32
            weights[name] = (np.frombuffer(numbers, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return weights


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + NORM_EPS) * weight


def rotate(x, cos, sin):
    first, second = np.split(x, 2, axis=-1)  # [H, Q, D / 2] each
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def forward(weights, tokens, positions, attend):
    """Feed Q tokens -> logits after the last. This is an ordinary transformer, but its attention is an argument."""
    frequencies = ROPE_THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.outer(positions, frequencies).astype(np.float32)  # [Q, D / 2], for RoPE
    cos, sin = np.cos(angles), np.sin(angles)
    x = weights["embed.weight"][tokens]  # [Q, C]
    for layer in range(N_LAYER):
        normed = rms_norm(x, weights[f"layers.{layer}.attn_norm.weight"])
        projected = (normed @ weights[f"layers.{layer}.attn.{name}_proj.weight"].T for name in "qkv")
        query, key, value = (each.reshape(len(x), -1, HEAD_DIM).swapaxes(0, 1) for each in projected)  # [H, Q, D]
        out = attend(layer, rotate(query, cos, sin), rotate(key, cos, sin), value)  # [Hq, Q, D]
        x = x + out.swapaxes(0, 1).reshape(len(x), -1) @ weights[f"layers.{layer}.attn.o_proj.weight"].T

        normed = rms_norm(x, weights[f"layers.{layer}.mlp_norm.weight"])
        gate, up = (normed @ weights[f"layers.{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"layers.{layer}.mlp.down_proj.weight"].T  # SwiGLU
    return weights["embed.weight"] @ rms_norm(x[-1], weights["norm.weight"])


class Cache:
    """Keys and values of all tokens, and the bounds of all blocks: smallest and largest key, per channel (eq. 3)."""

    def __init__(self, capacity):
        n_blocks = math.ceil(capacity / BLOCK_SIZE)
        self.keys, self.values = np.zeros((2, N_LAYER, N_KV_HEAD, n_blocks * BLOCK_SIZE, HEAD_DIM), np.float32)
        self.lo, self.hi = np.zeros((2, N_LAYER, N_KV_HEAD, n_blocks, HEAD_DIM), np.float32)

    def write(self, layer, start, key, value):
        """Store keys and values [Hkv, Q, D] of the newest tokens, from position `start` on."""
        end = start + key.shape[1]
        self.keys[layer, :, start:end], self.values[layer, :, start:end] = key, value

        # Rebuild the bounds of these blocks. A running minimum could not forget a key that has been replaced.
        for i in range(start // BLOCK_SIZE, math.ceil(end / BLOCK_SIZE)):
            block = self.keys[layer, :, i * BLOCK_SIZE : min((i + 1) * BLOCK_SIZE, end)]  # [Hkv, up to b, D]
            self.lo[layer, :, i], self.hi[layer, :, i] = block.min(axis=1), block.max(axis=1)


def attention(query, keys, values, visible):
    """Softmax attention over visible tokens: query [Hq, Q, D], keys and values [Hkv, T, D] -> [Hq, Q, D]."""
    grouped = query.reshape(N_KV_HEAD, -1, *query.shape[1:])  # [Hkv, G, Q, D]
    logits = grouped @ keys[:, None].swapaxes(2, 3) * HEAD_DIM**-0.5  # [Hkv, G, Q, T]
    logits = np.where(visible, logits, -np.inf)  # visible [Q, T], or [Hkv, 1, 1, T]
    mass = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (mass / mass.sum(axis=-1, keepdims=True) @ values[:, None]).reshape(query.shape)


def score_blocks(query, lo, hi):
    """The largest product that a query could have with a key between a block's bounds (eq. 4) -> [Hkv, M]."""
    pooled = query.reshape(N_KV_HEAD, -1, HEAD_DIM).mean(axis=1, keepdims=True)  # [Hkv, 1, D], mean of G heads
    return np.maximum(pooled * lo, pooled * hi).sum(axis=-1)


def select_blocks(scores):
    """The newest blocks, then those with the highest scores, n in all (eq. 5) -> their numbers [Hkv, n]."""
    n = max(MIN_BLOCKS, math.ceil(ACTIVE_RATIO * scores.shape[1] - 1e-9))  # 1e-9 absorbs rounding
    scores[:, -LOCAL_BLOCKS:] = np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :n]


def sparse_step(weights, cache, token, position):
    """Feed one token that attends to selected blocks alone (eq. 2) -> logits for the next."""
    n_blocks = math.ceil((position + 1) / BLOCK_SIZE)

    def attend(layer, query, key, value):
        cache.write(layer, position, key, value)
        scores = score_blocks(query, cache.lo[layer, :, :n_blocks], cache.hi[layer, :, :n_blocks])
        first = select_blocks(scores)[:, :, None] * BLOCK_SIZE  # [Hkv, n, 1], position of each block's first token
        chosen = (first + np.arange(BLOCK_SIZE)).reshape(N_KV_HEAD, -1)  # [Hkv, n · b], positions of all its tokens
        keys, values = (np.take_along_axis(x[layer], chosen[:, :, None], axis=1) for x in (cache.keys, cache.values))
        return attention(query, keys, values, visible=(chosen <= position)[:, None, None])

    return forward(weights, [token], [position], attend)


def dense_pass(weights, cache, tokens, start):
    """Feed tokens from position `start` on; each attends to itself and all before it -> logits after the last."""
    end = start + len(tokens)
    visible = np.arange(end) <= np.arange(start, end)[:, None]  # [Q, T]

    def attend(layer, query, key, value):
        cache.write(layer, start, key, value)  # replaces what is wrong before anything reads it
        return attention(query, cache.keys[layer, :, :end], cache.values[layer, :, :end], visible)

    return forward(weights, tokens, range(start, end), attend)


def decode(weights, prompt, script, interval):
    """Read a prompt, then feed a script token by token. Where it is BLANK, feed the likeliest token instead."""
    tokens, cache = list(prompt), Cache(len(prompt) + len(script))
    logits = dense_pass(weights, cache, tokens, start=0)
    for count, token in enumerate(script, start=1):
        tokens.append(int(logits.argmax()) if token == BLANK else token)
        # A dense pass feeds every f-th token and rectifies the f - 1 before it (schedule "fused" of reference/).
        # With interval 1 every pass is dense, and with None nothing is ever rectified.
        if interval and count % interval == 0:
            logits = dense_pass(weights, cache, tokens[-interval:], start=len(tokens) - interval)
        else:
            logits = sparse_step(weights, cache, tokens[-1], position=len(tokens) - 1)
    return tokens, cache


def wrong_tokens(weights, cache, tokens):
    """Count tokens whose cached keys or values differ from those of a dense prefill by more than rounding."""
    exact = Cache(len(tokens))
    dense_pass(weights, exact, tokens, start=0)
    error = np.maximum(abs(cache.keys - exact.keys), abs(cache.values - exact.values))  # [layer, Hkv, T, D]
    return (error.max(axis=(0, 1, 3)) > 1e-3).sum()


if __name__ == "__main__":
    weights = load_weights(FOLDER / "carrying.safetensors")
    vocabulary = [base64.b64decode(line.split()[0]) for line in (FOLDER / "code.tiktoken").read_bytes().splitlines()]
    pieces = (re.findall(r" ?[a-z]+| =+|.|\n", text) for text in (PROMPT, SCRIPT))  # each piece is one token
    prompt, script = ([vocabulary.index(piece.encode()) for piece in each] for each in pieces)
    print(f"{'asked for':12}{DIGITS}")
    for way, interval in (("dense", 1), ("sparse", None), ("rectified", INTERVAL)):
        tokens, cache = decode(weights, prompt, script, interval)
        digits = re.findall("== (.)", b"".join(vocabulary[token] for token in tokens).decode())
        n_wrong = sum(digit != true for digit, true in zip(digits, DIGITS, strict=True))
        in_cache = wrong_tokens(weights, cache, tokens)
        print(f"{way:12}{''.join(digits)}{n_wrong:6} digits wrong {in_cache:6} of {len(tokens)} cached tokens wrong")
    # Rectification repairs only the cache: the wrong digits stay.
    dense_pass(weights, cache, tokens[-INTERVAL:], start=len(tokens) - INTERVAL)
    print(f"and once more{wrong_tokens(weights, cache, tokens):41} of {len(tokens)} cached tokens wrong")
