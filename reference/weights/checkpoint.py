"""Weights on disk: safetensors files alone, checked before use; nothing is ever unpickled.

A checkpoint is one file that describes itself: the `GPTConfig` travels as JSON in its header, which
also says whether matrices take 8 bits per weight, deflated. The file is replaced in one step, so a
crash leaves the old one or the new one. `pretrained.py` reads the checkpoints of other projects.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import FLOATS, checked_device, refuse, require
from ..config import GPTConfig
from ..model import GPT
from ..rope import RopeScaling
from .files import write_atomically

MODEL_FORMAT = "resa model"
EIGHT_BIT_FORMAT = "resa model, matrices in 8 bits, deflated"
SCALE = ".scale"  # follows the name of a matrix in 8 bits
STORED_DTYPES = dict(zip(("F16", "BF16", "F32", "F64"), FLOATS, strict=True))


def shipped_checkpoint(name: str = "model") -> Path:
    """Path of a model that comes with the package: "model" writes source code, "carrying" follows
    programs.
    """
    return Path(__file__).parent / "assets" / f"{name}.safetensors"


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or of a folder's configuration and weights one after another; in hex."""
    path, digest = Path(path), hashlib.sha256()
    is_folder = path.is_dir()
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))] if is_folder else [path]
    for file in files:
        with open(file, "rb") as opened:
            while piece := opened.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


def save_model(
    path: str | os.PathLike,
    model: GPT,
    *,
    dtype: torch.dtype = torch.bfloat16,
    eight_bits: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's weights in `dtype`, with its configuration and `metadata` in the header.

    `eight_bits` stores every matrix [m, n] as whole numbers −127 … 127, deflated, with a float32
    scale [m] per row, rounded to nearest. That is less than half the size and another model:
    measure it as it is stored. A tied output projection is not stored twice.

    Errors: ValueError for a weight that is not finite in `dtype`; OSError if the disk refuses. The
    file that was there before is then untouched.
    """
    require(dtype in FLOATS, "dtype", dtype, ", ".join(map(str, FLOATS)))
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().cpu().to(dtype)
        if eight_bits and parameter.dim() == 2:
            rows, tensors[name + SCALE] = rounded_rows(parameter.detach().cpu().float())
            tensors[name] = deflated(rows)
    form = EIGHT_BIT_FORMAT if eight_bits else MODEL_FORMAT
    header = {"format": form, "config": json.dumps(asdict(model.config))}
    save_tensors(path, tensors, {**(metadata or {}), **header})


def rounded_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round float32 [m, n] to int8 [m, n] and scales [m] whose product is nearest; zeros stay 0."""
    scale = (matrix.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def deflated(rows: Tensor) -> Tensor:
    """Bytes of an int8 tensor, compressed by zlib: [any length] uint8."""
    content = zlib.compress(rows.contiguous().numpy().tobytes(), 9)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def inflated(path: str | os.PathLike, name: str, content: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `deflated`, whose tensor had this shape; ValueError if it had not."""
    size = math.prod(shape)
    try:
        stream = zlib.decompressobj()
        found = stream.decompress(content.numpy().tobytes(), size + 1)  # no more
    except zlib.error as error:
        refuse(f"{path}: tensor {name}", error, "bytes that zlib wrote")
    is_whole = len(found) == size and stream.eof and not stream.unused_data
    given = f"{len(found)} bytes, or a stream that is cut or goes on"
    require(is_whole, f"{path}: tensor {name}", given, f"{size}, its shape being {shape}")
    return torch.frombuffer(bytearray(found), dtype=torch.int8).view(shape)


def load_model(
    path: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> GPT:
    """Read a model that `save_model` wrote, the shipped one by default, in eval mode.

    Errors: FileNotFoundError if there is no such file; ValueError naming the file or the tensor if
    it is damaged, from elsewhere, or does not match its own configuration.
    """
    # The header comes first: it says which tensors the file must hold.
    path = shipped_checkpoint() if path is None else path
    require(dtype in FLOATS, "dtype", dtype, ", ".join(map(str, FLOATS)))
    device = checked_device("device", device)
    header = read_header(path, MODEL_FORMAT, EIGHT_BIT_FORMAT)
    config = config_from_json(path, header.get("config", ""))
    with open_checked(path) as file:
        n_tensors = len(file.keys())
    # One layer has several tensors: a damaged count must not make us build a billion layers.
    allowed = f"at most the file's {n_tensors} tensors"
    require(config.n_layer <= n_tensors, f"{path}: n_layer", config.n_layer, allowed)
    model = hollow_model(config)

    # Read them. Rows in 8 bits have a scale each.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    is_eight_bit = header["format"] == EIGHT_BIT_FORMAT
    matrices = [name for name, shape in shapes.items() if is_eight_bit and len(shape) == 2]
    scales = {name + SCALE: shapes[name][:1] for name in matrices}
    tensors = read_tensors(path, {**shapes, **scales}, packed=matrices)
    for name in matrices:
        tensors[name] = tensors[name] * tensors.pop(name + SCALE)[:, None]

    # Place them. A value that float32 holds may overflow a smaller dtype.
    for name, tensor in tensors.items():
        tensors[name] = placed = tensor.to(device, dtype)
        is_finite = bool(placed.isfinite().all())
        require(is_finite, f"{path}: tensor {name}", "values too large", f"what fits {dtype}")
    return filled(model, tensors)


class _Undrawn(TorchFunctionMode):
    """Parameters stay as they are made. To draw them without memory, torch loads its compiler, for
    seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def hollow_model(config: GPTConfig) -> GPT:
    """A model whose parameters have shapes but no memory."""
    with torch.device("meta"), _Undrawn():
        return GPT(config)


def filled(model: GPT, tensors: dict[str, Tensor]) -> GPT:
    """Give a hollow model its weights, one per parameter, and put it in eval mode.

    Projections of one input share a memory, one after the other. So the Triton path can multiply by
    all of them at once, and holds no copy. `tensors` changes accordingly.
    """
    parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    for index, group, kind in product(range(model.config.n_layer), parts, ("weight", "bias")):
        names = [f"layers.{index}.{part}.{kind}" for part in group]
        if names[0] in tensors:
            rows = [len(tensors[name]) for name in names]
            whole = torch.cat([tensors[name] for name in names])
            # `data` gives each a version of its own, so that training sees separate tensors.
            tensors.update(zip(names, (own.data for own in whole.split(rows)), strict=True))
    model.load_state_dict(tensors, strict=False, assign=True)  # a tied projection has no tensor
    if model.config.tied_embeddings:
        model.output.weight = model.embed.weight
    return model.eval()


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and text as one safetensors file in one step; see `write_atomically`."""
    for name, tensor in tensors.items():
        require(bool(tensor.isfinite().all()), f"tensor {name}", "NaN or infinity", "finite values")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, with_sorted_header(safetensors.torch.save(contiguous, dict(metadata))))


def with_sorted_header(content: bytes) -> bytes:
    """Sort the header's text: the library writes it in random order, and equal weights should give
    equal files.
    """
    # A safetensors file is the header's length, the header in JSON, then the data.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_header(path: str | os.PathLike, *expected_formats: str) -> dict[str, str]:
    """Read the text in a file's header.

    Errors: FileNotFoundError; ValueError if the file is damaged or of another format.
    """
    with open_checked(path) as file:
        header = file.metadata() or {}
    given = header.get("format", "no format")
    allowed = " or ".join(map(repr, expected_formats))
    is_expected = given in expected_formats
    require(is_expected, f"{path}: format", f"{given!r}, a foreign checkpoint", allowed)
    return header


def read_tensors(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Collection[str] = (),
) -> dict[str, Tensor]:
    """Read exactly the tensors named in `shapes`, finite, on the CPU; `packed` are deflated int8.

    Names, shapes and types are checked from the header, before any tensor is read; of what is
    packed the shape is checked when it is unpacked.
    """
    with open_checked(path) as file:
        names = set(file.keys())
        for name in sorted(names ^ set(shapes)):
            given = "extra" if name in names else "missing"
            refuse(f"{path}: tensor {name}", given, f"{len(shapes)} known tensors")
        for name, shape in shapes.items():
            if name in packed:
                check_stored(path, file, name, None, ("U8",))
            else:
                check_stored(path, file, name, shape)
        tensors = {name: file.get_tensor(name) for name in shapes}
    for name in packed:
        tensors[name] = inflated(path, name, tensors[name], shapes[name])
    for name, tensor in tensors.items():
        is_finite = bool(tensor.isfinite().all())
        require(is_finite, f"{path}: tensor {name}", "NaN or infinity", "finite values")
    return tensors


def check_stored(
    path: str | os.PathLike,
    file: safe_open,
    name: str,
    shape: tuple[int, ...] | None,
    allowed: Collection[str] = tuple(STORED_DTYPES),
) -> None:
    """Check a stored tensor's type and, unless None, its shape from the file's header."""
    stored = file.get_slice(name)
    dtype, given = stored.get_dtype(), tuple(stored.get_shape())
    require(dtype in allowed, f"{path}: tensor {name}", dtype, ", ".join(allowed))
    is_right = shape is None or given == shape
    require(is_right, f"{path}: tensor {name}", f"shape {given}", f"shape {shape}")


def open_checked(path: str | os.PathLike) -> safe_open:
    """Open a safetensors file. The library compares its header with the file's length, so a
    truncated file is refused.
    """
    if not Path(path).is_file():
        is_folder, where = Path(path).is_dir(), "`resa generate` and `load_pretrained` read those"
        hint = f", but a folder: {where}" if is_folder else ""
        raise FileNotFoundError(f"checkpoint {path}: no such file{hint}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        given = f"got a damaged file ({error})"
        raise ValueError(f"{path}: {given}; allowed: a complete safetensors file") from None


def config_from_json(path: str | os.PathLike, text: str) -> GPTConfig:
    """Read the configuration in a file's header; ValueError naming the file and the field."""
    try:
        values = {"rope_scaling": None, **json.loads(text)}  # files from before there was one
    except (TypeError, ValueError):
        refuse(f"{path}: config", repr(text[:60]), "the JSON of a GPTConfig")
    try:
        scaling = values["rope_scaling"]
        if isinstance(scaling, dict):
            values["rope_scaling"] = from_fields("rope_scaling", RopeScaling, scaling)
        return from_fields("config", GPTConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_fields(argument: str, kind: type, values: Mapping) -> GPTConfig | RopeScaling:
    """Make a dataclass of all its fields: a default must not replace one that was lost."""
    known = [item.name for item in fields(kind)]
    for name in sorted(set(values) ^ set(known)):
        given = "missing" if name in known else "unknown"
        refuse(f"{argument} field {name}", given, ", ".join(known))
    return kind(**values)
