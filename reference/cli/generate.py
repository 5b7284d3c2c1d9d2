"""`resa generate`: continue a text, written token by token.

A sparse step has work that a dense one does without, so on a GPU a short cache decodes faster
densely. A backend that has measured where this ends decodes densely up to there, then sparsely.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..blocks import active_blocks
from ..checks import refuse, require, require_integer
from ..config import ReSAConfig
from ..model import GPT
from ..requests import check_request
from ..sampling import Sampling
from ..weights.chat import render_chat
from ..weights.models import TextModel, Tokenizer
from . import main as cli


def add_generate(commands: cli.Commands) -> cli.Parser:
    """Add the command."""
    parser = cli.add_command(commands, "generate", continue_text)
    source = parser.add_mutually_exclusive_group()
    text = "the text to continue (default: the head of a function)"
    source.add_argument("prompt", nargs="?", default="def fibonacci(n):\n", help=text)
    text = "continue this file instead; a pipe such as /dev/stdin works too"
    source.add_argument("--prompt-file", type=Path, help=text)
    text = "read the last so many tokens of the text, the end of a long file (default: all)"
    parser.option("--prompt-tokens", None, text, type=int)
    text = "answer the text instead of continuing it: it becomes a user's message, in the form that"
    parser.option("--chat", False, f"{text} the model was trained on")
    parser.option("--tokens", 128, "how many tokens to write")
    text = "f: a dense pass repairs the cache every f tokens; never: leave the errors in it; 1 is"
    text += " dense decoding (with --schedule paper: sparse steps over an exact cache)"
    parser.option("--interval", 32, text, type=_interval)
    cli.add_sparsity(parser, schedule="fused", selection="sketch")
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
    text = "data type of weights and cache; auto: the file's own, float32 for shipped and quantised"
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.option("--dtype", "auto", text, choices=dtypes)
    cli.add_model(parser)
    return parser


def _interval(text: str) -> int | None:
    if text != "never" and not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: an integer ≥ 1, or never")
    return None if text == "never" else cli.integer(text)


def continue_text(options: argparse.Namespace) -> None:
    """Continue a text. Reads a prompt and writes the model's continuation, token by token. The
    shipped model writes Python. --model smollm2 --chat answers in English. The last line, on
    standard error, says how much of the cache the steps read.
    """
    # Refuse what is wrong before the work; the backend may refuse more.
    text = options.prompt if options.prompt_file is None else cli.read_text(options.prompt_file)
    name, n_tokens = cli.chosen_backend(options), options.tokens
    config = cli.sparsity(options, interval=options.interval)
    require_integer("--tokens", n_tokens, 0)
    sampling = Sampling(options.temperature, options.top_p, options.top_k)
    backend, dense_below = options.backends[name], options.dense_below
    if dense_below is None:
        dense_below = 0 if backend.crossover is None else backend.crossover(config.selection)
    require_integer("--dense-below", dense_below, 0)
    newest, is_chat = options.prompt_tokens, options.chat
    require(newest is None or newest >= 1, "--prompt-tokens", newest, "an integer ≥ 1")
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    loaded = cli.load(options, dtype)
    model, tokenizer, stop = loaded.model, loaded.tokenizer, loaded.stop_tokens
    allowed = "a model that was trained to chat, such as smollm2"
    is_able = loaded.chat_template is not None or not is_chat
    require(is_able, "--chat", f"model {options.model}, without a chat template", allowed)
    text, prompt = read_prompt(loaded, text, newest, is_chat)
    require(len(prompt) > 0, "prompt", repr(text), "at least one character")
    context = model.config.context
    room = context - max(n_tokens - 1, 0)
    if len(prompt) > room:
        room -= len(read_prompt(loaded, "", None, True)[1]) if is_chat else 0  # the template's own
        hint = f" (--prompt-tokens {room} reads the end of a longer one)" if room > 0 else ""
        given = f"{len(prompt):,} tokens and --tokens {n_tokens}"
        refuse("prompt", given, f"context = {context:,} tokens in all{hint}")
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

    hidden = stop if is_chat else ()  # the end of an answer is no part of it
    writer = Writer(tokenizer.decode, begin, hidden)
    request = {
        "sampling": sampling,
        "generators": [torch.Generator().manual_seed(options.seed)],
        "stop_tokens": stop,
        "on_token": None if options.json else writer,
    }
    started = time.perf_counter()
    with reading, backend.watched(reading.update):
        tokens = decode(backend, model, prompt, n_tokens, config, n_dense, **request)
    seconds = time.perf_counter() - started
    reads = count_reads(len(prompt), len(tokens), config, n_dense)
    if options.json:
        written = tokenizer.decode([token for token in tokens if token not in hidden])
        result = {"prompt_tokens": len(prompt), "tokens": tokens, "text": written}
        result |= {"backend": name, "dense_below": dense_below, "reads": asdict(reads)}
        result |= {"seconds": round(seconds, 3)}
        cli.report(result)
    else:
        writer.close()
        counts = f"{len(prompt):,} + {len(tokens):,} tokens in {seconds:.1f} s (backend {name})"
        told = reads.sentence(config, model.config.n_layer)
        print(f"{counts}. {told}" if told else counts, file=sys.stderr)


def read_prompt(
    loaded: TextModel, text: str, newest: int | None, is_chat: bool
) -> tuple[str, list[int]]:
    """Encode what is read of a text → what is printed before the continuation, and the tokens.

    `newest` keeps so many last tokens. A token that the tokenizer puts before every text stays in
    its place. A chat's message is cut before the template goes around it, and nothing is printed.
    """
    tokenizer = loaded.tokenizer
    tokens = newest_tokens(tokenizer, text, newest)
    if len(tokens) < len(tokenizer.encode_ordinary(text)):
        text = tokenizer.decode(tokens[len(tokenizer.encode_ordinary("")) :])
    if not is_chat:
        return text, tokens
    return "", tokenizer.encode_chat(render_chat(loaded.chat_template, text, loaded.special_tokens))


def newest_tokens(tokenizer: Tokenizer, text: str, newest: int | None) -> list[int]:
    """Encode a text and keep its last tokens, with those that open every text before them."""
    tokens, opening = tokenizer.encode_ordinary(text), tokenizer.encode_ordinary("")
    if newest is None or len(tokens) <= newest:
        return tokens
    n_kept = newest - len(opening)
    require(n_kept >= 1, "--prompt-tokens", newest, f"an integer ≥ {len(opening) + 1}")
    return opening + tokens[-n_kept:]


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


@dataclass(frozen=True)
class Reads:
    """Blocks that the steps of a request read, beside those that the cache held."""

    steps: int  # of decoding, one token each
    sparse_steps: int
    blocks_read: int  # by a layer that selects, all sparse steps together
    blocks_held: int  # by the cache at these steps
    longest: int  # blocks, at the last step
    rectifications: int

    def sentence(self, config: ReSAConfig, n_layer: int) -> str:
        """Say it in words; nothing where no step was taken."""
        if self.steps == 0:
            return ""
        if self.blocks_read == self.blocks_held or config.dense_layers >= n_layer:
            if self.longest <= config.min_blocks:
                return f"Never longer than {config.min_blocks} blocks: every step read all of it"
            return "Every step read all of it"
        read, held = (round(n / self.sparse_steps) for n in (self.blocks_read, self.blocks_held))
        n_sparse, count = n_layer - config.dense_layers, self.rectifications
        where = f" in {n_sparse} of {n_layer} layers" if n_sparse < n_layer else ""
        repaired = f"{count or 'no'} rectification{'' if count == 1 else 's'}"
        return f"A sparse step read {read:,} of {held:,} blocks{where}, {repaired}"


def count_reads(n_prompt: int, n_tokens: int, config: ReSAConfig, n_dense: int = 0) -> Reads:
    """Count what decoding read of the cache, for a prompt that `n_tokens` tokens continued.

    Each token but the last is fed by a step. The first `n_dense` are fed densely.

    >>> count_reads(8, 7, ReSAConfig(block_size=2, min_blocks=3, interval=3))
    Reads(steps=6, sparse_steps=4, blocks_read=12, blocks_held=23, longest=7, rectifications=2)
    """
    steps = max(n_tokens - 1, 0)
    held: list[int] = []  # lengths of the cache at sparse steps
    n_drifted = rectifications = 0
    for length in range(n_prompt + min(n_dense, steps) + 1, n_prompt + steps + 1):
        # Under "fused" a pass takes a step's place. Where nothing has drifted it repairs nothing.
        is_pass = config.schedule == "fused" and config.is_pass_due(n_drifted)
        if not is_pass:
            held.append(length)
            n_drifted += 1
            is_pass = config.schedule == "paper" and config.is_pass_due(n_drifted)
        if is_pass:
            rectifications += n_drifted > 0
            n_drifted = 0
    lengths = torch.tensor(held, dtype=torch.int64, device="cpu")
    return Reads(
        steps=steps,
        sparse_steps=len(lengths),
        blocks_read=int(active_blocks(lengths, config).sum()),
        blocks_held=int((-(-lengths // config.block_size)).sum()),
        longest=-(-(n_prompt + steps) // config.block_size),
        rectifications=rectifications,
    )


class Writer:
    """Writes tokens as they come. A character whose bytes span tokens waits until it is whole.

    `begin` is called before anything is written: with the first token, when no backend can refuse
    the request any more. Tokens of `hidden` are not written.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        begin: Callable[[], None],
        hidden: Collection[int] = (),
    ) -> None:
        self.decode, self.begin, self.hidden, self.has_begun = decode, begin, hidden, False
        self.waiting: list[int] = []

    def __call__(self, sequence: int, position: int, token: int) -> None:
        if token in self.hidden:
            return
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
