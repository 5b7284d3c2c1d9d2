"""The conformance vectors: recorded cases of operations, and where whole generations begin."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from .grades import drawn_case, drawn_entries
from .parts import part_entries

TYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U8": np.uint8}


@dataclass(frozen=True)
class Vectors:
    """The manifest and the tensors of all recorded cases."""

    manifest: dict
    operations: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]

    def entries(self) -> list[dict]:
        """Every case in the order in which a port meets them: recorded ones, then drawn ones."""
        recorded = [*self.manifest["operations"], *self.manifest["traces"]]
        return [*recorded, *part_entries(), *drawn_entries()]

    def arrays(self, entry: Mapping) -> dict[str, np.ndarray]:
        """Inputs of a case of an operation, and under expected/ and allowed/ what is compared."""
        if "shape" in entry:
            return drawn_case(entry)
        return part_of(self.operations, f"{entry['operation']}/{entry['case']}")


def load_vectors() -> Vectors:
    """Load the vectors that come with the package."""
    folder = files("resa.vectors")
    names = ("operations", "weights")
    stored = [read_tensors((folder / f"{name}.safetensors").read_bytes()) for name in names]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    operations, weights = stored
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}  # half the file
    return Vectors(manifest, operations, weights)


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Read a safetensors file: the size of a header in JSON, the header, the numbers."""
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, about in json.loads(data[8:start]).items():
        if name != "__metadata__":
            shape, (first, _) = about["shape"], about["data_offsets"]
            flat = np.frombuffer(data, TYPES[about["dtype"]], math.prod(shape), start + first)
            tensors[name] = flat.reshape(shape)
    return tensors


def part_of(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Copies of the tensors `name/…`, by the rest of their names."""
    start = f"{name}/"
    return {
        key.removeprefix(start): tensor.copy()
        for key, tensor in tensors.items()
        if key.startswith(start)
    }
