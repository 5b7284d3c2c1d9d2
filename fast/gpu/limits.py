"""Limits of the kernels: `check_limits` refuses, by name, what fits the contract but not them.

It follows the contract's own checks (`resa.reference.operations.checked`) and has their form of
message. It looks at shapes, dtypes and layouts alone, so it never waits for the device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from resa.reference.checks import check_dtypes, require

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128)
MAX_GROUP = 16  # query heads per KV head: they fill one tile of the matrix units
MAX_ROWS = 65535  # KV heads of all sequences: CUDA's limit for a grid's second and third axis

# TRITON_INTERPRET=1 runs the kernels on the CPU, one program after another. It is read when the
# kernels are defined.
INTERPRETED = knobs.runtime.interpret


def check_limits(operation: str, arguments: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Refuse the arguments of one operation that its kernel is not written for.

    arguments by name, sizes by letter, as `checked` has found them. 8-bit bounds come as their
    codes, whose dtype is not compared with the others'.
    """
    # Dtypes, and a device that runs kernels.
    if operation == "select_blocks":
        check_dtypes((torch.float32,), scores=arguments["scores"])
        check_device("scores", arguments["scores"])
    else:
        names = ("query", "keys", "values", "bounds", "scales")
        tensors = {name: arguments[name] for name in names if name in arguments}
        if operation == "score_blocks" and tensors["bounds"].dtype == torch.uint8:
            del tensors["bounds"]
        check_kernel_dtypes(**tensors)

    # Sizes. Selection has one program per KV head on the grid's first axis, which has no limit.
    found = {"D": sizes["D"], "rows": sizes["B"] * sizes["Hkv"]} if "D" in sizes else {}
    if "Hq" in sizes:
        found["G"] = sizes["Hq"] // sizes["Hkv"]
    if operation == "select_blocks":
        found["block_size"] = arguments["config"].block_size
    elif "block_size" in arguments:
        found["block_size"] = arguments["block_size"]
    check_sizes(**found)

    # Layout. Kernels take no strides, and a cache is never copied behind the caller's back.
    for name in ("keys", "values", "bounds", "scores", "codes", "scales"):
        if name in arguments:
            check_layout(name, arguments[name])
    if operation == "dense_attention":  # the bulk copy engine reads from multiples of 16 bytes
        for name in ("keys", "values"):
            address = arguments[name].data_ptr()
            require(address % 16 == 0, name, f"address {address:#x}", "one divisible by 16")


def check_layout(argument: str, tensor: Tensor) -> None:
    """Refuse a tensor with gaps between its numbers, or in another order."""
    given = f"strides {tuple(tensor.stride())}"
    require(tensor.is_contiguous(), argument, given, "a contiguous tensor")


def check_kernel_dtypes(**arguments: Tensor) -> None:
    """Refuse tensors of unequal dtypes, or of one that the kernels cannot compute with."""
    check_dtypes(DTYPES, **arguments)
    argument, tensor = next(iter(arguments.items()))
    check_device(argument, tensor)
    # The interpreter does arithmetic on bfloat16's bits as if they were integers.
    is_sound = not (INTERPRETED and tensor.dtype == torch.bfloat16)
    require(is_sound, argument, "torch.bfloat16", "float16 or float32 while TRITON_INTERPRET=1")


def check_device(argument: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not on a GPU, or not on the CPU while kernels are interpreted."""
    given, kind = f"device {tensor.device}", tensor.device.type
    if INTERPRETED:
        require(kind == "cpu", argument, given, "cpu, while TRITON_INTERPRET=1")
        return
    allowed = "cuda (the Triton path never falls back to the CPU)"
    require(kind == "cuda", argument, given, allowed)
    current = torch.cuda.current_device()  # kernels start there, wherever their arguments lie
    allowed = f"cuda:{current}, the current one (torch.cuda.set_device)"
    require(tensor.device.index == current, argument, given, allowed)


def check_sizes(D: int = 16, G: int = 1, block_size: int = 16, rows: int = 1) -> None:
    """Refuse a head dimension, group, block size or B·Hkv that no kernel is written for."""
    lists = ("head dimension D", D, HEAD_DIMS), ("block_size", block_size, BLOCK_SIZES)
    for name, given, allowed in lists:
        require(given in allowed, name, given, ", ".join(map(str, allowed)))
    require(1 <= G <= MAX_GROUP, "query heads per KV head", G, f"1 … {MAX_GROUP}")
    require(rows <= MAX_ROWS, "batch × KV heads", rows, f"at most {MAX_ROWS}")
