"""GGUF files: one file with weights in few bits, configuration, tokenizer and chat template.

The format is that of llama.cpp. The package `gguf` parses it and turns every quantised type into
float32. Here the metadata becomes the fields of a config.json, so that `pretrained.py` checks a
model of either format by the same rules.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..checks import checked_device, is_integer, is_number, refuse, require
from ..config import GPTConfig
from ..model import GPT
from ..rope import RopeScaling, rotary_frequencies
from .checkpoint import STORED_DTYPES, filled, hollow_model
from .pretrained import DEFAULTS, PretrainedTokenizer, check_memory, config_from_values

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# Field of a config.json: key of the metadata, after the architecture's name.
KEYS = {
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
# Keys that must have one value, or be absent: any other would change what the model computes.
FIXED = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": None,
    "attn_logit_softcapping": None,
    "embedding_scale": None,
    "final_logit_softcapping": None,
    "logit_scale": None,
    "residual_scale": None,
    "rope.scale_linear": 1.0,
    "use_parallel_residual": False,
}
# Keys that are read elsewhere, or change nothing in what a pass computes.
IGNORED = {
    "attention.value_length",
    "expert_used_count",
    "rope.dimension_count",
    "tensor_data_layout",
    "vocab_size",
}
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the frequencies, as Llama 3.1 has them
NAMES = {  # ours: GGUF's
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed": "token_embd",
    "norm": "output_norm",
}
# How text is cut before its bytes are merged, by `tokenizer.ggml.pre`: the regular expression (None
# for GPT-2's own), whether digits stand alone before that, and whether characters are composed.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "llama-bpe": (WORDS % "{1,3}", False, False),
    "qwen2": (WORDS % "", False, True),
}
ORDINARY, CONTROL, USER_DEFINED = 1, 3, 4  # `tokenizer.ggml.token_type`


def is_gguf(path: str | os.PathLike) -> bool:
    """Tell whether a path is a file named as GGUF files are."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def open_gguf(path: str | os.PathLike) -> "GGUFReader":
    """Open a file: metadata is read, tensors are mapped.

    Errors: FileNotFoundError; ImportError without the package `gguf`; ValueError for a file that is
    damaged, of another format, or one part of several.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        from gguf import GGUFReader  # only these files need this package
    except ImportError:
        hint = "reading it takes the package `gguf`: pip install gguf tokenizers"
        raise ImportError(f"{path}: {hint}") from None

    class Reader(GGUFReader):
        """Hold the map as a plain array: every slice of a memmap runs Python code."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        reader = Reader(path)
    except Exception as error:  # a cut file may fail anywhere in the library
        given, allowed = "got a damaged or foreign file", "a complete GGUF file"
        raise ValueError(f"{path}: {given} ({error}); allowed: {allowed}") from None
    n_parts = metadata(reader).get("split.count", 1)
    allowed = "one file: `llama-gguf-split --merge` joins the parts"
    require(n_parts in (0, 1), f"{path}", f"one of {n_parts} parts", allowed)
    return reader


def metadata(reader: "GGUFReader") -> dict[str, Any]:
    """Values of the file's metadata by key, without the tokenizer's lists, which are long."""
    listed = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    return {key: item.contents() for key, item in reader.fields.items() if key not in listed}


def gguf_config(path: str, reader: "GGUFReader") -> GPTConfig:
    """Understand the file's metadata by the rules for a config.json; ValueError naming the key."""
    values = metadata(reader)
    family = values.get("general.architecture")
    allowed = ", ".join(DEFAULTS)
    require(family in DEFAULTS, f"{path}: general.architecture", repr(family), allowed)
    found = {name: values.get(f"{family}.{key}") for name, key in KEYS.items()}
    for name, value in found.items():
        is_one = not isinstance(value, list)  # one number for all layers, not one for each
        require(is_one, f"{path}: {family}.{KEYS[name]}", value, "one number for all layers")

    # Refuse what this model cannot honour, and name what it does not know.
    own = {k.removeprefix(f"{family}."): v for k, v in values.items() if k.startswith(f"{family}.")}
    for key, fixed in FIXED.items():
        given = own.get(key)
        require(given in (fixed, None), f"{path}: {family}.{key}", given, f"{fixed} or no such key")
    known = {*KEYS.values(), *FIXED, *IGNORED}
    unknown = sorted(k for k in own if k not in known and not k.startswith("rope.scaling."))
    if unknown:
        text = f"{path}: keys unknown here, taken to change nothing: {', '.join(unknown)}"
        warnings.warn(text, stacklevel=2)
    for name in ("rms_norm_eps", "rope_theta"):
        given, is_optional = found[name], name == "rope_theta"
        is_given = (is_number(given) and given > 0) or (given is None and is_optional)
        require(is_given, f"{path}: {family}.{KEYS[name]}", given, "a number > 0")

    # The metadata leaves out what a config.json states otherwise.
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if is_integer(heads, 1) and is_integer(hidden, 1):
        found["head_dim"] = found["head_dim"] or hidden // heads
    found["num_key_value_heads"] = found["num_key_value_heads"] or heads
    found["num_local_experts"] = found["num_local_experts"] or None
    width = values.get(f"{family}.attention.value_length", found["head_dim"])
    turned = values.get(f"{family}.rope.dimension_count", found["head_dim"])
    for key, given in (("attention.value_length", width), ("rope.dimension_count", turned)):
        require(given == found["head_dim"], f"{path}: {family}.{key}", given, found["head_dim"])

    # The output projection is the embedding where it has no tensor of its own.
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found["tie_word_embeddings"] = "output.weight" not in tensors
    embedding = tensors.get("token_embd.weight")
    require(embedding is not None, f"{path}: tensor token_embd.weight", "missing", "an embedding")
    n_tokens = len(reader.fields["tokenizer.ggml.tokens"].data) if has_tokens(reader) else 0
    found["vocab_size"] = int(embedding.shape[-1])
    allowed = f"{found['vocab_size']}, the embedding's rows"
    require(n_tokens == found["vocab_size"], f"{path}: tokenizer.ggml.tokens", n_tokens, allowed)
    found["rope_parameters"] = _rope_scaling(path, family, values, tensors, found)
    return config_from_values(path, {"model_type": family, **found})


def has_tokens(reader: "GGUFReader") -> bool:
    """Tell whether the file holds a list of tokens."""
    return "tokenizer.ggml.tokens" in reader.fields


def _rope_scaling(
    path: str,
    family: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, "ReaderTensor"],
    found: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Translate how RoPE is stretched to the dictionary of a config.json."""
    # Llama 3.1 stores what its frequencies are divided by. The largest of these is its factor; the
    # others follow from it, which is checked.
    if ROPE_FACTORS in tensors:
        data = tensors[ROPE_FACTORS].data
        stored = torch.tensor(data, dtype=torch.float32, device="cpu").flatten()
        scaling = RopeScaling("llama3", max(float(stored.max()), 1.0))
        size, theta = found["head_dim"], found["rope_theta"] or 10_000.0
        plain, scaled = (
            rotary_frequencies(size, theta, each, torch.device("cpu"), torch.float64)
            for each in (None, scaling)
        )
        is_known = len(stored) == size // 2 and torch.allclose(
            stored.double(), plain / scaled, rtol=1e-4
        )
        allowed = "Llama 3.1's, which slow pairs down between 1 and 4 turns in 8,192 tokens"
        require(is_known, f"{path}: {ROPE_FACTORS}", "other factors", allowed)
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.slow,
            "high_freq_factor": scaling.fast,
            "original_max_position_embeddings": scaling.original_context,
        }

    prefix = f"{family}.rope.scaling."
    given = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    kind = given.pop("type", "linear" if "factor" in given else "none")  # as llama.cpp has it
    given.pop("finetuned", None)  # says how the model came to be
    if given.get("attn_factor") == 1.0:  # it multiplies the amplitude
        del given["attn_factor"]
    if kind == "none":
        return None
    translated = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    return {"rope_type": kind, **{translated.get(k, k): v for k, v in given.items()}}


def load_gguf(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    reader: "GGUFReader | None" = None,
) -> GPT:
    """Read the file's model, in eval mode; `dtype=None` is float32 where weights are quantised.

    `reader` is the file, if it is open already. Names, shapes, types and room are checked before a
    weight is read. Errors: those of `open_gguf` and `load_pretrained`.
    """
    device = checked_device("device", device)
    reader = open_gguf(path) if reader is None else reader
    config = gguf_config(str(path), reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    n_tensors = len(tensors)
    # One layer has several tensors: a damaged count must not make us build a billion layers.
    allowed = f"at most the file's {n_tensors} tensors"
    require(config.n_layer <= n_tensors, f"{path}: block_count", config.n_layer, allowed)
    model = hollow_model(config)

    # Every tensor must be there, in its shape, and no other.
    names = {name: gguf_name(name) for name, _ in model.named_parameters()}
    for name in sorted((set(tensors) - {ROPE_FACTORS}) ^ set(names.values())):
        given = "extra" if name in tensors else "missing"
        refuse(f"{path}: tensor {name}", given, f"{len(names)} known tensors")
    for name, parameter in model.named_parameters():
        shape, given = tuple(parameter.shape), tuple(tensors[names[name]].shape.tolist())[::-1]
        at = f"{path}: tensor {names[name]}"
        require(given == shape, at, f"shape {given}", f"shape {shape}")
    if dtype is None:
        kind = tensors[names["embed.weight"]].tensor_type.name
        dtype = STORED_DTYPES.get(kind, torch.float32)
    dtypes = STORED_DTYPES.values()
    require(dtype in dtypes, "dtype", dtype, ", ".join(map(str, dtypes)))
    count = sum(parameter.numel() for parameter in model.parameters())
    check_memory(path, count, dtype, device)

    is_llama = config_family(reader) == "llama"
    placed, console = {}, Console(stderr=True)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in track(names, "Reading weights", console=console, disable=not progress):
        weight = dequantised(path, tensors[names[name]]).view(shapes[name])
        if is_llama and (".q_proj." in name or ".k_proj." in name):
            weight = in_halves(weight, config.head_dim)
        placed[name] = tensor = weight.to(device, dtype)
        is_finite, allowed = bool(tensor.isfinite().all()), f"what is finite in {dtype}"
        require(is_finite, f"{path}: tensor {names[name]}", "NaN or infinity", allowed)
    return filled(model, placed)


def config_family(reader: "GGUFReader") -> str:
    """Read the architecture's name."""
    return reader.fields["general.architecture"].contents()


def gguf_name(name: str) -> str:
    """Translate a parameter of `GPT` to the name that GGUF files give it.

    >>> gguf_name("layers.3.attn.q_proj.bias"), gguf_name("norm.weight")
    ('blk.3.attn_q.bias', 'output_norm.weight')
    """
    layer, parts = "", name.split(".")
    if parts[0] == "layers":
        layer, parts = f"blk.{parts[1]}.", parts[2:]
    stem, kind = ".".join(parts[:-1]), parts[-1]
    return f"{layer}{NAMES.get(stem, stem)}.{kind}"


def dequantised(path: str | os.PathLike, tensor: "ReaderTensor") -> Tensor:
    """Read one tensor as float32, flat; ValueError for a type that the library cannot read."""
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).flatten()
    except NotImplementedError:
        given = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        refuse(f"{path}: tensor {tensor.name}", f"type {given}", "a type that `gguf` dequantises")


def in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Put the rows of queries or keys back where rotated pairs lie half a head apart.

    Architecture llama stores the two channels of a pair side by side: per head [D/2, 2] → [2, D/2].

    >>> in_halves(torch.arange(4)[:, None], 4).flatten().tolist()
    [0, 2, 1, 3]
    """
    heads = rows.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def gguf_tokenizer(path: str | os.PathLike, reader: "GGUFReader") -> PretrainedTokenizer:
    """Make the tokenizer of the metadata: byte-level BPE, cut as `tokenizer.ggml.pre` says.

    Errors: ImportError without the package `tokenizers`; ValueError naming a kind not supported.
    """
    values = metadata(reader)
    kind, cut = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    allowed = "'gpt2', byte-level BPE: for others give the model's folder"
    require(kind == "gpt2", f"{path}: tokenizer.ggml.model", repr(kind), allowed)
    require(cut in CUTS, f"{path}: tokenizer.ggml.pre", repr(cut), ", ".join(CUTS))
    ends = values.get("tokenizer.ggml.add_eos_token")
    require(not ends, f"{path}: tokenizer.ggml.add_eos_token", ends, "false: a prompt goes on")
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
        from tokenizers.models import BPE
        from tokenizers.processors import TemplateProcessing
    except ImportError:
        hint = "reading it takes the package `tokenizers`: pip install tokenizers"
        raise ImportError(f"{path}: {hint}") from None

    # Merge bytes as the lists say. Llama 3 takes a whole word that is a token without merging.
    lists = ("tokens", "merges", "token_type")
    keys = [f"tokenizer.ggml.{name}" for name in lists]
    for key in keys[:2]:
        require(key in reader.fields, f"{path}: {key}", "missing", "the tokenizer's list")
    tokens, merges, kinds = (
        reader.fields[key].contents() if key in reader.fields else [] for key in keys
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    given, allowed = f"{len(vocabulary)} different ones", f"{len(tokens)}, one for each id"
    require(len(vocabulary) == len(tokens), f"{path}: tokenizer.ggml.tokens", given, allowed)
    is_llama3 = cut == "llama-bpe"
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=is_llama3))
    except Exception as error:  # the library raises nothing narrower
        given, allowed = str(error).splitlines()[0], "pairs of tokens that make a token"
        refuse(f"{path}: tokenizer.ggml.merges", given, allowed)

    # Cut text before merging.
    pattern, single_digits, is_composed = CUTS[cut]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if is_composed:
        tokenizer.normalizer = normalizers.NFC()

    # Tokens with a meaning of their own are found in a text before it is cut.
    special = {CONTROL: True, USER_DEFINED: False}
    for token, each in zip(tokens, kinds, strict=False):
        if each in special:
            added = AddedToken(token, special=special[each], normalized=False)
            tokenizer.add_tokens([added])
    first = token_id(path, reader, "bos")
    if values.get("tokenizer.ggml.add_bos_token", is_llama3) and first is not None:
        opening = [(tokens[first], first)]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[first]}:0 $A:0", special_tokens=opening
        )
    return PretrainedTokenizer(tokenizer)


def token_id(path: str | os.PathLike, reader: "GGUFReader", name: str) -> int | None:
    """Read the id of a special token such as "bos"; None if the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    field, n_tokens = reader.fields.get(key), len(reader.fields["tokenizer.ggml.tokens"].data)
    given = None if field is None else field.contents()
    is_token = given is None or (is_integer(given, 0) and given < n_tokens)
    require(is_token, f"{path}: {key}", repr(given), f"0 … {n_tokens - 1}")
    return given


def gguf_stop_tokens(path: str | os.PathLike, reader: "GGUFReader") -> list[int]:
    """Tokens that end a text or a turn of a chat."""
    found = (token_id(path, reader, name) for name in ("eos", "eot"))
    return sorted({token for token in found if token is not None})


def gguf_special_tokens(path: str | os.PathLike, reader: "GGUFReader") -> dict[str, str]:
    """Read the texts of special tokens, by their names in templates."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {theirs: token_id(path, reader, ours) for ours, theirs in names.items()}
    tokens = reader.fields["tokenizer.ggml.tokens"]
    return {f"{n}_token": tokens.contents(i) for n, i in found.items() if i is not None}
