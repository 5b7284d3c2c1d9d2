"""Text <-> tokens: byte-level BPE for Python source, 4,096 tokens, shipped with the package.

The ranks live in `assets/code.tiktoken`, one `base64(token) rank` per line. `tiktoken` encodes.
Hugging Face's `tokenizers` (the extra `train`) trains: it takes seconds where pure Python takes
minutes. Both cut text by the same `PATTERN`. `lab/corpus.py` decides which text is encoded.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken
from rich.console import Console
from rich.progress import track

from ..checks import is_integer, require
from .files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"  # always the last id

# Text is cut by this before merging; no token crosses a cut. Only ASCII classes appear: the two
# regex engines may know different versions of Unicode. Every character matches one of the rows:
# tiktoken would silently drop one that matches none.
PATTERN = "|".join(
    [
        r"[\r\n]+[ \t]*",  # line ends, with the indentation of the line that follows
        r" ?_*[A-Za-z]+",  # words; max_new_tokens -> max, _new, _tokens
        r"[0-9]",  # single digits: numbers stay comparable place by place
        r" ?_*[!-/:-@\[-\^`{-~]+",  # runs of punctuation; __init__(self -> __init, __(, self
        r" ?_+",  # underscores before digits or alone
        r"[ \t]+",  # spaces inside a line
        r"[^\x00-\x7f]+",  # everything beyond ASCII
        r"[\x00-\x1f\x7f]",  # the other control characters
    ]
)


def shipped_ranks() -> Path:
    """Path of the vocabulary that comes with the package."""
    return Path(__file__).parent / "assets" / "code.tiktoken"


def load_tokenizer(path: str | os.PathLike | None = None) -> tiktoken.Encoding:
    """Load a tokenizer from a file of ranks, the shipped one by default.

    Errors: FileNotFoundError if there is no such file; ValueError naming a malformed line.
    """
    path = shipped_ranks() if path is None else Path(path)
    return make_tokenizer(read_ranks(path))


def make_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Make a tokenizer from ranks; the special token takes the id after the last rank."""
    return tiktoken.Encoding(
        name="resa-code",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,  # tiktoken checks the count
    )


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Read and check a file of ranks: {token: rank}, the ranks 0, 1, 2, … in order.

    tiktoken's own loader caches by path, so it returns stale ranks after retraining.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer ranks {path}: no such file")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        fields = line.split(b" ")
        if len(fields) != 2:
            raise ValueError(f"{where}: must be 'base64 rank', got {line[:60]!r}")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{where}: {fields[0][:60]!r} is not base64 ({error})") from None
        if fields[1] != b"%d" % len(ranks):
            raise ValueError(f"{where}: rank must be {len(ranks)}, got {fields[1][:60]!r}")
        if not token or token in ranks:
            raise ValueError(f"{where}: token {token!r} is {'repeated' if token else 'empty'}")
        # A token that byte-pair merging can never reach is a sign of a damaged file.
        cuts = range(1, len(token))
        if len(token) > 1 and not any(token[:i] in ranks and token[i:] in ranks for i in cuts):
            raise ValueError(f"{where}: token {token!r} does not join two earlier tokens")
        ranks[token] = len(ranks)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path}: must hold all 256 single bytes, lacks {len(missing)}, the first {missing[0]}"
        )
    return ranks


def save_ranks(path: str | os.PathLike, ranks: dict[bytes, int]) -> None:
    """Write ranks to `path` in their order, in one step."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    lines = (b"%s %d\n" % (base64.b64encode(token), ranks[token]) for token in tokens)
    write_atomically(path, b"".join(lines))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, progress: bool = True
) -> dict[bytes, int]:
    """Learn a vocabulary of `vocab_size` tokens: 256 bytes, merges of `texts`, and `END_OF_TEXT`.

    Errors: ValueError if the vocabulary is too small, or the texts are too short to fill it;
    ImportError without `tokenizers`.
    """
    allowed = f"an integer ≥ 257: 256 bytes and {END_OF_TEXT}"
    require(is_integer(vocab_size, 257), "vocab_size", vocab_size, allowed)
    merges = merges_of(learn_merges(texts, vocab_size - 1, progress))
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merges:  # two may spell one token, which keeps its first rank
        ranks.setdefault(left + right, len(ranks))
    allowed = f"≤ {len(ranks) + 1}, all that these texts give"
    require(len(ranks) == vocab_size - 1, "vocab_size", vocab_size, allowed)
    return ranks


def learn_merges(texts: Iterable[str], size: int, progress: bool) -> Tokenizer:
    """Train byte-pair encoding by `tokenizers`: `size` tokens, the 256 bytes included."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        hint = "training a tokenizer needs the package `tokenizers`: pip install tokenizers"
        raise ImportError(hint) from None
    tokenizer = Tokenizer(models.BPE())
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    console = Console(stderr=True)
    shown = track(texts, "Learning the vocabulary", console=console, disable=not progress)
    tokenizer.train_from_iterator(shown, trainer=trainer)
    return tokenizer


def merges_of(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Read the merges of a trained tokenizer as bytes, in the order they were learnt."""
    spelling = byte_spelling()
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(bytes(spelling[letter] for letter in part) for part in pair) for pair in pairs]


def byte_spelling() -> dict[str, int]:
    """Map the visible character that `tokenizers` writes for a byte to that byte.

    It is the byte itself in Latin-1 where that is visible. The other bytes get the characters from
    U+0100 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    stand_ins = {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | stand_ins
