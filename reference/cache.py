"""The KV cache: keys, values, their block bounds, and one length per sequence; and the state of decoding around it.

The cache keeps one promise: `bounds` always equal what `block_bounds` gives for the keys up to `lengths`,
rebuilt from scratch (law 2). Every method that changes keys refreshes the bounds of just the blocks it touched.
A running minimum could not do that: once a rectification has overwritten a key, its old extreme can't be undone.

The rule for bounds itself stands to the right of this file, in `blocks.py`; the cache is handed it on construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, bind_shapes, check_dtypes, check_lengths, free_memory, is_integer, require
from .config import GPTConfig

BlockBounds = Callable[[Tensor, Tensor, int], Tensor]
NO_TOKEN = -1


@dataclass(frozen=True)
class Window:
    """Where a window of newest tokens lies in a ragged cache: its token slots, and the blocks they touch."""

    width: int  # Q, the most tokens of one sequence
    start: Tensor  # [B]
    end: Tensor  # [B]
    row: Tensor  # [tokens] sequence of each written token
    column: Tensor  # [tokens] its place in the window
    position: Tensor  # [tokens] its place in the cache
    slot: Tensor  # [B, n·b] every position of the n blocks that may be touched
    slots_in_use: Tensor  # [B] how many of those hold tokens
    block_row: Tensor  # [blocks] sequence of each touched block
    block_column: Tensor  # [blocks] its place among the n
    block: Tensor  # [blocks] its index in the cache

    @classmethod
    def plan(cls, start: Tensor, end: Tensor, width: int, block_size: int) -> Window:
        """Index positions start … end − 1 of each sequence, at most `width` of them."""
        device = start.device
        row, column = (torch.arange(width, device=device) < (end - start)[:, None]).nonzero(as_tuple=True)
        n_touched = (width + block_size - 2) // block_size + 1  # a window of w tokens lies in at most so many
        first = start // block_size
        block = first[:, None] + torch.arange(n_touched, device=device)  # [B, n]
        slot = (block[..., None] * block_size + torch.arange(block_size, device=device)).flatten(1)
        slots_in_use = (end - first * block_size).clamp(0, n_touched * block_size)
        is_touched = (block * block_size < end[:, None]) & (end > start)[:, None]
        block_row, block_column = is_touched.nonzero(as_tuple=True)
        touched = block[block_row, block_column]
        position = start[row] + column
        return cls(width, start, end, row, column, position, slot, slots_in_use, block_row, block_column, touched)


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
        _check_memory(shape, block_size, dtype, torch.device(device))
        keys = torch.zeros(shape, dtype=dtype, device=device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        bounds = torch.stack([block_bounds(layer, lengths, block_size) for layer in keys])
        return cls(keys, torch.zeros_like(keys), bounds, lengths, block_size, block_bounds)

    @property
    def capacity(self) -> int:
        """T_max, the most tokens a sequence can hold."""
        return self.keys.shape[3]

    def open_window(self, start: Tensor, counts: Tensor, width: int) -> Window:
        """Check and index the window of newest tokens that a pass is about to write, once for all layers.

        Sequence s writes counts[s] ≤ `width` tokens from position start[s] on. A window that starts at the
        sequence's length appends, one that starts earlier overwrites; a fused rectification does both at once.
        It must leave no gap and reach at least to the length, because tokens behind it would have been computed
        from what it replaces. `counts[s] = 0` leaves sequence s alone. start, counts [B].
        """
        bind_shapes(cache=(self.lengths, "B"), start=(start, "B"), counts=(counts, "B"))
        check_dtypes(INTEGERS, start=start)
        check_lengths("counts", counts, width)
        end = start + counts
        check_lengths("start + counts", end, self.capacity)
        is_newest = ((start >= 0) & (start <= self.lengths) & (end >= self.lengths)) | (counts == 0)
        allowed = f"a window that begins at or before the lengths {self.lengths.tolist()} and reaches them"
        require(bool(is_newest.all()), "start", f"{start.tolist()} up to {end.tolist()}", allowed)
        return Window.plan(start, end, width, self.block_size)

    def write(self, layer: int, keys: Tensor, values: Tensor, window: Window) -> None:
        """Store one layer's keys and values [B, Hkv, Q, D] of an open window, and refresh the bounds it touches.

        Lengths move only at `commit`, after the last layer.
        """
        letters = "B Hkv Q D"
        bind_shapes(cache=(self.keys[layer], "B Hkv T_max D"), keys=(keys, letters), values=(values, letters))
        require(keys.shape[2] == window.width, "keys", f"{keys.shape[2]} tokens", f"the window's {window.width}")
        check_dtypes(FLOATS, cache=self.keys, keys=keys, values=values)
        row, column, position = window.row, window.column, window.position
        self.keys[layer][row, :, position] = keys[row, :, column]  # [tokens, Hkv, D]
        self.values[layer][row, :, position] = values[row, :, column]
        self._refresh_bounds(layer, window)

    def commit(self, window: Window) -> None:
        """Let the lengths reach the window's end, once every layer has been written."""
        self.lengths = torch.where(window.end > window.start, window.end, self.lengths).to(torch.int32)

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens at and past `lengths` [B], none of which may exceed the present length."""
        bind_shapes(cache=(self.lengths, "B"), lengths=(lengths, "B"))
        check_lengths("lengths", lengths, self.capacity)
        require(bool((lengths <= self.lengths).all()), "lengths", lengths.tolist(), f"≤ {self.lengths.tolist()}")
        first_slot = torch.arange(self.bounds.shape[-1], device=lengths.device) * self.block_size
        emptied = (first_slot >= lengths[:, None])[:, None, None]  # [B, 1, 1, M]
        self.bounds[:, :, :, 0].masked_fill_(emptied, float("inf"))
        self.bounds[:, :, :, 1].masked_fill_(emptied, float("-inf"))
        cut = Window.plan((lengths - 1).clamp(min=0), lengths, 1, self.block_size)  # the block cut through
        for layer in range(self.keys.shape[0]):
            self._refresh_bounds(layer, cut)
        self.lengths = lengths.to(torch.int32, copy=True)

    def resized(self, capacity: int) -> KVCache:
        """A copy with room for `capacity` tokens per sequence; this cache stays as it is."""
        longest = int(self.lengths.max())
        require(is_integer(capacity, longest), "capacity", capacity, f"an integer ≥ the longest sequence, {longest}")
        kept = min(capacity, self.capacity)
        size = (*self.keys.shape[:3], capacity, self.keys.shape[4])
        _check_memory(size, self.block_size, self.keys.dtype, self.keys.device)
        keys, values = self.keys.new_zeros(size), self.values.new_zeros(size)
        keys[:, :, :, :kept] = self.keys[:, :, :, :kept]
        values[:, :, :, :kept] = self.values[:, :, :, :kept]
        bounds = torch.stack([self.block_bounds(layer, self.lengths, self.block_size) for layer in keys])
        return replace(self, keys=keys, values=values, bounds=bounds, lengths=self.lengths.clone())

    def selected(self, sequences: Sequence[int]) -> KVCache:
        """A copy that holds the sequences named, in that order; one may be named twice. This cache stays as it is."""
        batch = len(self.lengths)
        is_known = len(sequences) > 0 and all(is_integer(index, 0) and index < batch for index in sequences)
        require(is_known, "sequences", list(sequences), f"a non-empty list of integers 0 … {batch - 1}")
        row = torch.tensor(sequences, device=self.lengths.device)
        keys, values, bounds = (tensor.index_select(1, row) for tensor in (self.keys, self.values, self.bounds))
        return replace(self, keys=keys, values=values, bounds=bounds, lengths=self.lengths[row])

    def _refresh_bounds(self, layer: int, window: Window) -> None:
        """Rebuild the bounds of the blocks that the window touches from their keys."""
        if self.capacity == 0:  # no slot to gather from
            return
        slot = window.slot.clamp(max=self.capacity - 1)  # [B, n·b]
        sequence = torch.arange(len(slot), device=slot.device)[:, None]
        # Contiguous, because that is all a kernel may take.
        keys = self.keys[layer][sequence, :, slot].transpose(1, 2).contiguous()  # [B, Hkv, n·b, D]
        bounds = self.block_bounds(keys, window.slots_in_use, self.block_size)  # [B, Hkv, 2, D, n]
        row, column = window.block_row, window.block_column
        self.bounds[layer][row, ..., window.block] = bounds[row, ..., column]  # [blocks, Hkv, 2, D]


def _check_memory(shape: tuple[int, ...], block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a cache [layer, B, Hkv, T_max, D] that the device can't hold, before any of it is allocated."""
    n_layer, batch, kv_heads, capacity, head_dim = shape
    row = n_layer * batch * kv_heads * head_dim * dtype.itemsize  # bytes of one token's keys in every sequence
    # Keys and values, and per block two bounds, which exist twice while the layers' are joined.
    needed, free = 2 * row * capacity + 4 * row * -(-capacity // block_size), free_memory(device)
    if needed > free:
        fits = max(0, int(free / (2 * row + 4 * row / block_size)) // block_size * block_size)
        given = f"{batch} × {capacity:,} tokens, {needed / 1e9:.2f} GB"
        allowed = f"{batch} × {fits:,} tokens in the {free / 1e9:.2f} GB that {device} has free"
        raise torch.OutOfMemoryError(f"KV cache: got {given}; allowed: {allowed}")


@dataclass
class Generation:
    """What decoding has produced and everything needed to go on from it."""

    tokens: list[list[int]]  # per sequence, the generated tokens alone; the last one is the pending one
    cache: KVCache
    window: Tensor  # [B] int64: w, newest cached tokens written by sparse steps since the last rectification
    pending: Tensor  # [B] int64: the token to feed next, −1 before any was generated


def pad_tokens(argument: str, tokens: Sequence[Sequence[int]], cache: KVCache) -> tuple[Tensor, Tensor]:
    """Ragged token lists as one tensor [B, longest], padded with 0, and their lengths [B] int32."""
    batch = len(cache.lengths)
    for index, row in enumerate(tokens):
        is_list = isinstance(row, Sequence) and all(is_integer(token, 0) for token in row)
        require(is_list, f"{argument}[{index}]", repr(row)[:60], "a list of token ids")
    require(len(tokens) == batch, argument, f"{len(tokens)} lists", f"{batch}, one per sequence of the cache")
    longest = max(len(row) for row in tokens)
    padded = [list(row) + [0] * (longest - len(row)) for row in tokens]
    device = cache.lengths.device
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int32, device=device)
    return torch.tensor(padded, dtype=torch.int64, device=device).view(batch, longest), lengths
