"""How many tasks are answered exactly, by dense, sparse and rectified decoding (paper, Tables 1 and 2).

Answers are generated greedily, token by token, and count only if every token is right; of long answers the last line,
which answers the question, is counted by itself as well. The prompt's last token is fed by a decoding step, so that
sparse decoding does the looking up itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import tiktoken
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..checks import is_integer, require
from ..config import ReSAConfig
from ..generate import Generation, decode_step, prefill
from ..model import GPT, causal_attention
from ..programs import UNSEEN
from ..tasks import FAMILIES, Example
from .statistics import wilson


def ways_to_decode(config: ReSAConfig) -> dict[str, ReSAConfig]:
    """What is compared: both ends, rectification between them, and the paper's other remedy, dense first layers."""
    return {
        "dense": replace(config, active_ratio=1.0, interval=1, schedule="fused"),  # of all ratios the same
        "sparse": replace(config, interval=None),
        "sparse, 2 dense layers": replace(config, interval=None, dense_layers=2),
        "ReSA": config,
        "decode-only": replace(config, interval=1, schedule="paper"),
    }


def read_prompts(model: GPT, prompts: Sequence[Sequence[int]], block_size: int) -> Generation:
    """Prefill of fresh caches in one chunk, by torch's fused attention: smaller chunks take minutes for long prompts.

    Right of a shorter prompt stands padding, which no token of the prompt sees.
    """
    longest = max(map(len, prompts))
    cache = model.new_cache(len(prompts), longest, block_size)

    def dense_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **_: object) -> Tensor:
        return causal_attention(0, query, keys[:, :, :longest], values[:, :, :longest])

    reading = model.with_ops(replace(model.ops, dense_attention=dense_attention))
    prefill(reading, prompts, cache, chunk_size=longest)
    nothing = torch.zeros_like(cache.lengths)
    return Generation([[] for _ in prompts], cache, nothing, nothing)


@torch.no_grad()
def continued(
    model: GPT, opening: Generation, last: Sequence[int], n_tokens: int, config: ReSAConfig
) -> list[list[int]]:
    """Greedy continuations by n_tokens, of which the first is predicted by a decoding step that feeds `last` [B]."""
    cache = opening.cache.resized(opening.cache.capacity + n_tokens)
    pending = torch.tensor(last, device=cache.lengths.device)
    state = Generation([[token] for token in last], cache, torch.zeros_like(pending), pending)
    active = torch.ones_like(pending, dtype=torch.bool)
    for _ in range(n_tokens):
        state.pending = decode_step(model, state, config, active).argmax(dim=-1)
        for tokens, token in zip(state.tokens, state.pending.tolist(), strict=True):
            tokens.append(token)
    return [tokens[1:] for tokens in state.tokens]


def marks(tokens: Sequence[int], example: Example) -> tuple[bool, bool]:
    """Whether the whole answer is right, and whether its last line is, in its place."""
    given = list(tokens[: len(example.answer)])
    return given == example.answer, given[-example.checked :] == example.answer[-example.checked :]


def answered(
    model: GPT, examples: Sequence[Example], configs: Mapping[Hashable, ReSAConfig]
) -> dict[Hashable, list[tuple[bool, bool]]]:
    """The marks of every example under every configuration; prompts are read once.

    Configurations that can't differ are run once: where no answer reaches the first rectification, it is as if there
    were none.
    """
    (block_size,) = {config.block_size for config in configs.values()}
    opening = read_prompts(model, [example.prompt[:-1] for example in examples], block_size)
    last = [example.prompt[-1] for example in examples]
    longest = max(len(example.answer) for example in examples)
    run = {
        name: config if config.interval is None or config.interval <= longest else replace(config, interval=None)
        for name, config in configs.items()
    }
    found = {}
    for config in dict.fromkeys(run.values()):
        texts = continued(model, opening, last, longest, config)
        found[config] = [marks(*pair) for pair in zip(texts, examples, strict=True)]
    return {name: found[config] for name, config in run.items()}


def measure_answers(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    families: Sequence[str],
    lengths: Sequence[int],
    n_examples: int,
    config: ReSAConfig,
    *,
    ratios: Sequence[float] = (),
    code: Sequence[str] = (),
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, object]:
    """Shares of right answers per family, length, ratio and way to decode, JSON-ready; 95 % intervals over examples.

    `ratios` take the place of the configuration's own.

    Raises `ValueError` before any work starts.
    """
    known = ", ".join(FAMILIES)
    require(len(families) > 0 and set(families) <= set(FAMILIES), "families", list(families), f"some of {known}")
    for name, number in (("n_examples", n_examples), ("batch", batch)):
        require(is_integer(number, 1), name, number, "an integer ≥ 1")
    require(len(lengths) > 0, "lengths", "none", "at least one")
    require(config.interval is not None, "config.interval", None, "an integer: it is compared with never")
    context = model.config.context
    require(max(lengths) <= context, "lengths", max(lengths), f"≤ {context}, the model's context")
    ratios = list(ratios) or [config.active_ratio]
    configs = {
        (ratio, name): way
        for ratio in ratios
        for name, way in ways_to_decode(replace(config, active_ratio=ratio)).items()
    }
    drawn = {
        (family, length): [
            FAMILIES[family](tokenizer, np.random.default_rng((seed, length, index, UNSEEN)), length, code)
            for index in range(n_examples)
        ]
        for family in families
        for length in lengths
    }
    rows = []
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Tasks", total=len(drawn) * n_examples)
        for (family, length), examples in drawn.items():
            found: dict[Hashable, list[tuple[bool, bool]]] = {key: [] for key in configs}
            for start in range(0, n_examples, batch):
                some = examples[start : start + batch]
                for key, own in answered(model, some, configs).items():
                    found[key].extend(own)
                bar.advance(task, len(some))
            longest = max(len(example.answer) for example in examples)
            about = {"family": family, "length": length, "longest_answer": longest}
            for ratio in ratios:
                ways = {name: shares(own) for (of, name), own in found.items() if of == ratio}
                rows.append({**about, "ratio": ratio, **ways})
    return {"examples": n_examples, "config": asdict(config), "rows": rows}


def shares(found: Sequence[tuple[bool, bool]]) -> dict[str, object]:
    """Of whole answers, and of last lines, with their intervals."""
    n, (whole, last) = len(found), (sum(each) for each in zip(*found, strict=True))
    return {"right": whole / n, "right_95": wilson(whole, n), "last_line": last / n, "last_line_95": wilson(last, n)}
