"""Programmatic dependent launch: a kernel's start overlaps the end of the one before it.

A decoding step is a chain of short kernels, and each would wait a microsecond or two for the last
program of its predecessor. From Hopper on, a kernel may start early and wait only where it needs
its predecessor's results. Every kernel that starts early keeps one rule: `wait_for_previous` stands
before the first load of anything that the kernel right before it may have written, and before
`let_next_start`. So what was written two kernels ago may be loaded before the wait. Not every
kernel gains by it: docs/kernels.md has the measurements.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from .limits import INTERPRETED

IS_COMPILED = tl.constexpr(not INTERPRETED)


def overlapped(device: torch.device) -> dict[str, bool]:
    """The launch option that starts a kernel before its predecessor ends, where the GPU has it."""
    return {"launch_pdl": True} if device.type == "cuda" and capability(device) >= (9, 0) else {}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's generation, as (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device)


@triton.jit
def wait_for_previous():
    """Wait until every program of the kernel before has ended, where kernels overlap at all."""
    if IS_COMPILED and cuda_capability_geq(9, 0):
        gdc_wait()


@triton.jit
def let_next_start():
    """Let the next kernel's programs take the places that this one's leave from here on."""
    if IS_COMPILED and cuda_capability_geq(9, 0):
        gdc_launch_dependents()
