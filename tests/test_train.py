"""Training: it learns, a run cut anywhere and resumed is the run uncut, and what does not fit is refused by name."""

import hashlib
import json
import math
import os
import signal
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import Shape

from resa.reference import ReSAConfig, corpus
from resa.reference import train as train_module
from resa.reference.checkpoint import load_model, read_header
from resa.reference.corpus import STANDARD_LIBRARY, Document
from resa.reference.programs import words
from resa.reference.tasks import RETRIEVAL
from resa.reference.tasks import documents as write_tasks
from resa.reference.tokenizer import VOCAB_SIZE, load_tokenizer
from resa.reference.train import (
    Probe,
    TrainConfig,
    TrainData,
    Trainer,
    decoded_loss_of,
    decoding_of,
    learning_rate,
    loss_of,
    make_batch,
    make_probes,
    prefetch,
    prepare_data,
    run,
    run_tokenizer,
    token_weights,
    train,
    trim_log,
)

MODEL = Shape(context=16).config()
CONFIG = TrainConfig(
    steps=10,
    batch_tokens=64,
    context=16,
    short_context=4,
    short_share=0.5,
    learning_rate=1e-2,
    warmup_steps=3,
    lookup_fraction=0.5,
    lookup_rows=8,
    checkpoint_seconds=1000.0,
    log_every=2,
    eval_every=4,
)
CPU = torch.device("cpu")


def data(seed=0, vocab=23):
    """A stream that counts upwards, so that there is something to learn; lookups that count downwards."""
    start = seed + np.arange(500)
    up = (start % vocab).astype(np.uint16)
    down = ((-start) % vocab).astype(np.uint16)
    lookups = np.stack([down[row : row + 17] for row in range(8)])
    held_out = np.stack([up[row : row + 17] for row in range(4)])
    return TrainData(up, held_out, lookups, probes=[Probe(4, [1, 2, 3, 4], [5, 6])], statistics={"train_files": 1})


def trained(out, config=CONFIG, model=MODEL, stream=None, **options):
    return train(model, config, stream or data(), out, progress=False, **options)


def state(out):
    return safetensors.torch.load_file(out / "checkpoint.safetensors")


def log(out, timeless=True):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = ("tokens_per_s", "elapsed") if timeless else ()
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same_run(out, other):
    """Bit for bit the same weights and optimizer state, and the same log but for the times."""
    ours, theirs = state(out), state(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert log(out) == log(other)
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("uncut")
    trained(out)
    return out


# ---- Learning ------------------------------------------------------------------------------------------------------


def test_the_loss_goes_down(tmp_path):
    model = trained(tmp_path, replace(CONFIG, steps=150, lookup_fraction=0.2, log_every=10))
    lines = log(tmp_path)
    assert lines[0]["loss"] > 2.5  # ln 23 is 3.1
    assert lines[-1]["loss"] < 0.6
    assert lines[-1]["held_out_loss"] < 0.6
    assert lines[-1]["lookup_accuracy"] == {"4": 1.0}
    assert model(torch.tensor([[3, 4, 5, 6]]))[0].argmax(-1).tolist()[1:] == [5, 6, 7]
    assert not model.training


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (52, 0.55), (100, 0.1), (28, 0.1 + 0.45 * (1 + 0.5**0.5))],
)
def test_the_learning_rate_warms_up_and_decays_to_a_tenth(step, share):
    config = TrainConfig(steps=101, warmup_steps=4, learning_rate=0.02)
    assert learning_rate(config, step) == pytest.approx(0.02 * share, rel=1e-12)


@given(st.integers(1, 30), st.integers(0, 40))
def test_the_learning_rate_is_never_zero_nor_above_its_peak(steps, warmup):
    config = TrainConfig(steps=steps, warmup_steps=warmup, learning_rate=1.0)
    assert all(0 < learning_rate(config, step) <= 1 for step in range(steps))


def test_the_first_part_of_a_run_reads_short_rows():
    shapes = [make_batch(CONFIG, data(), step).shape for step in range(CONFIG.steps)]
    assert shapes == [(16, 5)] * 5 + [(4, 17)] * 5


def test_one_step_is_the_optimizer_by_hand(tmp_path):
    config = replace(CONFIG, warmup_steps=0, weight_decay=0.3, grad_clip=1e9)
    trainer = Trainer(MODEL, config, data(), tmp_path, CPU)
    # Freshly drawn weights hardly attend, and what does not matter has no gradient to speak of.
    trainer.model.load_state_dict(Shape(context=16).model(torch.float32).state_dict())
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    rows = torch.from_numpy(make_batch(config, data(), 0))
    logits = trainer.model(rows[:, :-1]).log_softmax(-1)
    loss = -logits.gather(-1, rows[:, 1:, None]).mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, trainer.model.parameters()), strict=True))
    trainer.take_step(rows)
    assert trainer.take_mean_loss() == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in trainer.model.named_parameters():
        # The first step of Adam is the gradient over its own size; matrices shrink besides.
        decay = 0.3 if weight.dim() == 2 else 0.0
        moved = before[name] * (1 - config.learning_rate * decay)
        expected = moved - config.learning_rate * gradients[name] / (gradients[name].abs() + 1e-8)
        large = gradients[name].abs() > 1e-5  # below, rounding of the gradient decides
        assert torch.allclose(weight[large], expected[large], atol=1e-5), name
        assert large.any()


def test_gradients_are_clipped(tmp_path):
    steps = []
    for clip in (1e9, 1e-3):
        trainer = Trainer(MODEL, replace(CONFIG, grad_clip=clip), data(), tmp_path, CPU)
        trainer.take_step(torch.from_numpy(make_batch(CONFIG, data(), 0)))
        moments = [trainer.optimizer.state[p]["exp_avg"] / 0.1 for p in trainer.model.parameters()]
        steps.append(torch.cat([moment.flatten() for moment in moments]).norm().item())
    assert steps[0] > 0.1
    assert steps[1] == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_counts_right_answers(tmp_path):
    probes = [Probe(64, [1, 2], [3, 4]), Probe(64, [1, 2], [3, 5]), Probe(128, [7], [8]), Probe(128, [7], [7])]
    stream = data()
    stream = TrainData(stream.tokens, stream.held_out, stream.lookups, probes=probes)
    trainer = Trainer(MODEL, CONFIG, stream, tmp_path, CPU)
    trainer.model = lambda tokens: 50.0 * torch.nn.functional.one_hot((tokens + 1) % 23, 23)  # counts upwards
    assert trainer.evaluate() == {"held_out_loss": 0.0, "lookup_accuracy": {"64": 0.5, "128": 0.5}}


# ---- Data ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_batch_depends_on_seed_and_step_alone(seed, step, fraction):
    config = replace(CONFIG, seed=seed, lookup_fraction=fraction, batch_tokens=16 * 32)
    stream = data()
    rows = make_batch(config, stream, step)
    count = 128 if step < 5 else 32  # short rows in the first half of the ten steps
    assert rows.shape == (count, 512 // count + 1)
    assert rows.dtype == np.int64
    assert (make_batch(config, stream, step) == rows).all()
    assert not np.array_equal(make_batch(config, stream, step + 1), rows)
    assert not np.array_equal(make_batch(replace(config, seed=seed + 1), stream, step), rows)
    upward = ((rows[:, 1:] - rows[:, :-1]) % 23 == 1).all(axis=1)
    downward = ((rows[:, 1:] - rows[:, :-1]) % 23 == 22).all(axis=1)
    assert (upward ^ downward).all()  # every row is a window of one or the other
    expected = count * fraction
    assert abs(downward.sum() - expected) <= (0 if fraction in (0, 1) else count / 2)


def test_windows_begin_anywhere_in_the_stream():
    stream = TrainData(np.arange(20, dtype=np.uint16), data().held_out, data().lookups)
    config = replace(CONFIG, lookup_fraction=0.0)
    starts = {int(row[0]) for step in range(5, 55) for row in make_batch(config, stream, step)}
    assert starts == {0, 1, 2, 3}  # the last window ends with the stream
    starts = {int(row[0]) for seed in range(30) for row in make_batch(replace(config, seed=seed), stream, 0)}
    assert starts == set(range(16))


def test_batches_come_in_order_and_their_errors_come_through():
    assert [batch.item() for batch in prefetch(lambda step: np.array(step), range(3, 20), CPU)] == list(range(3, 20))
    assert list(prefetch(lambda step: np.array(step), range(0), CPU)) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: np.array(1 / (5 - step)), range(9), CPU))


def test_probes_are_the_same_in_every_run():
    tokenizer = load_tokenizer()
    probes = make_probes(tokenizer, 2048)
    assert probes == make_probes(tokenizer, 2048)
    assert {probe.distance for probe in probes} == {64, 256, 1024, 2048 - 160}
    assert all(len(probe.prompt) + len(probe.answer) <= 2048 for probe in probes)
    assert len({tuple(probe.answer) for probe in probes}) > 20


# ---- Resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[1], [4], [5, 6], [2, 9]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_and_resumed_is_the_run_uncut(monkeypatch, tmp_path, uncut, stops, number):
    take_step = Trainer.take_step
    waiting = list(stops)

    def stop_at(trainer, rows):
        if waiting and trainer.step + 1 == waiting[0]:
            waiting.pop(0)
            signal.raise_signal(number)
        take_step(trainer, rows)

    monkeypatch.setattr(Trainer, "take_step", stop_at)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path)
        assert (
            json.loads(read_header(tmp_path / "checkpoint.safetensors", "resa training state")["progress"])["step"]
            == stop
        )
        assert not (tmp_path / "record.json").exists()
        assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    trained(tmp_path)
    assert_same_run(tmp_path, uncut)


def test_a_run_killed_at_any_moment_and_resumed_is_the_run_uncut(tmp_path, uncut):
    config = replace(CONFIG, checkpoint_seconds=0.0)  # after every step
    begin = time.perf_counter()
    trained(tmp_path / "timed", config)
    delays = (time.perf_counter() - begin) * np.random.default_rng(0).uniform(0.1, 0.8, size=200)
    kills = 0
    for delay in delays:
        child = os.fork()
        if child == 0:
            try:
                trained(tmp_path, config)
                os._exit(0)
            except BaseException:
                os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # of a child that has ended already this changes nothing
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        kills += 1
    trained(tmp_path, config)  # goes on, or if all is done writes the same files again
    assert kills > 0
    assert_same_run(tmp_path, uncut)


def test_a_second_signal_interrupts_at_once(monkeypatch, tmp_path):
    def signal_twice(trainer, rows):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the step went on")

    monkeypatch.setattr(Trainer, "take_step", signal_twice)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_finished_run_changes_nothing(tmp_path, uncut):
    trained(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, learning_rate=0.02)}, r"train.learning_rate: got 0.02; allowed: 0.01, as in .*"),
        ({"config": replace(CONFIG, betas=(0.9, 0.99))}, r"train.betas: got \[0.9, 0.99\]"),
        ({"config": replace(CONFIG, steps=11)}, "train.steps: got 11; allowed: 10, as in .* or a fresh start"),
        ({"model": replace(MODEL, n_head=2)}, "model.n_head: got 2; allowed: 6"),
        ({"stream": data(seed=1)}, "data: got [0-9a-f]{64}; allowed: [0-9a-f]{64}, as in"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path, change, message):
    trained(tmp_path, replace(CONFIG, steps=10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    trained(tmp_path, **change, resume=False)  # a fresh start is always possible


def test_a_fresh_start_forgets_the_old_run(tmp_path, uncut):
    trained(tmp_path, replace(CONFIG, seed=5))
    assert not torch.equal(state(tmp_path)["model.embed.weight"], state(uncut)["model.embed.weight"])
    trained(tmp_path, resume=False)
    assert_same_run(tmp_path, uncut)


def test_rhythm_may_change(monkeypatch, tmp_path, uncut):
    test_a_run_stopped_and_resumed_is_the_run_uncut(monkeypatch, tmp_path, uncut, [4], signal.SIGINT)
    trained(tmp_path, replace(CONFIG, log_every=3, eval_every=5, checkpoint_seconds=1.0))  # not refused


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trained(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: got a damaged file"):
        trained(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is nan after step \d+; try a learning_rate below 1e\+30"):
        trained(tmp_path, replace(CONFIG, learning_rate=1e30))
    assert not (tmp_path / "model.safetensors").exists()


# ---- What is left behind -------------------------------------------------------------------------------------------


def test_the_log_and_the_record_say_what_happened(uncut):
    lines = log(uncut, timeless=False)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert ["held_out_loss" in line for line in lines] == [False, True, False, True, True]  # every 4 steps, and the end
    assert [line["tokens"] for line in lines] == [128, 256, 384, 512, 640]
    assert lines[-1]["lr"] == learning_rate(CONFIG, 9)
    assert all(line["tokens_per_s"] > 0 for line in lines)
    record = json.loads((uncut / "record.json").read_text())
    assert record["model"] == asdict(MODEL)
    assert record["train"] == {**asdict(CONFIG), "betas": list(CONFIG.betas)}
    assert record["data"] == {"train_files": 1, "sha256": data().digest}
    assert record["tokens_seen"] == 640
    assert record["final"] == lines[-1]
    assert record["loss_curve"] == [[line["step"], line["loss"]] for line in lines]
    assert record["versions"]["torch"] == torch.__version__
    assert record["seconds"] > 0


def test_the_curve_is_thinned_and_keeps_its_ends(tmp_path):
    trained(tmp_path, replace(CONFIG, steps=450, batch_tokens=16, log_every=1, eval_every=1000))
    curve = json.loads((tmp_path / "record.json").read_text())["loss_curve"]
    assert len(curve) == 200
    assert [curve[0][0], curve[-1][0]] == [1, 450]


def test_the_model_is_the_checkpoint_in_bfloat16(uncut):
    model = load_model(uncut / "model.safetensors")
    assert model.config == MODEL
    stored = state(uncut)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stored["model." + name].bfloat16().float()), name
    header = read_header(uncut / "model.safetensors", "resa model")
    assert json.loads(header["train"])["steps"] == 10


def test_lines_past_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    trim_log(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    trim_log(tmp_path / "none.jsonl", 4)
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_the_callers_settings_are_left_alone(tmp_path):
    random, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    trained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_float32_matmul_precision() == precision


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "an integer ≥ 1"),
        ("steps", 2.0, "an integer ≥ 1"),
        ("batch_tokens", 100, "a multiple of context = 16"),
        ("context", True, "an integer ≥ 1"),
        ("learning_rate", 0, "a finite number > 0"),
        ("learning_rate", math.nan, "a finite number > 0"),
        ("learning_rate", "1", "a finite number > 0"),
        ("grad_clip", math.inf, "a finite number > 0"),
        ("warmup_steps", -1, "an integer ≥ 0"),
        ("weight_decay", -0.1, "a finite number ≥ 0"),
        ("betas", (0.9,), "two numbers"),
        ("betas", (0.9, 1.0), "two numbers in 0 … 1, 1 itself excluded"),
        ("lookup_fraction", 1.1, "a number in 0 … 1"),
        ("lookup_rows", 0, "an integer ≥ 1"),
        ("seed", -1, "an integer ≥ 0"),
        ("checkpoint_seconds", -1, "a finite number ≥ 0"),
        ("log_every", 0, "an integer ≥ 1"),
        ("eval_every", 0, "an integer ≥ 1"),
    ],
)
def test_configurations_are_refused_by_field(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}: got .*; allowed: {allowed}"):
        replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(16, np.uint16)}, r"data.tokens: got \(16,\); allowed: \[≥ 17\]"),
        ({"tokens": np.full(20, 23, np.uint16)}, "data.tokens: got uint16 up to 23; allowed: uint16 < vocab_size = 23"),
        ({"tokens": np.zeros(20, np.int64)}, "data.tokens: got int64 up to 0"),
        ({"held_out": np.zeros((2, 16), np.uint16)}, r"data.held_out: got \(2, 16\); allowed: \[rows, 17\]"),
        ({"held_out": np.zeros((0, 17), np.uint16)}, "data.held_out"),
        ({"lookups": np.zeros((0, 17), np.uint16)}, "data.lookups"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_any_work(tmp_path, change, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        trained(out, stream=replace(data(), **change))
    assert not out.exists()


def test_lookups_may_be_missing_where_none_are_asked_for(tmp_path):
    without = replace(data(), lookups=np.zeros((0, 17), np.uint16))
    trained(tmp_path, replace(CONFIG, lookup_fraction=0.0, steps=1), stream=without)


def test_devices_and_contexts_are_refused_before_any_work(monkeypatch, tmp_path):
    out = tmp_path / "out"
    for count, device, allowed in [
        (0, "cuda", "cpu"),
        (1, "cuda:1", "cpu, cuda:0"),
        (2, "meta", "cpu, cuda:0, cuda:1"),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(ValueError, match=f"device: got {device}; allowed: {allowed}$"):
            trained(out, device=device)
        with pytest.raises(ValueError, match=f"device: got {device}; allowed: {allowed}$"):
            run(MODEL, CONFIG, out, device=device, progress=False)
    with pytest.raises(ValueError, match="device: got gpu; allowed: cpu"):
        trained(out, device="gpu")
    with pytest.raises(ValueError, match="context: got 32; allowed: ≤ 16, the model's"):
        trained(out, replace(CONFIG, context=32))
    with pytest.raises(ValueError, match="vocab_size: got 23; allowed: 4096, the tokenizer's"):
        run(MODEL, CONFIG, out, device="cpu", progress=False)
    assert not out.exists()


# ---- Commands ------------------------------------------------------------------------------------------------------


def test_the_whole_way_from_sources_to_a_model(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "mine.py").write_text("mine = 1\n" * 50)
    config = replace(CONFIG, steps=3, context=256, batch_tokens=512)
    model_config = replace(MODEL, vocab_size=VOCAB_SIZE, context=256)
    out = tmp_path / "out"
    run(model_config, config, out, folders=[folder], device="cpu")
    assert "step 2: loss 8." in capsys.readouterr().err  # a plain line, as there is no terminal
    record = json.loads((out / "record.json").read_text())
    assert record["data"]["train_tokens"] > 10**6
    assert record["data"]["lookup_tokens"] == 8 * 257
    assert set(record["final"]["lookup_accuracy"]) == {"96", "128"}
    assert load_model(out / "model.safetensors").config == model_config
    # A second run reads the arrays that the first one kept: only the few held-out files are tokenized again.
    tokenized = []

    def tokenize(documents, *arguments, **options):
        tokenized.append(len(documents))
        return corpus.tokenize(documents, *arguments, **options)

    monkeypatch.setattr(train_module, "tokenize", tokenize)
    monkeypatch.setattr(train_module, "lookup_documents", pytest.fail)
    run(model_config, config, out, folders=[folder], device="cpu", progress=False, resume=False)
    assert json.loads((out / "record.json").read_text())["data"] == record["data"]
    assert tokenized == [record["data"]["held_out_files"]]


def test_the_tokenizer_command(tmp_path):
    result = run_tokenizer(tmp_path / "ranks", vocab_size=400, packages=False, progress=False)
    assert result["vocab_size"] == load_tokenizer(tmp_path / "ranks").n_vocab == 400
    assert 1.5 < result["held_out_bytes_per_token"] < 3.2


# ---- Programs, and steps that decode -------------------------------------------------------------------------------

LONG = Shape(context=64).config()
DECODING = replace(
    CONFIG,
    steps=4,
    batch_tokens=128,
    context=64,
    short_context=32,
    short_share=0.25,
    program_fraction=0.5,
    program_rows=4,
    sparse_share=0.5,
    sparse_interval=32,
    lookup_fraction=0.0,
    eval_every=100,
)


def long_data():
    up = (np.arange(2000) % 23).astype(np.uint16)
    rows = np.stack([up[row : row + 65] for row in range(4)])
    return TrainData(up, rows, np.zeros((0, 65), dtype=np.uint16), programs=(22 - rows).astype(np.uint16))


def test_a_short_row_is_the_beginning_of_a_program():
    config, stream = replace(DECODING, program_fraction=1.0), long_data()
    for step in (0, 3):
        batch = make_batch(config, stream, step)
        assert batch.shape[1] == config.row_tokens(step) + 1
        for row in batch:
            assert any((row == program[: len(row)]).all() for program in stream.programs)


def test_rows_of_questions_are_stretches_of_what_was_written():
    config, stream = replace(DECODING, program_fraction=0.0, task_fraction=1.0), long_data()
    stream = replace(stream, tasks=(stream.programs + 40).astype(np.uint16))
    for step in (0, 3):
        for row in make_batch(config, stream, step):
            assert any(row.tobytes() in task.astype(np.int64).tobytes() for task in stream.tasks)
    mixed = np.concatenate([make_batch(replace(config, task_fraction=0.5), stream, step) for step in range(1, 40)])
    assert 0.3 < (mixed.min(axis=1) >= 40).mean() < 0.7


def test_data_has_rows_of_questions_and_keeps_them(monkeypatch, tmp_path):
    code = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(120))
    documents = [Document("a", code, STANDARD_LIBRARY)]
    corpus = SimpleNamespace(train=documents, held_out=documents, statistics={"train_files": 1})
    monkeypatch.setattr(train_module, "local_corpus", lambda **_: corpus)
    shape = {"context": 256, "batch_tokens": 256, "short_context": 256, "lookup_fraction": 0.0}
    config = TrainConfig(**shape, task_fraction=0.5, task_rows=3, seed=5)
    made = prepare_data(config, tmp_path, progress=False)
    assert made.tasks.shape == (3, 257)
    assert made.statistics["task_tokens"] == made.tasks.size
    assert (made.tasks == write_tasks(load_tokenizer(), 5, 3, 257, RETRIEVAL, [code], progress=False)).all()
    assert made.digest != replace(made, tasks=made.tasks[:2]).digest
    longer = replace(config, context=512, short_context=512, batch_tokens=512)
    filled = prepare_data(replace(longer, task_long=1.0), tmp_path, progress=False).tasks
    expected = write_tasks(load_tokenizer(), 5, 3, 513, RETRIEVAL, [code], progress=False, long_share=1.0)
    assert (filled == expected).all()
    assert (prepare_data(longer, tmp_path, progress=False).tasks != filled).any(), "not the rows kept of the others"
    monkeypatch.setattr(train_module, "documents", lambda *_, **__: pytest.fail("not kept"))
    assert (prepare_data(config, tmp_path, progress=False).tasks == made.tasks).all()


@pytest.mark.parametrize("share", [-0.1, 1.1, "all"])
def test_a_share_of_long_rows_is_refused_by_name(share):
    with pytest.raises(ValueError, match="task_long"):
        TrainConfig(task_long=share)


def test_questions_that_are_missing_are_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tasks"):
        trained(tmp_path, replace(DECODING, task_fraction=0.5), LONG, long_data())


def test_without_programs_batches_are_what_they_were():
    """Runs of before, the shipped model's among them, stay reproducible."""
    batches = [make_batch(CONFIG, data(), step) for step in range(3)]
    digest = hashlib.sha256(b"".join(batch.tobytes() for batch in batches)).hexdigest()
    assert digest.startswith("ec1d05fee29ae1e5")


@pytest.mark.parametrize(("steps", "share", "decoding"), [(4, 0.5, [2, 3]), (5, 0.0, []), (3, 1.0, [0, 1, 2])])
def test_the_last_steps_decode(steps, share, decoding):
    config = TrainConfig(steps=steps, sparse_share=share)
    assert [step for step in range(steps) if config.decodes(step)] == decoding


def test_windows_that_cut_blocks_are_refused_before_the_run():
    with pytest.raises(ValueError, match="sparse_interval"):
        TrainConfig(sparse_share=0.5, sparse_interval=12)
    with pytest.raises(ValueError, match="sparse_share"):
        TrainConfig(sparse_share=0.5, context=8, short_context=8, batch_tokens=8)


def test_steps_that_decode_vary_and_are_a_function_of_seed_and_step():
    ways = [decoding_of(TrainConfig(sparse_interval=8), step) for step in range(60)]
    assert ways == [decoding_of(TrainConfig(sparse_interval=8), step) for step in range(60)]
    assert {way.active_ratio for way, _ in ways} == {0.05, 0.1, 0.2}
    assert {way.min_blocks for way, _ in ways} == {2, 4, 8}
    assert {way.interval for way, _ in ways} == {8}
    assert decoding_of(TrainConfig(sparse_interval=0), 1)[0].interval is None


def test_a_run_that_decodes_goes_on_as_if_uncut(tmp_path):
    stream, model = long_data(), LONG
    trained(tmp_path / "whole", DECODING, model, stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "decoded_loss_of", interrupted_after(1, train_module.decoded_loss_of))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut", replace(DECODING, checkpoint_seconds=0.0), model, stream)
    trained(tmp_path / "cut", DECODING, model, stream)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def interrupted_after(calls, function):
    """The function, which from the call after so many on raises KeyboardInterrupt."""
    left = iter(range(calls))

    def call(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def test_decoded_loss_is_the_mean_of_both_streams():
    model = Shape(context=64).model(torch.float64)
    rows = torch.tensor(long_data().programs[:2].astype(np.int64))
    dense = ReSAConfig(active_ratio=1.0, interval=None)
    with torch.no_grad():
        plain = float(loss_of(model, rows))
    assert float(decoded_loss_of(model, rows, None, dense, 16).detach()) == pytest.approx(plain, rel=1e-9)
    sparse = ReSAConfig(active_ratio=0.1, min_blocks=1, interval=None)
    assert float(decoded_loss_of(model, rows, None, sparse, 16).detach()) != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_run_uses_the_weights(tmp_path, monkeypatch, share):
    """In dense steps and in those that decode: with weights of zero no loss is left."""
    monkeypatch.setattr(train_module, "token_weights", lambda rows, *_: torch.zeros(rows[:, 1:].shape))
    trained(tmp_path, replace(DECODING, sparse_share=share, checked_weight=1.0), LONG, long_data())
    assert {line["loss"] for line in log(tmp_path)} == {0.0}


def test_asserted_digits_weigh_more():
    tokenizer = load_tokenizer()
    rows = torch.tensor([tokenizer.encode_ordinary("index = 5\nassert index == 5\nassert index == 5\n")])
    weights = token_weights(rows, words(tokenizer), 2.0)
    n = rows.shape[1] - 1
    assert weights.shape == (1, n)
    assert sorted(weights[0].tolist())[-2:] == pytest.approx([1 / n + 1, 1 / n + 1])
    assert weights.sum().item() == pytest.approx(3.0)
    alone = torch.tensor([tokenizer.encode_ordinary("index = 5\n")])
    assert token_weights(alone, words(tokenizer), 2.0).sum().item() == pytest.approx(1.0)


# ---- Training a part -----------------------------------------------------------------------------------------------

ATTENTION = replace(CONFIG, part="attention")


def test_the_attention_alone_is_trained(tmp_path, uncut):
    init = uncut / "model.safetensors"
    before = dict(load_model(init).named_parameters())
    after = dict(trained(tmp_path, ATTENTION, init=init).named_parameters())
    assert all(weight.requires_grad for weight in after.values()), "whoever trains on trains all of it"
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == (".attn." not in name), name
    assert log(tmp_path)[-1]["loss"] < log(tmp_path)[0]["loss"]


def test_a_run_of_a_part_goes_on_as_if_uncut(monkeypatch, tmp_path, uncut):
    init = uncut / "model.safetensors"
    trained(tmp_path / "whole", ATTENTION, init=init)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "loss_of", interrupted_after(4, loss_of))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut", replace(ATTENTION, checkpoint_seconds=0.0), init=init)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    trained(tmp_path / "cut", ATTENTION, init=init)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_part_needs_the_rest(tmp_path):
    with pytest.raises(ValueError, match=r"part: got 'attention'; allowed: 'all' where there is no init"):
        trained(tmp_path, ATTENTION)
    with pytest.raises(ValueError, match="part: got 'mlp'; allowed: all, attention"):
        TrainConfig(part="mlp")
