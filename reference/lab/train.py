"""Train a small GPT on local source code and programs: AdamW, linear warm-up, cosine decay.

A run is a function of its configuration: batch s depends on (seed, s) alone. Its whole state is one
file that is replaced in one step, so a run that is killed at any moment goes on as if it never had
been. `corpus.py` and `programs.py` make the text.
"""

import hashlib
import json
import math
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
from torch import Tensor

from ..checks import checked_device, is_number, require, require_integer
from ..config import GPTConfig, ReSAConfig
from ..model import GPT
from ..weights import checkpoint as files
from ..weights.files import as_json, write_atomically
from ..weights.tokenizer import VOCAB_SIZE, load_tokenizer
from .corpus import local_corpus, tokenize
from .measure import shown
from .parallel import decode_at_once, exact_stream
from .programs import Words, is_checked, program_rows, words

TRAINING_FORMAT = "resa training state"
FINAL_LEARNING_RATE = 0.1  # as a share of the peak
BETAS, MOMENTS = (0.9, 0.95), ("exp_avg", "exp_avg_sq")  # of AdamW, and what it calls its averages
WEIGHT_DECAY = 0.1  # of matrices; norms and biases do not decay
GRAD_CLIP = 1.0  # largest norm of the whole gradient
SPARSE_RATIOS, SPARSE_LEAST = (0.05, 0.1, 0.2), (2, 4, 8)  # blocks, in steps that decode
CHECKPOINT_SECONDS = 60.0  # between checkpoints
LOG_EVERY = 20  # steps per line of the log

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


def setting(default: float, text: str) -> Any:
    """A field of `TrainConfig`; its text is the help of `resa train`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    steps: int = setting(6500, "optimizer steps")
    batch_tokens: int = setting(131_072, "tokens per step, a multiple of the context")
    context: int = setting(8192, "tokens per row, and the longest sequence that the model is for")
    # A fresh model attends to everything alike, which over thousands of tokens leaves next to no
    # gradient towards any one of them. So training begins on short rows.
    short_context: int = setting(1024, "tokens per row in the first part of the run")
    short_share: float = setting(0.4, "that part's share of the steps")
    learning_rate: float = setting(3e-3, "the peak, after the warm-up")
    warmup_steps: int = setting(200, "steps up to the peak")
    program_fraction: float = setting(0.2, "share of rows that are programs, not source code")
    program_rows: int = setting(4096, "distinct programs; a short row is the beginning of one")
    checked_weight: float = setting(
        0.0, "weight of the mean loss over asserted values, added to that over all tokens"
    )
    sparse_share: float = setting(
        0.0, "share of steps, the last ones, that learn from sparse decoding as well"
    )
    sparse_interval: int = setting(32, "tokens between rectifications in those steps; 0: never")
    seed: int = setting(0, "seed of weights and batches")

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


def prepare_data(config: TrainConfig, *, packages: bool) -> TrainData:
    """Read the local corpus and write the programs of a run."""
    tokenizer, corpus = load_tokenizer(), local_corpus(packages=packages)
    tokens = tokenize(corpus.train, tokenizer)
    count = config.program_rows if config.program_fraction > 0 else 0
    programs = program_rows(tokenizer, config.seed, count, config.context + 1)
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


def prediction_loss(logits: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy, in nats, of logits [R, context, V] for rows [R, context + 1].

    It is summed with `weights` [R, context] of the tokens predicted.
    """
    # In float32. Compiled, the conversion happens inside the softmax and is never stored.
    losses = F.cross_entropy(logits.float().mT, rows[:, 1:], reduction="none")
    return (losses * weights).sum()


def loss_of(model: GPT, rows: Tensor, weights: Tensor) -> Tensor:
    """Loss of predicting each token of rows [R, context + 1] from those before it."""
    return prediction_loss(model(rows[:, :-1]), rows, weights)


def decoded_loss_of(
    model: GPT, rows: Tensor, weights: Tensor, config: ReSAConfig, prompt_tokens: int
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
    most = min(16 * decoding.block_size, config.row_tokens(step) - 1)  # at least one is decoded
    return decoding, int(rng.integers(1, most, endpoint=True))


def token_weights(rows: Tensor, w: Words, checked_weight: float) -> Tensor:
    """Weights [R, context] that add the mean over asserted digits to the mean over all tokens."""
    checked = is_checked(w, rows)[:, 1:].float()
    return 1 / checked.numel() + checked_weight * checked / checked.sum().clamp(min=1)


class Trainer:
    """Model, optimizer and step count of one run, in memory and on disk.

    `init` names a finished model whose weights the run begins with. `compiled` counts on a GPU
    only; the device is the GPU if there is one.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        *,
        device: str | None = None,
        compiled: bool = True,
        init: Path | None = None,
    ) -> None:
        # Make the model.
        longest, found = model_config.context, "cuda" if torch.cuda.is_available() else "cpu"
        require(config.context <= longest, "context", config.context, f"≤ {longest}, the model's")
        self.config, self.device = config, checked_device("device", device or found)
        self.is_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
            torch.manual_seed(config.seed)
            self.model = GPT(model_config)
        self.init = None  # SHA-256 of the file that the run begins with
        if init is not None:
            begun, self.init = files.load_model(init), files.file_digest(init)
            is_same = replace(begun.config, context=longest) == model_config
            require(is_same, "init", init, "a model of this shape")  # the context apart
            self.model.load_state_dict(begun.state_dict())
        self.model.to(self.device)

        # Make the optimizer.
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        options = {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "fused": self.is_gpu}
        self.optimizer = torch.optim.AdamW(groups, **options)
        is_compiled = compiled and self.is_gpu
        self.loss_of = torch.compile(loss_of, dynamic=False) if is_compiled else loss_of
        self.words = words(load_tokenizer())
        self.step = 0  # steps done
        self.seconds = 0.0  # spent on them, by all processes that took part
        self.log: list[dict[str, Any]] = []

    def take_step(self, rows: Tensor) -> Tensor:
        """One optimizer step on rows [R, context + 1]; returns the loss, still on the device."""
        config, kind = self.config, self.device.type
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        weights = token_weights(rows, self.words, config.checked_weight)
        loss_of = self.loss_of
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

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write the state to one file in one step. `identity` is what makes it the same run."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key in MOMENTS:
                tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key]
        progress = {"step": self.step, "seconds": self.seconds, "log": self.log}
        header = {"identity": json.dumps(identity), "progress": json.dumps(progress)}
        files.save_tensors(path, tensors, {"format": TRAINING_FORMAT, **header})

    def restore(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from a file; ValueError names the first field in which it is of another run."""
        # Is it this run's?
        header = files.read_header(path, TRAINING_FORMAT)
        given, expected = json.loads(header["identity"]), json.loads(json.dumps(identity))
        for name in sorted(given.keys() | expected.keys()):
            stored, wanted = given.get(name), expected.get(name)
            require(stored == wanted, name, wanted, f"{stored}, as in {path}, or another folder")

        # Take it over. The fused optimizer counts steps on the GPU, the plain one on the CPU.
        parameters, kinds = dict(self.model.named_parameters()), ("model", *MOMENTS)
        shapes = {f"{k}.{name}": tuple(p.shape) for name, p in parameters.items() for k in kinds}
        tensors, progress = files.read_tensors(path, shapes), json.loads(header["progress"])
        self.step, self.seconds, self.log = (progress[key] for key in ("step", "seconds", "log"))
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"model.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(self.device) for key in MOMENTS}
            count = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[parameter] = {"step": count, **moments}

    def log_step(self, loss: float, out: Path) -> None:
        """Add the step just done to the log, and write log.jsonl."""
        config, hint = self.config, f"try a learning_rate below {self.config.learning_rate}"
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} after step {self.step}; {hint}")
        line = {"step": self.step, "tokens": self.step * config.batch_tokens, "loss": loss}
        line |= {"lr": learning_rate(config, self.step - 1), "seconds": self.seconds}
        self.log.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self.log)
        write_atomically(out / "log.jsonl", text.encode())


def train(trainer: Trainer, data: TrainData, out: Path) -> GPT:
    """Train to the end; go on from `out/checkpoint.safetensors` if it exists.

    `out` gets the checkpoint, `log.jsonl`, `model.safetensors` and `record.json`.

    Errors: RuntimeError if the loss is not finite.
    """
    # Begin, or go on.
    config, model = trainer.config, trainer.model
    allowed = f"more than context = {config.context}"
    require(len(data.tokens) > config.context, "data.tokens", len(data.tokens), allowed)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.safetensors"
    content = data.tokens.tobytes() + data.programs.tobytes()
    identity = {f"model.{name}": value for name, value in asdict(model.config).items()}
    identity |= {f"train.{name}": value for name, value in asdict(config).items()}
    identity |= {"init": trainer.init, "data": hashlib.sha256(content).hexdigest()}
    if path.is_file():
        trainer.restore(path, identity)

    # Take the steps. Lines of the log past the checkpoint are written again on resuming.
    seconds_before = trainer.seconds
    started = saved = time.monotonic()
    for step in shown(range(trainer.step, config.steps), "Training"):
        rows = torch.from_numpy(make_batch(config, data, step))
        loss = trainer.take_step(rows.to(trainer.device))
        trainer.seconds = seconds_before + time.monotonic() - started
        is_last = trainer.step == config.steps
        if is_last or trainer.step % LOG_EVERY == 0:
            trainer.log_step(loss.item(), out)
        if is_last or time.monotonic() - saved >= CHECKPOINT_SECONDS:
            trainer.save(path, identity)
            saved = time.monotonic()

    # Write the finished model, and the record of how it came to be.
    model.eval()
    files.save_model(out / "model.safetensors", model, metadata={"train": json.dumps(identity)})
    gpu = torch.cuda.get_device_name(trainer.device) if trainer.is_gpu else None
    record = {
        "command": shlex.join(["resa", *sys.argv[1:]]),
        "init_sha256": trainer.init,
        "model": asdict(model.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train": asdict(config),
        "data": {**data.statistics, "sha256": identity["data"]},
        "tokens_seen": config.steps * config.batch_tokens,
        "seconds": round(trainer.seconds, 3),
        "device": gpu or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "final": trainer.log[-1],
    }
    write_atomically(out / "record.json", (as_json(record) + "\n").encode())
    return model
