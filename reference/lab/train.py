"""Train a small GPT on local source code and programs: AdamW, linear warm-up, cosine decay.

A run is a function of its configuration: batch s depends on (seed, s) alone. Its whole state is one
file that is replaced in one step, so a run that is killed at any moment goes on as if it never had
been. `corpus.py` and `programs.py` make the text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..checks import checked_device, is_number, require, require_integer
from ..config import GPTConfig, ReSAConfig
from ..model import GPT
from ..weights import checkpoint as files
from ..weights.files import as_json, write_atomically
from ..weights.tokenizer import (
    VOCAB_SIZE,
    load_tokenizer,
    make_tokenizer,
    save_ranks,
    train_tokenizer,
)
from .corpus import STANDARD_LIBRARY, local_corpus, tokenize
from .parallel import decode_at_once, exact_stream
from .programs import Words, is_checked, program_rows, words

TRAINING_FORMAT = "resa training state"
FINAL_LEARNING_RATE = 0.1  # as a share of the peak
BETAS, MOMENTS = (0.9, 0.95), ("exp_avg", "exp_avg_sq")  # of AdamW, and what it calls its averages
GRAD_CLIP = 1.0  # largest norm of the whole gradient
SPARSE_RATIOS, SPARSE_LEAST = (0.05, 0.1, 0.2), (2, 4, 8)  # blocks, in steps that decode
RHYTHM = ("checkpoint_seconds", "log_every")  # may change on resuming: the result stays the same

# The model that the package ships: 5.7 million parameters. It is deep, with wide heads and small
# groups: such a model loses least when it attends to selected blocks only.
SMALL_MODEL = GPTConfig(
    vocab_size=VOCAB_SIZE,
    n_layer=12,
    n_head=4,
    n_kv_head=2,
    head_dim=64,
    hidden_size=192,
    intermediate_size=448,
    context=8192,
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    steps: int = 6500
    batch_tokens: int = 131_072  # per step; a multiple of context
    context: int = 8192  # tokens per row
    # A fresh model attends to everything alike, which over thousands of tokens leaves next to no
    # gradient towards any one of them. So training begins on short rows.
    short_context: int = 1024  # tokens per row in that first part
    short_share: float = 0.4  # share of the steps in that part
    learning_rate: float = 3e-3  # the peak; a small model stands a high one
    warmup_steps: int = 200
    weight_decay: float = 0.1  # of matrices; norms and biases do not decay
    program_fraction: float = 0.2  # share of rows that are programs; a short row is one's beginning
    program_rows: int = 4096  # distinct programs
    checked_weight: float = 0.0  # of the mean loss over asserted digits, added to that over all
    # In the last steps every row is decoded sparsely as well, and both losses are averaged.
    sparse_share: float = 0.0  # share of the steps
    sparse_interval: int = 32  # tokens between rectifications in such a step; 0: never
    seed: int = 0
    checkpoint_seconds: float = 60.0
    log_every: int = 20  # steps

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(getattr(TrainConfig, name), int):
                may_be_zero = name in ("warmup_steps", "sparse_interval", "seed")
                require_integer(name, value, 0 if may_be_zero else 1)
                continue
            most = 1 if name.endswith(("_share", "_fraction")) else sys.float_info.max
            allowed = "a number in 0 … 1" if most == 1 else "a finite number ≥ 0"
            require(is_number(value) and 0 <= value <= most, name, value, allowed)
        context, cut = self.context, self.short_context
        allowed = f"a multiple of context = {context}"
        require(self.batch_tokens % context == 0, "batch_tokens", self.batch_tokens, allowed)
        allowed = f"an integer that divides context = {context}, or more"
        require(cut >= context or context % cut == 0, "short_context", cut, allowed)

    def row_tokens(self, step: int) -> int:
        """Tokens per row of step 0, 1, …"""
        is_short = step < round(self.short_share * self.steps)
        return min(self.short_context, self.context) if is_short else self.context

    def decodes(self, step: int) -> bool:
        """Tell whether step 0, 1, … decodes its rows sparsely as well."""
        return step >= self.steps - round(self.sparse_share * self.steps)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 0, 1, …: linear up to the peak, then a cosine down to a tenth of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.learning_rate * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


@dataclass(frozen=True)
class TrainData:
    """All that training reads, as uint16."""

    tokens: np.ndarray  # [n] the stream of source code
    programs: np.ndarray  # [program_rows, context + 1], or no rows
    statistics: dict[str, int] = field(default_factory=dict)


def prepare_data(config: TrainConfig, *, packages: bool, progress: bool) -> TrainData:
    """Read the local corpus and write the programs of a run."""
    tokenizer, corpus = load_tokenizer(), local_corpus(packages=packages, progress=progress)
    tokens = tokenize(corpus.train, tokenizer, progress)
    count = config.program_rows if config.program_fraction > 0 else 0
    programs = program_rows(tokenizer, config.seed, count, config.context + 1, progress)
    sizes = {"train_tokens": len(tokens), "program_tokens": programs.size}
    return TrainData(tokens, programs, {**corpus.statistics, **sizes})


def make_batch(config: TrainConfig, data: TrainData, step: int) -> np.ndarray:
    """Rows of a step, a function of (seed, step) alone: [rows, tokens + 1] int64."""
    rng = np.random.default_rng((config.seed, step))
    length = config.row_tokens(step)
    rows = config.batch_tokens // length
    is_program = rng.random(rows) < config.program_fraction
    starts = rng.integers(len(data.tokens) - length, size=rows)
    chosen = rng.integers(max(1, len(data.programs)), size=rows)
    batch = np.empty((rows, length + 1), dtype=np.int64)
    for index in range(rows):
        if is_program[index]:
            batch[index] = data.programs[chosen[index], : length + 1]
        else:
            batch[index] = data.tokens[starts[index] : starts[index] + length + 1]
    return batch


def prediction_loss(logits: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Mean cross-entropy, in nats, of logits [R, context, V] for rows [R, context + 1].

    `weights` [R, context] of the tokens predicted replace the mean by a weighted sum.
    """
    # In float32. Compiled, the conversion happens inside the softmax and is never stored.
    flat, wanted = logits.flatten(0, 1).float(), rows[:, 1:].flatten()
    if weights is None:
        return F.cross_entropy(flat, wanted)
    return F.cross_entropy(flat, wanted, reduction="none") @ weights.flatten()


def loss_of(model: GPT, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Loss of predicting each token of rows [R, context + 1] from those before it."""
    return prediction_loss(model(rows[:, :-1]), rows, weights)


def decoded_loss_of(
    model: GPT, rows: Tensor, weights: Tensor | None, config: ReSAConfig, prompt_tokens: int
) -> Tensor:
    """The mean of the losses of dense attention and of decoding with `config`."""
    exact = exact_stream(model, rows[:, :-1])
    decoded = decode_at_once(model, exact, config, prompt_tokens)
    hidden = exact.hidden, decoded.hidden
    losses = [prediction_loss(model.output(each), rows, weights) for each in hidden]
    return torch.stack(losses).mean()


def decoding_of(config: TrainConfig, step: int) -> tuple[ReSAConfig, int]:
    """Choose how a step decodes, and the tokens it prefills: both vary from step to step."""
    rng = np.random.default_rng((config.seed, step, 1))
    ratio, least = float(rng.choice(SPARSE_RATIOS)), int(rng.choice(SPARSE_LEAST))
    interval = config.sparse_interval or None
    decoding = ReSAConfig(active_ratio=ratio, min_blocks=least, interval=interval, schedule="paper")
    most = min(16 * decoding.block_size, config.row_tokens(step))
    return decoding, int(rng.integers(1, most, endpoint=True))


def token_weights(rows: Tensor, w: Words, checked_weight: float) -> Tensor:
    """Weights [R, context] that add the mean over asserted digits to the mean over all tokens."""
    checked = is_checked(w, rows)[:, 1:].float()
    return 1 / checked.numel() + checked_weight * checked / checked.sum().clamp(min=1)


class Trainer:
    """Model, optimizer and step count of one run, in memory and on disk."""

    def __init__(
        self, model_config: GPTConfig, config: TrainConfig, device: torch.device, compiled: bool
    ) -> None:
        self.config, self.device = config, device
        with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
            torch.manual_seed(config.seed)
            self.model = GPT(model_config).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        options = {"betas": BETAS, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda", **options)
        self.loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        self.words = words(load_tokenizer()) if config.checked_weight > 0 else None
        self.step = 0  # steps done
        self.seconds = 0.0  # spent on them, by all processes that took part
        self.log: list[dict[str, Any]] = []

    def take_step(self, rows: Tensor) -> Tensor:
        """One optimizer step on rows [R, context + 1]; returns the loss, still on the device."""
        config, kind = self.config, self.device.type
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        weights, loss_of = None, self.loss_of
        if self.words is not None:
            weights = token_weights(rows, self.words, config.checked_weight)
        if config.decodes(self.step):
            decoding, prompt_tokens = decoding_of(config, self.step)
            loss_of = partial(decoded_loss_of, config=decoding, prompt_tokens=prompt_tokens)
        # Products in bfloat16 on a GPU, in float32 on the CPU.
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            loss = loss_of(self.model, rows, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name; before the first step the moments are zero."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            weight, moments = parameter.detach(), self.optimizer.state[parameter]
            tensors[f"model.{name}"] = weight
            for key in MOMENTS:
                tensors[f"{key}.{name}"] = moments.get(key, torch.zeros_like(weight))
        return tensors

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write the state to one file in one step. `identity` is what makes it the same run."""
        progress = {"step": self.step, "seconds": self.seconds, "log": self.log}
        header = {"identity": json.dumps(identity), "progress": json.dumps(progress)}
        files.save_tensors(path, self.state(), {"format": TRAINING_FORMAT, **header})

    def restore(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from a file; ValueError names the first field in which it is of another run."""
        # Is it this run's?
        header = files.read_header(path, TRAINING_FORMAT)
        given, expected = json.loads(header["identity"]), json.loads(json.dumps(identity))
        for name in sorted(given.keys() | expected.keys()):
            stored, wanted = given.get(name), expected.get(name)
            require(stored == wanted, name, wanted, f"{stored}, as in {path}, or a fresh start")

        # Take it over. The fused optimizer counts steps on the GPU, the plain one on the CPU.
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state().items()}
        tensors, progress = files.read_tensors(path, shapes), json.loads(header["progress"])
        self.step, self.seconds, self.log = (progress[key] for key in ("step", "seconds", "log"))
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(self.device) for key in MOMENTS}
            count = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[parameter] = {"step": count, **moments}


def train(
    model_config: GPTConfig,
    config: TrainConfig,
    data: TrainData,
    out: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    compiled: bool = True,
    resume: bool = True,
    init: str | os.PathLike | None = None,
    progress: bool = True,
) -> GPT:
    """Train to the end; go on from `out/checkpoint.safetensors` if it exists and `resume` is set.

    `init` names a finished model whose weights a new run begins with. `compiled` counts on a GPU
    only. `out` gets the checkpoint, `log.jsonl`, `model.safetensors` and `record.json`.

    Errors: RuntimeError if the loss is not finite.
    """
    # Refuse what does not fit before any work.
    device, longest = checked_device("device", device), model_config.context
    require(config.context <= longest, "context", config.context, f"≤ {longest}, the model's")
    allowed = f"more than context = {config.context}"
    require(len(data.tokens) > config.context, "data.tokens", len(data.tokens), allowed)
    largest, allowed = int(data.tokens.max()), f"< vocab_size = {model_config.vocab_size}"
    require(largest < model_config.vocab_size, "data.tokens", largest, allowed)
    weights = None if init is None else initial_weights(init, model_config)

    # Begin, or go on.
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path, is_gpu = out / "checkpoint.safetensors", device.type == "cuda"
    trainer = Trainer(model_config, config, device, compiled and is_gpu)
    if weights is not None:
        trainer.model.load_state_dict(weights)
    content = data.tokens.tobytes() + data.programs.tobytes()
    identity = {f"model.{name}": value for name, value in asdict(model_config).items()}
    identity |= {f"train.{k}": value for k, value in asdict(config).items() if k not in RHYTHM}
    identity["init"] = None if init is None else files.file_digest(init)
    identity["data"] = hashlib.sha256(content).hexdigest()
    if not resume:
        path.unlink(missing_ok=True)
    if path.is_file():
        trainer.restore(path, identity)

    # Take the steps. Lines of the log past the checkpoint are written again on resuming.
    seconds_before = trainer.seconds
    started = saved = time.monotonic()
    steps, console = range(trainer.step, config.steps), Console(stderr=True)
    for step in track(steps, "Training", console=console, disable=not progress):
        rows = torch.from_numpy(make_batch(config, data, step))
        loss = trainer.take_step(rows.to(device))
        trainer.seconds = seconds_before + time.monotonic() - started
        is_last = trainer.step == config.steps
        if is_last or trainer.step % config.log_every == 0:
            log_step(trainer, loss.item(), out)
        if is_last or time.monotonic() - saved >= config.checkpoint_seconds:
            trainer.save(path, identity)
            saved = time.monotonic()

    # Write the finished model, and the record of how it came to be.
    model = trainer.model.eval()
    files.save_model(out / "model.safetensors", model, metadata={"train": json.dumps(identity)})
    record = {
        "command": shlex.join(["resa", *sys.argv[1:]]),
        "init_sha256": identity["init"],
        "model": asdict(model_config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train": asdict(config),
        "data": {**data.statistics, "sha256": identity["data"]},
        "tokens_seen": config.steps * config.batch_tokens,
        "seconds": round(trainer.seconds, 3),
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "final": trainer.log[-1],
    }
    write_atomically(out / "record.json", (as_json(record) + "\n").encode())
    return model


def log_step(trainer: Trainer, loss: float, out: Path) -> None:
    """Add the step just done to the log, and write log.jsonl."""
    config = trainer.config
    hint = f"try a learning_rate below {config.learning_rate}"
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} after step {trainer.step}; {hint}")
    line = {"step": trainer.step, "tokens": trainer.step * config.batch_tokens, "loss": loss}
    line |= {"lr": learning_rate(config, trainer.step - 1), "seconds": trainer.seconds}
    trainer.log.append(line)
    text = "".join(json.dumps(line) + "\n" for line in trainer.log)
    write_atomically(out / "log.jsonl", text.encode())


def initial_weights(path: str | os.PathLike, model_config: GPTConfig) -> dict[str, Tensor]:
    """The weights of a finished model of this shape; no weight depends on the context."""
    model = files.load_model(path)
    for name, value in asdict(replace(model_config, context=model.config.context)).items():
        stored = getattr(model.config, name)
        require(value == stored, name, value, f"{stored}, as in {path}")
    return model.state_dict()


def run(
    model_config: GPTConfig,
    config: TrainConfig,
    out: str | os.PathLike,
    *,
    packages: bool = False,
    device: torch.device | str | None = None,
    compiled: bool = True,
    resume: bool = True,
    init: str | os.PathLike | None = None,
    progress: bool = True,
) -> GPT:
    """Read the local corpus and train on it; see `train`. The device is the GPU if there is one."""
    # Refused here or not at all: the corpus takes a minute to read.
    device = checked_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if init is not None:
        initial_weights(init, model_config)
    data = prepare_data(config, packages=packages, progress=progress)
    how = {"compiled": compiled, "resume": resume, "init": init, "progress": progress}
    return train(model_config, config, data, out, device=device, **how)


def run_tokenizer(out: str | os.PathLike, *, vocab_size: int = VOCAB_SIZE) -> dict[str, float]:
    """Train a tokenizer on the library and the packages, and write its ranks to `out`.

    Returns its size and the bytes per token on the held-out standard library.
    """
    corpus = local_corpus(packages=True)
    ranks = train_tokenizer([document.text for document in corpus.train], vocab_size)
    save_ranks(out, ranks)
    shared = [document for document in corpus.held_out if document.source == STANDARD_LIBRARY]
    tokens = len(tokenize(shared, make_tokenizer(ranks), progress=False)) - len(shared)
    size = sum(len(document.text.encode()) for document in shared)
    return {"vocab_size": len(ranks) + 1, "held_out_bytes_per_token": round(size / tokens, 3)}
