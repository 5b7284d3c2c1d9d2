"""Argument checks shared by every public function: bad input is refused by name before any work
starts.

Every message has one form: the argument, what was given, what is allowed.
"""

import os
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
# Bytes of a GPU left free beside weights and caches: activations, graphs, the libraries' own.
RESERVE = 3 * 2**29


def refuse(argument: str, given: object, allowed: str) -> NoReturn:
    """Raise the `ValueError` that every check here raises."""
    raise ValueError(f"{argument}: got {given}; allowed: {allowed}")


def require(condition: bool, argument: str, given: object, allowed: str) -> None:
    """Raise `ValueError` by name unless `condition` holds."""
    if not condition:
        refuse(argument, given, allowed)


def is_integer(value: object, minimum: int) -> bool:
    """True if `value` is an integer, NumPy's included (`True` is not), of at least `minimum`.

    >>> is_integer(3, 1), is_integer(True, 0), is_integer(2.0, 1)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= minimum


def is_number(value: object) -> bool:
    """True if `value` is a real number, NumPy's included; `True` is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_fields(config: object) -> None:
    """Turn a frozen configuration's numbers into Python's own: NumPy's can overflow."""
    for name, value in vars(config).items():
        if is_number(value) and not isinstance(value, (int, float)):
            plain = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(config, name, plain)


def require_integer(argument: str, value: object, minimum: int, what: str = "") -> int:
    """Require an integer of at least `minimum`, and return it as Python's own.

    `what` says where the minimum comes from.
    """
    require(is_integer(value, minimum), argument, repr(value), f"an integer ≥ {what}{minimum}")
    return int(value)


def require_optional(argument: str, value: object, minimum: int, none: str) -> None:
    """Require an integer of at least `minimum`, or None, of which `none` says what it means."""
    allowed = f"an integer ≥ {minimum}, or None for {none}"
    require(value is None or is_integer(value, minimum), argument, repr(value), allowed)


def require_share(argument: str, value: object) -> None:
    """Require a number above 0 and up to 1."""
    is_share = is_number(value) and 0 < value <= 1
    require(is_share, argument, repr(value), f"0 < {argument} ≤ 1")


def require_positive(argument: str, value: object) -> None:
    """Require a finite number above 0."""
    is_positive = is_number(value) and 0 < value < float("inf")
    require(is_positive, argument, repr(value), "a finite number > 0")


def require_one_of(argument: str, value: object, allowed: Sequence[str | int]) -> None:
    """Require one of a few words or integers; 1.0 and `True` are not 1."""
    is_one = any(type(value) is type(each) and value == each for each in allowed)
    require(is_one, argument, repr(value), " or ".join(map(repr, allowed)))


def check_sketch(bits: object, head_dim: int) -> None:
    """Refuse a sketch of other than 1 or 2 bits, or one whose codes fill no bytes."""
    require_one_of("bits", bits, (1, 2))
    allowed = f"a multiple of {8 // bits}: codes of {bits} bits per channel fill whole bytes"
    require(head_dim * bits % 8 == 0, "head_dim", head_dim, allowed)


def require_flag(argument: str, value: object) -> None:
    """Require True or False."""
    require(isinstance(value, bool), argument, repr(value), "True or False")


def bind_shapes(**arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Match tensors with named dimensions; the same letter must mean the same size everywhere.

    All tensors must share one device. Returns the size of every letter; a digit stands for itself.

    >>> bind_shapes(query=(torch.zeros(2, 6, 8), "B Hq D"), lengths=(torch.zeros(2), "B"))
    {'B': 2, 'Hq': 6, 'D': 8}
    """
    sizes: dict[str, int] = {}
    device = None
    for argument, (tensor, letters) in arguments.items():
        if not isinstance(tensor, Tensor):
            refuse(argument, type(tensor).__name__, f"a tensor [{letters}]")
        names, shape = letters.split(), list(tensor.shape)
        if len(shape) != len(names):
            refuse(argument, f"shape {shape}", f"{len(names)} dimensions [{letters}]")
        for name, size in zip(names, shape, strict=True):
            expected = int(name) if name.isdigit() else sizes.setdefault(name, size)
            if size != expected:  # the message is written only where needed
                refuse(argument, f"shape {shape}", f"[{letters}] with {name} = {expected}")
        device = device or tensor.device
        if tensor.device != device:
            refuse(argument, f"device {tensor.device}", f"{device}, as the arguments before it")
    return sizes


def check_dtypes(allowed: tuple[torch.dtype, ...], **arguments: Tensor) -> None:
    """The tensors must have one and the same dtype out of `allowed`."""
    first = next((tensor.dtype for tensor in arguments.values()), None)
    for argument, tensor in arguments.items():
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            refuse(argument, tensor.dtype, names)
        if tensor.dtype != first:
            refuse(argument, tensor.dtype, f"{first}, as the arguments before it")


def check_lengths(argument: str, lengths: Tensor, capacity: int) -> None:
    """`lengths` must be integers in 0 … capacity."""
    check_dtypes(INTEGERS, **{argument: lengths})
    if lengths.numel() and lengths.device.type != "meta":
        low, high = (int(limit) for limit in torch.aminmax(lengths))
        require(low >= 0 and high <= capacity, argument, f"{low} … {high}", f"0 … {capacity}")


def check_tokens(tokens: Tensor | Sequence[int], vocabulary: int, argument: str = "tokens") -> None:
    """Refuse tokens that are not ids of the vocabulary."""
    allowed = f"token ids 0 … {vocabulary - 1}"
    if isinstance(tokens, Tensor):
        check_dtypes(INTEGERS, **{argument: tokens})
        if tokens.numel():
            low, high = (int(limit) for limit in tokens.aminmax())
            require(low >= 0 and high < vocabulary, argument, f"{low} … {high}", allowed)
        return
    is_list = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    is_known = is_list and all(is_integer(token, 0) and token < vocabulary for token in tokens)
    require(is_known, argument, repr(tokens)[:60], allowed)


def check_heads(query_heads: int, kv_heads: int) -> None:
    """Grouped-query attention: every KV head serves the same number of query heads."""
    divides = kv_heads > 0 and query_heads > 0 and query_heads % kv_heads == 0
    allowed = f"a positive multiple of the {kv_heads} KV heads"
    require(divides, "query", f"{query_heads} heads", allowed)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are taken in float32, for float64 input in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_device(argument: str, device: torch.device | str) -> torch.device:
    """The CPU or a GPU that is there; `ValueError` for anything else."""
    try:
        chosen = torch.device(device)
    except RuntimeError:  # not a device's name at all
        chosen = None
    allowed = "cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
    is_gpu = chosen is not None and chosen.type == "cuda"
    is_gpu = is_gpu and (chosen.index or 0) < torch.cuda.device_count()
    require(is_gpu or chosen == torch.device("cpu"), argument, device, allowed)
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes for weights and caches: a GPU's free memory less `RESERVE`, or all of the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # cached blocks may be too small for what comes
        return max(0, torch.cuda.mem_get_info(device)[0] - RESERVE)
    if not hasattr(os, "sysconf"):  # Windows: the allocation itself will say
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_there_is(device: torch.device, free: int) -> str:
    """Say in a message what `free_memory` counts."""
    has = f"{device} has free" if device.type == "cuda" else "this machine has"
    return f"the {free / 1e9:.2f} GB that {has}"


def check_cache_memory(
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    sketch_bits: int | None = None,
) -> None:
    """Refuse a cache [layer, B, Hkv, T_max, D] that does not fit, before it is allocated."""
    n_layer, batch, kv_heads, capacity, head_dim = shape
    n_keys = n_layer * batch * kv_heads  # per token
    row = n_keys * head_dim * dtype.itemsize  # bytes of one token's keys
    # Keys and values, then sketches, or two bounds per block, which exist twice while the layers'
    # are stacked.
    per_token, per_block = 2 * row, 4 * row
    if sketch_bits is not None:
        per_token, per_block = 2 * row + n_keys * (head_dim * sketch_bits // 8 + dtype.itemsize), 0
    needed = per_token * capacity + per_block * -(-capacity // block_size)
    free = free_memory(device)
    if needed > free:
        fits = int(free / (per_token + per_block / block_size)) // block_size * block_size
        given = f"{batch} × {capacity:,} tokens, {needed / 1e9:.2f} GB"
        allowed = f"{batch} × {fits:,} tokens in {memory_there_is(device, free)}"
        raise torch.OutOfMemoryError(f"KV cache: got {given}; allowed: {allowed}")
