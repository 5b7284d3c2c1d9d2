"""Text <-> tokens: byte-level BPE for Python source, 4,096 tokens, shipped with the package.

The ranks live in `assets/code.tiktoken`, one `base64(token) rank` per line, and `tiktoken` encodes.
`lab/corpus.py` decides which text is encoded.
"""

import base64
from pathlib import Path

import tiktoken

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"  # always the last id

# Text is cut by this before merging; no token crosses a cut. Every character matches one of the
# rows: tiktoken would silently drop one that matches none.
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


def load_tokenizer() -> tiktoken.Encoding:
    """Load the tokenizer that the shipped models were trained with."""
    lines = (Path(__file__).parent / "assets" / "code.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    return tiktoken.Encoding(
        name="resa-code",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: VOCAB_SIZE - 1},
        explicit_n_vocab=VOCAB_SIZE,  # tiktoken checks the count
    )
