"""Trains a small GPT on local source code: AdamW, linear warm-up, cosine decay.

A run is a function of its configuration: batch s depends on (seed, s) alone, and the whole state sits in one file
that is replaced in one step, so a run that is killed at any moment continues as if it never had been. Neighbours:
`corpus.py` makes the arrays, `checkpoint.py` writes the files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .checkpoint import PARTS, file_digest, load_model, read_header, read_tensors, save_model, save_tensors
from .checks import checked_device, is_integer, require
from .config import GPTConfig, ReSAConfig
from .corpus import (
    STANDARD_LIBRARY,
    Document,
    cached_array,
    local_corpus,
    lookup_documents,
    lookup_probe,
    tokenize,
)
from .files import write_atomically
from .model import GPT
from .parallel import decode_at_once, exact_stream
from .programs import Words, is_checked, program_rows, words
from .tasks import RETRIEVAL, documents
from .tokenizer import VOCAB_SIZE, load_tokenizer, make_tokenizer, save_ranks, shipped_ranks, train_tokenizer

TRAINING_FORMAT = "resa training state"
FINAL_LEARNING_RATE = 0.1  # as a share of the peak
HELD_OUT_ROWS = 16
PROBES_PER_DISTANCE = 8
CURVE_POINTS = 200  # of the loss, in the record
SPARSE_RATIOS, SPARSE_LEAST = (0.05, 0.1, 0.2), (2, 4, 8)  # of blocks, in steps that decode
PLAIN_REPORT_SECONDS = 30.0  # between lines where there is no terminal to draw a bar on

# The model that the package ships: 5.7 million parameters. Deep, with wide heads and small groups, because such a
# model loses least when it attends to selected blocks only.
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
    """How to train. The last three fields may change when a run is resumed: they do not change its result."""

    steps: int = 6500
    batch_tokens: int = 131_072  # per step; a multiple of context
    context: int = 8192  # tokens per row
    # A fresh model attends to everything alike; over thousands of tokens that leaves next to no gradient towards any
    # one of them. So training begins on short rows, which are more varied at the same number of tokens, and cheaper.
    short_context: int = 1024  # tokens per row in that first part
    short_share: float = 0.4  # the first part's share of the steps
    learning_rate: float = 3e-3  # the peak; a small model stands a high one
    warmup_steps: int = 200
    weight_decay: float = 0.1  # of matrices; norms and biases are not decayed
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # largest norm of the whole gradient
    lookup_fraction: float = 0.2  # share of rows that are lookup documents rather than source code
    lookup_rows: int = 4096  # distinct lookup documents
    lookup_far: float = 0.0  # share of lookups whose distance is uniform rather than log-uniform
    program_fraction: float = 0.0  # share of rows that are programs, see programs.py; a short row is one's beginning
    program_rows: int = 4096  # distinct programs
    task_fraction: float = 0.0  # share of rows that are questions and their answers, see tasks.RETRIEVAL
    task_rows: int = 4096  # distinct rows of questions
    task_long: float = 0.0  # share of those rows that are one question as long as the row
    checked_weight: float = 0.0  # of the mean loss over what is asserted, added to that over all tokens
    # The last steps may decode every row sparsely beside the dense pass, and learn from both; see parallel.py.
    sparse_share: float = 0.0  # those steps' share
    sparse_interval: int = 32  # tokens between rectifications in such a step; 0: never
    part: str = "all"  # of the model that is trained, see checkpoint.PARTS; the rest stays as it begins
    seed: int = 0
    checkpoint_seconds: float = 60.0
    log_every: int = 20  # steps
    eval_every: int = 500  # steps

    def __post_init__(self) -> None:
        require(self.part in PARTS, "part", repr(self.part), ", ".join(PARTS))
        distinct = ("lookup_rows", "program_rows", "task_rows")
        for name in ("steps", "batch_tokens", "context", *distinct, "log_every", "eval_every"):
            require(is_integer(getattr(self, name), 1), name, getattr(self, name), "an integer ≥ 1")
        for name in ("warmup_steps", "sparse_interval", "seed"):
            require(is_integer(getattr(self, name), 0), name, getattr(self, name), "an integer ≥ 0")
        cut = self.short_context
        fits = is_integer(cut, 1) and (cut >= self.context or self.context % cut == 0)
        require(fits, "short_context", self.short_context, f"an integer that divides context = {self.context}, or more")
        _require_number("short_share", self.short_share, lambda value: 0 <= value <= 1, "a number in 0 … 1")
        divides = self.batch_tokens % self.context == 0
        require(divides, "batch_tokens", self.batch_tokens, f"a multiple of context = {self.context}")
        for name in ("learning_rate", "grad_clip"):
            _require_number(name, getattr(self, name), lambda value: value > 0, "a finite number > 0")
        shortest = min(self.short_context, self.context) if self.short_share > 0 else self.context
        enough = self.sparse_share == 0 or shortest >= ReSAConfig.block_size
        require(enough, "sparse_share", self.sparse_share, f"0, or rows of {ReSAConfig.block_size} tokens and more")
        b, f = ReSAConfig.block_size, self.sparse_interval
        is_nested = self.sparse_share == 0 or f == 0 or f % b == 0 or b % f == 0
        require(is_nested, "sparse_interval", f, f"0, a divisor or a multiple of {b}")
        for name in ("weight_decay", "checked_weight", "checkpoint_seconds"):
            _require_number(name, getattr(self, name), lambda value: value >= 0, "a finite number ≥ 0")
        for name in ("lookup_fraction", "lookup_far", "program_fraction", "task_fraction", "task_long", "sparse_share"):
            _require_number(name, getattr(self, name), lambda value: 0 <= value <= 1, "a number in 0 … 1")
        require(len(self.betas) == 2, "betas", self.betas, "two numbers")
        for beta in self.betas:
            _require_number("betas", beta, lambda value: 0 <= value < 1, "two numbers in 0 … 1, 1 itself excluded")

    def row_tokens(self, step: int) -> int:
        """Tokens per row of step 0, 1, …"""
        is_short = step < round(self.short_share * self.steps)
        return min(self.short_context, self.context) if is_short else self.context

    def decodes(self, step: int) -> bool:
        """Whether step 0, 1, … decodes its rows sparsely as well."""
        return step >= self.steps - round(self.sparse_share * self.steps)

    def decisive(self) -> dict[str, object]:
        """The fields that decide the result, that is, all but the last three."""
        return {name: value for name, value in asdict(self).items() if name not in RHYTHM}


RHYTHM = ("checkpoint_seconds", "log_every", "eval_every")


def _require_number(name: str, value: object, holds: Callable[[float], bool], allowed: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(is_number and holds(value), name, value, allowed)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 0, 1, …: linear up to the peak over the warm-up, then a cosine down to a tenth of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.learning_rate * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


# ---- Data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A question whose answer was given `distance` tokens before."""

    distance: int
    prompt: list[int]
    answer: list[int]


NO_ROWS = np.zeros((0, 0), dtype=np.uint16)


@dataclass(frozen=True)
class TrainData:
    """All that training reads."""

    tokens: np.ndarray  # [n] uint16, the stream of source code
    held_out: np.ndarray  # [HELD_OUT_ROWS, context + 1] uint16, never trained on
    lookups: np.ndarray  # [lookup_rows, context + 1] uint16
    programs: np.ndarray = field(default_factory=lambda: NO_ROWS)  # [program_rows, context + 1] uint16
    tasks: np.ndarray = field(default_factory=lambda: NO_ROWS)  # [task_rows, context + 1] uint16
    probes: list[Probe] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Names the arrays' content: a run may only be resumed on the same data."""
        digest = hashlib.sha256()
        used = [array for array in (self.programs, self.tasks) if len(array)]
        for array in (self.tokens, self.held_out, self.lookups, *used):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def prepare_data(
    config: TrainConfig,
    cache: str | os.PathLike,
    *,
    packages: bool = False,
    folders: Sequence[str | os.PathLike] = (),
    progress: bool = True,
) -> TrainData:
    """Reads the local corpus and makes the arrays of a run; what takes long is kept in the folder `cache`."""
    tokenizer = load_tokenizer()
    corpus = local_corpus(packages=packages, folders=folders, progress=progress)
    ranks = shipped_ranks().read_bytes()
    texts = [document.text.encode() for document in corpus.train]
    make_tokens = partial(tokenize, corpus.train, tokenizer, progress)
    tokens = cached_array(cache, "tokens", [ranks, *texts], make_tokens)
    row = config.context + 1
    rows = config.lookup_rows if config.lookup_fraction > 0 else 0
    code = [document.text for document in corpus.train]
    make_lookups = partial(lookup_documents, tokenizer, config.seed, rows, row, code, config.lookup_far, progress)
    settings = f"{config.seed} {rows} {row} {config.lookup_far}".encode()
    lookups = cached_array(cache, "lookups", [ranks, settings, *texts], make_lookups)
    programs = NO_ROWS
    if config.program_fraction > 0:
        make_programs = partial(program_rows, tokenizer, config.seed, config.program_rows, row, progress)
        settings = f"{config.seed} {config.program_rows} {row}".encode()
        programs = cached_array(cache, "programs", [ranks, settings], make_programs)
    tasks = NO_ROWS
    if config.task_fraction > 0:
        options = {"code": code, "progress": progress, "long_share": config.task_long}
        make_tasks = partial(documents, tokenizer, config.seed, config.task_rows, row, RETRIEVAL, **options)
        settings = f"{config.seed} {config.task_rows} {row} {config.task_long}".encode()
        tasks = cached_array(cache, "tasks", [ranks, settings, *texts], make_tasks)
    statistics = {**corpus.statistics, "train_tokens": len(tokens), "lookup_tokens": lookups.size}
    held_out = held_out_rows(corpus.held_out, tokenizer, row)
    if len(programs):
        statistics["program_tokens"] = programs.size
    if len(tasks):
        statistics["task_tokens"] = tasks.size
    probes = make_probes(tokenizer, config.context)
    return TrainData(tokens, held_out, lookups, programs, tasks, probes, statistics)


def held_out_rows(documents: Sequence[Document], tokenizer: tiktoken.Encoding, row: int) -> np.ndarray:
    """Evenly spaced windows of the held-out standard library, which every machine has: [HELD_OUT_ROWS, row]."""
    shared = [document for document in documents if document.source == STANDARD_LIBRARY]
    stream = tokenize(shared, tokenizer, progress=False)
    require(len(stream) >= row, "context", row - 1, f"< {len(stream)}, the tokens of the held-out standard library")
    starts = np.linspace(0, len(stream) - row, HELD_OUT_ROWS).astype(int)
    return np.stack([stream[start : start + row] for start in starts])


def make_probes(tokenizer: tiktoken.Encoding, context: int) -> list[Probe]:
    """The same questions in every run: distances of 1/32, 1/8 and 1/2 of the context, and nearly all of it."""
    distances = [context // 32, context // 8, context // 2, context - 160]
    probes = []
    for distance in (distance for distance in distances if distance >= 64):
        for index in range(PROBES_PER_DISTANCE):
            rng = np.random.default_rng((distance, index))
            probes.append(Probe(distance, *lookup_probe(tokenizer, rng, distance)))
    return probes


def make_batch(config: TrainConfig, data: TrainData, step: int) -> np.ndarray:
    """Rows of step `step`, a function of (seed, step) alone: [rows, tokens + 1] int64."""
    rng = np.random.default_rng((config.seed, step))
    length = config.row_tokens(step)
    rows = config.batch_tokens // length
    is_lookup = rng.random(rows) < config.lookup_fraction
    starts = rng.integers(len(data.tokens) - length, size=rows)
    chosen = rng.integers(max(1, len(data.lookups)), size=rows)
    begins = rng.integers(config.context - length, size=rows, endpoint=True)  # within a lookup document
    is_program = np.zeros(rows, dtype=bool)
    if config.program_fraction > 0:
        is_program = rng.random(rows) < config.program_fraction
        programs = rng.integers(len(data.programs), size=rows)
    is_task = np.zeros(rows, dtype=bool)
    if config.task_fraction > 0:
        is_task = rng.random(rows) < config.task_fraction
        tasks = rng.integers(len(data.tasks), size=rows)
    batch = np.empty((rows, length + 1), dtype=np.int64)
    for index in range(rows):
        source, start = data.tokens, starts[index]
        if is_program[index]:
            source, start = data.programs[programs[index]], 0
        elif is_task[index]:  # examples are of all sizes: a stretch of the row has whole ones
            source, start = data.tasks[tasks[index]], begins[index]
        elif is_lookup[index]:
            source, start = data.lookups[chosen[index]], begins[index]
        batch[index] = source[start : start + length + 1]
    return batch


def prefetch(make: Callable[[int], np.ndarray], steps: range, device: torch.device) -> Iterator[Tensor]:
    """`make(step)` on the device for each step; a thread works a few steps ahead, so the GPU never waits for it."""

    def prepare(step: int) -> Tensor:
        batch = torch.from_numpy(make(step))
        return batch.pin_memory() if device.type == "cuda" else batch  # only pinned memory is copied asynchronously

    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting = deque(worker.submit(prepare, step) for step in steps[:4])
        for ahead in range(len(steps)):
            batch = waiting.popleft().result()
            if ahead + 4 < len(steps):
                waiting.append(worker.submit(prepare, steps[ahead + 4]))
            yield batch.to(device, non_blocking=True)


# ---- The run -------------------------------------------------------------------------------------------------------


def loss_of(model: GPT, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of predicting each token of `rows` [R, context + 1] from those before it.

    weights [R, context] of the tokens predicted replace the mean by their sum.
    """
    return prediction_loss(model(rows[:, :-1]), rows, weights)


def prediction_loss(logits: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The same of logits [R, context, V]."""
    wanted = rows[:, 1:].flatten()
    # In float32; compiled, the conversion happens inside the softmax and no float32 logits are ever stored.
    flat = logits.flatten(0, 1).float()
    if weights is None:
        return F.cross_entropy(flat, wanted)
    return F.cross_entropy(flat, wanted, reduction="none") @ weights.flatten()


def decoded_loss_of(model: GPT, rows: Tensor, weights: Tensor | None, config: ReSAConfig, prompt_tokens: int) -> Tensor:
    """The mean of the losses of dense attention and of decoding with `config`."""
    exact = exact_stream(model, rows[:, :-1])
    streams = (exact.hidden, decode_at_once(model, exact, config, prompt_tokens))
    dense, decoded = (prediction_loss(model.output(hidden), rows, weights) for hidden in streams)
    return (dense + decoded) / 2


def decoding_of(config: TrainConfig, step: int) -> tuple[ReSAConfig, int]:
    """How step `step` decodes, and the tokens prefilled: ratio and least number of blocks vary from step to step."""
    rng = np.random.default_rng((config.seed, step, 1))
    ratio, least = float(rng.choice(SPARSE_RATIOS)), int(rng.choice(SPARSE_LEAST))
    decoding = ReSAConfig(
        active_ratio=ratio, min_blocks=least, interval=config.sparse_interval or None, schedule="paper"
    )
    b = decoding.block_size
    return decoding, b * int(rng.integers(1, min(16, config.row_tokens(step) // b), endpoint=True))


def token_weights(rows: Tensor, words: Words, checked_weight: float) -> Tensor:
    """Weights [R, context] of the tokens predicted that add the mean over what is asserted to the mean over all."""
    checked = is_checked(words, rows)[:, 1:].float()
    return 1 / checked.numel() + checked_weight * checked / checked.sum().clamp(min=1)


class Trainer:
    """Model, optimizer and step count of one run, in memory and on disk."""

    def __init__(
        self, model_config: GPTConfig, config: TrainConfig, data: TrainData, out: Path, device: torch.device
    ) -> None:
        self.config, self.data, self.out, self.device = config, data, out, device
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            torch.manual_seed(config.seed)
            self.model = GPT(model_config).to(device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(PARTS[config.part] in name)
        parameters = list(self.trained().values())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=device.type == "cuda")
        self.loss_of: Callable[[GPT, Tensor], Tensor] = loss_of
        self.words = words(load_tokenizer()) if config.checked_weight > 0 else None
        self.init: str | None = None  # digest of the weights begun with, if they were not random
        self.step = 0  # steps done
        self.seconds = 0.0  # spent on those steps, over all processes that took part
        self.loss_sum = torch.zeros((), device=device)  # over the steps since the last line of the log
        self.loss_steps = 0

    @property
    def path(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that steps change."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def take_step(self, rows: Tensor) -> None:
        """One optimizer step on `rows` [R, context + 1]; the loss stays on the device, so nothing waits for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        weights = None
        if self.words is not None:
            weights = token_weights(rows, self.words, self.config.checked_weight)
        with self.precision():
            if self.config.decodes(self.step):
                loss = decoded_loss_of(self.model, rows, weights, *decoding_of(self.config, self.step))
            else:
                loss = self.loss_of(self.model, rows, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.loss_steps += 1
        self.step += 1

    def take_mean_loss(self) -> float:
        """Mean loss since the last call; RuntimeError if it is not finite."""
        mean = self.loss_sum.item() / self.loss_steps
        if not math.isfinite(mean):
            raise RuntimeError(
                f"the loss is {mean} after step {self.step}; try a learning_rate below {self.config.learning_rate}"
            )
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean

    def precision(self) -> torch.autocast:
        """Products in bfloat16 on a GPU; float32 on the CPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def evaluate(self) -> dict[str, object]:
        """Loss on held-out code, and for each distance the share of probes answered without a wrong token."""
        losses = []
        for rows in np.array_split(self.data.held_out.astype(np.int64), len(self.data.held_out)):
            with self.precision():
                losses.append(loss_of(self.model, torch.from_numpy(rows).to(self.device)))
        result: dict[str, object] = {"held_out_loss": round(torch.stack(losses).mean().item(), 4)}
        right: dict[str, list[bool]] = {}
        for probe in self.data.probes:
            tokens = torch.tensor([probe.prompt + probe.answer], device=self.device)
            with self.precision():
                logits = self.model(tokens[:, :-1])[0, -len(probe.answer) :]  # those that predict the answer
            answered = bool((logits.argmax(-1) == tokens[0, -len(probe.answer) :]).all())
            right.setdefault(str(probe.distance), []).append(answered)
        if right:
            result["lookup_accuracy"] = {distance: sum(each) / len(each) for distance, each in right.items()}
        return result

    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be the same run; as JSON gives it back."""
        fields = {"model." + name: value for name, value in asdict(self.model.config).items()}
        fields |= {"train." + name: value for name, value in self.config.decisive().items()}
        return json.loads(json.dumps({**fields, "data": self.data.digest, "init": self.init}))

    def save(self) -> None:
        """Writes the state to one file in one step."""
        tensors = {"model." + name: parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.trained().items():
            state = self.optimizer.state[parameter]
            tensors["optimizer.exp_avg." + name] = state["exp_avg"]
            tensors["optimizer.exp_avg_sq." + name] = state["exp_avg_sq"]
        loss = {"loss_sum": self.loss_sum.item(), "loss_steps": self.loss_steps}
        progress = json.dumps({"step": self.step, "seconds": self.seconds, **loss})
        header = {"format": TRAINING_FORMAT, "identity": json.dumps(self.identity()), "progress": progress}
        save_tensors(self.path, tensors, header)

    def restore(self) -> None:
        """Goes on from the file; ValueError naming the first field in which it belongs to another run."""
        header = read_header(self.path, TRAINING_FORMAT)
        given, expected = json.loads(header["identity"]), self.identity()
        for name in sorted(given.keys() | expected.keys()):
            stored, wanted = given.get(name), expected.get(name)
            hint = f"{stored}, as in {self.path}, or a fresh start"
            require(stored == wanted, name, wanted, hint)
        parameters, trained = dict(self.model.named_parameters()), self.trained()
        shapes = {"model." + name: tuple(p.shape) for name, p in parameters.items()}
        for kind in ("optimizer.exp_avg.", "optimizer.exp_avg_sq."):
            shapes |= {kind + name: tuple(p.shape) for name, p in trained.items()}
        tensors = read_tensors(self.path, shapes)
        progress = json.loads(header["progress"])
        self.step, self.seconds, self.loss_steps = (progress[key] for key in ("step", "seconds", "loss_steps"))
        self.loss_sum.fill_(progress["loss_sum"])
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors["model." + name])
        for name, parameter in trained.items():
            moments = {key: tensors[f"optimizer.{key}.{name}"].to(self.device) for key in ("exp_avg", "exp_avg_sq")}
            # The fused optimizer counts steps on the device, the plain one on the CPU.
            count_device = self.device if self.device.type == "cuda" else "cpu"
            count = torch.tensor(float(self.step), device=count_device)
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
    """Trains to the end, going on from `out/checkpoint.safetensors` if there is one and `resume` is true.

    `init` names a finished model whose weights a new run begins with, in place of random ones.

    Leaves in `out`: `model.safetensors` (bfloat16), `record.json`, `log.jsonl` and the checkpoint. `compiled` counts
    on a GPU only. SIGINT and SIGTERM end the run after the current step, saved, with KeyboardInterrupt.

    Errors: ValueError for inputs that do not fit, before any work; RuntimeError if the loss is not finite.
    """
    device = checked_device("device", device)
    check_run(model_config, config, data)
    require(config.part == "all" or init is not None, "part", repr(config.part), "'all' where there is no init")
    weights = None if init is None else initial_weights(init, model_config)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model_config, config, data, out, device)
    if weights is not None:
        trainer.model.load_state_dict(weights)
        trainer.init = file_digest(init)
    if resume and trainer.path.is_file():
        trainer.restore()
    trim_log(out / "log.jsonl", trainer.step)
    if not resume:
        trainer.path.unlink(missing_ok=True)
    if device.type == "cuda" and compiled:
        trainer.loss_of = torch.compile(loss_of, dynamic=False)
    with tf32_products(device):
        run_steps(trainer, progress)
        export(trainer)
    return trainer.model.requires_grad_(True).eval()  # all of it, whatever part was trained here


def initial_weights(path: str | os.PathLike, model_config: GPTConfig) -> dict[str, Tensor]:
    """The weights of a finished model; ValueError naming the first field in which its shape is another.

    The context may be another: no weight depends on it.
    """
    model = load_model(path)
    for name, value in asdict(replace(model_config, context=model.config.context)).items():
        stored = getattr(model.config, name)
        require(value == stored, name, value, f"{stored}, as in {path}")
    return model.state_dict()


def check_run(model_config: GPTConfig, config: TrainConfig, data: TrainData) -> None:
    """Refuses by name what does not fit together."""
    row = config.context + 1
    require(config.context <= model_config.context, "context", config.context, f"≤ {model_config.context}, the model's")
    require(data.tokens.ndim == 1 and len(data.tokens) >= row, "data.tokens", data.tokens.shape, f"[≥ {row}]")
    needs = {"held_out": True, "lookups": config.lookup_fraction > 0, "programs": config.program_fraction > 0}
    needs["tasks"] = config.task_fraction > 0
    for name, needed in needs.items():
        array = getattr(data, name)
        is_unused = name in ("programs", "tasks") and array.size == 0
        fits = (is_unused or (array.ndim == 2 and array.shape[1] == row)) and (len(array) > 0 or not needed)
        require(fits, f"data.{name}", array.shape, f"[rows, {row}]")
    for name in ("tokens", *needs):
        array = getattr(data, name)
        largest = int(array.max()) if array.size else 0
        fits = array.dtype == np.uint16 and largest < model_config.vocab_size
        require(
            fits, f"data.{name}", f"{array.dtype} up to {largest}", f"uint16 < vocab_size = {model_config.vocab_size}"
        )


@contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Float32 products may use TF32 on a GPU; the CPU stays exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run_steps(trainer: Trainer, progress: bool) -> None:
    """The loop: steps, log lines, checkpoints, and an orderly end when asked to stop."""
    config = trainer.config
    batches = prefetch(partial(make_batch, config, trainer.data), range(trainer.step, config.steps), trainer.device)
    seconds_before, started = trainer.seconds, time.monotonic()
    saved = started
    with stop_requests() as stop, closing(batches), Report(config, trainer.step, progress) as report:
        log = Log(trainer)
        for rows in batches:
            trainer.take_step(rows)
            trainer.seconds = seconds_before + time.monotonic() - started
            done = trainer.step == config.steps
            if done or trainer.step % config.log_every == 0 or trainer.step % config.eval_every == 0:
                report.show(log.write())
            # After the log: a line past the checkpoint is written again on resuming, one before it would be lost.
            if done or stop.is_set() or time.monotonic() - saved >= config.checkpoint_seconds:
                trainer.save()
                saved = time.monotonic()
            if stop.is_set() and not done:
                report.say(f"Stopped after step {trainer.step}, saved; the same command goes on from there.")
                raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C) or SIGTERM sets; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def request(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Report:
    """Progress on standard error: a bar on a terminal, elsewhere a plain line every PLAIN_REPORT_SECONDS."""

    def __init__(self, config: TrainConfig, step: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        is_bar = shown and self.console.is_terminal
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not is_bar)
        self.task = self.bar.add_task("Training", total=config.steps, completed=step, note="")
        self.last = -math.inf

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def show(self, line: dict[str, object]) -> None:
        """Shows a line of the log."""
        note = f"loss {line['loss']:.3f}, {line['tokens_per_s']:,} tokens/s"
        self.bar.update(self.task, completed=line["step"], note=note)
        if self.bar.disable and time.monotonic() - self.last >= PLAIN_REPORT_SECONDS:
            self.say(f"step {line['step']}: {note}")
            self.last = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


class Log:
    """`log.jsonl`: one line per `log_every` steps, and for every evaluation."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.step, self.seconds = trainer.step, trainer.seconds  # of the line before

    def write(self) -> dict[str, object]:
        """Adds a line about the steps since the one before; this waits for the device."""
        trainer, config = self.trainer, self.trainer.config
        loss = trainer.take_mean_loss()
        line: dict[str, object] = {
            "step": trainer.step,
            "tokens": trainer.step * config.batch_tokens,
            "loss": round(loss, 5),
            "lr": learning_rate(config, trainer.step - 1),
            "tokens_per_s": round((trainer.step - self.step) * config.batch_tokens / (trainer.seconds - self.seconds)),
            "elapsed": round(trainer.seconds, 2),
        }
        if trainer.step % config.eval_every == 0 or trainer.step == config.steps:
            line |= trainer.evaluate()
        with open(trainer.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.step, self.seconds = trainer.step, trainer.seconds
        return line


def read_log(path: Path) -> list[dict[str, object]]:
    """The log's lines; a last line that a crash cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def trim_log(path: Path, step: int) -> None:
    """Drops what was logged after `step`; those steps are about to be taken again."""
    kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
    write_atomically(path, "".join(kept).encode())


def export(trainer: Trainer) -> None:
    """Writes the model as it ships, and the record of how it came to be."""
    config = trainer.config
    save_model(trainer.out / "model.safetensors", trainer.model, metadata={"train": json.dumps(config.decisive())})
    lines = read_log(trainer.out / "log.jsonl")
    curve = [[line["step"], line["loss"]] for line in lines]
    chosen = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), CURVE_POINTS)).round().astype(int))
    is_gpu = trainer.device.type == "cuda"
    record = {
        "command": shlex.join(["resa", *sys.argv[1:]]),
        "init_sha256": trainer.init,
        "model": asdict(trainer.model.config),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "train": asdict(config),
        "data": {**trainer.data.statistics, "sha256": trainer.data.digest},
        "tokens_seen": trainer.step * config.batch_tokens,
        "seconds": round(trainer.seconds, 3),
        "final": lines[-1] if lines else None,  # None if someone removed the log of a finished run
        "device": torch.cuda.get_device_name(trainer.device) if is_gpu else platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy", "tiktoken")}
        | {"python": platform.python_version()},
        "loss_curve": [curve[index] for index in chosen],
    }
    write_atomically(trainer.out / "record.json", (json.dumps(record, indent=1) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # triton, where there is none


# ---- Commands ------------------------------------------------------------------------------------------------------


def run(
    model_config: GPTConfig,
    config: TrainConfig,
    out: str | os.PathLike,
    *,
    packages: bool = False,
    folders: Sequence[str | os.PathLike] = (),
    device: torch.device | str | None = None,
    compiled: bool = True,
    resume: bool = True,
    init: str | os.PathLike | None = None,
    progress: bool = True,
) -> GPT:
    """Reads the local corpus and trains on it; everything is kept in the folder `out`. See `train`.

    `device` None is the GPU if there is one. The vocabulary is the shipped tokenizer's.
    """
    device = checked_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vocabulary = load_tokenizer().n_vocab
    require(
        model_config.vocab_size == vocabulary, "vocab_size", model_config.vocab_size, f"{vocabulary}, the tokenizer's"
    )
    require(config.context <= model_config.context, "context", config.context, f"≤ {model_config.context}, the model's")
    if init is not None:
        initial_weights(init, model_config)  # refused here or not at all: the corpus takes a minute to read
    out = Path(out)
    data = prepare_data(config, out / "cache", packages=packages, folders=folders, progress=progress)
    options = {"device": device, "compiled": compiled, "resume": resume, "init": init, "progress": progress}
    return train(model_config, config, data, out, **options)


def run_tokenizer(
    out: str | os.PathLike | None = None,
    *,
    vocab_size: int = VOCAB_SIZE,
    packages: bool = True,
    folders: Sequence[str | os.PathLike] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Trains a tokenizer on the training side of the local corpus and writes its ranks to `out`, by default as shipped.

    Returns its size and the bytes per token on the held-out standard library.
    """
    corpus = local_corpus(packages=packages, folders=folders, progress=progress)
    ranks = train_tokenizer([document.text for document in corpus.train], vocab_size, progress)
    save_ranks(out or shipped_ranks(), ranks)
    shared = [document for document in corpus.held_out if document.source == STANDARD_LIBRARY]
    tokens = len(tokenize(shared, make_tokenizer(ranks), progress=False)) - len(shared)
    size = sum(len(document.text.encode()) for document in shared)
    return {"vocab_size": len(ranks) + 1, "held_out_bytes_per_token": round(size / tokens, 3)}
