"""The installed command `resa`: the reference's command line with a second backend, `triton`.

Unlike `python -m resa.reference`, which knows the reference alone, this runs on the kernels where
there is an NVIDIA GPU. Where Triton is not installed it works with the reference alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from resa.reference import Generation, Operations
from resa.reference.cli import main as command_line
from resa.reference.cli.main import REFERENCE, Backend

from .bench.cli import add_bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `resa.reference.cli.main.main` with the kernels to choose from, and `bench`."""
    return command_line.main(arguments, backends=BACKENDS, more=[add_bench])


def _needs(device: torch.device) -> str | None:
    """Name what the kernels are missing to run on the device; None where they run."""
    if find_spec("triton") is None:
        return "the package triton: pip install triton, on Linux"
    from .gpu.limits import INTERPRETED

    if INTERPRETED:
        return None if device.type == "cpu" else "--device cpu while TRITON_INTERPRET=1"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "an NVIDIA GPU"
    return None if device.type == "cuda" else "--device cuda"


def _generate(*arguments: Any, **options: Any) -> list[Generation]:
    from .generate import generate

    return generate(*arguments, **options)


def _operations() -> Operations:
    from . import TRITON_OPS

    return TRITON_OPS


def _crossover(selection: str) -> int:
    """Tokens up to which dense decoding is faster: one sequence, on the GPU that the file names."""
    path = Path(__file__).with_name("bench") / "crossover.json"
    return json.loads(path.read_text(encoding="utf-8"))["dense_below_tokens"][selection]


@contextmanager
def _watched(tell: Callable[[str], None]) -> Iterator[None]:
    """Say that kernels compile, from the first one on. What Triton finds on disk is no news."""
    from triton import knobs

    before, n_compiled = knobs.compilation.listener, 0

    def listen(*, cache_hit: bool, **about: Any) -> None:
        nonlocal n_compiled
        if not cache_hit:
            n_compiled += 1
            tell(f"Compiling kernels, which later runs find on disk: {n_compiled} …")
        if before is not None:
            before(cache_hit=cache_hit, **about)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before


BACKENDS = {
    "triton": Backend(_generate, _operations, _needs, _crossover, _watched),
    "reference": REFERENCE,
}
