"""Checkpoint folders as Hugging Face lays them out: config.json, safetensors, tokenizer.json.

The dense models of the Qwen2, Qwen3 and Llama 3 families are one `GPT` with other settings. Fields
that are known to change the computation are checked by value, and one warning names those that are
unknown. Weights are mapped into memory and go to the device tensor by tensor, so the folder's size
is never held twice.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ..checks import checked_device, free_memory, is_integer, memory_there_is, refuse, require
from ..config import GPTConfig
from ..model import GPT
from ..rope import RopeScaling
from .checkpoint import STORED_DTYPES, check_stored, filled, hollow_model, open_checked

SINGLE = "model.safetensors"  # holds all weights, unless an index beside it names several files
PICKLED = (".bin", ".ckpt", ".pt", ".pth")  # such files are code, and are never opened
# Fields that must have one value, or be null: any other would change what the model computes.
FIXED = {
    "add_cross_attention": False, "alibi": False, "attention_bias": False,
    "attention_multiplier": 1.0, "attn_logit_softcapping": None, "clip_qkv": None,
    "cross_attention_hidden_size": None, "embedding_multiplier": 1.0,
    "final_logit_softcapping": None, "hidden_act": "silu",
    "is_encoder_decoder": False, "logit_scale": 1.0, "logits_scaling": 1.0, "mlp_bias": False,
    "no_rope_layers": None, "num_experts": 0, "num_local_experts": 0, "parallel_attn": False,
    "partial_rotary_factor": 1.0, "pretraining_tp": 1, "quantization_config": None,
    "residual_multiplier": 1.0, "rope_interleaved": False, "sliding_window": None,
    "use_mrope": False, "use_parallel_residual": False, "use_sliding_window": False,
}  # fmt: skip
# What a family's model has where its config.json leaves a field out.
DEFAULTS = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# Fields that are read, and fields that change nothing in what a pass computes.
SIZES = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "vocab_size",
)  # fmt: skip
READ = {
    *SIZES, "head_dim", "layer_types", "model_type", "num_key_value_heads", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
}  # fmt: skip
IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "architectures", "attention_dropout", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task",
    "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id",
    "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
    "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tie_encoder_decoder",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a model's weights as safetensors."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        allowed = "the model with the adapter merged into it: peft's merge_and_unload does that"
        refuse(str(folder), "an adapter without its model", allowed)
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
        refuse(str(folder), "a folder of GGUF files", f"one of them, such as {files[0]}")
    is_readable = any(folder.glob("*.safetensors"))
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled and not is_readable:
        allowed = "safetensors: transformers' save_pretrained writes them"
        refuse(str(folder), f"{pickled[0]}, which is pickled code", allowed)


def read_config(folder: str | os.PathLike) -> GPTConfig:
    """Read the folder's config.json.

    Errors: FileNotFoundError without one; ValueError naming the file and the field that is missing
    or not supported.
    """
    path = Path(folder) / "config.json"
    return config_from_values(str(path), read_json(path))


def config_from_values(path: str, values: Mapping[str, object]) -> GPTConfig:
    """Understand the fields of a config.json; messages call it `path`."""
    # Refuse what this model cannot honour, and name what it does not know.
    family = values.get("model_type")
    require(family in DEFAULTS, f"{path}: model_type", repr(family), ", ".join(DEFAULTS))
    values = {**DEFAULTS[family], **values}
    if family != "llama":
        values.pop("sliding_window", None)  # a width, used only if use_sliding_window says so
    for name, fixed in FIXED.items():
        value = values.get(name)
        allowed = repr(fixed)
        if name == "quantization_config":  # GPTQ, AWQ, bitsandbytes, …
            if isinstance(value, dict) and "quant_method" in value:  # the rest is long
                value = {"quant_method": value["quant_method"]}
            allowed = "the model before it was quantised, or a GGUF file of it"
        require(value in (fixed, None), f"{path}: {name}", repr(value), allowed)
    unknown = sorted(set(values) - FIXED.keys() - READ - IGNORED)
    if unknown:
        text = f"{path}: fields unknown here, taken to change nothing: {', '.join(unknown)}"
        warnings.warn(text, stacklevel=2)
    for name in SIZES:
        given = values.get(name)
        require(is_integer(given, 1), f"{path}: {name}", repr(given), "an integer ≥ 1")
    n_layer, kinds = values["num_hidden_layers"], values.get("layer_types")
    is_full = kinds is None or kinds == ["full_attention"] * n_layer
    require(is_full, f"{path}: layer_types", repr(kinds), f"{n_layer} times 'full_attention'")

    # Folders may state the context before yarn stretches it.
    theta, scaling = _rope(path, values)
    context = values["max_position_embeddings"]
    if scaling is not None and scaling.kind == "yarn":
        context = max(context, int(scaling.factor * scaling.original_context))

    # A field that is null, like one left out, takes its default.
    stated = {name: value for name, value in values.items() if value is not None}
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    try:
        return GPTConfig(
            vocab_size=values["vocab_size"],
            n_layer=n_layer,
            n_head=heads,
            n_kv_head=stated.get("num_key_value_heads", heads),
            head_dim=stated.get("head_dim", hidden // heads),
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            context=context,
            rope_theta=theta,
            norm_eps=stated.get("rms_norm_eps", 1e-6),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=stated.get("tie_word_embeddings", False),
            rope_scaling=scaling,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _rope(path: str, values: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    """Read base and scaling of RoPE: one dictionary since 2025, two fields before."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, each in (("rope_parameters", new), ("rope_scaling", old)):
        is_object = each is None or isinstance(each, dict)
        require(is_object, f"{path}: {name}", repr(each), "a JSON object or null")
    is_one, given = not new or not old or new == old, f"{old} beside rope_parameters = {new}"
    require(is_one, f"{path}: rope_scaling", given, "one of the two")
    rope = {name: value for name, value in (new or old or {}).items() if value is not None}
    theta = rope.pop("rope_theta", values.get("rope_theta") or 10_000.0)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    share = rope.pop("partial_rotary_factor", 1.0)
    require(share == 1.0, f"{path}: partial_rotary_factor", share, "1.0")
    if kind == "default":
        given = f"{sorted(rope)} without a rope_type"
        require(not rope, f"{path}: rope", given, "no scaling, or one with its type")
        return theta, None

    # Each kind has fields of its own; what is left over is refused.
    found = {"kind": kind, "factor": rope.pop("factor", None)}
    original = rope.pop("original_max_position_embeddings", values["max_position_embeddings"])
    if kind in ("llama3", "yarn"):
        found["original_context"] = original
    if kind == "llama3":
        found["slow"] = rope.pop("low_freq_factor", None)
        found["fast"] = rope.pop("high_freq_factor", None)
    elif kind == "yarn":
        found["slow"], found["fast"] = rope.pop("beta_slow", 1.0), rope.pop("beta_fast", 32.0)
        found["whole_pairs"] = rope.pop("truncate", True)
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
    progress: bool = False,
) -> GPT:
    """Read the model of a folder, or of a GGUF file, in eval mode.

    `dtype=None` keeps the one in which the embedding is stored, float32 if that is quantised.
    Names, shapes, types and room are checked before a weight is read. Errors: FileNotFoundError for
    a missing file; ValueError naming the file and the field or tensor that is missing, extra,
    misshapen, of another type or not finite; torch.OutOfMemoryError if the device lacks the room.
    """
    from .gguf import is_gguf, load_gguf  # it imports this file

    if is_gguf(folder):
        return load_gguf(folder, dtype=dtype, device=device, progress=progress)
    folder, device = Path(folder), checked_device("device", device)
    check_folder(folder)
    config = read_config(folder)
    model = hollow_model(config)
    names = {name: foreign_name(name) for name, _ in model.named_parameters()}
    with ExitStack() as opened:
        # Every tensor must be there once, where the index names it, and no other.
        shards = weight_map(folder)
        paths = [folder / shard for shard in sorted(set(shards.values()) or {SINGLE})]
        files = {path: opened.enter_context(open_checked(path)) for path in paths}
        home: dict[str, Path] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118
                indexed = shards.get(name, "no file") if shards else path.name
                where, allowed = f"in {path.name}", f"in {indexed}, as the index says"
                require(indexed == path.name, f"{folder}: tensor {name}", where, allowed)
                home[name] = path
        unused = {name for name in home if name.endswith("rotary_emb.inv_freq")}  # computed here
        if config.tied_embeddings:
            unused.add(foreign_name("output.weight"))
        for name in sorted((set(home) - unused) ^ set(names.values())):
            given = "extra" if name in home else "missing"
            refuse(f"{folder}: tensor {name}", given, f"{len(names)} known tensors")

        # Shapes, types and room come before any weight.
        for name, parameter in model.named_parameters():
            path = home[names[name]]
            check_stored(path, files[path], names[name], tuple(parameter.shape))
        if dtype is None:
            first = names["embed.weight"]
            dtype = STORED_DTYPES[files[home[first]].get_slice(first).get_dtype()]
        dtypes = STORED_DTYPES.values()
        require(dtype in dtypes, "dtype", dtype, ", ".join(map(str, dtypes)))
        count = sum(parameter.numel() for parameter in model.parameters())
        check_memory(folder, count, dtype, device)

        placed, console = {}, Console(stderr=True)
        for name in track(names, "Reading weights", console=console, disable=not progress):
            path, other = home[names[name]], names[name]
            placed[name] = tensor = files[path].get_tensor(other).to(device, dtype)
            is_finite, allowed = bool(tensor.isfinite().all()), f"what is finite in {dtype}"
            require(is_finite, f"{path}: tensor {other}", "NaN or infinity", allowed)
    return filled(model, placed)


def check_memory(
    path: str | os.PathLike, count: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse more weights than the device has room for: `torch.OutOfMemoryError`."""
    needed, free = count * dtype.itemsize, free_memory(device)
    if needed > free:
        name, bits = str(dtype).removeprefix("torch."), 8 * free / count
        given = f"{count / 1e9:.2f} billion weights, {needed / 1e9:.1f} GB in {name}"
        allowed = f"{memory_there_is(device, free)}, so at most {bits:.1f} bits per weight"
        raise torch.OutOfMemoryError(f"{path}: got {given}; allowed: {allowed}")


def foreign_name(name: str) -> str:
    """Translate a parameter of `GPT` to the name that these folders give it.

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


def weight_map(folder: Path) -> dict[str, str]:
    """Read each tensor's file name from the index; empty if model.safetensors holds them all."""
    index = folder / f"{SINGLE}.index.json"
    if (folder / SINGLE).is_file() or not index.is_file():
        return {}
    shards = read_json(index).get("weight_map")
    require(isinstance(shards, dict), f"{index}: weight_map", repr(shards)[:60], "an object")
    for name, shard in shards.items():
        is_name = isinstance(shard, str) and Path(shard).name == shard
        require(is_name, f"{index}: weight_map: {name}", repr(shard), "a file of this folder")
    return shards


def read_json(path: Path) -> dict[str, object]:
    """Read an object from a JSON file; FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}); allowed: a JSON object") from None
    require(isinstance(values, dict), str(path), type(values).__name__, "a JSON object")
    return values


def stop_tokens(folder: str | os.PathLike) -> list[int]:
    """Tokens that end a text, from generation_config.json if there is one, else config.json."""
    path = Path(folder) / "generation_config.json"
    path = path if path.is_file() else Path(folder) / "config.json"
    given = read_json(path).get("eos_token_id")
    found = [] if given is None else given if isinstance(given, list) else [given]
    are_tokens = all(is_integer(token, 0) for token in found)
    require(are_tokens, f"{path}: eos_token_id", given, "token ids")
    return found


class PretrainedTokenizer:
    """A tokenizer of the library `tokenizers`, with the methods of `tiktoken.Encoding`."""

    def __init__(self, tokenizer: Any) -> None:
        # Fine-tuning may leave both in the file; they would cut or stretch a prompt unasked.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer

    @property
    def n_vocab(self) -> int:
        """Tokens, special ones included."""
        return self.tokenizer.get_vocab_size()

    def encode_ordinary(self, text: str) -> list[int]:
        """Tokens of a text. Special ones in it are recognised; the file may add some before it."""
        return self.tokenizer.encode(text).ids

    def encode_chat(self, text: str) -> list[int]:
        """Tokens of a text that a chat template has rendered: it holds its special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included; nothing for an id without a token."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)


def read_tokenizer(folder: str | os.PathLike) -> PretrainedTokenizer:
    """Read the folder's tokenizer.json.

    Errors: FileNotFoundError; ImportError without the package `tokenizers`; ValueError for a file
    that is damaged or of a kind that these families do not have.
    """
    path = Path(folder) / "tokenizer.json"
    decoder = read_json(path).get("decoder")
    kind = decoder.get("type") if isinstance(decoder, dict) else decoder
    allowed = "'ByteLevel', as these families have it"
    require(kind == "ByteLevel", f"{path}: decoder", repr(kind), allowed)
    try:
        from tokenizers import Tokenizer  # only folders need this package
    except ImportError:
        hint = "reading it takes the package `tokenizers`: pip install tokenizers"
        raise ImportError(f"{path}: {hint}") from None
    try:
        return PretrainedTokenizer(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        given = f"got a damaged file ({error})"
        raise ValueError(f"{path}: {given}; allowed: a tokenizer.json") from None


def read_chat_template(folder: str | os.PathLike) -> str | None:
    """Read the Jinja template by which the folder's model is spoken to; None if there is none."""
    file, path = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(given, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
        given = named.get("default")
    is_text = given is None or isinstance(given, str)
    require(is_text, f"{path}: chat_template", type(given).__name__, "a Jinja template")
    return given
