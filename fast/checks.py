"""What the kernels can do, checked before anything is launched.

The reference's own checks come first (`resa.reference.checks`); these add the limits of the Triton path, in the same
form of message. Checks that read values from the device wait for it, so the decode loop, which has made sure of its
arguments once, calls the `enqueue_…` functions behind the public operations instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from resa.reference.checks import check_dtypes, require

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128)
MAX_GROUP = 16  # query heads per KV head: they fill one tile of the matrix units
MAX_ROWS = 65535  # KV heads of all sequences: CUDA's limit for the second and third axis of a grid

# TRITON_INTERPRET=1 runs the kernels on the CPU, one program after another; read when the kernels are defined.
INTERPRETED = knobs.runtime.interpret


def check_layout(**arguments: Tensor) -> None:
    """The tensors must be contiguous, because kernels take no strides."""
    for argument, tensor in arguments.items():
        require(tensor.is_contiguous(), argument, f"strides {tuple(tensor.stride())}", "a contiguous tensor")


def check_kernel_dtypes(**arguments: Tensor) -> None:
    """The tensors must share a dtype and lie on a device that the kernels can compute with."""
    check_dtypes(DTYPES, **arguments)
    argument, tensor = next(iter(arguments.items()))
    check_device(argument, tensor)
    # The interpreter does arithmetic on bfloat16's bits as if they were integers.
    is_sound = not (INTERPRETED and tensor.dtype == torch.bfloat16)
    require(is_sound, argument, "torch.bfloat16", "float16 or float32 while TRITON_INTERPRET=1")


def check_device(argument: str, tensor: Tensor) -> None:
    """A GPU, or the CPU where kernels are interpreted."""
    allowed = "cpu, while TRITON_INTERPRET=1" if INTERPRETED else "cuda (the Triton path never falls back to the CPU)"
    require(tensor.device.type == ("cpu" if INTERPRETED else "cuda"), argument, f"device {tensor.device}", allowed)
    if not INTERPRETED:  # kernels are launched on the current GPU, wherever their arguments lie
        current = torch.cuda.current_device()
        is_current = tensor.device.index == current
        require(
            is_current, argument, f"device {tensor.device}", f"cuda:{current}, the current one (torch.cuda.set_device)"
        )


def check_sizes(
    *, D: int | None = None, G: int | None = None, block_size: int | None = None, rows: int | None = None
) -> None:
    """Head dimension, group, block size and B·Hkv must be ones that the kernels are written for."""
    if D is not None:
        require(D in HEAD_DIMS, "head dimension D", D, ", ".join(map(str, HEAD_DIMS)))
    if G is not None:
        require(1 <= G <= MAX_GROUP, "query heads per KV head", G, f"1 … {MAX_GROUP}")
    if block_size is not None:
        require(block_size in BLOCK_SIZES, "block_size", block_size, ", ".join(map(str, BLOCK_SIZES)))
    if rows is not None:
        require(rows <= MAX_ROWS, "batch × KV heads", rows, f"at most {MAX_ROWS}")
