"""What rectification, sparsity and the length of the sparse suffix do to accuracy (paper, Fig. 4, 5 and 9).

Held-out text is read densely up to a suffix of x tokens, which is decoded sparsely, led along its true tokens; what
counts are the predictions of its last 32. Everywhere the loss against dense decoding is split in two: *step error*,
which decode-only has as well, its cache being exact, and *drift*, the rest, which rectification is there to remove.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..checks import is_integer, require
from ..config import ReSAConfig
from ..model import GPT
from ..parallel import check_decoding, decode_at_once, exact_stream
from .fidelity import top_hits
from .statistics import bootstrap_ratio, with_intervals

SCORED = 32  # predictions at the end of every document
LENGTHS = (1, 8, 16, 32, 64, 128, 256)  # of the suffix, and of intervals
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BLOCK_SIZES = (8, 16, 32, 64)
DENSE_LAYERS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Setting:
    """One way of decoding a suffix of `suffix` tokens."""

    config: ReSAConfig
    suffix: int

    @property
    def decode_only(self) -> Setting:
        """The same with a cache that is always exact."""
        return replace(self, config=replace(self.config, interval=1, schedule="paper"))


def settings(base: Setting, *, grid: bool = True) -> dict[str, list[Setting]]:
    """What is compared, by factor: one factor at a time around `base`; with `grid`, interval × ratio as well."""
    config, most = base.config, base.suffix
    intervals = [f for f in LENGTHS if f <= most] + [None]
    sparse = replace(config, interval=None)
    by_factor = {
        "suffix": [Setting(sparse, x) for x in LENGTHS if x <= most],
        "interval": [replace(base, config=replace(config, interval=f)) for f in intervals],
        "active_ratio": [replace(base, config=replace(config, active_ratio=p)) for p in RATIOS],
        "block_size": [replace(base, config=replace(config, block_size=b)) for b in BLOCK_SIZES],
        "dense_layers": [replace(base, config=replace(config, dense_layers=n)) for n in DENSE_LAYERS],
        "schedule": [replace(base, config=replace(config, schedule=s)) for s in ("fused", "paper")],
    }
    if grid:
        pairs = [replace(config, interval=f, active_ratio=p) for f in intervals for p in RATIOS]
        by_factor["grid"] = [replace(base, config=pair) for pair in pairs]
    return by_factor


def decoded(by_factor: Mapping[str, Sequence[Setting]]) -> list[Setting]:
    """All that has to be decoded, each once: the settings, their decode-only corners and their never rectified ones."""
    wanted: dict[Setting, None] = {}
    for setting in (setting for several in by_factor.values() for setting in several):
        never = replace(setting, config=replace(setting.config, interval=None))
        wanted |= dict.fromkeys((setting, setting.decode_only, never))
    return list(wanted)


@dataclass(frozen=True)
class Scores:
    """Of one setting, per document: mean KL from dense in nats and top-3 accuracy over the scored predictions."""

    kl: np.ndarray  # [documents]
    accuracy: np.ndarray  # [documents]


def measure_sweep(
    model: GPT,
    documents: Sequence[Sequence[int]],
    base: Setting,
    *,
    grid: bool = True,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, object]:
    """Every setting over all documents, which have one length: factor → rows, JSON-ready.

    What comes before the suffix is whole blocks of every size compared. Raises `ValueError` before any work starts.
    """
    require(is_integer(batch, 1), "batch", batch, "an integer ≥ 1")
    lengths = sorted({len(document) for document in documents})
    require(len(lengths) == 1, "documents", f"of {lengths} tokens", "documents of one length")
    most = lengths[0] - 2
    require(SCORED <= base.suffix <= most, "suffix", base.suffix, f"{SCORED} … {most} tokens of the documents")
    by_factor = settings(base, grid=grid)
    todo = decoded(by_factor)
    n_tokens = lengths[0] - 1  # the last one is only predicted
    context, whole = model.config.context, math.lcm(*(setting.config.block_size for setting in todo))
    require(n_tokens <= context, "documents", f"of {lengths[0]} tokens", f"documents of at most {context + 1}")
    prompt = n_tokens - base.suffix
    allowed = f"a multiple of {whole} before the suffix, whole blocks of every size"
    require(prompt % whole == 0, "documents", f"prompts of {prompt} tokens", allowed)
    for setting in todo:
        check_decoding(n_tokens, setting.config, n_tokens - setting.suffix)
    found: dict[Setting, list[Scores]] = {setting: [] for setting in todo}
    dense: list[np.ndarray] = []
    starts = range(0, len(documents), batch)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Sweep", total=len(starts) * len(todo))
        for start in starts:
            text = torch.tensor(documents[start : start + batch], device=model.embed.weight.device)
            accuracy, scores = decode_all(model, text, todo, lambda: bar.advance(task))
            dense.append(accuracy)
            for setting in todo:
                found[setting].append(scores[setting])
    joined = {setting: join(several) for setting, several in found.items()}
    accuracy = np.concatenate(dense)
    return {
        "documents": len(documents),
        "document_tokens": lengths[0],
        "scored": SCORED,
        "base": asdict(base),
        **with_intervals({"dense_accuracy": accuracy}),
        "factors": {
            factor: [summarise(setting, joined, accuracy) for setting in several]
            for factor, several in by_factor.items()
        },
    }


@torch.no_grad()
def decode_all(
    model: GPT, text: Tensor, todo: Sequence[Setting], on_pass: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, dict[Setting, Scores]]:
    """Dense decoding's accuracy along `text` [documents, T + 1], and the scores of decoding along it in every way.

    Predictions before a suffix that is shorter than what is scored are dense, and lose nothing. `on_pass` is called
    after every way.
    """
    exact, wanted = exact_stream(model, text[:, :-1]), text[:, -SCORED:]
    dense = log_probs_of(model, exact.hidden)
    found = {}
    for setting in todo:
        own = log_probs_of(model, decode_at_once(model, exact, setting.config, text.shape[1] - 1 - setting.suffix))
        kl = (dense.exp() * (dense - own)).sum(dim=-1).double().mean(dim=1)
        found[setting] = Scores(kl.cpu().numpy(), accuracy_of(own, wanted))
        on_pass()
    return accuracy_of(dense, wanted), found


def log_probs_of(model: GPT, hidden: Tensor) -> Tensor:
    """[documents, SCORED, V] of the last predictions."""
    return model.output(hidden[:, -SCORED:]).log_softmax(dim=-1)


def accuracy_of(log_probs: Tensor, wanted: Tensor) -> np.ndarray:
    """Top-3 accuracy per document."""
    return top_hits(log_probs, wanted).double().mean(dim=1).cpu().numpy()


def join(several: Sequence[Scores]) -> Scores:
    """The documents of all batches."""
    return Scores(*(np.concatenate([getattr(each, name) for each in several]) for name in ("kl", "accuracy")))


def summarise(setting: Setting, found: Mapping[Setting, Scores], dense: np.ndarray) -> dict[str, object]:
    """One row: means over documents with 95 % intervals, the loss split in step error and drift.

    `recovered` is the share of the drift of never rectifying that this setting does not have; None where the setting
    never rectifies, or where there is no drift to recover.
    """
    never = found[replace(setting, config=replace(setting.config, interval=None))]
    exact, own = found[setting.decode_only], found[setting]
    row: dict[str, object] = {**asdict(setting.config), "suffix": setting.suffix}
    parts = {
        "accuracy": own.accuracy,
        "accuracy_lost": dense - own.accuracy,
        "accuracy_step_error": dense - exact.accuracy,
        "accuracy_drift": exact.accuracy - own.accuracy,
        "kl": own.kl,
        "kl_step_error": exact.kl,
        "kl_drift": own.kl - exact.kl,
    }
    row |= with_intervals(parts)
    for name, total, left in (
        ("accuracy", exact.accuracy - never.accuracy, exact.accuracy - own.accuracy),
        ("kl", never.kl - exact.kl, own.kl - exact.kl),
    ):
        is_told = setting.config.interval is not None and total.mean() > 0
        row[f"{name}_recovered"] = 1 - left.mean() / total.mean() if is_told else None
        row[f"{name}_recovered_95"] = bootstrap_ratio(total - left, total) if is_told else None
    return row
