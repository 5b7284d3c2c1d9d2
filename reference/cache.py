"""The KV cache: keys, values, their block bounds, and one length per sequence.

The cache keeps one promise: `bounds` always equal what `block_bounds` gives for the keys up to `lengths`,
rebuilt from scratch (law 2). Every method that changes keys refreshes the bounds of just the blocks it touched.
A running minimum could not do that: once a rectification has overwritten a key, its old extreme can't be undone.

The rule for bounds itself stands to the right of this file, in `blocks.py`; the cache is handed it on construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, bind_shapes, check_dtypes, check_lengths, is_integer, require
from .config import GPTConfig

BlockBounds = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class KVCache:
    """Keys and values of every layer for a ragged batch of sequences.

    Slots at or past a sequence's length hold anything at all; nothing reads them.
    """

    keys: Tensor  # [layer, B, Hkv, T_max, D]
    values: Tensor  # [layer, B, Hkv, T_max, D]
    bounds: Tensor  # [layer, B, Hkv, 2, D, M], M = ceil(T_max / b)
    lengths: Tensor  # [B] int32, valid tokens
    block_size: int  # b
    block_bounds: BlockBounds

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        batch: int,
        capacity: int,
        block_size: int,
        block_bounds: BlockBounds,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache without tokens for `batch` sequences of up to `capacity` tokens each."""
        require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
        require(is_integer(capacity, 0), "capacity", capacity, "an integer ≥ 0")
        require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
        require(dtype in FLOATS, "dtype", dtype, "float16, bfloat16, float32 or float64")
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        bounds = torch.stack([block_bounds(layer, lengths, block_size) for layer in keys])
        return cls(keys, torch.zeros_like(keys), bounds, lengths, block_size, block_bounds)

    @property
    def capacity(self) -> int:
        """T_max, the most tokens a sequence can hold."""
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor, start: Tensor, counts: Tensor) -> None:
        """Store one layer's newest window: the first `counts[s]` of the `Q` tokens, from position `start[s]` on.

        A window that starts at the sequence's length appends, one that starts earlier overwrites; a fused
        rectification does both at once. It must leave no gap and reach at least to the length, because tokens
        behind it would have been computed from what it replaces. `counts[s] = 0` leaves sequence `s` alone.

        keys, values [B, Hkv, Q, D]; start, counts [B]. Lengths move only at `commit`, after the last layer.
        """
        sizes = bind_shapes(
            cache=(self.keys[layer], "B Hkv T_max D"),
            keys=(keys, "B Hkv Q D"),
            values=(values, "B Hkv Q D"),
            start=(start, "B"),
            counts=(counts, "B"),
        )
        check_dtypes(FLOATS, cache=self.keys, keys=keys, values=values)
        check_lengths("counts", counts, sizes["Q"])
        self._check_window(start, start + counts)
        slots = torch.arange(sizes["Q"], device=keys.device)
        row, column = (slots < counts[:, None]).nonzero(as_tuple=True)  # of the window's tokens
        position = start[row] + column
        self.keys[layer][row, :, position] = keys[row, :, column]  # [tokens, Hkv, D]
        self.values[layer][row, :, position] = values[row, :, column]
        self._refresh_bounds(layer, start, start + counts, sizes["Q"])

    def commit(self, lengths: Tensor) -> None:
        """Make `lengths` [B] the valid lengths, once every layer has been written up to them."""
        bind_shapes(cache=(self.lengths, "B"), lengths=(lengths, "B"))
        check_lengths("lengths", lengths, self.capacity)
        self.lengths = lengths.to(torch.int32)

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens at and past `lengths` [B], none of which may exceed the present length."""
        bind_shapes(cache=(self.lengths, "B"), lengths=(lengths, "B"))
        check_lengths("lengths", lengths, self.capacity)
        require(bool((lengths <= self.lengths).all()), "lengths", lengths.tolist(), f"≤ {self.lengths.tolist()}")
        first_slot = torch.arange(self.bounds.shape[-1], device=lengths.device) * self.block_size
        emptied = (first_slot >= lengths[:, None])[:, None, None]  # [B, 1, 1, M]
        self.bounds[:, :, :, 0].masked_fill_(emptied, float("inf"))
        self.bounds[:, :, :, 1].masked_fill_(emptied, float("-inf"))
        for layer in range(self.keys.shape[0]):
            self._refresh_bounds(layer, (lengths - 1).clamp(min=0), lengths, 1)  # the block cut through
        self.commit(lengths)

    def resized(self, capacity: int) -> KVCache:
        """A copy with room for `capacity` tokens per sequence; this cache stays as it is."""
        longest = int(self.lengths.max())
        require(is_integer(capacity, longest), "capacity", capacity, f"an integer ≥ the longest sequence, {longest}")
        kept = min(capacity, self.capacity)
        size = (*self.keys.shape[:3], capacity, self.keys.shape[4])
        keys, values = self.keys.new_zeros(size), self.values.new_zeros(size)
        keys[:, :, :, :kept] = self.keys[:, :, :, :kept]
        values[:, :, :, :kept] = self.values[:, :, :, :kept]
        bounds = torch.stack([self.block_bounds(layer, self.lengths, self.block_size) for layer in keys])
        return replace(self, keys=keys, values=values, bounds=bounds, lengths=self.lengths.clone())

    def _check_window(self, start: Tensor, end: Tensor) -> None:
        check_dtypes(INTEGERS, start=start)
        check_lengths("start + counts", end, self.capacity)
        used = end > start
        is_newest = ((start >= 0) & (start <= self.lengths) & (end >= self.lengths)) | ~used
        allowed = f"a window that begins at or before the lengths {self.lengths.tolist()} and reaches them"
        require(bool(is_newest.all()), "start", f"{start.tolist()} up to {end.tolist()}", allowed)

    def _refresh_bounds(self, layer: int, start: Tensor, end: Tensor, window: int) -> None:
        """Rebuild the bounds of the blocks that hold positions start … end − 1, at most `window` of them."""
        b, device = self.block_size, start.device
        n_touched = (window + b - 2) // b + 1  # a window of w tokens lies in at most this many blocks
        first = start // b
        block = first[:, None] + torch.arange(n_touched, device=device)  # [B, n]
        slot = (block[..., None] * b + torch.arange(b, device=device)).flatten(1)  # [B, n·b]
        row = torch.arange(len(start), device=device)[:, None]
        keys = self.keys[layer][row, :, slot.clamp(max=self.capacity - 1)].transpose(1, 2)  # [B, Hkv, n·b, D]
        lengths = (end - first * b).clamp(0, n_touched * b)
        bounds = self.block_bounds(keys, lengths, b)  # [B, Hkv, 2, D, n]
        row, column = ((block * b < end[:, None]) & (end > start)[:, None]).nonzero(as_tuple=True)
        self.bounds[layer][row, ..., block[row, column]] = bounds[row, ..., column]  # [blocks, Hkv, 2, D]
