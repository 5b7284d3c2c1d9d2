"""The installed command `resa`: the reference's command line and a second backend for it, `triton`.

Unlike `python -m resa.reference`, which knows the reference alone, this runs on the kernels where there is an NVIDIA
GPU. It works where Triton is not installed as well, with the reference alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from resa.reference import Generation, Operations, cli
from resa.reference.cli import REFERENCE, Backend

from .bench.cli import add_bench
from .crossover import dense_below


def main(arguments: Sequence[str] | None = None) -> int:
    """`resa.reference.cli.main`, with the kernels to choose from, and the command `bench`."""
    return cli.main(arguments, backends=BACKENDS, more=[add_bench])


def _needs(device: torch.device) -> str | None:
    """What the kernels are missing to run on the device, None where they run."""
    if find_spec("triton") is None:
        return "the package triton, which there is for Linux only"
    from .checks import INTERPRETED

    if INTERPRETED:
        return None if device.type == "cpu" else "--device cpu while TRITON_INTERPRET=1"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "an NVIDIA GPU"
    return None if device.type == "cuda" else "--device cuda"


def _generate(*arguments: object, **options: object) -> Generation:
    from .generate import generate

    return generate(*arguments, **options)


def _operations() -> Operations:
    from . import TRITON_OPS

    return TRITON_OPS


BACKENDS = {"triton": Backend(_generate, _operations, _needs, dense_below), "reference": REFERENCE}
