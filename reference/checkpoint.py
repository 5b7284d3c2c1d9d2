"""Weights on disk: safetensors files alone, checked before use; nothing is ever unpickled.

A checkpoint is one file, replaced in one step, so a crash leaves the old one or the new one. It describes itself: the
`GPTConfig` travels as JSON in its header. Neighbour: `train.py` keeps the optimizer's state in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checks import FLOATS, checked_device, refuse, require
from .config import GPTConfig, RopeScaling
from .files import write_atomically
from .model import GPT, Operations

MODEL_FORMAT = "resa model"
EIGHT_BIT_FORMAT = "resa model, matrices in 8 bits"
PARTS = {"all": "", "attention": ".attn."}  # of a model: what the names of its weights have in common
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def shipped_checkpoint(name: str = "model") -> Path:
    """Path of a model that comes with the package: "model", of source code; "carrying", of programs; "retrieval"."""
    return Path(__file__).parent / "assets" / f"{name}.safetensors"


def save_model(
    path: str | os.PathLike,
    model: GPT,
    *,
    dtype: torch.dtype = torch.bfloat16,
    eight_bits: bool = False,
    part: str = "all",
    base: str | os.PathLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the model's weights in `dtype`, with its configuration; a tied output projection is not stored twice.

    With `eight_bits` every matrix [m, n] is stored as whole numbers −127 … 127 and a float32 scale [m] per row, rounded
    to nearest: half the size, and another model, to be measured as it is stored.

    With `part="attention"` only the attention's weights are stored; the others are taken from `base`, a model's file in
    the same folder that is named in this one together with its SHA-256.

    Errors: ValueError for a weight that is not finite in `dtype`, a part without a base and vice versa, or a base that
    lies elsewhere or has another shape; OSError if the disk refuses, and then the file that was there before is
    untouched.
    """
    require(dtype in FLOATS, "dtype", dtype, ", ".join(map(str, FLOATS)))
    require(part in PARTS, "part", repr(part), ", ".join(PARTS))
    require((part == "all") == (base is None), "base", base, "None for all of a model, else the file of the rest")
    stored = {name: parameter.detach().cpu() for name, parameter in model.named_parameters() if PARTS[part] in name}
    tensors = {name: parameter.to(dtype) for name, parameter in stored.items()}
    if eight_bits:
        for name, parameter in stored.items():
            if parameter.dim() == 2:
                tensors[name], tensors[name + SCALE] = rounded_rows(parameter.float())
    form = EIGHT_BIT_FORMAT if eight_bits else MODEL_FORMAT
    header = {"format": form, "config": json.dumps(asdict(model.config))}
    if base is not None:
        base, path = Path(base), Path(path)
        is_beside = base.absolute().parent == path.absolute().parent and base.name != path.name
        require(is_beside, "base", base, f"another file beside {path}")
        shape = replace(load_model(base).config, context=model.config.context)  # no weight depends on the context
        require(shape == model.config, "base", base, "a model of the same shape")
        header |= {"part": part, "base": Path(base).name, "base_sha256": file_digest(base)}
    save_tensors(path, tensors, {**(metadata or {}), **header})


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


SCALE = ".scale"  # after a matrix's name


def rounded_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [m, n] float32 → whole numbers [m, n] int8 and scales [m], whose product is nearest; rows of 0 stay 0."""
    scale = (matrix.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def read_weights(
    path: str | os.PathLike, header: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors named in `shapes` of a file of either format, as floats; those it lacks by design are its base's.

    Errors: as `read_tensors`, and ValueError if the base is another file than the one named.
    """
    if "base" in header:
        part, base = header.get("part"), Path(path).parent / header["base"]
        require(part in PARTS, f"{path}: part", repr(part), ", ".join(PARTS))
        is_name = base.name == header["base"] != ".."
        require(is_name, f"{path}: base", repr(header["base"]), "the name of a file beside it")
        base_header = read_header(base, MODEL_FORMAT, EIGHT_BIT_FORMAT)
        found, wanted = file_digest(base), header.get("base_sha256")
        require(found == wanted, f"{path}: base", f"{base} with SHA-256 {found}", f"the one with {wanted}")
        rest = read_weights(base, base_header, shapes)
        own = {name: shape for name, shape in shapes.items() if PARTS[part] in name}
        return rest | read_weights(path, {"format": header["format"]}, own)
    if header["format"] == MODEL_FORMAT:
        return read_tensors(path, shapes)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    scales = {name + SCALE: shapes[name][:1] for name in matrices}
    tensors = read_tensors(path, {**shapes, **scales}, whole_numbers=matrices)
    for name in matrices:
        tensors[name] = tensors[name] * tensors.pop(name + SCALE)[:, None]
    return tensors


def load_model(
    path: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ops: Operations | None = None,
) -> GPT:
    """The model that `save_model` wrote, the shipped one by default, in eval mode; `ops` as in `GPT`.

    A file of a part is read together with its base beside it.

    Errors: FileNotFoundError if there is no such file, or no such base; ValueError naming the file or the tensor if it
    is damaged, from elsewhere, or does not match its own configuration.
    """
    path = shipped_checkpoint() if path is None else path
    require(dtype in FLOATS, "dtype", dtype, ", ".join(map(str, FLOATS)))
    device = checked_device("device", device)
    header = read_header(path, MODEL_FORMAT, EIGHT_BIT_FORMAT)
    config = config_from_json(path, header.get("config", ""))
    # One layer has several tensors: a damaged count must not make us build a billion layers.
    require(config.n_layer <= int(header["tensors"]), f"{path}: n_layer", config.n_layer, "at most the file's tensors")
    with torch.device("meta"):  # shapes without memory
        model = GPT(config) if ops is None else GPT(config, ops=ops)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = read_weights(path, header, shapes)
    placed = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    for name, tensor in placed.items():
        require(bool(tensor.isfinite().all()), f"{path}: tensor {name}", "values too large", f"what fits {dtype}")
    model.load_state_dict(placed, strict=False, assign=True)  # read_tensors has compared the names
    if config.tied_embeddings:
        model.output.weight = model.embed.weight
    return model.eval()


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and text as one safetensors file in one step; see `write_atomically`."""
    for name, tensor in tensors.items():
        require(bool(tensor.isfinite().all()), f"tensor {name}", "NaN or infinity", "finite values")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, with_sorted_header(safetensors.torch.save(contiguous, dict(metadata))))


def with_sorted_header(content: bytes) -> bytes:
    """The same safetensors file with the header's text in alphabetical order.

    The library writes it in a random one; sorted, equal weights give equal files.
    """
    end = 8 + int.from_bytes(content[:8], "little")  # the format: the header's length, the header in JSON, the data
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_header(path: str | os.PathLike, *expected_formats: str) -> dict[str, str]:
    """The text stored in a file's header, and under `tensors` how many tensors the file holds.

    Errors: FileNotFoundError, ValueError if the file is damaged or of another format.
    """
    with open_checked(path) as file:
        header = {**(file.metadata() or {}), "tensors": str(len(file.keys()))}
    given = header.get("format", "no format")
    allowed = " or ".join(map(repr, expected_formats))
    require(given in expected_formats, f"{path}: format", f"{given!r}, a foreign checkpoint", allowed)
    return header


def read_tensors(
    path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], whole_numbers: Collection[str] = ()
) -> dict[str, Tensor]:
    """Exactly the tensors named in `shapes`, with those shapes, finite, of a float type or int8; on the CPU.

    Names, shapes and types are checked from the header, before any tensor is read.
    """
    with open_checked(path) as file:
        names = set(file.keys())
        for name in sorted(names ^ set(shapes)):
            missing = name not in names
            refuse(f"{path}: tensor {name}", "missing" if missing else "extra", f"{len(shapes)} known tensors")
        for name, shape in shapes.items():
            check_stored(path, file, name, shape, ("I8",) if name in whole_numbers else STORED_DTYPES)
        tensors = {name: file.get_tensor(name) for name in shapes}
    for name, tensor in tensors.items():
        require(bool(tensor.isfinite().all()), f"{path}: tensor {name}", "NaN or infinity", "finite values")
    return tensors


def check_stored(
    path: str | os.PathLike,
    file: safe_open,
    name: str,
    shape: tuple[int, ...],
    allowed: Collection[str] = tuple(STORED_DTYPES),
) -> None:
    """A stored tensor's type and shape, from the file's header; ValueError naming file and tensor."""
    stored = file.get_slice(name)
    dtype, given = stored.get_dtype(), tuple(stored.get_shape())
    require(dtype in allowed, f"{path}: tensor {name}", dtype, ", ".join(allowed))
    require(given == shape, f"{path}: tensor {name}", f"shape {given}", f"shape {shape}")


def open_checked(path: str | os.PathLike) -> safe_open:
    """Opens a safetensors file; its header is checked against the file's length, so a truncated file is refused."""
    if not Path(path).is_file():
        hint = ", but a folder: `resa generate` and `load_pretrained` read those" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"checkpoint {path}: no such file{hint}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: got a damaged file ({error}); allowed: a complete safetensors file") from None


def config_from_json(path: str | os.PathLike, text: str) -> GPTConfig:
    """The configuration in a file's header; ValueError naming the file and the field if it is not a `GPTConfig`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    require(isinstance(values, dict), f"{path}: config", repr(text[:80]), "the JSON of a GPTConfig")
    values.setdefault("rope_scaling", None)  # files from before there was one
    known = {item.name for item in fields(GPTConfig)}
    for name in sorted(known ^ set(values)):
        refuse(f"{path}: config field {name}", "missing" if name in known else "unknown", "GPTConfig's fields")
    try:
        scaling = values["rope_scaling"]
        return GPTConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if isinstance(scaling, dict) else scaling})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
