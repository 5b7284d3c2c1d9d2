"""The KV cache of one sequence: keys and values of every layer, and the bounds of their blocks.

It keeps one promise: `bounds` always equal what `block_bounds` gives for the cached keys (law 2).
So every method that changes keys rebuilds the bounds of the blocks it touches. A running minimum
would not do: it cannot forget a key that a rectification has overwritten.

With `sketch_bits` it keeps sketches instead of bounds. These belong to single keys (law 12).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .blocks import block_bounds
from .config import GPTConfig
from .sketch import sketch_keys


@dataclass
class KVCache:
    """The tensors of one sequence, a batch of one because the operations take batches.

    Slots at or past `length` hold anything at all, and nothing reads them.
    """

    keys: Tensor  # [layer, 1, Hkv, T_max, D]
    values: Tensor  # [layer, 1, Hkv, T_max, D]
    bounds: Tensor | None  # [layer, 1, Hkv, 2, D, M], M = ceil(T_max / b)
    length: int  # tokens cached
    block_size: int  # b, tokens per block
    sketch_bits: int | None = None  # per channel; None: bounds
    codes: Tensor | None = None  # [layer, 1, Hkv, T_max, D·bits/8] uint8
    scales: Tensor | None = None  # [layer, 1, Hkv, T_max]

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        capacity: int,
        block_size: int,
        sketch_bits: int | None = None,
        *,
        dtype=torch.float32,
        device="cpu",
    ) -> KVCache:
        """A cache with room for `capacity` tokens and none in it."""
        capacity = checks.require_integer("capacity", capacity, 0)
        block_size = checks.require_integer("block_size", block_size, 1)
        checks.require(
            dtype in checks.FLOATS, "dtype", dtype, "float16, bfloat16, float32 or float64"
        )
        shape = (config.n_layer, 1, config.n_kv_head, capacity, config.head_dim)
        if sketch_bits is not None:
            checks.check_sketch(sketch_bits, config.head_dim)
        checks.check_cache_memory(shape, block_size, dtype, torch.device(device), sketch_bits)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        values = torch.zeros_like(keys)
        if sketch_bits is not None:
            n_bytes = config.head_dim * sketch_bits // 8
            codes = torch.zeros(*shape[:-1], n_bytes, dtype=torch.uint8, device=device)
            scales = keys.new_zeros(shape[:-1])
            return cls(keys, values, None, 0, block_size, sketch_bits, codes, scales)

        # Blocks without keys have bounds too: +∞ and −∞.
        none = torch.zeros(1, dtype=torch.int32, device=device)
        bounds = torch.stack([block_bounds(layer, none, block_size) for layer in keys])
        return cls(keys, values, bounds, 0, block_size)

    @property
    def capacity(self) -> int:
        """T_max, the most tokens that fit."""
        return self.keys.shape[3]

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store one layer's keys and values [1, Hkv, Q, D] of the newest tokens, from `start` on.

        From `length` on they append, from an earlier position on they overwrite. The caller moves
        `length` after the last layer, so a token counts in all layers or in none.
        """
        end = start + keys.shape[2]
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values

        # Bounds are rebuilt from what stands there now; a sketch is its token's own.
        if self.sketch_bits is None:
            self._rebuild_bounds(layer, start, end, end)
        else:
            codes, scales = sketch_keys(keys, self.sketch_bits)
            self.codes[layer, :, :, start:end] = codes
            self.scales[layer, :, :, start:end] = scales

    def truncate(self, length: int) -> None:
        """Forget the tokens at and past position `length`."""
        is_shorter = checks.is_integer(length, 0) and length <= self.length
        checks.require(is_shorter, "length", repr(length), f"an integer 0 … {self.length}")
        # What belongs to a token may stay: nothing reads past the length. Bounds must not count it.
        if self.sketch_bits is None:
            for layer in range(len(self.keys)):
                self._rebuild_bounds(layer, length, self.length, length)
        self.length = int(length)

    def _rebuild_bounds(self, layer: int, start: int, end: int, length: int) -> None:
        """Rebuild the bounds of the blocks at positions start … end − 1; `length` keys count."""
        # The blocks touched, first … stop − 1; `start` may lie inside a block.
        b = self.block_size
        first, stop = start // b, -(-end // b)
        keys = self.keys[layer, :, :, first * b : stop * b]
        lengths = torch.tensor([length - first * b], device=keys.device)
        self.bounds[layer, ..., first:stop] = block_bounds(keys, lengths, b)
