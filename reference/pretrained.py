"""Checkpoint folders as Hugging Face lays them out: config.json, safetensors in one file or several, tokenizer.json.

The dense models of the Qwen2, Qwen3 and Llama 3 families are one `GPT` with other settings. What such a folder says is
either understood or refused by name: a field that this model cannot honour would only show in what it writes. The
weights are mapped into memory and go to the device tensor by tensor, so the folder's size is never held twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .checkpoint import STORED_DTYPES, check_stored, open_checked
from .checks import FLOATS, checked_device, free_memory, is_integer, refuse, require
from .config import GPTConfig, RopeScaling
from .model import GPT, Operations
from .tokenizer import byte_spelling

FAMILIES = ("llama", "qwen2", "qwen3")
INDEX = "model.safetensors.index.json"
# Fields that must have one value here, because others would change what the model computes.
FIXED = {
    "add_cross_attention": False,
    "attention_bias": False,
    "cross_attention_hidden_size": None,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "quantization_config": None,
    "sliding_window": None,
    "use_mrope": False,
    "use_sliding_window": False,
}
# Fields that are read, and fields that say nothing about what one pass computes.
READ = {
    "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder", "label2id",
    "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type",
    "return_dict", "sep_token_id", "task_specific_params", "tie_encoder_decoder", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_bfloat16", "use_cache",
}  # fmt: skip
WHOLE_NUMBERS = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "vocab_size",
}  # fmt: skip


def read_config(folder: str | os.PathLike) -> GPTConfig:
    """The folder's config.json as a `GPTConfig`.

    Errors: FileNotFoundError without one; ValueError naming the file and the field that is missing or not supported.
    """
    path = Path(folder) / "config.json"
    return config_from_values(str(path), read_json(path))


def config_from_values(path: str, values: dict[str, object]) -> GPTConfig:
    """What a config.json says, as a `GPTConfig`; `path` is what messages call it."""
    values = dict(values)
    family = values.get("model_type")
    require(family in FAMILIES, f"{path}: model_type", repr(family), ", ".join(FAMILIES))
    if family != "llama":
        values.pop("sliding_window", None)  # a width, used only if use_sliding_window says so
    for name, value in values.items():
        if name in FIXED:
            require(value in (FIXED[name], None), f"{path}: {name}", repr(value), repr(FIXED[name]))
        elif name not in READ | IGNORED:
            refuse(f"{path}: {name}", "a field unknown here", "fields of dense " + ", ".join(FAMILIES) + " models")
    for name in sorted(WHOLE_NUMBERS | {"rms_norm_eps"}):
        require(name in values, f"{path}: {name}", "missing", "a complete config.json")
    for name in sorted(WHOLE_NUMBERS):
        require(is_integer(values[name], 1), f"{path}: {name}", repr(values[name]), "an integer ≥ 1")
    heads, hidden, n_layer = (values[name] for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    kinds, full = values.get("layer_types"), ["full_attention"] * n_layer
    require(kinds is None or kinds == full, f"{path}: layer_types", repr(kinds), f"{n_layer} times 'full_attention'")
    theta, scaling = _rope(path, values)
    context = values["max_position_embeddings"]
    if scaling is not None and scaling.kind == "yarn":  # folders may state the context before it is stretched
        context = max(context, int(scaling.factor * scaling.original_context))

    def given(name: str, otherwise: object) -> object:
        return otherwise if values.get(name) is None else values[name]

    try:
        return GPTConfig(
            vocab_size=values["vocab_size"],
            n_layer=n_layer,
            n_head=heads,
            n_kv_head=given("num_key_value_heads", heads),
            head_dim=given("head_dim", hidden // heads),
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            context=context,
            rope_theta=theta,
            norm_eps=values["rms_norm_eps"],
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=given("tie_word_embeddings", False),
            rope_scaling=scaling,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _rope(path: str, values: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary angles: one dictionary since 2025, a number and a dictionary before."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, each in (("rope_parameters", new), ("rope_scaling", old)):
        require(each is None or isinstance(each, dict), f"{path}: {name}", repr(each), "a JSON object or null")
    is_one = not new or not old or new == old
    require(is_one, f"{path}: rope_scaling", f"{old} beside rope_parameters = {new}", "one of the two")
    rope = {name: value for name, value in (new or old or {}).items() if value is not None}
    theta = rope.pop("rope_theta", values.get("rope_theta") or 10_000.0)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    share = rope.pop("partial_rotary_factor", 1.0)
    require(share == 1.0, f"{path}: partial_rotary_factor", share, "1.0")
    if kind == "default":
        require(not rope, f"{path}: rope", f"{sorted(rope)} without a rope_type", "no scaling, or one with its type")
        return theta, None
    original = rope.pop("original_max_position_embeddings", values["max_position_embeddings"])
    found = {"kind": kind, "factor": rope.pop("factor", None)}
    if kind == "llama3":
        found |= {"original_context": original, "slow": rope.pop("low_freq_factor", None)}
        found["fast"] = rope.pop("high_freq_factor", None)
    elif kind == "yarn":
        found |= {"original_context": original, "slow": rope.pop("beta_slow", 1.0)}
        found |= {"fast": rope.pop("beta_fast", 32.0), "whole_pairs": rope.pop("truncate", True)}
        amplitude = rope.pop("attention_factor", None)
        if amplitude is None and isinstance(found["factor"], (int, float)):
            amplitude = 0.1 * math.log(max(found["factor"], 1.0)) + 1.0
        found["amplitude"] = amplitude
    for name in rope:
        refuse(f"{path}: rope field {name}", repr(rope[name]), f"the fields of {kind!r} scaling")
    try:
        return theta, RopeScaling(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: rope {error}") from None


def load_pretrained(
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ops: Operations | None = None,
    progress: bool = False,
) -> GPT:
    """The folder's model in eval mode; `dtype` None is the one that its embedding is stored in, `ops` as in `GPT`.

    Errors: FileNotFoundError for a missing file; ValueError naming the file and the field or tensor that is missing,
    extra, misshapen, of another type or not finite; torch.OutOfMemoryError for more weights than the device has room
    for. Names, shapes, types and room are checked before a weight is read.
    """
    folder, device = Path(folder), checked_device("device", device)
    config = read_config(folder)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config) if ops is None else GPT(config, ops=ops)
    names = {name: foreign_name(name) for name, _ in model.named_parameters()}
    with ExitStack() as opened:
        files = {path: opened.enter_context(open_checked(path)) for path in weight_files(folder)}
        home = _homes(folder, files)
        unused = {name for name in home if name.endswith("rotary_emb.inv_freq")}  # computed here
        if config.tied_embeddings:
            unused.add(foreign_name("output.weight"))
        for name in sorted((set(home) - unused) ^ set(names.values())):
            refuse(f"{folder}: tensor {name}", "extra" if name in home else "missing", f"{len(names)} known tensors")
        for name, parameter in model.named_parameters():
            path = home[names[name]]
            check_stored(path, files[path], names[name], tuple(parameter.shape))
        if dtype is None:
            first = names["embed.weight"]
            dtype = STORED_DTYPES[files[home[first]].get_slice(first).get_dtype()]
        require(dtype in FLOATS, "dtype", dtype, ", ".join(map(str, FLOATS)))
        _check_memory(folder, sum(parameter.numel() for parameter in model.parameters()), dtype, device)
        shown = track(names.items(), "Reading weights", console=Console(stderr=True), disable=not progress)
        placed = {name: _placed(home[other], files[home[other]], other, device, dtype) for name, other in shown}
    model.load_state_dict(placed, strict=False, assign=True)
    if config.tied_embeddings:
        model.output.weight = model.embed.weight
    return model.eval()


def _homes(folder: Path, files: Mapping[Path, object]) -> dict[str, Path]:
    """Which file holds which tensor: each in one, and in that which the index names."""
    home: dict[str, Path] = {}
    for path, file in files.items():
        for name in file.keys():  # noqa: SIM118
            require(name not in home, f"{path}: tensor {name}", f"a second one beside {home.get(name)}", "one of each")
            home[name] = path
    index = folder / INDEX
    for name, shard in _weight_map(index).items() if len(files) > 1 else ():
        found = home[name].name if name in home else "missing"
        require(found == shard, f"{index}: tensor {name}", found, f"in {shard}, as the index says")
    return home


def _check_memory(folder: Path, count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Whether so many weights fit the device, before the first is read; `torch.OutOfMemoryError` if not."""
    needed, free = count * dtype.itemsize, free_memory(device)
    if needed > free:
        given = f"{count / 1e9:.2f} billion weights, {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}"
        allowed = f"the {free / 1e9:.1f} GB that {device} has free, so at most {8 * free / count:.1f} bits per weight"
        raise torch.OutOfMemoryError(f"{folder}: got {given}; allowed: {allowed}")


def _placed(path: Path, file: object, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    tensor = file.get_tensor(name).to(device, dtype)
    require(bool(tensor.isfinite().all()), f"{path}: tensor {name}", "NaN or infinity", f"what is finite in {dtype}")
    return tensor


def foreign_name(name: str) -> str:
    """A parameter of `GPT` by the name that these folders give it.

    >>> foreign_name("layers.3.attn.q_proj.bias"), foreign_name("output.weight")
    ('model.layers.3.self_attn.q_proj.bias', 'lm_head.weight')
    """
    if name.startswith("output."):
        return name.replace("output.", "lm_head.")
    for ours, theirs in (
        ("embed.", "embed_tokens."),
        ("attn_norm.", "input_layernorm."),
        ("mlp_norm.", "post_attention_layernorm."),
        (".attn.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: model.safetensors, or those that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() or not index.is_file():
        return [single]
    return [folder / shard for shard in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file name, as the index has it."""
    shards = read_json(index).get("weight_map")
    is_map = isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values())
    require(is_map, f"{index}: weight_map", type(shards).__name__, "file names by tensor")
    for shard in set(shards.values()):
        require(Path(shard).name == shard, f"{index}: weight_map", repr(shard), "files of the same folder")
    return shards


def read_json(path: Path) -> dict[str, object]:
    """An object in a JSON file; FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}); allowed: a JSON object") from None
    require(isinstance(values, dict), str(path), type(values).__name__, "a JSON object")
    return values


def stop_tokens(folder: str | os.PathLike) -> list[int]:
    """Tokens that end a text: of generation_config.json where there is one, else of config.json."""
    path = Path(folder) / "generation_config.json"
    path = path if path.is_file() else Path(folder) / "config.json"
    given = read_json(path).get("eos_token_id")
    found = [] if given is None else given if isinstance(given, list) else [given]
    require(all(is_integer(token, 0) for token in found), f"{path}: eos_token_id", given, "token ids")
    return found


class PretrainedTokenizer:
    """The folder's tokenizer.json, with the methods of a `tiktoken.Encoding` that the command line uses.

    Special tokens in a text are recognised, and those that a text begins with are added, as the file says.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        path = Path(folder) / "tokenizer.json"
        decoder = read_json(path).get("decoder")
        kind = decoder.get("type") if isinstance(decoder, dict) else decoder
        require(kind == "ByteLevel", f"{path}: decoder", repr(kind), "'ByteLevel', as these families have it")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError("tokenizer.json needs the package `tokenizers`: pip install tokenizers") from None
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: got a damaged file ({error}); allowed: a tokenizer.json") from None
        # Files from fine-tuning may carry both; here they would cut or stretch a prompt without a word.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.spelling = byte_spelling()
        self.added = {token: added.content for token, added in self.tokenizer.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; none for an id that the vocabulary leaves unused."""
        if token in self.added:
            return self.added[token].encode()
        return bytes(self.spelling[letter] for letter in self.tokenizer.id_to_token(token) or "")
