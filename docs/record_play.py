"""Record the data of docs/play in docs/play/data.js: python docs/record_play.py.

The shipped model continues a library module that was held out of its training, greedily, under every setting that the
page offers. The recording keeps three things of every sparse step: the blocks that each layer and KV head selected, the
drift of the token that it cached (layer by layer), and the distance of its prediction from the dense one. This takes
about a minute on one CPU core and draws nothing from a random generator.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from resa.reference import (
    GPT,
    KVCache,
    ReSAConfig,
    dense_pass,
    generate,
    load_model,
    load_tokenizer,
    prefill,
    rectify,
    sparse_step,
)
from resa.reference.cli.demo import DEMO_MODULE, demo_prompt
from resa.reference.lab.fidelity import read_ratio
from resa.reference.weights.checkpoint import file_digest, shipped_checkpoint
from resa.reference.weights.files import source_digest, write_atomically

DATA = Path(__file__).parent / "play" / "data.js"
NAME = "RESA_PLAY"  # the one global variable that data.js sets

ENDING = "def _decode_base64(s):\n    "  # where the prompt ends: the function before it can be copied from
PROMPT_TOKENS, NEW_TOKENS = 1024, 128
INTERVALS, RATIOS = (8, 16, 32, 64, None), (0.05, 0.1, 0.2)
# A step reads at least 2 blocks. With the default of 16, it would read the same at every ratio of so short a cache.
CONFIG = ReSAConfig(min_blocks=2, schedule="paper")
DRIFT_UNIT, DIVERGENCE_UNIT = 1e-3, 1e-4  # both are stored as whole numbers of these
# Printable characters that need no escape in a string of JSON; the tilde is taken.
DIGITS = "".join(chr(code) for code in range(35, 126) if chr(code) not in "\\<>")


@dataclass(frozen=True)
class Recording:
    """One generation, step by step. A step feeds one token, and the last token is not fed."""

    tokens: list[int]  # [N], chosen
    selected: Tensor  # [N − 1, layer, Hkv, M] bool, blocks attended
    drift: Tensor  # [N − 1, layer], drift of the cached token right after its step
    rectified: Tensor  # [rectifications, layer], largest drift of the window right after its rectification
    divergence: Tensor  # [N − 1], KL(dense ‖ sparse) of the next-token distributions, in nats


@torch.no_grad()
def record(model: GPT, prompt: Sequence[int], n_tokens: int, config: ReSAConfig) -> Recording:
    """Decode greedily under schedule "paper", as `generate` does, and look at every step and rectification."""
    # Watch the selection of every layer.
    taken: list[Tensor] = []

    def select_blocks(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
        taken.append(model.ops.select_blocks(scores, lengths, config))
        return taken[-1]

    # Decode, and keep what each step and each rectification wrote.
    watched = model.with_ops(replace(model.ops, select_blocks=select_blocks))
    cache = model.new_cache(len(prompt) + n_tokens - 1, config.block_size)
    tokens, n_drifted = [int(prefill(model, prompt, cache).argmax())], 0
    left, predicted, rewritten = [], [], []
    while len(tokens) < n_tokens:
        logits = sparse_step(watched, tokens[-1], cache, config)
        n_drifted += 1
        left.append(newest(cache, 1))
        predicted.append(logits)
        if config.is_pass_due(n_drifted):
            rectify(model, tokens[-n_drifted:], cache, n_drifted)
            rewritten.append(newest(cache, n_drifted))
            n_drifted = 0
        tokens.append(int(logits.argmax()))

    # Compare with dense prefill of the same tokens.
    exact, wanted = dense_prefill(model, prompt, tokens[:-1], config)
    drift = layer_drift(torch.cat(left, dim=2), exact)
    windows = exact.split(config.interval, dim=2) if config.interval else ()
    pairs = zip(rewritten, windows, strict=False)  # the last window may be open
    after = [layer_drift(found, dense).amax(dim=0) for found, dense in pairs]
    given = torch.stack(predicted).log_softmax(dim=-1)
    divergence = (wanted.exp() * (wanted - given)).sum(dim=-1)
    rows = torch.stack([as_mask(indices[0], cache.bounds.shape[-1]) for indices in taken])
    selected = rows.unflatten(0, (n_tokens - 1, model.config.n_layer))
    return Recording(tokens, selected, drift, torch.stack(after) if after else drift[:0], divergence)


def newest(cache: KVCache, n: int) -> Tensor:
    """Copy the newest n tokens' keys and values: [2, layer, n, Hkv, D]."""
    at = slice(cache.length - n, cache.length)
    return torch.stack((cache.keys[:, 0, :, at], cache.values[:, 0, :, at])).transpose(2, 3)


def dense_prefill(
    model: GPT, prompt: Sequence[int], tokens: Sequence[int], config: ReSAConfig
) -> tuple[Tensor, Tensor]:
    """Run a dense pass over the same tokens: the keys and values it caches, and its log-probabilities [n, V].

    The prompt goes in at once, not in the chunks of decoding. So rounding shows, as between any two prefills.
    """
    cache = model.new_cache(len(prompt) + len(tokens), config.block_size)
    prefill(model, prompt, cache, chunk_size=len(prompt))
    hidden = dense_pass(model, tokens, cache, cache.length)
    return newest(cache, len(tokens)), model.output(hidden).log_softmax(dim=-1)


def layer_drift(found: Tensor, exact: Tensor) -> Tensor:
    """Drift of the specification (section 3), but for each layer by itself: [2, layer, n, Hkv, D] → [n, layer]."""
    relative = (found - exact).norm(dim=-1) / exact.norm(dim=-1)  # [2, layer, n, Hkv]
    return relative.amax(dim=(0, 3)).T


def as_mask(indices: Tensor, n_blocks: int) -> Tensor:
    """Mark the blocks among indices with −1 padding: [Hkv, N] → [Hkv, M] bool."""
    mask = torch.zeros(len(indices), n_blocks + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(indices < 0, n_blocks, indices).long(), True)
    return mask[:, :n_blocks]


def packed(mask: Tensor) -> str:
    """Pack a mask [steps, layer, Hkv, M] as text: the lengths of runs, of False and True in turn.

    A block stays selected or unselected for many steps, so steps come last in the order of the runs. A length below 88
    is one character of `DIGITS`; a longer one is a tilde and two.

    >>> packed(torch.tensor([[[[True, False]]], [[[True, True]]]]))
    '#%$$'
    """
    flat = mask.permute(1, 2, 3, 0).flatten()
    values, lengths = torch.unique_consecutive(flat, return_counts=True)
    base, text = len(DIGITS), DIGITS[0] if bool(values[0]) else ""
    for length in lengths.tolist():
        high, low = divmod(length, base)
        text += DIGITS[low] if high == 0 else f"~{DIGITS[high]}{DIGITS[low]}"
    return text


def whole(numbers: Tensor, unit: float) -> list:
    """Round numbers to whole units."""
    return (numbers.double() / unit).round().long().tolist()


def pieces(tokenizer: tiktoken.Encoding, tokens: Sequence[int]) -> list[str]:
    """Decode every token by itself. Raises UnicodeDecodeError for a token that is no text, which no page can show."""
    return [tokenizer.decode_single_token_bytes(token).decode() for token in tokens]


def setting(tokenizer: tiktoken.Encoding, recording: Recording, config: ReSAConfig) -> dict[str, object]:
    """Put one generation into the form that the page reads."""
    return {
        "interval": config.interval,
        "ratio": config.active_ratio,
        "read_share": round(read_ratio(config), 6),
        "tokens": pieces(tokenizer, recording.tokens),
        "drift": whole(recording.drift, DRIFT_UNIT),
        "rectified": [float(f"{value:.1e}") for value in recording.rectified.amax(dim=-1).tolist()],
        "divergence": whole(recording.divergence, DIVERGENCE_UNIT),
        "selected": packed(recording.selected),
    }


def play_prompt(tokenizer: tiktoken.Encoding) -> list[int]:
    """The last `PROMPT_TOKENS` tokens of the module, up to and with `ENDING`."""
    text = demo_prompt()[1]
    return tokenizer.encode_ordinary(text[: text.index(ENDING) + len(ENDING)])[-PROMPT_TOKENS:]


def every_config() -> list[ReSAConfig]:
    """The configuration of every setting of the page."""
    return [replace(CONFIG, interval=interval, active_ratio=ratio) for ratio in RATIOS for interval in INTERVALS]


def measure() -> dict[str, object]:
    """Record every setting."""
    model, tokenizer = load_model(), load_tokenizer()
    prompt = play_prompt(tokenizer)
    [dense] = generate(model, [prompt], NEW_TOKENS, ReSAConfig(interval=1))
    settings = []
    for config in every_config():
        print(f"interval {config.interval}, active ratio {config.active_ratio}", file=sys.stderr)
        settings.append(setting(tokenizer, record(model, prompt, NEW_TOKENS, config), config))
    return {
        "command": "python docs/record_play.py",
        "checkpoint_sha256": file_digest(shipped_checkpoint()),
        "source_sha256": source_digest(),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "module": DEMO_MODULE,
        "config": {name: value for name, value in asdict(CONFIG).items() if name not in ("interval", "active_ratio")},
        "layers": model.config.n_layer,
        "kv_heads": model.config.n_kv_head,
        "drift_unit": DRIFT_UNIT,
        "divergence_unit": DIVERGENCE_UNIT,
        "digits": DIGITS,
        "prompt": pieces(tokenizer, prompt),
        "dense": pieces(tokenizer, dense.tokens),
        "settings": settings,
    }


def as_script(result: dict[str, object]) -> str:
    """Write the result as a script, one setting per line. A page that is opened from a disk may not fetch."""
    lines = [f"  {json.dumps(entry, separators=(',', ':'))}" for entry in result["settings"]]
    head = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in result.items() if name != "settings"]
    body = "\n".join([*head, ' "settings": [', ",\n".join(lines), " ]"])
    return f"// Written by `{result['command']}`; not to be edited.\nglobalThis.{NAME} = {{\n{body}\n}};\n"


def read_script(path: Path = DATA) -> dict[str, object]:
    """Read a file of `as_script`."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text[text.index("{") :].rstrip(";\n"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # steps of one token are too small to share among threads
    script = as_script(measure())
    write_atomically(DATA, script.encode())
