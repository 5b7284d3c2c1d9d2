"""`resa generate`: continue a text, written token by token.

A sparse step has work that a dense one does without, so on a GPU a short cache decodes faster
densely. A backend that has measured where this ends decodes densely up to there, then sparsely.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import tiktoken
import torch
from rich.console import Console

from ..checks import checked_device, require, require_integer
from ..config import ReSAConfig
from ..model import GPT
from ..requests import check_request
from ..sampling import Sampling
from ..weights.checkpoint import load_model
from ..weights.pretrained import PretrainedTokenizer, load_pretrained, stop_tokens
from ..weights.tokenizer import load_tokenizer
from . import main as cli


def add_generate(commands: cli.Commands) -> cli.Parser:
    """Add the command."""
    parser = cli.add_command(commands, "generate", continue_text)
    source = parser.add_mutually_exclusive_group()
    text = "the text to continue (default: the head of a function)"
    source.add_argument("prompt", nargs="?", default="def fibonacci(n):\n", help=text)
    source.add_argument("--prompt-file", type=Path, help="continue this file instead")
    parser.option("--tokens", 128, "how many tokens to write")
    text = "f: a dense pass repairs the cache every f tokens; never: leave the errors in it; 1 is"
    text += " dense decoding (with --schedule paper: sparse steps over an exact cache)"
    parser.option("--interval", 32, text, type=_interval)
    cli.add_sparsity(parser, schedule="fused")
    text = "decode densely until this many tokens are cached (default: until sparse decoding was"
    text += " measured to be faster on a GPU; 0 for the reference)"
    parser.option("--dense-below", None, text, type=int)
    parser.option("--temperature", 0.0, "0 takes the most likely token; more is bolder")
    text = "sample from the fewest likeliest tokens whose probabilities add up to this"
    parser.option("--top-p", 1.0, text)
    text = "sample from this many of the likeliest tokens (default: all)"
    parser.option("--top-k", None, text, type=int)
    parser.option("--seed", 0, "seed of the random numbers", type=cli.seed)
    parser.option("--json", False, "print one JSON object at the end instead of text")
    text = "data type of weights and cache; auto: a folder's own, float32 for a file"
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.option("--dtype", "auto", text, choices=dtypes)
    cli.add_model(parser, "a safetensors file, or the folder of a Qwen2, Qwen3 or Llama 3 model")
    return parser


def _interval(text: str) -> int | None:
    if text != "never" and not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: an integer ≥ 1, or never")
    return None if text == "never" else int(text)


def continue_text(options: argparse.Namespace) -> None:
    """Continue a text. Reads a prompt and writes the model's continuation, token by token. The
    shipped model writes Python; --model takes the folder of a Qwen2, Qwen3 or Llama 3 model.
    """
    # Refuse what is wrong before the work; the backend may refuse more.
    text = options.prompt if options.prompt_file is None else cli.read_text(options.prompt_file)
    name, n_tokens = cli.chosen_backend(options), options.tokens
    config = cli.sparsity(options, interval=options.interval)
    require_integer("--tokens", n_tokens, 0)
    sampling = Sampling(options.temperature, options.top_p, options.top_k)
    backend, dense_below = options.backends[name], options.dense_below
    if dense_below is None:
        dense_below = 0 if backend.crossover is None else backend.crossover()
    require_integer("--dense-below", dense_below, 0)
    model, tokenizer, stop = _load_any(options)
    prompt = tokenizer.encode_ordinary(text)
    require(len(prompt) > 0, "prompt", repr(text), "at least one character")
    check_request(model, [prompt], n_tokens, config, sampling, stop, None)

    # Short requests are decoded densely, unless all of it is asked to be.
    is_dense = config.interval == 1 and config.schedule == "fused"
    n_dense = 0 if is_dense else min(max(dense_below - len(prompt), 0), n_tokens)

    # Decode. Tokens are written as they come, in JSON at the end.
    reading = Console(stderr=True).status(f"Reading {len(prompt):,} tokens …")

    def begin() -> None:
        reading.stop()
        if n_dense > 0:
            how_much = "all of it is dense, below" if n_dense == n_tokens else "dense up to"
            is_measured = options.dense_below is None
            why = "measured to be faster" if is_measured else "as --dense-below says"
            print(f"{how_much} {dense_below:,} tokens, {why}", file=sys.stderr)
        print(text, end="", flush=True)

    writer = Writer(tokenizer.decode, begin)
    request = {
        "sampling": sampling,
        "generators": [torch.Generator().manual_seed(options.seed)],
        "stop_tokens": stop,
        "on_token": None if options.json else writer,
    }
    started = time.perf_counter()
    with reading:
        tokens = decode(backend, model, prompt, n_tokens, config, n_dense, **request)
    seconds = time.perf_counter() - started
    if options.json:
        result = {"prompt_tokens": len(prompt), "tokens": tokens, "text": tokenizer.decode(tokens)}
        result |= {"backend": name, "dense_below": dense_below, "seconds": round(seconds, 3)}
        cli.report(result)
    else:
        writer.close()
        counts = f"{len(prompt)} + {len(tokens)} tokens"
        print(f"{counts} in {seconds:.1f} s (backend {name})", file=sys.stderr)


def decode(
    backend: cli.Backend,
    model: GPT,
    prompt: Sequence[int],
    n_tokens: int,
    config: ReSAConfig,
    n_dense: int,
    **request: Any,
) -> list[int]:
    """Continue a prompt: the first `n_dense` tokens densely, the others as `config` says.

    `request` are more arguments of `generate`. Both parts draw from the same generator, so the text
    is one sample.
    """
    if n_dense == 0:
        return backend.generate(model, [prompt], n_tokens, config, **request)[0].tokens

    # The text may end here: all of it may be dense, or the last token may be a stop token.
    dense = replace(config, interval=1, schedule="fused")
    (start,) = backend.generate(model, [prompt], n_dense, dense, **request)
    if n_dense == n_tokens or start.tokens[-1] in request["stop_tokens"]:
        return start.tokens

    # Go on from the cache and the pending token; there is no next prompt.
    (rest,) = backend.generate(model, [[]], n_tokens - n_dense, config, resume=start, **request)
    return start.tokens + rest.tokens


class Writer:
    """Writes tokens as they come. A character whose bytes span tokens waits until it is whole.

    `begin` is called before anything is written: with the first token, when no backend can refuse
    the request any more.
    """

    def __init__(self, decode: Callable[[list[int]], str], begin: Callable[[], None]) -> None:
        self.decode, self.begin, self.has_begun = decode, begin, False
        self.waiting: list[int] = []

    def __call__(self, sequence: int, position: int, token: int) -> None:
        self.waiting.append(token)
        text = self.decode(self.waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text)

    def write(self, text: str) -> None:
        """Write what no token waits for any more."""
        if not self.has_begun:
            self.has_begun = True
            self.begin()
        self.waiting = []
        print(text, end="", flush=True)

    def close(self) -> None:
        """Write what never became whole, and end the line."""
        self.write(self.decode(self.waiting) + "\n")


Tokenizer: TypeAlias = tiktoken.Encoding | PretrainedTokenizer


def _load_any(options: argparse.Namespace) -> tuple[GPT, Tokenizer, list[int]]:
    """Load the model of a checkpoint file or of a folder, its tokenizer, and its stop tokens."""
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    device = checked_device("--device", options.device)
    if options.model.is_dir():
        tokenizer = PretrainedTokenizer(options.model)  # before the weights, which take longer
        stop = stop_tokens(options.model)
        model = load_pretrained(options.model, dtype=dtype, device=device, progress=True)
        return model, tokenizer, stop

    model = load_model(options.model, dtype=dtype or torch.float32, device=device)
    tokenizer = load_tokenizer()
    return model, tokenizer, [tokenizer.eot_token]
