"""Time every rung of tutorials 6 and 7 on this GPU and write docs/results/ladder.json: python docs/record_ladder.py.

With TRITON_INTERPRET=1 and no GPU it rehearses: every rung is compared with the reference at a toy size, and nothing is
written.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import matplotlib
import torch

from resa.fast.bench.cli import revision
from resa.fast.bench.ladder import random_case
from resa.fast.bench.layer import L2_BYTES, Shape, distance, floors
from resa.fast.bench.timing import Time, copy_bandwidth, elapsed, time_calls
from resa.reference import ReSAConfig, sparse_attention

ROOT = Path(__file__).resolve().parent.parent
BATCH, CONTEXTS = 8, (2**14, 2**16, 2**18)


def tutorial(name: str) -> ModuleType:
    """Run a tutorial as a module, for the rungs that it defines."""
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", ROOT / "tutorials" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rungs() -> dict[str, Callable]:
    """Every rung of the ladder by its name in the results."""
    first, second = tutorial("06_kernel_ladder"), tutorial("07_kernel_ladder_2")
    lower = {"0 reference": sparse_attention, "1 two passes": first.two_pass, "2 online": first.online}
    return {**lower, **second.RUNGS}


def timed(launch: Callable, calls: list[Callable]) -> Time:
    """Time a rung's calls. The reference reads lengths on the host, which no graph can hold: its plain calls count."""
    if launch is not sparse_attention:
        return time_calls(calls)
    for call in calls:
        call()
    return Time.of([elapsed(call) for call in calls * 11])


def measure(context: int, ladder: dict[str, Callable]) -> list[dict]:
    """Time every rung at one length: µs, quartiles, error and the bytes of the floor."""
    shape, config = Shape(), ReSAConfig()
    floor, cache = (floors(shape, config, BATCH, context)[part] for part in ("attend", "rectify"))
    n_cases = max(1, min(64, round(2 * L2_BYTES / floor), int(30e9 / cache)))
    lengths = [context] * BATCH
    cases = [random_case(shape, config, lengths, context, device="cuda", seed=seed) for seed in range(n_cases)]
    rows = []
    for name, launch in ladder.items():
        error = compared(name, launch, cases[0])
        calls = [lambda case=case, launch=launch: launch(*case.arguments()) for case in cases]
        row = {"context": context, "rung": name, **asdict(timed(launch, calls)), "error": error, "floor_bytes": floor}
        rows.append(row)
        print(f"{context // 1024:4}K  {name:17} {row['us']:8.1f} µs, {floor / row['us'] / 1e6:.2f} TB/s", flush=True)
    return rows


def compared(name: str, launch: Callable, case: object) -> float:
    """Compare a rung with the reference → the error. Raises `ValueError` for a rung that computes something else."""
    right = sparse_attention(*case.arguments())
    error = distance(launch(*case.arguments()), right)
    if error > 4 * torch.finfo(right.dtype).eps:
        raise ValueError(f"{name}: got an error of {error:.2g}; allowed: 4 roundings, before it is timed")
    return error


def main() -> None:
    """Time the ladder, or rehearse where there is no GPU."""
    matplotlib.use("Agg")
    ladder = rungs()
    if not torch.cuda.is_available():
        toy = random_case(Shape(6, 2, 32), ReSAConfig(active_ratio=0.5, min_blocks=4), [128], 128)
        errors = {name: compared(name, launch, toy) for name, launch in ladder.items()}
        print("no GPU, so nothing is timed; errors:", errors)
        return
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "commit": revision(),
        "command": "python docs/record_ladder.py",
        "shape": asdict(Shape()),
        "config": asdict(ReSAConfig()),
        "batch": BATCH,
        "copy_tbs": copy_bandwidth(),
    }
    result["rows"] = [row for context in CONTEXTS for row in measure(context, ladder)]
    (ROOT / "docs" / "results" / "ladder.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
