"""A case to try attention kernels on, a check, and a count of the bytes that they ask for.

The tutorials on kernels check every rung of their ladder with it. Full, tidy input tests little:
this case has partial blocks, short lists and NaN wherever a kernel must not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from resa.reference.attention import sparse_attention
from resa.reference.blocks import select_blocks
from resa.reference.config import ReSAConfig

from .layer import Shape


@dataclass(frozen=True)
class Case:
    """Arguments of `sparse_attention`: a list of blocks for each KV head, with −1 behind them."""

    query: Tensor  # [B, Hq, D]
    keys: Tensor  # [B, Hkv, T_max, D]
    values: Tensor
    indices: Tensor  # [B, Hkv, N] int32
    lengths: Tensor  # [B] int32
    block_size: int

    def arguments(self) -> tuple:
        """Return them in the order in which every rung takes them."""
        return self.query, self.keys, self.values, self.indices, self.lengths, self.block_size


def random_case(
    shape: Shape, config: ReSAConfig, lengths: Sequence[int], capacity: int, *,
    device: str = "cpu", seed: int = 0,
) -> Case:  # fmt: skip
    """Draw queries, keys and values, and as many random blocks as the configuration selects.

    Slots past a sequence's end hold NaN.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype, batch, heads = getattr(torch, shape.dtype), len(lengths), shape.kv_heads

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    query = normal(batch, shape.query_heads, shape.head_dim)
    keys, values = (normal(batch, heads, capacity, shape.head_dim) for _ in range(2))
    for s, length in enumerate(lengths):
        keys[s, :, length:] = values[s, :, length:] = float("nan")

    n_blocks = capacity // config.block_size
    scores = torch.rand(batch, heads, n_blocks, generator=generator, device=device)
    indices = select_blocks(scores, ends, config)
    return Case(query, keys, values, indices, ends, config.block_size)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make `torch.empty` give NaN instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(launch: Callable[..., Tensor], case: Case) -> float:
    """Compare a rung with the reference in float64 → its largest error, in roundings of its type.

    Raises `AssertionError` above 4 roundings, and for NaN: something was left out or let in.
    """
    query, keys, values, *rest = case.arguments()
    exact = sparse_attention(query.double(), keys.double(), values.double(), *rest)
    with poisoned_memory():
        out = launch(*case.arguments())
    rounding = torch.finfo(query.dtype).eps * exact.abs().clamp(min=0.25)
    error = ((out.double() - exact).abs() / rounding).max().item()
    assert error <= 4, f"off by {error} roundings"
    return error


@contextmanager
def counted_loads(*tensors: Tensor) -> Iterator[list[int]]:
    """Yield a list of the bytes of these tensors that each load in the interpreter takes."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain, loads = InterpreterBuilder.create_masked_load, []

    def create_masked_load(self, pointers, mask, *rest, **options):
        for tensor in tensors:
            begin = tensor.data_ptr()
            end = begin + tensor.nbytes
            is_inside = (pointers.data >= begin) & (pointers.data < end) & mask.data
            loads.append(int(is_inside.sum()) * tensor.element_size())
        return plain(self, pointers, mask, *rest, **options)

    InterpreterBuilder.create_masked_load = create_masked_load
    try:
        yield loads
    finally:
        InterpreterBuilder.create_masked_load = plain
